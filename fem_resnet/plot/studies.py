"""What studies come to: numbers over numbers, as errors over samples or meshes, and methods beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from fem_resnet.arguments import choice, flag, instance, real_array
from fem_resnet.plot.canvas import DASHES, LINES, given_or_new

__all__ = ["comparison", "lines"]

_MARKS = "osv^x*D"
#: A curve of so many points, or fewer, has a mark at each; so many places, or fewer, are the ticks of a logarithmic axis.
_FEW, _TICKS = 14, 9
#: How far marks of other curves are apart, in parts of the diagonal of the axes.
_STEP = 0.15
#: Names of so many letters, or fewer, stand in two columns.
_SHORT = 24


def lines(
    curves: Mapping[str, ArrayLike],
    *,
    points: Mapping[str, ArrayLike] | None = None,
    reference: Mapping[str, ArrayLike] | None = None,
    log: str = "",
    xlabel: str = "",
    ylabel: str = "",
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw numbers over numbers by their names: errors over samples, misfits over weights. Not collective.

    Parameters
    ----------
    curves
        Places and values by name, shape (points, 2); with deviations in a third column, which are drawn as bars, shape
        (points, 3). A curve of few points has a mark at each, one of many has some, where there are others.
    points
        What is drawn by marks alone, of the same shapes.
    reference
        What the others are held against, as slopes and bounds: in grey, of the same shapes.
    log
        Which axes are logarithmic: "", "x", "y" or "xy".
    xlabel, ylabel
        What the axes say.
    legend
        Whether the names stand below the axes. Panels with the same names may share a legend of their figure:
        ``figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center")``.
    ax
        Where to draw; new axes if left out.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or there is nothing to draw.

    Examples
    --------
    >>> from fem_resnet import plot
    >>> errors = {"Euler": [(10, 0.1), (20, 0.05)], "Heun": [(10, 0.01), (20, 0.0025)]}
    >>> ax = plot.lines(errors, log="xy", xlabel="layers", ylabel="error")
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['Euler', 'Heun']
    """
    choice("log", log, ("", "x", "y", "xy"))
    xlabel, ylabel = instance("xlabel", xlabel, str), instance("ylabel", ylabel, str)
    legend, ax = flag("legend", legend), given_or_new(ax)
    given = {"curves": curves, "points": points, "reference": reference}
    named = {kind: {} if one is None and kind != "curves" else _arrays(kind, one) for kind, one in given.items()}
    drawn = [*named["curves"].items(), *named["points"].items()]
    if not drawn:
        raise ValueError("curves: expected at least one, by its name, got none")
    for k, (name, array) in enumerate(named["reference"].items()):
        ax.plot(*array.T[:2], color="0.5", linestyle=DASHES[-1 - k % len(DASHES)], label=name, zorder=1)
    for k, (name, (x, y, *deviations)) in enumerate((name, array.T) for name, array in drawn):
        alone = k >= len(named["curves"])
        style = "none" if alone else DASHES[k // len(LINES) % len(DASHES)]
        # Of curves that coincide all are seen: the first is the widest, and marks between many points are at other places.
        few, only = alone or len(x) <= _FEW, not alone and len(named["curves"]) == 1
        ax.errorbar(
            x, y, *deviations, label=name, color=LINES[k % len(LINES)], linestyle=style,
            marker=None if only and not few else _MARKS[k % len(_MARKS)],
            markersize=max(9 - 2 * k, 4), markevery=1 if few else (_STEP * k / len(drawn), _STEP),
            linewidth=max(2.4 - 0.3 * k, 1.2), capsize=3, elinewidth=1,
        )  # fmt: skip
    ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if "x" in log else "linear", yscale="log" if "y" in log else "linear")
    if "x" in log:
        places = np.unique(np.concatenate([array[:, 0] for _, array in drawn]))
        _say(ax.xaxis, places if places.size <= _TICKS and _apart(places) else None)
    if "y" in log:
        _say(ax.yaxis)
    if legend:
        columns = 2 if max(map(len, ax.get_legend_handles_labels()[1])) <= _SHORT else 1
        ax.legend(
            loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=5.0, ncols=columns, fontsize="small", frameon=False
        )
    return ax


def _arrays(name: str, given: Any) -> dict[str, np.ndarray]:
    """Arrays by names, shape (points, 2) or (points, 3)."""
    found = {}
    for key, value in instance(name, given, Mapping, "a dict of arrays by their names").items():
        found[instance(name, key, str)] = array = real_array(name, value)
        if array.ndim != 2 or array.shape[1] not in (2, 3) or not array.size:
            raise ValueError(f"{name}: expected arrays of shape (points, 2) or (points, 3), got {array.shape} of {key!r}")
    return found


def _apart(places: np.ndarray) -> bool:
    """Whether there is room for a number at each of these places on a logarithmic axis."""
    logs = np.log(places, where=places > 0, out=np.full(places.size, np.nan))
    return places.size < 2 or bool(np.diff(logs).min() > 0.08 * np.ptp(logs))


def _say(axis: Axis, places: np.ndarray | None = None) -> None:
    """Plain numbers on a logarithmic axis: these places; or 1, 2, 5, or finer ones, where powers of ten would be too few."""
    if places is None:
        low, high = axis.get_view_interval()
        if not 0 < low < high < 1000 * low:  # powers of ten are enough
            return
        first, last = np.floor(np.log10([low, high])).astype(int)
        steps = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
        places = np.array([step for step in steps if low <= step <= high])
        if places.size < 3:
            steps = list(MaxNLocator(4).tick_values(low, high))
            places = np.array([step for step in steps if low <= step <= high])
    axis.set_ticks(places, [f"{place:,.0f}" if place >= 1000 else f"{place:.3g}" for place in places])
    axis.set_minor_locator(NullLocator())


def comparison(
    runs: Mapping[str, ArrayLike],
    *,
    marked: Sequence[str] = (),
    log: bool = False,
    xlabel: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw what methods came to, one above the other: a dot for each run, and their mean. Not collective.

    Parameters
    ----------
    runs
        Numbers by the name of the method, shape (runs,); the first stands on top.
    marked
        Names of those that have a colour of their own, shape (names,).
    log
        Whether the axis is logarithmic.
    xlabel
        What it says.
    ax
        Where to draw; new axes if left out.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> from fem_resnet import plot
    >>> ax = plot.comparison({"network": [1.0, 1.2, 0.9], "linear map": [3.0]}, marked=["network"], xlabel="error, %")
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['network', 'linear map']
    """
    runs = instance("runs", runs, Mapping, "a dict of numbers by the names of methods")
    found = {instance("runs", name, str): real_array("runs", numbers, ("runs",)) for name, numbers in runs.items()}
    if not found:
        raise ValueError("runs: expected at least one method, by its name, got none")
    marked = [choice("marked", name, found) for name in instance("marked", marked, (list, tuple), "of names in `runs`")]
    log, xlabel, ax = flag("log", log), instance("xlabel", xlabel, str), given_or_new(ax)
    for row, (name, numbers) in enumerate(found.items()):
        colour = LINES[1] if name in marked else LINES[0]
        ax.plot(numbers, np.full(numbers.size, row), "o", color=colour, markersize=4, alpha=0.6, markeredgewidth=0)
        ax.plot([numbers.mean()] * 2, [row - 0.3, row + 0.3], color=colour, linewidth=2.5)
    ax.set_yticks(range(len(found)), list(found))
    ax.set(xlabel=xlabel, xscale="log" if log else "linear", ylim=(len(found) - 0.5, -0.5))
    ax.grid(axis="x", alpha=0.3)
    if log:
        _say(ax.xaxis)
    return ax
