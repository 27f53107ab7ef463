"""
Text to tokens in one streaming pass:
documents -> filters -> tokenizer -> data/<name>/*.bin and meta.json.

    python prepare.py                  # 10e9 GPT-2 tokens of SlimPajama, from the Hugging Face hub
    python prepare.py --dataset demo   # no network: the standard library's source + pass-keys
    python prepare.py --dataset 'texts/*.jsonl.zst' --tokenizer meta-llama/Llama-3.1-8B
    python prepare.py --dataset fineweb --num_tokens 100e9 --language en --dedup near
    python prepare.py --dataset pile --shard_tokens 1e9    # train_000.bin, train_001.bin, …
    python prepare.py --list | --dataset pile --estimate | --inspect data/pile

The .bin files are flat arrays of token ids: uint16, or uint32 for a vocabulary above 65536. A
separator follows every document (encode.encode_block says why). Whether a document goes to val
depends on a hash of its text, not on its position (only a split that the hash leaves empty gets
the last document).
meta.json describes the files. While the pass runs, it also says how far the pass has got, so a pass
that was killed at any moment goes on when the same command is run again, and ends with the same
bytes. A pass writes only into a folder that it made or found empty, and removes only files that it
made.
On several machines: run the same command on each with --rank and --world_size, or under torchrun.
Then run it once more with --merge.

Where text comes from is in sources.py and localfiles.py, how a block of it becomes tokens in
encode.py, how the output survives a kill in folder.py, --list, --estimate and --inspect in
preview.py. Reading the result is in data.py.
"""
import contextlib
import os
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np
import xxhash  # comes with datasets
from tqdm import tqdm

from configurator import (UserError, check_ranges, environment, only_one, parse, replacing, run,
                          say, to_json)
from data import differences, read_meta
from encode import encode_blocks
from folder import Folder, Seen, Writer, changed_file, file_list, read_file_list
from localfiles import ENDING, text_size, warn
from preview import SPLITS, announce, describe, estimate, expected_tokens, inspect, show_presets
from sources import PRESETS, Preset, open_source
from tokenizer import Tokenizer, full_name

DEFAULT_TOKENS = 10_000_000_000  # config/gsa_small.py: 19,000 steps of half a million tokens


@dataclass
class PrepareConfig:

    # what to prepare
    # a preset (--list), a hub id, or a local .txt .jsonl .parquet file (also .gz, .zst),
    # folder or glob
    dataset: str = "slimpajama"
    # read the preset from here: another hub id, or local files of the same columns
    source: str = ""
    name: str = ""  # output folder under data_dir; default: the dataset's short name
    # gpt2 | cl100k_base | o200k_base | bytes | llama3:PATH | tiktoken:PATH | a Hugging Face model:
    # its hub id (meta-llama/Llama-3.1-8B), its folder or its tokenizer.json;
    # default: bytes for demo, else gpt2
    tokenizer: str = ""
    # stop after this many tokens, of all machines together: a number such as 10e9, or "all" (or 0);
    # default: 10e9 of a preset that has more (config/gsa_small.py trains on them), 8e6 of the demo,
    # all of everything else
    num_tokens: str = ""
    num_proc: int = 0  # tokenizer processes; 0 = one per core. Bytes without filters take one
    val_fraction: float = 0.0  # share of documents held out; 0 = the preset's, else 0.005
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
        # 1. defaults that depend on other settings
        self.preset = PRESETS.get(self.dataset, Preset((self.dataset,)))
        if self.rank < 0:
            self.rank = environment("RANK", 0)
        self.world_size = self.world_size or environment("WORLD_SIZE", 1)
        if not self.tokenizer:
            self.tokenizer = "bytes" if self.dataset == "demo" else "gpt2"
        self.tokenizer = full_name(self.tokenizer)
        self.text_column = self.text_column or self.preset.column
        self.config = self.config or self.preset.config
        self.split = self.split or self.preset.split
        self.val_fraction = self.val_fraction or self.preset.val_fraction
        self.num_tokens = token_limit(self.num_tokens, self.dataset)
        self.name = self.name or default_name(self.dataset)
        # 2. checks
        check_ranges(self, {
            (0, None): "shard_tokens seed min_chars max_chars rank commit_seconds",
            (0, 1): "val_fraction max_toxicity",
            (0, 1024): "num_proc",
            (1, 999): "world_size"})
        if self.merge and self.world_size == 1:
            raise UserError("merge needs --world_size, the number of machines that prepared parts")
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
        """The settings that decide the output's bytes. A pass that goes on must have the same."""
        rest = ("num_proc", "data_dir", "name", "merge", "commit_seconds",
                "list", "estimate", "inspect")
        return {k: v for k, v in asdict(self).items() if k not in rest}

    @property
    def processes(self):
        """
        The number of processes that encode. Bytes without slow filters take one: sending them to
        another process takes longer than encoding them.
        """
        slow_filters = self.language or self.max_toxicity or self.mask_pii or self.dedup == "near"
        if self.tokenizer == "bytes" and not slow_filters:
            return 1
        return self.num_proc or os.cpu_count()


def token_limit(given, dataset):
    """
    The setting num_tokens -> a number of tokens; 0 stands for no limit.
    "10e9" -> 10_000_000_000, "all" -> 0, "" -> the dataset's default.
    """
    if given == "all":
        return 0
    if given == "":
        published = PRESETS[dataset].tokens if dataset in PRESETS else 0
        if dataset == "demo":
            return int(published)
        return DEFAULT_TOKENS if published > DEFAULT_TOKENS else 0
    try:
        number = float(given)
    except (ValueError, OverflowError):
        number = -1.0
    if number < 0 or not number.is_integer():
        raise UserError(f"num_tokens is {given}, must be a whole number such as 10e9, or all")
    return int(number)


def default_name(dataset):
    """
    The last part of a dataset's name or path that is more than a wildcard, without the ending:
    "x/texts/*.jsonl.zst" -> "texts", "b.jsonl.zst" -> "b", "x/data-v1.5" -> "data-v1-5".
    """
    for part in reversed(dataset.split("/")):
        name = re.sub(r"[^\w-]+", "-", ENDING.sub("", part)).strip("-")
        if name:
            return name
    return "data"


# --------------------------------------------------------------------------------------------------
# The pass

def rank_folder(cfg, rank):
    """data/<name>, or one rank's part of it."""
    folder = os.path.join(cfg.data_dir, cfg.name)
    if cfg.world_size == 1:
        return folder
    return os.path.join(folder, f"rank_{rank:03d}_of_{cfg.world_size:03d}")


def check_parts_only(folder):
    """Refuse a folder for several machines that holds anything but their parts."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    foreign = [n for n in sorted(names)
               if not re.fullmatch(r"rank_\d{3}_of_\d{3}|meta\.json(\.partial)?", n)]
    if foreign:
        raise UserError(f"{folder} holds files that are not prepare.py's ({foreign[0]}): "
                        "choose another --name")
    read_meta(folder)  # refuses a meta.json that is not prepare.py's


def prepare(cfg):
    """
    Write this machine's data/<name>/, going on where an earlier pass stopped.
    Returns its meta dict.
    """
    # 1. the folder, the source and the tokenizer; do they fit each other?
    path = rank_folder(cfg, cfg.rank)
    if cfg.world_size > 1:
        check_parts_only(os.path.dirname(path))
    saved = Folder(path).meta
    hub_id = None
    if cfg.dataset in PRESETS and not cfg.source:
        if saved:
            hub_id = saved["source"]
        if not saved or not saved["complete"]:
            announce(cfg)  # now, since opening a large preset takes a while
    source = open_source(cfg, hub_id)
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

    # 2. the pass, while no other process works on the folder
    with only_one(path, "prepare.py"):
        folder = Folder(path)
        if folder.meta != saved:
            raise UserError(f"another prepare.py has just been at work on {path}: "
                            "run the command again")
        try:
            folder.begin(meta, files)
            finished = Pass(cfg, folder, source, tokenizer, meta).run()
        except UserError:
            if folder.meta["state"] is None:
                folder.remove()  # nothing was committed: there is nothing to go on from
            raise
        except OSError as e:
            raise UserError(f"{path}: {e.strerror or e}; the same command goes on from here "
                            "once that is mended") from None
    say(f"{path}: {describe(finished)}")
    return finished


def differing(old, new):
    """
    In words, the settings, source or vocabulary in which the passes of two meta dicts differ;
    "" if they agree.
    """
    sides = []
    for meta in (old, new):
        side = {**meta["flags"], "source": meta["source"], "rank": 0}
        if old["vocabulary"] == new["vocabulary"]:
            # The same file, perhaps at another path. Another kind splits text otherwise.
            side["tokenizer"] = meta["tokenizer"].partition(":")[0]
        elif old["tokenizer"] == new["tokenizer"]:
            side["vocabulary"] = meta["vocabulary"]
        sides.append(side)
    return differences(*sides)


def check_same_pass(path, saved, meta, files):
    """Refuse to go on with other settings, vocabulary or input files than the pass began with."""
    changed = differing(saved, meta)
    if saved["source_files"] != meta["source_files"]:
        changed = changed_file(read_file_list(path), files) or changed or "its input files"
    if changed:
        raise UserError(f"{path} was begun with other settings or data ({changed}): "
                        "choose another --name, or move it away")


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
        folder.forget_uncommitted()
        self.state = saved["state"]
        self.counts = Counter(saved["counts"])
        self.faults = []  # sentences about damaged files
        self.seen = Seen(folder, saved["seen"])
        self.writers = {}
        for split in SPLITS:
            self.writers[split] = Writer(folder, split, tokenizer.dtype, cfg.shard_tokens,
                                         saved[split])

    def run(self):
        try:
            self.read_source()
            self.fill_empty_split()
            self.commit()
        finally:
            for file in (*self.writers.values(), self.seen):
                file.close()
        return self.folder.finish(self.counts)

    def commit(self):
        """Put everything on the disk: a pass that is killed goes on from here."""
        splits = {split: writer.commit() for split, writer in self.writers.items()}
        # A copy of counts: the folder writes this dict again when a new file is begun.
        self.folder.write({**self.meta, "complete": False, **splits, "counts": dict(self.counts),
                           "seen": self.seen.commit(), "state": self.state})

    def read_source(self):
        """Encode and write from the saved state on, to the source's end or the limit of tokens."""
        cfg = self.cfg
        limit = float("inf")
        if cfg.num_tokens:
            limit = max(1, cfg.num_tokens // cfg.world_size)
        total = sum(w.totals["tokens"] for w in self.writers.values())
        if total >= limit:
            return
        progress = Progress(cfg, self.source, total)
        results = encode_blocks(self.source.blocks(self.state), cfg)
        last_commit = time.time()
        with progress.bar, contextlib.closing(results):
            for self.state, e in results:
                self.counts += e.counts
                if e.fault:
                    warn(e.fault)
                    self.faults.append(e.fault)
                # Seen at once, so that nobody waits for hours: not one row so far held a text.
                if self.counts["no column"] and self.counts["broken"] == self.counts["rows"]:
                    raise UserError(f"no column {cfg.text_column!r} in the data: set --text_column")
                seen = self.seen if cfg.dedup else None
                where = destinations(e, seen, self.counts, limit - total)
                n = write_documents(e, where, self.writers)
                total += n
                progress.update(n, e.source_bytes)
                if total >= limit:
                    break
                if time.time() - last_commit >= cfg.commit_seconds:
                    self.commit()
                    last_commit = time.time()

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
        empty, other = ("train", "val") if held["val"] else ("val", "train")
        warn(f"no document fell into {empty} by its hash: the last one of {other} goes there")
        ids, size = self.writers[other].take_last(self.tokenizer)
        self.writers[empty].add(ids, np.array([size]))
        self.commit()
        self.writers[other].cut_off()

    def nothing_left(self):
        """
        Why the pass ends without a document, in one line:
        what was read, what was dropped, and a likely cause.
        """
        counts = self.counts
        reasons = ("broken", "empty", "length", "language", "toxicity", "duplicate")
        dropped = "".join(f", {counts[name]:,} {name}" for name in reasons if counts[name])
        if self.faults:
            cause = self.faults[0]
        elif not counts["rows"] and self.cfg.world_size > 1:
            cause = (f"the share of rank {self.cfg.rank} is empty: "
                     "a smaller --world_size leaves some for each")
        elif not counts["rows"]:
            cause = "the data is empty"
        elif counts["broken"] == counts["rows"]:
            cause = (f"not one row is a JSON object, or a row of a table, "
                     f"whose {self.cfg.text_column!r} is a text")
        else:
            cause = "the rows are blank, or the filters drop them"
        return (f"no document is left of {self.source.name}: "
                f"{counts['rows']:,} rows read{dropped}; {cause}")


class Progress:
    """A bar of the tokens written, with the time left where the end is known or can be guessed."""

    def __init__(self, cfg, source, written):
        total = expected_tokens(cfg.num_tokens, cfg.preset.tokens) / cfg.world_size
        self.bar = tqdm(total=total or None, initial=written, unit="tok", unit_scale=True,
                        desc=cfg.name, mininterval=1)
        self.bytes_read = 0  # of the source, by this run
        self.bytes_in_all = 0  # of local files without a limit: from this the total is guessed
        if source.files and not cfg.num_tokens:
            self.bytes_in_all = text_size(source.files, cfg.text_column) / cfg.world_size

    def update(self, tokens, bytes_read):
        self.bytes_read += bytes_read
        if self.bytes_in_all and self.bytes_read:
            tokens_per_byte = (self.bar.n + tokens - self.bar.initial) / self.bytes_read
            self.bar.total = max(self.bar.n + tokens, self.bytes_in_all * tokens_per_byte)
        self.bar.update(tokens)


DROPPED = 2  # beside the indices of SPLITS


def destinations(e, seen, counts, room):
    """
    The index of its split, or DROPPED, for every document of an Encoded block.
    seen: a Seen, if duplicates are dropped. room: how many tokens may still be written.
    """
    where = e.held_out.astype(int)
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
    Append the documents of a block to their splits.
    Returns the number of tokens written.
    """
    ends = np.cumsum(e.lengths)
    starts = ends - e.lengths
    turns = np.flatnonzero(np.diff(where)) + 1  # documents whose destination is a new one
    total = 0
    # A run is documents a to b - 1: they stand side by side and go to the same split.
    for a, b in zip(np.append(0, turns), np.append(turns, len(where))):
        if a < b and where[a] != DROPPED:
            ids = e.ids[starts[a]:ends[b - 1]]
            writers[SPLITS[where[a]]].add(ids, e.sizes[a:b])
            total += len(ids)
    return total


def merge(cfg):
    """data/<name>/meta.json over the folders of all ranks, whose files stay where they are."""
    folder = os.path.join(cfg.data_dir, cfg.name)
    check_parts_only(folder)
    out = None
    for rank in tqdm(range(cfg.world_size), desc="merging", delay=1):
        path = rank_folder(cfg, rank)
        meta = read_meta(path)
        if not meta or not meta["complete"]:
            raise UserError(f"{path} is not complete: run prepare.py --rank={rank} "
                            f"--world_size={cfg.world_size} there first")
        files = read_file_list(path)
        for split in SPLITS:
            for file in meta[split]["files"]:
                file["name"] = f"{os.path.basename(path)}/{file['name']}"
        if out is None:
            out, first_files = meta, files
            continue
        changed = differing(out, meta) or changed_file(first_files, files, columns=2)
        if changed:
            raise UserError(f"{path} was prepared with other settings or data than rank 0 "
                            f"({changed})")
        out["counts"] = dict(Counter(out["counts"]) + Counter(meta["counts"]))
        for split in SPLITS:
            for key in ("documents", "tokens", "bytes", "files"):
                out[split][key] += meta[split][key]
    with replacing(os.path.join(folder, "meta.json")) as f:
        f.write(to_json(out, indent=1))
    say(f"{folder}: {describe(out)}")
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
