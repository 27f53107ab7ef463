"""
The output folder of a pass of prepare.py, written so that a kill at any moment loses at most the
work since the last commit.

The files only grow. At a commit they are put on the disk first; then meta.json is replaced as a
whole and says how long each file is, what its checksum is, and where the source goes on. A pass
that goes on cuts off what stands behind the last commit. meta.json names every file before it is
made, so a file that it does not name is not the pass's own and is never touched.
"""
import contextlib
import itertools
import os
import re
import sys

import numpy as np
import xxhash  # comes with datasets
from tqdm import tqdm

from configurator import UserError, replacing, to_json
from data import read_meta

SOURCE_FILES = "source_files.tsv"  # in the output folder: the input files, their sizes and times
SEEN = "seen.bin"  # in the output folder while the pass runs: see Seen
OWN_FILE = re.compile(r"(train|val)(_\d+)?\.bin|seen\.bin|source_files\.tsv")


class Folder:
    """
    path: the folder. meta: the dict of its meta.json as last written, None if there is none yet.
    made: the names of the files that the pass has made.
    """

    def __init__(self, path):
        self.path = path
        self.meta = read_meta(path)
        self.made = []
        if self.meta and not self.meta["complete"]:
            self.made = self._check_unfinished()
        if self.meta is None and os.path.exists(path):
            if not os.path.isdir(path):
                raise UserError(f"{path} is a file, not a folder: choose another --name")
            foreign = sorted(set(os.listdir(path)) - {"meta.json.partial"})
            if foreign:
                raise UserError(f"{path} holds files that are not prepare.py's ({foreign[0]}): "
                                "choose another --name")

    def _check_unfinished(self):
        """The names of the files that an unfinished pass has made, if its meta.json is whole."""
        if self.meta.get("check") != _check(self.meta):
            raise UserError(f"{self.path}/meta.json is damaged (its checksum is wrong): bring a "
                            f"copy of it back, or move {self.path} away and run prepare.py again")
        # Only such names are ever removed, whoever wrote the meta.json.
        return [name for name in self.meta["made"] if OWN_FILE.fullmatch(name)]

    def begin(self, meta, files):
        """Write the first meta.json, unless there is one, and the list of input files."""
        nothing = {"documents": 0, "tokens": 0, "bytes": 0, "files": []}
        if self.meta is None:
            self.made.append(SOURCE_FILES)
            self.write({**meta, "complete": False, "train": nothing, "val": nothing, "counts": {},
                        "seen": {"keys": 0, "xxh3": ""}, "state": None})
        if files != read_file_list(self.path):
            with replacing(os.path.join(self.path, SOURCE_FILES), binary=True) as f:
                f.write(files.encode("utf-8", "surrogateescape"))

    def finish(self, counts):
        """Write the last meta.json, from the last commit. Returns its dict."""
        # seen.bin goes: meta.json must say so first, or a kill in between could not be resumed.
        self.write({**self.meta, "seen": {"keys": 0, "xxh3": ""}})
        self.forget_uncommitted()
        counts = {name: n for name, n in counts.items() if n and name != "rows"}
        meta = {**self.meta, "complete": True, "counts": counts, "state": None}
        del meta["seen"]
        self.write(meta)
        return meta

    def write(self, meta):
        """Replace meta.json, on the disk: it is always a whole one."""
        self.meta = meta
        if not meta["complete"]:
            meta = {**meta, "made": self.made}
            meta["check"] = _check(meta)
        with replacing(os.path.join(self.path, "meta.json")) as f:
            f.write(to_json(meta, indent=1))

    def create(self, name):
        """A new empty GrowingFile."""
        path = os.path.join(self.path, name)
        if os.path.lexists(path):
            raise UserError(f"{path} is in the way and not prepare.py's: move it away")
        self.made.append(name)
        self.write(self.meta)
        return GrowingFile(open(path, "wb"), xxhash.xxh3_64())

    def reopen(self, name, size, xxh3):
        """
        A GrowingFile that an earlier run has made, cut off behind its first `size` bytes.
        xxh3: the checksum of those bytes; others than were written then are refused.
        """
        path = os.path.join(self.path, name)
        try:
            file = open(path, "r+b")
        except FileNotFoundError:
            raise self._damaged(name, "is missing") from None
        digest = xxhash.xxh3_64()
        left = size
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"checking {name}", delay=1) as bar:
            while part := file.read(min(left, 1 << 24)):
                digest.update(part)
                left -= len(part)
                bar.update(len(part))
        if left or digest.hexdigest() != xxh3:
            file.close()
            raise self._damaged(name, "is no longer what was written")
        file.truncate(size)
        file.seek(size)
        return GrowingFile(file, digest)

    def check_size(self, name, size):
        """Refuse a finished file whose size is another."""
        path = os.path.join(self.path, name)
        if not os.path.exists(path) or os.path.getsize(path) != size:
            raise self._damaged(name, f"is missing or has not {size:,} bytes")

    def _damaged(self, name, what):
        return UserError(f"{os.path.join(self.path, name)} {what}: bring a copy back, "
                         f"or move {self.path} away and start anew")

    def forget_uncommitted(self):
        """Remove the files that were made, but that meta.json does not count among the results."""
        keep = {SOURCE_FILES}
        for split in ("train", "val"):
            keep |= {f["name"] for f in self.meta[split]["files"]}
        if self.meta["seen"]["keys"]:
            keep.add(SEEN)
        self._forget(keep)

    def remove(self):
        """Take back all that the pass has made."""
        self._forget(keep=())
        for name in ("meta.json", "meta.json.partial"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self.path, name))

    def _forget(self, keep):
        for name in [n for n in self.made if n not in keep]:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self.path, name))
            self.made.remove(name)


# --------------------------------------------------------------------------------------------------
# meta.json's checksum, the list of input files

def _check(meta):
    """The checksum of a meta dict, over everything but the checksum itself."""
    rest = {key: value for key, value in meta.items() if key != "check"}
    return xxhash.xxh3_64_hexdigest(to_json(rest).encode())


def file_list(paths):
    """
    A line per file: path, size in bytes, time of its last change in ns.
    It tells changed data from the same.
    """
    lines = []
    for path in paths:
        about = os.stat(path)
        lines.append(f"{path}\t{about.st_size}\t{about.st_mtime_ns}\n")
    return "".join(lines)


def changed_file(before, now, columns=3):
    """
    In words, the first file in which two file_lists differ in their first columns;
    "" if there is none.
    """
    def parse(text):
        lines = text.split("\n")[:-1]  # a path may hold other line ends, and tabs
        return [line.rsplit("\t", 2)[:columns] for line in lines]

    for old, new in itertools.zip_longest(parse(before), parse(now)):
        if old is None:
            return f"{new[0]} is new"
        if new is None:
            return f"{old[0]} is gone"
        if old[0] != new[0]:
            return f"{new[0]} stands where {old[0]} stood"
        if old != new:
            return f"{new[0]} was changed, {old[1]} → {new[1]} bytes"
    return ""


def read_file_list(path):
    """The input files that a pass began with, as file_list gave them."""
    try:
        with open(os.path.join(path, SOURCE_FILES), "rb") as f:
            return f.read().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return ""


# --------------------------------------------------------------------------------------------------
# Files that grow

class GrowingFile:
    """A file that is written at its end, and the running checksum of all its bytes."""

    def __init__(self, file, digest):
        self.file = file
        self.digest = digest

    @property
    def xxh3(self):
        return self.digest.hexdigest()

    def write(self, raw):
        self.file.write(raw)
        self.digest.update(raw)

    def commit(self):
        """Put everything on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self):
        with contextlib.suppress(OSError):  # a full disk, reported already
            self.file.close()


class Writer:
    """
    The growing .bin files of one split.
    shard_tokens: tokens to a file; 0 = one file. saved: what the last commit() of an earlier run
    returned.
    """

    def __init__(self, folder, split, dtype, shard_tokens, saved):
        self.folder = folder
        self.split = split
        self.dtype = dtype
        self.sharded = shard_tokens > 0
        self.shard_tokens = shard_tokens or sys.maxsize
        self.totals = {k: saved[k] for k in ("documents", "tokens", "bytes")}
        self.files = [dict(f) for f in saved["files"]]  # name, tokens and xxh3 of each
        for f in self.files[:-1]:
            folder.check_size(f["name"], f["tokens"] * dtype.itemsize)
        if self.files:
            self._reopen_last()
        else:
            self._next_file()

    def _reopen_last(self):
        last = self.files[-1]
        self.file = self.folder.reopen(last["name"], last["tokens"] * self.dtype.itemsize,
                                       last["xxh3"])

    def _next_file(self):
        name = f"{self.split}_{len(self.files):03d}.bin" if self.sharded else f"{self.split}.bin"
        self.file = self.folder.create(name)
        self.files.append(dict(name=name, tokens=0, xxh3=self.file.xxh3))

    def add(self, ids, sizes):
        """Append whole documents: their ids and the bytes of each."""
        self.totals["documents"] += len(sizes)
        self.totals["tokens"] += len(ids)
        self.totals["bytes"] += int(sizes.sum())
        while len(ids):
            room = self.shard_tokens - self.files[-1]["tokens"]
            if not room:
                self.commit()
                self.file.close()
                self._next_file()
                continue
            part = ids[:room]
            self.file.write(part.data)
            self.files[-1]["tokens"] += len(part)
            self.files[-1]["xxh3"] = self.file.xxh3
            ids = ids[room:]

    def take_last(self, tokenizer):
        """
        Take the last of several documents out of the split. Returns its ids and its size in bytes.
        The files are shortened by cut_off(), once meta.json says so:
        a crash between the two loses nothing.
        """
        self.commit()
        parts = [np.fromfile(os.path.join(self.folder.path, f["name"]), self.dtype)
                 for f in self.files]
        ids = np.concatenate(parts)
        left = np.flatnonzero(ids[:-1] == tokenizer.separator)[-1] + 1  # tokens that stay
        document = ids[left:]
        size = int(tokenizer.token_lengths[document].sum())
        for file, part in zip(self.files, parts):
            part = part[:left]
            file["tokens"] = len(part)
            file["xxh3"] = xxhash.xxh3_64_hexdigest(part.tobytes())
            left -= len(part)
        self.files = [f for f in self.files if f["tokens"]]
        self.totals["documents"] -= 1
        self.totals["tokens"] -= len(document)
        self.totals["bytes"] -= size
        return document, size

    def cut_off(self):
        """Cut the last file to what meta.json says of it."""
        self.file.close()
        self._reopen_last()

    def commit(self):
        """Put everything on the disk. Returns what the files are then."""
        self.file.commit()
        return {**self.totals, "files": [dict(f) for f in self.files]}

    def close(self):
        self.file.close()


class Seen:
    """
    The keys of the documents kept so far, in memory and, for a pass that goes on, in seen.bin.
    saved: what the last commit() of an earlier run returned.
    """

    def __init__(self, folder, saved):
        self.folder = folder
        self.keys = set()
        self.new = []  # keys that are not in seen.bin yet
        self.committed = saved["keys"]  # how many are
        self.file = None  # made for the first key
        if self.committed:
            self.file = folder.reopen(SEEN, 8 * self.committed, saved["xxh3"])
            self.keys.update(np.fromfile(os.path.join(folder.path, SEEN), np.uint64).tolist())

    def first(self, keys):
        """
        keys (documents, n) -> bool per document:
        none of its keys was seen before, and now they are.
        """
        out = []
        for row in keys.tolist():
            out.append(self.keys.isdisjoint(row))
            if out[-1]:
                self.keys.update(row)
                self.new += row
        return np.array(out, dtype=bool)

    def commit(self):
        """Put the new keys on the disk. Returns what seen.bin is then."""
        if self.new:
            self.file = self.file or self.folder.create(SEEN)
            self.file.write(np.array(self.new, dtype=np.uint64).tobytes())
            self.file.commit()
            self.committed += len(self.new)
            self.new = []
        xxh3 = self.file.xxh3 if self.file else ""
        return {"keys": self.committed, "xxh3": xxh3}

    def close(self):
        if self.file:
            self.file.close()
