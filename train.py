"""
Train a GSA model, on a laptop or by torchrun on many GPUs.

    python train.py config/gsa_demo.py
    python train.py config/gsa_demo.py --attention=dense --out_dir=out/dense
    torchrun --nproc_per_node=8 train.py config/gsa_small.py
    python train.py --init_from=resume --out_dir=out

Two phases (README, "Training the indexer"): for index_warmup_iters steps attention is dense and the indexer learns to
predict it; then attention runs over the selected keys only. The batch of step n is a pure function of (seed, n, rank),
so a resumed run continues exactly where the interrupted one stopped.
"""
import dataclasses
import json
import math
import os
import subprocess
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import kernels
from configurator import UserError, parse, run
from model import GSA, GSAConfig
from prepare import Data

PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12,
              "RTX 4090": 165e12}  # dense bf16, NVIDIA data sheets; first name found in the device's counts


@dataclass
class TrainConfig(GSAConfig):
    vocab_size: int = 0  # 0 = the data's
    # data and output
    data: str = "data/slimpajama"  # a folder written by prepare.py
    out_dir: str = "out"  # ckpt.pt, log.jsonl, config.json
    init_from: str = "scratch"  # scratch | resume (out_dir's checkpoint)
    retrofit_from: str = ""  # folder of a dense checkpoint to start from: it gets gates and an indexer, trained alone in warm-up
    # model
    attention: str = "gsa"  # arm: dense | gated | sparse | gsa; sets the model's switches unless they are given too
    doc_mask: bool = True  # attention stops at document boundaries
    # optimization
    muon: bool = False  # the layers' matrices by Muon, scaled to AdamW's step size (torch.optim.Muon); all else by AdamW
    batch_size: int = 8  # sequences per micro-batch and rank
    grad_accum: int = 1  # micro-batches per step over all ranks together
    max_iters: int = 1000
    learning_rate: float = 6e-4
    min_lr: float = 6e-5
    warmup_iters: int = 100  # of the learning rate
    short_iters: int = 0  # sequence-length warm-up: the first so many steps see windows cut to pieces of short_block tokens
    short_block: int = 128
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    # indexer
    index_warmup_iters: int = 200  # phase 1, dense attention
    index_lr_mult: float = 10.0
    index_grad_clip: float = 1.0
    index_loss_weight: float = 1.0
    # reporting
    log_interval: int = 10
    eval_interval: int = 250  # also when a checkpoint is written
    eval_iters: int = 20  # micro-batches of val.bin
    # system
    device: str = ""  # default: cuda if there is one, else cpu
    backend: str = "auto"  # path of kernels.py: auto | torch | triton | eager
    dtype: str = ""  # float32 | bfloat16; default: bfloat16 on cuda
    compile: bool = False
    seed: int = 1337

    def __post_init__(self):
        self.model_config(self.vocab_size or 256)
        kernels.check_backend(self.backend)
        for name, choices in dict(init_from=("scratch", "resume"), dtype=("", "float32", "bfloat16")).items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(choices)}")
        if min(self.batch_size, self.grad_accum, self.max_iters, self.log_interval, self.eval_interval) < 1:
            raise ValueError("batch_size, grad_accum, max_iters, log_interval and eval_interval must be positive")
        if self.short_iters and (self.short_block < 1 or self.block_size % self.short_block):
            raise ValueError(f"block_size {self.block_size} is not a multiple of short_block {self.short_block}")

    def model_config(self, vocab_size):
        return GSAConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(GSAConfig)} | {"vocab_size": vocab_size})


# ----------------------------------------------------------------------------------------------------------------
# Batches

def permute(i, n, key):
    """The i-th element of a pseudo-random permutation of range(n): a Feistel network, walked until it lands below n."""
    half = max(1, (n - 1).bit_length() + 1 >> 1)
    low = (1 << half) - 1
    while True:
        left, right = i >> half, i & low
        for r in range(4):
            x = (right * 0x9E3779B97F4A7C15 + key * 0xBF58476D1CE4E5B9 + r * 0x94D049BB133111EB) & (1 << 64) - 1
            x = (x ^ x >> 31) * 0xD6E8FEB86659FD93 & (1 << 64) - 1
            left, right = right, left ^ (x >> 29 & low)
        i = left << half | right
        if i < n:
            return i


class Batches:
    """
    Windows of block_size + 1 ids, block_size apart, every one once per epoch in an order of its own.
    Micro-batch m (counted over all ranks and steps) is a pure function of (seed, m).
    """

    def __init__(self, ids, block_size, batch_size, separator, seed, doc_mask):
        self.ids, self.T, self.B, self.separator, self.seed, self.doc_mask = ids, block_size, batch_size, separator, seed, doc_mask
        self.n = (len(ids) - 1) // block_size
        if self.n < 1:
            raise UserError(f"block_size {block_size} is larger than the data ({len(ids):,} tokens): prepare more, or shorten it")

    def windows(self, starts, device, length):
        """idx, targets (B, T) int64 and doc (B, T) or None, for windows starting at these positions, cut to pieces of `length`."""
        rows = torch.stack([torch.from_numpy(self.ids[s:s + self.T + 1].astype(np.int64)) for s in starts])
        if device.startswith("cuda"):
            rows = rows.pin_memory().to(device, non_blocking=True)
        idx, targets = (x.reshape(-1, length) for x in (rows[:, :-1], rows[:, 1:]))
        return idx, targets, (idx == self.separator).cumsum(1) if self.doc_mask else None  # a document starts at a separator

    def train(self, m, device, length=None):
        draws = range(m * self.B, (m + 1) * self.B)
        return self.windows([permute(g % self.n, self.n, self.seed + g // self.n) * self.T for g in draws], device, length or self.T)

    def evaluation(self, m, count, device):
        """Micro-batch m of `count`, spread evenly over the data."""
        spread = np.linspace(0, self.n - 1, count * self.B).astype(int)
        return self.windows([int(w) * self.T for w in spread[m * self.B:(m + 1) * self.B]], device, self.T)


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints

def load_checkpoint(folder, device="cpu"):
    """The dict that save_checkpoint wrote: model, optimizer, step, config, model_config, meta (the data's meta.json)."""
    path = os.path.join(folder, "ckpt.pt")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as e:  # torch.load raises many types for a truncated or foreign file
        raise UserError(f"{path} is not a readable checkpoint: {str(e).splitlines()[0]}") from None


def load_model(folder, device="cpu", backend="auto"):
    """(model in eval mode, checkpoint dict) of a training run's out_dir."""
    checkpoint = load_checkpoint(folder, device)
    try:
        kernels.check_backend(backend, torch.empty(0, device=device))
        model = GSA(GSAConfig(**checkpoint["model_config"]), backend).to(device)
    except ValueError as e:
        raise UserError(str(e)) from None
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint


def save_checkpoint(folder, **content):
    """Written beside and renamed, so that ckpt.pt is always a whole one."""
    path = os.path.join(folder, "ckpt.pt")
    torch.save(content, path + ".partial")
    os.replace(path + ".partial", path)


def load_retrofit(model, folder):
    """Load a dense checkpoint into a model with gates and indexer, gates open (σ(8) = 0.9997) so that it starts as it was."""
    checkpoint = load_checkpoint(folder)
    try:
        missing, unexpected = model.load_state_dict(checkpoint["model"], strict=False)
    except RuntimeError as e:
        raise UserError(f"{folder} does not fit this model: {str(e).splitlines()[1].strip()}") from None
    foreign = unexpected + [n for n in missing if "_gate." not in n and ".indexer." not in n]
    if foreign:
        raise UserError(f"{folder} does not fit this model: {foreign[0]} is on one side only")
    for name, p in model.named_parameters():
        if name in missing and "_gate." in name:
            torch.nn.init.constant_(p, 8.0 if name.endswith("bias") else 0.0)


# ----------------------------------------------------------------------------------------------------------------
# The run

def learning_rate(cfg, step):
    """Linear warm-up, then cosine from learning_rate to min_lr at max_iters."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / cfg.warmup_iters
    done = (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * min(done, 1))) * (cfg.learning_rate - cfg.min_lr)


def make_optimizers(model, cfg):
    """[AdamW] for all of the model's groups or, with cfg.muon, [AdamW, Muon], Muon for the layers' matrices."""
    groups, by_muon = {g["name"]: g for g in model.param_groups(cfg.weight_decay, cfg.index_lr_mult)}, []
    if cfg.muon:
        by_muon = [torch.optim.Muon([groups.pop("matrix")], lr=cfg.learning_rate, adjust_lr_fn="match_rms_adamw")]
    return [torch.optim.AdamW(groups.values(), lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)] + by_muon


@torch.no_grad()
def evaluate(model, batches, cfg, device, warmup, rank, world):
    """Mean loss, index loss and stats over eval_iters micro-batches of the validation data, shared among the ranks."""
    model.eval()
    rows = []
    for m in range(rank, max(cfg.eval_iters, world), world):
        idx, targets, doc = batches.evaluation(m % cfg.eval_iters, cfg.eval_iters, device)
        out = model(idx, targets, doc, warmup=warmup)
        values = {"loss": out.loss, "index_loss": out.index_loss, **{k: v.mean() for k, v in out.stats.items()}}
        rows.append({k: v for k, v in values.items() if v is not None})
    total = torch.stack([torch.stack([r[k].double() for r in rows]).sum() for k in rows[0]] + [torch.tensor(float(len(rows)), dtype=torch.float64, device=device)])
    if world > 1:
        dist.all_reduce(total)
    model.train()
    return dict(zip(rows[0], (total[:-1] / total[-1]).tolist()))


def open_log(path, step):
    """The JSONL log, opened for appending behind its records up to `step`: what came after the checkpoint is done again."""
    kept = []
    if step and os.path.exists(path):
        kept = [line for line in open(path) if line.endswith("\n") and json.loads(line)["step"] <= step]
    log = open(path, "w")
    log.writelines(kept)
    return log


def git_commit():
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def train(cfg):
    """Run the training cfg describes. Returns the last evaluation's metrics, with tokens and tokens_per_second."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if world > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
    try:
        return _train(cfg, device, rank, world)
    finally:
        if world > 1:
            dist.destroy_process_group()


def _train(cfg, device, rank, world):
    if cfg.grad_accum % world:
        raise UserError(f"grad_accum {cfg.grad_accum} (micro-batches per step over all ranks) is not a multiple of the {world} ranks")
    try:
        kernels.check_backend(cfg.backend, torch.empty(0, device=device))
    except ValueError as e:
        raise UserError(str(e)) from None
    say = print if rank == 0 else lambda *_, **__: None
    data = Data(cfg.data)
    if cfg.vocab_size not in (0, data.vocab_size):
        raise UserError(f"vocab_size {cfg.vocab_size} disagrees with the {data.vocab_size} of {cfg.data}")
    splits = {s: Batches(getattr(data, s), cfg.block_size, cfg.batch_size, data.separator, cfg.seed, cfg.doc_mask) for s in ("train", "val")}
    torch.manual_seed(cfg.seed)
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32

    raw = GSA(cfg.model_config(data.vocab_size), cfg.backend)
    step = 0
    if cfg.retrofit_from and cfg.init_from == "scratch":
        load_retrofit(raw, cfg.retrofit_from)
    raw.to(device)
    optimizers = make_optimizers(raw, cfg)
    if cfg.init_from == "resume":
        checkpoint = load_checkpoint(cfg.out_dir, device)
        if checkpoint["model_config"] != asdict(raw.config) or checkpoint["meta"]["tokenizer"] != data.meta["tokenizer"]:
            raise UserError(f"{cfg.out_dir}/ckpt.pt was trained with another model or tokenizer than these settings and {cfg.data}")
        if len(checkpoint["optimizer"]) != len(optimizers):
            raise UserError(f"{cfg.out_dir}/ckpt.pt was trained with muon={not cfg.muon}")
        raw.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizer"]):
            optimizer.load_state_dict(state)
        step = checkpoint["step"]
        del checkpoint
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    model = torch.compile(raw) if cfg.compile else raw
    if world > 1:
        model = DistributedDataParallel(model, device_ids=[device] if device.startswith("cuda") else None, broadcast_buffers=False)

    local_accum = cfg.grad_accum // world
    step_tokens = cfg.batch_size * cfg.block_size * cfg.grad_accum
    dtype = cfg.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    autocast = torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=dtype == "bfloat16")
    peak = next((f for n, f in PEAK_FLOPS.items() if device.startswith("cuda") and n in torch.cuda.get_device_name(device)), None)
    bytes_per_token = data.meta["val"]["bytes"] / data.meta["val"]["tokens"]
    say(f"{sum(p.numel() for p in raw.parameters()) / 1e6:.2f}M parameters, {cfg.max_iters * step_tokens:,} tokens of "
        f"{splits['train'].n * cfg.block_size:,} in {cfg.data}, {world} × {device}, {dtype}")
    log = None
    if rank == 0:
        os.makedirs(cfg.out_dir, exist_ok=True)
        with open(os.path.join(cfg.out_dir, "config.json"), "w") as f:
            json.dump({**asdict(cfg), "git_commit": git_commit()}, f, indent=1)
        log = open_log(os.path.join(cfg.out_dir, "log.jsonl"), step)

    def record(kind, **values):
        if log:
            log.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            log.flush()

    model.train()
    metrics, tokens, seconds, began, first = {}, 0, 0.0, time.time(), step
    interval = [0, 0.0]  # tokens and seconds since the last print
    while True:
        warmup = cfg.sparse and step < cfg.index_warmup_iters
        done = step >= cfg.max_iters
        if done or (step > first and step % cfg.eval_interval == 0):
            with autocast:
                metrics = evaluate(model, splits["val"], cfg, device, warmup, rank, world)
            metrics["bits_per_byte"] = metrics["loss"] / math.log(2) / bytes_per_token
            say(f"step {step}: " + ", ".join(f"val {k} {v:.4g}" for k, v in metrics.items()), flush=True)
            record("eval", **metrics)
            if rank == 0:
                save_checkpoint(cfg.out_dir, model=raw.state_dict(), optimizer=[o.state_dict() for o in optimizers], step=step,
                                config=asdict(cfg), model_config=asdict(raw.config), meta=data.meta)
        if done:
            break
        start = time.time()
        lr = learning_rate(cfg, step)
        for group in groups:
            frozen = warmup and cfg.retrofit_from and group["name"] != "indexer"  # a retrofitted model first trains its indexer alone
            group["lr"] = 0.0 if frozen else lr * group["lr_mult"]
        length = cfg.short_block if step < cfg.short_iters else cfg.block_size
        logged = (step + 1) % cfg.log_interval == 0 or step == 0
        sums = torch.zeros(2, device=device)
        for micro in range(local_accum):
            idx, targets, doc = splits["train"].train(step * cfg.grad_accum + micro * world + rank, device, length)
            if world > 1:
                model.require_backward_grad_sync = micro == local_accum - 1
            with autocast:
                out = model(idx, targets, doc, warmup=warmup, stats=logged and micro == local_accum - 1)
            loss = out.loss + (cfg.index_loss_weight * out.index_loss if cfg.sparse else 0)
            (loss / local_accum).backward()
            sums += torch.stack((out.loss.detach(), out.index_loss.detach() if cfg.sparse else out.loss.detach() * 0)) / local_accum
        for name, limit in (("indexer", cfg.index_grad_clip), ("", cfg.grad_clip)):
            params = [p for g in groups if (g["name"] == "indexer") == bool(name) for p in g["params"]]
            if params and limit:
                torch.nn.utils.clip_grad_norm_(params, limit)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        raw.update_var_avg()
        step += 1
        if logged:
            if world > 1:
                dist.all_reduce(sums)
                sums /= world
            loss, index_loss = sums.tolist()
        tokens += step_tokens
        seconds += time.time() - start
        interval[0] += step_tokens
        interval[1] += time.time() - start
        if logged:
            speed = interval[0] / interval[1]
            interval = [0, 0.0]
            values = dict(loss=loss, lr=lr, tokens_per_second=speed)
            if cfg.sparse:
                values |= dict(index_loss=index_loss, phase="warm-up" if warmup else "sparse")
                values |= {k: out.stats[k].mean().item() for k in ("recall", "k_t")}
            if peak:
                values["mfu"] = speed * raw.flops_per_token(length, warmup=warmup) / (peak * world)
            say(f"step {step}: " + ", ".join(f"{k} {v if isinstance(v, str) else format(v, '.4g')}" for k, v in values.items()), flush=True)
            record("train", **values, seconds=time.time() - began)
    if log:
        log.close()
    return {**metrics, "tokens": tokens, "tokens_per_second": tokens / seconds if seconds else 0.0}


def settings(argv):
    """TrainConfig from arguments: the arm's switches, then config files and flags; a resumed run starts from its own settings."""
    given = parse(TrainConfig, argv)
    if given.get("init_from") == "resume":
        saved = load_checkpoint(given.get("out_dir", TrainConfig.out_dir))["config"]
        given = {**saved, **given}
    try:
        return TrainConfig.arm(given.get("attention", TrainConfig.attention), **given)
    except ValueError as e:
        raise UserError(str(e)) from None


def main(argv):
    train(settings(argv))


if __name__ == "__main__":
    run(main)
