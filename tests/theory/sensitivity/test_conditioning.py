"""The linearised flow (3.6): its transpose, singular values, bounds; Duhamel's formulas; the identity of 3.5."""

from functools import cache

import firedrake as fd
import numpy as np
import pytest
from helpers import TIMES, label_space, laplace, network, set_smooth, smooth, smooth_direction
from numpy.testing import assert_allclose
from problems import taping
from pyadjoint.tape import get_working_tape

from fem_resnet import (
    Basis,
    Bias,
    Kernel,
    Layers,
    LinearisedFlow,
    ResidualNetwork,
    cell_indicators,
    duhamel,
    laplace_basis,
    solve_costate,
    solve_linearised,
    solve_trajectory,
    weighted_identity,
)

on_ranks = pytest.mark.parallel([1, 2, 3])
#: With these numbers no repeated eigenvalue is cut.
RANK = {"disk": 3, "annulus": 3, "sphere": 4}
SPACES = [("disk", "CG1"), ("annulus", "DG0"), ("sphere", "CG1")]
on_spaces = pytest.mark.parametrize("space", SPACES, ids="-".join)
#: Round-off in sums of some hundred numbers of size one.
ROUND_OFF = 1e-12

#: The kinds of networks on which the linearisation of a layer depends.
KINDS = {
    "rk4": {},
    "linear in t": {"kernel_in_time": "linear", "bias_in_time": "linear"},
    "implicit": {"solver_parameters": {"ts_type": "cn"}},
    "f in the state": {"solver_parameters": {"ts_type": "dirk"}},
    "adapted": {"solver_parameters": {"ts_adapt_type": "basic", "ts_rtol": 1e-5, "ts_atol": 1e-5}},
    "no adjoint": {"solver_parameters": {"ts_type": "bdf"}, "steps": 3},
    "learned factors": {"learn_factors": True},
}


def batch(net, seed=0, samples=1):
    return net.Y.batch(smooth(net.Y, samples, seed=seed))


@cache
def flow_of(space=("disk", "CG1"), kind="rk4", samples=1, size=1.0, alone=False):
    net = network(space, size=size, alone=alone, **KINDS[kind])
    return LinearisedFlow(net, batch(net, samples=samples))


def psi_changes(space=("disk", "CG1")):
    """A network whose layers have two, then one, then three functions psi."""
    P = laplace(*space, 6)
    psi = [Basis(P.Y, P.values[:, columns], "given") for columns in ([0, 1], [2], [3, 4, 5])]
    net = ResidualNetwork(Kernel(P, psi), layers=TIMES)
    set_smooth(net, np.random.default_rng(0))
    return net


def dense(M):
    """W^(1/2) M W^(-1/2) on one rank, whose singular values are those of M in L2(Y)."""
    Y = M.basis.Y
    root = np.sqrt(Y.weights)
    matrix = np.eye(Y.size) + M.added @ (M.basis.values.T * Y.weights)
    return root[:, None] * matrix / root


def jacobian(net, f):
    """The same for the whole network by a tangent of a run for each node, without `LinearisedFlow`."""
    Y = net.Y
    copies = Y.batch(np.repeat(Y.values(f), Y.size, axis=1))
    matrix = Y.values(net.run(copies).tangent(Y.batch(np.eye(Y.size))))
    root = np.sqrt(Y.weights)
    return root[:, None] * matrix / root


def rk4_step(z):
    """The stability function of Runge-Kutta 4."""
    return 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24


def all_singular_values(M):
    return np.sort(np.append(M.singular_values, np.ones(M.ones)))[::-1]


# -- the flow and its transpose --------------------------------------------------------------------------------------


@on_spaces
def test_the_flow_is_the_derivative_of_the_network(space):
    """(3.6), Taylor: |F(f + h w) - F(f) - h M w| falls with h^2."""
    flow = flow_of(space)
    net, f = flow.net, flow.states[0]
    w = smooth(net.Y, 1, seed=3)
    Mw = net.Y.values(flow.tangent(net.Y.batch(w)))
    remainders = []
    for h in (1e-2, 5e-3, 2.5e-3):
        moved = net.Y.values(net(net.Y.batch(f + h * w)))
        remainders.append(net.Y.norm(net.Y.batch(moved - flow.states[-1] - h * Mw)))
    assert (np.log2(np.array(remainders[:-1]) / remainders[1:]) > 1.95).all(), remainders


@on_ranks
@pytest.mark.parametrize("kind", KINDS)
def test_tangent_is_that_of_a_run_and_the_propagator_does_the_same(kind):
    flow = flow_of(kind=kind, samples=2)
    net = flow.net
    f, w = batch(net, samples=2), batch(net, 3, 2)
    found = net.Y.values(flow.tangent(w))
    assert_allclose(found, net.Y.values(net.run(f).tangent(w)), rtol=0, atol=ROUND_OFF)
    assert np.abs(found - net.Y.values(w)).max() > 0.1
    for sample in range(2):
        # Each sample alone repeats the steps that were adapted to both.
        M = flow.propagator(sample=sample)
        assert_allclose(net.Y.values(M.apply(w))[:, sample], found[:, sample], rtol=0, atol=ROUND_OFF)


@on_ranks
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "no adjoint"])
def test_the_transpose_is_that_of_the_label_measure(kind):
    """(M(t, s) w, r) = (w, M(t, s)^T r) of section 4.1, by TSAdjoint and by the factors."""
    flow = flow_of(kind=kind, samples=2)
    Y = flow.net.Y
    w, r = batch(flow.net, 3, 2), batch(flow.net, 4, 2)
    for interval in [(0, 3), (1, 2), (1, 1)]:
        forth, back = flow.tangent(w, *interval), flow.adjoint(r, *interval)
        assert abs(Y.inner(forth, r) - Y.inner(w, back)) < ROUND_OFF
    M = flow.propagator(1, sample=1)
    assert_allclose(Y.values(M.transpose(r))[:, 1], Y.values(flow.adjoint(r, 1))[:, 1], rtol=0, atol=ROUND_OFF)


@on_ranks
def test_the_flow_between_layer_times_is_a_product_and_does_not_touch_the_tape():
    with taping():
        flow = LinearisedFlow(flow_of().net, batch(flow_of().net))
        Y, w = flow.net.Y, batch(flow.net, 5)
        whole = flow.propagator()
        product = flow.propagator(2, 3) @ flow.propagator(1, 2) @ flow.propagator(0, 1)
        assert_allclose(product.added, whole.added, rtol=0, atol=ROUND_OFF)
        assert product.times == (0.0, 1.3)
        in_parts = flow.tangent(flow.tangent(w, 0, 1), 1)
        assert_allclose(Y.values(in_parts), Y.values(flow.tangent(w)), rtol=0, atol=ROUND_OFF)
        flow.adjoint(whole.transpose(w))
    assert get_working_tape().get_blocks() == []


# -- identity plus few functions -------------------------------------------------------------------------------------


@on_spaces
def test_what_no_psi_sees_passes_unchanged(space):
    """f' depends on f through Psi^T M f only: M w = w where that is zero, and M - I has the rank of psi."""
    flow = flow_of(space)
    Y, psi = flow.net.Y, flow.net.bases["psi"][0]
    w = smooth(Y, 1, seed=3)
    unseen = Y.batch(w - psi.values @ np.linalg.solve(psi.gram, psi.project(w)))
    assert_allclose(Y.values(flow.tangent(unseen)), Y.values(unseen), rtol=0, atol=ROUND_OFF)
    assert flow.basis.rank == psi.rank
    assert np.abs(Y.values(flow.tangent(Y.batch(w))) - w).max() > 0.1


@pytest.mark.parametrize("net", [network(), psi_changes()], ids=["one psi", "psi changes"])
def test_the_rank_of_the_flow_less_the_identity_is_that_of_all_psi(net):
    flow = LinearisedFlow(net, batch(net))
    one_psi = len(net.bases["psi"]) == 1
    size = np.linalg.svd(jacobian(net, batch(net)) - np.eye(net.Y.size), compute_uv=False)
    rank = 4 if one_psi else 2 + 1 + 3
    assert flow.basis.rank == rank
    assert size[rank - 1] > 1e-3 and size[rank] < ROUND_OFF
    assert_allclose(
        all_singular_values(flow.propagator()),
        np.linalg.svd(jacobian(net, batch(net)), compute_uv=False), rtol=0, atol=ROUND_OFF,
    )  # fmt: skip


def test_functions_that_layers_share_count_once():
    P = laplace("disk", "CG1", 6)
    psi = [Basis(P.Y, P.values[:, columns], "given") for columns in ([0, 1, 2], [2, 1], [0, 3])]
    net = ResidualNetwork(Kernel(P, psi), layers=TIMES)
    set_smooth(net, np.random.default_rng(0))
    flow = LinearisedFlow(net, batch(net))
    assert flow.basis.rank == 4
    assert_allclose(flow.basis.gram, np.eye(4), rtol=0, atol=1e-13)
    w = batch(net, 3)
    assert_allclose(net.Y.values(flow.propagator().apply(w)), net.Y.values(flow.tangent(w)), rtol=0, atol=ROUND_OFF)


# -- singular values -------------------------------------------------------------------------------------------------


@on_spaces
@pytest.mark.parametrize("size", [1.0, 8.0])
def test_all_singular_values_are_those_of_the_whole_matrix(space, size):
    net = network(space, size=size)
    M = LinearisedFlow(net, batch(net)).propagator()
    expected = np.linalg.svd(jacobian(net, batch(net)), compute_uv=False)
    assert expected[0] > 1.5 and expected[-1] < 0.7
    assert M.ones == net.Y.size - 2 * 4
    # absolute, relative to the largest one, as for any singular value decomposition
    assert_allclose(all_singular_values(M), expected, rtol=0, atol=1e-13 * expected[0])
    assert_allclose(M.condition, expected[0] / expected[-1], rtol=1e-10)


def test_singular_values_of_a_kernel_of_full_rank():
    Y = label_space("annulus", "DG0")
    P = cell_indicators(Y)
    net = ResidualNetwork(P, layers=TIMES)
    for layer in range(net.layers):
        net.kernel.set(layer, 8 * np.cos(np.add.outer(np.arange(Y.size), 2.3 * np.arange(Y.size)) + layer))
    M = LinearisedFlow(net, batch(net)).propagator()
    assert M.ones == 0 and len(M.singular_values) == Y.size
    expected = np.linalg.svd(jacobian(net, batch(net)), compute_uv=False)
    assert_allclose(M.singular_values, expected, rtol=0, atol=1e-12 * expected[0])


@pytest.mark.parallel([2, 3])
def test_singular_values_and_bounds_see_no_partition():
    flow, alone = flow_of(("sphere", "CG1")), flow_of(("sphere", "CG1"), alone=True)
    M, M_alone = flow.propagator(), alone.propagator()
    assert_allclose(M.singular_values, M_alone.singular_values, rtol=1e-11)
    assert M.ones == M_alone.ones and (M.basis.Y.comm.bcast(M.singular_values) == M.singular_values).all()
    for operator_norm in (False, True):
        assert_allclose(*(f.exponent(operator_norm=operator_norm) for f in (flow, alone)), rtol=1e-11)
    for layer in range(flow.net.layers):
        assert_allclose(*(np.sort(np.abs(f.frozen_eigenvalues(layer))) for f in (flow, alone)), rtol=0, atol=1e-10)


@pytest.mark.parallel([2, 3])
def test_formulas_in_continuous_time_see_no_partition():
    found = []
    for alone in (False, True):
        net = network(("sphere", "CG1"), size=0.3, alone=alone)
        trajectory, w = solve_trajectory(net, batch(net), steps=2), batch(net, 3)
        g, moved = duhamel(trajectory, directions(net, "ab")), solve_linearised(trajectory, w, 0.1, 0.5)
        identity = weighted_identity(trajectory, w)
        found.append([net.Y.norm(g), net.Y.inner(g, w), net.Y.norm(moved), *identity.change, *identity.non_autonomous])
    assert_allclose(*found, rtol=1e-11)


@on_ranks
@on_spaces
def test_a_singular_function_grows_by_its_singular_value(space):
    M = flow_of(space).propagator()
    Y = M.basis.Y
    for k in (0, 1, -1):
        value, v = M.singular_values[k], M.singular_function(k)
        assert abs(Y.norm(v) - 1) < ROUND_OFF
        assert_allclose(Y.norm(M.apply(v)), value, rtol=1e-11)
        assert_allclose(Y.values(M.transpose(M.apply(v))), value**2 * Y.values(v), rtol=0, atol=1e-11)


def test_small_singular_values_keep_their_digits():
    """B = mu phi phi^T, sigma the identity: one singular value is the approximation of e^(-mu T) by rk4, the others are 1."""
    P = laplace("sphere", "CG1", 4)
    net = ResidualNetwork(Kernel(P, in_time="shared"), layers=40, final_time=20.0, activation="identity")
    net.kernel.set(0, np.diag([1.0, 0.5, 0.0, -0.25]))
    M = LinearisedFlow(net, batch(net)).propagator()
    expected = rk4_step(-0.5 * np.array([1.0, 0.5, 0.0, -0.25])) ** 40
    found = np.sort(M.singular_values)[[0, 1, -1]]
    # 1e-16 of the largest, 150; with a Gram matrix the smallest, 2e-9, would have a relative error of about 1e-6
    # The round-off of the largest, 148.
    assert_allclose(found, np.sort(expected)[[0, 1, -1]], rtol=1e-14, atol=1e-13)
    # rk4 with z = -0.5 has an error of 3e-4 in each step
    assert_allclose(M.lyapunov_exponents[[0, -1]], [0.25, -1.0], rtol=2e-3)


# -- orders ----------------------------------------------------------------------------------------------------------

SCHEMES = {
    "1fe": (1, {"ts_rk_type": "1fe"}),
    "2a": (2, {"ts_rk_type": "2a"}),
    "rk4": (4, {"ts_rk_type": "4"}),
    "cn": (2, {"ts_type": "cn"}),
}


def in_time(space, **options):
    """A network with controls linear in t, so small that few steps show the order."""
    return network(space, size=0.25, kernel_in_time="linear", bias_in_time="linear", **options)


@cache
def path(space):
    """Its solution, whose error of O(h^6) is below that of all networks here."""
    net = in_time(space)
    return solve_trajectory(net, batch(net), steps=16)


def errors(space, scheme, quantity, exact):
    found = []
    for n in (8, 16):
        net = in_time(space, steps=n, solver_parameters=SCHEMES[scheme][1])
        found.append(net.Y.norm(net.Y.batch(net.Y.values(quantity(net)) - net.Y.values(exact))))
    return found


def order(found):
    return np.log2(found[0] / found[1])


@pytest.mark.parametrize("scheme", SCHEMES)
@on_spaces
def test_the_discrete_flow_is_that_of_3_6_to_the_order_of_the_scheme(space, scheme):
    """The discrete M(T, 0) w against the solution of (3.6) itself, stepped in the nodal values with order 6."""
    exact = solve_linearised(path(space), batch(path(space).net, 3))
    found = errors(space, scheme, lambda net: LinearisedFlow(net, batch(net)).tangent(batch(net, 3)), exact)
    assert abs(order(found) - SCHEMES[scheme][0]) < 0.2, found


def test_3_6_between_any_two_times():
    net = network(size=0.5)
    trajectory = solve_trajectory(net, batch(net), steps=8)
    w = batch(net, 3)
    parts = solve_linearised(trajectory, solve_linearised(trajectory, w, 0.0, 0.5), 0.5)
    # steps that start at 0.5 are other steps: the difference is their error, O(h^6)
    assert_allclose(net.Y.values(parts), net.Y.values(solve_linearised(trajectory, w)), rtol=0, atol=1e-8)
    assert_allclose(net.Y.values(solve_linearised(trajectory, w, 0.3, 0.3)), net.Y.values(w), rtol=0, atol=0)


@pytest.mark.parametrize("parameters, expected", [({"ts_type": "cn"}, 2), ({"ts_rk_type": "1fe"}, 1)], ids=str)
def test_3_6_is_stepped_by_the_method_that_is_asked_for(parameters, expected):
    net = in_time(("disk", "CG1"))
    Y, w = net.Y, batch(net, 3)
    found = []
    for steps in (8, 16):
        trajectory = solve_trajectory(net, batch(net), steps=steps)
        exact = solve_linearised(trajectory, w)
        other = solve_linearised(trajectory, w, solver_parameters=parameters)
        found.append(Y.norm(Y.batch(Y.values(other) - Y.values(exact))))
    assert abs(order(found) - expected) < 0.2, found
    with pytest.raises(ValueError, match="expected one of 'rk', 'theta', 'beuler', 'cn' as 'ts_type' .*, got 'ssp'"):
        duhamel(trajectory, directions(net, "a"), solver_parameters={"ts_type": "ssp"})


# -- Duhamel's formulas ----------------------------------------------------------------------------------------------


def directions(net, which):
    """Directions of bias and kernel; one of them is zero unless both are requested."""
    rng, made = np.random.default_rng(7), []
    for name, parameter in (("a", net.bias), ("b", net.kernel)):
        for k in range(len(parameter.functions)):
            direction = smooth_direction(net, rng, k, parameter)
            made.append(direction if name in which else fd.Function(direction.function_space()))
    return made


def parameter_tangent(net, which):
    """The derivative of the discrete f(T) along `directions`."""
    (segment,) = net._solver.new_segments(net.Y.batch_space(1))
    of = {id(p): d for p, d in zip([*net.bias.functions, *net.kernel.functions], directions(net, which))}
    arrays = [slot.read(p) for slot, p in zip(segment.inputs[1:], segment.functions)]
    moved = [slot.read(of[id(p)]) for slot, p in zip(segment.inputs[1:], segment.functions)]
    f = net.Y.values(batch(net))
    segment.forward([f, *arrays], save=False)
    return net.Y.batch(segment.tangent([f, *arrays], [np.zeros_like(f), *moved]))


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize("scheme", SCHEMES)
@on_spaces
def test_duhamels_formulas_hold_to_the_order_of_the_scheme(space, scheme, which):
    """Section 4.1: D_a f(alpha), D_b f(beta) as integrals of M(T, s) sigma'(u) .., against those of the network."""
    net = path(space).net
    exact = duhamel(path(space), directions(net, which))
    found = errors(space, scheme, lambda net: parameter_tangent(net, which), exact)
    assert abs(order(found) - SCHEMES[scheme][0]) < 0.2, found
    assert net.Y.norm(exact) > 0.1


@on_spaces
def test_the_adjoint_of_duhamels_formulas_is_4_3_and_4_4(space):
    """(r(T), D f(alpha, beta)) = int int alpha sigma'(u) r - int int int beta f sigma'(u) r, (4.3) and (4.4)."""
    trajectory = path(space)
    net = trajectory.net
    Y, both = net.Y, directions(net, "ab")
    terminal = batch(net, 9)
    costate = solve_costate(trajectory, terminal)
    forth = Y.inner(terminal, duhamel(trajectory, both))
    inputs = [(layer.inputs, direction) for layer, direction in zip(trajectory.layers, _on_layers(net, both))]
    back = 0.0
    points, weights = np.polynomial.legendre.leggauss(24)
    for layer, direction in inputs:
        for s, weight in zip((points + 1) / 2, weights / 2):
            t = layer.start + s * layer.length
            alpha = fd.Function(Y.V)
            alpha.dat.data_wo[...] = direction.bias.coefficients(s)
            p, q = costate.kernel_gradient(t)
            moved = Y.batch(layer.factors.apply(direction.beta.coefficients(s), Y.values(q)))
            back += layer.length * weight * (Y.inner(alpha, costate.bias_gradient(t)) + Y.inner(moved, p))
    assert abs(forth) > 0.1
    assert_allclose(forth, back, rtol=1e-7)  # both to O(h^6) in the trajectory's steps
    # And their projections onto coefficients, the gradients for training.
    owners = [(p, k) for p in (net.bias, net.kernel) for k in range(len(p.functions))]
    paired = sum(
        p.inner(k, p.space_bases[k].read(g), p.space_bases[k].read(d))
        for (p, k), g, d in zip(owners, costate.gradient(), both)
    )
    assert_allclose(paired, forth, rtol=1e-7)


def _on_layers(net, functions):
    coefficients = net.coefficients()
    of = {id(p): d for p, d in zip([*net.bias.functions, *net.kernel.functions], functions)}
    arrays = [slot.read(of[id(p)]) for slot, p in zip(coefficients.slots, coefficients.functions)]
    return coefficients.on_layers(arrays, directions=True)


# -- the weighted identity of 3.5 ------------------------------------------------------------------------------------


@on_spaces
@pytest.mark.parametrize("choice", ["layers", "linear"])
def test_the_weighted_identity_holds_with_u_t_and_fails_with_u(space, choice):
    """3.5 prints sigma''(u) u(t) in the identity, and sigma''(u) u_t below it: the latter holds, on every layer."""
    net = network(space, size=0.3, kernel_in_time=choice, bias_in_time=choice)
    trajectory = solve_trajectory(net, batch(net, samples=2), steps=8)
    identity = weighted_identity(trajectory, batch(net, 3, 2))
    size = np.abs(identity.change).max()
    assert np.abs(identity.defect).max() < 1e-7 * size  # O(h^6)
    assert np.abs(identity.non_autonomous).max() > 1e-2 * size
    assert np.abs(identity.change - identity.kernel - identity.as_printed).max() > 1e-2 * size


def test_the_defect_of_the_identity_falls_with_the_steps():
    net = network(size=0.5)
    paths = [solve_trajectory(net, batch(net), steps=n) for n in (2, 4, 8)]
    defects = [np.abs(weighted_identity(path, batch(net, 3)).defect).max() for path in paths]
    assert (np.log2(np.array(defects[:-1]) / defects[1:]) > 5).all(), defects


# -- bounds ----------------------------------------------------------------------------------------------------------


@on_spaces
@pytest.mark.parametrize("kind", ["rk4", "linear in t"])
def test_the_flow_is_bounded_by_the_exponential_of_the_kernels_norm(space, kind):
    """Section 3.5: norm(M) <= exp(int sup |sigma'| norm(b)), closer with the operator norm of B."""
    flow = flow_of(space, kind, size=0.5)
    for interval in [(0, 3), (0, 1), (1, 3)]:
        M = flow.propagator(*interval)
        closer, wider = flow.bound(*interval, operator_norm=True), flow.bound(*interval)
        assert 1 < M.norm <= closer <= wider
        assert M.smallest >= 1 / closer - 1e-3  # of the flow; of rk4 up to the error of its steps
    assert flow.bound(1, 1) == 1.0


def test_the_bound_takes_the_norm_over_the_layer():
    """From -b to b, linearly: the integral of the norm is half of that at the ends."""
    P = laplace("disk", "CG1", 4)
    net = ResidualNetwork(Kernel(P, in_time="linear"), layers=1, final_time=0.8)
    for k, sign in enumerate((-1, 1)):
        net.kernel.set(k, sign * np.diag([3.0, 4.0, 0.0, 0.0]))
    flow = LinearisedFlow(net, batch(net))
    assert_allclose([flow.exponent(), flow.exponent(operator_norm=True)], [0.8 * 5 / 2, 0.8 * 4 / 2], rtol=1e-12)


@on_spaces
def test_the_bound_is_reached_by_a_kernel_of_rank_one(space):
    """b = - mu phi(y) phi(z), sigma the identity: M phi = e^(mu T) phi."""
    phi = laplace_basis(label_space(*space), 1)
    net = ResidualNetwork(phi, layers=Layers(1, 0.7, steps=16), activation="identity")
    net.kernel.set(0, [[-1.5]])
    flow = LinearisedFlow(net, batch(net))
    assert_allclose(flow.propagator().norm, flow.bound(), rtol=1e-6)  # rk4 with h mu = 0.07
    assert_allclose(flow.bound(), np.exp(1.5 * 0.7), rtol=1e-12)
    assert flow.propagator().norm <= flow.bound()


def test_the_generator_is_bounded_and_frozen_eigenvalues_are_those_of_the_whole_matrix():
    """Section 3.5: the operator norm of -sigma'(u) B is at most sup |sigma'| norm(b); frozen, b is sigma'(u(t_0)) b."""
    flow = flow_of()
    net, Y = flow.net, flow.net.Y
    kernel = net.kernel.space_basis.kernel
    root = np.sqrt(Y.weights)
    for layer in range(net.layers):
        beta, f = net.kernel.get(layer), flow.states[layer]
        u = net.bias.get(layer)[:, None] - kernel.apply(beta, f)
        generator = -net.activation.derivative(u) * kernel.apply(beta, np.eye(Y.size))
        assert np.linalg.norm(root[:, None] * generator / root, 2) <= kernel.norm(beta)
        expected = np.linalg.eigvals(generator)
        expected = expected[np.argsort(-np.abs(expected))][:4]
        found = flow.frozen_eigenvalues(layer)
        assert_allclose(np.sort_complex(found), np.sort_complex(expected), rtol=0, atol=1e-10)
        assert_allclose(flow.slope(layer), net.activation.derivative(u), rtol=0, atol=1e-14)


@on_spaces
def test_near_the_stationary_state_the_flow_is_that_of_the_linearised_autonomous_problem(space):
    """Section 3.5: for large t, u is near 0 and M(T, t) near e^(-sigma'(0) B (T - t)); for small t it is not."""
    P = laplace(*space, RANK[space[0]])
    mu = 1.0 + 0.5 * np.arange(P.rank)
    net = ResidualNetwork(Kernel(P, in_time="shared"), bias=Bias(P, in_time="shared"), layers=40, final_time=20.0)
    net.kernel.set(0, np.diag(mu))
    net.bias.set(0, mu * np.cos(np.arange(P.rank)))  # a in R(B)
    flow = LinearisedFlow(net, net.Y.batch(2 * P.values @ np.ones(P.rank)))
    exact = np.sort(rk4_step(-mu / 2) ** 2)  # over two layers, T - t = 1
    late, early = (np.sort(flow.propagator(*interval).singular_values)[: P.rank] for interval in ((38, 40), (0, 2)))
    assert_allclose(late, exact, rtol=1e-6)  # |u| is some e^(-19) by then
    assert np.abs(early / exact - 1).max() > 0.2


# -- arguments -------------------------------------------------------------------------------------------------------


@on_ranks
def test_arguments_that_do_not_fit_are_refused():
    flow = flow_of()
    net, w = flow.net, batch(flow.net)
    for interval, message in [
        ((0, 4), "end: expected an integer from 0 to 3"),
        ((2, 1), "end: expected an integer from 2 to 3"),
        ((-1, 2), "start: expected an integer from 0 to 3"),
        ((0.5, 1), "start: expected an integer from 0 to 3"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            flow.tangent(w, *interval)
    with pytest.raises(ValueError, match="^sample: expected an integer from 0 to 0, got 1"):
        flow.propagator(sample=1)
    with pytest.raises(ValueError, match="^direction: expected a Function of"):
        flow.tangent(batch(net, samples=2))
    with pytest.raises(ValueError, match="^earlier: expected a propagator to t = 0.2 with the same basis"):
        _ = flow.propagator(1, 2) @ flow.propagator(0, 2)
    with pytest.raises(ValueError, match="^k: expected the number of a singular value that is not 1 .*; number 0 is"):
        flow.propagator(1, 1).singular_function()
    with pytest.raises(ValueError, match="PETSc has no adjoint of its method 'bdf'"):
        flow_of(kind="no adjoint", samples=2).adjoint(batch(net, samples=2))
    trajectory = solve_trajectory(net, w, steps=2)
    with pytest.raises(ValueError, match="^end: expected a number from 0.5 to 1.3, got 2.0"):
        solve_linearised(trajectory, w, 0.5, 2.0)
    with pytest.raises(ValueError, match="^directions: expected 6 Functions of the spaces of .*, got 1"):
        duhamel(trajectory, [w])
    relu = network(activation="relu")
    with pytest.raises(ValueError, match="^trajectory: expected an activation with a continuous sigma' > 0, got relu"):
        weighted_identity(solve_trajectory(relu, w, steps=2), w)


@on_ranks
def test_a_network_without_layers_is_the_identity():
    net = ResidualNetwork(laplace("disk", "CG1", 4), layers=0)
    M = LinearisedFlow(net, batch(net)).propagator()
    assert (M.added == 0).all() and M.norm == M.smallest == M.condition == 1.0
