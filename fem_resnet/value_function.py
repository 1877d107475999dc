"""The value function F(v, t) of section 4.3 on label domains of few cells: the Hamilton-Jacobi-Bellman equation in full.

    F_t + H(v, D_v F) = 0,    H(v, r) = min over (a, b) of  int sigma(a - B_b v) r dy + int L(v, a, b) dy              (4.11)
    F(v, T) = 1/2 int (v - ftilde)^2 dy                                                                               (4.12)

On n cells with weights w, v is in R^n, and the gradient in L2(Y) is D_v F = (dF/dv_i) / w_i: the r of section 4.1, r(T) =
v - ftilde, and minus the r* of 4.2. The minimum is taken cell by cell (`speeds`).

The scheme is one of monotone differences on a tensor grid of v, backwards in time. A step of length h moves one cell after the
other, there and back in turns; cell i's part of it is the step of a controlled Markov chain,

    F(v, t) <- min over s, L of  F(v, t) + h ( max(s, 0) D+_i F + min(s, 0) D-_i F + w_i L ),

with one-sided differences D+-, and `h max abs(s) <= spacing`. It is monotone, stable and consistent, so that it converges to
the viscosity solution, which is the value function wherever F is not differentiable too; to first order in the spacing where F
is smooth, in general to order 1/2. (Each part interpolates F linearly at v + h s e_i: it is a semi-Lagrangian step as well.)

Work and memory grow as (width / spacing)^n: four cells are the limit. Each rank computes the whole grid.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.integrate import solve_ivp
from scipy.ndimage import map_coordinates

from fem_resnet.activation import Activation, get_activation
from fem_resnet.control_set import ControlSet
from fem_resnet.label_space import LabelSpace
from fem_resnet.log import log
from fem_resnet.speeds import Cells, ExtremalSpeeds, SampledSpeeds, Speeds

__all__ = ["ValueFunction", "solve_value_function"]

_LARGEST = 4
#: Arrays of the grid's size that a step needs beside the kept ones.
_WORKING = 12


@dataclass(frozen=True)
class ValueFunction:
    """F on a grid of v and t. Get one from `solve_value_function`.

    States v are given by their values at the nodes that a rank owns, shape (nodes,) or (nodes, samples), as all over the
    package; the grid has the cells in the order of `cells`.

    Attributes
    ----------
    cells : Cells
        The nodes in an order that no partition changes, and which of them this rank has.
    speeds : ExtremalSpeeds or SampledSpeeds
        What speeds controls allow.
    target : numpy.ndarray
        ftilde on all cells, shape (n,).
    times : numpy.ndarray
        Shape (K + 1,), from 0 to T.
    axes : list of numpy.ndarray
        The grid: n arrays, with 0 among the numbers if it is within.
    values : numpy.ndarray
        F, shape (K + 1, N_1, .., N_n).
    tube : numpy.ndarray
        The box in which states are that start in the given one, at each time: shape (K + 1, 2, n), lower and upper corners.
        Outside of it F is that of states which are held at the grid's edge.
    """

    cells: Cells
    speeds: ExtremalSpeeds | SampledSpeeds
    target: np.ndarray
    times: np.ndarray
    axes: list[np.ndarray]
    values: np.ndarray
    tube: np.ndarray

    @property
    def spacing(self) -> float:
        """Of the grid, in the unit of f."""
        return float(self.axes[0][1] - self.axes[0][0])

    @property
    def step(self) -> float:
        """h, the length of a time step."""
        return float(self.times[1] - self.times[0])

    def __call__(self, v: np.ndarray, t: float) -> np.ndarray:
        """F(v, t), shape (samples,); linear between the grid's points and times. Collective.

        Raises
        ------
        ValueError
            If v is not in the grid, or t not in [0, T].
        """
        return self.at(self.states(v), t)

    def gradient(self, v: np.ndarray, t: float) -> np.ndarray:
        """D_v F(v, t) in L2(Y), the r of section 4.1, shape (nodes, samples): central differences. Collective.

        Where F has a kink it is the mean over twice the spacing. Raises as calling does.
        """
        forward, backward = self.slopes(self.states(v), t)
        return ((forward + backward) / 2 / self.cells.weights[:, None])[self.cells.own]

    def states(self, v: np.ndarray) -> np.ndarray:
        """States at the owned nodes as states on all cells, shape (n, samples), which the grid holds. Collective."""
        states = self.cells.gather_batch(v, "v")
        low, high = (np.array([axis[end] for axis in self.axes])[:, None] for end in (0, -1))
        beyond = np.maximum(low - states, states - high)
        if beyond.max() > 1e-9 * self.spacing:
            i, k = np.unravel_index(np.argmax(beyond), beyond.shape)
            raise ValueError(
                f"v: {states[i, k]:.6g} on cell {i} of sample {k} is outside of the grid, [{low[i, 0]:.6g}, {high[i, 0]:.6g}]; "
                f"solve with a `start` that covers it"
            )
        return states

    def at(self, states: np.ndarray, t: float) -> np.ndarray:
        """F at states on all cells, shape (n, m); at the nearest point of the grid for those outside of it."""
        place = (t - self.times[0]) / self.step
        last = len(self.times) - 1
        if not -1e-9 <= place <= last + 1e-9:
            raise ValueError(f"t: a time in [{self.times[0]:g}, {self.times[-1]:g}] is wanted, {t!r} was given")
        k = min(max(int(place), 0), last - 1)
        share = min(max(place - k, 0.0), 1.0)
        where = (states - np.array([axis[0] for axis in self.axes])[:, None]) / self.spacing
        levels = [(1 - share, k), (share, k + 1)]
        return sum(s * map_coordinates(self.values[l], where, order=1, mode="nearest") for s, l in levels if s > 0)

    def slopes(self, states: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        """One-sided differences dF/dv_i over one spacing, forward and backward, each of shape (n, m)."""
        here, size = self.at(states, t), self.spacing
        beside = [
            np.array([self.at(states + sign * size * unit[:, None], t) for unit in np.eye(len(states))]) for sign in (1, -1)
        ]
        return (beside[0] - here) / size, (here - beside[1]) / size


def solve_value_function(
    Y: LabelSpace,
    A: ControlSet,
    activation: str | Activation,
    target: np.ndarray,
    start: np.ndarray,
    *,
    final_time: float,
    spacing: float,
    running: Callable | None = None,
    samples: int = 7,
    memory: float = 2e9,
) -> ValueFunction:
    """F(v, t) for all v that can be reached from a box, by (4.11), (4.12). Collective; each rank computes all of it.

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
        States at t = 0, shape (nodes, samples): F is wanted for those in the smallest box around them. The grid covers what
        can be reached from there until T, the tube, which is bounded by the largest speeds.
    final_time
        T > 0.
    spacing
        Of the grid, the same in each cell, in the unit of f. The time step follows from it: no state moves further.
    running
        L: a function of one argument, L(f), or of four, L(f, a, b, w), where b are the values b(y, z) for all z and w the
        weights of the cells, so that `b**2 @ w` is int b(y, z)^2 dz; f is an array, a a number. 0 if left out.
    samples
        How many values of a, and of b in each section of A, are tried where the minimum is not explicit: their combinations
        are samples^(n + 1) rows.
    memory
        Bytes that may be used.

    Raises
    ------
    ValueError
        If an argument is not what is said above, or the grid needs more memory: the message says how much. On all ranks alike.

    Examples
    --------
    >>> from fem_resnet import Box, class_space
    >>> Y = class_space(1)
    >>> F = solve_value_function(Y, Box((-1, 1), (0, 0)), "identity", [2.0], [[0.0, 0.5]], final_time=1.0, spacing=0.01)
    >>> F([0.0], 0.0).round(2)  # the speed is at most 1, so that 1 is left of the way to 2
    array([0.5])
    """
    activation = get_activation(activation)
    if Y.size > _LARGEST:
        raise ValueError(f"Y: at most {_LARGEST} nodes are wanted, it has {Y.size}: the grid of v has as many dimensions")
    for name, value in (("final_time", final_time), ("spacing", spacing), ("memory", memory)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name}: a positive number is wanted, {value!r} was given")
    cells = Cells(Y)
    target = cells.gather_batch(target, "target")
    if target.shape[1] != 1:
        raise ValueError(f"target: shape (nodes,) is wanted, {target.shape[1]} samples were given")
    start = cells.gather_batch(start, "start")
    speeds = _speeds(cells, A, activation, running, samples)

    path = _tube(speeds, start.min(axis=1), start.max(axis=1), final_time)
    box = path(np.linspace(0, final_time, 201))
    # A cell more on each side, for differences at the tube's edge; multiples of the spacing, since speeds have a kink at 0.
    first = np.floor(box[:, 0].min(axis=0) / spacing - 1e-9).astype(int) - 1
    last = np.ceil(box[:, 1].max(axis=0) / spacing + 1e-9).astype(int) + 1
    fastest = np.abs(speeds.range_over(first * spacing, last * spacing)).max()
    steps = max(1, int(np.ceil(final_time * fastest / spacing - 1e-9)))
    shape = tuple((last - first + 1).tolist())
    _check_memory(Y, shape, steps, memory)

    axes = [spacing * np.arange(l, h + 1) for l, h in zip(first, last)]
    times = np.linspace(0, final_time, steps + 1)
    states = np.meshgrid(*axes, indexing="ij", sparse=True)
    values = np.empty((steps + 1, *shape))
    values[-1] = sum(w * (v - f) ** 2 for w, v, f in zip(cells.weights, states, target[:, 0])) / 2
    _solve(Y, speeds.at(states), values, final_time / steps, spacing)
    return ValueFunction(cells, speeds, target[:, 0], times, axes, values, path(times))


def _speeds(cells: Cells, A: ControlSet, activation: Activation, running, samples) -> ExtremalSpeeds | SampledSpeeds:
    arguments = 1 if running is None else len(inspect.signature(running).parameters)
    if arguments not in (1, 4):
        raise ValueError(f"running: a function L(f) or L(f, a, b, w) is wanted, one of {arguments} arguments was given")
    if arguments == 1 and activation.properties.non_decreasing:
        return ExtremalSpeeds(cells.weights, A, activation, running)
    if samples < 2:
        raise ValueError(f"samples: at least 2 are wanted, {samples!r} was given")
    if running is None:
        general = lambda f, a, b, w: np.zeros_like(f)  # noqa: E731
    else:
        general = running if arguments == 4 else lambda f, a, b, w: running(f)
    return SampledSpeeds(cells.weights, A, activation, general, samples)


def _tube(speeds: Speeds, low: np.ndarray, high: np.ndarray, final_time: float) -> Callable[[np.ndarray], np.ndarray]:
    """Times to boxes, shape (times, 2, n): each face moves with the extreme speed of states on it, so that none gets out."""
    n = len(low)

    def rate(t, ends):
        speed = np.empty((2, n))
        for side in (0, 1):
            for i in range(n):
                face = ends.reshape(2, n).copy()
                face[1 - side, i] = face[side, i]
                speed[side, i] = speeds.range_over(*face)[side]
        return speed.ravel()

    found = solve_ivp(rate, (0.0, final_time), np.concatenate([low, high]), rtol=1e-8, atol=1e-10, dense_output=True)
    if not found.success:
        raise ValueError(f"activation, A: the reachable states could not be bounded until {final_time:g}: {found.message}")
    return lambda times: found.sol(times).T.reshape(-1, 2, n)


def _check_memory(Y: LabelSpace, shape: tuple[int, ...], steps: int, memory: float) -> None:
    size = 8.0 * np.prod([float(n) for n in shape]) * (steps + 1 + _WORKING)
    grid = " x ".join(map(str, shape))
    if size > memory:
        raise ValueError(
            f"spacing: {grid} states and {steps} steps need {size / 1e6:,.0f} MB, memory allows {memory / 1e6:,.0f}; take a "
            f"larger spacing, a smaller start, or more memory"
        )
    log(Y.comm, logging.INFO, "value function: %s states, %d steps, about %.0f MB on each rank", grid, steps, size / 1e6)


def _solve(Y: LabelSpace, here, values: np.ndarray, h: float, spacing: float) -> None:
    """Fill in `values`, backwards from the last."""
    steps, order = len(values) - 1, list(range(values.ndim - 1))
    for done, k in enumerate(reversed(range(steps)), start=1):
        F = values[k + 1]
        for i in order:
            slope = np.diff(F, axis=i) / spacing
            # At the edge a state that would leave stays.
            ends = [[(0, 0)] * F.ndim for _ in range(2)]
            ends[0][i], ends[1][i] = (0, 1), (1, 0)
            F = F + h * here.least(i, *(np.pad(slope, end) for end in ends))
        values[k] = F
        order.reverse()
        if done * 10 // steps > (done - 1) * 10 // steps:
            log(Y.comm, logging.INFO, "value function: t = %.3g, step %d of %d", k * h, done, steps)
