"""An activation from one SymPy expression in s: sigma, sigma', sigma'' and the primitive Sigma as functions of arrays.

`pieces` cuts the expression into smooth formulas, `formulas` evaluates these and their derivatives without overflow, and
`primitive` integrates. `expression_properties` proves properties of sigma, and `expression_tree` has the form of an
expression in files.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import sympy
from numpy.typing import NDArray

from fem_resnet.activation.formulas import Function, evaluate, function_of, sample_points
from fem_resnet.activation.pieces import ADVICE, ORDERS, S, exact_cuts, right_of
from fem_resnet.activation.primitive import primitive_of

__all__ = ["Kernel", "check", "normal_form"]

Array = NDArray[np.float64]


def normal_form(expression: sympy.Expr) -> sympy.Expr:
    """The expression in the one real symbol s (`pieces.S`) of all expressions here.

    Raises
    ------
    TypeError
        If it is no SymPy expression, or has other free symbols than s.
    """
    if not isinstance(expression, sympy.Expr):
        raise TypeError(
            f"expression: expected a SymPy expression in s = sympy.Symbol('s'), got {type(expression).__name__} "
            f"{expression!r}; text is not parsed"
        )
    plain = sympy.Symbol("s")
    others = sorted(sympy.srepr(symbol) for symbol in expression.free_symbols - {plain, S})
    if others:
        raise TypeError(
            f"expression: expected s = sympy.Symbol('s') as its only symbol, got {', '.join(others)} too; put numbers in "
            f"place of these by expression.subs"
        )
    return expression.xreplace({plain: S})


@dataclass(frozen=True)
class Kernel:
    """``kernel(s, out)`` fills `out`, which may be `s` itself, with sigma, sigma', sigma'' (`order` 0, 1, 2) or Sigma (-1).

    Two kernels are equal if their expressions and orders are. Only these are pickled: compiled functions are kept in a cache.
    """

    expression: sympy.Expr
    order: int

    def __call__(self, s: Array, out: Array) -> None:
        with np.errstate(all="ignore"):
            np.copyto(out, _function(self.expression, self.order)(s))


@lru_cache(maxsize=256)
def _function(expression: sympy.Expr, order: int) -> Function:
    return primitive_of(expression) if order == -1 else function_of(expression, order)


def check(expression: sympy.Expr) -> None:
    """Raise a ValueError unless sigma is continuous, real, and finite with sigma' and sigma'' for |s| <= 1e4."""
    s = sample_points(expression)
    for order, name in enumerate(ORDERS):
        try:
            values = np.broadcast_to(evaluate(expression, order, s), s.shape)
        except (NameError, TypeError, AttributeError) as error:
            raise ValueError(f"expression: {name} of {expression} cannot be evaluated by numpy ({error}); {ADVICE}") from error
        if np.iscomplexobj(values):
            raise ValueError(f"expression: {name} of {expression} is complex; give an expression that is real for real s")
        wrong = np.flatnonzero(~np.isfinite(values))
        if wrong.size:
            point, value = s[wrong[0]], values[wrong[0]]
            raise ValueError(f"expression: {name} of {expression} is {value:g} at s = {point:g}; {ADVICE}")
    for cut in exact_cuts(expression):
        _refuse_jump(expression, cut)


def _refuse_jump(expression: sympy.Expr, cut: sympy.Expr) -> None:
    point = float(cut)
    left, right = evaluate(expression, 0, np.array([point, right_of(point)]))
    given = sympy.N(expression.subs(S, cut))
    for value in (right, float(given) if given.is_extended_real else math.nan):
        if not math.isclose(left, value, rel_tol=1e-9, abs_tol=1e-9):
            raise ValueError(
                f"expression: sigma = {expression} jumps at s = {point:g}, from {left:g} to {value:g}, so that sigma' has a "
                "delta there; give a continuous expression"
            )
