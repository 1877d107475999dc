"""Laplace bases on meshes x ranks x units: functions of fixed coefficients depend on Y and its unit of length alone."""

from functools import cache

import firedrake as fd
import numpy as np
import pytest
import scipy.sparse
from firedrake import COMM_SELF, COMM_WORLD, assemble, cos, dx, grad, inner
from helpers import DOMAINS, smooth
from numpy.testing import assert_allclose

from fem_resnet import (
    Basis,
    Batch,
    LabelSpace,
    Layers,
    LearningProblem,
    ResidualNetwork,
    laplace_basis,
    least_squares,
    load,
    point_space,
    save,
    smooth_in_space,
)
from fem_resnet.verify import verify

on_ranks = pytest.mark.parallel([1, 2, 3])


def pieces(n, comm, count=2):
    """Squares that do not touch each other."""
    grid = np.linspace(0, 1, 3 * n + 1)
    square = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=2).reshape(-1, 2)
    number = np.arange(len(square)).reshape(len(grid), -1)
    a, b, c, d = (part.ravel() for part in (number[:-1, :-1], number[1:, :-1], number[1:, 1:], number[:-1, 1:]))
    cells = np.concatenate([np.stack([a, b, c], axis=1), np.stack([a, c, d], axis=1)])
    vertices = np.concatenate([square + [1.2 * k, 0] for k in range(count)])
    cells = np.concatenate([cells + k * len(square) for k in range(count)])
    return fd.Mesh(fd.mesh.plex_from_cell_list(2, cells, vertices, comm), comm=comm)


#: How a mesh is made, how many eigenfunctions (no repeated eigenvalue is cut), and the periods of Y, 0 for none.
MESHES = {
    "disk": (lambda n, comm: fd.UnitDiskMesh(n, comm=comm), 6, ()),
    "annulus": (lambda n, comm: fd.AnnulusMesh(1, 0.4, 3 * n, 12 * n, comm=comm), 5, ()),
    "sphere": (lambda n, comm: fd.UnitIcosahedralSphereMesh(n, comm=comm), 9, ()),
    "cubed sphere": (lambda n, comm: fd.UnitCubedSphereMesh(n, comm=comm), 9, ()),
    "torus": (lambda n, comm: fd.TorusMesh(10 * n, 6 * n, 3.0, 1.0, comm=comm), 5, ()),
    "square of quads": (lambda n, comm: fd.UnitSquareMesh(4 * n, 4 * n, quadrilateral=True, comm=comm), 6, ()),
    "prisms round a hole": (DOMAINS["prisms on the polygon"], 5, ()),
    "pieces": (pieces, 6, ()),
    "circle": (lambda n, comm: fd.PeriodicIntervalMesh(8 * n, 3.0, comm=comm), 5, (3.0,)),
    "flat torus": (lambda n, comm: fd.PeriodicSquareMesh(6 * n, 6 * n, 2.0, comm=comm), 5, (2.0, 2.0)),
    "rectangle of periodic quads": (
        lambda n, comm: fd.PeriodicRectangleMesh(5 * n, 6 * n, 2.0, 3.0, quadrilateral=True, comm=comm), 5, (2.0, 3.0),
    ),  # fmt: skip
    "cylinder": (lambda n, comm: fd.PeriodicRectangleMesh(5 * n, 6 * n, 2.0, 3.0, "x", comm=comm), 4, (2.0, 0.0)),
}  # fmt: skip
PERIODIC = [kind for kind, (_, _, periods) in MESHES.items() if periods]
#: Factors of the unit of length; the last is the Earth's radius in metres. On more ranks one factor is enough.
SCALES = {2: (1e-6,), 3: (6371220.0,)}.get(COMM_WORLD.size, (1e-6, 6371220.0))
each_basis = pytest.mark.parametrize("element", ["CG1", "DG0"])


def space(kind, element, refinement=1, scale=1.0, alone=False) -> LabelSpace:
    mesh = MESHES[kind][0](refinement, COMM_SELF if alone else COMM_WORLD)
    mesh.coordinates.assign(scale * mesh.coordinates)
    return LabelSpace(fd.FunctionSpace(mesh, element[:-1], int(element[-1])))


@cache
def basis(kind, element, scale=1.0, alone=False) -> Basis:
    return laplace_basis(space(kind, element, 1, scale, alone), MESHES[kind][1])


def network(phi: Basis) -> ResidualNetwork:
    """Fixed coefficients that stand for the same values of bias and kernel whatever the unit."""
    net = ResidualNetwork(phi, bias=phi, layers=Layers(2, 2.0, steps=2), activation="tanh")
    random = np.random.default_rng(0)
    for layer in range(net.layers):
        net.kernel.set(layer, random.normal(size=(phi.rank, phi.rank)) / phi.rank**0.5)
        net.bias.set(layer, random.normal(size=phi.rank) * (phi.Y.measure / phi.rank) ** 0.5)
    return net


@cache
def scores(kind, element, scale=1.0, alone=False) -> np.ndarray:
    """Means over Y of f(T) times fixed functions, for a fixed f_I."""
    phi = basis(kind, element, scale, alone)
    Y, frequencies = phi.Y, np.random.default_rng(3).normal(scale=2.0 / scale, size=(phi.Y.coordinates.shape[1], 5))
    fixed = np.cos(Y.coordinates @ frequencies + np.arange(5))
    f = Y.values(network(phi)(Y.batch(fixed[:, :1])))
    return Y.sum((fixed * Y.weights[:, None]).T @ f)[:, 0] / Y.measure


# -- neither the partition nor the unit ------------------------------------------------------------------------------


@on_ranks
@each_basis
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", MESHES)
def test_scores_of_fixed_coefficients_see_neither_partition_nor_unit(kind, scale, element):
    """The whole mesh on this rank alone in one unit, against the parts of all ranks in another."""
    assert_allclose(basis(kind, element, scale).gram, np.eye(MESHES[kind][1]), rtol=0, atol=1e-12)
    # Scores are of size one; the eigensolver's tolerance, over gaps between eigenvalues of a tenth of them and less.
    assert_allclose(scores(kind, element, scale), scores(kind, element, alone=True), rtol=0, atol=1e-9)


@each_basis
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", MESHES)
def test_eigenvalues_scale_as_length_to_minus_two_and_functions_as_measure_to_minus_a_half(kind, scale, element):
    one, other = basis(kind, element), basis(kind, element, scale)
    largest = one.eigenvalues[-1]
    assert_allclose(other.eigenvalues * scale**2, one.eigenvalues, rtol=0, atol=1e-10 * largest)
    assert_allclose(other.stiffness * scale**2, one.stiffness, rtol=0, atol=1e-10 * largest)
    assert_allclose(other.values * other.Y.measure**0.5, one.values * one.Y.measure**0.5, rtol=0, atol=1e-9)


@on_ranks
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_eigenvectors_of_a_graph_see_no_unit(scale):
    ring = scipy.sparse.csr_array(np.roll(np.eye(12), 1, axis=0))
    ring = ring + ring.T
    one, other = (laplace_basis(point_space(np.ones(12), graph=size * ring), 5) for size in (1.0, scale))
    assert_allclose(other.eigenvalues / scale, one.eigenvalues, rtol=0, atol=1e-12)
    fixed = np.random.default_rng(0).normal(size=(12, 4))
    assert_allclose(other.project(fixed[other.Y.numbers]), one.project(fixed[one.Y.numbers]), rtol=0, atol=1e-11)


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("kind", PERIODIC)
def test_coordinates_at_a_seam_do_not_see_the_partition(kind):
    def moments(Y):  # of jumping functions, at which no order of the nodes matters
        return Y.sum(Y.weights @ np.hstack([Y.coordinates, Y.coordinates**3, Y.coordinates[:, :1] * Y.coordinates**2]))

    assert_allclose(moments(space(kind, "CG1")), moments(space(kind, "CG1", alone=True)), rtol=1e-13)


# -- on other meshes -------------------------------------------------------------------------------------------------


def waves(Y, kind, fractions) -> np.ndarray:
    """Smooth functions on Y, which the seam does not cut."""
    x = fd.SpatialCoordinate(Y.V.mesh())
    periods = MESHES[kind][2] or (0.0,) * len(x)
    of = [2 * np.pi / period if period else 1.3 for period in periods]
    functions = [cos(sum(n * k * z for n, k, z in zip(numbers, of, x)) + 0.3 + sum(numbers)) for numbers in fractions]
    return np.column_stack([fd.Function(Y.V).interpolate(f).dat.data_ro for f in functions])


@cache
def original(kind, element) -> ResidualNetwork:
    return network(laplace_basis(space(kind, element, 2), MESHES[kind][1]))


@cache
def moved_moments(kind, element, refinement) -> np.ndarray:
    net = original(kind, element)
    Y = space(kind, element, refinement)
    numbers = [[a] + [b] * (len(MESHES[kind][2] or (0, 0)) - 1) for a in (0, 1, 2) for b in (0, 1)]
    f = Y.values(net.on(Y)(Y.batch(waves(Y, kind, [numbers[1], numbers[3]]).sum(axis=1))))
    return Y.sum((waves(Y, kind, numbers) * Y.weights[:, None]).T @ f)[:, 0]


@each_basis
@pytest.mark.parametrize("kind", [*PERIODIC, "pieces"])
def test_a_network_moved_to_finer_periodic_meshes_converges(kind, element):
    """At the order of the quadrature: on three meshes, each with half the mesh size of the one before."""
    coarse, middle, fine = (moved_moments(kind, element, n) for n in (3, 6, 12))
    order = np.log2(np.linalg.norm(middle - coarse) / np.linalg.norm(fine - middle))
    assert order > 1.7, f"expected differences fall with order {order:.2f}, 2"


@on_ranks
@pytest.mark.parametrize("kind", ["flat torus", "pieces"])
def test_moved_eigenfunctions_keep_their_eigenvalues(kind):
    """Functions of other eigenvalues are not mixed in: constants stay constant where Y hangs together."""
    phi = laplace_basis(space(kind, "CG1", 1), MESHES[kind][1])
    moved = phi.on(space(kind, "CG1", 3))
    # Meshes of 6 cells a period, 3 a side, miss 9 and 16 per cent. The next eigenvalue is twice as large.
    assert_allclose(moved.eigenvalues, phi.eigenvalues, rtol=0, atol=0.2 * phi.eigenvalues[-1])
    assert abs(moved.eigenvalues[0]) < 1e-3 * moved.eigenvalues[-1]
    assert_allclose(moved.stiffness, moved.Y.sum(moved.values.T @ moved.Y.apply_stiffness(moved.values)), atol=1e-11 * 30)


@on_ranks
@pytest.mark.parametrize("count", [2, 7])
def test_the_null_space_of_pieces_has_one_rotation_and_moves(count):
    """As many eigenvalues 0 as pieces: waves of the frequency 0 do not tell them apart."""
    spaces = [LabelSpace(fd.FunctionSpace(pieces(1, comm, count), "CG", 1)) for comm in (COMM_WORLD, COMM_SELF)]
    phi, alone = (laplace_basis(Y, count) for Y in spaces)
    assert np.abs(phi.eigenvalues).max() < 1e-10
    assert_allclose(phi.project(smooth(phi.Y, 5)), alone.project(smooth(alone.Y, 5)), rtol=0, atol=1e-10)
    moved = phi.on(LabelSpace(fd.FunctionSpace(pieces(2, COMM_WORLD, count), "CG", 1)))
    # They are constant on every piece, where the next eigenvalue is 10. So integrals over pieces see the rotation alone.
    assert np.abs(moved.eigenvalues).max() < 1e-4
    back = moved.on(phi.Y)
    on_pieces = [
        b.Y.sum(b.weighted.T @ (np.floor(b.Y.coordinates[:, :1] / 1.2) == np.arange(count))) for b in (phi, moved, back)
    ]
    for there in on_pieces[1:]:
        assert_allclose(there, on_pieces[0], rtol=0, atol=0.1)


# -- the stiffness of rotated functions ------------------------------------------------------------------------------


@on_ranks
def test_the_stiffness_of_a_split_eigenvalue_is_that_of_its_functions():
    """On 8 x 8 squares cut by one diagonal the eigenvalue of cos 2 pi x, cos 2 pi y, .. is split, its functions rotated."""
    phi = laplace_basis(LabelSpace(fd.FunctionSpace(fd.UnitSquareMesh(8, 8), "CG", 1)), 6)
    p = [phi.function(c) for c in np.eye(6)]
    expected = np.array([[assemble(inner(grad(u), grad(v)) * dx) for v in p] for u in p])
    assert np.abs(expected - np.diag(phi.eigenvalues)).max() > 1e-4 * phi.eigenvalues[-1], "nothing is split"
    assert_allclose(phi.stiffness, expected, rtol=0, atol=1e-13 * phi.eigenvalues[-1])
    net = network(phi)
    alpha = [net.bias.get(layer) for layer in range(2)]
    value = float(smooth_in_space(0.3)([net.bias]))
    assert value == pytest.approx(0.15 * sum(a @ expected @ a for a in alpha), rel=1e-12)  # T = 2, two layers


@pytest.mark.parametrize("rank", [5, 6, 8])
def test_verification_passes_rotated_functions(rank):
    phi = laplace_basis(LabelSpace(fd.FunctionSpace(fd.UnitSquareMesh(8, 8), "CG", 1)), rank)
    net, Y = network(phi), phi.Y
    data = Batch(Y.batch(smooth(Y, 2)), Y.batch(smooth(Y, 2, seed=1)))
    report = verify(LearningProblem(net, None, least_squares, smooth_in_space(0.1), data))
    assert not [check for check in report.checks if not check.passed]


@on_ranks
@pytest.mark.parametrize("element", ["CG1", "DG0"])
def test_a_file_keeps_the_stiffness(element, tmp_path):
    net = network(basis("flat torus", element))
    save(tmp_path / "net.h5", net)
    kept = load(tmp_path / "net.h5")[0].bases["phi"][0]
    assert_allclose(kept.stiffness, net.bases["phi"][0].stiffness, rtol=0, atol=1e-15)


# -- bases that are refused -----------------------------------------------------------------------------------------


@on_ranks
def test_a_discontinuous_space_says_how_many_eigenfunctions_it_tells_apart():
    """Means over 8 x 8 cells do not see the mode that changes its sign from vertex to vertex."""
    Y = LabelSpace(fd.FunctionSpace(fd.UnitSquareMesh(8, 8, quadrilateral=True), "DG", 0))
    message = (
        r"rank: expected at most 25, the number of eigenfunctions that .*DQ0.* tells apart, got 40; .* Refine the mesh, or"
    )
    with pytest.raises(ValueError, match=message):
        laplace_basis(Y, 40)
    assert_allclose(laplace_basis(Y, 25).gram, np.eye(25), rtol=0, atol=1e-12)
    fine = laplace_basis(LabelSpace(fd.FunctionSpace(fd.UnitSquareMesh(12, 12, quadrilateral=True), "DG", 0)), 30)
    with pytest.raises(
        ValueError, match=r"Y: expected one that tells 30 eigenfunctions apart, LabelSpace.* tells 25; refine its mesh"
    ):
        fine.on(Y)


@on_ranks
def test_a_domain_that_lies_upon_itself_is_refused():
    """No function of the coordinates sees a function that is odd across a fold."""
    straight = fd.UnitIntervalMesh(8)
    x = fd.Function(fd.VectorFunctionSpace(straight, "CG", 1, dim=2))
    x.dat.data_wo[:, 0] = np.abs(straight.coordinates.dat.data_ro - 0.5)
    Y = LabelSpace(fd.FunctionSpace(fd.Mesh(x), "CG", 1))
    with pytest.raises(ValueError, match=r"Y: expected coordinates that tell the eigenfunctions .* lie upon itself"):
        laplace_basis(Y, 3)
    assert_allclose(np.abs(laplace_basis(Y, 1).values), 1.0, rtol=1e-12)


@on_ranks
def test_points_without_a_graph_have_no_laplacian():
    with pytest.raises(ValueError, match=r"Y: LabelSpace.* is a set of points, which has a Laplacian only with a graph"):
        laplace_basis(point_space(np.ones(9)), 3)
