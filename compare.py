"""
Trained runs side by side: arms, each the mean over its seeds.

    python eval.py --compare out/dense_1 out/dense_2 out/gsa_1 out/gsa_2

Reads eval.json and log.jsonl of each folder and measures nothing. Runs that differ in their seed
only, and in what SAME_ARM names, are one arm. Writes into the first folder
    compare.md    the table that is printed
    compare.json  the same numbers, with those of each run
    compare.png   the training curves of all runs
Refuses runs that are no fair comparison: that differ in tokens seen, parameters (the gates and the
indexer aside, which an arm has by definition), data, vocabulary or block size, in whether they
began with trained weights, or in the settings that a part of the evaluation was measured with.
--unequal compares them all the same and marks what they differ in. Other settings, as the learning
rate, may differ between arms: the table shows them.
"""
import json
import math
import os
import re
import shlex
import textwrap
from collections import Counter
from dataclasses import dataclass
from statistics import mean, stdev

from configurator import UserError, mismatch, replacing, say, to_json
from model import ARMS
from outdir import read_log
from pictures import draw_comparison, save_picture

# Settings of train.py that may differ within an arm: they decide the random numbers, where files
# lie, what is logged and saved, and on what machine. The data is compared by its checksums, and
# init_from by start_of
SAME_ARM = set("""seed out_dir overwrite keep data init_from log_interval eval_interval eval_iters
    max_skips plot tensorboard wandb wandb_project device backend compile activation_checkpointing
    fsdp dry_run gpus gpu assumed_mfu""".split())
# Arms differ in these by definition, or unfairly: see facts
NOT_SHOWN = {"attention", "step", "data", "block_size"}.union(*ARMS.values())
ANY_EVALUATION = {"backend"}  # settings of eval.py that may differ
# The shape of an eval.json, see configurator.mismatch
EVALUATION = {"results": dict, "settings": dict,
              "model": {"step": int, "arm": None, "seed": None, "parameters": int,
                        "gates_and_indexer": int, "tokens_seen": int, "data": str,
                        "data_checksum": str, "vocabulary": str, "config": {"block_size": int}}}


@dataclass
class Run:
    folder: str
    model: dict  # eval.json's facts of the model
    settings: dict  # {part: {name: value}}, of the evaluation
    numbers: dict  # {part: {name: value}}, the summaries of its results
    log: list  # records of log.jsonl


def read_run(folder, find_part):
    """
    The Run in a folder. find_part: eval.find_part. Raises UserError with the command that helps.
    """
    path = os.path.join(folder, "eval.json")
    command = f"python eval.py --out_dir={shlex.quote(folder)}"
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {command} makes it") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: {command} makes it anew") from None
    wrong = mismatch(content, EVALUATION)
    numbers = {}
    try:
        for name in [] if wrong else content["results"]:
            summary = find_part(name).summary(content["results"][name])
            numbers[name] = {label: float(value) for label, value in summary.items()
                             if value is not None}
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        wrong = f"{type(e).__name__} {e} in {name}"
    if wrong:
        raise UserError(f"{path} is of another version ({wrong}): {command} --again makes it anew")
    log = [record for record, _ in read_log(os.path.join(folder, "log.jsonl"))]
    settings = {name: content["settings"].get(name, {}) for name in numbers}
    return Run(folder, content["model"], settings, numbers, log)


# --------------------------------------------------------------------------------------------------
# Is it fair?

def training_facts(run):
    """What has to be equal of the trainings: {name: (value, the value in words)}."""
    model = run.model
    found = {}
    for name, value in (("tokens seen", model["tokens_seen"]),
                        ("other parameters", model["parameters"] - model["gates_and_indexer"]),
                        ("block size", model["config"]["block_size"])):
        found[name] = value, f"{value:,}"
    found["vocabulary"] = model["vocabulary"], short(model["vocabulary"])
    checksum = model["data_checksum"]
    found["data"] = checksum, f"{model['data']} (checksum {short(checksum)})"
    init_from = model["config"].get("init_from", "scratch")
    if init_from != "resume":  # which does not say how the run began
        start = "trained weights" if start_of(init_from) else "random weights"
        found["start"] = start, start
    return found


def facts(run):
    """What has to be equal, of trainings and evaluations: {name: (value, the value in words)}."""
    found = training_facts(run)
    for part, settings in run.settings.items():
        for name, value in settings.items():
            if name not in ANY_EVALUATION:
                found[f"{part}: {name}"] = value, short(repr(value))
    return found


def short(text):
    """The text with the first 8 digits of each checksum."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{8,}\b", r"\1", text)


def unequal(runs):
    """{name: {folder: value in words}} of the facts in which runs differ."""
    found = {run.folder: facts(run) for run in runs}
    out = {}
    for name in dict.fromkeys(name for of_run in found.values() for name in of_run):
        held = {folder: of_run[name] for folder, of_run in found.items() if name in of_run}
        compared = [value for value, _ in held.values()]
        if any(value != compared[0] for value in compared):
            out[name] = {folder: shown for folder, (_, shown) in held.items()}
    return out


def refuse(differing):
    """Raise UserError: for each fact, or the first three, two folders with different values."""
    reasons = []
    for name, values in differing.items():
        first, *others = values
        other = next(folder for folder in others if values[folder] != values[first])
        reasons.append(f"{name} {values[first]} in {first}, {values[other]} in {other}")
    if len(reasons) > 3:
        reasons[3:] = [f"and {len(reasons) - 3} more"]
    raise UserError(f"not a fair comparison: {'; '.join(reasons)} (--unequal compares all the "
                    "same)")


# --------------------------------------------------------------------------------------------------
# Arms

def start_of(init_from):
    """The weights that a run began with: "auto:hf:x" -> "hf:x"; "" for those of its own."""
    start = init_from.removeprefix("auto:")
    return "" if start in ("scratch", "resume", "auto") else start


def arm_settings(run):
    """What the runs of an arm have in common, {name: value}."""
    config = run.model["config"]
    settings = {name: value for name, value in config.items() if name not in SAME_ARM}
    return settings | {"start": start_of(config.get("init_from", "scratch")),
                       "step": run.model["step"], "data": short(run.model["data_checksum"])}


def make_arms(runs):
    """{name: [its runs]}, in the order of the runs. Raises UserError: a seed comes twice."""
    # 1. groups of the same settings
    groups = {}
    for run in runs:
        groups.setdefault(to_json(arm_settings(run), sort_keys=True), []).append(run)
    for group in groups.values():
        seeds = Counter(run.model["seed"] for run in group)
        seed, times = seeds.most_common(1)[0]
        if times > 1:
            twice = [run.folder for run in group if run.model["seed"] == seed]
            raise UserError(f"{twice[0]} and {twice[1]} are one arm with the same seed {seed}: "
                            "name one of them")
    # 2. names: the arm, and where several share it the settings in which these differ
    arms = {}
    for group in groups.values():
        name = group[0].model["arm"] or "model"
        own = arm_settings(group[0])
        others = [arm_settings(other[0]) for other in groups.values()
                  if other[0].model["arm"] == group[0].model["arm"]]
        differing = [key for key in own if any(own[key] != other.get(key) for other in others)]
        label = " ".join([name, *(f"{key}={own[key]}" for key in differing)])
        arms[label] = group
    return arms


# --------------------------------------------------------------------------------------------------
# Numbers

def mean_and_std(values):
    """n, mean and sample standard deviation (over n - 1; None of one value)."""
    return {"n": len(values), "mean": mean(values),
            "std": stdev(values) if len(values) > 1 else None, "values": values}


def difference(arm, first):
    """
    The difference of two means, its standard error √(s²/n + s²/n) with the s and n of each, and
    whether it lies beyond two of them; the last two are None where an arm has one seed.
    """
    d = arm["mean"] - first["mean"]
    if arm["std"] is None or first["std"] is None:
        return {"difference": d, "standard_error": None, "beyond_two": None}
    error = math.sqrt(arm["std"]**2 / arm["n"] + first["std"]**2 / first["n"])
    return {"difference": d, "standard_error": error, "beyond_two": abs(d) > 2 * error}


def tabulate(arms, differing):
    """
    compare.json's content. arms: see make_arms; differing: see unequal. "settings" holds those in
    which arms differ, a value per arm. "numbers" has an entry for each number of the summaries:
    its part and, per arm, mean, std and the difference to the first arm, None where no run of the
    arm has the number.
    """
    firsts = [runs[0] for runs in arms.values()]
    described = []
    for name, runs in arms.items():
        model = runs[0].model
        facts_of_arm = {fact: value for fact, (value, _) in training_facts(runs[0]).items()}
        described.append({"name": name, "folders": [run.folder for run in runs],
                          "seeds": [run.model["seed"] for run in runs],
                          "parameters": model["parameters"],
                          "gates_and_indexer": model["gates_and_indexer"], **facts_of_arm})
    settings = {}
    for name in arm_settings(firsts[0]):
        values = [arm_settings(run).get(name) for run in firsts]
        if name not in NOT_SHOWN and any(value != values[0] for value in values):
            settings[name] = values
    labels = {(part, label): None for runs in arms.values() for run in runs
              for part, numbers in run.numbers.items() for label in numbers}
    numbers = {}
    for part, label in labels:
        columns = []
        for runs in arms.values():
            values = [run.numbers[part][label] for run in runs
                      if label in run.numbers.get(part, {})]
            columns.append(mean_and_std(values) if values else None)
        first = columns[0]
        for column in columns[1:]:
            if column and first:
                column |= difference(column, first)
        numbers[label] = {"part": part, "arms": columns}
    return {"arms": described, "settings": settings, "numbers": numbers, "unequal": differing}


# --------------------------------------------------------------------------------------------------
# The table

# The shares: Student's t beyond 2 with 2, 4 and 8 degrees of freedom
SIGNS = """Mean ± standard deviation over seeds. * = differs from {first} by more than two standard
errors of the difference (compare.json has both). Arms that are equal get a * by chance, too: in
18 % of the rows with two seeds each, in 12 % with three, in 8 % with five."""
ONE_SEED = """An arm of one seed has no standard deviation: other seeds may differ by more than the
arms do. Train each arm with three seeds or more (--seed=2 --out_dir=…)."""


def plus_minus(average, std):
    """
    "0.968 ± 0.018": the deviation with two digits, the average to the same place. std: None of one
    seed, 0 where all seeds agree.
    """
    if not std:
        text = f"{average:,.0f}" if abs(average) >= 1000 else f"{average:.4g}"
        return text if std is None else f"{text} ± 0"
    places = max(0, 1 - math.floor(math.log10(std)))
    return f"{average:,.{places}f} ± {std:,.{places}f}"


def show(column, n_seeds):
    """
    A number of an arm of n_seeds seeds: "0.60 ± 0.14 *". The * stands for a difference from the
    first arm of more than two standard errors.
    """
    if column is None:
        return "–"
    text = plus_minus(column["mean"], column["std"])
    if column["n"] < n_seeds:  # a seed whose perplexity is infinite, say, has no number
        text += f" ({column['n']} of {n_seeds})"
    return text + " *" if column.get("beyond_two") else text


def table_lines(rows):
    """Lines of markdown with aligned columns. rows: lists of cells, the heading first."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(cells, widths)) + " |"
             for cells in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return lines


def markdown(table, arms):
    """compare.md: a column per arm. table: see tabulate; arms: see make_arms."""
    differing = table["unequal"]
    n_seeds = [len(runs) for runs in arms.values()]
    training = [training_facts(runs[0]) for runs in arms.values()]
    # 1. the rows
    rows = [["", *arms],
            ["seeds", *map(str, n_seeds)],
            ["parameters", *(f"{arm['parameters']:,}" for arm in table["arms"])],
            ["of them gates and indexer", *(f"{arm['gates_and_indexer']:,}"
                                            for arm in table["arms"])]]
    for name in differing:
        if ": " not in name:  # else it is a setting of the evaluation
            rows.append([f"≠ {name}", *(found.get(name, ("", "–"))[1] for found in training)])
    for name, values in table["settings"].items():
        rows.append([name, *map(str, values)])
    for label, number in table["numbers"].items():
        measured_differently = any(name.startswith(f"{number['part']}: ") for name in differing)
        mark = "≠ " if measured_differently else ""
        rows.append([mark + label.replace("_", " "), *map(show, number["arms"], n_seeds)])
    lines = table_lines(rows)
    # 2. what is equal, what the signs mean, and what is not equal
    equal = [f"{name} {shown}" for name, (_, shown) in training[0].items()
             if name not in differing]
    notes = [f"Equal in all runs: {', '.join(equal)}."] if equal else []
    if max(n_seeds) > 1:
        notes.append(SIGNS.format(first=table["arms"][0]["name"]))
    if min(n_seeds) == 1:
        notes.append(ONE_SEED)
    for name, values in differing.items():
        held = ", ".join(f"{folder} {value}" for folder, value in values.items())
        notes.append(f"≠ {name}: {held}")
    for note in notes:
        lines += ["", *textwrap.wrap(note, 100, break_long_words=False, break_on_hyphens=False)]
    return "\n".join(lines) + "\n"


def compare(folders, find_part, allow_unequal=False, plot=True):
    """
    Print and write the table of the runs in these folders. find_part: eval.find_part.
    Returns the content of compare.json. Raises UserError.
    """
    # 1. read, and refuse
    if len(folders) < 2:
        raise UserError("compare needs two folders or more, separated by blanks: "
                        "--compare out_a out_b")
    runs = [read_run(folder, find_part) for folder in folders]
    differing = unequal(runs)
    if differing and not allow_unequal:
        refuse(differing)
    arms = make_arms(runs)
    # 2. the table
    table = tabulate(arms, differing)
    text = markdown(table, arms)
    say(text)
    for name, content in (("compare.md", text), ("compare.json", to_json(table, indent=1))):
        with replacing(os.path.join(folders[0], name)) as f:
            f.write(content)
    say(f"all of it: {folders[0]}/compare.md, .json and .png")
    # 3. the picture
    for run in runs:
        if not run.log:
            say(f"{run.folder} has no log.jsonl: compare.png lacks its curves")
    if plot:
        logs = {name: [run.log for run in group] for name, group in arms.items()}
        save_picture(os.path.join(folders[0], "compare.png"), draw_comparison, logs)
    return table
