"""
What a training run will need, told before it starts. Needs neither a GPU nor the data.

    python train.py config/gsa_small.py --dry_run --gpus=8 --gpu=H100

Memory is the sum of what nanoGSA's own tensors take, part by part, in GB of 10^9 bytes. Tests
compare the activations with what autograd keeps. Of the rest CONTEXT is a guess, and
torch.compile, which fuses operations and so keeps less, is not modelled.
"""
import itertools
from dataclasses import replace
from typing import NamedTuple

import torch

import checks
import kernels
from configurator import UserError, did_you_mean, duration, environment, say
from data import Data, read_meta
from measure import PEAK_FLOPS, flops_per_token
from model import GSA, GSAConfig
from optim import param_groups

GB = 1e9
# Bytes that CUDA reports for a card (torch's total_memory; drivers differ by some 0.1 %), as
# pick_card reads them of this machine's own. From out-of-memory messages that people posted:
# H100 and A100 79.2 GiB, H200 139.7, B200 178.3, A100 40GB 39.5, L40S 44.4, RTX 4090 23.6
GPU_MEMORY = {"H100": 85.0 * GB, "H200": 150.0 * GB, "B200": 191.5 * GB, "A100": 85.0 * GB,
              "A100 40GB": 42.4 * GB, "L40S": 47.7 * GB, "RTX 4090": 25.4 * GB}
HOPPER = 90  # the compute capability for which kernels.py's tiles are planned
CONTEXT = 1.5 * GB  # assumed: the CUDA context, cuBLAS, NCCL, and gaps between tensors

KINDS = {  # part of a parameter's name -> what the report calls it; the first that fits
    "embed.": "embedding", ".indexer.": "indexers", "_gate.": "gates", ".attn.": "attention",
    ".mlp.": "MLP", "norm": "norms"}


class Card(NamedTuple):
    name: str
    memory: float | None  # bytes; None = a CPU

    @property
    def on_gpu(self):
        return self.memory is not None


def pick_card(cfg):
    """The GPU to plan for: --gpu, else the one of this machine, else an H100. Raises UserError."""
    if cfg.gpu:
        if cfg.gpu not in GPU_MEMORY:
            hint = did_you_mean(cfg.gpu, GPU_MEMORY)
            raise UserError(f"gpu {cfg.gpu!r} is not one of {', '.join(GPU_MEMORY)}{hint}")
        return Card(cfg.gpu, GPU_MEMORY[cfg.gpu])
    if cfg.device.startswith("cpu"):
        return Card("CPU", None)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Card(properties.name, properties.total_memory)
    return Card("H100 (assumed: no GPU here, no --gpu)", GPU_MEMORY["H100"])


def bare_model(cfg, vocab_size):
    """The model without memory for its weights, on the "meta" device."""
    with torch.device("meta"):
        return GSA(cfg.model_config(vocab_size))


def group_sizes(model):
    """{optimizer group: number of parameters}"""
    return {g["name"]: sum(p.numel() for p in g["params"]) for g in param_groups(model)}


# --------------------------------------------------------------------------------------------------
# Memory

def computes_bf16(cfg, card):
    return cfg.dtype == "bfloat16" or (card.on_gpu and not cfg.dtype)


def is_masked(cfg):
    """Is attention PyTorch's own, with a mask?"""
    return cfg.doc_mask and not cfg.sparse


def kept_by_layer(cfg, model_config, card):
    """
    Bytes that one layer keeps for its backward pass, of one micro-batch, by part. In the sparse
    phase: warm-up keeps the same less the selection, and where a retrofit trains its indexer alone,
    far less. model_config: the model's GSAConfig.
    """
    # 1. sizes
    B, T, C = cfg.batch_size, cfg.block_size, cfg.n_embd
    H, G, d = cfg.n_head, cfg.n_kv_head, model_config.d_head
    # bytes of a number that a matrix product reads
    linear_bytes = 2 if computes_bf16(cfg, card) else 4
    triton = card.on_gpu and cfg.backend in ("auto", "triton")
    # bytes of a number in attention: the PyTorch path of the sparse arms computes in fp32
    attention_bytes = 4 if cfg.sparse and not triton else linear_bytes
    n_linear = 3  # linear layers that read norm1's h
    gated_heads = 0
    if cfg.value_gate:
        n_linear += 1
        gated_heads += G
    if cfg.output_gate:
        n_linear += 1
        gated_heads += H
    if cfg.sparse:
        n_linear += 3
    kept = {}  # bytes per token
    # 2. norms
    kept["norms"] = 2 * norm_bytes(C, 4, card)  # the residual stream is always fp32
    if cfg.qk_norm:
        kept["norms"] += (H + G) * norm_bytes(d, linear_bytes, card)
    # 3. inputs of the linear layers: autocast makes a 16-bit copy of h for each
    kept["inputs"] = C * linear_bytes * (n_linear + 1 if linear_bytes == 2 else 2)
    # 4. attention: q, k, v, o, and 4 RoPE tables (T, d/2)
    kv_heads = H if is_masked(cfg) and card.on_gpu else G  # see layers.dense_attention
    kept["attention"] = (2 * H + 2 * kv_heads) * d * attention_bytes + 2 * d * linear_bytes / B
    if attention_bytes != linear_bytes:
        kept["attention"] += H * d * linear_bytes  # o once more, in 16 bits
    if triton or not cfg.sparse:
        kept["attention"] += 4 * H  # LSE
    kept["gates"] = 2 * linear_bytes * d * gated_heads
    # 5. indexer: gradients of q^I, k^I, w, computed with the loss; σ's output; 4 RoPE tables
    if cfg.sparse:
        Hi, di = cfg.n_index_head, cfg.d_index
        kept["indexer"] = 4 * (Hi * di + di + 2 * Hi) + 2 * di * 4 / B
        kept["selection"] = 12 + 4 * min(cfg.budget().largest, T)  # k_t, Var_t, indices
        if triton:
            if not cfg.activation_checkpointing:
                kept["selection"] = 0.0  # kernels.py keeps the union list only
            kept["selection"] += union_bytes(cfg, d * linear_bytes, linear_bytes == 4) / (B * T)
    # 6. MLP: gate and up, silu(gate), their product
    kept["MLP"] = 4 * model_config.d_mlp * linear_bytes
    return {name: n * B * T for name, n in kept.items()}


def norm_bytes(width, e, card):
    """What a norm of numbers of e bytes keeps for each of its vectors x: x and 1 / rms."""
    if card.on_gpu:
        return width * e + 4
    return width * 8 + 4  # a CPU makes rms_norm of single operations in fp32, and keeps x / rms too


def union_bytes(cfg, row_bytes, fp32):
    """At most so many bytes are in a layer's union list (kernels.union_list)."""
    T = cfg.block_size
    TQ = kernels.queries_per_tile(HOPPER, cfg.n_head // cfg.n_kv_head, row_bytes, fp32=fp32)
    longest = min(T, TQ * min(cfg.budget().largest, T))
    return 8 * cfg.batch_size * sum(min(t + TQ, T, longest) for t in range(0, T, TQ))


def memory(cfg, model, card, world):
    """Bytes on each GPU at the fullest moment of a training step, by part."""
    # 1. sizes
    groups = group_sizes(model)
    n = sum(groups.values())
    matrix, embed = groups["matrix"], groups["embed"]
    tokens = cfg.batch_size * cfg.block_size
    linear_bytes = 2 if computes_bf16(cfg, card) else 4  # as in kept_by_layer
    recomputed = cfg.activation_checkpointing
    sharded = matrix + embed if cfg.fsdp else 0  # see sharding.py
    held = n - sharded + sharded / world  # parameters on this rank
    # 2. what lasts
    parts = {"weights": 4 * held, "gradients": 4 * held, "optimizer": 8 * held}
    if cfg.muon:  # it keeps one average of the gradients, AdamW two
        parts["optimizer"] -= 4 * matrix / (world if cfg.fsdp else 1)
    if cfg.fsdp:
        # The embedding with its gradient, which waits whole for the end of the backward pass; the
        # block at work and the next one; the gradient of one block
        parts["gathered"] = 8 * embed + (2 * linear_bytes + 4) * matrix / cfg.n_layer
    copies = 0  # autocast's 16-bit copies of the blocks' matrices
    if linear_bytes == 2:
        parts["16-bit weights"] = 2 * model.embed.weight.numel()  # of the output projection
        copies = 0 if cfg.fsdp else 2 * matrix  # FSDP gathers them in 16 bits already
        if not recomputed:  # checkpointed blocks do not keep them for the backward pass
            parts["16-bit weights"] += copies
    # 3. activations
    layer = kept_by_layer(cfg, model.config, card)
    whole = sum(layer.values())
    kept = whole
    if recomputed:
        kept = 4 * tokens * cfg.n_embd + layer.get("selection", 0)  # x and S_t
    # outside of the blocks: the last norm, the output projection's input, idx and targets
    last = tokens * (norm_bytes(cfg.n_embd, 4, card) + cfg.n_embd * linear_bytes + 16)
    if is_masked(cfg):
        last += tokens * cfg.block_size * linear_bytes  # the bias (B, 1, T, T), one for all layers
    parts["activations"] = cfg.n_layer * kept + last
    rows = model.embed.num_embeddings
    vocab_size = model.config.vocab_size
    parts["logits"] = tokens * (rows * linear_bytes + 4 * vocab_size)  # and log softmax, fp32
    # 4. working memory, the largest of: the copies, held by autocast until the loss is there; two
    # gradients of the logits in fp32; later, when the logits' memory is free again, the gradients
    # inside a block, about as large as what it keeps, and its activations if they come anew
    later = whole - parts["logits"]
    copies_held = 0
    if recomputed:
        later += whole
        copies_held = copies
    if card.on_gpu and cfg.sparse:
        later += kernels.PARTIAL_BYTES
    parts["working memory"] = max(copies_held, 8 * tokens * vocab_size, later)
    if card.on_gpu:
        parts["CUDA, NCCL"] = CONTEXT
    return parts


def what_fits(cfg, model, card, world):
    """The flags that make the plan fit, the mildest first; "" if none does."""
    batches = [cfg.batch_size]
    while batches[-1] % 2 == 0:
        batches.append(batches[-1] // 2)
    shard = [cfg.fsdp, True] if world > 1 else [cfg.fsdp]
    recompute = [cfg.activation_checkpointing, True]
    for batch, fsdp, recomputed in itertools.product(batches, shard, recompute):
        other = replace(cfg, batch_size=batch, fsdp=fsdp, activation_checkpointing=recomputed,
                        grad_accum=cfg.grad_accum * cfg.batch_size // batch)
        if sum(memory(other, model, card, world).values()) <= card.memory:
            names = "activation_checkpointing fsdp batch_size grad_accum".split()
            changed = [name for name in names if getattr(other, name) != getattr(cfg, name)]
            flags = [f"--{name}={getattr(other, name)}" for name in changed]
            return " ".join(flags).replace("=True", "")
    return ""


# --------------------------------------------------------------------------------------------------
# Arithmetic and time

def segments(cfg):
    """The run in stretches of equal steps: (first step, end, tokens of a window, in warm-up?)."""
    warmup = cfg.index_warmup_iters if cfg.sparse else 0
    ends = {0, cfg.max_iters, min(warmup, cfg.max_iters), min(cfg.short_iters, cfg.max_iters)}
    for first, end in itertools.pairwise(sorted(ends)):
        length = cfg.short_block if first < cfg.short_iters else cfg.block_size
        yield first, end, length, first < warmup


def run_flops(cfg, model):
    """FLOPs of the whole run, recomputation not counted (measure.flops_per_token)."""
    tokens = cfg.batch_size * cfg.block_size * cfg.grad_accum  # per step
    return sum((end - first) * tokens * flops_per_token(model, length, warmup=warmup)
               for first, end, length, warmup in segments(cfg))


def hours(cfg, flops, gpu, world):
    """Hours of the run on `world` GPUs of this name at cfg.assumed_mfu."""
    peak = next(peak for name, peak in PEAK_FLOPS.items() if name in gpu)
    if cfg.activation_checkpointing:
        flops = flops * 4 / 3  # the forward pass, a third of the arithmetic, twice
    return flops / (peak * cfg.assumed_mfu * world) / 3600


# --------------------------------------------------------------------------------------------------
# The report

def check_plan(cfg, model_config, card, data, world):
    """Refuse what cannot run, whatever the memory. data: Data or None. Raises UserError."""
    if cfg.grad_accum % world:
        raise UserError(f"grad_accum {cfg.grad_accum} (micro-batches per step over all ranks) is "
                        f"not a multiple of the {world} ranks: "
                        f"--grad_accum={-(-cfg.grad_accum // world) * world}")
    if cfg.fsdp and world == 1:
        raise UserError("fsdp divides the model among ranks, and this is one: --gpus=8, or "
                        "start it by torchrun")
    for split in ("train", "val") if data else ():
        available = data.meta[split]["tokens"]
        if cfg.block_size >= available:
            raise UserError(f"block_size {cfg.block_size} needs {cfg.block_size + 1:,} tokens, "
                            f"and the {split} data of {cfg.data} has {available:,}: "
                            f"--block_size={max(1, available - 1)} or shorter, or prepare more")
    if card.on_gpu and cfg.sparse and cfg.backend in ("auto", "triton"):
        q = torch.empty(1, cfg.block_size, cfg.n_head, model_config.d_head, device="meta")
        try:
            checks.check_triton("the plan's q", q, cfg.block_size, cfg.n_kv_head)
        except ValueError as e:
            raise UserError(f"{e}; --backend=torch takes any shape") from None


def dry_run(cfg):
    """Print the plan of a run (train.TrainConfig). Raises UserError where it is impossible."""
    # 1. what there is
    card = pick_card(cfg)
    world = environment("WORLD_SIZE", 1)
    if world == 1:
        world = cfg.gpus
    data = Data(cfg.data) if read_meta(cfg.data) else None
    vocab_size = cfg.vocab_size
    if not vocab_size:
        vocab_size = data.vocab_size if data else GSAConfig.vocab_size
    model = bare_model(cfg, vocab_size)
    check_plan(cfg, model.config, card, data, world)
    # 2. parameters, by kind and by optimizer group
    kinds = dict.fromkeys(["all", *KINDS.values()], 0)
    for name, p in model.named_parameters():
        kinds[next(kind for part, kind in KINDS.items() if part in name)] += p.numel()
    kinds["all"] = sum(kinds.values())
    line("parameters", millions(kinds))
    optimizer = "AdamW, Muon for matrix" if cfg.muon else "AdamW"
    line("optimizer", f"{optimizer}: {millions(group_sizes(model))}")
    # 3. schedule
    per_step = cfg.batch_size * cfg.block_size * cfg.grad_accum
    total = per_step * cfg.max_iters
    line("tokens", f"{total:,} in {cfg.max_iters} steps of {per_step:,}; "
                   f"{total / kinds['all']:.3g} per parameter")
    if data:
        available = data.meta["train"]["tokens"]
        line("data", f"{cfg.data}: {available:,} tokens, {total / available:.3g} epochs")
    else:
        line("data", f"{cfg.data} is not there: a vocabulary of {vocab_size} is assumed")
    for first, end, length, warmup in segments(cfg):
        kind = "sparse" if cfg.sparse else "dense"
        phase = "index warm-up, dense attention" if warmup else f"{kind} attention"
        line(f"steps {first}-{end}", f"{phase}, windows of {length} tokens")
    line("learning rate", f"rises for {min(cfg.warmup_iters, cfg.max_iters)} steps to "
                          f"{cfg.learning_rate:g}, then falls to {cfg.min_lr:g}")
    # 4. arithmetic
    flops = run_flops(cfg, model)
    times = [f"{gpu} {duration(3600 * hours(cfg, flops, gpu, world))}" for gpu in GPU_MEMORY]
    line("arithmetic", f"{flops:.3g} FLOPs; on {world} GPUs at an assumed {cfg.assumed_mfu:.0%} "
                       f"of their peak: {', '.join(times)}")
    # 5. memory
    report_memory(cfg, model, card, world)


def report_memory(cfg, model, card, world):
    """Print the memory by part. Raises UserError where the card has less."""
    parts = memory(cfg, model, card, world)
    needed = sum(parts.values())
    line("memory", f"GB on each of {world} × {card.name}")
    for name, size in parts.items():
        line(f"  {name}", f"{size / GB:8.2f}")
    for recomputed in (False, True):
        other = memory(replace(cfg, activation_checkpointing=recomputed), model, card, world)
        how = "with" if recomputed else "without"
        line("  in all", f"{sum(other.values()) / GB:8.2f}  {how} activation_checkpointing")
    layer = kept_by_layer(replace(cfg, activation_checkpointing=False), model.config, card)
    each = ", ".join(f"{name} {size / GB:.3f}" for name, size in layer.items())
    line("  one layer", f"{sum(layer.values()) / GB:8.2f}  for its backward pass: {each}")
    if cfg.compile:
        line("  torch.compile", "fuses operations and keeps less; how much less is not known here")
    if card.memory and needed > card.memory:
        flags = what_fits(cfg, model, card, world) or "a smaller model, or more GPUs with fsdp,"
        raise UserError(f"the plan needs {needed / GB:.1f} GB on each GPU, {card.name} has "
                        f"{card.memory / GB:.1f}: {(needed - card.memory) / GB:.1f} GB too much; "
                        f"{flags} would fit")


def line(name, text):
    say(f"{name:18} {text}")


def millions(numbers):
    return ", ".join(f"{name} {n / 1e6:.2f}M" for name, n in numbers.items() if n)
