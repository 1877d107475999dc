"""The minimisers of int Sigma(a - B f) dy: the steady states of a gradient flow where sigma(u) need not vanish."""

from __future__ import annotations

import numpy as np
import scipy.optimize

from fem_resnet.theory.spectra.autonomous import AutonomousProblem

__all__ = ["least_integral"]

_NEWTON_STEPS = 100


def least_integral(problem: AutonomousProblem) -> np.ndarray:
    """The numbers (psi_l, f) at a minimiser of int Sigma(a - B f) dy, shape (r,). Collective.

    If the integral has no minimiser, they belong to an f far out. The search takes the coordinates x = D c of B f, whose
    accuracy does not suffer from small singular values.

    Parameters
    ----------
    problem
        A gradient flow with a non-decreasing sigma, for which the integral is convex.
    """
    system, sigma, Y = problem.system, problem.activation, problem.Y

    def u(x: np.ndarray) -> np.ndarray:
        return problem.bias[:, None] - system.left_values(x[:, None])

    def slope(x: np.ndarray) -> np.ndarray:
        return -system.left_coefficients(sigma(u(x)))[:, 0]

    def curvature(x: np.ndarray) -> np.ndarray:
        return system.squared.weighted(sigma.derivative(u(x))[:, 0])

    x = np.zeros(system.rank)
    if not system.rank:
        return x
    size = 1.0 + problem.norms(problem.bias[:, None])[0]
    found = scipy.optimize.minimize(
        lambda x: float(Y.sum(Y.weights @ sigma.primitive(u(x)))[0]), x, jac=slope, hess=curvature, method="trust-exact",
        options={"gtol": 1e-6 * np.linalg.norm(slope(x)), "initial_trust_radius": size, "max_trust_radius": 1e3 * size},
    )  # fmt: skip
    # The value of the integral determines half of the digits of its minimiser. Newton's method finds the others.
    x, left = found.x, np.linalg.norm(slope(found.x))
    for _ in range(_NEWTON_STEPS):
        new = x - np.linalg.lstsq(curvature(x), slope(x), rcond=1e-14)[0]
        after = np.linalg.norm(slope(new))
        if not after < left:
            break
        x, left = new, after
    return x / system.values
