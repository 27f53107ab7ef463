"""
The Triton path of Gated Sparse Attention (arXiv 2601.15305): GPU kernels and the PyTorch operators
around them. The equations in plain PyTorch are in attention.py; this computes the same numbers.

Why tiles. Every query t attends to its own k_t keys. If one GPU program served one query, it would
read each key and value for that query alone: a few FLOP per byte, which keeps a GPU waiting for
its memory. But neighbouring queries choose nearly the same keys. So one program owns a *tile* of up
to 32 neighbouring queries, walks over the *union* of their keys and reads each key once for all of
them. Beside every key of the union stand its *query bits*: bit i says whether query i of the tile
chose the key. What a query did not choose is masked, so the result is exact. A tile of 4 queries:

    key       0  1  2  3  4  5  6  7  8  9
    query 0   x  .  .  x  .  .  x                 x  chosen     .  visible, not chosen
    query 1   x  .  .  .  .  .  .  x
    query 2   .  .  .  x  .  x  .  .  x
    query 3   x  .  .  x  .  .  .  .  .  x

    keys         0     3     5     6     7     8     9        the union, ascending
    query bits   1011  1101  0100  0001  0010  0100  1000     query 0 is the rightmost bit

The lists of all tiles lie one after the other; `offsets` says where each begins (UnionList).
DENSE (the warm-up phase) needs no list: a tile then reads every key that its queries can see.

Why rows. A GPU multiplies matrices of at least 16 rows. The H/G query heads that share a KV head
read the same keys, so they become rows of one matrix product:

    row = query within the tile · padded heads + head        (padded to a power of two)

The public functions, in the order in which a layer calls them:

    select      scores (Eq. 7) -> variance -> k_t (Eq. 8) -> exact top-k: kernels_select.py
    union_list  the chosen keys of the queries -> the union lists of their tiles
    attend      softmax attention over the lists, forward and backward
    index_loss  KL divergence of the indexer from that attention: kernels_loss.py

Sums over tiles (the gradients of k and v) are made in the order of the tiles: two runs give the
same bits. Nothing here waits for the GPU, except where a union list is very long (LIST_BYTES).

Names in the kernels
    i_  index of the program        p_  pointer        b_  block on the chip
    B batch    T queries    S keys    H query heads    G KV heads    D head width
    Hi, DI  heads and width of the indexer     TQ  queries per tile     BN, BS  keys per step
    DP, DIP  widths padded to a power of two   RP, RI  heads padded so (RP: those of a KV head)

    TRITON_INTERPRET=1 python -m pytest tests/test_triton.py    # runs the kernels on a CPU, slowly
    python bench.py --compile    # registers, spills, matrix units for each GPU; needs no GPU
"""
import math
import os
import types
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # the file imports without Triton, but no kernel runs
    triton = None
    tl = types.SimpleNamespace(constexpr=float)

    def jit(kernel):
        return kernel

# Triton reads it where a kernel is defined; checks.py and bench.py ask for it
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

SCORES_BYTES = 32 << 20  # 32 MB: scores, or query bits, that are held at a time: they stay in L2
PARTIAL_BYTES = 1 << 30  # 1 GB: partial gradients that are held before they are summed
LIST_BYTES = 64 << 20  # 64 MB: a larger union list is cut to its true length, at one host sync
PROGRAMS = 256  # programs that fill a GPU. Where there are fewer tiles, a tile's keys are split.

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x · log2 e), and exp2 is one instruction
LN_2 = tl.constexpr(0.6931471805599453)
# A masked score is not -inf: where a row has no key so far, -inf minus its maximum -inf is NaN
HIDDEN = tl.constexpr(-1e30)


# --------------------------------------------------------------------------------------------------
# Sizes for each GPU. sm is ten times the compute capability: 80 A100, 89 Ada, 90 H100, 100 B200.

def only_mma_sync(sm):
    """
    Whether the GPU multiplies by mma.sync only: Ampere and Ada (80 to 89) and consumer Blackwell
    (120). Their operands pass through registers, and all but sm_80 and sm_87 have only 99 KB of
    shared memory for a block.
    """
    return sm < 90 or sm >= 120


def rows_per_tile(sm, row_bytes, fp32):
    """
    Rows of a tile's matrix product, of row_bytes each: the most that spill no register and fit
    into shared memory.
    """
    if row_bytes > 256:
        return max(16, (16 << 10) >> (row_bytes - 1).bit_length())  # 16 KB of rows
    if fp32 and only_mma_sync(sm):
        return 64
    return 128


def queries_per_tile(sm, heads, row_bytes, index_heads=0, index_row_bytes=0, fp32=False):
    """
    Queries per tile, at most 32 (a word has a bit for each). The more queries share a tile, the
    fewer keys are read.

    heads: query heads that share a KV head. row_bytes: bytes of one head of one query. The index
    loss also has rows of the indexer, which is in fp32: it passes index_heads, index_row_bytes.
    """
    padded_heads_log2 = (heads - 1).bit_length()
    # checks.py lets 8 heads share a KV head, for which there are always rows enough
    queries = min(32, rows_per_tile(sm, row_bytes, fp32) >> padded_heads_log2)
    if index_heads:
        padded_heads_log2 = (index_heads - 1).bit_length()
        index_queries = rows_per_tile(sm, index_row_bytes, True) >> padded_heads_log2
        queries = max(1, min(queries, index_queries))
    return queries


def launch_options(name, sm, d, rows=128, itemsize=2, ieee=False):
    """
    Keys per step (BN or BS), warps and pipeline stages of a kernel, and TQ for "scores". Of the
    values tried these are the largest that spill no register and fit into the shared memory of
    every GPU with this matrix unit (python bench.py --compile).

    d: head width. rows: rows of a tile. itemsize: bytes of a number. ieee: fp32 products without
    the matrix unit; they take most registers, so the blocks are smallest.
    """
    row_bytes = d * itemsize
    small = only_mma_sync(sm) or row_bytes > 256
    if name in ("select", "variance", "pack"):
        return dict(BS=1024, num_warps=4, num_stages=1)
    if name == "scores":
        TQ = 8 if row_bytes > 256 else 16
        BN = 32 if ieee or row_bytes > 256 else 64
        return dict(TQ=TQ, BN=BN, num_warps=4, num_stages=3)
    if name == "sum":
        BN = 64 if d <= 128 else 32
        return dict(BN=BN, num_warps=4, num_stages=1)
    if name == "attend":
        BN = 32 if small or itemsize == 4 else 64
        if ieee or row_bytes > 512:
            BN = 16
        warps = 8 if rows > 64 or ieee else 4
        return dict(BN=BN, num_warps=warps, num_stages=3)
    if name == "attend backward":
        BN = 32 if small else 64
        if ieee or row_bytes > 512 or (only_mma_sync(sm) and d > 64):
            BN = 16
        return dict(BN=BN, num_warps=8, num_stages=1)
    assert name == "index loss", name
    BN = 16 if small or ieee else 32
    return dict(BN=BN, num_warps=8, num_stages=1)


def block_width(n):
    """The width of a block of n columns: a power of two, at least the 16 that tl.dot requires."""
    return max(16, 1 << (n - 1).bit_length())


def _compute_capability(x):
    if not x.is_cuda:
        return 90  # the interpreter takes the sizes of an H100
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def _dot_precision():
    """How tl.dot multiplies fp32: torch's setting for matrix products."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _options_like(x, name, rows=128):
    """launch_options of a kernel for head width, dtype and GPU of x."""
    fp32 = x.dtype == torch.float32 or name == "index loss"  # the loss has an indexer in fp32
    ieee = fp32 and _dot_precision() == "ieee"
    return launch_options(name, _compute_capability(x), x.size(-1), rows, x.element_size(), ieee)


# --------------------------------------------------------------------------------------------------
# Arguments that several launches share, as dicts

def _positions(pos, start):
    """What the queries can see: pos (1 or B, T) and start (B, T), or None for one document."""
    has_start = start is not None
    start = start.contiguous() if has_start else pos  # pos: a pointer that is never read as start
    batch_stride = pos.size(1) if pos.size(0) > 1 else 0
    return dict(p_pos=pos.contiguous(), p_start=start, pos_stride=batch_stride, HAS_START=has_start)


def padded_heads(heads, TQ):
    """Rows per query of a tile: a power of two, so many that TQ of them are tl.dot's 16 rows."""
    return max(triton.next_power_of_2(heads), 16 // TQ)


def _attention_sizes(q, k, TQ):
    """For q (B, T, H, d) and k (B, S, G, d), in tiles of TQ queries."""
    H, G, d = q.size(2), k.size(2), q.size(3)
    return dict(scale=1 / math.sqrt(d), T=q.size(1), S=k.size(1), H=H, G=G, D=d,
                DP=block_width(d), RP=padded_heads(H // G, TQ), TQ=TQ)


def _index_sizes(index_q, activation, TQ):
    """For index_q (B, T, Hi, di), in tiles of TQ queries."""
    Hi, di = index_q.shape[2:]
    # σ may be approximated to 11 bits where the products are no better. The interpreter knows no
    # inline assembly.
    fast = index_q.is_cuda and (index_q.dtype != torch.float32 or _dot_precision() != "ieee")
    return dict(index_scale=1 / math.sqrt(di), Hi=Hi, DI=di, DIP=block_width(di),
                RI=padded_heads(Hi, TQ), SIGMOID=activation == "sigmoid", FAST=fast)


# --------------------------------------------------------------------------------------------------
# Parts of several kernels

@jit
def _rows(i_tile, TQ: tl.constexpr, HEADS: tl.constexpr):
    """
    Returns three vectors, one entry per row of the tile: query within the tile, head, query within
    the sequence.
    """
    row = tl.arange(0, TQ * HEADS)
    query = row // HEADS
    return query, row % HEADS, i_tile * TQ + query


@jit
def _load_visible(p_pos, p_start, t, i_b, T, pos_stride, HAS_START: tl.constexpr):
    """
    The last and the first key that query t can see: its own position (-1 where t is past the end
    of the sequence) and the start of its document.
    """
    pos = tl.load(p_pos + i_b * pos_stride + t, mask=t < T, other=-1).to(tl.int32)
    if HAS_START:
        start = tl.load(p_start + i_b * T + t, mask=t < T, other=0).to(tl.int32)
    else:
        start = pos * 0
    return pos, start


@jit
def _visible_to_tile(p_pos, p_start, i_tile, i_b, T, pos_stride,
                     TQ: tl.constexpr, HAS_START: tl.constexpr):
    """The keys that any query of a tile can see: the first one and their number."""
    if HAS_START:
        first = tl.load(p_start + i_b * T + i_tile * TQ).to(tl.int32)
    else:
        first = 0
    last_query = tl.minimum(i_tile * TQ + TQ, T) - 1
    last = tl.load(p_pos + i_b * pos_stride + last_query).to(tl.int32)
    return first, last + 1 - first


@jit
def _keys_of_tile(p_offsets, p_pos, p_start, i_tile, i_b, T, pos_stride, TQ: tl.constexpr,
                  LIST_TQ: tl.constexpr, DENSE: tl.constexpr, HAS_START: tl.constexpr):
    """
    The keys that a tile reads: where its union list begins (DENSE: the first visible key) and how
    many they are. The lists are of LIST_TQ queries: a smaller tile reads the list of the larger
    tile that it is a part of.
    """
    if DENSE:
        first, n = _visible_to_tile(p_pos, p_start, i_tile, i_b, T, pos_stride, TQ, HAS_START)
    else:
        p_offsets += i_b * tl.cdiv(T, LIST_TQ) + (i_tile * TQ) // LIST_TQ
        first = tl.load(p_offsets)
        n = (tl.load(p_offsets + 1) - first).to(tl.int32)
    return first, n


@jit
def _load_keys(p_keys, p_query_bits, first, slot, n, query, pos, start, DENSE: tl.constexpr):
    """
    The keys in these slots of a tile's list. Returns key (BN,), exists (BN,): the slot is one of
    the n; chosen (rows, BN): the row attends to the key. query, pos, start (rows,).
    """
    exists = slot < n
    if DENSE:
        key = first + slot
        chosen = (key[None, :] <= pos[:, None]) & (key[None, :] >= start[:, None])
        chosen = chosen & exists[None, :]
    else:
        # (BN,)
        key = tl.load(p_keys + first + slot, mask=exists, other=0)
        # (BN,)
        query_bits = tl.load(p_query_bits + first + slot, mask=exists, other=0)
        chosen = ((query_bits[None, :] >> query[:, None]) & 1) != 0
    return key, exists, chosen


@jit
def _load_block(p, row, exists, D: tl.constexpr, DP: tl.constexpr):
    """Rows of an array (…, D) as a block (rows, DP): 0 where a row does not exist and past D."""
    d = tl.arange(0, DP)
    return tl.load(p + row[:, None] * D + d, mask=exists[:, None] & (d < D), other=0.0)


@jit
def _store_block(p, row, exists, block, D: tl.constexpr, DP: tl.constexpr):
    """The inverse of _load_block."""
    d = tl.arange(0, DP)
    block = block.to(p.dtype.element_ty)
    tl.store(p + row[:, None] * D + d, block, mask=exists[:, None] & (d < D))


@jit
def _append(p_list, n, value, take):
    """Writes the values that `take` marks behind the n values of a list. Returns the new n."""
    ones = take.to(tl.int32)
    tl.store(p_list + n + tl.cumsum(ones, 0) - 1, value, mask=take)
    return n + tl.sum(ones, 0)


@jit
def _activation(z, SIGMOID: tl.constexpr, FAST: tl.constexpr):
    """
    σ or ReLU. FAST: σ(z) = ½ + ½ tanh(z/2) is one special function, 1 / (1 + exp(-z)) is two.
    """
    if SIGMOID:
        if FAST:
            tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * z],
                                             dtype=tl.float32, is_pure=True, pack=1)
            a = 0.5 * tanh + 0.5
        else:
            a = tl.sigmoid(z)
    else:
        a = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as torch.relu: NaN stays NaN
    return a


@jit
def _index_scores(b_q, b_k, b_w, b_bias, index_scale, TQ: tl.constexpr, RI: tl.constexpr,
                  BN: tl.constexpr, SIGMOID: tl.constexpr, FAST: tl.constexpr,
                  PRECISION: tl.constexpr):
    """
    I[t,s] = Σ_j w[t,j] · σ(q^I[t,j]·k^I[s] / √di + b[j])  (Eq. 7) of TQ queries and BN keys.
    Returns the argument of σ and σ itself (TQ·RI, BN), and I (TQ, BN).
    """
    b_z = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_z = b_z * index_scale + b_bias[:, None]
    b_a = _activation(b_z, SIGMOID, FAST)
    b_scores = tl.sum(tl.reshape(b_a * b_w[:, None], (TQ, RI, BN)), 1)  # Eq. 7
    return b_z, b_a, b_scores


# --------------------------------------------------------------------------------------------------
# Union lists

class UnionList(NamedTuple):
    """
    The keys that each tile of queries reads, and which of its queries chose each. Tiles are
    numbered along T, then along the batch. offsets, keys and query_bits are None where every
    visible key is read.
    """
    tile_queries: int  # queries per tile
    longest: int  # upper bound of the keys that one tile reads
    offsets: Tensor | None  # (tiles + 1,) int64: tile i has keys[offsets[i]:offsets[i + 1]]
    keys: Tensor | None  # int32, ascending within a tile. What is behind offsets[-1] is not set.
    query_bits: Tensor | None  # int32, beside keys: bit j = query j of the tile chose the key


@jit
def _pack_kernel(p_bits_by_key, p_offsets, p_keys, p_query_bits, n_keys, BS: tl.constexpr):
    """The list of one tile, from a row of p_bits_by_key (tiles, n_keys + 1). Grid (tiles,)."""
    i_tile = tl.program_id(0)
    p_bits_by_key += i_tile.to(tl.int64) * (n_keys + 1)
    out = tl.load(p_offsets + i_tile)
    for s0 in range(0, n_keys, BS):
        key = s0 + tl.arange(0, BS)
        # (BS,)
        query_bits = tl.load(p_bits_by_key + key, mask=key < n_keys, other=0)
        used = query_bits != 0
        _append(p_query_bits, out, query_bits, used)
        out = _append(p_keys, out, key, used)


@torch.library.custom_op("gsa::pack", mutates_args=())
def _pack(indices: Tensor, n_keys: int, tile_queries: int,
          size: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    offsets, keys and query_bits of a UnionList. indices (B, T, width): the keys of each query, -1
    for none. size: length of keys and query_bits, at least the number of keys of all tiles.
    """
    width = indices.size(2)
    padded = F.pad(indices, (0, 0, 0, -indices.size(1) % tile_queries), value=-1)
    tiles = padded.view(-1, tile_queries, width)  # (tiles, tile_queries, width)
    bits = 1 << torch.arange(tile_queries, device=indices.device, dtype=torch.int32)
    offsets = torch.zeros(len(tiles) + 1, device=indices.device, dtype=torch.long)
    keys = indices.new_empty(size)
    query_bits = indices.new_empty(size)
    step = max(1, SCORES_BYTES // (4 * n_keys))  # tiles at a time
    for i in range(0, len(tiles), step):
        part = tiles[i:i + step]  # (n, tile_queries, width)
        n = len(part)
        # One word per key. The -1s go to a last column that nobody reads.
        bits_by_key = part.new_zeros(n, n_keys + 1)
        column = torch.where(part < 0, n_keys, part).long().flatten(1)  # (n, tile_queries·width)
        bits_by_key.scatter_add_(1, column, bits[:, None].expand_as(part).flatten(1))
        counts = (bits_by_key[:, :n_keys] != 0).sum(1)  # (n,)
        offsets[i + 1:i + 1 + n] = offsets[i] + counts.cumsum(0)
        _pack_kernel[n,](
            p_bits_by_key=bits_by_key, p_offsets=offsets[i:], p_keys=keys,
            p_query_bits=query_bits, n_keys=n_keys, **_options_like(indices, "pack"))
    return offsets, keys, query_bits


@_pack.register_fake
def _(indices, n_keys, tile_queries, size):
    tiles = indices.size(0) * ((indices.size(1) + tile_queries - 1) // tile_queries)
    offsets = indices.new_empty(tiles + 1, dtype=torch.long)
    return offsets, indices.new_empty(size), indices.new_empty(size)


def union_list(indices, n_keys, tile_queries):
    """
    The UnionList of the keys that each query chose: indices (B, T, width) int32, -1 for none, among
    n_keys keys. indices None: every visible key.

    The lists are allocated without asking the GPU how long they are. A tile reads at most
    tile_queries·width keys, and none after the position of its last query t, which is at most
    S - T + t because positions rise along T. Only where this bound needs more than LIST_BYTES are
    the true lengths read, at one synchronisation with the GPU.
    """
    if indices is None:
        return UnionList(tile_queries, n_keys, None, None, None)
    B, T, width = indices.shape
    longest = min(n_keys, tile_queries * width)
    size = 0
    for t in range(0, T, tile_queries):
        visible = n_keys - T + min(t + tile_queries, T)
        size += B * min(visible, longest)
    offsets, keys, query_bits = _pack(indices, n_keys, tile_queries, size)
    if 8 * size > LIST_BYTES:
        size, longest = torch.stack((offsets[-1], offsets.diff().max())).tolist()
        keys = keys[:size].clone()
        query_bits = query_bits[:size].clone()
    return UnionList(tile_queries, longest, offsets, keys, query_bits)


def _list_pointers(union, stand_in):
    """A kernel's arguments for a union list. stand_in: a tensor for pointers that are not read."""
    if union.offsets is None:
        return dict(p_offsets=stand_in, p_keys=stand_in, p_query_bits=stand_in, DENSE=True)
    return dict(p_offsets=union.offsets, p_keys=union.keys, p_query_bits=union.query_bits,
                DENSE=False)


# --------------------------------------------------------------------------------------------------
# Sums over tiles. A tile writes the gradients of its keys, its partial gradients, to memory of its
# own; a second kernel adds them up in the order of the tiles.

def _tile_groups(n_tiles, longest, bytes_per_key, B, S):
    """
    Tiles are taken in groups whose partial gradients and slots fit into PARTIAL_BYTES. Returns
    (first tile, number of tiles) of each group, the largest group first.
    """
    size = max(1, PARTIAL_BYTES // (B * (longest * bytes_per_key + 4 * S)))
    return [(tile, min(size, n_tiles - tile)) for tile in range(0, n_tiles, size)]


@jit
def _sum_kernel(p_parts, p_slots, p_sum, n_tiles, longest, S,
                G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr):
    """
    p_sum (B, S, G, D) fp32 += p_parts (B, n_tiles, longest, G, D), where p_slots (B, n_tiles, S)
    says in which slot of a tile a key is, -1 for none. Grid (key blocks, G, B).
    """
    i_g = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    s = tl.program_id(0) * BN + tl.arange(0, BN)
    p_sum += i_b * S * G * D
    b_sum = _load_block(p_sum, s * G + i_g, s < S, D, DP)  # (BN, DP)
    for i in range(n_tiles):
        i_part = i_b * n_tiles + i
        # (BN,)
        slot = tl.load(p_slots + i_part * S + s, mask=s < S, other=-1)
        p_part = p_parts + i_part * longest * G * D
        b_sum += _load_block(p_part, slot * G + i_g, slot >= 0, D, DP)  # (BN, DP)
    _store_block(p_sum, s * G + i_g, s < S, b_sum, D, DP)


def _add_partial_gradients(total, parts, slots, longest):
    """total (B, S, G, d) += the partial gradients of a group of tiles; slots (B, tiles, S)."""
    B, S, G, d = total.shape
    options = _options_like(total, "sum")
    _sum_kernel[triton.cdiv(S, options["BN"]), G, B](
        p_parts=parts, p_slots=slots, p_sum=total, n_tiles=slots.size(1), longest=longest, S=S,
        G=G, D=d, DP=block_width(d), **options)


# --------------------------------------------------------------------------------------------------
# Attention over the lists

@jit
def _attend_kernel(
        p_q, p_k, p_v, p_o, p_lse, p_offsets, p_keys, p_query_bits, p_pos, p_start,
        scale, B, T, S, pos_stride,
        H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr,
        TQ: tl.constexpr, SPLITS: tl.constexpr, DENSE: tl.constexpr, HAS_START: tl.constexpr,
        PRECISION: tl.constexpr, BN: tl.constexpr):
    """
    o = softmax(q·k/√d) v and LSE over a tile's keys, by the online softmax of FlashAttention.
    Grid (tiles, G, B·SPLITS). A program owns TQ queries of one KV head and a SPLITS-th of their
    keys: 4·TQ·(H/G)·d FLOP for every 2·d values that it reads.
    """
    # 1. the tile's rows and its list
    R: tl.constexpr = H // G
    i_tile = tl.program_id(0)
    i_g = tl.program_id(1)
    i_split = tl.program_id(2) % SPLITS
    i_b = (tl.program_id(2) // SPLITS).to(tl.int64)
    query, head, t = _rows(i_tile, TQ, RP)
    pos, start = _load_visible(p_pos, p_start, t, i_b, T, pos_stride, HAS_START)
    live = (t < T) & (head < R)
    row = t * H + i_g * R + head
    p_q += i_b * T * H * D
    p_k += i_b * S * G * D
    p_v += i_b * S * G * D
    p_o += (i_split * B + i_b) * T * H * D
    p_lse += (i_split * B + i_b) * T * H
    b_q = _load_block(p_q, row, live, D, DP)  # (rows, DP)
    first, n = _keys_of_tile(p_offsets, p_pos, p_start, i_tile, i_b, T, pos_stride,
                             TQ, TQ, DENSE, HAS_START)
    if SPLITS > 1:
        part = tl.cdiv(n, SPLITS * BN) * BN
        begin = i_split * part
        end = tl.minimum(n, begin + part)
    else:
        begin = 0
        end = n

    # 2. online softmax over the keys
    b_max = tl.full([TQ * RP], HIDDEN, tl.float32)
    b_sum = tl.zeros([TQ * RP], tl.float32)
    b_o = tl.zeros([TQ * RP, DP], tl.float32)
    for s0 in range(begin, end, BN):
        key, exists, chosen = _load_keys(p_keys, p_query_bits, first, s0 + tl.arange(0, BN), n,
                                         query, pos, start, DENSE)
        b_k = _load_block(p_k, key * G + i_g, exists, D, DP)  # (BN, DP)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E)
        b_s = tl.where(chosen, b_s, HIDDEN)  # (rows, BN)
        new_max = tl.maximum(b_max, tl.max(b_s, 1))
        # A row without a key so far has exp2(HIDDEN - HIDDEN) = 1: `chosen` makes it 0
        b_p = tl.where(chosen, tl.exp2(b_s - new_max[:, None]), 0.0)
        shrink = tl.exp2(b_max - new_max)
        b_sum = b_sum * shrink + tl.sum(b_p, 1)
        b_v = _load_block(p_v, key * G + i_g, exists, D, DP)  # (BN, DP)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * shrink[:, None], input_precision=PRECISION)
        b_max = new_max

    # 3. output and LSE, natural log
    b_sum = tl.maximum(b_sum, 1e-30)
    _store_block(p_o, row, live, b_o / b_sum[:, None], D, DP)
    tl.store(p_lse + row, (b_max + tl.log2(b_sum)) * LN_2, mask=live)


@jit
def _attend_backward_kernel(
        p_q, p_k, p_v, p_do, p_lse, p_delta, p_dq, p_dk_parts, p_dv_parts, p_slots,
        p_offsets, p_keys, p_query_bits, p_pos, p_start,
        scale, tile0, n_tiles, longest, T, S, pos_stride,
        H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr,
        TQ: tl.constexpr, DENSE: tl.constexpr, HAS_START: tl.constexpr,
        PRECISION: tl.constexpr, BN: tl.constexpr):
    """
    Gradients of _attend_kernel, with P = exp(S - LSE) recomputed. Grid (n_tiles, G, B), tiles from
    tile0 on. dq stays on the chip. The tile's partial gradients of k and v, in k's dtype, go to
    p_dk_parts and p_dv_parts (B, n_tiles, longest, G, D), the slot of each key to p_slots
    (B, n_tiles, S); _sum_kernel adds them up.
    """
    # 1. the tile's rows and its list
    R: tl.constexpr = H // G
    i_tile = tl.program_id(0) + tile0
    i_g = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    i_part = i_b * n_tiles + tl.program_id(0)
    query, head, t = _rows(i_tile, TQ, RP)
    pos, start = _load_visible(p_pos, p_start, t, i_b, T, pos_stride, HAS_START)
    live = (t < T) & (head < R)
    row = t * H + i_g * R + head
    p_q += i_b * T * H * D
    p_do += i_b * T * H * D
    p_dq += i_b * T * H * D
    p_lse += i_b * T * H
    p_delta += i_b * T * H
    p_k += i_b * S * G * D
    p_v += i_b * S * G * D
    p_dk_parts += i_part * longest * G * D
    p_dv_parts += i_part * longest * G * D
    p_slots += i_part * S
    b_q = _load_block(p_q, row, live, D, DP)  # (rows, DP)
    b_do = _load_block(p_do, row, live, D, DP)  # (rows, DP)
    # (rows,)
    lse = tl.load(p_lse + row, mask=live, other=0.0) * LOG2_E
    # (rows,)
    delta = tl.load(p_delta + row, mask=live, other=0.0)
    first, n = _keys_of_tile(p_offsets, p_pos, p_start, i_tile, i_b, T, pos_stride,
                             TQ, TQ, DENSE, HAS_START)

    # 2. P and dS of BN keys at a time, and from them dq, dv, dk
    b_dq = tl.zeros([TQ * RP, DP], tl.float32)
    for s0 in range(0, n, BN):
        slot = s0 + tl.arange(0, BN)
        key, exists, chosen = _load_keys(p_keys, p_query_bits, first, slot, n,
                                         query, pos, start, DENSE)
        b_k = _load_block(p_k, key * G + i_g, exists, D, DP)  # (BN, DP)
        b_v = _load_block(p_v, key * G + i_g, exists, D, DP)  # (BN, DP)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E)
        b_p = tl.where(chosen, tl.exp2(b_s - lse[:, None]), 0.0)  # (rows, BN)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = (b_p * (b_dp - delta[:, None]) * scale).to(b_k.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)
        # dv is stored before dk is computed: fewer registers
        b_dv = tl.dot(tl.trans(b_p.to(b_k.dtype)), b_do, input_precision=PRECISION)
        _store_block(p_dv_parts, slot * G + i_g, exists, b_dv, D, DP)
        b_dk = tl.dot(tl.trans(b_ds), b_q, input_precision=PRECISION)
        _store_block(p_dk_parts, slot * G + i_g, exists, b_dk, D, DP)
        if i_g == 0:  # all KV heads have the same slots
            tl.store(p_slots + key, slot, mask=exists)
    _store_block(p_dq, row, live, b_dq, D, DP)


@torch.library.custom_op("gsa::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, tile_queries: int, longest: int,
            offsets: Tensor | None, keys: Tensor | None, query_bits: Tensor | None,
            pos: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, H, d = q.shape
    S, G = k.shape[1:3]
    union = UnionList(tile_queries, longest, offsets, keys, query_bits)
    tiles = triton.cdiv(T, tile_queries)
    # Few queries and many keys: the keys of a tile are split among programs
    splits = min(max(1, PROGRAMS // (tiles * G * B)), triton.cdiv(S, 256))
    dtype = q.dtype if splits == 1 else torch.float32
    o = torch.empty(splits, B, T, H, d, device=q.device, dtype=dtype)
    lse = torch.empty(splits, B, T, H, device=q.device, dtype=torch.float32)
    _attend_kernel[tiles, G, B * splits](
        p_q=q, p_k=k, p_v=v, p_o=o, p_lse=lse, **_list_pointers(union, pos),
        **_positions(pos, start), **_attention_sizes(q, k, tile_queries), B=B, SPLITS=splits,
        PRECISION=_dot_precision(), **_options_like(q, "attend", tile_queries * H // G))
    if splits == 1:
        return o[0], lse[0]
    total = lse.logsumexp(0)  # (B, T, H)
    share = (lse - total).exp()[..., None]  # (splits, B, T, H, 1)
    return (share * o).sum(0).to(q.dtype), total


@torch.library.custom_op("gsa::attend_backward", mutates_args=())
def _attend_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
                     tile_queries: int, longest: int, offsets: Tensor | None,
                     keys: Tensor | None, query_bits: Tensor | None, pos: Tensor,
                     start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, d = q.shape
    S, G = k.shape[1:3]
    union = UnionList(tile_queries, longest, offsets, keys, query_bits)
    do = do.contiguous()
    delta = (do.float() * o).sum(-1)  # (B, T, H), Σ_s P·dP
    dq = torch.empty_like(q)
    dk = torch.zeros(k.shape, device=q.device, dtype=torch.float32)
    dv = torch.zeros(v.shape, device=q.device, dtype=torch.float32)
    groups = _tile_groups(triton.cdiv(T, tile_queries), longest, 2 * G * d * k.element_size(), B, S)
    dk_parts = k.new_empty(B * groups[0][1] * longest * G * d)
    dv_parts = torch.empty_like(dk_parts)
    for tile0, n_tiles in groups:
        slots = torch.full((B, n_tiles, S), -1, device=q.device, dtype=torch.int32)
        _attend_backward_kernel[n_tiles, G, B](
            p_q=q, p_k=k, p_v=v, p_do=do, p_lse=lse, p_delta=delta,
            p_dq=dq, p_dk_parts=dk_parts, p_dv_parts=dv_parts, p_slots=slots,
            **_list_pointers(union, pos), **_positions(pos, start),
            **_attention_sizes(q, k, tile_queries),
            tile0=tile0, n_tiles=n_tiles, longest=longest,
            PRECISION=_dot_precision(), **_options_like(q, "attend backward"))
        _add_partial_gradients(dk, dk_parts, slots, longest)
        _add_partial_gradients(dv, dv_parts, slots, longest)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_attend.register_fake
def _(q, k, v, *_):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_attend_backward.register_fake
def _(do, q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attend_setup(ctx, inputs, output):
    q, k, v, ctx.tile_queries, ctx.longest, *lists = inputs
    ctx.save_for_backward(q, k, v, *output, *lists)


def _attend_gradients(ctx, do, _):
    *tensors, offsets, keys, query_bits, pos, start = ctx.saved_tensors
    union = UnionList(ctx.tile_queries, ctx.longest, offsets, keys, query_bits)
    gradients = _attend_backward(do, *tensors, *union, pos, start)
    return *gradients, *[None] * 7


_attend.register_autograd(_attend_gradients, setup_context=_attend_setup)


def attention_tile(q, k, index_q=None):
    """
    Queries per tile of attend for q (B, T, H, d) and k (B, S, G, d) on their GPU. With index_q
    (B, T, Hi, di): those of index_loss, as many or fewer.
    """
    heads = q.size(2) // k.size(2)
    row_bytes = q.size(3) * q.element_size()
    index = ()
    if index_q is not None:
        index = index_q.size(2), index_q.size(3) * index_q.element_size()
    fp32 = q.dtype == torch.float32
    return queries_per_tile(_compute_capability(q), heads, row_bytes, *index, fp32=fp32)


def attend(q, k, v, union, pos, start):
    """
    Softmax attention, softmax(q·k/√d) v, over the keys of a union list with
    attention_tile(q, k) queries per tile. Differentiable in q, k and v.

    q (B, T, H, d); k, v (B, S, G, d), H % G == 0; pos, start: as in select.
    Returns o (B, T, H, d) and LSE (B, T, H) fp32, natural log, which carries no gradient.
    """
    o, lse = _attend(q.contiguous(), k.contiguous(), v.contiguous(), *union, pos, start)
    return o, lse.detach()  # else the loss's backward would run attention's, for nothing
