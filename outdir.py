"""
The folder of a training run: who may write to it, config.json, and the log.

    with run_folder("out", ranks):                  # no other training may use it meanwhile
        log = open_log("out/log.jsonl", step=1600)
    for record, _ in read_log("out/log.jsonl"): …
"""
import contextlib
import glob
import json
import os
import shutil
import subprocess

from checkpoint import checkpoint_folders
from configurator import UserError, only_one, replacing, to_json


@contextlib.contextmanager
def run_folder(out_dir, ranks):
    """Hold a run's folder until the block ends: no other training may use it meanwhile."""
    with contextlib.ExitStack() as stack:
        lock = only_one(out_dir, "train.py")
        ranks.on_rank_0(stack.enter_context, lock)
        yield


def holds_checkpoint(out_dir):
    """Does a run's folder hold a checkpoint, whole or damaged?"""
    return bool(checkpoint_folders(out_dir)) or os.path.exists(os.path.join(out_dir, "ckpt.pt"))


def prepare_folder(out_dir, settings, step, overwrite, restart=False):
    """
    Make a held folder ready for a run that goes on after `step`; 0 = a new run.
    A new run is refused where the folder holds one already; with overwrite that one is deleted.
    restart: the folder may hold a run that ended before its first checkpoint.
    Of a resumed run, checkpoints after `step` could not be read: they are set aside.
    Writes config.json.
    """
    log = os.path.join(out_dir, "log.jsonl")
    if not step:
        claim(out_dir, overwrite or (restart and os.path.exists(log)))
    open(log, "a").close()  # first: a folder with a log.jsonl counts as a run
    for path in glob.glob(os.path.join(glob.escape(out_dir), "step_*.partial")):
        shutil.rmtree(path)  # its save was killed
    for other, folder in checkpoint_folders(out_dir).items():
        if other > step:
            shutil.rmtree(f"{folder}.damaged", ignore_errors=True)
            os.rename(folder, f"{folder}.damaged")
    with replacing(os.path.join(out_dir, "config.json")) as f:
        f.write(to_json({**settings, "git_commit": git_commit()}, indent=1))


def claim(out_dir, overwrite):
    """Refuse a folder that holds a run; with overwrite, delete its files."""
    paths = [os.path.join(out_dir, name) for name in ("ckpt.pt", "config.json", "log.jsonl")]
    found = [path for path in paths if os.path.exists(path)]
    found = [*glob.glob(os.path.join(glob.escape(out_dir), "step_*")), *found]
    if found and not overwrite:
        raise UserError(f"{out_dir} holds a run already ({os.path.basename(found[0])}): "
                        "--init_from=resume continues it, another --out_dir keeps it, "
                        "--overwrite loses it")
    for path in found:
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def git_commit():
    """The commit of this project's folder, or None."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        done = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"],
                              capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def open_log(path, step):
    """
    Open a log.jsonl for appending, cut after its records up to `step`: later steps are done again.
    The file is cut in place, so a crash at any moment loses no record that counts.
    Returns (the file, the step of its last evaluation, 0 = none).
    """
    end = 0
    evaluated = 0
    for record, offset in read_log(path):
        if record["step"] <= step:
            end = offset
            if record.get("kind") == "eval":
                evaluated = record["step"]
    if os.path.exists(path):
        os.truncate(path, end)
    return open(path, "a", encoding="utf-8"), evaluated


def read_log(path):
    """
    Yield (record, offset of the end of its line) of a log.jsonl. Damaged lines are passed over.
    """
    if not os.path.exists(path):
        return
    offset = 0
    with open(path, "rb") as f:
        for line in f:
            offset += len(line)
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            # a line that a kill cut off has no "\n"
            if (line.endswith(b"\n") and isinstance(record, dict)
                    and type(record.get("step")) is int):
                yield record, offset
