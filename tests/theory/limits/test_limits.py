"""The limits of a given network, in depth and in width: `depth_limit` and `width_limit`."""

import numpy as np
import pytest
from exact_limits import EULER, end, mesh_size, start
from helpers import label_space, set_smooth, smooth
from helpers import network as own_network
from scipy.integrate import solve_ivp

from fem_resnet import (
    ResidualNetwork,
    depth_limit,
    laplace_basis,
    state_array,
    to_network,
    width_limit,
)

#: On two ranks, which own different nodes.
on_ranks = pytest.mark.parallel([1, 2])

LAPLACE_RANK = {"disk": 6, "annulus": 5, "sphere": 9}


@pytest.mark.parametrize("method, order", [("1fe", 1), ("2a", 2), ("4", 4)])
@pytest.mark.parametrize("in_time", ["layers", "linear"])
def test_the_depth_limit_of_a_network_is_reached_at_the_order_of_its_scheme(method, order, in_time):
    """(2.3) with coefficients of layers, which jump at interfaces, and with the interpolants a^tau, B^tau of 2.1."""
    net = own_network(
        bias_in_time=in_time, kernel_in_time=in_time, basis_for_bias=True, size=0.5, steps=4,
        solver_parameters={"ts_rk_type": method},
    )  # fmt: skip
    found = depth_limit(net, net.Y.batch(smooth(net.Y)), halvings=2)
    np.testing.assert_allclose(found.sizes, [0.7 / n for n in (4, 8, 16)])
    assert abs(found.orders[-1] - order) < 0.2, str(found)


@on_ranks
def test_the_first_error_in_depth_is_that_of_the_network_itself():
    """Against SciPy's solution at T; learned factors and times keep their present values."""
    net = own_network(learn_factors=True, learn_times=True, steps=2, solver_parameters=EULER)
    for factor in net.factors:
        factor.set(0, 0.3 * smooth(net.Y, factor.space_basis.shape[1], seed=8))
    net.layer_times.set(0, [0.3, 0.6, 1.1])
    initial = net.Y.batch(smooth(net.Y))
    found = depth_limit(net, initial, halvings=0)
    arrays, z = to_network(net), state_array(net.Y, initial)
    ends, f = [0.0, 0.3, 0.6, 1.1], z
    w, worst = state_array(net.Y, net.Y.batch(net.Y.weights)), 0.0
    run = net.run(initial)
    for l in range(3):
        solution = solve_ivp(
            lambda t, y: np.tanh(arrays.a[2 * l][:, None] - arrays.B[2 * l] @ y.reshape(f.shape)).ravel(),
            ends[l : l + 2], f.ravel(), rtol=1e-10, atol=1e-12,
        )  # fmt: skip
        f = solution.y[:, -1].reshape(f.shape)
        worst = max(worst, np.sum(w * (state_array(net.Y, run.state(l + 1)) - f) ** 2) ** 0.5)
    np.testing.assert_allclose(found.errors, [worst], rtol=1e-6)


@pytest.mark.parametrize("terminal", [None, end], ids=["state", "co-state"])
@pytest.mark.parametrize("domain", LAPLACE_RANK)
def test_the_width_limit_of_a_network_is_reached_at_order_two(domain, terminal):
    """As distributions, on DG0. The finest space takes the place of the limit and is left out of the orders."""
    refinements = {"disk": (2, 3, 4), "annulus": (2, 3, 5), "sphere": (1, 2, 3)}
    spaces = [label_space(domain, "DG0", n) for n in refinements[domain]]
    rank = LAPLACE_RANK[domain]
    phi = laplace_basis(spaces[-1], rank)
    net = ResidualNetwork(phi, bias=phi, layers=2)
    set_smooth(net, np.random.default_rng(0))
    found = width_limit(net, start, spaces, terminal=terminal)
    *h, finest = (mesh_size(Y) ** 2 for Y in spaces)
    expected = (h[0] - finest) / (h[1] - finest)
    assert 0.75 < found.errors[0] / found.errors[1] / expected < 1.33, f"{found}, ratio {expected:.2f}"


@pytest.mark.parallel([2])
def test_limits_are_the_same_on_ranks():
    for alone in (False, True):
        spaces = [label_space("disk", "DG0", n, alone=alone) for n in (1, 2, 3)]
        phi = laplace_basis(spaces[-1], 6)
        net = ResidualNetwork(phi, bias=phi, layers=2, solver_parameters=EULER)
        set_smooth(net, np.random.default_rng(0))
        depth = depth_limit(net, net.Y.batch(start(net.Y.coordinates)), halvings=1)
        both = [*depth.errors, *(x for r in (None, end) for x in width_limit(net, start, spaces, terminal=r).errors)]
        if not alone:
            on_all = both
    # Eigenfunctions are accurate to about 1e-13.
    np.testing.assert_allclose(on_all, both, rtol=1e-8)


def test_what_has_no_limit_here_is_refused():
    net = own_network(solver_parameters={"ts_type": "rk", "ts_adapt_type": "basic"})
    with pytest.raises(ValueError, match="^depth_limit: it does not take adapted time steps"):
        depth_limit(net, net.Y.batch(smooth(net.Y)))
    with pytest.raises(ValueError, match="halvings: expected an integer >= 0"):
        depth_limit(own_network(), net.Y.batch(smooth(net.Y)), halvings=-1)
    spaces = [label_space("disk", "CG1", n) for n in (1, 2)]
    in_basis = own_network(bias=net.bases["phi"][0])
    with pytest.raises(ValueError, match="spaces: expected at least two LabelSpaces"):
        width_limit(in_basis, start, spaces[:1])
    with pytest.raises(ValueError, match="spaces: expected falling mesh sizes"):
        width_limit(in_basis, start, spaces[::-1])
    with pytest.raises(ValueError, match="^width_limit: it does not take a bias with a value at every node"):
        width_limit(own_network(), start, spaces)
