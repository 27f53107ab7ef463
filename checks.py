"""
Checks of a model's settings, and of the tensors that attention.py is called with. Each raises
ValueError with one line that names what is wrong. The checks of tensors return the path that will
compute: "eager", "torch" or "triton".
"""
import math
from dataclasses import fields
from numbers import Integral, Real

import torch

import kernels
from layers import check_rope_scaling

BACKENDS = ("eager", "torch", "triton")  # and "auto"
LARGEST = 2**31  # what torch takes as a size of a layer


def check_config(config):
    """The settings of a model.GSAConfig: each by itself, then those that must fit together."""
    for f in fields(config):
        value = getattr(config, f.name)
        number = isinstance(value, Real) and not isinstance(value, bool)
        least = 0 if f.name in ("d_head", "d_mlp", "n_sink", "n_local") else 1
        if f.type is int and not (number and isinstance(value, Integral) and value >= least):
            raise ValueError(f"{f.name} is {value!r}, must be an integer of at least {least}")
        if f.type is int and value >= LARGEST:
            raise ValueError(f"{f.name} is {value!r}, must be below {LARGEST}")
        if f.type is float and not (number and math.isfinite(value)):
            raise ValueError(f"{f.name} is {value!r}, must be a finite number")
        if f.type is dict and not isinstance(value, dict):
            raise ValueError(f"{f.name} is {value!r}, must be a dict")
    for name in ("rope_base", "norm_eps"):
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} is {getattr(config, name)}, must be positive")
    multiples = [("n_head", "n_kv_head")]
    if not config.d_head:
        multiples.append(("n_embd", "n_head"))
    for name, factor in multiples:
        a, b = getattr(config, name), getattr(config, factor)
        if a % b:
            raise ValueError(f"{name} {a} is not a multiple of {factor} {b}")
    d_head = config.d_head or config.n_embd // config.n_head
    for name, width in (("head width", d_head), ("d_index", config.d_index)):
        if width % 2:
            raise ValueError(f"{name} {width} is odd: RoPE rotates pairs")
    if config.look_back < 0:
        raise ValueError(f"look_back is {config.look_back}, must not be negative")
    if config.look_back and not config.qkv_bias:
        raise ValueError("look_back is in the biases of q and k: it needs qkv_bias")
    if config.look_back and config.n_head >= config.block_size:
        raise ValueError(f"look_back needs a block_size above n_head {config.n_head}: the last "
                         "head looks so many tokens back")
    check_rope_scaling(config.rope_scaling, config.rope_base)
    if config.index_activation not in ("sigmoid", "relu"):
        raise ValueError(f"index_activation {config.index_activation!r} is not one of "
                         "sigmoid, relu")
    if config.k_min > config.k_max:
        raise ValueError(f"k_min {config.k_min} is larger than k_max {config.k_max}")
    config.budget().check()


def resolve_backend(backend, x=None):
    """
    The path that `backend` means for tensor x; without x only the name is checked.
    Raises ValueError where the path cannot run.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    if x is None:
        return backend
    if backend == "auto":
        return "triton" if x.is_cuda else "torch"
    if backend == "triton" and kernels.triton is None:
        raise ValueError("backend 'triton': the package triton is not installed")
    if backend == "triton" and not x.is_cuda and not kernels.INTERPRET:
        raise ValueError(f"backend 'triton' needs a GPU, and this tensor is on {x.device}; to run "
                         "the kernels in Triton's interpreter, slowly, set TRITON_INTERPRET=1 "
                         "before Python starts")
    return backend


def check_triton(name, q, S, G):
    """What the Triton kernels can compute: q (B, T, H, d) with S keys and G KV heads."""
    T, H, d = q.shape[1:]
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{name} is {q.dtype}: the Triton path computes in float32, float16 and "
                         "bfloat16")
    if d > 256:
        raise ValueError(f"{name} has heads of width {d}: the Triton path takes at most 256")
    if H // G > 8:
        raise ValueError(f"{name} has {H // G} heads to a key head: the Triton path takes "
                         "at most 8")
    if max(T * H, S * G) * d >= 1 << 31:
        raise ValueError(f"{name} or k has 2^31 elements or more to a sequence, beyond the Triton "
                         "path's 32-bit offsets")


def check_inputs(backend, visible, **tensors):
    """
    The path for these tensors, as resolve_backend. tensors: the queries first, so q, k, v, lse of
    the attention or index_q, index_k, index_w, index_b.
    Raises ValueError, in one line that names the tensor.
    """
    name, q = next(iter(tensors.items()))
    if q.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(q.shape)}, not (B, T, heads, width)")
    B, T, H, d = q.shape
    S, pos = visible.n_keys, visible.pos
    k = tensors.get("k", q[:, :, :1])
    G = k.size(2) if k.dim() == 4 else 1
    shapes = dict(q=q.shape, k=(B, S, G, d), v=(B, S, G, d), lse=(B, T, H), index_q=q.shape,
                  index_k=(B, S, d), index_w=(B, T, H), index_b=(H,))
    for other, x in tensors.items():
        if tuple(x.shape) != shapes[other]:
            raise ValueError(f"{other} has shape {tuple(x.shape)}, not {shapes[other]}")
        if x.device != q.device:
            raise ValueError(f"{other} is on {x.device}, {name} on {q.device}")
        if x.dtype != q.dtype and other in ("k", "v", "index_k"):
            raise ValueError(f"{other} is {x.dtype}, {name} is {q.dtype}")
    if pos.size(1) != T or pos.size(0) not in (1, B):
        raise ValueError(f"visible.pos has shape {tuple(pos.shape)}, not (1 or {B}, {T})")
    if H % G:
        raise ValueError(f"{name} has {H} heads, not a multiple of the {G} of k and v")
    backend = resolve_backend(backend, q)
    if backend == "triton":
        check_triton(name, q, S, G)
    return backend


def check_index(backend, visible, index):
    q, k, w, b, _ = index
    return check_inputs(backend, visible, index_q=q, index_k=k, index_w=w, index_b=b)
