"""
What the attention of a trained model does: where its mass falls, how open the gates are, which keys
it selects, and whether k_t follows the model's own uncertainty. A part of eval.py, on windows
spread evenly over the validation text. Its result holds "layers", lists of one number per layer:

    first_token, first_four  share of the attention over S_t on the first keys of the document, or
                             of the window where it begins inside the document
    recall, recall_best      share of full attention that S_t holds (measure.attention_report)
    visible, k_t             mean number of keys that a query sees, and selects
    value_gate, output_gate  mean value of the gate; …_closed: share of its values below CLOSED
    max_activation           largest absolute value of the residual stream behind the layer
    var_ratio                mean Var_t over the stored V̄

The rest is measured on the free queries, those that see more keys than the largest budget. Another
query is near the beginning of its document: it selects few keys because there are few, and it is
uncertain because there is little to read.

    k_t_mean, k_t_std, k_t_5, k_t_50, k_t_95    distribution of k_t, the last three percentiles
    k_t_at_min, k_t_at_max   share of the queries whose k_t is the least or the largest
    k_t_entropy              Pearson correlation of k_t and the entropy of the next token's
                             prediction at this position
    distance_50, distance_90 percentiles of t - s over the selected keys, in tokens
    within_64                share of the selected keys whose t - s is below 64
    union_ratio              different keys of 16 neighbouring queries over their mean k_t

What a model lacks (gates, an indexer, free queries) is absent. A number that does not exist, as the
correlation with a constant k_t, is null.
"""
import contextlib
import math
import random
from collections import defaultdict

import numpy as np
import torch

import measure as formulas
from attention import Selection, Visible, attention_probabilities, document_starts, select
from configurator import UserError, say
from data import Batches
from needle import longest_answer, needle_prompt, read_haystack
from scoring import LOGITS, Progress, to_ids

SETTINGS = "data attention_windows"
CLOSED = 0.1  # a gate lets next to nothing through where its value is below this


def check(cfg, subject):
    """Refuse what cannot be measured. Raises UserError."""


def measure(cfg, subject):
    return attention(subject.model, subject.data.val, subject.tokenizer.separator,
                     cfg.attention_windows, subject.doc_mask, subject.device)


# --------------------------------------------------------------------------------------------------
# The statistics

class LayerReport:
    """What one layer does, added up over windows. attn: its model.Attention."""

    def __init__(self, attn):
        self.attn = attn
        self.sums = defaultdict(lambda: torch.zeros(2).double())  # name -> sum, number of terms
        self.k_t = []  # of the free queries, an array per window
        self.distances = 0  # (S,), see measure.selection_counts
        self.union = 0  # (2,), the same
        self.max_activation = torch.zeros(()).double()

    def before_attention(self, attn, inputs):
        """A hook that sees the normalised input h (1, T, C) of a window, and what is visible."""
        h, visible = inputs
        # 1. what the layer computes from h
        q, k = attn.queries_and_keys(h, visible.pos)
        everything = Selection.everything(visible, len(h))
        selection = everything
        if attn.indexer is not None:
            index = attn.indexer(h, visible.pos)
            selection = select(index, visible, attn.indexer.budget(), attn.backend)
        # 2. attention and gates
        for name, both in formulas.attention_sums(q, k, selection).items():
            if attn.indexer is not None or name.startswith("first"):
                self.sums[name] += both.cpu()
        self.add("visible", everything.k_t)
        for name in ("value_gate", "output_gate"):
            gate = getattr(attn, name)
            if gate is not None:
                opening = gate(h)  # (1, T, width)
                self.add(name, opening)
                self.add(f"{name}_closed", opening < CLOSED)
        # 3. selection
        if attn.indexer is not None:
            self.add("k_t", selection.k_t)
            if attn.indexer.var_avg > 0:
                self.add("var_ratio", selection.var / attn.indexer.var_avg)
            free = free_queries(visible, attn.config)  # (1, T)
            distances, union = formulas.selection_counts(selection, free)
            self.distances += distances.cpu().numpy()
            self.union += union.cpu().numpy()
            self.k_t.append(selection.k_t[free].cpu().numpy())

    def after_block(self, block, inputs, outputs):
        """A hook that sees the residual stream (1, T, C) behind the layer."""
        largest = outputs[0].abs().max().double().cpu()
        self.max_activation = torch.maximum(self.max_activation, largest)  # of NaN it is NaN

    def add(self, name, x):
        self.sums[name] += torch.tensor([x.double().sum().item(), x.numel()])

    def result(self, entropy):
        """The layer's numbers, {name: float}. entropy (n,): in nats, of the free queries."""
        found = formulas.mean_of_sums(self.sums)
        found = {name: x.item() for name, x in found.items()}
        found["max_activation"] = self.max_activation
        if len(entropy):
            k_t = np.concatenate(self.k_t)  # (n,)
            found |= formulas.budget_numbers(k_t, self.attn.config.budget(), entropy)
            found |= formulas.distance_numbers(self.distances)
            if self.union[1]:
                found["union_ratio"] = formulas.NEIGHBOURS * self.union[0] / self.union[1]
        return {name: float(x) for name, x in found.items()}


def free_queries(visible, config):
    """Which queries see more keys than the largest budget: (1 or B, T) bool."""
    return visible.pos - visible.first + 1 > config.budget().largest


def entropies(model, x):
    """Entropy in nats of the next token's prediction: x (1, T, C) from the trunk -> (T,)."""
    found = []
    for part in x[0].split(max(1, LOGITS // model.config.vocab_size)):
        log_p = model.head(part).float().log_softmax(-1)  # (n, V)
        found.append(-(log_p.exp() * log_p).sum(-1))  # (n,)
    return torch.cat(found)


@contextlib.contextmanager
def watching(model, reports):
    """Until the block ends, the reports see what their layers of the model do."""
    hooks = []
    for block, report in zip(model.blocks, reports, strict=True):
        hooks.append(block.attn.register_forward_pre_hook(report.before_attention))
        hooks.append(block.register_forward_hook(report.after_block))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention(model, ids, separator, n_windows, doc_mask=True, device="cpu"):
    """
    The statistics of n_windows windows spread over ids, one at a time: O(tile·T) memory.
    Returns a dict: windows; tokens; layers, {name: [number per layer]}; and of a model with an
    indexer the number of free_queries, and over all layers histograms of k_t and of the distances.
    """
    config = model.config
    reports = [LayerReport(block.attn) for block in model.blocks]
    batches = Batches(ids, config.block_size, 1, 0)
    n_windows = min(n_windows, batches.n)
    entropy = []
    # 1. the windows
    with watching(model, reports), Progress("attention statistics", n_windows) as progress:
        for m in range(n_windows):
            idx, _ = batches.evaluation(m, n_windows, device)  # (1, T)
            doc_start = document_starts(idx, separator) if doc_mask else None
            x, _, _ = model.trunk(idx, doc_start=doc_start)
            if config.sparse:
                visible = Visible.causal(idx.size(1), doc_start, device)
                free = free_queries(visible, config)[0]  # (T,)
                entropy.append(entropies(model, x)[free].cpu().numpy())
            progress.step()
    # 2. the numbers
    result = {"windows": n_windows, "tokens": n_windows * config.block_size}
    if config.sparse:
        entropy = np.concatenate(entropy)
        result["free_queries"] = len(entropy)
    layers = [report.result(entropy) for report in reports]
    names = dict.fromkeys(name for layer in layers for name in layer)
    result["layers"] = {name: [layer.get(name) for layer in layers] for name in names}
    # 3. histograms, for the picture
    if len(entropy):
        k_t = np.concatenate([part for report in reports for part in report.k_t])
        budget = config.budget()
        end = budget.largest + 1
        width = math.ceil((end - budget.k_min) / 32)  # of a bin, the same for all, in keys
        edges = np.arange(budget.k_min, end + width, width)
        result["k_t_histogram"] = formulas.histogram(k_t, edges)
        distances = sum(report.distances for report in reports)  # (S,)
        powers = 2 ** np.arange((len(distances) - 1).bit_length() + 1)
        result["distance_histogram"] = formulas.histogram(np.arange(len(distances)), [0, *powers],
                                                          distances)
    return result


# --------------------------------------------------------------------------------------------------
# Tables

# What stands above a table, and its columns: name, heading, format
TABLES = (
    (f"visible keys; attention on a document's first; gates: mean, share below {CLOSED}",
     (("visible", "visible", ".0f"), ("first_token", "first key", ".3f"),
      ("first_four", "first four", ".3f"),
      ("value_gate", "value gate", ".3f"), ("value_gate_closed", "below", ".3f"),
      ("output_gate", "output gate", ".3f"), ("output_gate_closed", "below", ".3f"),
      ("max_activation", "largest activation", ".1f"))),
    ("selection: keys, recall, distance of the selected keys in tokens, union of 16 queries / k_t",
     (("k_t", "k_t", ".1f"), ("recall", "recall", ".3f"), ("recall_best", "best", ".3f"),
      ("distance_50", "median", ".0f"), ("distance_90", "90 %", ".0f"),
      ("within_64", "within 64", ".3f"), ("union_ratio", "union", ".2f"),
      ("var_ratio", "Var_t / V̄", ".2f"))),
    ("k_t of the queries that see more keys than the largest budget, and Pearson correlation with "
     "the\nentropy of the model's prediction",
     (("k_t_mean", "mean", ".1f"), ("k_t_std", "std", ".1f"), ("k_t_5", "5 %", ".0f"),
      ("k_t_50", "median", ".0f"), ("k_t_95", "95 %", ".0f"), ("k_t_at_min", "at k_min", ".3f"),
      ("k_t_at_max", "at k_max", ".3f"), ("k_t_entropy", "correlation", ".3f"))),
)


def show(result):
    layers = result["layers"]
    say(f"\nattention, per layer ({result['windows']} windows, {result['tokens']:,} tokens)")
    for title, columns in TABLES:
        columns = [column for column in columns if column[0] in layers]
        if not columns:
            continue
        say(f"\n{title}\n  layer" + "".join(f"{heading:>{width(heading)}}"
                                            for _, heading, _ in columns))
        for layer in range(len(layers["visible"])):
            cells = [cell(layers[name][layer], form).rjust(width(heading))
                     for name, heading, form in columns]
            say(f"{layer:7}" + "".join(cells))
    if result.get("free_queries") == 0:
        say("no query sees more keys than the largest budget: nothing to say about the selection")


def width(heading):
    return max(9, len(heading)) + 2


def cell(value, form):
    return "-" if value is None else format(value, form)


def summary(result):
    """
    Means over the layers, the largest activation of all, and the share that the recall is of the
    best one that as many keys could have.
    """
    layers = result["layers"]
    labels = {"first_token": "first_token_share", "recall": "index_recall", "k_t": "mean_k_t",
              "k_t_entropy": "k_t_entropy_correlation"}
    found = {}
    if None not in layers["max_activation"]:
        found["largest_activation"] = max(layers["max_activation"])
    for name, label in labels.items():
        values = layers.get(name, [None])
        if None not in values:
            found[label] = float(np.mean(values))
    if "index_recall" in found:
        best = float(np.mean(layers["recall_best"]))
        found["index_recall_of_best"] = found["index_recall"] / best
    return found


# --------------------------------------------------------------------------------------------------
# One query, for selection.png

@torch.no_grad()
def last_query(model, ids, device="cpu"):
    """
    What the last token of a prompt attends to: a list of (mass, selected), one pair per layer.
    mass (T,): what full attention would give each key, mean over the heads.
    selected (T,) bool: the keys that the indexer selects.
    """
    layers = []

    def look(attn, inputs):
        h, visible = inputs
        last = Visible(visible.pos[:, -1:], visible.n_keys)
        # 1. full attention
        q, k = attn.queries_and_keys(h, visible.pos)
        p, _ = attention_probabilities(q[:, -1:], k, last.mask())  # (1, 1, H, T)
        # 2. the selected keys
        index = attn.indexer(h, visible.pos)
        index = index._replace(q=index.q[:, -1:], w=index.w[:, -1:])
        selection = select(index, last, attn.indexer.budget(), attn.backend)
        layers.append((p[0, 0].float().mean(0).cpu().numpy(), selection.mask()[0, 0].cpu().numpy()))
    hooks = [block.attn.register_forward_pre_hook(look) for block in model.blocks]
    model.trunk(to_ids(ids, device)[None])
    for hook in hooks:
        hook.remove()
    return layers


def needle_selection(subject, result):
    """
    last_query of a prompt with a needle in its middle, of the longest length in the result of the
    part "needle" that fits into the context. Returns the layers and the needle's place, a slice.
    Raises UserError where there is nothing to see.
    """
    if not subject.model.config.sparse:
        raise UserError("this model has no indexer")
    T = subject.model.config.block_size
    lengths = [cell["length"] for cell in result["cells"] if cell["length"] <= T]
    if not lengths:  # they were measured by an earlier call with a larger --block_size
        raise UserError(f"no needle was measured in a context of {T} tokens")
    length = max(lengths)
    _, hay = read_haystack(subject.cfg, subject)
    ids, _, place = needle_prompt(hay, subject.tokenizer, length, 0.5, longest_answer(),
                                  random.Random(0))
    layers = last_query(subject.model, ids, subject.device)
    if all(selected.all() for _, selected in layers):
        raise UserError(f"at {length} tokens the indexer selects every key")
    return layers, place
