"""
The PyTorch path of selection: the scores of a tile of queries, the budget, an exact top-k.
attention.select_eager is the same for all queries at once. Everything is computed at least in fp32.
"""
import math

import torch

from tiled import at_least_fp32, visible_bias

SCORE_KEYS = 512  # keys per step of the indexer, whose scores then fit the CPU's cache,
SCORES = 1 << 16  # and more where the tile has few queries (decoding): up to so many scores

FORCED = 1e30  # score of what must be selected
LARGEST = 1e29  # real scores are cut to ± this, so that none passes FORCED or tiled.HIDDEN


@torch.compiler.disable
def select(index, visible, budget):
    """
    attention.select. Returns k_t (B, T) int64, indices (B, T, width) int32 and Var_t (B, T), which
    is 0 where the rule is "fixed" and needs none.
    """
    index = in_fp32(index)
    B, T = index.w.shape[:2]
    width = min(budget.largest, visible.n_keys)
    indices = torch.full((B, T, width), -1, dtype=torch.int32, device=index.w.device)
    k_t = indices.new_zeros(B, T, dtype=torch.long)
    var = index.w.new_zeros(B, T)
    for tile in visible.tiles:
        scores, n_visible, var_tile = tile_scores(index, visible, tile)
        if budget.adaptive:
            var[:, tile.queries] = var_tile
        k_tile = budget.keys_per_query(var_tile, n_visible)  # (B, queries), Eq. 8
        k_t[:, tile.queries] = k_tile
        force(scores, visible, tile, budget)
        n = min(width, tile.end - tile.begin)
        best = top_k(scores.flatten(0, 1), k_tile.flatten(), n).view(B, -1, n)
        indices[:, tile.queries, :n] = torch.where(best < 0, best, best + tile.begin)
    return k_t, indices, var


@torch.compiler.disable
def score_variance(index, visible):
    """attention.score_variance. Returns Var_t (B, T)."""
    index = in_fp32(index)
    return torch.cat([tile_scores(index, visible, tile)[2] for tile in visible.tiles], 1)


def in_fp32(index):
    """The Index with its tensors at least in fp32."""
    q, k, w, b = (at_least_fp32(x) for x in index[:4])
    return index._replace(q=q, k=k, w=w, b=b)


def tile_scores(index, visible, tile):
    """
    Eq. 7 for the queries of a tile. Returns
    scores (B, queries, end - begin), ready for top_k: NaN is the lowest, hidden ones have HIDDEN
    added;
    the number of visible keys (B, queries); Var_t (B, queries).

    It takes some keys at a time and finishes these while they are in the CPU's cache. Each step
    gives a count, a mean and a sum of squared deviations.
    """
    # 1. operands of one product for all indexer heads
    q = index.q[:, tile.queries]  # (B, queries, Hi, di)
    B, n_queries, Hi, di = q.shape
    q = q.reshape(B, n_queries * Hi, di) * (1 / math.sqrt(di))
    w = index.w[:, tile.queries].reshape(B * n_queries, 1, Hi)
    b = index.b.repeat(n_queries)[:, None]  # (queries·Hi, 1)
    scores = q.new_empty(B, n_queries, tile.end - tile.begin)
    step = max(SCORE_KEYS, SCORES // (B * n_queries))
    counts, means, squares = [], [], []
    # x is a view of scores: what is written to it stands there
    for begin, x in zip(range(tile.begin, tile.end, step), scores.split(step, 2)):
        part = tile._replace(begin=begin, end=begin + x.size(2))  # low and high stay true
        # 2. scores
        z = torch.baddbmm(b, q, index.k[:, part.keys].transpose(1, 2))  # (B, queries·Hi, step)
        a = z.sigmoid_() if index.activation == "sigmoid" else z.relu_()
        x.copy_(torch.bmm(w, a.view(B * n_queries, Hi, -1)).view_as(x))  # Eq. 7
        # 3. moments of the visible ones
        all_visible = tile.low <= begin and part.end <= tile.high
        if all_visible:
            mean = x.mean(-1)  # (B, queries)
            count = torch.full_like(mean, x.size(2))
            square = (x - mean[..., None]).square_().sum(-1)
        else:
            mask = visible.mask(part.queries, part.begin, part.end)  # (1 or B, queries, step)
            count = mask.sum(-1).to(x.dtype).expand(B, -1)
            # `where`, not a product with the mask: a hidden NaN times 0 would be NaN
            mean = x.where(mask, 0).sum(-1) / count.clamp(min=1)
            square = (x - mean[..., None]).where(mask, 0).square_().sum(-1)
        counts.append(count)
        means.append(mean)
        squares.append(square)
        # 4. ready for top_k; the moments are taken
        x.nan_to_num_(nan=-LARGEST).clamp_(-LARGEST, LARGEST)  # NaN counts as the lowest score
        if not all_visible:
            x += visible_bias(visible, part)
    # 5. the moments of all steps together, without cancellation (Chan, Golub and LeVeque 1979)
    count, mean, square = map(torch.stack, (counts, means, squares))  # (steps, B, queries)
    total = count.sum(0)
    overall = (count * mean).sum(0) / total  # (B, queries)
    var = (square + count * (mean - overall).square()).sum(0) / total
    return scores, total.long(), var


def force(scores, visible, tile, budget):
    """
    Raise the scores of the forced keys above all others, in place: the last n_local keys, the
    query's own among them, and the first n_sink keys of its document.
    """
    pos = visible.pos[:, tile.queries, None]  # (1 or B, queries, 1)
    start = visible.first[:, tile.queries, None]
    age = torch.arange(max(1, budget.n_local), device=pos.device)
    place = torch.arange(budget.n_sink, device=pos.device)
    local = torch.maximum(pos - age, start)  # where the document is shorter, its first key again
    sink = torch.minimum(start + place, pos)
    for keys in (local, sink):
        scores.scatter_(2, (keys - tile.begin).expand(len(scores), -1, -1), FORCED)


def top_k(scores, k, width):
    """
    The places of the k (rows,) largest scores of each row (rows, S); of equal ones the first.
    Returns (rows, width) in no order, -1 = none; every k <= width <= S.
    Scores 0.1 0.5 0.3 0.5 with k = 2, width = 3 -> 1 3 -1 in some order.
    """
    rows, S = scores.shape
    # 1. torch.topk takes the same number of each row. So each row gets extra entries: width - k of
    #    +inf fill its unused places, and one -inf is there to be dropped in 3 even where k = S.
    #    In the example: +inf -inf; topk(4) takes +inf, 0.5 0.5 and 0.3, which is dropped
    n_extra = width - int(k.min()) + 1
    filler = torch.arange(n_extra, device=k.device) < (width - k)[:, None]  # (rows, n_extra)
    x = torch.cat((scores, torch.where(filler, math.inf, -math.inf)), 1).add_(0.0)  # -0 + 0 = 0
    # 2. floats as integers of the same order: there is no NaN to look for, a third less time
    integer = {4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.view(integer)
    sign = bits >> (8 * x.element_size() - 1)  # -1 where negative, else 0
    bits ^= sign.bitwise_and_(torch.iinfo(integer).max)
    # 3. one entry more than wanted, the smallest of which is dropped
    top, order = bits.topk(width + 1, sorted=False)  # (rows, width + 1)
    smallest, at = top.min(-1, keepdim=True)
    order = order.scatter_(1, at, order[:, -1:].clone())[:, :width]  # the last takes its place
    order.masked_fill_(order >= S, -1)  # an extra entry is no key
    # 4. where a kept one equals the dropped one, topk chose any of them: a stable sort keeps the
    #    first
    tied = ((top == smallest).sum(-1) > 1).nonzero()[:, 0]
    if len(tied):
        stable = scores[tied].sort(dim=-1, descending=True, stable=True).indices[:, :width]
        beyond = torch.arange(width, device=k.device) >= k[tied, None]
        order[tied] = stable.masked_fill(beyond, -1)
    return order
