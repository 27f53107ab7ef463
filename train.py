"""
Train a GSA model, on a laptop or by torchrun on many GPUs.

    python train.py config/gsa_demo.py
    python train.py config/gsa_demo.py --attention=dense --out_dir=out/dense
    torchrun --nproc_per_node=8 train.py config/gsa_small.py
    python train.py --init_from=resume --out_dir=out

Training has two phases (README, "Training the indexer"). For index_warmup_iters steps attention is
dense, and the indexer learns to predict it. Then attention runs over the selected keys only.
Micro-batch m of the run is a pure function of (seed, m), so a resumed run continues exactly where
the interrupted one stopped. A loss or gradient that is not finite stops the run and never reaches
the checkpoint.
"""
import contextlib
import math
import os
from dataclasses import asdict, dataclass, fields

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checks
from attention import document_starts
from checkpoint import (check_backend, check_compiler, check_dtype, check_same_data,
                        check_vocabulary, find_data, load_checkpoint, load_retrofit, load_weights,
                        not_finite, open_run, precision, save_checkpoint, use_device)
from configurator import UserError, check_ranges, environment, flags, parse, run
from dashboards import check_extras
from data import Batches, Data, Prefetch, differences
from measure import flops_per_token
from model import GSA, GSAConfig
from optim import load_optimizers, make_optimizers
from report import Reporter


@dataclass
class TrainConfig(GSAConfig):  # a comment line behind a blank line is a heading in --help

    # data and output
    data: str = "data/slimpajama"  # a folder written by prepare.py
    out_dir: str = "out"  # ckpt.pt, log.jsonl, config.json
    init_from: str = "scratch"  # scratch | resume (out_dir's checkpoint)
    overwrite: bool = False  # a run from scratch deletes the run that out_dir holds
    # folder of a dense checkpoint to start from. The model adds gates and an indexer; warm-up
    # trains the indexer alone
    retrofit_from: str = ""

    # model
    attention: str = "gsa"  # arm: dense | gated | sparse | gsa; sets switches that are not given
    vocab_size: int = 0  # 0 = the data's
    doc_mask: bool = True  # attention stops at document boundaries

    # optimization
    muon: bool = False  # Muon at AdamW's step size for the layers' matrices; else AdamW
    batch_size: int = 8  # sequences per micro-batch and rank
    grad_accum: int = 1  # micro-batches per step over all ranks together
    max_iters: int = 1000
    learning_rate: float = 6e-4
    min_lr: float = 6e-5  # at max_iters
    warmup_iters: int = 100  # steps in which the learning rate rises linearly
    short_iters: int = 0  # first steps, whose windows are cut to pieces of short_block tokens
    short_block: int = 128
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # 0 = off

    # indexer
    index_warmup_iters: int = 200  # phase 1, dense attention
    index_lr_mult: float = 10.0  # its learning rate, as a multiple
    index_grad_clip: float = 1.0  # 0 = off
    index_loss_weight: float = 1.0

    # reporting
    log_interval: int = 10
    eval_interval: int = 250  # steps; the checkpoint is written at the same steps, and at the end
    eval_iters: int = 20  # micro-batches of val.bin
    plot: bool = True  # draw out_dir/curves.png at each evaluation, if matplotlib is installed
    tensorboard: bool = False  # into out_dir/tensorboard
    wandb: bool = False
    wandb_project: str = "nanogsa"

    # system
    device: str = ""  # default: cuda if there is one, else cpu
    backend: str = "auto"  # path of the attention: auto | torch | triton | eager
    dtype: str = ""  # float32 | bfloat16; default: bfloat16 on cuda
    compile: bool = False
    seed: int = 1337

    def __post_init__(self):
        self.model_config(self.vocab_size or 256)
        checks.resolve_backend(self.backend)
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
        values = {f.name: getattr(self, f.name) for f in fields(GSAConfig)}
        return GSAConfig(**values | {"vocab_size": vocab_size})


# --------------------------------------------------------------------------------------------------
# Settings of a new and of a resumed run

# The settings that may change when a run is resumed. The others decide what the checkpoint means.
MAY_CHANGE = set(
    "out_dir init_from overwrite data max_iters learning_rate min_lr warmup_iters weight_decay "
    "beta1 beta2 grad_clip index_warmup_iters index_lr_mult index_grad_clip index_loss_weight "
    "log_interval eval_interval eval_iters plot tensorboard wandb wandb_project device backend "
    "dtype compile".split())


def settings(argv, checkpoint=None):
    """
    TrainConfig from arguments: the arm's switches, replaced by config files and flags.
    checkpoint: that of a run to resume; its settings come first.
    """
    given = parse(TrainConfig, argv)
    if checkpoint:
        given = resumed_settings(checkpoint, given)
    try:
        return TrainConfig.arm(given.get("attention", TrainConfig.attention), **given)
    except ValueError as e:
        raise UserError(str(e)) from None


def resumed_settings(checkpoint, given):
    """
    The settings saved in a checkpoint, replaced by those given now.
    Raises UserError if a setting is given that must not change.
    """
    saved = checkpoint["config"]
    path = f"{given.get('out_dir', TrainConfig.out_dir)}/ckpt.pt"
    kinds = {f.name: f.type for f in fields(TrainConfig)}
    for name, value in saved.items():
        if type(value) is not kinds.get(name):
            raise UserError(f"{path} was written by another version: it has a setting {name!r}")
    fixed = {name: value for name, value in given.items() if name not in MAY_CHANGE}
    changed = differences({name: saved.get(name) for name in fixed}, fixed)
    if changed:
        raise UserError(f"{path} was trained with another model or other settings "
                        f"({changed}): these cannot change when a run is resumed")
    return {**saved, "data": find_data(checkpoint), **given}


# --------------------------------------------------------------------------------------------------
# The run

def learning_rate(cfg, step):
    """Linear warm-up, then cosine from learning_rate to min_lr at max_iters."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / cfg.warmup_iters
    done = (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1)))  # from 1 to 0
    return cfg.min_lr + cosine * (cfg.learning_rate - cfg.min_lr)


class Run:
    """One training run on one rank. The constructor sets it up; train() is its loop."""

    def __init__(self, cfg, device, rank=0, world=1, checkpoint=None, new_data=False):
        self.cfg = cfg
        self.device = device
        self.rank = rank
        self.world = world
        # 1. what can be refused is refused before anything is written
        if cfg.grad_accum % world:
            raise UserError(f"grad_accum {cfg.grad_accum} (micro-batches per step over all ranks) "
                            f"is not a multiple of the {world} ranks")
        check_backend(cfg.backend, device)
        if cfg.compile:
            check_compiler()
        check_extras(cfg)
        # 2. data
        data = Data(cfg.data)
        if cfg.vocab_size not in (0, data.vocab_size):
            raise UserError(f"vocab_size {cfg.vocab_size} disagrees with "
                            f"the {data.vocab_size} of {cfg.data}")
        self.meta = data.meta
        self.batches = {}
        for split, ids in (("train", data.train), ("val", data.val)):
            self.batches[split] = Batches(ids, cfg.block_size, cfg.batch_size, cfg.seed,
                                          data.vocab_size)
        # 3. model and optimizers
        torch.manual_seed(cfg.seed)
        self.autocast = precision(device, cfg.dtype)
        self.raw = GSA(cfg.model_config(data.vocab_size), cfg.backend)
        if cfg.retrofit_from and not checkpoint:
            dense = load_retrofit(self.raw, cfg.retrofit_from)
            check_vocabulary(dense, data.meta, cfg.data)
        self.raw.to(device)
        self.optimizers = make_optimizers(self.raw, cfg)
        # 4. the checkpoint of a resumed run
        self.step = 0
        if checkpoint:
            path = os.path.join(cfg.out_dir, "ckpt.pt")
            check_vocabulary(checkpoint, data.meta, cfg.data)
            if not new_data:
                check_same_data(checkpoint, data.meta, cfg.data)
            changed = differences(checkpoint["model_config"], asdict(self.raw.config))
            if changed:
                raise UserError(f"{path} does not fit its own settings ({changed})")
            load_weights(self.raw, checkpoint["model"], path)
            load_optimizers(self.optimizers, checkpoint["optimizer"], path)
            self.step = checkpoint["step"]
        self.saved_step = self.step  # that of ckpt.pt, 0 = there is none
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        # 5. the model that the loop calls: compiled and distributed, if asked for
        self.model = self.raw
        if cfg.compile:
            # the Triton path may read the length of a list of keys from the GPU
            torch._dynamo.config.capture_scalar_outputs = True
            self.model = torch.compile(self.raw)
        if world > 1:
            ids = [device] if device.startswith("cuda") else None
            # update_var_avg averages the one buffer that training changes
            self.model = DistributedDataParallel(self.model, device_ids=ids,
                                                 broadcast_buffers=False)
        # 6. reports, and where micro-batches come from
        self.reporter = Reporter(cfg, device, world, log=None, step=0)  # silent; see open()
        self.loader = self.batches["train"]

    def train(self):
        """
        The loop. Every eval_interval steps and at the end, write the checkpoint and evaluate.
        Returns the metrics of the last evaluation.
        """
        cfg = self.cfg
        with contextlib.ExitStack() as closing:
            evaluated_step = self.open(closing)
            self.greet()
            if self.device.startswith("cuda"):
                self.loader = closing.enter_context(Prefetch(self.loader, self.world))
            self.model.train()
            while True:
                done = self.step >= cfg.max_iters
                if done or (self.step and self.step % cfg.eval_interval == 0):
                    recorded = self.step == evaluated_step  # before this run was resumed
                    with self.reporter.pause():
                        if self.step != self.saved_step:
                            self.save()
                        if done or not recorded:
                            metrics = self.evaluate(record=not recorded)
                if done:
                    return metrics
                self.optimize()

    def open(self, closing):
        """
        Rank 0 locks out_dir and opens the reports until `closing` closes. Refused, all ranks stop.
        Returns the resumed step if the log holds its evaluation, else None.
        """
        refusal = None
        evaluated = False
        log = None
        try:
            if self.rank == 0:
                log, evaluated = closing.enter_context(open_run(
                    self.cfg.out_dir, asdict(self.cfg), self.step, self.cfg.overwrite))
            self.reporter = closing.enter_context(Reporter(
                self.cfg, self.device, self.world, log, self.step))
        except UserError as e:
            refusal = e
        if self.from_rank_0(refusal is not None):
            raise refusal or UserError("rank 0 refuses")
        return self.step if self.from_rank_0(evaluated) else None

    def greet(self):
        """The first line: the model's size, the tokens, the machine."""
        with self.autocast:
            kind = "bfloat16" if torch.is_autocast_enabled(self.device.split(":")[0]) else "float32"
        self.reporter.greet(sum(p.numel() for p in self.raw.parameters()),
                            self.batches["train"].n * self.cfg.block_size, kind)

    # ---- one step

    def doc_start(self, idx):
        """Where the document of each token starts, (B, T); None without doc_mask."""
        return document_starts(idx, self.meta["separator"]) if self.cfg.doc_mask else None

    def in_warmup(self):
        """Is this a step of phase 1: dense attention, which the indexer learns to predict?"""
        return self.cfg.sparse and self.step < self.cfg.index_warmup_iters

    def optimize(self):
        """
        One optimizer step: grad_accum micro-batches over all ranks, clipping, update, V̄, and at
        every log_interval a report.
        """
        cfg = self.cfg
        warmup = self.in_warmup()
        length = cfg.short_block if self.step < cfg.short_iters else cfg.block_size
        logged = (self.step + 1) % cfg.log_interval == 0 or self.step == 0
        # 1. learning rates
        lr = learning_rate(cfg, self.step)
        for group in self.groups:
            # a retrofit trains the indexer alone in warm-up
            frozen = warmup and cfg.retrofit_from and group["name"] != "indexer"
            group["lr"] = 0.0 if frozen else lr * group["lr_mult"]
        # 2. gradients
        micro_batches = cfg.grad_accum // self.world
        losses = torch.zeros(2, device=self.device)  # loss, index loss
        for micro in range(micro_batches):
            last = micro == micro_batches - 1
            m = self.step * cfg.grad_accum + micro * self.world + self.rank
            idx, targets = self.loader.train(m, self.device, length)
            if self.world > 1:
                self.model.require_backward_grad_sync = last
            with self.autocast:
                out = self.model(idx, targets, self.doc_start(idx), warmup=warmup,
                                 stats=logged and last)
            loss = out.loss + cfg.index_loss_weight * out.index_loss
            (loss / micro_batches).backward()
            losses += torch.stack((out.loss.detach(), out.index_loss.detach())) / micro_batches
        norms = self.clip()
        self.stop_unless_finite(torch.cat((losses, norms)))
        # 3. update
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.raw.update_var_avg()
        self.step += 1
        # 4. report
        if logged:
            values = {"loss": losses[0], "index_loss": losses[1]}
            if cfg.sparse:
                values["recall"] = out.stats["recall"].float().mean()
                values["k_t"] = out.stats["k_t"].float().mean()
            values = self.mean_over_ranks(values)
            values["grad_norm"] = norms[0].item()  # of all ranks together, like the gradient
            if cfg.sparse:
                values["phase"] = "warm-up" if warmup else "sparse"
            else:
                del values["index_loss"]
            self.reporter.step(self.step, lr=lr, **values,
                               flops_per_token=flops_per_token(self.raw, length, warmup=warmup))

    def clip(self):
        """
        Clip the gradient of the indexer and that of the rest of the model, each by its own limit,
        so that neither loss rescales the other. Returns the norms before clipping, (1 or 2,).
        """
        index = [p for g in self.groups for p in g["params"] if g["name"] == "indexer"]
        others = [p for g in self.groups for p in g["params"] if g["name"] != "indexer"]
        clip = torch.nn.utils.clip_grad_norm_
        norms = [clip(others, self.cfg.grad_clip or math.inf)]
        if index:
            norms.append(clip(index, self.cfg.index_grad_clip or math.inf))
        return torch.stack(norms)

    def stop_unless_finite(self, numbers):
        """
        Stop before the update, on all ranks, if a loss or gradient is NaN or infinite on any rank.
        numbers: the loss first.
        """
        finite = torch.isfinite(numbers).all().int()
        if self.world > 1:
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        if not finite:
            raise UserError(f"the loss or a gradient is not finite at step {self.step + 1} "
                            f"(loss {numbers[0]:.4g}): the run stops, {self.what_is_saved()}. "
                            "A lower learning_rate or a longer warmup_iters may help")

    # ---- evaluation and checkpoint

    @torch.no_grad()
    def evaluate(self, record):
        """
        Mean loss, index loss and stats over eval_iters micro-batches of the validation data. The
        ranks share out the micro-batches, which are the same for any number of ranks.
        """
        cfg = self.cfg
        self.model.eval()
        sums = {"batches": torch.zeros((), device=self.device)}
        # every rank computes at least one, to know the names of the values
        for m in range(self.rank, max(cfg.eval_iters, self.world), self.world):
            counts = m < cfg.eval_iters  # False: there are more ranks than micro-batches
            idx, targets = self.batches["val"].evaluation(m % cfg.eval_iters, cfg.eval_iters,
                                                          self.device)
            with self.autocast:
                out = self.model(idx, targets, self.doc_start(idx), warmup=self.in_warmup(),
                                 stats=True)
            values = {"loss": out.loss}
            if cfg.sparse:
                values["index_loss"] = out.index_loss
            for name, x in out.stats.items():  # (n_layer,)
                values[name] = x
                values |= {f"{name}/{layer}": x[layer] for layer in range(len(x))}
            for name, x in values.items():
                sums[name] = sums.get(name, 0) + counts * x.float().mean().double()
            sums["batches"] += counts
        self.model.train()
        means = self.mean_over_ranks(sums)
        batches = means.pop("batches")
        metrics = {name: x / batches for name, x in means.items()}
        meta = self.meta["val"]
        metrics["bits_per_byte"] = metrics["loss"] / math.log(2) / (meta["bytes"] / meta["tokens"])
        self.reporter.evaluation(self.step, metrics, record)
        return metrics

    def save(self):
        """
        Write the checkpoint. If a weight is not finite, the run stops and the old file stays.
        """
        name = not_finite(self.raw)
        if name:
            raise UserError(f"{name} is not finite at step {self.step}: "
                            f"the run stops, {self.what_is_saved()}")
        if self.rank == 0:
            save_checkpoint(self.cfg.out_dir, model=self.raw.state_dict(), step=self.step,
                            optimizer=[o.state_dict() for o in self.optimizers],
                            config=asdict(self.cfg), model_config=asdict(self.raw.config),
                            meta=self.meta, data_path=os.path.abspath(self.cfg.data))
        self.saved_step = self.step

    def what_is_saved(self):
        if not self.saved_step:
            return "no checkpoint was written"
        return f"{self.cfg.out_dir}/ckpt.pt is that of step {self.saved_step}"

    # ---- several ranks

    def from_rank_0(self, flag):
        """The bool that rank 0 passes, on every rank."""
        if self.world == 1:
            return flag
        x = torch.tensor(int(flag), device=self.device)
        dist.broadcast(x, 0)
        return bool(x)

    def mean_over_ranks(self, values):
        """{name: 0-dim tensor} -> {name: float}, the mean over the ranks."""
        total = torch.stack([x.detach().double() for x in values.values()])
        if self.world > 1:
            dist.all_reduce(total)
        return dict(zip(values, (total / self.world).tolist()))


def train(cfg, checkpoint=None, new_data=False):
    """
    Run the training that cfg describes; with a checkpoint, go on from it.
    new_data: it may go on with other tokens than it began with.
    Returns the metrics of the last evaluation. Raises UserError.
    """
    world = environment("WORLD_SIZE", 1)
    rank = environment("RANK", 0) if world > 1 else 0
    local_rank = environment("LOCAL_RANK", 0) if world > 1 else None
    device = use_device(cfg.device, local_rank)
    if world > 1:
        try:
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        except (ValueError, RuntimeError) as e:
            raise UserError(f"WORLD_SIZE is {world}, but the ranks cannot meet "
                            f"({str(e).splitlines()[0]}): start them by torchrun") from None
    try:
        return Run(cfg, device, rank, world, checkpoint, new_data).train()
    except UserError:
        if rank:  # rank 0 prints the message
            raise SystemExit(1) from None
        raise
    finally:
        if world > 1:
            dist.destroy_process_group()


def main(argv):
    given = parse(TrainConfig, argv)
    checkpoint = None
    if given.get("init_from") == "resume":
        checkpoint = load_checkpoint(given.get("out_dir", TrainConfig.out_dir))
    # A config file always names its data; only a flag asks for other tokens
    train(settings(argv, checkpoint), checkpoint, new_data="data" in flags(argv))


if __name__ == "__main__":
    run(main)
