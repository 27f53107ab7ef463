"""
Text to tokens in one streaming pass: documents -> filters -> tokenizer -> data/<name>/*.bin and meta.json.

    python prepare.py                                            # SlimPajama from the Hugging Face hub, GPT-2 tokens
    python prepare.py --dataset demo                             # no network: the standard library's source + pass-keys
    python prepare.py --dataset 'texts/*.jsonl.zst' --tokenizer llama3:/path/tokenizer.model --shard_tokens 1e9
    python prepare.py --dataset fineweb --num_tokens 10e9 --language en --dedup near
    python prepare.py --list | --dataset pile --estimate | --inspect data/pile

The .bin files are flat arrays of token ids (uint16, or uint32 for a vocabulary above 65536), the separator's id after
every document. A document goes to val by a hash of its text, never by its position. meta.json says the rest, and while the
pass is on also how far it has got: killed at any moment and started again, it goes on and ends with the same bytes. On
several machines: the same command with --rank and --world_size, or under torchrun, then once more with --merge.
This file also owns what others need to read such data: Tokenizer, Data, and the pass-key lines that eval.py asks for.
"""
import contextlib
import functools
import glob
import gzip
import importlib
import io
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import string
import sysconfig
import threading
import time
import urllib.request
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import tiktoken
import xxhash  # comes with datasets

from configurator import UserError, parse, run

try:
    import orjson
except ImportError:  # optional: json is enough, and slower
    orjson = None

BLOCK = 1 << 20  # bytes of documents that a worker takes at a time
ROWS = 200  # the same, of tables
SHORTEST, LONGEST = 1 << 16, 1 << 20  # bytes: a long plain text is cut into documents between these


class Preset(NamedTuple):
    sources: tuple  # hub ids, tried in order; or addresses, {} standing for each line of `listing`
    config: str = ""
    split: str = "train"
    column: str = "text"
    articles: bool = False  # rows are lines: join them into articles, each from a title " = Title = " on
    val_fraction: float = 0.005
    tokens: float = 0  # about how many, as its publishers or the guide say
    listing: str = ""
    note: str = ""


TOGETHER = "https://data.together.xyz/redpajama-data-v2/v1.0.0/"
PRESETS = {
    "demo": Preset((), val_fraction=0.1, tokens=8e6, note="Python's standard library and pass-key documents, no network"),
    "slimpajama": Preset(("cerebras/SlimPajama-627B", "gmongaras/SlimPajama-627B_Reupload"), tokens=627e9, note="the recommended one"),
    "slimpajama-6b": Preset(("DKYoon/SlimPajama-6B",), tokens=6e9, note="a sample of it"),
    "redpajama-v2": Preset((TOGETHER + "documents/{}.json.gz",), column="raw_content", tokens=30e12,
                           listing=TOGETHER + "listings/en-2023-06-head_middle.txt", note="English head and middle of the crawl 2023-06; all crawls: 30e12"),
    "pile": Preset(("monology/pile-uncopyrighted", "EleutherAI/the_pile_deduplicated"), tokens=300e9, note="22 domains"),
    "fineweb": Preset(("HuggingFaceFW/fineweb",), config="default", tokens=15e12, note="CommonCrawl, filtered"),
    "fineweb-10b": Preset(("HuggingFaceFW/fineweb",), config="sample-10BT", tokens=10e9, note="a sample of it"),
    "wikitext-103": Preset(("Salesforce/wikitext",), config="wikitext-103-raw-v1", split="test", articles=True, val_fraction=1.0, tokens=2.5e5,
                           note="evaluation; --split train has 1e8"),
    "c4": Preset(("allenai/c4",), config="en", split="validation", val_fraction=1.0, tokens=1.7e8, note="evaluation"),
    "lambada": Preset(("EleutherAI/lambada_openai",), config="default", split="test", val_fraction=1.0, tokens=4.5e5, note="evaluation"),
}


@dataclass
class PrepareConfig:
    dataset: str = "slimpajama"  # a preset (--list), a hub id, or a local .txt .jsonl .parquet file (also .gz, .zst), folder or glob
    source: str = ""  # read the preset from here: another hub id, or local files of the same columns
    name: str = ""  # output folder under data_dir; default: the dataset's short name
    tokenizer: str = ""  # gpt2 | cl100k_base | o200k_base | bytes | llama3:PATH | tiktoken:PATH; default: bytes for demo, else gpt2
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
    mask_pii: bool = False  # e-mail addresses, phone, card and social security numbers, IP addresses become [EMAIL_1] and so on (datafog)
    dedup: str = ""  # exact: the same text; near: MinHash of words in fives, about 0.75 alike (rensa). Within one machine's share
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
        self.rank = int(os.environ.get("RANK", 0)) if self.rank < 0 else self.rank
        self.world_size = self.world_size or int(os.environ.get("WORLD_SIZE", 1))
        self.tokenizer = self.tokenizer or ("bytes" if self.dataset == "demo" else "gpt2")
        self.text_column = self.text_column or self.preset.column
        self.config, self.split = self.config or self.preset.config, self.split or self.preset.split
        self.val_fraction = self.val_fraction or self.preset.val_fraction
        self.num_tokens = self.num_tokens or (int(self.preset.tokens) if self.dataset == "demo" else 0)
        self.name = self.name or re.sub(r"[^\w-]+", "-", re.sub(r"\.(gz|zst)$|\.\w+$|\*", "", os.path.basename(self.dataset.rstrip("/")))).strip("-") or "data"
        if not 0 < self.val_fraction <= 1:
            raise UserError(f"val_fraction {self.val_fraction} is not between 0 and 1")
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank {self.rank} is not below world_size {self.world_size}")
        if self.dedup not in ("", "exact", "near"):
            raise UserError(f"dedup {self.dedup!r} is not exact or near")
        if self.source and self.dataset not in PRESETS:
            raise UserError(f"source goes with a preset ({', '.join(PRESETS)}); for other data give --dataset alone")

    @property
    def flags(self):
        """The settings that decide the output's bytes: a pass that is taken up again must have the same."""
        rest = ("num_proc", "data_dir", "name", "merge", "commit_seconds", "list", "estimate", "inspect")
        return {k: v for k, v in asdict(self).items() if k not in rest}


def optional(module, package=None):
    """A module of an optional package (of the same name), or one line that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this needs a package: pip install {package or module}") from None


# ----------------------------------------------------------------------------------------------------------------
# Tokenizers

LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def rank_file(name):
    """A tiktoken.Encoding from a file of token ranks: "llama3:PATH" with Llama 3's 256 special tokens, "tiktoken:PATH" with one."""
    kind, path = name.split(":", 1)
    try:
        from tiktoken.load import load_tiktoken_bpe
        ranks = load_tiktoken_bpe(path)
    except (OSError, ValueError) as e:
        raise UserError(f"tokenizer {name}: {path} is not a readable file of token ranks ({type(e).__name__})") from None
    special = ["<|endoftext|>"]
    if kind == "llama3":
        special = ["<|begin_of_text|>", "<|end_of_text|>"] + [f"<|special_{i}|>" for i in range(254)]  # the others have no use here
    first = max(ranks.values()) + 1
    return tiktoken.Encoding(name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={s: first + i for i, s in enumerate(special)})


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
        elif name.startswith(("llama3:", "tiktoken:")):
            self.enc = rank_file(name)
        else:
            try:
                self.enc = tiktoken.get_encoding(name)
            except ValueError:
                names = ["bytes", "llama3:PATH", "tiktoken:PATH"] + tiktoken.list_encoding_names()
                raise UserError(f"tokenizer {name!r} is not one of {', '.join(names)}") from None
            except OSError:  # requests' ConnectionError is one
                raise UserError(f"tokenizer {name!r} must be downloaded once and cannot be: use --tokenizer bytes, or set "
                                "TIKTOKEN_CACHE_DIR to a folder filled on a machine with network") from None
        self.separator = self.enc.encode_single_token("<|end_of_text|>" if name.startswith("llama3:") else "<|endoftext|>")
        self.vocab_size = self.enc.n_vocab
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text):
        """str (no lone surrogates) -> 1-D numpy array of ids."""
        if self.name == "bytes":
            return np.frombuffer(text.encode(), dtype=np.uint8)
        pieces = [self.enc.encode_to_numpy(p, disallowed_special=()) for p in _cut_blanks(text)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

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
    half = longest // 2  # a run of `longest` holds one whole stretch of these, and most texts hold none
    if not any(text[i:i + half].isspace() for i in range(0, len(text) - half + 1, half)):
        return [text]
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


# ----------------------------------------------------------------------------------------------------------------
# Sources: what the data is and, from any point of it on, its blocks of documents

class Block(NamedTuple):
    kind: str  # what data is: "texts", a list of str, None where a row is broken | "raw", a list of bytes | "lines", bytes of JSON lines
    data: object
    state: object  # JSON: where the source goes on after this block


def demo_blocks(seed, share, state):
    """The source of the installed standard library, a file per block, followed by about three times as much pass-key text."""
    root = sysconfig.get_path("stdlib")
    paths = sorted(glob.glob(root + "/**/*.py", recursive=True))
    paths = [p for p in paths if not re.search(r"site-packages|dist-packages|/test|/idlelib|/lib2to3", p[len(root):])]
    random.Random(seed).shuffle(paths)
    for i in range(state or 0, len(paths)):
        rank, world_size = share
        if i % world_size == rank:
            text = open(paths[i], encoding="utf-8", errors="replace").read()
            rng, filler = random.Random(f"{seed} {i}"), text.ljust(450)
            yield Block("texts", [text] + [passkey_document(rng, filler) for _ in range(len(text) // 70 + 1)], i + 1)


def decompress(raw):
    """A file open for reading bytes -> the stream of what is in it."""
    if raw.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if raw.name.endswith(".zst"):
        return io.BufferedReader(optional("zstandard").ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return raw


BLANK = re.compile(rb"\n[ \t\r]*\n")


def cut_text(data, last):
    """
    Documents at the front of `data`, plain text: its whole rest if short, else up to a blank line, else to a line's end, else to
    a character's. Returns them and how many bytes they take; where more of the text follows (not `last`) it is left a whole LONGEST.
    """
    docs, a = [], 0
    while len(data) - a > LONGEST or last and a < len(data):
        if last and len(data) - a <= SHORTEST:
            end = len(data)
        elif blank := BLANK.search(data, a + SHORTEST, a + LONGEST):
            end = blank.end()
        elif last and len(data) - a <= LONGEST:
            end = len(data)
        else:
            end = data.rfind(b"\n", a + SHORTEST, a + LONGEST) + 1 or a + LONGEST
            while end > a + 1 and data[end] & 0xC0 == 0x80:
                end -= 1
        docs.append(data[a:end])
        a = end
    return docs, a


def _read(f, n):
    """Up to n bytes; of a compressed file that breaks off, what there is before that."""
    parts = []
    try:
        while n > 0 and (part := f.read1(n)):
            parts.append(part)
            n -= len(part)
    except EOFError:
        if not parts:
            raise
    return b"".join(parts)


def file_pieces(path, offset):
    """(data of a Block, bytes, where it ends) of a local file from a byte on: documents of plain text, or whole JSON lines."""
    with open(path, "rb") as raw, decompress(raw) as f:
        if path.endswith(".zst"):  # cannot seek
            for a in range(0, offset, BLOCK):
                f.read(min(BLOCK, offset - a))
        else:
            f.seek(offset)
        if ".txt" not in path:
            while data := _read(f, BLOCK):
                try:
                    data += f.readline()
                except EOFError:
                    data = data[:data.rfind(b"\n") + 1]
                offset += len(data)
                yield data if data.endswith(b"\n") else data + b"\n", len(data), offset
            return
        data, more = b"", b"."
        while more:
            more = _read(f, BLOCK)
            docs, used = cut_text(data + more, not more)
            data = (data + more)[used:]
            offset += used
            if docs:
                yield docs, used, offset


def file_stream(paths, i, offset):
    """The pieces of paths[i] from a byte on and of all files after it: (data, bytes, [file, byte] behind it); data None: a file breaks off."""
    for i in range(i, len(paths)):
        try:
            for data, n, offset in file_pieces(paths[i], offset):
                yield data, n, [i, offset]
        except UserError:
            raise
        except Exception as e:  # the decompressors have types of their own
            if isinstance(e, OSError) and not isinstance(e, gzip.BadGzipFile):
                raise UserError(f"{paths[i]} cannot be read: {e.strerror or e}") from None
            yield None, 0, [i + 1, 0]
        offset = 0


def file_blocks(paths, share, state):
    """
    Blocks of local text or JSON-lines files. A machine takes every world_size-th file or, where there are fewer, block. state:
    [file, byte in it, number of the block]. A file that breaks off (truncated gzip) counts as broken, and the next one follows.
    """
    *at, number = state or (0, 0, 0)
    rank, world_size = share
    if len(paths) >= world_size:
        rank, world_size, paths = 0, 1, paths[rank::world_size]
    kind, data, size = ("raw", [], 0) if ".txt" in paths[0] else ("lines", b"", 0)
    for piece, n, after in itertools.chain(file_stream(paths, *at), [(None, 0, None)]):
        if piece is not None:
            data, size, at = data + piece, size + n, after
        if size >= BLOCK or size and piece is None:
            number += 1
            if number % world_size == rank:
                yield Block(kind, data, [*at, number])
            data, size = data[:0], 0
        if piece is None and after and number % world_size == rank:
            yield Block("texts", [None], [*after, number])


def table_blocks(stream, column, articles, share, state):
    """Blocks of a datasets.IterableDataset. state: its state_dict and, of lines to be joined, those of the article begun."""
    from datasets.distributed import split_dataset_by_node
    stream = stream.with_format("arrow")
    if share[1] > 1:
        stream = split_dataset_by_node(stream, *share)
    begun = []
    if state:
        stream.load_state_dict(state["stream"])
        begun = state["begun"]
    batches = stream.iter(batch_size=ROWS)
    while True:
        try:
            table = next(batches, None)
        except Exception as e:  # the network, a broken shard: datasets raises a dozen types after its own retries
            raise UserError(f"the stream broke off ({_line(e)}): the same command goes on from here, unless a file of the source is damaged") from None
        if table is None:
            break
        if column not in table.column_names:
            raise UserError(f"no column {column!r} in the data, only {', '.join(table.column_names)}: set --text_column")
        texts = [t if isinstance(t, str) else None for t in table[column].to_pylist()]
        if articles:
            lines, texts = texts, []
            for line in lines:
                if line and line.startswith(" = ") and not line.startswith(" = = ") and begun:
                    texts.append("".join(begun))
                    begun = []
                begun.append(line or "")
        yield Block("texts", texts, dict(stream=stream.state_dict(), begun=list(begun)))
    if begun:
        yield Block("texts", ["".join(begun)], dict(stream=stream.state_dict(), begun=[]))


def _line(e):
    return (str(e) or type(e).__name__).strip().splitlines()[0]


KINDS = re.compile(r"\.(txt|jsonl?|parquet)(\.gz|\.zst)?$")


def local_files(path):
    """The files of a path, folder or glob, sorted; [] if there are none, and it looks like a hub id."""
    paths = sorted(p for p in glob.glob(os.path.join(path, "**") if os.path.isdir(path) else path, recursive=True) if os.path.isfile(p))
    if not paths and (KINDS.search(path) or "*" in path or path.startswith(("/", "."))):
        raise UserError(f"no file matches {path}")
    kinds = {m.group(1).replace("jsonl", "json") if (m := KINDS.search(p)) else None for p in paths}
    if None in kinds or len(kinds) > 1:
        raise UserError(f"{path}: local data must be .txt, .jsonl or .parquet files (also .gz, .zst) of one kind")
    return paths


def open_source(cfg, known=None):
    """
    (what it is, its local files, state -> iterator of Block) of the data cfg names. known: the mirror that an earlier run read.
    """
    share = cfg.rank, cfg.world_size
    if cfg.dataset == "demo":
        return f"Python {platform.python_version()}", [], functools.partial(demo_blocks, cfg.seed, share)
    table = lambda stream: functools.partial(table_blocks, stream, cfg.text_column, cfg.preset.articles, share)
    paths = local_files(cfg.source or cfg.dataset) if cfg.source or cfg.dataset not in PRESETS else []
    if paths:
        what = f"{len(paths)} files of {sum(map(os.path.getsize, paths))} bytes"
        if not paths[0].endswith(".parquet") and not cfg.preset.articles:
            return what, paths, functools.partial(file_blocks, paths, share)
    import datasets  # slow to import, and not needed above
    datasets.disable_progress_bars()
    datasets.config.STREAMING_READ_MAX_RETRIES, datasets.config.STREAMING_READ_RETRY_INTERVAL = 20, 5
    if paths:
        builder = "parquet" if paths[0].endswith(".parquet") else "text" if ".txt" in paths[0] else "json"
        return what, paths, table(datasets.load_dataset(builder, data_files=paths, split="train", streaming=True))
    errors = []
    for source in (cfg.source,) if cfg.source else cfg.preset.sources:
        if known in (None, source):
            try:
                if cfg.preset.listing:
                    with urllib.request.urlopen(cfg.preset.listing, timeout=60) as f:
                        addresses = [source.format(line) for line in f.read().decode().split()]
                    stream = datasets.load_dataset("json", data_files=addresses, split="train", streaming=True)
                else:
                    stream = datasets.load_dataset(source, cfg.config or None, split=cfg.split, streaming=True)
                return source, [], table(stream)
            except Exception as e:  # datasets raises a dozen types for "not there" and "no network"
                errors.append(f"{source}: {_line(e)}")
    raise UserError(f"cannot load {'; '.join(errors)}. Without network: --dataset demo, or a local .txt, .jsonl or .parquet")


# ----------------------------------------------------------------------------------------------------------------
# A block of documents to tokens, in a process of its own

class Encoded(NamedTuple):
    ids: np.ndarray  # the documents' tokens, each with its separator
    lengths: np.ndarray  # tokens per document
    sizes: np.ndarray  # bytes per document
    held_out: np.ndarray  # bool per document
    keys: np.ndarray  # (documents, n) uint64: documents that share one are duplicates
    counts: Counter  # what was dropped or mended


def _json(line):
    """A JSON line's value, None where it is broken. What orjson refuses (NaN, lone surrogates) json may still take."""
    for loads in (orjson.loads, json.loads) if orjson else (json.loads,):
        with contextlib.suppress(ValueError, RecursionError):
            return loads(line)


def _texts(block, column, counts):
    """The block's documents as str, None where there is none."""
    if block.kind == "texts":
        yield from block.data
        return
    for raw in block.data if block.kind == "raw" else block.data.split(b"\n"):
        try:
            text, mended = raw.decode(), 0
        except UnicodeDecodeError:
            text, mended = raw.decode(errors="replace"), 1
        if block.kind == "lines":
            if not text.strip():
                continue
            row = _json(text)
            counts["no column"] += isinstance(row, dict) and column not in row
            text = row.get(column) if isinstance(row, dict) else None
        counts["repaired"] += mended and isinstance(text, str)
        yield text if isinstance(text, str) else None


def filter_texts(texts, cfg, counts):
    """Those that pass the filters of cfg, personal data masked."""
    def only(name, keep):
        kept = [t for t, ok in zip(texts, keep) if ok]
        counts[name] += len(texts) - len(kept)
        return kept
    if cfg.min_chars or cfg.max_chars:
        texts = only("length", [cfg.min_chars <= len(t) <= (cfg.max_chars or len(t)) for t in texts])
    if cfg.language:
        classify = optional("py3langid").classify
        texts = only("language", [classify(t[:10_000])[0] in cfg.language.split(",") for t in texts])
    if cfg.max_toxicity and texts:
        texts = only("toxicity", optional("profanity_check", "alt-profanity-check").predict_prob(texts) <= cfg.max_toxicity)
    if cfg.mask_pii:
        redact = optional("datafog").redact
        masked = [redact(t, engine="regex", entity_types=["EMAIL", "PHONE", "SSN", "CREDIT_CARD", "IP_ADDRESS"]).redacted_text for t in texts]
        counts["masked"] += sum(a != b for a, b in zip(texts, masked))
        texts = masked
    return texts


def near_keys(text):
    """MinHash of the text's words in fives: 14 bands of 8, two texts 0.75 alike share one with probability 0.77, 0.5 alike with 0.05."""
    minhash, words = optional("rensa").RMinHash(num_perm=112, seed=42), text.lower().split()
    minhash.update([" ".join(words[i:i + 5]) for i in range(max(1, len(words) - 4))])
    bands = np.array(minhash.digest(), dtype=np.uint32).reshape(14, 8)
    return [xxhash.xxh3_64_intdigest(band.tobytes(), seed=i) for i, band in enumerate(bands)]


@functools.lru_cache(1)
def _tokenizer(name):
    return Tokenizer(name)


def encode_block(block, cfg):
    """Block -> Encoded. The result for a document does not depend on the others of its block."""
    tokenizer, counts, texts = _tokenizer(cfg.tokenizer), Counter(), []
    for text in _texts(block, cfg.text_column, counts):
        if text is None or not text or text.isspace():
            counts["broken" if text is None else "empty"] += 1
            continue
        if not text.isascii() and b"\xed" in text.encode("utf-8", "surrogatepass"):  # perhaps a lone surrogate, which UTF-8 forbids
            fixed = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            counts["repaired"] += fixed != text
            text = fixed
        texts.append(text)
    texts = filter_texts(texts, cfg, counts)
    raws = [t.encode() for t in texts]
    digests = np.array([xxhash.xxh3_64_intdigest(r) for r in raws], dtype=np.uint64)
    keys = np.empty((len(texts), 0), dtype=np.uint64)
    if cfg.dedup:
        keys = digests[:, None] if cfg.dedup == "exact" else np.array([near_keys(t) for t in texts], dtype=np.uint64).reshape(-1, 14)
    parts = [np.frombuffer(r, np.uint8) for r in raws] if cfg.tokenizer == "bytes" else [tokenizer.encode(t) for t in texts]
    lengths = np.array([len(p) + 1 for p in parts], dtype=np.int64)
    ids, end = np.empty(lengths.sum(), dtype=tokenizer.dtype), 0
    for part in parts:
        ids[end:end + len(part)] = part
        ids[end + len(part)] = tokenizer.separator
        end += len(part) + 1
    held_out = (digests >> np.uint64(11)) < cfg.val_fraction * 2**53
    return Encoded(ids, lengths, np.array([len(r) for r in raws], dtype=np.int64), held_out, keys, counts)


def filter_packages(cfg):
    """(module, package if it is called otherwise) of every filter of cfg that needs one: those that take long."""
    wanted = ((cfg.language, "py3langid"), (cfg.max_toxicity, "profanity_check", "alt-profanity-check"), (cfg.mask_pii, "datafog"), (cfg.dedup == "near", "rensa"))
    return [package for on, *package in wanted if on]


def processes(cfg):
    """How many encode: one for bytes without such filters, which take longer to send to another than to encode."""
    return 1 if cfg.tokenizer == "bytes" and not filter_packages(cfg) else cfg.num_proc or os.cpu_count()


def encode_blocks(blocks, cfg):
    """(Block's state, Encoded) in order, by a process pool if there is more than one process; never more than a few blocks are held."""
    num_proc = processes(cfg)
    if num_proc == 1:
        yield from ((block.state, encode_block(block, cfg)) for block in blocks)
        return
    pool = ProcessPoolExecutor(num_proc, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    try:
        waiting = deque()
        for block in blocks:
            waiting.append((block.state, pool.submit(encode_block, block._replace(state=None), cfg)))
            if len(waiting) > 2 * num_proc:
                state, result = waiting.popleft()
                yield state, result.result()
        for state, result in waiting:
            yield state, result.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent():
    """A worker whose parent was killed would wait for work for ever."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


# ----------------------------------------------------------------------------------------------------------------
# The pass

def checksum(file):
    """xxh3 of what is left of an open file, to be gone on with."""
    digest = xxhash.xxh3_64()
    while part := file.read(1 << 24):
        digest.update(part)
    return digest


class Writer:
    """The growing .bin files of one split. saved: what commit() returned when the last pass stopped; more than that is cut off."""

    def __init__(self, folder, split, dtype, shard_tokens, saved=None):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.totals = {k: saved[k] if saved else 0 for k in ("documents", "tokens", "bytes")}
        self.files = [dict(f) for f in saved["files"]] if saved else []
        self.f = None
        for path in glob.glob(os.path.join(folder, split + "*.bin")):
            if os.path.basename(path) not in [f["name"] for f in self.files]:
                os.remove(path)
        if self.files:
            self._open("r+b")
            self.f.truncate(self.files[-1]["tokens"] * dtype.itemsize)
            self.hash = checksum(self.f)
        else:
            self._next()

    def _open(self, mode):
        self.f, self.hash = open(os.path.join(self.folder, self.files[-1]["name"]), mode), xxhash.xxh3_64()

    def _next(self):
        if self.f:
            self.commit()
            self.f.close()
        self.files.append(dict(name=f"{self.split}_{len(self.files):03d}.bin" if self.shard_tokens else f"{self.split}.bin", tokens=0))
        self._open("wb")

    def write(self, ids):
        while len(ids):
            room = self.shard_tokens - self.files[-1]["tokens"] if self.shard_tokens else len(ids)
            if room <= 0:
                self._next()
                continue
            part = ids[:room]
            self.f.write(part.data)
            self.hash.update(part.data)
            self.files[-1]["tokens"] += len(part)
            ids = ids[room:]

    def add(self, ids, lengths, sizes):
        """Append documents: their ids, tokens and bytes of each."""
        self.write(ids)
        for key, n in (("documents", len(lengths)), ("tokens", len(ids)), ("bytes", int(sizes.sum()))):
            self.totals[key] += n

    def commit(self):
        """On the disk, really. Returns what the files are then."""
        self.f.flush()
        os.fsync(self.f.fileno())
        self.files[-1]["xxh3"] = self.hash.hexdigest()
        return {**self.totals, "files": [dict(f) for f in self.files]}

    def close(self):
        with contextlib.suppress(OSError):  # a full disk, reported already
            self.f.close()


class Seen:
    """Keys of the documents kept so far, in memory and, to be read again by a pass that is taken up, in seen.bin; committed 0: a new one."""

    def __init__(self, folder, committed):
        self.path, self.new = os.path.join(folder, "seen.bin"), []
        if committed:
            with open(self.path, "r+b") as f:
                f.truncate(8 * committed)
        elif os.path.exists(self.path):
            os.remove(self.path)
        self.keys = set(np.fromfile(self.path, dtype=np.uint64).tolist()) if committed else set()
        self.committed = committed

    def first(self, keys):
        """keys (documents, n) -> bool per document: none of its keys was seen before, and now they are."""
        out = []
        for row in keys.tolist():
            out.append(self.keys.isdisjoint(row))
            if out[-1]:
                self.keys.update(row)
                self.new += row
        return np.array(out, dtype=bool)

    def commit(self):
        if self.new:
            with open(self.path, "ab") as f:
                np.array(self.new, dtype=np.uint64).tofile(f)
                f.flush()
                os.fsync(f.fileno())
            self.committed, self.new = self.committed + len(self.new), []
        return self.committed


def read_meta(folder):
    """The dict of a folder's meta.json, or None."""
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError):
        return None


def write_meta(folder, meta):
    """Written beside and renamed: meta.json is always a whole one, and on the disk."""
    path = os.path.join(folder, "meta.json")
    with open(path + ".partial", "w", encoding="utf-8") as f:
        json.dump(meta, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".partial", path)


@contextlib.contextmanager
def only_one(folder):
    """Make the folder, and refuse a second pass over it meanwhile."""
    import fcntl  # POSIX only
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another prepare.py is at work on {folder}") from None
    finally:
        os.close(handle)


def rank_folder(cfg, rank):
    folder = os.path.join(cfg.data_dir, cfg.name)
    return os.path.join(folder, f"rank_{rank:03d}_of_{cfg.world_size:03d}") if cfg.world_size > 1 else folder


def differences(a, b):
    return ", ".join(f"{k} {a.get(k)!r} → {b.get(k)!r}" for k in sorted({*a, *b}) if a.get(k) != b.get(k))


def prepare(cfg):
    """Write this machine's data/<name>/, going on where an earlier pass stopped. Returns its meta dict."""
    folder = rank_folder(cfg, cfg.rank)
    saved = read_meta(folder)
    if saved and "flags" not in saved:
        raise UserError(f"{folder} holds data of another version: choose another --name, or delete it")
    what, _, blocks = open_source(cfg, saved and saved["source"] if cfg.dataset in PRESETS and not cfg.source else None)
    if saved and (changed := differences({**saved["flags"], "source": saved["source"]}, {**cfg.flags, "source": what})):
        raise UserError(f"{folder} was begun with other settings or data ({changed}): choose another --name, or delete it")
    if saved and saved["complete"]:
        Seen(folder, 0)  # a crash may have left its file
        print(f"{folder} is complete: {describe(saved)}")
        return saved
    tokenizer = Tokenizer(cfg.tokenizer)
    with only_one(folder), contextlib.ExitStack() as files:
        try:
            meta = _pass(cfg, folder, tokenizer, what, blocks, saved or {}, files)
        except UserError:
            if not read_meta(folder):
                shutil.rmtree(folder)
            raise
        except OSError as e:
            raise UserError(f"{folder}: {e.strerror or e}; the same command goes on from here once that is mended") from None
    print(f"{folder}: {describe(meta)}")
    return meta


def _pass(cfg, folder, tokenizer, what, blocks, saved, files):
    from tqdm import tqdm
    limit = cfg.num_tokens // cfg.world_size or float("inf")
    for package in filter_packages(cfg):
        optional(*package)  # said now, not by a worker
    writers = {s: files.enter_context(contextlib.closing(Writer(folder, s, tokenizer.dtype, cfg.shard_tokens, saved.get(s)))) for s in ("train", "val")}
    counts, seen, state = Counter(saved.get("counts")), Seen(folder, saved.get("seen", 0)), saved.get("state")
    meta = dict(dataset=cfg.dataset, source=what, tokenizer=tokenizer.name, vocab_size=tokenizer.vocab_size, separator=tokenizer.separator,
                dtype=tokenizer.dtype.name, flags=cfg.flags)

    def commit(complete):
        splits = {s: w.commit() for s, w in writers.items()}
        write_meta(folder, {**meta, "complete": complete, **splits, "counts": counts, "seen": seen.commit(), "state": None if complete else state})
    total = sum(w.totals["tokens"] for w in writers.values())
    began, last = time.time(), time.time()
    with tqdm(total=cfg.num_tokens // cfg.world_size or None, initial=total, unit="tok", unit_scale=True, desc=cfg.name, mininterval=1) as bar:
        results = files.enter_context(contextlib.closing(encode_blocks(blocks(state), cfg)))
        for state, e in results if total < limit else ():
            counts += e.counts
            if not total and counts["no column"] and not len(e.lengths):
                raise UserError(f"no column {cfg.text_column!r} in the data: set --text_column")
            where = e.held_out.astype(int)  # 0 train, 1 val, 2 dropped
            if cfg.dedup:
                first = seen.first(e.keys)
                counts["duplicate"] += int((~first).sum())
                where[~first] = 2
            ends = np.cumsum(e.lengths)
            if total + e.lengths[where < 2].sum() >= limit:
                where[np.searchsorted(total + np.cumsum(e.lengths * (where < 2)), limit) + 1:] = 2
            turns = np.flatnonzero(np.diff(where)) + 1  # where another split begins: between them whole runs are written
            for a, b in zip(np.append(0, turns), np.append(turns, len(where))):
                if a < b and where[a] < 2:
                    ids = e.ids[ends[a] - e.lengths[a]:ends[b - 1]]
                    writers["val" if where[a] else "train"].add(ids, e.lengths[a:b], e.sizes[a:b])
                    total += len(ids)
                    bar.update(len(ids))
            if total >= limit:
                break
            if time.time() - last >= cfg.commit_seconds:
                commit(False)
                last = time.time()
    for split, w in writers.items():
        if not w.totals["documents"] and (split == "val" or cfg.val_fraction < 1):
            raise UserError(f"no document fell into the {split} split: more documents or another --val_fraction are needed")
    commit(True)
    Seen(folder, 0)
    print(f"{total / max(1e-9, time.time() - began):,.0f} tokens/s")
    return read_meta(folder)


def describe(meta):
    """One line about a meta dict."""
    splits = ", ".join(f"{s} {meta[s]['documents']:,} documents {meta[s]['tokens']:,} tokens" for s in ("train", "val"))
    return splits + "".join(f", {n:,} {what}" for what, n in sorted(meta["counts"].items()) if n)


def merge(cfg):
    """data/<name>/meta.json over the folders of all ranks, whose files stay where they are."""
    metas = []
    for rank in range(cfg.world_size):
        folder = rank_folder(cfg, rank)
        meta = read_meta(folder)
        if not meta or not meta["complete"]:
            raise UserError(f"{folder} is not complete: run prepare.py --rank={rank} --world_size={cfg.world_size} there first")
        about = lambda m: {**m["flags"], "source": m["source"], "rank": 0}
        if metas and (changed := differences(about(metas[0]), about(meta))):
            raise UserError(f"{folder} was prepared with other settings or data than rank 0 ({changed})")
        metas.append(meta)
    out = {**metas[0], "counts": sum((Counter(m["counts"]) for m in metas), Counter())}
    for split in ("train", "val"):
        out[split] = {k: sum(m[split][k] for m in metas) for k in ("documents", "tokens", "bytes")}
        out[split]["files"] = [{**f, "name": os.path.join(os.path.basename(rank_folder(cfg, r)), f["name"])} for r, m in enumerate(metas) for f in m[split]["files"]]
    folder = os.path.join(cfg.data_dir, cfg.name)
    write_meta(folder, out)
    print(f"{folder}: {describe(out)}")
    return out


# ----------------------------------------------------------------------------------------------------------------
# Reading it back

class Shards:
    """Several arrays of ids read as one: len(), slices, np.asarray()."""

    def __init__(self, parts):
        self.parts, self.ends = parts, np.cumsum([len(p) for p in parts])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, s):
        start, stop, step = s.indices(len(self))
        assert step == 1, "a slice of shards has no step"
        out, i = [], int(np.searchsorted(self.ends, start, "right"))
        while start < stop and i < len(self.parts):
            first = int(self.ends[i]) - len(self.parts[i])
            out.append(self.parts[i][start - first:stop - first])
            start, i = int(self.ends[i]), i + 1
        return out[0] if len(out) == 1 else np.concatenate(out or [self.parts[0][:0]])

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[:], dtype=dtype)


class Data:
    """A prepared folder: meta (dict), train and val (1-D ids, mapped from disk), tokenizer (made when first asked for)."""

    def __init__(self, path):
        self.path, self.meta = path, read_meta(path)
        if self.meta is None or "complete" not in self.meta:
            raise UserError(f"{path} holds no readable meta.json: run prepare.py (python prepare.py --help)")
        if not self.meta["complete"]:
            raise UserError(f"{path} is not complete: run the same prepare.py command again, it goes on where it stopped")
        self.train, self.val = (self._open(split) for split in ("train", "val"))
        self.separator, self.vocab_size = self.meta["separator"], self.meta["vocab_size"]

    def _open(self, split):
        parts, dtype = [], np.dtype(self.meta["dtype"])
        for f in self.meta[split]["files"]:
            file, want = os.path.join(self.path, f["name"]), f["tokens"] * dtype.itemsize
            size = os.path.getsize(file) if os.path.exists(file) else None
            if size != want:
                raise UserError(f"{file} {'is missing' if size is None else f'has {size:,} bytes'}, meta.json says {want:,}: "
                                "delete the folder and run prepare.py again")
            parts.append(np.memmap(file, dtype=dtype, mode="r") if size else np.empty(0, dtype))
        return parts[0] if len(parts) == 1 else Shards(parts)

    @functools.cached_property
    def tokenizer(self):
        return Tokenizer(self.meta["tokenizer"])


def inspect(folder):
    """Print what a prepared folder holds, and check its files against their checksums."""
    data = Data(folder)
    meta = data.meta
    print(f"{folder}: {meta['dataset']} from {meta['source']}, {meta['tokenizer']} tokens ({meta['dtype']}); {describe(meta)}")
    for split, ids in (("train", data.train), ("val", data.val)):
        lengths, rest = [], 0
        for a in range(0, len(ids), 1 << 24):
            ends = np.flatnonzero(ids[a:a + (1 << 24)] == data.separator) + a + 1
            lengths.append(np.diff(ends, prepend=rest))
            rest = ends[-1] if len(ends) else rest
        lengths = np.concatenate(lengths) if lengths else np.empty(0, int)
        if len(lengths) != meta[split]["documents"] or rest != len(ids):
            raise UserError(f"{folder}: {split} holds {len(lengths)} whole documents, meta.json says {meta[split]['documents']}")
        if not len(ids):
            continue
        print(f"\n{split}: {meta[split]['bytes'] / len(ids):.2f} bytes/token; tokens per document, median {np.median(lengths):,.0f}")
        counts = np.bincount(np.log2(lengths).astype(int))
        for power in np.flatnonzero(counts):
            print(f"  {1 << power:>9,} – {(2 << power) - 1:>9,} {counts[power]:>10,} {'█' * round(50 * counts[power] / counts.max())}")
        for a in np.linspace(0, max(0, len(ids) - 60), 3).astype(int):
            print(f"  at {a:,}: {data.tokenizer.decode(ids[a:a + 60])!r}")
    for f in meta["train"]["files"] + meta["val"]["files"]:
        with open(os.path.join(folder, f["name"]), "rb") as file:
            digest = checksum(file)
        if digest.hexdigest() != f["xxh3"]:
            raise UserError(f"{folder}/{f['name']} is damaged: its checksum is {digest.hexdigest()}, meta.json says {f['xxh3']}")
    print(f"\nchecksums of {len(meta['train']['files'] + meta['val']['files'])} files are right")


# ----------------------------------------------------------------------------------------------------------------
# Before anything is written: what there is, and what it would take

def show_presets():
    print(f"{'--dataset':14}{'tokens':>9}{'uint16':>9}{'uint32':>9}  from")
    for name, p in PRESETS.items():
        print(f"{name:14}{p.tokens:9.2g}{_size(2 * p.tokens):>9}{_size(4 * p.tokens):>9}  {p.note}{': ' * bool(p.sources)}{' or '.join(p.sources)} {p.config}".rstrip())


def _size(n):
    return next(f"{n / 1000**i:.3g} {u}B" for i, u in reversed(list(enumerate(("", "k", "M", "G", "T")))) if n >= 1000**i or not i)


def decompressed(paths, column):
    """About how many bytes of lines, text or (parquet) of the text column the files hold."""
    if paths[0].endswith(".parquet"):
        import pyarrow.parquet
        groups = [g for p in paths for m in (pyarrow.parquet.ParquetFile(p).metadata,) for g in map(m.row_group, range(m.num_row_groups))]
        columns = [g.column(i) for g in groups for i in range(g.num_columns)]
        return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == column)
    size, ratio = sum(map(os.path.getsize, paths)), 1.0
    if paths[0].endswith((".gz", ".zst")):  # as at the first file's front
        with open(paths[0], "rb") as raw, decompress(raw) as f:
            ratio = len(_read(f, 1 << 25)) / max(1, raw.tell())
    return size * ratio


def estimate(cfg, sample=8 << 20, seconds=20):
    """Measure the front of the data in this process, write nothing. Returns and prints tokens, disk bytes and hours."""
    what, paths, blocks = open_source(cfg)
    tokenizer, num_proc = Tokenizer(cfg.tokenizer), processes(cfg)
    source_bytes = text_bytes = tokens = 0
    began = time.time()
    for block in blocks(None):
        e = encode_block(block, cfg)
        tokens, text_bytes = tokens + len(e.ids), text_bytes + int(e.sizes.sum())
        source_bytes += {"texts": int(e.sizes.sum()), "lines": len(block.data)}.get(block.kind) or sum(map(len, block.data))
        if source_bytes >= sample or time.time() - began > seconds:
            break
    rate = tokens / (time.time() - began)
    if not tokens:
        raise UserError("the front of the data holds no text to measure")
    total = decompressed(paths, cfg.text_column) * tokens / source_bytes if paths else cfg.preset.tokens
    total = min(cfg.num_tokens or total, total or cfg.num_tokens)
    print(f"{what}: measured on its first {_size(text_bytes)} of text, {text_bytes / tokens:.2f} bytes/token, {rate:,.0f} tokens/s per process")
    if not total:
        print("its size is not known: give --num_tokens")
        return None
    out = dict(tokens=int(total), disk_bytes=int(total) * tokenizer.dtype.itemsize, hours=total / rate / num_proc / cfg.world_size / 3600)
    print(f"tokens  {total:.3g}\ndisk    {_size(out['disk_bytes'])} as {tokenizer.dtype}\n"
          f"time    {out['hours']:.2g} hours by {cfg.world_size} × {num_proc} processes, if reading keeps up")
    from train import GSA, PEAK_FLOPS, settings
    import torch
    for config in ("gsa_small", "gsa_1b7"):
        train_cfg = settings([os.path.join(os.path.dirname(os.path.abspath(__file__)), "config", config + ".py")])
        with torch.device("meta"):
            flops = GSA(train_cfg.model_config(tokenizer.vocab_size)).flops_per_token()
        hours = total * flops / (0.4 * PEAK_FLOPS["H100"]) / 3600
        print(f"then    {hours:,.3g} H100-hours to train config/{config}.py on it once, if 40 % of the peak were reached (an assumption)")
    return out


def main(argv):
    cfg = PrepareConfig(**parse(PrepareConfig, argv))
    if cfg.inspect:
        inspect(cfg.inspect)
    else:
        (show_presets if cfg.list else functools.partial(estimate if cfg.estimate else merge if cfg.merge else prepare, cfg))()


if __name__ == "__main__":
    run(main)
