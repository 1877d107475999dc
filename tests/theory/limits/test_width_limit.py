"""Theorem 2.2: networks (2.6) tend to (2.8) in width, and their co-states to (4.2), at the orders of smooth data."""

import firedrake as fd
import numpy as np
import pytest
from exact_limits import (
    MESHES,
    QUADRATURE,
    RK8,
    Continuum,
    bias,
    demo,
    end,
    errors_on_cells,
    kernel,
    mesh_size,
    network,
    orders,
    partition,
    scalar,
    start,
)
from firedrake.adjoint import Control
from helpers import label_space
from problems import taping
from pyadjoint import ReducedFunctional

from fem_resnet import (
    Bias,
    Kernel,
    ResidualNetwork,
    compress,
    from_network,
    point_space,
    state_array,
)


@pytest.mark.parametrize("domain", MESHES)
def test_width_converges_strongly_at_order_one_and_two_against_cell_means(domain):
    """Theorem 2.2 for Lipschitz sigma and data in C2: strongly, in L2(Y), at O(h); against cell means at O(h^2)."""
    exact = Continuum(QUADRATURE[domain]())
    found, sizes = [], []
    for mesh in MESHES[domain]:
        Y = partition(mesh)
        f = scalar(Y, network(Y)(Y.batch(start(Y.coordinates))))
        found.append(errors_on_cells(f, exact.state))
        sizes.append(mesh_size(Y))
    strong, means = np.transpose(found)
    assert abs(orders(sizes, strong)[-1] - 1) < 0.1, f"errors {strong}"
    assert abs(orders(sizes, means)[-1] - 2) < 0.2, f"errors {means}"


@pytest.mark.parametrize("domain", MESHES)
def test_the_costate_converges_in_width_at_the_same_orders(domain):
    """r(0) of the discrete network, from the tape, against (4.2) on the domain itself."""
    exact = Continuum(QUADRATURE[domain]())
    found, sizes = [], []
    for mesh in MESHES[domain]:
        Y = partition(mesh)
        found.append(errors_on_cells(scalar(Y, costate(network(Y), Y)), exact.costate))
        sizes.append(mesh_size(Y))
    strong, means = np.transpose(found)
    assert abs(orders(sizes, strong)[-1] - 1) < 0.1, f"errors {strong}"
    assert abs(orders(sizes, means)[-1] - 2) < 0.2, f"errors {means}"


def costate(net, Y, r=end):
    """r(0) for the functional int r(T) f(T) dy."""
    initial = Y.batch(start(Y.coordinates))
    with taping():
        run = net.run(initial)
        weight = Y.batch(r(Y.coordinates))
        J = fd.assemble(fd.inner(run.final, weight) * fd.dx)
    ReducedFunctional(J, Control(initial)).derivative()
    return run.costate(0)


@pytest.mark.parametrize("method, order", [("1fe", 1), ("2a", 2), ("4", 4)])
def test_the_costate_converges_in_depth_at_the_order_of_the_scheme(method, order):
    """On one mesh, against many steps: of order one for the residual network (2.1)."""
    Y = label_space("annulus", "DG0")

    def at(layers, method):
        found = compress(kernel, 1e-9, Y)
        net = ResidualNetwork(
            Kernel(found.kernel.phi, found.kernel.psi, in_time="shared"),
            bias=Bias(in_time="shared"),
            layers=layers,
            solver_parameters={"ts_rk_type": method},
        )
        net.kernel.set(0, found.beta)
        net.bias.set(0, bias(Y.coordinates))
        return Y.values(costate(net, Y))[:, 0]

    exact, depths = at(16, "8vr"), np.array([8, 16, 32])
    errors = [float(Y.sum(Y.weights @ (at(L, method) - exact) ** 2)) ** 0.5 for L in depths]
    assert abs(orders(1 / depths, errors)[-1] - order) < 0.12, f"errors {errors}"


@pytest.mark.parametrize("seed", [0, 1])
def test_partitions_of_random_lengths_converge_with_the_largest_of_them(seed):
    """Cells of an interval of lengths that differ by a factor of ten and more: the order is that in the largest."""
    exact = Continuum(_interval())
    found, sizes = [], []
    for N in (30, 90, 270):
        # Uniform random lengths, in any order.
        lengths = np.random.default_rng(seed).uniform(0.05, 1, N)
        ends = np.append(0, np.cumsum(lengths)) / lengths.sum()
        y, w = (ends[1:] + ends[:-1])[:, None] / 2, np.diff(ends)
        a, b, f_I = (function(*x) for function, x in ((bias, [y]), (kernel, [y[:, None], y[None]]), (start, [y])))
        net, initial = from_network(a, b * w, f_I, point_space(w), steps=4, solver_parameters=RK8)
        f = state_array(net.Y, net(initial))[:, 0]
        sides = np.stack([exact.state(x[:, None]) for x in (ends[:-1], y[:, 0], ends[1:])])
        means = np.array([1, 4, 1]) @ sides / 6
        spread = np.array([1, 4, 1]) @ (sides - f) ** 2 / 6
        found.append([(w @ spread) ** 0.5, (w @ (f - means) ** 2) ** 0.5])
        sizes.append(w.max())
    strong, means = np.transpose(found)
    assert abs(orders(sizes, strong)[-1] - 1) < 0.15, f"errors {strong}"
    assert abs(orders(sizes, means)[-1] - 2) < 0.3, f"errors {means}"


def _interval(n=10):
    x, w = demo.gauss(n, 0, 1)
    return x[:, None], w
