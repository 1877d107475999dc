"""The speeds f_t(y) = sigma(T_f) that controls in K_A allow at a state of few cells, and the cheapest of them.

On n cells with weights w the state is v in R^n. Each cell has its own row (a(y), b(y, .)), and all rows are in the same
K_A. So the Hamiltonian of (4.11) is a sum over the cells,

    H(v, r) = sum_i w_i min over rows (a, b(.)) in K_A of  sigma(T_v(a, b)) r_i + L(v_i, a, b).

There are two ways to compute the minimum:

- `ExtremalSpeeds`, where L does not depend on (a, b) and sigma does not decrease. The speed of a cell then lies in the
  interval [sigma(T^-), sigma(T^+)] of (4.9), the same for all y, and the minimum is over a box. If A is not convex, speeds
  inside of the interval may belong to relaxed controls only, which do not change the infimum.
- `SampledSpeeds`, for any L(f, a, b) and any sigma. The rows are all combinations of sampled points of A. For a finite A
  this is exact.

Both minimise against one-sided slopes: a speed s costs `max(s, 0) forward + min(s, 0) backward`. This makes the scheme of
`equation` monotone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from fem_resnet.activation.activation import Activation
from fem_resnet.arguments import real_array
from fem_resnet.control.sets.control_set import ControlSet, Extreme

__all__ = ["Choice", "ExtremalSpeeds", "SampledSpeeds", "Speeds", "SpeedsAtStates"]

_Array = np.ndarray
#: States on n cells, one array for each cell. The arrays broadcast: they are the axes of an open grid, or of one shape.
States = Sequence[np.ndarray] | np.ndarray
#: The same of slopes: one array for each cell.
Slopes = Sequence[np.ndarray] | np.ndarray
#: How many states are searched for extremes at a time. A search holds some hundred numbers for each.
_AT_ONCE = 2**13


@dataclass(frozen=True)
class Choice:
    """The rows that cost least at given states, one row for each cell.

    Attributes
    ----------
    speeds : numpy.ndarray
        sigma(T_v), shape (n, states).
    cost : numpy.ndarray
        int L dy, shape (states,).
    a : numpy.ndarray
        Shape (n, states).
    phi, psi : numpy.ndarray
        Factors of b(y, z) = sum_k phi_k(y) psi_k(z), shape (n, rank, states) each.
    """

    speeds: _Array
    cost: _Array
    a: _Array
    phi: _Array
    psi: _Array


class SpeedsAtStates(ABC):
    """Everything that does not change while the Hamiltonian is minimised at the same states many times.

    Attributes
    ----------
    costs : list
        w_i L on each cell at these states: one array for each cell, or one for each row of it.
    """

    costs: Sequence

    @property
    @abstractmethod
    def ends(self) -> tuple[_Array, _Array]:
        """Arrays that A and sigma determine, so that ranks can compare them."""

    @abstractmethod
    def differs(self, other: SpeedsAtStates) -> str | None:
        """The arguments that give the other other speeds or costs at the same states; None if there are none."""

    @abstractmethod
    def within(self, box: tuple[slice, ...]) -> SpeedsAtStates:
        """The same for the states in a box of an open grid."""

    @abstractmethod
    def least(self, i: int, forward: _Array, backward: _Array) -> _Array:
        """The part of cell i in the Hamiltonian: the minimum over its speeds, L included.

        The slopes of F in v_i, forward and backward, and the result have the shape of the states' grid.
        """


class Speeds(ABC):
    """T_v of all rows in K_A, and how fast a state can move.

    Parameters
    ----------
    weights
        w, shape (n,).
    A
        The set in which (a, b) lies.
    activation
        sigma.
    """

    def __init__(self, weights: _Array, A: ControlSet, activation: Activation):
        self.weights, self.A, self.activation = weights, A, activation

    @abstractmethod
    def at(self, states: States) -> SpeedsAtStates:
        """The speeds at these states, to be minimised over many times."""

    @abstractmethod
    def choose(self, states: States, forward: Slopes, backward: Slopes) -> Choice:
        """The rows that cost least at states of shape (m,), for one-sided slopes of that shape in each cell."""

    def extremes(self, states: States) -> tuple[Extreme, Extreme]:
        """The smallest and the largest T_v at each state, and where they are."""
        shape = np.broadcast_shapes(*(v.shape for v in states))
        parts = [
            np.broadcast_to(sum(w * np.maximum(sign * v, 0.0) for w, v in zip(self.weights, states)), shape).ravel()
            for sign in (1, -1)
        ]

        def everywhere(extreme: Callable[[_Array, _Array], Extreme]) -> Extreme:
            pieces = [extreme(*(p[k : k + _AT_ONCE] for p in parts)) for k in range(0, parts[0].size, _AT_ONCE)]
            arrays = ([getattr(piece, name) for piece in pieces] for name in Extreme.__dataclass_fields__)
            return Extreme(*(np.concatenate(array).reshape(shape) for array in arrays))

        return everywhere(self.A.smallest), everywhere(self.A.largest)

    def range_over(self, low: _Array, high: _Array) -> tuple[float, float]:
        """The least and the largest speed of a cell while the state is in a box with these corners, shape (n,) each.

        T^+ is convex in F+ and F-. For states in the box these lie in the convex hull of their values at certain states: those
        whose components are each at an end of the box or at 0. So T^+ is largest at one of them, and T^- is smallest at one.
        """
        ends = [sorted({l, h, min(max(l, 0.0), h)}) for l, h in zip(low, high)]
        least, largest = self.extremes(np.array(list(product(*ends))).T)
        first, last = float(least.value.min()), float(largest.value.max())
        if self.activation.properties.non_decreasing:
            return float(self.activation(first)), float(self.activation(last))
        T, gap = np.linspace(first, last, 1025, retstep=True)
        values, beside = self.activation(T), self.activation.properties.lipschitz * gap / 2
        return float(values.min() - beside), float(values.max() + beside)


# -- the box of speeds -----------------------------------------------------------------------------------------------


class ExtremalSpeeds(Speeds):
    """All speeds in the interval [sigma(T^-), sigma(T^+)], where L is a function of f alone and sigma does not decrease.

    Parameters
    ----------
    weights, A, activation
        As for `Speeds`.
    running
        L(f), from an array to an array of its shape, or None for L = 0.
    """

    def __init__(
        self, weights: _Array, A: ControlSet, activation: Activation, running: Callable[[_Array], _Array] | None = None
    ):
        super().__init__(weights, A, activation)
        self._running = running

    def at(self, states: States) -> _ExtremalAt:
        return self._at(states, *self.extremes(states))

    def _at(self, states: States, least: Extreme, largest: Extreme) -> _ExtremalAt:
        running = np.zeros_like if self._running is None else self._running
        costs = [w * _density(running, v) for w, v in zip(self.weights, states)]
        return _ExtremalAt(self.activation(least.value), self.activation(largest.value), costs)

    def choose(self, states: States, forward: Slopes, backward: Slopes) -> Choice:
        """The rows that cost least at states of shape (m,), for one-sided slopes in each cell; b has rank 2.

        Where both slopes say that the state should rest, the best speed is 0, which may lie inside of the box. A mixture of
        the two extremal rows has this speed, and it lies in K_A if A is convex. If A is not, the better end is taken, and
        the controls switch from step to step.
        """
        least, largest = self.extremes(states)
        here = self._at(states, least, largest)
        shares = np.array([self._shares(here, least, largest, *slopes) for slopes in zip(forward, backward)])
        T = least.value + shares * (largest.value - least.value)
        b = [np.where(np.array(states) >= 0, e.where_positive, e.where_negative) for e in (largest, least)]
        return Choice(
            self.activation(T), np.sum(here.costs, axis=0),
            shares * largest.a + (1 - shares) * least.a, np.stack([shares, 1 - shares], axis=1), np.stack(b, axis=1),
        )  # fmt: skip

    def _shares(self, here: _ExtremalAt, least: Extreme, largest: Extreme, forward: _Array, backward: _Array) -> _Array:
        """The share of T^+ in the best mixture of T^- and T^+ in one cell."""
        up, down = _upwind(here.high, forward, backward), _upwind(here.low, forward, backward)
        share = np.where(up <= down, 1.0, 0.0)
        if not self.A.convex:
            return share
        rest = (np.minimum(up, down) > 0) & (here.low <= 0) & (here.high >= 0)
        return np.where(rest, self._share_of_rest(least.value, largest.value), share)

    def _share_of_rest(self, least: _Array, largest: _Array) -> _Array:
        """The share of T^+ in the mixture with sigma(T) = 0, by bisection to round-off, if sigma(T^-) <= 0 <= sigma(T^+)."""
        low, high = np.zeros_like(least), np.ones_like(least)
        for _ in range(54):
            middle = (low + high) / 2
            below = self.activation(least + middle * (largest - least)) < 0
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return high


@dataclass(frozen=True)
class _ExtremalAt(SpeedsAtStates):
    low: _Array
    high: _Array
    costs: list[_Array]

    @property
    def ends(self) -> tuple[_Array, _Array]:
        return self.low, self.high

    def differs(self, other: SpeedsAtStates) -> str | None:
        if not isinstance(other, _ExtremalAt):
            return "activation or running"
        same = np.array_equal(self.low, other.low) and np.array_equal(self.high, other.high)
        return _difference_of_costs(self.costs, other.costs) if same else "A or activation"

    def within(self, box: tuple[slice, ...]) -> _ExtremalAt:
        costs = [_part(cost, box, i) for i, cost in enumerate(self.costs)]
        return _ExtremalAt(self.low[box], self.high[box], costs)

    def least(self, i: int, forward: _Array, backward: _Array) -> _Array:
        # The rate is linear in the speed on both sides of 0, so it is least at an end, or at 0 if 0 is in the interval.
        rate = np.minimum(_upwind(self.low, forward, backward), _upwind(self.high, forward, backward))
        return np.where((self.low <= 0) & (self.high >= 0), np.minimum(rate, 0.0), rate) + self.costs[i]


def _density(running: Callable[..., _Array], v: _Array, *others) -> _Array:
    """The values of a user's L at the values v of a cell."""
    values = real_array("running", running(v, *others))
    if values.shape not in ((), v.shape):
        raise ValueError(f"running: expected values of the shape of f, {v.shape}, got {values.shape}")
    return np.broadcast_to(values, v.shape)


def _difference_of_costs(these: list[_Array], those: list[_Array]) -> str | None:
    return None if all(map(np.array_equal, these, those)) else "running"


def _part(values: _Array, box: tuple[slice, ...], i: int) -> _Array:
    """The values in a box of an open grid, of an array that depends on its i-th axis only."""
    return values[tuple(part if j == i else slice(None) for j, part in enumerate(box))]


def _upwind(speed: _Array, forward: _Array, backward: _Array) -> _Array:
    return np.where(speed > 0, speed * forward, speed * backward)


# -- sampled rows ----------------------------------------------------------------------------------------------------


class SampledSpeeds(Speeds):
    """The speeds and costs of all rows whose values are sampled points of A.

    Parameters
    ----------
    weights, A, activation
        As for `Speeds`.
    running
        L(f, a, b, w): f is an array, a a number, b the values of the row on the cells, shape (n,), and w the weights of the
        cells. It returns an array of the shape of f, or a number.
    samples
        How many values of a, and of b in each section of A, are sampled. Of a finite set all points are.
    """

    def __init__(
        self,
        weights: _Array,
        A: ControlSet,
        activation: Activation,
        running: Callable[[_Array, float, _Array, _Array], _Array],
        samples: int,
    ):
        super().__init__(weights, A, activation)
        self._running = running
        points = np.unique(np.stack(A.sample(samples), axis=1), axis=0)
        rows = [(a, *b) for a in np.unique(points[:, 0]) for b in product(points[points[:, 0] == a, 1], repeat=len(weights))]
        #: a and b of each row, shapes (rows,) and (rows, n).
        self.a, self.b = np.array(rows)[:, 0], np.array(rows)[:, 1:]

    def at(self, states: States) -> _SampledAt:
        costs = [
            [w * _density(self._running, v, float(a), b, self.weights) for a, b in zip(self.a, self.b)]
            for w, v in zip(self.weights, states)
        ]
        return _SampledAt(self, states, costs)

    def row_speeds(self, row: int, states: States) -> _Array:
        """sigma(T_v) of a row."""
        return self.activation(self.a[row] - sum(w * b * v for w, b, v in zip(self.weights, self.b[row], states)))

    def choose(self, states: States, forward: Slopes, backward: Slopes) -> Choice:
        """The rows that cost least at states of shape (m,), for one-sided slopes in each cell; b has rank n."""
        here = self.at(states)
        speeds = np.array([self.row_speeds(row, states) for row in range(self.a.size)])
        chosen, costs = [], []
        for i, slopes in enumerate(zip(forward, backward)):
            own = np.array(here.costs[i])
            best = np.argmin(_upwind(speeds, *slopes) + own, axis=0)
            chosen.append(best)
            costs.append(np.take_along_axis(own, best[None], axis=0)[0])
        rows = np.array(chosen)
        n, m = rows.shape
        phi = np.broadcast_to(np.eye(n)[:, :, None], (n, n, m))
        b = np.moveaxis(self.b[rows], 2, 0)
        return Choice(np.take_along_axis(speeds, rows, axis=0), np.sum(costs, axis=0), self.a[rows], phi, b)


@dataclass(frozen=True)
class _SampledAt(SpeedsAtStates):
    rows: SampledSpeeds
    states: States
    costs: list[list[_Array]]

    @property
    def ends(self) -> tuple[_Array, _Array]:
        return self.rows.a, self.rows.b

    def differs(self, other: SpeedsAtStates) -> str | None:
        if not isinstance(other, _SampledAt):
            return "activation or running"
        mine, theirs = self.rows, other.rows
        if not (np.array_equal(mine.a, theirs.a) and np.array_equal(mine.b, theirs.b)):
            return "A or samples"
        rows = range(mine.a.size)
        if not all(np.array_equal(mine.row_speeds(row, self.states), theirs.row_speeds(row, self.states)) for row in rows):
            return "activation"
        return _difference_of_costs(*([cost for costs in at.costs for cost in costs] for at in (self, other)))

    def within(self, box: tuple[slice, ...]) -> _SampledAt:
        costs = [[_part(cost, box, i) for cost in costs] for i, costs in enumerate(self.costs)]
        return _SampledAt(self.rows, [_part(v, box, i) for i, v in enumerate(self.states)], costs)

    def least(self, i: int, forward: _Array, backward: _Array) -> _Array:
        best: _Array = np.array(np.inf)
        for row, cost in enumerate(self.costs[i]):
            best = np.minimum(best, _upwind(self.rows.row_speeds(row, self.states), forward, backward) + cost)
        return best
