"""Boxes as control sets: the example of section 4.2."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fem_resnet.arguments import real_array
from fem_resnet.control.sets.control_set import interval
from fem_resnet.control.sets.polygon import Polygon

__all__ = ["Box"]


class Box(Polygon):
    """The box [a-, a+] x [b-, b+] of section 4.2.

    Parameters
    ----------
    bias, kernel
        (a-, a+) and (b-, b+), shape (2,) each, numbers without unit. The two ends may be equal, as in {0} x [-1, 1].

    Raises
    ------
    TypeError, ValueError
        If the ends are not finite real numbers, or the first is above the second.

    Examples
    --------
    >>> box = Box((-1, 2), (-0.5, 0.5))
    >>> float(box.largest(2.0, 1.0).value), float(box.smallest(2.0, 1.0).value)
    (3.5, -2.5)
    """

    convex = True

    def __init__(self, bias: Sequence[float], kernel: Sequence[float]):
        (a0, a1), (b0, b1) = self.bias, self.kernel = interval("bias", bias), interval("kernel", kernel)
        self._vertices = np.array([(a0, b0), (a1, b0), (a1, b1), (a0, b1)])

    def __repr__(self) -> str:
        (a0, a1), (b0, b1) = self.bias, self.kernel
        return f"Box(({a0:g}, {a1:g}), ({b0:g}, {b1:g}))"

    def sections(self, a):
        a = real_array("a", a)
        inside = (self.bias[0] <= a) & (a <= self.bias[1])
        return np.where(inside, self.kernel[0], np.inf), np.where(inside, self.kernel[1], -np.inf)
