"""A network as a function of arrays: it is the network, and its maps are derivatives of each other, wherever it is asked."""

import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import label_space, laplace, smooth
from kinds import KINDS, smooth_values

from fem_resnet import Channels, Head, ResidualNetwork, laplace_basis
from fem_resnet.external.network_function import NetworkFunction

HEADS = {
    "f(T)": lambda net: None,
    "scores": lambda net: Head(psi(net), 3),
    "a function": lambda net: Head(psi(net), psi(net), "identity"),
    "a function elsewhere": lambda net: Head(psi(net), laplace("interval", "CG1", 3), "identity"),
}


def psi(net):
    return net.bases["psi"][0]


def with_head(net, name):
    head = HEADS[name](net)
    if head is not None:
        rng = np.random.default_rng(7)
        head.W.set(0, 0.5 * rng.normal(size=head.W.space_basis.shape))
        head.mu.set(0, rng.normal(size=head.mu.space_basis.shape))
    return head


def point(function, samples=2):
    return [smooth(function.Y, samples), *function.take()]


def directions(function, seed=0, samples=2):
    parts = [slot for p in _parameters(function) for slot in p.space_bases]
    values = [smooth_values(slot, 30 + 10 * seed + k) for k, slot in enumerate(parts)]
    # Layers of lengths 0.2 to 0.7 do not turn over.
    sizes = [0.1 if name.startswith("layer_times") else 0.5 for name in function.names]
    return [smooth(function.Y, samples, seed=20 + seed), *(size * value for size, value in zip(sizes, values))]


def _parameters(function):
    return [*function.net.parameters, *([] if function.head is None else function.head.parameters)]


def pair(function, one, other):
    """<., .> of arrays of the inputs: plain sums over all numbers."""
    replicated = [False, *function.replicated]
    products = [np.sum(x * y) for x, y in zip(one, other)]
    own = sum(p for p, alike in zip(products, replicated) if not alike)
    return COMM_WORLD.allreduce(own) + sum(p for p, alike in zip(products, replicated) if alike)


def pair_outputs(function, one, other):
    product = np.sum(one * other)
    return product if function.output_is_replicated else COMM_WORLD.allreduce(product)


def functional(function, samples=2):
    rng = np.random.default_rng(3)
    if function.output_is_replicated:
        return rng.normal(size=(function.outputs, samples))
    Y = function.Y if function.head is None else function.head.Y
    return Y.weights[:, None] * smooth(Y, samples, seed=40)


CASES = [(kind, list(HEADS)[k % len(HEADS)]) for k, kind in enumerate(KINDS) if kind != "running cost"]
CASES += [("Runge-Kutta", head) for head in HEADS]


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("kind, head", list(dict.fromkeys(CASES)))
def test_the_four_maps_are_derivatives_of_each_other(kind, head):
    net, _ = KINDS[kind]()
    function = NetworkFunction(net, with_head(net, head))
    m, v, w, l = point(function), directions(function), directions(function, 1), functional(function)
    tangent, adjoint, curvature = function.tangent(m, v), function.adjoint(m, l), function.curvature(m, l, v)
    # Transposes and the symmetry of the Hessian hold up to round-off.
    scale = np.sqrt(pair(function, adjoint, adjoint) * pair(function, v, v))
    assert abs(pair_outputs(function, l, tangent) - pair(function, adjoint, v)) < 1e-12 * scale
    scale = np.sqrt(pair(function, curvature, curvature) * pair(function, w, w))
    assert abs(pair(function, curvature, w) - pair(function, function.curvature(m, l, w), v)) < 1e-10 * scale + 1e-12
    # Remainders fall as they should; each is asked at another point, between which the function forgets nothing.
    first, second, third = [], [], []
    value = function.value(m)
    for h in (0.02, 0.01):
        moved = [part + h * direction for part, direction in zip(m, v)]
        first.append(np.linalg.norm(function.value(moved) - value - h * tangent))
        difference = [a - b - h * c for a, b, c in zip(function.adjoint(moved, l), adjoint, curvature)]
        second.append(np.sqrt(pair(function, difference, difference)))
        third.append(np.abs(function.value(m) - value).max(initial=0))
    ranks = np.sqrt(COMM_WORLD.allreduce(np.square(first)))
    assert np.log2(ranks[0] / ranks[1]) > 1.9 and np.log2(second[0] / second[1]) > 1.9
    assert max(third) == 0


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("head", HEADS)
def test_it_is_the_network_for_any_number_of_samples_and_leaves_it_alone(head):
    net, _ = KINDS["Runge-Kutta"]()
    head = with_head(net, head)
    function, given = NetworkFunction(net, head), [p.get(k) for p in net.parameters for k in range(len(p.functions))]
    other = [0.5 * part for part in function.take()]
    for samples in (3, 1, 5, 2, 4, 3):
        x = smooth(net.Y, samples, seed=samples)
        f = net(net.Y.batch(x))
        expected = net.Y.values(f) if head is None else head.Y.values(head(f))
        if function.output_is_replicated:
            expected = head.scores(f).T
        np.testing.assert_allclose(function.value([x, *function.take()]), expected, rtol=1e-12, atol=1e-13)
        function.value([x, *other])
    assert all(map(np.array_equal, given, (p.get(k) for p in net.parameters for k in range(len(p.functions)))))
    function.give(other)
    assert all(map(np.array_equal, other, function.take()))


@pytest.mark.parallel([1, 2])
def test_it_has_channels_and_networks_without_layers():
    Y = Channels(label_space("disk", "CG1"), 2)
    phi = laplace_basis(Y, 3)
    for layers in (2, 0):
        net = ResidualNetwork(phi, bias=phi, layers=layers)
        net.start()
        head = Head(phi, 3)
        head.start()
        for function in (NetworkFunction(net), NetworkFunction(net, head)):
            m, v, l = point(function), directions(function), functional(function)
            adjoint, tangent = function.adjoint(m, l), function.tangent(m, v)
            assert abs(pair_outputs(function, l, tangent) - pair(function, adjoint, v)) < 1e-11


@pytest.mark.parallel([1, 2])
def test_what_is_not_finite_is_refused():
    net, _ = KINDS["Runge-Kutta"]()
    function = NetworkFunction(net)
    x, *coefficients = point(function)
    if COMM_WORLD.rank == 0:
        x[0, 1] = np.nan
    with pytest.raises(ValueError, match=r"^x: sample 1 has values that are not finite"):
        function.value([x, *coefficients])


@pytest.mark.parallel([2, 3])
def test_a_number_of_samples_that_one_rank_gives_otherwise_is_refused_on_all():
    function = NetworkFunction(KINDS["Runge-Kutta"]()[0])
    last = COMM_WORLD.rank == COMM_WORLD.size - 1
    with pytest.raises(ValueError, match=r"^arrays: all ranks must give the same"):
        function.value(point(function, 3 if last else 2))
    with pytest.raises(ValueError, match=r"^directions, f_I: expected numbers of shape"):
        function.tangent(point(function), directions(function, samples=3 if last else 2))
