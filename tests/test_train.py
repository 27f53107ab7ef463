"""train.py and eval.py: batches, resume, ranks, retrofit, needles and pictures."""
import io
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest
import torch

import attention
import eval as evaluation
import scoring
import optim
import prepare
import sample as sampling
import train
from checkpoint import load_checkpoint, load_model
from configurator import UserError
from conftest import ROOT
from data import Batches, Data
from ranks import Ranks
from start import open_gates_and_load
from model import GSA, GSAConfig

TINY = dict(
    n_layer=2, n_head=2, n_kv_head=1, n_embd=32, block_size=64,
    n_index_head=2, d_index=8, k_base=12, k_min=4, k_max=16,
    batch_size=2, index_warmup_iters=3, warmup_iters=2, learning_rate=3e-3,
    eval_iters=2, log_interval=1, eval_interval=100, plot=False, device="cpu")
SEPARATOR = 256  # of the byte tokenizer
VOCAB = 257


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare.prepare(prepare.PrepareConfig(
        dataset="demo", num_tokens=120_000, num_proc=1, val_fraction=0.15, data_dir=str(folder)))
    return str(folder / "demo")


def config(data, out_dir, arm="gsa", **settings):
    paths = dict(data=data, out_dir=str(out_dir), attention=arm)
    return train.TrainConfig.arm(arm, **TINY | paths | settings)


def log(out_dir, kind="train"):
    """The records of one kind of a run's log.jsonl."""
    with open(os.path.join(out_dir, "log.jsonl")) as f:
        records = [json.loads(line) for line in f]
    return [r for r in records if r["kind"] == kind]


def resume(out_dir, *flags):
    train.main(["--init_from=resume", f"--out_dir={out_dir}", *flags])


def fresh_model(data, arm):
    """An untrained double-precision model of the arm, in eval mode."""
    torch.manual_seed(0)
    return GSA(config(data, "", arm).model_config(VOCAB)).double().eval()


def quick_evaluation(out_dir, **settings):
    few = dict(max_tokens=200, samples=1, seeds=1, depths=1, lengths="64")
    return evaluation.evaluate(evaluation.EvalConfig(out_dir=str(out_dir), **few | settings))


# ---- batches

def test_short_windows_are_pieces_of_the_long_ones(data, tmp_path):
    batches = Batches(Data(data).train, 64, 3, seed=5)
    for m in range(20):
        idx, targets = batches.train(m, "cpu")
        short = batches.train(m, "cpu", 16)
        assert all(x.shape == (12, 16) for x in short)
        assert torch.equal(short[0].view(3, 64), idx)
        assert torch.equal(short[1].view(3, 64), targets)
    with pytest.raises(ValueError, match="not a multiple of short_block"):
        config(data, tmp_path, short_iters=1, short_block=48)


def test_every_epoch_of_every_seed_has_an_order_of_its_own():
    """Seed 1 in its second epoch must not repeat seed 2 in its first."""
    ids = np.arange(701, dtype=np.uint16)
    orders = []
    for seed in range(4):
        batches = Batches(ids, 7, 1, seed)
        orders += [tuple(batches.order(epoch)) for epoch in range(4)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len(set(orders)) == 16


def test_every_window_once_per_epoch_and_nothing_else():
    T, B = 7, 3
    ids = np.arange(7 * 31 + 4, dtype=np.uint16)
    batches = Batches(ids, T, B, seed=5)
    assert batches.n == 31
    starts = []
    for m in range(31):  # 31 micro-batches of 3: three epochs
        idx, targets = batches.train(m, "cpu")
        assert torch.equal(idx[:, 1:], targets[:, :-1])
        assert torch.equal(targets[:, -1], idx[:, 0] + T)
        starts += (idx[:, 0] // T).tolist()
    epochs = [starts[i:i + 31] for i in (0, 31, 62)]
    assert all(sorted(e) == list(range(31)) for e in epochs)
    assert epochs[0] != epochs[1]


def test_documents_start_at_separators_in_the_long_windows_and_in_their_pieces(data, tmp_path):
    """Position by position; with doc_mask off there are no documents."""
    run = train.Run(config(data, tmp_path), Ranks("cpu"), train.StopSignal())
    for length in (64, 16):
        idx, _ = run.batches["train"].train(3, "cpu", length)
        idx[:, 5] = SEPARATOR
        for row, starts in zip(idx.tolist(), run.doc_start(idx).tolist()):
            start = 0
            for t, token in enumerate(row):
                start = t if token == SEPARATOR else start
                assert starts[t] == start
    run = train.Run(config(data, tmp_path, doc_mask=False), Ranks("cpu"), train.StopSignal())
    assert run.doc_start(idx) is None


# ---- runs

def interrupt_at_checkpoint(monkeypatch, cfg):
    """Train until the first checkpoint is written, then die."""
    save = train.save_checkpoint

    def save_and_die(*args, **kwargs):
        save(*args, **kwargs)
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(train, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train.train(cfg)


def without_times(records):
    keys = ("step", "loss", "index_loss", "recall", "k_t", "lr")
    return [{k: r[k] for k in keys if k in r} for r in records]


@pytest.mark.parametrize("arm,muon", [("dense", False), ("gsa", False), ("gsa", True)])
def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
        data, tmp_path, monkeypatch, arm, muon):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = dict(max_iters=8, eval_interval=3, grad_accum=2, muon=muon,
                    short_iters=5, short_block=32)
    train.train(config(data, whole, arm, **settings))
    interrupt_at_checkpoint(monkeypatch, config(data, cut, arm, **settings))
    with open(cut / "log.jsonl", "a") as f:  # logged after the checkpoint, then the power went
        f.write('{"kind": "train", "step": 4, "loss": 0}\n{"half a line')
    resume(cut)
    with pytest.raises(UserError, match=f"muon {muon} → {not muon}"):
        resume(cut, f"--muon={not muon}")
    for kind, count in (("train", 8), ("eval", 3)):
        expected = without_times(log(whole, kind))
        assert expected == without_times(log(cut, kind))
        assert len(expected) == count
    a = load_checkpoint(str(whole))
    b = load_checkpoint(str(cut))
    assert a["step"] == b["step"] == 8
    assert b["config"]["init_from"] == "scratch"  # how it began, not "resume"
    assert all(torch.equal(a["model"][n], b["model"][n]) for n in a["model"])


def test_phases_and_checkpoint(data, tmp_path):
    """
    Warm-up then sparse. The checkpoint alone is enough to load the model, sample from it and
    evaluate it.
    """
    metrics = train.train(config(data, tmp_path, max_iters=5))
    assert [r["phase"] for r in log(tmp_path)] == ["warm-up"] * 3 + ["sparse"] * 2
    meta = Data(data).meta["val"]
    bits = metrics["loss"] / math.log(2)
    assert metrics["bits_per_byte"] == pytest.approx(bits / meta["bytes"] * meta["tokens"])
    assert json.loads((tmp_path / "config.json").read_text())["n_embd"] == 32
    model, checkpoint = load_model(str(tmp_path))
    assert checkpoint["step"] == 5
    assert all(b.attn.indexer.var_avg > 0 for b in model.blocks)
    out = io.StringIO()
    how = sampling.SampleConfig(out_dir=str(tmp_path), start="import ", num_samples=2,
                                max_new_tokens=12)
    sampling.sample(how, out)
    assert out.getvalue().count("import ") == 2


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_muon_is_torchs_to_the_accuracy_of_bfloat16(shape):
    """Ten steps from the same gradients. Orthogonal means: singular values near 1."""
    start = torch.randn(shape)
    grads = [torch.randn(shape) for _ in range(10)]

    def end(optimizer_class, **options):
        p = torch.nn.Parameter(start.clone())
        optimizer = optimizer_class([p], 0.02, **options)
        for g in grads:
            p.grad = g.clone()
            optimizer.step()
        return p.detach()
    ours = end(optim.Muon)
    torchs = end(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    assert (ours - torchs).norm() < 0.02 * (torchs - start).norm()
    values = torch.linalg.svdvals(optim.orthogonal(grads[0]))
    assert 0.3 < values.min() and values.max() < 1.3


def worker(rank, world, rendezvous, data, out):
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{rendezvous}",
                                             timedelta(seconds=60), world, rank)
    results = gradients(rank, world, data)
    if rank == 0:
        torch.save(results, out)
    if world > 1:
        # Last: where DDP's reducer outlives the group, freeing gloo's threads can deadlock on
        # the GIL.
        torch.distributed.destroy_process_group()


def gradients(rank, world, data):
    """Gradients and V̄ after four micro-batches, shared out among the ranks."""
    model, batches = ready(data)
    wrapped = model
    if world > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)
    for micro in range(4 // world):
        wrapped.require_backward_grad_sync = micro == 4 // world - 1
        idx, targets = batches.train(micro * world + rank, "cpu")
        result = wrapped(idx, targets, attention.document_starts(idx, SEPARATOR))
        ((result.loss + result.index_loss) / (4 // world)).backward()
    model.update_var_avg()
    return [p.grad for p in model.parameters()] + [b.attn.indexer.var_avg for b in model.blocks]


def ready(data):
    torch.manual_seed(1)
    dims = {k: v for k, v in TINY.items() if k in GSAConfig.__dataclass_fields__}
    model = GSA(GSAConfig.arm("gsa", vocab_size=VOCAB, **dims)).double().train()
    return model, Batches(Data(data).train, 64, 2, 0)


def test_two_ranks_give_the_gradients_of_one(data, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    args = (2, tmp_path / "rendezvous", data, tmp_path / "2.pt")
    ranks = torch.multiprocessing.spawn(worker, args, 2, join=False, daemon=True)
    one = gradients(0, 1, data)
    assert any(ranks.join(timeout=60) for _ in range(2)), "the ranks hang"
    two = torch.load(tmp_path / "2.pt", weights_only=True)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_torchrun(data, tmp_path):
    """The command line, with two gloo ranks: the losses of one process with the same batch."""
    one, two = tmp_path / "one", tmp_path / "two"
    train.train(config(data, one, grad_accum=2, max_iters=4))
    env = os.environ | dict(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")

    def torchrun(*args):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                    f"--master_port={free_port()}"]
        done = subprocess.run([*launcher, str(ROOT / "train.py"), f"--out_dir={two}", *args],
                              env=env, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
    tiny = [f"--{k}={v}" for k, v in TINY.items()]
    torchrun(*tiny, f"--data={data}", "--grad_accum=2", "--max_iters=4")
    for a, b in zip(log(one), log(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-3)
        assert a["index_loss"] == pytest.approx(b["index_loss"], abs=2e-2)
    torchrun("--init_from=resume", "--max_iters=6")
    assert [r["step"] for r in log(two)] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in log(two, "eval")] == [4, 6]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_compile_trains_the_same(data, tmp_path):
    losses = []
    for name, on in (("plain", False), ("compiled", True)):
        train.train(config(data, tmp_path / name, n_layer=1, max_iters=3, compile=on))
        losses.append([r["loss"] for r in log(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_retrofit_of_a_dense_checkpoint(data, tmp_path):
    """It starts as the dense model was, trains the indexer alone in warm-up, then everything."""
    train.train(config(data, tmp_path / "dense", "dense", max_iters=6))
    dense, checkpoint = load_model(str(tmp_path / "dense"))
    model = GSA(config(data, "").model_config(VOCAB)).eval()
    assert open_gates_and_load(model, checkpoint["model"], "it")
    idx = torch.randint(0, VOCAB, (2, 64))
    torch.testing.assert_close(model(idx, warmup=True).logits, dense(idx).logits,
                               atol=0.02, rtol=0.02)
    tiny = [f"--{name}={value}" for name, value in TINY.items()]

    def retrofit(out_dir, *flags):
        train.main([*tiny, f"--data={data}", f"--init_from=auto:{tmp_path}/dense",
                    f"--out_dir={out_dir}", *flags])

    def trained(out_dir):
        """The checkpoint, and the weights that differ from the start, indexer aside."""
        saved = load_checkpoint(str(out_dir))
        own = model.state_dict()
        changed = {n for n, p in saved["model"].items() if not torch.equal(p, own[n])}
        return saved, {n for n in changed if ".indexer." not in n}
    retrofit(tmp_path / "3", "--max_iters=3")
    retrofit(tmp_path / "5", "--max_iters=5")
    saved, changed = trained(tmp_path / "3")
    assert not changed
    assert all(".indexer." in name for name in saved["optimizer"])
    queries = [n for n in saved["model"] if "indexer.wq" in n]
    assert all(not torch.equal(saved["model"][n], model.state_dict()[n]) for n in queries)
    whole, changed = trained(tmp_path / "5")
    assert changed == {n for n in whole["model"] if ".indexer." not in n}
    assert {name.rpartition(".")[0] for name in whole["optimizer"]} == {
        name for name, _ in model.named_parameters()}
    # resumed at the change of phase: bit for bit, and the same command does it
    shutil.copytree(tmp_path / "3", tmp_path / "longer")
    retrofit(tmp_path / "3", "--max_iters=5")
    resumed, _ = trained(tmp_path / "3")
    for part in ("model", "optimizer"):
        assert all(torch.equal(whole[part][n], resumed[part][n]) for n in whole[part])
    # resumed with a longer warm-up: the rest still keeps its bits
    retrofit(tmp_path / "longer", "--max_iters=5", "--index_warmup_iters=5")
    assert not trained(tmp_path / "longer")[1]
    with pytest.raises(UserError, match="does not fit the settings: n_layer 2 → 3"):
        retrofit(tmp_path / "x", "--n_layer=3")


def test_a_run_continues_other_weights_with_a_longer_context(data, tmp_path):
    """Only what is given changes: the shape is that of the weights, the optimizers are new."""
    train.train(config(data, tmp_path / "short", max_iters=4))
    train.main([f"--init_from={tmp_path}/short", f"--out_dir={tmp_path}/long", f"--data={data}",
                "--block_size=128", "--k_max=32", "--max_iters=1", "--learning_rate=0",
                "--min_lr=0", "--device=cpu", "--batch_size=1", "--eval_iters=1"])
    short = load_checkpoint(str(tmp_path / "short"))
    long = load_checkpoint(str(tmp_path / "long"))
    assert long["model_config"] == short["model_config"] | {"block_size": 128, "k_max": 32}
    for name, x in short["model"].items():
        if not name.endswith("var_avg"):
            assert torch.equal(x, long["model"][name]), name
    assert all(x == 1 for name, x in long["optimizer"].items() if name.endswith(".step"))


# ---- evaluation

def test_evaluate_end_to_end(data, tmp_path, capsys):
    train.train(config(data, tmp_path, max_iters=2))
    result = quick_evaluation(tmp_path, max_tokens=500, samples=2, seeds=2, depths=2,
                              lengths="48,64")
    cells = {(c["length"], c["depth"]) for c in result["results"]["needle"]["cells"]}
    assert cells == {(48, 0.0), (48, 1.0), (64, 0.0), (64, 1.0)}
    assert set(result["results"]) == {"perplexity", "needle", "attention", "stability"}
    assert json.loads((tmp_path / "eval.json").read_text())["summary"] == result["summary"]
    printed = capsys.readouterr().out
    assert "bits/byte" in printed and "summary" in printed
    assert (tmp_path / "eval.png").exists() or "matplotlib is not installed" in printed
    # what was kept at another context is neither drawn nor shown
    quick_evaluation(tmp_path, max_tokens=500, tasks="stability", block_size=40,
                     lengths="")
    assert "needle" not in capsys.readouterr().out


def test_progress_is_a_line_in_a_log_file_and_then_one_every_ten_seconds(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(scoring.time, "time", lambda: now[0])
    with scoring.Progress("part", 10) as progress:
        for _ in range(10):
            now[0] += 4
            progress.step()
    assert capsys.readouterr().out.splitlines() == [
        "part: 10 steps",
        "part: 3 of 10 steps, 28s left",
        "part: 6 of 10 steps, 16s left",
        "part: 9 of 10 steps, 4s left"]
