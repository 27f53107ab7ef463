"""
Time and peak memory of GSA beside dense attention (PyTorch's SDPA) of the same shape, in one run.

    python bench.py                  # on a CPU: the PyTorch path, tiled.py
    python bench.py --gpu            # on a GPU: the Triton kernels, kernels.py
    python bench.py --gpu --dry_run  # the same code at toy size on a CPU, in Triton's interpreter
    python bench.py --train          # training steps of whole models: bench_train.py
    python bench.py --roofline       # least times on an H100, counted, not measured: roofline.py
    python bench.py --compile        # what the compiler makes of the kernels: bench_compile.py

The path is first checked against the eager equations. Then these cases are timed, at batch 1:

    forward   selection and attention of T queries over T keys
    backward  the same with the index loss and all gradients
    decode    selection and attention of one query over T cached keys
    layer     a training step of a whole attention layer, projections and gates too (CPU only)

A row shows the median time in ms (lowest–highest) and the speed-up: dense over GSA. Then

    MB       peak memory. On a CPU each case has a process of its own; 500 MB of it are PyTorch
    select   ms of GSA's selection alone: scores, budget, top-k
    u        number of different keys that 16 neighbouring queries select, over that of one query

Inputs are random, the worst case: neighbouring queries of a trained model select similar keys, as
they do with --similar, and what they share is read once. The last line is JSON.
"""
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import attention
import kernels
from attention import Budget, Index, Visible
from bench_compile import print_compile_report
from bench_train import now, short_number, spread, time_training
from configurator import UserError, check_ranges, parse, run, say
from model import GSA, GSAConfig
from roofline import count_keys, roofline


@dataclass
class BenchConfig:

    # What to run; without one of the first four, the PyTorch path on a CPU
    gpu: bool = False  # the Triton kernels, in bfloat16
    train: bool = False  # training steps of whole models; also with gpu
    roofline: bool = False  # least times on an H100, at the lengths of `forward`
    compile: bool = False  # compile the kernels ahead of time and report on them
    dry_run: bool = False  # with gpu: in Triton's interpreter on a CPU, in float32
    out_dir: str = "out"  # roofline: folder of a checkpoint whose selections are counted too

    # Shape of the layer
    n_head: int = 8  # H
    n_kv_head: int = 4  # G
    d_head: int = 64  # d
    n_index_head: int = 4  # Hi
    d_index: int = 64  # di
    k: int = 512  # largest number of keys per query
    similar: float = 0.0  # correlation of a query's indexer input with that of the query before

    # Model and batch of --train
    n_layer: int = 2
    vocab_size: int = 256  # a multiple of 64: the plain model has no rows to spare
    block_size: int = 512  # T
    batch_size: int = 4

    # Cases: lists of T, in tokens; "" = none
    forward: str = "2048,4096,8192,16384"
    backward: str = "2048,4096,8192,16384"
    decode: str = "8192,32768"
    layer: str = "8192"

    # How to measure
    repeats: int = 3  # timed calls, or rounds of --train, after one that is not timed
    threads: int = 2  # of the CPU
    json: str = ""  # file that the last line is also written to

    def __post_init__(self):
        check_ranges(self, {
            (1, None): "n_head n_kv_head d_head n_index_head d_index k repeats threads "
                       "n_layer vocab_size block_size batch_size",
            (0, 1): "similar"})
        for name in ("forward", "backward", "decode", "layer"):
            value = getattr(self, name)
            if not re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", value):
                raise UserError(f"{name} {value!r} is not a list of lengths like 4096,8192")
        self.backend = "triton" if self.gpu else "torch"
        self.device = "cuda" if self.gpu and not self.dry_run else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.shape = (f"H={self.n_head} G={self.n_kv_head} d={self.d_head} "
                      f"Hi={self.n_index_head} di={self.d_index} k={self.k}, batch 1")

    def lengths(self, case):
        return [int(T) for T in getattr(self, case).split(",") if T]


# Defaults of a run with these switches
LARGE = dict(n_head=16, d_head=128, k=2048)
UP_TO_128K = "4096,8192,16384,32768,65536,131072"
SWITCHES = {
    "gpu": dict(LARGE, forward=UP_TO_128K, backward=UP_TO_128K, decode="32768,131072", repeats=10),
    "train": dict(n_head=4, n_kv_head=2, d_head=32, d_index=32, k=96, repeats=20),
    "gpu train": dict(n_head=12, n_kv_head=4, d_head=64, d_index=64, k=512, n_layer=12,
                      vocab_size=50304, block_size=4096, batch_size=8),
    "dry_run": dict(n_head=4, n_kv_head=2, d_head=16, d_index=16, k=8, forward="24,40",
                    backward="24,40", decode="70", n_layer=1, vocab_size=64, block_size=24,
                    batch_size=1, repeats=1),
    "roofline": dict(LARGE, forward="4096,32768,131072"),
}


# --------------------------------------------------------------------------------------------------
# The cases

def layer_inputs(cfg, T, S):
    """Random q, k, v, Index and log τ of a layer with T queries and S keys, with gradients."""
    g = torch.Generator(cfg.device).manual_seed(0)

    def randn(*shape):
        x = torch.randn(1, *shape, device=cfg.device, dtype=cfg.dtype, generator=g)
        return x.requires_grad_()

    q = randn(T, cfg.n_head, cfg.d_head)
    k = randn(S, cfg.n_kv_head, cfg.d_head)
    v = randn(S, cfg.n_kv_head, cfg.d_head)
    index_q = randn(T, cfg.n_index_head, cfg.d_index)
    index_k = randn(S, cfg.d_index)
    index_w = randn(T, cfg.n_index_head)
    if cfg.similar:
        fresh = math.sqrt(1 - cfg.similar**2)  # keeps the variance at 1
        with torch.no_grad():
            for t in range(1, T):
                for x in (index_q, index_w):
                    x[:, t] = cfg.similar * x[:, t - 1] + fresh * x[:, t]
    index_b = torch.zeros_like(index_w[0, 0], requires_grad=True)
    log_tau = torch.tensor(1.4, device=cfg.device, requires_grad=True)
    return q, k, v, Index(index_q, index_k, index_w, index_b), log_tau


def train_step(backend, selection, q, k, v, index, log_tau):
    """{name: tensor}: attention's output, the index loss, and the gradient of every input."""
    o, lse = attention.sparse_attention(q, k, v, selection, backend)
    loss = attention.index_loss(q, k, lse, index, log_tau, selection, backend)
    inputs = (q, k, v, *index[:4], log_tau)
    grads = torch.autograd.grad(o.float().square().sum() + loss, inputs)
    return dict(zip("o loss dq dk dv diq dik diw dib dtau".split(), (o, loss, *grads)))


class Case:
    """The case "forward", "backward" or "decode" over T keys: the functions that are timed."""

    def __init__(self, cfg, what, T):
        self.backend = cfg.backend
        self.backward = what == "backward"
        self.causal = what != "decode"
        n_queries = T if self.causal else 1
        self.q, self.k, self.v, self.index, self.log_tau = layer_inputs(cfg, n_queries, T)
        self.visible = Visible(torch.arange(T - n_queries, T, device=cfg.device)[None], T)
        self.budget = Budget("inverse", cfg.k, 1, cfg.k,
                             var_avg=torch.tensor(0.1, device=cfg.device))

    def dense(self):
        inputs = (self.q, self.k, self.v)
        with torch.set_grad_enabled(self.backward):
            q, k, v = (x.transpose(1, 2) for x in inputs)  # (1, H or G, T, d)
            o = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
            if self.backward:
                torch.autograd.grad(o.float().square().sum(), inputs)

    def select(self):
        return attention.select(self.index, self.visible, self.budget, self.backend)

    def gsa(self):
        selection = self.select()
        if self.backward:
            train_step(self.backend, selection, self.q, self.k, self.v, self.index, self.log_tau)
        else:
            with torch.no_grad():
                attention.sparse_attention(self.q, self.k, self.v, selection, self.backend)


def layer_step(cfg, arm, T):
    """A function: one training step of a whole layer of the arm, initialised as for training."""
    config = GSAConfig.arm(
        arm, vocab_size=64, block_size=T, n_layer=1, n_head=cfg.n_head, n_kv_head=cfg.n_kv_head,
        n_embd=cfg.n_head * cfg.d_head, n_index_head=cfg.n_index_head, d_index=cfg.d_index,
        k_base=cfg.k, k_min=min(128, cfg.k), k_max=cfg.k)
    torch.manual_seed(0)
    attn = GSA(config).blocks[0].attn.train()
    h = torch.randn(1, T, config.n_embd)
    visible = Visible.causal(T)

    def step():
        o, index_loss, _ = attn(h, visible, want_loss=True)
        (o.square().mean() + index_loss).backward()
    return step


# --------------------------------------------------------------------------------------------------
# Check, then measure

def check(cfg, T):
    """
    The path against the eager equations over T tokens, before anything is timed.
    Returns {name of train_step: (relative error of the path, of the eager path in cfg.dtype)}.
    Raises UserError where the path errs more than twice as much, or selects lower scores.
    """
    q, k, v, index, log_tau = layer_inputs(cfg, T, T)
    # in fp64 the equations' own rounding is no part of the errors
    q64, k64, v64, *index64 = (x.detach().double().requires_grad_() for x in (q, k, v, *index[:4]))
    index64 = Index(*index64)
    visible = Visible.causal(T, device=cfg.device)
    # 1. selection: no key that is left out has a higher score than a selected one, but for the
    #    query's own, which is always selected
    budget = Budget("fixed", T // 4, 1, T // 4)  # tiled.py then uses both kinds of blocks
    selection = attention.select(index, visible, budget, cfg.backend)
    selected = selection.mask()  # (1, T, T)
    scores = attention.index_scores(index64)  # (1, T, T)
    own = torch.eye(T, dtype=torch.bool, device=cfg.device)
    lowest = scores.masked_fill(~selected | own, math.inf).amin(-1)  # (1, T)
    left_out = visible.mask() & ~selected
    highest = scores.masked_fill(~left_out, -math.inf).amax(-1)  # (1, T)
    wrong = (highest - lowest).max().item()
    # 2. what a training step over this selection returns
    exact = train_step("eager", selection, q64, k64, v64, index64, log_tau)
    results = [train_step(b, selection, q, k, v, index, log_tau) for b in (cfg.backend, "eager")]
    errors = {}
    for name, x in exact.items():
        size = x.norm().clamp(min=1e-30)
        errors[name] = [((result[name].double() - x).norm() / size).item() for result in results]
    # `not <=`, since a NaN is wrong, too
    bad = {name: e for name, e in errors.items() if not e[0] <= 2 * e[1] + 1e-5}
    tolerance = 1e-5 if cfg.dtype == torch.float32 else 2e-2
    if bad or not wrong <= tolerance:
        raise UserError(f"the {cfg.backend} path is wrong, so nothing was timed: it selects scores "
                        f"too low by {wrong:.1e}; relative errors, its own and eager's: {bad}")
    return errors


def clock(cfg, f, repeats):
    """Milliseconds of each of `repeats` calls."""
    f()
    times = []
    for _ in range(repeats):
        start = now(cfg.device)
        f()
        times.append(1000 * (now(cfg.device) - start))
    return times


def measure(cfg, arm, what, T):
    """One arm of one case: ms (of each call), peak_mb, select_ms, u; None = it has none."""
    case = None if what == "layer" else Case(cfg, what, T)
    timed = getattr(case, arm) if case else layer_step(cfg, arm, T)
    short = what == "decode" and not cfg.gpu  # a call takes a few ms
    repeats = 10 * cfg.repeats if short else cfg.repeats
    if cfg.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result = dict(ms=clock(cfg, timed, repeats), select_ms=None, u=None)
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if cfg.device == "cuda":
        result["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    if case and arm == "gsa":
        result["select_ms"] = clock(cfg, case.select, repeats)
        if what != "decode" and T >= 1024:
            counts = count_keys(case.index, cfg.k)
            result["u"] = counts[16] / counts["k"]
    return result


def measure_alone(cfg, *case):
    """measure in a process of its own, whose peak memory is that of this case."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (cfg.threads,)) as pool:
        return pool.submit(measure, cfg, *case).result()


def table_row(what, T, dense, gsa, speedup):
    row = f"{what:8}{T:7}{spread(dense['ms']):>23}{spread(gsa['ms']):>23}"
    row += f"{speedup:8.2f}×{dense['peak_mb']:10.0f}{gsa['peak_mb']:8.0f}"
    select = short_number(statistics.median(gsa["select_ms"])) if gsa["select_ms"] else ""
    u = f"{gsa['u']:.1f}" if gsa["u"] else ""
    return f"{row}{select:>8}{u:>6}"


def check_path(cfg):
    """Name the device and check the path on it. Returns the beginning of the report."""
    if cfg.dry_run:
        device, check_length = "CPU, Triton's interpreter", 40
    elif not cfg.gpu:
        device, check_length = f"{platform.machine()}, {cfg.threads} threads", 512
    elif torch.cuda.is_available():
        device, check_length = torch.cuda.get_device_name(), 1024
    else:
        raise UserError("--gpu needs a GPU; --gpu --dry_run runs the same at toy size on a CPU")
    say(f"{device}, {cfg.dtype}, {cfg.shape}, torch {torch.__version__}")
    try:
        errors = check(cfg, check_length)
    except ValueError as e:  # also sizes that do not fit each other
        raise UserError(str(e)) from None
    ours, eager = map(max, zip(*errors.values()))
    say(f"largest relative error against the eager equations in float32: {ours:.0e}; "
        f"that of these in {cfg.dtype}: {eager:.0e}")
    return dict(device=device, errors=errors)


def time_cases(cfg):
    """Print a row for each case. Returns the rows."""
    say(f"{'':8}{'T':>7}{'dense ms (spread)':>23}{'GSA ms (spread)':>23}{'speed-up':>9}"
        f"{'dense MB':>10}{'GSA MB':>8}{'select':>8}{'u':>6}")
    cases, measure_one = ("forward", "backward", "decode", "layer"), measure_alone
    if cfg.gpu:
        cases, measure_one = cases[:3], measure
    rows = []
    for what in cases:
        for T in cfg.lengths(what):
            row = dict(what=what, T=T)
            for arm in tqdm(("dense", "gsa"), desc=f"{what} {T}", leave=False):
                row[arm] = measure_one(cfg, arm, what, T)
            dense, gsa = (statistics.median(row[arm]["ms"]) for arm in ("dense", "gsa"))
            row["speedup"] = dense / gsa
            say(table_row(**row))
            rows.append(row)
    return rows


def main(argv):
    given = parse(BenchConfig, argv)
    defaults = {}
    for switches, settings in SWITCHES.items():
        if all(given.get(switch) for switch in switches.split()):
            defaults |= settings
    cfg = BenchConfig(**defaults | given)
    if cfg.compile:
        print_compile_report()
        return
    if cfg.dry_run and not kernels.INTERPRET:
        # Triton reads this variable when it is imported: start again with it
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    if cfg.roofline:
        report = roofline(cfg)
    else:
        report = check_path(cfg)
        report["rows"] = time_training(cfg) if cfg.train else time_cases(cfg)
    line = json.dumps(dict(config=asdict(cfg), torch=torch.__version__, **report))
    say(line)
    if cfg.json:
        with open(cfg.json, "w") as f:
            f.write(line + "\n")


if __name__ == "__main__":
    run(main)
