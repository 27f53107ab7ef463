"""
Speed of training steps: a plain model, the dense arm, and what each part of GSA adds to it.

    python bench.py --train          # the demo's shape, on a CPU
    python bench.py --train --gpu    # the shape of config/gsa_small.py; --dry_run on a CPU

The plain model is a small Llama written as nanoGPT would write it: Plain below. It has the dense
arm's weights, and both must train alike before anything is timed. All other steps are train.py's
own (train.Run.optimize): batch, forward, backward, clipping, update.

All steps are timed in turn, round after round, and compared within a round, so that a machine whose
speed wanders slows both sides alike. What a part adds is the difference between a step with it and
one without, as a share of the round's dense step. The tokens are random and the indexer is hardly
trained: neighbouring queries select different keys, the worst case.
"""
import os
import statistics
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from configurator import UserError, say, to_json
from data import Batches
from device import precision
from ranks import Ranks
from settings import TrainConfig
from train import Run, StopSignal

FOREVER = 10**9


# --------------------------------------------------------------------------------------------------
# The plain model and its step, after nanoGPT's model.py and train.py

def rotate(x, cos, sin):
    """RoPE: x (B, T, heads, d), cos and sin (T, 1, d/2)."""
    x1, x2 = x.chunk(2, -1)  # (B, T, heads, d/2)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


class PlainBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, d = config.n_embd, config.d_head
        self.n_head, self.n_kv_head, self.d_head = config.n_head, config.n_kv_head, d
        hidden = (8 * C + 95) // 96 * 32
        self.norm1 = nn.RMSNorm(C, eps=1e-6)
        self.norm2 = nn.RMSNorm(C, eps=1e-6)
        self.qkv = nn.Linear(C, (self.n_head + 2 * self.n_kv_head) * d, bias=False)
        self.wo = nn.Linear(self.n_head * d, C, bias=False)
        self.gate_up = nn.Linear(C, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, C, bias=False)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        heads = (self.n_head, self.n_kv_head, self.n_kv_head)
        qkv = self.qkv(self.norm1(x)).view(B, T, sum(heads), self.d_head)
        q, k, v = qkv.split(heads, 2)  # (B, T, H or G, d)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H or G, T, d)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                           enable_gqa=self.n_head != self.n_kv_head)
        x = x + self.wo(o.transpose(1, 2).reshape(B, T, -1))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Plain(nn.Module):
    """A Llama: idx, targets (B, T) -> loss. config: model.GSAConfig, whose widths it takes."""

    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)  # also the output projection
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        d = config.d_head
        speed = config.rope_base ** (-torch.arange(0, d, 2) / d)  # (d/2,)
        angle = torch.arange(config.block_size)[:, None, None] * speed  # (block_size, 1, d/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, idx, targets):
        T = idx.size(1)
        x = self.embed(idx)  # (B, T, C)
        cos = self.cos[:T].to(x.dtype)
        sin = self.sin[:T].to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = F.linear(self.norm(x), self.embed.weight)  # (B, T, vocab_size)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def copy_weights(self, model):
        """Take the weights of the dense arm, a model.GSA."""
        weights = model.state_dict()
        for i in range(len(self.blocks)):
            attn = f"blocks.{i}.attn"
            q, k, v = (weights.pop(f"{attn}.{name}.weight") for name in ("wq", "wk", "wv"))
            weights[f"blocks.{i}.qkv.weight"] = torch.cat((q, k, v))
            weights[f"blocks.{i}.wo.weight"] = weights.pop(f"{attn}.wo.weight")
            for name in ("gate_up", "down"):
                weights[f"blocks.{i}.{name}.weight"] = weights.pop(f"blocks.{i}.mlp.{name}.weight")
        self.load_state_dict(weights)


class PlainRun:
    """The plain model's training, with the settings and the batches of a dense Run."""

    def __init__(self, run):
        self.cfg = run.cfg
        self.device = run.device
        self.autocast = precision(self.device, self.cfg.dtype)
        self.raw = Plain(run.raw.config).to(self.device)
        self.batches = Batches(run.batches["train"].ids, self.cfg.block_size, self.cfg.batch_size,
                               self.cfg.seed)
        self.step = run.step
        parameters = list(self.raw.parameters())
        groups = [dict(params=[p for p in parameters if p.dim() > 1],
                       weight_decay=self.cfg.weight_decay),
                  dict(params=[p for p in parameters if p.dim() == 1], weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=self.cfg.learning_rate, fused=True,
                                           betas=(self.cfg.beta1, self.cfg.beta2))

    def optimize(self):
        idx, targets = self.batches.train(self.step, self.device)
        with self.autocast:
            loss = self.raw(idx, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.raw.parameters(), self.cfg.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1


# --------------------------------------------------------------------------------------------------
# The steps that are compared

def write_tokens(folder, cfg):
    """A prepared folder of random tokens, whose documents have block_size/4 tokens on average."""
    n = 16 * cfg.batch_size * cfg.block_size + 1
    rng = np.random.default_rng(0)
    separator = cfg.vocab_size - 1
    ids = rng.integers(0, separator, n, dtype=np.uint32)
    ids[rng.random(n) < 4 / cfg.block_size] = separator
    ids.tofile(os.path.join(folder, "train.bin"))
    split = dict(documents=int((ids == separator).sum()), tokens=n, bytes=n,
                 files=[dict(name="train.bin", tokens=n, xxh3="")])
    meta = dict(dataset="random", source="", source_files="", tokenizer="bytes", vocabulary="",
                vocab_size=cfg.vocab_size, separator=separator, dtype="uint32", flags={},
                complete=True, counts={}, train=split, val=split)
    with open(os.path.join(folder, "meta.json"), "w") as f:
        f.write(to_json(meta))


def make_run(cfg, folder, arm, doc_mask=False, warmup=False):
    """A train.Run of the arm over the tokens in folder. cfg: bench.BenchConfig."""
    settings = TrainConfig.arm(
        arm, data=folder, backend=cfg.backend, doc_mask=doc_mask, batch_size=cfg.batch_size,
        block_size=cfg.block_size, n_layer=cfg.n_layer, n_head=cfg.n_head,
        n_kv_head=cfg.n_kv_head, n_embd=cfg.n_head * cfg.d_head, n_index_head=cfg.n_index_head,
        d_index=cfg.d_index, k_base=cfg.k, k_min=min(128, cfg.k), k_max=cfg.k,
        index_warmup_iters=FOREVER if warmup else 0, max_iters=FOREVER, log_interval=FOREVER,
        warmup_iters=0, learning_rate=1e-3, min_lr=1e-3)
    run = Run(settings, Ranks(cfg.device), StopSignal())
    run.prepare()
    run.step = 1  # step 0 is a logged one
    return run


def without_index_loss(run):
    """The indexer is not trained: no loss, hence no gradients, and no update."""
    trunk = run.raw.trunk

    def trunk_alone(*args, **how):
        return trunk(*args, **how | dict(want_loss=False))
    run.raw.trunk = trunk_alone
    run.groups = [group for group in run.groups if group["name"] != "indexer"]


def without_selection(run):
    """
    Every step attends to the keys that the second one selected. What is made once from the keys,
    such as union lists, is left out with the selection.
    """
    run.optimize()  # the first one gives V̄ a value
    for block in run.raw.blocks:
        remember(block.attn, "choose_keys")


def without_indexer(run):
    for block in run.raw.blocks:
        remember(block.attn.indexer, "forward")


def remember(owner, name):
    """Replace a method: from its second call on it returns what the first returned."""
    method = getattr(owner, name)
    result = None

    def remembered(*args, **how):
        nonlocal result
        if result is None:
            with torch.no_grad():
                result = method(*args, **how)
        return result
    setattr(owner, name, remembered)


@dataclass
class Part:
    """A step and what it has more than another one."""
    name: str
    compared_with: str  # the step without this part
    run: dict  # arguments of make_run
    without: tuple = ()  # functions that take parts out of the run


PARTS = (
    Part("dense", "plain", dict(arm="dense")),
    Part("document mask", "dense", dict(arm="dense", doc_mask=True)),
    Part("gates", "dense", dict(arm="gated")),
    Part("sparse attention", "gates", dict(arm="gsa"),
         (without_index_loss, without_selection, without_indexer)),
    Part("indexer", "sparse attention", dict(arm="gsa"), (without_index_loss, without_selection)),
    Part("selection", "indexer", dict(arm="gsa"), (without_index_loss,)),
    Part("index loss", "selection", dict(arm="gsa")),  # nothing is left out: GSA
    Part("warm-up phase", "gates", dict(arm="gsa", warmup=True)),
)


def make_runs(cfg, folder):
    """{name: run} of the plain model and of all PARTS, over new tokens in folder."""
    write_tokens(folder, cfg)
    runs = {}
    for part in PARTS:
        runs[part.name] = make_run(cfg, folder, **part.run)
        for leave_out in part.without:
            leave_out(runs[part.name])
    return {"plain": PlainRun(runs["dense"])} | runs


# --------------------------------------------------------------------------------------------------
# Check, then measure

def check_plain(plain, dense):
    """
    Give the plain model the dense arm's weights, and check that both are the same model and train
    alike: as many parameters, equal losses on one batch before and after two training steps.
    Returns the larger relative difference of the losses. Raises UserError where it is too large.
    """
    count, dense_count = (sum(p.numel() for p in run.raw.parameters()) for run in (plain, dense))
    if count != dense_count:
        raise UserError(f"the plain model has {count:,} parameters and the dense arm "
                        f"{dense_count:,}, so nothing was timed")
    plain.raw.copy_weights(dense.raw)
    idx, targets = plain.batches.train(0, plain.device)
    tolerance = 1e-3 if plain.device == "cuda" else 1e-5  # of bfloat16, of float32
    worst = 0.0
    for steps in (0, 2):
        for run in (plain, dense):
            for _ in range(steps):
                run.optimize()
        with torch.no_grad(), plain.autocast:
            loss = plain.raw(idx, targets).item()
            dense_loss = dense.raw(idx, targets).loss.item()
        difference = abs(loss / dense_loss - 1)
        if not difference <= tolerance:  # also where it is NaN
            raise UserError(f"the plain model has the loss {loss:.6f} after {steps} steps and the "
                            f"dense arm {dense_loss:.6f}, so nothing was timed")
        worst = max(worst, difference)
    return worst


def now(device):
    """Seconds, when the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def short_number(ms):
    return f"{ms:.4g}" if ms < 10_000 else f"{ms:.0f}"


def spread(ms):
    """[3, 1, 2] -> "2 (1–3)": median, lowest, highest."""
    median, low, high = map(short_number, (statistics.median(ms), min(ms), max(ms)))
    return f"{median} ({low}–{high})"


def quartiles(x):
    """Median, lower and upper quartile."""
    return np.percentile(x, (50, 25, 75)).tolist()


def time_in_turn(cfg, runs):
    """{name: ms of a step in each of cfg.repeats rounds}. Every other round runs backwards."""
    ms = {name: [] for name in runs}
    order = list(runs)
    steps = 3 if cfg.device == "cuda" else 1  # without a wait between them, as in a training
    for _ in tqdm(range(cfg.repeats + 1), desc="rounds", leave=False):
        for name in order:
            start = now(cfg.device)
            for _ in range(steps):
                runs[name].optimize()
            ms[name].append(1000 * (now(cfg.device) - start) / steps)
        order.reverse()
    return {name: times[1:] for name, times in ms.items()}


def time_training(cfg):
    """Check the plain model, then print a row for each step. Returns the rows."""
    torch.set_num_threads(cfg.threads)
    # 1. check, then time
    with tempfile.TemporaryDirectory() as folder:
        try:
            runs = make_runs(cfg, folder)
        except ValueError as e:  # sizes that do not fit each other
            raise UserError(str(e)) from None
        difference = check_plain(runs["plain"], runs["dense"])
        size = sum(p.numel() for p in runs["dense"].raw.parameters())
        say(f"{cfg.n_layer} layers, {size / 1e6:.2f}M parameters, {cfg.batch_size} × "
            f"{cfg.block_size} tokens; losses of plain and dense differ by {difference:.0e}")
        ms = time_in_turn(cfg, runs)
    # 2. the table
    say(f"{'step':18}{'ms (spread)':>23}{'tokens/s':>10}{'adds, of dense (quartiles)':>30}"
        "  compared with")
    compared_with = {part.name: part.compared_with for part in PARTS}
    rows = {}
    for name, times in ms.items():
        tokens_per_second = 1000 * cfg.batch_size * cfg.block_size / statistics.median(times)
        row = dict(step=name, ms=times, tokens_per_second=tokens_per_second)
        line = f"{name:18}{spread(times):>23}{tokens_per_second:10.0f}"
        if name in compared_with:
            other = compared_with[name]
            shares = [(a - b) / dense for a, b, dense in zip(times, ms[other], ms["dense"])]
            median, low, high = quartiles(shares)
            row |= dict(compared_with=other, adds=[median, low, high])
            line += f"{median:+.1%} ({low:+.1%} to {high:+.1%})".rjust(30) + f"  {other}"
        say(line)
        rows[name] = row
    speed = quartiles([plain / dense for plain, dense in zip(ms["plain"], ms["dense"])])
    rows["dense"]["speed_over_plain"] = speed
    median, low, high = speed
    say(f"speed of the dense arm over the plain model's: {median:.2f}× ({low:.2f}–{high:.2f})")
    return list(rows.values())
