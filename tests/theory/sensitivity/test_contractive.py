"""Networks f_t = B^T sigma(a - B f): their steps, derivatives, and that solutions never move apart (end of 3.5)."""

import numpy as np
import pytest
import sympy
from helpers import TIMES, flat_network, label_space, laplace, network, set_smooth, smooth
from helpers import name as space_name
from kinds import (
    FORWARD,
    GRADIENT,
    distances,
    largest,
    options,
    pairs,
    states,
)  # fmt: skip
from kinds import (
    directions_of as directions_with_factors,
)
from kinds import (
    field_problem as problem,
)
from numpy.testing import assert_allclose

from fem_resnet import (
    Activation,
    Basis,
    Box,
    Kernel,
    Layers,
    ResidualNetwork,
    circle_radius,
    lipschitz_bound,
    load,
    pmp_residual,
    save,
    solve_trajectory,
    verify,
)  # fmt: skip

on_ranks = pytest.mark.parallel([1, 2, 3])
on_two_ranks = pytest.mark.parallel([1, 2])
ROUND_OFF = 1e-12
SPACES = [("disk", "CG1"), ("annulus", "DG0"), ("sphere", "CG1")]


def gradient_flow(space=("disk", "CG1"), **more):
    """Three layers, phi and psi of different rank, psi not orthonormal; the kernel is so small that steps are short."""
    return network(space, gradient_flow=True, **{"size": 0.4} | more)


def learned(space=("disk", "CG1"), **more):
    """Factors and times are learned too."""
    net = flat_network(
        laplace(*space, rank=4), laplace(*space, rank=3), bias=laplace(*space, rank=3), times=TIMES,
        learn_factors=True, learn_times=True, gradient_flow=True, **more,
    )  # fmt: skip
    set_smooth(net, np.random.default_rng(0))
    for k, parameter in enumerate(net.factors):
        parameter.set(0, 0.3 * smooth(net.Y, parameter.space_basis.shape[1], seed=20 + k))
    return net


def by_hand(net, f, steps):
    """Classical Runge-Kutta in the nodal values, with B and B^T as dense matrices."""
    kernel = net.kernel.space_basis.kernel
    for layer in range(net.layers):
        beta, a = net.kernel.get(layer), net.bias.space_basis.expand(net.bias.get(layer))[:, None]

        def rate(f):
            return kernel.transpose(beta, net.activation(a - kernel.apply(beta, f)))

        h = (net.times[layer + 1] - net.times[layer]) / steps
        for _ in range(steps):
            k_1 = rate(f)
            k_2 = rate(f + h / 2 * k_1)
            k_3 = rate(f + h / 2 * k_2)
            k_4 = rate(f + h * k_3)
            f = f + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return f


# -- what is stepped -------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("space", SPACES, ids=space_name)
def test_the_network_is_the_transpose_of_the_kernel_after_sigma(space):
    net = gradient_flow(space, steps=2)
    expected = by_hand(net, smooth(net.Y), 2)
    assert_allclose(states(net), expected, rtol=0, atol=ROUND_OFF * max(1, largest(expected)))


@on_ranks
def test_states_move_in_the_span_of_psi():
    net = gradient_flow()
    run = net.run(net.Y.batch(smooth(net.Y)))
    moved = net.Y.values(run.state(2)) - smooth(net.Y)
    psi = net.bases["psi"][0]
    inside = psi.values @ np.linalg.solve(psi.gram, psi.project(moved))
    assert largest(moved) > 0.1
    assert_allclose(moved, inside, rtol=0, atol=ROUND_OFF)


@pytest.mark.parametrize("method", FORWARD)
def test_every_method_steps_it_to_the_same_solution(method):
    order = FORWARD[method][1]
    exact = states(gradient_flow(steps=16, solver_parameters={"ts_rk_type": "8vr"}))
    steps = 8 if order > 2 else 16
    errors = [largest(states(gradient_flow(steps=n, solver_parameters=options(method))) - exact) for n in (steps, 2 * steps)]
    assert errors[1] < 0.05 and errors[1] < errors[0]
    if order:
        observed = np.log2(errors[0] / errors[1])
        assert abs(observed - order) < 0.35, f"{method}: errors {errors} fall at order {observed:.2f}, not {order}"


@on_two_ranks
def test_adapted_steps_reach_the_same_solution():
    net = gradient_flow(solver_parameters={"ts_rk_type": "5dp", "ts_adapt_type": "basic", "ts_rtol": 1e-9, "ts_atol": 1e-9})
    assert_allclose(states(net), by_hand(net, smooth(net.Y), 40), rtol=0, atol=1e-6)


@on_ranks
def test_any_number_of_ranks_gives_the_same_network():
    """The whole mesh on one rank alone, against its parts on all."""
    found = [
        net.Y.sum(smooth(net.Y, 4, seed=1).T @ (net.Y.weights[:, None] * states(net)))
        for net in (gradient_flow(alone=alone) for alone in (False, True))
    ]
    assert_allclose(*found, rtol=0, atol=ROUND_OFF)


@on_two_ranks
def test_compiled_and_numpy_stages_are_the_same(monkeypatch):
    found = []
    for compiled in ("1", "0"):
        monkeypatch.setenv("FEM_RESNET_COMPILED", compiled)
        p = problem(gradient_flow())
        derivative = p.reduced_functional().derivative()
        owners = [parameter for parameter in p.parameters for _ in parameter.functions]
        found.append([states(p.net), *(q.space_basis.read(d) for q, d in zip(owners, derivative, strict=True))])
    for one, other in zip(*found):
        assert_allclose(one, other, rtol=0, atol=ROUND_OFF)


# -- derivatives -----------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("space, layers_per_block", [*zip(SPACES, (1, 2, None))])
def test_taylor_of_gradient_flows(space, layers_per_block, taylor):
    p = problem(gradient_flow(space, layers_per_block=layers_per_block))
    # Half as long as in other tests: B acts twice, so that J has larger second derivatives.
    h = [v._ad_mul(0.5) for v in directions_with_factors(p, seed=1)]
    row, column = f"gradient flow, {space_name(space)}", f"{layers_per_block} a Block"
    taylor(p.reduced_functional(), p.functions, h, row, column, second_order=True)


@pytest.mark.parametrize("method", GRADIENT)
def test_taylor_of_gradient_flows_by_every_method(method, taylor):
    p = problem(learned(solver_parameters=options(method), steps=2))
    taylor(
        p.reduced_functional(), p.functions, directions_with_factors(p), f"gradient flow, {method}",
        "factors and times learned", second_order=True,
    )  # fmt: skip


@pytest.mark.parametrize("in_time", ["linear", "shared"])
def test_taylor_of_gradient_flows_with_learned_factors_and_time_bases(in_time, taylor):
    p = problem(learned(kernel_in_time=in_time, bias_in_time=in_time))
    h = directions_with_factors(p)
    taylor(p.reduced_functional(), p.functions, h, f"gradient flow, {in_time}", "factors and times", second_order=True)


# -- contraction -----------------------------------------------------------------------------------------------------

RADII = {"1fe": 1.0, "2a": 1.0, "4": 1.0, "3bs": 0.899, "3": 0.735, "2b": 0.0, "5f": 0.0, "5dp": 0.0}
RALSTON = [[0, 0], [2 / 3, 0]], [1 / 4, 3 / 4]


def with_steps(net, part):
    """The network with a kernel for which its steps are this part of the largest steps that contract."""
    for k in range(len(net.kernel.functions)):
        net.kernel.set(k, 1e-3 * net.kernel.get(k))
    bound = lipschitz_bound(net)
    factor = np.sqrt(part * (bound.largest_steps / bound.step_sizes).min())
    for k in range(len(net.kernel.functions)):
        net.kernel.set(k, factor * net.kernel.get(k))
    return net


def test_radii_of_petscs_methods():
    """Three digits of the radius. PETSc's 2b is the midpoint rule, whose first stage has weight 0, not Ralston's method."""
    found = {name: circle_radius(*network(solver_parameters={"ts_rk_type": name}).tableau) for name in RADII}
    assert {name: round(R, 3) for name, R in found.items()} == RADII
    assert_allclose(network(solver_parameters={"ts_rk_type": "2b"}).tableau[1], [0, 1])
    assert round(circle_radius(*RALSTON), 3) == 0.791


def test_radii_of_implicit_methods():
    """Algebraically stable methods have an infinite radius; the trapezoidal rule is not one of them."""
    for name in ("theta", "theta 0.7", "beuler", "irk"):
        assert circle_radius(*network(solver_parameters=options(name)).tableau) == np.inf, name
    assert_allclose(circle_radius(*network(solver_parameters=options("cn")).tableau), 2.0)
    assert network(solver_parameters=options("dirk")).tableau is None


@pytest.mark.parametrize("name", ["rk", "theta 0.7", "beuler", "cn", "theta 0.7 endpoint", "irk"])
def test_tableaus_are_those_of_the_steps(name):
    """y_t = z y: a step multiplies by 1 + z b^T (1 - z A)^-1 (1, .., 1)^T."""
    phi = laplace("disk", "CG1", 1)
    net = ResidualNetwork(phi, layers=1, activation="identity", solver_parameters=options(name))
    net.kernel.set(0, [[0.7]])
    A, b = net.tableau
    z = -0.7 * phi.gram[0, 0]
    f = phi.values[:, :1]
    expected = (1 + z * b @ np.linalg.solve(np.eye(len(b)) - z * A, np.ones(len(b)))) * f
    assert_allclose(net.Y.values(net(net.Y.batch(f))), expected, rtol=1e-10)


def test_the_radius_of_a_table_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"^A: expected numbers of shape \(2, 2\), got shape \(1, 1\)"):
        circle_radius([[0.0]], [0.5, 0.5])


@on_ranks
@pytest.mark.parametrize("space", SPACES, ids=space_name)
def test_discrete_networks_contract_up_to_the_largest_step(space):
    contract_up_to_the_largest_step(space, "3bs", "tanh")


@pytest.mark.parametrize("method", ["1fe", "2a", "3", "4"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_every_method_with_a_radius_contracts_up_to_its_largest_step(method, activation):
    contract_up_to_the_largest_step(("annulus", "DG0"), method, activation)


def contract_up_to_the_largest_step(space, method, activation):
    """In L2(Y), with a and B that change in time, at the largest step that the radius allows."""
    more = {"kernel_in_time": "linear", "bias_in_time": "linear", "steps": 2, "activation": activation}
    net = with_steps(gradient_flow(space, solver_parameters={"ts_rk_type": method}, **more), 1.0)
    bound = lipschitz_bound(net)
    assert bound.contracts_in == "L2" and bound.discrete == bound.continuous == 1.0
    found = distances(net, *pairs(net.Y))
    assert np.all(found[1:] <= found[:-1] * (1 + ROUND_OFF)), found
    assert found[-1].max() < 0.999 * found[0].max()


@pytest.mark.parametrize("method", ["theta", "beuler", "irk"])
def test_algebraically_stable_methods_contract_in_any_step(method):
    net = gradient_flow(solver_parameters=options(method), size=3.0)
    assert lipschitz_bound(net).contracts_in == "L2" and np.all(np.isinf(lipschitz_bound(net).largest_steps))
    found = distances(net, *pairs(net.Y))
    assert np.all(found[1:] <= found[:-1] * (1 + 1e-9)), found  # of Newton's last step


@on_two_ranks
@pytest.mark.parametrize("part, falls", [(1.0, True), (1.01, False)])
def test_the_largest_step_of_euler_is_sharp(part, falls):
    """sigma(s) = s: the worst direction is the first right singular function of B, times |1 - h norm(B)^2|."""
    net = with_steps(
        gradient_flow(("annulus", "DG0"), kernel_in_time="shared", activation="identity", times=(0, 0.3, 0.6),
                      solver_parameters={"ts_rk_type": "1fe"}), part,
    )  # fmt: skip
    kernel, beta = net.kernel.space_basis.kernel, net.kernel.get(0)
    roots = [np.linalg.cholesky(basis.gram).T for basis in (kernel.phi, kernel.psi)]
    _, _, V = np.linalg.svd(roots[0] @ beta @ roots[1].T)
    worst = kernel.psi.values @ np.linalg.solve(roots[1], V[:1].T)
    found = distances(net, 0 * worst, worst)[:, 0]
    assert_allclose(found[1:] / found[:-1], 2 * part - 1, rtol=0, atol=1e-10)
    bound = lipschitz_bound(net)
    assert (bound.contracts_in == "L2") == falls and found[-1] / found[0] <= bound.discrete * (1 + ROUND_OFF)
    assert bound.continuous == 1.0


@on_two_ranks
def test_the_midpoint_rule_may_part_solutions_in_a_quarter_of_the_largest_step_of_euler():
    """A radius of 0 is no gap in the proof. Three sectors of an annulus as neurons, sigma' between 0 and 1, h norm(B)^2 = 1/2.

    One random search found a and B. The trapezoidal method 2a, of radius 1, contracts there.
    """
    Y = label_space("annulus", "DG0")
    sector = np.floor(np.arctan2(*Y.coordinates.T) / (2 * np.pi / 3)).astype(int) % 3
    size = np.sqrt(Y.measure / 3)
    phi, psi = Basis(Y, np.eye(3)[sector] / size, "given"), laplace("annulus", "DG0", 3)
    psi = Basis(Y, psi.values[:, 1:], "given")
    assert_allclose([phi.gram, psi.gram[:1, :1] * np.eye(3)], [np.eye(3)] * 2, rtol=0, atol=1e-10)
    s = sympy.Symbol("s")
    sigma = Activation.from_sympy((s + sympy.sin(size * s) / size) / 2)
    beta = np.array([[0.2072328, -0.06941728], [0.33137754, -0.78891265], [-0.65956872, 0.15635336]])
    a = np.array([20.77807973, -18.12869826, 26.53681606])
    # The step made linear at f = 0, in coefficients of psi; its worst direction.
    slopes = [(1 + np.cos(u)) / 2 for u in (a, a - 0.25 * beta @ beta.T @ (a + np.sin(a)) / 2)]
    H = [beta.T @ (slope[:, None] * beta) for slope in slopes]
    worst = psi.values @ np.linalg.svd(np.eye(2) - 0.5 * H[1] @ (np.eye(2) - 0.25 * H[0]))[2][:1].T
    ratios = {}
    for method in ("2b", "2a"):
        net = ResidualNetwork(
            Kernel(phi, psi),
            bias=phi,
            layers=1,
            final_time=0.5,
            activation=sigma,
            gradient_flow=True,
            solver_parameters={"ts_rk_type": method},
        )
        net.kernel.set(0, beta)
        net.bias.set(0, a)
        found = distances(net, 0 * worst, 1e-5 * worst)[:, 0]
        ratios[method] = found[1] / found[0], lipschitz_bound(net).contracts_in
    assert ratios["2b"][0] > 1 + 1e-4 and ratios["2b"][1] is None, ratios
    assert ratios["2a"][0] < 1 and ratios["2a"][1] == "L2", ratios


def test_solutions_part_where_sigma_decreases():
    """The paper prints sigma' <= 0. With that sign distances rise, and only the norm of B bounds them."""
    falling = Activation.from_sympy(-sympy.tanh(sympy.Symbol("s")))
    net = with_steps(gradient_flow(("sphere", "CG1")), 1.0)
    other = gradient_flow(("sphere", "CG1"), activation=falling)
    for k in range(3):
        other.kernel.set(k, net.kernel.get(k))
    found = distances(other, *pairs(net.Y))
    bound = lipschitz_bound(other)
    assert np.all(found[1:] > found[:-1])
    assert bound.contracts_in is None and np.all(found[-1] <= bound.discrete * found[0]) and "decreases" in str(bound)


@pytest.mark.parametrize("space", SPACES, ids=space_name)
@pytest.mark.parametrize("gradient", [False, True], ids=["(2.8)", "gradient flow"])
@pytest.mark.parametrize("method", [{}, {"ts_rk_type": "5dp"}, {"ts_type": "cn"}], ids=["4", "5dp", "cn"])
def test_no_two_solutions_part_by_more_than_the_bound(space, gradient, method):
    net = network(space, gradient_flow=gradient, size=0.4, solver_parameters=method, steps=8, kernel_in_time="linear")
    found, bound = distances(net, *pairs(net.Y)), lipschitz_bound(net)
    assert np.isfinite(bound.discrete)
    assert np.all(found[-1] <= bound.discrete * found[0] * (1 + ROUND_OFF))
    assert np.all(found[-1] <= bound.continuous * found[0])


def test_the_bounds_are_sharp_for_growth_of_rank_one():
    """B = -c phi phi^T M, sigma(s) = s: f = phi grows by e^(c T), stepped by its polynomial."""
    phi = laplace("annulus", "DG0", 3)
    phi = Basis(phi.Y, phi.values[:, 2:], "given")
    net = ResidualNetwork(phi, layers=Layers(TIMES, steps=2), activation="identity")
    for k, c in enumerate((0.5, 1.0, 2.0)):
        net.kernel.set(k, [[-c]])
    found, bound = distances(net, 0 * phi.values, phi.values)[:, 0], lipschitz_bound(net)
    assert_allclose(found[-1] / found[0], bound.discrete, rtol=1e-10)
    assert_allclose(bound.continuous, np.exp(0.5 * 0.2 + 1.0 * 0.7 + 2.0 * 0.4), rtol=1e-10)


@on_two_ranks
def test_what_has_no_bound_is_refused():
    with pytest.raises(ValueError, match="^lipschitz_bound: it does not take adapted time steps"):
        lipschitz_bound(network(solver_parameters={"ts_adapt_type": "basic"}))
    with pytest.raises(ValueError, match="^net: expected 'ts_type' 'rk', .*, got 'dirk', whose coefficients PETSc"):
        lipschitz_bound(network(solver_parameters=options("dirk")))


def test_what_is_about_another_equation_is_refused():
    net = gradient_flow()
    with pytest.raises(ValueError, match="^solve_trajectory: it does not take the gradient flow"):
        solve_trajectory(net, net.Y.batch(smooth(net.Y)))
    p = problem(net, None)
    with pytest.raises(ValueError, match="^pmp_residual: it does not take the gradient flow"):
        pmp_residual(p, Box((-1, 1), (-1, 1)))


# -- what goes with all networks ------------------------------------------------------------------------------------


def test_gradient_flows_pass_the_verification():
    report = verify(problem(gradient_flow()), quick=True)
    assert report.passed, report.failures


@on_ranks
def test_files_and_other_meshes_keep_the_equation(tmp_path):
    net = gradient_flow(basis_for_bias=True)
    save(tmp_path / "net.h5", net)
    loaded, _ = load(tmp_path / "net.h5")
    moments = [n.Y.sum((smooth(n.Y, 4, seed=2) * n.Y.weights[:, None]).T @ states(n)) for n in (net, loaded)]
    assert loaded.gradient_flow
    assert_allclose(*moments, rtol=0, atol=ROUND_OFF)
    phi = laplace("disk", "CG1", 6)
    coarse = ResidualNetwork(phi, bias=phi, layers=TIMES, gradient_flow=True)
    set_smooth(coarse, np.random.default_rng(0))
    assert coarse.on(label_space("disk", "CG1", 2)).gradient_flow
