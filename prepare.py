"""
Text to tokens in one streaming pass: documents -> tokenizer -> data/<name>/train.bin, val.bin and meta.json.

    python prepare.py                                            # SlimPajama from the Hugging Face hub
    python prepare.py --dataset demo                             # no network: the standard library's source + pass-keys
    python prepare.py --dataset 'texts/*.jsonl' --tokenizer bytes
    python prepare.py --dataset HuggingFaceFW/fineweb --config sample-10BT --num_tokens 10e9

The .bin files are flat arrays of token ids (uint16, or uint32 for a vocabulary above 65536), the separator's id after
every document. A document goes to val.bin by a hash of its text, never by its position. meta.json says the rest.
This file also owns what others need to read such data: Tokenizer, Data, and the pass-key lines that eval.py asks for.
"""
import functools
import glob
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import string
import sysconfig
import time
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np
import tiktoken

from configurator import UserError, parse, run

HUB = {"slimpajama": ("cerebras/SlimPajama-627B", "gmongaras/SlimPajama-627B_Reupload")}  # tried in order
BLOCK = 1 << 20  # characters of documents that a worker tokenizes at a time


@dataclass
class PrepareConfig:
    dataset: str = "slimpajama"  # demo | slimpajama | a hub id | a local .txt, .jsonl or .parquet path or glob
    name: str = ""  # output folder under data/; default: the dataset's short name
    tokenizer: str = ""  # bytes | gpt2 | any tiktoken encoding; default: bytes for demo, else gpt2
    num_tokens: int = 0  # stop after this many; 0 = all (demo: 6 million)
    num_proc: int = 0  # tokenizer processes; 0 = one per core
    val_fraction: float = 0.0  # share of documents held out; 0 = 0.005 (demo: 0.04)
    text_column: str = "text"  # of .jsonl, .parquet and hub rows
    config: str = ""  # the hub dataset's configuration
    split: str = "train"  # the hub dataset's split
    data_dir: str = "data"
    seed: int = 1337  # of the demo's synthetic documents


# ----------------------------------------------------------------------------------------------------------------
# Tokenizers

class Tokenizer:
    """
    A tiktoken encoding plus a separator id. "bytes" is made here and needs no network: id = byte, separator 256.
    Text that spells a special token is ordinary text.
    """

    def __init__(self, name):
        self.name = name
        if name == "bytes":
            ranks = {bytes([i]): i for i in range(256)}
            self.enc = tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
        else:
            try:
                self.enc = tiktoken.get_encoding(name)
            except ValueError:
                names = ["bytes"] + tiktoken.list_encoding_names()
                raise UserError(f"tokenizer {name!r} is not one of {', '.join(names)}") from None
            except OSError:  # requests' ConnectionError is one
                raise UserError(f"tokenizer {name!r} must be downloaded once and cannot be: use --tokenizer bytes, or set "
                                "TIKTOKEN_CACHE_DIR to a folder filled on a machine with network") from None
        self.separator = self.enc.eot_token
        self.vocab_size = self.enc.n_vocab
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text):
        """str (no lone surrogates) -> 1-D numpy array of ids."""
        if self.name == "bytes":
            return np.frombuffer(text.encode(), dtype=np.uint8)
        pieces = _cut_blanks(text)
        return np.concatenate([self.enc.encode_to_numpy(p, disallowed_special=()) for p in pieces])

    def decode(self, ids):
        """Ids -> str. Ids outside the vocabulary (padding rows) are dropped, broken UTF-8 becomes U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids).decode(errors="replace")

    def token_bytes(self, i):
        """The bytes of one id; none for the separator and for ids outside the vocabulary."""
        try:
            return b"" if i == self.separator else self.enc.decode_single_token_bytes(int(i))
        except KeyError:
            return b""

    @functools.cached_property
    def token_lengths(self):
        """Bytes of every id, (vocab_size,): token_lengths[ids].sum() is the text's size."""
        return np.array([len(self.token_bytes(i)) for i in range(self.vocab_size)])


def _cut_blanks(text, longest=10_000):
    """tiktoken's regex panics on a million blanks in a row: cut such runs. Concatenated pieces give the text."""
    cuts = [m.start() + longest for m in re.finditer(r"\s{%d}(?=\s)" % longest, text)]
    return [text[a:b] for a, b in zip([0] + cuts, cuts + [len(text)])]


# ----------------------------------------------------------------------------------------------------------------
# Pass-key lines: what the demo learns retrieval from and eval.py tests it with

def passkey_line(name, key):
    """A fact to remember and, cut after the "=", the question for it."""
    return f"{name}={key}\n"


def random_passkey(rng):
    """(name, key) from a random.Random: two capital letters, four of a-z and 0-9."""
    return "".join(rng.choices(string.ascii_uppercase, k=2)), "".join(rng.choices(string.ascii_lowercase + string.digits, k=4))


def passkey_document(rng, filler):
    """
    A synthetic document: 1 to 4 facts, told one after the other between many questions. A question is the fact once more,
    predictable from its "=" on. Lines are kept at irregular distances, or a model would learn those in place of looking up:
    in most documents by a few dots, and most of these are short, so that looking up is learnt from them; in the others by
    stretches of `filler` (at least 450 characters), from which it learns to reach far.
    """
    stretch = rng.choice(12 * (0,) + (100, 450, 450))
    length = rng.randint(300, 700) if stretch else 40 * 8 ** rng.random()
    facts = dict(random_passkey(rng) for _ in range(rng.choice((1, 2, 3, 4))))
    untold, told, text = list(facts), [], ""
    while len(text) < length:
        if untold and (not told or rng.random() < 0.4):
            told.append(untold.pop())
            name = told[-1]
        else:
            name = rng.choice(told)
        if not stretch:
            text += rng.randint(0, 6) * "." + "\n"
        elif rng.random() < 0.3:
            at = rng.randint(0, len(filler) - stretch)
            text += filler[at:at + rng.randint(stretch // 2, stretch)] + "\n"
        text += passkey_line(name, facts[name])
    return text


# ----------------------------------------------------------------------------------------------------------------
# Documents

def demo_documents(seed):
    """The source of the installed standard library, each file followed by about three times as much pass-key text."""
    root = sysconfig.get_path("stdlib")
    paths = sorted(glob.glob(root + "/**/*.py", recursive=True))
    paths = [p for p in paths if not re.search(r"site-packages|dist-packages|/test|/idlelib|/lib2to3", p[len(root):])]
    rng = random.Random(seed)
    rng.shuffle(paths)
    for path in paths:
        text = open(path, encoding="utf-8", errors="replace").read()
        yield text
        filler = text.ljust(450)
        for _ in range(len(text) // 70 + 1):
            yield passkey_document(rng, filler)


def text_documents(paths, longest=1 << 16):
    """Plain text files. A document is a file, or of a larger file a stretch of about `longest` characters up to a blank line."""
    for path in paths:
        with open(path, encoding="utf-8", errors="replace") as f:
            lines, size = [], 0
            for line in f:
                lines.append(line)
                size += len(line)
                if size >= longest and not line.strip():
                    yield "".join(lines)
                    lines, size = [], 0
            yield "".join(lines)


def json_rows(paths):
    """One row per line; None for a line that is not a JSON object. (datasets gives up a whole file for one such line.)"""
    for path in paths:
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in filter(str.strip, f):
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                yield row if isinstance(row, dict) else None


def table_documents(rows, column):
    """The text column of rows (dicts, or None for a broken one): a document each, None where there is no text."""
    for row in rows:
        if row is not None and column not in row:
            raise UserError(f"no column {column!r} in the data, only {', '.join(row)}: set --text_column")
        yield row[column] if row and isinstance(row[column], str) else None


def documents(cfg):
    """The configured dataset as an iterator of str, None where a row is broken."""
    if cfg.dataset == "demo":
        return demo_documents(cfg.seed)
    paths = sorted(glob.glob(cfg.dataset, recursive=True))
    kind = cfg.dataset.rsplit(".", 1)[-1]
    if kind in ("txt", "jsonl", "parquet"):
        if not paths:
            raise UserError(f"no file matches {cfg.dataset}")
        if kind == "txt":
            return text_documents(paths)
        if kind == "jsonl":
            return table_documents(json_rows(paths), cfg.text_column)
    elif paths:
        raise UserError(f"{cfg.dataset}: local data must be .txt, .jsonl or .parquet")
    from datasets import load_dataset  # slow to import, and not needed above
    if paths:
        return table_documents(load_dataset("parquet", data_files=paths, split="train", streaming=True), cfg.text_column)
    errors = []
    for hub_id in HUB.get(cfg.dataset, (cfg.dataset,)):
        try:
            return table_documents(load_dataset(hub_id, cfg.config or None, split=cfg.split, streaming=True), cfg.text_column)
        except Exception as e:  # datasets raises a dozen types for "not there" and "no network"
            errors.append(f"{hub_id}: {(str(e) or type(e).__name__).splitlines()[0]}")
    raise UserError(f"cannot load {'; '.join(errors)}. Without network: --dataset demo, or a local .txt, .jsonl or .parquet")


# ----------------------------------------------------------------------------------------------------------------
# The pass

def _blocks(docs):
    block, size = [], 0
    for text in docs:
        block.append(text)
        size += len(text or "")
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


@functools.lru_cache(1)
def _tokenizer(name):
    return Tokenizer(name)


def encode_block(job):
    """(texts, tokenizer name, val_fraction) -> [(is_val, ids with separator, bytes)] and a Counter of what was mended."""
    texts, name, val_fraction = job
    tokenizer, out, counts = _tokenizer(name), [], Counter()
    for text in texts:
        if not text or text.isspace():
            counts["broken" if text is None else "empty"] += 1
            continue
        raw = text.encode("utf-8", "surrogatepass")
        if b"\xed" in raw:  # perhaps a lone surrogate, which UTF-8 forbids
            fixed = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            counts["repaired"] += fixed != text
            text, raw = fixed, fixed.encode()
        elif "\ufffd" in text:  # invalid UTF-8 that the reader replaced
            counts["repaired"] += 1
        digest = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
        ids = np.append(tokenizer.encode(text), tokenizer.separator).astype(tokenizer.dtype)
        out.append((digest < val_fraction * 2**64, ids, len(raw)))
    return out, counts


def _ordered_map(fn, jobs, num_proc):
    """map() over a process pool, in order, never holding more than a few jobs; in this process if num_proc is 1."""
    if num_proc == 1:
        yield from map(fn, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(num_proc) as pool:
        waiting = deque()
        for job in jobs:
            waiting.append(pool.apply_async(fn, (job,)))
            if len(waiting) > 2 * num_proc:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()


def prepare(cfg):
    """Write data/<name>/ and return its meta dict. Nothing of an earlier data/<name> is touched until all is written."""
    from tqdm import tqdm
    val_fraction = cfg.val_fraction or (0.04 if cfg.dataset == "demo" else 0.005)
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction {cfg.val_fraction} is not between 0 and 1")
    docs = documents(cfg)
    tokenizer = Tokenizer(cfg.tokenizer or ("bytes" if cfg.dataset == "demo" else "gpt2"))
    limit = cfg.num_tokens or (6_000_000 if cfg.dataset == "demo" else float("inf"))
    name = cfg.name or re.sub(r"\W+", "-", os.path.splitext(os.path.basename(cfg.dataset))[0]).strip("-") or "data"
    final, partial = os.path.join(cfg.data_dir, name), os.path.join(cfg.data_dir, f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    counts, start = Counter(), time.time()
    splits = {s: dict(documents=0, tokens=0, bytes=0) for s in ("train", "val")}
    try:
        files = {s: open(os.path.join(partial, s + ".bin"), "wb") for s in splits}
        jobs = ((block, tokenizer.name, val_fraction) for block in _blocks(docs))
        bar = tqdm(total=cfg.num_tokens or None, unit="tok", unit_scale=True, desc=name, mininterval=1)
        total = 0
        for encoded, c in _ordered_map(encode_block, jobs, cfg.num_proc or os.cpu_count()):
            counts += c
            for is_val, ids, n_bytes in encoded:
                if total >= limit:
                    break
                split = "val" if is_val else "train"
                files[split].write(ids.tobytes())
                for key, n in (("documents", 1), ("tokens", len(ids)), ("bytes", n_bytes)):
                    splits[split][key] += n
                total += len(ids)
                bar.update(len(ids))
            if total >= limit:
                break
        bar.close()
        for f in files.values():
            f.close()
        for split, n in splits.items():
            if not n["documents"]:
                raise UserError(f"no document fell into the {split} split: more documents or another --val_fraction are needed")
        meta = dict(dataset=cfg.dataset, tokenizer=tokenizer.name, vocab_size=tokenizer.vocab_size, separator=tokenizer.separator,
                    dtype=tokenizer.dtype.name, **splits, broken_skipped=counts["broken"], empty_skipped=counts["empty"], repaired=counts["repaired"])
        with open(os.path.join(partial, "meta.json"), "w") as f:
            json.dump(meta, f, indent=1)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"{final}: {total:,} tokens at {total / (time.time() - start):,.0f} tokens/s; "
          + ", ".join(f"{s} {n['documents']:,} documents {n['tokens']:,} tokens" for s, n in splits.items())
          + f"; skipped {counts['broken']} broken rows, {counts['empty']} empty documents; repaired {counts['repaired']} texts")
    return meta


# ----------------------------------------------------------------------------------------------------------------
# Reading it back

class Data:
    """A prepared folder: meta (dict), train and val (memmaps of ids), tokenizer (made when first asked for)."""

    def __init__(self, path):
        try:
            self.meta = json.load(open(os.path.join(path, "meta.json")))
        except (OSError, ValueError):
            raise UserError(f"{path} holds no readable meta.json: run prepare.py (python prepare.py --help)") from None
        self.train, self.val = (self._open(path, split) for split in ("train", "val"))
        self.separator, self.vocab_size = self.meta["separator"], self.meta["vocab_size"]

    def _open(self, path, split):
        file, dtype = os.path.join(path, split + ".bin"), np.dtype(self.meta["dtype"])
        want = self.meta[split]["tokens"] * dtype.itemsize
        size = os.path.getsize(file) if os.path.exists(file) else None
        if size != want:
            raise UserError(f"{file} {'is missing' if size is None else f'has {size:,} bytes'}, meta.json says {want:,}: "
                            "run prepare.py again")
        return np.memmap(file, dtype=dtype, mode="r")

    @functools.cached_property
    def tokenizer(self):
        return Tokenizer(self.meta["tokenizer"])


def main(argv):
    prepare(PrepareConfig(**parse(PrepareConfig, argv)))


if __name__ == "__main__":
    run(main)
