"""
Where text comes from: presets, local files, streams from the Hugging Face hub, the demo's own text.

    source = open_source(cfg)            # cfg: prepare.PrepareConfig
    for block in source.blocks(None):    # or source.blocks(block.state): what follows that block
        for text in block_texts(block, cfg.text_column, counts): ...

A source yields Blocks of documents (localfiles.py): about a megabyte of local files, 200 rows of a
stream, one file of the demo. Each block carries the state from which the rest can be read: plain
JSON, whose form is each source's own business.
"""
import functools
import glob
import os
import platform
import random
import re
import sysconfig
import urllib.request
from typing import Callable, NamedTuple

import localfiles
from configurator import UserError
from data import passkey_line, random_passkey
from localfiles import Block, block_texts, file_blocks, first_line, kind_of, strings, warn


class Preset(NamedTuple):
    sources: tuple  # hub ids, tried in order; or a URL in which {} stands for a line of `listing`
    config: str = ""
    split: str = "train"
    column: str = "text"
    # Rows are lines: join them into articles. A title " = Title = " begins an article.
    articles: bool = False
    val_fraction: float = 0.005
    tokens: float = 0  # approximate number, as its publishers or the guide give it
    listing: str = ""
    note: str = ""


TOGETHER = "https://data.together.xyz/redpajama-data-v2/v1.0.0/"
PRESETS = {
    "demo": Preset((), val_fraction=0.1, tokens=8e6,
                   note="Python's standard library and pass-key documents, no network"),
    "slimpajama": Preset(("cerebras/SlimPajama-627B", "gmongaras/SlimPajama-627B_Reupload"),
                         tokens=627e9, note="the recommended one"),
    "slimpajama-6b": Preset(("DKYoon/SlimPajama-6B",), tokens=6e9, note="a sample of it"),
    "redpajama-v2": Preset((TOGETHER + "documents/{}.json.gz",), column="raw_content", tokens=30e12,
                           listing=TOGETHER + "listings/en-2023-06-head_middle.txt",
                           note="English head and middle of the crawl 2023-06; all crawls: 30e12"),
    "pile": Preset(("monology/pile-uncopyrighted", "EleutherAI/the_pile_deduplicated"),
                   tokens=300e9, note="22 domains"),
    "fineweb": Preset(("HuggingFaceFW/fineweb",), config="default", tokens=15e12,
                      note="CommonCrawl, filtered"),
    "fineweb-10b": Preset(("HuggingFaceFW/fineweb",), config="sample-10BT", tokens=10e9,
                          note="a sample of it"),
    "wikitext-103": Preset(("Salesforce/wikitext",), config="wikitext-103-raw-v1", split="test",
                           articles=True, val_fraction=1.0, tokens=2.5e5,
                           note="evaluation; --split train has 1e8"),
    "c4": Preset(("allenai/c4",), config="en", split="validation", val_fraction=1.0, tokens=1.7e8,
                 note="evaluation"),
    "lambada": Preset(("EleutherAI/lambada_openai",), config="default", split="test",
                      val_fraction=1.0, tokens=4.5e5, note="evaluation"),
}


class Source(NamedTuple):
    name: str  # what the data is, for meta.json
    files: list  # its local files
    blocks: Callable  # state (None: the beginning) -> iterator of Block


# --------------------------------------------------------------------------------------------------
# The demo's text

def passkey_document(rng, filler):
    """
    A synthetic document from which looking up is learnt: 1 to 4 facts, and many questions. A
    question is the fact once more, predictable from its "=" on. Lines stand at irregular distances,
    or a model would learn the distances instead of looking up.

    Four of five documents teach looking up: most are short, and a few dots keep the lines apart.
    The fifth teaches reaching far, see far_document. filler: a text of at least 450 characters.
    """
    facts = dict(random_passkey(rng) for _ in range(rng.choice((1, 2, 3, 4))))
    if rng.random() < 0.2:
        return far_document(rng, facts, filler)
    length = 40 * 8 ** rng.random()
    untold = list(facts)
    told = []
    text = ""
    while len(text) < length:
        if untold and (not told or rng.random() < 0.4):
            name = untold.pop()
            told.append(name)
        else:
            name = rng.choice(told)
        text += rng.randint(0, 6) * "." + "\n" + passkey_line(name, facts[name])
    return text


def far_document(rng, facts, filler):
    """All facts {name: key}, then rounds: a stretch of filler, and each fact is asked once."""
    length = rng.randint(300, 700)
    text = "".join(passkey_line(name, facts[name]) for name in facts)
    while len(text) < length:
        stretch = rng.randint(30, 450)
        at = rng.randint(0, len(filler) - stretch)
        text += filler[at:at + stretch] + "\n"
        for name in rng.sample(list(facts), len(facts)):
            text += passkey_line(name, facts[name])
    return text


def demo_blocks(seed, share, state):
    """
    The source of the installed standard library, a file per block, each with about three times as
    much pass-key text. state: the number of files read.
    """
    root = sysconfig.get_path("stdlib")
    paths = sorted(glob.glob(root + "/**/*.py", recursive=True))
    other = re.compile(r"site-packages|dist-packages|/test|/idlelib|/lib2to3")
    paths = [p for p in paths if not other.search(p[len(root):])]
    random.Random(seed).shuffle(paths)
    rank, world_size = share
    for i in range(state or 0, len(paths)):
        if i % world_size != rank:
            continue
        with open(paths[i], encoding="utf-8", errors="replace") as f:
            text = f.read()
        rng = random.Random(f"{seed} {i}")
        filler = text.ljust(450)
        facts = [passkey_document(rng, filler) for _ in range(len(text) // 70 + 1)]
        yield Block("texts", [text] + facts, i + 1, len(text) + sum(map(len, facts)))


# --------------------------------------------------------------------------------------------------
# Streams from the hub, articles

def table_blocks(stream, column, share, state):
    """Blocks of a datasets.IterableDataset. state: its state_dict."""
    from datasets.distributed import split_dataset_by_node
    stream = stream.with_format("arrow")
    if share[1] > 1:
        stream = split_dataset_by_node(stream, *share)
    batches = None
    while True:
        try:
            if batches is None:
                if state:
                    stream.load_state_dict(state)
                batches = stream.iter(batch_size=localfiles.ROWS)
            table = next(batches, None)
        except Exception as e:
            # The network failed, or a shard is broken. datasets has retried on its own; then it
            # raises one of a dozen types.
            raise UserError(f"the stream broke off ({first_line(e)}): "
                            "the same command goes on from here, "
                            "unless a file of the source is damaged") from None
        if table is None:
            return
        if column not in table.column_names:
            raise UserError(f"no column {column!r} in the data, "
                            f"only {', '.join(table.column_names)}: set --text_column")
        texts = table[column]
        yield Block("texts", strings(texts), stream.state_dict(), texts.nbytes)


def article_blocks(blocks, column, share, state):
    """
    Join the lines that another source yields into articles, each from a title " = Title = " on.
    blocks: that source's, state -> iterator of Block.
    state: that source's, the lines of the article begun, and the number of the block.
    """
    state = state or {"stream": None, "begun": [], "number": 0}
    begun = list(state["begun"])
    number = state["number"]
    last = state["stream"]
    rank, world_size = share
    for block in blocks(last):
        last = block.state
        articles = []
        for text in block_texts(block, column, {}):
            if text is None:
                articles.append(None)  # a broken row, to be counted
                continue
            for line in text.splitlines(keepends=True):
                if line.startswith(" = ") and not line.startswith(" = = ") and begun:
                    articles.append("".join(begun))
                    begun = []
                begun.append(line)
        number += 1
        if number % world_size == rank:
            if block.kind != "fault":
                block = Block("texts", articles, None, block.size)
            state = dict(stream=last, begun=list(begun), number=number)
            yield block._replace(state=state)
    if begun and (number + 1) % world_size == rank:
        yield Block("texts", ["".join(begun)], dict(stream=last, begun=[], number=number + 1))


# --------------------------------------------------------------------------------------------------
# Which source a setting means

def local_files(path):
    """
    The files of a path, folder or glob, sorted. [] for a hub id: a path without files that does not
    look like one of the file system. A link is followed if it leads to a file inside the folder
    that was named, or if the path names the link itself.
    """
    paths = [path] if os.path.isfile(path) else _files_in(path)
    is_local = kind_of(path)[0] or "*" in path or path.startswith(("/", ".")) or os.path.isdir(path)
    if not paths and is_local:
        raise UserError(f"no file matches {path}")
    kinds = {kind_of(p)[0] for p in paths}
    if None in kinds or len(kinds) > 1:
        raise UserError(f"{path}: local data must be .txt, .jsonl or .parquet files of one kind "
                        "(.txt and .jsonl also as .gz or .zst)")
    return paths


def _files_in(path):
    """The files of a folder or glob, each once, without those that links outside it lead to."""
    root = re.split(r"[*?\[]", path)[0]
    pattern = path
    if os.path.isdir(path):
        root = os.path.join(path, "")
        pattern = os.path.join(glob.escape(path), "**")
    root = os.path.join(os.path.realpath(os.path.dirname(root)), "")
    found = [p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
    inside = [p for p in found if os.path.realpath(p).startswith(root)]
    if len(inside) < len(found):
        outside = min(set(found) - set(inside))
        warn(f"{len(found) - len(inside)} links lead out of {root} and are not followed, "
             f"{outside} for one: name such a file itself")
    names = {}  # the file itself -> the name it goes by: its own, or else that of a link to it
    for p in sorted(inside):
        file = os.path.realpath(p)
        if file not in names or file == os.path.abspath(p):
            names[file] = p
    if len(names) < len(inside):
        warn(f"{len(inside) - len(names)} links in {root} lead to files that are read anyway")
    return sorted(names.values())


def open_source(cfg, known=None):
    """
    The Source of the data that cfg names.
    known: the hub id that an earlier run of this pass read.
    """
    share = cfg.rank, cfg.world_size
    if cfg.dataset == "demo":
        return Source(f"Python {platform.python_version()}", [],
                      functools.partial(demo_blocks, cfg.seed, share))
    where = cfg.source or cfg.dataset
    paths = local_files(where) if cfg.source or cfg.dataset not in PRESETS else []
    inner = (0, 1) if cfg.preset.articles else share  # article_blocks shares out whole articles
    if paths:
        name = f"{len(paths)} files of {sum(map(os.path.getsize, paths))} bytes"
        blocks = functools.partial(file_blocks, paths, cfg.text_column, inner)
    else:
        name, stream = hub_stream(cfg, known)
        blocks = functools.partial(table_blocks, stream, cfg.text_column, inner)
    if cfg.preset.articles:
        blocks = functools.partial(article_blocks, blocks, cfg.text_column, share)
    return Source(name, paths, blocks)


def hub_stream(cfg, known):
    """(hub id, datasets.IterableDataset) of the first of a preset's hub ids that can be read."""
    import datasets  # slow to import, and not needed above
    datasets.disable_progress_bars()
    datasets.config.STREAMING_READ_MAX_RETRIES = 20
    datasets.config.STREAMING_READ_RETRY_INTERVAL = 5  # seconds
    errors = []
    hub_ids = (cfg.source,) if cfg.source else cfg.preset.sources
    for hub_id in hub_ids:
        if known not in (None, hub_id):
            continue
        try:
            if cfg.preset.listing:
                with urllib.request.urlopen(cfg.preset.listing, timeout=60) as f:
                    addresses = [hub_id.format(line) for line in f.read().decode().split()]
                stream = datasets.load_dataset("json", data_files=addresses, split="train",
                                               streaming=True)
            else:
                stream = datasets.load_dataset(hub_id, cfg.config or None, split=cfg.split,
                                               streaming=True)
            return hub_id, stream
        except Exception as e:  # datasets raises a dozen types for "not there" and "no network"
            errors.append(f"{hub_id}: {first_line(e)}")
    raise UserError(f"cannot load {'; '.join(errors)}. Without network: --dataset demo, "
                    "or a local .txt, .jsonl or .parquet")
