"""The pyadjoint Block of the package: an operator on arrays, as a step on the tape.

Segments of layers, heads, losses and regularisers are operators with the four verbs of `Operator`; the Block reads
Functions into arrays for them and writes their results into Functions. It creates none again and again: outputs go
into the checkpoints that the tape has, tangents into Functions and adjoint values into Cofunctions made once (pyadjoint
copies what it hands to a user); functionals of nodal controls into new ones, which `Parameter.controls` hand out as they are.

Hessian actions are forward over reverse: one sweep of tangents up the tape, one of second adjoints down. Inside of
`gauss_newton(tape)` the latter leaves out the curvature of all operators between arrays, so that with J = l(F(m)) the
action is F'^T l'' F' in place of F'^T l'' F' + l' F''.

On a tape under a schedule of checkpoints (`checkpoints`) a `ScheduledBlock` takes the place of the Block: it keeps what
its adjoint wants from the computation that the schedule makes for it, and nothing afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import firedrake as fd
import numpy as np
from mpi4py import MPI
from pyadjoint import AdjFloat, Block, Tape
from pyadjoint.block_variable import BlockVariable
from pyadjoint.tape import annotate_tape, get_working_tape, stop_annotating

from fem_resnet.parameters.space_basis import NodalValues, Slot, read_all
from fem_resnet.tape.checkpoints import Manager, add_leaf, is_leaf, manager_of

__all__ = ["Operator", "OperatorBlock", "ScheduledBlock", "apply", "gauss_newton", "made"]


#: What to do where a Hessian has nothing to go on from.
DERIVATIVE_FIRST = (
    "the Hessian wants the derivative at the same point first; call derivative() after each evaluation of the functional "
    "and before hessian()"
)


class Operator(Protocol):
    """A differentiable map F between arrays, or from arrays to a number.

    A read-only array that is the very one of the latest `forward` has not changed.

    Laws, with m the arrays, v directions (one array an input, zeros where there is none), <., .> the sum over inputs:

        tangent(m, v) = d/de F(m + e v),                                        e = 0
        <adjoint(m, dual), v> = <dual, tangent(m, v)>
        second_adjoint(m, v, dual, dual_dot) = d/de adjoint(m + e v, dual + e dual_dot),    e = 0

    so that the last is F'(m)^T dual_dot + (F''(m) v)^T dual. Operators without the two later verbs have first adjoints
    alone; the Block says so where more is asked for.
    """

    #: One slot an input.
    inputs: Sequence[Slot]
    #: The slot of the output, or None where the output is a number; a tuple of these where there are several outputs. Then
    #: values, their tangents and dual values are sequences of as many.
    output: Slot | None | tuple[Slot | None, ...]
    #: Whether `adjoint` may be called without a `forward(save=True)` at the same arrays just before it.
    ready: bool

    def forward(self, arrays: Sequence[np.ndarray], save: bool) -> np.ndarray | float:
        """The value; `save` says that an adjoint may follow."""

    def adjoint(self, arrays: Sequence[np.ndarray], dual: np.ndarray | float) -> Sequence[np.ndarray]:
        """Functionals of the inputs, one an input, in arrays of its own.

        Or, for an input of which the tape may not want it, a function without arguments that makes it; it is called before
        the next adjoint or not at all. The same in `second_adjoint`.
        """

    def tangent(self, arrays: Sequence[np.ndarray], directions: Sequence[np.ndarray]) -> np.ndarray | float:
        """Derivative of `forward` in these directions, in an array of its own.

        The arrays are those of the latest `forward`. What that has kept for an adjoint must survive, or `ready` turn
        False; what `adjoint` has kept must survive.
        """

    def second_adjoint(
        self,
        arrays: Sequence[np.ndarray],
        directions: Sequence[np.ndarray],
        dual: np.ndarray | float,
        dual_dot: np.ndarray | float,
    ) -> Sequence[np.ndarray]:
        """Derivative of `adjoint` along `directions` and `dual_dot`, one functional an input, in arrays of its own.

        A `tangent` in these directions went before, but others may have come in between: whoever uses what a tangent
        kept must look whether it is of these directions, and make it again if not. Of what `forward` and `adjoint` keep
        the same holds as in `tangent`.
        """


class OperatorBlock(Block):
    """An operator on the tape.

    Parameters
    ----------
    operator
        The operator; it belongs to this Block alone.
    functions
        Its inputs: Functions, or what a tape has of them.
    """

    def __init__(self, operator: Operator, functions: Sequence[fd.Function | BlockVariable]):
        super().__init__()
        self.operator = operator
        self._add_dependencies(functions)
        self._output_slots = _parts(operator, operator.output)
        self._duals: list[fd.Cofunction | None] = [None] * len(functions)
        self._second_duals: list[fd.Cofunction | None] = [None] * len(functions)
        self._tangents: dict[int, fd.Function] = {}  # by the number of the output
        self._solved: list[tuple[weakref.ref, int]] | None = None
        #: The arrays of the latest solve.
        self._kept: list[np.ndarray] | None = None
        self._adjoint_at: list[tuple[weakref.ref, int]] = []
        self._derived: list[tuple[weakref.ref, int]] | None = None
        #: Whether Hessian actions are those of `gauss_newton`.
        self.gauss_newton = False

    def _add_dependencies(self, functions: Sequence[fd.Function | BlockVariable]) -> None:
        for function in functions:
            if isinstance(function, BlockVariable):
                function.will_add_as_dependency()
                self._dependencies.append(function)
            else:
                self.add_dependency(function)

    def add_last_output(self, value: fd.Function) -> None:
        """Put the output that the operator has been given last on the tape, where the Block stands."""
        self._output_slots = _parts(self.operator, self.operator.output)
        self.add_output(value.create_block_variable())

    def solve(self, inputs: Sequence[fd.Function]) -> np.ndarray | float:
        """The operator's value at these inputs, ready for its adjoint."""
        before, self._solved = self._solved or [None] * len(inputs), None
        versions = [_version(function) for function in inputs]
        arrays = read_all(self.operator.inputs, inputs, views=True)  # of changed inputs they are not used again
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
        """Whether the adjoint values that the latest adjoint was given are still what they were."""
        duals = [reference() for reference, _ in self._adjoint_at]
        return bool(duals) and all(dual is not None for dual in duals) and self._adjoint_at == list(map(_version, duals))

    def _has_changed(self, inputs: Sequence[fd.Function]) -> bool:
        """Whether these are not those of the latest solve. Collective: one rank alone may have looked at the data."""
        changed = self._solved != [_version(function) for function in inputs]
        comm = inputs[0].function_space().mesh().comm if inputs else MPI.COMM_SELF
        return comm.allreduce(changed, op=MPI.LOR) if comm.size > 1 else changed

    def refuse_changed(self, what: str) -> None:
        """Raise RuntimeError where the tape has other inputs by now than at the latest solve; `what` was asked for. Collective."""
        if self._has_changed([variable.saved_output for variable in self.get_dependencies()]):
            raise RuntimeError(f"{what}: an input has changed since the tape was evaluated; evaluate the functional first")

    def prepare_recompute_component(self, inputs, relevant_outputs):
        return _parts(self.operator, self.solve(inputs))

    def recompute_component(self, inputs, block_variable, idx, prepared):
        slot = self._output_slots[idx]
        if slot is None:
            return AdjFloat(prepared[idx])
        output = self._output_function(slot, block_variable.checkpoint)
        slot.write(output, prepared[idx])
        return output

    def _output_function(self, slot: Slot, checkpoint: object) -> fd.Function:
        """What takes an output: what the tape has of it, if it has a Function."""
        return checkpoint if isinstance(checkpoint, fd.Function) else fd.Function(slot.space)

    def prepare_evaluate_adj(self, inputs, adj_inputs, relevant_dependencies):
        self._refuse_changed(inputs)
        self._adjoint_at = [_version(dual) for dual in adj_inputs if isinstance(dual, fd.Cofunction)]
        prepared = list(self._adjoint(inputs, self._read_duals(adj_inputs)))
        self._derived = self._solved
        return prepared

    def evaluate_adj_component(self, inputs, adj_inputs, block_variable, idx, prepared=None):
        # Taken out, so that the functionals of many controls do not stand in memory twice.
        functional, prepared[idx] = prepared[idx], None
        slot, known = self.operator.inputs[idx], block_variable.adj_value
        if isinstance(slot, NodalValues) and is_leaf(block_variable) and (known is None or _is_of(known, slot.dual_space)):
            # A Cofunction kept for each of many such controls would be a field more than those that a user gets.
            functional = made(functional)
            dual = slot.new_functional(functional if known is None else functional + slot.view(known))
            block_variable.adj_value, block_variable.unshared = dual, weakref.ref(dual)
            return None
        return _unless_added(known, self._write_dual(self._duals, idx, functional))

    def prepare_evaluate_tlm(self, inputs, tlm_inputs, relevant_outputs):
        tangent = self._verb("tangent", "tangents")
        self._refuse_changed(inputs)
        return tangent(self._kept, self._directions(self._kept, tlm_inputs))

    def evaluate_tlm_component(self, inputs, tlm_inputs, block_variable, idx, prepared=None):
        slot, value = self._output_slots[idx], _parts(self.operator, prepared)[idx]
        if slot is None:
            return AdjFloat(value)
        if idx not in self._tangents:
            self._tangents[idx] = fd.Function(slot.space)
        slot.write(self._tangents[idx], value)
        return self._tangents[idx]

    def prepare_evaluate_hessian(self, inputs, hessian_inputs, adj_inputs, relevant_dependencies):
        second_adjoint = self._verb("second_adjoint", "Hessians")
        self._refuse_changed(inputs)
        dual_dot = self._read_duals(hessian_inputs)
        if self.gauss_newton and self._output_slots[0] is not None:
            self._adjoint_at = []  # what the operator keeps is then no longer the adjoint of the functional
            return self._adjoint(inputs, dual_dot)
        # A Hessian sweep reads the adjoint values that an earlier derivative left on the tape.
        if all(dual is None for dual in adj_inputs) or self._derived != self._solved:
            raise RuntimeError(f"{type(self.operator).__name__}: {DERIVATIVE_FIRST}")
        if self.gauss_newton:
            second_adjoint = getattr(self.operator, "gauss_newton", second_adjoint)
        directions = self._directions(self._kept, [dependency.tlm_value for dependency in self.get_dependencies()])
        return second_adjoint(self._kept, directions, self._read_duals(adj_inputs), dual_dot)

    def evaluate_hessian_component(
        self, inputs, hessian_inputs, adj_inputs, block_variable, idx, relevant_dependencies, prepared=None
    ):
        return _unless_added(block_variable.hessian_value, self._write_dual(self._second_duals, idx, prepared[idx]))

    def _verb(self, name: str, what: str):
        verb = getattr(self.operator, name, None)
        if verb is None:
            raise NotImplementedError(f"{type(self.operator).__name__}: {what} are not implemented, only first adjoints")
        return verb

    def _refuse_changed(self, inputs: Sequence[fd.Function]) -> None:
        if self._has_changed(inputs):
            raise RuntimeError(
                f"{type(self.operator).__name__}: an input has changed since the tape was evaluated; evaluate the "
                f"functional before its derivative"
            )

    def _adjoint(self, inputs: Sequence[fd.Function], dual: np.ndarray | float) -> Sequence[np.ndarray]:
        if not self.operator.ready:
            self.solve(inputs)
        return self.operator.adjoint(self._kept, dual)

    def _read_duals(self, duals: Sequence[fd.Cofunction | float | None]):
        """Dual values of the outputs as the operator wants them, 0 for an output on which nothing depends."""
        arrays = []
        for variable, slot, dual in zip(self.get_outputs(), self._output_slots, duals):
            if slot is None:
                arrays.append(0.0 if dual is None else float(dual))
            else:
                arrays.append(np.zeros_like(slot.read(variable.saved_output)) if dual is None else slot.read(dual))
        return arrays if isinstance(self.operator.output, tuple) else arrays[0]

    def _write_dual(self, cofunctions: list[fd.Cofunction | None], idx: int, array: np.ndarray) -> fd.Cofunction:
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


class ScheduledBlock(OperatorBlock):
    """An operator on a tape under a schedule of checkpoints.

    The schedule clears interfaces and computes them again, so that the Functions at which the operator was solved are
    not those that the adjoint is given, or are gone by then: the Block keeps the arrays itself where an adjoint follows
    at once, and drops them, and what the operator keeps, after it. What has changed without an evaluation is seen at
    the leaves, which no schedule touches.

    Parameters
    ----------
    operator, functions
        As for `OperatorBlock`.
    tape
        The tape, whose manager is a `checkpoints.Manager`.
    """

    def __init__(self, operator: Operator, functions: Sequence[fd.Function], tape: Tape):
        self._tape = tape
        super().__init__(operator, functions)  # `_kept` is that of the latest solve while its adjoint is to come

    @property
    def _manager(self) -> Manager:
        return self._tape._checkpoint_manager

    def _add_dependencies(self, functions):
        for function in functions:
            if is_leaf(function.block_variable):
                add_leaf(self, function, self._tape)
            else:
                self.add_dependency(function)

    def solve(self, inputs):
        if self._manager.going_back:
            self._refuse_changed(inputs)
        else:
            self._solved = None
        value = self._forward(_read(self.operator, inputs), self._manager.adjoint_follows)
        self._solved = self._leaf_versions(inputs)
        return value

    def _forward(self, arrays: list[np.ndarray], save: bool) -> np.ndarray | float:
        value = self.operator.forward(arrays, save=save)
        if save:
            # While it is being recorded, one Function is the state at all interfaces.
            self._kept = [array.copy() for array in arrays] if self._manager.recording else arrays
        else:
            self._release()
        return value

    def _release(self) -> None:
        self._kept = None
        if hasattr(self.operator, "release"):
            self.operator.release()

    def prepare_evaluate_adj(self, inputs, adj_inputs, relevant_dependencies):
        self._refuse_changed(inputs)
        try:
            return list(self._adjoint(inputs, self._read_duals(adj_inputs)))
        finally:
            self._release()

    def _adjoint(self, inputs, dual):
        if self._kept is None:
            cleared = [variable for variable in self.get_dependencies() if variable.checkpoint is None]
            if cleared:
                raise RuntimeError(
                    f"{type(self.operator).__name__}: the schedule has cleared its inputs; evaluate the functional "
                    f"before each derivative"
                )
            self._kept = _read(self.operator, inputs)
            self.operator.forward(self._kept, save=True)
        elif not self.operator.ready:
            self.operator.forward(self._kept, save=True)
        return self.operator.adjoint(self._kept, dual)

    def _write_dual(self, cofunctions, idx, array):
        # One a dependency, kept, would be a field at every interface.
        slot = self.operator.inputs[idx]
        cofunction = fd.Cofunction(slot.space.dual())
        slot.write(cofunction, made(array))
        return cofunction

    def _output_function(self, slot, checkpoint):
        return fd.Function(slot.space)  # the one that the tape has may be a checkpoint by now

    def _leaf_versions(self, inputs: Sequence[fd.Function]) -> list[tuple[weakref.ref, int]]:
        leaves = map(is_leaf, self.get_dependencies())
        return [_version(function) for function, leaf in zip(inputs, leaves) if leaf]

    def _refuse_changed(self, inputs):
        if self._solved != self._leaf_versions(inputs):
            raise RuntimeError(
                f"{type(self.operator).__name__}: an input has changed since the tape was evaluated; evaluate the "
                f"functional before its derivative"
            )

    def _verb(self, name, what):
        raise NotImplementedError(
            f"{what} are not implemented under a schedule of checkpoints, only first derivatives: record without "
            "checkpoints. With all layers in one Block (layers_per_block left out) no field is kept inside of a network"
        )


@contextmanager
def gauss_newton(tape: Tape) -> Iterator[None]:
    """Hessian actions on this tape become those of Gauss and Newton; values and derivatives stay what they are.

    The curvature of operators between arrays is left out, and of a number's that which it has in front of a convex
    function (`Operator.gauss_newton`, where there is one): what is left is F'^T l'' F', symmetric, and positive
    semidefinite for convex l. It takes tangents and first adjoints alone.

    Parameters
    ----------
    tape
        Where the functional is recorded.

    Examples
    --------
    >>> with gauss_newton(J.tape):  # doctest: +SKIP
    ...     action = J.hessian(direction)
    """
    blocks = [block for block in tape.get_blocks() if isinstance(block, OperatorBlock)]
    for block in blocks:
        block.gauss_newton = True
    try:
        yield
    finally:
        for block in blocks:
            block.gauss_newton = False


def _renew_if_changed(function: fd.Function) -> None:
    """See that the tape takes the present values of an input that was assigned to while annotation was off."""
    variable = function.block_variable
    if variable.creation_timestep == -1 and isinstance(variable.checkpoint, fd.Function):
        same = np.array_equal(variable.checkpoint.dat.data_ro, function.dat.data_ro)
        if not function.function_space().mesh().comm.allreduce(same, op=MPI.LAND):
            function.clear_block_variable()


def _unless_added(total: fd.Cofunction | None, part: fd.Cofunction) -> fd.Cofunction | None:
    """What the tape is to take of a part: none of it where it could be added to what the tape has.

    It would add by `+=`, for which PyOP2 makes a loop each time: more than all else that a control costs.
    """
    if not _is_of(total, part.function_space()):
        return part
    total.dat.data[...] += part.dat.data_ro
    return None


def _is_of(value: object, space: fd.functionspaceimpl.FiredrakeDualSpace) -> bool:
    return isinstance(value, fd.Cofunction) and value.function_space() == space


def made(functional: np.ndarray | Callable[[], np.ndarray]) -> np.ndarray:
    """A functional that `Operator.adjoint` gave."""
    return functional() if callable(functional) else functional


def _version(function: fd.Function | fd.Cofunction) -> tuple[weakref.ref, int]:
    """Equal for the same Function, unchanged; does not keep it alive."""
    return weakref.ref(function), function.dat.dat_version


def _read(operator: Operator, functions: Sequence[fd.Function]) -> list[np.ndarray]:
    return read_all(operator.inputs, functions)


def _parts(operator: Operator, value: object) -> Sequence:
    """Values of the outputs, one by one."""
    return value if isinstance(operator.output, tuple) else (value,)


def apply(
    operator: Operator, functions: Sequence[fd.Function | BlockVariable], into: fd.Function | None = None
) -> tuple[fd.Function | AdjFloat | list[fd.Function | AdjFloat], OperatorBlock | None]:
    """The operator's output at these Functions, recorded if the tape is annotating.

    Parameters
    ----------
    operator
        The operator; when recorded it is the Block's from now on.
    functions
        Its inputs: Functions; or what a tape has of them, and then what it has is taken, whatever they hold by now.
    into
        The Function that takes the (first) output, which may be an input that is wanted no more; a new one if left out.

    Returns
    -------
    output
        A Function, or an AdjFloat; a list of these where there are several.
    block
        The Block, or None where nothing was recorded.
    """
    block = None
    with_tape = annotate_tape()
    if with_tape:
        for function in functions:
            if not isinstance(function, BlockVariable):
                _renew_if_changed(function)
        tape = get_working_tape()
        scheduled = manager_of(tape) is not None
        block = ScheduledBlock(operator, functions, tape) if scheduled else OperatorBlock(operator, functions)
        functions = block.get_dependencies()
    functions = [f.saved_output if isinstance(f, BlockVariable) else f for f in functions]
    with stop_annotating():
        value = block.solve(functions) if with_tape else operator.forward(_read(operator, functions), save=False)
        outputs = []
        for slot, part in zip(_parts(operator, operator.output), _parts(operator, value)):
            if slot is None:
                outputs.append(AdjFloat(part))
            else:
                outputs.append(fd.Function(slot.space) if into is None else into)
                slot.write(outputs[-1], part)
    if with_tape:
        get_working_tape().add_block(block)
        for output in outputs:
            block.add_output(output.create_block_variable())
    return outputs if isinstance(operator.output, tuple) else outputs[0], block
