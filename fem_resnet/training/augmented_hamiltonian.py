"""The augmented Hamiltonian of Li, Chen, Tai and E (2018), and a step that makes it larger on one layer.

    H(f, r, theta) - rho/2 |f_t - H_r(f, r, theta)|^2 - rho/2 |r_t + H_f(f, r, theta)|^2

Here theta = (a, b), f_t and r_t belong to the present controls, and the norms to L2(Y). H_f couples all y, so
there is one problem for each layer.
"""

from __future__ import annotations

import numpy as np

from fem_resnet.control.controls import Controls
from fem_resnet.control.hamiltonian import Hamiltonian, Pair

__all__ = ["augmented_step"]


def augmented_step(
    H: Hamiltonian, pair: Pair, controls: Controls, extremal: Controls, rho: float, iterations: int = 30
) -> tuple[Controls, np.ndarray]:
    """Controls of a larger augmented Hamiltonian, and its values at the start and after each step. Collective.

    The controls are controls + s(y) (extremal - controls) with a share s(y) in [0, 1] at each y. The shares are found by
    projected ascent with backtracking from s = 0, so the values never fall. For rho = 0 the extremal controls are taken, s
    = 1. A running cost is one of f alone, the same for all controls, and the values leave it out.
    """
    Y, sigma = H.Y, H.activation
    f, r, weights = pair.f, pair.r, Y.weights[:, None]
    u, e = controls.argument(Y, f), extremal.argument(Y, f)
    difference, rate = e - u, sigma(u)
    slope = -controls.transpose(Y, H.slope_times_costate(pair, controls))  # a running cost of f alone cancels in `change`

    def evaluate(s: np.ndarray) -> tuple[float, np.ndarray]:
        """The augmented Hamiltonian, and its gradient in s in L2(Y), shape (nodes,)."""
        v = u + s[:, None] * difference
        excess = sigma(v) - rate
        inner = sigma.derivative(v) * r
        mine, theirs = (1 - s)[:, None] * inner, s[:, None] * inner
        change = -controls.transpose(Y, mine) - extremal.transpose(Y, theirs) - slope
        value = Y.sum(np.sum(weights * (sigma(v) * r - rho / 2 * (excess**2 + change**2))))
        # The derivative of `change` is -(B_s)^T(sigma'' r du) - (B_e - B_c)^T(sigma' r ds), applied to `change` by its
        # transpose.
        B_c, B_e = (-(c.argument(Y, change) - c.a[:, None]) for c in (controls, extremal))
        B_s = (1 - s)[:, None] * B_c + s[:, None] * B_e
        gradient = difference * (inner - rho * excess * sigma.derivative(v)) + rho * (
            B_s * sigma.second_derivative(v) * r * difference + (B_e - B_c) * inner
        )
        return float(value), np.sum(gradient, axis=1)

    s = np.zeros(Y.nodes)
    value, gradient = evaluate(s)
    history, length = [value], 1.0 / max(1e-300, float(max(Y.comm.allgather(np.abs(gradient).max(initial=0.0)))))
    if rho == 0:
        return extremal, np.array([value, evaluate(np.ones(Y.nodes))[0]])
    for _ in range(iterations):
        while True:
            trial = np.clip(s + length * gradient, 0, 1)
            new_value, new_gradient = evaluate(trial)
            moved = float(Y.sum(Y.weights @ (trial - s) ** 2))
            if new_value >= value + 1e-4 * moved / length or moved == 0 or length < 1e-300:
                break
            length /= 2
        if moved <= 1e-24 * Y.measure or new_value < value:
            break
        s, value, gradient = trial, new_value, new_gradient
        history.append(value)
        length *= 2
    return controls.towards(extremal, s), np.array(history)
