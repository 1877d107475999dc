"""Kernels that know the symmetry of Y: linear sets of kernels, beta = sum_k theta_k E_k, in a Laplace basis.

    functions of the Laplacian     b = k(-Laplace)            beta = k(lambda_j) on the diagonal, one number an eigenspace
    symmetric                      B T = T B for given T      beta A = A beta for the matrices A of the symmetries T

The E_k are orthonormal matrices, and so are the functions of the basis. So the inner product of kernels is that of theta,
P is its own derivative, its transpose takes a functional d to d(E_k), and the curvature is 0.

The first set exists on each Y, and commutes with all isometries. The second one is the commutant of the matrices of
`symmetry_matrices`. With invariant blocks of functions I and J, and beta_IJ = X,

    A_I X - X A_J = 0    for each symmetry,

which is solved for every pair of blocks by a singular value decomposition. Frequencies are in parts of the smallest one, so
that singular values below the tolerance are 0 but for the mesh, and those above three times the tolerance are not. Those in
between are an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import ufl
from numpy.typing import ArrayLike

from fem_resnet.arguments import instance, integer, integer_array, number, real_array
from fem_resnet.fixed import Fixed, read_only
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.symmetries import SymmetryMatrices, eigenspaces, symmetry_matrices
from fem_resnet.parameters.kernel_sets import KernelSet, MatrixControls, refuse_outside
from fem_resnet.ranks import on_first, same

__all__ = ["LaplaceFunctions", "LinearKernels", "Symmetric"]

#: Singular values above this many tolerances belong to couplings that do not commute.
_DROPPED = 3.0
#: The largest rank of a set in a file.
_MOST = 1 << 20


class LinearKernels(Fixed, KernelSet):
    """A linear set of kernels, beta = sum_k theta_k E_k with orthonormal E_k.

    Parameters
    ----------
    rank
        The rank of phi = psi.
    elements
        The E_k, each as one column, shape (rank^2, count).
    """

    symmetric = True
    linear = True

    def __init__(self, rank: int, elements: scipy.sparse.csc_array):
        self._rank = rank
        self._elements = elements
        self._transposed = elements.T.tocsr()

    @property
    def rank(self) -> int:
        """The rank of phi = psi."""
        return self._rank

    @property
    def count(self) -> int:
        """How many free controls theta_k there are."""
        return self._elements.shape[1]

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        ours, theirs = self.arrays, other.arrays
        return self.description == other.description and all(np.array_equal(ours[name], theirs[name]) for name in ours)

    def __hash__(self) -> int:
        return hash((type(self), self.rank, self.count))

    def shape(self, phi, psi):
        if (phi, psi) != (self.rank, self.rank):
            raise ValueError(
                f"kernel.among: expected a basis of rank {self.rank}, of which {type(self).__name__} was made, "
                f"got ranks {phi} and {psi}"
            )
        return self.count, 1

    def controls(self, kernel):
        shape = self.shape(*kernel.shape)
        phi = kernel.phi
        if phi.eigenvalues is None or np.abs(phi.gram - np.eye(phi.rank)).max() > 1e-8:
            raise ValueError(
                f"kernel.among: expected orthonormal eigenfunctions with {type(self).__name__}, as laplace_basis makes them, "
                f"got {phi!r}"
            )
        return MatrixControls(phi.Y, shape)

    def start(self, kernel):
        return np.zeros((self.count, 1))

    def inverse(self, kernel, beta):
        X = self.adjoint(kernel, None, beta)
        refuse_outside(np.abs(beta - self.value(kernel, X)).max(), np.abs(beta).max(), f"a kernel of {self!r}")
        return X

    def value(self, kernel, X):
        return (self._elements @ X).reshape(self.rank, self.rank)

    def tangent(self, kernel, X, X_1):
        return self.value(kernel, X_1)

    def adjoint(self, kernel, X, functional):
        return self._transposed @ np.ascontiguousarray(functional).reshape(-1, 1)

    def curvature(self, kernel, X, X_1, functional):
        return np.zeros((self.count, 1))

    def projected(self, beta: ArrayLike) -> np.ndarray:
        """The nearest kernel of the set, shape (rank, rank).

        Parameters
        ----------
        beta
            Coefficients of any kernel, shape (rank, rank).

        Raises
        ------
        TypeError, ValueError
            If beta is no such array.
        """
        beta = real_array("beta", beta, (self.rank, self.rank))
        return (self._elements @ (self._transposed @ beta.reshape(-1, 1))).reshape(beta.shape)


class LaplaceFunctions(LinearKernels):
    """Kernels b = k(-Laplace): beta = k(lambda) on each eigenspace. They commute with every isometry of Y.

    Collective over the communicator of a basis.

    Parameters
    ----------
    phi
        A Laplace basis. A network takes the same basis, or what `Basis.on` makes of it.
    split
        Neighbouring eigenvalues that differ by less than this part of their value count as one. Where a mesh splits an
        eigenspace further, its functions have numbers of their own and the kernels lose the symmetry: give more then.

    Raises
    ------
    TypeError
        If an argument is of another kind.
    ValueError
        If phi is no basis of orthonormal eigenfunctions, or `split` no number from 0 to 1.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Kernel, LabelSpace, ResidualNetwork, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 6)
    >>> among = LaplaceFunctions(phi, split=0.05)
    >>> among
    LaplaceFunctions(rank 6, 4 free controls)
    >>> net = ResidualNetwork(Kernel(phi, among=among), layers=1)
    >>> net.kernel.set(0, among.kernel([4.0, 3.0, 2.0, 1.0]))
    >>> net.kernel.get(0).diagonal().round(12).tolist()
    [4.0, 3.0, 3.0, 2.0, 2.0, 1.0]
    """

    def __init__(self, phi: Basis, *, split: float = 1e-3):
        instance("phi", phi, Basis, "laplace_basis(Y, rank) makes one")
        same(phi.Y.comm, split=split)
        spaces = eigenspaces(phi, number("split", split, least=0, most=1))
        label = np.empty(phi.rank, dtype=int)
        for k, space in enumerate(spaces):
            label[space] = k
        self._set(label, np.array([phi.eigenvalues[space].mean() for space in spaces]))

    def _set(self, label: np.ndarray, eigenvalues: np.ndarray) -> None:
        rank, count = label.size, eigenvalues.size
        self._eigenvalues, self._label = read_only(eigenvalues), label
        self._sizes = np.bincount(label, minlength=count)
        places = np.arange(rank) * (rank + 1)
        values = 1 / np.sqrt(self._sizes[label])
        LinearKernels.__init__(
            self, rank, scipy.sparse.csc_array((values, (places, label)), shape=(rank**2, count), dtype=float)
        )

    def __repr__(self) -> str:
        return f"LaplaceFunctions(rank {self.rank}, {self.count} free controls)"

    @property
    def eigenvalues(self) -> np.ndarray:
        """The mean eigenvalue of each eigenspace, ascending, shape (count,)."""
        return self._eigenvalues

    @property
    def description(self):
        return {"set": "LaplaceFunctions"}

    @property
    def arrays(self):
        return {"label": self._label, "eigenvalues": self.eigenvalues}

    @classmethod
    def of_arrays(cls, description, arrays):
        """The set from what `description` and `arrays` give.

        Parameters
        ----------
        description, arrays
            As for `KernelSet.of_arrays`.

        Raises
        ------
        TypeError, ValueError
            If they describe no such set.
        """
        eigenvalues = real_array("eigenvalues", arrays["eigenvalues"], ("eigenspaces",))
        label = integer_array("label", arrays["label"], ("rank",)).astype(int)
        if not np.array_equal(np.unique(label), np.arange(eigenvalues.size)):
            raise ValueError(f"label: expected each of {eigenvalues.size} eigenspaces, got others")
        made = cls.__new__(cls)
        made._set(label, eigenvalues.copy())
        return made

    def kernel(self, multipliers: ArrayLike) -> np.ndarray:
        """The coefficients beta of k(-Laplace), shape (rank, rank).

        Parameters
        ----------
        multipliers
            k at each of `eigenvalues`, shape (count,).

        Raises
        ------
        TypeError, ValueError
            If these are no such numbers.
        """
        return np.diag(real_array("multipliers", multipliers, (self.count,))[self._label])

    def multipliers(self, beta: ArrayLike, eigenvalues: ArrayLike | None = None) -> np.ndarray:
        """k at each of `eigenvalues`, or at other ones: between those of this Y linear in sqrt(lambda), beyond constant.

        So a kernel moves to another label domain: ``other.kernel(among.multipliers(beta, other.eigenvalues))``.

        Parameters
        ----------
        beta
            Coefficients of a kernel of this set, shape (rank, rank).
        eigenvalues
            Where k is to be known, in 1 / (unit of length)^2, shape (any,).

        Raises
        ------
        TypeError, ValueError
            If an argument is no such array, or beta is not in the set.
        """
        beta = real_array("beta", beta, (self.rank, self.rank))
        refuse_outside(np.abs(beta - self.projected(beta)).max(), np.abs(beta).max(), f"a kernel of {self!r}")
        k = np.bincount(self._label, beta.diagonal()) / self._sizes
        if eigenvalues is None:
            return k
        at = real_array("eigenvalues", eigenvalues, ("any",))
        own, at = (np.sqrt(np.maximum(each, 0.0)) for each in (self.eigenvalues, at))
        return np.interp(at, own, k)


class Symmetric(LinearKernels):
    """Kernels that commute with symmetries of Y. Collective over the communicator of the basis.

    A symmetry is given as a Killing field in UFL (``as_vector([-y, x])`` turns a disk), as a map, which takes an array of
    coordinates of shape (places, dimension) to another one, or on a graph as a permutation: point i goes to ``to[i]``.
    A map or a permutation stands for all of its powers, a field for its flow.

    Parameters
    ----------
    phi
        A Laplace basis of whole eigenspaces. A network takes the same basis, or what `Basis.on` makes of it.
    *symmetries
        At least one.
    tolerance
        Singular values of A_I X - X A_J below it are taken for 0; those from there to three times as much are an error. The
        unit is the smallest frequency: 1 for a rotation of the disk by its field, abs(exp(i angle) - 1) for a map.

    Raises
    ------
    TypeError
        If phi is no Basis, or a symmetry is of another kind.
    ValueError
        If phi is no basis of orthonormal eigenfunctions, cuts an eigenspace, or a symmetry is none of Y; if the mesh is too
        coarse to say which functions a kernel may couple.

    Examples
    --------
    >>> from firedrake import FunctionSpace, SpatialCoordinate, UnitDiskMesh, as_vector
    >>> from fem_resnet import Kernel, LabelSpace, ResidualNetwork, laplace_basis
    >>> mesh = UnitDiskMesh(3)
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(mesh, "CG", 1)), 6)
    >>> x, y = SpatialCoordinate(mesh)

    Two numbers each for the angular numbers 1 and 2, and four for the two radial functions:

    >>> Symmetric(phi, as_vector([-y, x]))
    Symmetric(rank 6, 8 free controls)
    """

    def __init__(self, phi: Basis, *symmetries: Any, tolerance: float = 0.1):
        instance("phi", phi, Basis, "laplace_basis(Y, rank) makes one")
        comm = phi.Y.comm
        kinds = ["a field" if isinstance(each, ufl.core.expr.Expr) else each for each in symmetries]
        same(comm, symmetries=kinds, tolerance=tolerance)
        tolerance = number("tolerance", tolerance, above=0, most=0.25)
        if not symmetries:
            raise ValueError("symmetries: expected at least one Killing field, map or permutation, got none")
        found = symmetry_matrices(phi, symmetries)
        # Rounding must not make other elements on other ranks.
        elements, kept = on_first(comm, lambda: _commutant(found, phi.eigenvalues, tolerance))
        self._set(elements, found.broken, kept)

    def _set(self, elements: scipy.sparse.csc_array, broken: float, kept: float) -> None:
        self._broken, self._kept = broken, kept
        LinearKernels.__init__(self, int(round(elements.shape[0] ** 0.5)), elements)

    def __repr__(self) -> str:
        return f"Symmetric(rank {self.rank}, {self.count} free controls)"

    @property
    def broken(self) -> float:
        """What the mesh breaks of the symmetries: the largest part of a function's image that is missed.

        It is 0 up to round-off where the mesh has the symmetries.
        """
        return self._broken

    @property
    def kept(self) -> float:
        """The largest singular value taken for 0: how far kernels of the set are from commuting with the symmetries."""
        return self._kept

    @property
    def description(self):
        return {"set": "Symmetric", "rank": self.rank, "count": self.count, "broken": self.broken, "kept": self.kept}

    @property
    def arrays(self):
        E = self._elements.tocoo()
        return {"places": E.coords[0], "controls": E.coords[1], "values": E.data}

    @classmethod
    def of_arrays(cls, description, arrays):
        """The set from what `description` and `arrays` give.

        Parameters
        ----------
        description, arrays
            As for `KernelSet.of_arrays`.

        Raises
        ------
        TypeError, ValueError
            If they describe no such set.
        """
        rank, count = integer("rank", description["rank"], most=_MOST), integer("count", description["count"])
        values = real_array("values", arrays["values"], ("entries",))
        if count > values.size:
            raise ValueError(f"count: expected at most one control an entry, {values.size}, got {count}")
        places, controls = (integer_array(name, arrays[name], values.shape).astype(int) for name in ("places", "controls"))
        for name, array, end in (("places", places, rank**2), ("controls", controls, count)):
            if array.size and not (0 <= array.min() and array.max() < end):
                raise ValueError(f"{name}: expected numbers from 0 to {end - 1}, got others among them")
        elements = scipy.sparse.csc_array((values, (places, controls)), shape=(rank**2, count))
        gram = (elements.T @ elements - scipy.sparse.eye_array(count)).tocoo()
        if np.abs(gram.data).max(initial=0.0) > 1e-8:
            raise ValueError("values: expected orthonormal matrices, got others")
        made = cls.__new__(cls)
        made._set(elements, *(number(name, description[name], least=0) for name in ("broken", "kept")))
        return made


def _commutant(found: SymmetryMatrices, eigenvalues: np.ndarray, tolerance: float) -> tuple[scipy.sparse.csc_array, float]:
    """An orthonormal basis of the matrices that commute with given ones, and the largest singular value taken for 0."""
    rank = len(eigenvalues)
    places, controls, values = [], [], []
    count, largest = 0, 0.0
    for I in found.blocks:
        for J in found.blocks:
            X, kept = _couplings(found, I, J, eigenvalues, tolerance)
            where = (I[:, None] * rank + J).ravel()
            for one in X:
                entries = np.abs(one) > 1e-14
                places.append(where[entries])
                controls.append(np.full(np.count_nonzero(entries), count))
                values.append(one[entries])
                count += 1
            largest = max(largest, kept)
    coordinates = np.concatenate(places), np.concatenate(controls)
    return scipy.sparse.csc_array((np.concatenate(values), coordinates), shape=(rank**2, count)), largest


def _couplings(
    found: SymmetryMatrices, I: np.ndarray, J: np.ndarray, eigenvalues: np.ndarray, tolerance: float
) -> tuple[np.ndarray, float]:
    """Orthonormal X with A_I X = X A_J, each as a row of shape (size of I * size of J,); the largest singular value kept."""
    one, other = np.eye(len(I)), np.eye(len(J))
    rows = [np.kron(A[np.ix_(I, I)], other) - np.kron(one, A[np.ix_(J, J)].T) for A in found.matrices]
    _, sizes, V = np.linalg.svd(np.vstack(rows), full_matrices=False)
    unclear = sizes[(sizes >= tolerance) & (sizes <= _DROPPED * tolerance)]
    if unclear.size:
        raise ValueError(
            f"symmetries: expected a mesh that tells which functions a kernel may couple, got the singular value "
            f"{unclear.max():.2g}, neither below {tolerance:g} nor above {_DROPPED * tolerance:g}, for functions of the "
            f"eigenvalues {eigenvalues[I].mean():.6g} and {eigenvalues[J].mean():.6g}; the mesh breaks a part of "
            f"{found.broken:.2g} of the symmetries: refine it, take fewer functions, or another tolerance"
        )
    kept = sizes < tolerance
    return V[kept], float(sizes[kept].max(initial=0.0))
