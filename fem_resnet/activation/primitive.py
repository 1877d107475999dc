"""The primitive Sigma(s) = int_0^s sigma of an expression.

It is a sum of Gauss integrals over cells that are halved until

    |error| <= 1e-14 int |sigma|        (integral between 0 and s),

and from the second cell on SymPy's antiderivative, if there is one that agrees with that sum. Next to 0 a difference of two
values of an antiderivative would lose its digits.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import sympy
from numpy.typing import NDArray
from sympy.integrals.manualintegrate import manualintegrate

from fem_resnet.activation.formulas import Part, compiled, function_of, sample_points, select
from fem_resnet.activation.pieces import REACH, S, cuts, smooth_formulas

__all__ = ["primitive_of"]

Array = NDArray[np.float64]
Function = Callable[[Array], Array]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_MAX_CELLS = 2**20
_MAX_SWEEPS = 40


def _gauss(function: Function, a: Array, b: Array) -> Array:
    """int_a^b function, by Gauss's rule with 16 points."""
    middle, radius = (a + b) / 2, (b - a) / 2
    total: Array | float = 0.0
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        total = total + weight * function(middle + node * radius)
    return radius * total


class _Cells(NamedTuple):
    """Cells (edges[i], edges[i+1]]; anchors[i] is the end next to 0, with Sigma = sums[i] and int |sigma| = sizes[i] there."""

    edges: Array
    anchors: Array
    sums: Array
    sizes: Array

    def containing(self, s: Array) -> NDArray[np.intp]:
        """The number of the cell of each point, of the shape of s."""
        return np.clip(np.searchsorted(self.edges, s) - 1, 0, len(self.anchors) - 1)


def primitive_of(expression: sympy.Expr) -> Function:
    """Sigma of an expression as a function of arrays; NaN for |s| > 1e4 where it is integrated numerically.

    Raises
    ------
    ValueError
        If sigma varies too fast to be integrated.
    """
    sigma = function_of(expression, 0)
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
        return np.where((s > near_left) & (s <= near_right), near, select(parts, s))

    return by_antiderivative


def _cells(expression: sympy.Expr) -> _Cells:
    """Cells between -1e4 and 1e4, ending at the cuts, and halved until the quadrature has converged."""
    sigma = function_of(expression, 0)
    # Narrow at first where activations vary: a bump between all points is not seen.
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
        # After the last sweep cells are 2^-40 as wide as the first ones, as next to a root, where nothing else helps.
        rough &= sweep < _MAX_SWEEPS - 1
        done.append(np.stack([left, right, halves])[:, ~rough])
        count += done[-1].shape[1]
        if count + rough.sum() > _MAX_CELLS:
            raise ValueError(f"expression: sigma = {expression} varies too fast to be integrated up to |s| = {REACH:g}")
        left = np.column_stack([left, middle])[rough].ravel()
        right = np.column_stack([middle, right])[rough].ravel()
        scale = np.repeat(scale[rough], 2)
    left, right, integrals = (found := np.concatenate(done, axis=1))[:, np.argsort(found[0])]
    edges = np.append(left, right[-1])
    anchors = np.where(left >= 0, left, right)
    return _Cells(edges, anchors, _from_zero(edges, integrals), np.abs(_from_zero(edges, np.abs(integrals))))


def _from_zero(edges: Array, integrals: Array) -> Array:
    """For each cell the integral from 0 to its end next to 0, rounded once: thousands of roundings would be seen."""
    zero = int(np.searchsorted(edges, 0.0))
    right = np.cumsum(np.append(0.0, integrals[zero:-1]), dtype=np.longdouble)
    left = -np.cumsum(np.append(0.0, integrals[1:zero][::-1]), dtype=np.longdouble)[::-1]
    return np.concatenate([left, right]).astype(np.float64)


def _antiderivatives(expression: sympy.Expr, cells: _Cells, by_quadrature: Function) -> Sequence[Part] | None:
    """SymPy's antiderivatives, with the constants that join them; None where they are not as accurate as the quadrature.

    They are found by rules alone: other methods of SymPy may take minutes, and with a time limit ranks could differ.
    """
    parts = []
    for left, right, formula in smooth_formulas(expression):
        antiderivative = manualintegrate(formula, S)
        if antiderivative.has(sympy.Integral):
            return None
        parts.append(
            Part(left, right, antiderivative, _shifted(compiled(antiderivative), min(max(0.0, left), right), by_quadrature))
        )
    s = np.sort(sample_points(expression))
    cell = cells.containing(s)
    error = np.abs(select(parts, s) - by_quadrature(s))
    sigma, anchors = function_of(expression, 0), cells.anchors[cell]
    size = cells.sizes[cell] + np.abs(_gauss(lambda x: np.abs(sigma(x)), anchors, s))
    far = anchors != 0.0
    return parts if (error[far] <= 1e-14 * size[far]).all() else None


def _shifted(antiderivative: Function, start: float, by_quadrature: Function) -> Function:
    constant = by_quadrature(np.array(start)) - antiderivative(np.array(start))
    return lambda s: antiderivative(s) + constant
