"""
Measure a trained model: perplexity and bits per byte, needle retrieval, and statistics of its
attention.

    python eval.py --out_dir out
    python eval.py --out_dir out --lengths=1024,4096 --seeds=5 --data=data/other

Prints tables, writes <out_dir>/eval.json and, where matplotlib is installed, <out_dir>/eval.png.
Each part is printed and written as soon as it is done.
"""
import math
import os
import random
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import (check_dtype, check_vocabulary, find_data, load_model, precision, read_log,
                        use_device)
from configurator import UserError, check_ranges, parse, replacing, run, say, to_json
from data import Batches, Data, check_ids, open_tokenizer, passkey_line, random_passkey


@dataclass
class EvalConfig:
    out_dir: str = "out"  # folder of the checkpoint; results go there too
    data: str = ""  # default: the data it was trained on
    tokenizer: str = ""  # where the checkpoint's vocabulary file lies now; default: where it was
    # perplexity
    max_tokens: int = 0  # of val.bin; 0 = all
    stride: int = 0  # of the sliding window; 0 = half the context
    # needle retrieval
    # context lengths in tokens, "256,512"; default: a quarter, half and all of the context
    lengths: str = ""
    depths: int = 5  # positions of the needle, from the start (0) to the end (1)
    seeds: int = 3
    samples: int = 10  # needles per length, depth and seed
    distractors: int = 9  # wrong keys that the right key is ranked among
    # system
    batch_size: int = 10
    device: str = ""  # default: cuda if there is one, else cpu
    dtype: str = ""  # float32 | bfloat16; default: bfloat16 on cuda
    backend: str = "auto"  # path of kernels.py
    plot: bool = True

    def __post_init__(self):
        check_dtype(self.dtype)
        check_ranges(self, {(1, None): "depths seeds samples distractors batch_size",
                            (0, None): "max_tokens stride"})


# --------------------------------------------------------------------------------------------------
# Perplexity

@torch.no_grad()
def perplexity(model, ids, separator, token_lengths, stride, batch_size, doc_mask=True,
               device="cpu"):
    """
    Every token of ids but the first is predicted once, from a window of block_size tokens that
    moves on by `stride`, so with at least block_size - stride tokens of context (fewer only at
    the start of ids and of documents).
    Returns loss (nats per token), perplexity, bits_per_byte (bytes of the predicted tokens) and
    tokens.
    """
    T = min(model.config.block_size, len(ids) - 1)
    starts = list(range(0, len(ids) - 1 - T, stride)) + [len(ids) - 1 - T]
    # jobs: (start of a window, number of its predictions that earlier windows have made)
    jobs, done = [], 0
    for s in starts:
        jobs.append((s, max(0, done - s)))
        done = s + T
    total = 0.0
    for i in range(0, len(jobs), batch_size):
        batch = jobs[i:i + batch_size]
        rows = torch.stack([torch.from_numpy(ids[s:s + T + 1].astype(np.int64))
                            for s, _ in batch]).to(device)
        idx, targets = rows[:, :-1], rows[:, 1:].clone()
        for row, (_, skip) in zip(targets, batch):
            row[:skip] = -1
        doc = (idx == separator).cumsum(1) if doc_mask else None
        logits = model(idx, doc=doc, stats=False).logits
        total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                                 ignore_index=-1, reduction="sum").item()
    n = len(ids) - 1
    n_bytes = int(token_lengths[ids[1:]].sum())
    loss = total / n
    return dict(loss=loss,
                perplexity=math.exp(loss) if loss < 700 else math.inf,  # exp(710) overflows
                bits_per_byte=total / math.log(2) / n_bytes if n_bytes else math.inf,
                tokens=n)


# --------------------------------------------------------------------------------------------------
# Needle retrieval

def haystack(ids, tokenizer):
    """
    The validation documents that hold no pass-key, one after the other without separators:
    1-D array of ids.
    """
    ends = np.flatnonzero(ids == tokenizer.separator)
    docs = [ids[a:b] for a, b in zip(np.append(0, ends[:-1] + 1), ends)]
    docs = [d for d in docs
            if not re.search(r"^[A-Z]{2}=[a-z0-9]{4}$", tokenizer.decode(d[:4000]), re.M)]
    return np.concatenate(docs) if docs else ids[:0]


def needle_prompt(hay, tokenizer, length, depth, n_answer, rng):
    """
    `length` ids less n_answer: the haystack from a random place, the fact at `depth` (0 to 1), the
    question. And the question's key.
    Question, key and line end are encoded one by one: in a BPE vocabulary "=x4" may be one token,
    and then the key would be told in other tokens than it is asked for and scored in.
    """
    name, key = random_passkey(rng)
    question = tokenizer.encode("\n" + passkey_line(name, "").rstrip("\n"))
    fact = np.concatenate((question, tokenizer.encode(key), tokenizer.encode("\n")))
    room = length - len(fact) - len(question) - n_answer
    if room < 0 or room > len(hay):
        raise UserError(f"a needle at {length} tokens needs {max(0, room)} tokens of other "
                        f"validation text and {length - room} for fact, question and answer; "
                        f"there are {len(hay)}")
    at = rng.randrange(len(hay) - room + 1)
    text, cut = hay[at:at + room], round(depth * room)
    return np.concatenate((text[:cut], fact, text[cut:], question)), key


@torch.no_grad()
def score_keys(model, prompts, keys, device):
    """
    prompts: list of n equally long id arrays.
    keys: n lists of equally many id arrays, the right key first.
    Returns log-likelihoods (n, K) and greedy (n,): whether argmax decoding would write the right
    key. (It would exactly if every token of the key is the argmax after those before it, so the
    pass that scores the keys also tells this.)
    """
    n, K = len(keys), len(keys[0])
    longest = max(len(k) for row in keys for k in row)
    targets = torch.full((n * K, longest), -1, device=device)
    for i, key in enumerate(k for row in keys for k in row):
        targets[i, :len(key)] = torch.as_tensor(key.astype(np.int64))
    idx = torch.from_numpy(np.stack(prompts).astype(np.int64)).to(device)
    cache = model.new_cache(n, idx.size(1) + longest)
    first = model.trunk(idx, cache=cache)[0][:, -1:]  # (n, 1, C)
    cache.repeat(K)
    rest = (model.trunk(targets[:, :-1].clamp(min=0), cache=cache)[0] if longest > 1
            else first[:, :0].repeat_interleave(K, 0))  # (n·K, longest - 1, C)
    logits = model.head(
        torch.cat((first.repeat_interleave(K, 0), rest), 1)).float()  # (n·K, longest, V)
    likelihood = -F.cross_entropy(
        logits.flatten(0, 1),
        targets.flatten(),
        ignore_index=-1,
        reduction="none",
    ).view(n, K, longest).sum(-1)  # (n, K)
    right = ((logits.argmax(-1) == targets) | (targets < 0)).view(n, K, longest)[:, 0].all(-1)
    return likelihood, right


def needle(model, hay, tokenizer, lengths, depths, seeds, samples, distractors, batch_size,
           device="cpu"):
    """
    Retrieval over a grid.
    Returns a list of cells: length, depth, accuracy and accuracy_std (exact match of the generated
    key, mean and standard deviation over seeds), rank and rank_std (of the right key among
    1 + distractors, 1 is best).
    """
    # the number of tokens that a key may take: at most one per character
    n_answer = len(random_passkey(random.Random())[1])
    cells = []
    for length in lengths:
        for depth in depths:
            exact, ranks = [], []
            for seed in range(seeds):
                rng = random.Random(f"{seed} {length} {depth}")
                hits, rank = [], []
                for i in range(0, samples, batch_size):
                    made = [needle_prompt(hay, tokenizer, length, depth, n_answer, rng)
                            for _ in range(min(batch_size, samples - i))]
                    shortest = min(len(p) for p, _ in made)
                    keys = [[key] + [random_passkey(rng)[1] for _ in range(distractors)]
                            for _, key in made]
                    likelihood, right = score_keys(
                        model,
                        [p[len(p) - shortest:] for p, _ in made],
                        [[tokenizer.encode(k) for k in row] for row in keys],
                        device)
                    hits += right.tolist()
                    rank += (1 + (likelihood[:, 1:] > likelihood[:, :1]).sum(1)).tolist()
                exact.append(np.mean(hits))
                ranks.append(np.mean(rank))
            cells.append(dict(length=length, depth=depth,
                              accuracy=float(np.mean(exact)), accuracy_std=float(np.std(exact)),
                              rank=float(np.mean(ranks)), rank_std=float(np.std(ranks))))
    return cells


# --------------------------------------------------------------------------------------------------
# Attention

@torch.no_grad()
def attention(model, ids, separator, batch_size, doc_mask=True, device="cpu"):
    """
    Attention.stats per layer on batch_size windows spread over ids: {name: [value per layer]}.
    """
    batches = Batches(ids, model.config.block_size, batch_size, separator, 0, doc_mask)
    idx, _, doc = batches.evaluation(0, 1, device)
    return {name: value.tolist()
            for name, value in model(idx, doc=doc, stats=True).stats.items()}


# --------------------------------------------------------------------------------------------------
# Report

def print_perplexity(p):
    say(f"\nvalidation text ({p['tokens']:,} tokens)   loss {p['loss']:.4f} nats/token   "
        f"perplexity {p['perplexity']:.3f}   {p['bits_per_byte']:.4f} bits/byte")


def print_needle(cells, skipped, seeds, distractors):
    if cells:
        depths = sorted({c["depth"] for c in cells})
        say(f"\nneedle: exact match of the generated key, mean ± std over {seeds} seeds "
            f"(rank of the right key among {distractors + 1})\n"
            "  length  " + "".join(f"{f'depth {d:.2f}':>22}" for d in depths))
        for length in sorted({c["length"] for c in cells}):
            row = [f"{c['accuracy']:9.2f} ± {c['accuracy_std']:.2f} ({c['rank']:.1f})"
                   for c in cells if c["length"] == length]
            say(f"{length:8}  " + "".join(text.rjust(22) for text in row))
    for length, reason in skipped.items():
        say(f"\nneedle at {length} tokens skipped: {reason}")


def print_attention(stats):
    names = list(stats)
    say("\nattention, per layer\n  layer  " + "".join(f"{n:>16}" for n in names))
    for layer in range(len(stats[names[0]])):
        say(f"{layer:7}  " + "".join(f"{stats[n][layer]:16.3f}" for n in names))


def plot(result, path):
    """Heat map of the needle grid and curves of the training log, as PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    cells = result["needle"]
    lengths, depths = sorted({c["length"] for c in cells}), sorted({c["depth"] for c in cells})
    if cells:
        # one row per depth, one column per length
        grid = np.array([
            [next(c["accuracy"] for c in cells if (c["length"], c["depth"]) == (n, d))
             for n in lengths]
            for d in depths])
        fig.colorbar(left.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto"),
                     label="exact match")
        for (i, j), value in np.ndenumerate(grid):
            left.text(j, i, f"{value:.2f}", ha="center", va="center")
        left.set(xlabel="context length (tokens)", ylabel="depth of the needle",
                 title="needle retrieval")
        left.set_xticks(range(len(lengths)), lengths)
        left.set_yticks(range(len(depths)), [f"{d:.2f}" for d in depths])
    log = [r for r in result["log"] if r.get("kind") == "train"]
    for name in ("loss", "index_loss", "recall"):
        if log and name in log[0]:
            values = [r[name] if type(r.get(name)) is float else math.nan for r in log]
            right.plot([r["step"] for r in log], values, label=name.replace("_", " "))
    right.set(xlabel="step", title="training", ylim=(0, None))
    right.grid(alpha=0.3)
    right.legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def needle_lengths(cfg, T):
    """The context lengths of the needle, in tokens, from cfg.lengths and the model's context T."""
    try:
        lengths = ([int(n) for n in cfg.lengths.split(",")] if cfg.lengths
                   else [max(1, T // 4), max(1, T // 2), T])
    except ValueError:
        raise UserError(f"lengths {cfg.lengths!r} is not a list like 256,512") from None
    if max(lengths) > T or min(lengths) < 1 or cfg.stride > T:
        raise UserError(f"lengths {lengths} and stride {cfg.stride} must lie in "
                        f"the model's context, 1 to {T}")
    return lengths


def summarize(result):
    """The few numbers to compare runs by, of the parts that are there."""
    summary = {}
    if "perplexity" in result:
        summary["bits_per_byte"] = result["perplexity"]["bits_per_byte"]
    cells = result.get("needle")
    if cells:
        longest = max(c["length"] for c in cells)
        accuracy = [c["accuracy"] for c in cells if c["length"] == longest]
        summary[f"needle_accuracy_at_{longest}"] = float(np.mean(accuracy))
    for name, label in (("recall", "index_recall"), ("k_t", "mean_k_t")):
        if name in result.get("attention", {}):
            summary[label] = float(np.mean(result["attention"][name]))
    return summary


def evaluate(cfg):
    """
    Run everything on cfg.out_dir's checkpoint; returns the result dict, and writes it after each
    part.
    """
    # 1. what can be refused is refused before anything is measured
    device = use_device(cfg.device)
    model, checkpoint = load_model(cfg.out_dir, device, cfg.backend)
    trained = checkpoint["config"]
    path = cfg.data or find_data(checkpoint)
    data = Data(path)
    check_vocabulary(checkpoint, data.meta, path)
    tokenizer = open_tokenizer(checkpoint["meta"], cfg.tokenizer)
    T = model.config.block_size
    stride = cfg.stride or max(1, T // 2)
    lengths = needle_lengths(cfg, T)
    ids = data.val[:cfg.max_tokens] if cfg.max_tokens else data.val
    if len(ids) < 2:
        raise UserError(f"{path} and max_tokens {cfg.max_tokens} leave nothing to predict")
    check_ids(np.asarray(data.val), data.vocab_size)
    doc_mask = trained.get("doc_mask", True)
    result = dict(out_dir=cfg.out_dir, step=checkpoint["step"], seeds=cfg.seeds,
                  distractors=cfg.distractors)

    def keep(**part):
        result.update(part)
        result["summary"] = summarize(result)
        with replacing(os.path.join(cfg.out_dir, "eval.json")) as f:
            f.write(to_json(result, indent=1))

    with precision(device, cfg.dtype):
        # 2. perplexity
        keep(perplexity=perplexity(model, ids, data.separator, tokenizer.token_lengths, stride,
                                   cfg.batch_size, doc_mask, device))
        print_perplexity(result["perplexity"])
        # 3. needle
        hay = haystack(np.asarray(data.val), tokenizer)
        depths = [i / max(1, cfg.depths - 1) for i in range(cfg.depths)]
        cells, skipped = [], {}
        for length in lengths:
            try:
                cells += needle(model, hay, tokenizer, [length], depths, cfg.seeds, cfg.samples,
                                cfg.distractors, cfg.batch_size, device)
            except UserError as e:  # the needle does not fit: length or validation text too short
                skipped[length] = str(e)
            keep(needle=cells, needle_skipped=skipped)
        print_needle(cells, skipped, cfg.seeds, cfg.distractors)
        # 4. attention
        try:
            keep(attention=attention(model, data.val, data.separator, cfg.batch_size, doc_mask,
                                     device))
            print_attention(result["attention"])
        except UserError as e:  # fewer validation tokens than one window
            keep(attention_skipped=str(e))
            say(f"\nattention skipped: {e}")
    # 5. summary and picture
    say("\nsummary  " + "   ".join(f"{k.replace('_', ' ')} {v:.3f}"
                                   for k, v in result["summary"].items()))
    if cfg.plot:
        log = [record for record, _ in read_log(os.path.join(cfg.out_dir, "log.jsonl"))]
        try:
            plot({**result, "log": log}, os.path.join(cfg.out_dir, "eval.png"))
        except ImportError:
            say("no eval.png: matplotlib is not installed (pip install -r requirements-extra.txt)")
    return result


def main(argv):
    evaluate(EvalConfig(**parse(EvalConfig, argv)))


if __name__ == "__main__":
    run(main)
