"""
Needle in a haystack: a fact somewhere in a long text, and the question for it. A part of eval.py.
"""
import random
import re

import numpy as np

from configurator import UserError, say
from data import passkey_line, random_passkey
from scoring import Progress, score

SETTINGS = "data lengths depths seeds samples distractors"


def check(cfg, subject):
    """Refuse what cannot be measured. Raises UserError."""
    subject.lengths()


def measure(cfg, subject):
    hay = haystack(subject.val, subject.tokenizer)
    depths = [i / max(1, cfg.depths - 1) for i in range(cfg.depths)]
    cells = []
    skipped = {}
    for length in subject.lengths() or quarters(subject.T):
        try:
            cells += needle(subject.model, hay, subject.tokenizer, length, depths, cfg.seeds,
                            cfg.samples, cfg.distractors, subject.batcher)
        except UserError as e:  # the needle does not fit: length or validation text too short
            skipped[length] = str(e)
    return {"cells": cells, "skipped": skipped}


def quarters(T):
    """The lengths where none are given: a quarter, half and all of the context T."""
    return sorted({max(1, T // 4), max(1, T // 2), T})


def haystack(ids, tokenizer):
    """
    The validation documents that hold no pass-key in their first 4000 tokens, joined without
    separators: 1-D array of ids.
    """
    ends = np.flatnonzero(ids == tokenizer.separator)
    docs = [ids[a:b] for a, b in zip(np.append(0, ends[:-1] + 1), ends)]
    passkey = re.compile(r"^[A-Z]{2}=[a-z0-9]{4}$", re.M)
    docs = [d for d in docs if not passkey.search(tokenizer.decode(d[:4000]))]
    return np.concatenate(docs) if docs else ids[:0]


def needle_prompt(hay, tokenizer, length, depth, n_answer, rng):
    """
    A prompt of length - n_answer ids: text from a random place of the haystack, with a fact
    ("\\nAB=x1y2\\n") inserted at `depth` (0 to 1), and its question ("\\nAB=").
    Returns the ids, the key ("x1y2") and the fact's place, a slice.

    Question, key and line end are encoded one by one. In a BPE vocabulary "=x4" may be one token;
    then the fact would hold other tokens than the question and the answer.
    """
    name, key = random_passkey(rng)
    question = tokenizer.encode("\n" + passkey_line(name, "").rstrip("\n"))
    fact = np.concatenate((question, tokenizer.encode(key), tokenizer.encode("\n")))
    room = length - len(fact) - len(question) - n_answer
    if room < 0 or room > len(hay):
        raise UserError(f"a needle at {length} tokens needs {max(0, room)} tokens of other "
                        f"validation text and {length - room} for fact, question and answer; "
                        f"there are {len(hay)}")
    at = rng.randrange(len(hay) - room + 1)
    text = hay[at:at + room]
    cut = round(depth * room)
    ids = np.concatenate((text[:cut], fact, text[cut:], question))
    return ids, key, slice(cut, cut + len(fact))


def longest_answer():
    """The most tokens that a key may take: one per character."""
    return len(random_passkey(random.Random())[1])


def needle(model, hay, tokenizer, length, depths, seeds, samples, distractors, batcher):
    """
    Retrieval at one context length, the same needles for every size of batches.
    Returns a list of cells, one per depth: length, depth, accuracy and accuracy_std (exact match
    of the generated key, mean and standard deviation over seeds), rank and rank_std (of the right
    key among 1 + distractors, 1 is best).
    """
    cells = []
    with Progress(f"needle at {length} tokens", len(depths) * seeds) as progress:
        for depth in depths:
            seed_accuracy, seed_rank = [], []
            for seed in range(seeds):
                rng = random.Random(f"{seed} {length} {depth}")
                # 1. needles: prompt, right key and wrong keys of one after those of the other
                prompts, keys = [], []
                for _ in range(samples):
                    ids, key, _ = needle_prompt(hay, tokenizer, length, depth, longest_answer(),
                                                rng)
                    wrong = [random_passkey(rng)[1] for _ in range(distractors)]
                    prompts.append(ids)
                    keys.append([tokenizer.encode(k) for k in [key, *wrong]])
                # 2. their scores
                hits, ranks = [], []
                for right, *wrong in score(model, prompts, keys, batcher):
                    hits.append(right.greedy)
                    ranks.append(1 + sum(w.likelihood > right.likelihood for w in wrong))
                seed_accuracy.append(np.mean(hits))
                seed_rank.append(np.mean(ranks))
                progress.step()
            cells.append({
                "length": length, "depth": depth,
                "accuracy": float(np.mean(seed_accuracy)),
                "accuracy_std": float(np.std(seed_accuracy)),
                "rank": float(np.mean(seed_rank)), "rank_std": float(np.std(seed_rank))})
    return cells


def show(result):
    cells = result["cells"]
    if cells:
        depths = sorted({c["depth"] for c in cells})
        say("\nneedle: exact match of the generated key, mean ± std over seeds "
            "(rank of the right key)\n"
            "  length  " + "".join(f"{f'depth {d:.2f}':>22}" for d in depths))
        for length in sorted({c["length"] for c in cells}):
            row = [f"{c['accuracy']:9.2f} ± {c['accuracy_std']:.2f} ({c['rank']:.1f})"
                   for c in cells if c["length"] == length]
            say(f"{length:8}  " + "".join(text.rjust(22) for text in row))
    for length, reason in result["skipped"].items():
        say(f"\nneedle at {length} tokens skipped: {reason}")


def summary(result):
    cells = result["cells"]
    if not cells:
        return {}
    longest = max(c["length"] for c in cells)
    accuracy = [c["accuracy"] for c in cells if c["length"] == longest]
    return {f"needle_accuracy_at_{longest}": float(np.mean(accuracy))}
