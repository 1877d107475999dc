"""The pyadjoint Block of the package: an operator on arrays, as a step on the tape.

Segments of layers, heads, losses and regularisers are operators with the two verbs of `Operator`; the Block reads
Functions into arrays for them and writes their results into Functions. It creates none again and again: outputs go into
the checkpoints that the tape has, adjoint values into Cofunctions made once (pyadjoint copies what it hands to a user).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import firedrake as fd
import numpy as np
from mpi4py import MPI
from pyadjoint import AdjFloat, Block
from pyadjoint.tape import annotate_tape, get_working_tape, stop_annotating

__all__ = ["Operator", "OperatorBlock", "Slot", "apply"]


class Slot(Protocol):
    """How a Function holds an array; `SpaceBasis` and `BatchValues` are slots."""

    space: fd.functionspaceimpl.WithGeometry

    def read(self, function: fd.Function | fd.Cofunction) -> np.ndarray: ...

    def write(self, function: fd.Function | fd.Cofunction, array: np.ndarray) -> None: ...


class Operator(Protocol):
    """A differentiable map between arrays, or from arrays to a number.

    Law: with d the derivative of `forward` at the arrays, `<dual, d v> = sum_i <adjoint(arrays, dual)_i, v_i>`.
    """

    #: One slot an input.
    inputs: Sequence[Slot]
    #: The slot of the output, or None where the output is a number.
    output: Slot | None
    #: Whether `adjoint` may be called without a `forward(save=True)` at the same arrays just before it.
    ready: bool

    def forward(self, arrays: Sequence[np.ndarray], save: bool) -> np.ndarray | float:
        """The value; `save` says that an adjoint may follow."""

    def adjoint(self, arrays: Sequence[np.ndarray], dual: np.ndarray | float) -> Sequence[np.ndarray]:
        """Functionals of the inputs, one an input, in arrays of its own."""


class OperatorBlock(Block):
    """An operator on the tape.

    Parameters
    ----------
    operator
        The operator; it belongs to this Block alone.
    functions
        Its inputs.
    """

    def __init__(self, operator: Operator, functions: Sequence[fd.Function]):
        super().__init__()
        self.operator = operator
        for function in functions:
            self.add_dependency(function)
        self._duals: list[fd.Cofunction | None] = [None] * len(functions)
        self._solved: list[tuple[weakref.ref, int]] | None = None
        self._adjoint_at: tuple[weakref.ref, int] | None = None

    def solve(self, inputs: Sequence[fd.Function]) -> np.ndarray | float:
        """The operator's value at these inputs, ready for its adjoint."""
        self._solved = None
        value = self.operator.forward(_read(self.operator, inputs), save=True)
        self._solved = [_version(function) for function in inputs]
        return value

    @property
    def adjoint_is_current(self) -> bool:
        """Whether the adjoint value that the latest adjoint was given is still what it was."""
        if self._adjoint_at is None:
            return False
        dual = self._adjoint_at[0]()
        return dual is not None and self._adjoint_at == _version(dual)

    def recompute_component(self, inputs, block_variable, idx, prepared):
        value = self.solve(inputs)
        slot = self.operator.output
        if slot is None:
            return AdjFloat(value)
        checkpoint = block_variable.checkpoint
        output = checkpoint if isinstance(checkpoint, fd.Function) else fd.Function(slot.space)
        slot.write(output, value)
        return output

    def prepare_evaluate_adj(self, inputs, adj_inputs, relevant_dependencies):
        if self.operator.output is None:
            dual = float(adj_inputs[0])
        else:
            self._adjoint_at = _version(adj_inputs[0])
            dual = self.operator.output.read(adj_inputs[0])
        if self._solved != [_version(function) for function in inputs]:
            raise RuntimeError(
                f"{type(self.operator).__name__}: an input has changed since the tape was evaluated; evaluate the "
                f"functional before its derivative"
            )
        if not self.operator.ready:
            self.solve(inputs)
        return self.operator.adjoint(_read(self.operator, inputs), dual)

    def evaluate_adj_component(self, inputs, adj_inputs, block_variable, idx, prepared=None):
        slot = self.operator.inputs[idx]
        if self._duals[idx] is None:
            self._duals[idx] = fd.Cofunction(slot.space.dual())
        slot.write(self._duals[idx], prepared[idx])
        return self._duals[idx]

    def prepare_evaluate_tlm(self, inputs, tlm_inputs, relevant_outputs):
        raise NotImplementedError(f"{type(self.operator).__name__}: tangents are not implemented, only first adjoints")

    def prepare_evaluate_hessian(self, inputs, hessian_inputs, adj_inputs, relevant_dependencies):
        raise NotImplementedError(f"{type(self.operator).__name__}: Hessians are not implemented, only first adjoints")


def _renew_if_changed(function: fd.Function) -> None:
    """See that the tape takes the present values of an input that was assigned to while annotation was off."""
    variable = function.block_variable
    if variable.creation_timestep == -1 and isinstance(variable.checkpoint, fd.Function):
        same = np.array_equal(variable.checkpoint.dat.data_ro, function.dat.data_ro)
        if not function.function_space().mesh().comm.allreduce(same, op=MPI.LAND):
            function.clear_block_variable()


def _version(function: fd.Function | fd.Cofunction) -> tuple[weakref.ref, int]:
    """Equal for the same Function, unchanged; does not keep it alive."""
    return weakref.ref(function), function.dat.dat_version


def _read(operator: Operator, functions: Sequence[fd.Function]) -> list[np.ndarray]:
    return [slot.read(function) for slot, function in zip(operator.inputs, functions)]


def apply(operator: Operator, functions: Sequence[fd.Function]) -> tuple[fd.Function | AdjFloat, OperatorBlock | None]:
    """The operator's output at these Functions, recorded if the tape is annotating.

    Parameters
    ----------
    operator
        The operator; when recorded it is the Block's from now on.
    functions
        Its inputs.

    Returns
    -------
    output
        A new Function, or an AdjFloat.
    block
        The Block, or None where nothing was recorded.
    """
    block = None
    with_tape = annotate_tape()
    if with_tape:
        for function in functions:
            _renew_if_changed(function)
        block = OperatorBlock(operator, functions)
        functions = [variable.saved_output for variable in block.get_dependencies()]
    with stop_annotating():
        value = block.solve(functions) if with_tape else operator.forward(_read(operator, functions), save=False)
        if operator.output is None:
            output = AdjFloat(value)
        else:
            output = fd.Function(operator.output.space)
            operator.output.write(output, value)
    if with_tape:
        get_working_tape().add_block(block)
        block.add_output(output.create_block_variable())
    return output, block
