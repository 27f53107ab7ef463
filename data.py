"""
Reading prepared data: the folder that prepare.py wrote, and the batches of a training run.

    data = Data("data/demo")                       # data.meta, data.train, data.val, data.tokenizer
    batches = Batches(data.train, block_size=512, batch_size=4, seed=1337)
    idx, targets = batches.train(0, "cpu")         # (B, T) each

A folder holds meta.json and flat arrays of token ids (*.bin). A separator follows every document;
to the model it is the beginning of the next one (encode.encode_block says why).
Also here: the pass-key lines. The demo learns retrieval from them, and eval.py tests it with them.
"""
import functools
import json
import os
import re
import string
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from configurator import UserError, mismatch
from tokenizer import MAX_VOCAB, open_tokenizer

# --------------------------------------------------------------------------------------------------
# A prepared folder

FILE = {"name": str, "tokens": int, "xxh3": str}
SPLIT = {"documents": int, "tokens": int, "bytes": int, "files": [FILE]}
META = {"dataset": str, "source": str, "source_files": str,
        "tokenizer": str, "vocabulary": str, "vocab_size": int, "separator": int, "dtype": str,
        "flags": dict, "complete": bool, "train": SPLIT, "val": SPLIT, "counts": dict}


def check_meta(meta):
    """What is wrong with the content of a meta.json, in words; "" if nothing is."""
    if wrong := mismatch(meta, META):
        return wrong
    if any(type(n) is not int for n in meta["counts"].values()):
        return "an entry of counts is no number"
    if meta["dtype"] not in ("uint16", "uint32"):
        return "dtype is not uint16 or uint32"
    if not 0 <= meta["separator"] < meta["vocab_size"] <= 2 * MAX_VOCAB:
        return "separator and vocab_size do not fit each other"
    for split in ("train", "val"):
        about = meta[split]
        for file in about["files"]:
            # a file of the folder itself, or of one machine's part of it
            if not re.fullmatch(r"([^/\0]+/)?[^/\0]+\.bin", file["name"]) or ".." in file["name"]:
                return f"it names {file['name']!r}, which is no .bin file inside the folder"
        tokens = [f["tokens"] for f in about["files"]]
        if min(about["documents"], about["tokens"], about["bytes"], *tokens) < 0:
            return f"{split} has negative counts"
        if sum(tokens) != about["tokens"]:
            return f"the files of {split} do not add up to its tokens"
    return ""


def read_meta(folder):
    """
    The dict of folder/meta.json; None where there is no such file.
    Raises UserError for one that is damaged or cannot be read.
    """
    path = os.path.join(folder, "meta.json")
    try:
        with open(path, encoding="utf-8") as f:
            meta = json.load(f)
        wrong = check_meta(meta)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
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
        return int(self.ends[-1])

    def __getitem__(self, s):
        start, stop, step = s.indices(len(self))
        assert step == 1, "a slice of shards has no step"
        out = [self.parts[0][:0]]  # even a slice of nothing has the right dtype
        i = int(np.searchsorted(self.ends, start, "right"))
        while start < stop:
            first = int(self.ends[i]) - len(self.parts[i])
            out.append(self.parts[i][start - first:stop - first])
            start = int(self.ends[i])
            i += 1
        return out[1] if len(out) == 2 else np.concatenate(out)

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
            if size:  # an empty file cannot be mapped
                parts.append(np.memmap(file, dtype=dtype, mode="r"))
        parts = parts or [np.empty(0, dtype)]
        return parts[0] if len(parts) == 1 else Shards(parts)

    @functools.cached_property
    def tokenizer(self):
        return open_tokenizer(self.meta)


def identity(meta):
    """
    What decides which tokens a run sees: vocabulary, counts and checksums, as {name: value}.
    For comparing.
    """
    out = {"tokenizer": meta["tokenizer"], "vocabulary": meta["vocabulary"]}
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

    def __init__(self, ids, block_size, batch_size, seed, vocab_size=None):
        self.ids = ids
        self.vocab_size = vocab_size  # None: the ids are not checked
        self.seed = seed
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

    def windows(self, starts):
        """The windows at these positions, (B, T + 1) int64, in CPU memory."""
        import torch  # here: prepare.py's workers import this file and need no torch
        rows = np.stack([self.ids[s:s + self.T + 1] for s in starts])  # (B, T + 1)
        if self.vocab_size:
            check_ids(rows, self.vocab_size)
        return torch.from_numpy(rows.astype(np.int64))

    def pieces(self, rows, device, length):
        """
        Windows cut to pieces of `length` tokens, on the device:
        idx and targets, (B·T/length, length) int64.
        """
        rows = rows.to(device, non_blocking=rows.is_pinned())
        idx = rows[:, :-1].reshape(-1, length)
        targets = rows[:, 1:].reshape(-1, length)
        return idx, targets

    def read(self, m):
        """The windows of micro-batch m of the run."""
        starts = []
        for draw in range(m * self.B, (m + 1) * self.B):
            epoch, i = divmod(draw, self.n)
            starts.append(int(self.order(epoch)[i]) * self.T)
        return self.windows(starts)

    def train(self, m, device, length=None):
        """Micro-batch m of the run."""
        return self.pieces(self.read(m), device, length or self.T)

    def evaluation(self, m, count, device):
        """Micro-batch m of `count`, spread evenly over the data."""
        spread = np.linspace(0, self.n - 1, count * self.B).astype(int)
        starts = [int(w) * self.T for w in spread[m * self.B:(m + 1) * self.B]]
        return self.pieces(self.windows(starts), device, self.T)


class Prefetch:
    """
    Batches.train for a GPU: while micro-batch m is computed, a thread reads the rank's next one,
    m + stride, into pinned memory, from which the GPU copies while Python goes on. The batches are
    those of Batches.train; asked for another m than expected, it reads that one.
    An error is raised by the call that asks for its micro-batch.
    A CPU has no use for it: the thread would compete with the threads that compute.

        with Prefetch(batches, stride=1) as loader:
            idx, targets = loader.train(0, "cuda")
    """

    def __init__(self, batches, stride):
        self.batches = batches
        self.stride = stride  # the number of ranks: they share out the micro-batches
        self.thread = ThreadPoolExecutor(1)
        self.expected = None  # the micro-batch that `reading` will hold
        self.reading = None

    def read(self, m, pin):
        rows = self.batches.read(m)
        return rows.pin_memory() if pin else rows

    def train(self, m, device, length=None):
        """Micro-batch m of the run, as Batches.train returns it."""
        pin = device.startswith("cuda")
        if m != self.expected:
            self.reading = self.thread.submit(self.read, m, pin)
        rows = self.reading.result()
        self.expected = m + self.stride
        self.reading = self.thread.submit(self.read, self.expected, pin)
        return self.batches.pieces(rows, device, length or self.batches.T)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.thread.shutdown(cancel_futures=True)  # waits for the micro-batch in work


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
