"""Label domains from what a user has: a mesh in a file, a surface, a picture's mask, a cloud of points, a graph.

Each becomes a mesh of cells, on which `LabelSpace` puts nodes and weights. Continuous functions of degree 1, the default, have
positive weights on every kind of cell, and gradients. A graph that lies in space is a mesh of edges, which may branch:
functions are continuous where edges meet, and slopes of Laplace eigenfunctions add up to 0 there. A graph of edge weights
alone has its vertices as nodes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import firedrake as fd
import numpy as np
import scipy.sparse
from mpi4py import MPI
from scipy.spatial import Delaunay, QhullError

from fem_resnet.arguments import instance, integer, number, real_array, text
from fem_resnet.label_domain.cell_lists import CellList, mesh_of, simplex_sizes
from fem_resnet.label_domain.images import Extent
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.mesh_file import mesh_in_file
from fem_resnet.label_domain.points import point_space
from fem_resnet.ranks import same, together

__all__ = ["label_domain"]

#: A cell of a cloud that is as flat as this lies on its hull, where points are in line up to round-off.
_ON_THE_HULL = 1e-9


def label_domain(
    source: str | Path | fd.MeshGeometry | np.ndarray | scipy.sparse.sparray,
    family: str = "CG",
    degree: int = 1,
    *,
    extent: tuple[float, float, float, float] | None = None,
    reach: float | None = None,
    comm: MPI.Comm = MPI.COMM_WORLD,
) -> LabelSpace:
    """The label domain of a file, a mesh, a mask, points or a graph. Collective over `comm`, or that of a mesh.

    Parameters
    ----------
    source
        The same on every rank; one of these:

        - the name of a Gmsh file ``.msh`` (`read_mesh`), whose edges may branch; or of a file that meshio reads, such as
          ``.ply``, ``.obj``, ``.stl`` or ``.vtu``, with straight cells of one kind;
        - a mesh of Firedrake;
        - the mask of an image, shape (rows, columns), of bools, row 0 on top: each pixel that is True is a square cell;
        - points of a domain on the line, in the plane or in space, shape (points, d), d = 1, 2 or 3: the cells are those of
          Delaunay, between the points; the nodes are the points, in another order (see the example);
        - a graph: its edge weights A >= 0, a sparse symmetric matrix of shape (K, K). Each of the K points has the weight 1;
          `point_space` takes other weights.
    family, degree
        The element, as for `firedrake.FunctionSpace`; none for a graph.
    extent
        Of a mask: (left, right, bottom, top), shape (4,), where its edges are. If left out, a pixel has the side 1.
    reach
        Of points: cells whose circumscribed circle or sphere has a larger radius are left out, so that the domain may have
        holes and bays (an alpha shape). If left out, the domain is the convex hull.
    comm
        Communicator.

    Returns
    -------
    LabelSpace
        Its mesh is ``Y.V.mesh()``; `Part` finds the parts that a Gmsh file names.

    Raises
    ------
    TypeError, ValueError
        If the source is none of these, its cells make no mesh, or `LabelSpace` refuses the element; if an option is given that
        the source has no use for; if an argument differs between ranks. On all ranks alike.
    FileNotFoundError
        If there is no such file.
    ImportError
        If a file needs meshio, and that is not installed.

    Examples
    --------
    >>> label_domain("meshes/letter.msh")
    LabelSpace(382 nodes, <CG1 on a triangle>, |Y| = 1.77146)
    >>> import numpy as np
    >>> ring = np.ones((3, 3), dtype=bool)
    >>> ring[1, 1] = False
    >>> label_domain(ring, "DG", 0, extent=(0, 6, 0, 6)).weights.round(9).tolist()
    [4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]

    Data at the points of a cloud become a batch by the nearest point of each node:

    >>> from scipy.spatial import KDTree
    >>> points = np.random.default_rng(0).random((40, 2))
    >>> Y = label_domain(points)
    >>> f = Y.batch(points[KDTree(points).query(Y.coordinates)[1]])
    >>> bool(np.array_equal(Y.values(f), Y.coordinates))
    True
    """
    instance("comm", comm, MPI.Comm, "give firedrake.COMM_WORLD or firedrake.COMM_SELF")
    if isinstance(source, fd.MeshGeometry):
        comm = source.comm
    same(comm, source=source, family=family, degree=degree, extent=extent, reach=reach)
    text("family", family)
    integer("degree", degree, least=0)
    _refuse_unused(source, extent=extent, reach=reach)
    found = _found(source, extent, reach, comm)
    if isinstance(found, fd.MeshGeometry):
        return LabelSpace(_space(found, family, degree))
    if (family, degree) != ("CG", 1):
        raise ValueError(
            f"family: expected no element for a graph, whose nodes are its vertices, got {family!r} of degree {degree}"
        )
    return found


def _kind(source: Any) -> str:
    """What a source is; an error if it is nothing of which a label domain can be made."""
    instance(
        "source",
        source,
        (str, os.PathLike, fd.MeshGeometry, np.ndarray, list, tuple, scipy.sparse.sparray, scipy.sparse.spmatrix),
        "see label_domain for what each is",
    )
    if isinstance(source, fd.MeshGeometry):
        return "a mesh"
    if isinstance(source, (str, os.PathLike)):
        return "a file"
    if scipy.sparse.issparse(source):
        return "a graph"
    try:
        return "a mask" if np.ma.asarray(source).dtype == bool else "points"
    except ValueError:  # a list with rows of different lengths, which the check of points refuses
        return "points"


def _refuse_unused(source: Any, **given: Any) -> None:
    kind = _kind(source)
    for name, of in (("extent", "a mask"), ("reach", "points")):
        if given[name] is not None and kind != of:
            raise ValueError(f"{name}: expected None, as it is for {of}, got {given[name]!r} for {kind}")


def _found(source: Any, extent: Any, reach: Any, comm: MPI.Comm) -> fd.MeshGeometry | LabelSpace:
    """The mesh of a source; of a graph its label space. Collective."""
    match _kind(source):
        case "a mesh":
            return source
        case "a file":
            return mesh_in_file("source", Path(source), comm)
        case "a graph":
            if source.shape[0] < 1:
                raise ValueError(f"source: expected a matrix of shape (K, K), got {source.shape}")
            try:
                return point_space(np.ones(source.shape[0]), graph=source, comm=comm)
            except (TypeError, ValueError) as error:
                raise type(error)(str(error).replace("graph", "source", 1)) from error
        case "a mask":
            mask = _mask(source)
            edges = Extent((0, mask.shape[1], 0, mask.shape[0]) if extent is None else extent)
            return mesh_of(comm, lambda: _pixels(mask, edges))
        case _:
            points = _points(source)
            radius = np.inf if reach is None else number("reach", reach, above=0)
            return mesh_of(comm, lambda: _between(points, radius))


def _space(mesh: fd.MeshGeometry, family: str, degree: int) -> fd.functionspaceimpl.WithGeometry:
    def make() -> fd.functionspaceimpl.WithGeometry:
        try:
            return fd.FunctionSpace(mesh, family, degree)
        except Exception as error:  # whatever UFL and FInAT say of an element
            raise ValueError(
                f"family: expected an element that Firedrake has on {mesh.ufl_cell()}, got {family!r} of degree {degree} "
                f"({error})"
            ) from error

    return together(mesh.comm, make)


def _mask(source: Any) -> np.ndarray:
    if np.ma.is_masked(source):
        raise ValueError("source: expected True or False for each pixel, got masked entries; fill them with .filled")
    mask = np.asarray(source)
    if mask.ndim != 2 or not mask.any():
        what = f"shape {mask.shape}" if mask.ndim != 2 else "one without"
        raise ValueError(f"source: expected a mask of shape (rows, columns) with a pixel that is True, got {what}")
    return mask


def _pixels(mask: np.ndarray, edges: Extent) -> CellList:
    """A square a pixel, where the mask is True."""
    m, n = mask.shape
    y, x = np.linspace(edges.top, edges.bottom, m + 1), np.linspace(edges.left, edges.right, n + 1)
    points = np.stack(np.meshgrid(x, y), axis=2).reshape(-1, 2)
    row, column = np.nonzero(mask)
    corner = row * (n + 1) + column
    return CellList("source", 2, points, corner[:, None] + [0, n + 1, n + 2, 1])


def _points(source: Any) -> np.ndarray:
    points = real_array("source", source, ("points", "d"))
    size, d = points.shape
    if d > 3 or size <= d:
        more = "; a graph is given as a sparse matrix, scipy.sparse.csr_array(A)" if size == d else ""
        raise ValueError(
            f"source: expected points of shape (points, d), d = 1, 2 or 3, and more than d of them, got {points.shape}{more}; "
            f"for points of other spaces give a graph of neighbours"
        )
    if len(np.unique(points, axis=0)) < size:
        raise ValueError(
            "source: expected points at different places, got some twice; numpy.unique(points, axis=0) leaves them out"
        )
    return points


def _between(points: np.ndarray, radius: float) -> CellList:
    """The cells between points whose circumscribed sphere is not larger."""
    d = points.shape[1]
    if d == 1:
        order = np.argsort(points[:, 0])
        cells = np.column_stack([order[:-1], order[1:]])
        radii = np.diff(points[order, 0]) / 2
    else:
        centre, size = points.mean(axis=0), np.ptp(points, axis=0).max()
        try:
            found = Delaunay((points - centre) / size)
        except QhullError as error:
            raise ValueError(f"source: expected points that span {d} dimensions, got some on a line or a plane") from error
        if len(found.coplanar):
            raise ValueError(
                f"source: expected points that round-off tells apart, got {len(found.coplanar)} of {len(points)} in the place "
                f"of others; leave them out"
            )
        volumes, longest = simplex_sizes(points[found.simplices])
        cells = found.simplices[volumes > _ON_THE_HULL * longest**d]
        radii = _circumradii(points[cells])
    kept = cells[radii <= radius]
    alone = len(points) - len(np.unique(kept))
    if alone:
        raise ValueError(
            f"reach: expected a radius with which each point is in a cell, got {radius:g}, which leaves {alone} of "
            f"{len(points)} in none; take a larger one, or leave these points out"
        )
    return CellList("source", d, points, kept)


def _circumradii(corners: np.ndarray) -> np.ndarray:
    """Of simplices, shape (cells,): the centre c has 2 (p_k - p_0) . (c - p_0) = |p_k - p_0|^2 for all corners p_k."""
    edges = corners[:, 1:] - corners[:, :1]
    return np.linalg.norm(np.linalg.solve(2 * edges, (edges**2).sum(axis=2)[:, :, None])[:, :, 0], axis=1)
