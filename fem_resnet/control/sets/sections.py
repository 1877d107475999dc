"""Control sets that a user describes by the functions m and M."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fem_resnet.arguments import flag, function, integer, real_array
from fem_resnet.control.sets.control_set import Array, ControlSet, Extreme, pair_of_arrays, parts_of_state

__all__ = ["Sections"]


class Sections(ControlSet):
    """Any compact set by its sections: { (a, b) : a- <= a <= a+, m(a) <= b <= M(a) }.

    A search over a starts from a grid and then narrows down on the best of its cells, until T_f is right to round-off. If A is
    convex this is the extreme. If not, an extreme between two values of the grid may be missed.

    Parameters
    ----------
    bias
        (a-, a+), shape (2,), numbers without unit.
    lower, upper
        m and M: functions from an array to an array of its shape, or to a number. The values are finite, with m <= M on the
        range of a. A is compact if m is lower and M upper semicontinuous.
    convex
        Whether A is convex, that is, m convex and M concave. The caller must know; it is checked on the grid.
    grid
        How many values of a a search starts from.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind, m > M somewhere on the grid, or `convex` is True and A is not convex.

    Examples
    --------
    >>> lens = Sections((-1, 1), lambda a: a**2 - 1, lambda a: 1 - a**2, convex=True)
    >>> round(float(lens.largest(1.0, 1.0).value), 6)  # a - 2 m(a) at a = 1/4
    2.125
    """

    def __init__(
        self,
        bias: Sequence[float],
        lower: Callable[[Array], Array],
        upper: Callable[[Array], Array],
        *,
        convex: bool = False,
        grid: int = 257,
    ):
        first, last = real_array("bias", bias, (2,)).tolist()
        self._range = first, last
        self._grid = integer("grid", grid, least=3)
        self._lower, self._upper = (function(*given, "a function of a") for given in (("lower", lower), ("upper", upper)))
        self.convex = flag("convex", convex)
        if not first < last:
            raise ValueError(f"bias: expected (low, high) with low < high, got {bias!r}")
        m, M = self.sections(np.linspace(first, last, self._grid))
        if (m > M).any():
            raise ValueError("lower, upper: expected m(a) <= M(a) on the range of a, got m(a) > M(a) for some a")
        size = 1e-10 * max(1.0, np.abs(m).max(), np.abs(M).max())
        if self.convex and ((np.diff(m, 2) < -size).any() or (np.diff(M, 2) > size).any()):
            raise ValueError("convex: m is not convex or M is not concave on the grid; say convex=False")

    @property
    def bias_range(self):
        return self._range

    def sections(self, a):
        a = real_array("a", a)
        inside = (self._range[0] <= a) & (a <= self._range[1])
        within = np.clip(a, *self._range)
        m, M = _values("lower", self._lower, within), _values("upper", self._upper, within)
        return np.where(inside, m, np.inf), np.where(inside, M, -np.inf)

    def maximise(self, alpha, beta):
        alpha, beta = pair_of_arrays(alpha=alpha, beta=beta)

        def value(a, m, M):
            return alpha[..., None] * a + np.maximum(beta[..., None] * m, beta[..., None] * M)

        a, m, M = self._search(value, alpha.shape)
        return a, np.where(beta >= 0, M, m)

    def largest(self, positive, negative):
        positive, negative = parts_of_state(positive, negative)
        a, m, M = self._search(lambda a, m, M: a - m * positive[..., None] + M * negative[..., None], positive.shape)
        return Extreme(a - m * positive + M * negative, a, m, M)

    def smallest(self, positive, negative):
        positive, negative = parts_of_state(positive, negative)
        a, m, M = self._search(lambda a, m, M: M * positive[..., None] - m * negative[..., None] - a, positive.shape)
        return Extreme(a - M * positive + m * negative, a, M, m)

    def _search(self, value: Callable[[Array, Array, Array], Array], shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
        """The a, of this shape, where ``value(a, m(a), M(a))`` is largest, with m(a) and M(a)."""
        low, high = (np.full(shape, end) for end in self._range)
        number = self._grid
        width = self._range[1] - self._range[0]
        best_a = low
        while width > 1e-12 * max(1.0, *map(abs, self._range)):
            a = np.linspace(low, high, number, axis=-1)
            best = np.argmax(value(a, *self.sections(a)), axis=-1)[..., None]
            best_a, low, high = (np.take_along_axis(a, np.clip(best + k, 0, number - 1), axis=-1)[..., 0] for k in (0, -1, 1))
            width *= 2 / (number - 1)
            number = 33
        return best_a, *self.sections(best_a)


def _values(name: str, end: Callable[[Array], Array], a: Array) -> Array:
    """The values of a user's function at a: one for each a, or one for all."""
    values = real_array(name, end(a))
    if values.shape not in ((), a.shape):
        raise ValueError(f"{name}: expected values of the shape of a, {a.shape}, got {values.shape}")
    return values
