"""Spaces for numbers that are the same on every rank, such as coefficients: their cells are all on rank 0."""

from __future__ import annotations

from functools import cache

import firedrake as fd
import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

__all__ = ["CoefficientSpaces"]


class CoefficientSpaces:
    """Spaces of a communicator, each made once. Collective over it.

    Parameters
    ----------
    comm
        The communicator.
    """

    def __init__(self, comm: MPI.Comm):
        @cache
        def mesh(cells: int) -> fd.MeshGeometry:
            sizes, numbers = np.zeros(comm.size, PETSc.IntType), np.arange(0 if comm.rank else cells)
            sizes[0] = numbers.size
            return fd.UnitIntervalMesh(
                cells,
                reorder=False,
                comm=comm,
                name="coefficients",
                distribution_parameters={
                    "partition": (sizes, numbers.astype(PETSc.IntType)),
                    "overlap_type": (fd.DistributedMeshOverlapType.NONE, 0),
                },
            )

        self._space = cache(lambda shape, cells: fd.TensorFunctionSpace(mesh(cells), "DG", 0, shape=shape))

    def space(self, shape: tuple[int, ...], cells: int = 1) -> fd.functionspaceimpl.WithGeometry:
        """A space of so many numbers; rank 0 owns them.

        Parameters
        ----------
        shape
            The shape of the array that each cell holds.
        cells
            How many cells its mesh has. Firedrake takes a second to make a space of 200,000 numbers a cell.
        """
        return self._space(shape, cells)
