"""
The settings of a training run: those of a new one, of one that is resumed, and of one that begins
with the weights of another model.

    cfg = settings(["config/gsa_small.py", "--seed=7"])
    cfg = settings(argv, checkpoint)              # of the run to resume
    cfg = settings(argv, start=other_checkpoint)  # whose weights a new run begins with
"""
from dataclasses import asdict, dataclass, fields

import checks
from checkpoint import find_data, model_config
from configurator import UserError, check_ranges, parse
from data import differences
from device import check_dtype
from model import ARMS, GSAConfig


# A comment line after a blank line is a heading in --help
@dataclass
class TrainConfig(GSAConfig):

    # data and output
    data: str = "data/slimpajama"  # a folder written by prepare.py
    out_dir: str = "out"  # checkpoints, log.jsonl, config.json
    # scratch | resume (out_dir's checkpoint) | auto (resume, if there is a checkpoint)
    # | hf:PATH_OR_ID (a Hugging Face model) or another run's out_dir, whose weights it starts with
    # | auto:START (resume, else START).
    # If the weights are a dense model's and this one has an indexer, warm-up trains that alone
    init_from: str = "scratch"
    overwrite: bool = False  # a new run deletes the run that out_dir holds
    keep: int = 2  # checkpoints: the last so many stay, and the best

    # model
    attention: str = "gsa"  # arm: dense | gated | sparse | gsa; sets switches that are not given
    vocab_size: int = 0  # 0 = that of the data; a larger one only costs memory
    doc_mask: bool = True  # attention stops at document boundaries

    # optimization
    muon: bool = False  # Muon at AdamW's step size for the layers' matrices; else AdamW
    batch_size: int = 8  # sequences per micro-batch and rank
    grad_accum: int = 1  # micro-batches per step over all ranks together
    max_iters: int = 1000
    learning_rate: float = 6e-4
    min_lr: float = 6e-5  # at max_iters
    warmup_iters: int = 100  # steps in which the learning rate rises linearly
    short_iters: int = 0  # first steps, whose windows are cut to pieces of short_block tokens
    short_block: int = 128
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # 0 = off
    # a step whose loss or gradient is not finite is skipped; so many in a row end the run
    max_skips: int = 10

    # indexer
    index_warmup_iters: int = 200  # phase 1, dense attention
    index_lr_mult: float = 10.0  # its learning rate, as a multiple
    index_grad_clip: float = 1.0  # 0 = off
    index_loss_weight: float = 1.0

    # reporting
    log_interval: int = 10
    eval_interval: int = 250  # steps; the checkpoint is written at the same steps, and at the end
    eval_iters: int = 20  # micro-batches of val.bin
    plot: bool = True  # draw out_dir/curves.png at each evaluation, if matplotlib is installed
    tensorboard: bool = False  # into out_dir/tensorboard
    wandb: bool = False
    wandb_project: str = "nanogsa"

    # system
    device: str = ""  # default: cuda if there is one, else cpu
    backend: str = "auto"  # path of the attention: auto | torch | triton | eager
    dtype: str = ""  # float32 | bfloat16; default: bfloat16 on cuda
    compile: bool = False
    seed: int = 1337

    # scale
    # the backward pass computes each block again: less memory, a third more time
    activation_checkpointing: bool = False
    fsdp: bool = False  # divide the model among the ranks (FSDP2), where one GPU cannot hold it
    dry_run: bool = False  # print parameters, memory, FLOPs, hours and schedule; do not train
    gpus: int = 1  # of a dry run without torchrun: ranks to plan for
    gpu: str = ""  # of a dry run: H100, H200, B200, …; default: the local GPU, else H100
    assumed_mfu: float = 0.4  # of a dry run: share of the GPU's peak FLOP/s that training reaches

    def __post_init__(self):
        self.model_config(self.vocab_size or 256)  # checks the model's settings
        checks.resolve_backend(self.backend)
        check_dtype(self.dtype)
        check_ranges(self, {
            (1, None): "batch_size grad_accum max_iters log_interval eval_interval eval_iters "
                       "short_block keep max_skips gpus",
            (0.001, 1): "assumed_mfu",
            (0, None): "vocab_size learning_rate min_lr warmup_iters short_iters weight_decay "
                       "grad_clip index_warmup_iters index_lr_mult index_grad_clip "
                       "index_loss_weight",
            (0, 0.999999): "beta1 beta2",
            (0, 2**63 - 1): "seed"})
        if self.min_lr > self.learning_rate:
            raise UserError(f"min_lr {self.min_lr} is above learning_rate {self.learning_rate}")
        if self.short_iters and self.block_size % self.short_block:
            raise UserError(f"block_size {self.block_size} is not a multiple of "
                            f"short_block {self.short_block}")

    def model_config(self, vocab_size):
        values = {f.name: getattr(self, f.name) for f in fields(GSAConfig)}
        return GSAConfig(**values | {"vocab_size": vocab_size})


# A resumed run cannot change these: they decide what its checkpoint means, and its batches
FIXED = {f.name for f in fields(GSAConfig)}
FIXED |= set("attention doc_mask muon batch_size grad_accum seed short_iters short_block".split())
RETIRED = {"retrofit_from"}  # settings of older versions
# A new run may choose these freely, whatever weights it begins with: the context, the indexer and
# the arm. The other settings of the model are those of the weights
SWITCHES = {name for arm in ARMS.values() for name in arm}
FREE_AT_START = SWITCHES | set(
    "vocab_size block_size rope_scaling gate_bias_init n_index_head d_index index_rope "
    "index_temperature k_base k_min k_max n_sink n_local".split())


def settings(argv, checkpoint=None, start=None):
    """
    TrainConfig from arguments: the arm's switches, replaced by config files and flags.
    checkpoint: that of a run to resume; its settings come first.
    start: that of another run, whose weights a new run begins with; its model's shape comes first.
    Raises UserError.
    """
    given = parse(TrainConfig, argv)
    if checkpoint:
        given = resumed_settings(checkpoint, given)
    if start:
        given = started_settings(start, given)
    try:
        return TrainConfig.arm(given.get("attention", TrainConfig.attention), **given)
    except ValueError as e:
        raise UserError(str(e)) from None


def resumed_settings(checkpoint, given):
    """
    The settings saved in a checkpoint, replaced by those given now.
    Raises UserError if a setting is given that must not change.
    """
    path = checkpoint["path"]
    kinds = {f.name: f.type for f in fields(TrainConfig)}
    saved = {name: value for name, value in checkpoint["config"].items() if name not in RETIRED}
    for name, value in saved.items():
        if type(value) is not kinds.get(name):
            raise UserError(f"{path} was written by another version: it has a setting {name!r}")
    saved = asdict(TrainConfig()) | saved  # what an older version lacks has its default
    fixed = {name: value for name, value in given.items() if name in FIXED}
    changed = differences({name: saved[name] for name in fixed}, fixed)
    if changed:
        raise UserError(f"{path} was trained with another model or other settings "
                        f"({changed}): these cannot change when a run is resumed")
    # the folder may have been copied: it is the one that is named now
    out_dir = given.get("out_dir", TrainConfig.out_dir)
    return {**saved, "data": find_data(checkpoint), **given, "out_dir": out_dir,
            "init_from": saved["init_from"]}  # it says how the run began, not that it went on


def started_settings(start, given):
    """
    The settings of a new run that begins with other weights: the shape of their model, and what is
    given now. Raises UserError if a setting is given that contradicts the weights.
    """
    shape = asdict(model_config(start))
    # an indexer that comes with the weights needs no warm-up
    warmup = {"index_warmup_iters": 0} if shape["sparse"] else {}
    if given.get("attention", TrainConfig.attention) != start["config"].get("attention"):
        shape = {name: value for name, value in shape.items() if name not in SWITCHES}
    fixed = {name: value for name, value in given.items()
             if name in shape and name not in FREE_AT_START}
    changed = differences({name: shape[name] for name in fixed}, fixed)
    if changed:
        raise UserError(f"{start['path']} does not fit the settings: {changed}")
    return {**shape, **warmup, **given}
