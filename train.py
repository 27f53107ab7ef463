"""
Train a GSA model, on a laptop or by torchrun on many GPUs.

    python train.py config/gsa_demo.py
    python train.py config/gsa_demo.py --attention=dense --out_dir=out/dense
    torchrun --nproc_per_node=8 train.py config/gsa_small.py
    python train.py --init_from=resume --out_dir=out

Training has two phases (README, "Training the indexer"): for index_warmup_iters steps attention is
dense and the indexer learns to predict it; then attention runs over the selected keys only.
The batch of step n is a pure function of (seed, n, rank), so a resumed run continues exactly where
the interrupted one stopped. A loss or gradient that is not finite stops the run, and never reaches
the checkpoint.
"""
import contextlib
import dataclasses
import math
import os
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import configurator
import kernels
from checkpoint import (check_backend, check_dtype, check_vocabulary, find_data, load_checkpoint,
                        load_retrofit, load_weights, not_finite, precision, read_log,
                        save_checkpoint, use_device)
from configurator import (UserError, check_ranges, environment, flags, only_one, parse, replacing,
                          run, to_json)
from data import Batches, Data, differences, identity
from model import GSA, GSAConfig

# Peak FLOP/s of dense bf16 products, from NVIDIA's data sheets. The first name that is part of the
# device's name counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


@dataclass
class TrainConfig(GSAConfig):
    vocab_size: int = 0  # 0 = the data's
    # data and output
    data: str = "data/slimpajama"  # a folder written by prepare.py
    out_dir: str = "out"  # ckpt.pt, log.jsonl, config.json
    init_from: str = "scratch"  # scratch | resume (out_dir's checkpoint)
    overwrite: bool = False  # a run from scratch deletes the run that out_dir holds
    # folder of a dense checkpoint to start from: it gets gates and an indexer, and only the
    # indexer is trained in warm-up
    retrofit_from: str = ""
    # model
    attention: str = "gsa"  # arm: dense | gated | sparse | gsa; sets switches that are not given
    doc_mask: bool = True  # attention stops at document boundaries
    # optimization
    muon: bool = False  # Muon at AdamW's step size for the layers' matrices; else AdamW
    batch_size: int = 8  # sequences per micro-batch and rank
    grad_accum: int = 1  # micro-batches per step over all ranks together
    max_iters: int = 1000
    learning_rate: float = 6e-4
    min_lr: float = 6e-5
    warmup_iters: int = 100  # steps of the learning rate's linear rise
    # sequence-length warm-up: in the first short_iters steps, windows are cut to pieces of
    # short_block tokens
    short_iters: int = 0
    short_block: int = 128
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # 0 = off
    # indexer
    index_warmup_iters: int = 200  # phase 1, dense attention
    index_lr_mult: float = 10.0
    index_grad_clip: float = 1.0  # 0 = off
    index_loss_weight: float = 1.0
    # reporting
    log_interval: int = 10
    eval_interval: int = 250  # steps; the checkpoint is written at the same steps
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
        check_dtype(self.dtype)
        if self.init_from not in ("scratch", "resume"):
            raise UserError(f"init_from {self.init_from!r} is not one of scratch, resume")
        check_ranges(self, {
            (1, None): "batch_size grad_accum max_iters log_interval eval_interval eval_iters "
                       "short_block",
            (0, None): "vocab_size learning_rate min_lr warmup_iters short_iters weight_decay "
                       "grad_clip index_warmup_iters index_lr_mult index_grad_clip "
                       "index_loss_weight",
            (0, 0.999999): "beta1 beta2",
            (0, 2**63 - 1): "seed"})
        if self.short_iters and self.block_size % self.short_block:
            raise UserError(f"block_size {self.block_size} is not a multiple of "
                            f"short_block {self.short_block}")

    def model_config(self, vocab_size):
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(GSAConfig)}
        return GSAConfig(**values | {"vocab_size": vocab_size})


# --------------------------------------------------------------------------------------------------
# Settings of a new and of a resumed run

# The settings that may change when a run is resumed. All others decide what the checkpoint means.
MAY_CHANGE = set(
    "out_dir init_from overwrite data max_iters learning_rate min_lr warmup_iters weight_decay "
    "beta1 beta2 grad_clip index_warmup_iters index_lr_mult index_grad_clip index_loss_weight "
    "log_interval eval_interval eval_iters device backend dtype compile".split())


def settings(argv):
    """
    TrainConfig from arguments: the arm's switches, then config files and flags.
    A resumed run starts from its own settings.
    """
    given = parse(TrainConfig, argv)
    if given.get("init_from") == "resume":
        given = resumed_settings(given)
    try:
        return TrainConfig.arm(given.get("attention", TrainConfig.attention), **given)
    except ValueError as e:
        raise UserError(str(e)) from None


def resumed_settings(given):
    """
    The settings saved in out_dir's checkpoint, replaced by those given now.
    Raises UserError if a setting is given that must not change.
    """
    out_dir = given.get("out_dir", TrainConfig.out_dir)
    checkpoint = load_checkpoint(out_dir)
    saved = checkpoint["config"]
    kinds = {f.name: f.type for f in dataclasses.fields(TrainConfig)}
    foreign = [name for name, value in saved.items() if type(value) is not kinds.get(name)]
    if foreign:
        raise UserError(f"{out_dir}/ckpt.pt was written by another version: "
                        f"it has a setting {foreign[0]!r}")
    fixed = {name: value for name, value in given.items() if name not in MAY_CHANGE}
    changed = differences({name: saved.get(name) for name in fixed}, fixed)
    if changed:
        raise UserError(f"{out_dir}/ckpt.pt was trained with another model or other settings "
                        f"({changed}): these cannot change when a run is resumed")
    return {**saved, "data": find_data(checkpoint), **given}


def check_same_data(checkpoint, data, new_data):
    """
    Refuse to resume on other tokens than the run began with. new_data: the user named the data,
    so other tokens are meant.
    """
    check_vocabulary(checkpoint, data.meta, data.path)
    changed = differences(identity(checkpoint["meta"]), identity(data.meta))
    if changed and not new_data:
        raise UserError(f"{data.path} is not the data that the run began with ({changed}): "
                        f"give --data={data.path} to go on with it all the same")


def claim(cfg):
    """
    Make out_dir ready for a run from scratch. A run that is there already is refused;
    with cfg.overwrite its checkpoint and log are removed.
    """
    names = ("ckpt.pt", "log.jsonl", "config.json")
    found = [n for n in names if os.path.exists(os.path.join(cfg.out_dir, n))]
    if found and not cfg.overwrite:
        raise UserError(f"{cfg.out_dir} holds a run already ({found[0]}): "
                        "--init_from=resume continues it, another --out_dir keeps it, "
                        "--overwrite loses it")
    for name in found:
        os.remove(os.path.join(cfg.out_dir, name))


# --------------------------------------------------------------------------------------------------
# The log

def open_log(path, step):
    """
    Cut the JSONL log behind its records up to `step`, since the steps after the checkpoint are
    done again. The file is cut in place: a crash at any moment leaves all the records that count.
    Returns the file, open for appending, and whether it holds the evaluation of that step.
    """
    end, evaluated = 0, False
    for record, offset in read_log(path):
        if record["step"] <= step:
            end = offset
            evaluated = evaluated or (record["step"] == step and record.get("kind") == "eval")
    if os.path.exists(path):
        os.truncate(path, end)
    return open(path, "a", encoding="utf-8"), evaluated


def git_commit():
    """The commit of this project's folder, or None."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        done = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"],
                              capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# --------------------------------------------------------------------------------------------------
# The run

def learning_rate(cfg, step):
    """Linear warm-up, then cosine from learning_rate to min_lr at max_iters."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / cfg.warmup_iters
    done = (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    return cfg.min_lr + (0.5 * (1 + math.cos(math.pi * min(done, 1)))
                         * (cfg.learning_rate - cfg.min_lr))


def orthogonal(x):
    """
    Nearly the orthogonal matrix nearest to x: the singular values of x become about 1.
    Five steps of a quintic Newton-Schulz iteration, coefficients of Jordan et al. (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x if x.size(0) <= x.size(1) else x.T
    y = wide.bfloat16() if x.is_cuda else wide
    y = y / y.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.T
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.to(x.dtype) if wide is x else y.T.to(x.dtype)


class Muon(torch.optim.Optimizer):
    """
    Muon (Jordan et al. 2024) for matrices. The update is Nesterov's momentum made orthogonal, and
    scaled to the size of AdamW's update (arXiv 2502.16982, "match_rms_adamw").
    It computes what torch.optim.Muon computes, but in float32 on a CPU. Torch's uses bfloat16
    everywhere, and a CPU without bfloat16 instructions takes 18 times as long for it (LOG.md).
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr = group["lr"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(momentum, group["momentum"]))
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))


def make_optimizers(model, cfg):
    """[AdamW] for all of the model's groups, or with cfg.muon [AdamW, Muon for the matrices]."""
    groups = {g["name"]: g for g in model.param_groups(cfg.weight_decay, cfg.index_lr_mult)}
    by_muon = [Muon([groups.pop("matrix")], cfg.learning_rate)] if cfg.muon else []
    adamw = torch.optim.AdamW(groups.values(), lr=cfg.learning_rate,
                              betas=(cfg.beta1, cfg.beta2), fused=True)
    return [adamw] + by_muon


def load_optimizers(optimizers, states, path):
    """
    Load the saved moments of the gradients.
    Rates, betas and decay are those of now, not the saved ones.
    """
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            now = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, values in zip(optimizer.param_groups, now, strict=True):
                group.update(values)
    except Exception as e:  # a damaged state can raise any type
        raise UserError(f"{path} holds no state for these optimizers: {type(e).__name__}") from None


def check_compiler(cfg):
    """
    torch.compile needs a C++ compiler: say so before the first step, not in a traceback at it.
    """
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if cfg.compile and not any(shutil.which(name) for name in names if name):
        raise UserError("compile needs a C++ compiler (g++): "
                        "install one, or train without --compile")


def train(cfg, new_data=False):
    """
    Run the training that cfg describes.
    Returns the last evaluation's metrics, with tokens and tokens_per_second.
    new_data: a resumed run may go on with other tokens than it began with. Raises UserError.
    """
    world = environment("WORLD_SIZE", 1)
    rank = environment("RANK", 0)
    device = use_device(cfg.device)
    if world > 1:
        try:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        except (ValueError, RuntimeError) as e:
            raise UserError(f"WORLD_SIZE is {world}, but the ranks cannot meet "
                            f"({str(e).splitlines()[0]}): start them by torchrun") from None
        if device == "cuda":
            device = f"cuda:{environment('LOCAL_RANK', 0)}"
            torch.cuda.set_device(device)
    try:
        return Run(cfg, device, rank, world, new_data).train()
    except UserError:
        if rank:  # rank 0 prints the message
            raise SystemExit(1) from None
        raise
    finally:
        if world > 1:
            dist.destroy_process_group()


class Run:
    """
    One training run on one rank.
    train() is its loop; everything before the loop is set up here.
    """

    def __init__(self, cfg, device, rank, world, new_data):
        self.cfg = cfg
        self.device = device
        self.rank = rank
        self.world = world
        # 1. what can be refused is refused before anything is written
        if cfg.grad_accum % world:
            raise UserError(f"grad_accum {cfg.grad_accum} (micro-batches per step over all ranks) "
                            f"is not a multiple of the {world} ranks")
        check_backend(cfg.backend, device)
        check_compiler(cfg)
        # 2. data
        self.data = data = Data(cfg.data)
        if cfg.vocab_size not in (0, data.vocab_size):
            raise UserError(f"vocab_size {cfg.vocab_size} disagrees with "
                            f"the {data.vocab_size} of {cfg.data}")
        self.batches = {}
        for split, ids in (("train", data.train), ("val", data.val)):
            self.batches[split] = Batches(ids, cfg.block_size, cfg.batch_size, data.separator,
                                          cfg.seed, cfg.doc_mask, data.vocab_size)
        # 3. model and optimizers
        torch.manual_seed(cfg.seed)
        self.autocast = precision(device, cfg.dtype)
        self.raw = GSA(cfg.model_config(data.vocab_size), cfg.backend)
        if cfg.retrofit_from and cfg.init_from == "scratch":
            dense = load_retrofit(self.raw, cfg.retrofit_from)
            check_vocabulary(dense, data.meta, cfg.data)
        self.raw.to(device)
        self.optimizers = make_optimizers(self.raw, cfg)
        # 4. the checkpoint of a resumed run
        self.step = 0
        if cfg.init_from == "resume":
            path = os.path.join(cfg.out_dir, "ckpt.pt")
            checkpoint = load_checkpoint(cfg.out_dir, device)
            check_same_data(checkpoint, data, new_data)
            if changed := differences(checkpoint["model_config"], asdict(self.raw.config)):
                raise UserError(f"{path} does not fit its own settings ({changed})")
            load_weights(self.raw, checkpoint["model"], path)
            load_optimizers(self.optimizers, checkpoint["optimizer"], path)
            self.step = checkpoint["step"]
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        # 5. the model that train() calls: compiled and distributed, if asked for
        if cfg.compile:
            # Long union lists are cut to a length that is read from the GPU (kernels.LIST_BYTES)
            torch._dynamo.config.capture_scalar_outputs = True
        self.model = torch.compile(self.raw) if cfg.compile else self.raw
        if world > 1:
            ids = [device] if device.startswith("cuda") else None
            self.model = DistributedDataParallel(self.model, device_ids=ids,
                                                 broadcast_buffers=False)
        self.step_tokens = cfg.batch_size * cfg.block_size * cfg.grad_accum
        self.local_accum = cfg.grad_accum // world
        self.log = None
        self.saved = (f"{cfg.out_dir}/ckpt.pt is that of step {self.step}" if self.step
                      else "no checkpoint was written")

    def train(self):
        """The loop: save and evaluate every eval_interval steps and at the end, and take a step."""
        cfg, resumed = self.cfg, self.cfg.init_from == "resume"
        with contextlib.ExitStack() as closing:
            self.claim_out_dir(closing)
            self.greet()
            evaluated = self.open_log()
            metrics = {}
            self.tokens, self.seconds = 0, 0.0
            # interval: tokens and seconds since the last training line
            self.began, self.interval = time.time(), [0, 0.0]
            first = self.step
            self.model.train()
            while True:
                done = self.step >= cfg.max_iters
                if done or (self.step and self.step % cfg.eval_interval == 0):
                    # the interrupted run has saved this step, and perhaps evaluated it
                    again = resumed and self.step == first
                    if not again:
                        self.save()
                    recorded = again and evaluated
                    if done or not recorded:
                        metrics = self.evaluate(record=not recorded)
                if done:
                    break
                self.optimize()
            if self.log:
                self.log.close()
        speed = self.tokens / self.seconds if self.seconds else 0.0
        return {**metrics, "tokens": self.tokens, "tokens_per_second": speed}

    def claim_out_dir(self, closing):
        """Rank 0 claims and locks out_dir, until `closing` closes. Refused, all ranks stop."""
        refusal = None
        if self.rank == 0:
            try:
                closing.enter_context(only_one(self.cfg.out_dir, "train.py"))
                if self.cfg.init_from != "resume":
                    claim(self.cfg)
            except UserError as e:
                refusal = e
        if self.from_rank_0(refusal is not None):
            raise refusal or UserError("rank 0 refuses")

    def from_rank_0(self, flag):
        """The bool that rank 0 passes, on every rank."""
        if self.world == 1:
            return flag
        x = torch.tensor(int(flag), device=self.device)
        dist.broadcast(x, 0)
        return bool(x)

    # ---- one step

    def optimize(self):
        """
        One optimizer step: grad_accum micro-batches over all ranks, clipping, the update, V̄, and
        perhaps a line.
        """
        cfg, world, start = self.cfg, self.world, time.time()
        warmup = self.in_warmup()
        # 1. learning rates
        lr = learning_rate(cfg, self.step)
        for group in self.groups:
            # a retrofit trains the indexer alone in warm-up
            frozen = warmup and cfg.retrofit_from and group["name"] != "indexer"
            group["lr"] = 0.0 if frozen else lr * group["lr_mult"]
        # 2. gradients
        length = cfg.short_block if self.step < cfg.short_iters else cfg.block_size
        logged = (self.step + 1) % cfg.log_interval == 0 or self.step == 0
        sums = torch.zeros(2, device=self.device)  # loss, index loss
        for micro in range(self.local_accum):
            last = micro == self.local_accum - 1
            m = self.step * cfg.grad_accum + micro * world + self.rank
            idx, targets, doc = self.batches["train"].train(m, self.device, length)
            if world > 1:
                self.model.require_backward_grad_sync = last
            with self.autocast:
                out = self.model(idx, targets, doc, warmup=warmup, stats=logged and last)
            index_loss = out.index_loss if cfg.sparse else torch.zeros_like(out.loss)
            ((out.loss + cfg.index_loss_weight * index_loss) / self.local_accum).backward()
            sums += torch.stack((out.loss.detach(), index_loss.detach())) / self.local_accum
        norms = self.clip()
        self.stop_unless_finite(torch.cat((sums, norms)))
        # 3. update
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.raw.update_var_avg()
        self.step += 1
        # 4. report
        if logged:
            values = dict(zip(("loss", "index_loss"), sums))
            if cfg.sparse:
                values |= {k: out.stats[k].float().mean() for k in ("recall", "k_t")}
            values = self.mean_over_ranks(values)
        self.tokens += self.step_tokens
        self.seconds += time.time() - start
        self.interval[0] += self.step_tokens
        self.interval[1] += time.time() - start
        if logged:
            self.report(values, lr, warmup, length)

    def clip(self):
        """
        Clip the gradient of the indexer and that of the rest of the model, each by its own
        limit, so that neither loss rescales the other. Returns the norms before that, (1 or 2,).
        """
        cfg, norms = self.cfg, []
        for indexer, limit in ((True, cfg.index_grad_clip), (False, cfg.grad_clip)):
            params = [p for g in self.groups if (g["name"] == "indexer") == indexer
                      for p in g["params"]]
            if params:
                norms.append(torch.nn.utils.clip_grad_norm_(params, limit or math.inf))
        return torch.stack(norms)

    def stop_unless_finite(self, numbers):
        """
        Stop on all ranks alike, before the update, where a loss or gradient is NaN or infinite on
        any.
        """
        finite = torch.isfinite(numbers).all().int()
        if self.world > 1:
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        if not finite:
            raise UserError(f"the loss or a gradient is not finite at step {self.step + 1} "
                            f"(loss {numbers[0]:.4g}): the run stops, {self.saved}. "
                            "A lower learning_rate or a longer warmup_iters may help")

    def in_warmup(self):
        """Is this a step of phase 1: dense attention, which the indexer learns to predict?"""
        return self.cfg.sparse and self.step < self.cfg.index_warmup_iters

    def mean_over_ranks(self, values):
        """{name: 0-dim tensor} -> {name: float}, the mean over the ranks."""
        total = torch.stack([x.detach().double() for x in values.values()])
        if self.world > 1:
            dist.all_reduce(total)
        return dict(zip(values, (total / self.world).tolist()))

    # ---- evaluation, checkpoint, reports

    @torch.no_grad()
    def evaluate(self, record):
        """
        Mean loss, index loss and stats over eval_iters micro-batches of the validation data,
        shared out among the ranks: the same batches whatever their number.
        """
        cfg, rows, weights = self.cfg, [], []
        self.model.eval()
        for m in range(self.rank, max(cfg.eval_iters, self.world), self.world):
            idx, targets, doc = self.batches["val"].evaluation(m % cfg.eval_iters, cfg.eval_iters,
                                                               self.device)
            with self.autocast:
                out = self.model(idx, targets, doc, warmup=self.in_warmup(), stats=True)
            values = {"loss": out.loss, "index_loss": out.index_loss}
            values |= {name: x.float().mean() for name, x in out.stats.items()}
            rows.append({name: x.double() for name, x in values.items() if x is not None})
            # weight 0: there are more ranks than batches, and this rank only learns the names
            weights.append(float(m < cfg.eval_iters))
        self.model.train()
        sums = {name: sum(w * row[name] for w, row in zip(weights, rows)) for name in rows[0]}
        sums["batches"] = torch.tensor(sum(weights), device=self.device)
        means = self.mean_over_ranks(sums)
        batches = means.pop("batches")
        metrics = {name: x / batches for name, x in means.items()}
        meta = self.data.meta["val"]
        metrics["bits_per_byte"] = metrics["loss"] / math.log(2) / (meta["bytes"] / meta["tokens"])
        self.say(f"step {self.step}: " + ", ".join(f"val {k} {v:.4g}" for k, v in metrics.items()))
        if record:
            self.record("eval", **metrics)
        return metrics

    def save(self):
        """
        Write the checkpoint, unless a weight is not finite: then the old one stays and the run
        stops.
        """
        if name := not_finite(self.raw):
            raise UserError(f"{name} is not finite at step {self.step}: "
                            f"the run stops, {self.saved}")
        if self.rank == 0:
            save_checkpoint(self.cfg.out_dir, model=self.raw.state_dict(), step=self.step,
                            optimizer=[o.state_dict() for o in self.optimizers],
                            config=asdict(self.cfg),
                            model_config=asdict(self.raw.config), meta=self.data.meta,
                            data_path=os.path.abspath(self.cfg.data))
        self.saved = f"{self.cfg.out_dir}/ckpt.pt is that of step {self.step}"

    def greet(self):
        """The first line: the model's size, the tokens, the machine."""
        cfg, n = self.cfg, sum(p.numel() for p in self.raw.parameters())
        available = self.batches["train"].n * cfg.block_size
        with self.autocast:
            kind = "bfloat16" if torch.is_autocast_enabled(self.device.split(":")[0]) else "float32"
        self.say(f"{n / 1e6:.2f}M parameters, "
                 f"{cfg.max_iters * self.step_tokens:,} tokens of {available:,} in {cfg.data}, "
                 f"{self.world} × {self.device}, {kind}")

    def open_log(self):
        """
        Write config.json and open log.jsonl.
        Returns whether the log holds the evaluation of this step.
        """
        evaluated = False
        if self.rank == 0:
            with replacing(os.path.join(self.cfg.out_dir, "config.json")) as f:
                f.write(to_json({**asdict(self.cfg), "git_commit": git_commit()}, indent=1))
            self.log, evaluated = open_log(os.path.join(self.cfg.out_dir, "log.jsonl"), self.step)
        return self.from_rank_0(evaluated)

    def record(self, kind, **values):
        """A line of log.jsonl."""
        if self.log:
            self.log.write(to_json({"kind": kind, "step": self.step, **values}) + "\n")
            self.log.flush()

    def say(self, line):
        if self.rank == 0:
            configurator.say(line)

    def report(self, values, lr, warmup, length):
        """
        Print and record one training line; values: loss, index_loss and, of a sparse model, recall
        and k_t.
        """
        speed = self.interval[0] / self.interval[1]
        self.interval = [0, 0.0]
        line = dict(loss=values["loss"], lr=lr, tokens_per_second=speed)
        if self.cfg.sparse:
            line["index_loss"] = values["index_loss"]
            line["phase"] = "warm-up" if warmup else "sparse"
            line |= {name: values[name] for name in ("recall", "k_t")}
        if peak := peak_flops(self.device):
            line["mfu"] = (speed * self.raw.flops_per_token(length, warmup=warmup)
                           / (peak * self.world))
        shown = (f"{k} {v if isinstance(v, str) else format(v, '.4g')}" for k, v in line.items())
        self.say(f"step {self.step}: " + ", ".join(shown))
        self.record("train", **line, seconds=time.time() - self.began)


def peak_flops(device):
    """The GPU's bf16 peak in FLOP/s, None for a CPU or a GPU that is not in the table."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def main(argv):
    train(settings(argv), new_data="data" in flags(argv))


if __name__ == "__main__":
    run(main)
