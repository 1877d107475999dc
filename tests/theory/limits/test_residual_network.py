"""Residual networks given as arrays are networks on a partition, by (2.4), and back."""

import numpy as np
import pytest
from helpers import label_space, laplace, network, set_smooth, smooth
from numpy.testing import assert_allclose, assert_array_equal

from fem_resnet import (
    ACTIVATIONS,
    Layers,
    ResidualNetwork,
    StageArrays,
    cell_indicators,
    from_network,
    point_space,
    state_array,
    to_network,
)
from fem_resnet.label_domain.basis import node_numbers

on_ranks = pytest.mark.parallel([1, 2, 3])

EULER = {"ts_rk_type": "1fe"}
#: Round-off in some hundred products of numbers of size one, over a few layers.
ROUND_OFF = 1e-13
TAU = np.array([0.1, 0.3, 0.05, 0.2])


def residual_network(a, B, z, tau, sigma):
    """(2.1) in NumPy; shared a and B have no first axis."""
    for l in range(len(tau)):
        a_l, B_l = (a[l] if a.ndim == 2 else a), (B[l] if B.ndim == 3 else B)
        z = z + tau[l] * sigma((a_l - (B_l @ z).T).T)
    return z


def random_arrays(N, layers=4, samples=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(layers, N)), rng.normal(size=(layers, N, N)) / N**0.5, rng.normal(size=(N, samples))


def partitions():
    """Cells of unequal measure on a disk, an annulus and a sphere, and points with weights of three magnitudes."""
    yield from (label_space(domain, "DG0") for domain in ("disk", "annulus", "sphere"))
    yield point_space(np.geomspace(0.01, 10, 20))


@on_ranks
@pytest.mark.parametrize(
    "which, activation", list(enumerate(["tanh", "relu", "sigmoid", "tanh"])), ids=["disk", "annulus", "sphere", "points"]
)
def test_a_network_of_arrays_is_one_on_any_partition(which, activation):
    """(2.4), (2.5): the weights |Y_j| in the kernel and in the integral cancel, whatever the partition."""
    Y = list(partitions())[which]
    a, B, z_0 = random_arrays(Y.size)
    net, initial = from_network(a, B, z_0, Y, tau=TAU, activation=activation)
    assert_allclose(state_array(Y, net(initial)), residual_network(a, B, z_0, TAU, ACTIVATIONS[activation]), atol=ROUND_OFF)


@on_ranks
def test_the_kernel_has_the_measures_of_its_second_argument():
    """(2.4b) divides by |Y_j| of the argument z, not of y: without it, or with |Y_i|, the states differ."""
    Y = label_space("annulus", "DG0")
    a, B, z_0 = random_arrays(Y.size)
    net, initial = from_network(a, B, z_0, Y, tau=TAU)
    w = Y.sum(cell_indicators(Y).values.T @ Y.weights)
    assert np.ptp(w) > 0.3 * w.max()
    assert_allclose(net.kernel.get(2), B[2] / w[None, :], rtol=1e-15)
    expected = residual_network(a, B, z_0, TAU, np.tanh)
    for l in range(4):
        net.kernel.set(l, B[l] / w[:, None])
    assert np.abs(state_array(Y, net(initial)) - expected).max() > 0.01


@on_ranks
def test_the_ode_on_cubes_and_the_equation_with_kernel_values_are_one():
    """(2.6) with `h^d B_h` is (2.7) with the kernel b_h = B_h: d = 2, M^2 squares, and Runge-Kutta in t."""
    Y = label_space("square", "DG0")
    M, d = 3, 2
    h, rk4 = 1 / M, {"ts_rk_type": "4"}
    a, B_h, z_0 = random_arrays(M**d, layers=1)
    by_arrays, initial = from_network(a, h**d * B_h, z_0, Y, steps=5, solver_parameters=rk4)
    assert_allclose(by_arrays.kernel.get(0), B_h[0], rtol=1e-13)
    by_values = ResidualNetwork(cell_indicators(Y), layers=Layers(1, steps=5), solver_parameters=rk4)
    by_values.kernel.set(0, B_h[0])
    by_values.bias.set(0, a[0][node_numbers(Y)])
    assert_allclose(state_array(Y, by_arrays(initial)), state_array(Y, by_values(initial)), atol=ROUND_OFF)

    def rate(z):
        return np.tanh(a[0][:, None] - h**d * B_h[0] @ z)

    z, step = z_0, 1 / 5
    for _ in range(5):
        k1 = rate(z)
        k2 = rate(z + step / 2 * k1)
        k3 = rate(z + step / 2 * k2)
        z = z + step / 6 * (k1 + 2 * k2 + 2 * k3 + rate(z + step * k3))
    assert_allclose(state_array(Y, by_arrays(initial)), z, atol=ROUND_OFF)


@on_ranks
@pytest.mark.parametrize("shared", ["a", "B", "both"])
def test_arrays_may_be_shared_by_all_layers(shared):
    Y = label_space("disk", "DG0")
    a, B, z_0 = random_arrays(Y.size)
    a, B = a[0] if shared != "B" else a, B[0] if shared != "a" else B
    net, initial = from_network(a, B, z_0, Y, tau=TAU)
    assert (len(net.bias.functions), len(net.kernel.functions)) == (len(np.atleast_2d(a)), len(B) if B.ndim == 3 else 1)
    assert_allclose(state_array(Y, net(initial)), residual_network(a, B, z_0, TAU, np.tanh), atol=ROUND_OFF)


@on_ranks
def test_arrays_go_there_and_back():
    Y = label_space("sphere", "DG0")
    a, B, z_0 = random_arrays(Y.size)
    net, initial = from_network(a, B, z_0, Y, tau=TAU)
    back = to_network(net)
    assert_array_equal(back.a, a)
    assert_allclose(back.B, B, rtol=1e-13, atol=1e-15)
    assert_allclose(back.tau, TAU, rtol=1e-14)
    assert_array_equal(state_array(Y, initial), z_0)


#: Options of networks; with Euler's method each is a residual network given by arrays.
NETWORKS = {
    "low rank, bias at nodes": {},
    "bias in a basis": {"basis_for_bias": True},
    "spectral": {"space": ("interval", "CG3")},
    "sphere": {"space": ("sphere", "CG1")},
    "several steps a layer": {"steps": 3},
    "linear in t": {"steps": 2, "bias_in_time": "linear", "kernel_in_time": "linear"},
    "shared": {"bias_in_time": "shared", "kernel_in_time": [0, 1, 0]},
    "euler of PETSc": {"solver_parameters": {"ts_type": "euler"}},
    "learned factors and times": {"learn_factors": True, "learn_times": True},
}


@on_ranks
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_a_network_stepped_by_euler_is_a_residual_network_of_arrays(options):
    net = network(**{"solver_parameters": EULER} | options)
    for factor in net.factors:
        factor.set(0, 0.3 * smooth(net.Y, factor.space_basis.shape[1], seed=8))
    if net.layer_times is not None:
        net.layer_times.set(0, [0.3, 0.6, 1.1])
    initial = net.Y.batch(smooth(net.Y))
    a, B, tau = to_network(net)
    assert a.shape == (3 * net.steps, net.Y.size) and abs(tau.sum() - net.times[-1]) < 1e-14
    z = residual_network(a, B, state_array(net.Y, initial), tau, np.tanh)
    assert_allclose(z, state_array(net.Y, net(initial)), atol=ROUND_OFF)


@on_ranks
def test_layers_of_own_bases_have_own_matrices():
    phi = [laplace("disk", "CG1", rank) for rank in (3, 5)]
    net = ResidualNetwork(phi, layers=2, solver_parameters=EULER)
    set_smooth(net, np.random.default_rng(0))
    a, B, tau = to_network(net)
    # The rank of the first is 3; a fourth singular value is round-off.
    assert [np.linalg.matrix_rank(matrix, tol=1e-10) for matrix in B] == [3, 5]
    initial = net.Y.batch(smooth(net.Y))
    z = residual_network(a, B, state_array(net.Y, initial), tau, np.tanh)
    assert_allclose(z, state_array(net.Y, net(initial)), atol=ROUND_OFF)


#: All explicit tableaus of PETSc with more than one stage, and how many stages they need.
TABLEAUS = {
    "2a": 2, "2b": 2, "3": 3, "3bs": 3, "4": 4, "5f": 6, "5dp": 6, "5bs": 7, "6vr": 8, "7vr": 9, "8vr": 12,
}  # fmt: skip


@on_ranks
@pytest.mark.parametrize("method", TABLEAUS)
def test_an_explicit_method_is_a_network_of_stages_with_skip_weights(method):
    """Another form than (2.1), by its arrays alone: the controls move while the stages are taken."""
    net = network(
        space=("annulus", "CG1"), steps=2, bias_in_time="linear", kernel_in_time="linear",
        solver_parameters={"ts_rk_type": method},
    )  # fmt: skip
    initial = net.Y.batch(smooth(net.Y))
    arrays = to_network(net)
    assert isinstance(arrays, StageArrays) and len(arrays.weights) == TABLEAUS[method]
    assert not np.triu(arrays.skips).any() and abs(arrays.weights.sum() - 1) < 1e-14
    assert arrays.a.shape == (6, TABLEAUS[method], net.Y.size) and arrays.B.shape == (*arrays.a.shape, net.Y.size)
    z = in_stages(arrays, state_array(net.Y, initial), np.tanh)
    assert_allclose(z, state_array(net.Y, net(initial)), atol=ROUND_OFF)


@pytest.mark.parametrize("method", TABLEAUS)
def test_a_tableau_that_one_step_shows_is_that_of_petsc(method):
    net = network(solver_parameters={"ts_rk_type": method})
    (A, b), (found, weights, nodes) = net.tableau, net.explicit_tableau()
    used = b.astype(bool) | A.any(axis=0)
    assert_allclose(found, A[np.ix_(used, used)], rtol=0, atol=1e-15)
    assert_allclose(weights, b[used], rtol=0, atol=1e-15)
    assert_allclose(nodes, found.sum(axis=1), rtol=0, atol=1e-14)  # numbers up to 9 cancel in the sums


@pytest.mark.parametrize("method, stages", [("rks2", 5), ("rks3", 9), ("rk104", 10)])
def test_an_explicit_method_that_petsc_does_not_describe_is_a_network_of_stages_too(method, stages):
    """Order conditions up to two hold, and the arrays compute what the network does."""
    net = network(steps=2, bias_in_time="linear", solver_parameters={"ts_type": "ssp", "ts_ssp_type": method})
    arrays, initial = to_network(net), net.Y.batch(smooth(net.Y))
    assert len(arrays.weights) == stages
    assert abs(arrays.weights.sum() - 1) < 1e-14 and abs(arrays.weights @ arrays.skips.sum(axis=1) - 0.5) < 1e-14
    z = in_stages(arrays, state_array(net.Y, initial), np.tanh)
    assert_allclose(z, state_array(net.Y, net(initial)), atol=ROUND_OFF)


def in_stages(arrays, z, sigma):
    """The network of stages in NumPy."""
    for a, B, tau in zip(arrays.a, arrays.B, arrays.tau):
        k = []
        for i, row in enumerate(arrays.skips):
            Z = z + tau * sum((row[j] * k[j] for j in range(i)), 0 * z)
            k.append(sigma(a[i][:, None] - B[i] @ Z))
        z = z + tau * sum(weight * each for weight, each in zip(arrays.weights, k))
    return z


@on_ranks
def test_stages_of_learned_factors_times_and_a_sphere():
    net = network(space=("sphere", "CG1"), learn_factors=True, learn_times=True, solver_parameters={"ts_rk_type": "4"})
    for factor in net.factors:
        factor.set(0, 0.3 * smooth(net.Y, factor.space_basis.shape[1], seed=8))
    net.layer_times.set(0, [0.3, 0.6, 1.1])
    initial = net.Y.batch(smooth(net.Y))
    z = in_stages(to_network(net), state_array(net.Y, initial), np.tanh)
    assert_allclose(z, state_array(net.Y, net(initial)), atol=ROUND_OFF)


@pytest.mark.parametrize("parameters", [{"ts_type": "beuler"}, {"ts_type": "cn"}, {"ts_type": "irk"}])
def test_other_schemes_are_refused_with_the_reason(parameters):
    net = network(solver_parameters=parameters)
    with pytest.raises(ValueError, match="net: expected an explicit Runge-Kutta method .* solve an equation in each step"):
        to_network(net)


def test_adapted_steps_are_refused_with_the_reason():
    net = network(solver_parameters={"ts_type": "rk", "ts_rk_type": "3bs", "ts_adapt_type": "basic"})
    with pytest.raises(ValueError, match="^to_network: it does not take adapted time steps"):
        to_network(net)


@on_ranks
def test_arguments_that_do_not_fit_are_refused_by_name():
    Y = label_space("disk", "DG0")
    a, B, z_0 = random_arrays(Y.size)
    with pytest.raises(TypeError, match="partition: expected a LabelSpace, got list"):
        from_network(a, B, z_0, [1.0] * Y.size)
    with pytest.raises(ValueError, match="expected DG of degree 0, which cell indicators span"):
        from_network(a, B, z_0, label_space("disk", "CG1"))
    with pytest.raises(ValueError, match="z_0: expected shape .*, with a row for each cell"):
        from_network(a, B, z_0.T, Y)
    with pytest.raises(ValueError, match="a: expected shape .* for L >= 1 layers"):
        from_network(a[:, 1:], B, z_0, Y)
    with pytest.raises(ValueError, match="B: expected shape .* for L >= 1 layers"):
        from_network(a, B[:, 1:], z_0, Y)
    with pytest.raises(ValueError, match=r"a, B: expected the same number of layers, got \[4, 3\]"):
        from_network(a, B[1:], z_0, Y)
    with pytest.raises(ValueError, match="tau: expected positive numbers"):
        from_network(a, B, z_0, Y, tau=[0.1, 0.2, -0.1, 0.1])
