"""
What lm-evaluation-harness (lm-eval) asks of a model, answered by ours: the log-likelihood of a
continuation, that of a whole text, and a text to generate. harness.py makes the requests.

    adapter = Adapter(subject)
    adapter.loglikelihood(requests)  # -> [(log-likelihood, would it be generated?), …]
"""
import functools

import numpy as np
import torch

from configurator import UserError
from sample import draw_token
from scoring import Progress, Score, answer, greedy_token, score

ANSWER_TOKENS = 256  # the limit where a task names none, as in lm-eval
CHOICES = 16  # answers to a question that are scored at a time


class Adapter:
    """
    lm-eval's requests, answered by our model. A request's args hold texts.

    Every context begins with the separator, as a document of the training does: what a BOS is to
    other models. A context that is too long loses its beginning, the separator first, as in
    lm-eval's own models.
    """

    def __init__(self, subject, name=""):
        self.model = subject.model
        self.tokenizer = subject.tokenizer
        self.batcher = subject.batcher
        self.T = subject.T
        self.name = name
        # prompts, those of them that were too long; texts written, those that reached the limit,
        # the highest limit in tokens
        self.counts = {"requests": 0, "truncated": 0, "answers": 0, "unfinished": 0,
                       "answer_limit": 0}

    def encode(self, text):
        """A text as a document: the separator and its ids."""
        return np.append(self.tokenizer.separator, self.tokenizer.encode(text)).astype(np.int64)

    def encode_pair(self, context, continuation):
        """
        Ids of both. As in lm-eval, blanks between them belong to the continuation (many a token
        begins with one), and the two are encoded as one text.
        """
        stripped = context.rstrip()
        continuation = context[len(stripped):] + continuation
        first = self.encode(stripped)
        return first, self.encode(stripped + continuation)[len(first):]

    def fit(self, ids, answer_tokens):
        """The ids of a context, without its beginning where the answer would have no room."""
        room = self.T - answer_tokens
        if room < 1:
            raise UserError(f"{self.name}: an answer to be scored has {answer_tokens + 1} tokens, "
                            f"the context {self.T}: --block_size makes it longer")
        self.counts["requests"] += 1
        self.counts["truncated"] += len(ids) > room
        return ids[-room:]

    def loglikelihood(self, requests):
        """args: (context, continuation). Returns (log-likelihood, would it be generated?) each."""
        pairs = []
        for request in requests:
            context, continuation = self.encode_pair(*request.args)
            # the last token of the continuation is never read
            pairs.append((self.fit(context, len(continuation) - 1), continuation))
        scores = self.score_pairs(pairs, "answers", CHOICES)
        return [(found.likelihood, found.greedy) for found in scores]

    def loglikelihood_rolling(self, requests):
        """
        args: (text,). Returns the log-likelihood of each text: windows of T tokens one behind the
        other, the first of which begins with the separator, and the last as early as it can.
        """
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
        pairs, owners = [], []
        for i, request in enumerate(requests):
            separator, *ids = self.encode(request.args[0]).tolist()
            for window in get_rolling_token_windows(ids, separator, self.T, 1):
                pairs.append(tuple(map(np.array, make_disjoint_window(window))))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, found in zip(owners, self.score_pairs(pairs, "windows", 1)):
            totals[i] += found.likelihood
        return totals

    def score_pairs(self, pairs, what, most):
        """
        A Score for each (context, continuation), n pairs of ids. A context is read once for `most`
        continuations. With more, as where all texts begin behind the same separator, they would be
        scored one after the other, not side by side in a batch.
        """
        # 1. the continuations of each context
        members = {}
        for i, (context, continuation) in enumerate(pairs):
            if len(continuation):  # an empty one is certain
                members.setdefault(context.tobytes(), []).append(i)
        rows = [same[i:i + most] for same in members.values() for i in range(0, len(same), most)]
        # 2. their scores
        with Progress(f"{self.name}, {what}", len(rows)) as progress:
            found = score(self.model, [pairs[row[0]][0] for row in rows],
                          [[pairs[i][1] for i in row] for row in rows], self.batcher, progress)
        # 3. in the order of the pairs
        scores = [Score(0.0, True)] * len(pairs)
        for row, row_scores in zip(rows, found):
            for i, one in zip(row, row_scores):
                scores[i] = one
        return scores

    def generate_until(self, requests):
        """args: (context, generation settings). Returns a text each, without what stopped it."""
        texts = [""] * len(requests)
        # 1. requests that draw alike can share a batch
        kinds = {}
        for i, request in enumerate(requests):
            context, settings = request.args
            limit, stops, how = read_generation(self.name, settings)
            limit = min(limit, self.T // 2)  # an answer leaves half the context to its prompt
            prompt = self.fit(self.encode(context), limit)
            kinds.setdefault(how, []).append((i, prompt, limit, stops))
        # 2. the answers
        with Progress(f"{self.name}, texts", len(requests)) as progress:
            for how, items in kinds.items():
                numbers, prompts, limits, stops = zip(*items)
                found = answer(self.model, prompts, limits, stops, self.tokenizer, self.batcher,
                               progress, drawing(how, self.model))
                for i, one in zip(numbers, found):
                    texts[i] = one.text
                    self.counts["unfinished"] += not one.stopped
                self.counts["answers"] += len(items)
                self.counts["answer_limit"] = max(self.counts["answer_limit"], *limits)
        return texts


def for_lm_eval(adapter):
    """The adapter as the type that lm-eval asks for."""
    from lm_eval.api.model import LM

    class Model(LM):
        loglikelihood = staticmethod(adapter.loglikelihood)
        loglikelihood_rolling = staticmethod(adapter.loglikelihood_rolling)
        generate_until = staticmethod(adapter.generate_until)
    return Model()


def read_generation(name, settings):
    """
    A task's generation settings -> the most tokens of an answer, the strings that end it, and
    how to draw tokens: None, the likeliest, or (temperature, top_k, top_p). Raises UserError.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    stops = given.pop("until", [])
    stops = [stops] if isinstance(stops, str) else stops
    limit = ANSWER_TOKENS
    for key in ("max_completion_tokens", "max_tokens", "max_new_tokens", "max_gen_toks"):
        limit = int(given.pop(key, limit))  # in lm-eval, too, the last of these names counts
    temperature = float(given.pop("temperature", 0 if not given.get("do_sample") else 1))
    sampled = given.pop("do_sample", temperature > 0)
    top_k, top_p = int(given.pop("top_k", 0)), float(given.pop("top_p", 1))
    if given:
        raise UserError(f"{name} asks for the generation setting {', '.join(given)}, which is not "
                        "supported: do_sample, temperature, top_k, top_p, until and max_gen_toks "
                        "are")
    how = (temperature, top_k, top_p) if sampled and temperature > 0 else None
    return limit, [stop for stop in stops if stop], how


def drawing(how, model):
    """The `draw` of scoring.answer, with the same random numbers in every evaluation."""
    if how is None:
        return greedy_token
    temperature, top_k, top_p = how
    generator = torch.Generator(model.embed.weight.device).manual_seed(0)
    return functools.partial(draw_token, temperature=temperature, top_k=top_k, top_p=top_p,
                             generator=generator)
