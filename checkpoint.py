"""
The folder of a training run (ckpt.pt, log.jsonl, config.json), and the device and precision that
its model is computed with. sample.py and eval.py import this file and need no trainer.

    model, checkpoint = load_model("out", device="cpu")

ckpt.pt holds the model's weights, the optimizers' state, the step, the settings and the data's
meta.json. It is always a whole file, and every weight in it is finite.
"""
import contextlib
import json
import os
import shutil
import subprocess

import torch

import checks
from configurator import UserError, mismatch, only_one, replacing, to_json
from data import META, check_meta, differences, identity
from model import GSA, GSAConfig

# --------------------------------------------------------------------------------------------------
# Device, precision, compiler

def use_device(name, local_rank=None):
    """
    The device to compute on, as torch names it; "" = a GPU if there is one, else the CPU.
    local_rank: of several ranks on this machine, each takes the GPU of its number.
    Raises UserError.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if local_rank is not None and name.startswith("cuda"):
        name = f"cuda:{local_rank}"
    try:
        torch.zeros(1, device=name).item()
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)  # the kernels are launched on the current device
        torch.autocast(name.split(":")[0], dtype=torch.bfloat16, enabled=False)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device {name!r} cannot be used: {str(e).splitlines()[0]}") from None
    return name


def precision(device, dtype):
    """
    The autocast context to compute in.
    dtype: "float32" | "bfloat16" | "" = bfloat16 on a GPU, else float32.
    On a GPU, products that stay in fp32 are computed as TF32: the attention kernels have too few
    registers for exact fp32 products.
    """
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def check_backend(backend, device):
    """Refuse a path of the attention that cannot run on the device. Raises UserError."""
    try:
        checks.resolve_backend(backend, torch.empty(0, device=device))
    except ValueError as e:
        raise UserError(str(e)) from None


def check_dtype(dtype):
    if dtype not in ("", "float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r} is not one of float32, bfloat16")


def check_compiler():
    """Refuse torch.compile without a C++ compiler now, not by a traceback at the first step."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if not any(shutil.which(name) for name in names if name):
        raise UserError("compile needs a C++ compiler (g++): "
                        "install one, or train without --compile")


# --------------------------------------------------------------------------------------------------
# ckpt.pt

CHECKPOINT = {
    "model": dict,
    "optimizer": list,
    "step": int,
    "config": {"data": str},
    "model_config": dict,
    "meta": META,
}


def load_checkpoint(folder):
    """
    The dict of folder/ckpt.pt, its tensors in CPU memory; see CHECKPOINT for its entries.
    Nothing in the file is executed. Raises UserError where there is none or it is damaged.
    """
    path = os.path.join(folder, "ckpt.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except OSError as e:
        raise UserError(f"{path} is not a readable checkpoint: {e.strerror or e}") from None
    except Exception:  # torch.load raises many types for a truncated or foreign file
        raise UserError(f"{path} is not a readable checkpoint: "
                        "it is damaged or of another kind") from None
    wrong = mismatch(checkpoint, CHECKPOINT, "the file")
    if not wrong:
        since = {"data_path": str} if "data_path" in checkpoint else {}  # a newer entry
        wrong = mismatch(checkpoint, since) or check_meta(checkpoint["meta"])
    if not wrong and checkpoint["step"] < 1:
        wrong = "its step is not positive"
    if wrong:
        raise UserError(f"{path} is not a readable checkpoint: {wrong}")
    return checkpoint


def save_checkpoint(folder, **content):
    """
    Replace folder/ckpt.pt. If that fails, on a full disk for example, the old file stays whole.
    """
    path = os.path.join(folder, "ckpt.pt")
    try:
        with replacing(path, binary=True) as f:
            torch.save(content, f)
    except RuntimeError as e:  # torch's own writer wraps the file's OSError
        raise OSError(f"{path} cannot be written: {str(e).splitlines()[0]}") from None


def load_weights(model, weights, path):
    """
    Copy a state dict into a model of the same shape.
    Raises UserError where it does not fit or is not finite.
    """
    try:
        model.load_state_dict(weights)
    except Exception as e:
        # RuntimeError lists the differences; an entry that is no tensor raises other types
        reason = " ".join(str(e).split("\n")[1:2]).strip() or type(e).__name__
        raise UserError(f"{path} does not fit its model: {reason}") from None
    name = not_finite(model)
    if name:
        raise UserError(f"{path} holds numbers that are not finite ({name}): "
                        "the training that wrote it had failed")


def not_finite(model):
    """The name of the first parameter or saved buffer with a NaN or infinity in it, or ""."""
    for name, x in model.state_dict().items():
        if not torch.isfinite(x).all():
            return name
    return ""


def load_model(folder, device="cpu", backend="auto"):
    """(model in eval mode, checkpoint dict) of a training run's out_dir. Raises UserError."""
    checkpoint = load_checkpoint(folder)
    path = os.path.join(folder, "ckpt.pt")
    check_backend(backend, device)
    try:
        config = GSAConfig(**checkpoint["model_config"])
    except (TypeError, ValueError) as e:  # an unknown name, an impossible or damaged value
        raise UserError(f"{path} is not a readable checkpoint: {e}") from None
    model = GSA(config, backend).to(device)
    load_weights(model, checkpoint["model"], path)
    return model.eval(), checkpoint


def load_retrofit(model, folder):
    """
    Load a dense checkpoint into a model with gates and an indexer. The gates open (σ(8) = 0.9997),
    so the model starts as the dense one was. Returns the checkpoint dict.
    """
    checkpoint = load_checkpoint(folder)
    own = model.state_dict()
    new = [n for n in own if n not in checkpoint["model"]]
    foreign = [n for n in checkpoint["model"] if n not in own]
    foreign += [n for n in new if "_gate." not in n and ".indexer." not in n]
    if foreign:
        raise UserError(f"{folder} does not fit this model: {foreign[0]} is on one side only")
    shared = ("n_head", "n_kv_head", "rope_base")  # what the weights' shapes do not tell
    theirs = {name: checkpoint["model_config"].get(name) for name in shared}
    ours = {name: getattr(model.config, name) for name in shared}
    changed = differences(theirs, ours)
    if changed:
        raise UserError(f"{folder} does not fit this model: {changed}")
    for name, p in model.named_parameters():
        if name in new and "_gate." in name:
            torch.nn.init.constant_(p, 8.0 if name.endswith("bias") else 0.0)
    kept = {n: x for n, x in model.state_dict().items() if n in new}
    load_weights(model, {**checkpoint["model"], **kept}, folder)
    return checkpoint


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
                        f"give --data={where} to go on with it all the same")


def find_data(checkpoint):
    """
    The folder of the data that a checkpoint was trained on, also from another working directory.
    """
    given = checkpoint["config"]["data"]
    absolute = checkpoint.get("data_path", given)
    return absolute if os.path.isdir(absolute) else given


# --------------------------------------------------------------------------------------------------
# out_dir and the log

@contextlib.contextmanager
def open_run(out_dir, settings, step, overwrite):
    """
    Hold a run's folder until the block ends; no other training may use it meanwhile.
    step: that of the checkpoint to go on from, 0 = a run from scratch. A run from scratch is
    refused where out_dir holds one already; with overwrite that one is deleted.
    Writes config.json. Yields the log, open for appending, and whether it holds the evaluation of
    `step`.
    """
    with only_one(out_dir, "train.py"):
        if not step:
            claim(out_dir, overwrite)
        with replacing(os.path.join(out_dir, "config.json")) as f:
            f.write(to_json({**settings, "git_commit": git_commit()}, indent=1))
        log, evaluated = open_log(os.path.join(out_dir, "log.jsonl"), step)
        with log:
            yield log, evaluated


def claim(out_dir, overwrite):
    """Refuse a folder that holds a run; with overwrite, delete its files."""
    paths = [os.path.join(out_dir, name) for name in ("ckpt.pt", "log.jsonl", "config.json")]
    found = [path for path in paths if os.path.exists(path)]
    if found and not overwrite:
        raise UserError(f"{out_dir} holds a run already ({os.path.basename(found[0])}): "
                        "--init_from=resume continues it, another --out_dir keeps it, "
                        "--overwrite loses it")
    for path in found:
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
    Cut a log.jsonl after its records up to `step`: later steps are done again. The file is cut in
    place, so a crash at any moment loses no record that counts.
    Returns the file, open for appending, and whether it holds the evaluation of `step`.
    """
    end = 0
    evaluated = False
    for record, offset in read_log(path):
        if record["step"] <= step:
            end = offset
        if record["step"] == step and record.get("kind") == "eval":
            evaluated = True
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
