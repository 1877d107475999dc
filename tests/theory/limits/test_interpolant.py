"""z^tau of (2.2a), (2.2b): a residual network (2.1) between its layer times. Its limit is in `test_depth_limit.py`."""

import numpy as np
import pytest
from exact_limits import EULER
from helpers import label_space, laplace, network, set_smooth, smooth
from numpy.testing import assert_allclose

from fem_resnet import DepthInterpolant, ResidualNetwork, StepFailure, depth_limit, from_network, state_array, to_network

on_ranks = pytest.mark.parallel([1, 2, 3])

#: Round-off in some hundred products of numbers of size one, over a few layers.
ROUND_OFF = 1e-13
TIMES = [0.0, 0.3, 0.6, 0.9]


def as_printed(arrays, z_0, t):
    """(2.2a) to the letter, for steps of equal length; (2.2b) for t < tau."""
    tau = arrays.tau[0]
    if t < tau * (1 - 1e-12):
        return z_0
    before = t - tau
    starts = tau * np.arange(len(arrays.a))
    z = as_printed(arrays, z_0, before)
    l = min(int(np.searchsorted(starts, before + 1e-12, side="right")) - 1, len(starts) - 2)
    weight = (before - starts[l]) / tau
    a, B = ((1 - weight) * array[l] + weight * array[l + 1] for array in (arrays.a, arrays.B))
    return z + tau * np.tanh(a[:, None] - B @ z)


#: Options of networks with layers of equal length.
NETWORKS = {
    "annulus, a value a layer": {"space": ("annulus", "CG1")},
    "sphere, three steps a layer": {"space": ("sphere", "CG1"), "steps": 3},
    "disk, linear in t": {"space": ("disk", "CG1"), "steps": 2, "bias_in_time": "linear", "kernel_in_time": "linear"},
    "annulus, shared": {"space": ("annulus", "DG0"), "bias_in_time": "shared", "kernel_in_time": [0, 1, 0]},
    "disk, learned factors and times": {"space": ("disk", "CG1"), "learn_factors": True, "learn_times": True},
}


def made(options):
    net = network(**{"solver_parameters": EULER, "times": TIMES} | options)
    for factor in net.factors:
        factor.set(0, 0.3 * smooth(net.Y, factor.space_basis.shape[1], seed=8))
    if net.layer_times is not None:
        net.layer_times.set(0, [0.2, 0.4, 0.6])
    return net


@on_ranks
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_z_tau_is_the_extended_recursion(options):
    """(2.2a), (2.2b) from the arrays of the network, by a recursion in t that knows nothing of layers."""
    net = made(options)
    initial, arrays = net.Y.batch(smooth(net.Y)), to_network(net)
    z, z_0, T = DepthInterpolant(net, initial), state_array(net.Y, initial), net.times[-1]
    assert_allclose(z.times, np.append(0.0, np.cumsum(arrays.tau)), atol=1e-15)
    for t in np.append(np.linspace(0, T, 11), [0.99 * z.times[1], 1.01 * z.times[1]]):
        assert_allclose(state_array(net.Y, z(t)), as_printed(arrays, z_0, t), atol=ROUND_OFF, err_msg=f"t = {t}")
    for theta in (0.0, 0.4):
        for t, f in z.at_fraction(theta):
            assert_allclose(state_array(net.Y, f), as_printed(arrays, z_0, t), atol=ROUND_OFF, err_msg=f"t = {t}")
    run = net.run(initial)
    for l, t in enumerate(net.times):
        assert_allclose(state_array(net.Y, z(t)), state_array(net.Y, run.state(l)), atol=ROUND_OFF)


def on_the_annulus(in_time, **options):
    return network(
        space=("annulus", "CG1"), basis_for_bias=True, bias_in_time=in_time, kernel_in_time=in_time, steps=2,
        solver_parameters=EULER, **options,
    )  # fmt: skip


@on_ranks
@pytest.mark.parametrize("in_time", ["linear", "layers"])
def test_the_order_over_all_times_is_one(in_time):
    """Theorem 2.1 on an annulus with layers of unequal length; at the layer times alone the distance is smaller."""
    net = on_the_annulus(in_time)
    assert abs(net.Y.measure - 1) > 1 and np.ptp(np.diff(net.times)) > 0.1
    initial = net.Y.batch(smooth(net.Y))
    over_all = depth_limit(net, initial, halvings=2, between=1)
    assert abs(over_all.orders[-1] - 1) < 0.15, str(over_all)
    at_layers = depth_limit(net, initial, halvings=0)
    at_ends = depth_limit(net, initial, halvings=0, between=0)  # of the steps, from the left too
    assert at_layers.errors[0] <= 1.0001 * at_ends.errors[0] and at_ends.errors[0] <= 1.0001 * over_all.errors[0]
    assert over_all.errors[0] > 1.2 * at_layers.errors[0]


@pytest.mark.parallel([2, 3])
def test_the_distance_over_all_times_is_the_same_on_ranks():
    found = []
    for alone in (False, True):
        net = on_the_annulus("linear", alone=alone)
        found.append(depth_limit(net, net.Y.batch(smooth(net.Y)), halvings=0, between=2).errors)
    assert_allclose(*found, rtol=1e-10)


@on_ranks
def test_it_belongs_to_what_it_was_made_with_and_has_own_bases_and_channels():
    phi = [laplace("disk", "CG1", rank) for rank in (3, 5)]
    net = ResidualNetwork(phi, layers=[0.0, 0.5, 1.0], solver_parameters=EULER)
    set_smooth(net, np.random.default_rng(0))
    initial = net.Y.batch(smooth(net.Y))
    z, arrays, z_0 = DepthInterpolant(net, initial), to_network(net), state_array(net.Y, initial)
    net.kernel.set(0, np.zeros((3, 3)))
    net.bias.set(1, 0 * net.Y.weights)
    initial.dat.data_wo[...] = 0.0
    assert_allclose(state_array(net.Y, z(0.7)), as_printed(arrays, z_0, 0.7), atol=ROUND_OFF)


@on_ranks
def test_what_is_not_2_1_and_times_outside_are_refused():
    net = network(solver_parameters=EULER)
    initial = net.Y.batch(smooth(net.Y))
    z = DepthInterpolant(net, initial)
    with pytest.raises(ValueError, match="t: expected a number from 0 to 1.3, got -0.1"):
        z(-0.1)
    with pytest.raises(ValueError, match="theta: expected a number from 0 to 1, got 1.5"):
        z.at_fraction(1.5)
    for parameters in ({"ts_rk_type": "4"}, {"ts_type": "beuler"}):
        other = net.replace(solver_parameters=parameters)
        with pytest.raises(ValueError, match="net: expected Euler's method"):
            DepthInterpolant(other, initial)
        with pytest.raises(ValueError, match="net: expected Euler's method"):
            depth_limit(other, initial, between=1)
    with pytest.raises(ValueError, match="between: expected an integer >= 0, got -1"):
        depth_limit(net, initial, between=-1)


@on_ranks
def test_a_state_that_overflows_is_said():
    Y = label_space("disk", "DG0", 1)
    a, B = np.zeros(Y.size), -1e200 * np.eye(Y.size)
    net, initial = from_network(a, B, np.ones(Y.size), Y, tau=[0.5, 0.5, 0.5], activation="relu")
    with pytest.raises(StepFailure, match="not finite"):
        DepthInterpolant(net, initial)(1.5)
