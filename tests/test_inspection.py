"""The reports of eval.py on a model's attention and on its training's stability; the pictures."""
import json
import math
import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attention
import eval as evaluation
import inspection
import measure
import needle
import pictures
import stability
import train
from attention import Selection, Visible
from configurator import UserError, to_json
from data import Data
from model import ARMS, GSA, Attention, GSAConfig
from eval_results import as_read
from tokenizer import Tokenizer

TINY = dict(
    n_layer=2, n_head=2, n_kv_head=1, n_embd=32, block_size=64,
    n_index_head=2, d_index=8, k_base=12, k_min=4, k_max=16)
SEPARATOR = 256  # of the byte tokenizer
VOCAB = 257


def fresh_model(arm, **settings):
    """An untrained double-precision model of the arm, in eval mode."""
    torch.manual_seed(0)
    config = GSAConfig.arm(arm, **TINY | dict(vocab_size=VOCAB) | settings)
    return GSA(config).double().eval()


def spread_budgets(model):
    """Give the model a V̄, so that k_t varies from query to query."""
    model.train()(torch.randint(0, VOCAB, (2, 64)))
    model.update_var_avg()
    model.eval()


def documents(lengths):
    """Ids of documents of these lengths, each with a separator in front."""
    rng = np.random.default_rng(0)
    return np.concatenate([[SEPARATOR, *rng.integers(0, 256, n - 1)] for n in lengths])


@pytest.fixture(scope="module")
def runs(demo, tmp_path_factory):
    """{arm: folder} of two tiny trainings, each of 4 steps."""
    folders = {}
    for arm in ("gsa", "dense"):
        folders[arm] = tmp_path_factory.mktemp(arm)
        train.train(train.TrainConfig.arm(
            arm, **TINY, data=demo, out_dir=str(folders[arm]), attention=arm, batch_size=2,
            max_iters=4, index_warmup_iters=3, warmup_iters=2, learning_rate=3e-3, eval_iters=1,
            log_interval=1, eval_interval=100, plot=False, device="cpu"))
    return folders


def quick_evaluation(out_dir, **settings):
    few = dict(max_tokens=200, samples=1, seeds=1, depths=1, lengths="64", attention_windows=2)
    return evaluation.evaluate(evaluation.EvalConfig(out_dir=str(out_dir), **few | settings))


# ---- shares on the first keys, by hand

# A row of two documents, of 5 and 3 tokens. A query sees 1 2 3 4 5 | 1 2 3 keys
STARTS = torch.tensor([[0, 0, 0, 0, 0, 5, 5, 5]])
FIRST_AND_OWN = [[0], [0, 1], [0, 2], [0, 3], [0, 4], [5], [5, 6], [5, 7]]
LAST_TWO = [[0], [0, 1], [1, 2], [2, 3], [3, 4], [5], [5, 6], [6, 7]]


def selected(keys):
    visible = Visible.causal(8, STARTS)
    if keys is None:
        return Selection.everything(visible, 1)
    rows = [(row + [-1])[:2] for row in keys]
    return Selection(visible, torch.tensor([[len(row) for row in keys]]),
                     torch.tensor([rows], dtype=torch.int32))


@pytest.mark.parametrize("keys,first_token,first_four", [
    # of the six queries behind a first key, the mean of 1 / visible keys; the one query behind
    # four keys gives them 4 of 5
    (None, (1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 2 + 1 / 3) / 6, 4 / 5),
    (FIRST_AND_OWN, 1 / 2, 1 / 2),
    # only the second query of each document still selects the first key; key 3 is of the first four
    (LAST_TWO, (1 / 2 + 0 + 0 + 0 + 1 / 2 + 0) / 6, 1 / 2),
])
def test_uniform_attention_gives_the_first_keys_their_share_of_the_selection(
        keys, first_token, first_four):
    q, k = torch.zeros(1, 8, 4, 16), torch.randn(1, 8, 2, 16)
    report = measure.attention_report(q, k, selected(keys))
    assert report["first_token"].item() == pytest.approx(first_token)
    assert report["first_four"].item() == pytest.approx(first_four)


@pytest.mark.parametrize("keys,first_token,first_four", [
    (None, 1, 1),
    (FIRST_AND_OWN, 1, 1),
    (LAST_TWO, (1 + 0 + 0 + 0 + 1 + 0) / 6, 1 / 2),  # the fifth query: keys 3 and 4, equal scores
])
def test_attention_on_the_first_token_alone_is_seen_where_it_is_selected(
        keys, first_token, first_four):
    q, k = torch.ones(1, 8, 4, 16), torch.zeros(1, 8, 2, 16)
    k[:, [0, 5]] = 100.0
    report = measure.attention_report(q, k, selected(keys))
    assert report["first_token"].item() == pytest.approx(first_token)
    assert report["first_four"].item() == pytest.approx(first_four)


@pytest.mark.parametrize("arm", ["dense", "gsa"])
@pytest.mark.parametrize("uniform", [True, False])
def test_the_attention_report_of_a_model_finds_its_sinks(arm, uniform, monkeypatch):
    """
    A window of documents of 20 and 44 tokens, whose gsa model selects the first key and the own.
    """
    lengths = (20, 44)

    def stub(attn, h, pos):
        q = torch.zeros(1, 64, 2, 16, dtype=h.dtype)
        k = torch.zeros(1, 64, 1, 16, dtype=h.dtype)
        if not uniform:
            q += 1
            k[:, [0, 20]] = 100.0
        return q, k
    monkeypatch.setattr(Attention, "queries_and_keys", stub)
    model = fresh_model(arm, **dict(k_rule="fixed", k_base=2, k_min=2, k_max=2, n_sink=1))
    layers = inspection.attention(model, np.append(documents(lengths), 0), SEPARATOR, 1)["layers"]
    # of a query that sees n keys
    seen = [n for length in lengths for n in range(1, length + 1)]
    first, four = [1.0], [1.0]
    if uniform and arm == "dense":
        first = [1 / n for n in seen if n > 1]
        four = [4 / n for n in seen if n > 4]
    elif uniform:  # two keys, of which the own is no first
        first, four = [1 / 2], [1 / 2]
    assert layers["first_token"] == pytest.approx([np.mean(first)] * 2)
    assert layers["first_four"] == pytest.approx([np.mean(four)] * 2)
    if arm == "gsa":
        # Two groups of 16 queries lie in the second document behind its second key. The keys of a
        # group are the 16 own and the first: 17, where a query has 2
        assert layers["union_ratio"] == [17 / 2] * 2


# ---- what is selected

@pytest.mark.parametrize("B,T,starts", [(1, 5, [0]), (2, 70, [0]), (3, 70, [0, 9, 41])])
def test_distances_and_unions_are_those_of_the_mask(B, T, starts, small_tiles):
    """Against loops over the mask of a random selection."""
    start = torch.zeros(B, T, dtype=torch.long)
    for begin in starts:
        start[:, begin:] = begin
    visible = Visible.causal(T, start)
    mask = visible.mask().expand(B, T, T) & (torch.rand(B, T, T) < 0.3)
    mask |= torch.eye(T, dtype=torch.bool)
    k_t = mask.sum(-1)  # (B, T)
    order = mask.int().sort(dim=-1, descending=True, stable=True).indices[..., :k_t.max()]
    indices = order.masked_fill(torch.arange(order.size(-1)) >= k_t[..., None], -1).int()
    selection = Selection(visible, k_t, indices)
    assert torch.equal(selection.mask(), mask)
    counts = visible.pos - visible.first >= 6  # (B, T)
    got, union = measure.selection_counts(selection, counts)
    # 1. distances
    distances = [t - s for b, t, s in mask.nonzero().tolist() if counts[b, t]]
    assert got.tolist() == np.bincount(distances, minlength=T).tolist()
    if distances:
        numbers = measure.distance_numbers(got.numpy())
        for p in (50, 90):
            expected = np.percentile(distances, p, method="inverted_cdf")
            assert numbers[f"distance_{p}"] == expected
        assert numbers["within_64"] == pytest.approx(np.mean(np.array(distances) < 64))
    # 2. unions of 16 queries that all count
    n_keys = total = 0
    for b in range(B):
        for t in range(0, T - 15, 16):
            if counts[b, t:t + 16].all():
                rows = [set(mask[b, i].nonzero()[:, 0].tolist()) for i in range(t, t + 16)]
                n_keys += len(set.union(*rows))
                total += sum(map(len, rows))
    assert union.tolist() == [n_keys, total]
    assert (n_keys > 0) == (T == 70)


def test_budgets_and_their_correlation_are_those_of_the_model(monkeypatch):
    """
    Against numpy, on the keys that the model's own layers choose and the logits of whole windows.
    Queries that see k_max keys or fewer do not count.
    """
    model = fresh_model("gsa")
    spread_budgets(model)
    ids = documents([30, 50, 10, 103])  # three windows
    ids = np.append(ids, 0)
    report = inspection.attention(model, ids, SEPARATOR, 3)
    layers = report["layers"]
    # 1. the same from full forwards
    chosen = []
    own = Attention.choose_keys

    def choose(attn, *args):
        found = own(attn, *args)
        chosen.append((attn.layer, found[1].k_t[0]))
        return found
    monkeypatch.setattr(Attention, "choose_keys", choose)
    entropy, free, stats = [], [], []
    for begin in (0, 64, 128):
        idx = torch.tensor(ids[begin:begin + 64])[None]
        doc_start = attention.document_starts(idx, SEPARATOR)
        out = model(idx, doc_start=doc_start, stats=True)
        p = out.logits[0].softmax(-1)  # (T, V)
        entropy.append(-(p * p.log()).sum(-1))
        free.append(torch.arange(64) - doc_start[0] + 1 > 16)
        stats.append(out.stats)
    entropy, free = torch.cat(entropy).detach().numpy(), torch.cat(free).numpy()
    assert report["free_queries"] == free.sum() > 50
    # 2. compared
    for layer in range(2):
        k_t = torch.cat([k for i, k in chosen if i == layer]).numpy()
        assert layers["k_t"][layer] == pytest.approx(k_t.mean())
        k_t = k_t[free]
        assert k_t.std() > 0.3
        expected = {"k_t_mean": k_t.mean(), "k_t_std": k_t.std(),
                    "k_t_at_min": np.mean(k_t == 4), "k_t_at_max": np.mean(k_t == 16),
                    "k_t_entropy": np.corrcoef(k_t, entropy[free])[0, 1]}
        expected |= {f"k_t_{p}": np.percentile(k_t, p) for p in (5, 50, 95)}
        for name, value in expected.items():
            # the report's entropy is computed in fp32
            assert layers[name][layer] == pytest.approx(value, rel=1e-4), name
        for name in ("value_gate", "output_gate", "visible", "var_ratio"):
            mean = np.mean([s[name][layer].item() for s in stats])
            assert layers[name][layer] == pytest.approx(mean, rel=1e-6), name
        largest = max(s["max_activation"][layer].item() for s in stats)
        assert layers["max_activation"][layer] == pytest.approx(largest)


def test_shares_are_means_over_the_queries_of_all_windows():
    """Two windows count as one batch of two, though one of them has fewer queries that choose."""
    model = fresh_model("gsa")
    ids = np.append(documents([64, 5, 5, 5, 49]), 0)
    layers = inspection.attention(model, ids, SEPARATOR, 2)["layers"]
    idx = torch.tensor(ids[:128]).view(2, 64)
    stats = model(idx, doc_start=attention.document_starts(idx, SEPARATOR), stats=True).stats
    for name in ("recall", "recall_best", "first_token", "first_four"):
        assert layers[name] == pytest.approx(stats[name].tolist(), rel=1e-6), name


def test_an_activation_that_is_not_finite_is_no_largest_activation():
    """It is null in eval.json, and the report, its summary and its picture go without it."""
    model = fresh_model("dense")
    torch.nn.init.constant_(model.blocks[1].mlp.down.weight, math.nan)
    report = as_read(inspection.attention(model, np.append(documents([64]), 0), SEPARATOR, 1))
    finite, none = report["layers"]["max_activation"]
    assert finite > 0 and none is None
    inspection.show(report)
    assert "largest_activation" not in inspection.summary(report)
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.close(pictures.draw_attention(plt, report))


def test_the_bins_of_k_t_are_equally_wide():
    """Else a bin of two keys would show twice the share of one of one key. k_t is 4 to 44."""
    model = fresh_model("gsa", k_max=44)
    report = inspection.attention(model, np.append(documents([64]), 0), SEPARATOR, 1)
    edges = report["k_t_histogram"]["edges"]
    assert set(np.diff(edges)) == {2} and edges[0] == 4 and edges[-2] <= 44 < edges[-1]
    assert sum(report["k_t_histogram"]["shares"]) == pytest.approx(1)


def test_a_closed_gate_is_one_below_a_tenth():
    model = fresh_model("gated")
    gate = model.blocks[0].attn.value_gate.proj  # 16 values
    torch.nn.init.zeros_(gate.weight)
    opening = torch.tensor([0.05] * 4 + [0.2] * 12)
    gate.bias.data.copy_(opening.logit())
    layers = inspection.attention(model, np.append(documents([64]), 0), SEPARATOR, 1)["layers"]
    assert layers["value_gate_closed"][0] == pytest.approx(4 / 16)
    assert layers["value_gate"][0] == pytest.approx((4 * 0.05 + 12 * 0.2) / 16)


@pytest.mark.parametrize("arm", list(ARMS))
def test_the_report_and_its_picture_leave_out_what_an_arm_does_not_have(arm, capsys):
    model = fresh_model(arm)
    report = inspection.attention(model, np.append(documents([64]), 0), SEPARATOR, 5)
    assert report["windows"] == 1  # there are no more
    layers = report["layers"]
    assert ("recall" in layers) == ("union_ratio" in layers) == model.config.sparse
    assert ("value_gate" in layers) == ("output_gate_closed" in layers) == model.config.value_gate
    report = json.loads(to_json(report))
    inspection.show(report)
    printed = capsys.readouterr().out
    assert ("correlation" in printed) == model.config.sparse
    assert ("output gate" in printed) == model.config.value_gate
    summary = inspection.summary(report)
    assert ("index_recall" in summary) == model.config.sparse
    if model.config.sparse:
        best = np.mean(report["layers"]["recall_best"])
        assert summary["index_recall"] <= best
        assert summary["index_recall_of_best"] == pytest.approx(summary["index_recall"] / best)
    if arm == "sparse":  # its k_t is constant, and correlates with nothing
        assert layers["k_t_std"] == [0, 0] and report["layers"]["k_t_entropy"] == [None, None]
        assert "k_t_entropy_correlation" not in summary
    plt = pytest.importorskip("matplotlib.pyplot")
    figure = pictures.draw_attention(plt, report)
    assert len(figure.axes) == 1 + model.config.value_gate + 2 * model.config.sparse
    assert figure.axes[0].get_lines()[0].get_ydata().tolist() == layers["first_token"]
    plt.close(figure)


def test_without_a_long_document_the_report_says_so(capsys):
    """No query sees more than k_max keys: there is nothing to say about what is selected."""
    model = fresh_model("gsa")
    report = inspection.attention(model, np.append(documents([16] * 4), 0), SEPARATOR, 1)
    assert report["free_queries"] == 0
    assert "k_t_mean" not in report["layers"] and "k_t_histogram" not in report
    inspection.show(report)
    assert "no query sees more keys than the largest budget" in capsys.readouterr().out


# ---- stability

def test_the_stability_report_of_a_log_by_hand(capsys):
    """
    2,000 steps: the counts are those of the checkpoint, also of steps behind the last record; the
    largest numbers are those of logged steps.
    """
    records = [
        {"kind": "train", "step": 1, "grad_norm": 2.0, "index_grad_norm": 0.5, "skipped": 0,
         "spikes": 0},
        {"kind": "spike", "step": 700, "loss": 9.0},
        {"kind": "train", "step": 1000, "grad_norm": 7.5, "index_grad_norm": None, "skipped": 2,
         "spikes": 1},
        {"kind": "eval", "step": 1000, "loss": 2.0, "max_activation": 30.0,
         "max_activation/0": 20.0, "max_activation/1": 40.0},
        {"kind": "train", "step": 1990, "grad_norm": 1.0, "index_grad_norm": 0.25, "skipped": 3,
         "spikes": 2},
        {"kind": "spike", "step": 1995, "loss": 8.0},
        {"kind": "eval", "step": 2000, "loss": 2.0, "max_activation/0": 10.0},
    ]
    counts = stability.Stability(skipped=4, spikes=3).state()
    report = stability.stability_report(records, 2000, counts)
    assert report == {
        "steps": 2000, "logged_steps": 3, "spikes": 3, "skipped": 4, "spikes_per_1000_steps": 1.5,
        "grad_norm": {"value": 7.5, "step": 1000}, "index_grad_norm": {"value": 0.5, "step": 1},
        "max_activation": {"value": 40.0, "step": 1000}}
    stability.show(report)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "stability   of all 2,000 steps: 3 spikes (1.50 per 1,000 steps), 4 skipped steps",
        "  largest gradient norm of 3 logged steps: 7.5 (step 1,000)",
        "  largest gradient norm of the indexer of 3 logged steps: 0.5 (step 1)",
        "  largest activation in the training's evaluations: 40 (step 1,000)"]
    assert stability.summary(report) == {"spikes_per_1000_steps": 1.5, "skipped_steps": 4,
                                         "largest_grad_norm": 7.5}


def test_stability_of_a_log_without_counts_and_norms(capsys):
    """As an older version wrote it, of a dense model."""
    report = stability.stability_report([{"kind": "train", "step": 10, "loss": 3.0}], 10, None)
    assert report["spikes"] is None and report["grad_norm"] is None
    stability.show(report)
    assert "not counted" in capsys.readouterr().out
    assert stability.summary(report) == {}


def test_stability_counts_up_to_the_checkpoint_and_needs_a_log(tmp_path):
    cfg = SimpleNamespace(out_dir=str(tmp_path))
    counts = stability.Stability(spikes=2).state()
    subject = SimpleNamespace(checkpoint={"step": 20, "stability": counts})
    with pytest.raises(UserError, match="there is no log of the training in"):
        stability.measure(cfg, subject)
    lines = [json.dumps({"kind": "train", "step": step, "grad_norm": step / 10})
             for step in (10, 20, 30)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    report = stability.measure(cfg, subject)
    assert report["steps"] == 20 and report["spikes"] == 2 and report["grad_norm"]["value"] == 2


# ---- pictures

def log(out_dir, kind):
    """The records of one kind of a run's log.jsonl."""
    records = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def test_the_pictures_are_drawn(runs, capsys):
    pytest.importorskip("matplotlib")
    quick_evaluation(runs["gsa"])
    for name in ("eval.png", "attention.png", "selection.png"):
        assert (runs["gsa"] / name).read_bytes().startswith(b"\x89PNG")
    assert "no selection.png" not in capsys.readouterr().out
    quick_evaluation(runs["dense"])
    assert "no selection.png: this model has no indexer" in capsys.readouterr().out
    assert (runs["dense"] / "attention.png").exists()
    assert not (runs["dense"] / "selection.png").exists()


def test_without_matplotlib_the_rest_runs(runs, capsys, monkeypatch):
    for name in ("eval.png", "eval.json"):
        (runs["dense"] / name).unlink(missing_ok=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    quick_evaluation(runs["dense"])
    assert "no eval.png: matplotlib is not installed" in capsys.readouterr().out
    assert (runs["dense"] / "eval.json").exists()
    assert not (runs["dense"] / "eval.png").exists()


def test_training_curves_show_losses_validation_recall_and_the_change_of_phase(runs):
    plt = pytest.importorskip("matplotlib.pyplot")
    for arm, folder in runs.items():
        records = log(folder, "train") + log(folder, "eval")
        figure = pictures.draw_results(plt, [], records, 3)
        lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
        for kind, label in (("train", "loss"), ("eval", "validation loss")):
            assert lines[label].get_xdata().tolist() == [r["step"] for r in log(folder, kind)]
            assert lines[label].get_ydata().tolist() == [r["loss"] for r in log(folder, kind)]
        assert ("recall" in lines) == (arm == "gsa")
        vertical = figure.axes[0].get_lines()[-1]
        assert list(vertical.get_xdata()) == [3, 3]
        plt.close(figure)


def test_a_heat_map_is_white_where_a_task_was_not_measured_at_a_length():
    """Tasks of RULER may have been measured one after the other, at other lengths."""
    plt = pytest.importorskip("matplotlib.pyplot")
    cells = [("vt", {"length": 512, "scores": [100, 50]}), ("vt", {"length": 1024, "least": 900}),
             ("cwe", {"length": 256, "scores": [20]})]
    figure = pictures.draw_ruler(plt, cells)
    shown = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert shown == {(1, 0): "75", (0, 1): "20"}  # column: 256, 512, 1024; row: vt, cwe
    plt.close(figure)


def test_the_picture_of_the_selection_holds_what_the_layers_compute(demo):
    """Masses are full attention, the selected keys are k_t, the needle's place holds its key."""
    model = fresh_model("gsa")
    tokenizer = Tokenizer("bytes")
    hay = needle.haystack(np.asarray(Data(demo).val), tokenizer)
    subject = SimpleNamespace(model=model, tokenizer=tokenizer, device="cpu", data=Data(demo),
                              val=np.asarray(Data(demo).val),
                              cfg=evaluation.EvalConfig())
    cells = [{"length": 32}, {"length": 48}, {"length": 4096}]  # the last in a longer context
    with pytest.raises(UserError, match="no needle was measured in a context of 64 tokens"):
        inspection.needle_selection(subject, {"cells": cells[2:]})
    layers, place = inspection.needle_selection(subject, {"cells": cells})
    ids, _, _ = needle.needle_prompt(hay, tokenizer, 48, 0.5, needle.longest_answer(),
                                     random.Random(0))
    assert len(ids) == 48 - 4  # less the answer
    fact = re.fullmatch(r"\n([A-Z]{2}=)([a-z0-9]{4})\n", tokenizer.decode(ids[place]))
    assert fact and tokenizer.decode(ids).endswith("\n" + fact[1])
    seen = []
    hooks = [block.attn.register_forward_pre_hook(lambda attn, inputs: seen.append(inputs))
             for block in model.blocks]
    model.trunk(torch.from_numpy(ids.astype(np.int64))[None])
    for hook in hooks:
        hook.remove()
    for block, (h, visible), (mass, selected) in zip(model.blocks, seen, layers, strict=True):
        assert mass.shape == selected.shape == (len(ids),)
        assert mass.sum() == pytest.approx(1)
        index = block.attn.indexer(h, visible.pos)
        selection = attention.select(index, visible, block.attn.indexer.budget(), "eager")
        assert selected.sum() == selection.k_t[0, -1] < len(ids)
        chosen = [i for i in selection.indices[0, -1].tolist() if i >= 0]
        assert sorted(chosen) == np.flatnonzero(selected).tolist()


def test_the_mass_of_the_picture_is_full_attention():
    """With values that are one-hot, the output of attention is its probabilities, head by head."""
    model = fresh_model("gsa")
    ids = np.arange(9)
    (mass, _), *_ = inspection.last_query(model, ids)
    attn = model.blocks[0].attn
    h = model.blocks[0].norm1(model.embed(torch.from_numpy(ids)[None]))
    visible = attention.Visible.causal(9)
    q, k = attn.queries_and_keys(h, visible.pos)
    one_hot = torch.eye(9, dtype=torch.double)[None, :, None]  # (B, S, G, S)
    o, _ = attention.sparse_attention_eager(q, k, one_hot, visible.mask())  # (B, T, H, S)
    np.testing.assert_allclose(mass, o[0, -1].mean(0).detach().numpy(), atol=1e-6, rtol=1e-5)


def test_the_picture_of_one_query_takes_no_matrix_of_all_queries():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.layout == torch.strided:
                self.numel = max(self.numel, out.numel())
            return out
    largest = {}
    for T in (1024, 2048):
        model = fresh_model("gsa", block_size=T)
        with Largest() as seen:
            inspection.last_query(model, np.arange(T) % 256)
        largest[T] = seen.numel
    assert largest[2048] < 2.5 * largest[1024]  # T² would be 4 times as much


@pytest.mark.parametrize("arm", list(ARMS))
def test_under_bfloat16_autocast_the_reports_numbers_are_nearly_the_same(arm):
    model = fresh_model(arm).float()
    ids = np.append(documents([64]), 0)
    exact = inspection.attention(model, ids, SEPARATOR, 1)["layers"]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = inspection.attention(model, ids, SEPARATOR, 1)["layers"]
        if model.config.sparse:
            (mass, _), *_ = inspection.last_query(model, ids[:64])
            assert mass.sum() == pytest.approx(1, abs=0.05)
    assert rounded.keys() == exact.keys()
    for name in ("first_token", "first_four", "max_activation", "visible"):
        assert rounded[name] == pytest.approx(exact[name], rel=0.05), name
