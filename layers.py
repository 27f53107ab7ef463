"""
What every Llama-style decoder has: RMSNorm, rotary positions, the SwiGLU block. Nothing here is of
the paper; model.py fills the parameters (GSA.init_weights).
"""
import math
from numbers import Real

import torch
import torch.nn as nn
import torch.nn.functional as F

# rope_type -> the entries that a rope_scaling must have, and those that it may have
ROPE_SCALING = {
    "default": ("", ""),
    "linear": ("factor", ""),
    "llama3": ("factor original_max_position_embeddings low_freq_factor high_freq_factor", ""),
    "yarn": ("factor original_max_position_embeddings",
             "beta_fast beta_slow truncate attention_factor mscale mscale_all_dim"),
}


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


def check_rope_scaling(scaling, base):
    """
    Refuse a rope_scaling that rope_speeds does not know: a dict as in Hugging Face's config.json,
    {} = none. Raises ValueError.
    """
    if not scaling:
        return
    kind = scaling.get("rope_type")
    if kind not in tuple(ROPE_SCALING):  # "in" a dict would raise for a list, which has no hash
        raise ValueError(f"rope_scaling: rope_type {kind!r} is not one of "
                         f"{', '.join(ROPE_SCALING)}")
    needed, optional = (names.split() for names in ROPE_SCALING[kind])
    for name in needed:
        if name not in scaling:
            raise ValueError(f"rope_scaling of type {kind} lacks {name!r}")
    for name, value in scaling.items():
        if name not in ["rope_type"] + needed + optional:
            raise ValueError(f"rope_scaling of type {kind} has no entry {name!r}")
        number = isinstance(value, Real) and not isinstance(value, bool)
        if name == "truncate" and not isinstance(value, bool):
            raise ValueError(f"rope_scaling: truncate is {value!r}, must be true or false")
        if name not in ("rope_type", "truncate") and not (number and 0 < value < math.inf):
            raise ValueError(f"rope_scaling: {name} is {value!r}, must be a positive number")
    if scaling.get("factor", 1) < 1:
        raise ValueError(f"rope_scaling: factor is {scaling['factor']}, must be at least 1")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError("rope_scaling: low_freq_factor is not below high_freq_factor")
    if kind == "yarn" and scaling.get("beta_slow", 1) > scaling.get("beta_fast", 32):
        raise ValueError("rope_scaling: beta_slow is above beta_fast")
    if kind == "yarn" and base <= 1:
        raise ValueError(f"rope_scaling of type yarn needs a rope_base above 1, not {base}")


def rope_speeds(width, base, scaling):
    """
    How fast RoPE turns each pair of a head, in radians per token, (width/2,) float64; and the
    attention factor, by which cos and sin are multiplied (so q·k by its square).

    scaling stretches the positions, so that a model trained at L tokens reads factor·L of them.
    A pair that turns often within L tells near positions apart, and keeps its speed. A slow pair
    would meet angles that it never saw: its speed is divided by factor.
        linear  every speed is divided by factor (arXiv 2306.15595)
        llama3  by the number of turns within L: fast above high_freq_factor, slow below
                low_freq_factor, a mean of both between (Llama 3.1)
        yarn    fast above beta_fast turns, slow below beta_slow (arXiv 2309.00071,
                "NTK-by-parts"), and an attention factor. Between the two the paper mixes by the
                number of turns, its code by the number of the pair; so do we
    """
    speed = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)  # (width/2,)
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return speed, 1.0
    # the share of its speed that a pair keeps, (width/2,): 1 = fast, 0 = slow
    attention_factor = 1.0
    if kind == "linear":
        kept = torch.zeros_like(speed)
    elif kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * speed / (2 * math.pi)
        kept = (turns - low) / (high - low)
    else:
        kept = yarn_kept(width, base, scaling)
        attention_factor = yarn_attention_factor(scaling)
    kept = kept.clamp(0, 1)
    return speed * (kept + (1 - kept) / scaling["factor"]), attention_factor


def yarn_kept(width, base, scaling):
    """
    The share of its speed that each pair keeps, (width/2,), before it is cut to 0 … 1. It falls
    from 1 at the pair that turns beta_fast times within L to 0 at that which turns beta_slow times.
    """
    def pair_that_turns(n):
        # a fraction; solves L·base^(-2·pair/width) = 2π·n
        length = scaling["original_max_position_embeddings"]
        return width * math.log(length / (2 * math.pi * n)) / (2 * math.log(base))

    first = pair_that_turns(scaling.get("beta_fast", 32))
    last = pair_that_turns(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    # The paper's code clamps to width − 1, although there are width/2 pairs; so do we.
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001
    pair = torch.arange(width // 2, dtype=torch.float64)
    return 1 - (pair - first) / (last - first)


def yarn_attention_factor(scaling):
    """
    √(1/t) = 0.1·ln(factor) + 1: softmax over more keys is flatter, and q·k/t makes up for it
    (arXiv 2309.00071). mscale and mscale_all_dim (DeepSeek) take two such factors' ratio.
    """
    if "attention_factor" in scaling:
        return scaling["attention_factor"]
    growth = 0.1 * math.log(scaling["factor"])
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return (growth * scaling["mscale"] + 1) / (growth * scaling["mscale_all_dim"] + 1)
    return growth + 1


class RoPE(nn.Module):
    """
    Rotary position embedding (RoFormer): the two halves of a head, rotated in pairs.
    scaling: see rope_speeds; {} = none.
    """

    def __init__(self, block_size, width, base, scaling={}):
        super().__init__()
        # float64: a float32 angle of 1e5 would be wrong by 4e-3
        speed, factor = rope_speeds(width, base, scaling)
        pos = torch.arange(block_size, dtype=torch.float64)
        angle = pos[:, None, None] * speed  # (block_size, 1, width/2)
        self.register_buffer("cos", (angle.cos() * factor).float(), persistent=False)
        self.register_buffer("sin", (angle.sin() * factor).float(), persistent=False)

    def forward(self, x, pos):
        """x (B, T, H, width) at positions pos (1 or B, T)."""
        cos = self.cos[pos].to(x.dtype)  # (1 or B, T, 1, width/2)
        sin = self.sin[pos].to(x.dtype)
        x1, x2 = x.chunk(2, -1)  # (B, T, H, width/2)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


@torch.no_grad()
def look_back(q_bias, k_bias, rope, strength):
    """
    Fill the biases of q (H·d) and k (G·d), in place: head h then prefers the key h + 1 tokens
    before the query, whatever the tokens are. With θ_i the speeds of rope's pairs, the biases add
        strength² · Σ_i cos(θ_i · (distance - (h + 1)))
    to q·k, over the faster half of the pairs: the slower ones cannot tell neighbours apart.
    """
    width = 2 * rope.cos.size(-1)
    fast = width // 4  # pairs i = 0 … fast - 1; their two halves are i and width/2 + i
    k_bias.view(-1, width)[:, :fast] = strength
    q = q_bias.view(-1, width)  # (H, d)
    back = torch.arange(1, len(q) + 1)
    # the key's bias, turned back by so many positions
    q[:, :fast] = strength * rope.cos[back, 0, :fast]
    q[:, width // 2:width // 2 + fast] = -strength * rope.sin[back, 0, :fast]


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, n_embd, hidden, bias=False):
        super().__init__()
        self.gate_up = nn.Linear(n_embd, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, n_embd, bias=bias)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def dense_attention(q, k, v, visible):
    """Attention over every visible key: q (B, T, H, d), k and v (B, S, G, d) -> (B, T, H, d)."""
    bias = None
    if not visible.plain:
        k, v = k[:, :visible.n_used], v[:, :visible.n_used]
        bias = visible.bias(q.dtype)[:, None]  # (1 or B, 1, T, n_used)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or G, T or S, d)
    if bias is not None and q.is_cuda:
        # PyTorch's fused kernels take a mask or fewer KV heads, not both: it would fall back to
        # its own eager attention, with O(T·S) memory
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))  # (B, H, S, d)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None,
                                       enable_gqa=q.size(1) != k.size(1))
    return o.transpose(1, 2)
