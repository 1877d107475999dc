"""An error or Ctrl-C in a user's function on one rank ends the call on all ranks."""

from functools import cache

import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import flat_network, label_space, laplace
from problems import learning_problem, network

from fem_resnet import (
    Box,
    Controls,
    Hamiltonian,
    KernelSampling,
    Loss,
    Pair,
    RunningCost,
    Sections,
    StateGrid,
    class_space,
    closed_loop,
    compress,
    extremal_controls,
    feedback_controls,
    feedback_speeds,
    follow_trajectory,
    pmp_residual,
    solve_costate,
    solve_trajectory,
    solve_value_function,
    verify,
    width_limit,
)  # fmt: skip

on_ranks = pytest.mark.parallel([1, 2, 3])
LAST = COMM_WORLD.size - 1


class Fails:
    """A function that raises an error on the last rank alone, once it is told to."""

    def __init__(self, run, error=None):
        self._run, self.error = run, error

    def __call__(self, *arguments):
        if self.error is not None and COMM_WORLD.rank == LAST:
            raise self.error
        return self._run(*arguments)


class Density:
    """f^2 / 2."""

    of_state_alone = True

    def __init__(self, value):
        self.value = self.gradient = value


@cache
def problem():
    """One sample, no head, no regulariser."""
    net = network("disk", "CG1", bias="basis", size=0.3)
    return learning_problem(net, head=False, weight=None, samples=1)


def net():
    return problem().net


@cache
def trajectory():
    return solve_trajectory(net(), problem().batch.inputs, steps=2)


@cache
def cell():
    return class_space(1)


def one_cell(values):
    return np.array(values)[: cell().nodes]


def value_function(target=None, **options):
    target = one_cell([2.0]) if target is None else target
    return solve_value_function(
        cell(), Box((-1, 1), (0, 0)), "identity", target, StateGrid(one_cell([[0.0, 0.5]]), 0.25), final_time=1.0,
        **options,
    )  # fmt: skip


def pair():
    ones = np.ones((net().Y.nodes, 1))
    return Pair(ones, ones, "maximise")


def sections(broken, described=True):
    broken.error, later = None, broken.error
    A = Sections((-9, 9), Fails(lambda a: -9 + 0 * a), broken)
    if described:  # it is asked for where ranks are compared
        assert A.description
    broken.error = later
    return A


def of_value_function(use, **given):
    """The feedback of a value function, a user's function of which fails once it is there."""

    def call(broken):
        broken.error, later = None, broken.error
        options = {name: make(broken) for name, make in given.items()} or {"running": lambda f: broken(f)}
        F = value_function(**options)
        broken.error = later
        return use(F)

    return call


def loss(broken):
    return Loss("user's", broken, lambda *_: 0.0)


def squares(Y, f, C, h):
    return Y.weights @ (f - C) ** 2


def gauss(y, z):
    return np.exp(-((y - z) ** 2).sum(axis=-1))


#: By what is called: the call, and the function that it is given.
CALLS = {
    "follow_trajectory, monitor": (
        lambda broken: follow_trajectory(net(), problem().batch.inputs, broken),
        lambda layer, step: None,
    ),
    "solve_costate, running": (
        lambda broken: solve_costate(trajectory(), problem().batch.inputs, running=broken),
        lambda t, f: f,
    ),
    "solve_costate, density": (
        lambda broken: solve_costate(trajectory(), problem().batch.inputs, running=RunningCost(Density(broken))),
        lambda f, a: (f, 0 * f),
    ),
    "solve_value_function, monitor": (lambda broken: value_function(monitor=broken), lambda t: None),
    "solve_value_function, running": (lambda broken: value_function(running=lambda f: broken(f)), lambda f: f**2),
    "solve_value_function, target": (lambda broken: value_function(lambda v, w: broken(v)), lambda v: v[0] ** 2),
    "solve_value_function, loss": (lambda broken: value_function(loss=loss(broken)), squares),
    "closed_loop, target": (
        of_value_function(lambda F: closed_loop(F, one_cell([[0.1]])), target=lambda broken: lambda v, w: broken(v)),
        lambda v: v[0] ** 2,
    ),
    "closed_loop, loss": (of_value_function(lambda F: closed_loop(F, one_cell([[0.1]])), loss=loss), squares),
    "feedback_speeds": (of_value_function(lambda F: feedback_speeds(F, one_cell([[0.1]]), 0.5)), lambda f: f**2),
    "feedback_controls": (of_value_function(lambda F: feedback_controls(F, one_cell([[0.1]]), 0.5)), lambda f: f**2),
    "closed_loop": (of_value_function(lambda F: closed_loop(F, one_cell([[0.1]]))), lambda f: f**2),
    "width_limit, initial": (
        lambda broken: width_limit(of_psi(), broken, [label_space("disk", "CG1"), label_space("disk", "CG1", 2)]),
        lambda x: np.cos(x[:, :1]),
    ),
    "width_limit, terminal": (
        lambda broken: width_limit(
            of_psi(), Fails(lambda x: x[:, :1]), [label_space("disk", "CG1"), label_space("disk", "CG1", 2)], terminal=broken
        ),
        lambda x: np.cos(x[:, :1]),
    ),
    "compress, all values": (lambda broken: compress(broken, 0.5, label_space("disk", "CG1")), gauss),
    "compress, crosses": (
        lambda broken: compress(broken, 0.5, label_space("disk", "CG1"), sampling=KernelSampling(affordable=0)),
        gauss,
    ),
    "extremal_controls, sections": (lambda broken: extremal_controls(net().Y, sections(broken), pair()), lambda a: 9 + 0 * a),
    "extremal_controls, description": (
        lambda broken: extremal_controls(net().Y, sections(broken, described=False), pair()),
        lambda a: 9 + 0 * a,
    ),
    "pmp_residual, sections": (lambda broken: pmp_residual(problem(), sections(broken), rounds=0), lambda a: 9 + 0 * a),
    "Hamiltonian, density": (
        lambda broken: Hamiltonian(net().Y, net().activation, "maximise", RunningCost(Density(broken)))(
            pair(), Controls.of_layer(net(), 0)
        ),
        lambda f, a: f**2,
    ),
    "verify, problem": (lambda broken: verify(lambda: broken(), quick=True), problem),
}


@cache
def of_psi():
    phi = laplace("disk", "CG1", 4)
    return flat_network(phi, phi, bias=phi)


@on_ranks
@pytest.mark.parametrize("name", CALLS)
def test_what_one_rank_raises_all_raise(name):
    call, run = CALLS[name]
    problem()  # its mesh is made by all ranks, before one of them fails
    with pytest.raises(ZeroDivisionError, match="^on the last rank"):
        call(Fails(run, ZeroDivisionError("on the last rank")))


@on_ranks
@pytest.mark.parametrize("name", [name for name in CALLS if "monitor" in name or name == "solve_costate, running"])
def test_an_interrupt_in_what_petsc_calls_or_a_loop_ends_all_ranks(name):
    call, run = CALLS[name]
    with pytest.raises(KeyboardInterrupt, match="^on the last rank"):
        call(Fails(run, KeyboardInterrupt("on the last rank")))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "verify, problem"])
def test_where_none_raises_the_call_is_as_ever(name):
    call, run = CALLS[name]
    call(Fails(run))


@on_ranks
def test_a_density_that_differs_between_ranks_is_refused():
    """Each rank computes the whole value function. With another density, one rank would have another value function."""
    factor = 1.0 if COMM_WORLD.rank < LAST or LAST == 0 else 2.0
    if LAST == 0:
        value_function(running=lambda f: factor * f**2)
        return
    with pytest.raises(ValueError, match="^running: all ranks must give the same"):
        value_function(running=lambda f: factor * f**2)


@on_ranks
@pytest.mark.parametrize("returned", [np.nan, 1j, "1", np.ones(3)], ids=["NaN", "complex", "text", "another shape"])
def test_what_a_density_returns_is_looked_at(returned):
    with pytest.raises((TypeError, ValueError), match="^running: "):
        value_function(running=lambda f: returned)
    with pytest.raises((TypeError, ValueError), match="^running: "):
        solve_costate(trajectory(), problem().batch.inputs, running=lambda t, f: returned)
