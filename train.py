"""
Train a GSA model, on a laptop or by torchrun on many GPUs.

    python train.py config/gsa_demo.py
    python train.py config/gsa_demo.py --attention=dense --out_dir=out/dense
    torchrun --nproc_per_node=8 train.py config/gsa_small.py --init_from=auto
    python train.py --init_from=resume --out_dir=out

Training has two phases (README, "Training the indexer"). For index_warmup_iters steps attention is
dense, and the indexer learns to predict it. Then attention runs over the selected keys only.
Micro-batch m of the run is a pure function of (seed, m), so a resumed run continues exactly where
the interrupted one stopped, whether it was killed, or stopped by Ctrl-C or a scheduler's SIGTERM.
A step whose loss or gradient is not finite is skipped.
"""
import contextlib
import math
import os
from dataclasses import asdict, dataclass, fields

import torch
from torch.nn.parallel import DistributedDataParallel

import checks
from attention import document_starts
from checkpoint import (check_same_data, check_vocabulary, find_checkpoint, load_checkpoint,
                        model_config, read_checkpoint, record_loss, save_checkpoint,
                        save_divided_checkpoint)
from configurator import UserError, check_ranges, flags, parse, run
from dashboards import check_extras
from data import Batches, Data, Prefetch, differences
from device import check_backend, check_compiler, check_dtype, precision
from measure import flops_per_token
from model import GSA, GSAConfig
from optim import load_optimizers, make_optimizers, optimizer_tensors
from outdir import open_log, prepare_folder, run_folder
from plan import dry_run
from ranks import Ranks, StopSignal
from report import Reporter
from sharding import average_undivided_gradients, clip, shard
from start import (check_start, load_start, open_gates_and_load, resumed_settings,
                   started_settings, where_to_begin)
from stability import Stability
from weights import load_weights, not_finite


@dataclass
class TrainConfig(GSAConfig):  # a comment line behind a blank line is a heading in --help

    # data and output
    data: str = "data/slimpajama"  # a folder written by prepare.py
    out_dir: str = "out"  # checkpoints, log.jsonl, config.json
    # scratch | resume (out_dir's checkpoint) | auto (resume, if there is a checkpoint)
    # | hf:PATH_OR_ID (a Hugging Face model) or another run's out_dir, whose weights it starts with
    # | auto:START (resume, else START).
    # If the weights are a dense model's and this one has an indexer, warm-up trains that alone
    init_from: str = "scratch"
    overwrite: bool = False  # a new run deletes the run that out_dir holds
    keep: int = 2  # checkpoints: the last so many stay, and the best

    # model
    attention: str = "gsa"  # arm: dense | gated | sparse | gsa; sets switches that are not given
    vocab_size: int = 0  # 0 = the data's; more are never output in training, but cost memory
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
    # so many steps in a row whose loss or gradient is not finite end the run; fewer are skipped
    max_skips: int = 10

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

    # scale
    # the backward pass computes each block again: less memory, a third more time
    activation_checkpointing: bool = False
    fsdp: bool = False  # divide the model among the ranks (FSDP2), where one GPU cannot hold it
    dry_run: bool = False  # print parameters, memory, FLOPs, hours and schedule; do not train
    gpus: int = 1  # of a dry run without torchrun: ranks to plan for
    gpu: str = ""  # of a dry run: H100, H200, B200, …; default: the local GPU, else H100
    assumed_mfu: float = 0.4  # of a dry run: share of the GPU's peak FLOP/s that training reaches

    def __post_init__(self):
        self.model_config(self.vocab_size or 256)
        checks.resolve_backend(self.backend)
        check_dtype(self.dtype)
        check_ranges(self, {
            (1, None): "batch_size grad_accum max_iters log_interval eval_interval eval_iters "
                       "short_block keep max_skips gpus",
            (0.001, 1): "assumed_mfu",
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

def settings(argv, checkpoint=None, start=None):
    """
    TrainConfig from arguments: the arm's switches, replaced by config files and flags.
    checkpoint: that of a run to resume; its settings come first.
    start: that of another run, whose weights a new run begins with; its model's shape comes first.
    """
    given = parse(TrainConfig, argv)
    if checkpoint:
        given = resumed_settings(TrainConfig, checkpoint, given)
    if start:
        given = started_settings(TrainConfig, start, given)
    try:
        return TrainConfig.arm(given.get("attention", TrainConfig.attention), **given)
    except ValueError as e:
        raise UserError(str(e)) from None


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

    def __init__(self, cfg, ranks, stop, checkpoint=None, start=None, new_data=False):
        """
        stop: a StopSignal. checkpoint: to go on from. start: the checkpoint of another run, to take
        the weights of. new_data: a resumed run may go on with other tokens than it began with.
        """
        self.cfg = cfg
        self.ranks = ranks
        self.stop = stop
        self.device = ranks.device
        # 1. what can be refused is refused before anything is written
        if cfg.grad_accum % ranks.world:
            raise UserError(f"grad_accum {cfg.grad_accum} (micro-batches per step over all ranks) "
                            f"is not a multiple of the {ranks.world} ranks")
        if cfg.fsdp and ranks.world == 1:
            raise UserError("fsdp divides the model among ranks: start several by torchrun")
        check_backend(cfg.backend, self.device)
        if cfg.compile:
            check_compiler()
        check_extras(cfg)
        # 2. data
        data = Data(cfg.data)
        if 0 < cfg.vocab_size < data.vocab_size:
            raise UserError(f"vocab_size {cfg.vocab_size} is less than "
                            f"the {data.vocab_size} of {cfg.data}")
        self.meta = data.meta
        self.batches = {}
        for split, ids in (("train", data.train), ("val", data.val)):
            self.batches[split] = Batches(ids, cfg.block_size, cfg.batch_size, cfg.seed,
                                          data.vocab_size)
        # 3. model
        torch.manual_seed(cfg.seed)
        self.autocast = precision(self.device, cfg.dtype)
        self.raw = GSA(cfg.model_config(cfg.vocab_size or data.vocab_size), cfg.backend)
        self.step = 0
        self.stability = Stability()
        self.retrofit = False  # were the gates and the indexer added to a dense model?
        if start:
            check_start(start, data.meta, cfg.data)
            self.retrofit = open_gates_and_load(self.raw, start["model"], start["path"])
        if checkpoint:
            check_vocabulary(checkpoint, data.meta, cfg.data)
            if not new_data:
                check_same_data(checkpoint, data.meta, cfg.data)
            changed = differences(asdict(model_config(checkpoint)), asdict(self.raw.config))
            if changed:
                raise UserError(f"{checkpoint['path']} does not fit its own settings ({changed})")
            load_weights(self.raw, checkpoint["model"], checkpoint["path"])
            old = checkpoint["config"]
            self.step = checkpoint["step"]
            self.stability = Stability(**checkpoint.get("stability", {}))
            # older versions had a setting instead
            self.retrofit = checkpoint.get("retrofit", bool(old.get("retrofit_from")))
        for block in self.raw.blocks:
            block.activation_checkpointing = cfg.activation_checkpointing
        if cfg.compile:
            # the Triton path may read the length of a list of keys from the GPU
            torch._dynamo.config.capture_scalar_outputs = True
        if cfg.fsdp:
            shard(self.raw, self.device, self.in_bf16(), cfg.compile)
        self.raw.to(self.device)
        self.saved_step = self.step  # that of the last checkpoint, 0 = there is none
        # 4. optimizers, and what the loop calls
        self.optimizers = []
        self.set_up()
        if checkpoint:
            load_optimizers(self.optimizers, self.raw, checkpoint["optimizer"],
                            checkpoint["path"], partly=self.retrofit)
        # 5. reports, and where micro-batches come from
        self.reporter = Reporter(cfg, self.device, ranks.world, log=None, step=0)  # see open()
        self.evaluated = 0  # the step of the last evaluation in the log
        self.pending = []  # (loss, index loss, skipped?, gradient norms) of steps not yet reported
        self.loader = self.batches["train"]

    def set_up(self):
        """
        Choose what is trained now, make its optimizers, and the compiled and distributed model.
        Called at the start, and again when a retrofit's warm-up ends; optimizers keep their state.
        """
        # 1. in the warm-up of a retrofit the indexer trains alone: the rest keeps its bits
        self.indexer_alone = self.retrofit and self.in_warmup()
        for name, p in self.raw.named_parameters():
            p.requires_grad_(not self.indexer_alone or ".indexer." in name)
        # 2. optimizers
        state = optimizer_tensors(self.optimizers, self.raw)
        self.optimizers = make_optimizers(self.raw, self.cfg)
        load_optimizers(self.optimizers, self.raw, state, "the warm-up", partly=True)
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        # 3. the model that the loop calls
        self.model = self.raw
        if self.cfg.compile and not self.cfg.fsdp:
            self.model = torch.compile(self.raw)
        if self.ranks.world > 1 and not self.cfg.fsdp:
            ids = [self.device] if self.device.startswith("cuda") else None
            # update_var_avg averages the one buffer that training changes
            self.model = DistributedDataParallel(self.model, device_ids=ids,
                                                 broadcast_buffers=False,
                                                 gradient_as_bucket_view=True)
        self.model.train()

    def train(self):
        """
        The loop. Every eval_interval steps and at the end, write the checkpoint and evaluate.
        Returns the metrics of the last evaluation, None if a signal has ended the run.
        """
        cfg = self.cfg
        with contextlib.ExitStack() as closing:
            # 1. the folder, the log, and the first line
            self.ranks.on_rank_0(self.open, closing)
            self.greet()
            if self.device.startswith("cuda"):
                self.loader = closing.enter_context(Prefetch(self.loader, self.ranks.world))
            # 2. the loop
            while True:
                stop = self.ranks.any(self.stop.received)
                done = self.step >= cfg.max_iters
                due = done or (self.step and self.step % cfg.eval_interval == 0)
                metrics = None
                if stop or due:
                    with self.reporter.pause():
                        if self.step != self.saved_step:
                            self.save()
                        if not stop:
                            metrics = self.evaluate()
                if stop:
                    self.reporter.say(f"stopped at step {self.step}, {self.what_is_saved()}")
                    return None
                if done and metrics:
                    return metrics
                # without metrics a signal has come, and the next round ends the run
                if metrics or not due:
                    self.optimize()

    def open(self, closing):
        """Rank 0 makes out_dir ready and opens the reports, until `closing` closes."""
        cfg = self.cfg
        restart = cfg.init_from.startswith("auto")
        prepare_folder(cfg.out_dir, asdict(cfg), self.step, cfg.overwrite, restart)
        log, self.evaluated = open_log(os.path.join(cfg.out_dir, "log.jsonl"), self.step)
        closing.callback(log.close)
        reporter = Reporter(cfg, self.device, self.ranks.world, log, self.step)
        self.reporter = closing.enter_context(reporter)

    def greet(self):
        """The first line: the model's size, the tokens, the machine."""
        kind = "bfloat16" if self.in_bf16() else "float32"
        self.reporter.greet(sum(p.numel() for p in self.raw.parameters()),
                            self.batches["train"].n * self.cfg.block_size, kind)

    def in_bf16(self):
        with self.autocast:
            return torch.is_autocast_enabled(self.device.split(":")[0])

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
        if self.indexer_alone and not warmup:
            self.set_up()
        # 1. learning rates
        lr = learning_rate(cfg, self.step)
        for group in self.groups:
            group["lr"] = lr * group["lr_mult"]
        # 2. gradients
        micro_batches = cfg.grad_accum // self.ranks.world
        losses = torch.zeros(2, device=self.device)  # loss, index loss
        for micro in range(micro_batches):
            last = micro == micro_batches - 1
            m = self.step * cfg.grad_accum + micro * self.ranks.world + self.ranks.rank
            idx, targets = self.loader.train(m, self.device, length)
            if self.ranks.world > 1 and not cfg.fsdp:
                self.model.require_backward_grad_sync = last
            with self.autocast:
                out = self.model(idx, targets, self.doc_start(idx), warmup=warmup,
                                 stats=logged and last)
            loss = out.loss + cfg.index_loss_weight * out.index_loss
            (loss / micro_batches).backward()
            losses += torch.stack((out.loss.detach(), out.index_loss.detach())) / micro_batches
        if cfg.fsdp:
            average_undivided_gradients(self.raw)
        norms = self.clip()
        # 3. update; on all ranks alike nothing changes if a number is not finite on one of them.
        # Everything stays on the device: the host does not wait for the answer
        finite = torch.isfinite(losses).all() & torch.isfinite(norms).all()
        skip = self.ranks.sum((~finite).float()).clamp(max=1)  # 0 or 1
        for optimizer in self.optimizers:
            optimizer.found_inf = skip
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.raw.update_var_avg(skip)
        self.step += 1
        self.pending.append(torch.cat((losses, skip[None], norms)))
        # 4. report
        if logged:
            values = self.count_steps()
            if cfg.sparse:
                values["phase"] = "warm-up" if warmup else "sparse"
                values |= self.mean_over_ranks({"recall": out.stats["recall"].float().mean(),
                                                "k_t": out.stats["k_t"].float().mean()})
            self.reporter.step(self.step, lr=lr, **values,
                               flops_per_token=flops_per_token(self.raw, length, warmup=warmup))

    def clip(self):
        """
        Clip the gradient of the indexer and that of the rest of the model, each by its own limit,
        so that neither loss rescales the other. Returns the norms before clipping: (2,), that of
        the indexer last, 0 where it is not trained.
        """
        norms = []
        for indexer, limit in ((False, self.cfg.grad_clip), (True, self.cfg.index_grad_clip)):
            params = [p for g in self.groups for p in g["params"]
                      if (g["name"] == "indexer") == indexer]
            norms.append(clip(params, limit or math.inf).to(self.device))
        return torch.stack(norms)

    def count_steps(self):
        """
        Fetch the losses of the steps since the last call from the device, means over the ranks.
        Returns loss, index_loss and gradient norm of the last, and the counts of skipped steps and
        spikes. Raises UserError after max_skips skipped steps in a row.
        """
        values = {}
        if self.pending:
            rows = torch.stack(self.pending).double()  # (steps, 5)
            self.pending = []
            first = self.step - len(rows) + 1
            rows = self.ranks.mean(rows).tolist()
            for step, (loss, index_loss, skip, norm, index_norm) in enumerate(rows, first):
                if self.stability.observe(loss, skip > 0):
                    self.reporter.record("spike", step, loss=loss)
                if self.stability.in_a_row >= self.cfg.max_skips:
                    raise UserError(f"the loss or a gradient is not finite in {self.cfg.max_skips} "
                                    f"steps in a row, the last is step {step}: the run stops, "
                                    f"{self.what_is_saved()}. A lower learning_rate or a longer "
                                    "warmup_iters may help")
                values = {"loss": loss, "grad_norm": norm}
                if self.cfg.sparse:
                    values |= {"index_loss": index_loss, "index_grad_norm": index_norm}
        return values | {"skipped": self.stability.skipped, "spikes": self.stability.spikes}

    # ---- evaluation and checkpoint

    @torch.no_grad()
    def evaluate(self):
        """
        Mean loss, index loss and stats over eval_iters micro-batches of the validation data. The
        ranks share out the micro-batches, which are the same for any number of ranks.
        Returns None if a signal came meanwhile.
        """
        cfg = self.cfg
        rank, world = self.ranks.rank, self.ranks.world
        self.model.eval()
        sums = {"batches": torch.zeros((), device=self.device)}
        # every rank computes equally many; those beyond eval_iters do not count
        for first in range(0, cfg.eval_iters, world):
            if self.ranks.any(self.stop.received):
                self.model.train()
                return None
            m = first + rank
            counts = m < cfg.eval_iters
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
        # a resumed run may have evaluated this step before
        self.reporter.evaluation(self.step, metrics, record=self.step > self.evaluated)
        self.ranks.on_rank_0(record_loss, cfg.out_dir, self.step, metrics["loss"])
        return metrics

    def save(self):
        """
        Write the checkpoint. If a number in it is not finite, the run stops instead.
        """
        self.count_steps()  # the spikes before this step belong to the checkpoint
        tensors = {"model": self.raw.state_dict(),
                   "optimizer": optimizer_tensors(self.optimizers, self.raw)}
        for named in tensors.values():
            name = not_finite(named)
            if name:
                raise UserError(f"{name} is not finite at step {self.step}: "
                                f"the run stops, {self.what_is_saved()}")
        run_state = {"step": self.step, "config": asdict(self.cfg),
                     "model_config": asdict(self.raw.config), "meta": self.meta,
                     "data_path": os.path.abspath(self.cfg.data), "retrofit": self.retrofit,
                     "stability": self.stability.state()}
        what = self.cfg.out_dir, tensors, run_state
        if self.cfg.fsdp:
            save_divided_checkpoint(*what, self.ranks, self.cfg.keep)
        else:
            self.ranks.on_rank_0(save_checkpoint, *what, self.cfg.keep)
        self.saved_step = self.step

    def what_is_saved(self):
        if not self.saved_step:
            return "no checkpoint was written"
        return f"the last checkpoint in {self.cfg.out_dir} is that of step {self.saved_step}"

    # ---- several ranks

    def mean_over_ranks(self, values):
        """{name: 0-dim tensor} -> {name: float}, the mean over the ranks."""
        rows = torch.stack([x.detach().double() for x in values.values()])
        return dict(zip(values, self.ranks.mean(rows).tolist()))


def train(cfg):
    """
    Run the training that cfg describes, from scratch. Returns the metrics of the last evaluation.
    Raises UserError.
    """
    with StopSignal() as stop, Ranks(cfg.device) as ranks, run_folder(cfg.out_dir, ranks):
        return Run(cfg, ranks, stop).train()


def main(argv):
    given = parse(TrainConfig, argv)
    out_dir = given.get("out_dir", TrainConfig.out_dir)
    init_from = given.get("init_from", TrainConfig.init_from)
    if given.get("dry_run"):
        begin = where_to_begin(init_from, out_dir)
        checkpoint = load_checkpoint(out_dir) if begin == "resume" else None
        start = None if begin in ("scratch", "resume") else load_start(begin)
        return dry_run(settings(argv, checkpoint, start))
    device = given.get("device", TrainConfig.device)
    with StopSignal() as stop, Ranks(device) as ranks, run_folder(out_dir, ranks):
        begin = ranks.on_rank_0(where_to_begin, init_from, out_dir)
        checkpoint = start = None
        if begin == "resume":
            checkpoint = read_checkpoint(ranks.on_rank_0(find_checkpoint, out_dir))
        elif begin != "scratch":
            start = load_start(begin)
        # A config file always names its data, and so does a command that is simply repeated (auto):
        # only a flag beside "resume" asks for other tokens
        new_data = init_from == "resume" and "data" in flags(argv)
        cfg = settings(argv, checkpoint, start)
        # No name for the Run: it has to be gone before the ranks' process group is
        Run(cfg, ranks, stop, checkpoint, start, new_data).train()
    if stop.interrupted:
        raise SystemExit(130)


if __name__ == "__main__":
    run(main)
