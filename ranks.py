"""
The processes of one training ("ranks"), which torchrun starts, what they tell each other, and the
signals that stop them.

    with Ranks(device="") as ranks:
        ranks.device                       # "cuda:3", or "cpu"
        ranks.on_rank_0(find_checkpoint)   # its result, on every rank
        ranks.any(stop_requested)          # True on every rank, if it is True on one

One process alone is rank 0 of 1, and has nothing to wait for. Messages from host to host go
through gloo and never wait for a GPU; gradients go through NCCL.
"""
import os
import signal

import torch
import torch.distributed as dist

from configurator import UserError, environment
from device import use_device


class Ranks:
    """rank, world (their number), local_rank (number on this machine) and device of this one."""

    def __init__(self, device="", world=None):
        self.world = world or environment("WORLD_SIZE", 1)
        self.rank = environment("RANK", 0) if self.world > 1 else 0
        self.local_rank = environment("LOCAL_RANK", 0) if self.world > 1 else None
        self.device = use_device(device, self.local_rank)

    def __enter__(self):
        if self.world > 1:
            backend = "cpu:gloo,cuda:nccl" if self.device.startswith("cuda") else "gloo"
            try:
                dist.init_process_group(backend)
            except (ValueError, RuntimeError) as e:
                raise UserError(f"WORLD_SIZE is {self.world}, but the ranks cannot meet "
                                f"({str(e).splitlines()[0]}): start them by torchrun") from None
        return self

    def __exit__(self, kind, error, _):
        if self.world > 1 and (kind is None or self.device == "cpu"):
            dist.destroy_process_group()  # NCCL would wait for a rank that does not come any more
        if self.rank and getattr(error, "on_all_ranks", False):
            raise SystemExit(1)  # rank 0 prints the message

    def on_rank_0(self, function, *args):
        """Call function on rank 0 only. Every rank returns its result, or raises its UserError."""
        if self.world == 1:
            return function(*args)
        result = error = None
        if self.rank == 0:
            result, error = attempt(function, *args)
        message = [result, error]
        dist.broadcast_object_list(message, device=torch.device("cpu"))
        result, error = message
        if error is not None:
            raise shared(error)
        return result

    def together(self, function, *args):
        """
        Call function on every rank. Returns its result, or raises on all ranks the error of the
        first that had one.
        """
        if self.world == 1:
            return function(*args)
        result, error = attempt(function, *args)
        errors = [None] * self.world
        dist.all_gather_object(errors, error)
        errors = [e for e in errors if e is not None]
        if errors:
            raise shared(errors[0])
        return result

    def any(self, flag):
        """Is a bool of this process True on some rank? The answer is the same on every rank."""
        if self.world == 1:
            return flag
        x = torch.tensor(int(flag))
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return bool(x)

    def mean(self, x):
        """The mean over the ranks of a tensor on this device."""
        return self.sum(x) / self.world

    def sum(self, x):
        """Sum a tensor on this device over the ranks, in place. The host does not wait."""
        if self.world > 1:
            dist.all_reduce(x)
        return x


def attempt(function, *args):
    """(result, None) of a call, or (None, the error that a user can mend)."""
    try:
        return function(*args), None
    except (UserError, OSError) as e:
        return None, e


def shared(error):
    """Mark an error that every rank raises: rank 0 alone prints it."""
    error.on_all_ranks = True
    return error


class StopSignal:
    """
    After a Ctrl-C, or the SIGTERM of a scheduler, the training finishes the step it is in, saves a
    checkpoint and ends. A second Ctrl-C ends a single process at once.
    """

    def __init__(self):
        self.received = False
        self.interrupted = False  # by Ctrl-C

    def __enter__(self):
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, _):
        if number == signal.SIGINT and self.received and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt  # torchrun passes on a Ctrl-C that its ranks have seen already
        self.received = True
        self.interrupted = self.interrupted or number == signal.SIGINT

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
