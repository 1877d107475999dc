"""Maximisers of H where controls have a cost: against SciPy over all of (a, b(y, .)), closed forms, and the residual."""

import numpy as np
import pytest
import sympy
from helpers import label_space, laplace, smooth
from numpy.testing import assert_allclose
from problems import gathered
from scipy.optimize import minimize

from fem_resnet import (
    Batch,
    Box,
    Controls,
    Ellipse,
    Hamiltonian,
    Kernel,
    LearningProblem,
    Pair,
    ResidualNetwork,
    RowBall,
    RowBox,
    RunningCost,
    SpanBox,
    cell_indicators,
    controls_with_cost,
    get_activation,
    hamiltonian_along,
    least_squares,
    middle_pairs,
    pmp_residual,
    raise_controls,
    smooth_in_time,
    tikhonov,
    train,
)  # fmt: skip

on_ranks = pytest.mark.parallel([1, 2, 3])
f, a = sympy.symbols("f a")
TANH = get_activation("tanh")
#: lambda_a, lambda_b, a running cost, a box; each has other parts of (a, b) at their ends.
CASES = {
    "free": (5.0, 5.0, None, Box((-9, 9), (-9, 9))),
    "a at its ends": (0.3, 2.0, RunningCost(f**2), Box((-0.5, 0.8), (-9, 9))),
    "both at their ends": (0.0, 0.2, RunningCost(f**4 + a**2 / 4 - a / 10, kernel=0.3), Box((-0.5, 0.8), (-0.25, 0.2))),
    "b without cost": (0.4, 0.0, None, Box((-0.5, 0.8), (-0.3, 0.2))),
    "a without cost": (0.0, 0.5, None, Box((-0.2, 0.3), (-0.2, 0.15))),
    "0 outside of the box": (0.2, 0.1, None, Box((0.2, 0.8), (0.05, 0.7))),
}

#: The rank of b where it is not at its ends, and where it costs nothing.
RANKS = {"free": 1, "a at its ends": 1, "b without cost": 2}


def pair(Y, samples=1):
    return Pair(1.5 * smooth(Y, samples), 3 * smooth(Y, samples, seed=5), "maximise")


def hamiltonian(Y, case, activation=TANH):
    *tikhonov, running, A = CASES[case]
    return Hamiltonian(Y, activation, "maximise", running, None, tikhonov), A


def constant(Y, A):
    """The middle of a box at all nodes."""
    one = np.ones((Y.nodes, 1))
    return Controls(np.mean(A.bias) * one[:, 0], np.mean(A.kernel) * one, one)


def best_of_all(Y, case, p):
    """max h at each node, over a and all values of b(y, .), by L-BFGS-B from several starts."""
    lambda_a, lambda_b, running, A = CASES[case]
    kappa = lambda_b + (0 if running is None else running.kernel)
    state, r, w = gathered(Y, p.f[:, 0]), gathered(Y, p.r[:, 0]), gathered(Y, Y.weights)
    c_1, c_2 = (0.0, 0.0) if running is None else running.in_bias

    def minus_h(x, r):
        u = x[0] - (w * x[1:]) @ state
        slope = r * (1 - np.tanh(u) ** 2)
        value = r * np.tanh(u) - c_1 * x[0] - (c_2 + lambda_a) / 2 * x[0] ** 2 - kappa / 2 * w @ x[1:] ** 2
        by_b = -w * (slope * state + kappa * x[1:])
        return -value, -np.append(slope - c_1 - (c_2 + lambda_a) * x[0], by_b)

    ends, best = [A.bias, *[A.kernel] * len(w)], []
    starts = [[np.mean(end) for end in ends], *([np.clip(s * 5, *end) for end in ends] for s in (-1, 1))]
    starts += [[A.bias[s], *np.where(s * state + (s - 1) * state > 0, *A.kernel)] for s in (0, 1)]
    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000, "maxfun": 10**5}
    for one in r:
        best.append(max(-minimize(minus_h, x, (one,), jac=True, bounds=ends, options=options).fun for x in starts))
    return np.array(best)


@on_ranks
@pytest.mark.parametrize("case", CASES)
def test_the_maximum_over_one_number_is_that_over_all_controls(case):
    Y = label_space("disk", "DG0")
    (H, A), p = hamiltonian(Y, case), pair(Y)
    found = controls_with_cost(H, A, p, constant(Y, A), functions=Y.size)
    l_0 = 0 if H.running is None else gathered(Y, H.running.integrand(p.f, np.zeros(Y.nodes)))[:, 0]
    largest = gathered(Y, found.largest) + l_0
    assert_allclose(largest, best_of_all(Y, case, p), rtol=0, atol=1e-7)
    # With as many functions as nodes its controls are exact. They lie in the box.
    assert_allclose(H.density(p, found.controls), found.largest, rtol=0, atol=1e-12)
    bias, b = gathered(Y, found.controls.a), gathered(Y, found.controls.phi) @ gathered(Y, found.controls.psi).T
    assert A.contains(bias[:, None], b, 1e-12).all()
    rank = np.linalg.matrix_rank(b, tol=1e-10)
    assert rank <= RANKS.get(case, Y.size)


@on_ranks
def test_with_few_functions_H_is_less_by_the_third_power_of_their_distance():
    """On a sphere, where there are enough nodes to see it; the default leaves out 1e-4 of H or less."""
    lost, kept = {}, []
    for space in (("sphere", "DG0"), ("annulus", "CG1")):
        Y = label_space(*space)
        (H, A), p = hamiltonian(Y, "a without cost"), pair(Y)
        for functions in (5, 9, 17, 33):
            found = controls_with_cost(H, A, p, constant(Y, A), functions=functions)
            lost[space[0], functions] = float(Y.sum(Y.weights @ (found.largest - H.density(p, found.controls))))
            kept.append(found.controls.phi.shape[1] <= functions + 1)
        assert lost[space[0], 33] < 1e-4 * H(p, found.controls)
    print("\nlost of H", lost)
    assert all(kept) and min(lost.values()) >= 0
    assert np.log2(lost["sphere", 5] / lost["sphere", 33]) / 3 > 2.5


@on_ranks
@pytest.mark.parametrize("functions", [2, 33])
@pytest.mark.parametrize("case", CASES)
def test_H_falls_at_no_node_also_where_the_kernel_is_of_few_functions(case, functions, rng):
    """From the maximiser itself, from the middle of the box, and from random rows."""
    Y = label_space("annulus", "CG1")
    (H, A), p = hamiltonian(Y, case), pair(Y)
    middle = constant(Y, A)
    exact = controls_with_cost(H, A, p, middle, functions=Y.size).controls
    for before in (middle, exact, middle.towards(exact, np.abs(smooth(Y, 1, 3)[:, 0]))):
        after = controls_with_cost(H, A, p, before, functions=functions)
        assert (H.density(p, after.controls) >= H.density(p, before) - 1e-14 * np.abs(p.r[:, 0])).all()
        assert (after.largest >= H.density(p, after.controls)).all()


@on_ranks
def test_for_linear_sigma_the_maximiser_is_in_closed_form():
    """q = r: a = clip((r - c_1)/c_2), b = clip(-r f / kappa); for another sigma it is another one."""
    Y = label_space("sphere", "DG0")
    case = "both at their ends"
    (H, A), p = hamiltonian(Y, case, get_activation("identity")), pair(Y)
    found = controls_with_cost(H, A, p, constant(Y, A), functions=Y.size).controls
    r, state = gathered(Y, p.r[:, 0]), gathered(Y, p.f[:, 0])
    expected_a = np.clip((r + 0.1) / 0.5, *A.bias)
    expected_b = np.clip(-np.outer(r, state) / 0.5, *A.kernel)
    assert_allclose(gathered(Y, found.a), expected_a, rtol=0, atol=1e-12)
    assert_allclose(gathered(Y, found.phi) @ gathered(Y, found.psi).T, expected_b, rtol=0, atol=1e-12)
    other = controls_with_cost(hamiltonian(Y, case)[0], A, p, constant(Y, A)).controls
    assert np.abs(gathered(Y, other.a) - expected_a).max() > 0.1


# -- rows, for many samples -------------------------------------------------------------------------------------------


def charged(Y, size=0.3):
    """With a cost in which f and a are mixed."""
    cost = RunningCost(f**2 + f * a / 5 + a**4 / 10, kernel=size / 2)
    return Hamiltonian(Y, TANH, "maximise", cost, [1, 2, 1, 3], (size, size))


@on_ranks
@pytest.mark.parametrize("kind", ["box", "ball", "span"])
def test_rows_with_a_cost_are_raised_at_every_step(kind):
    """The steps never lower H, nor its density where rows are free in y; the end is the maximum that SciPy finds."""
    Y = label_space("annulus", "CG1")
    psi = laplace("annulus", "CG1", 3)
    A = {"box": RowBox(psi, (-0.6, 0.5), (-0.3, 0.4)), "ball": RowBall(psi, 0.7),
         "span": SpanBox(laplace("annulus", "CG1", 2), psi, (-0.6, 0.5), (-0.3, 0.4))}[kind]  # fmt: skip
    H, p = charged(Y), pair(Y, 4)
    start = Controls(0.2 * smooth(Y, 1)[:, 0], 0.1 * smooth(Y, 3, 8), psi.values)
    before = raise_controls(H, A, p, start, 0)[0]  # within A
    after, values = raise_controls(H, A, p, start, 300 if kind == "span" else 150)
    assert_allclose(values[0], H(p, before), rtol=1e-13)
    assert (np.diff(values) >= (0 if kind == "span" else -1e-13 * abs(values[0]))).all() and values[-1] > values[0] + 0.1
    assert_allclose(values[-1], H(p, after), rtol=1e-13)
    if kind != "span":
        assert (H.density(p, after) >= H.density(p, before)).all()
    state, r, w, Q = (gathered(Y, part) for part in (p.f, p.r, Y.weights, psi.values))
    g, omega = Q.T @ (w[:, None] * state), np.array([1, 2, 1, 3]) / 7
    P = gathered(Y, A.phi.values) if kind == "span" else None

    def h(bias, X):
        """The density of H, from its formula."""
        u = bias[:, None] - X @ g
        l = state**2 + state * bias[:, None] / 5 + bias[:, None] ** 4 / 10
        squares = np.einsum("ni,ij,nj->n", X, Q.T @ (w[:, None] * Q), X)
        return np.sum(r * np.tanh(u), axis=1) - l @ omega - 0.15 * bias**2 - 0.225 * squares

    if kind == "span":

        def minus_H(x):
            return -w @ h(x[: len(w)], P @ x[len(w) :].reshape(2, 3))

        ends = [(-0.6, 0.5)] * len(w) + [(-0.3, 0.4)] * 6
        best = minimize(minus_H, np.zeros(len(ends)), bounds=ends, options={"ftol": 1e-12, "maxfun": 10**6}).fun
        assert_allclose(values[-1], -best, rtol=1e-5)
        return
    rows = np.column_stack([gathered(Y, after.a), gathered(Y, after.phi)])
    assert_allclose(w @ h(rows[:, 0], rows[:, 1:]), values[-1], rtol=1e-12)
    # Nothing is left to gain: a step along the gradient, by central differences, ends where it began.
    steps = 1e-5 * np.eye(4)
    gradient = np.column_stack([(h(*split(rows + e)) - h(*split(rows - e))) / 2e-5 for e in steps])
    assert_allclose(A.project(rows + 0.05 * gradient), rows, rtol=0, atol=1e-3)


def split(rows):
    """a and X."""
    return rows[:, 0], rows[:, 1:]


# -- the residual -----------------------------------------------------------------------------------------------------

WIDE = Box((-4.0, 4.0), (-4.0, 4.0))


def regularised(layers, weight=0.3, samples=1, running=None, alone=False, **options):
    """Full-rank controls on cells, at zero."""
    Y = label_space("disk", "DG0", alone=alone)
    net = ResidualNetwork(Kernel(cell_indicators(Y)), layers=layers, activation="tanh", **options)
    batch = Batch(Y.batch(smooth(Y, samples)), Y.batch(2 * smooth(Y, samples, seed=50)))
    return LearningProblem(net, None, least_squares, None if weight is None else tikhonov(weight), batch, running=running)


def trained(problem):
    options = {"tao_gatol": 1e-6, "tao_grtol": 0.0, "tao_gttol": 0.0}  # the residual is of its square
    result = train(problem, options, monitor=lambda progress: None)
    assert result.gradient_norm < 1e-6
    return problem


@pytest.mark.parametrize("running", [None, RunningCost(f**2 / 5 + a**2 / 4, kernel=0.5)], ids=["tikhonov", "running"])
def test_at_a_stationary_point_the_residual_is_zero_to_the_fourth_power_of_the_layers(running):
    """`train` on the same J. f and r are means of a layer's ends, to second order, and H is stationary there.

    So H with its cost is nearly the same in all layers, and H without it is not.
    """
    found = []
    for layers in (2, 4):
        problem = regularised(layers, 0.3 if running is None else 0.1, running=running)
        before = pmp_residual(problem, WIDE)
        assert not before.reached and before.lower > 0.1
        after = pmp_residual(trained(problem), WIDE)
        assert after.lower == after.upper and "sampled" in after.caveat
        found.append(after.upper)
    J, run = problem.record()
    J.derivative()
    H = Hamiltonian.of(problem, "maximise")
    plain = Hamiltonian(problem.net.Y, TANH, "maximise")
    spread = [np.ptp(hamiltonian_along(run, each).mean(axis=1)) for each in (H, plain)]
    print(f"\nPMP residual at a stationary point {found}; spread of H {spread[0]:.4f}, without cost {spread[1]:.4f}")
    assert found[-1] < 1e-4 and np.log2(found[0] / found[1]) > 3.6 and spread[0] < 0.2 * spread[1]
    # J without the cost of its controls is another one.
    assert pmp_residual(problem.replace(regulariser=None, running=None), WIDE).upper > 1e3 * found[-1]


@on_ranks
def test_many_samples_have_a_bracket():
    problem = regularised(2, samples=3)
    first = pmp_residual(problem, WIDE)
    assert 0.1 < first.lower < first.upper
    rounds = [pmp_residual(problem, WIDE, rounds=n).lower for n in (0, 8)]
    assert rounds[0] < rounds[1] <= first.upper
    Y, H = problem.net.Y, Hamiltonian.of(problem, "maximise")
    assert H.tikhonov == (0.3, 0.3) and H.charges_controls and H.kernel_weight == 0.3
    assert first.density.shape == (Y.nodes, 2) and first.density.min() >= 0
    # What the bracket is of: rows of all cells that ascent finds are between its ends.
    J, run = problem.record()
    J.derivative()
    A, gained = RowBox(cell_indicators(Y), *([end / 4 for end in ends] for ends in (WIDE.bias, WIDE.kernel))), 0.0
    for layer, (tau, p) in enumerate(zip(np.diff(problem.net.times), middle_pairs(run, "maximise"))):
        values = raise_controls(H, A, p, Controls.of_layer(problem.net, layer), 30)[1]
        gained += tau * (values[-1] - values[0])
    assert 0 < gained <= first.absolute[1] and gained > 0.5 * first.absolute[0]


def test_copies_of_one_sample_have_the_residual_of_one():
    """Each bears a third of the cost: the upper bound is reached."""
    problem = regularised(2)
    Y, one = problem.net.Y, problem.batch
    copies = Batch(*(Y.batch(np.repeat(Y.values(part), 3, axis=1)) for part in (one.inputs, one.targets)))
    expected, found = pmp_residual(problem, WIDE), pmp_residual(problem.replace(batch=copies), WIDE)
    assert_allclose(found.absolute[1], expected.absolute[1], rtol=1e-9)
    assert 0.8 * expected.absolute[0] < found.absolute[0] <= found.absolute[1]


def test_many_samples_at_a_stationary_point_have_a_bracket_about_zero():
    problem = regularised(2, samples=3)
    first, last = pmp_residual(problem, WIDE), pmp_residual(trained(problem), WIDE)
    assert 0 <= last.lower < 1e-2 * first.lower and last.lower <= last.upper


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("samples", [1, 3])
def test_the_residual_is_the_same_on_any_number_of_ranks(samples):
    """Against the whole mesh on each rank alone, with bias and kernel away from zero."""
    found = []
    for alone in (False, True):
        problem = regularised(2, samples=samples, running=RunningCost(f**2 / 5 + a**2 / 4, kernel=0.5), alone=alone)
        for layer in range(2):
            problem.net.bias.set(layer, 0.3 * smooth(problem.net.Y, 1, seed=layer)[:, 0])
        found.append(pmp_residual(problem, WIDE).absolute)
    assert_allclose(*found, rtol=1e-9)


def test_costs_that_no_box_takes_are_refused():
    problem = regularised(2)
    for changes, A, message in (
        ({}, Ellipse(), "^A: expected a Box where the controls have a cost, got "),
        ({"running": RunningCost(f * a)}, WIDE, r"^running: expected a density l_0\(f\) \+ c_1 a \+ c_2/2 a\^2"),
        (
            {"running": RunningCost(a / 2), "regulariser": tikhonov(0.0, kernel=1.0)},
            WIDE,
            "^running: expected a cost of .*0.5 a",
        ),
        ({"regulariser": tikhonov(1.0) + smooth_in_time(0.1)}, WIDE, r"^regulariser: expected tikhonov\(..\) of bias and"),
        ({"running": RunningCost(-a * a)}, WIDE, "^running: expected a density"),
    ):
        with pytest.raises(ValueError, match=message):
            pmp_residual(problem.replace(**changes), A)
    assert Hamiltonian.of(problem.replace(regulariser=tikhonov(0.0, bias=2.0)), "minimise").tikhonov == (2.0, 0.0)
    assert not Hamiltonian.of(problem.replace(learn="initial"), "minimise").charges_controls
