"""
The pictures: curves.png, which a training run draws, and those of eval.py. They need matplotlib
(requirements-extra.txt).

    save_picture("out/selection.png", draw_selection, layers, place)
"""
import math
import os

import numpy as np

from configurator import replacing, say


def can_draw(name):
    """Is matplotlib installed? If not, say that there will be no picture of this name."""
    try:
        import matplotlib
    except ImportError:
        say(f"no {name}: matplotlib is not installed (pip install -r requirements-extra.txt)")
        return False
    matplotlib.use("Agg")  # into files, also where there is no screen
    return True


def save_picture(path, draw, *args):
    """Save the figure that draw(plt, *args) returns; without matplotlib, say so."""
    if not can_draw(os.path.basename(path)):
        return
    import matplotlib.pyplot as plt
    figure = draw(plt, *args)
    try:
        with replacing(path, binary=True) as f:
            figure.savefig(f, format="png", dpi=120)
    finally:
        plt.close(figure)


def curve(records, name):
    """(steps, values) of the records that hold a number of this name, 2000 of them or fewer."""
    held = [r for r in records if type(r.get(name)) is float]
    held = held[::1 + len(held) // 2000]  # more take seconds to draw and show no more
    return [r["step"] for r in held], [r[name] for r in held]


def draw_results(plt, cells, records, warmup_end):
    """
    Heat maps of the needle grid, one per kind, and training curves. records: those of the run's
    log.jsonl. warmup_end: the step at which its index warm-up ended, 0 = it had none.
    """
    kinds = list(dict.fromkeys(c["kind"] for c in cells))
    n = len(kinds) + 1  # panels, at most three side by side
    columns = min(n, 3)
    rows = math.ceil(n / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5.5 * columns, 4 * rows), squeeze=False,
                                layout="constrained")
    axes = list(grid.flat)
    for unused in axes[n:]:
        unused.remove()
    for panel, kind in zip(axes, kinds):
        shares = {(c["depth"], c["length"]): c["accuracy"] for c in cells if c["kind"] == kind}
        draw_heat_map(figure, panel, shares, 1, "share of the keys")
        panel.set(xlabel="context length (tokens)", ylabel="depth of the needle",
                  title=f"needle retrieval, {kind}")
    draw_curves(axes[n - 1], records, warmup_end)
    return figure


def draw_ruler(plt, cells):
    """Heat map of RULER's tasks and lengths; white where a task did not fit. See all_cells."""
    scores = {(task, c["length"]): np.mean(c.get("scores", np.nan)) for task, c in cells}
    rows = len({task for task, _ in scores})
    figure, axes = plt.subplots(figsize=(7, 1.5 + 0.35 * rows), layout="constrained")
    draw_heat_map(figure, axes, scores, 100, "score")
    axes.set(xlabel="context length (tokens)", title="RULER")
    return figure


def draw_heat_map(figure, axes, values, most, label):
    """values: {(row, column): number from 0 to `most`}, NaN or absent for none; columns sorted."""
    rows = list(dict.fromkeys(row for row, _ in values))
    columns = sorted({column for _, column in values})
    grid = np.array([[values.get((row, column), np.nan) for column in columns] for row in rows])
    image = axes.imshow(grid, vmin=0, vmax=most, cmap="RdYlGn", aspect="auto")
    figure.colorbar(image, label=label)
    for (i, j), value in np.ndenumerate(grid):
        if not np.isnan(value):
            is_dark = abs(value / most - 0.5) > 0.4
            axes.text(j, i, f"{value:.3g}", ha="center", va="center",
                      color="white" if is_dark else "black")
    axes.set_xticks(range(len(columns)), columns)
    names = [row if isinstance(row, str) else f"{row:.2f}" for row in rows]
    axes.set_yticks(range(len(rows)), names)


def draw_training(plt, records, warmup_end):
    """The training curves alone, for a run that goes on. Arguments: see draw_results."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    draw_curves(axes, records, warmup_end)
    return figure


def draw_curves(axes, records, warmup_end):
    """Losses and recall as lines, validation as dots."""
    train = [r for r in records if r.get("kind") == "train"]
    for name, style in (("loss", "-"), ("index_loss", "--"), ("recall", ":")):
        steps, values = curve(train, name)
        if values:
            axes.plot(steps, values, style, color="C0", lw=1, label=name.replace("_", " "))
    steps, values = curve([r for r in records if r.get("kind") == "eval"], "loss")
    axes.plot(steps, values, "o", color="C1", label="validation loss")
    if warmup_end:
        axes.axvline(warmup_end, color="grey", lw=1)
        axes.annotate(" sparse →", (warmup_end, 1), xycoords=("data", "axes fraction"), va="top")
    axes.set(xlabel="step", ylabel="nats (recall: a share)", title="training", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", framealpha=0.6)


def draw_positions(plt, texts):
    """
    Loss by the number of tokens that a prediction sees, a curve per text with its standard errors.
    texts: {name: by_position}, see perplexity.perplexity.
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, buckets in texts.items():
        seen = [bucket["to"] for bucket in buckets]
        losses = [bucket["loss"] for bucket in buckets]
        errors = [bucket["loss_stderr"] or 0 for bucket in buckets]
        axes.errorbar(seen, losses, errors, fmt="o-", ms=3, lw=1, capsize=2, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="tokens seen (up to)", ylabel="nats per token",
             title="loss by the tokens that a prediction sees")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", framealpha=0.6)
    return figure


def draw_selection(plt, layers, place):
    """
    One row per layer: the attention mass of every key, selected keys in colour, others grey.
    layers, place: see needle_selection.
    """
    figure, rows = plt.subplots(len(layers), 1, figsize=(11, 0.6 + 1.6 * len(layers)),
                                sharex=True, squeeze=False, layout="constrained")
    floor = 1e-5  # smaller masses are drawn as this
    for i, (axes, (mass, selected)) in enumerate(zip(rows[:, 0], layers)):
        key = np.arange(len(mass))
        axes.axvspan(place.start - 0.5, place.stop - 0.5, color="gold", alpha=0.5, lw=0,
                     label="needle")
        for chosen, colour, label in ((~selected, "lightgrey", "not selected"),
                                      (selected, "C0", "selected")):
            axes.vlines(key[chosen], floor, np.maximum(mass[chosen], floor), color=colour,
                        lw=max(0.5, 400 / len(mass)), label=label)
        axes.set_yscale("log")
        axes.set(ylim=(floor, 1), xlim=(-1, len(mass)), ylabel="mass")
        axes.set_title(f"layer {i}: {selected.sum()} of {len(mass)} keys selected, which hold "
                       f"{mass[selected].sum():.2f} of full attention", fontsize="medium")
    rows[0, 0].legend(fontsize="small", loc="upper left", ncols=3)
    rows[-1, 0].set_xlabel("position of the key (the query is the last)")
    return figure


def draw_attention(plt, result):
    """
    What inspection.attention has found: the mass on the first keys and the gates by layer, k_t, and
    the distances of the selected keys. One panel each; what the model lacks has none.
    """
    layers = result["layers"]
    shares = {name: layers[name] for name in ("first_token", "first_four")}
    gates = {name: layers[name] for name in ("value_gate", "output_gate") if name in layers}
    panels = [("attention on the first keys", "share of the attention", shares, None)]
    if gates:
        panels.append(("gates", "mean value (0 closed, 1 open)", gates, 1))
    histograms = [(title, what, result[name], unit, scale) for title, what, name, unit, scale in (
        ("budget k_t", "share of the queries", "k_t_histogram", "keys", "linear"),
        ("distance of the selected keys", "share of the selected keys", "distance_histogram",
         "tokens (the bins double)", "symlog")) if name in result]
    n = len(panels) + len(histograms)
    figure, axes = plt.subplots(1, n, figsize=(4 * n, 3.5), squeeze=False, layout="constrained")
    for ax, (title, what, lines, top) in zip(axes[0], panels):
        for name, values in lines.items():
            ax.plot(values, "o-", label=name.replace("_", " "))
        ax.set(title=title, xlabel="layer", ylabel=what, ylim=(0, top))
        ax.set_xticks(range(0, len(values), 1 + len(values) // 12))
        ax.legend(fontsize="small")
    for ax, (title, what, found, unit, scale) in zip(axes[0, len(panels):], histograms):
        ax.stairs(found["shares"], found["edges"], fill=True)
        ax.set_xscale(scale)
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.set(title=title, xlabel=unit, ylabel=what)
    for ax in axes[0]:
        ax.grid(alpha=0.3)
    return figure


def draw_comparison(plt, arms):
    """
    Loss in training and validation of several runs, one colour per arm.
    arms: {name: [records of a run's log.jsonl, …]}.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for ax, kind, title in zip(axes, ("train", "eval"), ("training", "validation")):
        for i, (name, logs) in enumerate(arms.items()):
            for j, records in enumerate(logs):
                steps, values = curve([r for r in records if r.get("kind") == kind], "loss")
                ax.plot(steps, values, "-" if kind == "train" else "o-", ms=3, lw=1, alpha=0.7,
                        color=f"C{i}", label=None if j else f"{name}, seeds: {len(logs)}")
        ax.set(title=title, xlabel="step", ylabel="loss (nats per token)")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    return figure


def draw_groups(plt, panels):
    """
    Mean and standard deviation of each group, with a dot for each value; a panel per number.
    panels: {label of the number: {group: [its values]}}. A group may have no values.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.5), squeeze=False,
                                layout="constrained")
    for ax, (label, groups) in zip(axes[0], panels.items()):
        for i, values in enumerate(groups.values()):
            ax.plot([i] * len(values), values, "o", ms=4, alpha=0.6, color=f"C{i}")
            if values:
                mean, std = mean_and_deviation(values)
                ax.errorbar(i + 0.15, mean, std, fmt="s", capsize=5, color=f"C{i}")
        ax.set_xticks(range(len(groups)), groups, fontsize="small")
        ax.margins(0.2)
        ax.set(title=label)
        ax.grid(alpha=0.3, axis="y")
    return figure


def mean_and_deviation(values):
    """Mean and standard deviation, 0 of one value."""
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0


def draw_against(plt, name, x, panels):
    """
    Numbers against a setting, with standard deviations. x: its values. panels: {label of the
    number: {line: [the values at each x]}}. There may be none at an x.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.5), squeeze=False,
                                layout="constrained")
    for ax, (label, lines) in zip(axes[0], panels.items()):
        for i, (line, values) in enumerate(lines.items()):
            points = [(at, *mean_and_deviation(found)) for at, found in zip(x, values) if found]
            if points:
                ax.errorbar(*zip(*points), fmt="o-", ms=4, lw=1, capsize=4, color=f"C{i}",
                            label=line)
        ax.set_xscale("log")
        ax.set_xticks(x, [f"{at:g}" for at in x])
        ax.minorticks_off()
        ax.set(title=label, xlabel=name)
        ax.grid(alpha=0.3)
        if len(ax.containers) > 1:
            ax.legend(fontsize="small")
    return figure
