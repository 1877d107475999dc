"""The choice of lambda: against ridge regression written out, and on noisy data of a network; folds of samples."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from firedrake import COMM_WORLD, Ensemble
from helpers import flat_network, label_space, laplace, set_smooth, smooth
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.model_selection import KFold

from fem_resnet import (
    Batch,
    Derivatives,
    Head,
    LearningProblem,
    Lift,
    Observations,
    StepFailure,
    choose_lambda,
    huber,
    least_squares,
    smooth_in_time,
    tikhonov,
    train,
    train_levenberg_marquardt,
)  # fmt: skip

on_ranks = pytest.mark.parallel([1, 2, 3])
#: |Y| is 2.6.
DOMAIN = "annulus", "CG1"
RANK = 5
DELTA = 0.5


# -- a head alone: ridge regression -----------------------------------------------------------------------------------

SIZES = 0.4 ** np.arange(RANK)
W = np.random.default_rng(5).normal(size=(RANK, RANK))
OMEGA = np.linspace(0.5, 2, 10)


def head_data(samples, seed):
    """Coefficients of inputs and noisy outputs in the basis, shape (RANK, samples) each."""
    rng = np.random.default_rng(seed)
    g = SIZES[:, None] * rng.normal(size=(RANK, samples))
    return g, W @ g + DELTA * rng.normal(size=(RANK, samples))


def head_problem(alone=False, omega=OMEGA):
    """Without layers J is quadratic in W and mu."""
    phi = laplace(*DOMAIN, RANK, alone)
    g, c = head_data(10, seed=0)
    net = flat_network(phi, bias=phi, times=[0.0])
    return LearningProblem(
        net, Head(phi, phi, "identity"), least_squares, tikhonov(1.0),
        Batch(*(phi.Y.batch(phi.values @ values) for values in (g, c)), omega),
    )  # fmt: skip


def ridge(weight, g, c, omega):
    """W and mu side by side that minimise the mean of 1/2 |W g + mu - c|^2 plus weight/2 (|W|^2 + |mu|^2)."""
    X, omega = np.vstack([g, np.ones(g.shape[1])]), omega / omega.sum()
    return np.linalg.solve(X * omega @ X.T + weight * np.eye(RANK + 1), X * omega @ c.T).T


def ridge_misfit(both, g, c, omega):
    return 0.5 * np.average(((both[:, :-1] @ g + both[:, -1:] - c) ** 2).sum(axis=0), weights=omega)


def newton(p):
    """J is quadratic: one step without damping is the minimum, and another one mends round-off."""
    return train_levenberg_marquardt(p, iterations=2, damping=1e-14, monitor=lambda _: None)


LAMBDAS = np.geomspace(3, 1e-5, 8)


@on_ranks
def test_cross_validation_is_that_of_ridge_regression_and_near_the_best_on_test_data():
    p, (g, c) = head_problem(), head_data(10, seed=0)
    found = choose_lambda(p, LAMBDAS, newton, folds=4)
    expected = np.array([
        [
            ridge_misfit(ridge(weight, g[:, rest], c[:, rest], OMEGA[rest]), g[:, part], c[:, part], OMEGA[part])
            for rest, part in KFold(4).split(g.T)
        ]
        for weight in LAMBDAS
    ])  # fmt: skip
    assert_allclose(found.errors, expected, rtol=1e-7)
    means = np.average(expected, axis=1, weights=[OMEGA[part].sum() for _, part in KFold(4).split(g.T)])
    assert_allclose(found.scores, means, rtol=1e-7)
    assert found.chosen == LAMBDAS[np.argmin(means)] and found.rule == "cross validation"
    for k, weight in enumerate(LAMBDAS):
        both = ridge(weight, g, c, OMEGA)
        assert_allclose(found.misfits[k], ridge_misfit(both, g, c, OMEGA), rtol=1e-7)
        assert_allclose(found.penalties[k], 0.5 * (both**2).sum(), rtol=1e-7)
    # The parameters are those of the chosen one, with all samples.
    assert_allclose(p.head.W.get(0), ridge(found.chosen, g, c, OMEGA)[:, :-1], rtol=1e-6, atol=1e-8)
    assert found.problem.net is p.net and found.problem.head is p.head
    assert_allclose(float(found.problem.evaluate()[0]), found.results[np.argmin(means)].value, rtol=1e-12)
    # On many samples that nobody has trained with it is near the best, and better than no regularisation and a strong one.
    test = [ridge_misfit(ridge(weight, g, c, OMEGA), *head_data(4000, seed=1), np.ones(4000)) for weight in LAMBDAS]
    assert abs(np.argmin(test) - np.argmin(means)) <= 1
    assert 0 < np.argmin(test) < len(LAMBDAS) - 1 and test[np.argmin(means)] < 0.8 * min(test[0], test[-1])


@on_ranks
@pytest.mark.parametrize("order", [1, -1])
def test_the_discrepancy_principle_finds_the_misfit_of_the_noise(order):
    p, (g, c) = head_problem(omega=None), head_data(10, seed=0)
    noise = 0.5 * np.mean(((W @ g - c) ** 2).sum(axis=0))
    found = choose_lambda(p, LAMBDAS[::3][::order], newton, rule="discrepancy", noise=noise)
    assert_allclose(float(p.replace(regulariser=None).evaluate()[0]), noise, rtol=0.011)
    assert_allclose(ridge_misfit(ridge(found.chosen, g, c, np.ones(10)), g, c, None), noise, rtol=0.011)
    assert (np.diff(found.weights) < 0).all() and (np.diff(found.misfits) < 0).all() and len(found.results) > 3
    assert_allclose(found.scores, found.misfits / noise)
    assert found.errors is None


@on_ranks
def test_the_corner_of_the_l_curve_is_that_of_the_curve_written_out():
    p, (g, c) = head_problem(omega=None), head_data(10, seed=0)
    lambdas = np.geomspace(1, 1e-3, 11)
    found = choose_lambda(p, lambdas, newton, rule="l-curve")
    s = np.linspace(np.log(lambdas[-1]), np.log(lambdas[0]), 2001)
    each = [ridge(weight, g, c, np.ones(10)) for weight in np.exp(s)]
    x = np.log([ridge_misfit(both, g, c, None) for both in each])
    y = np.log([0.5 * (both**2).sum() for both in each])
    dx, dy = np.gradient(x, s), np.gradient(y, s)
    kappa = (dx * np.gradient(dy, s) - np.gradient(dx, s) * dy) / np.hypot(dx, dy) ** 3
    assert_allclose(found.scores[2:-2], np.interp(np.log(lambdas), s, kappa)[2:-2], atol=0.15 * kappa.max())
    assert np.isnan(found.scores[[0, -1]]).all()
    assert abs(np.log(found.chosen) - s[np.argmax(kappa)]) < np.log(lambdas[0] / lambdas[1])


# -- a network, trained on noisy outputs of another one ---------------------------------------------------------------


def network_problem(alone=False, samples=16, noise=0.15, seed=0, **more):
    """Bias and kernels of two layers; the noise lives in nine functions of y."""
    phi, rng = laplace(*DOMAIN, RANK, alone), np.random.default_rng(seed)
    nine = laplace(*DOMAIN, 9, alone)
    options = {"bias": phi, "times": [0.0, 0.4, 1.0]}
    teacher, net = flat_network(phi, **options), flat_network(phi, **options)
    set_smooth(teacher, np.random.default_rng(7), 1.0)
    inputs = phi.Y.batch(phi.values @ rng.normal(size=(RANK, samples)))
    made = nine.values @ rng.normal(scale=noise, size=(nine.rank, samples)) if noise else 0.0
    targets = phi.Y.batch(phi.Y.values(teacher(inputs)) + made)
    misfit = 0.5 * np.mean(phi.Y.sum(phi.Y.weights @ np.broadcast_to(made**2, phi.Y.values(targets).shape)))
    return LearningProblem(net, None, least_squares, tikhonov(1.0), Batch(inputs, targets), **more), misfit


def lbfgs(p):
    return train(p, {"tao_max_it": 200, "tao_gttol": 1e-5}, monitor=lambda _: None)


NETWORK_LAMBDAS = np.array([1.0, 0.1, 0.01])


def test_noise_of_a_network_is_found_again():
    p, noise = network_problem()
    found = choose_lambda(p, NETWORK_LAMBDAS, lbfgs, rule="discrepancy", noise=noise)
    assert_allclose(float(p.replace(regulariser=None).evaluate()[0]), noise, rtol=0.011)
    assert NETWORK_LAMBDAS[-1] < found.chosen < NETWORK_LAMBDAS[0]


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("rule", [{"folds": 2, "seed": 3}, {"rule": "discrepancy", "noise": 0.2}], ids=["folds", "noise"])
def test_all_partitions_choose_alike(rule):
    """After few iterations, since more takes too long: the whole mesh on each rank, and its parts on all."""
    one, other = (
        choose_lambda(
            network_problem(alone)[0], [1.0, 0.01], lambda p: train(p, {"tao_max_it": 8}, monitor=lambda _: None), **rule
        )
        for alone in (False, True)
    )
    assert_allclose(one.chosen, other.chosen, rtol=1e-9)
    assert_allclose(one.misfits, other.misfits, rtol=1e-9)
    assert_allclose(one.scores, other.scores, rtol=1e-9)


def test_cross_validation_of_a_network_is_near_the_best_on_test_data():
    p, _ = network_problem()
    one = choose_lambda(p, NETWORK_LAMBDAS, lbfgs, folds=3, seed=3)
    truth, _ = network_problem(True, samples=200, noise=0.0, seed=1)
    net, errors = p.net, []
    for result in one.results:
        for parameter in net.parameters:
            for k in range(len(parameter.functions)):
                parameter.set(k, result.controls[net.parameters.index(parameter) * net.layers + k])
        errors.append(float(truth.replace(net=net, regulariser=None, batch=on(net.Y, truth)).evaluate()[0]))
    best = int(np.argmin(errors))
    assert abs(best - list(NETWORK_LAMBDAS).index(one.chosen)) <= 1 and best < len(errors) - 1
    assert errors[list(NETWORK_LAMBDAS).index(one.chosen)] < 0.8 * min(errors[0], errors[-1])


def on(Y, p):
    """The batch of a problem, made anew on the label space of another network on the same mesh."""
    return Batch(*(Y.batch(p.net.Y.values(part)) for part in (p.batch.inputs, p.batch.targets)))


def test_white_noise_at_the_nodes_has_the_misfit_that_the_docstring_says():
    Y = label_space("disk", "CG1", 3)
    noise = Y.batch(np.random.default_rng(0).normal(scale=DELTA, size=(Y.nodes, 200)))
    misfit = float(least_squares(Y, noise, Y.batch(np.zeros((Y.nodes, 200))), np.ones(200)))
    assert_allclose(misfit, DELTA**2 / 2 * Y.measure, rtol=0.02)


# -- folds, and what goes with the samples ----------------------------------------------------------------------------


@pytest.mark.parallel([1, 2])
def test_folds_are_those_of_scikit_learn_and_J_is_the_mean_of_what_is_held_out():
    p = head_problem()
    values = p.net.Y.values(p.batch.inputs)
    parts = p.folds(4)
    for (rest, part), numbers in zip(parts, KFold(4).split(values.T), strict=True):
        for batch, chosen in zip((rest, part), numbers):
            assert_array_equal(p.net.Y.values(batch.inputs), values[:, chosen])
            assert_allclose(np.array(batch.weights) / np.sum(batch.weights), OMEGA[chosen] / OMEGA[chosen].sum())
    held_out = [float(p.replace(batch=part).evaluate()[0]) for _, part in parts]
    sizes = [np.sum(part.weights) for _, part in parts]
    assert_allclose(np.average(held_out, weights=sizes), float(p.evaluate()[0]), rtol=1e-12)
    shuffled = p.folds(4, seed=2)
    assert np.abs(p.net.Y.values(shuffled[0][1].inputs) - values[:, :3]).max() > 0.1
    taken = np.concatenate([p.net.Y.values(part.inputs) for _, part in shuffled], axis=1)
    assert_array_equal(np.sort(taken, axis=1), np.sort(values, axis=1))


def test_samples_without_weight_are_in_no_fold_and_without_weights_there_are_none():
    p = head_problem(omega=[0.0, *OMEGA[1:]])
    taken = [part.samples for _, part in p.folds(9)]
    assert taken == [1] * 9 and all(rest.samples == 8 for rest, _ in p.folds(9))
    with pytest.raises(ValueError, match="^count: expected an integer from 2 to 9, the number of samples, got 10"):
        p.folds(10)
    with pytest.raises(ValueError, match="^count: expected an integer >= 2, got 1"):
        p.folds(1)
    assert all(batch.weights is None for fold in head_problem(omega=None).folds(3) for batch in fold)


def test_labels_observations_and_derivatives_go_with_their_samples():
    p, _ = network_problem()
    Y, C = p.net.Y, p.net.Y.values(p.batch.targets)
    seen = Observations([1], [p.batch.targets], [0.5])
    moved = Derivatives(Y.batch(2 * C), Y.batch(3 * C), 0.2)
    q = p.replace(batch=replace(p.batch, observations=seen, derivatives=moved))
    for rest, part in q.folds(8):
        for batch in (rest, part):
            C = Y.values(batch.targets)
            assert_array_equal(Y.values(batch.observations.targets[0]), C)
            assert_array_equal(Y.values(batch.derivatives.directions), 2 * C)
            assert_array_equal(Y.values(batch.derivatives.targets), 3 * C)
    found = choose_lambda(q, [0.1, 0.01], lambda p: train(p, {"tao_max_it": 3}), folds=2)
    (_, first), _ = q.folds(2)
    assert found.errors.shape == (2, 2) and first.samples == 8


def test_each_fold_begins_at_the_present_parameters_and_ends_where_its_training_does():
    """The held-out misfits, by trainings and evaluations one by one."""
    p, _ = network_problem()
    start = [[parameter.get(k) + 0.2 for k in range(2)] for parameter in p.parameters]

    def put():
        for parameter, values in zip(p.parameters, start):
            for k in range(2):
                parameter.set(k, values[k])

    def few(p):
        return train(p, {"tao_max_it": 2}, monitor=lambda _: None)

    put()
    found = choose_lambda(p, [0.01, 0.1], few, folds=2)  # rising; reported falling
    assert found.weights.tolist() == [0.1, 0.01]
    for k, (rest, part) in enumerate(p.folds(2)):
        put()
        for weight, error in zip((0.01, 0.1), found.errors[::-1, k]):
            few(p.replace(batch=rest, regulariser=tikhonov(weight)))
            assert_allclose(error, float(p.replace(batch=part, regulariser=None).evaluate()[0]), rtol=1e-12)


# -- R ----------------------------------------------------------------------------------------------------------------


def test_a_number_times_a_regulariser_is_one_of_these_weights():
    p, _ = network_problem()
    set_smooth(p.net, np.random.default_rng(3))
    R = tikhonov(0.5, bias=0.2) + smooth_in_time(0.1) + huber(0.3, 0.1)
    with_R, with_more = (float(r(p.penalised())) for r in (R, 0.25 * R))
    assert_allclose(with_more, 0.25 * with_R, rtol=1e-14)
    assert (0.25 * R).names == R.names and (0.25 * tikhonov(2.0)) == tikhonov(0.5) == np.float64(0.25) * tikhonov(2.0)
    assert tikhonov(2.0) * 0.5 == tikhonov(1.0) and 0 * R + tikhonov(1.0) != tikhonov(1.0)
    assert (2 * tikhonov(0.5, bias=0.2)).terms[0][0] == tikhonov(1.0, bias=0.4).terms[0][0]
    with pytest.raises(ValueError, match="^factor: expected a number >= 0, got -1"):
        -1 * R
    for wrong in (True, "2", [1.0], R):
        with pytest.raises(TypeError):
            wrong * R


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, message",
    [
        ({"rule": "discrepancy"}, "^noise: expected the misfit that the noise of the data makes, got None"),
        ({"rule": "discrepancy", "noise": 0}, "^noise: expected a positive number, got 0"),
        ({"rule": "l-curve", "noise": 0.1}, "^noise: expected None with rule='l-curve', got 0.1; it belongs to rule='discr"),
        ({"noise": 0.1}, "^noise: expected None with rule='cross validation'"),
        (
            {"rule": "discrepancy", "noise": 0.1, "folds": 3},
            "^folds: expected None with rule='discrepancy', got 3; it belongs to",
        ),
        ({"rule": "l-curve", "seed": 3}, "^seed: expected None with rule='l-curve', got 3"),
        ({"rule": "l-curve"}, "^weights: expected at least 5 for the curvature of an L-curve, got 3"),
        ({"rule": "Occam"}, "^rule: expected "),
        ({"folds": 1}, "^folds: expected an integer from 2 to 16, got 1"),
        ({"folds": 17}, "^folds: expected an integer from 2 to 16, got 17"),
        ({"seed": -1}, "^seed: expected an integer >= 0, got -1"),
        ({"weights": [1.0]}, r"^weights: expected at least two positive numbers, increasing or decreasing, got \[1.0\]"),
        ({"weights": [1.0, 0.1, 0.5]}, "^weights: expected at least two positive numbers"),
        ({"weights": [1.0, 0.0]}, "^weights: expected at least two positive numbers"),
        ({"weights": [1.0, np.nan]}, "^weights: "),
        ({"train": 3}, "^train: expected a function of a problem, got 3"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_trained(more, message):
    p, _ = network_problem()
    given = {"weights": [1.0, 0.1, 0.01], "train": lambda p: pytest.fail("trained")} | more
    with pytest.raises((TypeError, ValueError), match=message):
        choose_lambda(p, **given)


def test_problems_of_which_nothing_can_be_held_out_are_refused_by_cross_validation_alone():
    p, _ = network_problem()
    with pytest.raises(ValueError, match="^problem: expected one with a regulariser R, got none"):
        choose_lambda(p.replace(regulariser=None), [1.0, 0.1])
    for changes, what in (
        ({"learn": "both"}, "an initial state that is learned"),
        ({"learn": "initial"}, "an initial state that is learned"),
        ({"ensemble": Ensemble(COMM_WORLD, 1)}, "an ensemble"),
    ):
        with pytest.raises(ValueError, match=f'^rule: expected "discrepancy" or "l-curve" with {what}'):
            choose_lambda(p.replace(**changes), [1.0, 0.1])
    with pytest.raises(ValueError, match="^folds: expected an integer from 2 to 1, got 1"):
        choose_lambda(network_problem(samples=1)[0], [1.0, 0.1])


def test_noise_outside_of_the_misfits_and_a_curve_without_a_corner_are_refused():
    p = head_problem()
    with pytest.raises(ValueError, match="^noise: expected one between the misfits .*; give larger weights"):
        choose_lambda(p, [0.1, 0.01], newton, rule="discrepancy", noise=100.0)
    with pytest.raises(ValueError, match="^noise: expected one between the misfits .*; give smaller weights"):
        choose_lambda(p, [0.1, 0.01], newton, rule="discrepancy", noise=1e-9)
    with pytest.raises(ValueError, match="^weights: expected some around the corner of the L-curve, got 1e.03 to 1"):
        choose_lambda(p, np.geomspace(1e3, 1, 5), newton, rule="l-curve")


@on_ranks
def test_after_an_error_on_one_rank_all_ranks_raise_and_the_parameters_hold_what_was_reached():
    p, done = head_problem(), []

    def failing(p):
        done.append(newton(p))
        if len(done) == 2 and COMM_WORLD.rank == COMM_WORLD.size - 1:
            raise StepFailure(1, 0.5, "NOT_FINITE")

    with pytest.raises(StepFailure):
        choose_lambda(p, LAMBDAS, failing)
    assert_array_equal(p.head.W.get(0), done[1].controls[-2])


def test_a_choice_at_the_end_of_the_weights_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        choose_lambda(head_problem(), LAMBDAS[1:4], newton)
        assert not caplog.messages
        assert choose_lambda(head_problem(), LAMBDAS[:2], newton).chosen == LAMBDAS[1]
    assert caplog.messages == [
        f"choose_lambda: the least error is at the end, lambda = {LAMBDAS[1]:.4g}; give smaller weights too"
    ]


def test_a_misfit_that_jumps_over_the_noise_is_a_warning(caplog):
    """A trainer that stays away from the minimum: its misfit has two values."""
    p = head_problem()

    def jump(q):
        p.head.W.set(0, np.zeros((RANK, RANK)) if q.regulariser.terms[0][0] > 0.03 else W)

    with caplog.at_level(logging.WARNING):
        found = choose_lambda(p, [1.0, 1e-3], jump, rule="discrepancy", noise=1.2)
    assert found.misfits[0] > 2 and found.misfits[-1] < 0.8
    assert "the misfit jumps over the noise 1.2 near lambda = 0.03" in caplog.text


def test_a_lift_is_learned_on_each_fold():
    phi = laplace(*DOMAIN, RANK)
    lift = Lift(phi.Y, 2)
    lift.start("random", 6)
    fields = lift.fields
    batch = Batch(fields.batch(smooth(fields, 4)), phi.Y.batch(smooth(phi.Y, 4)))
    p = LearningProblem(flat_network(phi, times=[0.0, 1.0]), None, least_squares, tikhonov(1.0), batch, lift=lift)
    found = choose_lambda(p, [0.1, 0.01], lambda p: train(p, {"tao_max_it": 3}), folds=2)
    assert found.errors.shape == (2, 2) and np.isfinite(found.errors).all()
