"""The value function F(v, t) of section 4.3 on label domains of few cells: the Hamilton-Jacobi-Bellman equation in full.

    F_t + H(v, D_v F) = 0,    H(v, r) = min over (a, b) of  int sigma(a - B_b v) r dy + int L(v, a, b) dy              (4.11)
    F(v, T) = 1/2 int (v - ftilde)^2 dy                                                                               (4.12)

where F is smooth (Theorem 4.2).

On n cells with weights w, v is in R^n, and the gradient in L2(Y) is D_v F = (dF/dv_i) / w_i: the r of section 4.1, r(T) =
v - ftilde, and minus the r* of 4.2. The minimum is taken cell by cell (`speeds`).

The scheme is one of monotone differences on a tensor grid of v, backwards in time. A step of length h moves one cell after the
other, there and back in turns; cell i's part of it is the step of a controlled Markov chain,

    F(v, t) <- min over s, L of  F(v, t) + h ( max(s, 0) D+_i F + min(s, 0) D-_i F + w_i L ),

with one-sided differences D+-, and `h max abs(s) <= spacing`. It is monotone, stable and consistent, so that it converges to
the viscosity solution, which is the value function wherever F is not differentiable too; to first order in the spacing where F
is smooth, in general to order 1/2. (Each part interpolates F linearly at v + h s e_i: it is a semi-Lagrangian step as well.)

No values at the edge of a grid are made up: F(., t) is had on a box that grows with t, from the given one at t = 0, by a cell on
each side in each step where a state can go, which is what a step needs, and no less than states can move.

Work and memory grow as (width / spacing)^n: four cells are the limit. Each rank computes the whole grid.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI
from scipy.ndimage import map_coordinates

from fem_resnet.activation.activation import Activation, get_activation
from fem_resnet.arguments import function, instance, integer, number, real_array
from fem_resnet.control.control_set import ControlSet
from fem_resnet.hjb.speeds import Cells, ExtremalSpeeds, SampledSpeeds, Speeds
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.log import log
from fem_resnet.ranks import same, together

__all__ = ["ValueFunction", "solve_value_function"]

_LARGEST = 4
#: Arrays of the largest grid's size that a step needs beside the kept ones.
_WORKING = 12
#: So many steps are counted where memory does not suffice, before giving up.
_COUNTED = 10**4


@dataclass(frozen=True)
class ValueFunction:
    """F on grids of v, one a time. Get one from `solve_value_function`.

    States v are given by their values at the nodes that a rank owns, shape (nodes,) or (nodes, samples), as all over the
    package; the grids have the cells in the order of `cells`.

    Attributes
    ----------
    cells : Cells
        The nodes in an order that no partition changes, and which of them this rank has.
    speeds : ExtremalSpeeds or SampledSpeeds
        What speeds controls allow.
    target : numpy.ndarray
        ftilde on all cells, shape (n,).
    spacing : float
        Of the grids, in the unit of f; their points are multiples of it.
    times : numpy.ndarray
        Shape (K + 1,), from 0 to T; from a later time where a monitor has stopped the solution.
    boxes : numpy.ndarray
        The first and the last multiple in each cell, at each time: integers of shape (K + 1, 2, n).
    values : list of numpy.ndarray
        F on the grid of each time.
    """

    cells: Cells
    speeds: ExtremalSpeeds | SampledSpeeds
    target: np.ndarray
    spacing: float
    times: np.ndarray
    boxes: np.ndarray
    values: list[np.ndarray]

    def axes(self, level: int) -> list[np.ndarray]:
        """The grid at `times[level]`, from the first or, where it is negative, from the last: n arrays."""
        level = integer("level", level, least=-len(self.times), most=len(self.times) - 1)
        return _axes(self.boxes[level], self.spacing)

    def level(self, t: float) -> int:
        """The last one that is not after t, and not the last of all.

        Raises
        ------
        ValueError
            If t is not in [0, T], or a time that was not reached.
        """
        t = number("t", t)
        if not self.times[0] <= t <= self.times[-1]:
            raise ValueError(f"t: expected a time in [{self.times[0]:g}, {self.times[-1]:g}], got {t!r}")
        return min(int(np.searchsorted(self.times, t, side="right")) - 1, len(self.times) - 2)

    def __call__(self, v: np.ndarray, t: float) -> np.ndarray:
        """F(v, t), shape (samples,); linear between the grid's points and times. Collective.

        Raises
        ------
        ValueError
            If v is not in the grid of the time t, or t not in [0, T].
        """
        return self.at(self.states(v, t), t)

    def gradient(self, v: np.ndarray, t: float) -> np.ndarray:
        """D_v F(v, t) in L2(Y) (Remark 4.4), the r of section 4.1, shape (nodes, samples). Collective.

        Central differences: right to first order where F is smooth, to order 1/2 where its second derivatives jump, as
        where a component of v changes its sign; at a kink it is a mean over both sides.

        Raises
        ------
        ValueError
            If v is not in the grid of the time t, with a cell to spare, or t not in [0, T].
        """
        forward, backward = self.slopes(self.states(v, t, spare=1), t)
        return ((forward + backward) / 2 / self.cells.weights[:, None])[self.cells.own]

    def states(self, v: np.ndarray, t: float, spare: int = 0) -> np.ndarray:
        """States at the owned nodes as states on all cells, shape (n, samples), in the grid but for so many cells. Collective.

        Raises
        ------
        TypeError, ValueError
            If one is not, or t is not in [0, T]; on all ranks alike.
        """
        same(self.cells.Y.comm, t=t, spare=spare)
        spare = integer("spare", spare, least=0)
        states = self.cells.gather_batch(v, "v")
        low, high = self.spacing * (self.boxes[self.level(t)] + [[spare], [-spare]])[:, :, None]
        beyond = np.maximum(low - states, states - high)
        if beyond.max() > 1e-9 * self.spacing:
            i, k = np.unravel_index(np.argmax(beyond), beyond.shape)
            raise ValueError(
                f"v: {states[i, k]:.6g} on cell {i} of sample {k} is outside of [{low[i, 0]:.6g}, {high[i, 0]:.6g}], where F is "
                f"known at t = {t:.6g}; solve with a `start` that covers it"
            )
        return states

    def at(self, states: np.ndarray, t: float) -> np.ndarray:
        """F at states on all cells, shape (n, m); at the nearest point of the grid for those outside of it."""
        states = self._on_all_cells(states)
        k = self.level(t)
        share = (t - self.times[k]) / (self.times[k + 1] - self.times[k])

        def on(level):
            where = states / self.spacing - self.boxes[level, 0][:, None]
            return map_coordinates(self.values[level], where, order=1, mode="nearest")

        return sum(part * on(level) for part, level in ((1 - share, k), (share, k + 1)) if part > 0)

    def slopes(self, states: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        """One-sided differences dF/dv_i over one spacing, forward and backward, each of shape (n, m)."""
        states = self._on_all_cells(states)
        here, size = self.at(states, t), self.spacing
        beside = [
            np.array([self.at(states + sign * size * unit[:, None], t) for unit in np.eye(len(states))]) for sign in (1, -1)
        ]
        return (beside[0] - here) / size, (here - beside[1]) / size

    def _on_all_cells(self, states: np.ndarray) -> np.ndarray:
        return real_array("states", states, (len(self.cells.weights), "states"))


def _axes(box: np.ndarray, spacing: float) -> list[np.ndarray]:
    return [spacing * np.arange(first, last + 1) for first, last in box.T]


def solve_value_function(
    Y: LabelSpace,
    A: ControlSet,
    activation: str | Activation,
    target: np.ndarray,
    start: np.ndarray,
    *,
    final_time: float,
    spacing: float,
    running: RunningCost | Callable | None = None,
    samples: int = 7,
    memory: float = 2e9,
    monitor: Callable[[float], bool | None] | None = None,
    resume: ValueFunction | None = None,
) -> ValueFunction:
    """F(v, t) for all v that can be reached from a box, by (4.11), (4.12). Collective; each rank computes all of it.

    The solution is the value function of Theorem 4.2, in the viscosity sense where that is not smooth.

    Parameters
    ----------
    Y
        At most 4 nodes on all ranks.
    A
        Where (a(y), b(y, z)) lies for all y and z; any set.
    activation
        sigma, any; one that does not decrease, with an L of f alone, makes the minimum explicit.
    target
        ftilde at the owned nodes, shape (nodes,).
    start
        States at t = 0, shape (nodes, samples): F is wanted for those in the smallest box around them. The grids cover what
        can be reached from there.
    final_time
        T > 0.
    spacing
        Of the grid, the same in each cell, in the unit of f. The time steps follow from it: no state moves further in one.
    running
        L: a `RunningCost`; or its density at y, a function of one argument, L(f), or of four, L(f, a, b, w), where b are the
        values b(y, z) for all z and w the weights of the cells, so that `b**2 @ w` is int b(y, z)^2 dz; f is an array, a a number. 0 if left out.
    samples
        How many values of a, and of b in each section of A, are tried where the minimum is not explicit: their combinations
        are samples^(n + 1) rows.
    memory
        Bytes that may be used.
    monitor
        Called with t after each step, backwards from T; True on any rank stops: F is then known from that t on.
    resume
        What such a solution with the same arguments returned, to go on from. All that F depends on is compared.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what is said above, or the grids need more memory: the message says how much. On all ranks alike.
    Exception
        What `running` or the monitor raises on one rank, on all of them.

    Examples
    --------
    >>> from fem_resnet import Box, class_space
    >>> Y = class_space(1)
    >>> F = solve_value_function(Y, Box((-1, 1), (0, 0)), "identity", [2.0], [[0.0, 0.5]], final_time=1.0, spacing=0.01)
    >>> F([0.0], 0.0).round(2)  # the speed is at most 1, so that 1 is left of the way to 2
    array([0.5])
    """
    check_label_space(Y)
    same(
        Y.comm, A=A, activation=activation, final_time=final_time, spacing=spacing, running=running, samples=samples,
        memory=memory, monitor=callable(monitor), resume=type(resume),
    )  # fmt: skip
    instance("A", A, ControlSet)
    activation = get_activation(activation)
    if Y.size > _LARGEST:
        raise ValueError(f"Y: expected at most {_LARGEST} nodes, it has {Y.size}: the grid of v has as many dimensions")
    final_time, spacing = number("final_time", final_time, above=0), number("spacing", spacing, above=0)
    memory, samples = number("memory", memory, above=0), integer("samples", samples, least=2)
    if monitor is not None:
        function("monitor", monitor, "a function of the time")
    instance("resume", resume, (ValueFunction, type(None)))
    cells = Cells(Y)
    target = cells.gather_batch(target, "target")
    if target.shape[1] != 1:
        raise ValueError(f"target: expected shape (nodes,), got {target.shape[1]} samples")
    start = cells.gather_batch(start, "start")
    speeds = together(Y.comm, lambda: _speeds(Y, cells, A, activation, running, samples))

    # A cell more on each side, for differences at the start.
    first = np.floor(start.min(axis=1) / spacing + 1e-9).astype(int) - 1
    last = np.ceil(start.max(axis=1) / spacing - 1e-9).astype(int) + 1
    boxes, times = together(Y.comm, lambda: _levels(Y, speeds, np.stack([first, last]), spacing, final_time, memory))
    states = np.meshgrid(*_axes(boxes[-1], spacing), indexing="ij", sparse=True)
    values = [sum(w * (v - f) ** 2 for w, v, f in zip(cells.weights, states, target[:, 0])) / 2]
    here = together(Y.comm, lambda: speeds.at(states))
    # Each rank computes all of F: with another density on one of them it would have another F.
    same(Y.comm, A=here.ends, running=here.costs)
    if resume is not None:
        wanted = ValueFunction(cells, speeds, target[:, 0], float(spacing), times, boxes, [])
        _refuse_other(resume, wanted, here.differs(resume.speeds.at(states)))
        values = resume.values[::-1]
    steps, orders = len(times) - 1, (list(range(Y.size)), list(range(Y.size))[::-1])
    stopped = False
    while len(values) <= steps and not stopped:
        done = len(values)
        k = steps - done
        values.append(_step(here, values[-1], boxes[[k, k + 1, -1]], times[k + 1] - times[k], spacing, orders[(done - 1) % 2]))
        if monitor is not None:
            said = together(Y.comm, lambda: bool(monitor(float(times[k]))))
            stopped = Y.comm.allreduce(said, op=MPI.LOR)
        if done * 10 // steps > (done - 1) * 10 // steps:
            log(Y.comm, logging.INFO, "value function: t = %.3g, step %d of %d", times[k], done, steps)
    first = steps + 1 - len(values)
    return ValueFunction(cells, speeds, target[:, 0], float(spacing), times[first:], boxes[first:], values[::-1])


def _refuse_other(solution: ValueFunction, wanted: ValueFunction, of_speeds: str | None) -> None:
    """Raise ValueError where a solution is not that of the same problem, from some time on; the message says what differs."""
    levels = len(solution.values)

    def same(name: str, last: int = 0) -> bool:
        return np.array_equal(getattr(solution, name), getattr(wanted, name)[-last:])

    differences = {
        "Y": not np.array_equal(solution.cells.weights, wanted.cells.weights),
        "target": not same("target"),
        "spacing": solution.spacing != wanted.spacing,
        "final_time": solution.times[-1] != wanted.times[-1],
        of_speeds: of_speeds is not None,
        "start": not (same("boxes", levels) and same("times", levels)),
    }
    different = [name for name, differs in differences.items() if differs]
    if different:
        raise ValueError(
            f"resume: expected a solution with the same arguments that a monitor stopped; it was made with another "
            f"{different[0]}; give the arguments that it was made with, or leave resume out"
        )


def _speeds(
    Y: LabelSpace, cells: Cells, A: ControlSet, activation: Activation, running, samples
) -> ExtremalSpeeds | SampledSpeeds:
    if isinstance(running, RunningCost):
        running = _density(running)
    elif running is not None:
        function("running", running, "a RunningCost, or a function L(f) or L(f, a, b, w)")
    arguments = 1 if running is None else len(inspect.signature(running).parameters)
    if arguments not in (1, 4):
        raise ValueError(f"running: expected a function L(f) or L(f, a, b, w), got one of {arguments} arguments")
    if arguments == 1 and activation.properties.non_decreasing:
        if caveat := activation.properties.caveat("non_decreasing"):
            log(
                Y.comm,
                logging.WARNING,
                "the speeds of each cell are taken for the interval between the extremal ones: %s",
                caveat,
            )
        return ExtremalSpeeds(cells.weights, A, activation, running)
    of_state = np.zeros_like if running is None else running
    general = running if arguments == 4 else lambda f, a, b, w: of_state(f)
    return SampledSpeeds(cells.weights, A, activation, general, samples)


def _density(cost: RunningCost) -> Callable:
    """What L is the integral of over y, as a function of f, or of f, a, b(y, .) and the weights."""
    l = cost.density.value
    if cost.of_state_alone:
        return lambda f: l(f, np.zeros(1))
    return lambda f, a, b, w: l(f, a) + cost.kernel / 2 * (b**2 @ w)


def _levels(
    Y: LabelSpace, speeds: Speeds, box: np.ndarray, spacing: float, final_time: float, memory: float
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and times, from t = 0 on: each box has what a step from it needs, whose length is that of the fastest state."""

    def points(box):
        return float(np.prod(box[1] - box[0] + 1.0))

    boxes, times, kept = [box], [0.0], points(box)
    while times[-1] < final_time:
        larger = boxes[-1] + [[-1], [1]]
        least, largest = speeds.range_over(*spacing * larger)
        fastest = max(-least, largest)
        boxes.append(boxes[-1] + [[-1 if least < 0 else 0], [1 if largest > 0 else 0]])
        times.append(times[-1] + spacing / fastest if fastest * final_time > spacing else times[-1] + final_time)
        kept += points(boxes[-1])
        size = 8 * (kept + _WORKING * points(boxes[-1]))
        if size > memory and (len(times) > _COUNTED or times[-1] >= final_time):
            raise ValueError(
                f"spacing: {_shape(boxes[-1])} states after {len(times) - 1} steps to t = {min(times[-1], final_time):.3g} need "
                f"{size / 1e6:,.0f} MB, memory allows {memory / 1e6:,.0f}; take a larger spacing, a smaller start, or more memory"
            )
    log(
        Y.comm, logging.INFO, "value function: up to %s states, %d steps, about %.0f MB on each rank",
        _shape(boxes[-1]), len(times) - 1, size / 1e6,
    )  # fmt: skip
    return np.array(boxes), np.array(times) / times[-1] * final_time


def _shape(box: np.ndarray) -> str:
    return " x ".join(str(n) for n in box[1] - box[0] + 1)


def _step(here, F: np.ndarray, boxes: np.ndarray, h: float, spacing: float, order: list[int]) -> np.ndarray:
    """F on the first box from F on the second, in which it lies; `here` has the speeds on the third."""
    to, box, (origin, _) = boxes[0], boxes[1].copy(), boxes[2]
    for i in order:
        cut = to[0, i] - box[0, i], to[1, i] - box[0, i] + 1
        # Differences across the edge, where it is not cut, are those of speeds that do not occur.
        slope = np.diff(F, axis=i, prepend=np.take(F, [0], axis=i), append=np.take(F, [-1], axis=i)) / spacing
        at, ahead = (tuple(slice(*part) if j == i else slice(None) for j in range(F.ndim)) for part in (cut, np.add(cut, 1)))
        box[:, i] = to[:, i]
        inner = here.within(tuple(slice(a, b + 1) for a, b in (box - origin).T))
        F = F[at] + h * inner.least(i, slope[ahead], slope[at])
    return F
