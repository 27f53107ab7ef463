"""
A model divided among ranks (FSDP2, torch's fully_shard), and its checkpoints.

DistributedDataParallel keeps the whole model, its gradient and its optimizer state on every rank.
FSDP2 cuts each matrix into as many parts as there are ranks. A rank keeps one part with its
gradient and optimizer state, and gathers a block's matrices when it needs them:

    forward     block by block: gather the matrices, compute, free what belongs to others
    backward    the same from last to first, then add up the gradient over the ranks; each rank
                keeps its part of the sum

A part is a DTensor: the local rows and the knowledge of where the others are.

    sharding.shard(model, bf16=True)              # before the optimizers are made
    sharding.synchronize(model, last)             # before each backward pass
    sharding.average_whole_gradients(model)       # after the last one
    norm = sharding.clip(params, 1.0)
    sharding.save_shards(folder, {"model.embed.weight": p})
"""
import os
import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from configurator import UserError

# It warns of in-place changes of the logits, which nothing does
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
# Without ranks, one process loads everything, as intended
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or")


# --------------------------------------------------------------------------------------------------
# The model

def whole_parameters(model):
    """
    The parameters that every rank keeps whole, in fp32: the indexers and all vectors, about 2 % of
    the model. FSDP2 takes no scalars (log_tau), and gathered in 16 bits the indexer's scores would
    tie. The others are the optimizer groups "matrix" and "embed". In the model's order, which is
    the same on all ranks.
    """
    return [p for name, p in model.named_parameters() if p.dim() < 2 or ".indexer." in name]


def shard(model, device, bf16):
    """
    Divide a GSA among all ranks, in place. Its matrices become DTensors, so make the optimizers
    afterwards. All ranks must hold the same weights. A model in CPU memory is moved block by block
    to the rank's `device`.
    bf16: gather the blocks' matrices in bfloat16, in which autocast would use them anyway.
    """
    kind = device.split(":")[0]
    how = dict(mesh=init_device_mesh(kind, (dist.get_world_size(),)),
               ignored_params=set(whole_parameters(model)))
    policy = MixedPrecisionPolicy()
    if bf16:
        # The block's input, the residual stream, stays fp32 as without FSDP
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy, **how)
    fully_shard(model, **how)


def is_sharded(model):
    return any(isinstance(p, DTensor) for p in model.parameters())


def synchronize(model, last):
    """
    Say before a micro-batch whether its backward pass adds up the gradients over the ranks: only
    the step's last one has to. model: a DistributedDataParallel, or what shard() has divided.
    """
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = last
    else:
        model.set_requires_gradient_sync(last)


@torch.no_grad()
def average_whole_gradients(model):
    """Average the gradients of whole_parameters over the ranks. FSDP does so for the others."""
    grads = [p.grad for p in whole_parameters(model) if p.grad is not None]
    if not grads:
        return
    together = torch.cat([g.flatten() for g in grads])  # one message instead of hundreds
    dist.all_reduce(together)
    together /= dist.get_world_size()
    for g, mean in zip(grads, together.split([g.numel() for g in grads])):
        g.copy_(mean.view_as(g))


def whole(x):
    """The whole tensor of a DTensor, on every rank. All ranks must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def divided_like(x, other):
    """The inverse of whole: x, the same on all ranks, divided as `other` is."""
    if not isinstance(other, DTensor):
        return x
    x = DTensor.from_local(x, other.device_mesh, [Replicate()], run_check=False)
    return x.redistribute(placements=other.placements)  # each rank cuts its part out


def clip(params, limit):
    """
    torch's clip_grad_norm_ over parameters of which some are divided: scale their gradients so
    that the norm of all of them together is at most `limit`. Returns the norm before, a scalar.
    """
    params = [p for p in params if p.grad is not None]
    parts = [[p for p in params if isinstance(p, DTensor)],
             [p for p in params if not isinstance(p, DTensor)]]
    parts = [part for part in parts if part]
    norms = [whole(torch.nn.utils.get_total_norm([p.grad for p in part])) for part in parts]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for part in parts:
        torch.nn.utils.clip_grads_with_norm_(part, limit, norm)
    return norm


# --------------------------------------------------------------------------------------------------
# Checkpoints: every rank writes its parts to a file of its own, shard-*.safetensors, in a format
# that holds numbers only. They load on any number of ranks, or on one process without ranks.

def storage():
    """torch.distributed.checkpoint and its safetensors reader and writer. Raises UserError."""
    try:
        import safetensors  # noqa: F401, torch needs it
    except ImportError:
        raise UserError("a sharded checkpoint needs the package safetensors: "
                        "pip install safetensors") from None
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import hf_storage
    return dcp, hf_storage.HuggingFaceStorageReader, hf_storage.HuggingFaceStorageWriter


def alone():
    return not (dist.is_available() and dist.is_initialized())


def save_shards(folder, tensors):
    """
    Write {name: DTensor or tensor} to folder/shard-*.safetensors, one file per rank. Of a plain
    tensor, the same on all ranks, one rank writes its copy. All ranks must call it.
    Waits until the disk has the files.
    """
    dcp, _, Writer = storage()
    os.makedirs(folder, exist_ok=True)
    writer = Writer(folder, save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer, no_dist=alone())


def load_shards(folder, tensors):
    """Fill {name: DTensor or tensor} in place from the shards. All ranks must call it."""
    dcp, Reader, _ = storage()
    try:
        dcp.load(dict(tensors), storage_reader=Reader(folder), no_dist=alone())
    except Exception as e:
        reason = str(e).strip().split("\n")[-1] or type(e).__name__
        raise UserError(f"{folder} holds no readable shards for this run: {reason}") from None


def read_shards(folder):
    """{name: whole tensor} of all shards in the folder, in CPU memory. Needs no ranks."""
    _, Reader, _ = storage()
    entries = Reader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype)
               for name, entry in entries.items()}
    load_shards(folder, tensors)
    return tensors
