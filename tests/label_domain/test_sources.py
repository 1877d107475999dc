"""Label domains from files, masks, points and graphs; edge cases: pieces, periods, one cell, graded cells, idle ranks."""

import re

import firedrake as fd
import numpy as np
import pytest
import scipy.sparse
from firedrake import COMM_SELF, COMM_WORLD
from helpers import MESHES, Polygon, smooth
from numpy.testing import assert_allclose

from fem_resnet import Layers, Part, ResidualNetwork, laplace_basis
from fem_resnet.label_domain.sources import label_domain

on_ranks = pytest.mark.parallel([1, 2, 3])

#: Half a tooth of sixteen, from the angles of meshes/gear.geo.
HALF, FLANK, TIP = np.pi / 8, 0.60 * np.pi / 8, 0.38 * np.pi / 8
ROOT = 0.76 * np.cos(HALF - FLANK)
TOOTH = Polygon(
    [(0.3, 0), (np.cos(TIP), 0), (np.cos(TIP), np.sin(TIP)), (0.76 * np.cos(FLANK), 0.76 * np.sin(FLANK))]
    + [(size * np.cos(HALF), size * np.sin(HALF)) for size in (ROOT, 0.3)]
)
HALF_CIRCLES = np.pi / 2 * (0.55**2 + 0.45**2 - 0.25**2 - 0.2**2)

#: The measure of each domain in `meshes`, and by which part of it the mesh may be smaller, as its edges cut corners.
DOMAINS = {
    "annulus": (np.pi * 0.84, 5e-3),
    "block": (0.625, 1e-12),
    "body": (1.2 - 0.6 * np.pi * 0.09, -0.02),  # a bore with corners is too narrow
    "disk": (np.pi, 5e-3),
    "gear": (16 * TOOTH.integral(lambda x, y: x), 1e-12),
    "graph": (12 + 8 * 0.75**0.5 + np.sqrt(0.9**2 + 0.4**2 + 0.2**2), 1e-12),
    "l_shape": (3.0, 1e-12),
    "letter": (0.75 * 2 - 0.4 * (0.5 + 0.4) + HALF_CIRCLES, 5e-3),
    "plate": (1.92, 2e-3),
    "polygon": (2.385, 1e-12),
    "sphere": (4 * np.pi, 0.02),
    "torus": (4 * np.pi**2 * 0.4, 0.02),
}


def test_each_mesh_has_its_source_its_picture_its_row_and_the_measure_of_its_domain():
    table = (MESHES / "README.md").read_text()
    assert {path.stem for path in MESHES.glob("*.geo")} == set(DOMAINS) == {path.stem for path in MESHES.glob("*.msh")}
    for name, (measure, cut) in DOMAINS.items():
        path = MESHES / f"{name}.msh"
        assert path.stat().st_size < 150_000
        assert (MESHES.parent / "docs" / "figures" / "meshes" / f"{name}.png").is_file()
        Y = label_domain(path)
        low, high = sorted((measure * (1 - cut), measure))
        assert low * (1 - 1e-9) <= Y.measure <= high * (1 + 1e-9), name
        points, cells = re.search(rf"\| `{name}.msh` \|.*\| (\d+) \| (\d+) \w+ \|", table).groups()
        assert (int(points), int(cells)) == (Y.size, Y.V.mesh().num_cells())
        names = re.search(rf"\| `{name}.msh` \|.*\| ([^|]*) \|\n", table).group(1)
        assert [Part(Y, which.strip()).space.size > 0 for which in re.split("[,;]", names)]


@on_ranks
def test_a_graph_in_space_is_a_label_domain_whose_edges_branch():
    Y, alone = (label_domain(MESHES / "graph.msh", "CG", 3, comm=comm) for comm in (COMM_WORLD, COMM_SELF))
    phi, there = laplace_basis(Y, 5), laplace_basis(alone, 5)
    assert_allclose(phi.project(smooth(Y)), there.project(smooth(alone)), rtol=0, atol=1e-9)


@on_ranks
def test_a_star_has_its_eigenvalues(tmp_path):
    """Of three edges of length 1: (k pi / 2)^2, for odd k twice."""
    lines = ["$MeshFormat", "2.2 0 8", "$EndMeshFormat", "$Nodes", "31"]
    ends = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    points = np.concatenate([np.zeros((1, 3)), *(np.outer(np.arange(1, 11) / 10, end) for end in ends)])
    lines += [f"{k} {x:.17g} {y:.17g} {z:.17g}" for k, (x, y, z) in enumerate(points, start=1)]
    edges = [(1 if k == 0 else 1 + 10 * arm + k, 2 + 10 * arm + k) for arm in range(3) for k in range(10)]
    lines += ["$EndNodes", "$Elements", "30", *(f"{k} 1 2 1 1 {i} {j}" for k, (i, j) in enumerate(edges, start=1))]
    if COMM_WORLD.rank == 0:
        (tmp_path / "star.msh").write_text("\n".join([*lines, "$EndElements", ""]))
    COMM_WORLD.barrier()
    eigenvalues = laplace_basis(label_domain(tmp_path / "star.msh", "CG", 3), 6).eigenvalues
    assert_allclose(eigenvalues / (np.pi / 2) ** 2, [0, 1, 1, 4, 9, 9], rtol=0, atol=1e-4)


RING = np.ones((5, 5), dtype=bool)
RING[1:4, 1:4] = False


@on_ranks
def test_a_mask_is_made_of_its_pixels_row_0_on_top():
    mask = np.array([[True, True, False], [True, False, False]])
    Y = label_domain(mask, "DG", 0, extent=(0, 6, -2, 2))
    assert Y.measure == pytest.approx(12.0, rel=1e-14)
    (mean,) = Y.sum(Y.weights @ Y.coordinates)[None] / Y.measure
    assert_allclose(mean, [5 / 3, 1 / 3], rtol=1e-13)
    # A picture on the mask is what it was.
    picture = np.arange(6.0).reshape(2, 3)
    seen = Y.pixels(Y.image(picture, extent=(0, 6, -2, 2), method="mean"), (2, 3), extent=(0, 6, -2, 2))[0]
    assert_allclose(seen[mask], picture[mask], rtol=0, atol=1e-12)
    ring = label_domain(RING)
    assert ring.measure == pytest.approx(16.0, rel=1e-14)
    # A quarter turn takes the one function to the other.
    _, first, second = laplace_basis(ring, 3).eigenvalues
    assert first == pytest.approx(second, rel=1e-10) and 0.1 < first < 0.2


@on_ranks
def test_points_are_the_nodes_of_the_domain_between_them():
    x, y = np.meshgrid(np.linspace(0, 1, 6), np.linspace(0, 1, 6))
    points = np.column_stack([x.ravel(), y.ravel()])[np.random.default_rng(0).permutation(36)]
    Y = label_domain(points)
    assert Y.measure == pytest.approx(1.0, rel=1e-12) and Y.size == 36
    # Without the points inside there is a hole, which only a reach leaves open.
    outer = points[np.abs(points - 0.5).max(axis=1) > 0.25]
    assert label_domain(outer).measure == pytest.approx(1.0, rel=1e-12)
    # Triangles in its four corners have the circles of the grid's own.
    assert label_domain(outer, reach=0.15).measure == pytest.approx(1 - 0.6**2 + 4 * 0.02, rel=1e-12)
    assert label_domain(points[:, :1] + 10 * points[:, 1:]).measure == pytest.approx(11.0, rel=1e-12)
    ball = np.random.default_rng(1).normal(size=(80, 3))
    hull = label_domain(ball)
    assert hull.V.mesh().topological_dimension == 3 and hull.size == 80 and hull.measure > 10


@on_ranks
def test_a_graph_of_weights_has_its_vertices_as_nodes():
    ring = scipy.sparse.csr_array(np.roll(np.eye(12), 1, axis=0))
    Y = label_domain(ring + ring.T)
    assert Y.measure == 12.0
    assert_allclose(laplace_basis(Y, 3).eigenvalues[1:], 2 - 3**0.5, rtol=1e-10)


@on_ranks
@pytest.mark.parametrize("suffix", ["ply", "obj", "vtu", "stl"])
def test_a_surface_of_another_format_is_read_by_meshio(suffix, tmp_path):
    meshio = pytest.importorskip("meshio")
    points = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    faces = np.array([[a, b, c] for a in (0, 1) for b in (2, 3) for c in (4, 5)])
    path = tmp_path / f"octahedron.{suffix}"
    if COMM_WORLD.rank == 0:
        meshio.write_points_cells(path, points, [("triangle", faces)])
    COMM_WORLD.barrier()
    Y = label_domain(path)
    assert (Y.size, Y.V.mesh().geometric_dimension) == (6, 3)
    assert Y.measure == pytest.approx(4 * 3**0.5, rel=1e-6)  # numbers in some of these files are single


@on_ranks
def test_hexahedra_and_tetrahedra_of_other_formats_keep_their_volume(tmp_path):
    meshio = pytest.importorskip("meshio")
    cube = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]], dtype=float)
    two = np.concatenate([cube, cube[[1, 2, 5, 6]] + [1, 0, 0]])
    blocks = {
        "hexahedron": [[0, 1, 2, 3, 4, 5, 6, 7], [1, 8, 9, 2, 5, 10, 11, 6]],
        "tetra": [[0, 1, 2, 5], [0, 2, 3, 7], [0, 5, 7, 4], [2, 5, 6, 7], [0, 2, 5, 7]],
    }
    for kind, cells in blocks.items():
        if COMM_WORLD.rank == 0:
            meshio.write_points_cells(tmp_path / f"{kind}.vtu", two, [(kind, np.array(cells)), ("triangle", [[0, 1, 2]])])
        COMM_WORLD.barrier()
        measure = label_domain(tmp_path / f"{kind}.vtu").measure
        assert measure == pytest.approx(2.0 if kind == "hexahedron" else 1.0, rel=1e-12)


# -- edge cases --------------------------------------------------------------------------------------------------------


def one_cell():
    return label_domain(np.array([[0.0, 0], [1, 0], [0, 1]]))


def graded():
    """Rectangles whose first column is thinner than the last by a factor of a million."""
    mesh = label_domain(np.ones((4, 40), dtype=bool)).V.mesh()
    x = np.concatenate([[0.0], np.cumsum(np.geomspace(1.0, 1e6, 40))])
    coordinates = mesh.coordinates.dat.data_ro_with_halos.copy()
    coordinates[:, 0] = (x / x[-1])[np.rint(coordinates[:, 0]).astype(int)]
    mesh.coordinates.dat.data_wo_with_halos[:] = coordinates
    return label_domain(mesh)


def pieces():
    return label_domain(np.array([[True, False, True, True], [True, False, True, True]]))


def corner_to_corner():
    return label_domain(np.array([[True, False], [False, True]]))


#: What is made, its measure, and how many eigenvalues are 0: one a piece.
EDGES = {
    "one cell": (one_cell, 0.5, 1),
    "cells graded by 1e6": (graded, 4.0, 1),
    "pieces": (pieces, 6.0, 2),
    "cells that touch in a corner": (corner_to_corner, 2.0, 1),
    "periodic": (lambda: label_domain(fd.PeriodicRectangleMesh(5, 4, 2.0, 3.0)), 6.0, 1),
}


@on_ranks
@pytest.mark.parametrize("kind", EDGES)
def test_an_edge_case_makes_a_network(kind):
    """On some ranks there is no cell."""
    make, measure, zeros = EDGES[kind]
    Y = make()
    assert Y.measure == pytest.approx(measure, rel=1e-12)
    phi = laplace_basis(Y, 3)
    assert np.count_nonzero(np.abs(phi.eigenvalues) < 1e-8 * phi.eigenvalues[-1]) == zeros
    assert_allclose(phi.gram, np.eye(3), rtol=0, atol=1e-10)
    net = ResidualNetwork(phi, bias=phi, layers=Layers(2, 1.0), activation="tanh")
    for layer in range(2):
        net.kernel.set(layer, np.eye(3))
        net.bias.set(layer, np.ones(3))
    f = net(Y.batch(smooth(Y)))
    assert np.isfinite(Y.norm(f)) and Y.norm(f) > 0


# -- what is refused ---------------------------------------------------------------------------------------------------

SQUARE = np.array([[0.0, 0], [1, 0], [0, 1], [1, 1]])
REFUSED = {
    "nothing": (None, {}, TypeError, "source: expected a str or PathLike"),
    "no such file": ("no_such.msh", {}, FileNotFoundError, "source: there is no file"),
    "an empty mask": (np.zeros((3, 3), bool), {}, ValueError, "source: expected a mask .* with a pixel that is True"),
    "voxels": (np.ones((3, 3, 3), bool), {}, ValueError, r"source: expected a mask of shape \(rows, columns\)"),
    "points in four dimensions": (np.ones((9, 4)), {}, ValueError, "source: expected points of shape .* give a graph"),
    "a dense graph": (np.ones((4, 4)), {}, ValueError, "source: .* a graph is given as a sparse matrix"),
    "points twice": (SQUARE[[0, 1, 2, 0]], {}, ValueError, "source: expected points at different places"),
    "points on a line": (np.outer(np.arange(4.0), [1, 2]), {}, ValueError, "source: expected points that span 2"),
    "a reach that is too short": (SQUARE, {"reach": 0.1}, ValueError, "reach: expected a radius with which each point"),
    "a reach of a mask": (RING, {"reach": 1.0}, ValueError, "reach: expected None, .* for a mask"),
    "an extent of points": (SQUARE, {"extent": (0, 1, 0, 1)}, ValueError, "extent: expected None, .* for points"),
    "no such element": (SQUARE, {"family": "no such"}, ValueError, "family: expected an element"),
    "an element without positive weights": (SQUARE, {"degree": 2}, ValueError, "V: expected positive weights"),
    "an element on a graph": (scipy.sparse.eye_array(3).tocsr(), {"degree": 2}, ValueError, "family: expected no element"),
    "a graph that is not symmetric": (scipy.sparse.eye_array(3, k=1).tocsr(), {}, ValueError, "source: expected a symmetric"),
}  # fmt: skip


@on_ranks
@pytest.mark.parametrize("kind", REFUSED)
def test_what_makes_no_label_domain_is_refused_on_all_ranks(kind):
    source, options, error, message = REFUSED[kind]
    with pytest.raises(error, match=f"^{message}"):
        label_domain(source, **options)


FILES = {
    "a triangle without an area": ([[0, 1, 2]], [[0.0, 0, 0], [1, 0, 0], [2, 0, 0]], "expected cells with a volume"),
    "three triangles at one edge": (
        [[0, 1, 2], [0, 1, 3], [0, 1, 4]], [[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1]],
        "expected facets of one or two cells, got one of 3",
    ),
}  # fmt: skip


@on_ranks
@pytest.mark.parametrize("kind", FILES)
def test_cells_that_make_no_mesh_are_refused(kind, tmp_path):
    meshio = pytest.importorskip("meshio")
    cells, points, message = FILES[kind]
    if COMM_WORLD.rank == 0:
        meshio.write_points_cells(tmp_path / "given.ply", np.array(points), [("triangle", np.array(cells))])
    COMM_WORLD.barrier()
    with pytest.raises(ValueError, match=f"^source: {message}"):
        label_domain(tmp_path / "given.ply")


@on_ranks
def test_without_meshio_a_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "meshio", None)
    if COMM_WORLD.rank == 0:
        (tmp_path / "given.ply").write_text("ply\n")
    COMM_WORLD.barrier()
    with pytest.raises(ImportError, match="^source: given.ply is no file .msh, and other formats need meshio: pip install"):
        label_domain(tmp_path / "given.ply")
