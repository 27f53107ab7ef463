"""
A soak test of a training on one process that is interrupted: kills, a full disk, damaged files,
signals. It is not part of make test. soak_ranks.py does the same to several ranks.

    python tests/soak_training.py --seed=0      # make soak; about six minutes

Every part disturbs a tiny training, starts it again by the same command (--init_from=auto) until it
ends, and compares it with a training that nothing disturbed: weights, V̄, optimizer state and the
records of the log, without times, are equal bit for bit. The training switches from dense to sparse
attention after a quarter of its steps, adds up two micro-batches a step, and uses Muon.
A part that fails prints why, and the exit status is 1.
"""
import argparse
import contextlib
import glob
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import torch

from checkpoint import check_files, checkpoint_folders, load_checkpoint
from outdir import read_log

STEPS = 240
TRAIN = [str(ROOT / "train.py"), "--n_layer=2", "--n_head=2", "--n_kv_head=1", "--n_embd=32",
         "--block_size=64", "--n_index_head=2", "--d_index=8", "--k_base=16", "--k_min=4",
         "--k_max=24", "--batch_size=2", "--grad_accum=2", "--muon=true", "--warmup_iters=5",
         "--learning_rate=3e-3", "--min_lr=1e-4", "--eval_iters=1", "--device=cpu", "--plot=false",
         "--data=demo", "--log_interval=3", "--eval_interval=5",
         f"--index_warmup_iters={STEPS // 4}", f"--max_iters={STEPS}"]
LONGEST = 400  # seconds that a part may take
# what a save writes, in this order; a kill is aimed at the moment at which one of them appears
SAVED = ["", "model.safetensors", "optimizer.safetensors", "run.json", "manifest.json.partial",
         "manifest.json"]
started = []  # processes


# ---- processes

def command(out, *more):
    """The training on one process; it goes on where out has a checkpoint."""
    return [sys.executable, *TRAIN, f"--out_dir={out}", "--init_from=auto", *more]


def start(argv):
    """A process whose output can be read. It ends with its part."""
    process = subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started.append(process)
    return process


def finish(process, status=0):
    """Wait for the end, check the exit status. Returns (lines of stdout, lines of stderr)."""
    out, errors = process.communicate()
    assert process.returncode == status, f"status {process.returncode}, not {status}: {errors}"
    return out.splitlines(), errors.splitlines()


def wait_for_step(process, step):
    """Read the lines of a training until it has done so many steps. False: it has ended."""
    for line in process.stdout:
        found = re.match(r"step (\d+):", line)
        if found and int(found[1]) >= step:
            return True
    return False


# ---- what a training leaves behind

def saves_begun(out):
    """The folders of checkpoints that are being written or were left unfinished: {(name, time)}."""
    found = set()
    for path in glob.glob(f"{out}/step_*.partial"):
        try:
            found.add((path, os.stat(path).st_ctime_ns))
        except FileNotFoundError:
            pass
    return found


def newest_step(out):
    return max(checkpoint_folders(out), default=0)


def records(out):
    """The log without times."""
    return [{k: v for k, v in r.items() if "second" not in k}
            for r, _ in read_log(f"{out}/log.jsonl")]


def assert_same(out, reference):
    """Weights, V̄, optimizer state and log of two trainings are equal bit for bit."""
    a, b = load_checkpoint(out), load_checkpoint(reference)
    assert a["step"] == b["step"] == STEPS, f"{out} ends at step {a['step']}"
    for part in ("model", "optimizer"):
        assert set(a[part]) == set(b[part]), f"{out}: other names in {part}"
        for name, x in a[part].items():
            y = b[part][name]
            assert x.dtype == y.dtype and torch.equal(x, y), f"{out}: {name} is another"
    assert a["stability"] == b["stability"], f"{out}: other counts"
    for x, y in zip(records(out), records(reference), strict=True):
        assert x == y, f"{out}: the log says {x}, not {y}"


# ---- the parts. Each returns what it has seen, in words

def kills(rng, reference, out, number, *more):
    """kill -9 at random instants: while it starts, after a random step, and within a save."""
    saving = lost = 0
    for i in range(number):
        begun, before = saves_begun(out), newest_step(out)
        process = start(command(out, *more))
        kind = ("start", "step", "save", "save")[i % 4]
        if kind == "start":
            deadline = time.time() + rng.uniform(0, 5)
            while time.time() < deadline and newest_step(out) == before:
                time.sleep(0.01)
        else:
            # so small that the training does not end before the last kill
            wait_for_step(process, before + rng.randrange(1, STEPS // number))
        if kind == "step":
            time.sleep(rng.uniform(0, 0.2))
        if kind == "save":
            name = rng.choice(SAVED)
            while process.poll() is None:
                if any(os.path.exists(os.path.join(path, name))
                       for path, _ in saves_begun(out) - begun):
                    break
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before the kill"
        saving += bool(saves_begun(out) - begun)
        lost += newest_step(out) == before
    finish(start(command(out, *more)))
    assert_same(out, reference)
    return (f"{number} kills, {saving} of them within a save, {lost} before a new checkpoint; "
            "the same bits")


def retrofit(rng, number):
    """Kills in a run that adds gates and an indexer to a dense model."""
    finish(start(command("dense", "--attention=dense", "--max_iters=20")))
    finish(start(command("retrofit", "--init_from=auto:dense")))
    return kills(rng, "retrofit", "retrofit_killed", number, "--init_from=auto:dense")


def full_disk(rng, number):
    """Something else fills the disk: the training ends with one line, what was saved stays."""
    os.mkdir("disk")
    size = sum(p.stat().st_size for p in Path("reference").glob(f"step_*{STEPS}/*"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={6 * size}", "none", "disk"]
    if os.geteuid() or subprocess.run(mount).returncode:
        return "left out, since a tmpfs cannot be mounted"
    saved = []
    try:
        for i in range(number):
            process = start(command("disk/run"))
            wait_for_step(process, newest_step("disk/run") + rng.randrange(1, STEPS // number))
            before = newest_step("disk/run")
            # room for a part of a checkpoint, or for a few records of the log
            room = rng.uniform(0, size if i % 2 else 10_000)
            with open("disk/ballast", "ab", buffering=0) as ballast:
                while process.poll() is None:
                    free = shutil.disk_usage("disk").free
                    with contextlib.suppress(OSError):
                        ballast.write(bytes(max(0, int(free - room))))
                    time.sleep(0.001)
            _, errors = finish(process, 1)
            assert len(errors) == 1 and re.match("error: .*No space left", errors[0]), errors
            step = newest_step("disk/run")
            assert step >= before, "a checkpoint is gone"
            for path in checkpoint_folders("disk/run").values():
                check_files(path)
            saved.append(step)
            os.remove("disk/ballast")
        finish(start(command("disk/run")))
        assert_same("disk/run", "reference")
    finally:
        subprocess.run(["umount", "--lazy", "disk"], check=True)
    return f"full {number} times, the last checkpoints {saved}; the same bits"


def damage(rng):
    """Each file of the newest checkpoint is cut, emptied, or has one bit flipped."""
    harmless = tries = 0
    for name in ("model.safetensors", "optimizer.safetensors", "run.json", "manifest.json"):
        for kind in ("cut", "empty", "bit"):
            shutil.rmtree("damaged", ignore_errors=True)
            shutil.copytree("reference", "damaged")
            path = Path("damaged", f"step_{STEPS:08}", name)
            raw = bytearray(path.read_bytes())
            at = rng.randrange(1, len(raw))
            if kind == "bit":
                raw[at] ^= 1 << rng.randrange(8)
            path.write_bytes(raw if kind == "bit" else raw[:at] if kind == "cut" else b"")
            lines, _ = finish(start(command("damaged")))
            found = any(f"{path.parent}: {name}" in line and "taken instead" in line
                        for line in lines)
            # the manifest's own bits have no checksum: blanks and the validation loss may change
            assert found or (kind, name) == ("bit", "manifest.json"), f"{name} {kind}: {lines[:3]}"
            harmless += not found
            tries += 1
            assert_same("damaged", "reference")
    return f"{tries} files damaged, {tries - harmless} fell back a checkpoint; the same bits"


def signals(rng, number):
    """SIGTERM and Ctrl-C: the training saves and ends with one line."""
    stopped = []
    for i in range(number):
        process = start(command("signalled"))
        wait_for_step(process, newest_step("signalled") + rng.randrange(1, STEPS // number))
        time.sleep(rng.uniform(0, 0.1))
        interrupt = i % 2
        process.send_signal(signal.SIGINT if interrupt else signal.SIGTERM)
        lines, errors = finish(process, 130 if interrupt else 0)
        last = [line for line in lines if not line.startswith("step ")]
        step = newest_step("signalled")
        assert last == [f"stopped at step {step}, the last checkpoint in signalled is that of "
                        f"step {step}"] and not errors, (last, errors)
        stopped.append(step)
    finish(start(command("signalled")))
    assert_same("signalled", "reference")
    return f"{number} signals, stopped at steps {stopped}; the same bits"


# ---- all of it

def soak(parts, reference):
    """
    Run parts, {name: function of a random.Random}, in a new folder, where the data and a training
    that nothing disturbs are made first. reference: the command of that training.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default=",".join(parts), help="names, with commas")
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, too_long)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="soak_") as folder, contextlib.chdir(folder):
        finish(start([sys.executable, str(ROOT / "prepare.py"), "--dataset=demo", "--num_proc=1",
                      "--num_tokens=40000", "--val_fraction=0.2", "--data_dir=."]))
        finish(start(reference))
        for name in args.parts.split(","):
            began = time.time()
            signal.alarm(LONGEST)
            try:
                verdict = parts[name](random.Random(args.seed))
            except (AssertionError, OSError, ValueError) as e:  # a UserError is a ValueError
                failed += 1
                verdict = f"FAILED: {e}"
            signal.alarm(0)
            for process in started:
                process.kill()
            started.clear()
            print(f"{name}: {verdict} ({time.time() - began:.0f} s)", flush=True)
    print(f"{failed} parts failed, seed {args.seed}")
    sys.exit(failed > 0)


def too_long(*_):
    raise AssertionError(f"it takes longer than {LONGEST} s")


def main():
    soak({"kills": lambda rng: kills(rng, "reference", "killed", 20),
          "retrofit": lambda rng: retrofit(rng, 10),
          "full_disk": lambda rng: full_disk(rng, 6),
          "damage": damage,
          "signals": lambda rng: signals(rng, 8)}, command("reference"))


if __name__ == "__main__":
    main()
