"""What speeds f_t(y) = sigma(T_f) controls in K_A allow at a state of few cells, and which of them cost least.

On n cells with weights w the state is v in R^n, and the Hamiltonian of (4.11) is a sum over the cells,

    H(v, r) = sum_i w_i min over rows (a, b(.)) in K_A of  sigma(T_v(a, b)) r_i + L(v_i, a, b),

since each cell has a row (a(y), b(y, .)) of its own, and all rows are in the same K_A. Two ways to have the minimum:

- `ExtremalSpeeds`: L does not depend on (a, b) and sigma does not decrease. A cell's speed then lies in the interval
  [sigma(T^-), sigma(T^+)] of (4.9), the same for all y, and the minimum is over a box. Where A is not convex the speeds between
  the ends are those of relaxed controls, which do not change the infimum.
- `SampledSpeeds`: any L(f, a, b), any sigma: the rows are all combinations of points of A, exact for a finite A.

Both minimise against one-sided slopes: a speed s costs `max(s, 0) forward + min(s, 0) backward`, which is what makes the scheme
of `value_function` monotone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from fem_resnet.activation.activation import Activation
from fem_resnet.arguments import real_array
from fem_resnet.control.control_set import ControlSet, Extreme
from fem_resnet.label_domain.basis import node_numbers
from fem_resnet.label_domain.label_space import LabelSpace

__all__ = ["Cells", "Choice", "ExtremalSpeeds", "SampledSpeeds", "Speeds"]

_Array = np.ndarray
#: States on n cells: n arrays that broadcast, one a cell; the axes of an open grid, or as many arrays of one shape.
States = Sequence[np.ndarray]
#: So many states at a time where their extremes are looked for, since a search holds some hundred numbers a state.
_BLOCK = 2**13


class Cells:
    """The nodes of a small label domain, in an order that no partition changes; their values are held by every rank.

    The order is that of `cell_indicators`: by coordinates, the last one slowest; points have their own.

    Attributes
    ----------
    Y : LabelSpace
    weights : numpy.ndarray
        w of all nodes, shape (n,).
    own : numpy.ndarray
        Where this rank's nodes are among them, shape (nodes,).
    """

    def __init__(self, Y: LabelSpace):
        self.Y = Y
        self.own = node_numbers(Y)
        self._all = np.concatenate(Y.comm.allgather(self.own))
        self.weights = self.gather(Y.weights)

    def gather(self, values: _Array) -> _Array:
        """Values at this rank's nodes, shape (nodes, ..), as those at all nodes. Collective."""
        parts = np.concatenate(self.Y.comm.allgather(np.asarray(values, dtype=float)))
        ordered = np.empty_like(parts)
        ordered[self._all] = parts
        return ordered

    def gather_batch(self, values: _Array, name: str) -> _Array:
        """The same for one sample or many, shape (n, samples), checked. Collective.

        Raises
        ------
        ValueError
            If the shape is not (nodes,) or (nodes, samples), or a value is not finite; on all ranks alike.
        """
        return self.gather(self.Y.values(self.Y.batch(values, name)))


@dataclass(frozen=True)
class Choice:
    """Rows that cost least at states, one a cell.

    Attributes
    ----------
    speeds : numpy.ndarray
        sigma(T_v), shape (n, states).
    cost : numpy.ndarray
        int L dy, shape (states,).
    a : numpy.ndarray
        Shape (n, states).
    phi, psi : numpy.ndarray
        Factors of b(y, z) = sum_k phi_k(y) psi_k(z), shape (n, rank, states).
    """

    speeds: _Array
    cost: _Array
    a: _Array
    phi: _Array
    psi: _Array


class Speeds:
    """What both ways share: T_v, and how fast a state can be.

    Parameters
    ----------
    weights
        w, shape (n,).
    A
        Where (a, b) lies pointwise.
    activation
        sigma.
    """

    def __init__(self, weights: _Array, A: ControlSet, activation: Activation):
        self.weights, self.A, self.activation = weights, A, activation

    def extremes(self, states: States) -> tuple[Extreme, Extreme]:
        """Where T_v is smallest and where it is largest, at each state."""
        shape = np.broadcast_shapes(*(v.shape for v in states))
        parts = [
            np.broadcast_to(sum(w * np.maximum(sign * v, 0.0) for w, v in zip(self.weights, states)), shape).ravel()
            for sign in (1, -1)
        ]
        found = []
        for extreme in (self.A.smallest, self.A.largest):
            blocks = [extreme(*(p[k : k + _BLOCK] for p in parts)) for k in range(0, parts[0].size, _BLOCK)]
            arrays = ([getattr(block, name) for block in blocks] for name in Extreme.__dataclass_fields__)
            found.append(Extreme(*(np.concatenate(array).reshape(shape) for array in arrays)))
        return tuple(found)

    def range_over(self, low: _Array, high: _Array) -> tuple[float, float]:
        """The least and the largest speed of a cell while the state is in a box; corners of shape (n,).

        T^+ is convex in F+ and F-, and these lie in the convex hull of their values at states whose components are each at an
        end of the box or at 0: the largest T^+ is at one of these states; likewise the least T^-.
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
    """All speeds of the interval [sigma(T^-), sigma(T^+)], for an L of f alone and a sigma that does not decrease.

    Parameters
    ----------
    running
        L(f), arrays to arrays, or None for L = 0.
    """

    def __init__(
        self, weights: _Array, A: ControlSet, activation: Activation, running: Callable[[_Array], _Array] | None = None
    ):
        super().__init__(weights, A, activation)
        self._running = running

    def at(self, states: States) -> _ExtremalAt:
        """What is needed to minimise at these states many times."""
        return self._at(states, *self.extremes(states))

    def _at(self, states: States, least: Extreme, largest: Extreme) -> _ExtremalAt:
        running = np.zeros_like if self._running is None else self._running
        costs = [w * _density(running, v) for w, v in zip(self.weights, states)]
        return _ExtremalAt(self.activation(least.value), self.activation(largest.value), costs)

    def choose(self, states: States, forward: Sequence[_Array], backward: Sequence[_Array]) -> Choice:
        """The rows that are best at states of shape (m,), for slopes in each cell: b of rank 2.

        A speed strictly inside of the box is 0, where both slopes say stay, and is had by a mixture of the two extremal rows,
        which lies in K_A for convex A. For other A the better end is taken: controls then switch from step to step.
        """
        least, largest = self.extremes(states)
        here = self._at(states, least, largest)
        shares = []
        for p, q in zip(forward, backward):
            up, down = _upwind(here.high, p, q), _upwind(here.low, p, q)
            share = np.where(up <= down, 1.0, 0.0)
            if self.A.convex:
                stay = (np.minimum(up, down) > 0) & (here.low <= 0) & (here.high >= 0)
                share = np.where(stay, self._share_of_rest(least.value, largest.value), share)
            shares.append(share)
        shares = np.array(shares)
        T = least.value + shares * (largest.value - least.value)
        b = [np.where(np.array(states) >= 0, e.where_positive, e.where_negative) for e in (largest, least)]
        return Choice(
            self.activation(T), sum(here.costs),
            shares * largest.a + (1 - shares) * least.a, np.stack([shares, 1 - shares], axis=1), np.stack(b, axis=1),
        )  # fmt: skip

    def _share_of_rest(self, least: _Array, largest: _Array) -> _Array:
        """The share of T^+ in a mixture with sigma(T) = 0, where sigma(T^-) <= 0 <= sigma(T^+); by bisection to round-off."""
        low, high = np.zeros_like(least), np.ones_like(least)
        for _ in range(54):
            middle = (low + high) / 2
            below = self.activation(least + middle * (largest - least)) < 0
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return high


@dataclass(frozen=True)
class _ExtremalAt:
    low: _Array
    high: _Array
    costs: list

    @property
    def ends(self) -> tuple[_Array, _Array]:
        """What of A and sigma the least depends on: ranks are compared by it."""
        return self.low, self.high

    def differs(self, other: _ExtremalAt | _SampledAt) -> str | None:
        """Which arguments make other speeds or costs at the same states; None if none does."""
        if not isinstance(other, _ExtremalAt):
            return "activation or running"
        same = np.array_equal(self.low, other.low) and np.array_equal(self.high, other.high)
        return _of_costs(self.costs, other.costs) if same else "A or activation"

    def within(self, box: tuple[slice, ...]) -> _ExtremalAt:
        """Of the states of an open grid those in a box of it."""
        costs = [_part(cost, box, i) for i, cost in enumerate(self.costs)]
        return _ExtremalAt(self.low[box], self.high[box], costs)

    def least(self, i: int, forward: _Array, backward: _Array) -> _Array:
        """Cell i's part of the Hamiltonian: the least over its speeds, L included."""
        # Linear in the speed on both sides of 0: least at an end, or at 0 if that is inside.
        rate = np.minimum(_upwind(self.low, forward, backward), _upwind(self.high, forward, backward))
        return np.where((self.low <= 0) & (self.high >= 0), np.minimum(rate, 0.0), rate) + self.costs[i]


def _density(running: Callable[..., _Array], v: _Array, *others) -> _Array:
    """What a user's L returns at the values v of a cell."""
    values = real_array("running", running(v, *others))
    if values.shape not in ((), v.shape):
        raise ValueError(f"running: expected values of the shape of f, {v.shape}, got {values.shape}")
    return np.broadcast_to(values, v.shape)


def _of_costs(these: list[_Array], those: list[_Array]) -> str | None:
    return None if all(map(np.array_equal, these, those)) else "running"


def _part(values: _Array, box: tuple[slice, ...], i: int) -> _Array:
    """The part in a box of what depends on the i-th axis of an open grid."""
    return values[tuple(part if j == i else slice(None) for j, part in enumerate(box))]


def _upwind(speed: _Array, forward: _Array, backward: _Array) -> _Array:
    return np.where(speed > 0, speed * forward, speed * backward)


# -- sampled rows ----------------------------------------------------------------------------------------------------


class SampledSpeeds(Speeds):
    """The speeds of all rows that can be made of sampled points of A, with what each row costs.

    Parameters
    ----------
    running
        L(f, a, b, w): f an array, a a number, b the row's values on the cells, shape (n,), and w their weights; to an array
        of f's shape, or a number.
    samples
        How many values of a, and of b in each section of A, are tried; of a finite set all are.
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
        """What is needed to minimise at these states many times."""
        costs = [
            [w * _density(self._running, v, float(a), b, self.weights) for a, b in zip(self.a, self.b)]
            for w, v in zip(self.weights, states)
        ]
        return _SampledAt(self, states, costs)

    def row_speeds(self, row: int, states: States) -> _Array:
        """sigma(T_v) of a row."""
        return self.activation(self.a[row] - sum(w * b * v for w, b, v in zip(self.weights, self.b[row], states)))

    def choose(self, states: States, forward: Sequence[_Array], backward: Sequence[_Array]) -> Choice:
        """The rows that are best at states of shape (m,), for slopes in each cell: b of rank n."""
        here = self.at(states)
        speeds = np.array([self.row_speeds(row, states) for row in range(self.a.size)])
        rows, cost = [], 0.0
        for i, (p, q) in enumerate(zip(forward, backward)):
            own = np.array(here.costs[i])
            best = np.argmin(_upwind(speeds, p, q) + own, axis=0)
            rows.append(best)
            cost = cost + np.take_along_axis(own, best[None], axis=0)[0]
        rows = np.array(rows)
        n, m = rows.shape
        phi = np.broadcast_to(np.eye(n)[:, :, None], (n, n, m))
        return Choice(np.take_along_axis(speeds, rows, axis=0), cost, self.a[rows], phi, np.moveaxis(self.b[rows], 2, 0))


@dataclass(frozen=True)
class _SampledAt:
    rows: SampledSpeeds
    states: States
    costs: list[list[_Array]]

    @property
    def ends(self) -> tuple[_Array, _Array]:
        """As of `_ExtremalAt`."""
        return self.rows.a, self.rows.b

    def differs(self, other: _ExtremalAt | _SampledAt) -> str | None:
        """As of `_ExtremalAt`."""
        if not isinstance(other, _SampledAt):
            return "activation or running"
        mine, theirs = self.rows, other.rows
        if not (np.array_equal(mine.a, theirs.a) and np.array_equal(mine.b, theirs.b)):
            return "A or samples"
        rows = range(mine.a.size)
        if not all(np.array_equal(mine.row_speeds(row, self.states), theirs.row_speeds(row, self.states)) for row in rows):
            return "activation"
        return _of_costs(*([cost for costs in at.costs for cost in costs] for at in (self, other)))

    def within(self, box: tuple[slice, ...]) -> _SampledAt:
        """Of the states of an open grid those in a box of it."""
        costs = [[_part(cost, box, i) for cost in costs] for i, costs in enumerate(self.costs)]
        return _SampledAt(self.rows, [_part(v, box, i) for i, v in enumerate(self.states)], costs)

    def least(self, i: int, forward: _Array, backward: _Array) -> _Array:
        """Cell i's part of the Hamiltonian: the least over the rows, L included."""
        best = np.inf
        for row, cost in enumerate(self.costs[i]):
            best = np.minimum(best, _upwind(self.rows.row_speeds(row, self.states), forward, backward) + cost)
        return best
