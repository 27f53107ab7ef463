"""
Where text comes from: presets, local files, streams from the Hugging Face hub, the demo's own text.

    source = open_source(cfg)            # cfg: prepare.PrepareConfig
    for block in source.blocks(None):    # or source.blocks(block.state): what follows that block
        for text in block_texts(block, cfg.text_column, counts): ...

A source yields blocks of documents, about a megabyte each. Each block carries the state from which
the rest can be read. A damaged file loses the text behind the damage, never the text before it.
"""
import codecs
import functools
import glob
import importlib
import itertools
import json
import os
import platform
import random
import re
import sys
import sysconfig
import urllib.request
import zlib
from typing import Callable, NamedTuple

from configurator import UserError
from data import passkey_document

try:
    import orjson
except ImportError:  # optional: json is enough, and slower
    orjson = None

BLOCK = 1 << 20  # bytes of documents in a block
ROWS = 200  # rows of a table read at a time
CHUNK = 1 << 16  # bytes of a compressed file read at a time
HEAD = 1 << 16  # bytes at the front of a file that tell its encoding and form
SHORTEST, LONGEST = 1 << 16, 1 << 20  # bytes: a long plain text is cut into documents of such sizes
LONGEST_VALUE = 1 << 24  # characters of a JSON value that goes over several lines


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


class Block(NamedTuple):
    """
    kind     what data is
    "texts"  a list of str, None where a row holds no text
    "raw"    a list of bytes, each the text of a document
    "lines"  bytes of JSON lines
    "fault"  (name of a count, how many, a sentence for the user):
             a file that is damaged, for example
    """
    kind: str
    data: object
    state: object  # JSON: where the source goes on behind this block


class Source(NamedTuple):
    name: str  # what the data is, for meta.json
    files: list  # its local files
    blocks: Callable  # state (None: the beginning) -> iterator of Block


def optional(module, package=None):
    """A module of an optional package (of the same name), or one line that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this needs a package: pip install {package or module}") from None


def warn(sentence):
    """A line on stderr about something that does not stop the work."""
    print(f"warning: {sentence}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# The demo's text

def demo_blocks(seed, share, state):
    """
    The source of the installed standard library, a file per block,
    each with about three times as much pass-key text.
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
        yield Block("texts", [text] + facts, i + 1)


# --------------------------------------------------------------------------------------------------
# Local text files: decompressed, as UTF-8, one JSON value a line

ENDING = re.compile(r"\.(txt|jsonl?|parquet)(\.gz|\.zst)?$", re.I)
# (byte-order mark, encoding); None stands for UTF-8. The first mark that fits counts. UTF-32-LE's
# mark begins with UTF-16-LE's mark, so UTF-32-LE comes first.
MARKS = ((b"\xef\xbb\xbf", None), (b"\xff\xfe\0\0", "utf-32-le"), (b"\0\0\xfe\xff", "utf-32-be"),
         (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))


def kind_of(path):
    """
    (txt | json | parquet, "" | .gz | .zst) by the ending of the file's own name;
    (None, "") for other names.
    """
    found = ENDING.search(os.path.basename(path))
    if not found:
        return None, ""
    kind = found.group(1).lower()
    return "json" if kind == "jsonl" else kind, (found.group(2) or "").lower()


class TextFile:
    """
    A local .txt or .json file, read as UTF-8.
    Once it is read, `damage` says why it broke off, or is "".
    """

    def __init__(self, path):
        self.path = path
        self.damage = ""
        self.packed_bytes = 0  # of a compressed file: how much of it has been read
        self.kind, self.packing = kind_of(path)

    def chunks(self, offset=0):
        """
        Yield its text from byte `offset` of the UTF-8 text on, as bytes in pieces of any size.
        """
        head = b""
        for piece in self._unpacked(0):
            head += piece
            if len(head) >= HEAD:
                break
        mark, encoding = next(((m, e) for m, e in MARKS if head.startswith(m)), (b"", None))
        if encoding:
            head = head[len(mark):].decode(encoding, "replace").encode()
        else:
            head = head[len(mark):]
        array = self.kind == "json" and _spans_lines(head)
        if not encoding and not array:
            yield from self._unpacked(len(mark), offset)
            return
        stream = self._unpacked(len(mark))
        if encoding:
            stream = _recoded(stream, encoding)
        if array:
            stream = self._one_value_a_line(stream)
        yield from _skip(stream, offset)

    def _unpacked(self, mark, offset=0):
        """
        Yield the file's bytes, decompressed, from mark + offset on. The pieces end where they end
        for offset 0: a pass that is taken up again must cut the same blocks.
        """
        self.damage = ""
        try:
            if self.packing:
                yield from _skip(self._decompressed(), mark + offset)
                return
            with open(self.path, "rb") as f:
                skip = offset % BLOCK
                f.seek(mark + offset - skip)
                while piece := f.read(BLOCK):
                    yield piece[skip:]
                    skip = 0
        except OSError as e:
            raise UserError(f"{self.path} cannot be read: {e.strerror or e}") from None

    def _decompressed(self):
        """
        Yield what the file holds up to its end or its first damage.
        A decompressor that meets damage keeps back what came before it in the same call. So the
        file is then read a second time, and the bytes around the damage are fed to it one by one.
        """
        done = 0
        for piece in self._fed(careful_from=None):
            done += len(piece)
            yield piece
        if self.damage and self.bad_chunk is not None:
            yield from _skip(self._fed(careful_from=self.bad_chunk), done)

    def _fed(self, careful_from):
        """
        Decompress in chunks of CHUNK bytes,
        from byte careful_from of the file on in single bytes.
        """
        self.bad_chunk = None
        self.damage = ""
        unpack = _decompressor(self.packing)
        begun = False  # inside a gzip member or zstd frame
        padding = False  # behind a gzip member, where zeros may pad the file
        with open(self.path, "rb") as f:
            while True:
                at = f.tell()
                careful = careful_from is not None and at >= careful_from
                packed = f.read(1 if careful else CHUNK)
                self.packed_bytes = f.tell()
                if not packed:
                    self.damage = "it breaks off" if begun else ""
                    return
                while packed:
                    if padding:
                        packed = packed.lstrip(b"\0")
                        if not packed:
                            break
                    try:
                        piece = unpack.decompress(packed)
                    except Exception as e:  # zlib.error, zstandard.ZstdError
                        self.damage = f"it cannot be decompressed: {_line(e)}"
                        self.bad_chunk = at
                        return
                    if piece:
                        yield piece
                    begun = not unpack.eof
                    padding = unpack.eof and self.packing == ".gz"
                    packed = b""
                    if unpack.eof:  # another member or frame may follow
                        packed = unpack.unused_data
                        unpack = _decompressor(self.packing)

    def _one_value_a_line(self, stream):
        """
        JSON values over any number of lines, in an array or one after the other -> JSON lines.
        """
        decoder = json.JSONDecoder()
        between = re.compile(r"[\s,\[\]]*")
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        text = ""
        for piece in stream:
            text += utf8.decode(piece)
            at = 0
            while True:
                at = between.match(text, at).end()
                try:
                    value, at = decoder.raw_decode(text, at)
                except (ValueError, RecursionError):
                    break  # the rest of this value is still to come, or the value is broken
                yield json.dumps(value).encode() + b"\n"
            text = text[at:]
            if len(text) > LONGEST_VALUE:
                break
        if text[between.match(text).end():]:
            self.damage = self.damage or "its JSON is broken"


def _spans_lines(head):
    """
    Does a JSON file begin with an array or object that goes over several lines,
    rather than with one value a line?
    """
    text = head.decode("utf-8", "replace").lstrip()
    line, _, rest = text.partition("\n")
    if _json_values(line) is not None:
        return False
    if not rest:
        return text.startswith("[")  # an array on one line that is longer than the head
    try:
        return json.JSONDecoder().raw_decode(text)[1] > len(line)
    except (ValueError, RecursionError):
        pass  # the value is longer than the head, or the first line is broken
    try:
        json.loads(rest.partition("\n")[0])
        return False  # a line that is whole: one value a line
    except (ValueError, RecursionError):
        return text.startswith("[")


def _decompressor(packing):
    """
    A new object that takes the bytes of one gzip member or zstd frame by decompress();
    then eof is True.
    """
    if packing == ".gz":
        return zlib.decompressobj(wbits=31)  # 31: with gzip's header and checksum
    return optional("zstandard").ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _recoded(stream, encoding):
    """Bytes in another encoding -> bytes in UTF-8."""
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    for piece in stream:
        yield decoder.decode(piece).encode("utf-8", "replace")


def _skip(stream, n):
    """A stream of bytes without its first n."""
    for piece in stream:
        if n < len(piece):
            yield piece[n:]
        n = max(0, n - len(piece))


def _line(e):
    """The first line of an exception's message."""
    return (str(e) or type(e).__name__).strip().splitlines()[0]


# --------------------------------------------------------------------------------------------------
# Local files to pieces: (data of a Block, its size in bytes, the offset behind it)

BLANK = re.compile(rb"\n[ \t\r]*\n")


def cut_text(data, last):
    """
    Documents at the front of `data`, bytes of plain text, and how many bytes they take.
    last: no more of the text follows.
        Otherwise at least LONGEST bytes are left over, to be cut later.
    A document ends at a blank line where there is one, else at the end of a line,
    else behind a character.
    """
    docs, a = [], 0
    while len(data) - a > LONGEST or (last and a < len(data)):
        left = len(data) - a
        blank = BLANK.search(data, a + SHORTEST, a + LONGEST)
        if last and left <= SHORTEST:
            end = len(data)
        elif blank:
            end = blank.end()
        elif last and left <= LONGEST:
            end = len(data)
        else:
            end = data.rfind(b"\n", a + SHORTEST, a + LONGEST) + 1 or a + LONGEST
            while end > a + 1 and data[end] & 0xC0 == 0x80:  # inside a UTF-8 character
                end -= 1
        docs.append(data[a:end])
        a = end
    return docs, a


def text_pieces(file, offset):
    """Pieces of a plain text: lists of documents, as bytes."""
    data = b""
    for chunk in file.chunks(offset):
        data += chunk
        docs, used = cut_text(data, last=False)
        if docs:
            offset += used
            data = data[used:]
            yield docs, used, offset
    if file.damage:
        data = data[:data.rfind(b"\n") + 1]
    docs, used = cut_text(data, last=True)
    if docs:
        yield docs, used, offset + used


def line_pieces(file, offset):
    """Pieces of a file of JSON lines: bytes of whole lines."""
    data = b""
    for chunk in file.chunks(offset):
        data += chunk
        used = data.rfind(b"\n") + 1
        if used and len(data) >= BLOCK:
            offset += used
            yield data[:used], used, offset
            data = data[used:]
    # Half a line before the damage is no document.
    used = data.rfind(b"\n") + 1 if file.damage else len(data)
    if used:
        data = data[:used]
        yield data if data.endswith(b"\n") else data + b"\n", used, offset + used


def parquet_pieces(path, column, offset):
    """
    Pieces of a parquet file: lists of texts, None where a row holds none.
    offset: a row. Reads that column only.
    """
    import pyarrow.parquet  # comes with datasets
    with pyarrow.parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise KeyError(", ".join(file.schema_arrow.names))
        row = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row + rows <= offset:
                row += rows
                continue
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=[column]):
                texts = [t if isinstance(t, str) else None for t in batch.column(0).to_pylist()]
                skip = max(0, offset - row)
                row += len(texts)
                if skip < len(texts):
                    texts = texts[skip:]
                    yield texts, sum(len(t) for t in texts if t), row


def file_pieces(path, column, offset):
    """
    (kind of Block, data, bytes, offset behind it) of one local file from an offset on.
    Where the file is damaged the last of them is a "fault",
    and everything before the damage has come.
    """
    kind, _ = kind_of(path)
    done = offset
    fault = None
    if kind == "parquet":
        pieces = parquet_pieces(path, column, offset)
        try:
            for data, size, done in pieces:
                yield "texts", data, size, done
        except KeyError as e:
            fault = ("files without the column",
                     f"{path} has no column {column!r} in the data, only {e.args[0]}")
        except OSError as e:
            # pyarrow's own errors about a damaged file are OSErrors too, but they have no number.
            if e.errno:
                raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
            fault = "damaged files", f"{path} is damaged: {_line(e)}"
        except Exception as e:
            # pyarrow raises several types for a file that is damaged or no parquet file.
            fault = "damaged files", f"{path} is damaged or no parquet file: {_line(e)}"
    else:
        file = TextFile(path)
        read = text_pieces if kind == "txt" else line_pieces
        for data, size, done in read(file, offset):
            yield "raw" if kind == "txt" else "lines", data, size, done
        if file.damage:
            fault = ("damaged files",
                     f"{path} is damaged ({file.damage}): what comes before the damage is kept")
    if fault:
        name, sentence = fault
        yield "fault", (name, 1, sentence), 0, done


def gathered(paths, column, i, offset):
    """
    The pieces of paths[i] from an offset on and of all files after it,
    joined to blocks: (kind, data, [file, offset]).
    """
    kind = data = None
    size = 0
    at = [i, offset]
    for i in range(i, len(paths)):
        for piece_kind, piece, n, offset in file_pieces(paths[i], column, offset):
            if piece_kind == "fault":
                if data:
                    yield kind, data, at
                data, size = None, 0
                at = [i + 1, 0]
                yield "fault", piece, at
                continue
            kind = piece_kind
            data = data + piece if data else piece
            size += n
            at = [i, offset]
            if size >= BLOCK:
                yield kind, data, at
                data, size = None, 0
        offset = 0
    if data:
        yield kind, data, at


def file_blocks(paths, column, share, state):
    """
    Blocks of local files. state: [file, offset in it, number of the block].
    A machine takes every world_size-th file or,
    where there are fewer files than machines, every world_size-th block.
    """
    i, offset, number = state or (0, 0, 0)
    rank, world_size = share
    if len(paths) >= world_size:
        paths = paths[rank::world_size]
        rank, world_size = 0, 1
    for kind, data, after in gathered(paths, column, i, offset):
        number += 1
        if number % world_size == rank:
            yield Block(kind, data, [*after, number])


# --------------------------------------------------------------------------------------------------
# Streams, articles, texts

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
                batches = stream.iter(batch_size=ROWS)
            table = next(batches, None)
        except Exception as e:
            # The network failed, or a shard is broken. datasets has retried on its own; then it
            # raises one of a dozen types.
            raise UserError(f"the stream broke off ({_line(e)}): "
                            "the same command goes on from here, "
                            "unless a file of the source is damaged") from None
        if table is None:
            return
        if column not in table.column_names:
            raise UserError(f"no column {column!r} in the data, "
                            f"only {', '.join(table.column_names)}: set --text_column")
        texts = [t if isinstance(t, str) else None for t in table[column].to_pylist()]
        yield Block("texts", texts, stream.state_dict())


def article_blocks(blocks, column, share, state):
    """
    Join the lines that another source yields into articles, each from a title " = Title = " on.
    state: the other source's, the lines of the article begun, and the number of the block.
    """
    state = state or {"stream": None, "begun": [], "number": 0}
    begun, number = list(state["begun"]), state["number"]
    rank, world_size = share
    last = state["stream"]
    for block in blocks(state["stream"]):
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
            state = dict(stream=last, begun=list(begun), number=number)
            if block.kind == "fault":
                yield block._replace(state=state)
            else:
                yield Block("texts", articles, state)
    if begun and (number + 1) % world_size == rank:
        yield Block("texts", ["".join(begun)], dict(stream=last, begun=[], number=number + 1))


def _json_values(line):
    """The JSON values of a line, several or a list of them too; None where it is broken."""
    # orjson is fast. json, slower, also takes NaN and lone surrogates.
    for loads in (orjson.loads, json.loads) if orjson else (json.loads,):
        try:
            value = loads(line)
            return value if isinstance(value, list) else [value]
        except (ValueError, RecursionError):
            pass
    values, at = [], 0
    decoder = json.JSONDecoder()
    line = line.strip()
    while at < len(line):
        try:
            value, at = decoder.raw_decode(line, at)
        except (ValueError, RecursionError):
            return None
        values.append(value)
        at += len(line[at:]) - len(line[at:].lstrip(" \t\r,"))
    return values or None


def block_texts(block, column, counts):
    """
    Yield the block's documents as str, None where a row holds no text.
    counts: a dict in which is counted what was repaired, and why a row holds no text.
    """
    def count(name):
        counts[name] = counts.get(name, 0) + 1
    if block.kind == "texts":
        yield from block.data
    elif block.kind == "raw":
        for raw in block.data:
            try:
                yield raw.decode()
            except UnicodeDecodeError:
                count("repaired")
                yield raw.decode(errors="replace")
    elif block.kind == "lines":
        for raw in block.data.split(b"\n"):
            try:
                line, mended = raw.decode(), False
            except UnicodeDecodeError:
                line, mended = raw.decode(errors="replace"), True
            if not line.strip():
                continue
            values = _json_values(line)
            if values is None:
                yield None
                continue
            for row in values:
                text = row.get(column) if isinstance(row, dict) else None
                if isinstance(row, dict) and column not in row:
                    count("no column")
                if mended and isinstance(text, str):
                    count("repaired")
                yield text if isinstance(text, str) else None


# --------------------------------------------------------------------------------------------------
# Which source a setting means

def local_files(path):
    """
    The files of a path, folder or glob, sorted; [] if there are none, and it looks like a hub id.
    A link is followed inside the folder that was named, or where the path names the link itself.
    """
    if os.path.isfile(path):
        paths = [path]
    else:
        if os.path.isdir(path):
            root, pattern = path, os.path.join(glob.escape(path), "**")
        else:
            root, pattern = os.path.dirname(re.split(r"[*?\[]", path)[0]), path
        root = os.path.realpath(root)
        found = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
        inside = [p for p in found if os.path.realpath(p).startswith(os.path.join(root, ""))]
        if len(inside) < len(found):
            outside = next(p for p in found if p not in set(inside))
            warn(f"{len(found) - len(inside)} links lead out of {root} and are not followed, "
                 f"{outside} for one: name such a file itself")
        own_name_first = sorted(inside, key=lambda p: os.path.realpath(p) != os.path.abspath(p))
        by_file = {}
        for p in own_name_first:
            by_file.setdefault(os.path.realpath(p), p)
        paths = sorted(by_file.values())
        if len(paths) < len(inside):
            warn(f"{len(inside) - len(paths)} links in {root} lead to files that are read anyway")
    if not paths and (kind_of(path)[0]
                      or "*" in path
                      or path.startswith(("/", "."))
                      or os.path.isdir(path)):
        raise UserError(f"no file matches {path}")
    kinds = {kind_of(p)[0] for p in paths}
    packed_tables = any(kind_of(p)[0] == "parquet" and kind_of(p)[1] for p in paths)
    if None in kinds or len(kinds) > 1 or packed_tables:
        raise UserError(f"{path}: local data must be .txt, .jsonl or .parquet files of one kind "
                        "(.txt and .jsonl also as .gz or .zst)")
    return paths


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
        return [line.split("\t")[:columns] for line in text.splitlines()]
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


def open_source(cfg, known=None):
    """
    The Source of the data that cfg names.
    known: the hub id that an earlier run of this pass read.
    """
    share = cfg.rank, cfg.world_size
    if cfg.dataset == "demo":
        return Source(f"Python {platform.python_version()}", [],
                      functools.partial(demo_blocks, cfg.seed, share))
    inner = (0, 1) if cfg.preset.articles else share  # article_blocks shares out whole articles

    def source(name, paths, blocks):
        if cfg.preset.articles:
            blocks = functools.partial(article_blocks, blocks, cfg.text_column, share)
        return Source(name, paths, blocks)

    where = cfg.source or cfg.dataset
    paths = local_files(where) if cfg.source or cfg.dataset not in PRESETS else []
    if paths:
        name = f"{len(paths)} files of {sum(map(os.path.getsize, paths))} bytes"
        return source(name, paths, functools.partial(file_blocks, paths, cfg.text_column, inner))
    import datasets  # slow to import, and not needed above
    datasets.disable_progress_bars()
    datasets.config.STREAMING_READ_MAX_RETRIES = 20
    datasets.config.STREAMING_READ_RETRY_INTERVAL = 5  # seconds
    errors = []
    for hub_id in (cfg.source,) if cfg.source else cfg.preset.sources:
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
        except Exception as e:  # datasets raises a dozen types for "not there" and "no network"
            errors.append(f"{hub_id}: {_line(e)}")
            continue
        return source(hub_id, [], functools.partial(table_blocks, stream, cfg.text_column, inner))
    raise UserError(f"cannot load {'; '.join(errors)}. Without network: --dataset demo, "
                    "or a local .txt, .jsonl or .parquet")
