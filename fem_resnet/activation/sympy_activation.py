r"""An activation from one SymPy expression in s: sigma, sigma', sigma'' and the primitive Sigma as functions of arrays.

The expression is first cut at the points where it changes from one formula to another: where a condition of a
`Piecewise` changes, or the argument of an `Abs`, or the greatest argument of a `Max`. On each interval
(l, r] between two cuts only smooth functions are left, and these are differentiated: at a cut all values are those
*from the left*, and no delta arises, as the expression may not jump there.

SymPy's formulas overflow where a function itself does not: e^-s / (1 + e^-s)^2 is nan at s = -1e4. Where that is so, a
formula is brought to two others, rational in e^(c s) for s <= 0 and in e^(-c s) for s > 0.

The primitive Sigma(s) = int_0^s sigma is a sum of Gauss integrals over cells that are halved until

    |error| <= 1e-14 int |sigma|        (integral between 0 and s),

and from the second cell on SymPy's antiderivative, if there is one that agrees with it. Next to 0 a difference of two
values of an antiderivative would lose its digits.

In a file an expression is a tree of lists, ``["Mul", 2, ["tanh", "s"]]``, rebuilt from a fixed list of functions:
no text is evaluated.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from itertools import chain, combinations, cycle, pairwise
from typing import NamedTuple

import numpy as np
import sympy
from numpy.typing import NDArray
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.functions.elementary.piecewise import ExprCondPair
from sympy.integrals.manualintegrate import manualintegrate
from sympy.logic.boolalg import Boolean, BooleanAtom

__all__ = [
    "REACH", "S", "Kernel", "Tree", "check", "cuts", "evaluate", "from_tree", "in_decaying_powers", "normal_form", "parts",
    "right_of", "sample_points", "smooth_formulas", "to_tree",
]  # fmt: skip

Array = NDArray[np.float64]
Function = Callable[[Array], Array]
Tree = bool | int | str | list

# An expression is one of s, real: so SymPy knows that s^2 is positive, and sqrt(s^2) is |s|.
S = sympy.Symbol("s", real=True)
#: Every activation is finite for |s| <= REACH.
REACH = 1e4
_ORDERS = ("sigma", "sigma'", "sigma''")

_ADVICE = (
    f"give an expression that doubles can evaluate for |s| <= {REACH:g}, for example by sympy.Piecewise, or with "
    "exp(-Abs(s)) in place of exp(s)"
)


def normal_form(expression: sympy.Expr) -> sympy.Expr:
    """The expression in the one real symbol s that all expressions here are written in.

    Raises
    ------
    TypeError
        If it is no SymPy expression, or has other free symbols than s.
    """
    if not isinstance(expression, sympy.Expr):
        raise TypeError(
            f"expression is {expression!r}, {type(expression).__name__}; give a SymPy expression in "
            "s = sympy.Symbol('s') (text is not parsed)"
        )
    plain = sympy.Symbol("s")
    others = sorted(sympy.srepr(symbol) for symbol in expression.free_symbols - {plain, S})
    if others:
        raise TypeError(
            f"expression depends on {', '.join(others)}; only s = sympy.Symbol('s') may occur in it: "
            "put numbers in place of the others by expression.subs"
        )
    return expression.xreplace({plain: S})


@dataclass(frozen=True)
class Kernel:
    """``kernel(s, out)`` fills `out` with sigma, sigma', sigma'' (`order` 0, 1, 2) or Sigma (-1); it may be `s` itself.

    Equal if the expressions are, and pickled as such: what is compiled from it is kept elsewhere.
    """

    expression: sympy.Expr
    order: int

    def __call__(self, s: Array, out: Array) -> None:
        with np.errstate(all="ignore"):
            np.copyto(out, _function(self.expression, self.order)(s))


def cuts(expression: sympy.Expr, exact: bool = False) -> tuple[float, ...] | tuple[sympy.Expr, ...]:
    """Where formulas meet, ascending: as doubles, or exactly as SymPy has them."""
    return tuple(right if exact else float(right) for right, _ in _pieces(expression)[:-1])


def right_of(point: float) -> float:
    """The next normal number: once a kernel linked with -ffast-math is loaded, 5e-324 is taken for 0."""
    return max(math.nextafter(point, math.inf), point + sys.float_info.min)


def check(expression: sympy.Expr) -> None:
    """Raise a ValueError unless sigma is continuous, real, and finite with sigma' and sigma'' for |s| <= 1e4."""
    s = sample_points(expression)
    for order, name in enumerate(_ORDERS):
        try:
            values = np.broadcast_to(evaluate(expression, order, s), s.shape)
        except (NameError, TypeError, AttributeError) as error:
            raise ValueError(f"{name} of {expression} cannot be evaluated by numpy ({error}); {_ADVICE}") from error
        if np.iscomplexobj(values):
            raise ValueError(f"{name} of {expression} is complex; give an expression that is real for real s")
        wrong = np.flatnonzero(~np.isfinite(values))
        if wrong.size:
            point, value = s[wrong[0]], values[wrong[0]]
            raise ValueError(f"{name} of {expression} is {value:g} at s = {point:g}; {_ADVICE}")
    for cut, _ in _pieces(expression)[:-1]:
        _refuse_jump(expression, cut)


def _refuse_jump(expression: sympy.Expr, cut: sympy.Expr) -> None:
    point = float(cut)
    left, right = evaluate(expression, 0, np.array([point, right_of(point)]))
    given = sympy.N(expression.subs(S, cut))
    for value in (right, float(given) if given.is_extended_real else math.nan):
        if not math.isclose(left, value, rel_tol=1e-9, abs_tol=1e-9):
            raise ValueError(
                f"sigma = {expression} jumps at s = {point:g}, from {left:g} to {value:g}, so that sigma' has a "
                "delta there; give a continuous expression"
            )


def sample_points(expression: sympy.Expr) -> Array:
    """Where an expression is looked at: round numbers first, for messages; a dense grid; the neighbours of the cuts."""
    rounded = [0.0, REACH, -REACH, *(sign * point for point in (1.0, 10.0, 100.0, 700.0, 1e3) for sign in (1, -1))]
    positive = np.concatenate(
        [np.geomspace(1e-6, 1e-2, 41), np.linspace(0.0, 20.0, 2001)[1:], np.geomspace(20.0, REACH, 2000)]
    )
    beside = [sign * right_of(sign * point) for point in cuts(expression) for sign in (-1.0, 1.0)]
    return np.concatenate([rounded, cuts(expression), beside, -positive, positive])


# ---- cutting an expression into smooth formulas -------------------------------------------------------------------

# Where formulas change: where one of these expressions is zero.
_SWITCHES = {
    sympy.Abs: lambda node: [node.args[0]],
    sympy.sign: lambda node: [node.args[0]],
    sympy.Heaviside: lambda node: [node.args[0]],
    sympy.Max: lambda node: [a - b for a, b in combinations(node.args, 2)],
    sympy.Min: lambda node: [a - b for a, b in combinations(node.args, 2)],
    sympy.Piecewise: lambda node: [side for _, condition in node.args for side in _sides(condition)],
}
# And what stands for them at a point that is none of these zeros.
_BRANCHES = {
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
    nodes = sympy.postorder_traversal(expression)
    node = next((node for node in nodes if isinstance(node, tuple(_SWITCHES))), None)
    if node is None:
        _refuse_what_is_not_smooth(expression, left, right)
        return [(right, expression)]
    zeros = {zero for switch in _SWITCHES[node.func](node) for zero in _zeros(switch, left, right, node)}
    pieces = []
    for start, end in pairwise([left, *sorted(zeros, key=float), right]):
        inside = _between(start, end)
        branch = _BRANCHES[node.func](node, partial(_at, inside))
        if branch is None:
            raise ValueError(f"{node} has no case for s = {float(inside):g}; add one, the last with condition True")
        pieces += _cut(expression.xreplace({node: branch}), start, end)
    return pieces


def _sides(condition: sympy.Basic) -> list[sympy.Expr]:
    """Lhs - rhs of all comparisons in a condition."""
    if isinstance(condition, Relational):
        return [condition.lhs - condition.rhs]
    if isinstance(condition, sympy.And | sympy.Or | sympy.Not | BooleanAtom):
        return [side for part in condition.args for side in _sides(part)]
    raise ValueError(f"{condition} is no condition on s; give comparisons, joined by &, | and ~")


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
            f"the points where {node} changes from one formula to another are not finitely many, or SymPy does not "
            "find them; give them as conditions of a sympy.Piecewise"
        )
    return list(zeros)


_WITHOUT_VALUES = (
    sympy.DiracDelta, sympy.Derivative, sympy.Subs, sympy.Integral, AppliedUndef, sympy.nan, sympy.zoo
)  # fmt: skip


def _refuse_what_is_not_smooth(formula: sympy.Expr, left: sympy.Expr, right: sympy.Expr) -> None:
    for order, name in enumerate(_ORDERS):
        derivative = sympy.diff(formula, S, order)
        if kinds := [getattr(kind, "__name__", str(kind)) for kind in _WITHOUT_VALUES if derivative.has(kind)]:
            raise ValueError(
                f"{name} of {formula} contains {', '.join(kinds)}, which has no values; "
                "give an expression of functions that SymPy can differentiate"
            )
    if formula.has(sympy.I):
        raise ValueError(f"sigma = {formula} is complex; give an expression that is real for real s")
    for base in _singular_where_zero(formula):
        try:
            poles = sympy.solveset(base, S, sympy.Interval.open(left, right))
        except NotImplementedError:
            continue
        # Other sets are what SymPy cannot solve; that is left to the probes.
        if isinstance(poles, sympy.FiniteSet | sympy.ImageSet | sympy.Union):
            raise ValueError(f"sigma = {formula} is singular where {base} = 0; {_ADVICE}")


def _singular_where_zero(formula: sympy.Expr) -> list[sympy.Expr]:
    bases = [power.base for power in formula.atoms(sympy.Pow) if power.exp.is_number and power.exp.is_negative]
    bases += [logarithm.args[0] for logarithm in formula.atoms(sympy.log)]
    bases += [sympy.cos(tangent.args[0]) for tangent in formula.atoms(sympy.tan)]
    return [base for base in bases if base.has(S) and not base.is_positive]


# ---- evaluating them ----------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A formula that is good on (left, right], and the function of arrays that evaluates it."""

    left: float
    right: float
    formula: sympy.Expr
    function: Function


def smooth_formulas(expression: sympy.Expr) -> list[tuple[float, float, sympy.Expr]]:
    """(l, r, formula) for each interval (l, r] between two cuts."""
    ends = [-math.inf, *cuts(expression), math.inf]
    return [(*ends, formula) for ends, (_, formula) in zip(pairwise(ends), _pieces(expression), strict=True)]


def evaluate(expression: sympy.Expr, order: int, s: Array) -> Array:
    """sigma, sigma' or sigma'' (`order` 0, 1, 2) at points s; of a constant one number."""
    with np.errstate(all="ignore"):
        return _function(expression, order)(s)


@lru_cache(maxsize=256)
def _function(expression: sympy.Expr, order: int) -> Function:
    if order == -1:
        return _primitive(expression)
    found = parts(expression, order)
    return lambda s: _select(found, s)


@lru_cache(maxsize=256)
def parts(expression: sympy.Expr, order: int) -> tuple[Part, ...]:
    """sigma, sigma' or sigma'' (`order` 0, 1, 2) as formulas in the real symbol s that do not overflow, from left to right."""
    return tuple(
        chain.from_iterable(
            _parts(sympy.diff(formula, S, order), left, right, sample_points(expression))
            for left, right, formula in smooth_formulas(expression)
        )
    )


def _select(parts: Sequence[Part], s: Array) -> Array:
    values = parts[-1].function(np.maximum(s, parts[-1].left))
    for left, right, _, function in reversed(parts[:-1]):
        # Where another part is meant this one sees its own end, as beyond it may overflow.
        values = np.where(s <= right, function(np.clip(s, left, right)), values)
    return values


def _parts(formula: sympy.Expr, left: float, right: float, probes: Array) -> Sequence[Part]:
    """The formula as it is if it is finite at the probes; else by halves if they are; else as it is."""

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
    return Part(left, right, formula, _compile(formula))


def _compile(formula: sympy.Expr) -> Function:
    return sympy.lambdify(S, formula, ["scipy", "numpy"], cse=True)


def in_decaying_powers(formula: sympy.Expr, sign: int) -> sympy.Expr:
    """The formula for sign * s >= 0, rational in x = e^(-c |s|), with log(x^k r(x)) = -k c |s| + log r(x).

    All e^(rate s + shift) become powers of x, which is at most 1; numerators and denominators then have no common
    factor x, so that 0 / 0 arises no more than inf / inf.
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


# ---- the primitive ------------------------------------------------------------------------------------------------

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_MAX_CELLS = 2**20
_MAX_SWEEPS = 40


def _gauss(function: Function, a: Array, b: Array) -> Array:
    """int_a^b function, by Gauss's rule with 16 points."""
    middle, radius = (a + b) / 2, (b - a) / 2
    total = 0.0
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        total = total + weight * function(middle + node * radius)
    return radius * total


class _Cells(NamedTuple):
    """Cells (edges[i], edges[i+1]]; anchors[i] is the end next to 0, sums[i] Sigma and sizes[i] int |sigma| there."""

    edges: Array
    anchors: Array
    sums: Array
    sizes: Array

    def containing(self, s: Array) -> NDArray[np.intp]:
        return np.clip(np.searchsorted(self.edges, s) - 1, 0, len(self.anchors) - 1)


def _primitive(expression: sympy.Expr) -> Function:
    sigma = _function(expression, 0)
    cells = _cells(expression)

    def by_quadrature(s: Array) -> Array:
        cell = cells.containing(s)
        values = cells.sums[cell] + _gauss(sigma, cells.anchors[cell], s)
        return np.where(np.abs(s) <= REACH, values, np.nan)

    parts = _antiderivatives(expression, cells, by_quadrature)
    if parts is None:
        return by_quadrature
    zero = int(np.searchsorted(cells.edges, 0.0))
    near_left, near_right = cells.edges[zero - 1], cells.edges[zero + 1]

    def by_antiderivative(s: Array) -> Array:
        near = _gauss(sigma, np.zeros(()), np.clip(s, near_left, near_right))
        return np.where((s > near_left) & (s <= near_right), near, _select(parts, s))

    return by_antiderivative


def _cells(expression: sympy.Expr) -> _Cells:
    """Cells between -1e4 and 1e4, ending at the cuts, and halved until the quadrature has converged."""
    sigma = _function(expression, 0)
    # Narrow at first where activations vary: what lies between all points is not seen.
    right = np.concatenate([np.arange(0.0, 64.0, 0.25), 2.0 ** np.arange(6, 14), [REACH]])
    edges = np.unique(np.concatenate([-right, right, [cut for cut in cuts(expression) if abs(cut) < REACH]]))
    left, right = edges[:-1], edges[1:]
    size = np.abs(_gauss(sigma, left, right))
    scale = np.abs(_from_zero(edges, size)) + size
    done, count = [], 0
    for sweep in range(_MAX_SWEEPS):
        middle = (left + right) / 2
        halves = _gauss(sigma, left, middle) + _gauss(sigma, middle, right)
        rough = np.abs(halves - _gauss(sigma, left, right)) > 1e-15 * scale
        # After the last sweep cells are 2^-40 as wide as the first ones: next to a root, where nothing else helps.
        rough &= sweep < _MAX_SWEEPS - 1
        done.append(np.stack([left, right, halves])[:, ~rough])
        count += done[-1].shape[1]
        if count + rough.sum() > _MAX_CELLS:
            raise ValueError(f"sigma = {expression} varies too fast to be integrated up to |s| = {REACH:g}")
        left = np.column_stack([left, middle])[rough].ravel()
        right = np.column_stack([middle, right])[rough].ravel()
        scale = np.repeat(scale[rough], 2)
    left, right, integrals = (found := np.concatenate(done, axis=1))[:, np.argsort(found[0])]
    edges = np.append(left, right[-1])
    anchors = np.where(left >= 0, left, right)
    return _Cells(edges, anchors, _from_zero(edges, integrals), np.abs(_from_zero(edges, np.abs(integrals))))


def _from_zero(edges: Array, integrals: Array) -> Array:
    """For each cell the integral from 0 to its end next to 0. One rounding: thousands of them would be seen."""
    zero = int(np.searchsorted(edges, 0.0))
    right = np.cumsum(np.append(0.0, integrals[zero:-1]), dtype=np.longdouble)
    left = -np.cumsum(np.append(0.0, integrals[1:zero][::-1]), dtype=np.longdouble)[::-1]
    return np.concatenate([left, right]).astype(np.float64)


def _antiderivatives(expression: sympy.Expr, cells: _Cells, by_quadrature: Function) -> Sequence[Part] | None:
    """SymPy's antiderivatives, with the constants that join them; None where there is none as good as the quadrature.

    Only by rules: other methods of SymPy may take minutes, and a time limit would make ranks differ.
    """
    parts = []
    for left, right, formula in smooth_formulas(expression):
        antiderivative = manualintegrate(formula, S)
        if antiderivative.has(sympy.Integral):
            return None
        parts.append(
            Part(left, right, antiderivative, _shifted(_compile(antiderivative), min(max(0.0, left), right), by_quadrature))
        )
    s = np.sort(sample_points(expression))
    cell = cells.containing(s)
    error = np.abs(_select(parts, s) - by_quadrature(s))
    sigma, anchors = _function(expression, 0), cells.anchors[cell]
    size = cells.sizes[cell] + np.abs(_gauss(lambda x: np.abs(sigma(x)), anchors, s))
    far = anchors != 0.0
    return parts if (error[far] <= 1e-14 * size[far]).all() else None


def _shifted(antiderivative: Function, start: float, by_quadrature: Function) -> Function:
    constant = by_quadrature(np.array(start)) - antiderivative(np.array(start))
    return lambda s: antiderivative(s) + constant


# ---- expressions as trees of lists --------------------------------------------------------------------------------

_LEAVES = {"s": S, "pi": sympy.pi, "E": sympy.E}
_NAMES = (
    "Add Mul Pow Rational exp log erf sin cos tan atan sinh cosh tanh asinh Abs Max Min Piecewise Lt Le Gt Ge Eq Ne And Or"
)
_NODES_BY_NAME = {**{name: getattr(sympy, name) for name in _NAMES.split()}, "case": ExprCondPair}
# All others take expressions.
_ARGUMENTS = {"Piecewise": [ExprCondPair], "case": [sympy.Expr, Boolean], "And": [Boolean], "Or": [Boolean]}
_SWITCH_NAMES = {name for name, node in _NODES_BY_NAME.items() if node in _SWITCHES}
_LEAF_NAMES = {leaf: name for name, leaf in _LEAVES.items()}
_NODE_NAMES = {node: name for name, node in _NODES_BY_NAME.items()}


def to_tree(expression: sympy.Basic) -> Tree:
    """The expression as lists ``[function, argument, ...]`` of lists, numbers and the names "s", "pi" and "E".

    Raises
    ------
    ValueError
        If it has a function or a number that `from_tree` does not know.

    Examples
    --------
    >>> to_tree(normal_form(2 * sympy.tanh(sympy.Symbol("s"))))
    ['Mul', 2, ['tanh', 's']]
    """
    if expression in _LEAF_NAMES:
        return _LEAF_NAMES[expression]
    if isinstance(expression, BooleanAtom):
        return bool(expression)
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Rational):
        return ["Rational", int(expression.p), int(expression.q)]
    if isinstance(expression, sympy.Float) and sympy.Float(float(expression)) == expression:
        return float(expression)
    if expression.func not in _NODE_NAMES:
        raise ValueError(
            f"{expression} cannot be stored; what can is numbers (Float of 15 digits), {', '.join(_LEAVES)}, "
            f"and the functions {', '.join(_NODES_BY_NAME)}"
        )
    return [_NODE_NAMES[expression.func], *map(to_tree, expression.args)]


#: Of a tree: parts in all, lists inside of lists, arguments of what is compared with each other, and parts that change formulas.
_MOST_PARTS, _DEEPEST, _MOST_COMPARED, _MOST_SWITCHES = 400, 30, 6, 12
#: The largest exponent of a power, and number: SymPy multiplies integers and powers of sums out, digit by digit.
_HIGHEST_POWER, _LARGEST = 100, 1 << 2048


def from_tree(tree: Tree) -> sympy.Basic:
    """What `to_tree` was given, within bounds: it may come from a file, and SymPy takes any time for some short expressions.

    Raises
    ------
    ValueError
        If the tree has a name that is not on the list, is large or deep, has a large number or power, or a function refuses
        its arguments.
    """
    parts = switches = 0
    level = [tree]
    for _ in range(_DEEPEST):
        parts += len(level)
        lists = [part for part in level if isinstance(part, list)]
        names = [part[0] for part in lists if part and isinstance(part[0], str)]
        switches += sum(name in _SWITCH_NAMES for name in names)
        if parts > _MOST_PARTS or switches > _MOST_SWITCHES:
            raise ValueError(
                f"expected an expression of at most {_MOST_PARTS} parts, {_MOST_SWITCHES} of them cases from a tree"
            )
        level = [part for whole in lists for part in whole[1:]]
    if level:
        raise ValueError(f"expected an expression of at most {_DEEPEST} levels from a tree")
    return _from_tree(tree)


def _from_tree(tree: Tree) -> sympy.Basic:
    if isinstance(tree, bool | int) or isinstance(tree, float) and math.isfinite(tree):
        if isinstance(tree, int) and abs(tree) > _LARGEST:
            raise ValueError(f"an integer of {tree.bit_length()} bits is no part of an expression: expected at most 2048")
        return sympy.sympify(tree)
    if isinstance(tree, str) and tree in _LEAVES:
        return _LEAVES[tree]
    if not (isinstance(tree, list) and tree and isinstance(tree[0], str) and tree[0] in _NODES_BY_NAME):
        raise ValueError(
            f"{tree!r} is no part of an expression; give a number, {', '.join(_LEAVES)}, or a list that begins with "
            f"one of {', '.join(_NODES_BY_NAME)}"
        )
    arguments = [_from_tree(part) for part in tree[1:]]
    wanted = _ARGUMENTS.get(tree[0], [sympy.Expr])
    try:
        if any(not isinstance(part, kind) for part, kind in zip(arguments, cycle(wanted), strict=False)):
            raise TypeError("wrong arguments")
        if tree[0] == "Pow" and arguments[1:] and abs(_as_number(arguments[1])) > _HIGHEST_POWER:
            raise ValueError(f"expected exponents up to {_HIGHEST_POWER}")
        if tree[0] in ("Max", "Min") and len(arguments) > _MOST_COMPARED:
            raise ValueError(f"expected at most {_MOST_COMPARED} arguments")
        made = _NODES_BY_NAME[tree[0]](*arguments)
        if any(abs(_as_number(power.exp)) > _HIGHEST_POWER for power in made.atoms(sympy.Pow)):
            raise ValueError(f"expected exponents up to {_HIGHEST_POWER}")
        if any(max(abs(number.p), number.q) > _LARGEST for number in made.atoms(sympy.Rational)):
            raise ValueError("expected integers of at most 2048 bits")
        return made
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{tree!r} is no part of an expression: {error}") from error


def _as_number(exponent: sympy.Expr) -> float:
    """An exponent, of which the size matters if it is a number; 0 for another."""
    return float(exponent) if isinstance(exponent, sympy.Number) else 0.0
