"""
Tokenizers of Hugging Face models: a tokenizer.json, read by the package `tokenizers`.
tokenizer.py imports this file when a name begins with "hf:".

The tokens of a text, as bytes and joined, must be the text: bits per byte depend on it. Two kinds
of vocabulary can do that, and everything else is refused:

    byte-level BPE: a token is spelled in 256 letters that stand for the 256 bytes
        (GPT-2, Llama 3, Qwen, DeepSeek)    " Hi\\n" -> "ĠHiĊ"
    BPE with byte fallback: a token is text with ▁ for a blank, or one byte of a rare character
        (Llama 2, Mistral, Gemma)           " Hi\\n" -> "▁Hi", "<0x0A>"

The file's own rules apply, with these exceptions (`check_rules`, `make_exact`):

    1. Text that spells a special token stays ordinary text, and no special token is added. Added
       tokens that are not special (Qwen's "<think>", runs of blanks) are tokens like any other.
    2. No blank is put before the text (Llama 2 makes "▁Hi" of "Hi"): it is not in the text, and
       pieces encoded one by one could not be joined. Only the first word of a text differs.
    3. Blanks beside an added token are not swallowed by it.
    4. The character ▁ itself becomes its three bytes where ▁ stands for a blank.

One rule changes the text: Unicode's NFC (Qwen), which composes letters with their accents. It
stays, since the model was trained with it: decode gives, and token_lengths count, the NFC text.
So eval.py divides by the bytes of the NFC text, train.py by those of the text itself (meta.json):
their bits per byte differ where a text was not in NFC.
"""
import json
import os

import numpy as np

from configurator import UserError, mismatch

MAX_VOCAB = 1 << 24  # a vocabulary that is larger is a damaged file

# Each document is one call: prepare.py's processes are the parallel part. Without this, the package
# starts threads, and warns when a process that has them forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MAIN_FILE = "tokenizer.json"
END_OF_TEXT = {  # file beside tokenizer.json -> its entry for the end of a text
    "config.json": "eos_token_id",
    "generation_config.json": "eos_token_id",
    "tokenizer_config.json": "eos_token"}
BLANK = "▁"  # U+2581
BYTE_TOKENS = {f"<0x{byte:02X}>": byte for byte in range(256)}
LONGEST = 1_000_000  # characters encoded at a time: each takes up to 300 bytes of memory meanwhile
TRIAL = " two  blanks\r\n\t\0é漢字😀 <0x0A> ▁ "  # in NFC

# The steps, by kind of vocabulary, that neither drop nor change a character (but NFC, see above).
NORMALIZERS = {"byte-level": ["NFC"], "byte fallback": ["NFC", "Replace"]}
PRE_TOKENIZERS = {"byte-level": ["ByteLevel", "Split", "Digits", "Punctuation"],
                  "byte fallback": ["Metaspace", "Split", "Digits", "Punctuation"]}


# --------------------------------------------------------------------------------------------------
# Files

def fetch(hub_id, instead, weights=False):
    """
    The folder that holds the settings and the tokenizer of a model of the hub, and its weights if
    they are wanted; downloaded at first use. hf.py calls this too: what decides about the separator
    must be the same wherever a model is opened. instead: what to do without network, for the
    message. Raises UserError.
    """
    import huggingface_hub  # comes with datasets
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars
    patterns = ["*config.json", "tokenizer*"]
    if weights:
        patterns.append("model*.safetensors*")  # and their index
    else:
        disable_progress_bars()
    try:
        return huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns)
    except GatedRepoError:
        reason = "accept its licence on huggingface.co and set HF_TOKEN"
    except RepositoryNotFoundError:
        reason = "no such model, or a private one: set HF_TOKEN"
    except Exception as e:  # a dozen types for "no network"
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    raise UserError(f"{hub_id!r} is no file or folder here and cannot be fetched ({reason}); "
                    f"without network {instead}")


def find_tokenizer(place):
    """
    The path of the tokenizer.json that a place means: that file, a folder, or an id of the hub.
    Raises UserError.
    """
    path = place
    if not os.path.exists(place):
        path = fetch(place, f"put the model's {MAIN_FILE} and config.json into a folder and give "
                            "--tokenizer=FOLDER")
    if os.path.isdir(path):
        path = os.path.join(path, MAIN_FILE)
        if not os.path.exists(path):
            raise UserError(f"tokenizer {place!r} holds no {MAIN_FILE}: transformers writes it "
                            "(AutoTokenizer.from_pretrained(…).save_pretrained(FOLDER))")
    return path


def read_json(path, shape={}):
    """
    The dict in a JSON file, with at least the entries of `shape` (see configurator.mismatch).
    Raises UserError for a file that is missing or damaged.
    """
    try:
        with open(path, encoding="utf-8") as f:
            data = json.load(f)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is not JSON") from None
    wrong = mismatch(data, shape)
    if wrong:
        raise UserError(f"{path} is damaged: {wrong}")
    return data


def end_of_text(folder, ids):
    """
    The id of the token that ends a text. ids: {token: id}. Raises UserError if no file names it.

    Chat models name several, since the end of a turn stops them too: Llama-3.1-Instruct 128001,
    128008 and 128009, Qwen3 151643 and 151645. The end of a text came first, with the base model:
    it is the smallest.
    """
    found = set()
    for name, key in END_OF_TEXT.items():
        path = os.path.join(folder, name)
        value = read_json(path).get(key) if os.path.exists(path) else None
        for end in value if isinstance(value, list) else [value]:
            if isinstance(end, dict):  # tokenizer_config.json may describe the token at length
                end = end.get("content")
            if isinstance(end, str):
                end = ids.get(end)
            if type(end) is int:
                found.add(end)
    found &= set(ids.values())
    if not found:
        raise UserError(f"no token of {folder} ends a text: put the model's config.json beside "
                        f'{MAIN_FILE}, or a file of this name with {{"eos_token_id": ID}}')
    return min(found)


# --------------------------------------------------------------------------------------------------
# The rules of a tokenizer.json

def steps(rule):
    """A normalizer or pre_tokenizer as a flat list of steps: a Sequence holds others."""
    if rule is None:
        return []
    if rule["type"] != "Sequence":
        return [rule]
    inner = rule["normalizers"] if "normalizers" in rule else rule["pretokenizers"]
    return [step for part in inner for step in steps(part)]


def kind_of_vocabulary(data):
    """Which of the two kinds the dict of a tokenizer.json is. Raises ValueError for a third."""
    model = data["model"]
    if model.get("type", "BPE") != "BPE":  # old files do not say BPE
        raise ValueError(f"its model is {model['type']}, not BPE")
    if any(step["type"] == "ByteLevel" for step in steps(data.get("pre_tokenizer"))):
        kind = "byte-level"
        alphabet = byte_letters()
    elif model.get("byte_fallback"):
        kind = "byte fallback"
        alphabet = BYTE_TOKENS
    else:
        raise ValueError("it is neither byte-level BPE nor BPE with byte fallback")
    if not all(token in model["vocab"] for token in alphabet):
        raise ValueError("it lacks some of the 256 single bytes")
    return kind


def check_rules(data, kind):
    """
    Raise ValueError, with the reason, where a step of a tokenizer.json drops or changes characters.
    data: its dict. kind: of its vocabulary.
    """
    for step in steps(data.get("normalizer")):
        blanks = step.get("pattern") == {"String": " "} and step.get("content") == BLANK
        known = step["type"] in ["Prepend", *NORMALIZERS[kind]]  # rule 2 takes Prepend out
        if not known or step["type"] == "Replace" and not blanks:
            raise ValueError(f"its normalizer {step['type']} changes the text")
    for step in steps(data.get("pre_tokenizer")):
        drops = step.get("behavior") == "Removed"
        if step["type"] not in PRE_TOKENIZERS[kind] or drops:
            raise ValueError(f"its pre-tokenizer {step['type']} drops or changes characters")
    model = data["model"]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError("its tokens mark the inside or the end of a word")


def make_exact(data, kind, end):
    """
    Change the dict of a tokenizer.json that has passed check_rules, such that the bytes of a text's
    tokens are the text. end: the separator's spelling.
    """
    # 1. no blank is put before the text (rule 2)
    normalizers = [s for s in steps(data.get("normalizer")) if s["type"] != "Prepend"]
    pre_tokenizers = steps(data.get("pre_tokenizer"))
    for step in pre_tokenizers:
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
        elif step["type"] == "Metaspace":
            step.pop("add_prefix_space", None)  # of old files
            step["prepend_scheme"] = "never"

    # 2. special tokens, and those that stand for a byte, are never made from text
    unspellable = {end}
    if kind == "byte fallback":
        unspellable.update(BYTE_TOKENS)
    for token in data["added_tokens"]:
        token["special"] = token["special"] or token["content"] == end
        token["lstrip"] = token["rstrip"] = False  # rule 3
        if token["special"]:
            unspellable.add(token["content"])
    model = data["model"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    model["merges"] = [m for m in merges if "".join(m) not in unspellable]

    # 3. what remains
    data["normalizer"] = data["pre_tokenizer"] = None
    if normalizers:
        data["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    if pre_tokenizers:
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre_tokenizers}
    for unused in ("truncation", "padding", "post_processor", "decoder"):
        data[unused] = None
    model["dropout"] = None


def byte_letters():
    """
    {letter: byte} of byte-level BPE, GPT-2's choice: printable bytes of Latin-1 are themselves, the
    others are the letters from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [i for i in range(256) if i not in printable]
    return {chr(i): i for i in printable} | {chr(256 + n): i for n, i in enumerate(others)}


def token_spellings(data, kind):
    """{id: bytes} of every token in the dict of a tokenizer.json."""
    spelled = {}
    letters = byte_letters()
    for token, i in data["model"]["vocab"].items():
        if kind == "byte fallback":
            spelled[i] = fallback_spelling(token)
        elif all(c in letters for c in token):
            spelled[i] = bytes(letters[c] for c in token)
    for token in data["added_tokens"]:
        text = token["content"]
        spelled[token["id"]] = fallback_spelling(text) if kind == "byte fallback" else text.encode()
    return spelled


def fallback_spelling(token):
    """The bytes of a token of a vocabulary with byte fallback."""
    if token in BYTE_TOKENS:
        return bytes([BYTE_TOKENS[token]])
    return token.replace(BLANK, " ").encode()


# --------------------------------------------------------------------------------------------------
# The tokenizer

class HubEncoding:
    """
    A tokenizer.json behind the names of tiktoken.Encoding that tokenizer.Tokenizer uses, with the
    id of its separator. place: a folder, a tokenizer.json, or the id of a model on the Hugging Face
    hub. Raises UserError.
    """

    def __init__(self, place):
        path = find_tokenizer(place)
        data = read_json(path)
        try:
            self._build(data, os.path.dirname(path))
            self._try_out(data["added_tokens"])
        except UserError:
            raise
        except ValueError as e:
            raise UserError(f"{path} cannot be used: {e}") from None
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is damaged: it is not a tokenizer's file") from None

    def _build(self, data, folder):
        """Set the attributes from the dict of a tokenizer.json."""
        try:
            import tokenizers
        except ImportError:
            raise UserError("a tokenizer.json needs a package: pip install tokenizers") from None
        self.kind = kind_of_vocabulary(data)
        data["added_tokens"] = data.get("added_tokens") or []
        ids = {**data["model"]["vocab"], **{t["content"]: t["id"] for t in data["added_tokens"]}}
        self.n_vocab = max(ids.values()) + 1  # there may be unused ids in between
        if min(ids.values()) < 0 or self.n_vocab > MAX_VOCAB:
            raise ValueError("its ids are not small numbers")
        self.separator = end_of_text(folder, ids)
        end = next(token for token, i in ids.items() if i == self.separator)
        check_rules(data, self.kind)
        make_exact(data, self.kind, end)
        self.spelled = token_spellings(data, self.kind)
        self.blank = []  # what stands for the character ▁
        if self.kind == "byte fallback":
            self.blank = [ids[f"<0x{byte:02X}>"] for byte in BLANK.encode()]
        try:
            self.enc = tokenizers.Tokenizer.from_str(json.dumps(data))
        except Exception as e:  # the package raises no narrower type
            raise ValueError(f"it is damaged ({e})") from None
        self.enc.encode_special_tokens = True  # rule 1: as text

    def _try_out(self, added_tokens):
        """Raise ValueError if a text that tries everything does not come back, byte for byte."""
        end = self.spelled.get(self.separator, b"").decode(errors="replace")
        text = TRIAL + " ".join([end, *(token["content"] for token in added_tokens)])
        ids = self.encode_to_numpy(text).tolist()
        if b"".join(self.spelled[i] for i in ids) != text.encode():
            raise ValueError("its tokens do not spell the text")
        special = {t["id"] for t in added_tokens if t["special"]} | {self.separator}
        if special & set(ids):
            raise ValueError("a special token can be spelled in text")

    def encode_to_numpy(self, text):
        """str -> 1-D array of ids."""
        ids = []
        for start in range(0, len(text), LONGEST):
            part = text[start:start + LONGEST]
            pieces = part.split(BLANK) if self.blank else [part]
            # The fast call leaves out where each token lies in the text.
            encoded = self.enc.encode_batch_fast(pieces, add_special_tokens=False)
            for n, piece in enumerate(encoded):
                if n > 0:
                    ids += self.blank
                ids += piece.ids
        return np.array(ids, dtype=np.uint32)

    def decode_single_token_bytes(self, i):
        """The bytes of one id. Raises KeyError for an id without a token."""
        return self.spelled[i]
