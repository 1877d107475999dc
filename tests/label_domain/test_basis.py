"""Bases: orthonormal, convergent eigenfunctions that no partition changes; given functions; cell indicators."""

import logging

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import SPACES, label_space, laplace, name, smooth
from numpy.testing import assert_allclose
from scipy.special import jnp_zeros

import fem_resnet.label_domain.laplace
from fem_resnet import Basis, LabelSpace, cell_indicators, given_basis, laplace_basis, point_space

on_ranks = pytest.mark.parallel([1, 2, 3])
each_space = pytest.mark.parametrize("space", SPACES, ids=name)


@pytest.fixture
def directory(tmp_path):
    """A directory that all ranks share."""
    return COMM_WORLD.bcast(tmp_path)


# -- Laplace eigenfunctions ------------------------------------------------------------------------------------------


@on_ranks
def test_a_cache_gives_the_same_bits_to_the_same_question_only(directory, monkeypatch):
    Y = label_space("annulus", "DG0")
    first = laplace_basis(Y, 5, cache=directory)
    COMM_WORLD.barrier()
    assert len(list(directory.iterdir())) == COMM_WORLD.size, "one file a rank, and nothing half written"

    def refuse(*arguments):
        raise AssertionError("solved for")

    monkeypatch.setattr(fem_resnet.label_domain.laplace, "eigenfunctions", refuse)
    again = laplace_basis(Y, 5, cache=directory)
    assert np.array_equal(again.values, first.values) and np.array_equal(again.eigenvalues, first.eigenvalues)
    ring = np.roll(np.eye(12), 1, axis=0)
    graph = point_space(np.ones(12), graph=ring + ring.T)
    for other in (
        lambda: laplace_basis(Y, 4, cache=directory),
        lambda: laplace_basis(Y, 5, cache=directory, solver_parameters={"eps_tol": 1e-12}),
        lambda: laplace_basis(label_space("annulus", "CG2"), 5, cache=directory),
        lambda: laplace_basis(label_space("annulus", "DG0", 2), 5, cache=directory),
        lambda: laplace_basis(graph, 5, cache=directory),
    ):
        with pytest.raises(AssertionError, match="solved for"):
            other()


@on_ranks
@each_space
def test_eigenfunctions_are_orthonormal(space):
    basis = laplace(*space, rank=5)
    assert_allclose(basis.gram, np.eye(5), rtol=0, atol=1e-12)
    # The basis's own Gram matrix is that of its values.
    assert_allclose(basis.project(basis.values), np.eye(5), rtol=0, atol=1e-12)


@on_ranks
@pytest.mark.parametrize("space, rank", [(("disk", "CG1"), 9), (("sphere", "CG1"), 9), (("square", "CG3"), 8)], ids=str)
def test_eigenfunctions_span_an_invariant_space_with_these_eigenvalues(space, rank):
    Y, basis = label_space(*space), laplace(*space, rank=rank)
    p = [basis.function(c) for c in np.eye(rank)]
    applied = [fd.assemble(fd.inner(fd.grad(f), fd.grad(fd.TestFunction(Y.V))) * fd.dx).dat.data_ro for f in p]
    applied = np.column_stack(applied) / Y.weights[:, None]
    reduced = basis.project(applied)
    # SLEPc's tolerance is 1e-13 of the largest eigenvalue of the inverse, which is 1.
    scale = basis.eigenvalues[-1]
    outside = applied - basis.values @ reduced
    assert float(Y.sum(np.sum(Y.weights[:, None] * outside**2))) ** 0.5 < 1e-9 * scale
    assert_allclose(np.linalg.eigvalsh(reduced), basis.eigenvalues, rtol=0, atol=1e-10 * scale)
    assert (np.diff(basis.eigenvalues) > -1e-10 * scale).all() and abs(basis.eigenvalues[0]) < 1e-10


def _disk(count):
    """Squares of the zeros of J_n', each twice for n > 0, and 0."""
    zeros = [0.0] + [zero for n in range(9) for zero in jnp_zeros(n, 3) for _ in range(2 if n else 1)]
    return np.sort(zeros)[:count] ** 2


def _sphere(count):
    return np.array([degree * (degree + 1) for degree in range(9) for _ in range(2 * degree + 1)])[:count]


def _cube(dimension):
    def eigenvalues(count):
        waves = np.stack(np.meshgrid(*[np.arange(6)] * dimension), axis=-1).reshape(-1, dimension)
        return np.sort(np.pi**2 * (waves**2).sum(axis=1))[:count]

    return eigenvalues


@pytest.mark.parametrize(
    "space, exact, refinements, rank, order",
    [
        # Polygons and polyhedra miss the disk and the sphere by h^2 as well.
        (("disk", "CG1"), _disk, [2, 3, 4], 9, 2),
        (("sphere", "CG1"), _sphere, [1, 2, 3], 9, 2),
        (("square", "CG3"), _cube(2), [1, 2, 3], 8, 6),
        (("hexes", "CG2"), _cube(3), [1, 2], 8, 4),
    ],
    ids=["disk", "sphere", "spectral-square", "spectral-cube"],
)
def test_eigenvalues_converge_at_order_2k(space, exact, refinements, rank, order):
    """Relative errors of all modes but the constant one, by the mesh size h."""
    spaces = [label_space(*space, refinement=n) for n in refinements]
    # Every domain is refined uniformly, so h falls as the number of cells to the power -1 / dimension.
    h = [Y.V.mesh().num_cells() ** (-1 / Y.V.mesh().topological_dimension) for Y in spaces]
    errors = [np.abs(laplace_basis(Y, rank).eigenvalues[1:] / exact(rank)[1:] - 1) for Y in spaces]
    orders = [np.log(errors[i] / errors[i + 1]) / np.log(h[i] / h[i + 1]) for i in range(len(h) - 1)]
    # On the sphere the three eigenvalues 2 converge faster: a lumped CG1 knows the coordinates almost exactly.
    assert (orders[-1] > order - 0.1).all(), f"observed orders {orders}, errors {errors}"


def test_a_basis_of_full_rank_represents_every_function():
    basis = laplace("disk", "CG1", rank=25)
    f = smooth(basis.Y)
    assert basis.rank == basis.Y.size
    assert_allclose(basis.values @ basis.project(f), f, rtol=0, atol=1e-12)


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize(
    "space, rank",
    [
        (("disk", "CG1"), 9),
        (("disk", "DG0"), 9),
        (("sphere", "CG1"), 9),  # eigenvalues of multiplicity 1, 3, 5
        (("sphere", "DG0"), 9),
        (("square", "CG3"), 11),
        (("annulus", "CG2"), 7),
        (("hexes", "CG2"), 8),
        (("disk", "DG1"), 9),
        (("polygon", "KMV3"), 9),
        (("block", "CG1"), 9),
    ],
    ids=str,
)
def test_the_basis_is_the_same_on_any_number_of_ranks(space, rank):
    """Inner products with fixed smooth functions: the whole mesh on this rank alone against the parts of all ranks."""
    parts, alone = laplace(*space, rank=rank), laplace(*space, rank=rank, alone=True)
    assert_allclose(parts.eigenvalues, alone.eigenvalues, rtol=0, atol=1e-11 * alone.eigenvalues[-1])
    assert_allclose(parts.project(smooth(parts.Y, 5)), alone.project(smooth(alone.Y, 5)), rtol=0, atol=1e-10)


@on_ranks
def test_a_second_call_gives_the_same_functions():
    Y = label_space("sphere", "CG1")  # eigenvalues of multiplicity 3 and 5, and SLEPc starts from a random vector
    assert_allclose(laplace_basis(Y, 9).values, laplace_basis(Y, 9).values, rtol=0, atol=1e-10)


@on_ranks
def test_a_rank_that_cuts_a_repeated_eigenvalue_is_told(caplog):
    Y = label_space("sphere", "CG1")
    with caplog.at_level(logging.WARNING, "fem_resnet"):
        whole = laplace_basis(Y, 9)
    assert not caplog.messages
    with caplog.at_level(logging.WARNING, "fem_resnet"):
        cut = laplace_basis(Y, 6)
    assert len(caplog.messages) == (COMM_WORLD.rank == 0), "it is said once, by rank 0"
    for message in caplog.messages:
        # On 80 cells the eigenvalue 6 of the sphere, five times, is 5.48.
        assert "rank 6 cuts through the repeated eigenvalue 5.479" in message
        assert "ranks 4 and 9 keep it whole" in message
    assert_allclose(cut.values, whole.values[:, :6], rtol=0, atol=1e-10)


@on_ranks
@pytest.mark.parametrize("rank", [0, -1, 26, 2.0, "4", None])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(ValueError, match=r"rank: expected an integer from 1 to 25, got"):
        laplace_basis(label_space("disk", "CG1"), rank)


@on_ranks
def test_a_rank_that_the_continuous_space_has_not_is_refused():
    with pytest.raises(ValueError, match=r"rank: expected at most 25, the number of eigenfunctions on .*CG1.*, got 30"):
        laplace_basis(label_space("disk", "DG0"), 30)


@on_ranks
def test_an_eigensolver_that_gives_up_is_told():
    with pytest.raises(
        RuntimeError, match=r"SLEPc found \d+ of \d+ eigenvalues in 1 iterations, DIVERGED_ITS; .* 'eps_max_it'"
    ):
        laplace_basis(label_space("disk", "CG1", 3), 8, solver_parameters={"eps_max_it": 1})


# -- given functions -------------------------------------------------------------------------------------------------


@on_ranks
def test_given_functions_are_taken_at_the_nodes():
    Y = label_space("disk", "CG1")
    x, y = fd.SpatialCoordinate(Y.V.mesh())
    function = fd.Function(Y.V)
    function.dat.data_wo[:] = 7 * Y.coordinates[:, 1]
    basis = given_basis(Y, [1, 2.5 * x, function, x * y])
    X = Y.coordinates
    expected = np.column_stack([np.ones(Y.nodes), 2.5 * X[:, 0], 7 * X[:, 1], X[:, 0] * X[:, 1]])
    assert_allclose(basis.values, expected, rtol=0, atol=1e-15)
    assert_allclose(basis.gram, Y.sum((expected * Y.weights[:, None]).T @ expected), rtol=0, atol=1e-14)
    assert (basis.rank, basis.kind, basis.eigenvalues) == (4, "given", None)
    function.assign(0.0)
    assert_allclose(basis.values, expected, rtol=0, atol=1e-15)


@on_ranks
def test_a_basis_makes_functions_and_batches_of_coefficients():
    basis = laplace("disk", "CG1", rank=9)
    Y, c = basis.Y, np.arange(9.0)
    assert_allclose(basis.function(c).dat.data_ro, basis.values @ c, rtol=0, atol=1e-14)
    batch = basis.function(np.outer(c, [1.0, 0.0, -1.0]))
    assert batch.function_space() == Y.batch_space(3)
    assert_allclose(basis.project(Y.values(batch)), np.outer(c, [1.0, 0.0, -1.0]), rtol=0, atol=1e-11)


@on_ranks
def test_dependent_functions_are_refused():
    Y = label_space("disk", "CG1")
    x, y = fd.SpatialCoordinate(Y.V.mesh())
    for functions in ([x, y, x - 2 * y], [x, 0.0], [1, x, 1 + 1e-9 * x]):
        message = rf"functions: expected .* these {len(functions)} are dependent at the 25 nodes .*; drop some"
        with pytest.raises(ValueError, match=message):
            given_basis(Y, functions)


@on_ranks
def test_a_function_that_is_not_finite_is_refused():
    Y = label_space("disk", "CG1")
    function = fd.Function(Y.V)
    values = function.dat.data_wo  # asking for it is collective
    if Y.comm.rank == Y.comm.size - 1:
        values[0] = np.nan
    with pytest.raises(ValueError, match="functions: expected finite numbers, got 1 of "):
        given_basis(Y, [1.0, function])


@on_ranks
def test_functions_of_another_space_or_none_are_refused():
    Y = label_space("disk", "CG1")
    with pytest.raises(ValueError, match="functions: expected Functions of .*, got one of .*"):
        given_basis(Y, [fd.Function(label_space("disk", "DG0").V)])
    with pytest.raises(ValueError, match="functions: expected at least one function"):
        given_basis(Y, [])


# -- cell indicators -------------------------------------------------------------------------------------------------


@on_ranks
def test_cell_indicators_are_a_numbering_of_the_cells():
    Y = label_space("disk", "DG0")
    basis = cell_indicators(Y)
    assert (basis.kind, basis.rank) == ("cells", Y.size)
    assert (basis.values.sum(axis=1) == 1).all() and (Y.sum(basis.values.sum(axis=0)) == 1).all()
    assert_allclose(np.diag(basis.gram), Y.sum(basis.values.T @ Y.weights), rtol=1e-15)
    assert (basis.gram == np.diag(np.diag(basis.gram))).all()


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("domain", ["interval", "disk", "annulus", "sphere", "cube"])
def test_cells_have_the_same_numbers_on_any_number_of_ranks(domain):
    parts, alone = (cell_indicators(label_space(domain, "DG0", alone=alone)) for alone in (False, True))
    numbered = [basis.Y.sum(basis.values.T @ basis.Y.coordinates) for basis in (parts, alone)]
    assert_allclose(*numbered, rtol=0, atol=1e-14)


@on_ranks
def test_cell_indicators_want_one_node_a_cell():
    with pytest.raises(ValueError, match=r"Y: expected DG of degree 0, which cell indicators span, got .*CG1"):
        cell_indicators(label_space("disk", "CG1"))


@on_ranks
def test_cells_with_the_same_midpoint_are_refused():
    interval = fd.UnitIntervalMesh(8)  # folded in the plane
    x = fd.Function(fd.VectorFunctionSpace(interval, "CG", 1, dim=2))
    x.dat.data_wo[:, 0] = np.abs(interval.coordinates.dat.data_ro - 0.5)
    Y = LabelSpace(fd.FunctionSpace(fd.Mesh(x), "DG", 0))
    with pytest.raises(
        ValueError, match=r"Y: expected nodes \(or midpoints of cells\) at different places, got two that coincide"
    ):
        cell_indicators(Y)


@on_ranks
def test_a_basis_of_arrays_checks_them():
    Y = label_space("disk", "DG0")
    with pytest.raises(ValueError, match="linearly independent functions"):
        Basis(Y, np.ones((Y.nodes, 2)), "given")
    last = COMM_WORLD.rank == COMM_WORLD.size - 1
    for shape in ((Y.nodes + 1 if last else Y.nodes, 2), (Y.nodes,) if last else (Y.nodes, 1), (Y.nodes, 0)):
        with pytest.raises(ValueError, match=r"values: expected shape \(nodes, rank\) = \(\d+, at least 1\), got \(\d+,"):
            Basis(Y, np.ones(shape), "given")
    if COMM_WORLD.size > 1:
        with pytest.raises(ValueError, match="values: expected as many functions on all ranks"):
            Basis(Y, np.ones((Y.nodes, 1 + last)), "given")
    basis = laplace("disk", "DG0", 4)
    for shape in ((3,), (5, 2), (4, 1, 1), ()):
        with pytest.raises(ValueError, match=r"coefficients: expected shape \(4,\) or \(4, samples\), got \(.*\)"):
            basis.function(np.ones(shape))


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda V: Basis(V, np.ones((3, 1)), "given"),
        lambda V: given_basis(V, [1.0]),
        cell_indicators,
        lambda V: laplace_basis(V, 3),
        lambda V: laplace("disk", "DG0", 4).on(V),
    ],
    ids=["Basis", "given_basis", "cell_indicators", "laplace_basis", "on"],
)
def test_what_is_no_label_space_is_refused(make):
    with pytest.raises(TypeError, match=r"^Y: expected a LabelSpace, got WithGeometry; LabelSpace\(V\) makes one of"):
        make(label_space("disk", "DG0").V)
