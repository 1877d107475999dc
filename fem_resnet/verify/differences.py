"""Derivatives by differences: extrapolation to step 0, and the steps and bounds that the checks share.

Differences even in the step e are (J(m + e h) - J(m - e h)) / (2 e) = <J', h> + c e^2 + ... for smooth J. Their limit is
extrapolated by Ridders' table. Where sigma has joints (kinks, or jumps of sigma''), J is smooth only between the points where
a preactivation crosses a joint. There short steps are taken: a crossing inside a short step is rare, and the best of several
steps decides.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from mpi4py import MPI
from numpy.typing import ArrayLike

__all__ = ["BETWEEN_JOINTS", "SHORT", "SMOOTH", "STEPS", "extrapolated"]

#: Steps in parts of the direction, the longest first; no unit.
STEPS = 0.02 * 0.4 ** np.arange(8)
#: Steps where sigma has joints.
SHORT = np.array([1e-5, 1e-6, 1e-7])
#: Bounds of relative differences: of an extrapolated difference, and of a difference over a short step.
SMOOTH, BETWEEN_JOINTS = 1e-6, 1e-4


def extrapolated(
    difference: Callable[[float], ArrayLike], steps: np.ndarray, size: float, comm: MPI.Comm | None = None
) -> tuple[np.ndarray, float]:
    """The limit for step -> 0 of differences that are even in the step, by Ridders' table.

    Parameters
    ----------
    difference
        Maps a step to a number or an array.
    steps
        The steps, shape (number of steps,), the longest first.
    size
        The size of the limit: the extrapolation ends when its error is below 1e-11 of it.
    comm
        A communicator, if the arrays differ between its ranks; then collective.

    Returns
    -------
    limit : ndarray
        The limit, of the shape of the differences.
    error : float
        An estimate of its largest error.
    """
    columns: list[list[np.ndarray]] = []
    best, error = None, np.inf
    for n, step in enumerate(steps):
        row = [np.asarray(difference(step), dtype=float)]
        for order in range(1, n + 1):
            factor = (steps[n - order] / step) ** 2
            row.append((factor * row[-1] - columns[-1][order - 1]) / (factor - 1))
            gaps = [np.abs(row[-1] - other).max(initial=0.0) for other in (row[-2], columns[-1][order - 1])]
            estimate = float(max(gaps)) if comm is None else comm.allreduce(float(max(gaps)), op=MPI.MAX)
            if estimate < error:
                best, error = row[-1], estimate
        columns.append(row)
        if best is None:
            best = row[-1]
        if error < 1e-11 * size:
            break
    return best, error
