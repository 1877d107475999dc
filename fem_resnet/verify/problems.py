"""The built-in problems: each is small, and together they take every path of compiled layers and stages.

Meshes are few and coarse, since kernels are compiled for each element and batch size. Nothing is one by accident: layers have
unequal lengths that do not add up to one, no domain has measure one, and bases are orthonormal only where they must be.
Parameters are smooth functions of the coordinates, so that no partition changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import firedrake as fd
import numpy as np
import sympy
from mpi4py import MPI

from fem_resnet.label_domain.basis import Basis, given_basis
from fem_resnet.label_domain.channels import Channels
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.laplace import laplace_basis
from fem_resnet.label_domain.points import point_space
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.learning.batch import Batch, Derivatives
from fem_resnet.learning.head import Head
from fem_resnet.learning.locality import locality
from fem_resnet.learning.loss import Loss, binary_cross_entropy, cross_entropy, least_squares
from fem_resnet.learning.pointwise_terms import smoothed_l1
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.learning.regulariser import Regulariser, smooth_in_space, smooth_in_time, tikhonov
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.network.settings import Bias, Kernel, Layers
from fem_resnet.parameters.equivariant import Parity, invariant_functions
from fem_resnet.parameters.kernel_sets import DampedAntisymmetric, NormBounded, PositiveSemidefinite
from fem_resnet.parameters.symmetric_kernels import Symmetric
from fem_resnet.verify.point import random_like

__all__ = ["BUILT_IN", "built_in", "filled"]

_TIMES = [0.0, 0.3, 0.7, 1.2]


def _disk(comm: MPI.Comm) -> LabelSpace:
    """A disk of 61 nodes, fewer than a node block of compiled stages; |Y| = 3.1."""
    return LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(2, comm=comm), "CG", 1))


def _line(comm: MPI.Comm) -> LabelSpace:
    """A line of 131 cells, which are two node blocks and three nodes; |Y| = 1.7."""
    return LabelSpace(fd.FunctionSpace(fd.IntervalMesh(131, 1.7, comm=comm), "DG", 0))


def _functions(Y: LabelSpace, rank: int, shift: float = 0.0) -> Basis:
    """As many functions as `rank`, not orthonormal, given by formulas that hold on any mesh."""
    x, *others = fd.SpatialCoordinate(Y.V.mesh())
    y = others[0] if others else 1.0
    start = [fd.Constant(1.0) + 0 * x, x + 0.5, 0.7 * y + x**2]
    return given_basis(Y, [*start, *(fd.cos((1.1 + 0.9 * k) * x + 0.8 * k * y + shift) for k in range(3, rank))][:rank])


def filled(parameters, Y: LabelSpace, seed: int, size: float = 0.5) -> None:
    """Give parameters random values of that size, which no partition changes."""
    rng = np.random.default_rng(seed)
    for parameter in parameters:
        for function, basis in zip(parameter.functions, parameter.space_bases):
            # The more coefficients, the smaller each is: so sigma does not end up in its tails.
            share = 1.0 if function.function_space().mesh() is Y.V.mesh() else max(basis.shape[-1] / 4, 1.0) ** -0.5
            function.dat.data_wo[...] += size * share * random_like(function, rng, Y).dat.data_ro


def _batch(Y: LabelSpace, samples: int, targets=None, seed: int = 2) -> Batch:
    rng = np.random.default_rng(seed)
    inputs = random_like(fd.Function(Y.batch_space(samples)), rng, Y)
    if targets is None:
        targets = random_like(fd.Function(Y.batch_space(samples)), rng, Y)
    return Batch(inputs, targets, (0.5 + np.arange(samples) % 3).tolist())


def _problem(
    net: ResidualNetwork, head: Head | None = None, loss: Loss = least_squares, regulariser: Regulariser | None = None,
    samples: int = 3, targets=None, seed: int = 1, derivatives: Derivatives | None = None, **options,
) -> LearningProblem:  # fmt: skip
    parameters = [net.bias, net.kernel.learned, *net.factors, *([] if head is None else head.parameters)]
    filled(parameters, net.Y, seed)
    batch = replace(_batch(net.Y, samples, targets), derivatives=derivatives)
    return LearningProblem(net, head, loss, regulariser or tikhonov(0.05), batch, **options)


def _classes(samples: int) -> list[int]:
    return [(2 * s + s // 4) % 3 for s in range(samples)]


def built_in(comm: MPI.Comm = MPI.COMM_WORLD) -> LearningProblem:
    """A disk, bases that are not orthonormal and of different ranks, controls linear in t, classes, all regularisers."""
    Y = _disk(comm)
    phi = laplace_basis(Y, 4)
    psi = _functions(Y, 3)
    net = ResidualNetwork(
        Kernel(phi, psi, in_time="layers"), bias=Bias(in_time="linear"), layers=Layers(_TIMES, per_block=2), activation="tanh"
    )
    regulariser = tikhonov(0.03) + smooth_in_space(0.01) + smooth_in_time(0.02)
    return _problem(net, Head(phi, 3), cross_entropy, regulariser, 4, [0, 2, 1, 2])


def _layers(comm: MPI.Comm) -> LearningProblem:
    """Compiled layers of one sample, with a field at their end, and sizes that are no whole number of tiles."""
    Y = _disk(comm)
    net = ResidualNetwork(
        Kernel(_functions(Y, 6), _functions(Y, 11, 0.4)), layers=Layers(_TIMES, steps=2), activation="arctan"
    )
    quadratic = tikhonov(0.05) + smooth_in_space(0.01, kernel=0.02) + smooth_in_time(0.02)
    convex = smoothed_l1(0.02, 0.5, kernel=0.03)
    return _problem(net, samples=1, regulariser=quadratic + convex, learn="both")


def _seen(comm: MPI.Comm) -> LearningProblem:
    """Compiled layers that step what a head sees, of 7 samples, by a method whose last slope is the next step's first.

    The network can be moved to another mesh: between the fifth mode and the sixth the eigenvalue changes.
    """
    Y = _disk(comm)
    psi = laplace_basis(Y, 5)
    net = ResidualNetwork(
        Kernel(psi, in_time=[0, 1, 0]),
        bias=psi,
        layers=Layers(_TIMES, steps=2, per_block=1),
        activation="sigmoid",
        solver_parameters={"ts_rk_type": "5dp"},
    )
    regulariser = tikhonov(0.05, mu=0.02) + locality(0.04)
    return _problem(net, Head(psi, 3, "logistic"), binary_cross_entropy, regulariser, 7, _classes(7))


def _many(comm: MPI.Comm) -> LearningProblem:
    """Compiled layers of many samples; psi changes from one layer to the next."""
    Y = _line(comm)
    phi, psi, other = _functions(Y, 5), _functions(Y, 6, 0.4), _functions(Y, 4, 1.3)
    net = ResidualNetwork(
        Kernel(phi, [psi, psi, other]),
        bias=[phi, None, phi],
        layers=Layers(_TIMES, steps=2),
        activation="softplus",
        solver_parameters={"ts_rk_type": "3bs"},
    )
    return _problem(net, samples=35, regulariser=tikhonov(0.05))


def _large(comm: MPI.Comm) -> LearningProblem:
    """More than 512 samples, so that fields are packed; phi = psi with more functions than a slab has."""
    Y = _line(comm)
    basis = laplace_basis(Y, 66)
    net = ResidualNetwork(basis, bias=_functions(Y, 3), layers=[0.0, 0.7])
    return _problem(net, samples=515, regulariser=tikhonov(0.01))


def _costs(comm: MPI.Comm) -> LearningProblem:
    """A running cost of many weighted samples."""
    Y = _line(comm)
    f, a = sympy.symbols("f a")
    net = ResidualNetwork(
        Kernel(_functions(Y, 3), _functions(Y, 4, 0.4)),
        bias=Bias(_functions(Y, 4), in_time="linear"),
        layers=Layers(_TIMES, per_block=2),
    )
    return _problem(net, samples=12, running=RunningCost(sympy.cos(f) * a + f**2 / 2, kernel=0.4))


def _adapted(comm: MPI.Comm) -> LearningProblem:
    """Adapted steps of a field; the kernel is linear in t."""
    Y = _disk(comm)
    options = {"ts_rk_type": "3bs", "ts_adapt_type": "basic", "ts_rtol": 1e-5, "ts_atol": 1e-5}
    net = ResidualNetwork(
        Kernel(_functions(Y, 3), _functions(Y, 4, 0.4), in_time="linear"), layers=_TIMES, solver_parameters=options
    )
    return _problem(net, samples=2)


def _implicit(comm: MPI.Comm) -> LearningProblem:
    """The method of Crank and Nicolson, with a bias and a kernel linear in t, and a head onto another label domain."""
    Y = _disk(comm)
    there = LabelSpace(fd.FunctionSpace(fd.IntervalMesh(12, 2.3, comm=comm), "CG", 1))
    net = ResidualNetwork(
        Kernel(_functions(Y, 3), _functions(Y, 4, 0.4), in_time="linear"),
        bias=Bias(in_time="linear"),
        layers=_TIMES,
        solver_parameters={"ts_type": "cn"},
    )
    head = Head(_functions(Y, 3, 0.2), _functions(there, 4), "logistic")
    targets = random_like(fd.Function(there.batch_space(2)), np.random.default_rng(8), there)
    targets.dat.data_wo[...] = 0.5 + 0.4 * np.tanh(targets.dat.data_ro)
    return _problem(net, head, samples=2, targets=targets, regulariser=tikhonov(0.05) + smooth_in_time(0.03))


def _carried(comm: MPI.Comm) -> LearningProblem:
    """A method whose weights are not known, so that f is stepped too, with a running cost."""
    Y = _line(comm)
    f, a = sympy.symbols("f a")
    net = ResidualNetwork(
        Kernel(_functions(Y, 3), in_time="linear"),
        bias=_functions(Y, 4),
        layers=_TIMES[:3],
        solver_parameters={"ts_type": "dirk"},
    )
    return _problem(net, samples=2, learn="both", running=RunningCost(f**2 / 2 + sympy.sin(f) * a, kernel=0.3))


def _learned(comm: MPI.Comm) -> LearningProblem:
    """Learned factors and times, with a running cost and few samples."""
    Y = _disk(comm)
    f, a = sympy.symbols("f a")
    net = ResidualNetwork(
        Kernel(_functions(Y, 3), _functions(Y, 4, 0.4), learn_factors=True), layers=Layers(_TIMES, learn_times=True)
    )
    return _problem(
        net,
        Head(_functions(Y, 3), 3, "identity"),
        samples=3,
        targets=_classes(3),
        running=RunningCost(sympy.sin(f) + a * f, kernel=0.2),
    )


def _lengths(comm: MPI.Comm) -> LearningProblem:
    """Learned times with many samples; elu, which has a joint; layers that share a bias."""
    Y = _line(comm)
    net = ResidualNetwork(
        Kernel(_functions(Y, 4), _functions(Y, 5, 0.4), in_time="shared"),
        bias=Bias(_functions(Y, 3), in_time=[0, 1, 1]),
        layers=Layers(_TIMES, steps=2, learn_times=True),
        activation="elu",
    )
    return _problem(net, samples=20, regulariser=tikhonov(0.05) + smooth_in_time(0.04))


def _stable(choice: PositiveSemidefinite | DampedAntisymmetric | NormBounded) -> Callable[[MPI.Comm], LearningProblem]:
    def make(comm: MPI.Comm) -> LearningProblem:
        Y = _disk(comm)
        phi = _functions(Y, 3)
        psi = None if choice.symmetric else _functions(Y, 4, 0.4)
        net = ResidualNetwork(Kernel(phi, psi, in_time="linear", among=choice), bias=phi, layers=_TIMES[:3])
        return _problem(net, samples=2, regulariser=tikhonov(0.05) + smooth_in_time(0.03))

    return make


def _flow(comm: MPI.Comm) -> LearningProblem:
    """A gradient flow."""
    Y = _disk(comm)
    net = ResidualNetwork(
        Kernel(_functions(Y, 3), _functions(Y, 4, 0.4)),
        bias=_functions(Y, 4),
        layers=_TIMES,
        gradient_flow=True,
        activation="softplus",
    )
    return _problem(net, samples=2)


def _energy(comm: MPI.Comm) -> LearningProblem:
    """The discrete gradient."""
    Y = _disk(comm)
    net = ResidualNetwork(
        Kernel(_functions(Y, 3), _functions(Y, 4, 0.4)),
        bias=Bias(in_time="linear"),
        layers=Layers(_TIMES[:3], steps=2, learn_times=True),
        solver_parameters={"ts_type": "discrete_gradient"},
    )
    return _problem(net, samples=2)


def _informed(comm: MPI.Comm) -> LearningProblem:
    """Derivatives of the target map, through a head."""
    Y = _disk(comm)
    net = ResidualNetwork(
        Kernel(_functions(Y, 3), _functions(Y, 4, 0.4)), bias=_functions(Y, 3), layers=Layers(_TIMES, per_block=2)
    )
    rng = np.random.default_rng(6)
    directions, targets = (random_like(fd.Function(Y.batch_space(2)), rng, Y) for _ in range(2))
    head = Head(_functions(Y, 3), _functions(Y, 4, 0.2), "identity")
    return _problem(net, head, samples=2, derivatives=Derivatives(directions, targets, 0.7))


def _single(comm: MPI.Comm) -> LearningProblem:
    """Compiled layers in single precision."""
    Y = _line(comm)
    net = ResidualNetwork(Kernel(_functions(Y, 4), _functions(Y, 5, 0.4)), layers=_TIMES[:3], precision="single")
    return _problem(net, samples=7)


def _graph(comm: MPI.Comm) -> LearningProblem:
    """The vertices of a graph, and a density on them that is observed up to a factor; f_I is learned too."""
    ring = np.roll(np.eye(12), 1, axis=0)
    Y = point_space(np.random.default_rng(3).uniform(0.5, 1.5, 12).tolist(), graph=ring + ring.T, comm=comm)
    phi = laplace_basis(Y, 4)
    net = ResidualNetwork(Kernel(phi, in_time="shared"), layers=_TIMES[:3], activation="leaky_relu")
    head = Head(phi, phi, "softmax")
    targets = Y.batch(np.random.default_rng(4).uniform(0.5, 1.5, (12, 3))[Y.numbers])
    regulariser = tikhonov(0.05) + smooth_in_space(0.02)
    return _problem(net, head, cross_entropy, samples=3, targets=targets, regulariser=regulariser, learn="both")


def _mirrored(comm: MPI.Comm) -> LearningProblem:
    """Two channels, on one of which a reflection acts with the sign -1: kernel, bias and head keep it."""
    Y = Channels(_disk(comm), 2)
    phi = laplace_basis(Y, 3)
    mirror = Parity(lambda x: x * np.array([1.0, -1.0]), (1, -1))
    net = ResidualNetwork(
        Kernel(phi, among=Symmetric(phi, mirror)),
        bias=[invariant_functions(phi, mirror), None],
        layers=Layers(_TIMES[:3], steps=2),
        activation="tanh",
    )
    head = Head(phi, phi.one, "identity", symmetries=[mirror])
    targets = random_like(fd.Function(Y.one.batch_space(9)), np.random.default_rng(8), Y.one)
    return _problem(net, head, samples=9, targets=targets)


#: Problems by name, as functions of a communicator. Those that find most faults come first.
BUILT_IN: Mapping[str, Callable[[MPI.Comm], LearningProblem]] = MappingProxyType(
    {
        "classes": built_in,
        "layers": _layers,
        "seen": _seen,
        "many": _many,
        "implicit": _implicit,
        "learned": _learned,
        "costs": _costs,
        "carried": _carried,
        "lengths": _lengths,
        "adapted": _adapted,
        "flow": _flow,
        "energy": _energy,
        "semidefinite": _stable(PositiveSemidefinite(2)),
        "antisymmetric": _stable(DampedAntisymmetric(0.1)),
        "bounded": _stable(NormBounded(0.8)),
        "informed": _informed,
        "mirrored": _mirrored,
        "graph": _graph,
        "single": _single,
        "large": _large,
    }
)
