"""
A Llama-style decoder with Gated Sparse Attention (GSA, arXiv 2601.15305) in every layer.
Read downwards: Gate, Indexer, Attention, GSA. Then read attention.py: the two are the paper.

    config = GSAConfig.arm("gsa", vocab_size=257, n_layer=4, n_head=4, n_kv_head=2, n_embd=128,
                           block_size=512)
    out = GSA(config)(idx, targets)  # out.logits, out.loss, out.index_loss

Four arms are the same code with other switches: dense (plain causal attention), gated (gates only),
sparse (DeepSeek's DSA: ReLU indexer, fixed k, no gates), gsa (everything).

Symbols  B batch, T query positions, S key positions, C model width, H query heads,
         G key/value heads (H % G == 0), d head width, Hi indexer heads, di indexer width,
         k_t budget of query t, S_t its selected keys, σ sigmoid
Layout   (B, T, H, d) everywhere, attention matrices (B, T, H, S). Masks: True = attend.
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attention
from checks import check_config, resolve_backend
from layers import MLP, RMSNorm, RoPE, dense_attention, look_back
from measure import layer_stats

ARMS = {
    "dense": dict(sparse=False, value_gate=False, output_gate=False),
    "gated": dict(sparse=False, value_gate=True, output_gate=True),
    "sparse": dict(sparse=True, value_gate=False, output_gate=False, index_activation="relu",
                   k_rule="fixed"),
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
    d_head: int = 0  # d; 0 = n_embd / n_head
    d_mlp: int = 0  # hidden width of the MLP; 0 = 8C/3, rounded up to a multiple of 32
    tie_embed: bool = True  # the embedding is also the output projection
    qkv_bias: bool = False  # biases of the projections to q, k and v (Qwen2)
    o_bias: bool = False  # bias of the attention's output projection
    mlp_bias: bool = False  # biases of the MLP
    qk_norm: bool = False  # RMSNorm of every head's q and k, before RoPE (Qwen3)
    norm_eps: float = 1e-6  # of every RMSNorm
    rope_base: float = 10000.0
    # stretches RoPE for contexts longer than in training; entries as in Hugging Face's config.json
    # Example: {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
    rope_scaling: dict = field(default_factory=dict)
    sparse: bool = True  # attend to selected keys only; False = to every key
    value_gate: bool = True  # Eq. 9
    output_gate: bool = True  # Eq. 10
    gate_bias_init: float = 0.5  # σ(0.5) = 0.62
    identity_init: bool = False  # wo and mlp.down begin at 0: each block passes its input on
    # above 0, head h of the first layer begins by attending to the token h + 1 places back;
    # the larger, the more sharply (layers.look_back)
    look_back: float = 0.0
    n_index_head: int = 4  # Hi
    d_index: int = 64  # di
    index_activation: str = "sigmoid"  # "relu": the indexer of DeepSeek's DSA
    index_rope: bool = True  # DEVIATION: the official indexer ignores positions
    index_temperature: bool = True  # DEVIATION: the indexer's softmax has a learned τ; else τ = 1
    k_rule: str = "inverse"  # one of attention.K_RULES: inverse; eq8, as printed; fixed, k_base
    k_base: int = 512
    k_min: int = 128
    k_max: int = 1024
    n_sink: int = 0  # first keys of the document, always selected
    n_local: int = 0  # last keys, the query's own included, always selected

    @classmethod
    def arm(cls, name, **settings):
        """The config of one of the four arms (ARMS); settings may override its switches."""
        if name not in ARMS:
            raise ValueError(f"arm {name!r} is not one of {', '.join(ARMS)}")
        return cls(**{**ARMS[name], **settings})

    def __post_init__(self):
        check_config(self)
        self.d_head = self.d_head or self.n_embd // self.n_head
        self.d_mlp = self.d_mlp or (8 * self.n_embd + 95) // 96 * 32

    def budget(self, var_avg=None):
        """The rule for k_t, with V̄ (scalar)."""
        return attention.Budget(self.k_rule, self.k_base, self.k_min, self.k_max, self.n_sink,
                                self.n_local, var_avg)


@dataclass
class GSAOutput:
    logits: Tensor  # (B, T, vocab_size)
    loss: Tensor | None  # scalar, mean cross-entropy in nats per token; None without targets
    # scalar, KL in nats per query, summed over the layers; 0 without targets or indexer.
    # Training minimises loss + index_loss_weight · index_loss
    index_loss: Tensor
    stats: dict = field(default_factory=dict)  # name -> (n_layer,), see measure.layer_stats


class KVCache:
    """
    Keys, gated values and indexer keys of B rows of up to size tokens.
    Rows may have different lengths: pad prompts on the right, run the model, then set `length`.
    The next tokens overwrite the padding, and until then no token sees it.
    """

    def __init__(self, B, size, device=None):
        self.length = torch.zeros(B, dtype=torch.long, device=device)  # (B,), tokens held
        self.size = size
        self.buffers = {}  # (layer, name) -> (B, size, ...), in the dtype of what was written first

    def write(self, layer, name, pos, x):
        """Put x (B, T, ...) at positions pos (B, T). Returns the whole buffer (B, size, ...)."""
        if (layer, name) not in self.buffers:
            self.buffers[layer, name] = x.new_zeros(len(x), self.size, *x.shape[2:])
        buffer = self.buffers[layer, name]
        row = torch.arange(len(x), device=x.device)[:, None]  # (B, 1)
        buffer[row, pos] = x.to(buffer.dtype)
        return buffer

    def repeat(self, n):
        """Repeat every row n times, in place, to continue one prompt in n ways."""
        self.buffers = {key: x.repeat_interleave(n, 0) for key, x in self.buffers.items()}
        self.length = self.length.repeat_interleave(n, 0)


class Gate(nn.Module):
    """σ(h W + b), elementwise (Eqs. 9 and 10): h (B, T, C) -> (B, T, width)."""

    def __init__(self, n_embd, width):
        super().__init__()
        self.proj = nn.Linear(n_embd, width)

    def forward(self, h):
        return torch.sigmoid(self.proj(h))


class Indexer(nn.Module):
    """
    The projections of the gated lightning indexer, which attention.index_scores puts together
    (Eq. 7), and the average V̄ that its budget compares with (Eq. 8). V̄ stays 0, and every query
    counts as average, until GSA.update_var_avg is called after a training step.
    """

    def __init__(self, config, rope):
        super().__init__()
        self.config = config
        self.rope = rope
        C, Hi, di = config.n_embd, config.n_index_head, config.d_index
        self.wq = nn.Linear(C, Hi * di, bias=False)
        self.wk = nn.Linear(C, di, bias=False)
        self.ww = nn.Linear(C, Hi)
        if config.index_activation == "sigmoid":
            self.b = nn.Parameter(torch.empty(Hi))
        else:
            self.register_buffer("b", torch.zeros(Hi), persistent=False)
        if config.index_temperature:
            self.log_tau = nn.Parameter(torch.empty(()))  # scalar; all parameters: init_weights
        else:
            self.register_buffer("log_tau", torch.zeros(()), persistent=False)
        self.register_buffer("var_avg", torch.zeros(()))  # V̄, 0 = nothing averaged yet
        # Sum and number of the batch means of Var_t since V̄ was last updated
        self.register_buffer("var_seen", torch.zeros(2), persistent=False)

    def forward(self, h, pos):
        """
        h (B, T, C), pos (1 or B, T) -> attention.Index of these T positions, in the parameters'
        dtype also under autocast: in 16 bits too many scores would be equal.
        """
        B, T, _ = h.shape
        Hi, di = self.config.n_index_head, self.config.d_index
        h = h.detach()  # the index loss does not change the model (and select has no gradient)
        q = self.wq(h).view(B, T, Hi, di)
        k = self.wk(h).view(B, T, 1, di)  # one key for all indexer heads
        w = self.ww(h)  # (B, T, Hi)
        q, k, w = (x.to(self.log_tau.dtype) for x in (q, k, w))
        if self.config.index_rope:  # DEVIATION: attention mass caught 0.84 with, 0.48 without
            q, k = self.rope(q, pos), self.rope(k, pos)
        if self.config.index_activation == "sigmoid":
            w = w.sigmoid()
        return attention.Index(q, k[:, :, 0], w, self.b, self.config.index_activation)

    def budget(self):
        return self.config.budget(self.var_avg)

    def observe(self, var):
        """Note Var_t (B, T) of a training batch, for GSA.update_var_avg."""
        self.var_seen[0] += var.mean()
        self.var_seen[1] += 1


class Attention(nn.Module):
    """One attention layer. With every switch off it is plain causal attention."""

    def __init__(self, config, backend, layer, ropes):
        super().__init__()
        self.config, self.backend = config, backend
        self.layer = layer  # its number, the key of its cache
        self.rope, index_rope = ropes  # one table each for all layers
        C, H, G, d = config.n_embd, config.n_head, config.n_kv_head, config.d_head
        self.wq = nn.Linear(C, H * d, bias=config.qkv_bias)
        self.wk = nn.Linear(C, G * d, bias=config.qkv_bias)
        self.wv = nn.Linear(C, G * d, bias=config.qkv_bias)
        self.wo = nn.Linear(H * d, C, bias=config.o_bias)
        self.q_norm = RMSNorm(d, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config.norm_eps) if config.qk_norm else nn.Identity()
        self.value_gate = Gate(C, G * d) if config.value_gate else None
        self.output_gate = Gate(C, H * d) if config.output_gate else None
        self.indexer = Indexer(config, index_rope) if config.sparse else None

    def queries_and_keys(self, h, pos):
        """h (B, T, C), pos (1 or B, T) -> q (B, T, H, d), k (B, T, G, d)."""
        B, T, _ = h.shape
        q = self.wq(h).view(B, T, self.config.n_head, self.config.d_head)
        k = self.wk(h).view(B, T, self.config.n_kv_head, self.config.d_head)
        return self.rope(self.q_norm(q), pos), self.rope(self.k_norm(k), pos)

    def forward(self, h, visible, cache=None, warmup=False, want_loss=False, want_stats=False,
                chosen=None):
        """
        h (B, T, C), normalised input -> output (B, T, C), index loss (scalar), stats (a dict).
        warmup: phase 1 of the indexer's training, in which attention is dense.
        chosen: what choose_keys has returned for this h; None = it is called here.
        """
        B, T, _ = h.shape
        G, d = self.config.n_kv_head, self.config.d_head
        pos = visible.pos
        gates = {}
        # 1. queries, keys, gated values
        q, k = self.queries_and_keys(h, pos)
        v = self.wv(h)  # (B, T, G·d)
        if self.value_gate is not None:
            gates["value_gate"] = self.value_gate(h)
            v = v * gates["value_gate"]  # Eq. 9
        v = v.view(B, T, G, d)
        if cache is not None:
            k = cache.write(self.layer, "k", pos, k)  # (B, S, G, d)
            v = cache.write(self.layer, "v", pos, v)
        # 2. attention
        index_loss = torch.zeros((), device=h.device)
        selection = None
        if self.indexer is None:
            o = dense_attention(q, k, v, visible)  # (B, T, H, d)
        else:
            index = self.indexer(h, pos)
            if cache is not None:
                index = index._replace(k=cache.write(self.layer, "k_index", pos, index.k))
            if chosen is None:
                chosen = self.choose_keys(index, visible, warmup, want_stats)
            attended, selection = chosen
            o, lse = attention.sparse_attention(q, k, v, attended, self.backend)
            if want_loss:
                index_loss = attention.index_loss(q, k, lse, index, self.indexer.log_tau, attended,
                                                  self.backend)
        # 3. gated output
        o = o.reshape(B, T, -1)  # (B, T, H·d)
        if self.output_gate is not None:
            gates["output_gate"] = self.output_gate(h)
            o = o * gates["output_gate"]  # Eq. 10
        stats = {}
        if want_stats:
            stats = layer_stats(q, k, visible, selection, self.indexer, warmup, gates)
        return self.wo(o), index_loss, stats

    def choose_keys(self, index, visible, warmup, want_stats):
        """
        Returns two Selections: the keys that attention uses and those that the indexer selects.
        They differ in warm-up, where attention uses every visible key.
        """
        # 1. the keys
        budget = self.indexer.budget()
        everything = attention.Selection.everything(visible, len(index.q))
        if warmup and not want_stats:
            selection = everything  # nothing needs the selected keys
        elif not (self.training or want_stats) and visible.max_visible <= budget.k_min:
            selection = everything  # exact: who sees at most k_min keys selects them all
        else:
            selection = attention.select(index, visible, budget, self.backend)  # Eqs. 7, 8
        # 2. V̄
        if self.training and budget.adaptive:
            var = selection.var
            if var is None:  # nothing was selected
                var = attention.score_variance(index, visible, self.backend)
            self.indexer.observe(var)
        if warmup:
            return everything, selection
        return selection, selection


def make_ropes(config):
    """The rotary tables of all layers: the attention's, and the indexers' (None without)."""
    rope = RoPE(config.block_size, config.d_head, config.rope_base, config.rope_scaling)
    if not config.sparse:
        return rope, None
    # CHOICE: the indexer gets YaRN's frequencies and no attention factor, as in DeepSeek-V3.2.
    # The factor sharpens a softmax over more keys. The indexer's softmax has τ for that, which is
    # learned; inside σ the factor would change Var_t, and so the budgets, against the stored V̄
    scaling = config.rope_scaling | {"attention_factor": 1.0}
    return rope, RoPE(config.block_size, config.d_index, config.rope_base, scaling)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    # Keep only the block's input and its selected keys for the backward pass, which computes the
    # rest again: about a third more arithmetic, and far less memory (plan.py, "activations")
    activation_checkpointing = False

    def __init__(self, config, backend, layer, ropes):
        super().__init__()
        C = config.n_embd
        self.norm1, self.norm2 = RMSNorm(C, config.norm_eps), RMSNorm(C, config.norm_eps)
        self.attn = Attention(config, backend, layer, ropes)
        self.mlp = MLP(C, config.d_mlp, config.mlp_bias)

    def forward(self, x, visible, **how):
        """how: the other arguments of Attention.forward, whose results this returns."""
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return self.compute(x, visible, **how)
        how["chosen"] = self.choose_keys_once(x, visible, how["warmup"], how["want_stats"])
        # the model draws no random numbers
        return checkpoint(self.compute, x, visible, **how, use_reentrant=False,
                          preserve_rng_state=False)

    @torch.no_grad()
    def choose_keys_once(self, x, visible, warmup, want_stats):
        """
        Attention.choose_keys for the block's input x. It stands outside of what the backward pass
        repeats: the top-k is computed once per step, and V̄ sees each batch once.
        """
        indexer = self.attn.indexer
        if indexer is None:
            return None
        index = indexer(self.norm1(x), visible.pos)
        return self.attn.choose_keys(index, visible, warmup, want_stats)

    def compute(self, x, visible, **how):
        a, index_loss, stats = self.attn(self.norm1(x), visible, **how)
        x = x + a
        x = x + self.mlp(self.norm2(x))
        if stats:
            stats["max_activation"] = x.detach().abs().max()
        return x, index_loss, stats


class GSA(nn.Module):
    """The language model. backend: the path that computes the attention, see attention.py."""

    def __init__(self, config, backend="auto"):
        super().__init__()
        resolve_backend(backend)
        self.config = config
        # Rows of the embedding, padded for the matrix units; the extra ones are never output
        rows = (config.vocab_size + 63) // 64 * 64
        self.embed = nn.Embedding(rows, config.n_embd)
        # The output projection; None = the embedding is
        self.unembed = None if config.tie_embed else nn.Linear(config.n_embd, rows, bias=False)
        ropes = make_ropes(config)
        self.blocks = nn.ModuleList(Block(config, backend, i, ropes)
                                    for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        parameter               initial value; N(mean, standard deviation)
        gates: weight           N(0, 0.1/√C): all gates start nearly equal,
               bias             gate_bias_init: half open
        wo, mlp.down            N(0, 1/√(2·C·n_layer)): the residual stream stays as large;
                                0 with identity_init
        embed, other matrices   N(0, 1/√C): outputs of size 1 at any width. GPT-2's 0.02 is the
                                same at C = 2500; at C = 128 it delays retrieval (LOG.md)
        indexer: ww's bias      0; for the ReLU indexer 1/Hi: its heads' mean weights add up to 1
                 b              0
                 log_tau        log 4
        norms                   1
        other biases            0; of the first layer's q and k see layers.look_back
        """
        c = self.config
        std = c.n_embd ** -0.5
        out_std = 0.0 if c.identity_init else std / math.sqrt(2 * c.n_layer)
        ww_bias = 0.0 if c.index_activation == "sigmoid" else 1 / c.n_index_head
        table = (  # the last two parts of a parameter's name, and how it is filled
            ("proj.weight", nn.init.normal_, 0.0, 0.1 * std),
            ("proj.bias", nn.init.constant_, c.gate_bias_init),
            ("wo.weight down.weight", nn.init.normal_, 0.0, out_std),
            ("embed.weight wq.weight wk.weight wv.weight ww.weight gate_up.weight unembed.weight",
             nn.init.normal_, 0.0, std),
            ("ww.bias", nn.init.constant_, ww_bias),
            ("indexer.b", nn.init.constant_, 0.0),
            ("indexer.log_tau", nn.init.constant_, math.log(4)),
            ("norm1.weight norm2.weight norm.weight q_norm.weight k_norm.weight",
             nn.init.constant_, 1.0),
            ("wq.bias wk.bias wv.bias wo.bias gate_up.bias down.bias", nn.init.constant_, 0.0),
        )
        filled = []
        for names, fill, *numbers in table:
            for name, p in self.named_parameters():
                if ".".join(name.split(".")[-2:]) in names.split():
                    fill(p, *numbers)
                    filled.append(name)
        assert sorted(filled) == sorted(name for name, _ in self.named_parameters())
        if c.look_back:
            first = self.blocks[0].attn
            look_back(first.wq.bias, first.wk.bias, first.rope, c.look_back)

    def trunk(self, idx, doc_start=None, cache=None, warmup=False, want_loss=False,
              want_stats=False):
        """
        forward without the output projection, which sample.py and eval.py need for a few tokens
        only: idx (B, T) -> normalised hidden states (B, T, C), index loss (scalar), stats.
        """
        # 1. what each token may see
        if idx.dim() != 2 or idx.numel() == 0:
            raise ValueError(f"idx has shape {tuple(idx.shape)}, not (B, T) with B, T at least 1")
        if doc_start is not None and doc_start.shape != idx.shape:
            raise ValueError(f"doc_start has shape {tuple(doc_start.shape)}, "
                             f"not that of idx, {tuple(idx.shape)}")
        T = idx.size(1)
        if cache is None:
            n_used, room = T, self.config.block_size
            visible = attention.Visible.causal(T, doc_start, idx.device)
        else:
            pos = cache.length[:, None] + torch.arange(T, device=idx.device)  # (B, T)
            n_used = int(pos[:, -1].max()) + 1  # the one GPU→CPU sync
            room = min(cache.size, self.config.block_size)
            visible = attention.Visible(pos, cache.size, doc_start, n_used)
        if n_used > room:
            raise ValueError(f"{n_used} tokens do not fit in the cache or the context ({room})")
        if cache is not None:
            cache.length = cache.length + T
        # 2. the layers
        x = self.embed(idx)  # (B, T, C)
        index_loss = torch.zeros((), device=idx.device)
        per_layer = []
        for block in self.blocks:
            x, layer_loss, block_stats = block(x, visible, cache=cache, warmup=warmup,
                                               want_loss=want_loss, want_stats=want_stats)
            index_loss = index_loss + layer_loss
            per_layer.append(block_stats)
        stats = {name: torch.stack([s[name] for s in per_layer]) for name in per_layer[0]}
        return self.norm(x), index_loss, stats

    def head(self, x):
        """x (B, T, C) -> logits (B, T, vocab_size)."""
        weight = self.embed.weight if self.unembed is None else self.unembed.weight
        return F.linear(x, weight)[..., :self.config.vocab_size]

    def forward(self, idx, targets=None, doc_start=None, cache=None, warmup=False, stats=False):
        """
        idx (B, T) int64 -> GSAOutput.
        targets    (B, T) int64, -1 = ignored; with them loss and index_loss are computed
        doc_start  (B, T), position in the row at which each token's document starts (see
                   attention.document_starts); a token sees its own document only. None = no limit
        cache      KVCache to append to; the tokens' positions in the row begin at its length
        warmup     phase 1 of the indexer's training: attention is dense
        stats      measure the attention too (measure.layer_stats), in O(T²) time
        Raises ValueError where the tokens do not fit in the context or the cache.
        """
        x, index_loss, stats = self.trunk(idx, doc_start, cache, warmup,
                                          want_loss=targets is not None, want_stats=stats)
        logits = self.head(x)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                                   ignore_index=-1)
        return GSAOutput(logits, loss, index_loss, stats)

    @torch.no_grad()
    def update_var_avg(self, skip=None, decay=0.99):
        """
        V̄ <- decay·V̄ + (1-decay)·(mean Var_t since the last call), over all ranks.
        Call it once per optimizer step. skip: a tensor of 1 where the step is skipped: V̄ stays.
        """
        if not self.config.sparse:
            return
        indexers = [block.attn.indexer for block in self.blocks]
        seen = torch.stack([i.var_seen for i in indexers])  # (n_layer, 2)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen)
        total, count = seen.unbind(1)  # (n_layer,) each
        var_avg = torch.stack([i.var_avg for i in indexers])  # (n_layer,)
        old = torch.where(var_avg > 0, var_avg, total / count)  # the first mean counts in full
        new = decay * old + (1 - decay) * total / count  # NaN where count is 0
        counts = count > 0 if skip is None else (count > 0) & (skip == 0)
        new = torch.where(counts, new, var_avg)  # an `if` would be a GPU→CPU sync
        for indexer, value in zip(indexers, new):
            indexer.var_avg.copy_(value)
            indexer.var_seen.zero_()


if __name__ == "__main__":  # python model.py --export out --to hf_out
    import configurator
    import export
    configurator.run(export.main)
