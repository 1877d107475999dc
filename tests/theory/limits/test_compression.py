"""Kernels of low rank in place of full ones: the SVD in the label measure, cross approximation, and their errors."""

import resource
from functools import cache

import firedrake as fd
import numpy as np
import pytest
from helpers import label_space, laplace
from problems import gathered, polynomials

from fem_resnet import (
    Bias,
    Compression,
    Kernel,
    KernelSampling,
    LabelSpace,
    LowRankKernel,
    ResidualNetwork,
    cell_indicators,
    compress,
    from_network,
    point_space,
)
from fem_resnet.label_domain.basis import node_numbers
from fem_resnet.theory.limits.cross_approximation import upper_limit
from fem_resnet.theory.limits.kernel_values import KernelValues, draw_pairs

on_ranks = pytest.mark.parallel([1, 2, 3])

#: Both ways: all values are affordable, or none.
CROSSES = KernelSampling(affordable=0)
WAYS = {"svd": KernelSampling(affordable=10**9), "cross": CROSSES}
#: Label domains of y and of z.
PAIRS = {
    "disk": (("disk", "DG0", 2), None),
    "annulus": (("annulus", "CG1", 1), None),
    "sphere": (("sphere", "DG0", 1), None),
    "disk, polygon": (("disk", "CG1", 2), ("polygon", "KMV2", 1)),
}


def gauss(y, z):
    return np.exp(-((y - z) ** 2).sum(axis=-1))


def lopsided(y, z):
    """Not symmetric, so that an exchange of y and z changes results."""
    return np.exp(-((y - 0.3 * z) ** 2).sum(axis=-1)) * (2 + z[..., 0]) + 0.3 * np.sin(3 * y[..., 1] * z[..., 0])


def everything(Y, Z, b=lopsided) -> np.ndarray:
    """M^(1/2) b N^(1/2), whole on each rank, in an order that does not depend on the partition."""
    y, z = (gathered(X, X.coordinates) for X in (Y, Z))
    w, v = (gathered(X, X.weights) for X in (Y, Z))
    return np.sqrt(w)[:, None] * b(y[:, None], z[None]) * np.sqrt(v)


def approximation(found: Compression) -> np.ndarray:
    """M^(1/2) b_r N^(1/2), in the same order."""
    (Y, phi), (Z, psi) = ((basis.Y, basis.values) for basis in (found.kernel.phi, found.kernel.psi))
    b = gathered(Y, phi) @ found.beta @ gathered(Z, psi).T
    return np.sqrt(gathered(Y, Y.weights))[:, None] * b * np.sqrt(gathered(Z, Z.weights))


@cache
def spaces(which):
    Y, Z = (X and label_space(*X) for X in PAIRS[which])
    return Y, Z or Y


# -- all values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", PAIRS)
@pytest.mark.parametrize("tolerance", [1e-1, 1e-4, 1e-9])
def test_all_values_give_the_best_kernel_of_least_rank(which, tolerance):
    """Against LAPACK's singular values of the whole: errors in both norms, least rank, orthonormal factors."""
    Y, Z = spaces(which)
    found = compress(lopsided, tolerance, Y, Z)
    whole = everything(Y, Z)
    s = np.linalg.svd(whole, compute_uv=False)
    tail = np.sqrt(np.append(np.cumsum(s[::-1] ** 2)[::-1], 0))
    r = found.rank
    assert found.method == "svd" and found.confidence is None and found.evaluations == Y.size * Z.size
    assert tail[r] <= tolerance * tail[0] < tail[r - 1]
    # Singular vectors are good to 1e-10 of the largest singular value.
    room = 1e-9 * s[0]
    np.testing.assert_allclose(found.singular_values, s[:r], atol=room)
    left = whole - approximation(found)
    measured = {"hilbert_schmidt": np.linalg.norm(left), "operator": np.linalg.norm(left, 2)}
    for name, optimal in (("hilbert_schmidt", tail[r]), ("operator", s[r])):
        error = getattr(found, name)
        np.testing.assert_allclose([error.value, error.optimal], [measured[name], optimal], rtol=1e-6, atol=room)
        assert error.value >= error.optimal - room
    assert found.operator.value < found.hilbert_schmidt.value
    for basis in (found.kernel.phi, found.kernel.psi):
        np.testing.assert_allclose(basis.gram, np.eye(r), atol=1e-9)
    np.testing.assert_allclose(found.norm, tail[0], rtol=1e-12)


def test_a_repeated_singular_value_is_not_cut():
    """On a ring of points functions of the distance have pairs of singular values."""
    angle = 2 * np.pi * np.arange(20) / 20
    Y = point_space(np.full(20, 0.3))
    matrix = np.exp(np.cos(angle[:, None] - angle))
    s = np.linalg.svd(0.3 * matrix, compute_uv=False)
    for cut in (2, 4):
        # The tolerance allows an even rank, which would cut a pair in two: one more is kept.
        tolerance = 1.01 * np.linalg.norm(s[cut:]) / np.linalg.norm(s)
        for method in (compress(matrix, tolerance, Y), compress(matrix, tolerance, Y, sampling=CROSSES)):
            assert method.rank == cut + 1 and abs(s[cut] - s[cut - 1]) < 1e-12


def test_plain_singular_values_are_not_those_of_the_label_measure():
    """On a graded set of points the SVD of the bare matrix is worse at the same rank, in the norm of L2(Y x Y)."""
    weights = np.geomspace(1e-3, 1, 40)
    places = np.cumsum(weights) / weights.sum()
    Y = point_space(weights, places[:, None])
    matrix = np.exp(-9 * (places[:, None] - places) ** 2) * np.cos(8 * places)
    found = compress(matrix, 1e-2, Y)
    U, s, V = np.linalg.svd(matrix)
    plain = (U[:, : found.rank] * s[: found.rank]) @ V[: found.rank]
    root = np.sqrt(weights)
    assert np.linalg.norm(root[:, None] * (matrix - plain) * root) > 1.5 * found.hilbert_schmidt.value


def test_a_kernel_of_finite_rank_is_found_whole_and_a_full_one_at_full_rank():
    Y = label_space("annulus", "CG1")
    found = compress(lambda y, z: 1 + y[..., 0] * z[..., 1] + 3 * (y * z).sum(axis=-1) ** 2, 1e-10, Y)
    assert found.rank == 5  # 1, y z, and x x, x y, y y
    points = point_space(np.linspace(1, 2, 12))
    full = compress(np.random.default_rng(0).normal(size=(12, 12)), 1e-6, points)
    assert full.rank == 12 and full.operator.optimal == 0 and full.hilbert_schmidt.optimal == 0
    assert full.hilbert_schmidt.value < 1e-9 * full.norm


@pytest.mark.parametrize("method", ["trlanczos", "lapack"])
def test_other_methods_of_slepc_find_the_same(method):
    Y, Z = spaces("disk, polygon")
    found = compress(lopsided, 1e-3, Y, Z, solver_parameters={"svd_type": method})
    np.testing.assert_allclose(found.singular_values, compress(lopsided, 1e-3, Y, Z).singular_values, rtol=1e-7)


def test_a_method_that_does_not_converge_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"SLEPc found \d+ of 16 singular values .* 'svd_max_it'"):
        compress(lopsided, 1e-3, label_space("disk", "DG0"), solver_parameters={"svd_tol": 1e-30, "svd_max_it": 2})


# -- crosses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", PAIRS)
@pytest.mark.parametrize("tolerance", [1e-1, 1e-4, 1e-9])
def test_cross_approximation_is_within_the_tolerance_and_its_confidence(which, tolerance):
    """Against all values: the true error is below the sampled limit, and at least half of it."""
    Y, Z = spaces(which)
    found = compress(lopsided, tolerance, Y, Z, sampling=CROSSES)
    true = np.linalg.norm(everything(Y, Z) - approximation(found))
    assert found.method == "cross" and found.confidence == 0.99
    assert true <= found.hilbert_schmidt.value <= tolerance * found.norm
    assert found.hilbert_schmidt.value < 2 * true
    assert found.hilbert_schmidt.optimal is None and found.operator == found.hilbert_schmidt
    best = compress(lopsided, tolerance, Y, Z)
    assert best.rank <= found.rank <= best.rank + 3
    np.testing.assert_allclose(found.norm, best.norm, rtol=2 * tolerance)


def steep(y, z):
    """A kernel with a kink at y = z; residuals are large there only."""
    return np.exp(-6 * np.sqrt(((y - z) ** 2).sum(axis=-1) + 1e-12))


def bump(y, z):
    """A smooth kernel with a bump on a small set."""
    return gauss(y, z) + 3 * np.exp(-200 * ((y - 0.3) ** 2).sum(axis=-1) - 200 * ((z + 0.2) ** 2).sum(axis=-1))


def jump(y, z):
    return 1.0 * (y[..., 0] > z[..., 0])


def exceeded(b, tolerance, seeds, Y) -> list[float]:
    """True errors over stated errors, for each seed; stated errors are always within the tolerance."""
    whole, parts = everything(Y, Y, b), []
    for seed in seeds:
        found = compress(b, tolerance, Y, sampling=KernelSampling(affordable=0, seed=seed))
        assert found.hilbert_schmidt.value <= tolerance * found.norm
        parts.append(np.linalg.norm(whole - approximation(found)) / found.hilbert_schmidt.value)
    return parts


@pytest.mark.parametrize("b, tolerance", [(lopsided, 1e-2), (bump, 1e-2)])
def test_the_stated_error_holds_for_25_seeds(b, tolerance):
    assert max(exceeded(b, tolerance, range(25), label_space("annulus", "DG0"))) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("space", [("sphere", "DG0", 2), ("disk", "DG0", 3), ("annulus", "CG1", 1)], ids=str)
@pytest.mark.parametrize(
    "b, tolerance", [(gauss, 1e-1), (gauss, 1e-3), (lopsided, 1e-1), (lopsided, 1e-2), (lopsided, 1e-3), (bump, 1e-2)]
)
def test_the_stated_error_holds_for_200_seeds(b, tolerance, space):
    """Confidence 0.99: 2 failures of 200 are allowed; the factor in the stated error makes them fewer.

    The bump lies in 0.6 % of the rows. Where pairs and rows all miss it, no sample knows of it: 8 of 200 on the disk.
    """
    allowed = 10 if b is bump else 2
    assert sum(part > 1 for part in exceeded(b, tolerance, range(200), label_space(*space))) <= allowed


def test_a_tolerance_that_is_not_known_to_be_met_is_an_error(monkeypatch):
    """The kernel is not returned with a line in the log."""
    monkeypatch.setattr("fem_resnet.theory.limits.crosses.FACTOR", 100.0)
    wanted = (
        r"^compress: at rank \d+ the error is only known to be below [0-9.]+ of the norm, with confidence 0.99; expected 0.01"
    )
    with pytest.raises(RuntimeError, match=wanted):
        compress(gauss, 1e-2, label_space("annulus", "DG0"), sampling=CROSSES)


def test_crosses_see_few_values_and_the_rank_does_not_know_the_mesh():
    coarse, fine = (compress(gauss, 1e-3, label_space("sphere", "DG0", n), sampling=CROSSES) for n in (2, 3))
    N = fine.kernel.phi.Y.size
    assert N == 1280 and fine.evaluations < 0.15 * N**2
    assert abs(fine.rank - coarse.rank) <= 2
    # Without the pairs: a row and a column in each step.
    assert fine.evaluations - 4096 - 16384 < 2.5 * fine.rank * 2 * N


@on_ranks
def test_a_part_that_no_cross_meets_is_found_by_the_pairs():
    """Rows through one sector are zero in all other sectors, so that partial pivoting alone ends too early."""
    Y = label_space("disk", "DG0", 2)

    def patches(y, z):
        sectors = (np.floor(np.arctan2(x[..., 1], x[..., 0]) / (np.pi / 4) + 0.1) for x in (y, z))
        return gauss(y, z) * np.equal(*sectors)

    found = compress(patches, 1e-4, Y, sampling=CROSSES)
    assert np.linalg.norm(everything(Y, Y, patches) - approximation(found)) < 1e-4 * found.norm


@on_ranks
def test_pairs_have_the_probability_of_the_label_measure():
    """Means over 40,000 pairs on a graded set of points are integrals, to four standard deviations."""
    weights = np.geomspace(0.01, 1, 200)
    Y = point_space(weights)
    b = KernelValues(lambda y, z: y[..., 0] * np.cos(z[..., 0]), Y, Y)
    drawn = draw_pairs(b.y, b.z, 40000, seed=3)
    y, z = (sample.rows(b.y.places)[:, 0] for sample in drawn)
    x, w = gathered(Y, Y.coordinates)[:, 0], gathered(Y, Y.weights)
    assert len(y) > 1000
    for sampled, integral in ((y, w @ x), (z, w @ x), (y * np.cos(z), (w @ x) * (w @ np.cos(x)) / w.sum())):
        assert abs(sampled.mean() - integral / w.sum()) < 4 * sampled.std() / len(y) ** 0.5


def test_the_limit_of_a_mean_holds_as_often_as_it_says():
    """Of squares of normal residuals, 2,000 samples of 200: a confidence of 0.9 fails in a tenth."""
    squares = np.random.default_rng(0).normal(size=(2000, 200)) ** 2
    held = np.mean([upper_limit(sample, 0.9) >= 1 for sample in squares])
    # Squares of normal numbers are skew: Student's limit is a little short, by a percent or two at 200.
    assert 0.86 < held < 0.92


@on_ranks
def test_the_part_where_the_residual_is_larger_is_as_small_as_it_says():
    Y = label_space("sphere", "DG0", 2)
    found = compress(gauss, 1e-2, Y, sampling=CROSSES)
    largest, part = found.exceeded
    w = gathered(Y, Y.weights)
    residual = np.abs(everything(Y, Y, gauss) - approximation(found)) / np.sqrt(np.outer(w, w))
    assert np.outer(w, w)[residual > largest * (1 + 1e-9)].sum() / w.sum() ** 2 <= part < 1e-3


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_the_kernel_does_not_depend_on_the_partition(way):
    """Pivots are the same, also where many nodes are alike, so that crosses agree to round-off, not to a tolerance."""
    for which, b in ((("disk", "DG0", 2), lopsided), (("annulus", "CG1", 1), gauss), (("sphere", "DG0", 1), gauss)):
        found = [compress(b, 1e-3, label_space(*which, alone=alone), sampling=WAYS[way]) for alone in (False, True)]
        np.testing.assert_allclose(*map(approximation, found), atol=1e-9)
        errors = [(x.hilbert_schmidt.value, x.operator.value, x.norm, *x.singular_values, x.evaluations) for x in found]
        np.testing.assert_allclose(*errors, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parallel([1, 2])
def test_memory_and_evaluations_are_linear_in_the_number_of_nodes():
    """180,000 cells: all values would take 260 GB; at most twice as many rows and columns are made as the rank."""
    Y = LabelSpace(fd.FunctionSpace(fd.UnitSquareMesh(300, 300), "DG", 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = compress(gauss, 1e-4, Y)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert found.method == "cross" and found.rank < 25
    assert found.hilbert_schmidt.value <= 1e-4 * found.norm
    assert found.evaluations < 4 * found.rank * 2 * Y.size
    # Both factors with room for twice the rank, copies for QR and SVD, and a block of values.
    assert grown < 16 * 8 * 2 * 32 * Y.nodes + 1e8


@on_ranks
def test_round_off_does_not_choose_a_pivot():
    """Of nodes that are equal up to 1e-13 always the same one is taken, on any partition."""
    places = set()
    for alone in (False, True):
        Y = label_space("sphere", "DG0", alone=alone)
        nodes = KernelValues(gauss, Y, Y).y
        for seed in range(5):
            size = 1 + 1e-13 * np.random.default_rng([seed, Y.comm.rank]).normal(size=Y.nodes)
            places.add(tuple(np.round(nodes.from_owner(nodes.largest(size), nodes.places)[0], 9)))
    assert len(places) == 1


# -- what a kernel may be ----------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("way", WAYS)
def test_callback_expression_and_matrix_are_the_same_kernel(way):
    Y, Z = spaces("disk, polygon")
    y, z = (fd.SpatialCoordinate(X.V.mesh()) for X in (Y, Z))
    expression = fd.exp(-fd.dot(y - 0.3 * z, y - 0.3 * z)) * (2 + z[0]) + 0.3 * fd.sin(3 * y[1] * z[0])
    constant = fd.Constant([0.0, 0.0])
    places = [np.empty((X.size, 2)) for X in (Y, Z)]
    for X, place in zip((Y, Z), places):
        place[np.concatenate(X.comm.allgather(node_numbers(X)))] = np.concatenate(X.comm.allgather(X.coordinates))
    matrix = lopsided(places[0][:, None], places[1][None])
    expected = everything(Y, Z)
    for kernel in (lopsided, (expression, y, z), (fd.replace(expression, {z: constant}), y, constant), matrix):
        found = compress(kernel, 1e-8, Y, Z, sampling=WAYS[way])
        assert np.linalg.norm(approximation(found) - expected) < 1e-8 * found.norm


@on_ranks
def test_a_layer_in_factors_is_cut_without_its_values():
    """Bases that are not orthonormal, on two domains."""
    phi, psi = polynomials(label_space("annulus", "CG1")), laplace("disk", "CG1", 6)
    kernel, beta = LowRankKernel(phi, psi), np.random.default_rng(0).normal(size=(3, 6)) * [[1], [0.1], [0.01]]
    found = compress(kernel, 0.3, beta=beta)
    root = [np.sqrt(gathered(X, X.weights))[:, None] for X in (phi.Y, psi.Y)]
    whole = (root[0] * gathered(phi.Y, phi.values)) @ beta @ (root[1] * gathered(psi.Y, psi.values)).T
    s = np.linalg.svd(whole, compute_uv=False)
    left = whole - approximation(found)
    assert (found.method, found.evaluations, found.rank) == ("factors", 0, 1)
    np.testing.assert_allclose(found.singular_values, s[:1], rtol=1e-12)
    np.testing.assert_allclose(found.hilbert_schmidt.value, np.linalg.norm(left), rtol=1e-10)
    operator = found.operator.value, found.operator.optimal
    np.testing.assert_allclose(operator, [np.linalg.norm(left, 2), s[1]], rtol=1e-10)
    np.testing.assert_allclose(found.norm, kernel.norm(beta), rtol=1e-12)


def test_a_dense_layer_of_arrays_becomes_a_layer_of_low_rank():
    """A matrix that is nearly of rank 2: f(T) changes by what the operator's error allows."""
    Y = label_space("sphere", "DG0")
    rng = np.random.default_rng(0)
    B = rng.normal(size=(80, 2)) @ rng.normal(size=(2, 80)) / 40 + 1e-4 * rng.normal(size=(80, 80))
    a, z_0 = rng.normal(size=80), rng.normal(size=80)
    dense, initial = from_network(a, B, z_0, Y, tau=np.full(5, 0.2))
    found = compress(dense.learned_factors(), 0.05, beta=dense.kernel.get(0))
    assert found.rank == 2
    small = ResidualNetwork(
        Kernel(found.kernel.phi, found.kernel.psi, in_time="shared"),
        bias=Bias(in_time="shared"),
        layers=5,
        solver_parameters={"ts_rk_type": "1fe"},
    )
    small.kernel.set(0, found.beta)
    small.bias.set(0, dense.bias.get(0))
    f, g = (Y.values(net(initial))[:, 0] for net in (dense, small))
    apart = float(Y.sum(Y.weights @ (f - g) ** 2)) ** 0.5
    size = float(Y.sum(Y.weights @ f**2)) ** 0.5
    # Gronwall: tanh has slope 1, T = 1, and norm(f) grows to at most this size.
    assert 0 < apart < found.operator.value * np.exp(found.singular_values[0]) * 2 * size
    matrix = cell_indicators(Y)
    again = compress(B / Y.sum(matrix.values.T @ Y.weights), 0.05, Y)
    np.testing.assert_allclose(again.singular_values, found.singular_values, rtol=1e-8)


@on_ranks
def test_what_is_no_kernel_is_refused_by_name():
    Y, Z = spaces("disk, polygon")
    y, z = fd.SpatialCoordinate(Y.V.mesh()), fd.Constant([0.0, 0.0])
    with pytest.raises(ValueError, match="tolerance: expected a number > 0 and < 1, got 1"):
        compress(gauss, 1, Y)
    with pytest.raises(ValueError, match="confidence: expected a number > 0 and < 1"):
        compress(gauss, 0.1, Y, sampling=KernelSampling(confidence=99))
    with pytest.raises(TypeError, match="Y: expected a LabelSpace, got NoneType"):
        compress(gauss, 0.1)
    with pytest.raises(ValueError, match="beta: expected None, as coefficients belong to a LowRankKernel"):
        compress(gauss, 0.1, Y, beta=np.eye(2))
    with pytest.raises(ValueError, match=r"beta: expected numbers of shape \(3, 3\)"):
        compress(LowRankKernel(polynomials(Y), polynomials(Y)), 0.1, beta=np.eye(2))
    with pytest.raises(ValueError, match="kernel: expected a matrix of shape .*"):
        compress(np.eye(3), 0.1, Y)
    with pytest.raises(ValueError, match="kernel: it is zero"):
        compress(lambda y, z: 0 * gauss(y, z), 0.1, Y)
    with pytest.raises(ValueError, match="kernel: it is zero"):
        compress(lambda y, z: 0 * gauss(y, z), 0.1, Y, sampling=CROSSES)
    with np.errstate(divide="ignore"), pytest.raises(ValueError, match="kernel: expected finite values"):
        compress(lambda y, z: 1 / ((y - z) ** 2).sum(axis=-1), 0.1, Y)
    with pytest.raises(ValueError, match="such as a sum over the last axis"):
        compress(lambda y, z: y - z, 0.1, Y)
    with pytest.raises(ValueError, match="kernel: expected two symbols y and z, got the same one twice"):
        compress((fd.dot(y, y), y, y), 0.1, Y)
    with pytest.raises(ValueError, match="kernel: expected a SpatialCoordinate or a Constant of shape .* as the argument z"):
        compress((fd.dot(y, y), y, fd.Constant(0.0)), 0.1, Y)
    with pytest.raises(ValueError, match="kernel: expected a scalar expression"):
        compress((y - z, y, z), 0.1, Y)
    with pytest.raises(ValueError, match=r"expected \(expression, y, z\)"):
        compress((fd.dot(y, z), y), 0.1, Y)
    with pytest.raises(ValueError, match="expected a UFL expression of y and z alone"):
        compress((fd.Function(Y.V) * fd.dot(y, z), y, z), 0.1, Y)


@pytest.mark.parametrize("way", WAYS)
def test_a_kernel_of_too_large_a_rank_is_refused_with_what_was_reached(way):
    Y = label_space("disk", "DG0", 2)
    with pytest.raises(RuntimeError, match="larger 'largest_rank'"):
        compress(lambda y, z: gauss(20 * y, 20 * z), 1e-6, Y, sampling=WAYS[way], largest_rank=9)
