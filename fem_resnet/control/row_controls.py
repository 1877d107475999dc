"""Controls for many samples: rows (a(y), b(y, .)) free in y, and the larger Hamiltonian at each y.

For many samples (4.10) no longer maximises H. With phi nodal and psi a fixed basis, b(y, z) = sum_k X_k(y) psi_k(z), the
rows are free in y, and H is the integral over y of one function of 1 + rank unknowns at each y,

    h(a, X) = sum_s r*_s(y) sigma(a - X . g_s),        g_s = Psi^T M f_s,

which is not concave. It is raised by projected ascent, all y at once, each y with a step length of its own: h never falls
at any y. A set is a box or a ball in (a(y), X(y)).

With phi a fixed basis of low rank, X = Phi beta, all y are coupled: one problem a layer in (a, beta), on a `SpanBox`,

    H(a, beta) = sum_s int r*_s sigma(a - Phi beta g_s) dy,        H_beta = - sum_s Phi^T M (r*_s sigma'(u_s)) g_s^T,

raised by projected ascent with one step length, so that H itself does not fall.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fem_resnet.arguments import instance, integer, number, real_array
from fem_resnet.control.hamiltonian import Controls, Hamiltonian, Pair, orthonormal_factor
from fem_resnet.fixed import Fixed
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.orthonormal import orthonormal
from fem_resnet.ranks import same

__all__ = ["RowBall", "RowBox", "SpanBox", "distance", "nearest_controls", "raise_controls", "raise_rows", "raise_span"]


@dataclass(frozen=True)
class RowBox:
    """a- <= a(y) <= a+ and b- <= X_k(y) <= b+: a box in the coefficients, of b itself where psi are indicators of cells.

    Parameters
    ----------
    psi
        The basis of rows.
    bias, kernel
        (a-, a+) and (b-, b+).
    """

    psi: Basis
    bias: Sequence[float]
    kernel: Sequence[float]

    def __post_init__(self):
        instance("psi", self.psi, Basis)
        _check_ends(self)

    def project(self, rows: np.ndarray) -> np.ndarray:
        """The nearest rows (a, X) of the box; shape (any, 1 + rank) to the same."""
        rows = _checked_rows(self, rows)
        return np.column_stack([np.clip(rows[:, 0], *self.bias), np.clip(rows[:, 1:], *self.kernel)])


class RowBall(Fixed):
    """a(y)^2 + int b(y, z)^2 dz <= R^2 at each y, the rows in the span of psi.

    Parameters
    ----------
    psi
        The basis of rows; its span counts, and an orthonormal basis of that is kept.
    radius
        R > 0.
    """

    def __init__(self, psi: Basis, radius: float):
        same(instance("psi", psi, Basis).Y.comm, radius=radius)
        self.radius = number("radius", radius, above=0)
        self.psi = orthonormal(psi)

    @property
    def description(self) -> float:
        """What tells this set from others on a basis, so that ranks can be compared (`ranks.same`)."""
        return self.radius

    def project(self, rows: np.ndarray) -> np.ndarray:
        """The nearest rows (a, X) of the ball."""
        rows = _checked_rows(self, rows)
        return rows / np.maximum(1.0, np.linalg.norm(rows, axis=1) / self.radius)[:, None]


@dataclass(frozen=True)
class SpanBox:
    """a- <= a(y) <= a+ and beta- <= beta_ij <= beta+ with b = sum phi_i beta_ij psi_j: both bases fixed.

    A box in the coefficients: of b itself only where both bases are indicators of cells.

    Parameters
    ----------
    phi, psi
        The bases, on one label space.
    bias, kernel
        (a-, a+) and (beta-, beta+).
    """

    phi: Basis
    psi: Basis
    bias: Sequence[float]
    kernel: Sequence[float]

    def __post_init__(self):
        instance("phi", self.phi, Basis)
        instance("psi", self.psi, Basis)
        _check_ends(self)
        if self.phi.Y is not self.psi.Y:
            raise ValueError(f"phi, psi: expected one label space, got {self.phi.Y!r} and {self.psi.Y!r}")

    def project(self, a: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest bias and coefficients of the box."""
        a = real_array("a", a, (self.phi.Y.nodes,), finite=False)
        beta = real_array("beta", beta, (self.phi.rank, self.psi.rank), finite=False)
        return np.clip(a, *self.bias), np.clip(beta, *self.kernel)


def nearest_controls(A: RowBox | RowBall | SpanBox, controls: Controls) -> Controls:
    """The nearest controls in A, of those projected onto the span that A has. Collective."""
    if isinstance(A, SpanBox):
        a, beta = A.project(controls.a, _seen(A.phi, controls.phi) @ _seen(A.psi, controls.psi).T)
        return Controls(a, A.phi.values @ beta, A.psi.values)
    return _controls(A, A.project(_rows(A, controls)))


def distance(Y: LabelSpace, controls: Controls, other: Controls) -> tuple[float, tuple[float, ...]]:
    """How far apart (a(y), b(y, .)) are at the node y where they are farthest, and y. Collective.

    In parts of the largest a, and of the largest b(y, .) in L2(Y), of either.
    """
    _, R = orthonormal_factor(Y, np.hstack([controls.psi, other.psi]))
    mine, theirs = controls.phi @ R[:, : controls.psi.shape[1]].T, other.phi @ R[:, controls.psi.shape[1] :].T

    def largest(*parts):
        return max(*Y.comm.allgather(max(float(np.abs(part).max(initial=0.0)) for part in parts)), np.finfo(float).tiny)

    rows = [np.linalg.norm(part, axis=1) for part in (mine, theirs, mine - theirs)]
    apart = np.maximum(np.abs(controls.a - other.a) / largest(controls.a, other.a), rows[2] / largest(rows[0], rows[1]))
    x = Y.coordinates  # made by all ranks, when first asked for
    i = int(np.argmax(apart)) if apart.size else None
    mine_worst = (0.0, ()) if i is None else (float(apart[i]), tuple(map(float, x[i])))
    return max(Y.comm.allgather(mine_worst))


def _seen(basis: Basis, functions: np.ndarray) -> np.ndarray:
    """Coefficients of the functions' projections onto the span of a basis."""
    return np.linalg.solve(basis.gram, basis.Y.sum(basis.weighted.T @ functions))


def _rows(A: RowBox | RowBall, controls: Controls) -> np.ndarray:
    """(a, X), shape (nodes, 1 + rank), of controls projected onto the span of psi."""
    return np.column_stack([controls.a, controls.phi @ _seen(A.psi, controls.psi).T])


def raise_controls(
    H: Hamiltonian, A: RowBox | RowBall | SpanBox, pair: Pair, controls: Controls, iterations: int = 100
) -> tuple[Controls, np.ndarray]:
    """Controls in A whose Hamiltonian to maximise is no less, and H after each step: `raise_rows`, or `raise_span`."""
    return (raise_span if isinstance(A, SpanBox) else raise_rows)(H, A, pair, controls, iterations)


def raise_span(
    H: Hamiltonian, A: SpanBox, pair: Pair, controls: Controls, iterations: int = 100
) -> tuple[Controls, np.ndarray]:
    """Controls in A whose Hamiltonian to maximise is no less, and H after each step. Collective.

    From the present controls, projected onto the span of both bases and A.

    Parameters
    ----------
    pair
        f and r*, of any number of samples; convention "maximise".
    controls
        Where to start.
    iterations
        At most so many.

    Returns
    -------
    controls, values : Controls, numpy.ndarray
        H of the start (in A) and of each step, which does not fall.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind, or is for another label space.
    """
    iterations = _checked(H, A, (SpanBox,), pair, controls, iterations)
    Y, phi, psi = H.Y, A.phi, A.psi
    g = psi.project(pair.f)

    def controls_of(a, beta):
        return Controls(a, phi.values @ beta, psi.values)

    a, beta = A.project(controls.a, _seen(phi, controls.phi) @ _seen(psi, controls.psi).T)
    # Squares of a are in parts of |Y|, those of b's coefficients in parts of what theirs are for b = 1 / |Y|; H is in parts
    # of int |r|: steps then do not depend on units.
    unit = phi.rank * psi.rank / (np.trace(phi.gram) * np.trace(psi.gram))
    first = 1 / max(float(Y.sum(Y.weights @ np.sum(np.abs(pair.r), axis=1))), np.finfo(float).tiny)
    values, length = [H(pair, controls_of(a, beta))], first
    for _ in range(iterations):
        v = H.slope_times_costate(pair, controls_of(a, beta))
        in_a, in_beta = Y.measure * np.sum(v, axis=1), -unit * phi.project(v) @ g.T
        while True:
            new_a, new_beta = A.project(a + length * in_a, beta + length * in_beta)
            moved = float(Y.sum(Y.weights @ (new_a - a) ** 2)) / Y.measure + float(np.sum((new_beta - beta) ** 2)) / unit
            value = H(pair, controls_of(new_a, new_beta))
            if value >= values[-1] + 1e-4 * moved / length or length < 1e-12 * first:
                break
            length /= 2
        if value <= values[-1]:
            break
        a, beta, length = new_a, new_beta, 2 * length
        values.append(value)
    return controls_of(a, beta), np.array(values)


def raise_rows(
    H: Hamiltonian, A: RowBox | RowBall, pair: Pair, controls: Controls, iterations: int = 100
) -> tuple[Controls, np.ndarray]:
    """Controls in A whose Hamiltonian to maximise is no less, at any y, and H after each step. Collective.

    From the present rows, projected onto the span of psi and A.

    Parameters
    ----------
    pair
        f and r*, of any number of samples; convention "maximise".
    controls
        Where to start.
    iterations
        At most so many.

    Returns
    -------
    controls, values : Controls, numpy.ndarray
        H of the start (in A) and of each step, which does not fall.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind, or is for another label space.
    """
    iterations = _checked(H, A, (RowBox, RowBall), pair, controls, iterations)
    Y, sigma, psi, r = H.Y, H.activation, A.psi, pair.r
    features = np.column_stack([np.ones(r.shape[1]), -psi.project(pair.f).T])
    rows = A.project(_rows(A, controls))

    def density(rows: np.ndarray) -> np.ndarray:
        return np.sum(r * sigma(rows @ features.T), axis=1)

    h = density(rows)
    values = [H(pair, _controls(A, rows))]
    # A bound of the gradient's slope where sigma'' is of size one; steps adapt from there.
    length = 1 / np.maximum(np.abs(r) @ np.sum(features**2, axis=1), 1e-300)
    for _ in range(iterations):
        gradient = (r * sigma.derivative(rows @ features.T)) @ features
        trial = A.project(rows + length[:, None] * gradient)
        new = density(trial)
        rises = new > h
        rows, h = np.where(rises[:, None], trial, rows), np.where(rises, new, h)
        length = np.where(rises, 2 * length, length / 4)
        values.append(H(pair, _controls(A, rows)))
        if not Y.sum(float(np.any(rises))):
            break
    size = float(Y.sum(Y.weights @ np.sum(np.abs(r) * (1 + np.abs(sigma(rows @ features.T))), axis=1)))
    if np.any(np.diff(values) < -1e-12 * size):
        raise AssertionError("H fell: this cannot be, please report it")
    return _controls(A, rows), np.array(values)


def _checked(
    H: Hamiltonian, A: RowBox | RowBall | SpanBox, kinds: tuple[type, ...], pair: Pair, controls: Controls, iterations: int
) -> int:
    """Look at what controls are raised with; returns the number of iterations."""
    instance("H", H, Hamiltonian)
    same(H.Y.comm, A=A, pair=getattr(pair, "convention", pair), iterations=iterations)
    if H.convention != "maximise":
        raise ValueError('H: expected one to "maximise"')
    if instance("A", A, kinds).psi.Y is not H.Y:
        raise ValueError(f"A: expected bases on the label space of H, {H.Y!r}, got {A.psi.Y!r}")
    instance("pair", pair, Pair)
    instance("controls", controls, Controls)
    return integer("iterations", iterations, least=0)


def _checked_rows(A: RowBox | RowBall, rows: np.ndarray) -> np.ndarray:
    rows = real_array("rows", rows, finite=False)
    if rows.ndim != 2 or rows.shape[1] != 1 + A.psi.rank:
        raise ValueError(f"rows: expected shape (any, {1 + A.psi.rank}), got {rows.shape}")
    return rows


def _check_ends(A: RowBox | SpanBox) -> None:
    same(A.psi.Y.comm, bias=A.bias, kernel=A.kernel)
    for name, ends in (("bias", A.bias), ("kernel", A.kernel)):
        low, high = real_array(name, ends, (2,)).tolist()
        if low > high:
            raise ValueError(f"{name}: expected finite (low, high) with low <= high, got {(low, high)}")


def _controls(A: RowBox | RowBall, rows: np.ndarray) -> Controls:
    return Controls(rows[:, 0], rows[:, 1:], A.psi.values)
