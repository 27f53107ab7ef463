"""
Where a training begins: with nothing, with its own checkpoint, or with the weights of another
model, which may be a dense one that gets gates and an indexer (a retrofit). And which settings it
then has.

    start = load_start("hf:meta-llama/Llama-3.2-1B")     # or a run's out_dir
    open_gates_and_load(model, start["model"], start["path"])
"""
import os
from dataclasses import fields

import torch

import hf
from checkpoint import check_vocabulary, find_data, load_checkpoint
from configurator import UserError
from data import differences
from model import ARMS
from outdir import holds_checkpoint
from tokenizer import Tokenizer
from weights import load_weights

OPEN = 8.0  # bias of an open gate: σ(8) = 0.9997
LONGEST = 4096  # tokens, where the context of a Hugging Face model is longer and none is given


def where_to_begin(init_from, out_dir):
    """ "scratch", "resume", or what load_start takes; "auto" is decided."""
    choice, _, otherwise = init_from.partition(":")
    if choice != "auto":
        return init_from
    return "resume" if holds_checkpoint(out_dir) else otherwise or "scratch"


def load_start(name):
    """
    The weights that a new run begins with: "hf:PATH_OR_ID", a Hugging Face checkpoint, or the
    out_dir of another run. Returns a checkpoint's dict; of Hugging Face's it has the entries path,
    model, model_config, config and tokenizer. Raises UserError.
    """
    if not name.startswith("hf:"):
        if not os.path.isdir(name):
            raise UserError(f"init_from {name!r} is not one of scratch, resume, auto, auto:START, "
                            "hf:PATH_OR_ID, and no folder of a run")
        return load_checkpoint(name)
    config, weights, about = hf.load(name[len("hf:"):])
    config["block_size"] = min(config["block_size"], LONGEST)
    return {"path": about["folder"], "model": weights, "model_config": config,
            "config": {"attention": "dense"}, "tokenizer": about["tokenizer"]}


def check_start(start, meta, where):
    """Refuse data whose token ids mean something else than the weights' own. Raises UserError."""
    if "meta" in start:
        check_vocabulary(start, meta, where)
        return
    rows = start["model_config"]["vocab_size"]
    if meta["vocab_size"] > rows:
        raise UserError(f"{where} has a vocabulary of {meta['vocab_size']} tokens, {start['path']} "
                        f"reads {rows}: prepare it with --tokenizer={start['path']}")
    # the same vocabulary may have come from a file of another kind, which cannot be compared
    if start["tokenizer"] and meta["tokenizer"].startswith("hf:"):
        if Tokenizer(f"hf:{start['path']}").fingerprint != meta["vocabulary"]:
            raise UserError(f"{where} holds tokens of {meta['tokenizer']}, another vocabulary than "
                            f"that of {start['path']}: prepare it with --tokenizer={start['path']}")


@torch.no_grad()
def open_gates_and_load(model, weights, where):
    """
    Copy weights ({parameter name: tensor}) into the model. Gates that have no weights there open,
    so that the model starts as the dense one was; indexers keep their initial values.
    Returns whether gates or an indexer were added. Raises UserError where the weights do not fit.
    """
    added = [name for name in model.state_dict() if name not in weights
             and ("_gate." in name or ".indexer." in name)]
    load_weights(model, weights, where, may_lack=added)
    for name, p in model.named_parameters():
        if name in added and "_gate." in name:
            p.fill_(OPEN if name.endswith("bias") else 0.0)
    return bool(added)


# --------------------------------------------------------------------------------------------------
# Settings of a run that does not begin with nothing. cls: train.TrainConfig

# The settings that may change when a run is resumed. The others decide what the checkpoint means.
MAY_CHANGE = set(
    "out_dir init_from overwrite keep data max_iters learning_rate min_lr warmup_iters "
    "weight_decay beta1 beta2 grad_clip max_skips index_warmup_iters index_lr_mult "
    "index_grad_clip index_loss_weight log_interval eval_interval eval_iters plot tensorboard "
    "wandb wandb_project device backend dtype compile activation_checkpointing fsdp dry_run gpus "
    "gpu assumed_mfu".split())
RETIRED = {"retrofit_from"}  # settings of older versions
# The model settings that may differ from those of the weights that a new run starts with: the
# context, and what the run adds or chooses by itself. The others decide what the weights mean.
MAY_DIFFER = set(
    "vocab_size block_size rope_scaling gate_bias_init n_index_head d_index index_rope k_base "
    "k_min k_max n_sink n_local".split()) | set(ARMS["gsa"]) | set(ARMS["sparse"])


def resumed_settings(cls, checkpoint, given):
    """
    The settings saved in a checkpoint, replaced by those given now.
    Raises UserError if a setting is given that must not change.
    """
    saved = {name: value for name, value in checkpoint["config"].items() if name not in RETIRED}
    path = checkpoint["path"]
    kinds = {f.name: f.type for f in fields(cls)}
    for name, value in saved.items():
        if type(value) is not kinds.get(name):
            raise UserError(f"{path} was written by another version: it has a setting {name!r}")
    fixed = {name: value for name, value in given.items() if name not in MAY_CHANGE}
    changed = differences({name: saved.get(name) for name in fixed}, fixed)
    if changed:
        raise UserError(f"{path} was trained with another model or other settings "
                        f"({changed}): these cannot change when a run is resumed")
    return {**saved, "data": find_data(checkpoint), **given}


def started_settings(cls, start, given):
    """
    The settings of a new run that begins with other weights: the shape of their model, and what is
    given now. Raises UserError if a setting is given that contradicts the weights.
    """
    shape = start["model_config"]
    if given.get("attention", cls.attention) != start["config"].get("attention"):
        switches = set(ARMS["gsa"]) | set(ARMS["sparse"])
        shape = {name: value for name, value in shape.items() if name not in switches}
    fixed = {name: value for name, value in given.items()
             if name in shape and name not in MAY_DIFFER}
    changed = differences({name: shape[name] for name in fixed}, fixed)
    if changed:
        raise UserError(f"{start['path']} does not fit the settings: {changed}")
    return {**shape, **given}
