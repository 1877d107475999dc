"""Meshes of label domains from files, checked before they are read.

Firedrake's `Mesh` reads files of Gmsh too, but without checks. It reads a closed surface without its last coordinate unless
``dim=3`` is given; curved cells end in a message about shapes of arrays; cells of several kinds raise an error on one rank
alone, for which the others wait. `read_mesh` lets rank 0 look at the whole file first. It keeps the names of physical groups
as labels of the mesh, where `Part` finds them: PETSc's own option for this takes numbers of other entities for groups too.

Other formats are read by meshio, which is optional. They have cells alone, without names of parts.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import firedrake as fd
import numpy as np
from mpi4py import MPI
from petsc4py import PETSc
from petsctools import OptionsManager

from fem_resnet.arguments import instance
from fem_resnet.label_domain.cell_lists import CellList, mesh_of, needed_coordinates
from fem_resnet.ranks import on_first, same

__all__ = ["LABELS_OF_MESHES", "mesh_in_file", "read_mesh"]

#: Labels of a mesh that PETSc and Firedrake make for themselves.
LABELS_OF_MESHES = frozenset(
    {
        "celltype", "depth", "marker", "exterior_facets", "interior_facets", "pyop2_core", "pyop2_owned", "pyop2_ghost",
        "Cell Sets", "Face Sets", "Edge Sets", "Vertex Sets",
    }
)  # fmt: skip
#: Labels that PETSc and Firedrake make of physical groups, by the number of dimensions that these lack.
_LABELS = ("Cell Sets", "Face Sets")

#: The cells that meshio names so, by their dimensions.
_CELLS = {"line": 1, "triangle": 2, "quad": 2, "tetra": 3, "hexahedron": 3}


class _Looked(NamedTuple):
    """What rank 0 saw in a file of Gmsh: coordinates that points need, major version, dimension and number of each name."""

    coordinates: int
    version: int
    groups: dict[str, tuple[int, int]]


def read_mesh(path: str | Path, comm: MPI.Comm = MPI.COMM_WORLD) -> fd.MeshGeometry:
    """The mesh of a file, with as many coordinates as its points need. Collective over `comm`.

    Parameters
    ----------
    path
        A file ``.msh`` of Gmsh that PETSc reads (``gmsh -format msh2`` is safe), or one of another format that meshio reads:
        ``.ply``, ``.obj``, ``.stl``, ``.vtu``, ``.vtk`` and more. Cells are straight and of one kind: intervals, triangles,
        quadrilaterals, tetrahedra or hexahedra.
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
    ImportError
        If meshio is needed, and not installed.
    ValueError
        If the file cannot be read, cells are of several kinds, curved or without a volume, or more than two share a facet;
        each on all ranks alike.

    Examples
    --------
    >>> mesh = read_mesh("meshes/polygon.msh")
    >>> mesh.geometric_dimension
    2
    """
    same(instance("comm", comm, MPI.Comm, "give firedrake.COMM_WORLD or firedrake.COMM_SELF"), path=path)
    instance("path", path, (str, os.PathLike), "the name of a file")
    return mesh_in_file("path", Path(path), comm)


def mesh_in_file(name: str, path: Path, comm: MPI.Comm) -> fd.MeshGeometry:
    """As `read_mesh`, with a name for the argument. Collective.

    Parameters
    ----------
    name
        How messages call the path.
    path
        The file.
    comm
        Communicator of the mesh.

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        As of `read_mesh`.
    """

    def look() -> _Looked | None:
        if not path.is_file():
            raise FileNotFoundError(f"{name}: there is no file {path}")
        return _look_at_gmsh(name, path) if path.suffix.lower() == ".msh" else None

    found = on_first(comm, look)
    if found is None:
        return mesh_of(comm, lambda: _read_by_meshio(name, path))
    # In format 2 the second tag of a cell is no group of it.
    options = {"dm_plex_gmsh_multiple_tags": True} if found.version >= 4 else {}
    with OptionsManager(options, "").inserted_options():
        mesh = fd.Mesh(os.fspath(path), dim=found.coordinates, comm=comm)
    plex = mesh.topology_dm
    for group, (dimension, number) in found.groups.items():
        lacking = mesh.topological_dimension - dimension
        if lacking < len(_LABELS) and plex.hasLabel(_LABELS[lacking]):
            plex.createLabel(group)
            if plex.getStratumSize(_LABELS[lacking], number):  # on this rank
                plex.getLabel(group).insertIS(plex.getStratumIS(_LABELS[lacking], number), number)
    return mesh


def _look_at_gmsh(name: str, path: Path) -> _Looked:
    """What a file has; an error where a label domain cannot have its cells."""
    try:
        # By default PETSc keeps as many coordinates as the cells have dimensions.
        with OptionsManager({"dm_plex_gmsh_spacedim": 3}, "").inserted_options():
            plex = PETSc.DMPlex().createFromFile(os.fspath(path), comm=PETSc.COMM_SELF)
    except PETSc.Error as error:
        raise ValueError(f"{name}: PETSc cannot read {path} as a mesh of Gmsh ({error}); try gmsh -format msh2") from error
    kinds = {plex.getCellType(cell) for cell in range(*plex.getHeightStratum(0))}
    if len(kinds) != 1:
        names = sorted(each.lower() for each, kind in vars(PETSc.DM.PolytopeType).items() if kind in kinds)
        raise ValueError(
            f"{name}: expected cells of one kind, {path} has {' and '.join(names) or 'none'}; mesh with triangles or "
            f"tetrahedra alone, or recombine all"
        )
    first, last = plex.getDepthStratum(0)
    points = plex.getCoordinatesLocal().array_r.reshape(-1, 3)
    if len(points) != last - first:
        raise ValueError(
            f"{name}: expected straight cells, {path} has curved ones, of order 2 or more; write it with gmsh -order 1, and "
            f"give more cells where the boundary bends"
        )
    dimension = plex.getDimension()
    facet, share = max(((f, plex.getSupportSize(f)) for f in range(*plex.getHeightStratum(1))), key=lambda of: of[1])
    if share > 2 and dimension > 1:
        corners = [point for point in plex.getTransitiveClosure(facet)[0] if first <= point < last]
        raise ValueError(
            f"{name}: expected facets of one or two cells, {path} has one of {share} with the corners "
            f"{points[np.array(corners) - first].round(6).tolist()}: the surface branches there, or cells are written twice, "
            f"as format 2.2 does with cells in two physical groups"
        )
    return _Looked(needed_coordinates(points, dimension), *_groups(name, path))


def _groups(name: str, path: Path) -> tuple[int, dict[str, tuple[int, int]]]:
    """The major version of a file of Gmsh, and dimension and number of each physical group by its name."""
    content = path.read_bytes()  # these sections are text, whatever the others are
    version = int(re.search(rb"\$MeshFormat\s+(\d+)", content).group(1))
    section = re.search(rb"\$PhysicalNames\s+\d+\s+(.*?)\$EndPhysicalNames", content, flags=re.DOTALL)
    groups: dict[str, tuple[int, int]] = {}
    for dimension, number, group in re.findall(rb'(\d+)\s+(\d+)\s+"([^"]+)"', section.group(1)) if section else ():
        group = group.decode(errors="replace")
        if group in LABELS_OF_MESHES:
            raise ValueError(
                f"{name}: expected other names of physical groups than {group!r}, which PETSc uses itself; rename it in {path}"
            )
        # Of two groups of one name that with more dimensions.
        groups[group] = max(groups.get(group, (-1, 0)), (int(dimension), int(number)))
    return version, groups


def _read_by_meshio(name: str, path: Path) -> CellList:
    """The cells of a file of another format that have the most dimensions."""
    try:
        meshio = import_module("meshio")
    except ImportError as error:
        raise ImportError(f"{name}: {path.name} is no file .msh, and other formats need meshio: pip install meshio") from error
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            given = meshio.read(path)
    except (Exception, SystemExit) as error:  # it raises what its readers do, and ends the process where none takes the file
        why = " ".join(said.getvalue().split()) or str(error)
        hint = "; a .geo file is no mesh yet: gmsh -2 makes one of it" if path.suffix == ".geo" else ""
        raise ValueError(f"{name}: meshio cannot read {path.name} ({why}){hint}") from error
    blocks = [block for block in given.cells if len(block.data) and block.type != "vertex"]
    dimension = max((block.dim for block in blocks), default=0)
    kinds = {block.type for block in blocks if block.dim == dimension}
    if len(kinds) != 1 or not kinds <= set(_CELLS):
        raise ValueError(
            f"{name}: expected straight cells of one kind ({', '.join(_CELLS)}), {path.name} has "
            f"{' and '.join(sorted(kinds)) or 'none'}"
        )
    points = np.asarray(given.points, dtype=float)
    cells = np.concatenate([block.data for block in blocks if block.type in kinds]).astype(int)
    if path.suffix.lower() == ".stl":  # each triangle has corners of its own
        points, number = np.unique(points, axis=0, return_inverse=True)
        cells = number.reshape(-1)[cells]
    return CellList(name, dimension, points[:, : needed_coordinates(points, dimension)], cells)
