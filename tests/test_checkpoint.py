"""weights.py and checkpoint.py: the safetensors format, and checkpoints in any condition."""
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import attention
import checkpoint
import configurator
import train
from checkpoint import (checkpoint_folders, load_checkpoint, load_model, record_loss,
                        save_checkpoint)
from configurator import UserError
from conftest import ROOT
from outdir import read_log
from ranks import Ranks
from stability import Stability
from test_model import HostSyncs
from weights import CODES, load_tensors, save_tensors


# ---- the safetensors format

def random_tensors(seed):
    """Tensors of every type, among them scalars, empty ones and transposed ones."""
    rng = random.Random(seed)
    tensors = {}
    for i in range(20):
        shape = [rng.randrange(5) for _ in range(rng.randrange(4))]
        x = (torch.randn(shape) * 50).to(rng.choice(list(CODES)))
        tensors[f"τ.{i}"] = x.mT if x.dim() > 1 else x
    return tensors


def assert_same_tensors(a, b):
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("seed", range(5))
def test_tensors_go_both_ways_between_this_file_and_the_safetensors_package(tmp_path, seed):
    tensors = random_tensors(seed)
    save_tensors(tmp_path / "ours", tensors, {"format": "pt"})
    assert_same_tensors(safetensors.torch.load_file(tmp_path / "ours"), tensors)
    assert_same_tensors(load_tensors(tmp_path / "ours"), tensors)
    contiguous = {name: x.contiguous() for name, x in tensors.items()}
    safetensors.torch.save_file(contiguous, tmp_path / "theirs")
    assert_same_tensors(load_tensors(tmp_path / "theirs"), tensors)


def test_tensors_that_begin_at_odd_offsets_load(tmp_path):
    header = json.dumps({"a": {"dtype": "BOOL", "shape": [], "data_offsets": [0, 1]},
                         "b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]}}).encode()
    raw = torch.tensor([2.5]).view(torch.uint8).numpy().tobytes()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"\1" + raw)
    assert load_tensors(tmp_path / "x")["b"].tolist() == [2.5]


def test_writing_to_a_loaded_tensor_leaves_the_file_as_it_is(tmp_path):
    save_tensors(tmp_path / "x", {"a": torch.ones(3)})
    before = (tmp_path / "x").read_bytes()
    load_tensors(tmp_path / "x")["a"].zero_()
    assert (tmp_path / "x").read_bytes() == before


def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("header", [
    b"[]", b"{", b"{}", b'{"a": 1}', b'{"a": {}, "a": {}}', b"[" * 100_000,
    {"a": entry(0, 8)},  # one number of four bytes
    {"a": entry(0, 4)},  # four bytes are left over
    {"a": entry(0, 4), "b": entry(0, 4)},  # overlap
    {"a": entry(4, 8)},  # gap
    {"a": entry(0, 8, (2,)), "b": entry(8, 12)},  # beyond the end
    {"a": entry(0, 8, (-1, -2))},
    {"a": entry(0, 8, (10**30,))},
    {"a": entry(0, 8, (True, 2))},
    {"a": entry(0, 8, (2,), "PICKLE")},
    {"a": entry(0, 8, (2,), [])},
])
def test_a_header_that_does_not_fit_the_file_is_refused(tmp_path, header):
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match="x is not a readable safetensors file: "):
        load_tensors(tmp_path / "x")


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    save_tensors(tmp_path / "x", {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bool)})
    whole = (tmp_path / "x").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:size])
        with pytest.raises(UserError, match="is not a readable safetensors file"):
            load_tensors(tmp_path / "x")
    with pytest.raises(UserError, match="cannot be read"):
        load_tensors(tmp_path / "none")


# ---- checkpoints

TINY = dict(n_layer=1, n_head=2, n_kv_head=1, n_embd=16, block_size=32, n_index_head=2, d_index=8,
            k_base=8, k_min=4, k_max=12, batch_size=2, index_warmup_iters=3, warmup_iters=2,
            learning_rate=3e-3, min_lr=1e-4, eval_iters=1, log_interval=2, eval_interval=3,
            max_iters=7, device="cpu", plot=False)


@pytest.fixture(scope="module")
def data(demo):
    return demo


def config(data, out_dir, **more):
    return train.TrainConfig.arm(
        "gsa", **TINY | dict(data=data, out_dir=str(out_dir), attention="gsa") | more)


def command(data, out_dir, *flags):
    """The arguments of a run with the settings of config()."""
    tiny = [f"--{name}={value}" for name, value in TINY.items()]
    return [*tiny, f"--data={data}", f"--out_dir={out_dir}", *flags]


def new_run(data, out_dir, **more):
    run = train.Run(config(data, out_dir, **more), Ranks("cpu"), train.StopSignal())
    run.prepare()
    return run


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The out_dir of a run of seven steps, saved at 3, 6 and 7; all three are kept."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    train.train(config(data, folder, keep=3))
    return folder


@pytest.fixture
def out(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "out")


def assert_same_run(a, b):
    """Weights, V̄, optimizer state, step and counts, bit for bit."""
    a, b = load_checkpoint(str(a)), load_checkpoint(str(b))
    for part in ("model", "optimizer"):
        assert_same_tensors(a[part], b[part])
    assert a["step"] == b["step"] and a["stability"] == b["stability"]


def without_times(out_dir):
    return [{k: v for k, v in r.items() if "second" not in k}
            for r, _ in read_log(os.path.join(out_dir, "log.jsonl"))]


def tiny_run(step):
    """Tensors and run.json of a made-up checkpoint."""
    run = {**load_run(), "step": step}
    return {"model": {"w": torch.full((3,), float(step))}, "optimizer": {}}, run


def load_run():
    meta = {"dataset": "d", "source": "s", "source_files": "", "tokenizer": "bytes",
            "vocabulary": "", "vocab_size": 257, "separator": 256, "dtype": "uint16", "flags": {},
            "complete": True, "counts": {},
            "train": {"documents": 0, "tokens": 0, "bytes": 0, "files": []},
            "val": {"documents": 0, "tokens": 0, "bytes": 0, "files": []}}
    return {"step": 1, "config": {"data": "d"}, "model_config": {}, "meta": meta}


def save_tiny(folder, step, keep=2):
    tensors, run = tiny_run(step)
    save_checkpoint(str(folder), tensors, run, keep)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_n_checkpoints_and_the_best_are_kept(tmp_path, keep):
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: math.nan, 50: 2.5, 60: 1.5}
    for step, loss in losses.items():
        save_tiny(tmp_path, step, keep)
        record_loss(str(tmp_path), step, loss)
    wanted = sorted({20, *sorted(losses)[-keep:]}, reverse=True)
    assert list(checkpoint_folders(str(tmp_path))) == wanted
    assert load_checkpoint(str(tmp_path), "best")["model"]["w"][0] == 20
    assert load_checkpoint(str(tmp_path))["model"]["w"][0] == 60
    with pytest.raises(UserError, match=r"no checkpoint '7' in .* \(its steps: 60, "):
        load_checkpoint(str(tmp_path), "7")


def test_a_kill_at_any_instant_of_a_save_leaves_the_old_or_the_new_checkpoint(
        tmp_path, monkeypatch):
    """Every call that changes the disk is the last one once, before and after it happens."""
    class Killed(BaseException):
        pass

    def kill_at(n, after):
        """Die at the n-th change. Returns the number of changes seen so far, in a list."""
        seen = [0]

        def dying(real):
            def call(*args, **kwargs):
                seen[0] += 1
                if seen[0] == n and not after:
                    raise Killed
                result = real(*args, **kwargs)
                if seen[0] == n:
                    raise Killed
                return result
            return call
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "makedirs"),
                            (checkpoint, "save_tensors"), (os, "unlink"), (os, "rmdir")):
            monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
        # a killed process tidies nothing up
        monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)
        return seen

    for step in (1, 2):
        save_tiny(tmp_path / "before", step, keep=1)
    seen_states = set()
    for after in (False, True):
        n = 0
        while True:
            n += 1
            folder = shutil.copytree(tmp_path / "before", tmp_path / f"{after}{n}")
            with monkeypatch.context() as m:
                monkeypatch = m
                seen = kill_at(n, after)
                try:
                    save_tiny(folder, 3, keep=1)
                except Killed:
                    pass
            found = load_checkpoint(str(folder))
            assert found["model"]["w"][0] == found["step"]
            seen_states.add(found["step"])
            save_tiny(folder, 4, keep=1)  # the next save is none the wiser
            assert load_checkpoint(str(folder))["step"] == 4
            assert not list(folder.glob("*4.partial"))
            if seen[0] < n:
                break
        assert n > 8
    assert seen_states == {2, 3}


def damage(rng, path):
    """Damage a file in a random way. Returns what was done."""
    raw = path.read_bytes()
    kind = rng.choice(["flip a bit", "cut", "empty", "gone", "longer"])
    if kind == "flip a bit":
        at = rng.randrange(len(raw))
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1:])
    elif kind == "cut":
        path.write_bytes(raw[:rng.randrange(len(raw))])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "longer":
        path.write_bytes(raw + b"x")
    else:
        path.unlink()
    return kind


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(
        out, tmp_path, capsys, seed):
    rng = random.Random(seed)
    path = rng.choice(sorted((out / "step_00000007").iterdir()))
    kind = damage(rng, path)
    if path.name == "manifest.json" and kind == "flip a bit":
        try:  # a flipped bit in its list of losses or of blanks may do no harm
            checkpoint.check_files(str(path.parent))
            return
        except ValueError:
            pass
    assert load_model(str(out))[1]["step"] == 6
    assert f"step_00000007: {path.name}" in capsys.readouterr().out
    for name in ("step_00000006", "step_00000003"):
        (out / name / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint can be read. .*_00000007.*_00000003"):
        load_checkpoint(str(out))


def test_after_damage_a_run_repeats_what_was_lost_and_sets_the_damaged_checkpoint_aside(
        data, out, trained):
    raw = bytearray((out / "step_00000007/model.safetensors").read_bytes())
    raw[-1] ^= 1
    (out / "step_00000007/model.safetensors").write_bytes(raw)
    train.main(command(data, out, "--init_from=auto", "--keep=3"))
    assert_same_run(out, trained)
    assert without_times(out) == without_times(trained)
    assert (out / "step_00000007.damaged/model.safetensors").read_bytes() == raw


def test_a_folder_without_a_checkpoint_is_one_line(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="there is no checkpoint in"):
            load_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["../../secret.json", "/etc/passwd", "a/b.json", "model.pkl"])
def test_a_manifest_that_names_other_files_is_refused(out, name):
    path = out / "step_00000007/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": 1, "xxh3": ""}
    path.write_text(json.dumps(manifest))
    assert load_checkpoint(str(out))["step"] == 6


# ---- stopping and going on

@pytest.mark.parametrize("number,status", [(signal.SIGTERM, None), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [0, 2, 4, 6])
def test_a_signal_saves_and_the_same_command_goes_on_bit_for_bit(
        data, trained, tmp_path, monkeypatch, capsys, number, status, step):
    """Step 2 is in the warm-up, 4 in the sparse phase, 3 and 6 are evaluated anyway."""
    optimize = train.Run.optimize

    def interrupted(self):
        if self.step == step:
            os.kill(os.getpid(), number)
        optimize(self)
    repeat = command(data, tmp_path, "--init_from=auto", "--keep=3")
    with monkeypatch.context() as m:
        m.setattr(train.Run, "optimize", interrupted)
        if status:
            with pytest.raises(SystemExit) as e:
                train.main(repeat)
            assert e.value.code == status
        else:
            train.main(repeat)
    assert load_checkpoint(str(tmp_path))["step"] == step + 1
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("stopped")]
    assert lines == [f"stopped at step {step + 1}, the last checkpoint in {tmp_path} is that of "
                     f"step {step + 1}"]
    train.main(repeat)
    assert_same_run(tmp_path, trained)


def test_a_signal_during_the_evaluation_ends_the_run_without_it(data, trained, tmp_path,
                                                                monkeypatch):
    evaluation = train.Batches.evaluation

    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluation(self, *args)
    repeat = command(data, tmp_path, "--init_from=auto", "--eval_iters=3", "--keep=3")
    with monkeypatch.context() as m:
        m.setattr(train.Batches, "evaluation", interrupted)
        train.main(repeat)
    assert load_checkpoint(str(tmp_path))["step"] == 3
    assert not [r for r in without_times(tmp_path) if r["kind"] == "eval"]
    train.main(repeat)
    assert [r["step"] for r in without_times(tmp_path) if r["kind"] == "eval"] == [3, 6, 7]


def test_scripts_end_with_the_status_that_a_scheduler_expects(data, tmp_path):
    """The command line: SIGTERM and Ctrl-C, one line each; auto goes on."""
    program = [sys.executable, str(ROOT / "train.py")]
    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        run = subprocess.Popen(
            [*program, *command(data, tmp_path / "out", "--init_from=auto", "--max_iters=100000")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in run.stdout:
            if line.startswith("step"):
                break
        run.send_signal(number)
        rest, errors = run.communicate(timeout=60)
        assert run.returncode == status
        assert rest.splitlines()[-1].startswith("stopped at step ") and errors == ""
    assert load_checkpoint(str(tmp_path / "out"))["step"] >= 2


def test_auto_begins_anew_where_a_run_ended_before_its_first_checkpoint(data, tmp_path):
    repeat = command(data, tmp_path / "out", "--init_from=auto", "--max_iters=1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.jsonl").write_text('{"kind": "train", "step": 1, "loss": 5}\n')
    (tmp_path / "out/config.json").write_text("{}")
    train.main(repeat)
    assert load_checkpoint(str(tmp_path / "out"))["step"] == 1
    assert len([r for r in without_times(tmp_path / "out") if r["kind"] == "train"]) == 1


def test_auto_leaves_a_folder_of_the_users_alone(data, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="holds a run already"):
        train.main(command(data, tmp_path, "--init_from=auto"))
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'


def test_a_changed_setting_is_refused_by_auto_too(data, out):
    with pytest.raises(UserError, match="batch_size 2 → 3"):
        train.main(command(data, out, "--init_from=auto", "--batch_size=3"))


# ---- steps that are skipped, and spikes

def poison(monkeypatch, steps):
    """Make one gradient NaN in these steps."""
    clip = train.Run.clip_gradients

    def poisoned(self):
        if self.step + 1 in steps:
            self.raw.blocks[0].attn.wq.weight.grad[0, 0] = math.nan
        return clip(self)
    monkeypatch.setattr(train.Run, "clip_gradients", poisoned)


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_is_counted(
        data, tmp_path, monkeypatch, muon, step):
    poison(monkeypatch, {step})
    run = new_run(data, tmp_path, muon=muon, log_interval=1000)
    for _ in range(step - 1):
        run.optimize()
    before = {n: x.clone() for n, x in run.raw.state_dict().items()}
    state = {n: x.clone() for n, x in train.optimizer_tensors(run.optimizers, run.raw).items()}
    run.optimize()
    after = train.optimizer_tensors(run.optimizers, run.raw)
    assert_same_tensors(run.raw.state_dict(), before)
    if state:
        assert_same_tensors(after, state)
    assert all(torch.isfinite(x).all() for x in after.values())
    run.optimize()
    assert not torch.equal(run.raw.embed.weight, before["embed.weight"])
    assert run.count_steps()["skipped"] == 1


def test_skipped_steps_in_a_row_end_the_run_and_others_do_not(data, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 4, 5})
    train.train(config(data, tmp_path / "a", max_skips=3))
    assert load_checkpoint(str(tmp_path / "a"))["stability"]["skipped"] == 3
    with pytest.raises(UserError, match="not finite in 2 steps in a row, the last is step 5: .*"
                                        "the last checkpoint in .* is that of step 3"):
        train.train(config(data, tmp_path / "b", max_skips=2))


def test_a_step_that_is_not_logged_never_waits_for_the_device(data, tmp_path, monkeypatch):
    """
    In warm-up (steps 1, 2) and behind it (4). Two things are left out: the batch, whose ids are
    checked in host memory, and the selection of the PyTorch path, which no GPU uses.
    """
    def uncounted(function):
        def call(*args):
            with torch.utils._python_dispatch._disable_current_modes():
                return function(*args)
        return call
    monkeypatch.setattr(train.Batches, "train", uncounted(train.Batches.train))
    monkeypatch.setattr(attention, "select", uncounted(attention.select))
    run = new_run(data, tmp_path, log_interval=1000, muon=True)
    for step in range(5):
        with HostSyncs() as syncs:
            run.optimize()
        if step in (1, 2, 4):
            assert syncs.count == 0, step


def test_a_spike_lies_seven_deviations_above_the_mean_before_it():
    """Twenty losses of 1 and 3: mean 2, deviation 1. The limit is 9."""
    for loss, spike in ((8.99, False), (9.01, True)):
        stability = Stability()
        for _ in range(10):
            assert not stability.observe(1.0, False)
            assert not stability.observe(3.0, False)
        assert stability.observe(loss, False) == spike
        assert stability.spikes == spike
    early = Stability()
    for _ in range(19):
        early.observe(1.0, False)
    assert not early.observe(1e9, False)  # too few losses to compare with
    assert not early.observe(math.nan, True)
    assert (early.skipped, early.in_a_row, early.spikes) == (1, 1, 0)
    early.observe(1.0, False)
    assert (early.skipped, early.in_a_row) == (1, 0)


def test_counts_survive_a_checkpoint():
    stability = Stability()
    rng = random.Random(0)
    for i in range(1500):
        stability.observe(rng.random() + 100 * (i % 97 == 50), i % 50 == 7)
    again = Stability(**json.loads(configurator.to_json(stability.state())))
    for i in range(300):
        loss = rng.random() + 100 * (i % 97 == 50)
        assert stability.observe(loss, False) == again.observe(loss, False)
    assert stability.state() == again.state() and stability.spikes > 0
