"""
The computations of Gated Sparse Attention (GSA, arXiv 2601.15305), without parameters: model.py owns those.

Three stages, each with an eager reference (the oracle: one line per equation, O(T·S) memory) and a tiled
PyTorch path (query tiles over the union of their keys, O(tile·S) memory) that gives the same numbers:

    select            lightning indexer scores (Eq. 7), variance, budget (Eq. 8), exact top-k
    sparse_attention  softmax attention over the selected keys, forward and backward
    index_loss        KL from the layer's real attention to the indexer's, forward and backward

`backend` names the path: "eager" or "torch". There is no silent fallback: an unknown backend raises.
The symbols and the layout (B, T, H, d) are those at the top of model.py.
"""
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("eager", "torch")
TILE = 128  # queries per tile of the PyTorch path
HIDDEN = -1e30  # added to a masked score: exp gives exactly 0, and unlike -inf it can be added to and subtracted from
FORCED = 1e9  # score of a key that must be selected: above all real ones, and still hidden after adding HIDDEN


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


class Tile(NamedTuple):
    """Queries t0…t1-1, none of which may attend to a key outside begin…end-1."""
    t0: int
    t1: int
    begin: int
    end: int

    @property
    def queries(self):
        return slice(self.t0, self.t1)

    @property
    def keys(self):
        return slice(self.begin, self.end)


def document_starts(doc, pos, last_doc=None, last_start=None):
    """
    Where the document of each position starts: doc, pos (B or 1, T) -> (B, T). A document is a run of equal ids.
    last_doc, last_start (B,): those of the position before the first, which may be in the same document.
    """
    start = torch.where(torch.cat((torch.ones_like(doc[:, :1]), doc.diff(dim=1)), 1) != 0, pos, 0)
    if last_doc is not None:
        start[:, 0] = torch.where(doc[:, 0] == last_doc, last_start, start[:, 0])
    return start.cummax(1).values


@dataclass
class Visible:
    """Which keys a query may attend to: those at its own position or before, down to the start of its document."""
    pos: Tensor                  # (B or 1, T) position of each query among the keys, increasing along T
    n_keys: int                  # S
    start: Tensor | None = None  # (B, T) first position of the query's document; None = 0

    @classmethod
    def causal(cls, T, doc=None, device=None):
        """The usual case: T queries at positions 0…T-1 over T keys; doc (B, T), a document id per position, or None."""
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
        ends = (self.pos.amax(0)[[t - 1 for t in t1]] + 1).tolist()
        begins = [0] * len(t0) if self.start is None else self.start.amin(0)[t0].tolist()
        return [Tile(*x) for x in zip(t0, t1, begins, ends)]

    @property
    def whole(self):
        """All queries as one tile."""
        return Tile(0, self.pos.size(1), self.tiles[0].begin, self.tiles[-1].end)

    def mask(self, tile=None):
        """True = visible: (B or 1, tq, end-begin) for a tile, (B or 1, T, S) without."""
        t0, t1, begin, end = tile or (0, self.pos.size(1), 0, self.n_keys)
        key = torch.arange(begin, end, device=self.pos.device)
        mask = key <= self.pos[:, t0:t1, None]
        return mask if self.start is None else mask & (key >= self.start[:, t0:t1, None])

    def bias(self, tile, dtype):
        """The mask as an addend, 0 or HIDDEN. On a CPU adding it is 20 times faster than masked_fill."""
        return self.mask(tile).to(dtype).sub_(1).mul_(-HIDDEN)


@dataclass
class Selection:
    """The keys S_t of every query, one set for all its heads. Saved for the backward pass, never recomputed."""
    visible: Visible
    budget: Tensor         # (B, T) int64, k_t = |S_t|
    indices: Tensor | None  # (B, T, max k_t) int32 in no particular order, -1 = none; None = every visible key
    var: Tensor | None = None  # (B, T) Var_t, population variance of the scores over the visible keys

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

    def bias(self, tile, dtype=torch.float32):
        """What to add to a tile's scores so that only selected keys remain: 0 or HIDDEN, (B or 1, tq, end-begin)."""
        if self.indices is None:
            return self.visible.bias(tile, dtype)
        idx, width = self.indices[:, tile.queries].long(), tile.end - tile.begin
        bias = torch.full((*idx.shape[:2], width + 1), HIDDEN, dtype=dtype, device=idx.device)
        bias.scatter_(2, torch.where(idx < 0, width, idx - tile.begin), 0.0)  # the -1s land in a column that is dropped
        return bias[..., :width]

    def union(self, tile, dtype=torch.float32):
        """
        A tile's queries over the union of their keys: keys, what to index the key dimension with, a slice or (B, U) int64,
        ascending; bias (B or 1, tq, U), 0 or HIDDEN.
        Rows whose union is smaller than the largest are padded with keys that no query of theirs selects.
        """
        if self.indices is not None and tile.t1 - tile.t0 == 1:  # one query: the union is its own list
            idx = self.indices[:, tile.t0].long()
            return idx.clamp(min=0), (idx[:, None] >= 0).to(dtype).sub_(1).mul_(-HIDDEN)
        bias = self.bias(tile, dtype)
        if self.indices is None or bias.size(-1) < 4 * self.indices.size(-1):  # a union is rarely below 2k: do not look
            return tile.keys, bias
        union = bias.amax(1) == 0  # (B, end-begin)
        U = int(union.sum(1).max())
        if 2 * U > union.size(1):  # most of what is visible: cheaper whole than gathered
            return tile.keys, bias
        keys = torch.argsort(union.logical_not().to(torch.uint8), dim=1, stable=True)[:, :U]
        return keys + tile.begin, bias.gather(2, keys[:, None].expand(-1, bias.size(1), -1))


def check_backend(backend):
    """Raise ValueError unless this build has the path."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not available; choose one of {', '.join(BACKENDS)}")


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
    While nothing has been averaged (V̄ = 0) every query counts as average. Rounded, except 'eq8', printed with a floor.
    """
    if budget.rule == "fixed":
        k = torch.full_like(n_visible, budget.k_base)
    else:
        ratio = torch.where(budget.var_avg > 0, var / budget.var_avg.to(var.dtype).clamp(min=1e-30), 1.0)
        if budget.rule == "eq8":
            k = (budget.k_base * ratio).clamp(max=budget.k_max).floor().long()
        elif budget.rule == "inverse":  # DEVIATION: the direction that the paper's prose describes
            k = (budget.k_base * (0.5 + 1 / (1 + ratio))).round().long()
        else:
            raise ValueError(f"k_rule {budget.rule!r} is not one of inverse, eq8, fixed")
    return torch.minimum(k.clamp(budget.k_min, budget.k_max), n_visible)


def _variance(scores, visible, n):
    """Population variance over the n visible keys: (B, T, S), 0/1 of the same dtype, (B, T) -> (B, T). Two passes: no cancellation."""
    mean = (scores * visible).sum(-1) / n
    return ((scores - mean[..., None]) * visible).square_().sum(-1) / n


def _force(scores, visible, tile, budget):
    """Raise the forced keys above every score, in place: the query itself, its local window, its document's sinks."""
    B, tq, _ = scores.shape
    pos = visible.pos[:, tile.queries, None] - tile.begin  # (B or 1, tq, 1)
    local = (pos - torch.arange(max(1, budget.n_local), device=pos.device)).clamp(min=0)
    scores.scatter_(2, local.expand(B, tq, -1), FORCED)
    if budget.n_sink:
        first = 0 if visible.start is None else visible.start[:, tile.queries, None] - tile.begin
        sinks = torch.minimum(first + torch.arange(budget.n_sink, device=pos.device), pos)
        scores.scatter_(2, sinks.expand(B, tq, -1), FORCED)
    return scores


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
    order = scores.masked_fill(forced, math.inf).masked_fill(~mask, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.arange(scores.size(-1), device=k.device) < k[..., None]
    return torch.zeros_like(mask).scatter_(2, order, chosen), k, var


def _tile_scores(index, tile):
    """Scores of a tile, (B, tq, end-begin), one indexer head at a time so that the buffers stay small."""
    keys, q, w = index.k[:, tile.keys].transpose(1, 2), index.q[:, tile.queries], index.w[:, tile.queries, :, None]
    scale = 1 / math.sqrt(q.size(-1))
    scores = 0
    for j in range(q.size(2)):
        z = torch.baddbmm(index.b[j], q[:, :, j], keys, alpha=scale)
        z = z.sigmoid_() if index.activation == "sigmoid" else z.relu_()
        scores = z.mul_(w[:, :, j]) if j == 0 else scores.addcmul_(z, w[:, :, j])
    return scores


@torch.compiler.disable
@torch.no_grad()
def select(index, visible, budget, backend="torch"):
    """
    Lightning indexer -> budget -> exact top-k (Eqs. 7, 8).

    index: Index, visible: Visible, budget: Budget. Returns Selection, without gradient (the indexer learns through
    index_loss). Ties go to the lower index; a query's own position is always selected; forced keys count in k_t.
    The result for a query depends on the keys it may see and on V̄ only: causal and independent of the batch.
    """
    check_backend(backend)
    if backend == "eager":
        mask, k, var = select_eager(index, visible, budget)
        order = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :int(k.max())]
        picked = torch.arange(order.size(-1), device=k.device) < k[..., None]
        return Selection(visible, k, order.masked_fill(~picked, -1).int(), var)
    B, T = index.w.shape[:2]
    widest = max(budget.k_min, min(budget.k_base, budget.k_max)) if budget.rule == "fixed" else budget.k_max
    width = min(widest, visible.n_keys)
    indices = torch.full((B, T, width), -1, dtype=torch.int32, device=index.w.device)
    k, var = indices.new_zeros(B, T, dtype=torch.long), index.w.new_zeros(B, T)
    for tile in visible.tiles:
        rows, see = tile.queries, visible.mask(tile)  # (B or 1, tq, end-begin)
        n, seen, visible_01 = see.sum(-1), see.size(-1), see.to(index.w.dtype)
        scores = _tile_scores(index, tile)  # (B, tq, end-begin)
        if budget.rule != "fixed":
            var[:, rows] = _variance(scores, visible_01, n)
        k_t = k[:, rows] = budgets(var[:, rows], n.expand(B, -1), budget)
        scores = _force(scores, visible, tile, budget).add_(visible_01.sub_(1).mul_(-HIDDEN))
        if seen <= width + 1:
            order = scores.sort(dim=-1, descending=True, stable=True).indices
        else:
            top, order = scores.topk(width + 1)
            # A tie across the boundary: topk kept any of the equals, a stable sort keeps the lowest index.
            tied = (top.gather(2, k_t[..., None] - 1) == top.gather(2, k_t[..., None]))[..., 0].nonzero(as_tuple=True)
            if len(tied[0]):
                order[tied] = scores[tied].sort(dim=-1, descending=True, stable=True).indices[:, :width + 1]
        n = min(width, seen)
        picked = torch.arange(n, device=k.device) < k_t[..., None]
        indices[:, rows, :n] = (order[..., :n] + tile.begin).masked_fill(~picked, -1).int()
    return Selection(visible, k, indices, var)


# ----------------------------------------------------------------------------------------------------------------
# Stage 2: attention over the selected keys

def sparse_attention_eager(q, k, v, mask):
    """softmax(q·k/√d) over S_t, times v. mask (B, T, S). Returns o (B, T, H, d) and LSE (B, T, H), natural log."""
    R = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(R, 2), v.repeat_interleave(R, 2)
    s = torch.einsum("bthd,bshd->btsh", q, k) / math.sqrt(q.size(-1))
    s = s.masked_fill(~mask[..., None], -math.inf)
    return torch.einsum("btsh,bshd->bthd", s.softmax(2), v), s.logsumexp(2)


def _rows(x, G):
    """(B, tq, H, ...) -> (B, G, R·tq, ...): the R = H/G query heads of a kv head become rows of one matrix product."""
    B, tq, H = x.shape[:3]
    return x.reshape(B, tq, G, H // G, -1).permute(0, 2, 3, 1, 4).reshape(B, G, H // G * tq, -1)


def _unrows(x, tq):
    """The inverse of _rows: (B, G, R·tq, d) -> (B, tq, H, d)."""
    B, G, rows, d = x.shape
    return x.view(B, G, rows // tq, tq, d).permute(0, 3, 1, 2, 4).reshape(B, tq, -1, d)


def _take(x, keys):
    """A tile's keys (Selection.union) out of (B, S, ...): (B, U, ...)."""
    return x[:, keys] if isinstance(keys, slice) else x[torch.arange(x.size(0), device=x.device)[:, None], keys]


def _put(grad, keys, x):
    """The adjoint of _take: add x (B, U, ...) to grad (B, S, ...) in place."""
    if isinstance(keys, slice):
        grad[:, keys] += x
    else:
        offset = torch.arange(grad.size(0), device=grad.device)[:, None] * grad.size(1)
        grad.view(-1, *grad.shape[2:]).index_add_(0, (keys + offset).flatten(), x.flatten(0, 1))


def _logits(q_rows, k_tile, bias):
    """q·k/√d + bias, at least fp32: (B, G, R·tq, U)."""
    s = torch.matmul(q_rows * (1 / math.sqrt(q_rows.size(-1))), k_tile.permute(0, 2, 3, 1)).to(bias.dtype)
    s.view(*s.shape[:2], -1, *bias.shape[1:]).add_(bias[:, None, None])
    return s


class _SparseAttention(torch.autograd.Function):
    """A tile holds whole rows, so the backward pass recomputes P by softmax and keeps nothing of size T·k."""

    @staticmethod
    def forward(ctx, q, k, v, selection):
        B, T, H, d = q.shape
        G, dtype = k.size(2), torch.promote_types(q.dtype, torch.float32)
        o = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(B, T, H, device=q.device, dtype=dtype)
        for tile in selection.visible.tiles:
            rows, tq = tile.queries, tile.t1 - tile.t0
            keys, bias = selection.union(tile, dtype)
            s = _logits(_rows(q[:, rows], G), _take(k, keys), bias)  # (B, G, R·tq, U)
            p = s.softmax(-1)
            l = s.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()  # LSE, from the largest term
            o[:, rows] = _unrows(p.to(v.dtype) @ _take(v, keys).transpose(1, 2), tq)
            lse[:, rows] = _unrows(l, tq)[..., 0]
        ctx.save_for_backward(q, k, v, o)
        ctx.selection = selection
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx, do, _):
        q, k, v, o = ctx.saved_tensors
        G, scale, dtype = k.size(2), 1 / math.sqrt(q.size(-1)), torch.promote_types(q.dtype, torch.float32)
        delta = (do.to(dtype) * o).sum(-1)  # (B, T, H), Σ_s P·dP
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(x.shape, device=x.device, dtype=dtype) for x in (k, v))
        for tile in ctx.selection.visible.tiles:
            rows, tq = tile.queries, tile.t1 - tile.t0
            keys, bias = ctx.selection.union(tile, dtype)
            k_t, v_t = _take(k, keys), _take(v, keys)  # (B, U, G, d)
            q_t, do_t = _rows(q[:, rows], G), _rows(do[:, rows], G)  # (B, G, R·tq, d)
            p = _logits(q_t, k_t, bias).softmax(-1)
            ds = (do_t @ v_t.permute(0, 2, 3, 1)).to(dtype).sub_(_rows(delta[:, rows], G)).mul_(p).mul_(scale).to(q.dtype)
            dq[:, rows] = _unrows(ds @ k_t.transpose(1, 2), tq)
            _put(dk, keys, (ds.transpose(2, 3) @ q_t).transpose(1, 2).to(dtype))
            _put(dv, keys, (p.to(q.dtype).transpose(2, 3) @ do_t).transpose(1, 2).to(dtype))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


@torch.compiler.disable
def sparse_attention(q, k, v, selection, backend="torch"):
    """
    Attention over the selected keys, differentiable in q, k, v.

    q (B, T, H, d); k, v (B, S, G, d), H % G == 0. Returns o (B, T, H, d) and LSE (B, T, H) (natural log, no gradient).
    """
    check_backend(backend)
    if q.size(2) % k.size(2):
        raise ValueError(f"q has {q.size(2)} heads, not a multiple of the {k.size(2)} of k and v")
    if backend == "eager":
        o, lse = sparse_attention_eager(q, k, v, selection.mask())
        return o, lse.detach()
    with torch.autocast(q.device.type, enabled=False):
        return _SparseAttention.apply(q, k, v, selection)


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
    """The loss is a scalar, so its gradients are computed in the same pass over the tiles and only scaled in backward."""

    @staticmethod
    def forward(ctx, iq, ik, iw, ib, log_tau, activation, q, k, selection):
        B, T, Hi, di = iq.shape
        scale, tau, G = 1 / math.sqrt(di), log_tau.exp(), k.size(2)
        loss, dtau = torch.zeros_like(log_tau), torch.zeros_like(log_tau)
        dq, dk, dw, db = (torch.zeros_like(x) for x in (iq, ik, iw, ib))
        for tile in selection.visible.tiles:
            rows = tile.queries
            keys, bias = selection.union(tile, iq.dtype)
            p = _logits(_rows(q[:, rows], G), _take(k, keys), bias).softmax(-1)
            p = p.view(B, -1, *bias.shape[1:]).mean(1)  # teacher, (B, tq, U)
            k_t = _take(ik, keys)  # (B, U, di)
            acts, scores = [], 0
            for j in range(Hi):
                z = torch.baddbmm(ib[j], iq[:, rows, j], k_t.transpose(1, 2), alpha=scale)
                acts.append(z.sigmoid_() if activation == "sigmoid" else z.relu_())
                scores = scores + acts[j] * iw[:, rows, j, None]
            logits = torch.add(bias, scores * tau)
            student = logits.softmax(-1)
            lse = logits.amax(-1) - student.amax(-1).log()  # (B, tq)
            p_score = (p * scores).sum()
            loss += torch.xlogy(p, p).sum() - tau * p_score + lse.sum()  # Σ_s p·(log p - τI + LSE), and Σ_s p = 1
            g = student.sub_(p)  # gradient with respect to τ·I
            dtau += (g * scores).sum() * tau
            g *= tau
            dk_t = torch.zeros_like(k_t)
            for j, a in enumerate(acts):
                dw[:, rows, j] = (g * a).sum(-1)
                slope = a * (1 - a) if activation == "sigmoid" else (a > 0).to(a.dtype)
                dz = slope.mul_(g).mul_(iw[:, rows, j, None])
                db[j] += dz.sum()
                dq[:, rows, j] = (dz @ k_t).mul_(scale)
                dk_t.baddbmm_(dz.transpose(1, 2), iq[:, rows, j], alpha=scale)
            _put(dk, keys, dk_t)
        ctx.save_for_backward(dq, dk, dw, db, dtau)
        ctx.n = B * T
        return loss / ctx.n

    @staticmethod
    def backward(ctx, grad):
        return tuple(g * (grad / ctx.n) for g in ctx.saved_tensors) + (None,) * 4


@torch.compiler.disable
def index_loss(q, k, index, log_tau, selection, backend="torch"):
    """
    Mean over queries of KL(p ‖ softmax over S_t of τ·I), in nats; τ = exp(log_tau).  DEVIATION: τ (see README).

    q (B, T, H, d), k (B, S, G, d): the layer's attention, the teacher p, which gets no gradient.
    index: Index and log_tau (): the student, which does. selection: the keys S_t of both.
    """
    check_backend(backend)
    if backend == "eager":
        return index_loss_eager(q.detach(), k.detach(), index, log_tau, selection.mask())
    with torch.autocast(q.device.type, enabled=False):
        return _IndexLoss.apply(*index[:4], log_tau, index.activation, q.detach(), k.detach(), selection)


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
    recall = best = first = 0.0
    choosing = later = 0
    for tile in visible.tiles:
        rows, see, dtype = tile.queries, visible.mask(tile), torch.promote_types(q.dtype, torch.float32)  # (B or 1, tq, end-begin)
        p = _logits(_rows(q[:, rows], k.size(2)), k[:, tile.keys], visible.bias(tile, dtype)).softmax(-1)
        p = p.view(q.size(0), -1, *see.shape[1:])  # (B, H, tq, end-begin)
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
