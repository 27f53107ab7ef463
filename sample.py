"""
Continue a text with a trained model, printed as it is generated. Needs the checkpoint only.

    python sample.py --out_dir=out --start="def main(" --max_new_tokens=200
    python sample.py --out_dir=out --start=FILE:prompt.txt --num_samples=1 --temperature=0
"""
import codecs
import sys
from dataclasses import dataclass

import torch

from configurator import UserError, parse, run
from prepare import Tokenizer
from train import load_model


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
    backend: str = "auto"  # path of kernels.py


def sample(cfg, out=sys.stdout):
    """Write num_samples continuations to out; each ends at its document's end, max_new_tokens or the context's end."""
    if cfg.temperature < 0 or not 0 < cfg.top_p <= 1:
        raise UserError(f"temperature {cfg.temperature} must be at least 0 and top_p {cfg.top_p} in (0, 1]")
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, checkpoint = load_model(cfg.out_dir, device, cfg.backend)
    tokenizer = Tokenizer(checkpoint["meta"]["tokenizer"])
    text = cfg.start
    if text.startswith("FILE:"):
        try:
            text = open(text[5:], encoding="utf-8", errors="replace").read()
        except OSError as e:
            raise UserError(f"cannot read {text[5:]}: {e.strerror}") from None
    prompt = [tokenizer.separator] + (tokenizer.encode(text).tolist() if text else [])  # a document starts at a separator
    if len(prompt) >= model.config.block_size:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model's context is {model.config.block_size}: shorten it")
    generator = torch.Generator(device).manual_seed(cfg.seed)
    for i in range(cfg.num_samples):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several tokens
        out.write(f"--- sample {i + 1}\n{text}")
        for token in model.stream([torch.tensor(prompt)], cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p,
                                  tokenizer.separator, generator):
            out.write(decoder.decode(tokenizer.token_bytes(int(token))))
            out.flush()
        out.write(decoder.decode(b"", final=True) + "\n")


def main(argv):
    sample(SampleConfig(**parse(SampleConfig, argv)))


if __name__ == "__main__":
    run(main)
