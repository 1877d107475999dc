"""Kernels that commute with given symmetries of Y, B T = T B: a linear set of kernels in a Laplace basis.

beta A = A beta for the matrices A of `symmetry_matrices`. With invariant blocks of functions I and J, and beta_IJ = X,

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

from fem_resnet.arguments import instance, integer, integer_array, number, real_array
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.symmetries import SymmetryMatrices, symmetry_matrices
from fem_resnet.parameters.linear_kernels import LinearKernels
from fem_resnet.ranks import on_first, same

__all__ = ["Symmetric"]

#: Singular values above this many tolerances belong to couplings that do not commute.
_DROPPED = 3.0
#: The largest rank of a set in a file.
_MOST = 1 << 20


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
        super().__init__(phi.rank, elements, broken=found.broken, kept=kept)

    def __repr__(self) -> str:
        return f"Symmetric(rank {self.rank}, {self.count} free controls)"

    @property
    def broken(self) -> float:
        """What the mesh breaks of the symmetries: the largest part of a function's image that is missed.

        It is 0 up to round-off where the mesh has the symmetries.
        """
        return self._known["broken"]

    @property
    def kept(self) -> float:
        """The largest singular value taken for 0: how far kernels of the set are from commuting with the symmetries."""
        return self._known["kept"]

    @property
    def description(self):
        return {"set": "Symmetric", "rank": self.rank, "count": self.count, **self._known}

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
        known = {name: number(name, description[name], least=0) for name in ("broken", "kept")}
        LinearKernels.__init__(made, rank, elements, **known)
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
