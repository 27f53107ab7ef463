"""
The optimizers of a training run: AdamW for everything, or AdamW and Muon.

    optimizers = make_optimizers(model, cfg)       # cfg: train.TrainConfig
"""
import math

import torch

from configurator import UserError
from sharding import divided_like, whole

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")


def orthogonal(x):
    """
    Nearly the orthogonal matrix nearest to x: the singular values of x become about 1.
    Five steps of a quintic Newton-Schulz iteration, coefficients of Jordan et al. (2024).
    """
    if x.size(0) > x.size(1):
        return orthogonal(x.T).T
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.bfloat16() if x.is_cuda else x
    y = y / y.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.T
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.to(x.dtype)


class Muon(torch.optim.Optimizer):
    """
    Muon (Jordan et al. 2024) for matrices. The update is Nesterov's momentum, made orthogonal and
    scaled to the size of AdamW's update (arXiv 2502.16982, "match_rms_adamw").
    torch.optim.Muon computes the same in bfloat16. This one uses float32 on a CPU, because a CPU
    without bfloat16 instructions is 18 times as slow with bfloat16 (LOG.md).
    Like torch's fused AdamW it changes nothing where its attribute found_inf is a tensor of 1.
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr = group["lr"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                old = state["momentum_buffer"]
                momentum = old.lerp(p.grad, 1 - group["momentum"])
                # Newton-Schulz needs the whole matrix, also of a model that is divided (fsdp)
                update = orthogonal(whole(p.grad.lerp(momentum, group["momentum"])))
                new = p * (1 - lr * group["weight_decay"])
                new.add_(divided_like(update, p), alpha=-lr * 0.2 * math.sqrt(max(p.shape)))
                # chosen on the device: the host does not wait for found_inf
                skip = self.found_inf > 0
                old.copy_(torch.where(skip, old, momentum))
                p.copy_(torch.where(skip, p, new))


def param_groups(model, weight_decay=0.1, index_lr_mult=10.0):
    """
    Optimizer groups: "matrix" and "embed" (decayed), "vector", and "indexer", whose learning
    rate is index_lr_mult times the others'. Every trained parameter is in exactly one.
    """
    groups = {
        "matrix": dict(params=[], weight_decay=weight_decay, lr_mult=1.0),
        "embed": dict(params=[], weight_decay=weight_decay, lr_mult=1.0),
        "vector": dict(params=[], weight_decay=0.0, lr_mult=1.0),
        "indexer": dict(params=[], weight_decay=0.0, lr_mult=index_lr_mult),
    }
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if ".indexer." in name:
            kind = "indexer"
        elif name in ("embed.weight", "unembed.weight"):
            kind = "embed"
        elif p.dim() > 1:
            kind = "matrix"
        else:
            kind = "vector"
        groups[kind]["params"].append(p)
    return [dict(name=name, **group) for name, group in groups.items() if group["params"]]


def make_optimizers(model, cfg):
    """[AdamW] for all of the model's groups, or with cfg.muon [AdamW, Muon for the matrices]."""
    groups = {g["name"]: g for g in param_groups(model, cfg.weight_decay, cfg.index_lr_mult)}
    optimizers = []
    if cfg.muon and "matrix" in groups:  # not while an indexer is trained alone
        optimizers = [Muon([groups.pop("matrix")], cfg.learning_rate)]
    adamw = torch.optim.AdamW(groups.values(), lr=cfg.learning_rate,
                              betas=(cfg.beta1, cfg.beta2), fused=True)
    return [adamw] + optimizers


def optimizer_tensors(optimizers, model):
    """The optimizers' state as {"<parameter>.<what>": tensor}, e.g. "embed.weight.exp_avg"."""
    tensors = {}
    for name, p in model.named_parameters():
        for optimizer in optimizers:
            for what, x in optimizer.state.get(p, {}).items():
                tensors[f"{name}.{what}"] = x
    return tensors


def load_optimizers(optimizers, model, tensors, path, partly=False):
    """
    Load the state that optimizer_tensors returned. Learning rates, betas and decay stay as they
    are set now. partly: parameters without a saved state begin without one.
    tensors: also a list of the optimizers' state dicts, as older checkpoints have it.
    Raises UserError where a state is missing or does not fit.
    """
    names = {p: name for name, p in model.named_parameters()}
    if isinstance(tensors, list):
        tensors = _named(tensors, optimizers, names, path)
    left = set(tensors)
    for optimizer in optimizers:
        kept = ("momentum_buffer",) if isinstance(optimizer, Muon) else ADAMW_STATE
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            state = {what: tensors.get(f"{names[p]}.{what}") for what in kept}
            left -= {f"{names[p]}.{what}" for what in kept}
            if partly and all(x is None for x in state.values()):
                continue
            for what, x in state.items():
                shape = () if what == "step" else p.shape
                if not isinstance(x, torch.Tensor) or x.shape != shape:
                    raise UserError(f"{path} holds no state {what!r} for the optimizer of "
                                    f"{names[p]}")
                x = x.to(p.device, copy=True)
                optimizer.state[p][what] = x if what == "step" else divided_like(x, p)
    if left:
        raise UserError(f"{path} holds a state for another optimizer: {next(iter(left))}")


def _named(states, optimizers, names, path):
    """The tensors of a list of optimizers' state dicts, by the parameters' names."""
    tensors = {}
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, values in state["state"].items():
                for what, x in values.items():
                    tensors[f"{names[params[i]]}.{what}"] = x
    except Exception as e:  # a damaged state can raise any type
        raise UserError(f"{path} holds no state for these optimizers: {type(e).__name__}") from None
    return tensors
