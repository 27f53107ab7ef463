"""
What goes wrong in a training without ending it: skipped steps and spikes of the loss.

    stability = Stability()
    stability.observe(loss=3.2, skipped=False)
    stability.spikes, stability.skipped, stability.in_a_row
"""
from collections import deque

import numpy as np


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
