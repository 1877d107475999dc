"""The doors of label domains, parameters, networks, problems and training; see `doors.py`."""

from __future__ import annotations

import tempfile
from functools import cache, partial, wraps
from pathlib import Path

import firedrake as fd
import numpy as np
import sympy
from doors import Door
from firedrake import COMM_WORLD
from helpers import MESHES, label_space, laplace, smooth, with_channels
from problems import learning_problem, network, polynomials
from pyadjoint import Tape

from fem_resnet import (
    SGD,
    Activation,
    Adam,
    Basis,
    Batch,
    Bias,
    Box,
    Channels,
    DampedAntisymmetric,
    Derivatives,
    DomainRecipe,
    Head,
    Kernel,
    LabelFieldClassifier,
    LabelFieldRegressor,
    LabelSpace,
    LaplaceFunctions,
    Layers,
    LearningProblem,
    Lift,
    Loss,
    LowRankKernel,
    NormBounded,
    Observations,
    Parameter,
    Parity,
    Part,
    PositiveSemidefinite,
    Properties,
    ProximalStep,
    Regulariser,
    RepeatedBasis,
    ResidualNetwork,
    RowBox,
    Run,
    RunningCost,
    Sensors,
    Symmetric,
    TrainingCheckpoint,
    binary_cross_entropy,
    cell_indicators,
    choose_lambda,
    class_space,
    cross_entropy,
    enable_checkpointing,
    export,
    functional_loss,
    get_activation,
    given_basis,
    huber,
    invariant_functions,
    laplace_basis,
    least_squares,
    load,
    load_lift,
    locality,
    msa,
    network_operator,
    open_loop_value,
    point_space,
    read_mesh,
    save,
    smooth_in_space,
    smooth_in_time,
    smoothed_l1,
    solve_maximum_principle,
    tikhonov,
    total_variation,
    train,
    train_by_ranks,
    train_levenberg_marquardt,
    train_pam,
    train_stochastic,
    ufl_functional,
)  # fmt: skip
from fem_resnet.label_domain.sources import label_domain
from fem_resnet.learning.prediction import PREDICTIONS
from fem_resnet.learning.regulariser import _mass

S = sympy.Symbol("s")
F, A = sympy.symbols("f a")
FLAG = {"a bool"}
NUMBER = {"a negative number", "zero", "a fraction", "a huge integer"}
POSITIVE = {"a fraction", "a huge integer"}
NOT_NEGATIVE = POSITIVE | {"zero"}
TEXT = {"a string"}
OPTIONS = {"None", "an empty dict"}
PATH = {"a string", "an empty string", "a path"}
PREFIX = {"None", "an empty string"}
#: Types that NumPy casts safely to doubles.
SAFE = {
    "a bool", "NaN", "infinity", "a negative number", "zero", "a fraction", "an empty list", "an array of NaN",
    "an array of another shape",
}  # fmt: skip


# -- what the doors are called with ------------------------------------------------------------------------------------


def disk() -> LabelSpace:
    return label_space("disk", "CG1")


def cells() -> LabelSpace:
    return label_space("disk", "DG0")


def phi() -> Basis:
    return laplace("disk", "CG1", 4)


@cache
def everything() -> Part:
    """All cells of a mesh, as a part."""
    return Part(label_space("polygon", "CG1"), "Y")


def channels() -> Basis:
    return with_channels("disk", "CG1", 3)


def places() -> np.ndarray:
    """Points on the disk."""
    return np.array([[0.0, 0.0], [0.5, 0.1], [-0.3, 0.4], [0.2, -0.6], [-0.5, -0.5], [0.6, 0.6]])


@cache
def sensors() -> Sensors:
    return Sensors(phi(), places())


#: Where curves are measured.
MOMENTS = np.linspace(0, 1, 8, endpoint=False)
CIRCLE = DomainRecipe(fd.PeriodicIntervalMesh, 12, 1.0)


def estimated(estimator, **parameters):
    """An estimator that has these parameters, fitted to curves on a circle: their numbers of waves, or their squares."""
    waves = np.arange(24) % 2 + 1
    X = np.cos(2 * np.pi * waves[:, None] * (MOMENTS + np.arange(24)[:, None] / 24))
    return estimator(**parameters).fit(X, waves if estimator is LabelFieldClassifier else X**2)


def of_estimator() -> dict:
    return {
        "domain": CIRCLE,
        "points": MOMENTS,
        "extent": np.array([0.0, 1.0, 0.0, 1.0]),
        "rank": 3,
        "channels": 1,
        "layers": 1,
        "activation": "tanh",
        "tikhonov": 0.1,
        "max_iter": 1,
        "early_stopping": False,
        "validation_fraction": 0.2,
        "n_iter_no_change": 2,
        "learning_rate": 0.01,
        "random_state": 0,
    }


TAKEN_BY_ESTIMATORS = {
    "domain": {"None"},
    "points": set(),
    "extent": {"None"},
    "rank": {"None"},
    "tikhonov": {"None"} | POSITIVE,
    "max_iter": {"zero"},
    "early_stopping": FLAG,
    "learning_rate": POSITIVE,
    "random_state": {"None", "zero", "a bool"},
}


@cache
def functions() -> LaplaceFunctions:
    return LaplaceFunctions(phi())


def reflected(x):
    return x * [1.0, -1.0]


def rotated(x):
    return -x


@cache
def kernel() -> LowRankKernel:
    return LowRankKernel(phi(), phi())


@cache
def fitted() -> LearningProblem:
    """Fields of a head, with a bias in a basis."""
    net = network("disk", "CG1", bias="basis")
    psi = net.bases["psi"][0]
    batch = Batch(net.Y.batch(smooth(net.Y)), net.Y.batch(smooth(net.Y, seed=9)))
    return LearningProblem(net, Head(psi, net.bases["phi"][0], "identity"), least_squares, None, batch)


@cache
def classes() -> LearningProblem:
    """Three classes."""
    return learning_problem(network("disk", "CG1"))


@cache
def fields() -> LearningProblem:
    """Fields, without a head."""
    return learning_problem(network("disk", "CG1"), head=False)


def net() -> ResidualNetwork:
    return classes().net


@cache
def points() -> fd.FunctionSpace:
    """The space of a set of four points, and the numbers of the points on this rank."""
    Y = point_space(np.ones(4))
    return Y.V, Y.numbers


@cache
def run() -> Run:
    problem = fields()
    J, run = problem.record()
    J.derivative()
    return run


@cache
def shared() -> Path:
    """A folder that all ranks see."""
    return Path(COMM_WORLD.bcast(tempfile.mkdtemp() if COMM_WORLD.rank == 0 else None))


@cache
def saved() -> Path:
    path = shared() / "net.h5"
    save(path, net(), classes().head, lifted())
    return path


@cache
def lifted() -> Lift:
    return Lift(net().Y)


def beta(shape=(4, 4)) -> np.ndarray:
    return np.arange(1.0, 1.0 + np.prod(shape)).reshape(shape)


def one() -> fd.Function:
    return fields().batch.inputs


def value(Y, O, C, h):
    return Y.weights @ (O - C)


def gradient(Y, O, C, h):
    return Y.weights[:, None] * np.ones_like(O)


def difference(p, C):
    return (p - C) ** 2 * fd.dx


def double_well(a):
    return (a**2 - 1) ** 2 * fd.dx


def coefficients_of_bias() -> list[np.ndarray]:
    bias = classes().net.bias
    return [bias.get(k) for k in range(len(bias.functions))]


def ring() -> np.ndarray:
    a = np.roll(np.eye(4), 1, axis=0)
    return a + a.T


def stop(progress):
    return True


def started(problem):
    """Training that stops at the start."""
    return train(problem, monitor=stop)


@cache
def free() -> LearningProblem:
    """Three classes, without a regulariser."""
    return classes().replace(regulariser=None)


@cache
def one_sample() -> LearningProblem:
    """The same with one sample."""
    batch = free().batch
    return free().replace(batch=Batch(net().Y.batch(net().Y.values(batch.inputs)[:, :1]), batch.targets[:1]))


@cache
def laplace_net() -> ResidualNetwork:
    return ResidualNetwork(phi(), bias=phi(), layers=1)


@cache
def moved_net() -> ResidualNetwork:
    """A network of its own, whose coefficients change."""
    return ResidualNetwork(phi(), layers=1)


@cache
def moved_head() -> Head:
    """A head of its own, whose coefficients change."""
    return Head(phi(), 3)


def in_a_network(kind: type, argument: str):
    """What makes a network with a Kernel, a Bias or Layers: their parts are checked there."""

    @wraps(kind)
    def network_of(**given):
        return ResidualNetwork(**{"kernel": phi(), "bias": phi(), "layers": 2} | {argument: kind(**given)})

    return network_of


DOORS = {
    # -- activations, without a communicator --
    "get_activation": Door(
        get_activation,
        lambda: {"spec": "elu", "alpha": 0.5},
        takes={"alpha": POSITIVE},
        parted=("spec", "alpha"),
        called={"spec": "activation"},
    ),
    "Activation.from_sympy": Door(
        Activation.from_sympy,
        lambda: {"expression": sympy.tanh(S), "properties": None},
        takes={"properties": {"None"}},
        parted=("expression", "properties"),
    ),
    # -- label domains --
    "LabelSpace": Door(
        LabelSpace,
        lambda: {"V": points()[0], "numbers": points()[1], "graph": ring()},
        takes={"graph": {"None"}},
        parted=("V", "numbers"),
        another={"graph": None},
    ),
    "LabelSpace.batch": Door(
        LabelSpace.batch,
        lambda: {"self": disk(), "values": smooth(disk()), "name": "pictures"},
        takes={"name": {"a string"}},
        parted=("values",),
        another={"name": "faces"},
        called={"values": "pictures"},
    ),
    "LabelSpace.function": Door(
        LabelSpace.function,
        lambda: {"self": disk(), "batch": one(), "sample": 1},
        takes={"sample": {"zero"}},
        parted=("batch",),
        another={"sample": 0},
    ),
    "LabelSpace.image": Door(
        lambda self, pixels, extent, method, outside, places: self.image(
            pixels, extent=extent, method=method, outside=outside, places=places
        ),
        lambda: {
            "self": disk(),
            "pixels": np.arange(12.0).reshape(3, 4),
            "extent": (-1.0, 1.0, -1.0, 1.0),
            "method": "mean",
            "outside": 0.0,
            "places": disk().coordinates[None],
        },
        takes={"outside": NUMBER | {"None"}, "places": {"None"}},
        parted=("places",),
        another={"method": "linear", "outside": 1.0},
    ),
    "LabelSpace.pixels": Door(
        lambda self, batch, shape, extent: self.pixels(batch, shape, extent=extent),
        lambda: {"self": disk(), "batch": one(), "shape": (3, 4), "extent": (-0.5, 0.5, -0.5, 0.5)},
        parted=("batch",),
        another={"shape": (4, 3)},
    ),
    "LabelSpace.batch_space": Door(LabelSpace.batch_space, lambda: {"self": disk(), "samples": 3}),
    "LabelSpace.inner": Door(LabelSpace.inner, lambda: {"self": disk(), "f": one(), "g": one()}, parted=("f", "g")),
    "LabelSpace.norm": Door(LabelSpace.norm, lambda: {"self": disk(), "f": one()}, parted=("f",)),
    "LabelSpace.riesz_map": Door(
        LabelSpace.riesz_map, lambda: {"self": disk(), "functional": fd.Cofunction(disk().V.dual())}, parted=("functional",)
    ),
    "class_space": Door(class_space, lambda: {"classes": 4, "comm": COMM_WORLD}, parted=("comm",)),
    "read_mesh": Door(
        read_mesh,
        lambda: {"path": MESHES / "polygon.msh", "comm": COMM_WORLD},
        takes={"path": PATH},
        parted=("comm",),
        another={"path": MESHES / "block.msh"},
    ),
    "label_domain": Door(
        label_domain,
        lambda: {
            "source": np.array([[True, False], [True, True]]),
            "family": "CG",
            "degree": 1,
            "extent": (0.0, 1.0, 0.0, 1.0),
            "reach": None,
            "comm": COMM_WORLD,
        },
        takes={"extent": {"None"}, "reach": {"None"}},
        parted=("comm",),
        another={
            "source": np.ones((2, 2), dtype=bool),
            "family": "DG",
            "degree": 2,
            "extent": (0.0, 1.0, 0.0, 2.0),
            "reach": 1.0,
        },
        called={"family": "(family|V)", "degree": "(degree|family|V)", "source": "(source|extent)"},
    ),
    "Part": Door(
        Part,
        lambda: {"Y": label_space("polygon", "CG1"), "which": "Y"},
        parted=("Y",),
        another={"which": 1},
    ),
    "Part.extend": Door(
        Part.extend,
        lambda: {"self": everything(), "function": everything().space.batch(smooth(everything().space))},
        parted=("function",),
    ),
    "Part.restrict": Door(
        Part.restrict,
        lambda: {"self": everything(), "function": everything().Y.batch(smooth(everything().Y))},
        parted=("function",),
    ),
    "point_space": Door(
        point_space,
        lambda: {"weights": np.arange(1.0, 5.0), "points": None, "graph": None, "comm": COMM_WORLD},
        takes={"points": {"None"}, "graph": {"None"}},
        parted=("comm",),
        another={"points": np.ones((4, 2)), "graph": ring()},
    ),
    "Basis": Door(
        Basis,
        lambda: {
            "Y": disk(),
            "values": phi().values,
            "kind": "given",
            "eigenvalues": np.ones(4),
            "move": None,
            "stiffness": None,
        },
        takes={"kind": TEXT, "eigenvalues": {"None"}, "move": {"None", "a function"}, "stiffness": {"None"}},
        parted=("Y", "values"),
        another={"kind": "cells", "move": lambda basis, Y: basis, "stiffness": np.eye(4)},
    ),
    "Basis.on": Door(Basis.on, lambda: {"self": phi(), "Y": disk()}, parted=("Y",)),
    "Basis.first": Door(Basis.first, lambda: {"self": phi(), "rank": 3}, takes={"rank": {"a huge integer"}}),
    "Basis.function": Door(Basis.function, lambda: {"self": phi(), "coefficients": np.ones(4)}),
    "given_basis": Door(given_basis, lambda: {"Y": disk(), "functions": [2.0]}, parted=("Y",)),
    "cell_indicators": Door(cell_indicators, lambda: {"Y": cells()}, parted=("Y",)),
    "laplace_basis": Door(
        laplace_basis,
        lambda: {"Y": disk(), "rank": 3, "solver_parameters": None, "options_prefix": None, "cache": None},
        takes={
            "solver_parameters": OPTIONS,
            "options_prefix": PREFIX,
            "cache": {"None"} | PATH,
        },
        parted=("Y",),
        another={"solver_parameters": {"eps_max_it": 7}, "options_prefix": "mine", "cache": "here"},
    ),
    "Sensors": Door(
        lambda basis, points, weights, tolerance: Sensors(basis, points, weights=weights, tolerance=tolerance),
        lambda: {"basis": phi(), "points": places(), "weights": np.ones(6), "tolerance": 0.25},
        takes={"weights": {"None"}},
        parted=("basis",),
        another={"points": places() / 2, "weights": np.arange(1.0, 7.0), "tolerance": 0.5},
    ),
    "Sensors.evaluate": Door(Sensors.evaluate, lambda: {"self": sensors(), "batch": one()}, parted=("batch",)),
    "Sensors.gradients": Door(Sensors.gradients, lambda: {"self": sensors(), "batch": one()}, parted=("batch",)),
    "Sensors.fit": Door(
        lambda self, values, lam, penalty, gaps: self.fit(values, lam, penalty=penalty, gaps=gaps),
        lambda: {"self": sensors(), "values": np.ones((6, 2)), "lam": 0.1, "penalty": "identity", "gaps": False},
        takes={"lam": NOT_NEGATIVE, "gaps": FLAG},
        parted=("self",),
        another={"penalty": "gradient"},
    ),
    "LowRankKernel": Door(
        LowRankKernel,
        lambda: {"phi": phi(), "psi": phi(), "couplings": None},
        takes={"couplings": {"None"}},
        parted=("phi", "psi", "couplings"),
    ),
    "LowRankKernel.bound": Door(
        LowRankKernel.bound,
        lambda: {"self": kernel(), "coefficients": beta()},
        takes={"coefficients": {"a bool", "zero", "a fraction"}},
    ),
    "LowRankKernel.norm": Door(
        LowRankKernel.norm, lambda: {"self": kernel(), "beta": beta(), "kind": "hs"}, another={"kind": "linf"}
    ),
    "LowRankKernel.svd": Door(LowRankKernel.svd, lambda: {"self": kernel(), "beta": beta()}),
    # -- parameters --
    "RunningCost": Door(
        RunningCost,
        lambda: {"density": F**2 / 2 + A**2 / 20, "kernel": 0.5, "pairs": sympy.Symbol("b") ** 2},
        takes={"density": NUMBER, "kernel": NOT_NEGATIVE, "pairs": NUMBER | {"None"}},
        parted=("density", "kernel", "pairs"),
    ),
    "PositiveSemidefinite": Door(PositiveSemidefinite, lambda: {"rank": 2}, takes={"rank": {"None"}}, parted=("rank",)),
    "DampedAntisymmetric": Door(
        DampedAntisymmetric, lambda: {"damping": 0.5}, takes={"damping": NOT_NEGATIVE}, parted=("damping",)
    ),
    "NormBounded": Door(NormBounded, lambda: {"bound": 0.5}, takes={"bound": POSITIVE}, parted=("bound",)),
    "LaplaceFunctions": Door(
        LaplaceFunctions, lambda: {"phi": phi(), "split": 0.01}, takes={"split": {"zero"}}, parted=("phi",)
    ),
    "LaplaceFunctions.kernel": Door(
        LaplaceFunctions.kernel,
        lambda: {"self": functions(), "multipliers": [1.0] * functions().count},
        parted=("multipliers",),
    ),
    "LaplaceFunctions.multipliers": Door(
        LaplaceFunctions.multipliers,
        lambda: {"self": functions(), "beta": np.eye(functions().rank), "eigenvalues": [1.0, 2.0]},
        takes={"eigenvalues": {"None"}},
        parted=("beta", "eigenvalues"),
    ),
    "Symmetric": Door(
        lambda phi, symmetry, tolerance: Symmetric(phi, symmetry, tolerance=tolerance),
        lambda: {"phi": laplace("disk", "CG1", 3), "symmetry": reflected, "tolerance": 0.1},
        parted=("phi",),
        another={"symmetry": rotated},
        called={"symmetry": "symmetries"},
    ),
    "Parity": Door(
        Parity,
        lambda: {"map": reflected, "signs": (1, -1), "output": 1, "inputs": -1},
        takes={"map": {"a class", "a function"}, "output": {"a negative number"}, "inputs": {"a negative number"}},
        parted=("map", "signs", "output", "inputs"),
    ),
    "invariant_functions": Door(
        lambda phi, symmetry, tolerance: invariant_functions(phi, symmetry, tolerance=tolerance),
        lambda: {"phi": laplace("disk", "CG1", 3), "symmetry": reflected, "tolerance": 0.1},
        parted=("phi",),
        another={"symmetry": rotated},
        called={"symmetry": "symmetries"},
    ),
    "Channels": Door(Channels, lambda: {"Y": disk(), "channels": 2}, parted=("Y",)),
    "Channels.join": Door(
        Channels.join, lambda: {"self": channels().Y, "fields": [disk().batch(smooth(disk())), None]}, parted=("fields",)
    ),
    "Channels.part": Door(
        Channels.part,
        lambda: {"self": channels().Y, "function": channels().Y.batch(smooth(channels().Y))},
        parted=("function",),
    ),
    "RepeatedBasis": Door(RepeatedBasis, lambda: {"Y": channels().Y, "one": channels().one}, parted=("Y", "one")),
    "Symmetric.projected": Door(
        Symmetric.projected,
        lambda: {"self": Symmetric(laplace("disk", "CG1", 3), reflected), "beta": np.eye(3)},
        parted=("beta",),
    ),
    "Parameter": Door(
        Parameter,
        lambda: {
            "name": "mine",
            "space_basis": net().kernel.space_basis,
            "time_basis": net().kernel.time_basis,
            "functions": None,
            "penalised": True,
        },
        takes={"name": TEXT, "functions": {"None"}, "penalised": FLAG},
        parted=("space_basis", "time_basis"),
        another={"name": "yours", "functions": net().kernel.functions},
    ),
    "Parameter.get": Door(Parameter.get, lambda: {"self": net().kernel, "k": 1}, takes={"k": {"zero"}}),
    "Parameter.set": Door(
        Parameter.set, lambda: {"self": net().kernel, "k": 1, "coefficients": beta((4, 3))}, takes={"k": {"zero"}}
    ),
    "Parameter.inner": Door(
        Parameter.inner, lambda: {"self": net().kernel, "k": 1, "c": beta((4, 3)), "d": beta((4, 3))}, takes={"k": {"zero"}}
    ),
    "Parameter.riesz_map": Door(Parameter.riesz_map, lambda: {"self": net().bias, "k": 1}, takes={"k": {"zero"}}),
    "enable_checkpointing": Door(
        enable_checkpointing, lambda: {"tape": Tape(), "checkpoints": 2, "steps": 3}, parted=("tape", "checkpoints", "steps")
    ),
    # -- networks --
    "Kernel": Door(
        in_a_network(Kernel, "kernel"),
        lambda: {"phi": phi(), "psi": phi(), "in_time": "layers", "learn_factors": False, "among": None},
        takes={"psi": {"None"}, "learn_factors": FLAG, "among": {"None"}},
        parted=("phi",),
        another={"psi": polynomials(phi().Y), "in_time": [0, 0], "among": PositiveSemidefinite(2)},
        called={name: rf"kernel\.{name}" for name in ("phi", "psi", "in_time", "learn_factors", "among")},
    ),
    "Bias": Door(
        in_a_network(Bias, "bias"),
        lambda: {"basis": phi(), "in_time": "layers"},
        takes={"basis": {"None"}},
        another={"basis": None, "in_time": "linear"},
        called={name: rf"bias\.{name}" for name in ("basis", "in_time")},
    ),
    "Layers": Door(
        in_a_network(Layers, "layers"),
        lambda: {"times": 2, "final_time": 1.5, "steps": 1, "per_block": 1, "learn_times": False},
        takes={"times": {"zero"}, "final_time": POSITIVE | {"None"}, "per_block": {"None"}, "learn_times": FLAG},
        another={"times": 3},
        called={name: rf"layers\.{name}" for name in ("times", "final_time", "steps", "per_block", "learn_times")},
    ),
    "ResidualNetwork": Door(
        ResidualNetwork,
        lambda: {
            "kernel": phi(),
            "bias": phi(),
            "layers": 2,
            "final_time": 1.5,
            "activation": "tanh",
            "gradient_flow": False,
            "solver_parameters": None,
            "options_prefix": None,
            "replay_steps": True,
            "precision": "double",
        },
        takes={
            "bias": {"None"},
            "layers": {"zero"},
            "final_time": POSITIVE | {"None"},
            "solver_parameters": OPTIONS,
            "options_prefix": PREFIX,
            "replay_steps": FLAG,
            "gradient_flow": FLAG,
        },
        parted=("kernel",),
        another={
            "bias": None,
            "layers": 3,
            "activation": sympy.sin(S),
            "solver_parameters": {"ts_type": "cn"},
            "options_prefix": "mine",
            "precision": "single",
        },
        called={"final_time": r"layers\.final_time"},
    ),
    "ResidualNetwork.replace": Door(ResidualNetwork.replace, lambda: {"self": net(), "activation": "tanh"}),
    "ResidualNetwork.run": Door(
        ResidualNetwork.run,
        lambda: {
            "self": net(),
            "initial": classes().batch.inputs,
            "running": RunningCost(0.5),
            "weights": np.ones(4),
            "seen_by": None,
            "observed": [1, 2],
        },
        takes={"running": {"None"}, "weights": {"None"}, "seen_by": {"None"}, "observed": {"an empty list"}},
        parted=("initial",),
        another={"running": RunningCost(0.25), "weights": None, "seen_by": phi(), "observed": [1]},
    ),
    "ResidualNetwork.__call__": Door(
        ResidualNetwork.__call__, lambda: {"self": net(), "initial": classes().batch.inputs}, parted=("initial",)
    ),
    "ResidualNetwork.steps_what_is_seen_by": Door(
        ResidualNetwork.steps_what_is_seen_by, lambda: {"self": net(), "psi": phi()}, parted=("psi",)
    ),
    "ResidualNetwork.on": Door(
        ResidualNetwork.on, lambda: {"self": laplace_net(), "Y": label_space("disk", "DG0")}, parted=("Y",)
    ),
    "ResidualNetwork.in_first": Door(
        ResidualNetwork.in_first, lambda: {"self": laplace_net(), "rank": 3}, takes={"rank": {"a huge integer"}}
    ),
    "ResidualNetwork.pad": Door(
        ResidualNetwork.pad, lambda: {"self": moved_net(), "net": moved_net().in_first(3)}, parted=("net",)
    ),
    "ResidualNetwork.truncated": Door(
        ResidualNetwork.truncated, lambda: {"self": net(), "tolerance": 0.5}, takes={"tolerance": {"zero"}}
    ),
    "ResidualNetwork.start": Door(
        ResidualNetwork.start,
        lambda: {"self": moved_net(), "rule": "local", "seed": 3, "gain": 0.5, "width": 1.5, "data": None},
        takes={"seed": {"zero", "a huge integer"}, "gain": NUMBER, "width": POSITIVE, "data": {"None"}},
        another={"rule": "zero"},
    ),
    "Run.state": Door(Run.state, lambda: {"self": run(), "layer": 1}, takes={"layer": {"zero"}}),
    "Run.costate": Door(Run.costate, lambda: {"self": run(), "layer": 1}, takes={"layer": {"zero"}}),
    "Run.tangent": Door(Run.tangent, lambda: {"self": run(), "direction": fields().batch.inputs}, parted=("direction",)),
    # -- problems --
    "Head": Door(
        Head,
        lambda: {"psi": phi(), "onto": 3, "prediction": "softmax", "symmetries": ()},
        takes={"symmetries": {"an empty list"}},
        parted=("psi", "symmetries"),
        another={"prediction": "logistic"},
    ),
    "network_operator": Door(
        network_operator,
        lambda: {"net": fitted().net, "u": fd.Function(fitted().net.Y.V), "head": fitted().head},
        takes={"head": {"None"}},
        parted=("net", "u", "head"),
    ),
    "Head.__call__": Door(Head.__call__, lambda: {"self": classes().head, "f": classes().batch.inputs}, parted=("f",)),
    "Head.linear": Door(Head.linear, lambda: {"self": classes().head, "f": classes().batch.inputs}, parted=("f",)),
    "Head.predict": Door(Head.predict, lambda: {"self": classes().head, "f": classes().batch.inputs}, parted=("f",)),
    "Head.scores": Door(Head.scores, lambda: {"self": classes().head, "f": classes().batch.inputs}, parted=("f",)),
    "Head.on": Door(Head.on, lambda: {"self": classes().head, "Y": disk()}, parted=("Y",)),
    "Head.in_first": Door(Head.in_first, lambda: {"self": classes().head, "rank": 3}, takes={"rank": {"a huge integer"}}),
    "Head.pad": Door(Head.pad, lambda: {"self": moved_head(), "head": moved_head().in_first(3)}, parted=("head",)),
    "Head.start": Door(
        Head.start,
        lambda: {"self": moved_head(), "rule": "random smooth", "seed": 3, "gain": 0.5},
        takes={"seed": {"zero", "a huge integer"}, "gain": NUMBER},
        another={"rule": "zero"},
    ),
    "Head.observations": Door(
        Head.observations, lambda: {"self": classes().head, "labels": [0, 1, 2, 1]}, another={"labels": [0, 1, 2, 2]}
    ),
    "Lift": Door(
        Lift,
        lambda: {"Y": disk(), "fields": 2, "symmetries": ()},
        takes={"symmetries": {"an empty list"}},
        parted=("Y", "symmetries"),
    ),
    "Lift.__call__": Door(Lift.__call__, lambda: {"self": lifted(), "u": classes().batch.inputs}, parted=("u",)),
    "Lift.on": Door(Lift.on, lambda: {"self": lifted(), "Y": disk()}, parted=("Y",)),
    "Lift.start": Door(
        Lift.start,
        lambda: {"self": lifted(), "rule": "apart", "seed": 3, "gain": 0.5},
        takes={"seed": {"zero", "a huge integer"}, "gain": NUMBER},
        another={"rule": "random"},
    ),
    "Loss": Door(
        Loss,
        lambda: {
            "name": "mine",
            "value": value,
            "gradient": gradient,
            "prediction": None,
            "hessian": None,
            "gauss_newton": None,
        },
        takes={
            "name": TEXT,
            "value": {"a function"},
            "gradient": {"a function"},
            "prediction": {"None"},
            "hessian": {"None", "a function"},
            "gauss_newton": {"None", "a function"},
        },
        parted=("name", "value", "gradient", "prediction", "hessian", "gauss_newton"),
    ),
    **{
        name: Door(
            loss,
            lambda: {"Y": disk(), "output": one(), "observation": one(), "weights": np.arange(1.0, 5.0), "prediction": None},
            takes={"weights": {"None"}, "prediction": {"None"}},
            parted=("Y", "output", "observation"),
            another={"prediction": PREDICTIONS[loss.prediction or "logistic"]},
        )
        for name, loss in (
            ("least_squares", least_squares),
            ("cross_entropy", cross_entropy),
            ("binary_cross_entropy", binary_cross_entropy),
        )
    },
    "functional_loss": Door(
        functional_loss,
        lambda: {"functional": difference, "name": "mine"},
        takes={"functional": {"a function"}, "name": TEXT},
        parted=("functional", "name"),
    ),
    "Regulariser": Door(
        Regulariser,
        lambda: {"terms": ((0.5, _mass),), "names": ("mine",)},
        takes={"names": {"an empty list"}},
        parted=("terms", "names"),
        called={"terms": "terms|names"},
    ),
    "Regulariser.__call__": Door(
        Regulariser.__call__,
        lambda: {"self": tikhonov(0.5), "parameters": classes().penalised()},
        takes={"parameters": {"an empty list"}},
        parted=("parameters",),
    ),
    **{
        term.__name__: Door(
            term,
            lambda: {"weight": 0.5, "kernel": 0.3},
            takes={"weight": NOT_NEGATIVE, "kernel": NOT_NEGATIVE},
            parted=("weight", "kernel"),
        )
        for term in (tikhonov, smooth_in_space, smooth_in_time)
    },
    **{
        term.__name__: Door(
            term,
            lambda scale=scale: {"weight": 0.5, scale: 0.1, "bias": 0.3},
            takes={"weight": NOT_NEGATIVE, scale: POSITIVE, "bias": NOT_NEGATIVE},
            parted=("weight", scale, "bias"),
        )
        for term, scale in ((smoothed_l1, "epsilon"), (huber, "delta"), (total_variation, "epsilon"))
    },
    "ufl_functional": Door(
        ufl_functional,
        lambda: {"weight": 0.5, "density": double_well, "of": "bias", "convex": False},
        takes={"weight": NOT_NEGATIVE, "density": {"a function"}, "convex": {"a bool"}},
        parted=("weight", "density", "of", "convex"),
    ),
    "locality": Door(
        locality,
        lambda: {"weight": 0.5, "embedding": None},
        takes={"weight": NOT_NEGATIVE, "embedding": {"None", "a function"}},
        parted=("weight", "embedding"),
    ),
    "Regulariser.functionals": Door(
        Regulariser.functionals,
        lambda: {"self": tikhonov(0.5), "parameter": classes().net.bias, "coefficients": coefficients_of_bias()},
        parted=("parameter", "coefficients"),
    ),
    "Batch": Door(
        Batch,
        lambda: {
            "inputs": one(),
            "targets": [0, 1, 2, 1],
            "weights": np.ones(4),
            "observations": None,
            "derivatives": None,
        },  # fmt: skip
        takes={name: {"None"} for name in ("weights", "observations", "derivatives")},
        parted=("inputs",),
        another={
            "targets": [0, 1, 2, 2],
            "weights": np.arange(1.0, 5.0),
            "observations": Observations([1], [[0, 1, 2, 1]]),
            "derivatives": Derivatives(one(), one()),
        },  # fmt: skip
    ),
    "Derivatives": Door(
        Derivatives,
        lambda: {"directions": one(), "targets": one(), "weight": 0.5},
        takes={"weight": NOT_NEGATIVE},
        parted=("directions", "targets"),
    ),
    "Observations": Door(
        Observations,
        lambda: {"layers": [1], "targets": [[0, 1, 2, 1]], "weights": [0.5]},
        takes={"weights": {"None"}},
        parted=("layers", "targets", "weights"),
        called={"layers": "layers|targets"},
    ),
    "LearningProblem": Door(
        LearningProblem,
        lambda: {
            "net": net(),
            "head": classes().head,
            "loss": cross_entropy,
            "regulariser": None,
            "batch": classes().batch,
            "learn": "parameters",
            "running": None,
            "ensemble": None,
            "checkpoints": None,
            "lift": None,
        },
        takes={name: {"None"} for name in ("regulariser", "running", "ensemble", "checkpoints", "lift")},
        parted=("net",),
        called={"head": "head|batch"},
        another={
            "head": None,
            "loss": least_squares,
            "regulariser": tikhonov(0.5),
            "batch": Batch(classes().batch.inputs, [0, 1, 2, 2]),
            "learn": "both",
            "running": RunningCost(0.5),
            "checkpoints": 1,
            "lift": lifted(),
        },
    ),
    "LearningProblem.replace": Door(
        LearningProblem.replace, lambda: {"self": classes(), "learn": "parameters"}, another={"learn": "both"}
    ),
    "LearningProblem.record": Door(
        LearningProblem.record,
        lambda: {"self": classes(), "gauss_newton": False, "eliminate": None},
        takes={"gauss_newton": FLAG, "eliminate": {"None"}},
        another={"eliminate": "head"},
    ),
    "LearningProblem.reduced_functional": Door(
        LearningProblem.reduced_functional, lambda: {"self": classes(), "gauss_newton": False}, takes={"gauss_newton": FLAG}
    ),
    "LearningProblem.exchange": Door(
        LearningProblem.exchange,
        lambda: {"self": classes(), "batch": classes().batch},
        another={"batch": Batch(classes().batch.inputs, [0, 1, 2, 2])},
    ),
    "LearningProblem.minibatches": Door(
        LearningProblem.minibatches,
        lambda: {"self": classes(), "size": 2, "seed": 3},
        takes={"seed": {"None", "zero", "a huge integer"}},
    ),
    "LearningProblem.folds": Door(
        LearningProblem.folds,
        lambda: {"self": classes(), "count": 2, "seed": 3},
        takes={"seed": {"None", "zero", "a huge integer"}},
    ),
    # -- training; the monitor stops at the start --
    "train": Door(
        train,
        lambda: {
            "problem": classes(),
            "solver_parameters": {"tao_max_it": 1},
            "options_prefix": None,
            "monitor": stop,
            "quiet": False,
            "gauss_newton": False,
            "bounds": None,
            "eliminate": None,
            "ranks": [3, 4],
            "checkpoint": None,
            "resume": None,
        },
        takes={
            "solver_parameters": OPTIONS,
            "options_prefix": PREFIX,
            "monitor": {"None", "a function"},
            "quiet": FLAG,
            "gauss_newton": FLAG,
            "bounds": OPTIONS,
            "eliminate": {"None"},
            "ranks": {"None"},
            "checkpoint": {"None"},
            "resume": PATH | {"None"},
        },
        parted=("problem",),
        another={
            "checkpoint": TrainingCheckpoint("another"),
            "resume": "another",
            "ranks": [1, 4],
            "eliminate": "head",
            "solver_parameters": {"tao_max_it": 2},
            "options_prefix": "mine",
            "monitor": None,
            "bounds": {"kernel": (-9.0, 9.0)},
        },
    ),
    "train_by_ranks": Door(
        train_by_ranks,
        lambda: {"problem": classes(), "ranks": [3, 4], "train": started},
        takes={"train": {"a function"}},
        parted=("problem",),
        another={"ranks": [1, 4], "train": stop},
    ),
    "choose_lambda": Door(
        choose_lambda,
        lambda: {
            "problem": classes(),
            "weights": [0.5, 0.1],
            "train": started,
            "rule": "cross validation",
            "noise": None,
            "folds": 2,
            "seed": 3,
        },
        takes={
            "train": {"a function"},
            "noise": {"None"},
            "folds": {"None"},
            "seed": {"None", "zero", "a huge integer"},
        },
        parted=("problem",),
        another={"train": stop, "rule": "discrepancy", "noise": 0.5},
    ),
    "train_pam": Door(
        train_pam,
        lambda: {
            "problem": classes(),
            "solver_parameters": {"tao_max_it": 1},
            "step": ProximalStep(0.5),
            "iterations": 1,
            "gradient_tolerance": 1e-6,
            "batches": None,
            "options_prefix": None,
            "monitor": stop,
            "quiet": False,
            "start": None,
            "checkpoint": None,
            "resume": None,
        },
        takes={
            "solver_parameters": OPTIONS,
            "step": POSITIVE,
            "iterations": {"zero"},
            "gradient_tolerance": NOT_NEGATIVE,
            "batches": {"None"},
            "options_prefix": PREFIX,
            "monitor": {"None", "a function"},
            "quiet": FLAG,
            "start": {"None"},
            "checkpoint": {"None"},
            "resume": PATH | {"None"},
        },
        parted=("problem",),
        another={
            "solver_parameters": {"tao_max_it": 2},
            "step": 0.25,
            "batches": [classes().batch],
            "options_prefix": "mine",
            "monitor": None,
            "checkpoint": TrainingCheckpoint("another"),
            "resume": "another",
        },
    ),
    "ProximalStep": Door(
        ProximalStep,
        lambda: {"tau": 0.5, "accuracy": 0.5, "adapt": False, "inertial": False},
        takes={"tau": POSITIVE, "accuracy": NOT_NEGATIVE, "adapt": FLAG, "inertial": FLAG},
        parted=("tau", "accuracy", "adapt", "inertial"),
    ),
    "train_levenberg_marquardt": Door(
        train_levenberg_marquardt,
        lambda: {
            "problem": fitted(),
            "iterations": 1,
            "eliminate": "head",
            "damping": 0.5,
            "tolerance": 0.5,
            "rows": 0.5,
            "directions": 2,
            "seed": 3,
            "monitor": stop,
            "quiet": False,
            "checkpoint": None,
            "resume": None,
        },
        takes={
            "iterations": {"zero"},
            "eliminate": {"None"},
            "damping": POSITIVE,
            "tolerance": NOT_NEGATIVE,
            "rows": POSITIVE,
            "seed": {"zero", "a huge integer"},
            "monitor": {"None", "a function"},
            "quiet": FLAG,
            "checkpoint": {"None"},
            "resume": PATH | {"None"},
        },
        parted=("problem",),
        another={
            "eliminate": None,
            "monitor": None,
            "checkpoint": TrainingCheckpoint("another"),
            "resume": "another",
        },
    ),
    "train_stochastic": Door(
        train_stochastic,
        lambda: {
            "problem": classes(),
            "step": Adam(rate=0.5),
            "batch_size": 2,
            "epochs": 1,
            "schedule": "constant",
            "validation": classes().batch,
            "patience": 3,
            "seed": 3,
            "monitor": stop,
            "quiet": False,
            "checkpoint": None,
            "resume": None,
        },
        takes={
            "checkpoint": {"None"},
            "resume": PATH | {"None"},
            "step": {"None"},
            "epochs": {"zero"},
            "patience": {"None"},
            "seed": {"zero", "a huge integer"},
            "monitor": {"None", "a function"},
            "quiet": FLAG,
        },
        parted=("problem",),
        called={"validation": "validation|patience"},
        another={
            "checkpoint": TrainingCheckpoint("another"),
            "resume": "another",
            "step": Adam(rate=0.25),
            "schedule": "cosine",
            "validation": Batch(classes().batch.inputs, [0, 1, 2, 2]),
            "monitor": None,
        },
    ),
    "TrainingCheckpoint": Door(
        TrainingCheckpoint,
        lambda: {"path": "training.checkpoint", "every": 5},
        takes={"path": PATH},
        parted=("path", "every"),
    ),
    "SGD": Door(
        SGD,
        lambda: {"rate": 0.5, "momentum": 0.5, "decay": 0.5},
        takes={"rate": POSITIVE, "momentum": {"zero"}, "decay": NOT_NEGATIVE},
        parted=("rate", "momentum", "decay"),
    ),
    "Adam": Door(
        Adam,
        lambda: {"rate": 0.5, "beta_1": 0.5, "beta_2": 0.5, "epsilon": 0.5, "decay": 0.5},
        takes={
            "rate": POSITIVE,
            "beta_1": {"zero"},
            "beta_2": {"zero"},
            "epsilon": POSITIVE,
            "decay": NOT_NEGATIVE,
        },
        parted=("rate", "beta_1", "beta_2", "epsilon", "decay"),
    ),
    "msa": Door(
        msa,
        lambda: {
            "problem": free(),
            "A": RowBox(phi(), (-9, 9), (-9, 9)),
            "variant": "basic",
            "iterations": 1,
            "rho": 0.5,
            "largest_rho": 1e8,
            "restarts": 0,
            "project": True,
            "learn_head": True,
            "monitor": stop,
            "quiet": False,
            "ensemble": None,
        },
        takes={
            "iterations": {"zero"},
            "rho": POSITIVE,
            "largest_rho": POSITIVE,
            "restarts": {"zero"},
            "project": FLAG,
            "learn_head": FLAG,
            "monitor": {"None", "a function"},
            "quiet": FLAG,
            "ensemble": {"None"},
        },
        parted=("problem",),
        another={"A": RowBox(phi(), (-9, 8), (-9, 9)), "variant": "extended", "monitor": None},
    ),
    "open_loop_value": Door(
        open_loop_value,
        lambda: {
            "problem": one_sample(),
            "A": Box((-9, 9), (-9, 9)),
            "starts": 1,
            "iterations": 1,
            "tolerance": 1e-3,
            "seed": 1,
        },
        takes={"iterations": {"zero"}, "tolerance": NOT_NEGATIVE, "seed": {"zero", "a huge integer"}},
        parted=("problem",),
        another={"A": Box((-9, 8), (-9, 9))},
    ),
    "solve_maximum_principle": Door(
        solve_maximum_principle,
        lambda: {
            "problem": free(),
            "A": RowBox(phi(), (-9, 9), (-9, 9)),
            "smoothing": 30.0,
            "solver_parameters": {"snes_max_it": 1},
            "options_prefix": "coupled_",
        },
        takes={"smoothing": POSITIVE, "solver_parameters": OPTIONS, "options_prefix": PREFIX},
        parted=("problem",),
        another={"A": RowBox(phi(), (-9, 8), (-9, 9))},
    ),
    # -- estimators --
    "DomainRecipe": Door(
        DomainRecipe,
        lambda: {"make": fd.UnitDiskMesh, "family": "CG", "degree": 1, "symmetries": None},
        takes={
            "make": {"a function"},
            "family": TEXT,
            "degree": {"zero"},
            "symmetries": {"None", "a function"},
        },
        parted=("make", "family", "degree", "symmetries"),
    ),
    "LabelFieldClassifier": Door(
        partial(estimated, LabelFieldClassifier),
        of_estimator,
        takes=TAKEN_BY_ESTIMATORS,
        parted=("domain", "random_state"),
        dear=True,
    ),
    "LabelFieldRegressor": Door(
        partial(estimated, LabelFieldRegressor),
        lambda: of_estimator() | {"target_points": MOMENTS},
        takes=TAKEN_BY_ESTIMATORS | {"target_points": {"None"}},
        parted=("domain", "random_state"),
        dear=True,
    ),
    # -- files --
    "export": Door(
        export,
        lambda: {
            "net": net(),
            "head": classes().head,
            "path": shared() / "network.npz",
            "lift": lifted(),
            "precision": "double",
        },
        takes={"head": {"None"}, "lift": {"None"}},
        parted=("net",),
        another={"head": None, "lift": None, "precision": "single"},
    ),
    "save": Door(
        save,
        lambda: {"path": shared() / "another.h5", "net": net(), "head": classes().head, "lift": lifted()},
        takes={"path": PATH, "head": {"None"}, "lift": {"None"}},
        parted=("net",),
        another={"head": None, "lift": None},
    ),
    "load_lift": Door(load_lift, lambda: {"path": saved(), "Y": net().Y}, takes={"path": PATH}, parted=("Y",)),
    "load": Door(load, lambda: {"path": saved(), "comm": COMM_WORLD}, takes={"path": PATH}, parted=("comm",)),
    # -- what activations are made of --
    "Activation": Door(
        Activation,
        lambda: {
            "name": "mine",
            "kernels": get_activation("tanh").kernels,
            "declared": get_activation("tanh").properties,
            "parameters": (),
            "joints": (),
            "expression": None,
        },
        takes={
            "name": TEXT,
            "declared": {"a function"},
            "parameters": {"an empty list"},
            "joints": {"an empty list"},
            "expression": {"None"},
        },
        parted=("name", "kernels", "declared", "parameters", "joints", "expression"),
    ),
    **{
        f"Activation.{name}": Door(
            getattr(Activation, name),
            lambda: {"self": get_activation("tanh"), "s": np.ones(3), "out": None},
            takes={"s": SAFE, "out": {"None"}},
            parted=("s", "out"),
            through=("s",),
            fitting=("s", "out"),
        )
        for name in ("__call__", "derivative", "second_derivative", "primitive")
    },
    "Properties": Door(
        Properties,
        lambda: {
            "lipschitz": 1.0,
            "zero_at_zero": True,
            "sign_preserving": True,
            "positive_slope_at_zero": True,
            "non_decreasing": True,
            "strictly_increasing": True,
            "bounded": True,
            "sampled": frozenset(),
        },
        takes={
            "lipschitz": NOT_NEGATIVE | {"infinity"},
            "sampled": {"an empty list"},
            **dict.fromkeys(
                (
                    "zero_at_zero",
                    "sign_preserving",
                    "positive_slope_at_zero",
                    "non_decreasing",
                    "strictly_increasing",
                    "bounded",
                ),
                FLAG,
            ),
        },
        parted=(
            "lipschitz",
            "zero_at_zero",
            "sign_preserving",
            "positive_slope_at_zero",
            "non_decreasing",
            "strictly_increasing",
            "bounded",
            "sampled",
        ),
    ),
}

#: Public names that are not called with arguments from outside: what they are.
NO_DOORS = {
    "ACTIVATIONS": "a table",
    "Density": "a protocol: what a density of the user's has",
    "PairDensity": "a protocol: what a density of the user's has",
    "StepFailure": "an error that a layer raises",
    "OpenLoopValue": "what open_loop_value gives",
    "SensorFit": "what Sensors.fit gives",
    **dict.fromkeys(
        (
            "Result",
            "LambdaChoice",
            "PAMResult",
            "MSAResult",
            "PAMProgress",
            "MSAProgress",
            "StochasticProgress",
            "StochasticResult",
            "CoupledSolution",
            "CoupledStage",
        ),
        "what training gives, with what it computed",
    ),
}
