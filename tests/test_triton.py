"""The Triton kernels in Triton's interpreter (conftest.py) against the eager reference. No bf16: the interpreter's products of it are wrong."""
import random

import pytest
import torch

import kernels
from kernels import Budget, Index, Selection, Visible
from model import GSA, GSAConfig


# The interpreter's sigmoid overflows and gets it right; scores of NaN are meant
pytestmark = [pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
              pytest.mark.filterwarnings("ignore:invalid value encountered")]


def documents(rng, B, T, often):
    return torch.tensor([[rng.random() < often for _ in range(T)] for _ in range(B)]).long().cumsum(1)


def layer(seed, T, B=1, G=2, R=2, d=16, Hi=4, di=16, docs=0.0, activation="sigmoid", dtype=torch.float32, exact=False):
    """Random q, k, v, Index and Visible. exact: scores that are exact in binary, most of them shared by many keys."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    q, k, v = torch.randn(B, T, G * R, d), torch.randn(B, T, G, d), torch.randn(B, T, G, d)
    index = [torch.randn(B, T, Hi, di), torch.randn(B, T, di), torch.rand(B, T, Hi), torch.randn(Hi)]
    if exact:
        index = [(2 * x).round().clamp(-1, 1) for x in index]
    q, k, v, *index = (x.to(dtype) for x in (q, k, v, *index))
    return q, k, v, Index(*index, activation), Visible.causal(T, documents(rng, B, T, docs) if docs else None)


SHAPES = [  # T, and what differs from `layer`'s defaults; documents of one token where docs = 1
    (1, dict(B=3)), (2, dict(G=1, R=8)), (15, dict(R=1, d=64, docs=0.2)), (16, dict(B=2, d=96, Hi=3)), (17, dict(docs=1.0)),
    (33, dict(G=1, R=4, d=128, docs=0.1)), (50, dict(B=3, R=3, di=24, docs=0.1, activation="relu")), (100, dict(Hi=1, docs=0.02)),
    (257, dict(G=1, docs=0.01))]


@pytest.mark.parametrize("T,kind", SHAPES)
def test_select(T, kind, monkeypatch):
    """k_t is Eq. 8 of the variance; S_t holds the k_t best scores and the forced keys, and of equal scores the lowest."""
    monkeypatch.setattr(kernels, "SCORES_BYTES", 4 * T * 16 * kind.get("B", 1))  # 16 queries at a time, of 64 keys at a time
    options = kernels.launch_options
    monkeypatch.setattr(kernels, "launch_options", lambda name, *args: options(name, *args) | (dict(BS=64 if T < 200 else 128) if name == "select" else {}))
    rng = random.Random(T)
    for exact in (False, True):
        *_, index, visible = layer(T, T, **{**kind, "exact": exact} | (dict(activation="relu", di=16) if exact else {}))
        for rule in ("inverse", "eq8", "fixed") if T < 18 else (rng.choice(("inverse", "eq8")),):
            low = rng.randint(4, 12)
            budget = Budget(rule, rng.randint(1, T), low, low + rng.randint(0, T), rng.randint(0, 1), rng.randint(0, 3), torch.tensor(rng.choice((0.0, 0.05, 5.0))))
            got = kernels.select(index, visible, budget, "triton")
            want = kernels.select(index, visible, budget, "eager")
            if rule != "fixed":
                torch.testing.assert_close(got.var, want.var, rtol=1e-5, atol=1e-6)
            n = visible.mask().sum(-1).expand_as(got.budget)
            assert torch.equal(got.budget, kernels.budgets(got.var, n, budget))
            # S_t for that k_t, by a stable sort
            see = visible.mask().expand(len(n), -1, -1)
            age = visible.pos[..., None] - torch.arange(T)
            forced = (age < max(1, budget.n_local)) | (see.cumsum(-1) <= budget.n_sink)
            scores = kernels.index_scores_eager(index).masked_fill(forced, torch.inf).masked_fill(~see, -torch.inf)
            mask = got.mask()
            assert torch.equal(mask.sum(-1), got.budget) and not (mask & ~see).any() and mask[forced & see].all()
            if exact:
                order = scores.sort(dim=-1, descending=True, stable=True).indices
                assert torch.equal(mask, torch.zeros_like(mask).scatter_(2, order, torch.arange(T) < got.budget[..., None]))
            worst = scores.masked_fill(~mask, torch.inf).amin(-1)
            assert (worst >= scores.masked_fill(mask, -torch.inf).amax(-1) - 1e-5).all()
            assert (got.indices.sort(dim=-1).values.diff(dim=-1) >= 0).all()


def test_select_where_all_scores_are_equal():
    *_, index, visible = layer(0, 40)
    got = kernels.select(index._replace(w=torch.zeros_like(index.w)), visible, Budget("fixed", 5, 1, 5), "triton")
    for t in range(40):
        assert got.mask()[0, t].nonzero()[:, 0].tolist() == sorted({t, *range(min(t, 4))})


def run(backend, q, k, v, index, selection):
    leaves = [x.detach().requires_grad_() for x in (q, k, v, *index[:4], torch.tensor(1.3, dtype=index.q.dtype))]
    q, k, v, *parts, log_tau = leaves
    o, lse = kernels.sparse_attention(q, k, v, selection, backend)
    loss = kernels.index_loss(q, k, lse, Index(*parts, index.activation), log_tau, selection, backend)
    direction = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o).sin()
    return [o, lse, loss], torch.autograd.grad((o * direction).sum() + 3 * loss, leaves)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("T,kind", SHAPES)
def test_attention_and_loss(T, kind, everything, monkeypatch):
    q, k, v, index, visible = layer(100 + T, T, **kind)
    k_t = random.Random(T).randint(1, max(1, T // 2))
    selection = Selection.everything(visible, len(q)) if everything else kernels.select(index, visible, Budget("fixed", k_t, k_t, k_t))
    monkeypatch.setattr(kernels, "PARTIAL_BYTES", 1 << 16)  # several waves of tiles
    (outputs, grads), (outputs_e, grads_e) = (run(b, q, k, v, index, selection) for b in ("triton", "eager"))
    for a, b in zip(outputs, outputs_e):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, grads_e):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    if T == 50:
        assert all(torch.equal(a, b) for a, b in zip(grads, run("triton", q, k, v, index, selection)[1]))  # the same bits twice
        monkeypatch.setattr(kernels, "DETERMINISTIC", False)
        for a, b in zip(run("triton", q, k, v, index, selection)[1], grads_e):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_half_precision_is_as_good_as_pytorch():
    """Error against fp32 at most twice that of the PyTorch path in the same dtype."""
    q, k, v, index, visible = layer(5, 70, B=2, d=64)
    q, k, v = q.half(), k.half(), v.half()
    selection = kernels.select(index, visible, Budget("fixed", 20, 20, 20))
    exact = run("eager", q.double(), k.double(), v.double(), Index(*(x.double() for x in index[:4])), selection)
    errors = {}
    for backend in ("triton", "torch"):
        outputs, grads = run(backend, q, k, v, index, selection)
        errors[backend] = [(a.double() - b).abs().max() for a, b in zip((*outputs, *grads), (*exact[0], *exact[1]))]
    for ours, theirs, b in zip(errors["triton"], errors["torch"], (*exact[0], *exact[1])):
        assert ours <= 2 * theirs + 1e-6 * b.abs().max()


@pytest.mark.parametrize("R,d,tq", [(2, 16, 32), (8, 16, 16), (4, 80, 8), (8, 80, 4)])
def test_tiles_hold_the_selection(R, d, tq):
    q, k, _, index, visible = layer(3, 85, B=2, R=R, d=d, docs=0.05)
    assert kernels._tile_queries(q, k) == tq
    selection = kernels.select(index, visible, Budget("fixed", 9, 9, 9))
    offsets, keys, words, widest = selection.lists(tq)
    tiles = -(-85 // tq)
    assert offsets[-1] <= len(keys) == len(words)
    assert offsets.diff().max() <= widest <= min(85, 9 * tq)
    mask = torch.zeros(2, tiles * tq, 85, dtype=torch.bool)
    assert len(offsets) == 2 * tiles + 1
    for i in range(2 * tiles):
        part = slice(offsets[i], offsets[i + 1])
        assert (keys[part].diff() > 0).all() and (words[part] != 0).all()
        for j in range(tq):
            mask[i // tiles, i % tiles * tq + j, keys[part].long()] = (words[part] >> j & 1).bool()
    assert torch.equal(mask[:, :85], selection.mask()) and not mask[:, 85:].any()


def test_lists_above_the_limit_are_cut_to_their_length(monkeypatch):
    q, k, v, index, visible = layer(4, 85, B=2, docs=0.05)
    short, long = (kernels.select(index, visible, Budget("fixed", 9, 9, 9)) for _ in range(2))
    offsets, keys, words, _ = short.lists(32)
    monkeypatch.setattr(kernels, "LIST_BYTES", 0)
    cut_offsets, cut_keys, cut_words, widest = long.lists(32)
    n = offsets[-1]
    assert n == len(cut_keys) < len(keys) and widest == offsets.diff().max()
    for a, b in ((offsets, cut_offsets), (keys[:n], cut_keys), (words[:n], cut_words)):
        assert torch.equal(a, b)
    outputs, grads = run("triton", q, k, v, index, short)
    cut_outputs, cut_grads = run("triton", q, k, v, index, long)
    for a, b in zip((*outputs, *grads), (*cut_outputs, *cut_grads)):
        assert torch.equal(a, b)


def test_attention_and_loss_share_a_list_where_their_tiles_differ(monkeypatch):
    """8 indexer heads: attention has tiles of 32 queries, the loss reads their lists with 16."""
    q, k, v, index, visible = layer(6, 75, B=2, Hi=8, docs=0.05)
    assert kernels._tile_queries(q, k) == 32 and kernels._tile_queries(q, k, index.q) == 16
    selection = kernels.select(index, visible, Budget("fixed", 9, 9, 9), "torch")
    outputs, grads = run("triton", q, k, v, index, selection)
    assert list(selection.packed) == [32]
    expected_outputs, expected_grads = run("eager", q, k, v, index, selection)
    for a, b in zip((*outputs, *grads), (*expected_outputs, *expected_grads)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


SYNCHRONISES = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero",
                "aten::bincount", "aten::_unique2", "aten::unique_consecutive",
                "aten::masked_select"}


def test_a_layer_never_waits_for_the_gpu(monkeypatch):
    """Selection, attention, loss and their backward pass call nothing that waits for a GPU."""
    monkeypatch.setattr(kernels, "SCORES_BYTES", 4 * 40 * 16)  # several chunks of queries
    q, k, v, index, visible = layer(8, 40, docs=0.05)
    budget = Budget("inverse", 9, 5, 15, 1, 2, torch.tensor(0.02))

    def forbidden(_):
        raise AssertionError("tolist waits for the GPU")

    monkeypatch.setattr(torch.Tensor, "tolist", forbidden)  # on a CPU it calls no operator
    with torch.profiler.profile() as profile:
        selection = kernels.select(index, visible, budget, "triton")
        for s in (selection, Selection.everything(visible, len(q))):
            run("triton", q, k, v, index, s)
    called = {event.name for event in profile.events()}
    assert {"gsa::select", "gsa::attend_backward", "aten::scatter_add_"} <= called
    assert not called & SYNCHRONISES


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_lse_has_no_gradient(backend):
    """The loss alone, then the output alone: the loss leaves attention's graph as it was."""
    q, k, v, index, visible = layer(10, 20)
    selection = kernels.select(index, visible, Budget("fixed", 5, 5, 5), "torch")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    index = index._replace(q=index.q.requires_grad_())
    o, lse = kernels.sparse_attention(*leaves, selection, backend)
    assert not lse.requires_grad
    kernels.index_loss(q, k, lse, index, torch.tensor(1.3), selection, backend).backward()
    assert index.q.grad is not None and all(x.grad is None for x in leaves)
    o.sum().backward()
    mask = selection.mask()
    expected = torch.autograd.grad(kernels.sparse_attention_eager(*leaves, mask)[0].sum(), leaves)
    for x, grad in zip(leaves, expected):
        torch.testing.assert_close(x.grad, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_loss_without_gradients_computes_none(backend, monkeypatch):
    q, k, v, index, visible = layer(12, 40, docs=0.05)
    selection = kernels.select(index, visible, Budget("fixed", 5, 5, 5), "torch")
    lse = kernels.sparse_attention(q, k, v, selection, backend)[1]
    index = index._replace(q=index.q.requires_grad_())
    loss = kernels.index_loss(q, k, lse, index, torch.tensor(1.3), selection, backend)

    def forbidden(*_):
        raise AssertionError("a gradient was computed")

    for owner, name in ((kernels.Shared, "spread"), (kernels.Own, "spread"), (kernels, "_add_up")):
        monkeypatch.setattr(owner, name, forbidden)
    with torch.no_grad():
        without = kernels.index_loss(q, k, lse, index, torch.tensor(1.3), selection, backend)
    assert loss.requires_grad and not without.requires_grad
    assert torch.equal(loss, without)


NOT_FINITE = {"key inf": ("k", torch.inf), "key -inf": ("k", -torch.inf),
              "key NaN": ("k", torch.nan), "query inf": ("q", torch.inf),
              "weight NaN": ("w", torch.nan), "weight inf": ("w", torch.inf),
              "bias NaN": ("b", torch.nan)}


@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
@pytest.mark.parametrize("case", NOT_FINITE)
def test_an_indexer_that_is_not_finite_never_shows_the_future(case, activation):
    """On every path: visible keys only, exactly k_t of them, and the query itself among them."""
    name, value = NOT_FINITE[case]
    T, at = 20, 13
    *_, index, visible = layer(14, T, docs=0.05, activation=activation)
    broken = getattr(index, name).clone()
    if name == "b":
        broken[1] = value
    else:
        broken[:, at, ..., 0] = value
    broken = index._replace(**{name: broken})
    see = visible.mask()
    n = see.sum(-1)
    for rule in ("inverse", "eq8"):
        budget = Budget(rule, 8, 5, 12, 1, 2, torch.tensor(0.02))
        finite = kernels.select(index, visible, budget, "eager")
        eager = kernels.select(broken, visible, budget, "eager")
        for backend in kernels.BACKENDS:
            selection = kernels.select(broken, visible, budget, backend)
            mask, k = selection.mask(), selection.budget
            assert not (mask & ~see).any(), backend
            assert torch.equal(mask.sum(-1), k), backend
            assert (k >= n.clamp(max=5)).all() and (k <= n.clamp(max=12)).all(), backend
            assert mask.diagonal(dim1=1, dim2=2).all(), backend
            assert torch.equal(k, eager.budget) and torch.equal(mask, eager.mask()), backend
            if name != "b":  # what comes later changes nothing before it
                assert torch.equal(mask[:, :at], finite.mask()[:, :at]), backend
                torch.testing.assert_close(selection.var[:, :at], finite.var[:, :at])


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_a_score_of_nan_counts_as_the_lowest_and_one_of_inf_as_the_highest(backend):
    """
    One head, q = w = 1, ReLU: a key is its own score, here 3 NaN 2 inf 1 0. With k_t = 3 query 5
    takes itself, the inf and the 3; with k_t = 5 all but the NaN.
    """
    key = torch.tensor([3, torch.nan, 2, torch.inf, 1, 0]).view(1, 6, 1)
    index = Index(torch.ones(1, 6, 1, 1), key, torch.ones(1, 6, 1), torch.zeros(1), "relu")
    for k_t, expected in ((3, [0, 3, 5]), (5, [0, 2, 3, 4, 5])):
        budget = Budget("fixed", k_t, k_t, k_t)
        selection = kernels.select(index, Visible.causal(6), budget, backend)
        assert selection.mask()[0, 5].nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("T", [1, 3])
def test_few_queries_against_a_long_cache(T, monkeypatch):
    """Decoding: rows at different positions, the keys of a query shared out among programs."""
    monkeypatch.setattr(kernels, "PROGRAMS", 64)
    B, S = 2, 600
    q, k, v, index, _ = layer(9, S, B=B)
    pos = torch.tensor([[S - T], [517 - T]]) + torch.arange(T)
    at = lambda x: x.gather(1, pos.view(B, T, *[1] * (x.dim() - 2)).expand(B, T, *x.shape[2:]))
    index = index._replace(q=at(index.q), w=at(index.w))
    visible = Visible(pos, S, torch.tensor([[0], [300]]).expand(B, T))
    budget = Budget("inverse", 100, 50, 200, var_avg=torch.tensor(0.02))
    selection = kernels.select(index, visible, budget, "triton")
    assert torch.equal(selection.mask(), kernels.select(index, visible, budget, "eager").mask())
    for s in (selection, Selection.everything(visible, B)):
        for a, b in zip(*(kernels.sparse_attention(at(q), k, v, s, backend) for backend in ("triton", "eager"))):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_selection_from_a_long_cache():
    """Several blocks of keys to a row; one score far from all others, which are alike, is where a variance would lose its digits."""
    B, T, S = 2, 2, 5000
    *_, index, _ = layer(11, S, B=B)
    k = 0.01 * index.k
    k[:, 1500] *= 1e4
    index = index._replace(q=index.q[:, -T:], w=index.w[:, -T:], k=k)
    visible = Visible(torch.tensor([[S - 2, S - 1], [3000, 4500]]), S, torch.tensor([[0, 0], [1500, 4499]]))
    budget = Budget("inverse", 700, 50, 1400, n_sink=1, n_local=3, var_avg=torch.tensor(1e-3))
    got, want = (kernels.select(index, visible, budget, backend) for backend in ("triton", "eager"))
    double = kernels.select(Index(*(x.double() for x in index[:4])), visible, budget, "eager")
    torch.testing.assert_close(got.var.double(), double.var, rtol=1e-5, atol=1e-9)
    assert torch.equal(got.budget, want.budget) and torch.equal(got.mask(), want.mask())


@pytest.mark.parametrize("warmup", [False, True])
def test_model(warmup):
    """Loss, gradients and generation of a whole model, by the kernels and by the PyTorch path."""
    config = GSAConfig.arm("gsa", vocab_size=64, block_size=48, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_index_head=2, d_index=16, k_base=8, k_min=4, k_max=12)
    torch.manual_seed(1)
    models = {b: GSA(config, b).train() for b in ("torch", "triton")}
    models["triton"].load_state_dict(models["torch"].state_dict())
    idx = torch.randint(0, 64, (2, 40))
    results = []
    for model in models.values():
        out = model(idx, idx, (idx == 3).cumsum(1), warmup=warmup)
        (out.loss + out.index_loss).backward()
        results.append([out.loss, out.index_loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    if not warmup:
        assert [g.tolist() for g in models["torch"].generate(idx[:, :9], 5, temperature=0)] == [g.tolist() for g in models["triton"].generate(idx[:, :9], 5, temperature=0)]


def test_compile_sees_whole_graphs():
    """torch.compile traces forward and backward of a model through the kernels without a graph break."""
    config = GSAConfig.arm("gsa", vocab_size=64, block_size=32, n_layer=1, n_head=4, n_kv_head=2, n_embd=32, n_index_head=2, d_index=16, k_base=8, k_min=4, k_max=12)
    torch.manual_seed(1)
    model = GSA(config, "triton").train()
    idx = torch.randint(0, 64, (2, 20))
    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        out = run(idx, idx, (idx == 3).cumsum(1), stats=False)
        (out.loss + out.index_loss).backward()
        results.append([out.loss, out.index_loss, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("lists", ["short", "long"])
def test_compile_as_train_py_calls_it_breaks_no_graph(lists, monkeypatch):
    """
    torch.compile without further arguments: one graph, and no break. Lists above LIST_BYTES are cut
    to a length that is read from the GPU: these need the flag that lets a graph hold such a number.
    """
    if lists == "long":
        monkeypatch.setattr(kernels, "LIST_BYTES", 0)
        monkeypatch.setattr(torch._dynamo.config, "capture_scalar_outputs", True)
    config = GSAConfig.arm("gsa", vocab_size=64, block_size=32, n_layer=1, n_head=4, n_kv_head=2,
                           n_embd=32, n_index_head=2, d_index=16, k_base=8, k_min=4, k_max=12)
    model = GSA(config, "triton").train()
    idx = torch.randint(0, 64, (2, 20))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    out = torch.compile(model, backend="aot_eager")(idx, idx, (idx == 3).cumsum(1), stats=False)
    (out.loss + out.index_loss).backward()
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
