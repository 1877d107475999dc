"""The doors of label domains, parameters, networks, problems and training; see `doors.py`."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import firedrake as fd
import numpy as np
import sympy
from firedrake import COMM_WORLD
from helpers import label_space, laplace, smooth
from problems import learning_problem, network
from pyadjoint import Tape

from doors import Door
from fem_resnet import (
    Activation, Basis, Batch, DampedAntisymmetric, Derivatives, Head, LabelSpace, LearningProblem, Loss, LowRankKernel, NormBounded,
    Observations, Parameter, PositiveSemidefinite, Properties, Regulariser, ResidualNetwork, RowBox, Run, RunningCost,
    binary_cross_entropy, cell_indicators, class_space, cross_entropy, enable_checkpointing, functional_loss, get_activation,
    given_basis, laplace_basis, least_squares, load, msa, point_space, save, smooth_in_space, smooth_in_time, tikhonov, train,
    train_pam,
)  # fmt: skip
from fem_resnet.basis import Basis
from fem_resnet.regulariser import _mass
from fem_resnet.space_basis import KernelCoefficients
from fem_resnet.time_basis import get_time_basis

S = sympy.Symbol("s")
F, A = sympy.symbols("f a")
FLAG = {"a bool"}
NUMBER = {"a negative number", "zero", "a fraction", "a huge integer"}
POSITIVE = {"a fraction", "a huge integer"}
NOT_NEGATIVE = POSITIVE | {"zero"}
TEXT = {"a string", "an empty string"}
OPTIONS = {"None", "an empty dict"}
PREFIX = {"None", "an empty string"}


# -- what the doors are called with ------------------------------------------------------------------------------------


def disk() -> LabelSpace:
    return label_space("disk", "CG1")


def cells() -> LabelSpace:
    return label_space("disk", "DG0")


def phi() -> Basis:
    return laplace("disk", "CG1", 4)


@cache
def kernel() -> LowRankKernel:
    return LowRankKernel(phi(), phi())


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
    """The space of a set of four points, and the numbers of this rank's."""
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
    save(path, net(), classes().head)
    return path


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


def ring() -> np.ndarray:
    a = np.roll(np.eye(4), 1, axis=0)
    return a + a.T


DOORS = {
    # -- activations, without a communicator --
    "get_activation": Door(
        get_activation, lambda: {"spec": "elu", "alpha": 0.5}, takes={"alpha": POSITIVE}, parted=("spec", "alpha"),
        called={"spec": "activation"},
    ),
    "Activation.from_sympy": Door(
        Activation.from_sympy, lambda: {"expression": sympy.tanh(S), "properties": None},
        takes={"properties": {"None"}}, parted=("expression", "properties"),
    ),
    # -- label domains --
    "LabelSpace": Door(
        LabelSpace, lambda: {"V": points()[0], "numbers": points()[1], "graph": ring()},
        takes={"graph": {"None"}}, parted=("V", "numbers"), another={"graph": None},
    ),
    "LabelSpace.batch": Door(
        LabelSpace.batch, lambda: {"self": disk(), "values": smooth(disk()), "name": "pictures"},
        takes={"name": TEXT}, parted=("values",), another={"name": "faces"}, called={"values": "pictures"},
    ),
    "LabelSpace.batch_space": Door(LabelSpace.batch_space, lambda: {"self": disk(), "samples": 3}),
    "LabelSpace.inner": Door(LabelSpace.inner, lambda: {"self": disk(), "f": one(), "g": one()}, parted=("f", "g")),
    "LabelSpace.norm": Door(LabelSpace.norm, lambda: {"self": disk(), "f": one()}, parted=("f",)),
    "LabelSpace.riesz_map": Door(
        LabelSpace.riesz_map, lambda: {"self": disk(), "dual": fd.Cofunction(disk().V.dual())}, parted=("dual",)
    ),
    "class_space": Door(class_space, lambda: {"classes": 4, "comm": COMM_WORLD}, parted=("comm",)),
    "point_space": Door(
        point_space, lambda: {"weights": np.arange(1.0, 5.0), "points": None, "graph": None, "comm": COMM_WORLD},
        takes={"points": {"None"}, "graph": {"None"}}, parted=("comm",),
        another={"points": np.ones((4, 2)), "graph": ring()},
    ),
    "Basis": Door(
        Basis,
        lambda: {
            "Y": disk(), "values": phi().values, "kind": "given", "eigenvalues": np.ones(4), "move": None, "stiffness": None,
        },
        takes={"kind": TEXT, "eigenvalues": {"None"}, "move": {"None", "a function"}, "stiffness": {"None"}},
        parted=("Y", "values"), another={"kind": "cells", "move": lambda basis, Y: basis, "stiffness": np.eye(4)},
    ),
    "Basis.on": Door(Basis.on, lambda: {"self": phi(), "Y": disk()}, parted=("Y",)),
    "Basis.function": Door(Basis.function, lambda: {"self": phi(), "coefficients": np.ones(4)}),
    "given_basis": Door(given_basis, lambda: {"Y": disk(), "functions": [2.0]}, parted=("Y",)),
    "cell_indicators": Door(cell_indicators, lambda: {"Y": cells()}, parted=("Y",)),
    "laplace_basis": Door(
        laplace_basis,
        lambda: {"Y": disk(), "rank": 3, "solver_parameters": None, "options_prefix": None, "cache": None},
        takes={
            "solver_parameters": OPTIONS, "options_prefix": PREFIX,
            "cache": {"None", "a string", "an empty string", "a path"},
        },
        parted=("Y",), another={"solver_parameters": {"eps_max_it": 7}, "options_prefix": "mine", "cache": "here"},
    ),
    "LowRankKernel": Door(LowRankKernel, lambda: {"phi": phi(), "psi": phi()}, parted=("phi", "psi")),
    "LowRankKernel.bound": Door(
        LowRankKernel.bound, lambda: {"self": kernel(), "coefficients": beta()}, takes={"coefficients": {"a bool", "zero", "a fraction"}}
    ),
    "LowRankKernel.norm": Door(
        LowRankKernel.norm, lambda: {"self": kernel(), "beta": beta(), "kind": "hs"}, another={"kind": "linf"}
    ),
    "LowRankKernel.svd": Door(LowRankKernel.svd, lambda: {"self": kernel(), "beta": beta()}),
}

#: Public names that are not called with arguments from outside: what they are.
NO_DOORS: dict[str, str] = {}
