"""Points of a user in the cells of a mesh: what takes values at the nodes to values and gradients at these points.

Firedrake's `VertexOnlyMesh` looks for the cells on all ranks. It takes a point that is a little outside of all cells to the
nearest one, by the distance in the reference cell; the functions of that cell go on beyond it. On a surface that distance
does not see how far a point is from the cell's plane, and the first cell that has the point above or below it is taken, on a
torus also one across the hole. So there all cells near a point are asked for, and the nearest in space is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import firedrake as fd
import numpy as np
from finat.element_factory import create_element
from mpi4py import MPI
from petsc4py import PETSc
from pyadjoint.tape import stop_annotating
from ufl import H1

from fem_resnet.fixed import OnMesh
from fem_resnet.petsc import apply_columns
from fem_resnet.ranks import watched

__all__ = ["LocatedPoints", "located_points"]


class LocatedPoints(OnMesh):
    """Points in the cells of a mesh, and the matrices that evaluate there.

    Parameters
    ----------
    V
        The scalar space of the functions.
    size
        How many points there are.
    numbers
        Those of the points that this rank has in its cells, or near them; each rank has others.

    Attributes
    ----------
    missing : numpy.ndarray
        Numbers of the points that are in no cell and not near one, ascending; values there are 0.
    """

    def __init__(self, V: fd.functionspaceimpl.WithGeometry, size: int, numbers: np.ndarray):
        self.V, self.comm = V, watched(V.mesh().comm)
        self._size, self._numbers = size, numbers
        found = np.zeros(size)
        found[numbers] = 1
        self.missing = np.flatnonzero(self._sum(found) == 0)

    def _sum(self, x: np.ndarray) -> np.ndarray:
        self.comm.Allreduce(MPI.IN_PLACE, x)
        return x

    @cached_property
    def interpolation(self) -> PETSc.Mat:
        """The matrix from values at nodes to values at this rank's points."""
        return self._interpolation()

    @cached_property
    def gradient(self) -> list[PETSc.Mat]:
        """The matrices from values at nodes to the partial derivatives at points; on a surface, of the tangential gradient.

        Raises
        ------
        ValueError
            If the functions are discontinuous.
        """
        if self.V.ufl_element() not in H1:
            raise ValueError(f"Y: expected continuous functions, which have gradients, got {self.V.ufl_element()}; use CG")
        return self._gradient()

    def _interpolation(self) -> PETSc.Mat:
        raise NotImplementedError

    def _gradient(self) -> list[PETSc.Mat]:
        raise NotImplementedError

    def apply(self, matrix: PETSc.Mat, values: np.ndarray) -> np.ndarray:
        """One of the matrices applied to values at the owned nodes, the same on all ranks. Collective.

        Parameters
        ----------
        matrix
            `interpolation`, or one of `gradient`.
        values
            Shape (nodes, columns).

        Returns
        -------
        numpy.ndarray
            Shape (points, columns), in the order in which the points were given.
        """
        result = np.zeros((self._size, values.shape[1]))
        result[self._numbers] = apply_columns(matrix, values)
        return self._sum(result)


def located_points(V: fd.functionspaceimpl.WithGeometry, points: np.ndarray, tolerance: float) -> LocatedPoints:
    """Points in the cells of a mesh; they are the same on every rank. Collective.

    Parameters
    ----------
    V
        A scalar space on a mesh.
    points
        Shape (points, geometric dimension).
    tolerance
        How far a point may be from the nearest cell, as a part of the cell's size.

    Raises
    ------
    ValueError
        If the mesh is an extruded surface.
    """
    mesh = V.mesh()
    surface = mesh.topological_dimension < mesh.geometric_dimension
    if surface and mesh.extruded:
        raise ValueError("basis: expected functions on a surface of triangles, quadrilaterals or edges, got an extruded one")
    before = mesh.tolerance
    with stop_annotating():
        try:
            return _OnSurface(V, points, tolerance) if surface else _InSpace(V, points, tolerance)
        finally:
            mesh.tolerance = before


class _InSpace(LocatedPoints):
    """Points in a mesh of the dimension of its space."""

    def __init__(self, V: fd.functionspaceimpl.WithGeometry, points: np.ndarray, tolerance: float):
        vertices = fd.VertexOnlyMesh(V.mesh(), points, missing_points_behaviour="ignore", tolerance=tolerance)
        given, self._space = fd.FunctionSpace(vertices.input_ordering, "DG", 0), fd.FunctionSpace(vertices, "DG", 0)
        numbers = fd.Function(given)
        numbers.dat.data_wo[:] = np.arange(numbers.dat.data_ro.size)
        here = fd.assemble(fd.interpolate(numbers, self._space)).dat.data_ro.astype(int)
        super().__init__(V, len(points), here)

    def _interpolation(self) -> PETSc.Mat:
        return self._matrix(lambda u: u)

    def _gradient(self) -> list[PETSc.Mat]:
        def part(j: int) -> PETSc.Mat:
            return self._matrix(lambda u: fd.grad(u)[j] if fd.grad(u).ufl_shape else fd.grad(u))

        return [part(j) for j in range(self.V.mesh().geometric_dimension)]

    def _matrix(self, of: Callable) -> PETSc.Mat:
        """The matrix from values at nodes to an expression in the function."""
        V, mesh = self.V, self.V.mesh()
        with stop_annotating():
            if not (mesh.extruded and mesh.extruded_periodic):
                return fd.assemble(fd.interpolate(of(fd.TrialFunction(V)), self._space)).petscmat
            # The last layer's nodes are those of the first, which Firedrake's map from points to nodes does not know; the
            # nodes of a broken space are each one cell's own.
            broken = fd.FunctionSpace(mesh, fd.BrokenElement(V.ufl_element()))
            to_points = fd.assemble(fd.interpolate(of(fd.TrialFunction(broken)), self._space)).petscmat
            return to_points.matMult(fd.assemble(fd.interpolate(fd.TrialFunction(V), broken)).petscmat)


class _OnSurface(LocatedPoints):
    """Points on a curve or surface, or near it: each in the cell that is nearest in space."""

    def __init__(self, V: fd.functionspaceimpl.WithGeometry, points: np.ndarray, tolerance: float):
        coordinates = V.mesh().coordinates
        dimension = V.mesh().topological_dimension
        self._element = create_element(coordinates.function_space().ufl_element().sub_elements[0]).fiat_equivalent
        x = coordinates.dat.data_ro_with_halos.reshape(-1, points.shape[1])[coordinates.cell_node_map().values_with_halo]
        # The diameter of a cell's box over the root of two or three: about its side.
        sizes = np.linalg.norm(np.ptp(x, axis=1), axis=1) / dimension**0.5
        candidates: list[tuple[np.ndarray, ...]] = []
        asked = np.full((len(points), 1), -1)
        while True:
            found, at, beyond = V.mesh().locate_cells_ref_coords_and_dists(points, tolerance, asked)
            here = np.flatnonzero(found >= 0)
            if not here.size:
                break
            cell, at = found[here], at[here, :dimension]
            off = np.einsum("kp,pkd->pd", _table(self._element, at, 0)[0], x[cell]) - points[here]
            height = np.linalg.norm(off, axis=1)
            # Off the cell's plane, or beyond its edges, where the reference cell measures in parts of the cell's size.
            distance = np.maximum(height, beyond[here] * sizes[cell])
            near = height <= tolerance * sizes[cell]
            candidates.append((here[near], cell[near], at[near], distance[near]))
            asked = np.ascontiguousarray(np.column_stack([asked, found]))
        empty = (np.zeros(0, int), np.zeros(0, int), np.zeros((0, dimension)), np.zeros(0))
        number, cell, at, distance = (np.concatenate(parts) for parts in zip(empty, *candidates))
        nearest = _smallest(watched(V.mesh().comm), len(points), number, distance)
        # In front of an edge two cells are as near. The one whose middle comes first is taken, on any number of ranks.
        middle = x[cell].mean(axis=1) @ np.sqrt(1.0 + np.arange(points.shape[1]))
        middle = np.where(distance <= nearest[number] + 1e-8 * sizes[cell], middle, np.inf)
        first = _smallest(watched(V.mesh().comm), len(points), number, middle)
        chosen = np.flatnonzero(np.isfinite(middle) & (middle <= first[number] + 1e-8 * sizes[cell]))
        mine = np.full(len(points), -1)
        mine[number[chosen]] = chosen
        owner = np.array(watched(V.mesh().comm).allgather(mine >= 0)).argmax(axis=0)
        mine = mine[(mine >= 0) & (owner == V.mesh().comm.rank)]
        numbers, cells, places = number[mine], cell[mine], at[mine]
        self._cells, self._places, self._x = cells, places, x[cells]
        super().__init__(V, len(points), numbers)

    def _interpolation(self) -> PETSc.Mat:
        return self._matrix(_table(self._of_functions, self._places, 0)[0].T)

    def _gradient(self) -> list[PETSc.Mat]:
        jacobians = np.einsum("tkp,pkd->pdt", _table(self._element, self._places, 1), self._x)
        slopes = np.einsum("tkp,ptd->dpk", _table(self._of_functions, self._places, 1), np.linalg.pinv(jacobians))
        return [self._matrix(slope) for slope in slopes]

    @property
    def _of_functions(self):
        return create_element(self.V.ufl_element()).fiat_equivalent

    def _matrix(self, rows: np.ndarray) -> PETSc.Mat:
        """The matrix of which row p has these entries, shape (points, nodes of a cell), at the nodes of the point's cell."""
        V = self.V
        columns = V.dof_dset.lgmap.apply(V.cell_node_map().values_with_halo[self._cells].ravel()).reshape(rows.shape)
        order = np.argsort(columns, axis=1)
        entries = [np.take_along_axis(each, order, axis=1).ravel() for each in (columns, rows)]
        starts = np.arange(len(rows) + 1, dtype=PETSc.IntType) * rows.shape[1]
        sizes = ((len(rows), None), V.dof_dset.layout_vec.getSizes())
        csr = (starts, entries[0].astype(PETSc.IntType), entries[1])
        return PETSc.Mat().createAIJ(sizes, csr=csr, comm=self.comm)  # type: ignore[arg-type]  # stubs lack arrays


def _smallest(comm: MPI.Comm, size: int, numbers: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The smallest of the values with each number, of all ranks, shape (size,); infinite where there are none. Collective."""
    smallest = np.full(size, np.inf)
    np.minimum.at(smallest, numbers, values)
    return comm.allreduce(smallest, op=np.minimum)


def _table(element, places: np.ndarray, order: int) -> np.ndarray:
    """The nodal functions of an element at places in the reference cell, or their partial derivatives (order 1).

    Shape (1 or reference dimension, nodes of a cell, places).
    """
    dimension = places.shape[1]
    which = np.eye(dimension, dtype=int) if order else np.zeros((1, dimension), int)
    if not len(places):
        return np.zeros((len(which), element.space_dimension(), 0))
    values = element.tabulate(order, places)
    return np.array([values[tuple(map(int, one))] for one in which])
