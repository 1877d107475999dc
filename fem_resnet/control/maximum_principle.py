"""The residual of the maximum principle: how far a network's controls are from controls that maximise H (section 4.2).

The residual is int max H - H dt, where the maximum is over all controls in a set A. For one sample it is explicit, by (4.9)
and (4.10). For many samples max H is not explicit, and is bracketed:

- it is at most the integral over y of sum_s max(sigma(T_s^-) r_s, sigma(T_s^+) r_s), the best controls of each sample alone;
- it is at least the value of the best controls of a pool of rows (a, b(y, .)), chosen at each y. The pool starts with the rows
  that are extremal for one sample, and grows by rows that maximise a linearisation of H.

Where controls have a cost (Tikhonov's terms, a running cost of them), A is a box. For one sample the maximum is a search over
one number at each y (`costly_controls`). For many samples each one bears a part of the cost in the upper bound. These parts
are chosen at each y, and add up to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.tri
import numpy as np

from fem_resnet.arguments import instance, integer, number
from fem_resnet.control.controls import Controls
from fem_resnet.control.costly_controls import Cheapest, check_costly, own_maximum, rows_of_multipliers, state_cost
from fem_resnet.control.extremal_controls import integrals_of_parts
from fem_resnet.control.hamiltonian import Hamiltonian, Pair, middle_pairs
from fem_resnet.control.sets.control_set import ControlSet
from fem_resnet.control.sets_of_layers import sets_of_layers
from fem_resnet.control.violation import refuse_controls_outside
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.ranks import same, together

__all__ = ["Residual", "pmp_residual"]

#: Where controls have a cost: parts of r* that rows of the pool have for multipliers, as values of sigma' are.
_PARTS = 2.0 ** -np.arange(8)


@dataclass(frozen=True)
class Residual:
    """How far a network's controls are from the maximum principle.

    Attributes
    ----------
    lower, upper : float
        Bounds of int max H - H dt, divided by int int abs(sigma(u)) abs(r*) dy dt, so without unit: 0 <= lower <= upper. For
        one sample they are equal. Where controls have a cost, the divisor is the integral of the larger of two densities:
        that plus the cost, and max h.
    absolute : tuple of float
        The same bounds, not divided.
    density : numpy.ndarray
        Where the principle is violated: the upper bound of max h - h at this rank's nodes, where h is the density of H over
        y. One column for each layer, shape (nodes, layers).
    Y : LabelSpace
        The label domain.
    times : numpy.ndarray
        Layer times, shape (L + 1,).
    reached : bool
        Whether r* = 0 and controls cost nothing. Then the target is reached, and the maximum principle says nothing.
    caveat : str
        What the upper bound needs and what is sampled, not proved: a property of sigma; where controls have a cost, the
        maximum over one number at each y. Empty if there is none.
    """

    lower: float
    upper: float
    absolute: tuple[float, float]
    density: np.ndarray
    Y: LabelSpace
    times: np.ndarray
    reached: bool
    caveat: str = ""

    def __str__(self) -> str:
        if self.reached:
            return "no information from the maximum principle: r* = 0, the target is reached; use the gradient"
        caveat = f" ({self.caveat})" if self.caveat else ""
        return f"relative PMP residual between {self.lower:.3e} and {self.upper:.3e}{caveat}"

    def plot(self, axes) -> list:
        """Draw the violation over a label domain in the plane, one picture for each layer. Collective.

        Rank 0 gathers the nodes and draws.

        Parameters
        ----------
        axes
            Matplotlib axes, at most one for each layer: the first one gets the first layer.

        Returns
        -------
        list
            The pictures on rank 0, an empty list on other ranks.

        Raises
        ------
        TypeError, ValueError
            If these are no axes, or more than layers, or the label domain does not lie in a plane.
        """
        Y = self.Y
        same(Y.comm, axes=axes)
        axes = np.ravel(np.asarray(axes, dtype=object)).tolist()
        for ax in axes:
            instance("axes", ax, matplotlib.axes.Axes)
        if len(axes) > self.density.shape[1]:
            raise ValueError(f"axes: expected at most one for each layer, got {len(axes)} for {self.density.shape[1]} layers")
        x = Y.coordinates
        if x.shape[1] != 2:
            raise ValueError(f"plot: expected a label domain in the plane, got one in {x.shape[1]} dimensions")
        points, values = (Y.comm.gather(part) for part in (x, self.density))
        if Y.comm.rank > 0:
            return []
        points, values = np.concatenate(points), np.concatenate(values)
        triangulation = matplotlib.tri.Triangulation(*points.T)
        pictures = []
        for l, ax in enumerate(axes):
            pictures.append(ax.tripcolor(triangulation, values[:, l], vmin=0.0, vmax=max(values.max(), 1e-300)))
            ax.set_title(f"t = {self.times[l]:.3g} .. {self.times[l + 1]:.3g}")
            ax.set_aspect("equal")
        return pictures


@supports(
    "channels", *HELD, *STEPPED, "head", "regulariser", "running", "running_of_controls", "learned_initial", "learned_both",
    "many_samples", "weights",
)  # fmt: skip
def pmp_residual(
    problem: LearningProblem, A: ControlSet | Sequence[ControlSet], *, tolerance: float = 1e-12, rounds: int = 4
) -> Residual:
    """int max H - H dt at the present parameters of a learning problem. Collective.

    Exact for one sample, bounds for many (see above).

    Parameters
    ----------
    problem
        The learning problem. Its activation does not decrease. Where it acts on bias and kernel, its regulariser is
        Tikhonov's.
    A
        The set over which max H is taken, or a list with one for each layer; each may depend on y (`NodalBox`, `NodalSets`).
        The present controls lie in it. It is a `Box` where controls have a cost: Tikhonov's, or a running cost
        l_0(f) + c_1 a + c_2/2 a^2.
    tolerance
        When the target counts as reached: where int int abs(sigma(u)) abs(r*) dy dt is up to this part of J + J_0. Here J_0 is
        the loss of the output 0.
    rounds
        How often the pool of rows grows, for many samples.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind or differs between ranks; if the cost of (a, b) is another one, or sigma decreases
        somewhere; if the controls are not in A at all pairs of nodes, as max H over A then says nothing about
        them. (This check takes nodes^2 x rank operations in each layer.)
    """
    sets = sets_of_layers(A, problem.net, ControlSet)
    tolerance, rounds = number("tolerance", tolerance, least=0), integer("rounds", rounds, least=0)
    net = problem.net
    if not net.activation.properties.non_decreasing:
        raise ValueError(f"activation: expected one that does not decrease, got {net.activation.name}")
    Y, all_controls = net.Y, [Controls.of_layer(net, l) for l in range(net.layers)]
    remedy = "give a set that they are in, or train within it: train(problem, bounds=..), msa(problem, A)"
    for l, controls in enumerate(all_controls):
        refuse_controls_outside(Y, l, sets[l], controls, remedy)
    H = Hamiltonian.of(problem, "maximise")
    if H.charges_controls:
        for one in sets:
            check_costly(H, one)
    J, run = problem.record()
    J.derivative()
    low = high = size = 0.0
    columns = []
    for l, (one, pair, controls) in enumerate(zip(sets, middle_pairs(run, "maximise"), all_controls)):
        tau = net.times[l + 1] - net.times[l]
        each = H.in_r(pair, controls) * pair.r
        h = np.sum(each, axis=1)  # a running cost of f alone is in max h and in h, and drops out
        sizes = np.sum(np.abs(each), axis=1)
        if H.charges_controls:
            cost = H.cost(pair, controls) - state_cost(H, pair)
            h, sizes = h - cost, sizes + np.abs(cost)
        at_least, at_most = _bounds(H, one, pair, h, rounds)
        if H.charges_controls:
            sizes = np.maximum(sizes, np.abs(at_most))
        sums = Y.sum(Y.weights @ np.column_stack([at_least - h, at_most - h, sizes]))
        low, high, size = low + tau * sums[0], high + tau * sums[1], size + tau * sums[2]
        columns.append(at_most - h)
    reached = not H.charges_controls and size <= tolerance * (abs(float(J.functional)) + abs(problem.loss_of_zero()))
    scale = 0.0 if reached or size == 0 else 1 / size
    density = np.column_stack(columns) if columns else np.zeros((Y.nodes, 0))
    caveat = net.activation.properties.caveat("non_decreasing", *(["lipschitz"] if H.charges_controls else []))
    if H.charges_controls:
        caveat = "; ".join(filter(None, [caveat, "sampled and refined: the maximum over one number at each y"]))
    return Residual(scale * low, scale * high, (low, high), density, Y, net.times, reached, caveat)


def _bounds(H: Hamiltonian, A: ControlSet, pair: Pair, h: np.ndarray, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """A lower and an upper bound of max h at the nodes, without the running cost, where h is the present density."""
    upper = _upper(H, A, pair)
    # The present controls and the pool are in A, so max h is at least h of both, also where round-off says less.
    at_least = np.maximum(h, upper if pair.f.shape[1] == 1 else _best_of_pool(H, A, pair, rounds))
    return at_least, np.maximum(upper, at_least)


def _upper(H: Hamiltonian, A: ControlSet, pair: Pair) -> np.ndarray:
    """The sum over the samples of each one's own max h, without the cost of the state: shape (nodes,)."""
    if H.charges_controls:
        sizes = np.abs(pair.r) + 1e-6 * np.abs(pair.r).max(axis=1, keepdims=True) + np.finfo(float).tiny
        shares = sizes / sizes.sum(axis=1, keepdims=True)  # of the cost
        states = [Cheapest(H, A, f) for f in pair.f.T]
        return np.sum([own_maximum(H, *each)[0] for each in zip(states, pair.r.T, shares.T)], axis=0)
    parts = [part[None] for part in integrals_of_parts(H.Y, pair.f)]  # for all y alike
    T = together(H.Y.comm, lambda: (A.largest(*parts).value, A.smallest(*parts).value))
    return np.sum(np.maximum(*(H.activation(t) * pair.r for t in T)), axis=1)


def _best_of_pool(H: Hamiltonian, A: ControlSet, pair: Pair, rounds: int, new: int = 16) -> np.ndarray:
    """The maximum over a pool of rows of sum_s sigma(T_s(row)) r_s - cost(row) at each node, shape (nodes,).

    It rises as the pool grows. Each time `new` rows come, for the nodes where the bracket is widest.
    """
    Y, (f, r) = H.Y, (pair.f, pair.r)
    best, best_T, upper = np.full(Y.nodes, -np.inf), np.zeros_like(r), _upper(H, A, pair)
    directions = np.vstack([np.eye(r.shape[1]), -np.eye(r.shape[1])])
    if H.charges_controls:  # then the lengths of directions count
        directions = np.vstack([part * _largest(Y, r) * directions for part in _PARTS])
    for _ in range(rounds + 1):
        # The row that maximises sum_s c_s T_s is extremal for the state sum_s c_s f_s, with the bias sum_s c_s times.
        if H.charges_controls:
            T, costs = rows_of_multipliers(H, A, f, directions)
            values = r @ H.activation(T).T - costs
        else:
            rows = [_row(Y, A, f, c) for c in directions]
            T = np.concatenate([row.T(slice(None)) for row in rows]) if all(len(row.parts) == 1 for row in rows) else None
            values = (
                np.column_stack([np.sum(r * H.activation(row.T(slice(None))), axis=1) for row in rows])
                if T is None else r @ H.activation(T).T
            )  # fmt: skip
        chosen = np.argmax(values, axis=1)
        better = np.take_along_axis(values, chosen[:, None], axis=1)[:, 0]
        rises = better > best
        of_chosen = _of_rows(rows, chosen) if T is None else T[chosen]
        best, best_T = np.where(rises, better, best), np.where(rises[:, None], of_chosen, best_T)
        gap = Y.weights * (upper - best)
        wide = np.argsort(-gap)[:new]
        mine = [(gap[i], *(H.activation.derivative(best_T[i]) * r[i]), *r[i]) for i in wide]
        offers = [offer for part in Y.comm.allgather(mine) for offer in part]
        slopes, costates = np.split(np.array([offer[1:] for offer in sorted(offers, reverse=True)[:new]]), 2, axis=1)
        directions = np.vstack([slopes, *(part * costates for part in _PARTS)]) if H.charges_controls else slopes
    return best


def _largest(Y: LabelSpace, values: np.ndarray) -> float:
    return max(Y.comm.allgather(float(np.abs(values).max(initial=0.0))))


@dataclass(frozen=True)
class _Row:
    """A row (a, b(.)), or one for each y: b is one number where f >= 0 for some state f, and one where f < 0.

    Attributes
    ----------
    parts : numpy.ndarray
        a and the two numbers, shape (1, 3), or (nodes, 3) where A depends on y.
    integrals : numpy.ndarray
        What these are multiplied by in T_s: 1, and minus the integrals of f_s over the two sets, shape (3, samples).
    """

    parts: np.ndarray
    integrals: np.ndarray

    def T(self, nodes: slice | np.ndarray) -> np.ndarray:
        """T_s at some nodes, or of the one row, shape (1 or nodes, samples)."""
        return self.parts[nodes] @ self.integrals


def _of_rows(rows: list[_Row], chosen: np.ndarray) -> np.ndarray:
    """T_s at each node of the row that is chosen there, shape (nodes, samples)."""
    T = np.empty((len(chosen), rows[0].integrals.shape[1]))
    for d in np.unique(chosen):
        T[chosen == d] = rows[d].T(chosen == d)
    return T


def _row(Y: LabelSpace, A: ControlSet, f: np.ndarray, c: np.ndarray) -> _Row:
    """The row that maximises sum_s c_s T_s.

    For the state sum_s c_s f_s / sum_s c_s it has the largest T if sum_s c_s >= 0, else the smallest. If the c_s cancel each
    other, the divisor is a small part of their sizes.
    """
    total = c.sum()
    size = abs(total) if abs(total) > 1e-8 * np.abs(c).max(initial=1e-300) else np.abs(c).sum() * 1e-8 + 1e-300
    mixed = f @ c / size * (1.0 if total >= 0 else -1.0)
    parts = [part[None] for part in integrals_of_parts(Y, mixed)]
    extreme = together(Y.comm, lambda: (A.largest if total >= 0 else A.smallest)(*parts))
    plus = mixed >= 0
    over = Y.sum(np.stack([np.where(plus, Y.weights, 0.0), np.where(plus, 0.0, Y.weights)]) @ f)
    integrals = np.vstack([np.ones(f.shape[1]), -over])
    return _Row(np.column_stack([extreme.a, extreme.where_positive, extreme.where_negative]), integrals)
