"""An expression in s, cut into smooth formulas at the points where it changes from one formula to another.

An expression changes where a condition of a `Piecewise` changes, or the argument of an `Abs`, or the greatest argument of a
`Max`. On each interval (l, r] between two such points, the *cuts*, only smooth functions are left, and these are
differentiated. So at a cut all values are those *from the left*, and no delta arises, as the expression may not jump there.
"""

import math
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import combinations, pairwise

import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean, BooleanAtom

__all__ = ["ADVICE", "ORDERS", "REACH", "S", "SWITCHES", "cuts", "exact_cuts", "right_of", "smooth_formulas"]

#: The one symbol of expressions. It is real, so that SymPy knows that s^2 is positive, and that sqrt(s^2) is |s|.
S = sympy.Symbol("s", real=True)
#: Every activation is finite for |s| <= REACH.
REACH = 1e4
#: How messages call an expression and its derivatives.
ORDERS = ("sigma", "sigma'", "sigma''")
#: What messages advise where doubles cannot evaluate an expression.
ADVICE = (
    f"give an expression that doubles can evaluate for |s| <= {REACH:g}, for example by sympy.Piecewise, or with "
    "exp(-Abs(s)) in place of exp(s)"
)


def smooth_formulas(expression: sympy.Expr) -> list[tuple[float, float, sympy.Expr]]:
    """(l, r, formula) for each interval (l, r] between two cuts, from left to right."""
    ends = [-math.inf, *cuts(expression), math.inf]
    return [(*ends, formula) for ends, (_, formula) in zip(pairwise(ends), _pieces(expression), strict=True)]


def cuts(expression: sympy.Expr) -> tuple[float, ...]:
    """Where formulas meet, ascending, rounded to doubles."""
    return tuple(float(cut) for cut in exact_cuts(expression))


def exact_cuts(expression: sympy.Expr) -> tuple[sympy.Expr, ...]:
    """Where formulas meet, ascending, as SymPy has them."""
    return tuple(right for right, _ in _pieces(expression)[:-1])


def right_of(point: float) -> float:
    """The next normal number to the right: libraries linked with -ffast-math make processors take 5e-324 for 0."""
    return max(math.nextafter(point, math.inf), point + sys.float_info.min)


#: Functions that change their formula where one of these expressions is zero.
SWITCHES: dict[type[sympy.Basic], Callable[[sympy.Basic], list[sympy.Expr]]] = {
    sympy.Abs: lambda node: [node.args[0]],
    sympy.sign: lambda node: [node.args[0]],
    sympy.Heaviside: lambda node: [node.args[0]],
    sympy.Max: lambda node: [a - b for a, b in combinations(node.args, 2)],
    sympy.Min: lambda node: [a - b for a, b in combinations(node.args, 2)],
    sympy.Piecewise: lambda node: [side for _, condition in node.args for side in _sides(condition)],
}
#: And the formula that stands for each at a point that is none of these zeros.
_BRANCHES: dict[type[sympy.Basic], Callable[[sympy.Basic, Callable], sympy.Expr | None]] = {
    sympy.Abs: lambda node, at: node.args[0] * sympy.sign(at(node.args[0])),
    sympy.sign: lambda node, at: sympy.sign(at(node.args[0])),
    sympy.Heaviside: lambda node, at: sympy.Heaviside(at(node.args[0])),
    sympy.Max: lambda node, at: max(node.args, key=at),
    sympy.Min: lambda node, at: min(node.args, key=at),
    sympy.Piecewise: lambda node, at: next((branch for branch, condition in node.args if at(condition) is True), None),
}


@lru_cache(maxsize=256)
def _pieces(expression: sympy.Expr) -> tuple[tuple[sympy.Expr, sympy.Expr], ...]:
    """(r, formula) from left to right: the expression is `formula` up to and including r; the last r is infinite."""
    found = _cut(expression, -sympy.oo, sympy.oo)
    return tuple(piece for piece, after in pairwise([*found, (None, None)]) if piece[1] != after[1])


def _cut(expression: sympy.Expr, left: sympy.Expr, right: sympy.Expr) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """(r, formula) on (left, right], from left to right; neighbours may have the same formula."""
    nodes = sympy.postorder_traversal(expression)
    node: sympy.Expr | None = next((node for node in nodes if isinstance(node, tuple(SWITCHES))), None)
    if node is None:
        _refuse_what_is_not_smooth(expression, left, right)
        return [(right, expression)]
    zeros = {zero for switch in SWITCHES[node.func](node) for zero in _zeros(switch, left, right, node)}
    pieces = []
    for start, end in pairwise([left, *sorted(zeros, key=float), right]):
        inside = _between(start, end)
        branch = _BRANCHES[node.func](node, partial(_at, inside))
        if branch is None:
            raise ValueError(
                f"expression: {node} has no case for s = {float(inside):g}; add one, the last with condition True"
            )
        pieces += _cut(expression.xreplace({node: branch}), start, end)
    return pieces


def _sides(condition: sympy.Basic) -> list[sympy.Expr]:
    """The left minus the right side of each comparison in a condition."""
    if isinstance(condition, Relational):
        return [condition.lhs - condition.rhs]
    if isinstance(condition, sympy.And | sympy.Or | sympy.Not | BooleanAtom):
        return [side for part in condition.args for side in _sides(part)]
    raise ValueError(f"expression: {condition} is no condition on s; give comparisons, joined by &, | and ~")


def _at(point: sympy.Expr, part: sympy.Basic) -> sympy.Expr | bool:
    value = part.subs(S, point)
    return value == True if isinstance(value, Boolean) else sympy.N(value, 30)  # noqa: E712


def _between(start: sympy.Expr, end: sympy.Expr) -> sympy.Expr:
    if start.is_infinite:
        return sympy.Integer(0) if end.is_infinite else end - 1
    return start + 1 if end.is_infinite else (start + end) / 2


def _zeros(switch: sympy.Expr, left: sympy.Expr, right: sympy.Expr, node: sympy.Expr) -> list[sympy.Expr]:
    """The zeros strictly between left and right."""
    zeros = sympy.solveset(switch, S, sympy.Interval.open(left, right)) if switch.has(S) else sympy.S.EmptySet
    if not (zeros.is_empty or isinstance(zeros, sympy.FiniteSet) and all(zero.is_comparable for zero in zeros)):
        raise ValueError(
            f"expression: the points where {node} changes from one formula to another are not finitely many, or SymPy does "
            "not find them; give them as conditions of a sympy.Piecewise"
        )
    return list(zeros)


_WITHOUT_VALUES = (
    sympy.DiracDelta, sympy.Derivative, sympy.Subs, sympy.Integral, AppliedUndef, sympy.nan, sympy.zoo
)  # fmt: skip


def _refuse_what_is_not_smooth(formula: sympy.Expr, left: sympy.Expr, right: sympy.Expr) -> None:
    for order, name in enumerate(ORDERS):
        derivative = sympy.diff(formula, S, order)
        if kinds := [getattr(kind, "__name__", str(kind)) for kind in _WITHOUT_VALUES if derivative.has(kind)]:
            raise ValueError(
                f"expression: {name} of {formula} contains {', '.join(kinds)}, which has no values; "
                "give an expression of functions that SymPy can differentiate"
            )
    if formula.has(sympy.I):
        raise ValueError(f"expression: sigma = {formula} is complex; give an expression that is real for real s")
    for base in _singular_where_zero(formula):
        try:
            poles = sympy.solveset(base, S, sympy.Interval.open(left, right))
        except NotImplementedError:
            continue
        # SymPy gives other sets where it cannot solve; there `expression.check` looks at values.
        if isinstance(poles, sympy.FiniteSet | sympy.ImageSet | sympy.Union):
            raise ValueError(f"expression: sigma = {formula} is singular where {base} = 0; {ADVICE}")


def _singular_where_zero(formula: sympy.Expr) -> list[sympy.Expr]:
    bases = [power.base for power in formula.atoms(sympy.Pow) if power.exp.is_number and power.exp.is_negative]
    bases += [logarithm.args[0] for logarithm in formula.atoms(sympy.log)]
    bases += [sympy.cos(tangent.args[0]) for tangent in formula.atoms(sympy.tan)]
    return [base for base in bases if base.has(S) and not base.is_positive]
