"""Disks and ellipses as control sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from fem_resnet.arguments import real_array
from fem_resnet.control.sets.control_set import Array, ControlSet, Extreme, pair_of_arrays, parts_of_state

__all__ = ["Ellipse"]


class Ellipse(ControlSet):
    """The inside and the boundary of an ellipse: the points centre + E x with abs(x) <= 1.

    Parameters
    ----------
    centre
        (a, b), shape (2,), numbers without unit.
    axes
        The radius of a disk; or the half axes in a and in b, shape (2,); or the matrix E, shape (2, 2), invertible.

    Raises
    ------
    TypeError, ValueError
        If these are not finite real numbers of such a shape, or the ellipse has no area.

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
        area = abs(E[0, 0] * E[1, 1] - E[0, 1] * E[1, 0])
        if area <= 1e-14 * np.abs(E).max() ** 2:
            raise ValueError(f"axes: expected a disk or ellipse with an area, got {axes!r}")
        self._shape = E @ E.T
        #: Half the range of a.
        self._reach = np.sqrt(self._shape[0, 0])
        #: How the middle of the section at a moves with (a - centre) / reach.
        self._tilt = self._shape[0, 1] / self._reach
        #: Half the length of the longest section.
        self._height = area / self._reach

    @property
    def bias_range(self):
        return float(self._centre[0] - self._reach), float(self._centre[0] + self._reach)

    def _ends(self, s: Array) -> tuple[Array, Array]:
        """The section at a = centre + reach s."""
        middle, half = self._centre[1] + self._tilt * s, self._height * np.sqrt(np.maximum(0.0, 1 - s**2))
        return middle - half, middle + half

    def sections(self, a):
        a = real_array("a", a)
        low, high = self.bias_range
        m, M = self._ends(np.clip((a - self._centre[0]) / self._reach, -1, 1))
        inside = (low <= a) & (a <= high)  # asked of a itself: at the ends (a - centre) / reach is 1 only up to round-off
        return np.where(inside, m, np.inf), np.where(inside, M, -np.inf)

    def maximise(self, alpha, beta):
        alpha, beta = pair_of_arrays(alpha=alpha, beta=beta)
        a, b = self._shape[0, 0] * alpha + self._shape[0, 1] * beta, self._shape[0, 1] * alpha + self._shape[1, 1] * beta
        size = np.sqrt(alpha * a + beta * b)
        size = np.where(size > 0, size, 1.0)
        a = np.clip(self._centre[0] + a / size, *self.bias_range)
        # Near the ends of the range of a, round-off in a moves the ends of the section by the square root of that.
        return a, np.clip(self._centre[1] + b / size, *self.sections(a))

    def largest(self, positive, negative):
        return self._extreme(*parts_of_state(positive, negative), 1)

    def smallest(self, positive, negative):
        return self._extreme(*parts_of_state(positive, negative), -1)

    def _extreme(self, positive: Array, negative: Array, sign: int) -> Extreme:
        """The largest T_f for sign 1, the smallest for sign -1."""
        # T_f = centre + p s +- q sqrt(1 - s^2) is extreme at +- (p, q) / hypot(p, q).
        p, q = self._reach - self._tilt * (positive - negative), self._height * (positive + negative)
        size = np.hypot(p, q)
        s = sign * p / np.where(size > 0, size, 1.0)
        low, high = self._ends(s)
        over_positive, over_negative = (low, high) if sign > 0 else (high, low)
        a = self._centre[0] + self._reach * s
        return Extreme(a - over_positive * positive + over_negative * negative, a, over_positive, over_negative)
