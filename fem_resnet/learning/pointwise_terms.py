"""Terms that are integrals of a convex function h of the parameter's values, over label domain and time.

    int h(a) dy dt + int h(b) dy dz dt + int h(W) dy dz + int h(mu) dy

    L1, smoothed       h(x) = (x^2 + epsilon^2)^(1/2) - epsilon        epsilon > 0; |x| - epsilon <= h(x) <= |x|
    Huber              h(x) = x^2 / 2  for |x| <= delta,  delta (|x| - delta / 2)  beyond

Integrals are sums over nodes with the label measure, over t they are lumped, as the Riesz maps are. A kernel and an output
kernel are looked at at all pairs of nodes; so an evaluation costs nodes x nodes x rank operations, and no array of nodes x
nodes occurs. The initial state has the integral over y, added up over the samples.

Both are convex, and smooth enough for Newton: h' of Huber's is Lipschitz continuous, and its second derivative, 1 inside and
0 beyond, is exact except at |x| = delta.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fem_resnet.arguments import number
from fem_resnet.label_domain.basis import Basis
from fem_resnet.learning.regulariser import PENALISED, Regulariser
from fem_resnet.learning.term import Penalty, Term, checked_weights
from fem_resnet.parameters.kernel import EXACT_SUPREMUM, KernelCoefficients
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import BasisCoefficients, NodalValues, SpaceBasis, StateValues

__all__ = ["Huber", "SmoothedModulus", "huber", "smoothed_l1"]

#: Nodes of y that are paired with as many of z at a time, so that the values of b stay in the cache.
_PAIRED = 512


class _Pointwise(Term, ABC):
    """The integral of h of the values."""

    @abstractmethod
    def h(self, x: np.ndarray) -> np.ndarray:
        """The function."""

    @abstractmethod
    def slope(self, x: np.ndarray) -> np.ndarray:
        """Its derivative."""

    @abstractmethod
    def curvature(self, x: np.ndarray) -> np.ndarray:
        """Its second derivative."""

    def on(self, parameter: Parameter) -> Penalty:
        made = {basis: self._values(parameter, basis) for basis in dict.fromkeys(parameter.space_bases)}
        return _Integral(self, parameter, [made[basis] for basis in parameter.space_bases])

    def _values(self, parameter: Parameter, basis: SpaceBasis) -> _Values:
        if isinstance(basis, KernelCoefficients):
            return _Pairs(basis)
        if isinstance(basis, (NodalValues, BasisCoefficients, StateValues)):
            return _Nodes(basis)
        raise ValueError(
            f"{self}: expected a parameter with values on the label domain, got {parameter!r}; give it the weight 0"
        )


@dataclass(frozen=True)
class SmoothedModulus(_Pointwise):
    """(x^2 + epsilon^2)^(1/2) - epsilon, which tends to abs(x) as epsilon tends to 0; see `smoothed_l1`.

    Attributes
    ----------
    epsilon : float
        In the unit of the values.
    """

    epsilon: float

    def h(self, x):
        return x * (x / (np.hypot(x, self.epsilon) + self.epsilon))

    def slope(self, x):
        return x / np.hypot(x, self.epsilon)

    def curvature(self, x):
        size = np.hypot(x, self.epsilon)
        return (self.epsilon / size) ** 2 / size


@dataclass(frozen=True)
class Huber(_Pointwise):
    """x^2 / 2 for abs(x) <= delta, and beyond it its tangents; see `huber`.

    Attributes
    ----------
    delta : float
        In the unit of the values.
    """

    smooth = False

    delta: float

    def h(self, x):
        inside = np.clip(x, -self.delta, self.delta)
        return inside * (x - 0.5 * inside)

    def slope(self, x):
        return np.clip(x, -self.delta, self.delta)

    def curvature(self, x):
        return (np.abs(x) <= self.delta).astype(float)


class _Values(ABC):
    """The values of one function in time, and integrals over them."""

    @abstractmethod
    def integral(self, of: Callable[[np.ndarray], np.ndarray], c: np.ndarray) -> float:
        """The integral of a function of the values. Collective."""

    @abstractmethod
    def functional(self, of: Callable[[np.ndarray], np.ndarray], c: np.ndarray, v: np.ndarray | None = None) -> np.ndarray:
        """The functional d -> int of(values of c) (values of v) (values of d); without v its values are 1. Collective."""


class _Nodes(_Values):
    """Values at nodes, of one function or of a batch."""

    def __init__(self, basis: NodalValues | BasisCoefficients | StateValues):
        self._basis, Y = basis, basis.Y
        self._sum, self._weights = Y.sum, Y.weights[:, None] if isinstance(basis, StateValues) else Y.weights

    def integral(self, of, c):
        return float(self._sum((self._weights * of(self._basis.expand(c))).sum()))

    def functional(self, of, c, v=None):
        d = self._weights * of(self._basis.expand(c))
        return self._basis.pull_back(d if v is None else d * self._basis.expand(v))


class _Pairs(_Values):
    """Values b(y, z) of a kernel at pairs of nodes: each rank has its own y, and all z."""

    def __init__(self, basis: KernelCoefficients):
        if basis.has_learned_factors:
            raise ValueError(
                "kernel: expected one with fixed factors, got learned ones, whose values at pairs of points there is no "
                "formula for here; give it the weight 0, or fix the factors"
            )
        phi, psi = basis.kernel.phi, basis.kernel.psi
        if phi.Y.size * psi.Y.size > EXACT_SUPREMUM:
            raise ValueError(
                f"kernel: expected at most {EXACT_SUPREMUM} pairs of nodes, whose values are added up, got {phi.Y.size} x "
                f"{psi.Y.size}; give it the weight 0, or take a coarser mesh"
            )
        self._sum, self._phi, self._in_y = phi.Y.sum, phi.values, phi.Y.weights
        self._psi, self._in_z = _of_all_ranks(psi, psi.values), _of_all_ranks(psi, psi.Y.weights)

    def _blocks(self):
        for y in range(0, len(self._phi), _PAIRED):
            for z in range(0, len(self._psi), _PAIRED):
                yield slice(y, y + _PAIRED), slice(z, z + _PAIRED)

    def integral(self, of, c):
        rows, total = self._phi @ c, 0.0
        for y, z in self._blocks():
            total += float(self._in_y[y] @ of(rows[y] @ self._psi[z].T) @ self._in_z[z])
        return float(self._sum(total))

    def functional(self, of, c, v=None):
        rows, moved = self._phi @ c, None if v is None else self._phi @ v
        d = np.zeros(c.shape)
        for y, z in self._blocks():
            values = of(rows[y] @ self._psi[z].T)
            if moved is not None:
                values *= moved[y] @ self._psi[z].T
            d += (self._phi[y] * self._in_y[y, None]).T @ (values @ (self._psi[z] * self._in_z[z, None]))
        return self._sum(d)


class _Integral(Penalty):
    """The integral over label domain and time, lumped in time."""

    def __init__(self, term: _Pointwise, parameter: Parameter, values: list[_Values]):
        self._term, self._tau, self._values = term, parameter.time_basis.measures, values

    def value(self, c):
        return float(sum(tau * at.integral(self._term.h, c_k) for tau, at, c_k in zip(self._tau, self._values, c)))

    def functionals(self, c):
        return [tau * at.functional(self._term.slope, c_k) for tau, at, c_k in zip(self._tau, self._values, c)]

    def actions(self, c, v):
        return [
            tau * at.functional(self._term.curvature, c_k, v_k) for tau, at, c_k, v_k in zip(self._tau, self._values, c, v)
        ]


def _of_all_ranks(basis: Basis, values: np.ndarray) -> np.ndarray:
    """The values at the nodes of all ranks. Collective."""
    return np.concatenate(basis.Y.comm.allgather(np.ascontiguousarray(values)))


def smoothed_l1(weight: float, epsilon: float, **own: float) -> Regulariser:
    """The integral of abs(x), smoothed, over label domain and time: it makes values small, most of them nearly 0.

    It is the integral of (x^2 + epsilon^2)^(1/2) - epsilon, which is at most epsilon below abs(x) at each point, convex and
    twice differentiable. All parameters are taken; kernels at all pairs of nodes, so the cost grows by their number.

    Parameters
    ----------
    weight
        lambda >= 0.
    epsilon
        epsilon > 0, in the unit of the values. Values far below it have a square, and far above it their modulus.
    **own
        Weights of single parameters in the place of lambda: bias, kernel, V, W, mu, initial.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind.

    Examples
    --------
    Another epsilon for each parameter, by two terms:

    >>> R = smoothed_l1(0.0, 1e-3, bias=1e-2) + smoothed_l1(0.0, 1e-2, kernel=1e-3)
    """
    return Regulariser(
        ((checked_weights(weight, own, PENALISED), SmoothedModulus(number("epsilon", epsilon, above=0))),), ("smoothed_l1",)
    )


def huber(weight: float, delta: float, **own: float) -> Regulariser:
    """The integral of Huber's function over label domain and time: x^2 / 2 up to delta, and linear beyond.

    Small values are regularised as by `tikhonov`, large ones less. It is convex. All parameters are taken; kernels at all
    pairs of nodes, so the cost grows by their number.

    Parameters
    ----------
    weight
        lambda >= 0.
    delta
        delta > 0, in the unit of the values.
    **own
        Weights of single parameters in the place of lambda: bias, kernel, V, W, mu, initial.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind.

    Examples
    --------
    >>> R = huber(1e-3, 0.1, mu=0.0)
    """
    return Regulariser(((checked_weights(weight, own, PENALISED), Huber(number("delta", delta, above=0))),), ("huber",))
