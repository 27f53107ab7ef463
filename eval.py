"""
Measure a trained model: perplexity and bits per byte, needle retrieval, and what its attention does.

    python eval.py --out_dir out
    python eval.py --out_dir out --lengths=1024,4096 --seeds=5 --data=data/other

Prints tables, writes <out_dir>/eval.json and, where matplotlib is installed, <out_dir>/eval.png.
"""
import json
import math
import os
import random
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from configurator import UserError, parse, run
from model import KVCache
from prepare import Data, passkey_line, random_passkey
from train import Batches, load_model


@dataclass
class EvalConfig:
    out_dir: str = "out"  # folder of the checkpoint; results go there too
    data: str = ""  # default: the data it was trained on
    # perplexity
    max_tokens: int = 0  # of val.bin; 0 = all
    stride: int = 0  # of the sliding window; 0 = half the context
    # needle retrieval
    lengths: str = ""  # context lengths in tokens, "256,512"; default: a quarter, half and all of the context
    depths: int = 5  # positions of the needle, from the start (0) to the end (1)
    seeds: int = 3
    samples: int = 10  # needles per length, depth and seed
    distractors: int = 9  # wrong keys the right one is ranked among
    # system
    batch_size: int = 10
    device: str = ""  # default: cuda if there is one, else cpu
    backend: str = "auto"  # path of kernels.py
    plot: bool = True


# ----------------------------------------------------------------------------------------------------------------
# Perplexity

@torch.no_grad()
def perplexity(model, ids, separator, token_lengths, stride, batch_size, doc_mask=True, device="cpu"):
    """
    Every token of ids but the first is predicted once, from a window of block_size tokens that moves on by `stride`, so
    with at least block_size - stride tokens of context (fewer only at the start of ids and of documents).
    Returns loss (nats per token), perplexity, bits_per_byte (bytes of the predicted tokens) and tokens.
    """
    T = min(model.config.block_size, len(ids) - 1)
    starts = list(range(0, len(ids) - 1 - T, stride)) + [len(ids) - 1 - T]
    jobs, done = [], 0  # (start, number of predictions of this window that earlier ones already made)
    for s in starts:
        jobs.append((s, max(0, done - s)))
        done = s + T
    total = 0.0
    for i in range(0, len(jobs), batch_size):
        batch = jobs[i:i + batch_size]
        rows = torch.stack([torch.from_numpy(ids[s:s + T + 1].astype(np.int64)) for s, _ in batch]).to(device)
        idx, targets = rows[:, :-1], rows[:, 1:].clone()
        for row, (_, skip) in zip(targets, batch):
            row[:skip] = -1
        doc = (idx == separator).cumsum(1) if doc_mask else None
        logits = model(idx, doc=doc, stats=False).logits
        total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1, reduction="sum").item()
    n, n_bytes = len(ids) - 1, int(token_lengths[ids[1:]].sum())
    return dict(loss=total / n, perplexity=math.exp(total / n), bits_per_byte=total / math.log(2) / n_bytes, tokens=n)


# ----------------------------------------------------------------------------------------------------------------
# Needle retrieval

def haystack(ids, tokenizer):
    """The validation documents that hold no pass-key, one after the other without separators: 1-D array of ids."""
    ends = np.flatnonzero(ids == tokenizer.separator)
    docs = [ids[a:b] for a, b in zip(np.append(0, ends[:-1] + 1), ends)]
    docs = [d for d in docs if not re.search(r"^[A-Z]{2}=[a-z0-9]{4}$", tokenizer.decode(d[:4000]), re.M)]
    return np.concatenate(docs) if docs else ids[:0]


def needle_prompt(hay, tokenizer, length, depth, n_answer, rng):
    """`length` ids less n_answer: the haystack from a random place, the fact at `depth` (0 to 1), the question. And its key."""
    name, key = random_passkey(rng)
    fact = tokenizer.encode("\n" + passkey_line(name, key))
    question = tokenizer.encode("\n" + passkey_line(name, "").rstrip("\n"))
    room = length - len(fact) - len(question) - n_answer
    if room < 0 or room > len(hay):
        raise UserError(f"a needle at {length} tokens needs {room} tokens of other validation text, there are {len(hay)}")
    at = rng.randrange(len(hay) - room + 1)
    text, cut = hay[at:at + room], round(depth * room)
    return np.concatenate((text[:cut], fact, text[cut:], question)), key


@torch.no_grad()
def score_keys(model, prompts, keys, device):
    """
    prompts: list of n equally long id arrays. keys: n lists of equally many id arrays, the right key first.
    Returns log-likelihoods (n, K) and greedy (n,): whether argmax decoding would write the right key. (It would exactly if
    every token of the key is the argmax after those before it, so the pass that scores the keys also tells this.)
    """
    n, K = len(keys), len(keys[0])
    longest = max(len(k) for row in keys for k in row)
    targets = torch.full((n * K, longest), -1, device=device)
    for i, key in enumerate(k for row in keys for k in row):
        targets[i, :len(key)] = torch.as_tensor(key.astype(np.int64))
    idx = torch.from_numpy(np.stack(prompts).astype(np.int64)).to(device)
    cache = KVCache(model.config, n, idx.size(1) + longest, device, model.embed.weight.dtype)
    first = model.trunk(idx, cache=cache)[0][:, -1:]  # (n, 1, C)
    cache.repeat(K)
    rest = model.trunk(targets[:, :-1].clamp(min=0), cache=cache)[0] if longest > 1 else first[:, :0].repeat_interleave(K, 0)
    logits = model.head(torch.cat((first.repeat_interleave(K, 0), rest), 1)).float()  # (n·K, longest, V)
    likelihood = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none").view(n, K, longest).sum(-1)
    right = ((logits.argmax(-1) == targets) | (targets < 0)).view(n, K, longest)[:, 0].all(-1)
    return likelihood, right


def needle(model, hay, tokenizer, lengths, depths, seeds, samples, distractors, batch_size, device="cpu"):
    """
    Retrieval over a grid. Returns a list of cells: length, depth, accuracy and accuracy_std (exact match of the generated key,
    mean and standard deviation over seeds), rank and rank_std (of the right key among 1 + distractors, 1 is best).
    """
    n_answer = len(random_passkey(random.Random())[1])  # tokens that a key may take: at most one per character
    cells = []
    for length in lengths:
        for depth in depths:
            exact, ranks = [], []
            for seed in range(seeds):
                rng = random.Random(f"{seed} {length} {depth}")
                hits, rank = [], []
                for i in range(0, samples, batch_size):
                    made = [needle_prompt(hay, tokenizer, length, depth, n_answer, rng) for _ in range(min(batch_size, samples - i))]
                    shortest = min(len(p) for p, _ in made)
                    keys = [[key] + [random_passkey(rng)[1] for _ in range(distractors)] for _, key in made]
                    likelihood, right = score_keys(model, [p[len(p) - shortest:] for p, _ in made],
                                                   [[tokenizer.encode(k) for k in row] for row in keys], device)
                    hits += right.tolist()
                    rank += (1 + (likelihood[:, 1:] > likelihood[:, :1]).sum(1)).tolist()
                exact.append(np.mean(hits))
                ranks.append(np.mean(rank))
            cells.append(dict(length=length, depth=depth, accuracy=float(np.mean(exact)), accuracy_std=float(np.std(exact)),
                              rank=float(np.mean(ranks)), rank_std=float(np.std(ranks))))
    return cells


# ----------------------------------------------------------------------------------------------------------------
# Attention

@torch.no_grad()
def attention(model, ids, separator, batch_size, doc_mask=True, device="cpu"):
    """Attention.stats per layer on batch_size windows spread over ids: {name: [value per layer]}."""
    batches = Batches(ids, model.config.block_size, batch_size, separator, 0, doc_mask)
    idx, _, doc = batches.evaluation(0, 1, device)
    return {name: value.tolist() for name, value in model(idx, doc=doc).stats.items()}


# ----------------------------------------------------------------------------------------------------------------
# Report

def print_report(result):
    p = result["perplexity"]
    print(f"\nvalidation text ({p['tokens']:,} tokens)   loss {p['loss']:.4f} nats/token   perplexity {p['perplexity']:.3f}   "
          f"{p['bits_per_byte']:.4f} bits/byte")
    cells = result["needle"]
    if cells:
        depths = sorted({c["depth"] for c in cells})
        print(f"\nneedle: exact match of the generated key, mean ± std over {result['seeds']} seeds (rank of the right key among "
              f"{result['distractors'] + 1})\n  length  " + "".join(f"{f'depth {d:.2f}':>22}" for d in depths))
        for length in sorted({c["length"] for c in cells}):
            row = [c for c in cells if c["length"] == length]
            print(f"{length:8}  " + "".join(f"{c['accuracy']:9.2f} ± {c['accuracy_std']:.2f} ({c['rank']:.1f})".rjust(22) for c in row))
    names = list(result["attention"])
    print("\nattention, per layer\n  layer  " + "".join(f"{n:>16}" for n in names))
    for layer in range(len(result["attention"][names[0]])):
        print(f"{layer:7}  " + "".join(f"{result['attention'][n][layer]:16.3f}" for n in names))
    s = result["summary"]
    print("\nsummary  " + "   ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in s.items()))


def plot(result, path):
    """Heat map of the needle grid and curves of the training log, as PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    cells = result["needle"]
    lengths, depths = sorted({c["length"] for c in cells}), sorted({c["depth"] for c in cells})
    if cells:
        grid = np.array([[next(c["accuracy"] for c in cells if (c["length"], c["depth"]) == (n, d)) for n in lengths] for d in depths])
        fig.colorbar(left.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto"), label="exact match")
        for (i, j), value in np.ndenumerate(grid):
            left.text(j, i, f"{value:.2f}", ha="center", va="center")
        left.set(xlabel="context length (tokens)", ylabel="depth of the needle", title="needle retrieval")
        left.set_xticks(range(len(lengths)), lengths)
        left.set_yticks(range(len(depths)), [f"{d:.2f}" for d in depths])
    log = [r for r in result["log"] if r["kind"] == "train"]
    for name in ("loss", "index_loss", "recall"):
        if log and name in log[0]:
            right.plot([r["step"] for r in log], [r[name] for r in log], label=name.replace("_", " "))
    right.set(xlabel="step", title="training", ylim=(0, None))
    right.grid(alpha=0.3)
    right.legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def evaluate(cfg):
    """Run everything on cfg.out_dir's checkpoint; returns and writes the result dict."""
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, checkpoint = load_model(cfg.out_dir, device, cfg.backend)
    trained = checkpoint["config"]
    data = Data(cfg.data or trained["data"])
    if data.meta["tokenizer"] != checkpoint["meta"]["tokenizer"]:
        raise UserError(f"the model reads {checkpoint['meta']['tokenizer']} tokens, {cfg.data or trained['data']} holds {data.meta['tokenizer']}")
    T, stride = model.config.block_size, cfg.stride or max(1, model.config.block_size // 2)
    try:
        lengths = [int(n) for n in cfg.lengths.split(",")] if cfg.lengths else [T // 4, T // 2, T]
    except ValueError:
        raise UserError(f"lengths {cfg.lengths!r} is not a list like 256,512") from None
    if max(lengths) > T or min(lengths) < 1 or not 0 < stride <= T:
        raise UserError(f"lengths {lengths} and stride {stride} must lie in the model's context, 1 to {T}")
    ids = data.val[:cfg.max_tokens] if cfg.max_tokens else data.val
    if len(ids) < 2:
        raise UserError("max_tokens leaves nothing to predict")
    where = dict(device=device)
    result = dict(out_dir=cfg.out_dir, step=checkpoint["step"], seeds=cfg.seeds, distractors=cfg.distractors)
    result["perplexity"] = perplexity(model, ids, data.separator, data.tokenizer.token_lengths, stride, cfg.batch_size, trained["doc_mask"], **where)
    depths = [i / max(1, cfg.depths - 1) for i in range(cfg.depths)]
    result["needle"] = needle(model, haystack(np.asarray(data.val), data.tokenizer), data.tokenizer, lengths, depths, cfg.seeds, cfg.samples,
                              cfg.distractors, cfg.batch_size, **where)
    result["attention"] = attention(model, data.val, data.separator, cfg.batch_size, trained["doc_mask"], **where)
    summary = dict(bits_per_byte=result["perplexity"]["bits_per_byte"])
    if result["needle"]:
        summary[f"needle_accuracy_at_{max(lengths)}"] = float(np.mean([c["accuracy"] for c in result["needle"] if c["length"] == max(lengths)]))
    for name, label in (("recall", "index_recall"), ("k_t", "mean_k_t")):
        if name in result["attention"]:
            summary[label] = float(np.mean(result["attention"][name]))
    result["summary"] = summary
    print_report(result)
    with open(os.path.join(cfg.out_dir, "eval.json"), "w") as f:
        json.dump(result, f, indent=1)
    if cfg.plot:
        try:
            log = os.path.join(cfg.out_dir, "log.jsonl")
            plot({**result, "log": [json.loads(line) for line in open(log)] if os.path.exists(log) else []}, os.path.join(cfg.out_dir, "eval.png"))
        except ImportError:
            print("no eval.png: matplotlib is not installed (pip install -r requirements-extra.txt)")
    return result


def main(argv):
    evaluate(EvalConfig(**parse(EvalConfig, argv)))


if __name__ == "__main__":
    run(main)
