"""Every TS type with every kind of control, loss and label space: R0, R1, R2. The default run samples it, -m slow has all."""

import itertools
import zlib

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_WORLD
from firedrake.adjoint import taylor_to_dict
from helpers import flat_network, laplace, set_smooth, smooth
from kinds import GRADIENT, options, smooth_values
from problems import head_onto

from fem_resnet import (
    Batch,
    LearningProblem,
    binary_cross_entropy,
    cross_entropy,
    functional_loss,
    least_squares,
    smooth_in_time,
    tikhonov,
)

#: Short enough for one step of backward Euler: a kernel that is not monotone gives Newton's method singular Jacobians.
TIMES = (0.0, 0.4, 1.0)
SPACES = [
    ("disk", "DG0"), ("disk", "CG1"), ("annulus", "CG2"), ("sphere", "CG1"), ("polygon", "KMV3"), ("block", "CG1"),
    ("hexes", "CG2"), ("prisms", "CG1"),
]  # fmt: skip
#: Keyword arguments of the network, and what is learned.
CONTROLS = {
    "bias at nodes": (dict(bias=None), "parameters"),
    "linear in t": (dict(bias_in_time="linear", kernel_in_time="linear"), "parameters"),
    "shared": (dict(bias_in_time="shared", kernel_in_time="shared"), "parameters"),
    "bases of layers": (dict(psi="each"), "parameters"),
    "factors": (dict(learn_factors=True), "parameters"),
    "times": (dict(learn_times=True), "parameters"),
    "initial": (dict(), "initial"),
    "everything": (dict(learn_factors=True, learn_times=True, kernel_in_time="linear"), "both"),
}
quartic = functional_loss(lambda p, C: (fd.cos(2 * p) + (p - C) ** 4) * fd.dx, "quartic")
#: Loss, and the prediction of a head onto three classes; None for f(T) itself.
LOSSES = {
    "least squares of f(T)": (least_squares, None),
    "cross entropy": (cross_entropy, "softmax"),
    "binary cross entropy": (binary_cross_entropy, "logistic"),
    "a functional in UFL": (quartic, "identity"),
}
ALL = list(itertools.product(GRADIENT, CONTROLS, LOSSES, SPACES))
#: The same sample on every rank, another one for each number of ranks.
SAMPLE = [
    ALL[k] for k in np.random.default_rng(COMM_WORLD.size).choice(len(ALL), {1: 60, 2: 24}.get(COMM_WORLD.size, 12), False)
]


def problem(method, controls, loss, space):
    keywords, learn = CONTROLS[controls]
    phi, small = laplace(*space, rank=3), laplace(*space, rank=2)
    keywords = {"bias": small} | keywords
    psi = [small, phi] if keywords.pop("psi", None) else small
    net = flat_network(
        phi, psi, times=TIMES, activation="tanh", solver_parameters=options(method), layers_per_block=1, **keywords
    )
    set_smooth(net, np.random.default_rng(0))
    for k, parameter in enumerate(net.factors):
        parameter.set(0, 0.3 * smooth_values(parameter.space_basis, 20 + k))
    loss, prediction = LOSSES[loss]
    inputs = net.Y.batch(smooth(net.Y, 3))
    if prediction is None:
        batch, head = Batch(inputs, net.Y.batch(smooth(net.Y, 3, seed=9)), [1, 2, 1]), None
    else:
        batch, head = Batch(inputs, [0, 2, 1], [1, 2, 1]), head_onto(space, None, prediction)
    regulariser = tikhonov(0.1) + smooth_in_time(0.1) if controls == "linear in t" else tikhonov(0.1)
    return LearningProblem(net, head, loss, regulariser, batch, learn=learn)


def directions(problem, seed):
    result = []
    for p, parameter in enumerate(problem.parameters):
        for k, basis in enumerate(parameter.space_bases):
            function = fd.Function(basis.space)
            size = 0.3 if parameter.name == "layer_times" else 1.0
            basis.write(function, size * smooth_values(basis, seed + 10 * p + k))
            result.append(function._ad_mul(0.3))
    return result


def rates_of(J, m, h, value) -> list[float]:
    """How fast R0, R1, R2 fall at the last step where they are no round-off; inf where they are."""
    found, rates = taylor_to_dict(J, m, h), []
    for order in range(3):
        residuals = np.array(found[f"R{order}"]["Residual"])
        falls = np.log2(residuals[:-1] / residuals[1:])[residuals[1:] > 2e-12 * max(value, 1.0)]
        rates.append(falls[-1] if falls.size else np.inf)
    return rates


def check(found, combination):
    p = problem(*combination)
    J = p.reduced_functional()
    value, seed = abs(J(p.functions)), zlib.crc32(repr(combination).encode()) % 1000
    # In one direction the next derivative may happen to be small, and change its sign along the way; a fault shows in all.
    rates = np.max([rates_of(J, p.functions, directions(p, seed + k), value) for k in (0, 500)], axis=0)
    # R1 has its third order in it, which may cancel part of the second: R2, without the second, is the sharp test.
    for order, (rate, bound) in enumerate(zip(rates, (0.95, 1.95, 2.95))):
        assert rate > bound, f"{combination}: R{order} falls at {rates}"
    row = found["rates"].setdefault("the matrix", {})
    row[combination[0]] = tuple(np.minimum(row.get(combination[0], np.inf), rates).tolist())


def named(combination):
    method, controls, loss, space = combination
    return f"{method}-{controls}-{loss}-{'-'.join(space)}"


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("combination", SAMPLE, ids=named)
def test_sample(combination, found):
    check(found, combination)


@pytest.mark.slow
@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("method", GRADIENT)
@pytest.mark.parametrize("controls", CONTROLS)
def test_all(method, controls, found):
    for combination in ALL:
        if combination[:2] == (method, controls):
            check(found, combination)
