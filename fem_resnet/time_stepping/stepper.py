"""What steps a layer, forward and back: the methods that segments call, whatever stands behind them.

Three classes have these methods: `ts_stepper.TSStepper` by PETSc TS and its TSAdjoint, `compiled_layer.CompiledStepper` by the
same in C, and `discrete_gradient.DiscreteGradientStepper` by a step under which the energy falls. A `LayerSequence` steps
consecutive layers one after the other. `scheme.Scheme` chooses and makes steppers and sequences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from petsc4py import PETSc

from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.layers.stage import StageValue
from fem_resnet.options import last_words, reason_name

__all__ = ["LayerSequence", "LayerTrace", "StepFailure", "Stepper"]


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
        The time t of the failure.
    reason : str
        PETSc's name for the failure, or "NOT_FINITE", or "LENGTH_NOT_POSITIVE".
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


@dataclass
class LayerTrace:
    """What a forward solve of a layer leaves: f at the end of the layer follows from it and from f at the start.

    Attributes
    ----------
    stages : iterable of StageValue
        The terms of the quadrature (3.3); none where the state of TS had f itself.
    end : list of numpy.ndarray or None
        f at the end, and its tangent, where the state of TS had them; a running cost adds a row for c.
    steps : list of float
        The accepted steps, as fractions of the layer.
    added : bool
        Whether the solve itself has added the integral of f_t to an array, so that f at the end needs no stages.
    """

    stages: Iterable[StageValue] = field(default_factory=list)
    end: list[np.ndarray] | None = None
    steps: list[float] = field(default_factory=list)
    added: bool = False


class Stepper(ABC):
    """Steps one layer from its start to its end, and the adjoint of the layer back.

    Parameters
    ----------
    layer
        Number of the layer, for messages.

    Attributes
    ----------
    layer : int
        As above. Where several layers share a stepper, the number of the latest.
    has_trajectory : bool
        Whether the last forward solve was saved, and no adjoint has used its trajectory since.
    user : object
        Whose solve the last one was, where several segments share a stepper.
    inputs : sequence of LayerInputs
        What the last solve took, and the direction of all that where there is a tangent.
    """

    def __init__(self, layer: int):
        self.layer = layer
        self.has_trajectory = False
        self.user: object = None
        self.inputs: Sequence[LayerInputs] = ()

    @abstractmethod
    def forward(
        self,
        g: Sequence[np.ndarray],
        f: Sequence[np.ndarray] | None,
        inputs: Sequence[LayerInputs],
        save: bool,
        steps: Sequence[float] | None = None,
    ) -> list[np.ndarray]:
        """Solve the layer from its start to its end, and leave a `trace`. Collective.

        Parameters
        ----------
        g
            g = Psi^T M f at the start, and its tangent if there is one, shape (rank of psi, samples).
        f
            State and tangent at the start, shape (nodes, samples), with c as a row more where there is a running cost. May be
            None where TS steps g alone.
        inputs
            Times, factors and parameters of this layer, and their direction if there is a tangent.
        save
            Whether to keep the trajectory for `adjoint`.
        steps
            The steps to take, as fractions of the layer, from a trace. If left out, steps are equal, or adapted.

        Returns
        -------
        list of numpy.ndarray
            g at the end of the layer, and its tangent, shape (rank of psi, samples).

        Raises
        ------
        StepFailure
            If the layer cannot be stepped, or the result is not finite.
        """

    @abstractmethod
    def adjoint(
        self, by_g: Sequence[np.ndarray], by_f: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], Sequence[np.ndarray], np.ndarray]:
        """Solve the adjoint of the last forward solve, from the end of the layer to its start. Collective.

        The functional in f is split: `by_f` is lambda at the end of the layers with this psi, `by_g` is what the layers since
        then have added, so that the whole is lambda + M Psi gamma. With a tangent, these are the functionals in f and f_1, and
        what is returned of the value includes its effect through the tangent.

        Parameters
        ----------
        by_g
            gamma, the functionals in g and its tangent at the end of the layer, shape (rank of psi, samples).
        by_f
            lambda, the functionals in f and its tangent, shape (nodes, samples), with the functional in c as a row more where
            there is a running cost. Empty for 0.

        Returns
        -------
        by_g : list of numpy.ndarray
            gamma at the start of the layer.
        by_f : sequence of numpy.ndarray
            lambda at the start of the layer. A running cost alone changes it.
        by_coefficients : numpy.ndarray
            The functionals in the active coefficients of the bias, then of the kernel, in the length and in the factors'
            values where these are learned, one after the other, shape (number of them,).

        Raises
        ------
        RuntimeError
            If no forward solve has kept its trajectory since the last adjoint.
        StepFailure
            If a linear solve fails, or the result is not finite.
        """

    @property
    @abstractmethod
    def trace(self) -> LayerTrace:
        """What the last forward solve left."""

    @abstractmethod
    def _forget(self) -> None:
        """Let go of the fields of the last solve."""

    @abstractmethod
    def _renew(self) -> None:
        """Make PETSc's objects anew: after a failure, vectors may be locked."""

    def _forget_stages(self) -> None:
        """Let go of what would serve a solve with the same inputs."""

    def release(self) -> None:
        """Forget what the last solve left. Another solve may follow."""
        self.has_trajectory, self.inputs = False, ()
        self._forget()
        self._forget_stages()

    def take(self, inputs: Sequence[LayerInputs]) -> None:
        """Begin a forward solve with these inputs.

        Raises
        ------
        StepFailure
            If the length of the layer is not positive.
        """
        self._forget()
        self.has_trajectory, self.inputs = False, inputs
        start, length = inputs[0].start, inputs[0].length
        if not length > 0:
            raise StepFailure(
                self.layer, start, "LENGTH_NOT_POSITIVE",
                f"expected layer times that increase, got t_{self.layer} = {start:.6g} and t_{self.layer + 1} = "
                f"{start + length:.6g}; learn from times further apart, or keep each in an interval of its own: "
                f"train(.., bounds={{'layer_times': (least, largest)}})",
            )  # fmt: skip

    def finish(self, saved: bool) -> None:
        """End a forward solve that went well, with or without its trajectory."""
        self.has_trajectory = saved

    def use_trajectory(self) -> None:
        """Begin an adjoint solve, which uses up the trajectory.

        Raises
        ------
        RuntimeError
            If the last forward solve has kept none, or an adjoint has used it up.
        """
        if not self.has_trajectory:
            raise RuntimeError(
                f"layer {self.layer}: expected a forward solve that keeps its trajectory before the adjoint, got none; "
                f"evaluate the functional again"
            )
        self.has_trajectory = False

    def time(self, s: float) -> float:
        """The time t at the fraction s of the layer."""
        return self.inputs[0].start + s * self.inputs[0].length

    def not_finite(self, s: float) -> StepFailure:
        """The error to raise if the state is not finite at the fraction s of the layer."""
        return StepFailure(self.layer, self.time(s), "NOT_FINITE")

    def failed(self, what: PETSc.Error | int, s: float) -> StepFailure:
        """The error to raise if a solve ended at the fraction s of the layer; from now on the solver is a new one.

        Parameters
        ----------
        what
            An error of PETSc, or the negative reason with which TS ended.
        s
            The fraction of the layer.
        """
        self._renew()
        if isinstance(what, PETSc.Error):
            return StepFailure(self.layer, self.time(s), error_reason(what))
        return StepFailure(self.layer, self.time(s), reason_name(PETSc.TS, what))


class LayerSequence:
    """Consecutive layers with one psi, stepped one after the other.

    Parameters
    ----------
    steppers
        One a layer, in order, at least one.
    """

    def __init__(self, steppers: Sequence[Stepper]):
        self.steppers: Sequence[Stepper] = list(steppers)

    def forward(
        self,
        g: list[np.ndarray],
        f: Sequence[np.ndarray] | None,
        layers: Sequence[Sequence[LayerInputs]],
        save: bool,
        steps: Sequence[Sequence[float] | None],
        total: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """Step all layers. Collective over the communicator of the label domain.

        Parameters
        ----------
        g, f
            At the start of the layers, shapes (rank of psi, samples) and (nodes, samples), as for `Stepper.forward`.
        layers, steps
            The inputs and the steps of each layer.
        save
            Whether to keep the trajectories for `adjoint`.
        total
            An array of shape (nodes, samples). Layers in C add their integral of f_t to it, and their traces say so.

        Returns
        -------
        list of numpy.ndarray
            g at the end of the layers, shape (rank of psi, samples).

        Raises
        ------
        StepFailure
            If a layer cannot be stepped.
        """
        for stepper, inputs, lengths in zip(self.steppers, layers, steps):
            g = stepper.forward(g, f, inputs, save, lengths)
            f = f if stepper.trace.end is None else stepper.trace.end
        return g

    def adjoint(
        self, by_g: list[np.ndarray], by_f: Sequence[np.ndarray]
    ) -> list[tuple[list[np.ndarray], Sequence[np.ndarray], np.ndarray]]:
        """Solve the adjoint of the last forward solve. Collective.

        Parameters
        ----------
        by_g, by_f
            gamma and lambda at the end of the layers, shapes (rank of psi, samples) and (nodes, samples), as for
            `Stepper.adjoint`.

        Returns
        -------
        list of tuple
            The result of `Stepper.adjoint` for each layer, the last layer first.

        Raises
        ------
        RuntimeError
            If no forward solve has kept its trajectories since the last adjoint.
        StepFailure
            If an adjoint cannot be solved, or is not finite.
        """
        found = []
        for stepper in reversed(self.steppers):
            found.append(stepper.adjoint(by_g, by_f))
            by_g, by_f, _ = found[-1]
        return found


def error_reason(error: PETSc.Error) -> str:
    """An error of PETSc in a few words, as the reason of a `StepFailure`."""
    return f"PETSc's error {error.ierr}, {last_words(error)}"  # type: ignore[attr-defined]  # petsc4py's stubs leave out ierr
