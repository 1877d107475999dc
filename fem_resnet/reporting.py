"""What reports have in common: tables as text, JSON, pictures, and files that rank 0 writes."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mpi4py import MPI

__all__ = ["Page", "as_json", "picture", "table", "write"]


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
    """A figure to draw on, without a display, saved as a PNG afterwards; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    figure.savefig(str(path), dpi=120)


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
        Where its numbers and its picture go, if anywhere.

    Raises
    ------
    OSError
        If a file cannot be written; on all ranks.
    """
    gc.collect()  # drawing may set the collector off on one rank alone, and freeing meshes is collective
    error = None
    if comm.rank == 0:
        try:
            if as_text:
                sys.stdout.write(f"{page}\n")
                sys.stdout.flush()
            if json is not None:
                Path(json).write_text(page.to_json() + "\n")
            if png is not None:
                page.draw(png)
        except OSError as failure:
            error = failure
    error = comm.bcast(error)
    if error is not None:
        raise error
