"""The head eliminated under a cross entropy: W and mu of least J by Newton's method, and the gradient of what is left."""

from functools import cache

import numpy as np
import pytest
from helpers import laplace, smooth
from kinds import rotation
from numpy.testing import assert_allclose
from test_elimination import OMEGA, SAMPLES, directions, eliminated, gradients_by_name, point
from test_elimination import problem as with_squares

from fem_resnet import (
    Batch,
    Derivatives,
    Head,
    Kernel,
    LearningProblem,
    Observations,
    ResidualNetwork,
    Symmetric,
    binary_cross_entropy,
    cross_entropy,
    least_squares,
    smooth_in_time,
    tikhonov,
    train,
)  # fmt: skip

on_ranks = pytest.mark.parallel([1, 2, 3])
#: Loss and prediction for an output that `test_elimination` has.
KINDS = {
    "disk to 3 classes": (cross_entropy, "softmax"),
    "sphere to disk": (cross_entropy, "softmax"),
    "block to sphere": (binary_cross_entropy, "logistic"),
    "graph to graph": (binary_cross_entropy, "logistic"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def probabilities(Y, seed=9):
    """Between 0 and 1 at each node."""
    return Y.batch(0.5 + 0.4 * np.tanh(smooth(Y, SAMPLES, seed=seed)))


def problem(kind, regulariser=tikhonov(0.02), *, alone=False, **more):
    loss, prediction = KINDS[kind]
    given = with_squares(kind, regulariser, alone=alone)
    onto = given.head.classes or given.head.onto
    head = Head(given.head.psi, onto, prediction)
    targets = np.arange(SAMPLES) % 3 if head.classes else probabilities(head.Y)
    return LearningProblem(given.net, head, loss, regulariser, Batch(given.batch.inputs, targets, OMEGA, **more))


@on_ranks
@each_kind
def test_no_other_W_and_mu_are_better(kind):
    p = problem(kind, tikhonov(0.02, kernel=0.1) + smooth_in_time(0.3))
    J, functions = eliminated(p)
    value = float(J(functions))
    J.give_head()
    assert_allclose(value, float(p.evaluate()[0]), rtol=1e-13)
    assert J.condition is None and J.undetermined == 0
    whole = p.reduced_functional()
    whole(p.functions)
    found = gradients_by_name(p, whole.derivative())
    for parameter in p.head.parameters:
        assert_allclose(found[parameter.name], 0, atol=1e-10)  # it is of size 0.1 at W = 0
        kept = parameter.get(0)
        parameter.set(0, kept + 0.01)
        assert float(p.evaluate()[0]) > value
        parameter.set(0, kept)


@on_ranks
@each_kind
def test_Taylor_of_J_without_W_and_mu(kind, taylor):
    J, functions = eliminated(problem(kind))
    J(functions)
    taylor(J, point(J), directions(J), "head eliminated", f"{kind}, cross entropy")


@on_ranks
def test_Taylor_with_observations_and_derivatives(taylor):
    p = problem("sphere to disk")
    Y, Z = p.net.Y, p.head.Y
    more = {
        "observations": Observations((0, 2), [probabilities(Z, seed) for seed in (20, 21)], (0.5, 2.0)),
        "derivatives": Derivatives(Y.batch(smooth(Y, SAMPLES, seed=22)), Z.batch(smooth(Z, SAMPLES, seed=23)), 0.7),
    }
    p = problem("sphere to disk", **more)
    J, functions = eliminated(p)
    value = float(J(functions))
    J.give_head()
    assert_allclose(value, float(p.evaluate()[0]), rtol=1e-12)
    taylor(J, point(J), directions(J), "head eliminated", "cross entropy, observations and derivatives")


@on_ranks
@each_kind
def test_a_partition_changes_nothing(kind):
    found = []
    for alone in (False, True):
        p = problem(kind, alone=alone)
        J, functions = eliminated(p)
        value = float(J(functions))
        J.give_head()
        found.append((value, *(parameter.get(0) for parameter in p.head.parameters)))
    for ours, expected in zip(*found):
        assert_allclose(ours, expected, rtol=1e-7, atol=1e-9)


@cache
def trained(eliminate, iterations):
    p = problem("disk to 3 classes", tikhonov(1e-3))
    return p, train(p, {"tao_max_it": iterations}, eliminate=eliminate)


def test_as_many_iterations_do_more_than_without():
    p, result = trained("head", 20)
    assert result.value < trained(None, 20)[1].value and result.condition is None
    assert_allclose(float(p.evaluate()[0]), result.value, rtol=1e-12)  # the head holds what belongs to the end


@on_ranks
def test_a_head_that_keeps_symmetries_is_solved_for_in_what_they_allow():
    phi = laplace("annulus", "CG1", 5)
    among = Symmetric(phi, rotation(phi))
    net = ResidualNetwork(Kernel(phi, among=among), bias=phi, layers=2)
    net.start("minus identity")
    head = Head(phi, phi, "softmax", symmetries=[rotation(phi)])
    batch = Batch(net.Y.batch(smooth(net.Y, SAMPLES)), probabilities(head.Y), OMEGA)
    p = LearningProblem(net, head, cross_entropy, tikhonov(0.02), batch)
    J, functions = eliminated(p)
    value = float(J(functions))
    J.give_head()
    assert_allclose(value, float(p.evaluate()[0]), rtol=1e-13)
    whole = p.reduced_functional()
    whole(p.functions)
    found = gradients_by_name(p, whole.derivative())
    assert max(np.abs(found[parameter.name]).max() for parameter in head.parameters) < 1e-10 < np.abs(found["bias"]).max()


@on_ranks
def test_another_batch_is_solved_for():
    p = problem("disk to 3 classes")
    J, functions = eliminated(p)
    J(functions)
    other = Batch(p.batch.inputs, (np.arange(SAMPLES) + 1) % 3, OMEGA[::-1].copy())
    p.exchange(other)
    value = float(J(functions))
    J_of_other, functions = eliminated(p.replace(batch=other))
    assert_allclose(value, float(J_of_other(functions)), rtol=1e-11)


@on_ranks
@pytest.mark.parametrize("regulariser", [None, tikhonov(0.0), tikhonov(0.1, W=0.0)], ids=["none", "zero", "without W"])
def test_a_cross_entropy_alone_has_no_minimum(regulariser):
    with pytest.raises(ValueError, match=r"eliminate: expected a regulariser of W under cross_entropy.*add tikhonov"):
        problem("disk to 3 classes", regulariser).record(eliminate="head")


def test_another_loss_of_a_softmax_is_refused():
    p = problem("disk to 3 classes")
    with pytest.raises(ValueError, match=r"eliminate: .* got least_squares and 'softmax'; leave eliminate out, or take"):
        p.replace(loss=least_squares).record(eliminate="head")
