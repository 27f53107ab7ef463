"""
Perplexity: how well a model predicts texts, per token, byte and word, at several context lengths,
and how its loss falls with the tokens that it sees. A part of eval.py.
"""
import math
import re

import numpy as np
import torch

from attention import document_starts
from configurator import UserError, say
from scoring import Progress, to_ids, token_scores
from texts import kind_of_text

SETTINGS = "data lengths max_tokens stride"


def check(cfg, subject):
    """Refuse what cannot be measured, short of the network. Raises UserError."""
    context_lengths(cfg, subject)
    for name in subject.text_names():
        if kind_of_text(name) != "preset":
            text(cfg, subject, name)


def context_lengths(cfg, subject):
    """The lengths to measure at. Raises UserError for a stride that passes tokens over."""
    lengths = subject.lengths() or [subject.T]
    if cfg.stride > min(lengths):
        raise UserError(f"stride {cfg.stride} must lie in the context, 1 to {min(lengths)}")
    return lengths


def text(cfg, subject, name):
    """The ids of a text, max_tokens of them at most. Raises UserError."""
    ids = subject.text(name, cfg.max_tokens)
    if len(ids) < 2:
        raise UserError(f"{name} and max_tokens {cfg.max_tokens} leave nothing to predict")
    return ids


def measure(cfg, subject):
    """
    Returns texts, the names of all that were asked for; rows, for each text and context length what
    `perplexity` returns; and skipped, {text: why it cannot be read}. Raises UserError.
    """
    lengths = context_lengths(cfg, subject)
    names = subject.text_names()
    rows = []
    skipped = {}
    for name in names:
        try:
            ids = text(cfg, subject, name)
        except UserError as e:  # no network, for example
            skipped[name] = str(e)
            continue
        if len(ids) == cfg.max_tokens:
            say(f"{name}: its first {len(ids):,} tokens (--max_tokens=0 takes all)")
        documents = Documents(ids, subject.tokenizer)
        for length in lengths:
            stride = cfg.stride or max(1, length // 2)
            row = perplexity(subject.model, ids, documents, length, stride, subject.batcher,
                             subject.doc_mask, f"perplexity of {name} at {length} tokens")
            rows.append({"text": name, "length": length, "stride": stride, **row})
    if not rows:
        raise UserError("; ".join(skipped.values()))
    return {"texts": names, "rows": rows, "skipped": skipped}


# --------------------------------------------------------------------------------------------------
# Documents

class Documents:
    """
    The documents of ids (n,), and what of them is predicted: all tokens but the first.
    separator    ends a document, to which it belongs
    of_target    (n - 1,) number of the document of each predicted token
    tokens, bytes, words    (documents,) predicted ones of each
    """

    def __init__(self, ids, tokenizer):
        self.separator = tokenizer.separator
        # 1. numbers; a document of which nothing is predicted (a separator in front) has none
        ends = np.asarray(ids[:-1]) == self.separator  # (n - 1,)
        number = np.cumsum(ends, dtype=np.int32)  # (n - 1,)
        self.of_target = number - number[0]
        self.tokens = np.bincount(self.of_target)
        # 2. bytes and words
        spelled = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        n_bytes, n_words = [], []
        at = 1
        for n in self.tokens.tolist():
            raw = b"".join(spelled[i] for i in ids[at:at + n].tolist())
            n_bytes.append(len(raw))
            n_words.append(count_words(raw.decode(errors="replace")))
            at += n
        self.bytes = np.array(n_bytes)
        self.words = np.array(n_words)

    def __len__(self):
        return len(self.tokens)


def count_words(text):
    """
    The pieces of a text between whitespace, as lm-eval counts the words of WikiText
    (lm_eval/tasks/wikitext): a blank in front or at the end adds an empty one. " a b " -> 4
    The harness also joins WikiText's tokens ("a , b" becomes "a, b") before it predicts them, and
    no end of a document: its word perplexity is another number than ours.
    """
    return len(re.split(r"\s+", text))


def ratio(values, sizes):
    """
    values, sizes: (documents,). Returns Σ values / Σ sizes, such as nats per token, and its
    standard error; None with fewer than two documents.
    """
    total = float(sizes.sum())
    if total == 0:
        return math.inf, None
    mean = float(values.sum()) / total
    n = len(values)
    if n < 2:
        return mean, None
    # The sample is one of documents, whose tokens depend on each other and whose sizes vary. So
    # the mean is a ratio estimator, of n documents d:
    #     stderr² = n / (n - 1) · Σ (values_d - mean · size_d)² / (Σ size_d)²
    # (Cochran, Sampling Techniques, 3rd edition, 1977, section 2.11, for an endless population)
    residuals = values - mean * sizes  # (documents,)
    return mean, math.sqrt(n / (n - 1) * float((residuals**2).sum())) / total


def exponential(loss, error):
    """exp(loss) and its standard error, by the slope of exp at the loss."""
    value = math.exp(loss) if loss < 700 else math.inf  # exp(710) overflows
    if error is None:
        return value, None
    return value, value * error


# --------------------------------------------------------------------------------------------------
# Losses

def windows(n, length, stride):
    """
    Windows that predict n tokens, as {start: number of its predictions that earlier ones have
    made}: they begin `stride` tokens apart, the last one at the end.
    """
    starts = {}
    predicted = 0
    for start in [*range(0, n - length, stride), n - length]:
        starts[start] = max(0, predicted - start)
        predicted = start + length
    return starts


class Losses:
    """Sums of losses: by document, and by document and number of tokens seen."""

    def __init__(self, n_documents, length):
        self.edges = [2]  # 1-2, 3-4, 5-8, … tokens seen
        while self.edges[-1] < length:
            self.edges.append(2 * self.edges[-1])
        shape = len(self.edges), n_documents
        self.by_document = np.zeros(n_documents)
        self.by_seen = np.zeros(shape)
        self.counts = np.zeros(shape, np.int64)

    def add(self, loss, document, seen, fresh):
        """
        Predictions: loss (N,), number of the document (N,), tokens seen (N,), and whether no
        earlier window has made this prediction (N,).
        """
        np.add.at(self.by_document, document[fresh], loss[fresh])
        bucket = np.searchsorted(self.edges, seen)  # (N,)
        np.add.at(self.by_seen, (bucket, document), loss)
        np.add.at(self.counts, (bucket, document), 1)

    def by_position(self, length):
        """A dict per bucket that is not empty."""
        found = []
        first = 1
        for edge, values, counts in zip(self.edges, self.by_seen, self.counts):
            held = counts > 0  # the documents that reach this bucket
            if held.any():
                loss, error = ratio(values[held], counts[held])
                found.append({"from": first, "to": min(edge, length), "loss": loss,
                              "loss_stderr": error, "count": int(counts.sum())})
            first = edge + 1
        return found


@torch.no_grad()
def losses(model, ids, documents, length, stride, batcher, doc_mask=True, title="perplexity"):
    """
    Predict every token of ids but the first from windows of `length` tokens that begin `stride`
    tokens apart: the Losses. documents: a Documents of ids.
    """
    device = model.embed.weight.device
    starts = windows(len(ids) - 1, length, stride)
    found = Losses(len(documents), length)
    position = torch.arange(length, device=device)  # (T,)

    def work(batch):
        rows = to_ids(np.stack([ids[s:s + length + 1] for s in batch]), device)  # (B, T + 1)
        idx = rows[:, :-1]  # (B, T)
        seen = (position + 1).expand(idx.shape)  # (B, T)
        doc_start = None
        if doc_mask:
            doc_start = document_starts(idx, documents.separator)  # (B, T)
            seen = seen - doc_start
        x = model.trunk(idx, doc_start)[0]  # (B, T, C)
        likelihoods, _ = token_scores(model, x, rows[:, 1:])  # (B, T)
        # Only now, when a full GPU can no longer stop this batch, is anything added
        likelihoods = likelihoods.double().cpu().numpy()
        for start, row, row_seen in zip(batch, likelihoods, seen.cpu().numpy()):
            document = documents.of_target[start:start + length]
            found.add(-row, document, row_seen, np.arange(length) >= starts[start])
        return batch
    with Progress(title, len(starts)) as progress:
        batcher.run(work, list(starts), [length] * len(starts), progress)
    return found


def perplexity(model, ids, documents, length, stride, batcher, doc_mask=True, title="perplexity"):
    """
    Every token of ids but the first is predicted, once, with at least length - stride tokens of
    context; it has fewer only at the start of ids and of documents. stride is at most length.
    Other arguments: see losses.

    Returns a dict: tokens, bytes, words, documents; loss (nats per token), perplexity,
    bits_per_byte, word_perplexity (exp(nats / words)), each with its standard error, *_stderr; and
    by_position, the loss by the number of tokens that a prediction sees, those of its window and
    document up to itself. This one takes all predictions of every window, also those that an
    earlier window has made: so most tokens are predicted both from few and from many tokens, and
    the buckets compare the same text.
    """
    T = min(length, len(ids) - 1)
    found = losses(model, ids, documents, T, stride, batcher, doc_mask, title)
    nats = found.by_document  # (documents,)
    loss, loss_error = ratio(nats, documents.tokens)
    bits, bits_error = ratio(nats / math.log(2), documents.bytes)
    by_token = exponential(loss, loss_error)
    by_word = exponential(*ratio(nats, documents.words))
    return {"tokens": int(documents.tokens.sum()), "bytes": int(documents.bytes.sum()),
            "words": int(documents.words.sum()), "documents": len(documents),
            "loss": loss, "loss_stderr": loss_error,
            "perplexity": by_token[0], "perplexity_stderr": by_token[1],
            "bits_per_byte": bits, "bits_per_byte_stderr": bits_error,
            "word_perplexity": by_word[0], "word_perplexity_stderr": by_word[1],
            "by_position": found.by_position(T)}


# --------------------------------------------------------------------------------------------------
# Results

def with_error(row, name, digits):
    """ "2.345 ± 0.012" """
    value, error = row[name], row[f"{name}_stderr"]
    if value is None:
        return "not finite"
    form = f".{digits}f" if value < 1e6 else ".2e"
    if error is None:
        return f"{value:{form}}"
    return f"{value:{form}} ± {error:{form}}"


def curves(result):
    """{text: by_position at the longest context, without losses that are not finite}"""
    return {row["text"]: [bucket for bucket in row["by_position"] if bucket["loss"] is not None]
            for row in result["rows"]}  # the lengths rise


def show(result):
    by_text = {}
    for row in result["rows"]:
        by_text.setdefault(row["text"], []).append(row)
    # 1. means
    say("\nperplexity, ± standard error over documents")
    columns = {"loss": ("nats/token", 4), "perplexity": ("perplexity", 3),
               "bits_per_byte": ("bits/byte", 4), "word_perplexity": ("word perplexity", 1)}
    say(" context  " + "".join(f"{heading:>22}" for heading, _ in columns.values()))
    for name, rows in by_text.items():
        first = rows[0]
        say(f"{name}: {first['tokens']:,} tokens, {first['bytes']:,} bytes, "
            f"{first['words']:,} words; documents: {first['documents']:,}")
        for row in rows:
            cells = [with_error(row, column, digits) for column, (_, digits) in columns.items()]
            say(f"{row['length']:8}  " + "".join(cell.rjust(22) for cell in cells))
    for name, reason in result["skipped"].items():
        say(f"{name} skipped: {reason} (to try anew: --again)")
    # 2. losses by the tokens seen
    say("\nloss by the number of tokens seen, nats/token ± standard error")
    say("(windows overlap: most tokens are predicted twice)")
    for name, buckets in curves(result).items():
        say(f"{name}\n    tokens seen                  loss  predictions")
        for bucket in buckets:
            span = f"{bucket['from']}-{bucket['to']}"
            say(f"{span:>15}{with_error(bucket, 'loss', 4):>22}{bucket['count']:13,}")


def summary(result):
    """Of each text at the longest context; those of the first that was asked for have no suffix."""
    found = {}
    for row in result["rows"]:  # the lengths rise
        of = "" if row["text"] == result["texts"][0] else f"_of_{row['text']}"
        for number in ("perplexity", "bits_per_byte"):
            found[number + of] = row[number]
    return found
