"""Control sets A of section 4.2: compact sets in the plane of (a, b), in which (a(y), b(y, z)) lies for all y and z.

What control theory asks of A is known from its sections,

    m(a) = min { b : (a, b) in A },        M(a) = max { b : (a, b) in A },

since (4.9), T_f(a, b) = a - int b(z) f(z) dz over K_A = { (a, b) : (a, b(z)) in A for all z }, is largest where b(z) is at
an end of the section. With F+ and F- the integrals of the positive and of the negative part of f, both >= 0,

    T^+ = max_a  a - m(a) F+ + M(a) F-        b(z) = m(a) where f > 0, M(a) where f < 0
    T^- = min_a  a - M(a) F+ + m(a) F-        b(z) = M(a) where f > 0, m(a) where f < 0

two scalar searches, the first concave and the second convex where A is convex. Nothing here depends on the label domain.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from fem_resnet.arguments import flag, function, integer, number, real_array
from fem_resnet.fixed import Fixed

__all__ = ["Box", "ControlSet", "Ellipse", "Extreme", "Points", "Polygon", "Sections"]

_Array = np.ndarray


@dataclass(frozen=True)
class Extreme:
    """An extreme of T_f over K_A, (4.9); arrays of the shape of F+ and F-.

    Attributes
    ----------
    value : numpy.ndarray
        T_f there.
    a : numpy.ndarray
        The bias, one number for all z.
    where_positive, where_negative : numpy.ndarray
        b(z) where f(z) > 0, and where f(z) < 0. Where f = 0 any value of the section at a will do.
    """

    value: _Array
    a: _Array
    where_positive: _Array
    where_negative: _Array


class ControlSet(Fixed, ABC):
    """A compact set A of pairs (a, b). All methods take arrays, which broadcast; no units.

    Attributes
    ----------
    convex : bool
        Whether A is convex; if not, mixtures of controls may leave it.
    """

    convex: bool

    @cached_property
    def description(self) -> tuple:
        """What tells this set from others of its class, so that ranks can be compared (`ranks.same`)."""
        return self.bias_range, self.convex, *self.sections(np.linspace(*self.bias_range, 65))

    @property
    @abstractmethod
    def bias_range(self) -> tuple[float, float]:
        """The smallest and the largest a of A."""

    @property
    def kernel_range(self) -> tuple[float, float]:
        """The smallest and the largest b of A."""
        return float(-self.support(0.0, -1.0)), float(self.support(0.0, 1.0))

    @abstractmethod
    def sections(self, a: ArrayLike) -> tuple[_Array, _Array]:
        """m(a) and M(a); inf and -inf where A has no point (a, b)."""

    @abstractmethod
    def maximise(self, alpha: ArrayLike, beta: ArrayLike) -> tuple[_Array, _Array]:
        """A point (a, b) of A where alpha a + beta b is largest."""

    @abstractmethod
    def largest(self, positive: ArrayLike, negative: ArrayLike) -> Extreme:
        """T^+: the largest T_f over K_A, for F+ >= 0 and F- >= 0, the integrals of the parts of f."""

    @abstractmethod
    def smallest(self, positive: ArrayLike, negative: ArrayLike) -> Extreme:
        """T^-: the smallest T_f over K_A."""

    def contains(self, a: ArrayLike, b: ArrayLike, tolerance: float = 1e-12) -> _Array:
        """Whether (a, b) is in A, up to `tolerance` in b, and in a at the ends of its range."""
        low, high = self.bias_range
        a, b, tolerance = _places(a, b, tolerance)
        near = (a >= low - tolerance) & (a <= high + tolerance)
        m, M = self.sections(np.clip(a, low, high))
        return near & (b >= m - tolerance) & (b <= M + tolerance)

    def support(self, alpha: ArrayLike, beta: ArrayLike) -> _Array:
        """Max of alpha a + beta b over A."""
        alpha, beta = _broadcast(alpha=alpha, beta=beta)
        a, b = self.maximise(alpha, beta)
        return alpha * a + beta * b

    def sample(self, count: int) -> tuple[_Array, _Array]:
        """Points of A, two arrays: `count` values of a in its range, and of b in each section.

        For searches over A where a running cost depends on (a, b). Of a finite set all points.
        """
        count = integer("count", count)
        a = np.linspace(*self.bias_range, count)
        m, M = self.sections(a)
        a, b = np.repeat(a, count), np.linspace(m, M, count, axis=1).ravel()
        inside = self.contains(a, b)
        return a[inside], b[inside]


def _broadcast(least: float = -np.inf, **given: ArrayLike) -> tuple[_Array, ...]:
    """Real numbers from outside, as arrays of one shape."""
    arrays = [real_array(name, value, least=least) for name, value in given.items()]
    try:
        return np.broadcast_arrays(*arrays)
    except ValueError as error:
        shapes = " and ".join(str(array.shape) for array in arrays)
        raise ValueError(f"{', '.join(given)}: expected arrays that broadcast, the shapes are {shapes}") from error


def _parts(positive: ArrayLike, negative: ArrayLike) -> tuple[_Array, _Array]:
    return _broadcast(least=0, positive=positive, negative=negative)


def _places(a: ArrayLike, b: ArrayLike, tolerance: float) -> tuple[_Array, _Array, float]:
    """Points, and how far outside of a set they may be."""
    return *_broadcast(a=a, b=b), number("tolerance", tolerance, least=0)


class _Vertices(ControlSet):
    """A set whose extremes all lie over finitely many values of a: there m and M may turn or jump, between they are linear."""

    _points: _Array

    @property
    def bias_range(self) -> tuple[float, float]:
        return float(self._points[:, 0].min()), float(self._points[:, 0].max())

    def maximise(self, alpha, beta):
        alpha, beta = _broadcast(alpha=alpha, beta=beta)
        best = np.argmax(np.multiply.outer(alpha, self._points[:, 0]) + np.multiply.outer(beta, self._points[:, 1]), axis=-1)
        return self._points[best, 0], self._points[best, 1]

    def largest(self, positive, negative):
        return self._extreme(*_parts(positive, negative), 1)

    def smallest(self, positive, negative):
        return self._extreme(*_parts(positive, negative), -1)

    def _extreme(self, positive, negative, sign: int) -> Extreme:
        a = np.unique(self._points[:, 0])
        m, M = self.sections(a)
        over_positive, over_negative = (m, M) if sign > 0 else (M, m)
        T = a - np.multiply.outer(positive, over_positive) + np.multiply.outer(negative, over_negative)
        best = np.argmax(sign * T, axis=-1)
        value = np.take_along_axis(T, best[..., None], axis=-1)[..., 0]
        return Extreme(value, a[best], over_positive[best], over_negative[best])


class Polygon(_Vertices):
    """A polygon by its corners in order; it may be not convex.

    Parameters
    ----------
    corners
        (a, b), shape (at least 3, 2): the boundary, which meets itself nowhere. The last may be the first again, as in closed
        outlines.

    Raises
    ------
    TypeError, ValueError
        If they are not finite real numbers, fewer than 3, or all on one line, or the boundary crosses or touches itself.

    Examples
    --------
    >>> triangle = Polygon([(0, 0), (1, 0), (0, 1)])
    >>> m, M = triangle.sections(0.25)
    >>> float(m), float(M), float(triangle.largest(0.0, 3.0).value)
    (0.0, 0.75, 3.0)
    """

    def __init__(self, corners: ArrayLike):
        given = real_array("corners", corners, ("corners", 2))
        size = np.ptp(given, axis=0).max()
        # Those beside another, as in closed outlines, are one corner: an edge without length has no direction.
        self._points = given[np.abs(given - np.roll(given, 1, axis=0)).max(axis=1) > 1e-15 * size]
        start = self._points - given[0]  # far from (0, 0) products would lose what is small
        edges = np.roll(start, -1, axis=0) - start
        area = _cross(start, np.roll(start, -1, axis=0)).sum() / 2
        if len(start) < 3 or abs(area) <= 1e-14 * size**2:
            raise ValueError(f"corners: expected a polygon with an area, got {corners!r}; for a few points use Points")
        meeting = _meeting(start, edges, 1e-14 * size)
        if meeting.any():
            first, second = (self._points[k].tolist() for k in np.argwhere(meeting)[0])
            raise ValueError(
                f"corners: expected a boundary that meets itself nowhere; the edges that start in {first} and {second} cross "
                f"or touch each other"
            )
        self.convex = bool((np.sign(area) * _cross(edges, np.roll(edges, -1, axis=0)) >= -1e-14 * size**2).all())

    def _crossings(self, a: _Array) -> tuple[_Array, _Array]:
        """Ends of the pieces of all edges over a: shape of a, then edges; nan where an edge does not pass."""
        (a0, b0), (a1, b1) = self._points.T, np.roll(self._points, -1, axis=0).T
        a = a[..., None]
        passes = (np.minimum(a0, a1) <= a) & (a <= np.maximum(a0, a1))
        upright = a0 == a1
        s = (a - a0) / np.where(upright, 1.0, a1 - a0)
        b = np.where(s >= 1, b1, b0 + s * (b1 - b0))
        first, second = np.where(upright, b0, b), np.where(upright, b1, b)
        return np.where(passes, first, np.nan), np.where(passes, second, np.nan)

    def sections(self, a):
        first, second = self._crossings(real_array("a", a))
        low = np.fmin(first, second).copy()
        high = np.fmax(first, second)
        return np.where(np.isnan(low), np.inf, low).min(axis=-1), np.where(np.isnan(high), -np.inf, high).max(axis=-1)

    def contains(self, a, b, tolerance=1e-12):
        if self.convex:
            return super().contains(a, b, tolerance)
        a, b, tolerance = _places(a, b, tolerance)
        start, end = self._points, np.roll(self._points, -1, axis=0)
        along = end - start
        distance = _distance(np.stack([a, b], axis=-1)[..., None, :], start, along).min(axis=-1)
        above = (start[:, 1] > b[..., None]) != (end[:, 1] > b[..., None])
        rise = np.where(along[:, 1] == 0, 1.0, along[:, 1])
        left = a[..., None] < start[:, 0] + (b[..., None] - start[:, 1]) / rise * along[:, 0]
        return (distance <= tolerance) | (np.count_nonzero(above & left, axis=-1) % 2 == 1)


def _cross(u: _Array, v: _Array) -> _Array:
    return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]


def _distance(point: _Array, start: _Array, along: _Array) -> _Array:
    """Of points from the edges start + s along, 0 <= s <= 1; arrays that broadcast, the last axis of length 2."""
    s = np.clip(np.sum((point - start) * along, axis=-1) / np.sum(along**2, axis=-1), 0, 1)
    return np.linalg.norm(point - start - s[..., None] * along, axis=-1)


def _meeting(start: _Array, edges: _Array, tolerance: float) -> _Array:
    """Which pairs of edges of a closed outline cross, or touch elsewhere than at a corner that they share."""
    n = len(start)
    side = np.sign(_cross(edges[:, None], start - start[:, None]))  # of an edge's line: corner
    parts = side * np.roll(side, -1, axis=1) < 0  # the line parts the ends of the other edge
    near = _distance(start, start[:, None], edges[:, None]) <= tolerance
    own = np.eye(n, dtype=bool)
    near &= ~(own | np.roll(own, 1, axis=1))  # an edge's own ends
    return parts & parts.T | near


class Box(Polygon):
    """The box [a-, a+] x [b-, b+] of section 4.2.

    Parameters
    ----------
    bias, kernel
        (a-, a+) and (b-, b+), no unit; the ends may be equal, as in {0} x [-1, 1].

    Examples
    --------
    >>> box = Box((-1, 2), (-0.5, 0.5))
    >>> float(box.largest(2.0, 1.0).value), float(box.smallest(2.0, 1.0).value)
    (3.5, -2.5)
    """

    convex = True

    def __init__(self, bias: Sequence[float], kernel: Sequence[float]):
        self.bias, self.kernel = (tuple(real_array(name, ends, (2,))) for name, ends in (("bias", bias), ("kernel", kernel)))
        for name, (low, high) in (("bias", self.bias), ("kernel", self.kernel)):
            if low > high:
                raise ValueError(f"{name}: expected (low, high) with low <= high, got {(low, high)}")
        (a0, a1), (b0, b1) = self.bias, self.kernel
        self._points = np.array([(a0, b0), (a1, b0), (a1, b1), (a0, b1)])

    def __repr__(self) -> str:
        (a0, a1), (b0, b1) = self.bias, self.kernel
        return f"Box(({a0:g}, {a1:g}), ({b0:g}, {b1:g}))"

    def sections(self, a):
        a = real_array("a", a)
        inside = (self.bias[0] <= a) & (a <= self.bias[1])
        return np.where(inside, self.kernel[0], np.inf), np.where(inside, self.kernel[1], -np.inf)


class Points(_Vertices):
    """A finite set of points (a, b): a choice of weights, as in quantised networks.

    Parameters
    ----------
    points
        Shape (at least 1, 2).

    Examples
    --------
    >>> binary = Points([(0, -1), (0, 1)])
    >>> float(binary.largest(2.0, 1.0).value), binary.convex
    (3.0, False)
    """

    def __init__(self, points: ArrayLike):
        self._points = np.unique(real_array("points", points, ("points", 2)), axis=0)
        self.convex = len(self._points) == 1

    def sections(self, a):
        here = real_array("a", a)[..., None] == self._points[:, 0]
        b = self._points[:, 1]
        return np.where(here, b, np.inf).min(axis=-1), np.where(here, b, -np.inf).max(axis=-1)

    def contains(self, a, b, tolerance=1e-12):
        a, b, tolerance = _places(a, b, tolerance)
        away = np.abs(np.stack([a, b], axis=-1)[..., None, :] - self._points).max(axis=-1)
        return away.min(axis=-1) <= tolerance

    def sample(self, count):
        """All points, whatever `count` is."""
        integer("count", count)
        return self._points[:, 0].copy(), self._points[:, 1].copy()


class Ellipse(ControlSet):
    """An ellipse with its inside: centre + E x, abs(x) <= 1.

    Parameters
    ----------
    centre
        (a, b).
    axes
        The radius of a disk; half the axes in a and b; or the matrix E, shape (2, 2), invertible.

    Examples
    --------
    >>> disk = Ellipse((0, 0), 1.0)
    >>> round(float(disk.largest(2.0, 2.0).value), 6)  # sqrt(1 + 4^2)
    4.123106
    """

    convex = True

    def __init__(self, centre: Sequence[float] = (0.0, 0.0), axes: ArrayLike = 1.0):
        self._centre = real_array("centre", centre, (2,))
        E = real_array("axes", axes)
        if E.shape not in ((), (2,), (2, 2)):
            raise ValueError(f"axes: expected a radius, two half axes or a matrix (2, 2), got shape {E.shape}")
        E = E if E.ndim == 2 else np.diag(np.broadcast_to(E, (2,)))
        area = abs(_cross(E[0], E[1]))
        if area <= 1e-14 * np.abs(E).max() ** 2:
            raise ValueError(f"axes: expected a disk or ellipse with an area, got {axes!r}")
        self._shape = E @ E.T
        #: Half the range of a; how the middle of a section moves with (a - centre) over that; half the longest section.
        self._reach = np.sqrt(self._shape[0, 0])
        self._tilt = self._shape[0, 1] / self._reach
        self._height = area / self._reach

    @property
    def bias_range(self):
        return float(self._centre[0] - self._reach), float(self._centre[0] + self._reach)

    def _ends(self, s: _Array) -> tuple[_Array, _Array]:
        middle, half = self._centre[1] + self._tilt * s, self._height * np.sqrt(np.maximum(0.0, 1 - s**2))
        return middle - half, middle + half

    def sections(self, a):
        a = real_array("a", a)
        low, high = self.bias_range
        m, M = self._ends(np.clip((a - self._centre[0]) / self._reach, -1, 1))
        inside = (low <= a) & (a <= high)  # of a itself: (a - centre) / reach is 1 up to round-off at the ends
        return np.where(inside, m, np.inf), np.where(inside, M, -np.inf)

    def maximise(self, alpha, beta):
        alpha, beta = _broadcast(alpha=alpha, beta=beta)
        a, b = self._shape[0, 0] * alpha + self._shape[0, 1] * beta, self._shape[0, 1] * alpha + self._shape[1, 1] * beta
        size = np.sqrt(alpha * a + beta * b)
        size = np.where(size > 0, size, 1.0)
        a = np.clip(self._centre[0] + a / size, *self.bias_range)
        return a, np.clip(self._centre[1] + b / size, *self.sections(a))  # round-off in a moves short sections by its root

    def largest(self, positive, negative):
        return self._extreme(*_parts(positive, negative), 1)

    def smallest(self, positive, negative):
        return self._extreme(*_parts(positive, negative), -1)

    def _extreme(self, positive, negative, sign: int) -> Extreme:
        # T = centre + p s +- q sqrt(1 - s^2), whose extreme is at +- (p, q) / hypot(p, q).
        p, q = self._reach - self._tilt * (positive - negative), self._height * (positive + negative)
        size = np.hypot(p, q)
        s = sign * p / np.where(size > 0, size, 1.0)
        low, high = self._ends(s)
        over_positive, over_negative = (low, high) if sign > 0 else (high, low)
        a = self._centre[0] + self._reach * s
        return Extreme(a - over_positive * positive + over_negative * negative, a, over_positive, over_negative)


class Sections(ControlSet):
    """Any compact set by its sections: { (a, b) : a- <= a <= a+, m(a) <= b <= M(a) }.

    Searches over a start from a grid, and then narrow down on the best of its cells, to round-off in T. Where A is convex
    that is the extreme; else the extreme up to what lies unseen between two values of the grid.

    Parameters
    ----------
    bias
        (a-, a+).
    lower, upper
        m and M: arrays to arrays, finite, m <= M on the range. For A to be compact m must be lower and M upper
        semicontinuous.
    convex
        Whether A is convex (m convex and M concave), which is the caller's to know; it is checked on the grid.
    grid
        Number of values of a to start from.

    Raises
    ------
    ValueError
        If m > M somewhere on the grid, or A is said to be convex and is not.

    Examples
    --------
    >>> lens = Sections((-1, 1), lambda a: a**2 - 1, lambda a: 1 - a**2, convex=True)
    >>> round(float(lens.largest(1.0, 1.0).value), 6)  # a - 2 m(a) at a = 1/4
    2.125
    """

    def __init__(
        self,
        bias: Sequence[float],
        lower: Callable[[_Array], _Array],
        upper: Callable[[_Array], _Array],
        *,
        convex: bool = False,
        grid: int = 257,
    ):
        self._range = tuple(real_array("bias", bias, (2,)))
        self._grid = integer("grid", grid, least=3)
        self._lower, self._upper = (function(*given, "a function of a") for given in (("lower", lower), ("upper", upper)))
        self.convex = flag("convex", convex)
        if not self._range[0] < self._range[1]:
            raise ValueError(f"bias: expected (low, high) with low < high, got {bias!r}")
        m, M = self.sections(np.linspace(*self._range, self._grid))
        if (m > M).any():
            raise ValueError("lower, upper: expected m(a) <= M(a) on the range of a")
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
        alpha, beta = _broadcast(alpha=alpha, beta=beta)

        def value(a, m, M):
            return alpha[..., None] * a + np.maximum(beta[..., None] * m, beta[..., None] * M)

        a, m, M = self._search(value, alpha.shape)
        return a, np.where(beta >= 0, M, m)

    def largest(self, positive, negative):
        positive, negative = _parts(positive, negative)
        a, m, M = self._search(lambda a, m, M: a - m * positive[..., None] + M * negative[..., None], positive.shape)
        return Extreme(a - m * positive + M * negative, a, m, M)

    def smallest(self, positive, negative):
        positive, negative = _parts(positive, negative)
        a, m, M = self._search(lambda a, m, M: M * positive[..., None] - m * negative[..., None] - a, positive.shape)
        return Extreme(a - M * positive + m * negative, a, M, m)

    def _search(self, value: Callable[[_Array, _Array, _Array], _Array], shape: tuple[int, ...]):
        """a, m(a), M(a) where `value` is largest, of this shape."""
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


def _values(name: str, end: Callable[[_Array], _Array], a: _Array) -> _Array:
    """What a user's function returns: a number a value of a, or one for all."""
    values = real_array(name, end(a))
    if values.shape not in ((), a.shape):
        raise ValueError(f"{name}: expected values of the shape of a, {a.shape}, got {values.shape}")
    return values
