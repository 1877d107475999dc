"""Consecutive layers with one psi, forward and back: by one call of C where it steps them all, else one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from petsc4py import PETSc

from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.time_stepping.compiled_layer import CompiledLayers, SolveStopped
from fem_resnet.time_stepping.stepper import LayerStepper

__all__ = ["LayerSequence"]


class LayerSequence:
    """See above.

    Parameters
    ----------
    steppers
        Those of the layers, in order.
    """

    def __init__(self, steppers: Sequence[LayerStepper]):
        self.steppers = list(steppers)
        self._together: CompiledLayers | None = None

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
            As for `LayerStepper.forward`.
        layers, steps
            The inputs and the steps of each layer.
        total
            Where C steps the layers, the integral of f_t is added to it, shape (nodes, samples); their traces say so.

        Raises
        ------
        StepFailure
            If a layer cannot be stepped.
        """
        together = self._compiled(layers)
        if together is None:
            for stepper, inputs, lengths in zip(self.steppers, layers, steps):
                g = stepper.forward(g, f, inputs, save, lengths)
                f = stepper.trace.end if stepper.carries_f else f
            return g
        for stepper, inputs in zip(self.steppers, layers):
            stepper.take(inputs)
        end = self._solve(lambda: together.forward(g[0], [inputs[0] for inputs in layers], steps, total, save), 1.0)
        for stepper in self.steppers:
            stepper.has_trajectory = save
        return [end]

    def adjoint(
        self, gamma: list[np.ndarray], adjoint: Sequence[np.ndarray]
    ) -> list[tuple[list[np.ndarray], Sequence[np.ndarray], np.ndarray]]:
        """Adjoint of the last forward solve: what `LayerStepper.adjoint` says of each layer, the last one first. Collective.

        Parameters
        ----------
        gamma, adjoint
            At the end of the layers, as for `LayerStepper.adjoint`.

        Raises
        ------
        RuntimeError
            If there was no forward solve that kept its trajectories since the last adjoint.
        StepFailure
            If an adjoint cannot be solved, or is not finite.
        """
        if self._together is None:
            found = []
            for stepper in reversed(self.steppers):
                found.append(stepper.adjoint(gamma, adjoint))
                gamma, adjoint, _ = found[-1]
            return found
        for stepper in self.steppers:
            stepper.use_trajectory()
        gammas, functionals = self._solve(lambda: self._together.adjoint(gamma[0], *adjoint), 0.0)
        return [([start], adjoint, functional) for start, functional in zip(reversed(gammas), reversed(functionals))]

    def _compiled(self, layers: Sequence[tuple[LayerInputs, ...]]) -> CompiledLayers | None:
        """The layers as C steps them, if it steps them all."""
        compiled = [stepper.compiled(inputs) for stepper, inputs in zip(self.steppers, layers)]
        if None in compiled:
            self._together = None
        elif self._together is None or self._together.layers != compiled:  # a stepper that failed has made a new one
            self._together = CompiledLayers(compiled)
        return self._together

    def _solve(self, solve: Callable, t: float):
        try:
            return solve()
        except SolveStopped as stopped:
            stepper, what = self.steppers[stopped.layer], stopped.what
            failure = stepper.not_finite(t) if what is None else stepper.failure(what)
            raise failure from what if isinstance(what, PETSc.Error) else None
