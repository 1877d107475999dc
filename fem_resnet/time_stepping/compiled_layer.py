"""Layers stepped in C (`layer.c`): callbacks of TS, and the calls of TS, where Python would cost more than the stages.

For Runge-Kutta methods that step the coefficients, with fixed steps, and parameters that a layer sees as constants: bias,
kernel, fixed factors and times. Others go through Python.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import petsctools
from petsc4py import PETSc

from fem_resnet.layers.compiled_stage import CompiledStage, LayerStruct, Outcome, address
from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.layers.stage import Argument, LayerTrace, StageValue
from fem_resnet.options import last_words, reason_name
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.time_stepping.methods import configure
from fem_resnet.time_stepping.petsc import rk_tableau
from fem_resnet.time_stepping.stepper import StepFailure, Stepper

__all__ = ["CompiledLayer", "CompiledLayers", "CompiledStepper"]


@dataclass(frozen=True)
class KeptStages:
    """The terms of the quadrature (3.3) of a forward solve, made when they are asked for."""

    inputs: LayerInputs
    a: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray
    C: np.ndarray

    def __iter__(self) -> Iterator[StageValue]:
        for h, step in zip(self.lengths, self.C):
            for weight, C in zip(self.weights, step):
                if weight != 0.0:
                    yield StageValue(h * weight, Argument(self.inputs.factors, (self.inputs.length,), (self.a,), (C.T,)))


class CompiledLayer:
    """One layer's TS with its callbacks in C.

    Parameters
    ----------
    stage
        Compiled stage evaluations.
    kernel
        The kernel of the layer, of which the ranks count here.
    steps
        Number of equal steps.
    options
        PETSc options of the TS, from `methods.solver_options`.
    """

    def __init__(self, stage: CompiledStage, kernel: LowRankKernel, steps: int, options: petsctools.OptionsManager):
        samples, phi, psi = stage.samples, kernel.phi.rank, kernel.psi.rank
        ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.MATCHSTEP)
        ts.setErrorIfStepFails(False)
        configure(ts, options, ("mat_type",))
        self.stage, self.ts, self._equal = stage, ts, [1.0 / steps] * steps
        matrix, self._weights, _ = rk_tableau(ts)
        reuses = bool((matrix[-1] == self._weights).all())  # PETSc's test too: the last slope is then the next step's first
        used = self._weights[: len(self._weights) - reuses]
        #: What TS is to weigh the stages of a step of length 1 by in all, in the adjoint.
        self._weight = float(np.where(used == 0.0, 1.0, used).sum())
        shapes = {"C": (samples, phi), "D": (samples, phi), "by_beta": (phi, psi)}
        self._work = {name: np.empty(shape) for name, shape in shapes.items()} | {"weights": self._weights}
        state, parameters = (psi + 1) * samples, phi * psi + 1
        # TS knows of the parameters beta alone, and one of derivative 1.
        self._vectors = {
            name: PETSc.Vec().createSeq(size) for name, size in (("y", state), ("adjoint", state), ("parameters", parameters))
        }
        #: What C sees of the layer.
        self.struct = LayerStruct(
            Y=stage.packed_space, comm=stage.Y.comm.py2f(), method_stages=len(self._weights), reuses=reuses, ts=ts.handle,
            max_steps=ts.getMaxSteps(), **{name: address(array) for name, array in self._work.items()},
            **{name: vector.handle for name, vector in self._vectors.items()},
        )  # fmt: skip
        self._factors: LowRankKernel | None = None
        self._C: np.ndarray | None = None
        self._inputs: LayerInputs | None = None
        self._h, self._arrays, self._adds = np.empty(0), (), False
        self._matrices = _shell(state, state), _shell(state, parameters)
        stage.call("layer_attach", ctypes.byref(self.struct), *(matrix.handle for matrix in self._matrices))

    def start(self, inputs: LayerInputs, steps: Sequence[float] | None, f: np.ndarray | None) -> None:
        """Before a forward solve.

        Parameters
        ----------
        inputs
            What the layer takes.
        steps
            In parts of the layer; equal ones if left out.
        f
            What the integral of f_t is added to, as `CompiledStage.pack` has it; or None.
        """
        self._inputs = inputs
        a = np.ascontiguousarray(inputs.bias.coefficients(0.0), self.stage.real)
        beta = np.ascontiguousarray(inputs.beta.coefficients(0.0))
        # New ones: the quadrature (3.3) keeps them.
        self._h = np.array(self._equal if steps is None else steps)
        self._C = np.empty((len(self._h), len(self._weights), self.stage.samples, inputs.factors.phi.rank))
        self._arrays = a, beta
        self._adds = f is not None
        struct = self.struct
        if inputs.factors is not self._factors:
            self._factors = inputs.factors
            struct.phi, struct.psi = (self.stage.basis(basis) for basis in (inputs.factors.phi, inputs.factors.psi))
        struct.a, struct.beta, struct.stages = address(a), address(beta), address(self._C)
        struct.lengths, struct.f, struct.length = address(self._h), address(f), inputs.length
        struct.step, struct.steps, struct.replays, struct.asked = 0, len(self._h), steps is not None, 0

    @property
    def trace(self) -> LayerTrace:
        """What the last forward solve left."""
        if self._C is None:
            return LayerTrace()
        stages = KeptStages(self._inputs, self._arrays[0], self._h, self._weights, self._C)
        return LayerTrace(stages, None, self._h.tolist(), self._adds)

    def start_adjoint(self, adjoint: np.ndarray | None) -> np.ndarray:
        """Before an adjoint solve: the array that takes the functional of the bias, and has room for that of beta.

        Parameters
        ----------
        adjoint
            lambda, as `CompiledStage.arranged` and `pack` have it, where it is not 0.
        """
        functionals = np.zeros(self.stage.Y.nodes + self._work["by_beta"].size)
        self.struct.bias, self.struct.lambda_, self.struct.asked = address(functionals), address(adjoint), 0
        return functionals

    def end_adjoint(self, functionals: np.ndarray) -> np.ndarray:
        """Functionals of the coefficients of bias and kernel, from what `start_adjoint` gave. Collective.

        Raises
        ------
        RuntimeError
            If TS has weighted the stages otherwise than was taken for granted.
        """
        by_parameters, bias = self._vectors["parameters"].array_r, self._inputs.bias
        if abs(by_parameters[-1] - self._weight) > 1e-10 * self._weight:  # the steps add up to 1
            raise RuntimeError(
                f"the adjoint of {self.ts.getRKType()!r} weighs the stages by {by_parameters[-1]:g} in all, {self._weight:g} is "
                f"wanted: set FEM_RESNET_COMPILED=0 with this PETSc"
            )
        nodes, by_beta = self.stage.Y.nodes, by_parameters[:-1].reshape(self._work["by_beta"].shape)
        by_beta = self._inputs.beta.pull_back(0.0, by_beta)
        if not bias.is_nodal:
            return np.concatenate([bias.pull_back(0.0, functionals[:nodes]), by_beta])
        functionals[nodes:] = by_beta
        return functionals

    def release(self) -> None:
        """Forget fields."""
        self._inputs, self._arrays, self._C = None, (), None


class CompiledStepper(Stepper):
    """One layer, stepped by the callbacks in C; `CompiledLayers` steps several by one call.

    Parameters
    ----------
    layer
        Number of the layer, for messages.
    stage, kernel, steps, options
        As for `CompiledLayer`.
    """

    def __init__(
        self, layer: int, stage: CompiledStage, kernel: LowRankKernel, steps: int, options: petsctools.OptionsManager
    ):
        super().__init__(layer)
        self._new = partial(CompiledLayer, stage, kernel, steps, options)
        #: The TS with its callbacks; a new one after a failure.
        self.solver = self._new()

    def forward(self, g, f, inputs, save, steps=None):
        return [CompiledLayers([self]).forward(g[0], [inputs], [steps], None, save)]

    def adjoint(self, gamma, adjoint):
        (start,), (functionals,) = CompiledLayers([self]).adjoint(gamma[0], *adjoint)
        return [start], adjoint, functionals

    @property
    def trace(self) -> LayerTrace:
        return self.solver.trace

    def release(self) -> None:
        self.has_trajectory, self.inputs = False, ()
        self.solver.release()

    def renewed(self, what: PETSc.Error | int) -> StepFailure:
        """What to raise if a solve ended in an error, or with a reason of TS; the TS is a new one from now on."""
        time = self.time(self.solver.ts.getTime())
        self.solver = self._new()
        if isinstance(what, PETSc.Error):
            return StepFailure(self.layer, time, f"PETSc's error {what.ierr}, {last_words(what)}")
        return StepFailure(self.layer, time, reason_name(PETSc.TS, what))


class CompiledLayers:
    """Consecutive compiled layers with one psi, which one call steps."""

    def __init__(self, steppers: Sequence[CompiledStepper]):
        self._steppers = list(steppers)
        self._stage = self._steppers[0].solver.stage
        self._layers: list[CompiledLayer] = []
        self._structs: ctypes.Array | None = None

    def _solve(self, name: str, s: float, *arguments) -> None:
        """Call C, for a solve that ends at the fraction s of its last layer."""
        outcome = Outcome()
        try:
            self._stage.call(name, self._structs, len(self._layers), *arguments, ctypes.byref(outcome))
        except PETSc.Error as error:
            raise self._steppers[outcome.layer].renewed(error) from error
        if outcome.reason < 0:
            raise self._steppers[outcome.layer].renewed(int(outcome.reason))
        if not outcome.finite:
            raise self._steppers[outcome.layer].not_finite(s)

    def _take_layers(self) -> None:
        layers = [stepper.solver for stepper in self._steppers]
        if layers != self._layers:  # one that failed is a new one
            self._layers = layers
            self._structs = (ctypes.c_void_p * len(layers))(*(ctypes.addressof(layer.struct) for layer in layers))

    def forward(
        self,
        g: np.ndarray,
        inputs: Sequence[Sequence[LayerInputs]],
        steps: Sequence[Sequence[float] | None],
        f: np.ndarray | None,
        save: bool,
    ) -> np.ndarray:
        """G at the end of the layers, from that at their start, shape (rank of psi, samples). Collective.

        Parameters
        ----------
        g
            At the start.
        inputs, steps
            What each layer takes, without directions; its steps in parts of it, or None for equal ones.
        f
            What the integral of f_t is added to, shape (nodes, samples); or None.
        save
            Whether to keep the trajectory for `adjoint`.

        Raises
        ------
        StepFailure
            If a layer cannot be stepped, TS ends before its end, or that is not finite.
        """
        self._take_layers()
        packed = None if f is None else self._stage.pack(f)
        for stepper, layer, taken, lengths in zip(self._steppers, self._layers, inputs, steps):
            stepper.take(taken)
            layer.start(taken[0], lengths, packed)
        state = np.array(g.T, order="C")
        self._solve("layers_forward", 1.0, address(state), save)
        for stepper, layer in zip(self._steppers, self._layers):
            if layer.struct.step != layer.struct.steps:
                raise stepper.renewed(int(layer.ts.getConvergedReason()))
            stepper.has_trajectory = save
        if f is not None:
            self._stage.unpack(packed, f)
        return state.T

    def adjoint(self, gamma: np.ndarray, adjoint: np.ndarray | None = None) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Gamma at the start of each layer, and functionals of its coefficients of bias and kernel. Collective.

        Parameters
        ----------
        gamma
            At the end of the layers, shape (rank of psi, samples).
        adjoint
            lambda, shape (nodes, samples), where it is not 0.

        Raises
        ------
        StepFailure
            If a layer's adjoint cannot be solved, or is not finite.
        RuntimeError
            If there was no forward solve that kept its trajectories since the last adjoint; or TS has weighted the stages
            otherwise than was taken for granted.
        """
        self._take_layers()
        for stepper in self._steppers:
            stepper.use_trajectory()
        packed = None if adjoint is None else self._stage.pack(self._stage.arranged(adjoint))
        functionals = [layer.start_adjoint(packed) for layer in self._layers]
        states = np.empty((len(self._layers) + 1, *gamma.T.shape))
        states[-1] = gamma.T
        self._solve("layers_adjoint", 0.0, address(states))
        return [state.T for state in states[:-1]], [
            layer.end_adjoint(functional) for layer, functional in zip(self._layers, functionals)
        ]


def _shell(*sizes: int) -> PETSc.Mat:
    matrix = PETSc.Mat().create(PETSc.COMM_SELF)
    matrix.setSizes(sizes)
    matrix.setType("shell")
    matrix.setUp()
    return matrix
