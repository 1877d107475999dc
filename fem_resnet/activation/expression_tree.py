"""Expressions as trees of lists, ``["Mul", 2, ["tanh", "s"]]``: the form in which files hold them.

A tree is rebuilt from a fixed list of functions, within bounds. No text is evaluated.
"""

import math
from itertools import cycle

import sympy
from sympy.functions.elementary.piecewise import ExprCondPair
from sympy.logic.boolalg import Boolean, BooleanAtom

from fem_resnet.activation.pieces import SWITCHES, S

__all__ = ["Tree", "from_tree", "to_tree"]

Tree = bool | int | float | str | list

_LEAVES = {"s": S, "pi": sympy.pi, "E": sympy.E}
_NAMES = (
    "Add Mul Pow Rational exp log erf sin cos tan atan sinh cosh tanh asinh Abs Max Min Piecewise Lt Le Gt Ge Eq Ne And Or"
)
_NODES_BY_NAME = {**{name: getattr(sympy, name) for name in _NAMES.split()}, "case": ExprCondPair}
# All others take expressions.
_ARGUMENTS = {"Piecewise": [ExprCondPair], "case": [sympy.Expr, Boolean], "And": [Boolean], "Or": [Boolean]}
_SWITCH_NAMES = {name for name, node in _NODES_BY_NAME.items() if node in SWITCHES}
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
    >>> to_tree(2 * sympy.tanh(S))
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
            f"expression: expected numbers (Float of 15 digits), {', '.join(_LEAVES)} and the functions "
            f"{', '.join(_NODES_BY_NAME)}, got {expression}, which cannot be stored"
        )
    return [_NODE_NAMES[expression.func], *map(to_tree, expression.args)]


#: The most parts that a tree may have, and the most lists inside of lists.
_MOST_PARTS, _DEEPEST = 400, 30
#: The most arguments of a `Max` or `Min`, and the most functions that change their formula (`pieces.SWITCHES`).
_MOST_COMPARED, _MOST_SWITCHES = 6, 12
#: The largest exponent and the largest integer. SymPy multiplies integers and powers of sums out, digit by digit.
_HIGHEST_POWER, _LARGEST = 100, 1 << 2048


def from_tree(tree: Tree) -> sympy.Basic:
    """The expression of a tree that `to_tree` gave.

    The tree may come from a file, and SymPy takes any time for some short expressions. So there are bounds.

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
                f"expression: expected at most {_MOST_PARTS} parts in a file, and at most {_MOST_SWITCHES} functions that "
                f"change their formula; got more"
            )
        level = [part for whole in lists for part in whole[1:]]
    if level:
        raise ValueError(f"expression: expected at most {_DEEPEST} lists inside of each other in a file, got more")
    return _from_tree(tree)


def _from_tree(tree: Tree) -> sympy.Basic:
    if isinstance(tree, bool | int) or isinstance(tree, float) and math.isfinite(tree):
        if isinstance(tree, int) and abs(tree) > _LARGEST:
            raise ValueError(
                f"expression: an integer of {tree.bit_length()} bits is no part of an expression: expected at most 2048"
            )
        return sympy.sympify(tree)
    if isinstance(tree, str) and tree in _LEAVES:
        return _LEAVES[tree]
    if not (isinstance(tree, list) and tree and isinstance(tree[0], str) and tree[0] in _NODES_BY_NAME):
        raise ValueError(
            f"expression: {tree!r} is no part of an expression; give a number, {', '.join(_LEAVES)}, or a list that begins "
            f"with one of {', '.join(_NODES_BY_NAME)}"
        )
    arguments = [_from_tree(part) for part in tree[1:]]
    kinds = _ARGUMENTS.get(tree[0], [sympy.Expr])
    try:
        if any(not isinstance(part, kind) for part, kind in zip(arguments, cycle(kinds), strict=False)):
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
        raise ValueError(f"expression: {tree!r} is no part of an expression: {error}") from error


def _as_number(exponent: sympy.Expr) -> float:
    """An exponent that is a number; 0 for others, whose size does not matter."""
    return float(exponent) if isinstance(exponent, sympy.Number) else 0.0
