"""
The Triton path of selection: scores (Eq. 7) -> variance -> k_t (Eq. 8) -> exact top-k. The header
of kernels.py explains the names. attention.select_eager is the same in plain PyTorch.

    k_t, indices, var = select(index_q, …)    # for attention.select
    var = score_variance(index_q, …)          # the variance alone: what the warm-up needs

A chunk of queries is scored at a time, so that the scores, 4 bytes for each query and key, stay in
the L2 cache. Then one program selects for one query. It never sorts:

    scores of query t    0.1 0.9 0.4 0.4 0.7 0.4 0.2   and k_t = 4
    histogram            a bin for each range of scores. The k_t-th largest is in that of 0.4
    bins above           0.9 0.7 are selected
    candidates           0.4 0.4 0.4, what is in that bin: the best two, of equal ones the first two
"""
import torch
from torch import Tensor

import kernels
from kernels import (_append, _dot_precision, _index_scores, _index_sizes, _load_block,
                     _load_visible, _options_like, _positions, _rows, _visible_to_tile, jit, tl,
                     triton)

BINS = tl.constexpr(2048)  # of a histogram of scores; also the values of an 11-bit digit


@jit
def _scores_kernel(
        p_index_q, p_index_k, p_index_w, p_index_b, p_scores, p_pos, p_start,
        index_scale, t0, T, S, pos_stride, n_rows,
        Hi: tl.constexpr, DI: tl.constexpr, DIP: tl.constexpr, RI: tl.constexpr,
        TQ: tl.constexpr, HAS_START: tl.constexpr, SIGMOID: tl.constexpr, FAST: tl.constexpr,
        PRECISION: tl.constexpr, BN: tl.constexpr):
    """
    Eq. 7 for n_rows queries from t0 on: p_scores (B, n_rows, S) fp32. Grid (tiles, key blocks, B).
    A program owns TQ queries × BN keys: 2·TQ·BN·Hi·di FLOP, TQ·BN·Hi activations.
    """
    i_tile = tl.program_id(0) + t0 // TQ
    i_n = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    first, n = _visible_to_tile(p_pos, p_start, i_tile, i_b, T, pos_stride, TQ, HAS_START)
    if (i_n * BN < first + n) & (i_n * BN + BN > first):
        _, head, t = _rows(i_tile, TQ, RI)
        live = (t < T) & (head < Hi)
        row = t * Hi + head
        s = i_n * BN + tl.arange(0, BN)
        p_index_q += i_b * T * Hi * DI
        p_index_k += i_b * S * DI
        p_index_w += i_b * T * Hi
        p_scores += i_b * n_rows * S
        b_q = _load_block(p_index_q, row, live, DI, DIP)  # (TQ·RI, DIP)
        b_k = _load_block(p_index_k, s, s < S, DI, DIP)  # (BN, DIP)
        # (TQ·RI,)
        b_w = tl.load(p_index_w + row, mask=live, other=0.0).to(tl.float32)
        # (TQ·RI,)
        b_bias = tl.load(p_index_b + head, mask=head < Hi, other=0.0)
        b_z, b_a, b_scores = _index_scores(b_q, b_k, b_w, b_bias, index_scale, TQ, RI, BN,
                                           SIGMOID, FAST, PRECISION)
        i_row = (i_tile * TQ - t0) + tl.arange(0, TQ)
        tl.store(p_scores + i_row[:, None] * S + s, b_scores,
                 mask=(i_row < n_rows)[:, None] & (s < S))


@jit
def _load_scores(p_row, s, exists, pos, start, n_sink, n_local):
    """
    A query's scores of keys s (BS,). Returns scores; see: exists and visible; forced: the key is
    one of the document's first n_sink or of the query's last n_local.
    """
    see = exists & (s >= start)
    forced = (pos - s < n_local) | (s - start < n_sink)
    # (BS,)
    return tl.load(p_row + s, mask=see, other=0.0), see, forced


@jit
def _bin_range(p_w, b_first, see, Hi: tl.constexpr, RI: tl.constexpr, SIGMOID: tl.constexpr):
    """
    The lower end of the histogram and its bins per unit of score. With σ it spans all that
    Σ_j w_j·σ can be, with ReLU the query's first scores b_first (BS,).
    """
    if SIGMOID:
        head = tl.arange(0, RI)
        # (RI,)
        w = tl.load(p_w + head, mask=head < Hi, other=0.0).to(tl.float32)
        low = tl.sum(tl.minimum(w, 0.0), 0)
        high = tl.sum(tl.maximum(w, 0.0), 0)
    else:
        low = tl.min(tl.where(see, b_first, float("inf")), 0)
        high = tl.max(tl.where(see, b_first, float("-inf")), 0)
    return low, (BINS - 2) / tl.maximum(high - low, 1e-30)


@jit
def _bin(x, forced, low, per_unit):
    """
    The bin of each score, in the order of the scores. What lies beyond the range is in the first or
    the last but one bin, forced keys are in the last. NaN is in the first, because no comparison
    with it is true; so is every score where the range is not finite.
    """
    at = (x - low) * per_unit
    b_bin = tl.where(at > 0, tl.minimum(at, BINS - 2.0), 0.0).to(tl.int32)
    return tl.where(forced, BINS - 1, b_bin)


@jit
def _bin_of_kth(b_hist, k):
    """The bin that holds the k-th largest score, and how many scores in it are among the k."""
    bins = tl.arange(0, BINS)
    kth_bin = tl.max(tl.where(tl.cumsum(b_hist, 0, reverse=True) >= k, bins, 0), 0)
    return kth_bin, k - tl.sum(tl.where(bins > kth_bin, b_hist, 0), 0)


@jit
def _histogram_and_variance(p_row, b_first, low, per_unit, n, pos, start, n_sink, n_local,
                            HISTOGRAM: tl.constexpr, VARIANCE: tl.constexpr, BS: tl.constexpr):
    """One pass over a query's scores: their histogram (BINS,) and Var_t, each if asked for."""
    b_hist = tl.zeros([BINS], tl.int32)
    b_n = tl.zeros([BS], tl.float32)
    b_sum = tl.zeros([BS], tl.float32)
    b_square = tl.zeros([BS], tl.float32)
    # Scores are summed less the mean of the first ones. Else Σx² and (Σx)² are large and nearly
    # equal, and their difference has no digits left.
    shift = tl.sum(b_first, 0) / tl.minimum(n, BS)
    for s0 in range(start // BS * BS, pos + 1, BS):
        s = s0 + tl.arange(0, BS)
        x, see, forced = _load_scores(p_row, s, s <= pos, pos, start, n_sink, n_local)
        if HISTOGRAM:
            b_hist += tl.histogram(_bin(x, forced, low, per_unit), BINS, mask=see)
        if VARIANCE:
            x = tl.where(see, x - shift, 0.0)
            b_n += see.to(tl.float32)
            b_sum += x
            b_square += x * x
    var = (n * 0).to(tl.float32)
    if VARIANCE:  # of the lanes together (Chan, Golub and LeVeque 1979)
        b_mean = b_sum / tl.maximum(b_n, 1.0)
        mean = tl.sum(b_sum, 0) / n
        b_far = b_n * (b_mean - mean) * (b_mean - mean)
        var = tl.sum(b_square - b_sum * b_mean + b_far, 0) / n
    return b_hist, var


@jit
def _keys_per_query(var, var_avg, n, k_base, k_min, k_max, RULE: tl.constexpr):
    """
    k_t by the rule (Eq. 8), clamped to [k_min, k_max] and to the n visible keys. Where nothing has
    been averaged yet (var_avg 0) or a score is not finite (var NaN), the query counts as average.
    """
    known = (var_avg > 0) & (var == var)
    ratio = tl.where(known, var / tl.maximum(var_avg, 1e-30), 1.0)
    if RULE == "inverse":  # DEVIATION: the direction that the paper's prose describes
        k = tl.floor(k_base * (0.5 + 1 / (1 + ratio)) + 0.5).to(tl.int32)
    elif RULE == "eq8":  # Eq. 8 as printed
        k = tl.floor(tl.minimum(k_base * ratio, k_max)).to(tl.int32)
    elif RULE == "fixed":
        k = k_base
    else:
        tl.static_assert(False, "_keys_per_query has no branch for this k_rule")
    return tl.minimum(tl.minimum(tl.maximum(k, k_min), k_max), n)


@jit
def _order_bits(x, forced):
    """
    Scores as uint32 in the same order: a positive float's bits grow with it, a negative one's are
    inverted. NaN is the lowest, -0 equals 0, forced keys are above all.
    """
    x = tl.where(x == x, x, float("-inf"))
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    bits = tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)
    return tl.where(forced, 0xFFFFFFFF, bits).to(tl.uint32)


@jit
def _load_candidates(p_row, p_candidates, i, n, pos, start, n_sink, n_local):
    """Of the candidates i (BS,), of n: the keys, which there are, and the order of their scores."""
    # (BS,)
    s = tl.load(p_candidates + i, mask=i < n, other=0)
    x, exists, forced = _load_scores(p_row, s, i < n, pos, start, n_sink, n_local)
    return s, exists, _order_bits(x, forced)


@jit
def _own_query(p_pos, p_start, t0, T, S, pos_stride, n_rows, HAS_START: tl.constexpr):
    """
    The query of a program of a grid (n_rows, B). Returns its place among all B·T queries, the
    place of its row of scores, and its last and first visible key.
    """
    i_row = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    t = t0 + i_row
    pos, start = _load_visible(p_pos, p_start, t, i_b, T, pos_stride, HAS_START)
    return i_b * T + t, (i_b * n_rows + i_row) * S, pos, start


@jit
def _variance_kernel(
        p_scores, p_var, p_pos, p_start, t0, T, S, pos_stride, n_rows,
        HAS_START: tl.constexpr, BS: tl.constexpr):
    """Var_t of one query, as _select_kernel computes it. Grid (n_rows, B)."""
    i_query, i_scores, pos, start = _own_query(p_pos, p_start, t0, T, S, pos_stride, n_rows,
                                               HAS_START)
    n = pos - start + 1
    p_scores += i_scores
    s = start + tl.arange(0, BS)
    b_first, _, _ = _load_scores(p_scores, s, s <= pos, pos, start, 0, 0)
    _, var = _histogram_and_variance(p_scores, b_first, 0.0, 0.0, n, pos, start, 0, 0,
                                     HISTOGRAM=False, VARIANCE=True, BS=BS)
    tl.store(p_var + i_query, var)


@jit
def _select_kernel(
        p_scores, p_candidates, p_index_w, p_var_avg, p_indices, p_k_t, p_var, p_pos, p_start,
        t0, T, S, pos_stride, n_rows, width, k_base, k_min, k_max, n_sink, n_local,
        Hi: tl.constexpr, RI: tl.constexpr, SIGMOID: tl.constexpr, RULE: tl.constexpr,
        HAS_START: tl.constexpr, BS: tl.constexpr):
    """
    Var_t, k_t (Eq. 8) and the k_t best keys of one query. Grid (n_rows, B).

    The row of scores is read twice, whatever k_t is: once for a histogram and the variance, once
    to write out the keys of the bins above the one that holds the k_t-th largest score. The keys in
    that bin are the candidates, about one key in a thousand, and all that are equal. They are set
    aside in p_candidates (B, n_rows, S) and searched exactly. All passes read the same stored
    scores, so they agree to the last bit.
    """
    i_query, i_scores, pos, start = _own_query(p_pos, p_start, t0, T, S, pos_stride, n_rows,
                                               HAS_START)
    n = pos - start + 1
    p_scores += i_scores
    p_candidates += i_scores
    p_index_w += i_query * Hi
    p_indices += i_query * width
    lane = tl.arange(0, BS)

    # 1. histogram and variance
    s = start + lane
    b_first, see, forced = _load_scores(p_scores, s, s <= pos, pos, start, n_sink, n_local)
    low, per_unit = _bin_range(p_index_w, b_first, see, Hi, RI, SIGMOID)
    b_hist, var = _histogram_and_variance(
        p_scores, b_first, low, per_unit, n, pos, start, n_sink, n_local,
        HISTOGRAM=True, VARIANCE=RULE != "fixed", BS=BS)

    # 2. keys per query
    var_avg = tl.load(p_var_avg)
    k_t = _keys_per_query(var, var_avg, n, k_base, k_min, k_max, RULE)
    tl.store(p_var + i_query, var)
    tl.store(p_k_t + i_query, k_t)

    # 3. the keys above the bin of the k_t-th largest score, and the candidates in it
    kth_bin, need = _bin_of_kth(b_hist, k_t)
    n_taken = 0
    n_candidates = 0
    for s0 in range(start // BS * BS, pos + 1, BS):
        s = s0 + lane
        x, see, forced = _load_scores(p_scores, s, s <= pos, pos, start, n_sink, n_local)
        b_bin = _bin(x, forced, low, per_unit)
        n_taken = _append(p_indices, n_taken, s, see & (b_bin > kth_bin))
        n_candidates = _append(p_candidates, n_candidates, s, see & (b_bin == kth_bin))
    tl.debug_barrier()  # candidates that one thread stored are read by another

    # 4. the need-th largest candidate, digit by digit: 10, 11 and 11 bits (radix search)
    kth = 0  # its digits so far
    for digit in tl.static_range(3):
        shift = 22 - 11 * digit
        b_hist = tl.zeros([BINS], tl.int32)
        for i0 in range(0, n_candidates, BS):
            s, exists, order = _load_candidates(p_scores, p_candidates, i0 + lane, n_candidates,
                                                pos, start, n_sink, n_local)
            if digit > 0:
                exists = exists & (order >> (shift + 11) == kth)
            b_digit = (order >> shift) & 2047
            b_hist += tl.histogram(b_digit.to(tl.int32), BINS, mask=exists)
        value, need = _bin_of_kth(b_hist, need)
        kth = (kth << 11) | value.to(tl.uint32)

    # 5. the candidates above it and, of those equal to it, the lowest keys
    n_equal = 0
    for i0 in range(0, n_candidates, BS):
        s, exists, order = _load_candidates(p_scores, p_candidates, i0 + lane, n_candidates,
                                            pos, start, n_sink, n_local)
        equal = exists & (order == kth)
        rank = n_equal + tl.cumsum(equal.to(tl.int32), 0)
        take = (exists & (order > kth)) | (equal & (rank <= need))
        n_taken = _append(p_indices, n_taken, s, take)
        n_equal += tl.sum(equal.to(tl.int32), 0)


def _score_chunks(index_q, index_k, index_w, index_b, activation, pos, start):
    """
    Compute the scores of a chunk of queries at a time, about kernels.SCORES_BYTES of them. For
    each chunk, yield the grid and the arguments of a kernel with a program for each of its queries.
    """
    B, T = index_q.shape[:2]
    S = index_k.size(1)
    options = _options_like(index_q, "scores")
    tile = options["TQ"]
    fitting = kernels.SCORES_BYTES // (4 * B * S) // tile * tile
    n_rows = min(triton.cdiv(T, tile) * tile, max(tile, fitting))
    scores = torch.empty(B, n_rows, S, device=index_q.device, dtype=torch.float32)
    positions = _positions(pos, start)
    for t0 in range(0, T, n_rows):
        n_queries = min(n_rows, T - t0)
        # Positions increase along T: these queries see no key from `end` on
        end = S - T + t0 + n_queries
        chunk = dict(p_scores=scores, t0=t0, T=T, S=S, n_rows=n_rows, **positions)
        _scores_kernel[triton.cdiv(n_queries, tile), triton.cdiv(end, options["BN"]), B](
            p_index_q=index_q, p_index_k=index_k, p_index_w=index_w, p_index_b=index_b,
            **chunk, **_index_sizes(index_q, activation, tile),
            PRECISION=_dot_precision(), **options)
        yield (n_queries, B), chunk


@torch.library.custom_op("gsa::select", mutates_args=())
def select(index_q: Tensor, index_k: Tensor, index_w: Tensor, index_b: Tensor, activation: str,
           pos: Tensor, start: Tensor | None, rule: str, k_base: int, k_min: int, k_max: int,
           n_sink: int, n_local: int, var_avg: Tensor | None,
           width: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    Indexer scores (Eq. 7) -> variance -> k_t (Eq. 8) -> the k_t best visible keys, exactly.

    index_q (B, T, Hi, di), index_k (B, S, di), index_w (B, T, Hi), index_b (Hi,): the indexer;
    activation: "sigmoid" or "relu". pos (1 or B, T): position of each query among the keys, rising;
    start (B, T): first position of its document, None for one document. rule to n_local: the
    budget, see attention.Budget; var_avg (): V̄. width: the largest possible k_t.

    Returns k_t (B, T) int64; indices (B, T, width) int32, in no order, -1 where there is none;
    Var_t (B, T) fp32, 0 where the rule is "fixed" and needs none. Has no gradient: call it under
    torch.no_grad().
    """
    B, T, Hi, _ = index_q.shape
    index = tuple(x.contiguous() for x in (index_q, index_k, index_w, index_b))
    indices = torch.full((B, T, width), -1, dtype=torch.int32, device=index_q.device)
    k_t = torch.empty(B, T, dtype=torch.long, device=index_q.device)
    var = torch.empty(B, T, device=index_q.device, dtype=torch.float32)
    if var_avg is None:
        var_avg = torch.zeros((), device=index_q.device)
    for grid, chunk in _score_chunks(*index, activation, pos, start):
        candidates = torch.empty_like(chunk["p_scores"], dtype=torch.int32)  # (B, n_rows, S)
        _select_kernel[grid](
            p_candidates=candidates, p_index_w=index[2], p_var_avg=var_avg,
            p_indices=indices, p_k_t=k_t, p_var=var, **chunk,
            width=width, k_base=k_base, k_min=k_min, k_max=k_max,
            n_sink=n_sink, n_local=max(1, n_local),  # a query always keeps its own position
            Hi=Hi, RI=triton.next_power_of_2(Hi), SIGMOID=activation == "sigmoid", RULE=rule,
            **_options_like(index_q, "select"))
    return k_t, indices, var


@select.register_fake
def _(index_q, index_k, index_w, index_b, activation, pos, start, rule, k_base, k_min, k_max,
      n_sink, n_local, var_avg, width):
    B, T = index_q.shape[:2]
    k_t = index_q.new_empty(B, T, dtype=torch.long)
    indices = index_q.new_empty(B, T, width, dtype=torch.int32)
    return k_t, indices, index_q.new_empty(B, T, dtype=torch.float32)


@torch.library.custom_op("gsa::score_variance", mutates_args=())
def score_variance(index_q: Tensor, index_k: Tensor, index_w: Tensor, index_b: Tensor,
                   activation: str, pos: Tensor, start: Tensor | None) -> Tensor:
    """
    Var_t (B, T) fp32: the population variance of the scores (Eq. 7) of each query's visible keys.
    Bit for bit what select returns, without a selection: all that the warm-up phase needs.
    Arguments as in select. Has no gradient: call it under torch.no_grad().
    """
    B, T = index_q.shape[:2]
    index = tuple(x.contiguous() for x in (index_q, index_k, index_w, index_b))
    var = torch.empty(B, T, device=index_q.device, dtype=torch.float32)
    for grid, chunk in _score_chunks(*index, activation, pos, start):
        _variance_kernel[grid](p_var=var, **chunk, **_options_like(index_q, "variance"))
    return var


@score_variance.register_fake
def _(index_q, index_k, index_w, index_b, activation, pos, start):
    return index_q.new_empty(index_q.shape[:2], dtype=torch.float32)
