"""Segments from g = Psi^T M f to g, for networks of which all that follows sees f through the layers' own psi.

Backward, the functional of g is all there is, so that nothing is of size nodes x samples. States and co-states are rebuilt on
request, as in any segment.
"""

from __future__ import annotations

from fem_resnet.label_domain.basis import Basis
from fem_resnet.network.segment import Functional, Segment
from fem_resnet.parameters.space_basis import ReplicatedRows, SeenBatch

__all__ = ["CoefficientSegment"]


class CoefficientSegment(Segment):
    """Consecutive layers with one psi, which step coefficients: an operator from g = Psi^T M f at the start to g at the end.

    Parameters
    ----------
    psi
        The basis psi of all layers.
    first
        Whether the input is f, seen through psi; else it is g.
    arguments
        As for `Segment`. There is no running cost.
    """

    _steps_f = False

    def __init__(self, psi: Basis, first: bool, *arguments):
        super().__init__(*arguments)
        self.output_of_state = ReplicatedRows(psi.Y, (psi.rank, self.values.samples))
        self.inputs[0] = SeenBatch(psi, self.values.space) if first else self.output_of_state

    def _run(self, steppers, start, layers, save, taken, total=None):
        g, states, l = start, {}, 0
        for sequence in self._split(steppers, layers):
            if l in self.observed:
                states[l] = [part.copy() for part in g]
            end = l + len(sequence.steppers)
            g = sequence.forward(g, None, layers[l:end], save, taken[l:end])
            l = end
        self._check_ranks_agree(g)
        return [g, *(states[l] for l in self.observed)]

    def _at_end(self, psi, state):
        return Functional([], psi, state)

    def _add_observed(self, at, state):
        return at._replace(by_g=[part + other for part, other in zip(at.by_g, state)])

    def _at_start(self, at, order):
        return at.by_g[order]
