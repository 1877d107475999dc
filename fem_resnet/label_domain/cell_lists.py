"""Meshes from lists of points and cells, checked by rank 0 alone before any mesh is made of them.

Only rank 0 has the lists: it reads a file, or computes them. PETSc hands the cells out. What no mesh can be made of ends in
one message on all ranks: cells without a volume, or facets that more than two cells share.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import factorial
from typing import NamedTuple

import firedrake as fd
import numpy as np
from mpi4py import MPI

from fem_resnet.ranks import on_first

__all__ = ["CellList", "mesh_of", "needed_coordinates", "simplex_sizes"]

#: A simplex whose volume is this part of that of a cube on its longest edge has none, up to round-off.
_FLAT = 1e-14

#: Corners of the facets of a cell, by its dimension and its number of corners.
_FACETS: dict[tuple[int, int], list[list[int]]] = {
    (1, 2): [[0], [1]],
    (2, 3): [[0, 1], [1, 2], [2, 0]],
    (2, 4): [[0, 1], [1, 2], [2, 3], [3, 0]],
    (3, 4): [list(corners) for corners in combinations(range(4), 3)],
    (3, 8): [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 5, 4], [1, 2, 6, 5], [2, 3, 7, 6], [3, 0, 4, 7]],
}


class CellList(NamedTuple):
    """Points, and cells of one kind.

    Attributes
    ----------
    name : str
        What messages call where they come from: an argument.
    dimension : int
        Of a cell.
    points : numpy.ndarray
        Shape (points, coordinates).
    cells : numpy.ndarray
        Numbers of the points that are a cell's corners, shape (cells, corners): of a quadrilateral one after the other
        around it; of a hexahedron first around its bottom, then above these.
    """

    name: str
    dimension: int
    points: np.ndarray
    cells: np.ndarray


def mesh_of(comm: MPI.Comm, make: Callable[[], CellList]) -> fd.MeshGeometry:
    """The mesh of a list that rank 0 makes. Collective.

    Parameters
    ----------
    comm
        Communicator of the mesh.
    make
        Called on rank 0 alone; what it raises is raised on all ranks.

    Raises
    ------
    ValueError
        If there is no cell, a cell has no volume, or a facet is one of more than two cells; edges may branch.
    """
    held: list[CellList] = []

    def on_rank_0() -> tuple[int, int]:
        held.append(_checked(make()))
        return held[0].dimension, held[0].points.shape[1]

    dimension, coordinates = on_first(comm, on_rank_0)
    points, cells = (held[0].points, held[0].cells) if held else (None, None)
    if held and cells.shape[1] == 8:
        cells = cells[:, [0, 3, 2, 1, 4, 5, 6, 7]]  # PETSc goes around the bottom the other way
    plex = fd.mesh.plex_from_cell_list(dimension, cells, points, comm)
    return fd.Mesh(plex, dim=coordinates, comm=comm)


def needed_coordinates(points: np.ndarray, dimension: int) -> int:
    """How many coordinates points need, at least as many as cells have dimensions: in a plane z = constant two.

    Parameters
    ----------
    points
        Shape (points, coordinates).
    dimension
        Of the cells.
    """
    varies = np.flatnonzero(np.ptp(points, axis=0) > 1e-12 * np.ptp(points))
    return int(max(dimension, varies.max(initial=0) + 1))


def simplex_sizes(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Volumes and longest edges of simplices, shapes (cells,).

    Parameters
    ----------
    corners
        Shape (cells, dimension + 1, coordinates).
    """
    edges = corners[:, 1:] - corners[:, :1]
    volumes = np.linalg.svdvals(edges).prod(axis=1) / factorial(edges.shape[1])
    pairs = np.array(list(combinations(range(corners.shape[1]), 2)))
    longest = np.linalg.norm(corners[:, pairs[:, 0]] - corners[:, pairs[:, 1]], axis=2).max(axis=1)
    return volumes, longest


def _checked(given: CellList) -> CellList:
    """The list without points that no cell has; an error where no mesh can be made of it."""
    name, dimension, points, cells = given
    if not len(cells):
        raise ValueError(f"{name}: expected cells, got none")
    used, cells = np.unique(cells, return_inverse=True)
    points, cells, corners = points[used], cells.reshape(given.cells.shape), given.cells.shape[1]
    if not np.isfinite(points).all():
        raise ValueError(f"{name}: expected finite coordinates, got others")
    repeated = (np.diff(np.sort(cells, axis=1), axis=1) == 0).any(axis=1)
    if corners == dimension + 1:
        volumes, longest = simplex_sizes(points[cells])
        repeated |= ~(volumes > _FLAT * longest**dimension)
    if repeated.any():
        first = int(np.flatnonzero(repeated)[0])
        raise ValueError(
            f"{name}: expected cells with a volume, got {np.count_nonzero(repeated)} of {len(cells)} without, the first with "
            f"the corners {points[cells[first]].round(6).tolist()}; leave them out"
        )
    all_facets = [cells[:, facet] for facet in _FACETS[dimension, corners]]
    facets, count = np.unique(np.sort(np.concatenate(all_facets), axis=1), axis=0, return_counts=True)
    if count.max() > 2 and dimension > 1:  # edges may branch
        worst = points[facets[count.argmax()]].round(6).tolist()
        raise ValueError(
            f"{name}: expected facets of one or two cells, got one of {count.max()} with the corners {worst}: the cells "
            f"branch there, or some lie on each other"
        )
    return CellList(name, dimension, points, cells)
