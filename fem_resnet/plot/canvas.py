"""Axes to draw on, on all ranks; colours; and pictures in files.

Colours can be told apart by people who are colour-blind: lines have those of Okabe and Ito, values of one sign the map
viridis, values of both signs a map from blue to red whose white is 0.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from mpi4py import MPI

from fem_resnet.arguments import instance, number
from fem_resnet.ranks import draw_on_first, same, together
from fem_resnet.reporting import print_figure

__all__ = [
    "DASHES", "LINES", "Colours", "checked_axes", "colour_bar", "given_or_new", "has_pyvista", "has_vtk",
    "limits_of", "panels", "save",
]  # fmt: skip

#: Colours of lines: blue, vermilion, green, orange, purple, light blue, black; yellow is too pale on white.
LINES = [matplotlib.color_sequences["okabe_ito"][k] for k in (5, 6, 3, 1, 7, 2, 0)]
DASHES = ("-", "--", "-.", ":")

#: The size of a panel in inches, and how many stand side by side.
_SIDE, _IN_A_ROW = 2.9, 6


def has_pyvista() -> bool:
    """Whether PyVista is installed."""
    return importlib.util.find_spec("pyvista") is not None


def has_vtk() -> bool:
    """Whether VTK is installed."""
    return importlib.util.find_spec("vtkmodules") is not None


def panels(count: int, *, wide: float = 1.0, in_space: bool = False) -> np.ndarray:
    """New axes side by side in one figure, in rows of six, shape (count,).

    Parameters
    ----------
    count
        How many.
    wide
        The width of a panel over its height.
    in_space
        Whether they are axes of three coordinates.
    """
    rows, columns = -(-count // _IN_A_ROW), min(count, _IN_A_ROW)
    figure = Figure(figsize=(max(3.6, _SIDE * wide * columns + 0.9), _SIDE * rows + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    kind = {"projection": "3d"} if in_space else {}
    axes = figure.subplots(rows, columns, squeeze=False, subplot_kw=kind).ravel()
    for ax in axes[count:]:
        ax.remove()
    return axes[:count]


def given_or_new(ax: Axes | None) -> Axes:
    """Axes from outside, or new ones."""
    return panels(1, wide=1.4)[0] if ax is None else instance("ax", ax, Axes, "Figure().subplots() makes one")


def checked_axes(comm: MPI.Comm, name: str, given: Any, count: int) -> np.ndarray | None:
    """Axes from outside, shape (count,); None where none were given. Collective over `comm`.

    Parameters
    ----------
    comm
        The communicator.
    name
        The name of the argument in messages.
    given
        Axes, a sequence or array of Axes, or None.
    count
        How many are expected.

    Raises
    ------
    TypeError, ValueError
        If these are no axes, or another number; on all ranks alike.
    """

    def check() -> np.ndarray | None:
        if given is None:
            return None
        axes = np.ravel(np.asarray(given, dtype=object))
        for ax in axes:
            instance(name, ax, Axes, "Figure().subplots() makes one")
        if axes.size != count:
            raise ValueError(f"{name}: expected {count} axes, one for each picture, got {axes.size}")
        return axes

    axes = together(comm, check)
    same(comm, **{name: axes is None})
    return axes


class Colours:
    """The colours of numbers.

    Parameters
    ----------
    low, high
        The ends of the scale.

    Attributes
    ----------
    low, high : float
        The ends that were given.
    norm : matplotlib.colors.Normalize
        From numbers to [0, 1].
    cmap : str
        The name of the colour map: "RdBu_r" for numbers of both signs, whose scale is then symmetric; else "viridis".
    """

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high
        self.cmap = "RdBu_r" if low < 0 < high else "viridis"
        if low < 0 < high:
            low, high = -max(-low, high), max(-low, high)
        self.norm = Normalize(low, high)

    def mappable(self) -> ScalarMappable:
        """What a colour bar is made of."""
        return ScalarMappable(self.norm, self.cmap)

    @classmethod
    def of(cls, values: np.ndarray, limits: tuple[float, float] | None = None) -> Colours:
        """Of these values, or between these limits."""
        low, high = limits or (float(values.min(initial=np.inf)), float(values.max(initial=-np.inf)))
        size = max(abs(low), abs(high)) or 1.0
        if not high - low > 1e-9 * size:  # a constant, but for round-off
            low, high = low - size / 2, high + size / 2
        return cls(low, high)


def limits_of(comm: MPI.Comm, limits: Sequence[float] | None) -> tuple[float, float] | None:
    """The ends of a scale from outside. Collective over `comm`.

    Parameters
    ----------
    comm
        The communicator.
    limits
        (low, high), shape (2,), or None.

    Raises
    ------
    TypeError, ValueError
        If these are no two numbers, low < high, or differ between ranks.
    """
    same(comm, limits=limits)
    if limits is None:
        return None
    if not isinstance(limits, (tuple, list, np.ndarray)) or len(limits) != 2:
        raise ValueError(f"limits: expected (low, high), or None, got {limits!r}")
    low, high = (number("limits", limit) for limit in limits)
    if not low < high:
        raise ValueError(f"limits: expected (low, high) with low < high, got {limits!r}")
    return low, high


def colour_bar(axes: np.ndarray, colours: Colours, label: str) -> None:
    """One colour bar beside these axes."""
    axes[0].figure.colorbar(colours.mappable(), ax=axes.tolist(), label=label, shrink=0.9, aspect=25)


def save(path: str | Path, axes: Axes | Sequence[Axes] | Figure, *, comm: MPI.Comm = MPI.COMM_WORLD) -> None:
    """Write the figure of some axes into a file, by rank 0. Collective over `comm`.

    Parameters
    ----------
    path
        The name of the file. Its suffix says which kind of picture it is: .png, .pdf, .svg and others.
    axes
        Axes, or an array or list of them, whose figure is meant; or the figure.
    comm
        The communicator.

    Raises
    ------
    TypeError, ValueError
        If `path` is no name of a file of a known kind, or differs between ranks; or `axes` are no axes.
    OSError
        If the file cannot be written; on all ranks.

    Examples
    --------
    >>> import tempfile
    >>> from fem_resnet import plot
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot.save(f"{folder}/curve.png", plot.learning_curve([1.0, 0.3, 0.1]))
    """
    same(instance("comm", comm, MPI.Comm), path=path)
    instance("path", path, (str, os.PathLike), "give the name of a file")

    def figure() -> Figure:
        given = axes if isinstance(axes, Figure) else next(iter(np.ravel(np.asarray(axes, dtype=object))), None)
        if isinstance(given, Figure):
            return given
        return instance("axes", given, Axes, "plot's functions return them").get_figure(root=True)

    found = together(comm, figure)
    draw_on_first(comm, lambda: print_figure("path", found, path))
