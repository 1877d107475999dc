"""Layers stepped in C (`layer.c`): callbacks of TS, and the calls of TS, where Python would cost more than the stages.

For Runge-Kutta methods that step the coefficients, with fixed steps, and parameters that a layer sees as constants: bias,
kernel, fixed factors and times. Others go through Python.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from petsc4py import PETSc

from fem_resnet.layers.compiled_stage import CompiledStage, address
from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.layers.stage import Argument, LayerTrace, StageValue
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.time_stepping.petsc import rk_tableau

__all__ = ["CompiledLayer", "CompiledLayers", "SolveStopped"]

_FIELDS = {
    "space": ctypes.c_void_p, "phi": ctypes.c_void_p, "psi": ctypes.c_void_p, "a": ctypes.c_void_p, "beta": ctypes.c_void_p,
    "adjoint": ctypes.c_void_p, "f": ctypes.c_void_p, "weights": ctypes.c_void_p, "C": ctypes.c_void_p, "D": ctypes.c_void_p,
    "bias": ctypes.c_void_p, "by_beta": ctypes.c_void_p, "stages": ctypes.c_void_p, "lengths": ctypes.c_void_p,
    "length": ctypes.c_double, "ts": ctypes.c_void_p, "y": ctypes.c_void_p, "adjoint_y": ctypes.c_void_p, "parameters": ctypes.c_void_p,
    "point": ctypes.c_void_p, "method_stages": ctypes.c_long, "reuses": ctypes.c_long, "step": ctypes.c_long,
    "steps": ctypes.c_long, "replays": ctypes.c_long, "max_steps": ctypes.c_long, "asked": ctypes.c_long, "reductions": ctypes.c_long,
    "comm": ctypes.c_int,
}  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = list(_FIELDS.items())


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


class _Outcome(ctypes.Structure):
    _fields_ = [("layer", ctypes.c_long), ("reason", ctypes.c_long), ("finite", ctypes.c_long)]


class SolveStopped(Exception):
    """A solve of `CompiledLayers` ended early.

    Attributes
    ----------
    layer : int
        Number of the layer in the sequence.
    what : petsc4py.PETSc.Error or int or None
        PETSc's error, or the reason that TS gave; None where the state is not finite.
    """

    def __init__(self, layer: int, what: PETSc.Error | int | None):
        super().__init__(f"layer {layer}: {what}")
        self.layer = layer
        self.what = what


class CompiledLayer:
    """One layer's TS with its callbacks in C.

    Parameters
    ----------
    stage
        Compiled stage evaluations.
    ts
        The TS, explicit.
    steps
        Number of equal steps.
    inputs
        What the layer takes, of which shapes count here.
    """

    def __init__(self, stage: CompiledStage, ts: PETSc.TS, steps: int, inputs: LayerInputs):
        samples, phi, psi = stage.samples, inputs.factors.phi.rank, inputs.factors.psi.rank
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
            name: PETSc.Vec().createSeq(size)
            for name, size in (("y", state), ("adjoint_y", state), ("parameters", parameters))
        }
        #: What C sees of the layer.
        self.struct = _Layer(
            space=stage.packed_space, comm=stage.Y.comm.py2f(), method_stages=len(self._weights), reuses=reuses, ts=ts.handle,
            max_steps=ts.getMaxSteps(), **{name: address(array) for name, array in self._work.items()},
            **{name: vector.handle for name, vector in self._vectors.items()},
        )  # fmt: skip
        self._factors: LowRankKernel | None = None
        self._C: np.ndarray | None = None
        self._matrices = _shell(state, state), _shell(state, parameters)
        stage.call("layer_attach", ctypes.byref(self.struct), *(ctypes.c_void_p(matrix.handle) for matrix in self._matrices))

    @staticmethod
    def fits(stage, inputs: Sequence[LayerInputs]) -> bool:
        """Whether a layer with these inputs can be stepped so."""
        values = inputs[0]
        return (
            isinstance(stage, CompiledStage)
            and len(inputs) == 1
            and not (values.learns_length or values.learns_factors)
            and values.bias.is_constant
            and values.beta.is_constant
        )

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
        self.struct.bias, self.struct.adjoint, self.struct.asked = address(functionals), address(adjoint), 0
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
        self._inputs = self._arrays = self._C = None


class CompiledLayers:
    """Consecutive compiled layers with one psi, which one call steps."""

    def __init__(self, layers: Sequence[CompiledLayer]):
        self.layers = list(layers)
        self._stage = layers[0].stage
        self._structs = (ctypes.c_void_p * len(layers))(*(ctypes.addressof(layer.struct) for layer in layers))

    def _solve(self, name: str, *arguments) -> None:
        outcome = _Outcome()
        try:
            self._stage.call(name, self._structs, len(self.layers), *arguments, ctypes.byref(outcome))
        except PETSc.Error as error:
            raise SolveStopped(outcome.layer, error) from error
        if outcome.reason < 0 or not outcome.finite:
            raise SolveStopped(outcome.layer, outcome.reason if outcome.reason < 0 else None)

    def forward(
        self,
        g: np.ndarray,
        inputs: Sequence[LayerInputs],
        steps: Sequence[Sequence[float] | None],
        f: np.ndarray | None,
        save: bool,
    ) -> np.ndarray:
        """g at the end of the layers, from that at their start, shape (rank of psi, samples). Collective.

        Parameters
        ----------
        g
            At the start.
        inputs, steps
            What each layer takes; its steps in parts of it, or None for equal ones.
        f
            What the integral of f_t is added to, shape (nodes, samples); or None.
        save
            Whether to keep the trajectory for `adjoint`.

        Raises
        ------
        SolveStopped
            If a layer cannot be stepped, TS ends before its end, or that is not finite.
        """
        packed = None if f is None else self._stage.pack(f)
        for layer, taken, lengths in zip(self.layers, inputs, steps):
            layer.start(taken, lengths, packed)
        state = np.array(g.T, order="C")
        self._solve("layers_forward", ctypes.c_void_p(address(state)), save)
        for number, layer in enumerate(self.layers):
            if layer.struct.step != layer.struct.steps:
                raise SolveStopped(number, int(layer.ts.getConvergedReason()))
        if f is not None:
            self._stage.unpack(packed, f)
        return state.T

    def adjoint(
        self, gamma: np.ndarray, adjoint: np.ndarray | None = None
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """gamma at the start of each layer, and functionals of its coefficients of bias and kernel. Collective.

        Parameters
        ----------
        gamma
            At the end of the layers, shape (rank of psi, samples).
        adjoint
            lambda, shape (nodes, samples), where it is not 0.

        Raises
        ------
        SolveStopped
            If a layer's adjoint cannot be solved, or is not finite.
        RuntimeError
            If TS has weighted the stages otherwise than was taken for granted.
        """
        packed = None if adjoint is None else self._stage.pack(self._stage.arranged(adjoint))
        functionals = [layer.start_adjoint(packed) for layer in self.layers]
        states = np.empty((len(self.layers) + 1, *gamma.T.shape))
        states[-1] = gamma.T
        self._solve("layers_adjoint", ctypes.c_void_p(address(states)))
        return [state.T for state in states[:-1]], [
            layer.end_adjoint(functional) for layer, functional in zip(self.layers, functionals)
        ]


def _shell(*sizes: int) -> PETSc.Mat:
    matrix = PETSc.Mat().create(PETSc.COMM_SELF)
    matrix.setSizes(sizes)
    matrix.setType("shell")
    matrix.setUp()
    return matrix
