"""An error in a user's function on one rank is raised on all; so is a difference between what ranks give or change."""

from dataclasses import replace
from functools import cache

import firedrake as fd
import numpy as np
import pytest
from checkpoint_schedules import SingleMemoryStorageSchedule
from firedrake import COMM_WORLD
from helpers import laplace
from numpy.testing import assert_allclose
from problems import learning_problem, network

from fem_resnet import (
    Batch,
    Kernel,
    LearningProblem,
    Loss,
    PositiveSemidefinite,
    Regulariser,
    ResidualNetwork,
    RowBox,
    RunningCost,
    functional_loss,
    least_squares,
    msa,
    tikhonov,
    train,
    train_pam,
)  # fmt: skip
from fem_resnet.learning.regulariser import _mass

on_ranks = pytest.mark.parallel([1, 2, 3])
on_several_ranks = pytest.mark.parallel([2, 3])
LAST = COMM_WORLD.rank == COMM_WORLD.size - 1


@cache
def classes():
    return learning_problem(network("disk", "CG1"))


@cache
def fields():
    return learning_problem(network("disk", "CG1"), head=False)


class Falls:
    """A function that calls another one, and at its n-th call raises an error, on the last rank alone."""

    def __init__(self, n, error, instead=lambda *_: None):
        self._left, self._error, self._instead = n, error, instead

    def __call__(self, *given):
        self._left -= 1
        if self._left == 0 and LAST:
            raise self._error("so it is on the last rank")
        return self._instead(*given)


def trained(monitor):
    return train(classes(), {"tao_max_it": 9}, monitor=monitor)


def alternated(monitor):
    return train_pam(classes(), {"tao_max_it": 2}, iterations=9, monitor=monitor)


def approximated(monitor):
    A = RowBox(laplace("disk", "CG1", 4), (-9, 9), (-9, 9))
    return msa(classes().replace(regulariser=None), A, variant="basic", iterations=9, project=True, monitor=monitor)


@on_ranks
@pytest.mark.parametrize(
    "training, calls, error",
    [(trained, 2, KeyboardInterrupt), (alternated, 1, ZeroDivisionError), (approximated, 1, ZeroDivisionError)],
)
def test_what_a_monitor_raises_on_one_rank_ends_training_on_all(training, calls, error):
    with pytest.raises(error, match="^so it is on the last rank"):
        training(Falls(calls, error))


def with_loss(error):
    return fields().replace(loss=Loss("mine", Falls(4, error, least_squares.value), least_squares.gradient))


def with_gradient(error):
    return fields().replace(loss=Loss("mine", least_squares.value, Falls(3, error, least_squares.gradient)))


def with_regulariser(error):
    return classes().replace(regulariser=Regulariser(((0.1, Falls(40, error, _mass)),)))


class Squares:
    """A density l = f^2 / 2 whose value falls."""

    def __init__(self, n, error):
        self.value = Falls(n, error, lambda f, a: f**2 / 2)

    def gradient(self, f, a):
        return f, 0 * f


def with_density(error):
    return fields().replace(running=RunningCost(Squares(60, error)))


@on_ranks
@pytest.mark.parametrize("make", [with_loss, with_gradient, with_regulariser, with_density])
def test_what_an_evaluation_raises_on_one_rank_ends_training_on_all(make):
    reached, error = [], KeyboardInterrupt if make is with_gradient else ZeroDivisionError
    with pytest.raises(error, match="^so it is on the last rank"):
        train(make(error), {"tao_max_it": 30}, monitor=lambda progress: reached.append(progress))
    assert reached  # not at the recording, but below TAO


@on_ranks
def test_what_is_no_form_on_one_rank_is_refused_on_all():
    loss = functional_loss(lambda p, C: 1.0 if LAST else (p - C) ** 2 * fd.dx)
    problem = LearningProblem(fields().net, None, loss, None, fields().batch)
    with pytest.raises(TypeError, match="^functional: it returned float; expected a form without arguments"):
        problem.evaluate()


@on_ranks
@pytest.mark.parametrize("part, wrong", [("value", (7,)), ("gradient", (2, 2)), ("gradient", "no array")])
def test_what_a_loss_gives_has_the_shape_that_it_should_on_all_ranks(part, wrong):
    given = {"value": least_squares.value, "gradient": least_squares.gradient}

    def bad(*asked):
        return given[part](*asked) if not LAST else wrong if isinstance(wrong, str) else np.zeros(wrong)

    problem = fields().replace(loss=Loss("mine", **given | {part: bad}))
    with pytest.raises((TypeError, ValueError), match=f"^{part} of the loss mine: expected numbers of shape .*"):
        problem.reduced_functional().derivative()


@on_ranks
def test_a_schedule_that_one_rank_cannot_make_is_refused_on_all():
    def schedule(steps):
        if LAST:
            raise MemoryError("no room")
        return SingleMemoryStorageSchedule()

    with pytest.raises(MemoryError, match="^no room"):
        classes().replace(checkpoints=schedule)


@on_ranks
def test_a_kernel_of_other_controls_follows_them_though_one_rank_alone_has_touched_them():
    net = ResidualNetwork(Kernel(laplace("disk", "CG1", 4), among=PositiveSemidefinite()), layers=2)
    controls, before = net.kernel.learned, net.kernel.get(0)
    assert len(net.kernel.functions) == 2  # which are at the controls now
    if LAST:
        controls.functions[0].dat.increment_dat_version()  # as what asks for the values to write into them does
    assert_allclose(net.kernel.get(0), before, rtol=0)
    initial = net.Y.batch(np.ones((net.Y.nodes, 1)))
    held = net.kernel.functions[0]
    assert_allclose(net.kernel.space_bases[0].read(held), before, rtol=0)
    assert np.isfinite(net.Y.norm(net(initial)))


@on_ranks
@pytest.mark.parametrize("ask", [lambda J, run: J.derivative(), lambda J, run: run.state(1)], ids=["derivative", "state"])
def test_an_input_that_one_rank_alone_may_have_changed_is_refused_on_all(ask):
    J, run = fields().record()
    if LAST:
        run.net.bias.functions[1].block_variable.saved_output.dat.increment_dat_version()
    with pytest.raises(RuntimeError, match="an input has changed since the tape was evaluated"):
        ask(J, run)
    J(fields().functions)
    ask(J, run)


@on_several_ranks
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_coefficients_that_one_rank_gives_otherwise_are_refused_and_nothing_is_set(layer):
    kernel = classes().net.kernel
    before = kernel.get(layer)
    with pytest.raises(ValueError, match="^coefficients: all ranks must give the same"):
        kernel.set(layer, before + LAST)
    with pytest.raises(ValueError, match="^k: all ranks must give the same"):
        kernel.set((layer + LAST) % 3, before)
    assert (kernel.get(layer) == before).all()


@on_several_ranks
def test_labels_weights_and_layers_that_one_rank_gives_otherwise_are_refused():
    inputs = classes().batch.inputs
    for given, name in (
        (([0, 1, 2, int(LAST)],), "targets"),
        (([0, 1, 2, 0], [1.0, 1.0, 1.0, 1.0 + LAST]), "weights"),
        (([0, 1, 2, 0], None if LAST else [1.0] * 4), "weights"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: all ranks must give the same"):
            Batch(inputs, *given)
    with pytest.raises(ValueError, match="^layers.times: all ranks must give the same"):
        ResidualNetwork(laplace("disk", "CG1", 4), layers=2 + LAST)
    with pytest.raises(ValueError, match="^weights: all ranks must give the same"):
        least_squares(fields().net.Y, inputs, inputs, [1.0, 1.0, 1.0, 1.0 + LAST])


@on_several_ranks
def test_a_training_that_is_continued_is_the_same_on_all_ranks():
    first = train_pam(classes(), iterations=0, monitor=lambda progress: None)
    other = replace(first, tau=first.tau / 2)
    with pytest.raises(ValueError, match="^start: all ranks must give the same"):
        train_pam(classes(), iterations=0, start=first if LAST else other)
    controls = [[c[:-1] if LAST else c for c in block] for block in first.controls]
    with pytest.raises(ValueError, match="^start: expected numbers of shape .*"):
        train_pam(classes(), iterations=0, start=replace(first, controls=controls))


@on_ranks
def test_a_monitor_may_stop_on_one_rank_alone():
    found = train(classes().replace(regulariser=tikhonov(0.3)), {"tao_max_it": 9}, monitor=lambda progress: LAST)
    assert found.reason == "STOPPED" and found.iterations == 0
