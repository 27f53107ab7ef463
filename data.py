"""
Reading prepared data: the tokenizer, the folder that prepare.py wrote, and the batches of a
training run.

    data = Data("data/demo")                       # data.meta, data.train, data.val, data.tokenizer
    batches = Batches(data.train, block_size=512, batch_size=4, separator=data.separator, seed=1337)
    idx, targets, doc = batches.train(0, "cpu")    # (B, T) each

A folder holds meta.json and flat arrays of token ids (*.bin). On disk the separator's id stands
behind every document. So in a window it stands before every document, except perhaps the first: to
the model a separator is the beginning of a document.
Also here: the pass-key lines. The demo learns retrieval from them, and eval.py tests it with them.
"""
import base64
import binascii
import functools
import hashlib
import json
import os
import re
import string

import numpy as np
import tiktoken

from configurator import UserError, mismatch

# --------------------------------------------------------------------------------------------------
# Tokenizers

LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
MAX_VOCAB = 1 << 24  # a larger rank is a damaged file


def _read_ranks(path):
    """
    {token: rank} of a file of lines "base64-token rank", the format of Llama 3's tokenizer.model.
    The file itself is read: tiktoken's own loader caches local files by their path,
    not their content.
    """
    ranks = {}
    try:
        with open(path, "rb") as f:
            for line in f.read().splitlines():
                if line:
                    token, rank = line.split()
                    token = base64.b64decode(token, validate=True)
                    if token in ranks:
                        raise ValueError
                    ranks[token] = int(rank)
    except OSError as e:
        raise UserError(f"{path} is not a readable file of token ranks: {e.strerror}") from None
    except (ValueError, binascii.Error):
        raise UserError(f"{path} is not a readable file of token ranks: "
                        "it is damaged or of another kind") from None
    if any(bytes([i]) not in ranks for i in range(256)):
        raise UserError(f"{path} is not a readable file of token ranks: "
                        "it lacks some of the 256 single bytes")
    if (len(set(ranks.values())) < len(ranks)
            or min(ranks.values()) < 0
            or max(ranks.values()) > MAX_VOCAB):
        raise UserError(f"{path} is not a readable file of token ranks: "
                        "its ranks are not distinct small numbers")
    return ranks


def _rank_file_encoding(name):
    """
    A tiktoken.Encoding of "llama3:PATH", with Llama 3's 256 special tokens,
    or "tiktoken:PATH", with one.
    """
    kind, path = name.split(":", 1)
    ranks = _read_ranks(path)
    special = ["<|endoftext|>"]
    if kind == "llama3":  # the other 254 have no use here
        special = (["<|begin_of_text|>", "<|end_of_text|>"]
                   + [f"<|special_{i}|>" for i in range(254)])
    first = max(ranks.values()) + 1
    return tiktoken.Encoding(name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks,
                             special_tokens={s: first + i for i, s in enumerate(special)})


def _cut_blanks(text, longest=10_000):
    """
    tiktoken's regex panics on a million blanks in a row: cut such runs.
    The pieces joined give the text.
    """
    # Most texts need no cut. A run of `longest` blanks contains a whole stretch of `half`
    # characters, so a text without a blank stretch has no such run.
    half = longest // 2
    if not any(text[i:i + half].isspace() for i in range(0, len(text) - half + 1, half)):
        return [text]
    cuts = [m.start() + longest for m in re.finditer(r"\s{%d}(?=\s)" % longest, text)]
    return [text[a:b] for a, b in zip([0] + cuts, cuts + [len(text)])]


class Tokenizer:
    """
    A tiktoken encoding plus a separator id. Text that spells a special token is ordinary text.

    name: "bytes" (id = byte, separator 256, no network), a name that tiktoken knows ("gpt2"), or
    "llama3:PATH" or "tiktoken:PATH", a file of token ranks. Raises UserError.
    """

    def __init__(self, name):
        self.name = name
        if name == "bytes":
            ranks = {bytes([i]): i for i in range(256)}
            self.enc = tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks,
                                         special_tokens={"<|endoftext|>": 256})
        elif name.startswith(("llama3:", "tiktoken:")):
            self.enc = _rank_file_encoding(name)
        else:
            try:
                self.enc = tiktoken.get_encoding(name)
            except ValueError:
                names = ["bytes", "llama3:PATH", "tiktoken:PATH"] + tiktoken.list_encoding_names()
                raise UserError(f"tokenizer {name!r} is not one of {', '.join(names)}") from None
            except OSError:  # requests' ConnectionError is one
                raise UserError(
                    f"tokenizer {name!r} must be downloaded once and cannot be: "
                    "use --tokenizer bytes, or set TIKTOKEN_CACHE_DIR to a folder "
                    "filled on a machine with network") from None
        end = "<|end_of_text|>" if name.startswith("llama3:") else "<|endoftext|>"
        self.separator = self.enc.encode_single_token(end)
        self.vocab_size = self.enc.n_vocab
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text):
        """str (no lone surrogates) -> 1-D numpy array of ids."""
        if self.name == "bytes":
            return np.frombuffer(text.encode(), dtype=np.uint8)
        pieces = [self.enc.encode_to_numpy(p, disallowed_special=()) for p in _cut_blanks(text)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def decode(self, ids):
        """
        Ids -> str.
        Ids outside the vocabulary (padding rows) are dropped, broken UTF-8 becomes U+FFFD.
        """
        return b"".join(self.token_bytes(i) for i in ids).decode(errors="replace")

    def token_bytes(self, i):
        """The bytes of one id; none for the separator and for ids outside the vocabulary."""
        try:
            return b"" if i == self.separator else self.enc.decode_single_token_bytes(int(i))
        except (KeyError, OverflowError):
            return b""

    @functools.cached_property
    def token_lengths(self):
        """Bytes of every id, (vocab_size,): token_lengths[ids].sum() is the text's size."""
        return np.array([len(self.token_bytes(i)) for i in range(self.vocab_size)])

    @functools.cached_property
    def fingerprint(self):
        """
        SHA-256 of the vocabulary, every token's bytes in the order of the ids:
        a name may come to mean another file.
        """
        digest = hashlib.sha256()
        for i in range(self.vocab_size):
            token = self.token_bytes(i)
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()


def open_tokenizer(meta, name=""):
    """
    The tokenizer of prepared data or of a checkpoint. meta: the dict of its meta.json.
    name: the tokenizer under another name or path, if the vocabulary file has moved.
    Raises UserError if its vocabulary is not the one that made the data.
    """
    tokenizer = Tokenizer(name or meta["tokenizer"])
    # Data of earlier versions has no fingerprint.
    wanted = meta.get("vocabulary", tokenizer.fingerprint)
    if tokenizer.fingerprint != wanted or tokenizer.vocab_size != meta["vocab_size"]:
        raise UserError(f"tokenizer {tokenizer.name!r} is not the vocabulary that this data or "
                        f"checkpoint was made with (SHA-256 {tokenizer.fingerprint[:12]}…, "
                        f"not {wanted[:12]}…): bring that file back")
    return tokenizer


# --------------------------------------------------------------------------------------------------
# A prepared folder

FILE = {"name": str, "tokens": int, "xxh3": str}
SPLIT = {"documents": int, "tokens": int, "bytes": int, "files": [FILE]}
META = {"dataset": str, "source": str,
        "tokenizer": str, "vocab_size": int, "separator": int, "dtype": str,
        "flags": dict, "complete": bool, "train": SPLIT, "val": SPLIT, "counts": dict}

PASS = {"made": [str], "seen": {"keys": int, "xxh3": str}, "state": None}  # while the pass runs


def check_meta(meta):
    """What is wrong with the content of a meta.json, in words; "" if nothing is."""
    if wrong := mismatch(meta, META):
        return wrong
    since = {name: str for name in ("vocabulary", "source_files") if name in meta}  # newer entries
    if wrong := mismatch(meta, since):
        return wrong
    if any(type(n) is not int for n in meta["counts"].values()):
        return "an entry of counts is no number"
    if meta["dtype"] not in ("uint16", "uint32"):
        return "dtype is not uint16 or uint32"
    if not 0 <= meta["separator"] < meta["vocab_size"] <= 2 * MAX_VOCAB:
        return "separator and vocab_size do not fit each other"
    for split in ("train", "val"):
        for file in meta[split]["files"]:
            parts = file["name"].split("/")
            if (not file["name"].endswith(".bin")
                    or "\0" in file["name"]
                    or "" in parts
                    or ".." in parts):
                return f"it names {file['name']!r}, which is no .bin file inside the folder"
        if min(meta[split][k] for k in ("documents", "tokens", "bytes")) < 0:
            return f"{split} has negative counts"
        if min([f["tokens"] for f in meta[split]["files"]], default=0) < 0:
            return f"{split} has negative counts"
        if sum(f["tokens"] for f in meta[split]["files"]) != meta[split]["tokens"]:
            return f"the files of {split} do not add up to its tokens"
    if meta["complete"]:
        return ""
    wrong = mismatch(meta, PASS)
    outside = ("/", "\0")
    if not wrong and any(name in ("", "..") or any(c in name for c in outside)
                         for name in meta["made"]):
        wrong = "it names files outside the folder"
    if not wrong and not _is_state(meta["state"]):
        wrong = "its state is no place in a source"
    return wrong


def _is_state(state):
    """
    Can this be the state of a source (sources.py)? There are five kinds: None, a number,
    [file, offset, block], the dict of a stream, and a dict with the lines of an article begun.
    """
    if isinstance(state, list):
        return len(state) == 3 and all(type(n) is int and n >= 0 for n in state)
    if isinstance(state, dict) and "begun" in state:
        article = {"begun": [str], "number": int, "stream": None}
        return not mismatch(state, article) and _is_state(state["stream"])
    if isinstance(state, dict):
        return True  # datasets checks its own
    return state is None or (type(state) is int and state >= 0)


def read_meta(folder):
    """
    The dict of folder/meta.json; None where there is no such file.
    Raises UserError for a damaged one.
    """
    path = os.path.join(folder, "meta.json")
    try:
        with open(path, encoding="utf-8") as f:
            meta = json.load(f)
        wrong = check_meta(meta)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        wrong = e.strerror
    except (ValueError, RecursionError):
        wrong = "it is not JSON"
    if wrong:
        raise UserError(f"{path} is damaged ({wrong}): bring a copy of it back, "
                        f"or move {folder} away and run prepare.py again")
    return meta


class Shards:
    """Several arrays of ids read as one: len(), slices, np.asarray()."""

    def __init__(self, parts):
        self.parts = parts
        self.ends = np.cumsum([len(p) for p in parts])

    def __len__(self):
        return int(self.ends[-1]) if self.parts else 0

    def __getitem__(self, s):
        start, stop, step = s.indices(len(self))
        assert step == 1, "a slice of shards has no step"
        out = []
        i = int(np.searchsorted(self.ends, start, "right"))
        while start < stop and i < len(self.parts):
            first = int(self.ends[i]) - len(self.parts[i])
            out.append(self.parts[i][start - first:stop - first])
            start = int(self.ends[i])
            i += 1
        if len(out) == 1:
            return out[0]
        return np.concatenate(out or [self.parts[0][:0] if self.parts else np.empty(0, np.uint16)])

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[:], dtype=dtype)


class Data:
    """
    A prepared folder: meta (dict), train and val (1-D ids, mapped from disk),
    tokenizer (made when first asked for).
    """

    def __init__(self, path):
        self.path = path
        self.meta = read_meta(path)
        if self.meta is None:
            raise UserError(f"{path} holds no meta.json: run prepare.py (python prepare.py --help)")
        if not self.meta["complete"]:
            raise UserError(f"{path} is not complete: run the same prepare.py command again, "
                            "it goes on where it stopped")
        self.train = self._open("train")
        self.val = self._open("val")
        self.separator = self.meta["separator"]
        self.vocab_size = self.meta["vocab_size"]

    def _open(self, split):
        dtype = np.dtype(self.meta["dtype"])
        parts = []
        for f in self.meta[split]["files"]:
            file = os.path.join(self.path, f["name"])
            wanted = f["tokens"] * dtype.itemsize
            size = os.path.getsize(file) if os.path.exists(file) else None
            if size != wanted:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise UserError(f"{file} {found}, meta.json says {wanted:,}: bring a copy back, "
                                f"or move {self.path} away and run prepare.py again")
            parts.append(np.memmap(file, dtype=dtype, mode="r") if size else np.empty(0, dtype))
        return parts[0] if len(parts) == 1 else Shards(parts)

    @functools.cached_property
    def tokenizer(self):
        return open_tokenizer(self.meta)


def identity(meta):
    """
    What decides which tokens a run sees: vocabulary, counts and checksums, as {name: value}.
    For comparing.
    """
    out = {"tokenizer": meta["tokenizer"], "vocabulary": meta.get("vocabulary")}
    for split in ("train", "val"):
        out[f"{split} tokens"] = meta[split]["tokens"]
        out[f"{split} checksums"] = [f["xxh3"] for f in meta[split]["files"]]
    return out


def differences(a, b):
    """The entries in which two dicts differ, as "key old → new, …"; long values are cut."""
    def short(value):
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "…"
    keys = sorted({*a, *b})
    return ", ".join(f"{k} {short(a.get(k))} → {short(b.get(k))}"
                     for k in keys if a.get(k) != b.get(k))


# --------------------------------------------------------------------------------------------------
# Batches

def check_ids(ids, vocab_size):
    """Refuse ids (array or tensor) beyond the vocabulary: a file of the right size is damaged."""
    if len(ids) and int(ids.max()) >= vocab_size:
        raise UserError(f"the data holds the id {int(ids.max())}, beyond its vocabulary of "
                        f"{vocab_size}: it is damaged, see prepare.py --inspect")


class Batches:
    """
    Windows of block_size + 1 ids, block_size apart, every one once per epoch in a random order.
    Micro-batch m (counted over all ranks and steps) is a pure function of (seed, m),
    so a resumed run sees what an undisturbed one sees.
    """

    def __init__(self, ids, block_size, batch_size, separator, seed, doc_mask=True,
                 vocab_size=None):
        self.ids = ids
        self.vocab_size = vocab_size  # None: the ids are not checked
        self.separator = separator
        self.seed = seed
        self.doc_mask = doc_mask
        self.T = block_size
        self.B = batch_size
        self.n = (len(ids) - 1) // block_size
        self.order = functools.lru_cache(2)(self._order)  # a batch may reach into the next epoch
        if self.n < 1:
            raise UserError(f"block_size {block_size} is larger than the data "
                            f"(one of its splits has {len(ids):,} tokens): "
                            "prepare more, or shorten it")

    def _order(self, epoch):
        """
        The order of the windows in an epoch, (n,).
        Seed and epoch are hashed together, never added.
        """
        return np.random.default_rng((self.seed, epoch)).permutation(self.n)

    def windows(self, starts, device, length):
        """
        The windows at these positions, each cut to pieces of `length` tokens:
        idx, targets (B·T/length, length) int64,
        and doc of the same shape, or None without doc_mask.
        """
        import torch  # here: prepare.py's workers import this file and need no torch
        rows = torch.stack([torch.from_numpy(self.ids[s:s + self.T + 1].astype(np.int64))
                            for s in starts])
        if self.vocab_size:
            check_ids(rows, self.vocab_size)
        if device.startswith("cuda"):
            rows = rows.pin_memory().to(device, non_blocking=True)
        idx = rows[:, :-1].reshape(-1, length)
        targets = rows[:, 1:].reshape(-1, length)
        # A separator begins a document.
        doc = (idx == self.separator).cumsum(1) if self.doc_mask else None
        return idx, targets, doc

    def train(self, m, device, length=None):
        """Micro-batch m of the run."""
        starts = []
        for draw in range(m * self.B, (m + 1) * self.B):
            epoch, i = divmod(draw, self.n)
            starts.append(int(self.order(epoch)[i]) * self.T)
        return self.windows(starts, device, length or self.T)

    def evaluation(self, m, count, device):
        """Micro-batch m of `count`, spread evenly over the data."""
        spread = np.linspace(0, self.n - 1, count * self.B).astype(int)
        starts = [int(w) * self.T for w in spread[m * self.B:(m + 1) * self.B]]
        return self.windows(starts, device, self.T)


# --------------------------------------------------------------------------------------------------
# Pass-key lines

def passkey_line(name, key):
    """A fact to remember and, cut behind the "=", the question for it."""
    return f"{name}={key}\n"


def random_passkey(rng):
    """(name, key) from a random.Random: two capital letters, four of a-z and 0-9."""
    name = "".join(rng.choices(string.ascii_uppercase, k=2))
    key = "".join(rng.choices(string.ascii_lowercase + string.digits, k=4))
    return name, key


def passkey_document(rng, filler):
    """
    A synthetic document from which looking up is learnt: 1 to 4 facts, told one after the other
    between many questions. A question is the fact once more, predictable from its "=" on.

    Lines stand at irregular distances, or a model would learn the distances instead of looking up.
    In four of five documents a few dots keep them apart, and most of these documents are short:
    they teach looking up. In the others stretches of `filler` (a text of at least 450 characters)
    keep them apart: they teach reaching far.
    """
    far = rng.random() < 0.2
    length = rng.randint(300, 700) if far else 40 * 8 ** rng.random()
    facts = dict(random_passkey(rng) for _ in range(rng.choice((1, 2, 3, 4))))
    untold, told, text = list(facts), [], ""
    while len(text) < length:
        if untold and (not told or rng.random() < 0.4):
            told.append(untold.pop())
            name = told[-1]
        else:
            name = rng.choice(told)
        if not far:
            text += rng.randint(0, 6) * "." + "\n"
        elif rng.random() < 0.3:
            stretch = rng.randint(30, 450)
            at = rng.randint(0, len(filler) - stretch)
            text += filler[at:at + stretch] + "\n"
        text += passkey_line(name, facts[name])
    return text
