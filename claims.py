"""
What the study has found: tables and pictures from the files that study.py has written. Nothing is
trained here.

    python study.py --table    # writes results/tables.md, and the list of claims into README.md
    python study.py --plot     # draws assets/study_*.png

A difference of two means counts beyond two standard errors, √(s²/n + s²/n) with the s and n of
each side, and from three seeds on.
"""
import glob
import json
import math
import os
import textwrap
from typing import NamedTuple

from compare import difference, mean_and_std, plus_minus, table_lines
from configurator import UserError, duration, replacing, say
from model import ARMS
from pictures import draw_against, draw_groups, save_picture
from settings import TrainConfig
from variants import BUDGETS, LENGTHS, PARTS, RATES, VARIANTS

BEGIN = "<!-- written by: python study.py --table -->"
END = "<!-- end of what that command writes -->"
HOLDS, FAILS, UNSEEN = "**holds**", "**does not hold**", "cannot be seen at this scale"


class Claim(NamedTuple):
    text: str
    source: str  # "paper"; "ours", a question that we add; "later", one asked after the results
    quantity: str
    number: str  # the quantity's name in the results
    variant: str  # the variant that is claimed to have
    wanted: str  # "less" or "more"
    than: str  # than this variant
    parts: str  # of the study, which measure both
    least_std: float = 0.0  # each side's deviation counts as at least this


# What several claims are about: the quantity, and its name in the results
ABOUT_TEXT = ("bits per byte of text", "bits_per_byte_text")
ABOUT_NEEDLES = ("needles found at 512 tokens", "needle_accuracy_at_512")
ABOUT_FAR_NEEDLES = ("needles found at 2048 tokens, with YaRN", "needle_accuracy_at_2048")
ABOUT_RECALL = ("recall, of the best possible", "index_recall_of_best")
# Seeds can agree by luck, so some deviations have a floor. The share p of n prompts deviates by
# √(p(1 − p) / n): 0.018 for 0.95 of 150, 0.041 for 0.85 of the 75 at 2048 tokens. A number that
# comes in steps deviates by a step / √12.
STD_OF_150, STD_OF_75 = 0.018, 0.041

CLAIMS = (
    Claim("GSA predicts text better than dense attention (1.7B: perplexity 6.03 → 5.70).",
          "paper", *ABOUT_TEXT, "gsa", "less", "dense", "arms"),
    Claim("GSA predicts documents with pass-keys better.", "paper",
          "bits per byte of them", "bits_per_byte_passkeys", "gsa", "less", "dense", "arms"),
    Claim("GSA retrieves better (RULER at 128K: 31.7 → 62.2).", "paper",
          *ABOUT_NEEDLES, "gsa", "more", "dense", "arms", STD_OF_150),
    Claim("GSA predicts text better than sparse attention without gates.", "later",
          *ABOUT_TEXT, "gsa", "less", "sparse", "arms"),
    Claim("GSA retrieves better than sparse attention without gates.", "later",
          *ABOUT_NEEDLES, "gsa", "more", "sparse", "arms", STD_OF_150),
    Claim("GSA retrieves better beyond the length that it was trained at.", "paper",
          *ABOUT_FAR_NEEDLES, "gsa-yarn", "more", "dense-yarn", "long", STD_OF_75),
    Claim("After 100 steps at 2048 tokens GSA retrieves better there.", "later",
          *ABOUT_FAR_NEEDLES, "gsa-continued", "more", "dense-continued", "long", STD_OF_75),
    Claim("Gates drain the attention sink (47 % → 4 %).", "paper",
          "attention on the first token", "first_token_share", "gated", "less", "dense", "arms"),
    Claim("GSA as a whole drains the attention sink.", "paper",
          "attention on the first token (gsa: of the selected ones)", "first_token_share",
          "gsa", "less", "dense", "arms"),
    Claim("Gates improve dense attention.", "paper",
          *ABOUT_TEXT, "gated", "less", "dense", "arms"),
    Claim("Gates improve sparse attention.", "paper",
          *ABOUT_TEXT, "gsa", "less", "no-gates", "gates,arms"),
    Claim("The output gate alone (G1) improves sparse attention.", "paper",
          *ABOUT_TEXT, "G1", "less", "no-gates", "gates"),
    Claim("The value gate alone (G2) improves sparse attention.", "paper",
          *ABOUT_TEXT, "G2", "less", "no-gates", "gates"),
    Claim("GSA trains at a higher learning rate.", "paper",
          "log10 of the largest one whose loss is within a tenth of the best",
          "log10_largest_rate", "gsa, AdamW", "more", "dense, AdamW", "rates",
          0.14),  # rates stand in steps of 0.5
    Claim("GSA suffers less from a learning rate that is too high (3e-2).", "later",
          "nats per token of validation, AdamW", "loss", "gsa-3e-2", "less", "dense-3e-2",
          "rates"),
    Claim("GSA has fewer loss spikes (−98 %).", "paper",
          "per 1,000 steps, at the learning rates at which all arms train", "spikes",
          "gsa, AdamW", "less", "dense, AdamW", "rates",
          0.72),  # one spike in a run of 400 steps is a step of 2.5
    Claim("GSA has smaller activations.", "paper",
          "largest activation", "largest_activation", "gsa", "less", "dense", "arms"),
    Claim("An adaptive budget beats a fixed one of the same mean.", "paper",
          *ABOUT_TEXT, "inverse", "less", "fixed", "budget"),
    Claim("`inverse` beats `eq8`, the formula as printed.", "ours",
          *ABOUT_TEXT, "inverse", "less", "eq8", "budget"),
    Claim("A trained GSA retrieves better at 512 tokens than when it reads all keys.", "later",
          *ABOUT_NEEDLES, "gsa", "more", "gsa-reads-512", "keys,arms", STD_OF_150),
    Claim("A trained GSA retrieves better at 2048 tokens than when it reads all keys.", "later",
          *ABOUT_FAR_NEEDLES, "gsa-yarn", "more", "gsa-yarn-all", "long", STD_OF_75),
    Claim("The sigmoid indexer selects better than the ReLU one.", "paper",
          *ABOUT_RECALL, "fixed", "more", "relu", "indexer,budget"),
    Claim("With τ the indexer gets nearer to its teacher.", "ours",
          "KL over the selected keys, nats", "index_loss", "fixed", "less", "no-tau",
          "indexer,budget"),
    Claim("With RoPE the indexer selects better.", "ours",
          *ABOUT_RECALL, "fixed", "more", "no-rope", "indexer,budget"),
    Claim("Four indexer heads select better than one.", "ours",
          *ABOUT_RECALL, "fixed", "more", "one-head", "indexer,budget"),
    Claim("An indexer that was warmed up selects better.", "ours",
          *ABOUT_RECALL, "fixed", "more", "no-warmup", "indexer,budget"),
    Claim("GSA trains faster at 512 tokens (the paper: 12 to 16 times, at 128K).", "ours",
          "tokens per second", "tokens_per_second", "gsa", "more", "dense", "arms"),
)


class Table(NamedTuple):
    part: str
    about: str  # what stands behind the part's name in the title
    numbers: dict  # {heading: the number's name in the results}
    others: tuple = ()  # variants that stand before the part's own


BITS = {"text bits/byte": "bits_per_byte_text", "pass-keys": "bits_per_byte_passkeys"}
NEEDLE = {"needle": "needle_accuracy_at_512"}
SINK = {"on first token": "first_token_share"}
LARGEST = {"largest activation": "largest_activation"}
RECALL = {"recall": "index_recall", "of the best": "index_recall_of_best"}
KEYS = {"mean k_t": "mean_k_t"}
ENTROPY = {"correlation": "k_t_entropy_correlation"}


def by_length(number):
    """A column for each length."""
    return {f"at {length}": f"{number}_at_{length}" for length in LENGTHS}


TABLES = (
    Table("demo", "", BITS | NEEDLE | KEYS),
    Table("arms", "prediction", BITS | NEEDLE),
    Table("arms", "attention", SINK | LARGEST),
    Table("arms", "selection", RECALL | KEYS),
    Table("arms", "correlation of k_t and the next token's entropy", ENTROPY),
    Table("arms", "size and speed", {
        "tokens/s": "tokens_per_second", "parameters": "parameters",
        "gates and indexer": "gates_and_indexer"}),
    Table("gates", "prediction", BITS | NEEDLE, ("dense", "gated", "gsa")),
    Table("gates", "attention", SINK | LARGEST, ("dense", "gated", "gsa")),
    Table("rates", "", {
        "loss": "loss", "spikes/1000": "spikes_within_50_per_1000_steps"} | LARGEST),
    Table("budget", "prediction", BITS | NEEDLE | KEYS),
    Table("budget", "selection", RECALL | KEYS),
    Table("budget", "correlation of k_t and the next token's entropy", ENTROPY),
    Table("keys", "prediction", BITS | KEYS, ("gsa",)),
    Table("keys", "needle", NEEDLE | KEYS, ("gsa",)),
    Table("indexer", "prediction", BITS | NEEDLE | KEYS, ("fixed",)),
    Table("indexer", "selection", RECALL | {"KL": "index_loss"}, ("fixed",)),
    Table("long", "needle", by_length("needle_accuracy")),
    Table("long", "bits per byte of text", by_length("bits_per_byte_text")),
    Table("long", "attention on the first token", by_length("first_token_share")),
    Table("long", f"nats per token of all documents, by tokens seen of {LENGTHS[-1]}", {
        f"{seen // 2} to {seen}": f"loss_up_to_{seen}" for seen in LENGTHS}),
)


# --------------------------------------------------------------------------------------------------
# Reading

def read_results(folder):
    """{variant: [the content of each of its files, by seed]}. Raises UserError: there are none."""
    found = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "*_*.json")):
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        for seen, loss in content.get(f"loss_by_position_at_{LENGTHS[-1]}", []):
            content["numbers"][f"loss_up_to_{seen}"] = loss
        found.setdefault(content["variant"], []).append(content)
    if not found:
        raise UserError(f"{folder} holds no results: python study.py makes them")
    for contents in found.values():
        contents.sort(key=lambda content: content["seed"])
    return found | largest_rates(found)


def numbers(results, variant, name):
    """
    The values of a number of a variant, one per seed; of a seed that lacks it, none. Rounded, so
    that equal ones are: their last bits depend on the order of a sum.
    """
    found = [content["numbers"].get(name) for content in results.get(variant, [])]
    return [round(value, 9) for value in found if value is not None]


def largest_rates(results):
    """
    {"gsa, AdamW": …}: for each arm and seed, log10 of the largest learning rate that trains, and
    the mean spikes per 1,000 steps over the rates that train in all arms. A rate trains if its
    final validation loss is at most a tenth above the arm's lowest. Seeds that lack a run are left
    out.
    """
    runs = {(arm, rate): {content["seed"]: content["numbers"]
                          for content in results.get(f"{arm}-{rate}", [])}
            for arm in ARMS for rate in RATES}
    found = {}
    for seed in sorted(set.intersection(*map(set, runs.values()))):
        trains = {}  # arm -> its rates that do
        for arm in ARMS:
            losses = {rate: runs[arm, rate][seed].get("loss") for rate in RATES}
            losses = {rate: loss for rate, loss in losses.items() if loss is not None}
            trains[arm] = [rate for rate in losses if losses[rate] <= 1.1 * min(losses.values())]
        in_every_arm = set.intersection(*map(set, trains.values()))
        for arm in ARMS:
            of_arm = {}
            if trains[arm]:
                of_arm["log10_largest_rate"] = math.log10(max(map(float, trains[arm])))
            if in_every_arm:
                spikes = [runs[arm, rate][seed]["spikes_within_50_per_1000_steps"]
                          for rate in in_every_arm]
                of_arm["spikes"] = sum(spikes) / len(spikes)
            found.setdefault(f"{arm}, AdamW", []).append({"seed": seed, "numbers": of_arm})
    return found


# --------------------------------------------------------------------------------------------------
# Tables

def shown(values):
    """ "0.61 ± 0.14": mean and standard deviation of some values; "–" of none. """
    if not values:
        return "–"
    found = mean_and_std(values)
    return plus_minus(found["mean"], found["std"])


def both_sides(claim, results):
    """The claim's number: its values of claim.variant, and of claim.than."""
    return [numbers(results, variant, claim.number) for variant in (claim.variant, claim.than)]


def compared(claim, results):
    """compare.difference of both sides; None before three seeds of each are done."""
    sides = both_sides(claim, results)
    if min(map(len, sides)) < 3:
        return None
    summaries = [mean_and_std(values) for values in sides]
    for side in summaries:
        side["std"] = max(side["std"], claim.least_std)
    return difference(*summaries)


def verdict(claim, found):
    """Does it hold? In words; found: what `compared` returns; "" of None."""
    if not found:
        return ""
    if not found["beyond_two"]:
        return UNSEEN
    more = found["difference"] > 0
    return HOLDS if more == (claim.wanted == "more") else FAILS


def list_of_claims(results):
    """README's list: an entry for each claim that was measured, by verdict; one for the others."""
    entries = {HOLDS: [], FAILS: [], UNSEEN: []}
    missing = []
    for claim in CLAIMS:
        found = compared(claim, results)
        if found:
            first, second = [f"{shown(values)} (n={len(values)})"
                             for values in both_sides(claim, results)]
            between = plus_minus(found["difference"], found["standard_error"])
            word = verdict(claim, found)
            entries[word].append(
                f"- {word}: {claim.text} [{claim.source}] {claim.quantity}: {claim.variant} "
                f"{first}, {claim.than} {second}, difference {between}; `--only={claim.parts}`")
        else:
            missing.append(claim.text[:-1])
    lines = [*entries[HOLDS], *entries[FAILS], *entries[UNSEEN]]
    if missing:
        lines.append(f"- not measured yet: {'; '.join(missing)}.")
    wrapped = [textwrap.fill(line, 94, subsequent_indent="  ", break_on_hyphens=False)
               for line in lines]
    return "\n".join(wrapped) + "\n"


def rows_of(table, results):
    """The lines of a table, one for each variant that was measured; [] if none was."""
    rows = [["variant", "seeds", "steps", *table.numbers]]
    for variant in dict.fromkeys((*table.others, *PARTS[table.part])):
        contents = results.get(variant, [])
        if contents:
            seeds = str(len(contents))
            broken = [content for content in contents if content["broke_down"]]
            if broken:
                seeds += f", {len(broken)} broke down"
            steps = contents[0]["config"].get("max_iters", TrainConfig.max_iters)
            values = [shown(numbers(results, variant, name)) for name in table.numbers.values()]
            rows.append([variant, seeds, str(steps), *values])
    return table_lines(rows) if len(rows) > 1 else []


def tables_of_parts(results):
    """The content of results/tables.md."""
    text = ("Mean ± standard deviation over the seeds that did not break down.\n"
            "Written by: python study.py --table\n")
    for table in TABLES:
        title = f"{table.part}: {table.about}" if table.about else table.part
        lines = rows_of(table, results)
        if lines:
            text += f"\n## {title}\n" + "\n".join(lines) + "\n"
    trained = [content for name, variant in VARIANTS.items() if variant.trains
               for content in results.get(name, [])]
    time = duration(sum(content["seconds"] for content in trained))
    commits = ", ".join(sorted({content["commit"][:7] for content in trained}))
    ending = f"{len(trained)} trainings, {time}, of the commits {commits}."
    return f"{text}\n{textwrap.fill(ending, 98)}\n"


def replace_list(readme, lines):
    """The text of README.md with these lines between BEGIN and END. Raises UserError."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise UserError(f"README.md lacks the lines {BEGIN} and {END}")
    return f"{before}{begin}\n{lines}{end}{after}"


def write_tables(folder, results):
    """Write the list into README.md, the tables into the folder of the results."""
    lines = list_of_claims(results)
    say(lines)
    with open("README.md", encoding="utf-8") as f:
        readme = replace_list(f.read(), lines)
    for path, text in (("README.md", readme), (f"{folder}/tables.md", tables_of_parts(results))):
        with replacing(path) as f:
            f.write(text)
    say(f"written: README.md and {folder}/tables.md")


# --------------------------------------------------------------------------------------------------
# Pictures

def draw_pictures(results):
    """assets/study_arms.png, study_rates.png, study_budget.png and study_long.png."""
    # 1. the arms
    panels = {label: {arm: numbers(results, arm, name) for arm in ARMS}
              for label, name in (ABOUT_NEEDLES, ABOUT_TEXT)}
    save_picture("assets/study_arms.png", draw_groups, panels)
    # 2. the learning rate
    lines = {arm: [numbers(results, f"{arm}-{rate}", "loss") for rate in RATES] for arm in ARMS}
    save_picture("assets/study_rates.png", draw_against, "learning rate, AdamW",
                 [float(rate) for rate in RATES], {"validation, nats per token": lines})
    # 3. the budget
    panels = {label: {"gsa": [numbers(results, f"k-{k}", name) for k in BUDGETS]}
              for label, name in (("recall", "index_recall"), ABOUT_TEXT)}
    save_picture("assets/study_budget.png", draw_against, "k_base", BUDGETS, panels)
    # 4. beyond the context of training
    panels = {}
    for title, how in (("needles, as trained at 512", "beyond"), ("with YaRN", "yarn"),
                       ("YaRN and 100 steps at 2048", "continued")):
        panels[title] = {  # gated and sparse have no such runs, but gsa keeps its colour
            arm: [numbers(results, f"{arm}-{how}", f"needle_accuracy_at_{length}")
                  for length in LENGTHS] for arm in ARMS}
    save_picture("assets/study_long.png", draw_against, "tokens", LENGTHS, panels)


def write(folder, tables, plot):
    """What `python study.py --table --plot` asks for. folder: of the results."""
    results = read_results(folder)
    if tables:
        write_tables(folder, results)
    if plot:
        draw_pictures(results)
