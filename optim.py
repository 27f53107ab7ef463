"""
The optimizers of a training run: AdamW for everything, or AdamW and Muon.

    optimizers = make_optimizers(model, cfg)       # cfg: train.TrainConfig
"""
import math

import torch

from configurator import UserError


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
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr = group["lr"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(momentum, group["momentum"]))
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))


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
    if cfg.muon:
        optimizers = [Muon([groups.pop("matrix")], cfg.learning_rate)]
    adamw = torch.optim.AdamW(groups.values(), lr=cfg.learning_rate,
                              betas=(cfg.beta1, cfg.beta2), fused=True)
    return [adamw] + optimizers


def load_optimizers(optimizers, states, path):
    """
    Load the optimizers' saved averages of the gradients. Learning rates, betas and decay stay as
    they are set now.
    """
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            now = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, values in zip(optimizer.param_groups, now, strict=True):
                group.update(values)
    except Exception as e:  # a damaged state can raise any type
        raise UserError(f"{path} holds no state for these optimizers: {type(e).__name__}") from None
