"""Slots: how Functions hold the arrays that Blocks on the tape work with.

A Block (`tape.operator_block`) takes Functions and gives Functions; its operator works with arrays. A slot stands between
the two, one for each input and output. Batches are held as node values (`BatchValues`), or as a basis sees them (`SeenBatch`);
a few numbers that all ranks share are held by one cell of a mesh of its own (`Replicated`). Coefficients of parameters are slots
too, with an inner product: see `space_basis`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import firedrake as fd
import numpy as np
from mpi4py import MPI

from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace

__all__ = ["BatchValues", "Replicated", "SeenBatch", "Slot", "new_cofunction", "read_all"]


class Slot(ABC):
    """How a Function (or Cofunction) of a space holds an array.

    Attributes
    ----------
    Y : LabelSpace
        The label domain, whose communicator is the one of all that is collective here.
    space : FunctionSpace
        The space of the Functions.
    shape : tuple of int
        Shape of the array on this rank.
    """

    Y: LabelSpace
    space: fd.functionspaceimpl.WithGeometry
    shape: tuple[int, ...]

    @abstractmethod
    def read(self, function: fd.Function | fd.Cofunction) -> np.ndarray:
        """The array that a Function holds. Collective."""

    def view(self, function: fd.Function | fd.Cofunction) -> np.ndarray:
        """The same array, good for as long as the Function does not change: node values are not copied. Collective."""
        return self.read(function)

    @abstractmethod
    def write(self, function: fd.Function | fd.Cofunction, array: np.ndarray) -> None:
        """Make a Function hold an array."""


class BatchValues(Slot):
    """Batches by their values at the owned nodes, shape (nodes, samples); what is read is a read-only view.

    Parameters
    ----------
    Y
        The label domain.
    space
        `Y.V`, for one sample, or `Y.batch_space(samples)`.
    """

    def __init__(self, Y: LabelSpace, space: fd.functionspaceimpl.WithGeometry):
        self.Y = Y
        self.space = space
        self.shape = (Y.nodes, space.value_size)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.space.value_size

    def read(self, function):
        return self.Y.values(function)

    def view(self, function):
        return self.Y.values(function)

    def write(self, function, array):
        values = function.dat.data_wo
        values[...] = array.reshape(values.shape)


class SeenBatch(Slot):
    """A batch f as a basis P sees it: g = P^T M f, all that some operators take of their input.

    The numbers g of a Function are kept until it changes, by PyOP2's count of accesses to its data that may write.

    Parameters
    ----------
    basis
        P.
    space
        The batch's space: `Y.V`, or `Y.batch_space(samples)`.
    """

    def __init__(self, basis: Basis, space: fd.functionspaceimpl.WithGeometry):
        self._basis = basis
        self._values = BatchValues(basis.Y, space)
        self.Y = basis.Y
        self.space = space
        self.shape = (basis.rank, self._values.samples)
        self._kept: WeakKeyDictionary[fd.Function, tuple[int, np.ndarray]] = WeakKeyDictionary()

    def read(self, function):
        """g, shape (rank, samples), the same on every rank. Collective."""
        version, (kept, g) = function.dat.dat_version, self._kept.get(function, (None, None))
        # One rank alone may have looked at the data.
        if not self._basis.Y.comm.allreduce(kept == version, op=MPI.LAND):
            g = self._basis.project(self._values.read(function))
            g.flags.writeable = False
            self._kept[function] = version, g
        return g

    def write(self, function, gamma):
        """Make a Cofunction hold a functional of f, `M P gamma`, for the functional gamma of g."""
        self._values.write(function, self._basis.functional(gamma))


class Replicated(Slot):
    """A few numbers, the same on every rank: one cell of a mesh of its own holds them, and its owner broadcasts.

    Parameters
    ----------
    Y
        The label domain.
    shape
        Shape of the array of numbers.
    """

    def __init__(self, Y: LabelSpace, shape: tuple[int, ...]):
        mesh, self._owner = Y.coefficient_mesh
        self.Y = Y
        self.shape = shape
        self.space = fd.TensorFunctionSpace(mesh, "DG", 0, shape=shape)

    def read(self, function):
        return read_all([self], [function])[0]

    def read_owned(self, function: fd.Function | fd.Cofunction) -> np.ndarray:
        """A copy of what this rank has, of the slot's shape: the numbers on the owner, arbitrary ones on other ranks."""
        if self.Y.comm.rank != self._owner:
            return np.empty(self.shape)
        return function.dat.data_ro.reshape(self.shape).copy()

    def write(self, function, array):
        values = function.dat.data_wo
        if self.Y.comm.rank == self._owner:
            values[...] = np.reshape(array, values.shape)


def read_all(slots: Sequence[Slot], functions: Sequence[fd.Function], views: bool = False) -> list[np.ndarray]:
    """What each slot reads of its Function, with one broadcast for all that is the same on every rank. Collective.

    Parameters
    ----------
    slots, functions
        As many slots as Functions.
    views
        Whether arrays need be good only for as long as the Functions do not change.
    """
    arrays: list[np.ndarray] = []
    replicated: dict[LabelSpace, list[np.ndarray]] = {}
    for slot, function in zip(slots, functions):
        if isinstance(slot, Replicated):
            arrays.append(slot.read_owned(function))
            if slot.Y.comm.size > 1:
                replicated.setdefault(slot.Y, []).append(arrays[-1])
        else:
            arrays.append((slot.view if views else slot.read)(function))
    for Y, parts in replicated.items():
        together = np.concatenate([part.ravel() for part in parts])
        Y.comm.Bcast(together, root=Y.coefficient_mesh[1])
        start = 0
        for part in parts:
            part[...] = together[start : start + part.size].reshape(part.shape)
            start += part.size
    return arrays


def new_cofunction(space: fd.functionspaceimpl.FiredrakeDualSpace, values: np.ndarray) -> fd.Cofunction:
    """A new Cofunction in this very array of values, which has room for the values of the halo. Collective."""
    # Writing into a Cofunction would have PyOP2 make a Vec for it: at half its cost, and on several ranks freed late.
    cofunction = fd.Cofunction(space, val=values)
    cofunction.dat.halo_valid = False
    return cofunction
