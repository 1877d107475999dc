"""PETSc's time stepping methods on layers: order, gradients, f carried or not, adaptive steps, failures."""

import logging
from functools import cache

import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import label_space, network, set_smooth, smooth
from kinds import ADAPTIVE, FORWARD, GRADIENT, adaptive, direction, options, point, recorded
from mpi4py import MPI
from numpy.testing import assert_allclose, assert_array_equal
from problems import learning_problem
from problems import network as classifier
from pyadjoint.tape import annotate_tape

from fem_resnet import (
    Basis,
    Batch,
    Channels,
    Head,
    Kernel,
    Layers,
    LearningProblem,
    ResidualNetwork,
    StepFailure,
    cross_entropy,
    laplace_basis,
    train,
)
from fem_resnet.time_stepping import jacobian
from fem_resnet.time_stepping.methods import METHODS

on_ranks = pytest.mark.parallel([1, 2, 3])

ARKIMEX = ["1bee", "a2", "l2", "ars122", "2c", "2d", "2e", "prssp2", "3", "bpr3", "ars443", "4", "5"]
DIRK = ["s212", "es122sal", "es213sal", "es324sal", "es325sal", "657a", "es648sa", "658a", "s659a", "7510sal", "es7510sa",
        "759a", "s7511sal", "8614a", "8616sal", "es8516sal"]  # fmt: skip

WITHOUT_GRADIENT = [name for name, method in METHODS.items() if method.instead is not None]


def states(net):
    return net.Y.values(net(net.Y.batch(smooth(net.Y)))).copy()


def gradient(J):
    return [np.array(d.dat.data_ro) for d in J.derivative()]


def assert_close(these, those, tolerance):
    for one, other in zip(these, those, strict=True):
        assert_allclose(one, other, rtol=0, atol=tolerance * max(np.abs(other).max(initial=0), 1e-3))


def largest(difference):
    return COMM_WORLD.allreduce(np.abs(difference).max(initial=0), op=MPI.MAX)


@cache
def exact():
    return states(network(steps=16, solver_parameters={"ts_rk_type": "8vr"}))


# -- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORWARD)
def test_every_type_steps_forward_with_its_order(name):
    order = FORWARD[name][1]
    steps = 8 if order > 2 else 16
    nets = [network(steps=n, solver_parameters=options(name)) for n in (steps, 2 * steps)]
    errors = [largest(states(net) - exact()) for net in nets]
    assert errors[1] < 0.05 and errors[1] < errors[0]
    if order:
        observed = np.log2(errors[0] / errors[1])
        assert abs(observed - order) < 0.35, f"{name}: errors {errors} fall at order {observed:.2f}, expected {order}"


@on_ranks
@pytest.mark.parametrize("name", FORWARD)
def test_states_inside_and_after_a_segment_are_those_of_shorter_networks(name):
    """Also where f is carried; three layers in one segment."""
    net = network(solver_parameters=options(name), steps=3)
    run = net.run(net.Y.batch(smooth(net.Y)))
    part = network(times=(0.0, 0.2, 0.9), solver_parameters=options(name), steps=3)
    assert_allclose(net.Y.values(run.state(2)), states(part), rtol=0, atol=1e-12)


@pytest.mark.parametrize("in_time", ["layers", "linear"])
@pytest.mark.parametrize("name", FORWARD)
def test_a_second_solve_knows_nothing_of_the_first(name, in_time):
    """Slopes, times, guesses and step sizes of an earlier solve are gone."""
    more = {"steps": 2, "solver_parameters": options(name), "bias_in_time": in_time, "kernel_in_time": in_time}
    net = network(**more)
    first, other = states(net), states(network(size=2.0, **more))
    set_smooth(net, np.random.default_rng(0), 2.0)
    # dirk and irk start Newton's method where an earlier solve ended: the same up to its last step squared.
    assert_allclose(states(net), other, rtol=0, atol=1e-13)
    set_smooth(net, np.random.default_rng(0))
    assert_allclose(states(net), first, rtol=0, atol=1e-13)


@on_ranks
@pytest.mark.parametrize("name", ["rk", "cn", "theta", "theta 0.7 endpoint", "beuler"])
@pytest.mark.parametrize("bias", ["nodes", "basis"])
def test_carrying_f_gives_the_same_numbers(name, bias, annotation, monkeypatch):
    results = []
    for carry in (False, True):
        net = network(steps=2, solver_parameters=options(name), basis_for_bias=bias == "basis")
        monkeypatch.setattr(net._scheme, "carries_f", carry)
        J, run = recorded(net, annotation)
        results.append([net.Y.values(run.final).copy(), *gradient(J)])
    # Sums of some hundred numbers, and Newton's last step squared.
    assert_close(*results, 1e-12)


@on_ranks
@pytest.mark.parametrize("name", ["cn", "theta", "beuler"])
def test_matrix_free_gives_the_same_numbers(name, annotation):
    results = []
    for more in (
        {},
        {"mat_type": "matfree"},
        {"mat_type": "matfree", "ksp_type": "fgmres"},
        {"ksp_type": "gmres", "pc_type": "jacobi", "ksp_rtol": 1e-12},
        {"pc_type": "lu"},
        {"snes_type": "newtontr"},
    ):
        net = network(steps=2, solver_parameters=options(name) | more)
        J, run = recorded(net, annotation)
        results.append([net.Y.values(run.final).copy(), *gradient(J)])
    for other in results[1:]:
        # The adjoint's linear solves go down by 1e-10.
        assert_close(results[0], other, 1e-8)


def test_a_compiled_layer_alone_is_one_of_a_sequence():
    net = network()
    segment = net.layer_segments(net.Y.batch_space(3))[0]
    arrays = [smooth(net.Y), *(slot.read(f) for slot, f in zip(segment.inputs[1:], segment.functions))]
    segment.forward(arrays, True)
    expected = segment.adjoint(arrays, smooth(net.Y, seed=5))
    (stepper,), inputs = segment.steppers, segment._layers[0]
    psi = inputs[0].factors.psi
    stepper.forward([psi.project(arrays[0])], None, inputs, True)
    _, _, found = stepper.adjoint([np.zeros((psi.rank, 3))], [segment._stage.arranged(smooth(net.Y, seed=5))])
    assert_allclose(found, np.concatenate([part.ravel() for part in expected[1:]]), rtol=1e-13, atol=1e-15)


def test_one_linear_solve_a_newton_step_and_no_matrix_of_the_nodes():
    net = network(solver_parameters={"ts_type": "cn"})
    stepper = net._solver._stepper(net._solver._stage(3), 0, 1)
    assert stepper.solver.jacobian.getSize() == (3 * 5, 3 * 5)
    assert stepper.solver.jacobian.getInfo()["nz_used"] == 3 * 5**2
    segment = net._solver.new_segments(net.Y.batch_space(3))[0]
    segment.forward([smooth(net.Y), *(basis.read(f) for basis, f in zip(segment.inputs[1:], segment.functions))], False)
    snes = segment.steppers[0].solver.ts.getSNES()
    assert snes.getLinearSolveIterations() == snes.getIterationNumber() > 0


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("name", GRADIENT)
def test_taylor_of_every_type(name, annotation, rng, taylor):
    net = network(steps=2, solver_parameters=options(name))
    J, _ = recorded(net, annotation)
    taylor(J, point(J), direction(net, rng), name, "all")


@pytest.mark.parametrize(
    "ts_type, option, kind",
    [("arkimex", "ts_arkimex_type", kind) for kind in ARKIMEX] + [("dirk", "ts_dirk_type", kind) for kind in DIRK],
)
def test_taylor_of_every_kind_of(ts_type, option, kind, annotation, rng, taylor):
    net = network(steps=1, solver_parameters={"ts_type": ts_type, option: kind})
    J, _ = recorded(net, annotation)
    taylor(J, point(J), direction(net, rng), ts_type, "all")


@on_ranks
@pytest.mark.parametrize("layers_per_block", [1, 2, 3])
@pytest.mark.parametrize("name", ["cn", "dirk"])
def test_gradient_and_costate_do_not_see_the_blocks(name, layers_per_block, annotation):
    results = []
    for blocks in (layers_per_block, None):
        net = network(steps=2, solver_parameters=options(name), layers_per_block=blocks)
        J, run = recorded(net, annotation)
        derivative = gradient(J)
        fields = [run.costate(layer) for layer in range(4)] + [run.state(layer) for layer in range(4)]
        results.append([*derivative, *map(net.Y.values, fields)])
    assert_close(*results, 1e-12)


@on_ranks
@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_types_without_an_adjoint_are_refused_at_recording(name, annotation, tape):
    net = network(solver_parameters={"ts_type": name})
    nearest = METHODS[name].instead.split("'")[1]
    with annotation(), pytest.raises(ValueError, match=f"no adjoint of its method '{name}'.*'ts_type': '{nearest}'"):
        net.run(net.Y.batch(smooth(net.Y)))
    assert not tape.get_blocks()
    assert np.isfinite(states(net)).all()
    assert METHODS[nearest].instead is None


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("ts_type", ["mprk", "sundials", "pseudo", "eimex", "basicsymplectic", "discgrad"])
def test_types_that_step_no_layer_are_refused(ts_type):
    with pytest.raises(ValueError, match="solver_parameters: 'ts_type' .*(slow and fast|a layer is stepped by rk, theta)"):
        network(solver_parameters={"ts_type": ts_type})


# -- adaptive steps --------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("name", ADAPTIVE)
def test_taylor_under_replay(name, annotation, rng, taylor):
    net = adaptive(name)
    J, _ = recorded(net, annotation)
    taylor(J, point(J), direction(net, rng), f"{name} adaptive", "all")


@on_ranks
@pytest.mark.parametrize("name", ADAPTIVE)
def test_evaluations_take_the_steps_of_the_recording(name, annotation):
    net = adaptive(name)
    J, run = recorded(net, annotation)
    steps = [list(trace.steps) for trace in run._pieces[0].segment.traces()]
    assert len({len(s) for s in steps}) > 1 or len({round(h, 6) for s in steps for h in s}) > 3, "nothing was adapted"
    value = J(point(J))
    assert value == J.functional.block_variable.checkpoint
    J([m._ad_mul(0.5) for m in point(J)])
    assert [trace.steps for trace in run._pieces[0].segment.traces()] == [pytest.approx(s, abs=1e-15) for s in steps]
    # Recorded anew with other controls, other steps are taken.
    for f, m in zip([*net.bias.functions, *net.kernel.functions], point(J)):
        f.assign(m._ad_mul(0.1))
    _, again = recorded(net, annotation)
    assert [trace.steps for trace in again._pieces[0].segment.traces()] != steps


@on_ranks
def test_the_steps_do_not_see_the_partition(annotation):
    """Norms of f over all ranks decide: the same mesh on one rank takes the same steps."""
    found = []
    for alone in (False, True):
        net = adaptive("rk", alone=alone)
        _, run = recorded(net, annotation)
        found.append([trace.steps for trace in run._pieces[0].segment.traces()])
    for these, those in zip(*found):
        assert_allclose(these, those, rtol=1e-9)


@on_ranks
def test_replayed_steps_give_the_same_numbers_with_and_without_f_in_the_state(annotation):
    net = adaptive("rk")
    J, run = recorded(net, annotation)
    segment = run._pieces[0].segment
    net_small = network(solver_parameters={"ts_rk_type": "3bs"}, steps=8)
    J_small, run_small = recorded(net_small, annotation)
    run_small._pieces[0].segment._steps = [trace.steps for trace in segment.traces()]
    J_small(point(J_small))
    assert_close([net.Y.values(run.final)], [net.Y.values(run_small.final.block_variable.checkpoint)], 1e-12)
    assert_close(gradient(J), gradient(J_small), 1e-12)


@on_ranks
def test_steps_are_judged_by_the_error_of_f_in_the_label_measure():
    """A kernel that vanishes: g does not see what f does, which an adaptation by g alone would take for exact."""
    Y = label_space("disk", "CG1")
    basis = Basis(Y, np.ones((Y.nodes, 1)), "given")
    counts = {}
    for size in (0.0, 3.0):
        net = ResidualNetwork(basis, layers=Layers(1, 4.0, steps=1), activation="tanh", solver_parameters={
            "ts_rk_type": "3bs", "ts_adapt_type": "basic", "ts_rtol": 1e-6, "ts_atol": 1e-6})  # fmt: skip
        net.kernel.set(0, [[size]])
        # f moves where a is large, at a few nodes; the mean of f, which is g, stays.
        x = Y.coordinates[:, 0]
        net.bias.set(0, 0 * x)
        run = net.run(Y.batch((1 + np.sin(3 * x))[:, None]))
        counts[size] = len(run._pieces[0].traces[0].steps)
    assert counts[3.0] > 5 * counts[0.0] / 2, counts
    # Errors follow the tolerance: f at the end against the exact one.
    errors = [largest(states(adaptive("rk", rtol)) - exact()) for rtol in (1e-4, 1e-7)]
    assert errors[0] < 1e-3 and errors[1] < 1e-6, errors


@on_ranks
def test_without_replay_a_warning_says_what_the_gradient_means(annotation, caplog):
    net = adaptive("rk", replay_steps=False)
    with caplog.at_level(logging.WARNING, logger="fem_resnet"):
        J, run = recorded(net, annotation)
    assert any("adapted steps are not replayed" in record.message for record in caplog.records) == (COMM_WORLD.rank == 0)
    before = [trace.steps for trace in run._pieces[0].segment.traces()]
    J([m._ad_mul(0.1) for m in point(J)])
    assert [trace.steps for trace in run._pieces[0].segment.traces()] != before


# -- failures --------------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("taped", [False, True], ids=["unrecorded", "recorded"])
@pytest.mark.parametrize(
    "solver_parameters, reason",
    [
        ({}, "NOT_FINITE"),
        ({"ts_type": "cn", "snes_max_it": 1}, "DIVERGED_NONLINEAR_SOLVE"),
        ({"ts_type": "dirk", "snes_max_it": 2}, "DIVERGED_NONLINEAR_SOLVE"),
        ({"ts_type": "rk", "ts_adapt_type": "basic", "ts_max_step_rejections": 0}, "DIVERGED_STEP_REJECTED"),
    ],
    ids=["nan", "newton", "newton carried", "rejected"],
)
def test_a_failing_step_says_where_and_why_and_leaves_the_network_usable(solver_parameters, reason, taped, annotation):
    good = network(solver_parameters=solver_parameters, activation="softplus")
    initial, kernel = good.Y.batch(smooth(good.Y)), good.kernel.get(1)
    for layer in range(3):
        good.kernel.set(layer, 0 * good.kernel.get(layer))
        good.bias.set(layer, 0 * good.bias.get(layer))
    expected = states(good)
    good.kernel.set(1, (1e200 if reason == "NOT_FINITE" else 50.0) * kernel)
    with annotation(taped), pytest.raises(StepFailure, match=r"layer 1, t = 0\.\d") as caught:
        good.run(initial)
    assert (caught.value.layer, caught.value.reason) == (1, reason)
    assert 0.2 <= caught.value.time <= 0.9
    good.kernel.set(1, 0 * kernel)
    with annotation(taped):
        final = good.run(initial).final
    assert_allclose(good.Y.values(final), expected, rtol=0, atol=1e-14)


@on_ranks
def test_a_tape_is_usable_after_an_evaluation_that_failed(annotation):
    net = network(activation="identity")
    J, _ = recorded(net, annotation)
    m = point(J)
    value, expected = J(m), gradient(J)
    with pytest.raises(StepFailure):
        J([part._ad_mul(1e200) for part in m])
    assert J(m) == value
    for one, other in zip(gradient(J), expected):
        assert_array_equal(one, other)


@on_ranks
def test_a_failing_linear_solve_of_the_adjoint_is_a_step_failure(annotation):
    net = network(solver_parameters={"ts_type": "cn", "mat_type": "matfree"})
    J, run = recorded(net, annotation)
    m = point(J)
    value, expected = J(m), gradient(J)
    ksp = run._pieces[0].segment.steppers[1].solver.ts.getSNES().getKSP()
    J(m)
    ksp.setTolerances(rtol=1e-30, max_it=1)
    with pytest.raises(StepFailure, match=r"ADJOINT_DIVERGED_LINEAR_SOLVE in layer 1, t = 0\.9"):
        J.derivative()
    assert J(m) == value
    assert_close(gradient(J), expected, 1e-12)


@on_ranks
def test_a_trial_step_of_a_training_that_fails_keeps_what_was_reached():
    """Newton's iterations run out where the line search goes too far."""
    net = classifier("disk", "CG1", solver_parameters={"ts_type": "cn", "snes_max_it": 4}, size=0.1)
    problem = learning_problem(net, weight=1e-6)
    values = []
    with pytest.raises(StepFailure, match="NONLINEAR_SOLVE") as caught:
        train(
            problem, {"tao_max_it": 300, "tao_type": "lmvm", "tao_ls_type": "unit"},
            monitor=lambda progress: values.append(progress.value),
        )  # fmt: skip
    assert caught.value.layer in range(3)
    assert not annotate_tape()
    assert np.isfinite(problem.evaluate()[0]) and abs(problem.evaluate()[0] - values[-1]) < 1e-12


@pytest.mark.parametrize("in_time", ["layers", "linear"])
@pytest.mark.parametrize("name, stages", [("1fe", 1), ("4", 4)])
def test_a_stage_takes_one_product_with_beta(name, stages, in_time, monkeypatch):
    """TS asks for a stage for its rate, for the quadrature of f, and in the adjoint; also where kernels change in time."""
    Y = Channels(label_space("disk", "CG1"), 2)
    phi, acting, made = laplace_basis(Y, 3), jacobian.acting, []
    options = {"ts_type": "rk", "ts_rk_type": name}
    batch = Batch(Y.batch(np.random.default_rng(3).normal(size=(Y.nodes, 3))), [0, 1, 2])
    monkeypatch.setattr(jacobian, "acting", lambda *arguments: made.append(arguments) or acting(*arguments))
    net, head = ResidualNetwork(Kernel(phi, in_time=in_time), bias=phi, layers=2, solver_parameters=options), Head(phi, 3)
    head.start("random smooth", 2)
    problem = LearningProblem(net, head, cross_entropy, None, batch)
    J = problem.reduced_functional()
    for seed in (1, 4):  # what is known of stages is not known for other coefficients
        net.start("random smooth", seed)
        made.clear()
        J(problem.functions)
        found = gradient(J)
        assert len(made) == 2 * stages
        assert_close(found, gradient(LearningProblem(net, head, cross_entropy, None, batch).reduced_functional()), 1e-13)
