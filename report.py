"""
Watching a training run: a line per logged step, log.jsonl, curves.png, TensorBoard and wandb.

    with Reporter(cfg, "cpu", world=1, log=log, step=0) as reporter:  # cfg: train.TrainConfig
        reporter.greet(parameters, available_tokens, "float32")
        reporter.step(10, loss=2.3, lr=6e-4, flops_per_token=4e7, recall=0.9)
        with reporter.pause():
            reporter.evaluation(250, {"loss": 2.1, "recall": 0.9, "recall/0": 0.8})

Numbers come in as Python's, never as tensors: nothing here waits for a GPU, except `pause`.
A name with a slash is that of one layer, recall/0: it is recorded, not printed.
"""
import contextlib
import os
import time

import torch

from configurator import duration, say, to_json
from dashboards import TensorBoard, Wandb, reason
from measure import peak_flops
from outdir import read_log
from pictures import can_draw, draw_training, save_picture


class Reporter:
    """
    Tells how a training goes, on rank 0; on the other ranks nothing is printed or written.
    log: out_dir's log.jsonl, open for appending; None on every rank but 0.
    step: that of the checkpoint that the run goes on from, else 0.
    Raises UserError if TensorBoard or wandb does not start. If they or the drawing of curves.png
    fail later, one line says so, and the training goes on.
    """

    def __init__(self, cfg, device, world, log, step):
        self.cfg = cfg
        self.device = device
        self.world = world
        self.log = log
        self.step_tokens = cfg.batch_size * cfg.block_size * cfg.grad_accum
        self.peak = peak_flops(device)  # of one GPU, in FLOP/s
        self.draws = bool(log) and cfg.plot and can_draw("curves.png")
        self.views = {}
        if log and cfg.tensorboard:
            self.views["TensorBoard"] = TensorBoard(cfg, step)
        if log and cfg.wandb:
            self.views["wandb"] = Wandb(cfg, step)
        self.failed = set()  # what has failed once
        self.began = time.perf_counter()
        self.last_step = step  # that of the last line
        self.last_time = self.began  # of the last line, moved on by each pause
        self.pause_seconds = 0.0  # length of the last pause

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        for name, view in self.views.items():
            self.attempt(name, view.close, isinstance(error, Exception))

    def say(self, line):
        """Print a line, on rank 0."""
        if self.log:
            say(line)

    def greet(self, parameters, available_tokens, dtype):
        """The first line: the model's size, the tokens, the machine."""
        tokens = self.cfg.max_iters * self.step_tokens
        self.say(f"{parameters / 1e6:.2f}M parameters, {tokens:,} tokens of "
                 f"{available_tokens:,} in {self.cfg.data}, {self.world} × {self.device}, {dtype}")

    def step(self, step, loss, lr, flops_per_token, **values):
        """
        Print and record a logged step; `step` steps are done now. values: numbers and words. An
        int is a count: it is printed from 1 on.
        """
        # 1. seconds per step since the last line, pauses left out
        now = time.perf_counter()
        step_seconds = (now - self.last_time) / (step - self.last_step)
        self.last_time = now
        self.last_step = step
        # 2. the numbers
        speed = self.step_tokens / step_seconds
        line = {"loss": loss, "lr": lr, "tokens_per_second": speed, **values}
        if self.peak:
            line["mfu"] = speed * flops_per_token / (self.peak * self.world)
        # 3. time left, if each step and each pause takes as long as the last ones
        left = step_seconds * (self.cfg.max_iters - step)
        left += self.pause_seconds * self.pauses_left(step)
        seconds = now - self.began
        self.say(f"step {step}: {', '.join(shown(line))}, "
                 f"{duration(seconds)}, {duration(left)} left")
        self.record("train", step, **line, seconds=seconds)

    @contextlib.contextmanager
    def pause(self):
        """Around a checkpoint and an evaluation, which are no part of the steps' speed."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()  # the steps that the GPU has not finished are part of it
        start = time.perf_counter()
        yield
        self.pause_seconds = time.perf_counter() - start
        self.last_time += self.pause_seconds

    def pauses_left(self, step):
        """The evaluations after `step` steps: one every eval_interval, and one at the end."""
        every = self.cfg.eval_interval
        return len(range(-(-step // every) * every, self.cfg.max_iters, every)) + 1

    def evaluation(self, step, metrics, record=True):
        """Print an evaluation. record: False if the log holds it from an earlier run."""
        self.say(f"step {step}: " + ", ".join(f"val {text}" for text in shown(metrics)))
        if record:
            self.record("eval", step, **metrics)
        if self.draws:
            self.attempt("curves.png", self.draw, step)

    def draw(self, step):
        """Draw out_dir/curves.png anew, from log.jsonl."""
        folder = self.cfg.out_dir
        records = [record for record, _ in read_log(os.path.join(folder, "log.jsonl"))]
        warmup_end = self.cfg.index_warmup_iters if self.cfg.sparse else 0
        if step <= warmup_end:  # it lies ahead
            warmup_end = 0
        save_picture(os.path.join(folder, "curves.png"), draw_training, records, warmup_end)

    def record(self, kind, step, **values):
        """Add a line to log.jsonl, and its numbers to TensorBoard and wandb."""
        if not self.log:
            return
        self.log.write(to_json({"kind": kind, "step": step, **values}) + "\n")
        self.log.flush()
        numbers = {name: x for name, x in values.items() if isinstance(x, (int, float))}
        for name, view in self.views.items():
            self.attempt(name, view.write, kind, step, numbers)

    def attempt(self, name, call, *args):
        """Do what must not stop a training. The first time that it fails, say so."""
        try:
            call(*args)
        except Exception as e:
            if name not in self.failed:
                self.say(f"{name} fails ({reason(e)}): the training goes on")
            self.failed.add(name)


def shown(values):
    """What is printed of a record: {"loss": 2.31, "phase": "sparse"} -> ["loss 2.31", …]."""
    out = []
    for name, x in values.items():
        is_zero_count = type(x) is int and x == 0
        if "/" in name or is_zero_count:
            continue
        out.append(f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}")
    return out
