"""
A soak test of a training that is interrupted: kills, a full disk, damaged files, signals, lost
ranks. It is not part of make test.

    python tests/soak_training.py --seed=0      # make soak; about eight minutes

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
# gloo meets on the loopback device. Without the last, a machine that is started again waits in vain
# for the address of rank 0: in torch 2.13 rank 0 tells it in the first round only
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo",
               "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

import torch

from checkpoint import check_files, checkpoint_folders, load_checkpoint
from configurator import UserError
from outdir import read_log

STEPS = 240
TRAIN = [str(ROOT / "train.py"), "--n_layer=2", "--n_head=2", "--n_kv_head=1", "--n_embd=32",
         "--block_size=64", "--n_index_head=2", "--d_index=8", "--k_base=16", "--k_min=4",
         "--k_max=24", "--batch_size=2", "--grad_accum=2", "--muon=true", "--warmup_iters=5",
         "--learning_rate=3e-3", "--min_lr=1e-4", "--eval_iters=1", "--device=cpu", "--plot=false",
         "--data=demo", "--log_interval=3", "--eval_interval=5", f"--index_warmup_iters={STEPS // 4}",
         f"--max_iters={STEPS}"]
LONGEST = 400  # seconds that a part may take
# what a save writes, in this order; a kill is aimed at the moment at which one of them appears
SAVED = ["", "model.safetensors", "optimizer.safetensors", "run.json", "manifest.json.partial",
         "manifest.json"]


# ---- processes

def command(out, *more):
    """The training on one process; it goes on where out has a checkpoint."""
    return [sys.executable, *TRAIN, f"--out_dir={out}", "--init_from=auto", *more]


def start(argv, output=None):
    """A process in a group of its own. output: the name of a file for its output, else pipes."""
    if output:
        with open(output, "a") as f:
            return subprocess.Popen(argv, stdout=f, stderr=f, start_new_session=True)
    return subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)


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
            time.sleep(rng.uniform(0, 5))
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


# ---- several ranks

def two_ranks(out, *more):
    """The training on two processes of one machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            *command(out, *more)[1:]]


def agent(port, output):
    """One of two machines: its agent starts one process, and all start again when one fails."""
    return start([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                  "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--max_restarts=3",
                  *command("agents")[1:]], output)


def workers(process):
    """The ids of an agent's processes."""
    found = []
    for path in glob.glob(f"/proc/{process.pid}/task/*/children"):
        found += [int(word) for word in Path(path).read_text().split()]
    return found


def wait_for_save(out, step, agents):
    """Wait until a run has a checkpoint at or behind a step."""
    while newest_step(out) < step:
        assert all(a.poll() is None for a in agents), "an agent has ended"
        time.sleep(0.05)


def lost_ranks(rng):
    """A worker is killed, then a whole machine, which is started again by the same command."""
    finish(start(two_ranks("two")))
    port = rng.randrange(20_000, 30_000)
    agents = [agent(port, "agent0.txt")]
    try:
        time.sleep(4)  # all meet at the first agent; a run cannot lose that one
        agents.append(agent(port, "agent1.txt"))
        # 1. a worker
        wait_for_save("agents", rng.randrange(5, STEPS // 3), agents)
        os.kill(rng.choice(workers(rng.choice(agents))), signal.SIGKILL)
        killed = [newest_step("agents")]
        # 2. the second machine: the agent, and what it had started
        wait_for_save("agents", rng.randrange(STEPS // 2, STEPS * 3 // 4), agents)
        lost = workers(agents[1])
        agents[1].kill()
        for pid in lost:
            os.kill(pid, signal.SIGKILL)
        agents[1].wait()
        killed.append(newest_step("agents"))
        agents[1] = agent(port, "agent1.txt")
        for i, a in enumerate(agents):
            assert a.wait() == 0, f"status {a.returncode}: " + Path(f"agent{i}.txt").read_text()
    finally:
        for a in agents:
            for pid in workers(a) if a.poll() is None else []:
                os.kill(pid, signal.SIGKILL)
            a.kill()
    assert_same("agents", "two")
    return f"a worker and a machine lost behind steps {killed}; the same bits"


# ---- all of it

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--parts", default="", help="names of parts, with commas; default: all")
    args = parser.parse_args()
    parts = {
        "kills": lambda rng: kills(rng, "reference", "killed", args.kills),
        "retrofit": lambda rng: retrofit(rng, args.kills // 2),
        "full_disk": lambda rng: full_disk(rng, 6),
        "damage": damage,
        "signals": lambda rng: signals(rng, 8),
        "lost_ranks": lost_ranks,
    }
    wanted = args.parts.split(",") if args.parts else list(parts)
    folder = tempfile.mkdtemp(prefix="soak_")
    os.chdir(folder)
    signal.signal(signal.SIGALRM, too_long)
    failed = 0
    try:
        prepare = [sys.executable, str(ROOT / "prepare.py"), "--dataset=demo", "--num_proc=1",
                   "--num_tokens=40000", "--val_fraction=0.2", "--data_dir=."]
        finish(start(prepare))
        finish(start(command("reference")))
        for name in wanted:
            began = time.time()
            signal.alarm(LONGEST)
            try:
                verdict = parts[name](random.Random(args.seed))
            except (AssertionError, OSError, UserError, ValueError) as e:
                failed += 1
                verdict = f"FAILED: {e}"
            signal.alarm(0)
            print(f"{name}: {verdict} ({time.time() - began:.0f} s)", flush=True)
    finally:
        os.chdir(ROOT)
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(wanted)} parts, {failed} failed, seed {args.seed}")
    sys.exit(failed > 0)


def too_long(*_):
    raise AssertionError(f"it takes longer than {LONGEST} s")


if __name__ == "__main__":
    main()
