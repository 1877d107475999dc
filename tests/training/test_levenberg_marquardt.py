"""Training by Levenberg and Marquardt: J falls, to round-off where it can, alike on any number of ranks."""

import logging

import numpy as np
import pytest
from helpers import flat_network, laplace, smooth
from kinds import rotation
from numpy.testing import assert_allclose, assert_array_equal
from problems import TIMES

from fem_resnet import (
    Batch,
    Head,
    LearningProblem,
    Symmetric,
    least_squares,
    smooth_in_space,
    tikhonov,
    train,
    train_levenberg_marquardt,
)  # fmt: skip

on_ranks = pytest.mark.parallel([1, 2, 3])
SAMPLES = 60
each_way = pytest.mark.parametrize("eliminate", [None, "head"])


def silent(progress):
    """A monitor that lets the training go on."""


def taught(*, domain="disk", alone=False, weight=1e-12, among=None, seed=1, **options) -> LearningProblem:
    """Outputs of a network of the same kind, of which the problem's own network is a disturbed copy."""
    phi = laplace(domain, "CG1", 4, alone)
    options = {"times": TIMES, "bias": phi, "kernel_set": among and among(phi)} | options
    net, head = flat_network(phi, **options), Head(phi, phi, "identity")
    set_learned(net, head, 0.8)
    inputs = net.Y.batch(smooth(net.Y, SAMPLES))
    omega = np.random.default_rng(3).uniform(0.5, 2.0, SAMPLES)
    targets = head.Y.batch(head.Y.values(head(net(inputs))))
    set_learned(net, head, 0.3, seed, add=True)
    regulariser = None if weight is None else tikhonov(weight)
    return LearningProblem(net, head, least_squares, regulariser, Batch(inputs, targets, omega))


def set_learned(net, head, size, seed=0, add=False) -> None:
    """Give or add random coefficients; of a set the nearest kernel, since its controls may be turned on other partitions."""
    rng, among = np.random.default_rng(seed), net.settings.kernel.among
    for parameter in (net.bias, net.kernel, *head.parameters):
        for k, basis in enumerate(parameter.space_bases):
            c = add * parameter.get(k) + size * rng.normal(size=basis.shape) / basis.shape[-1] ** 0.5
            parameter.set(k, among.projected(c) if among and parameter is net.kernel else c)


@on_ranks
@each_way
def test_it_reaches_what_a_network_of_the_same_kind_can_do(eliminate):
    """J falls by nine orders of magnitude, which needs gradients of all samples."""
    p = taught()
    start = float(p.evaluate()[0])
    result = train_levenberg_marquardt(p, iterations=40, eliminate=eliminate, tolerance=1e-14, monitor=silent)
    assert result.value < 1e-9 * start
    assert_allclose(float(p.evaluate()[0]), result.value, rtol=1e-6)
    assert (np.diff(result.values) < 0).all() and result.values.shape == (result.iterations + 1,)
    for function, c in zip(p.functions, result.controls):
        assert function.dat.data_ro.size in (0, c.size)
    assert (result.condition is None) == (eliminate is None)


def test_the_damping_has_no_floor():
    result = train_levenberg_marquardt(taught(), iterations=3, damping=1e-9, monitor=silent)
    assert result.damping < 1e-10


@on_ranks
@each_way
@pytest.mark.parametrize("kind", ["disk", "sphere, symmetric"])
def test_it_takes_the_same_steps_on_any_number_of_ranks(kind, eliminate):
    domain, _, symmetric = kind.partition(", ")
    options = {"domain": domain, "among": (lambda phi: Symmetric(phi, rotation(phi))) if symmetric else None, "weight": 1e-3}
    here, alone = (
        train_levenberg_marquardt(taught(alone=alone, **options), iterations=6, eliminate=eliminate, rows=2.0, monitor=silent)
        for alone in (False, True)
    )
    assert_allclose(here.values, alone.values, rtol=1e-8)
    if not symmetric:
        for c, expected in zip(here.controls, alone.controls):
            assert_allclose(c, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@each_way
def test_few_rows_serve_and_other_draws_take_other_steps(eliminate):
    results = [
        train_levenberg_marquardt(taught(weight=1e-6), iterations=8, eliminate=eliminate, rows=1.5, seed=seed, monitor=silent)
        for seed in (0, 0, 1)
    ]
    assert_array_equal(results[0].values, results[1].values)
    assert results[2].values[-1] != results[0].values[-1]
    assert all(result.value < (0.02, 0.5)[eliminate is not None] * result.values[0] for result in results)


def test_it_needs_fewer_evaluations_than_lbfgs():
    result = train_levenberg_marquardt(taught(), iterations=20, monitor=silent)
    other = train(taught(), {"tao_max_it": 100}, monitor=silent)
    assert result.value < 0.01 * other.value


def test_a_linear_problem_takes_one_step():
    p = taught()
    net = flat_network(p.head.psi, bias=p.head.psi, times=[0.0])
    linear = LearningProblem(net, p.head, least_squares, tikhonov(0.05), p.batch)
    result = train_levenberg_marquardt(linear, iterations=3, damping=1e-14, rows=1e6, monitor=silent)
    assert result.reason == "GRADIENT" and result.converged and result.iterations == 1
    assert result.value < 0.9 * result.values[0]


def test_steps_that_are_too_long_are_made_shorter():
    """A matrix of a few rows is singular: steps are none, overflow, or make J larger, until the damping is large enough."""
    result = train_levenberg_marquardt(taught(weight=None), iterations=1, damping=1e-200, rows=0.1, monitor=silent)
    assert result.value < result.values[0]
    assert result.damping > 1e-12


def test_other_quadratic_regularisers_are_part_of_the_matrix():
    p = taught(weight=None)
    p = p.replace(regulariser=smooth_in_space(0.01) + tikhonov(1e-3))
    result = train_levenberg_marquardt(p, iterations=60, rows=1e6, monitor=silent, tolerance=1e-9)
    assert result.reason == "GRADIENT" and result.gradient_norm < 1e-7 * result.gradient_norms[0]
    assert train(p, {"tao_type": "nls", "tao_max_it": 2}, monitor=silent).value > result.value - 1e-12


def test_a_monitor_sees_each_step_and_another_call_goes_on():
    p, seen = taught(weight=1e-6), []

    def monitor(progress):
        seen.append((progress.iteration, progress.value, float(p.evaluate()[0])))
        return progress.iteration == 2

    result = train_levenberg_marquardt(p, eliminate="head", monitor=monitor)
    assert result.reason == "STOPPED" and not result.converged and [number for number, *_ in seen] == [0, 1, 2]
    for _, value, evaluated in seen:
        assert_allclose(evaluated, value, rtol=1e-9)
    again = train_levenberg_marquardt(p, iterations=1, eliminate="head", damping=result.damping, monitor=silent)
    assert_allclose(again.values[0], result.value, rtol=1e-9)
    assert again.reason == "ITERATIONS" and again.damping < 4 * result.damping


def test_where_no_step_helps_it_says_so():
    p = taught()
    result = train_levenberg_marquardt(p, iterations=200, tolerance=0.0, monitor=silent)
    assert result.reason == "NO_DESCENT" and not result.converged
    assert_allclose(float(p.evaluate()[0]), result.value, rtol=1e-9)
    for parameter, c in zip(p.parameters, result.controls[:: len(TIMES) - 1]):
        assert_array_equal(parameter.get(0), c)


def test_an_error_leaves_what_was_reached():
    p = taught(weight=1e-3)

    def monitor(progress):
        if progress.iteration == 1:
            raise KeyError("stop")

    start = float(p.evaluate()[0])
    with pytest.raises(KeyError, match="stop"):
        train_levenberg_marquardt(p, monitor=monitor)
    assert float(p.evaluate()[0]) < start
    p.net.kernel.set(0, np.full((4, 4), 1e200))
    with np.errstate(over="ignore"), pytest.raises(ArithmeticError):
        train_levenberg_marquardt(p, monitor=silent)


def test_a_head_that_the_samples_leave_open_is_told(caplog):
    p = taught(weight=None)
    few = Batch(p.net.Y.batch(p.net.Y.values(p.batch.inputs)[:, :3]), p.head.Y.batch(p.head.Y.values(p.batch.targets)[:, :3]))
    with caplog.at_level(logging.WARNING):
        train_levenberg_marquardt(p.replace(batch=few), iterations=1, eliminate="head", monitor=silent)
    assert "leave 2 of 5 unknowns of the head open" in caplog.text
