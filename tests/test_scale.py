"""Activation checkpointing, plan.py, sharding.py, and runs on several ranks."""
import random
import re
from dataclasses import replace

import pytest
import torch

import attention
import plan
import prepare
import train
from configurator import UserError, parse
from data import Data
from measure import flops_per_token
from model import ARMS, GSA, GSAConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare.prepare(prepare.PrepareConfig(
        dataset="demo", num_tokens=60_000, num_proc=1, val_fraction=0.15, data_dir=str(folder)))
    return str(folder / "demo")


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


# ---- plan.py

def kept_bytes(cfg, backend):
    """What the forward pass of cfg's model leaves in memory for the backward pass, measured."""
    model = GSA(cfg.model_config(cfg.vocab_size), backend)
    use_checkpointing(model, cfg.activation_checkpointing)
    idx, targets = torch.randint(0, cfg.vocab_size, (2, cfg.batch_size, cfg.block_size)).unbind()
    doc_start = attention.document_starts(idx, 3) if cfg.doc_mask else None
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}  # by address: several tensors may share their memory

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return x

    def select(*args):  # autograd does not know of the tensors in a Selection
        selection = real_select(*args)
        if backend == "torch" or cfg.activation_checkpointing:
            for x in (selection.k_t, selection.indices, selection.var):
                keep(x)
        return selection
    real_select = attention.select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "select", select)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            with torch.autocast("cpu", torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
                out = model(idx, targets, doc_start)
    keep(out.logits)
    return sum(storage.nbytes() for storage in kept.values())


def random_plan(rng, **settings):
    G, R, d = rng.choice([1, 2, 4]), rng.choice([1, 2, 4]), rng.choice([8, 16, 32])
    arm = rng.choice(list(ARMS))
    shape = dict(
        vocab_size=rng.randrange(50, 500), block_size=rng.randrange(30, 200),
        n_layer=rng.choice([1, 2, 3]), n_head=G * R, n_kv_head=G, n_embd=G * R * d,
        n_index_head=rng.choice([2, 4]), d_index=16, k_base=10, k_min=4,
        k_max=rng.choice([16, 24]), batch_size=rng.choice([1, 2, 3]), attention=arm,
        doc_mask=rng.random() < 0.5, dtype=rng.choice(["float32", "bfloat16"]),
        activation_checkpointing=rng.random() < 0.5, short_block=1)
    return train.TrainConfig.arm(arm, **shape | settings)


def planned_bytes(cfg, card, parts=("16-bit weights", "activations", "logits")):
    memory = plan.memory(cfg, plan.bare_model(cfg, cfg.vocab_size), card, 1)
    return sum(memory.get(name, 0) for name in parts)


def test_the_planned_activations_are_what_autograd_keeps():
    rng = random.Random(0)
    for _ in range(12):
        cfg = random_plan(rng)
        assert planned_bytes(cfg, plan.Card("CPU", None)) == pytest.approx(
            kept_bytes(cfg, "torch"), rel=0.02), cfg


def test_the_planned_activations_of_the_triton_path_are_what_its_operations_keep():
    """
    On a CPU, whose norms keep one tensor more than a GPU's. The union list is planned at its upper
    bound.
    """
    rng = random.Random(1)
    for again, dtype in ((False, "bfloat16"), (True, "float32")):
        cfg = random_plan(rng, attention="gsa", sparse=True, value_gate=True, output_gate=True,
                          n_layer=1, n_head=2, n_kv_head=1, n_embd=64, n_index_head=2,
                          batch_size=1, block_size=16, activation_checkpointing=again, dtype=dtype)
        norms = 1 if again else 2 * cfg.n_layer + 1
        extra = norms * 4 * cfg.n_embd * cfg.block_size
        planned = planned_bytes(cfg, plan.Card("H100", 80e9)) + extra
        assert planned == pytest.approx(kept_bytes(cfg, "triton"), rel=0.1)


def test_activation_checkpointing_keeps_a_quarter_of_the_activations():
    cfg = random_plan(random.Random(0), attention="gsa", n_layer=4, dtype="float32",
                      activation_checkpointing=False)
    again = replace(cfg, activation_checkpointing=True)
    logits = planned_bytes(cfg, plan.Card("CPU", None), ["logits"])
    assert kept_bytes(again, "torch") - logits < 0.25 * (kept_bytes(cfg, "torch") - logits)


def dry_run(capsys, *args):
    """The lines of a dry run by their first 18 columns, {name: rest}, and its refusal or ""."""
    refusal = ""
    try:
        train.main(["--dry_run", *args])
    except UserError as e:
        refusal = str(e)
    lines = capsys.readouterr().out.splitlines()
    return {line[:18].rstrip(): line[19:] for line in lines}, refusal


def test_a_dry_run_needs_neither_data_nor_gpu_and_counts_every_parameter(capsys):
    lines, refusal = dry_run(capsys, "config/gsa_demo.py", "--data=nowhere", "--vocab_size=257")
    assert not refusal
    config = train.TrainConfig(**parse(train.TrainConfig, ["config/gsa_demo.py"]))
    n = sum(p.numel() for p in GSA(config.model_config(257)).parameters())
    assert f"all {n / 1e6:.2f}M" in lines["parameters"]
    for name in ("parameters", "optimizer"):
        counts = [float(x) for x in re.findall(r"(\d+\.\d\d)M", lines[name])]
        total = sum(counts) - (n / 1e6 if name == "parameters" else 0)
        assert total == pytest.approx(n / 1e6, abs=0.03)
    assert "3200 steps of 2,048" in lines["tokens"]
    assert "nowhere is not there" in lines["data"]
    assert "windows of 128 tokens" in lines["steps 0-1000"]
    assert "warm-up" in lines["steps 1000-1200"]
    assert "sparse" in lines["steps 1200-3200"]
    parts = [float(size) for name, size in lines.items()
             if name[:2] == "  " and name not in ("  in all", "  one layer")]
    assert len(parts) == 8
    least = float(lines["  in all"].split()[0])  # with activation checkpointing
    assert 1.5 < least <= sum(parts) + 0.05


def test_the_flops_of_a_plan_are_those_of_its_steps():
    cfg = random_plan(random.Random(2), attention="gsa", sparse=True, block_size=64,
                      short_block=16, short_iters=3, index_warmup_iters=5, max_iters=9)
    model = plan.bare_model(cfg, cfg.vocab_size)
    tokens = cfg.batch_size * cfg.block_size * cfg.grad_accum
    expected = 0
    for step in range(9):
        length = 16 if step < 3 else 64
        expected += tokens * flops_per_token(model, length, warmup=step < 5)
    assert plan.run_flops(cfg, model) == pytest.approx(expected)
    peak = 989e12 * cfg.assumed_mfu
    assert plan.hours(cfg, expected, "H100", 2) == pytest.approx(
        expected / peak / 7200 * (4 / 3 if cfg.activation_checkpointing else 1))


def test_a_plan_larger_than_the_card_is_refused_with_flags_that_make_it_fit(capsys):
    rng = random.Random(3)
    repaired = 0
    for _ in range(8):
        args = ["config/gsa_1b7.py", f"--gpu={rng.choice(['RTX 4090', 'L40S', 'A100 40GB'])}",
                f"--batch_size={rng.choice([4, 8, 16])}", f"--gpus={rng.choice([1, 8])}"]
        _, refusal = dry_run(capsys, *args)
        assert re.search(r"the plan needs [\d.]+ GB on each GPU, .* GB too much; ", refusal)
        flags = re.findall(r"--\S+", refusal)
        if flags:
            assert not dry_run(capsys, *args, *flags)[1]
            repaired += 1
    assert repaired > 3


@pytest.mark.parametrize("args,message", [
    (["--gpus=3", "--grad_accum=8"], "not a multiple of the 3 ranks: --grad_accum=9"),
    (["--fsdp"], "fsdp divides the model among ranks, and this is one"),
    (["--gpu=H10"], "'H10' is not one of .*did you mean 'H100'"),
    (["--gpu=H100", "--n_head=32", "--n_kv_head=2", "--n_embd=512"], "at most 8"),
    (["--gpus=0"], "gpus is 0"),
    (["--assumed_mfu=1.5"], "assumed_mfu is 1.5")])
def test_impossible_plans_are_refused_in_one_line(capsys, args, message):
    refusal = dry_run(capsys, "--data=nowhere", *args)[1]
    assert re.search(message, refusal) and "\n" not in refusal


def test_a_window_longer_than_the_data_is_refused_in_a_dry_run(data, capsys):
    few = Data(data).meta["val"]["tokens"]
    assert not dry_run(capsys, f"--data={data}", f"--block_size={few - 1}")[1]
    assert f"--block_size={few - 1} or" in dry_run(capsys, f"--data={data}",
                                                   f"--block_size={few}")[1]
