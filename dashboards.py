"""
TensorBoard and wandb, where report.py shows a training run if asked to. Both are optional packages
(pip install tensorboard wandb).

    check_extras(cfg)                  # cfg: train.TrainConfig, with --tensorboard or --wandb
    board = TensorBoard(cfg, step=0)
    board.write("train", 10, {"loss": 2.3})
    board.close(failed=False)
"""
import importlib
import os
from dataclasses import asdict

from configurator import UserError, replacing


def reason(error):
    """The first line of an exception's message, or else its type."""
    return next(iter(str(error).splitlines()), type(error).__name__)


# For each package: the module, and what of it is called
EXTRAS = {"tensorboard": ("torch.utils.tensorboard", "SummaryWriter"), "wandb": ("wandb", "init")}


def load_extra(name):
    """What is called of an optional package. Raises UserError where it cannot be imported."""
    module, entry = EXTRAS[name]
    try:
        return getattr(importlib.import_module(module), entry)
    except Exception as e:  # missing, or at odds with the packages around it
        raise UserError(f"--{name} needs the package {name} (pip install {name}): "
                        f"{reason(e)}") from None


def check_extras(cfg):
    """Refuse --tensorboard or --wandb without its package. Call it before anything is written."""
    for name in EXTRAS:
        if getattr(cfg, name):
            load_extra(name)


class TensorBoard:
    """out_dir/tensorboard. What an earlier run wrote there after `step` is hidden."""

    def __init__(self, cfg, step):
        self.writer = load_extra("tensorboard")(os.path.join(cfg.out_dir, "tensorboard"),
                                                purge_step=step + 1)

    def write(self, kind, step, numbers):
        for name, x in numbers.items():
            self.writer.add_scalar(f"{kind}/{name}", x, step)

    def close(self, failed):
        self.writer.close()


class Wandb:
    """
    A run of wandb. Its id is kept in out_dir/wandb_id, so that a resumed training continues it.
    wandb's own steps cannot go back to a checkpoint. So the step is one of the numbers, and the
    x-axis of the others.
    """

    def __init__(self, cfg, step):
        path = os.path.join(cfg.out_dir, "wandb_id")
        run_id = None
        if step and os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                run_id = f.read()
        init = load_extra("wandb")
        try:
            self.run = init(project=cfg.wandb_project, id=run_id, resume="allow",
                            dir=cfg.out_dir, config=asdict(cfg))
        except Exception as e:  # no account, no network
            raise UserError(f"wandb does not start ({reason(e)}): log in by `wandb login`, or "
                            "set WANDB_MODE=offline and send it later by `wandb sync`") from None
        with replacing(path) as f:
            f.write(self.run.id)
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, kind, step, numbers):
        self.run.log({"step": step, **{f"{kind}/{name}": x for name, x in numbers.items()}})

    def close(self, failed):
        self.run.finish(exit_code=int(failed))
