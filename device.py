"""
The device that a script computes on, its precision, and what can be refused before it begins.
"""
import os
import shutil

import torch

import checks
from configurator import UserError


def use_device(name, local_rank=None):
    """
    The device to compute on, as torch names it; "" = a GPU if there is one, else the CPU.
    local_rank: of several ranks on this machine, each takes the GPU of its number.
    Raises UserError.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if local_rank is not None and name.startswith("cuda"):
        name = f"cuda:{local_rank}"
    try:
        torch.zeros(1, device=name).item()
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)  # the kernels are launched on the current device
        torch.autocast(name.split(":")[0], dtype=torch.bfloat16, enabled=False)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device {name!r} cannot be used: {str(e).splitlines()[0]}") from None
    return name


def precision(device, dtype):
    """
    The autocast context to compute in.
    dtype: "float32" | "bfloat16" | "" = bfloat16 on a GPU, else float32.
    On a GPU, products that stay in fp32 are computed as TF32: the attention kernels have too few
    registers for exact fp32 products.
    """
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16,
                          enabled=dtype_of(device, dtype) == "bfloat16")


def dtype_of(device, dtype):
    """The dtype to compute in, where "" leaves the choice to the device: see precision."""
    return dtype or ("bfloat16" if device.startswith("cuda") else "float32")


def check_backend(backend, device):
    """Refuse a path of the attention that cannot run on the device. Raises UserError."""
    try:
        checks.resolve_backend(backend, torch.empty(0, device=device))
    except ValueError as e:
        raise UserError(str(e)) from None


def check_dtype(dtype):
    if dtype not in ("", "float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r} is not one of float32, bfloat16")


def check_compiler():
    """Refuse torch.compile without a C++ compiler now, not by a traceback at the first step."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if not any(shutil.which(name) for name in names if name):
        raise UserError("compile needs a C++ compiler (g++): "
                        "install one, or train without --compile")


