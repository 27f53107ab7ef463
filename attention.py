"""
Gated Sparse Attention without parameters: the equations of arXiv 2601.15305 (Eqs. 7, 8) and the
attention over the keys that they select. model.py owns the weights and the gates (Eqs. 9, 10).

    selection = select(index, visible, budget)            # indexer scores -> k_t -> S_t
    o, lse = sparse_attention(q, k, v, selection)         # softmax attention over S_t only
    loss = index_loss(q, k, lse, index, log_tau, selection)  # what the indexer learns from

Each of the three has an eager form here, which follows the equations and takes O(T·S) memory. It
is the reference that every faster path is tested against. `backend` names the path:

    "eager"   this file
    "torch"   tiled.py and tiled_select.py: some queries at a time, O(tile·S) memory
    "triton"  kernels.py and its like: on a GPU, or slowly in Triton's interpreter
    "auto"    "triton" on a GPU, "torch" elsewhere

A backend that cannot run raises an error (checks.py): nothing is replaced silently.
Symbols and layout are those of model.py: (B, T, H, d); mask True = attend; index -1 = no key.
"""
import functools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
import kernels_loss
import kernels_select
import tiled
import tiled_select
from checks import check_index, check_inputs


# --------------------------------------------------------------------------------------------------
# The types

class Index(NamedTuple):
    """What the indexer computes from a layer's input: queries, keys and weights, not yet scores."""
    q: Tensor  # (B, T, Hi, di)
    k: Tensor  # (B, S, di), one key for all indexer heads
    w: Tensor  # (B, T, Hi), weight of each head, after its sigmoid (without one if "relu")
    b: Tensor  # (Hi,)
    activation: str = "sigmoid"  # "relu": the indexer of DeepSeek's DSA


# How many keys a query gets (Eq. 8). ratio = Var_t / V̄ says how much its scores vary, compared
# with the average query. kernels_select._keys_per_query computes the same on a GPU.
K_RULES = {
    # DEVIATION: the direction that the paper's prose describes. Scores that vary much are peaked
    # and need fewer keys: ratio 0, 1, ∞ -> 1.5, 1, 0.5 times k_base. "+ 0.5" rounds half up
    "inverse": lambda ratio, budget: (budget.k_base * (0.5 + 1 / (1 + ratio)) + 0.5).floor(),
    # Eq. 8 as printed. An infinite ratio has no integer: hence the clamp before rounding
    "eq8": lambda ratio, budget: (budget.k_base * ratio).clamp(max=budget.k_max).floor(),
    "fixed": lambda ratio, budget: torch.full_like(ratio, budget.k_base),
}


class Budget(NamedTuple):
    """The rule for how many keys a query gets, and which keys it always gets."""
    rule: str = "inverse"  # one of K_RULES
    k_base: int = 512
    k_min: int = 128
    k_max: int = 1024
    n_sink: int = 0  # number of first keys of the document that are always selected
    n_local: int = 0  # the same of last keys, the query's own among them; 0 acts as 1
    var_avg: Tensor | None = None  # V̄, a stored scalar; None or 0 = nothing averaged yet

    def check(self):
        """Raises ValueError where no keys can be selected by this budget."""
        if self.rule not in K_RULES:
            raise ValueError(f"k_rule {self.rule!r} is not one of {', '.join(K_RULES)}")
        forced = self.n_sink + max(1, self.n_local)
        if forced > self.k_min:
            raise ValueError(f"k_min {self.k_min} has no room for the {forced} forced keys "
                             "(n_sink, n_local)")

    @property
    def adaptive(self):
        """May k_t depend on the variance of the scores?"""
        return self.rule != "fixed"

    @property
    def largest(self):
        """No k_t is larger."""
        k = self.k_max if self.adaptive else self.k_base
        return max(self.k_min, min(k, self.k_max))

    def keys_per_query(self, var, n_visible):
        """
        Eq. 8: Var_t and the number of visible keys, both (B, T) -> k_t (B, T), int64.
        A query counts as average (ratio 1) while nothing has been averaged (V̄ = 0) and where a
        score is not finite (Var_t = NaN).
        """
        var = var.to(torch.promote_types(var.dtype, torch.float32))  # bf16 lacks integers above 256
        ratio = torch.ones_like(var)
        if self.adaptive and self.var_avg is not None:
            known = (self.var_avg > 0) & ~var.isnan()
            ratio = torch.where(known, var / self.var_avg.clamp(min=1e-30), 1.0)
        k_t = K_RULES[self.rule](ratio, self).long()  # Eq. 8
        return torch.minimum(k_t.clamp(self.k_min, self.k_max), n_visible)


def document_starts(idx, separator):
    """
    Where the document of each token starts: idx (B, T) -> (B, T), positions in the row.
    A separator is the first token of a new document.
    Tokens 5 6 0 7 8 with separator 0 -> 0 0 2 2 2.
    """
    pos = torch.arange(idx.size(1), device=idx.device)
    return torch.where(idx == separator, pos, 0).cummax(1).values


@dataclass
class Visible:
    """Which keys a query may attend to: from the start of its document up to its own position."""
    pos: Tensor  # (1 or B, T), position of each query among the keys, strictly increasing along T
    n_keys: int  # S
    start: Tensor | None = None  # (B, T), first position of each query's document; None = 0
    n_used: int | None = None  # keys 0 … n_used-1 are filled, those behind are not; None = n_keys
    biases: dict = field(default_factory=dict)  # of bias(), by dtype

    @classmethod
    def causal(cls, T, start=None, device=None):
        """The usual case: T queries at positions 0 … T-1 over T keys."""
        return cls(torch.arange(T, device=device)[None], T, start)

    @property
    def plain(self):
        """One document, as many keys as queries: is_causal of PyTorch's attention."""
        return self.start is None and self.pos.size(0) == 1 and self.pos.size(1) == self.n_keys

    @property
    def first(self):
        """(1 or B, T), the first key that each query sees."""
        return torch.zeros_like(self.pos) if self.start is None else self.start

    @functools.cached_property
    def max_visible(self):
        """
        At least the largest number of keys that a query sees, and exactly that with documents,
        where it costs one GPU→CPU sync.
        """
        if self.start is None:
            return self.n_used or self.n_keys
        return int((self.pos - self.start).max()) + 1

    def mask(self, queries=slice(None), begin=0, end=None):
        """True = visible: (1 or B, queries, end - begin) bool; all queries and keys by default."""
        key = torch.arange(begin, self.n_keys if end is None else end, device=self.pos.device)
        mask = key <= self.pos[:, queries, None]
        if self.start is not None:
            mask = mask & (key >= self.start[:, queries, None])
        return mask

    def bias(self, dtype):
        """
        0 = visible, -∞ = hidden: (1 or B, T, n_used) of the dtype, made once for all layers.
        """
        if dtype not in self.biases:
            mask = self.mask(end=self.n_used)
            self.biases[dtype] = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)
        return self.biases[dtype]

    @functools.cached_property
    def tiles(self):
        """For tiled.py: the queries in tiles, made once for all layers."""
        return tiled.make_tiles(self)


@dataclass
class Selection:
    """The keys S_t of every query, one set for all its heads, forward and backward."""
    visible: Visible
    k_t: Tensor  # (B, T) int64, |S_t|
    # (B, T, at least the largest k_t) int32, in no order, -1 = no key. None = every visible key
    indices: Tensor | None
    var: Tensor | None = None  # (B, T), Var_t: population variance of the visible keys' scores
    union_lists: dict = field(default_factory=dict)  # for kernels.py, by tile_queries

    @classmethod
    def everything(cls, visible, B):
        """S_t = all visible keys: dense attention."""
        return cls(visible, (visible.pos - visible.first + 1).expand(B, -1), None)

    def mask(self):
        """True = selected: (B, T, S) bool."""
        B, T = self.k_t.shape
        S = self.visible.n_keys
        if self.indices is None:
            return self.visible.mask().expand(B, T, S)
        at = torch.where(self.indices < 0, S, self.indices).long()  # -1 goes to column S
        mask = torch.zeros(B, T, S + 1, dtype=torch.bool, device=at.device)
        return mask.scatter_(2, at, True)[..., :S]

    def union_list(self, tile_queries):
        """For kernels.py: its UnionList of tiles of so many queries, made once."""
        if tile_queries not in self.union_lists:
            self.union_lists[tile_queries] = kernels.union_list(
                self.indices, self.visible.n_keys, tile_queries)
        return self.union_lists[tile_queries]


# --------------------------------------------------------------------------------------------------
# The equations, eagerly: O(T·S) memory

def index_scores(index):
    """
    I[t,s] = Σ_j w[t,j] · σ(q^I[t,j]·k^I[s] / √di + b[j])  (Eq. 7), of every query and key:
    (B, T, S).
    """
    z = torch.einsum("btjd,bsd->btjs", index.q, index.k)
    z = z / math.sqrt(index.q.size(-1))  # CHOICE: √di as in the official code
    z = z + index.b[:, None]  # (B, T, Hi, S)
    a = z.sigmoid() if index.activation == "sigmoid" else z.relu()  # (B, T, Hi, S)
    return (index.w[..., None] * a).sum(2)  # Eq. 7


def variance(scores, mask):
    """Population variance over the keys where mask is True: two (B, T, S) -> (B, T)."""
    n = mask.sum(-1)  # (B, T)
    mean = scores.masked_fill(~mask, 0).sum(-1) / n  # (B, T)
    square = (scores - mean[..., None]).square()  # (B, T, S)
    return square.masked_fill(~mask, 0).sum(-1) / n


def select_eager(index, visible, budget):
    """
    The k_t best visible keys of every query, by a stable sort.
    Returns k_t (B, T), indices (B, T, largest k_t) and Var_t (B, T), see Selection.
    """
    scores = index_scores(index)  # (B, T, S)
    mask = visible.mask().expand_as(scores)  # (B, T, S)
    # 1. budget
    var = variance(scores, mask)  # (B, T)
    k_t = budget.keys_per_query(var, mask.sum(-1))  # Eq. 8
    # 2. forced keys
    key = torch.arange(scores.size(-1), device=scores.device)  # (S,)
    local = visible.pos[..., None] - key < max(1, budget.n_local)  # (1 or B, T, S)
    sink = mask.cumsum(-1) <= budget.n_sink  # cumsum: place in the document, from 1
    forced = (local | sink) & mask
    # 3. top-k. Order: hidden < NaN < other scores < forced. nan_to_num makes ±inf finite, too
    ranked = scores.nan_to_num(nan=torch.finfo(scores.dtype).min)
    ranked = ranked.masked_fill(forced, math.inf).masked_fill(~mask, -math.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices  # equals: lower index first
    order = order[..., :int(k_t.max())]  # (B, T, largest k_t)
    rank = torch.arange(order.size(-1), device=order.device)
    return k_t, order.masked_fill(rank >= k_t[..., None], -1).int(), var


def attention_probabilities(q, k, mask):
    """
    softmax(q·k / √d) over the keys where mask is True, every head by itself, and its LSE.
    q (B, T, H, d), k (B, S, G, d), mask (B, T, S) -> (B, T, H, S) and (B, T, H), natural log.
    """
    k = k.repeat_interleave(q.size(2) // k.size(2), 2)  # (B, S, H, d): query heads share KV heads
    s = torch.einsum("bthd,bshd->bths", q, k) / math.sqrt(q.size(-1))
    s = s.masked_fill(~mask[:, :, None], -math.inf)  # (B, T, H, S)
    return s.softmax(-1), s.logsumexp(-1)


def sparse_attention_eager(q, k, v, mask):
    """Attention over the keys of mask (B, T, S). Returns o (B, T, H, d) and LSE (B, T, H)."""
    p, lse = attention_probabilities(q, k, mask)
    v = v.repeat_interleave(q.size(2) // v.size(2), 2)  # (B, S, H, d)
    return torch.einsum("bths,bshd->bthd", p, v), lse


def index_loss_eager(q, k, index, log_tau, mask):
    """
    Mean over the queries of KL(p ‖ softmax(τ·I)), both over the keys of mask (B, T, S).
    The teacher p is the attention, averaged over the heads; it gets no gradient.
    """
    p = attention_probabilities(q.detach(), k.detach(), mask)[0].mean(2)  # (B, T, S)
    # DEVIATION: τ. Scores between 0 and Hi cannot match peaked attention without it
    logits = log_tau.exp() * index_scores(index)  # (B, T, S)
    log_student = logits.masked_fill(~mask, -math.inf).log_softmax(-1)
    kl = torch.xlogy(p, p) - p * log_student.masked_fill(~mask, 0)  # xlogy: 0·log 0 = 0
    return kl.sum(-1).mean()


# --------------------------------------------------------------------------------------------------
# What model.py calls: select, score_variance, sparse_attention, index_loss

def no_autocast(function):
    """The function without autocast: every path computes in the dtype of its inputs or better."""
    @functools.wraps(function)
    def wrapped(first, *args, **kwargs):
        device = first.q.device if isinstance(first, Index) else first.device
        with torch.autocast(device.type, enabled=False):
            return function(first, *args, **kwargs)
    return wrapped


@no_autocast
@torch.no_grad()
def select(index, visible, budget, backend="auto"):
    """
    Lightning indexer -> budget -> exact top-k (Eqs. 7, 8): the Selection of every query.

    No gradient flows through it: the indexer learns from index_loss. Of equal scores the lower
    index is selected; the query's own key always is; forced keys count in k_t.
    A query's result depends on the keys that it sees and on V̄ only: the selection is causal and
    independent of the batch. Raises ValueError for inputs that do not fit each other.
    """
    budget.check()
    backend = check_index(backend, visible, index)
    if backend == "eager":
        k_t, indices, var = select_eager(index, visible, budget)
    elif backend == "torch":
        k_t, indices, var = tiled_select.select(index, visible, budget)
    else:
        k_t, indices, var = kernels_select.select(
            *index, visible.pos, visible.start,
            **budget._asdict(), width=min(budget.largest, visible.n_keys))
    return Selection(visible, k_t, indices, var)


@no_autocast
@torch.no_grad()
def score_variance(index, visible, backend="auto"):
    """Var_t (B, T) alone: what the warm-up phase needs for V̄, without selecting keys."""
    backend = check_index(backend, visible, index)
    if backend == "eager":
        scores = index_scores(index)
        return variance(scores, visible.mask().expand_as(scores))
    if backend == "torch":
        return tiled_select.score_variance(index, visible)
    return kernels_select.score_variance(*index, visible.pos, visible.start)


@no_autocast
def sparse_attention(q, k, v, selection, backend="auto"):
    """
    Attention over the selected keys, differentiable in q, k and v.

    q (B, T, H, d); k, v (B, S, G, d) with H % G == 0.
    Returns o (B, T, H, d) and LSE (B, T, H): natural log, no gradient.
    Raises ValueError for inputs that do not fit each other.
    """
    visible = selection.visible
    backend = check_inputs(backend, visible, q=q, k=k, v=v)
    if backend == "eager":
        o, lse = sparse_attention_eager(q, k, v, selection.mask())
        return o, lse.detach()
    if backend == "torch":
        return tiled.sparse_attention(q, k, v, selection)
    union = selection.union_list(kernels.attention_tile(q, k))
    return kernels.attend(q, k, v, union, visible.pos, visible.start)


@no_autocast
def index_loss(q, k, lse, index, log_tau, selection, backend="auto"):
    """
    Mean over the queries of KL(p ‖ softmax over S_t of τ·I), in nats.
    τ = exp(log_tau), a scalar.

    The teacher p is the attention of q (B, T, H, d) over k (B, S, G, d), whose LSE (B, T, H)
    sparse_attention returned; it gets no gradient. The student, index and log_tau, does.
    Raises ValueError for inputs that do not fit each other.
    """
    visible = selection.visible
    backend = check_inputs(backend, visible, q=q, k=k, lse=lse)
    check_index(backend, visible, index)
    if backend == "eager":
        return index_loss_eager(q, k, index, log_tau, selection.mask())
    q, k, lse = q.detach(), k.detach(), lse.detach()
    student = (*index[:4], log_tau)
    # The faster paths compute gradients together with the loss
    want_grads = torch.is_grad_enabled() and any(x.requires_grad for x in student)
    if backend == "torch":
        return tiled.index_loss(*student, index.activation, q, k, selection, want_grads)
    union = selection.union_list(kernels.attention_tile(q, k))
    return kernels_loss.index_loss(q, k, lse, *student, union, visible.pos, visible.start,
                                   index.activation, want_grads)
