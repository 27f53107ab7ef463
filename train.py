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
from dataclasses import asdict

import torch
from torch.nn.parallel import DistributedDataParallel

from attention import document_starts
from checkpoint import (check_same_data, check_vocabulary, model_config, record_loss,
                        save_checkpoint, save_divided_checkpoint)
from configurator import UserError, flags, parse, run, say
from dashboards import check_extras
from data import Batches, Data, Prefetch, differences
from device import check_backend, check_compiler, precision
from measure import flops_per_token
from model import GSA
from optim import load_optimizers, make_optimizers, optimizer_tensors
from outdir import open_log, prepare_folder, run_folder
from plan import dry_run
from ranks import Ranks, StopSignal, shared
from report import Reporter
from settings import TrainConfig, settings
from sharding import average_undivided_gradients, clip, shard
from start import check_start, is_auto, load_begin, open_gates_and_load, where_to_begin
from stability import Stability
from weights import load_weights, not_finite


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
        Raises UserError, also on one rank alone: the ranks do not wait for each other here.
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
            raise UserError("fsdp divides the model among ranks: start several by torchrun, "
                            "or say --fsdp=false")
        check_backend(cfg.backend, self.device)
        if cfg.compile:
            check_compiler()
        check_extras(cfg)
        # 2. data
        data = Data(cfg.data)
        if start:
            check_start(start, data.meta, cfg.data)
        if checkpoint:
            check_vocabulary(checkpoint, data.meta, cfg.data)
        if 0 < cfg.vocab_size < data.vocab_size:
            raise UserError(f"vocab_size {cfg.vocab_size} is less than "
                            f"the {data.vocab_size} of {cfg.data}")
        self.meta = data.meta
        self.batches = {}
        for split, ids in (("train", data.train), ("val", data.val)):
            self.batches[split] = Batches(ids, cfg.block_size, cfg.batch_size, cfg.seed,
                                          data.vocab_size)
        self.loader = self.batches["train"]
        # 3. model
        torch.manual_seed(cfg.seed)
        self.autocast = precision(self.device, cfg.dtype)
        self.raw = GSA(cfg.model_config(cfg.vocab_size or data.vocab_size), cfg.backend)
        for block in self.raw.blocks:
            block.activation_checkpointing = cfg.activation_checkpointing
        # 4. where it begins
        self.step = 0
        self.saved_step = 0  # that of the last checkpoint, 0 = there is none
        self.saved_optimizer = None  # of a checkpoint, until begin_phase loads it
        self.retrofit = False  # were gates or an indexer added to the weights of another model?
        self.stability = Stability()
        self.origin = ""  # said in greet()
        if start:
            self.origin = f"begins with the weights of {start['path']}"
            self.retrofit = open_gates_and_load(self.raw, start["model"], start["path"])
        if checkpoint:
            self.restore(checkpoint, new_data)
        # 5. reports
        self.reporter = Reporter(cfg, self.device, ranks.world, log=None, step=0)  # see open()
        self.evaluated = 0  # the step of the last evaluation in the log
        self.pending = []  # (loss, index loss, skipped?, gradient norms) of steps not yet reported

    def restore(self, checkpoint, new_data):
        """Take weights, step and counts from this run's checkpoint; the optimizers' state later."""
        cfg = self.cfg
        path = checkpoint["path"]
        if not new_data:
            check_same_data(checkpoint, self.meta, cfg.data)
        changed = differences(asdict(model_config(checkpoint)), asdict(self.raw.config))
        if changed:
            raise UserError(f"{path} does not fit its own settings ({changed})")
        load_weights(self.raw, checkpoint["model"], path)
        self.step = checkpoint["step"]
        self.saved_step = self.step
        self.origin = f"goes on with {path}"
        self.stability = Stability(**checkpoint.get("stability", {}))
        # older versions had a setting instead
        old = checkpoint["config"]
        self.retrofit = checkpoint.get("retrofit", bool(old.get("retrofit_from")))
        # saved in the warm-up of a retrofit, there is a state for the indexer only
        alone = self.retrofit and self.step <= old["index_warmup_iters"]
        if self.retrofit and self.in_warmup() and not alone:
            raise UserError(f"index_warmup_iters {cfg.index_warmup_iters}: the warm-up of this "
                            f"retrofit has ended after {old['index_warmup_iters']} steps")
        self.saved_optimizer = (checkpoint["optimizer"], path, alone)

    def begin_phase(self):
        """
        Choose what is trained now, make its optimizers, and the compiled and distributed model.
        Called at the start, and again when a retrofit's warm-up ends: then there is more to train,
        and new optimizers take over the state of the old.
        """
        cfg = self.cfg
        # 1. in the warm-up of a retrofit the indexer trains alone: the rest keeps its bits
        self.indexer_alone = self.retrofit and self.in_warmup()
        for name, p in self.raw.named_parameters():
            p.requires_grad_(not self.indexer_alone or ".indexer." in name)
        if cfg.fsdp:
            for block in self.raw.blocks:  # the backward pass gathers only what is trained
                block.set_unshard_in_backward(not self.indexer_alone)
        # 2. optimizers
        state = (optimizer_tensors(self.optimizers, self.raw), "the warm-up", True)
        self.optimizers = make_optimizers(self.raw, cfg)
        load_optimizers(self.optimizers, self.raw, *(self.saved_optimizer or state))
        self.saved_optimizer = None
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        # 3. the model that the loop calls
        self.model = self.raw
        if cfg.compile and not cfg.fsdp:
            self.model = torch.compile(self.raw)
        if self.ranks.world > 1 and not cfg.fsdp:
            ids = [self.device] if self.device.startswith("cuda") else None
            # update_var_avg averages the one buffer that training changes
            self.model = DistributedDataParallel(self.model, device_ids=ids,
                                                 forward_sync_buffers=False,
                                                 gradient_as_bucket_view=True)
        self.model.train()

    def prepare(self):
        """Move the model, or this rank's part, to the device. The ranks wait for each other."""
        if self.cfg.compile:
            # the Triton path may read the length of a list of keys from the GPU
            torch._dynamo.config.capture_scalar_outputs = True
        if self.cfg.fsdp:
            shard(self.raw, self.device, self.in_bf16(), self.cfg.compile)
        self.raw.to(self.device)
        self.optimizers = []
        self.begin_phase()

    def train(self):
        """
        The loop. Every eval_interval steps and at the end, write the checkpoint and evaluate.
        Returns the metrics of the last evaluation, None if a signal has ended the run.
        """
        with contextlib.ExitStack() as closing:
            # 1. the model, the folder, the log, and the first line
            self.prepare()
            self.ranks.on_rank_0(self.open, closing)
            self.greet()
            if self.device.startswith("cuda"):
                self.loader = closing.enter_context(Prefetch(self.loader, self.ranks.world))
            # 2. the loop
            while True:
                if self.ranks.any(self.stop.received):
                    self.save_if_new()
                    self.reporter.say(f"stopped at step {self.step}, {self.what_is_saved()}")
                    return None
                done = self.step >= self.cfg.max_iters
                if done or (self.step and self.step % self.cfg.eval_interval == 0):
                    with self.reporter.pause():
                        self.save_if_new()
                        metrics = self.evaluate()
                    if metrics is None:
                        continue  # a signal came
                    if done:
                        return metrics
                self.optimize()

    def open(self, closing):
        """Rank 0 makes out_dir ready and opens the reports, until `closing` closes."""
        cfg = self.cfg
        prepare_folder(cfg.out_dir, asdict(cfg), self.step, cfg.overwrite, is_auto(cfg.init_from))
        log, self.evaluated = open_log(os.path.join(cfg.out_dir, "log.jsonl"), self.step)
        closing.callback(log.close)
        reporter = Reporter(cfg, self.device, self.ranks.world, log, self.step)
        self.reporter = closing.enter_context(reporter)

    def greet(self):
        """The first lines: where the run begins, the model's size, the tokens, the machine."""
        kind = "bfloat16" if self.in_bf16() else "float32"
        if self.origin:
            self.reporter.say(self.origin)
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
            self.begin_phase()
        # 1. learning rates
        lr = learning_rate(cfg, self.step)
        for group in self.groups:
            group["lr"] = lr * group["lr_mult"]
            if self.retrofit and group["name"] != "indexer":  # its training has just begun
                trained = self.step - cfg.index_warmup_iters
                group["lr"] *= min(1.0, (trained + 1) / max(1, cfg.warmup_iters))
        # 2. gradients
        micro_batches = cfg.grad_accum // self.ranks.world
        losses = torch.zeros(2, device=self.device)  # loss, index loss
        for micro in range(micro_batches):
            last = micro == micro_batches - 1
            # the number of the micro-batch, over all steps and ranks: see data.Batches
            m = self.step * cfg.grad_accum + micro * self.ranks.world + self.ranks.rank
            idx, targets = self.loader.train(m, self.device, length)
            if self.ranks.world > 1 and not cfg.fsdp:
                self.model.require_backward_grad_sync = last
            with self.autocast:
                out = self.model(idx, targets, self.doc_start(idx), warmup=warmup,
                                 stats=logged and last)
            out.logits = None  # the backward pass needs their memory, and not them
            loss = out.loss + cfg.index_loss_weight * out.index_loss
            (loss / micro_batches).backward()
            losses += torch.stack((out.loss.detach(), out.index_loss.detach())) / micro_batches
        if cfg.fsdp:
            average_undivided_gradients(self.raw)
        norms = self.clip_gradients()
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

    def clip_gradients(self):
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
        Fetch the losses of the steps since the last call from the device, means over the ranks, and
        count skipped steps and spikes. Returns loss, index_loss and gradient norms of the last
        step, and the counts. Raises UserError after max_skips skipped steps in a row.
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
                    self.fail(f"the loss or a gradient is not finite in {self.cfg.max_skips} "
                              f"steps in a row, the last is step {step}",
                              ". A lower learning_rate or a longer warmup_iters may help")
            values = {"loss": loss, "grad_norm": norm}
            if self.cfg.sparse:
                values |= {"index_loss": index_loss, "index_grad_norm": index_norm}
        return values | {"skipped": self.stability.skipped, "spikes": self.stability.spikes}

    def fail(self, reason, advice=""):
        """Stop the run, on all ranks: each of them sees the reason."""
        raise shared(UserError(f"{reason}: the run stops, {self.what_is_saved()}{advice}"))

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
        stopped = False
        # every rank computes equally many; those beyond eval_iters do not count
        for first in range(0, cfg.eval_iters, world):
            stopped = self.ranks.any(self.stop.received)
            if stopped:
                break
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
        if cfg.fsdp:
            self.raw.reshard()  # without a backward pass the embedding would stay gathered
        if stopped:
            return None
        means = self.mean_over_ranks(sums)
        batches = means.pop("batches")
        metrics = {name: x / batches for name, x in means.items()}
        meta = self.meta["val"]
        metrics["bits_per_byte"] = metrics["loss"] / math.log(2) / (meta["bytes"] / meta["tokens"])
        # a resumed run may have evaluated this step before
        self.reporter.evaluation(self.step, metrics, record=self.step > self.evaluated)
        if not self.in_warmup():  # a loss of dense attention is not compared with the others
            self.ranks.on_rank_0(record_loss, cfg.out_dir, self.step, metrics["loss"])
        return metrics

    def save_if_new(self):
        """
        Write the checkpoint, unless there is one of this step. If a number in it is not finite, the
        run stops instead.
        """
        if self.step == self.saved_step:
            return
        self.count_steps()  # the spikes before this step belong to the checkpoint
        tensors = {"model": self.raw.state_dict(),
                   "optimizer": optimizer_tensors(self.optimizers, self.raw)}
        for named in tensors.values():
            name = not_finite(named)
            if name:
                self.fail(f"{name} is not finite at step {self.step}")
        run_state = {"step": self.step, "config": asdict(self.cfg),
                     "model_config": asdict(self.raw.config), "meta": self.meta,
                     "data_path": os.path.abspath(self.cfg.data), "retrofit": self.retrofit,
                     "stability": self.stability.state()}
        out_dir, keep = self.cfg.out_dir, self.cfg.keep
        if self.cfg.fsdp:
            save_divided_checkpoint(out_dir, tensors, run_state, self.ranks, keep)
        else:
            self.ranks.on_rank_0(save_checkpoint, out_dir, tensors, run_state, keep)
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


def asked_for(argv, *names):
    """Settings that are needed before it is known where the run begins, from argv alone."""
    given = parse(TrainConfig, argv, __doc__)
    return [given.get(name, getattr(TrainConfig, name)) for name in names]


def make_run(argv, ranks, stop):
    """The Run that the arguments ask for, on this rank."""
    out_dir, init_from = asked_for(argv, "out_dir", "init_from")
    begin = ranks.on_rank_0(where_to_begin, init_from, out_dir)
    checkpoint, start = load_begin(begin, out_dir, ranks)
    # A config file always names data, and so does a command that is repeated (auto). Only --data
    # beside "resume" means: go on with other tokens
    new_data = init_from == "resume" and "data" in flags(argv)
    return Run(settings(argv, checkpoint, start), ranks, stop, checkpoint, start, new_data)


def plan(argv):
    """Print what a run would need (plan.py), and train nothing."""
    out_dir, init_from = asked_for(argv, "out_dir", "init_from")
    begin = where_to_begin(init_from, out_dir)
    if begin not in ("scratch", "resume") and ":" not in begin and not os.path.isdir(begin):
        say(f"{begin} is not there: the settings alone are planned")
        begin = "scratch"
    alone = Ranks("cpu", world=1)
    dry_run(settings(argv, *load_begin(begin, out_dir, alone, with_weights=False)))


def train(cfg):
    """
    Run the training that cfg describes, from scratch. Returns the metrics of the last evaluation.
    Raises UserError.
    """
    with StopSignal() as stop, Ranks(cfg.device) as ranks, run_folder(cfg.out_dir, ranks):
        return ranks.together(Run, cfg, ranks, stop).train()


def main(argv):
    dry, device, out_dir = asked_for(argv, "dry_run", "device", "out_dir")
    if dry:
        return plan(argv)
    with StopSignal() as stop, Ranks(device) as ranks, run_folder(out_dir, ranks):
        # No name for the Run: it has to be gone before the ranks' process group is
        ranks.together(make_run, argv, ranks, stop).train()
    if stop.interrupted:
        raise SystemExit(130)


if __name__ == "__main__":
    run(main)
