"""The maximum principle of section 4.2: extremal controls (4.9), (4.10), and how far a network is from it.

L(f) must not depend on (a, b) where extremal controls are asked for: then, sigma being increasing, H (`hamiltonian`) is
largest where T_f is at T^+ for r* > 0 and at T^- for r* < 0 (`control_set`), the same two controls for all y, so that

    b*(y, z) = chi_{r* > 0}(y) b^+(z) + chi_{r* < 0}(y) b^-(z)                                            (4.10)

has rank 2 at most. ((4.10) prints the indicator of r* >= 0 on its left; it holds where r* is not 0.) Ties: where r* = 0 the
control for r* > 0 is taken, where f = 0 that for f > 0; both are optimal, and the measures of both sets are reported.
These controls leave any fixed span: a layer of them has its own two-term basis (`Controls`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.tri
import numpy as np

from fem_resnet.arguments import instance, integer, number
from fem_resnet.control.control_set import ControlSet
from fem_resnet.control.hamiltonian import Controls, Hamiltonian, Pair, middle_pairs
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.learning.objective import LearningProblem
from fem_resnet.ranks import same, together

__all__ = [
    "Extremal", "Residual", "Violation", "controls_within", "extremal_controls", "pmp_residual", "refuse_controls_outside",
    "violation",
]  # fmt: skip

#: Controls are in A up to this part of A's size: what mixtures and factors of b leave of round-off.
_ROUND_OFF = 1e-10


# -- extremal controls -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extremal:
    """Controls of (4.10), and how much of Y has a tie.

    Attributes
    ----------
    controls : Controls
        Of rank 2 at most.
    no_costate, no_state : float
        Measures of { r = 0 }, where any control is optimal, and of { f = 0 }, where any b(., z) of the section is.
    """

    controls: Controls
    no_costate: float
    no_state: float


def _parts(Y: LabelSpace, f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sums = Y.sum(np.stack([Y.weights @ np.maximum(f, 0), Y.weights @ np.maximum(-f, 0)]))
    return sums[0], sums[1]


def extremal_controls(Y: LabelSpace, A: ControlSet, pair: Pair, *, tie: float = 0.0) -> Extremal:
    """The controls of (4.10) for one sample. Collective.

    Parameters
    ----------
    A
        Where (a, b) lies.
    pair
        f and r of one sample, of either convention.
    tie
        abs(r) and abs(f) up to this count as ties, in their own units.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind; for more than one sample: (4.10) then no longer maximises H.
    """
    check_label_space(Y)
    same(Y.comm, A=A, pair=getattr(pair, "convention", pair), tie=tie)
    instance("A", A, ControlSet)
    instance("pair", pair, Pair)
    tie = number("tie", tie, least=0)
    if pair.f.shape[1] != 1:
        raise ValueError(f"pair: (4.10) holds for one sample, got {pair.f.shape[1]}")
    f, r = pair.f[:, 0], pair.to("maximise").r[:, 0]
    parts = _parts(Y, f)
    high, low = together(Y.comm, lambda: (A.largest(*parts), A.smallest(*parts)))
    up = r >= -tie
    controls = Controls(
        np.where(up, high.a, low.a),
        np.column_stack([up, ~up]).astype(float),
        np.column_stack([np.where(f >= -tie, e.where_positive, e.where_negative) for e in (high, low)]),
    )
    ties = Y.sum(np.array([Y.weights @ (np.abs(x) <= tie) for x in (r, f)]))
    return Extremal(controls, float(ties[0]), float(ties[1]))


# -- controls outside of A -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Violation:
    """Where controls are farthest outside of a set A.

    Attributes
    ----------
    excess : float
        The larger of how far a is outside of the range of a in A, and b outside of the section at that a, in parts of the
        sizes of A in a and b.
    a, b : float
        The controls there.
    y, z : tuple of float
        The nodes.
    """

    excess: float
    a: float
    b: float
    y: tuple[float, ...]
    z: tuple[float, ...]

    def __str__(self) -> str:
        y, z = ("(" + ", ".join(f"{x:.4g}" for x in node) + ")" for node in (self.y, self.z))
        return f"(a(y), b(y, z)) = ({self.a:.6g}, {self.b:.6g}) at y = {y}, z = {z}, by {self.excess:.1e} of its size"


def violation(Y: LabelSpace, A: ControlSet, controls: Controls, tolerance: float = _ROUND_OFF) -> Violation | None:
    """Where (a(y), b(y, z)) is outside of A, for the pair of nodes where it is farthest; None if it is in A at all pairs.

    All pairs of nodes are looked at, in pieces: the work is nodes^2 x rank, shared by the ranks. Collective.

    Parameters
    ----------
    tolerance
        In parts of A's size in a and in b.
    """
    # A may be made of a user's functions.
    sizes = together(Y.comm, lambda: [_size(*A.bias_range), _size(*A.kernel_range)])
    x = Y.coordinates  # made by all ranks, when first asked for
    worst: tuple | None = None
    for owner in range(Y.comm.size):
        # One rank's nodes z after the other, seen by all: no rank ever has more than that.
        psi, z = Y.comm.bcast((controls.psi, x) if Y.comm.rank == owner else None, root=owner)
        pieces = np.array_split(np.arange(Y.nodes), max(1, Y.nodes * len(z) // _PAIRS))
        far = together(Y.comm, lambda: [
            _farthest(A, controls.a[rows], controls.phi[rows] @ psi.T, sizes, tolerance) for rows in pieces
        ])  # fmt: skip
        for rows, found in zip(pieces, far):
            if found is not None and (worst is None or found[0] > worst[0]):
                excess, i, j, b = found
                worst = excess, float(controls.a[rows[i]]), b, tuple(x[rows[i]]), tuple(z[j])
    offers = [offer for offer in Y.comm.allgather(worst) if offer is not None]
    return Violation(*max(offers)) if offers else None


#: How many pairs of nodes are looked at at once.
_PAIRS = 2**20


def _size(low: float, high: float) -> float:
    return max(high - low, abs(low), abs(high), np.finfo(float).tiny)


def _farthest(A: ControlSet, a: np.ndarray, b: np.ndarray, sizes: Sequence[float], tolerance: float):
    """The largest excess, where it is, and b there; None where all pairs (a_i, b_ij) are in A."""
    if not b.size:
        return None
    low, high = A.bias_range
    m, M = (end[:, None] for end in A.sections(np.clip(a, low, high)))
    empty = m > M  # a finite set has no point over most a
    in_a = np.maximum(np.maximum(low - a, a - high), 0.0)[:, None] / sizes[0]
    in_b = np.where(empty, 0.0, np.maximum(np.maximum(m - b, b - M), 0.0)) / sizes[1]
    excess = np.maximum(in_a, in_b)
    # Holes, and what is no interval: there A itself says. It has one tolerance for a and b.
    inside = A.contains(a[:, None], b, tolerance * max(sizes))
    excess = np.where((excess <= tolerance) & ~inside, np.maximum(excess, 2 * tolerance), excess)
    i, j = np.unravel_index(np.argmax(excess), excess.shape)
    return (float(excess[i, j]), i, j, float(b[i, j])) if excess[i, j] > tolerance else None


def controls_within(Y: LabelSpace, A: ControlSet, controls: Controls) -> Controls:
    """Controls pulled towards a point of a convex set A, by the least share that brings all of them into it. Collective.

    Not the nearest, whose rank would be that of Y: the rank grows by one.

    Raises
    ------
    ValueError
        If A is not convex.
    """
    if violation(Y, A, controls) is None:
        return controls
    if not A.convex:
        raise ValueError("A: controls cannot be pulled into a set that is not convex; begin with a point of it at all y and z")
    a, one = np.mean(A.bias_range), np.ones((Y.nodes, 1))
    b = np.mean(together(Y.comm, lambda: A.sections(a)))
    centre, outside, inside = Controls(np.full(Y.nodes, a), b * one, one), 0.0, 1.0
    while inside - outside > 1e-3 * inside:
        share = (outside + inside) / 2 if outside else inside / 2
        if violation(Y, A, controls.towards(centre, share)) is None:
            inside = share
        else:
            outside = share
    return controls.towards(centre, inside)


def refuse_controls_outside(Y: LabelSpace, A: ControlSet, controls: Sequence[Controls], remedy: str) -> None:
    """Raise ValueError where the controls of a layer are not in A; the message says where, and ends with the remedy. Collective."""
    for l, c in enumerate(controls):
        outside = violation(Y, A, c)
        if outside is not None:
            raise ValueError(f"A: the controls of layer {l} are outside of it, {outside}; {remedy}")


# -- the residual ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Residual:
    """How far a network's controls are from the maximum principle.

    Attributes
    ----------
    lower, upper : float
        Bracket of int max H - H dt, relative to int int abs(sigma(u)) abs(r*) dy dt; equal for one sample. No unit.
        0 <= lower <= upper.
    absolute : tuple of float
        The same, not divided.
    density : numpy.ndarray
        Where it is violated: the upper bound of max h - h at the nodes, one column a layer, shape (nodes, layers).
    Y : LabelSpace
    times : numpy.ndarray
        Layer times, shape (L + 1,).
    reached : bool
        Whether r* = 0: the target is reached, and the maximum principle says nothing.
    caveat : str
        What of sigma the upper bound stands on that is sampled, not proved; empty if nothing is.
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
        """Draw the violation over Y, one picture a layer, into as many matplotlib axes, for meshes of the plane. Collective.

        Rank 0 draws; the nodes are gathered, since a figure needs all of them.

        Parameters
        ----------
        axes
            At most one a layer.
        """
        Y = self.Y
        same(Y.comm, axes=axes)
        axes = np.ravel(np.asarray(axes, dtype=object)).tolist()
        for ax in axes:
            instance("axes", ax, matplotlib.axes.Axes)
        if len(axes) > self.density.shape[1]:
            raise ValueError(f"axes: expected at most one a layer, got {len(axes)} for {self.density.shape[1]} layers")
        x = Y.coordinates
        if x.shape[1] != 2:
            raise ValueError(f"plot: expected a mesh of the plane, this one lies in {x.shape[1]} dimensions")
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


# (4.10) asks for a J that depends on (a, b) through f alone.
@supports(*HELD, *STEPPED, "head", "running", "learned_initial", "learned_both", "many_samples", "weights")
def pmp_residual(problem: LearningProblem, A: ControlSet, *, tolerance: float = 1e-12, rounds: int = 4) -> Residual:
    """Int max H - H dt at the present parameters of a learning problem without regulariser. Collective.

    Exact for one sample, in (4.10). For many samples max H is no longer explicit: it is at most the integral of
    `sum_s max(sigma(T_s^-) r_s, sigma(T_s^+) r_s)`, and at least what the best controls tried give: at each y the best row
    (a, b(y, .)) of a pool, made of the extremal rows of each sample and grown by those that linear maximisation of H asks for.

    Parameters
    ----------
    tolerance
        The target counts as reached where int int abs(sigma(u)) abs(r*) dy dt is up to this part of J + J_0, J_0 being the
        loss of the output 0.
    rounds
        How often the pool grows.

    Raises
    ------
    ValueError
        If there is a regulariser or a running cost that depends on (a, b), sigma does not increase, or the controls are not
        in A at all pairs of nodes: then max H over A says nothing of them. (Looking takes nodes^2 x rank operations a layer.)
    """
    instance("A", A, ControlSet)
    tolerance, rounds = number("tolerance", tolerance, least=0), integer("rounds", rounds, least=0)
    net = problem.net
    if not net.activation.properties.non_decreasing:
        raise ValueError(f"activation: expected one that does not decrease, {net.activation.name} does")
    Y, all_controls = net.Y, [Controls.of_layer(net, l) for l in range(net.layers)]
    refuse_controls_outside(
        Y, A, all_controls, "give a set that they are in, or train within it: train(problem, bounds=..), msa(problem, A)"
    )
    J, run = problem.record()
    J.derivative()
    H = Hamiltonian.of(problem, "maximise")
    low = high = size = 0.0
    columns = []
    for l, (pair, controls) in enumerate(zip(middle_pairs(run, "maximise"), all_controls)):
        tau = net.times[l + 1] - net.times[l]
        h = np.sum(H.in_r(pair, controls) * pair.r, axis=1)  # a running cost of f alone is in both, and drops out
        upper = _upper(H, A, pair)
        # The present controls are in A, the pool is too: round-off must not say else.
        at_least = np.maximum(h, upper if pair.f.shape[1] == 1 else _best_of_pool(H, A, pair, rounds))
        at_most = np.maximum(upper, at_least)
        sums = Y.sum(
            Y.weights @ np.column_stack([at_least - h, at_most - h, np.sum(np.abs(H.in_r(pair, controls) * pair.r), axis=1)])
        )
        low, high, size = low + tau * sums[0], high + tau * sums[1], size + tau * sums[2]
        columns.append(at_most - h)
    reached = size <= tolerance * (abs(float(J.functional)) + abs(problem.loss_of_zero()))
    scale = 0.0 if reached or size == 0 else 1 / size
    density = np.column_stack(columns) if columns else np.zeros((Y.nodes, 0))
    caveat = net.activation.properties.caveat("non_decreasing")
    return Residual(scale * low, scale * high, (low, high), density, Y, net.times, reached, caveat)


def _extremes(Y: LabelSpace, A: ControlSet, parts) -> np.ndarray:
    """T^+ and T^-."""
    return together(Y.comm, lambda: np.array([A.largest(*parts).value, A.smallest(*parts).value]))


def _upper(H: Hamiltonian, A: ControlSet, pair: Pair) -> np.ndarray:
    """What max h is at most, but for the running cost."""
    T = _extremes(H.Y, A, _parts(H.Y, pair.f))
    return np.sum(np.maximum(*(H.activation(t) * pair.r for t in T)), axis=1)


def _best_of_pool(H: Hamiltonian, A: ControlSet, pair: Pair, rounds: int, new: int = 16) -> np.ndarray:
    """Max over rows of a pool, at each node, of sum_s sigma(T_s(row)) r_s: H never falls as the pool grows."""
    Y, (f, r) = H.Y, (pair.f, pair.r)
    best, best_T = np.full(Y.nodes, -np.inf), np.zeros_like(r)
    directions = np.vstack([np.eye(r.shape[1]), -np.eye(r.shape[1])])
    for _ in range(rounds + 1):
        # The row that maximises sum_s c_s T_s is extremal for f_c = sum_s c_s f_s, with the bias counted sum_s c_s times.
        T = np.array([_row(Y, A, f, c) for c in directions])
        values = r @ H.activation(T).T
        chosen = np.argmax(values, axis=1)
        better = np.take_along_axis(values, chosen[:, None], axis=1)[:, 0]
        rises = better > best
        best, best_T = np.where(rises, better, best), np.where(rises[:, None], T[chosen], best_T)
        gap = Y.weights * (_upper(H, A, pair) - best)
        wide = np.argsort(-gap)[:new]
        mine = [(gap[i], *(H.activation.derivative(best_T[i]) * r[i])) for i in wide]
        offers = [offer for part in Y.comm.allgather(mine) for offer in part]
        directions = np.array([offer[1:] for offer in sorted(offers, reverse=True)[:new]])
    return best


def _row(Y: LabelSpace, A: ControlSet, f: np.ndarray, c: np.ndarray) -> np.ndarray:
    """T_s of the row that is extremal for sum_s c_s T_s, up to the sign of sum c: shape (samples,)."""
    total = c.sum()
    size = abs(total) if abs(total) > 1e-8 * np.abs(c).max(initial=1e-300) else np.abs(c).sum() * 1e-8 + 1e-300
    mixed = f @ c / size * (1.0 if total >= 0 else -1.0)
    parts = _parts(Y, mixed)
    extreme = together(Y.comm, lambda: (A.largest if total >= 0 else A.smallest)(*parts))
    b = np.where(mixed >= 0, extreme.where_positive, extreme.where_negative)
    return extreme.a - Y.sum((Y.weights * b) @ f)
