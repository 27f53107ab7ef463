"""
The Triton kernels in Triton's interpreter (conftest.py) against the eager reference. Not in bf16,
which the interpreter multiplies wrongly.
"""
import functools
import random

import pytest
import torch

import attention
import kernels
import kernels_loss
import kernels_select
import tiled
from attention import Budget, Index, Selection, Visible, document_starts
from checks import BACKENDS
from model import GSA, GSAConfig
from sample import draw_token, generate


# The interpreter's sigmoid overflows on its way to the right number. Scores of NaN are intended.
pytestmark = [pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
              pytest.mark.filterwarnings("ignore:invalid value encountered")]


def documents(rng, B, T, often):
    """Starts (B, T), a new document at each position with probability `often`."""
    begins = [[rng.random() < often for _ in range(T)] for _ in range(B)]
    return document_starts(torch.tensor(begins), True)


def layer(seed, T, B=1, G=2, R=2, d=16, Hi=4, di=16, docs=0.0, activation="sigmoid",
          dtype=torch.float32, exact=False):
    """
    Random q, k, v, Index and Visible. exact: scores that are exact in binary, most of them shared
    by many keys.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    q = torch.randn(B, T, G * R, d)
    k = torch.randn(B, T, G, d)
    v = torch.randn(B, T, G, d)
    index = [torch.randn(B, T, Hi, di), torch.randn(B, T, di), torch.rand(B, T, Hi),
             torch.randn(Hi)]
    if exact:
        index = [(2 * x).round().clamp(-1, 1) for x in index]
    q, k, v, *index = (x.to(dtype) for x in (q, k, v, *index))
    start = documents(rng, B, T, docs) if docs else None
    return q, k, v, Index(*index, activation), Visible.causal(T, start)


# T, and what differs from the defaults of `layer`; documents of one token where docs = 1
SHAPES = [
    (1, dict(B=3)),
    (2, dict(G=1, R=8)),
    (15, dict(R=1, d=64, docs=0.2)),
    (16, dict(B=2, d=96, Hi=3)),
    (17, dict(docs=1.0)),
    (33, dict(G=1, R=4, d=128, docs=0.1)),
    (50, dict(B=3, R=3, di=24, docs=0.1, activation="relu")),
    (100, dict(Hi=1, docs=0.02)),
    (145, dict(G=1, docs=0.01)),
]


def fixed(k_t):
    """The budget of k_t keys for every query."""
    return Budget("fixed", k_t, k_t, k_t)


@pytest.fixture
def small_steps(monkeypatch):
    """Call it with T and B: scores are computed for 16 queries and read 64 or 128 at a time."""
    def set_sizes(T, B):
        options = kernels.launch_options

        def small(name, *args):
            found = options(name, *args)
            if name in ("select", "variance"):
                found["BS"] = 64 if T < 140 else 128
            return found

        monkeypatch.setattr(kernels, "SCORES_BYTES", 4 * T * 16 * B)
        monkeypatch.setattr(kernels, "launch_options", small)
    return set_sizes


def check_selection(got, index, visible, budget, exact):
    """S_t holds the k_t best scores, forced keys first and, of equal scores, the lowest keys."""
    T = visible.n_keys
    see = visible.mask().expand(len(got.k_t), -1, -1)  # (B, T, S)
    age = visible.pos[..., None] - torch.arange(T)  # (1, T, S)
    forced = (age < max(1, budget.n_local)) | (see.cumsum(-1) <= budget.n_sink)
    scores = attention.index_scores(index)
    scores = scores.masked_fill(forced, torch.inf).masked_fill(~see, -torch.inf)
    mask = got.mask()
    assert torch.equal(mask.sum(-1), got.k_t)
    assert not (mask & ~see).any()
    assert mask[forced & see].all()
    if exact:
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        best = torch.arange(T) < got.k_t[..., None]
        assert torch.equal(mask, torch.zeros_like(mask).scatter_(2, order, best))
    worst_chosen = scores.masked_fill(~mask, torch.inf).amin(-1)
    best_left_out = scores.masked_fill(mask, -torch.inf).amax(-1)
    assert (worst_chosen >= best_left_out - 1e-5).all()
    assert (got.indices.sort(dim=-1).values.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("T,kind", SHAPES)
def test_select_by_every_rule(T, kind, small_steps):
    """k_t is Eq. 8 of the variance, and S_t the k_t best keys."""
    small_steps(T, kind.get("B", 1))
    rng = random.Random(T)
    for exact in (False, True):
        case = dict(kind, exact=exact)
        if exact:
            case |= dict(activation="relu", di=16)
        *_, index, visible = layer(T, T, **case)
        rules = attention.K_RULES
        if T >= 18:
            rules = (rng.choice(list(attention.K_RULES)),)
        for rule in rules:
            low = rng.randint(4, 12)
            budget = Budget(rule, k_base=rng.randint(1, T), k_min=low,
                            k_max=low + rng.randint(0, T), n_sink=rng.randint(0, 1),
                            n_local=rng.randint(0, 3),
                            var_avg=torch.tensor(rng.choice((0.0, 0.05, 5.0))))
            got = attention.select(index, visible, budget, "triton")
            want = attention.select(index, visible, budget, "eager")
            if rule != "fixed":
                torch.testing.assert_close(got.var, want.var, rtol=1e-5, atol=1e-6)
            n = visible.mask().sum(-1).expand_as(got.k_t)
            assert torch.equal(got.k_t, budget.keys_per_query(got.var, n))
            check_selection(got, index, visible, budget, exact)


def test_select_where_all_scores_are_equal():
    *_, index, visible = layer(0, 40)
    index = index._replace(w=torch.zeros_like(index.w))
    got = attention.select(index, visible, Budget("fixed", 5, 1, 5), "triton")
    for t in range(40):
        assert got.mask()[0, t].nonzero()[:, 0].tolist() == sorted({t, *range(min(t, 4))})


@pytest.mark.parametrize("T,kind", [SHAPES[2], (20, dict(B=2, activation="relu", docs=0.1))])
def test_score_variance_is_that_of_select(T, kind, small_steps):
    """The same bits, also through torch.compile."""
    small_steps(T, kind.get("B", 1))
    *_, index, visible = layer(T, T, **kind)
    want = attention.select(index, visible, Budget("inverse", 4, 1, 8), "triton").var
    variance = torch.compile(kernels_select.score_variance, backend="aot_eager", fullgraph=True)
    for function in (kernels_select.score_variance, variance):
        assert torch.equal(function(*index, visible.pos, visible.start), want)


def run(backend, q, k, v, index, selection):
    """Outputs (o, LSE, loss) and the gradients of everything that is differentiable."""
    log_tau = torch.tensor(1.3, dtype=index.q.dtype)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, *index[:4], log_tau)]
    q, k, v, *parts, log_tau = leaves
    index = Index(*parts, index.activation)
    o, lse = attention.sparse_attention(q, k, v, selection, backend)
    loss = attention.index_loss(q, k, lse, index, log_tau, selection, backend)
    direction = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o).sin()
    return [o, lse, loss], torch.autograd.grad((o * direction).sum() + 3 * loss, leaves)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("T,kind", SHAPES)
def test_attention_and_loss(T, kind, everything, monkeypatch):
    q, k, v, index, visible = layer(100 + T, T, **kind)
    k_t = random.Random(T).randint(1, max(1, T // 2))
    if everything:
        selection = Selection.everything(visible, len(q))
    else:
        selection = attention.select(index, visible, fixed(k_t))
    monkeypatch.setattr(kernels, "PARTIAL_BYTES", 1 << 16)  # several groups of tiles
    outputs, grads = run("triton", q, k, v, index, selection)
    expected_outputs, expected_grads = run("eager", q, k, v, index, selection)
    for a, b in zip(outputs, expected_outputs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, expected_grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    if T == 50:  # the same bits twice
        again = run("triton", q, k, v, index, selection)[1]
        assert all(torch.equal(a, b) for a, b in zip(grads, again))


def test_half_precision_is_as_good_as_pytorch():
    """Error against fp32 at most twice that of the PyTorch path in the same dtype."""
    q, k, v, index, visible = layer(5, 70, B=2, d=64)
    q, k, v = q.half(), k.half(), v.half()
    selection = attention.select(index, visible, fixed(20))
    double = Index(*(x.double() for x in index[:4]))
    outputs, grads = run("eager", q.double(), k.double(), v.double(), double, selection)
    exact = (*outputs, *grads)
    errors = {}
    for backend in ("triton", "torch"):
        outputs, grads = run(backend, q, k, v, index, selection)
        pairs = zip((*outputs, *grads), exact)
        errors[backend] = [(a.double() - b).abs().max() for a, b in pairs]
    for ours, theirs, b in zip(errors["triton"], errors["torch"], exact):
        assert ours <= 2 * theirs + 1e-6 * b.abs().max()


@pytest.mark.parametrize("R,d,tq", [(2, 16, 32), (8, 16, 16), (4, 80, 8), (8, 80, 4)])
def test_tiles_hold_the_selection(R, d, tq):
    q, k, _, index, visible = layer(3, 85, B=2, R=R, d=d, docs=0.05)
    assert kernels.attention_tile(q, k) == tq
    selection = attention.select(index, visible, fixed(9))
    tile_queries, longest, offsets, keys, query_bits = selection.union_list(tq)
    tiles = -(-85 // tq)
    assert tile_queries == tq
    assert offsets[-1] <= len(keys) == len(query_bits)
    assert offsets.diff().max() <= longest <= min(85, 9 * tq)
    mask = torch.zeros(2, tiles * tq, 85, dtype=torch.bool)
    assert len(offsets) == 2 * tiles + 1
    for i in range(2 * tiles):
        part = slice(offsets[i], offsets[i + 1])
        assert (keys[part].diff() > 0).all() and (query_bits[part] != 0).all()
        for j in range(tq):
            chosen = (query_bits[part] >> j & 1).bool()
            mask[i // tiles, i % tiles * tq + j, keys[part].long()] = chosen
    assert torch.equal(mask[:, :85], selection.mask()) and not mask[:, 85:].any()


def test_lists_above_the_limit_are_cut_to_their_length(monkeypatch):
    q, k, v, index, visible = layer(4, 85, B=2, docs=0.05)
    whole, cut = (attention.select(index, visible, fixed(9)) for _ in range(2))
    whole_list = whole.union_list(32)
    monkeypatch.setattr(kernels, "LIST_BYTES", 0)
    cut_list = cut.union_list(32)
    n = whole_list.offsets[-1]
    assert n == len(cut_list.keys) < len(whole_list.keys)
    assert cut_list.longest == whole_list.offsets.diff().max()
    assert torch.equal(whole_list.offsets, cut_list.offsets)
    assert torch.equal(whole_list.keys[:n], cut_list.keys)
    assert torch.equal(whole_list.query_bits[:n], cut_list.query_bits)
    outputs, grads = run("triton", q, k, v, index, whole)
    cut_outputs, cut_grads = run("triton", q, k, v, index, cut)
    for a, b in zip((*outputs, *grads), (*cut_outputs, *cut_grads)):
        assert torch.equal(a, b)


def test_attention_and_loss_share_a_list_where_their_tiles_differ(monkeypatch):
    """8 indexer heads: attention has tiles of 32 queries, the loss reads their lists with 16."""
    q, k, v, index, visible = layer(6, 75, B=2, Hi=8, docs=0.05)
    assert kernels.attention_tile(q, k) == 32
    assert kernels.attention_tile(q, k, index.q) == 16
    selection = attention.select(index, visible, fixed(9), "torch")
    made = []
    pack = kernels._pack

    def recorded(indices, n_keys, tile_queries, size):
        made.append(tile_queries)
        return pack(indices, n_keys, tile_queries, size)

    monkeypatch.setattr(kernels, "_pack", recorded)
    outputs, grads = run("triton", q, k, v, index, selection)
    assert made == [32]
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
        selection = attention.select(index, visible, budget, "triton")
        kernels_select.score_variance(*index, visible.pos, visible.start)
        for s in (selection, Selection.everything(visible, len(q))):
            run("triton", q, k, v, index, s)
    called = {event.name for event in profile.events()}
    assert {"gsa::select", "gsa::score_variance", "gsa::attend_backward"} <= called
    assert "aten::scatter_add_" in called
    assert not called & SYNCHRONISES


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_has_no_gradient(backend):
    """The loss alone, then the output alone: the loss leaves attention's graph as it was."""
    q, k, v, index, visible = layer(10, 20)
    selection = attention.select(index, visible, fixed(5), "torch")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    index = index._replace(q=index.q.requires_grad_())
    o, lse = attention.sparse_attention(*leaves, selection, backend)
    assert not lse.requires_grad
    attention.index_loss(q, k, lse, index, torch.tensor(1.3), selection, backend).backward()
    assert index.q.grad is not None and all(x.grad is None for x in leaves)
    o.sum().backward()
    mask = selection.mask()
    expected_o, _ = attention.sparse_attention_eager(*leaves, mask)
    expected = torch.autograd.grad(expected_o.sum(), leaves)
    for x, grad in zip(leaves, expected):
        torch.testing.assert_close(x.grad, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_loss_without_gradients_computes_none(backend, monkeypatch):
    q, k, v, index, visible = layer(12, 40, docs=0.05)
    selection = attention.select(index, visible, fixed(5), "torch")
    _, lse = attention.sparse_attention(q, k, v, selection, backend)
    index = index._replace(q=index.q.requires_grad_())
    log_tau = torch.tensor(1.3)
    loss = attention.index_loss(q, k, lse, index, log_tau, selection, backend)

    def forbidden(*_):
        raise AssertionError("a gradient was computed")

    for owner, name in ((tiled.DenseBlock, "scatter_add"), (tiled.GatheredKeys, "scatter_add"),
                        (kernels_loss, "_add_partial_gradients")):
        monkeypatch.setattr(owner, name, forbidden)
    with torch.no_grad():
        without = attention.index_loss(q, k, lse, index, log_tau, selection, backend)
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
        finite = attention.select(index, visible, budget, "eager")
        eager = attention.select(broken, visible, budget, "eager")
        for backend in BACKENDS:
            selection = attention.select(broken, visible, budget, backend)
            mask, k = selection.mask(), selection.k_t
            assert not (mask & ~see).any(), backend
            assert torch.equal(mask.sum(-1), k), backend
            assert (k >= n.clamp(max=5)).all() and (k <= n.clamp(max=12)).all(), backend
            assert mask.diagonal(dim1=1, dim2=2).all(), backend
            assert torch.equal(k, eager.k_t) and torch.equal(mask, eager.mask()), backend
            if name != "b":  # what comes later changes nothing before it
                assert torch.equal(mask[:, :at], finite.mask()[:, :at]), backend
                torch.testing.assert_close(selection.var[:, :at], finite.var[:, :at])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_score_of_nan_counts_as_the_lowest_and_one_of_inf_as_the_highest(backend):
    """
    One head, q = w = 1, ReLU: a key is its own score, here 3 NaN 2 inf 1 0. With k_t = 3 query 5
    takes itself, the inf and the 3; with k_t = 5 all but the NaN.
    """
    key = torch.tensor([3, torch.nan, 2, torch.inf, 1, 0]).view(1, 6, 1)
    index = Index(torch.ones(1, 6, 1, 1), key, torch.ones(1, 6, 1), torch.zeros(1), "relu")
    for k_t, expected in ((3, [0, 3, 5]), (5, [0, 2, 3, 4, 5])):
        selection = attention.select(index, Visible.causal(6), fixed(k_t), backend)
        assert selection.mask()[0, 5].nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("T", [1, 3])
def test_few_queries_against_a_long_cache(T, monkeypatch):
    """Decoding: rows at different positions, the keys of a query shared out among programs."""
    monkeypatch.setattr(kernels, "PROGRAMS", 64)
    B, S = 2, 600
    q, k, v, index, _ = layer(9, S, B=B)
    pos = torch.tensor([[S - T], [517 - T]]) + torch.arange(T)  # (B, T)

    def at(x):
        """x (B, S, …) at pos: (B, T, …)."""
        return torch.stack([row[p] for row, p in zip(x, pos)])

    index = index._replace(q=at(index.q), w=at(index.w))
    visible = Visible(pos, S, torch.tensor([[0], [300]]).expand(B, T))
    budget = Budget("inverse", 100, 50, 200, var_avg=torch.tensor(0.02))
    selection = attention.select(index, visible, budget, "triton")
    expected = attention.select(index, visible, budget, "eager")
    assert torch.equal(selection.mask(), expected.mask())
    for s in (selection, Selection.everything(visible, B)):
        outputs = attention.sparse_attention(at(q), k, v, s, "triton")
        expected_outputs = attention.sparse_attention(at(q), k, v, s, "eager")
        for a, b in zip(outputs, expected_outputs):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_selection_from_a_long_cache():
    """
    A row has several blocks of keys. One score is far from all others, which are alike: there a
    careless variance loses its digits.
    """
    B, T, S = 2, 2, 5000
    *_, index, _ = layer(11, S, B=B)
    k = 0.01 * index.k
    k[:, 1500] *= 1e4
    index = index._replace(q=index.q[:, -T:], w=index.w[:, -T:], k=k)
    pos = torch.tensor([[S - 2, S - 1], [3000, 4500]])
    visible = Visible(pos, S, torch.tensor([[0, 0], [1500, 4499]]))
    budget = Budget("inverse", 700, 50, 1400, n_sink=1, n_local=3, var_avg=torch.tensor(1e-3))
    got = attention.select(index, visible, budget, "triton")
    want = attention.select(index, visible, budget, "eager")
    double = Index(*(x.double() for x in index[:4]))
    exact = attention.select(double, visible, budget, "eager")
    torch.testing.assert_close(got.var.double(), exact.var, rtol=1e-5, atol=1e-9)
    assert torch.equal(got.k_t, want.k_t)
    assert torch.equal(got.mask(), want.mask())


def small_config(block_size, n_layer, n_embd):
    return GSAConfig.arm("gsa", vocab_size=64, block_size=block_size, n_layer=n_layer, n_head=4,
                         n_kv_head=2, n_embd=n_embd, n_index_head=2, d_index=16,
                         k_base=8, k_min=4, k_max=12)


@pytest.mark.parametrize("warmup", [False, True])
def test_model(warmup):
    """Loss, gradients and generation of a whole model, by the kernels and by the PyTorch path."""
    config = small_config(block_size=48, n_layer=2, n_embd=64)
    torch.manual_seed(1)
    models = {b: GSA(config, b).train() for b in ("torch", "triton")}
    models["triton"].load_state_dict(models["torch"].state_dict())
    idx = torch.randint(0, 64, (2, 40))
    results = []
    for model in models.values():
        out = model(idx, idx, document_starts(idx, 3), warmup=warmup)
        (out.loss + out.index_loss).backward()
        results.append([out.loss, out.index_loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    if not warmup:
        texts = []
        for model in models.values():
            greedy = functools.partial(draw_token, temperature=0)
            generated = generate(model, idx[:, :9], 5, greedy)
            texts.append([tokens.tolist() for tokens in generated])
        assert texts[0] == texts[1]


def test_compile_sees_whole_graphs():
    """torch.compile traces a model, forward and backward, through the kernels: no graph break."""
    torch.manual_seed(1)
    model = GSA(small_config(block_size=32, n_layer=1, n_embd=32), "triton").train()
    idx = torch.randint(0, 64, (2, 20))
    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        out = run(idx, idx, document_starts(idx, 3))
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
    model = GSA(small_config(block_size=32, n_layer=1, n_embd=32), "triton").train()
    idx = torch.randint(0, 64, (2, 20))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    out = torch.compile(model, backend="aot_eager")(idx, idx, document_starts(idx, 3))
    (out.loss + out.index_loss).backward()
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
