"""What reports have in common: tables as text, JSON, pictures, and files that rank 0 writes."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mpi4py import MPI

from fem_resnet.arguments import instance
from fem_resnet.files import aside
from fem_resnet.ranks import on_first, same

__all__ = ["Page", "as_json", "check_files", "picture", "table", "write"]


class Page(Protocol):
    """A report: a table as its text, all numbers as JSON, a picture."""

    def __str__(self) -> str: ...

    def to_json(self) -> str:
        """All numbers."""

    def draw(self, path: str | Path) -> None:
        """Draw the picture, a PNG. Call it on one rank."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    """Lines of a table, header first.

    Parameters
    ----------
    header, rows
        Cells, one a column.
    right
        Whether numbers stand to the right in their columns.

    Examples
    --------
    >>> table(("layer", "grows"), [("0", "1.5"), ("10", "2")])
    ['layer  grows', '0      1.5', '10     2']
    """
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def pad(cell: str, width: int) -> str:
        return cell.rjust(width) if right else cell.ljust(width)

    return ["  ".join(map(pad, row, widths)).rstrip() for row in [header, *rows]]


def as_json(values: dict) -> str:
    """JSON of nested dicts, lists and numbers; NaN and infinity, which JSON has not, are null."""
    return json.dumps(_finite(values), indent=1)


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


@contextmanager
def picture(path: str | Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw on, without a display, saved afterwards; sizes in inches.

    Its kind is that of the file's suffix, a PNG without one. An old file is replaced by a whole new one, or stays.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    yield figure
    kind = _kind_of_picture("path", path)
    with aside(path) as part:
        canvas.print_figure(str(part), dpi=120, format=kind)


def _kind_of_picture(name: str, path: str | Path) -> str:
    """The suffix of a picture's file, without its dot."""
    kind, known = Path(path).suffix.lower().removeprefix(".") or "png", FigureCanvasAgg.get_supported_filetypes()
    if kind not in known:
        endings = ", ".join(known)
        raise ValueError(f"{name}: expected the name of a file that ends with .png, or another of {endings}, got {path}")
    return kind


def check_files(comm: MPI.Comm, *, json: str | Path | None = None, png: str | Path | None = None) -> None:
    """Look at the names of files to which a report is to go, before the work that it is about. Collective.

    Raises
    ------
    TypeError, ValueError
        If they are no names of files, the ranks give different ones, or pictures have no such suffix.
    OSError
        If there is no such folder, or a name is that of a folder; on all ranks.
    """
    same(comm, json=json, png=png)
    for name, path in (("json", json), ("png", png)):
        instance(name, path, (str, os.PathLike, type(None)), "the name of a file")

    def check() -> None:
        for name, path in (("json", json), ("png", png)):
            if path is None:
                continue
            if not Path(path).absolute().parent.is_dir():
                raise FileNotFoundError(f"{name}: the folder {Path(path).absolute().parent} does not exist")
            if Path(path).is_dir():
                raise IsADirectoryError(f"{name}: expected the name of a file, and {path} is a folder")
        if png is not None:
            _kind_of_picture("png", png)

    on_first(comm, check)


def write(
    page: Page, comm: MPI.Comm, *, as_text: bool = True, json: str | Path | None = None, png: str | Path | None = None
) -> None:
    """Print a report, and write its files, on rank 0 of `comm`. Collective.

    Parameters
    ----------
    page
        The report.
    comm
        The communicator.
    as_text
        Whether its text goes to standard output.
    json, png
        Where its numbers and its picture go, if anywhere. An old file is replaced by a whole new one, or stays.

    Raises
    ------
    TypeError, ValueError, OSError
        As `check_files`, or if a file cannot be written; on all ranks.
    """
    check_files(comm, json=json, png=png)
    gc.collect()  # drawing may set the collector off on one rank alone, and freeing meshes is collective

    def write() -> None:
        if as_text:
            sys.stdout.write(f"{page}\n")
            sys.stdout.flush()
        if json is not None:
            with aside(json) as part:
                part.write_text(page.to_json() + "\n")
        if png is not None:
            page.draw(png)

    on_first(comm, write)
