"""Theorem 3.1: its constants, its stability estimate (3.1) and Picard's iteration, on a disk, an annulus and a sphere."""

import firedrake as fd
import numpy as np
import pytest
import sympy
from helpers import label_space, laplace, network, smooth
from numpy.testing import assert_allclose
from problems import ROUND_DOMAINS, autonomous_network
from scipy.special import factorial

from fem_resnet import (
    Activation,
    Basis,
    LabelSpace,
    Layers,
    LowRankKernel,
    Properties,
    ResidualNetwork,
    cell_indicators,
    integrated_norms,
    picard,
    solve_trajectory,
    stability_estimate,
    well_posedness_constants,
)  # fmt: skip

on_ranks = pytest.mark.parallel([1, 2, 3])
on_two_ranks = pytest.mark.parallel([1, 2])
each_domain = pytest.mark.parametrize("domain", ROUND_DOMAINS)


def constants_on(Y) -> Basis:
    """The function 1."""
    return Basis(Y, np.ones((Y.nodes, 1)), "given")


def small_disk() -> LabelSpace:
    """|Y| = 1/2."""
    mesh = fd.UnitDiskMesh(2)
    mesh.coordinates.dat.data_wo[...] = 0.4 * mesh.coordinates.dat.data_ro
    return LabelSpace(fd.FunctionSpace(mesh, "DG", 0))


def norms(Y, f) -> np.ndarray:
    return np.sqrt(Y.sum(Y.weights @ Y.values(f) ** 2))


# -- the constants ---------------------------------------------------------------------------------------------------


@on_ranks
@each_domain
@pytest.mark.parametrize("in_time", ["layers", "linear", "shared"])
def test_constants_are_integrals_of_norms_over_time(domain, in_time):
    """C_1 and C_2 of Theorem 3.1 against sums over many times; the operator norm gives less."""
    net = network((domain, "CG1"), bias_in_time=in_time, kernel_in_time=in_time)
    found, Y = well_posedness_constants(net), net.Y
    kernel = net.kernel.space_basis.kernel
    assert (found.times == net.times).all() and found.lipschitz == 1.0 and found.C_0 == 0.0

    def at(parameter, layer, s):
        weights = parameter.time_basis.weights(layer, s)
        return sum(w * parameter.get(k) for w, k in zip(weights, parameter.time_basis.active(layer)))

    x, w = np.polynomial.legendre.leggauss(40)
    C_1, C_2, operator = np.zeros((3, 4))
    for layer, length in enumerate(np.diff(net.times)):
        for s, weight in zip((x + 1) / 2, w / 2 * length):
            a, beta = at(net.bias, layer, s), at(net.kernel, layer, s)
            C_1[layer + 1 :] += weight * norms(Y, Y.batch(a))[0]
            C_2[layer + 1 :] += weight * kernel.norm(beta)
            operator[layer + 1 :] += weight * kernel.norm(beta, "operator")
    # The operator norm of matrices that are linear in t has kinks, where Gauss's rule loses digits.
    assert_allclose(found.C_1, C_1, rtol=1e-8)
    assert_allclose(found.C_2, C_2, rtol=1e-8)
    assert_allclose(found.operator, operator, rtol=1e-4)
    assert (found.operator[1:] < found.C_2[1:] * (1 - 1e-6)).all()
    assert_allclose(integrated_norms(net, "hs"), found.C_2)
    largest = max(kernel.norm(net.kernel.get(k), "linf") for k in range(len(net.kernel.functions)))
    linf = integrated_norms(net, "linf")
    # |b| <= |Y| sup |b|, at each time.
    assert (found.C_2[1:] <= Y.measure * linf[1:]).all() and (linf <= largest * net.times * (1 + 1e-9)).all()
    if in_time == "linear":
        fine = [kernel.norm(at(net.kernel, 0, s), "linf") for s in np.linspace(0, 1, 201)]
        exact = np.mean([fine[:-1], fine[1:]]) * net.times[1]
        assert exact * (1 - 1e-12) <= linf[1] <= 1.01 * exact
    elif in_time == "shared":
        assert_allclose(linf, largest * net.times)


@on_ranks
@each_domain
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"])
def test_solutions_are_bounded_by_the_constants(domain, activation):
    """(|f_I| + C_0 t + C_1) exp(C_2) by Gronwall."""
    net = network((domain, "CG1"), activation=activation, steps=4)
    initial = net.Y.batch(smooth(net.Y))
    bound = well_posedness_constants(net).solution_bound(norms(net.Y, initial))
    sizes = np.array([norms(net.Y, f) for f in net.run(initial).states()])
    assert bound.shape == sizes.shape and (sizes <= bound * (1 + 1e-12)).all()
    one = well_posedness_constants(net).solution_bound(norms(net.Y, initial)[1])
    assert_allclose(one, bound[:, 1])


@on_ranks
def test_the_drift_of_sigma_at_zero_has_the_root_of_the_measure():
    """The proof of Theorem 3.1 prints C_0 = |sigma(0)| |Y|: where |Y| < 1 solutions exceed that bound."""
    Y = small_disk()
    assert 0.49 < Y.measure < 0.51
    net = autonomous_network(LowRankKernel(constants_on(Y), constants_on(Y)), np.zeros((1, 1)), layers=2, activation="sigmoid")
    constants = well_posedness_constants(net)
    size = norms(Y, net(Y.batch(0 * Y.weights)))[0]
    assert_allclose(constants.C_0, 0.5 * Y.measure**0.5)
    assert_allclose(size, constants.solution_bound(0.0)[-1])  # attained
    printed = 0.5 * Y.measure
    assert size > 1.4 * printed
    solution = picard(net, Y.batch(0 * Y.weights))
    assert_allclose(solution.pieces[0].largest, solution.pieces[0].uniform_bound)


@on_ranks
def test_an_activation_that_is_not_lipschitz_is_refused():
    """Assumption 1."""
    s = sympy.Symbol("s")
    steep = Activation.from_sympy(s**3, Properties(np.inf, True, True, False, True, True, False))
    net = ResidualNetwork(laplace("disk", "CG1", 4), activation=steep)
    for verb in (well_posedness_constants, lambda net: picard(net, net.Y.batch(0 * net.Y.weights))):
        with pytest.raises(ValueError, match=r"^net: expected a Lipschitz activation, as Assumption 1 supposes, got s\*\*3$"):
            verb(net)


@on_ranks
def test_constants_are_those_of_functions_and_not_of_a_mesh():
    """(A2) of 3.2 and Assumption 1: a in L2(Y), b in L2(Y x Y); norms converge as the mesh is refined, all three of b."""
    found = []
    for refinement in (1, 2, 3):
        Y = label_space("annulus", "DG0", refinement)
        x, y = Y.coordinates.T
        basis = Basis(Y, np.column_stack([x + 1, y**2, x * y]), "given")
        kernel, beta = LowRankKernel(basis, basis), np.array([[1.0, 0.3, 0.0], [-0.5, 2.0, 0.1], [0.2, 0.0, 1.0]])
        constants = well_posedness_constants(autonomous_network(kernel, beta, np.cos(x), layers=1))
        found.append([constants.C_1[-1], constants.C_2[-1], constants.operator[-1], kernel.norm(beta, "linf")])
    changes = np.abs(np.diff(found, axis=0)) / found[-1]
    # sup |b| is at the boundary, which midpoints approach at first order; integrals converge at second order.
    assert (changes[1] < 0.5 * changes[0]).all() and (changes[1] < [0.02, 0.02, 0.02, 0.1]).all(), changes


# -- (3.1) -----------------------------------------------------------------------------------------------------------


@on_ranks
@each_domain
@pytest.mark.parametrize("scheme", ["1fe", "4"])
def test_random_pairs_of_solutions_part_by_no_more_than_the_estimate(domain, scheme):
    """(3.1) with exp(sup |sigma'| int |b| ds), for the discrete network, on pairs with large and small differences."""
    options = {"solver_parameters": {"ts_type": "rk", "ts_rk_type": scheme}}
    net = network((domain, "CG1"), size=1.5, kernel_in_time="linear", **options)
    Y = net.Y
    first = smooth(Y, 12, seed=3)
    second = first + smooth(Y, 12, seed=4) * np.geomspace(1e-3, 10, 12)
    estimate = stability_estimate(net, Y.batch(first), Y.batch(second))
    assert (estimate.distances <= estimate.bounds * (1 + 1e-12)).all()
    assert (estimate.ratios <= 1 + 1e-12).all() and (estimate.ratios[0] == 1).all()
    assert_allclose(estimate.distances[-1], norms(Y, Y.batch(Y.values(net(Y.batch(first))) - Y.values(net(Y.batch(second))))))
    with pytest.raises(ValueError, match=r"^second: expected a Function of "):
        stability_estimate(net, Y.batch(first), Y.batch(second[:, :2]))


@on_ranks
@each_domain
def test_the_estimate_is_sharp_and_no_rate_bounds_it(domain):
    """(3.1) prints e^(Lt): with b ~ t^(-1/2), in L1(0, T), distances grow by e^(2 sqrt t), the corrected form."""
    Y = label_space(domain, "CG1")
    times = np.concatenate([[0], np.geomspace(1e-8, 1, 17)])
    net = ResidualNetwork(constants_on(Y), layers=Layers(times, steps=4), activation="identity")
    for l in range(net.layers):
        mean = 2 * (times[l + 1] ** 0.5 - times[l] ** 0.5) / (times[l + 1] - times[l])
        net.kernel.set(l, np.array([[-mean / Y.measure]]))
    estimate = stability_estimate(net, Y.batch(0 * Y.weights), Y.batch(1 + 0 * Y.weights))
    assert_allclose(estimate.constants.C_2, 2 * times**0.5)
    # The error of rk4 in steps with a growth of up to e^0.3.
    assert_allclose(estimate.ratios, 1.0, rtol=1e-3)
    grown = estimate.distances[:, 0] / estimate.distances[0, 0]
    for L in (1, 10, 100):
        assert (grown > 1.0001 * np.exp(L * times)).any(), "the printed form would hold"


# -- Picard's iteration ----------------------------------------------------------------------------------------------


@on_ranks
@each_domain
@pytest.mark.parametrize("in_time", ["layers", "linear"])
def test_the_iteration_ends_at_the_solution(domain, in_time):
    """Theorem 3.1, existence: on the whole of (0, T) and on pieces; the limit is that of fine steps of the network's TS."""
    net = network((domain, "CG1"), kernel_in_time=in_time, bias_in_time=in_time)
    initial = net.Y.batch(smooth(net.Y))
    exact = net.Y.values(solve_trajectory(net, initial, steps=64).final)
    for split in (True, False):
        solution = picard(net, initial, split=split)
        assert solution.converged
        # The error of Gauss's rule where the bias changes most.
        assert_allclose(net.Y.values(solution.final), exact, atol=2e-9)
        assert (len(solution.pieces) > 1) == split
        assert solution.pieces[0].start == 0 and solution.pieces[-1].end == net.times[-1]


def test_its_limit_is_of_order_eight_in_the_substeps(monkeypatch):
    """The order is 8, as of Gauss's method with four points."""
    net = network(kernel_in_time="linear", bias_in_time="linear")
    initial = net.Y.batch(smooth(net.Y))
    exact = net.Y.values(solve_trajectory(net, initial, steps=128).final)
    errors = []
    for substep in (0.15, 0.1, 0.05):
        monkeypatch.setattr("fem_resnet.theory.sensitivity.picard_iteration._SUBSTEP", substep)
        errors.append(net.Y.norm(net.Y.batch(net.Y.values(picard(net, initial).final) - exact)))
    # From the first to the last error; single orders scatter, as usual for a high order.
    assert np.log(errors[0] / errors[-1]) / np.log(3) > 7, errors


@on_two_ranks
@each_domain
@pytest.mark.parametrize("activation", ["tanh", "relu", "softplus"])
def test_increments_fall_as_the_factorial_says(domain, activation):
    """|f^(n+1) - f^n| <= C_2^n / n! |f^1 - f^0| in C([0, T]; L2(Y)), though C_2 > 1."""
    net = network((domain, "CG1"), size=2.0, activation=activation)
    (piece,) = picard(net, net.Y.batch(smooth(net.Y)), split=False).pieces
    assert piece.C_2 > 2
    assert_allclose(piece.C_2, well_posedness_constants(net).C_2[-1])
    # Round-off in the sums. The printed bound C_2^n is no bound of use here.
    floor = 1e-14 * piece.increments[0]
    assert (piece.increments <= piece.bounds + floor).all()
    assert_allclose(piece.bounds[3], piece.C_2**3 / 6 * piece.increments[0])
    assert_allclose(piece.rates, piece.increments[1:] / piece.increments[:-1])
    assert (piece.rates[3:7] < 1).all()


@on_ranks
@each_domain
def test_the_factorial_is_attained(domain):
    """f_t = c f, c > 0: |f^(n+1) - f^n| = c^(n+1) T^(n+1) / (n+1)! |f_I| up to the last digits."""
    phi = laplace(domain, "CG1", 1)
    net = autonomous_network(LowRankKernel(phi, phi), np.array([[-3.0]]), layers=2, activation="identity")
    (piece,) = picard(net, net.Y.batch(phi.values), split=False).pieces
    n = np.arange(1, 13)
    assert_allclose(piece.increments[:12, 0], 3.0**n / factorial(n), rtol=1e-9)
    assert_allclose(piece.C_2, 3.0)


@on_two_ranks
@each_domain
def test_on_pieces_C_2_is_below_one_and_bounds_hold(domain):
    """The proof of Theorem 3.1: |f^n| <= (|f_I| + C_0 T + C_1) / (1 - C_2) on each piece, and increments fall by C_2."""
    net = network((domain, "CG1"), size=2.0, activation="softplus")
    solution = picard(net, net.Y.batch(smooth(net.Y)))
    assert len(solution.pieces) > 2
    for piece, next_piece in zip(solution.pieces, [*solution.pieces[1:], None]):
        assert piece.C_2 < 1
        assert (piece.largest <= piece.uniform_bound).all()
        assert (piece.increments[1:] <= piece.C_2 * piece.increments[:-1] + 1e-14 * piece.increments[0]).all()
        assert (piece.increments <= piece.bounds + 1e-14 * piece.increments[0]).all()
        if next_piece is not None:
            assert_allclose(piece.end, next_piece.start)
    assert_allclose(sum(piece.C_2 for piece in solution.pieces), well_posedness_constants(net).C_2[-1])
    (whole,) = picard(net, net.Y.batch(smooth(net.Y)), split=False).pieces
    assert np.isinf(whole.uniform_bound).all()


@on_ranks
def test_layers_may_have_bases_of_their_own():
    four = laplace("disk", "CG1", 4)
    bases = [Basis(four.Y, four.values[:, :3], "given"), four, Basis(four.Y, four.values[:, 1:], "given")]
    net = ResidualNetwork(bases, layers=3, final_time=2.0)
    for l, basis in enumerate(bases):
        net.kernel.set(l, np.eye(basis.rank) + 0.3 * np.cos(np.arange(basis.rank**2.0)).reshape(basis.rank, -1))
        net.bias.set(l, smooth(net.Y, 1, seed=l)[:, 0])
    initial = net.Y.batch(smooth(net.Y))
    exact = net.Y.values(solve_trajectory(net, initial, steps=16).final)
    assert_allclose(net.Y.values(picard(net, initial).final), exact, atol=1e-9)


@on_ranks
def test_the_iteration_says_that_it_has_not_ended():
    net = network(size=2.0)
    solution = picard(net, net.Y.batch(smooth(net.Y)), split=False, max_iterations=4)
    assert not solution.converged and len(solution.pieces[0].increments) == 4
    with pytest.raises(TypeError, match=r"^initial: expected a Function"):
        picard(net, smooth(net.Y))


@on_ranks
def test_the_answer_does_not_depend_on_the_partition():
    """The whole mesh on every rank alone."""
    answers = []
    for alone in (False, True):
        net = network(alone=alone, kernel_in_time="linear")
        solution = picard(net, net.Y.batch(smooth(net.Y)))
        constants = well_posedness_constants(net)
        estimate = stability_estimate(net, net.Y.batch(smooth(net.Y)), net.Y.batch(smooth(net.Y, seed=5)))
        answers.append(
            [constants.C_1, constants.C_2, constants.operator, estimate.distances, norms(net.Y, solution.final)]
            + [piece.increments[:6] for piece in solution.pieces]
        )
    for ours, theirs in zip(*answers, strict=True):
        assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@on_ranks
def test_the_iteration_is_that_of_a_residual_network_of_cells():
    """Cell indicators: the rank is the number of cells."""
    Y = label_space("disk", "DG0")
    basis = cell_indicators(Y)
    matrix = 0.05 * np.cos(np.arange(Y.size)[:, None] + 2.0 * np.arange(Y.size))
    net = autonomous_network(LowRankKernel(basis, basis), matrix, smooth(Y, 1)[:, 0], layers=2, steps=20)
    solution = picard(net, Y.batch(smooth(Y)))
    assert_allclose(Y.values(solution.final), Y.values(net(Y.batch(smooth(Y)))), atol=1e-6)  # rk4 with steps of 1/40
