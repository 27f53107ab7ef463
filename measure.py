"""
What is measured beside the loss: what a selection does to a layer's attention, and the arithmetic
that a model needs.

    measure.attention_report(q, k, selection)["recall"]
    measure.flops_per_token(model, T=4096)
"""
import numpy as np
import torch

from attention import Selection
from tiled import DenseBlock, Workspace, at_least_fp32, selected_bias, visible_bias

NEIGHBOURS = 16  # queries whose different keys are counted, see selection_counts
NEAR = 64  # tokens, see distance_numbers


@torch.compiler.disable
@torch.no_grad()
def attention_sums(q, k, selection):
    """
    What attention_report measures, as {name: (2,)}: the sum over the queries that count, and their
    number. Sums of several batches may be added.
    """
    visible = selection.visible
    q, k = at_least_fp32(q), at_least_fp32(k)
    B, G = len(q), k.size(2)
    sums = {}

    def add(name, values, counts):
        """values (B, n), of the queries where counts (B, n) is True"""
        both = torch.stack(((values * counts).sum().double(), counts.sum().double()))  # (2,)
        sums[name] = sums.get(name, 0) + both

    for tile in visible.tiles:
        # 1. attention over all visible keys, and over the selected ones
        block = DenseBlock(tile.queries, tile.keys, visible_bias(visible, tile).expand(B, -1, -1))
        s = block.logits(block.rows(q, G), k, Workspace())  # (B, G, R·n, U)
        s = s.view(B, -1, *block.bias.shape[1:])  # (B, H, n, U)
        bias = selected_bias(selection, tile)  # (1 or B, n, U)
        selected = bias == 0
        full = s.softmax(-1).mean(1)  # (B, n, U)
        kept = s.add_(bias[:, None]).softmax(-1).mean(1)  # (B, n, U)
        # 2. recall of the queries that choose
        mask = visible.mask(tile.queries, tile.begin, tile.end)  # (1 or B, n, U)
        n_visible = mask.sum(-1)  # (1 or B, n)
        k_t = selection.k_t[:, tile.queries]  # (B, n)
        choosing = k_t < n_visible
        add("recall", (full * selected).sum(-1), choosing)
        largest = full.size(-1)  # at least the largest k_t
        if selection.indices is not None:
            largest = min(largest, selection.indices.size(-1))
        share_of_best = full.topk(largest).values.cumsum(-1)  # (B, n, largest)
        add("recall_best", share_of_best.gather(2, k_t[..., None] - 1)[..., 0], choosing)
        # 3. the first tokens
        place = mask.cumsum(-1)  # (1 or B, n, U), of a key in its document, from 1
        for name, n_first in (("first_token", 1), ("first_four", 4)):
            is_first = mask & (place <= n_first)  # (1 or B, n, U)
            behind = (n_visible > n_first).expand_as(k_t)
            add(name, (kept * is_first).sum(-1), behind)
    return sums


def mean_of_sums(sums):
    """attention_sums -> {name: scalar tensor}: attention_report."""
    means = {}
    for name, (total, n) in sums.items():
        if_none = 1.0 if name.startswith("recall") else 0.0
        means[name] = torch.where(n > 0, total / n, if_none)
    return means


@torch.compiler.disable
def attention_report(q, k, selection):
    """
    What a selection does to a layer's attention, q (B, T, H, d) and k (B, S, G, d), as a dict of
    scalar tensors. O(T²) time, O(tile·S) memory.

    recall       share of full attention (mean over heads) that falls on S_t, mean over the queries
                 that have to choose (k_t below the number of visible keys); 1 where none has to
    recall_best  the same for the k_t keys with most attention: what a perfect indexer would reach
    first_token  share of the attention over S_t on the document's first key, mean over the
                 queries behind it
    first_four   the same for its first four keys
    """
    return mean_of_sums(attention_sums(q, k, selection))


@torch.compiler.disable
@torch.no_grad()
def selection_counts(selection, counts):
    """
    Which keys were selected by the queries where counts (B, T) is True. O(tile·S) memory.
    Returns
        distances  (S,) int64: how many selected keys lie t - s = 0, 1, … tokens before the query
        union      (2,) int64: over the groups of NEIGHBOURS queries that all count, the number of
                   different keys of a group, summed, and the sum of their k_t. NEIGHBOURS times the
                   first over the second is roofline.py's "union of n queries / k": 1 if neighbours
                   select the same keys, NEIGHBOURS if they share none
    """
    visible = selection.visible
    B = len(selection.k_t)
    distances = torch.zeros(visible.n_keys, dtype=torch.long, device=counts.device)
    union = torch.zeros(2, dtype=torch.long, device=counts.device)
    for tile in visible.tiles:
        # 1. distances
        selected = (selected_bias(selection, tile) == 0).expand(B, -1, -1)  # (B, n, U)
        here = counts[:, tile.queries]  # (B, n)
        key = torch.arange(tile.begin, tile.end, device=counts.device)
        distance = (visible.pos[:, tile.queries, None] - key).expand_as(selected)  # (B, n, U)
        found = distance[selected & here[..., None]]
        distances += found.bincount(minlength=visible.n_keys)
        # 2. unions; queries of a last group that is not whole are left out
        shape = (B, here.size(1) // NEIGHBOURS, NEIGHBOURS)  # B, groups, 16
        n = shape[1] * NEIGHBOURS
        whole = here[:, :n].reshape(shape).all(-1)  # (B, groups)
        groups = selected[:, :n].reshape(*shape, selected.size(2))  # (B, groups, 16, U)
        n_keys = groups.any(2).sum(-1)  # (B, groups)
        k_t = selection.k_t[:, tile.queries][:, :n].reshape(shape).sum(-1)  # (B, groups)
        union += torch.stack(((n_keys * whole).sum(), (k_t * whole).sum()))
    return distances, union


def budget_numbers(k_t, budget, entropy):
    """The distribution of k_t (n,) and its correlation with the entropy (n,)."""
    constant = k_t.min() == k_t.max() or entropy.min() == entropy.max()
    return {"k_t_mean": k_t.mean(), "k_t_std": k_t.std(),
            **{f"k_t_{p}": np.percentile(k_t, p) for p in (5, 50, 95)},
            "k_t_at_min": (k_t == budget.k_min).mean(),
            "k_t_at_max": (k_t == budget.largest).mean(),
            "k_t_entropy": np.nan if constant else np.corrcoef(k_t, entropy)[0, 1]}


def distance_numbers(distances):
    """
    Percentiles of the distances, and the share of the keys less than NEAR tokens away.
    distances (S,): see selection_counts.
    """
    up_to = distances.cumsum() / distances.sum()  # (S,), share of the keys that are no further
    return {"distance_50": np.searchsorted(up_to, 0.5), "distance_90": np.searchsorted(up_to, 0.9),
            "within_64": up_to[:NEAR][-1]}


def histogram(values, edges, weights=None):
    """shares[i] of the values lies from edges[i] up to, not including, edges[i + 1]."""
    counts, _ = np.histogram(values, edges, weights=weights)
    return {"edges": [int(edge) for edge in edges], "shares": (counts / counts.sum()).tolist()}


@torch.no_grad()
def layer_stats(q, k, visible, selection, indexer, warmup, gates):
    """
    What an attention layer did, as scalars: the mean of each of its gates ({name: (B, T, width)}),
    the mean number of visible keys, and attention_report's shares on the first tokens; with an
    indexer also recall, recall_best, k_t and var_ratio (Var_t / V̄). selection: what the indexer
    selects, None without one. In warm-up attention does not use it.
    """
    stats = {name: gate.mean() for name, gate in gates.items()}
    everything = Selection.everything(visible, len(q))
    stats["visible"] = everything.k_t.float().mean()
    if selection is not None:
        ratio = selection.var.mean() / indexer.var_avg.clamp(min=1e-30)
        stats["k_t"] = selection.k_t.float().mean()
        stats["var_ratio"] = torch.where(indexer.var_avg > 0, ratio, 1.0)
        stats |= attention_report(q, k, selection)
    if selection is None or warmup:  # attention was dense
        dense = attention_report(q, k, everything)
        stats |= {name: dense[name] for name in ("first_token", "first_four")}
    return stats


def flops_per_token(model, T=None, training=True, warmup=False):
    """
    Model FLOPs per token at context T (default block_size): the mean over positions t = 1…T.
    Forward: 2 per weight of a matrix (an embedding that is not the output projection too is only
    looked up: none); attention 4·H·d per key that the query attends to, min(k_base, t) or all t
    (dense, warm-up); indexer 2·Hi·di per visible key, all t.
    Backward: twice the forward, but the indexer's spans the attended keys only.
    Recomputation is not counted.
    """
    c = model.config
    T = T or c.block_size
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    if not c.tie_embed:
        weights -= model.embed.weight.numel()
    visible = (T + 1) / 2  # mean of t: keys per query
    attended = visible
    if c.sparse and not warmup:
        k = min(c.k_base, T)
        attended = (k * (k + 1) / 2 + (T - k) * k) / T  # mean of min(k_base, t)
    score = 2 * c.n_index_head * c.d_index if c.sparse else 0  # FLOPs of one indexer score
    forward = 2 * weights + c.n_layer * 4 * attended * c.n_head * c.d_head
    indexer = c.n_layer * score * visible
    if not training:
        return forward + indexer
    indexer_backward = c.n_layer * 2 * score * attended
    return 3 * forward + indexer + indexer_backward


# Peak FLOP/s of dense bf16 products, from NVIDIA's data sheets. The first name that the device's
# name contains is taken.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(device):
    """The GPU's bf16 peak in FLOP/s; None for a CPU or a GPU that is not in the table."""
    if not device.startswith("cuda"):
        return None
    device_name = torch.cuda.get_device_name(device)
    for name, flops in PEAK_FLOPS.items():
        if name in device_name:
            return flops
    return None
