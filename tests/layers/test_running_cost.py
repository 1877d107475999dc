"""Running costs of section 4.3: values, derivatives of both orders, co-states, and all that takes a learning problem."""

import numpy as np
import pytest
import sympy
from firedrake import COMM_SELF
from helpers import flat_network, label_space, laplace, set_smooth, smooth
from numpy.testing import assert_allclose
from problems import directions, gathered, gradients, learning_problem, network
from pyadjoint import taylor_to_dict

from fem_resnet import (
    Batch,
    Box,
    Hamiltonian,
    LearningProblem,
    LocalFeedback,
    NormBounded,
    ResidualNetwork,
    RunningCost,
    costate_check,
    hamiltonian_along,
    hessian_spectrum,
    least_squares,
    msa,
    pmp_residual,
    solve_costate,
    solve_trajectory,
    train,
    train_pam,
)  # fmt: skip

on_ranks = pytest.mark.parallel([1, 2, 3])
f, a = sympy.symbols("f a")
#: Every derivative of up to second order is there, and none is constant.
COST = RunningCost(sympy.cos(f) * a + f**2 / 2 + a**4 / 4, kernel=0.7)
ROUND_OFF = 1e-12


def problem(domain="annulus", element="CG2", *, cost=COST, learn="parameters", weight=0.05, **options):
    """A field by least squares, two samples that do not count the same, Tikhonov's term and a running cost."""
    of = learning_problem(network(domain, element, **options), head=False, samples=2, weight=weight)
    batch = Batch(of.batch.inputs, of.batch.targets, [1, 2])
    return LearningProblem(of.net, None, least_squares, of.regulariser, batch, learn=learn, running=cost)


def _small(functions):
    """Directions of size a tenth: the last remainders are small enough for their order to show, and above round-off."""
    return [function.copy(deepcopy=True).assign(0.1 * function) for function in functions]


KINDS = {
    "rk": ("annulus", {}),
    "rk, a Block a layer, hats in time": ("sphere", {"layers_per_block": 1, "bias_in_time": "linear", "bias": "basis"}),
    "Crank-Nicolson": ("sphere", {"solver_parameters": {"ts_type": "cn"}}),
    "implicit midpoint": ("disk", {"solver_parameters": {"ts_type": "theta"}, "steps": 2}),
    "dirk": ("disk", {"solver_parameters": {"ts_type": "dirk"}}),
    "adapted steps": ("annulus", {"solver_parameters": {"ts_rk_type": "3bs", "ts_adapt_type": "basic"}}),
    "learned factors and times": ("disk", {"learn_factors": True, "learn_times": True}),
}


@on_ranks
@pytest.mark.parametrize("kind", KINDS)
def test_taylor(kind):
    """R1 of the gradient and R2 of the Hessian, in all controls at once; the Hessian is symmetric."""
    domain, options = KINDS[kind]
    of = problem(domain, {"annulus": "CG2", "sphere": "CG1", "disk": "DG0"}[domain], **options)
    J = of.reduced_functional()
    J.derivative()
    h, other = (directions(J, of.net, of.parameters, seed) for seed in (0, 1))
    rates = taylor_to_dict(J, of.functions, _small(h))
    assert rates["R1"]["Rate"][-1] > 1.95 and rates["R2"]["Rate"][-1] > 2.95, rates
    J(of.functions)
    J.derivative()
    products = [sum(v._ad_dot(d) for d, v in zip(J.hessian(left), right)) for left, right in ((h, other), (other, h))]
    assert_allclose(*products, rtol=1e-10)


@on_ranks
def test_the_cost_is_the_integral_that_the_scheme_takes():
    """By hand: Heun's rule for f and its own weights, 1/2 and 1/2, for the integral."""
    of = problem("disk", "DG0", solver_parameters={"ts_type": "rk", "ts_rk_type": "2a"})
    net, Y = of.net, of.net.Y
    omega, state, total = np.array([1, 2]) / 3, np.array(Y.values(of.batch.inputs)), 0.0
    kernel = net.kernel.space_basis.kernel
    for l, tau in enumerate(np.diff(net.times)):
        bias, beta = net.bias.get(l), net.kernel.get(l)

        def rate(state):
            return net.activation(bias[:, None] - kernel.apply(beta, state))

        def L(state):
            density = np.cos(state) * bias[:, None] + state**2 / 2 + bias[:, None] ** 4 / 4
            return Y.sum(Y.weights @ density) + 0.35 * kernel.norm(beta) ** 2

        first = rate(state)
        total += tau / 2 * omega @ (L(state) + L(state + tau * first))
        state = state + tau / 2 * (first + rate(state + tau * first))
    assert_allclose(float(of.evaluate()[1].cost), total, rtol=ROUND_OFF)


@on_ranks
def test_costs_of_controls_alone_are_tikhonovs():
    """L = |a|^2 / 2 + |b|^2 / 2 with controls constant in each layer: the regulariser, and its gradient."""
    net = network("annulus", "CG2")
    plain = learning_problem(net, head=False, weight=1.0)
    J = LearningProblem(net, None, least_squares, None, plain.batch, running=RunningCost(a**2 / 2, 1.0)).reduced_functional()
    regularised = plain.reduced_functional()
    assert_allclose(float(J.functional), float(regularised.functional), rtol=ROUND_OFF)
    for mine, theirs in zip(gradients(plain, J.derivative()), gradients(plain, regularised.derivative())):
        assert_allclose(mine, theirs, rtol=0, atol=1e-11)


@on_ranks
@pytest.mark.parametrize("method, order", [("2a", 2), ("4", 4)])
def test_costate_and_gradient_are_those_of_4_2(method, order):
    """r_t = B^T(sigma' r) - L_f, (4.3), (4.4): to the scheme's order, and to round-off by its partner."""
    of = problem("sphere", "CG1", solver_parameters={"ts_rk_type": method}, steps=2, size=0.4)
    check = costate_check(of, refinements=(1, 2, 4))
    # On the way to its limit the observed order is off by a few tenths.
    assert abs(check.costate_orders[-1] - order) < 0.3 and abs(check.gradient_orders[-1] - order) < 0.3
    assert len(check.partner_costate) == 3 and max(check.partner_costate + check.partner_gradient) < ROUND_OFF


@on_ranks
def test_r_0_is_the_gradient_in_the_initial_state():
    of = problem("annulus", "CG2", learn="both", weight=None, layers_per_block=1)
    J, run = of.record()
    gradient = J.derivative(apply_riesz=True)[-1]
    assert_allclose(of.net.Y.values(gradient), of.net.Y.values(run.costate(0)), rtol=0, atol=ROUND_OFF)


@pytest.mark.parallel([2, 3])
def test_any_number_of_ranks_gives_the_same():
    answers = []
    for alone in (False, True):
        of = problem("annulus", "CG2", alone=alone, solver_parameters={"ts_type": "cn"})
        J = of.reduced_functional()
        answers.append([float(J.functional), *gradients(of, J.derivative())])
        assert (of.net.Y.comm.size == 1) == alone or COMM_SELF.size == 1
    for one, other in zip(*answers):
        assert_allclose(one, other, rtol=0, atol=1e-11)  # the eigenfunctions themselves differ by round-off


@on_ranks
def test_checkpoints_exchanged_data_and_unrecorded_runs():
    """Under a schedule the same J and gradient; new data with other weights without a new recording."""
    of = problem("disk", "DG0", layers_per_block=1)
    J = of.reduced_functional()
    expected = [float(J.functional), *gradients(of, J.derivative())]
    assert_allclose(float(of.evaluate()[0]), expected[0], rtol=ROUND_OFF)
    scheduled = LearningProblem(
        of.net, None, least_squares, of.regulariser, of.batch, running=COST, checkpoints=1
    ).reduced_functional()
    found = [float(scheduled.functional), *gradients(of, scheduled.derivative())]
    for one, other in zip(expected, found):
        assert_allclose(one, other, rtol=0, atol=1e-13)
    net, other = of.net, learning_problem(of.net, head=False, samples=2, seed=3).batch
    new = Batch(other.inputs, other.targets, [5, 1])
    J = of.reduced_functional()
    of.exchange(new)
    again = LearningProblem(net, None, least_squares, of.regulariser, new, running=COST)
    assert_allclose(J(of.functions), float(again.evaluate()[0]), rtol=ROUND_OFF)


class Target:
    """1/2 |f - target|^2, by a callback that knows the nodes; second derivatives only where asked."""

    def __init__(self, target, second):
        self._target = target[:, None]
        if second:
            self.hessian = lambda f, a: (np.ones_like(f), 0.0, 0.0)

    def value(self, f, a):
        return (f - self._target) ** 2 / 2

    def gradient(self, f, a):
        return f - self._target, 0.0


@on_ranks
def test_a_callback_may_know_a_target_at_the_nodes():
    Y = label_space("disk", "CG1")
    made = [problem("disk", "CG1", cost=RunningCost(Target(smooth(Y, 1)[:, 0], second))) for second in (True, False)]
    J, plain = (of.reduced_functional() for of in made)
    J.derivative()
    h = directions(J, made[0].net, made[0].parameters)
    rates = taylor_to_dict(J, made[0].functions, _small(h))
    assert rates["R1"]["Rate"][-1] > 1.95 and rates["R2"]["Rate"][-1] > 2.95
    plain.derivative()
    with pytest.raises(NotImplementedError, match="^density: expected an object with the method hessian"):
        plain.hessian(directions(plain, made[1].net, made[1].parameters))


# -- costs of b at pairs of nodes ------------------------------------------------------------------------------------

b = sympy.Symbol("b")
#: No norm of b, and no derivative of it is constant.
PAIRS = RunningCost(f**2 / 2, kernel=0.3, pairs=sympy.sqrt(b**2 + 0.01) + sympy.sin(3 * b))


class Distances:
    """p(y, z, b) = abs(y - z)^2 b^4 / 4: connections cost more the farther they reach."""

    def value(self, b, y, z):
        return np.sum((y - z) ** 2, axis=-1) * b**4 / 4

    def gradient(self, b, y, z):
        return np.sum((y - z) ** 2, axis=-1) * b**3

    def hessian(self, b, y, z):
        return np.sum((y - z) ** 2, axis=-1) * 3 * b**2


PAIR_KINDS = {
    "rk": ("annulus", "DG0", PAIRS, {}),
    "linear in time, a Block a layer": ("sphere", "CG1", PAIRS, {"layers_per_block": 1, "kernel_in_time": "linear"}),
    "Crank-Nicolson": ("disk", "CG1", PAIRS, {"solver_parameters": {"ts_type": "cn"}}),
    "learned times, gradient flow": ("disk", "DG0", PAIRS, {"learn_times": True, "gradient_flow": True}),
    "a set of kernels": ("disk", "CG1", PAIRS, {"kernel_set": NormBounded(4.0)}),
    "of y and z, adapted steps": (
        "annulus", "CG1", RunningCost(0, pairs=Distances()),
        {"solver_parameters": {"ts_rk_type": "3bs", "ts_adapt_type": "basic"}},
    ),
}  # fmt: skip


@on_ranks
@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_taylor_of_costs_at_pairs(kind):
    domain, element, cost, options = PAIR_KINDS[kind]
    if kind == "a set of kernels":
        Y = label_space(domain, element)
        net = flat_network(laplace(domain, element, 4), times=(0.0, 0.5, 1.3), **options)
        set_smooth(net, np.random.default_rng(0))
        batch = Batch(Y.batch(smooth(Y, 2)), Y.batch(smooth(Y, 2, seed=50)), [1, 2])
        of = LearningProblem(net, None, least_squares, None, batch, running=cost)
    else:
        of = problem(domain, element, cost=cost, **options)
    J = of.reduced_functional()
    J.derivative()
    h = directions(J, of.net, of.parameters)
    rates = taylor_to_dict(J, of.functions, _small(h))
    assert rates["R1"]["Rate"][-1] > 1.95 and rates["R2"]["Rate"][-1] > 2.95, rates


@on_ranks
def test_half_the_square_of_b_at_pairs_is_half_the_square_of_its_norm():
    """On a sphere: J, gradient and Hessian are those with kappa, which takes Gram matrices."""
    found = []
    for cost in (RunningCost(f * a, kernel=0.7), RunningCost(f * a, pairs=0.35 * b**2)):
        of = problem("sphere", "CG1", cost=cost)
        J = of.reduced_functional()
        gradient = gradients(of, J.derivative())
        found.append((float(J.functional), gradient, gradients(of, J.hessian(directions(J, of.net, of.parameters, 1)))))
    assert_allclose(found[0][0], found[1][0], rtol=ROUND_OFF)
    for part in 1, 2:
        for norm, pairs in zip(found[0][part], found[1][part]):
            assert_allclose(pairs, norm, rtol=0, atol=1e-11 * np.abs(norm).max())


@on_ranks
def test_costs_at_pairs_are_integrals_over_Y_x_Y():
    """By dense sums over all nodes; the cost does not depend on f, so the scheme's integral over t is exact."""
    of = problem("annulus", "DG0", cost=RunningCost(0, pairs=Distances()))
    net, total = of.net, 0.0
    x, w = gathered(net.Y, net.Y.coordinates), gathered(net.Y, net.Y.weights)
    phi, psi = (gathered(net.Y, basis.values) for basis in (net.bases["phi"][0], net.bases["psi"][0]))
    for l, tau in enumerate(np.diff(net.times)):
        p = np.sum((x[:, None] - x[None]) ** 2, axis=-1) * (phi @ net.kernel.get(l) @ psi.T) ** 4 / 4
        total += tau * w @ p @ w
    assert total > 0.01
    assert_allclose(float(of.evaluate()[1].cost), total, rtol=ROUND_OFF)


@on_ranks
def test_training_lowers_a_cost_at_pairs():
    of = problem("disk", "DG0", cost=RunningCost(0, pairs=sympy.sqrt(b**2 + 1e-4)), bias="basis", size=0.3)
    before = of.evaluate()[1].cost
    train(of, {"tao_max_it": 4})
    assert float(of.evaluate()[1].cost) < 0.9 * float(before)


def test_what_is_refused_of_costs_at_pairs(monkeypatch):
    with pytest.raises(ValueError, match="^pairs: expected an expression in the symbol b alone, got f too"):
        RunningCost(f, pairs=f * b)
    with pytest.raises(TypeError, match="^pairs: expected a SymPy expression in b, or an object"):
        RunningCost(f, pairs="b**2")
    with pytest.raises(ValueError, match="^learned factors: it does not take a running cost of b at pairs of nodes"):
        problem("disk", "CG1", cost=PAIRS, learn_factors=True).evaluate()
    of = problem("disk", "CG1", cost=PAIRS, weight=None)
    with pytest.raises(ValueError, match="^Hamiltonian: it does not take a running cost of b at pairs of nodes"):
        Hamiltonian(of.net.Y, of.net.activation, "minimise", PAIRS)
    with pytest.raises(ValueError, match="^costate_check: it does not take a running cost of b at pairs of nodes"):
        costate_check(of)
    trajectory = solve_trajectory(of.net, of.batch.inputs)
    with pytest.raises(ValueError, match="^solve_costate: it does not take a running cost of b at pairs of nodes"):
        solve_costate(trajectory, trajectory.final, running=PAIRS)
    monkeypatch.setattr("fem_resnet.layers.pair_cost.LARGEST", of.net.Y.size - 1)
    with pytest.raises(ValueError, match=f"^pairs: expected a label domain of at most {of.net.Y.size - 1} nodes"):
        problem("disk", "CG1", cost=RunningCost(0, pairs=b**4)).evaluate()


# -- what takes a learning problem -----------------------------------------------------------------------------------


@pytest.mark.parallel([1, 2])
def test_training_and_the_spectrum_at_the_optimum():
    """Newton's method ends at round-off: J with its running cost has an exact gradient and Hessian."""
    of = problem("disk", "DG0", bias="basis", size=0.3)
    result = train(of, solver_parameters={"tao_type": "nls", "tao_gatol": 1e-10, "tao_grtol": 0.0, "tao_gttol": 0.0})
    assert result.gradient_norm < 1e-10
    with pytest.raises(ValueError, match="^Gauss-Newton: it does not take a running cost"):
        hessian_spectrum(of, 2, gauss_newton=True)
    assert hessian_spectrum(of, 2).values.shape == (2,)


@on_ranks
def test_the_hamiltonian_with_its_running_cost_is_constant():
    """Controls constant in time: H drifts by the scheme's order, and not if L is left out of it."""
    drifts = []
    for steps in (8, 16):
        of = problem("disk", "CG1", bias_in_time="shared", kernel_in_time="shared", steps=steps)
        J, run = LearningProblem(of.net, None, least_squares, None, of.batch, running=COST).record()
        J.derivative()
        H = Hamiltonian.of(of, "minimise")
        drifts.append(np.ptp(hamiltonian_along(run, H)))
    assert abs(np.log2(drifts[0] / drifts[1]) - 4) < 0.3
    without = hamiltonian_along(run, Hamiltonian(of.net.Y, of.net.activation, "minimise"))
    assert np.ptp(without) > 1e3 * drifts[1]


@on_ranks
def test_msa_lowers_a_cost_of_the_states_and_comes_to_the_maximum_principle():
    Y = label_space("annulus", "DG0")
    net = ResidualNetwork(laplace("annulus", "DG0", 5), layers=4)
    batch = Batch(Y.batch(smooth(Y, 1)), Y.batch(3 * smooth(Y, 1, seed=50)))
    of = LearningProblem(net, None, least_squares, None, batch, running=RunningCost(f**2 / 5))
    A = Box((-1, 1), (-1, 1))
    result = msa(of, A, iterations=12)
    assert (result.changes < 0).all() and result.values[-1] < 0.7 * result.values[0]
    assert pmp_residual(result.problem, A).absolute[1] < 0.3 * pmp_residual(of, A).absolute[1]
    with pytest.raises(ValueError, match="^running: expected a density"):
        msa(LearningProblem(net, None, least_squares, None, batch, running=RunningCost(f * a)), A)


def test_what_is_refused():
    with pytest.raises(ValueError, match="^density: expected an expression in the symbols f and a alone, got t too"):
        RunningCost(f * sympy.Symbol("t"))
    with pytest.raises(TypeError, match="^density: expected a SymPy expression in f and a"):
        RunningCost("f**2")
    with pytest.raises(ValueError, match="^kernel: expected a"):
        RunningCost(f, kernel=-1.0)
    with pytest.raises(TypeError, match="^running: expected a RunningCost or None"):
        problem("disk", "CG1", cost=f**2)


def test_training_by_batches_keeps_the_running_cost():
    of = problem("disk", "DG0", bias="basis", size=0.3)
    result = train_pam(of, iterations=1, batches=[of.batch])
    assert_allclose(result.value, float(of.evaluate()[0]), rtol=1e-12)
    without = float(of.replace(running=None).evaluate()[0])
    assert abs(result.value - without) > 0.1


def test_the_local_feedback_has_the_running_cost():
    of = problem("disk", "DG0", bias="basis", size=0.3)
    assert_allclose(LocalFeedback(of, gradient_tolerance=1e9).value, float(of.evaluate()[0]), rtol=1e-12)
