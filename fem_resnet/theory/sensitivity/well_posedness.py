"""Well-posedness of the forward problem, section 3.1: Assumption 1, the constants of Theorem 3.1, its stability estimate.

Assumption 1 supposes that sigma is Lipschitz, and that sigma(0) = 0 or |Y| is finite, which it is on a mesh. It also supposes
a in L1(0, T; L2(Y)) and b in L1(0, T; L2(Y x Y)), which holds for coefficients that are piecewise constant or linear in t.
With

    C_0 = |sigma(0)| |Y|^(1/2)                        (the paper prints |Y|, which is no bound where |Y| < 1)
    C_1(t) = sup |sigma'| int_0^t |a| ds              norm of L2(Y)
    C_2(t) = sup |sigma'| int_0^t |b| ds              norm of L2(Y x Y), or the smaller one of B as an operator

Gronwall's inequality bounds solutions by |f(t)| <= (|f_I| + C_0 t + C_1(t)) exp(C_2(t)), and the distance of two solutions by

    |f_1(t) - f_2(t)| <= exp(C_2(t)) |f_1(0) - f_2(0)|.                                                           (3.1)

The paper has e^(Lt) instead. But b is only L1 in t, and b ~ t^(-1/2) makes solutions move apart by e^(2 sqrt t).

The gradient flow f_t = B^T sigma(a - B f) has the Lipschitz constant sup |sigma'| |B|^2, and B^T also multiplies the forcing:

    C_1(t) = sup |sigma'| int_0^t |b| |a| ds,    C_2(t) = sup |sigma'| int_0^t |b|^2 ds,    and C_0 int_0^t |b| ds for C_0 t.

Where sigma' >= 0 its solutions never move apart (`contraction`). These constants hold for any sigma, and for Picard's
iteration.
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
        sup |sigma'|; no unit.
    C_0 : float
        |sigma(0)| |Y|^(1/2).
    C_1, C_2 : numpy.ndarray
        C_1(t_l), and C_2(t_l) with the norm of L2(Y x Y), shape (L + 1,) each.
    operator : numpy.ndarray
        C_2(t_l) with the operator norm of B, shape (L + 1,): sup |sigma'| int |B| ds, or for a gradient flow
        sup |sigma'| int |B|^2 ds. It is at most C_2.
    drift : numpy.ndarray
        C_0 t_l, or for a gradient flow C_0 int |b| ds, shape (L + 1,): how far sigma(0) moves f.
    caveat : str
        "sampled, not proved: .." if `lipschitz` is sampled; else empty.
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
        """exp(C_2(t_l)), the factor in (3.1), shape (L + 1,); no unit."""
        return np.exp(self.C_2)

    @property
    def sharper_growth(self) -> np.ndarray:
        """The same with the operator norm of B, shape (L + 1,); no unit."""
        return np.exp(self.operator)

    def solution_bound(self, initial: float | np.ndarray) -> np.ndarray:
        """The bound (|f_I| + drift + C_1(t)) exp(C_2(t)) of |f(t_l)|, shape (L + 1,) or (L + 1, samples).

        Parameters
        ----------
        initial
            |f_I| in L2(Y), at least 0, a number or shape (samples,).

        Raises
        ------
        TypeError, ValueError
            If `initial` is nothing of this kind.
        """
        initial, moved = real_array("initial", initial, least=0), self.drift + self.C_1
        if initial.ndim > 1:
            raise ValueError(f"initial: expected a number or shape (samples,), got shape {initial.shape}")
        return np.squeeze((np.atleast_1d(initial) + moved[:, None]) * self.growth[:, None])


@dataclass(frozen=True)
class Rates:
    """The norms whose products are the integrands of Theorem 3.1, for (2.8) or for the gradient flow (`integrated_norms`)."""

    drift: tuple[str, ...]
    C_1: tuple[str, ...]
    C_2: tuple[str, ...]
    operator: tuple[str, ...]

    @classmethod
    def of(cls, net: ResidualNetwork) -> Rates:
        """The norms for a network."""
        if net.gradient_flow:
            return cls(("hs",), ("hs", "bias"), ("hs", "hs"), ("operator", "operator"))
        return cls((), ("bias",), ("hs",), ("operator",))


@supports("channels", "no_layers", *HELD, *STEPPED, "gradient_flow")
def well_posedness_constants(net: ResidualNetwork) -> WellPosedness:
    """Check Assumption 1 and compute C_0, C_1 and C_2 of Theorem 3.1. Collective over the ranks of the label domain.

    Integrals over a layer in which a coefficient varies are computed by adaptive quadrature.

    Raises
    ------
    ValueError
        If sigma is not Lipschitz.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Kernel, LabelSpace, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 4)
    >>> net = ResidualNetwork(Kernel(phi, in_time="shared"), layers=2, final_time=2.0)
    >>> net.kernel.set(0, np.diag([4.0, 3.0, 0.0, 0.0]))
    >>> constants = well_posedness_constants(net)
    >>> constants.C_2.round(12).tolist(), constants.operator.round(12).tolist()
    ([0.0, 5.0, 10.0], [0.0, 4.0, 8.0])
    """
    lipschitz, rates, C_0 = lipschitz_constant(net), Rates.of(net), drift_constant(net)
    C_1, C_2, operator = (lipschitz * integrated_norms(net, *norms) for norms in (rates.C_1, rates.C_2, rates.operator))
    drift, caveat = C_0 * integrated_norms(net, *rates.drift), net.activation.properties.caveat("lipschitz")
    return WellPosedness(net.times, lipschitz, C_0, C_1, C_2, operator, drift, caveat)


@supports("channels", "no_layers", *HELD, *STEPPED, "gradient_flow")
def integrated_norms(net: ResidualNetwork, *norms: str) -> np.ndarray:
    """int_0^t_l |b| ds, in a norm of `LowRankKernel.norm`, or int_0^t_l |a| ds in L2(Y), at the layer times.

    For several norms it is the integral of their product. For no norm it is the integral of 1, which gives the layer times.
    Collective over the ranks of the label domain.

    Parameters
    ----------
    net
        The network, at its present coefficients.
    norms
        "hs", "operator" or "linf" of b, or "bias". "linf" must be the only norm, and the result is an upper bound in layers in
        which b varies.

    Returns
    -------
    numpy.ndarray
        The integrals at t_0 .. t_L, shape (L + 1,); the first one is 0.

    Raises
    ------
    ValueError
        If a norm is none of these, or "linf" is not the only one.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Kernel, LabelSpace, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 4)
    >>> net = ResidualNetwork(Kernel(phi, in_time="linear"), layers=2, final_time=2.0)
    >>> net.kernel.set(1, np.eye(4))
    >>> integrated_norms(net, "hs").round(9).tolist(), integrated_norms(net, "operator").round(9).tolist()
    ([0.0, 1.0, 2.0], [0.0, 0.5, 1.0])
    """
    for norm in norms:
        choice("norms", norm, ("hs", "operator", "linf", "bias"))
    if "linf" in norms and len(norms) > 1:
        raise ValueError(f"norms: expected 'linf' alone, got {norms!r}; for a product the trapezoidal rule is no upper bound")
    layers = [LayerNorms(net.Y, layer).integral(norms) for layer in net.layer_inputs()]
    return np.concatenate([[0.0], np.cumsum(layers)])


def drift_constant(net: ResidualNetwork) -> float:
    """C_0 = |sigma(0)| |Y|^(1/2), in the unit of f_t."""
    return float(abs(net.activation(0.0)) * net.Y.measure**0.5)


def lipschitz_constant(net: ResidualNetwork) -> float:
    """The Lipschitz constant sup |sigma'|; no unit.

    Raises
    ------
    ValueError
        If sigma is not Lipschitz.
    """
    lipschitz = net.activation.properties.lipschitz
    if not np.isfinite(lipschitz):
        raise ValueError(f"net: expected a Lipschitz activation, as Assumption 1 supposes, got {net.activation.name}")
    return lipschitz


class LayerNorms:
    """Norms of a layer's bias, "bias", and kernel, "hs", "operator" or "linf", integrated over parts of its time.

    The constructor is collective, and so is `integral` for "linf"; other norms do not need the nodes any more.

    Parameters
    ----------
    Y
        The label domain.
    layer
        The inputs of the layer; bias and kernel are affine in its time.
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
        """The integral of a product of norms between two fractions of the layer; for "linf" an upper bound where b varies."""
        layer = self._layer

        def value(s: float) -> float:
            return prod(self._norm(name, s) for name in norms)

        if all((layer.bias if name == "bias" else layer.beta).is_constant for name in norms):
            return layer.length * (end - start) * value(start)
        if "linf" in norms:
            # This norm is expensive and has kinks, but it is convex in t, so that trapezoids give an upper bound.
            points = np.linspace(start, end, _TRAPEZOIDS + 1)
            return layer.length * float(np.trapezoid([value(s) for s in points], points))
        return layer.length * scipy.integrate.quad(value, start, end, epsabs=0, epsrel=1e-9)[0]


# -- (3.1) -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StabilityEstimate:
    """The distance of two solutions and its bound (3.1). Get one from `stability_estimate`.

    Attributes
    ----------
    constants : WellPosedness
        The constants of Theorem 3.1.
    distances : numpy.ndarray
        |f_1(t_l) - f_2(t_l)| in L2(Y), shape (L + 1, samples).
    """

    constants: WellPosedness
    distances: np.ndarray

    @property
    def bounds(self) -> np.ndarray:
        """The bounds exp(C_2(t_l)) |f_1(0) - f_2(0)|, shape (L + 1, samples)."""
        return self.constants.growth[:, None] * self.distances[0]

    @property
    def ratios(self) -> np.ndarray:
        """Distances over their bounds with the operator norm in C_2, at most 1, shape (L + 1, samples); no unit."""
        return self.distances / (self.constants.sharper_growth[:, None] * self.distances[0])


@supports("channels", "no_layers", *HELD, *STEPPED, "gradient_flow")
def stability_estimate(net: ResidualNetwork, first: fd.Function, second: fd.Function) -> StabilityEstimate:
    """Run pairs of solutions and compare their distances with the corrected (3.1).

    (3.1) also holds for the discrete network if the weights and coefficients of its explicit Runge-Kutta method are not
    negative, as for 1fe and 4. Then |f_1 - f_2| grows by at most R(tau L) <= e^(tau L) in a step, where R is the stability
    function of the method. Collective over the ranks of the label domain.

    Parameters
    ----------
    net
        The network.
    first, second
        Initial states, two batches with the same number of samples. The runs are recorded only if annotation is on.

    Raises
    ------
    ValueError
        If sigma is not Lipschitz, or the batches do not fit.
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
