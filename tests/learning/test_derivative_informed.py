"""The network's own directional derivative as part of the loss: (f, f_1) stepped together, differentiated once more."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import laplace, network, set_smooth, smooth
from helpers import name as space_name
from kinds import GRADIENT, options, smooth_values
from kinds import directions_of as directions
from kinds import with_learned_factors as learned
from numpy.testing import assert_allclose
from problems import head_onto, taping

from fem_resnet import Batch, Derivatives, LearningProblem, ResidualNetwork, least_squares, tikhonov, train

on_ranks = pytest.mark.parallel([1, 2, 3])
on_two_ranks = pytest.mark.parallel([1, 2])


def problem(net, head=None, weight=2.0, learn="parameters"):
    Y = net.Y
    out = Y if head is None else head.Y
    derivatives = Derivatives(Y.batch(smooth(Y, seed=3)), out.batch(smooth(out, seed=4)), weight)
    batch = Batch(Y.batch(smooth(Y)), out.batch(smooth(out, seed=9)), [1, 2, 1], derivatives=derivatives)
    return LearningProblem(net, head, least_squares, tikhonov(0.05), batch, learn=learn)


@on_ranks
@pytest.mark.parametrize("layers_per_block", [1, 2, None])
@pytest.mark.parametrize("name", ["rk", "cn", "dirk"])
def test_tangent_of_a_run_is_the_limit_of_differences(name, layers_per_block):
    net = network(solver_parameters=options(name), layers_per_block=layers_per_block)
    f, v, eps = smooth(net.Y), smooth(net.Y, seed=3), 1e-5
    found = net.Y.values(net.run(net.Y.batch(f)).tangent(net.Y.batch(v)))
    plus, minus = (net.Y.values(net(net.Y.batch(f + sign * eps * v))) for sign in (1, -1))
    # eps^2, and round-off over eps
    assert_allclose(found, (plus - minus) / (2 * eps), rtol=0, atol=1e-8)
    with taping():
        recorded = net.run(net.Y.batch(f)).tangent(net.Y.batch(v))
    assert_allclose(net.Y.values(recorded), found, rtol=0, atol=1e-13)


@on_two_ranks
@pytest.mark.parametrize("name", GRADIENT)
def test_taylor_of_every_method(name, taylor):
    p = problem(network(solver_parameters=options(name), layers_per_block=2, basis_for_bias=True))
    taylor(p.reduced_functional(), p.functions, directions(p), f"derivative-informed, {name}", "all")


@on_two_ranks
@pytest.mark.parametrize("space", [("disk", "DG0"), ("sphere", "CG1"), ("hexes", "CG2")], ids=space_name)
@pytest.mark.parametrize("learn", ["initial", "both"])
def test_taylor_with_learned_factors_times_and_inputs(space, learn, taylor):
    p = problem(learned(space), learn=learn)
    taylor(p.reduced_functional(), p.functions, directions(p), f"derivative-informed, {space_name(space)}", learn)


@on_ranks
@pytest.mark.parametrize("onto", [None, ("sphere", "DG0")], ids=["classes", "sphere"])
def test_taylor_through_an_output(onto, taylor):
    p = problem(network(), head_onto(("disk", "CG1"), onto, "identity"))
    h = [type(f)(f.function_space()) for f in p.functions]
    owners = [(q, k) for q in p.parameters for k in range(len(q.functions))]
    for (parameter, k), function in zip(owners, h, strict=True):
        basis = parameter.space_bases[k]
        basis.write(function, smooth_values(basis, k))
    taylor(p.reduced_functional(), p.functions, h, "derivative-informed, output", str(onto))


@on_two_ranks
def test_derivatives_are_learned_where_they_are_asked_for():
    """A target map with known derivative: with it in the loss the network's own is closer, at data it has not seen."""
    basis = laplace("disk", "CG1", 3)
    teacher = ResidualNetwork(basis, bias=basis, layers=3, final_time=2.0)
    set_smooth(teacher, np.random.default_rng(1))
    Y, errors = basis.Y, {}
    x, v = Y.batch(smooth(Y, 4)), Y.batch(basis.values @ np.random.default_rng(2).normal(size=(3, 4)))
    run = teacher.run(x)
    new, w = Y.batch(smooth(Y, 10, seed=8)), Y.batch(basis.values @ np.random.default_rng(3).normal(size=(3, 10)))
    exact = Y.values(teacher.run(new).tangent(w))
    for weight in (0.0, 1.0):
        net = ResidualNetwork(basis, bias=basis, layers=2, final_time=2.0)
        p = LearningProblem(
            net, None, least_squares, tikhonov(1e-5), Batch(x, run.final, derivatives=Derivatives(v, run.tangent(v), weight)),
        )  # fmt: skip
        train(p, {"tao_max_it": 150}, monitor=lambda progress: None)
        errors[weight] = Y.norm(Y.batch(Y.values(net.run(new).tangent(w)) - exact)) / Y.norm(Y.batch(exact))
    # By the processor 0.49 to 0.51: 150 iterations are the limit, and round-off decides where they get to.
    assert errors[1.0] < 0.6 * errors[0.0], errors


@on_two_ranks
def test_what_does_not_fit_is_refused(annotation):
    net = network()
    Y = net.Y
    p = problem(net)
    with pytest.raises(ValueError, match="exchange: it does not take derivatives of the target; .*replace"):
        p.exchange(p.batch)
    with pytest.raises(TypeError, match="derivatives: expected a Derivatives or None, got tuple"):
        replace(p.batch, derivatives=(1, 2))
    for bad, message in (
        (Derivatives(Y.batch(smooth(Y, 2)), Y.batch(smooth(Y))), "derivatives.directions: expected 3 samples, .* got 2"),
        (Derivatives(Y.batch(smooth(Y)), Y.batch(smooth(Y, 2))), "derivatives.targets: expected 3 samples"),
    ):
        with pytest.raises(ValueError, match=message):
            LearningProblem(net, None, least_squares, None, replace(p.batch, derivatives=bad))
    with pytest.raises(ValueError, match="^weight: expected a number >= 0, got -1.0"):
        Derivatives(Y.batch(smooth(Y)), Y.batch(smooth(Y)), -1.0)
    with pytest.raises(ValueError, match="direction: expected a Function of .*"):
        net.run(Y.batch(smooth(Y))).tangent(Y.batch(smooth(Y, 2)))
    with annotation(), pytest.raises(ValueError, match="no adjoint of its method 'bdf'"):
        other = network(solver_parameters={"ts_type": "bdf"})
        other.run(Y.batch(smooth(Y)))


def test_hessians_are_refused_by_name():
    p = problem(network(basis_for_bias=True))
    J = p.reduced_functional()
    J.derivative()
    with pytest.raises(NotImplementedError, match="TangentSegment: tangents are not implemented, only first adjoints"):
        J.hessian(directions(p))
