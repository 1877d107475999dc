"""Terminal costs of the value function: heads with their losses, Remark 4.3, and functions of the state."""

import firedrake as fd
import numpy as np
import pytest
import sympy
from few_cells import ANNULUS, DISK, FIRST_ORDER, HALVES, direct, order, reading, scores, sectors, some_states
from helpers import laplace
from numpy.testing import assert_allclose, assert_array_equal
from problems import gathered
from test_value_function import CROSSING, reachable

from fem_resnet import (
    Batch,
    Box,
    Head,
    LearningProblem,
    LocalFeedback,
    Loss,
    ResidualNetwork,
    RunningCost,
    StateGrid,
    binary_cross_entropy,
    cell_indicators,
    class_space,
    closed_loop,
    cross_entropy,
    feedback_controls,
    functional_loss,
    least_squares,
    solve_value_function,
    terminal_costate,
    tikhonov,
    train,
)  # fmt: skip

on_ranks = pytest.mark.parallel([1, 2, 3])


def entropy(scores, label):
    return np.log(np.exp(scores).sum(axis=0)) - scores[label]


def half_square(scores, label):
    p = np.exp(scores) / np.exp(scores).sum(axis=0)
    return ((p - np.eye(3)[label][:, None]) ** 2).sum(axis=0) / 2


#: Loss and prediction, and the same of scores and class, written out.
OF_CLASS = {
    "least squares of a softmax": (least_squares, "softmax", half_square),
    "cross entropy": (cross_entropy, "softmax", entropy),
}


# -- one cell: the least over the reachable interval -----------------------------------------------------------------


def wave(v, w):
    return np.cos(5 * v[0]) / 4 + w @ v / 9


def soft_maximum(v, w):
    return np.log(np.exp(2 * v[0] + 1) + np.exp(-2 * v[1]) + w @ v**2)


@pytest.mark.parametrize("name", [*OF_CLASS, "a function"])
def test_on_one_cell_it_is_the_least_terminal_cost_that_can_be_reached(name):
    Y, v, T, errors = sectors(*DISK), some_states(-0.6, 0.6), 0.8, []
    w = Y.weights
    if name == "a function":
        given, cost = {"target": wave}, lambda x: wave(x, w)
    else:
        loss, prediction, of_scores = OF_CLASS[name]
        head = reading(Y, prediction)
        # The score of class 2 is in the middle for small and for large v, so that the best v is between.
        given, cost = {"target": 2, "head": head, "loss": loss}, lambda x: of_scores(scores(w, x), 2)
    intervals = [np.linspace(*reachable("tanh", CROSSING, Y.measure, x, T), 2001) for x in v[0]]
    exact = np.array([cost(x[None]).min() for x in intervals])
    # Neither staying nor going in one direction is best everywhere.
    assert min((cost(np.array(intervals)[None, :, k]) - exact).max() for k in (0, 1000, -1)) > 0.02
    for spacing in (0.01, 0.005, 0.0025):
        F = solve_value_function(Y, CROSSING, "tanh", grid=StateGrid([[-0.6, 0.6]], spacing), final_time=T, **given)
        errors.append(np.abs(F(v, 0.0) - exact).max())
        states = some_states(-0.9, 0.9, seed=1)
        assert_allclose(F.terminal.at(states), cost(states), rtol=1e-13)
        points = F.axes(-2)[0][None]
        assert_allclose(F(points, T), cost(points), rtol=1e-12)
        assert np.abs(F(states, T) - cost(states)).max() < 30 * spacing**2
    assert order(errors) > FIRST_ORDER, errors


# -- several cells ---------------------------------------------------------------------------------------------------

#: Sectors and their inner radius, what is at the end, and the spacing.
DIRECT = [
    pytest.param(HALVES, "least squares of a softmax", 0.02, id="two cells, Remark 4.3"),
    pytest.param(HALVES, "cross entropy", 0.02, id="two cells, cross entropy"),
    pytest.param(HALVES, "a function", 0.02, id="two cells, a function"),
    pytest.param(ANNULUS, "least squares of a softmax", 0.04, id="three cells, Remark 4.3"),
]


@pytest.mark.parametrize("space, name, spacing", DIRECT)
def test_no_controls_are_better_and_the_feedback_is_as_good(space, name, spacing):
    """Theorem 4.3 with the terminal cost of Remark 4.3, against direct optimisation."""
    Y, box, T = sectors(*space), Box((-0.4, 0.6), (-0.5, 0.4)), 0.8
    n, w = Y.size, Y.weights
    v, grid = some_states(-0.4, 0.4, 3, n, seed=2), StateGrid([[-0.4, 0.4]] * n, spacing)
    if name == "a function":
        F = solve_value_function(Y, box, "tanh", soft_maximum, grid, final_time=T)
        best = [direct(w, box, np.tanh, lambda f: soft_maximum(f, w), x, T, starts=6) for x in v.T]
    else:
        loss, prediction, of_scores = OF_CLASS[name]
        F = solve_value_function(Y, box, "tanh", 1, grid, final_time=T, head=reading(Y, prediction), loss=loss)
        best = [direct(w, box, np.tanh, lambda f: of_scores(scores(w, f), 1), x, T, starts=6) for x in v.T]
    assert np.abs(F.terminal.at(v) - best).min() > 2 * spacing  # what is won is more than the tolerances
    assert_allclose(F(v, 0.0), best, atol=0.5 * spacing)
    loop = closed_loop(F, v).cost
    assert_allclose(loop, best, atol=0.5 * spacing)
    assert (loop > np.array(best) - 0.25 * spacing).all()


@on_ranks
@pytest.mark.parametrize("name", OF_CLASS)
def test_the_gradient_at_the_end_is_the_terminal_costate_through_W(name):
    """Remark 4.3: D_v F(., T) = int (C_pre - C)(y) h'(O(y)) W(y, .) dy for least squares, in the sign of 4.1."""
    loss, prediction, _ = OF_CLASS[name]
    Y = sectors(*ANNULUS, alone=False)
    head, phi = reading(Y, prediction), cell_indicators(Y)
    v = phi.values @ some_states(-0.2, 0.2, 3, 3)
    problem = LearningProblem(
        ResidualNetwork(phi, layers=1), head, loss, None, Batch(Y.batch(v), [1, 1, 1])
    )  # fmt: skip
    r = 3 * Y.values(terminal_costate(problem, problem.batch.inputs))  # each sample has the weight 1/3
    errors = []
    for spacing in (0.08, 0.04):
        start = phi.values @ np.array([[-0.3, 0.3]] * 3)
        F = solve_value_function(
            Y, Box((-1, 1), (0, 0)), "tanh", 1, StateGrid(start, spacing), final_time=0.1, head=head, loss=loss
        )
        errors.append(np.abs(gathered(Y, F.gradient(v, 0.1) - r)).max())
    assert np.abs(gathered(Y, r)).min() > 0.02
    assert errors[-1] < 0.03 and order(errors) > FIRST_ORDER, errors


def test_a_loss_in_ufl_and_one_of_the_state_itself():
    """The half square in UFL is (4.12), also behind a head; binary cross entropy of v."""
    Y, box = sectors(*HALVES), Box((-0.4, 0.6), (-0.5, 0.4))
    grid, target = StateGrid([[-0.1, 0.2]] * 2, 0.15), np.array([0.3, 0.8])
    square = functional_loss(lambda p, C: (p - C) ** 2 / 2 * fd.dx(degree=24))  # the cells are curved

    def solve(target, **given):
        return solve_value_function(Y, box, "tanh", target, grid, final_time=0.4, **given)

    for F, G in (
        (solve(target), solve(target, loss=square)),
        (solve(2, head=reading(Y, "softmax")), solve(2, head=reading(Y, "softmax"), loss=square)),
        (
            solve(target, loss=binary_cross_entropy),
            solve(lambda v, w: w @ (np.log1p(np.exp(v)) - target[:, None] * v)),
        ),
    ):
        assert_allclose(F.values[0], G.values[0], rtol=0, atol=1e-12)
        assert_allclose(closed_loop(F, target / 4).cost, closed_loop(G, target / 4).cost, rtol=0, atol=1e-12)
        assert np.ptp(F.values[0]) > 0.05


def test_the_head_is_what_it_was_when_the_value_function_was_made():
    Y = sectors(*HALVES)
    head, v = reading(Y, "softmax"), some_states(-0.2, 0.2, 5, 2)
    F = solve_value_function(
        Y, CROSSING, "tanh", 1, StateGrid([[-0.2, 0.2]] * 2, 0.1), final_time=0.3, head=head, loss=cross_entropy
    )
    before = F.terminal.at(v), closed_loop(F, v).cost
    head.start("random smooth", 3)
    assert_array_equal(F.terminal.at(v), before[0])
    assert_array_equal(closed_loop(F, v).cost, before[1])


# -- the local feedback ----------------------------------------------------------------------------------------------


def through(head, loss, label):
    """A loss of the final state: that of what a head with W and mu held makes of it, on one rank."""
    W, mu = head.matrices()
    C, matrix = head.Y.values(head.observations([label])), head.onto.values @ W @ (head.psi.values.T * head.psi.Y.weights)

    def output(f):
        return matrix @ f + (head.onto.values @ mu)[:, None]

    return Loss(
        "held head", lambda Y, f, _, h: loss.value(head.Y, output(f), C, head.prediction),
        lambda Y, f, _, h: matrix.T @ loss.gradient(head.Y, output(f), C, head.prediction),
        hessian=lambda Y, f, _, h, v: matrix.T @ loss.hessian(head.Y, output(f), C, head.prediction, matrix @ v),
    )  # fmt: skip


def test_the_local_feedback_is_the_same_value_function():
    """On one cell with L = lambda/2 (a^2 + int b^2 dz): F, its gradient, and F nearby, at first order in the spacing."""
    Y, weight, T, v = sectors(*DISK), 0.4, 0.8, np.array([0.2])
    head = reading(Y, "softmax")
    one = cell_indicators(Y)
    net = ResidualNetwork(one, layers=8, final_time=T, activation="tanh")
    batch = Batch(Y.batch(v), Y.batch(v))
    problem = LearningProblem(net, None, through(head, least_squares, 1), tikhonov(weight), batch)
    train(problem, {"tao_type": "nls", "tao_gatol": 1e-7, "tao_nls_ksp_rtol": 1e-4}, monitor=lambda progress: None)
    local = LocalFeedback(problem)
    most = np.abs([[net.bias.get(l)[0], net.kernel.get(l)[0, 0]] for l in range(8)]).max(axis=0)
    assert (most < 0.55).all() and most[0] > 0.1
    near = v + 0.05
    predicted = local.predicted_value(Y.batch(near))
    assert abs(predicted - local.value) > 0.02
    errors = []
    for spacing in (0.08, 0.04, 0.02):
        F = solve_value_function(
            Y, Box((-0.6, 0.6), (-0.6, 0.6)), "tanh", 1, StateGrid([[0.1, 0.4]], spacing, samples=31), final_time=T,
            head=head, running=RunningCost(weight * sympy.Symbol("a") ** 2 / 2, kernel=weight),
        )  # fmt: skip
        errors.append(
            [
                abs(F(v, 0.0)[0] - local.value),
                abs(F.gradient(v, 0.0)[0, 0] - Y.values(local.gradient)[0, 0]),
                abs(F(near, 0.0)[0] - predicted),
            ]
        )
    assert order(errors) > 0.8, errors
    assert max(errors[-1]) < 0.02


# -- ranks, and what goes on -----------------------------------------------------------------------------------------


def _output_elsewhere(Y, alone):
    """A head onto another label domain, of more nodes than Y."""
    onto = laplace("sphere", "DG0", 4, alone)
    head = Head(reading(Y, "softmax").psi, onto, "logistic")
    rng = np.random.default_rng(4)
    head.W.set(0, rng.normal(size=(4, 3)))
    head.mu.set(0, rng.normal(size=4))
    C = onto.values @ [0.5, 0.1, -0.1, 0.2] > 0.05
    return {"target": C.astype(float), "head": head, "loss": binary_cross_entropy}


PARTED = {
    "classes": lambda Y, alone: {"target": 2, "head": reading(Y, "softmax"), "loss": cross_entropy},
    "another label domain": _output_elsewhere,
    "UFL": lambda Y, alone: {
        "target": Y.coordinates[:, 0], "loss": functional_loss(lambda p, C: fd.cos(p - C) * fd.dx(degree=2))
    },
    "a function": lambda Y, alone: {"target": lambda v, w: np.sin(w @ v) + v[0]},
}  # fmt: skip


@on_ranks
@pytest.mark.parametrize("name", PARTED)
def test_no_partition_changes_the_result(name):
    found = []
    for alone in (False, True):
        Y = sectors(*ANNULUS, alone)
        x, y = Y.coordinates.T
        start = np.stack([-0.2 + 0.1 * x, 0.2 + 0.1 * y], axis=1)
        v = np.stack([0.1 * x, 0.1 * y, -0.1 * x], axis=1)
        given = PARTED[name](Y, alone)
        grid = StateGrid(start, 0.5 if name == "UFL" else 0.1)  # a form is assembled for each state
        F = solve_value_function(Y, Box((-0.3, 0.4), (-0.6, 0.5)), "tanh", grid=grid, final_time=0.5, **given)
        loop = closed_loop(F, v)
        controls = loop.controls(0, 2)
        found.append(
            [
                *F.values, F(v, 0.2), loop.cost, gathered(Y, F.gradient(v, 0.1)), gathered(Y, loop.states[-1]),
                gathered(Y, controls.a), gathered(Y, controls.phi) @ gathered(Y, controls.psi).T,
            ]
        )  # fmt: skip
        assert np.ptp(F.values[0]) > 0.01
    for here, alone in zip(*found):
        assert_allclose(here, alone, atol=1e-12)


@on_ranks
def test_a_solution_goes_on_with_its_own_head_alone():
    Y = sectors(*HALVES, alone=False)
    grid = StateGrid(np.zeros((Y.nodes, 1)), 0.1)
    head, other = reading(Y, "softmax"), reading(Y, "softmax")
    other.mu.set(0, [0.3, 0.0, 0.0])

    def solve(target=1, **given):
        return solve_value_function(Y, CROSSING, "tanh", target, grid, final_time=0.5, **given)

    part = solve(head=head, loss=cross_entropy, monitor=lambda t: t < 0.3)
    whole, on = solve(head=head, loss=cross_entropy), solve(head=head, loss=cross_entropy, resume=part)
    for ours, theirs in zip(on.values, whole.values, strict=True):
        assert_array_equal(ours, theirs)
    for change in ({"target": 0}, {"head": other}, {"loss": least_squares}):
        with pytest.raises(ValueError, match="^resume: .* with another target, head or loss; give the arguments"):
            solve(**{"head": head, "loss": cross_entropy} | change, resume=part)
    with pytest.raises(ValueError, match="^resume: .* with another target, head or loss;"):
        solve(np.zeros(Y.nodes), resume=part)


@on_ranks
def test_what_is_refused():
    Y = sectors(*HALVES, alone=False)
    head, elsewhere = (reading(space, "softmax") for space in (Y, sectors(*DISK, alone=False)))
    zeros = np.zeros(Y.nodes)
    for name, given in (
        ("head", {"target": zeros, "head": "softmax"}),
        ("head", {"target": 1, "head": elsewhere}),
        ("target", {"target": wave, "head": head}),
        ("loss", {"target": zeros, "loss": "cross_entropy"}),
        ("target", {"target": wave, "loss": least_squares}),
        ("loss", {"target": 1, "head": head, "loss": binary_cross_entropy}),
        ("loss", {"target": 1, "head": head, "loss": Loss("broken", lambda Y, O, C, h: O[:, :1], lambda *_: 0.0)}),
        ("loss", {"target": 1, "head": head, "loss": Loss("NaN", lambda Y, O, C, h: np.nan * O.sum(axis=0), lambda *_: 0.0)}),
        ("target", {"target": 3, "head": head}),
        ("target", {"target": 1}),
        ("target", {"target": np.zeros((head.Y.nodes, 2)), "head": head}),
        ("target", {"target": np.zeros(head.Y.nodes + 1), "head": head}),
        ("target", {"target": lambda v, w: v}),
        ("target", {"target": lambda v, w: np.full(v.shape[1], np.nan)}),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
            solve_value_function(Y, CROSSING, "tanh", grid=StateGrid(np.zeros((Y.nodes, 1)), 0.1), final_time=0.2, **given)
            pytest.fail(f"{given}")
    onto_Y = Head(cell_indicators(Y), cell_indicators(Y), "identity")
    with pytest.raises(ValueError, match="^target: the output is a function in"):
        solve_value_function(
            Y, CROSSING, "tanh", 1, StateGrid(np.zeros((Y.nodes, 1)), 0.1), final_time=0.2, head=onto_Y
        )  # fmt: skip


@on_ranks
def test_a_terminal_cost_that_differs_between_ranks_is_refused():
    Y = class_space(2)
    last = Y.comm.rank == Y.comm.size - 1
    grid = StateGrid(np.zeros((Y.nodes, 1)), 0.1)
    factor = 2.0 if last else 1.0

    def solve(target, **given):
        return solve_value_function(Y, CROSSING, "tanh", target, grid, final_time=0.2, **given)

    if Y.comm.size == 1:
        assert_allclose(solve(lambda v, w: factor * v[0]).terminal.at(np.ones((2, 1))), 2.0)
        return
    with pytest.raises(ValueError, match="^target: all ranks must give the same"):
        solve(lambda v, w: factor * v[0])
    with pytest.raises(ValueError, match="^target: all ranks must give the same"):
        solve(int(last), head=reading(Y, "softmax"))
    with pytest.raises(ValueError, match="^target: all ranks must give the same"):
        solve(wave if last else np.zeros(Y.nodes))


def test_feedback_through_a_head_is_in_A_and_of_rank_two():
    Y, v = sectors(*HALVES), np.array([0.1, -0.2])
    F = solve_value_function(
        Y, CROSSING, "tanh", 1, StateGrid([[-0.3, 0.3]] * 2, 0.05), final_time=0.4, head=reading(Y, "softmax")
    )
    controls = feedback_controls(F, v, 0.1)
    assert controls.phi.shape == (2, 2)
    assert CROSSING.contains(controls.a[:, None], controls.phi @ controls.psi.T).all()
    assert_array_equal(F.target, [0, 1, 0])
