"""
Where a training begins: with nothing, with its own checkpoint, or with the weights of another
model, which may be a dense one that gets gates and an indexer (a retrofit).

    begin = where_to_begin("auto:hf:meta-llama/Llama-3.2-1B", "out")
    checkpoint, start = load_begin(begin, "out", ranks)
    open_gates_and_load(model, start["model"], start["path"])
"""
import os

import torch

import hf
from checkpoint import check_vocabulary, find_checkpoint, read_checkpoint
from configurator import UserError
from outdir import holds_checkpoint
from tokenizer import Tokenizer
from weights import load_weights

OPEN_GATE_BIAS = 8.0  # σ(8) = 0.9997
# tokens, where the context of a Hugging Face model is longer and no block_size is given
DEFAULT_CONTEXT = 4096


def is_auto(init_from):
    """Is it "auto" or "auto:START"? Then the same command begins a run and goes on with it."""
    return init_from.partition(":")[0] == "auto"


def where_to_begin(init_from, out_dir):
    """Returns "scratch", "resume", or what load_begin takes: "auto" is decided."""
    if not is_auto(init_from):
        return init_from
    return "resume" if holds_checkpoint(out_dir) else init_from.partition(":")[2] or "scratch"


def load_begin(begin, out_dir, ranks, with_weights=True):
    """
    What where_to_begin has named: (the checkpoint to resume or None, the one whose weights a new
    run begins with or None). Rank 0 looks for damage; every rank reads. Raises UserError.
    with_weights: False leaves out those of a Hugging Face model, for a dry run.
    """
    if begin == "scratch":
        return None, None
    if begin == "resume":
        return read_checkpoint(ranks.on_rank_0(find_checkpoint, out_dir)), None
    if begin.startswith("hf:"):
        return None, load_hf(begin[len("hf:"):], with_weights)
    return None, read_checkpoint(ranks.on_rank_0(find_start, begin))


def find_start(name):
    """The path of the checkpoint in another run's out_dir."""
    if not os.path.isdir(name):
        raise UserError(f"init_from {name!r} is not one of scratch, resume, auto, auto:START, "
                        "hf:PATH_OR_ID, and no folder of a run")
    return find_checkpoint(name)


def load_hf(path_or_id, with_weights=True):
    """
    A Hugging Face checkpoint, as a checkpoint's dict with the entries path, model, model_config,
    config and tokenizer (the path of its tokenizer.json, "" without).
    """
    config, weights, about = hf.load(path_or_id, with_weights)
    config["block_size"] = min(config["block_size"], DEFAULT_CONTEXT)
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
            p.fill_(OPEN_GATE_BIAS if name.endswith("bias") else 0.0)
    return bool(added)
