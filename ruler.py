"""
RULER: 13 tasks that measure the real context size of a model (arXiv 2404.06654, ruler_tasks.py).
A part of eval.py.

    python eval.py --tasks=ruler --lengths=4096,8192 --haystack=PaulGrahamEssays.json
    python eval.py --tasks=niah_single_1,vt --samples=100
    python eval.py --tasks=qa_1,qa_2 --squad=dev-v2.0.json --hotpotqa=hotpot_dev_distractor_v1.json

A prompt and the tokens to generate fill a length in the model's own tokens: a task is written with
n units of context (words, lines, needles, documents), and n is the largest that fits.

DEVIATIONS: n grows by single units, RULER's by 10 to 500 of them; the separator before a prompt
and, for fwe, the tokens to generate count, too. RULER asks 500 samples of each task with one seed,
here the default is 10 with each of 3 seeds. A seed has its own names, values, words and places; in
the QA tasks it has the next questions of the file. The text around the needles is the same.
"""
import math
import random
import re
from typing import NamedTuple

import numpy as np

from configurator import UserError, say
from localfiles import optional
from needle import check_haystack, shade
from ruler_tasks import READERS, TASKS, Sources
from scoring import Progress, answer

WORDLESS = {"niah_multikey_3", "vt", "fwe", "qa_1", "qa_2"}  # need no package for words
SETTINGS = "data haystack squad hotpotqa lengths seeds samples"


def wanted(cfg):
    """The tasks that cfg.tasks names: all for "ruler", or single ones."""
    names = [name.strip() for name in cfg.tasks.split(",")]
    return [name for name in TASKS if name in names or "ruler" in names]


def check(cfg, subject):
    """Refuse what cannot be measured. Raises UserError."""
    subject.lengths()
    check_haystack(cfg)
    if set(wanted(cfg)) - WORDLESS:
        optional("wonderwords")
    for name, read in READERS.items():
        path = getattr(cfg, name)
        if path and not read(path)[0]:
            raise UserError(f"{path} holds no question with an answer")


# --------------------------------------------------------------------------------------------------
# Scores, between 0 and 1

def string_match_all(text, answers):
    """The share of the answers that appear in a text, whatever their case."""
    return sum(a.lower() in text.lower() for a in answers) / len(answers)


def string_match_part(text, answers):
    """
    1 if one of the answers appears in a text, else 0. (lm-evaluation-harness 0.4.13 gives the share
    of them, which is not what RULER publishes.)
    """
    return float(any(a.lower() in text.lower() for a in answers))


def score_answer(name, text, answers):
    """The score of what a model wrote to a task, as RULER's evaluate.py reads it."""
    text = re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip()
    rule = string_match_part if name.startswith("qa") else string_match_all
    return rule(text, answers)


# --------------------------------------------------------------------------------------------------
# Prompts that fill a length

class Sample(NamedTuple):
    ids: np.ndarray  # the prompt
    answers: list  # the right ones
    n: int  # units of context in it


def largest(fits, fewest, guess):
    """
    The largest n, at least `fewest`, with fits(n), where fits holds up to some n and fails beyond.
    The search begins at guess. fewest - 1 if there is none.
    """
    step = 1
    low = high = max(guess, fewest)
    if fits(low):
        while fits(low + step):
            low += step
            step *= 2
        high = low + step
    else:
        low -= step
        while low >= fewest and not fits(low):
            high = low
            step *= 2
            low -= step
        low = max(low, fewest - 1)
    while high - low > 1:  # low fits, high does not
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def write_samples(name, length, n_samples, seeds, sources, tokenizer):
    """
    n_samples of a task for each seed, which fill `length` tokens with the tokens to generate.
    Returns the Samples and the tokens that the largest of them needs with the fewest units of
    context: where that is more than `length`, there are no samples.
    """
    task = TASKS[name]

    def write(n, seed, i):
        rng = random.Random(f"{name} {seed} {i}")
        found = task.prompt(n, rng, sources, length, seed * n_samples + i)
        if found is None:
            return None
        ids = np.concatenate(([tokenizer.separator], tokenizer.encode(found[0])))
        return Sample(ids, found[1], n)

    def size(sample):
        return math.inf if sample is None else len(sample.ids) + task.tokens

    order = [(seed, i) for seed in range(seeds) for i in range(n_samples)]
    needed = max(size(write(task.fewest, *which)) for which in order)
    samples = []
    n = task.fewest
    for which in order if needed <= length else []:
        n = largest(lambda n: size(write(n, *which)) <= length, task.fewest, n)
        samples.append(write(n, *which))
    return samples, needed


def least_length(name, length, n_samples, seeds, sources, tokenizer):
    """The least length, from `length` on, at which a task fits. Longer ones may ask for more."""
    while True:
        samples, needed = write_samples(name, length, n_samples, seeds, sources, tokenizer)
        if samples:
            return length
        length = needed


# --------------------------------------------------------------------------------------------------
# The part

def measure(cfg, subject):
    lengths = subject.lengths() or [subject.T]
    sources = Sources(cfg, subject, max(lengths))
    cells = subject.begun.get("cells", [])  # of a measurement that was interrupted
    done = {(c["task"], c["length"]) for c in cells}
    skipped = {}
    haystack = None
    for name in wanted(cfg):
        parameters = TASKS[name].parameters
        file = parameters.get("file")
        if file and not getattr(cfg, file):
            skipped[name] = f"--{file}=FILE names its questions"
            continue
        if parameters.get("haystack") == "essay":
            haystack = sources.essay[0]
        for length in lengths:
            if (name, length) not in done:
                cells.append(ruler(subject, name, length, cfg.samples, cfg.seeds, sources))
                subject.keep({"cells": cells})
    return {"haystack": haystack, "samples": cfg.samples, "seeds": cfg.seeds,
            "cells": cells, "skipped": skipped}


def ruler(subject, name, length, n_samples, seeds, sources):
    """
    One task at one length: task, length, and `scores`, one per seed, 100 is best. Or `least`, the
    least length that the task needs.
    """
    cell = {"task": name, "length": length}
    arguments = (n_samples, seeds, sources, subject.tokenizer)
    samples, needed = write_samples(name, length, *arguments)
    if not samples:
        return cell | {"least": least_length(name, needed, *arguments)}
    with Progress(f"{name} at {length} tokens", len(samples)) as progress:
        texts = answer(subject.model, [s.ids for s in samples],
                       [TASKS[name].tokens] * len(samples), [[]] * len(samples),
                       subject.tokenizer, subject.batcher, progress)
    scores = [score_answer(name, written.text, sample.answers)
              for written, sample in zip(texts, samples)]
    return cell | {"scores": [100 * float(np.mean(scores[s * n_samples:(s + 1) * n_samples]))
                              for s in range(seeds)]}


def averages(cells):
    """{length: (scores per seed of the average over the tasks that fit, number of these tasks)}"""
    found = {}
    for length in sorted({c["length"] for c in cells}):
        scores = [c["scores"] for c in cells if c["length"] == length and "scores" in c]
        if scores:
            found[length] = np.mean(scores, 0), len(scores)
    return found


def show(result):
    cells = {(c["task"], c["length"]): c for c in result["cells"]}
    lengths = sorted({length for _, length in cells})
    if lengths:
        haystack = f"; haystack: {result['haystack']}" if result["haystack"] else ""
        say(f"\nRULER, 0 to 100, mean ± std over {result['seeds']} seeds of {result['samples']} "
            f"samples each{haystack}\n"
            "  task             " + "".join(f"{n:>20}" for n in lengths))

    def entry(scores):
        mean = np.mean(scores)
        return f"{shade(mean / 100)} {mean:.1f} ± {np.std(scores):.1f}"

    for name in dict.fromkeys(name for name, _ in cells):
        row = f"  {name:17}"
        for length in lengths:
            c = cells[name, length]
            text = entry(c["scores"]) if "scores" in c else f"needs {c['least']:,} tokens"
            row += text.rjust(20)
        say(row)
    found = averages(result["cells"])
    if found:
        row = "  average          "
        for length in lengths:
            text = f"of {found[length][1]}: {entry(found[length][0])}" if length in found else "-"
            row += text.rjust(20)
        say(row)
    for name, reason in result["skipped"].items():
        say(f"  {name} skipped: {reason}")


def summary(result):
    """The average over the tasks, whose number is part of the name: only equal ones compare."""
    return {f"ruler_{n}_tasks_at_{length}": float(np.mean(scores))
            for length, (scores, n) in averages(result["cells"]).items()}
