"""Networks without a fault: random ones of any kind, and with Laplace bases of many ranks on several meshes."""

import numpy as np
from firedrake import H1, dx, inner
from helpers import SPACES, label_space, laplace, smooth

from fem_resnet import (
    Basis,
    Batch,
    Bias,
    Head,
    Kernel,
    Layers,
    LearningProblem,
    ResidualNetwork,
    binary_cross_entropy,
    cross_entropy,
    functional_loss,
    least_squares,
    point_space,
    smooth_in_space,
    smooth_in_time,
    tikhonov,
)
from fem_resnet.label_domain.laplace import laplace_basis

METHODS = [
    {},
    {"ts_rk_type": "2a"},
    {"ts_rk_type": "3bs"},
    {"ts_rk_type": "5dp"},
    {"ts_rk_type": "1fe"},
    {"ts_type": "beuler"},
    {"ts_type": "cn"},
    {"ts_type": "cn", "mat_type": "matfree"},
    {"ts_type": "theta"},
    {"ts_type": "theta", "ts_theta_theta": 0.7},
    {"ts_type": "theta", "ts_theta_theta": 0.7, "ts_theta_endpoint": None},
    {"ts_type": "arkimex"},
    {"ts_type": "arkimex", "ts_arkimex_type": "2e"},
    {"ts_type": "dirk"},
    {"ts_type": "rk", "ts_rk_type": "3bs", "ts_adapt_type": "basic", "ts_rtol": 1e-4, "ts_atol": 1e-4},
    {"ts_type": "arkimex", "ts_adapt_type": "basic", "ts_rtol": 1e-3, "ts_atol": 1e-3},
    {"ts_type": "irk", "ts_irk_nstages": 2},
    {"ts_type": "euler"},
    {"ts_type": "ssp"},
    {"ts_type": "rosw"},
    {"ts_type": "bdf"},
    {"ts_type": "alpha"},
    {"ts_type": "glle"},
]
ACTIVATIONS = ["tanh", "arctan", "sigmoid", "softplus", "relu", "leaky_relu", "elu", "identity"]


def _pick(rng, options):
    return options[rng.integers(len(options))]


def _space(rng):
    """A label space with four Laplace eigenfunctions, or a graph."""
    if rng.random() < 0.1:
        ring = np.roll(np.eye(12), 1, axis=0)
        Y = point_space(rng.uniform(0.5, 1.5, 12), graph=ring + ring.T)
        return Y, laplace_basis(Y, 4)
    space = _pick(rng, SPACES)
    return label_space(*space), laplace(*space, rank=4)


def _head(rng, Y, phi):
    """Head, loss, and a function that makes targets for a number of samples."""
    kind = _pick(rng, ["none", "none", "classes", "classes", "least squares of classes", "field", "logistic field"])
    if kind == "none":
        loss = least_squares
        if rng.random() < 0.2 and Y.graph is None:
            loss = functional_loss(lambda p, C: (inner(p - C, p - C) / 2 + (p - C) ** 4) * dx)
        return None, loss, lambda S: Y.batch(smooth(Y, S, seed=int(rng.integers(99))))
    if kind == "classes":
        head = Head(phi, 3, _pick(rng, ["softmax", "logistic"]))
        loss = cross_entropy if head.prediction.name == "softmax" else binary_cross_entropy
        return head, loss, lambda S: rng.integers(0, 3, S)
    if kind == "least squares of classes":
        return Head(phi, 3, _pick(rng, ["identity", "softmax", "logistic"])), least_squares, lambda S: rng.integers(0, 3, S)
    logistic = kind == "logistic field"
    head = Head(phi, phi, "logistic" if logistic else "identity")
    loss = _pick(rng, [least_squares, binary_cross_entropy]) if logistic else least_squares
    return head, loss, lambda S: Y.batch(0.5 + 0.4 * smooth(Y, S, seed=int(rng.integers(99))))


def sound_problem(seed: int) -> LearningProblem:
    """A random learning problem, the same for one seed."""
    rng = np.random.default_rng([77, seed])
    Y, modes = _space(rng)
    mixed = Basis(Y, modes.values @ (np.eye(4) + 0.3 * rng.normal(size=(4, 4)))[:, : rng.integers(2, 5)], "given")
    phi, psi = _pick(rng, [(modes, modes), (modes, mixed), (mixed, modes), (mixed, mixed)])
    layers = int(rng.integers(1, 4))
    times = np.concatenate([[0.0], np.cumsum(rng.uniform(0.1, 0.7, layers))])
    in_time = ["layers", "linear", "shared", [0, *([1] * (layers - 1))]]
    method = _pick(rng, METHODS)
    with_adjoint = method.get("ts_type") not in ("irk", "euler", "ssp", "rosw", "bdf", "alpha", "glle")
    net = ResidualNetwork(
        Kernel(phi, psi, in_time=_pick(rng, in_time), learn_factors=bool(with_adjoint and rng.random() < 0.15)),
        bias=Bias(_pick(rng, [None, modes, mixed]), in_time=_pick(rng, in_time)),
        layers=Layers(
            times,
            steps=int(rng.integers(1, 4)),
            per_block=_pick(rng, [None, 1, 2]),
            learn_times=bool(with_adjoint and rng.random() < 0.15),
        ),
        activation=_pick(rng, ACTIVATIONS),
        solver_parameters=method,
    )
    head, loss, targets = _head(rng, Y, modes)
    size = rng.uniform(0.2, 1.2)
    for parameter in [net.bias, net.kernel, *([] if head is None else head.parameters)]:
        for k, basis in enumerate(parameter.space_bases):
            nodal = len(basis.shape) == 1 and basis.shape == (Y.nodes,) and basis.space == Y.V
            values = smooth(Y, 1, seed=k)[:, 0] if nodal else rng.normal(size=basis.shape) / basis.shape[-1] ** 0.5
            parameter.set(k, size * values)
    samples = int(rng.integers(1, 5))
    terms = [None, tikhonov(0.02), tikhonov(0.02) + smooth_in_time(0.01)]
    smooth_fits = (Y.V.ufl_element() in H1 or Y.graph is not None) and not net.factors
    if smooth_fits:
        terms += [smooth_in_space(0.01), tikhonov(0.02) + smooth_in_space(0.01) + smooth_in_time(0.03)]
    learn = _pick(rng, ["parameters", "parameters", "initial", "both"])
    inputs = Y.batch(size * smooth(Y, samples, seed=int(rng.integers(99))))
    weights = _pick(rng, [None, rng.uniform(0.5, 2, samples)])
    return LearningProblem(net, head, loss, _pick(rng, terms), Batch(inputs, targets(samples), weights), learn=learn)


#: Meshes with simple eigenvalues, with pairs that the mesh splits or leaves, a closed surface; of 162 to 289 nodes.
LAPLACE_MESHES = {
    "disk": ("disk", "CG1", 3),
    "annulus": ("annulus", "CG1", 2),
    "sphere": ("sphere", "CG1", 2),
    "square": ("square", "CG1", 4),
}
LAPLACE_RANKS = range(4, 81, 4)


def laplace_problem(mesh: str, rank: int) -> LearningProblem:
    """Layers and a head in the first `rank` Laplace modes."""
    rng = np.random.default_rng([78, rank, len(mesh)])
    Y = label_space(*LAPLACE_MESHES[mesh])
    modes = laplace_basis(Y, rank)
    net = ResidualNetwork(
        Kernel(modes, in_time=_pick(rng, ["layers", "linear", "shared"])),
        bias=modes,
        layers=[0.0, 0.3, 0.8][: 3 - rank // 48],
        activation=_pick(rng, ACTIVATIONS),
        solver_parameters=_pick(rng, [{}, {"ts_rk_type": "3bs"}, {"ts_rk_type": "5dp"}]),
    )
    head = _pick(rng, [None, Head(modes, 3)])
    for parameter in [net.bias, net.kernel, *([] if head is None else head.parameters)]:
        for k, basis in enumerate(parameter.space_bases):
            parameter.set(k, rng.normal(size=basis.shape) / rank**0.5)
    samples = int(rng.integers(1, 12))
    targets = Y.batch(smooth(Y, samples, seed=3)) if head is None else rng.integers(0, 3, samples)
    batch = Batch(Y.batch(smooth(Y, samples, seed=2)), targets)
    regulariser = _pick(rng, [tikhonov(0.02), tikhonov(0.02) + smooth_in_space(0.001)])
    return LearningProblem(net, head, least_squares if head is None else cross_entropy, regulariser, batch)
