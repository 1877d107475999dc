"""States at layer times as outputs of the tape, also inside of a Block, and observations there as losses."""

from contextlib import contextmanager
from dataclasses import replace

import firedrake as fd
import numpy as np
import pytest
import sympy
from firedrake import COMM_WORLD
from helpers import TIMES, half_square_distance, smooth
from kinds import KINDS
from kinds import observed_problem as _observed
from numpy.testing import assert_allclose
from problems import learning_problem, network, taping
from pyadjoint import Control, ReducedFunctional, get_working_tape, set_working_tape
from pyadjoint.enlisting import Enlist

from fem_resnet import (
    Batch,
    Derivatives,
    Kernel,
    LearningProblem,
    Observations,
    ResidualNetwork,
    least_squares,
    train,
    verify,
)  # fmt: skip
from fem_resnet.network.coefficient_segment import CoefficientSegment

on_ranks = pytest.mark.parallel([1, 2, 3])
on_two_ranks = pytest.mark.parallel([1, 2])

f, a = sympy.symbols("f a")


#: Not the last one: J depends on f(T) through nothing but a running cost, where there is one.
LAYERS = (0, 1, 2)


def _recorded(net, options, layers=LAYERS, announced=False):
    """J = sum_l (l + 1)/2 |f(t_l) - C_l|^2 (+ the running cost) of all coefficients and f_I, and the run."""
    initial = net.Y.batch(smooth(net.Y, 3))
    observed = {"observed": layers} if announced else {}
    with taping():
        run = net.run(initial, **options, **observed)
        J = 1.0 * run.cost if options else 0.0
        for l in layers:
            J = J + (l + 1) * half_square_distance(run.state(l), net.Y.batch(smooth(net.Y, 3, seed=60 + l)), net.Y)
        controls = [*(c for p in net.parameters for c in p.controls()), Control(run.initial, riesz_map=net.Y.riesz_map)]
        return ReducedFunctional(J, controls, tape=get_working_tape()), run


def _point(J):
    return [control.control.copy(deepcopy=True) for control in J.controls]


def _directions(net, rng):
    """Of size one in all coefficients, and short enough in layer times, and f_I."""
    result = []
    for p in net.parameters:
        for k, basis in enumerate(p.space_bases):
            function = fd.Function(basis.space)
            if basis.space == net.Y.V:
                basis.write(function, smooth(net.Y, 1, seed=100 + k)[:, 0])
            else:
                basis.write(function, (0.1 if p is net.layer_times else 1.0) * rng.normal(size=basis.shape))
            result.append(function)
    return [*result, net.Y.batch(smooth(net.Y, 3, seed=50))]


def _arrays(derivatives):
    return [np.array(d.dat.data_ro) for d in Enlist(derivatives)]


@on_two_ranks
@pytest.mark.parametrize("kind", KINDS if COMM_WORLD.size == 1 else ["running cost", "adapted steps"])
def test_a_loss_at_inner_times_has_all_derivatives(kind, rng, taylor):
    net, options = KINDS[kind]()
    J, _ = _recorded(net, options)
    taylor(J, _point(J), _directions(net, rng), f"inner times, {kind}", "all", second_order=True)


@pytest.mark.parametrize("kind", ["Runge-Kutta", "two layers a Block", "bases of each layer", "running cost", "adapted steps"])
def test_states_asked_for_afterwards_are_those_that_were_announced(kind):
    """J, derivative and Hessian action; the first derivative solves again, since layers were solved without a stop there."""
    answers = []
    for announced in (False, True):
        net, options = KINDS[kind]()
        J, _ = _recorded(net, options, announced=announced)
        m, h = _point(J), _directions(net, np.random.default_rng(1))
        first = _arrays(J.derivative())
        answers.append([[np.array([float(J(m))])], _arrays(J.derivative()), first, _arrays(J.hessian(h))])
    for one, other in zip(*answers, strict=True):
        for x, y in zip(one, other, strict=True):
            assert_allclose(x, y, rtol=0, atol=1e-12 * max(np.abs(y).max(initial=0.0), 1e-3))


@on_ranks
@pytest.mark.parametrize("layers_per_block", [2, 1, None][: None if COMM_WORLD.size == 1 else 1])
def test_a_loss_at_an_inner_time_is_that_of_the_network_of_the_first_layers(layers_per_block):
    """Value, derivative, Hessian action and the co-state at every layer time before, by a network that ends there."""
    whole = network("annulus", "CG1", layers_per_block=layers_per_block)
    for l in (1, 2):
        part = ResidualNetwork(Kernel(*(whole.bases[name] for name in ("phi", "psi"))), layers=TIMES[: l + 1])
        for k in range(l):
            part.bias.set(k, whole.bias.get(k))
            part.kernel.set(k, whole.kernel.get(k))
        answers = []
        for net in (whole, part):
            J, run = _recorded(net, {}, layers=(l,))
            value, derivative = float(J(_point(J))), _arrays(J.derivative())
            costates = [net.Y.values(run.costate(layer)).copy() for layer in range(l + 1)]
            action = _arrays(J.hessian(_first(net, l)))
            of = [*range(l), *range(net.layers, net.layers + l), -1]
            answers.append([[value], [derivative[k] for k in of], costates, [action[k] for k in of]])
            assert all(not derivative[k].any() for k in range(2 * net.layers) if k not in of)
        for one, other in zip(*answers, strict=True):
            for x, y in zip(one, other, strict=True):
                assert_allclose(x, y, rtol=0, atol=1e-12 * max(np.abs(y).max(initial=0.0), 1e-3))


def _first(net, l):
    """A direction in the coefficients of the first l layers and f_I, the same for networks of more layers."""
    result = []
    for p in net.parameters:
        for k, basis in enumerate(p.space_bases):
            function = fd.Function(basis.space)
            if k < l:
                values = (
                    smooth(net.Y, 1, seed=k)[:, 0] if basis.space == net.Y.V else np.cos(np.arange(12.0) + k).reshape(4, 3)
                )
                basis.write(function, np.resize(values, basis.shape))
            result.append(function)
    return [*result, net.Y.batch(smooth(net.Y, 3, seed=50))]


@pytest.mark.parametrize("kind", ["a Block a layer", "Runge-Kutta", "two layers a Block", "running cost"])
def test_the_costate_jumps_where_a_loss_is(kind):
    """r(t_l) is the gradient of J in f(t_l), the loss there among it: J of the layers that are left, from another f(t_l)."""
    net, options = KINDS[kind]()
    J, run = _recorded(net, options)
    J.derivative()
    for layer in LAYERS:
        tail_J, tail = _tail(net, run.state(layer), layer, options)
        tail_J.derivative()
        expected = net.Y.values(tail.costate(0))
        found = net.Y.values(run.costate(layer))
        assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max(initial=1e-3))
    assert np.abs(found).max(initial=0.0) > 0.0


def _tail(net, start, layer, options):
    """The same J from t_layer on, as that of a network."""
    part = ResidualNetwork(
        Kernel(*(net.bases[name] for name in ("phi", "psi"))), layers=np.array(TIMES[layer:]) - TIMES[layer]
    )
    for k in range(part.layers):
        part.bias.set(k, net.bias.get(layer + k))
        part.kernel.set(k, net.kernel.get(layer + k))
    with taping():
        run = part.run(start, **options)
        J = 1.0 * run.cost if options else 0.0
        for l in LAYERS:
            if l >= layer:
                J = J + (l + 1) * half_square_distance(run.state(l - layer), net.Y.batch(smooth(net.Y, 3, seed=60 + l)), net.Y)
        return ReducedFunctional(J, [Control(run.initial)], tape=get_working_tape()), run


def test_a_state_on_the_tape_follows_evaluations_and_is_one_function():
    net = network("disk", "CG1", layers_per_block=None)
    J, run = _recorded(net, {}, layers=(1,))
    with taping():
        assert run.state(1) is run.state(1) and run.final is run.state(3)
        assert all(state is run.state(layer) for layer, state in enumerate(run.states()))
    m = _point(J)
    for function in m[:-1]:
        function.dat.data_wo[...] *= 0.5
    value = float(J(m))
    moved = net.Y.values(run.state(1))  # annotation is off: rebuilt from the latest evaluation
    assert_allclose(value, np.sum(net.Y.sum(net.Y.weights @ (moved - smooth(net.Y, 3, seed=61)) ** 2)), rtol=1e-12)
    for parameter, k in ((p, k) for p in net.parameters for k in range(3)):
        parameter.set(k, 0.5 * parameter.get(k))
    assert_allclose(moved, net.Y.values(net.run(m[-1]).state(1)), rtol=0, atol=1e-13)


# -- observations of a learning problem ------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("head", [True, False], ids=["classes", "field"])
def test_observations_add_a_loss_at_each_layer_time(head):
    """J by hand, from states and outputs of unrecorded runs of networks of the first layers."""
    net = network("annulus", "CG1", layers_per_block=None)
    problem = _observed(net, head=head)
    J, _ = problem.evaluate()
    expected = float(problem.replace(batch=replace(problem.batch, observations=None)).evaluate()[0])
    run = net.run(problem.batch.inputs)
    for l, targets, weight in zip(*(getattr(problem.observations, name) for name in ("layers", "targets", "weights"))):
        at_l = problem.replace(batch=Batch(problem.batch.inputs, targets, problem.batch.weights))
        output, C = run.state(l), targets
        if head:
            output, C = problem.head(output), problem.head.observations(targets)
        expected += weight * float(problem.loss(at_l._output, output, C, problem.batch.weights))
    assert_allclose(float(J), expected, rtol=1e-12)
    assert_allclose(float(problem.record()[0](problem.functions)), expected, rtol=1e-12)


@on_two_ranks
@pytest.mark.parametrize("layers_per_block", [2, 1, None][: None if COMM_WORLD.size == 1 else 1])
@pytest.mark.parametrize("learn", ["both", "parameters"][: None if COMM_WORLD.size == 1 else 1])
def test_observations_have_all_derivatives_seen_by_the_layers_own_psi(layers_per_block, learn, rng, taylor):
    """The head reads what layers step: no state has nodal values, and the numbers are those of the way through f."""
    net = network("annulus", "CG1", layers_per_block=layers_per_block)
    answers = []
    for psi in (net.bases["psi"][0], type(net.bases["psi"][0])(net.Y, net.bases["psi"][0].values, "given")):
        problem = _observed(net, psi, learn=learn)
        J, run = problem.record()
        assert isinstance(run._pieces[0].segment, CoefficientSegment) == (psi is net.bases["psi"][0])
        h = _of_problem(problem, rng)
        taylor(J, problem.functions, h, f"observations, {learn}", f"{layers_per_block} a Block", second_order=True)
        h = _of_problem(problem, np.random.default_rng(3))
        J(problem.functions)
        answers.append([_arrays(J.derivative()), _arrays(J.hessian(h))])
    for one, other in zip(*answers):
        for x, y in zip(one, other, strict=True):
            assert_allclose(x, y, rtol=0, atol=1e-12 * max(np.abs(y).max(initial=0.0), 1e-3))


def _of_problem(problem, rng):
    """A direction in all that is learned."""
    result = []
    for p in problem.parameters:
        for k, basis in enumerate(p.space_bases):
            function = fd.Function(basis.space)
            nodal = basis.space.mesh() is problem.net.Y.V.mesh()
            samples = basis.space.value_size
            basis.write(
                function,
                smooth(problem.net.Y, samples, seed=40 + k).reshape(basis.shape) if nodal else rng.normal(size=basis.shape),
            )
            result.append(function)
    return result


def test_gauss_newton_leaves_out_the_curvature_of_every_observed_output():
    """A A^T of the outputs' Jacobian, by differences of unrecorded outputs at all observed times."""
    net = network("disk", "CG1", layers_per_block=None)
    problem = _observed(net, head=False)
    J = problem.reduced_functional(gauss_newton=True)
    h = _of_problem(problem, np.random.default_rng(3))
    J(problem.functions)
    J.derivative()
    found = sum(np.sum(d * v.dat.data_ro) for d, v in zip(_arrays(J.hessian(h)), h, strict=True))
    seen, omega = problem.observations, np.arange(1.0, 5.0) / 10
    base, eps, expected = [f.copy(deepcopy=True) for f in problem.functions], 1e-5, 0.0

    def states(step):
        for function, at, v in zip(problem.functions, base, h):
            function.assign(at + step * v)
        run = net.run(problem.batch.inputs)
        return [np.array(net.Y.values(run.state(l))) for l in range(4)]

    for l, (plus, minus) in enumerate(zip(states(eps), states(-eps))):
        change = (plus - minus) / (2 * eps)
        weight = dict(zip(seen.layers, seen.weights)).get(l, 0.0) + (l == 3)
        expected += weight * float((net.Y.weights @ change**2) @ omega)
    states(0.0)
    expected += 2 * _quadratic(problem, h)
    assert_allclose(found, expected, rtol=1e-7)


def _quadratic(problem, h):
    """R(h): the regulariser is quadratic."""
    kept = [function.copy(deepcopy=True) for function in problem.functions]
    for function, v in zip(problem.functions, h):
        function.assign(v)
    R = float(problem.regulariser(problem.penalised()))
    for function, before in zip(problem.functions, kept):
        function.assign(before)
    return R


@on_ranks
@pytest.mark.parametrize("head", [True, False], ids=["classes", "field"])
def test_minibatches_take_observations_and_derivatives_with_their_samples(head):
    """The mean of J over the minibatches is J, with the sums of omega for weights; the last is padded."""
    net = network("annulus", "CG1", layers_per_block=None)
    problem = _observed(net, head=head)
    if not head:
        Y, samples = net.Y, problem.batch.samples
        derivatives = Derivatives(Y.batch(smooth(Y, samples, seed=3)), Y.batch(smooth(Y, samples, seed=4)), 0.7)
        problem = problem.replace(batch=replace(problem.batch, derivatives=derivatives))
    problem = problem.replace(regulariser=None)
    parts = problem.minibatches(3, seed=1)
    assert [part.samples for part in parts] == [3, 3]
    values = [float(problem.replace(batch=part).evaluate()[0]) for part in parts]
    assert_allclose(
        np.average(values, weights=[sum(part.weights) for part in parts]), float(problem.evaluate()[0]), rtol=1e-12
    )


def test_training_finds_an_initial_state_from_what_was_seen_on_the_way():
    """Data assimilation: nothing but observations before T and weights that leave little of the loss at T."""
    net = network("disk", "CG1", layers_per_block=None)
    truth = net.Y.batch(smooth(net.Y, 2, seed=5))
    run = net.run(truth)
    seen = Observations([0, 1, 2], [run.state(l) for l in range(3)], [1.0, 2.0, 2.0])
    batch = Batch(net.Y.batch(0 * smooth(net.Y, 2)), run.final, observations=seen)
    problem = LearningProblem(net, None, least_squares, None, batch, learn="initial")
    assert train(problem, {"tao_gatol": 1e-9}).converged
    assert net.Y.norm(fd.Function(truth).assign(batch.inputs - truth)) < 1e-6


def test_what_does_not_go_with_observations_is_refused_by_name():
    net = network("disk", "CG1", layers_per_block=1)
    problem = _observed(net)
    with pytest.raises(ValueError, match="observations: a schedule of checkpoints keeps no states inside"):
        problem.replace(checkpoints=1)
    with pytest.raises(ValueError, match="batch: the observations belong to the present batch|exchange: it does not take obs"):
        problem.exchange(problem.batch)
    with pytest.raises(ValueError, match="verify: it does not take observations before T"):
        verify(problem)
    labels = np.arange(4) % 3
    for given, message in (
        (Observations([4], [labels]), r"observations.layers: expected increasing integers from 0 to L = 3, got \(4,\)"),
        (Observations([1], [labels[:3]]), "observations.targets: expected 4 samples, as many as inputs, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            problem.replace(batch=replace(problem.batch, observations=given))
    for wrong, message in (
        (([1, 1], [labels, labels]), r"^layers: expected increasing integers, got \(1, 1\)"),
        (([1.0], [labels]), "^layers: expected an integer >= 0, got 1.0"),
        (([1, 2], [labels]), "^targets: expected 2, one a layer time, got 1"),
        (([1], [labels], [-1.0]), "^weights: expected a number >= 0, got -1.0"),
        (([1], [labels], [1.0, 2.0]), "^weights: expected 1, one a layer time, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Observations(*wrong)
    with pytest.raises(TypeError, match="observations: expected an Observations or None, got list"):
        replace(problem.batch, observations=[1])
    for layers in ([1, 1], [4], [-1]):
        with pytest.raises(
            ValueError, match="observed: expected (different integers from 0 to L = 3|an integer from 0 to 3), got"
        ):
            net.run(problem.batch.inputs, observed=layers)


def test_states_that_no_tape_knows_are_refused_while_it_annotates():
    """Of a run for what psi sees alone f is nowhere; under a schedule of checkpoints it is gone."""
    net = network("annulus", "CG1", layers_per_block=None)
    J, run = _observed(net).record()
    assert net.Y.values(run.state(1)).shape == (net.Y.nodes, 4)
    with taping_on(J.tape):
        for ask in (lambda: run.state(1), lambda: run.final, lambda: list(run.states())):
            with pytest.raises(RuntimeError, match="state: this run was recorded for what psi sees alone"):
                ask()
    J, run = learning_problem(network("disk", "CG1", layers_per_block=1)).replace(checkpoints=1).record()
    with taping_on(J.tape), pytest.raises(RuntimeError, match="state: this run was recorded under a schedule"):
        run.state(1)


@contextmanager
def taping_on(tape):
    with set_working_tape(tape), taping():
        yield
