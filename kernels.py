"""
The computations of Gated Sparse Attention (GSA, arXiv 2601.15305), without parameters: model.py owns those.

Three stages, each with an eager reference (the oracle: one line per equation, O(T·S) memory), a tiled PyTorch path (some
queries at a time, O(tile·S) memory) and Triton kernels that give the same numbers:

    select            lightning indexer scores (Eq. 7), variance, budget (Eq. 8), exact top-k
    sparse_attention  softmax attention over the selected keys, forward and backward
    index_loss        KL from the layer's real attention to the indexer's, forward and backward

`backend` names the path: "eager", "torch", "triton", or "auto", which is Triton on a GPU and PyTorch elsewhere. There is no
silent fallback: a backend that cannot run raises.
The symbols and the layout (B, T, H, d) are those at the top of model.py.
"""
import collections
import functools
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
import types
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # made for Linux; the other paths need none of it
    triton, tl = None, types.SimpleNamespace(constexpr=None)

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it where a kernel is defined
BACKENDS = ("eager", "torch", "triton")
TILE = 256  # queries per tile of the PyTorch path
ROWS = 64  # of them at a time where they share their keys: logits that stay in cache
PRICE = 3  # of a query's own keys: as much as so many times more that a tile shares, as measured on a CPU
JOB = 1 << 21  # logits of queries with their own keys that are computed at a time
PIECE = 1 << 16  # scores that are computed at a time, so that they stay in cache,
KEYS = 512  # but of at least so many keys
SCORES_BYTES = 32 << 20  # of a chunk's scores, which should stay in L2
PARTIAL_BYTES = 1 << 30  # of the gradients that wait to be summed; with less the sums are read and written more often
PROGRAMS = 256  # enough to fill a GPU
DETERMINISTIC = True  # dk and dv of the Triton path summed in one order; False: by atomics, faster
HIDDEN = -1e30  # added to a masked score: exp gives exactly 0, and unlike -inf it can be added to and subtracted from
FINITE = 1e29  # limit of scores in the PyTorch path's top-k: ±inf must not pass HIDDEN or FORCED
FORCED = 1e30  # score of a key that must be selected: above all real ones
LIST_BYTES = 64 << 20  # larger union lists are cut to their true length, at one host sync


def without_wgmma(sm):
    """
    Does a GPU of compute capability sm / 10 multiply by mma.sync only? These are Ampere and Ada
    (80 to 89) and consumer Blackwell (120). Their operands come through registers, and all but
    sm_80 and sm_87 have only 99 KB of shared memory for a block.
    """
    return sm < 90 or sm >= 120


def tile_rows(sm, row_bytes, fp32):
    """
    Rows of a tile's matrix product, each of row_bytes: as many as spill no register and fit into
    shared memory.
    """
    if row_bytes > 256:
        return max(16, (16 << 10) >> (row_bytes - 1).bit_length())  # 16 KB of rows, padded to 2^n
    return 64 if fp32 and without_wgmma(sm) else 128


def tile_queries(sm, heads, row_bytes, index_heads=0, index_row_bytes=0, fp32=False):
    """
    Queries per tile of the Triton path, at most 32 (a word has a bit for each): as many as make
    tile_rows rows of a matrix product with the query heads of a key head; for the indexer's loss,
    whose indexer is in fp32, with its heads too. The more queries share a tile, the fewer keys are
    gathered.
    """
    tq = min(32, tile_rows(sm, row_bytes, fp32) >> (heads - 1).bit_length())
    if index_heads:
        tq = min(tq, tile_rows(sm, index_row_bytes, True) >> (index_heads - 1).bit_length())
    return tq


def launch_options(name, sm, d, rows=128, itemsize=2, ieee=False):
    """
    Keys per step, warps and pipeline stages of a kernel on a GPU of compute capability sm / 10, at
    head width d, with so many rows to a tile and bytes to a number: of those tried, the largest
    that spill no register and fit into the shared memory of every GPU with this matrix unit
    (`python kernels.py --report`). scores: its own queries per tile.
    ieee: fp32 products without the matrix unit, which take most registers: the smallest blocks.
    """
    row_bytes = d * itemsize
    small = without_wgmma(sm) or row_bytes > 256
    if name == "scores":
        if row_bytes > 256:
            return dict(TQ=8, BN=32, num_warps=4, num_stages=3)
        return dict(TQ=16, BN=32 if ieee else 64, num_warps=4, num_stages=3)
    if name in ("select", "pack"):
        return dict(BS=1024, num_warps=4, num_stages=1)
    if name == "sum":
        return dict(BN=64 if d <= 128 else 32, num_warps=4, num_stages=1)
    if name == "attend":
        options = dict(BN=64, num_warps=8 if rows > 64 or ieee else 4, num_stages=3)
        if small or itemsize == 4:
            options["BN"] = 32
        if ieee or row_bytes > 512:
            options["BN"] = 16
        return options
    if name == "attend backward":
        options = dict(BN=64, num_warps=8, num_stages=1)
        if small:
            options["BN"] = 32
        if ieee or row_bytes > 512 or (without_wgmma(sm) and d > 64):
            options["BN"] = 16
        return options
    assert name == "index loss", name
    return dict(BN=16 if small or ieee else 32, num_warps=8, num_stages=1)


def jit(kernel):
    """triton.jit, or nothing where there is no Triton: this file imports everywhere."""
    return triton.jit(kernel) if triton else kernel


# ----------------------------------------------------------------------------------------------------------------
# What travels between the stages

class Index(NamedTuple):
    """The indexer's projections of one layer. `w` is after its sigmoid (raw for the ReLU indexer of DSA)."""
    q: Tensor  # (B, T, Hi, di)
    k: Tensor  # (B, S, di), one key shared by the indexer heads
    w: Tensor  # (B, T, Hi)
    b: Tensor  # (Hi,)
    activation: str = "sigmoid"  # or "relu"


class Budget(NamedTuple):
    """How many keys a query gets (Eq. 8) and which it always gets. var_avg is V̄, a stored number."""
    rule: str = "inverse"  # "inverse" | "eq8" | "fixed"
    k_base: int = 512
    k_min: int = 128
    k_max: int = 1024
    n_sink: int = 0
    n_local: int = 0
    var_avg: Tensor | None = None  # (), 0 while nothing has been averaged yet

    @property
    def widest(self):
        """The largest k_t there can be."""
        return max(self.k_min, min(self.k_base, self.k_max)) if self.rule == "fixed" else self.k_max


class Tile(NamedTuple):
    """Queries t0…t1-1, none of which may attend to a key outside begin…end-1, and all of which may to keys low…high-1."""
    t0: int
    t1: int
    begin: int
    end: int
    low: int
    high: int

    @property
    def queries(self):
        return slice(self.t0, self.t1)

    @property
    def keys(self):
        return slice(self.begin, self.end)


def document_starts(doc, pos, last_doc=None, last_start=None):
    """
    Where the document of each position starts: doc, pos (B or 1, T) -> (B, T). A document is a run
    of equal ids: an id that comes back later is another document.
    Ids 7 7 3 3 7 at positions 0 1 2 3 4 -> 0 0 2 2 4.
    last_doc, last_start (B,): those of the position before the first, which may be in the same document.
    """
    start = torch.where(torch.cat((torch.ones_like(doc[:, :1]), doc.diff(dim=1)), 1) != 0, pos, 0)
    if last_doc is not None:
        start[:, 0] = torch.where(doc[:, 0] == last_doc, last_start, start[:, 0])
    return start.cummax(1).values


@dataclass
class Visible:
    """Which keys a query may attend to: those at its own position or before, down to the start of its document."""
    pos: Tensor                  # (B or 1, T) position of each query among the keys, strictly increasing along T
    n_keys: int                  # S
    start: Tensor | None = None  # (B, T) first position of the query's document; None = 0

    @classmethod
    def causal(cls, T, doc=None, device=None):
        """
        The usual case: T queries at positions 0…T-1 over T keys. doc (B, T): a document id per
        position, or None for one document. A document is a run of equal ids: an id that comes back
        later is another document.
        """
        pos = torch.arange(T, device=device)[None]
        return cls(pos, T, None if doc is None else document_starts(doc, pos))

    @property
    def plain(self):
        """One document, as many keys as queries: what is_causal of torch's attention means."""
        return self.start is None and self.pos.size(0) == 1 and self.pos.size(1) == self.n_keys

    @functools.cached_property
    def tiles(self):
        """The queries in tiles of TILE (one copy from the device for all of them)."""
        T = self.pos.size(1)
        t0 = list(range(0, T, TILE))
        t1 = t0[1:] + [T]
        last = [t - 1 for t in t1]
        bounds = torch.stack((self.pos.amax(0)[last], self.pos.amin(0)[t0])) + 1
        starts = torch.zeros_like(bounds) if self.start is None else torch.stack((self.start.amin(0)[t0], self.start.amax(0)[last]))
        (ends, highs), (begins, lows) = bounds.tolist(), starts.tolist()
        return [Tile(*x) for x in zip(t0, t1, begins, ends, lows, highs)]

    @property
    def whole(self):
        """All queries as one tile."""
        return self.tiles[-1]._replace(t0=0, begin=self.tiles[0].begin, high=self.tiles[0].high)

    def mask(self, tile=None):
        """True = visible: (B or 1, tq, end-begin) for a tile, (B or 1, T, S) without."""
        t0, t1, begin, end = tile[:4] if tile else (0, self.pos.size(1), 0, self.n_keys)
        key = torch.arange(begin, end, device=self.pos.device)
        mask = key <= self.pos[:, t0:t1, None]
        return mask if self.start is None else mask & (key >= self.start[:, t0:t1, None])

    def bias(self, tile):
        """The mask as an addend, 0 or HIDDEN. On a CPU adding it is 20 times faster than masked_fill."""
        return self.mask(tile).float().sub_(1).mul_(-HIDDEN)


class Job:
    """
    A piece of the PyTorch path's work: neighbouring queries and their keys, which are the same U for the tq queries of a group
    (0 or HIDDEN in bias for each). As rows of products, the R = H/G heads of a kv head beside each other, q is (groups, G, R·tq, d).
    """

    def rows(self, x, G):
        """These queries of x: (B, T, H, ...) -> (groups, G, R·tq, ...)."""
        return x[:, self.queries].reshape(self.groups, self.bias.size(1), G, x.size(2) // G, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)

    def store(self, out, x):
        """The inverse of rows: x (groups, G, R·tq, ...) into out (B, T, H, ...)."""
        out, tq = out[:, self.queries], self.bias.size(1)
        x = x.view(len(out), -1, x.size(1), x.size(2) // tq, tq, x[0, 0, 0].numel()).permute(0, 1, 4, 2, 3, 5)
        out.view(x.shape).copy_(x)

    def logits(self, q, k, scratch):
        """q·k/√d, HIDDEN lower where a key is not selected: q (groups, G, R·tq, d), k (B, S, G, d) -> (groups, G, R·tq, U)."""
        s = scratch(q, "logits", *q.shape[:3], self.bias.size(2))
        s.view(len(s), -1, *self.bias.shape[1:]).copy_(self.bias[:, None])
        return self.products(q, k, s, 1 / math.sqrt(q.size(-1)))


class Shared(Job):
    """Queries that share a range of keys, all they see, and a mask over it: dense products."""

    def __init__(self, queries, keys, bias):
        self.queries, self.keys, self.bias, self.groups = queries, keys, bias, len(bias)  # two slices of each sequence; (B, tq, U), 0 or HIDDEN

    def products(self, q, k, out, alpha=1):
        """out += α·q·k, sequence by sequence: in four dimensions what is not contiguous would be copied."""
        for i in range(len(q)):
            out[i].baddbmm_(q[i], k[i, self.keys].permute(1, 2, 0), alpha=alpha)
        return out

    def weighted(self, p, v):
        """p·v: p (groups, G, R·tq, U), v (B, S, G, d) -> (groups, G, R·tq, d)."""
        out = p.new_empty(*p.shape[:3], v.size(-1))
        for i in range(len(p)):
            torch.bmm(p[i], v[i, self.keys].transpose(0, 1), out=out[i])
        return out

    def spread(self, p, x, out, alpha=1):
        """The adjoint of weighted: out (B, S, G, d) += α·pᵀ·x, x (groups, G, R·tq, d)."""
        for i in range(len(p)):
            out[i, self.keys].transpose(0, 1).baddbmm_(p[i].transpose(1, 2), x[i], alpha=alpha)


class Own(Job):
    """Queries that each have their own keys: products of sparse matrices, which gather nothing but read the keys where they are."""

    def __init__(self, queries, indices, n_keys):
        self.queries, indices = queries, indices[:, queries]  # (B, tq, U)
        self.bias = (indices < 0).flatten(0, 1)[:, None].float().mul_(HIDDEN)  # (groups, 1, U)
        first = n_keys * torch.arange(len(indices), dtype=torch.int32, device=indices.device)  # of each sequence, among all B·S keys
        self.keys = (indices.clamp(min=0) + first[:, None, None]).flatten(0, 1)  # (groups, U) int32
        self.groups = len(self.keys)

    def columns(self, G, R):
        """Which rows of k.view(B·S·G, d) each row of q.view(groups·H, d) goes with: (groups·H, U) int32."""
        heads = torch.arange(G, dtype=torch.int32, device=self.keys.device).repeat_interleave(R)
        return (self.keys[:, None] * G + heads[:, None]).flatten(0, 1)

    def products(self, q, k, out, alpha=1):
        columns, q = self.columns(*q.shape[1:3]), q.flatten(0, 2)
        starts = torch.arange(len(columns) + 1, dtype=torch.int32, device=q.device) * columns.size(1)
        a = torch.sparse_csr_tensor(starts, columns.flatten(), out.flatten(), (len(q), k[..., 0].numel()), check_invariants=False)
        torch.sparse.sampled_addmm(a, q, k.flatten(0, 2).T, alpha=alpha, out=a)
        return out

    def weighted(self, p, v):
        o = F.embedding_bag(self.columns(*p.shape[1:3]), v.flatten(0, 2), mode="sum", per_sample_weights=p.flatten(0, 2))
        return o.view(*p.shape[:3], -1)

    @functools.cached_property
    def by_key(self):
        """The pairs of query and key in the order of the keys: which they are, the keys that occur, and where these begin."""
        keys, order = self.keys.flatten().sort()
        used, counts = keys.unique_consecutive(return_counts=True)
        return order, used, counts.cumsum(0) - counts

    def spread(self, p, x, out, alpha=1):
        (G, R), (order, used, begin) = p.shape[1:3], self.by_key
        weights = p.permute(0, 3, 1, 2).reshape(-1, G * R).index_select(0, order).mul_(alpha).view(-1, G, R)
        rows = (order // self.keys.size(1) * (G * R))[:, None] + torch.arange(R, device=order.device)
        for g in range(G):
            sums = F.embedding_bag((rows + g * R).flatten(), x.flatten(0, 2), begin * R, mode="sum", per_sample_weights=weights[:, g].flatten())
            out.flatten(0, 1)[:, g].index_add_(0, used, sums)


class Scratch(dict):
    """Memory that one job after the other uses: mapping the pages of new memory took a CPU up to a tenth of the time."""

    def __call__(self, like, name, *shape):
        """An uninitialised tensor of like's dtype and device, where the last one of this name was."""
        name, n = (name, like.dtype), math.prod(shape)
        if name not in self or self[name].numel() < n:
            self.pop(name, None)
            self[name] = like.new_empty(1 << n.bit_length())  # jobs grow along a sequence: not each of them anew
        return self[name][:n].view(shape)


@dataclass
class Selection:
    """The keys S_t of every query, one set for all its heads. Saved for the backward pass, never recomputed."""
    visible: Visible
    budget: Tensor         # (B, T) int64, k_t = |S_t|
    indices: Tensor | None  # (B, T, max k_t) int32 in no particular order, -1 = none; None = every visible key
    var: Tensor | None = None  # (B, T) Var_t, population variance of the scores over the visible keys
    packed: dict = field(default_factory=dict)  # what lists() has returned, by tq

    def lists(self, tq):
        """
        The union lists of the Triton path by tiles of tq queries: offsets, keys, words (see _pack)
        and the most keys that a tile can have, a number. The first three are None where every
        visible key is selected.

        A tile of tq queries with `width` keys each has at most min(S, tq·width) keys, and none
        after the position of its last query t, which is at most S - T + t (positions increase along
        T). So the lists are allocated without asking the GPU how long they are. Only where this
        bound is above LIST_BYTES the true numbers are read, all by one synchronisation.
        """
        S, T = self.visible.n_keys, self.visible.pos.size(1)
        if self.indices is None:
            return None, None, None, S
        if tq not in self.packed:
            B, _, width = self.indices.shape
            widest = min(S, tq * width)
            size = B * sum(min(S - T + min(t + tq, T), widest) for t in range(0, T, tq))
            offsets, keys, words = _pack(self.indices, S, tq, size)
            if 8 * size > LIST_BYTES:
                size, widest = torch.stack((offsets[-1], offsets.diff().max())).tolist()
                keys, words = keys[:size].clone(), words[:size].clone()
            self.packed[tq] = offsets, keys, words, widest
        return self.packed[tq]

    @classmethod
    def everything(cls, visible, B):
        """S_t = all visible keys: dense attention (the warm-up phase)."""
        first = 0 if visible.start is None else visible.start
        return cls(visible, (visible.pos - first + 1).expand(B, -1), None)

    def mask(self):
        """True = selected: (B, T, S) bool. O(T·S) memory, for tests and analysis."""
        B, T = self.budget.shape
        full = torch.zeros(B, T, self.visible.n_keys, dtype=torch.bool, device=self.budget.device)
        for tile in self.visible.tiles:
            full[:, tile.queries, tile.keys] = self.bias(tile) == 0
        return full

    def bias(self, tile):
        """What to add to a tile's scores so that only selected keys remain: 0 or HIDDEN, (B or 1, tq, end-begin)."""
        if self.indices is None:
            return self.visible.bias(tile)
        idx, width = self.indices[:, tile.queries].long(), tile.end - tile.begin
        bias = torch.full((*idx.shape[:2], width + 1), HIDDEN, device=idx.device)
        bias.scatter_(2, torch.where(idx < 0, width, idx - tile.begin), 0.0)  # the -1s land in a column that is dropped
        return bias[..., :width]

    def jobs(self, heads):
        """The PyTorch path's work for so many heads, as Jobs: Shared where the queries of a tile see few keys, else Own."""
        B, width = len(self.budget), 0 if self.indices is None else self.indices.size(2)
        many = lambda tile: width and tile.end - tile.begin > (PRICE if tile.t1 - tile.t0 > 1 else 1) * width
        for own, tiles in itertools.groupby(self.visible.tiles, many):
            tiles = list(tiles)
            if own:
                step = max(1, JOB // (B * heads * width))
                for t in range(tiles[0].t0, tiles[-1].t1, step):
                    yield Own(slice(t, min(t + step, tiles[-1].t1)), self.indices, self.visible.n_keys)
                continue
            for tile in tiles:
                for t, bias in zip(range(tile.t0, tile.t1, ROWS), self.bias(tile).expand(B, -1, -1).split(ROWS, 1)):
                    n = tile.end - tile.begin - (tile.t1 - t - bias.size(1))  # positions increase: queries before the last see less
                    yield Shared(slice(t, t + bias.size(1)), slice(tile.begin, tile.begin + n), bias[..., :n])


def check_backend(backend, x=None):
    """The path that `backend` means for tensor x, "auto" being "triton" on a GPU and "torch" elsewhere; ValueError where it cannot run."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    if x is None:
        return backend
    if backend == "auto":
        return "triton" if x.is_cuda else "torch"
    if backend == "triton":
        if triton is None:
            raise ValueError("backend 'triton': the package triton is not installed")
        if not x.is_cuda and not INTERPRET:
            raise ValueError(f"backend 'triton' needs a GPU, and this tensor is on {x.device}; to run the kernels in Triton's interpreter, slowly, "
                             "set TRITON_INTERPRET=1 before Python starts")
    return backend


def _check(backend, selected, **tensors):
    """
    backend resolved for these tensors, or ValueError in a line that names the argument. tensors: q, k, v of the attention or
    index_q, index_k, index_w, index_b; selected: the Visible or Selection they go with.
    """
    visible = getattr(selected, "visible", selected)
    (first, q), *rest = tensors.items()
    if q.dim() != 4:
        raise ValueError(f"{first} has shape {tuple(q.shape)}, not (B, T, heads, width)")
    B, T, H, d = q.shape
    S, pos = visible.n_keys, visible.pos
    G = tensors["k"].size(2) if "k" in tensors and tensors["k"].dim() == 4 else 1
    shapes = dict(k=(B, S, G, d), v=(B, S, G, d), lse=(B, T, H), index_k=(B, S, d), index_w=(B, T, H), index_b=(H,))
    for name, x in rest:
        if tuple(x.shape) != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, not {shapes[name]}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, {first} on {q.device}")
        if x.dtype != q.dtype and name in ("k", "v", "index_k"):
            raise ValueError(f"{name} is {x.dtype}, {first} is {q.dtype}")
    if pos.size(1) != T or pos.size(0) not in (1, B):
        raise ValueError(f"visible.pos has shape {tuple(pos.shape)}, not (1 or {B}, {T})")
    if H % G:
        raise ValueError(f"{first} has {H} heads, not a multiple of the {G} of k and v")
    backend = check_backend(backend, q)
    if backend == "triton":
        if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{first} is {q.dtype}: the Triton path computes in float32, float16 and bfloat16")
        if d > 256:
            raise ValueError(f"{first} has heads of width {d}: the Triton path takes at most 256")
        if H // G > 8:
            raise ValueError(f"{first} has {H // G} heads to a key head: the Triton path takes at most 8")
        if max(T * H, S * G) * d >= 1 << 31:
            raise ValueError(f"{first} or k has 2^31 elements or more to a sequence, beyond the Triton path's 32-bit offsets")
    return backend


# ----------------------------------------------------------------------------------------------------------------
# The Triton path. One program owns a tile of TQ queries (for attention: of one kv head) and walks over a list of keys:
# the union of the tile's selections with a word that says which of its queries selected each key or, DENSE, all visible
# keys. Query heads that share a key head are rows of one matrix product, row = query · RP + head (RP: heads padded to a
# power of two). In the kernels: i_ program index, p_ pointer, b_ block on chip.

@jit
def _rows_of(p_pos, p_start, i_tile, i_b, T, pos_b, TQ: tl.constexpr, RP: tl.constexpr, HAS_START: tl.constexpr):
    """Of the TQ·RP rows of a tile: query within the tile, head, query, position (-1 past the end), document start."""
    r = tl.arange(0, TQ * RP)
    t = i_tile * TQ + r // RP
    pos = tl.load(p_pos + i_b * pos_b + t, mask=t < T, other=-1).to(tl.int32)
    start = tl.load(p_start + i_b * T + t, mask=t < T, other=0).to(tl.int32) if HAS_START else pos * 0
    return r // RP, r % RP, t, pos, start


@jit
def _span(p_offsets, p_pos, p_start, i_tile, i_b, T, pos_b, TQ: tl.constexpr, LIST_TQ: tl.constexpr,
          DENSE: tl.constexpr, HAS_START: tl.constexpr):
    """
    A tile's keys: where its union list begins or, DENSE, the first key that its queries can see;
    and how many there are. The lists are of LIST_TQ queries: a tile of fewer reads the list of the
    larger tile that it is a part of.
    """
    if DENSE:
        first = tl.load(p_start + i_b * T + i_tile * TQ).to(tl.int32) if HAS_START else 0
        n = tl.load(p_pos + i_b * pos_b + tl.minimum(i_tile * TQ + TQ, T) - 1).to(tl.int32) + 1 - first
    else:
        p_tile = p_offsets + i_b * tl.cdiv(T, LIST_TQ) + i_tile * TQ // LIST_TQ
        first = tl.load(p_tile)
        n = (tl.load(p_tile + 1) - first).to(tl.int32)
    return first, n


@jit
def _members(p_keys, p_words, first, slot, n, query, pos, start, DENSE: tl.constexpr):
    """Of these slots of a tile's list (BN,): the keys, whether there are any, and which rows attend to them (rows, BN)."""
    ok = slot < n
    if DENSE:
        key = first + slot
        chosen = (key[None, :] <= pos[:, None]) & (key[None, :] >= start[:, None]) & ok[None, :]
    else:
        key = tl.load(p_keys + first + slot, mask=ok, other=0)
        word = tl.load(p_words + first + slot, mask=ok, other=0)
        chosen = ((word[None, :] >> query[:, None]) & 1) != 0
    return key, ok, chosen


@jit
def _activation(z, SIGMOID: tl.constexpr, FAST: tl.constexpr):
    """σ or ReLU. FAST: σ(z) = ½ + ½ tanh(z/2), one MUFU instruction where exp and reciprocal are two."""
    if SIGMOID:
        if FAST:
            y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * z], dtype=tl.float32, is_pure=True, pack=1)
            a = 0.5 * y + 0.5
        else:
            a = tl.sigmoid(z)
    else:
        a = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as torch.relu: NaN stays NaN
    return a


def _pow2(n):
    """The width of an on-chip block of n columns: a power of two, at least the 16 that a matrix product needs."""
    return max(16, 1 << (n - 1).bit_length())


def _launch(pos, start):
    """What every launch needs: pos, start (or a stand-in), pos's stride along the batch, HAS_START, tl.dot's precision for fp32."""
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return pos.contiguous(), pos if start is None else start.contiguous(), pos.size(1) * (pos.size(0) > 1), start is not None, precision


def _sm(x):
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
    return 10 * major + minor


def _options(name, x, rows=128):
    """launch_options for rows like those of x. The loss has an indexer in fp32 beside any x."""
    fp32 = x.dtype == torch.float32 or name == "index loss"
    ieee = fp32 and torch.get_float32_matmul_precision() == "highest"
    return launch_options(name, _sm(x), x.size(-1), rows, x.element_size(), ieee)


def _tile_queries(q, k, iq=None):
    """tile_queries for attention by q and k or, with iq, for the indexer's loss."""
    index = () if iq is None else (iq.size(2), iq.size(3) * iq.element_size())
    heads, row_bytes = q.size(2) // k.size(2), q.size(3) * q.element_size()
    return tile_queries(_sm(q), heads, row_bytes, *index, fp32=q.dtype == torch.float32)


def _fast(x, precision):
    """May σ be approximated to 11 bits? Where the products are no better, on a GPU (the interpreter knows no inline assembly)."""
    return x.is_cuda and (x.dtype != torch.float32 or precision != "ieee")


def _waves(n_tiles, widest, bytes_per_row, B, S):
    """(first tile, number) of groups of tiles whose partial gradients, and the places of the S keys among them, fit PARTIAL_BYTES."""
    step = max(1, PARTIAL_BYTES // (B * (widest * bytes_per_row + 4 * S)))
    return [(t, min(step, n_tiles - t)) for t in range(0, n_tiles, step)]


# ----------------------------------------------------------------------------------------------------------------
# Stage 1: scores, variance, budget, selection

def _activate(z, activation):
    return z.sigmoid() if activation == "sigmoid" else z.relu()


def index_scores_eager(index):
    """I[t,s] = Σ_j w[t,j] · σ(q^I[t,j]·k^I[s] / √di + b[j])  (Eq. 7), every pair: (B, T, S)."""
    z = torch.einsum("btjd,bsd->btjs", index.q, index.k) / math.sqrt(index.q.size(-1)) + index.b[:, None]
    return (index.w[..., None] * _activate(z, index.activation)).sum(2)


def budgets(var, n_visible, budget):
    """
    k_t (Eq. 8), clamped to [k_min, k_max] and to the number of visible keys. All (B, T).
    While nothing has been averaged (V̄ = 0) every query counts as average, and so does one with a
    score that is not finite (Var_t = NaN). Rounded, except 'eq8', printed with a floor.
    """
    if budget.rule == "fixed":
        k = torch.full_like(n_visible, budget.k_base)
    else:
        known = (budget.var_avg > 0) & ~var.isnan()
        ratio = torch.where(known, var / budget.var_avg.to(var.dtype).clamp(min=1e-30), 1.0)
        if budget.rule == "eq8":
            k = (budget.k_base * ratio).clamp(max=budget.k_max).floor().long()
        elif budget.rule == "inverse":  # DEVIATION: the direction that the paper's prose describes
            k = (budget.k_base * (0.5 + 1 / (1 + ratio)) + 0.5).floor().long()
        else:
            raise ValueError(f"k_rule {budget.rule!r} is not one of inverse, eq8, fixed")
    return torch.minimum(k.clamp(budget.k_min, budget.k_max), n_visible)


def _force(scores, visible, tile, budget):
    """Raise the forced keys above every score, in place: the query itself, its local window, its document's sinks."""
    pos = visible.pos[:, tile.queries, None]  # (B or 1, tq, 1)
    first = torch.zeros_like(pos) if visible.start is None else visible.start[:, tile.queries, None]
    local = torch.maximum(pos - torch.arange(max(1, budget.n_local), device=pos.device), first)
    sinks = torch.minimum(first + torch.arange(budget.n_sink, device=pos.device), pos)
    for keys in (local, sinks):
        scores.scatter_(2, (keys - tile.begin).expand(len(scores), -1, -1), FORCED)


def select_eager(index, visible, budget):
    """Reference: a stable sort of every row. Returns mask (B, T, S), k_t (B, T), Var_t (B, T)."""
    scores = index_scores_eager(index)  # (B, T, S)
    mask = visible.mask().expand_as(scores)
    n = mask.sum(-1)
    mean = scores.masked_fill(~mask, 0).sum(-1) / n
    var = (scores - mean[..., None]).square().masked_fill(~mask, 0).sum(-1) / n
    k = budgets(var, n, budget)
    age = visible.pos[..., None] - torch.arange(scores.size(-1), device=scores.device)
    forced = (age < max(1, budget.n_local)) | (mask.cumsum(-1) <= budget.n_sink)
    # All finite, NaN the lowest, so that hidden < visible < forced
    scores = scores.nan_to_num(nan=torch.finfo(scores.dtype).min)
    order = scores.masked_fill(forced, math.inf).masked_fill(~mask, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.arange(scores.size(-1), device=k.device) < k[..., None]
    return torch.zeros_like(mask).scatter_(2, order, chosen), k, var


@torch.no_grad()
def _tile_scores(index, visible, tile):
    """
    A tile's scores (B, tq, end-begin), hidden ones lowered by HIDDEN, number of visible keys and Var_t (B, tq).
    All indexer heads in one product, some keys at a time, and each of these pieces is finished while it is in cache. The
    population variance is put together from the pieces' (Chan, Golub and LeVeque 1979): no cancellation.
    """
    q, w = index.q[:, tile.queries], index.w[:, tile.queries]
    B, tq, Hi, di = q.shape
    q, b, w = q.reshape(B, tq * Hi, di) * (1 / math.sqrt(di)), index.b.repeat(tq)[:, None], w.reshape(B * tq, 1, Hi)
    scores, moments, n = q.new_empty(B, tq, tile.end - tile.begin), [], max(KEYS, PIECE // (B * tq))
    for begin, x in zip(range(tile.begin, tile.end, n), scores.split(n, 2)):
        part = tile._replace(begin=begin, end=begin + x.size(2))
        z = torch.baddbmm(b, q, index.k[:, part.keys].transpose(1, 2))  # (B, tq·Hi, n)
        z = z.sigmoid_() if index.activation == "sigmoid" else z.relu_()
        x.copy_(torch.bmm(w, z.view(B * tq, Hi, -1)).view_as(x))
        whole = tile.low <= begin and part.end <= tile.high  # every query sees every key
        if whole:
            mean = x.mean(-1)  # (B, tq)
            count, square = torch.full_like(mean, x.size(2)), (x - mean[..., None]).square_().sum(-1)
        else:
            see = visible.mask(part)  # (B or 1, tq, n)
            count = see.sum(-1).to(x.dtype).expand(B, -1)  # (B, tq)
            mean = x.where(see, 0).sum(-1) / count.clamp(min=1)  # a hidden NaN times 0 were NaN
            square = (x - mean[..., None]).where(see, 0).square_().sum(-1)
        x.nan_to_num_(nan=-FINITE).clamp_(-FINITE, FINITE)  # NaN counts as the lowest score
        if not whole:
            x += visible.bias(part)
        moments.append((count, mean, square))
    count, mean, square = map(torch.stack, zip(*moments))  # (pieces, B, tq)
    total = count.sum(0)
    var = (square + count * (mean - (count * mean).sum(0) / total).square()).sum(0) / total
    return scores, total.long(), var


@jit
def _scores_kernel(p_q, p_k, p_w, p_b, p_pos, p_start, p_scores, scale, t0, T, S, pos_b, n_rows,
                   Hi: tl.constexpr, DI: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr,
                   HAS_START: tl.constexpr, SIGMOID: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, TQ: tl.constexpr, BN: tl.constexpr):
    """
    Eq. 7 for n_rows queries from t0 on: (B, n_rows, S) fp32, small enough to stay in L2. Grid (tiles, key blocks, B); a
    program owns TQ queries × BN keys: 2·TQ·BN·Hi·di FLOP, TQ·BN·Hi activations, TQ·BN·4 bytes written.
    """
    i_tile, i_n, i_b = tl.program_id(0) + t0 // TQ, tl.program_id(1), tl.program_id(2)
    first, n = _span(p_pos, p_pos, p_start, i_tile, i_b, T, pos_b, TQ, TQ, True, HAS_START)
    if (i_n * BN < first + n) & (i_n * BN + BN > first):
        query, head, t, pos, start = _rows_of(p_pos, p_start, i_tile, i_b, T, pos_b, TQ, RP, HAS_START)
        live = (t < T) & (head < Hi)
        row = t * Hi + head
        p_q += i_b.to(tl.int64) * T * Hi * DI
        p_k += i_b.to(tl.int64) * S * DI
        p_w += i_b.to(tl.int64) * T * Hi
        p_scores += i_b.to(tl.int64) * n_rows * S
        d, s = tl.arange(0, DP), i_n * BN + tl.arange(0, BN)
        b_q = tl.load(p_q + row[:, None] * DI + d, mask=live[:, None] & (d < DI), other=0.0)
        b_k = tl.load(p_k + s[:, None] * DI + d, mask=(s < S)[:, None] & (d < DI), other=0.0)
        z = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale + tl.load(p_b + head, mask=head < Hi, other=0.0)[:, None]
        w = tl.load(p_w + row, mask=live, other=0.0).to(tl.float32)
        b_scores = tl.sum(tl.reshape(_activation(z, SIGMOID, FAST) * w[:, None], (TQ, RP, BN)), 1)
        i_row = (i_tile * TQ - t0) + tl.arange(0, TQ)
        tl.store(p_scores + i_row[:, None] * S + s, b_scores, mask=(i_row < n_rows)[:, None] & (s < S))


@jit
def _row_scores(p_row, s, there, pos, start, n_sink, n_local):
    """A row's scores of keys s, where they are there and visible; which are; and which forced."""
    see = there & (s >= start)
    return tl.load(p_row + s, mask=see, other=0.0), see, (pos - s < n_local) | (s - start < n_sink)


@jit
def _bin(x, forced, low, scale):
    """
    One of 2048 bins of equal width from `low` on, in the order of the scores: what is beyond them
    in the outer ones, forced keys in the last. NaN, of which no comparison is true, is in the
    first, and so is every score where low or scale is not finite.
    """
    at = (x - low) * scale
    b_bin = tl.where(at > 0, tl.minimum(at, 2046.0), 0.0).to(tl.int32)
    return tl.where(forced, 2047, b_bin)


@jit
def _ordered(x, forced):
    """Scores as uint32 in the order of the floats, NaN as the lowest, forced keys above all."""
    x = tl.where(x == x, x, float("-inf"))
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)  # -0 = 0
    bits = tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)
    return tl.where(forced, 0xFFFFFFFF, bits).to(tl.uint32)


@jit
def _kth(b_hist, need):
    """The bin with the need-th greatest, and how many of it are needed after the bins above."""
    bins = tl.arange(0, 2048)
    best = tl.max(tl.where(tl.cumsum(b_hist, 0, reverse=True) >= need, bins, 0), 0)
    return best, need - tl.sum(tl.where(bins > best, b_hist, 0), 0)


@jit
def _select_kernel(p_scores, p_few, p_w, p_pos, p_start, p_var_avg, p_indices, p_k_t, p_var,
                   t0, T, S, pos_b, n_rows, width, k_base, k_min, k_max, n_sink, n_local,
                   Hi: tl.constexpr, RP: tl.constexpr, SIGMOID: tl.constexpr, RULE: tl.constexpr,
                   HAS_START: tl.constexpr, BS: tl.constexpr):
    """
    Var_t, k_t (Eq. 8) and the k_t best keys of one query. Grid (n_rows, B). Reads its row of scores twice: for a histogram of 2048
    bins and the variance; and to emit the keys of the bins above that of the k_t-th largest score and to set aside those of that
    bin, one in a thousand and what equals them, into p_few (B, n_rows, S). Among these a radix search (11, 11, 10 bits) finds the k_t-th largest,
    and what is greater is emitted and, of what is equal, the lowest indices. The same stored scores serve all passes: exact.
    """
    i_row, i_b = tl.program_id(0), tl.program_id(1)
    i_t = t0 + i_row
    pos = tl.load(p_pos + i_b * pos_b + i_t).to(tl.int32)
    start = tl.load(p_start + i_b * T + i_t).to(tl.int32) if HAS_START else pos * 0
    n = pos - start + 1
    i_scores = (i_b.to(tl.int64) * n_rows + i_row) * S
    p_row, p_few = p_scores + i_scores, p_few + i_scores
    p_out = p_indices + (i_b.to(tl.int64) * T + i_t) * width
    lane = tl.arange(0, BS)
    first = start // BS * BS
    # Squares are of scores less the mean of the first ones: of like size, when they are subtracted
    x, see, forced = _row_scores(p_row, start + lane, start + lane <= pos, pos, start, n_sink, n_local)
    shift = tl.sum(x, 0) / tl.minimum(n, BS)
    if SIGMOID:  # the bins span what Σ_j w_j·σ can be
        head = tl.arange(0, RP)
        p_w += (i_b.to(tl.int64) * T + i_t) * Hi
        w = tl.load(p_w + head, mask=head < Hi, other=0.0).to(tl.float32)  # (RP,)
        low = tl.sum(tl.minimum(w, 0.0), 0)
        high = tl.sum(tl.maximum(w, 0.0), 0)
    else:  # the bins span the first scores
        low = tl.min(tl.where(see, x, float("inf")), 0)
        high = tl.max(tl.where(see, x, float("-inf")), 0)
    scale = 2046 / tl.maximum(high - low, 1e-30)
    b_n, b_sum, b_square = tl.zeros([BS], tl.float32), tl.zeros([BS], tl.float32), tl.zeros([BS], tl.float32)
    b_hist = tl.zeros([2048], tl.int32)
    for s0 in range(first, pos + 1, BS):
        x, see, forced = _row_scores(p_row, s0 + lane, s0 + lane <= pos, pos, start, n_sink, n_local)
        b_hist += tl.histogram(_bin(x, forced, low, scale), 2048, mask=see)
        if RULE != "fixed":
            x = tl.where(see, x - shift, 0.0)
            b_n += see.to(tl.float32)
            b_sum += x
            b_square += x * x
    var, kf = 0.0, (start * 0 + k_base).to(tl.float32)  # Triton makes a constant of an argument that is 1
    if RULE != "fixed":
        b_mean = b_sum / tl.maximum(b_n, 1.0)  # of the lane
        mean = tl.sum(b_sum, 0) / n
        var = tl.sum(b_square - b_sum * b_mean + b_n * (b_mean - mean) * (b_mean - mean), 0) / n
        avg = tl.load(p_var_avg)
        known = (avg > 0) & (var == var)  # as in budgets(): var may be NaN
        ratio = tl.where(known, var / tl.maximum(avg, 1e-30), 1.0)
        if RULE == "inverse":
            kf = tl.floor(k_base * (0.5 + 1 / (1 + ratio)) + 0.5)
        else:
            kf = tl.floor(tl.minimum(k_base * ratio, k_max))
    need = tl.minimum(tl.minimum(tl.maximum(kf.to(tl.int32), k_min), k_max), n)
    tl.store(p_var + i_b.to(tl.int64) * T + i_t, var)
    tl.store(p_k_t + i_b.to(tl.int64) * T + i_t, need)
    best, need = _kth(b_hist, need)

    out, n_few = need * 0, need * 0
    for s0 in range(first, pos + 1, BS):
        x, see, forced = _row_scores(p_row, s0 + lane, s0 + lane <= pos, pos, start, n_sink, n_local)
        b_bin = _bin(x, forced, low, scale)
        above, among = (see & (b_bin > best)).to(tl.int32), (see & (b_bin == best)).to(tl.int32)
        tl.store(p_out + out + tl.cumsum(above, 0) - 1, s0 + lane, mask=above != 0)
        tl.store(p_few + n_few + tl.cumsum(among, 0) - 1, s0 + lane, mask=among != 0)
        out += tl.sum(above, 0)
        n_few += tl.sum(among, 0)
    tl.debug_barrier()  # other threads read what these have set aside

    prefix = start.to(tl.uint32) * 0
    for step in tl.static_range(3):
        b_hist = tl.zeros([2048], tl.int32)
        for i in range(0, n_few, BS):
            s = tl.load(p_few + i + lane, mask=i + lane < n_few, other=0)
            x, see, forced = _row_scores(p_row, s, i + lane < n_few, pos, start, n_sink, n_local)
            key = _ordered(x, forced)
            if step == 0:
                digit = key >> 21
            elif step == 1:
                see = see & (key >> 21 == prefix)
                digit = (key >> 10) & 2047
            else:
                see = see & (key >> 10 == prefix)
                digit = key & 1023
            b_hist += tl.histogram(digit.to(tl.int32), 2048, mask=see)
        best, need = _kth(b_hist, need)
        prefix = (prefix << (10 if step == 2 else 11)) | best.to(tl.uint32)

    ties = need * 0
    for i in range(0, n_few, BS):
        s = tl.load(p_few + i + lane, mask=i + lane < n_few, other=0)
        x, see, forced = _row_scores(p_row, s, i + lane < n_few, pos, start, n_sink, n_local)
        key = _ordered(x, forced)
        equal = (see & (key == prefix)).to(tl.int32)
        take = ((see & (key > prefix)) | ((equal != 0) & (ties + tl.cumsum(equal, 0) <= need))).to(tl.int32)
        tl.store(p_out + out + tl.cumsum(take, 0) - 1, s, mask=take != 0)
        ties += tl.sum(equal, 0)
        out += tl.sum(take, 0)


@torch.library.custom_op("gsa::select", mutates_args=())
def _select(q: Tensor, key: Tensor, w: Tensor, b: Tensor, activation: str, pos: Tensor, start: Tensor | None, rule: str, k_base: int, k_min: int,
            k_max: int, n_sink: int, n_local: int, var_avg: Tensor | None, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """select() by the two kernels above, a chunk of queries at a time: k_t, indices, Var_t."""
    B, T, Hi, di = q.shape
    S = key.size(1)
    indices = torch.full((B, T, width), -1, dtype=torch.int32, device=q.device)
    k, var = torch.empty(B, T, dtype=torch.long, device=q.device), torch.empty(B, T, device=q.device)
    options = _options("scores", q)
    tq = options["TQ"]
    n_rows = min(-(-T // tq) * tq, max(tq, SCORES_BYTES // (4 * B * S) // tq * tq))
    scores, few = torch.empty(B, n_rows, S, device=q.device), torch.empty(B, n_rows, S, device=q.device, dtype=torch.int32)
    pos, start, pos_b, has_start, precision = _launch(pos, start)
    sigmoid, heads = activation == "sigmoid", triton.next_power_of_2(Hi)
    for t0 in range(0, T, n_rows):
        rows = min(n_rows, T - t0)
        # Positions increase along T and are below S: these queries see no key from `end` on
        end = S - T + t0 + rows
        _scores_kernel[(triton.cdiv(rows, tq), triton.cdiv(end, options["BN"]), B)](
            p_q=q, p_k=key, p_w=w, p_b=b, p_pos=pos, p_start=start, p_scores=scores,
            scale=1 / math.sqrt(di), t0=t0, T=T, S=S, pos_b=pos_b, n_rows=n_rows,
            Hi=Hi, DI=di, DP=_pow2(di), RP=heads, HAS_START=has_start, SIGMOID=sigmoid,
            FAST=_fast(q, precision), PRECISION=precision, **options)
        _select_kernel[(rows, B)](
            p_scores=scores, p_few=few, p_w=w, p_pos=pos, p_start=start,
            p_var_avg=var if var_avg is None else var_avg, p_indices=indices, p_k_t=k, p_var=var,
            t0=t0, T=T, S=S, pos_b=pos_b, n_rows=n_rows, width=width, k_base=k_base, k_min=k_min,
            k_max=k_max, n_sink=n_sink, n_local=max(1, n_local), Hi=Hi, RP=heads,
            SIGMOID=sigmoid, RULE=rule, HAS_START=has_start, **_options("select", q))
    return k, indices, var


@_select.register_fake
def _(q, key, w, b, activation, pos, start, rule, k_base, k_min, k_max, n_sink, n_local, var_avg, width):
    B, T = q.shape[:2]
    return q.new_empty(B, T, dtype=torch.long), q.new_empty(B, T, width, dtype=torch.int32), q.new_empty(B, T, dtype=torch.float32)


@jit
def _pack_kernel(p_member, p_offsets, p_keys, p_words, n_keys, BS: tl.constexpr):
    """
    The union list of one tile, from a row of p_member (tiles, n_keys + 1), which holds a word per
    key. Grid (tiles,).
    """
    i_tile = tl.program_id(0)
    p_member += i_tile.to(tl.int64) * (n_keys + 1)
    out = tl.load(p_offsets + i_tile)
    for s0 in range(0, n_keys, BS):
        key = s0 + tl.arange(0, BS)
        word = tl.load(p_member + key, mask=key < n_keys, other=0)  # (BS,)
        used = (word != 0).to(tl.int32)
        at = out + tl.cumsum(used, 0) - 1
        tl.store(p_keys + at, key, mask=used != 0)
        tl.store(p_words + at, word, mask=used != 0)
        out += tl.sum(used, 0)


@torch.library.custom_op("gsa::pack", mutates_args=())
def _pack(indices: Tensor, n_keys: int, tq: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    A selection (B, T, k) by tiles of tq queries: offsets (B·tiles + 1,) int64, where in the next
    two a tile begins; keys (size,) int32, the union of its keys, ascending; words (size,) int32,
    bit i = its query i selects the key. size: a bound of the number of keys, which is offsets[-1];
    what is behind them is not set.
    """
    B, T, width = indices.shape
    tiles = F.pad(indices, (0, 0, 0, -T % tq), value=-1).view(-1, tq, width)
    bits = (1 << torch.arange(tq, device=tiles.device, dtype=torch.int32))[:, None]
    offsets = torch.zeros(len(tiles) + 1, device=tiles.device, dtype=torch.long)
    keys = indices.new_empty(size)
    words = indices.new_empty(size)
    n = max(1, SCORES_BYTES // (4 * n_keys))  # tiles at a time
    for i in range(0, len(tiles), n):
        part = tiles[i:i + n]  # (n, tq, width)
        member = part.new_zeros(len(part), n_keys + 1)  # (n, S + 1), the last column for the -1s
        at = torch.where(part < 0, n_keys, part).long().flatten(1)  # (n, tq·width)
        member.scatter_add_(1, at, bits.expand_as(part).flatten(1))
        counts = (member[:, :n_keys] != 0).sum(1)  # (n,)
        offsets[i + 1:i + 1 + len(part)] = offsets[i] + counts.cumsum(0)
        _pack_kernel[(len(part),)](
            p_member=member, p_offsets=offsets[i:], p_keys=keys, p_words=words, n_keys=n_keys,
            **_options("pack", indices))
    return offsets, keys, words


@_pack.register_fake
def _(indices, n_keys, tq, size):
    tiles = indices.size(0) * ((indices.size(1) + tq - 1) // tq)
    offsets = indices.new_empty(tiles + 1, dtype=torch.long)
    return offsets, indices.new_empty(size), indices.new_empty(size)


def _greatest(scores, k, n):
    """Places of the k (rows,) greatest of each row of scores (rows, S), of equals the first: (rows, n >= k.max()), in no order, -1 = none."""
    # topk takes as many of every row, so n - k infinities join it; and one more, which tells of a tie: -inf, where there is no other
    extra = torch.arange(n - int(k.min()) + 1, device=k.device) < (n - k)[:, None]
    x = torch.cat((scores, torch.where(extra, math.inf, -math.inf)), 1).add_(0.0)  # -0 = 0
    bits = x.view({4: torch.int32, 8: torch.int64}[x.element_size()])  # integers in the order of the floats: no NaN to look for, a third faster
    bits ^= (bits >> (8 * x.element_size() - 1)).bitwise_and_(torch.iinfo(bits.dtype).max)
    top, order = bits.topk(n + 1, sorted=False)
    last, at = top.min(-1, keepdim=True)
    order = order.scatter_(1, at, order[:, -1:].clone())[:, :n]
    order.masked_fill_(order >= scores.size(1), -1)
    tied = ((top == last).sum(-1) > 1).nonzero()[:, 0]  # topk kept any of the equals, a stable sort keeps the first
    if len(tied):
        first = scores[tied].sort(dim=-1, descending=True, stable=True).indices[:, :n]
        order[tied] = F.pad(first, (0, n - first.size(1))).masked_fill(torch.arange(n, device=k.device) >= k[tied, None], -1)
    return order


@torch.compiler.disable
def _select_tiled(index, visible, budget):
    """The PyTorch path of select(), at least in fp32."""
    B, T = index.w.shape[:2]
    index = Index(*(x.to(torch.promote_types(x.dtype, torch.float32)) for x in index[:4]), index.activation)
    width = min(budget.widest, visible.n_keys)
    indices = torch.full((B, T, width), -1, dtype=torch.int32, device=index.w.device)
    k, var = indices.new_zeros(B, T, dtype=torch.long), index.w.new_zeros(B, T)
    for tile in visible.tiles:
        rows, seen = tile.queries, tile.end - tile.begin
        scores, n, var_t = _tile_scores(index, visible, tile)
        if budget.rule != "fixed":
            var[:, rows] = var_t
        k_t = k[:, rows] = budgets(var_t, n.expand(B, -1), budget)
        _force(scores, visible, tile, budget)
        n = min(width, seen)
        order = _greatest(scores.flatten(0, 1), k_t.flatten(), n).view(B, -1, n)
        indices[:, rows, :n] = torch.where(order < 0, order, order + tile.begin)
    return Selection(visible, k, indices, var)


@torch.no_grad()
def select(index, visible, budget, backend="auto"):
    """
    Lightning indexer -> budget -> exact top-k (Eqs. 7, 8).

    index: Index, visible: Visible, budget: Budget. Returns Selection, without gradient (the indexer learns through
    index_loss). Ties go to the lower index; a query's own position is always selected; forced keys count in k_t.
    The result for a query depends on the keys it may see and on V̄ only: causal and independent of the batch.
    """
    backend = _check(backend, visible, index_q=index.q, index_k=index.k, index_w=index.w, index_b=index.b)
    if backend == "torch":
        return _select_tiled(index, visible, budget)
    if backend == "triton":
        tensors = (x.contiguous() for x in index[:4])
        width = min(budget.widest, visible.n_keys)
        k, indices, var = _select(*tensors, index.activation, visible.pos, visible.start, *budget, width)
        return Selection(visible, k, indices, var)
    mask, k, var = select_eager(index, visible, budget)
    order = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :int(k.max())]
    picked = torch.arange(order.size(-1), device=k.device) < k[..., None]
    return Selection(visible, k, order.masked_fill(~picked, -1).int(), var)


# ----------------------------------------------------------------------------------------------------------------
# Stage 2: attention over the selected keys

def sparse_attention_eager(q, k, v, mask):
    """softmax(q·k/√d) over S_t, times v. mask (B, T, S). Returns o (B, T, H, d) and LSE (B, T, H), natural log."""
    R = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(R, 2), v.repeat_interleave(R, 2)
    s = torch.einsum("bthd,bshd->btsh", q, k) / math.sqrt(q.size(-1))
    s = s.masked_fill(~mask[..., None], -math.inf)
    return torch.einsum("btsh,bshd->bthd", s.softmax(2), v), s.logsumexp(2)


class _SparseAttention(torch.autograd.Function):
    """Both passes one job after the other, at least in fp32."""

    @staticmethod
    def forward(ctx, q, k, v, selection):
        dtype = torch.promote_types(q.dtype, torch.float32)
        lse = torch.empty(q.shape[:3], device=q.device, dtype=dtype)
        ctx.selection, as_given = selection, q.dtype
        q, k, v = (x.to(dtype).contiguous() for x in (q, k, v))
        o, scratch = torch.empty_like(q), Scratch()
        for job in selection.jobs(q.size(2)):
            s = job.logits(job.rows(q, k.size(2)), k, scratch)
            largest = s.amax(-1)
            p = torch.softmax(s, -1, out=s)  # in place
            job.store(o, job.weighted(p, v))
            job.store(lse, largest - p.amax(-1).log())  # the largest P is 1 / Σ exp(S - largest)
        ctx.save_for_backward(q, k, v, o)
        ctx.mark_non_differentiable(lse)
        return o.to(as_given), lse

    @staticmethod
    def backward(ctx, do, _):
        """P is computed again: nothing of size T·k was kept. dS = P·(dP - Σ_d dO·O)."""
        q, k, v, o = ctx.saved_tensors
        do, G, scale = do.to(q.dtype).contiguous(), k.size(2), 1 / math.sqrt(k.size(3))
        dq, dk, dv, scratch = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), Scratch()
        for job in ctx.selection.jobs(q.size(2)):
            q_t, o_t, do_t = (job.rows(x, G) for x in (q, o, do))
            s = job.logits(q_t, k, scratch)
            p = torch.softmax(s, -1, out=s)
            ds = scratch(p, "ds", *p.shape).copy_((do_t * o_t).sum(-1, keepdim=True).neg_())
            job.products(do_t, v, ds).mul_(p)
            job.store(dq, job.weighted(ds, k).mul_(scale))
            job.spread(ds, q_t, dk, scale)
            job.spread(p, do_t, dv)
        return dq, dk, dv, None


_attend_tiled = torch.compiler.disable(_SparseAttention.apply)


@jit
def _attend_kernel(p_q, p_k, p_v, p_o, p_lse, p_offsets, p_keys, p_words, p_pos, p_start, scale, B, T, S, pos_b,
                   H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, TQ: tl.constexpr,
                   SPLITS: tl.constexpr, DENSE: tl.constexpr, HAS_START: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr):
    """
    o = softmax(q·k/√d) v and LSE over a tile's keys, by the online softmax. Grid (tiles, G, B·SPLITS); a program owns TQ
    queries of one kv head and a SPLITS-th of their keys. Per key: 2·d values gathered, 4·TQ·(H/G)·d FLOP.
    exp2 is one instruction, so the scale carries log2 e. A masked score is -1e30, not -inf: a row without any key so far
    then has p = exp2(0) = 1 instead of NaN, and `chosen` sets that to 0.
    """
    R: tl.constexpr = H // G
    i_tile, i_g, i_b, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    query, head, t, pos, start = _rows_of(p_pos, p_start, i_tile, i_b, T, pos_b, TQ, RP, HAS_START)
    live = (t < T) & (head < R)
    row = t * H + i_g * R + head
    d = tl.arange(0, DP)
    b_q = tl.load(p_q + i_b.to(tl.int64) * T * H * D + row[:, None] * D + d, mask=live[:, None] & (d < D), other=0.0)
    p_k += i_b.to(tl.int64) * S * G * D
    p_v += i_b.to(tl.int64) * S * G * D
    first, n = _span(p_offsets, p_pos, p_start, i_tile, i_b, T, pos_b, TQ, TQ, DENSE, HAS_START)
    if SPLITS > 1:
        part = tl.cdiv(n, SPLITS * BN) * BN
        begin = i_s * part
        end = tl.minimum(n, begin + part)
    else:
        begin, end = 0, n
    b_max = tl.full([TQ * RP], -1e30, tl.float32)
    b_sum = tl.zeros([TQ * RP], tl.float32)
    b_o = tl.zeros([TQ * RP, DP], tl.float32)
    for s0 in range(begin, end, BN):
        key, ok, chosen = _members(p_keys, p_words, first, s0 + tl.arange(0, BN), n, query, pos, start, DENSE)
        at = (key * G + i_g)[:, None] * D + d
        there = ok[:, None] & (d < D)
        b_k = tl.load(p_k + at, mask=there, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * 1.4426950408889634)
        b_s = tl.where(chosen, b_s, -1e30)  # (rows, BN)
        new_max = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.where(chosen, tl.exp2(b_s - new_max[:, None]), 0.0)
        shrink = tl.exp2(b_max - new_max)
        b_sum = b_sum * shrink + tl.sum(b_p, 1)
        b_v = tl.load(p_v + at, mask=there, other=0.0)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * shrink[:, None], input_precision=PRECISION)
        b_max = new_max
    b_o = b_o / tl.maximum(b_sum, 1e-30)[:, None]
    i_out = (i_s * B + i_b).to(tl.int64) * T * H
    tl.store(p_o + i_out * D + row[:, None] * D + d, b_o.to(p_o.dtype.element_ty), mask=live[:, None] & (d < D))
    tl.store(p_lse + i_out + row, (b_max + tl.log2(tl.maximum(b_sum, 1e-30))) * 0.6931471805599453, mask=live)


@jit
def _attend_backward_kernel(p_q, p_k, p_v, p_do, p_lse, p_delta, p_dq, p_dk, p_dv, p_map, p_offsets, p_keys, p_words, p_pos, p_start,
                            scale, tile0, n_tiles, capacity, T, S, pos_b,
                            H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, TQ: tl.constexpr,
                            ATOMIC: tl.constexpr, DENSE: tl.constexpr, HAS_START: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr):
    """
    Gradients of _attend_kernel, P = exp(S - LSE) recomputed. Grid (n_tiles, G, B), tiles from tile0 on. dq stays on chip.
    A tile's share of dk and dv is added by atomics, in any order or, by default, written to its own rows, which
    _sum_kernel adds up in the order of the tiles; p_map (B, n_tiles, S) tells it the row of a key. They are of k's dtype.
    """
    R: tl.constexpr = H // G
    i_tile, i_g, i_b = tl.program_id(0) + tile0, tl.program_id(1), tl.program_id(2)
    query, head, t, pos, start = _rows_of(p_pos, p_start, i_tile, i_b, T, pos_b, TQ, RP, HAS_START)
    live = (t < T) & (head < R)
    row = t * H + i_g * R + head
    i_q, i_k = i_b.to(tl.int64) * T * H, i_b.to(tl.int64) * S * G * D
    p_q, p_do, p_dq, p_lse, p_delta, p_k, p_v = p_q + i_q * D, p_do + i_q * D, p_dq + i_q * D, p_lse + i_q, p_delta + i_q, p_k + i_k, p_v + i_k
    i_part = i_b.to(tl.int64) * n_tiles + tl.program_id(0)
    if ATOMIC:
        i_out = i_k
    else:
        i_out = i_part * capacity * G * D
    p_dk, p_dv, p_map = p_dk + i_out, p_dv + i_out, p_map + i_part * S
    d = tl.arange(0, DP)
    b_q = tl.load(p_q + row[:, None] * D + d, mask=live[:, None] & (d < D), other=0.0)
    b_do = tl.load(p_do + row[:, None] * D + d, mask=live[:, None] & (d < D), other=0.0)
    lse = tl.load(p_lse + row, mask=live, other=0.0) * 1.4426950408889634
    delta = tl.load(p_delta + row, mask=live, other=0.0)
    first, n = _span(p_offsets, p_pos, p_start, i_tile, i_b, T, pos_b, TQ, TQ, DENSE, HAS_START)
    b_dq = tl.zeros([TQ * RP, DP], tl.float32)
    for s0 in range(0, n, BN):
        slot = s0 + tl.arange(0, BN)
        key, ok, chosen = _members(p_keys, p_words, first, slot, n, query, pos, start, DENSE)
        at = (key * G + i_g)[:, None] * D + d
        there = ok[:, None] & (d < D)
        b_k = tl.load(p_k + at, mask=there, other=0.0)
        b_v = tl.load(p_v + at, mask=there, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * 1.4426950408889634)
        b_p = tl.where(chosen, tl.exp2(b_s - lse[:, None]), 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = (b_p * (b_dp - delta[:, None]) * scale).to(b_k.dtype)
        part = at if ATOMIC else (slot * G + i_g)[:, None] * D + d
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)
        b_dv = tl.dot(tl.trans(b_p.to(b_k.dtype)), b_do, input_precision=PRECISION)
        if ATOMIC:  # dv is out of the way before dk is computed: fewer registers
            tl.atomic_add(p_dv + part, b_dv, mask=there, sem="relaxed")
        else:
            tl.store(p_dv + part, b_dv, mask=there)
        b_dk = tl.dot(tl.trans(b_ds), b_q, input_precision=PRECISION)
        if ATOMIC:
            tl.atomic_add(p_dk + part, b_dk, mask=there, sem="relaxed")
        else:
            tl.store(p_dk + part, b_dk, mask=there)
            if i_g == 0:
                tl.store(p_map + key, slot, mask=ok)
    tl.store(p_dq + row[:, None] * D + d, b_dq.to(p_dq.dtype.element_ty), mask=live[:, None] & (d < D))


@jit
def _sum_kernel(p_part, p_map, p_sum, n_tiles, capacity, S, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr):
    """p_sum (B, S, G, D) fp32 += the rows of n_tiles tiles, tile by tile. Grid (key blocks, G, B)."""
    i_n, i_g, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    s, d = i_n * BN + tl.arange(0, BN), tl.arange(0, DP)
    at = (s * G + i_g)[:, None] * D + d
    p_sum += i_b.to(tl.int64) * S * G * D
    b_sum = tl.load(p_sum + at, mask=(s < S)[:, None] & (d < D), other=0.0)
    for i in range(n_tiles):
        i_part = i_b.to(tl.int64) * n_tiles + i
        slot = tl.load(p_map + i_part * S + s, mask=s < S, other=-1)
        part = (slot * G + i_g)[:, None] * D + d
        b_sum += tl.load(p_part + i_part * capacity * G * D + part, mask=(slot >= 0)[:, None] & (d < D), other=0.0)
    tl.store(p_sum + at, b_sum, mask=(s < S)[:, None] & (d < D))


def _add_up(part, at, total, n_tiles, widest):
    """total (B, S, G, d) += the partial gradients of n_tiles tiles."""
    B, S, G, d = total.shape
    options = _options("sum", total)
    _sum_kernel[(triton.cdiv(S, options["BN"]), G, B)](part, at, total, n_tiles, widest, S, G, d, _pow2(d), **options)


@torch.library.custom_op("gsa::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, keys: Tensor | None, words: Tensor | None, pos: Tensor,
            start: Tensor | None, widest: int, deterministic: bool) -> tuple[Tensor, Tensor]:
    """
    sparse_attention() by the kernel above, with the lists of Selection.lists: o and LSE. widest
    (most keys of a list) and deterministic are for the backward pass.
    """
    B, T, H, d = q.shape
    S, G = k.shape[1:3]
    tq = _tile_queries(q, k)
    tiles, dense = triton.cdiv(T, tq), offsets is None
    splits = min(max(1, PROGRAMS // (tiles * G * B)), triton.cdiv(S, 256))  # few queries, many keys: share the keys out
    o = torch.empty(splits, B, T, H, d, device=q.device, dtype=q.dtype if splits == 1 else torch.float32)
    lse = torch.empty(splits, B, T, H, device=q.device, dtype=torch.float32)
    pos, start, pos_b, has_start, precision = _launch(pos, start)
    _attend_kernel[(tiles, G, B * splits)](
        q, k, v, o, lse, *_lists(offsets, keys, words, pos), pos, start, 1 / math.sqrt(d), B, T, S, pos_b,
        H, G, d, _pow2(d), triton.next_power_of_2(H // G), tq, splits, dense, has_start, precision, **_options("attend", q, tq * H // G))
    if splits == 1:
        return o[0], lse[0]
    total = lse.logsumexp(0)
    return ((lse - total).exp()[..., None] * o).sum(0).to(q.dtype), total


def _lists(offsets, keys, words, dummy):
    return (dummy, dummy, dummy) if offsets is None else (offsets, keys, words)


@torch.library.custom_op("gsa::attend_backward", mutates_args=())
def _attend_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, offsets: Tensor | None, keys: Tensor | None,
                     words: Tensor | None, pos: Tensor, start: Tensor | None, widest: int,
                     deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, d = q.shape
    S, G = k.shape[1:3]
    tq = _tile_queries(q, k)
    tiles, dense = triton.cdiv(T, tq), offsets is None
    do = do.contiguous()
    delta = (do.float() * o).sum(-1)  # (B, T, H), Σ_s P·dP
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(B, S, G, d, device=q.device, dtype=torch.float32) for _ in range(2))
    pos, start, pos_b, has_start, precision = _launch(pos, start)
    waves = _waves(tiles, widest, 2 * G * d * k.element_size(), B, S) if deterministic else [(0, tiles)]
    if deterministic:
        parts = [torch.empty(B * waves[0][1] * widest * G * d, device=q.device, dtype=k.dtype) for _ in range(2)]
    for tile0, n in waves:
        at = torch.full((B, n, S), -1, device=q.device, dtype=torch.int32) if deterministic else dq
        _attend_backward_kernel[(n, G, B)](
            q, k, v, do, lse, delta, dq, *(parts if deterministic else (dk, dv)), at, *_lists(offsets, keys, words, pos), pos, start,
            1 / math.sqrt(d), tile0, n, widest, T, S, pos_b, H, G, d, _pow2(d), triton.next_power_of_2(H // G), tq,
            not deterministic, dense, has_start, precision, **_options("attend backward", q))
        if deterministic:
            for part, total in zip(parts, (dk, dv)):
                _add_up(part, at, total, n, widest)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_attend.register_fake
def _(q, k, v, *_):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_attend_backward.register_fake
def _(do, q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attend_saves(ctx, inputs, output):
    *tensors, ctx.widest, ctx.deterministic = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _attend_grad(ctx, do, _):
    return *_attend_backward(do, *ctx.saved_tensors, ctx.widest, ctx.deterministic), *[None] * 7


_attend.register_autograd(_attend_grad, setup_context=_attend_saves)


def sparse_attention(q, k, v, selection, backend="auto"):
    """
    Attention over the selected keys, differentiable in q, k, v.

    q (B, T, H, d); k, v (B, S, G, d), H % G == 0. Returns o (B, T, H, d) and LSE (B, T, H) (natural log, no gradient).
    """
    backend = _check(backend, selection, q=q, k=k, v=v)
    if backend == "eager":
        o, lse = sparse_attention_eager(q, k, v, selection.mask())
        return o, lse.detach()
    with torch.autocast(q.device.type, enabled=False):
        if backend == "torch":
            return _attend_tiled(q, k, v, selection)
        q, k, v = (x.contiguous() for x in (q, k, v))
        visible = selection.visible
        offsets, keys, words, widest = selection.lists(_tile_queries(q, k))
        o, lse = _attend(q, k, v, offsets, keys, words, visible.pos, visible.start, widest,
                         DETERMINISTIC)
        return o, lse.detach()  # else the index loss's backward would run attention's, for nothing


# ----------------------------------------------------------------------------------------------------------------
# Stage 3: what the indexer learns from

def index_loss_eager(q, k, index, log_tau, mask):
    """Reference: mean over t of KL(p ‖ softmax(τ·I)), p = mean over heads of the attention, both over S_t."""
    R = q.size(2) // k.size(2)
    s = torch.einsum("bthd,bshd->btsh", q, k.repeat_interleave(R, 2)).detach() / math.sqrt(q.size(-1))
    p = s.masked_fill(~mask[..., None], -math.inf).softmax(2).mean(-1)
    log_q = (log_tau.exp() * index_scores_eager(index)).masked_fill(~mask, -math.inf).log_softmax(-1)
    return (torch.xlogy(p, p) - p * log_q.masked_fill(~mask, 0)).sum(-1).mean()


class _IndexLoss(torch.autograd.Function):
    """
    The loss is a scalar, so its gradients are computed in the same pass over the tiles and only
    scaled in backward. want_grads = False: they are not computed.
    """

    @staticmethod
    def forward(ctx, iq, ik, iw, ib, log_tau, activation, q, k, selection, want_grads):
        scale, tau = 1 / math.sqrt(iq.size(3)), log_tau.exp()
        iq, ik, iw, ib, q, k = (x.to(torch.promote_types(x.dtype, torch.float32)).contiguous() for x in (iq, ik, iw, ib, q, k))
        loss, dtau = torch.zeros_like(log_tau), torch.zeros_like(log_tau)
        dq, dk, dw, db = map(torch.zeros_like, (iq, ik, iw, ib))
        ik, dk, scratch = ik[:, :, None], dk[:, :, None], Scratch()  # one key head
        for job in selection.jobs(q.size(2)):
            s = job.logits(job.rows(q, k.size(2)), k, scratch)
            per_head = len(s), -1, *job.bias.shape[1:]
            p = torch.softmax(s, -1, out=s).view(per_head).mean(1).to(iq.dtype)  # teacher, (groups, tq, U)
            q_t, w_t = job.rows(iq, 1), job.rows(iw, 1)  # (groups, 1, Hi·tq, di or 1)
            z = scratch(iq, "z", *q_t.shape[:3], p.size(2))
            z.view(per_head).copy_(ib[:, None, None])
            job.products(q_t, ik, z, scale)
            a = z.sigmoid_() if activation == "sigmoid" else z.relu_()
            scores = (a * w_t).view(per_head).sum(1)
            logits = torch.add(job.bias, scores * tau)
            student = logits.softmax(-1)
            log_z = logits.amax(-1) - student.amax(-1).log()  # (groups, tq)
            loss += torch.xlogy(p, p).sum() - tau * (p * scores).sum() + log_z.sum()  # Σ_s p·(log p - τI + log Z), and Σ_s p = 1
            if not want_grads:
                continue
            g = student.sub_(p)  # gradient with respect to τ·I
            dtau += (g * scores).sum() * tau
            g *= tau
            job.store(dw, (a.view(per_head) * g[:, None]).sum(-1).view(len(a), 1, -1))
            dz = a - a.square() if activation == "sigmoid" else (a > 0).to(a.dtype)
            dz.view(per_head).mul_(g[:, None])
            dz *= w_t
            db += dz.view(per_head).sum((0, 2, 3))
            job.store(dq, job.weighted(dz, ik).mul_(scale))
            job.spread(dz, q_t, dk, scale)
        dk = dk[:, :, 0]
        ctx.save_for_backward(dq, dk, dw, db, dtau)
        ctx.n = dq.size(0) * dq.size(1)
        return loss / ctx.n

    @staticmethod
    def backward(ctx, grad):
        return tuple(g * (grad / ctx.n) for g in ctx.saved_tensors) + (None,) * 5


_index_loss_tiled = torch.compiler.disable(_IndexLoss.apply)


@jit
def _index_loss_kernel(p_q, p_k, p_lse, p_iq, p_ik, p_iw, p_ib, p_tau, p_loss, p_diq, p_dik, p_diw, p_dib, p_dtau, p_map,
                       p_offsets, p_keys, p_words, p_pos, p_start, scale, iscale, tile0, n_tiles, capacity, T, S, pos_b,
                       H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr,
                       Hi: tl.constexpr, DI: tl.constexpr, DIP: tl.constexpr, RI: tl.constexpr,
                       TQ: tl.constexpr, LIST_TQ: tl.constexpr, SIGMOID: tl.constexpr,
                       FAST: tl.constexpr, DENSE: tl.constexpr, HAS_START: tl.constexpr,
                       GRADS: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr):
    """
    KL(p ‖ softmax(τI)) of TQ queries and, GRADS, its gradients. Grid (n_tiles, B), tiles from tile0
    on. First walk over the keys: the student's LSE. Second: p, the mean over all heads of
    exp(S - LSE); I again; ∂/∂(τI) = softmax(τI) - p and from it the gradients of the indexer's
    inputs; that of its keys goes the way of dk in _attend_backward_kernel. The lists are
    attention's, of LIST_TQ ≥ TQ queries: keys that only other queries of a list chose are masked.
    """
    R: tl.constexpr = H // G
    i_tile, i_b = tl.program_id(0) + tile0, tl.program_id(1)
    query, head, t, pos, start = _rows_of(p_pos, p_start, i_tile, i_b, T, pos_b, TQ, RI, HAS_START)  # the indexer's rows
    live = (t < T) & (head < Hi)
    irow = t * Hi + head
    i_q, i_k, i_iq = i_b.to(tl.int64) * T * H, i_b.to(tl.int64) * S, i_b.to(tl.int64) * T * Hi
    i_part = i_b.to(tl.int64) * n_tiles + tl.program_id(0)
    p_q, p_lse, p_k, p_ik, p_loss, p_dtau = p_q + i_q * D, p_lse + i_q, p_k + i_k * G * D, p_ik + i_k * DI, p_loss + i_b * T, p_dtau + i_b * T
    p_iq, p_diq, p_iw, p_diw, p_dib = p_iq + i_iq * DI, p_diq + i_iq * DI, p_iw + i_iq, p_diw + i_iq, p_dib + i_iq
    p_dik, p_map = p_dik + i_part * capacity * DI, p_map + i_part * S
    di, d = tl.arange(0, DIP), tl.arange(0, DP)
    b_iq = tl.load(p_iq + irow[:, None] * DI + di, mask=live[:, None] & (di < DI), other=0.0)
    b_w = tl.load(p_iw + irow, mask=live, other=0.0).to(tl.float32)
    b_b = tl.load(p_ib + head, mask=head < Hi, other=0.0).to(tl.float32)
    tau = tl.load(p_tau).to(tl.float32)
    query1, _, t1, pos1, start1 = _rows_of(p_pos, p_start, i_tile, i_b, T, pos_b, TQ, 1, HAS_START)  # one row per query
    query2, head2, t2, pos2, start2 = _rows_of(p_pos, p_start, i_tile, i_b, T, pos_b, TQ, RP, HAS_START)  # the attention's rows
    live2 = (t2 < T) & (head2 < R)
    query1 += i_tile * TQ % LIST_TQ  # within the list's tile
    first, n = _span(p_offsets, p_pos, p_start, i_tile, i_b, T, pos_b, TQ, LIST_TQ, DENSE,
                     HAS_START)
    b_max = tl.full([TQ], -1e30, tl.float32)
    b_sum = tl.zeros([TQ], tl.float32)
    for s0 in range(0, n, BN):
        key, ok, chosen = _members(p_keys, p_words, first, s0 + tl.arange(0, BN), n, query1, pos1, start1, DENSE)
        b_ik = tl.load(p_ik + key[:, None] * DI + di, mask=ok[:, None] & (di < DI), other=0.0)
        z = tl.dot(b_iq, tl.trans(b_ik), input_precision=PRECISION) * iscale + b_b[:, None]
        b_i = tl.sum(tl.reshape(_activation(z, SIGMOID, FAST) * b_w[:, None], (TQ, RI, BN)), 1)  # (TQ, BN)
        b_s = tl.where(chosen, tau * b_i, -1e30)
        new_max = tl.maximum(b_max, tl.max(b_s, 1))
        b_sum = b_sum * tl.exp(b_max - new_max) + tl.sum(tl.where(chosen, tl.exp(b_s - new_max[:, None]), 0.0), 1)
        b_max = new_max
    b_lse = b_max + tl.log(tl.maximum(b_sum, 1e-30))  # (TQ,)

    b_diq = tl.zeros([TQ * RI, DIP], tl.float32)
    b_diw = tl.zeros([TQ * RI], tl.float32)
    b_dib = tl.zeros([TQ * RI], tl.float32)
    b_loss = tl.zeros([TQ], tl.float32)
    b_dtau = tl.zeros([TQ], tl.float32)
    for s0 in range(0, n, BN):
        slot = s0 + tl.arange(0, BN)
        key, ok, chosen = _members(p_keys, p_words, first, slot, n, query1, pos1, start1, DENSE)
        p_teacher = tl.zeros([TQ, BN], tl.float32)
        for i_g in range(G):
            row = t2 * H + i_g * R + head2
            b_q = tl.load(p_q + row[:, None] * D + d, mask=live2[:, None] & (d < D), other=0.0)
            lse = tl.load(p_lse + row, mask=live2, other=1e30) * 1.4426950408889634  # exp(S - 1e30) = 0: padding rows add nothing
            at = (key * G + i_g)[:, None] * D + d
            b_k = tl.load(p_k + at, mask=ok[:, None] & (d < D), other=0.0)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * 1.4426950408889634)
            p_teacher += tl.sum(tl.reshape(tl.exp2(b_s - lse[:, None]), (TQ, RP, BN)), 1)
        p_teacher = tl.where(chosen, p_teacher * (1.0 / H), 0.0)
        b_ik = tl.load(p_ik + key[:, None] * DI + di, mask=ok[:, None] & (di < DI), other=0.0)
        z = tl.dot(b_iq, tl.trans(b_ik), input_precision=PRECISION) * iscale + b_b[:, None]
        b_a = _activation(z, SIGMOID, FAST)  # (TQ·RI, BN)
        b_i = tl.sum(tl.reshape(b_a * b_w[:, None], (TQ, RI, BN)), 1)
        b_g = tl.where(chosen, tl.exp(tau * b_i - b_lse[:, None]), 0.0) - p_teacher  # ∂KL/∂(τI)
        log_p = tl.log(tl.where(p_teacher > 0, p_teacher, 1.0))
        b_loss += tl.sum(p_teacher * (log_p - tau * b_i + b_lse[:, None]), 1)
        if GRADS:
            b_dtau += tl.sum(b_g * b_i, 1)
            b_g = tl.reshape(tl.broadcast_to((b_g * tau)[:, None, :], (TQ, RI, BN)), (TQ * RI, BN))
            b_diw += tl.sum(b_g * b_a, 1)
            if SIGMOID:
                b_dz = b_g * b_a * (b_w[:, None] - b_w[:, None] * b_a)
            else:
                b_dz = tl.where(z > 0, b_g * b_w[:, None], 0.0)
            b_dib += tl.sum(b_dz, 1)
            b_dz = b_dz.to(b_ik.dtype)  # 1 / √di is left to the caller
            b_diq = tl.dot(b_dz, b_ik, b_diq, input_precision=PRECISION)
            b_dik = tl.dot(tl.trans(b_dz), b_iq, input_precision=PRECISION)
            tl.store(p_dik + slot[:, None] * DI + di, b_dik, mask=ok[:, None] & (di < DI))
            tl.store(p_map + key, slot, mask=ok)
    tl.store(p_loss + t1, b_loss, mask=t1 < T)
    if GRADS:
        there = live[:, None] & (di < DI)
        tl.store(p_diq + irow[:, None] * DI + di, b_diq.to(p_diq.dtype.element_ty), mask=there)
        tl.store(p_diw + irow, b_diw.to(p_diw.dtype.element_ty), mask=live)
        tl.store(p_dib + irow, b_dib, mask=live)
        tl.store(p_dtau + t1, b_dtau, mask=t1 < T)


@torch.library.custom_op("gsa::index_loss", mutates_args=())
def _index_loss(q: Tensor, k: Tensor, lse: Tensor, iq: Tensor, ik: Tensor, iw: Tensor, ib: Tensor,
                log_tau: Tensor, offsets: Tensor | None, keys: Tensor | None, words: Tensor | None,
                pos: Tensor, start: Tensor | None, widest: int, activation: str,
                want_grads: bool) -> list[Tensor]:
    """
    The loss () and, want_grads, its gradients in iq, ik, iw, ib, log_tau. The lists are
    attention's: tiles of _tile_queries(q, k) queries.
    """
    B, T, H, d = q.shape
    S, G = k.shape[1:3]
    Hi, di = iq.shape[2:]
    tq = _tile_queries(q, k, iq)
    tiles, dense = triton.cdiv(T, tq), offsets is None
    pos, start, pos_b, has_start, precision = _launch(pos, start)
    new = functools.partial(torch.empty, device=q.device, dtype=torch.float32)
    tau = log_tau.float().exp()
    loss = new(B, T)
    if want_grads:
        dtau = new(B, T)
        diw, dib = new(B, T, Hi), new(B, T, Hi)
        diq, dik = new(iq.shape), new(ik.shape).zero_()
        waves = _waves(tiles, widest, 4 * di, B, S)
        part = new(B * waves[0][1] * widest * di)
    else:
        dtau = diw = dib = diq = part = at = loss  # stand-ins, not written
        waves = [(0, tiles)]
    offsets, keys, words = _lists(offsets, keys, words, pos)
    for tile0, n in waves:
        if want_grads:
            at = torch.full((B, n, S), -1, device=q.device, dtype=torch.int32)
        _index_loss_kernel[(n, B)](
            p_q=q, p_k=k, p_lse=lse, p_iq=iq, p_ik=ik, p_iw=iw, p_ib=ib, p_tau=tau, p_loss=loss,
            p_diq=diq, p_dik=part, p_diw=diw, p_dib=dib, p_dtau=dtau, p_map=at,
            p_offsets=offsets, p_keys=keys, p_words=words, p_pos=pos, p_start=start,
            scale=1 / math.sqrt(d), iscale=1 / math.sqrt(di), tile0=tile0, n_tiles=n,
            capacity=widest, T=T, S=S, pos_b=pos_b,
            H=H, G=G, D=d, DP=_pow2(d), RP=triton.next_power_of_2(H // G),
            Hi=Hi, DI=di, DIP=_pow2(di), RI=triton.next_power_of_2(Hi),
            TQ=tq, LIST_TQ=_tile_queries(q, k), SIGMOID=activation == "sigmoid",
            FAST=_fast(iq, precision), DENSE=dense, HAS_START=has_start, GRADS=want_grads,
            PRECISION=precision, **_options("index loss", q))
        if want_grads:
            _add_up(part, at, dik[:, :, None], n, widest)
    if not want_grads:
        return [loss.mean()]
    grads = diq / math.sqrt(di), dik / math.sqrt(di), diw, dib.sum((0, 1)), dtau.sum() * tau
    return [loss.mean()] + [(g / (B * T)).to(x.dtype) for g, x in zip(grads, (iq, ik, iw, ib, log_tau))]


@_index_loss.register_fake
def _(q, k, lse, iq, ik, iw, ib, log_tau, *more):
    want_grads = more[-1]
    grads = [torch.empty_like(x) for x in (iq, ik, iw, ib, log_tau)] if want_grads else []
    return [lse.new_empty(()), *grads]


def _index_loss_saves(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def _index_loss_grad(ctx, grads):
    return None, None, None, *(g * grads[0].to(g.dtype) for g in ctx.saved_tensors), *[None] * 8


_index_loss.register_autograd(_index_loss_grad, setup_context=_index_loss_saves)


def index_loss(q, k, lse, index, log_tau, selection, backend="auto"):
    """
    Mean over queries of KL(p ‖ softmax over S_t of τ·I), in nats; τ = exp(log_tau).  DEVIATION: τ (see README).

    q (B, T, H, d), k (B, S, G, d), lse (B, T, H) as sparse_attention returned it: the teacher p, which gets no gradient.
    index: Index and log_tau (): the student, which does. selection: the keys S_t of both.
    """
    backend = _check(backend, selection, q=q, k=k, lse=lse)
    _check(backend, selection, index_q=index.q, index_k=index.k, index_w=index.w, index_b=index.b)
    if backend == "eager":
        return index_loss_eager(q.detach(), k.detach(), index, log_tau, selection.mask())
    q, k, lse = q.detach(), k.detach(), lse.detach()
    student = (*index[:4], log_tau)
    want_grads = torch.is_grad_enabled() and any(x.requires_grad for x in student)
    with torch.autocast(q.device.type, enabled=False):
        if backend == "torch":
            return _index_loss_tiled(*student, index.activation, q, k, selection, want_grads)
        visible = selection.visible
        tensors = (x.contiguous() for x in (q, k, lse, *student))
        offsets, keys, words, widest = selection.lists(_tile_queries(q, k))
        results = _index_loss(*tensors, offsets, keys, words, visible.pos, visible.start, widest,
                              index.activation, want_grads)
        return results[0]


# ----------------------------------------------------------------------------------------------------------------
# Measurements

@torch.compiler.disable
@torch.no_grad()
def attention_report(q, k, selection):
    """
    What the selection does to the layer's attention, as a dict of 0-dim tensors. O(T²) time, O(tile·S) memory.

    recall       mass that full attention (mean over heads) puts inside S_t, mean over the queries that have to choose
                 (k_t < number of visible keys); 1 where none has to
    recall_best  the same for the best k_t keys, the ones an oracle would pick
    first_token  share of the attention over S_t that goes to the first key of the document, mean over the queries after it
    """
    visible = selection.visible
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    recall = best = first = 0.0
    choosing = later = 0
    for tile in visible.tiles:
        rows, see = tile.queries, visible.mask(tile)  # (B or 1, tq, end-begin)
        job = Shared(rows, tile.keys, visible.bias(tile).expand(len(q), -1, -1))
        p = job.logits(job.rows(q, k.size(2)), k, Scratch()).softmax(-1).view(len(q), -1, *see.shape[1:])  # (B, H, tq, end-begin)
        inside = selection.bias(tile) == 0
        kept = p * inside[:, None]
        kept = (kept / kept.sum(-1, keepdim=True)).mean(1)  # (B, tq, end-begin), what the layer really attends with
        p = p.mean(1)
        k_t, n = selection.budget[:, rows], see.sum(-1)
        choose = k_t < n  # (B, tq)
        choosing += choose.sum()
        recall += ((p * inside).sum(-1) * choose).sum()
        top = p.sort(-1, descending=True).values.cumsum(-1).gather(2, k_t[..., None] - 1)[..., 0]
        best += (top * choose).sum()
        is_first = (see.cumsum(-1) == 1) & see
        after = (n > 1).expand_as(k_t)
        later += after.sum()
        first += ((kept * is_first).sum(-1) * after).sum()
    one = torch.ones((), device=q.device)
    return {"recall": recall / choosing if choosing else one, "recall_best": best / choosing if choosing else one,
            "first_token": first / later.clamp(min=1)}


# ----------------------------------------------------------------------------------------------------------------
# python kernels.py --report: what the compiler makes of the kernels, no GPU needed

# What compile_report compiles: dtype, H, G, d
LAYERS = (("bf16", 16, 4, 128), ("bf16", 12, 4, 64), ("fp32", 16, 4, 128), ("fp32", 16, 4, 256))


def report_kernels(dtype, H, G, d):
    """The kernels that compile_report compiles for a layer: name -> kernel, its own arguments."""
    partial = dict.fromkeys(("p_dk", "p_dv", "p_part"), "*" + dtype)  # the deterministic sums
    found = {"attend": (_attend_kernel, {}),
             "attend backward": (_attend_backward_kernel, dict(ATOMIC=False, **partial)),
             "index loss": (_index_loss_kernel, {})}
    if dtype == "bf16":
        found["attend backward, atomics"] = _attend_backward_kernel, dict(ATOMIC=True)
    if dtype == "bf16" or d > 128:
        found["sum"] = _sum_kernel, partial
    if (dtype, H, G, d) == LAYERS[0]:  # these depend on no head of attention
        found["scores"] = _scores_kernel, dict(DP=64, RP=4, p_q="*fp32", p_k="*fp32")
        found["select"] = _select_kernel, dict(RP=4)
        found["pack"] = _pack_kernel, {}
    return found


def compile_report(targets=(80, 89, 90, 100)):
    """
    Compile the kernels ahead of time, at the sizes of LAYERS, for GPUs of these compute
    capabilities. Yields dicts: kernel, dtype, sm, H, G, d; registers (per thread), stack and shared
    (bytes), read from the binary; instructions, a count by name. fp32 is computed in TF32. sm_80
    and sm_89 get the same code: bf16 is compiled for the one, fp32 for the other.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    for sm, (dtype, H, G, d) in itertools.product(targets, LAYERS):
        if (sm, dtype) in ((80, "fp32"), (89, "bf16")):
            continue
        itemsize = 2 if dtype == "bf16" else 4
        pointers = {dtype: "q k v o do dq", "i32": "indices few keys words map member",
                    "i64": "pos start offsets k_t"}
        kinds = {}
        for kind, names in pointers.items():
            kinds |= {"p_" + name: "*" + kind for name in names.split()}
        list_tq = tile_queries(sm, H // G, d * itemsize, fp32=dtype == "fp32")
        loss_tq = tile_queries(sm, H // G, d * itemsize, 4, 4 * 64, fp32=dtype == "fp32")
        sizes = dict(H=H, G=G, D=d, DP=_pow2(d), RP=triton.next_power_of_2(H // G),
                     Hi=4, DI=64, DIP=64, RI=4, SPLITS=1, LIST_TQ=list_tq, DENSE=False,
                     HAS_START=True, SIGMOID=True, FAST=True, GRADS=True, PRECISION="tf32",
                     RULE="inverse")
        for name, (kernel, more) in report_kernels(dtype, H, G, d).items():
            tq = loss_tq if name == "index loss" else list_tq
            if name == "scores":
                options = launch_options(name, sm, 64, itemsize=4)
            else:
                options = launch_options(name.split(",")[0], sm, d, tq * H // G, itemsize)
            values = sizes | dict(TQ=tq) | more | options
            signature, constants, aligned = {}, {}, {}
            for p in kernel.params:
                if p.is_constexpr:
                    signature[p.name] = "constexpr"
                    constants[(p.num,)] = values[p.name]
                elif p.name.startswith("p_"):
                    signature[p.name] = more.get(p.name, kinds.get(p.name, "*fp32"))
                    aligned[(p.num,)] = [["tt.divisibility", 16]]
                else:
                    signature[p.name] = "fp32" if p.name in ("scale", "iscale") else "i32"
            launch = {name: value for name, value in options.items() if name.startswith("num_")}
            source = ASTSource(kernel, signature, constants, aligned)
            binary = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=launch)
            resources = _resources(binary.asm["cubin"])
            yield dict(kernel=name, dtype=dtype, sm=sm, H=H, G=G, d=d,
                       shared=binary.metadata.shared, **resources)


def _resources(cubin):
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        usage, sass = (subprocess.run([tool, what, f.name], capture_output=True, text=True, check=True).stdout for what in ("--dump-resource-usage", "-sass"))
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", sass, re.M)
    count = lambda pattern: int(re.search(pattern, usage).group(1))
    return dict(registers=count(r"REG:(\d+)"), stack=count(r"STACK:(\d+)"), instructions=dict(collections.Counter(names)))


def main(argv):
    if argv != ["--report"]:
        raise SystemExit("usage: python kernels.py --report")
    if triton is None or INTERPRET:
        raise SystemExit("the report needs the package triton, and TRITON_INTERPRET unset")
    print(f"compiled by Triton {triton.__version__}; nothing here was run")
    print(f"{'kernel':<26}{'dtype':>6}{'GPU':>7}{'H':>4}{'d':>5}{'registers':>11}{'stack B':>9}"
          f"{'shared KB':>11}  matrix unit      special functions")
    for r in compile_report():
        matrix = [n for n in r["instructions"] if re.match("HGMMA|UTCHMMA|HMMA|QGMMA", n)]
        mufu = {n: c for n, c in sorted(r["instructions"].items()) if n.startswith("MUFU")}
        print(f"{r['kernel']:<26}{r['dtype']:>6}{'sm_' + str(r['sm']):>7}{r['H']:>4}{r['d']:>5}"
              f"{r['registers']:>11}{r['stack']:>9}{r['shared'] / 1024:>11.1f}  "
              f"{', '.join(matrix)[:15]:<15}  {', '.join(f'{n[5:]} {c}' for n, c in mufu.items())}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
