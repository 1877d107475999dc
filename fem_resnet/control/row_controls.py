"""Controls of many samples that enlarge the Hamiltonian of section 4.2.

For many samples (4.10) does not maximise H. Where rows are free in y (`row_sets`), H is the integral over y of a function of
1 + rank unknowns at each y,

    h(a, X) = sum_s r*_s(y) sigma(a - X . g_s),        g_s = Psi^T M f_s.

It is not concave. Projected ascent makes it larger at all y at once. Each y has its own step length, so h falls at no y.

Where both bases are fixed, X = Phi beta, and all y share beta. There is one problem for each layer in (a, beta),

    H(a, beta) = sum_s int r*_s sigma(a - Phi beta g_s) dy,        H_beta = - sum_s Phi^T M (r*_s sigma'(u_s)) g_s^T.

Projected ascent with one step length makes H larger.

Tikhonov's terms and running costs of the controls are a part of H (`hamiltonian`). They are integrals over y of functions of
the row at y, so h has them too, and nothing else changes. Where a strictly convex cost is large enough h is concave.
"""

from __future__ import annotations

import numpy as np

from fem_resnet.arguments import instance, integer
from fem_resnet.control.controls import Controls
from fem_resnet.control.hamiltonian import Hamiltonian, Pair
from fem_resnet.control.row_sets import (
    RowBall,
    RowBox,
    SpanBox,
    coefficients_of_controls,
    controls_of_rows,
    controls_of_span,
    rows_of_controls,
)
from fem_resnet.ranks import same

__all__ = ["raise_controls"]


def raise_controls(
    H: Hamiltonian, A: RowBox | RowBall | SpanBox, pair: Pair, controls: Controls, iterations: int = 100
) -> tuple[Controls, np.ndarray]:
    """Controls in A of a larger Hamiltonian, by projected ascent. Collective over the communicator of H's label domain.

    The ascent starts from the nearest controls in A, after projection onto the span of A's bases. H does not fall in any
    step, and for `RowBox` and `RowBall` its density falls at no y.

    Parameters
    ----------
    H
        The Hamiltonian, to "maximise".
    A
        The set of controls, with bases on H's label space.
    pair
        f and r* of any number of samples, to "maximise".
    controls
        (a, b) to start from.
    iterations
        The most steps that are taken.

    Returns
    -------
    controls : Controls
        In A.
    values : numpy.ndarray
        H at the start (in A) and after each step, shape (steps + 1,).

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind, has another label space or convention, or differs between ranks.
    """
    instance("H", H, Hamiltonian)
    same(H.Y.comm, A=A, pair=getattr(pair, "convention", pair), iterations=iterations)
    if H.convention != "maximise":
        raise ValueError(f"H: expected a Hamiltonian to 'maximise', got one to {H.convention!r}")
    if instance("A", A, (RowBox, RowBall, SpanBox)).psi.Y is not H.Y:
        raise ValueError(f"A: expected bases on the label space of H, {H.Y!r}, got {A.psi.Y!r}")
    instance("pair", pair, Pair)
    instance("controls", controls, Controls)
    iterations = integer("iterations", iterations, least=0)
    if isinstance(A, SpanBox):
        return _raise_together(H, A, pair, controls, iterations)
    return _raise_each_row(H, A, pair, controls, iterations)


def _raise_together(
    H: Hamiltonian, A: SpanBox, pair: Pair, controls: Controls, iterations: int
) -> tuple[Controls, np.ndarray]:
    """Ascent in (a, beta) with one step length for all y."""
    Y, phi, psi = H.Y, A.phi, A.psi
    g = psi.project(pair.f)
    a, beta = coefficients_of_controls(A, controls)
    # A step must not depend on units. So |a|^2 is divided by |Y|, |beta|^2 by its size for b = 1 / |Y|, and H by int |r|.
    unit = phi.rank * psi.rank / (np.trace(phi.gram) * np.trace(psi.gram))
    size = float(Y.sum(Y.weights @ np.sum(np.abs(pair.r), axis=1))) + Y.measure * H.tikhonov[0] + H.kernel_weight
    first = 1 / max(size, np.finfo(float).tiny)
    values, length = [H(pair, controls_of_span(A, a, beta))], first
    for _ in range(iterations):
        here = controls_of_span(A, a, beta)
        v = H.slope_times_costate(pair, here)
        in_a, in_beta = Y.measure * np.sum(v, axis=1), -unit * phi.project(v) @ g.T
        if H.charges_controls:
            in_a -= Y.measure * H.cost_in_a(pair, here)
            in_beta -= unit * H.kernel_weight * (phi.gram @ beta @ psi.gram)
        while True:
            new_a, new_beta = A.project(a + length * in_a, beta + length * in_beta)
            moved = float(Y.sum(Y.weights @ (new_a - a) ** 2)) / Y.measure + float(np.sum((new_beta - beta) ** 2)) / unit
            value = H(pair, controls_of_span(A, new_a, new_beta))
            if value >= values[-1] + 1e-4 * moved / length or length < 1e-12 * first:
                break
            length /= 2
        if value <= values[-1]:
            break
        a, beta, length = new_a, new_beta, 2 * length
        values.append(value)
    return controls_of_span(A, a, beta), np.array(values)


def _raise_each_row(
    H: Hamiltonian, A: RowBox | RowBall, pair: Pair, controls: Controls, iterations: int
) -> tuple[Controls, np.ndarray]:
    """Ascent in (a, X) with a step length for each y."""
    Y, sigma, psi, r = H.Y, H.activation, A.psi, pair.r
    features = np.column_stack([np.ones(r.shape[1]), -psi.project(pair.f).T])
    rows = A.project(rows_of_controls(A, controls))

    def bias(rows: np.ndarray) -> Controls:
        return Controls(rows[:, 0], np.zeros((Y.nodes, 0)), np.zeros((Y.nodes, 0)))

    def cost(rows: np.ndarray) -> np.ndarray:
        return H.cost(pair, bias(rows)) + H.kernel_weight / 2 * np.sum(rows[:, 1:] @ psi.gram * rows[:, 1:], axis=1)

    def density(rows: np.ndarray) -> np.ndarray:
        h = np.sum(r * sigma(rows @ features.T), axis=1)  # a running cost of f alone is the same for all rows
        return h - cost(rows) if H.charges_controls else h

    def slope(rows: np.ndarray) -> np.ndarray:
        gradient = (r * sigma.derivative(rows @ features.T)) @ features
        if H.charges_controls:
            gradient[:, 0] -= H.cost_in_a(pair, bias(rows))
            gradient[:, 1:] -= H.kernel_weight * rows[:, 1:] @ psi.gram
        return gradient

    h = density(rows)
    values = [H(pair, controls_of_rows(A, rows))]
    # Where sigma'' is of size one, 1 / length bounds the slope of the gradient. Steps adapt from there.
    bend = H.tikhonov[0] + H.kernel_weight * np.linalg.norm(psi.gram, 2)
    length = 1 / np.maximum(np.abs(r) @ np.sum(features**2, axis=1) + bend, 1e-300)
    for _ in range(iterations):
        trial = A.project(rows + length[:, None] * slope(rows))
        new = density(trial)
        rises = new > h
        rows, h = np.where(rises[:, None], trial, rows), np.where(rises, new, h)
        length = np.where(rises, 2 * length, length / 4)
        values.append(H(pair, controls_of_rows(A, rows)))
        if not Y.sum(float(np.any(rises))):
            break
    sizes = np.sum(np.abs(r) * (1 + np.abs(sigma(rows @ features.T))), axis=1)
    if H.charges_controls:
        sizes += np.abs(cost(rows))
    size = float(Y.sum(Y.weights @ sizes))
    if np.any(np.diff(values) < -1e-12 * size):
        raise AssertionError("raise_controls: H fell, which is a fault of this package; please report it")
    return controls_of_rows(A, rows), np.array(values)
