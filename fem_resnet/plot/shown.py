"""What of a label domain is drawn: straight pieces of its cells, with values at their corners, gathered on rank 0.

A cell is cut into pieces, as many as the degree of the functions and of the mesh's coordinates asks for: intervals into
intervals, triangles into triangles, quadrilaterals into squares of four triangles each. Of a body in space, the facets on its
boundary are cut so. Each piece has corners and values of its own. So functions that jump between cells are drawn as they are,
and so are periodic meshes, whose coordinates jump. The pieces are in an order that no partition changes.

Each rank sends the pieces of what it owns: their corners once, and the values of the functions that are shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import firedrake as fd
import numpy as np
from finat.element_factory import create_element
from pyadjoint.tape import stop_annotating

from fem_resnet.label_domain.label_space import LabelSpace

__all__ = ["Shown"]

#: Digits of a coordinate, in parts of the domain's extent, that decide about the order of pieces.
_DIGITS = 9


class Shown:
    """The pieces of a label domain of one channel. Collective over its communicator.

    Parameters
    ----------
    Y
        The label domain.

    Attributes
    ----------
    Y : LabelSpace
        The label domain.
    dimension : int
        Of the pieces: 0 for a set of points, 1 for intervals, 2 for triangles.
    space : int
        The number of coordinates.
    is_body : bool
        Whether they are the boundary of a body in space.
    corners : numpy.ndarray or None
        On rank 0 the corners of the pieces, shape (pieces, dimension + 1, coordinates); None on others.

    Raises
    ------
    ValueError
        If the mesh is extruded by different numbers of layers.
    """

    def __init__(self, Y: LabelSpace):
        self.Y = Y
        mesh = Y.V.mesh()
        self.space, self.is_body = mesh.geometric_dimension, mesh.topological_dimension == 3
        self.dimension = min(mesh.topological_dimension, 2) if Y.numbers is None else 0
        if Y.numbers is not None:
            self._nodes, places = np.arange(Y.nodes)[:, None], Y.coordinates
        else:
            self._element, self._nodes = _cut(Y)
            with stop_annotating():
                x = fd.Function(fd.VectorFunctionSpace(mesh, self._element, dim=self.space))
                places = x.interpolate(fd.SpatialCoordinate(mesh)).dat.data_ro.reshape(-1, self.space)
        corners, numbers = Y.comm.gather(places[self._nodes]), Y.comm.gather(Y.numbers)
        self.corners = None
        if corners is not None:
            corners = np.concatenate(corners)
            self._order = _order(corners) if Y.numbers is None else (np.argsort(np.concatenate(numbers))[:, None], [[0]])
            self.corners = corners[self._order]

    def values(self, fields: np.ndarray) -> np.ndarray | None:
        """Values of functions at the corners of the pieces, on rank 0; None on others. Collective.

        Parameters
        ----------
        fields
            The functions at the owned nodes, shape (nodes, functions).

        Returns
        -------
        numpy.ndarray or None
            Shape (functions, pieces, dimension + 1).
        """
        gathered = self.Y.comm.gather(self._own_values(fields)[:, self._nodes])
        if gathered is None:
            return None
        values = np.concatenate(gathered, axis=1)
        return values[:, self._order[0], self._order[1]]

    def _own_values(self, fields: np.ndarray) -> np.ndarray:
        """At the points of this rank's cells that are corners, shape (functions, points)."""
        if self.dimension == 0:
            return np.array(fields.T)
        with stop_annotating():
            given, shown = fd.Function(self.Y.V), fd.Function(fd.FunctionSpace(self.Y.V.mesh(), self._element))
            points = []
            for field in fields.T:
                self.Y.write(given, field)
                points.append(np.array(shown.interpolate(given).dat.data_ro))
        return np.array(points)


def _order(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of the pieces by their midpoints, shape (pieces, 1), and of the corners of each, shape (pieces, corners)."""
    extent = np.ptp(corners.reshape(-1, corners.shape[2]), axis=0).max() or 1.0
    keys = np.round(corners / extent, _DIGITS)
    inside = np.lexsort(keys.transpose(2, 0, 1), axis=-1)
    pieces = np.lexsort(np.round(keys.mean(axis=1), _DIGITS - 1).T)
    return pieces[:, None], inside[pieces]


# -- cells in pieces ---------------------------------------------------------------------------------------------------


def _cut(Y: LabelSpace) -> tuple[fd.FiniteElementBase, np.ndarray]:
    """An element whose nodes are the corners of the pieces, and the nodes of this rank's pieces, shape (pieces, corners)."""
    mesh = Y.V.mesh()
    cell = mesh.ufl_cell()
    is_product = not cell.is_simplex
    coordinates, functions = mesh.coordinates.function_space().ufl_element(), Y.V.ufl_element()
    parts = max(
        1,
        *(one.embedded_subdegree if is_product else one.embedded_superdegree for one in (coordinates, functions)),
    )
    # A square is cut from its middle, so that no diagonal depends on the order of its corners.
    parts = 2 * parts if is_product and mesh.topological_dimension > 1 else parts
    space = fd.FunctionSpace(mesh, "DQ" if is_product else "DG", parts, variant="equispaced")
    element = create_element(space.ufl_element())
    places = np.asarray(element.dual_basis[1].points) * parts
    find = {tuple(place): number for number, place in enumerate(np.rint(places).astype(int))}

    def pieces(vertices: np.ndarray) -> np.ndarray:
        """Nodes of the pieces of a cell or a facet with these vertices, shape (pieces, corners)."""
        first, *sides = np.rint(vertices).astype(int)
        sides = [sides[0] - first] + ([sides[1] - first] if len(sides) > 1 else [])
        return np.array(
            [
                [find[tuple(parts * first + sum(k * side for k, side in zip(corner, sides)))] for corner in piece]
                for piece in _LATTICES[len(vertices)](parts)
            ]
        )

    nodes = _nodes_of_cells(space)
    vertices = np.array(element.cell.get_vertices())
    if mesh.topological_dimension < 3:
        return space.ufl_element(), nodes[:, :, pieces(vertices)].reshape(-1, mesh.topological_dimension + 1)
    found = [
        nodes[cells, layers][:, pieces(vertices[list(facet)])].reshape(-1, 3)
        for cells, layers, facet in _boundary(mesh, element.cell.get_topology())
    ]
    return space.ufl_element(), np.concatenate(found)


def _nodes_of_cells(space: fd.functionspaceimpl.WithGeometry) -> np.ndarray:
    """A discontinuous space's nodes in this rank's cells, shape (cells, layers, nodes); one layer if not extruded."""
    mesh, map_ = space.mesh(), space.cell_node_map()
    own = map_.values[: mesh.cell_set.size]
    if not mesh.extruded:
        return own[:, None]
    if mesh.variable_layers:
        raise ValueError("Y: expected a mesh that is extruded by as many layers everywhere, to be drawn, got different ones")
    return own[:, None] + np.arange(mesh.layers - 1)[:, None] * map_.offset


def _boundary(mesh: fd.MeshGeometry, topology: dict) -> Iterator[tuple[np.ndarray, np.ndarray | int, tuple[int, ...]]]:
    """Cells, their layers, and the vertices of a facet of the cell that these have on the boundary of a body."""
    facets = mesh.exterior_facets
    cells = facets.facet_cell[: facets.set.size].reshape(-1)
    local = facets.local_facet_dat.data_ro.reshape(-1)
    sides = topology[1, 1] if mesh.extruded else topology[2]
    layers = mesh.layers - 1 if mesh.extruded else 1
    for number, facet in sides.items():
        own = cells[local == number]
        yield np.repeat(own, layers), np.tile(np.arange(layers), own.size), facet
    if mesh.extruded and not mesh.extruded_periodic:
        every = np.arange(mesh.cell_set.size)
        yield every, 0, topology[2, 0][0]
        yield every, layers - 1, topology[2, 0][1]


def _intervals(parts: int) -> list:
    return [((k,), (k + 1,)) for k in range(parts)]


def _triangles(parts: int) -> list:
    upright = [((i, j), (i + 1, j), (i, j + 1)) for i in range(parts) for j in range(parts - i)]
    others = [((i + 1, j), (i + 1, j + 1), (i, j + 1)) for i in range(parts) for j in range(parts - i - 1)]
    return upright + others


def _squares(parts: int) -> list:
    found = []
    for i, j in product(range(0, parts, 2), repeat=2):
        ring = [(i, j), (i + 2, j), (i + 2, j + 2), (i, j + 2), (i, j)]
        found += [(*side, (i + 1, j + 1)) for side in zip(ring[:-1], ring[1:])]
    return found


#: The corners of pieces, in steps along the sides of what is cut, by its number of vertices.
_LATTICES = {2: _intervals, 3: _triangles, 4: _squares}
