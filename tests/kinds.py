"""Networks of every kind: methods of time stepping, learned factors, bases of each layer; and functions of them."""

import firedrake as fd
import numpy as np
import sympy
from firedrake import COMM_WORLD
from firedrake.adjoint import Control, ReducedFunctional
from helpers import (
    TIMES,
    flat_network,
    half_square_distance,
    label_space,
    laplace,
    network,
    set_smooth,
    smooth,
    smooth_direction,
)
from mpi4py import MPI
from problems import network as classifier
from problems import polynomials

from fem_resnet import (
    Batch,
    DampedAntisymmetric,
    Head,
    Kernel,
    LaplaceFunctions,
    Layers,
    LearningProblem,
    Observations,
    ResidualNetwork,
    RunningCost,
    Symmetric,
    cross_entropy,
    least_squares,
    tikhonov,
)  # fmt: skip
from fem_resnet.parameters.space_basis import NodalValues, StateValues
from fem_resnet.time_stepping.methods import METHODS

# -- methods of time stepping ------------------------------------------------------------------------------------------

#: (options, order): every type; order 0 where PETSc adapts order and steps by itself.
FORWARD = {
    "rk": ({}, 4),
    "beuler": ({}, 1),
    "cn": ({}, 2),
    "theta": ({}, 2),
    "theta 0.7": ({"ts_theta_theta": 0.7}, 1),
    "theta 0.7 endpoint": ({"ts_theta_theta": 0.7, "ts_theta_endpoint": None}, 1),
    "cn matfree": ({"mat_type": "matfree"}, 2),
    "arkimex": ({}, 3),
    "dirk": ({}, 2),
    "irk": ({"ts_irk_nstages": 2}, 4),
    "euler": ({}, 1),
    "ssp": ({}, 2),
    "rosw": ({}, 3),
    "bdf": ({}, 2),
    "alpha": ({}, 2),
    "glle": ({}, 0),
}
GRADIENT = {name: FORWARD[name][0] for name in FORWARD if METHODS[name.split()[0]].instead is None}


def options(name):
    return {"ts_type": name.split()[0]} | FORWARD[name][0]


def recorded(net, annotation):
    """J = 1/2 |f(T) - target|^2 as a function of all parameters and the input, and the run."""
    initial, target = net.Y.batch(smooth(net.Y)), net.Y.batch(smooth(net.Y, seed=7))
    with annotation():
        run = net.run(initial)
        J = half_square_distance(run.final, target, net.Y)
    controls = [*net.bias.controls(), *net.kernel.controls(), Control(initial, riesz_map=net.Y.riesz_map)]
    return ReducedFunctional(J, controls), run


def point(J):
    return [control.tape_value().copy(deepcopy=True) for control in J.controls]


def direction(net, rng):
    parts = [smooth_direction(net, rng, k, p) for p in (net.bias, net.kernel) for k in range(net.layers)]
    return [*parts, net.Y.batch(smooth(net.Y, seed=50))]


ADAPTIVE = {
    "rk": {"ts_rk_type": "3bs"},
    "cn": {"ts_rtol": 1e-3, "ts_atol": 1e-3},
    "arkimex": {},
    "dirk": {},
}


def adaptive(name, rtol=1e-5, **more):
    given = {"ts_type": name, "ts_adapt_type": "basic", "ts_rtol": rtol, "ts_atol": rtol}
    return network(solver_parameters=given | ADAPTIVE[name], steps=8, **more)


# -- learned factors and times -----------------------------------------------------------------------------------------


def smooth_values(basis, seed):
    """Coefficients of size one that no partition changes."""
    Y = basis.Y
    if isinstance(basis, NodalValues):
        return smooth(Y, 1, seed=seed)[:, 0]
    if isinstance(basis, StateValues):
        return smooth(Y, basis.shape[1], seed=seed)
    return np.random.default_rng(seed).normal(size=basis.shape)


def with_learned_factors(space=("disk", "CG1"), *, rank=4, size=0.3, **more):
    net = flat_network(
        laplace(*space, rank=rank), laplace(*space, rank=3), bias=laplace(*space, rank=3),
        **{"times": TIMES, "activation": "tanh", "learn_factors": True, "learn_times": True} | more,
    )  # fmt: skip
    set_smooth(net, np.random.default_rng(0))
    for k, parameter in enumerate(net.factors):
        parameter.set(0, size * smooth_values(parameter.space_basis, 20 + k))
    return net


def field_problem(net, regulariser=tikhonov(0.05)):
    batch = Batch(net.Y.batch(smooth(net.Y)), net.Y.batch(smooth(net.Y, seed=9)))
    return LearningProblem(net, None, least_squares, regulariser, batch)


def directions_of(problem, seed=0):
    result = []
    for parameter in problem.parameters:
        for k, basis in enumerate(parameter.space_bases):
            function = fd.Function(basis.space)
            # Layers of lengths 0.2 to 0.7 do not turn over.
            basis.write(function, (0.3 if parameter.name == "layer_times" else 1.0) * smooth_values(basis, 10 * seed + k))
            result.append(function)
    return result


# -- bases of each layer -----------------------------------------------------------------------------------------------


def with_layer_bases(space=("disk", "CG1"), bias="mixed", seed=0, **options):
    """Three layers: ranks of phi 6, 4, 6; of psi 4, 3, 3; bias at the nodes, in a basis, in another."""
    phi, psi, poly = laplace(*space, rank=6), laplace(*space, rank=4), polynomials(label_space(*space))
    biases = {"mixed": [None, psi, poly], "bases": [phi, psi, phi]}[bias]
    if bias == "bases":
        poly = phi
    net = flat_network([phi, psi, phi], [psi, poly, poly], bias=biases, times=TIMES, activation="tanh", **options)
    rng = np.random.default_rng(seed)
    for parameter in net.parameters:
        for k, basis in enumerate(parameter.space_bases):
            nodal = basis.space == net.Y.V
            values = smooth(net.Y, 1, seed=k)[:, 0] if nodal else rng.normal(size=basis.shape) / basis.shape[-1] ** 0.5
            parameter.set(k, values)
    return net


# -- solutions from two initial states --------------------------------------------------------------------------------


def states(net, samples=3, seed=0):
    return net.Y.values(net(net.Y.batch(smooth(net.Y, samples, seed=seed)))).copy()


def largest(values):
    return COMM_WORLD.allreduce(np.abs(values).max(initial=0), op=MPI.MAX)


def distances(net, one, two):
    """norm(f_1 - f_2)(t_l) in L2 of each pair of samples, at all layer times: shape (L + 1, samples)."""
    Y = net.Y
    runs = [net.run(Y.batch(values)) for values in (one, two)]
    differences = [Y.values(runs[0].state(l)) - Y.values(runs[1].state(l)) for l in range(net.layers + 1)]
    return np.array([np.sqrt(Y.sum(Y.weights @ difference**2)) for difference in differences])


def pairs(Y, samples=6):
    """Far from each other, and near."""
    one = 2 * smooth(Y, samples, seed=3)
    two = np.concatenate(
        [one[:, ::2] + 1e-3 * smooth(Y, samples, seed=4)[:, ::2], 3 * smooth(Y, samples, seed=5)[:, ::2]], axis=1
    )
    return one, two


def rotation(basis):
    """The Killing field that turns the first two coordinates."""
    x = fd.SpatialCoordinate(basis.Y.V.mesh())
    return fd.as_vector([-x[1], x[0], *[0] * (len(x) - 2)])


# -- one of each kind -------------------------------------------------------------------------------------------------

f, a = sympy.symbols("f a")
COST = RunningCost(f**2 * sympy.cos(a) / 2, kernel=0.1)


def with_kernel_set(among=lambda phi: DampedAntisymmetric(0.1)):
    phi = laplace("annulus", "CG1", 5)
    net = ResidualNetwork(Kernel(phi, among=among(phi)), layers=Layers(TIMES, per_block=2))
    rng = np.random.default_rng(5)
    for k, function in enumerate(net.kernel.learned.functions):
        net.kernel.learned.set(k, 0.5 * rng.normal(size=net.kernel.learned.space_bases[k].shape))
        net.bias.set(k, smooth(net.Y, 1, seed=k)[:, 0])
    return net


#: Networks whose states at inner times are looked at, and how each is run.
KINDS = {
    "Runge-Kutta": lambda: (classifier("disk", "CG1", layers_per_block=None), {}),
    "a Block a layer": lambda: (classifier("sphere", "CG1", layers_per_block=1), {}),
    "two layers a Block": lambda: (classifier("annulus", "CG1"), {}),
    "bases of each layer": lambda: (with_layer_bases(layers_per_block=None), {}),
    "hats in t, two steps": lambda: (classifier("disk", "CG1", bias_in_time="linear", kernel_in_time="linear", steps=2), {}),
    "shared": lambda: (classifier("disk", "CG1", bias_in_time="shared", kernel_in_time=[0, 1, 0], layers_per_block=None), {}),
    "Crank-Nicolson": lambda: (classifier("disk", "CG1", layers_per_block=None, solver_parameters={"ts_type": "cn"}), {}),
    "arkimex": lambda: (classifier("disk", "CG1", layers_per_block=None, solver_parameters={"ts_type": "arkimex"}), {}),
    "discrete gradient": lambda: (
        classifier("disk", "CG1", layers_per_block=None, solver_parameters={"ts_type": "discrete_gradient"}), {},
    ),
    "adapted steps": lambda: (adaptive("rk", 1e-3), {}),
    "gradient flow": lambda: (classifier("disk", "CG1", layers_per_block=None, gradient_flow=True), {}),
    "learned factors": lambda: (classifier("disk", "CG1", layers_per_block=None, learn_factors=True), {}),
    "learned times": lambda: (classifier("disk", "CG1", learn_times=True), {}),
    "kernel set": lambda: (with_kernel_set(), {}),
    "functions of the Laplacian": lambda: (with_kernel_set(LaplaceFunctions), {}),
    "symmetric kernel": lambda: (with_kernel_set(lambda phi: Symmetric(phi, rotation(phi))), {}),
    "running cost": lambda: (classifier("disk", "CG1", layers_per_block=None), {"running": COST, "weights": [1.0, 2.0, 0.5]}),
}  # fmt: skip


def observed_problem(net, psi=None, *, samples=4, head=True, learn="parameters", layers=(0, 1, 3), loss=None, **options):
    """Observations at t_0, t_1 and T in addition to the batch: classes seen through `psi`, or a field by least squares."""
    rng = np.random.default_rng(11)
    inputs = net.Y.batch(smooth(net.Y, samples))
    if head:
        head = Head(net.bases["psi"][0] if psi is None else psi, 3)
        head.W.set(0, 0.5 * rng.normal(size=head.W.space_basis.shape))
        head.mu.set(0, 0.5 * rng.normal(size=3))
        targets = [(np.arange(samples) + l) % 3 for l in range(4)]
    else:
        head, targets = None, [net.Y.batch(smooth(net.Y, samples, seed=70 + l)) for l in range(4)]
    seen = Observations(layers, [targets[l] for l in layers], [0.5 + l for l in layers])
    batch = Batch(inputs, targets[2], np.arange(1.0, samples + 1), observations=seen)
    loss = loss or (cross_entropy if head else least_squares)
    return LearningProblem(net, head, loss, tikhonov(0.05), batch, learn=learn, **options)
