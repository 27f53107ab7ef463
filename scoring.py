"""
Asking a trained model: how likely it holds given continuations, and what it answers. eval.py's
parts (needle, ruler, harness …) are built on these.

    batcher = Batcher(device="cuda")
    scores = score(model, contexts, continuations, batcher)   # log-likelihoods, greedy or not
    answers = answer(model, prompts, limits, stops, tokenizer, batcher)  # greedy texts

Ids come as 1-D numpy arrays. A prompt that is to be read as a document begins with a separator.
"""
import functools
import os
import time
from collections import Counter
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from configurator import duration, say
from model import KVCache
from sample import draw_token, stream


class Progress:
    """
    Shows how far a part is and the time left: a bar on a terminal; else, as in a log file, a line
    at its beginning and another every 10 seconds.
    """

    def __init__(self, part, steps):
        self.part = part
        self.steps = steps
        self.done = 0
        self.bar = tqdm(total=steps, desc=part, leave=False, disable=None)  # None: no terminal
        self.began = time.time()
        self.shown = self.began
        if self.bar.disable:
            say(f"{part}: {steps} steps")

    def step(self, n=1):
        self.done += n
        self.bar.update(n)
        now = time.time()
        if self.bar.disable and now > self.shown + 10:
            self.shown = now
            left = (now - self.began) / self.done * (self.steps - self.done)
            say(f"{self.part}: {self.done} of {self.steps} steps, {duration(left)} left")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()


class Batcher:
    """
    Cuts work into batches. rows: sequences in one; 0 = as many as make up `tokens` tokens.
    A GPU whose memory is full gets half as many, from then on.
    """

    def __init__(self, rows=0, device="cpu"):
        self.rows = rows
        self.tokens = 2**19 if device.startswith("cuda") else 2**13

    def run(self, work, items, lengths, progress=None, groups=None):
        """
        work(batch of items) -> a list of their results. Returns all results, in the items' order.
        lengths: tokens of each item. The longest come first, so that a batch has similar lengths.
        groups: a value for each item; items of one value come one after the other.
        """
        def place(i):
            return (groups[i] if groups else (), -lengths[i])
        waiting = sorted(range(len(items)), key=place)
        results = [None] * len(items)
        while waiting:
            batch, longest = self.next_batch(waiting, lengths)
            try:
                found = work([items[i] for i in batch])
            except torch.cuda.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                found = None
            if found is None:  # only here does no traceback hold tensors any more
                torch.cuda.empty_cache()
                self.halve(len(batch), longest)
                continue
            for i, result in zip(batch, found, strict=True):
                results[i] = result
            waiting = waiting[len(batch):]
            if progress:
                progress.step(len(batch))
        return results

    def next_batch(self, waiting, lengths):
        """The first of the waiting items, as many as fit, and the longest length among them."""
        if self.rows:
            batch = waiting[:self.rows]
            return batch, max(lengths[i] for i in batch)
        n = longest = 0
        for i in waiting:  # a new group may begin with an item that is longer than those before it
            grown = max(longest, lengths[i])
            if n and (n + 1) * grown > self.tokens:
                break
            n, longest = n + 1, grown
        return waiting[:n], longest

    def halve(self, n, length):
        """Batches of n rows of this length do not fit."""
        if self.rows:
            self.rows = n // 2
        else:
            self.tokens = n // 2 * length


def to_ids(ids, device="cpu"):
    """1-D numpy array of ids -> int64 tensor."""
    return torch.from_numpy(np.asarray(ids).astype(np.int64)).to(device)


# --------------------------------------------------------------------------------------------------
# Likelihoods

LOGITS = 2**25  # logits computed at a time: 128 MB in fp32


def token_scores(model, x, targets):
    """
    x (B, T, C), what the trunk returns; targets (B, T), -1 = ignored.
    Returns the log-likelihood of each target, 0 where it is ignored, and whether it is the
    likeliest token: (B, T) fp32 and (B, T) bool. Holds the logits of a part of the tokens only.
    """
    likelihoods, greedy = [], []
    rows = x.flatten(0, 1)[None]  # (1, B·T, C)
    n = max(1, LOGITS // model.config.vocab_size)
    for part, target in zip(rows.split(n, 1), targets.flatten().split(n)):
        logits = model.head(part)[0].float()  # (n, V)
        likelihoods.append(-F.cross_entropy(logits, target, ignore_index=-1, reduction="none"))
        greedy.append(logits.argmax(-1) == target)
    return torch.cat(likelihoods).view(targets.shape), torch.cat(greedy).view(targets.shape)


class Score(NamedTuple):
    likelihood: float  # log-likelihood of the continuation, in nats
    greedy: bool  # would greedy decoding write it?


@torch.no_grad()
def score_batch(model, contexts, continuations):
    """score, in one batch. What all contexts begin with is computed once, each context once."""
    device = model.embed.weight.device
    n = len(contexts)
    lengths = torch.tensor([len(c) for c in contexts], device=device)  # (n,)
    longest = max(len(c) for row in continuations for c in row)
    # 1. what all contexts begin with; each keeps a token of its own
    cache = KVCache(1, int(lengths.max()) + longest, device)
    shared = len(os.path.commonprefix([c.tolist() for c in contexts]))
    shared = min(shared, int(lengths.min()) - 1)
    if shared:
        model.trunk(to_ids(contexts[0][:shared], device)[None], cache=cache)
    cache.repeat(n)
    # 2. the rest of each context, padded on the right, where no token sees the padding
    rest = pad_sequence([to_ids(c[shared:]) for c in contexts], batch_first=True).to(device)
    x = model.trunk(rest, cache=cache)[0]  # (n, T, C)
    last = x[torch.arange(n, device=device), lengths - shared - 1][:, None]  # (n, 1, C)
    # 3. the continuations: the first of every context, then the second, … Each overwrites the one
    #    before it in the cache. A context that has no more of them gets an empty one
    columns = []
    for column in zip_longest(*continuations, fillvalue=()):
        targets = pad_sequence([to_ids(c) for c in column], batch_first=True, padding_value=-1)
        targets = targets.to(device)  # (n, longest)
        x = last
        if targets.size(1) > 1:
            cache.length = lengths
            more = model.trunk(targets[:, :-1].clamp(min=0), cache=cache)[0]  # (n, longest - 1, C)
            x = torch.cat((last, more), 1)  # (n, longest, C)
        likelihood, greedy = token_scores(model, x, targets)
        likelihood = likelihood.sum(1).tolist()  # (n,)
        greedy = (greedy | (targets < 0)).all(1).tolist()  # (n,)
        columns.append(list(map(Score, likelihood, greedy)))
    return [list(row)[:len(given)] for row, given in zip(zip(*columns), continuations)]


def score(model, contexts, continuations, batcher, progress=None):
    """
    How likely the model holds continuations. contexts: n arrays of ids; continuations: for each,
    a list of arrays. None is empty, and context and continuation fit into block_size + 1 tokens.
    Returns for each context a list of Scores, one per continuation.
    """
    items = list(zip(contexts, continuations))
    lengths = [len(context) + max(map(len, row)) for context, row in items]
    # Contexts that begin alike, as examples of one few-shot task do, are batched together
    begins = [tuple(context[:64].tolist()) for context in contexts]
    times = Counter(begins)
    groups = [begin if times[begin] > 1 else () for begin in begins]

    def work(batch):
        contexts, continuations = zip(*batch)
        longest = max(map(len, contexts)) + max(len(c) for row in continuations for c in row) - 1
        if longest > model.config.block_size and len(batch) > 1:  # padded to it, they do not fit
            half = len(batch) // 2
            return work(batch[:half]) + work(batch[half:])
        return score_batch(model, contexts, continuations)
    return batcher.run(work, items, lengths, progress, groups)


# --------------------------------------------------------------------------------------------------
# Answers

class Answer(NamedTuple):
    text: str  # what was written before the stop
    stopped: bool  # False: it reached the limit, or the end of the context, without a stop


greedy_token = functools.partial(draw_token, temperature=0)  # (B, V) -> (B,)


def answer(model, prompts, limits, stops, tokenizer, batcher, progress=None, draw=greedy_token):
    """
    What the model writes behind each prompt (n arrays of ids), greedily.
    limits: the most tokens of each answer. stops: for each, strings that end it; a separator does,
    too. Returns n Answers.
    """
    items = list(zip(prompts, limits, stops))
    lengths = [len(prompt) + limit for prompt, limit, _ in items]

    def work(batch):
        return answer_batch(model, batch, tokenizer, draw)
    return batcher.run(work, items, lengths, progress)


def answer_batch(model, batch, tokenizer, draw):
    """answer, in one batch of (prompt, limit, stops)."""
    written = [b""] * len(batch)
    answers = [None] * len(batch)
    longest = max(limit for _, limit, _ in batch)
    prompts = [to_ids(prompt) for prompt, _, _ in batch]
    for step, tokens in enumerate(stream(model, prompts, longest, draw, tokenizer.separator), 1):
        for i, (token, (_, limit, stops)) in enumerate(zip(tokens.tolist(), batch)):
            if answers[i]:
                continue
            written[i] += tokenizer.token_bytes(token)
            text = written[i].decode(errors="replace")
            ends = [text.find(stop) for stop in stops if stop in text]
            if ends:
                answers[i] = Answer(text[:min(ends)], True)
            elif token in (tokenizer.separator, -1):
                answers[i] = Answer(text, token != -1)
            elif step == limit:
                answers[i] = Answer(text, False)
        if all(answers):
            break
    return [found or Answer(w.decode(errors="replace"), False)
            for found, w in zip(answers, written)]
