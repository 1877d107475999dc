r"""Running costs (section 4.3): what a state and its controls cost while time goes on.

    J = int_0^T sum_s omega_s L(f_s, a, b) dt + ..,        L(f, a, b) = int_Y l(f(y), a(y)) dy + kappa/2 norm(b)^2,

norm(b) that of L2(Y x Y). Each sample has a number c with c_t = L(f, a, b) and c(0) = 0 that TS steps along with f, so that
the integral is that of the method itself, and adaptive steps may be taken. In the co-state of (4.2) it is L_f, in the
sign of section 4.1,

    r_t = B^T(sigma'(u) r) - L_f.

Where a layer has a tangent, f_1 and so on, c has one too:

    value       c_t   = tau L
    tangent     c_1,t = tau (l_f f_1 + l_a a_1 + kappa (b, b_1)) + tau_1 L,       integrals over Y understood.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from numbers import Number
from typing import Protocol, TypeVar

import numpy as np
import sympy

from fem_resnet.arguments import number
from fem_resnet.fixed import Fixed
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.ranks import together

__all__ = ["CostRate", "Density", "RunningCost"]

_T = TypeVar("_T")


class Density(Protocol):
    """l(f, a) and its derivatives at the nodes: f of shape (nodes, samples), a of shape (nodes, 1), both float64.

    Results have the shape of f, or one that is broadcast to it.
    """

    def value(self, f: np.ndarray, a: np.ndarray) -> np.ndarray:
        """L."""

    def gradient(self, f: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """l_f, l_a."""

    def hessian(self, f: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """l_ff, l_fa, l_aa; may be missing where no second derivatives are asked for."""


class RunningCost(Fixed):
    """L(f, a, b) = int_Y l(f(y), a(y)) dy + kernel/2 norm(b)^2.

    Parameters
    ----------
    density
        l: a SymPy expression in ``f = sympy.Symbol("f")`` and ``a = sympy.Symbol("a")``, from which the derivatives follow;
        or an object with the methods of `Density`, which may know a target at the nodes too.
    kernel
        kappa >= 0, what half the square of the Hilbert-Schmidt norm of b counts; no unit.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind, or the expression has other symbols.

    Examples
    --------
    >>> import sympy
    >>> f, a = sympy.symbols("f a")
    >>> cost = RunningCost(f**2 / 2 + a**2 / 20, kernel=0.1)
    >>> [float(part[0, 0]) for part in cost.density.gradient(np.ones((1, 1)), 2 * np.ones((1, 1)))]
    [1.0, 0.2]
    """

    def __init__(self, density: sympy.Expr | Density, kernel: float = 0.0):
        if isinstance(density, type) or isinstance(density, (bool, np.bool_)):
            raise TypeError(f"density: expected an expression, a number or an object, got {density!r}")
        if isinstance(density, Number):
            density = sympy.sympify(number("density", density))
        if isinstance(density, sympy.Expr):
            density = _Formula(density)
        elif not all(callable(getattr(density, name, None)) for name in ("value", "gradient")):
            raise TypeError(
                f"density: expected a SymPy expression in f and a, or an object with the methods value(f, a) and "
                f"gradient(f, a), got {density!r}"
            )
        self.density = density
        self.kernel = number("kernel", kernel, least=0)

    @property
    def description(self) -> dict[str, object]:
        """What tells it from others, as far as a density of the user's does."""
        return {"density": getattr(self.density, "expression", self.density), "kernel": self.kernel}

    def __repr__(self) -> str:
        return f"RunningCost({self.density!r}, kernel={self.kernel:g})"

    @property
    def of_state_alone(self) -> bool:
        """Whether L does not depend on (a, b), as (4.10) asks; a density of the user's says so by `of_state_alone`."""
        return self.kernel == 0.0 and getattr(self.density, "of_state_alone", False)

    def integrand(self, f: np.ndarray, a: np.ndarray) -> np.ndarray:
        """L at the nodes, shape (nodes, samples), for f of that shape and a of shape (nodes,)."""
        return np.broadcast_to(self.density.value(f, a[:, None]), f.shape)

    def slopes(self, f: np.ndarray, a: np.ndarray) -> list[np.ndarray]:
        """l_f and l_a at the nodes: the gradients of L in L2(Y) in f and, of each sample, in a."""
        return [np.broadcast_to(part, f.shape) for part in self.density.gradient(f, a[:, None])]

    def bends(self, f: np.ndarray, a: np.ndarray) -> list[np.ndarray]:
        """l_ff, l_fa and l_aa at the nodes."""
        if not hasattr(self.density, "hessian"):
            raise NotImplementedError("density: it has no method hessian(f, a), which second derivatives ask for; give it one")
        return [np.broadcast_to(part, f.shape) for part in self.density.hessian(f, a[:, None])]


class _Formula:
    """The density of a SymPy expression."""

    def __init__(self, expression: sympy.Expr):
        symbols = sympy.symbols("f a", real=True)
        expression = expression.subs({sympy.Symbol(symbol.name): symbol for symbol in symbols})
        others = sorted(map(str, expression.free_symbols - set(symbols)))
        if others:
            raise ValueError(f"density: expected an expression in the symbols f and a alone; it has {', '.join(others)} too")
        if any(atom.is_number and not (atom.is_finite and atom.is_real) for atom in expression.atoms()):
            raise ValueError(f"density: expected real, finite numbers in an expression, got {expression}")
        self.expression = expression
        self.of_state_alone = symbols[1] not in expression.free_symbols
        first = [expression.diff(symbol) for symbol in symbols]
        second = [first[0].diff(symbols[0]), first[0].diff(symbols[1]), first[1].diff(symbols[1])]
        made = (sympy.lambdify(symbols, part, modules=["scipy", "numpy"], cse=True) for part in (expression, first, second))
        self.value, self.gradient, self.hessian = made

    def __repr__(self) -> str:
        return str(self.expression)


class CostRate:
    """c_t at a stage of a layer, and that of its tangent: value, derivative, transpose. One entry an order.

    Collective over the communicator of the label domain; arrays of nodes are this rank's.

    Parameters
    ----------
    cost
        L.
    Y
        The label domain.
    kernel
        The bases of b; None where they are orthonormal and stay so (learned factors).
    length
        tau.
    f, a, beta
        State, bias at the nodes, coefficients of b.
    """

    def __init__(
        self,
        cost: RunningCost,
        Y: LabelSpace,
        kernel: LowRankKernel | None,
        length: Sequence[float],
        f: Sequence[np.ndarray],
        a: Sequence[np.ndarray],
        beta: Sequence[np.ndarray],
    ):
        self._cost, self._Y, self._kernel = cost, Y, kernel
        self._length, self._f, self._a, self._beta = length, f, a, beta
        self.orders = len(f)

    def _asked(self, part: Callable[[np.ndarray, np.ndarray], _T]) -> _T:
        """What the cost says at f and a; what a density of the user's raises on one rank is raised on all."""
        formula = isinstance(self._cost.density, _Formula)
        return together(None if formula else self._Y.comm, lambda: part(self._f[0], self._a[0]))

    @cached_property
    def _slopes(self) -> list[np.ndarray]:
        return self._asked(self._cost.slopes)

    @cached_property
    def _moved_slopes(self) -> list[np.ndarray]:
        """Derivatives of l_f and l_a along the tangent."""
        ff, fa, aa = self._asked(self._cost.bends)
        f_1, a_1 = self._f[1], self._a[1][:, None]
        return [ff * f_1 + fa * a_1, fa * f_1 + aa * a_1]

    def _dual(self, beta: np.ndarray) -> np.ndarray:
        return self._cost.kernel * (beta if self._kernel is None else self._kernel.functional(beta))

    def _rates(self) -> list[np.ndarray]:
        """L, and its derivative along the tangent, of each sample: all but tau."""
        parts = [self._asked(self._cost.integrand)]
        dual = self._dual(self._beta[0])
        norms = [0.5 * np.sum(dual * self._beta[0])]
        if self.orders == 2:
            l_f, l_a = self._slopes
            parts.append(l_f * self._f[1] + l_a * self._a[1][:, None])
            norms.append(np.sum(dual * self._beta[1]))
        sums = self._Y.sum(np.array([self._Y.weights @ part for part in parts]))
        return [total + norm for total, norm in zip(sums, norms)]

    def value(self) -> np.ndarray:
        """c_t and c_1,t, shape (orders, samples), on every rank."""
        L = self._rates()
        result = [self._length[0] * L[0]]
        if self.orders == 2:
            result.append(self._length[0] * L[1] + self._length[1] * L[0])
        return np.array(result)

    def derivative(self, df: Sequence[np.ndarray]) -> np.ndarray:
        """Derivative of `value` in directions of f and f_1, on every rank."""
        tau, l_f = self._length, self._slopes[0]
        result = [tau[0] * l_f * df[0]]
        if self.orders == 2:
            result.append(tau[0] * (l_f * df[1] + self._moved_slopes[0] * df[0]) + tau[1] * l_f * df[0])
        return self._Y.sum(np.array([self._Y.weights @ part for part in result]))

    def transpose(self, x: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Its transpose for x of shape (orders, samples): functionals of f and f_1, of a, and of beta.

        Those of f are dual to node values, shape (nodes, samples); that of a has shape (nodes,).
        """
        tau, w, (l_f, l_a) = self._length, self._Y.weights[:, None], self._slopes
        in_f, in_a = tau[0] * x[0] * l_f, tau[0] * x[0] * l_a
        in_beta = tau[0] * x[0].sum() * self._dual(self._beta[0])
        if self.orders == 1:
            return [w * in_f], np.sum(w * in_a, axis=1), in_beta
        moved_f, moved_a = self._moved_slopes
        in_f += x[1] * (tau[0] * moved_f + tau[1] * l_f)
        in_a += x[1] * (tau[0] * moved_a + tau[1] * l_a)
        in_beta += x[1].sum() * (tau[0] * self._dual(self._beta[1]) + tau[1] * self._dual(self._beta[0]))
        return [w * in_f, w * (tau[0] * x[1] * l_f)], np.sum(w * in_a, axis=1), in_beta

    def by_length(self, x: np.ndarray) -> float:
        """The functional of tau."""
        return float(sum(part @ L for part, L in zip(x, self._rates())))
