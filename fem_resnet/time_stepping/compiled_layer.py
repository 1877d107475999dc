"""Layers stepped in C (`layer.c`): the callbacks of TS and the calls of TS, where Python would cost more than the stages.

This way is open to explicit Runge-Kutta methods with fixed steps that step g alone, on layers where bias and kernel do not
vary in time and where factors and times are fixed. Other layers go through Python (`ts_stepper`).
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
from fem_resnet.layers.stage import Argument, StageValue
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.petsc import converged_reason, new_ts, rk_tableau
from fem_resnet.time_stepping.options import configure
from fem_resnet.time_stepping.stepper import LayerSequence, LayerTrace, Stepper

__all__ = ["CompiledLayer", "CompiledLayers", "CompiledStepper"]


@dataclass(frozen=True)
class KeptStages:
    """The terms of the quadrature (3.3) of a forward solve, made one by one when they are asked for.

    Attributes
    ----------
    inputs : LayerInputs
        What the layer took.
    a : numpy.ndarray
        Bias at the nodes, shape (nodes,).
    lengths : numpy.ndarray
        The steps, as fractions of the layer, shape (steps,).
    weights : numpy.ndarray
        b_i of the method, shape (stages,).
    C : numpy.ndarray
        beta g of all stages, shape (steps, stages, samples, rank of phi).
    """

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


@dataclass(frozen=True)
class _Solve:
    """The arrays of a forward solve, on which C works, and what belongs to them."""

    stages: KeptStages
    beta: np.ndarray
    adds: bool


class CompiledLayer:
    """The TS of one layer, with its callbacks in C.

    Parameters
    ----------
    stage
        Compiled stage evaluations.
    kernel
        A kernel with the ranks of the layer's.
    steps
        Number of equal steps.
    options
        PETSc options of the TS, from `options.solver_options`.

    Attributes
    ----------
    stage : CompiledStage
        As above.
    ts : petsc4py.PETSc.TS
    struct : LayerStruct
        The layer, as C has it.
    """

    def __init__(self, stage: CompiledStage, kernel: LowRankKernel, steps: int, options: petsctools.OptionsManager):
        samples, phi, psi = stage.samples, kernel.phi.rank, kernel.psi.rank
        self.stage, self._equal = stage, [1.0 / steps] * steps
        self.ts = ts = new_ts(PETSc.COMM_SELF)
        ts.setErrorIfStepFails(False)
        configure(ts, options, ("mat_type",))
        matrix, self._weights, _ = rk_tableau(ts)
        reuses = bool((matrix[-1] == self._weights).all())  # PETSc's test too: the last slope is then the next step's first
        used = self._weights[: len(self._weights) - reuses]
        #: The sum of the weights that TS must give the stages of a step of length 1 in the adjoint.
        self._weight = float(np.where(used == 0.0, 1.0, used).sum())
        shapes = {"C": (samples, phi), "D": (samples, phi), "by_beta": (phi, psi)}
        self._work = {name: np.empty(shape) for name, shape in shapes.items()} | {"weights": self._weights}
        state, parameters = (psi + 1) * samples, phi * psi + 1
        # Of the parameters TS knows beta alone, and one more whose derivative is 1.
        self._vectors = {
            name: PETSc.Vec().createSeq(size) for name, size in (("y", state), ("adjoint", state), ("parameters", parameters))
        }
        self.struct = LayerStruct(
            Y=stage.packed_space, comm=stage.Y.comm.py2f(), method_stages=len(self._weights), reuses=reuses, ts=ts.handle,
            max_steps=ts.getMaxSteps(), **{name: address(array) for name, array in self._work.items()},
            **{name: vector.handle for name, vector in self._vectors.items()},
        )  # fmt: skip
        self._factors: LowRankKernel | None = None
        self._solve: _Solve | None = None
        self._matrices = _shell(state, state), _shell(state, parameters)
        stage.call("layer_attach", ctypes.byref(self.struct), *(matrix.handle for matrix in self._matrices))

    def start(self, inputs: LayerInputs, steps: Sequence[float] | None, f: np.ndarray | None) -> None:
        """Prepare a forward solve.

        Parameters
        ----------
        inputs
            What the layer takes.
        steps
            The steps, as fractions of the layer; None for equal ones.
        f
            The array to which the integral of f_t is added, as `CompiledStage.pack` gives it, shape (nodes x samples,) or
            (nodes, samples); or None.
        """
        a = np.ascontiguousarray(inputs.bias.coefficients(0.0), self.stage.real)
        beta = np.ascontiguousarray(inputs.beta.coefficients(0.0))
        # New arrays: a trace keeps them.
        lengths = np.array(self._equal if steps is None else steps)
        C = np.empty((len(lengths), len(self._weights), self.stage.samples, inputs.factors.phi.rank))
        self._solve = _Solve(KeptStages(inputs, a, lengths, self._weights, C), beta, f is not None)
        struct = self.struct
        if inputs.factors is not self._factors:
            self._factors = inputs.factors
            struct.phi, struct.psi = (self.stage.basis(basis) for basis in (inputs.factors.phi, inputs.factors.psi))
        struct.a, struct.beta, struct.stages = address(a), address(beta), address(C)
        struct.lengths, struct.f, struct.length = address(lengths), address(f), inputs.length
        struct.step, struct.steps, struct.replays, struct.asked = 0, len(lengths), steps is not None, 0

    @property
    def trace(self) -> LayerTrace:
        """What the last forward solve left."""
        if self._solve is None:
            return LayerTrace()
        return LayerTrace(self._solve.stages, None, self._solve.stages.lengths.tolist(), self._solve.adds)

    def start_adjoint(self, by_f: np.ndarray | None) -> np.ndarray:
        """Prepare an adjoint solve.

        Parameters
        ----------
        by_f
            lambda, first `CompiledStage.arranged` and then packed; None for 0.

        Returns
        -------
        numpy.ndarray
            The array that takes the functional in the bias at the nodes, with room for the functional in beta behind it,
            shape (nodes + rank of phi x rank of psi,).
        """
        functionals = np.zeros(self.stage.Y.nodes + self._work["by_beta"].size)
        self.struct.bias, self.struct.lambda_, self.struct.asked = address(functionals), address(by_f), 0
        return functionals

    def end_adjoint(self, functionals: np.ndarray) -> np.ndarray:
        """The functionals in the coefficients of bias and kernel, after an adjoint solve. Collective.

        Parameters
        ----------
        functionals
            The array of `start_adjoint`.

        Returns
        -------
        numpy.ndarray
            One functional after the other, shape (number of coefficients,).

        Raises
        ------
        RuntimeError
            If TS has weighted the stages differently from `layer.c`.
        """
        by_parameters, inputs = self._vectors["parameters"].array_r, self._solve.stages.inputs
        if abs(by_parameters[-1] - self._weight) > 1e-10 * self._weight:  # the steps add up to 1
            raise RuntimeError(
                f"ts_rk_type: expected {self._weight:g} as the sum of PETSc's weights of the stages in the adjoint of "
                f"{self.ts.getRKType()!r}, got {by_parameters[-1]:g}; set FEM_RESNET_COMPILED=0 with this version of PETSc"
            )
        nodes, by_beta = self.stage.Y.nodes, by_parameters[:-1].reshape(self._work["by_beta"].shape)
        by_beta = inputs.beta.pull_back(0.0, by_beta)
        if not inputs.bias.is_nodal:
            return np.concatenate([inputs.bias.pull_back(0.0, functionals[:nodes]), by_beta])
        functionals[nodes:] = by_beta
        return functionals

    def release(self) -> None:
        """Forget fields."""
        self._solve = None


class CompiledStepper(Stepper):
    """Steps one layer by the callbacks in C. `CompiledLayers` steps several layers by one call.

    Parameters
    ----------
    layer
        Number of the layer, for messages.
    stage, kernel, steps, options
        As for `CompiledLayer`.

    Attributes
    ----------
    solver : CompiledLayer
        The TS with its callbacks; a new one after a failure.
    """

    def __init__(
        self, layer: int, stage: CompiledStage, kernel: LowRankKernel, steps: int, options: petsctools.OptionsManager
    ):
        super().__init__(layer)
        self._new = partial(CompiledLayer, stage, kernel, steps, options)
        self.solver = self._new()

    def forward(self, g, f, inputs, save, steps=None):
        return CompiledLayers([self]).forward(g, f, [inputs], save, [steps])

    def adjoint(self, by_g, by_f):
        (result,) = CompiledLayers([self]).adjoint(by_g, by_f)
        return result

    @property
    def trace(self) -> LayerTrace:
        return self.solver.trace

    def _forget(self) -> None:
        self.solver.release()

    def _renew(self) -> None:
        self.solver = self._new()


class CompiledLayers(LayerSequence):
    """Consecutive compiled layers with one psi, which one call of C steps.

    Parameters
    ----------
    steppers
        One a layer, in order, at least one.
    """

    steppers: Sequence[CompiledStepper]

    def __init__(self, steppers: Sequence[CompiledStepper]):
        super().__init__(steppers)
        self._stage = self.steppers[0].solver.stage
        self._layers: list[CompiledLayer] = []
        self._structs: ctypes.Array | None = None

    def _solve(self, name: str, s: float, *arguments) -> None:
        """Call C for a solve that ends at the fraction s of its last layer."""
        outcome = Outcome()
        try:
            self._stage.call(name, self._structs, len(self._layers), *arguments, ctypes.byref(outcome))
        except PETSc.Error as error:
            raise self._failed(outcome.layer, error) from error
        if outcome.reason < 0:
            raise self._failed(outcome.layer, int(outcome.reason))
        if not outcome.finite:
            raise self.steppers[outcome.layer].not_finite(s)

    def _failed(self, layer: int, what: PETSc.Error | int) -> Exception:
        stepper = self.steppers[layer]
        return stepper.failed(what, stepper.solver.ts.getTime())

    def _take_layers(self) -> None:
        layers = [stepper.solver for stepper in self.steppers]
        if layers != self._layers:  # after a failure, a layer is a new one
            self._layers = layers
            self._structs = (ctypes.c_void_p * len(layers))(*(ctypes.addressof(layer.struct) for layer in layers))

    def forward(self, g, f, layers, save, steps, total=None):
        self._take_layers()
        packed = None if total is None else self._stage.pack(total)
        for stepper, layer, inputs, lengths in zip(self.steppers, self._layers, layers, steps):
            stepper.take(inputs)
            layer.start(inputs[0], lengths, packed)
        state = np.array(g[0].T, order="C")
        self._solve("layers_forward", 1.0, address(state), save)
        for number, (stepper, layer) in enumerate(zip(self.steppers, self._layers)):
            if layer.struct.step != layer.struct.steps:
                raise self._failed(number, converged_reason(layer.ts))
            stepper.finish(save)
        if total is not None:
            self._stage.unpack(packed, total)
        return [state.T]

    def adjoint(self, by_g, by_f):
        self._take_layers()
        for stepper in self.steppers:
            stepper.use_trajectory()
        packed = self._stage.pack(self._stage.arranged(by_f[0])) if by_f else None
        functionals = [layer.start_adjoint(packed) for layer in self._layers]
        states = np.empty((len(self._layers) + 1, *by_g[0].T.shape))
        states[-1] = by_g[0].T
        self._solve("layers_adjoint", 0.0, address(states))
        # On several ranks the functionals of the layers are summed, first layer first.
        by_coefficients = [layer.end_adjoint(functional) for layer, functional in zip(self._layers, functionals)]
        return [([start.T], by_f, found) for start, found in zip(reversed(states[:-1]), reversed(by_coefficients))]


def _shell(rows: int, columns: int) -> PETSc.Mat:
    matrix = PETSc.Mat().create(PETSc.COMM_SELF)
    matrix.setSizes((rows, columns))
    matrix.setType("shell")
    matrix.setUp()
    return matrix
