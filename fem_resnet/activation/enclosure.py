"""Enclosures: intervals that provably contain all values of a formula in s over an interval.

An *enclosure* of g over an interval X is an interval that contains g(X). Interval arithmetic (mpmath's, rounded outward)
gives one from the formula. It is too wide where s occurs more than once. So the intersection is taken over several forms of
the formula: as given, as a product, in decaying powers of e, and on half lines as a function of 1 / s. A product
s^k e^(p(s)) is enclosed as one function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, lru_cache
from math import prod
from typing import NamedTuple

import mpmath
import sympy
from mpmath.ctx_iv import MPIntervalContext

__all__ = [
    "EVERYTHING", "LONG", "Formula", "OnePlusErf", "Unproved", "has_shifts", "interval", "round_down", "round_up",
]  # fmt: skip

_DIGITS = 80  # bits
# Contexts of our own: their precision is nobody else's.
_IV, _MP = MPIntervalContext(), mpmath.MPContext()
_IV.prec = _MP.prec = _DIGITS
#: mpmath's functions are good to the last bits; this many more are granted.
_SLACK = _MP.mpf(2) ** (16 - _DIGITS)
#: With more operations than this in a formula, SymPy may take minutes to bring it to another form.
LONG = 40


class Unproved(Exception):
    """Interval arithmetic has no answer: a function is unknown, or a value may not exist."""


def interval(low, high):
    """The interval [low, high], of arithmetic that rounds outward; ends may be infinite."""
    return _IV.mpf([low, high])


#: The whole line.
EVERYTHING = interval(-_IV.inf, _IV.inf)


def _number(x: float | mpmath.mpf):
    return _IV.mpf(x)


class OnePlusErf(sympy.Function):
    """1 + erf(u) = erfc(-u). SymPy writes it as 2 - erfc(u), which loses all digits where u is far below 0."""

    nargs = 1


# ---- enclosures of formulas ---------------------------------------------------------------------------------------


def _widened(low, high, slack=(_SLACK, _SLACK)):
    return interval(low - abs(low) * slack[0], high + abs(high) * slack[1])


def _increasing(function: Callable, least: float = -math.inf, bounds: tuple[float, float] = (-math.inf, math.inf)):
    """Enclosures by a function that increases from `least` on, with values within `bounds`."""

    def enclose(X):
        if X.a < least:
            raise Unproved(f"an argument may be below {least}")
        ends = [_MP.mpf(end) for end in (X.a, X.b)]
        # At 0 all of these are exact, 0 or 1.
        found = _widened(*(_MP.convert(function(end)) for end in ends), [_SLACK if end else 0 for end in ends])
        return interval(max(found.a, _IV.mpf(bounds[0]).a), min(found.b, _IV.mpf(bounds[1]).b))

    return enclose


def _decreasing(function: Callable, bounds: tuple[float, float]):
    mirrored = _increasing(lambda x: function(-x), bounds=bounds)
    return lambda X: mirrored(-X)


def _cosh(X):
    ends = [abs(_MP.mpf(X.a)), abs(_MP.mpf(X.b))]
    least = 0 if X.a <= 0 <= X.b else min(ends)
    return _widened(_MP.cosh(least), _MP.cosh(max(ends)), [_SLACK if least else 0, _SLACK])


def _circular(function: Callable):
    return lambda X: function(X) if math.isfinite(X.a) and math.isfinite(X.b) else interval(-1, 1)


_FUNCTIONS = {
    sympy.exp: _increasing(_MP.exp, bounds=(0.0, math.inf)),
    sympy.log: _increasing(lambda x: _MP.log(x) if x else -_MP.inf, least=0.0),
    sympy.erf: _increasing(_MP.erf, bounds=(-1.0, 1.0)),
    sympy.tanh: _increasing(_MP.tanh, bounds=(-1.0, 1.0)),
    sympy.atan: _increasing(_MP.atan),
    sympy.sinh: _increasing(_MP.sinh),
    sympy.asinh: _increasing(lambda x: x if _MP.isinf(x) else _MP.asinh(x)),
    sympy.erfc: _decreasing(_MP.erfc, bounds=(0.0, 2.0)),
    OnePlusErf: _increasing(lambda x: _MP.erfc(-x), bounds=(0.0, 2.0)),
    sympy.cosh: _cosh,
    sympy.sin: _circular(_IV.sin),
    sympy.cos: _circular(_IV.cos),
}


class _Over:
    """Enclosures of formulas in s over one interval, each part once."""

    def __init__(self, s: sympy.Symbol, X):
        self.s, self.X, self._known = s, X, {s: X, sympy.pi: _IV.pi, sympy.E: _IV.e}

    def __call__(self, node: sympy.Expr):
        if node not in self._known:
            self._known[node] = self._of(node)
        return self._known[node]

    def _of(self, node: sympy.Expr):
        if node.is_Rational:
            return _IV.mpf(int(node.p)) / int(node.q)
        if node.is_Add:
            return sum(map(self, node.args), _IV.mpf(0))
        if node.is_Mul:
            return self._product(node)
        if node.is_Pow:
            return _power(self(node.base), node.exp)
        if node.func in _FUNCTIONS:
            return _FUNCTIONS[node.func](self(node.args[0]))
        raise Unproved(f"no enclosure of {node.func}")

    def _product(self, node: sympy.Mul):
        """An enclosure of a product; s^k e^(p(s)) counts as one factor, monotone where k / s + p'(s) has one sign."""
        factors, X = _factors(node, self.s), self.X
        product = prod(map(self, node.args if factors is None else factors.others), start=_IV.mpf(1))
        if factors is None:
            return product
        one_sign = (X.a >= 0 or X.b <= 0) and X.a != X.b
        rate = self(factors.rate) if one_sign else EVERYTHING
        if rate.a < 0 < rate.b:
            return product * _power(X, factors.power) * self(sympy.exp(factors.exponent))
        ends = [_at_end(factors, self.s, end) for end in (X.a, X.b)]
        return product * interval(min(end.a for end in ends), max(end.b for end in ends))


def _power(base, exponent: sympy.Expr):
    if exponent.is_Integer:
        whole = base ** abs(int(exponent))
        return whole if exponent >= 0 else _inverse(whole)
    if not exponent.is_Rational or base.a < 0:
        raise Unproved("a root of a number that may be negative")
    root = _increasing(lambda x: x ** (_MP.mpf(int(abs(exponent.p))) / int(exponent.q)), least=0.0)(base)
    return root if exponent > 0 else _inverse(root)


def _inverse(X):
    """1 / X; if X ends at 0, the half line on its side of 0."""
    if X.a > 0 or X.b < 0:
        return 1 / X
    if X.a == 0 and X.b > 0:
        return interval((1 / _number(X.b)).a, _IV.inf)
    if X.b == 0 and X.a < 0:
        return interval(-_IV.inf, (1 / _number(X.a)).b)
    return EVERYTHING


class _Factors(NamedTuple):
    """A product as s^power e^exponent times others; `rate` is the derivative of the logarithm of the first two."""

    power: sympy.Expr
    exponent: sympy.Expr
    rate: sympy.Expr
    others: tuple[sympy.Expr, ...]


@lru_cache(maxsize=4096)
def _factors(node: sympy.Mul, s: sympy.Symbol) -> _Factors | None:
    """None where s^k and e^p(s) do not both occur."""
    power, exponent, others = sympy.Integer(0), sympy.Integer(0), []
    for factor in node.args:
        base, k = factor.as_base_exp()
        if base == s and k.is_Integer:
            power += k
        elif factor.func is sympy.exp and factor.args[0].is_polynomial(s):
            exponent += factor.args[0]
        else:
            others.append(factor)
    if power == 0 or not exponent.has(s):
        return None
    return _Factors(power, exponent, sympy.expand(power / s + sympy.diff(exponent, s)), tuple(others))


def _at_end(factors: _Factors, s: sympy.Symbol, end):
    """s^k e^p at an end of an interval; where that is infinite, the limit 0 or infinity."""
    power, exponent = factors.power, factors.exponent
    if not _MP.isinf(_MP.mpf(end)):
        return _power(_number(end), power) * _Over(s, _number(end))(sympy.exp(exponent))
    leading = sympy.LC(exponent, s) * (1 if end > 0 else (-1) ** sympy.degree(exponent, s))
    sign = 1 if end > 0 or power.is_even else -1
    return _IV.mpf(0) if leading < 0 else sign * _IV.inf


class Formula:
    """A smooth formula in s, and its enclosures over intervals.

    Parameters
    ----------
    expression
        In the one symbol `s`. Decimal numbers stand for the binary ones as which they are stored.
    s
        The symbol, real.
    rewritten
        ``rewritten(expression, sign)`` gives the same function in another form, for sign * s >= 0, or fails.
    """

    def __init__(self, expression: sympy.Expr, s: sympy.Symbol, rewritten: Callable[[sympy.Expr, int], sympy.Expr]):
        exact = {number: sympy.Rational(number) for number in expression.atoms(sympy.Float)}
        self.expression, self._s, self._rewritten = expression.xreplace(exact), s, rewritten
        self._forms: dict[int, sympy.Expr | None] = {}

    def __neg__(self) -> Formula:
        return Formula(-self.expression, self._s, self._rewritten)

    @cached_property
    def slope(self) -> Formula:
        """Its derivative."""
        return Formula(sympy.diff(self.expression, self._s), self._s, self._rewritten)

    def over(self, X):
        """An interval that contains all values over the interval X, which may be a half line or a point.

        Raises
        ------
        Unproved
            If there is none.
        """
        found = _meet(self._by(self.expression, self._s, X), self._by(self._form(0), self._s, X))
        if X.a >= 0 or X.b <= 0:
            found = _meet(found, self._by(self._form(_side(X)), self._s, X))
        if math.isinf(X.a) != math.isinf(X.b) and X.a * X.b > 0:
            found = _meet(found, self._by(self._form(2), self._s, _reciprocal(X)))
        if found is None:
            raise Unproved(f"no enclosure of {self.expression}")
        return found

    def _by(self, form: sympy.Expr | None, s: sympy.Symbol, X):
        if form is None:
            return None
        try:
            found = _Over(s, X)(form)
        except (Unproved, ZeroDivisionError, ValueError, OverflowError, TypeError):
            return None
        return None if math.isnan(found.a) or math.isnan(found.b) else found

    def at(self, point: float):
        """An interval that contains the value at one point; errors are as of `over`."""
        return self.over(_number(point))

    def never_zero_far_out(self, X) -> bool:
        """Whether no factor of the formula vanishes on a half line, where it may decay to 0."""
        form = self._form(_side(X))
        return form is not None and all(self._has_no_zero(factor, X) for factor in sympy.Mul.make_args(form))

    def _has_no_zero(self, factor: sympy.Expr, X) -> bool:
        base, exponent = factor.as_base_exp()
        if exponent.is_negative or base.func in (sympy.exp, sympy.erfc, OnePlusErf, sympy.cosh) or base.is_positive:
            return True
        over = self._by(base, self._s, X)
        return over is not None and (over.a > 0 or over.b < 0)

    def _form(self, kind: int) -> sympy.Expr | None:
        """As a product (0); in decaying powers of e for s < 0 (-1) or s > 0 (1); as a function of 1 / s (2)."""
        if kind not in self._forms:
            try:
                if abs(kind) == 1:
                    form = self._rewritten(self.expression, kind)
                elif self.expression.count_ops() > LONG or has_shifts(self.expression, self._s):
                    form = None
                elif kind == 0:
                    form = sympy.factor(sympy.together(self.expression))
                else:
                    form = sympy.cancel(sympy.together(self.expression.subs(self._s, 1 / self._s)))
            except (sympy.PolynomialError, AttributeError, TypeError, NotImplementedError, ValueError):
                form = None
            self._forms[kind] = form
        return self._forms[kind]


def has_shifts(expression: sympy.Expr, s: sympy.Symbol) -> bool:
    """Whether the expression has an e^(c s + d), d not 0: SymPy takes for ever to factor these."""
    return any(part.args[0].subs(s, 0) != 0 for part in expression.atoms(sympy.exp, sympy.tanh, sympy.sinh, sympy.cosh))


def _side(X) -> int:
    return 1 if X.a >= 0 else -1


def _reciprocal(X):
    return interval(0, (1 / _IV.mpf(X.a)).b) if X.a > 0 else interval((1 / _IV.mpf(X.b)).a, 0)


def _meet(one, other):
    if one is None or other is None:
        return one if other is None else other
    return interval(max(one.a, other.a), min(one.b, other.b))


def round_up(x) -> float:
    """A double that is not below x."""
    rounded = float(x)
    return rounded if _MP.mpf(rounded) >= _MP.mpf(x) else math.nextafter(rounded, math.inf)


def round_down(x) -> float:
    """A double that is not above x."""
    return -round_up(-_MP.mpf(x))
