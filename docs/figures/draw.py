"""Pictures of demos that print a table and draw nothing: from the tables of the full runs, demos/*.txt.

containers/run python docs/figures/draw.py
"""

import re
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

FIGURES = Path(__file__).parent
DEMOS = FIGURES.parents[1] / "demos"


def rows(name: str, pattern: str) -> list[tuple[float, ...]]:
    """The numbers that a pattern finds in the lines of a table."""
    found = re.findall(pattern, (DEMOS / f"{name}.txt").read_text(), re.M)
    return [tuple(float(word) for word in row if word[0].isdigit()) for row in found]


def new(**labels):
    figure = Figure(figsize=(5.6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(**labels)
    return figure, axes


def mesh_independence():
    found = rows("mesh_independence", r"^ *(\d+) +4 +1 +(\d+) +(?:> )?(\d+)$")
    figure, axes = new(xlabel="nodes", ylabel="iterations", xscale="log", yscale="log", ylim=(20, 2000))
    nodes, ours, plain = zip(*found)
    axes.plot(nodes, plain, "s--", color="tab:red", label="inner product of plain numbers (at most 1,000)")
    axes.plot(nodes, ours, "o-", color="tab:blue", label="inner product of functions")
    axes.legend()
    return figure


def costate_twice():
    found = rows("costate_twice", r"^ +(0\.\d+) +(\S+) +(?:\S+ +)?(\d\.\d+e-\d+) +(?:\d\.\d+ +)?\S+e-16 +\S+e-16$")
    step, costate, gradient = zip(*found)
    figure, axes = new(xlabel="step", ylabel="relative difference", xscale="log", yscale="log")
    axes.plot(step, costate, "o-", label="co-state")
    axes.plot(step, gradient, "s-", label="gradient")
    axes.plot(step, [costate[0] * (h / step[0]) ** 4 / 2 for h in step], "k:", label="order 4")
    axes.set_xticks(step, step)
    axes.minorticks_off()
    axes.legend()
    return figure


def digits_table():
    names = re.findall(r"^\| ([^|(]*?)(?: \([^|]*\))? \| \d", (DEMOS / "digits_table.txt").read_text(), re.M)
    found = rows("digits_table", r"\*\*(\S+)\*\* \| (\S+) \|")
    figure, axes = new(xlabel="test accuracy, %")
    for place, (mean, deviation) in enumerate(found):
        color = "tab:blue" if "network" in names[place] else "tab:gray"
        axes.errorbar(mean, -place, xerr=deviation, fmt="o", color=color, capsize=4)
    axes.set_yticks([-place for place in range(len(names))], names)
    return figure


def burgers_table():
    lines = (DEMOS / "burgers_table.txt").read_text().splitlines()[2:]
    others = [[word.strip(" *") for word in line.strip("| ").split("|")] for line in lines]
    ours = rows("burgers_on_the_circle", r"^\d+ layers, (?:from )?seed \d +(\d+) +(\S+)%")
    figure, axes = new(xlabel="parameters", ylabel="relative test error, %", xscale="log", yscale="log")
    for mark, name in (("s", "DeepONet"), ("o", "FNO")):
        there = [row for row in others if name in row[0] and row[3]]  # those of five seeds
        count, mean, deviation = ([float(row[k].replace(",", "")) for row in there] for k in (1, 2, 3))
        axes.errorbar(count, mean, yerr=deviation, fmt=f"{mark}--", color="tab:gray", capsize=4, label=name)
    for name, count, mean in (row[:3] for row in others if not row[3]):  # one seed, longer
        axes.plot(float(count.replace(",", "")), float(mean), "o", color="tab:gray", mfc="none", label=name)
    axes.plot(*zip(*ours), "o", color="tab:blue", markersize=4, label="burgers_on_the_circle, each seed")
    for axis, ticks in ((axes.xaxis, (1000, 2000, 5000, 10000)), (axes.yaxis, (0.1, 0.2, 0.5, 1, 2, 5, 10))):
        axis.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.set_minor_locator(NullLocator())
    axes.legend()
    return figure


def digits_cross_validation():
    found = rows("digits_cross_validation", r"^rank.*(accuracy) (\S+)$")
    figure, axes = new(xlabel="setting, in the order of the search", ylabel="accuracy in cross-validation")
    axes.plot(range(1, len(found) + 1), [accuracy for (accuracy,) in found], "o")
    best = [max(found[: number + 1])[0] for number in range(len(found))]
    axes.step(range(1, len(found) + 1), best, where="post", color="tab:red", label="best so far")
    axes.legend()
    return figure


def nearby_inputs():
    text = r"^(0\.\d) +\| +\S+ \| +(\S+e-\d+) +\S+ +(?:\S+)? +\| +(\S+e-\d+)"
    found = rows("nearby_inputs", text)[:4]
    size, kept, feedback = zip(*found)
    figure, axes = new(xlabel="size of the perturbation", ylabel="mean cost above the optimum", xscale="log", yscale="log")
    axes.plot(size, kept, "s--", color="tab:red", label="controls kept: order 2")
    axes.plot(size, feedback, "o-", color="tab:blue", label="feedback: order 4")
    axes.set_xticks(size, size)
    axes.minorticks_off()
    axes.legend()
    return figure


if __name__ == "__main__":
    for draw in (mesh_independence, costate_twice, digits_table, burgers_table, digits_cross_validation, nearby_inputs):
        draw().savefig(FIGURES / f"{draw.__name__}.png", dpi=110, metadata={"Software": None})
