"""Training by TAO: it lowers J, stops in good order wherever it stops, and works in the label measure."""

import gc
import logging
import resource
import tracemalloc

import firedrake as fd
import numpy as np
import pytest
import scipy.optimize
from firedrake import COMM_WORLD
from helpers import laplace
from numpy.testing import assert_allclose, assert_array_equal
from problems import CLASSES, coefficients, failing_at, learning_problem, network, taping
from pyadjoint.reduced_functional_numpy import ReducedFunctionalNumPy
from pyadjoint.tape import annotate_tape

from fem_resnet.label_domain.basis import Basis
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.time_stepping.stepper import StepFailure
from fem_resnet.training.gradient import SOLVER_PARAMETERS, TOLERANCES, train
from fem_resnet.training.progress import Progress

on_ranks = pytest.mark.parallel([1, 2, 3])

#: J is of size one and a sum of some hundred numbers.
ROUND_OFF = 1e-13


def classes(**options):
    """Classes by a head and cross entropy."""
    return learning_problem(network("disk", "DG0", **options))


def field(**options):
    """Least squares for a field; strongly regularised, so that it has one clear minimum nearby."""
    return learning_problem(network("disk", "CG1", **options), head=False, weight=0.5)


each_problem = pytest.mark.parametrize("make", [classes, field], ids=lambda make: make.__name__)


def _silent(progress):
    pass


def _gradient_norm(problem):
    """Of J at the parameters, in the measure of label domain and time, from the dual derivative by hand."""
    J = problem.reduced_functional()
    derivative = iter(J.derivative())
    square = 0.0
    for parameter in problem.parameters:
        basis = parameter.space_basis
        for k, tau in enumerate(parameter.time_basis.measures):
            dual = basis.read(next(derivative))
            square += basis.pair(dual, basis.riesz(dual)) / tau
    return np.sqrt(square)


def _all_coefficients(problem):
    return [coefficients(p, function).copy() for p in problem.parameters for function in p.functions]


# -- where it stops --------------------------------------------------------------------------------------------------


@on_ranks
@each_problem
def test_the_limit_of_iterations_is_survived_and_the_result_assigned(make):
    problem = make()
    start, _ = problem.evaluate()
    result = train(problem, {"tao_max_it": 5}, monitor=_silent)
    assert (result.iterations, result.converged, result.reason) == (5, False, "ITERATIONS")
    assert result.value < 0.9 * start
    assert abs(problem.evaluate()[0] - result.value) <= ROUND_OFF
    assert abs(_gradient_norm(problem) / result.gradient_norm - 1) < 1e-10


@on_ranks
def test_a_least_squares_problem_is_solved_to_its_tolerance():
    problem = field()
    result = train(problem, {"tao_gatol": 1e-6}, monitor=_silent)
    assert result.converged and result.reason == "CONVERGED_GATOL"
    assert result.gradient_norm <= 1e-6 < result.gradient_norms[:-1].min()
    assert _gradient_norm(problem) < 1.01e-6
    assert abs(problem.evaluate()[0] - result.value) <= ROUND_OFF


@on_ranks
def test_a_start_at_the_minimum_is_left_alone():
    problem = field()
    train(problem, {"tao_gatol": 1e-4}, monitor=_silent)
    before = _all_coefficients(problem)
    result = train(problem, {"tao_gatol": 1e-3}, monitor=_silent)
    assert result.converged and result.iterations == 0 and result.values.shape == (1,)
    for found, expected in zip(_all_coefficients(problem), before):
        assert_array_equal(found, expected)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize(
    "domain, weight, options",
    [
        ("disk DG0", 5.0, {"tao_gatol": 0.0}),
        ("disk DG0", 5.0, {}),
        ("disk CG1", 1.0, {"tao_gatol": 0.0}),
        ("sphere CG1", 5.0, {"tao_gatol": 0.0}),
    ][: None if COMM_WORLD.size == 1 else 1],
    ids=str,
)
def test_a_line_search_that_cannot_go_on_leaves_the_best_parameters_and_its_reason(domain, weight, options):
    """No gradient reaches a tolerance of zero: round-off in J ends the last line search, now and then before `TOLERANCES`."""
    problem = learning_problem(network(*domain.split()), head=False, weight=weight)
    result = train(problem, {"tao_max_it": 1000} | options, monitor=_silent)
    if options == {} and result.converged:
        assert result.reason in ("CONVERGED_GRTOL", "CONVERGED_GTTOL")
        assert result.gradient_norm < 10 * TOLERANCES["tao_gttol"] * result.gradient_norms[0]  # units are 1 and |Y| here
    else:
        # The gradient may come below the last bit of J before that.
        assert result.reason in ("DIVERGED_LS_FAILURE", "CONVERGED_GRTOL")
        # J is of size one and known to 1e-16; where it is flat to that, its gradient is about the root of it.
        assert result.gradient_norm < 1e-7
    assert abs(problem.evaluate()[0] - result.value) <= ROUND_OFF
    assert result.value <= result.values.min() + ROUND_OFF


@on_ranks
def test_an_evaluation_that_raises_leaves_the_parameters_of_the_last_iteration():
    """A state that overflows in a trial step: what is raised is what was raised, and nothing reached is lost."""
    plain, values = classes(), []
    problem = failing_at(12, plain)
    with pytest.raises(StepFailure, match="the state is not finite in layer 2, t = 1.3"):
        train(problem, monitor=lambda progress: values.append(progress.value))
    assert len(values) > 3 and not annotate_tape()
    assert abs(plain.evaluate()[0] - values[-1]) <= ROUND_OFF


@on_ranks
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_start_where_j_is_not_finite_is_refused():
    problem = field()
    problem.batch.targets.assign(1e200)
    assert np.isinf(problem.evaluate()[0])
    before = _all_coefficients(problem)
    with pytest.raises((ArithmeticError, ValueError, fd.PETSc.Error)):
        train(problem, {"tao_max_it": 3}, monitor=_silent)
    for found, expected in zip(_all_coefficients(problem), before):
        assert_array_equal(found, expected)


@on_ranks
def test_a_second_call_goes_on_from_the_first():
    problem = classes()
    first = train(problem, {"tao_max_it": 4}, monitor=_silent)
    second = train(problem, {"tao_max_it": 4}, monitor=_silent)
    assert abs(second.values[0] - first.value) <= ROUND_OFF
    assert second.value < first.value


@on_ranks
@pytest.mark.parametrize(
    "options", [{}, {"tao_type": "nls"}, {"tao_type": "blmvm"}][: None if COMM_WORLD.size == 1 else 1], ids=str
)
def test_a_monitor_on_any_rank_stops_it_and_another_call_goes_on(options):
    problem, calls = classes(), []
    # One rank alone asks for the stop.
    stopped = train(
        problem, options, monitor=lambda p: calls.append(p) or p.iteration == 2 and COMM_WORLD.rank == COMM_WORLD.size - 1
    )
    assert (stopped.reason, stopped.converged, stopped.iterations, len(calls)) == ("STOPPED", False, 2, 3)
    found = [p.get(k) for p in problem.parameters for k in range(len(p.functions))]
    for found, kept in zip(found, stopped.controls, strict=True):
        assert_array_equal(found, kept)
    rest = train(problem, options | {"tao_max_it": 2}, monitor=_silent)
    assert abs(rest.values[0] - stopped.value) <= ROUND_OFF and rest.value < stopped.value and rest.iterations == 2


@on_ranks
def test_parameters_changed_after_a_training_are_where_the_next_one_starts():
    problem = classes()
    train(problem, {"tao_max_it": 2}, monitor=_silent)
    problem.net.kernel.set(0, 0 * problem.net.kernel.get(0))
    expected, _ = problem.evaluate()
    assert train(problem, {"tao_max_it": 1}, monitor=_silent).values[0] == expected


@on_ranks
@pytest.mark.parametrize("tao_type", ["bncg", "lmvm", "blmvm", "cg"][: None if COMM_WORLD.size == 1 else 1])
def test_every_type_of_tao_lowers_j_and_reports_each_iteration_once(tao_type):
    problem = classes()
    start, _ = problem.evaluate()
    result = train(problem, {"tao_type": tao_type, "tao_max_it": 8}, monitor=_silent)
    assert result.value < 0.8 * start
    assert abs(problem.evaluate()[0] - result.value) <= ROUND_OFF
    assert result.iterations == 8 and result.values.shape == (9,)


# -- what it reports -------------------------------------------------------------------------------------------------


@on_ranks
@each_problem
def test_history_has_an_entry_an_iteration_from_the_start_to_the_end(make):
    problem = make()
    start, norm = problem.evaluate()[0], _gradient_norm(problem)
    result = train(problem, {"tao_max_it": 7}, monitor=_silent)
    assert result.values.shape == result.gradient_norms.shape == (8,)
    assert result.values[0] == start and result.values[-1] == result.value
    assert abs(result.gradient_norms[0] / norm - 1) < 1e-12 and result.gradient_norms[-1] == result.gradient_norm
    assert (np.diff(result.values) < 0).all(), "the line search of L-BFGS lowers J at every step"
    assert result.seconds > 0


@on_ranks
def test_monitor_is_called_once_an_iteration_on_every_rank():
    problem, calls = classes(), []
    result = train(problem, {"tao_max_it": 6}, monitor=calls.append)
    assert [call.iteration for call in calls] == list(range(7))
    assert all(isinstance(call, Progress) and call.iterations == 6 for call in calls)
    assert_array_equal([call.value for call in calls], result.values)
    assert_array_equal([call.gradient_norm for call in calls], result.gradient_norms)
    assert (np.diff([call.seconds for call in calls]) >= 0).all()


@on_ranks
def test_without_a_monitor_a_line_an_iteration_is_logged_on_rank_0(caplog):
    problem = classes()
    with caplog.at_level(logging.INFO, logger="fem_resnet"):
        result = train(problem, {"tao_max_it": 3})
    lines = [record.getMessage() for record in caplog.records if record.name == "fem_resnet"]
    assert len(lines) == (4 if problem.net.Y.comm.rank == 0 else 0)
    for number, line in enumerate(lines):
        assert line.startswith(f"iteration {number:4d} of 3   J = {result.values[number]:.8e}")


# -- the label measure -----------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("bias", ["nodes", "basis"])
def test_gradient_norm_is_that_of_label_domain_and_time(bias):
    """By hand: sum_k <R^-1 d_k, d_k> / tau_k, with weights w of the nodes, Gram matrices and unequal layers."""
    problem = learning_problem(network("sphere", "CG1", bias=bias))
    net, head = problem.net, problem.head
    derivative = problem.reduced_functional().derivative()
    G_phi, G_psi = (basis.gram for basis in (net.kernel.space_basis.kernel.phi, net.kernel.space_basis.kernel.psi))
    square = 0.0
    for k, tau in enumerate(np.diff(net.times)):
        a = net.bias.space_basis.read(derivative[k])
        b = net.kernel.space_basis.read(derivative[net.layers + k])
        square += np.trace(b.T @ np.linalg.solve(G_phi, b) @ np.linalg.inv(G_psi)) / tau
        square += (a @ np.linalg.solve(G_phi, a) if bias == "basis" else float(net.Y.sum(a @ (a / net.Y.weights)))) / tau
    W, mu = (parameter.space_basis.read(d) for parameter, d in zip(head.parameters, derivative[-2:]))
    square += np.trace(W @ np.linalg.solve(head.psi.gram, W.T)) + mu @ mu
    result = train(problem, {"tao_max_it": 1}, monitor=_silent)
    assert abs(result.gradient_norms[0] / np.sqrt(square) - 1) < 1e-12


@on_ranks
@each_problem
def test_first_step_of_l_bfgs_goes_down_the_gradient_in_the_label_measure(make):
    """m_1 - m_0 = - s u g with one s for all coefficients, g the Riesz representatives, u the squared norm of a unit.

    By hand: |Y| for a(y); 1 for b(y, z), whose unit is 1 / |Y|; on classes of length one their number K for mu, and K / |Y|
    for W. Unequal layers, cells, bases.
    """
    problem = make()
    size = problem.net.Y.measure
    units = {"bias": size, "kernel": 1.0, "W": CLASSES / size, "mu": CLASSES}
    g = [
        units[parameter.name] * coefficients(parameter, parameter.riesz_map(k)(dual))
        for (parameter, k), dual in zip(
            [(p, k) for p in problem.parameters for k in range(len(p.functions))],
            problem.reduced_functional().derivative(),
        )
    ]
    before = _all_coefficients(problem)
    train(problem, {"tao_max_it": 1}, monitor=_silent)
    steps = [after - start for after, start in zip(_all_coefficients(problem), before)]
    s = -np.sum(steps[0] * g[0]) / np.sum(g[0] ** 2)
    assert s > 0
    for step, gradient in zip(steps, g):
        # The step is a difference of coefficients of size one.
        assert_allclose(step, -s * gradient, rtol=0, atol=1e-12 * max(1, s * np.abs(gradient).max()))


def test_training_does_not_see_how_a_bias_in_a_basis_is_scaled():
    """L-BFGS in the label measure takes the same steps for a basis of functions 100 times as large."""
    phi = laplace("disk", "DG0", 4)
    values = []
    for scale in (1.0, 100.0):
        basis = Basis(phi.Y, scale * phi.values, "given")
        net = ResidualNetwork(basis, bias=basis, layers=2)
        rng = np.random.default_rng(3)
        for layer in range(2):
            net.bias.set(layer, rng.normal(size=4) / scale)
            net.kernel.set(layer, rng.normal(size=(4, 4)) / scale**2)
        values.append(train(learning_problem(net, head=False), {"tao_max_it": 15}, monitor=_silent).values)
    # Round-off grows with the iterations of L-BFGS: 4e-15 at 20 was seen.
    assert_allclose(values[1], values[0], rtol=1e-11)


@on_ranks
@each_problem
def test_twenty_iterations_do_not_see_the_partition(make):
    """The mesh on all ranks against the whole mesh on each; L-BFGS amplifies round-off, later even more."""
    results = [train(make(alone=alone), {"tao_max_it": 20}, monitor=_silent) for alone in (False, True)]
    assert results[0].iterations == results[1].iterations
    assert_allclose(results[0].values, results[1].values, rtol=1e-10)
    assert_allclose(results[0].gradient_norms, results[1].gradient_norms, rtol=1e-8)


@on_ranks
def test_twenty_iterations_give_every_rank_the_same_bits():
    problem = classes()
    result = train(problem, {"tao_max_it": 20}, monitor=_silent)
    assert len(set(problem.net.Y.comm.allgather((result.value, result.gradient_norm, result.reason)))) == 1


# -- other optimisers ------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("bias", ["basis", "nodes"] if COMM_WORLD.size == 1 else ["basis"])
def test_scipy_reaches_the_same_minimum_on_the_same_reduced_functional(bias):
    problem = field(bias=bias)
    J = problem.reduced_functional()
    array = ReducedFunctionalNumPy(J)
    # SciPy's inner product is the Euclidean one, so its gradient is the dual derivative: no Riesz map.
    found = scipy.optimize.minimize(
        array,
        array.get_global(problem.functions),
        jac=lambda x: array.get_global(J.derivative()),
        method="L-BFGS-B",
        options={"maxiter": 1000, "ftol": 0.0, "gtol": 1e-6},
    )
    result = train(problem, {"tao_gatol": 1e-5}, monitor=_silent)
    assert result.converged
    # Both miss the minimum by at most |gradient|^2 over twice the smallest curvature, the weight 0.5; in the label
    # measure TAO's gradient is 1e-5 at most, SciPy's turns out to be as large.
    assert abs(found.fun - result.value) < 2e-10


# -- what it leaves behind -------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("annotating", [False, True])
def test_training_leaves_tape_and_annotation_as_they_were(annotating, tape):
    problem = classes()
    if annotating:
        with taping():
            train(problem, {"tao_max_it": 3}, monitor=_silent)
            assert annotate_tape()
    else:
        train(problem, {"tao_max_it": 3}, monitor=_silent)
        assert not annotate_tape()
    assert not tape.get_blocks()


@on_ranks
def test_an_error_in_the_monitor_leaves_tape_and_annotation_as_they_were(tape):
    problem = classes()

    def fail(progress):
        if progress.iteration == 2:
            raise ZeroDivisionError("stop here")

    with pytest.raises(ZeroDivisionError, match="^stop here$"):
        train(problem, {"tao_max_it": 5}, monitor=fail)
    assert not annotate_tape() and not tape.get_blocks()
    start, _ = problem.evaluate()
    assert train(problem, {"tao_max_it": 5}, monitor=_silent).value < start


@on_ranks
def test_evaluations_and_derivatives_add_no_blocks():
    problem = classes()
    J = problem.reduced_functional()
    blocks = len(J.tape.get_blocks())
    for _ in range(30):
        J(problem.functions)
        J.derivative(apply_riesz=True)
    assert len(J.tape.get_blocks()) == blocks


def _kept(call, rounds=7, calls=10):
    """Bytes of Python objects that stay of each call of ``call``: the median of rounds, after two that do not count.

    What is older than the trace and replaced during it counts as kept, though nothing grows; a dictionary of the
    process that is made anew would be an example. That is in one round or two, what stays of each call is in all.
    """
    traced = []
    gc.collect()
    gc.freeze()  # what is older need not be looked through in each round
    tracemalloc.start()
    try:
        for _ in range(rounds + 2):
            for _ in range(calls):
                call()
            gc.collect()
            traced.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    return np.median(np.diff(traced[1:])) / calls


def test_evaluations_and_derivatives_keep_no_memory():
    problem = classes()
    J = problem.reduced_functional()

    def evaluate():
        J(problem.functions)
        J.derivative(apply_riesz=True)

    def functions():
        return sum(isinstance(thing, (fd.Function, fd.Cofunction)) for thing in gc.get_objects())

    evaluate()
    gc.collect()
    counted, resident = functions(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = _kept(evaluate)
    gc.collect()
    assert functions() <= counted
    # One gradient of this problem is 10 kB, one tape of states 20 kB. Small objects replaced make up to 200 bytes.
    assert kept < 1_000, f"{kept:.0f} bytes of Python objects are kept by each evaluation"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 10_000, "more than 10 MB were kept"


def test_memory_kept_by_each_call_is_seen_and_what_is_made_once_is_not():
    kept, sizes = [], iter([0] * 45 + [200_000] + [0] * 100)
    assert abs(_kept(lambda: kept.append(bytes(2_000))) - 2_000) < 200
    assert _kept(lambda: kept.append(bytes(next(sizes)))) < 200


# -- options ---------------------------------------------------------------------------------------------------------


@on_ranks
def test_options_stand_over_the_defaults_and_leave_them_alone():
    defaults = dict(SOLVER_PARAMETERS)
    given = {"tao_max_it": 2}
    train(classes(), given, monitor=_silent)
    assert defaults == SOLVER_PARAMETERS and given == {"tao_max_it": 2}


@on_ranks
def test_options_come_by_prefix_too():
    options = fd.PETSc.Options()
    options["mine_tao_max_it"] = 2
    try:
        result = train(classes(), options_prefix="mine_", monitor=_silent)
    finally:
        options.delValue("mine_tao_max_it")
    assert result.iterations == 2
