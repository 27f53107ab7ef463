"""
Perplexity: how well a model predicts text, per token and per byte. A part of eval.py.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from attention import document_starts
from configurator import UserError, say
from scoring import Progress

SETTINGS = "data max_tokens stride"


def check(cfg, subject):
    """Refuse what cannot be measured. Raises UserError."""
    if cfg.stride > subject.T:
        raise UserError(f"stride {cfg.stride} must lie in the model's context, 1 to {subject.T}")
    if len(subject.val[:cfg.max_tokens or None]) < 2:
        raise UserError(f"{subject.data.path} and max_tokens {cfg.max_tokens} leave nothing to "
                        "predict")


def measure(cfg, subject):
    ids = subject.data.val[:cfg.max_tokens] if cfg.max_tokens else subject.data.val
    stride = cfg.stride or max(1, subject.T // 2)
    found = perplexity(subject.model, ids, subject.tokenizer.separator,
                       subject.tokenizer.token_lengths, stride, cfg.batch_size or 10,
                       subject.doc_mask, subject.device)
    return {**found, "stride": stride}


@torch.no_grad()
def perplexity(model, ids, separator, token_lengths, stride, batch_size, doc_mask=True,
               device="cpu"):
    """
    Predict every token of ids but the first, once, from windows of block_size tokens that begin
    `stride` tokens apart. So a token has at least block_size - stride tokens of context; it has
    fewer only at the start of ids and of documents.
    Returns loss (nats per token), perplexity, bits_per_byte (bytes of the predicted tokens) and
    tokens.
    """
    # 1. windows, as (start, number of its predictions that earlier windows have made)
    T = min(model.config.block_size, len(ids) - 1)
    last = len(ids) - 1 - T
    windows = []
    predicted = 0
    for start in [*range(0, last, stride), last]:
        windows.append((start, max(0, predicted - start)))
        predicted = start + T
    # 2. the sum of the losses
    total = 0.0
    batches = [windows[i:i + batch_size] for i in range(0, len(windows), batch_size)]
    with Progress("perplexity", len(batches)) as progress:
        for batch in batches:
            rows = [torch.from_numpy(ids[s:s + T + 1].astype(np.int64)) for s, _ in batch]
            rows = torch.stack(rows).to(device)  # (B, T + 1)
            idx = rows[:, :-1]  # (B, T)
            targets = rows[:, 1:].clone()  # (B, T)
            for row, (_, skip) in zip(targets, batch):
                row[:skip] = -1
            doc_start = document_starts(idx, separator) if doc_mask else None
            logits = model(idx, doc_start=doc_start).logits  # (B, T, V)
            total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                                     ignore_index=-1, reduction="sum").item()
            progress.step()
    # 3. means
    n = len(ids) - 1
    n_bytes = int(token_lengths[ids[1:]].sum())
    loss = total / n
    return {"loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,  # exp(710) overflows
            "bits_per_byte": total / math.log(2) / n_bytes if n_bytes else math.inf,
            "tokens": n}


def show(p):
    shown = "beyond floats" if p["perplexity"] is None else f"{p['perplexity']:.3f}"
    say(f"\nvalidation text ({p['tokens']:,} tokens)   loss {p['loss']:.4f} nats/token   "
        f"perplexity {shown}   {p['bits_per_byte']:.4f} bits/byte")


def summary(p):
    return {"bits_per_byte": p["bits_per_byte"]}
