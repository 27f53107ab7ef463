"""study.py and claims.py: what is run, what is kept, and that the README says what was measured."""
import json
import re
from pathlib import Path

import numpy as np
import pytest

import claims
import pictures
import records
import study
import variants
from claims import Claim
from configurator import UserError, parse
from stability import Stability
from variants import Variant

ROOT = Path(__file__).parent.parent


def config(**settings):
    return study.StudyConfig(**settings)


# ---- the README

def test_readme_says_what_the_files_of_results_hold():
    """`python study.py --table` after a change of results/ or of the claims mends it."""
    results = claims.read_results(str(ROOT / "results"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert claims.replace_list(readme, claims.list_of_claims(results)) == readme
    tables = (ROOT / "results/tables.md").read_text(encoding="utf-8")
    assert tables == claims.tables_of_parts(results)
    # the table of its first page, too
    numbers = re.findall(r"[\d.,]+ ± [\d.,]+(?= \|)", readme.partition("\n## ")[0])
    assert len(numbers) >= 10 and all(f" {number} " in tables for number in numbers)
    plain = " ".join(readme.split())
    for claim in claims.CLAIMS:
        assert claim.text[:-1] in plain


def test_the_parts_that_a_claim_names_measure_both_of_its_sides():
    for claim in claims.CLAIMS:
        runs = {name for name, _ in study.asked_for(config(only=claim.parts))}
        sides = {claim.variant, claim.than}
        if claim.variant == "gsa, AdamW":
            sides = {f"{side.partition(',')[0]}-{rate}" for side in sides for rate in claims.RATES}
        assert sides <= runs, claim
        assert claim.wanted in ("less", "more") and claim.source in ("paper", "ours", "later")
    assert {table.part for table in claims.TABLES} == set(variants.PARTS)


# ---- the verdict

def result(variant, seed, **numbers):
    return {"variant": variant, "seed": seed, "broke_down": "", "config": {}, "numbers": numbers}


def results_of(**values):
    """values: {variant: [its number by seed]}"""
    return {variant: [result(variant, seed, x=x) for seed, x in enumerate(found)]
            for variant, found in values.items()}


@pytest.mark.parametrize("a, wanted, expected", [
    ([0.1, 0.2, 0.3], "less", "**holds**"),
    ([0.1, 0.2, 0.3], "more", "**does not hold**"),
    ([0.4, 0.5, 0.6], "less", "cannot be seen at this scale"),
    ([0.1, 0.2], "less", ""),
])
def test_a_verdict_needs_two_standard_errors_and_three_seeds(a, wanted, expected):
    """
    b is 0.5 ± 0.1, n = 3. Each side's error² is 0.01 / 3, that of the difference 0.00667, two
    standard errors are 0.163: 0.2 ± 0.1 lies beyond, 0.5 does not, and two seeds are too few.
    """
    claim = Claim("a has less", "ours", "x", "x", "a", wanted, "b", "arms")
    found = claims.compared(claim, results_of(a=a, b=[0.4, 0.5, 0.6]))
    assert claims.verdict(claim, found) == expected


@pytest.mark.parametrize("least_std, expected", [
    (0.0, "**holds**"), (0.1, "**holds**"), (0.14, "cannot be seen at this scale")])
def test_a_number_seen_in_steps_has_a_least_deviation(least_std, expected):
    """Sides of equal seeds, 0.2 apart. 2 · √(2 · least_std² / 3) is 0.163 and 0.229."""
    claim = Claim("a has less", "ours", "x", "x", "a", "less", "b", "arms", least_std)
    found = claims.compared(claim, results_of(a=[0.3] * 3, b=[0.5] * 3))
    assert claims.verdict(claim, found) == expected


def test_largest_rate_by_hand():
    """
    Every arm but gsa trains at all rates but 3e-2, where it broke down. gsa's loss at 3e-3 is
    within a tenth of its best, 1.0 at 1e-3; at 1e-2 it is not, and at 3e-2 it is not finite.
    Spikes count at the rates that train in every arm: (3 + 4) / 2. Seed 2 is not complete.
    """
    measured = {"1e-3": (1.0, 3), "3e-3": (1.05, 4), "1e-2": (1.2, 9)}
    results = {}
    for arm in claims.ARMS:
        for rate, (loss, spikes) in measured.items():
            loss = loss if arm == "gsa" else 1.0
            results[f"{arm}-{rate}"] = [
                result("", 1, loss=loss, spikes_within_50_per_1000_steps=spikes)]
        results[f"{arm}-3e-2"] = [result("", 1)]
    results["gsa-3e-2"] = [result("", 1, loss=None, spikes_within_50_per_1000_steps=0)]
    results["gsa-1e-3"].append(result("", 2, loss=0.5, spikes_within_50_per_1000_steps=0))
    (found,) = claims.largest_rates(results)["gsa, AdamW"]
    assert found["seed"] == 1
    assert found["numbers"]["log10_largest_rate"] == pytest.approx(-2.523, abs=1e-3)
    assert found["numbers"]["spikes"] == 3.5
    (found,) = claims.largest_rates(results)["dense, AdamW"]
    assert found["numbers"]["log10_largest_rate"] == pytest.approx(-2)
    assert found["numbers"]["spikes"] == 3.5


def test_rates_of_which_none_trains_have_no_number():
    results = {f"{arm}-{rate}": [result("", 1)] for arm in claims.ARMS for rate in claims.RATES}
    (found,) = claims.largest_rates(results)["gsa, AdamW"]
    assert found["numbers"] == {}


def test_seconds_of_a_resumed_training_are_those_of_all_its_processes():
    """Killed after 7 seconds, resumed from what it was after 4, killed after 2, and done in 3."""
    logged = [{"seconds": seconds} for seconds in (2.0, 4.0, 7.0, 1.0, 2.0, 1.5, 3.0)]
    assert records.all_seconds(logged) == 7 + 2 + 3


def test_spikes_of_a_short_run_are_counted_among_the_last_50_losses():
    """
    Losses fall from 5 to 1 in 100 steps, then lie at 1 ± 0.01 with a spike of 2. Among all losses
    2 is nothing; among the last 50 it is 0.5 / 0.01 deviations away.
    """
    losses = np.concatenate((np.linspace(5, 1, 100), 1 + 0.01 * np.cos(np.arange(200))))
    losses[250] = 2
    stability = Stability()
    assert sum(stability.observe(loss, skipped=False) for loss in losses) == 0
    assert records.recent_spikes(losses) == 1


def test_a_table_has_a_line_for_each_variant_that_was_measured():
    """A setting that a run leaves at its default is not in its file: 1,000 steps."""
    table = claims.Table("tiny", "", {"heading": "x"}, ("c", "a"))
    found = results_of(a=[0.1, 0.2, 0.3], b=[0.5], d=[1.0])
    found["b"][0]["config"] = {"max_iters": 7}
    found["a"][2] |= {"numbers": {}, "broke_down": "the loss is not finite"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "PARTS", {"tiny": {"a": None, "b": None}})
        lines = [[cell.strip() for cell in line.split("|")[1:-1]]
                 for line in claims.rows_of(table, found)]
    assert lines[0] == ["variant", "seeds", "steps", "heading"]
    assert lines[2:] == [["a", "3, 1 broke down", "1000", "0.150 ± 0.071"],
                         ["b", "1", "7", "0.5"]]


def test_pictures_are_drawn_of_what_there_is(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    figure = pictures.draw_groups(plt, {"x": {"a": [1.0, 2.0], "b": [3.0], "c": []}})
    heights = [line.get_ydata().tolist() for line in figure.axes[0].lines]
    assert [1.0, 2.0] in heights and [1.5] in heights and [] in heights
    figure = pictures.draw_against(plt, "k", (16, 32, 64), {"x": {"a": [[1.0, 3.0], [], [4.0]]}})
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[16, 2], [64, 4]]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").mkdir()
    claims.draw_pictures(results_of(gsa=[1.0]))
    assert (tmp_path / "assets/study_arms.png").stat().st_size > 1000


# ---- what is run

def test_everything_is_run_for_each_seed():
    assert {name for name, _ in study.asked_for(config())} == set(variants.VARIANTS) - {"demo"}
    assert ("gsa-yarn", 7) in study.asked_for(config(only="long", seeds="7"))


@pytest.mark.parametrize("asked, message", [
    (dict(only="arm"), "'arm'; did you mean 'arms'"),
    (dict(seeds="1-3"), "'1-3' is not a list"),
])
def test_what_cannot_be_run_is_named(asked, message):
    with pytest.raises(UserError, match=message):
        study.asked_for(config(**asked))


def test_flags_of_all_variants_are_settings_of_train_and_eval():
    import eval as evaluation
    for name, variant in variants.VARIANTS.items():
        found = study.Run(name, 1).config
        assert found["index_warmup_iters"] < found["max_iters"], name
        assert found["block_size"] in (512, 2048)
        if name in variants.PARTS["indexer"]:
            assert found["k_rule"] == "fixed", name
        for flags in variant.evaluations.values():
            parse(evaluation.EvalConfig, flags.split())


TINY = ("--n_embd=32 --n_head=2 --n_kv_head=1 --d_index=8 --n_index_head=1 --block_size=64 "
        "--k_base=8 --k_min=4 --k_max=16 --short_iters=0 --max_iters=4 --index_warmup_iters=2 "
        "--eval_iters=1 --log_interval=1")
MEASURED = {"": "--tasks=attention,stability --max_tokens=2000",
            "_at_32": "--tasks=attention --max_tokens=2000 --lengths=32"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the project to run a study in, whose variants are set by `plan`."""
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config").symlink_to(ROOT / "config")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(monkeypatch, **found):
    monkeypatch.setattr(study, "PARTS", {"tiny": found})
    monkeypatch.setattr(study, "VARIANTS", found)
    monkeypatch.setattr(study, "SEEDS", {"tiny": (3,)})


def test_a_study_keeps_its_runs_and_does_none_twice(folder, monkeypatch, capsys):
    plan(monkeypatch, b=Variant("", "a", False, MEASURED),
         a=Variant(f"{TINY} --data=data/demo_{{seed}}", evaluations=MEASURED),
         c=Variant(f"{TINY} --data=data/demo_{{seed}} --max_iters=3", "a", evaluations=MEASURED))
    study.main([])
    for name in "abc":
        found = json.loads((folder / f"results/{name}_3.json").read_text())
        assert (found["variant"], found["seed"], found["broke_down"]) == (name, 3, "")
        assert found["config"]["n_embd"] == 32
        assert len(found["log"]) >= 4
        assert found["loss_by_position"][-1][0] == 64
        for number in ("bits_per_byte", "bits_per_byte_text", "bits_per_byte_passkeys", "loss",
                       "index_recall", "first_token_share", "parameters", "tokens_per_second",
                       "bits_per_byte_at_32"):
            assert found["numbers"][number] > 0, number
    assert '"seed": 3,' in (folder / "data/demo_3/meta.json").read_text()
    # 1. what is done is not done again
    capsys.readouterr()
    study.main([])
    assert capsys.readouterr().out == "3 of 3 runs are done\n"
    # 2. a result that is lost is measured again, without another training
    for name in "ac":
        before = (folder / f"out/study/{name}_3/log.jsonl").read_text()
        (folder / f"results/{name}_3.json").unlink()
        study.main([])
        assert (folder / f"results/{name}_3.json").exists()
        assert (folder / f"out/study/{name}_3/log.jsonl").read_text() == before
    # 3. other settings are refused, with a result and without
    plan(monkeypatch, a=Variant(f"{TINY} --data=data/demo_{{seed}}", evaluations={"": "--again"}))
    with pytest.raises(UserError, match="a_3.json was evaluated with other settings"):
        study.main([])
    plan(monkeypatch, a=Variant(f"{TINY} --data=data/demo_{{seed}} --learning_rate=1e-2",
                                evaluations=MEASURED))
    with pytest.raises(UserError, match="a_3.json was trained with other settings .learning_rate"):
        study.main([])
    (folder / "results/a_3.json").unlink()
    with pytest.raises(UserError, match="out/study/a_3 was trained with other settings"):
        study.main([])


def test_only_a_loss_that_is_not_finite_is_a_breakdown(folder, monkeypatch):
    """The learning rate of 1e30 ends in infinities at once; an unknown setting is no result."""
    broken = f"{TINY} --learning_rate=1e30 --warmup_iters=0 --max_iters=30 --max_skips=2"
    plan(monkeypatch, a=Variant(broken, evaluations=MEASURED, may_break_down=True))
    study.main([])
    found = json.loads((folder / "results/a_3.json").read_text())
    assert "not finite" in found["broke_down"]
    assert "loss" not in found["numbers"]
    monkeypatch.setattr(study.Run, "call", lambda self, *_, **__: (1, "error: the disk is full"))
    run = study.Run("a", 4)
    with pytest.raises(UserError, match="the disk is full"):
        run.train()
