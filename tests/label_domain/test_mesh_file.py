"""Meshes from Gmsh files: read as they are, or refused at once on all ranks."""

import subprocess
import sys

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import MESHES, without_mpi

from fem_resnet import LabelSpace, laplace_basis, read_mesh

on_ranks = pytest.mark.parallel([1, 2, 3])
#: Gmsh's numbers of the kinds of cells.
INTERVAL, TRIANGLE, QUADRILATERAL, CURVED_TRIANGLE = 1, 2, 3, 9


def write(path, points, cells):
    """A file of format 2.2 from points (n, 3) and cells (kind, numbers of points from 1)."""
    lines = ["$MeshFormat", "2.2 0 8", "$EndMeshFormat", "$Nodes", str(len(points))]
    lines += [f"{k} {x:.17g} {y:.17g} {z:.17g}" for k, (x, y, z) in enumerate(points, start=1)]
    lines += ["$EndNodes", "$Elements", str(len(cells))]
    lines += [f"{k} {kind} 2 1 1 {' '.join(map(str, nodes))}" for k, (kind, *nodes) in enumerate(cells, start=1)]
    if COMM_WORLD.rank == 0:
        path.write_text("\n".join([*lines, "$EndElements", ""]))
    COMM_WORLD.barrier()
    return path


def torus(n=12, m=8):
    """A torus of radii 1 and 0.4 around the z axis, in triangles."""
    a, b = np.meshgrid(2 * np.pi * np.arange(n) / n, 2 * np.pi * np.arange(m) / m, indexing="ij")
    points = np.stack([(1 + 0.4 * np.cos(b)) * np.cos(a), (1 + 0.4 * np.cos(b)) * np.sin(a), 0.4 * np.sin(b)], axis=-1)

    def number(i, j):
        return 1 + (i % n) * m + j % m

    cells = []
    for i in range(n):
        for j in range(m):
            corners = number(i, j), number(i + 1, j), number(i + 1, j + 1), number(i, j + 1)
            cells += [(TRIANGLE, *corners[:3]), (TRIANGLE, corners[0], *corners[2:])]
    return points.reshape(-1, 3), cells


#: Two unit squares side by side at height z, of which the second may be two triangles.
CORNERS = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
MIXED = [(QUADRILATERAL, 1, 2, 5, 4), (TRIANGLE, 2, 3, 5), (TRIANGLE, 3, 6, 5)]


def at_height(z):
    return [(x, y, z) for x, y in CORNERS]


@on_ranks
def test_a_closed_surface_keeps_its_third_coordinate(tmp_path):
    mesh = read_mesh(write(tmp_path / "torus.msh", *torus()), COMM_WORLD)
    Y = LabelSpace(fd.FunctionSpace(mesh, "CG", 1))
    assert (mesh.topological_dimension, mesh.geometric_dimension) == (2, 3)
    # The area of a polyhedron in the torus is a little less than 4 pi^2 0.4.
    assert 0.85 < Y.measure / (4 * np.pi**2 * 0.4) < 1
    assert laplace_basis(Y, 3).eigenvalues[0] == pytest.approx(0, abs=1e-10)


@on_ranks
@pytest.mark.parametrize("z", [0.0, 3.0])
def test_a_flat_mesh_keeps_two_coordinates_at_any_height(z, tmp_path):
    cells = [(QUADRILATERAL, 1, 2, 5, 4), (QUADRILATERAL, 2, 3, 6, 5)]
    mesh = read_mesh(write(tmp_path / "flat.msh", at_height(z), cells), COMM_WORLD)
    assert mesh.geometric_dimension == 2
    assert LabelSpace(fd.FunctionSpace(mesh, "DG", 0)).measure == pytest.approx(2.0, rel=1e-14)


@on_ranks
@pytest.mark.parametrize("name, dimension, measure", [("polygon.msh", 2, 2.385), ("block.msh", 3, 0.625)])
def test_a_file_is_read_as_firedrake_reads_it(name, dimension, measure):
    mesh = read_mesh(MESHES / name, COMM_WORLD)
    assert mesh.geometric_dimension == dimension
    if COMM_WORLD.size == 1:  # on several the partition may be another one each time
        assert np.array_equal(mesh.coordinates.dat.data_ro, fd.Mesh(str(MESHES / name)).coordinates.dat.data_ro)
    assert LabelSpace(fd.FunctionSpace(mesh, "DG", 0)).measure == pytest.approx(measure, rel=1e-12)


def curve(path):
    """One triangle with a node in the middle of each edge, one of them moved outwards."""
    points = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0.5, 0, 0), (0.6, 0.6, 0), (0, 0.5, 0)]
    return write(path, points, [(CURVED_TRIANGLE, 1, 2, 3, 4, 5, 6)])


def damaged(path):
    write(path, *torus())
    if COMM_WORLD.rank == 0:
        path.write_text(path.read_text()[:700])
    COMM_WORLD.barrier()
    return path


def named(path):
    write(path, *torus())
    if COMM_WORLD.rank == 0:
        group = '$PhysicalNames\n1\n2 1 "depth"\n$EndPhysicalNames\n'
        path.write_text(path.read_text().replace("$Nodes", group + "$Nodes"))
    COMM_WORLD.barrier()
    return path


def twice(path):
    points, cells = torus()
    return write(path, points, cells + cells)


REFUSED = {
    "cells of two kinds": (
        lambda path: write(path, at_height(0), MIXED),
        ValueError,
        "expected cells of one kind, .* quadrilateral and triangle",
    ),
    "curved cells": (curve, ValueError, "expected straight cells"),
    "a damaged file": (damaged, ValueError, "PETSc cannot read"),
    "no file": (lambda path: path, FileNotFoundError, "there is no file"),
    "a name that PETSc has": (named, ValueError, "expected other names of physical groups than 'depth'"),
    "cells written twice": (twice, ValueError, "expected facets of one or two cells, .* has one of 4"),
    "no path": (lambda path: 3, TypeError, "expected a str or PathLike, got int"),
}


@on_ranks
@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_label_domain_can_be_made_of_is_refused_on_all_ranks(kind, tmp_path):
    make, error, message = REFUSED[kind]
    path = make(tmp_path / "given.msh")
    with pytest.raises(error, match=f"^path: {message}"):
        read_mesh(path, COMM_WORLD)


@pytest.mark.parallel([2, 3])
def test_another_path_on_one_rank_is_refused_on_all(tmp_path):
    path = MESHES / ("polygon.msh" if COMM_WORLD.rank else "block.msh")
    with pytest.raises(ValueError, match="^path: all ranks must give the same"):
        read_mesh(path, COMM_WORLD)


def test_under_mpi4py_an_error_on_one_rank_alone_ends_all(alone, tmp_path):
    """Firedrake raises on the rank that has a cell of the other kind, and not on the other one, which waits for it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "import firedrake as fd\n"
        "from fem_resnet import LabelSpace\n"
        f"mesh = fd.Mesh({str(write(tmp_path / 'mixed.msh', at_height(0), MIXED))!r})\n"
        "print(LabelSpace(fd.FunctionSpace(mesh, 'CG', 1)))\n"
    )
    command = ["mpiexec", "--oversubscribe", "-n", "2", sys.executable, "-m", "mpi4py", str(script)]
    done = subprocess.run(command, env=without_mpi(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "Error" in done.stderr
