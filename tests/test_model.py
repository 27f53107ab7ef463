"""
The model: its four arms, causality, batch invariance, cached decoding, gradients, accounting.

Where two results must be equal the model computes in float64: in float32 rounding may swap two
keys of nearly equal score, and another selection is another result.
"""
import functools
import math
from dataclasses import asdict, fields

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import attention
import measure
from attention import document_starts
from layers import RoPE
from measure import flops_per_token
from model import ARMS, GSA, GSAConfig, KVCache
from optim import param_groups
from sample import draw_token, generate, stream

pytestmark = pytest.mark.usefixtures("small_tiles")
SMALL = dict(
    vocab_size=37,
    block_size=160,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=32,
    n_index_head=2,
    d_index=8,
    k_base=12,
    k_min=4,
    k_max=16,
)
greedy = functools.partial(draw_token, temperature=0)
arms = pytest.mark.parametrize("arm", list(ARMS))
docs = pytest.mark.parametrize("docs", [False, True])


# -----------------------------------------------------------------------------
# Helpers

def build(arm, dtype=torch.float64, backend="torch", trained=True, **dims):
    """A small model in eval mode. trained: weights and V̄ are as uneven as after training."""
    model = GSA(GSAConfig.arm(arm, **SMALL | dims), backend).to(dtype)
    if trained:
        with torch.no_grad():
            for p in model.parameters():
                size = 0.3 if p.dim() > 1 else 0.1
                p.add_(torch.randn_like(p) * size)
            for indexer in indexers_of(model):
                indexer.var_avg.fill_(0.05)
    return model.eval()


def indexers_of(model):
    """The indexer of every layer; none in an arm without."""
    return [block.attn.indexer for block in model.blocks if block.attn.indexer]


def tokens(B, T):
    return torch.randint(0, SMALL["vocab_size"], (B, T))


def begins(B, T):
    """Where a document begins, (B, T) bool; a document is 25 tokens long on average."""
    return torch.rand(B, T) < 0.04


def tokens_and_docs(B, T, docs):
    """Tokens and the start of each one's document, None where docs is False."""
    idx = tokens(B, T)
    doc_start = document_starts(begins(B, T), True) if docs else None
    return idx, doc_start


def part(doc_start, rows, positions):
    """doc_start[rows, positions]; None where there are no documents."""
    return None if doc_start is None else doc_start[rows, positions]


def total_loss(model, out):
    """What training minimises."""
    return out.loss + out.index_loss if model.config.sparse else out.loss


def set_gate(gate, bias):
    """Make the gate σ(bias) whatever its input."""
    torch.nn.init.zeros_(gate.proj.weight)
    torch.nn.init.constant_(gate.proj.bias, bias)


def matrix_parameters(model):
    """The number of weights in matrices."""
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


class HostSyncs(TorchDispatchMode):
    """Counts how often Python reads a tensor's value; on a GPU each read waits for the device."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **kwargs or {})


def assert_close(name, actual, expected, tolerance):
    """Compare two tensors; if they differ, the message begins with the name."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance,
                               msg=lambda text: f"{name}: {text}")


def assert_equal(name, actual, expected):
    assert_close(name, actual, expected, 0)


# -----------------------------------------------------------------------------
# The arms

@arms
@docs
@pytest.mark.parametrize("T", [1, 15, 61])
def test_the_pytorch_path_equals_the_eager_model(arm, docs, T):
    """Logits, loss and the gradient of every parameter, in warm-up and after it."""
    ours = build(arm)
    eager = build(arm, backend="eager")
    eager.load_state_dict(ours.state_dict())
    idx, doc_start = tokens_and_docs(2, T, docs)
    targets = idx.flip(1)
    names = ["logits", "loss"] + ["gradient of " + name for name, _ in ours.named_parameters()]
    for warmup in (False, True):
        results = []
        for model in (ours, eager):
            out = model(idx, targets, doc_start, warmup=warmup)
            loss = total_loss(model, out)
            grads = torch.autograd.grad(loss, model.parameters())
            results.append([out.logits, loss, *grads])
        for name, a, b in zip(names, *results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10,
                                       msg=lambda text: f"{name}, warm-up {warmup}: {text}")


def test_all_switches_off_is_plain_attention():
    """The dense arm against a Llama-style decoder written out here with torch's own attention."""
    model = build("dense")
    B, T = 2, 40
    idx = tokens(B, T)
    config = GSAConfig.arm("dense", **SMALL)
    d = config.d_head
    speed = config.rope_base ** (-torch.arange(0, d, 2) / d)  # (d/2,)
    angle = torch.outer(torch.arange(float(T)), speed).double()  # (T, d/2)
    turn = torch.polar(torch.ones_like(angle), angle)  # (T, d/2), complex numbers of length 1

    def norm(x, weight):
        """RMSNorm."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    def project(h, linear):
        """(B, T, C) -> (B, heads, T, d)"""
        x = h @ linear.weight.T  # (B, T, heads·d)
        return x.view(B, T, -1, d).transpose(1, 2)

    def rotate(x):
        """RoPE on x (B, heads, T, d): the numbers i and i + d/2 are one complex number."""
        z = torch.complex(x[..., :d // 2], x[..., d // 2:]) * turn  # (B, heads, T, d/2)
        return torch.cat((z.real, z.imag), -1)

    x = model.embed.weight[idx]  # (B, T, C)
    for block in model.blocks:
        h = norm(x, block.norm1.weight)
        q = rotate(project(h, block.attn.wq))  # (B, H, T, d)
        k = rotate(project(h, block.attn.wk))  # (B, G, T, d)
        v = project(h, block.attn.wv)  # (B, G, T, d)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + o.transpose(1, 2).reshape(B, T, -1) @ block.attn.wo.weight.T
        h = norm(x, block.norm2.weight)
        gate, up = (h @ block.mlp.gate_up.weight.T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ block.mlp.down.weight.T
    logits = norm(x, model.norm.weight) @ model.embed.weight[:config.vocab_size].T
    assert_close("logits", model(idx).logits, logits, 1e-5)  # RoPE tables are float32


@arms
@docs
def test_enough_keys_and_open_gates_are_dense_attention(arm, docs):
    """With k_t ≥ T and gates at 1 every arm computes plain attention."""
    dense = build("dense")
    model = build(arm, k_base=400, k_min=200, k_max=400)
    model.load_state_dict(dense.state_dict(), strict=False)
    for block in model.blocks:
        for gate in (block.attn.value_gate, block.attn.output_gate):
            if gate:
                set_gate(gate, 50.0)
    idx, doc_start = tokens_and_docs(2, 50, docs)
    assert_close("logits", model(idx, doc_start=doc_start).logits,
                 dense(idx, doc_start=doc_start).logits, 1e-9)


@arms
@pytest.mark.parametrize("name", ["value_gate", "output_gate"])
def test_a_gate_starts_at_its_bias_and_closed_it_silences_the_layer(arm, name):
    """Eqs. 9 and 10. gate_bias_init is 0.5, so a new gate is σ(0.5)."""
    fresh = build(arm, trained=False)
    stats = fresh(tokens(2, 30), stats=True).stats
    if not getattr(fresh.config, name):
        assert name not in stats
        return
    assert (stats[name] - 1 / (1 + math.exp(-0.5))).abs().max() < 0.01
    layer = build(arm).blocks[0].attn
    set_gate(getattr(layer, name), -800.0)
    h = torch.randn(2, 30, 32, dtype=torch.float64)  # (B, T, C)
    output = layer(h, attention.Visible.causal(30))[0]  # (B, T, C)
    assert output.abs().max() == 0


@pytest.mark.parametrize("n_head, n_kv_head, d_head", [(1, 1, 8), (4, 2, 32), (6, 3, 20)])
def test_a_head_of_the_first_layer_begins_by_looking_back(n_head, n_kv_head, d_head):
    """With equal tokens, which only the biases tell apart, head h prefers the key h + 1 back."""
    model = build("dense", trained=False, n_head=n_head, n_kv_head=n_kv_head, d_head=d_head,
                  qkv_bias=True, look_back=4.0)
    first, second = (block.attn for block in model.blocks)
    for projection in (first.wq, first.wk):
        torch.nn.init.zeros_(projection.weight)
    pos = torch.arange(40)[None]  # (1, T)
    h = torch.randn(1, 40, 32, dtype=torch.float64)  # (B, T, C)
    q, k = first.queries_and_keys(h, pos)  # (1, T, H, d), (1, T, G, d)
    k = k.repeat_interleave(n_head // n_kv_head, 2)  # (1, T, H, d)
    s = torch.einsum("bthd,bshd->bhts", q, k).tril()  # (1, H, T, S)
    for head in range(n_head):
        back = head + 1
        found = s[0, head, back:].argmax(-1)  # (T - back,)
        assert torch.equal(found, torch.arange(40 - back)), f"head {head}"
    assert second.wq.bias.abs().max() == 0


@arms
def test_with_identity_init_a_new_model_is_its_embedding(arm):
    model = build(arm, trained=False, identity_init=True)
    idx = tokens(2, 30)
    expected = model.head(model.norm(model.embed(idx)))
    assert_close("logits", model(idx).logits, expected, 0)


def test_without_temperature_the_indexer_is_trained_with_a_tau_of_one():
    model = build("gsa", index_temperature=False)
    assert not any("log_tau" in name for name, _ in model.named_parameters())
    with_tau = build("gsa")
    with torch.no_grad():
        for indexer in indexers_of(with_tau):
            indexer.log_tau.zero_()
    with_tau.load_state_dict(model.state_dict(), strict=False)
    idx = tokens(2, 30)
    assert_close("index loss", model(idx, idx).index_loss, with_tau(idx, idx).index_loss, 1e-12)
    model(idx, idx).index_loss.backward()
    assert all(indexer.wq.weight.grad.abs().max() > 0 for indexer in indexers_of(model))


def test_arms_differ_by_switches_only():
    configs = {arm: asdict(GSAConfig.arm(arm)) for arm in ARMS}
    assert configs["dense"]["sparse"] is False
    assert configs["gated"]["value_gate"] is True
    assert GSAConfig.arm("gsa", k_rule="eq8").k_rule == "eq8"
    different = set()
    for name in configs["dense"]:
        values = {str(config[name]) for config in configs.values()}
        if len(values) > 1:
            different.add(name)
    assert different == {"sparse", "value_gate", "output_gate", "index_activation", "k_rule"}


# -----------------------------------------------------------------------------
# What a position sees

def logits_and_selections(model, idx, doc_start, monkeypatch):
    """The logits of one pass and the Selection of each of its layers with an indexer."""
    selections = []
    select = attention.select

    def select_and_record(*args, **options):
        selections.append(select(*args, **options))
        return selections[-1]

    with monkeypatch.context() as patch:
        patch.setattr(attention, "select", select_and_record)
        logits = model(idx, doc_start=doc_start, stats=False).logits
    return logits, selections


@arms
@docs
@pytest.mark.parametrize("training", [False, True])
def test_an_edit_changes_nothing_before_it(arm, docs, training, monkeypatch):
    """New tokens from position t on: all earlier logits, budgets and selected keys stay."""
    model = build(arm).train(training)
    idx = tokens(3, 90)
    begin = begins(3, 90)
    for t in (1, 37, 64, 89):
        edited_idx = idx.clone()
        edited_idx[:, t:] = tokens(3, 90 - t)
        edited_begin = begin.clone()
        edited_begin[:, t:] = begins(3, 90 - t)
        start = edited_start = None
        if docs:
            start = document_starts(begin, True)
            edited_start = document_starts(edited_begin, True)
        before, chosen_before = logits_and_selections(model, idx, start, monkeypatch)
        after, chosen_after = logits_and_selections(model, edited_idx, edited_start, monkeypatch)
        assert_close(f"logits before {t}", after[:, :t], before[:, :t], 1e-12)
        assert not torch.equal(after[:, t:], before[:, t:]), "the edit changed nothing at all"
        layers = len(indexers_of(model))
        assert len(chosen_before) == len(chosen_after) == layers
        for layer, (a, b) in enumerate(zip(chosen_after, chosen_before)):
            where = f"of layer {layer} before {t}"
            assert_equal("k_t " + where, a.k_t[:, :t], b.k_t[:, :t])
            assert_equal("selected keys " + where, a.mask()[:, :t], b.mask()[:, :t])


@arms
@docs
def test_a_row_alone_equals_the_row_in_a_batch(arm, docs):
    model = build(arm).train()
    idx, doc_start = tokens_and_docs(4, 70, docs)
    together = model(idx, doc_start=doc_start).logits
    for b in range(4):
        row = slice(b, b + 1)
        alone = model(idx[row], doc_start=part(doc_start, row, slice(None))).logits
        assert_close(f"logits of row {b}", alone[0], together[b], 1e-11)


@arms
def test_documents_do_not_see_each_other(arm):
    """A document behind another reads like the document alone at position 0: RoPE is relative."""
    model = build(arm)
    first = tokens(1, 33)
    second = tokens(1, 44)
    doc_start = torch.tensor([[0] * 33 + [33] * 44])
    packed = model(torch.cat((first, second), 1), doc_start=doc_start).logits
    assert_close("logits of the first", packed[:, :33], model(first).logits, 1e-9)
    # The second is at other positions, whose RoPE tables are rounded to float32.
    assert_close("logits of the second", packed[:, 33:], model(second).logits, 1e-5)


@arms
def test_a_document_behind_a_separator_sees_nothing_before_it(arm):
    """Tokens a b | c | d with the separator |, in one pass or cached: d sees | and d only."""
    model = build(arm)
    idx = torch.tensor([[1, 2, 0, 3, 0, 4]])
    start = document_starts(idx, 0)
    assert start.tolist() == [[0, 0, 2, 2, 4, 4]]
    logits = model(idx, doc_start=start).logits
    other = torch.tensor([[5, 6, 0, 3, 0, 4]])
    changed = (model(other, doc_start=start).logits != logits).any(-1)  # (1, 6)
    assert changed.tolist() == [[True, True, False, False, False, False]]
    cache = KVCache(1, 6)
    for t in range(6):
        now = slice(t, t + 1)
        step = model(idx[:, now], doc_start=start[:, now], cache=cache).logits
        assert_close(f"cached logits at {t}", step, logits[:, now], 1e-10)


@pytest.mark.parametrize("arm", ["sparse", "gsa"])
@docs
def test_a_short_context_selects_every_key_without_scores(arm, docs, monkeypatch):
    """
    Queries that see at most k_min = 20 keys: the logits are those of a selection, without one.
    With documents of at most 20 tokens the context may be longer.
    """
    model = build(arm, k_min=20, k_max=24)
    T = 60 if docs else 20
    idx = tokens(2, T)
    doc_start = None
    if docs:
        doc_start = (torch.arange(T) // 20 * 20).expand(2, T)
    selected = model(idx, doc_start=doc_start, stats=True)  # stats always select
    assert (selected.stats["recall"] == 1).all()

    def forbidden(*_):
        raise AssertionError("scores were computed")

    for name in ("select", "score_variance"):
        monkeypatch.setattr(attention, name, forbidden)
    logits = model(idx, doc_start=doc_start).logits
    assert_equal("logits", logits, selected.logits)
    cache = KVCache(2, 30)
    for at in (slice(0, 9), slice(9, 10), slice(10, T)):  # 30 places, of which at most 20 are seen
        start = None if doc_start is None else doc_start[:, at]
        if not docs:
            cached = model(idx[:, at], doc_start=start, cache=cache).logits
            assert_close("cached logits", cached, logits[:, at], 1e-10)
    longer = tokens(2, 21)
    with pytest.raises(AssertionError, match="scores were computed"):
        model(longer)
    with pytest.raises(AssertionError, match="scores were computed"):
        model.train()(idx, doc_start=doc_start)  # V̄ needs the variance


@arms
def test_a_plain_call_measures_nothing_and_its_index_loss_is_a_number(arm, monkeypatch):
    """Statistics cost O(T²): only stats=True computes them."""
    model = build(arm)
    idx = tokens(2, 30)

    def forbidden(*_):
        raise AssertionError("the attention was measured")

    monkeypatch.setattr(measure, "attention_report", forbidden)
    assert model(idx).stats == {}
    assert model(idx).index_loss == 0
    assert (model(idx, idx).index_loss > 0) == model.config.sparse
    with pytest.raises(AssertionError, match="the attention was measured"):
        model(idx, stats=True)


@pytest.mark.parametrize("backend", ["torch", "eager"])
@docs
def test_warm_up_observes_the_variance_that_a_selection_would(backend, docs, monkeypatch):
    """V̄ after a warm-up step is the same whether keys were selected (for statistics) or not."""
    averages = []
    for stats in (True, False):
        model = build("gsa", backend=backend, trained=False).train()
        torch.manual_seed(3)
        idx, doc_start = tokens_and_docs(2, 70, docs)
        model.load_state_dict(build("gsa", backend=backend).state_dict())
        model(idx, idx, doc_start, warmup=True, stats=stats)
        model.update_var_avg()
        averages.append(torch.stack([indexer.var_avg for indexer in indexers_of(model)]))
    assert (averages[0] > 0).all()
    assert_close("V̄", averages[1], averages[0], 1e-12)


def test_rope_tables_are_exact_to_float32_at_position_131071():
    rope = RoPE(131072, 64, 10000.0)
    cos, sin = rope.cos, rope.sin
    assert cos.shape == sin.shape == (131072, 1, 32)
    assert cos.dtype == sin.dtype == torch.float32
    speeds = [10000.0 ** (-2 * i / 64) for i in range(32)]
    speed = torch.tensor(speeds, dtype=torch.float64)  # (32,)
    angle = torch.arange(131072, dtype=torch.float64)[:, None] * speed  # (131072, 32)
    assert torch.equal(cos[:, 0], angle.cos().float()), "cos"
    assert torch.equal(sin[:, 0], angle.sin().float()), "sin"
    for i in range(32):
        exact = 131071 * speeds[i]
        assert abs(cos[-1, 0, i].item() - math.cos(exact)) < 2 ** -24, f"cos of pair {i}"
        assert abs(sin[-1, 0, i].item() - math.sin(exact)) < 2 ** -24, f"sin of pair {i}"


# -----------------------------------------------------------------------------
# The cache

@arms
@docs
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_cached_decoding_equals_one_full_pass(arm, docs, dtype, tolerance):
    """Three prompts of different lengths in one cache, then 99 single tokens, then a chunk of 6."""
    model = build(arm, dtype, trained=dtype == torch.float64)
    idx, doc_start = tokens_and_docs(3, 140, docs)
    full = model(idx, doc_start=doc_start).logits  # (3, 140, V)
    cache = KVCache(3, 150)
    prompt = slice(0, 33)
    everyone = slice(None)
    first = model(idx[:, prompt], doc_start=part(doc_start, everyone, prompt), cache=cache).logits
    assert_close("logits of the prompts", first, full[:, prompt], tolerance)

    # Rows 1 and 2 have shorter prompts: what the cache holds beyond them is overwritten.
    length = torch.tensor([33, 7, 20])
    cache.length = length
    rows = torch.arange(3)[:, None]  # (3, 1)
    for step in range(100):
        n = 6 if step == 99 else 1
        at = (length + step)[:, None] + torch.arange(n)  # (3, n)
        out = model(idx[rows, at], doc_start=part(doc_start, rows, at), cache=cache).logits
        assert_close(f"logits of step {step}", out, full[rows, at], tolerance)


@arms
@docs
def test_cached_decoding_equals_one_full_pass_under_bfloat16_autocast(arm, docs):
    model = build(arm, torch.float32)
    idx, doc_start = tokens_and_docs(3, 48, docs)
    pieces = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        full = model(idx, doc_start=doc_start).logits.float()
        cache = KVCache(3, 48)
        prompt = slice(0, 33)
        single_tokens = [slice(t, t + 1) for t in range(33, 48)]
        for at in [prompt] + single_tokens:
            out = model(idx[:, at], doc_start=part(doc_start, slice(None), at), cache=cache)
            pieces.append(out.logits.float())
        new = torch.stack(generate(model, idx[:, :20], 30, greedy))  # (3, 50)
        scores = model(new).logits[:, 19:-1].float()  # (3, 30, V)
    cached = torch.cat(pieces, 1)
    assert (cached - full).norm() < 0.02 * full.norm(), "cached logits"
    chosen = scores.gather(-1, new[:, 20:, None])[..., 0]  # (3, 30)
    assert (scores.amax(-1) - chosen).max() < 0.02 * scores.abs().max(), "generated tokens"


def test_the_cache_has_the_dtypes_that_the_layers_produce():
    model = build("gsa", torch.float32)

    def dtypes():
        """Of k, v and the indexer's k."""
        cache = KVCache(1, 6)
        assert model(tokens(1, 5), cache=cache).logits.shape == (1, 5, SMALL["vocab_size"])
        return tuple(cache.buffers[1, name].dtype for name in ("k", "v", "k_index"))

    assert dtypes() == (torch.float32,) * 3
    with torch.autocast("cpu", torch.bfloat16):
        assert dtypes() == (torch.bfloat16, torch.bfloat16, torch.float32)
        model.double()  # autocast leaves float64 alone
        assert dtypes() == (torch.float64,) * 3
        assert len(generate(model, tokens(1, 5), 3)[0]) == 8
    model.bfloat16()
    assert dtypes() == (torch.bfloat16,) * 3
    dense = KVCache(1, 6)
    build("dense")(tokens(1, 5), cache=dense)
    assert {name for _, name in dense.buffers} == {"k", "v"}


def test_a_cached_token_costs_one_host_sync_in_trunk():
    model = build("dense")
    cache = KVCache(2, 10)
    with HostSyncs() as syncs:
        model.trunk(tokens(2, 1), cache=cache)
    assert syncs.count == 1
    model.trunk(tokens(2, 9), cache=cache)
    with pytest.raises(ValueError, match="11 tokens do not fit in the cache"):
        model.trunk(tokens(2, 1), cache=cache)


# -----------------------------------------------------------------------------
# Generation

@arms
def test_generating_at_temperature_0_is_the_argmax_of_the_full_pass(arm):
    model = build(arm)
    out = torch.stack(generate(model, tokens(2, 20), 30, greedy))
    assert out.shape == (2, 50)
    assert_equal("tokens", out[:, 20:], model(out).logits[:, 19:-1].argmax(-1))


@arms
def test_a_prompt_among_others_of_other_lengths_continues_as_it_does_alone(arm):
    """Up to its separator, or until the context of 60 tokens is full."""
    model = build(arm, block_size=60)
    prompts = [tokens(1, n)[0] for n in (5, 31, 12, 58, 60)]
    alone = [generate(model, [prompt], 40, greedy)[0] for prompt in prompts]
    separator = int(alone[0][12])  # a token that the model writes after the first prompt
    together = generate(model, prompts, 40, greedy, separator=separator)
    for i, prompt in enumerate(prompts):
        expected = alone[i]
        if separator in prompt.tolist():
            # The separator divides the prompt into documents, so the model reads it differently.
            expected = generate(model, [prompt], 40, greedy, separator=separator)[0]
        new = expected[len(prompt):].tolist()
        if separator in new:
            new = new[:new.index(separator) + 1]
        assert together[i].tolist() == prompt.tolist() + new, f"prompt {i}"
        assert len(together[i]) <= 61, f"prompt {i}"



def test_sampling_follows_the_probabilities():
    """
    20,000 draws from four tokens; a share is within 0.02 of its probability.

        token                        0     1     2       3
        p                            0.5   0.3   0.15    0.05
        top_k = 2                    5/8   3/8   0       0
        top_p = 0.7                  5/8   3/8   0       0      0.5 is not enough, 0.5 + 0.3 is
        p² (temperature ½)           0.25  0.09  0.0225  0.0025, divided by their sum 0.365
    """
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = p.log().expand(20000, 4)

    def assert_shares(expected, **how):
        share = draw_token(logits, **how).bincount(minlength=4) / 20000
        torch.testing.assert_close(share, torch.tensor(expected), atol=0.02, rtol=0,
                                   msg=lambda text: f"shares with {how}: {text}")

    assert draw_token(logits, 0).unique().tolist() == [0]
    assert_shares([0.5, 0.3, 0.15, 0.05])
    assert_shares([5 / 8, 3 / 8, 0, 0], top_k=2)
    assert_shares([5 / 8, 3 / 8, 0, 0], top_p=0.7)
    assert_shares([0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365], temperature=0.5)
    assert draw_token(logits, top_p=1e-9).bincount(minlength=4).tolist() == [20000, 0, 0, 0]


@pytest.mark.parametrize("how", [
    dict(temperature=-1.0),
    dict(temperature=math.nan),
    dict(top_k=-1),
    dict(top_p=0.0),
    dict(top_p=1.5),
    dict(top_p=math.nan),
])
def test_impossible_sampling_raises(how):
    with pytest.raises(ValueError):
        draw_token(torch.zeros(2, 4), **how)


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-38, 1e-46, 1e-320])
def test_sampling_at_a_tiny_temperature_is_argmax(temperature):
    logits = 100 * torch.randn(50, 20)
    for how in (dict(), dict(top_k=3), dict(top_p=0.5)):
        assert torch.equal(draw_token(logits, temperature, **how), logits.argmax(-1)), how


def test_generating_no_tokens_gives_the_prompt():
    model = build("gsa")
    idx = tokens(2, 5)
    rows = generate(model, idx, 0)
    assert len(rows) == 2
    for row, prompt in zip(rows, idx):
        assert torch.equal(row, prompt)
    assert list(stream(model, idx, 0)) == []


# -----------------------------------------------------------------------------
# Training

@arms
def test_every_parameter_has_a_gradient_at_step_one_and_one_group(arm):
    model = build(arm, trained=False).train()
    out = model(tokens(2, 60), tokens(2, 60))
    total_loss(model, out).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    grouped = [id(p) for group in param_groups(model) for p in group["params"]]
    assert set(grouped) == {id(p) for p in model.parameters()}
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"


@pytest.mark.parametrize("arm", ["sparse", "gsa"])
@pytest.mark.parametrize("warmup", [False, True])
def test_model_and_indexer_get_no_gradient_from_each_others_loss(arm, warmup):
    model = build(arm).train()
    out = model(tokens(2, 60), tokens(2, 60), warmup=warmup)
    indexer = {}
    others = {}
    for name, p in model.named_parameters():
        group = indexer if ".indexer." in name else others
        group[name] = p

    def gradients(loss, parameters):
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True,
                                    retain_graph=True)
        return dict(zip(parameters, grads))

    for name, grad in gradients(out.loss, indexer).items():
        assert grad is None, f"{name} learns from the language model's loss"
    for name, grad in gradients(out.index_loss, others).items():
        assert grad is None, f"{name} learns from the index loss"
    for name, grad in gradients(out.index_loss, indexer).items():
        assert grad.abs().max() > 0, f"{name} does not learn from the index loss"


def test_the_indexer_learns_to_predict_attention():
    """150 steps on the index loss alone halve it, and the distance of recall from the best."""
    model = build("gsa", torch.float32).train()
    idx = tokens(4, 80)
    parameters = [p for name, p in model.named_parameters() if ".indexer." in name]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    before = model(idx, idx, warmup=True, stats=True)
    for _ in range(150):
        optimizer.zero_grad()
        model(idx, idx, warmup=True, stats=False).index_loss.backward()
        optimizer.step()
    after = model(idx, idx, warmup=True, stats=True)

    def missed(out):
        """Attention mass that the best keys have beyond the selected ones."""
        return (out.stats["recall_best"] - out.stats["recall"]).mean()

    assert after.index_loss < 0.5 * before.index_loss
    assert missed(after) < 0.5 * missed(before)


def test_var_avg_is_a_running_mean_of_training_only():
    """V̄ starts at the first mean; then each update takes 1/100 of the new one."""
    model = build("gsa", trained=False).train()
    indexers = indexers_of(model)
    means = []  # of each update, a list over the layers
    for _ in range(3):
        model(tokens(2, 50), stats=False)
        model(tokens(2, 50), stats=False)
        assert all(indexer.var_seen[1] == 2 for indexer in indexers)
        means.append([(indexer.var_seen[0] / 2).item() for indexer in indexers])
        model.update_var_avg()

    def assert_averages():
        for layer, indexer in enumerate(indexers):
            expected = means[0][layer]
            for mean in means[1:]:
                expected = 0.99 * expected + 0.01 * mean[layer]
            assert indexer.var_avg.item() == pytest.approx(expected, rel=1e-5), f"layer {layer}"

    assert_averages()
    assert "blocks.0.attn.indexer.var_avg" in model.state_dict()
    model.eval()(tokens(2, 50))
    model.update_var_avg()
    assert_averages()


def test_the_update_of_var_avg_never_waits_for_the_device():
    """Five layers by hand: Python reads no value, and no observation leaves V̄ as it is."""
    model = build("gsa", torch.float32, trained=False, n_layer=5)
    indexers = indexers_of(model)
    averages = [0.0, 0.3, 0.3, 0.0, 1e-7]
    observed = [[0.7, 3.0], [0.7, 3.0], [0.0, 0.0], [0.0, 0.0], [0.1, 1.0]]  # sum and count
    expected = []
    for indexer, average, seen in zip(indexers, averages, observed):
        indexer.var_avg.fill_(average)
        indexer.var_seen.copy_(torch.tensor(seen))
        var_avg = indexer.var_avg.clone()
        total, count = indexer.var_seen.clone()
        if count > 0:
            old = var_avg if var_avg > 0 else total / count
            var_avg = 0.99 * old + (1 - 0.99) * total / count
        expected.append(var_avg)
    with HostSyncs() as syncs:
        model.update_var_avg()
    assert syncs.count == 0
    for layer, indexer in enumerate(indexers):
        assert torch.equal(indexer.var_avg, expected[layer]), f"layer {layer}"
        assert indexer.var_seen.tolist() == [0, 0], f"layer {layer}"
    with HostSyncs() as syncs:
        bool(indexers[0].var_avg > 0)
    assert syncs.count == 1, "the counter counts nothing"


# -----------------------------------------------------------------------------
# Accounting

def test_flops_of_four_tokens():
    """
    k_base = 2, C = 32, Hi·di = 2·8 = 16, two layers.

        query                t    1  2  3  4    mean
        visible keys              1  2  3  4    2.5
        selected keys             1  2  2  2    1.75

    Per token and layer, in FLOPs:
        attention   4·1.75·32 = 224 over the selected keys, 4·2.5·32 = 320 over the visible ones
        indexer     forward 2·2.5·16 = 80
                    backward 2·2·1.75·16 = 112 over the selected keys, 2·80 = 160 in warm-up
    """
    model = build("gsa", trained=False, k_base=2)
    forward = 2 * matrix_parameters(model)
    flops = functools.partial(flops_per_token, model)
    assert flops(4, training=False) == forward + 2 * (224 + 80)
    assert flops(4) == 3 * forward + 2 * (3 * 224 + 80 + 112)
    assert flops(4, training=False, warmup=True) == forward + 2 * (320 + 80)
    assert flops(4, warmup=True) == 3 * forward + 2 * (3 * 320 + 80 + 160)

    dense = build("dense", trained=False)
    forward = 2 * matrix_parameters(dense)
    assert flops_per_token(dense, 4, training=False) == forward + 2 * 320
    assert flops_per_token(dense, 4) == 3 * forward + 2 * 3 * 320


@arms
@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("dims", [{}, dict(d_head=12, d_mlp=50, tie_embed=False, qkv_bias=True)])
def test_flops_are_those_of_a_loop_over_positions(arm, warmup, dims):
    """
    Every pair of query and key counted one by one; the default context is block_size.
    An embedding that is not the output projection too is looked up, not multiplied with.
    """
    model = build(arm, trained=False, **dims)
    config = model.config
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1
                   and (config.tie_embed or name != "embed.weight"))
    score = 2 * config.n_index_head * config.d_index if config.sparse else 0
    for T in (1, 11, 12, 13, 100, None):
        context = T or config.block_size
        forward = 0
        backward = 0
        for visible in range(1, context + 1):  # query t sees t keys
            attended = visible
            if config.sparse and not warmup:
                attended = min(config.k_base, visible)
            per_layer = 4 * attended * config.n_head * config.d_head
            forward += 2 * matrices + config.n_layer * (per_layer + score * visible)
            backward += 4 * matrices + config.n_layer * (2 * per_layer + 2 * score * attended)
        expected = dict(forward=forward / context, training=(forward + backward) / context)
        for name, flops in expected.items():
            ours = flops_per_token(model, T, training=name == "training", warmup=warmup)
            assert ours == pytest.approx(flops, rel=1e-12), (name, T)


# -----------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize("dims", [
    dict(n_head=3),
    dict(n_kv_head=3),
    dict(k_min=20),
    dict(n_head=32),
    dict(d_index=7),
    dict(n_layer=0),
    dict(k_rule="most"),
    dict(index_activation="tanh"),
    dict(n_sink=3, n_local=2),
    dict(block_size=-1),
    dict(look_back=1.0),
    dict(look_back=-1.0, qkv_bias=True),
    dict(look_back=1.0, qkv_bias=True, block_size=4),
])
def test_impossible_configs_raise(dims):
    with pytest.raises(ValueError):
        GSAConfig.arm("gsa", **SMALL | dims)


@pytest.mark.parametrize("name", [f.name for f in fields(GSAConfig) if f.type in (int, float)])
def test_every_number_of_the_config_has_a_legal_range(name):
    bad = [math.nan, math.inf, -math.inf, True, "8", None]
    if GSAConfig.__dataclass_fields__[name].type is int:
        bad += [-1, 8.0]
        if name not in ("d_head", "d_mlp", "n_sink", "n_local"):
            bad.append(0)
    if name in ("rope_base", "norm_eps"):
        bad += [0, 0.0, -1.0]
    for value in bad:
        with pytest.raises(ValueError, match=name) as error:
            GSAConfig.arm("gsa", **SMALL | {name: value})
        assert "\n" not in str(error.value), value


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

    def cached(idx):
        return model(idx, cache=KVCache(2, 8))

    for call in (model, model.trunk, cached):
        with pytest.raises(ValueError, match="idx has shape") as error:
            call(idx)
        assert "\n" not in str(error.value)


IMPOSSIBLE_CALLS = {
    "an unknown arm": lambda model: GSAConfig.arm("sparser"),
    "an unknown backend": lambda model: GSA(model.config, "cuda"),
    "more tokens than block_size": lambda model: model(tokens(1, 161)),
    "a prompt longer than block_size": lambda model: generate(model, tokens(1, 161), 1),
    "an empty prompt": lambda model: generate(model, tokens(1, 0), 1),
    "generate -1 tokens": lambda model: generate(model, tokens(1, 5), -1),
    "stream -1 tokens": lambda model: next(stream(model, tokens(1, 5), -1)),
}


@pytest.mark.parametrize("name", IMPOSSIBLE_CALLS)
def test_impossible_calls_raise(name):
    model = build("gsa")
    with pytest.raises(ValueError):
        IMPOSSIBLE_CALLS[name](model)
