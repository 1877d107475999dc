"""Starting values: what each rule says of B, the same on any partition; sets of kernels refuse by name."""

import numpy as np
import pytest
from helpers import flat_network, label_space, laplace, smooth
from numpy.testing import assert_allclose, assert_array_equal
from problems import coefficients, polynomials

from fem_resnet import (
    Channels,
    DampedAntisymmetric,
    Head,
    Kernel,
    LaplaceFunctions,
    NormBounded,
    PositiveSemidefinite,
    ResidualNetwork,
    given_basis,
    laplace_basis,
    point_space,
    stability_report,
)  # fmt: skip
from fem_resnet.network.starting_values import RULES

on_ranks = pytest.mark.parallel([1, 2, 3])
SPACES = [("disk", "CG1"), ("annulus", "DG0"), ("sphere", "CG1"), ("cube", "CG1")]
RANKS = {"disk": 6, "annulus": 5, "sphere": 4, "cube": 4}


def basis(space, alone=False):
    return laplace(*space, RANKS[space[0]], alone)


def applied(net, k, f):
    """B f by the network's own factors."""
    kernel = net.kernel.space_bases[k].kernel
    return kernel.apply(net.kernel.get(k), f)


def projected(Y, P, f):
    """Onto the span of the columns of P, by least squares in the label measure."""
    G = Y.sum(P.T @ (Y.weights[:, None] * P))
    return P @ np.linalg.solve(G, Y.sum(P.T @ (Y.weights[:, None] * f)))


@on_ranks
@pytest.mark.parametrize("space", SPACES, ids="-".join)
def test_minus_the_identity_is_that_on_the_span(space):
    """Of bases that are not orthonormal too, where phi and psi differ."""
    phi = basis(space)
    Y, f = phi.Y, smooth(phi.Y)
    skew = given_basis(
        Y, [phi.function(c) for c in np.array([[1.0, 0.4, 0.3, 0.1], [0.0, 2.0, 1.0, -1.0]] @ np.eye(4, phi.rank))]
    )
    for left, right, gain in (
        (phi, phi, 1.0),
        (skew, skew, 2.0),
        (phi, skew, 1.0),
        (skew, phi, -0.5),
        (skew, polynomials(Y), 1.0),
    ):
        net = flat_network(left, right, layers=2, bias=phi)
        net.bias.set(1, np.ones(phi.rank))
        net.start("minus identity", gain=gain)
        expected = -gain * projected(Y, left.values, projected(Y, right.values, f))
        for k in range(2):
            assert_allclose(applied(net, k, f), expected, atol=1e-11)
            assert not net.bias.get(k).any()


@on_ranks
@pytest.mark.parametrize("space", SPACES, ids="-".join)
def test_a_local_kernel_is_a_heat_kernel(space):
    """Functions of psi decay by e^(-t lambda), the last one by e^-4."""
    psi = basis(space)
    net = ResidualNetwork(psi, layers=1)
    net.start("local", gain=0.5)
    decay = -0.5 * np.exp(-4 * psi.eigenvalues / psi.eigenvalues[-1])
    assert_allclose(applied(net, 0, psi.values), decay * psi.values, atol=1e-10)
    assert_allclose(decay[[0, -1]], [-0.5, -0.5 * np.exp(-4.0)], rtol=1e-12)
    narrow = ResidualNetwork(psi, layers=1)
    narrow.start("local", gain=0.5, width=1e-6)
    assert_allclose(applied(narrow, 0, psi.values), -0.5 * psi.values, atol=1e-9)
    with pytest.raises(ValueError, match="rule: 'local' expects a kernel whose psi has eigenvalues, as laplace_basis has"):
        flat_network(psi, polynomials(psi.Y)).start("local")


@on_ranks
@pytest.mark.parametrize("space", SPACES[1:3], ids="-".join)
def test_a_local_kernel_couples_all_channels(space):
    """Each pair has the heat kernel times one number; their variance is 1/C."""
    C, one = 3, basis(space)
    phi = laplace_basis(Channels(one.Y, C), one.rank)
    net = ResidualNetwork(phi, layers=2)
    decay = np.exp(-4 * one.eigenvalues / one.eigenvalues[-1])
    squares, seen = [], []
    for seed in range(60):
        net.start("local", seed, gain=0.5)
        xi = -net.kernel.get(1)[:: one.rank, :: one.rank] / (0.5 * decay[0])
        squares.append(xi**2)
        seen.append(xi)
        if seed > 1:
            continue
        f = phi.values[:, :: one.rank] + phi.values[:, one.rank - 1 :: one.rank]  # two functions in one channel, in each
        parts = applied(net, 1, f).reshape(C, -1, C)
        moments = np.array([one.project(part) for part in parts])  # shape (C, rank, C)
        expected = -0.5 * xi[:, None] * (one.gram[0] * decay[0] + one.gram[-1] * decay[-1])[None, :, None]
        assert_allclose(moments, expected, atol=1e-9)
    assert_allclose(np.mean(squares, axis=0), 1 / C, rtol=0.75)
    assert_allclose(np.mean(squares), 1 / C, rtol=0.15)
    assert_allclose(np.mean(seen, axis=0), 0, atol=0.3)
    moved = ResidualNetwork(Kernel(phi, among=LaplaceFunctions(phi, split=0.05)), layers=2)
    net.start("local", 5)
    moved.start("local", 5)
    assert_allclose(moved.kernel.get(1), net.kernel.get(1), atol=0.05)
    assert_allclose(moved.kernel.get(1), moved.settings.kernel.among.projected(net.kernel.get(1)), atol=1e-12)


@on_ranks
def test_a_local_kernel_of_channels_reads_other_functions_than_it_writes():
    """phi in no channel alone: the start is the one on the span of psi, projected onto that of phi."""
    one = basis(("annulus", "CG1"))
    Y = Channels(one.Y, 2)
    psi = laplace_basis(Y, 4)
    phi = given_basis(Y, [psi.function(c) for c in np.random.default_rng(0).normal(size=(5, psi.rank))])
    net, free = (ResidualNetwork(Kernel(left, psi), bias=phi, layers=1) for left in (phi, psi))
    for each in (net, free):
        each.start("local", 3)
    f = smooth(Y)
    assert_allclose(applied(net, 0, f), projected(Y, phi.values, applied(free, 0, f)), atol=1e-11)


def test_a_random_kernel_is_smooth_and_of_the_size_that_is_said():
    """The mean over many seeds of |b|^2, and of the coefficients in orthonormal functions."""
    phi, psi = basis(("annulus", "DG0")), polynomials(label_space("annulus", "DG0"))
    net = flat_network(phi, psi, bias=phi, layers=1)
    squares, entries = [], []
    kernel = net.kernel.space_basis.kernel
    for seed in range(400):
        net.bias.set(0, np.ones(phi.rank))
        net.start("random smooth", seed, gain=3.0)
        squares.append(kernel.norm(net.kernel.get(0)) ** 2)
        entries.append(kernel.orthonormal(net.kernel.get(0)) ** 2)
        assert not net.bias.get(0).any()
    assert_allclose(np.mean(squares), 9.0, rtol=0.25)
    entries = np.mean(entries, axis=0)
    k = np.arange(1, 4)
    assert_allclose(entries[:3] / entries[0, 0], 1 / np.outer(k, k) ** 2, rtol=0.5)


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bias", ["nodes", "basis"])
def test_one_seed_gives_the_same_on_all_partitions(rule, bias):
    found = []
    for alone in (False, True):
        phi = basis(("annulus", "CG1"), alone)
        net = flat_network(phi, bias=phi if bias == "basis" else None, times=[0, 0.4, 1], kernel_in_time="linear")
        net.start(rule, 7)
        found.append([coefficients(p, function) for p in net.parameters for function in p.functions])
    for ours, alone in zip(*found):
        assert_allclose(ours, alone, atol=1e-10)
    assert any(part.any() for part in found[0]) == (rule != "zero")


@on_ranks
def test_another_seed_gives_other_values_and_zero_makes_them_zero():
    net = flat_network(basis(("disk", "CG1")), layers=2)
    values = []
    for seed in (0, 0, 1):
        net.start("random smooth", seed)
        values.append([net.kernel.get(0), net.kernel.get(1)])
    for first, again, other in zip(*values):
        assert_array_equal(first, again)
        assert np.abs(first - other).max() > 1e-3
    assert np.abs(values[0][0] - values[0][1]).max() > 1e-3, "layers differ"
    net.start("zero")
    assert not any(p.get(k).any() for p in net.parameters for k in range(2))


@on_ranks
def test_data_set_the_scale():
    """Inputs in other units give the same preactivation."""
    phi = basis(("disk", "CG1"))
    net = flat_network(phi, phi, bias=phi)
    f = smooth(net.Y, 3)
    size = np.sqrt(net.Y.sum(net.Y.weights @ f**2).mean() / net.Y.measure)
    net.start("local", gain=0.7)
    expected = net.kernel.get(0) / size
    for unit in (1.0, 1e-3):
        net.start("local", gain=0.7, data=net.Y.batch(f * unit))
        assert_allclose(unit * net.kernel.get(0), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="data: expected inputs that are not all 0"):
        net.start("local", data=net.Y.batch(np.zeros_like(f)))


@on_ranks
def test_learned_factors_times_and_bases_of_layers():
    """Learned factors stay as they are, and the kernel is made in them."""
    phi = basis(("disk", "CG1"))
    net = flat_network(phi, layers=2, learn_factors=True, learn_times=True)
    net.factors[1].set(0, 0.3 * smooth(net.Y, phi.rank, seed=4))
    before = [p.get(0) for p in (*net.factors, net.layer_times)]
    net.start()
    factors, f = net.learned_factors(), smooth(net.Y)
    expected = -projected(net.Y, factors.phi.values, projected(net.Y, factors.psi.values, f))
    assert_allclose(factors.apply(net.kernel.get(1), f), expected, atol=1e-11)
    for p, values in zip((*net.factors, net.layer_times), before):
        assert_array_equal(p.get(0), values)
    other = laplace("disk", "CG1", 3)
    net = flat_network([phi, other], [phi, other], layers=2)
    net.start("local")
    assert [np.linalg.matrix_rank(net.kernel.get(k)) for k in range(2)] == [6, 3]
    flat_network(phi, layers=0).start("local")


@on_ranks
def test_a_set_of_kernels_takes_what_is_in_it_and_refuses_the_rest_by_name():
    phi = basis(("annulus", "CG1"))

    def net(among):
        made = flat_network(phi, layers=2, kernel_set=among)
        return made, [made.kernel.get(k) for k in range(2)]

    bounded, _ = net(NormBounded(1.5))
    for rule, gain in (("zero", 1.0), ("minus identity", 1.4), ("local", 1.0)):
        bounded.start(rule, gain=gain)
        free = flat_network(phi, layers=2)
        free.start(rule, gain=gain)
        assert_allclose(bounded.kernel.get(1), free.kernel.get(1), atol=1e-12)
    semidefinite, _ = net(PositiveSemidefinite())
    semidefinite.start("local", gain=-1.0)
    assert np.linalg.eigvalsh(semidefinite.kernel.get(0)).min() > 0
    for among, rule, gain in (
        (NormBounded(1.5), "minus identity", 2.0),
        (PositiveSemidefinite(), "minus identity", 1.0),
        (PositiveSemidefinite(rank=2), "minus identity", -1.0),
        (PositiveSemidefinite(), "random smooth", 1.0),
        (DampedAntisymmetric(0.1), "zero", 1.0),
        (DampedAntisymmetric(0.1), "local", 1.0),
    ):
        refused, before = net(among)
        name = type(among).__name__
        with pytest.raises(ValueError, match=f"rule: expected one whose kernels are in the set {name}, got '{rule}'"):
            refused.start(rule, gain=gain)
        for k in range(2):
            assert_array_equal(refused.kernel.get(k), before[k])


@on_ranks
def test_a_network_on_a_graph_starts_too():
    """A ring of 12 points of unequal lengths between them."""
    ring = np.roll(np.diag(np.arange(1.0, 13)), 1, axis=1)
    phi = laplace_basis(point_space(0.5 + np.arange(12.0) / 12, graph=ring + ring.T), 4)
    net = ResidualNetwork(phi, layers=1)
    net.start("local")
    decay = np.exp(-4 * phi.eigenvalues / phi.eigenvalues[-1])
    assert_allclose(net.kernel.get(0), -np.diag(decay), atol=1e-12)


@on_ranks
def test_heads_start_too():
    phi = basis(("annulus", "CG1"))
    Y, f = phi.Y, smooth(phi.Y)
    head = Head(polynomials(Y), phi, "identity")
    head.mu.set(0, np.ones(phi.rank))
    head.start("identity", gain=2.0)
    expected = 2 * projected(Y, phi.values, projected(Y, head.psi.values, f))
    assert_allclose(Y.values(head(Y.batch(f))), expected, atol=1e-11)
    head.start("zero")
    assert not head.W.get(0).any()
    with pytest.raises(ValueError, match="rule: expected 'zero' or 'random smooth' for an output on .* got 'identity'"):
        Head(phi, 3).start("identity")


def test_no_class_of_a_random_head_is_before_another():
    classes = Head(basis(("annulus", "CG1")), 3)
    squares = []
    for seed in range(300):
        classes.start("random smooth", seed)
        squares.append(classes.W.get(0) ** 2)
    squares = np.mean(squares, axis=0)
    assert_allclose(squares.sum(), 1.0, rtol=0.25)
    assert_allclose(squares[:, 0], squares[:, 0].mean(), rtol=0.4)  # no class is before another
    assert_allclose(squares[:, 1] / squares[:, 0], 0.25, rtol=0.6)


@on_ranks
def test_the_report_says_where_a_network_acts_linearly():
    phi = basis(("annulus", "CG1"))
    Y = phi.Y
    f = Y.batch(smooth(Y))

    def found(net):
        report = stability_report(net, f)
        kinds = [suggestion.kind for suggestion in report.suggestions]
        return any("this network acts linearly" in line for line in report.findings), "start" in kinds

    net = ResidualNetwork(phi, layers=2)
    net.bias.set(1, smooth(Y, 1)[:, 0])
    assert found(net) == (True, True), "a bias alone moves all samples alike"
    net.kernel.set(1, 1e-9 * np.eye(phi.rank))
    net.bias.set(1, np.zeros(Y.nodes))
    assert found(net) == (True, True), "sigma is linear to round-off"
    net.kernel.set(1, 1e-3 * np.eye(phi.rank))
    assert found(net) == (False, False)
    net.start()
    assert found(net) == (False, False)
    relu = net.replace(activation="relu")
    assert found(relu) == (False, False)
    for layer in range(2):
        relu.bias.set(layer, 9 * np.sign(Y.coordinates[:, 0] - 0.05))
        relu.kernel.set(layer, 0.01 * np.eye(phi.rank))
    assert found(relu) == (True, True), "u never passes 0, at no node"
    assert found(net.replace(activation="identity")) == (True, False), "that was chosen"
