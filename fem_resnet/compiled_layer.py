"""A layer's callbacks of TS in C (`layer.c`), where a call of Python would cost more than the stage.

For explicit methods that step the coefficients, with fixed steps, and parameters that a layer sees as constants: nodal
bias, kernel, fixed factors and times. Others, and large batches, for which the call does not show, go through Python.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from petsc4py import PETSc

from fem_resnet.compiled_stage import CompiledStage
from fem_resnet.layer import Argument, StageValue
from fem_resnet.layer_inputs import LayerInputs

__all__ = ["CompiledLayer"]

#: rank x samples up to which the products of g with beta, which are plain loops, do not show.
_LARGEST = 4096
_POINTERS = (
    "space", "phi", "psi", "a", "beta", "adjoint", "length", "g", "C", "Q", "x", "x_q", "D", "bias", "by_beta", "stages",
    "lengths",
)  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double if name == "length" else ctypes.c_void_p) for name in _POINTERS] + [
        *((name, ctypes.c_long) for name in ("step", "steps", "reductions")), ("comm", ctypes.c_int)
    ]  # fmt: skip


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
    weights
        b_i of the method.
    """

    def __init__(self, stage: CompiledStage, ts: PETSc.TS, inputs: LayerInputs, weights: np.ndarray):
        samples, phi, psi = stage.samples, inputs.factors.phi.rank, inputs.factors.psi.rank
        self._stage, self._ts, self._weights = stage, ts, weights
        shapes = {
            "g": (psi, samples), "C": (phi, samples), "Q": (psi, samples), "x": (psi, samples), "x_q": (samples,),
            "D": (phi, samples), "bias": (stage.Y.nodes,), "by_beta": (phi, psi),
        }  # fmt: skip
        self._work = {name: np.empty(shape) for name, shape in shapes.items()}
        self._layer = _Layer(
            space=stage.space, comm=stage.Y.comm.py2f(), **{name: array.ctypes.data for name, array in self._work.items()}
        )
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
            and values.bias.is_nodal
            and values.bias.is_constant
            and values.beta.is_constant
            and max(values.factors.shape) * stage.samples <= _LARGEST
        )

    def _attach(self, name: str, sizes: Sequence[int]) -> PETSc.Mat:
        mat = PETSc.Mat().create(PETSc.COMM_SELF)
        mat.setSizes(sizes)
        mat.setType("shell")
        mat.setUp()
        self._stage.call(name, *map(ctypes.c_void_p, (self._ts.handle, mat.handle, ctypes.addressof(self._layer))))
        return mat

    def start(self, inputs: LayerInputs, steps: int) -> None:
        """Before a forward solve with these inputs and so many steps."""
        self._inputs = inputs
        a, beta = (np.ascontiguousarray(part.coefficients(0.0)) for part in (inputs.bias, inputs.beta))
        # New ones: the quadrature (3.3) keeps them.
        self._h = np.empty(steps)
        self._C = np.empty((steps, len(self._weights), inputs.factors.phi.rank, self._stage.samples))
        self._arrays = a, beta
        layer = self._layer
        layer.phi, layer.psi = (self._stage.basis(basis) for basis in (inputs.factors.phi, inputs.factors.psi))
        layer.a, layer.beta, layer.stages = a.ctypes.data, beta.ctypes.data, self._C.ctypes.data
        layer.lengths = self._h.ctypes.data
        layer.length, layer.step, layer.steps, layer.adjoint = inputs.length, 0, steps, None

    def steps(self) -> list[float]:
        """The steps of the last forward solve, in parts of the layer."""
        return self._h.tolist()

    def stages(self) -> list[StageValue]:
        """The terms of the quadrature (3.3) of the last forward solve."""
        inputs, a = self._inputs, (self._arrays[0],)
        return [
            StageValue(h * weight, Argument(inputs.factors, (inputs.length,), a, (C,)))
            for h, step in zip(self._h, self._C)
            for weight, C in zip(self._weights, step)
            if weight != 0.0
        ]

    def start_adjoint(self, adjoint: np.ndarray) -> None:
        """Before an adjoint solve, with the adjoint value of f at the segment's end, its nodes innermost."""
        self._adjoint = np.asfortranarray(adjoint)
        self._layer.adjoint = self._adjoint.ctypes.data

    def attach_parameters(self, state: int, parameters: int) -> None:
        """Hand the transposed Jacobian in the parameters to TS."""
        self._parameters = self._attach("layer_attach_parameters", [state, parameters])

    def release(self) -> None:
        """Forget fields."""
        self._adjoint = self._inputs = self._arrays = self._C = None
