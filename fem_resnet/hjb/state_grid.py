"""The grids of states on which a value function is computed.

No values at the edge of a grid are made up. F(., t) is computed on a box of states that grows with t. It starts with the
box of the states at t = 0. In each time step it grows by a cell on each side towards which a state can move. A step of the
scheme needs exactly these cells, and no state leaves the boxes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from fem_resnet.arguments import integer, number, real_array
from fem_resnet.hjb.speeds import Speeds
from fem_resnet.log import log

__all__ = ["StateGrid", "axes_of", "boxes_in_time", "first_box"]

#: How many arrays of the size of the largest grid a step needs, beside the arrays that are kept.
_WORKING = 12
#: If memory does not suffice, steps are counted up to this number for the message.
_COUNTED = 10**4


@dataclass(frozen=True)
class StateGrid:
    """Where and how finely a value function is computed.

    Parameters
    ----------
    start
        The states at t = 0 at this rank's nodes, shape (nodes,) or (nodes, samples). F(v, 0) is computed for all v in the
        smallest box around them, and F(v, t) for all v that can be reached from there.
    spacing
        The distance of grid points, the same in each cell, in the unit of f. The time steps follow from it: no state moves
        further in one step.
    samples
        How many values of a, and of b in each section of the control set, are tried where the minimum of (4.11) is not
        explicit. Their combinations are samples^(n + 1) rows on n cells.
    memory
        How many bytes may be used on each rank.

    Raises
    ------
    TypeError, ValueError
        If `start` has another shape or is not finite, or a number is out of its range; on the rank with the fault only.

    Examples
    --------
    >>> grid = StateGrid([[0.0, 0.5]], spacing=0.01)  # one cell, f from 0 to 0.5
    """

    start: np.ndarray
    spacing: float
    samples: int = 7
    memory: float = 2e9

    def __post_init__(self):
        start = real_array("start", self.start)
        if start.ndim not in (1, 2):
            raise ValueError(f"start: expected shape (nodes,) or (nodes, samples), got {start.shape}")
        checked = {
            "start": start,
            "spacing": number("spacing", self.spacing, above=0),
            "samples": integer("samples", self.samples, least=2),
            "memory": number("memory", self.memory, above=0),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def first_box(start: np.ndarray, spacing: float) -> np.ndarray:
    """The first and the last grid point in each cell, as multiples of the spacing: integers of shape (2, n).

    `start` has the states at t = 0 on all cells, shape (n, samples). The box has a cell more on each side, for differences.
    """
    first = np.floor(start.min(axis=1) / spacing + 1e-9).astype(int) - 1
    last = np.ceil(start.max(axis=1) / spacing - 1e-9).astype(int) + 1
    return np.stack([first, last])


def axes_of(box: np.ndarray, spacing: float) -> list[np.ndarray]:
    """The grid points of a box in each cell: n arrays."""
    return [spacing * np.arange(first, last + 1) for first, last in box.T]


def boxes_in_time(
    comm: MPI.Comm, speeds: Speeds, box: np.ndarray, grid: StateGrid, final_time: float
) -> tuple[np.ndarray, np.ndarray]:
    """The boxes of states at all times from 0 to T, and the times: shapes (K + 1, 2, n) and (K + 1,).

    The length of a step is the time in which the fastest state moves by one spacing.

    Raises
    ------
    ValueError
        If the grids need more memory than is allowed.
    """

    def points(box):
        return float(np.prod(box[1] - box[0] + 1.0))

    spacing = grid.spacing
    boxes, times, kept, size = [box], [0.0], points(box), 0.0
    while times[-1] < final_time:
        larger = boxes[-1] + [[-1], [1]]
        least, largest = speeds.range_over(*spacing * larger)
        fastest = max(-least, largest)
        boxes.append(boxes[-1] + [[-1 if least < 0 else 0], [1 if largest > 0 else 0]])
        times.append(times[-1] + spacing / fastest if fastest * final_time > spacing else times[-1] + final_time)
        kept += points(boxes[-1])
        size = 8 * (kept + _WORKING * points(boxes[-1]))
        if size > grid.memory and (len(times) > _COUNTED or times[-1] >= final_time):
            raise ValueError(
                f"spacing: expected grids within memory, {grid.memory / 1e6:,.0f} MB, got {_shape(boxes[-1])} states after "
                f"{len(times) - 1} steps to t = {min(times[-1], final_time):.3g}, which need {size / 1e6:,.0f} MB; "
                f"take a larger spacing, a smaller start, or more memory"
            )
    log(
        comm, logging.INFO, "value function: up to %s states, %d steps, about %.0f MB on each rank",
        _shape(boxes[-1]), len(times) - 1, size / 1e6,
    )  # fmt: skip
    return np.array(boxes), np.array(times) / times[-1] * final_time


def _shape(box: np.ndarray) -> str:
    return " x ".join(str(n) for n in box[1] - box[0] + 1)
