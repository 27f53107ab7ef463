"""
Time and peak memory of one GSA layer beside the dense layer of the same shape, as ratios within one run.

    python bench.py
    python bench.py --lengths=2048,8192 --n_head=16 --n_kv_head=4 --d_head=128

Training step (forward, index loss, backward), forward alone, and one decoded token against a cache. Every case runs in a
process of its own, so that its peak memory (maximum resident set, about 0.4 GB of it PyTorch itself) is its own; the
two arms alternate. Inputs are random, which is the worst case for the union of a tile's keys. The last line is JSON.
"""
import json
import multiprocessing
import platform
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import torch

import kernels
from configurator import UserError, parse, run
from model import GSA, GSAConfig, KVCache


@dataclass
class BenchConfig:
    n_head: int = 8
    n_kv_head: int = 4
    d_head: int = 64
    n_index_head: int = 4
    d_index: int = 64
    k: int = 512  # keys per query
    lengths: str = "2048,4096,8192,16384"  # tokens, forward and training step
    decode: str = "8192,32768"  # cached tokens, one decoded token
    repeats: int = 3
    threads: int = 2


def layer(cfg, arm, T):
    """One attention layer of the arm, randomly initialised as in training."""
    config = GSAConfig.arm(arm, vocab_size=64, block_size=T + 1, n_layer=1, n_head=cfg.n_head, n_kv_head=cfg.n_kv_head,
                           n_embd=cfg.n_head * cfg.d_head, n_index_head=cfg.n_index_head, d_index=cfg.d_index,
                           k_base=cfg.k, k_min=min(128, cfg.k), k_max=cfg.k)
    torch.manual_seed(0)
    return config, GSA(config).blocks[0].attn


def measure(cfg, arm, what, T):
    """{"ms": [per repeat], "peak_mb"} of one case, in this process. what: train | forward | decode."""
    torch.set_num_threads(cfg.threads)
    config, attn = layer(cfg, arm, T)
    attn.train(what == "train")
    if what == "decode":
        cache = KVCache(config, 1, T + 1)
        for buffer in cache.k + cache.v + (cache.k_index if config.sparse else []):
            buffer.normal_()
        h, visible = torch.randn(1, 1, config.n_embd), kernels.Visible(torch.tensor([[T]]), T + 1)
    else:
        cache, h, visible = None, torch.randn(1, T, config.n_embd), kernels.Visible.causal(T)

    def once():
        with torch.set_grad_enabled(what == "train"):
            o, index_loss, _ = attn(h, visible, cache=cache, want_loss=what == "train")
            if what == "train":
                (o.square().mean() + (index_loss if config.sparse else 0)).backward()
    once()
    times = []
    for _ in range(cfg.repeats if what != "decode" else 10 * cfg.repeats):
        start = time.perf_counter()
        once()
        times.append(1e3 * (time.perf_counter() - start))
    return {"ms": times, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def check(cfg):
    """The tiled path against the eager reference at a small size, before anything is timed."""
    config, attn = layer(cfg, "gsa", 300)
    h, visible = torch.randn(2, 300, config.n_embd), kernels.Visible.causal(300)
    outputs = []
    for backend in ("torch", "eager"):
        attn.backend = backend
        attn.zero_grad()
        o, loss, _ = attn(h, visible, want_loss=True)
        (o.sum() + loss).backward()
        outputs.append([o, loss] + [p.grad for p in attn.parameters()])
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(*outputs))
    if worst > 1e-4:
        raise UserError(f"the tiled path is off the eager reference by {worst:.1e}: nothing was timed")
    return worst


def main(argv):
    cfg = BenchConfig(**parse(BenchConfig, argv))
    try:
        cases = [(w, int(T)) for w, list_ in (("forward", cfg.lengths), ("train", cfg.lengths), ("decode", cfg.decode)) for T in list_.split(",")]
        layer(cfg, "gsa", 8)
    except ValueError as e:
        raise UserError(str(e)) from None
    error = check(cfg)
    print(f"one layer, H={cfg.n_head} G={cfg.n_kv_head} d={cfg.d_head} Hi={cfg.n_index_head} di={cfg.d_index} k={cfg.k}, batch 1, fp32, "
          f"{cfg.threads} threads, torch {torch.__version__}; tiled path checked against eager: relative error {error:.0e}\n"
          f"{'':8}{'T':>7} {'dense ms (spread)':>22} {'GSA ms (spread)':>22} {'speed-up':>9} {'dense MB':>9} {'GSA MB':>9} {'memory':>7}")
    rows = []
    for what, T in cases:
        result = {}
        for arm in ("dense", "gsa"):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                result[arm] = pool.submit(measure, cfg, arm, what, T).result()
        ms = {arm: statistics.median(r["ms"]) for arm, r in result.items()}
        rows.append(dict(what=what, T=T, speedup=ms["dense"] / ms["gsa"], memory=result["gsa"]["peak_mb"] / result["dense"]["peak_mb"], **result))
        show = lambda r: f"{statistics.median(r['ms']):.1f} ({min(r['ms']):.1f}–{max(r['ms']):.1f})".rjust(22)
        print(f"{what:8}{T:7} {show(result['dense'])} {show(result['gsa'])} {rows[-1]['speedup']:8.2f}× {result['dense']['peak_mb']:9.0f} "
              f"{result['gsa']['peak_mb']:9.0f} {rows[-1]['memory']:6.2f}×", flush=True)
    print(json.dumps(dict(config=asdict(cfg), machine=platform.processor() or platform.machine(), torch=torch.__version__, rows=rows)))


if __name__ == "__main__":
    run(main)
