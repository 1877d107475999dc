"""The Block of an operator on a tape under a schedule of checkpoints (`checkpoints`).

The schedule clears interfaces between Blocks and computes them again. So the Functions at which an operator was solved are not
the Functions that its adjoint is given, or they are gone by then. If an adjoint follows at once, the Block keeps the arrays
itself. After the adjoint it drops them, and what the operator has kept. A change without an evaluation shows at the leaves,
which no schedule touches.
"""

from __future__ import annotations

from collections.abc import Sequence

import firedrake as fd
import numpy as np
from pyadjoint import Tape

from fem_resnet.tape.checkpoints import Manager, add_leaf, is_leaf
from fem_resnet.tape.operator import Operator, made
from fem_resnet.tape.operator_block import OperatorBlock, Version, read, version_of

__all__ = ["ScheduledBlock"]


class ScheduledBlock(OperatorBlock):
    """An operator on a tape under a schedule of checkpoints.

    Parameters
    ----------
    operator, functions
        As for `OperatorBlock`.
    tape
        The tape, whose manager is a `checkpoints.Manager`.
    """

    def __init__(self, operator: Operator, functions: Sequence[fd.Function], tape: Tape):
        self._tape = tape
        super().__init__(operator, functions)
        #: The arrays of the latest solve, until its adjoint is done; and the leaves among its inputs.
        self._kept: list[np.ndarray] | None = None
        self._solved: list[Version] | None = None

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
        value = self._forward(read(self.operator, inputs), self._manager.adjoint_follows)
        self._solved = self._leaf_versions(inputs)
        return value

    def _forward(self, arrays: list[np.ndarray], save: bool) -> np.ndarray | float:
        value = self.operator.forward(arrays, save=save)
        if save:
            # During a recording, one Function holds the state at all interfaces, one after the other.
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
            return list(self._adjoint(inputs, self._read_functionals(adj_inputs)))
        finally:
            self._release()

    def _adjoint(self, inputs, functional):
        if self._kept is None:
            cleared = [variable for variable in self.get_dependencies() if variable.checkpoint is None]
            if cleared:
                raise RuntimeError(
                    f"{type(self.operator).__name__}: the schedule has cleared its inputs; evaluate the functional "
                    f"before each derivative"
                )
            self._kept = read(self.operator, inputs)
            self.operator.forward(self._kept, save=True)
        elif not self.operator.ready:
            self.operator.forward(self._kept, save=True)
        return self.operator.adjoint(self._kept, functional)

    def _write_functional(self, cofunctions, idx, array):
        # A Cofunction kept for each input would be one more field at every interface.
        slot = self.operator.inputs[idx]
        cofunction = fd.Cofunction(slot.space.dual())
        slot.write(cofunction, made(array))
        return cofunction

    def _output_function(self, slot, checkpoint):
        return fd.Function(slot.space)  # the tape's own Function may be a checkpoint by now

    def _leaf_versions(self, inputs: Sequence[fd.Function]) -> list[Version]:
        leaves = map(is_leaf, self.get_dependencies())
        return [version_of(function) for function, leaf in zip(inputs, leaves) if leaf]

    def _has_changed(self, inputs):
        return self._solved != self._leaf_versions(inputs)

    def _method(self, name, what):
        raise NotImplementedError(
            f"{what} are not implemented under a schedule of checkpoints, only first derivatives: record without "
            "checkpoints. With all layers in one Block (per_block of Layers left out) no field is kept inside of a network"
        )
