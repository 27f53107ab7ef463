"""
The texts that eval.py measures on. --data names them, separated by commas; each is

    a prepared folder    data/demo                 its validation tokens
    a preset             wikitext-103, c4          from the Hugging Face hub, see prepare.py --list
    local text           notes.txt, 'x/*.jsonl'    .txt, .jsonl or .parquet, as prepare.py takes it

The last two are encoded on the spot with the checkpoint's tokenizer, as prepare.py would.
"""
import hashlib
import os

import numpy as np

from configurator import UserError, did_you_mean, say, to_json
from data import identity, read_meta


def kind_of_text(name):
    """What a name of a text means: "folder", "preset" or "files". Raises UserError."""
    if os.path.isdir(name):
        return "folder"
    # Here, and below: reading prepared data never imports the code that downloads it
    from localfiles import kind_of
    from sources import PRESETS
    if name in PRESETS:
        return "preset"
    if kind_of(name)[0] or "*" in name:
        return "files"
    raise UserError(f"data {name!r} is no prepared folder, no preset (python prepare.py --list) "
                    f"and no .txt, .jsonl or .parquet file{did_you_mean(name, PRESETS)}")


def meta_checksum(meta):
    """The same for data of the same tokens, wherever it lies. meta: that of a prepared folder."""
    return hashlib.sha256(to_json(identity(meta), sort_keys=True).encode()).hexdigest()


def text_files(name):
    """The files of local text; [] of a folder or a preset. Raises UserError for any other name."""
    if os.path.isfile(name):
        return [name]
    if kind_of_text(name) != "files":
        return []
    from sources import local_files
    return local_files(name)


def identify(name):
    """
    What tells a text, or a file, from another one of this name, for eval.json: the checksum of its
    content; of a preset the name. Reads all of it. Raises UserError.
    """
    paths = text_files(name)
    if not paths and os.path.isdir(name):
        meta = read_meta(name)
        return meta and meta_checksum(meta)
    if not paths:
        return name
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{os.path.getsize(path)} bytes: ".encode())
        with open(path, "rb") as f:
            while part := f.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def open_text(name, tokenizer, instead, source=""):
    """
    (PrepareConfig, Source) of a preset or of local text.
    source: where to read the preset from, see prepare.py. instead: what to do without network, for
    the message. Raises UserError.
    """
    from prepare import PrepareConfig
    from sources import PRESETS, open_source
    # A preset may be what the model was trained on: only what prepare.py holds out of it is read
    held_out = 0 if name in PRESETS else 1  # 0 = the preset's own share
    cfg = PrepareConfig(dataset=name, source=source, tokenizer=tokenizer.name, num_proc=1,
                        val_fraction=held_out, rank=0, world_size=1)
    try:
        return cfg, open_source(cfg)
    except UserError as e:
        reason, without, _ = str(e).partition(" Without network:")  # what follows is prepare.py's
        if not without:
            raise
        raise UserError(f"{reason} Without network: {instead}") from None


def encode_text(name, tokenizer, max_tokens=0):
    """
    The ids of a preset or of local text, each document followed by a separator: 1-D array.
    max_tokens: how many to read, 0 = all. Raises UserError.
    """
    from encode import encode_blocks
    cfg, source = open_text(name, tokenizer, "give --data=FILE, a .txt, .jsonl or .parquet")
    parts = [np.empty(0, tokenizer.dtype)]
    total = rows = broken = repaired = 0
    fault = ""
    for _, block in encode_blocks(source.blocks(None), cfg):
        kept = np.repeat(block.held_out, block.lengths)  # (tokens of the block,)
        parts.append(block.ids[kept])
        total += len(parts[-1])
        rows += block.counts["rows"]
        broken += block.counts["broken"]
        repaired += block.counts["repaired"]
        fault = fault or block.fault
        if max_tokens and total >= max_tokens:
            break
    if repaired:
        say(f"{name}: {repaired} of {rows} rows were no valid text and were repaired")
    if broken:
        fault = fault or f"{broken} of {rows} rows hold no text {cfg.text_column!r}"
    if not total:
        raise UserError(f"{name} holds no text to predict: {fault or 'it is empty'}")
    if fault:
        say(f"{name}: {fault}")
    return np.concatenate(parts)[:max_tokens or None]
