"""Blocks of two matrices and a read-out are a network (2.1) with more neurons, if sigma(x) - sigma(-x) is linear."""

import numpy as np
import pytest
import sympy
from numpy.testing import assert_allclose

from fem_resnet import from_blocks, get_activation

on_ranks = pytest.mark.parallel([1, 2, 3])
S = sympy.Symbol("s")
SIGMA = {"relu": "relu", "leaky_relu": "leaky_relu", "swish": S / (1 + sympy.exp(-S))}


def blocks(rng, n=5, sizes=(7, 3, 4)):
    return [tuple(rng.normal(size=shape) for shape in ((m,), (m, n), (n, m), (n,))) for m in sizes]


@on_ranks
@pytest.mark.parametrize("name", SIGMA)
def test_blocks_of_two_matrices_and_a_read_out_are_a_network(name):
    rng = np.random.default_rng(5)
    given, z, W, mu = blocks(rng), rng.normal(size=(5, 6)), rng.normal(size=(3, 5)), rng.normal(size=3)
    net, initial, head = from_blocks(given, z, (W, mu), tau=0.3, activation=SIGMA[name], prediction="softmax")
    sigma, of_z = get_activation(SIGMA[name]), z
    for a, B, C, c in given:
        of_z = of_z + 0.3 * (C @ sigma(a[:, None] - B @ of_z) + c[:, None])
    scores = W @ of_z + mu[:, None]
    assert_allclose(head.scores(net(initial)), scores.T, rtol=0, atol=1e-13 * abs(scores).max())
    assert net.Y.size == 2 * 5 + 14 and net.layers == 6
    net, initial, head = from_blocks(given, z[:, 0], tau=0.3, activation=SIGMA[name])
    assert_allclose(head.scores(net(initial))[0], of_z[:, 0], rtol=0, atol=1e-13 * abs(of_z).max())


def test_what_is_no_such_network_is_refused_by_name():
    given, z = blocks(np.random.default_rng(1)), np.ones(5)
    for changed, message in (
        (
            {"activation": "tanh"},
            "^activation: expected one with sigma.* as relu.* got 'tanh'; .* from_network",
        ),
        ({"activation": "softplus"}, "^activation: expected one with"),
        ({"blocks": []}, "^blocks: expected one or more, got none"),
        ({"blocks": [given[0][:3]]}, "^blocks: expected .a, B, C, c. in each, got 3 arrays in block 0"),
        ({"blocks": [(given[0][0], given[0][1].T, *given[0][2:])]}, r"^blocks: expected B of shape \(7, 5\) in block 0"),
        ({"z_0": np.ones((5, 2, 2))}, "^z_0: expected shape"),
        ({"readout": (np.ones((2, 4)), np.ones(2))}, r"^readout: expected W of shape \(K, 5\) and mu"),
        ({"tau": 0.0}, "^tau: "),
    ):
        with pytest.raises(ValueError, match=message):
            from_blocks(**{"blocks": given, "z_0": z} | changed)
