"""
What the attention of a trained model does: which keys it reads, where its mass falls. A part of
eval.py.
"""
import random

import numpy as np
import torch

from attention import attention_probabilities, document_starts, select
from configurator import UserError, say
from data import Batches
from needle import longest_answer, needle_prompt
from scoring import Progress

SETTINGS = "data batch_size"


def check(cfg, subject):
    """Refuse what cannot be measured. Raises UserError."""


def measure(cfg, subject):
    return attention(subject.model, subject.data.val, subject.tokenizer.separator,
                     cfg.batch_size or 10, subject.doc_mask, subject.device)


@torch.no_grad()
def attention(model, ids, separator, batch_size, doc_mask=True, device="cpu"):
    """
    Attention.measure per layer on batch_size windows spread over ids: {name: [value per layer]}.
    """
    idx, _ = Batches(ids, model.config.block_size, batch_size, 0).evaluation(0, 1, device)
    doc_start = document_starts(idx, separator) if doc_mask else None
    with Progress("attention statistics", len(model.blocks)) as progress:
        hooks = [block.register_forward_hook(lambda *_: progress.step()) for block in model.blocks]
        stats = model(idx, doc_start=doc_start, stats=True).stats
        for hook in hooks:
            hook.remove()
    return {name: value.tolist() for name, value in stats.items()}


@torch.no_grad()
def last_query(model, ids, device="cpu"):
    """
    What the last token of a prompt attends to: a list of (mass, selected), one pair per layer.
    mass (T,): what full attention would give each key, mean over the heads.
    selected (T,) bool: the keys that the indexer selects.
    """
    seen = []

    def keep_inputs(attn, inputs):
        seen.append((attn, *inputs))
    hooks = [block.attn.register_forward_pre_hook(keep_inputs) for block in model.blocks]
    model.trunk(torch.from_numpy(ids.astype(np.int64))[None].to(device))
    for hook in hooks:
        hook.remove()
    layers = []
    for attn, h, visible in seen:
        q, k = attn.queries_and_keys(h, visible.pos)
        p, _ = attention_probabilities(q, k, visible.mask())  # (1, T, H, T)
        index = attn.indexer(h, visible.pos)
        selection = select(index, visible, attn.indexer.budget(), attn.backend)
        layers.append((p[0, -1].mean(0).cpu().numpy(), selection.mask()[0, -1].cpu().numpy()))
    return layers


def needle_selection(model, hay, tokenizer, length, device="cpu"):
    """
    last_query of a prompt of `length` tokens with a needle in its middle. Returns the layers and
    the needle's place, a slice. Raises UserError where there is nothing to see.
    """
    if not model.config.sparse:
        raise UserError("this model has no indexer")
    ids, _, place = needle_prompt(hay, tokenizer, length, 0.5, longest_answer(), random.Random(0))
    layers = last_query(model, ids, device)
    if all(selected.all() for _, selected in layers):
        raise UserError(f"at {length} tokens the indexer selects every key")
    return layers, place


def show(stats):
    names = list(stats)
    say("\nattention, per layer\n  layer  " + "".join(f"{n:>16}" for n in names))
    for layer in range(len(stats[names[0]])):
        say(f"{layer:7}  " + "".join(f"{stats[n][layer]:16.3f}" for n in names))


def summary(stats):
    return {label: float(np.mean(stats[name]))
            for name, label in (("recall", "index_recall"), ("k_t", "mean_k_t")) if name in stats}
