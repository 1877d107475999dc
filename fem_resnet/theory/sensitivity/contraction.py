"""How far two solutions move apart: contraction of gradient flows (end of section 3.5), and bounds for other networks.

For the gradient flow `f_t = B^T sigma(a - B f)` with sigma' >= 0 (the paper prints <= 0),

    d/dt norm(f_1 - f_2)^2 / 2 = -(sigma(u_1) - sigma(u_2), u_1 - u_2) <= 0,

for any a and B that may depend on t. As sigma is the derivative of a convex function, F = B^T sigma(a - B f) satisfies more:
(F_1 - F_2, f_1 - f_2) <= -norm(F_1 - F_2)^2 / L with L = sup sigma' norm(B)^2. For a Runge-Kutta step of length h with
weights b_i > 0 and m_ij = b_i a_ij + b_j a_ji - b_i b_j,

    norm(f_1' - f_2')^2 <= norm(f_1 - f_2)^2 - h^2 sum_ij (m_ij + 2 / (h L) b_i delta_ij) (F_1i - F_2i, F_1j - F_2j),

where the sum is over the stages. So the discrete network contracts for `h <= 2 R / L`, where 1/R is minus the smallest
eigenvalue of m_ij / sqrt(b_i b_j). R is the radius of the generalised disk of contractivity of Dahlquist and Jeltsch.

The network (2.8) with B = B^T >= 0 and with a and B constant in time is a gradient flow for v = B^(1/2) f,
v_t = B^(1/2) sigma(a - B^(1/2) v). It contracts in norm(B^(1/2) .), in steps h <= 2 R / (sup sigma' norm(B)), but not always
in L2(Y). For any other network

    norm(f_1 - f_2)(T) <= exp(int_0^T sup sigma' norm(B) dt) norm(f_1 - f_2)(0).

The discrete network has in each step the factor `1 + z |b|^T (1 - z |A|)^-1 (1, .., 1)^T` instead, with
z = h sup sigma' norm(B).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fem_resnet.arguments import real_array
from fem_resnet.features import HELD, supports
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.theory.spectra.autonomous import sampled

__all__ = ["LipschitzBound", "circle_radius", "lipschitz_bound", "tableau"]

#: Round-off in products of coefficients of size one.
_ROUND_OFF = 1e-12
#: The fractions of a layer's time between which its coefficients are linear.
_ENDS = (0.0, 1.0)


def circle_radius(A: ArrayLike, b: ArrayLike) -> float:
    """The radius R of the disk of contractivity of a Runge-Kutta method; no unit.

    If (F(y) - F(z), y - z) <= -norm(F(y) - F(z))^2 / L, a step of length h <= 2 R / L contracts `y' = F(y)`.

    Parameters
    ----------
    A, b
        The matrix a_ij, shape (stages, stages), and the weights b_i, shape (stages,), of the method; no unit.

    Returns
    -------
    float
        R. It is infinite for an algebraically stable method. It is 0 if no step is short enough: if a weight is negative, or
        a stage of weight 0 enters other stages.

    Raises
    ------
    TypeError, ValueError
        If these are no real numbers, or the shapes do not fit.

    Examples
    --------
    >>> circle_radius([[0.0]], [1.0]), circle_radius([[0.5]], [1.0])
    (1.0, inf)
    """
    A, b = tableau(A, b)
    m = b[:, None] * A
    m = m + m.T - np.outer(b, b)
    acting = np.abs(b) > _ROUND_OFF
    if b[acting].min(initial=0.0) < 0 or not acting.any() or np.abs(m[~acting]).max(initial=0.0) > _ROUND_OFF:
        return 0.0
    root = np.sqrt(b[acting])
    smallest = np.linalg.eigvalsh(m[np.ix_(acting, acting)] / np.outer(root, root))[0]
    return float(-1 / smallest) if smallest < -_ROUND_OFF else np.inf


def tableau(A: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The matrix and the weights of a Runge-Kutta method from outside, shapes (stages, stages) and (stages,)."""
    b = real_array("b", b, ("stages",))
    return real_array("A", A, (len(b), len(b))), b


@dataclass(frozen=True)
class LipschitzBound:
    """Bounds of the distance of two solutions of a network. Get one from `lipschitz_bound`.

    Attributes
    ----------
    discrete, continuous : float
        Bounds of norm(f_1(T) - f_2(T)) / norm(f_1(0) - f_2(0)) in L2(Y), for the discrete network and for the equation; no
        unit. They are 1 where the solutions contract.
    contracts_in : str or None
        "L2" if the discrete network contracts in L2(Y); "B^(1/2)" if it contracts in norm(B^(1/2) .) only; None otherwise.
    norms : numpy.ndarray
        The largest operator norm of B on each layer, shape (L,).
    step_sizes : numpy.ndarray
        The step length h on each layer, shape (L,), in the unit of t.
    largest_steps : numpy.ndarray
        The largest h for which each layer is known to contract, shape (L,), in L2(Y), or for (2.8) in norm(B^(1/2) .); 0
        where there is none. In the unit of t.
    reason : str
        Why, in words.
    """

    discrete: float
    continuous: float
    contracts_in: str | None
    norms: np.ndarray
    step_sizes: np.ndarray
    largest_steps: np.ndarray
    reason: str

    def __str__(self) -> str:
        return f"distances grow by at most {self.discrete:.6g} (equation: {self.continuous:.6g}): {self.reason}"


@supports("channels", "no_layers", *HELD, "single_precision", "gradient_flow")
def lipschitz_bound(net: ResidualNetwork) -> LipschitzBound:
    """Bound the Lipschitz constant of f_I -> f(T) in L2(Y).

    For a gradient flow with sigma' >= 0 and steps that are short enough the bound is 1. Other networks have the bounds above
    by the norm of B. Multiplied by the norm of a head, it bounds the effect of a perturbation of the input on the output.
    Collective over the ranks of the label domain.

    Parameters
    ----------
    net
        The network, at its present coefficients, with a Runge-Kutta or theta method and fixed steps.

    Raises
    ------
    ValueError
        If steps are adapted, or PETSc has no function that returns the coefficients of the method.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, laplace_basis
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> net = ResidualNetwork(laplace_basis(Y, 2), layers=2, gradient_flow=True)
    >>> for l in range(2):
    ...     net.kernel.set(l, [[0.0, 1.0], [-1.0, 0.0]])
    >>> bound = lipschitz_bound(net)
    >>> bound.discrete, bound.contracts_in, bound.largest_steps.round(6).tolist()
    (1.0, 'L2', [2.0, 2.0])
    """
    A, b = _tableau(net)
    sigma, R, layers = net.activation.properties, circle_radius(A, b), net.layer_inputs()
    ends = np.array([[part.factors.norm(part.beta.coefficients(s), "operator") for s in _ENDS] for part in layers])
    ends = ends.reshape(-1, 2)
    lengths, norms = np.diff(net.times), ends.max(axis=1, initial=0.0)
    h = lengths / net.steps
    rates, rates_at_ends = (_rates(sigma.lipschitz, part, 2 if net.gradient_flow else 1) for part in (norms, ends))
    falls = sigma.non_decreasing and (net.gradient_flow or _is_symmetric_and_constant(net.Y, layers))
    largest = np.divide(2 * R, rates, out=np.full(len(h), np.inf), where=rates > 0) if falls else np.zeros(len(h))
    short = h <= largest * (1 + _ROUND_OFF)
    grows = np.array([_growth(A, b, z) ** net.steps for z in h * rates])
    falls_in_L2 = falls and net.gradient_flow
    return LipschitzBound(
        discrete=float(np.prod(np.where(short, 1.0, grows) if falls_in_L2 else grows)),
        # The norm of B is convex in t where B is linear in t, so that the trapezoidal rule gives an upper bound.
        continuous=1.0 if falls_in_L2 else float(np.exp(lengths @ rates_at_ends.sum(axis=1) / 2)),
        contracts_in=("L2" if net.gradient_flow else "B^(1/2)") if falls and short.all() else None,
        norms=norms, step_sizes=h, largest_steps=largest, reason=_reason(net, falls, R, short),
    )  # fmt: skip


def _rates(lipschitz: float, norms: np.ndarray, power: int) -> np.ndarray:
    """The rates sup sigma' norm(B)^power, shape of `norms`; 0 where B = 0, also for an unbounded sigma'."""
    return np.where(norms > 0, lipschitz, 0.0) * norms**power


def _reason(net: ResidualNetwork, falls: bool, R: float, short: np.ndarray) -> str:
    rests_on = ("lipschitz", "non_decreasing") if falls else ("lipschitz",)
    return _why(net, falls, R, short) + sampled(net.activation, *rests_on)


def _why(net: ResidualNetwork, falls: bool, R: float, short: np.ndarray) -> str:
    if not net.activation.properties.non_decreasing:
        return f"{net.activation.name} decreases somewhere, so that only the norm of B gives a bound"
    if not falls:
        return "for f_t = sigma(a - B f) with this kernel only the norm of B gives a bound"
    what = (
        "the gradient flow contracts in L2"
        if net.gradient_flow
        else "B = B^T >= 0 and a are constant in time, so that norm(B^(1/2) .) falls"
    )
    if short.all():
        return f"{what}, and steps are short enough for the method's radius {R:.4g}"
    if R == 0:
        return f"{what}, but the method's radius is 0: no step is known to be short enough"
    layers = ", ".join(map(str, np.flatnonzero(~short)))
    return f"{what}, but steps are too long in layers {layers} for the method's radius {R:.4g}"


def _tableau(net: ResidualNetwork) -> tuple[np.ndarray, np.ndarray]:
    if net.tableau is None:
        raise ValueError(
            f"net: expected 'ts_type' 'rk', 'theta', 'beuler', 'cn' or 'irk', got {net.solver_parameters['ts_type']!r}, whose "
            f"coefficients PETSc does not return"
        )
    return net.tableau


def _growth(A: np.ndarray, b: np.ndarray, z: float) -> float:
    """The factor by which a step enlarges distances at most; infinite where this bound fails for an implicit method."""
    inner = z * np.abs(A)
    if not np.isfinite(z) or np.abs(np.linalg.eigvals(inner)).max() >= 1:
        return np.inf
    return float(1 + z * np.abs(b) @ np.linalg.solve(np.eye(len(b)) - inner, np.ones(len(b))))


def _is_symmetric_and_constant(Y: LabelSpace, layers: Sequence[LayerInputs]) -> bool:
    """Whether a and B are the same at all times, and B = B^T >= 0. Collective."""
    if not layers:
        return True
    first = layers[0]
    phi, psi = first.factors.phi, first.factors.psi
    if any(part.factors is not first.factors for part in layers):
        return False
    if phi is not psi and (phi.rank != psi.rank or Y.sum(float(np.count_nonzero(phi.values != psi.values)))):
        return False
    beta, a = first.beta.coefficients(0.0), first.bias.coefficients(0.0)
    changes = [
        np.count_nonzero(part.beta.coefficients(s) != beta) + np.count_nonzero(part.bias.coefficients(s) != a)
        for part in layers
        for s in _ENDS
    ]
    if Y.sum(float(sum(changes))):
        return False
    root = first.factors.phi.root
    B = root @ beta @ root.T
    size = np.linalg.norm(B, 2)
    return bool(np.abs(B - B.T).max() <= _ROUND_OFF * size and np.linalg.eigvalsh(B)[0] >= -_ROUND_OFF * size)
