"""Step 2 of section 4.3: the feedback attains the value function, and is the control of the maximum principle."""

from functools import cache

import numpy as np
import pytest
from few_cells import BOX, FIRST_ORDER, HALVES, control_cost, order, reading, sectors, some_states
from firedrake import COMM_SELF
from numpy.testing import assert_allclose
from scipy.integrate import solve_ivp

from fem_resnet import (
    Batch,
    Box,
    Ellipse,
    Hamiltonian,
    LearningProblem,
    Pair,
    Points,
    ResidualNetwork,
    StateGrid,
    cell_indicators,
    closed_loop,
    extremal_controls,
    feedback_controls,
    feedback_speeds,
    get_activation,
    least_squares,
    point_space,
    solve_value_function,
)  # fmt: skip
from fem_resnet.training.msa import problem_of

#: Two points of unequal weights, and a target out of reach. F is smooth except for jumps of its second derivatives: where a
#: component of v is 0, or will be 0 at the same time as another one.
Y = point_space((1.0, 0.6), comm=COMM_SELF)
FAR, NEAR, START, T = np.array([1.8, -1.6]), np.array([0.5, -0.3]), [[-0.5, 0.5]] * 2, 1.0
SPACINGS = (0.08, 0.04, 0.02)
#: Three classes by the softmax, with least squares. The first component is to grow, and the second to fall, as for `FAR`.
HEAD = reading(Y, "softmax")


@cache
def far(spacing, target="out of reach", running=None):
    """The value function with the target out of reach, or within, so that F has a flat part; or with a head (Remark 4.3)."""
    target, head = {"out of reach": (FAR, None), "within reach": (NEAR, None), "a class": (1, HEAD)}[target]
    return solve_value_function(Y, BOX, "tanh", target, StateGrid(START, spacing), final_time=T, head=head, running=running)


def square(f):
    return f**2


# -- dynamic programming ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("running", [None, square], ids=["L = 0", "L of f"])
@pytest.mark.parametrize("target", ["out of reach", "within reach", "a class"])
def test_the_dynamic_programming_identity(target, running):
    """F(v, t) = min [int int L dy ds + F(f(t + delta), t + delta)], of which (4.11) is the limit (Theorem 4.2).

    It is not above that for any controls, and equal for the feedback.
    """
    v, errors = some_states(-0.5, 0.5, 30, 2), []
    rng = np.random.default_rng(1)
    for spacing in SPACINGS:
        F = far(spacing, target, running)
        loop, lengths, worst = closed_loop(F, v), np.diff(F.times), []
        L = lambda f: 0.0 if running is None else Y.weights @ running(f)  # noqa: E731
        for k, l in ((0, 0.5), (0.25, 0.5), (0.5, 1.0)):
            k, l = (round(s * (len(F.times) - 1)) for s in (k, l))
            before = F(loop.states[k], loop.times[k])
            cost = sum(lengths[now] * L(loop.states[now]) for now in range(k, l))
            worst.append(np.abs(cost + F(loop.states[l], loop.times[l]) - before).max())
            f, cost = loop.states[k], 0.0
            shares = rng.uniform(size=f.shape)
            for now in range(k, l):
                least, largest = F.speeds.extremes(list(f))
                cost = cost + lengths[now] * L(f)
                f = f + lengths[now] * np.tanh(least.value + shares * (largest.value - least.value))
            worst.append(np.maximum(before - cost - F(f, loop.times[l]), 0).max())
        errors.append(max(worst))
    assert order(errors) > 0.7, errors
    assert errors[-1] < SPACINGS[-1] / 2


@pytest.mark.parametrize("target", ["out of reach", "a class"])
def test_the_closed_loop_costs_what_the_value_function_says(target):
    """Theorem 4.3."""
    v, errors = some_states(-0.5, 0.5, 30, 2), []
    for spacing in (0.04, 0.02, 0.01):
        F = far(spacing, target)
        errors.append(
            [np.abs(closed_loop(F, v).cost - F(v, 0.0)).max(), np.abs(closed_loop(F, v, 0.4).cost - F(v, 0.4)).max()]
        )
        # A start between two times and a length of steps of its own.
        other = closed_loop(F, v, 0.37, steps=17)
        assert other.times[0] == 0.37 and len(other.states) == 18
        assert np.abs(other.cost - F(v, 0.37)).max() < (spacing + 0.63 / 17) / 4
    assert order(errors) > FIRST_ORDER, errors


def test_the_closed_loop_converges_across_a_kink():
    """A = {0} x [-1, 1] on two cells: nothing moves from 0, and F has a kink there: order 1/2 at least."""
    halves, v, errors = sectors(*HALVES), np.hstack([some_states(-0.2, 0.2, 20, 2), [[0.0, 0.0, 0.1], [0.0, 0.1, 0.0]]]), []
    for spacing in (0.08, 0.04, 0.02):
        F = solve_value_function(
            halves, Box((0, 0), (-1, 1)), "tanh", [0.6, -0.4], StateGrid([[-0.2, 0.2]] * 2, spacing), final_time=0.6
        )
        errors.append(np.abs(closed_loop(F, v).cost - F(v, 0.0)).max())
    assert order(errors) > 0.5, errors


def test_controls_frozen_at_the_first_state_do_not_attain_it():
    """Step 2 (ii), (iii) as printed, for which Theorem 4.3 does not hold."""
    F, v = far(0.02, "within reach"), np.array([0.2, 0.1])
    frozen, f = feedback_controls(F, v, 0.0), v[:, None]
    for h in np.diff(F.times):
        f = f + h * np.tanh(frozen.argument(Y, f))
    printed = float(Y.weights @ (f[:, 0] - F.target) ** 2) / 2
    # The target is within reach.
    assert max(closed_loop(F, v).cost[0], F(v, 0.0)[0]) < 1e-3 and printed > 0.03


# -- the maximum principle -------------------------------------------------------------------------------------------


def network_of(loop, sample):
    """A network of the closed loop's controls, a layer each of its Euler steps, on a tape, J differentiated."""
    F = loop.F
    phi = cell_indicators(Y)
    euler = {"ts_type": "rk", "ts_rk_type": "1fe"}
    net = ResidualNetwork(phi, layers=loop.times, activation="tanh", solver_parameters=euler)
    with_head = F.target.size == 3
    batch = Batch(Y.batch(loop.states[0][:, sample]), [1] if with_head else Y.batch(F.target[F.cells.own]))
    problem = LearningProblem(net, HEAD if with_head else None, least_squares, None, batch)
    problem = problem_of(problem, [loop.controls(k, sample) for k in range(len(loop.times) - 1)])
    J, run = problem.record()
    J.derivative()
    return float(J.functional), run


@pytest.mark.parametrize("target", ["out of reach", "a class"])
def test_the_gradient_is_the_costate_along_the_closed_loop(target):
    """D_v F of Remark 4.4 is r of 4.1, r(T) = f - ftilde or that of Remark 4.3, on cells (dF/dv_i) / w_i.

    A network of the feedback controls has r = D_v F, J = F.
    """
    # Trajectories along which no component changes its sign: F is smooth there.
    v, errors = np.array([[0.1, 0.4], [-0.2, -0.1]]), []
    for spacing in SPACINGS:
        F = far(spacing, target)
        loop, apart = closed_loop(F, v), []
        for sample in range(2):
            J, run = network_of(loop, sample)
            assert_allclose(J, loop.cost[sample], rtol=1e-10)  # the same steps, but for the root that mixed rows need
            for k in range(0, len(loop.times), 2):
                f, r = Y.values(run.state(k)), Y.values(run.costate(k))
                assert_allclose(f[:, 0], loop.states[k][:, sample], atol=1e-10)
                apart.append(np.abs(F.gradient(f, loop.times[k]) - r).max())
        errors.append(max(apart))
    assert order(errors) > FIRST_ORDER, errors
    # The sign: it is not r* = -r, and not dF/dv_i.
    size = np.abs(r).max()
    assert errors[-1] < size / 10
    assert np.abs(F.gradient(f, loop.times[k]) + r).max() > size
    assert np.abs(F.gradient(f, loop.times[k]) * F.cells.weights[:, None] - r).max() > size / 9


def test_the_characteristics_are_the_system_of_the_maximum_principle():
    """Remark 4.4: for L = 0, v_t = H_r and r_t = -H_v of (4.11) are (4.1a) and (4.2) with the controls of (4.10)."""
    F = far(SPACINGS[-1])
    w = Y.weights
    H = Hamiltonian(Y, get_activation("tanh"), "minimise")

    def least(v, r):  # by (4.9), with no controls
        T = [e.value for e in F.speeds.extremes(list(v))]
        return w @ np.minimum(*(np.tanh(t) * r for t in T))

    def characteristic(t, x, e=1e-5):
        v, r = x[:2], x[2:]
        in_v, in_r = (
            np.array([least(v + i * u, r + j * u) - least(v - i * u, r - j * u) for u in e * np.eye(2)]) / (2 * e * w)
            for i, j in ((1, 0), (0, 1))
        )
        return np.concatenate([in_r, -in_v])

    for v, r in zip(some_states(0.1, 0.5, 10, 2).T * [1, -1], some_states(-1, 1, 10, 2, seed=3).T):
        pair = Pair(v[:, None], r[:, None], "minimise")
        controls = extremal_controls(Y, BOX, pair).controls
        principle = np.concatenate([H.in_r(pair, controls)[:, 0], -H.in_f(pair, controls)[:, 0]])
        assert_allclose(characteristic(0.0, np.concatenate([v, r])), principle, atol=1e-8)  # central differences of 1e-5
    # From D_v F at the start the characteristic arrives at r(T) = f(T) - ftilde, and the cost there is F.
    v = np.array([0.1, -0.2])
    x = solve_ivp(characteristic, (0, T), [*v, *F.gradient(v, 0.0)[:, 0]], rtol=1e-8, max_step=0.05).y[:, -1]
    assert_allclose(x[2:], x[:2] - FAR, atol=2 * SPACINGS[-1])
    assert_allclose(w @ (x[:2] - FAR) ** 2 / 2, F(v, 0.0), atol=SPACINGS[-1])


def test_the_feedback_is_the_control_of_the_maximum_principle():
    """Of rank 2, in A pointwise, and that of (4.10) for r = D_v F; the speeds are those of the feedback map."""
    F, t = far(0.04), 0.3
    for v in some_states(-0.5, 0.5, 20, 2).T:
        controls = feedback_controls(F, v, t)
        pair = Pair(v[:, None], F.gradient(v, t), "minimise")
        expected = extremal_controls(Y, BOX, pair).controls
        assert controls.phi.shape == (2, 2)
        assert BOX.contains(controls.a[:, None], controls.phi @ controls.psi.T).all()
        assert np.abs(pair.r).min() > 0.1
        assert_allclose(controls.a, expected.a)
        assert_allclose(controls.phi @ controls.psi.T, expected.phi @ expected.psi.T)
        speeds = np.tanh(controls.argument(Y, v[:, None]))
        assert_allclose(feedback_speeds(F, v, t), speeds, atol=1e-12)


def test_where_staying_is_best_the_feedback_stays_by_mixed_rows():
    """Near a target within reach sigma(T) = 0 for controls in a convex A. If A is not convex an end of the box is taken."""
    target = np.array([0.4, -0.2])
    for A, convex in ((BOX, True), (Points([(-0.3, 0.2), (0.4, -0.3)]), False)):
        F = solve_value_function(Y, A, "tanh", target, StateGrid(START, 0.02), final_time=0.5)
        controls = feedback_controls(F, target, 0.48)
        b = controls.phi @ controls.psi.T
        assert A.contains(controls.a[:, None], b).all()
        speed = np.abs(feedback_speeds(F, target, 0.48)).max()
        assert speed < 1e-12 if convex else speed > 0.1
        assert closed_loop(F, target).cost[0] < 1e-3


def test_feedback_where_the_cost_depends_on_the_controls_is_in_A_and_of_a_row_a_cell():
    halves, A = sectors(*HALVES), Ellipse((0, 0), 0.6)
    F = solve_value_function(
        halves, A, "tanh", [0.5, -0.5], StateGrid([[-0.2, 0.2]] * 2, 0.05, samples=5), final_time=0.4, running=control_cost
    )
    v = np.array([0.1, -0.2])
    controls = feedback_controls(F, v, 0.1)
    assert A.contains(controls.a[:, None], controls.phi @ controls.psi.T).all()
    assert_allclose(np.tanh(controls.argument(halves, v[:, None])), feedback_speeds(F, v, 0.1), atol=1e-12)
