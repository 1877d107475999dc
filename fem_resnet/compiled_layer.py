"""A layer's callbacks of TS in C (`layer.c`), where a call of Python would cost more than the stage.

For Runge-Kutta methods that step the coefficients, with fixed steps, and parameters that a layer sees as constants: bias,
kernel, fixed factors and times. Others go through Python.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from petsc4py import PETSc

from fem_resnet.compiled_stage import CompiledStage, address
from fem_resnet.kernel import LowRankKernel
from fem_resnet.layer import Argument, StageValue
from fem_resnet.layer_inputs import LayerInputs
from fem_resnet.petsc import rk_tableau

__all__ = ["CompiledLayer"]

_FIELDS = {
    "space": ctypes.c_void_p, "phi": ctypes.c_void_p, "psi": ctypes.c_void_p, "a": ctypes.c_void_p, "beta": ctypes.c_void_p,
    "adjoint": ctypes.c_void_p, "f": ctypes.c_void_p, "weights": ctypes.c_void_p, "C": ctypes.c_void_p, "D": ctypes.c_void_p,
    "bias": ctypes.c_void_p, "by_beta": ctypes.c_void_p, "stages": ctypes.c_void_p, "lengths": ctypes.c_void_p,
    "length": ctypes.c_double, "y": ctypes.c_void_p, "adjoint_y": ctypes.c_void_p, "parameters": ctypes.c_void_p,
    "point": ctypes.c_void_p, "method_stages": ctypes.c_long, "reuses": ctypes.c_long, "step": ctypes.c_long,
    "steps": ctypes.c_long, "replays": ctypes.c_long, "asked": ctypes.c_long, "reductions": ctypes.c_long,
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


class CompiledLayer:
    """The callbacks of one layer, on its TS.

    Parameters
    ----------
    stage
        Compiled stage evaluations.
    ts
        The TS, explicit.
    inputs
        What the layer takes, of which shapes count here.
    """

    def __init__(self, stage: CompiledStage, ts: PETSc.TS, inputs: LayerInputs):
        samples, phi, psi = stage.samples, inputs.factors.phi.rank, inputs.factors.psi.rank
        self._stage, self._ts = stage, ts
        matrix, self._weights, _ = rk_tableau(ts)
        reuses = bool((matrix[-1] == self._weights).all())  # PETSc's test too: the last slope is then the next step's first
        used = self._weights[: len(self._weights) - reuses]
        #: What TS is to weigh the stages of a step of length 1 by in all, in the adjoint.
        self._weight = float(np.where(used == 0.0, 1.0, used).sum())
        shapes = {"C": (samples, phi), "D": (samples, phi), "by_beta": (phi, psi)}
        self._work = {name: np.empty(shape) for name, shape in shapes.items()} | {"weights": self._weights}
        self._layer = _Layer(
            space=stage.space, comm=stage.Y.comm.py2f(), method_stages=len(self._weights), reuses=reuses,
            **{name: address(array) for name, array in self._work.items()},
        )  # fmt: skip
        self._factors: LowRankKernel | None = None
        state, parameters = (psi + 1) * samples, phi * psi + 1
        # TS knows of the parameters beta alone, and one of derivative 1.
        self._vectors = {"y": _vector(state), "adjoint_y": _vector(state), "parameters": _vector(parameters)}
        for name, vector in self._vectors.items():
            setattr(self._layer, name, vector.handle)
        self._matrices = _shell(state, state), _shell(state, parameters)
        self._call("layer_attach", *(ctypes.c_void_p(matrix.handle) for matrix in self._matrices))

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

    def _call(self, name: str, *arguments) -> None:
        self._stage.call(name, ctypes.c_void_p(self._ts.handle), ctypes.byref(self._layer), *arguments)

    def forward(
        self,
        g: np.ndarray,
        inputs: LayerInputs,
        steps: Sequence[float],
        replays: bool,
        f: np.ndarray | None,
        save: bool,
    ) -> np.ndarray:
        """g at the end of the layer, from that at its start, shape (rank of psi, samples). Collective.

        Parameters
        ----------
        g, inputs, save
            As for `LayerStepper.forward`.
        steps, replays
            Steps in parts of the layer, and whether each is to be set.
        f
            What the integral of f_t is added to, shape (nodes, samples); or None.
        """
        self._inputs = inputs
        a = np.ascontiguousarray(inputs.bias.coefficients(0.0), self._stage.real)
        beta = np.ascontiguousarray(inputs.beta.coefficients(0.0))
        # New ones: the quadrature (3.3) keeps them.
        self._h = np.array(steps, dtype=float)
        self._C = np.empty((len(steps), len(self._weights), self._stage.samples, inputs.factors.phi.rank))
        self._arrays = a, beta
        layer = self._layer
        if inputs.factors is not self._factors:
            self._factors = inputs.factors
            layer.phi, layer.psi = (self._stage.basis(basis) for basis in (inputs.factors.phi, inputs.factors.psi))
        layer.a, layer.beta, layer.stages = address(a), address(beta), address(self._C)
        layer.lengths, layer.f = address(self._h), address(f)
        layer.length, layer.step, layer.steps, layer.replays, layer.asked = inputs.length, 0, len(steps), replays, 0
        state = np.array(g.T, order="C")
        self._call("layer_forward", ctypes.c_void_p(address(state)), save, self._ts.getMaxSteps())
        return state.T

    def steps(self) -> list[float]:
        """The steps of the last forward solve, in parts of the layer."""
        return self._h.tolist()

    def stages(self) -> KeptStages:
        """The terms of the quadrature (3.3) of the last forward solve."""
        return KeptStages(self._inputs, self._arrays[0], self._h, self._weights, self._C)

    def adjoint(self, gamma: np.ndarray, adjoint: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """gamma at the start of the layer, from that at its end, and functionals of the coefficients of bias and kernel.

        Collective.

        Parameters
        ----------
        gamma
            Shape (rank of psi, samples).
        adjoint
            lambda, shape (nodes, samples), where it is not 0.

        Raises
        ------
        RuntimeError
            If TS has weighted the stages otherwise than was taken for granted.
        """
        adjoint = None if adjoint is None else self._stage.arranged(adjoint)
        nodes, shape = self._stage.Y.nodes, self._work["by_beta"].shape
        functionals = np.zeros(nodes + prod(shape))
        self._layer.bias, self._layer.adjoint, self._layer.asked = address(functionals), address(adjoint), 0
        state = np.array(gamma.T, order="C")
        self._call("layer_adjoint", ctypes.c_void_p(address(state)))
        by_parameters, bias = self._vectors["parameters"].array_r, self._inputs.bias
        if abs(by_parameters[-1] - self._weight) > 1e-10 * self._weight:  # the steps add up to 1
            raise RuntimeError(
                f"the adjoint of {self._ts.getRKType()!r} weighs the stages by {by_parameters[-1]:g} in all, {self._weight:g} is "
                f"wanted: set FEM_RESNET_COMPILED=0 with this PETSc"
            )
        functionals[nodes:] = self._inputs.beta.pull_back(0.0, by_parameters[:-1].reshape(shape))
        if not bias.is_nodal:
            functionals = np.concatenate([bias.pull_back(0.0, functionals[:nodes]), functionals[nodes:]])
        return state.T, functionals

    def release(self) -> None:
        """Forget fields."""
        self._inputs = self._arrays = self._C = None


def _vector(size: int) -> PETSc.Vec:
    vector = PETSc.Vec().create(PETSc.COMM_SELF)
    vector.setSizes(size)
    vector.setUp()
    return vector


def _shell(*sizes: int) -> PETSc.Mat:
    matrix = PETSc.Mat().create(PETSc.COMM_SELF)
    matrix.setSizes(sizes)
    matrix.setType("shell")
    matrix.setUp()
    return matrix
