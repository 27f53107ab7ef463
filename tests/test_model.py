"""The model: arms, causality, batch invariance, cached decoding, gradients. In float64 where equality is claimed, since
in float32 rounding may swap two keys of nearly equal score."""
import math
from dataclasses import asdict, fields

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import model as model_module
from model import ARMS, GSA, GSAConfig, KVCache, sample

pytestmark = pytest.mark.usefixtures("small_tiles")
SMALL = dict(vocab_size=37, block_size=160, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_index_head=2, d_index=8, k_base=12, k_min=4, k_max=16)


def build(arm, dtype=torch.float64, backend="torch", trained=True, **dims):
    """A small model; trained = with weights and V̄ as uneven as training makes them."""
    model = GSA(GSAConfig.arm(arm, **SMALL | dims), backend).to(dtype)
    if trained:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.1))
            for block in model.blocks:
                if block.attn.indexer:
                    block.attn.indexer.var_avg.fill_(0.05)
    return model.eval()


def tokens(B, T):
    return torch.randint(0, SMALL["vocab_size"], (B, T))


def doc_ids(B, T):
    return (torch.rand(B, T) < 0.04).long().cumsum(1)


class HostSyncs(TorchDispatchMode):
    """Counts the reads of a tensor's value by Python: on a GPU each waits for the device."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


arms = pytest.mark.parametrize("arm", list(ARMS))
docs = pytest.mark.parametrize("docs", [False, True])


@arms
@docs
@pytest.mark.parametrize("T", [1, 15, 61])
def test_tiled_model_equals_eager(arm, docs, T):
    a, b = build(arm), build(arm, backend="eager")
    b.load_state_dict(a.state_dict())
    idx, doc = tokens(2, T), doc_ids(2, T) if docs else None
    for warmup in (False, True):
        grads = []
        for m in (a, b):
            out = m(idx, tokens(1, T).expand(2, T) * 0 + idx.flip(1), doc, warmup=warmup)
            loss = out.loss + (out.index_loss if m.config.sparse else 0)
            grads.append([out.logits, loss, *torch.autograd.grad(loss, m.parameters())])
        for x, y in zip(*grads):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def test_all_switches_off_is_plain_attention():
    """The dense arm against a Llama-style decoder written out here with torch's own attention."""
    model = build("dense")
    idx, c = tokens(2, 40), GSAConfig.arm("dense", **SMALL)
    norm = lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w
    d = c.d_head
    angle = torch.outer(torch.arange(40.), c.rope_base ** (-torch.arange(0, d, 2) / d)).double()

    def rotate(x):  # (B, H, T, d) as complex pairs (i, i + d/2)
        z = torch.complex(x[..., :d // 2], x[..., d // 2:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), -1)
    x = model.embed.weight[idx]
    for block in model.blocks:
        h, a = norm(x, block.norm1.weight), block.attn
        split = lambda w: (h @ w.weight.T).view(2, 40, -1, d).transpose(1, 2)
        o = F.scaled_dot_product_attention(rotate(split(a.wq)), rotate(split(a.wk)), split(a.wv), is_causal=True, enable_gqa=True)
        x = x + o.transpose(1, 2).reshape(2, 40, -1) @ a.wo.weight.T
        gate, up = (norm(x, block.norm2.weight) @ block.mlp.gate_up.weight.T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ block.mlp.down.weight.T
    logits = norm(x, model.norm.weight) @ model.embed.weight[:c.vocab_size].T
    torch.testing.assert_close(model(idx).logits, logits, rtol=1e-5, atol=1e-5)  # RoPE tables are float32


@arms
@docs
def test_enough_keys_and_open_gates_is_dense(arm, docs):
    """k ≥ T and gates at 1 leave plain attention, in every arm."""
    dense, model = build("dense"), build(arm, k_base=400, k_min=200, k_max=400)
    model.load_state_dict(dense.state_dict(), strict=False)
    for block in model.blocks:
        for gate in (block.attn.value_gate, block.attn.output_gate):
            if gate:
                torch.nn.init.zeros_(gate.proj.weight)
                torch.nn.init.constant_(gate.proj.bias, 50.0)
    idx, doc = tokens(2, 50), doc_ids(2, 50) if docs else None
    torch.testing.assert_close(model(idx, doc=doc).logits, dense(idx, doc=doc).logits, rtol=1e-9, atol=1e-9)


@arms
def test_values_pass_their_gate_before_attention_and_outputs_after(arm):
    """Eqs. 9 and 10: closing a gate silences the layer; the gates are sigmoids with the configured bias at the start."""
    fresh = build(arm, trained=False)
    stats = fresh(tokens(2, 30)).stats
    for name in ("value_gate", "output_gate"):
        if not getattr(fresh.config, name):
            assert name not in stats
            continue
        assert (stats[name] - 1 / (1 + math.exp(-0.5))).abs().max() < 0.01
        model = build(arm)
        torch.nn.init.zeros_(getattr(model.blocks[0].attn, name).proj.weight)
        torch.nn.init.constant_(getattr(model.blocks[0].attn, name).proj.bias, -800.0)
        h = torch.randn(2, 30, 32, dtype=torch.float64)
        assert model.blocks[0].attn(h, kernels.Visible.causal(30))[0].abs().max() == 0


@arms
@docs
@pytest.mark.parametrize("training", [False, True])
def test_no_future_leak(arm, docs, training):
    """Changing tokens from position t on changes no logit before t, nor any budget, in training mode either."""
    model = build(arm).train(training)
    idx, doc = tokens(3, 90), doc_ids(3, 90) if docs else None
    for t in (1, 37, 64, 89):
        edited, later = idx.clone(), doc.clone() if docs else None
        edited[:, t:] = tokens(3, 90 - t)
        if docs:
            later[:, t:] += doc_ids(3, 90 - t)
        chosen = []
        select = kernels.select
        kernels.select = lambda *a: chosen.append(select(*a)) or chosen[-1]
        try:
            a, b = (model(i, doc=d, stats=False).logits for i, d in ((idx, doc), (edited, later)))
        finally:
            kernels.select = select
        torch.testing.assert_close(a[:, :t], b[:, :t], rtol=1e-12, atol=1e-12)
        assert not torch.equal(a[:, t:], b[:, t:])
        for x, y in zip(chosen[:2], chosen[2:]):
            assert torch.equal(x.budget[:, :t], y.budget[:, :t]) and torch.equal(x.mask()[:, :t], y.mask()[:, :t])


@arms
@docs
def test_row_alone_equals_row_in_batch(arm, docs):
    model = build(arm).train()
    idx, doc = tokens(4, 70), doc_ids(4, 70) if docs else None
    together = model(idx, doc=doc).logits
    for b in range(4):
        alone = model(idx[b:b + 1], doc=doc[b:b + 1] if docs else None).logits
        torch.testing.assert_close(alone[0], together[b], rtol=1e-11, atol=1e-11)


@arms
def test_documents_do_not_see_each_other(arm):
    """A document in a packed window reads exactly like the document alone at position 0, RoPE being relative."""
    model = build(arm)
    a, b = tokens(1, 33), tokens(1, 44)
    packed = model(torch.cat((a, b), 1), doc=torch.tensor([[0] * 33 + [1] * 44])).logits
    torch.testing.assert_close(packed[:, :33], model(a).logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(packed[:, 33:], model(b).logits, rtol=1e-5, atol=1e-5)  # RoPE tables are float32


@arms
def test_an_id_that_comes_back_is_another_document(arm):
    """Ids 0 0 1 1 0 0: the last two tokens do not see the first two, in one pass or cached."""
    model = build(arm)
    idx = tokens(1, 6)
    doc = torch.tensor([[0, 0, 1, 1, 0, 0]])
    logits = model(idx, doc=doc).logits
    assert torch.equal(logits, model(idx, doc=torch.tensor([[0, 0, 1, 1, 2, 2]])).logits)
    other = (idx + torch.tensor([[1, 1, 0, 0, 0, 0]])) % SMALL["vocab_size"]
    changed = (model(other, doc=doc).logits != logits).any(-1)  # (1, 6)
    assert changed.tolist() == [[True, True, False, False, False, False]]
    cache = model.new_cache(1, 6)
    for t in range(6):
        step = model(idx[:, t:t + 1], doc=doc[:, t:t + 1], cache=cache).logits
        torch.testing.assert_close(step, logits[:, t:t + 1], rtol=1e-10, atol=1e-10)


def test_rope_tables_are_exact_to_float32_at_position_131071():
    cos, sin = model_module.rope_tables(131072, 64, 10000.0)
    assert cos.shape == sin.shape == (131072, 1, 32)
    assert cos.dtype == sin.dtype == torch.float32
    speed = torch.tensor([10000.0 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    angle = torch.arange(131072, dtype=torch.float64)[:, None] * speed  # (131072, 32)
    assert torch.equal(cos[:, 0], angle.cos().float()), "cos"
    assert torch.equal(sin[:, 0], angle.sin().float()), "sin"
    for i in range(32):
        exact = 131071 * 10000.0 ** (-2 * i / 64)
        assert abs(cos[-1, 0, i].item() - math.cos(exact)) < 2 ** -24
        assert abs(sin[-1, 0, i].item() - math.sin(exact)) < 2 ** -24


@arms
@docs
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_cached_decoding_equals_full_forward(arm, docs, dtype, tolerance):
    """Prompts of different lengths in one cache, then 100 tokens one at a time (and a chunk): the logits of one full pass."""
    model = build(arm, dtype, trained=dtype == torch.float64)
    idx, doc = tokens(3, 140), doc_ids(3, 140) if docs else None
    full = model(idx, doc=doc).logits
    cache = KVCache(model.config, 3, 150, dtype=dtype)
    first = model(idx[:, :33], doc=doc[:, :33] if docs else None, cache=cache).logits
    torch.testing.assert_close(first, full[:, :33], rtol=tolerance, atol=tolerance)
    cache.length = length = torch.tensor([33, 7, 20])  # rows 1 and 2 take back what they were not asked for
    rows = torch.arange(3)
    for step in range(100):
        at = (length + step)[:, None] + (torch.arange(6) if step == 99 else torch.zeros(1, dtype=torch.long))  # at last a chunk
        out = model(idx[rows[:, None], at], doc=doc[rows[:, None], at] if docs else None, cache=cache).logits
        torch.testing.assert_close(out, full[rows[:, None], at], rtol=tolerance, atol=tolerance)


@arms
@docs
def test_cached_decoding_equals_full_forward_under_bfloat16_autocast(arm, docs):
    model = build(arm, torch.float32)
    idx, doc = tokens(3, 48), doc_ids(3, 48) if docs else None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        full = model(idx, doc=doc).logits.float()
        cache = model.new_cache(3, 48)
        pieces = []
        for t in [slice(0, 33)] + [slice(t, t + 1) for t in range(33, 48)]:
            out = model(idx[:, t], doc=doc[:, t] if docs else None, cache=cache)
            pieces.append(out.logits.float())
        new = model.generate(idx[:, :20], 30, temperature=0)
        scores = model(new).logits[:, 19:-1].float()  # (3, 30, V)
    cached = torch.cat(pieces, 1)
    assert (cached - full).norm() < 0.02 * full.norm()
    chosen = scores.gather(-1, new[:, 20:, None])[..., 0]  # (3, 30)
    assert (scores.amax(-1) - chosen).max() < 0.02 * scores.abs().max()


def test_cache_has_the_dtypes_that_the_layers_produce():
    model = build("gsa", torch.float32)

    def dtypes():
        cache = model.new_cache(1, 4)
        return cache.k[0].dtype, cache.v[1].dtype, cache.k_index[1].dtype
    assert dtypes() == (torch.float32,) * 3
    with torch.autocast("cpu", torch.bfloat16):
        assert dtypes() == (torch.bfloat16, torch.bfloat16, torch.float32)
        model.double()  # autocast leaves float64 alone
        assert dtypes() == (torch.float64,) * 3
        assert model.generate(tokens(1, 5), 3).shape == (1, 8)
    model.bfloat16()
    assert dtypes() == (torch.bfloat16,) * 3
    assert KVCache(model.config, 1, 4, dtype=torch.float16).k_index[0].dtype == torch.float16
    assert build("dense").new_cache(1, 4).k_index == [None, None]


def test_a_cached_token_costs_one_host_sync_in_trunk():
    model = build("dense")
    cache = model.new_cache(2, 10)
    with HostSyncs() as syncs:
        model.trunk(tokens(2, 1), cache=cache)
    assert syncs.count == 1
    model.trunk(tokens(2, 9), cache=cache)
    with pytest.raises(ValueError, match="11 tokens do not fit in the cache"):
        model.trunk(tokens(2, 1), cache=cache)


@arms
def test_generate_is_argmax_of_the_full_forward(arm):
    model = build(arm)
    out = model.generate(tokens(2, 20), 30, temperature=0)
    assert out.shape == (2, 50)
    assert torch.equal(model(out).logits[:, 19:-1].argmax(-1), out[:, 20:])


@arms
def test_generate_several_ragged_prompts(arm):
    """A list of prompts of different lengths gives what each gives alone, each up to its separator or the context's end."""
    model = build(arm, block_size=60)
    prompts = [tokens(1, n)[0] for n in (5, 31, 12, 58, 60)]
    alone = [model.generate([p], 40, temperature=0)[0] for p in prompts]
    separator = int(alone[0][12])  # some token that the first one writes
    together = model.generate(prompts, 40, temperature=0, separator=separator)
    for p, a, t in zip(prompts, alone, together):
        if separator in p.tolist():
            a = model.generate([p], 40, temperature=0, separator=separator)[0]
        new = a[len(p):].tolist()
        new = new[:new.index(separator) + 1] if separator in new else new
        assert t.tolist() == p.tolist() + new
        assert len(t) <= 61
    tensor = model.generate(torch.stack([prompts[0], prompts[0]]), 40, temperature=0, separator=separator)
    assert (tensor[0, len(together[0]):] == separator).all()


def test_sampling():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(20000, 4)
    share = lambda **how: sample(logits, **how).bincount(minlength=4) / 20000
    assert sample(logits, 0).unique().tolist() == [0]
    torch.testing.assert_close(share(), logits[0].exp(), atol=0.02, rtol=0)
    torch.testing.assert_close(share(top_k=2), torch.tensor([5 / 8, 3 / 8, 0, 0]), atol=0.02, rtol=0)
    torch.testing.assert_close(share(top_p=0.7), torch.tensor([5 / 8, 3 / 8, 0, 0]), atol=0.02, rtol=0)
    torch.testing.assert_close(share(temperature=0.5), torch.tensor([0.25, 0.09, 0.0225, 0.0025]) / 0.365, atol=0.02, rtol=0)
    assert share(top_p=1e-9).tolist() == [1, 0, 0, 0]
    for how in (dict(temperature=-1.0), dict(temperature=math.nan), dict(top_k=-1),
                dict(top_p=0.0), dict(top_p=1.5), dict(top_p=math.nan)):
        with pytest.raises(ValueError):
            sample(logits, **how)


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-38, 1e-46, 1e-320])
def test_sampling_at_a_tiny_temperature_is_argmax(temperature):
    logits = 100 * torch.randn(50, 20)
    for how in (dict(), dict(top_k=3), dict(top_p=0.5)):
        assert torch.equal(sample(logits, temperature, **how), logits.argmax(-1))


def test_generating_no_tokens_gives_the_prompt():
    model = build("gsa")
    idx = tokens(2, 5)
    assert torch.equal(model.generate(idx, 0), idx)
    for row, prompt in zip(model.generate(list(idx), 0), idx):
        assert torch.equal(row, prompt)
    assert list(model.stream(list(idx), 0)) == []


@arms
def test_every_parameter_has_a_gradient_at_step_one_and_one_group(arm):
    model = build(arm, trained=False).train()
    out = model(tokens(2, 60), tokens(2, 60))
    (out.loss + (out.index_loss if model.config.sparse else 0)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    grouped = [p for g in model.param_groups() for p in g["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()} and len(grouped) == len({id(p) for p in grouped})


@pytest.mark.parametrize("arm", ["sparse", "gsa"])
@pytest.mark.parametrize("warmup", [False, True])
def test_indexer_gradients_are_isolated_both_ways(arm, warmup):
    model = build(arm).train()
    out = model(tokens(2, 60), tokens(2, 60), warmup=warmup)
    index = {n: p for n, p in model.named_parameters() if ".indexer." in n}
    rest = {n: p for n, p in model.named_parameters() if ".indexer." not in n}
    of_loss = torch.autograd.grad(out.loss, list(index.values()), allow_unused=True, retain_graph=True)
    of_index = torch.autograd.grad(out.index_loss, list(rest.values()), allow_unused=True, retain_graph=True)
    assert all(g is None for g in of_loss) and all(g is None for g in of_index)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(out.index_loss, list(index.values())))


def test_indexer_learns_to_predict_attention():
    """A few hundred steps on the index loss alone: recall comes close to the oracle's."""
    model = build("gsa", torch.float32).train()
    idx = tokens(4, 80)
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if ".indexer." in n], 1e-2)
    before = model(idx, idx, warmup=True)
    for _ in range(150):
        optimizer.zero_grad()
        model(idx, idx, warmup=True, stats=False).index_loss.backward()
        optimizer.step()
    after = model(idx, idx, warmup=True)
    assert after.index_loss < 0.5 * before.index_loss
    gap = lambda out: (out.stats["recall_best"] - out.stats["recall"]).mean()
    assert gap(after) < 0.5 * gap(before)


def test_var_avg_is_a_running_mean_of_training_only():
    model = build("gsa", trained=False).train()
    indexers = [b.attn.indexer for b in model.blocks]
    values = []
    for step in range(3):
        model(tokens(2, 50), stats=False)
        model(tokens(2, 50), stats=False)
        values.append([(i.var_seen[0] / i.var_seen[1]).item() for i in indexers])
        assert all(i.var_seen[1] == 2 for i in indexers)
        model.update_var_avg()
    for layer, indexer in enumerate(indexers):
        want = values[0][layer]
        for v in values[1:]:
            want = 0.99 * want + 0.01 * v[layer]
        assert indexer.var_avg.item() == pytest.approx(want, rel=1e-5)
    assert "blocks.0.attn.indexer.var_avg" in model.state_dict()
    model.eval()(tokens(2, 50))
    model.update_var_avg()
    assert indexers[1].var_avg.item() == pytest.approx(want, rel=1e-5)


def test_update_of_the_running_average_never_waits_for_the_device():
    """V̄ by hand; a layer without observations keeps its own. Python reads no value."""
    model = build("gsa", torch.float32, trained=False, n_layer=5)
    indexers = [b.attn.indexer for b in model.blocks]
    averages = [0.0, 0.3, 0.3, 0.0, 1e-7]
    sums = [[0.7, 3.0], [0.7, 3.0], [0.0, 0.0], [0.0, 0.0], [0.1, 1.0]]
    want = []
    for indexer, avg, seen in zip(indexers, averages, sums):
        indexer.var_avg.fill_(avg)
        indexer.var_seen.copy_(torch.tensor(seen))
        old, (total, count) = indexer.var_avg.clone(), indexer.var_seen.clone()
        if count > 0:
            first = old if old > 0 else total / count
            old = 0.99 * first + (1 - 0.99) * total / count
        want.append(old)
    with HostSyncs() as syncs:
        model.update_var_avg()
    assert syncs.count == 0
    for layer, indexer in enumerate(indexers):
        assert torch.equal(indexer.var_avg, want[layer]), layer
        assert indexer.var_seen.tolist() == [0, 0]
    with HostSyncs() as syncs:
        bool(indexers[0].var_avg > 0)
    assert syncs.count == 1, "the counter counts"


def test_budget_follows_confidence():
    """'inverse': high variance, fewer keys; 'eq8' the other way; both within [k_min, k_max]; nothing averaged yet = k_base."""
    var, n = torch.tensor([0.0, 0.1, 0.2, 0.8, 1e9]), torch.full((5,), 1000)
    k = lambda rule, avg=0.2: kernels.budgets(var, n, kernels.Budget(rule, 100, 60, 140, var_avg=torch.tensor(avg))).tolist()
    assert k("inverse") == [140, 117, 100, 70, 60]
    assert k("eq8") == [60, 60, 100, 140, 140]
    assert k("fixed") == [100] * 5
    assert k("inverse", 0.0) == [100] * 5


def test_flops_and_kv_bytes():
    """
    Four tokens, k_base 2: queries see 1 2 3 4 keys (mean 2.5), attend to 1 2 2 2 (mean 1.75).
    C = 32, Hi·di = 16, two layers:
    attention of a layer  4·1.75·32 = 224, dense 4·2.5·32 = 320
    indexer of a layer    forward 2·2.5·16 = 80, backward 2·2·1.75·16 = 112, in warm-up 2·80 = 160
    """
    model = build("gsa", trained=False, k_base=2)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert model.flops_per_token(4, training=False) == 2 * matrices + 2 * (224 + 80)
    assert model.flops_per_token(4) == 6 * matrices + 2 * (3 * 224 + 80 + 112)
    assert model.flops_per_token(4, training=False, warmup=True) == 2 * matrices + 2 * (320 + 80)
    assert model.flops_per_token(4, warmup=True) == 6 * matrices + 2 * (3 * 320 + 80 + 160)
    dense = build("dense", trained=False)
    matrices = sum(p.numel() for p in dense.parameters() if p.dim() > 1)
    assert dense.flops_per_token(4, training=False) == 2 * matrices + 2 * 320
    assert dense.flops_per_token(4) == 6 * matrices + 2 * 3 * 320
    c = model.config
    cache = KVCache(c, 1, 160, dtype=torch.bfloat16)
    assert model.kv_bytes() == sum(x.numel() * x.element_size() for xs in (cache.k, cache.v, cache.k_index) for x in xs)


@arms
@pytest.mark.parametrize("warmup", [False, True])
def test_flops_are_those_of_a_loop_over_positions(arm, warmup):
    """Every pair of query and key counted one by one; default context = block_size."""
    model = build(arm, trained=False)
    c = model.config
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    score = 2 * c.n_index_head * c.d_index if c.sparse else 0
    for T in (1, 11, 12, 13, 100, None):
        forward = backward = 0
        for t in range(1, (T or c.block_size) + 1):  # query t sees t keys
            attended = min(c.k_base, t) if c.sparse and not warmup else t
            attention = 4 * attended * c.n_head * c.d_head
            forward += 2 * matrices + c.n_layer * (attention + score * t)
            backward += 4 * matrices + c.n_layer * (2 * attention + 2 * score * attended)
        total = dict(forward=forward, training=forward + backward)
        for name, flops in total.items():
            ours = model.flops_per_token(T, training=name == "training", warmup=warmup)
            assert ours == pytest.approx(flops / (T or c.block_size), rel=1e-12), (name, T)


@pytest.mark.parametrize("dims", [dict(n_head=3), dict(n_kv_head=3), dict(k_min=20), dict(n_head=32), dict(d_index=7), dict(n_layer=0),
                                  dict(k_rule="most"), dict(index_activation="tanh"), dict(n_sink=3, n_local=2), dict(block_size=-1)])
def test_impossible_configs_raise(dims):
    with pytest.raises(ValueError):
        GSAConfig.arm("gsa", **SMALL | dims)


@pytest.mark.parametrize("name", [f.name for f in fields(GSAConfig) if f.type in (int, float)])
def test_every_number_of_the_config_has_a_legal_range(name):
    whole = GSAConfig.__dataclass_fields__[name].type is int
    bad = [math.nan, math.inf, -math.inf, True, "8", None]
    if whole:
        bad += [-1, 8.0]
        if name not in ("n_sink", "n_local"):
            bad.append(0)
    if name == "rope_base":
        bad += [0, 0.0, -1.0]
    for value in bad:
        with pytest.raises(ValueError, match=name) as error:
            GSAConfig.arm("gsa", **SMALL | {name: value})
        assert "\n" not in str(error.value)


def test_numbers_at_the_edge_of_their_range_are_legal():
    tiny = dict(vocab_size=1, block_size=1, n_layer=1, n_head=1, n_kv_head=1, n_embd=2,
                n_index_head=1, d_index=2, k_base=1, k_min=1, k_max=1, n_sink=0, n_local=0)
    model = GSA(GSAConfig.arm("gsa", **tiny, rope_base=1, gate_bias_init=-3))
    assert model(torch.zeros(1, 1, dtype=torch.long)).logits.shape == (1, 1, 1)


@arms
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (5,), (1, 2, 3), ()])
def test_tokens_must_be_two_dimensional_and_not_empty(arm, shape):
    model = build(arm)
    idx = torch.zeros(shape, dtype=torch.long)
    for call in (model, model.trunk, lambda idx: model(idx, cache=model.new_cache(2, 8))):
        with pytest.raises(ValueError, match="idx has shape") as error:
            call(idx)
        assert "\n" not in str(error.value)


def test_impossible_calls_raise():
    model = build("gsa")
    for call in (lambda: GSAConfig.arm("sparser"), lambda: GSA(model.config, "cuda"), lambda: model(tokens(1, 161)),
                 lambda: model.generate([tokens(1, 161)[0]], 1),
                 lambda: model.generate([tokens(1, 0)[0]], 1),
                 lambda: model.generate(tokens(1, 5), -1),
                 lambda: next(model.stream([tokens(1, 5)[0]], -1))):
        with pytest.raises(ValueError):
            call()


def test_arms_differ_by_switches_only():
    names = {arm: asdict(GSAConfig.arm(arm)) for arm in ARMS}
    assert names["dense"]["sparse"] is False and names["gated"]["value_gate"] is True
    assert GSAConfig.arm("gsa", k_rule="eq8").k_rule == "eq8"
    assert {k for k in names["dense"] if len({str(n[k]) for n in names.values()}) > 1} == {
        "sparse", "value_gate", "output_gate", "index_activation", "k_rule"}
