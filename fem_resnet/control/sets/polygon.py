"""Polygons as control sets, convex or not."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fem_resnet.arguments import real_array
from fem_resnet.control.sets.control_set import Array, places
from fem_resnet.control.sets.vertices import VertexSet

__all__ = ["Polygon"]


class Polygon(VertexSet):
    """The inside and the boundary of a polygon, which need not be convex.

    Parameters
    ----------
    corners
        The corners (a, b) in order along the boundary, shape (at least 3, 2), numbers without unit. The boundary meets itself
        nowhere. The last corner may be the first one again, as in closed outlines.

    Raises
    ------
    TypeError, ValueError
        If the corners are not finite real numbers, are fewer than 3 or all on one line, or if the boundary crosses or touches
        itself.

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
        # A corner that repeats its neighbour, as in closed outlines, is dropped: an edge without length has no direction.
        self._vertices = given[np.abs(given - np.roll(given, 1, axis=0)).max(axis=1) > 1e-15 * size]
        start = self._vertices - given[0]  # far from (0, 0) products would lose small numbers
        edges = np.roll(start, -1, axis=0) - start
        area = _cross(start, np.roll(start, -1, axis=0)).sum() / 2
        if len(start) < 3 or abs(area) <= 1e-14 * size**2:
            raise ValueError(f"corners: expected a polygon with an area, got {corners!r}; for a few points use Points")
        meeting = _meeting(start, edges, 1e-14 * size)
        if meeting.any():
            first, second = (self._vertices[k].tolist() for k in np.argwhere(meeting)[0])
            raise ValueError(
                f"corners: expected a boundary that meets itself nowhere; the edges that start in {first} and {second} cross "
                f"or touch each other"
            )
        self.convex = bool((np.sign(area) * _cross(edges, np.roll(edges, -1, axis=0)) >= -1e-14 * size**2).all())

    def _crossings(self, a: Array) -> tuple[Array, Array]:
        """The lower and upper end, in any order, of the piece of each edge over a; nan where an edge does not pass over a.

        The shape is the shape of a, with the edges as the last axis.
        """
        (a0, b0), (a1, b1) = self._vertices.T, np.roll(self._vertices, -1, axis=0).T
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
        a, b, tolerance = places(a, b, tolerance)
        start, end = self._vertices, np.roll(self._vertices, -1, axis=0)
        along = end - start
        distance = _distance(np.stack([a, b], axis=-1)[..., None, :], start, along).min(axis=-1)
        # A point is inside where a ray from it crosses the boundary an odd number of times.
        above = (start[:, 1] > b[..., None]) != (end[:, 1] > b[..., None])
        rise = np.where(along[:, 1] == 0, 1.0, along[:, 1])
        left = a[..., None] < start[:, 0] + (b[..., None] - start[:, 1]) / rise * along[:, 0]
        return (distance <= tolerance) | (np.count_nonzero(above & left, axis=-1) % 2 == 1)


def _cross(u: Array, v: Array) -> Array:
    return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]


def _distance(point: Array, start: Array, along: Array) -> Array:
    """Distances of points from the edges start + s along, 0 <= s <= 1; arrays that broadcast, the last axis of length 2."""
    s = np.clip(np.sum((point - start) * along, axis=-1) / np.sum(along**2, axis=-1), 0, 1)
    return np.linalg.norm(point - start - s[..., None] * along, axis=-1)


def _meeting(start: Array, edges: Array, tolerance: float) -> Array:
    """Which pairs of edges of a closed outline cross, or touch elsewhere than at a corner that they share."""
    n = len(start)
    side = np.sign(_cross(edges[:, None], start - start[:, None]))  # on which side of edge i's line corner j lies
    parts = side * np.roll(side, -1, axis=1) < 0  # the line of edge i separates the ends of edge j
    near = _distance(start, start[:, None], edges[:, None]) <= tolerance
    own = np.eye(n, dtype=bool)
    near &= ~(own | np.roll(own, 1, axis=1))  # an edge's own ends
    return parts & parts.T | near
