"""
A block of documents to tokens: texts are mended and filtered, hashed for the choice between train
and val and for finding duplicates, and tokenized. prepare.py's processes run this.

    for state, encoded in encode_blocks(source.blocks(None), cfg):    # cfg: prepare.PrepareConfig
        encoded.ids                                                   # of all its documents
"""
import functools
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
import xxhash  # comes with datasets

from configurator import UserError
from localfiles import block_texts, optional
from tokenizer import Tokenizer


class Encoded(NamedTuple):
    ids: np.ndarray  # the documents' tokens, each document followed by a separator
    lengths: np.ndarray  # tokens per document, its separator included
    sizes: np.ndarray  # bytes of text per document
    held_out: np.ndarray  # bool per document: it goes to val
    keys: np.ndarray  # (documents, n) uint64: documents that share one are duplicates
    counts: Counter  # rows read, and how many were dropped or mended, by reason
    fault: str  # a sentence about a damaged file, or ""
    source_bytes: int  # what the block took of its source


def filter_texts(texts, cfg, counts):
    """Those that pass the filters of cfg, personal data masked."""
    def only(name, keep):
        kept = [t for t, ok in zip(texts, keep) if ok]
        counts[name] += len(texts) - len(kept)
        return kept

    if cfg.min_chars or cfg.max_chars:
        longest = cfg.max_chars or float("inf")
        texts = only("length", [cfg.min_chars <= len(t) <= longest for t in texts])
    if cfg.language:
        classify = optional("py3langid").classify
        wanted = cfg.language.split(",")
        texts = only("language", [classify(t[:10_000])[0] in wanted for t in texts])
    if cfg.max_toxicity and texts:
        predict = optional("profanity_check", "alt-profanity-check").predict_prob
        texts = only("toxicity", predict(texts) <= cfg.max_toxicity)
    if cfg.mask_pii:
        redact = optional("datafog").redact
        kinds = ["EMAIL", "PHONE", "SSN", "CREDIT_CARD", "IP_ADDRESS"]
        masked = [redact(t, engine="regex", entity_types=kinds).redacted_text for t in texts]
        counts["masked"] += sum(a != b for a, b in zip(texts, masked))
        texts = masked
    return texts


def near_keys(text):
    """
    MinHash of the text's words in fives, in 14 bands of 8: a list of 14 64-bit keys.
    Two texts that are 0.75 alike share a key with probability 0.77, two that are 0.5 alike
    with 0.05.
    """
    minhash = optional("rensa").RMinHash(num_perm=112, seed=42)
    words = text.lower().split()
    minhash.update([" ".join(words[i:i + 5]) for i in range(max(1, len(words) - 4))])
    bands = np.array(minhash.digest(), dtype=np.uint32).reshape(14, 8)
    return [xxhash.xxh3_64_intdigest(band.tobytes(), seed=i) for i, band in enumerate(bands)]


@functools.lru_cache(1)
def _tokenizer(name):
    return Tokenizer(name)


def mend_surrogates(text):
    """Join surrogate pairs, and put U+FFFD for lone surrogates, which UTF-8 forbids."""
    # All surrogates begin with the byte 0xED.
    if text.isascii() or b"\xed" not in text.encode("utf-8", "surrogatepass"):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode_block(block, cfg):
    """Block -> Encoded. The result for a document does not depend on the others of its block."""
    # 1. texts: read, mended and filtered
    counts = Counter()
    fault = ""
    if block.kind == "fault":
        reason, fault = block.data
        counts[reason] += 1
    texts = []
    for text in block_texts(block, cfg.text_column, counts):
        counts["rows"] += 1
        if text is None:
            counts["broken"] += 1
        elif not text or text.isspace():
            counts["empty"] += 1
        else:
            mended = mend_surrogates(text)
            counts["repaired"] += mended != text
            texts.append(mended)
    texts = filter_texts(texts, cfg, counts)

    # 2. hashes: which split a document goes to, and its keys for finding duplicates
    raws = [t.encode() for t in texts]
    digests = np.array([xxhash.xxh3_64_intdigest(r) for r in raws], dtype=np.uint64)
    held_out = (digests >> np.uint64(11)) < cfg.val_fraction * 2**53
    keys = np.empty((len(texts), 0), dtype=np.uint64)
    if cfg.dedup == "exact":
        keys = digests[:, None]
    elif cfg.dedup == "near":
        keys = np.array([near_keys(t) for t in texts], dtype=np.uint64).reshape(-1, 14)

    # 3. tokens, a separator after every document
    # On disk the separator ends a document. To the model the same token begins the next one: a
    # token's document starts at the last separator up to and including it
    # (attention.document_starts). So the last token of a document learns to predict the separator
    # ("the document ends"), and the separator, which sees nothing before itself, learns to predict
    # the first token of the next document. A prompt therefore begins with a separator.
    tokenizer = _tokenizer(cfg.tokenizer)
    separator = [tokenizer.separator]
    parts = []
    for text in texts:
        parts += [tokenizer.encode(text), separator]
    ids = np.empty(0, tokenizer.dtype)
    if parts:
        ids = np.concatenate(parts, dtype=tokenizer.dtype, casting="unsafe")
    lengths = np.array([len(p) + 1 for p in parts[::2]], dtype=np.int64)
    sizes = np.array([len(r) for r in raws], dtype=np.int64)
    return Encoded(ids, lengths, sizes, held_out, keys, counts, fault, block.size)


def encode_blocks(blocks, cfg):
    """(Block's state, Encoded) in order, by a process pool if there is more than one process."""
    if cfg.processes == 1:
        for block in blocks:
            yield block.state, encode_block(block, cfg)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(cfg.processes, mp_context=spawn, initializer=_start_worker)
    waiting = deque()  # never more than a few blocks are held
    try:
        for block in blocks:
            job = pool.submit(encode_block, block._replace(state=None), cfg)
            waiting.append((block.state, job))
            if len(waiting) > 2 * cfg.processes:
                state, job = waiting.popleft()
                yield state, job.result()
        for state, job in waiting:
            yield state, job.result()
    except BrokenProcessPool:
        raise UserError("a tokenizer process was killed, by lack of memory perhaps: "
                        "the same command goes on from here; "
                        "a smaller --num_proc takes less memory") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker():
    """
    Leave Ctrl-C to the parent, which ends its workers. And end this worker when the parent has been
    killed: else it would wait for work for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
