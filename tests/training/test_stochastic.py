"""Stochastic gradients: the iterates of formulas written out in NumPy, on any number of ranks; early stopping; schedules."""

import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import flat_network, label_space, laplace, set_smooth, smooth
from numpy.testing import assert_allclose, assert_array_equal
from problems import coefficients, failing_at, learning_problem, network, polynomials

from fem_resnet import SGD, Adam, Batch, LabelSpace, LearningProblem, least_squares, tikhonov, train, train_stochastic
from fem_resnet.time_stepping.stepper import StepFailure

on_ranks = pytest.mark.parallel([1, 2, 3])
RATE, EPOCHS, SIZE, SAMPLES = 0.05, 3, 3, 7
WEIGHTS = np.array([1.0, 2.0, 0.5, 0.0, 1.0, 3.0, 1.5, 1.0])


def silent(progress):
    pass


def linear_problem(alone=False, bias="nodes", weight=0.1):
    """f(T) = f + T (a - B f), one step of Euler: J is quadratic, by its regulariser strictly convex. Gram matrices matter."""
    phi = laplace("annulus", "CG1", 5, alone)
    psi = polynomials(phi.Y)
    net = flat_network(
        phi, psi, bias=psi if bias == "basis" else None, layers=1, final_time=0.8, activation="identity",
        solver_parameters={"ts_type": "rk", "ts_rk_type": "1fe"},
    )  # fmt: skip
    set_smooth(net, np.random.default_rng(0), 0.3)
    Y = net.Y
    batch = Batch(Y.batch(smooth(Y, SAMPLES + 1)), Y.batch(smooth(Y, SAMPLES + 1, seed=9)), WEIGHTS)
    return LearningProblem(net, None, least_squares, tikhonov(weight), batch)


class Written:
    """The same problem and the same steps, written out: no tape, no function of the package but sums over Y."""

    def __init__(self, problem, step, weight=0.1):
        net, self.step, self.weight = problem.net, step, weight
        self.Y, self.T = net.Y, 0.8
        self.phi, self.psi = net.bases["phi"][0].values, net.bases["psi"][0].values
        self.basis = None if net.bases["bias"][0] is None else net.bases["bias"][0].values
        self.a, self.beta = net.bias.get(0), net.kernel.get(0)
        self.w = self.Y.weights[:, None]
        self.f, self.C = self.Y.values(problem.batch.inputs).copy(), self.Y.values(problem.batch.targets).copy()
        shapes = [self.a.shape, self.beta.shape]
        self.first, self.second = ([np.zeros(shape) for shape in shapes] for _ in range(2))
        self.number = 0

    def gram(self, P, Q=None):
        return self.Y.sum(P.T @ (self.w * (P if Q is None else Q)))

    def riesz(self, chosen, omega):
        """Gradients in L2(Y x (0, T)) and L2(Y x Y x (0, T)); J itself too."""
        f, C, omega = self.f[:, chosen], self.C[:, chosen], omega / omega.sum()
        a = self.a if self.basis is None else self.basis @ self.a
        g = self.gram(self.psi, f)
        error = f + self.T * (a[:, None] - self.phi @ self.beta @ g) - C
        G = self.gram(self.phi), self.gram(self.psi)
        J = self.Y.sum(np.sum(omega * self.w * error**2)) / 2
        J += self.weight / 2 * self.T * self.Y.sum(np.sum(self.w[:, 0] * a**2))
        J += self.weight / 2 * self.T * np.trace(self.beta.T @ G[0] @ self.beta @ G[1])
        in_a = error @ omega  # times T, and over the measure T of the layer
        if self.basis is not None:
            in_a = np.linalg.solve(self.gram(self.basis), self.gram(self.basis, in_a[:, None])[:, 0])
        in_beta = -np.linalg.solve(G[0], self.gram(self.phi, error) @ (omega[:, None] * g.T)) @ np.linalg.inv(G[1])
        return J, [in_a + self.weight * self.a, in_beta + self.weight * self.beta]

    def coordinates(self):
        """For bias and kernel: into coordinates, back, and the factor of the gradient."""
        L = [np.linalg.cholesky(self.gram(P)).T for P in (self.phi, self.psi)]
        area = self.Y.measure
        into, back = lambda c: c, lambda x: x
        if self.basis is not None:
            R = np.linalg.cholesky(self.gram(self.basis)).T
            into, back = lambda c: R @ c / area**0.5, lambda x: np.linalg.solve(R, x) * area**0.5
        return [
            (into, back, area),
            (lambda c: L[0] @ c @ L[1].T, lambda x: np.linalg.solve(L[1], np.linalg.solve(L[0], x).T).T, 1.0),
        ]

    def move(self, chosen, omega, rate):
        J, gradients = self.riesz(chosen, omega)
        self.number += 1
        step, moved = self.step, []
        for c, r, m, v, (into, back, unit) in zip((self.a, self.beta), gradients, self.first, self.second, self.coordinates()):
            c = (1 - rate * step.decay) * c
            if isinstance(step, SGD):
                m[...] = step.momentum * m + r
                moved.append(c - rate * m)
                continue
            g = unit * into(r)
            m[...] = step.beta_1 * m + (1 - step.beta_1) * g
            v[...] = step.beta_2 * v + (1 - step.beta_2) * g**2
            root = np.sqrt(v / (1 - step.beta_2**self.number)) + step.epsilon
            moved.append(back(into(c) - rate * m / (1 - step.beta_1**self.number) / root))
        self.a, self.beta = moved
        return J


STEPS = {
    "SGD": SGD(RATE, momentum=0.0),
    "momentum": SGD(RATE, momentum=0.7, decay=0.1),
    "Adam": Adam(RATE, beta_2=0.9),
    "AdamW": Adam(RATE, decay=0.2, epsilon=1e-3),
}


@on_ranks
@pytest.mark.parametrize("bias", ["nodes", "basis"])
@pytest.mark.parametrize("step", STEPS)
def test_the_iterates_are_those_of_formulas_written_out(step, bias):
    """On an annulus, |Y| = 2.6; a sample of weight 0 is in no batch; the last batch of an epoch has one sample."""
    problem = linear_problem(bias=bias)
    written, random, values = Written(problem, STEPS[step]), np.random.default_rng(4), []
    rates = RATE * (1 + np.cos(np.pi * np.arange(9) / 9)) / 2
    for epoch in range(EPOCHS):
        order = np.random.default_rng(int(random.integers(2**31))).permutation(SAMPLES + 1)
        order, parts = order[WEIGHTS[order] > 0], []
        for n, start in enumerate(range(0, SAMPLES, SIZE)):
            chosen = order[start : start + SIZE]
            parts.append((written.move(chosen, WEIGHTS[chosen], rates[3 * epoch + n]), WEIGHTS[chosen].sum()))
        values.append(np.average([J for J, _ in parts], weights=[weight for _, weight in parts]))
    result = train_stochastic(problem, STEPS[step], batch_size=SIZE, epochs=EPOCHS, seed=4, monitor=silent)
    assert (result.steps, result.epochs, result.best, result.reason) == (9, 3, 3, "EPOCHS")
    assert_allclose(result.rates, rates, rtol=1e-14)
    assert_allclose(result.values[1:], values, rtol=1e-12)
    for found, expected in zip(result.controls, (written.a, written.beta)):
        assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    for parameter, reached in zip(problem.parameters, result.controls):
        assert_array_equal(parameter.get(0), reached)
    assert_allclose(result.value, problem.evaluate()[0], rtol=1e-13)


@pytest.mark.parametrize("step", [SGD(0.5, momentum=0.9), Adam(0.3)], ids=["SGD", "Adam"])
def test_a_convex_problem_is_solved(step):
    """To the minimum that Newton's method finds: all samples in one batch, the rate falling to zero."""
    found = [linear_problem(), linear_problem()]
    train(found[0], {"tao_type": "nls", "tao_gatol": 1e-11}, monitor=silent)
    result = train_stochastic(found[1], step, batch_size=SAMPLES, epochs=120, monitor=silent)
    least = float(found[0].evaluate()[0])
    assert result.values[0] > 1.2 * least
    assert_allclose(result.value, least, rtol=1e-5)
    for p, q in zip(*(problem.parameters for problem in found)):
        assert p.pair(0, p.get(0) - q.get(0), p.get(0) - q.get(0)) < 1e-4 * p.pair(0, p.get(0), p.get(0))


def held_back(problem, samples=5):
    Y = problem.net.Y
    return Batch(Y.batch(smooth(Y, samples, seed=70)), [0, 2, 1, 1, 0])


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("options", [{"learn_times": True}, {"bias": "basis"}], ids=str)
def test_ranks_make_the_steps_that_one_rank_makes(options):
    results, reached = [], []
    for alone in (False, True):
        problem = learning_problem(network("annulus", "CG1", alone=alone, **options), samples=7)
        results.append(
            train_stochastic(
                problem, Adam(0.02, decay=0.01), batch_size=3, epochs=3, seed=8, monitor=silent,
                validation=held_back(problem), patience=2,
            )
        )  # fmt: skip
        reached.append([coefficients(p, function) for p in problem.parameters for function in p.functions])
    assert results[0].steps == results[1].steps > 3 and results[0].best == results[1].best
    assert_allclose(results[0].values, results[1].values, rtol=1e-9)
    assert_allclose(results[0].validation, results[1].validation, rtol=1e-9)
    for ours, alone in zip(*reached):
        assert_allclose(ours, alone, atol=1e-8 * max(1, np.abs(alone).max()))


@on_ranks
def test_early_stopping_keeps_the_best_state():
    """A validation batch whose labels are others: its loss rises soon."""
    problem = learning_problem(network("annulus", "CG1"), samples=7, weight=None)
    validation, seen = held_back(problem), []
    result = train_stochastic(
        problem, Adam(0.1), batch_size=4, epochs=60, validation=validation, patience=2, schedule="constant",
        monitor=lambda progress: seen.append([progress.validation, *(p.get(0) for p in problem.parameters)]),
    )  # fmt: skip
    assert result.reason == "PATIENCE" and result.epochs == result.best + 2 < 60
    assert result.best == np.argmin(result.validation) and len(result.validation) == len(result.values) == result.epochs + 1
    assert [entry[0] for entry in seen] == list(result.validation)
    assert result.value > result.values[-1], "J of the samples fell on, and the parameters were put back"
    for parameter, best in zip(problem.parameters, seen[result.best][1:]):
        assert_array_equal(parameter.get(0), best)
    loss = problem.replace(batch=validation, regulariser=None).evaluate()[0]
    assert_allclose(loss, result.validation.min(), rtol=1e-13)
    assert_allclose(result.value, problem.evaluate()[0], rtol=1e-13)
    assert_array_equal(result.controls[0], problem.parameters[0].get(0))


@on_ranks
def test_nothing_is_recorded_again_and_the_problem_stays(monkeypatch):
    problem, recordings = learning_problem(network("annulus", "CG1"), samples=7), []
    record = LearningProblem.record

    def counting(*args, **kwargs):
        recordings.append(record(*args, **kwargs))
        return recordings[-1]

    monkeypatch.setattr(LearningProblem, "record", counting)
    batch = problem.batch
    result = train_stochastic(problem, batch_size=3, epochs=3, monitor=silent)
    assert len(recordings) == 1 and problem.batch is batch and result.steps == 9
    again = learning_problem(network("annulus", "CG1"), samples=7)
    for found, expected in zip(train_stochastic(again, batch_size=3, epochs=3, monitor=silent).controls, result.controls):
        assert_allclose(found, expected, atol=1e-13)  # on several ranks sums of other addresses differ by round-off
    other = learning_problem(network("annulus", "CG1"), samples=7)
    assert train_stochastic(other, batch_size=3, epochs=1, seed=1, monitor=silent).value != result.value


def test_the_samples_are_read_once_for_all_mini_batches(monkeypatch):
    """A reading is a view, but with channels a copy of the whole batch: one for each mini-batch took most of the time."""
    problem, read = learning_problem(network("annulus", "CG1"), samples=7), []
    values = LabelSpace.values

    def counting(self, function):
        read.append(function)
        return values(self, function)

    monkeypatch.setattr(LabelSpace, "values", counting)
    batches = problem.minibatches(2, seed=1)
    of_the_whole = [function for function in read if function.function_space().value_size == 7]
    assert len(batches) == 4 and len(of_the_whole) == 2, "inputs and targets"


@on_ranks
def test_a_schedule_is_what_rank_0_says():
    def schedule(s):
        assert COMM_WORLD.rank == 0
        return 1 - s**2

    problem = linear_problem()
    result = train_stochastic(problem, SGD(0.1), batch_size=4, epochs=2, schedule=schedule, monitor=silent)
    assert_allclose(result.rates, 0.1 * (1 - np.array([0, 1, 2, 3]) ** 2 / 16), rtol=1e-14)
    with pytest.raises(ValueError, match="schedule: expected a number >= 0, got -1"):
        train_stochastic(problem, batch_size=4, epochs=2, schedule=lambda s: -1, monitor=silent)
    with pytest.raises(ValueError, match="schedule: expected one of 'constant', 'cosine', got 'linear'"):
        train_stochastic(problem, schedule="linear", batch_size=4)
    with pytest.raises(TypeError, match="schedule: expected one of 'constant', 'cosine' or a function of a number"):
        train_stochastic(problem, schedule=0.5, batch_size=4)


@on_ranks
def test_the_monitor_stops_on_any_rank_and_no_epoch_is_a_start():
    problem = linear_problem()
    before = problem.parameters[0].get(0)
    result = train_stochastic(problem, epochs=0, batch_size=4)
    assert (result.reason, result.steps, result.best, result.rates.shape) == ("EPOCHS", 0, 0, (0,))
    assert_array_equal(problem.parameters[0].get(0), before)
    result = train_stochastic(
        problem, batch_size=4, monitor=lambda progress: progress.epoch == 2 and COMM_WORLD.rank == COMM_WORLD.size - 1
    )
    assert (result.reason, result.epochs, result.steps) == ("STOPPED", 2, 4)


@on_ranks
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_diverges_leaves_the_last_whole_epoch():
    problem = linear_problem()
    result = train_stochastic(problem, SGD(1e60, momentum=0.0), batch_size=2, epochs=9, schedule="constant", monitor=silent)
    assert result.reason == "NOT_FINITE" and result.epochs < 9
    assert all(np.isfinite(part).all() for part in result.controls)


@on_ranks
def test_after_an_error_the_parameters_hold_what_was_kept():
    whole = learning_problem(network("annulus", "CG1"), samples=6)
    expected = train_stochastic(whole, batch_size=3, epochs=1, monitor=silent, schedule="constant").controls
    # Evaluations: one is recorded, two at the start, two of the first epoch, the second of the next one.
    problem = failing_at(7, learning_problem(network("annulus", "CG1"), samples=6))
    with pytest.raises(StepFailure, match="layer 2"):
        train_stochastic(problem, batch_size=3, epochs=2, monitor=silent, schedule="constant")
    found = [p.get(k) for p in problem.parameters for k in range(len(p.functions))]
    for reached, kept in zip(found, expected, strict=True):
        assert_allclose(reached, kept, atol=1e-13)  # far from what a further step would give


@pytest.mark.parallel([1, 2])
def test_arguments_that_do_not_fit_are_refused():
    problem = linear_problem()
    with pytest.raises(ValueError, match="batch_size: expected an integer from 1 to 7, got 8"):
        train_stochastic(problem, batch_size=8)
    with pytest.raises(ValueError, match="patience: expected None without a validation batch, got 3; give validation="):
        train_stochastic(problem, batch_size=4, patience=3)
    other = label_space("disk", "CG1")
    with pytest.raises(ValueError, match="^validation.inputs: "):
        train_stochastic(problem, batch_size=4, validation=Batch(other.batch(smooth(other)), other.batch(smooth(other))))
    with pytest.raises(TypeError, match=r"step: expected a StochasticStep, got float; such as Adam\(rate=0.01\)"):
        train_stochastic(problem, 0.1)
