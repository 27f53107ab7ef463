"""
What is measured beside the loss: what a selection does to a layer's attention, and the arithmetic
that a model needs.

    measure.attention_report(q, k, selection)["recall"]
    measure.flops_per_token(model, T=4096)
"""
import torch

from attention import Selection
from tiled import DenseBlock, Workspace, at_least_fp32, selected_bias, visible_bias


@torch.compiler.disable
@torch.no_grad()
def attention_report(q, k, selection):
    """
    What a selection does to a layer's attention, q (B, T, H, d) and k (B, S, G, d), as a dict of
    scalar tensors. O(T²) time, O(tile·S) memory.

    recall       share of full attention (mean over heads) that falls on S_t, mean over the queries
                 that have to choose (k_t below the number of visible keys); 1 where none has to
    recall_best  the same for the k_t keys with most attention: what a perfect indexer would reach
    first_token  share of the attention over S_t on the document's first key, mean over the
                 queries behind it
    """
    visible = selection.visible
    q, k = at_least_fp32(q), at_least_fp32(k)
    B, G = len(q), k.size(2)
    recall = best = first_token = 0.0
    n_choosing = n_behind = 0
    for tile in visible.tiles:
        # 1. attention over all visible keys, and over the selected ones
        block = DenseBlock(tile.queries, tile.keys, visible_bias(visible, tile).expand(B, -1, -1))
        s = block.logits(block.rows(q, G), k, Workspace())  # (B, G, R·n, U)
        s = s.view(B, -1, *block.bias.shape[1:])  # (B, H, n, U)
        bias = selected_bias(selection, tile)  # (1 or B, n, U)
        selected = bias == 0
        full = s.softmax(-1).mean(1)  # (B, n, U)
        kept = (s + bias[:, None]).softmax(-1).mean(1)  # (B, n, U)
        # 2. recall of the queries that choose
        mask = visible.mask(tile.queries, tile.begin, tile.end)  # (1 or B, n, U)
        n_visible = mask.sum(-1)  # (1 or B, n)
        k_t = selection.k_t[:, tile.queries]  # (B, n)
        choosing = k_t < n_visible
        n_choosing += choosing.sum()
        recall += ((full * selected).sum(-1) * choosing).sum()
        share_of_best = full.sort(-1, descending=True).values.cumsum(-1)  # (B, n, U)
        best += (share_of_best.gather(2, k_t[..., None] - 1)[..., 0] * choosing).sum()
        # 3. the first token
        is_first = mask & (mask.cumsum(-1) == 1)  # (1 or B, n, U)
        behind = (n_visible > 1).expand_as(k_t)
        n_behind += behind.sum()
        first_token += ((kept * is_first).sum(-1) * behind).sum()
    one = torch.ones((), device=q.device)
    return {"recall": recall / n_choosing if n_choosing else one,
            "recall_best": best / n_choosing if n_choosing else one,
            "first_token": first_token / n_behind.clamp(min=1)}


@torch.no_grad()
def layer_stats(q, k, visible, selection, indexer, warmup, gates):
    """
    What an attention layer did, as scalars: the mean of each of its gates ({name: (B, T, width)}),
    the mean number of visible keys, and attention_report's first_token; with an indexer also
    recall, recall_best, k_t and var_ratio (Var_t / V̄). selection: what the indexer selects, None
    without one. In warm-up attention does not use it.
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
        stats["first_token"] = attention_report(q, k, everything)["first_token"]
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
