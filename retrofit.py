"""
Retrofit: weights of a dense model in a model with gates and an indexer, which then starts as the
dense one was. Training goes on with warm-up, in which the indexer alone learns.

    open_gates_and_load(model, weights, "out/dense")  # weights: {parameter name: tensor}
"""
import torch

from configurator import UserError

OPEN = 8.0  # bias of an open gate: σ(8) = 0.9997


@torch.no_grad()
def open_gates_and_load(model, weights, where):
    """
    Copy weights (a dense model's state dict) into the model. Gates that have no weights there
    open, indexers keep their initial values. A model without both is simply loaded.
    where: the weights' origin, for messages. Returns whether gates or an indexer were added.
    Raises UserError where the weights do not fit the model or are not finite; the model is
    unchanged then.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    wrong = [f"{name} is on one side only" for name in missing
             if "_gate." not in name and ".indexer." not in name]
    for name, x in weights.items():
        if name not in own:
            wrong.append(f"{name} is on one side only")
        elif x.shape != own[name].shape:
            wrong.append(f"{name} has shape {tuple(x.shape)}, not {tuple(own[name].shape)}")
        elif not torch.isfinite(x).all():
            wrong.append(f"{name} is not finite")
    refuse(where, wrong)
    model.load_state_dict(weights, strict=False)
    for name, p in model.named_parameters():
        if name in missing and "_gate." in name:
            p.fill_(OPEN if name.endswith("bias") else 0.0)
    return bool(missing)


def refuse(where, wrong):
    """Raise UserError with the first entries of a list of what is wrong, if there is any."""
    if not wrong:
        return
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise UserError(f"{where} does not fit this model: {', '.join(wrong[:3])}{more}")
