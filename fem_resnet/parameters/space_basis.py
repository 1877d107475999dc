"""Space bases: how the coefficients in space of a parameter are held, and what they stand for.

Coefficients c stand for E c: the values at the nodes for a bias (`NodalValues`, `BasisCoefficients`), a batch (`StateValues`)
or the values of kernel factors, the matrix beta for a kernel (`KernelCoefficients`), the layer times (`LayerTimes`). Each
knows the Riesz operator R of its inner product in the label measure (M; a Gram matrix; a pair of them). Slots of Blocks
alone are `Replicated` and `SeenBatch`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import firedrake as fd
import numpy as np
import scipy.linalg
from mpi4py import MPI

from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import BatchValues, LabelSpace
from fem_resnet.parameters.kernel import LowRankKernel

__all__ = [
    "BasisCoefficients", "KernelCoefficients", "LayerTimes", "MatrixControls", "NodalValues", "Replicated", "SeenBatch",
    "SpaceBasis", "StateValues", "new_cofunction", "read_all",
]  # fmt: skip


class SpaceBasis(ABC):
    """How coefficients in space are held, and what they stand for.

    Laws: `expand` is linear and `pull_back` its transpose, `<d, expand(c)> = <pull_back(d), c>` with the plain sums
    over what all ranks own; `primal(dual(c)) = c`.
    """

    #: The label domain, whose communicator is that of everything collective here.
    Y: LabelSpace
    #: Firedrake space of the Functions that hold coefficients.
    space: fd.functionspaceimpl.WithGeometry
    #: Shape of the coefficients on this rank.
    shape: tuple[int, ...]

    @property
    def amplitude(self) -> float:
        """How large coefficients are for what is of size one: how they depend on the unit of length in Y."""
        return 1.0

    @property
    def unit(self) -> float:
        """The squared norm of what has that amplitude on all of the label domain."""
        return self.Y.measure

    @abstractmethod
    def read(self, function: fd.Function | fd.Cofunction) -> np.ndarray:
        """The coefficients held by a Function (or Cofunction) of `space`. Collective."""

    def view(self, function: fd.Function | fd.Cofunction) -> np.ndarray:
        """The same, for as long as the Function does not change: values at nodes are not copied. Collective."""
        return self.read(function)

    @abstractmethod
    def write(self, function: fd.Function | fd.Cofunction, coefficients: np.ndarray) -> None:
        """Make a Function (or Cofunction) of `space` hold coefficients."""

    @abstractmethod
    def expand(self, coefficients: np.ndarray) -> np.ndarray:
        """What a layer takes: `E c`."""

    @abstractmethod
    def pull_back(self, dual: np.ndarray) -> np.ndarray:
        """`E^T d`. Collective."""

    @abstractmethod
    def dual(self, coefficients: np.ndarray) -> np.ndarray:
        """`R c`."""

    @abstractmethod
    def primal(self, dual: np.ndarray) -> np.ndarray:
        """`R^-1 d`."""

    @abstractmethod
    def stiffness(self, coefficients: np.ndarray) -> np.ndarray:
        """`S c`, so that `<S c, c>` is the integral of the squared gradients. Collective."""

    @abstractmethod
    def pair(self, dual: np.ndarray, coefficients: np.ndarray) -> float:
        """`<d, c>`, the sum over what all ranks own. Collective."""


class NodalValues(SpaceBasis):
    """Values at the nodes of a label domain: R = M."""

    def __init__(self, Y: LabelSpace):
        self.Y = Y
        self.space = Y.V
        #: That of the functionals; asking Firedrake for it takes as long as a Cofunction.
        self.dual_space = Y.V.dual()
        self.shape = (Y.nodes,)

    def read(self, function):
        return self.view(function).copy()

    def view(self, function):
        return function.dat.data_ro

    def write(self, function, coefficients):
        function.dat.data_wo[...] = coefficients

    def new_dual(self, functional: np.ndarray) -> fd.Cofunction:
        """A new Cofunction that holds a functional, in that very array where it has no halo. Collective."""
        values, size = functional, self.space.dof_dset.total_size
        if size > self.Y.nodes:
            # As large as what the functional came in: then what is freed of one has room for the other.
            came_in = functional if functional.base is None else functional.base
            values = np.zeros(max(size, came_in.size))[:size]
            values[: self.Y.nodes] = functional
        return new_cofunction(self.dual_space, values)

    def expand(self, coefficients):
        return coefficients

    def pull_back(self, dual):
        return dual

    def dual(self, coefficients):
        return self.Y.weights * coefficients

    def stiffness(self, coefficients):
        return self.Y.apply_stiffness(coefficients[:, None])[:, 0]

    def primal(self, dual):
        return dual / self.Y.weights

    def pair(self, dual, coefficients):
        return float(self.Y.sum(dual @ coefficients))


class StateValues(SpaceBasis):
    """Values of a batch at the nodes of a label domain, shape (nodes, samples): R = M for each sample.

    Parameters
    ----------
    Y, space
        The label domain, and the batch's space.
    unit
        As of `SpaceBasis`; 1 for functions that are of norm one.
    """

    def __init__(self, Y: LabelSpace, space: fd.functionspaceimpl.WithGeometry, unit: float | None = None):
        self._unit = Y.measure if unit is None else unit
        self._values = BatchValues(Y, space)
        self.Y = Y
        self.space = space
        self.shape = (Y.nodes, self._values.samples)

    @property
    def unit(self):
        return self._unit

    def read(self, function):
        return self.view(function).copy()

    def view(self, function):
        return self._values.read(function)

    def write(self, function, coefficients):
        self._values.write(function, coefficients)

    def expand(self, coefficients):
        return coefficients

    def pull_back(self, dual):
        return dual

    def dual(self, coefficients):
        return self.Y.weights[:, None] * coefficients

    def stiffness(self, coefficients):
        return self.Y.apply_stiffness(coefficients)

    def primal(self, dual):
        return dual / self.Y.weights[:, None]

    def pair(self, dual, coefficients):
        return float(self.Y.sum(np.einsum("is,is->", dual, coefficients)))


class Replicated:
    """A few numbers, the same on every rank: one cell of a mesh of its own holds them, and its owner broadcasts.

    Parameters
    ----------
    Y
        The label domain.
    shape
        That of the array of numbers.
    """

    def __init__(self, Y: LabelSpace, shape: tuple[int, ...]):
        mesh, self._owner = Y.coefficient_mesh
        self.Y = Y
        self.shape = shape
        self.space = fd.TensorFunctionSpace(mesh, "DG", 0, shape=shape)

    def read(self, function: fd.Function | fd.Cofunction) -> np.ndarray:
        """The numbers held by a Function (or Cofunction) of `space`. Collective."""
        return read_all([self], [function])[0]

    def read_owned(self, function: fd.Function | fd.Cofunction) -> np.ndarray:
        """A copy of what this rank has: the coefficients on the owner, numbers of no meaning on others."""
        if self.Y.comm.rank != self._owner:
            return np.empty(self.shape)
        return function.dat.data_ro.reshape(self.shape).copy()

    def write(self, function: fd.Function | fd.Cofunction, coefficients: np.ndarray) -> None:
        """Make a Function (or Cofunction) of `space` hold the numbers."""
        values = function.dat.data_wo
        if self.Y.comm.rank == self._owner:
            values[...] = np.reshape(coefficients, values.shape)

    def pair(self, dual: np.ndarray, coefficients: np.ndarray) -> float:
        """The sum over all products."""
        return float(np.sum(dual * coefficients))


def new_cofunction(space: fd.functionspaceimpl.FiredrakeDualSpace, values: np.ndarray) -> fd.Cofunction:
    """A new Cofunction in this very array of values, which has room for those of the halo. Collective."""
    # Writing into one would have PyOP2 make a Vec for it: at half its cost, and on several ranks freed late.
    cofunction = fd.Cofunction(space, val=values)
    cofunction.dat.halo_valid = False
    return cofunction


def read_all(
    slots: Sequence[SpaceBasis | BatchValues], functions: Sequence[fd.Function], views: bool = False
) -> list[np.ndarray]:
    """What each slot reads of its Function, with one broadcast for all that is the same on every rank. Collective.

    With `views`, arrays are good for as long as the Functions do not change.
    """
    arrays, replicated = [], {}
    for slot, function in zip(slots, functions):
        if isinstance(slot, Replicated):
            arrays.append(slot.read_owned(function))
            if slot.Y.comm.size > 1:
                replicated.setdefault(slot.Y, []).append(arrays[-1])
        else:
            arrays.append((slot.view if views and isinstance(slot, SpaceBasis) else slot.read)(function))
    for Y, parts in replicated.items():
        together = np.concatenate([part.ravel() for part in parts])
        Y.comm.Bcast(together, root=Y.coefficient_mesh[1])
        start = 0
        for part in parts:
            part[...] = together[start : start + part.size].reshape(part.shape)
            start += part.size
    return arrays


class SeenBatch:
    """A batch as a basis sees it, g = P^T M f: what an operator takes of its input if it takes no more than that.

    Coefficients of a Function are kept until it changes, by PyOP2's count of accesses to its data that may write.

    Parameters
    ----------
    basis
        P.
    space
        Of the batch: `Y.V`, or `Y.batch_space(samples)`.
    """

    def __init__(self, basis: Basis, space: fd.functionspaceimpl.WithGeometry):
        self._basis = basis
        self._values = BatchValues(basis.Y, space)
        self.space = space
        self.shape = (basis.rank, self._values.samples)
        self._kept: WeakKeyDictionary[fd.Function, tuple[int, np.ndarray]] = WeakKeyDictionary()

    def read(self, function: fd.Function) -> np.ndarray:
        """g, shape (rank, samples), the same on every rank. Collective."""
        version, (kept, g) = function.dat.dat_version, self._kept.get(function, (None, None))
        # One rank alone may have looked at the data.
        if not self._basis.Y.comm.allreduce(kept == version, op=MPI.LAND):
            g = self._basis.project(self._values.read(function))
            g.flags.writeable = False
            self._kept[function] = version, g
        return g

    def write(self, function: fd.Cofunction, gamma: np.ndarray) -> None:
        """Make a Cofunction hold the functional `M P gamma` of f, for one of g."""
        self._values.write(function, self._basis.dual(gamma))


class BasisCoefficients(Replicated, SpaceBasis):
    """Coefficients alpha of `a = X alpha` in a basis: R = G."""

    def __init__(self, basis: Basis):
        super().__init__(basis.Y, (basis.rank,))
        self.basis = basis
        self._factor = scipy.linalg.cho_factor(basis.gram)

    def expand(self, coefficients):
        return self.basis.values @ coefficients

    def pull_back(self, dual):
        return self.Y.sum(self.basis.values.T @ dual)

    def dual(self, coefficients):
        return self.basis.gram @ coefficients

    def stiffness(self, coefficients):
        return self.basis.stiffness @ coefficients

    def primal(self, dual):
        return scipy.linalg.cho_solve(self._factor, dual)


class KernelCoefficients(Replicated, SpaceBasis):
    """The matrix beta of a low-rank kernel: R = G_Phi x G_Psi.

    Parameters
    ----------
    kernel
        The factors; where they are learned, and orthonormal, those at the start.
    learned
        Whether they are.
    """

    def __init__(self, kernel: LowRankKernel, learned: bool = False):
        super().__init__(kernel.phi.Y, kernel.shape)
        self.kernel = kernel
        self._learned = learned

    @property
    def amplitude(self):
        return 1 / self.kernel.psi.Y.measure  # b is integrated over it

    @property
    def unit(self):
        return self.kernel.phi.Y.measure / self.kernel.psi.Y.measure

    def expand(self, coefficients):
        return coefficients

    def pull_back(self, dual):
        return dual

    def dual(self, coefficients):
        return self.kernel.dual(coefficients)

    def stiffness(self, coefficients):
        if self._learned:
            raise ValueError("smooth_in_space: gradients of a kernel whose factors are learned are not offered; fix them")
        return self.kernel.stiffness(coefficients)

    def primal(self, dual):
        return self.kernel.primal(dual)


class MatrixControls(Replicated, SpaceBasis):
    """A matrix X of controls of which a kernel is made (`stable_kernels`): R = G x H for Gram matrices, or 1 for either.

    Parameters
    ----------
    Y
        The label domain.
    shape
        That of X.
    left, right
        G and H; the identity if left out.
    """

    def __init__(self, Y: LabelSpace, shape: tuple[int, int], left: np.ndarray | None = None, right: np.ndarray | None = None):
        super().__init__(Y, shape)
        self.grams = [np.eye(size) if gram is None else gram for size, gram in zip(shape, (left, right))]

    @property
    def unit(self):
        return 1.0

    def expand(self, coefficients):
        return coefficients

    def pull_back(self, dual):
        return dual

    def dual(self, coefficients):
        left, right = self.grams
        return left @ coefficients @ right

    def primal(self, dual):
        left, right = self.grams
        return np.linalg.solve(right, np.linalg.solve(left, dual).T).T

    def stiffness(self, coefficients):
        return np.zeros(self.shape)


class LayerTimes(Replicated, SpaceBasis):
    """The layer times t_1 .. t_L, t_0 being 0, shape (L,): R = 1."""

    def __init__(self, Y: LabelSpace, layers: int):
        super().__init__(Y, (layers,))

    @property
    def unit(self):
        return 1.0

    def expand(self, coefficients):
        return coefficients

    def pull_back(self, dual):
        return dual

    def dual(self, coefficients):
        return coefficients.copy()

    def stiffness(self, coefficients):
        return np.zeros(self.shape)

    def primal(self, dual):
        return dual.copy()
