"""The assembled matrix of Gauss and Newton: rows against adjoints of the tape, the whole against tangents, its mean."""

import firedrake as fd
import numpy as np
import pytest
from helpers import TIMES, flat_network, laplace, network, set_smooth, smooth
from kinds import rotation, with_layer_bases
from numpy.testing import assert_allclose
from problems import polynomials
from pyadjoint.enlisting import Enlist
from pyadjoint.tape import stop_annotating
from test_elimination import OMEGA, OUTPUTS, SAMPLES
from test_elimination import problem as with_output

from fem_resnet import (
    Batch,
    DampedAntisymmetric,
    Head,
    Kernel,
    LaplaceFunctions,
    Layers,
    LearningProblem,
    NormBounded,
    PositiveSemidefinite,
    ResidualNetwork,
    Symmetric,
    cross_entropy,
    least_squares,
    locality,
    smooth_in_space,
    smooth_in_time,
    tikhonov,
)  # fmt: skip
from fem_resnet.layers.sample_functionals import JoinedBasis
from fem_resnet.layers.stage import Stage
from fem_resnet.learning import gauss_newton_matrix
from fem_resnet.learning.gauss_newton_matrix import GaussNewtonMatrix, Rows, draw_rows
from fem_resnet.parameters.coordinates import Coordinates

on_ranks = pytest.mark.parallel([1, 2, 3])
#: More rows than there are.
ALL = 10**6


def fitted(net, psi=None, regulariser=tikhonov(0.02)) -> LearningProblem:
    """Fields by a head that sees psi, that of the first layer if left out."""
    psi = psi or net.bases["psi"][0]
    head, rng = Head(psi, laplace("disk", "CG1", 3), "identity"), np.random.default_rng(3)
    head.W.set(0, rng.normal(size=head.W.space_basis.shape))
    batch = Batch(net.Y.batch(smooth(net.Y, SAMPLES)), head.Y.batch(smooth(head.Y, SAMPLES, seed=9)), OMEGA)
    return LearningProblem(net, head, least_squares, regulariser, batch)


def with_set(among, domain="annulus", rank=5) -> ResidualNetwork:
    phi = laplace(domain, "CG1", rank)
    net = ResidualNetwork(Kernel(phi, among=among(phi)), bias=phi, layers=Layers(TIMES))
    for k, basis in enumerate(net.kernel.learned.space_bases):
        net.kernel.learned.set(k, 0.5 * np.random.default_rng(k).normal(size=basis.shape))
        net.bias.set(k, 0.3 * np.random.default_rng(10 + k).normal(size=phi.rank))
    return net


def smooth_network(phi, psi=None, **options) -> ResidualNetwork:
    net = flat_network(phi, psi, **{"times": TIMES, "bias": phi} | options)
    set_smooth(net, np.random.default_rng(0))
    return net


def disk(rank=4):
    return laplace("disk", "CG1", rank)


def by(ts_type, **more):
    return lambda: fitted(smooth_network(disk(), polynomials(disk().Y), solver_parameters={"ts_type": ts_type} | more))


#: Every way to hold parameters and to step layers that the matrix takes.
KINDS = {
    "Euler": by("rk", ts_rk_type="1fe"),
    "Crank-Nicolson": by("cn"),
    "theta": by("theta", ts_theta_theta=0.7),
    "matrix-free": by("cn", mat_type="matfree"),
    "arkimex": by("arkimex"),
    "dirk": by("dirk"),
    "hats in time": lambda: fitted(smooth_network(disk(), bias_in_time="linear", kernel_in_time="linear", steps=2)),
    "shared in time": lambda: fitted(smooth_network(disk(), bias_in_time="shared", kernel_in_time=[0, 1, 0])),
    "a bias of fewer functions": lambda: fitted(smooth_network(disk(6), bias=disk(3))),
    "a bias of other functions": lambda: fitted(smooth_network(disk(), bias=polynomials(disk().Y))),
    "bases of each layer": lambda: fitted(with_layer_bases(bias="bases")),
    "a head with a psi of its own": lambda: fitted(smooth_network(disk()), psi=polynomials(disk().Y)),
    "no layers": lambda: fitted(flat_network(disk(), bias=disk(), times=[0.0])),
    "positive semidefinite": lambda: fitted(with_set(lambda phi: PositiveSemidefinite(2))),
    "antisymmetric": lambda: fitted(with_set(lambda phi: DampedAntisymmetric(0.1))),
    "bounded": lambda: fitted(with_set(lambda phi: NormBounded(2.0))),
    "functions of the Laplacian": lambda: fitted(with_set(LaplaceFunctions)),
    "symmetric": lambda: fitted(with_set(lambda phi: Symmetric(phi, rotation(phi)))),
    "symmetric on the sphere": lambda: fitted(with_set(lambda phi: Symmetric(phi, rotation(phi)), "sphere", 4)),
    "smooth, local kernels": lambda: fitted(
        smooth_network(disk()), regulariser=smooth_in_space(0.1) + smooth_in_time(0.2) + locality(0.3)
    ),
    "smooth kernels of a set": lambda: fitted(
        with_set(lambda phi: PositiveSemidefinite(2)), regulariser=smooth_in_space(0.1) + tikhonov(0.2)
    ),
    "no regulariser": lambda: fitted(smooth_network(disk()), regulariser=None),
}


def matrix_of(p, rows=None) -> np.ndarray:
    rng = np.random.default_rng(0)
    return GaussNewtonMatrix(p).of(draw_rows(p, ALL, 10, rng) if rows is None else rows)


def by_tangents(p, columns=None) -> np.ndarray:
    """The same matrix, or its product with some columns, from actions of pyadjoint's sweeps."""
    J, coordinates = p.reduced_functional(gauss_newton=True), Coordinates(p.parameters)
    zeros = [np.zeros_like(c) for c in coordinates.read()]
    given, columns = np.eye(coordinates.size) if columns is None else columns, []
    with stop_annotating():
        J(p.functions)
        J.derivative()
        for unit in given.T:
            directions = []
            for (parameter, k), c in zip(coordinates.sets, coordinates.moved(zeros, unit)):
                directions.append(fd.Function(parameter.space_bases[k].space))
                parameter.space_bases[k].write(directions[-1], c)
            columns.append(coordinates.functional(Enlist(J.hessian(directions, apply_riesz=False))))
    return np.column_stack(columns)


def largest(A) -> float:
    return float(np.abs(A).max())


@on_ranks
@pytest.mark.parametrize("kind", OUTPUTS)
def test_all_rows_make_the_matrix_of_tangents(kind):
    p = with_output(kind)
    expected = by_tangents(p)
    assert_allclose(matrix_of(p), expected, rtol=0, atol=1e-12 * largest(expected))


@on_ranks
@pytest.mark.parametrize("kind", KINDS)
def test_so_they_do_whatever_a_network_is_made_of(kind):
    p = KINDS[kind]()
    H = matrix_of(p)
    columns = np.random.default_rng(2).normal(size=(len(H), 3))
    expected = by_tangents(p, columns)
    assert_allclose(H @ columns, expected, rtol=0, atol=1e-10 * largest(expected))


def test_in_single_precision_they_do_up_to_its_round_off():
    p = fitted(smooth_network(disk(), precision="single"))
    expected = by_tangents(fitted(smooth_network(disk())))
    assert_allclose(matrix_of(p), expected, rtol=0, atol=3e-6 * largest(expected))


def test_batches_of_rows_of_any_length_make_one_matrix(monkeypatch):
    p = with_output()
    expected = matrix_of(p)
    for length in (1, 5):
        monkeypatch.setattr(gauss_newton_matrix, "_BATCH", length)
        assert_allclose(matrix_of(p), expected, rtol=0, atol=1e-13 * largest(expected))


def test_rows_of_the_same_samples_step_the_layers_once(monkeypatch):
    """Batches of all samples in one direction each differ in the adjoint alone."""
    evaluations = []
    monkeypatch.setenv("FEM_RESNET_COMPILED", "0")
    monkeypatch.setattr(gauss_newton_matrix, "_BATCH", SAMPLES)
    problem = fitted(network(basis_for_bias=True))
    rate = Stage.rate
    monkeypatch.setattr(Stage, "rate", lambda self, *arguments: evaluations.append(1) or rate(self, *arguments))
    matrix, rows = GaussNewtonMatrix(problem), draw_rows(problem, ALL, 3, np.random.default_rng(0))
    first = matrix.of(rows)
    once = len(evaluations)
    assert np.array_equal(matrix.of(rows), first) and len(evaluations) == once
    problem.net.bias.set(0, 1.0 + problem.net.bias.get(0))
    new = matrix.of(rows)
    assert len(evaluations) == 2 * once and np.array_equal(new, GaussNewtonMatrix(problem).of(rows))


@on_ranks
@pytest.mark.parametrize("kind", ["disk to 3 classes", "block to sphere", "graph to graph"])
def test_a_row_is_the_derivative_of_one_sample_in_one_direction(kind):
    p = with_output(kind, None)
    head, Y, v, s = p.head, p.net.Y, np.array([0.5, -1.0, 2.0]), 2
    row = next(GaussNewtonMatrix(p).batches(Rows(np.array([s]), np.ones(1), (head.onto.gram @ v)[:, None, None])))[0][:, 0]
    # J of this sample, of which the output misses its target by X v, by the problem's own adjoint.
    inputs = Y.batch(Y.values(p.batch.inputs)[:, [s]])
    targets = head.Y.batch(head.Y.values(head(p.net(inputs))) - head.onto.values @ v[:, None])
    one = p.replace(batch=Batch(inputs, targets))
    J, coordinates = one.reduced_functional(), Coordinates(one.parameters)
    with stop_annotating():
        gradient = coordinates.functional(Enlist(J.derivative()))
    assert_allclose(coordinates.matrix.T @ row, gradient, rtol=0, atol=1e-12 * largest(gradient))


@pytest.mark.parametrize("rows", [3, 6, 9])
def test_rows_make_the_matrix_in_the_mean(rows):
    """The sum of d_s d_s^T over the rows of a sample is omega_s G, G of the basis of the output."""
    p, rng, draws = with_output("sphere to disk"), np.random.default_rng(5), 4000
    expected = (OMEGA / OMEGA.sum())[:, None, None] * p.head.onto.gram
    sums = np.zeros((2, *expected.shape))
    for _ in range(draws):
        drawn, total = draw_rows(p, rows, 2, rng), np.zeros_like(expected)
        each = drawn.functionals.shape[1]
        assert rows <= drawn.samples.size * each < rows + 6 and each >= 2
        total[drawn.samples] = np.einsum("ids,jds->sij", drawn.functionals, drawn.functionals)
        sums += total, total**2
    mean, deviation = sums[0] / draws, np.sqrt(np.maximum(sums[1] / draws - (sums[0] / draws) ** 2, 0) / draws)
    assert (np.abs(mean - expected) <= 5 * deviation + 1e-14).all()
    assert 0 < deviation.max() < 0.05 * expected.max()


def with_many_samples() -> LearningProblem:
    net, head = smooth_network(disk()), Head(disk(), disk(), "identity")
    head.W.set(0, np.eye(4))
    inputs = net.Y.batch(smooth(net.Y, 400))
    return LearningProblem(net, head, least_squares, None, Batch(inputs, inputs))


def test_a_few_rows_give_nearly_the_matrix_where_there_are_many_samples():
    p = with_many_samples()
    H, drawn = matrix_of(p), matrix_of(p, draw_rows(p, 5 * sum(q.dim for q in p.parameters), 2, np.random.default_rng(0)))
    x = np.random.default_rng(1).normal(size=len(H))
    assert 0.02 * largest(H) > largest(H - drawn) / 10 > 0
    assert_allclose(x @ drawn @ x, x @ H @ x, rtol=0.2)


def without_head(p, H) -> np.ndarray:
    """The Schur complement of W and mu in the matrix of all parameters, by dense algebra."""
    kept = sum(q.dim for q in p.net.parameters)
    return H[:kept, :kept] - H[:kept, kept:] @ np.linalg.lstsq(H[kept:, kept:], H[kept:, :kept], rcond=1e-13)[0]


@on_ranks
@pytest.mark.parametrize("weight", [None, 0.02])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_without_the_head_it_is_the_complement(kind, weight):
    p = with_output(kind, None if weight is None else tikhonov(weight))
    expected = without_head(p, matrix_of(p))
    matrix = GaussNewtonMatrix(p, eliminate=True)
    found = matrix.of(matrix.draw(ALL, 10, np.random.default_rng(0)))
    assert_allclose(found, expected, rtol=0, atol=1e-11 * largest(expected))


@on_ranks
@pytest.mark.parametrize("kind", ["hats in time", "bases of each layer", "symmetric", "a head with a psi of its own"])
def test_so_it_is_whatever_a_network_is_made_of(kind, monkeypatch):
    p = KINDS[kind]()
    expected = without_head(p, matrix_of(p))
    for length in (512, 20):  # all directions in one batch, or two of three
        monkeypatch.setattr(gauss_newton_matrix, "_BATCH", length)
        matrix = GaussNewtonMatrix(p, eliminate=True)
        found = matrix.of(matrix.draw(ALL, 10, np.random.default_rng(0)))
        assert_allclose(found, expected, rtol=0, atol=1e-10 * largest(expected))


def test_few_samples_give_the_matrix_without_the_head_in_the_mean():
    """Twenty samples for five unknowns: without the factor a quarter would be missing."""
    matrix, rng = GaussNewtonMatrix(with_many_samples(), eliminate=True), np.random.default_rng(0)
    H = matrix.of(matrix.draw(ALL, 10, rng))
    drawn = [matrix.draw(20, 4, rng) for _ in range(60)]
    assert {rows.samples.size for rows in drawn} == {20}
    found = sum(matrix.of(rows) for rows in drawn) / len(drawn)
    assert_allclose(np.trace(found), np.trace(H), rtol=0.08)
    assert_allclose(found, H, rtol=0, atol=0.1 * largest(H))


def test_rows_that_share_directions_make_the_matrix_of_the_gauss_newton_in_the_mean():
    p, rng, draws = with_output("sphere to disk"), np.random.default_rng(5), 4000
    expected, total = (OMEGA / OMEGA.sum())[:, None, None] * p.head.onto.gram, 0.0
    for _ in range(draws):
        drawn = draw_rows(p, 12, 2, rng, shared=True)
        assert drawn.functionals.shape == (3, 2, 6)
        shape = drawn.functionals / np.sqrt(drawn.weights)
        assert_allclose(shape - shape[:, :, :1], 0, atol=1e-14)
        part = np.zeros_like(expected)
        part[drawn.samples] = np.einsum("ids,jds->sij", drawn.functionals, drawn.functionals)
        total = total + part
    assert_allclose(total / draws, expected, rtol=0, atol=0.03 * largest(expected))


def test_a_basis_is_joined_by_what_it_does_not_span():
    phi, more = disk(6), polynomials(disk(6).Y)
    for first, second, rank in ((phi, phi, 6), (phi, disk(3), 6), (disk(3), phi, 6), (phi, more, 8)):
        joined = JoinedBasis.of(first, second)
        assert joined.basis.rank == rank and (joined.basis is first) == (rank == first.rank)
        assert_allclose(joined.basis.values[:, : first.rank], first.values, rtol=0, atol=0)
        assert_allclose(joined.basis.values @ joined.matrix, second.values, rtol=0, atol=1e-12)


def test_what_is_no_sum_of_squares_of_few_outputs_is_refused(monkeypatch):
    p = with_output()
    with pytest.raises(ValueError, match="problem: expected a problem with a head"):
        GaussNewtonMatrix(p.replace(head=None, batch=Batch(p.batch.inputs, p.batch.inputs)))
    classes = LearningProblem(p.net, Head(p.head.psi, 3), cross_entropy, None, Batch(p.batch.inputs, [0, 1, 2, 0, 1, 2, 0]))
    with pytest.raises(ValueError, match="problem: expected the loss least_squares of a head with prediction 'identity'"):
        GaussNewtonMatrix(classes)
    monkeypatch.setattr(gauss_newton_matrix, "LARGEST", 10)
    with pytest.raises(ValueError, match="problem: expected at most 10 parameters"):
        GaussNewtonMatrix(p)
    nodal = fitted(network())
    with pytest.raises(ValueError, match="bias: expected a basis on each layer"):
        nodal.net.sample_segment(nodal.net.Y.batch_space(3))
