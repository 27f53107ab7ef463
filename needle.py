"""
Needle in a haystack: facts somewhere in a long text, and a question for them. A part of eval.py.

    python eval.py --tasks=needle --needles=single,multikey,multivalue,multiquery
    python eval.py --tasks=needle --haystack=essays.txt --block_size=4096 --lengths=1024,4096

A fact is a pass-key line, "\\nAB=x1y2\\n", and its question is "\\nAB=". The kinds of needles are
those of RULER (arXiv 2404.06654, section 3):
    single      one fact is told and asked
    multikey    three facts with other names are told, too
    multivalue  one name is told four values, and all of them are to be named
    multiquery  four facts are told, and all of them are asked
Where several answers are wanted the score is the share that is found. Multivalue asks once: the
model writes on greedily for as many tokens as four facts take, and a value counts if it appears
there. Multiquery asks one question after the other, each behind the right answers to those before.
"""
import difflib
import random
import re
import sys

import numpy as np

from configurator import UserError, listed, say
from data import passkey_line, random_passkey
from scoring import Progress, answer, score
from texts import text_files

SETTINGS = "data haystack needles lengths depths seeds samples distractors"
KINDS = ("single", "multikey", "multivalue", "multiquery")
SEVERAL = 4  # facts of the kinds with several; RULER's number
HAYSTACK_TOKENS = 2**22  # of a haystack that is read at most
TRIES = 1000  # draws of names and keys until none stands in the text already


def check(cfg, subject):
    """Refuse what cannot be measured. Raises UserError."""
    subject.lengths()
    kinds_of(cfg)
    check_haystack(cfg)


def kinds_of(cfg):
    """cfg.needles as a list of kinds. Raises UserError."""
    kinds = listed(cfg.needles)
    for kind in kinds:
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(KINDS)}"
            raise UserError(f"needles: there is no {kind!r}: {hint}")
    return kinds or ["single"]


def measure(cfg, subject):
    name, hay = read_haystack(cfg, subject)
    depths = [i / max(1, cfg.depths - 1) for i in range(cfg.depths)]
    cells = []
    skipped = {}
    for kind in kinds_of(cfg):
        for length in subject.lengths() or quarters(subject.T):
            try:
                cells += needle(subject.model, hay, subject.tokenizer, length, depths, cfg.seeds,
                                cfg.samples, cfg.distractors, subject.batcher, kind)
            except UserError as e:  # it does not fit: length or haystack too short
                skipped[f"{kind} at {length} tokens"] = str(e)
    if not cells:
        raise UserError("; ".join(dict.fromkeys(skipped.values())))
    return {"haystack": name, "cells": cells, "skipped": skipped}


def quarters(T):
    """The lengths where none are given: a quarter, half and all of the context T."""
    return sorted({max(1, T // 4), max(1, T // 2), T})


# --------------------------------------------------------------------------------------------------
# Haystacks

def split_documents(ids, tokenizer):
    """
    The documents of a text, without their separators: those that hold a pass-key in their first
    4000 tokens, and the others. Two lists of 1-D arrays.
    """
    ends = np.append(np.flatnonzero(ids == tokenizer.separator), len(ids))  # the last may be cut
    passkey = re.compile(r"^[A-Z]{2}=[a-z0-9]{4}$", re.M)
    with_passkey, others = [], []
    for begin, end in zip(np.append(0, ends[:-1] + 1), ends):
        doc = ids[begin:end]
        found = passkey.search(tokenizer.decode(doc[:4000]))
        (with_passkey if found else others).append(doc)
    return with_passkey, others


def haystack(ids, tokenizer):
    """The documents of a text without pass-keys, joined without separators: 1-D array of ids."""
    _, docs = split_documents(ids, tokenizer)
    return np.concatenate(docs) if docs else ids[:0]


def check_haystack(cfg):
    """Refuse a haystack that is not there. Raises UserError."""
    if cfg.haystack:
        text_files(cfg.haystack)


def read_haystack(cfg, subject):
    """
    The text that the facts are hidden in, of cfg.haystack (see texts.py) or of the model's data:
    (where it is from, 1-D array of ids).
    """
    if not cfg.haystack:
        return f"validation text of {subject.data.path}", haystack(subject.val, subject.tokenizer)
    ids = subject.text(cfg.haystack, HAYSTACK_TOKENS)
    return cfg.haystack, haystack(ids, subject.tokenizer)


# --------------------------------------------------------------------------------------------------
# Prompts

def encode_question(tokenizer, name):
    return tokenizer.encode("\n" + passkey_line(name, "").rstrip("\n"))


def encode_fact(tokenizer, name, key):
    """
    Question, key and line end are encoded one by one. In a BPE vocabulary "=x4" may be one token;
    then the fact would hold other tokens than the question and the answer.
    """
    return np.concatenate((encode_question(tokenizer, name), tokenizer.encode(key),
                           tokenizer.encode("\n")))


def draw_facts(kind, rng):
    """The facts of a prompt, [(name, key), …], all different; the first is asked for."""
    n = 1 if kind == "single" else SEVERAL
    while True:
        facts = [random_passkey(rng) for _ in range(n)]
        names, keys = zip(*facts)
        if len(set(names)) == len(set(keys)) == n:
            break
    return [(names[0], key) for key in keys] if kind == "multivalue" else facts


def room_behind(kind, facts, tokenizer, n_answer):
    """Tokens to keep free behind the first question; n_answer: the most of one answer."""
    if kind in ("single", "multikey"):
        return n_answer
    between = [len(encode_fact(tokenizer, name, "")) for name, _ in facts[1:]]
    return sum(between) + n_answer * len(facts)


def needle_prompt(hay, tokenizer, length, depth, n_answer, rng, kind="single"):
    """
    A prompt of at most `length` ids with what is to follow: text from a random place of the
    haystack, with a fact at `depth` (0 to 1) of it, further facts anywhere, and a question.
    Returns the ids, the facts [(name, key), …], of which the first is asked, and the place of the
    first, a slice. No name or key stands in the text already. Raises UserError where hay or length
    are too short, or where hay leaves no name.
    """
    for _ in range(TRIES):
        # 1. the facts, and the text that they leave room for
        facts = draw_facts(kind, rng)
        coded = [encode_fact(tokenizer, name, key) for name, key in facts]
        question = encode_question(tokenizer, facts[0][0])
        room = length - sum(map(len, coded)) - len(question)
        room -= room_behind(kind, facts, tokenizer, n_answer)
        if room < 0 or room > len(hay):
            raise UserError(f"a needle at {length} tokens needs {max(0, room)} tokens of haystack "
                            f"and {length - room} for facts, questions and answers; the haystack "
                            f"has {len(hay)}")
        at = rng.randrange(len(hay) - room + 1)
        text = hay[at:at + room]
        words = tokenizer.decode(text)
        if not any(f"{name}=" in words or key in words for name, key in facts):
            break
    else:
        raise UserError("the haystack holds every name that a fact could have, like AB=: "
                        "--haystack=FILE names another")
    # 2. where they are inserted
    cuts = [round(depth * room)] + [rng.randrange(room + 1) for _ in facts[1:]]
    order = sorted(range(len(facts)), key=lambda i: (cuts[i], i))
    pieces = []
    done = 0  # tokens of the text that stand in pieces
    for i in order:
        pieces += [text[done:cuts[i]], coded[i]]
        done = cuts[i]
    before = sum(len(coded[i]) for i in order[:order.index(0)])
    place = slice(cuts[0] + before, cuts[0] + before + len(coded[0]))
    return np.concatenate((*pieces, text[done:], question)), facts, place


def longest_answer():
    """The most tokens that a key may take: one per character."""
    return len(random_passkey(random.Random())[1])


def draw_wrong_keys(facts, n, rng):
    """n keys that are not told, all different."""
    told = {key for _, key in facts}
    wrong = []
    while len(wrong) < n:
        key = random_passkey(rng)[1]
        if key not in told and key not in wrong:
            wrong.append(key)
    return wrong


# --------------------------------------------------------------------------------------------------
# Answers

def rank(right, wrong):
    """
    Where the right key stands among the wrong ones, 1 is best. All are log-likelihoods. Equal ones
    share their places, so that a model without a preference gets the middle; NaN is the last.
    """
    return 1 + sum((not w < right) + (not w <= right) for w in wrong) / 2


def ask(model, prompts, wrong, kind, tokenizer, batcher):
    """
    Ask for the first fact of each prompt, or for all (multiquery). prompts: what needle_prompt
    returns. wrong: for each, as many wrong keys as the right one is ranked among; the keys of the
    other facts replace the first of them. Returns for each question 1 if greedy decoding writes the
    key, else 0, and the key's rank, 1 = best.
    """
    contexts, keys = [], []
    for (ids, facts, _), others in zip(prompts, wrong):
        asked = facts if kind == "multiquery" else facts[:1]
        for i, (name, key) in enumerate(asked):
            if i:
                ids = np.concatenate((ids, encode_question(tokenizer, name)))
            told = [k for _, k in facts if k != key]
            candidates = [key, *(told + others[len(told):])[:len(others)]]
            contexts.append(ids)
            keys.append([tokenizer.encode(k) for k in candidates])
            ids = np.concatenate((ids, tokenizer.encode(key), tokenizer.encode("\n")))
    hits, ranks = [], []
    for right, *rest in score(model, contexts, keys, batcher):
        hits.append(right.greedy)
        ranks.append(rank(right.likelihood, [w.likelihood for w in rest]))
    return hits, ranks


def write_values(model, prompts, tokenizer, batcher):
    """Multivalue: the share of the values that appear in what the model writes, per prompt."""
    limits = [room_behind("multivalue", facts, tokenizer, longest_answer())
              for _, facts, _ in prompts]
    texts = answer(model, [ids for ids, _, _ in prompts], limits, [[]] * len(prompts), tokenizer,
                   batcher)
    return [np.mean([key in written.text for _, key in facts])
            for written, (_, facts, _) in zip(texts, prompts)]


def mean_std(values):
    """Mean and standard deviation over seeds, that of a sample; of one value 0."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return float(np.mean(values)), std


def needle(model, hay, tokenizer, length, depths, seeds, samples, distractors, batcher,
           kind="single"):
    """
    Retrieval at one context length, the same needles for every size of batches.
    Returns a list of cells, one per depth: kind, length, depth, accuracy and accuracy_std (share of
    the wanted keys that the model names, mean and standard deviation over seeds), rank and rank_std
    (of the right key among 1 + distractors, 1 is best; not of multivalue).
    """
    cells = []
    with Progress(f"needle, {kind}, at {length} tokens", len(depths) * seeds) as progress:
        for depth in depths:
            seed_accuracy, seed_rank = [], []
            for seed in range(seeds):
                rng = random.Random(f"{seed} {length} {depth}")
                prompts, wrong = [], []
                for _ in range(samples):
                    prompts.append(needle_prompt(hay, tokenizer, length, depth, longest_answer(),
                                                 rng, kind))
                    wrong.append(draw_wrong_keys(prompts[-1][1], distractors, rng))
                if kind == "multivalue":
                    hits = write_values(model, prompts, tokenizer, batcher)
                else:
                    hits, ranks = ask(model, prompts, wrong, kind, tokenizer, batcher)
                    seed_rank.append(np.mean(ranks))
                seed_accuracy.append(np.mean(hits))
                progress.step()
            cell = {"kind": kind, "length": length, "depth": depth}
            cell["accuracy"], cell["accuracy_std"] = mean_std(seed_accuracy)
            if seed_rank:
                cell["rank"], cell["rank_std"] = mean_std(seed_rank)
            cells.append(cell)
    return cells


# --------------------------------------------------------------------------------------------------
# The table

def shade(share):
    """A share (0 to 1) as two characters, the darker the larger."""
    scale = " ░▒▓█"
    try:
        scale.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        scale = " .:*#"
    return 2 * scale[round(4 * share)]


def show(result):
    """A heat map of each kind: a row per depth, a column per length."""
    cells = result["cells"]
    if cells:
        say(f"\nneedles in {result['haystack']}: share of the keys that are written,\n"
            "mean ± std over seeds (rank of the right key)")
    for kind in dict.fromkeys(c["kind"] for c in cells):
        grid = {(c["depth"], c["length"]): c for c in cells if c["kind"] == kind}
        depths = sorted({depth for depth, _ in grid})
        lengths = sorted({length for _, length in grid})
        say(f"\n  {kind}, depth" + "".join(f"{f'{n} tokens':>24}" for n in lengths))
        for depth in depths:
            row = f"  {depth:{len(kind) + 7}.2f}"
            for c in (grid[depth, length] for length in lengths):
                rank = f" ({c['rank']:.1f})" if "rank" in c else ""
                text = f"{shade(c['accuracy'])} {c['accuracy']:.2f} ± {c['accuracy_std']:.2f}"
                row += (text + rank).rjust(24)
            say(row)
    for what, reason in result["skipped"].items():
        say(f"\nneedle, {what}, skipped: {reason}")


def summary(result):
    """Accuracy per kind and length, the mean over the depths."""
    found = {}
    for c in result["cells"]:
        name = "needle" if c["kind"] == "single" else f"needle_{c['kind']}"
        found.setdefault(f"{name}_accuracy_at_{c['length']}", []).append(c["accuracy"])
    return {name: float(np.mean(values)) for name, values in found.items()}
