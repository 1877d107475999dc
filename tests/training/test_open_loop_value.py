"""The value function at one state by open-loop controls: against the grid, closed forms, and two cells on many."""

import logging

import numpy as np
import pytest
import sympy
from few_cells import DISK, HALVES, reading, sectors
from firedrake import COMM_SELF
from helpers import flat_network, label_space, laplace, smooth
from numpy.testing import assert_allclose
from problems import gathered

from fem_resnet import (
    Batch,
    Box,
    LearningProblem,
    Loss,
    Points,
    ResidualNetwork,
    RunningCost,
    StateGrid,
    cell_indicators,
    cross_entropy,
    feedback_controls,
    get_activation,
    least_squares,
    open_loop_value,
    point_space,
    solve_value_function,
)  # fmt: skip

on_ranks = pytest.mark.parallel([1, 2, 3])
BOX = Box((-0.3, 0.4), (-0.6, 0.5))
EULER = {"ts_type": "rk", "ts_rk_type": "1fe"}


def problem(Y, v, target, head=None, loss=least_squares, layers=8, T=1.0, phi=None, **options):
    net = flat_network(cell_indicators(Y) if phi is None else phi, layers=layers, final_time=T, activation="tanh")
    targets = [target] if isinstance(target, int) else Y.batch(target)
    return LearningProblem(net, head, loss, None, Batch(Y.batch(v), targets), **options)


# -- against the grid ------------------------------------------------------------------------------------------------


#: The target or the class, the running cost, and v.
CASES = {
    "out of reach": ([1.8, -1.6], None, [0.1, 0.4]),
    "out of reach, L of f": ([1.8, -1.6], RunningCost(sympy.Symbol("f") ** 2 / 2), [-0.4, -0.2]),
    "a class": (1, None, [0.1, 0.4]),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_value_function_of_the_grid(name):
    """F from above, D_v F, and the feedback at v, on two cells of unequal weights."""
    target, running, v = CASES[name]
    Y, v = point_space((1.0, 0.6), comm=COMM_SELF), np.array(v)
    head = reading(Y, "softmax") if target == 1 else None
    coarse, fine = (
        solve_value_function(
            Y, BOX, "tanh", target, StateGrid(v[:, None], spacing), final_time=1.0, head=head, running=running
        )
        for spacing in (0.04, 0.02)
    )
    p = problem(Y, v, target, head, running=running)
    found = open_loop_value(p, BOX, starts=2 if head else 1)
    # The error of first order in the spacing is taken out. Open loops are not better, but for the steps in time.
    above = found.value - (2 * fine(v, 0.0) - coarse(v, 0.0))[0]
    assert -2e-3 < above / found.value < 2e-3
    assert found.value < 0.9 * float(p.evaluate()[0])
    g, r = fine.gradient(v, 0.0), Y.values(found.gradient)
    # Where a component of f changes its sign the second derivatives of F jump, and r(0) depends on the layer of that.
    assert_allclose(r, g, rtol=0, atol=np.abs(g - coarse.gradient(v, 0.0)).max() + 0.03 * np.abs(r).max())
    assert found.residual.upper < 1e-2
    assert_allclose(found.values, found.value, rtol=1e-3)
    first, feedback = found.controls[0], feedback_controls(fine, v, 0.0)
    assert_allclose(first.argument(Y, v[:, None]), feedback.argument(Y, v[:, None]), atol=0.02)


def test_several_starts_find_what_one_does_not():
    """A terminal cost of two wells on one cell: the best is that of the closed form, and the starts differ."""
    Y, T, A = sectors(*DISK), 0.8, Box((-0.6, 0.6), (0, 0))
    wells = Loss(
        "wells", lambda Y, f, C, h: Y.weights @ (np.cos(8 * f) / 4 + f / 9),
        lambda Y, f, C, h: Y.weights[:, None] * (1 / 9 - 2 * np.sin(8 * f)),
    )  # fmt: skip
    v, reach = np.array([-0.05]), T * np.tanh(0.6)
    reachable = np.linspace(v[0] - reach, v[0] + reach, 4001)
    exact = Y.measure * (np.cos(8 * reachable) / 4 + reachable / 9).min()
    found = open_loop_value(problem(Y, v, [0.0], loss=wells, T=T), A, starts=4)
    assert_allclose(found.value, exact, atol=1e-3 * Y.measure)
    assert np.ptp(found.values) > 0.05 * Y.measure


# -- many cells ------------------------------------------------------------------------------------------------------


def test_two_cells_on_many():
    """v and target constant on two halves: the same F on 12 cells as on two, by the grid there."""
    few, many = sectors(2, 0.4), sectors(12, 0.4)
    v, target = np.array([0.3, -0.2]), np.array([1.8, -1.9])
    F = [
        solve_value_function(few, BOX, "tanh", target, StateGrid(v[:, None], spacing), final_time=0.8)(v, 0.0)[0]
        for spacing in (0.02, 0.01)
    ]
    half = (many.coordinates[:, 1] > 0).astype(int)
    assert half.sum() == 6
    assert abs(few.coordinates[0, 1]) > 0.1 and few.coordinates[1, 1] > 0
    found = open_loop_value(problem(many, v[half], target[half], T=0.8), BOX, starts=1)
    assert_allclose(found.value, 2 * F[1] - F[0], rtol=2e-3)
    spread = [np.ptp(many.values(found.gradient)[half == k]) for k in (0, 1)]
    assert max(spread) < 1e-2


def test_without_a_kernel_it_is_the_distance_of_each_node_from_what_it_reaches():
    Y, T = label_space("sphere", "CG1"), 0.7
    A, sigma = Box((-0.5, 0.7), (0, 0)), get_activation("tanh")
    v = smooth(Y, 1)[:, 0]
    target = v + 1.5 * np.sign(smooth(Y, 1, seed=50)[:, 0])
    low, high = v + T * sigma(-0.5), v + T * sigma(0.7)
    r = np.minimum(high - target, 0) + np.maximum(low - target, 0)
    p = problem(Y, v, target, T=T, phi=laplace("sphere", "CG1", 1))
    found = open_loop_value(p, A, starts=1, tolerance=1e-6)
    assert_allclose(found.value, Y.sum(Y.weights @ r**2) / 2, rtol=1e-4)
    assert_allclose(gathered(Y, Y.values(found.gradient)[:, 0]), gathered(Y, r), atol=2e-2)
    assert Y.size > 30 and float(p.evaluate()[0]) > 1.5 * found.value


@on_ranks
def test_no_partition_changes_the_result():
    found = []
    for alone in (False, True):
        Y = sectors(6, 0.4, alone)
        v, target = smooth(Y, 1)[:, 0] / 2, 2 * smooth(Y, 1, seed=50)[:, 0]
        of = open_loop_value(problem(Y, v, target, layers=3), BOX, starts=2, iterations=1)
        found.append([of.value, of.values, gathered(Y, Y.values(of.gradient)), of.residual.absolute])
    for here, alone in zip(*found):
        assert_allclose(here, alone, rtol=1e-6, atol=1e-6)  # the ascent of the shares s(y) makes round-off larger


@on_ranks
def test_what_is_refused_and_what_is_said(caplog):
    Y = sectors(*HALVES, alone=False)
    zeros = np.zeros(Y.nodes)
    p = problem(Y, zeros, zeros, layers=2)
    with pytest.raises(ValueError, match="^A: expected a convex set"):
        open_loop_value(p, Points([(-0.3, 0.2), (0.4, -0.3)]))
    sine = ResidualNetwork(cell_indicators(Y), layers=2, activation=sympy.sin(sympy.Symbol("s")))
    with pytest.raises(ValueError, match="^activation: expected one that does not decrease, got"):
        open_loop_value(p.replace(net=sine), BOX)
    with pytest.raises(ValueError, match="more than one sample"):
        both = Y.batch(np.zeros((Y.nodes, 2)))
        open_loop_value(p.replace(batch=Batch(both, both)), BOX)
    with caplog.at_level(logging.INFO, "fem_resnet"):
        found = open_loop_value(
            problem(Y, zeros, 1, reading(Y, "softmax"), cross_entropy, layers=2), BOX, starts=2, iterations=1
        )
    if Y.comm.rank == 0:
        assert [text for text in caplog.messages if text.startswith("open-loop value: start 2 of 2, J = ")]
    assert str(found).startswith(f"F up to {found.value:.8g}, from 2 starts up to")
