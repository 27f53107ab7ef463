"""report.py, dashboards.py and data.Prefetch: what a training run tells, and reading ahead."""
import importlib.util
import json
import math
import random
import sys
import threading
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import pictures
import report
import train
from checkpoint import load_checkpoint
from configurator import UserError, duration
from data import Batches, Prefetch
from test_model import HostSyncs

TINY = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=16, block_size=32, n_index_head=2, d_index=8,
            k_base=8, k_min=2, k_max=12, batch_size=2, index_warmup_iters=3, warmup_iters=2,
            learning_rate=3e-3, eval_iters=1, log_interval=1, eval_interval=2, device="cpu")


@dataclass
class Settings:
    """What a Reporter reads of TrainConfig."""
    out_dir: str
    data: str = "data/demo"
    batch_size: int = 2
    block_size: int = 8
    grad_accum: int = 5
    max_iters: int = 40
    eval_interval: int = 15
    index_warmup_iters: int = 3
    sparse: bool = True
    plot: bool = False
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "nanogsa"


class Clock:
    """Stands in for the time module: its seconds pass when a test says so."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(report, "time", self)

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def open_reporter(tmp_path):
    """A function that opens a Reporter on tmp_path/log.jsonl, and tells what a test asks for."""
    logs = []

    def opened(step=0, log=True, **settings):
        file = None
        if log:
            file = open(tmp_path / "log.jsonl", "a", encoding="utf-8")
            logs.append(file)
        return report.Reporter(Settings(str(tmp_path), **settings), "cpu", 1, file, step)
    yield opened
    for file in logs:
        file.close()


def told(reporter, step, **values):
    reporter.step(step, loss=2.0, lr=1e-3, flops_per_token=1.0, **values)


def records(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


# ---- the line

def test_a_worked_example_of_speed_and_time_left(open_reporter, clock, tmp_path, capsys):
    """80 tokens a step, 40 steps, evaluations after steps 15, 30 and 40."""
    reporter = open_reporter()
    clock.now += 2
    told(reporter, 1)  # 2 s a step, 39 steps left; nothing is known of evaluations
    clock.now += 140
    told(reporter, 15)  # 14 steps in 140 s: 10 s a step, 25 steps left
    with reporter.pause():
        clock.now += 60  # an evaluation; 2 of them are left
    clock.now += 20
    told(reporter, 20)  # 5 steps in 20 s: 4 s a step. 20 · 4 s + 2 · 60 s = 200 s
    train_records = records(tmp_path)
    assert [r["tokens_per_second"] for r in train_records] == [40, 8, 20]
    assert [r["seconds"] for r in train_records] == [2, 142, 222]
    assert capsys.readouterr().out.splitlines() == [
        "step 1: loss 2, lr 0.001, tokens_per_second 40, 2s, 1m18s left",
        "step 15: loss 2, lr 0.001, tokens_per_second 8, 2m22s, 4m10s left",
        "step 20: loss 2, lr 0.001, tokens_per_second 20, 3m42s, 3m20s left"]


def test_with_steady_steps_and_evaluations_the_time_left_is_right(open_reporter, clock, capsys):
    """Once an evaluation has been seen; any schedule, also of a resumed run."""
    rng = random.Random(0)
    for _ in range(30):
        first = rng.choice([0, rng.randrange(1, 30)])
        cfg = dict(max_iters=first + rng.randrange(1, 60), eval_interval=rng.randrange(1, 25))
        log_interval = rng.randrange(1, 7)
        step_seconds, pause_seconds = rng.uniform(0.1, 9), rng.uniform(0, 99)
        reporter = open_reporter(step=first, **cfg)
        ends = {}  # what was said to be the end, at each line after the first evaluation
        evaluated = False
        for step in range(first + 1, cfg["max_iters"] + 1):
            clock.now += step_seconds
            if step % log_interval == 0:
                told(reporter, step)
                line = capsys.readouterr().out
                if evaluated:
                    ends[clock.now] = line.split(", ")[-1].removesuffix(" left\n")
            if step % cfg["eval_interval"] == 0 or step == cfg["max_iters"]:
                with reporter.pause():
                    clock.now += pause_seconds
                evaluated = True
        for when, left in ends.items():
            exact = clock.now - when
            assert left in {duration(exact - 1e-6), duration(exact), duration(exact + 1e-6)}


def test_the_first_line(open_reporter, capsys):
    open_reporter().greet(1_230_000, 999_999, "float32")
    assert capsys.readouterr().out == (
        "1.23M parameters, 3,200 tokens of 999,999 in data/demo, 1 × cpu, float32\n")


def test_layers_are_recorded_not_printed_and_counts_are_printed_from_1_on(
        open_reporter, clock, tmp_path, capsys):
    reporter = open_reporter()
    values = {"grad_norm": 0.5, "skipped": 0, "spikes": 12345, "phase": "sparse",
              "recall/0": 0.25, "recall/1": math.nan}
    clock.now += 1
    told(reporter, 1, **values)
    reporter.evaluation(1, {"loss": 2.5, "recall": 0.5, "recall/0": 0.25})
    reporter.evaluation(1, {"loss": 2.5}, record=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1: loss 2, lr 0.001, tokens_per_second 80, grad_norm 0.5, "
                               "spikes 12345, phase sparse, 1s, ")
    assert lines[1:] == ["step 1: val loss 2.5, val recall 0.5", "step 1: val loss 2.5"]
    expected = [
        {"kind": "train", "step": 1, "loss": 2.0, "lr": 1e-3, "tokens_per_second": 80.0,
         **values, "recall/1": None, "seconds": 1.0},
        {"kind": "eval", "step": 1, "loss": 2.5, "recall": 0.5, "recall/0": 0.25}]
    assert records(tmp_path) == expected


def test_other_ranks_print_and_write_nothing(open_reporter, clock, tmp_path, capsys):
    with open_reporter(log=False, plot=True, tensorboard=True, wandb=True) as reporter:
        reporter.greet(1, 1, "float32")
        clock.now += 1
        told(reporter, 1)
        with reporter.pause():
            reporter.evaluation(1, {"loss": 2.5})
        reporter.say("a line")
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


# ---- curves.png

def test_curves_are_drawn_anew_at_each_evaluation(open_reporter, clock, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    reporter = open_reporter(plot=True)
    pictures_seen = []
    for step in range(1, 7):
        clock.now += 1
        told(reporter, step, recall=0.9)
        assert (tmp_path / "curves.png").exists() == (step > 2)
        if step % 2 == 0:
            reporter.evaluation(step, {"loss": 2.5})
            pixels = image.imread(tmp_path / "curves.png")  # (height, width, 4)
            assert pixels.ndim == 3
            pictures_seen.append(pixels.tobytes())
    assert len(set(pictures_seen)) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "log.jsonl"]


@pytest.mark.parametrize("fails", ["draw_training", "save_picture"])
def test_drawing_that_fails_keeps_the_old_picture_and_says_so_once(
        open_reporter, tmp_path, capsys, monkeypatch, fails):
    pytest.importorskip("matplotlib")

    def broken(*args):
        raise OSError("No space left on device\nand more")
    reporter = open_reporter(plot=True)
    (tmp_path / "curves.png").write_bytes(b"the old one")
    monkeypatch.setattr(report, fails, broken)
    for step in (1, 2):
        reporter.evaluation(step, {"loss": 2.5})
    assert capsys.readouterr().out.splitlines() == [
        "step 1: val loss 2.5",
        "curves.png fails (No space left on device): the training goes on",
        "step 2: val loss 2.5"]
    assert (tmp_path / "curves.png").read_bytes() == b"the old one"
    assert len(records(tmp_path)) == 2


def test_a_picture_cut_off_while_it_is_written_leaves_the_old_one(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")

    class HalfWritten:
        def savefig(self, f, **options):
            f.write(b"half")
            raise KeyboardInterrupt
    path = tmp_path / "curves.png"
    path.write_bytes(b"the old one")
    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(plt, "close", lambda figure: None)
        pictures.save_picture(str(path), lambda plt: HalfWritten())
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_without_matplotlib_one_line_at_the_start_says_so(
        open_reporter, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    reporter = open_reporter(plot=True)
    for step in (1, 2):
        reporter.evaluation(step, {"loss": 2.5})
    assert capsys.readouterr().out.splitlines() == [
        "no curves.png: matplotlib is not installed (pip install -r requirements-extra.txt)",
        "step 1: val loss 2.5", "step 2: val loss 2.5"]
    open_reporter(plot=False)
    assert capsys.readouterr().out == ""


def test_a_curve_of_many_points_is_thinned_out_evenly():
    rows = [{"step": i, "loss": float(i)} for i in range(7001)]
    steps, values = pictures.curve(rows, "loss")
    assert steps == values == list(range(0, 7001, 4))


# ---- TensorBoard and wandb

class FakeBoards:
    """Both packages, as far as dashboards.py calls them. wandb's runs are kept by their id."""

    def __init__(self, monkeypatch):
        self.scalars = []  # of TensorBoard: (tag, value, step)
        self.purge_steps = []
        self.runs = {}  # of wandb: id -> rows
        self.ended = []  # "closed", or wandb's exit code
        self.broken = False
        for name, entry, call in (("torch.utils.tensorboard", "SummaryWriter", self.writer),
                                  ("wandb", "init", self.init)):
            module = types.ModuleType(name)
            setattr(module, entry, call)
            monkeypatch.setitem(sys.modules, name, module)

    def check(self):
        if self.broken:
            raise RuntimeError("the service is gone")

    def writer(self, folder, purge_step):
        self.purge_steps.append(purge_step)
        return types.SimpleNamespace(add_scalar=self.add_scalar,
                                     close=lambda: self.ended.append("closed"))

    def add_scalar(self, tag, value, step):
        self.check()
        self.scalars.append((tag, value, step))

    def init(self, project, id, resume, dir, config):
        self.check()
        assert (project, resume) == ("nanogsa", "allow") and config["block_size"]
        id = id or f"run{len(self.runs)}"
        rows = self.runs.setdefault(id, [])

        def log(row):
            self.check()
            rows.append(row)
        return types.SimpleNamespace(id=id, log=log, define_metric=lambda *a, **k: None,
                                     finish=lambda exit_code: self.ended.append(exit_code))


@pytest.fixture
def boards(monkeypatch):
    return FakeBoards(monkeypatch)


def test_dashboards_get_every_number_and_a_resumed_run_goes_on_in_them(
        open_reporter, clock, boards):
    both = dict(tensorboard=True, wandb=True)
    with open_reporter(**both) as reporter:
        clock.now += 1
        told(reporter, 1, phase="sparse", skipped=0)
        reporter.evaluation(1, {"loss": 2.5, "recall/0": 0.5})
    with pytest.raises(ZeroDivisionError), open_reporter(step=1, **both) as reporter:
        reporter.evaluation(2, {"loss": 2.25})
        1 / 0
    with open_reporter(**both):  # from scratch
        pass
    numbers = [("train/loss", 2.0, 1), ("train/lr", 1e-3, 1), ("train/tokens_per_second", 80.0, 1),
               ("train/skipped", 0, 1), ("train/seconds", 1.0, 1),
               ("eval/loss", 2.5, 1), ("eval/recall/0", 0.5, 1), ("eval/loss", 2.25, 2)]
    assert boards.scalars == numbers
    assert boards.purge_steps == [1, 2, 1]
    rows = [{"step": 1} | {tag: x for tag, x, _ in numbers[:5]},
            {"step": 1, "eval/loss": 2.5, "eval/recall/0": 0.5}, {"step": 2, "eval/loss": 2.25}]
    assert boards.runs == {"run0": rows, "run1": []}
    assert boards.ended == ["closed", 0, "closed", 1, "closed", 0]


def test_a_dashboard_that_fails_says_so_once_and_one_that_does_not_start_is_refused(
        open_reporter, boards, tmp_path, capsys):
    with open_reporter(tensorboard=True, wandb=True) as reporter:
        boards.broken = True
        for step in (1, 2):
            reporter.evaluation(step, {"loss": 2.5})
        boards.broken = False
        reporter.evaluation(3, {"loss": 2.5})
    assert capsys.readouterr().out.splitlines() == [
        "step 1: val loss 2.5",
        "TensorBoard fails (the service is gone): the training goes on",
        "wandb fails (the service is gone): the training goes on",
        "step 2: val loss 2.5", "step 3: val loss 2.5"]
    assert boards.scalars == [("eval/loss", 2.5, 3)]
    assert len(records(tmp_path)) == 3
    boards.broken = True
    with pytest.raises(UserError, match="wandb does not start .the service is gone.: log in by"):
        open_reporter(wandb=True)


def test_tensorboard_itself_shows_each_step_of_a_resumed_run_once(open_reporter, clock, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for first, last in ((0, 5), (3, 6)):  # the steps 4 and 5 are done again
        with open_reporter(step=first, tensorboard=True) as reporter:
            for step in range(first + 1, last + 1):
                clock.now += 1
                told(reporter, step)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_wandb_itself_runs_offline_and_keeps_its_id(open_reporter, clock, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for step in (0, 1):
        with open_reporter(step=step, wandb=True) as reporter:
            clock.now += 1
            told(reporter, step + 1)
        ids.append((tmp_path / "wandb_id").read_text())
    assert ids[0] == ids[1] != ""
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}"))) >= 1
    assert reporter.failed == set()


# ---- a whole run

def config(demo, out_dir, **more):
    return train.TrainConfig.arm("gsa", **TINY | dict(data=demo, out_dir=str(out_dir)) | more)


def test_watching_changes_no_bit_of_the_training_and_a_resumed_run_appends(
        demo, tmp_path, boards, capsys):
    watched, plain = tmp_path / "watched", tmp_path / "plain"
    everything = dict(plot=True, tensorboard=True, wandb=True)
    train.train(config(demo, watched, max_iters=2, **everything))
    resume = ["--init_from=resume", f"--out_dir={watched}", "--max_iters=5"]
    train.main(resume)
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert (watched / "curves.png").exists() == drawn
    assert capsys.readouterr().out.count(" left\n") == 5
    train.train(config(demo, plain, max_iters=2, plot=False))
    train.main(["--init_from=resume", f"--out_dir={plain}", "--max_iters=5"])
    assert not (plain / "curves.png").exists()
    ours, theirs = (load_checkpoint(str(folder))["model"] for folder in (watched, plain))
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    steps = [(r["kind"], r["step"]) for r in records(watched)]
    assert steps == [("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("train", 4),
                     ("eval", 4), ("train", 5), ("eval", 5)]
    rows = [row["step"] for row in boards.runs["run0"]]
    assert rows == [step for _, step in steps]
    last = records(watched)[-1]
    layers = [last[f"recall/{layer}"] for layer in range(2)]
    assert last["recall"] == pytest.approx(sum(layers) / 2)
    assert all("grad_norm" in r for r in records(watched) if r["kind"] == "train")


@pytest.mark.parametrize("flag,module", [("tensorboard", "torch.utils.tensorboard"),
                                         ("wandb", "wandb")])
def test_a_missing_dashboard_is_one_line_before_anything_is_written(
        demo, tmp_path, monkeypatch, flag, module):
    out = tmp_path / "out"
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"^--{flag} needs the package {flag} \(pip install {flag}\): [^\n]+$"
    with pytest.raises(UserError, match=message):
        train.train(config(demo, out, max_iters=1, **{flag: True}))
    assert not out.exists()
    out.mkdir()
    (out / "ckpt.pt").write_bytes(b"an older run")
    with pytest.raises(UserError, match=message):
        train.train(config(demo, out, max_iters=1, overwrite=True, **{flag: True}))
    assert (out / "ckpt.pt").read_bytes() == b"an older run"


# ---- reading ahead

def batches_of(rng, vocab_size=None):
    """Batches over the ids 0, 1, 2, … in which a window tells its place."""
    n = int(rng.integers(20, 400))
    return Batches(np.arange(n, dtype=np.uint16), int(rng.integers(1, 10)),
                   int(rng.integers(1, 6)), int(rng.integers(100)), vocab_size)


def reading_threads():
    return [t for t in threading.enumerate() if "ThreadPoolExecutor" in t.name]


def test_reading_ahead_gives_the_same_batches_for_any_shape_ranks_and_order():
    rng = np.random.default_rng(0)
    for _ in range(25):
        batches = batches_of(rng)
        world = int(rng.integers(1, 4))
        rank = int(rng.integers(world))
        asked = [rank + world * j for j in range(12)]
        asked += rng.integers(0, 50, 5).tolist()  # as after resuming, or of an older step
        with Prefetch(batches, world) as loader:
            for m in asked:
                length = int(rng.choice([1, batches.T]))
                for got, expected in zip(loader.train(m, "cpu", length),
                                         batches.train(m, "cpu", length), strict=True):
                    assert torch.equal(got, expected), f"micro-batch {m}"
            whole = loader.train(3, "cpu")
        assert whole[0].shape == (batches.B, batches.T)


def test_the_next_micro_batch_is_read_by_another_thread_before_it_is_asked_for():
    batches = batches_of(np.random.default_rng(0))
    read = batches.read
    calls = []

    def recorded(m):
        calls.append((m, threading.current_thread() is threading.main_thread()))
        return read(m)
    batches.read = recorded
    with Prefetch(batches, 2) as loader:
        for m in (1, 3, 5):
            loader.train(m, "cpu")
            loader.reading.result()  # the thread has time while the micro-batch is computed
            assert calls[-1] == (m + 2, False)
    assert [m for m, _ in calls] == [1, 3, 5, 7]


def test_an_error_of_the_thread_is_raised_where_its_micro_batch_is_asked_for():
    ids = np.zeros(101, np.uint16)
    batches = Batches(ids, 10, 1, seed=0, vocab_size=50)
    damaged = 6  # the micro-batch that holds the damaged id
    ids[int(batches.order(0)[damaged]) * 10 + 5] = 50
    with pytest.raises(UserError, match="the id 50"), Prefetch(batches, 1) as loader:
        for m in range(10):
            asked = m
            loader.train(m, "cpu")
    assert asked == damaged
    with Prefetch(batches, 1) as loader:  # a training that stops before it meets no error
        for m in range(damaged):
            loader.train(m, "cpu")


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, UserError])
def test_no_thread_is_left_however_a_training_ends(end):
    batches = batches_of(np.random.default_rng(1))
    before = reading_threads()
    try:
        with Prefetch(batches, 1) as loader:
            loader.train(0, "cpu")
            assert len(reading_threads()) == len(before) + 1
            if end:
                raise end
    except (KeyboardInterrupt, UserError):
        pass
    assert reading_threads() == before


def test_a_micro_batch_is_checked_and_cut_without_reading_a_tensor():
    """Reading one waits for the GPU. The ids are checked in NumPy, in CPU memory."""
    batches = batches_of(np.random.default_rng(2), vocab_size=1000)
    with Prefetch(batches, 1) as loader, HostSyncs() as syncs:
        for m in range(5):
            loader.train(m, "cpu", 1)
            batches.train(m, "cpu")
    assert syncs.count == 0
