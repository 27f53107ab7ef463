"""
Time and peak memory of GSA beside dense attention (SDPA) of the same shape, as ratios within one run.

    python bench.py                      # on a CPU: the PyTorch path
    python bench.py --n_head=16 --d_head=128 --forward=4096,16384,32768 --train=16384 --decode=32768 --layer=
    python bench.py --gpu                # on a GPU: the Triton kernels, checked against fp32, then timed
    python bench.py --gpu --dry_run      # the same code at toy size on a CPU, in Triton's interpreter
    python bench.py --roofline           # bounds for an H100, counted from real selections: no GPU needed, no speed claimed
    python bench.py --data               # prepare.py beside its ceiling and the usual way

forward: selection and attention. train: the same with the index loss and all gradients. decode: one token against a cache.
layer: a training step of a whole layer, projections and gates included. On a CPU every case runs in a process of its own, so
that its peak memory (maximum resident set, about 0.5 GB of it PyTorch and what this one has used) is its own. Inputs are random, the worst case: in
a trained model neighbouring queries choose similar keys (--roofline counts how similar), as they do with --similar. u is the number of
different keys of 16 neighbours over that of one. The last line is JSON.
"""
import glob
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F

import kernels
from checkpoint import find_data, load_model
from configurator import UserError, check_ranges, parse, run
from data import Data, Tokenizer
from model import GSA, GSAConfig


@dataclass
class BenchConfig:
    n_head: int = 8
    n_kv_head: int = 4
    d_head: int = 64
    n_index_head: int = 4
    d_index: int = 64
    k: int = 512  # keys per query
    similar: float = 0.0  # correlation of a query's indexer input with the one before; what neighbours share of their keys is printed
    forward: str = "2048,4096,8192,16384"  # tokens; "" = none
    train: str = "2048,4096,8192,16384"
    decode: str = "8192,32768"  # cached tokens
    layer: str = "8192"
    repeats: int = 3
    threads: int = 2
    gpu: bool = False
    dry_run: bool = False
    roofline: bool = False
    data: bool = False
    tokenizer: str = "gpt2"  # --data
    megabytes: int = 512  # --data: of text; bytes are measured on 1000
    out_dir: str = "out"  # --roofline: folder of a checkpoint whose selections are counted too
    json: str = ""  # also write the last line to this file

    def __post_init__(self):
        check_ranges(self, {(1, None): "n_head n_kv_head d_head n_index_head d_index k repeats threads megabytes",
                            (0, 1): "similar"})
        for name in ("forward", "train", "decode", "layer"):
            if not re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", getattr(self, name)):
                raise UserError(f"{name} {getattr(self, name)!r} is not a list of lengths like 4096,8192")


GPU = dict(n_head=16, d_head=128, k=2048, repeats=10, decode="32768,131072",  # its defaults
           forward="4096,8192,16384,32768,65536,131072", train="4096,8192,16384,32768,65536,131072")
DRY = dict(n_head=4, n_kv_head=2, d_head=16, d_index=16, k=8, forward="24,40", train="24,40", decode="70", repeats=1)
ROOFLINE = dict(n_head=16, d_head=128, k=2048, forward="4096,32768,131072")
H100 = {"tensor": 989e12, "MUFU": 132 * 16 * 1.755e9, "L2": 5.5e12, "HBM": 3.35e12}  # bf16 FLOP/s, operations/s, bytes/s;
# tensor and HBM from NVIDIA's data sheet (SXM), MUFU 16 per SM and clock, L2 from public microbenchmarks


def layer_inputs(cfg, T, device, dtype, S=None, seed=0):
    """Random q, k, v, Index and log_tau of a layer with T queries and S keys, gradients on."""
    g = torch.Generator(device).manual_seed(seed)
    H, G, d, Hi, di, S = cfg.n_head, cfg.n_kv_head, cfg.d_head, cfg.n_index_head, cfg.d_index, S or T
    shapes = (T, H, d), (S, G, d), (S, G, d), (T, Hi, di), (S, di), (T, Hi)
    q, k, v, iq, ik, iw = (torch.randn(1, *s, device=device, dtype=dtype, generator=g).requires_grad_() for s in shapes)
    ib = torch.zeros(Hi, device=device, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        for t in range(1, T if cfg.similar else 0):
            for x in (iq, iw):
                x[:, t] = cfg.similar * x[:, t - 1] + math.sqrt(1 - cfg.similar**2) * x[:, t]
    return q, k, v, kernels.Index(iq, ik, iw, ib), torch.tensor(1.4, device=device, requires_grad=True)


def gsa_step(backend, q, k, v, index, log_tau, selection):
    """o, index loss and all gradients, given the selection."""
    o, lse = kernels.sparse_attention(q, k, v, selection, backend)
    loss = kernels.index_loss(q, k, lse, index, log_tau, selection, backend)
    return o, loss, *torch.autograd.grad(o.float().square().sum() + loss, (q, k, v, *index[:4], log_tau))


def case(cfg, what, T, device, dtype, backend):
    """(dense, gsa, () -> {stage: part of gsa}) as functions to be timed, and one that gives u. what: forward | train | decode."""
    q, k, v, index, log_tau = layer_inputs(cfg, 1 if what == "decode" else T, device, dtype, T)
    visible = kernels.Visible(torch.full((1, 1), T - 1, device=device), T) if what == "decode" else kernels.Visible.causal(T, device=device)
    budget = kernels.Budget("inverse", cfg.k, 1, cfg.k, var_avg=torch.tensor(0.1, device=device))
    train = what == "train"

    def dense():
        with torch.set_grad_enabled(train):
            o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=what != "decode", enable_gqa=True)
            if train:
                torch.autograd.grad(o.float().square().sum(), (q, k, v))
    select = lambda: kernels.select(index, visible, budget, backend)

    def attend(selection):
        if train:
            return gsa_step(backend, q, k, v, index, log_tau, selection)
        with torch.no_grad():
            return kernels.sparse_attention(q, k, v, selection, backend)

    def stages():
        selection = select()
        if backend == "triton":
            selection.lists(kernels._tile_queries(q, k))
        own = {"attend, loss, backward" if train else "attend": lambda: attend(selection)}
        if backend == "triton":
            return {"select": select, **own}

        def scores():
            for tile in visible.tiles:
                kernels._tile_scores(index, visible, tile)

        @torch.no_grad()
        def logits():
            scratch = kernels.Scratch()
            for job in selection.jobs(q.size(2)):
                job.logits(job.rows(q, k.size(2)), k, scratch)
        return {"scores": scores, "select": select, **({} if train else {"logits": logits}), **own}  # a training step computes them several times

    def u():
        union = unions(index, cfg.k)
        return union[16] / union["k"]
    return dense, lambda: attend(select()), stages, u if T >= 1024 and what != "decode" else lambda: None


def listed(cfg, *names):
    """(name, T) of every T in these settings."""
    return [(name, int(T)) for name in names for T in getattr(cfg, name).split(",") if T]


def clock(cfg, device, f):
    """Milliseconds per call, one number per repeat."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    f()
    times = []
    for _ in range(cfg.repeats):
        wait()
        start = time.perf_counter()
        f()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return times


# ----------------------------------------------------------------------------------------------------------------
# The PyTorch path

def layer(cfg, arm, T):
    """A training step of one attention layer of the arm, randomly initialised as in training, as a function."""
    config = GSAConfig.arm(arm, vocab_size=64, block_size=T, n_layer=1, n_head=cfg.n_head, n_kv_head=cfg.n_kv_head,
                           n_embd=cfg.n_head * cfg.d_head, n_index_head=cfg.n_index_head, d_index=cfg.d_index,
                           k_base=cfg.k, k_min=min(128, cfg.k), k_max=cfg.k)
    torch.manual_seed(0)
    attn, h, visible = GSA(config).blocks[0].attn.train(), torch.randn(1, T, config.n_embd), kernels.Visible.causal(T)

    def step():
        o, index_loss, _ = attn(h, visible, want_loss=True)
        (o.square().mean() + (index_loss if config.sparse else 0)).backward()
    return step


def measure(cfg, arm, what, T):
    """{"ms": [per repeat], "peak_mb", "stages": {stage: ms}, "u"} of one case, in this process."""
    torch.set_num_threads(cfg.threads)
    dense, gsa, stages, u = (None, None, dict, lambda: None) if what == "layer" else case(cfg, what, T, "cpu", torch.float32, "torch")
    f = layer(cfg, arm, T) if what == "layer" else dense if arm == "dense" else gsa
    ms = [t for _ in range(10 if what == "decode" else 1) for t in clock(cfg, "cpu", f)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"ms": ms, "peak_mb": peak, "u": u() if arm == "gsa" else None,
            "stages": {n: statistics.median(clock(cfg, "cpu", g)) for n, g in (stages() if arm == "gsa" else {}).items()}}


def check(cfg):
    """The tiled path against the eager reference at a small size, before anything is timed: the largest relative error."""
    q, k, v, index, log_tau = layer_inputs(cfg, 512, "cpu", torch.float32)  # of which some share their keys and some have their own
    selection = kernels.select(index, kernels.Visible.causal(512), kernels.Budget("inverse", 40, 1, 60, var_avg=torch.tensor(0.1)), "torch")
    got, exact = (gsa_step(backend, q, k, v, index, log_tau, selection) for backend in ("torch", "eager"))
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, exact))
    if worst > 1e-4:
        raise UserError(f"the tiled path is off the eager reference by {worst:.1e}: nothing was timed")
    return worst


def cpu(cfg):
    """Rows of {what, T, dense, gsa, stages}, each of the arms {ms, peak_mb}, and the ratios."""
    try:
        cases = listed(cfg, "forward", "train", "decode", "layer")
        error = check(cfg)
    except ValueError as e:
        raise UserError(str(e)) from None
    print(f"H={cfg.n_head} G={cfg.n_kv_head} d={cfg.d_head} Hi={cfg.n_index_head} di={cfg.d_index} k={cfg.k}, batch 1, fp32, {cfg.threads} threads, "
          f"torch {torch.__version__}; checked against eager: relative error {error:.0e}\n"
          f"{'':8}{'T':>7} {'dense ms (spread)':>22} {'GSA ms (spread)':>22} {'speed-up':>9} {'dense MB':>9} {'GSA MB':>7} {'u':>5}  GSA by stage, ms")
    rows = []
    for what, T in cases:
        result = {}
        for arm in ("dense", "gsa"):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                result[arm] = pool.submit(measure, cfg, arm, what, T).result()
        ms = {arm: statistics.median(r["ms"]) for arm, r in result.items()}
        t = dict(result["gsa"]["stages"])
        stages = {}
        if t:
            stages = {"scores": t["scores"], "top-k": t.pop("select") - t.pop("scores"), **t}
        if "logits" in t:
            stages["attention"] = max(0.0, stages.pop("attend") - t["logits"])
        rows.append(dict(what=what, T=T, speedup=ms["dense"] / ms["gsa"], **result))
        u = result["gsa"]["u"]
        show = lambda r: f"{statistics.median(r['ms']):.1f} ({min(r['ms']):.1f}–{max(r['ms']):.1f})".rjust(22)
        print(f"{what:8}{T:7} {show(result['dense'])} {show(result['gsa'])} {rows[-1]['speedup']:8.2f}× {result['dense']['peak_mb']:9.0f} "
              f"{result['gsa']['peak_mb']:7.0f} {f'{u:.1f}' if u else '':>5}  " + ", ".join(f"{n} {x:.1f}" for n, x in stages.items()), flush=True)
    return dict(machine=platform.processor() or platform.machine(), rows=rows)


# ----------------------------------------------------------------------------------------------------------------
# --gpu

def check_gpu(cfg, device, dtype, T):
    """The kernels against the eager reference in fp32: errors, relative, and the same of the eager reference in dtype."""
    q, k, v, index, log_tau = layer_inputs(cfg, T, device, dtype)
    budget = kernels.Budget("fixed", min(cfg.k, T // 4), 1, cfg.k)
    wide = lambda x: x.detach().float().requires_grad_()
    q32, k32, v32, *index32 = map(wide, (q, k, v, *index[:4]))
    visible = kernels.Visible.causal(T, device=device)
    selection = kernels.select(index, visible, budget, "triton")
    scores = kernels.index_scores_eager(kernels.Index(*index32)).masked_fill(~visible.mask(), -torch.inf)
    earned = selection.mask() & ~torch.eye(T, dtype=torch.bool, device=device)  # a query's own position is not: it is always selected
    worst = scores.masked_fill(~earned, torch.inf).amin(-1) - scores.masked_fill(selection.mask(), -torch.inf).amax(-1)
    exact = gsa_step("eager", q32, k32, v32, kernels.Index(*index32), log_tau, selection)
    errors = {}
    for name in ("triton", "eager"):
        got = gsa_step(name, q, k, v, index, log_tau, selection)
        errors[name] = [((a.float() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(got, exact)]
    rows = dict(zip("o loss dq dk dv diq dik diw dib dtau".split(), zip(errors["triton"], errors["eager"])))
    bad = {n: e for n, e in rows.items() if e[0] > 2 * e[1] + 1e-5}
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    if bad or (-worst).max() > tolerance:
        raise UserError(f"the kernels are off: error against fp32, ours and PyTorch's {dtype}: {bad}; selection off by {(-worst).max():.1e}")
    return rows


def gpu(cfg):
    """Rows of {what, T, dense, gsa, and the stages of gsa}: ms per repeat."""
    device, dtype = ("cpu", torch.float32) if cfg.dry_run else ("cuda", torch.bfloat16)
    if not cfg.dry_run and not torch.cuda.is_available():
        raise UserError("--gpu needs a GPU; --gpu --dry_run runs the same code at toy size on a CPU")
    name = "CPU, Triton's interpreter" if cfg.dry_run else torch.cuda.get_device_name()
    errors = check_gpu(cfg, device, dtype, 40 if cfg.dry_run else 1024)
    print(f"{name}, {dtype}, H={cfg.n_head} G={cfg.n_kv_head} d={cfg.d_head} Hi={cfg.n_index_head} di={cfg.d_index} k={cfg.k}, batch 1, random inputs\n"
          f"relative error against fp32, ours / PyTorch's: " + ", ".join(f"{n} {a:.1e}/{b:.1e}" for n, (a, b) in errors.items()))
    print(f"{'':9}{'T':>7}{'dense ms':>10}{'GSA ms':>9}{'speed-up':>10}{'u':>6}  GSA by stage, ms")
    rows = []
    for what, T in listed(cfg, "forward", "train", "decode"):
        dense, whole, stages, u = case(cfg, what, T, device, dtype, "triton")
        row = dict(what=what, T=T, dense=clock(cfg, device, dense), gsa=clock(cfg, device, whole), u=u(), stages={n: clock(cfg, device, f) for n, f in stages().items()})
        median = statistics.median
        row["speedup"] = median(row["dense"]) / median(row["gsa"])
        rows.append(row)
        print(f"{what:9}{T:7}{median(row['dense']):10.3f}{median(row['gsa']):9.3f}{row['speedup']:9.2f}×{row['u'] or 0:6.1f}  "
              + ", ".join(f"{n} {median(ms):.3f}" for n, ms in row["stages"].items()), flush=True)
    return dict(device=name, errors=errors, rows=rows)


# ----------------------------------------------------------------------------------------------------------------
# --roofline

def random_index(cfg, L):
    g = torch.Generator().manual_seed(0)
    q, k, w = (torch.randn(1, L, *s, generator=g) for s in ((cfg.n_index_head, cfg.d_index), (cfg.d_index,), (cfg.n_index_head,)))
    return kernels.Index(q, k, w.sigmoid(), torch.zeros(cfg.n_index_head))


def checkpoint_indices(cfg, L):
    """The Index of every layer of the checkpoint over L tokens of its validation text, its context stretched to L if that is longer."""
    _, checkpoint = load_model(cfg.out_dir)
    model = GSA(GSAConfig(**checkpoint["model_config"] | dict(block_size=L)))
    model.load_state_dict(checkpoint["model"])
    data, found = Data(find_data(checkpoint)), []
    for block in model.eval().blocks:
        block.attn.indexer.register_forward_hook(lambda module, args, out: found.append(out))
    with torch.no_grad():
        model.trunk(torch.from_numpy(data.val[:L].astype("int64"))[None])
    return found


def unions(index, k, sizes=(8, 16, 32, 64)):
    """
    Mean number of keys in the union of as many neighbouring queries, for each of `sizes`; mean k_t; and "few", the keys that _select_kernel
    sets aside for a query. From 8 places along the text.
    """
    L = index.q.size(1)
    counts = {n: [] for n in sizes}
    for end in torch.linspace(L / 8, L, 8).long().tolist():
        part = index._replace(q=index.q[:, end - 64:end], w=index.w[:, end - 64:end], k=index.k[:, :end])
        visible = kernels.Visible(torch.arange(end - 64, end, device=part.q.device)[None], end)
        mask = kernels.select(part, visible, kernels.Budget("fixed", k, 1, k)).mask()[0]
        for n in sizes:
            counts[n].append(mask.view(64 // n, n, end).any(1).sum(-1).float().mean().item())
        counts.setdefault("k", []).append(mask.sum(-1).float().mean().item())
        scores = kernels.index_scores_eager(part)[0].masked_fill(~visible.mask()[0], -torch.inf)
        low, high = (f(scores[:, :1024], -1, keepdim=True) for f in (torch.amin, torch.amax))
        place = lambda x: ((x - low) * 2046 / (high - low)).clamp(0, 2046).floor()
        counts.setdefault("few", []).append((place(scores) == place(scores.topk(min(k, end)).values[:, -1:])).sum(-1).float().mean().item())
    return {n: statistics.mean(c) for n, c in counts.items()}


def bounds(cfg, L, union):
    """{stage: {resource: seconds}}: what each stage of a layer must compute and move, over what an H100 can at most."""
    H, G, d, Hi, di = cfg.n_head, cfg.n_kv_head, cfg.d_head, cfg.n_index_head, cfg.d_index
    TQ = kernels.tile_queries(90, H // G, 2 * d)
    pairs, tiles, U = L * L / 2, L / TQ, union[TQ]
    gather, product, student = tiles * U * 2 * G * d * 2, tiles * U * TQ * H * d * 2, tiles * U * TQ * Hi
    places = 4 * tiles * L  # of keys among the partial sums
    sums = lambda part, total: 2 * part + places + 2 * total * math.ceil((part + places) / kernels.PARTIAL_BYTES)
    work = {
        "dense attention": {"tensor": 4 * pairs * H * d, "MUFU": pairs * H},
        "dense backward": {"tensor": 10 * pairs * H * d, "MUFU": pairs * H},
        "scores": {"tensor": 2 * pairs * Hi * di, "MUFU": pairs * Hi, "L2": 4 * pairs},
        "select": {"L2": 2 * 4 * pairs + (4 + 4 * 8) * L * union["few"]},  # a row of scores twice; the few, written once, four times read with their scores
        "pack": {"HBM": 4 * 4 * tiles * L},  # zeros, scatter, two passes of nonzero
        "attend": {"tensor": 2 * product, "MUFU": tiles * U * TQ * H, "L2": gather + 8 * tiles * U},
        "attend backward": {"tensor": 5 * product, "MUFU": tiles * U * TQ * H, "L2": gather, "HBM": sums(gather, 2 * L * G * d * 4) + 2 * places},
        "index loss": {"tensor": product + 8 * student * di, "MUFU": tiles * U * TQ * H + 2 * student, "L2": gather / 2, "HBM": sums(tiles * U * di * 4, L * di * 4) + places}}
    return {stage: {r: n / H100[r] for r, n in w.items()} for stage, w in work.items()}


def roofline(cfg):
    rows = []
    print(f"Lower bounds for one layer on an H100, H={cfg.n_head} G={cfg.n_kv_head} d={cfg.d_head} Hi={cfg.n_index_head} di={cfg.d_index}, batch 1, bf16: operations and\n"
          "bytes counted from real selections over the chip's peak rates. Not one of these numbers is a measured speed.")
    for L in map(int, cfg.forward.split(",")):
        k, sources = min(cfg.k, L // 8), [("random keys", random_index(cfg, L))]
        if os.path.exists(os.path.join(cfg.out_dir, "ckpt.pt")):
            sources += [(f"{cfg.out_dir}, layer {i}", index) for i, index in enumerate(checkpoint_indices(cfg, L))]
        for source, index in sources:
            union = unions(index, k)
            times = bounds(cfg, L, union)
            rows.append(dict(L=L, k=k, source=source, union=union, seconds=times))
            print(f"\nL {L:,}, k {k}, {source}: union of 8, 16, 32, 64 queries / k: " + ", ".join(f"{union[n] / union['k']:.2f}" for n in (8, 16, 32, 64)))
            for stage, by in times.items():
                binding = max(by, key=by.get)
                print(f"  {stage:<16} ≥ {1e3 * by[binding]:8.3f} ms ({binding})   " + ", ".join(f"{r} {1e3 * t:.3f}" for r, t in by.items()), flush=True)
            total = lambda *stages: 1e3 * sum(max(times[s].values()) for s in stages)
            dense, gsa = ["dense attention"], ["scores", "select", "pack", "attend"]
            for what in ("forward", "training step"):
                print(f"  {what:<16} ≥ {total(*gsa):8.3f} ms, dense ≥ {total(*dense):8.3f} ms")
                dense, gsa = dense + ["dense backward"], gsa + ["attend backward", "index loss"]
    return dict(rows=rows)


# ----------------------------------------------------------------------------------------------------------------
# --data

def real_text(path, size):
    """JSON lines of about `size` bytes of text: the Python files of this installation, each once, then from the front again. Bytes of them all."""
    found = {}
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for file in sorted(glob.glob(root + "/**/*.py", recursive=True)):
            with open(file, encoding="utf-8", errors="ignore") as f:
                found.setdefault(f.read())
    written = 0
    with open(path, "w") as f:
        for text in itertools.cycle(t for t in found if t):
            f.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            if written >= size:
                return sum(len(t.encode()) for t in found)


def encode_bare(path, tokenizer, part, parts, start):
    """(bytes, seconds): every parts-th document of path through encode_to_numpy and nothing else, from the moment when all are ready."""
    encoding, texts = Tokenizer(tokenizer).enc, [json.loads(line)["text"] for line in itertools.islice(open(path), part, None, parts)]
    start.wait()
    began = time.perf_counter()
    for text in texts:
        encoding.encode_to_numpy(text, disallowed_special=())
    return sum(len(t.encode()) for t in texts), time.perf_counter() - began


def usual_way(path, tokenizer, num_proc, folder):
    """nanoGPT's: datasets.map, then all ids one after the other into a memmap."""
    import datasets
    datasets.disable_progress_bars()
    encoder = Tokenizer(tokenizer)

    def encode(row):
        ids = encoder.enc.encode_ordinary(row["text"]) + [encoder.separator]
        return {"ids": ids, "len": len(ids)}
    data = datasets.load_dataset("json", data_files=path, split="train", cache_dir=folder).map(encode, remove_columns=["text"], num_proc=num_proc)
    out = np.memmap(os.path.join(folder, "train.bin"), dtype=encoder.dtype, mode="w+", shape=(sum(data["len"]),))
    at = 0
    for i in range(n := min(1024, len(data))):
        batch = np.concatenate(data.shard(n, i, contiguous=True).with_format("numpy")["ids"])
        out[at:at + len(batch)] = batch
        at += len(batch)
    out.flush()


def data(cfg):
    """Rows of {what, seconds, mb_per_s, peak_mb}; peak_mb of all processes together."""
    rows, n = [], cfg.threads
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Manager() as manager:
        text, large = os.path.join(folder, "text.jsonl"), os.path.join(folder, "large.jsonl")
        unique = real_text(text, cfg.megabytes * 10**6)
        print(f"{cfg.megabytes} MB of Python source ({unique / 1e6:.0f} MB of it different), {n} processes, tokenizer {cfg.tokenizer}")

        def row(what, size, seconds, peak):
            rows.append(dict(what=what, seconds=seconds, mb_per_s=size / seconds / 1e6, peak_mb=peak))
            print(f"{what:40}{seconds:8.1f} s{size / seconds / 1e6:8.1f} MB/s" + f"{peak:8.0f} MB of memory" * bool(peak), flush=True)

        def prepare(what, source, tokenizer, megabytes):
            os.sync()  # the input, just written, on its way to the disk would take the output's share of it
            args = [f"--dataset={source}", f"--tokenizer={tokenizer}", f"--num_proc={n}", "--name=d", f"--data_dir={folder}"]
            began = time.perf_counter()
            process = subprocess.Popen([sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "prepare.py"), *args],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            peak = 0
            while process.poll() is None:
                peak = max(peak, resident(process.pid))
                time.sleep(0.05)
            if process.returncode:
                raise UserError(process.stderr.read().strip().splitlines()[-1])
            row(what, megabytes * 10**6, time.perf_counter() - began, peak)
            shutil.rmtree(os.path.join(folder, "d"))
        start = manager.Barrier(n)
        with ProcessPoolExecutor(n, mp_context=multiprocessing.get_context("spawn")) as pool:
            bare = list(pool.map(encode_bare, *zip(*[(text, cfg.tokenizer, i, n, start) for i in range(n)])))
        row("ceiling: encode_to_numpy alone", sum(b for b, _ in bare), max(t for _, t in bare), 0)
        prepare(f"prepare.py, {cfg.tokenizer}", text, cfg.tokenizer, cfg.megabytes)
        began = time.perf_counter()
        usual_way(text, cfg.tokenizer, n, folder)
        row("datasets.map, then a memmap", cfg.megabytes * 10**6, time.perf_counter() - began, 0)
        real_text(large, 10**9)
        os.sync()
        part, began = os.urandom(2 * 10**6), time.perf_counter()
        with open(os.path.join(folder, "bare.bin"), "wb") as f:
            for _ in range(1000):
                f.write(part)
            os.fsync(f.fileno())
        row("ceiling: writing its ids alone", 10**9, time.perf_counter() - began, 0)
        os.remove(f.name)
        prepare("prepare.py, bytes, 10^9 of them", large, "bytes", 1000)
    ratio = rows[1]["mb_per_s"] / rows[0]["mb_per_s"]
    print(f"prepare.py reaches {ratio:.0%} of the ceiling and {rows[2]['seconds'] / rows[1]['seconds']:.1f} × the speed of the usual way")
    return dict(rows=rows, of_ceiling=ratio)


def resident(pid):
    """Resident memory of a process and its descendants, MB (Linux)."""
    total = 0
    try:
        with open(f"/proc/{pid}/statm") as f:
            total = int(f.read().split()[1]) * resource.getpagesize() / 1e6
        with open(f"/proc/{pid}/task/{pid}/children") as f:
            total += sum(resident(int(child)) for child in f.read().split())
    except OSError:  # it has ended
        pass
    return total


def main(argv):
    given = parse(BenchConfig, argv)
    defaults = (GPU if given.get("gpu") else {}) | (DRY if given.get("dry_run") else {}) | (ROOFLINE if given.get("roofline") else {})
    cfg = BenchConfig(**defaults | given)
    if cfg.dry_run and not kernels.INTERPRET:  # Triton reads the variable when it is imported: start again with it
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"TRITON_INTERPRET": "1"})
    report = gpu(cfg) if cfg.gpu else data(cfg) if cfg.data else roofline(cfg) if cfg.roofline else cpu(cfg)
    line = json.dumps(dict(config=asdict(cfg), torch=torch.__version__, **report))
    print(line)
    if cfg.json:
        with open(cfg.json, "w") as f:
            f.write(line + "\n")


if __name__ == "__main__":
    run(main)
