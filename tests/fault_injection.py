"""
A soak test: random faults in every file that the scripts read, and kills at random moments.
It is not part of make test.

    python tests/fault_injection.py --seconds=300 --seed=0      # make soak

Each try copies a small project (input texts, prepared data, a half-done pass, trained models, a
Hugging Face model) and runs one script on it with one fault: a file is damaged, the size of files
is limited, or the script is killed. Then it checks:
  1. the script ends with status 0, or with status 1 and one line that begins with "error: ";
     it never ends with a traceback;
  2. no input of the user's has changed, and no file is gone that the script did not write;
  3. a run that could be resumed before can be resumed after, from the same step or a later one;
     the log keeps its records up to that step;
  4. after a kill, or with a damaged file in the folder of its run, the command gives in the end
     what an undisturbed one gives.
"""
import argparse
import base64
import contextlib
import gzip
import io
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
import export
import localfiles
import prepare
import sample
import train
from checkpoint import checkpoint_folders, load_checkpoint
from outdir import read_log
from ranks import Ranks

torch.set_num_threads(1)
localfiles.BLOCK = 3000  # bytes, so that a pass has many blocks and can be interrupted between them
DOCS = [f"document {i}: " + "a few words more " * (i % 40) for i in range(1500)]
TRAIN = ["--n_layer=1", "--n_head=2", "--n_kv_head=1", "--n_embd=16", "--block_size=32",
         "--n_index_head=2", "--d_index=8", "--k_base=8", "--k_min=4", "--k_max=12",
         "--batch_size=2", "--index_warmup_iters=3", "--warmup_iters=2",
         "--eval_iters=1", "--log_interval=1", "--eval_interval=2", "--plot=False",
         "--min_lr=6e-4",  # steps repeated with a higher max_iters have the same learning rate
         "--device=cpu"]

INPUTS = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.txt", "f.json"]


# ---- the project and its commands

def build(folder):
    """
    Inputs of every kind, prepared data, a pass that was interrupted, models of four steps (GSA,
    dense, and GSA in an older version's file), and a Hugging Face model.
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
    train.main(train_command("out", "--max_iters=4"))
    train.main(train_command("dense", "--max_iters=4", "--attention=dense"))
    build_old()
    build_llama()


def build_old():
    """The run in out once more, as older versions saved it: old/ckpt.pt."""
    saved = load_checkpoint("out")
    run = train.Run(train.settings([], saved), Ranks("cpu"), train.StopSignal(), saved)
    old = {name: saved[name] for name in ("step", "config", "model_config", "meta", "data_path")}
    old["model"] = run.raw.state_dict()
    old["optimizer"] = [optimizer.state_dict() for optimizer in run.optimizers]
    shutil.copytree("out", "old", ignore=shutil.ignore_patterns("step_*"))
    torch.save(old, "old/ckpt.pt")


def build_llama():
    """A Llama of one layer with random weights and a byte-level tokenizer."""
    import tokenizers
    import transformers
    bytelevel = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = bytelevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False,
                                             initial_alphabet=bytelevel.alphabet())
    tokenizer.train_from_iterator(DOCS[:40], trainer)
    tokenizer.add_special_tokens(["<|end_of_text|>"])
    end = tokenizer.token_to_id("<|end_of_text|>")
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, bos_token_id=end, eos_token_id=end)
    transformers.LlamaForCausalLM(config).save_pretrained("llama")
    tokenizer.save("llama/tokenizer.json")


def pass_command(name, out, *more):
    return [f"--dataset=in/{name}", "--tokenizer=tiktoken:ranks", "--num_proc=1",
            "--val_fraction=0.1", f"--name={out}", "--shard_tokens=50000", "--commit_seconds=0",
            *more]


def train_command(out, *more):
    return ["config.py", "--data=data/done", f"--out_dir={out}", *more]


def commands():
    """All commands: a script's main, its arguments, and the folder that it may write to."""
    few = ["--max_tokens=300", "--samples=1", "--seeds=1", "--depths=1", "--lengths=32", "--plot=0"]
    short = ["--num_samples=1", "--max_new_tokens=8"]
    return [
        *((prepare.main, pass_command(name, "new"), "data/new") for name in INPUTS),
        (prepare.main, pass_command("a.jsonl", "new", "--tokenizer=llama"), "data/new"),
        (prepare.main, pass_command("a.jsonl", "half", "--dedup=exact"), "data/half"),
        (prepare.main, pass_command("a.jsonl", "done"), "data/done"),
        (prepare.main, ["--inspect=data/done"], "data/done"),
        (train.main, ["--init_from=resume", "--out_dir=out", "--max_iters=7"], "out"),
        (train.main, ["--init_from=resume", "--out_dir=old", "--max_iters=7"], "old"),
        (train.main, train_command("out", "--init_from=auto", "--max_iters=7"), "out"),
        (train.main, train_command("new", "--init_from=auto", "--max_iters=5"), "new"),
        (train.main, train_command("new", "--init_from=auto:dense", "--max_iters=5"), "new"),
        (train.main, train_command("new", "--init_from=out", "--max_iters=5"), "new"),
        (train.main, train_command("new", "--init_from=auto:hf:llama", "--max_iters=5"), "new"),
        (sample.main, ["--out_dir=out", *short], "out"),
        (sample.main, ["--out_dir=old", *short], "old"),
        (evaluation.main, ["--out_dir=out", *few], "out"),
        (export.main, ["--export=out", "--to=new"], "new")]


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
    """What a command must always make: tokens, a run's last checkpoint, an exported model."""
    newest = next(iter(checkpoint_folders(folder).values()), folder)
    return {path: raw for path, raw in content(folder).items()
            if path.endswith((".bin", "meta.json"))
            or path.endswith(".safetensors") and path.startswith(newest)}


def loads(folder):
    """The step of a folder's checkpoint, None if it cannot be loaded."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it says what is damaged
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
    if step is not None and (loads(writable) or 0) < step:
        found.append("the checkpoint is lost")
    if step is not None and not set(kept) <= set(records(writable, step)):
        found.append("records of the log are lost")
    return found


def one_try(rng, undisturbed):
    """Returns (kind of fault, problems, details)."""
    # 1. the fault
    main, argv, writable = rng.choice(commands())
    files = [p for p in sorted(Path(".").rglob("*")) if p.is_file()]
    fault = rng.choice(["damage", "damage", "damage", "damage", "kill", "small files"])
    limit = kill_after = None
    where = "-"
    if fault == "damage":
        path = rng.choice(files)
        fault = damage(rng, path)
        where = str(path)
    elif fault == "kill":
        kill_after = rng.random() * 1.2
    else:
        limit = int(10 ** rng.uniform(1, 5.5))
    # 2. the command
    before, step = content(), loads(writable)
    kept = records(writable, step) if step is not None else []
    status, errors = run(main, argv, limit, kill_after)
    found = problems(status, errors, before, writable, step, kept)
    # 3. what it has made in the end
    if kill_after is not None or limit is not None:
        status, more = run(main, argv)
        # a folder that is complete is not written again, unless the command says auto
        complete = "holds a run already" in more or "exists and is not an empty folder" in more
        if status != 0 and not (writable == "new" and complete):
            found.append(f"the command run again ends with {status}: {more[-300:]}")
    # a resumed run repeats the steps of a damaged checkpoint; a ckpt.pt has no checksums
    comparable = where == "-" or (where.startswith("out/") and main is train.main
                                  and writable == "out")
    if comparable and status == 0 and not found:
        if results(writable) != undisturbed[tuple(argv)]:
            found.append("the result is not that of an undisturbed run")
    return fault, found, f"{fault} {where}: {main.__module__} {' '.join(argv)}\n{errors[-1500:]}"


def fresh(folder):
    """The project as it was built, in the working directory again."""
    os.chdir(folder)
    shutil.rmtree(folder / "try", ignore_errors=True)
    shutil.copytree(folder / "base", folder / "try")
    os.chdir(folder / "try")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults_"))
    rng = random.Random(args.seed)
    tries, failed, began = Counter(), 0, time.time()
    try:
        # torch starts its threads in the child: a process that has them cannot fork
        child = os.fork()
        if child == 0:
            try:
                with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                    build(folder / "try")  # all tries run in it, since a project holds its paths
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if os.waitpid(child, 0)[1]:
            sys.exit("error: the project could not be built")
        shutil.copytree(folder / "try", folder / "base")
        os.chdir(folder / "try")
        undisturbed = {}
        for main, argv, writable in commands():
            fresh(folder)
            status, errors = run(main, argv)
            assert status == 0, f"{argv}: {errors}"
            undisturbed[tuple(argv)] = results(writable)
        while time.time() - began < args.seconds:
            fresh(folder)
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
