"""
Continue a text with a trained model, printed as it is generated. Needs the checkpoint only.

    python sample.py --out_dir=out --start="def main(" --max_new_tokens=200
    python sample.py --out_dir=out --start=FILE:prompt.txt --num_samples=1 --temperature=0
"""
import codecs
import sys
from dataclasses import dataclass

import torch

from checkpoint import check_dtype, load_model, precision, use_device
from configurator import UserError, check_ranges, parse, run
from data import open_tokenizer


@dataclass
class SampleConfig:
    out_dir: str = "out"  # folder of the checkpoint
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
    model, checkpoint = load_model(cfg.out_dir, device, cfg.backend)
    tokenizer = open_tokenizer(checkpoint["meta"], cfg.tokenizer)
    text = read_prompt(cfg.start)
    prompt = [tokenizer.separator]  # a document starts at a separator
    if text:
        prompt += tokenizer.encode(text).tolist()
    if len(prompt) >= model.config.block_size:
        raise UserError(f"the prompt has {len(prompt)} tokens, "
                        f"the model's context is {model.config.block_size}: shorten it")
    generator = torch.Generator(device).manual_seed(cfg.seed)
    with precision(device, cfg.dtype):
        for i in range(cfg.num_samples):
            # the decoder waits for the rest of a character: one may take several tokens
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            out.write(f"--- sample {i + 1}\n{text}")
            tokens = model.stream([torch.tensor(prompt)], cfg.max_new_tokens, cfg.temperature,
                                  cfg.top_k, cfg.top_p, tokenizer.separator, generator)
            for token in tokens:
                out.write(decoder.decode(tokenizer.token_bytes(int(token))))
                out.flush()
            out.write(decoder.decode(b"", final=True) + "\n")


def main(argv):
    sample(SampleConfig(**parse(SampleConfig, argv)))


if __name__ == "__main__":
    run(main)
