"""scoring.py: batches, log-likelihoods with shared prefixes, answers."""
import types
import weakref

import numpy as np
import pytest
import torch

import scoring
from model import ARMS, GSA, GSAConfig
from tokenizer import Tokenizer

SHAPE = dict(vocab_size=257, block_size=48, n_layer=2, n_head=2, n_kv_head=1, n_embd=32,
             n_index_head=2, d_index=8, k_base=12, k_min=4, k_max=16)


def make(arm):
    """An untrained model in double precision, whose layers matter."""
    torch.manual_seed(0)
    model = GSA(GSAConfig.arm(arm, **SHAPE), "torch").double().eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.2
    return model


@pytest.fixture(scope="module", params=ARMS)
def model(request):
    return make(request.param)


@torch.no_grad()
def naive(model, context, continuation):
    """(log-likelihood, greedy), one full forward pass per token."""
    ids = [*context, *continuation]
    total, greedy = 0.0, True
    for i in range(len(context), len(ids)):
        logits = model(torch.tensor([ids[:i]])).logits[0, -1]
        total += logits.log_softmax(-1)[ids[i]].item()
        greedy = greedy and logits.argmax().item() == ids[i]
    return total, greedy


@torch.no_grad()
def greedy_ids(model, context, n):
    ids = list(context)
    for _ in range(n):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(context):]


def check_scores(model, contexts, continuations, batch_sizes):
    expected = [[naive(model, context, c) for c in row]
                for context, row in zip(contexts, continuations)]
    for rows in batch_sizes:
        found = scoring.score(model, contexts, continuations, scoring.Batcher(rows))
        assert [len(row) for row in found] == [len(row) for row in continuations]
        for context, found_row, row in zip(contexts, found, expected):
            for one, (likelihood, greedy) in zip(found_row, row):
                # token_scores adds up in single precision
                assert one.likelihood == pytest.approx(likelihood, rel=1e-5), (rows, context)
                assert one.greedy == greedy, (rows, context)


# -----------------------------------------------------------------------------
# Likelihoods

def test_scores_are_those_of_one_forward_pass_per_token(model):
    """Contexts of different lengths, some with a common beginning; one continuation is greedy."""
    rng = np.random.default_rng(0)
    begin = rng.integers(0, 256, 12)
    contexts = [np.concatenate((begin, rng.integers(0, 256, n))) for n in (1, 5, 9)]
    contexts += [rng.integers(0, 256, n) for n in (1, 20)]
    contexts += [begin]  # it is the beginning of others
    continuations = [[rng.integers(0, 256, n) for n in (1, 4, 2)[:count]]
                     for count in (3, 1, 2, 3, 2, 1)]
    continuations[1].append(np.array(greedy_ids(model, contexts[1], 3)))
    check_scores(model, contexts, continuations, (0, 1, 3))


def test_one_context_alone_is_scored(model):
    check_scores(model, [np.array([5])], [[np.array([7])]], (0,))


def test_rows_that_together_exceed_the_context_are_scored_apart(model):
    """46 + 3 and 2 + 47 tokens fit into 48 + 1; padded to 46 + 47 they would not."""
    rng = np.random.default_rng(1)
    contexts = [rng.integers(0, 256, 46), rng.integers(0, 256, 2)]
    continuations = [[rng.integers(0, 256, 3)], [rng.integers(0, 256, 47)]]
    check_scores(model, contexts, continuations, (2,))


def test_a_common_beginning_is_computed_once(monkeypatch):
    model = make("dense")
    computed = []
    trunk = model.trunk

    def counting(idx, *args, **how):
        computed.append(idx.numel())
        return trunk(idx, *args, **how)
    monkeypatch.setattr(model, "trunk", counting)
    begin = np.arange(30)
    contexts = [np.append(begin, i) for i in (40, 50, 60, 70)]
    scoring.score(model, contexts, [[np.array([1])]] * 4, scoring.Batcher())
    assert computed == [30, 4]  # what all share, then the last token of each


def test_a_context_takes_the_same_memory_with_many_continuations(monkeypatch):
    """Two contexts that fit into a batch do so with four continuations each, as two rows."""
    model = make("dense")
    rows = []
    trunk = model.trunk

    def counting(idx, *args, **how):
        rows.append(len(idx))
        return trunk(idx, *args, **how)
    monkeypatch.setattr(model, "trunk", counting)
    batcher = scoring.Batcher()
    batcher.tokens = 2 * 12
    scoring.score(model, [np.arange(10), np.arange(50, 60)], [[np.array([1, 2])] * 4] * 2, batcher)
    assert rows == 5 * [2]  # the contexts, then one continuation of each after the other


def test_the_logits_of_a_part_at_a_time_give_the_same_scores(monkeypatch):
    model = make("dense")
    x = torch.randn(3, 5, 32, dtype=torch.double)
    targets = torch.randint(-1, 257, (3, 5))
    whole = scoring.token_scores(model, x, targets)
    monkeypatch.setattr(scoring, "LOGITS", 2 * 257)  # two tokens
    for name, a, b in zip(("likelihood", "greedy"), scoring.token_scores(model, x, targets), whole):
        assert torch.equal(a, b), name


# -----------------------------------------------------------------------------
# Batches

def test_batches_halve_on_a_full_gpu_and_results_keep_their_order():
    """No more than 4 rows of 10 tokens fit: 16 and 8 are tried first, and never again."""
    tried = []

    def work(batch):
        tried.append(len(batch))
        if len(batch) > 4:
            raise torch.cuda.OutOfMemoryError("full")
        return [2 * item for item in batch]
    for batcher in (scoring.Batcher(16), scoring.Batcher()):
        if not batcher.rows:
            batcher.tokens = 160
        tried.clear()
        assert batcher.run(work, list(range(20)), [10] * 20) == [2 * i for i in range(20)]
        assert tried == [16, 8, 4, 4, 4, 4, 4]


def test_what_a_batch_that_did_not_fit_held_is_free_before_the_next_is_tried(monkeypatch):
    held, freed = [], []

    def work(batch):
        tensor = torch.zeros(1)
        if len(batch) > 1:
            held.append(weakref.ref(tensor))
            raise torch.cuda.OutOfMemoryError("full")
        return batch
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(held[-1]() is None))
    assert scoring.Batcher(2).run(work, [1, 2], [10, 10]) == [1, 2]
    assert freed == [True]


def test_a_single_row_that_does_not_fit_ends_the_work():
    def work(batch):
        raise torch.cuda.OutOfMemoryError("full")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        scoring.Batcher(4).run(work, [1, 2, 3], [10] * 3)


def test_batches_hold_similar_lengths_longest_first_and_groups_together():
    batches = []

    def work(batch):
        batches.append(batch)
        return batch
    lengths = [3, 9, 1, 5]
    assert scoring.Batcher(2).run(work, list("abcd"), lengths) == list("abcd")
    assert batches == [["b", "d"], ["a", "c"]]
    batches.clear()
    scoring.Batcher(2).run(work, list("abcd"), lengths, groups=[2, 1, 1, 2])
    assert batches == [["b", "c"], ["d", "a"]]


def test_a_batch_of_short_items_takes_no_long_one_of_the_next_group():
    """Six items of 1 to 2 tokens would let 10 of the next group's items of 10 tokens in."""
    sizes = []

    def work(batch):
        sizes.append(len(batch) * max(batch))
        return batch
    lengths = [1, 1, 2, 1, 2, 1] + 10 * [10]
    batcher = scoring.Batcher()
    batcher.tokens = 32
    assert batcher.run(work, lengths, lengths, groups=6 * [1] + 10 * [2]) == lengths
    assert sizes == [12, 30, 30, 30, 10]


# -----------------------------------------------------------------------------
# Answers

@pytest.fixture
def scripted(monkeypatch):
    """
    (tokenizer, answer): answer(texts, limits, stops) answers one prompt per text, where the model
    writes that text and, with it ended, separators; "~" in a text is a separator.
    """
    tokenizer = Tokenizer("bytes")

    def answer(texts, limits, stops):
        ids = [[256 if c == "~" else ord(c) for c in text] for text in texts]

        def stream(model, prompts, longest, draw, separator):
            for step in range(longest):
                yield torch.tensor([ids[int(p[0])][step] if step < len(ids[int(p[0])]) else -1
                                    for p in prompts])
        monkeypatch.setattr(scoring, "stream", stream)
        prompts = [np.array([i]) for i in range(len(texts))]
        return scoring.answer(None, prompts, limits, stops, tokenizer, scoring.Batcher())
    return types.SimpleNamespace(answer=answer)


def test_answers_end_at_a_stop_a_separator_or_the_limit(scripted):
    texts = ["one\ntwo", "three~four", "endless words", "12"]
    found = scripted.answer(texts, [7, 10, 7, 9], [["\n"], [], ["xyz"], []])
    assert [a.text for a in found] == ["one", "three", "endless", "12"]
    # the last reached the end of the context, where the stream gives -1
    assert [a.stopped for a in found] == [True, True, False, False]


def test_the_earliest_of_two_stops_counts_and_may_span_tokens(scripted):
    found, = scripted.answer(["a. Q: b\n"], [8], [["\n", "Q", ". Q"]])  # both are there with "Q"
    assert found == ("a", True)
    # a letter of two tokens, as a stop and cut by the limit
    two_bytes = "ä".encode().decode("latin-1")
    found = scripted.answer([f"a{two_bytes}b"] * 2, [9, 2], [["ä"], ["ä"]])
    assert found == [("a", True), ("a\ufffd", False)]


def test_answers_are_what_greedy_decoding_writes(model):
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 256, n) for n in (3, 11, 7)]
    tokenizer = Tokenizer("bytes")
    for rows in (1, 3):
        found = scoring.answer(model, prompts, [6] * 3, [[]] * 3, tokenizer, scoring.Batcher(rows))
        for prompt, one in zip(prompts, found):
            ids = greedy_ids(model, prompt, 6)
            ids = ids[:ids.index(256)] if 256 in ids else ids
            assert one.text == tokenizer.decode(ids)
