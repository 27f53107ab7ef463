"""
Gated Sparse Attention (GSA, arXiv 2601.15305): a Llama-style decoder whose attention layer is the paper's.
Read it from Gate and Indexer upwards to GSA; the computations without parameters are in kernels.py.

    config = GSAConfig.arm("gsa", vocab_size=257, n_layer=4, n_head=4, n_kv_head=2, n_embd=128, block_size=512)
    out = GSA(config)(idx, targets)       # out.logits, out.loss, out.index_loss, out.stats

Four arms, the same code with switches: dense (neither), gated (gates only), sparse (DeepSeek's DSA: ReLU indexer, fixed
k), gsa (all). With every switch off the layer is plain causal attention.

Symbols  B batch   T query positions   S key positions   C model width   H query heads   G key/value heads (H % G == 0)
         d head width   Hi indexer heads   di indexer width   k_t budget of query t   S_t its keys   σ sigmoid
Layout   (B, T, H, d) everywhere. Masks: True = attend. Invalid index: -1.
"""
import math
from dataclasses import dataclass, field, fields
from numbers import Integral, Real

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import kernels

ARMS = {
    "dense": dict(sparse=False, value_gate=False, output_gate=False),
    "gated": dict(sparse=False, value_gate=True, output_gate=True),
    "sparse": dict(sparse=True, value_gate=False, output_gate=False, index_activation="relu", k_rule="fixed"),
    "gsa": dict(sparse=True, value_gate=True, output_gate=True, index_activation="sigmoid"),
}


@dataclass
class GSAConfig:
    vocab_size: int = 50257
    block_size: int = 4096  # longest context, in tokens
    n_layer: int = 12
    n_head: int = 12  # H
    n_kv_head: int = 4  # G
    n_embd: int = 768  # C
    rope_base: float = 10000.0
    sparse: bool = True  # attend to selected keys only; False = to every key
    value_gate: bool = True  # G2, Eq. 9
    output_gate: bool = True  # G1, Eq. 10
    gate_bias_init: float = 0.5  # σ(0.5) = 0.62
    n_index_head: int = 4  # Hi
    d_index: int = 64  # di
    index_activation: str = "sigmoid"  # "relu" is DeepSeek's DSA indexer
    index_rope: bool = True  # DEVIATION: the official indexer ignores positions
    k_rule: str = "inverse"  # "eq8": the formula as printed; "fixed": k_base
    k_base: int = 512
    k_min: int = 128
    k_max: int = 1024
    n_sink: int = 0  # first keys of the document, always selected
    n_local: int = 0  # last keys, the query's own included, always selected

    @classmethod
    def arm(cls, name, **dims):
        """The config of one of the four arms (ARMS) with the given dimensions; dims may override its switches."""
        if name not in ARMS:
            raise ValueError(f"arm {name!r} is not one of {', '.join(ARMS)}")
        return cls(**{**ARMS[name], **dims})

    def __post_init__(self):
        def need(ok, message):
            if not ok:
                raise ValueError(message)
        for f in fields(self):
            value = getattr(self, f.name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            if f.type is int:
                least = 0 if f.name in ("n_sink", "n_local") else 1
                need(number and isinstance(value, Integral) and value >= least,
                     f"{f.name} is {value!r}, must be an integer of at least {least}")
            if f.type is float:
                need(number and -math.inf < value < math.inf,
                     f"{f.name} is {value!r}, must be a finite number")
        need(self.rope_base > 0, f"rope_base is {self.rope_base}, must be positive")
        need(self.n_embd % self.n_head == 0, f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        need(self.n_head % self.n_kv_head == 0, f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        need(self.n_embd // self.n_head % 2 == 0, f"head width {self.n_embd // self.n_head} is odd: RoPE rotates pairs")
        need(self.d_index % 2 == 0, f"d_index {self.d_index} is odd: RoPE rotates pairs")
        need(self.index_activation in ("sigmoid", "relu"), f"index_activation {self.index_activation!r} is not sigmoid or relu")
        need(self.k_rule in ("inverse", "eq8", "fixed"), f"k_rule {self.k_rule!r} is not one of inverse, eq8, fixed")
        need(self.k_min <= self.k_max, f"k_min {self.k_min} is larger than k_max {self.k_max}")
        need(self.n_sink + max(1, self.n_local) <= self.k_min,
             f"k_min {self.k_min} has no room for the {self.n_sink} + {max(1, self.n_local)} forced keys (n_sink, n_local)")

    @property
    def d_head(self):
        return self.n_embd // self.n_head


@dataclass
class GSAOutput:
    """loss and index_loss are None without targets, index_loss also without an indexer."""
    logits: Tensor  # (B, T, vocab_size)
    loss: Tensor | None = None  # (), mean cross-entropy in nats per token
    index_loss: Tensor | None = None  # (), KL in nats per query, summed over the layers
    stats: dict = field(default_factory=dict)  # name -> (n_layer,), see Attention.stats


class KVCache:
    """
    Keys and values of every layer, the indexer's keys beside them. Rows may have different lengths.
    dtype is that of k and v, index_dtype that of k_index (default dtype). GSA.new_cache knows both.
    """

    def __init__(self, config, B, size, device=None, dtype=None, index_dtype=None):
        def empty(dtype, *shape):
            return [torch.zeros(B, size, *shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.k = empty(dtype, config.n_kv_head, config.d_head)  # n_layer × (B, S, G, d)
        self.v = empty(dtype, config.n_kv_head, config.d_head)  # n_layer × (B, S, G, d)
        self.k_index = [None] * config.n_layer
        if config.sparse:
            self.k_index = empty(index_dtype or dtype, config.d_index)  # n_layer × (B, S, di)
        self.doc, self.start = torch.zeros(2, B, size, dtype=torch.long, device=device)  # document and its first position
        self.length = torch.zeros(B, dtype=torch.long, device=device)  # tokens held, per row
        self.size = size

    def repeat(self, n):
        """Repeat every row n times, in place, to continue one prompt in n ways."""
        twice = lambda x: None if x is None else x.repeat_interleave(n, 0)
        self.k, self.v, self.k_index = ([twice(x) for x in xs] for xs in (self.k, self.v, self.k_index))
        self.doc, self.start, self.length = twice(self.doc), twice(self.start), twice(self.length)

    def document_starts(self, doc, pos):
        """Note the documents doc (B, T) at positions pos (B, T), which follow what the cache holds; their starts, (B, T)."""
        last = (self.length - 1).clamp(min=0)[:, None]
        last_doc, last_start = (x.gather(1, last)[:, 0] for x in (self.doc, self.start))
        start = kernels.document_starts(doc, pos, last_doc, torch.where(self.length > 0, last_start, 0))
        self.write(self.doc, pos, doc)
        self.write(self.start, pos, start)
        return start

    @staticmethod
    def write(buffer, pos, x):
        """Put x (B, T, ...) at positions pos (B, T) of buffer (B, S, ...) and return the buffer."""
        buffer[torch.arange(len(x), device=x.device)[:, None], pos] = x.to(buffer.dtype)
        return buffer


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), 1e-6)


def rope(x, cos, sin):
    """Rotary position embedding (RoFormer), halves rotated against each other. x (B, T, H, d); cos, sin (1 or B, T, 1, d/2)."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rope_tables(block_size, width, base):
    """cos and sin (block_size, 1, width/2). A float32 angle of 1e5 would be wrong by 4e-3."""
    speed = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)  # (width/2,)
    angle = torch.arange(block_size, dtype=torch.float64)[:, None] * speed  # (block_size, width/2)
    return angle.cos().float()[:, None], angle.sin().float()[:, None]


class Gate(nn.Module):
    """σ(h W + b), elementwise (Eqs. 9 and 10). h (B, T, C) -> (B, T, width)."""

    def __init__(self, n_embd, width):
        super().__init__()
        self.proj = nn.Linear(n_embd, width)

    def forward(self, h):
        return torch.sigmoid(self.proj(h))


class Indexer(nn.Module):
    """The gated lightning indexer (Eq. 7) and the running average V̄ its budget is measured against."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        Hi, di = config.n_index_head, config.d_index
        self.wq = nn.Linear(config.n_embd, Hi * di, bias=False)
        self.wk = nn.Linear(config.n_embd, di, bias=False)
        self.ww = nn.Linear(config.n_embd, Hi)
        if config.index_activation == "sigmoid":
            self.b = nn.Parameter(torch.empty(Hi))
        else:
            self.register_buffer("b", torch.zeros(Hi), persistent=False)
        self.log_tau = nn.Parameter(torch.empty(()))
        self.register_buffer("var_avg", torch.zeros(()))  # V̄, 0 = nothing averaged yet
        self.register_buffer("var_seen", torch.zeros(2), persistent=False)  # Σ and count of batch means since the last update
        for name, table in zip(("cos", "sin"), rope_tables(config.block_size, di, config.rope_base)):
            self.register_buffer(name, table, persistent=False)

    def forward(self, h, pos):
        """h (B, T, C), pos (1 or B, T) -> kernels.Index of these T positions, in fp32 also under autocast."""
        B, T, _ = h.shape
        Hi, di = self.config.n_index_head, self.config.d_index
        h = h.detach()  # the indexer learns from its own loss only, and the model not from the indexer's
        q, k, w = self.wq(h).view(B, T, Hi, di), self.wk(h).view(B, T, 1, di), self.ww(h)
        q, k, w = (x.to(self.log_tau.dtype) for x in (q, k, w))
        if self.config.index_rope:  # DEVIATION: attention mass caught 0.84 with, 0.48 without (README)
            q, k = rope(q, self.cos[pos], self.sin[pos]), rope(k, self.cos[pos], self.sin[pos])
        if self.config.index_activation == "sigmoid":
            w = w.sigmoid()
        return kernels.Index(q, k[:, :, 0], w, self.b, self.config.index_activation)

    def budget(self):
        c = self.config
        return kernels.Budget(c.k_rule, c.k_base, c.k_min, c.k_max, c.n_sink, c.n_local, self.var_avg)


class Attention(nn.Module):
    """One GSA layer (SPEC order: projections, value gate, indexer, selection, attention, output gate, projection)."""

    def __init__(self, config, backend):
        super().__init__()
        self.config, self.backend = config, backend
        C, d = config.n_embd, config.d_head
        self.wq = nn.Linear(C, config.n_head * d, bias=False)
        self.wk = nn.Linear(C, config.n_kv_head * d, bias=False)
        self.wv = nn.Linear(C, config.n_kv_head * d, bias=False)
        self.wo = nn.Linear(config.n_head * d, C, bias=False)
        self.value_gate = Gate(C, config.n_kv_head * d) if config.value_gate else None
        self.output_gate = Gate(C, config.n_head * d) if config.output_gate else None
        self.indexer = Indexer(config) if config.sparse else None
        for name, table in zip(("cos", "sin"), rope_tables(config.block_size, d, config.rope_base)):
            self.register_buffer(name, table, persistent=False)

    def forward(self, h, visible, cache=None, layer=0, warmup=False, want_loss=False, want_stats=False):
        """
        h (B, T, C) normalised input -> (B, T, C), index loss () or None, stats dict.
        warmup: attend to every visible key (the indexer's phase 1).
        """
        B, T, C = h.shape
        H, G, d = self.config.n_head, self.config.n_kv_head, self.config.d_head
        pos, kernel = visible.pos, self.backend
        q = self.wq(h).view(B, T, H, d)
        k = self.wk(h).view(B, T, G, d)
        v = self.wv(h)  # (B, T, G·d)
        q, k = rope(q, self.cos[pos], self.sin[pos]), rope(k, self.cos[pos], self.sin[pos])
        gates = {}
        if self.value_gate:
            gates["value_gate"] = self.value_gate(h)
            v = v * gates["value_gate"]  # Eq. 9
        v = v.view(B, T, G, d)
        if cache is not None:
            at = pos.expand(B, T)
            k, v = cache.write(cache.k[layer], at, k), cache.write(cache.v[layer], at, v)  # (B, S, G, d)

        index_loss = selection = None
        if self.indexer:
            index = self.indexer(h, pos)
            if cache is not None:
                index = index._replace(k=cache.write(cache.k_index[layer], at, index.k))
            budget = self.indexer.budget()
            if warmup and not want_stats:
                budget = budget._replace(k_min=1, k_max=1)  # only Var_t is used: spare the top-k
            selection = kernels.select(index, visible, budget, kernel)  # Eqs. 7, 8
            if self.training:
                self.indexer.var_seen += torch.stack((selection.var.mean(), torch.ones_like(selection.var[0, 0]))).float()
            attended = kernels.Selection.everything(visible, B) if warmup else selection
            o, lse = kernels.sparse_attention(q, k, v, attended, kernel)  # (B, T, H, d)
            if want_loss:
                index_loss = kernels.index_loss(q, k, lse, index, self.indexer.log_tau, attended, kernel)
        else:
            keys, mask = slice(None), None
            if not visible.plain:
                keys, mask = visible.whole.keys, visible.mask(visible.whole)[:, None]
            o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k[:, keys], v[:, keys])), attn_mask=mask,
                                               is_causal=mask is None, enable_gqa=H != G).transpose(1, 2)
        o = o.reshape(B, T, H * d)
        if self.output_gate:
            gates["output_gate"] = self.output_gate(h)
            o = o * gates["output_gate"]  # Eq. 10
        stats = self.stats(q, k, visible, selection, warmup, gates) if want_stats else {}
        return self.wo(o), index_loss, stats

    @torch.no_grad()
    def attended(self, h, visible):
        """
        Where full attention would look, and what the indexer selects. For pictures: O(T·S) memory.
        h (B, T, C) -> mass (B, T, S), full attention's mean over the heads; selected (B, T, S) bool.
        """
        B, T, _ = h.shape
        H, G, d = self.config.n_head, self.config.n_kv_head, self.config.d_head
        cos, sin = self.cos[visible.pos], self.sin[visible.pos]
        q = rope(self.wq(h).view(B, T, H, d), cos, sin)  # (B, T, H, d)
        k = rope(self.wk(h).view(B, T, G, d), cos, sin)  # (B, S, G, d)
        k = k.repeat_interleave(H // G, 2)  # (B, S, H, d)
        s = torch.einsum("bthd,bshd->bhts", q, k).float() / math.sqrt(d)  # (B, H, T, S)
        s = s.masked_fill(~visible.mask()[:, None], -math.inf)  # (B, H, T, S)
        index = self.indexer(h, visible.pos)
        selection = kernels.select(index, visible, self.indexer.budget(), self.backend)
        return s.softmax(-1).mean(1), selection.mask()

    @torch.no_grad()
    def stats(self, q, k, visible, selection, warmup, gates):
        """
        What the layer did, each (): k_t, var_ratio (Var/V̄), recall, recall_best and first_token of
        kernels.attention_report, mean of each gate. In warm-up the recall is that of the keys it would have selected.
        """
        stats = {name: g.mean() for name, g in gates.items()}
        if selection:
            stats["k_t"] = selection.budget.float().mean()
            stats["var_ratio"] = selection.var.mean() / self.indexer.var_avg.clamp(min=1e-30)
        everything = kernels.Selection.everything(visible, q.size(0))
        report = kernels.attention_report(q, k, selection or everything)
        if selection is None:
            report = {"first_token": report["first_token"]}
        elif warmup:
            report["first_token"] = kernels.attention_report(q, k, everything)["first_token"]
        return {**stats, **report}


class MLP(nn.Module):
    """SwiGLU, hidden width 8C/3 rounded up to a multiple of 32."""

    def __init__(self, n_embd):
        super().__init__()
        hidden = -(-8 * n_embd // 3 // 32) * 32
        self.gate_up = nn.Linear(n_embd, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config, backend):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(config.n_embd), RMSNorm(config.n_embd)
        self.attn, self.mlp = Attention(config, backend), MLP(config.n_embd)

    def forward(self, x, visible, **how):
        a, index_loss, stats = self.attn(self.norm1(x), visible, **how)
        x = x + a
        x = x + self.mlp(self.norm2(x))
        if stats:
            stats["max_activation"] = x.detach().abs().max()
        return x, index_loss, stats


class GSA(nn.Module):
    """The language model. backend: the path of kernels.py that computes the attention."""

    def __init__(self, config, backend="auto"):
        super().__init__()
        kernels.check_backend(backend)
        self.config = config
        self.rows = -(-config.vocab_size // 64) * 64  # embedding rows, padded for the matrix units; never output
        self.embed = nn.Embedding(self.rows, config.n_embd)  # tied: also the output projection
        self.blocks = nn.ModuleList(Block(config, backend) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        parameter                        initial value
        embed, every projection          N(0, 1/√C): outputs of size 1 at any width. GPT-2's 0.02 is the same at C = 2500,
                                         but at C = 128 it delays retrieval beyond a million tokens (LOG.md)
        wo, mlp.down                     N(0, 1/√(2·C·n_layer)): the residual stream does not grow with depth
        gate weights                     a tenth of that; gate biases gate_bias_init, so gates start equal and half open
        indexer.ww bias, .b              0; the ReLU indexer's ww bias 1/Hi, since w = 0 would stop every gradient
        indexer.log_tau                  log 4
        norms                            1
        """
        c, std = self.config, self.config.n_embd ** -0.5
        done = set()

        def put(module, prefix, suffixes, fill):
            for name, p in module.named_parameters():
                if name.endswith(suffixes) and prefix in name and name not in done:
                    fill(p)
                    done.add(name)
        normal = lambda std: lambda p: nn.init.normal_(p, 0.0, std)
        constant = lambda value: lambda p: nn.init.constant_(p, value)
        put(self, "indexer", ("log_tau",), constant(math.log(4)))
        put(self, "indexer", ("ww.bias",), constant(0.0 if c.index_activation == "sigmoid" else 1 / c.n_index_head))
        put(self, "indexer", (".b",), constant(0.0))
        put(self, "_gate", (".weight",), normal(0.1 * std))
        put(self, "_gate", (".bias",), constant(c.gate_bias_init))
        put(self, "norm", (".weight",), constant(1.0))
        put(self, "", ("wo.weight", "down.weight"), normal(std / math.sqrt(2 * c.n_layer)))
        put(self, "", (".weight",), normal(std))
        missed = {name for name, _ in self.named_parameters()} - done
        assert not missed, f"not initialised: {missed}"

    def trunk(self, idx, doc=None, cache=None, warmup=False, want_loss=False, want_stats=False):
        """idx (B, T) -> normalised final hidden states (B, T, C), index loss summed over layers or None, stats dict."""
        if idx.dim() != 2 or idx.numel() == 0:
            raise ValueError(f"idx has shape {tuple(idx.shape)}, not (B, T) with B, T at least 1")
        B, T = idx.shape
        assert doc is None or doc.shape == idx.shape, f"doc {tuple(doc.shape)} must match idx {tuple(idx.shape)}"
        if cache is None:
            if T > self.config.block_size:
                raise ValueError(f"{T} tokens do not fit in block_size {self.config.block_size}")
            visible = kernels.Visible.causal(T, doc, idx.device)
        else:
            pos = cache.length[:, None] + torch.arange(T, device=idx.device)  # (B, T)
            longest = int(pos[:, -1].max()) + 1  # the one wait for the device
            if longest > min(cache.size, self.config.block_size):
                raise ValueError(f"{longest} tokens do not fit in the cache ({cache.size}) and "
                                 f"block_size ({self.config.block_size})")
            visible = kernels.Visible(pos, cache.size, None if doc is None else cache.document_starts(doc, pos))
            cache.length = cache.length + T
        x = self.embed(idx)  # (B, T, C)
        index_losses, stats = [], []
        for layer, block in enumerate(self.blocks):
            x, index_loss, s = block(x, visible, cache=cache, layer=layer, warmup=warmup, want_loss=want_loss,
                                     want_stats=want_stats)
            index_losses.append(index_loss)
            stats.append(s)
        index_loss = sum(index_losses) if self.config.sparse and want_loss else None
        return self.norm(x), index_loss, {name: torch.stack([s[name] for s in stats]) for name in stats[0]}

    def head(self, x):
        return F.linear(x, self.embed.weight)[..., :self.config.vocab_size]

    def forward(self, idx, targets=None, doc=None, cache=None, warmup=False, stats=True):
        """
        idx (B, T) int64 -> GSAOutput. targets (B, T), -1 = ignored; with them loss and index_loss are computed.
        doc: document id of every position (B, T); a position attends within its document.
        A document is a run of equal ids: an id that comes back later is another one. None = one.
        cache: KVCache to append to; a row's positions then start at its length.
        warmup: phase 1 of the indexer, dense attention. stats: also measure the attention, O(T²).
        """
        x, index_loss, stats = self.trunk(idx, doc, cache, warmup, targets is not None, stats)
        logits = self.head(x)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return GSAOutput(logits, loss, index_loss, stats)

    # ---- generation

    def new_cache(self, B, size):
        """
        An empty KVCache for B rows of at most size tokens, with the dtypes that the layers produce.
        Call it under the autocast that the model will run under.
        """
        attn = self.blocks[0].attn
        device = attn.wk.weight.device
        dtype = attn.wk.weight.dtype
        if torch.is_autocast_enabled(device.type) and dtype != torch.float64:  # it leaves float64
            dtype = torch.get_autocast_dtype(device.type)
        index_dtype = None
        if attn.indexer:
            index_dtype = attn.indexer.log_tau.dtype  # see Indexer.forward
        return KVCache(self.config, B, size, device, dtype, index_dtype)

    @torch.no_grad()
    def stream(self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, separator=None, generator=None):
        """
        Yield one (B,) tensor of new tokens per step for a list of 1-D prompts of any lengths, -1 in the rows that have ended.
        A row ends with its separator (yielded) or at block_size. temperature 0 is argmax.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, must not be negative")
        device = self.embed.weight.device
        length = torch.tensor([len(p) for p in prompts], device=device)
        if not len(prompts) or int(length.min()) == 0:
            raise ValueError("a prompt is empty: give at least one token")
        if int(length.max()) > self.config.block_size:
            raise ValueError(f"a prompt of {int(length.max())} tokens does not fit in block_size {self.config.block_size}")
        idx = nn.utils.rnn.pad_sequence([p.to(device) for p in prompts], batch_first=True)  # padded right: causality hides it
        B, size = len(prompts), min(int(length.max()) + max_new_tokens, self.config.block_size)
        cache = self.new_cache(B, size)
        doc = None if separator is None else (idx == separator).cumsum(1)
        x = self.trunk(idx, doc, cache)[0][torch.arange(B, device=device), length - 1]  # (B, C)
        if doc is not None:
            doc = doc.gather(1, length[:, None] - 1)  # (B, 1): the new tokens belong to the last document
        cache.length = length
        alive = torch.ones(B, dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            token = sample(self.head(x).float(), temperature, top_k, top_p, generator)  # (B,)
            yield torch.where(alive, token, -1)
            if separator is not None:
                alive = alive & (token != separator)
            alive = alive & (cache.length < size)
            if step + 1 == max_new_tokens or not alive.any():
                return
            cache.length = cache.length.clamp(max=size - 1)  # ended rows rewrite their last slot, unseen
            x = self.trunk(token[:, None], doc, cache)[0][:, 0]

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, separator=None, generator=None):
        """
        Continue idx: a (B, T) tensor gives a (B, T + n) tensor, rows that ended early filled with the separator (0 if none);
        a list of 1-D tensors of any lengths gives a list of 1-D tensors. n ≤ max_new_tokens: a row ends after its
        separator, or when block_size is full.
        """
        new = list(self.stream(list(idx), max_new_tokens, temperature, top_k, top_p, separator, generator))
        if isinstance(idx, Tensor):
            new = torch.stack(new, 1) if new else idx[:, :0]
            return torch.cat((idx, new.masked_fill(new < 0, separator or 0)), 1)
        rows = torch.stack(new, 1) if new else [torch.empty(0, dtype=torch.long)] * len(idx)
        return [torch.cat((p, row[row >= 0].to(p.device))) for p, row in zip(idx, rows)]

    # ---- training support and accounting

    @torch.no_grad()
    def update_var_avg(self, decay=0.99):
        """V̄ <- decay·V̄ + (1-decay)·(mean Var_t since the last call), over all ranks. Once per optimizer step."""
        if not self.config.sparse:
            return
        seen = torch.stack([b.attn.indexer.var_seen for b in self.blocks])  # (n_layer, 2)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen)
        total, count = seen.unbind(1)  # (n_layer,) each
        var_avg = torch.stack([b.attn.indexer.var_avg for b in self.blocks])  # (n_layer,)
        old = torch.where(var_avg > 0, var_avg, total / count)  # (n_layer,)
        new = decay * old + (1 - decay) * total / count  # (n_layer,), NaN where count is 0
        new = torch.where(count > 0, new, var_avg)  # no `if`: it would wait for the device
        for block, value in zip(self.blocks, new):
            block.attn.indexer.var_avg.copy_(value)
            block.attn.indexer.var_seen.zero_()

    def param_groups(self, weight_decay=0.1, index_lr_mult=10.0):
        """Optimizer groups by "name": matrix and embed (decayed), vector, indexer (its learning rate times index_lr_mult)."""
        named = {n: p for n, p in self.named_parameters() if p.requires_grad}
        index = [p for n, p in named.items() if ".indexer." in n]
        matrix = [p for n, p in named.items() if ".indexer." not in n and p.dim() > 1 and p is not self.embed.weight]
        vector = [p for n, p in named.items() if ".indexer." not in n and p.dim() < 2]
        groups = [dict(name="matrix", params=matrix, weight_decay=weight_decay, lr_mult=1.0),
                  dict(name="embed", params=[self.embed.weight], weight_decay=weight_decay, lr_mult=1.0),
                  dict(name="vector", params=vector, weight_decay=0.0, lr_mult=1.0),
                  dict(name="indexer", params=index, weight_decay=0.0, lr_mult=index_lr_mult)]
        groups = [g for g in groups if g["params"]]
        assert sum(len(g["params"]) for g in groups) == len(named), "a parameter is in no group or in two"
        return groups

    def flops_per_token(self, T=None, training=True, warmup=False):
        """
        Model FLOPs per token at context T (default block_size): the mean over positions t = 1…T.
        Forward: 2 per weight of a matrix; attention 4·C per key that the query attends to,
        min(k_base, t) or all t (dense, warm-up); indexer 2·Hi·di per visible key, all t.
        Backward: twice the forward, but the indexer's spans the attended keys only.
        Recomputation is not counted.
        """
        c = self.config
        T = T or c.block_size
        weights = sum(p.numel() for p in self.parameters() if p.dim() > 1)
        visible = (T + 1) / 2  # mean of t: keys per query
        attended = visible
        if c.sparse and not warmup:
            k = min(c.k_base, T)
            attended = (k * (k + 1) / 2 + (T - k) * k) / T  # mean of min(k_base, t)
        score = 2 * c.n_index_head * c.d_index if c.sparse else 0  # FLOPs of one indexer score
        model = 2 * weights + c.n_layer * 4 * attended * c.n_embd
        indexer = c.n_layer * score * visible
        if not training:
            return model + indexer
        indexer_backward = c.n_layer * 2 * score * attended
        return 3 * model + indexer + indexer_backward

    def kv_bytes(self, T=None, itemsize=2):
        """Bytes of KV cache for one sequence of T tokens (default block_size), the indexer's keys included."""
        c = self.config
        per_token = 2 * c.n_kv_head * c.d_head + (c.d_index if c.sparse else 0)
        return c.n_layer * (T or c.block_size) * per_token * itemsize


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token per row of logits (B, V) -> (B,). temperature 0: argmax. top_k, top_p: None or 0 / 1.0 = off."""
    if not temperature >= 0:  # NaN is refused too
        raise ValueError(f"temperature {temperature} must be ≥ 0")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k {top_k} must be ≥ 0")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must be in (0, 1]")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits - logits.amax(-1, keepdim=True)  # largest 0: never inf, however divided
    logits = logits / max(temperature, 1e-30)  # 0 / 1e-46 would be 0 / 0 in float32
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of the likelier tokens
        logits = logits.masked_fill((before >= top_p).scatter(1, order, before >= top_p), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
