"""Finite control sets, as of quantised networks."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fem_resnet.arguments import integer, real_array
from fem_resnet.control.sets.control_set import places
from fem_resnet.control.sets.vertices import VertexSet

__all__ = ["Points"]


class Points(VertexSet):
    """A finite set of points (a, b), for example the weights that a quantised network may take.

    Parameters
    ----------
    points
        Shape (at least 1, 2), numbers without unit.

    Raises
    ------
    TypeError, ValueError
        If they are not finite real numbers of this shape.

    Examples
    --------
    >>> binary = Points([(0, -1), (0, 1)])
    >>> float(binary.largest(2.0, 1.0).value), binary.convex
    (3.0, False)
    """

    def __init__(self, points: ArrayLike):
        self._vertices = np.unique(real_array("points", points, ("points", 2)), axis=0)
        self.convex = len(self._vertices) == 1

    def sections(self, a):
        here = real_array("a", a)[..., None] == self._vertices[:, 0]
        b = self._vertices[:, 1]
        return np.where(here, b, np.inf).min(axis=-1), np.where(here, b, -np.inf).max(axis=-1)

    def contains(self, a, b, tolerance=1e-12):
        a, b, tolerance = places(a, b, tolerance)
        away = np.abs(np.stack([a, b], axis=-1)[..., None, :] - self._vertices).max(axis=-1)
        return away.min(axis=-1) <= tolerance

    def sample(self, count):
        """All points, whatever `count` is: a and b, arrays of shape (points,).

        Raises
        ------
        ValueError
            If `count` is not a positive integer.
        """
        integer("count", count)
        return self._vertices[:, 0].copy(), self._vertices[:, 1].copy()
