"""Reports: tables as text, JSON, pictures, and files that rank 0 writes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mpi4py import MPI

from fem_resnet.arguments import instance
from fem_resnet.files import aside
from fem_resnet.ranks import draw_on_first, on_first, same

__all__ = ["Page", "as_html", "as_json", "check_files", "picture", "print_figure", "table", "write"]


class Page(Protocol):
    """A report. Its text is a table; all its numbers can be had as JSON, and the main ones as a picture."""

    def __str__(self) -> str: ...

    def _repr_html_(self) -> str:
        """The text as HTML, which notebooks show."""

    def to_json(self) -> str:
        """All numbers, as JSON."""

    def draw(self, path: str | Path) -> None:
        """Draw the picture, a PNG. Call it on one rank."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    """The lines of a table, the header first.

    Parameters
    ----------
    header
        The cells of the first line, one a column.
    rows
        The cells of the other lines.
    right
        Whether cells are aligned to the right.

    Examples
    --------
    >>> table(("layer", "grows"), [("0", "1.5"), ("10", "2")])
    ['layer  grows', '0      1.5', '10     2']
    """
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def pad(cell: str, width: int) -> str:
        return cell.rjust(width) if right else cell.ljust(width)

    return ["  ".join(map(pad, row, widths)).rstrip() for row in [header, *rows]]


def as_html(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """A report as HTML, for notebooks: its title, a table as for `table`, and notes under it, a line each.

    Examples
    --------
    >>> as_html("Layers", ("layer", "grows"), [("0", "<1")], ["even"])
    '<h4>Layers</h4><table><tr><th>layer</th><th>grows</th></tr><tr><td>0</td><td>&lt;1</td></tr></table><p>even</p>'
    """

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [row(header, "th"), *(row(cells, "td") for cells in rows)]
    return f"<h4>{escape(title)}</h4><table>{''.join(lines)}</table><p>{'<br>'.join(map(escape, notes))}</p>"


def as_json(values: dict) -> str:
    """Nested dicts, lists and numbers as JSON. NaN and infinity become null, since JSON does not know them."""
    return json.dumps(_finite(values), indent=1)


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


@contextmanager
def picture(path: str | Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw on, without a display, which is saved at the end.

    The suffix of the file says which kind of picture it is; without a suffix it is a PNG. An old file is replaced by a
    complete new one, or stays.

    Parameters
    ----------
    path
        The name of the file.
    width, height
        The size of the figure in inches.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    print_figure("path", figure, path)


def print_figure(name: str, figure: Figure, path: str | Path) -> None:
    """Write a figure into a file, as `picture` does.

    Parameters
    ----------
    name
        The name of the argument that `path` is, in messages.
    figure
        The figure.
    path
        The name of the file.

    Raises
    ------
    ValueError
        If its suffix belongs to no kind of picture.
    OSError
        If the file cannot be written.
    """
    kind = _kind_of_picture(name, path)
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{name}: the folder {Path(path).parent} does not exist")
    with aside(path) as part:
        FigureCanvasAgg(figure).print_figure(str(part), dpi=120, format=kind, bbox_inches="tight")  # nothing is cut off


def _kind_of_picture(name: str, path: str | Path) -> str:
    """The suffix of a picture's file, without its dot."""
    kind, known = Path(path).suffix.lower().removeprefix(".") or "png", FigureCanvasAgg.get_supported_filetypes()
    if kind not in known:
        endings = ", ".join(known)
        raise ValueError(f"{name}: expected the name of a file that ends with .png, or another of {endings}, got {path}")
    return kind


def check_files(comm: MPI.Comm, *, json: str | Path | None = None, png: str | Path | None = None) -> None:
    """Check the names of the files of a report, before the work that it reports on. Collective over `comm`.

    Parameters
    ----------
    comm
        The communicator.
    json, png
        The files of its numbers and of its picture; None for no file.

    Raises
    ------
    TypeError, ValueError
        If they are no names of files, differ between ranks, or the suffix of `png` belongs to no kind of picture.
    OSError
        If the folder does not exist, or a name is the name of a folder; on all ranks.
    """
    same(comm, json=json, png=png)
    for name, path in (("json", json), ("png", png)):
        instance(name, path, (str, os.PathLike, type(None)), "give the name of a file")

    def check() -> None:
        for name, path in (("json", json), ("png", png)):
            if path is None:
                continue
            if not Path(path).absolute().parent.is_dir():
                raise FileNotFoundError(f"{name}: the folder {Path(path).absolute().parent} does not exist")
            if Path(path).is_dir():
                raise IsADirectoryError(f"{name}: expected the name of a file, got that of the folder {path}")
        if png is not None:
            _kind_of_picture("png", png)

    on_first(comm, check)


def write(
    page: Page, comm: MPI.Comm, *, as_text: bool = True, json: str | Path | None = None, png: str | Path | None = None
) -> None:
    """Print a report, and write its files, on rank 0 of `comm`. Collective over `comm`.

    Parameters
    ----------
    page
        The report.
    comm
        The communicator.
    as_text
        Whether to print its text to standard output.
    json, png
        The files of its numbers and of its picture; None for no file. An old file is replaced by a complete new one, or
        stays.

    Raises
    ------
    TypeError, ValueError, OSError
        As in `check_files`, or if a file cannot be written; on all ranks.
    """
    check_files(comm, json=json, png=png)

    def write() -> None:
        if as_text:
            sys.stdout.write(f"{page}\n")
            sys.stdout.flush()
        if json is not None:
            with aside(json) as part:
                part.write_text(page.to_json() + "\n")
        if png is not None:
            page.draw(png)

    draw_on_first(comm, write)
