"""The initial state as a control: derivatives, the co-state r(0), f_I recovered from f(T)."""

import numpy as np
import pytest
from helpers import smooth
from numpy.testing import assert_allclose, assert_array_equal
from problems import directions, gathered, learning_problem, network

from fem_resnet import Batch, Head, LearningProblem, least_squares, smooth_in_space, smooth_in_time, tikhonov, train
from fem_resnet.parameters.space_basis import StateValues

on_ranks = pytest.mark.parallel([1, 2, 3])
on_two_ranks = pytest.mark.parallel([1, 2])

SAMPLES = 3
# Sums of some hundred numbers of size one.
ROUND_OFF = 1e-12


def problem(net, learn, *, head=False, regulariser=None, start=None, weights=None):
    """f(T) near a given batch, or classes by a head; f_I starts from smooth functions."""
    Y = net.Y
    inputs = Y.batch(smooth(Y, SAMPLES) if start is None else start)
    if head:
        head = Head(net.kernel.space_basis.kernel.phi, 3)
        rng = np.random.default_rng(1)
        for parameter in head.parameters:
            parameter.set(0, 0.3 * rng.normal(size=parameter.space_basis.shape))
        targets = [0, 1, 2]
        loss = learning_problem(net).loss
    else:
        head, targets, loss = None, Y.batch(smooth(Y, SAMPLES, seed=50)), least_squares
    return LearningProblem(net, head, loss, regulariser, Batch(inputs, targets, weights), learn=learn)


@on_ranks
@pytest.mark.parametrize("learn", ["initial", "both"])
@pytest.mark.parametrize("head", [False, True], ids=["no head", "head"])
@pytest.mark.parametrize("domain, element", [("disk", "CG1"), ("annulus", "DG0")])
@pytest.mark.parametrize("layers_per_block", [1, None])
def test_gradient_in_the_initial_state(layers_per_block, domain, element, head, learn, taylor):
    net = network(domain, element, layers_per_block=layers_per_block)
    P = problem(net, learn, head=head, regulariser=tikhonov(0.1), weights=[1, 0.5, 2])
    J = P.reduced_functional()
    start = [function.copy(deepcopy=True) for function in P.functions]
    h = directions(J, net, P.parameters)
    column = f"{layers_per_block or 'all'} a Block, {'a' if head else 'no'} head"
    taylor(J, start, h, f"{learn}, {domain}", column)


@on_ranks
def test_gradient_in_one_state_that_is_no_batch(taylor):
    net = network("disk", "CG1")
    batch = Batch(net.Y.batch(smooth(net.Y, 1)), net.Y.batch(smooth(net.Y, 1, seed=3)))
    state = net.Y.batch(smooth(net.Y, 1)).sub(0).copy(deepcopy=True)
    assert state.function_space().value_shape == ()
    P = LearningProblem(net, None, least_squares, None, Batch(state, batch.targets), learn="initial")
    J = P.reduced_functional()
    taylor(J, [state.copy(deepcopy=True)], directions(J, net, P.parameters), "initial, one state", "no batch")


@on_ranks
@pytest.mark.parametrize("layers_per_block", [1, None])
def test_the_gradient_in_the_initial_state_is_the_costate_at_the_start(layers_per_block):
    """dJ/df_I = r(0) of (4.2), in the label measure."""
    net = network("annulus", "DG0", layers_per_block=layers_per_block)
    P = problem(net, "initial")
    J, run = P.record()
    (gradient,) = J.derivative(apply_riesz=True)
    r = net.Y.values(run.costate(0))
    assert np.abs(r).max(initial=0) > 1e-3
    assert_allclose(net.Y.values(gradient), r, rtol=0, atol=ROUND_OFF)


@on_ranks
def test_the_riesz_map_is_that_of_batches():
    net = network("annulus", "DG0")
    P = problem(net, "initial")
    dual = P.batch.inputs.riesz_representation("l2")
    (control,) = P.controls()
    assert control.control is P.batch.inputs
    assert_array_equal(control.riesz_map(dual).dat.data_ro, net.Y.riesz_map(dual).dat.data_ro)


@on_ranks
@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_training_recovers_the_initial_state_from_the_final_one(activation):
    """Data assimilation: f(T) comes from a known f_I, the search from zero. The flow is invertible."""
    net = network("disk", "CG1", activation=activation, steps=2, size=0.7)
    true = smooth(net.Y, SAMPLES, seed=7)
    final = net(net.Y.batch(true))
    before = [parameter.get(k) for parameter in net.parameters for k in range(net.layers)]
    inputs = net.Y.batch(0 * true)
    P = LearningProblem(net, None, least_squares, None, Batch(inputs, final), learn="initial")
    result = train(P, {"tao_max_it": 200, "tao_gatol": 1e-9})
    assert result.converged, result.reason
    # The flow's singular values in L2(Y) are above 0.25, the weights of nodes above 0.05: the error at a node is below
    # SAMPLES * 1e-9 / 0.25^2 / sqrt(0.05) = 2e-7, linearised.
    assert_allclose(net.Y.values(inputs), true, rtol=0, atol=1e-6)
    after = [parameter.get(k) for parameter in net.parameters for k in range(net.layers)]
    for one, other in zip(before, after):
        assert_array_equal(one, other)


@on_ranks
def test_tikhonov_of_the_initial_state():
    """f_t = a: sum_s omega_s/2 |f_I + A - C|^2 + lambda/2 |f_I|^2 is least at f_I = omega (C - A) / (omega + lambda)."""
    net = network("annulus", "DG0", activation="identity")
    for k in range(net.layers):
        net.kernel.set(k, 0 * net.kernel.get(k))
    weights = np.array([0.5, 0.2, 0.3])
    P = problem(net, "initial", regulariser=tikhonov(0.4) + smooth_in_time(3.0), weights=weights)
    J, _ = P.evaluate()
    start = net.Y.values(P.batch.inputs).copy()
    A = sum(tau * net.bias.get(k) for k, tau in enumerate(net.bias.time_basis.measures))[:, None]
    C = net.Y.values(P.batch.targets)
    w = net.Y.weights
    expected = net.Y.sum(w @ ((start + A - C) ** 2 @ weights)) / 2 + 0.2 * net.Y.sum(w @ (start**2).sum(axis=1))
    assert float(J) == pytest.approx(float(expected), rel=1e-13)
    train(P, {"tao_gatol": 1e-10})
    assert_allclose(net.Y.values(P.batch.inputs), weights / (weights + 0.4) * (C - A), rtol=0, atol=1e-8)


@on_ranks
def test_smoothness_in_y_of_the_initial_state():
    net = network("disk", "CG1")
    P = problem(net, "initial", regulariser=smooth_in_space(2.0))
    plain = problem(net, "initial")
    values = net.Y.values(P.batch.inputs)
    expected = net.Y.sum(np.sum(values * net.Y.apply_stiffness(values.copy())))
    assert float(P.evaluate()[0]) - float(plain.evaluate()[0]) == pytest.approx(float(expected), rel=1e-12)


@on_ranks
def test_what_is_learned_is_what_there_is_to_learn():
    net = network("disk", "CG1")
    kinds = ("parameters", "initial", "both")
    names = {learn: [p.name for p in problem(net, learn, head=True).parameters] for learn in kinds}
    assert names == {
        "parameters": ["bias", "kernel", "W", "mu"],
        "initial": ["initial"],
        "both": ["bias", "kernel", "W", "mu", "initial"],
    }
    P = problem(net, "initial")
    assert P.functions == [P.batch.inputs] and isinstance(P.parameters[0].space_basis, StateValues)
    assert P.parameters[0].dim == net.Y.size * SAMPLES


def _functions(P):
    """Copies of all that might be learned."""
    functions = [function for parameter in P.net.parameters for function in parameter.functions]
    return [function.dat.data_ro.copy() for function in (*functions, P.batch.inputs)]


@on_two_ranks
def test_learning_both_goes_below_learning_one():
    values = {}
    for learn in ("parameters", "initial", "both"):
        P = problem(network("disk", "CG1"), learn, regulariser=tikhonov(1e-3))
        start = _functions(P)
        values[learn] = train(P, {"tao_max_it": 20}).values
        moved = [not np.array_equal(a, b) for a, b in zip(start, _functions(P))]
        moved = [bool(P.net.Y.comm.allreduce(here)) for here in moved]
        assert moved == [learn != "initial"] * 6 + [learn != "parameters"]
    assert values["both"][-1] < values["both"][0] / 10
    assert values["both"][-1] < values["parameters"][-1]  # though R has one more term


@on_ranks
def test_the_learned_state_does_not_see_the_partition():
    states = []
    for alone in (False, True):
        net = network("disk", "CG1", alone=alone)
        P = problem(net, "initial", regulariser=tikhonov(0.01))
        result = train(P, {"tao_max_it": 20})
        states.append((result.value, gathered(net.Y, net.Y.values(P.batch.inputs))))
    # L-BFGS lets round-off grow: 4e-15 of J at 20 iterations
    assert states[0][0] == pytest.approx(states[1][0], rel=1e-10)
    assert_allclose(states[0][1], states[1][1], rtol=0, atol=1e-7)


@on_two_ranks
@pytest.mark.parametrize("learn", ["initial", "both"])
def test_learned_inputs_are_not_exchanged(learn):
    net = network("disk", "CG1")
    P = problem(net, learn)
    other = Batch(net.Y.batch(smooth(net.Y, SAMPLES, seed=8)), P.batch.targets)
    with pytest.raises(ValueError, match="exchange: it does not take an initial state that is learned .*replace"):
        P.exchange(other)
    assert P.batch is not other
    problem(net, "parameters").exchange(other)


@on_two_ranks
@pytest.mark.parametrize("learn", ["inputs", None, True, ["initial"]], ids=str)
def test_refuses_what_is_not_there_to_learn(learn):
    with pytest.raises(ValueError, match="^learn: expected one of 'parameters', 'initial', 'both', got .*$"):
        problem(network("disk", "CG1"), learn)
