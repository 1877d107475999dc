"""Controls for many samples: rows (a(y), b(y, .)) free in y, and the larger Hamiltonian at each y.

For many samples (4.10) no longer maximises H. With phi nodal and psi a fixed basis, b(y, z) = sum_k X_k(y) psi_k(z), the
rows are free in y, and H is the integral over y of one function of 1 + rank unknowns at each y,

    h(a, X) = sum_s r*_s(y) sigma(a - X . g_s),        g_s = Psi^T M f_s,

which is not concave. It is raised by projected ascent, all y at once, each y with a step length of its own: h never falls
at any y. A set is a box or a ball in (a(y), X(y)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fem_resnet.basis import Basis
from fem_resnet.maximum_principle import Controls, Hamiltonian, Pair
from fem_resnet.retraction import orthonormal

__all__ = ["RowBall", "RowBox", "raise_rows"]


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
        for name, (low, high) in (("bias", self.bias), ("kernel", self.kernel)):
            if not (np.isfinite([low, high]).all() and low <= high):
                raise ValueError(f"{name}: finite (low, high) with low <= high is wanted, {(low, high)} was given")

    def project(self, rows: np.ndarray) -> np.ndarray:
        """The nearest rows (a, X) of the box; shape (nodes, 1 + rank) to the same."""
        return np.column_stack([np.clip(rows[:, 0], *self.bias), np.clip(rows[:, 1:], *self.kernel)])


class RowBall:
    """a(y)^2 + int b(y, z)^2 dz <= R^2 at each y, the rows in the span of psi.

    Parameters
    ----------
    psi
        The basis of rows; its span counts, and an orthonormal basis of that is kept.
    radius
        R > 0.
    """

    def __init__(self, psi: Basis, radius: float):
        if not (np.isfinite(radius) and radius > 0):
            raise ValueError(f"radius: a positive number is wanted, {radius!r} was given")
        self.psi, self.radius = orthonormal(psi), float(radius)

    def project(self, rows: np.ndarray) -> np.ndarray:
        """The nearest rows (a, X) of the ball."""
        return rows / np.maximum(1.0, np.linalg.norm(rows, axis=1) / self.radius)[:, None]


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

    Returns
    -------
    controls, values : Controls, numpy.ndarray
        H of the start (in A) and of each step, which does not fall.
    """
    if H.convention != "maximise":
        raise ValueError('H: one to "maximise" is wanted')
    Y, sigma, psi, r = H.Y, H.activation, A.psi, pair.r
    features = np.column_stack([np.ones(r.shape[1]), -psi.project(pair.f).T])
    seen = np.linalg.solve(psi.gram, Y.sum(psi.weighted.T @ controls.psi))
    rows = A.project(np.column_stack([controls.a, controls.phi @ seen.T]))

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
    if np.any(np.diff(values) < -1e-12 * (1 + np.abs(values[0]))):
        raise AssertionError("H fell: this cannot be, please report it")
    return _controls(A, rows), np.array(values)


def _controls(A: RowBox | RowBall, rows: np.ndarray) -> Controls:
    return Controls(rows[:, 0], rows[:, 1:], A.psi.values)
