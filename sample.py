"""
Continue a text with a trained model, printed as it is generated. Needs the checkpoint only.
stream() and generate() do it from Python, for several prompts of any lengths at once.

    python sample.py --out_dir=out --start="def main(" --max_new_tokens=200
    python sample.py --out_dir=out --start=FILE:prompt.txt --num_samples=1 --temperature=0
"""
import codecs
import functools
import math
import sys
from dataclasses import dataclass

import torch

from attention import document_starts
from checkpoint import load_model
from configurator import UserError, check_ranges, parse, run
from device import check_dtype, precision, use_device
from model import KVCache
from tokenizer import open_tokenizer


def draw_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """
    Draw one token per row: logits (B, V) -> (B,). temperature 0 = the likeliest.
    top_k keeps the so many likeliest tokens (0 = all); top_p the likeliest whose probabilities
    add up to at least top_p (1 = all). Raises ValueError outside of their ranges.
    """
    if not temperature >= 0:  # NaN is refused too
        raise ValueError(f"temperature {temperature} must be ≥ 0")
    if top_k < 0:
        raise ValueError(f"top_k {top_k} must be ≥ 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must be in (0, 1]")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits - logits.amax(-1, keepdim=True)  # largest 0: never inf, however divided
    logits = logits / max(temperature, 1e-30)  # 0 / 1e-46 would be 0 / 0 in float32
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # likelier tokens alone have mass top_p
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def stream(model, prompts, max_new_tokens, draw=draw_token, separator=None):
    """
    Continue prompts, B 1-D tensors of any lengths. Yields the (B,) new tokens of each step,
    -1 in the rows that have ended: behind their separator, or at block_size.
    draw: logits (B, vocab_size) -> tokens (B,). Raises ValueError for an empty or long prompt.
    """
    # 1. the prompts in one batch, padded on the right, where no token sees the padding
    device = model.embed.weight.device
    lengths = [len(p) for p in prompts]
    if min(lengths, default=0) == 0:
        raise ValueError("a prompt is empty: give at least one token")
    B = len(prompts)
    cache = KVCache(B, min(max(lengths) + max_new_tokens, model.config.block_size), device)
    length = torch.tensor(lengths, device=device)  # (B,)
    prompts = [p.to(device) for p in prompts]
    idx = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)  # (B, T)
    last = length[:, None] - 1  # (B, 1), position of each prompt's last token
    doc_start = last_start = None
    if separator is not None:
        doc_start = document_starts(idx, separator)  # (B, T)
        last_start = doc_start.gather(1, last)  # (B, 1), also that of the new tokens
    x = model.trunk(idx, doc_start, cache)[0]  # (B, T, C)
    x = x[torch.arange(B, device=device)[:, None], last]  # (B, 1, C)
    cache.length = length
    # 2. one token per row and step
    alive = torch.ones(B, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        token = draw(model.head(x)[:, 0].float())  # (B,)
        yield torch.where(alive, token, -1)
        if separator is not None:
            alive = alive & (token != separator)
        alive = alive & (cache.length < cache.size)
        if step + 1 == max_new_tokens or not alive.any():
            return
        # Rows that have ended stay in the batch and write their last place again and again
        cache.length = cache.length.clamp(max=cache.size - 1)
        x = model.trunk(token[:, None], last_start, cache)[0]  # (B, 1, C)


def generate(model, prompts, max_new_tokens, draw=draw_token, separator=None):
    """stream, collected: the prompts with their continuations, a list of 1-D tensors."""
    rows = list(prompts)
    for tokens in stream(model, prompts, max_new_tokens, draw, separator):
        rows = [torch.cat((row, token[None].to(row.device))) if token >= 0 else row
                for row, token in zip(rows, tokens)]
    return rows


@dataclass
class SampleConfig:
    out_dir: str = "out"  # folder of the checkpoint
    checkpoint: str = "last"  # last | best (lowest validation loss) | a step
    start: str = ""  # the prompt, or FILE:path; empty = the beginning of a document
    num_samples: int = 3
    max_new_tokens: int = 300
    temperature: float = 0.8  # 0 = always the likeliest token
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    seed: int = 1337
    device: str = ""  # default: cuda if there is one, else cpu
    dtype: str = ""  # float32 | bfloat16; default: bfloat16 on cuda
    backend: str = "auto"  # path of the attention: auto | torch | triton | eager
    tokenizer: str = ""  # where the checkpoint's vocabulary file lies now; default: where it was

    def __post_init__(self):
        check_dtype(self.dtype)
        check_ranges(self, {(1, None): "num_samples max_new_tokens", (0, None): "temperature top_k",
                            (0, 1): "top_p", (0, 2**63 - 1): "seed"})
        if not self.top_p:
            raise UserError("top_p is 0.0, must be above 0: 1 is off")


def read_prompt(start):
    """The text of cfg.start, or of the file that it names; what is not UTF-8 becomes U+FFFD."""
    if start.startswith("FILE:"):
        path = start[len("FILE:"):]
        try:
            with open(path, encoding="utf-8", errors="replace") as f:
                return f.read()
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}") from None
        except ValueError as e:  # a NUL in the name
            raise UserError(f"cannot read {path}: {e}") from None
    try:  # a terminal may pass any bytes, which Python keeps as surrogates
        raw = start.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # other surrogates, from a config file
        raw = start.encode("utf-8", "surrogatepass")
    return raw.decode("utf-8", "replace")


def sample(cfg, out=sys.stdout):
    """
    Write num_samples continuations to out. Each ends with its document, after max_new_tokens, or
    where the context is full.
    """
    device = use_device(cfg.device)
    model, checkpoint = load_model(cfg.out_dir, device, cfg.backend, cfg.checkpoint)
    tokenizer = open_tokenizer(checkpoint["meta"], cfg.tokenizer)
    text = read_prompt(cfg.start)
    prompt = [tokenizer.separator]  # a document starts at a separator
    if text:
        prompt += tokenizer.encode(text).tolist()
    if len(prompt) >= model.config.block_size:
        raise UserError(f"the prompt has {len(prompt)} tokens, "
                        f"the model's context is {model.config.block_size}: shorten it")
    generator = torch.Generator(device).manual_seed(cfg.seed)
    draw = functools.partial(draw_token, temperature=cfg.temperature, top_k=cfg.top_k,
                             top_p=cfg.top_p, generator=generator)
    with precision(device, cfg.dtype):
        for i in range(cfg.num_samples):
            # the decoder waits for the rest of a character: one may take several tokens
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            out.write(f"--- sample {i + 1}\n{text}")
            for token in stream(model, [torch.tensor(prompt)], cfg.max_new_tokens, draw,
                                tokenizer.separator):
                out.write(decoder.decode(tokenizer.token_bytes(int(token))))
                out.flush()
            out.write(decoder.decode(b"", final=True) + "\n")


def main(argv):
    sample(SampleConfig(**parse(SampleConfig, argv)))


if __name__ == "__main__":
    run(main)
