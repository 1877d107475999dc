"""Meshes of label domains from Gmsh files, checked before they are read.

Firedrake's `Mesh` reads such files too, but without checks. It reads a closed surface without its last coordinate unless
``dim=3`` is given; curved cells end in a message about shapes of arrays; cells of several kinds raise an error on one rank
alone, for which the others wait. `read_mesh` lets rank 0 look at the whole file first.
"""

from __future__ import annotations

import os
from pathlib import Path

import firedrake as fd
import numpy as np
from mpi4py import MPI
from petsc4py import PETSc
from petsctools import OptionsManager

from fem_resnet.arguments import instance
from fem_resnet.ranks import on_first, same

__all__ = ["read_mesh"]


def read_mesh(path: str | Path, comm: MPI.Comm = MPI.COMM_WORLD) -> fd.MeshGeometry:
    """The mesh of a Gmsh file, with as many coordinates as its points need. Collective over `comm`.

    Parameters
    ----------
    path
        A file ``.msh`` that PETSc reads (``gmsh -format msh2`` is safe), with straight cells of one kind: intervals,
        triangles, quadrilaterals, tetrahedra or hexahedra.
    comm
        Communicator of the mesh.

    Returns
    -------
    firedrake.MeshGeometry
        A mesh of geometric dimension 3 for a surface in space, 2 for one in the plane z = constant.

    Raises
    ------
    TypeError
        If `path` is no path.
    FileNotFoundError
        If there is no such file.
    ValueError
        If PETSc cannot read it, cells are of several kinds or curved; each on all ranks alike.

    Examples
    --------
    >>> mesh = read_mesh("meshes/polygon.msh")
    >>> mesh.geometric_dimension
    2
    """
    same(instance("comm", comm, MPI.Comm, "give firedrake.COMM_WORLD or firedrake.COMM_SELF"), path=path)
    instance("path", path, (str, os.PathLike), "the name of a file")
    dimension = on_first(comm, lambda: _dimension(Path(path)))
    return fd.Mesh(os.fspath(path), dim=dimension, comm=comm)


def _dimension(path: Path) -> int:
    """How many coordinates the points of a file need; an error where a label domain cannot have its cells."""
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {path}")
    if path.suffix.lower() != ".msh":
        raise ValueError(f"path: expected a Gmsh file .msh, got {path.name}; firedrake.Mesh reads some other formats")
    try:
        # By default PETSc keeps as many coordinates as the cells have dimensions.
        with OptionsManager({"dm_plex_gmsh_spacedim": 3}, "").inserted_options():
            plex = PETSc.DMPlex().createFromFile(os.fspath(path), comm=PETSc.COMM_SELF)
    except PETSc.Error as error:
        raise ValueError(f"path: PETSc cannot read {path} as a mesh of Gmsh ({error}); try gmsh -format msh2") from error
    kinds = {plex.getCellType(cell) for cell in range(*plex.getHeightStratum(0))}
    if len(kinds) != 1:
        names = sorted(name.lower() for name, kind in vars(PETSc.DM.PolytopeType).items() if kind in kinds)
        raise ValueError(
            f"path: expected cells of one kind, {path} has {' and '.join(names) or 'none'}; mesh with triangles or "
            f"tetrahedra alone, or recombine all"
        )
    first, last = plex.getDepthStratum(0)
    points = plex.getCoordinatesLocal().array_r.reshape(-1, 3)
    if len(points) != last - first:
        raise ValueError(
            f"path: expected straight cells, {path} has curved ones, of order 2 or more; write it with gmsh -order 1, and "
            f"give more cells where the boundary bends"
        )
    varies = np.flatnonzero(np.ptp(points, axis=0) > 1e-12 * np.ptp(points))
    return int(max(plex.getDimension(), varies.max(initial=0) + 1))
