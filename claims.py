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

from compare import difference, mean_and_std, table_lines
from configurator import UserError, duration, replacing, say
from model import ARMS
from pictures import draw_against, draw_groups, draw_lines, save_picture
from variants import BUDGETS, LENGTHS, PARTS, RATES, VARIANTS

BEGIN = "<!-- written by: python study.py --table -->"
END = "<!-- end of what that command writes -->"


class Claim(NamedTuple):
    text: str
    whose: str  # "paper", or "ours" for a departure from it
    measured: str
    number: str  # its name in the results
    arm: str  # the variant that is claimed to have
    wanted: str  # "less" or "more"
    than: str  # than this variant
    parts: str  # of the study, which measure both
    least_std: float = 0.0  # of a number that can only be seen in steps


CLAIMS = (
    Claim("GSA predicts better than dense attention (1.7B: perplexity 6.03 → 5.70).", "paper",
          "bits per byte, text and pass-keys", "bits_per_byte", "gsa", "less", "dense", "arms"),
    Claim("GSA predicts text better.", "paper",
          "bits per byte, text only", "bits_per_byte_text", "gsa", "less", "dense", "arms"),
    Claim("GSA retrieves better (RULER at 128K: 31.7 → 62.2).", "paper",
          "needle at 512 tokens", "needle_accuracy_at_512", "gsa", "more", "dense", "arms"),
    Claim("GSA retrieves better beyond the length that it was trained at.", "paper",
          "needle at 2048 tokens, YaRN", "needle_accuracy_at_2048", "gsa-yarn", "more",
          "dense-yarn", "long,arms"),
    Claim("Gates drain the attention sink (47 % → 4 %).", "paper",
          "attention on the first token", "first_token_share", "gated", "less", "dense", "arms"),
    Claim("GSA as a whole drains it.", "paper",
          "attention on the first token", "first_token_share", "gsa", "less", "dense", "arms"),
    Claim("Gates improve sparse attention.", "paper",
          "bits per byte", "bits_per_byte", "gsa", "less", "no-gates", "gates,arms"),
    Claim("The output gate alone (G1) improves it.", "paper",
          "bits per byte", "bits_per_byte", "G1", "less", "no-gates", "gates"),
    Claim("The value gate alone (G2) improves it.", "paper",
          "bits per byte", "bits_per_byte", "G2", "less", "no-gates", "gates"),
    Claim("Gates improve dense attention.", "paper",
          "bits per byte", "bits_per_byte", "gated", "less", "dense", "arms"),
    Claim("GSA trains at a higher learning rate.", "paper",
          "log10 of the largest that trains", "log10_largest_rate", "gsa, AdamW", "more",
          "dense, AdamW", "rates", 0.14),  # rates stand 0.5 apart, and 0.5 / √12 = 0.14
    Claim("GSA has fewer loss spikes (−98 %).", "paper",
          "spikes per 1,000 steps", "spikes", "gsa, AdamW", "less", "dense, AdamW", "rates"),
    Claim("GSA has smaller activations.", "paper",
          "largest activation", "largest_activation", "gsa", "less", "dense", "arms"),
    Claim("An adaptive budget beats a fixed one of the same mean.", "paper",
          "bits per byte", "bits_per_byte", "inverse", "less", "fixed", "budget"),
    Claim("`inverse` beats `eq8`, the formula as printed.", "ours",
          "bits per byte", "bits_per_byte", "inverse", "less", "eq8", "budget"),
    Claim("The sigmoid indexer finds more than the ReLU one.", "paper",
          "recall", "index_recall", "fixed", "more", "relu", "indexer,budget"),
    Claim("With τ the indexer gets nearer to its teacher.", "ours",
          "KL, nats", "index_loss", "fixed", "less", "no-tau", "indexer,budget"),
    Claim("With RoPE the indexer finds more.", "ours",
          "recall", "index_recall", "fixed", "more", "no-rope", "indexer,budget"),
    Claim("Four indexer heads find more than one.", "ours",
          "recall", "index_recall", "fixed", "more", "one-head", "indexer,budget"),
    Claim("An indexer that was warmed up finds more.", "ours",
          "recall", "index_recall", "fixed", "more", "no-warmup", "indexer,budget"),
    Claim("GSA trains faster at 512 tokens (paper: 12 to 16 times, at 128K).", "paper",
          "tokens per second", "tokens_per_second", "gsa", "more", "dense", "arms"),
)

# Of each part's table: its numbers, and variants that stand before the part's own
TABLES = {
    "demo": ("bits_per_byte needle_accuracy_at_512 index_recall mean_k_t", ()),
    "arms": ("bits_per_byte bits_per_byte_text bits_per_byte_passkeys needle_accuracy_at_512 "
             "first_token_share largest_activation index_recall mean_k_t tokens_per_second "
             "parameters gates_and_indexer", ()),
    "gates": ("bits_per_byte bits_per_byte_text needle_accuracy_at_512 first_token_share "
              "largest_activation index_recall", ("dense", "gated", "gsa")),
    "rates": ("loss spikes_within_50_per_1000_steps largest_grad_norm largest_activation", ()),
    "budget": ("bits_per_byte needle_accuracy_at_512 index_recall mean_k_t", ()),
    "indexer": ("index_recall index_loss bits_per_byte needle_accuracy_at_512 mean_k_t",
                ("fixed",)),
    "long": (" ".join(f"{name}_at_{n}" for n in LENGTHS for name in (
                 "needle_accuracy", "bits_per_byte", "first_token_share")), ()),
}


# --------------------------------------------------------------------------------------------------
# Reading

def read_results(folder):
    """{variant: [the content of each of its files, by seed]}. Raises UserError: there are none."""
    found = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "*_*.json")):
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        found.setdefault(content["variant"], []).append(content)
    if not found:
        raise UserError(f"{folder} holds no results: python study.py makes them")
    for contents in found.values():
        contents.sort(key=lambda content: content["seed"])
    return found | largest_rates(found)


def numbers(results, variant, name):
    """The values of a number of a variant, one per seed; of a seed that lacks it, none."""
    found = [content["numbers"].get(name) for content in results.get(variant, [])]
    return [value for value in found if value is not None]


def largest_rates(results):
    """
    {"gsa, AdamW": …}: for each arm and seed, over the learning rates, the largest that trains and
    the spikes per 1,000 steps of those that do in every arm. A rate trains if its run ends with a
    validation loss at most a tenth above that of the arm's best rate. A seed counts when all of its
    runs are done.
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
    text = f"{found['mean']:.4g}"
    return text if found["std"] is None else f"{text} ± {found['std']:.2g}"


def verdict(claim, results):
    """Does it hold? In words; "" before three seeds of each side are done."""
    sides = []
    for variant in (claim.arm, claim.than):
        values = numbers(results, variant, claim.number)
        if len(values) < 3:
            return ""
        side = mean_and_std(values)
        sides.append(side | {"std": max(side["std"], claim.least_std)})
    found = difference(*sides)
    if not found["beyond_two"]:
        return "cannot be seen at this scale"
    more = found["difference"] > 0
    return "**holds**" if more == (claim.wanted == "more") else "**does not hold**"


def list_of_claims(results):
    """README's list: an entry for each claim that was measured, and one for the others."""
    entries = []
    missing = []
    for claim in CLAIMS:
        word = verdict(claim, results)
        sides = []
        for variant in (claim.arm, claim.than):
            values = numbers(results, variant, claim.number)
            sides.append(f"{variant} {shown(values)} (n={len(values)})")
        if word:
            entries.append(f"- {word}: {claim.text} [{claim.whose}] {claim.measured}: {sides[0]}, "
                           f"{sides[1]}; `--only={claim.parts}`")
        else:
            missing.append(claim.text[:-1])
    if missing:
        entries.append(f"- not measured yet: {'; '.join(missing)}.")
    wrapped = [textwrap.fill(entry, 94, subsequent_indent="  ", break_on_hyphens=False)
               for entry in entries]
    return "\n".join(wrapped) + "\n"


def table_of_part(part, results):
    """A line for each variant of a part that was measured; "" if none was."""
    names, others = TABLES[part]
    names = names.split()
    rows = [["variant", "seeds", "steps", *(name.replace("_", " ") for name in names)]]
    for variant in dict.fromkeys((*others, *PARTS[part])):
        contents = results.get(variant, [])
        if contents:
            seeds = str(len(contents))
            broken = [content for content in contents if content["broke_down"]]
            if broken:
                seeds += f", {len(broken)} broke down"
            steps = str(contents[0]["config"]["max_iters"])
            values = [shown(numbers(results, variant, name)) for name in names]
            rows.append([variant, seeds, steps, *values])
    if len(rows) == 1:
        return ""
    return "\n".join(table_lines(rows)) + "\n"


def tables_of_parts(results):
    """The content of results/tables.md."""
    text = "Mean ± standard deviation over the seeds. Written by: python study.py --table\n"
    for part in PARTS:
        rows = table_of_part(part, results)
        text += f"\n## {part}\n{rows}" if rows else ""
    trained = [content for name, variant in VARIANTS.items() if variant.trains
               for content in results.get(name, [])]
    time = duration(sum(content["seconds"] for content in trained))
    commits = ", ".join(sorted({content["commit"][:7] for content in trained}))
    return text + f"\n{len(trained)} trainings, {time}, of the commits {commits}.\n"


def replace_list(readme, lines):
    """The text of README.md with these lines between BEGIN and END. Raises UserError."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise UserError(f"README.md lacks the lines {BEGIN} and {END}")
    return f"{before}{begin}\n{lines}{end}{after}"


def write_tables(folder, results):
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
    """assets/study_arms.png, study_budget.png and study_long.png, of what was measured."""
    def by_variant(variants, name):
        return {variant: numbers(results, variant, name) for variant in variants}

    # 1. the arms
    panels = {label: by_variant(ARMS, name) for label, name in (
        ("needle found at 512 tokens", "needle_accuracy_at_512"),
        ("bits per byte", "bits_per_byte"))}
    rates = by_variant([f"{arm}, AdamW" for arm in ARMS], "log10_largest_rate")
    panels["log10 of the largest learning rate"] = rates
    save_picture("assets/study_arms.png", draw_groups, panels)
    # 2. the budget
    variants = [f"k-{k}" for k in BUDGETS]
    curves = {label: by_variant(variants, name) for label, name in (
        ("recall", "index_recall"), ("bits per byte", "bits_per_byte"))}
    save_picture("assets/study_budget.png", draw_against, "k_base", BUDGETS, curves)
    # 3. the loss by position at four times the context
    lines = {variant: [content[f"loss_by_position_at_{LENGTHS[-1]}"]
                       for content in results.get(variant, [])] for variant in PARTS["long"]}
    save_picture("assets/study_long.png", draw_lines, lines)


def write(folder, tables, plot):
    """What `python study.py --table --plot` asks for. folder: of the results."""
    results = read_results(folder)
    if tables:
        write_tables(folder, results)
    if plot:
        draw_pictures(results)
