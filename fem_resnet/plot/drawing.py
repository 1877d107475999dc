"""One function on one panel: bars, a line, a coloured curve, a picture of the plane, or one of a surface in space.

A surface, and the boundary of a body, is seen from two opposite sides by PyVista, in a picture that is shown on plane axes;
axes of three coordinates get it by `mplot3d`, from one side.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.tri import Triangulation
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Line3DCollection, Poly3DCollection

from fem_resnet.plot.canvas import LINES, Colours, has_pyvista
from fem_resnet.plot.shown import Shown

__all__ = ["WITHOUT_PYVISTA", "draw", "is_graph", "needs_space"]

WITHOUT_PYVISTA = (
    "a picture of a surface in space on plane axes, which PyVista makes: install it (pip install 'fem_resnet[vtk]'), or give "
    "axes of three coordinates, Figure().subplots(subplot_kw={'projection': '3d'})"
)

#: The pixels of one view of a surface.
_PIXELS = 480


def is_graph(shown: Shown) -> bool:
    """Whether values stand over points of a line, in which case there are no colours."""
    return shown.space == 1 or (shown.dimension == 0 and shown.space > 2)


def needs_space(shown: Shown) -> bool:
    """Whether the pieces lie in space."""
    return shown.space == 3 and shown.dimension > 0


def draw(
    ax: Axes, shown: Shown, values: np.ndarray, colours: Colours, mark: Sequence[float] | np.ndarray | None = None
) -> None:
    """Draw a function on rank 0.

    Parameters
    ----------
    ax
        The panel.
    shown
        The pieces of the label domain.
    values
        Values at their corners, shape (pieces, corners).
    colours
        The colours of numbers; for a graph, its ends are those of the axis of values.
    mark
        A point that is marked, shape (coordinates,); None for none.

    Raises
    ------
    ValueError
        If a surface in space is to be drawn on plane axes, and PyVista is not installed.
    """
    corners = shown.corners
    assert corners is not None, "rank 0 has the pieces"
    if is_graph(shown):
        _draw_graph(ax, shown, values, colours, mark)
    elif shown.space == 3:
        _draw_in_space(ax, corners, values, colours, mark)
    else:
        if shown.dimension == 0:
            x, y = corners[:, 0].T
            ax.scatter(x, y, c=values[:, 0], norm=colours.norm, cmap=colours.cmap, edgecolors="0.4")
        elif shown.dimension == 1:
            ax.add_collection(
                LineCollection(list(corners), array=values.mean(axis=1), norm=colours.norm, cmap=colours.cmap, lw=5)
            )
            ax.autoscale_view()
        else:
            pieces = Triangulation(
                corners[..., 0].ravel(), corners[..., 1].ravel(), np.arange(corners.shape[0] * 3).reshape(-1, 3)
            )
            ax.tripcolor(pieces, values.ravel(), shading="gouraud", norm=colours.norm, cmap=colours.cmap, rasterized=True)
        if mark is not None:
            ax.plot(*mark, "k*", markersize=11, markeredgecolor="w")
        ax.set(xlabel="$y_1$", ylabel="$y_2$", aspect="equal")


def _draw_graph(
    ax: Axes, shown: Shown, values: np.ndarray, colours: Colours, mark: Sequence[float] | np.ndarray | None
) -> None:
    low, high = colours.low, colours.high
    room = 0.05 * (high - low)
    if shown.dimension == 0:
        ax.bar(np.arange(len(values)), values[:, 0], color=LINES[0])
        ax.axhline(0.0, color="0.4", linewidth=0.8)
        ax.set(xlabel="point", ylim=(min(low - room, 0.0), max(high + room, 0.0)))
        return
    # A gap after each piece, which does not show where the function is continuous.
    x, f = (np.pad(part, ((0, 0), (0, 1)), constant_values=np.nan).ravel() for part in (shown.corners[:, :, 0], values))
    ax.plot(x, f, color=LINES[0])
    if mark is not None:
        ax.axvline(mark[0], color="0.4", linestyle=":")
    ax.set(xlabel="y", ylim=(low - room, high + room))


def _draw_in_space(
    ax: Axes, corners: np.ndarray, values: np.ndarray, colours: Colours, mark: Sequence[float] | np.ndarray | None
) -> None:
    if isinstance(ax, Axes3D):
        kind = Line3DCollection if corners.shape[1] == 2 else Poly3DCollection
        drawn = kind(corners, array=values.mean(axis=1), norm=colours.norm, cmap=colours.cmap)
        drawn.set_antialiased(False)  # else seams between pieces are seen
        ax.add_collection3d(drawn)
        if mark is not None:
            ax.scatter(*np.reshape(mark, (3, 1)), color="k", marker="*", s=90, depthshade=False)
        ends = corners.reshape(-1, 3)
        low, high = ends.min(axis=0), ends.max(axis=0)
        ax.set(xlabel="$y_1$", ylabel="$y_2$", zlabel="$y_3$", xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
        ax.set_zlim(low[2], high[2])
        ax.set_aspect("equal")
        ax.locator_params(nbins=4)
        return
    ax.imshow(_views(corners, values, colours, mark))
    ax.set(xticks=[], yticks=[], xlabel="from the front, and from behind")
    for side in ax.spines.values():
        side.set_visible(False)


def _views(corners: np.ndarray, values: np.ndarray, colours: Colours, mark: Sequence[float] | np.ndarray | None) -> np.ndarray:
    """A surface from two opposite sides, as a picture, shape (pixels, 2 pixels, 3)."""
    if not has_pyvista():
        raise ValueError(f"ax: expected {WITHOUT_PYVISTA}")
    pyvista = import_module("pyvista")
    pieces, number = corners.shape[:2]
    cells = np.column_stack([np.full(pieces, number), np.arange(pieces * number).reshape(pieces, number)]).ravel()
    surface = pyvista.PolyData(corners.reshape(-1, 3), **{"lines" if number == 2 else "faces": cells})
    surface.point_data["values"] = values.ravel()
    places = corners.reshape(-1, 3)
    middle = (places.min(axis=0) + places.max(axis=0)) / 2
    radius = np.linalg.norm(places - middle, axis=1).max()
    with pyvista.vtk_verbosity("off"):  # it looks for a display, and says on standard error that there is none
        return np.hstack([_view(pyvista, surface, colours, mark, (middle, radius), azimuth) for azimuth in (0, 180)])


def _view(
    pyvista, surface, colours: Colours, mark: Sequence[float] | np.ndarray | None, ball: tuple, azimuth: float
) -> np.ndarray:
    """A surface inside of a ball, from one side."""
    plotter = pyvista.Plotter(off_screen=True, window_size=(_PIXELS, _PIXELS))
    plotter.set_background("white")
    plotter.enable_parallel_projection()
    plotter.add_mesh(
        surface, scalars="values", cmap=colours.cmap, clim=(colours.norm.vmin, colours.norm.vmax), show_scalar_bar=False,
        ambient=0.75, diffuse=0.3, line_width=6,
    )  # fmt: skip
    if mark is not None:
        plotter.add_points(np.reshape(mark, (1, 3)), color="black", point_size=16, render_points_as_spheres=True)
    plotter.view_isometric()
    plotter.camera.azimuth += azimuth
    plotter.camera.elevation -= 12
    plotter.camera.focal_point = ball[0]
    plotter.camera.parallel_scale = 1.04 * ball[1]
    picture = plotter.screenshot(return_img=True)
    plotter.close()
    return picture
