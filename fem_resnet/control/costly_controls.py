r"""Controls that maximise H over a box where they cost something, for one sample.

With Tikhonov's terms or a running cost of the controls, H is the integral over y of

    h = r sigma(u) - c(a) - kappa/2 int b(y, z)^2 dz,        u = a - int b(y, z) f(z) dz,        c(a) = c_1 a + c_2/2 a^2,

up to what depends on f alone. It is not linear in (a, b), and its maximiser is not bang-bang. But h sees b through the number
u, so among all controls of one u the cheapest count. These have a multiplier q in closed form,

    a = clip((q - c_1) / c_2, a-, a+),        b(y, z) = clip(-q f(z) / kappa, b-, b+).

(Where c_2 = 0, a is at the end of the sign of q, and where kappa = 0, b is so too, as in (4.10).) The maximiser has q = r
sigma'(u). So q lies between 0 and r sup sigma'. At each y a search over this one number remains, as h need not be concave
in it. Only for linear sigma it is known: q = r. The integrals over z are piecewise polynomials of q. Its pieces end where
b(z) comes to an end of the box, and are sorted once for all y.

The kernel has rank one where it is nowhere at its ends, b = -q(y) f(z) / kappa. Else its rank may be the number of nodes.
Then a kernel of few functions takes its place, which at each y mixes the nearest two of several b(z). It lies in the box too.
H is less by the third power of the distance of these b, where the mesh is fine beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fem_resnet.arguments import instance, integer
from fem_resnet.control.controls import Controls
from fem_resnet.control.hamiltonian import Hamiltonian, Pair
from fem_resnet.control.sets.box import Box
from fem_resnet.control.sets.control_set import ControlSet
from fem_resnet.ranks import same

__all__ = [
    "Cheapest",
    "CostlyControls",
    "check_costly",
    "controls_with_cost",
    "cost_of_bias",
    "own_maximum",
    "rows_of_multipliers",
    "state_cost",
]  # fmt: skip

#: How many values of q / (r sup sigma') are tried at each y, and how often the bracket of the best is cut.
_TRIED, _CUTS = 65, 40
_GOLDEN = (5**0.5 - 1) / 2
#: How near to the largest value its place is found by values, which are flat there.
_NEAR = 1e-7


@dataclass(frozen=True)
class CostlyControls:
    """Controls that maximise H over a box, with its costs.

    Attributes
    ----------
    controls : Controls
        In the box. H is no less than at the controls that were there before, at every y.
    largest : numpy.ndarray
        The largest density of H over all controls in the box, at the nodes, shape (nodes,). Values of q are tried, and the
        best one is refined.
    """

    controls: Controls
    largest: np.ndarray


def controls_with_cost(H: Hamiltonian, A: Box, pair: Pair, controls: Controls, *, functions: int = 33) -> CostlyControls:
    """Controls in a box that maximise H with its costs, for one sample. Collective over H's communicator.

    Parameters
    ----------
    H
        The Hamiltonian, to "maximise", with a cost of the controls: Tikhonov's, or a running cost l(f, a) = l_0(f) + c_1 a +
        c_2/2 a^2 with c_2 >= 0.
    A
        The box. Its controls are pairs (a(y), b(y, z)).
    pair
        f and r* of one sample, to "maximise".
    controls
        Those in the box that are there before. They are kept at nodes where the new ones have a smaller density.
    functions
        The largest number of functions of z in the new kernel, at least 2, where b is at its ends somewhere. With as many
        as nodes the kernel is exact.

    Returns
    -------
    CostlyControls

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind, has another convention or more than one sample, or differs between ranks.
    """
    instance("H", H, Hamiltonian)
    same(H.Y.comm, A=A, pair=getattr(pair, "convention", pair), functions=functions)
    if H.convention != "maximise":
        raise ValueError(f"H: expected a Hamiltonian to 'maximise', got one to {H.convention!r}")
    check_costly(H, A)
    instance("pair", pair, Pair)
    instance("controls", controls, Controls)
    functions = integer("functions", functions, least=2)
    if pair.f.shape[1] != 1:
        raise ValueError(
            f"pair: expected one sample, got {pair.f.shape[1]}; raise_controls takes many, in a RowBox, RowBall or SpanBox"
        )
    cheapest = Cheapest(H, A, pair.f[:, 0])
    largest, q = own_maximum(H, cheapest, pair.r[:, 0])
    largest = largest - state_cost(H, pair)
    up = pair.r[:, 0] >= 0
    new = Controls(cheapest.bias(q, up), *cheapest.kernel(q, up, functions))
    falls = H.density(pair, new) < H.density(pair, controls)
    if H.Y.sum(float(np.any(falls))):
        new = controls.towards(new, np.where(falls, 0.0, 1.0))
    return CostlyControls(new, np.maximum(largest, H.density(pair, new)))


def cost_of_bias(H: Hamiltonian) -> tuple[float, float]:
    """c_1 and c_2 of the cost of the bias, Tikhonov's term included.

    Raises
    ------
    ValueError
        If the running cost is another function of a, or has c_1 alone.
    """
    given = (0.0, 0.0) if H.running is None else H.running.in_bias
    if given is None:
        raise ValueError(
            "running: expected a density l_0(f) + c_1 a + c_2/2 a^2 with c_2 >= 0 over a set of pairs (a, b), got another; "
            "give A as a RowBox, RowBall or SpanBox, which take any"
        )
    first, second = given[0], given[1] + H.tikhonov[0]
    if first != 0 and second == 0:
        raise ValueError(
            f"running: expected a cost of the bias with a square over a set of pairs (a, b), got {first:g} a alone; add "
            f"tikhonov(..), or give A as a RowBox, RowBall or SpanBox"
        )
    return first, second


def state_cost(H: Hamiltonian, pair: Pair) -> np.ndarray:
    """The part of the cost that does not depend on the controls, l_0, shape (nodes,). Collective."""
    nothing = np.zeros((len(pair.f), 0))
    return H.cost(pair, Controls(np.zeros(len(pair.f)), nothing, nothing))


def check_costly(H: Hamiltonian, A: ControlSet) -> Box:
    """The set, if there is a maximiser of H over it here.

    Raises
    ------
    TypeError, ValueError
        If it is no box, or as of `cost_of_bias`.
    """
    instance("A", A, ControlSet)
    if not isinstance(A, Box):
        raise ValueError(
            f"A: expected a Box where the controls have a cost, got {A!r}; give a Box, or a RowBox, RowBall or SpanBox to "
            f"raise_controls and msa"
        )
    cost_of_bias(H)
    return A


class Cheapest:
    """The cheapest controls of each multiplier q, and what they give, for one state. Its arrays of nodes are this rank's.

    At q = 0 controls are the limits from the side `up`, which is True for q > 0.

    Parameters
    ----------
    H
        The Hamiltonian.
    A
        The box.
    f
        The state at this rank's nodes, shape (nodes,). Collective: all ranks hold all nodes of one sample.

    Raises
    ------
    ValueError
        As of `check_costly`.
    """

    def __init__(self, H: Hamiltonian, A: ControlSet, f: np.ndarray):
        box = check_costly(H, A)
        self._Y, self._f, self._box = H.Y, f, box
        self._c_1, self._c_2 = cost_of_bias(H)
        self._kappa = kappa = H.kernel_weight
        low, high = box.kernel
        state, w = (np.concatenate(H.Y.comm.allgather(part)) for part in (f, H.Y.weights))
        if kappa == 0:
            F = float(w @ np.maximum(state, 0)), float(w @ np.maximum(-state, 0))
            self._ends = low * F[0] - high * F[1], high * F[0] - low * F[1]  # int b f for q > 0, and for q < 0
            return
        rest = float(np.clip(0.0, low, high)) ** 2 * w[state == 0].sum()
        state, w = state[state != 0], w[state != 0]
        # b(q) falls with q where f > 0. It comes from one end at `first`, and is at the other one from `last` on.
        before, after = np.where(state > 0, high, low), np.where(state > 0, low, high)
        first, last = -kappa * before / state, -kappa * after / state
        self._starts = _Sums(first, w * state * before, w * before**2, w * state**2)
        self._stops = _Sums(last, w * state * after, w * after**2, w * state**2)
        self._at_first = float(w @ (state * before)), float(w @ before**2) + rest

    def bias(self, q: np.ndarray, up: np.ndarray) -> np.ndarray:
        """a, of the shape of q."""
        low, high = self._box.bias
        if self._c_2 == 0:
            return np.where(up, high, low)
        return np.clip((q - self._c_1) / self._c_2, low, high)

    def moments(self, q: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The integrals of b f and of b^2 over z, of the shape of q."""
        if self._kappa == 0:
            return np.where(up, *self._ends), np.zeros(q.shape)
        starts, stops = self._starts(q), self._stops(q)
        between, slope = starts[2] - stops[2], -q / self._kappa
        return (
            self._at_first[0] - starts[0] + slope * between + stops[0],
            self._at_first[1] - starts[1] + slope**2 * between + stops[1],
        )

    def argument_and_cost(self, q: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """u and c(a) + kappa/2 int b^2, of the shape of q."""
        a, (bf, bb) = self.bias(q, up), self.moments(q, up)
        return a - bf, self._c_1 * a + self._c_2 / 2 * a**2 + self._kappa / 2 * bb

    def kernel(self, q: np.ndarray, up: np.ndarray, functions: int) -> tuple[np.ndarray, np.ndarray]:
        """phi and psi of b(y, .) with the multipliers q(y), shape (nodes,), of that many functions at most. Collective."""
        (low, high), f, Y = self._box.kernel, self._f, self._Y
        if self._kappa == 0:
            at = [np.where(f >= 0, *ends) for ends in ((low, high), (high, low))]
            return np.column_stack([up, ~up]).astype(float), np.column_stack(at)
        all_q = np.unique(np.concatenate(Y.comm.allgather(q)))
        free = -np.outer(f, all_q[[0, -1]]) / self._kappa
        if not Y.sum(float(np.any((free < low) | (free > high)))) and low <= 0 <= high:
            return -q[:, None] / self._kappa, f[:, None]
        if len(all_q) > functions:
            all_q = self._spread(all_q, functions)
        phi = np.column_stack([np.interp(q, all_q, one) for one in np.eye(len(all_q))])
        return phi, np.clip(-np.outer(f, all_q) / self._kappa, low, high)

    def _spread(self, q: np.ndarray, number: int) -> np.ndarray:
        """Multipliers in the range of the sorted q, between which b moves by equal lengths in L2(Y)."""
        places = np.concatenate([q, self._starts.places, self._stops.places])
        places = np.unique(places[(q[0] <= places) & (places <= q[-1])])
        middles = (places[:-1] + places[1:]) / 2
        speeds = np.sqrt(np.maximum(self._starts(middles)[2] - self._stops(middles)[2], 0.0))  # kappa |db/dq|
        length = np.append(0.0, np.cumsum(speeds * np.diff(places)))
        moving = np.append(True, np.diff(length) > 0)
        return np.unique(np.interp(np.linspace(0.0, length[-1], number), length[moving], places[moving]))


def rows_of_multipliers(H: Hamiltonian, A: ControlSet, f: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u_s and cost of the rows of a box of the largest sum_s c_s u_s - cost, for states f of (nodes, samples). Collective.

    Parameters
    ----------
    H, A
        The Hamiltonian and the box.
    f
        The states.
    c
        The multipliers of each row, shape (rows, samples), the same on every rank.

    Returns
    -------
    u, cost : numpy.ndarray
        Shapes (rows, samples) and (rows,).
    """
    box, Y, kappa = check_costly(H, A), H.Y, H.kernel_weight
    (c_1, c_2), total, mixed = cost_of_bias(H), c.sum(axis=1), f @ c.T
    (a_low, a_high), (b_low, b_high) = box.bias, box.kernel
    a = np.clip((total - c_1) / c_2, a_low, a_high) if c_2 > 0 else np.where(total >= 0, a_high, a_low)
    b = np.clip(-mixed / kappa, b_low, b_high) if kappa > 0 else np.where(mixed >= 0, b_low, b_high)
    sums = Y.sum((Y.weights[:, None] * b).T @ f), Y.sum(Y.weights @ b**2)
    return a[:, None] - sums[0], c_1 * a + c_2 / 2 * a**2 + kappa / 2 * sums[1]


class _Sums:
    """Sums of several terms over all places up to q."""

    def __init__(self, places: np.ndarray, *terms: np.ndarray):
        order = np.argsort(places)
        self.places = places[order]
        self._totals = [np.append(0.0, np.cumsum(term[order])) for term in terms]

    def __call__(self, q: np.ndarray) -> list[np.ndarray]:
        number = np.searchsorted(self.places, q)
        return [total[number] for total in self._totals]


def own_maximum(
    H: Hamiltonian, cheapest: Cheapest, r: np.ndarray, share: np.ndarray | float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The maximum over all controls of r sigma(u) - share * cost for one sample, and its q: shape (nodes,) each.

    Parameters
    ----------
    H
        The Hamiltonian.
    cheapest
        The cheapest controls for the state of this sample.
    r
        r* of this sample, shape (nodes,).
    share
        The part of the cost that counts, above 0, one number or one for each node.

    Raises
    ------
    ValueError
        If sigma' has no bound.
    """
    sigma = H.activation
    if not np.isfinite(sigma.properties.lipschitz):
        raise ValueError(f"activation: expected one with bounded sigma', got {sigma.name}")
    up, largest = r >= 0, r * sigma.properties.lipschitz / share

    def value(m: np.ndarray) -> np.ndarray:
        """At the part m of the largest q, shape (nodes,)."""
        u, cost = cheapest.argument_and_cost(m * largest, up)
        return r * sigma(u) - share * cost

    def rises(m: np.ndarray) -> np.ndarray:
        """Where the value rises with m: as r sigma'(u) is beyond the share of q."""
        u = cheapest.argument_and_cost(m * largest, up)[0]
        return np.abs(r * sigma.derivative(u)) > share * np.abs(m * largest)

    m = np.linspace(0.0, 1.0, _TRIED)
    best = np.argmax(np.column_stack([value(np.full(r.shape, part)) for part in m]), axis=1)
    low, high = m[np.maximum(best - 1, 0)], m[np.minimum(best + 1, _TRIED - 1)]
    for _ in range(_CUTS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        falls = value(left) >= value(right)
        low, high = np.where(falls, low, left), np.where(falls, right, high)
    near = (low + high) / 2
    low, high = np.maximum(near - _NEAR, 0.0), np.minimum(near + _NEAR, 1.0)  # values tell no more than that
    for _ in range(_CUTS):
        middle = (low + high) / 2
        further = rises(middle)
        low, high = np.where(further, middle, low), np.where(further, high, middle)
    tried = np.column_stack([m[best], near, (low + high) / 2])
    values = np.column_stack([value(part) for part in tried.T])
    most = values.max(axis=1)
    # The last one that is the largest up to round-off, as sums up to q have it.
    round_off = 1e-11 * (np.abs(most) + np.abs(r))
    found = 2 - np.argmax((values >= (most - round_off)[:, None])[:, ::-1], axis=1)
    return most, np.take_along_axis(tried, found[:, None], axis=1)[:, 0] * largest
