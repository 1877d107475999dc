"""Kernels that commute with given symmetries of Y, B T = T B: a linear set of kernels in a Laplace basis.

`equivariant` has the mathematics.
"""

from __future__ import annotations

from typing import Any

from fem_resnet.arguments import integer, number
from fem_resnet.label_domain.basis import Basis
from fem_resnet.parameters.equivariant import acting_on, equivariant_maps
from fem_resnet.parameters.linear_kernels import MOST_RANK, LinearKernels
from fem_resnet.parameters.subspace import as_arrays, from_arrays

__all__ = ["Symmetric"]


class Symmetric(LinearKernels):
    """Kernels that commute with symmetries of Y. Collective over the communicator of the basis.

    A symmetry is given as a Killing field in UFL (``as_vector([-y, x])`` turns a disk), as a map, which takes an array of
    coordinates of shape (places, dimension) to another one, or on a graph as a permutation: point i goes to ``to[i]``.
    A map or a permutation stands for all of its powers, a field for its flow. With channels, `Parity` says with which sign a
    map acts on each.

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
        action = acting_on("phi", phi, symmetries, tolerance)
        elements, kept = equivariant_maps(action, action)
        super().__init__(phi.rank, elements, phi.Y.channels, broken=action.found.broken, kept=kept)

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
        return {
            "set": "Symmetric", "rank": self.rank, "count": self.count, "channels": self._channels, **self._known,
        }  # fmt: skip

    @property
    def arrays(self):
        return as_arrays(self._elements)

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
        rank, count = integer("rank", description["rank"], most=MOST_RANK), integer("count", description["count"])
        channels = integer("channels", description["channels"], most=rank)
        if rank % channels:
            raise ValueError(f"channels: expected a divisor of the rank {rank}, got {channels}")
        elements = from_arrays(rank**2, count, arrays)
        made = cls.__new__(cls)
        known = {name: number(name, description[name], least=0) for name in ("broken", "kept")}
        LinearKernels.__init__(made, rank, elements, channels, **known)
        return made
