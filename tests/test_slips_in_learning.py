"""Slips in sections 4 and 5 of the paper: what holds passes here, what is printed fails (docs/reference/slips.md)."""

from typing import NamedTuple

import numpy as np
import pytest
from helpers import flat_network, label_space, laplace, smooth
from numpy.testing import assert_allclose
from problems import polynomials
from test_slips import EULER, ROUND_OFF, apply, constants, integral, norm, transpose

from fem_resnet import (
    ACTIVATIONS,
    Batch,
    Head,
    LearningProblem,
    LowRankKernel,
    ResidualNetwork,
    least_squares,
    tikhonov,
    train,
)

on_ranks = pytest.mark.parallel([1, 2])


class Pair(NamedTuple):
    """A recorded network with one sample: states, co-states and gradients of J = |f(T) - target|^2 / 2."""

    net: ResidualNetwork
    problem: LearningProblem
    f: list
    r: list
    gradient: list

    @property
    def u(self):
        kernel = self.net.kernel.space_basis.kernel
        a, beta = (self._values(p) for p in (self.net.bias, self.net.kernel))
        return [a[l] - apply(kernel, beta[l], self.f[l]) for l in range(self.net.layers)]

    def _values(self, parameter):
        return [parameter.get(min(l, len(parameter.functions) - 1)) for l in range(self.net.layers)]


def pair(domain="sphere", target=None, size=1.0, **options) -> Pair:
    """phi is not orthonormal, and the layers are unequal; controls are random, far from optimal."""
    options = {"times": [0, 0.2, 0.5, 0.6, 1.1], "solver_parameters": EULER} | options
    Y = label_space(domain, "CG1")
    net = flat_network(polynomials(Y), laplace(domain, "CG1", 4), **options)
    rng = np.random.default_rng(5)
    for l in range(len(net.kernel.functions)):
        net.kernel.set(l, 0.3 * rng.normal(size=net.kernel.space_basis.shape))
    for l in range(len(net.bias.functions)):
        net.bias.set(l, size * smooth(Y, 1, seed=10 + l)[:, 0])
    batch = Batch(Y.batch(smooth(Y, 1)), Y.batch(smooth(Y, 1, seed=50) if target is None else target))
    problem = LearningProblem(net, None, least_squares, None, batch)
    J, run = problem.record()
    gradient = J.derivative(apply_riesz=True)
    f, r = ([Y.values(of(l))[:, 0] for l in range(net.layers + 1)] for of in (run.state, run.costate))
    return Pair(net, problem, f, r, list(gradient))


def hamiltonian(Y, u, r, sigma=np.tanh) -> float:
    """H = int sigma(a - B f) r dy."""
    return integral(Y, sigma(u) * r)


# -- 4.1 and 5.1 -----------------------------------------------------------------------------------------------------


@on_ranks
def test_the_gradient_has_the_slope_of_sigma():
    """5.1 prints D_a J = sigma(u) r and D_b J = -f sigma(u) r; (4.3), (4.4) have sigma'(u): exact for Euler."""
    of = pair()
    net, sigma, u = of.net, ACTIVATIONS["tanh"], of.u
    space, kernel = net.kernel.space_basis, net.kernel.space_basis.kernel
    for l in range(net.layers):

        def gradients(slope):
            D_a = slope * of.r[l + 1]
            d = kernel.phi.project(D_a[:, None]) @ kernel.psi.project(of.f[l][:, None]).T
            return D_a, -kernel.riesz(d)

        a, b = of.gradient[l].dat.data_ro, space.read(of.gradient[net.layers + l])
        D_a, D_b = gradients(sigma.derivative(u[l]))
        assert norm(net.Y, a - D_a) < ROUND_OFF and kernel.norm(b - D_b) < ROUND_OFF
        D_a, D_b = gradients(sigma(u[l]))
        assert norm(net.Y, a - D_a) > 0.5 * norm(net.Y, a) and kernel.norm(b - D_b) > 0.5 * kernel.norm(b)


@on_ranks
def test_the_backward_equation_has_r_inside():
    """Algorithm 2 prints r_t = B^T sigma'(u); (4.2a) has B^T(sigma'(u) r), and Euler's adjoint takes its steps."""
    of = pair()
    net = of.net
    for l in range(net.layers):
        tau, slope = net.times[l + 1] - net.times[l], ACTIVATIONS["tanh"].derivative(of.u[l])

        def before(inside):
            return of.r[l + 1] - tau * transpose(net.kernel.space_basis.kernel, net.kernel.get(l), inside)

        assert norm(net.Y, of.r[l] - before(slope * of.r[l + 1])) < ROUND_OFF
        assert norm(net.Y, of.r[l] - before(slope)) > 0.5 * norm(net.Y, of.r[l] - of.r[l + 1])


@on_ranks
def test_the_costate_that_minimises_J_is_minus_that_which_maximises_H():
    """Algorithm 2's r(T) = ftilde - f(T) is right for maximising H; `Run.costate` has the sign of (4.2b)."""
    of = pair()
    target = of.net.Y.values(of.problem.batch.targets)[:, 0]
    assert norm(of.net.Y, of.r[-1] - (of.f[-1] - target)) < ROUND_OFF
    # A small step up H, whose gradient in a is sigma'(u) r, with either co-state.
    J = float(of.problem.evaluate()[0])
    for sign, better in ((-1, True), (1, False)):
        changed = pair()
        for l in range(changed.net.layers):
            step = 0.01 * ACTIVATIONS["tanh"].derivative(of.u[l]) * sign * of.r[l + 1]
            changed.net.bias.set(l, changed.net.bias.get(l) + step)
        assert (float(changed.problem.evaluate()[0]) < J) == better


@on_ranks
def test_the_regulariser_has_a_factor_one_half():
    """(4.7) has lambda a, lambda b; with R of Remark 4.2, which has no 1/2, the gradient would be 2 lambda a."""
    of, weight = pair(), 0.7
    net = of.net
    with_penalty = LearningProblem(net, None, least_squares, tikhonov(weight), of.problem.batch)
    J, _ = with_penalty.record()
    penalty = [g.dat.data_ro - h.dat.data_ro for g, h in zip(J.derivative(apply_riesz=True), of.gradient)]
    for l in range(net.layers):
        assert norm(net.Y, penalty[l] - weight * net.bias.get(l)) < ROUND_OFF
        assert norm(net.Y, penalty[l] - 2 * weight * net.bias.get(l)) > 0.5 * weight * norm(net.Y, net.bias.get(l))
    # R of Remark 4.2: half of it is what is added to J.
    R = sum(
        tau * (norm(net.Y, net.bias.get(l)) ** 2 + net.kernel.space_basis.kernel.norm(net.kernel.get(l)) ** 2)
        for l, tau in enumerate(np.diff(net.times))
    )
    assert_allclose(float(with_penalty.evaluate()[0]) - float(of.problem.evaluate()[0]), weight * R / 2)


@on_ranks
def test_the_output_kernel_has_one_order_of_arguments():
    """4.2 and Remark 4.3 print W(z, y) in O and W(y, z) in r(T): with `O = int W(y, z) f dz` the latter is right."""
    basis = laplace("sphere", "CG1", 4)
    Y, head = basis.Y, Head(basis, basis, "logistic")
    head.W.set(0, np.cos(np.arange(16.0)).reshape(4, 4))
    kernel, f = head.W.space_basis.kernel, smooth(Y, 1)
    observed = 0.5 + 0.3 * smooth(Y, 1, seed=3)
    net = ResidualNetwork(basis, layers=1)
    problem = LearningProblem(net, head, least_squares, None, Batch(Y.batch(f), Y.batch(observed)))
    J, run = problem.record()
    J.derivative()
    r, h = Y.values(run.costate(1))[:, 0], ACTIVATIONS["sigmoid"]
    W = head.W.get(0)

    def terminal(output):
        O = output(kernel, W, Y.values(run.final)[:, 0])
        return transpose(kernel, W, (h(O) - observed[:, 0]) * h.derivative(O))

    assert norm(Y, r - terminal(apply)) < ROUND_OFF
    assert norm(Y, r - terminal(transpose)) > 0.1 * norm(Y, r)


def trained(Y, targets):
    """From one input onto all these targets at once; the result, and the co-states at T."""
    net = ResidualNetwork(laplace("disk", "CG1", 4), layers=2)
    batch = Batch(Y.batch(np.tile(smooth(Y, 1), targets.shape[1])), Y.batch(targets))
    problem = LearningProblem(net, None, least_squares, None, batch)
    result = train(problem, {"tao_gatol": 1e-9}, monitor=lambda progress: None)
    J, run = problem.record()
    J.derivative()
    return result, Y.values(run.costate(net.layers))


@on_ranks
def test_many_samples_share_one_control():
    """Remark 4.1 (stationary iff the target is reached) is about one sample: of two that disagree, each can be."""
    Y = label_space("disk", "CG1")
    targets = smooth(Y, 1) + 0.3 * np.array([1.0, -1.0])
    for s in range(2):
        result, r = trained(Y, targets[:, [s]])
        assert result.converged and result.value < 1e-12 and np.abs(r).max(initial=0.0) < 1e-5
    result, r = trained(Y, targets)
    assert result.converged and abs(result.value - Y.measure * 0.3**2 / 2) < 1e-10  # both at a distance of 0.3
    assert np.all(np.abs(r) > 0.1)  # each counts half


# -- 4.2 -------------------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("domain", ["disk", "sphere"])
def test_extremal_controls_are_determined_where_the_costate_is_not_zero(domain):
    """(4.10) prints the indicator of r* >= 0 on the left; it is that of r* != 0, as in the box case above it."""
    Y = label_space(domain, "CG1")
    reached = Y.coordinates[:, 0] > 0.3
    of = pair(domain)
    of = pair(domain, target=np.where(reached, of.f[-1], smooth(Y, 1, seed=50)[:, 0]))
    r = np.where(reached, 0.0, -of.r[-1])  # the sign of 4.2; f(T) is computed to round-off alone
    Bf = apply(of.net.kernel.space_basis.kernel, of.net.kernel.get(0), of.f[-1])
    low, high = -0.5, 2.0
    best = np.where(np.tanh(high - Bf) * r > np.tanh(low - Bf) * r, high, low)
    best[reached] = 0.3  # any value is optimal there
    right = high * (r > 0) + low * (r < 0)
    holds, printed = norm(Y, best * (r != 0) - right), norm(Y, best * (r >= 0) - right)
    assert holds == 0.0 and printed > 0.1


@on_ranks
def test_the_hamiltonian_is_constant_for_controls_constant_in_time_optimal_or_not():
    """4.2 says so of every optimal pair; it is true of any trajectory with autonomous controls, to the order of rk4."""
    rk4 = {"ts_type": "rk", "ts_rk_type": "4"}
    spread = {}
    for kind in ("shared", "layers"):
        of = pair(times=np.linspace(0, 1.3, 17), solver_parameters=rk4, bias_in_time=kind, kernel_in_time=kind, domain="disk")
        H = np.array([hamiltonian(of.net.Y, u, r) for u, r in zip(of.u, of.r)])
        spread[kind] = np.ptp(H) / np.abs(H).max()
    assert spread["shared"] < 1e-6 and spread["layers"] > 0.1


@on_ranks
def test_the_hamiltonian_changes_along_an_optimal_pair_where_the_control_set_does():
    """4.2: with b = 0 and |a| <= c(t), a* = c(t) comes nearest to a target out of reach; H = int sigma(c) r*."""
    Y = label_space("disk", "CG1")
    net = ResidualNetwork(constants(Y), layers=6)
    target, c = 10 + 0 * Y.weights, 0.2 + np.arange(6) / 6
    problem = LearningProblem(net, None, least_squares, None, Batch(Y.batch(0 * target), Y.batch(target)))

    def value(scale):
        for l in range(6):
            net.bias.set(l, scale[l] * c[l] + 0 * target)
        return float(problem.evaluate()[0])

    rng = np.random.default_rng(3)
    best = value(np.ones(6))
    assert all(value(rng.uniform(-1, 1, 6)) > best for _ in range(10))  # sigma' > 0: the more, the nearer
    value(np.ones(6))
    J, run = problem.record()
    J.derivative()
    H = [hamiltonian(Y, c[l] + 0 * target, -Y.values(run.costate(l))[:, 0]) for l in range(6)]
    assert np.all(np.diff(H) > 0.1 * H[0])


@on_ranks
def test_weak_limits_leave_the_controls_of_a_set_that_is_not_convex():
    """4.2: K_A is weakly closed for convex A only; T_f of (4.9) attains its extremes for A = {-1, 1} all the same."""
    Y = label_space("interval", "DG0", 16)
    x, f = Y.coordinates[:, 0], smooth(Y, 1)[:, 0]
    means = []
    for n in (8, 32, 128):
        b = 1.0 - 2 * (np.floor(n * x) % 2)
        assert np.all(np.abs(b) == 1) and abs(norm(Y, b) - Y.measure**0.5) < ROUND_OFF
        means.append(max(abs(integral(Y, b * g)) for g in (f, np.exp(x), 1 + 0 * x)))
    assert means[2] < means[1] / 2 < means[0] / 4  # weakly to 0, which is not in A
    largest = integral(Y, np.abs(f))  # of -int b f over the convex hull [-1, 1], and over A itself
    assert abs(-integral(Y, -np.sign(f) * f) - largest) < ROUND_OFF
    rng = np.random.default_rng(1)
    assert all(-integral(Y, rng.uniform(-1, 1, Y.nodes) * f) < largest for _ in range(20))


# -- 4.3 -------------------------------------------------------------------------------------------------------------


@on_ranks
def test_feedback_is_taken_at_the_running_state():
    """4.3, Step 2: the control frozen at v runs past a target within reach; at the running state it attains F(v, 0)."""
    Y = label_space("disk", "CG1")
    steps, T = 40, 1.5
    layer = ResidualNetwork(constants(Y), layers=1, final_time=T / steps)
    target, v = 0.0, 2.0 * Y.coordinates[:, 0]
    speed = np.tanh(1.0)
    # b = 0, |a| <= 1, no running cost: F(v, t) = 1/2 int (|v - target| - (T - t) tanh 1)_+^2, argmin a = -sign D_v F.
    F = integral(Y, np.maximum(np.abs(v - target) - T * speed, 0) ** 2) / 2

    def attained(control):
        f = v
        for _ in range(steps):
            layer.bias.set(0, control(f))
            f = Y.values(layer(Y.batch(f)))[:, 0]
        return integral(Y, (f - target) ** 2) / 2

    running, frozen = attained(lambda f: -np.sign(f - target)), attained(lambda f: -np.sign(v - target))
    chatter = Y.measure * (speed * T / steps) ** 2 / 2  # within one step of the target it goes back and forth
    assert 0.01 < F <= running * (1 + ROUND_OFF) and running < F + chatter
    assert frozen > F + 50 * chatter


@on_ranks
def test_the_gradient_of_the_value_functional_is_the_costate_of_section_4_1():
    """4.3 against 4.2: D_v F = r with r(T) = f - ftilde, minus r*; on nodes it is (dF/dv_i) / w_i, not dF/dv_i."""
    of = pair("disk")
    batch = of.problem.batch
    free = LearningProblem(of.net, None, least_squares, None, batch, learn="initial")
    J, run = free.record()
    (dual,), (gradient,) = J.derivative(apply_riesz=False), J.derivative(apply_riesz=True)
    r = of.net.Y.values(run.costate(0))
    assert_allclose(of.net.Y.values(gradient), r, atol=ROUND_OFF)
    assert_allclose(of.net.Y.values(dual) / of.net.Y.weights[:, None], r, atol=ROUND_OFF)
    d, e = smooth(of.net.Y, 1, seed=8), 1e-5
    values = of.net.Y.values(batch.inputs).copy()
    change = (float(J(of.net.Y.batch(values + e * d))) - float(J(of.net.Y.batch(values - e * d)))) / (2 * e)
    assert_allclose(change, integral(of.net.Y, (r * d)[:, 0]), rtol=1e-6)
    plain = float(of.net.Y.sum(np.sum(r * d)))  # where dF/dv_i is taken for the gradient, or r* for r
    assert abs(change - plain) > 0.5 * abs(change) and abs(change + integral(of.net.Y, (r * d)[:, 0])) > abs(change)


@on_ranks
@pytest.mark.parametrize("sign, holds", [(-1, True), (0, False), (1, False)])
def test_a_running_cost_enters_the_costate_with_a_minus(sign, holds):
    """4.3: r_t = B^T(sigma'(u) r) - L_f, in the sign of D_v F = r; on Euler's steps of L = f^2 / 2."""
    Y = label_space("sphere", "CG1")
    kernel, sigma = LowRankKernel(polynomials(Y), laplace("sphere", "CG1", 4)), ACTIVATIONS["tanh"]
    beta, tau = 0.3 * np.cos(np.arange(12.0)).reshape(3, 4), 0.1
    a, v, target, d = smooth(Y, 4).T

    def trajectory(f):
        f = [f]
        for _ in range(10):
            f.append(f[-1] + tau * sigma(a - apply(kernel, beta, f[-1])))
        return f

    def value(v):
        f = trajectory(v)
        return sum(tau * norm(Y, part) ** 2 / 2 for part in f[:-1]) + norm(Y, f[-1] - target) ** 2 / 2

    f = trajectory(v)
    r = f[-1] - target
    for part in f[-2::-1]:
        slope = sigma.derivative(a - apply(kernel, beta, part))
        r = r - tau * (transpose(kernel, beta, slope * r) + sign * part)
    e = 1e-5
    change = (value(v + e * d) - value(v - e * d)) / (2 * e)
    assert (abs(change - integral(Y, r * d)) < 1e-8 * abs(change)) == holds
