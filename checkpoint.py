"""
The checkpoint and the log that a training run writes, and what it takes to read them: the device
and the precision. sample.py and eval.py import this file and need no trainer.

    model, checkpoint = load_model("out", device="cpu")

A checkpoint is one file, ckpt.pt: the model's weights, the optimizers' state, the step, the
settings and the data's meta.json. It is always a whole file, and never holds a number that is not
finite.
"""
import json
import os

import torch

import kernels
from configurator import UserError, mismatch, replacing
from data import META, check_meta, differences
from model import GSA, GSAConfig

CHECKPOINT = {
    "model": dict,
    "optimizer": list,
    "step": int,
    "config": {"data": str},
    "model_config": dict,
    "meta": META,
}


def use_device(name):
    """
    The device to compute on, as torch names it; "" = a GPU if there is one, else the CPU.
    Raises UserError.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
        torch.autocast(name.split(":")[0], dtype=torch.bfloat16, enabled=False)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device {name!r} cannot be used: {str(e).splitlines()[0]}") from None
    return name


def precision(device, dtype):
    """
    The autocast context to compute in.
    dtype: "float32" | "bfloat16" | "" = bfloat16 on a GPU, else float32.
    On a GPU what stays in fp32 is multiplied as TF32: exact fp32 products need more registers
    than the attention kernels have.
    """
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def check_backend(backend, device):
    """Refuse a path of kernels.py that cannot run on the device. Raises UserError."""
    try:
        kernels.check_backend(backend, torch.empty(0, device=device))
    except ValueError as e:
        raise UserError(str(e)) from None


def check_dtype(dtype):
    if dtype not in ("", "float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r} is not one of float32, bfloat16")


def load_checkpoint(folder, device="cpu"):
    """
    The dict of folder/ckpt.pt: model, optimizer, step, config, model_config, meta.
    Nothing in the file is executed.
    Raises UserError, in one line, where there is none or it is damaged.
    """
    path = os.path.join(folder, "ckpt.pt")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
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
    if not wrong and checkpoint["step"] < 0:
        wrong = "its step is negative"
    if wrong:
        raise UserError(f"{path} is not a readable checkpoint: {wrong}")
    return checkpoint


def load_weights(model, weights, path):
    """
    Put a state dict into a model of the same shape.
    Raises UserError where it does not fit or is not finite.
    """
    try:
        model.load_state_dict(weights)
    except Exception as e:
        # RuntimeError lists the differences; an entry that is no tensor raises other types
        reason = " ".join(str(e).split("\n")[1:2]).strip() or type(e).__name__
        raise UserError(f"{path} does not fit its model: {reason}") from None
    if name := not_finite(model):
        raise UserError(f"{path} holds numbers that are not finite ({name}): "
                        "the training that wrote it had failed")


def not_finite(model):
    """The name of the first parameter or saved buffer with a NaN or infinity in it, or ""."""
    return next((name for name, x in model.state_dict().items() if not torch.isfinite(x).all()), "")


def load_model(folder, device="cpu", backend="auto"):
    """(model in eval mode, checkpoint dict) of a training run's out_dir. Raises UserError."""
    checkpoint = load_checkpoint(folder, device)
    path = os.path.join(folder, "ckpt.pt")
    check_backend(backend, device)
    try:
        config = GSAConfig(**checkpoint["model_config"])
    except (TypeError, ValueError) as e:  # an unknown name, an impossible or damaged value
        raise UserError(f"{path} is not a readable checkpoint: {e}") from None
    model = GSA(config, backend).to(device)
    load_weights(model, checkpoint["model"], path)
    return model.eval(), checkpoint


def save_checkpoint(folder, **content):
    """
    Replace folder/ckpt.pt.
    If that fails, on a full disk for example, the old checkpoint stays whole.
    """
    try:
        with replacing(os.path.join(folder, "ckpt.pt"), binary=True) as f:
            torch.save(content, f)
    except RuntimeError as e:  # torch's own writer wraps the file's OSError
        raise OSError(f"{os.path.join(folder, 'ckpt.pt')} cannot be written: "
                      f"{str(e).splitlines()[0]}") from None


def load_retrofit(model, folder):
    """
    Load a dense checkpoint into a model with gates and indexer, the gates open (σ(8) = 0.9997),
    so that the model starts as the dense one was. Returns the checkpoint dict.
    """
    checkpoint = load_checkpoint(folder)
    own = model.state_dict()
    new = [n for n in own if n not in checkpoint["model"]]
    foreign = [n for n in checkpoint["model"] if n not in own]
    foreign += [n for n in new if "_gate." not in n and ".indexer." not in n]
    if foreign:
        raise UserError(f"{folder} does not fit this model: {foreign[0]} is on one side only")
    same = ("n_head", "n_kv_head", "rope_base")  # what shapes do not tell
    sides = [{name: config.get(name) for name in same}
             for config in (checkpoint["model_config"], vars(model.config))]
    if changed := differences(*sides):
        raise UserError(f"{folder} does not fit this model: {changed}")
    for name, p in model.named_parameters():
        if name in new and "_gate." in name:
            torch.nn.init.constant_(p, 8.0 if name.endswith("bias") else 0.0)
    kept = {n: x for n, x in model.state_dict().items() if n in new}
    load_weights(model, {**checkpoint["model"], **kept}, folder)
    return checkpoint


def check_vocabulary(checkpoint, meta, where):
    """Refuse data whose token ids mean something else than those the checkpoint was trained on."""
    known = checkpoint["meta"]
    same = known["tokenizer"] == meta["tokenizer"]
    if known.get("vocabulary") and meta.get("vocabulary"):
        same = known["vocabulary"] == meta["vocabulary"]
    if not same:
        raise UserError(f"the model reads {known['tokenizer']} tokens, "
                        f"{where} holds {meta['tokenizer']} tokens of another vocabulary")


def find_data(checkpoint):
    """
    The folder of the data that a checkpoint was trained on, also from another working directory.
    """
    given = checkpoint["config"]["data"]
    absolute = checkpoint.get("data_path", given)
    return absolute if os.path.isdir(absolute) else given


def read_log(path):
    """
    Yield (record, offset behind its line) of a log.jsonl; lines that hold no record are passed
    over.
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
