"""
Looking at data before a pass of prepare.py and after it: the presets, what a pass is about to do,
an estimate from the front of the data, and what a prepared folder holds.

    python prepare.py --list | --dataset=pile --estimate | --inspect=data/pile
"""
import os
import time
from pydoc_data.topics import topics  # Python's manual: a sample of English

import numpy as np
import xxhash  # comes with datasets
from tqdm import tqdm

from configurator import UserError, say
from data import Data
from encode import encode_block
from localfiles import Block, text_size
from sources import PRESETS, open_source
from tokenizer import Tokenizer

SPLITS = ("train", "val")


def describe(meta):
    """One line about a meta dict."""
    parts = [f"{s} {meta[s]['documents']:,} documents {meta[s]['tokens']:,} tokens"
             for s in SPLITS]
    parts += [f"{n:,} {reason}" for reason, n in sorted(meta["counts"].items())]
    return ", ".join(parts)


def expected_tokens(limit, published):
    """The smaller of two numbers of tokens, where 0 stands for unknown."""
    return int(min(limit or published, published or limit))


def time_text(cfg, tokens, rate):
    """The time for so many tokens by all processes, as a text. rate: tokens/s of one process."""
    seconds = tokens / rate / cfg.processes / cfg.world_size
    if seconds < 60:
        return "less than a minute"
    if seconds < 3600:
        return f"about {seconds / 60:.0f} minutes"
    return f"about {seconds / 3600:,.3g} hours"


def size_text(n):
    """Bytes as a short text: 2.5e12 -> "2.5 TB"."""
    for i, unit in ((4, "T"), (3, "G"), (2, "M"), (1, "k")):
        if n >= 1000**i:
            return f"{n / 1000**i:.3g} {unit}B"
    return f"{n:.3g} B"


def show_presets():
    say(f"{'--dataset':14}{'tokens':>9}{'uint16':>9}{'uint32':>9}  from")
    for name, p in PRESETS.items():
        where = ": " + " or ".join(p.sources) if p.sources else ""
        say(f"{name:14}{p.tokens:9.2g}{size_text(2 * p.tokens):>9}{size_text(4 * p.tokens):>9}  "
            f"{p.note}{where} {p.config}".rstrip())


def announce(cfg):
    """
    Print what a pass over a preset is about to do: dataset, size and time. The speed is measured
    here and now, on a sample of English, in this process.
    """
    sample = list(topics.values())
    encode_block(Block("texts", sample[:1], None), cfg)  # loads the tokenizer and the filters
    began = time.time()
    encoded = encode_block(Block("texts", sample, None), cfg)
    rate = max(1, len(encoded.ids)) / (time.time() - began)  # filters may drop the whole sample
    total = expected_tokens(cfg.num_tokens, cfg.preset.tokens)
    amount = f"{total:,} tokens"
    if total < cfg.preset.tokens:
        amount += f" of {cfg.preset.tokens:,.0f} (--num_tokens=all takes all)"
    say(f"{cfg.name}: {amount}, about {size_text(total * encoded.ids.itemsize)} on disk; "
        f"{time_text(cfg, total, rate)} by {cfg.world_size} × {cfg.processes} processes, "
        f"if reading keeps up: {rate:,.0f} tokens/s per process, measured on a sample "
        "(prepare.py --estimate measures the data itself)")


def estimate(cfg, sample=8 << 20, seconds=20):
    """
    Measure the front of the data in this process: `sample` bytes, or for so many seconds. Writes
    nothing. Prints tokens, disk space and time, and returns tokens and disk_bytes in a dict;
    None where the size of the data is not known.
    """
    source = open_source(cfg)
    tokenizer = Tokenizer(cfg.tokenizer)
    source_bytes = text_bytes = tokens = 0
    began = time.time()
    with tqdm(total=sample, unit="B", unit_scale=True, desc="measuring") as bar:
        for block in source.blocks(None):
            e = encode_block(block, cfg)
            tokens += len(e.ids)
            text_bytes += int(e.sizes.sum())
            source_bytes += block.size
            bar.update(block.size)
            if source_bytes >= sample or time.time() - began > seconds:
                break
    rate = tokens / (time.time() - began)
    if not tokens:
        raise UserError("the front of the data holds no text to measure")
    size = cfg.preset.tokens
    if source.files:
        size = text_size(source.files, cfg.text_column) * tokens / source_bytes
    total = expected_tokens(cfg.num_tokens, size)
    say(f"{source.name}: measured on its first {size_text(text_bytes)} of text, "
        f"{text_bytes / tokens:.2f} bytes/token, {rate:,.0f} tokens/s per process")
    if not total:
        say("its size is not known: give --num_tokens")
        return None
    disk_bytes = total * tokenizer.dtype.itemsize
    say(f"tokens  {total:.3g}\ndisk    {size_text(disk_bytes)} as {tokenizer.dtype}\n"
        f"time    {time_text(cfg, total, rate)} by {cfg.world_size} × {cfg.processes} processes, "
        "if reading keeps up")
    return dict(tokens=total, disk_bytes=disk_bytes)


def inspect(path):
    """Print what a prepared folder holds, and check its files against their checksums."""
    data = Data(path)
    meta = data.meta
    say(f"{path}: {meta['dataset']} from {meta['source']}, "
        f"{meta['tokenizer']} tokens ({meta['dtype']}); {describe(meta)}")
    splits = (("train", data.train), ("val", data.val))
    with tqdm(total=sum(len(ids) for _, ids in splits), unit="tok", unit_scale=True,
              desc="reading", delay=1) as bar:
        lengths = {split: check_split(data, split, bar) for split, _ in splits}
    for split, ids in splits:
        if not len(ids):
            continue
        say(f"\n{split}: {meta[split]['bytes'] / len(ids):.2f} bytes/token; tokens per document, "
            f"median {np.median(lengths[split]):,.0f}")
        counts = np.bincount(np.log2(lengths[split]).astype(int))
        for power in np.flatnonzero(counts):
            stars = "█" * round(50 * counts[power] / counts.max())
            say(f"  {1 << power:>9,} – {(2 << power) - 1:>9,} {counts[power]:>10,} {stars}")
        for a in np.linspace(0, max(0, len(ids) - 60), 3).astype(int):
            say(f"  at {a:,}: {data.tokenizer.decode(ids[a:a + 60])!r}")
    files = meta["train"]["files"] + meta["val"]["files"]
    say(f"\nchecksums of {len(files)} files are right")


def check_split(data, split, bar):
    """
    Read all files of a split. Returns the lengths of its documents, in tokens; raises UserError
    for a wrong checksum or another number of documents than meta.json says.
    """
    about = data.meta[split]
    dtype = np.dtype(data.meta["dtype"])
    ends = [np.zeros(1, np.int64)]  # positions in the split behind each document
    position = 0
    for file in about["files"]:
        path = os.path.join(data.path, file["name"])
        digest = xxhash.xxh3_64()
        with open(path, "rb") as f:
            while len(ids := np.fromfile(f, dtype, 1 << 24)):
                digest.update(ids.data)
                ends.append(np.flatnonzero(ids == data.separator) + position + 1)
                position += len(ids)
                bar.update(len(ids))
        if digest.hexdigest() != file["xxh3"]:
            raise UserError(f"{path} is damaged: its checksum is {digest.hexdigest()}, "
                            f"meta.json says {file['xxh3']}")
    ends = np.concatenate(ends)
    if len(ends) - 1 != about["documents"] or ends[-1] != position:
        raise UserError(f"{data.path}: {split} holds {len(ends) - 1} whole documents, "
                        f"meta.json says {about['documents']}")
    return np.diff(ends)
