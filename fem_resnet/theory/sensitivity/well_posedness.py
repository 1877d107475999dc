"""Well-posedness of the forward problem, 3.1: Assumption 1, the constants of Theorem 3.1, and its stability estimate.

Assumption 1 asks that sigma is Lipschitz, and sigma(0) = 0 or |Y| finite, which it is on a mesh; that a is in
L1(0, T; L2(Y)) and b in L1(0, T; L2(Y x Y)), as are coefficients that are piecewise constant or linear in t. With

    C_0 = |sigma(0)| |Y|^(1/2)                        (the paper prints |Y|, which is no bound where |Y| < 1)
    C_1(t) = sup |sigma'| int_0^t |a| ds              norm of L2(Y)
    C_2(t) = sup |sigma'| int_0^t |b| ds              norm of L2(Y x Y), or the smaller one of B as an operator

solutions are bounded, |f(t)| <= (|f_I| + C_0 t + C_1(t)) exp(C_2(t)) by Gronwall, and two of them part by no more than

    |f_1(t) - f_2(t)| <= exp(C_2(t)) |f_1(0) - f_2(0)|,                                                           (3.1)

where the paper has e^(Lt): b is no more than L1 in t, and b ~ t^(-1/2) parts solutions by e^(2 sqrt t).

The gradient flow f_t = B^T sigma(a - B f) has the Lipschitz constant sup |sigma'| |B|^2, and B^T in front of what moves f:

    C_1(t) = sup |sigma'| int_0^t |b| |a| ds,    C_2(t) = sup |sigma'| int_0^t |b|^2 ds,    and C_0 int_0^t |b| ds for C_0 t.

Where sigma' >= 0 its solutions do not part at all (`contraction`); these constants hold for any sigma, and for Picard's iteration.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import firedrake as fd
import numpy as np
import scipy.integrate

from fem_resnet.arguments import choice, real_array
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.network.network import ResidualNetwork

__all__ = [
    "LayerNorms", "StabilityEstimate", "WellPosedness", "integrated_norms", "lipschitz_constant", "stability_estimate",
    "well_posedness_constants",
]  # fmt: skip

_TRAPEZOIDS = 16


@dataclass(frozen=True)
class WellPosedness:
    """The constants of Theorem 3.1 along the layer times. Get them from `well_posedness_constants`.

    Attributes
    ----------
    times : numpy.ndarray
        t_0 .. t_L, shape (L + 1,).
    lipschitz : float
        sup |sigma'|.
    C_0 : float
        |sigma(0)| |Y|^(1/2).
    C_1, C_2 : numpy.ndarray
        C_1(t_l) and, with the norm of L2(Y x Y), C_2(t_l), shape (L + 1,).
    operator : numpy.ndarray
        C_2 with the operator norm of B: sup |sigma'| int |B| ds, or of a gradient flow sup |sigma'| int |B|^2 ds; at most C_2.
    drift : numpy.ndarray
        How far sigma(0) drives f: C_0 t_l, or of a gradient flow C_0 int |b| ds; shape (L + 1,).
    caveat : str
        "sampled, not proved: .." where that is so of `lipschitz`; else empty.
    """

    times: np.ndarray
    lipschitz: float
    C_0: float
    C_1: np.ndarray
    C_2: np.ndarray
    operator: np.ndarray
    drift: np.ndarray
    caveat: str = ""

    @property
    def growth(self) -> np.ndarray:
        """exp(C_2(t_l)): by how much solutions part at most, (3.1), shape (L + 1,)."""
        return np.exp(self.C_2)

    @property
    def sharper_growth(self) -> np.ndarray:
        """The same with the operator norm of B."""
        return np.exp(self.operator)

    def solution_bound(self, initial: float | np.ndarray) -> np.ndarray:
        """(|f_I| + drift + C_1(t)) exp(C_2(t)), shape (L + 1,) or (L + 1, samples), for |f_I| in L2(Y)."""
        initial, moved = real_array("initial", initial, least=0), self.drift + self.C_1
        if initial.ndim > 1:
            raise ValueError(f"initial: expected a number, or shape (samples,), got shape {initial.shape}")
        return np.squeeze((np.atleast_1d(initial) + moved[:, None]) * self.growth[:, None])


@dataclass(frozen=True)
class Rates:
    """Of which norms the integrands of Theorem 3.1 are products, for (2.8) and for the gradient flow: see `integrated_norms`."""

    drift: tuple[str, ...]
    C_1: tuple[str, ...]
    C_2: tuple[str, ...]
    operator: tuple[str, ...]

    @classmethod
    def of(cls, net: ResidualNetwork) -> Rates:
        """Those of a network."""
        if net.gradient_flow:
            return cls(("hs",), ("hs", "bias"), ("hs", "hs"), ("operator", "operator"))
        return cls((), ("bias",), ("hs",), ("operator",))


@supports("no_layers", *HELD, *STEPPED, "gradient_flow")
def well_posedness_constants(net: ResidualNetwork) -> WellPosedness:
    """Check Assumption 1, and compute C_0, C_1 and C_2 of Theorem 3.1. Collective.

    Integrals over a layer where a coefficient varies are taken by adaptive quadrature.

    Raises
    ------
    ValueError
        If sigma is not Lipschitz.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 4)
    >>> net = ResidualNetwork(phi, layers=2, final_time=2.0, kernel_in_time="shared")
    >>> net.kernel.set(0, np.diag([4.0, 3.0, 0.0, 0.0]))
    >>> constants = well_posedness_constants(net)
    >>> constants.C_2.round(12).tolist(), constants.operator.round(12).tolist()
    ([0.0, 5.0, 10.0], [0.0, 4.0, 8.0])
    """
    lipschitz, rates, C_0 = lipschitz_constant(net), Rates.of(net), drift_constant(net)
    C_1, C_2, operator = (lipschitz * integrated_norms(net, *norms) for norms in (rates.C_1, rates.C_2, rates.operator))
    return WellPosedness(
        net.times, lipschitz, C_0, C_1, C_2, operator, C_0 * integrated_norms(net, *rates.drift), net.activation.properties.caveat("lipschitz"),
    )  # fmt: skip


@supports("no_layers", *HELD, *STEPPED, "gradient_flow")
def integrated_norms(net: ResidualNetwork, *norms: str) -> np.ndarray:
    """int_0^t_l |b| ds in a norm of `LowRankKernel.norm`, or int |a| ds in L2(Y), at the layer times. Collective.

    Of several norms the integral of their product; of none that of 1, the layer times.

    Parameters
    ----------
    net
        The network, at its present coefficients.
    norms
        "hs", "operator" or "linf" of b, the last alone, and by an upper bound in layers where b varies; or "bias".

    Returns
    -------
    numpy.ndarray
        Shape (L + 1,), the first 0.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 4)
    >>> net = ResidualNetwork(phi, layers=2, final_time=2.0, kernel_in_time="linear")
    >>> net.kernel.set(1, np.eye(4))
    >>> integrated_norms(net, "hs").round(9).tolist(), integrated_norms(net, "operator").round(9).tolist()
    ([0.0, 1.0, 2.0], [0.0, 0.5, 1.0])
    """
    for norm in norms:
        choice("norms", norm, ("hs", "operator", "linf", "bias"))
    if "linf" in norms and len(norms) > 1:
        raise ValueError(f"norms: expected 'linf' alone, got {norms!r}; of a product trapezoids are no bound")
    layers = [LayerNorms(net.Y, layer).integral(norms) for layer in net.layer_inputs()]
    return np.concatenate([[0.0], np.cumsum(layers)])


def drift_constant(net: ResidualNetwork) -> float:
    """C_0 = |sigma(0)| |Y|^(1/2)."""
    return float(abs(net.activation(0.0)) * net.Y.measure**0.5)


def lipschitz_constant(net: ResidualNetwork) -> float:
    """Sup |sigma'|; ValueError where there is none."""
    lipschitz = net.activation.properties.lipschitz
    if not np.isfinite(lipschitz):
        raise ValueError(f"net: {net.activation.name} is not Lipschitz, so that Assumption 1 does not hold")
    return lipschitz


class LayerNorms:
    """Norms of a layer's bias, "bias", and kernel, "hs", "operator" or "linf", integrated over parts of its time.

    Collective when it is made, and for "linf"; what else sees the nodes is done when it is made.

    Parameters
    ----------
    Y
        The label domain.
    layer
        What the layer takes; bias and kernel are affine in its time.
    """

    def __init__(self, Y: LabelSpace, layer: LayerInputs):
        self._layer = layer
        ends = np.column_stack([layer.bias.coefficients(0.0), layer.bias.coefficients(1.0)])
        self._gram = Y.sum(ends.T @ (Y.weights[:, None] * ends))

    def _bias(self, s: float) -> float:
        v = np.array([1 - s, s])
        return float(np.sqrt(max(v @ self._gram @ v, 0.0)))

    def _norm(self, name: str, s: float) -> float:
        if name == "bias":
            return self._bias(s)
        return self._layer.factors.norm(self._layer.beta.coefficients(s), name)

    def integral(self, norms: tuple[str, ...], start: float = 0.0, end: float = 1.0) -> float:
        """Of the product of norms between two fractions of the layer; of "linf", where b varies, an upper bound by trapezoids."""
        layer = self._layer

        def value(s: float) -> float:
            return prod(self._norm(name, s) for name in norms)

        if all((layer.bias if name == "bias" else layer.beta).is_constant for name in norms):
            return layer.length * (end - start) * value(start)
        if "linf" in norms:
            # Dear, and full of kinks, but convex along a line.
            points = np.linspace(start, end, _TRAPEZOIDS + 1)
            return layer.length * float(np.trapezoid([value(s) for s in points], points))
        return layer.length * scipy.integrate.quad(value, start, end, epsabs=0, epsrel=1e-9)[0]


# -- (3.1) -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StabilityEstimate:
    """How far two solutions part, beside (3.1). Get one from `stability_estimate`.

    Attributes
    ----------
    constants : WellPosedness
    distances : numpy.ndarray
        |f_1(t_l) - f_2(t_l)| in L2(Y), shape (L + 1, samples).
    """

    constants: WellPosedness
    distances: np.ndarray

    @property
    def bounds(self) -> np.ndarray:
        """exp(C_2(t_l)) |f_1(0) - f_2(0)|, shape (L + 1, samples)."""
        return self.constants.growth[:, None] * self.distances[0]

    @property
    def ratios(self) -> np.ndarray:
        """|f_1(t_l) - f_2(t_l)| / (exp(C_2) |f_1(0) - f_2(0)|), at most 1, with the operator norm in C_2."""
        return self.distances / (self.constants.sharper_growth[:, None] * self.distances[0])


@supports("no_layers", *HELD, *STEPPED, "gradient_flow")
def stability_estimate(net: ResidualNetwork, first: fd.Function, second: fd.Function) -> StabilityEstimate:
    """Run pairs of solutions and hold their distance against (3.1), corrected. Collective.

    (3.1) holds for the discrete network too, if the weights and coefficients of its explicit Runge-Kutta method are not
    negative, as those of 1fe and 4: then |f_1 - f_2| grows by at most R(tau L) <= e^(tau L) in a step, R the method's
    stability function.

    Parameters
    ----------
    net
        The network.
    first, second
        Initial states, batches of as many samples. They are run without being recorded unless annotation is on.

    Raises
    ------
    ValueError
        If sigma is not Lipschitz, or the batches do not fit each other.
    """
    Y = net.Y
    Y.check_batch(first, "first")
    Y.check_batch(second, "second")
    if first.function_space() != second.function_space():
        spaces = first.function_space(), second.function_space()
        raise ValueError(f"second: expected a Function of {spaces[0]}, got {spaces[1]}")
    pairs = zip(net.run(first).states(), net.run(second).states())
    apart = [np.sqrt(Y.sum(Y.weights @ (Y.values(f) - Y.values(g)) ** 2)) for f, g in pairs]
    return StabilityEstimate(well_posedness_constants(net), np.array(apart))
