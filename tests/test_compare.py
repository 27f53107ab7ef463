"""eval.py --compare: arms and their seeds in one table, fair or not at all."""
import json
import math
import re
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

import eval as evaluation
import pictures
import train
from compare import SIGNS, compare, difference, mean_and_std, plus_minus
from configurator import UserError, parse
from model import ARMS

def find_part(name):
    """A part whose results are their own summaries."""
    return SimpleNamespace(summary=lambda result: result)


def write_run(folder, arm="dense", seed=1, needle=0.5, bits=1.0, changes=None, config=None):
    """
    An eval.json as eval.py writes it. changes: facts of the model, or settings of the needles, that
    differ; config: settings of the training.
    """
    settings = asdict(train.TrainConfig.arm(arm, attention=arm, seed=seed, block_size=512))
    facts = {"step": 100, "arm": arm, "seed": seed, "tokens_seen": 409_600, "data": "data/demo",
             "data_checksum": "0123456789abcdef", "vocabulary": "bytes", "parameters": 1000,
             "gates_and_indexer": 0, "config": settings | (config or {})}
    if arm == "gsa":
        facts |= {"parameters": 1300, "gates_and_indexer": 300}
    measured = {"lengths": "512", "samples": 10, "checkpoint": "last", "backend": "auto"}
    for name, value in (changes or {}).items():
        (measured if name in measured else facts)[name] = value
    results = {"needle": {"accuracy": needle}, "perplexity": {"bits_per_byte": bits}}
    folder.mkdir()
    (folder / "eval.json").write_text(json.dumps({
        "model": facts, "results": results,
        "settings": {"needle": measured, "perplexity": {"max_tokens": 0}}}))
    return str(folder)


# ---- the numbers

def test_arms_of_three_and_two_seeds_by_hand(tmp_path, capsys):
    """
    dense 0.1 0.2 0.3: mean 0.2, std √(0.02 / 2) = 0.1. gsa 0.5 0.7: mean 0.6, std √(0.02 / 1).
    The difference 0.4 has the error √(0.01 / 3 + 0.02 / 2) = 0.1155, and 0.4 > 2 · 0.1155.
    Bits per byte: dense 1 2 3, gsa 3 4: the difference 1.5 ± √(1 / 3 + 0.5 / 2) = 0.764.
    """
    folders = [write_run(tmp_path / f"dense_{i}", "dense", i, i / 10, i) for i in (1, 2, 3)]
    folders += [write_run(tmp_path / "gsa_1", "gsa", 1, 0.5, 3.0),
                write_run(tmp_path / "gsa_2", "gsa", 2, 0.7, 4.0)]
    table = compare(folders, find_part, plot=False)
    assert [arm["name"] for arm in table["arms"]] == ["dense", "gsa"]
    assert [arm["seeds"] for arm in table["arms"]] == [[1, 2, 3], [1, 2]]
    dense, gsa = table["numbers"]["accuracy"]["arms"]
    assert (dense["n"], gsa["n"]) == (3, 2)
    assert (dense["mean"], dense["std"]) == pytest.approx((0.2, 0.1))
    assert (gsa["mean"], gsa["std"]) == pytest.approx((0.6, math.sqrt(0.02)))
    assert gsa["difference"] == pytest.approx(0.4)
    assert gsa["standard_error"] == pytest.approx(math.sqrt(0.01 / 3 + 0.02 / 2))
    assert gsa["beyond_two"] is True
    _, gsa = table["numbers"]["bits_per_byte"]["arms"]
    assert gsa["difference"] == pytest.approx(1.5)
    assert gsa["standard_error"] == pytest.approx(math.sqrt(1 / 3 + 0.5 / 2))
    assert gsa["beyond_two"] is False
    # what is printed and written, into the first folder
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert rows["accuracy"] == ["0.20 ± 0.10", "0.60 ± 0.14 *"]
    assert rows["bits per byte"] == ["2.0 ± 1.0", "3.50 ± 0.71"]
    assert rows["seeds"] == ["3", "2"]
    assert rows["parameters"] == ["1,000", "1,300"]
    assert rows["of them gates and indexer"] == ["0", "300"]
    # beside the heading and its rule: nothing else differs
    assert len(rows) == 7
    assert "Equal in all runs: tokens seen 409,600, other parameters 1,000, block size 512" in text
    assert rows_of((tmp_path / "dense_1/compare.md").read_text()) == rows
    assert json.loads((tmp_path / "dense_1/compare.json").read_text()) == table


def rows_of(text):
    """{first cell: other cells} of a Markdown table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(line) for line in lines}) == 1  # the columns stand below each other
    return {first: rest for first, *rest in cells}


def test_one_seed_has_no_deviation_and_its_difference_no_error(tmp_path, capsys):
    folders = [write_run(tmp_path / "a", "dense", 1, 0.25), write_run(tmp_path / "b", "gsa", 1, 1),
               write_run(tmp_path / "c", "gsa", 2, 1)]
    table = compare(folders, find_part, plot=False)
    dense, gsa = table["numbers"]["accuracy"]["arms"]
    assert (dense["n"], dense["std"]) == (1, None)
    assert (gsa["standard_error"], gsa["beyond_two"]) == (None, None)
    text = capsys.readouterr().out
    assert rows_of(text)["accuracy"] == ["0.25", "1 ± 0"]
    assert "An arm of one seed has no standard deviation" in text


def test_a_number_that_an_arm_lacks_is_left_out(tmp_path, capsys):
    """Recall of an arm without an indexer; a perplexity beyond floats, which is null."""
    a = write_run(tmp_path / "a", "dense", bits=None)
    b = write_run(tmp_path / "b", "gsa")
    content = json.loads((tmp_path / "b/eval.json").read_text())
    content["results"]["needle"]["recall"] = 0.9
    (tmp_path / "b/eval.json").write_text(json.dumps(content))
    compare([a, b], find_part, plot=False)
    rows = rows_of(capsys.readouterr().out)
    assert rows["recall"] == ["–", "0.9"]
    assert rows["bits per byte"] == ["–", "1"]


def test_a_seed_that_lacks_a_number_is_told(tmp_path, capsys):
    """The perplexity of a run that diverged is null. The mean is that of the others."""
    folders = [write_run(tmp_path / f"{i}", "gsa", i, bits=bits)
               for i, bits in enumerate((1.0, None, 2.0))]
    compare(folders, find_part, plot=False)
    rows = rows_of(capsys.readouterr().out)
    assert rows["bits per byte"] == ["1.50 ± 0.71 (2 of 3)"]
    assert rows["accuracy"] == ["0.5 ± 0"]


def test_equal_arms_get_a_star_as_often_as_the_note_says():
    """The shares beyond 2 of Student's t: of normal numbers, two arms of n seeds each."""
    rng = np.random.default_rng(0)
    for n, share in ((2, 0.18), (3, 0.12), (5, 0.08)):
        assert f"{share:.0%}".replace("%", " %") in SIGNS
        stars = 0
        for values in rng.standard_normal((2000, 2, n)):
            arm, first = (mean_and_std(list(numbers)) for numbers in values)
            stars += difference(arm, first)["beyond_two"]
        assert stars / 2000 == pytest.approx(share, abs=0.025)  # 3 standard deviations


def test_settings_in_which_arms_differ_are_shown(tmp_path, capsys):
    """A dense arm with another learning rate is compared, but not silently."""
    folders = [write_run(tmp_path / "a", "dense", config=dict(learning_rate=1e-3)),
               write_run(tmp_path / "b", "gsa", config=dict(learning_rate=3e-3)),
               write_run(tmp_path / "c", "gated", config=dict(learning_rate=3e-3))]
    table = compare(folders, find_part, plot=False)
    rows = rows_of(capsys.readouterr().out)
    assert table["settings"] == {"learning_rate": [1e-3, 3e-3, 3e-3]}
    assert rows["learning_rate"] == ["0.001", "0.003", "0.003"]
    assert "value_gate" not in rows and "attention" not in rows


def test_a_table_of_four_arms_and_three_seeds_has_at_most_120_columns(tmp_path, capsys):
    folders = []
    for arm in ARMS:
        for seed in (1, 2, 3):
            folder = tmp_path / f"{arm}_{seed}"
            bits = 1.23456 + len(arm) / 7 + seed / 300
            folders.append(write_run(folder, arm, seed, seed / 700 + len(arm), bits))
            content = json.loads((folder / "eval.json").read_text())
            numbers = content["results"]["needle"]
            numbers["needle_multiquery_accuracy_at_32768"] = seed / 7
            (folder / "eval.json").write_text(json.dumps(content))
    compare(folders, find_part, plot=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert max(map(len, lines)) <= 120
    assert max(line.count(" *") for line in lines) == 2


# ---- what is an arm

def test_runs_that_differ_in_seed_folder_and_machine_are_one_arm(tmp_path):
    other = dict(out_dir="out/x", device="cuda", plot=False, log_interval=1, data="/mnt/demo")
    a = write_run(tmp_path / "a", "gsa", 1, config=dict(init_from="auto"))
    b = write_run(tmp_path / "b", "gsa", 2, config=dict(init_from="resume", **other))
    table = compare([a, b], find_part, plot=False)
    assert [arm["folders"] for arm in table["arms"]] == [[a, b]]


def test_arms_of_one_name_are_told_apart_by_what_they_differ_in(tmp_path):
    a = write_run(tmp_path / "a", "gsa", 1, config=dict(k_base=64))
    b = write_run(tmp_path / "b", "gsa", 1, config=dict(k_base=96))
    c = write_run(tmp_path / "c", "gsa", 1, config=dict(k_base=96, init_from="auto:hf:x"))
    d = write_run(tmp_path / "d", "dense", 1)
    table = compare([a, b, c, d], find_part, allow_unequal=True, plot=False)
    names = [arm["name"] for arm in table["arms"]]
    assert names == ["gsa k_base=64 start=", "gsa k_base=96 start=", "gsa k_base=96 start=hf:x",
                     "dense"]


def test_one_seed_given_twice_is_refused(tmp_path):
    """It would make the deviation over seeds too small."""
    a, b = (write_run(tmp_path / name, "gsa", 7) for name in "ab")
    with pytest.raises(UserError, match=f"{a} and {b} are one arm with the same seed 7"):
        compare([a, b], find_part, plot=False)


# ---- fair or not

@pytest.mark.parametrize("changes,config,reason,marked", [
    (dict(tokens_seen=819_200), {}, "tokens seen 409,600 in A, 819,200 in B", "tokens seen"),
    (dict(parameters=2300), {}, "other parameters 1,000 in A, 2,000 in B", "other parameters"),
    (dict(data_checksum="fedcba98"), {}, "data data/demo (checksum 01234567) in A, "
     "data/demo (checksum fedcba98) in B", "data"),
    (dict(vocabulary="gpt2"), {}, "vocabulary bytes in A, gpt2 in B", "vocabulary"),
    # the tokens that a retrofit has seen are not all of its tokens
    ({}, dict(init_from="auto:hf:x"), "start random weights in A, trained weights in B", "start"),
    ({}, dict(block_size=1024), "block size 512 in A, 1,024 in B", "block size"),
    (dict(samples=3), {}, "needle: samples 10 in A, 3 in B", "accuracy"),
    (dict(lengths="256"), {}, "needle: lengths '512' in A, '256' in B", "accuracy"),
])
def test_an_unfair_comparison_is_refused_or_marked(changes, config, reason, marked, tmp_path,
                                                   capsys):
    a = write_run(tmp_path / "a", "dense")
    b = write_run(tmp_path / "b", "gsa", changes=changes, config=config)
    reason = reason.replace("in A", f"in {a}").replace("in B", f"in {b}")
    with pytest.raises(UserError) as error:
        compare([a, b], find_part, plot=False)
    assert str(error.value) == (f"not a fair comparison: {reason} (--unequal compares all the "
                                "same)")
    assert not (tmp_path / "a/compare.md").exists()
    table = compare([a, b], find_part, allow_unequal=True, plot=False)
    text = capsys.readouterr().out
    labels = [label for label in rows_of(text) if "≠" in label]
    assert labels == [f"≠ {marked}"]
    (name, values), = table["unequal"].items()
    assert f"≠ {name}: {a} {values[a]}, {b} {values[b]}" in " ".join(text.split())
    assert values[a] != values[b]


def test_a_difference_that_the_first_arm_says_nothing_of_is_marked_too(tmp_path, capsys):
    """A resumed run does not say how it began."""
    folders = [write_run(tmp_path / arm, arm, config=dict(init_from=start))
               for arm, start in (("dense", "resume"), ("gated", "scratch"), ("gsa", "hf:x"))]
    compare(folders, find_part, allow_unequal=True, plot=False)
    rows = rows_of(capsys.readouterr().out)
    assert rows["≠ start"] == ["–", "random weights", "trained weights"]


def test_of_many_differences_three_are_named(tmp_path):
    a = write_run(tmp_path / "a")
    many = dict(tokens_seen=1, parameters=1, vocabulary="gpt2", data_checksum="1", samples=1)
    b = write_run(tmp_path / "b", changes=many)
    with pytest.raises(UserError, match="tokens seen .*; other parameters .*; vocabulary .*; and 2"
                                        " more"):
        compare([a, b], find_part, plot=False)


def test_gates_indexer_and_backend_may_differ(tmp_path):
    a = write_run(tmp_path / "a", "dense")
    b = write_run(tmp_path / "b", "gsa", changes=dict(backend="torch"))
    assert compare([a, b], find_part, plot=False)["unequal"] == {}


def test_a_resumed_run_may_have_begun_as_the_others_did(tmp_path):
    """Its settings do not say how it began."""
    a = write_run(tmp_path / "a", "dense", config=dict(init_from="hf:x"))
    b = write_run(tmp_path / "b", "gsa", config=dict(init_from="resume"))
    assert compare([a, b], find_part, plot=False)["unequal"] == {}


def test_runs_of_other_lengths_are_no_seeds_of_one_arm(tmp_path):
    a = write_run(tmp_path / "a", "gsa", 1)
    b = write_run(tmp_path / "b", "gsa", 2, changes=dict(step=200, tokens_seen=819_200))
    table = compare([a, b], find_part, allow_unequal=True, plot=False)
    assert [arm["name"] for arm in table["arms"]] == ["gsa step=100", "gsa step=200"]


@pytest.mark.parametrize("content,message", [
    (None, "eval.json is missing: python eval.py --out_dir="),
    ("{", "eval.json is damaged: python eval.py --out_dir="),
    ({"results": {}}, "is of another version (it lacks 'settings'): python eval.py --out_dir="),
    ("another", "is of another version (ValueError could not convert string to float: 'old' in "
                "needle): python eval.py --out_dir="),
])
def test_a_folder_without_a_readable_evaluation_names_the_command(content, message, tmp_path):
    a, b = (write_run(tmp_path / name, seed=i) for i, name in enumerate("ab"))
    path = tmp_path / "b/eval.json"
    if content is None:
        path.unlink()
    elif content == "another":
        old = json.loads(path.read_text())
        path.write_text(json.dumps(old | {"results": {"needle": {"accuracy": "old"}}}))
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        compare([a, b], find_part, plot=False)
    assert f"--out_dir={b}" in str(error.value) and "\n" not in str(error.value)


def test_one_folder_is_no_comparison(tmp_path):
    with pytest.raises(UserError, match="needs two folders or more"):
        compare([write_run(tmp_path / "a")], find_part, plot=False)


def test_the_curves_of_an_arm_have_one_colour_and_one_label():
    plt = pytest.importorskip("matplotlib.pyplot")
    logs = [[{"kind": kind, "step": step, "loss": i + step / 10} for step in (1, 2, 3)
             for kind in ("train", "eval")] for i in range(3)]
    figure = pictures.draw_comparison(plt, {"dense": logs[:2], "gsa": logs[2:]})
    for axes in figure.axes:
        lines = axes.get_lines()
        assert [line.get_ydata().tolist() for line in lines] == [
            [i + 0.1, i + 0.2, i + 0.3] for i in range(3)]
        assert [line.get_color() for line in lines] == ["C0", "C0", "C1"]
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["dense, seeds: 2", "gsa, seeds: 1"]
    plt.close(figure)


# ---- settings that are lists

@dataclass
class Settings:
    folders: list = field(default_factory=list)
    flag: bool = False
    count: int = 1


@pytest.mark.parametrize("args,folders", [
    (["--folders", "a", "b", "--flag"], ["a", "b"]),
    (["--folders=a"], ["a"]),
    (["--folders=a", "b", "--count", "1"], ["a", "b"]),
    (["--flag", "--folders", "a"], ["a"]),
])
def test_a_list_takes_the_arguments_up_to_the_next_flag(args, folders):
    assert parse(Settings, args)["folders"] == folders


def test_a_list_ends_before_a_config_file_and_is_never_empty(tmp_path):
    config = tmp_path / "c.py"
    config.write_text("count = 3\n")
    assert parse(Settings, ["--folders", "a", str(config)]) == {"folders": ["a"], "count": 3}
    config.write_text('folders = ["x", "y"]\n')
    assert parse(Settings, [str(config)]) == {"folders": ["x", "y"]}
    with pytest.raises(UserError, match="--folders needs a value"):
        parse(Settings, ["--folders", "--flag"])
    config.write_text("folders = 3\n")
    with pytest.raises(UserError, match="folders must be of type list"):
        parse(Settings, [str(config)])


# ---- end to end

def test_two_trained_runs_are_evaluated_and_compared(demo, tmp_path, capsys):
    """By the command line. A run of more steps is refused."""
    tiny = dict(n_layer=1, n_head=2, n_kv_head=1, n_embd=16, block_size=64, n_index_head=2,
                d_index=8, k_base=12, k_min=4, k_max=16, batch_size=2, grad_accum=2, max_iters=3,
                index_warmup_iters=1, eval_iters=1, plot=False, device="cpu")
    folders = []
    for arm in ("dense", "gsa"):
        folders.append(str(tmp_path / arm))
        cfg = train.TrainConfig.arm(arm, **tiny, attention=arm, data=demo, out_dir=folders[-1])
        train.train(cfg)
        evaluation.main([f"--out_dir={folders[-1]}", "--max_tokens=200", "--samples=1",
                         "--seeds=1", "--depths=1", "--lengths=64", "--attention_windows=1",
                         "--plot=false"])
    capsys.readouterr()
    evaluation.main(["--compare", *folders])
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert "tokens seen 768," in printed  # 3 steps of 2 · 2 windows of 64 tokens
    dense, gsa = (int(cell.replace(",", "")) for cell in rows["parameters"])
    assert int(rows["of them gates and indexer"][1]) == gsa - dense
    for name in ("bits per byte", "needle accuracy at 64", "first token share",
                 "skipped steps", "index recall"):
        assert name in rows
    if "matplotlib is not installed" not in printed:
        assert (tmp_path / "dense/compare.png").read_bytes().startswith(b"\x89PNG")
    # an evaluation of other needles is no longer comparable, and its numbers replace the old
    evaluation.main([f"--out_dir={folders[1]}", "--max_tokens=200", "--samples=1", "--seeds=1",
                     "--depths=1", "--lengths=48", "--attention_windows=1", "--plot=false"])
    summary = json.loads((tmp_path / "gsa/eval.json").read_text())["summary"]
    assert "needle_accuracy_at_48" in summary and "needle_accuracy_at_64" not in summary
    with pytest.raises(UserError, match="needle: lengths '64' in .*dense, '48' in .*gsa"):
        evaluation.main(["--compare", *folders])


@pytest.mark.parametrize("average, std, expected", [
    (0.9675, 0.0183, "0.968 ± 0.018"), (18730.2, 412.6, "18,730 ± 413"),
    (-2.5, 0.2887, "-2.50 ± 0.29"), (502290, 0, "502,290 ± 0"), (0.25, None, "0.25"),
    (18730.2, None, "18,730")])
def test_an_average_is_shown_to_the_place_of_its_deviation(average, std, expected):
    assert plus_minus(average, std) == expected
