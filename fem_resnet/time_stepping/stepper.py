"""What steps a layer, forward and back: the verbs that segments use, whatever stands behind them.

Three classes have them: `ts_stepper.TSStepper` by PETSc TS and its TSAdjoint, `compiled_layer.CompiledStepper` the same in C,
`discrete_gradient.DiscreteGradientStepper` by a scheme under which the energy falls. `scheme.Scheme` says which is taken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.layers.stage import LayerTrace

__all__ = ["StepFailure", "Stepper"]


class StepFailure(ArithmeticError):
    """A layer cannot be stepped, forward or in its adjoint: TS gave up, or the state is not finite.

    Network and tape are as usable as before.

    Parameters
    ----------
    layer, time, reason
        See the attributes.
    remedy
        What is wrong in particular, and what to do.

    Attributes
    ----------
    layer : int
        Number of the layer.
    time : float
        Where it happened.
    reason : str
        PETSc's name for what happened, or "NOT_FINITE", or "LENGTH_NOT_POSITIVE".
    """

    def __init__(
        self, layer: int, time: float, reason: str, remedy: str = "smaller parameters or more steps a layer may help"
    ):
        what = "the state is not finite" if reason == "NOT_FINITE" else f"the time stepping ended with {reason}"
        super().__init__(f"{what} in layer {layer}, t = {time:.6g}: {remedy}")
        self.layer = layer
        self.time = time
        self.reason = reason
        self._remedy = remedy

    def __reduce__(self):
        return type(self), (self.layer, self.time, self.reason, self._remedy)


class Stepper(ABC):
    """One layer, stepped from its start to its end, and its adjoint back.

    Parameters
    ----------
    layer
        Number of the layer, for messages.

    Attributes
    ----------
    layer : int
        As above; where several layers share a stepper, that of the latest.
    has_trajectory : bool
        Whether the last forward solve was saved, and no adjoint has used that up.
    user : object
        Whose solve the last one was, where several share a stepper.
    inputs : sequence of LayerInputs
        What the last solve took, and its directions where there is a tangent.
    """

    def __init__(self, layer: int):
        self.layer = layer
        self.has_trajectory = False
        self.user: object = None
        self.inputs: Sequence[LayerInputs] = ()

    def take(self, inputs: Sequence[LayerInputs]) -> None:
        """Begin a forward solve with these inputs.

        Raises
        ------
        StepFailure
            If the layer's length is not positive.
        """
        self.release()
        self.inputs = inputs
        start, length = inputs[0].start, inputs[0].length
        if not length > 0:
            raise StepFailure(
                self.layer, start, "LENGTH_NOT_POSITIVE",
                f"layer times cross, t_{self.layer} = {start:.6g} and t_{self.layer + 1} = {start + length:.6g}, and are to "
                f"increase; learn from times further apart, or keep each in an interval of its own: "
                f"train(.., bounds={{'layer_times': (least, largest)}})",
            )  # fmt: skip

    @abstractmethod
    def forward(
        self,
        g: Sequence[np.ndarray],
        f: Sequence[np.ndarray] | None,
        inputs: Sequence[LayerInputs],
        save: bool,
        steps: Sequence[float] | None = None,
    ) -> list[np.ndarray]:
        """Solve the layer from g; returns g at its end and leaves a `trace`. Collective.

        Parameters
        ----------
        g
            Coefficients at the start, and their tangent if there is one, shape (rank, samples).
        f
            State and tangent at the start, shape (nodes, samples), with c as a row more where there is a running cost; may
            be None where the state does not carry them.
        inputs
            Times, factors and parameters of this layer, and the directions of all that.
        save
            Whether to keep the trajectory for `adjoint`.
        steps
            Steps to take, in parts of the layer, as a trace has them; if left out they are adapted, or equal.

        Raises
        ------
        StepFailure
            If the layer cannot be stepped, or the result is not finite.
        """

    @abstractmethod
    def adjoint(
        self, gamma: Sequence[np.ndarray], adjoint: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], Sequence[np.ndarray], np.ndarray]:
        """Adjoint of the last forward solve: gamma at the start, lambda there, functionals of the layer's coefficients. Collective.

        With a tangent, of the second order: the functionals and gamma of the value are those that depend on it, directly
        and through the tangent.

        Parameters
        ----------
        gamma
            Adjoints of g, and of its tangent, at the end of the layer, shape (rank, samples).
        adjoint
            Adjoint values of f, and of its tangent, at the end of the layer but for what gamma stands for: shape
            (nodes, samples), with that of c as a row more where there is a running cost; none where they are 0.

        Returns
        -------
        gamma : list of numpy.ndarray
            At the start of the layer.
        adjoint : list of numpy.ndarray
            The same at its start: changed by a running cost alone.
        functionals : numpy.ndarray
            Of the active coefficients of the bias, then of the kernel, of the length and of the factors' values where
            they are learned, one after the other.

        Raises
        ------
        RuntimeError
            If there was no forward solve that kept its trajectory since the last adjoint.
        StepFailure
            If a linear solve fails, or the result is not finite.
        """

    @property
    @abstractmethod
    def trace(self) -> LayerTrace:
        """What the last forward solve left."""

    @abstractmethod
    def release(self) -> None:
        """Forget what the last solve left; another may follow."""

    def use_trajectory(self) -> None:
        """Begin an adjoint solve, which uses up the trajectory.

        Raises
        ------
        RuntimeError
            If the last forward solve has kept none, or an adjoint has used it up.
        """
        if not self.has_trajectory:
            raise RuntimeError(f"layer {self.layer}: the adjoint wants a forward solve that saves, just before it")
        self.has_trajectory = False

    def time(self, s: float) -> float:
        """T at the fraction s of the layer."""
        return self.inputs[0].start + s * self.inputs[0].length

    def not_finite(self, s: float) -> StepFailure:
        """What to raise if the state is not finite at the fraction s of the layer."""
        return StepFailure(self.layer, self.time(s), "NOT_FINITE")
