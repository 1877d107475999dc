"""pyadjoint's Control, with one new Function an evaluation in place of five.

With few nodes, making Functions is what an evaluation costs most. A new value is written into the Function that the tape has,
where nobody else holds that, and derivatives are handed out in the Cofunctions in which a Block made them.
"""

from __future__ import annotations

import sys

import firedrake as fd
import numpy as np
from mpi4py import MPI
from pyadjoint import Control
from pyadjoint.block_variable import BlockVariable

from fem_resnet.parameters.slots import new_cofunction

__all__ = ["CoefficientControl"]


def _with_checkpoint(checkpoint: object) -> BlockVariable:
    variable = BlockVariable(None)
    variable.checkpoint = checkpoint
    return variable


def _references(variable: BlockVariable) -> int:
    return sys.getrefcount(variable.checkpoint)


#: Their number where the tape alone has a checkpoint; it differs between versions of Python.
_OWN_REFERENCES = _references(_with_checkpoint(object()))


class CoefficientControl(Control):
    """A Control of pyadjoint's, for the Function that holds coefficients."""

    def update(self, value):
        if self._may_overwrite(value):
            self.block_variable.checkpoint.dat.data_wo[...] = value.dat.data_ro
        else:
            super().update(value)

    def _may_overwrite(self, value: object) -> bool:
        """Whether the tape has a Function for such values that no Block made and that nobody else holds. Collective."""
        variable = self.block_variable
        if not (
            variable.creation_timestep == -1
            and isinstance(variable.checkpoint, fd.Function)
            and isinstance(value, fd.Function)
            and value.function_space() is variable.checkpoint.function_space()
        ):
            return False
        # All ranks make a new Function, or none does: objects that wait for the garbage collector may hold it on some ranks.
        alone = _references(variable) == _OWN_REFERENCES
        return value.function_space().mesh().comm.allreduce(alone, op=MPI.LAND)

    def get_derivative(self, apply_riesz=False):
        functional = self.block_variable.adj_value
        if apply_riesz or not isinstance(functional, fd.Cofunction):
            return super().get_derivative(apply_riesz)
        unshared = getattr(self.block_variable, "unshared", None)
        if unshared is not None and unshared() is functional:  # a Block made it for this, and nothing else reads it
            self.block_variable.unshared = None
            return functional
        values, owned = np.zeros(functional.dat.shape), functional.dat.data_ro
        values[: len(owned)] = owned
        return new_cofunction(functional.function_space(), values)
