"""Activation checkpointing, plan.py, sharding.py, and runs on several ranks."""
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import attention
import plan
import prepare
import train
from checkpoint import load_checkpoint, load_model
from configurator import UserError, parse
from conftest import ROOT
from data import Data
from measure import flops_per_token
from model import ARMS, GSA, GSAConfig
from optim import make_optimizers, optimizer_tensors
from ranks import Ranks
from sharding import (Shards, average_undivided_gradients, clip, save_shards, shard, shard_files,
                      whole)


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
    real_bias = attention.Visible.bias
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "select", select)
        # Visible holds its bias as long as a block has to be computed again
        patch.setattr(attention.Visible, "bias", lambda *args: keep(real_bias(*args)))
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
        tie_embed=rng.random() < 0.5, qk_norm=rng.random() < 0.5,
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
                          qk_norm=False, batch_size=1, block_size=16, dtype=dtype,
                          activation_checkpointing=again)
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
    assert "2400 steps of 2,048" in lines["tokens"]
    assert "nowhere is not there" in lines["data"]
    assert "windows of 128 tokens" in lines["steps 0-800"]
    assert "warm-up" in lines["steps 800-1000"]
    assert "sparse" in lines["steps 1000-2400"]
    parts = [float(size) for name, size in lines.items()
             if name[:2] == "  " and name not in ("  in all", "  one layer")]
    assert len(parts) == 8
    least = float(lines["  in all"].split()[0])  # with activation checkpointing
    assert 1.5 < least <= sum(parts) + 0.05


def test_a_local_card_and_its_name_give_the_same_plan(monkeypatch):
    """An H100's 79.2 GiB, as CUDA reports them and as the table has them."""
    class Properties:
        name = "NVIDIA H100 80GB HBM3"
        total_memory = int(79.18 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    local = plan.pick_card(train.TrainConfig(device="cuda"))
    named = plan.pick_card(train.TrainConfig(gpu="H100"))
    assert named.memory == pytest.approx(local.memory, rel=1e-3)


def test_fsdp_gathers_the_embedding_with_a_whole_gradient():
    """Numbers of 4 bytes: the embedding and its gradient, two blocks and one block's gradient."""
    cfg = random_plan(random.Random(4), attention="dense", fsdp=True, dtype="float32")
    model = plan.bare_model(cfg, cfg.vocab_size)
    blocks = plan.group_sizes(model)["matrix"] / cfg.n_layer
    gathered = plan.memory(cfg, model, plan.Card("CPU", None), 2)["gathered"]
    assert gathered - 12 * blocks == 8 * plan.group_sizes(model)["embed"]


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


# ---- runs on several ranks

TINY = dict(
    n_layer=2, n_head=2, n_kv_head=1, n_embd=32, block_size=64, n_index_head=2, d_index=8,
    k_base=12, k_min=4, k_max=16, batch_size=2, grad_accum=6, max_iters=6, index_warmup_iters=3,
    warmup_iters=2, learning_rate=3e-3, min_lr=3e-3, eval_iters=2, log_interval=1, eval_interval=4,
    device="cpu")


def config(data, out_dir, **settings):
    return train.TrainConfig.arm("gsa", **TINY | dict(data=data, out_dir=str(out_dir)) | settings)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def resume(out_dir, *flags):
    train.main(["--init_from=resume", f"--out_dir={out_dir}", *flags])


def retrofit(data, folder, out_dir, *flags):
    """
    A dense model gets an indexer, which trains alone for four steps. The evaluation of step 4, when
    everything begins to train, runs forwards only.
    """
    tiny = [f"--{name}={value}" for name, value in TINY.items()]
    train.main([*tiny, f"--init_from={folder}/dense", f"--data={data}", f"--out_dir={out_dir}",
                "--index_warmup_iters=4", *flags])


def skip_a_step_of_a_divided_model():
    """A NaN on one rank: on all ranks weights, V̄ and optimizers keep their bits."""
    with Ranks("cpu") as ranks:
        torch.manual_seed(0)
        cfg = train.TrainConfig.arm("gsa", **TINY, muon=True)
        model = GSA(cfg.model_config(70))
        shard(model, "cpu", bf16=False)
        optimizers = make_optimizers(model, cfg)
        idx = torch.randint(0, 70, (2, 64))
        for bad in (False, True, False):
            tensors = model.state_dict() | optimizer_tensors(optimizers, model)
            before = {name: whole(x).clone() for name, x in tensors.items()}
            out = model(idx, idx)
            loss = out.loss + out.index_loss
            if bad and ranks.rank == 1:
                loss = loss * math.nan
            loss.backward()
            average_undivided_gradients(model)
            norm = clip([p for o in optimizers for g in o.param_groups for p in g["params"]], 1.0)
            skip = (~torch.isfinite(norm)).float()
            for optimizer in optimizers:
                optimizer.found_inf = skip
                optimizer.step()
                optimizer.zero_grad()
            model.update_var_avg(skip)
            tensors = model.state_dict() | optimizer_tensors(optimizers, model)
            for name, x in before.items():
                assert torch.equal(whole(tensors[name]), x) == bad, name
        del model, optimizers


def rank_of_three(rank, ports, data, folder):
    """What each rank does. Fewer take part from run to run, so that none has to wait for long."""
    torch.set_num_threads(1)
    runs = [
        (3, skip_a_step_of_a_divided_model),
        (3, lambda: train.train(config(data, folder / "fsdp", fsdp=True, muon=True,
                                       activation_checkpointing=True))),
        (2, lambda: resume(folder / "fsdp", "--max_iters=8")),
        (2, lambda: train.train(config(data, folder / "ddp"))),
        (2, lambda: retrofit(data, folder, folder / "retrofit_fsdp", "--fsdp"))]
    for port, (world, run) in zip(ports, runs, strict=True):
        if rank < world:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank),
                              LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            run()


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """
    A folder of runs: one, one_muon (one rank), ddp (two), fsdp (three, then two), retrofit_one and
    retrofit_fsdp (two). The ranks also check that a step is skipped.
    """
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        args = [free_port() for _ in range(5)], data, folder
        dense = dict(attention="dense", **ARMS["dense"])
        train.train(config(data, folder / "dense", max_iters=1, **dense))
        ranks = torch.multiprocessing.spawn(rank_of_three, args, 3, join=False, daemon=True)
        train.train(config(data, folder / "one"))
        train.train(config(data, folder / "one_muon", muon=True, max_iters=8))
        retrofit(data, folder, folder / "retrofit_one")
        deadline = time.monotonic() + 180
        while not ranks.join(timeout=5):
            assert time.monotonic() < deadline, "the ranks hang"
    return folder


def losses(folder, kind="train"):
    """{step: [loss, index loss]}"""
    with open(folder / "log.jsonl") as f:
        records = [json.loads(line) for line in f]
    return {r["step"]: [r["loss"], r["index_loss"]] for r in records if r["kind"] == kind}


def assert_same_losses(a, b, steps, kind="train"):
    a, b = losses(a, kind), losses(b, kind)
    for step in steps:
        assert a[step] == pytest.approx(b[step], abs=1e-5), f"step {step}"


def assert_same_run(a, b, steps):
    """The same losses; V̄, weights and averages of the gradients at the end."""
    assert_same_losses(a, b, range(1, steps + 1))
    assert_same_losses(a, b, (4, steps), "eval")
    one, other = load_checkpoint(str(a)), load_checkpoint(str(b))
    for part in ("model", "optimizer"):
        assert set(one[part]) == set(other[part])
        for name, x in one[part].items():
            torch.testing.assert_close(other[part][name], x, rtol=1e-3, atol=1e-4, msg=name)
    averages = [x for name, x in one["model"].items() if "var_avg" in name]
    assert len(averages) == 2 and all(x > 0 for x in averages)


@pytest.mark.xdist_group("ranks")
def test_a_run_of_two_ranks_is_that_of_one_with_twice_the_micro_batches(runs):
    """Over the switch to sparse attention."""
    assert_same_run(runs / "one", runs / "ddp", steps=6)


@pytest.mark.xdist_group("ranks")
def test_a_divided_model_trains_as_a_whole_one_and_continues_on_another_number_of_ranks(runs):
    """FSDP2, Muon and activation checkpointing on three ranks, then from its shards on two."""
    assert len(shard_files(str(runs / "fsdp" / "step_00000006"))) == 3
    assert len(shard_files(str(runs / "fsdp" / "step_00000008"))) == 2
    assert_same_run(runs / "one_muon", runs / "fsdp", steps=8)


@pytest.mark.xdist_group("ranks")
def test_a_retrofit_of_a_divided_model_is_that_of_a_whole_one(runs):
    assert_same_run(runs / "retrofit_one", runs / "retrofit_fsdp", steps=6)
    dense = load_checkpoint(str(runs / "dense"))["model"]
    for step, unchanged in ((4, True), (6, False)):
        saved = load_checkpoint(str(runs / "retrofit_fsdp"), str(step))["model"]
        for name, x in dense.items():
            assert torch.equal(saved[name], x) == unchanged, (step, name)


@pytest.mark.xdist_group("ranks")
def test_one_process_continues_and_loads_what_several_have_saved(runs, tmp_path):
    fsdp = tmp_path / "fsdp"
    shutil.copytree(runs / "fsdp", fsdp)
    model, checkpoint = load_model(str(fsdp))
    assert checkpoint["step"] == 8
    resume(fsdp, "--fsdp=false", "--max_iters=9")
    assert not shard_files(str(fsdp / "step_00000009"))
    one = tmp_path / "one"
    shutil.copytree(runs / "one_muon", one)
    resume(one, "--max_iters=9")
    assert_same_losses(fsdp, one, range(1, 10))


@pytest.mark.xdist_group("ranks")
def test_a_damaged_or_missing_shard_is_found(runs, tmp_path, capsys):
    for damage in ("flip", "cut", "remove"):
        folder = tmp_path / damage
        shutil.copytree(runs / "fsdp", folder)
        path = Path(shard_files(str(folder / "step_00000008"))[0])
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        if damage == "cut":
            content = content[:1000]
        path.unlink()
        if damage != "remove":
            path.write_bytes(content)
        assert load_checkpoint(str(folder))["step"] == 6
        assert f"{path.name}" in capsys.readouterr().out


def test_shards_that_cannot_be_written_or_read_are_one_line(tmp_path, monkeypatch):
    tensors = {"model.a": torch.randn(50, 40), "model.b": torch.tensor(3.0),
               "optimizer.a.step": torch.tensor(7)}
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        save_shards(tmp_path / "file" / "x", tensors)
    folder = tmp_path / "shards"
    save_shards(folder, tensors)
    shards = Shards(folder, "model.")
    assert set(shards) == {"a", "b"}
    assert torch.equal(shards["a"], tensors["model.a"])
    assert Shards(folder)["optimizer.a.step"].dtype == torch.int64
    path = Path(shard_files(str(folder))[0])
    path.write_bytes(path.read_bytes()[:500])
    for read in (lambda: shards["a"], lambda: Shards(folder)):
        with pytest.raises(UserError, match="holds no readable shards: .*"):
            read()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        Shards(folder)


def test_one_rank_cannot_divide_a_model(data, tmp_path):
    with pytest.raises(UserError, match="fsdp divides the model among ranks"):
        train.train(config(data, tmp_path, fsdp=True))


def test_a_gradient_of_divided_and_whole_parts_is_clipped_as_one():
    """Of whole tensors alone clip is torch's clip_grad_norm_, bit for bit."""
    params = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    for limit in (0.1, 1e9):
        for p in params:
            p.grad = torch.randn_like(p)
        others = [torch.nn.Parameter(p.detach().clone()) for p in params]
        for p, other in zip(params, others):
            other.grad = p.grad.clone()
        norm = clip(params, limit)
        assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(others, limit))
        assert all(torch.equal(p.grad, other.grad) for p, other in zip(params, others))
    assert clip([], 1.0) == 0


@pytest.mark.xdist_group("ranks")
def test_two_nodes_train_as_one_process(data, tmp_path, runs):
    """The README's command for several nodes: two torchrun agents, which meet on loopback."""
    port = free_port()
    settings = TINY | dict(data=data, out_dir=tmp_path / "run", max_iters=3, fsdp=True)
    env = os.environ | dict(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    agents = []
    for node in range(2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                    "--nproc_per_node=1", f"--node_rank={node}", "--rdzv_backend=c10d",
                    f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=gsa"]
        command = [*launcher, str(ROOT / "train.py"), *(f"--{k}={v}" for k, v in settings.items())]
        agents.append(subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT))
    outputs = [agent.communicate(timeout=180)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert_same_losses(tmp_path / "run", runs / "one", range(1, 4))
