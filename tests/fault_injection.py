"""
A soak test: random faults in every file that the scripts read, and kills at random moments.
It is not part of make test.

    python tests/fault_injection.py --seconds=600 --seed=0      # make soak

Each try copies a small project (input texts, prepared data, a half-done pass, a trained model) and
runs one script on it with one fault: a file is damaged, the size of files is limited, or the script
is killed. Then it checks:
  1. the script ends with status 0, or with status 1 and one line that begins with "error: ";
     it never ends with a traceback;
  2. no input of the user's has changed, and no file is gone that the script did not write;
  3. a checkpoint that could be loaded before can be loaded after;
     the log keeps its records up to the checkpoint;
  4. after a kill the same command, run again, gives what an undisturbed run gives.
"""
import argparse
import base64
import gzip
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import zstandard
import pyarrow
import pyarrow.parquet

import configurator
import eval as evaluation
import localfiles
import prepare
import sample
import train
from checkpoint import load_checkpoint, read_log

torch.set_num_threads(1)
localfiles.BLOCK = 3000  # bytes, so that a pass has many blocks and can be interrupted between them
DOCS = [f"document {i}: " + "a few words more " * (i % 40) for i in range(1500)]
TRAIN = ["--n_layer=1", "--n_head=2", "--n_kv_head=1", "--n_embd=16", "--block_size=32",
         "--n_index_head=2", "--d_index=8", "--k_base=8", "--k_min=4", "--k_max=12",
         "--batch_size=2", "--index_warmup_iters=3", "--warmup_iters=2",
         "--eval_iters=1", "--log_interval=1", "--eval_interval=2", "--plot=false",
         "--device=cpu"]


# ---- the project and its commands

def build(folder):
    """
    Inputs of every kind, prepared data, a pass that was interrupted, and a model of four steps.
    """
    inputs = folder / "in"
    inputs.mkdir(parents=True)
    raw = "".join(json.dumps({"text": d}) + "\n" for d in DOCS).encode()
    (inputs / "a.jsonl").write_bytes(raw)
    (inputs / "b.jsonl.gz").write_bytes(gzip.compress(raw))
    (inputs / "c.jsonl.zst").write_bytes(zstandard.compress(raw))
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCS}), inputs / "d.parquet",
                                row_group_size=200)
    (inputs / "e.txt").write_text("\n\n".join(DOCS))
    (inputs / "f.json").write_text(json.dumps([{"text": d} for d in DOCS], indent=1))
    (folder / "ranks").write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i
                                            for i in range(256)))
    (folder / "config.py").write_text(
        '"""A config."""\n'
        + "\n".join(f[2:].replace("=cpu", '="cpu"') for f in TRAIN)
        + "\n")
    os.chdir(folder)
    write, calls = prepare.write_documents, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return write(*args)
    prepare.main(pass_command("a.jsonl", "done"))
    prepare.write_documents = interrupted
    try:
        prepare.main(pass_command("a.jsonl", "half", "--dedup=exact"))
    except KeyboardInterrupt:
        pass
    prepare.write_documents = write
    train.main(["config.py", "--data=data/done", "--out_dir=out", "--max_iters=4"])


def pass_command(name, out, *more):
    return [f"--dataset=in/{name}", "--tokenizer=tiktoken:ranks", "--num_proc=1",
            "--val_fraction=0.1", f"--name={out}", "--shard_tokens=50000", "--commit_seconds=0",
            *more]


def commands(rng):
    """A script's main, its arguments, and the folder that it may write to."""
    name = rng.choice(sorted(os.listdir("in")))
    few = ["--max_tokens=300", "--samples=1", "--seeds=1", "--depths=1", "--lengths=32", "--plot=0"]
    return rng.choice([
        (prepare.main, pass_command(name, "new"), "data/new"),
        (prepare.main, pass_command("a.jsonl", "half", "--dedup=exact"), "data/half"),
        (prepare.main, pass_command("a.jsonl", "done"), "data/done"),
        (prepare.main, ["--inspect=data/done"], "data/done"),
        (train.main, ["--init_from=resume", "--out_dir=out", "--max_iters=7"], "out"),
        (train.main, ["config.py", "--data=data/done", "--out_dir=out2", "--max_iters=5"], "out2"),
        (sample.main, ["--out_dir=out", "--num_samples=1", "--max_new_tokens=8"], "out"),
        (evaluation.main, ["--out_dir=out", *few], "out")])


# ---- the faults

def damage(rng, path):
    """Damage one file in a random way. Returns what was done."""
    raw = path.read_bytes()
    kind = rng.choice(["cut", "empty", "flip a bit", "garbage behind", "random bytes", "gone",
                       "other types", "a folder"])
    at = rng.randrange(len(raw)) if raw else 0
    if kind == "cut":
        path.write_bytes(raw[:at])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "flip a bit" and raw:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1:])
    elif kind == "garbage behind":
        path.write_bytes(raw + rng.randbytes(50))
    elif kind == "random bytes":
        path.write_bytes(raw[:at] + rng.randbytes(40) + raw[at + 40:])
    elif kind == "gone":
        path.unlink()
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    elif path.suffix in (".json", ".jsonl"):
        lines = (raw.decode(errors="replace").splitlines() if path.suffix == ".jsonl"
                 else [raw.decode(errors="replace")])
        i = rng.randrange(len(lines)) if lines else 0
        try:
            lines[i:i + 1] = [json.dumps(other_types(rng, json.loads(lines[i])))]
        except (ValueError, IndexError):
            pass
        path.write_text("\n".join(lines) + "\n")
    elif path.name == "ckpt.pt":
        try:
            torch.save(other_types(rng, torch.load(path, weights_only=True)), path)
        except Exception:
            pass
    return kind


def other_types(rng, value):
    """The value, something inside it replaced by something else."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        return {**value, key: other_types(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        i = rng.randrange(len(value))
        return value[:i] + [other_types(rng, value[i])] + value[i + 1:]
    return rng.choice([None, -1, 10**30, 1.5, "x", "../x", [], {}, [None], True,
                       float("nan"), float("inf")])


def run(main, argv, limit=None, kill_after=None):
    """
    (exit status, stderr) of a script in a process of its own; status None: it was killed.
    limit: no file may grow beyond so many bytes, as on a full disk.
    kill_after: seconds until kill -9.
    """
    reading, writing = os.pipe()  # a pipe, since the limit would hold for a file too
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(writing, 2)
            sys.stdout = open(1, "w", closefd=False)
            sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")
            if limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            configurator.run(main, argv)
            status = 0
        except SystemExit as e:
            if isinstance(e.code, str):
                print(e.code, file=sys.stderr)
            status = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    errors, deadline = b"", time.time() + (60 if kill_after is None else kill_after)
    while select.select([reading], [], [], max(0, deadline - time.time()))[0]:
        part = os.read(reading, 1 << 16)
        if not part:
            break
        errors += part
    else:
        os.kill(child, signal.SIGKILL)
        errors += b"" if kill_after is not None else b"Traceback: it hangs"
    os.close(reading)
    _, status = os.waitpid(child, 0)
    code = None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return code, errors.decode(errors="replace")


# ---- the checks

def content(folder="."):
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def results(folder):
    return {path: raw for path, raw in content(folder).items()
            if path.endswith((".bin", "meta.json"))}


def loads(folder):
    """The step of a folder's checkpoint, None if it cannot be loaded."""
    try:
        return load_checkpoint(folder)["step"]
    except configurator.UserError:
        return None


def records(folder, step):
    """The training losses of the log up to a step."""
    try:
        return [(r["step"], r.get("loss")) for r, _ in read_log(f"{folder}/log.jsonl")
                if r["step"] <= step and r.get("kind") == "train"]
    except OSError:
        return []


def problems(status, errors, before, writable, step, kept):
    """What is wrong after a try, in words; [] if nothing is."""
    found = []
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.strip()]
    if "Traceback" in errors or status not in (None, 0, 1):
        found.append("traceback")
    elif (status == 1
            and sum(line.startswith(("error: ", "interrupted")) for line in lines) != 1):
        found.append("no single error line")
    after = content()
    for path, raw in before.items():
        if not path.startswith(writable + "/") and after.get(path) != raw:
            found.append(f"{path} was changed or is gone")
    if step is not None and loads("out") is None:
        found.append("the checkpoint is lost")
    if step is not None and not set(kept) <= set(records("out", step)):
        found.append("records of the log are lost")
    return found


def one_try(rng, undisturbed):
    """Returns (kind of fault, problems, details)."""
    main, argv, writable = commands(rng)
    files = [p for p in sorted(Path(".").rglob("*"))
             if p.is_file()]
    fault = rng.choice(["damage", "damage", "damage", "damage", "kill", "small files"])
    limit = kill_after = None
    if fault == "damage":
        path = rng.choice(files)
        fault = f"{damage(rng, path)}"
        where = str(path)
    elif fault == "kill":
        kill_after, where = rng.random() * 1.2, "-"
    else:
        limit, where = int(10 ** rng.uniform(1, 5.5)), "-"
    before, step = content(), loads("out")
    kept = records("out", step) if step is not None else []
    status, errors = run(main, argv, limit, kill_after)
    found = problems(status, errors, before, writable, step, kept)
    if kill_after is not None or limit is not None:
        again, more = run(main, argv)
        if again != 0 and not (writable == "out2" and "holds a run already" in more):
            found.append(f"the command run again ends with {again}: {more[-300:]}")
        elif writable in undisturbed and not found:
            if results(writable) != undisturbed[writable]:
                found.append("the result is not that of an undisturbed run")
    return fault, found, f"{fault} {where}: {main.__module__} {' '.join(argv)}\n{errors[-1500:]}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults_"))
    rng, base = random.Random(args.seed), folder / "base"
    tries, failed, began = Counter(), 0, time.time()
    try:
        # torch starts its threads in the child: a process that has them cannot fork
        child = os.fork()
        if child == 0:
            try:
                build(folder / "try")  # every try runs in this folder: a project holds its paths
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if os.waitpid(child, 0)[1]:
            sys.exit("error: the project could not be built")
        shutil.copytree(folder / "try", base)
        os.chdir(folder / "try")
        argv = pass_command("a.jsonl", "half", "--dedup=exact")
        status, errors = run(prepare.main, argv)
        assert status == 0, errors
        undisturbed = {"data/half": results("data/half")}
        while time.time() - began < args.seconds:
            work = folder / "try"
            os.chdir(folder)
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(base, work)
            os.chdir(work)
            fault, found, details = one_try(rng, undisturbed)
            tries[fault] += 1
            if found:
                failed += 1
                print(f"FAILED, try {sum(tries.values())}: {'; '.join(found)}\n{details}\n",
                      flush=True)
    finally:
        os.chdir(ROOT)
        shutil.rmtree(folder, ignore_errors=True)
    kinds = ", ".join(f"{n} {kind}" for kind, n in tries.most_common())
    print(f"{sum(tries.values())} tries, {failed} failed ({kinds}), seed {args.seed}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
