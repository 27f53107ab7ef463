"""
Text to token ids and back.

    tokenizer = Tokenizer("bytes")     # or "gpt2", "meta-llama/Llama-3.1-8B", …
    tokenizer.encode("Hi")             # -> array([72, 105])
    tokenizer.decode([72, 105])        # -> "Hi"
"""
import base64
import functools
import hashlib
import os
import re

import numpy as np
import tiktoken

from configurator import UserError, did_you_mean
from tokenizer_hf import MAX_VOCAB, HubEncoding

LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def _read_ranks(path):
    """
    {token: rank} of a file of lines "base64-token rank", the format of Llama 3's tokenizer.model.
    The file itself is read: tiktoken's own loader caches local files by their path,
    not their content.
    """
    wrong = ""
    ranks = {}
    try:
        with open(path, "rb") as f:
            lines = [line.split() for line in f.read().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if len(ranks) < len(lines):
            wrong = "a token stands twice in it"
    except OSError as e:
        wrong = e.strerror
    except ValueError:
        wrong = "it is damaged or of another kind"
    if not wrong and any(bytes([i]) not in ranks for i in range(256)):
        wrong = "it lacks some of the 256 single bytes"
    numbers = set(ranks.values())
    if not wrong and (len(numbers) < len(ranks) or min(numbers) < 0 or max(numbers) > MAX_VOCAB):
        wrong = "its ranks are not distinct small numbers"
    if wrong:
        raise UserError(f"{path} is not a readable file of token ranks: {wrong}")
    return ranks


def _rank_file_encoding(name):
    """
    A tiktoken.Encoding of "llama3:PATH", with Llama 3's 256 special tokens,
    or "tiktoken:PATH", with one.
    """
    kind, path = name.split(":", 1)
    ranks = _read_ranks(path)
    special = ["<|endoftext|>"]
    if kind == "llama3":  # the other 254 have no use here
        special = (["<|begin_of_text|>", "<|end_of_text|>"]
                   + [f"<|special_{i}|>" for i in range(254)])
    first = max(ranks.values()) + 1
    return tiktoken.Encoding(name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks,
                             special_tokens={s: first + i for i, s in enumerate(special)})


def _cut_blanks(text, longest=10_000):
    """
    tiktoken's regex panics on a million blanks in a row: cut such runs.
    The pieces joined give the text.
    """
    # Most texts need no cut. A run of `longest` blanks contains a whole stretch of `half`
    # characters, so a text without a blank stretch has no such run.
    half = longest // 2
    if not any(text[i:i + half].isspace() for i in range(0, len(text) - half + 1, half)):
        return [text]
    cuts = [m.start() + longest for m in re.finditer(r"\s{%d}(?=\s)" % longest, text)]
    return [text[a:b] for a, b in zip([0] + cuts, cuts + [len(text)])]


def full_name(given):
    """
    What names a tokenizer, as it is stored: paths are absolute, since those hold in any folder.
    "models/llama" -> "hf:/home/me/models/llama", "meta-llama/Llama-3.1-8B" ->
    "hf:meta-llama/Llama-3.1-8B" if there is no such folder. Raises UserError.
    """
    known = ["bytes", *tiktoken.list_encoding_names()]
    if given in known:
        return given
    kind, _, path = given.partition(":")
    path = os.path.expanduser(path)  # a shell leaves the ~ in hf:~/llama
    if kind in ("llama3", "tiktoken"):
        return f"{kind}:{os.path.abspath(path)}"
    place = path if kind == "hf" else os.path.expanduser(given)
    if os.path.exists(place):
        return f"hf:{os.path.abspath(place)}"
    hub_id = r"\w[\w.-]*/\w[\w.-]*"
    if re.fullmatch(f"{hub_id}|hf:([^/]+|{hub_id})", given):  # a few old models have no owner
        return f"hf:{place}"
    if kind == "hf":
        raise UserError(f"tokenizer {place!r} is not there: bring it back, or name another place "
                        "(--tokenizer=FOLDER)")
    hint = did_you_mean(given, known)
    raise UserError(f"tokenizer {given!r} is not one of {', '.join(known)}, llama3:PATH, "
                    "tiktoken:PATH, nor a Hugging Face model: a folder or a tokenizer.json that is "
                    f"there, or owner/name{hint}")


class Tokenizer:
    """
    An encoding plus a separator id. Text that spells a special token is ordinary text.

    name: "bytes" (id = byte, separator 256, no network); a name that tiktoken knows ("gpt2");
    "llama3:PATH" or "tiktoken:PATH", a file of token ranks; or a Hugging Face model (tokenizer_hf):
    a folder, a tokenizer.json, or an id of the hub. Raises UserError.
    """

    def __init__(self, name):
        name = full_name(name)
        self.name = name
        self.kind, _, place = name.partition(":")
        if self.kind == "bytes":
            ranks = {bytes([i]): i for i in range(256)}
            self.enc = tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks,
                                         special_tokens={"<|endoftext|>": 256})
        elif self.kind in ("llama3", "tiktoken"):
            self.enc = _rank_file_encoding(name)
        elif self.kind == "hf":
            self.enc = HubEncoding(place)
        else:
            try:
                self.enc = tiktoken.get_encoding(name)
            except (OSError, ValueError):  # no network; a download with a wrong hash
                raise UserError(
                    f"tokenizer {name!r} must be downloaded once and cannot be: "
                    "use --tokenizer bytes, or set TIKTOKEN_CACHE_DIR to a folder "
                    "filled on a machine with network") from None
        if self.kind == "hf":
            self.separator = self.enc.separator
        else:
            end = "<|end_of_text|>" if self.kind == "llama3" else "<|endoftext|>"
            self.separator = self.enc.encode_single_token(end)
        self.vocab_size = self.enc.n_vocab
        self.dtype = np.dtype("uint16" if self.vocab_size <= 1 << 16 else "uint32")

    def encode(self, text):
        """str (no lone surrogates) -> 1-D numpy array of ids."""
        if self.kind == "bytes":
            return np.frombuffer(text.encode(), dtype=np.uint8)
        if self.kind == "hf":
            return self.enc.encode_to_numpy(text)
        pieces = [self.enc.encode_to_numpy(p, disallowed_special=()) for p in _cut_blanks(text)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def decode(self, ids):
        """
        Ids -> str.
        Ids outside the vocabulary (padding rows) are dropped, broken UTF-8 becomes U+FFFD.
        """
        return b"".join(self.token_bytes(i) for i in ids).decode(errors="replace")

    def token_bytes(self, i):
        """The bytes of one id; none for the separator and for ids outside the vocabulary."""
        try:
            return b"" if i == self.separator else self.enc.decode_single_token_bytes(int(i))
        except (KeyError, OverflowError):
            return b""

    @functools.cached_property
    def token_lengths(self):
        """Bytes of every id, (vocab_size,): token_lengths[ids].sum() is the text's size."""
        return np.array([len(self.token_bytes(i)) for i in range(self.vocab_size)])

    @functools.cached_property
    def fingerprint(self):
        """
        SHA-256 of the vocabulary, every token's bytes in the order of the ids:
        a name may come to mean another file.
        """
        digest = hashlib.sha256()
        for i in range(self.vocab_size):
            token = self.token_bytes(i)
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()


def open_tokenizer(meta, name=""):
    """
    The tokenizer of prepared data or of a checkpoint. meta: the dict of its meta.json.
    name: the tokenizer under another name or path, if the vocabulary file has moved.
    Raises UserError if it is not the vocabulary, or not the kind, that made the data.
    """
    tokenizer = Tokenizer(name or meta["tokenizer"])
    wanted = meta["vocabulary"]
    if tokenizer.fingerprint != wanted or tokenizer.vocab_size != meta["vocab_size"]:
        raise UserError(f"tokenizer {tokenizer.name!r} is not the vocabulary that this data or "
                        f"checkpoint was made with (SHA-256 {tokenizer.fingerprint[:12]}…, "
                        f"not {wanted[:12]}…): bring that file back")
    # "gpt2" and "tiktoken:PATH" may hold the same tokens, but they split text by other patterns.
    if tokenizer.kind != meta["tokenizer"].partition(":")[0]:
        raise UserError(f"tokenizer {tokenizer.name!r} splits text otherwise than "
                        f"{meta['tokenizer']!r}, which made this data or checkpoint: "
                        "give one of that kind")
    return tokenizer
