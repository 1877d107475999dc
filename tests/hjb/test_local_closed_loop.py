"""The feedback at layer interfaces: dynamic programming along one trajectory, section 4.3, Step 2."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from test_local_feedback import assign, direction, distance, minimise, moved, optimal, order, problem, trained

from fem_resnet import Batch, LearningProblem, LocalClosedLoop, LocalFeedback, least_squares, smooth_in_time, tikhonov

on_ranks = pytest.mark.parallel([1, 2, 3])
on_two_ranks = pytest.mark.parallel([1, 2])


@on_ranks
def test_the_rest_of_the_trajectory_is_optimal_and_its_gradient_is_the_costate():
    """D_v F(., t_l) = r(t_l); r(0) of the rest without its start, F(v, 0) = F(f(t_1), t_1) + what layer 0 costs."""
    p = optimal("sphere", onto=3)
    loop = LocalClosedLoop(p)
    J, run = p.record()
    J.derivative()
    for layer, feedback in enumerate(loop.feedbacks):
        r = p.net.Y.values(run.costate(layer))
        assert_allclose(p.net.Y.values(feedback.gradient), r, rtol=0, atol=1e-12)
        assert_allclose(p.net.Y.values(feedback.inputs), p.net.Y.values(run.state(layer)), rtol=0, atol=1e-13)
    cost = sum(0.05 * q.inner(0, q.get(0), q.get(0)) for q in (p.net.bias, p.net.kernel))  # Tikhonov's weight is 0.1
    assert loop.feedbacks[0].value - loop.feedbacks[1].value == pytest.approx(cost, rel=1e-10)


def test_without_disturbance_the_closed_loop_is_optimal_to_the_order_of_the_feedback():
    """Excess cost O(|w|^4); the controls differ from those of t = 0 by O(|w|^2)."""
    p = trained("sphere")
    loop, feedback = LocalClosedLoop(p), LocalFeedback(p)
    w = direction(p.net.Y)
    excess, apart = [], []
    for size in (0.1, 0.05):
        new = moved(p.net.Y, feedback.inputs, w, size)
        p.exchange(Batch(new, p.batch.targets))
        controls = loop(new)
        apart.append(distance(p, controls, feedback(new)))
        assign(p, controls)
        cost = float(p.evaluate()[0])
        excess.append(cost - minimise(p))
    assert excess[-1] > 1e-11
    assert order(excess) == pytest.approx(4, abs=0.5)
    assert order(apart) == pytest.approx(2, abs=0.3)


def costs_after_a_disturbance(p, w, size):
    """What the controls of layer 1 cost from the disturbed f(t_1) on: kept, answered, best."""
    loop = LocalClosedLoop(p)
    rest = loop.feedbacks[1]
    disturbed = moved(p.net.Y, rest.inputs, w, size)
    controls, final = loop.step(1, disturbed)
    q = rest.problem
    q.exchange(Batch(disturbed, q.batch.targets))
    costs = []
    for choice in (rest.controls, controls):
        assign(q, choice)
        costs.append(float(q.evaluate()[0]))
    assert_allclose(p.net.Y.values(final), p.net.Y.values(q.net(disturbed)), rtol=0, atol=1e-13)
    return *costs, minimise(q)


@on_ranks
def test_a_disturbance_on_the_way_is_answered_to_fourth_order_by_the_closed_loop_alone():
    p = optimal("annulus")
    w = direction(p.net.Y)
    kept, answered, best = np.transpose([costs_after_a_disturbance(p, w, size) for size in (0.1, 0.05)])
    assert order(kept - best) == pytest.approx(2, abs=0.2)
    assert order(answered - best) == pytest.approx(4, abs=0.5)


@on_ranks
def test_the_closed_loop_sees_no_partition():
    by = []
    for alone in (False, True):
        p = optimal("sphere", alone=alone)
        loop = LocalClosedLoop(p)
        controls = loop(moved(p.net.Y, p.batch.inputs, direction(p.net.Y), 0.1))
        by.append([p.parameters[0].space_basis.read(control) for control in controls[:2]])
    assert_allclose(*by, rtol=0, atol=1e-8)  # the solver's tolerance
    assert np.abs(np.array(by[0]) - [p.net.bias.get(k) for k in range(2)]).max() > 1e-3


@on_two_ranks
def test_what_hangs_together_is_refused():
    p = optimal("annulus")
    with pytest.raises(TypeError, match="^problem: expected a LearningProblem"):
        LocalClosedLoop(p.net)
    smooth = LearningProblem(p.net, None, least_squares, tikhonov(0.1) + smooth_in_time(0.1), p.batch)
    with pytest.raises(
        ValueError, match="^problem: expected regularisers that are sums over the layers, .*tikhonov.*; got smooth_in_time;"
    ):
        LocalClosedLoop(smooth)
    shared = problem("sphere", bias_in_time="shared")
    with pytest.raises(
        ValueError, match="^LocalClosedLoop: it does not take parameters that layers share; .* LocalFeedback, at t = 0$"
    ):
        LocalClosedLoop(shared)
    with pytest.raises(ValueError, match="^LocalClosedLoop: it does not take learned layer times"):
        LocalClosedLoop(problem("sphere", learn_times=True))
    with pytest.raises(ValueError, match="^layer: expected an integer from 0 to 1, got 2$"):
        LocalClosedLoop(p).step(2, p.batch.inputs)
