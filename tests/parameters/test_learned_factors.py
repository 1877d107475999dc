"""Factors of the kernel and layer times as controls: orthonormality, derivatives, gauge, truncation, files."""

import numpy as np
import pytest
from firedrake.adjoint import ReducedFunctional
from helpers import TIMES, half_square_distance, label_space, laplace, set_smooth, smooth
from helpers import name as space_name
from kinds import GRADIENT, options, smooth_values
from kinds import directions_of as directions
from kinds import field_problem as problem
from kinds import with_learned_factors as network
from numpy.testing import assert_allclose
from problems import coefficients, polynomials, taping
from pyadjoint import Control
from pyadjoint.reduced_functional_numpy import ReducedFunctionalNumPy

from fem_resnet import (
    Batch,
    Kernel,
    Layers,
    LearningProblem,
    ResidualNetwork,
    StepFailure,
    least_squares,
    load,
    save,
    tikhonov,
    train,
)
from fem_resnet.label_domain.orthonormal import orthonormal
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.parameters.retraction import Retraction
from fem_resnet.tape.recording import apply

on_ranks = pytest.mark.parallel([1, 2, 3])
on_two_ranks = pytest.mark.parallel([1, 2])
ROUND_OFF = 1e-12
SPACES = [("disk", "CG1"), ("annulus", "DG0"), ("sphere", "CG1"), ("hexes", "CG2")]


def pair(functionals, vectors):
    return float(sum(v._ad_dot(d) for d, v in zip(functionals, vectors, strict=True)))


# -- the retraction --------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("space", SPACES, ids=space_name)
def test_retracted_functions_are_orthonormal_in_the_label_measure(space):
    factors = network(space, size=2.0).learned_factors()
    for basis in (factors.phi, factors.psi):
        assert_allclose(basis.gram, np.eye(basis.rank), rtol=0, atol=ROUND_OFF)


@on_ranks
def test_retraction_starts_at_the_given_functions_and_sees_no_turning_among_them():
    basis = laplace("disk", "CG1", 4)
    retraction, turning = Retraction(basis), basis.values @ np.random.default_rng(0).normal(size=(4, 4))
    for X in (np.zeros_like(turning), turning):
        assert_allclose(retraction.forward([X], False), basis.values, rtol=0, atol=ROUND_OFF)
    assert_allclose(retraction.tangent([0 * turning], [turning]), 0, rtol=0, atol=ROUND_OFF)


@on_ranks
def test_a_basis_that_is_not_orthonormal_is_made_so_in_its_span():
    basis = polynomials(label_space("disk", "CG1"))
    found = orthonormal(basis)
    assert_allclose(found.gram, np.eye(3), rtol=0, atol=ROUND_OFF)
    inside = found.values @ found.project(basis.values)
    assert_allclose(inside, basis.values, rtol=0, atol=ROUND_OFF)
    assert orthonormal(found) is found


@on_ranks
@pytest.mark.parametrize("space", SPACES, ids=space_name)
def test_taylor_of_the_retraction(space, taylor):
    Y, basis = label_space(*space), laplace(*space, rank=4)
    X, target = Y.batch(0.5 * smooth(Y, 4, seed=3)), Y.batch(smooth(Y, 4, seed=4))
    with taping():
        phi = apply(Retraction(basis), [X])[0]
        J = ReducedFunctional(half_square_distance(phi, target, Y), [Control(X, riesz_map=Y.riesz_map)])
    h = [Y.batch(4 * smooth(Y, 4, seed=5))]
    taylor(J, [X], h, f"{space_name(space)}, QR retraction", "X", second_order=True)


# -- derivatives of the network --------------------------------------------------------------------------------------


@on_two_ranks
@pytest.mark.parametrize("space", SPACES, ids=space_name)
@pytest.mark.parametrize("layers_per_block", [1, None])
def test_taylor_with_learned_factors_and_times(space, layers_per_block, taylor):
    p = problem(network(space, layers_per_block=layers_per_block))
    taylor(
        p.reduced_functional(), p.functions, directions(p), f"{space_name(space)}, factors and times",
        f"{layers_per_block} a Block", second_order=True,
    )  # fmt: skip


@pytest.mark.parametrize("method", GRADIENT)
def test_taylor_with_learned_factors_and_times_by_every_method(method, taylor):
    p = problem(network(solver_parameters=options(method), steps=2))
    taylor(p.reduced_functional(), p.functions, directions(p), f"factors and times, {method}", "all", second_order=True)


@on_two_ranks
@pytest.mark.parametrize("which", ["layer_times", "phi", "psi"])
@pytest.mark.parametrize("in_time", ["linear", "shared"])
def test_taylor_of_each_alone_with_time_bases(which, in_time, taylor):
    p = problem(network(kernel_in_time=in_time, bias_in_time=in_time))
    J = p.reduced_functional()
    chosen = [parameter.name == which for parameter in p.parameters for _ in parameter.functions]
    # One control alone bends J little. So directions are longer, else the third remainder is round-off.
    h = [v._ad_mul(8.0 if c else 0.0) for v, c in zip(directions(p), chosen, strict=True)]
    taylor(J, p.functions, h, f"{which}, {in_time}", "alone", second_order=True)


@on_ranks
def test_hessians_with_learned_factors_are_symmetric():
    p = problem(network())
    J = p.reduced_functional()
    J(p.functions)
    J.derivative()
    u, v = directions(p, 1), directions(p, 2)
    left, right = pair(J.hessian(u), v), pair(J.hessian(v), u)
    assert abs(left - right) < 1e-10 * abs(left)


@on_ranks
def test_any_number_of_ranks_gives_the_same_gradient_of_factors_and_times():
    found = []
    for alone in (False, True):
        phi, psi = laplace("disk", "CG1", 4, alone), laplace("disk", "CG1", 3, alone)
        net = ResidualNetwork(Kernel(phi, psi, learn_factors=True), bias=psi, layers=Layers(TIMES, learn_times=True))
        set_smooth(net, np.random.default_rng(0))
        for k, parameter in enumerate(net.factors):
            parameter.set(0, 0.3 * smooth_values(parameter.space_basis, 20 + k))
        p = problem(net)
        derivative = p.reduced_functional().derivative()
        owners = [parameter for parameter in p.parameters for _ in parameter.functions]
        Y, values = net.Y, []
        for owner, d in zip(owners, derivative, strict=True):
            c = owner.space_basis.read(d)
            values.append(Y.sum(smooth(Y, 2, seed=1).T @ (Y.weights[:, None] * c)) if owner in net.factors else c)
        found.append(values)
    for one, other in zip(*found):
        assert_allclose(one, other, rtol=0, atol=1e-10)


@on_ranks
def test_derivative_in_the_final_time_is_the_rate_against_the_costate():
    """dJ/dT = <r(T), f_t(T)>, the last layer's time being the last control; times of one kernel for all layers."""
    net = network(kernel_in_time="shared", bias_in_time="shared", learn_factors=False, steps=64)
    p = problem(net, None)
    J, run = p.record()
    derivative = J.derivative()
    d_times = net.layer_times.space_basis.read(derivative[[f.name() for f in p.functions].index("layer_times_0")])
    f, r = net.Y.values(run.final), net.Y.values(run.costate(3))
    a, B = net.bias.space_basis.expand(net.bias.get(0)), net.kernel.space_basis.kernel
    rate = np.tanh(a[:, None] - B.apply(net.kernel.get(0), f))
    expected = float(net.Y.sum(np.einsum("i,is,is->", net.Y.weights, r, rate)))
    # The scheme's error, of order 4 in steps of 1/64 of a layer; autonomous, so that inner times do not matter.
    assert abs(d_times[-1] - expected) < 1e-7 * abs(expected)
    assert np.abs(d_times[:-1]).max() < 1e-7 * abs(expected)


# -- training --------------------------------------------------------------------------------------------------------


@on_two_ranks
def test_learned_factors_reach_what_fixed_ones_cannot():
    """Targets come from a network with other factors, into which the given ones of rank one can be turned."""
    Y, values = label_space("disk", "CG1"), []
    x, y = Y.coordinates.T
    teacher = ResidualNetwork(Kernel(polynomials(Y), in_time="shared"), bias=polynomials(Y), layers=2)
    teacher.kernel.set(0, [[0, 0, 0], [0, 1.0, 0.5], [0, 0, 0]])
    inputs = Y.batch(smooth(Y, 12))
    targets = teacher(inputs)
    for learn in (False, True):
        basis = laplace("disk", "CG1", 1)
        net = ResidualNetwork(Kernel(basis, in_time="shared", learn_factors=learn), bias=basis, layers=2)
        net.kernel.set(0, [[0.3]])
        result = train(
            LearningProblem(net, None, least_squares, tikhonov(1e-8), Batch(inputs, targets)),
            {"tao_max_it": 150, "tao_gatol": 1e-10}, monitor=lambda progress: None,
        )  # fmt: skip
        values.append(result.value)
    assert values[1] < 1e-4 * values[0], values


def test_newton_sees_no_gauge():
    """At a minimum only directions that P leaves out, r^2 a factor, have no curvature; Newton's method is quadratic."""
    Y, basis, rng = label_space("disk", "CG1"), laplace("disk", "CG1", 2), np.random.default_rng(0)
    teacher, net = (ResidualNetwork(Kernel(basis, learn_factors=True), bias=basis, layers=1, final_time=2.0) for _ in range(2))
    for one in (teacher, net):
        one.kernel.set(0, np.diag([1.5, 0.8]))
    for parameter in teacher.factors:
        parameter.set(0, 0.3 * rng.normal(size=(Y.nodes, 2)))
    inputs = Y.batch(2 * rng.normal(size=(Y.nodes, 60)))  # of all frequencies, so that the data determine the factors
    p = LearningProblem(net, None, least_squares, tikhonov(1e-3), Batch(inputs, teacher(inputs)))
    result = train(
        p, {"tao_type": "ntr", "tao_gatol": 1e-10, "tao_max_it": 40, "tao_ntr_ksp_rtol": 1e-10, "tao_ntr_ksp_max_it": 400},
        monitor=lambda progress: None,
    )  # fmt: skip
    norms = result.gradient_norms
    assert norms[-1] < 1e-10 and norms[-1] < 10 * norms[-2] ** 1.5, f"gradient norms {norms}"
    J = p.reduced_functional()
    J.derivative()
    array = ReducedFunctionalNumPy(J)
    at = [f.copy(deepcopy=True) for f in p.functions]
    columns = [array.get_global(J.hessian(array.set_local(at, e))) for e in np.eye(array.get_global(p.functions).size)]
    curvatures = np.sort(np.linalg.eigvals(columns).real)
    assert np.abs(curvatures[:8]).max() < 1e-14 and curvatures[8] > 1e-3, curvatures[:10]


@on_ranks
def test_a_layer_of_no_length_is_a_step_failure():
    p = problem(network())
    J = p.reduced_functional()
    functions = [f.copy(deepcopy=True) for f in p.functions]
    net = p.net
    net.layer_times.space_basis.write(functions[[f.name() for f in p.functions].index("layer_times_0")], [0.5, 0.4, 1.0])
    with pytest.raises(StepFailure, match="LENGTH_NOT_POSITIVE in layer 1, t = 0.5"):
        J(functions)
    assert np.isfinite(J(p.functions))


# -- truncation, files -----------------------------------------------------------------------------------------------


def dense(net, k, factors):
    return factors.phi.values @ net.kernel.get(k) @ factors.psi.weighted.T


@on_ranks
@pytest.mark.parametrize("learned", [False, True])
def test_truncation_cuts_what_is_below_its_tolerance_and_no_more(learned):
    net = network(learn_factors=learned, rank=4)
    low = np.random.default_rng(5).normal(size=(2, 4, 1)), np.random.default_rng(6).normal(size=(2, 3, 1))
    for k in range(3):  # rank two, and a little of everything
        beta = sum(a @ b.T for a, b in zip(*low)) * (1 + k) + 1e-7 * net.kernel.get(k)
        net.kernel.set(k, beta)
    small = net.truncated(1e-4)
    kernel = small.learned_factors()
    assert kernel.shape == (2, 2) and net.truncated(0.0).learned_factors().shape == (4, 3)
    initial = net.Y.batch(smooth(net.Y))
    assert_allclose(net.Y.values(small(initial)), net.Y.values(net(initial)), rtol=0, atol=1e-5)
    assert_allclose(net.Y.values(net.truncated(0.0)(initial)), net.Y.values(net(initial)), rtol=0, atol=ROUND_OFF)
    for layer in range(3):
        difference = LowRankKernel(net.learned_factors().phi, net.learned_factors().psi).norm(net.kernel.get(layer))
        assert abs(kernel.norm(small.kernel.get(layer)) - difference) < 1e-5 * difference


@on_ranks
def test_files_keep_learned_factors_and_times(tmp_path):
    net = network()
    save(tmp_path / "net.h5", net)
    loaded, _ = load(tmp_path / "net.h5")
    assert [p.name for p in loaded.parameters] == [p.name for p in net.parameters]
    assert_allclose(loaded.times, net.times)
    for one, other in zip(net.factors, loaded.factors):
        found = [coefficients(p, p.functions[0]) for p in (one, other)]
        assert np.sort(found[0].ravel()).shape == np.sort(found[1].ravel()).shape
    integrals = [
        n.Y.sum((smooth(n.Y, 4, seed=2) * n.Y.weights[:, None]).T @ n.Y.values(n(n.Y.batch(smooth(n.Y)))))
        for n in (net, loaded)
    ]
    assert_allclose(*integrals, rtol=0, atol=ROUND_OFF)


@on_two_ranks
def test_what_learned_factors_cannot_do_is_refused():
    net = network()
    with pytest.raises(ValueError, match="^ResidualNetwork.on: it does not take learned factors"):
        net.on(label_space("disk", "CG1", 2))
    with pytest.raises(ValueError, match="^kernel.learn_factors: expected one phi and one psi for all layers"):
        ResidualNetwork(Kernel([laplace("disk", "CG1", 4)] * 3, learn_factors=True), layers=TIMES)
    with pytest.raises(ValueError, match="^tolerance: expected a number >= 0 and < 1, got 2"):
        net.truncated(2)
