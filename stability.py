"""
What goes wrong in a training without ending it: skipped steps and spikes of the loss. train.py
counts them; eval.py's part "stability" reads what it has counted and logged.

    stability = Stability()
    stability.observe(loss=3.2, skipped=False)
    stability.spikes, stability.skipped, stability.in_a_row

    stability_report(records of a log.jsonl, step, stability.state())["spikes_per_1000_steps"]
"""
import os
from collections import deque

import numpy as np

from configurator import UserError, say
from outdir import read_log


class Stability:
    """
    Counts over a run. It takes the losses of all steps in their order.

    skipped  steps whose loss or gradient was not finite: they changed nothing
    spikes   steps whose loss lies at least 7 standard deviations above the mean of the losses
             before it: the last 1,000, and at least 20. After the spike score of OLMo 2
             (arXiv 2501.00656), which counts losses far below the mean, too
    """
    WINDOW = 1000
    LEAST = 20
    DEVIATIONS = 7

    def __init__(self, skipped=0, in_a_row=0, spikes=0, losses=()):
        self.skipped = skipped
        self.in_a_row = in_a_row  # steps skipped since the last that was not
        self.spikes = spikes
        self.losses = deque(losses, self.WINDOW)

    def observe(self, loss, skipped):
        """Count one step. Returns whether it was a spike."""
        if skipped:
            self.skipped += 1
            self.in_a_row += 1
            return False
        self.in_a_row = 0
        spike = False
        if len(self.losses) >= self.LEAST:
            before = np.array(self.losses)
            spike = bool(loss > before.mean() + self.DEVIATIONS * before.std())
        self.spikes += spike
        self.losses.append(loss)
        return spike

    def state(self):
        """What a checkpoint keeps: the arguments of the constructor."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "spikes": self.spikes,
                "losses": list(self.losses)}


# --------------------------------------------------------------------------------------------------
# A part of eval.py

SETTINGS = ""


def check(cfg, subject):
    """Refuse what cannot be measured. Raises UserError."""


def measure(cfg, subject):
    path = os.path.join(cfg.out_dir, "log.jsonl")
    step = subject.checkpoint["step"]
    records = [record for record, _ in read_log(path) if record["step"] <= step]
    if not any(record.get("kind") == "train" for record in records):
        raise UserError(f"there is no log of the training in {path}")
    return stability_report(records, step, subject.checkpoint.get("stability"))


def stability_report(records, step, counts):
    """
    The stability of a run up to a step. records: those of its log.jsonl up to this step. counts:
    the Stability.state() of its checkpoint, None from a version that did not count.
    Returns a dict:
        steps, logged_steps  all steps; steps that have a record
        spikes, skipped      counted over all steps (see Stability), or None
        spikes_per_1000_steps
        grad_norm, index_grad_norm  the largest of the logged steps, before clipping
        max_activation       the largest of the evaluations: of a layer, mean over the batches
    The last three are {"value", "step"}, None where nothing is logged.
    """
    train = [record for record in records if record.get("kind") == "train"]
    report = {"steps": step, "logged_steps": len(train),
              "spikes": None, "skipped": None, "spikes_per_1000_steps": None}
    if counts:
        report |= {"spikes": counts["spikes"], "skipped": counts["skipped"],
                   "spikes_per_1000_steps": 1000 * counts["spikes"] / step}
    for name in ("grad_norm", "index_grad_norm"):
        report[name] = largest(train, name)
    layers = {key for record in records for key in record if key.startswith("max_activation/")}
    report["max_activation"] = largest(records, *layers)
    return report


def largest(records, *names):
    """The largest number of these names: {"value", "step"}; None if there is none."""
    found = [(record[name], record["step"]) for record in records for name in names
             if type(record.get(name)) is float]
    if not found:
        return None
    value, step = max(found)
    return {"value": value, "step": step}


def show(report):
    counted = "not counted by the version that logged it"
    if report["spikes"] is not None:
        counted = (f"{report['spikes']} spikes ({report['spikes_per_1000_steps']:.2f} per 1,000 "
                   f"steps), {report['skipped']} skipped steps")
    say(f"\nstability   of all {report['steps']:,} steps: {counted}")
    logged = f"of {report['logged_steps']:,} logged steps"
    for name, label in (("grad_norm", f"gradient norm {logged}"),
                        ("index_grad_norm", f"gradient norm of the indexer {logged}"),
                        ("max_activation", "activation in the training's evaluations")):
        if report[name]:
            say(f"  largest {label}: {report[name]['value']:.4g} (step {report[name]['step']:,})")


def summary(report):
    found = {"spikes_per_1000_steps": report["spikes_per_1000_steps"],
             "skipped_steps": report["skipped"]}
    if report["grad_norm"]:
        found["largest_grad_norm"] = report["grad_norm"]["value"]
    return {name: value for name, value in found.items() if value is not None}
