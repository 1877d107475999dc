"""How operators come onto the tape: `apply` evaluates one and records it as a Block; `gauss_newton` changes its Hessian."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import firedrake as fd
import numpy as np
from mpi4py import MPI
from pyadjoint import AdjFloat, Tape
from pyadjoint.block_variable import BlockVariable
from pyadjoint.tape import annotate_tape, get_working_tape, stop_annotating

from fem_resnet.ranks import watched
from fem_resnet.tape.checkpoints import manager_of
from fem_resnet.tape.operator import Operator, parts
from fem_resnet.tape.operator_block import OperatorBlock, read
from fem_resnet.tape.scheduled_block import ScheduledBlock

__all__ = ["apply", "gauss_newton"]


def apply(
    operator: Operator, functions: Sequence[fd.Function | BlockVariable], into: fd.Function | None = None
) -> tuple[fd.Function | AdjFloat | list[fd.Function | AdjFloat], OperatorBlock | None]:
    """Apply an operator to Functions, and record it if the tape is annotating. Collective.

    Parameters
    ----------
    operator
        The operator; if it is recorded, it belongs to the Block from now on.
    functions
        The inputs: Functions; or the tape's variables for them, of which the values on the tape count, whatever the Functions
        hold by now.
    into
        The Function that takes the (first) output, which may be an input that is not needed any more; a new one if left out.

    Returns
    -------
    output : Function or AdjFloat or list
        The output; a list if there are several.
    block : OperatorBlock or None
        The Block; None if nothing was recorded.
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
        value = block.solve(functions) if with_tape else operator.forward(read(operator, functions), save=False)
        outputs = []
        for slot, part in zip(parts(operator, operator.output), parts(operator, value)):
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


def _renew_if_changed(function: fd.Function) -> None:
    """Give an input a new variable if it was assigned to while annotation was off, so that the tape takes its values."""
    variable = function.block_variable
    if variable.creation_timestep == -1 and isinstance(variable.checkpoint, fd.Function):
        same = np.array_equal(variable.checkpoint.dat.data_ro, function.dat.data_ro)
        if not watched(function.function_space().mesh().comm).allreduce(same, op=MPI.LAND):
            function.clear_block_variable()


@contextmanager
def gauss_newton(tape: Tape) -> Iterator[None]:
    """Replace Hessian actions on a tape by Gauss-Newton actions. Values and first derivatives do not change.

    An action leaves out the curvature of all operators between arrays. An operator whose output is a number, a convex function
    l of an inner map, leaves out the curvature of the inner map too, if it has the method `gauss_newton`. What remains is
    F'^T l'' F', which is symmetric, and positive semidefinite for convex l. An action uses tangents and first adjoints alone.

    Parameters
    ----------
    tape
        The tape on which the functional is recorded.

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
