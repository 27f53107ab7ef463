"""
Local files: .txt, .jsonl, .json and .parquet, the text kinds also as .gz and .zst, whole or
damaged. Text is UTF-8, or UTF-16 or UTF-32 behind a byte-order mark.

    for block in file_blocks(["a.jsonl.zst", "b.jsonl.zst"], "text", (0, 1), None):
        for text in block_texts(block, "text", counts): ...

A file comes in pieces: the bytes of a long text are cut to documents, JSON lines stay bytes until a
tokenizer process parses them, a table comes 200 rows at a time. Pieces are joined to blocks of
about a megabyte. Each block carries the place behind it, from which the rest can be read.
A damaged file loses the text behind the damage, never the text before it; only half a JSON line
before it is dropped.
"""
import codecs
import importlib
import itertools
import json
import math
import os
import re
import sys
import zlib
from typing import NamedTuple

from configurator import UserError

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


class Block(NamedTuple):
    """
    Some documents of a source.

    kind     what data is
    "texts"  a list of str, None where a row holds no text
    "raw"    a list of bytes, each the text of a document
    "lines"  bytes of JSON lines
    "fault"  no documents, but (reason, a sentence for the user): a file is damaged, for example
    """
    kind: str
    data: object
    state: object  # JSON: where the source goes on behind this block
    size: int = 0  # about how many bytes of the source it took


def optional(module, package=None):
    """A module of an optional package (of the same name), or one line that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this needs a package: pip install {package or module}") from None


def warn(sentence):
    """A line on stderr about something that does not stop the work."""
    print(f"warning: {sentence}", file=sys.stderr)


def first_line(e):
    """The first line of an exception's message."""
    return (str(e).strip() or type(e).__name__).splitlines()[0]


# --------------------------------------------------------------------------------------------------
# JSON

DECODER = json.JSONDecoder()
BETWEEN = re.compile(r"[\s,\[\]]*")  # what may stand between the values of a file


def json_values(text):
    """
    Yield (value, the position behind it) of the JSON values in a text, one after the other or in an
    array, up to the first one that is broken or not complete.
    """
    at = 0
    while True:
        at = BETWEEN.match(text, at).end()
        try:
            value, at = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            return
        yield value, at


def line_values(line):
    """The JSON values of a line, usually one; None where the line is broken."""
    parsers = [json.loads]
    if orjson:  # it is faster, but takes no NaN and no lone surrogates
        parsers.insert(0, orjson.loads)
    for loads in parsers:
        try:
            value = loads(line)
            return value if isinstance(value, list) else [value]
        except (ValueError, RecursionError):
            pass
    values = []
    end = 0
    for value, end in json_values(line):
        values.append(value)
    whole = BETWEEN.fullmatch(line, end)
    return values if values and whole else None


def spans_lines(head):
    """
    Does a JSON file begin with an array or object that goes over several lines,
    rather than with one value a line? head: its first bytes.
    """
    text = head.decode("utf-8", "replace").lstrip()
    line, _, rest = text.partition("\n")
    if line_values(line) is not None:
        return False
    try:
        return DECODER.raw_decode(text)[1] > len(line)
    except (ValueError, RecursionError):
        pass  # the value is longer than the head, or the first line is broken
    try:
        json.loads(rest.partition("\n")[0])
        return False  # the second line is a value: one value a line
    except (ValueError, RecursionError):
        return text.startswith("[")


# --------------------------------------------------------------------------------------------------
# Text files: decompressed, as UTF-8, one JSON value a line

ENDING = re.compile(r"\.(?:(txt|jsonl?)(\.gz|\.zst)?|(parquet))$")
# The byte-order marks that may stand at the front of a file, and the encoding that each means.
# UTF-8 needs no recoding. UTF-32-LE's mark begins with UTF-16-LE's, so it is looked for before it.
MARKS = {b"\xef\xbb\xbf": "utf-8",
         b"\xff\xfe\0\0": "utf-32-le",
         b"\0\0\xfe\xff": "utf-32-be",
         b"\xff\xfe": "utf-16-le",
         b"\xfe\xff": "utf-16-be"}


def kind_of(path):
    """
    (txt | json | parquet, "" | .gz | .zst) by the ending of the file's own name;
    (None, "") for other names.
    """
    found = ENDING.search(os.path.basename(path).lower())
    if not found:
        return None, ""
    text, packing, table = found.groups()
    kind = "json" if text == "jsonl" else text or table
    return kind, packing or ""


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
        """Yield its text, in bytes of UTF-8, from byte `offset` of that text on."""
        # 1. the head tells the encoding and the form
        stream = self._unpacked()
        begun = []
        for piece in stream:
            begun.append(piece)
            if sum(map(len, begun)) >= HEAD:
                break
        head = b"".join(begun)
        mark = next((m for m in MARKS if head.startswith(m)), b"")
        encoding = MARKS.get(mark, "utf-8")
        head = head[len(mark):]
        if encoding != "utf-8":
            head = head.decode(encoding, "replace").encode()
        array = self.kind == "json" and spans_lines(head)

        # 2. the text
        if offset and not (array or self.packing or encoding != "utf-8"):
            yield from self._unpacked(len(mark) + offset)
            return
        stream = _skip(itertools.chain(begun, stream), len(mark))
        if encoding != "utf-8":
            stream = _recoded(stream, encoding)
        if array:
            stream = self._one_value_a_line(stream)
        yield from _skip(stream, offset)

    def _unpacked(self, position=0):
        """Yield the file's bytes, decompressed; those of a plain file from a position on."""
        try:
            if self.packing:
                yield from self._decompressed()
            else:
                yield from self._plain(position)
        except OSError as e:
            raise UserError(f"{self.path} cannot be read: {e.strerror or e}") from None

    def _plain(self, position):
        """
        The pieces end at multiples of BLOCK wherever reading begins: a pass that goes on must cut
        the same blocks.
        """
        skip = position % BLOCK
        with open(self.path, "rb") as f:
            f.seek(position - skip)
            while piece := f.read(BLOCK):
                yield piece[skip:]
                skip = 0

    def _decompressed(self):
        """
        Yield what the file holds up to its end or its first damage.
        A decompressor that meets damage does not return what it made of the bytes before it in the
        same call. So the file is then read once more, and the chunk with the damage byte by byte.
        """
        done = 0
        for piece in self._decompress():
            done += len(piece)
            yield piece
        if self.bad_chunk is not None:
            yield from _skip(self._decompress(bytewise_from=self.bad_chunk), done)

    def _decompress(self, bytewise_from=math.inf):
        """
        Yield what the decompressor returns, fed with chunks of CHUNK bytes, and with single bytes
        from that position of the file on. Sets damage, and bad_chunk: the position of the chunk
        that could not be decompressed.
        """
        self.bad_chunk = None
        self.damage = ""
        unpack = _decompressor(self.packing)
        inside = False  # a gzip member or zstd frame has begun and not ended
        padding = False  # a gzip member has ended: zeros may follow
        with open(self.path, "rb") as f:
            while True:
                at = f.tell()
                n = CHUNK if at < bytewise_from else 1
                packed = f.read(n)
                self.packed_bytes = f.tell()
                if not packed:
                    break
                while packed:
                    if padding:
                        packed = packed.lstrip(b"\0")
                        if not packed:
                            break
                    try:
                        piece = unpack.decompress(packed)
                    except Exception as e:  # zlib.error, zstandard.ZstdError
                        self.damage = f"it cannot be decompressed: {first_line(e)}"
                        self.bad_chunk = at
                        return
                    if piece:
                        yield piece
                    inside = not unpack.eof
                    padding = unpack.eof and self.packing == ".gz"
                    packed = b""
                    if unpack.eof:  # another member or frame may follow
                        packed = unpack.unused_data
                        unpack = _decompressor(self.packing)
        if inside:
            self.damage = "it breaks off"

    def _one_value_a_line(self, stream):
        """
        JSON values over any number of lines, in an array or one after the other -> JSON lines.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        text = ""
        for piece in stream:
            text += utf8.decode(piece)
            end = 0
            for value, end in json_values(text):
                yield json.dumps(value).encode() + b"\n"
            text = text[end:]  # a value that is still to come, or a broken one
            if len(text) > LONGEST_VALUE:
                break
        if not BETWEEN.fullmatch(text):
            self.damage = self.damage or "its JSON is broken"


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
        yield decoder.decode(piece).encode()


def _skip(stream, n):
    """A stream of bytes without its first n."""
    for piece in stream:
        if n < len(piece):
            yield piece[n:]
        n = max(0, n - len(piece))


def text_size(paths, column):
    """
    About how many bytes of text, JSON lines or (parquet) the text column the files hold,
    judged by the first one: what its packing saves there it saves everywhere.
    """
    size = sum(map(os.path.getsize, paths))
    kind, packing = kind_of(paths[0])
    if kind == "parquet":
        import pyarrow.parquet
        try:
            about = pyarrow.parquet.ParquetFile(paths[0]).metadata
            i = about.schema.names.index(column)
        except Exception:  # no parquet file, or no such column: the pass will say so
            return size
        unpacked = sum(about.row_group(g).column(i).total_uncompressed_size
                       for g in range(about.num_row_groups))
        return size * unpacked / os.path.getsize(paths[0])
    if not packing:
        return size
    file = TextFile(paths[0])
    unpacked = 0
    for piece in file.chunks():
        unpacked += len(piece)
        if unpacked >= 1 << 25:
            break
    return size * unpacked / max(1, file.packed_bytes)


# --------------------------------------------------------------------------------------------------
# A file to pieces: Blocks whose state is the offset behind them

BLANK = re.compile(rb"\n[ \t\r]*\n")


def cut_text(data, last):
    """
    Documents at the front of `data`, bytes of plain text, and how many bytes they take.
    last: no more of the text follows. If more follows, at most LONGEST bytes are left over for
    the next call.
    A document ends at a blank line where there is one, else at the end of a line,
    else behind a character.
    """
    docs = []
    a = 0
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
            for _ in range(3):  # a UTF-8 character has at most three bytes behind its first
                if data[end] & 0xC0 == 0x80:
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
            yield Block("raw", docs, offset, used)
    docs, used = cut_text(data, last=True)
    if docs:
        yield Block("raw", docs, offset + used, used)


def line_pieces(file, offset):
    """Pieces of a file of JSON lines: bytes of whole lines."""
    data = b""
    for chunk in file.chunks(offset):
        data += chunk
        used = data.rfind(b"\n") + 1
        if used and len(data) >= BLOCK:
            offset += used
            yield Block("lines", data[:used], offset, used)
            data = data[used:]
    if file.damage:
        data = data[:data.rfind(b"\n") + 1]  # half a line before the damage is no document
    if data:
        end = b"" if data.endswith(b"\n") else b"\n"
        yield Block("lines", data + end, offset + len(data), len(data))


def parquet_pieces(path, column, offset):
    """
    Pieces of a parquet file: lists of texts, None where a row holds none.
    offset: a row. Reads that column only.
    """
    import pyarrow.parquet  # comes with datasets
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                sentence = f"{path} has no column {column!r}, only {', '.join(names)}"
                yield Block("fault", ("files without the column", sentence), None)
                return
            row = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row + rows <= offset:
                    row += rows
                    continue
                for batch in file.iter_batches(ROWS, row_groups=[group], columns=[column]):
                    row += len(batch)
                    if row > offset:
                        yield Block("texts", strings(batch.column(0)), row, batch.nbytes)
    except Exception as e:
        # pyarrow raises several types for a damaged file, even OSErrors, but those have no number.
        if getattr(e, "errno", None):
            raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
        sentence = f"{path} is damaged or no parquet file: {first_line(e)}"
        yield Block("fault", ("damaged files", sentence), None)


def strings(array):
    """The values of a pyarrow array that are strings, None for every other."""
    return [t if isinstance(t, str) else None for t in array.to_pylist()]


def file_pieces(path, column, offset):
    """
    Pieces of one local file from an offset on. Where the file is damaged the last piece is a
    "fault", and everything before the damage has come.
    """
    kind, _ = kind_of(path)
    if kind == "parquet":
        yield from parquet_pieces(path, column, offset)
        return
    file = TextFile(path)
    pieces = text_pieces if kind == "txt" else line_pieces
    yield from pieces(file, offset)
    if file.damage:
        sentence = f"{path} is damaged ({file.damage}): what comes before the damage is kept"
        yield Block("fault", ("damaged files", sentence), None)


# --------------------------------------------------------------------------------------------------
# Pieces to blocks, blocks to texts

def joined_pieces(paths, column, first, offset):
    """
    Blocks of about BLOCK bytes, joined from the pieces of paths[first], from `offset` on, and of
    the files after it. A block's state is [its last file, the offset behind it in that file].
    """
    block = None  # what has been joined so far
    for i in range(first, len(paths)):
        for piece in file_pieces(paths[i], column, offset):
            if piece.kind == "fault":
                if block:
                    yield block
                    block = None
                yield piece._replace(state=[i + 1, 0])
                continue
            data = block.data + piece.data if block else piece.data
            size = block.size + piece.size if block else piece.size
            block = Block(piece.kind, data, [i, piece.state], size)
            if size >= BLOCK:
                yield block
                block = None
        offset = 0
    if block:
        yield block


def file_blocks(paths, column, share, state):
    """
    Blocks of local files. state: [file, offset in it, number of the block].
    A machine takes every world_size-th file. Where there are fewer files than machines, it takes
    every world_size-th block instead.
    """
    first, offset, number = state or (0, 0, 0)
    rank, world_size = share
    if len(paths) >= world_size:
        paths = paths[rank::world_size]
        rank, world_size = 0, 1
    for block in joined_pieces(paths, column, first, offset):
        number += 1
        if number % world_size == rank:
            yield block._replace(state=[*block.state, number])


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
            text, repaired = _decoded(raw)
            if repaired:
                count("repaired")
            yield text
    elif block.kind == "lines":
        for raw in block.data.split(b"\n"):
            line, repaired = _decoded(raw)
            if not line.strip():
                continue
            rows = line_values(line)
            if rows is None:
                yield None
                continue
            for row in rows:
                text = None
                if isinstance(row, dict):
                    text = row.get(column)
                    if column not in row:
                        count("no column")
                if not isinstance(text, str):
                    yield None
                    continue
                if repaired:
                    count("repaired")
                yield text


def _decoded(raw):
    """(bytes as str, were they no UTF-8?)"""
    try:
        return raw.decode(), False
    except UnicodeDecodeError:
        return raw.decode(errors="replace"), True
