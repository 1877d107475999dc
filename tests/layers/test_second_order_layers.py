"""Tangents and Hessian actions of layers: exact for the discrete network, by every method with an adjoint."""

import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import SPACES, TIMES, laplace, network, smooth
from helpers import name as space_name
from kinds import ADAPTIVE, GRADIENT, adaptive, direction, options, point, recorded, with_layer_bases
from numpy.testing import assert_allclose
from problems import learning_problem
from problems import network as classifier
from pyadjoint.enlisting import Enlist
from pyadjoint.reduced_functional_numpy import ReducedFunctionalNumPy
from scipy.optimize import minimize

from fem_resnet import Batch, LearningProblem, ResidualNetwork, least_squares, tikhonov, train

on_ranks = pytest.mark.parallel([1, 2, 3])
on_two_ranks = pytest.mark.parallel([1, 2])

IN_TIME = [("linear", "linear"), ("shared", "layers"), ("layers", [0, 1, 0])]


def pair(functionals, directions):
    return float(sum(v._ad_dot(d) for d, v in zip(Enlist(functionals), Enlist(directions), strict=True)))


def directions(problem, seed=0):
    """One of size one for all that a problem learns, which no partition changes."""
    rng, result = np.random.default_rng(seed), []
    for parameter in problem.parameters:
        for basis in parameter.space_bases:
            function = type(parameter.functions[0])(basis.space)
            nodal = basis.space == problem.net.Y.V
            basis.write(function, smooth(problem.net.Y, 1, seed=seed)[:, 0] if nodal else rng.normal(size=basis.shape))
            result.append(function)
    return result


# -- Taylor tests ----------------------------------------------------------------------------------------------------


@on_two_ranks
@pytest.mark.parametrize("name", GRADIENT)
def test_hessian_of_every_method(name, annotation, rng, taylor):
    net = network(steps=2, solver_parameters=options(name))
    J, _ = recorded(net, annotation)
    taylor(J, point(J), direction(net, rng), f"{name}, second order", "all", second_order=True)


@pytest.mark.parametrize("space", SPACES, ids=space_name)
def test_hessian_on(space, annotation, rng, taylor):
    net = network(space, basis_for_bias=space[0] in ("disk", "sphere"))
    J, _ = recorded(net, annotation)
    taylor(J, point(J), direction(net, rng), f"{space_name(space)}, second order", "all", second_order=True)


@on_ranks
@pytest.mark.parametrize("layers_per_block", [2, 1, None][: None if COMM_WORLD.size < 3 else 1])
@pytest.mark.parametrize("in_time", IN_TIME, ids=str)
def test_hessian_with_time_bases(in_time, layers_per_block, taylor):
    net = classifier("disk", "CG1", bias_in_time=in_time[0], kernel_in_time=in_time[1], layers_per_block=layers_per_block)
    problem = learning_problem(net)
    J = problem.reduced_functional()
    taylor(J, problem.functions, directions(problem), f"in time {in_time}", f"{layers_per_block} a Block", second_order=True)


@on_two_ranks
@pytest.mark.parametrize("learn", ["initial", "both"])
def test_hessian_with_bases_of_each_layer_in_what_is_learned(learn, taylor):
    net = with_layer_bases()
    batch = Batch(net.Y.batch(smooth(net.Y)), net.Y.batch(smooth(net.Y, seed=9)))
    problem = LearningProblem(net, None, least_squares, tikhonov(0.05), batch, learn=learn)
    J = problem.reduced_functional()
    # Four times as long as elsewhere: J is nearly quadratic in the initial state, and round-off hides a small remainder.
    longer = [direction._ad_mul(4.0) for direction in directions(problem)]
    taylor(J, problem.functions, longer, "bases of layers, second order", learn, second_order=True)


@on_two_ranks
@pytest.mark.parametrize("name", ADAPTIVE)
def test_hessian_under_replay(name, annotation, rng, taylor):
    net = adaptive(name, 1e-3)
    J, _ = recorded(net, annotation)
    taylor(J, point(J), direction(net, rng), f"{name} adaptive, second order", "all", second_order=True)


# -- laws ------------------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("name", ["rk", "cn", "theta 0.7", "dirk"])
def test_hessians_of_layers_are_symmetric(name, annotation):
    net = network(steps=2, solver_parameters=options(name), layers_per_block=2)
    J, _ = recorded(net, annotation)
    J(point(J))
    J.derivative()
    u, v = direction(net, np.random.default_rng(1)), direction(net, np.random.default_rng(2))
    v[-1] = net.Y.batch(smooth(net.Y, seed=51))
    left, right = pair(J.hessian(u), v), pair(J.hessian(v), u)
    assert abs(left - right) < 1e-10 * abs(left)


@on_ranks
@pytest.mark.parametrize("name", GRADIENT)
def test_tangent_is_the_adjoint_of_the_adjoint_and_a_difference(name, annotation):
    """<dF v, w> = <v, dF^* w>, J' v from both sides and from J itself."""
    net = network(steps=2, solver_parameters=options(name))
    J, _ = recorded(net, annotation)
    m, v = point(J), direction(net, np.random.default_rng(3))
    J(m)
    by_adjoint, by_tangent = pair(J.derivative(), v), float(J.tlm(v))
    # Matrix-free linear solves go down by 1e-10.
    assert abs(by_adjoint - by_tangent) < (1e-8 if "matfree" in name else 1e-11) * abs(by_adjoint)
    eps = 1e-5
    plus, minus = (J([x._ad_add(d._ad_mul(sign * eps)) for x, d in zip(m, v)]) for sign in (1, -1))
    assert abs((plus - minus) / (2 * eps) - by_tangent) < 1e-7 * abs(by_tangent)


@pytest.mark.parametrize("method", [{}, {"ts_type": "cn"}, {"ts_type": "arkimex"}], ids=["rk", "cn", "arkimex"])
def test_hessian_agrees_with_dense_differences_of_the_gradient(method):
    basis = laplace("annulus", "DG0", 3)
    net = ResidualNetwork(basis, bias=basis, layers=TIMES[:3], activation="tanh", solver_parameters=method)
    batch = Batch(net.Y.batch(smooth(net.Y, 2)), net.Y.batch(smooth(net.Y, 2, seed=9)))
    J = LearningProblem(net, None, least_squares, tikhonov(0.1), batch).reduced_functional()
    array = ReducedFunctionalNumPy(J)
    x = np.random.default_rng(0).normal(size=2 * (3 + 9))

    def gradient(x):
        array(x)
        return array.get_global(J.derivative())

    eps = 1e-5
    differences = [(gradient(x + eps * e) - gradient(x - eps * e)) / (2 * eps) for e in np.eye(len(x))]
    gradient(x)
    dense = [array.get_global(J.hessian(array.set_local(point(J), e))) for e in np.eye(len(x))]
    # truncation eps^2 and round-off 1e-16/eps of numbers of size one
    assert_allclose(dense, differences, rtol=0, atol=1e-8)


@on_ranks
def test_hessian_actions_leave_gradient_states_and_costates_alone(annotation):
    net = network(layers_per_block=2)
    J, run = recorded(net, annotation)
    m, v = point(J), direction(net, np.random.default_rng(5))
    J(m)
    before = [np.array(d.dat.data_ro) for d in J.derivative()]
    fields = [net.Y.values(f).copy() for f in (run.costate(1), run.state(1))]
    J.hessian(v)
    for one, other in zip(fields, (run.costate(1), run.state(1))):
        assert_allclose(net.Y.values(other), one, rtol=0, atol=0)
    for one, other in zip(before, J.derivative()):
        assert_allclose(other.dat.data_ro, one, rtol=0, atol=0)


# -- training --------------------------------------------------------------------------------------------------------


def small_problem(regularisation=0.1):
    basis = laplace("disk", "CG1", 4)
    net = ResidualNetwork(basis, bias=basis, layers=2, activation="tanh")
    batch = Batch(net.Y.batch(smooth(net.Y, 6)), net.Y.batch(smooth(net.Y, 6, seed=9)))
    return LearningProblem(net, None, least_squares, tikhonov(regularisation), batch)


@on_two_ranks
@pytest.mark.parametrize("tao_type", ["nls", "ntr"])
def test_newton_trains_layers_faster_than_linearly_at_the_end(tao_type):
    """nls keeps a shift of the Hessian, of the size of the gradient before: |g_(k+1)| ~ |g_k| |g_(k-1)|, of order 1.618."""
    problem = small_problem()
    tight = {f"tao_{tao_type}_ksp_rtol": 1e-12, f"tao_{tao_type}_ksp_max_it": 200}
    result = train(problem, {"tao_type": tao_type, "tao_gatol": 1e-10, "tao_max_it": 60} | tight)
    norms = result.gradient_norms
    assert result.converged and norms[-1] < 1e-10, norms
    # Before round-off.
    logs = np.log([norm for norm in norms if norm > 1e-13])[-3:]
    assert (logs[2] - logs[1]) / (logs[1] - logs[0]) > 1.5, f"gradient norms {norms}"


# Newton-CG takes curvatures below an absolute threshold for zero: it gets J in larger units. trust-ncg solves for a step to
# the root of the gradient's size, and believes in no step by which J falls less than round-off: in smaller units its last
# steps are good enough to be few.
@pytest.mark.parametrize(
    "method, tolerance, unit", [("trust-ncg", {"gtol": 1e-17}, 1e-6), ("Newton-CG", {"xtol": 1e-12}, 1e3)]
)
def test_scipy_trains_layers_by_newton_steps(method, tolerance, unit):
    problem = small_problem()
    J = problem.reduced_functional()
    array = ReducedFunctionalNumPy(J)

    # SciPy takes Euclidean products: it gets derivatives as they are, not their representatives.
    def gradient(x):
        array(x)
        return unit * array.get_global(J.derivative())

    def action(x, v):
        gradient(x)
        return unit * array.get_global(J.hessian(array.set_local(problem.functions, v)))

    x = np.zeros(sum(parameter.dim for parameter in problem.parameters))
    result = minimize(
        lambda x: unit * float(array(x)), x, jac=gradient, hessp=action, method=method, options=tolerance | {"maxiter": 100}
    )
    norm = np.linalg.norm(gradient(result.x)) / unit
    assert norm < 1e-10, f"{norm:.1e}, {result.message}"


def test_gauss_newton_trains_layers():
    problem = small_problem()
    result = train(problem, {"tao_type": "nls", "tao_gatol": 1e-9, "tao_max_it": 100}, gauss_newton=True)
    assert result.converged, result.gradient_norms
    reached = result.value
    again = train(problem, {"tao_type": "lmvm", "tao_gatol": 1e-9})
    assert again.value > reached - 1e-9 and COMM_WORLD.size == 1
