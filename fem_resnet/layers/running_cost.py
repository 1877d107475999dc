r"""Running costs (section 4.3): the cost of a state and its controls while time goes on.

    J = int_0^T sum_s omega_s L(f_s, a, b) dt + ..,        L(f, a, b) = int_Y l(f(y), a(y)) dy + kappa/2 norm(b)^2 + P(b),

with the norm of L2(Y x Y), and P(b) = int int p(y, z, b(y, z)) dz dy, which `pair_cost` computes. Each sample has a number c
with c_t = L(f, a, b) and c(0) = 0. TS steps c together with f, so that the time stepping method itself integrates L, and steps
may be adapted. The equation (4.2) of the co-state then has the source L_f; with the sign of section 4.1 it reads

    r_t = B^T(sigma'(u) r) - L_f.

Where a layer has a tangent f_1, c has a tangent c_1:

    value       c_t   = tau L
    tangent     c_1,t = tau (l_f f_1 + l_a a_1 + kappa (b, b_1) + p_b b_1) + tau_1 L,       with integrals over Y left out.
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
from fem_resnet.layers.pair_cost import PairCost, PairDensity, PairFormula
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.ranks import together

__all__ = ["CostRate", "Density", "RunningCost"]

_T = TypeVar("_T")


class Density(Protocol):
    """The density l(f, a) of a running cost, and its derivatives, at the nodes of this rank.

    Each method gets the state and the bias at the nodes, both float64, and returns arrays of the state's shape, or arrays that
    NumPy broadcasts to that shape.
    """

    def value(self, f: np.ndarray, a: np.ndarray) -> np.ndarray:
        """The density l itself.

        Parameters
        ----------
        f
            State, shape (nodes, samples).
        a
            Bias, shape (nodes, 1).

        Returns
        -------
        numpy.ndarray
            l(f, a), shape (nodes, samples).
        """

    def gradient(self, f: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first derivatives.

        Parameters
        ----------
        f
            State, shape (nodes, samples).
        a
            Bias, shape (nodes, 1).

        Returns
        -------
        tuple of numpy.ndarray
            l_f and l_a, each of shape (nodes, samples).
        """

    def hessian(self, f: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The second derivatives. A density without this method has first derivatives alone.

        Parameters
        ----------
        f
            State, shape (nodes, samples).
        a
            Bias, shape (nodes, 1).

        Returns
        -------
        tuple of numpy.ndarray
            l_ff, l_fa and l_aa, each of shape (nodes, samples).
        """


class RunningCost(Fixed):
    """The running cost L(f, a, b) = int_Y l(f(y), a(y)) dy + kappa/2 norm(b)^2 + int int p(y, z, b(y, z)) dz dy.

    Parameters
    ----------
    density
        l: a SymPy expression in ``f = sympy.Symbol("f")`` and ``a = sympy.Symbol("a")``, from which the derivatives follow; or
        an object with the methods of `Density`, which may also know a target at the nodes.
    kernel
        kappa >= 0, the weight of half the squared Hilbert-Schmidt norm of b; no unit.
    pairs
        p, for costs of b that are no such norm: a SymPy expression in ``b = sympy.Symbol("b")``, or an object with the methods
        of `PairDensity`, which also knows y and z. b is then looked at in all pairs of nodes, up to 4,096 nodes
        (`pair_cost.LARGEST`), with fixed factors. None for 0.

    Raises
    ------
    TypeError
        If `density` or `pairs` is neither an expression, a number nor an object with these methods, or `kernel` is no number.
    ValueError
        If an expression has other symbols or numbers that are not finite, or `kernel` is negative.

    Examples
    --------
    >>> import sympy
    >>> f, a = sympy.symbols("f a")
    >>> cost = RunningCost(f**2 / 2 + a**2 / 20, kernel=0.1)
    >>> [float(part[0, 0]) for part in cost.density.gradient(np.ones((1, 1)), 2 * np.ones((1, 1)))]
    [1.0, 0.2]
    >>> few_connections = RunningCost(f**2 / 2, pairs=sympy.sqrt(sympy.Symbol("b") ** 2 + 1e-4))
    """

    def __init__(self, density: sympy.Expr | Density, kernel: float = 0.0, pairs: sympy.Expr | PairDensity | None = None):
        if isinstance(density, (type, bool, np.bool_)):
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
        self.pairs = None if pairs is None else PairCost(_pair_density(pairs))

    @property
    def description(self) -> dict[str, object]:
        """What distinguishes it from other running costs: density, kappa and p."""
        p = None if self.pairs is None else self.pairs.density
        return {
            "density": getattr(self.density, "expression", self.density), "kernel": self.kernel,
            "pairs": getattr(p, "expression", p),
        }  # fmt: skip

    def __repr__(self) -> str:
        pairs = "" if self.pairs is None else f", pairs={self.pairs.density!r}"
        return f"RunningCost({self.density!r}, kernel={self.kernel:g}{pairs})"

    @property
    def of_state_alone(self) -> bool:
        """Whether L depends on f alone and not on (a, b), as (4.10) asks.

        A density that is an object states this by an attribute `of_state_alone`; without the attribute it counts as False.
        """
        return self.kernel == 0.0 and self.pairs is None and getattr(self.density, "of_state_alone", False)

    def refuse_pairs(self, tool: str) -> None:
        """Raise ValueError if b is looked at in pairs of nodes, for what takes norms of b alone.

        Parameters
        ----------
        tool
            The name of what does not take it.

        Raises
        ------
        ValueError
            If there is such a cost.
        """
        if self.pairs is not None:
            raise ValueError(
                f"{tool}: it does not take a running cost of b at pairs of nodes; make the RunningCost without pairs"
            )

    @property
    def is_formula(self) -> bool:
        """Whether l is given by an expression, and not by an object of the user's, which may fail on one rank alone."""
        return isinstance(self.density, _Formula)

    @property
    def in_bias(self) -> tuple[float, float] | None:
        """c_1 and c_2 >= 0 where l(f, a) = l_0(f) + c_1 a + c_2/2 a^2, None where l is no such function.

        A density that is an object states this by an attribute `in_bias`; without one it is None where l depends on a.
        """
        if getattr(self.density, "of_state_alone", False):
            return 0.0, 0.0
        return getattr(self.density, "in_bias", None)

    def integrand(self, f: np.ndarray, a: np.ndarray) -> np.ndarray:
        """The density at the nodes of this rank.

        Parameters
        ----------
        f
            State, shape (nodes, samples).
        a
            Bias, shape (nodes,).

        Returns
        -------
        numpy.ndarray
            l(f, a), shape (nodes, samples).
        """
        return np.broadcast_to(self.density.value(f, a[:, None]), f.shape)

    def slopes(self, f: np.ndarray, a: np.ndarray) -> list[np.ndarray]:
        """l_f and l_a at the nodes of this rank: the gradients of L in L2(Y), in f and, for each sample, in a.

        Parameters
        ----------
        f
            State, shape (nodes, samples).
        a
            Bias, shape (nodes,).

        Returns
        -------
        list of numpy.ndarray
            l_f and l_a, each of shape (nodes, samples).
        """
        return [np.broadcast_to(part, f.shape) for part in self.density.gradient(f, a[:, None])]

    def bends(self, f: np.ndarray, a: np.ndarray) -> list[np.ndarray]:
        """l_ff, l_fa and l_aa at the nodes of this rank.

        Parameters
        ----------
        f
            State, shape (nodes, samples).
        a
            Bias, shape (nodes,).

        Returns
        -------
        list of numpy.ndarray
            l_ff, l_fa and l_aa, each of shape (nodes, samples).

        Raises
        ------
        NotImplementedError
            If the density is an object without the method `hessian`.
        """
        if not hasattr(self.density, "hessian"):
            raise NotImplementedError(
                "density: expected an object with the method hessian(f, a), which second derivatives need, got one without; "
                "give it that method"
            )
        return [np.broadcast_to(part, f.shape) for part in self.density.hessian(f, a[:, None])]


def _pair_density(pairs: sympy.Expr | PairDensity) -> PairDensity:
    """p from outside."""
    if isinstance(pairs, Number) and not isinstance(pairs, (bool, np.bool_)):
        pairs = sympy.sympify(number("pairs", pairs))
    if isinstance(pairs, sympy.Expr):
        return PairFormula(pairs)
    if isinstance(pairs, (type, Number)) or not all(callable(getattr(pairs, name, None)) for name in ("value", "gradient")):
        raise TypeError(
            f"pairs: expected a SymPy expression in b, or an object with the methods value(b, y, z) and gradient(b, y, z), "
            f"got {pairs!r}"
        )
    return pairs


class _Formula:
    """The density that a SymPy expression in f and a describes."""

    def __init__(self, expression: sympy.Expr):
        symbols = sympy.symbols("f a", real=True)
        expression = expression.subs({sympy.Symbol(symbol.name): symbol for symbol in symbols})
        others = sorted(map(str, expression.free_symbols - set(symbols)))
        if others:
            raise ValueError(f"density: expected an expression in the symbols f and a alone, got {', '.join(others)} too")
        if any(atom.is_number and not (atom.is_finite and atom.is_real) for atom in expression.atoms()):
            raise ValueError(f"density: expected real, finite numbers in an expression, got {expression}")
        self.expression = expression
        self.of_state_alone = symbols[1] not in expression.free_symbols
        first = [expression.diff(symbol) for symbol in symbols]
        second = [first[0].diff(symbols[0]), first[0].diff(symbols[1]), first[1].diff(symbols[1])]
        self._in_a = first[1].subs(symbols[1], 0), second[2]
        made = (sympy.lambdify(symbols, part, modules=["scipy", "numpy"], cse=True) for part in (expression, first, second))
        self.value, self.gradient, self.hessian = made

    def __repr__(self) -> str:
        return str(self.expression)

    @cached_property
    def in_bias(self) -> tuple[float, float] | None:
        """As of `RunningCost`."""
        slope, bend = map(sympy.simplify, self._in_a)
        return (float(slope), float(bend)) if slope.is_number and bend.is_number and bend >= 0 else None


class CostRate:
    """The rate c_t of the running cost at a stage of a layer, and c_1,t of its tangent: value, derivative and transpose.

    Sequences have one entry an order. Collective over the communicator of the label domain; arrays of nodes hold the nodes of
    this rank.

    Parameters
    ----------
    cost
        The running cost L.
    Y
        The label domain.
    kernel
        The bases of b; None where they are orthonormal and stay so (learned factors).
    length
        tau.
    f
        State, shape (nodes, samples).
    a
        Bias at the nodes, shape (nodes,).
    beta
        Coefficients of b, shape (rank of phi, rank of psi).
    """

    def __init__(
        self,
        cost: RunningCost,
        Y: LabelSpace,
        kernel: LowRankKernel | None,
        length: Sequence[float],
        f: Sequence[np.ndarray] | np.ndarray,
        a: Sequence[np.ndarray],
        beta: Sequence[np.ndarray],
    ):
        self._cost, self._Y, self._kernel = cost, Y, kernel
        self._length, self._f, self._a, self._beta = length, f, a, beta
        self.orders = len(f)
        if kernel is None:
            cost.refuse_pairs("learned factors")

    def _asked(self, part: Callable[[np.ndarray, np.ndarray], _T]) -> _T:
        """A part of the cost at f and a. An error that the user's density raises on one rank is raised on all."""
        return together(None if self._cost.is_formula else self._Y.comm, lambda: part(self._f[0], self._a[0]))

    @cached_property
    def _slopes(self) -> list[np.ndarray]:
        return self._asked(self._cost.slopes)

    @cached_property
    def _moved_slopes(self) -> list[np.ndarray]:
        """Derivatives of l_f and l_a along the tangent."""
        ff, fa, aa = self._asked(self._cost.bends)
        f_1, a_1 = self._f[1], self._a[1][:, None]
        return [ff * f_1 + fa * a_1, fa * f_1 + aa * a_1]

    def _by_beta(self, beta: np.ndarray) -> np.ndarray:
        """The functional in beta of kappa/2 norm(b)^2, a linear function of beta."""
        return self._cost.kernel * (beta if self._kernel is None else self._kernel.functional(beta))

    @cached_property
    def _of_kernel(self) -> tuple[float, np.ndarray]:
        """What L has of b alone, and its functional in beta."""
        beta = self._beta[0]
        by_beta = self._by_beta(beta)
        value = 0.5 * np.sum(by_beta * beta)
        if self._cost.pairs is None:
            return value, by_beta
        pairs = self._cost.pairs.rate(self._kernel, beta)
        return value + pairs.value, by_beta + pairs.by_beta

    @cached_property
    def _moved_by_beta(self) -> np.ndarray:
        """The derivative of the functional in beta along the tangent."""
        moved = self._by_beta(self._beta[1])
        return moved if self._cost.pairs is None else moved + self._cost.pairs.moved(self._kernel, *self._beta)

    def _rates(self) -> list[np.ndarray]:
        """L of each sample, and its derivative along the tangent, without the factor tau."""
        parts = [self._asked(self._cost.integrand)]
        value, by_beta = self._of_kernel
        norms = [value]
        if self.orders == 2:
            l_f, l_a = self._slopes
            parts.append(l_f * self._f[1] + l_a * self._a[1][:, None])
            norms.append(np.sum(by_beta * self._beta[1]))
        sums = self._Y.sum(np.array([self._Y.weights @ part for part in parts]))
        return [total + norm for total, norm in zip(sums, norms)]

    def value(self) -> np.ndarray:
        """c_t and c_1,t, shape (orders, samples), the same on every rank. Collective."""
        L = self._rates()
        result = [self._length[0] * L[0]]
        if self.orders == 2:
            result.append(self._length[0] * L[1] + self._length[1] * L[0])
        return np.array(result)

    def derivative(self, df: Sequence[np.ndarray]) -> np.ndarray:
        """Derivative of `value` in f and f_1. Collective.

        Parameters
        ----------
        df
            Directions of f and f_1, shape (nodes, samples).

        Returns
        -------
        numpy.ndarray
            Shape (orders, samples), the same on every rank.
        """
        tau, l_f = self._length, self._slopes[0]
        result = [tau[0] * l_f * df[0]]
        if self.orders == 2:
            result.append(tau[0] * (l_f * df[1] + self._moved_slopes[0] * df[0]) + tau[1] * l_f * df[0])
        return self._Y.sum(np.array([self._Y.weights @ part for part in result]))

    def transpose(self, x: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Apply the transpose of the derivative of `value`. Collective.

        Parameters
        ----------
        x
            The functional in c and c_1, shape (orders, samples).

        Returns
        -------
        by_f : list of numpy.ndarray
            The functionals in f and f_1, shape (nodes, samples).
        by_a : numpy.ndarray
            The functional in the bias, shape (nodes,).
        by_beta : numpy.ndarray
            The functional in beta, shape (rank of phi, rank of psi).
        """
        tau, w, (l_f, l_a) = self._length, self._Y.weights[:, None], self._slopes
        by_f, by_a = tau[0] * x[0] * l_f, tau[0] * x[0] * l_a
        by_beta = tau[0] * x[0].sum() * self._of_kernel[1]
        if self.orders == 1:
            return [w * by_f], np.sum(w * by_a, axis=1), by_beta
        moved_f, moved_a = self._moved_slopes
        by_f += x[1] * (tau[0] * moved_f + tau[1] * l_f)
        by_a += x[1] * (tau[0] * moved_a + tau[1] * l_a)
        by_beta += x[1].sum() * (tau[0] * self._moved_by_beta + tau[1] * self._of_kernel[1])
        return [w * by_f, w * (tau[0] * x[1] * l_f)], np.sum(w * by_a, axis=1), by_beta

    def by_length(self, x: np.ndarray) -> float:
        """The functional in tau, for a functional `x` in c and c_1 of shape (orders, samples). Collective."""
        return float(sum(part @ L for part, L in zip(x, self._rates())))
