"""Terms beyond Tikhonov's, and weights of single parameters: derivatives, convexity, integrals, other meshes, refusals."""

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_WORLD, dx, grad, inner
from helpers import flat_network, label_space, laplace, smooth
from kinds import directions_of, field_problem, with_learned_factors
from numpy.testing import assert_allclose
from problems import TIMES, gathered, learning_problem, network, taping
from pyadjoint import ReducedFunctional

from fem_resnet import (
    Basis,
    Channels,
    Kernel,
    LabelSpace,
    PositiveSemidefinite,
    Regulariser,
    ResidualNetwork,
    Symmetric,
    given_basis,
    huber,
    laplace_basis,
    locality,
    point_space,
    smooth_in_space,
    smooth_in_time,
    smoothed_l1,
    tikhonov,
    total_variation,
    train,
    ufl_functional,
)
from fem_resnet.verify.reference import Reference

on_ranks = pytest.mark.parallel([1, 2, 3])
ALONE = COMM_WORLD.size == 1
DOMAINS = [("disk", "CG1", "nodes"), ("annulus", "CG2", "basis"), ("sphere", "CG1", "basis"), ("block", "CG1", "nodes")]
DOMAINS = DOMAINS if ALONE else DOMAINS[1:3]


def double_well(a):
    return (a**2 - 1) ** 2 * dx + inner(grad(a), grad(a)) ** 2 * dx


SMOOTH = {
    "L1": smoothed_l1(0.7, 0.3, kernel=0.2),
    "total variation": total_variation(0.7, 0.5, initial=0.1),
    "UFL": ufl_functional(0.7, double_well) + ufl_functional(0.2, double_well, "initial"),
    "sum": smoothed_l1(0.1, 0.2) + tikhonov(0.3, W=0.0) + total_variation(0.3, 0.2),
}
CONVEX = [smoothed_l1(0.7, 0.1), huber(0.7, 0.3), total_variation(0.7, 0.1), locality(0.7)]


def everything(domain, element, bias, **options):
    """A problem with a bias, a kernel, a head and a learned initial state of two samples."""
    rank = 4 if domain in ("sphere", "disk") else 5
    phi = laplace(domain, element, rank, options.pop("alone", False))
    net = flat_network(phi, times=TIMES, bias=phi if bias == "basis" else None, **options)
    rng = np.random.default_rng(3)
    for k in range(net.layers):
        net.bias.set(k, rng.normal(size=phi.rank) if bias == "basis" else smooth(net.Y, 1, seed=k)[:, 0])
        if net.settings.kernel.among is None:
            net.kernel.set(k, rng.normal(size=(phi.rank, phi.rank)))
        else:
            net.kernel.learned.set(k, rng.normal(size=net.kernel.learned.space_bases[k].shape))
    return learning_problem(net, samples=2).replace(learn="both")


def recorded(R, problem):
    with taping():
        value = R(problem.penalised())
    return ReducedFunctional(value, problem.controls())


# -- derivatives --------------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize(
    "domain, element, bias, kind", [(*d, "sum") for d in DOMAINS] + [(*DOMAINS[1], kind) for kind in SMOOTH if ALONE][:-1]
)
def test_taylor_of_smooth_terms(domain, element, bias, kind, taylor):
    problem = everything(domain, element, bias)
    J = recorded(SMOOTH[kind], problem)
    taylor(J, problem.functions, directions_of(problem, 1), "terms of regularisers", kind, second_order=True)


@on_ranks
@pytest.mark.parametrize("domain, element, bias", DOMAINS[:2])
def test_derivatives_of_hubers_term(domain, element, bias, taylor):
    """Its second derivative jumps: a step across no joint shows all of it, as the gradient is then linear."""
    problem = everything(domain, element, bias)
    J, h = recorded(huber(0.7, 0.3), problem), directions_of(problem, 2)
    taylor(J, problem.functions, h, "terms of regularisers", "Huber")
    e, found = 1e-7, []
    for sign in (1, -1):
        J([f.copy(deepcopy=True)._ad_add(v._ad_mul(sign * e)) for f, v in zip(problem.functions, h)])
        found.append([np.array(d.dat.data_ro) for d in J.derivative()])
    J(problem.functions)
    J.derivative()
    actions = J.hessian(h)
    assert sum(np.abs(action.dat.data_ro).max(initial=0) > 0 for action in actions) or not ALONE
    for ahead, behind, action in zip(*found, actions):
        assert_allclose((ahead - behind) / (2 * e), action.dat.data_ro, atol=1e-7)


@on_ranks
@pytest.mark.parametrize("R", [smoothed_l1(0.3, 0.2), locality(0.4) + smoothed_l1(0.1, 0.2)])
def test_terms_of_a_kernel_that_is_made_of_controls(R, taylor):
    """They take the kernel, and the chain rule gives the controls their derivatives."""
    problem = everything("annulus", "CG1", "basis", kernel_set=PositiveSemidefinite())
    J = recorded(R, problem)
    taylor(J, problem.functions, directions_of(problem, 1), "terms of regularisers", "made of controls", second_order=True)


@on_ranks
def test_j_with_all_terms_has_exact_derivatives_and_is_trained(taylor):
    problem = everything("annulus", "CG1", "basis").replace(regulariser=SMOOTH["sum"] + locality(0.1))
    taylor(problem.reduced_functional(), problem.functions, directions_of(problem), "terms of regularisers", "in J", True)
    before = float(problem.evaluate()[0])
    result = train(problem, {"tao_max_it": 15})
    assert float(problem.evaluate()[0]) < 0.8 * before, result.reason
    J, h = problem.reduced_functional(gauss_newton=True), directions_of(problem, 2)
    J(problem.functions)
    J.derivative()
    assert sum(d._ad_dot(v) for d, v in zip(J.hessian(h), h)) > 0


# -- values -------------------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("domain, element, bias", DOMAINS[1::2])
def test_values_are_those_written_out(domain, element, bias):
    """At all pairs of nodes, and by forms, in `verify`."""
    problem = everything(domain, element, bias)
    for R in (SMOOTH["L1"], SMOOTH["total variation"], CONVEX[1], CONVEX[3], tikhonov(0.3, kernel=0.7, mu=0.0)):
        problem = problem.replace(regulariser=R)
        with Reference(problem) as reference:
            assert float(R(problem.penalised())) == pytest.approx(reference.regulariser(), rel=1e-11)


def test_l1_of_a_kernel_is_the_double_integral_of_its_modulus():
    """b = 2 y_1 on the disk: int |b| dy dz = 2 (4/3) pi; epsilon is all that it may be too low by, at each point."""
    Y = label_space("disk", "CG1", 4)
    x = fd.SpatialCoordinate(Y.V.mesh())
    phi = given_basis(Y, [1.0, x[0], x[1]])
    net = flat_network(phi, layers=1, final_time=0.5)
    beta = np.zeros((3, 3))
    beta[1, 0] = 2.0
    net.kernel.set(0, beta)
    exact, area = 2 * 4 / 3 * np.pi, np.pi
    for epsilon in (0.1, 1e-3):
        value = float(smoothed_l1(3.0, epsilon)([net.kernel]))
        assert 3 * 0.5 * (0.985 * exact - epsilon * area**2) < value < 3 * 0.5 * exact


def test_total_variation_of_a_jump_tends_to_its_length_times_its_height():
    """A step of height 2 over an edge of length 1 of a plate of 2 x 1."""
    Y = LabelSpace(fd.FunctionSpace(fd.RectangleMesh(40, 20, 2.0, 1.0), "CG", 1))
    net = flat_network(laplace_basis(Y, 2), layers=1, final_time=3.0)
    net.bias.set(0, np.clip(20 * (Y.coordinates[:, 0] - 1), -1, 1))
    assert float(total_variation(1.0, 1e-4)([net.bias])) == pytest.approx(3 * 2.0, rel=1e-3)


@on_ranks
def test_each_parameter_has_its_weight():
    problem = everything("annulus", "CG1", "nodes")
    parameters = problem.penalised()
    own = {"bias": 0.2, "kernel": 0.0, "mu": 3.0}
    for make in (tikhonov, lambda w, **more: huber(w, 0.2, **more), lambda w, **more: smoothed_l1(w, 0.2, **more)):
        expected = sum(own.get(p.name, 0.5) * float(make(1.0)([p])) for p in parameters)
        assert float(make(0.5, **own)(parameters)) == pytest.approx(expected, rel=1e-13)
        gradients = recorded(make(0.5, **own), problem).derivative()
        whole = recorded(make(1.0), problem).derivative()
        names = [p.name for p in problem.parameters for _ in p.functions]
        for name, g, one in zip(names, gradients, whole):
            assert_allclose(g.dat.data_ro, own.get(name, 0.5) * one.dat.data_ro, rtol=1e-12, atol=1e-15)
    for make in (smooth_in_space, smooth_in_time):
        expected = 0.5 * float(make(1.0)([problem.net.kernel])) + 0.1 * float(make(1.0)([problem.net.bias]))
        assert float(make(0.5, bias=0.1)(problem.net.parameters)) == pytest.approx(expected, rel=1e-13)


@on_ranks
def test_functionals_are_those_of_the_tape():
    problem = everything("annulus", "CG1", "nodes")
    for R in (SMOOTH["sum"], CONVEX[1] + CONVEX[3]):
        on_tape = iter(recorded(R, problem).derivative())
        for p in problem.parameters:
            found = R.functionals(p, [p.get(k) for k in range(len(p.functions))])
            for basis, d in zip(p.space_bases, found, strict=True):
                assert_allclose(d, basis.read(next(on_tape)), rtol=1e-12, atol=1e-15)


@on_ranks
@pytest.mark.parametrize("R", [*SMOOTH.values(), CONVEX[1], CONVEX[3]])
def test_terms_are_the_same_on_every_number_of_ranks(R):
    """Value, gradient and Hessian action against the whole mesh on each rank alone."""
    found = []
    for alone in (False, True):
        problem = everything("disk", "CG1", "nodes", alone=alone)
        J, h = recorded(R, problem), directions_of(problem, 2)
        value = float(J(problem.functions))
        parts = [d._ad_dot(v) for d, v in zip(J.derivative(), h)]
        found.append([value, *parts, *(d._ad_dot(v) for d, v in zip(J.hessian(h), h))])
    assert_allclose(*found, rtol=1e-10, atol=1e-12)


@on_ranks
@pytest.mark.parametrize("R", [smoothed_l1(1.0, 0.1), huber(1.0, 0.3), total_variation(1.0, 0.5), locality(1.0)])
def test_finer_meshes_have_the_same_value_to_the_order_of_the_mesh(R):
    found = []
    for n in (1, 2, 4):
        Y = LabelSpace(fd.FunctionSpace(fd.AnnulusMesh(1, 0.4, 3 * n, 16 * n), "CG", 1))
        if n == 1:
            phi = laplace_basis(Y, 5)
            net = flat_network(phi, bias=phi, times=TIMES)
            rng = np.random.default_rng(2)
            for k in range(net.layers):
                net.bias.set(k, rng.normal(size=5))
                net.kernel.set(k, rng.normal(size=(5, 5)))
            first = net
        else:
            net = first.on(Y)
        found.append(float(R([net.bias, net.kernel])))
    coarse, fine = found[0] - found[1], found[1] - found[2]
    assert abs(fine) < 0.4 * abs(coarse), f"order {np.log2(abs(coarse / fine)):.2f}, expected 2"
    assert abs(fine) < 0.02 * found[2]


# -- convexity ----------------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("R", [*CONVEX, tikhonov(0.7), smooth_in_space(0.7), smooth_in_time(0.7)])
def test_convex_terms_are_convex(R):
    problem = everything("annulus", "CG1", "nodes")
    J, rng = recorded(R, problem), np.random.default_rng(0)
    assert R.convex
    for seed in range(2):
        m, n = (directions_of(problem, 10 * seed + s) for s in (1, 2))
        m = [f._ad_mul(float(rng.uniform(0.01, 3))) for f in m]
        middle = [f._ad_mul(0.5)._ad_add(g._ad_mul(0.5)) for f, g in zip(m, n)]
        ends = 0.5 * (float(J(m)) + float(J(n)))
        assert float(J(middle)) <= ends * (1 + 1e-12)
        J.derivative()
        assert sum(d._ad_dot(v) for d, v in zip(J.hessian(n), n)) >= -1e-12 * ends


def test_a_double_well_is_not_convex_and_gauss_newton_refuses_it():
    problem = everything("annulus", "CG1", "nodes").replace(regulariser=ufl_functional(0.1, double_well))
    assert not problem.regulariser.convex and not problem.regulariser.quadratic
    problem.reduced_functional()
    with pytest.raises(ValueError, match="^Gauss-Newton: it does not take a regulariser that need not be convex; say"):
        problem.reduced_functional(gauss_newton=True)
    quartic = ufl_functional(0.1, lambda a: a**4 * dx, convex=True)
    problem.replace(regulariser=quartic).reduced_functional(gauss_newton=True)
    assert (tikhonov(1.0) + locality(1.0)).quadratic and not huber(1.0, 1.0).quadratic


def test_a_ufl_functional_that_is_quadratic_is_tikhonovs_with_a_consistent_mass_matrix():
    net = network("disk", "CG1")
    R = ufl_functional(0.4, lambda a: a**2 / 2 * dx)
    functions = []
    for k in range(net.layers):
        a = fd.Function(net.Y.V)
        a.dat.data_wo[...] = net.bias.get(k)
        functions.append(a)
    expected = sum(tau * 0.2 * fd.assemble(a**2 * dx) for tau, a in zip(np.diff(TIMES), functions))
    assert float(R([net.bias, net.kernel])) == pytest.approx(expected, rel=1e-13)
    linear = ufl_functional(0.4, lambda a: a * dx)
    problem = field_problem(net, linear)
    J = recorded(linear, problem)
    J.derivative()
    assert all((d.dat.data_ro == 0).all() for d in J.hessian(directions_of(problem)))


# -- locality -----------------------------------------------------------------------------------------------------------


def circle(n=24, radius=0.7):
    return LabelSpace(fd.FunctionSpace(fd.CircleManifoldMesh(n, radius), "CG", 1))


@on_ranks
def test_locality_on_a_circle_is_the_squared_differences_of_neighbouring_multipliers():
    phi = laplace_basis(circle(), 7)
    net = flat_network(phi, layers=1, final_time=0.5)
    k = np.array([1.0, -0.3, 0.5, 2.0])
    net.kernel.set(0, np.diag(k[[0, 1, 1, 2, 2, 3, 3]]))
    expected = 3 / 2 * 0.5 * 2 * 0.7**2 * np.sum(np.diff(k) ** 2)
    # the nodes are those of a polygon, on which the functions are the circle's
    assert float(locality(3.0)([net.kernel])) == pytest.approx(expected, rel=1e-9)
    net.kernel.set(0, 5.0 * np.eye(7))
    assert abs(float(locality(3.0)([net.kernel]))) < 1e-12
    periodic = laplace_basis(LabelSpace(fd.FunctionSpace(fd.PeriodicIntervalMesh(24, 2 * np.pi * 0.7), "CG", 1)), 7)
    net = flat_network(periodic, layers=1, final_time=0.5)
    net.kernel.set(0, np.diag(k[[0, 1, 1, 2, 2, 3, 3]]))
    with pytest.raises(ValueError, match="^locality: expected coordinates that do not jump"):
        locality(3.0)([net.kernel])
    around = locality(3.0, lambda x: 0.7 * np.column_stack([np.cos(x[:, 0] / 0.7), np.sin(x[:, 0] / 0.7)]))
    assert float(around([net.kernel])) == pytest.approx(expected, rel=1e-9)


@on_ranks
def test_locality_of_a_linear_set_is_that_of_its_kernels_with_channels():
    """Functionals pair with kernels of the set alone, so that they are compared in its controls."""
    mesh = fd.PeriodicIntervalMesh(24, 2 * np.pi)
    phi = laplace_basis(Channels(LabelSpace(fd.FunctionSpace(mesh, "CG", 1)), 2), 7)
    among = Symmetric(phi, fd.as_vector([fd.Constant(1.0)]))
    R = locality(3.0, lambda x: np.column_stack([np.cos(x[:, 0]), np.sin(x[:, 0])]))
    random = np.random.default_rng(0)
    beta, other = (among.projected(random.normal(size=(14, 14))) for _ in range(2))
    found, forms = [], []
    for kernel in (Kernel(phi), Kernel(phi, among=among)):
        penalty = R.terms[0][1].on(ResidualNetwork(kernel, layers=1).kernel.learned.acting())
        forms.append(penalty.functionals([beta])[0])
        found.append([penalty.value([beta]), np.sum(forms[-1] * other)])
    assert_allclose(found[1], found[0], rtol=1e-10)
    assert found[0][0] > 1
    # It is the part in the set: this other way was taken.
    assert_allclose(forms[1], among.projected(forms[0]), atol=1e-12)
    outside = np.random.default_rng(1).normal(size=(14, 14))
    assert_allclose(penalty.functionals([outside])[0], penalty.functionals([among.projected(outside)])[0], atol=1e-12)


@on_ranks
def test_locality_on_a_sphere_couples_neighbouring_degrees():
    Y = LabelSpace(fd.FunctionSpace(fd.UnitIcosahedralSphereMesh(3), "CG", 1))
    net = flat_network(laplace_basis(Y, 9), layers=1, final_time=1.0)
    k = np.array([1.0, -0.5, 0.7])
    net.kernel.set(0, np.diag(k[[0, 1, 1, 1, 2, 2, 2, 2, 2]]))
    # sum over d, i of degree l, j of degree l + 1 of (phi_i, x_d phi_j)^2 is l + 1
    expected = 0.5 * 2 * (1 * (k[0] - k[1]) ** 2 + 2 * (k[1] - k[2]) ** 2)
    assert float(locality(1.0)([net.kernel])) == pytest.approx(expected, rel=0.02)


@on_ranks
def test_locality_sees_neither_turned_eigenfunctions_nor_another_basis_of_the_same_space():
    phi = laplace("annulus", "CG1", 5)
    beta, Q = np.random.default_rng(0).normal(size=(5, 5)), np.random.default_rng(1).normal(size=(5, 5))
    values = []
    for basis, c in ((phi, beta), (Basis(phi.Y, phi.values @ Q, "given"), np.linalg.solve(Q, np.linalg.solve(Q, beta.T).T))):
        net = flat_network(basis, layers=1, final_time=1.0)
        net.kernel.set(0, c)
        values.append(float(locality(1.0)([net.kernel])))
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    assert values[0] > 1e-3


@on_ranks
def test_terms_on_a_graph_and_locality_by_an_embedding():
    A = np.diag(np.ones(7), 1)
    Y = point_space(np.full(8, 0.5), graph=A + A.T)
    numbers = Y.numbers
    net = flat_network(laplace_basis(Y, 3), layers=1, final_time=1.0)
    net.kernel.set(0, np.diag([1.0, 0.5, -1.0]))
    net.bias.set(0, numbers - 3.0)
    assert float(smoothed_l1(2.0, 1e-9)([net.bias])) == pytest.approx(2 * 0.5 * (3 + 2 + 1 + 0 + 1 + 2 + 3 + 4), rel=1e-7)
    with pytest.raises(ValueError, match="^total_variation: expected a function on a label domain with a mesh"):
        total_variation(1.0, 0.1)([net.bias])
    with pytest.raises(ValueError, match="^locality: expected a label domain with a mesh, got points; give an embedding"):
        locality(1.0)([net.kernel])
    phi = gathered(Y, np.column_stack([net.kernel.space_basis.kernel.phi.values, numbers]))
    X = (phi[:, :3] * 0.5).T @ (phi[:, 3:] * phi[:, :3])
    expected = 0.5 * np.sum(X**2 * np.subtract.outer([1.0, 0.5, -1.0], [1.0, 0.5, -1.0]) ** 2)
    assert float(locality(1.0, lambda x: numbers[:, None])([net.kernel])) == pytest.approx(expected, rel=1e-9)


# -- refusals -----------------------------------------------------------------------------------------------------------


def test_weights_of_other_parameters_are_refused():
    with pytest.raises(TypeError, match="^kernl: expected weights of bias, kernel, V, W, mu, initial alone"):
        tikhonov(0.1, kernl=1.0)
    with pytest.raises(TypeError, match="^W: expected weights of bias, kernel alone"):
        smooth_in_time(0.1, W=1.0)
    with pytest.raises(ValueError, match="^kernel: expected a number >= 0, got -1"):
        huber(0.1, 1.0, kernel=-1)
    with pytest.raises(ValueError, match="^epsilon: expected a positive number, got 0"):
        smoothed_l1(0.1, 0)
    with pytest.raises(ValueError, match="^of: expected one of 'bias', 'mu', 'initial', got 'kernel'"):
        ufl_functional(0.1, double_well, "kernel")


def test_terms_without_a_formula_are_refused_by_name_unless_their_weight_is_zero():
    net = with_learned_factors()
    for R in (smoothed_l1(0.1, 0.1), huber(0.1, 0.1)):
        with pytest.raises(ValueError, match="^kernel: expected one with fixed factors, got learned ones"):
            R([net.kernel])
    assert float(smoothed_l1(0.1, 0.1, kernel=0.0)([net.kernel])) == 0.0
    assert float(smooth_in_space(0.1, kernel=0.0)([net.kernel])) == 0.0
    with pytest.raises(ValueError, match="^locality: expected a kernel with one fixed basis for phi and psi, got learned"):
        locality(0.1)([net.kernel])
    with pytest.raises(ValueError, match="^locality: expected a kernel with one fixed basis for phi and psi, got two"):
        locality(0.1)([network("disk", "CG1").kernel])
    rough = network("disk", "DG0")
    with pytest.raises(ValueError, match="^Y: expected continuous functions, whose total variation is an integral"):
        total_variation(0.1, 0.1)([rough.bias])
    classes = learning_problem(network("disk", "CG1")).head
    with pytest.raises(ValueError, match="^density: expected a function on a label domain with a mesh"):
        ufl_functional(0.1, double_well, "mu")([classes.mu])
    with pytest.raises(TypeError, match="^density: it returned .*; expected a form without arguments"):
        ufl_functional(0.1, lambda a: a)([rough.bias])


def test_terms_that_are_regularisers_of_the_user_still_add_up():
    mine = Regulariser(((0.5, lambda p, c: [2.0 * one for one in c]),), ("mine",))
    net = network("disk", "CG1")
    R = mine + huber(0.1, 0.2)
    assert float(R([net.kernel])) == pytest.approx(float(mine([net.kernel])) + float(huber(0.1, 0.2)([net.kernel])), rel=1e-14)
    assert R.names == ("mine", "huber") and not R.quadratic
