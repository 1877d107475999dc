"""The label domain Y x {1 .. C}: its measure and batches; bases, networks and derivatives against dense block matrices."""

from functools import cache

import firedrake as fd
import numpy as np
import pytest
import sympy
from firedrake import COMM_SELF, COMM_WORLD
from helpers import TIMES, flat_network, label_space, set_smooth, smooth
from kinds import GRADIENT, directions_of, field_problem, largest, options
from numpy.testing import assert_allclose
from problems import gathered

from fem_resnet import (
    Basis,
    Batch,
    Channels,
    Head,
    LearningProblem,
    RepeatedBasis,
    RunningCost,
    cell_indicators,
    cross_entropy,
    given_basis,
    laplace_basis,
    least_squares,
    point_space,
    smooth_in_space,
    smooth_in_time,
    tikhonov,
    verify,
)  # fmt: skip
from fem_resnet.label_domain.basis import node_numbers

on_ranks = pytest.mark.parallel([1, 2, 3])
ROUND_OFF = 1e-12


def ring(alone):
    forth = np.roll(np.eye(9), 1, axis=0)
    return point_space(np.linspace(0.5, 1.5, 9), graph=forth + forth.T, comm=COMM_SELF if alone else COMM_WORLD)


DOMAINS = {
    "disk": lambda alone: label_space("disk", "CG1", alone=alone),
    "annulus of cells": lambda alone: label_space("annulus", "DG0", alone=alone),
    "sphere": lambda alone: label_space("sphere", "CG1", alone=alone),
    "block": lambda alone: label_space("block", "CG1", alone=alone),
    "ring": ring,
}
each_domain = pytest.mark.parametrize("domain", DOMAINS)


@cache
def basis(domain, rank=3, channels=2, alone=False):
    Y = DOMAINS[domain](alone)
    return laplace_basis(Channels(Y, channels), rank)


def dense(phi):
    """The same functions as a basis that knows nothing of channels."""
    return Basis(phi.Y, phi.values, "given")


def network(phi, **more):
    net = flat_network(phi, **{"bias": phi, "times": TIMES, "activation": "tanh"} | more)
    set_smooth(net, np.random.default_rng(0))
    return net


# -- the label domain --------------------------------------------------------------------------------------------------


@on_ranks
@each_domain
def test_its_measure_is_the_product_measure(domain):
    Y = basis(domain, channels=3).Y
    one = Y.one
    assert Y.channels == 3 and one.channels == 1 and Y.size == 3 * one.size
    assert_allclose(Y.measure, 3 * one.measure, rtol=1e-15)
    assert_allclose(Y.weights, np.concatenate([one.weights] * 3))
    f = Y.batch(smooth(Y))
    assert_allclose(Y.inner(f, f), sum(one.inner(part, part) for part in Y.part(f)), rtol=ROUND_OFF)
    # By UFL, which knows of components and not of channels.
    u = fd.Function(Y.V)
    Y.write(u, smooth(Y, 1))
    exact = fd.assemble(fd.inner(u, fd.Constant([1.0, 2.0, 3.0])) * fd.dx)
    weighted = np.repeat([1.0, 2.0, 3.0], one.nodes) * Y.weights
    assert_allclose(float(Y.sum(weighted @ Y.values(u)[:, 0])), exact, rtol=ROUND_OFF)


@on_ranks
@each_domain
def test_batches_are_joined_of_fields_and_parted_again(domain):
    Y = basis(domain, channels=3).Y
    u, v = (Y.one.batch(smooth(Y.one, 4, seed=seed)) for seed in (1, 2))
    joined = Y.join([u, None, v])
    for part, expected in zip(Y.part(joined), (Y.one.values(u), 0 * Y.one.values(u), Y.one.values(v)), strict=True):
        assert_allclose(Y.one.values(part), expected, rtol=0)
    # Component (c, s) of the Function is sample s of channel c.
    assert joined.function_space().value_shape == (3, 4)
    assert_allclose(joined.dat.data_ro[:, 2], Y.one.values(v), rtol=0)
    assert_allclose(Y.values(Y.batch(Y.values(joined))), Y.values(joined), rtol=0)


@on_ranks
def test_numbers_and_gradients_are_those_of_each_channel():
    Y = basis("annulus of cells").Y
    numbers, one = node_numbers(Y), node_numbers(Y.one)
    assert_allclose(numbers, np.concatenate([one, one + Y.one.size]))
    assert_allclose(cell_indicators(Y).values[np.arange(Y.nodes), numbers], 1.0)
    Y = basis("ring").Y
    assert_allclose(np.sort(np.concatenate(Y.comm.allgather(Y.numbers))), np.arange(18))
    f = smooth(Y)
    expected = np.vstack([Y.one.apply_stiffness(part) for part in np.split(f, 2)])
    assert_allclose(Y.apply_stiffness(f), expected, rtol=0)
    laplacian = np.diag(Y.graph.sum(axis=1)) - Y.graph.toarray()
    every = np.empty((18, 3))
    every[np.concatenate(Y.comm.allgather(Y.numbers))] = np.concatenate(Y.comm.allgather(f))
    assert_allclose(Y.apply_stiffness(f), (laplacian @ every)[Y.numbers], atol=1e-13)


@on_ranks
def test_what_does_not_fit_is_refused():
    Y = basis("disk", channels=3).Y
    u = Y.one.batch(smooth(Y.one))
    for make, message in (
        (lambda: Channels(Y, 2), "^Y: expected the label domain of one channel"),
        (lambda: Channels(Y.one, 0), "^channels: expected"),
        (lambda: Y.join([u, u]), "^fields: expected 3, one a channel"),
        (lambda: Y.join([None] * 3), "^fields: .* at least one that is not None"),
        (lambda: Y.join([u, None, Y.one.batch(smooth(Y.one, 2))]), "^fields: expected as many samples"),
        (lambda: Y.part(Y.one.batch(smooth(Y.one, 2))), "^function: expected a Function of"),
        (lambda: RepeatedBasis(Y, basis("sphere").one), "^one: expected a basis on"),
        (lambda: basis("disk", channels=3).on(Channels(label_space("disk", "CG1", 2), 2)), "^on: expected .* 3 channels"),
        (lambda: RepeatedBasis(Y.one, basis("disk", channels=3).one), "^Y: expected a Channels"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make()


def test_one_function_is_no_batch_of_as_many_samples():
    """A Function of Y.V has C components, as a batch of C samples on one channel has: a problem asks for a batch."""
    phi = basis("disk")
    target = phi.Y.batch(smooth(phi.Y, 1))
    with pytest.raises(ValueError, match=r"^batch.inputs: expected a batch .* give Y.batch\(inputs\)"):
        LearningProblem(network(phi), None, least_squares, None, Batch(fd.Function(phi.Y.V), target))


# -- bases ---------------------------------------------------------------------------------------------------------------


@on_ranks
@each_domain
def test_a_repeated_basis_is_block_diagonal(domain):
    phi = basis(domain, channels=3)
    n, r = phi.Y.one.nodes, phi.one.rank
    for c in range(3):
        for d in range(3):
            block = phi.values[c * n : (c + 1) * n, d * r : (d + 1) * r]
            assert_allclose(block, phi.one.values if c == d else 0 * phi.one.values, rtol=0)
    assert_allclose(phi.gram, np.eye(9), atol=ROUND_OFF)
    assert_allclose(phi.stiffness, np.kron(np.eye(3), phi.one.stiffness), rtol=0)
    f, c = smooth(phi.Y), np.random.default_rng(0).normal(size=(9, 4))
    assert_allclose(phi.project(f), Basis.project(dense(phi), f), atol=ROUND_OFF)
    assert_allclose(phi.expand(c), phi.values @ c, atol=ROUND_OFF)
    assert_allclose(phi.functional(c), phi.Y.weights[:, None] * (phi.values @ c), atol=ROUND_OFF)
    assert_allclose(phi.Y.values(phi.function(c)), phi.values @ c, atol=ROUND_OFF)


# -- networks ------------------------------------------------------------------------------------------------------------


def evaluated(net, head=None):
    """J, its derivative, the Hessian in a direction, and the co-state at the start."""
    p = field_problem(net, tikhonov(0.05) + smooth_in_time(0.02))
    h = directions_of(p)
    J, run = p.record()
    derivative = [np.array(d.dat.data_ro) for d in J.derivative()]
    costate = net.Y.values(run.costate(0)).copy()
    hessian = [np.array(d.dat.data_ro) for d in J.hessian(h)]
    return [np.array(float(J(p.functions))), *derivative, costate, *hessian]


@on_ranks
@pytest.mark.parametrize("more", [
    *({"solver_parameters": options(name)} for name in GRADIENT), {"solver_parameters": {"ts_type": "discrete_gradient"}},
    {"bias": None}, {"gradient_flow": True}, {"learn_times": True}, {"kernel_in_time": "linear", "bias_in_time": "linear"},
    {"layers_per_block": 1, "steps": 2}, {"precision": "single"},
], ids=str)  # fmt: skip
def test_a_network_is_that_of_the_block_diagonal_matrices(more):
    """A basis that knows nothing of channels takes other ways: the whole J, all derivatives and states agree."""
    phi = basis("disk")
    found, expected = (evaluated(network(each, **{"bias": each} | more)) for each in (phi, dense(phi)))
    close = 1e-5 if more.get("precision") == "single" else 1e-10
    for one, other in zip(found, expected, strict=True):
        assert_allclose(one, other, rtol=0, atol=close * max(largest(other), 1e-3))


@on_ranks
@pytest.mark.parametrize("bias", ["basis", "nodes"])
def test_a_running_cost_is_that_of_the_block_diagonal_matrices(bias):
    f, a = sympy.symbols("f a")
    phi, found = basis("disk"), []
    for each in (phi, dense(phi)):
        net = network(each, bias=each if bias == "basis" else None, layers_per_block=2)
        p = field_problem(net).replace(running=RunningCost(f**2 + a**2 / 20, kernel=0.1))
        J, run = p.record()
        parts = [np.array(float(J.functional)), *(np.array(d.dat.data_ro) for d in J.derivative())]
        parts += [net.Y.values(run.costate(0)).copy(), *(np.array(d.dat.data_ro) for d in J.hessian(directions_of(p)))]
        found.append(parts)
    for one, other in zip(*found, strict=True):
        assert_allclose(one, other, rtol=0, atol=1e-10 * max(largest(other), 1e-3))


@on_ranks
@each_domain
def test_on_each_domain_it_is_that_of_the_block_diagonal_matrices(domain):
    phi = basis(domain)
    for one, other in zip(*(evaluated(network(each)) for each in (phi, dense(phi))), strict=True):
        assert_allclose(one, other, rtol=0, atol=1e-10 * max(largest(other), 1e-3))


@on_ranks
def test_channels_that_nothing_couples_are_networks_of_their_own():
    phi = basis("sphere")
    net = network(phi)
    alone = [network(phi.one) for _ in range(2)]
    r = phi.one.rank
    for k in range(3):
        beta = np.zeros((2 * r, 2 * r))
        for c, one in enumerate(alone):
            block, a = (np.random.default_rng([k, c]).normal(size=shape) for shape in ((r, r), (r,)))
            one.kernel.set(k, block)
            one.bias.set(k, a)
            beta[c * r : (c + 1) * r, c * r : (c + 1) * r] = block
        net.kernel.set(k, beta)
        net.bias.set(k, np.concatenate([one.bias.get(k) for one in alone]))
    f = net.Y.batch(smooth(net.Y))
    for part, one, start in zip(net.Y.part(net(f)), alone, net.Y.part(f), strict=True):
        assert_allclose(net.Y.one.values(part), one.Y.values(one(start)), rtol=0, atol=1e-13)


@on_ranks
@pytest.mark.parametrize("domain", ["disk", "sphere", "block", "ring"])
def test_taylor_with_channels(domain, taylor):
    phi = basis(domain)
    p = field_problem(network(phi, bias=None), tikhonov(0.05) + smooth_in_space(0.01) + smooth_in_time(0.02))
    taylor(p.reduced_functional(), p.functions, directions_of(p), domain, "two channels", second_order=True)


@on_ranks
@pytest.mark.parametrize("domain", ["annulus of cells", "block", "ring"])
def test_any_number_of_ranks_gives_the_same(domain):
    found = []
    for alone in (False, True):
        phi = basis(domain, alone=alone)
        p = field_problem(network(phi))
        J = p.reduced_functional()
        coefficients = [
            basis_.read(d)
            for parameter, part in zip(p.parameters, (J.derivative()[:3], J.derivative()[3:]))
            for basis_, d in zip(parameter.space_bases, part)
        ]
        if domain == "block":  # its first functions are simple, and their signs do not see the partition
            coefficients = [np.abs(c) for c in coefficients]
        found.append([np.array(float(J.functional)), *coefficients])
    for one, other in zip(*found, strict=True):
        assert_allclose(one, other, rtol=0, atol=1e-9 * max(np.abs(other).max(), 1e-3))


def test_a_pooled_head_reads_the_means_of_the_channels(taylor):
    phi = basis("disk", channels=3)
    Y, net = phi.Y, network(phi)
    head = Head(RepeatedBasis(Y, given_basis(Y.one, [1.0])), 4)
    W, mu = (np.random.default_rng(0).normal(size=shape) for shape in ((4, 3), (4,)))
    head.W.set(0, W)
    head.mu.set(0, mu)
    f = net(Y.batch(smooth(Y)))
    means = np.array([Y.one.weights @ part for part in np.split(Y.values(f), 3)])
    assert_allclose(head.scores(f), (W @ means + mu[:, None]).T, atol=ROUND_OFF)
    p = LearningProblem(net, head, cross_entropy, tikhonov(0.01), Batch(Y.batch(smooth(Y)), [0, 3, 1]))
    taylor(p.reduced_functional(), p.functions, directions_of(p), "disk", "three channels, pooled")


@pytest.mark.parallel([1, 2])
def test_verify_takes_channels():
    phi = basis("annulus of cells", channels=2)
    net = network(phi, bias=None, layers_per_block=2)
    head = Head(phi, phi.one, "identity")
    head.start("random smooth")
    targets = phi.Y.one.batch(smooth(phi.Y.one, 2))
    p = LearningProblem(net, head, least_squares, tikhonov(0.01), Batch(phi.Y.batch(smooth(phi.Y, 2)), targets))
    report = verify(p)
    assert report.passed, str(report)


@on_ranks
def test_a_moved_network_has_channels_on_the_finer_mesh():
    net = network(basis("disk"))
    errors = []
    for refinement in (2, 4):
        fine = net.on(Channels(label_space("disk", "CG1", refinement), 2))
        reference = net.on(Channels(label_space("disk", "CG1", 5), 2))
        moments = [
            each.bases["phi"][0].project(each.Y.values(each(each.Y.batch(smooth(each.Y))))) for each in (fine, reference)
        ]
        errors.append(np.abs(moments[0] - moments[1]).max())
    assert errors[1] < errors[0] / 3 and errors[1] < 2e-2, errors


def test_gathered_states_do_not_depend_on_how_factors_are_learned():
    """Learned factors are no repeated bases: the stage takes the channels as one domain."""
    phi = basis("disk")
    nets = [network(each, learn_factors=True, learn_times=True) for each in (phi, dense(phi))]
    one, other = (gathered(net.Y, net.Y.values(net(net.Y.batch(smooth(net.Y))))) for net in nets)
    assert_allclose(one, other, atol=1e-11)
