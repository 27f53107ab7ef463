"""
The processes of one training ("ranks"), which torchrun starts, what they tell each other, and the
signals that stop them.

    with Ranks(device="") as ranks:
        ranks.device                       # "cuda:3", or "cpu"
        ranks.on_rank_0(find_checkpoint)   # its result, on every rank
        ranks.any(stop_requested)          # True on every rank, if it is True on one

One process alone is rank 0 of 1, and everything here does nothing. Messages from host to host go
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

    def __init__(self, device=""):
        self.world = environment("WORLD_SIZE", 1)
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

    def __exit__(self, kind, *_):
        if self.world > 1:
            dist.destroy_process_group()
        if kind is not None and issubclass(kind, (UserError, OSError)) and self.local_rank:
            raise SystemExit(1)  # the first rank of the machine prints the message

    def on_rank_0(self, function, *args):
        """Call function on rank 0 only. Every rank returns its result, or raises its UserError."""
        if self.world == 1:
            return function(*args)
        message = [None, None]  # result, error
        if self.rank == 0:
            try:
                message[0] = function(*args)
            except (UserError, OSError) as e:
                message[1] = e
        dist.broadcast_object_list(message, device=torch.device("cpu"))
        if message[1] is not None:
            raise message[1]
        return message[0]

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
        """A tensor on this device, summed over the ranks in place. The host does not wait."""
        if self.world > 1:
            dist.all_reduce(x)
        return x


class StopSignal:
    """
    Ctrl-C, or the SIGTERM of a scheduler, ends a training behind the step at hand, when its
    checkpoint is written. A second Ctrl-C ends a single process at once.
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
