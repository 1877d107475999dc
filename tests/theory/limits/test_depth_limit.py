"""Theorem 2.1: residual networks (2.1) tend to (2.3) in depth, and where the theorem does not apply."""

import numpy as np
import pytest
from exact_limits import T, distance, orders, runge_kutta, slope
from helpers import label_space

from fem_resnet import DepthInterpolant, from_network, state_array

#: On two ranks, which own different nodes.
on_ranks = pytest.mark.parallel([1, 2])

THIRD = 1 / 3
#: c(t), and where it jumps or has a kink. For L = 8, 32, 128 a jump has the same distance from a layer time, in layers.
IN_TIME = {
    "smooth": (lambda t: np.cos(5 * t), []),
    "piecewise linear": (lambda t: np.abs(t - THIRD) * 4 - 1, [THIRD]),
    "of bounded variation": (lambda t: np.where(t < THIRD, 1.0, -0.7), [THIRD]),
}
DEPTHS = [8, 32, 128]


class InDepth:
    """A network (2.1) of the cells of a disk with `a(t) = a_0 + a_1 c(t)`, `B(t) = (1 + c(t) / 2) B_0`."""

    def __init__(self, c, sigma=np.tanh, sigma_name="tanh"):
        self.c, self.sigma, self.sigma_name = c, sigma, sigma_name
        self.Y = label_space("disk", "DG0", 1)
        N, rng = self.Y.size, np.random.default_rng(1)
        self.a_0, self.a_1, self.z_0 = 0.3 * rng.normal(size=N), rng.normal(size=N), rng.normal(size=N)
        self.B_0 = 1.5 * rng.normal(size=(N, N)) / N**0.5

    def a(self, t):
        return self.a_0 + self.a_1 * self.c(t)

    def B(self, t):
        return (1 + self.c(t) / 2) * self.B_0

    def rate(self, t, z):
        return self.sigma(self.a(t) - self.B(t) @ z)

    def network(self, times, c=None, **options):
        """With the coefficients' values at the starts of the layers, from the right."""
        values = (c or self.c)(times[:-1] + 1e-13)
        a = self.a_0 + self.a_1 * values[:, None]
        B = (1 + values[:, None, None] / 2) * self.B_0
        return from_network(a, B, self.z_0, self.Y, tau=np.diff(times), activation=self.sigma_name, **options)

    def exact(self, times, jumps, steps=200):
        """z at these times, from Runge-Kutta steps that end at the jumps."""
        return runge_kutta(self.rate, self.z_0, times, jumps, steps)

    def error(self, times, jumps, **options):
        """The largest distance in L2(Y) at eighths of T."""
        net, initial = self.network(times, **options)
        run = net.run(initial)
        exact = self.exact(np.linspace(0, T, 9), jumps)
        at = [int(np.argmin(np.abs(times - t))) for t in np.linspace(0, T, 9)]
        assert np.abs(times[at] - np.linspace(0, T, 9)).max() < 1e-12
        return max(distance(self.Y, state_array(self.Y, run.state(l))[:, 0], z) for l, z in zip(at, exact))


@pytest.mark.parametrize("kind", IN_TIME)
def test_depth_converges_at_order_one(kind):
    """Theorem 2.1, with its order: (2.1) tends to (2.3), also over jumps and kinks of the coefficients."""
    c, jumps = IN_TIME[kind]
    problem = InDepth(c)
    errors = [problem.error(np.linspace(0, T, L + 1), jumps) for L in DEPTHS]
    found = orders(T / np.array(DEPTHS), errors)
    assert abs(found[-1] - 1) < 0.08, f"errors {errors} fall at {found}"


def test_runge_kutta_falls_to_order_one_at_a_jump_unless_an_interface_sits_there():
    """Coefficients constant but for one jump: of fourth order where a layer ends at it, of first where it does not."""
    c, jumps = IN_TIME["of bounded variation"]
    problem, rk4 = InDepth(c), {"solver_parameters": {"ts_rk_type": "4"}}
    across = [problem.error(np.linspace(0, T, L + 1), jumps, **rk4) for L in DEPTHS]
    found = orders(T / np.array(DEPTHS), across)
    assert abs(found[-1] - 1) < 0.05, f"errors {across} fall at {found}"

    # Layer times at eighths and at 1/3, so that the same times are compared.
    at = np.unique(np.append(np.linspace(0, T, 9), THIRD))
    counts = [1, 2, 4]
    along = [problem.error(at, jumps, steps=n, **rk4) for n in counts]
    found = orders(1 / np.array(counts), along)
    assert abs(found[-1] - 4) < 0.25, f"errors {along} fall at {found}"
    assert along[0] < 1e-3 * across[-1]


#: Fractions of a step: its ends, from both sides, and three times inside.
FRACTIONS = [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("kind", IN_TIME)
def test_z_tau_converges_uniformly_in_t_at_order_one(kind):
    """Theorem 2.1 with z^tau of (2.2a), (2.2b) at all times, also where the interpolants of the coefficients cross a jump."""
    c, jumps = IN_TIME[kind]
    problem, errors = InDepth(c), []
    for L in DEPTHS:
        z = DepthInterpolant(*problem.network(np.linspace(0, T, L + 1)))
        worst = 0.0
        for theta in FRACTIONS:
            times, states = zip(*z.at_fraction(theta))
            exact = problem.exact(np.append(0.0, times), jumps)[1:]
            worst = max(worst, *(distance(problem.Y, state_array(problem.Y, f)[:, 0], x) for f, x in zip(states, exact)))
        errors.append(worst)
    found = orders(T / np.array(DEPTHS), errors)
    assert abs(found[-1] - 1) < 0.1, f"errors {errors} fall at {found}"


def test_coefficients_of_unbounded_variation_converge_more_slowly():
    """sign sin(2 pi / t^2) is continuous almost everywhere, so Theorem 2.1 holds; its order is below one.

    As far down as t = tau^(1/3) jumps are further apart than tau: there are tau^(-2/3) of them, each an error tau of a
    random sign, and as many values below are of a random sign: tau^(2/3) both.
    """

    def c(t):
        return np.sign(np.sin(2 * np.pi / np.maximum(t, 1e-300) ** 2))

    problem = InDepth(c)
    # It jumps at sqrt(2 / k). Before t = 0.02 its mean 0 takes its place, with an error of half a period, below 1e-5.
    k = np.arange(2, 5001)
    jumps = np.sqrt(2 / k)[::-1]
    rate = problem.rate
    problem.rate = lambda t, z: (
        (problem.sigma(problem.a_0 + problem.a_1 - 1.5 * problem.B_0 @ z)
         + problem.sigma(problem.a_0 - problem.a_1 - 0.5 * problem.B_0 @ z)) / 2 if t < jumps[0] else rate(t, z)
    )  # fmt: skip
    exact = problem.exact(np.array([0.0, T]), jumps, steps=200)[-1]
    depths, errors = [16, 64, 256], []
    for L in depths:
        # The jumps near 0 make errors scatter with the depth: take the mean square over some primes, which hit no jump.
        squares = []
        for M in primes(L)[:4]:
            net, initial = problem.network(np.linspace(0, T, M + 1))
            squares.append(distance(problem.Y, state_array(problem.Y, net(initial))[:, 0], exact) ** 2)
        errors.append(np.mean(squares) ** 0.5)
    found = slope(T / np.array(depths), errors)
    smooth = InDepth(IN_TIME["smooth"][0])
    alike = [smooth.error(np.linspace(0, T, L + 1), []) for L in depths]
    assert 0 < found < 0.85 < slope(T / np.array(depths), alike), f"errors {errors} fall at {found}"
    assert errors[-1] < 0.7 * errors[0]

    # With sigma(s) = s, B = 0 and a = c, (2.1) is a sum, which can be computed for depths that show the order.
    k = np.arange(2, 1000001)
    integral = np.sum((-1.0) ** k * (np.sqrt(2 / k) - np.sqrt(2 / (k + 1))))
    depths = 4 ** np.arange(2, 9)
    errors = [np.mean([(np.mean(c(np.arange(M) / M + 1e-13)) - integral) ** 2 for M in primes(L)[:6]]) ** 0.5 for L in depths]
    assert abs(slope(1 / depths, errors) - 2 / 3) < 0.15, f"errors {errors}"


def primes(least):
    """The first primes from `least` on."""
    return [n for n in range(least, least + 150) if all(n % d for d in range(2, int(n**0.5) + 1))]


def alternating(L, sign=lambda l, L: (-1.0) ** l, a_0=0.0, interpolant=False):
    """z_L for a_l = sign(l, L) a, or z^tau, and the problem."""
    problem = InDepth(lambda t: 0 * t)
    problem.a_0 = a_0 * np.ones(problem.Y.size)
    times = np.linspace(0, T, L + 1)
    l = np.arange(L)
    net, initial = from_network(
        problem.a_0 + sign(l, L)[:, None] * problem.a_1, problem.B_0, problem.z_0, problem.Y, tau=np.diff(times)
    )
    z = DepthInterpolant(net, initial) if interpolant else state_array(problem.Y, net(initial))[:, 0]
    return z, problem


def test_alternating_coefficients_tend_to_the_averaged_ode_not_to_that_of_the_weak_limit():
    """a_l = (-1)^l a has no pointwise limit, as Theorem 2.1 asks for; its weak limit is 0.

    The states tend to those of z' = (sigma(a - B z) + sigma(-a - B z)) / 2, not of z' = sigma(-B z).
    """
    averaged, weak, depths = [], [], [16, 64, 256]
    for L in depths:
        z, problem = alternating(L)
        a, B, ends = problem.a_1, problem.B_0, np.array([0.0, T])
        mean = runge_kutta(lambda t, z: (np.tanh(a - B @ z) + np.tanh(-a - B @ z)) / 2, problem.z_0, ends)[-1]
        of_weak = runge_kutta(lambda t, z: np.tanh(-B @ z), problem.z_0, ends)[-1]
        averaged.append(distance(problem.Y, z, mean))
        weak.append(distance(problem.Y, z, of_weak))
    assert abs(orders(1 / np.array(depths), averaged)[-1] - 1) < 0.1, f"errors {averaged}"
    assert min(weak) > 0.2 and weak[-1] > 20 * averaged[-1]


@on_ranks
def test_alternating_coefficients_have_another_limit_between_the_layer_times_so_that_z_tau_has_none():
    """(2.2) where a_l = (-1)^l a: in the middle of a layer a^tau is 0, and z^tau tends to the limit with a = 0.

    At the layer times it tends to the averaged ODE. Uniform convergence in t, as of Theorem 2.1, is more than that at the
    layer times.
    """
    at_ends, in_middles, apart, depths = [], [], [], [16, 64, 256]
    for L in depths:
        z, problem = alternating(L, interpolant=True)
        a, B, ends = problem.a_1, problem.B_0, np.array([0.0, T])
        mean = runge_kutta(lambda t, z: (np.tanh(a - B @ z) + np.tanh(-a - B @ z)) / 2, problem.z_0, ends)[-1]
        of_weak = runge_kutta(lambda t, z: np.tanh(-B @ z), problem.z_0, ends)[-1]
        at_T, near_T = (state_array(problem.Y, z(t))[:, 0] for t in (T, T - T / L / 2))
        at_ends.append(distance(problem.Y, at_T, mean))
        in_middles.append(distance(problem.Y, near_T, of_weak))
        apart.append(distance(problem.Y, at_T, near_T))
    for errors in (at_ends, in_middles):
        assert abs(orders(1 / np.array(depths), errors)[-1] - 1) < 0.1, f"errors {errors}"
    assert min(apart) > 0.2 and apart[-1] > 20 * max(at_ends[-1], in_middles[-1])


@on_ranks
def test_a_sign_by_the_parity_of_the_depth_leaves_no_limit():
    """a_l = (-1)^L a: even depths tend to one solution, odd ones to another."""
    limits = {}
    for even, depths in ((True, [64, 128]), (False, [65, 129])):
        z = [alternating(L, lambda l, L: (-1.0) ** L + 0.0 * l)[0] for L in depths]
        problem = alternating(1)[1]
        limits[even] = z[1]
        assert distance(problem.Y, z[0], z[1]) < 0.02
    assert distance(problem.Y, limits[True], limits[False]) > 0.5


@on_ranks
def test_coefficients_without_a_bound_have_another_limit_than_their_pointwise_one():
    """(A2) of 2.1: a_l = L in one layer tends to 0 almost everywhere, but moves z by tau relu(L) = 1.

    Where sigma is bounded, which (A1) of 2.1 does not ask for, it would do no harm.
    """
    Y = label_space("disk", "DG0", 1)
    z_0 = np.random.default_rng(0).normal(size=Y.size)
    for activation, moved in (("relu", 1.0), ("tanh", 0.0)):
        for L in (64, 256):
            a = np.zeros((L, Y.size))
            a[L // 2] = L
            net, initial = from_network(a, np.zeros((Y.size, Y.size)), z_0, Y, tau=1 / L, activation=activation)
            np.testing.assert_allclose(state_array(Y, net(initial))[:, 0] - z_0, moved, atol=1.01 / L)
