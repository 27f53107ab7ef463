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
here the default is 10 with each of 3 seeds. A seed has its own names, values, words, places and
questions, which are drawn from the whole file (RULER's are the first); the text around the needles
is the same.
"""
import functools
import math
import random
import re
from typing import NamedTuple

import numpy as np

from configurator import UserError, say
from localfiles import optional
from needle import check_haystack, mean_std, shade
from ruler_tasks import TASKS, Sources, read_questions
from scoring import Progress, answer

WORDLESS = {"niah_multikey_3", "vt", "fwe", "qa_1", "qa_2"}  # need no package for words


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


def fill(write, size, length, fewest, guess):
    """
    The Sample write(n) with the largest n whose size is at most `length`, which holds for fewest.
    The search begins at guess. As the size grows nearly in proportion to n, it takes few steps.
    """
    best = write(fewest)
    low, high = fewest, math.inf  # low fits, high does not
    n = guess
    while high - low > 1:
        n = min(max(n, low + 1), high - 1)
        sample = write(n)
        tokens = size(sample)
        if tokens <= length:
            low, best = n, sample
        else:
            high = n
        if tokens == math.inf:  # there is no material for n units
            n = (low + high) // 2
        else:
            n = n * length // tokens
    return best


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
    if needed > length:
        return [], needed
    samples = []
    n = task.fewest
    for seed, i in order:
        write_one = functools.partial(write, seed=seed, i=i)
        samples.append(fill(write_one, size, length, task.fewest, n))
        n = samples[-1].n
    return samples, needed


def least_length(name, length, n_samples, seeds, sources, tokenizer):
    """The least length, from `length` on, at which a task fits. Longer ones may ask for more."""
    while True:
        samples, needed = write_samples(name, length, n_samples, seeds, sources, tokenizer)
        if samples:
            return length
        length = needed


# --------------------------------------------------------------------------------------------------
# The parts

class Task:
    """One of the tasks: a part of eval.py."""

    def __init__(self, name):
        self.name = name
        self.file = TASKS[name].parameters.get("file", "")  # a setting that names its questions
        self.in_essay = TASKS[name].parameters.get("haystack") == "essay"
        text = "data haystack" if self.in_essay else ""
        self.SETTINGS = f"lengths seeds samples {text} {self.file}"

    def check(self, cfg, subject):
        """Refuse what cannot be measured. Raises UserError."""
        subject.lengths()
        check_haystack(cfg)
        if self.name not in WORDLESS:
            optional("wonderwords")
        path = getattr(cfg, self.file) if self.file else ""
        if path and not read_questions(self.file, path)[0]:
            raise UserError(f"{path} holds no question with an answer")

    def measure(self, cfg, subject):
        """
        Returns cells, one per length, with the length and `scores`, one per seed, 100 is best; or
        `least`, the least length that the task needs; and where the text around needles is from.
        """
        if self.file and not getattr(cfg, self.file):
            raise UserError(f"--{self.file}=FILE names its questions")
        lengths = subject.lengths() or [subject.T]
        sources = Sources(cfg, subject, max(lengths))
        cells = [ruler(subject, self.name, length, cfg.samples, cfg.seeds, sources)
                 for length in lengths]
        return {"cells": cells, "haystack": sources.essay[0] if self.in_essay else None}

    def show(self, result):
        entries = []
        for cell in result["cells"]:
            if "least" in cell:
                found = f"needs {cell['least']:,} tokens"
            else:
                found = shown(cell["scores"])
            entries.append(f"{cell['length']:7} tokens: {found:20}")
        haystack = f"  in {result['haystack']}" if result["haystack"] else ""
        say(f"{self.name:16}" + "".join(entries) + haystack)

    def summary(self, result):
        return {f"{self.name}_at_{cell['length']}": float(np.mean(cell["scores"]))
                for cell in result["cells"] if "scores" in cell}


def shown(scores):
    mean, std = mean_std(scores)
    return f"{shade(mean / 100)} {mean:.1f} ± {std:.1f}"


def ruler(subject, name, length, n_samples, seeds, sources):
    """A cell of Task.measure: one task at one length."""
    arguments = (n_samples, seeds, sources, subject.tokenizer)
    samples, needed = write_samples(name, length, *arguments)
    if not samples:
        return {"length": length, "least": least_length(name, needed, *arguments)}
    with Progress(f"{name} at {length} tokens", len(samples)) as progress:
        texts = answer(subject.model, [s.ids for s in samples],
                       [TASKS[name].tokens] * len(samples), [[]] * len(samples),
                       subject.tokenizer, subject.batcher, progress)
    scores = [score_answer(name, written.text, sample.answers)
              for written, sample in zip(texts, samples)]
    return {"length": length,
            "scores": [100 * float(np.mean(scores[s * n_samples:(s + 1) * n_samples]))
                       for s in range(seeds)]}


def all_cells(results):
    """[(task, cell), …] of the tasks of RULER in eval.json's results."""
    return [(name, cell) for name in TASKS if name in results for cell in results[name]["cells"]]


def show_averages(results):
    """The average over the tasks that fit, for each length at which there are several."""
    scores = {}
    for _, cell in all_cells(results):
        if "scores" in cell:
            scores.setdefault(cell["length"], []).append(cell["scores"])
    for length, found in sorted(scores.items()):
        same_seeds = len({len(of_task) for of_task in found}) == 1
        if len(found) > 1 and same_seeds:
            average = np.mean(found, 0)  # one for each seed
            say(f"RULER, average of {len(found)} of {len(TASKS)} tasks at {length} tokens: "
                f"{shown(average)}")
