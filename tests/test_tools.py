"""Every tool against every feature of a network or a problem: right, or refused by name.

`fem_resnet.features.TOOLS` says what each tool takes. Here each is called on a problem with one feature after the other.
What a tool does not declare it must refuse, and name itself and the feature; where it declares it, what it returns is held
against something that the tool had no part in: J of the whole problem evaluated, differences of J, (2.8) solved by SciPy
with dense matrices. A feature that is declared wrongly, or lost on the way, makes such a comparison fail.
"""

import inspect
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import firedrake as fd
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import sympy
from helpers import flat_network, label_space, laplace, set_smooth, smooth, with_channels
from numpy.testing import assert_allclose
from problems import gathered
from pyadjoint.enlisting import Enlist

import fem_resnet
from fem_resnet import (
    Adam,
    Batch,
    Box,
    Channels,
    Controls,
    DepthInterpolant,
    Derivatives,
    EnergyMonitor,
    GrowthMonitor,
    Hamiltonian,
    Head,
    LabelSpace,
    LearningProblem,
    Lift,
    LinearisedFlow,
    LocalClosedLoop,
    LocalFeedback,
    LowRankFeedback,
    NormBounded,
    Observations,
    ResidualNetwork,
    RowBox,
    RunningCost,
    autonomous_problem,
    choose_lambda,
    costate_check,
    depth_limit,
    duhamel,
    eigen_expansion,
    energy_conditions,
    energy_step_limit,
    export,
    find_equilibria,
    find_steady_states,
    follow_trajectory,
    frozen_spectra,
    hamiltonian_along,
    hessian_spectrum,
    integrated_norms,
    least_squares,
    lipschitz_bound,
    load,
    middle_pairs,
    msa,
    network_operator,
    observed_decay,
    open_loop_value,
    picard,
    pmp_residual,
    save,
    smoothed_l1,
    solve_costate,
    solve_linearised,
    solve_maximum_principle,
    solve_trajectory,
    stability_estimate,
    stability_report,
    stability_verdict,
    state_array,
    terminal_costate,
    tikhonov,
    to_network,
    train,
    train_by_ranks,
    train_levenberg_marquardt,
    train_pam,
    train_stochastic,
    ufl_functional,
    verify,
    weighted_identity,
    well_posedness_constants,
    width_limit,
)  # fmt: skip
from fem_resnet.export.predict import output
from fem_resnet.features import FEATURES, TOOLS, features_of, supports
from fem_resnet.label_domain.basis import node_numbers
from fem_resnet.theory.limits.residual_network import EULER
from fem_resnet.verify.quantities import forward

DOMAIN = "annulus", "CG1"
TIMES = (0.0, 0.4, 1.0)
f, a = sympy.symbols("f a")

#: For each feature, a network and a problem that have it.
NET = {
    "channels": {},
    "no_layers": {"times": [0.0]},
    "gradient_flow": {"gradient_flow": True},
    "learned_factors": {"learn_factors": True},
    "learned_times": {"learn_times": True},
    "kernel_set": {"kernel_set": NormBounded(4.0)},
    "nodal_bias": {"bias": None},
    "bases_by_layer": {"phi": [3, 5], "psi": [3, 5]},
    "linear_in_time": {"bias_in_time": "linear", "kernel_in_time": "linear"},
    "shared_in_time": {"bias_in_time": "shared", "kernel_in_time": "shared"},
    "adapted_steps": {"solver_parameters": {"ts_adapt_type": "basic", "ts_rtol": 1e-9, "ts_atol": 1e-9}},
    "discrete_gradient": {"solver_parameters": {"ts_type": "discrete_gradient"}},
    "single_precision": {"precision": "single"},
}
PROBLEM = {
    "lift": {},
    "head": {},
    "regulariser": {"regulariser": tikhonov(1.0)},
    "regulariser_not_quadratic": {"regulariser": tikhonov(1.0) + smoothed_l1(0.5, 0.3)},
    "regulariser_not_convex": {
        "regulariser": tikhonov(1.0) + ufl_functional(0.05, lambda a: (a**2 - 0.2) ** 2 * fd.dx, "bias")
    },
    "running": {"running": RunningCost(f**2)},
    "running_of_controls": {"running": RunningCost(f**2 + a**2 / 20, kernel=0.1)},
    "running_of_pairs": {"running": RunningCost(f**2, pairs=sympy.Symbol("b") ** 4 / 4)},
    "ensemble": {},
    "derivatives": {},
    "observed_times": {},
    "checkpoints": {"checkpoints": 1},
    "learned_initial": {"learn": "initial"},
    "learned_both": {"learn": "both"},
    "many_samples": {},
    "weights": {},
}
#: How close to round-off results are, relative to their size.
CLOSE = {"single_precision": 3e-5, "adapted_steps": 1e-6, "discrete_gradient": 1e-7}


def basis(rank, alone=False, channels=False):
    return None if rank is None else (with_channels if channels else laplace)(*DOMAIN, rank, alone)


def network_with(feature=None, alone=False, autonomous=False, **options) -> ResidualNetwork:
    options = {"phi": 3, "bias": 3, "times": TIMES, "steps": 2} | options | NET.get(feature, {})
    if feature in ("adapted_steps", "discrete_gradient") and options.get("layers_per_block") is None:
        options["solver_parameters"] = NET[feature]["solver_parameters"]
    channels = feature == "channels"
    for name in ("phi", "psi", "bias"):
        given = options.get(name)
        listed = isinstance(given, list)
        options[name] = [basis(rank, alone, channels) for rank in given] if listed else basis(given, alone, channels)
    net = flat_network(**options)
    rng = np.random.default_rng(0)
    set_smooth(net, rng, 0.8)
    if autonomous:
        for parameter in (net.bias, net.kernel.learned):
            for k in range(1, len(parameter.functions)):
                if parameter.space_bases[k].shape == parameter.space_bases[0].shape:
                    parameter.set(k, parameter.get(0))
    for parameter in net.factors:  # away from the given ones
        parameter.set(0, parameter.get(0) + 0.2 * smooth(net.Y, parameter.get(0).shape[1], seed=7))
    if net.layer_times is not None:
        net.layer_times.set(0, 1.2 * net.layer_times.get(0))
    return net


def problem_with(
    feature=None, *, net=None, takes=frozenset(FEATURES), alone=False, ensemble=None, chosen=None, headed=False, **options
):
    """A problem with this feature, and no other that the tool does not take; with a head if it needs one."""
    net = network_with(feature, alone, **(net or {}))
    Y, rng = net.Y, np.random.default_rng(1)
    many = feature == "many_samples" or chosen is not None or feature in ("weights", "ensemble") and "many_samples" in takes
    samples = 3 if many else 1
    chosen = slice(None) if chosen is None else chosen
    lift = Lift(Y, 2) if feature == "lift" else None
    if lift is not None:
        lift.start("random", 6)
    fields = Y if lift is None else lift.fields
    inputs = fields.batch(smooth(fields, samples)[:, chosen])
    weights = np.array([1.0, 3.0, 0.5])[:samples][chosen] if feature == "weights" else None
    head = None
    # Without layers a head is all that is learned.
    if headed or feature == "head" or feature == "no_layers" and "head" in takes:
        head = Head(net.bases["psi"][0], basis(3, alone, feature == "channels"), "identity")
        head.W.set(0, rng.normal(size=head.W.space_basis.shape))
        head.mu.set(0, rng.normal(size=head.mu.space_basis.shape))
    # So near that a step of any method stays where layers can be stepped.
    start = inputs if lift is None else lift(inputs)
    output = Y.values(net(start) if head is None else head(net(start)))
    targets = Y.batch(output + 0.2 * smooth(Y, samples, seed=50)[:, chosen])
    given, more = {"regulariser": None} | options | PROBLEM.get(feature, {}), {}
    if feature == "derivatives":
        v, C = (Y.batch(smooth(Y, samples, seed=seed)[:, chosen]) for seed in (3, 4))
        more["derivatives"] = Derivatives(v, C, 0.5)
    if feature == "observed_times":
        more["observations"] = Observations((1,), (Y.batch(smooth(Y, samples, seed=5)[:, chosen]),), (0.5,))
    if feature == "ensemble":
        given["ensemble"] = ensemble or fd.Ensemble(fd.COMM_WORLD, fd.COMM_WORLD.size)
    regulariser, given["lift"] = given.pop("regulariser"), lift
    return LearningProblem(net, head, least_squares, regulariser, Batch(inputs, targets, weights, **more), **given)


# -- what the tools are held against ----------------------------------------------------------------------------------


def value(p) -> float:
    """J with all parts of the problem."""
    return float(p.evaluate()[0])


def moved(functions, h, step):
    """The Functions moved along h, and a function that puts them back."""
    before = [np.array(function.dat.data_ro) for function in functions]
    for function, values, direction in zip(functions, before, h):
        function.dat.data_wo[...] = values + step * direction
    return before


def put_back(functions, before):
    for function, values in zip(functions, before):
        function.dat.data_wo[...] = values


def in_data(function, values, Y):
    """Values at the nodes in the order of a Function's data."""
    return Y.to_data(values).reshape(function.dat.data_ro.shape)


def again(Y):
    """Another label space on the same mesh."""
    return LabelSpace(Y.V) if Y.channels == 1 else Channels(LabelSpace(Y.one.V), Y.channels)


def finer(Y):
    """The label space of a finer mesh."""
    fine = label_space("annulus", "CG1", 2)
    return fine if Y.channels == 1 else Channels(fine, Y.channels)


def slope(of, functions, h, step=1e-4) -> float:
    """The derivative in a direction of a function of the values of Functions, by central differences."""
    values = []
    for sign in (1, -1):
        before = moved(functions, h, sign * step)
        values.append(of())
        put_back(functions, before)
    return (values[0] - values[1]) / (2 * step)


def directions(functions, seed=5):
    """Arrays of the shapes of the Functions."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=function.dat.data_ro.shape) for function in functions]


def pairing(functionals, h, comm) -> float:
    return comm.allreduce(float(sum(np.sum(d.dat.data_ro * v) for d, v in zip(Enlist(functionals), h))))


def layer_at(net, t):
    inputs = net.layer_inputs()
    number = min(int(np.searchsorted(net.times, t, side="right")) - 1, net.layers - 1)
    return inputs[number], (t - inputs[number].start) / inputs[number].length


def dense(net, t):
    """a and the matrix of B at the nodes, at a time; on one rank."""
    layer, s = layer_at(net, t)
    B = layer.factors.phi.values @ layer.beta.coefficients(s) @ (layer.factors.psi.values * net.Y.weights[:, None]).T
    return layer.bias.coefficients(s), B


def right_hand_side(net, layer, s, y):
    w = net.Y.weights[:, None]
    B = layer.factors.phi.values @ layer.beta.coefficients(s) @ (layer.factors.psi.values * w).T
    rate = np.tanh(layer.bias.coefficients(s)[:, None] - B @ y)
    return (B.T @ (w * rate)) / w if net.gradient_flow else rate


def linearised(net, t, y):
    """The matrix of the linearisation at a state, on one rank."""
    bias, B = dense(net, t)
    slopes = 1 - np.tanh(bias[:, None] - B @ y) ** 2
    if not net.gradient_flow:
        return -slopes * B
    w = net.Y.weights[:, None]
    return -(B.T @ (w * slopes * B)) / w


def eigenvalues(matrix, count):
    """Real parts of the largest ones, sorted."""
    values = np.linalg.eigvals(matrix)
    return np.sort(values[np.argsort(-np.abs(values))][:count].real)


def exact(net, initial):
    """f at the layer times by SciPy, on one rank: arrays of shape (nodes, samples)."""
    y = net.Y.values(initial).copy()
    states, shape = [y], y.shape
    for layer in net.layer_inputs():

        def rate(t, y, layer=layer):
            return right_hand_side(net, layer, (t - layer.start) / layer.length, y.reshape(shape)).ravel()

        solution = scipy.integrate.solve_ivp(
            rate, (layer.start, layer.start + layer.length), states[-1].ravel(), method="DOP853", rtol=1e-11, atol=1e-12
        )
        states.append(solution.y[:, -1].reshape(shape))
    return states


def norm(Y, values):
    return np.sqrt(Y.sum(np.sum(Y.weights @ values**2)))


# -- the tools --------------------------------------------------------------------------------------------------------

#: For each tool: whether it takes the network alone, options of the problem, preparations, the call, the check.
RUNS = {}


def runs(*names, call, net_alone=False, before=lambda p: None, **options):
    def decorate(check):
        for name in names:
            RUNS[name] = (net_alone, options, before, call, check)
        return check

    return decorate


on_net = partial(runs, net_alone=True)


@runs("train", call=lambda p: train(p, {"tao_max_it": 3}))
def _train(p, result, close, start):
    assert_allclose(result.value, value(p), rtol=close)
    assert_allclose(result.values[0], start, rtol=close)
    assert result.value < start


def _in_first(p):
    """Take the part of the coefficients that lives in the first function."""
    if not p.net.factors and p.learn != "initial":
        p.net.pad(p.net.in_first(1))
        if p.head is not None:
            p.head.pad(p.head.in_first(1))


def _by_ranks(p):
    bases = [basis for bases in p.net.bases.values() for basis in bases if basis is not None]
    return train_by_ranks(p, (1, max(basis.one.rank for basis in bases)), lambda stage: train(stage, {"tao_max_it": 3}))


@runs("train_by_ranks", before=_in_first, call=_by_ranks)
def _train_by_ranks(p, results, close, start):
    first, last = results
    assert_allclose(first.values[0], start, rtol=close)
    assert_allclose(last.values[0], first.value, rtol=close)
    assert_allclose(last.value, value(p), rtol=close)
    assert last.value < start


def _two_steps(p):
    return train(p, {"tao_max_it": 2})


def _with_noise(p):
    """The noise is the misfit with the second lambda."""
    before = [np.array(function.dat.data_ro) for function in p.functions]
    for weight in (3.0, 0.1):
        _two_steps(p.replace(regulariser=weight * p.regulariser))
    noise = 1.001 * value(p.replace(regulariser=None))  # one percent is near enough
    put_back(p.functions, before)
    return choose_lambda(p, [3.0, 0.1], _two_steps, rule="discrepancy", noise=noise)


@runs("choose_lambda", regulariser=tikhonov(1.0), call=_with_noise)
def _choose_lambda(p, found, close, start):
    assert_allclose(found.chosen, 0.1)
    assert_allclose(found.misfits[-1], value(p.replace(regulariser=None)), rtol=close)
    assert_allclose(value(found.problem), found.misfits[-1] + 0.1 * found.penalties[-1], rtol=close)
    assert_allclose(value(found.problem), found.results[-1].value, rtol=close)
    assert found.misfits[-1] < found.misfits[0]


@runs("train_stochastic", call=lambda p: train_stochastic(p, Adam(1e-3), batch_size=1, epochs=2))
def _train_stochastic(p, result, close, start):
    assert_allclose(result.value, value(p), rtol=close)
    assert_allclose(result.values[0], start, rtol=close)
    assert result.value < start


@runs(
    "train_levenberg_marquardt",
    headed=True,
    regulariser=tikhonov(1.0),
    call=lambda p: train_levenberg_marquardt(p, iterations=2),
)
def _train_levenberg_marquardt(p, result, close, start):
    _train(p, result, close, start)


@runs("train_pam", call=lambda p: train_pam(p, iterations=1))
def _train_pam(p, result, close, start):
    _train(p, result, close, start)


@runs("train_pam, batches", call=lambda p: train_pam(p, iterations=1, batches=[p.batch]))
def _train_pam_by_batches(p, result, close, start):
    _train(p, result, close, start)


@runs("LearningProblem.exchange", call=lambda p: _exchanged(p))
def _exchange(p, result, close, start):
    J, other = result
    assert_allclose(J(p.functions), value(p.replace(batch=other)), rtol=close)
    assert_allclose(value(p), value(p.replace(batch=other)), rtol=close)
    assert abs(value(p) - start) > 1e-3 * start


def _exchanged(p):
    J = p.reduced_functional()
    Y, batch = p.net.Y, p.batch
    weights = None if batch.weights is None else np.asarray(batch.weights)[::-1] + 1
    fields = Y if p.lift is None else p.lift.fields
    other = Batch(fields.batch(0.5 * fields.values(batch.inputs) + 0.1), Y.batch(Y.values(batch.targets) + 0.2), weights)
    p.exchange(other)
    return J, other


def _reached_targets(p):
    """Targets that are reached: the Hessian of the loss is then that of Gauss and Newton."""
    run = p.net.run(p.initial_state())
    output = run.final if p.head is None else p.head(run.final)
    p.batch.targets.assign(output)
    if p.observations is not None:
        for layer, targets in zip(p.observations.layers, p.observations.targets):
            targets.assign(run.state(layer))


@runs("Gauss-Newton", before=_reached_targets, call=lambda p: p.record(gauss_newton=True)[0])
def _gauss_newton(p, J, close, start):
    m = [function.copy(deepcopy=True) for function in p.functions]
    h = [fd.Function(function.function_space()) for function in m]
    for function, values in zip(h, directions(h)):
        function.dat.data_wo[...] = 0.1 * values
    actions = []
    for functional in (J, p.reduced_functional()):
        functional(m)
        functional.derivative()
        actions.append(pairing(functional.hessian(h), [v.dat.data_ro for v in h], p.net.Y.comm))
    assert_allclose(*actions, rtol=max(close, 1e-6))
    assert actions[0] > 0


@runs("eliminate", headed=True, regulariser=tikhonov(1.0), call=lambda p: p.record(eliminate="head")[0])
def _eliminate(p, J, close, start):
    m = [function for parameter in J.parameters for function in parameter.functions]
    found, derivative = float(J(m)), [np.array(d.dat.data_ro) for d in Enlist(J.derivative())]
    J.give_head()
    assert found < start
    assert_allclose(found, value(p), rtol=close)
    # At the minimum in W and mu the derivative of the whole J is zero there, and the same elsewhere.
    whole = p.reduced_functional()
    whole(p.functions)
    expected = {f: d.dat.data_ro for f, d in zip(p.functions, Enlist(whole.derivative()))}
    size = max(p.net.Y.comm.allgather(max(np.abs(d).max(initial=0) for d in expected.values())))
    for function, d in zip(m, derivative):
        assert_allclose(d, expected.pop(function), rtol=0, atol=max(close, 1e-10) * size)
    assert len(expected) == 2
    for d in expected.values():
        assert_allclose(d, 0, atol=max(close, 1e-10) * size)
    single = p.net.settings.precision == "single"
    h = [0.3 * v for v in directions(m)]
    along = p.net.Y.comm.allreduce(float(sum(np.sum(d * v) for d, v in zip(derivative, h))))
    assert_allclose(along, slope(lambda: float(J(m)), m, h, 1e-2 if single else 1e-4), rtol=1e-2 if single else 1e-5)


@runs("hessian_spectrum", net={"steps": 1}, call=lambda p: hessian_spectrum(p, 1))
def _hessian_spectrum(p, found, close, start):
    loss = p.replace(regulariser=None)
    single = p.net.settings.precision == "single"
    step = 0.05 if single else 3e-3
    m = loss.functions
    for mu, direction in zip(found.values, found.directions):
        h = [function.dat.data_ro for function in direction]
        values = [value(loss)]
        for sign in (1, -1):
            before = moved(m, h, sign * step)
            values.append(value(loss))
            put_back(m, before)
        second = (values[1] + values[2] - 2 * values[0]) / step**2
        assert_allclose(mu, second, rtol=5e-2 if single else 2e-3)


def _near(p, size):
    """The problem's inputs moved by so much."""
    Y = p.net.Y
    return Y.batch(Y.values(p.batch.inputs) + size * smooth(Y, p.batch.samples, seed=9))


def _change_of_gradient(p, inputs, controls):
    """The change of the gradient of J in the parameters, at these inputs and controls."""
    gradients = []
    for batch, values in ((p.batch, p.functions), (Batch(inputs, p.batch.targets, p.batch.weights), controls)):
        J = p.replace(batch=batch).reduced_functional()
        J([value.copy(deepcopy=True) for value in values])
        gradients.append([np.array(part.dat.data_ro) for part in Enlist(J.derivative())])
    return p.net.Y.comm.allreduce(float(sum(np.sum((x - y) ** 2) for x, y in zip(*gradients)))) ** 0.5


def _nearly_reached_targets(p):
    """J_uu is then that of Gauss and Newton and the regulariser's, nearly: positive definite."""
    _reached_targets(p)
    targets = p.batch.targets
    targets.assign(p.net.Y.batch(p.net.Y.values(targets) + 0.02 * smooth(p.net.Y, p.batch.samples, seed=50)))


# The formulas are compared with differences of the gradient of J, which need no minimum.
feedback_of = partial(runs, regulariser=tikhonov(10.0), before=_nearly_reached_targets, net={"steps": 1})


@feedback_of("LocalFeedback", call=lambda p: LocalFeedback(p, gradient_tolerance=1e9))
def _local_feedback(p, feedback, close, start):
    assert_allclose(feedback.value, start, rtol=close)
    single = p.net.settings.precision == "single"
    w = smooth(p.net.Y, p.batch.samples, seed=9)
    expected = slope(lambda: value(p), [p.batch.inputs], [in_data(p.batch.inputs, w, p.net.Y)], 0.05 if single else 1e-3)
    found = p.net.Y.inner(feedback.gradient, p.net.Y.batch(w))
    assert_allclose(found, expected, rtol=0.1 if single else 1e-3, atol=1e-8)
    inputs = _near(p, 0.1 if single else 1e-2)
    assert _change_of_gradient(p, inputs, feedback(inputs)) < 0.2 * _change_of_gradient(p, inputs, p.functions)


@feedback_of("LowRankFeedback", call=lambda p: LowRankFeedback(LocalFeedback(p, gradient_tolerance=1e9)))
def _low_rank_feedback(p, many, close, start):
    one, inputs, rtol = many._feedback, _near(p, 0.1), 1e-2 if p.net.settings.precision == "single" else 1e-6
    for found, expected, basis in zip(many(inputs), one(inputs), many._coefficients.bases):
        assert_allclose(found[0], basis.read(expected), atol=rtol)
    assert_allclose(many.predicted_values(inputs)[0], one.predicted_value(inputs), rtol=rtol)


@feedback_of("LocalClosedLoop", call=lambda p: LocalClosedLoop(p, gradient_tolerance=1e9))
def _local_closed_loop(p, loop, close, start):
    assert_allclose(loop.feedbacks[0].value, start, rtol=close)
    state = p.batch.inputs  # from here it takes the controls that are there, and goes where they went
    for layer in range(p.net.layers):
        _, state = loop.step(layer, state)
    assert_allclose(p.net.Y.values(state), p.net.Y.values(p.net(p.batch.inputs)), atol=max(10 * close, 1e-6))
    inputs = _near(p, 0.1 if p.net.settings.precision == "single" else 1e-2)
    assert _change_of_gradient(p, inputs, loop(inputs)) < 0.2 * _change_of_gradient(p, inputs, p.functions)


@runs("costate_check", call=lambda p: costate_check(p, refinements=(1, 2)))
def _costate_check(p, check, close, start):
    if check.partner_costate:
        assert max(check.partner_costate + check.partner_gradient) < 10 * close
    if p.net.settings.precision != "single":
        assert check.costate[1] < 0.4 * check.costate[0] < 0.1
        assert check.gradient[1] < 0.4 * check.gradient[0] < 0.1


@runs("terminal_costate", call=lambda p: terminal_costate(p, p.net.run(p.initial_state()).final))
def _terminal_costate(p, r, close, start):
    # The gradient in f_I of the problem without layers whose inputs are f(T).
    last = Batch(p.net.run(p.initial_state()).final, p.batch.targets, p.batch.weights)
    loss = p.replace(
        net=ResidualNetwork(p.net.bases["phi"][0], layers=[0.0]),
        batch=last,
        lift=None,
        learn="initial",
        regulariser=None,
        running=None,
        checkpoints=None,
    )
    w = smooth(p.net.Y, p.batch.samples, seed=9)
    expected = slope(lambda: value(loss), [last.inputs], [in_data(last.inputs, w, p.net.Y)])
    assert_allclose(p.net.Y.inner(r, p.net.Y.batch(w)), expected, rtol=1e-6)


def _run_of(p):
    """A run on a tape whose J has been differentiated."""
    J, run = p.replace(checkpoints=None).record()
    J.derivative()
    return run


def _pairs_of(net):
    """A run whose J has been differentiated, with what is asked of it."""
    run = _run_of(LearningProblem(net, None, least_squares, None, Batch(state(net), state(net, 50)), learn="both"))
    return Hamiltonian(net.Y, net.activation, "minimise"), run


@on_net("middle_pairs", net={"steps": 4}, call=lambda net: (middle_pairs(_pairs_of(net)[1], "minimise"), _pairs_of(net)))
def _middle_pairs(net, result, close, start):
    pairs, (H, run) = result
    for layer, pair in enumerate(pairs):
        for found, ends in ((pair.f, run.state), (pair.r, run.costate)):
            assert_allclose(found, sum(net.Y.values(ends(l)) for l in (layer, layer + 1)) / 2, atol=1e-12)


@on_net("hamiltonian_along", net={"steps": 4}, call=lambda net: hamiltonian_along(*_pairs_of(net)[::-1]))
def _hamiltonian_along(net, along, close, start):
    if net.bias.time_basis.description != "linear":  # it is constant where controls are
        assert np.abs(along[:, 1] - along[:, 0]).max() < 1e-3 * np.abs(along).max()
    bias, B = dense(net, 0.0)
    run = _pairs_of(net)[1]
    f_t = np.tanh(bias[:, None] - B @ smooth(net.Y, 1))
    assert_allclose(along[0, 0], net.Y.weights @ (f_t * net.Y.values(run.costate(0)))[:, 0], rtol=1e-4)


@runs("Hamiltonian.of", net={"steps": 4}, call=lambda p: (Hamiltonian.of(p, "minimise"), _run_of(p)))
def _along(p, result, close, start):
    H, run = result
    along = hamiltonian_along(run, H)
    if p.net.bias.time_basis.description != "linear":  # H is constant where controls are
        assert np.abs(along[:, 1] - along[:, 0]).max() < 1e-3 * np.abs(along).max()
    _slope_is_that_of_H(p.replace(checkpoints=None), H)


def _slope_is_that_of_H(p, H):
    """J's derivative in a is the integral of H_a, here by the middles of the layers: J has (a, b) in H alone."""
    net, Y = p.net, p.net.Y
    h = directions(net.bias.functions, seed=8)
    expected, found = slope(lambda: value(p), net.bias.functions, h), 0.0
    for layer, (tau, pair) in enumerate(zip(np.diff(net.times), middle_pairs(_run_of(p), "minimise"))):
        before = moved(net.bias.functions, h, 1.0)
        there = Controls.of_layer(net, layer).a
        put_back(net.bias.functions, before)
        here = Controls.of_layer(net, layer)
        found += tau * Y.sum(Y.weights @ (H.in_a(pair, here) * (there - here.a)))
    linear = net.bias.time_basis.description == "linear"  # the middle then stands for more
    assert_allclose(found, expected, rtol=0.5 if linear else 0.1)


@runs("pmp_residual", call=lambda p: pmp_residual(p, Box((-9, 9), (-9, 9))))
def _pmp_residual(p, residual, close, start):
    H = Hamiltonian.of(p, "minimise")
    _slope_is_that_of_H(p, H)
    run = _run_of(p)
    Y, upper = p.net.Y, 0.0
    ends = [(Y.values(run.state(l)), -Y.values(run.costate(l))) for l in range(p.net.layers + 1)]
    for layer, tau in enumerate(np.diff(p.net.times)):
        state, r = ((x + y) / 2 for x, y in zip(ends[layer], ends[layer + 1]))
        t = (p.net.times[layer] + p.net.times[layer + 1]) / 2
        bias, B = dense(p.net, t)
        if H.charges_controls:
            best, cost = _best_with_cost(p, state[:, 0], r[:, 0]), _cost_of_controls(p, bias, B)
        else:
            T = 9 * (1 + Y.weights @ np.abs(state))
            best, cost = np.maximum(np.tanh(T) * r, np.tanh(-T) * r).sum(axis=1), 0.0
        upper += tau * (Y.weights @ (best + cost - (np.tanh(bias[:, None] - B @ state) * r).sum(axis=1)))
    assert_allclose(residual.absolute[1], upper, rtol=1e-4 if p.net.settings.precision == "single" else 1e-6)


def _weights_of_controls(p):
    """c_2 and kappa: what half the squares of a and b cost. The problems here have no other cost of (a, b)."""
    tikhonov_of_all = 0.0 if p.regulariser is None else 1.0
    return (tikhonov_of_all + 0.1 * (p.running is not None), tikhonov_of_all + 0.1 * (p.running is not None))


def _cost_of_controls(p, bias, B):
    c_2, kappa = _weights_of_controls(p)
    b = B / p.net.Y.weights
    return c_2 / 2 * bias**2 + kappa / 2 * b**2 @ p.net.Y.weights


def _best_with_cost(p, state, r):
    """max over (a, b) of r tanh(u) - cost at each node, where the ends +-9 are far away.

    The cheapest (a, b) of a given u cost u^2 / (2 (1 / c_2 + |f|^2 / kappa)).
    """
    c_2, kappa = _weights_of_controls(p)
    reach = 1 / c_2 + p.net.Y.weights @ state**2 / kappa
    u = np.linspace(-1, 1, 20001)[:, None] * np.abs(r) * reach
    best = u[np.argmax(r * np.tanh(u) - u**2 / (2 * reach), axis=0), np.arange(r.size)]
    for _ in range(20):  # Newton's method for the slope in u
        T = np.tanh(best)
        slope, bend = r * (1 - T**2) - best / reach, -2 * r * T * (1 - T**2) - 1 / reach
        best = best - slope / bend
    return r * np.tanh(best) - best**2 / (2 * reach)


def _by_msa(p, result, close, start):
    _slope_is_that_of_H(p, Hamiltonian.of(p, "minimise"))
    assert_allclose(result.value, value(p.replace(net=result.problem.net)), rtol=close)
    assert_allclose(result.values[0], start, rtol=max(close, 1e-7))
    assert result.value <= result.values[0]
    assert set(features_of(result.problem)) - {"nodal_bias", "bases_by_layer"} == set(features_of(p)) - {
        "nodal_bias", "bases_by_layer"
    }  # fmt: skip


def _rows(net):
    """Rows in the basis of the layers; no set of rows holds those of several bases."""
    return RowBox(net.bases["psi"][0], (-9, 9), (-9, 9)) if len(net.bases["psi"]) == 1 else Box((-9, 9), (-9, 9))


@runs("msa", call=lambda p: msa(p, _rows(p.net), iterations=1))
def _msa(p, result, close, start):
    _by_msa(p, result, close, start)


@runs("msa, A pointwise", call=lambda p: msa(p, Box((-9, 9), (-9, 9)), iterations=1))
def _msa_pointwise(p, result, close, start):
    _by_msa(p, result, close, start)


@runs("open_loop_value", call=lambda p: open_loop_value(p, Box((-9, 9), (-9, 9)), starts=1, iterations=1))
def _open_loop_value(p, found, close, start):
    assert_allclose(found.value, value(p.replace(net=found.problem.net)), rtol=close)
    assert found.value <= start * (1 + max(close, 1e-7)) and found.values.tolist() == [found.value]
    w = smooth(p.net.Y, 1, seed=9)
    single = p.net.settings.precision == "single"
    expected = slope(
        lambda: value(found.problem), [p.batch.inputs], [in_data(p.batch.inputs, w, p.net.Y)], 0.05 if single else 1e-3
    )
    slope_found = p.net.Y.inner(found.gradient, p.net.Y.batch(w))
    assert_allclose(slope_found, expected, rtol=0.1 if single else 1e-3, atol=1e-8)


def _by_the_coupled_system(p, result, close, start):
    """J that the system's own sweep has is that of the whole problem, with the controls found."""
    assert result.converged, result
    assert_allclose(result.value, value(p.replace(net=result.problem.net)), rtol=close)
    assert_allclose(result.stages[-1].value, result.value, rtol=1e-9)
    assert set(features_of(result.problem)) - {"nodal_bias", "bases_by_layer"} == set(features_of(p)) - {
        "nodal_bias", "bases_by_layer"
    }  # fmt: skip


def _wide(A):
    return lambda p: solve_maximum_principle(p, A(p.net), smoothing=1e3)


def _small_rows(net):
    return RowBox(net.bases["psi"][0], (-0.5, 0.5), (-0.5, 0.5))


@runs(
    "solve_maximum_principle",
    call=_wide(lambda net: _small_rows(net) if len(net.bases["psi"]) == 1 else Box((-1, 1), (-1, 1))),
)
def _coupled(p, result, close, start):
    _by_the_coupled_system(p, result, close, start)


@runs("solve_maximum_principle, A pointwise", call=_wide(lambda net: Box((-0.5, 0.5), (-0.5, 0.5))))
def _coupled_pointwise(p, result, close, start):
    _by_the_coupled_system(p, result, close, start)


@runs("verify", call=lambda p: verify(p, quick=True))
def _verify(p, report, close, start):
    assert report.passed, report


# -- tools that are given a network ----------------------------------------------------------------------------------


def state(net, seed=0):
    return net.Y.batch(smooth(net.Y, 1, seed=seed))


def of_net(net):
    return net.Y.values(net(state(net)))


@on_net("Controls.of_layer", call=lambda net: Controls.of_layer(net, 1, 0.25))
def _controls(net, controls, close, start):
    t = net.times[1] + 0.25 * (net.times[2] - net.times[1])
    bias, B = dense(net, t)
    y = net.Y.values(state(net))
    assert_allclose(controls.argument(net.Y, y), bias[:, None] - B @ y, atol=1e-12)


@on_net("ResidualNetwork.on", call=lambda net: net.on(again(net.Y)))
def _on(net, other, close, start):
    """Another label space on the same mesh: nothing may change."""
    assert other.Y is not net.Y
    assert_allclose(of_net(other), of_net(net), atol=10 * close)
    assert set(features_of(other)) == set(features_of(net))


@on_net("ResidualNetwork.in_first", call=lambda net: net.in_first(1))
def _in_the_first_function(net, other, close, start):
    assert [basis.one.rank for basis in (*other.bases["phi"], *other.bases["psi"])] == [1] * 2 * len(net.bases["phi"])

    def kept(coefficients):
        """The coefficients with those of the first function in each channel alone."""
        first = [np.arange(size) % (size // net.Y.channels) == 0 for size in coefficients.shape]
        return np.where(np.logical_and.outer(*first) if len(first) == 2 else first[0], coefficients, 0.0)

    for k in range(len(net.kernel.functions)):
        whole = kept(net.kernel.get(k))
        assert_allclose(other.kernel.get(k).ravel(), whole[whole != 0], atol=10 * close)
        net.kernel.set(k, whole)
    for k in range(len(net.bias.space_bases)):
        if net.bases["bias"] != (None,):
            net.bias.set(k, kept(net.bias.get(k)))
    assert_allclose(of_net(other), of_net(net), atol=10 * close)
    assert set(features_of(other)) == set(features_of(net))


@on_net("ResidualNetwork.truncated", call=lambda net: net.truncated(0.0))
def _truncated(net, other, close, start):
    assert_allclose(of_net(other), of_net(net), atol=10 * close)
    # A factorisation by singular functions leaves any set of kernels.
    assert set(features_of(other)) == set(features_of(net)) - {"kernel_set"}


@on_net("save", call=lambda net: _saved(net))
def _save(net, loaded, close, start):
    other, _ = loaded
    mine, theirs = (gathered(each.Y, of_net(each)) for each in (net, other))
    assert_allclose(theirs, mine, atol=10 * close)
    assert set(features_of(other)) == set(features_of(net))


def _saved(net):
    with TemporaryDirectory() as folder:
        save(Path(folder) / "net.h5", net)
        return load(Path(folder) / "net.h5", net.Y.comm)


@on_net("export", call=lambda net: _exported(net))
def _export(net, arrays, close, start):
    inputs = state_array(net.Y, state(net)).T
    assert_allclose(output(arrays, inputs).T[node_numbers(net.Y)], of_net(net), atol=10 * close)


def _exported(net):
    with TemporaryDirectory() as folder:
        export(net, None, Path(folder) / "net.npz")
        return dict(np.load(Path(folder) / "net.npz"))


def _against_scipy(net, final, close, start, tolerance=1e-6):
    assert_allclose(net.Y.values(final), exact(net, state(net))[-1], atol=tolerance)


@on_net("solve_trajectory", call=lambda net: solve_trajectory(net, state(net)))
def _solve_trajectory(net, trajectory, close, start):
    _against_scipy(net, trajectory.final, close, start)


@on_net("follow_trajectory", call=lambda net: follow_trajectory(net, state(net), lambda layer, step: None, steps=16))
def _follow_trajectory(net, final, close, start):
    _against_scipy(net, final, close, start)


@on_net("picard", call=lambda net: picard(net, state(net)))
def _picard(net, solution, close, start):
    _against_scipy(net, solution.final, close, start, 1e-9)


@on_net("solve_costate", call=lambda net: solve_costate(solve_trajectory(net, state(net)), state(net, 3)))
def _solve_costate(net, costate, close, start):
    w, step, Y = smooth(net.Y, 1, seed=9), 1e-4, net.Y
    ends = [exact(net, Y.batch(Y.values(state(net)) + sign * step * w))[-1] for sign in (1, -1)]
    expected = Y.weights @ (Y.values(state(net, 3)) * (ends[0] - ends[1]))[:, 0] / (2 * step)
    assert_allclose(Y.inner(costate.at_layer(0), Y.batch(w)), expected, rtol=1e-5)


@on_net("solve_linearised", call=lambda net: solve_linearised(solve_trajectory(net, state(net)), state(net, 9)))
def _solve_linearised(net, w, close, start):
    step, Y = 1e-4, net.Y
    ends = [exact(net, Y.batch(Y.values(state(net)) + sign * step * Y.values(state(net, 9))))[-1] for sign in (1, -1)]
    assert_allclose(Y.values(w), (ends[0] - ends[1]) / (2 * step), atol=1e-5)


def _moved_controls(net):
    functions = [*net.bias.functions, *net.kernel.functions]
    h = [fd.Function(function.function_space()) for function in functions]
    for function, values in zip(h, directions(h)):
        function.dat.data_wo[...] = values
    return h


@on_net("duhamel", call=lambda net: duhamel(solve_trajectory(net, state(net)), _moved_controls(net)))
def _duhamel(net, w, close, start):
    if net.settings.kernel.among is not None:  # the same coefficients, free
        free = net.replace(kernel=replace(net.settings.kernel, among=None))
        for parameter, other in ((net.bias, free.bias), (net.kernel, free.kernel)):
            for k in range(len(parameter.functions)):
                other.set(k, parameter.get(k))
    else:
        free = net
    functions, h = [*free.bias.functions, *free.kernel.functions], [v.dat.data_ro for v in _moved_controls(net)]
    expected = slope(lambda: exact(free, state(net))[-1], functions, h)
    assert_allclose(net.Y.values(w), expected, atol=1e-4)


@on_net("weighted_identity", call=lambda net: weighted_identity(solve_trajectory(net, state(net)), state(net, 9)))
def _weighted_identity(net, identity, close, start):
    assert np.abs(identity.defect).max(initial=0.0) < 1e-4


@on_net("autonomous_problem", call=lambda net: autonomous_problem(net, at=0.3))
def _autonomous(net, problem, close, start):
    bias, B = dense(net, 0.3)
    y = net.Y.values(state(net))
    assert_allclose(problem.argument(y), bias[:, None] - B @ y, atol=1e-12)


@on_net("find_steady_states", call=lambda net: find_steady_states(net, at=0.3))
def _steady_states(net, states, close, start):
    _autonomous(net, states.problem, close, start)


@on_net("find_equilibria", call=lambda net: find_equilibria(net, at=0.3))
def _equilibria(net, equilibria, close, start):
    _autonomous(net, equilibria.problem, close, start)
    bias, B = dense(net, 0.3)
    y = net.Y.values(state(net))
    expected = np.tanh(bias[:, None] - B @ y)
    assert_allclose(
        net.Y.values(equilibria.velocity(state(net))),
        _adjoint(net, B) @ expected if net.gradient_flow else expected,
        atol=1e-10,
    )


def _adjoint(net, B):
    """B^T in the label measure."""
    return B.T * net.Y.weights / net.Y.weights[:, None]


def _generator(net, t):
    """K of u_t = -K sigma(u): B, or B B^T."""
    B = dense(net, t)[1]
    return B @ _adjoint(net, B) if net.gradient_flow else B


def _rates(net, t):
    """sigma'(0) min Re of the eigenvalues of K that are not 0."""
    values = np.linalg.eigvals(_generator(net, t))
    return values[np.argsort(-np.abs(values))][: layer_at(net, t)[0].factors.phi.rank]


@on_net("stability_verdict", call=lambda net: stability_verdict(net, at=0.3))
def _stability(net, stability, close, start):
    _autonomous(net, stability.problem, close, start)
    assert_allclose(stability.rate, _rates(net, 0.3).real.min(), atol=1e-8)


@on_net("eigen_expansion", call=lambda net: eigen_expansion(net, state(net, 9), at=0.3))
def _eigen_expansion(net, expansion, close, start):
    B = dense(net, 0.3)[1]
    expected = scipy.linalg.expm(-0.5 * (_adjoint(net, B) @ B if net.gradient_flow else B)) @ net.Y.values(state(net, 9))
    assert_allclose(net.Y.values(expansion(0.5)), expected, atol=1e-8)


@on_net("observed_decay", net={"autonomous": True}, call=lambda net: observed_decay(net, state(net)))
def _observed_decay(net, decay, close, start):
    assert_allclose(decay.times, net.times)
    assert_allclose(decay.predicted, _rates(net, 0.3).real.min(), atol=1e-8)


@on_net("frozen_spectra", call=lambda net: frozen_spectra(net, state(net)))
def _frozen_spectra(net, spectra, close, start):
    _frozen_eigenvalues(net, spectra.eigenvalues[1][0], close, start)


@on_net("energy_conditions", call=energy_conditions)
def _energy_conditions(net, conditions, close, start):
    B = dense(net, 0.0)[1]
    root = np.sqrt(net.Y.weights)
    symmetric = np.linalg.eigvalsh((S := root[:, None] * B / root) / 2 + S.T / 2)[0]
    reason = conditions["B_s >= 0"].reason
    assert float(re.search(r"is (\S+)$", reason)[1]) == pytest.approx(min(symmetric, 0.0), rel=1e-2, abs=1e-10)


@on_net("EnergyMonitor", call=lambda net: EnergyMonitor(net).watch(net.run(state(net))))
def _energy_monitor(net, monitor, close, start):
    bias, B = dense(net, net.times[-1])
    u = bias - B @ of_net(net)[:, 0]
    assert_allclose(monitor.values("primitive")[-1], net.Y.weights @ np.log(np.cosh(u)), rtol=1e-6)


@on_net("energy_step_limit", net={"autonomous": True}, call=energy_step_limit)
def _energy_step_limit(net, limit, close, start):
    bias, B = dense(net, 0.0)
    w = np.sqrt(net.Y.weights)
    S = w[:, None] * B / w
    U, s, V = np.linalg.svd(S)
    rank = net.bases["phi"][0].rank
    inverse = np.linalg.inv(U[:, :rank].T @ S @ U[:, :rank])
    assert_allclose(limit.kappa, np.linalg.eigvalsh((inverse + inverse.T) / 2)[0], rtol=1e-6)


@on_net("GrowthMonitor", call=lambda net: GrowthMonitor(net).watch(net.run(state(net))))
def _growth_monitor(net, monitor, close, start):
    bounded, _, gronwall = monitor.bounds()
    first, Y = net.Y.values(state(net)), net.Y
    assert_allclose(bounded.values[-1], norm(Y, first) + Y.measure**0.5 * net.times[-1], rtol=1e-8)
    assert_allclose(monitor.norms()[-1], norm(Y, of_net(net)), rtol=1e-6)
    assert gronwall.ratio <= 1 + 1e-12


def _integral(net, of):
    """int of(t) dt by Gauss's rule on parts of the layers."""
    points, weights = np.polynomial.legendre.leggauss(20)
    total = 0.0
    for start, end in zip(net.times, net.times[1:]):
        total += (end - start) / 2 * sum(c * of((start + end) / 2 + (end - start) / 2 * x) for x, c in zip(points, weights))
    return total


def _hilbert_schmidt(net, t):
    w = net.Y.weights
    return np.sqrt(w @ (dense(net, t)[1] ** 2 / w) @ np.ones_like(w))


@on_net("integrated_norms", call=lambda net: integrated_norms(net, "hs"))
def _integrated_norms(net, norms, close, start):
    assert_allclose(norms[-1], _integral(net, partial(_hilbert_schmidt, net)), rtol=1e-6)


@on_net("well_posedness_constants", call=well_posedness_constants)
def _well_posedness(net, constants, close, start):
    assert norm(net.Y, of_net(net)) <= np.ravel(constants.solution_bound(norm(net.Y, smooth(net.Y, 1))))[-1] * (1 + 1e-9)
    if net.gradient_flow:
        return  # other constants
    _integrated_norms(net, constants.C_2, close, start)
    assert_allclose(constants.C_1[-1], _integral(net, lambda t: norm(net.Y, dense(net, t)[0][:, None])), rtol=1e-6)


@on_net("stability_estimate", call=lambda net: stability_estimate(net, state(net), state(net, 9)))
def _stability_estimate(net, estimate, close, start):
    apart = norm(net.Y, of_net(net) - net.Y.values(net(state(net, 9))))
    assert_allclose(estimate.distances[-1], apart, rtol=1e-4)
    _well_posedness(net, estimate.constants, close, start)
    assert (estimate.ratios <= 1 + 1e-9).all()


@on_net("lipschitz_bound", call=lipschitz_bound)
def _lipschitz_bound(net, bound, close, start):
    apart = norm(net.Y, of_net(net) - net.Y.values(net(state(net, 9))))
    assert apart <= bound.discrete * (1 + 1e-6) * norm(net.Y, smooth(net.Y, 1) - smooth(net.Y, 1, seed=9))
    w = np.sqrt(net.Y.weights)
    for layer, found in enumerate(bound.norms):
        ends = net.times[layer], net.times[layer + 1] * (1 - 1e-14)
        largest = max(np.linalg.norm(w[:, None] * dense(net, t)[1] / w, 2) for t in ends)
        assert_allclose(found, largest, rtol=1e-8)


@on_net("depth_limit", call=lambda net: depth_limit(net, state(net), halvings=1))
def _depth_limit(net, found, close, start):
    run = net.run(state(net))
    far = max(norm(net.Y, net.Y.values(run.state(l)) - y) for l, y in enumerate(exact(net, state(net))))
    assert_allclose(found.errors[0], far, rtol=0.2 if net.settings.precision == "single" else 1e-3)


@on_net(
    "width_limit",
    call=lambda net: width_limit(net, lambda x: np.cos(x[:, :1]), [net.Y, finer(net.Y)]),
)
def _width_limit(net, found, close, start):
    fine = net.on(finer(net.Y))
    moments = [
        each.bases["phi"][-1].project(each.Y.values(each(each.Y.batch(np.cos(each.Y.coordinates[:, :1])))))
        for each in (net.on(net.Y), fine)
    ]
    assert_allclose(found.errors[0], np.linalg.norm(moments[0] - moments[1]), rtol=1e-6)
    assert found.errors[0] < 0.2


@on_net("DepthInterpolant", net={"solver_parameters": EULER, "steps": 1}, call=lambda net: DepthInterpolant(net, state(net)))
def _depth_interpolant(net, z, close, start):
    f, Y = net.Y.values(state(net)), net.Y
    bias, B = (sum(parts) / 2 for parts in zip(*(dense(net, t + 1e-14) for t in net.times[:2])))
    middles = (net.times[:-1] + np.array(net.times[1:])) / 2
    moved = f + (middles[1] - middles[0]) * np.tanh(bias[:, None] - B @ f)
    assert_allclose(Y.values(z(middles[0])), f)
    assert_allclose(Y.values(z(middles[1])), moved, atol=10 * close)
    assert_allclose(Y.values(z(net.times[-1])), of_net(net), atol=10 * close)


@on_net("to_network", net={"solver_parameters": EULER}, call=to_network)
def _to_network(net, arrays, close, start):
    z = net.Y.values(state(net))[np.argsort(node_numbers(net.Y))]
    for bias, B, tau in zip(*arrays):
        z = z + tau * np.tanh(bias[:, None] - B @ z)
    assert_allclose(z[node_numbers(net.Y)], of_net(net), atol=10 * close)


@on_net("network_operator", call=lambda net: fd.assemble(network_operator(net, state(net))))
def _network_operator(net, found, close, start):
    assert_allclose(net.Y.values(found), of_net(net), atol=10 * close)


@on_net("LinearisedFlow", call=lambda net: LinearisedFlow(net, state(net)))
def _linearised_flow(net, flow, close, start):
    step, Y = 0.03 if net.settings.precision == "single" else 1e-3, net.Y
    ends = [Y.values(net(Y.batch(smooth(Y, 1) + sign * step * smooth(Y, 1, seed=9)))) for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * step)
    assert_allclose(Y.values(flow.tangent(state(net, 9))), expected, atol=1e-3 if net.settings.precision == "single" else 1e-5)
    exponent = flow.exponent()
    assert np.log(flow.propagator().norm) <= exponent + 1e-9
    assert_allclose(flow.bound(), np.exp(exponent))
    power = 2 if net.gradient_flow else 1
    # Trapezoids, from above.
    assert_allclose(exponent, _integral(net, lambda t: _hilbert_schmidt(net, t) ** power), rtol=1e-2)
    if net.layers:
        bias, B = dense(net, net.times[1])
        u = bias[:, None] - B @ Y.values(net.run(state(net)).state(1))
        assert_allclose(flow.slope(1), 1 - np.tanh(u) ** 2, atol=1e-6)
        _frozen_eigenvalues(net, flow.frozen_eigenvalues(1), close, start)


def _frozen_eigenvalues(net, found, close, start):
    matrix = linearised(net, net.times[1], net.Y.values(net.run(state(net)).state(1)))
    assert_allclose(np.sort(found.real), eigenvalues(matrix, found.size), atol=1e-6)


@on_net("stability_report", call=lambda net: stability_report(net, state(net)))
def _stability_report(net, report, close, start):
    M = LinearisedFlow(net, state(net)).propagator()
    assert_allclose(report.layers[-1].grown, M.norm, rtol=1e-6)
    rank = net.bases["phi"][0].rank
    assert_allclose(report.layers[0].frozen, eigenvalues(linearised(net, 0.0, smooth(net.Y, 1)), rank).max(), atol=1e-6)


# -- the walk ---------------------------------------------------------------------------------------------------------


def _subject(tool, feature, **more):
    net_alone, options, *_ = RUNS[tool]
    p = problem_with(feature, takes=TOOLS[tool], **options | more)
    return p.net if net_alone else p


def _concerns(tool):
    """The features that the arguments of a tool can have."""
    return [name for name, feature in FEATURES.items() if feature.of == "net" or not RUNS[tool][0]]


def walk(tool, features, **more):
    net_alone, _, before, call, check = RUNS[tool]
    for feature in features:
        subject = _subject(tool, feature, **more)
        has = set(features_of(subject))
        assert feature is None or feature in has, f"{tool}, {feature}: the problem made for it has not got it"
        lacking = [name for name in FEATURES if name in has - TOOLS[tool]]
        try:
            if lacking:
                named = "|".join(re.escape(FEATURES[name].what) for name in lacking)
                with pytest.raises(ValueError, match=f"it does not take ({named})") as refusal:
                    call(subject)
                assert str(refusal.value).split(": ")[0] in TOOLS
            else:
                before(subject)
                start = None if net_alone else value(subject)
                check(subject, call(subject), CLOSE.get(feature, 1e-9), start)
        except Exception as error:
            error.add_note(f"-- {tool} with {feature}: {'to be refused' if lacking else 'to be right'}")
            raise


@pytest.mark.whole
@pytest.mark.parametrize("tool", [pytest.param(t, marks=pytest.mark.slow) if t == "verify" else t for t in sorted(TOOLS)])
def test_a_tool_is_right_or_refuses_by_name(tool):
    walk(tool, [None, *_concerns(tool)])


@pytest.mark.parallel([2])
def test_an_ensemble_of_two_members_is_right_or_refused_on_all_ranks():
    ensemble = fd.Ensemble(fd.COMM_WORLD, 1)
    chosen = [[0], [1, 2]][fd.COMM_WORLD.rank]
    for tool in sorted(TOOLS):
        if not RUNS[tool][0]:
            walk(tool, ["ensemble"], alone=True, ensemble=ensemble, chosen=chosen)


@pytest.mark.parallel([2])
@pytest.mark.parametrize("tool", ["train_pam, batches", "LocalFeedback", "msa"])
def test_a_tool_is_right_on_two_ranks(tool):
    walk(tool, ["running", "weights"])


def test_every_tool_and_every_feature_has_its_place_in_the_walk():
    assert RUNS.keys() == TOOLS.keys()
    assert NET.keys() | PROBLEM.keys() == FEATURES.keys()


# -- declarations -----------------------------------------------------------------------------------------------------

#: What features are of, and what makes or holds such a thing: none of them is a tool.
NO_TOOLS = {"LearningProblem", "ResidualNetwork", "Run"}
#: The types of arguments that have features, themselves or by what they were made of.
FEATURED = re.compile(r"\b(LearningProblem|ResidualNetwork|Run|Trajectory|LocalFeedback|LinearisedFlow)\b")


def takes_something_featured(function) -> bool:
    arguments = list(inspect.signature(function).parameters.values())
    return any(FEATURED.search(str(each.annotation)) or each.name in ("net", "problem") for each in arguments)


def test_every_public_tool_declares_what_it_takes():
    """Functions and constructors; a dataclass holds results of a tool."""
    for name in fem_resnet.__all__:
        public = getattr(fem_resnet, name)
        if not callable(public) or name in NO_TOOLS or hasattr(public, "__dataclass_fields__"):
            continue
        function = public.__init__ if inspect.isclass(public) else public
        if takes_something_featured(function):
            assert name in TOOLS, f"{name} takes a network, a problem or what was made of one: put @supports on it"
    for owner in (Controls, Hamiltonian):
        for name, method in inspect.getmembers(owner, inspect.ismethod):
            if takes_something_featured(method):
                assert f"{owner.__name__}.{name}" in TOOLS


def test_a_feature_that_is_new_is_refused_by_all_tools(monkeypatch):
    present = {"of": "net", "present": lambda net: True, "what": "a novelty", "remedy": "go without"}
    monkeypatch.setitem(FEATURES, "novelty", type(FEATURES["head"])(**present))
    for tool, (net_alone, *_, call, _) in RUNS.items():
        with pytest.raises(ValueError, match=": it does not take a novelty; go without"):
            call(_subject(tool, None))


def test_features_that_are_unknown_are_refused():
    with pytest.raises(KeyError, match=r"supports: expected names among .*, got \['heads'\]"):
        supports("heads")


# -- copies -----------------------------------------------------------------------------------------------------------


def test_a_problem_with_one_argument_replaced_keeps_all_others():
    """Whatever arguments the constructor has."""
    names = list(inspect.signature(LearningProblem).parameters)
    for feature in (None, *PROBLEM):
        p = problem_with(feature)
        for changed in names:
            other = p.replace(**{changed: getattr(p, changed)})
            for name in names:
                assert getattr(other, name) is getattr(p, name), f"{name} is lost where {changed} is replaced"
        assert features_of(p.replace()) == features_of(p)


def test_a_network_with_one_argument_replaced_keeps_all_others():
    """Whatever arguments the constructor has: `layers` stands for `final_time` too."""
    names = set(inspect.signature(ResidualNetwork).parameters)
    for feature in (None, *NET):
        net = network_with(feature, options_prefix="mine", layers_per_block=1)
        settings = net.settings.arguments
        assert names - {"final_time"} == settings.keys()
        for changed in settings:
            other = net.replace(**{changed: settings[changed]})
            assert features_of(other) == features_of(net)
            assert other.settings == net.settings and other.parameters == net.parameters, f"replacing {changed}"


def test_a_network_that_steps_otherwise_has_the_very_same_parameters():
    for feature in (None, *NET):
        net = network_with(feature)
        finer = net.replace(layers=replace(net.settings.layers, steps=4, per_block=1))
        assert finer.parameters == net.parameters and finer.bases == net.bases
        assert np.abs(of_net(finer) - of_net(net)).max() < 1e-2
        assert finer.steps == 4 and net.steps == 2


def test_what_is_no_argument_is_no_change():
    net = network_with()
    with pytest.raises(TypeError, match="^replace: expected some of kernel, .*, got phi"):
        net.replace(phi=3)
    with pytest.raises(TypeError, match="cost"):
        problem_with().replace(cost=3)


# -- what all are held against ----------------------------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.parametrize("feature", [None, *FEATURES])
def test_J_of_a_feature_is_that_written_out_and_its_gradient_the_slope(feature):
    p = problem_with(feature)
    plain = p.replace(batch=replace(p.batch, derivatives=None, observations=None))
    written_out = [check.name for check in forward(plain) if not check.passed]
    assert written_out == []
    if feature == "derivatives":
        v, C, Y = p.derivatives.directions, p.net.Y.values(p.derivatives.targets), p.net.Y
        ends = [Y.values(p.net(Y.batch(smooth(Y, 1) + sign * 1e-4 * Y.values(v)))) for sign in (1, -1)]
        mismatch = norm(Y, (ends[0] - ends[1]) / 2e-4 - C) ** 2 / 2
        assert_allclose(value(p), value(plain) + p.derivatives.weight * mismatch, rtol=1e-6)
    if feature == "observed_times":
        Y, C = p.net.Y, p.net.Y.values(p.observations.targets[0])
        assert_allclose(
            value(p), value(plain) + 0.5 * norm(Y, Y.values(p.net.run(p.batch.inputs).state(1)) - C) ** 2 / 2, rtol=1e-12
        )
    J = p.reduced_functional()
    derivative = Enlist(J.derivative())
    h = [0.1 * v for v in directions(p.functions)]
    if p.functions:
        rtol, step = (1e-2, 0.05) if p.net.settings.precision == "single" else (1e-4, 1e-3)
        expected = slope(lambda: value(p), p.functions, h, step)
        assert_allclose(pairing(derivative, h, p.net.Y.comm), expected, rtol=rtol)
