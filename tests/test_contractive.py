"""Networks f_t = B^T sigma(a - B f): what they step, their derivatives, and that solutions do not part (end of 3.5)."""

import numpy as np
import pytest
from firedrake import COMM_WORLD
from mpi4py import MPI
from numpy.testing import assert_allclose
from test_learned_factors import directions as directions_with_factors, problem
from test_methods import FORWARD, GRADIENT, options

from fem_resnet import ResidualNetwork
from helpers import TIMES, label_space, laplace, name as space_name, network, set_smooth, smooth

on_ranks = pytest.mark.parallel([1, 2, 3])
on_two_ranks = pytest.mark.parallel([1, 2])
ROUND_OFF = 1e-12
SPACES = [("disk", "CG1"), ("annulus", "DG0"), ("sphere", "CG1")]


def gradient_flow(space=("disk", "CG1"), **more):
    """Three layers, phi and psi of different rank, psi not orthonormal; so small that steps of a layer are short."""
    return network(space, gradient_flow=True, **{"size": 0.4} | more)


def learned(space=("disk", "CG1"), **more):
    """Factors and times learned as well."""
    net = ResidualNetwork(
        laplace(*space, rank=4), laplace(*space, rank=3), bias=laplace(*space, rank=3), times=TIMES,
        learn_factors=True, learn_times=True, gradient_flow=True, **more,
    )  # fmt: skip
    set_smooth(net, np.random.default_rng(0))
    for k, parameter in enumerate(net.factors):
        parameter.set(0, 0.3 * smooth(net.Y, parameter.space_basis.shape[1], seed=20 + k))
    return net


def states(net, samples=3, seed=0):
    return net.Y.values(net(net.Y.batch(smooth(net.Y, samples, seed=seed)))).copy()


def largest(values):
    return COMM_WORLD.allreduce(np.abs(values).max(initial=0), op=MPI.MAX)


def by_hand(net, f, steps):
    """Classical Runge-Kutta in the nodal values, B and B^T applied as they are written."""
    kernel = net.kernel.space_basis.kernel
    for layer in range(net.layers):
        beta, a = net.kernel.get(layer), net.bias.space_basis.expand(net.bias.get(layer))[:, None]

        def rate(f):
            return kernel.transpose(beta, net.activation(a - kernel.apply(beta, f)))

        h = (net.times[layer + 1] - net.times[layer]) / steps
        for _ in range(steps):
            k_1 = rate(f)
            k_2 = rate(f + h / 2 * k_1)
            k_3 = rate(f + h / 2 * k_2)
            k_4 = rate(f + h * k_3)
            f = f + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return f


# -- what is stepped -------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("space", SPACES, ids=space_name)
def test_the_network_is_the_transpose_of_the_kernel_after_sigma(space):
    net = gradient_flow(space, steps=2)
    expected = by_hand(net, smooth(net.Y), 2)
    assert_allclose(states(net), expected, rtol=0, atol=ROUND_OFF * max(1, largest(expected)))


@on_ranks
def test_states_move_in_the_span_of_psi():
    net = gradient_flow()
    run = net.run(net.Y.batch(smooth(net.Y)))
    moved = net.Y.values(run.state(2)) - smooth(net.Y)
    psi = net.bases["psi"][0]
    inside = psi.values @ np.linalg.solve(psi.gram, psi.project(moved))
    assert largest(moved) > 0.1
    assert_allclose(moved, inside, rtol=0, atol=ROUND_OFF)


@pytest.mark.parametrize("method", FORWARD)
def test_every_method_steps_it_to_the_same_solution(method):
    order = FORWARD[method][1]
    exact = states(gradient_flow(steps=16, solver_parameters={"ts_rk_type": "8vr"}))
    steps = 8 if order > 2 else 16
    errors = [
        largest(states(gradient_flow(steps=n, solver_parameters=options(method))) - exact) for n in (steps, 2 * steps)
    ]
    assert errors[1] < 0.05 and errors[1] < errors[0]
    if order:
        observed = np.log2(errors[0] / errors[1])
        assert abs(observed - order) < 0.35, f"{method}: errors {errors} fall at order {observed:.2f}, not {order}"


@on_two_ranks
def test_adapted_steps_reach_the_same_solution():
    net = gradient_flow(solver_parameters={"ts_rk_type": "5dp", "ts_adapt_type": "basic", "ts_rtol": 1e-9, "ts_atol": 1e-9})
    assert_allclose(states(net), by_hand(net, smooth(net.Y), 40), rtol=0, atol=1e-6)


@on_ranks
def test_any_number_of_ranks_gives_the_same_network():
    """The whole mesh on one rank alone, against its parts on all."""
    found = [
        net.Y.sum(smooth(net.Y, 4, seed=1).T @ (net.Y.weights[:, None] * states(net)))
        for net in (gradient_flow(alone=alone) for alone in (False, True))
    ]
    assert_allclose(*found, rtol=0, atol=ROUND_OFF)


@on_two_ranks
def test_compiled_and_numpy_stages_are_the_same(monkeypatch):
    found = []
    for compiled in ("1", "0"):
        monkeypatch.setenv("FEM_RESNET_COMPILED", compiled)
        p = problem(gradient_flow())
        derivative = p.reduced_functional().derivative()
        owners = [parameter for parameter in p.parameters for _ in parameter.functions]
        found.append([states(p.net), *(q.space_basis.read(d) for q, d in zip(owners, derivative, strict=True))])
    for one, other in zip(*found):
        assert_allclose(one, other, rtol=0, atol=ROUND_OFF)


# -- derivatives -----------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("space", SPACES, ids=space_name)
@pytest.mark.parametrize("layers_per_block", [1, None])
def test_taylor_of_gradient_flows(space, layers_per_block, taylor):
    p = problem(gradient_flow(space, layers_per_block=layers_per_block))
    # Half as long as elsewhere: B acts twice, and bends J more.
    h = [v._ad_mul(0.5) for v in directions_with_factors(p, seed=1)]
    row, column = f"gradient flow, {space_name(space)}", f"{layers_per_block} a Block"
    taylor(p.reduced_functional(), p.functions, h, row, column, second_order=True)


@pytest.mark.parametrize("method", GRADIENT)
def test_taylor_of_gradient_flows_by_every_method(method, taylor):
    p = problem(learned(solver_parameters=options(method), steps=2))
    taylor(
        p.reduced_functional(), p.functions, directions_with_factors(p), f"gradient flow, {method}",
        "factors and times learned", second_order=True,
    )  # fmt: skip


@on_two_ranks
@pytest.mark.parametrize("in_time", ["linear", "shared"])
def test_taylor_of_gradient_flows_with_learned_factors_and_time_bases(in_time, taylor):
    p = problem(learned(kernel_in_time=in_time, bias_in_time=in_time))
    h = directions_with_factors(p)
    taylor(p.reduced_functional(), p.functions, h, f"gradient flow, {in_time}", "factors and times", second_order=True)
