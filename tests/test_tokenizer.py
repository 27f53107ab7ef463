"""
Tokenizers of Hugging Face models: the bytes of a text's tokens are the text, special tokens are
never made from text, and what cannot be exact is refused in one line.
"""
import hashlib
import json
import os
import random
import sys
import unicodedata

import huggingface_hub
import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

import prepare
import tokenizer_hf
from configurator import UserError
from data import Data
from tokenizer import LLAMA3_SPLIT, Tokenizer, full_name, open_tokenizer

LINES = ["It's a line of text, and the text of a line.", "  indented:  12345 + 678 = 13023\r\n",
         "naïve façade, 漢字 and 🙂", "the end </s> of <|end_of_text|> the text"] * 5
TEXTS = ["", " ", "Hi", "  two  blanks ", "a\r\n\r\n\tb\n", "é 漢字 한글 👩‍👩‍👧",
         "\0\x01\x7f\x85\xa0\ufeff", "▁", " ▁▁ ▁x", "<0x0A> <0xE2>",
         "</s><s>x</s>", "x<|end_of_text|>y <|begin_of_text|>",
         "<think> 1 </think>", "    four", "Ġ Ċ âĸģ"]
KINDS = ["byte-level", "prepend", "metaspace"]


def put(folder, data, **config):
    """data as folder/tokenizer.json, with a config.json beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def byte_level(normalizer=None):
    """The dict of a tokenizer.json such as Llama 3's, or with NFC as Qwen's."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([
        split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if normalizer:
        made.normalizer = normalizer
    made.train_from_iterator(LINES, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    made.add_tokens(["<think>", "</think>"])
    return json.loads(made.to_str())


def sentencepiece(rule="prepend"):
    """
    The dict of a tokenizer.json such as Llama 2's. Its merges can make "</s>" from text. rule: what
    writes ▁ for a blank, and one before the text.
    """
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    tokens += list(model["vocab"]) + ["</", "</s", "▁▁"]
    tokens = list(dict.fromkeys(tokens))
    merges = [["<", "/"], ["</", "s"], ["</s", ">"], ["▁", "▁"]] + model["merges"]
    made = tokenizers.Tokenizer(models.BPE(
        {token: i for i, token in enumerate(tokens)}, [tuple(m) for m in merges],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if rule == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                                normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return json.loads(made.to_str())


def make(folder, kind):
    """The folder of a model of one of KINDS."""
    if kind == "byte-level":
        data = byte_level()
        return put(folder, data, eos_token_id=id_of(data, "<|end_of_text|>"))
    return put(folder, sentencepiece(kind), eos_token_id=2)


def id_of(data, token):
    return next(t["id"] for t in data["added_tokens"] if t["content"] == token)


def random_text(rng):
    """A piece of TEXTS here, any characters of Unicode there."""
    parts = []
    for _ in range(rng.randrange(12)):
        if rng.random() < 0.5:
            parts.append(rng.choice(TEXTS + LINES))
        else:
            codes = [rng.randrange(rng.choice([128, 0x3000, 0x110000])) for _ in range(9)]
            parts.append("".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000))
    return "".join(parts)


def refused(do, message):
    """do() raises a UserError of one line that matches."""
    with pytest.raises(UserError, match=message) as e:
        do()
    assert "\n" not in str(e.value)


# ---- tokens and bytes

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("longest", [1_000_000, 5])
def test_the_bytes_of_the_tokens_are_the_text(tmp_path, monkeypatch, kind, longest):
    monkeypatch.setattr(tokenizer_hf, "LONGEST", longest)
    tokenizer = Tokenizer(make(tmp_path / "model", kind))
    rng = random.Random(kind)
    for text in TEXTS + LINES + [random_text(rng) for _ in range(300)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_lengths[ids].sum() == len(text.encode())
        assert tokenizer.separator not in ids
        assert ids.dtype == np.uint32 and ids.max(initial=0) < tokenizer.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_encoded_one_by_one_are_joined_without_a_blank(tmp_path, kind):
    tokenizer = Tokenizer(make(tmp_path / "model", kind))
    joined = np.concatenate([tokenizer.encode(piece) for piece in ("ab=", "key", "\n")])
    assert tokenizer.decode(joined) == "ab=key\n"


def test_nfc_composes_letters_and_the_tokens_spell_the_composed_text(tmp_path):
    data = byte_level(normalizers.NFC())
    tokenizer = Tokenizer(put(tmp_path, data, eos_token_id=id_of(data, "<|end_of_text|>")))
    rng = random.Random(0)
    for text in ["e\u0301 a\u030a \u1112\u1161\u11ab"] + [random_text(rng) for _ in range(100)]:
        composed = unicodedata.normalize("NFC", text)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == composed
        assert tokenizer.token_lengths[ids].sum() == len(composed.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_run_of_one_character_comes_back(tmp_path, kind):
    tokenizer = Tokenizer(make(tmp_path / "model", kind))
    for letter in " a\n▁":
        text = letter * 100_000
        assert tokenizer.decode(tokenizer.encode(text)) == text


# Six tokens by hand: "▁Hi" is a token, "é" is not, so that its bytes C3 A9 stand alone.
def test_tokens_of_a_small_sentencepiece_vocabulary_by_hand(tmp_path):
    tokens = ["</s>"] + [f"<0x{i:02X}>" for i in range(256)] + ["▁", "H", "i", "Hi", "▁Hi"]
    data = sentencepiece()
    data["added_tokens"] = []
    data["model"] |= dict(vocab={t: i for i, t in enumerate(tokens)}, unk_token=None,
                          merges=[["H", "i"], ["▁", "Hi"]])
    tokenizer = Tokenizer(put(tmp_path, data, eos_token_id=0))
    ids = tokenizer.encode("Hi Hi é")
    assert ids.tolist() == [260, 261, 257, 1 + 0xC3, 1 + 0xA9]
    assert [tokenizer.token_bytes(i) for i in ids] == [b"Hi", b" Hi", b" ", b"\xc3", b"\xa9"]
    assert tokenizer.token_lengths[ids].tolist() == [2, 3, 1, 1, 1]
    assert [tokenizer.token_bytes(i) for i in (0, -1, 262, 10**12)] == [b""] * 4
    digest = hashlib.sha256()
    for token in [b""] + [bytes([i]) for i in range(256)] + [b" ", b"H", b"i", b"Hi", b" Hi"]:
        digest.update(len(token).to_bytes(4, "little") + token)
    assert tokenizer.fingerprint == digest.hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(tmp_path, kind):
    from transformers import PreTrainedTokenizerFast
    folder = make(tmp_path / "model", kind)
    ours = Tokenizer(folder)
    theirs = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")
    rng = random.Random(1)
    for text in TEXTS + LINES + [random_text(rng) for _ in range(50)]:
        # A line feed first: it merges with nothing, so that only the blank before it differs.
        text = "\n" + text.replace("▁", "").replace("</s", "").replace("<s>", "")
        expected = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        if kind != "byte-level":
            assert theirs.convert_ids_to_tokens(expected[0]) == "▁"
            expected = expected[1:]
        assert ours.encode(text).tolist() == expected


# ---- special tokens

@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_spelled_in_text_is_ordinary_text(tmp_path, kind):
    folder = make(tmp_path / "model", kind)
    tokenizer = Tokenizer(folder)
    with open(f"{folder}/tokenizer.json") as f:
        added = json.load(f)["added_tokens"]
    for token in added:
        for text in (token["content"], f"x {token['content']}  y"):
            ids = tokenizer.encode(text).tolist()
            assert (token["id"] in ids) == (not token["special"]), text
            assert tokenizer.decode(ids) == text


def test_an_added_token_swallows_no_blanks_and_the_separator_is_special_whatever_the_file_says(
        tmp_path):
    data = byte_level()
    for token in data["added_tokens"]:
        token |= dict(lstrip=True, rstrip=True, special=False)
    tokenizer = Tokenizer(put(tmp_path, data, eos_token_id=id_of(data, "<|end_of_text|>")))
    text = "a  <think>  b <|end_of_text|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert id_of(data, "<think>") in ids and tokenizer.separator not in ids


@pytest.mark.parametrize("files,expected", [
    ({"config.json": {"eos_token_id": "END"}}, "<|end_of_text|>"),
    ({"config.json": {"eos_token_id": ["TURN", "END"]}}, "<|end_of_text|>"),
    ({"config.json": {"eos_token_id": "TURN"},
      "generation_config.json": {"eos_token_id": ["TURN", "END"]}}, "<|end_of_text|>"),
    ({"tokenizer_config.json": {"eos_token": "<|eot_id|>"}}, "<|eot_id|>"),
    ({"tokenizer_config.json": {"eos_token": {"content": "<|end_of_text|>"}}}, "<|end_of_text|>"),
    ({"config.json": {"eos_token_id": 10**6},
      "tokenizer_config.json": {"eos_token": "<|eot_id|>"}}, "<|eot_id|>"),
    ({}, None),
    ({"config.json": {"eos_token_id": None}}, None),
    ({"config.json": {"eos_token_id": [[1], {}, True, -1, "</s>"]}}, None)])
def test_the_separator_is_the_smallest_end_that_the_model_names(tmp_path, files, expected):
    data = byte_level()
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    end = str(id_of(data, "<|end_of_text|>"))
    turn = str(id_of(data, "<|eot_id|>"))
    for name, content in files.items():
        text = json.dumps(content).replace('"END"', end).replace('"TURN"', turn)
        (tmp_path / name).write_text(text)
    if expected:
        assert Tokenizer(str(tmp_path)).separator == id_of(data, expected)
    else:
        refused(lambda: Tokenizer(str(tmp_path)), 'ends a text: put the model.s config.json')


# ---- in the scripts

@pytest.mark.parametrize("kind,num_proc", [("byte-level", 2), ("prepend", 1)])
def test_prepared_data_holds_every_document_and_opens_where_the_model_has_moved(
        tmp_path, kind, num_proc):
    folder = make(tmp_path / "model", kind)
    docs = [f"{i} {text}" for i, text in enumerate(TEXTS + LINES)]
    source = tmp_path / "docs.jsonl"
    source.write_text("".join(json.dumps({"text": d}) + "\n" for d in docs))
    prepare.main([f"--dataset={source}", f"--tokenizer={folder}", f"--num_proc={num_proc}",
                  f"--data_dir={tmp_path}/data", "--name=d", "--val_fraction=0.2"])
    data = Data(f"{tmp_path}/data/d")
    assert data.meta["tokenizer"] == data.meta["flags"]["tokenizer"] == f"hf:{folder}"
    assert data.meta["dtype"] == "uint16"
    found = []
    for split, ids in (("train", data.train), ("val", data.val)):
        ids = np.asarray(ids)
        assert data.tokenizer.token_lengths[ids].sum() == data.meta[split]["bytes"]
        parts = np.split(ids, np.flatnonzero(ids == data.separator) + 1)
        found += [data.tokenizer.decode(part) for part in parts[:-1]]
    assert sorted(found) == sorted(docs)

    os.rename(folder, tmp_path / "moved")
    refused(lambda: open_tokenizer(data.meta), "model' is not there: bring it back")
    moved = open_tokenizer(data.meta, f"{tmp_path}/moved/tokenizer.json")
    assert moved.fingerprint == data.meta["vocabulary"]
    other = byte_level(normalizers.NFC())
    other["added_tokens"][-1]["content"] = "<other>"
    place = put(tmp_path / "other", other, eos_token_id=id_of(other, "<|end_of_text|>"))
    refused(lambda: open_tokenizer(data.meta, place), "is not the vocabulary")
    refused(lambda: open_tokenizer(data.meta | {"tokenizer": "gpt2"}, f"{tmp_path}/moved"),
            "splits text otherwise")


def test_a_name_means_one_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make(tmp_path / "owner/model", "byte-level")
    assert full_name("bytes") == "bytes" and full_name("gpt2") == "gpt2"
    assert full_name("owner/model") == full_name(f"hf:{folder}") == f"hf:{folder}"
    assert full_name("meta-llama/Llama-3.1-8B") == "hf:meta-llama/Llama-3.1-8B"
    assert full_name("hf:gpt2") == "hf:gpt2"
    assert full_name("llama3:x") == f"llama3:{tmp_path}/x"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert full_name("hf:~/owner/model") == full_name("~/owner/model") == f"hf:{folder}"
    assert full_name("llama3:~/x") == f"llama3:{tmp_path}/x"
    for name in ("gtp2", "/nowhere", "./a/b", "a/b/c", "../a", "x\0y", "", "http://a/b"):
        refused(lambda: full_name(name), "is not one of bytes.*llama3:PATH.*owner/name")
    refused(lambda: full_name("gtp2"), "did you mean 'gpt2'")
    for name in ("hf:/nowhere", "hf:", "hf:http://127.0.0.1:9/a", "hf:../a/b"):
        refused(lambda: full_name(name), "is not there")


# ---- the hub

def test_a_hub_id_is_fetched(tmp_path, monkeypatch):
    folder = make(tmp_path / "snapshot", "byte-level")
    asked = []

    def download(hub_id, allow_patterns):
        asked.append((hub_id, sorted(allow_patterns)))
        return folder
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    tokenizer = Tokenizer("meta-llama/Llama-3.1-8B")
    assert tokenizer.name == "hf:meta-llama/Llama-3.1-8B"
    assert tokenizer.fingerprint == Tokenizer(folder).fingerprint
    assert asked == [("meta-llama/Llama-3.1-8B", ["*config.json", "tokenizer*"])]


def test_a_model_that_cannot_be_fetched_is_one_line_that_names_the_way_out(monkeypatch):
    from huggingface_hub import errors
    gated = errors.GatedRepoError.__new__(errors.GatedRepoError)
    missing = errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
    for error, reason in ((gated, "accept its licence"), (missing, "no such model"),
                          (OSError("no route\nto host"), "no route"), (OSError(), "OSError")):
        def download(*args, **kwargs):
            raise error
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        refused(lambda: Tokenizer("meta-llama/Llama-3.1-8B"),
                f"cannot be fetched .{reason}.*tokenizer.json and config.json.*--tokenizer=FOLDER")


# ---- what is refused

def change(data, path, value):
    """Set data[a][b][c] for the path "a/b/c"."""
    *parents, last = path.split("/")
    for key in parents:
        data = data[key]
    data[last] = value


@pytest.mark.parametrize("path,value,message", [
    ("normalizer", {"type": "NFKC"}, "normalizer NFKC changes the text"),
    ("normalizer", {"type": "Lowercase"}, "normalizer Lowercase"),
    ("normalizer", {"type": "Sequence", "normalizers": [
        {"type": "NFC"}, {"type": "Strip", "strip_left": True, "strip_right": True}]}, "Strip"),
    ("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}, "Replace"),
    ("pre_tokenizer", {"type": "WhitespaceSplit"}, "neither byte-level BPE nor"),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [
        {"type": "WhitespaceSplit"}, {"type": "ByteLevel"}]}, "pre-tokenizer WhitespaceSplit"),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False},
        {"type": "ByteLevel"}]}, "pre-tokenizer Split"),
    ("model/type", "WordPiece", "its model is WordPiece, not BPE"),
    ("model/type", "Unigram", "its model is Unigram, not BPE"),
    ("model/end_of_word_suffix", "</w>", "mark the inside or the end"),
    ("model/vocab/!", 1 << 30, "not small numbers"),
    ("model/vocab/!", "x", "is damaged"),
    ("model/vocab", {"a": 0}, "lacks some of the 256 single bytes"),
    ("model/vocab", [["a", 0.5]], "lacks some of the 256 single bytes"),
    ("model/merges", [["no such", "token"]], "is damaged"),
    ("model/merges", 7, "is damaged"),
    ("model", None, "is damaged"),
    ("added_tokens", [{"id": 1}], "is damaged"),
    ("added_tokens", ["x"], "is damaged"),
    ("pre_tokenizer", [], "is damaged")])
def test_a_vocabulary_that_cannot_be_exact_is_refused_with_the_reason(
        tmp_path, path, value, message):
    data = byte_level()
    end = id_of(data, "<|end_of_text|>")
    change(data, path, value)
    refused(lambda: Tokenizer(put(tmp_path, data, eos_token_id=end)), message)


def test_a_separator_that_text_can_spell_is_refused(tmp_path):
    data = byte_level()
    place = put(tmp_path, data, eos_token_id=data["model"]["vocab"]["!"])
    refused(lambda: Tokenizer(place), "can be spelled in text")


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_one_line(tmp_path, raw):
    place = make(tmp_path / "model", "byte-level")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "model" / name).write_bytes(raw)
        refused(lambda: Tokenizer(place), "is damaged|ends a text")


def test_a_folder_without_tokenizer_json_is_one_line(tmp_path):
    refused(lambda: Tokenizer(str(tmp_path)), "holds no tokenizer.json")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    place = make(tmp_path / "model", "byte-level")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(lambda: Tokenizer(place), "pip install tokenizers")
