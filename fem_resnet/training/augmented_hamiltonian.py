"""The augmented Hamiltonian of Li, Chen, Tai and E (2018), and a step that makes it larger on one layer.

    H(f, r, theta) - rho/2 |f_t - H_r(f, r, theta)|^2 - rho/2 |r_t + H_f(f, r, theta)|^2

Here theta = (a, b), f_t and r_t belong to the present controls, and the norms to L2(Y). H_f couples all y, so
there is one problem for each layer.
"""

from __future__ import annotations

import numpy as np

from fem_resnet.control.controls import Controls
from fem_resnet.control.hamiltonian import Hamiltonian, Pair
from fem_resnet.label_domain.label_space import LabelSpace

__all__ = ["augmented_step"]


def augmented_step(
    H: Hamiltonian, pair: Pair, controls: Controls, extremal: Controls, rho: float, iterations: int = 30
) -> tuple[Controls, np.ndarray]:
    """Controls of a larger augmented Hamiltonian, and its values at the start and after each step. Collective.

    The controls are controls + s(y) (extremal - controls) with a share s(y) in [0, 1] at each y. The shares are found by
    projected ascent with backtracking from s = 0, so the values never fall. For rho = 0 and no cost of the controls the
    extremal controls are taken, s = 1. A running cost of f alone is the same for all controls, and the values leave it out;
    one of the controls, and Tikhonov's terms, they have.
    """
    Y, sigma = H.Y, H.activation
    f, r, weights = pair.f, pair.r, Y.weights[:, None]
    u, e = controls.argument(Y, f), extremal.argument(Y, f)
    difference, rate = e - u, sigma(u)
    slope = -controls.transpose(Y, H.slope_times_costate(pair, controls))  # a running cost of f alone cancels in `change`
    cost = _Cost(H, pair, controls, extremal) if H.charges_controls else None

    def evaluate(s: np.ndarray) -> tuple[float, np.ndarray]:
        """The augmented Hamiltonian, and its gradient in s in L2(Y), shape (nodes,)."""
        v = u + s[:, None] * difference
        excess = sigma(v) - rate
        inner = sigma.derivative(v) * r
        mine, theirs = (1 - s)[:, None] * inner, s[:, None] * inner
        change = -controls.transpose(Y, mine) - extremal.transpose(Y, theirs) - slope
        if cost is not None:
            charged, charged_by, in_f, in_f_by = cost.at(s)
            change = change - in_f
        value = Y.sum(np.sum(weights * (sigma(v) * r - rho / 2 * (excess**2 + change**2))))
        # The derivative of `change` is -(B_s)^T(sigma'' r du) - (B_e - B_c)^T(sigma' r ds), applied to `change` by its
        # transpose.
        B_c, B_e = (-(c.argument(Y, change) - c.a[:, None]) for c in (controls, extremal))
        B_s = (1 - s)[:, None] * B_c + s[:, None] * B_e
        gradient = difference * (inner - rho * excess * sigma.derivative(v)) + rho * (
            B_s * sigma.second_derivative(v) * r * difference + (B_e - B_c) * inner
        )
        if cost is None:
            return float(value), np.sum(gradient, axis=1)
        gradient = np.sum(gradient + rho * change * in_f_by, axis=1) - charged_by
        return float(value) - float(Y.sum(Y.weights @ charged)), gradient

    s = np.zeros(Y.nodes)
    value, gradient = evaluate(s)
    history, length = [value], 1.0 / max(1e-300, float(max(Y.comm.allgather(np.abs(gradient).max(initial=0.0)))))
    if rho == 0 and cost is None:
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


class _Cost:
    """The cost of controls + s(y) (extremal - controls), as a function of the shares s."""

    def __init__(self, H: Hamiltonian, pair: Pair, controls: Controls, extremal: Controls):
        self._H, self._pair, self._a, self._change = H, pair, controls.a, extremal.a - controls.a
        self._none = np.zeros((len(controls.a), 0))
        self._rows = _rows_of(H.Y, controls, extremal)
        self._before = H.cost_in_f(pair, self._bias(np.zeros(len(controls.a))))[0]

    def _bias(self, s: np.ndarray) -> Controls:
        return Controls(self._a + s * self._change, self._none, self._none)

    def at(self, s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The cost and its derivative in s, shape (nodes,); the change of L_f and its derivative, shape (nodes, samples)."""
        H, pair, bias, (mine, both, theirs) = self._H, self._pair, self._bias(s), self._rows
        squares = (1 - s) ** 2 * mine + 2 * s * (1 - s) * both + s**2 * theirs
        slopes = (s - 1) * mine + (1 - 2 * s) * both + s * theirs  # half the derivative of the squares
        in_f, mixed = H.cost_in_f(pair, bias)
        return (
            H.cost(pair, bias) + H.kernel_weight / 2 * squares,
            H.cost_in_a(pair, bias) * self._change + H.kernel_weight * slopes,
            in_f - self._before,
            mixed * self._change[:, None],
        )


def _rows_of(Y: LabelSpace, controls: Controls, other: Controls) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int b_1^2, int b_1 b_2 and int b_2^2 over z for the kernels of two controls, shape (nodes,) each. Collective."""
    psi, split = np.hstack([controls.psi, other.psi]), controls.psi.shape[1]
    gram = Y.sum((Y.weights[:, None] * psi).T @ psi)
    ones, twos = gram[:, :split] @ controls.phi.T, gram[:, split:] @ other.phi.T
    return (
        np.sum(controls.phi * ones[:split].T, axis=1),
        np.sum(controls.phi * twos[:split].T, axis=1),
        np.sum(other.phi * twos[split:].T, axis=1),
    )
