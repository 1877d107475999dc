"""Functions of other spaces and meshes, by their values at the nodes of a label domain.

On the label domain's own mesh Firedrake interpolates, cell by cell. On another mesh each node is looked for in its cells, or
near them, since of two meshes of one round Y neither covers the other.
"""

from __future__ import annotations

import firedrake as fd
import numpy as np
from finat.ufl import TensorElement, VectorElement
from mpi4py import MPI
from pyadjoint.tape import stop_annotating
from ufl import H1

from fem_resnet.label_domain.located_points import LocatedPoints, located_points
from fem_resnet.ranks import together, watched

__all__ = ["AtNodes"]

#: How far a node may be from the nearest cell of another mesh, as a part of the cell's size; as that of `Sensors`.
_TOLERANCE = 0.25


class AtNodes:
    """What evaluates Functions of other spaces at the nodes of a label domain; each space is looked at once.

    Parameters
    ----------
    V
        The space of the label domain, scalar.
    coordinates
        Where its owned nodes are, shape (nodes, geometric dimension).
    """

    def __init__(self, V: fd.functionspaceimpl.WithGeometry, coordinates: np.ndarray):
        self._V, self._coordinates = V, coordinates
        self._comm = watched(V.mesh().comm)
        self._located: dict[fd.functionspaceimpl.WithGeometry, tuple[LocatedPoints, slice]] = {}

    def values(self, function: fd.Function, name: str) -> np.ndarray:
        """Values at the owned nodes, shape (nodes, *value shape). Collective.

        Parameters
        ----------
        function
            Of a space of numbers, vectors or tensors of these, on any mesh.
        name
            How messages call it.

        Raises
        ------
        ValueError
            If its values at the nodes are not one number each, or its mesh does not cover the nodes.
        """
        space, mesh = function.function_space(), self._V.mesh()
        scalar = together(self._comm, lambda: self._scalar(space, name))
        shape = (len(self._coordinates), *space.value_shape)
        with stop_annotating():
            if space.mesh() is mesh:
                target = fd.TensorFunctionSpace(mesh, self._V.ufl_element(), shape=space.value_shape) if shape[1:] else self._V
                return fd.assemble(fd.interpolate(function, target)).dat.data_ro.reshape(shape).copy()
            located, own = self._in_cells(scalar, name)
            columns = function.dat.data_ro.reshape(-1, space.value_size)
            return located.apply(located.interpolation, np.ascontiguousarray(columns))[own].reshape(shape)

    def _scalar(self, space: fd.functionspaceimpl.WithGeometry, name: str) -> fd.functionspaceimpl.WithGeometry:
        element, here = space.ufl_element(), space.mesh() is self._V.mesh()
        of_numbers = isinstance(element, (VectorElement, TensorElement)) or space.value_shape == ()
        if len(space) != 1 or not of_numbers:
            raise ValueError(f"{name}: expected Functions of numbers, or of vectors of numbers, got one of {element}")
        scalar = element.sub_elements[0] if space.value_shape else element
        if scalar not in H1 and (not here or self._V.ufl_element() in H1):
            raise ValueError(
                f"{name}: expected continuous Functions, as the nodes of {self._V.ufl_element()} may lie between cells, got "
                f"one of {element}; project it into CG before, or give values at points to Sensors(basis, points).fit"
            )
        comm, dimension = space.mesh().comm, space.mesh().geometric_dimension
        if dimension != self._V.mesh().geometric_dimension:
            raise ValueError(
                f"{name}: expected Functions on a mesh in space of {self._V.mesh().geometric_dimension} dimensions, got one "
                f"of {dimension}"
            )
        if comm.size > 1 and MPI.Comm.Compare(comm, self._comm) not in (MPI.IDENT, MPI.CONGRUENT):
            raise ValueError(f"{name}: expected Functions on a mesh of the same ranks, or of one rank alone, got {comm.size}")
        return fd.FunctionSpace(space.mesh(), scalar)

    def _in_cells(self, scalar: fd.functionspaceimpl.WithGeometry, name: str) -> tuple[LocatedPoints, slice]:
        if scalar not in self._located:
            if scalar.mesh().comm.size == 1:  # each rank has the whole Function
                points, first = self._coordinates, 0
            else:
                points = np.concatenate(self._comm.allgather(self._coordinates))
                first = self._comm.exscan(len(self._coordinates)) or 0
            located = located_points(scalar, points, _TOLERANCE)
            own = slice(first, first + len(self._coordinates))

            def covered() -> None:
                if located.missing.size:
                    raise ValueError(
                        f"{name}: expected Functions on a mesh that covers Y, or ends no farther from it than {_TOLERANCE:g} "
                        f"of a cell, got one without {located.missing.size} of {len(points)} nodes, the first at "
                        f"{points[located.missing[0]].tolist()}"
                    )

            together(self._comm, covered)
            self._located[scalar] = located, own
        return self._located[scalar]
