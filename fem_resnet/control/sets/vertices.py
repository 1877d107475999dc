"""Control sets whose extremes lie over finitely many values of a: `Polygon`, `Box` and `Points` are such sets."""

from __future__ import annotations

import numpy as np

from fem_resnet.control.sets.control_set import Array, ControlSet, Extreme, pair_of_arrays, parts_of_state

__all__ = ["VertexSet"]


class VertexSet(ControlSet):
    """A set with finitely many vertices: m and M are linear between the vertices, and turn or jump only over them."""

    #: The vertices (a, b), shape (vertices, 2).
    _vertices: Array

    @property
    def bias_range(self) -> tuple[float, float]:
        return float(self._vertices[:, 0].min()), float(self._vertices[:, 0].max())

    def maximise(self, alpha, beta):
        alpha, beta = pair_of_arrays(alpha=alpha, beta=beta)
        values = np.multiply.outer(alpha, self._vertices[:, 0]) + np.multiply.outer(beta, self._vertices[:, 1])
        best = np.argmax(values, axis=-1)
        return self._vertices[best, 0], self._vertices[best, 1]

    def largest(self, positive, negative):
        return self._extreme(*parts_of_state(positive, negative), 1)

    def smallest(self, positive, negative):
        return self._extreme(*parts_of_state(positive, negative), -1)

    def _extreme(self, positive: Array, negative: Array, sign: int) -> Extreme:
        """The largest T_f for sign 1, the smallest for sign -1."""
        a = np.unique(self._vertices[:, 0])
        m, M = self.sections(a)
        over_positive, over_negative = (m, M) if sign > 0 else (M, m)
        T = a - np.multiply.outer(positive, over_positive) + np.multiply.outer(negative, over_negative)
        best = np.argmax(sign * T, axis=-1)
        value = np.take_along_axis(T, best[..., None], axis=-1)[..., 0]
        return Extreme(value, a[best], over_positive[best], over_negative[best])
