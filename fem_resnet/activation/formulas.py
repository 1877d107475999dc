"""Formulas as functions of arrays: an expression and its derivatives, without overflow.

SymPy's formulas overflow where a function itself does not: e^-s / (1 + e^-s)^2 is nan at s = -1e4. Where that is so, a
formula is brought to two others, rational in e^(c s) for s <= 0 and in e^(-c s) for s > 0.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from itertools import chain
from typing import NamedTuple

import numpy as np
import sympy
from numpy.typing import NDArray

from fem_resnet.activation.pieces import REACH, S, cuts, right_of, smooth_formulas

__all__ = ["compiled", "evaluate", "function_of", "in_decaying_powers", "parts", "sample_points", "select"]

Array = NDArray[np.float64]
Function = Callable[[Array], Array]


class Part(NamedTuple):
    """A formula that is good on (left, right], and the function of arrays that evaluates it."""

    left: float
    right: float
    formula: sympy.Expr
    function: Function


def evaluate(expression: sympy.Expr, order: int, s: Array) -> Array:
    """sigma, sigma' or sigma'' (`order` 0, 1, 2) at points s; of a constant one number."""
    with np.errstate(all="ignore"):
        return function_of(expression, order)(s)


def function_of(expression: sympy.Expr, order: int) -> Function:
    """sigma, sigma' or sigma'' (`order` 0, 1, 2) as a function of arrays."""
    found = parts(expression, order)
    return lambda s: select(found, s)


@lru_cache(maxsize=256)
def parts(expression: sympy.Expr, order: int) -> tuple[Part, ...]:
    """sigma, sigma' or sigma'' (`order` 0, 1, 2) as formulas in the real symbol s that do not overflow, from left to right."""
    return tuple(
        chain.from_iterable(
            _parts(sympy.diff(formula, S, order), left, right, sample_points(expression))
            for left, right, formula in smooth_formulas(expression)
        )
    )


def select(parts: Sequence[Part], s: Array) -> Array:
    """The values at points s, of the shape of s, each from the part in whose interval it lies."""
    values = parts[-1].function(np.maximum(s, parts[-1].left))
    for left, right, _, function in reversed(parts[:-1]):
        # At points of other parts this one is evaluated at its own end, since beyond it may overflow.
        values = np.where(s <= right, function(np.clip(s, left, right)), values)
    return values


def _parts(formula: sympy.Expr, left: float, right: float, probes: Array) -> Sequence[Part]:
    """The formula itself if it is finite at the probes; else in decaying powers on each half line if that is; else itself."""

    def is_finite(part: Part) -> bool:
        with np.errstate(all="ignore"):
            return bool(np.isfinite(part.function(probes[(probes > part.left) & (probes <= part.right)])).all())

    plain = _part(left, right, formula)
    try:
        if is_finite(plain):
            return [plain]
        halves = [
            _part(start, end, in_decaying_powers(formula, sign))
            for sign, start, end in ((-1, left, min(right, 0.0)), (1, max(left, 0.0), right))
            if start < end
        ]
        return halves if all(map(is_finite, halves)) else [plain]
    except (NameError, TypeError, AttributeError, sympy.PolynomialError):
        return [plain]


def _part(left: float, right: float, formula: sympy.Expr) -> Part:
    return Part(left, right, formula, compiled(formula))


def compiled(formula: sympy.Expr) -> Function:
    """The formula as a function of arrays."""
    return sympy.lambdify(S, formula, ["scipy", "numpy"], cse=True)


def in_decaying_powers(formula: sympy.Expr, sign: int) -> sympy.Expr:
    """The formula for sign * s >= 0, rational in x = e^(-c |s|), with log(x^k r(x)) = -k c |s| + log r(x).

    All e^(rate s + shift) become powers of x, which is at most 1. Numerators and denominators then have no common factor x,
    so that neither 0 / 0 nor inf / inf arises. A formula that is not of this kind is returned as it is.

    Parameters
    ----------
    formula
        A smooth formula in s.
    sign
        1 for s >= 0, -1 for s <= 0.
    """
    formula = formula.rewrite([sympy.sinh, sympy.cosh], sympy.exp)
    linear = {}
    for power in formula.atoms(sympy.exp):
        if power.exp.is_polynomial(S) and sympy.degree(power.exp, S) == 1:
            linear[power] = [_without_floats(c) for c in sympy.Poly(power.exp, S).all_coeffs()]
    if not linear:
        return formula
    unit = reduce(sympy.gcd, (abs(rate) for rate, _ in linear.values()))
    if not all((rate / unit).is_Integer and abs(rate) <= 16 * unit for rate, _ in linear.values()):
        return formula
    x, minus_log = sympy.Dummy("x", positive=True), unit * sign * S
    formula = formula.xreplace(
        {power: sympy.exp(shift) * x ** (-sign * rate / unit) for power, (rate, shift) in linear.items()}
    )

    def logarithm(argument: sympy.Expr) -> sympy.Expr:
        top, bottom = sympy.fraction(sympy.factor(sympy.together(argument)))
        degree = _lowest_degree(top, x) - _lowest_degree(bottom, x)
        return sympy.log(sympy.factor(top / bottom / x**degree)) - degree * minus_log

    formula = formula.replace(sympy.log, lambda u: logarithm(u) if u.has(x) else sympy.log(u))
    return sympy.factor(sympy.together(formula)).xreplace({x: sympy.exp(-minus_log)})


def _without_floats(number: sympy.Expr) -> sympy.Expr:
    return sympy.nsimplify(number, rational=True) if number.has(sympy.Float) else number


def _lowest_degree(polynomial: sympy.Expr, x: sympy.Symbol) -> int:
    return sympy.Poly(polynomial, x).monoms()[-1][0]


def sample_points(expression: sympy.Expr) -> Array:
    """Points up to |s| = 1e4 at which an expression is looked at, shape (points,).

    Round numbers come first, as messages name the first point that is wrong; then cuts, their neighbours, and a dense grid.
    """
    rounded = [0.0, REACH, -REACH, *(sign * point for point in (1.0, 10.0, 100.0, 700.0, 1e3) for sign in (1, -1))]
    positive = np.concatenate(
        [np.geomspace(1e-6, 1e-2, 41), np.linspace(0.0, 20.0, 2001)[1:], np.geomspace(20.0, REACH, 2000)]
    )
    beside = [sign * right_of(sign * point) for point in cuts(expression) for sign in (-1.0, 1.0)]
    return np.concatenate([rounded, cuts(expression), beside, -positive, positive])
