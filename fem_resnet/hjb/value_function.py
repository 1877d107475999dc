"""The value function F(v, t) of section 4.3 on a label domain of few cells, as values on grids of states.

On n cells with weights w, v is in R^n. The gradient in L2(Y) is D_v F = (dF/dv_i) / w_i. It is the r of section 4.1, with
r(T) = v - ftilde, or with a head that of Remark 4.3 in this sign, and minus the r* of section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import map_coordinates

from fem_resnet.arguments import integer, number, real_array
from fem_resnet.hjb.cells import Cells
from fem_resnet.hjb.speeds import Speeds
from fem_resnet.hjb.state_grid import axes_of
from fem_resnet.hjb.terminal_cost import TerminalCost
from fem_resnet.ranks import same

__all__ = ["ValueFunction"]


@dataclass(frozen=True)
class ValueFunction:
    """F on grids of states v, one grid for each time. Get one from `solve_value_function`.

    Methods take states v by their values at this rank's nodes, shape (nodes,) or (nodes, samples). The grids have all
    cells, in the order of `cells`.

    Attributes
    ----------
    cells : Cells
        All nodes, in an order that does not depend on the partition.
    speeds : ExtremalSpeeds or SampledSpeeds
        The speeds that controls allow.
    terminal : TerminalCost
        F(., T), at any state.
    spacing : float
        The distance of grid points, in the unit of f. Grid points are multiples of it.
    times : numpy.ndarray
        Shape (K + 1,), from 0 to T; from a later time on where a monitor stopped the solution.
    boxes : numpy.ndarray
        The first and the last multiple of the spacing in each cell, at each time: integers of shape (K + 1, 2, n).
    values : list of numpy.ndarray
        F on the grid of each time.
    """

    cells: Cells
    speeds: Speeds
    terminal: TerminalCost
    spacing: float
    times: np.ndarray
    boxes: np.ndarray
    values: list[np.ndarray]

    @property
    def target(self) -> np.ndarray | None:
        """ftilde on all cells, shape (n,); with a head C at all nodes of the output; None where F(., T) is a function."""
        return self.terminal.target

    def axes(self, level: int) -> list[np.ndarray]:
        """The grid points at `times[level]` in each cell: n arrays, each of shape (points in this cell,).

        Parameters
        ----------
        level
            From 0 on, or from -1 downwards for the last times.

        Raises
        ------
        ValueError
            If there is no such time.
        """
        level = integer("level", level, least=-len(self.times), most=len(self.times) - 1)
        return axes_of(self.boxes[level], self.spacing)

    def level(self, t: float) -> int:
        """The level k with times[k] <= t < times[k + 1]; for t = T the last but one.

        Raises
        ------
        ValueError
            If t is not in [0, T], or is earlier than the time at which a monitor stopped the solution.
        """
        t = number("t", t)
        if not self.times[0] <= t <= self.times[-1]:
            raise ValueError(f"t: expected a time in [{self.times[0]:g}, {self.times[-1]:g}], got {t!r}")
        return min(int(np.searchsorted(self.times, t, side="right")) - 1, len(self.times) - 2)

    def __call__(self, v: np.ndarray, t: float) -> np.ndarray:
        """F(v, t), shape (samples,); linear between grid points and between times. Collective.

        Parameters
        ----------
        v
            States at this rank's nodes, shape (nodes,) or (nodes, samples).
        t
            In [0, T].

        Raises
        ------
        TypeError, ValueError
            If v is not in the grid of the time t, or t not in [0, T]; on all ranks alike.
        """
        return self.at(self.states(v, t), t)

    def gradient(self, v: np.ndarray, t: float) -> np.ndarray:
        """D_v F(v, t) in L2(Y) (Remark 4.4), which is r of section 4.1: shape (nodes, samples). Collective.

        Computed by central differences. The error is of first order in the spacing where F is smooth, and of order 1/2
        where its second derivatives jump, as where a component of v changes its sign. At a kink the result is the mean of
        both sides.

        Parameters
        ----------
        v
            States at this rank's nodes, shape (nodes,) or (nodes, samples), at least one spacing inside of the grid.
        t
            In [0, T].

        Raises
        ------
        TypeError, ValueError
            If v is not such a state, or t not in [0, T]; on all ranks alike.
        """
        forward, backward = self.slopes(self.states(v, t, spare=1), t)
        return ((forward + backward) / 2 / self.cells.weights[:, None])[self.cells.own]

    def states(self, v: np.ndarray, t: float, spare: int = 0) -> np.ndarray:
        """States on all cells, shape (n, samples), from those at each rank's nodes. Collective.

        Parameters
        ----------
        v
            States at this rank's nodes, shape (nodes,) or (nodes, samples).
        t
            In [0, T].
        spare
            How many spacings away from the edge of the grid of time t they must be.

        Raises
        ------
        TypeError, ValueError
            If a state is outside of the grid or too near to its edge, or t is not in [0, T]; on all ranks alike.
        """
        same(self.cells.Y.comm, t=t, spare=spare)
        spare = integer("spare", spare, least=0)
        states = self.cells.gather_batch(v, "v")
        low, high = self.spacing * (self.boxes[self.level(t)] + [[spare], [-spare]])[:, :, None]
        beyond = np.maximum(low - states, states - high)
        if beyond.max() > 1e-9 * self.spacing:
            i, k = np.unravel_index(np.argmax(beyond), beyond.shape)
            raise ValueError(
                f"v: expected states where F is known, on cell {i} from {low[i, 0]:.6g} to {high[i, 0]:.6g} at t = {t:.6g}, "
                f"got {states[i, k]:.6g} in sample {k}; solve with a StateGrid whose `start` covers it"
            )
        return states

    def at(self, states: np.ndarray, t: float) -> np.ndarray:
        """F(v, t) at states on all cells, shape (m,). A state outside of the grid counts as the nearest grid point.

        Parameters
        ----------
        states
            States on all cells, of shape (n, m).
        t
            In [0, T].
        """
        states = self._on_all_cells(states)
        k = self.level(t)
        share = (t - self.times[k]) / (self.times[k + 1] - self.times[k])

        def on(level):
            where = states / self.spacing - self.boxes[level, 0][:, None]
            return map_coordinates(self.values[level], where, order=1, mode="nearest")

        return sum(part * on(level) for part, level in ((1 - share, k), (share, k + 1)) if part > 0)

    def slopes(self, states: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        """One-sided differences dF/dv_i over one spacing, forward and backward, shape (n, m) each.

        Parameters
        ----------
        states
            States on all cells, shape (n, m).
        t
            In [0, T].
        """
        states = self._on_all_cells(states)
        here, size = self.at(states, t), self.spacing
        beside = [
            np.array([self.at(states + sign * size * unit[:, None], t) for unit in np.eye(len(states))]) for sign in (1, -1)
        ]
        return (beside[0] - here) / size, (here - beside[1]) / size

    def _on_all_cells(self, states: np.ndarray) -> np.ndarray:
        return real_array("states", states, (len(self.cells.weights), "states"))
