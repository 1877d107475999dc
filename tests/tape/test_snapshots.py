"""A Run belongs to what it was run with, or says that this has changed; whatever it is asked for later."""

import copy
import pickle

import firedrake as fd
import numpy as np
import pytest
from helpers import smooth
from kinds import COST, KINDS, observed_problem
from problems import learning_problem, network, taping
from pyadjoint import get_working_tape, set_working_tape

from fem_resnet import Run, least_squares

on_ranks = pytest.mark.parallel([1, 2, 3])


def _values(run, function):
    return np.array(function.dat.data_ro)


#: What each public name of a Run gives, as arrays that can be compared.
GIVES = {
    "net": lambda run: [],  # a network's coefficients may change at any time; what it was made with does not
    "initial": lambda run: [_values(run, run.initial)],
    "cost": lambda run: [float(run.cost)],
    "omega": lambda run: [] if run.omega is None else [run.omega],
    "final": lambda run: [_values(run, run.final)],
    "held": lambda run: [_values(run, run.held(run.net.layers)[0])],
    "state": lambda run: [_values(run, run.state(layer)) for layer in range(run.net.layers + 1)],
    "states": lambda run: [_values(run, state) for state in run.states()],
    "costate": lambda run: [_values(run, run.costate(layer)) for layer in range(run.net.layers + 1)],
    "tangent": lambda run: [_values(run, run.tangent(run.net.Y.batch(smooth(run.net.Y, 3, seed=77))))],
    "exchange_weights": None,  # changes what the next evaluation takes
}


def test_every_public_name_of_a_run_is_gone_through():
    assert {name for name in dir(Run) if not name.startswith("_")} | {"net", "cost"} == set(GIVES)


def _changed(net, initial, before):
    """Other inputs, through an array that was taken before the run too, and other parameters, and another run."""
    before[...] *= -2.0
    initial.assign(3.0)
    for parameter in net.parameters:
        for function in parameter.functions:
            function.assign(0.3 * function)
    net.run(net.Y.batch(smooth(net.Y, 3, seed=9)))


def _asked(run, names):
    return {name: GIVES[name](run) for name in names}


@on_ranks
@pytest.mark.parametrize("kind", KINDS if fd.COMM_WORLD.size == 1 else ["Runge-Kutta", "running cost", "learned factors"])
def test_an_unrecorded_run_is_of_the_inputs_and_parameters_of_its_time(kind):
    net, options = KINDS[kind]()
    initial, weights = net.Y.batch(smooth(net.Y, 3)), np.array([1.0, 2.0, 0.5])
    before = initial.dat.data
    if options:
        options |= {"weights": weights}
    run, same = (net.run(initial, **options) for _ in range(2))
    names = [name for name in GIVES if name not in ("costate", "exchange_weights")]
    first = _asked(same, names)  # of another Run, so that nothing is asked for here before the change
    _changed(net, initial, before)
    weights *= 7.0
    for name, values in _asked(run, names).items():
        for found, expected in zip(values, first[name], strict=True):
            np.testing.assert_array_equal(found, expected, err_msg=name)


@on_ranks
@pytest.mark.parametrize("kind", KINDS if fd.COMM_WORLD.size == 1 else ["Runge-Kutta", "learned factors"])
def test_a_recorded_run_is_of_the_tape_whatever_becomes_of_functions(kind):
    net, options = KINDS[kind]()
    initial = net.Y.batch(smooth(net.Y, 3))
    with taping():
        run = net.run(initial, **options)
        J = least_squares(net.Y, run.final, net.Y.batch(smooth(net.Y, 3, seed=4)))
        tape = get_working_tape()
    controls = [c for p in net.parameters for c in p.controls()]
    derive = fd.adjoint.ReducedFunctional(J, controls, tape=tape).derivative
    names = [name for name in GIVES if name not in ("initial", "exchange_weights")]
    derive()
    # Bits of the steps of an adapted type are those of a recording; its tangent is stepped anew.
    first = _asked(run, names)
    assert run.initial is initial  # for Controls
    _changed(net, initial, initial.dat.data)
    for name, values in _asked(run, names).items():
        for found, expected in zip(values, first[name], strict=True):
            np.testing.assert_array_equal(found, expected, err_msg=name)


@on_ranks
def test_an_evaluation_of_coefficients_alone_is_of_its_time():
    """Nothing of size nodes x samples is computed, and states are rebuilt from f_I when they are asked for."""
    net = network("annulus", "CG1", layers_per_block=1)
    problem = observed_problem(net)
    initial = problem.batch.inputs
    before = initial.dat.data
    (_, run), (_, same) = (problem.evaluate() for _ in range(2))
    names = ["initial", "final", "held", "state", "states"]
    first = _asked(same, names)
    before[...] *= -2.0
    for parameter in net.parameters:
        for function in parameter.functions:
            function.assign(0.3 * function)
    problem.evaluate()
    for name, values in _asked(run, names).items():
        for found, expected in zip(values, first[name], strict=True):
            np.testing.assert_array_equal(found, expected, err_msg=name)


@on_ranks
def test_a_tape_that_has_other_inputs_and_no_evaluation_says_so():
    """`exchange` and controls that are updated change the tape; states would be rebuilt from another start."""
    problem = learning_problem(network("disk", "CG1"), head=False)
    J, run = problem.record()
    before = [np.array(run.state(layer).dat.data_ro) for layer in range(4)]
    batch = problem.batch
    problem.exchange(type(batch)(problem.net.Y.batch(smooth(problem.net.Y, 4, seed=3)), batch.targets))
    direction = problem.net.Y.batch(smooth(problem.net.Y, 4, seed=5))
    for ask in (lambda: run.state(1), lambda: list(run.states()), lambda: run.tangent(direction)):
        with pytest.raises(RuntimeError, match="an input has changed since the tape was evaluated; evaluate the functional"):
            ask()
    problem.exchange(batch)
    J(problem.functions)
    for layer in range(4):
        np.testing.assert_array_equal(run.state(layer).dat.data_ro, before[layer])


def test_a_tangent_of_a_run_that_is_not_on_the_tape_is_refused_while_it_annotates():
    net = network("disk", "CG1")
    initial = net.Y.batch(smooth(net.Y, 3))
    run = net.run(initial)
    with taping(), pytest.raises(RuntimeError, match="tangent: this run is not on the tape that annotates"):
        run.tangent(initial)
    with taping():
        run = net.run(initial)
    with set_working_tape(), taping(), pytest.raises(RuntimeError, match="tangent: this run is not on the tape"):
        run.tangent(initial)


def test_a_tangent_of_a_recorded_run_is_that_where_the_tape_stands():
    """Not at what the parameters' Functions hold."""
    problem = learning_problem(network("disk", "CG1"), head=False)
    J, run = problem.record()
    v = problem.net.Y.batch(smooth(problem.net.Y, 4, seed=5))
    J([fd.Function(function).assign(0.5 * function) for function in problem.functions])
    found = np.array(run.tangent(v).dat.data_ro)
    for function in problem.functions:
        function.assign(0.5 * function)
    np.testing.assert_allclose(found, problem.net.run(problem.batch.inputs).tangent(v).dat.data_ro, rtol=0, atol=1e-14)


def test_a_run_on_a_tape_keeps_its_controls_when_parameters_are_recorded_again():
    """`record` gives Functions new variables: a state asked for later still depends on those of its own tape."""
    problem = learning_problem(network("disk", "CG1", layers_per_block=None), head=False)
    J, run = problem.record()
    problem.record()
    with set_working_tape(J.tape), taping():
        again = least_squares(problem.net.Y, run.state(1), problem.net.Y.batch(0 * smooth(problem.net.Y, 4)))
        again = fd.adjoint.ReducedFunctional(again, J.controls, tape=J.tape)
    again.derivative()
    assert max(np.abs(c.get_derivative().dat.data_ro).max() for c in J.controls) > 1e-3


def test_a_tangent_on_a_tape_keeps_its_controls_when_parameters_are_recorded_again():
    problem = learning_problem(network("disk", "CG1"), head=False)
    Y, v = problem.net.Y, problem.net.Y.batch(smooth(problem.net.Y, 4, seed=5))
    derivatives = []
    for again in (False, True):
        J, run = problem.record()
        if again:
            problem.record()
        with set_working_tape(J.tape), taping():
            J_v = fd.adjoint.ReducedFunctional(
                least_squares(Y, run.tangent(v), Y.batch(smooth(Y, 4))), J.controls, tape=J.tape
            )
        derivatives.append([np.array(d.dat.data_ro) for d in J_v.derivative()])
    for one, other in zip(*derivatives, strict=True):
        np.testing.assert_array_equal(one, other)
    assert max(np.abs(d).max(initial=0.0) for d in derivatives[0]) > 1e-3


def test_the_running_cost_of_a_run_stays():
    net = network("disk", "CG1")
    run = net.run(net.Y.batch(smooth(net.Y, 3)), COST, [1.0, 2.0, 3.0])
    with pytest.raises(AttributeError, match="cost: a Run stays what it was made with"):
        run.cost = 0.0
    run.omega[...] = 0.0  # a copy
    assert abs(run.omega.sum() - 1.0) < 1e-15


def test_runs_neither_pickle_nor_are_copied():
    net = network("disk", "CG1")
    run = net.run(net.Y.batch(smooth(net.Y, 3)))
    assert copy.deepcopy(run) is run
    with pytest.raises(TypeError, match="pickle: a Run lives on a mesh"):
        pickle.dumps(run)
