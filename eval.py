"""
Measure a trained model: perplexity and bits per byte, needle retrieval, and statistics of its
attention.

    python eval.py --out_dir out
    python eval.py --out_dir out --lengths=1024,4096 --seeds=5 --data=data/other
    python eval.py --out_dir out --compare=out/dense

Prints tables and writes them to <out_dir>/eval.json, each part as soon as it is done. With
matplotlib installed it draws two pictures into out_dir:
    eval.png       needle retrieval, and the curves of the training
    selection.png  where full attention would look and what the indexer selects, for one needle
"""
import math
import os
import random
import re
import time
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from attention import attention_probabilities, document_starts, select
from checkpoint import check_vocabulary, find_data, load_model
from configurator import UserError, check_ranges, duration, parse, replacing, run, say, to_json
from data import Batches, Data, check_ids, passkey_line, random_passkey
from device import check_dtype, precision, use_device
from model import KVCache
from outdir import read_log
from pictures import draw_results, draw_selection, save_picture
from tokenizer import open_tokenizer


@dataclass
class EvalConfig:
    out_dir: str = "out"  # folder of the checkpoint; results go there too
    data: str = ""  # default: the data it was trained on
    tokenizer: str = ""  # where the checkpoint's vocabulary file lies now; default: where it was
    checkpoint: str = "last"  # last | best (lowest validation loss) | a step
    # context in tokens, which may be longer than in training; 0 = that of training
    block_size: int = 0
    # RoPE for a longer context, see train.py --help; {} = that of training
    rope_scaling: dict = field(default_factory=dict)

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

    # pictures
    plot: bool = True
    compare: str = ""  # out_dir of another run, whose training curves are drawn beside

    # system
    batch_size: int = 10
    device: str = ""  # default: cuda if there is one, else cpu
    dtype: str = ""  # float32 | bfloat16; default: bfloat16 on cuda
    backend: str = "auto"  # path of the attention: auto | torch | triton | eager

    def __post_init__(self):
        check_dtype(self.dtype)
        check_ranges(self, {(1, None): "depths seeds samples distractors batch_size",
                            (0, None): "max_tokens stride block_size"})


class Progress:
    """
    Shows how far a part is and the time left: a bar on a terminal; else, as in a log file, a line
    at its beginning and another every 10 seconds.
    """

    def __init__(self, part, steps):
        self.part = part
        self.steps = steps
        self.done = 0
        self.bar = tqdm(total=steps, desc=part, leave=False, disable=None)  # None: no terminal
        self.began = time.time()
        self.shown = self.began
        if self.bar.disable:
            say(f"{part}: {steps} steps")

    def step(self):
        self.done += 1
        self.bar.update()
        now = time.time()
        if self.bar.disable and now > self.shown + 10:
            self.shown = now
            left = (now - self.began) / self.done * (self.steps - self.done)
            say(f"{self.part}: {self.done} of {self.steps} steps, {duration(left)} left")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()


# --------------------------------------------------------------------------------------------------
# Perplexity

@torch.no_grad()
def perplexity(model, ids, separator, token_lengths, stride, batch_size, doc_mask=True,
               device="cpu"):
    """
    Predict every token of ids but the first, once, from windows of block_size tokens that begin
    `stride` tokens apart. So a token has at least block_size - stride tokens of context; it has
    fewer only at the start of ids and of documents.
    Returns loss (nats per token), perplexity, bits_per_byte (bytes of the predicted tokens) and
    tokens.
    """
    # 1. windows, as (start, number of its predictions that earlier windows have made)
    T = min(model.config.block_size, len(ids) - 1)
    last = len(ids) - 1 - T
    windows = []
    predicted = 0
    for start in [*range(0, last, stride), last]:
        windows.append((start, max(0, predicted - start)))
        predicted = start + T
    # 2. the sum of the losses
    total = 0.0
    batches = [windows[i:i + batch_size] for i in range(0, len(windows), batch_size)]
    with Progress("perplexity", len(batches)) as progress:
        for batch in batches:
            rows = [torch.from_numpy(ids[s:s + T + 1].astype(np.int64)) for s, _ in batch]
            rows = torch.stack(rows).to(device)  # (B, T + 1)
            idx = rows[:, :-1]  # (B, T)
            targets = rows[:, 1:].clone()  # (B, T)
            for row, (_, skip) in zip(targets, batch):
                row[:skip] = -1
            doc_start = document_starts(idx, separator) if doc_mask else None
            logits = model(idx, doc_start=doc_start).logits  # (B, T, V)
            total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                                     ignore_index=-1, reduction="sum").item()
            progress.step()
    # 3. means
    n = len(ids) - 1
    n_bytes = int(token_lengths[ids[1:]].sum())
    loss = total / n
    return {"loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,  # exp(710) overflows
            "bits_per_byte": total / math.log(2) / n_bytes if n_bytes else math.inf,
            "tokens": n}


# --------------------------------------------------------------------------------------------------
# Needle retrieval

def haystack(ids, tokenizer):
    """
    The validation documents that hold no pass-key in their first 4000 tokens, joined without
    separators: 1-D array of ids.
    """
    ends = np.flatnonzero(ids == tokenizer.separator)
    docs = [ids[a:b] for a, b in zip(np.append(0, ends[:-1] + 1), ends)]
    passkey = re.compile(r"^[A-Z]{2}=[a-z0-9]{4}$", re.M)
    docs = [d for d in docs if not passkey.search(tokenizer.decode(d[:4000]))]
    return np.concatenate(docs) if docs else ids[:0]


def needle_prompt(hay, tokenizer, length, depth, n_answer, rng):
    """
    A prompt of length - n_answer ids: text from a random place of the haystack, with a fact
    ("\\nAB=x1y2\\n") inserted at `depth` (0 to 1), and its question ("\\nAB=").
    Returns the ids, the key ("x1y2") and the fact's place, a slice.

    Question, key and line end are encoded one by one. In a BPE vocabulary "=x4" may be one token;
    then the fact would hold other tokens than the question and the answer.
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
    text = hay[at:at + room]
    cut = round(depth * room)
    ids = np.concatenate((text[:cut], fact, text[cut:], question))
    return ids, key, slice(cut, cut + len(fact))


def longest_answer():
    """The most tokens that a key may take: one per character."""
    return len(random_passkey(random.Random())[1])


@torch.no_grad()
def score_keys(model, prompts, keys, device):
    """
    prompts: list of n id arrays of one length. keys: n lists of K id arrays, the right key first.
    Returns log-likelihoods (n, K), and (n,) bool: would greedy decoding write the right key?
    (It does if and only if each token of the key is the argmax after those before it.)
    """
    # 1. the keys as rows, padded with -1
    n, K = len(keys), len(keys[0])
    flat = [key for row in keys for key in row]
    longest = max(len(key) for key in flat)
    targets = torch.full((n * K, longest), -1, device=device)  # (n·K, longest)
    for row, key in zip(targets, flat):
        row[:len(key)] = torch.as_tensor(key.astype(np.int64))
    # 2. each prompt once, then its K keys on copies of its cache
    idx = torch.from_numpy(np.stack(prompts).astype(np.int64)).to(device)  # (n, T)
    cache = KVCache(n, idx.size(1) + longest, device)
    x = model.trunk(idx, cache=cache)[0][:, -1:]  # (n, 1, C)
    x = x.repeat_interleave(K, 0)  # (n·K, 1, C)
    if longest > 1:
        cache.repeat(K)
        rest = model.trunk(targets[:, :-1].clamp(min=0), cache=cache)[0]  # (n·K, longest - 1, C)
        x = torch.cat((x, rest), 1)  # (n·K, longest, C)
    logits = model.head(x).float()  # (n·K, longest, V)
    # 3. the scores
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1,
                           reduction="none")  # (n·K·longest,)
    likelihood = -loss.view(n, K, longest).sum(-1)  # (n, K)
    right = (logits.argmax(-1) == targets) | (targets < 0)  # (n·K, longest)
    return likelihood, right.view(n, K, longest)[:, 0].all(-1)


def needle(model, hay, tokenizer, length, depths, seeds, samples, distractors, batch_size,
           device="cpu"):
    """
    Retrieval at one context length, the same needles for every batch_size.
    Returns a list of cells, one per depth: length, depth, accuracy and accuracy_std (exact match
    of the generated key, mean and standard deviation over seeds), rank and rank_std (of the right
    key among 1 + distractors, 1 is best).
    """
    cells = []
    with Progress(f"needle at {length} tokens", len(depths) * seeds) as progress:
        for depth in depths:
            seed_accuracy, seed_rank = [], []
            for seed in range(seeds):
                rng = random.Random(f"{seed} {length} {depth}")
                # 1. needles: prompt, right key and wrong keys of one after those of the other
                prompts, keys = [], []
                for _ in range(samples):
                    ids, key, _ = needle_prompt(hay, tokenizer, length, depth, longest_answer(),
                                                rng)
                    wrong = [random_passkey(rng)[1] for _ in range(distractors)]
                    prompts.append(ids)
                    keys.append([tokenizer.encode(k) for k in [key, *wrong]])
                # 2. their scores
                hits, ranks = [], []
                for i in range(0, samples, batch_size):
                    batch = slice(i, i + batch_size)
                    likelihood, right = score_keys(model, prompts[batch], keys[batch], device)
                    hits += right.tolist()
                    ranks += (1 + (likelihood[:, 1:] > likelihood[:, :1]).sum(1)).tolist()
                seed_accuracy.append(np.mean(hits))
                seed_rank.append(np.mean(ranks))
                progress.step()
            cells.append({
                "length": length, "depth": depth,
                "accuracy": float(np.mean(seed_accuracy)),
                "accuracy_std": float(np.std(seed_accuracy)),
                "rank": float(np.mean(seed_rank)), "rank_std": float(np.std(seed_rank))})
    return cells


# --------------------------------------------------------------------------------------------------
# Attention

@torch.no_grad()
def attention(model, ids, separator, batch_size, doc_mask=True, device="cpu"):
    """
    Attention.measure per layer on batch_size windows spread over ids: {name: [value per layer]}.
    """
    idx, _ = Batches(ids, model.config.block_size, batch_size, 0).evaluation(0, 1, device)
    doc_start = document_starts(idx, separator) if doc_mask else None
    with Progress("attention statistics", len(model.blocks)) as progress:
        hooks = [block.register_forward_hook(lambda *_: progress.step()) for block in model.blocks]
        stats = model(idx, doc_start=doc_start, stats=True).stats
        for hook in hooks:
            hook.remove()
    return {name: value.tolist() for name, value in stats.items()}


@torch.no_grad()
def last_query(model, ids, device="cpu"):
    """
    What the last token of a prompt attends to: a list of (mass, selected), one pair per layer.
    mass (T,): what full attention would give each key, mean over the heads.
    selected (T,) bool: the keys that the indexer selects.
    """
    seen = []

    def keep_inputs(attn, inputs):
        seen.append((attn, *inputs))
    hooks = [block.attn.register_forward_pre_hook(keep_inputs) for block in model.blocks]
    model.trunk(torch.from_numpy(ids.astype(np.int64))[None].to(device))
    for hook in hooks:
        hook.remove()
    layers = []
    for attn, h, visible in seen:
        q, k = attn.queries_and_keys(h, visible.pos)
        p, _ = attention_probabilities(q, k, visible.mask())  # (1, T, H, T)
        index = attn.indexer(h, visible.pos)
        selection = select(index, visible, attn.indexer.budget(), attn.backend)
        layers.append((p[0, -1].mean(0).cpu().numpy(), selection.mask()[0, -1].cpu().numpy()))
    return layers


def needle_selection(model, hay, tokenizer, length, device="cpu"):
    """
    last_query of a prompt of `length` tokens with a needle in its middle. Returns the layers and
    the needle's place, a slice. Raises UserError where there is nothing to see.
    """
    if not model.config.sparse:
        raise UserError("this model has no indexer")
    ids, _, place = needle_prompt(hay, tokenizer, length, 0.5, longest_answer(), random.Random(0))
    layers = last_query(model, ids, device)
    if all(selected.all() for _, selected in layers):
        raise UserError(f"at {length} tokens the indexer selects every key")
    return layers, place


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


def needle_lengths(cfg, T):
    """The context lengths of the needle, in tokens, from cfg.lengths and the model's context T."""
    lengths = [max(1, T // 4), max(1, T // 2), T]
    if cfg.lengths:
        try:
            lengths = sorted({int(n) for n in cfg.lengths.split(",")})
        except ValueError:
            raise UserError(f"lengths {cfg.lengths!r} is not a list like 256,512") from None
    if max(lengths) > T or min(lengths) < 1 or cfg.stride > T:
        raise UserError(f"lengths {lengths} and stride {cfg.stride} must lie in "
                        f"the model's context, 1 to {T}: --block_size (and --rope_scaling) "
                        "make it longer")
    return lengths


def training_logs(cfg):
    """{folder: records of its log.jsonl} of the run and of the one to compare it with."""
    folders = [cfg.out_dir]
    if cfg.compare:
        folders.append(cfg.compare)
    logs = {}
    for folder in folders:
        records = read_log(os.path.join(folder, "log.jsonl"))
        logs[folder] = [record for record, _ in records]
    if cfg.compare and not logs[cfg.compare]:
        raise UserError(f"compare: there is no log in {cfg.compare}/log.jsonl")
    return logs


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
    Measure cfg.out_dir's checkpoint. Returns the result dict; eval.json is written after each part.
    """
    # 1. what can be refused is refused before anything is measured
    device = use_device(cfg.device)
    longer = {"block_size": cfg.block_size, "rope_scaling": cfg.rope_scaling}
    changes = {name: value for name, value in longer.items() if value}
    model, checkpoint = load_model(cfg.out_dir, device, cfg.backend, cfg.checkpoint, **changes)
    trained = checkpoint["config"]
    path = cfg.data or find_data(checkpoint)
    data = Data(path)
    check_vocabulary(checkpoint, data.meta, path)
    tokenizer = open_tokenizer(checkpoint["meta"], cfg.tokenizer)
    T = model.config.block_size
    stride = cfg.stride or max(1, T // 2)
    lengths = needle_lengths(cfg, T)
    logs = training_logs(cfg)
    ids = data.val[:cfg.max_tokens] if cfg.max_tokens else data.val
    if len(ids) < 2:
        raise UserError(f"{path} and max_tokens {cfg.max_tokens} leave nothing to predict")
    check_ids(np.asarray(data.val), data.vocab_size)
    doc_mask = trained.get("doc_mask", True)
    result = {**asdict(cfg), "data": path, "stride": stride, "step": checkpoint["step"]}

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
        cells = []
        skipped = {}
        for length in lengths:
            try:
                cells += needle(model, hay, tokenizer, length, depths, cfg.seeds, cfg.samples,
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
        # 5. summary and pictures
        say("\nsummary  " + "   ".join(f"{name.replace('_', ' ')} {value:.3f}"
                                       for name, value in result["summary"].items()))
        if cfg.plot:
            warmup_end = trained.get("index_warmup_iters", 0) if model.config.sparse else 0
            save_picture(os.path.join(cfg.out_dir, "eval.png"), draw_results, cells, logs,
                         warmup_end)
            try:
                longest = max((n for n in lengths if n not in skipped), default=0)
                if not longest:
                    raise UserError("a needle fits in no length")
                layers, place = needle_selection(model, hay, tokenizer, longest, device)
                save_picture(os.path.join(cfg.out_dir, "selection.png"), draw_selection, layers,
                             place)
            except UserError as e:
                say(f"no selection.png: {e}")
    return result


def main(argv):
    evaluate(EvalConfig(**parse(EvalConfig, argv)))


if __name__ == "__main__":
    run(main)
