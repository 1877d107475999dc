"""The maximum principle of section 4.2: Hamiltonian, extremal controls (4.9), (4.10), and how far a network is from it.

Two conventions, which differ in the sign of the co-state and in what is asked of H:

    "minimise"    section 4.1 and (4.11): r(T) =  f(T) - ftilde     H = int sigma(a - B f) r + int L     smallest
    "maximise"    (4.8), Algorithm 2:     r*(T) = ftilde - f(T)     H = int sigma(a - B f) r* - int L    largest

A `Pair` says which one its co-state has, and a `Hamiltonian` takes only those of its own. H sums over the samples, whose
weights are in r. L(f) must not depend on (a, b) where extremal controls are asked for: then, sigma being increasing, H is
largest where T_f is at T^+ for r* > 0 and at T^- for r* < 0 (`control_set`), the same two controls for all y, so that

    b*(y, z) = chi_{r* > 0}(y) b^+(z) + chi_{r* < 0}(y) b^-(z)                                            (4.10)

has rank 2 at most. ((4.10) prints the indicator of r* >= 0 on its left; it holds where r* is not 0.) Ties: where r* = 0 the
control for r* > 0 is taken, where f = 0 that for f > 0; both are optimal, and the measures of both sets are reported.
These controls leave any fixed span: a layer of them has its own two-term basis (`Controls`).

A layer has one control. f and r are taken at the layer's middle, as means of the values at both its ends, which is right to
second order in the layer's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.tri
import numpy as np

from fem_resnet.activation import Activation
from fem_resnet.basis import Basis
from fem_resnet.control_set import ControlSet
from fem_resnet.label_space import LabelSpace, sample_weights
from fem_resnet.layer_inputs import LayerCoefficients
from fem_resnet.network import ResidualNetwork
from fem_resnet.objective import LearningProblem
from fem_resnet.run import Run
from fem_resnet.running_cost import RunningCost

__all__ = [
    "Controls", "Extremal", "Hamiltonian", "Pair", "Residual", "extremal_controls", "hamiltonian_along",
    "middle_pairs", "pmp_residual", "refuse_costs_of_controls",
]  # fmt: skip

_CONVENTIONS = ("minimise", "maximise")


def _checked(convention: str) -> str:
    if convention not in _CONVENTIONS:
        raise ValueError(f"convention: one of {', '.join(map(repr, _CONVENTIONS))} is wanted, {convention!r} was given")
    return convention


@dataclass(frozen=True)
class Pair:
    """f and r at one time, shape (nodes, samples), and the convention that r has."""

    f: np.ndarray
    r: np.ndarray
    convention: str

    def __post_init__(self):
        _checked(self.convention)
        if self.f.shape != self.r.shape or self.f.ndim != 2:
            raise ValueError(f"f, r: two arrays (nodes, samples) are wanted, {self.f.shape}, {self.r.shape} were given")

    def to(self, convention: str) -> Pair:
        """The same in this convention: r* = -r."""
        return self if _checked(convention) == self.convention else Pair(self.f, -self.r, convention)


@dataclass(frozen=True)
class Controls:
    """a and b at one time, b by its factors: b(y, z) = sum_k phi_k(y) psi_k(z), of any rank.

    Attributes
    ----------
    a : numpy.ndarray
        Shape (nodes,).
    phi, psi : numpy.ndarray
        Shape (nodes, rank).
    """

    a: np.ndarray
    phi: np.ndarray
    psi: np.ndarray

    def argument(self, Y: LabelSpace, f: np.ndarray) -> np.ndarray:
        """u = a - B f, shape (nodes, samples). Collective."""
        return self.a[:, None] - self.phi @ Y.sum((Y.weights[:, None] * self.psi).T @ f)

    def transpose(self, Y: LabelSpace, v: np.ndarray) -> np.ndarray:
        """B^T v. Collective."""
        return self.psi @ Y.sum((Y.weights[:, None] * self.phi).T @ v)

    def towards(self, other: Controls, share: float | np.ndarray) -> Controls:
        """(1 - share) times these plus share times the others; a share a node, shape (nodes,), or one for all."""
        share = np.broadcast_to(share, self.a.shape)
        mine, theirs = 1 - share, share
        return Controls(
            mine * self.a + theirs * other.a,
            np.hstack([mine[:, None] * self.phi, theirs[:, None] * other.phi]),
            np.hstack([self.psi, other.psi]),
        )

    def in_bases(self, Y: LabelSpace) -> tuple[Basis, Basis, np.ndarray]:
        """Orthonormal phi and psi of least rank, and beta: what a network's layer takes. Collective.

        Parts of b below 1e-13 of its size are round-off and left out; b = 0 is one constant times 0.
        """
        phi, R = _orthonormal(Y, self.phi)
        psi, S = _orthonormal(Y, self.psi)
        U, sizes, V = np.linalg.svd(R @ S.T)
        rank = int(np.count_nonzero(sizes > 1e-13 * max(sizes.max(initial=0.0), 1e-300)))
        if rank == 0:
            constant = Basis(Y, np.full((Y.nodes, 1), Y.measure**-0.5), "given")
            return constant, constant, np.zeros((1, 1))
        return (
            Basis(Y, phi @ U[:, :rank], "given"), Basis(Y, psi @ V[:rank].T, "given"), np.diag(sizes[:rank])
        )  # fmt: skip

    @classmethod
    def of_layer(cls, net: ResidualNetwork, layer: int, fraction: float = 0.5) -> Controls:
        """Those of a network's layer, at a fraction of its time. Collective."""
        coefficients = LayerCoefficients(net.bias, net.kernel, net.times, range(layer, layer + 1))
        (inputs,) = coefficients.on_layers([s.read(p) for s, p in zip(coefficients.slots, coefficients.functions)])
        factors = net.learned_factors() if net.factors else inputs.factors
        return cls(
            inputs.bias.coefficients(fraction), factors.phi.values @ inputs.beta.coefficients(fraction), factors.psi.values
        )


def _orthonormal(Y: LabelSpace, P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q, R with P = Q R and Q^T M Q = 1: a QR on each rank, then one of all their R. Collective."""
    root = np.sqrt(Y.weights)[:, None]
    q, r = np.linalg.qr(root * P)
    stacked = Y.comm.allgather(r)
    first = sum(len(part) for part in stacked[: Y.comm.rank])
    Q, R = np.linalg.qr(np.vstack(stacked))
    return (q @ Q[first : first + len(r)]) / root, R


class Hamiltonian:
    """H(f, r, a, b) of section 4.2, summed over the samples, with its derivatives.

    Parameters
    ----------
    Y
        The label domain; everything is collective over its communicator.
    activation
        sigma.
    convention
        "minimise" (4.1) or "maximise" (4.2).
    running
        L, if there is a running cost.
    weights
        Weights of the samples in L, of which only the proportions matter; equal ones if left out.

    Examples
    --------
    >>> H = Hamiltonian(net.Y, net.activation, "maximise")  # doctest: +SKIP
    >>> H(pair.to("maximise"), Controls.of_layer(net, 0))  # doctest: +SKIP
    """

    def __init__(
        self,
        Y: LabelSpace,
        activation: Activation,
        convention: str,
        running: RunningCost | None = None,
        weights: Sequence[float] | None = None,
    ):
        self.Y, self.activation, self.convention = Y, activation, _checked(convention)
        self._running, self._weights = running, weights
        self._sign = 1.0 if convention == "minimise" else -1.0

    @classmethod
    def of(cls, problem: LearningProblem, convention: str) -> Hamiltonian:
        """That of a learning problem."""
        net = problem.net
        return cls(net.Y, net.activation, convention, problem.running, problem.batch.weights)

    def _omega(self, f: np.ndarray) -> np.ndarray:
        """Weights of the samples in L, with its sign in H."""
        return self._sign * sample_weights(self._weights, f.shape[1])

    def _own(self, pair: Pair) -> Pair:
        if pair.convention != self.convention:
            raise ValueError(
                f"pair: its co-state is one to {pair.convention}, this Hamiltonian's is one to {self.convention}; "
                f"say pair.to({self.convention!r})"
            )
        return pair

    def density(self, pair: Pair, controls: Controls) -> np.ndarray:
        """What is integrated over y, shape (nodes,)."""
        self._own(pair)
        h = np.sum(self.activation(controls.argument(self.Y, pair.f)) * pair.r, axis=1)
        if self._running is None:
            return h
        gram = self.Y.sum((self.Y.weights[:, None] * controls.psi).T @ controls.psi)
        rows = np.einsum("ni,ij,nj->n", controls.phi, gram, controls.phi)  # int b(y, z)^2 dz
        l = self._running.integrand(pair.f, controls.a)
        return h + l @ self._omega(pair.f) + self._sign * self._running.kernel / 2 * rows

    def __call__(self, pair: Pair, controls: Controls) -> float:
        """H."""
        return float(self.Y.sum(self.Y.weights @ self.density(pair, controls)))

    def in_r(self, pair: Pair, controls: Controls) -> np.ndarray:
        """H_r = sigma(u): f_t, shape (nodes, samples)."""
        return self.activation(controls.argument(self.Y, self._own(pair).f))

    def in_f(self, pair: Pair, controls: Controls) -> np.ndarray:
        """H_f = -B^T(sigma'(u) r) + L_f, or - L_f to maximise: -r_t, shape (nodes, samples)."""
        gradient = -controls.transpose(self.Y, self.slope_times_costate(pair, controls))
        if self._running is None:
            return gradient
        return gradient + self._omega(pair.f) * self._running.slopes(pair.f, controls.a)[0]

    def in_a(self, pair: Pair, controls: Controls) -> np.ndarray:
        """H_a: the sum of sigma'(u) r over the samples, +- L_a; shape (nodes,)."""
        gradient = np.sum(self.slope_times_costate(pair, controls), axis=1)
        if self._running is None:
            return gradient
        return gradient + self._running.slopes(pair.f, controls.a)[1] @ self._omega(pair.f)

    def in_b(self, pair: Pair, controls: Controls) -> tuple[np.ndarray, np.ndarray]:
        """H_b(y, z) = - sum_s sigma'(u_s(y)) r_s(y) f_s(z) +- kappa b(y, z), by its factors in y and z."""
        p, q = -self.slope_times_costate(pair, controls), pair.f
        if self._running is None or self._running.kernel == 0.0:
            return p, q
        return np.hstack([p, self._sign * self._running.kernel * controls.phi]), np.hstack([q, controls.psi])

    def slope_times_costate(self, pair: Pair, controls: Controls) -> np.ndarray:
        """v = sigma'(u) r, shape (nodes, samples)."""
        return self.activation.derivative(controls.argument(self.Y, self._own(pair).f)) * pair.r


# -- along a network's run -------------------------------------------------------------------------------------------


def middle_pairs(run: Run, convention: str) -> list[Pair]:
    """f and r at the middle of each layer, of a run on a tape whose functional has been differentiated. Collective."""
    ends = _end_pairs(run, convention)
    return [Pair((p.f + q.f) / 2, (p.r + q.r) / 2, convention) for p, q in zip(ends, ends[1:])]


def _end_pairs(run: Run, convention: str) -> list[Pair]:
    run.net.refuse_gradient_flow("maximum principle")
    values = run.net.Y.values
    return [
        Pair(np.array(values(run.state(l))), np.array(values(run.costate(l))), "minimise").to(convention)
        for l in range(run.net.layers + 1)
    ]


def hamiltonian_along(run: Run, H: Hamiltonian) -> np.ndarray:
    """H at both ends of each layer, with the controls there: shape (L, 2). Collective.

    For controls constant in time it is constant, optimal or not, up to the order of the scheme; along an optimal pair max H
    is. The run is on a tape, and its functional has been differentiated.
    """
    ends = _end_pairs(run, H.convention)
    return np.array(
        [[H(ends[l + e], Controls.of_layer(run.net, l, float(e))) for e in (0, 1)] for l in range(run.net.layers)]
    ).reshape(-1, 2)


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
    ValueError
        For more than one sample: (4.10) then no longer maximises H.
    """
    if pair.f.shape[1] != 1:
        raise ValueError(f"pair: (4.10) holds for one sample, {pair.f.shape[1]} were given")
    f, r = pair.f[:, 0], pair.to("maximise").r[:, 0]
    parts = _parts(Y, f)
    high, low = A.largest(*parts), A.smallest(*parts)
    up = r >= -tie
    controls = Controls(
        np.where(up, high.a, low.a),
        np.column_stack([up, ~up]).astype(float),
        np.column_stack([np.where(f >= -tie, e.where_positive, e.where_negative) for e in (high, low)]),
    )
    ties = Y.sum(np.array([Y.weights @ (np.abs(x) <= tie) for x in (r, f)]))
    return Extremal(controls, float(ties[0]), float(ties[1]))


# -- the residual ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Residual:
    """How far a network's controls are from the maximum principle.

    Attributes
    ----------
    lower, upper : float
        Bracket of int max H - H dt, relative to int int abs(sigma(u)) abs(r*) dy dt; equal for one sample. No unit.
    absolute : tuple of float
        The same, not divided.
    density : numpy.ndarray
        Where it is violated: the upper bound of max h - h at the nodes, one column a layer, shape (nodes, layers).
    Y : LabelSpace
    times : numpy.ndarray
        Layer times, shape (L + 1,).
    reached : bool
        Whether r* = 0: the target is reached, and the maximum principle says nothing.
    """

    lower: float
    upper: float
    absolute: tuple[float, float]
    density: np.ndarray
    Y: LabelSpace
    times: np.ndarray
    reached: bool

    def __str__(self) -> str:
        if self.reached:
            return "no information from the maximum principle: r* = 0, the target is reached; use the gradient"
        return f"relative PMP residual between {self.lower:.3e} and {self.upper:.3e}"

    def plot(self, axes) -> list:
        """Draw the violation over Y, one picture a layer, into as many matplotlib axes, for meshes of the plane. Collective.

        Rank 0 draws; the nodes are gathered, since a figure needs all of them.
        """
        Y = self.Y
        x = Y.coordinates
        if x.shape[1] != 2:
            raise ValueError(f"plot: a mesh of the plane is wanted, this one lies in {x.shape[1]} dimensions")
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


def pmp_residual(problem: LearningProblem, A: ControlSet, *, tolerance: float = 1e-12, rounds: int = 4) -> Residual:
    """int max H - H dt at the present parameters of a learning problem without regulariser. Collective.

    Exact for one sample, in (4.10). For many samples max H is no longer explicit: it is at most the integral of
    `sum_s max(sigma(T_s^-) r_s, sigma(T_s^+) r_s)`, and at least what the best controls tried give: at each y the best row
    (a, b(y, .)) of a pool, made of the extremal rows of each sample and grown by those that linear maximisation of H asks for.

    Parameters
    ----------
    tolerance
        r* up to this, in its own unit, everywhere, is none.
    rounds
        How often the pool grows.

    Raises
    ------
    ValueError
        If there is a regulariser or a running cost that depends on (a, b), or sigma does not increase.
    """
    net = problem.net
    refuse_costs_of_controls(problem)
    if not net.activation.properties.non_decreasing:
        raise ValueError(f"activation: one that does not decrease is wanted, {net.activation.name} does")
    J, run = problem.record()
    J.derivative()
    Y, H = net.Y, Hamiltonian.of(problem, "maximise")
    low = high = size = largest = 0.0
    columns = []
    for l, pair in enumerate(middle_pairs(run, "maximise")):
        controls, tau = Controls.of_layer(net, l), net.times[l + 1] - net.times[l]
        h = np.sum(H.in_r(pair, controls) * pair.r, axis=1)  # a running cost of f alone is in both, and drops out
        at_most = _upper(H, A, pair)
        at_least = at_most if pair.f.shape[1] == 1 else np.maximum(h, _best_of_pool(H, A, pair, rounds))
        sums = Y.sum(
            Y.weights @ np.column_stack([at_least - h, at_most - h, np.sum(np.abs(H.in_r(pair, controls) * pair.r), axis=1)])
        )
        low, high, size = low + tau * sums[0], high + tau * sums[1], size + tau * sums[2]
        largest = max(largest, *Y.comm.allgather(float(np.abs(pair.r).max(initial=0.0))))
        columns.append(at_most - h)
    reached = largest <= tolerance
    scale = 0.0 if reached or size == 0 else 1 / size
    density = np.column_stack(columns) if columns else np.zeros((Y.nodes, 0))
    return Residual(scale * low, scale * high, (low, high), density, Y, net.times, reached)


def refuse_costs_of_controls(problem: LearningProblem) -> None:
    """Raise ValueError where J depends on (a, b) by more than f, so that (4.10) does not hold."""
    if problem.regulariser is not None or problem.derivatives is not None:
        raise ValueError("problem: one without regulariser and derivatives is wanted; (4.10) does not hold with them")
    if problem.running is not None and not problem.running.of_state_alone:
        raise ValueError("problem: its running cost depends on (a, b), and (4.10) then does not hold; one of f alone is wanted")


def _extremes(A: ControlSet, parts) -> np.ndarray:
    """T^+ and T^-."""
    return np.array([A.largest(*parts).value, A.smallest(*parts).value])


def _upper(H: Hamiltonian, A: ControlSet, pair: Pair) -> np.ndarray:
    """What max h is at most, but for the running cost."""
    T = _extremes(A, _parts(H.Y, pair.f))
    return np.sum(np.maximum(*(H.activation(t) * pair.r for t in T)), axis=1)


def _best_of_pool(H: Hamiltonian, A: ControlSet, pair: Pair, rounds: int, new: int = 16) -> np.ndarray:
    """max over rows of a pool, at each node, of sum_s sigma(T_s(row)) r_s: H never falls as the pool grows."""
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
    extreme = (A.largest if total >= 0 else A.smallest)(*_parts(Y, mixed))
    b = np.where(mixed >= 0, extreme.where_positive, extreme.where_negative)
    return extreme.a - Y.sum((Y.weights * b) @ f)
