"""Section 4.2: Hamiltonian, extremal controls and the residual, against dense matrices and brute force."""

from itertools import product

import firedrake as fd
import matplotlib.figure
import numpy as np
import pytest
import sympy
from helpers import flat_network, label_space, smooth
from numpy.testing import assert_allclose
from problems import gathered, learning_problem, network

from fem_resnet import (
    Batch,
    Box,
    Controls,
    Ellipse,
    Hamiltonian,
    LabelSpace,
    LearningProblem,
    NodalBox,
    NodalSets,
    Pair,
    Points,
    Polygon,
    ResidualNetwork,
    RunningCost,
    Sections,
    cell_indicators,
    extremal_controls,
    get_activation,
    given_basis,
    hamiltonian_along,
    least_squares,
    middle_pairs,
    pmp_residual,
    train,
)  # fmt: skip
from fem_resnet.control.maximum_principle import _best_of_pool, _upper
from fem_resnet.control.violation import violation
from fem_resnet.training.msa import problem_of

on_ranks = pytest.mark.parallel([1, 2, 3])
BOX = Box((-0.5, 0.8), (-1.0, 0.7))
SETS = {
    "box": BOX,
    "disk": Ellipse((0.1, 0.2), 0.8),
    "triangle": Polygon([(0, 0), (1, -1), (1.5, 2)]),
    "points": Points([(0, 1), (0, -1), (1, 0.5)]),
    "lens by its sections": Sections((-1, 1), lambda a: a**2 - 1, lambda a: 1 - a**2, convex=True),
}
TANH = get_activation("tanh")
ROUND_OFF = 1e-12


def pair(Y, samples=1, convention="maximise"):
    return Pair(smooth(Y, samples), smooth(Y, samples, seed=5), convention)


def rows(Y, controls):
    """a and b of all nodes, ordered by their coordinates."""
    return gathered(Y, controls.a), gathered(Y, controls.phi) @ gathered(Y, controls.psi).T


def some_controls(Y):
    return Controls(smooth(Y, 1, 7)[:, 0], smooth(Y, 2, 8), smooth(Y, 2, 9))


@on_ranks
@pytest.mark.parametrize("space", [("disk", "CG1"), ("sphere", "DG0")])
def test_hamiltonian_and_its_derivatives(space):
    Y = label_space(*space)
    symbols = sympy.symbols("f a")
    cost = RunningCost(symbols[0] ** 4 / 4 + symbols[0] * symbols[1], kernel=0.3)
    H, p, c = Hamiltonian(Y, TANH, "maximise", cost, [1, 2, 1], (0.4, 0.5)), pair(Y, 3), some_controls(Y)
    a, b = rows(Y, c)
    f, r, w = (gathered(Y, x) for x in (p.f, p.r, Y.weights))
    u = a[:, None] - b @ (w[:, None] * f)
    L = (w @ (f**4 / 4 + f * a[:, None])) @ [0.25, 0.5, 0.25] + 0.2 * w @ a**2 + 0.4 * np.einsum("i,ij,j", w, b**2, w)
    assert_allclose(H(p, c), np.sum(w[:, None] * np.tanh(u) * r) - L, rtol=ROUND_OFF)
    assert_allclose(gathered(Y, H.in_r(p, c)), np.tanh(u), rtol=0, atol=ROUND_OFF)
    in_b, e = H.in_b(p, c), 1e-6

    def central(change):
        return (H(*change(e)) - H(*change(-e))) / (2 * e)

    df, dr, da, db = smooth(Y, 3, 20), smooth(Y, 3, 21), smooth(Y, 1, 22)[:, 0], smooth(Y, 2, 23)
    pairing = lambda x, y: float(Y.sum(np.sum(Y.weights[:, None] * x * y)))  # noqa: E731
    exact = [
        pairing(H.in_f(p, c), df), pairing(H.in_r(p, c), dr), pairing(H.in_a(p, c)[:, None], da[:, None]),
        pairing(in_b[0], db @ Y.sum((Y.weights[:, None] * c.psi).T @ in_b[1])),
    ]  # fmt: skip
    differences = [
        central(lambda s: (Pair(p.f + s * df, p.r, "maximise"), c)),
        central(lambda s: (Pair(p.f, p.r + s * dr, "maximise"), c)),
        central(lambda s: (p, Controls(c.a + s * da, c.phi, c.psi))),
        central(lambda s: (p, Controls(c.a, c.phi + s * db, c.psi))),
    ]
    assert_allclose(differences, exact, rtol=0, atol=1e-8)  # a central difference of step 1e-6
    up, down = (H.cost_in_f(p, Controls(c.a + s * da, c.phi, c.psi))[0] for s in (e, -e))
    assert_allclose((up - down) / (2 * e), H.cost_in_f(p, c)[1] * da[:, None], rtol=0, atol=1e-8)


@on_ranks
def test_conventions_cannot_be_mixed_up():
    Y = label_space("disk", "CG1")
    p, c = pair(Y), some_controls(Y)
    with pytest.raises(ValueError, match="^pair: expected one of this Hamiltonian's convention, 'minimise', got 'maximise'"):
        Hamiltonian(Y, TANH, "minimise")(p, c)
    with pytest.raises(ValueError, match="^convention"):
        Hamiltonian(Y, TANH, "max")
    assert Hamiltonian(Y, TANH, "minimise")(p.to("minimise"), c) == -Hamiltonian(Y, TANH, "maximise")(p, c)


@on_ranks
@pytest.mark.parametrize("A", SETS.values(), ids=SETS.keys())
def test_extremal_controls_are_of_rank_two_in_A_and_reach_the_bound(A):
    """(4.8): max H is the integral of max(sigma(T^-) r, sigma(T^+) r), here by a dense b."""
    Y = label_space("annulus", "CG1")
    p = pair(Y)
    found = extremal_controls(Y, A, p)
    a, b = rows(Y, found.controls)
    assert A.contains(a[:, None], b, 1e-12).all() and found.controls.phi.shape[1] == 2
    assert np.linalg.matrix_rank(b) <= 2
    f, r, w = (gathered(Y, x) for x in (p.f[:, 0], p.r[:, 0], Y.weights))
    T = a - b @ (w * f)
    parts = w @ np.maximum(f, 0), w @ np.maximum(-f, 0)
    best = np.where(r >= 0, A.largest(*parts).value, A.smallest(*parts).value)
    assert_allclose(T, best, rtol=0, atol=ROUND_OFF)
    assert_allclose(Hamiltonian(Y, TANH, "maximise")(p, found.controls), w @ (np.tanh(best) * r), rtol=ROUND_OFF)
    same = rows(Y, extremal_controls(Y, A, p.to("minimise")).controls)
    assert (same[0] == a).all() and (same[1] == b).all()


@on_ranks
def test_the_box_formula_of_the_paper():
    """The formulas before (4.9), with a+, b- where r* > 0, f > 0, and so on."""
    Y = label_space("disk", "DG0")
    p = pair(Y)
    a, b = rows(Y, extremal_controls(Y, BOX, p).controls)
    f, r = gathered(Y, p.f[:, 0]), gathered(Y, p.r[:, 0])[:, None]
    (a0, a1), (b0, b1) = BOX.bias, BOX.kernel
    assert (a == a1 * (r > 0)[:, 0] + a0 * (r < 0)[:, 0]).all()
    assert (b == b0 * ((r > 0) & (f >= 0) | (r < 0) & (f < 0)) + b1 * ((r > 0) & (f < 0) | (r < 0) & (f > 0))).all()


@on_ranks
@pytest.mark.parametrize("samples", [1, 2])
def test_all_corner_choices_on_four_cells(samples):
    """Brute force over a in {a-, a+} and b(y, z) in {b-, b+}, cell by cell; one sample reaches the maximum."""
    Y = label_space("disk", "DG0")
    # Only the first four cells have a state, from the left.
    keep = Y.coordinates[:, 0] <= np.sort(np.concatenate(Y.comm.allgather(Y.coordinates[:, 0])))[3]
    p = Pair(np.where(keep[:, None], smooth(Y, samples), 0), smooth(Y, samples, 5), "maximise")
    f = np.concatenate(Y.comm.allgather((Y.weights[:, None] * p.f)[keep]))
    assert len(f) == 4
    T = np.array([a - np.array(b) @ f for a in BOX.bias for b in product(BOX.kernel, repeat=4)])
    brute = np.max(p.r @ np.tanh(T).T, axis=1)
    H = Hamiltonian(Y, TANH, "maximise")
    if samples == 1:
        assert_allclose(H.density(p, extremal_controls(Y, BOX, p).controls), brute, rtol=0, atol=ROUND_OFF)
        return
    low, high = _best_of_pool(H, BOX, p, 4), _upper(H, BOX, p)
    assert (brute <= high + ROUND_OFF).all() and (low <= high + ROUND_OFF).all()
    # The pool is not all: 3 % of H are what it misses here.
    assert Y.sum(Y.weights @ (brute - low)) < 0.03 * Y.sum(Y.weights @ np.abs(brute))


@on_ranks
def test_ties_have_a_rule_and_a_measure():
    Y = label_space("disk", "DG0")
    x = Y.coordinates[:, 0]
    p = Pair(np.where(x > 0.2, 0.0, 1.0)[:, None], np.where(x < -0.2, 0.0, -1.0)[:, None], "maximise")
    found = extremal_controls(Y, BOX, p)
    assert_allclose(found.no_state, Y.sum(Y.weights @ (x > 0.2)), rtol=1e-14)
    assert_allclose(found.no_costate, Y.sum(Y.weights @ (x < -0.2)), rtol=1e-14)
    assert (found.controls.a == np.where(x < -0.2, 0.8, -0.5)).all()
    with pytest.raises(ValueError, match="^pair: expected one sample, as .4.10. holds for one, got 2; try raise_controls"):
        extremal_controls(Y, BOX, pair(Y, 2))


@on_ranks
def test_controls_become_bases_of_least_rank():
    Y = label_space("sphere", "CG1")
    c = some_controls(Y)
    wide = c.towards(c, 0.3)
    for given, rank in ((wide, 2), (Controls(c.a, 0 * c.phi, c.psi), 1)):
        phi, psi, beta = given.in_bases(Y)
        assert phi.rank == psi.rank == rank
        made = gathered(Y, phi.values) @ beta @ gathered(Y, psi.values).T
        assert_allclose(made, rows(Y, given)[1], rtol=0, atol=ROUND_OFF)


def along(layers, steps, method="4", **options):
    net = network(
        "disk", "CG1", times=np.linspace(0, 1.3, layers + 1), steps=steps,
        solver_parameters={"ts_type": "rk", "ts_rk_type": method}, **options,
    )  # fmt: skip
    problem = learning_problem(net, head=False, weight=None, samples=2)
    J, run = problem.record()
    J.derivative()
    H = hamiltonian_along(run, Hamiltonian(net.Y, net.activation, "maximise"))
    return np.ptp(H) / np.abs(H).max()


SHARED = {"bias_in_time": "shared", "kernel_in_time": "shared"}


@on_ranks
@pytest.mark.parametrize("method, order", [("1fe", 1), ("2a", 2), ("4", 4)])
def test_the_drift_of_the_hamiltonian_has_the_order_of_the_scheme(method, order):
    drift = [along(4, steps, method, **SHARED) for steps in (4, 8, 16)]
    rate = np.log2(drift[1] / drift[2])
    assert abs(rate - order) < 0.3, drift


@on_ranks
def test_the_hamiltonian_is_constant_to_1e_10_with_a_fine_step():
    assert along(2, 128, **SHARED) < 1e-10
    assert along(4, 4) > 0.01  # other controls in each layer


def bounded(layers, target=3.0, **options):
    """One sample whose target lies out of reach of a box, by full-rank controls on cells; started in the box."""
    Y = label_space("disk", "DG0")
    net = flat_network(cell_indicators(Y), layers=layers, activation="tanh", **options)
    inputs, targets = Y.batch(smooth(Y, 1)), Y.batch(target * smooth(Y, 1, seed=50))
    return LearningProblem(net, None, least_squares, None, Batch(inputs, targets))


def spread_of_maximum(problem):
    """How far max_A H is from constant along the pair, relative."""
    net = problem.net
    J, run = problem.record()
    J.derivative()
    H = Hamiltonian(net.Y, net.activation, "maximise")
    values = []
    for l in range(net.layers + 1):
        p = Pair(np.array(net.Y.values(run.state(l))), -net.Y.values(run.costate(l)), "maximise")
        values.append(H(p, extremal_controls(net.Y, BOX, p).controls))
    return np.ptp(values) / max(values)


@on_ranks
def test_max_H_is_constant_to_the_order_of_the_scheme_where_no_switch_is_inside_a_layer():
    """f > 0, and a target far above: a+ and b- at all times are optimal; rk4, four steps or eight."""
    Y = label_space("disk", "CG1")
    drift = []
    for layers in (4, 8, 16):
        net = ResidualNetwork(given_basis(Y, [1.0]), layers=layers, activation="tanh")
        for l in range(layers):
            net.bias.set(l, BOX.bias[1] + 0 * Y.weights)
            net.kernel.set(l, [[BOX.kernel[0]]])
        batch = Batch(Y.batch(0.2 + 0.1 * smooth(Y, 1)), Y.batch(9 + 0 * Y.weights))
        problem = LearningProblem(net, None, least_squares, None, batch)
        assert abs(pmp_residual(problem, BOX).upper) < ROUND_OFF
        drift.append(spread_of_maximum(problem))
    assert drift[2] < 1e-5 and np.log2(drift[1] / drift[2]) > 3.7, drift


def switching(times):
    """f_t = a, L = f^2/2, |a| <= 1, from f = 1/2: a = -1 up to t = 1/2, then a = 0; solved in these layers."""
    Y = label_space("annulus", "CG1")
    net = ResidualNetwork(given_basis(Y, [1.0]), bias=given_basis(Y, [1.0]), layers=times, activation="identity")
    batch = Batch(Y.batch(0.5 + 0 * Y.weights), Y.batch(0 * Y.weights))
    cost = RunningCost(sympy.Symbol("f") ** 2 / 2)
    problem = LearningProblem(net, None, least_squares, None, batch, running=cost)
    bounds = {"bias": (-1, 1), "kernel": (0, 0)}
    train(problem, {"tao_type": "bnls", "tao_gatol": 1e-12}, bounds=bounds, monitor=lambda progress: None)
    J, run = problem.record()
    J.derivative()
    H, A, values = Hamiltonian.of(problem, "maximise"), Box((-1, 1), (0, 0)), []
    for l in range(net.layers + 1):
        p = Pair(np.array(Y.values(run.state(l))), -Y.values(run.costate(l)), "maximise")
        values.append(H(p, extremal_controls(Y, A, p).controls))
    return np.concatenate([net.bias.get(l) for l in range(net.layers)]), np.ptp(values)


@pytest.mark.parallel([1, 2])
def test_max_H_is_constant_where_the_switch_is_at_an_interface_and_up_to_the_layer_length_where_not():
    """With a running cost; f is linear and L quadratic on a layer, which Runge-Kutta of order 4 does exactly."""
    a, spread = switching([0, 0.25, 0.5, 0.75, 1.0])
    assert_allclose(a, [-1, -1, 0, 0], rtol=0, atol=1e-10)
    assert spread < 1e-10  # what the minimisation leaves
    inside = [switching(np.linspace(0, 1, layers + 1))[1] for layers in (3, 9)]
    assert inside[0] > 1e3 * spread and np.log(inside[0] / inside[1]) / np.log(3) > 0.9, inside


@on_ranks
def test_the_residual_is_zero_where_the_maximum_principle_holds():
    """b = 0 and a target out of reach: a = a+ is optimal, and r* > 0 always."""
    Y = label_space("sphere", "CG1")
    one = 1 + 0 * Y.weights
    net = ResidualNetwork(given_basis(Y, [1.0]), layers=3)
    problem = LearningProblem(net, None, least_squares, None, Batch(Y.batch(0 * one), Y.batch(9 * one)))
    A = Box((-1, 0.5), (0, 0))
    for value, holds in ((0.5, True), (0.2, False)):
        for l in range(3):
            net.bias.set(l, value * one)
        found = pmp_residual(problem, A)
        assert found.lower == found.upper and not found.reached
        assert (abs(found.upper) < ROUND_OFF) == holds and ((np.abs(found.density) < 1e-10).all() == holds)


# -- sets that depend on y and t ---------------------------------------------------------------------------------------------


def ends(Y, t):
    """a-, a+, b-, b+ as functions of y and t, with a- < a+ and b- < 0 < b+; shape (nodes,) each."""
    x = Y.coordinates[:, 0]
    a = -0.6 + 0.3 * np.sin(3 * x + t), 0.4 + 0.3 * np.cos(2 * x - t)
    return *a, (-0.5 - 0.2 * t * x**2) / Y.measure, (0.3 + 0.1 * np.cos(5 * x) * t) / Y.measure


def box_at(Y, t):
    low, high, least, largest = ends(Y, t)
    return NodalBox(Y, (low, high), (least, largest))


@on_ranks
@pytest.mark.parametrize("samples", [1, 2])
def test_all_corner_choices_on_four_cells_of_a_box_that_depends_on_y_and_t(samples):
    """As above, at two times: brute force over the corners of each y's own box. No constant box has these maxima."""
    Y = label_space("disk", "DG0")
    keep = Y.coordinates[:, 0] <= np.sort(np.concatenate(Y.comm.allgather(Y.coordinates[:, 0])))[3]
    signs = np.sign(Y.coordinates[:, 1:])
    p = Pair(np.where(keep[:, None], signs * np.abs(smooth(Y, samples)), 0), smooth(Y, samples, 5), "maximise")
    f = np.concatenate(Y.comm.allgather((Y.weights[:, None] * p.f)[keep]))
    assert np.ptp(np.sign(f), axis=0).tolist() == [2] * samples, "f has both signs"
    H, found = Hamiltonian(Y, TANH, "maximise"), []
    for t in (0.0, 1.5):
        a0, a1, b0, b1 = ends(Y, t)
        brute = np.full(Y.nodes, -np.inf)
        for a in (a0, a1):
            for choice in product((b0, b1), repeat=4):
                T = a[:, None] - np.column_stack(choice) @ f
                brute = np.maximum(brute, np.sum(p.r * np.tanh(T), axis=1))
        A = box_at(Y, t)
        found.append(brute)
        if samples == 1:
            extremal = extremal_controls(Y, A, p).controls
            assert_allclose(H.density(p, extremal), brute, rtol=0, atol=ROUND_OFF)
            b = extremal.phi @ np.concatenate(Y.comm.allgather(extremal.psi)).T
            assert A.contains(extremal.a[:, None], b, 0.0).all() and extremal.phi.shape[1] == 2
            assert violation(Y, A, extremal) is None and violation(Y, box_at(Y, 1.5 - t), extremal) is not None
            continue
        low, high = _best_of_pool(H, A, p, 4), _upper(H, A, p)
        assert (low <= brute + ROUND_OFF).all() and (brute <= high + ROUND_OFF).all()
        assert abs(Y.sum(Y.weights @ (brute - low))) < 0.05 * Y.sum(Y.weights @ np.abs(brute))
    assert float(Y.sum(Y.weights @ np.abs(found[0] - found[1]))) > 0.01


@on_ranks
@pytest.mark.parametrize("A", SETS.values(), ids=SETS.keys())
def test_a_set_that_is_the_same_at_all_y_and_t_is_one_set(A):
    """Extremal controls and residuals of boxes with constant ends, of one subdomain, and of a list of one set a layer."""
    Y = label_space("annulus", "CG1")
    same = [[A] * 2, NodalSets(Y, [Points([(7, 7)]), A], np.ones(Y.nodes, int))]
    if isinstance(A, Box):
        same.append((A, NodalBox(Y, A.bias, A.kernel)))
    p = pair(Y)
    expected = extremal_controls(Y, A, p).controls
    for other in (B for B in (same[1], *same[2:])):
        found = extremal_controls(Y, other[1] if isinstance(other, tuple) else other, p).controls
        assert all((getattr(found, part) == getattr(expected, part)).all() for part in ("a", "phi", "psi"))
    points = np.column_stack(A.sample(5))
    net = ResidualNetwork(given_basis(Y, [1.0]), layers=2)
    for l, (a, b) in enumerate(points[[0, -1]]):
        net.bias.set(l, a + 0 * Y.weights)
        net.kernel.set(l, [[b]])
    for samples in (1, 3):
        problem = learning_problem(net, head=True, weight=None, samples=samples)
        expected = pmp_residual(problem, A)
        for other in same:
            found = pmp_residual(problem, other)
            assert_allclose([found.lower, found.upper], [expected.lower, expected.upper], rtol=1e-10)
            assert_allclose(found.density, expected.density, rtol=0, atol=1e-12)


@on_ranks
@pytest.mark.parametrize("space", [("sphere", "CG1"), ("annulus", "DG0")])
def test_the_residual_is_zero_where_the_maximum_principle_holds_for_a_set_that_depends_on_y_and_t(space):
    """f > 0 and a target far above: at each y and t the controls are the ends a+(y, t) and b-(y, t), and no others."""
    Y = label_space(*space)
    layers = 3
    middles = (np.arange(layers) + 0.5) / layers
    sets = [box_at(Y, t) for t in middles]
    one = np.ones((Y.nodes, 1))

    def with_controls(choose):
        """A network with the controls that `choose` makes of the ends at the middle of each layer."""
        controls = [Controls(*choose(*ends(Y, t), one)) for t in middles]
        net = ResidualNetwork(given_basis(Y, [1.0]), layers=layers, final_time=1.0)
        batch = Batch(Y.batch(1.5 + 0.1 * smooth(Y, 1)), Y.batch(20 * one))
        return problem_of(LearningProblem(net, None, least_squares, None, batch), controls)

    best = with_controls(lambda low, high, least, largest, one: (high, least[:, None], one))
    found = pmp_residual(best, sets)
    assert found.lower == found.upper and abs(found.upper) < 1e-10 and (np.abs(found.density) < 1e-10).all()
    with pytest.raises(ValueError, match="^A: expected a set with the controls of all layers in it; layer [02] has"):
        pmp_residual(best, sets[::-1])  # t counts
    x = Y.coordinates[:, 0]
    for other in (
        lambda low, high, least, largest, one: (np.where(x > 0.3, low, high), least[:, None], one),
        lambda low, high, least, largest, one: (high, (least * (1 - 0.1 * (x > 0)))[:, None], one),
    ):
        assert pmp_residual(with_controls(other), sets).upper > 1e-3


@on_ranks
def test_controls_outside_of_a_set_that_depends_on_y_are_refused_by_layer_and_node():
    """Only at one node of the second layer is the set too small; sets for other numbers of layers, or places, are refused."""
    Y = label_space("annulus", "CG1")
    x = Y.coordinates
    there = x[:, 0] == max(Y.comm.allgather(x[:, 0].max()))
    net = ResidualNetwork(given_basis(Y, [1.0]), layers=2)
    net.bias.set(0, 0.5 + 0 * Y.weights)
    net.bias.set(1, 0.5 + 0 * Y.weights)
    problem = learning_problem(net, head=True, weight=None, samples=1)
    wide, narrow = NodalBox(Y, (-1, 1), (0, 1)), NodalBox(Y, (-1, np.where(there, 0.25, 1.0)), (0, 1))
    assert pmp_residual(problem, [wide, wide]).upper > 0
    # The size of the set is 2 in a.
    with pytest.raises(ValueError, match=r"; layer 1 has \(a\(y\), b\(y, z\)\) = \(0.5, 0\) at y = \(1, .*by 1.2e-01 of"):
        pmp_residual(problem, [wide, narrow])
    with pytest.raises(ValueError, match="^A: expected one set, or one for each of the 2 layers, got a list of 3"):
        pmp_residual(problem, [wide] * 3)
    with pytest.raises(ValueError, match="^A: expected sets on the label space .*, got sets on LabelSpace"):
        pmp_residual(problem, NodalBox(label_space("sphere", "CG1"), (-1, 1), (0, 1)))


@on_ranks
def test_a_reached_target_is_noticed_and_said():
    problem = bounded(2)
    final = problem.net(problem.batch.inputs)
    problem = LearningProblem(problem.net, None, least_squares, None, Batch(problem.batch.inputs, final))
    found = pmp_residual(problem, BOX)
    assert found.reached and "use the gradient" in str(found) and found.upper == 0.0


@on_ranks
def test_bracket_for_many_samples():
    problem = learning_problem(network("annulus", "CG1", bias="nodes"), head=True, weight=None)
    wide = Box((-1.5, 1.5), (-9, 9))  # the controls lie in it
    found = pmp_residual(problem, wide)
    longer = pmp_residual(problem, wide, rounds=8)
    assert 0 <= found.lower <= longer.lower <= longer.upper == found.upper and found.density.min() >= 0
    # The upper end is the sum over the samples of each one's own max H, T = +-(1.5 + 9 int |f|), less H.
    J, run = problem.record()
    J.derivative()
    Y, H, expected = problem.net.Y, Hamiltonian.of(problem, "maximise"), 0.0
    for l, (p, tau) in enumerate(zip(middle_pairs(run, "maximise"), np.diff(problem.net.times))):
        own = H.activation(1.5 + 9 * Y.sum(Y.weights @ np.abs(p.f))) * np.abs(p.r)
        expected += tau * (Y.sum(Y.weights @ own).sum() - H(p, Controls.of_layer(problem.net, l)))
    assert_allclose(found.absolute[1], expected, rtol=1e-10)


@on_ranks
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("A", SETS.values(), ids=SETS.keys())
def test_the_bracket_is_in_order_and_controls_outside_of_A_are_refused(A, samples, rng):
    """Random constant controls in A have 0 <= lower <= upper. A little outside of A they are refused by layer and node."""
    Y = label_space("annulus", "CG1")
    points = np.column_stack(A.sample(5))
    net = ResidualNetwork(given_basis(Y, [1.0]), layers=2)
    problem = learning_problem(net, head=True, weight=None, samples=samples)
    for _ in range(3):
        for l, (a, b) in enumerate(points[rng.integers(len(points), size=2)]):
            net.bias.set(l, a + 0 * Y.weights)
            net.kernel.set(l, [[b]])
        found = pmp_residual(problem, A)
        assert 0 <= found.lower <= found.upper and found.density.min() >= 0
    x = Y.coordinates
    net.bias.set(1, np.where(x[:, 0] == max(Y.comm.allgather(x[:, 0].max())), 3.0, points[0, 0]))
    with pytest.raises(
        ValueError,
        match=r"^A: expected a set with .*; layer 1 has \(a\(y\), b\(y, z\)\) = \(3, .*at y = \(1, .*train within it",
    ):
        pmp_residual(problem, A)
    net.bias.set(1, points[0, 0] + 0 * Y.weights)
    net.kernel.set(1, [[A.kernel_range[1] * 1.01 + 0.01]])
    with pytest.raises(ValueError, match="^A: expected a set with the controls of all layers in it; layer 1 has"):
        pmp_residual(problem, A)


@on_ranks
@pytest.mark.parametrize("length", [1e-6, 1.0, 6371220.0])
def test_whether_controls_are_in_A_does_not_depend_on_units(length):
    """b falls like 1 / |Y|: an absolute tolerance would find round-off outside on one disk, and nothing on another."""
    mesh = fd.UnitDiskMesh(1)
    mesh.coordinates.dat.data[...] *= length
    Y = LabelSpace(fd.FunctionSpace(mesh, "DG", 0))
    b, one = 1 / length**2, np.ones((Y.nodes, 1))
    A = Box((-1, 1), (-b, b))
    for scale, outside in ((1 + 1e-13, False), (1 + 1e-6, True)):
        assert (violation(Y, A, Controls(one[:, 0], scale * b * one, one)) is not None) == outside
        assert (violation(Y, A, Controls(scale * one[:, 0], b * one, one)) is not None) == outside


@on_ranks
def test_states_of_a_run_are_gone_through_once():
    """`hamiltonian_along` asks for each state once: what it costs grows like the number of layers, not like its square."""
    steps = []
    for layers in (10, 20, 40):
        net = network("disk", "DG0", times=np.linspace(0, 1, layers + 1), layers_per_block=layers)
        J, run = learning_problem(net, head=False, weight=None, samples=1).record()
        J.derivative()
        segment, count = run._pieces[0].segment, 0
        advance = segment.advance

        def counted(f, traces):
            nonlocal count
            count += len(traces)
            return advance(f, traces)

        segment.advance = counted
        values = hamiltonian_along(run, Hamiltonian(net.Y, net.activation, "maximise"))
        steps.append(count)
        ends = [
            Pair(np.array(net.Y.values(run.state(l))), -net.Y.values(run.costate(l)), "maximise") for l in (layers - 1, layers)
        ]
        H = Hamiltonian(net.Y, net.activation, "maximise")
        assert_allclose(values[-1], [H(p, Controls.of_layer(net, layers - 1)) for p in ends], rtol=0, atol=ROUND_OFF)
    assert steps == [10, 20, 40]


@on_ranks
def test_the_violation_is_drawn_over_y_and_t():
    problem = bounded(2)
    figure = matplotlib.figure.Figure()
    found = pmp_residual(problem, BOX)
    pictures = found.plot(figure.subplots(1, 2))
    assert len(pictures) == (2 if problem.net.Y.comm.rank == 0 else 0)
    for l, picture in enumerate(pictures):
        assert picture.get_array().size > 0
    assert found.density.shape == (problem.net.Y.nodes, 2) and found.density.min() >= -ROUND_OFF
