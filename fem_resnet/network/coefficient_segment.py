"""Segments of which all that follows sees f through the layers' own psi: from g = Psi^T M f to g, which is what TS steps.

Backward lambda is 0 and gamma all there is, so that nothing at all is of size nodes x samples; states and co-states are
rebuilt when asked for, as those of any segment.
"""

from __future__ import annotations

from fem_resnet.label_domain.basis import Basis
from fem_resnet.network.segment import Segment
from fem_resnet.parameters.space_basis import Replicated, SeenBatch

__all__ = ["CoefficientSegment"]


class CoefficientSegment(Segment):
    """Consecutive layers with one psi, which step coefficients: an operator from g = Psi^T M f at the start to g at the end.

    Parameters
    ----------
    psi
        Theirs.
    first
        Whether the input is held as f, seen through psi; else as g.
    arguments
        As for `Segment`; there is no running cost.
    """

    _steps_f = False

    def __init__(self, psi: Basis, first: bool, *arguments):
        super().__init__(*arguments)
        self.output_of_state = Replicated(psi.Y, (psi.rank, self.values.samples))
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

    def _adjoint_end(self, psi, state):
        return state, []

    def _add_observed(self, gamma, duals, state):
        return [part + other for part, other in zip(gamma, state)], duals

    def _adjoint_start(self, psi, gamma, duals, order):
        return gamma[order]
