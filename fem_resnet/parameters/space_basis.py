"""Slots, through which Functions hold arrays, and space bases: slots of coefficients, with an inner product.

A Block on the tape (`tape.operator_block`) takes Functions and gives Functions; its operator works with arrays. A slot stands
between the two, one for each input and output. Batches are held as node values (`BatchValues`), or as a basis sees them
(`SeenBatch`); a few numbers that all ranks share are held by one cell of a mesh of its own (`Replicated`).

A space basis is a slot of the coefficients c in space of a parameter. It knows what a layer takes, E c, and R of the inner
product `(c, d) = <R c, d>`, in the label measure M or by Gram matrices G. R takes coefficients to functionals, and its inverse
is the Riesz map.

===========================  ========================================  =======================  ==================
space basis                  coefficients c                            a layer takes E c        R
===========================  ========================================  =======================  ==================
`NodalValues`                values of the bias at the nodes           the same                 M
`BasisCoefficients`          coefficients of the bias in a basis P     node values `P c`        G
`kernel.KernelCoefficients`  the matrix beta of the kernel             the same                 G_Phi x G_Psi
`StateValues`                a batch, or the values of kernel factors  the same                 M, for each sample
`LayerTimes`                 the layer times                           the same                 1
`subspace.Within`            theta of coefficients E theta             of E theta               1
===========================  ========================================  =======================  ==================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from weakref import WeakKeyDictionary

import firedrake as fd
import numpy as np
import scipy.linalg
from mpi4py import MPI

from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace

__all__ = [
    "BasisCoefficients", "BatchValues", "LayerTimes", "NodalValues", "Replicated", "ReplicatedRows", "SeenBatch", "Slot",
    "SpaceBasis", "StateValues", "new_cofunction", "read_all",
]  # fmt: skip


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
    """Batches by their values at the owned nodes, shape (nodes, samples); `read` gives a read-only view.

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
        self.samples = Y.samples(space)
        self.shape = (Y.nodes, self.samples)

    def read(self, function):
        return self.Y.values(function)

    def view(self, function):
        return self.Y.values(function)

    def write(self, function, array):
        self.Y.write(function, array)


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
    """A few numbers, the same on every rank: one cell of a mesh of its own holds them, on rank 0, which broadcasts.

    Parameters
    ----------
    Y
        The label domain.
    shape
        Shape of the array of numbers.
    """

    def __init__(self, Y: LabelSpace, shape: tuple[int, ...]):
        self.Y = Y
        self.shape = shape

    @cached_property
    def space(self) -> fd.functionspaceimpl.WithGeometry:
        return self.Y.coefficients.space(self.shape)

    def read(self, function):
        return read_all([self], [function])[0]

    def read_owned(self, function: fd.Function | fd.Cofunction) -> np.ndarray:
        """The copy of this rank, of the slot's shape: the numbers on rank 0, arbitrary ones on other ranks."""
        if self.Y.comm.rank:
            return np.empty(self.shape)
        return function.dat.data_ro.reshape(self.shape).copy()

    def write(self, function, array):
        values = function.dat.data_wo
        if self.Y.comm.rank == 0:
            values[...] = np.reshape(array, values.shape)

    def pair(self, functional: np.ndarray, coefficients: np.ndarray) -> float:
        """`<d, c>`: the sum of all products."""
        return float(np.sum(functional * coefficients))


class ReplicatedRows(Replicated):
    """Many numbers, shape (rows, columns), the same on every rank: each row stands on a cell of its own.

    Parameters
    ----------
    Y, shape
        As for `Replicated`.
    """

    @cached_property
    def space(self):
        rows, columns = self.shape
        return self.Y.coefficients.space((columns,), cells=rows)


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
        Y.comm.Bcast(together, root=0)
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


# ---- coefficients -------------------------------------------------------------------------------------------------


class SpaceBasis(Slot):
    """A slot whose arrays are coefficients in space, with an inner product.

    Laws: `expand` is linear and `pull_back` its transpose, `<d, expand(c)> = <pull_back(d), c>`, where <., .> is the plain sum
    of products over all ranks; `riesz(functional(c)) = c`.
    """

    @property
    def amplitude(self) -> float:
        """How large coefficients are for a parameter of size one: it depends on the unit of length in Y."""
        return 1.0

    @property
    def unit(self) -> float:
        """The squared norm of coefficients of that amplitude on all of the label domain."""
        return self.Y.measure

    def whole(self, coefficients: np.ndarray) -> np.ndarray:
        """The coefficients themselves; of those in a subspace (`subspace.Within`), the ones in the whole space."""
        return coefficients

    def of_whole(self, functional: np.ndarray) -> np.ndarray:
        """The transpose of `whole`: of a functional of these coefficients that of the learned ones."""
        return functional

    def expand(self, coefficients: np.ndarray) -> np.ndarray:
        """What a layer takes, `E c`: the coefficients themselves, unless they are those of a bias in a basis."""
        return coefficients

    def pull_back(self, functional: np.ndarray) -> np.ndarray:
        """`E^T d`, of the shape of the coefficients: their functional, from a functional d of E c. Collective."""
        return functional

    @abstractmethod
    def functional(self, coefficients: np.ndarray) -> np.ndarray:
        """`R c`, of the shape of c: the functional d -> (c, d)."""

    @abstractmethod
    def riesz(self, functional: np.ndarray) -> np.ndarray:
        """`R^-1 d`, of the shape of d: the coefficients that represent a functional."""

    @abstractmethod
    def coordinates(self, coefficients: np.ndarray) -> np.ndarray:
        """`x = Q c`, of the shape of c: coordinates of size one for a parameter of size one, whatever the unit of length in Y.

        For coefficients in a basis they are orthonormal, `Q^T Q = R / unit`. For values at points they are these values, over
        the root of `unit` / |Y|. So a method that treats each coordinate by itself sees no basis but its orthonormal one, and
        acts point by point on functions given at the nodes, whatever the mesh.
        """

    @abstractmethod
    def from_coordinates(self, coordinates: np.ndarray) -> np.ndarray:
        """`Q^-1 x`, of the shape of x: the coefficients that have these coordinates."""

    @abstractmethod
    def stiffness(self, coefficients: np.ndarray) -> np.ndarray:
        """`S c`, of the shape of c, so that `<S c, c>` is the integral of the squared gradients. Collective."""

    @abstractmethod
    def pair(self, functional: np.ndarray, coefficients: np.ndarray) -> float:
        """`<d, c>`, the sum of products over all ranks. Collective."""


class NodalValues(SpaceBasis):
    """Values at the owned nodes of a label domain, shape (nodes,): R = M.

    Parameters
    ----------
    Y
        The label domain.

    Attributes
    ----------
    dual_space
        The space of Cofunctions. Kept, since asking Firedrake for it takes as long as making a Cofunction.
    """

    def __init__(self, Y: LabelSpace):
        self.Y = Y
        self.space = Y.V
        self.dual_space = Y.V.dual()
        self.shape = (Y.nodes,)

    def read(self, function):
        return self.view(function).copy()

    def view(self, function):
        return self.Y.values(function)[:, 0]

    def write(self, function, coefficients):
        self.Y.write(function, coefficients)

    def new_functional(self, functional: np.ndarray) -> fd.Cofunction:
        """A new Cofunction that holds a functional, shape (nodes,), in that very array where it has no halo. Collective."""
        values = np.ascontiguousarray(self.Y.to_data(functional))  # PETSc reads it by its address
        own, size = values.size, self.space.dof_dset.total_size * self.Y.channels
        if size > own:
            # As large as the array of the functional: malloc then reuses the memory of one for the other.
            came_in = functional if functional.base is None else functional.base
            values = np.zeros(max(size, came_in.size))[:size]
            values[:own] = np.ravel(self.Y.to_data(functional))
        return new_cofunction(self.dual_space, values)

    def functional(self, coefficients):
        return self.Y.weights * coefficients

    def riesz(self, functional):
        return functional / self.Y.weights

    def coordinates(self, coefficients):
        return coefficients.copy()

    def from_coordinates(self, coordinates):
        return coordinates.copy()

    def stiffness(self, coefficients):
        return self.Y.apply_stiffness(coefficients[:, None])[:, 0]

    def pair(self, functional, coefficients):
        return float(self.Y.sum(functional @ coefficients))


class StateValues(BatchValues, SpaceBasis):
    """Values of a batch at the owned nodes of a label domain, shape (nodes, samples): R = M for each sample.

    Parameters
    ----------
    Y
        The label domain.
    space
        The batch's space: `Y.V`, or `Y.batch_space(samples)`.
    unit
        As of `SpaceBasis`; 1 for functions of norm one.
    """

    def __init__(self, Y: LabelSpace, space: fd.functionspaceimpl.WithGeometry, unit: float | None = None):
        super().__init__(Y, space)
        self._unit = Y.measure if unit is None else unit

    @property
    def unit(self):
        return self._unit

    def read(self, function):
        return self.view(function).copy()

    def functional(self, coefficients):
        return self.Y.weights[:, None] * coefficients

    def riesz(self, functional):
        return functional / self.Y.weights[:, None]

    def coordinates(self, coefficients):
        return coefficients * np.sqrt(self.Y.measure / self.unit)

    def from_coordinates(self, coordinates):
        return coordinates / np.sqrt(self.Y.measure / self.unit)

    def stiffness(self, coefficients):
        return self.Y.apply_stiffness(coefficients)

    def pair(self, functional, coefficients):
        return float(self.Y.sum(np.einsum("is,is->", functional, coefficients)))


class BasisCoefficients(Replicated, SpaceBasis):
    """Coefficients alpha of a bias `a = P alpha` in a basis P, shape (rank,): R = G.

    Parameters
    ----------
    basis
        P.
    """

    def __init__(self, basis: Basis):
        super().__init__(basis.Y, (basis.rank,))
        self.basis = basis
        self._factor = scipy.linalg.cho_factor(basis.gram)

    def expand(self, coefficients):
        return self.basis.expand(coefficients)

    def pull_back(self, functional):
        return self.basis.pull_back(functional)

    def functional(self, coefficients):
        return self.basis.gram @ coefficients

    def riesz(self, functional):
        return scipy.linalg.cho_solve(self._factor, functional)

    def coordinates(self, coefficients):
        return self.basis.root @ coefficients / np.sqrt(self.unit)

    def from_coordinates(self, coordinates):
        return scipy.linalg.solve_triangular(self.basis.root, coordinates) * np.sqrt(self.unit)

    def stiffness(self, coefficients):
        return self.basis.stiffness @ coefficients


class LayerTimes(Replicated, SpaceBasis):
    """The layer times t_1 .. t_L, t_0 being 0, shape (L,), in the unit of time: R = 1.

    Parameters
    ----------
    Y
        The label domain.
    layers
        L.
    """

    def __init__(self, Y: LabelSpace, layers: int):
        super().__init__(Y, (layers,))

    @property
    def unit(self):
        return 1.0

    def functional(self, coefficients):
        return coefficients.copy()

    def riesz(self, functional):
        return functional.copy()

    def coordinates(self, coefficients):
        return coefficients.copy()

    def from_coordinates(self, coordinates):
        return coordinates.copy()

    def stiffness(self, coefficients):
        return np.zeros(self.shape)
