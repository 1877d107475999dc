"""Points as a label domain: weights, integrals, coordinates, the Laplacian of a graph, networks on them."""

import firedrake as fd
import numpy as np
import pytest
import scipy.sparse
from firedrake import COMM_WORLD
from helpers import smooth_direction
from numpy.testing import assert_allclose, assert_array_equal

from fem_resnet import Batch, Head, LearningProblem, ResidualNetwork, cross_entropy, load, save, smooth_in_space, tikhonov
from fem_resnet.label_domain.basis import Basis, cell_indicators
from fem_resnet.label_domain.laplace import laplace_basis
from fem_resnet.label_domain.points import class_space, point_space

on_ranks = pytest.mark.parallel([1, 2, 3])

SIZE = 11
WEIGHTS = np.random.default_rng(1).uniform(0.2, 2.0, SIZE)
CLOUDS = {dimension: np.random.default_rng(2).normal(size=(SIZE, dimension)) for dimension in (1, 2, 3, 5)}
# Sums of a few numbers of size one.
ROUND_OFF = 1e-13


def ring(size=SIZE):
    """Edges of different weights around a ring, and one across."""
    A = np.zeros((size, size))
    for i in range(size):
        A[i, (i + 1) % size] = 1 + i / size
    A[0, size // 2] = 0.5
    return A + A.T


def owned_or_all(Y, values):
    """Values at this rank's points brought to the order of their numbers, on every rank."""
    order = np.concatenate(COMM_WORLD.allgather(Y.numbers))
    return np.concatenate(COMM_WORLD.allgather(np.asarray(values)))[np.argsort(order)]


@on_ranks
@pytest.mark.parametrize("dimension", [None, *CLOUDS])
def test_points_have_the_given_weights_and_places(dimension):
    Y = point_space(WEIGHTS, CLOUDS.get(dimension))
    assert Y.size == SIZE and sorted(np.concatenate(COMM_WORLD.allgather(Y.numbers))) == list(range(SIZE))
    assert_allclose(Y.weights, WEIGHTS[Y.numbers], rtol=0, atol=10 * ROUND_OFF)
    assert abs(Y.measure - WEIGHTS.sum()) < 10 * ROUND_OFF
    places = (np.cumsum(WEIGHTS) - WEIGHTS / 2)[:, None] if dimension is None else CLOUDS[dimension]
    assert_allclose(Y.coordinates, places[Y.numbers], rtol=0, atol=10 * ROUND_OFF)


@on_ranks
def test_integrals_in_ufl_are_sums_over_the_points():
    Y = point_space(WEIGHTS, CLOUDS[3])
    values = np.sin(np.arange(SIZE))
    f = fd.Function(Y.V)
    f.dat.data_wo[...] = values[Y.numbers]
    assert abs(fd.assemble(f**2 * fd.dx) - WEIGHTS @ values**2) < 10 * ROUND_OFF
    assert abs(Y.inner(f, f) - WEIGHTS @ values**2) < 10 * ROUND_OFF


@on_ranks
def test_indicators_of_points_are_in_their_order_wherever_they_lie():
    twice = np.zeros((SIZE, 2))  # all at one place
    Y = point_space(WEIGHTS, twice)
    assert_array_equal(cell_indicators(Y).values, np.eye(SIZE)[Y.numbers])


@on_ranks
def test_stiffness_of_a_graph_is_its_laplacian():
    """<K f, f> = 1/2 sum_ij A_ij (f_i - f_j)^2, a point without edges included."""
    A = ring()
    A[3, :] = A[:, 3] = 0
    Y = point_space(WEIGHTS, graph=scipy.sparse.csr_matrix(A))
    f = np.random.default_rng(0).normal(size=(SIZE, 2))
    exact = (np.diag(A.sum(axis=0)) - A) @ f
    assert_allclose(Y.apply_stiffness(f[Y.numbers]), exact[Y.numbers], rtol=0, atol=10 * ROUND_OFF)


@on_ranks
@pytest.mark.parametrize("graph", ["ring", "complete", "two pieces"])
def test_laplace_basis_of_a_graph_solves_its_eigenproblem_whatever_the_partition(graph):
    A = {"ring": ring(), "complete": 1 - np.eye(SIZE), "two pieces": scipy.linalg.block_diag(ring(5), ring(6))}[graph]
    weights = WEIGHTS if graph == "ring" else np.ones(SIZE)
    rank = {"ring": 4, "complete": SIZE, "two pieces": 2}[graph]
    basis = laplace_basis(point_space(weights, graph=A), rank)
    values = owned_or_all(basis.Y, basis.values)
    residual = (np.diag(A.sum(axis=0)) - A) @ values - weights[:, None] * values * basis.eigenvalues
    assert np.abs(residual).max() < 1e-10
    assert_allclose(basis.gram, np.eye(rank), rtol=0, atol=1e-11)
    alone = laplace_basis(point_space(weights, graph=A, comm=fd.COMM_SELF), rank)
    # The rule that fixes rotations has a condition of about 1e3.
    assert_allclose(values, alone.values[np.argsort(alone.Y.numbers)], rtol=0, atol=1e-9)


def test_laplace_basis_of_a_graph_stays_there():
    Y = point_space(WEIGHTS, graph=ring())
    with pytest.raises(ValueError, match="on: expected functions that can move, those of .* are tied to their mesh"):
        laplace_basis(Y, 3).on(point_space(WEIGHTS, graph=ring()))


def graph_problem(kind="graph"):
    """On a graph the bases are its eigenvectors; on a cloud functions of the coordinates, with a bias at every point."""
    Y = point_space(WEIGHTS, CLOUDS[2], ring() if kind == "graph" else None)
    x = CLOUDS[2].T[:, Y.numbers]
    basis = laplace_basis(Y, 5) if kind == "graph" else Basis(Y, np.stack([1 + 0 * x[0], *x, *np.sin(x)], axis=1), "given")
    net = ResidualNetwork(basis, bias=basis if kind == "graph" else None, layers=2, activation="tanh")
    rng = np.random.default_rng(3)
    for k in range(2):
        net.kernel.set(k, rng.normal(size=(5, 5)) / 2)
        net.bias.set(k, rng.normal(size=5) if kind == "graph" else rng.normal(size=SIZE)[Y.numbers])
    head = Head(basis, 3)
    head.W.set(0, rng.normal(size=(3, 5)))
    inputs = rng.normal(size=(SIZE, 4))
    batch = Batch(Y.batch(inputs[Y.numbers]), [0, 1, 2, 1])
    regulariser = tikhonov(0.01) + smooth_in_space(0.1) if kind == "graph" else tikhonov(0.01)
    return LearningProblem(net, head, cross_entropy, regulariser, batch), inputs


@on_ranks
@pytest.mark.parametrize("kind", ["graph", "cloud"])
def test_network_on_points_is_the_matrix_network(kind, taylor):
    problem, f = graph_problem(kind)
    net = problem.net
    P = owned_or_all(net.Y, net.bases["phi"][0].values)
    for k in range(2):
        a = owned_or_all(net.Y, net.bias.space_basis.expand(net.bias.get(k)))
        B = P @ net.kernel.get(k) @ P.T * WEIGHTS
        rate = lambda f: np.tanh(a[:, None] - B @ f)  # noqa: E731
        h = 0.5
        k1 = rate(f)
        k2 = rate(f + h / 2 * k1)
        k3 = rate(f + h / 2 * k2)
        f = f + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(f + h * k3))
    final = net.Y.values(net(problem.batch.inputs))
    assert_allclose(final, f[net.Y.numbers], rtol=0, atol=100 * ROUND_OFF)
    J, rng = problem.reduced_functional(), np.random.default_rng(4)
    h = [smooth_direction(net, rng, k, p) for p in problem.parameters for k in range(len(p.functions))]
    taylor(J, problem.functions, h, kind, "all")


@on_ranks
def test_files_keep_points_and_graph(tmp_path):
    problem, _ = graph_problem()
    net = problem.net
    save(tmp_path / "graph.h5", net, problem.head)
    loaded, head = load(tmp_path / "graph.h5")
    assert (loaded.Y.graph != net.Y.graph).nnz == 0
    assert_array_equal(owned_or_all(loaded.Y, loaded.Y.coordinates), owned_or_all(net.Y, net.Y.coordinates))
    f = np.random.default_rng(5).normal(size=(SIZE, 2))
    results = [owned_or_all(n.Y, n.Y.values(n(n.Y.batch(f[n.Y.numbers])))) for n in (net, loaded)]
    assert_allclose(*results, rtol=0, atol=ROUND_OFF)
    again = LearningProblem(
        loaded, head, cross_entropy, problem.regulariser, Batch(loaded.Y.batch(f[loaded.Y.numbers]), [0, 1])
    )
    assert np.isfinite(again.evaluate()[0])


@on_ranks
def test_more_ranks_than_points_are_no_harm():
    Y = point_space([2.0, 3.0])
    assert abs(Y.measure - 5) < ROUND_OFF
    assert class_space(1).size == 1


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(weights=[]), "^weights: expected positive numbers of shape .points,., got shape .0,."),
        (dict(weights=[1.0, 0.0]), "^weights: expected positive numbers.*got 0 among them$"),
        (dict(weights=[1.0, np.nan]), "^weights: expected finite positive numbers"),
        (dict(weights=[1.0, 2.0], points=np.zeros((3, 2))), r"^points: expected numbers of shape \(2, d\), got shape"),
        (dict(weights=[1.0, 2.0], points=[[0.0, np.inf]] * 2), r"^points: expected finite numbers of shape \(2, d\)"),
        (dict(weights=[1.0, 2.0], points=[0.0, 1.0]), r"^points: expected .*, got shape \(2,\)$"),
        (dict(weights=[1.0, 2.0], graph=np.full((2, 2), np.nan)), "^graph: expected finite numbers >= 0 .* not finite$"),
        (
            dict(weights=[1.0, 2.0], graph=np.zeros((3, 3))),
            r"^graph: expected numbers >= 0 of shape \(2, 2\), got shape \(3, 3\)$",
        ),
        (dict(weights=[1.0, 2.0], graph=np.array([[0, 1], [2, 0]])), "^graph: expected a symmetric matrix"),
        (dict(weights=[1.0, 2.0], graph=-np.ones((2, 2))), "^graph: expected numbers >= 0 .*, got -1 among them$"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        point_space(**arguments)


def test_points_without_a_graph_have_no_gradient():
    with pytest.raises(ValueError, match="Y: expected continuous functions, which have gradients, got .*; use CG"):
        point_space(WEIGHTS).stiffness  # noqa: B018
