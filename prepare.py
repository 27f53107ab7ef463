"""
Text to tokens in one streaming pass:
documents -> filters -> tokenizer -> data/<name>/*.bin and meta.json.

    python prepare.py                  # SlimPajama from the Hugging Face hub, GPT-2 tokens
    python prepare.py --dataset demo   # no network: the standard library's source + pass-keys
    python prepare.py --dataset 'texts/*.jsonl.zst' --tokenizer llama3:/path/tokenizer.model
    python prepare.py --dataset fineweb --num_tokens 10e9 --language en --dedup near
    python prepare.py --dataset pile --shard_tokens 1e9    # train_000.bin, train_001.bin, …
    python prepare.py --list | --dataset pile --estimate | --inspect data/pile

The .bin files are flat arrays of token ids (uint16, or uint32 for a vocabulary above 65536). The
separator's id stands behind every document. A hash of a document's text, never its position,
decides whether it goes to val.
meta.json says the rest and, while the pass runs, also how far it has got. A pass that was killed at
any moment goes on when it is started again, and ends with the same bytes. A pass writes only into
a folder that it made itself, and removes only files that it made itself.
On several machines: the same command with --rank and --world_size, or under torchrun, then once
more with --merge.
Where text comes from is in sources.py; reading the result is in data.py.
"""
import contextlib
import functools
import multiprocessing
import os
import re
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import xxhash  # comes with datasets

from configurator import (UserError, check_ranges, environment, only_one, parse, replacing, run,
                          say, to_json)
from data import Data, Shards, Tokenizer, differences, read_meta
from sources import (PRESETS, Preset, TextFile, block_texts, changed_file, file_list, kind_of,
                     open_source, optional, warn)


SOURCE_FILES = "source_files.tsv"  # in the output folder: the input files, their sizes and times


@dataclass
class PrepareConfig:
    # a preset (--list), a hub id, or a local .txt .jsonl .parquet file (also .gz, .zst),
    # folder or glob
    dataset: str = "slimpajama"
    # read the preset from here: another hub id, or local files of the same columns
    source: str = ""
    name: str = ""  # output folder under data_dir; default: the dataset's short name
    # gpt2 | cl100k_base | o200k_base | bytes | llama3:PATH | tiktoken:PATH;
    # default: bytes for demo, else gpt2
    tokenizer: str = ""
    num_tokens: int = 0  # stop after this many, of all machines together; 0 = all (demo: 8 million)
    num_proc: int = 0  # tokenizer processes; 0 = one per core. Bytes without filters take one
    val_fraction: float = 0.0  # share of documents held out; 0 = the preset's (--list), else 0.005
    shard_tokens: int = 0  # tokens to a file train_000.bin …; 0 = one file train.bin
    text_column: str = ""  # of .jsonl, .parquet and hub rows; default: the preset's, else text
    config: str = ""  # the hub dataset's configuration and split; default: the preset's
    split: str = ""
    data_dir: str = "data"
    seed: int = 1337  # of the demo's synthetic documents
    # filters, off by default; what they drop is counted
    min_chars: int = 0
    max_chars: int = 0
    language: str = ""  # keep these, "en" or "en,de" (py3langid)
    max_toxicity: float = 0.0  # drop documents above this probability (alt-profanity-check)
    # e-mail addresses, phone, card and social security numbers, IP addresses become
    # [EMAIL_1] and so on (datafog)
    mask_pii: bool = False
    # drop duplicates within one machine's share. exact: the same text;
    # near: MinHash of every five words in a row, about 0.75 alike (rensa)
    dedup: str = ""
    # several machines
    rank: int = -1  # this machine; default: torchrun's RANK and WORLD_SIZE, else 0 of 1
    world_size: int = 0
    merge: bool = False  # join what the machines have prepared
    commit_seconds: float = 10.0  # a crash loses at most this much work
    # instead of preparing
    list: bool = False  # show the presets
    estimate: bool = False  # measure a few megabytes, then tell tokens, disk and hours
    inspect: str = ""  # a prepared folder: documents, lengths, some text, checksums

    def __post_init__(self):
        self.preset = PRESETS.get(self.dataset, Preset((self.dataset,)))
        if self.rank < 0:
            self.rank = environment("RANK", 0)
        self.world_size = self.world_size or environment("WORLD_SIZE", 1)
        self.tokenizer = self.tokenizer or ("bytes" if self.dataset == "demo" else "gpt2")
        kind, _, path = self.tokenizer.partition(":")
        if kind in ("llama3", "tiktoken"):  # an absolute path holds in any folder
            self.tokenizer = f"{kind}:{os.path.abspath(path)}"
        self.text_column = self.text_column or self.preset.column
        self.config = self.config or self.preset.config
        self.split = self.split or self.preset.split
        self.val_fraction = self.val_fraction or self.preset.val_fraction
        if self.dataset == "demo":
            self.num_tokens = self.num_tokens or int(self.preset.tokens)
        self.name = self.name or default_name(self.dataset)
        check_ranges(self, {
            (0, None): "num_tokens shard_tokens seed min_chars max_chars rank commit_seconds",
            (0, 1): "val_fraction max_toxicity",
            (0, 1024): "num_proc",
            (1, 999): "world_size"})
        if not self.rank < self.world_size:
            raise UserError(f"rank {self.rank} is not below world_size {self.world_size}")
        if self.max_chars and self.max_chars < self.min_chars:
            raise UserError(f"max_chars {self.max_chars} is below min_chars {self.min_chars}: "
                            "nothing would be left")
        if self.dedup not in ("", "exact", "near"):
            raise UserError(f"dedup {self.dedup!r} is not exact or near")
        if self.source and self.dataset not in PRESETS:
            raise UserError(f"source goes with a preset ({', '.join(PRESETS)}); "
                            "for other data give --dataset alone")
        if self.name in (".", "..") or re.search(r"[/\\\0]", self.name):
            raise UserError(f"name {self.name!r} is not the name of a folder under data_dir: "
                            "give it without slashes")

    @property
    def flags(self):
        """
        The settings that decide the output's bytes:
        a pass that is taken up again must have the same.
        """
        rest = ("num_proc", "data_dir", "name", "merge", "commit_seconds",
                "list", "estimate", "inspect")
        return {k: v for k, v in asdict(self).items() if k not in rest}


def default_name(dataset):
    """
    The last part of a dataset's name or path, without endings and stars:
    "x/texts/*.jsonl.zst" -> "texts".
    """
    base = os.path.basename(dataset.rstrip("/"))
    base = re.sub(r"\.(gz|zst)$|\.\w+$|\*", "", base)
    return re.sub(r"[^\w-]+", "-", base).strip("-") or "data"


# --------------------------------------------------------------------------------------------------
# A block of documents to tokens, in a process of its own

class Encoded(NamedTuple):
    ids: np.ndarray  # the documents' tokens, each document with its separator
    lengths: np.ndarray  # tokens per document
    sizes: np.ndarray  # bytes per document
    held_out: np.ndarray  # bool per document
    keys: np.ndarray  # (documents, n) uint64: documents that share one are duplicates
    counts: Counter  # rows read, and what was dropped or mended
    fault: str  # a sentence about a damaged file, or ""


def filter_texts(texts, cfg, counts):
    """Those that pass the filters of cfg, personal data masked."""
    def only(name, keep):
        kept = [t for t, ok in zip(texts, keep) if ok]
        counts[name] += len(texts) - len(kept)
        return kept
    if cfg.min_chars or cfg.max_chars:
        texts = only("length", [cfg.min_chars <= len(t) <= (cfg.max_chars or len(t))
                                for t in texts])
    if cfg.language:
        classify = optional("py3langid").classify
        texts = only("language", [classify(t[:10_000])[0] in cfg.language.split(",")
                                  for t in texts])
    if cfg.max_toxicity and texts:
        predict = optional("profanity_check", "alt-profanity-check").predict_prob
        texts = only("toxicity", predict(texts) <= cfg.max_toxicity)
    if cfg.mask_pii:
        redact = optional("datafog").redact
        kinds = ["EMAIL", "PHONE", "SSN", "CREDIT_CARD", "IP_ADDRESS"]
        masked = [redact(t, engine="regex", entity_types=kinds).redacted_text for t in texts]
        counts["masked"] += sum(a != b for a, b in zip(texts, masked))
        texts = masked
    return texts


def near_keys(text):
    """
    MinHash of the text's words in fives, in 14 bands of 8: (14,) 64-bit keys.
    Two texts that are 0.75 alike share a key with probability 0.77,
    two that are 0.5 alike with 0.05.
    """
    minhash = optional("rensa").RMinHash(num_perm=112, seed=42)
    words = text.lower().split()
    minhash.update([" ".join(words[i:i + 5]) for i in range(max(1, len(words) - 4))])
    bands = np.array(minhash.digest(), dtype=np.uint32).reshape(14, 8)
    return [xxhash.xxh3_64_intdigest(band.tobytes(), seed=i) for i, band in enumerate(bands)]


@functools.lru_cache(1)
def _tokenizer(name):
    return Tokenizer(name)


def mend_surrogates(text):
    """Join surrogate pairs, and put U+FFFD for lone surrogates, which UTF-8 forbids."""
    # All surrogates begin with the byte 0xED.
    if text.isascii() or b"\xed" not in text.encode("utf-8", "surrogatepass"):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode_block(block, cfg):
    """Block -> Encoded. The result for a document does not depend on the others of its block."""
    tokenizer = _tokenizer(cfg.tokenizer)
    counts, texts, fault = Counter(), [], ""
    if block.kind == "fault":
        name, n, fault = block.data
        counts[name] += n
    for text in block_texts(block, cfg.text_column, counts):
        counts["rows"] += 1
        if text is None:
            counts["broken"] += 1
        elif not text or text.isspace():
            counts["empty"] += 1
        else:
            mended = mend_surrogates(text)
            counts["repaired"] += mended != text
            texts.append(mended)
    texts = filter_texts(texts, cfg, counts)
    raws = [t.encode() for t in texts]
    digests = np.array([xxhash.xxh3_64_intdigest(r) for r in raws], dtype=np.uint64)
    keys = np.empty((len(texts), 0), dtype=np.uint64)
    if cfg.dedup == "exact":
        keys = digests[:, None]
    elif cfg.dedup == "near":
        keys = np.array([near_keys(t) for t in texts], dtype=np.uint64).reshape(-1, 14)
    if cfg.tokenizer == "bytes":
        parts = [np.frombuffer(r, np.uint8) for r in raws]
    else:
        parts = [tokenizer.encode(t) for t in texts]
    lengths = np.array([len(p) + 1 for p in parts], dtype=np.int64)
    ids, end = np.empty(lengths.sum(), dtype=tokenizer.dtype), 0
    for part in parts:
        ids[end:end + len(part)] = part
        ids[end + len(part)] = tokenizer.separator
        end += len(part) + 1
    sizes = np.array([len(r) for r in raws], dtype=np.int64)
    held_out = (digests >> np.uint64(11)) < cfg.val_fraction * 2**53
    return Encoded(ids, lengths, sizes, held_out, keys, counts, fault)


def filter_packages(cfg):
    """
    (module, package if it is called otherwise) of every filter of cfg that needs one:
    the slow filters.
    """
    wanted = []
    if cfg.language:
        wanted.append(("py3langid",))
    if cfg.max_toxicity:
        wanted.append(("profanity_check", "alt-profanity-check"))
    if cfg.mask_pii:
        wanted.append(("datafog",))
    if cfg.dedup == "near":
        wanted.append(("rensa",))
    return wanted


def processes(cfg):
    """
    How many encode.
    Bytes without slow filters take one: sending them to another takes longer than encoding.
    """
    if cfg.tokenizer == "bytes" and not filter_packages(cfg):
        return 1
    return cfg.num_proc or os.cpu_count()


def encode_blocks(blocks, cfg):
    """(Block's state, Encoded) in order, by a process pool if there is more than one process."""
    num_proc = processes(cfg)
    if num_proc == 1:
        for block in blocks:
            yield block.state, encode_block(block, cfg)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_proc, mp_context=spawn, initializer=_end_with_parent)
    waiting = deque()  # never more than a few blocks are held
    try:
        for block in blocks:
            waiting.append((block.state,
                            pool.submit(encode_block, block._replace(state=None), cfg)))
            if len(waiting) > 2 * num_proc:
                state, result = waiting.popleft()
                yield state, result.result()
        for state, result in waiting:
            yield state, result.result()
    except BrokenProcessPool:
        raise UserError("a tokenizer process was killed, by lack of memory perhaps: "
                        "the same command goes on from here; "
                        "a smaller --num_proc takes less memory") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent():
    """A worker whose parent was killed would wait for work for ever."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


# --------------------------------------------------------------------------------------------------
# The output folder

def checksum(file, size=None):
    """
    The running xxh3 of the next `size` bytes of an open file, None: of all that is left;
    None where there are fewer.
    """
    digest = xxhash.xxh3_64()
    while size is None or size > 0:
        part = file.read(1 << 24 if size is None else min(size, 1 << 24))
        if not part:
            return digest if size is None else None
        digest.update(part)
        size = size if size is None else size - len(part)
    return digest


class Folder:
    """
    The output folder of a pass: what is in it belongs to the pass.
    meta.json names every file before it is made, so a pass that was killed knows its files again,
    and a file that is not named there is not touched.
    """

    def __init__(self, path):
        self.path = path
        self.meta = read_meta(path)  # as last written; None: there is none yet
        self.made = list(self.meta.get("made", [])) if self.meta else []
        if self.meta is None and os.path.exists(path):
            if not os.path.isdir(path):
                raise UserError(f"{path} is a file, not a folder: choose another --name")
            foreign = sorted(set(os.listdir(path)) - {"meta.json.partial"})
            if foreign:
                raise UserError(f"{path} holds files that are not prepare.py's ({foreign[0]}): "
                                "choose another --name")

    def write(self, meta):
        """Replace meta.json, on the disk: it is always a whole one."""
        self.meta = meta
        with replacing(os.path.join(self.path, "meta.json")) as f:
            f.write(to_json(meta if meta["complete"] else {**meta, "made": self.made}, indent=1))

    def create(self, name):
        """A new empty file, open for writing bytes."""
        path = os.path.join(self.path, name)
        if name not in self.made:
            if os.path.lexists(path):
                raise UserError(f"{path} is in the way and not prepare.py's: move it away")
            self.made.append(name)
            self.write(self.meta)
        return open(path, "wb")

    def forget(self, keep):
        """Remove the files that the pass has made but does not keep."""
        for name in [n for n in self.made if n not in keep]:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self.path, name))
            self.made.remove(name)

    def remove(self):
        """Take back all that the pass has made."""
        self.forget(keep=())
        for name in ("meta.json", "meta.json.partial"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self.path, name))

    def reopen(self, name, size, xxh3):
        """
        Open a file of an earlier run behind its first `size` bytes and cut off the rest.
        Returns the file and the running checksum of those bytes;
        refuses other bytes than were written then.
        """
        path = os.path.join(self.path, name)
        try:
            file = open(path, "r+b")
        except FileNotFoundError:
            raise self._damaged(name, "is missing") from None
        digest = checksum(file, size)
        if digest is None or digest.hexdigest() != xxh3:
            file.close()
            raise self._damaged(name, "is no longer what was written")
        file.truncate(size)
        file.seek(size)
        return file, digest

    def check_size(self, name, size):
        """Refuse a finished file whose size is another."""
        path = os.path.join(self.path, name)
        if not os.path.exists(path) or os.path.getsize(path) != size:
            raise self._damaged(name, f"is missing or has not {size:,} bytes")

    def _damaged(self, name, what):
        return UserError(f"{os.path.join(self.path, name)} {what}: bring a copy back, "
                         f"or move {self.path} away and start anew")


class Writer:
    """
    The growing .bin files of one split.
    saved: what commit() returned when the last pass stopped.
    """

    def __init__(self, folder, split, dtype, shard_tokens, saved):
        self.folder = folder
        self.split = split
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self.totals = {k: saved[k] for k in ("documents", "tokens", "bytes")}
        self.files = [dict(f) for f in saved["files"]]
        self.f = None
        for f in self.files[:-1]:
            folder.check_size(f["name"], f["tokens"] * dtype.itemsize)
        if self.files:
            last = self.files[-1]
            self.f, self.hash = folder.reopen(last["name"], last["tokens"] * dtype.itemsize,
                                              last["xxh3"])

    def next_file(self):
        if self.f:
            self.files[-1]["xxh3"] = self.hash.hexdigest()
            self.commit()
            self.f.close()
        name = (f"{self.split}_{len(self.files):03d}.bin" if self.shard_tokens
                else f"{self.split}.bin")
        self.f = self.folder.create(name)
        self.hash = xxhash.xxh3_64()
        self.files.append(dict(name=name, tokens=0, xxh3=self.hash.hexdigest()))

    def write(self, ids):
        while len(ids):
            room = self.shard_tokens - self.files[-1]["tokens"] if self.shard_tokens else len(ids)
            if room <= 0:
                self.next_file()
                continue
            part = ids[:room]
            self.f.write(part.data)
            self.hash.update(part.data)
            self.files[-1]["tokens"] += len(part)
            ids = ids[room:]
        self.files[-1]["xxh3"] = self.hash.hexdigest()

    def add(self, ids, sizes):
        """Append whole documents: their ids and the bytes of each."""
        self.write(ids)
        self.totals["documents"] += len(sizes)
        self.totals["tokens"] += len(ids)
        self.totals["bytes"] += int(sizes.sum())

    def take_last(self, separator, token_lengths):
        """
        Take the last document out of the split. Returns its ids and its size in bytes.
        The files are shortened by cut_off(), once meta.json says so:
        a crash between the two loses nothing.
        """
        self.f.flush()
        parts = [np.fromfile(os.path.join(self.folder.path, f["name"]), self.dtype)
                 for f in self.files]
        ids = Shards(parts)
        ends = np.flatnonzero(ids[:len(ids) - 1] == separator)
        begin = int(ends[-1]) + 1 if len(ends) else 0
        document = np.array(ids[begin:])
        size = int(token_lengths[document].sum())
        left = begin  # tokens that stay
        for file, part in zip(list(self.files), parts):
            file["tokens"] = min(len(part), left)
            left -= file["tokens"]
            file["xxh3"] = xxhash.xxh3_64_hexdigest(part[:file["tokens"]].tobytes())
            if not file["tokens"] and len(self.files) > 1:
                self.files.remove(file)
        self.totals["documents"] -= 1
        self.totals["tokens"] -= len(document)
        self.totals["bytes"] -= size
        return document, size

    def cut_off(self):
        """Cut the last file to what meta.json says of it."""
        last = self.files[-1]
        self.f.close()
        self.f, self.hash = self.folder.reopen(last["name"], last["tokens"] * self.dtype.itemsize,
                                               last["xxh3"])

    def commit(self):
        """Put everything on the disk. Returns what the files are then."""
        self.f.flush()
        os.fsync(self.f.fileno())
        return {**self.totals, "files": [dict(f) for f in self.files]}

    def close(self):
        if self.f:
            with contextlib.suppress(OSError):  # a full disk, reported already
                self.f.close()


class Seen:
    """
    The keys of the documents kept so far,
    in memory and, for a pass that is taken up again, in seen.bin.
    """

    def __init__(self, folder, saved):
        self.folder, self.keys, self.new = folder, set(), []
        self.f = None
        self.committed = saved["keys"]
        if self.committed:
            self.f, self.hash = folder.reopen("seen.bin", 8 * self.committed, saved["xxh3"])
            self.f.seek(0)
            self.keys = set(np.frombuffer(self.f.read(), dtype=np.uint64).tolist())

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
        if self.new and self.f is None:
            self.f = self.folder.create("seen.bin")
            self.hash = xxhash.xxh3_64()
        if self.new:
            raw = np.array(self.new, dtype=np.uint64).tobytes()
            self.f.write(raw)
            self.hash.update(raw)
            self.f.flush()
            os.fsync(self.f.fileno())
            self.committed += len(self.new)
            self.new = []
        return {"keys": self.committed, "xxh3": self.hash.hexdigest() if self.committed else ""}

    def close(self):
        if self.f:
            with contextlib.suppress(OSError):
                self.f.close()


# --------------------------------------------------------------------------------------------------
# The pass

def rank_folder(cfg, rank):
    """data/<name>, or one rank's part of it."""
    folder = os.path.join(cfg.data_dir, cfg.name)
    if cfg.world_size == 1:
        return folder
    return os.path.join(folder, f"rank_{rank:03d}_of_{cfg.world_size:03d}")


def check_parts_only(folder):
    """Where several machines write into one folder, nothing else may be in it."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    foreign = [n for n in sorted(names)
               if not re.fullmatch(r"rank_\d{3}_of_\d{3}|meta\.json(\.partial)?", n)]
    if foreign:
        raise UserError(f"{folder} holds files that are not prepare.py's ({foreign[0]}): "
                        "choose another --name")
    meta = read_meta(folder)  # refuses a meta.json that is not prepare.py's
    if meta and not meta["complete"]:
        raise UserError(f"{folder} holds a pass of one machine that is not complete: "
                        "choose another --name")


def prepare(cfg):
    """
    Write this machine's data/<name>/, going on where an earlier pass stopped.
    Returns its meta dict.
    """
    path = rank_folder(cfg, cfg.rank)
    if cfg.world_size > 1:
        check_parts_only(os.path.dirname(path))
    saved = Folder(path).meta
    known = saved["source"] if saved and cfg.dataset in PRESETS and not cfg.source else None
    source = open_source(cfg, known)
    files = file_list(source.files)
    tokenizer = Tokenizer(cfg.tokenizer)
    meta = dict(dataset=cfg.dataset, source=source.name,
                source_files=xxhash.xxh3_64_hexdigest(os.fsencode(files)),
                tokenizer=tokenizer.name, vocabulary=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size, separator=tokenizer.separator,
                dtype=tokenizer.dtype.name, flags=cfg.flags)
    if saved:
        check_same_pass(path, saved, meta, files)
    if saved and saved["complete"]:
        say(f"{path} is complete: {describe(saved)}")
        return saved
    for package in filter_packages(cfg):
        optional(*package)  # a missing package is reported now, not by a worker
    with only_one(path, "prepare.py"):
        folder = Folder(path)
        if folder.meta != saved:
            raise UserError(f"another prepare.py has just been at work on {path}: "
                            "run the command again")
        try:
            begin(folder, meta, files)
            finished = Pass(cfg, folder, source, tokenizer, meta).run()
        except UserError:
            if sum(folder.meta[split]["documents"] for split in ("train", "val")) < 2:
                folder.remove()  # a pass without two documents is nothing to go on from
            raise
        except OSError as e:
            raise UserError(f"{path}: {e.strerror or e}; the same command goes on from here "
                            "once that is mended") from None
    say(f"{path}: {describe(finished)}")
    return finished


def begin(folder, meta, files):
    """
    Write the first meta.json, unless there is one,
    and the list of input files, by which changes are named later.
    """
    nothing = {"documents": 0, "tokens": 0, "bytes": 0, "files": []}
    if folder.meta is None:
        folder.made.append(SOURCE_FILES)
        folder.write({**meta, "complete": False, "train": nothing, "val": nothing, "counts": {},
                      "seen": {"keys": 0, "xxh3": ""}, "state": None})
    if files != read_file_list(folder.path):
        with replacing(os.path.join(folder.path, SOURCE_FILES), binary=True) as f:
            f.write(files.encode("utf-8", "surrogateescape"))


def differing(old, new):
    """
    In words, the settings, source or vocabulary in which the passes of two meta dicts differ;
    "" if they agree.
    """
    sides = []
    for meta in (old, new):
        side = {**meta["flags"], "source": meta["source"], "rank": 0}
        if old.get("vocabulary") == new.get("vocabulary"):
            side.pop("tokenizer", None)  # the same vocabulary, perhaps at another path
        elif old["tokenizer"] == new["tokenizer"]:
            side["vocabulary"] = meta.get("vocabulary")
        sides.append(side)
    return differences(*sides)


def check_same_pass(path, saved, meta, files):
    """Refuse to go on with other settings, vocabulary or input files than the pass began with."""
    if "vocabulary" not in saved:
        raise UserError(f"{path} holds data of another version: "
                        "choose another --name, or move it away")
    changed = differing(saved, meta)
    if saved.get("source_files") != meta["source_files"]:
        changed = changed_file(read_file_list(path), files) or changed or "its input files"
    if changed:
        raise UserError(f"{path} was begun with other settings or data ({changed}): "
                        "choose another --name, or move it away")


def read_file_list(path):
    """The input files that a pass began with, as sources.file_list gave them."""
    try:
        with open(os.path.join(path, SOURCE_FILES), "rb") as f:
            return f.read().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return ""


class Pass:
    """
    One run over a source, in a folder that is known to be its own.
    run() returns the finished meta dict.
    """

    def __init__(self, cfg, folder, source, tokenizer, meta):
        self.cfg = cfg
        self.folder = folder
        self.source = source
        self.tokenizer = tokenizer
        self.meta = meta
        saved = folder.meta
        files = {f["name"] for split in ("train", "val") for f in saved[split]["files"]}
        kept = files | {SOURCE_FILES} | ({"seen.bin"} if saved["seen"]["keys"] else set())
        folder.forget(kept)  # removes what was made after the last commit
        self.state = saved["state"]
        self.counts = Counter(saved["counts"])
        self.faults = []  # sentences about damaged files
        self.seen = Seen(folder, saved["seen"])
        self.writers = {}
        for split in ("train", "val"):
            self.writers[split] = Writer(folder, split, tokenizer.dtype, cfg.shard_tokens,
                                         saved[split])

    def run(self):
        try:
            for writer in self.writers.values():
                if not writer.files:
                    writer.next_file()
            self.read_source()
            self.fill_empty_split()
            self.commit()
        finally:
            self.close()
        splits = {split: self.folder.meta[split] for split in ("train", "val")}
        files = {f["name"] for split in splits.values() for f in split["files"]}
        # seen.bin goes: meta.json must say so first, or a kill in between could not be resumed
        self.folder.write({**self.folder.meta, "seen": {"keys": 0, "xxh3": ""}})
        self.folder.forget(files | {SOURCE_FILES})
        counts = {name: n for name, n in self.counts.items() if n and name != "rows"}
        self.folder.write({**self.meta, "complete": True, **splits,
                           "counts": counts, "state": None})
        return self.folder.meta

    def close(self):
        for file in (*self.writers.values(), self.seen):
            file.close()

    def commit(self):
        """Put everything on the disk: a pass that is killed goes on from here."""
        splits = {split: writer.commit() for split, writer in self.writers.items()}
        self.folder.write({**self.meta, "complete": False, **splits, "counts": self.counts,
                           "seen": self.seen.commit(), "state": self.state})

    def read_source(self):
        """Encode and write from the saved state on, to the source's end or the limit of tokens."""
        from tqdm import tqdm
        cfg, limit = self.cfg, float("inf")
        if cfg.num_tokens:
            limit = max(1, cfg.num_tokens // cfg.world_size)
        first = total = sum(w.totals["tokens"] for w in self.writers.values())
        began = last_commit = time.time()
        bar = tqdm(total=limit if cfg.num_tokens else None, initial=total, unit="tok",
                   unit_scale=True, desc=cfg.name, mininterval=1)
        results = encode_blocks(self.source.blocks(self.state), cfg)
        with bar, contextlib.closing(results):
            for self.state, e in results if total < limit else ():
                self.counts += e.counts
                if e.fault:
                    warn(e.fault)
                    self.faults.append(e.fault)
                if not total and self.counts["no column"] and not len(e.lengths):
                    raise UserError(f"no column {cfg.text_column!r} in the data: set --text_column")
                where = destinations(e, self.seen if cfg.dedup else None, self.counts,
                                     limit - total)
                n = write_documents(e, where, self.writers)
                total += n
                bar.update(n)
                if total >= limit:
                    break
                if time.time() - last_commit >= cfg.commit_seconds:
                    self.commit()
                    last_commit = time.time()
        say(f"{(total - first) / max(1e-9, time.time() - began):,.0f} tokens/s")

    def fill_empty_split(self):
        """
        Make sure that both splits hold a document. Of few documents the hash may send none to val
        (or to train): then the last document of the other split goes there.
        Raises UserError if there are fewer than two.
        """
        held = {split: writer.totals["documents"] for split, writer in self.writers.items()}
        if not sum(held.values()):
            raise UserError(self.nothing_left())
        if self.cfg.val_fraction == 1 or min(held.values()):
            return
        if sum(held.values()) == 1:
            raise UserError(f"{self.source.name} holds one document, "
                            "and train and val need one each: cut it in two, "
                            "or give --val_fraction 1 for an evaluation corpus")
        empty, other = ("val", "train") if not held["val"] else ("train", "val")
        warn(f"no document fell into {empty} by its hash: the last one of {other} goes there")
        ids, size = self.writers[other].take_last(self.tokenizer.separator,
                                                  self.tokenizer.token_lengths)
        self.writers[empty].add(ids, np.array([size]))
        self.commit()
        self.writers[other].cut_off()

    def nothing_left(self):
        """
        Why the pass ends without a document, in one line:
        what was read, what was dropped, and a likely cause.
        """
        counts, column = self.counts, self.cfg.text_column
        known = ("broken", "empty", "length", "language", "toxicity", "duplicate")
        dropped = "".join(f", {counts[name]:,} {name}" for name in known if counts[name])
        lines = bool(self.source.files) and kind_of(self.source.files[0])[0] == "json"
        if self.faults:
            cause = self.faults[0]
        elif not counts["rows"] and self.cfg.world_size > 1:
            cause = (f"the share of rank {self.cfg.rank} is empty: "
                     "a smaller --world_size leaves some for each")
        elif not counts["rows"]:
            cause = "the data is empty"
        elif counts["no column"]:
            cause = f"rows have no column {column!r}: set --text_column"
        elif counts["broken"] and lines:
            cause = f"not one row is a JSON object whose {column!r} is a text"
        elif counts["broken"]:
            cause = f"the column {column!r} holds no text"
        else:
            cause = "the rows are blank, or the filters drop them"
        return (f"no document is left of {self.source.name}: "
                f"{counts['rows']:,} rows read{dropped}; {cause}")


TRAIN, VAL, DROPPED = 0, 1, 2


def destinations(e, seen, counts, room):
    """
    TRAIN, VAL or DROPPED for every document of an Encoded block.
    room: how many tokens may still be written.
    """
    where = np.where(e.held_out, VAL, TRAIN)
    if seen:
        first = seen.first(e.keys)
        counts["duplicate"] += int((~first).sum())
        where[~first] = DROPPED
    written = np.cumsum(e.lengths * (where != DROPPED))
    # Keep the document that reaches the limit, drop those after it.
    if len(written) and written[-1] >= room:
        where[np.searchsorted(written, room) + 1:] = DROPPED
    return where


def write_documents(e, where, writers):
    """
    Append the documents of a block to their splits, in whole runs.
    Returns the number of tokens written.
    """
    ends = np.cumsum(e.lengths)
    turns = np.flatnonzero(np.diff(where)) + 1  # where another split begins
    total = 0
    for a, b in zip(np.append(0, turns), np.append(turns, len(where))):
        if a < b and where[a] != DROPPED:
            ids = e.ids[ends[a] - e.lengths[a]:ends[b - 1]]
            writers["val" if where[a] == VAL else "train"].add(ids, e.sizes[a:b])
            total += len(ids)
    return total


def describe(meta):
    """One line about a meta dict."""
    splits = [f"{s} {meta[s]['documents']:,} documents {meta[s]['tokens']:,} tokens"
              for s in ("train", "val")]
    return ", ".join(splits + [f"{n:,} {what}" for what, n in sorted(meta["counts"].items()) if n])


def merge(cfg):
    """data/<name>/meta.json over the folders of all ranks, whose files stay where they are."""
    folder = os.path.join(cfg.data_dir, cfg.name)
    check_parts_only(folder)
    metas, lists = [], []
    for rank in range(cfg.world_size):
        part = rank_folder(cfg, rank)
        meta = read_meta(part)
        if not meta or not meta["complete"]:
            raise UserError(f"{part} is not complete: run prepare.py --rank={rank} "
                            f"--world_size={cfg.world_size} there first")
        metas.append(meta)
        lists.append(read_file_list(part))
        changed = differing(metas[0], meta) or changed_file(lists[0], lists[-1], columns=2)
        if changed:
            raise UserError(f"{part} was prepared with other settings or data than rank 0 "
                            f"({changed})")
    out = {**metas[0], "counts": dict(sum((Counter(m["counts"]) for m in metas), Counter()))}
    for split in ("train", "val"):
        out[split] = {k: sum(m[split][k] for m in metas) for k in ("documents", "tokens", "bytes")}
        out[split]["files"] = []
        for rank, meta in enumerate(metas):
            part = os.path.basename(rank_folder(cfg, rank))
            out[split]["files"] += [{**f, "name": f"{part}/{f['name']}"}
                                    for f in meta[split]["files"]]
    with replacing(os.path.join(folder, "meta.json")) as f:
        f.write(to_json(out, indent=1))
    say(f"{folder}: {describe(out)}")
    return out


# --------------------------------------------------------------------------------------------------
# Looking before and after

def inspect(folder):
    """Print what a prepared folder holds, and check its files against their checksums."""
    data = Data(folder)
    meta = data.meta
    say(f"{folder}: {meta['dataset']} from {meta['source']}, "
        f"{meta['tokenizer']} tokens ({meta['dtype']}); {describe(meta)}")
    for split, ids in (("train", data.train), ("val", data.val)):
        lengths, rest = [], 0
        for a in range(0, len(ids), 1 << 24):
            ends = np.flatnonzero(ids[a:a + (1 << 24)] == data.separator) + a + 1
            lengths.append(np.diff(ends, prepend=rest))
            rest = ends[-1] if len(ends) else rest
        lengths = np.concatenate(lengths) if lengths else np.empty(0, int)
        if len(lengths) != meta[split]["documents"] or rest != len(ids):
            raise UserError(f"{folder}: {split} holds {len(lengths)} whole documents, "
                            f"meta.json says {meta[split]['documents']}")
        if not len(ids):
            continue
        say(f"\n{split}: {meta[split]['bytes'] / len(ids):.2f} bytes/token; tokens per document, "
            f"median {np.median(lengths):,.0f}")
        counts = np.bincount(np.log2(lengths).astype(int))
        for power in np.flatnonzero(counts):
            bar = "█" * round(50 * counts[power] / counts.max())
            say(f"  {1 << power:>9,} – {(2 << power) - 1:>9,} {counts[power]:>10,} {bar}")
        for a in np.linspace(0, max(0, len(ids) - 60), 3).astype(int):
            say(f"  at {a:,}: {data.tokenizer.decode(ids[a:a + 60])!r}")
    files = meta["train"]["files"] + meta["val"]["files"]
    for f in files:
        with open(os.path.join(folder, f["name"]), "rb") as file:
            digest = checksum(file).hexdigest()
        if digest != f["xxh3"]:
            raise UserError(f"{folder}/{f['name']} is damaged: its checksum is {digest}, "
                            f"meta.json says {f['xxh3']}")
    say(f"\nchecksums of {len(files)} files are right")


def show_presets():
    say(f"{'--dataset':14}{'tokens':>9}{'uint16':>9}{'uint32':>9}  from")
    for name, p in PRESETS.items():
        where = ": " + " or ".join(p.sources) if p.sources else ""
        say(f"{name:14}{p.tokens:9.2g}{_size(2 * p.tokens):>9}{_size(4 * p.tokens):>9}  "
            f"{p.note}{where} {p.config}".rstrip())


def _size(n):
    """Bytes as a short text: 2.5e12 -> "2.5 TB"."""
    for i, unit in ((4, "T"), (3, "G"), (2, "M"), (1, "k")):
        if n >= 1000**i:
            return f"{n / 1000**i:.3g} {unit}B"
    return f"{n:.3g} B"


def decompressed(paths, column):
    """About how many bytes of lines, text or (parquet) of the text column the files hold."""
    kind, packing = kind_of(paths[0])
    if kind == "parquet":
        import pyarrow.parquet
        size = 0
        for path in paths:
            try:
                metadata = pyarrow.parquet.ParquetFile(path).metadata
            except Exception:  # no parquet file: the pass will say so
                continue
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                columns = map(group.column, range(group.num_columns))
                size += sum(c.total_uncompressed_size for c in columns
                            if c.path_in_schema == column)
        return size
    size = sum(map(os.path.getsize, paths))
    if not packing:
        return size
    file, unpacked = TextFile(paths[0]), 0
    for piece in file.chunks():  # measures the ratio at the front of the first file
        unpacked += len(piece)
        if unpacked >= 1 << 25:
            break
    return size * unpacked / max(1, file.packed_bytes)


def estimate(cfg, sample=8 << 20, seconds=20):
    """
    Measure the front of the data in this process, write nothing.
    Returns and prints tokens, disk bytes and hours.
    """
    source = open_source(cfg)
    tokenizer, num_proc = Tokenizer(cfg.tokenizer), processes(cfg)
    source_bytes = text_bytes = tokens = 0
    began = time.time()
    for block in source.blocks(None):
        e = encode_block(block, cfg)
        tokens += len(e.ids)
        text_bytes += int(e.sizes.sum())
        if block.kind == "lines":
            source_bytes += len(block.data)
        elif block.kind == "raw":
            source_bytes += sum(map(len, block.data))
        else:
            source_bytes += int(e.sizes.sum())
        if source_bytes >= sample or time.time() - began > seconds:
            break
    rate = tokens / (time.time() - began)
    if not tokens:
        raise UserError("the front of the data holds no text to measure")
    total = (decompressed(source.files, cfg.text_column) * tokens / source_bytes if source.files
             else cfg.preset.tokens)
    total = min(cfg.num_tokens or total, total or cfg.num_tokens)
    say(f"{source.name}: measured on its first {_size(text_bytes)} of text, "
        f"{text_bytes / tokens:.2f} bytes/token, {rate:,.0f} tokens/s per process")
    if not total:
        say("its size is not known: give --num_tokens")
        return None
    hours = total / rate / num_proc / cfg.world_size / 3600
    out = dict(tokens=int(total), disk_bytes=int(total) * tokenizer.dtype.itemsize, hours=hours)
    say(f"tokens  {total:.3g}\ndisk    {_size(out['disk_bytes'])} as {tokenizer.dtype}\n"
        f"time    {hours:.2g} hours by {cfg.world_size} × {num_proc} processes, "
        "if reading keeps up")
    from train import GSA, PEAK_FLOPS, settings
    import torch
    here = os.path.dirname(os.path.abspath(__file__))
    for config in ("gsa_small", "gsa_1b7"):
        train_cfg = settings([os.path.join(here, "config", config + ".py")])
        with torch.device("meta"):
            flops = GSA(train_cfg.model_config(tokenizer.vocab_size)).flops_per_token()
        gpu_hours = total * flops / (0.4 * PEAK_FLOPS["H100"]) / 3600
        say(f"then    {gpu_hours:,.3g} H100-hours to train config/{config}.py on it once, "
            "if 40 % of the peak were reached (an assumption)")
    return out


def main(argv):
    cfg = PrepareConfig(**parse(PrepareConfig, argv))
    if cfg.inspect:
        inspect(cfg.inspect)
    elif cfg.list:
        show_presets()
    elif cfg.estimate:
        estimate(cfg)
    elif cfg.merge:
        merge(cfg)
    else:
        prepare(cfg)


if __name__ == "__main__":
    run(main)
