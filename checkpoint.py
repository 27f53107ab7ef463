"""
Checkpoints of a training run: saved whole or not at all, checked when they are loaded.

    model, checkpoint = load_model("out", device="cpu")      # sample.py, eval.py
    save_checkpoint("out", {"model": …, "optimizer": …}, {"step": 1600, …}, keep=2)

    out/step_00001600/          one checkpoint
        model.safetensors       the weights, and each layer's V̄
        optimizer.safetensors   averages of the gradients, by parameter: "embed.weight.exp_avg"
            (or shard-*.safetensors, a file per rank, of a run with fsdp: sharding.py)
        run.json                step, settings, the data's meta.json, losses (see RUN)
        manifest.json           size and checksum of the three files; step; validation loss

A checkpoint is written under another name, step_00001600.partial, and renamed when the disk has all
of it. So a kill or a full disk leaves the checkpoints before it as they were. Loading compares
every file with its checksum: a flipped bit is found, and the checkpoint before is taken instead.
Nothing in these files can be executed. A ckpt.pt, which older versions wrote, can be loaded too.
"""
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil

import torch

from configurator import UserError, mismatch, replacing, say, to_json
from data import META, check_meta, differences, identity
from device import check_backend
from model import GSA, GSAConfig
from sharding import Shards, save_shards, shard_files
from weights import checksum, load_tensors, load_weights, save_tensors

FILE = {"bytes": int, "xxh3": str}
MANIFEST = {"step": int, "val_loss": None, "files": dict}
RUN = {"step": int, "config": {"data": str}, "model_config": dict, "meta": META}
COUNTS = {"skipped": int, "in_a_row": int, "spikes": int, "losses": list}  # entry "stability"


# --------------------------------------------------------------------------------------------------
# The folder of one checkpoint

def step_folder(out_dir, step):
    return os.path.join(out_dir, f"step_{step:08}")


def checkpoint_folders(out_dir):
    """The folders of a run's checkpoints, {step: path}, the newest first."""
    try:
        names = os.listdir(out_dir)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    steps = [int(name[5:]) for name in names if re.fullmatch(r"step_\d{8,}", name)]
    return {step: step_folder(out_dir, step) for step in sorted(steps, reverse=True)}


def read_manifest(folder):
    """The dict of folder/manifest.json. Raises ValueError, in words, where it is damaged."""
    try:
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as f:
            manifest = json.load(f)
    except OSError as e:
        raise ValueError(f"manifest.json: {e.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError("manifest.json is damaged") from None
    wrong = mismatch(manifest, MANIFEST)
    files = {} if wrong else manifest["files"]
    for name, entry in files.items():
        wrong = wrong or mismatch(entry, FILE)
        if not re.fullmatch(r"[\w-]+\.(safetensors|json)", name):
            wrong = f"it names the file {name!r}"
    if not wrong and not ("run.json" in files and len(files) > 1):
        wrong = "it does not name all files"
    if not wrong and not os.path.basename(folder).startswith(f"step_{manifest['step']:08}"):
        wrong = "it is that of another step"
    if wrong:
        raise ValueError(f"manifest.json is damaged: {wrong}")
    return manifest


def check_files(folder):
    """Compare the files of a checkpoint with its manifest. Raises ValueError, in words."""
    for name, entry in read_manifest(folder)["files"].items():
        path = os.path.join(folder, name)
        try:
            size = os.path.getsize(path)
            same = size == entry["bytes"] and checksum(path) == entry["xxh3"]
        except OSError as e:
            raise ValueError(f"{name}: {e.strerror}") from None
        if size != entry["bytes"]:
            raise ValueError(f"{name} has {size:,} bytes, not {entry['bytes']:,}")
        if not same:
            raise ValueError(f"{name} is damaged: its checksum is another")


# --------------------------------------------------------------------------------------------------
# Saving

def save_checkpoint(out_dir, tensors, run, keep=2):
    """
    Save one checkpoint, then delete older ones but the last `keep` and the best.
    tensors: {"model": {name: tensor}, "optimizer": {name: tensor}}. run: see RUN.
    Raises OSError; the checkpoints before this one stay as they are.
    """
    partial = begin_checkpoint(out_dir, run["step"])
    try:
        for part, named in tensors.items():
            save_tensors(os.path.join(partial, f"{part}.safetensors"), named)
        finish_checkpoint(out_dir, run)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    prune(out_dir, run["step"], keep)


def save_divided_checkpoint(out_dir, tensors, run, ranks, keep=2):
    """
    The same for a model that is divided among the ranks (sharding.py): each writes its parts, to
    the same disk. All ranks must call it.
    """
    partial = ranks.on_rank_0(begin_checkpoint, out_dir, run["step"])
    named = {f"{part}.{name}": x for part in tensors for name, x in tensors[part].items()}
    try:
        save_shards(partial, named)
        ranks.on_rank_0(check_shards, partial, ranks.world)
        ranks.on_rank_0(finish_checkpoint, out_dir, run)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    ranks.on_rank_0(prune, out_dir, run["step"], keep)


def check_shards(folder, world):
    """Refuse a checkpoint of which some nodes have written their parts elsewhere."""
    found = len(shard_files(folder))
    if found != world:
        raise UserError(f"{folder} holds the parts of {found} ranks of {world}: with fsdp, out_dir "
                        "must be on a disk that all nodes share")


def begin_checkpoint(out_dir, step):
    """An empty folder to write the checkpoint's tensors to."""
    partial = step_folder(out_dir, step) + ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a save that was killed
    os.makedirs(partial)
    return partial


def finish_checkpoint(out_dir, run):
    """Give the folder of begin_checkpoint its run.json, its manifest and its name."""
    folder = step_folder(out_dir, run["step"])
    partial = folder + ".partial"
    with open(os.path.join(partial, "run.json"), "w", encoding="utf-8") as f:
        f.write(to_json(run))
    files = {}
    for name in sorted(os.listdir(partial)):
        path = os.path.join(partial, name)
        fsync(path)
        files[name] = {"bytes": os.path.getsize(path), "xxh3": checksum(path)}
    write_manifest(partial, {"step": run["step"], "val_loss": None, "files": files})
    fsync(partial)
    os.rename(partial, folder)  # from here on the checkpoint exists
    fsync(out_dir)


def write_manifest(folder, manifest):
    with replacing(os.path.join(folder, "manifest.json")) as f:
        f.write(to_json(manifest, indent=1))


def fsync(path):
    """Wait until the disk has a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def record_loss(out_dir, step, val_loss):
    """Note the validation loss of a saved checkpoint; the best is kept."""
    folder = step_folder(out_dir, step)
    with contextlib.suppress(ValueError):  # a ckpt.pt has no manifest
        write_manifest(folder, {**read_manifest(folder), "val_loss": val_loss})


def best_step(out_dir):
    """The step of the checkpoint with the lowest validation loss, None where none is known."""
    losses = {}
    for step, folder in checkpoint_folders(out_dir).items():
        with contextlib.suppress(ValueError):
            loss = read_manifest(folder)["val_loss"]
            if type(loss) is float and math.isfinite(loss):
                losses[step] = loss
    return min(losses, key=losses.get, default=None)


def prune(out_dir, step, keep):
    """Delete all checkpoints up to `step` but the last `keep` and the best."""
    older = [s for s in checkpoint_folders(out_dir) if s <= step]
    kept = {*older[:keep], best_step(out_dir)}
    for s in older:
        if s not in kept:
            shutil.rmtree(step_folder(out_dir, s), ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# Loading

def load_checkpoint(out_dir, which="last"):
    """
    A checkpoint as a dict: "path", "model" and "optimizer" ({name: tensor}, mapped from disk), and
    the entries of its run.json (see RUN). which: see find_checkpoint. Raises UserError.
    """
    return read_checkpoint(find_checkpoint(out_dir, which))


def find_checkpoint(out_dir, which="last"):
    """
    The path of a checkpoint whose files are those that were saved.
    which: "last" (if it is damaged, the one before is taken, and a line says so), "best", or the
    digits of a step. Raises UserError.
    """
    folders = checkpoint_folders(out_dir)
    wanted = list(folders)
    if which == "best":
        best = best_step(out_dir)
        wanted = [step for step in folders if step == best]
    elif which != "last":
        wanted = [step for step in folders if str(step) == which]
    # 1. the newest of them that is whole
    damaged = []
    for step in wanted:
        try:
            check_files(folders[step])
        except ValueError as e:
            damaged.append(f"{folders[step]}: {e}")
            continue
        if damaged:
            say(f"{'; '.join(damaged)}. {folders[step]} is taken instead")
        return folders[step]
    # 2. none is
    old = os.path.join(out_dir, "ckpt.pt")
    if which == "last" and os.path.exists(old):
        return old
    if damaged:
        raise UserError(f"no checkpoint can be read. {'; '.join(damaged)}")
    if which == "last":
        raise UserError(f"there is no checkpoint in {out_dir}")
    known = ", ".join(str(step) for step in folders) or "none"
    raise UserError(f"there is no checkpoint {which!r} in {out_dir} (its steps: {known})")


def read_checkpoint(path):
    """load_checkpoint's dict, of a path that find_checkpoint returned. Raises UserError."""
    if path.endswith("ckpt.pt"):
        return load_ckpt_pt(path)
    try:
        with open(os.path.join(path, "run.json"), encoding="utf-8") as f:
            run = json.load(f)
        check_run(run)
    except OSError as e:
        raise UserError(f"{path}/run.json cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not a readable checkpoint: {e}") from None
    if shard_files(path):
        tensors = {"model": dict(Shards(path, "model.")), "optimizer": Shards(path, "optimizer.")}
    else:
        tensors = {part: load_tensors(os.path.join(path, f"{part}.safetensors"))
                   for part in ("model", "optimizer")}
    return {"path": path, **run, **tensors}


def check_run(run):
    """Raise ValueError, in words, unless this can be the content of a run.json."""
    wrong = mismatch(run, RUN, "run.json") or check_meta(run["meta"])
    if not wrong and "stability" in run:  # older versions lack it
        wrong = mismatch(run["stability"], COUNTS)
    if not wrong and run["step"] < 1:
        wrong = "its step is not positive"
    if wrong:
        raise ValueError(wrong)


def load_ckpt_pt(path):
    """
    The checkpoint of an older version, a file ckpt.pt. Its "optimizer" is a list of the
    optimizers' state dicts. Nothing in the file is executed. Raises UserError.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if wrong := mismatch(checkpoint, {"model": dict, "optimizer": list}, "the file"):
            raise ValueError(wrong)
        check_run(checkpoint)
        return {"path": path, **checkpoint}
    except OSError as e:
        reason = e.strerror or e
    except ValueError as e:
        reason = e
    except Exception:  # torch.load raises many types for a truncated or foreign file
        reason = "it is damaged or of another kind"
    raise UserError(f"{path} is not a readable checkpoint: {reason}")


# --------------------------------------------------------------------------------------------------
# From a checkpoint to a model

def model_config(checkpoint):
    """The GSAConfig of a checkpoint; fields that it lacks are newer and have their defaults."""
    try:
        return GSAConfig(**checkpoint["model_config"])
    except (TypeError, ValueError) as e:  # an unknown name, an impossible or damaged value
        raise UserError(f"{checkpoint['path']} is not a readable checkpoint: {e}") from None


def load_model(out_dir, device="cpu", backend="auto", which="last", **changes):
    """
    (model in eval mode, checkpoint dict) of a training run. which: see find_checkpoint.
    changes: settings of the model that differ from the training's, of which the weights know
    nothing: a longer block_size, a rope_scaling, a budget's. Raises UserError.
    """
    checkpoint = load_checkpoint(out_dir, which)
    check_backend(backend, device)
    config = model_config(checkpoint)
    try:
        config = dataclasses.replace(config, **changes)
    except ValueError as e:
        raise UserError(str(e)) from None
    model = GSA(config, backend).to(device)
    load_weights(model, checkpoint["model"], checkpoint["path"])
    return model.eval(), checkpoint


# --------------------------------------------------------------------------------------------------
# The data that a checkpoint belongs to

def check_vocabulary(checkpoint, meta, where):
    """Refuse data whose token ids mean something else than those the checkpoint was trained on."""
    known = checkpoint["meta"]
    same = known["tokenizer"] == meta["tokenizer"]
    if known.get("vocabulary") and meta.get("vocabulary"):
        same = known["vocabulary"] == meta["vocabulary"]
    if not same:
        raise UserError(f"the model reads {known['tokenizer']} tokens, "
                        f"{where} holds {meta['tokenizer']} tokens of another vocabulary")


def check_same_data(checkpoint, meta, where):
    """Refuse to resume a run on other tokens than it began with."""
    changed = differences(identity(checkpoint["meta"]), identity(meta))
    if changed:
        raise UserError(f"{where} is not the data that the run began with ({changed}): "
                        f"--init_from=resume --data={where} goes on with it all the same")


def find_data(checkpoint):
    """
    The folder of the data that a checkpoint was trained on, also from another working directory.
    """
    given = checkpoint["config"]["data"]
    absolute = checkpoint.get("data_path", given)
    return absolute if os.path.isdir(absolute) else given
