"""The flow of one sample through a network, as an animation."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import instance, number
from fem_resnet.files import aside
from fem_resnet.network.run import Run
from fem_resnet.plot.canvas import LINES, Colours, colour_bar
from fem_resnet.plot.drawing import draw, is_graph
from fem_resnet.plot.fields import column, new_panels
from fem_resnet.plot.shown import Shown
from fem_resnet.ranks import draw_on_first, same

__all__ = ["flow"]

#: Seconds that the last state stands, and the shortest time of a frame, which programs that show GIFs keep to.
_REST, _SHORTEST = 1.5, 0.02


def flow(path: str | Path, run: Run, sample: int = 0, channel: int = 0, *, seconds: float = 4.0) -> None:
    """Write the flow of one sample through the layers as an animated GIF, a frame for each layer time. Collective.

    All frames have the same colours, and stand for as long as their layer; then the last one stands for a while. More and
    shorter layers, by ``net.replace(layers=..)``, give a smoother flow.

    Parameters
    ----------
    path
        The name of the file, which ends with .gif.
    run
        A run of a network.
    sample, channel
        Which sample, and which channel, from 0.
    seconds
        How long T takes, at most 600.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit or differs between ranks.
    RuntimeError
        As of `Run.states`.
    OSError
        If the file cannot be written; on all ranks.

    Examples
    --------
    >>> import tempfile
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, ResidualNetwork, laplace_basis, plot
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> net = ResidualNetwork(laplace_basis(Y, 3), layers=2, final_time=1.0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot.flow(f"{folder}/flow.gif", net.run(Y.batch(Y.coordinates[:, 0])))
    """
    instance("run", run, Run, "net.run(inputs) gives one")
    Y = run.net.Y
    same(Y.comm, path=path, seconds=seconds)
    if not isinstance(path, (str, os.PathLike)) or Path(path).suffix.lower() != ".gif":
        raise ValueError(f"path: expected the name of a file that ends with .gif, got {path!r}")
    seconds = number("seconds", seconds, above=0, most=600)
    with stop_annotating():
        columns = [column(Y, f, "run", sample, channel) for f in run.states()]
    shown = Shown(Y.one)
    values = shown.values(np.column_stack(columns))
    panel = new_panels(shown, 1)

    def write() -> None:
        (ax,), colours = panel, Colours.of(values)
        if not is_graph(shown):
            colour_bar(panel, colours, "state f")
        frames = []
        for t, state in zip(run.net.times, values):
            ax.clear()
            draw(ax, shown, state, colours)
            ax.set(title=f"t = {t:.3g}", **({"ylabel": "state f"} if is_graph(shown) else {}))
            frames.append(_pixels(ax.figure))
        steps = np.diff(run.net.times) / (run.net.times[-1] or 1.0) * seconds
        _write(path, frames, [*np.maximum(steps, _SHORTEST), _REST], colours.cmap)

    draw_on_first(Y.comm, write)


def _pixels(figure: Figure) -> Image.Image:
    """The figure as a picture. Its first layout stays, so that nothing moves from frame to frame."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(90)
    canvas.draw()
    if figure.get_layout_engine() is not None:
        figure.set_layout_engine("none")
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _write(path: str | Path, frames: list[Image.Image], seconds: list[float], cmap: str) -> None:
    """An animation whose frames have one palette: the colour map, greys, and the colour of lines on white."""
    white = np.linspace(0, 1, 24)[:, None]
    line = white + (1 - white) * np.array(to_rgb(LINES[0]))
    colours = [matplotlib.colormaps[cmap](np.linspace(0, 1, 192))[:, :3], np.linspace(0, 1, 40)[:, None] * np.ones(3), line]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.round(255 * np.vstack(colours)).astype(int).ravel().tolist())
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames)
    durations = [round(1000 * duration) for duration in seconds]
    with aside(path) as part:
        first.save(part, "GIF", save_all=True, append_images=others, duration=durations, loop=0, optimize=False)
