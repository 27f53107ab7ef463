"""
A model divided among ranks (FSDP2, torch's fully_shard), and its checkpoints.

DistributedDataParallel keeps the whole model, its gradient and its optimizer state on every rank.
FSDP2 cuts each matrix into as many parts as there are ranks. A rank keeps one part with its
gradient and optimizer state, and gathers a block's matrices when it needs them:

    forward     block by block: gather the matrices, compute, free what belongs to others
    backward    the same from last to first, then add up the gradient over the ranks; each rank
                keeps its part of the sum. So it is with every micro-batch: to wait for the step's
                last one, as DistributedDataParallel may, would take memory for a whole gradient

A part is a DTensor: the local rows and the knowledge of where the others are.

    sharding.shard(model, "cuda:0", bf16=True)      # before the optimizers are made
    sharding.average_undivided_gradients(model)     # after the step's last backward pass
    norm = sharding.clip(params, 1.0)
    sharding.save_shards(folder, {"model.embed.weight": p})
    sharding.Shards(folder)["model.embed.weight"]   # whole again, on any number of ranks
"""
import contextlib
import glob
import os
import warnings
from collections.abc import Mapping

import torch
import torch.distributed as dist

from configurator import UserError

# It warns of in-place changes of the logits, which nothing does
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
# Without ranks, one process loads everything, as intended
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


# --------------------------------------------------------------------------------------------------
# The model

def undivided_parameters(model):
    """
    The parameters that every rank keeps whole, in fp32: the indexers and all vectors, about 2 % of
    the model. FSDP2 takes no scalars (log_tau), and gathered in 16 bits the indexer's scores would
    tie. The others are the optimizer groups "matrix" and "embed". In the model's order, which is
    the same on all ranks.
    """
    return [p for name, p in model.named_parameters() if p.dim() < 2 or ".indexer." in name]


def shard(model, device, bf16, compiled=False):
    """
    Divide a GSA among all ranks, in place. Its matrices become DTensors, so make the optimizers
    afterwards. All ranks must hold the same weights. A model in CPU memory is moved block by block
    to the rank's `device`.
    bf16: gather the blocks' matrices in bfloat16, in which autocast would use them anyway.
    compiled: by torch.compile, block by block, since FSDP2 works between the blocks.
    """
    storage()  # a missing package is better noticed now than at the first checkpoint
    # here, since every script imports this file, and these take two seconds
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    kind = device.split(":")[0]
    how = dict(mesh=init_device_mesh(kind, (dist.get_world_size(),)),
               ignored_params=set(undivided_parameters(model)))
    policy = MixedPrecisionPolicy()
    if bf16:
        # The block's input, the residual stream, stays fp32 as without FSDP
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for p in undivided_parameters(model):
        dist.broadcast(p.detach(), 0)  # on unlike CPUs random numbers may differ in the last bit
    for block in model.blocks:
        if compiled:
            block.forward = torch.compile(block.forward)
        fully_shard(block, mp_policy=policy, **how)
    fully_shard(model, **how)


@torch.no_grad()
def average_undivided_gradients(model):
    """Average the gradients of undivided_parameters over the ranks. FSDP does so for the others."""
    grads = [p.grad for p in undivided_parameters(model) if p.grad is not None]
    if not grads:
        return
    together = torch.cat([g.flatten() for g in grads])  # one message instead of hundreds
    dist.all_reduce(together)
    together /= dist.get_world_size()
    for g, mean in zip(grads, together.split([g.numel() for g in grads])):
        g.copy_(mean.view_as(g))


def is_divided(x):
    """Is a tensor a DTensor?"""
    return hasattr(x, "full_tensor")


def whole(x):
    """The whole tensor of a DTensor, on every rank. All ranks must call it."""
    return x.full_tensor() if is_divided(x) else x


def divided_like(x, other):
    """The inverse of whole: x, the same on all ranks, divided as `other` is."""
    if is_divided(x) or not is_divided(other):
        return x
    from torch.distributed.tensor import DTensor, Replicate
    x = DTensor.from_local(x, other.device_mesh, [Replicate()], run_check=False)
    return x.redistribute(placements=other.placements)  # each rank cuts its part out


def clip(params, limit):
    """
    torch's clip_grad_norm_ over parameters of which some are divided: scale their gradients so
    that the norm of all of them together is at most `limit`. Returns the norm before, a scalar.
    """
    params = [p for p in params if p.grad is not None]
    if not params:
        return torch.zeros(())
    parts = [[p for p in params if is_divided(p)],
             [p for p in params if not is_divided(p)]]
    parts = [part for part in parts if part]
    norms = [whole(torch.nn.utils.get_total_norm([p.grad for p in part])) for part in parts]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for part in parts:
        torch.nn.utils.clip_grads_with_norm_(part, limit, norm)
    return norm


# --------------------------------------------------------------------------------------------------
# Checkpoints: every rank writes its parts to a file of its own, shard-*.safetensors, in a format
# that holds numbers only. They load on any number of ranks, or on one process without ranks.

def storage():
    """torch.distributed.checkpoint and its safetensors reader and writer. Raises UserError."""
    try:
        import safetensors  # noqa: F401, hf_storage needs it
    except ImportError:
        raise UserError("the checkpoints of fsdp need the package safetensors: "
                        "pip install safetensors") from None
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import hf_storage
    return dcp, hf_storage.HuggingFaceStorageReader, hf_storage.HuggingFaceStorageWriter


def save_shards(folder, tensors):
    """
    Write {name: DTensor or tensor} to folder/shard-*.safetensors, one file per rank. Of a plain
    tensor, the same on all ranks, one rank writes its copy. All ranks must call it.
    Raises OSError on all ranks where one cannot write.
    """
    dcp, _, writer = storage()
    os.makedirs(folder, exist_ok=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer(folder, save_distributed=True))
    except dcp.api.CheckpointException as e:
        raise OSError(f"{folder} cannot be written: {last_line(e)}") from None


def shard_files(folder):
    return glob.glob(os.path.join(glob.escape(folder), "shard-*.safetensors"))


class Shards(Mapping):
    """
    {name: whole tensor} of a folder that save_shards wrote. A tensor is put together, in CPU
    memory, when it is asked for. Needs no ranks. Raises UserError.
    prefix: of the names in the files, those that begin so, without it.
    """

    def __init__(self, folder, prefix=""):
        self.folder = folder
        self.prefix = prefix
        self.dcp, self.reader, _ = storage()
        with self.readable():
            entries = self.reader(folder).read_metadata().state_dict_metadata
        self.entries = {name.removeprefix(prefix): entry for name, entry in entries.items()
                        if name.startswith(prefix)}

    def __len__(self):
        return len(self.entries)

    def __iter__(self):
        return iter(self.entries)

    def __getitem__(self, name):
        entry = self.entries[name]
        x = torch.empty(entry.size, dtype=entry.properties.dtype)
        with self.readable():
            self.dcp.load({self.prefix + name: x}, no_dist=True,
                          storage_reader=self.reader(self.folder))
        return x

    @contextlib.contextmanager
    def readable(self):
        try:
            yield
        # A damaged file raises any type. CheckpointException is a BaseException, no Exception
        except (Exception, self.dcp.api.CheckpointException) as e:
            raise UserError(f"{self.folder} holds no readable shards: {last_line(e)}") from None


def last_line(error):
    """What torch.distributed.checkpoint says last is what went wrong."""
    return str(error).strip().split("\n")[-1].strip() or type(error).__name__
