"""Activation checkpointing, plan.py, sharding.py, and runs on several ranks."""
import random

import pytest
import torch

import attention
from model import ARMS, GSA, GSAConfig


# ---- activation checkpointing

def random_model(arm, rng, backend="auto"):
    """A small model of random shape, and a batch for it: (model, idx, targets, doc_start)."""
    G = rng.choice([1, 2])
    T = rng.randrange(40, 90)
    config = GSAConfig.arm(
        arm, vocab_size=70, block_size=T, n_layer=rng.choice([1, 2, 3]), n_kv_head=G,
        n_head=G * rng.choice([1, 2]), n_embd=16 * rng.choice([2, 4]), n_index_head=2, d_index=8,
        k_base=10, k_min=4, k_max=16)
    torch.manual_seed(rng.randrange(1000))
    idx, targets = torch.randint(0, 70, (2, 2, T)).unbind()
    return GSA(config, backend), idx, targets, attention.document_starts(idx, 3)


def step(model, idx, targets, doc_start, warmup, stats=False):
    """One forward and backward pass: everything that it computes, by name."""
    model.zero_grad(set_to_none=True)
    out = model(idx, targets, doc_start, warmup=warmup, stats=stats)
    (out.loss + out.index_loss).backward()
    results = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    results |= {n: x.clone() for n, x in model.named_buffers() if "var_seen" in n}
    return results | {"loss": out.loss, "index_loss": out.index_loss} | out.stats


def use_checkpointing(model, on=True):
    for block in model.blocks:
        block.activation_checkpointing = on


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("arm", list(ARMS))
def test_activation_checkpointing_changes_no_bit_and_selects_once(arm, warmup, monkeypatch):
    """Gradients, losses, V̄'s sums and the stats of a step are those of the plain step."""
    calls = []
    select = attention.select
    monkeypatch.setattr(attention, "select", lambda *args: calls.append(1) or select(*args))
    rng = random.Random(f"{arm} {warmup}")
    for stats in (False, True):
        model, *batch = random_model(arm, rng)
        expected = step(model, *batch, warmup, stats)
        for block in model.blocks:
            if block.attn.indexer:
                block.attn.indexer.var_seen.zero_()
        n_calls = len(calls)
        use_checkpointing(model)
        calls.clear()
        found = step(model, *batch, warmup, stats)
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            assert torch.equal(found[name], x), name
        selects = model.config.sparse and (stats or not warmup)
        assert len(calls) == n_calls == (model.config.n_layer if selects else 0)
        calls.clear()
