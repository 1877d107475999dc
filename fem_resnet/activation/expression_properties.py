"""Properties of an activation that is a SymPy expression: proved by interval arithmetic, or sampled.

Each property is a question about the range of sigma or sigma' over all s, and `extremes` proves the answer where it can.
Where it cannot, values on a dense grid up to |s| = 1e4 give the answer, and the property is called *sampled*: no value is
against it, and nothing proves it. That a property does not hold, or that sup |sigma'| is infinite, claims nothing and is never
sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from fem_resnet.activation.enclosure import LONG, Formula, OnePlusErf, Unproved, has_shifts
from fem_resnet.activation.extremes import Piece, supremum, zeros
from fem_resnet.activation.formulas import evaluate, in_decaying_powers, sample_points
from fem_resnet.activation.pieces import REACH, S, exact_cuts, smooth_formulas
from fem_resnet.activation.properties import Properties

__all__ = ["contradicted", "properties_of", "size", "zero_intervals"]

Array = NDArray[np.float64]
#: A bound of |sigma| or |sigma'| counts as the supremum if it exceeds the largest value by no more than this part.
_LOOSE = 1e-2


@lru_cache(maxsize=256)
def properties_of(expression: sympy.Expr) -> Properties:
    """The properties of sigma = expression, proved where that succeeds, else sampled."""
    found = _by_samples(expression)
    claims = [name for name, holds in found.items() if holds and holds != math.inf]
    proofs: dict[str, Callable[[sympy.Expr], float | bool | None]] = {
        "lipschitz": lambda expression: _bound(expression, 1),
        "zero_at_zero": _vanishes_at_zero,
        "sign_preserving": _keeps_sign,
        "positive_slope_at_zero": lambda expression: _is_positive(_pieces(expression, 1), 0.0),
        "non_decreasing": _rises,
        # Where it is no constant, a smooth formula that does not decrease increases strictly.
        "strictly_increasing": _rises,
        "bounded": lambda expression: _bound(expression, 0) and True,
    }
    proved = {name: proofs[name](expression) for name in claims}
    found |= {name: holds for name, holds in proved.items() if holds is not None}
    return Properties(**found, sampled=frozenset(name for name in claims if proved[name] is None))


@lru_cache(maxsize=256)
def size(expression: sympy.Expr) -> tuple[float, bool]:
    """sup |sigma|, infinite if there is no bound, and whether that is proved."""
    sampled = _supremum(expression, 0)
    bound = None if math.isinf(sampled) else _bound(expression, 0)
    return (sampled, math.isinf(sampled)) if bound is None else (bound, True)


def contradicted(expression: sympy.Expr, declared: Mapping[str, float | bool]) -> list[str]:
    """The names of declared properties that values up to 1e4, or a proof, refute.

    A declared property may hold without being shown here, and a declared bound need not be the least one.

    Parameters
    ----------
    expression
        sigma.
    declared
        The fields of `Properties`.
    """
    s = np.sort(sample_points(expression))
    sigma, slope = (np.broadcast_to(evaluate(expression, order, s), s.shape) for order in (0, 1))
    rounding = 1e-9  # of formulas that lose digits
    steepest = max(float(np.abs(slope).max()), _range_of_size(expression, 1)[0])
    falls = bool((slope < -rounding * max(1.0, steepest)).any()) or _rises(expression) is False
    disproved = {
        "lipschitz": declared["lipschitz"] < (1 - rounding) * steepest,
        "zero_at_zero": bool(abs(evaluate(expression, 0, np.zeros(()))) > rounding),
        "sign_preserving": bool((np.sign(s) * sigma < -rounding).any()),
        "positive_slope_at_zero": bool(evaluate(expression, 1, np.zeros(())) <= 0),
        "non_decreasing": falls,
        "strictly_increasing": falls or _has_plateau(expression),
    }
    return [name for name, wrong in disproved.items() if wrong and (name == "lipschitz" or declared[name])]


def zero_intervals(expression: sympy.Expr, at_most: int) -> list[tuple[float, float]]:
    """The points and intervals where sigma is 0, or within round-off of 0, from left to right.

    Parameters
    ----------
    expression
        sigma.
    at_most
        The search may end when more zeros than this are found.

    Raises
    ------
    Unproved
        If interval arithmetic cannot tell.
    """
    found: list[tuple[float, float]] = []
    for piece in _pieces(expression, 0):
        if piece.formula.expression == 0:
            new = [(piece.left, piece.right)]
        else:
            # Cuts are rounded: a zero next to a cut may belong to the neighbour.
            new = (
                []
                if piece.formula.expression.is_number
                else [(max(left, piece.left), min(right, piece.right)) for left, right in zeros(piece, at_most)]
            )
        for left, right in sorted(new):
            if found and left - found[-1][1] <= 1e-9 * max(1.0, abs(left)):
                found[-1] = found[-1][0], right
            else:
                found.append((left, right))
        if len(found) > at_most:
            break
    return found


# ---- by proof -----------------------------------------------------------------------------------------------------


def _pieces(expression: sympy.Expr, order: int) -> list[Piece]:
    return [
        Piece(left, right, Formula(sympy.diff(formula, S, order), S, _rewritten))
        for left, right, formula in smooth_formulas(expression)
    ]


def _rewritten(formula: sympy.Expr, sign: int) -> sympy.Expr:
    """The same function in a form without cancellation for sign * s >= 0."""

    def tail(u: sympy.Expr) -> sympy.Expr:
        return OnePlusErf(u) - 1 if u.subs(S, 20 * sign).is_negative else 1 - sympy.erfc(u)

    u = sympy.Wild("u")
    formula = formula.replace(sympy.erf, tail).replace(sympy.tanh(u) ** 2, 1 - 1 / sympy.cosh(u) ** 2)
    if formula.count_ops() > LONG or has_shifts(formula, S):
        return formula
    return in_decaying_powers(formula.rewrite([sympy.tanh, sympy.sinh, sympy.cosh], sympy.exp), sign)


@lru_cache(maxsize=256)
def _range_of_size(expression: sympy.Expr, order: int) -> tuple[float, float]:
    """Two numbers around sup |sigma| or sup |sigma'|."""
    pieces = _pieces(expression, order)
    pieces += [piece._replace(formula=-piece.formula) for piece in pieces]
    known = _supremum(expression, order)
    if math.isinf(known):
        known = float(np.max(np.abs(evaluate(expression, order, sample_points(expression)))))
    try:
        return supremum(pieces, known=known) if _is_continuous(expression) else (known, math.inf)
    except Unproved:
        return known, math.inf


def _bound(expression: sympy.Expr, order: int) -> float | None:
    low, high = _range_of_size(expression, order)
    return high if high <= (1 + _LOOSE) * low else None


@lru_cache(maxsize=256)
def _rises(expression: sympy.Expr) -> bool | None:
    """Whether sigma' >= 0 everywhere; None if that is not decided."""
    return _is_positive(_pieces(expression, 1)) if _is_continuous(expression) else None


def _keeps_sign(expression: sympy.Expr) -> bool | None:
    if _rises(expression) and _vanishes_at_zero(expression):
        return True
    pieces = _pieces(S * expression, 0) if expression.has(S) else []
    return _is_positive(pieces) if pieces else None


def _is_positive(pieces: list[Piece], at: float | None = None) -> bool | None:
    """Whether a function given in pieces is >= 0 everywhere, or > 0 at one point; None if that is not decided."""
    try:
        if at is not None:
            piece = next(piece for piece in pieces if at <= piece.right)
            value = piece.formula.at(at)
            return True if value.a > 0 else False if value.b <= 0 else None
        low, high = supremum([piece._replace(formula=-piece.formula) for piece in pieces], enough=0.0)
    except Unproved:
        return None
    return True if high <= 0 else False if low > 0 else None


def _vanishes_at_zero(expression: sympy.Expr) -> bool | None:
    formula = next(formula for _, right, formula in smooth_formulas(expression) if right >= 0)
    return formula.subs(S, 0).equals(0)


@lru_cache(maxsize=256)
def _is_continuous(expression: sympy.Expr) -> bool:
    """Whether SymPy knows that formulas meet at the cuts exactly, and not only up to round-off."""
    found = smooth_formulas(expression)
    return all(
        (one - other).subs(S, cut).equals(0)
        for cut, (_, _, one), (_, _, other) in zip(exact_cuts(expression), found, found[1:])
    )


# ---- by samples ---------------------------------------------------------------------------------------------------


def _by_samples(expression: sympy.Expr) -> dict[str, Any]:
    """The properties that values on a dense grid up to 1e4 show."""
    s = np.sort(sample_points(expression))
    sigma, slope = (np.broadcast_to(evaluate(expression, order, s), s.shape) for order in (0, 1))
    at_zero, slope_at_zero = (float(evaluate(expression, order, np.zeros(()))) for order in (0, 1))
    # Rounding errors of formulas such as 1 - tanh(s)^2 are neither slopes nor signs.
    rounding = 4 * float(np.finfo(float).eps)
    non_decreasing = bool((slope >= -rounding * max(1.0, np.abs(slope).max())).all())
    return {
        "lipschitz": _supremum(expression, 1),
        "zero_at_zero": abs(at_zero) <= rounding,
        "sign_preserving": bool((np.sign(s) * sigma >= -rounding).all()),
        "positive_slope_at_zero": slope_at_zero > rounding,
        "non_decreasing": non_decreasing,
        "strictly_increasing": non_decreasing and not _has_plateau(expression),
        "bounded": math.isfinite(_supremum(expression, 0)),
    }


def _supremum(expression: sympy.Expr, order: int) -> float:
    """sup |sigma| or sup |sigma'|."""
    s = np.sort(sample_points(expression))
    size = np.broadcast_to(np.abs(evaluate(expression, order, s)), s.shape)
    peak = int(np.argmax(size))
    top = minimize_scalar(
        lambda point: -abs(float(evaluate(expression, order, np.array(point)))),
        bounds=(s[max(peak - 1, 0)], s[min(peak + 1, s.size - 1)]),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return float(max(-top.fun, *(_continued(np.abs(s[side]), size[side]) for side in (s <= 0, s >= 0))))


def _continued(distance: Array, size: Array) -> float:
    """The supremum on a half line, from values up to 1e4.

    The supremum is infinite if it grows from 1e3 to 1e4 by more than half as much as from 1e2 to 1e3. Smaller growth is
    continued as a geometric sequence. Growth below 0.1 % is ignored, since the grid may miss peaks of an oscillation.
    """
    until_1e2, until_1e3, until_1e4 = (size[distance <= end].max() for end in (1e2, 1e3, REACH))
    before, growth = until_1e3 - until_1e2, until_1e4 - until_1e3
    if growth > max(before / 2, 1e-3 * until_1e4):
        return math.inf
    return until_1e4 + (growth**2 / (before - growth) if 0 < growth <= before / 2 else 0.0)


def _has_plateau(expression: sympy.Expr) -> bool:
    """Whether sigma is constant on some interval: a formula of smooth functions is so only where it is a constant."""
    for left, right, formula in smooth_formulas(expression):
        left, right = max(left, min(right, 1.0) - 2.0), min(right, max(left, -1.0) + 2.0)
        points = (sympy.Rational(left + (right - left) * part) for part in (0.21, 0.47, 0.83))
        slope = sympy.diff(formula, S)
        if all(abs(sympy.N(slope.subs(S, point), 30)) < 1e-100 for point in points):
            return True
    return False
