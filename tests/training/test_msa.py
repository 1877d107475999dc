"""Algorithm 2: basic, damped and extended, and the relaxed control that bang-bang layers approach."""

import logging
import sys

import firedrake as fd
import numpy as np
import pytest
import sympy
from firedrake import COMM_WORLD
from helpers import flat_network, label_space, laplace, smooth
from numpy.testing import assert_allclose, assert_array_equal
from problems import gathered, learning_problem
from scipy.optimize import minimize

from fem_resnet import (
    Batch,
    Box,
    Controls,
    Ellipse,
    Hamiltonian,
    Head,
    Kernel,
    LabelSpace,
    LearningProblem,
    NodalBox,
    NodalSets,
    Pair,
    Points,
    ResidualNetwork,
    RowBall,
    RowBox,
    RunningCost,
    SpanBox,
    cell_indicators,
    cross_entropy,
    extremal_controls,
    given_basis,
    least_squares,
    load,
    middle_pairs,
    msa,
    pmp_residual,
    raise_controls,
    save,
    smooth_in_time,
    smoothed_l1,
    solve_costate,
    solve_trajectory,
    terminal_costate,
    tikhonov,
    train,
)  # fmt: skip
from fem_resnet.training.augmented_hamiltonian import augmented_step
from fem_resnet.training.last_step import better_head
from fem_resnet.training.msa import problem_of

on_ranks = pytest.mark.parallel([1, 2, 3])
BOX = Box((-1.0, 1.0), (-1.0, 1.0))
f, a = sympy.symbols("f a")
#: What the controls cost beside the terminal loss, as arguments of `LearningProblem.replace`.
COSTS = {
    "none": {},
    "tikhonov": {"regulariser": tikhonov(0.1, kernel=0.05)},
    "running": {"running": RunningCost(f**2 / 5 + a**2 / 10 - a / 20, kernel=0.1), "regulariser": tikhonov(0.05)},
}
charged = pytest.mark.parametrize("cost", ["tikhonov", "running"])


def problem(space=("annulus", "CG1"), layers=6, target=1.0, alone=False, cost=(), **options):
    """One sample, whose target is within reach of BOX or nearly so; controls start at zero."""
    Y = label_space(*space, alone=alone)
    net = flat_network(given_basis(Y, [1.0]), layers=layers, final_time=2.0, **options)
    batch = Batch(Y.batch(smooth(Y, 1)), Y.batch(target * smooth(Y, 1, seed=50)))
    return LearningProblem(net, None, least_squares, None, batch).replace(**dict(cost))


def classifier(A, weight=0.01, samples=6, alone=False):
    """A head of three classes on the state of a network with A's psi, and Tikhonov's term of all; controls start at zero."""
    psi = laplace("annulus", "CG1", 3, alone)
    return learning_problem(ResidualNetwork(psi, layers=3), head=True, weight=weight, samples=samples)


def inside(result, A):
    Y = result.problem.net.Y
    return all(
        A.contains(gathered(Y, c.a)[:, None], gathered(Y, c.phi) @ gathered(Y, c.psi).T, 1e-10).all() for c in result.controls
    )


@on_ranks
@pytest.mark.parametrize("space", [("annulus", "CG1"), ("sphere", "DG0")][: None if COMM_WORLD.size == 1 else 1])
def test_basic_msa_rises_where_extended_msa_falls_at_every_iteration(space):
    basic = msa(problem(space), BOX, variant="basic", iterations=6)
    extended = msa(problem(space), BOX, iterations=6)
    damped = msa(problem(space), BOX, variant="damped", iterations=6)
    print(f"\nbasic    {basic.values}\ndamped   {damped.values}\nextended {extended.values}\nrho {extended.steps}")
    assert np.max(basic.changes) > 0.1 * basic.values[0] and basic.values[-1] > 2 * extended.values[-1]
    for found in (extended, damped):
        assert (found.changes < 0).all() and found.values[-1] < 0.1 * found.values[0]
        assert found.value == found.values[-1] and inside(found, BOX)


@on_ranks
def test_a_result_in_a_file_is_continued_as_one_that_was_kept(tmp_path):
    """Its layers have bases of their own."""
    begun = msa(problem(), BOX, variant="damped", iterations=2)
    save(tmp_path / "msa.h5", begun.problem.net)
    net, _ = load(tmp_path / "msa.h5")
    batch = Batch(net.Y.batch(smooth(net.Y, 1)), net.Y.batch(smooth(net.Y, 1, seed=50)))
    read = msa(LearningProblem(net, None, least_squares, None, batch), BOX, variant="damped", iterations=2)
    kept = msa(begun.problem, BOX, variant="damped", iterations=2)
    assert_allclose(read.values, kept.values, rtol=1e-9)
    assert len(set(kept.values)) == 3


@on_ranks
def test_basic_msa_is_the_algorithm_as_printed():
    """One iteration of Algorithm 2: (4.10) at the middle of each layer, r* of the sign of section 4.2."""
    start = msa(problem(layers=3, target=5.0), BOX, variant="damped", iterations=1).problem
    before = [start.net.bias.get(l) for l in range(3)]
    J, run = start.record()
    J.derivative()
    found = msa(start, BOX, variant="basic", iterations=1)
    Y = start.net.Y
    f = np.array(Y.values(run.final))
    first, _, last = found.controls  # of layers that differ, so that each has its own pair
    assert Y.sum(Y.weights @ (first.argument(Y, f) - last.argument(Y, f)) ** 2)[0] > 1e-2
    for pair, controls in zip(middle_pairs(run, "maximise"), found.controls):
        expected = extremal_controls(Y, BOX, pair).controls
        assert_allclose(controls.a, expected.a, rtol=0, atol=1e-13)
        assert_allclose(*(gathered(Y, c.phi) @ gathered(Y, c.psi).T for c in (controls, expected)), rtol=0, atol=1e-12)
    assert max(basis.rank for basis in found.problem.net.bases["phi"]) <= 2
    assert all((start.net.bias.get(l) == before[l]).all() for l in range(3))  # the given problem stays


@on_ranks
def test_state_and_costate_are_all_that_an_iteration_needs():
    """Algorithm 2 "does not rely on gradients with respect to the trainable parameters": (4.1) and (4.2) solved alone."""
    start = msa(problem(layers=3, target=5.0), BOX, variant="damped", iterations=1).problem
    net, scheme = start.net, {"ts_rk_type": "4"}
    trajectory = solve_trajectory(net, start.batch.inputs, steps=net.steps, keep_stages=True, solver_parameters=scheme)
    costate = solve_costate(trajectory, terminal_costate(start, trajectory.final), partner=True)
    f, r = ([np.array(net.Y.values(of(t))) for t in net.times] for of in (trajectory, costate))
    found = msa(start, BOX, variant="basic", iterations=1)
    for l, controls in enumerate(found.controls):
        pair = Pair((f[l] + f[l + 1]) / 2, -(r[l] + r[l + 1]) / 2, "maximise")
        expected = extremal_controls(net.Y, BOX, pair).controls
        assert_allclose(controls.a, expected.a, rtol=0, atol=1e-12)
        assert_allclose(*(gathered(net.Y, c.phi) @ gathered(net.Y, c.psi).T for c in (controls, expected)), rtol=0, atol=1e-12)


@on_ranks
def test_the_wrong_sign_of_the_costate_raises_J():
    """Algorithm 2's r(T) = ftilde - f(T) is right for maximising H: controls extremal for the other one do worse."""
    start = problem(layers=3, target=5.0)
    value = float(start.evaluate()[0])
    better = msa(start, BOX, variant="basic", iterations=1)
    away = problem(layers=3, target=5.0)
    J, run = start.record()
    J.derivative()
    wrong = [extremal_controls(away.net.Y, BOX, Pair(p.f, -p.r, "maximise")).controls for p in middle_pairs(run, "maximise")]
    assert better.value < value < float(problem_of(away, wrong).evaluate()[0])


@on_ranks
@pytest.mark.parametrize("cost", ["none", "tikhonov", "mixed"])
@pytest.mark.parametrize("rho", [0.0, 0.3, 30.0])
def test_the_augmented_hamiltonian_never_falls(rho, cost):
    """At its start it is H; its maximum over the shares is no less; without the augmentation it is max H.

    With costs of the controls too, also where L_f depends on them.
    """
    start = msa(problem(layers=3), BOX, variant="damped", iterations=2).problem
    net = start.net
    J, run = start.record()
    J.derivative()
    running = RunningCost(f**2 * a / 5 + a**2 / 4, kernel=0.1) if cost == "mixed" else None
    H = Hamiltonian(net.Y, net.activation, "maximise", running, None, (0.0, 0.0) if cost == "none" else (0.1, 0.2))
    for l, pair in enumerate(middle_pairs(run, "maximise")):
        controls, extremal = Controls.of_layer(net, l), extremal_controls(net.Y, BOX, pair).controls
        new, history = augmented_step(H, pair, controls, extremal, rho)
        assert (np.diff(history) >= 0).all() and len(history) > 1
        assert_allclose(history[0], H(pair, controls), rtol=0, atol=1e-13)
        penalty = sum(net.Y.sum(net.Y.weights @ (of(pair, new) - of(pair, controls)) ** 2)[0] for of in (H.in_r, H.in_f))
        assert_allclose(history[-1], H(pair, new) - rho / 2 * penalty, rtol=0, atol=1e-12)
        if rho == 0 and cost == "none":
            assert_allclose(H(pair, new), H(pair, extremal), rtol=0, atol=1e-13)


@on_ranks
@pytest.mark.parametrize("cost", ["none", "mixed"])
def test_the_gradient_of_the_augmented_hamiltonian(cost):
    """Steps so short that backtracking is not needed gain what the gradient says: s is stationary at the end."""
    start = problem(("disk", "DG0"), layers=2)
    net = start.net
    net.bias.set(0, 0.3 + 0 * net.Y.weights)
    net.kernel.set(0, [[-0.6]])
    J, run = start.record()
    J.derivative()
    charges = [] if cost == "none" else [RunningCost(f**2 * a / 5 + a**2 / 4, kernel=0.1), None, (0.1, 0.2)]
    H, pair = Hamiltonian(net.Y, net.activation, "maximise", *charges), middle_pairs(run, "maximise")[0]
    controls, extremal = Controls.of_layer(net, 0), extremal_controls(net.Y, BOX, pair).controls
    rho = 1.0

    first = sum(net.Y.comm.allgather(net.Y.nodes)[: net.Y.comm.rank])

    def value(s):
        new = controls.towards(extremal, s[first : first + net.Y.nodes])
        gaps = [(of(pair, new) - of(pair, controls)) ** 2 for of in (H.in_r, H.in_f)]
        return H(pair, new) - rho / 2 * float(net.Y.sum(net.Y.weights @ sum(gaps)[:, 0]))

    _, history = augmented_step(H, pair, controls, extremal, rho, iterations=2000)
    n = net.Y.size
    best = minimize(lambda s: -value(s), np.full(n, 0.5), bounds=[(0, 1)] * n, method="L-BFGS-B", options={"maxfun": 10**5})
    # SciPy's own gradient is of finite differences: good to 1e-7 or so in the value.
    assert_allclose(history[-1], -best.fun, rtol=1e-6)


@on_ranks
@pytest.mark.parametrize("cost", COSTS)
def test_the_change_of_J_is_that_of_the_hamiltonian_to_first_order(cost):
    """Li et al.'s estimate: relative error falls with the step, i.e. with 1/rho, up to the layer length squared."""
    errors = []
    for rho in (1.0, 10.0, 100.0):
        found = msa(problem(layers=12, cost=COSTS[cost]), BOX, iterations=1, rho=rho)
        errors.append(abs(found.predicted[0] / found.changes[0] - 1))
    print("\nrelative error of the predicted change", errors)
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.05


@on_ranks
def test_with_a_head_it_can_be_stopped_and_continued():
    Y = label_space("disk", "CG1")
    net = ResidualNetwork(given_basis(Y, [1.0]), layers=3)
    start = learning_problem(net, head=True, weight=None, samples=1)
    seen = []
    # One rank alone asks for the stop.
    stopped = msa(
        start, Ellipse(), iterations=4,
        monitor=lambda p: seen.append(p) or p.iteration == 2 and COMM_WORLD.rank == COMM_WORLD.size - 1,
    )  # fmt: skip
    assert stopped.reason == "STOPPED" and stopped.iterations == len(seen) == 2 and not stopped.converged
    assert_array_equal([p.value for p in seen], stopped.values[1:])
    assert stopped.changes.shape == stopped.predicted.shape == stopped.steps.shape == (2,)
    net = stopped.problem.net
    for l, controls in enumerate(stopped.controls):
        assert_array_equal(net.bias.get(l), controls.a)
        assert_allclose(
            *(gathered(Y, c.phi) @ gathered(Y, c.psi).T for c in (controls, Controls.of_layer(net, l))), atol=1e-14
        )
    whole = msa(start, Ellipse(), iterations=4, monitor=lambda p: None)
    rest = msa(stopped.problem, Ellipse(), iterations=2, rho=stopped.steps[-1] / 2, monitor=lambda p: None)
    assert_allclose(rest.values, whole.values[2:], rtol=1e-9)
    assert whole.reason == "ITERATIONS" and inside(whole, Ellipse())


@on_ranks
@pytest.mark.parametrize("variant", ["basic", "damped", "extended"])
def test_without_a_monitor_a_line_an_iteration_is_logged_on_rank_0(variant, caplog):
    with caplog.at_level(logging.INFO, logger="fem_resnet"):
        result = msa(problem(layers=2), BOX, variant=variant, iterations=2)
    lines = [record.getMessage() for record in caplog.records if record.name == "fem_resnet"]
    assert len(lines) == (2 if COMM_WORLD.rank == 0 else 0)
    for number, line in enumerate(lines, start=1):
        assert line.startswith(
            f"iteration {number:4d} of 2   J = {result.values[number]:.8e}   step {result.steps[number - 1]:.2e}"
        )


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("cost", COSTS)
def test_extended_msa_takes_the_same_steps_on_any_number_of_ranks(cost):
    """Against the whole mesh on each rank alone.

    Shares and extremes come of scalar searches, which find a largest value's place to the root of round-off, 1.5e-8.
    """
    together, alone = (msa(problem(alone=alone, cost=COSTS[cost]), BOX, iterations=3).values for alone in (False, True))
    assert_allclose(together, alone, rtol=1e-6)


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("variant", ["damped", "extended"])
def test_a_whole_classifier_is_trained_alike_on_any_number_of_ranks(variant):
    values = []
    for alone in (False, True):
        A = RowBox(laplace("annulus", "CG1", 3, alone), (-1, 1), (-2, 2))
        values.append(msa(classifier(A, alone=alone), A, variant=variant, iterations=2, learn_head=True).values)
    assert_allclose(*values, rtol=1e-5)


# -- costs of the controls -------------------------------------------------------------------------------------------


@on_ranks
@charged
@pytest.mark.parametrize("variant", ["damped", "extended"])
def test_with_a_cost_of_the_controls_J_falls_and_its_controls_are_not_bang_bang(cost, variant):
    """Its controls lie in the box; where this is wide, J comes to the minimum that `train` finds."""
    narrow = Box((-0.3, 0.2), (-0.15, 0.2))
    found = msa(problem(cost=COSTS[cost]), narrow, variant=variant, iterations=4)
    assert (found.changes < 0).all() and found.iterations >= 2 and inside(found, narrow)
    assert found.value == pytest.approx(float(found.problem.evaluate()[0]), rel=1e-13)
    bias = np.concatenate([gathered(found.problem.net.Y, c.a) for c in found.controls])
    assert ((bias > -0.29) & (bias < 0.19)).any() and found.problem.regulariser is COSTS[cost]["regulariser"]


def test_msa_comes_to_the_minimum_of_train_with_a_cost_of_the_controls():
    """The same J, full-rank controls within a wide set: value and PMP residual, up to the square of a layer's length."""
    Y = label_space("disk", "DG0")
    wide, cost = Box((-4.0, 4.0), (-4.0, 4.0)), RunningCost(f**2 / 5 + a**2 / 4, kernel=0.5)
    start = problem(("disk", "DG0"), target=2.0, cost={"running": cost, "regulariser": tikhonov(0.1)})
    start = start.replace(net=ResidualNetwork(cell_indicators(Y), layers=4))
    found = msa(start, wide, variant="damped", iterations=6)
    before, after = (pmp_residual(each, wide).upper for each in (start, found.problem))
    least = train(start, monitor=lambda progress: None).value
    print(f"\nJ by msa {found.value:.6f}, by L-BFGS {least:.6f}; PMP residual {before:.1e} to {after:.1e}")
    assert (found.changes < 0).all() and 0 <= found.value - least < 1e-3 * (found.values[0] - least)
    assert after < 1e-4 * before


@on_ranks
@pytest.mark.parametrize("kind", ["box", "ball", "span"])
def test_rows_with_a_cost_that_mixes_f_and_a(kind):
    """Several samples, a head, Tikhonov's terms, a running cost of (f, a) that no formula takes: J falls at each iteration."""
    psi = laplace("annulus", "CG1", 3)
    A = {
        "box": RowBox(psi, (-1, 1), (-2, 2)), "ball": RowBall(psi, 1.5), "span": SpanBox(psi, psi, (-1, 1), (-2, 2)),
    }[kind]  # fmt: skip
    start = classifier(A, samples=3).replace(running=RunningCost(f * a / 5 + a**4 / 4, kernel=0.02))
    found = msa(start, A, iterations=3)
    assert (found.changes < 0).all() and found.iterations == 3 and found.value < 0.95 * found.values[0]
    assert_allclose(found.value, float(found.problem.evaluate()[0]), rtol=1e-13)
    assert found.problem.head is start.head


@on_ranks
@charged
def test_costly_controls_that_start_outside_of_A_are_refused_or_brought_into_it(cost):
    start = problem(layers=2, cost=COSTS[cost])
    start.net.bias.set(1, 3 + 0 * start.net.Y.weights)
    with pytest.raises(
        ValueError, match=r"^A: expected a set with .*; layer 1 has \(a\(y\), b\(y, z\)\) = \(3, 0\).*project=True"
    ):
        msa(start, BOX, iterations=1)
    found = msa(start, BOX, iterations=2, project=True)
    assert inside(found, BOX) and (found.changes < 0).all() and found.iterations == 2


# -- the head as a control of the last step ---------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("variant, kind", [("extended", "box"), ("damped", "span"), ("damped", "ball")])
def test_a_whole_classifier_is_trained_to_a_lower_J_than_with_a_fixed_head(variant, kind):
    """J falls at every iteration, the head of the given problem stays, and that of the result is the one of least J."""
    psi = laplace("annulus", "CG1", 3)
    A = {
        "box": RowBox(psi, (-1, 1), (-2, 2)), "ball": RowBall(psi, 1.5), "span": SpanBox(psi, psi, (-1, 1), (-2, 2)),
    }[kind]  # fmt: skip
    start = classifier(A)
    W = start.head.W.get(0)
    fixed = msa(start, A, variant=variant, iterations=3)
    heads = []
    found = msa(
        start, A, variant=variant, iterations=3, learn_head=True, monitor=lambda p: heads.append(p.problem.head.W.get(0))
    )
    print(f"\n{variant}, {kind}: fixed head {fixed.values}, learned {found.values}")
    assert (fixed.changes < 0).all() and (found.changes < 0).all() and found.iterations == 3
    assert found.value < 0.5 * fixed.value and found.values[0] == fixed.values[0]
    assert_array_equal(start.head.W.get(0), W)
    assert fixed.problem.head is start.head and not np.allclose(found.problem.head.W.get(0), W)
    assert all(np.abs(x - y).max() > 1e-3 for x, y in zip([W, *heads], heads))  # improved in each iteration
    assert_allclose(float(found.problem.evaluate()[0]), found.value, rtol=1e-13)
    # The head alone does less: layers have a part in what is gained.
    alone = start.replace(head=better_head(start, start.net(start.batch.inputs), 200))
    assert found.value < 0.95 * float(alone.evaluate()[0])


@on_ranks
@pytest.mark.parametrize(
    "loss, prediction", [(least_squares, "identity"), (least_squares, "logistic"), (cross_entropy, "softmax")]
)
def test_a_better_head_has_a_smaller_J_for_any_loss(loss, prediction):
    """At the same controls; for least squares it is the head of least J, which `eliminate` solves for."""
    Y = label_space("disk", "CG1")
    start = learning_problem(ResidualNetwork(laplace("disk", "CG1", 4), layers=2), weight=0.05, samples=5)
    head = Head(start.head.psi, 3, prediction)
    head.start("random smooth", 3)
    start = start.replace(head=head, loss=loss)
    before, run = start.evaluate()
    better = better_head(start, run.final, iterations=100)
    after = float(start.replace(head=better).evaluate()[0])
    assert after < 0.9 * float(before) and better is not head and start.head is head and Y.size > 0
    if prediction == "identity":
        J, _ = start.record(eliminate="head")
        assert_allclose(after, float(J.functional), rtol=1e-8)


@on_ranks
def test_where_controls_are_at_their_ends_the_head_alone_makes_J_fall():
    """A of one point: controls cannot move. rho stays, and the predicted change is that of the head."""
    psi = laplace("annulus", "CG1", 3)
    A = RowBox(psi, (0, 0), (0, 0))
    found = msa(classifier(A), A, iterations=3, learn_head=True, largest_rho=4.0)
    assert (found.changes < 0).all() and found.changes.size >= 1
    assert_allclose(found.predicted, found.changes, rtol=1e-12)
    fixed = msa(classifier(A), A, iterations=3, largest_rho=4.0)
    assert fixed.converged and fixed.iterations == 0


@on_ranks
def test_bang_bang_layers_approach_a_relaxed_control():
    """f_t = sigma(u_1)/2 + sigma(u_2)/2 mixes two extremal controls; layers that alternate come to it as 1 / layers.

    A control of the box alone does not: sigma of the mean of u_1, u_2 is another velocity.
    """
    Y = label_space("annulus", "CG1")
    mixed = [extremal_controls(Y, BOX, Pair(smooth(Y, 1, k), smooth(Y, 1, k + 7), "maximise")).controls for k in (1, 2)]
    f, h = smooth(Y, 1), 1 / 200

    def relaxed(f):
        return sum(np.tanh(c.argument(Y, f)) for c in mixed) / 2

    for _ in range(round(1 / h)):
        k1 = relaxed(f)
        k2 = relaxed(f + h / 2 * k1)
        k3 = relaxed(f + h / 2 * k2)
        f = f + h / 6 * (k1 + 2 * k2 + 2 * k3 + relaxed(f + h * k3))
    target = Y.batch(f)

    def J(controls):
        net = ResidualNetwork(given_basis(Y, [1.0]), layers=len(controls), final_time=1.0)
        start = LearningProblem(net, None, least_squares, None, Batch(Y.batch(smooth(Y, 1)), target))
        return float(problem_of(start, controls).evaluate()[0])

    distance = [np.sqrt(2 * J(mixed * (layers // 2))) for layers in (4, 8, 16, 32)]
    rates = np.log2(np.array(distance[:-1]) / distance[1:])
    plain = np.sqrt(2 * J([mixed[0].towards(mixed[1], 0.5)] * 32))
    print("\nrelaxed control: distance of f(T) by bang-bang layers", distance, "by the mean control", plain)
    assert np.all(np.abs(rates - 1) < 0.15) and plain > 2 * distance[-1]


@on_ranks
@pytest.mark.parametrize("kind", ["box", "ball"])
def test_rows_for_many_samples(kind):
    """H rises at each y; at the end it is that of the best of many rows; MSA makes J fall at every iteration."""
    Y = label_space("annulus", "CG1")
    psi = laplace("annulus", "CG1", 3)
    A = RowBox(psi, (-1, 1), (-2, 2)) if kind == "box" else RowBall(psi, 1.5)
    net = ResidualNetwork(psi, layers=4)
    start = learning_problem(net, head=True, weight=None, samples=4)
    J, run = start.record()
    J.derivative()
    H, pair = Hamiltonian(Y, net.activation, "maximise"), middle_pairs(run, "maximise")[1]
    before = Controls.of_layer(net, 1)
    after, values = raise_controls(H, A, pair, before, 400)
    assert (np.diff(values) >= 0).all() and values[-1] > values[0]
    assert (H.density(pair, after) >= H.density(pair, before)).all()
    rows = np.column_stack([after.a, after.phi])
    assert_allclose(A.project(rows), rows, rtol=0, atol=1e-14)
    # No random row of the set is better by more than a local maximum may miss here.
    tried = A.project(np.random.default_rng(0).uniform(-2, 2, (3000, 4)))
    T = tried @ np.column_stack([np.ones(4), -psi.project(pair.f).T]).T
    best = np.max(pair.r @ np.tanh(T).T, axis=1)
    assert float(Y.sum(Y.weights @ np.maximum(0, best - H.density(pair, after)))) < 0.02 * values[-1]
    found = msa(start, A, iterations=6)
    assert (found.changes < 0).all() and found.value < 0.9 * found.values[0] and found.iterations == 6
    with pytest.raises(ValueError, match="^A: expected rows on the label space"):
        msa(problem(("sphere", "DG0")), A)


@on_ranks
def test_a_fixed_span_is_one_problem_a_layer():
    """H of the layer rises to its maximum over the box of (a, beta), found by L-BFGS-B too; MSA makes J fall."""
    Y = label_space("annulus", "CG1")
    phi, psi = laplace("annulus", "CG1", 2), laplace("annulus", "CG1", 3)
    A = SpanBox(phi, psi, (-0.7, 0.8), (-1, 1.5))
    net = ResidualNetwork(Kernel(phi, psi), layers=4)
    start = learning_problem(net, head=True, weight=None, samples=4)
    J, run = start.record()
    J.derivative()
    H, pair = Hamiltonian(Y, net.activation, "maximise"), middle_pairs(run, "maximise")[1]
    found, values = raise_controls(H, A, pair, Controls.of_layer(net, 1), 2000)
    assert (np.diff(values) > 0).all() and len(values) > 2
    f, r, w, P, Q = (gathered(Y, part) for part in (pair.f, pair.r, Y.weights, phi.values, psi.values))
    g = Q.T @ (w[:, None] * f)

    def minus_H(x):
        a, beta = x[: len(w)], x[len(w) :].reshape(2, 3)
        u = a[:, None] - P @ beta @ g
        v = w[:, None] * r * (1 - np.tanh(u) ** 2)
        return -np.sum(w[:, None] * r * np.tanh(u)), np.concatenate([-v.sum(axis=1), ((P.T @ v) @ g.T).ravel()])

    ends = [(-0.7, 0.8)] * len(w) + [(-1, 1.5)] * 6
    best = minimize(minus_H, np.zeros(len(ends)), jac=True, bounds=ends, options={"ftol": 1e-14, "maxiter": 5000})
    assert_allclose(values[-1], -best.fun, rtol=1e-5)  # H is flat where its maximum is
    assert (np.abs(found.a - 0.05) <= 0.75 + 1e-14).all()
    trained = msa(start, A, iterations=4)
    assert (trained.changes < 0).all() and trained.value < 0.98 * trained.values[0]
    with pytest.raises(ValueError, match="^kernel: expected .low, high. with low <= high"):
        SpanBox(phi, psi, (-1, 1), (1, -1))


# -- layers dealt to the members of an ensemble ------------------------------------------------------------------------------


def dealt_problem(comm, samples=1, around=12):
    """One or more samples on an annulus of this communicator, for controls on five layers.

    Its basis is given: eigenfunctions on two ranks differ in the last bits from member to member.
    """
    mesh = fd.AnnulusMesh(1, 0.4, 3, around, comm=comm)
    Y, (x, y) = LabelSpace(fd.FunctionSpace(mesh, "CG", 1)), fd.SpatialCoordinate(mesh)
    net = flat_network(given_basis(Y, [1.0, x, y]), layers=5, final_time=2.0)
    batch = Batch(Y.batch(smooth(Y, samples)), Y.batch(smooth(Y, samples, seed=50)))
    return LearningProblem(net, None, least_squares, None, batch)


def counted(monkeypatch, name):
    """How often a function of `msa` is called on this rank: a list that grows."""
    module, calls = sys.modules["fem_resnet.training.msa"], []
    function = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: calls.append(1) or function(*given))
    return calls


def is_as_serially(members, monkeypatch):
    """Iterates of msa on an ensemble are those of its member alone to 1e-14, and each member maximises on its own layers."""
    ensemble = fd.Ensemble(COMM_WORLD, members)
    count, mine = ensemble.ensemble_comm.size, len(range(ensemble.ensemble_comm.rank, 5, ensemble.ensemble_comm.size))
    cases = [
        ("basic", 1, lambda start: BOX, "extremal_controls", 1),
        ("extended", 1, lambda start: boxes(start.net.Y, 5), "extremal_controls", 1),
        ("damped", 3, lambda start: RowBall(start.net.bases["psi"][0], 1.5), "raise_controls", 1),
    ]
    for variant, samples, A, name, each in cases:
        found, start = [], dealt_problem(ensemble.comm, samples)
        for given in (None, ensemble):
            with monkeypatch.context() as patch:
                calls = counted(patch, name)
                result = msa(start, A(start), variant=variant, iterations=3, ensemble=given, monitor=lambda p: None)
            assert len(calls) == each * 3 * (mine if given else 5), "layers are dealt out"
            found.append(result)
        alone, together = found
        assert_allclose(together.values, alone.values, rtol=1e-14)
        assert_array_equal(together.steps, alone.steps)
        for a, b in zip(together.controls, alone.controls):
            assert_allclose(a.a, b.a, rtol=0, atol=1e-14)
            assert_allclose(a.phi @ a.psi.T, b.phi @ b.psi.T, rtol=0, atol=1e-14)
        assert len(set(ensemble.ensemble_comm.allgather(together.value))) == 1
    return count


@on_ranks
def test_layers_dealt_to_members_of_one_rank_have_the_iterates_of_one(monkeypatch):
    assert is_as_serially(1, monkeypatch) == COMM_WORLD.size


@pytest.mark.slow  # four ranks on two cores
@pytest.mark.parallel([4])
def test_layers_dealt_to_members_of_two_ranks_have_the_iterates_of_one(monkeypatch):
    assert is_as_serially(2, monkeypatch) == 2


@pytest.mark.parallel([2, 3])
def test_members_that_do_not_fit_are_refused_on_all_and_one_that_fails_or_stops_ends_all(monkeypatch, caplog):
    ensemble = fd.Ensemble(COMM_WORLD, 1)
    last = COMM_WORLD.rank == COMM_WORLD.size - 1
    start = dealt_problem(ensemble.comm)
    with pytest.raises(ValueError, match="^iterations: all ranks must give the same"):
        msa(start, BOX, iterations=2 + last, ensemble=ensemble)
    with pytest.raises(ValueError, match="^ensemble: expected problems on the communicators of the members, of 1 ranks"):
        msa(problem(), BOX, ensemble=ensemble)
    with pytest.raises(TypeError, match="^ensemble: expected an Ensemble or None"):
        msa(start, BOX, ensemble=COMM_WORLD)
    with pytest.raises(ValueError, match="^problem: expected the same label domain with the same nodes on all members"):
        msa(dealt_problem(ensemble.comm, around=12 + last), BOX, ensemble=ensemble)
    other = dealt_problem(ensemble.comm)
    if last:
        other.net.bias.set(0, 0.5 + 0 * other.net.Y.weights)
    with pytest.raises(ValueError, match="^problem: expected the same on all members of the ensemble, got different J"):
        msa(other, BOX, ensemble=ensemble)
    stopped = msa(start, BOX, iterations=4, ensemble=ensemble, monitor=lambda p: last and p.iteration == 2)
    assert stopped.reason == "STOPPED" and stopped.iterations == 2
    with caplog.at_level(logging.INFO, logger="fem_resnet"):
        msa(start, BOX, iterations=2, ensemble=ensemble)
    assert len([r for r in caplog.records if r.name == "fem_resnet"]) == (2 if COMM_WORLD.rank == 0 else 0)
    module = sys.modules["fem_resnet.training.msa"]

    def fails(*given):
        raise ArithmeticError("on one member")

    if last:
        monkeypatch.setattr(module, "extremal_controls", fails)
    with pytest.raises(ArithmeticError, match="^on one member"):
        msa(start, BOX, iterations=2, ensemble=ensemble)


@on_ranks
def test_restarts_go_on_where_no_step_lowers_J_and_the_best_is_kept():
    start, little = problem(layers=2), {"rho": 0.1, "largest_rho": 0.1}  # so little that it does not go on for long
    stuck = msa(start, BOX, iterations=60, **little)
    assert stuck.converged and stuck.iterations < 60
    again = msa(start, BOX, iterations=stuck.iterations + 4, restarts=1, **little)
    assert (again.values[: stuck.iterations + 1] == stuck.values).all() and again.changes[stuck.iterations] > 0
    assert again.value == again.values.min() <= stuck.value
    assert_allclose(float(again.problem.evaluate()[0]), again.value, rtol=1e-13)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(variant="fast"), "^variant: expected one of"),
        (dict(A=Points([(0, 1), (0, -1)])), "^A: expected a convex set, as variant 'extended' mixes controls"),
    ],
)
def test_what_msa_does_not_do_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        msa(problem(), **{"A": BOX} | change)


@on_ranks
def test_a_start_outside_of_A_is_refused_or_brought_into_it():
    start = problem(layers=2)
    for l in range(2):
        start.net.bias.set(l, 0.5 + 0 * start.net.Y.weights)
    start.net.kernel.set(1, [[4.0]])
    message = r"^A: expected a set with .*; layer 1 has \(a\(y\), b\(y, z\)\) = \(0.5, 4\) at y = .*project=True"
    with pytest.raises(ValueError, match=message):
        msa(start, BOX, iterations=1)
    found = msa(start, BOX, iterations=2, project=True)
    assert inside(found, BOX) and found.iterations == 2
    none = msa(start, BOX, iterations=0, project=True)
    # Towards (0, 0), the middle of the box, by just enough in the layer that is outside, not at all in the other.
    assert_allclose(gathered(start.net.Y, none.controls[0].a), 0.5, rtol=1e-13)
    assert_allclose(gathered(start.net.Y, none.controls[1].a), 0.5 / 4, rtol=2e-3)
    assert inside(none, BOX) and float(none.problem.evaluate()[0]) == none.value
    with pytest.raises(ValueError, match="^A: expected a convex set, as controls outside of it are mixed"):
        msa(start, Points([(0, 1), (0, -1)]), variant="basic", project=True)


# -- sets that depend on y and t ---------------------------------------------------------------------------------------------


def boxes(Y, layers=6):
    """One box for each layer, whose ends depend on y; 0 lies in all."""
    x, found = Y.coordinates[:, 0], []
    for t in (np.arange(layers) + 0.5) / layers:
        found.append(NodalBox(Y, (-0.6 + 0.4 * t * x, 0.5 + 0.4 * np.cos(3 * x + t)), (-0.5 - t * x**2, 0.9 - 0.5 * t)))
    return found


def halves(Y):
    """A disk where x > 0.3, a box elsewhere."""
    return NodalSets(Y, [BOX, Ellipse((0.0, 0.1), 0.6)], (Y.coordinates[:, 0] > 0.3).astype(int))


def all_inside(Y, sets, controls):
    """Whether (a(y), b(y, z)) is in the set of its layer at y, for all y and z. Collective."""
    psis = [np.concatenate(Y.comm.allgather(c.psi)) for c in controls]
    mine = all(A.contains(c.a[:, None], c.phi @ psi.T, 1e-10).all() for A, c, psi in zip(sets, controls, psis))
    return all(Y.comm.allgather(mine))


@on_ranks
@pytest.mark.parametrize("variant", ["basic", "damped", "extended"])
@pytest.mark.parametrize("space", [("annulus", "CG1"), ("sphere", "DG0")][: None if COMM_WORLD.size == 1 else 1])
def test_it_ends_in_a_set_that_depends_on_y_and_t(space, variant):
    """Each layer's controls are in its own set, and some on its boundary; in the sets of other layers they are not."""
    start = problem(space, target=3.0)
    Y = start.net.Y
    sets = boxes(Y)
    found = msa(start, sets, variant=variant, iterations=4)
    assert found.values.min() < 0.9 * found.values[0] and (variant == "basic" or (found.changes < 0).all())
    assert all_inside(Y, sets, found.controls)
    ends = [np.isclose(c.a, A.bias[0]) | np.isclose(c.a, A.bias[1]) for A, c in zip(sets, found.controls)]
    assert Y.sum(Y.weights @ np.mean(ends, axis=0)) > (0.1 if variant == "basic" else 1e-3) * Y.measure
    assert not all_inside(Y, sets[::-1], found.controls)
    with pytest.raises(ValueError, match="^A: expected one set, or one for each of the 6 layers, got a list of 5"):
        msa(start, sets[1:])


@on_ranks
def test_one_set_for_all_layers_may_depend_on_y_and_is_as_a_list():
    start = problem(layers=3, target=3.0)
    Y = start.net.Y
    A = halves(Y)
    found = msa(start, A, iterations=3)
    assert all_inside(Y, [A] * 3, found.controls) and (found.changes < 0).all()
    assert_array_equal(msa(start, [A] * 3, iterations=3).values, found.values)
    # A box with constant ends is the box.
    for variant in ("basic", "extended"):
        values = [msa(start, B, variant=variant, iterations=3).values for B in (BOX, NodalBox(Y, BOX.bias, BOX.kernel))]
        assert_array_equal(*values)
    with pytest.raises(ValueError, match="^A: expected a convex set, as variant 'extended' mixes controls"):
        msa(start, NodalSets(Y, [BOX, Points([(0, 1), (0, -1)])], np.zeros(Y.nodes, int)))


@pytest.mark.parallel([2, 3])
def test_sets_that_depend_on_y_and_t_have_the_same_iterates_on_any_number_of_ranks():
    """Against the whole mesh on each rank alone, as `test_extended_msa_takes_the_same_steps_on_any_number_of_ranks`."""
    of = [problem(alone=alone) for alone in (False, True)]
    basic, extended = (
        [msa(start, boxes(start.net.Y), variant=kind, iterations=3).values for start in of] for kind in ("basic", "extended")
    )
    assert_allclose(*basic, rtol=1e-10)
    assert_allclose(*extended, rtol=1e-6)


@on_ranks
def test_rows_may_have_a_box_for_each_layer():
    """Many samples: the ascent of each layer stays in its own box."""
    psi = laplace("annulus", "CG1", 3)
    sets = [RowBox(psi, (-1 + 0.3 * l, 1 - 0.3 * l), (-2 + 0.5 * l, 1 + 0.5 * l)) for l in range(3)]
    start = learning_problem(ResidualNetwork(psi, layers=3), head=True, weight=None, samples=4)
    found = msa(start, sets, iterations=3, project=True)
    assert (found.changes < 0).all()
    for A, c in zip(sets, found.controls):
        rows = np.column_stack([c.a, c.phi @ psi.project(c.psi).T @ np.linalg.inv(psi.gram)])
        assert_allclose(A.project(rows), rows, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="^A: expected sets on the label space|^A: expected rows on the label space"):
        msa(start, [*sets[:2], RowBox(laplace("sphere", "DG0", 3), (-1, 1), (-1, 1))])


@on_ranks
def test_rows_may_have_a_box_at_each_node():
    """Many samples: at each y the coefficients stay in their own box and reach it. Equal node values are as one number."""
    psi = laplace("sphere", "DG0", 3)
    Y = psi.Y
    x = Y.coordinates[:, 0]
    A = RowBox(psi, (-0.2 - 0.1 * x, 0.3), (-0.5, 0.3 + 0.2 * x))
    start = learning_problem(ResidualNetwork(psi, layers=3), head=True, weight=None, samples=4)
    found = msa(start, A, iterations=3, variant="basic", project=True)
    a, X = found.controls[1].a, found.controls[1].phi @ psi.project(found.controls[1].psi).T @ np.linalg.inv(psi.gram)
    high = 0.3 + 0.2 * x
    assert (a >= -0.2 - 0.1 * x - 1e-12).all() and (a <= 0.3 + 1e-12).all()
    assert (X >= -0.5 - 1e-10).all() and (X <= high[:, None] + 1e-10).all()
    assert Y.sum(float(np.sum(np.isclose(X, high[:, None])))) > 0.1 * Y.size
    same = [
        msa(start, B, iterations=2).values
        for B in (RowBox(psi, (-1, 1), (-2, 2)), RowBox(psi, (-1, 1 + 0 * x), (-2, 2 + 0 * x)))
    ]
    assert_array_equal(*same)
    with pytest.raises(ValueError, match="^kernel: expected numbers, or values at the nodes of shape"):
        RowBox(psi, (-1, 1), (-1, np.ones(Y.nodes + 1)))
    with pytest.raises(ValueError, match="^rows: expected a row for each of the"):
        A.project(np.zeros((1 + Y.nodes, 4)))


@on_ranks
def test_a_start_outside_of_a_set_that_depends_on_y_is_brought_into_it_where_it_is_outside():
    """Each row is mixed with a point of its own set by its own share; rows inside stay as they are."""
    start = problem(layers=2)
    Y = start.net.Y
    x = Y.coordinates[:, 0]
    for l in range(2):
        start.net.bias.set(l, 0.5 + 0 * x)
        start.net.kernel.set(l, [[0.25]])
    narrow = np.where(x > 0.3, 0.1, 1.0)
    A = NodalBox(Y, (-narrow, narrow), (-1, 1))
    with pytest.raises(ValueError, match="^A: .*; layer 0 has .a.y., b.y, z.. = .0.5, 0.25. at y = .*project=True"):
        msa(start, A)
    found = msa(start, A, iterations=0, project=True)
    for c in found.controls:
        assert_allclose(c.a, np.where(x > 0.3, 0.1, 0.5), rtol=2e-3)
        b = c.phi @ c.psi.T
        assert_allclose(b, np.where(x > 0.3, 0.25 * 0.2, 0.25)[:, None] + 0 * b, rtol=2e-3)
        assert_allclose(b[x <= 0.3], 0.25, rtol=1e-12)
    assert all_inside(Y, [A] * 2, found.controls)


@on_ranks
@pytest.mark.parametrize("kind", ["box", "ball", "span"])
def test_a_start_outside_of_a_set_of_rows_is_refused_or_the_nearest_within_is_taken(kind):
    psi = laplace("annulus", "CG1", 3)
    A = {
        "box": RowBox(psi, (-1, 1), (-2, 2)), "ball": RowBall(psi, 1.5), "span": SpanBox(psi, psi, (-1, 1), (-0.5, 0.5)),
    }[kind]  # fmt: skip
    start = learning_problem(ResidualNetwork(psi, layers=2), head=True, weight=None, samples=3)
    start.net.bias.set(1, smooth(start.net.Y, 1)[:, 0] * 3)
    with pytest.raises(
        ValueError, match="^A: expected a set .* in the span of its bases; layer 1 has controls outside .*project=True"
    ):
        msa(start, A, iterations=1)
    none = msa(start, A, iterations=0, project=True)
    again = msa(none.problem, A, iterations=1)  # is within
    assert again.values[0] == pytest.approx(none.value, rel=1e-12) and again.iterations <= 1
    limit = 1.5 if kind == "ball" else 1.0
    assert all(np.abs(c.a).max(initial=0) <= limit + 1e-12 for c in none.controls)


@on_ranks
def test_the_monitor_is_told_of_the_problem_whose_J_it_is_told():
    seen = []
    found = msa(
        problem(layers=2), BOX, iterations=3, monitor=lambda p: seen.append((p, float(p.problem.evaluate()[0]))) and None
    )
    assert len(seen) == found.iterations
    for progress, value in seen:
        assert_allclose(value, progress.value, rtol=1e-14)


def test_problems_that_msa_does_not_solve_are_refused():
    start = problem()
    for other, message in (
        (start.replace(regulariser=smoothed_l1(0.1, 0.1)), "a regulariser that is not quadratic"),
        (learning_problem(start.net, head=False, weight=None), "more than one sample; .* RowBox"),
        (problem(bias_in_time="linear"), "parameters linear in time"),
    ):
        with pytest.raises(ValueError, match=f"^msa.*: it does not take {message}"):
            msa(other, BOX)
    for changes, A, options, message in (
        ({"regulariser": tikhonov(0.1)}, Ellipse(), {}, "^A: expected a Box where the controls have a cost"),
        ({"running": RunningCost(f * a)}, BOX, {}, r"^running: expected a density l_0\(f\)"),
        ({"regulariser": smooth_in_time(0.1)}, BOX, {}, r"^regulariser: expected tikhonov\(..\) of bias and kernel"),
        ({}, BOX, {"learn_head": True}, "^learn_head: expected a problem with a head, got head=None"),
    ):
        with pytest.raises(ValueError, match=message):
            msa(start.replace(**changes), A, **options)
