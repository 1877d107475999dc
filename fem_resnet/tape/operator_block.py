"""The pyadjoint Block of the package: an operator on arrays, as a step on the tape.

The Block reads Functions into arrays for its operator, and writes the results into Functions. It makes each Function once:
outputs go into the checkpoints that the tape has, tangents into Functions and adjoint values into Cofunctions that the Block
keeps, as pyadjoint copies what it hands to a user. Only the functionals in nodal controls are new Cofunctions each time, which
`Parameter.controls` hand to users as they are.

A Hessian action is forward over reverse: one sweep of tangents up the tape, and one sweep of second adjoints down. Inside
`recording.gauss_newton(tape)`, the second sweep leaves out the curvature of all operators between arrays. For J = l(F(m)) the
action is then F'^T l'' F' instead of F'^T l'' F' + l' F''.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import firedrake as fd
import numpy as np
from mpi4py import MPI
from pyadjoint import AdjFloat, Block
from pyadjoint.block_variable import BlockVariable

from fem_resnet.parameters.space_basis import NodalValues, Slot, read_all
from fem_resnet.ranks import watched
from fem_resnet.tape.checkpoints import is_leaf
from fem_resnet.tape.operator import Operator, made, parts

__all__ = ["DERIVATIVE_FIRST", "OperatorBlock", "read", "version_of"]

#: A Function and the version of its data.
Version = tuple[weakref.ref, int]

#: What to do if a Hessian has no derivative to start from.
DERIVATIVE_FIRST = (
    "the Hessian needs the derivative at the same point first; call derivative() after each evaluation of the functional "
    "and before hessian()"
)


class OperatorBlock(Block):
    """An operator on the tape.

    Parameters
    ----------
    operator
        The operator; it belongs to this Block alone.
    functions
        Its inputs: Functions, or the tape's variables for them.

    Attributes
    ----------
    operator : Operator
        As above.
    gauss_newton : bool
        Whether `recording.gauss_newton` is in force, which changes Hessian actions.
    """

    def __init__(self, operator: Operator, functions: Sequence[fd.Function | BlockVariable]):
        super().__init__()
        self.operator = operator
        self._add_dependencies(functions)
        self._output_slots: Sequence[Slot | None] = parts(operator, operator.output)
        #: One an input: the Cofunction that holds the functional, and the one of the second order.
        self._functionals: list[fd.Cofunction | None] = [None] * len(functions)
        self._second_functionals: list[fd.Cofunction | None] = [None] * len(functions)
        #: By the number of the output, the Function that holds its tangent.
        self._tangents: dict[int, fd.Function] = {}
        #: The inputs of the latest solve, and their arrays.
        self._solved: list[Version] | None = None
        self._kept: list[np.ndarray] | None = None
        #: The adjoint values from which the latest adjoint started, and the inputs at which it was taken.
        self._adjoint_at: list[Version] = []
        self._derived: list[Version] | None = None
        self.gauss_newton = False

    def _add_dependencies(self, functions: Sequence[fd.Function | BlockVariable]) -> None:
        for function in functions:
            if isinstance(function, BlockVariable):
                function.will_add_as_dependency()
                self._dependencies.append(function)
            else:
                self.add_dependency(function)

    def add_last_output(self, value: fd.Function) -> None:
        """Put the operator's latest output on the tape, as an output of this Block."""
        self._output_slots = parts(self.operator, self.operator.output)
        self.add_output(value.create_block_variable())

    def solve(self, inputs: Sequence[fd.Function]) -> np.ndarray | float:
        """The operator's value at these inputs; its adjoint may follow."""
        before, self._solved = self._solved or [None] * len(inputs), None
        versions = [version_of(function) for function in inputs]
        arrays = read(self.operator, inputs, views=True)  # views of inputs that change are not used again
        if self._kept is not None:
            arrays = [
                kept if version == old and not kept.flags.writeable else array
                for array, kept, version, old in zip(arrays, self._kept, versions, before)
            ]
        self._kept = arrays
        value = self.operator.forward(arrays, save=True)
        self._solved = versions
        return value

    @property
    def adjoint_is_current(self) -> bool:
        """Whether the adjoint values from which the latest adjoint started have not changed since."""
        values = [reference() for reference, _ in self._adjoint_at]
        return (
            bool(values) and all(value is not None for value in values) and self._adjoint_at == list(map(version_of, values))
        )

    def _has_changed(self, inputs: Sequence[fd.Function]) -> bool:
        """Whether the inputs have changed since the latest solve. Collective: one rank alone may have touched the data."""
        changed = self._solved != [version_of(function) for function in inputs]
        comm = watched(inputs[0].function_space().mesh().comm) if inputs else MPI.COMM_SELF
        return comm.allreduce(changed, op=MPI.LOR) if comm.size > 1 else changed

    def refuse_changed(self, what: str) -> None:
        """Refuse to go on if the tape has other inputs by now than at the latest solve. Collective.

        Parameters
        ----------
        what
            What was asked for, for the message.

        Raises
        ------
        RuntimeError
            If an input has changed.
        """
        if self._has_changed([variable.saved_output for variable in self.get_dependencies()]):
            raise RuntimeError(f"{what}: an input has changed since the tape was evaluated; evaluate the functional first")

    def prepare_recompute_component(self, inputs, relevant_outputs):
        return parts(self.operator, self.solve(inputs))

    def recompute_component(self, inputs, block_variable, idx, prepared):
        slot = self._output_slots[idx]
        if slot is None:
            return AdjFloat(prepared[idx])
        output = self._output_function(slot, block_variable.checkpoint)
        slot.write(output, prepared[idx])
        return output

    def _output_function(self, slot: Slot, checkpoint: object) -> fd.Function:
        """The Function that takes an output: the tape's own, if the tape has one."""
        return checkpoint if isinstance(checkpoint, fd.Function) else fd.Function(slot.space)

    def prepare_evaluate_adj(self, inputs, adj_inputs, relevant_dependencies):
        self._refuse_changed(inputs)
        self._adjoint_at = [version_of(value) for value in adj_inputs if isinstance(value, fd.Cofunction)]
        prepared = list(self._adjoint(inputs, self._read_functionals(adj_inputs)))
        self._derived = self._solved
        return prepared

    def evaluate_adj_component(self, inputs, adj_inputs, block_variable, idx, prepared=None):
        # It is taken out of the list, so that the functionals in many controls do not stand in memory twice.
        functional, prepared[idx] = prepared[idx], None
        slot, known = self.operator.inputs[idx], block_variable.adj_value
        if isinstance(slot, NodalValues) and is_leaf(block_variable) and (known is None or _is_of(known, slot.dual_space)):
            # A Cofunction kept for each of many such controls would be one more field than those that a user gets.
            functional = made(functional)
            value = slot.new_functional(functional if known is None else functional + slot.view(known))
            block_variable.adj_value, block_variable.unshared = value, weakref.ref(value)
            return None
        return _unless_added(known, self._write_functional(self._functionals, idx, functional))

    def prepare_evaluate_tlm(self, inputs, tlm_inputs, relevant_outputs):
        tangent = self._method("tangent", "tangents")
        self._refuse_changed(inputs)
        return tangent(self._kept, self._directions(self._kept, tlm_inputs))

    def evaluate_tlm_component(self, inputs, tlm_inputs, block_variable, idx, prepared=None):
        slot, value = self._output_slots[idx], parts(self.operator, prepared)[idx]
        if slot is None:
            return AdjFloat(value)
        if idx not in self._tangents:
            self._tangents[idx] = fd.Function(slot.space)
        slot.write(self._tangents[idx], value)
        return self._tangents[idx]

    def prepare_evaluate_hessian(self, inputs, hessian_inputs, adj_inputs, relevant_dependencies):
        second_adjoint = self._method("second_adjoint", "Hessians")
        self._refuse_changed(inputs)
        functional_dot = self._read_functionals(hessian_inputs)
        if self.gauss_newton and self._output_slots[0] is not None:
            self._adjoint_at = []  # what the operator keeps is then not from the adjoint of the functional
            return self._adjoint(inputs, functional_dot)
        # A Hessian sweep reads the adjoint values that an earlier derivative left on the tape.
        if all(value is None for value in adj_inputs) or self._derived != self._solved:
            raise RuntimeError(f"{type(self.operator).__name__}: {DERIVATIVE_FIRST}")
        if self.gauss_newton:
            second_adjoint = getattr(self.operator, "gauss_newton", second_adjoint)
        directions = self._directions(self._kept, [dependency.tlm_value for dependency in self.get_dependencies()])
        return second_adjoint(self._kept, directions, self._read_functionals(adj_inputs), functional_dot)

    def evaluate_hessian_component(
        self, inputs, hessian_inputs, adj_inputs, block_variable, idx, relevant_dependencies, prepared=None
    ):
        return _unless_added(
            block_variable.hessian_value, self._write_functional(self._second_functionals, idx, prepared[idx])
        )

    def _method(self, name: str, what: str) -> Callable:
        """A method of the operator for second derivatives, which not all operators have."""
        method = getattr(self.operator, name, None)
        if method is None:
            raise NotImplementedError(f"{type(self.operator).__name__}: {what} are not implemented, only first adjoints")
        return method

    def _refuse_changed(self, inputs: Sequence[fd.Function]) -> None:
        if self._has_changed(inputs):
            raise RuntimeError(
                f"{type(self.operator).__name__}: an input has changed since the tape was evaluated; evaluate the "
                f"functional before its derivative"
            )

    def _adjoint(self, inputs: Sequence[fd.Function], functional: Any) -> Sequence[np.ndarray | Callable[[], np.ndarray]]:
        if not self.operator.ready:
            self.solve(inputs)
        return self.operator.adjoint(self._kept, functional)

    def _read_functionals(self, values: Sequence[fd.Cofunction | float | None]) -> Any:
        """Adjoint values of the outputs as functionals for the operator, 0 for an output on which nothing depends."""
        arrays: list[np.ndarray | float] = []
        for variable, slot, value in zip(self.get_outputs(), self._output_slots, values):
            if slot is None:
                arrays.append(0.0 if value is None else float(value))
            else:
                arrays.append(np.zeros_like(slot.read(variable.saved_output)) if value is None else slot.read(value))
        return arrays if isinstance(self.operator.output, tuple) else arrays[0]

    def _write_functional(
        self, cofunctions: list[fd.Cofunction | None], idx: int, array: np.ndarray | Callable[[], np.ndarray]
    ) -> fd.Cofunction:
        """A functional in an input, as the Cofunction that the list keeps for this input."""
        slot = self.operator.inputs[idx]
        if cofunctions[idx] is None:
            cofunctions[idx] = fd.Cofunction(slot.space.dual())
        slot.write(cofunctions[idx], made(array))
        return cofunctions[idx]

    def _directions(self, arrays: Sequence[np.ndarray], tangents: Sequence[fd.Function | None]) -> list[np.ndarray]:
        return [
            np.zeros_like(array) if tangent is None else slot.read(tangent)
            for slot, array, tangent in zip(self.operator.inputs, arrays, tangents)
        ]


def read(operator: Operator, functions: Sequence[fd.Function], views: bool = False) -> list[np.ndarray]:
    """The arrays that an operator's inputs hold. Collective.

    With `views`, an array is good only as long as its Function does not change.
    """
    return read_all(operator.inputs, functions, views)  # type: ignore[arg-type]  # it takes any slot


def version_of(function: fd.Function | fd.Cofunction) -> Version:
    """A mark that is equal for the same Function, unchanged. It does not keep the Function alive."""
    return weakref.ref(function), function.dat.dat_version


def _unless_added(total: fd.Cofunction | None, part: fd.Cofunction) -> fd.Cofunction | None:
    """Add a part to the total that the tape has, and return None; or return the part, if the tape must add it itself.

    The tape adds by `+=`, for which PyOP2 makes a loop each time. That would cost more than all other work for a control.
    """
    if not _is_of(total, part.function_space()):
        return part
    total.dat.data[...] += part.dat.data_ro
    return None


def _is_of(value: object, space: fd.functionspaceimpl.FiredrakeDualSpace) -> bool:
    """Whether a value is a Cofunction of a space."""
    return isinstance(value, fd.Cofunction) and value.function_space() == space
