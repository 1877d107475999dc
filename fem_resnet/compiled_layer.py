"""A layer's callbacks of TS in C (`layer.c`), where a call of Python would cost more than the stage.

For Runge-Kutta methods that step the coefficients, with fixed steps, and parameters that a layer sees as constants: bias,
kernel, fixed factors and times. Others go through Python.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    "length": ctypes.c_double, "point": ctypes.c_void_p, "method_stages": ctypes.c_long, "reuses": ctypes.c_long,
    "step": ctypes.c_long, "steps": ctypes.c_long, "asked": ctypes.c_long, "reductions": ctypes.c_long, "comm": ctypes.c_int,
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
        self._jacobian = self._attach("layer_attach", [(psi + 1) * samples] * 2)
        self._parameters: PETSc.Mat | None = None

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

    def _attach(self, name: str, sizes: Sequence[int]) -> PETSc.Mat:
        mat = PETSc.Mat().create(PETSc.COMM_SELF)
        mat.setSizes(sizes)
        mat.setType("shell")
        mat.setUp()
        self._stage.call(name, *map(ctypes.c_void_p, (self._ts.handle, mat.handle, ctypes.addressof(self._layer))))
        return mat

    def start(self, inputs: LayerInputs, steps: Sequence[float], f: np.ndarray | None) -> None:
        """Before a forward solve with these inputs and steps; the integral of f_t is added to `f`, if it is given."""
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
        layer.length, layer.step, layer.steps, layer.asked = inputs.length, 0, len(steps), 0

    def steps(self) -> list[float]:
        """The steps of the last forward solve, in parts of the layer."""
        return self._h.tolist()

    def stages(self) -> KeptStages:
        """The terms of the quadrature (3.3) of the last forward solve."""
        return KeptStages(self._inputs, self._arrays[0], self._h, self._weights, self._C)

    def start_adjoint(self, adjoint: np.ndarray | None = None) -> None:
        """Before an adjoint solve, with the adjoint value of f at the segment's end, where it is not 0."""
        self._adjoint = None if adjoint is None else self._stage.arranged(adjoint)
        self._functionals = np.zeros(self._stage.Y.nodes + self._work["by_beta"].size)
        self._layer.bias = address(self._functionals)
        self._layer.adjoint, self._layer.asked = address(self._adjoint), 0

    @property
    def parameters(self) -> int:
        """How many parameters TS is to know: beta, and one of derivative 1."""
        return self._work["by_beta"].size + 1

    def attach_parameters(self, state: int) -> None:
        """Hand the transposed Jacobian in the parameters to TS."""
        self._parameters = self._attach("layer_attach_parameters", [state, self.parameters])

    def functionals(self, by_parameters: np.ndarray) -> np.ndarray:
        """Those of the coefficients of bias and kernel after an adjoint solve, from what TS has of its parameters. Collective.

        Raises
        ------
        RuntimeError
            If TS has weighted the stages otherwise than was taken for granted.
        """
        if abs(by_parameters[-1] - self._weight) > 1e-10 * self._weight:  # the steps add up to 1
            raise RuntimeError(
                f"the adjoint of {self._ts.getRKType()!r} weighs the stages by {by_parameters[-1]:g} in all, {self._weight:g} is "
                f"wanted: set FEM_RESNET_COMPILED=0 with this PETSc"
            )
        nodes, bias, beta = self._stage.Y.nodes, self._inputs.bias, self._inputs.beta
        by_beta = beta.pull_back(0.0, by_parameters[:-1].reshape(self._work["by_beta"].shape))
        if not bias.is_nodal:
            return np.concatenate([bias.pull_back(0.0, self._functionals[:nodes]), by_beta])
        self._functionals[nodes:] = by_beta
        return self._functionals

    def release(self) -> None:
        """Forget fields."""
        self._adjoint = self._inputs = self._arrays = self._C = self._functionals = None
