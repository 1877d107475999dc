"""The derivative of a segment in a direction of the state, as an operator on the tape: `Run.tangent` records it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fem_resnet.network.segment import Segment

__all__ = ["TangentSegment"]


class TangentSegment:
    """The tangent of a segment in f as an operator: (f, f_1, coefficients) at the start -> f_1 at the end.

    It is adjoined as the pair (f, f_1). The coefficients have no directions.

    Parameters
    ----------
    segment
        The layers. The segment belongs to this operator alone.
    """

    #: Whether `adjoint` may follow at once: it solves forward by itself.
    ready = True

    def __init__(self, segment: Segment):
        self._segment = segment
        self.inputs = [segment.inputs[0], *segment.inputs]
        self.output = segment.inputs[0]

    def _split(self, arrays):
        f, f_1, *coefficients = arrays
        return [f, *coefficients], [f_1, *(np.zeros_like(part) for part in coefficients)]

    def forward(self, arrays: Sequence[np.ndarray], save: bool) -> np.ndarray:
        """f_1 at the end. Collective."""
        if save:
            self._segment.refuse_without_adjoint()
        values, directions = self._split(arrays)
        self._segment.forward(values, False)  # the value, not the tangent, adapts the steps
        return self._segment.tangent(values, directions)

    def adjoint(self, arrays: Sequence[np.ndarray], functional: np.ndarray) -> list[np.ndarray | Callable[[], np.ndarray]]:
        """Functionals of f, f_1 and the coefficients, from a functional of f_1 at the end. Collective."""
        values, directions = self._split(arrays)
        (f, f_1), functionals = self._segment.adjoint_of_pair(values, directions, np.zeros_like(functional), functional)
        return [f, f_1, *functionals]
