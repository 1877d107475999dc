"""Suprema and zeros of a function that is given by formulas, on the whole line, proved by cutting it into cells.

On each cell X, with its middle m, g(X) lies

    in g(X as an interval),    in g(m) + g'(X) (X - m),    between the values at the ends if g' has one sign on X,

and the best of these bounds is taken. The cell that decides is cut again, until the question is answered or `CELLS` cells have
been looked at. Half lines count as cells.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from fem_resnet.activation.enclosure import EVERYTHING, Formula, Unproved, interval, round_down, round_up

__all__ = ["CELLS", "Piece", "supremum", "zeros"]

#: How many cells one question may take: less than a second.
CELLS = 1000
_ENDS = (-1e4, -100.0, -10.0, -1.0, 0.0, 1.0, 10.0, 100.0, 1e4)
#: Half lines are not cut farther out.
_FARTHEST = 1e13
#: Between two points as close as this, relative or absolute, several zeros count as one.
_CLOSE = 1e-12


class Piece(NamedTuple):
    """A formula that holds between two ends, which may be infinite."""

    left: float
    right: float
    formula: Formula


# ---- cells --------------------------------------------------------------------------------------------------------


def _first_cells(piece: Piece) -> list[tuple[float, float]]:
    inner = [end for end in _ENDS if piece.left < end < piece.right]
    return list(pairwise([piece.left, *inner, piece.right]))


def _middle(left: float, right: float) -> float | None:
    """Where a cell is cut; None if it is as short as doubles allow."""
    if math.isinf(left) or math.isinf(right):
        end = right if math.isinf(left) else left
        if math.isinf(end):
            return 0.0
        far = (1e4 * abs(end) or 1.0) * (-1 if math.isinf(left) else 1)
        return far if abs(far) < _FARTHEST else None
    middle = left + (right - left) / 2
    if left > 0 and right > 100 * left or right < 0 and left < 100 * right:
        middle = math.copysign(math.sqrt(abs(left)) * math.sqrt(abs(right)), left)
    return middle if right - left > 4 * math.ulp(max(abs(left), abs(right))) else None


def _upper(formula: Formula, left: float, right: float):
    """A bound of the formula from above over a cell."""
    X = interval(left, right)
    bound = formula.over(X).b
    try:
        slope = formula.slope.over(X)
    except Unproved:
        return bound
    if slope.a >= 0 or slope.b <= 0:
        end = right if slope.a >= 0 else left
        return min(bound, formula.at(end).b) if math.isfinite(end) else bound
    middle = _middle(left, right)
    if middle is not None and math.isfinite(left) and math.isfinite(right):
        bound = min(bound, (formula.at(middle) + slope * (X - middle)).b)
    return bound


def supremum(
    pieces: Sequence[Piece],
    *,
    known: float = -math.inf,
    enough: float | None = None,
    tolerance: float = 1e-9,
    cells: int = CELLS,
) -> tuple[float, float]:
    """low <= sup g <= high of a function that is given in pieces.

    Parameters
    ----------
    pieces
        What g is, on intervals that together are its domain.
    known
        A value that g reaches, by samples.
    enough
        Stop as soon as high <= enough or low > enough.
    tolerance
        Stop as soon as low and high are as close as this, relative.
    cells
        Stop after so many cells, however far apart the bounds are.

    Raises
    ------
    Unproved
        If there is no bound from above at all on some cell.
    """
    low, stuck, looked = known, -math.inf, 0
    heap: list[tuple[float, int, float, float, float | None, Formula]] = []

    def look(formula: Formula, left: float, right: float, above: float) -> None:
        nonlocal low, looked
        looked += 1
        bound = min(above, round_up(_upper(formula, left, right)))
        middle = _middle(left, right)
        for point in (left, right, middle):
            if point is not None and math.isfinite(point):
                low = max(low, round_down(formula.at(point).a))
        heapq.heappush(heap, (-bound, looked, left, right, middle, formula))

    for piece in pieces:
        for left, right in _first_cells(piece):
            look(piece.formula, left, right, math.inf)
    while heap:
        high = max(stuck, -heap[0][0])
        if enough is not None and (high <= enough or low > enough):
            return low, high
        if high - low <= tolerance * abs(low) or high == stuck or looked >= cells:
            return low, high
        bound, _, left, right, middle, formula = heapq.heappop(heap)
        if middle is None:
            stuck = max(stuck, -bound)
            continue
        look(formula, left, middle, -bound)
        look(formula, middle, right, -bound)
    return low, stuck


def zeros(piece: Piece, at_most: int = 1, cells: int = CELLS) -> list[tuple[float, float]]:
    """Short intervals, one for each zero, of an analytic formula that is not constant.

    A place where the formula comes so close to 0 that doubles cannot tell the difference counts as a zero.

    Parameters
    ----------
    piece
        The formula, and where it holds.
    at_most
        The search ends when more zeros than this are found.
    cells
        The most cells to look at.

    Raises
    ------
    Unproved
        If the search takes too many cells, or a cell has no enclosure.
    """
    # Half lines come last: elsewhere there may be more zeros than `at_most`.
    waiting = sorted(_first_cells(piece), key=lambda cell: math.isfinite(cell[0]) and math.isfinite(cell[1]))
    found: list[tuple[float, float]] = []
    looked = 0
    while waiting and len(_joined(found)) <= at_most:
        left, right = waiting.pop()
        looked += 1
        if looked > cells:
            raise Unproved(f"the zeros of {piece.formula.expression} take more than {cells} cells")
        X = interval(left, right)
        over = piece.formula.over(X)
        if over.a > 0 or over.b < 0:
            continue
        try:
            slope = piece.formula.slope.over(X)
        except Unproved:
            slope = EVERYTHING
        if slope.a >= 0 or slope.b <= 0:
            # Strictly monotone, since it is analytic. At an infinite end there is only a limit, which is no value.
            at_left, at_right = (
                piece.formula.at(end) if math.isfinite(end) else piece.formula.over(_beyond(end)) for end in (left, right)
            )
            low, high = (at_left, at_right) if slope.a >= 0 else (-at_left, -at_right)
            touches = low.a == 0 == low.b and math.isfinite(left), high.a == 0 == high.b and math.isfinite(right)
            if any(touches):
                found.append((left, left) if touches[0] else (right, right))
                continue
            if low.a >= 0 or high.b <= 0:
                continue
            if low.b < 0 < high.a and math.isfinite(left) and math.isfinite(right):
                found.append(_root(piece.formula, left, right))
                continue
        middle = _middle(left, right)
        if middle is None or right - left <= _CLOSE * max(1.0, abs(left)):
            if math.isinf(left) or math.isinf(right):
                if piece.formula.never_zero_far_out(X):
                    continue
                raise Unproved(f"whether {piece.formula.expression} vanishes far out is not decided")
            found.append((left, right))
        else:
            waiting += [(middle, right), (left, middle)]
    return _joined(found)


def _beyond(end: float):
    return interval(_FARTHEST, math.inf) if end > 0 else interval(-math.inf, -_FARTHEST)


def _root(formula: Formula, left: float, right: float) -> tuple[float, float]:
    """The zero in a cell with a change of sign, by bisection, as far as signs are certain."""
    sign_left = formula.at(left).b < 0
    while (middle := _middle(left, right)) is not None:
        value = formula.at(middle)
        if value.a <= 0 <= value.b:
            return (middle, middle)
        left, right = (middle, right) if (value.b < 0) == sign_left else (left, middle)
    return left, right


def _joined(found: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The intervals, those that touch made one."""
    joined: list[tuple[float, float]] = []
    for left, right in sorted(found):
        if joined and left - joined[-1][1] <= 100 * _CLOSE * max(1.0, abs(left)):
            joined[-1] = joined[-1][0], max(joined[-1][1], right)
        else:
            joined.append((left, right))
    return joined
