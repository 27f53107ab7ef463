"""
The least time that GSA and dense attention can take on an H100, without having one.

    python bench.py --roofline --out_dir=out    # 17 minutes with the demo's checkpoint on 2 cores

For random keys and for each layer of a checkpoint it counts what neighbouring queries select. From
these numbers follow the operations and the bytes of each stage of kernels.py in bfloat16. A stage
takes at least as long as the busiest resource of the chip does at its peak rate, and nothing
overlaps between stages. None of the results is a measured speed.
"""
import math
from collections import defaultdict

import torch
from tqdm import tqdm

import attention
import kernels
from attention import Budget, Index, Visible
from checkpoint import find_data, load_model
from outdir import holds_checkpoint
from configurator import UserError, say
from data import Data
from model import GSA, GSAConfig

# Peak rates of an H100 SXM, per second
H100 = {
    "tensor": 989e12,  # FLOP in bf16: NVIDIA's data sheet
    "MUFU": 132 * 16 * 1.755e9,  # exponentials and the like: 16 per multiprocessor and clock
    "L2": 5.5e12,  # bytes: public microbenchmarks
    "HBM": 3.35e12,  # bytes: NVIDIA's data sheet
}
FORWARD = ("scores", "select", "pack", "attend")  # stages of GSA
BACKWARD = ("attend backward", "index loss")
NEIGHBOURS = (8, 16, 32, 64)  # numbers of queries whose union of keys is counted


# --------------------------------------------------------------------------------------------------
# What neighbouring queries select

def random_index(cfg, L):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, L, cfg.n_index_head, cfg.d_index, generator=g)
    k = torch.randn(1, L, cfg.d_index, generator=g)
    w = torch.randn(1, L, cfg.n_index_head, generator=g).sigmoid()
    return Index(q, k, w, torch.zeros(cfg.n_index_head))


def checkpoint_indices(folder, L):
    """
    The Index of each layer of a checkpoint over L tokens of its validation text. A shorter context
    is stretched to L.
    """
    _, checkpoint = load_model(folder)
    tokens = Data(find_data(checkpoint)).val[:L].astype("int64")
    if len(tokens) < L:
        raise UserError(f"--forward: the validation text has {len(tokens)} tokens, not {L}")
    model = GSA(GSAConfig(**checkpoint["model_config"] | dict(block_size=L))).eval()
    model.load_state_dict(checkpoint["model"])
    found = []
    with tqdm(total=len(model.blocks), desc=f"{L} tokens", unit="layer", leave=False) as bar:

        def keep(module, args, index):
            found.append(index)
            bar.update()
        for block in model.blocks:
            block.attn.indexer.register_forward_hook(keep)
        with torch.no_grad():
            model.trunk(torch.from_numpy(tokens)[None])
    return found


@torch.no_grad()
def count_keys(index, k):
    """
    Numbers of keys, each a mean over 64 neighbouring queries at 8 places along the text:
        "k"              keys that one query selects
        n of NEIGHBOURS  different keys that n neighbours select, their union
        "candidates"     keys in the histogram bin that holds the k-th score, which selection on a
                         GPU looks at again (kernels_select._select_kernel)
    """
    counts = defaultdict(list)
    L = index.q.size(1)
    for end in torch.linspace(L / 8, L, 8).long().tolist():
        # 1. what the last 64 queries before `end` select
        pos = torch.arange(end - 64, end, device=index.q.device)
        part = index._replace(q=index.q[:, pos], w=index.w[:, pos], k=index.k[:, :end])
        selection = attention.select(part, Visible(pos[None], end), Budget("fixed", k, 1, k))
        mask = selection.mask()[0]  # (64, end)
        counts["k"].append(mask.sum(-1))
        for n in NEIGHBOURS:
            union = mask.view(64 // n, n, end).any(1)  # (64/n, end)
            counts[n].append(union.sum(-1))
        # 2. candidates, as if all 64 saw every key before `end`
        scores = attention.index_scores(part)[0]  # (64, end)
        low, high = scores[:, :1024].aminmax(dim=-1, keepdim=True)  # (64, 1) each
        bins = ((scores - low) * 2046 / (high - low)).clamp(0, 2046).floor()
        bin_of_kth = bins.topk(min(k, end)).values[:, -1:]  # (64, 1); bins rise with the scores
        counts["candidates"].append((bins == bin_of_kth).sum(-1))
    return {name: torch.cat(c).float().mean().item() for name, c in counts.items()}


# --------------------------------------------------------------------------------------------------
# What follows for an H100

def bounds(cfg, L, counts):
    """
    {stage: {resource: seconds}} of one layer over L tokens: what a stage must at least compute and
    move, over what an H100 can at most. cfg: bench.BenchConfig. counts: see count_keys.
    """
    # 1. numbers of things
    H, G, d, Hi, di = cfg.n_head, cfg.n_kv_head, cfg.d_head, cfg.n_index_head, cfg.d_index
    tile = kernels.queries_per_tile(90, H // G, 2 * d)  # queries that share a union list
    tiles = L / tile
    pairs = L * L / 2  # visible pairs of a query and a key
    listed = tiles * counts[tile]  # keys of all union lists
    attended = listed * tile  # pairs of a query and a key of its tile's list
    product = attended * H * d * 2  # FLOP of q·k, or of P·v
    gathered = listed * 2 * G * d * 2  # bytes of the listed keys and values, in bf16
    slots = 4 * tiles * L  # bytes of a table: where each tile puts the gradient of each key

    def summing(parts, total, passes):
        """
        HBM bytes for the keys' gradients. Tiles write their parts; these are read and added to the
        total, PARTIAL_BYTES at a time. The table is written once and read in each pass.
        """
        groups = math.ceil((parts + slots) / kernels.PARTIAL_BYTES)
        return 2 * parts + 2 * total * groups + (1 + passes) * slots

    # 2. the work of each stage
    work = {
        "dense attention": {"tensor": 4 * pairs * H * d, "MUFU": pairs * H},
        "dense backward": {"tensor": 10 * pairs * H * d, "MUFU": pairs * H},
        # a score is written in fp32
        "scores": {"tensor": 2 * pairs * Hi * di, "MUFU": pairs * Hi, "L2": 4 * pairs},
        # scores are read twice; a candidate is written once and read four times with its score
        "select": {"L2": 2 * 4 * pairs + (4 + 4 * 8) * L * counts["candidates"]},
        # a word for each tile and key is written twice and read twice
        "pack": {"HBM": 4 * 4 * tiles * L},
        "attend": {"tensor": 2 * product, "MUFU": attended * H, "L2": gathered + 8 * listed},
        "attend backward": {"tensor": 5 * product, "MUFU": attended * H, "L2": gathered,
                            "HBM": summing(gathered, 2 * L * G * d * 4, passes=2)},
        "index loss": {"tensor": product + 4 * attended * Hi * di * 2, "L2": gathered / 2,
                       "MUFU": attended * (H + 2 * Hi),
                       "HBM": summing(listed * di * 4, L * di * 4, passes=1)},
    }
    return {stage: {r: n / H100[r] for r, n in w.items()} for stage, w in work.items()}


def print_row(L, k, source, union, seconds):
    ms = {stage: 1000 * max(times.values()) for stage, times in seconds.items()}
    forward = sum(ms[stage] for stage in FORWARD)
    step = forward + sum(ms[stage] for stage in BACKWARD)
    dense_step = ms["dense attention"] + ms["dense backward"]
    slowest = max(FORWARD + BACKWARD, key=ms.get)
    limit = max(seconds[slowest], key=seconds[slowest].get)
    unions = "".join(f"{union[n] / union['k']:6.2f}" for n in NEIGHBOURS)
    say(f"{L:7}{k:6}  {source:15}{unions}{forward:9.3f}{ms['dense attention']:8.3f}"
        f"{step:9.3f}{dense_step:8.3f}  {slowest}, {limit}")


def roofline(cfg):
    """Print a row for each length and source of keys. Returns the report, with all stages."""
    say(f"Least ms for one layer on an H100, {cfg.shape}, bf16. No measured speed.")
    has_checkpoint = holds_checkpoint(cfg.out_dir)
    if not has_checkpoint:
        say(f"no checkpoint in {cfg.out_dir}: random keys only")
    say(f"{'':30}{'union of n queries / k':>24}{'forward ms':>17}{'train ms':>17}")
    say(f"{'L':>7}{'k':>6}  {'keys':15}{'n=8':>6}{'16':>6}{'32':>6}{'64':>6}"
        f"{'GSA':>9}{'dense':>8}{'GSA':>9}{'dense':>8}  slowest stage, its limit")
    rows = []
    for L in cfg.lengths("forward"):
        if L < 512:
            raise UserError(f"--forward: --roofline needs at least 512 tokens, not {L}")
        k = min(cfg.k, L // 8)
        sources = {"random keys": random_index(cfg, L)}
        if has_checkpoint:
            for i, index in enumerate(checkpoint_indices(cfg.out_dir, L)):
                sources[f"layer {i}"] = index
        for source, index in sources.items():
            counts = count_keys(index, k)
            row = dict(L=L, k=k, source=source, union=counts, seconds=bounds(cfg, L, counts))
            print_row(**row)
            rows.append(row)
    return dict(rows=rows)
