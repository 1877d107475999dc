"""Algorithm 1: (5.1a), (5.1b) and the head, and the inequality below (5.1) at every iteration."""

import logging

import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import laplace, set_smooth
from numpy.testing import assert_allclose, assert_array_equal
from problems import directions, failing_at, learning_problem, network
from pyadjoint.enlisting import Enlist

from fem_resnet import (
    Kernel,
    Layers,
    LearningProblem,
    PAMResult,
    ProximalStep,
    ResidualNetwork,
    StepFailure,
    train,
    train_pam,
)
from fem_resnet.parameters.kernel import KernelCoefficients
from fem_resnet.parameters.space_basis import BasisCoefficients, LayerTimes
from fem_resnet.training.proximal import ProximalFunctional
from fem_resnet.training.tao import Minimiser

on_ranks = pytest.mark.parallel([1, 2, 3])

#: J is of size one and a sum of some hundred numbers.
ROUND_OFF = 1e-14


def classes(**options):
    """J_mod (4.6) of classes by a head on the annulus; 3 layers of unequal lengths, psi not orthonormal."""
    return learning_problem(network("annulus", "CG1", **options))


def field(**options):
    """J of least squares for a field on the sphere."""
    return learning_problem(network("sphere", "DG0", **options), head=False, weight=None)


def convex_like():
    """Strongly regularised, so that it has one clear minimum nearby."""
    return learning_problem(network("annulus", "CG1"), head=False, weight=0.5)


#: What takes long on many ranks is shown on one.
alone = COMM_WORLD.size == 1

each_problem = pytest.mark.parametrize("make", [classes, field], ids=lambda make: make.__name__)


def _silent(progress):
    pass


def _square(parameter, k, c):
    """|c|^2 in the measure of label domain and time, by hand: lengths of time, weights w or Gram matrices."""
    basis, tau = parameter.space_bases[k], parameter.time_basis.measures[k]
    if isinstance(basis, KernelCoefficients):
        return tau * np.trace(c.T @ basis.kernel.phi.gram @ c @ basis.kernel.psi.gram)
    if isinstance(basis, (BasisCoefficients, LayerTimes)):
        return tau * (c @ (basis.basis.gram @ c if isinstance(basis, BasisCoefficients) else c))
    return tau * float(basis.Y.sum(np.sum(basis.Y.weights @ c**2)))


def _coefficients(parameters):
    return [(p, k, p.get(k)) for p in parameters for k in range(len(p.functions))]


def _squared_distance(parameters, before):
    return sum(_square(p, k, p.get(k) - c) for p, k, c in before)


class Watch:
    """A monitor that takes the slack of the inequality below (5.1) by hand: J evaluated afresh, norms from weights."""

    def __init__(self, problem):
        self.problem, self.slacks = problem, []

    def __call__(self, progress):
        value = float(self.problem.evaluate()[0])
        assert abs(value - progress.value) <= ROUND_OFF
        if progress.iteration > 0:
            moved = _squared_distance(self.problem.parameters, self.before)
            self.slacks.append(self.value - moved / (2 * progress.tau) - value)
            assert abs(self.slacks[-1] - progress.slack) <= ROUND_OFF
        self.value, self.before = value, _coefficients(self.problem.parameters)


# -- the inequality --------------------------------------------------------------------------------------------------


@on_ranks
@each_problem
@pytest.mark.parametrize("tau", [1e-3, 1.0, 1e3] if alone else [1e-3, 1e3])
def test_the_inequality_below_5_1_holds_at_every_iteration_for_any_tau(make, tau):
    """Algorithm 1 lowers J by the squared step over 2 tau at least."""
    problem = make()
    watch = Watch(problem)
    iterations = 4 if alone else 1
    result = train_pam(problem, {} if alone else {"tao_max_it": 5}, step=tau, iterations=iterations, monitor=watch)
    print(f"\n{make.__name__}, tau = {tau}: slack {result.slacks}, J {result.values}")
    assert result.reason == "ITERATIONS" and (result.taus == tau).all()
    assert min(watch.slacks) > -ROUND_OFF and len(watch.slacks) == iterations
    # J falls by the step's square over tau at least, half of which is slack to first order in small steps.
    assert (result.slacks > 0.3 * np.sum(result.step_norms**2, axis=1) / (2 * tau)).all()
    assert (np.diff(result.values) < 0).all() and result.step_norms.min() > 0
    assert result.value == result.values[-1] == problem.evaluate()[0]


@on_ranks
@pytest.mark.parametrize("options", [{"tao_max_it": 1}, {"tao_type": "nls", "tao_max_it": 1}], ids=str)
def test_the_inequality_holds_however_inexact_the_inner_solves_are(options):
    for tau in (1e3, 1e-2)[: 2 if alone else 1]:  # hardly a proximal term, and hardly anything else
        problem = classes()
        watch = Watch(problem)
        result = train_pam(problem, options, step=tau, iterations=3 if alone else 1, monitor=watch)
        assert (result.inner_iterations == 1).all() and min(watch.slacks) > -ROUND_OFF and result.value < result.values[0]


@on_ranks
def test_an_inner_result_that_does_not_lower_the_proximal_objective_is_not_taken(monkeypatch):
    """TAO made to hand back, for bias and head, points where J is lower but J with its proximal term is not; for the kernel
    one where both are higher. All three are left where they were."""
    problem = classes()
    before, solve = _coefficients(problem.parameters), Minimiser.solve

    def too_far(self, watch, stop=None):
        outcome = solve(self, watch, stop)
        for p, k, c in before:
            if any(p.functions[k] is function for function in self._functions):
                p.set(k, c + (-5.0 if p.name == "kernel" else 2.3) * (p.get(k) - c))
        self._functional(self._functions)
        return outcome

    monkeypatch.setattr(Minimiser, "solve", too_far)
    result = train_pam(problem, step=1e-2, monitor=_silent)
    assert result.reason == "NO_PROGRESS" and result.iterations == 1 and not result.step_norms.any()
    assert result.slacks == 0 and result.value == result.values[0] == problem.evaluate()[0]
    for p, k, c in before:
        assert_array_equal(p.get(k), c)


@on_ranks
@each_problem
def test_each_group_solves_its_proximal_problem_in_its_turn(make):
    """(5.1): x_i^(k+1) = x_i^k - tau D_i J_mod there, in the order a, b, head; the gradient (4.7) by the representatives."""
    for accuracy, bound in ((0.1, 0.1), (0.0, 1e-5)) if alone else ((0.1, 0.1),):
        problem, tau = make(), 3.0
        start = _coefficients(problem.parameters)
        result = train_pam(problem, {"tao_max_it": 200}, step=ProximalStep(tau, accuracy), iterations=1, monitor=_silent)
        reached = _coefficients(problem.parameters)
        head = [] if problem.head is None else problem.head.parameters
        groups = [[problem.net.bias], [problem.net.kernel], head][: len(result.groups)]
        assert result.groups == ("bias", "kernel", "head")[: len(groups)]
        for p, k, c in start:
            p.set(k, c)
        for group, norm in zip(groups, result.step_norms[0]):
            for p, k, c in reached:
                if p in group:
                    p.set(k, c)
            J = problem.reduced_functional()
            gradient = iter(Enlist(J.derivative(apply_riesz=True)))
            missed = moved = 0.0
            for p, k, c in start:
                g = p.space_bases[k].read(next(gradient))
                if p in group:
                    missed += _square(p, k, p.get(k) - c + tau * g)
                    moved += _square(p, k, p.get(k) - c)
            assert_allclose(norm, np.sqrt(moved), rtol=1e-12)
            assert np.sqrt(missed) <= bound * norm


@on_ranks
@pytest.mark.parametrize("name", ["bias", "kernel", "head"] if alone else ["kernel"])
def test_taylor_of_the_proximal_functional(name, taylor):
    problem = classes()
    J, _ = problem.record()
    net, head = problem.net, problem.head
    parameters = {"bias": [net.bias], "kernel": [net.kernel], "head": head.parameters}[name]
    functions = [f for p in parameters for f in p.functions]
    controls = [c for c, f in zip(J.controls, problem.functions) if any(f is own for own in functions)]
    functional = ProximalFunctional(J, controls, parameters)
    functional.tau, functional.centre = 0.7, [c + 0.3 for c in functional.centre]
    functional(functions)
    h = directions(functional, net, parameters)
    taylor(functional, functions, h, "second order", f"proximal, {name}", second_order=True)


# -- where it goes ---------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("tao_type", ["lmvm", "nls"][: 1 + alone])
def test_it_comes_to_the_minimum_of_l_bfgs_on_all_parameters(tao_type):
    problem = convex_like()
    result = train_pam(problem, {"tao_type": tao_type}, step=10.0, gradient_tolerance=3e-5, monitor=_silent)
    assert result.converged and result.reason == "GRADIENT_TOLERANCE" and result.gradient_norm <= 1e-4
    assert result.gradient_norm <= 3e-5 * result.gradient_norms[0] < result.gradient_norms[-2]
    again = convex_like()
    best = train(again, {"tao_gatol": 1e-6}, monitor=_silent)
    # Both miss the minimum by |gradient|^2 over twice the smallest curvature, the weight 0.5, at most.
    assert abs(result.value - best.value) < 1.1e-8
    assert train(problem, {"tao_gatol": 1e-4}, monitor=_silent).iterations == 0, "TAO has another gradient"


@on_ranks
def test_an_adapted_tau_grows_while_inner_problems_are_easy_and_falls_where_they_are_not():
    problem, easy = classes(), 5 if alone else 2
    watch = Watch(problem)
    result = train_pam(problem, step=ProximalStep(0.1, adapt=True), iterations=easy + 1, monitor=watch)
    assert result.taus[0] == 0.1 and set(result.taus[1:] / result.taus[:-1]) <= {2.0, 1.0, 0.5}
    assert result.taus[easy] == 0.1 * 2**easy and min(watch.slacks) > -ROUND_OFF
    if alone:
        fixed = train_pam(classes(), step=0.1, iterations=easy + 1, monitor=_silent)
        print(f"\ntau {result.taus}, J {result.value:.4f}, with tau fixed {fixed.value:.4f}")
        assert result.value < 0.9 * fixed.value
    hard = train_pam(classes(), {"tao_max_it": 2}, step=ProximalStep(1e3, adapt=True), iterations=3, monitor=_silent)
    assert_array_equal(hard.taus, [1e3, 500, 250])


@pytest.mark.parallel([1, 2])
def test_inertial_steps_are_faster_and_j_never_rises_but_the_inequality_does_not_hold():
    options = {"gradient_tolerance": 0.0, "monitor": _silent}
    plain = train_pam(convex_like(), step=0.3, iterations=10, **options)
    problem, result, momenta = convex_like(), None, []
    while len(momenta) < 10:
        result = train_pam(problem, step=ProximalStep(0.3, inertial=True), iterations=1, start=result, **options)
        momenta.append(result.momentum)
    best = train(convex_like(), {"tao_gatol": 1e-7}, monitor=_silent).value
    print(
        f"\nJ - min J inertial {result.value - best:.1e}, plain {plain.value - best:.1e}; slack from {result.slacks.min():.1e}"
    )
    assert (np.diff(result.values) <= 0).all() and result.slacks.min() < -1e-8
    assert max(momenta) > 2 and min(momenta[5:]) == 1.0, "no restart was seen"
    assert result.values[8] - best < 0.5 * (plain.values[8] - best)


@on_ranks
def test_batches_keep_the_inequality_of_their_own_j_and_no_other():
    problem, few = classes(), {"tao_max_it": 5}
    own, batches = problem.batch, problem.minibatches(1)
    whole = [float(problem.evaluate()[0])]
    result = train_pam(
        problem, few, step=100.0, iterations=4, batches=batches,
        monitor=lambda p: whole.append(float(problem.evaluate()[0])) if p.iteration else None,
    )  # fmt: skip
    print(f"\nJ of all samples {np.array(whole)}; slacks {result.slacks}")
    assert (result.slacks > 0).all() and np.max(np.diff(whole)) > 0.1
    assert problem.batch is own and problem.evaluate()[0] == whole[-1]
    last = LearningProblem(problem.net, problem.head, problem.loss, problem.regulariser, batches[3])
    assert abs(last.evaluate()[0] - result.value) <= ROUND_OFF
    again = classes()
    batches = again.minibatches(1)
    part = train_pam(again, few, step=100.0, iterations=3, batches=batches, monitor=_silent)
    rest = train_pam(again, few, step=100.0, iterations=1, batches=batches, start=part, monitor=_silent)
    assert_allclose(rest.values, result.values, rtol=1e-8)  # many iterations of L-BFGS, which amplify round-off


def _factors_and_times():
    phi, psi = laplace("annulus", "CG1", 5), laplace("annulus", "CG1", 3)
    net = ResidualNetwork(Kernel(phi, psi, learn_factors=True), layers=Layers((0.0, 0.2, 0.9, 1.3), learn_times=True))
    set_smooth(net, np.random.default_rng(0))
    return learning_problem(net)


def _initial_state():
    plain = learning_problem(network("annulus", "CG1"), head=False)
    return LearningProblem(plain.net, None, plain.loss, plain.regulariser, plain.batch, learn="both")


def _checkpoints():
    plain = learning_problem(network("annulus", "CG1", layers_per_block=1))
    return LearningProblem(plain.net, plain.head, plain.loss, plain.regulariser, plain.batch, checkpoints=1)


def _implicit_in_time():
    return learning_problem(
        network(
            "sphere", "CG1", bias_in_time="linear", kernel_in_time=[0, 0, 1], bias="basis", solver_parameters={"ts_type": "cn"}
        )
    )


@on_ranks
@pytest.mark.parametrize(
    "make, names",
    [
        (_factors_and_times, ("bias", "kernel", "head", "phi", "psi", "layer_times")),
        (_initial_state, ("bias", "kernel", "initial")),
        (_checkpoints, ("bias", "kernel", "head")),
        (_implicit_in_time, ("bias", "kernel", "head")),
    ][: None if alone else 1],
    ids=lambda part: part.__name__.strip("_") if callable(part) else "",
)
def test_all_that_a_problem_learns_belongs_to_a_group(make, names):
    problem = make()
    watch = Watch(problem)
    result = train_pam(problem, step=1.0, iterations=1, monitor=watch)
    assert set(result.groups) == set(names) and result.groups[:2] == ("bias", "kernel")
    assert result.step_norms.min() > 0 and min(watch.slacks) > -ROUND_OFF and result.value < result.values[0]


# -- stopping, going on, failing -------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("step", [ProximalStep(), ProximalStep(adapt=True, inertial=True)][: 1 + alone], ids=str)
def test_it_can_be_stopped_and_continued_as_if_it_had_not_been(step):
    whole = train_pam(classes(), step=step, iterations=4, monitor=_silent)
    problem = classes()
    # One rank alone asks for the stop.
    stopped = train_pam(
        problem, step=step, iterations=4, monitor=lambda p: p.iteration == 2 and COMM_WORLD.rank == COMM_WORLD.size - 1
    )
    assert (stopped.reason, stopped.iterations, stopped.converged) == ("STOPPED", 2, False)
    problem.net.kernel.set(0, 0 * problem.net.kernel.get(0))  # what is continued are the result's parameters
    seen = []
    rest = train_pam(problem, step=step, iterations=2, start=stopped, monitor=seen.append)
    assert [p.iteration for p in seen] == [3, 4] and {p.iterations for p in seen} == {4}
    assert (rest.iterations, rest.reason) == (4, "ITERATIONS") and rest.seconds > stopped.seconds
    for name in ("values", "gradient_norms", "slacks", "step_norms", "inner_iterations", "taus"):
        # Nothing differs but where arrays lie in memory, by which NumPy's sums are rounded.
        assert_allclose(getattr(rest, name), getattr(whole, name), rtol=1e-11, atol=1e-14, err_msg=name)
    for mine, theirs in zip(sum(rest.controls, []), sum(whole.controls, [])):
        assert_allclose(mine, theirs, rtol=0, atol=1e-12)


@on_ranks
def test_the_result_has_the_history_and_the_controls():
    problem = classes()
    result = train_pam(problem, iterations=3, monitor=_silent)
    assert isinstance(result, PAMResult) and result.iterations == 3 and result.groups == ("bias", "kernel", "head")
    assert result.values.shape == result.gradient_norms.shape == (4,) and result.slacks.shape == result.taus.shape == (3,)
    assert result.step_norms.shape == result.inner_iterations.shape == (3, 3)
    assert result.inner_iterations.dtype.kind == "i" and result.inner_iterations.min() > 0
    controls = sum(result.controls, [])
    for (p, k, c), kept in zip(_coefficients(problem.parameters), controls):
        assert_array_equal(c, kept)
    for function, (p, k, c) in zip(problem.functions, _coefficients(problem.parameters)):
        assert function is p.functions[k]
    gradient = train(problem, {"tao_max_it": 1}, monitor=_silent)
    assert_allclose(result.gradient_norm, gradient.gradient_norms[0], rtol=1e-12)


@on_ranks
def test_without_a_monitor_a_line_an_iteration_is_logged_on_rank_0(caplog):
    problem = classes()
    with caplog.at_level(logging.INFO, logger="fem_resnet"):
        result = train_pam(problem, {"tao_max_it": 1}, iterations=2)
    lines = [record.getMessage() for record in caplog.records if record.name == "fem_resnet"]
    assert len(lines) == (3 if problem.net.Y.comm.rank == 0 else 0)
    for number, line in enumerate(lines):
        assert line.startswith(f"iteration {number:4d} of 2   J = {result.values[number]:.8e}") and "slack = " in line


@on_ranks
def test_an_evaluation_that_raises_leaves_the_parameters_of_the_last_iteration():
    plain, values = classes(), []
    problem = failing_at(40, plain)
    with pytest.raises(StepFailure, match="the state is not finite in layer 2, t = 1.3"):
        train_pam(problem, {"tao_max_it": 1}, monitor=lambda progress: values.append(progress.value))
    assert len(values) > 2 and abs(plain.evaluate()[0] - values[-1]) <= ROUND_OFF


@pytest.mark.parallel([2, 3])
@each_problem
def test_iterations_do_not_see_the_partition(make):
    """The mesh on all ranks against the whole mesh on each."""
    results = [train_pam(make(alone=whole), step=3.0, iterations=2, monitor=_silent) for whole in (False, True)]
    for name in ("values", "gradient_norms", "slacks", "step_norms"):
        # L-BFGS amplifies round-off, the more so over its iterations: less than ten a group here.
        assert_allclose(getattr(results[0], name), getattr(results[1], name), rtol=1e-8, err_msg=name)
    assert_array_equal(results[0].inner_iterations, results[1].inner_iterations)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"step": 0.0}, "^step: expected a positive number"),
        ({"step": "small"}, "^step: expected a positive number"),
        ({"iterations": -1}, "^iterations: expected an integer >= 0"),
        ({"iterations": 1.5}, "^iterations: expected an integer >= 0"),
        ({"gradient_tolerance": -1.0}, "^gradient_tolerance: expected a number >= 0"),
        ({"batches": []}, "^batches: expected at least one"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train_pam(classes(), **options)


@pytest.mark.parametrize("name, value", [("tau", 0.0), ("tau", np.inf), ("accuracy", np.nan), ("accuracy", -0.1)])
def test_steps_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected a"):
        ProximalStep(**{name: value})


def test_a_start_or_batches_that_do_not_fit_are_refused():
    result = train_pam(field(), iterations=0, monitor=_silent)
    assert result.reason == "ITERATIONS" and result.iterations == 0 and result.values.shape == (1,)
    with pytest.raises(ValueError, match="^start: expected the groups .*'head'.*, as the problem has them, got .*'kernel'"):
        train_pam(classes(), start=result)
    initial = _initial_state()
    with pytest.raises(ValueError, match="^train_pam, batches: it does not take an initial state that is learned"):
        train_pam(initial, batches=initial.minibatches(1))
