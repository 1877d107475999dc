"""Symmetries that act on channels with signs: kernels, biases and heads that keep them, and what is solved for then."""

from dataclasses import replace
from functools import cache

import firedrake as fd
import numpy as np
import pytest
import scipy.spatial
from firedrake import COMM_SELF, COMM_WORLD
from helpers import TIMES, label_space, laplace
from kinds import directions_of, largest, rotation
from numpy.testing import assert_allclose, assert_array_equal

from fem_resnet import (
    Batch,
    Bias,
    Channels,
    Head,
    Kernel,
    LabelSpace,
    LaplaceFunctions,
    LearningProblem,
    Parity,
    ResidualNetwork,
    Symmetric,
    invariant_functions,
    laplace_basis,
    least_squares,
    load,
    point_space,
    save,
    tikhonov,
    train,
    verify,
)  # fmt: skip

on_ranks = pytest.mark.parallel([1, 2, 3])
ROUND_OFF = 1e-12


def reflected(x):
    return -x if x.shape[1] == 1 else x * [1.0, -1.0, *[1.0] * (x.shape[1] - 2)]


def inverted(x):
    return -x


def ring(comm):
    forth = np.roll(np.eye(12), 1, axis=0)
    return point_space(np.full(12, 0.5), graph=forth + forth.T, comm=comm)


#: Label domain, rank in each channel, signs, sign of the output, and the symmetries from the signs.
CASES = {
    "line": (
        lambda comm: LabelSpace(fd.FunctionSpace(fd.PeriodicIntervalMesh(24, 3.0, comm=comm), "CG", 1)), 9, (-1, -1, 1, 1), -1,
        lambda phi, parity: (fd.as_vector([fd.Constant(1.0)]), parity(lambda x: -x)),
    ),
    "annulus": (
        lambda comm: label_space("annulus", "DG0", alone=comm is COMM_SELF), 11, (1, -1, 1), -1,
        lambda phi, parity: (parity(reflected),),
    ),
    "sphere": (
        lambda comm: label_space("sphere", "CG1", alone=comm is COMM_SELF), 9, (-1, 1), 1,
        lambda phi, parity: (rotation(phi), parity(inverted)),
    ),
    "ring": (ring, 7, (-1, 1), -1, lambda phi, parity: ((np.arange(12) + 1) % 12, parity(-np.arange(12) % 12))),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES)


@cache
def given(case, alone=False):
    """The basis, the symmetries, and the map of the parity with its signs."""
    make, rank, signs, output, symmetries = CASES[case]
    Y = Channels(make(COMM_SELF if alone else COMM_WORLD), len(signs))
    phi = laplace_basis(Y, rank)
    return phi, symmetries(phi, lambda map_: Parity(map_, signs, output))


@cache
def among(case, alone=False):
    phi, symmetries = given(case, alone)
    return Symmetric(phi, *symmetries)


def network(case, *, alone=False, seed=0, **more):
    phi, symmetries = given(case, alone)
    bias = Bias(invariant_functions(phi, *symmetries))
    net = ResidualNetwork(
        Kernel(phi, among=among(case, alone)), **{"bias": bias, "layers": TIMES, "activation": "tanh"} | more
    )
    for k in range(net.layers):
        beta = np.random.default_rng([seed, k]).normal(size=(phi.rank, phi.rank))
        net.kernel.set(k, among(case, alone).projected(beta))
        kept = net.bias.space_bases[k].basis
        net.bias.set(k, kept.project(bumps(places(phi.Y.one), phi.Y.channels, 1))[:, 0])
    return net


def head_of(case, alone=False):
    phi, symmetries = given(case, alone)
    head = Head(phi, phi.one, "identity", symmetries=symmetries)
    head.start("random smooth", seed=2)
    if head.mu is not None:
        head.mu.set(0, head.mu.space_basis.of_whole(np.arange(1.0, phi.one.rank + 1)))
    return head


def bumps(x, channels, samples=3):
    rng = np.random.default_rng(4)
    return np.vstack(
        [np.cos(x @ rng.normal(scale=2.0, size=(x.shape[1], samples)) + rng.uniform(0, 6, samples)) for _ in range(channels)]
    )


def places(Y):
    return Y.coordinates if Y.graph is None else Y.numbers[:, None].astype(float)


def acted(Y, values, map_, signs):
    """(S f)_c(y) = s_c f_c(R y) at the owned nodes, where R takes nodes to nodes."""
    one, x = Y.one, places(Y.one)
    if one.graph is None:
        to = map_(x)
        if one.V.mesh().geometric_dimension == 1:
            to = to % 3.0
    else:
        to = map_[one.numbers][:, None].astype(float)
    every = np.concatenate(one.comm.allgather(np.array(x)))
    distance, number = scipy.spatial.cKDTree(every).query(to)
    assert largest(distance) < 1e-10
    parts = [np.concatenate(one.comm.allgather(np.array(part)))[number] for part in np.split(values, len(signs))]
    return np.vstack([sign * part for sign, part in zip(signs, parts)])


def parity_of(case):
    return next(each for each in given(case)[1] if isinstance(each, Parity))


# -- kernels, biases, heads ---------------------------------------------------------------------------------------------


@on_ranks
def test_on_a_circle_each_mode_has_a_real_matrix():
    """Multipliers are real under translations and the reflection; of constants only equal signs couple."""
    phi, symmetries = given("line")
    assert among("line").count == 4 * 16 + 8
    assert invariant_functions(phi, *symmetries).rank == 2  # constants of the even channels
    head = Head(phi, phi.one, "identity", symmetries=symmetries)
    assert head.W.space_basis.shape == (4 * 4 + 2,) and head.mu is None
    assert Symmetric(phi, symmetries[0]).count == 16 * 9
    even = Head(phi, phi.one, "identity", symmetries=(symmetries[0], replace(symmetries[1], output=1)))
    assert even.mu.space_basis.shape == (1,)


@on_ranks
@each_case
def test_kernels_obey_the_signs(case):
    """b_cd(R y, R z) = s_c s_d b_cd(y, z), at all pairs of nodes."""
    phi, _ = given(case)
    parity, Y = parity_of(case), phi.Y
    beta = among(case).projected(np.random.default_rng(0).normal(size=(phi.rank, phi.rank)))
    f = bumps(places(Y.one), Y.channels)
    map_, signs = parity.map, parity.signs

    def applied(values):
        return phi.expand(beta @ phi.project(values))

    assert_allclose(applied(acted(Y, f, map_, signs)), acted(Y, applied(f), map_, signs), atol=ROUND_OFF)
    free = np.random.default_rng(1).normal(size=beta.shape)
    broken = phi.expand(free @ phi.project(acted(Y, f, map_, signs))) - acted(
        Y, phi.expand(free @ phi.project(f)), map_, signs
    )
    assert largest(broken) > 0.1


@on_ranks
@each_case
def test_biases_obey_the_signs(case):
    phi, symmetries = given(case)
    parity, kept = parity_of(case), invariant_functions(phi, *symmetries)
    assert_allclose(kept.gram, np.eye(kept.rank), atol=ROUND_OFF)
    assert_allclose(acted(phi.Y, kept.values, parity.map, parity.signs), kept.values, atol=ROUND_OFF)


@pytest.mark.parallel([2, 3])
@each_case
def test_free_controls_are_the_same_on_each_number_of_ranks(case):
    """Of kernels, biases and heads: draws of starting values, and Adam, go by their bases and not by the spans of these."""
    drawn = []
    for alone in (False, True):
        phi, symmetries = given(case, alone)
        net, head = network(case, alone=alone), head_of(case, alone)
        net.start("random smooth", seed=3)
        kept = invariant_functions(phi, *symmetries)
        drawn.append([phi.project(kept.values), net.kernel.get(0), head.W.get(0)])
    for world, own in zip(*drawn):
        assert_allclose(world, own, atol=1e-10)


@on_ranks
@each_case
def test_turn_the_input_and_the_output_turns(case):
    """The output of a network with its head, whose functions are neither even nor odd."""
    net, head, parity = network(case), head_of(case), parity_of(case)
    Y = net.Y
    f = bumps(places(Y.one), Y.channels)
    turned = acted(Y, f, parity.map, parity.signs)
    states = [Y.values(net(Y.batch(each))).copy() for each in (turned, f)]
    assert_allclose(states[0], acted(Y, states[1], parity.map, parity.signs), atol=ROUND_OFF)
    outputs = [head.Y.values(head(Y.batch(each))).copy() for each in states]
    assert_allclose(outputs[0], acted(head.Y, outputs[1], parity.map, parity.output), atol=ROUND_OFF)
    assert largest(states[0] - states[1]) > 0.1 and largest(outputs[0] - outputs[1]) > 1e-2


def test_an_activation_that_is_not_odd_breaks_signs():
    """The sign of a channel goes through sigma only where sigma is odd."""
    parity = parity_of("ring")
    net = network("ring", activation="softplus")
    Y = net.Y
    f = bumps(places(Y.one), 2)
    states = [Y.values(net(Y.batch(each))).copy() for each in (acted(Y, f, parity.map, parity.signs), f)]
    assert largest(states[0] - acted(Y, states[1], parity.map, parity.signs)) > 0.1


@on_ranks
def test_functions_of_the_laplacian_have_a_matrix_an_eigenspace():
    phi = laplace_basis(Channels(label_space("sphere", "CG1"), 2), 9)
    kernels = LaplaceFunctions(phi)
    assert kernels.count == 3 * 4 and kernels.eigenvalues.size == 3
    k = np.random.default_rng(0).normal(size=(3, 2, 2))
    beta = kernels.kernel(k)
    degree = np.repeat(np.arange(3), [1, 3, 5])
    for c in range(2):
        for d in range(2):
            assert_allclose(beta[c * 9 : (c + 1) * 9, d * 9 : (d + 1) * 9], np.diag(k[degree, c, d]))
    assert_allclose(kernels.multipliers(beta), k, rtol=1e-13)
    between = kernels.multipliers(beta, [0.0, 0.5 * kernels.eigenvalues[1], 100.0])
    share = 0.5**0.5
    assert_allclose(between, [k[0], (1 - share) * k[0] + share * k[1], k[2]], rtol=1e-6)
    other = LaplaceFunctions(laplace_basis(Channels(label_space("disk", "CG1"), 2), 8), split=0.05)
    moved = kernels.multipliers(beta, other.eigenvalues)
    assert_allclose(other.multipliers(other.kernel(moved)), moved, rtol=1e-12)
    x = fd.SpatialCoordinate(phi.Y.V.mesh())
    both = Symmetric(phi, rotation(phi), fd.as_vector([0, -x[2], x[1]]))
    assert both.count == kernels.count
    assert_allclose(both.projected(beta), beta, atol=1e-10)


# -- derivatives, verify, ranks -------------------------------------------------------------------------------------------


def problem(case, alone=False):
    net, head = network(case, alone=alone), head_of(case, alone)
    Y = net.Y
    inputs = Y.batch(bumps(places(Y.one), Y.channels, 5))
    targets = Y.one.batch(np.cos(1 + bumps(places(Y.one), 1, 5)))
    return LearningProblem(net, head, least_squares, tikhonov(0.01), Batch(inputs, targets, np.arange(1.0, 6)))


@on_ranks
@each_case
def test_taylor_with_heads_that_keep_symmetries(case, taylor):
    p = problem(case)
    h = [v._ad_mul(0.3) for v in directions_of(p)]
    taylor(p.reduced_functional(), p.functions, h, case, "signs", second_order=True)


@pytest.mark.parametrize("case", ["line", "annulus", "ring"])
def test_verify_takes_heads_that_keep_symmetries(case):
    report = verify(problem(case))
    assert report.passed, str(report)


@on_ranks
@each_case
def test_an_eliminated_head_is_the_best_that_keeps_the_symmetries(case):
    """At the solution J has no derivative in W and mu, and is that of the least squares problem written out."""
    p = problem(case)
    J, _ = p.record(eliminate="head")
    value = float(J(p.net.parameters[0].functions + p.net.parameters[1].functions))
    J.give_head()
    whole = p.reduced_functional()
    assert_allclose(float(whole(p.functions)), value, rtol=1e-12)
    for parameter, d in zip(p.head.parameters, whole.derivative()[-len(p.head.parameters) :]):
        assert largest(parameter.space_basis.read(d)) < 1e-10
    # Written out: one column an unknown, one row a coefficient of the output and sample.
    phi, Y, out = p.net.bases["phi"][0], p.net.Y, p.head.onto
    g = phi.project(Y.values(p.net(p.batch.inputs)))
    C = out.project(out.Y.values(p.batch.targets))
    omega = np.arange(1.0, 6) / 15
    columns, sizes = [], [parameter.space_basis.shape[0] for parameter in p.head.parameters]
    for unit in np.eye(sum(sizes)):
        W, mu = p.head.whole(*np.split(unit, np.cumsum(sizes)[:-1]))
        columns.append((np.sqrt(omega) * (W @ g + mu[:, None])).ravel())
    A = np.vstack([np.array(columns).T, 0.1 * np.eye(sum(sizes))])
    expected = np.linalg.lstsq(A, np.concatenate([(np.sqrt(omega) * C).ravel(), np.zeros(sum(sizes))]))[0]
    found = np.concatenate([parameter.get(0) for parameter in p.head.parameters])
    assert_allclose(found, expected, atol=1e-9)
    assert 1 <= J.condition < 1e6 and J.undetermined == 0


def test_taylor_of_the_reduced_functional(taylor):
    p = problem("line")
    J, _ = p.record(eliminate="head")
    functions = [function for parameter in J.parameters for function in parameter.functions]
    h = [v._ad_mul(0.3) for v in directions_of(p)[: len(functions)]]
    taylor(J, functions, h, "line", "head eliminated")


@on_ranks
@each_case
def test_any_number_of_ranks_gives_the_same(case):
    """Signs of basis functions may differ: J, the output and the sizes of what is learned are compared."""
    found = []
    for alone in (False, True):
        p = problem(case, alone)
        J, _ = p.record(eliminate="head")
        J([function for parameter in J.parameters for function in parameter.functions])
        found.append([float(J.functional), J.condition, len(p.functions), among(case, alone).count])
    assert_allclose(*found, rtol=1e-7)


@on_ranks
def test_training_finds_the_teacher():
    net, head = network("line", seed=3), head_of("line")
    Y = net.Y
    inputs = Y.batch(bumps(places(Y.one), 4, 8))
    targets = head(net(inputs))
    learner = network("line", seed=4)
    p = LearningProblem(learner, head_of("line"), least_squares, None, Batch(inputs, targets))
    J, _ = p.record(eliminate="head")
    before = float(J.functional)
    result = train(p, {"tao_max_it": 40}, eliminate="head")
    assert result.value < 1e-2 * before


@on_ranks
@each_case
def test_a_file_keeps_network_and_head(case, tmp_path):
    """What they compute, and what is free of kernels, W and mu; its output lives on one channel of the network's own."""
    net, head = network(case), head_of(case)
    save(tmp_path / "net.h5", net, head)
    loaded, its_head = load(tmp_path / "net.h5")
    assert loaded.Y.channels == net.Y.channels and loaded.settings.kernel.among == net.settings.kernel.among
    assert its_head.Y is loaded.Y.one and its_head.onto is its_head.psi.one
    assert [p.dim for p in its_head.parameters] == [p.dim for p in head.parameters]
    moments = []
    for each, output in ((net, head), (loaded, its_head)):
        f = each.Y.batch(bumps(places(each.Y.one), each.Y.channels))
        weighted = output.Y.weights[:, None] * output.Y.values(each.Y.part(f)[0])
        moments.append(output.Y.sum(weighted.T @ output.Y.values(output(each(f)))))
    assert_allclose(*moments, atol=1e-11)
    rank = {"annulus": 3, "sphere": 4}.get(case, 5)
    fewer, its_fewer = head.in_first(rank), its_head.in_first(rank)
    assert_array_equal(fewer.W.get(0), its_fewer.W.get(0))
    assert fewer.W.dim < head.W.dim


# -- what is refused ----------------------------------------------------------------------------------------------------


@on_ranks
def test_what_does_not_fit_is_refused():
    phi, (field, parity) = given("line")
    one = laplace("disk", "CG1", 6)
    for make, message in (
        (lambda: Parity(reflected, (1, 0)), "^signs: expected 1 or -1"),
        (lambda: Parity(reflected, ()), "^signs: expected 1 or -1"),
        (lambda: Parity(reflected, (1, 1), output=2), "^output: expected"),
        (
            lambda: Symmetric(phi, Parity(reflected, (1, 1))),
            r"^symmetries\[0\].signs: expected 4, one a channel of phi, got 2",
        ),
        (lambda: Symmetric(phi, Parity(field, (1, 1, 1, 1))), r"^symmetries\[0\]: expected a map in a Parity, got a field"),
        (lambda: Head(phi, 3, symmetries=(field,)), "^symmetries: expected an output that they act on"),
        (lambda: Head(phi, phi.one, "identity", symmetries=field), "^symmetries: expected"),
        (lambda: Head(phi, one, "identity", symmetries=(field, parity)), "^symmetries"),
        (lambda: invariant_functions(one, Parity(lambda x: -x, (-1,)), rotation(one)), "^symmetries: expected some that"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make()


@on_ranks
@each_case
def test_a_local_start_reaches_each_channel(case):
    """Between channels of one sign it is the heat kernel, and from one sign to the other a local kernel as large."""
    phi, _ = given(case, False)
    one, C = phi.one, phi.Y.channels
    net = network(case)
    net.start("local", seed=3, gain=2.0)
    heat = np.exp(-4 * one.eigenvalues / one.eigenvalues[-1])
    xi = np.random.default_rng(3).normal(size=(C, C)) / np.sqrt(C)
    blocks = net.kernel.get(0).reshape(C, one.rank, C, one.rank).transpose(0, 2, 1, 3)
    signs = CASES[case][2]
    for c, d in np.ndindex(C, C):
        assert_allclose(np.linalg.norm(blocks[c, d]), 2 * abs(xi[c, d]) * np.linalg.norm(heat), rtol=2e-3)
        if signs[c] == signs[d]:
            assert_allclose(blocks[c, d], -2 * xi[c, d] * np.diag(heat), atol=2e-2)
    f = phi.Y.join([one.function(np.ones(one.rank)), *[None] * (C - 1)])
    reached = [np.sqrt(one.Y.sum(one.Y.weights @ one.Y.values(part) ** 2)) for part in phi.Y.part(net(f))]
    assert min(reached) > 0.02 * max(reached)
    alone = network(case, alone=True)
    alone.start("local", seed=3, gain=2.0)
    assert_allclose(net.kernel.get(1), alone.kernel.get(1), atol=1e-9)


@on_ranks
def test_a_local_start_between_signs_is_local():
    """On the circle b(y, z) beyond a quarter of its length, beside all of it; so is a heat kernel, and no random kernel."""
    phi, _ = given("line")
    x = places(phi.Y.one)[:, 0]
    x = np.concatenate(phi.Y.comm.allgather(x))
    values = np.concatenate(phi.Y.comm.allgather(phi.one.values.copy()))
    far = np.abs((x[:, None] - x + 1.5) % 3.0 - 1.5) > 0.75
    net, found = network("line"), {}
    for rule in ("local", "random smooth"):
        net.start(rule, seed=1)
        beta = net.kernel.get(0).reshape(4, 9, 4, 9)
        for c, d in ((0, 1), (0, 2)):
            b = values @ beta[c, :, d] @ values.T
            found[rule, c, d] = np.sum(b[far] ** 2) / np.sum(b**2)
    assert (
        max(found["local", 0, 1], found["local", 0, 2])
        < 0.02
        < 0.1
        < min(found["random smooth", 0, 1], found["random smooth", 0, 2])
    ), found
