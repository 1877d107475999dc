"""Consecutive layers with one psi, forward and back: by one call of C where it steps them all, else one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.time_stepping.compiled_layer import CompiledLayers, CompiledStepper
from fem_resnet.time_stepping.stepper import Stepper

__all__ = ["LayerSequence"]


class LayerSequence:
    """See above.

    Parameters
    ----------
    steppers
        Those of the layers, in order.
    """

    def __init__(self, steppers: Sequence[Stepper]):
        self.steppers = list(steppers)
        compiled = all(isinstance(stepper, CompiledStepper) for stepper in steppers)
        self._together = CompiledLayers(steppers) if compiled else None

    def forward(
        self,
        g: list[np.ndarray],
        f: Sequence[np.ndarray] | None,
        layers: Sequence[tuple[LayerInputs, ...]],
        save: bool,
        steps: Sequence[list[float] | None],
        total: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """Step all layers from g; returns g at the end. Collective over the communicator of the label domain.

        Parameters
        ----------
        g, f, save
            As for `Stepper.forward`.
        layers, steps
            The inputs and the steps of each layer.
        total
            Where C steps the layers, the integral of f_t is added to it, shape (nodes, samples); their traces say so.

        Raises
        ------
        StepFailure
            If a layer cannot be stepped.
        """
        if self._together is not None:
            return [self._together.forward(g[0], layers, steps, total, save)]
        for stepper, inputs, lengths in zip(self.steppers, layers, steps):
            g = stepper.forward(g, f, inputs, save, lengths)
            f = f if stepper.trace.end is None else stepper.trace.end
        return g

    def adjoint(
        self, gamma: list[np.ndarray], adjoint: Sequence[np.ndarray]
    ) -> list[tuple[list[np.ndarray], Sequence[np.ndarray], np.ndarray]]:
        """Adjoint of the last forward solve: what `Stepper.adjoint` says of each layer, the last one first. Collective.

        Parameters
        ----------
        gamma, adjoint
            At the end of the layers, as for `Stepper.adjoint`.

        Raises
        ------
        RuntimeError
            If there was no forward solve that kept its trajectories since the last adjoint.
        StepFailure
            If an adjoint cannot be solved, or is not finite.
        """
        if self._together is not None:
            gammas, functionals = self._together.adjoint(gamma[0], *adjoint)
            return [([start], adjoint, functional) for start, functional in zip(reversed(gammas), reversed(functionals))]
        found = []
        for stepper in reversed(self.steppers):
            found.append(stepper.adjoint(gamma, adjoint))
            gamma, adjoint, _ = found[-1]
        return found
