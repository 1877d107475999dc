"""Learning problems that the tests share, and their comparison on different partitions of one mesh."""

import itertools
from contextlib import contextmanager
from functools import cache

import firedrake as fd
import numpy as np
from helpers import flat_network, laplace, set_smooth, smooth, smooth_direction
from mpi4py import MPI
from pyadjoint.enlisting import Enlist
from pyadjoint.tape import annotate_tape, continue_annotation, pause_annotation

from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.learning.batch import Batch
from fem_resnet.learning.head import Head
from fem_resnet.learning.loss import Loss, binary_cross_entropy, cross_entropy, least_squares
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.learning.regulariser import tikhonov
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.parameters.space_basis import NodalValues
from fem_resnet.time_stepping.stepper import StepFailure

CLASSES = 3
#: Layers of unequal lengths, which do not add up to one.
TIMES = (0.0, 0.2, 0.9, 1.3)
#: None is a cube, and |Y| is 3, 2.6 and 12 or so. On more ranks one is enough: what differs there is the partition.
ROUND_DOMAINS = {2: ("annulus",), 3: ("sphere",)}.get(MPI.COMM_WORLD.size, ("disk", "annulus", "sphere"))
#: How many Laplace eigenfunctions: no repeated eigenvalue is cut.
RANK = {"annulus": 5}

#: Where f lives, and where the output: on classes, on the same label domain, on another one.
OUTPUTS = {
    "disk to 3 classes": (("disk", "CG1"), None),
    "disk to disk": (("disk", "CG1"), ("disk", "CG1")),
    "disk to sphere": (("disk", "CG1"), ("sphere", "DG0")),
    "sphere to disk": (("sphere", "CG1"), ("disk", "CG1")),
}
LOSSES = {
    "least squares of O": (least_squares, "identity"),
    "least squares of a logistic prediction": (least_squares, "logistic"),
    "least squares of a softmax": (least_squares, "softmax"),
    "cross entropy": (cross_entropy, "softmax"),
    "binary cross entropy": (binary_cross_entropy, "logistic"),
}


@contextmanager
def taping():
    """Switch annotation on, and afterwards back to what it was."""
    was_on = annotate_tape()
    continue_annotation()
    try:
        yield
    finally:
        if not was_on:
            pause_annotation()


@cache
def polynomials(Y: LabelSpace) -> Basis:
    """A basis of 3 functions that are not orthogonal: its Gram matrix matters."""
    x, y = Y.coordinates[:, 0], Y.coordinates[:, 1]
    return Basis(Y, np.column_stack([1 + 0 * x, x + 0.5, 0.7 * y + x**2]), "given")


def network(domain, element, *, bias="nodes", alone=False, seed=0, size=1.0, **options) -> ResidualNetwork:
    """A network with kernel factors of different rank, parameters of that size, the same on every partition."""
    phi = laplace(domain, element, RANK.get(domain, 4), alone)
    options = {"times": TIMES, "layers_per_block": 2} | options
    net = flat_network(phi, polynomials(phi.Y), bias=phi if bias == "basis" else None, **options)
    set_smooth(net, np.random.default_rng(seed), size)
    return net


def autonomous_network(kernel: LowRankKernel, beta, bias=0.0, **options) -> ResidualNetwork:
    """A network with this kernel and bias at all times; `bias` is a number or values at the nodes."""
    net = flat_network(kernel.phi, kernel.psi, kernel_in_time="shared", bias_in_time="shared", **options)
    net.kernel.set(0, beta)
    net.bias.set(0, np.zeros(net.Y.nodes) + bias)
    return net


def learning_problem(
    net: ResidualNetwork, *, head=True, loss=None, weight: float | None = 0.05, samples=4, seed=0
) -> LearningProblem:
    """Classes by a head with cross entropy, or a field by least squares; both with Tikhonov's weight."""
    rng = np.random.default_rng(1000 + seed)
    inputs = net.Y.batch(smooth(net.Y, samples, seed=seed))
    if head:
        head = Head(net.kernel.space_basis.kernel.phi, CLASSES)
        # Small enough that the softmax is not flat: a gradient of size one.
        head.W.set(0, 0.3 * rng.normal(size=head.W.space_basis.shape))
        head.mu.set(0, 0.3 * rng.normal(size=CLASSES))
        targets = np.arange(samples) % CLASSES
    else:
        head, targets = None, net.Y.batch(smooth(net.Y, samples, seed=seed + 50))
    loss = loss or (cross_entropy if head else least_squares)
    regulariser = None if weight is None else tikhonov(weight)
    return LearningProblem(net, head, loss, regulariser, Batch(inputs, targets))


def failing_at(number: int, problem: LearningProblem) -> LearningProblem:
    """The same problem, whose loss raises a StepFailure at its evaluation of this number."""
    evaluations = itertools.count(1)

    def value(Y, O, C, prediction):
        if next(evaluations) == number:
            raise StepFailure(2, 1.3, "NOT_FINITE")
        return problem.loss.value(Y, O, C, prediction)

    loss = Loss(f"fails at its evaluation {number}", value, problem.loss.gradient, problem.loss.prediction)
    return LearningProblem(problem.net, problem.head, loss, problem.regulariser, problem.batch)


def directions(J, net: ResidualNetwork, parameters, seed=0) -> list:
    """A direction for a Taylor test of J in all coefficients of these parameters, the same on every partition.

    Half of it is random, half the gradient: a random one alone may happen to be orthogonal to the gradient, and no rate
    can then be seen.
    """
    rng = np.random.default_rng(2000 + seed)
    random = [smooth_direction(net, rng, 10 * seed + k, p) for p in parameters for k in range(len(p.functions))]
    return [towards(gradient, part) for gradient, part in zip(Enlist(J.derivative(apply_riesz=True)), random)]


def towards(gradient, random):
    """gradient / max gradient + random, the latter turned so that J rises along both, in place of `random`."""
    comm, g, r = random.function_space().mesh().comm, gradient.dat.data_ro, random.dat.data_ro
    largest = comm.allreduce(np.abs(g).max(initial=0.0), op=MPI.MAX)
    sign = 1 if comm.allreduce(np.sum(g * r)) >= 0 else -1
    random.dat.data_wo[...] = g / largest + sign * r
    return random


def gathered(Y: LabelSpace, values: np.ndarray) -> np.ndarray:
    """Values at the nodes of all ranks, shape (size, ..), ordered by the coordinates of the nodes. Collective."""
    x = np.concatenate(Y.comm.allgather(Y.coordinates))
    # Round-off in coordinates depends on how a cell's vertices are numbered; it must not decide an order.
    return np.concatenate(Y.comm.allgather(np.asarray(values)))[np.lexsort(np.round(x, 9).T)]


def coefficients(parameter, function) -> np.ndarray:
    """All coefficients that a Function of a parameter's space holds, in an order that no partition changes."""
    values = parameter.space_basis.read(function)
    nodal = isinstance(parameter.space_basis, NodalValues)
    return gathered(parameter.space_basis.Y, values) if nodal else values


def gradients(problem: LearningProblem, derivative) -> list[np.ndarray]:
    """The derivative of a reduced functional in all parameters, ordered as by `coefficients`."""
    owners = [parameter for parameter in problem.parameters for _ in parameter.functions]
    return [coefficients(parameter, function) for parameter, function in zip(owners, derivative)]


def head_onto(source, target, prediction="softmax", alone=False) -> Head:
    """From a label space onto 3 classes or another label space, with weights that no partition changes."""
    onto = 3 if target is None else laplace(*target, 4, alone)
    head = Head(laplace(*source, 4, alone), onto, prediction)
    rng = np.random.default_rng(3)
    head.W.set(0, 0.5 * rng.normal(size=head.W.space_basis.shape))
    head.mu.set(0, 0.5 * rng.normal(size=head.mu.space_basis.shape))
    return head


def observations(head: Head, prediction: str, samples: int) -> fd.Function:
    """Values in (0, 1), with integral one for the softmax."""
    x = head.Y.coordinates
    C = 0.5 + 0.4 * np.cos(x[:, :1] * np.arange(1, samples + 1) + x[:, -1:])
    if prediction == "softmax":
        C = C / head.Y.sum(head.Y.weights @ C)
    return head.Y.batch(C)


def squares():
    """A map from fields to fields."""
    phi = laplace("disk", "CG1", 6)
    net = ResidualNetwork(phi, bias=phi, layers=2)
    net.start("random smooth", gain=1.0)
    head = Head(phi, onto=phi, prediction="identity")
    inputs = phi.Y.batch(phi.values @ np.random.default_rng(3).normal(size=(6, 8)))
    return LearningProblem(net, head, least_squares, tikhonov(1e-4), Batch(inputs, phi.Y.batch(phi.Y.values(inputs) ** 2)))
