"""Slips in sections 2 and 3 of the paper: what holds passes here, what is printed fails (docs/reference/slips.md).

The domains are a sphere with |Y| = 12 or so and a disk, one of radius 0.4 with |Y| = 1/2: none has the measure 1.
"""

from dataclasses import replace
from functools import cache

import firedrake as fd
import numpy as np
import pytest
from helpers import flat_network, label_space, laplace, smooth
from numpy.testing import assert_allclose
from problems import polynomials
from scipy.linalg import expm, sqrtm

from fem_resnet import (
    ACTIVATIONS,
    Basis,
    DepthInterpolant,
    LabelSpace,
    Layers,
    LowRankKernel,
    ResidualNetwork,
    cell_indicators,
    depth_limit,
)

on_ranks = pytest.mark.parallel([1, 2])

EULER = {"ts_type": "rk", "ts_rk_type": "1fe"}
#: Sums of some hundred numbers of size one.
ROUND_OFF = 1e-12


def autonomous(kernel, beta, bias, **options) -> ResidualNetwork:
    """A network with this kernel and bias at all times; `bias` is a number or values at the nodes."""
    net = flat_network(kernel.phi, kernel.psi, kernel_in_time="shared", bias_in_time="shared", **options)
    net.kernel.set(0, beta)
    net.bias.set(0, np.zeros(net.Y.nodes) + bias)
    return net


def states(net, initial) -> list:
    """f at the layer times, shape (nodes,)."""
    Y = net.Y
    run = net.run(Y.batch(np.zeros(Y.nodes) + initial))
    return [Y.values(run.state(l))[:, 0] for l in range(net.layers + 1)]


def preactivation(net, f):
    """u = a - B f."""
    return net.bias.get(0) - apply(net.kernel.space_basis.kernel, net.kernel.get(0), f)


def apply(kernel, beta, f):
    """B f for one f, shape (nodes,)."""
    return kernel.apply(beta, f[:, None])[:, 0]


def transpose(kernel, beta, r):
    """B^T r for one r."""
    return kernel.transpose(beta, r[:, None])[:, 0]


def integral(Y, values) -> float:
    """int values dy."""
    return float(Y.sum(Y.weights @ values))


def norm(Y, f) -> float:
    """Norm of L2(Y)."""
    return integral(Y, f**2) ** 0.5


def runge_kutta(rate, x, length, steps):
    """x after classical Runge-Kutta steps of x_t = rate(x): for equations that are no network's."""
    tau = length / steps
    for _ in range(steps):
        k = rate(x)
        l = rate(x + tau / 2 * k)
        m = rate(x + tau / 2 * l)
        x = x + tau / 6 * (k + 2 * l + 2 * m + rate(x + tau * m))
    return x


@cache
def constants(Y) -> Basis:
    """The constant function 1."""
    return Basis(Y, np.ones((Y.nodes, 1)), "given")


# -- section 2 -------------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_growth_is_bounded_in_the_size_of_s(name):
    """(A1) of 2.1 prints C1 + C2 s, which is negative for s < -C1 / C2 whatever the constants."""
    sigma = ACTIVATIONS[name]
    s = np.linspace(-50, 50, 1001)
    bound = abs(float(sigma(0.0))) + sigma.properties.lipschitz * np.abs(s)
    assert np.all(np.abs(sigma(s)) <= bound * (1 + ROUND_OFF))
    for C1, C2 in [(1, 1), (100, 0.01), (1e-3, 10)]:
        s = -2 * C1 / C2
        assert abs(float(sigma(s))) > C1 + C2 * s


@on_ranks
def test_a_network_of_L_layers_takes_L_steps_and_moves_in_the_first():
    """(2.1) runs over l = 0 .. L - 1, and (2.2b) over [0, tau): at t = tau, (2.2a) has the first step."""
    Y = label_space("disk", "DG0")
    basis, L, tau = cell_indicators(Y), 5, 0.2
    net = ResidualNetwork(basis, layers=L, final_time=L * tau, solver_parameters=EULER)
    beta = 0.4 * np.cos(np.arange(Y.size)[:, None] + 2.0 * np.arange(Y.size))
    for l in range(L):
        net.kernel.set(l, (1 + l) * beta)
        net.bias.set(l, smooth(Y, 1, seed=l)[:, 0])
    kernel = net.kernel.space_basis.kernel
    z = [smooth(Y, 1)[:, 0]]
    for l in range(L + 1):  # as printed: one step too many
        m = min(l, L - 1)
        z.append(z[-1] + tau * np.tanh(net.bias.get(m) - apply(kernel, net.kernel.get(m), z[-1])))
    f = states(net, z[0])
    assert_allclose(f, z[: L + 1], atol=ROUND_OFF)
    assert norm(Y, f[-1] - z[-1]) > 0.1
    assert norm(Y, f[1] - z[0]) > 0.1  # z^tau(tau) is z_1, not z_0


@on_ranks
def test_z_tau_jumps_at_the_layer_times_and_converges_uniformly_all_the_same():
    """Theorem 2.1 has z^tau in C([0, T]), to which Arzela and Ascoli apply. It jumps at all layer times, by O(tau)."""
    Y, jumps = label_space("annulus", "CG1"), []
    phi = laplace("annulus", "CG1", 5)
    net = flat_network(
        phi,
        bias=phi,
        kernel_in_time="linear",
        bias_in_time="linear",
        layers=2,
        final_time=0.8,
        steps=2,
        solver_parameters=EULER,
    )
    for t in range(3):
        net.kernel.set(t, np.cos(np.arange(5)[:, None] + 2.0 * np.arange(5) + t))
        net.bias.set(t, np.sin(1.0 + np.arange(5) + t))
    initial = Y.batch(smooth(Y, 1))
    for steps in (2, 4, 8):
        z = DepthInterpolant(net.replace(layers=replace(net.settings.layers, steps=steps)), initial)
        from_left, values = ([Y.values(f)[:, 0] for _, f in z.at_fraction(theta)] for theta in (1.0, 0.0))
        assert_allclose(from_left[0], values[0])  # z_0 on [0, tau), and z_1 at tau
        jumps.append([norm(Y, before - after) for before, after in zip(from_left, values[1:], strict=True)])
    distances = depth_limit(net, initial, halvings=2, between=1).errors
    assert min(map(min, jumps)) > 0.01
    largest = [max(each) for each in jumps]
    assert abs(largest[1] / largest[2] - 2) < 0.2, f"jumps {largest}"
    assert abs(distances[1] / distances[2] - 2) < 0.3, f"distances {distances}"


def recursion(sigma, a, B, z, tau, L) -> float:
    """(2.1) for one neuron."""
    for _ in range(L):
        z = z + tau * sigma(a - B * z)
    return z


@on_ranks
def test_the_limit_of_depth_needs_a_continuous_activation():
    """Theorem 2.1 asks for (A1) of 2.1 alone: a step satisfies it, and z^tau tends to 1 where the limit stays at 0."""

    def step(s):
        return 1.0 if s > 0 else 0.0

    for L in (10, 100, 1000):
        a = 1 / L  # tends to a = 0, with which z_t = step(0) = 0
        assert abs(recursion(step, a, 0.0, 0.0, 1 / L, L) - 1) < ROUND_OFF
        assert abs(recursion(np.tanh, a, 0.0, 0.0, 1 / L, L)) <= 1 / L
    assert recursion(step, 0.0, 0.0, 0.0, 0.001, 1000) == 0


@on_ranks
def test_the_limit_of_depth_needs_a_unique_solution():
    """Theorem 2.1: z_t = 2 sqrt|z| from 0 has the solutions 0 and t^2; coefficients with one limit lead to both."""

    def root(s):
        return 2 * abs(s) ** 0.5

    assert recursion(root, 0.0, -1.0, 0.0, 1e-4, 10_000) == 0
    errors = [abs(recursion(root, 1 / L**2, -1.0, 0.0, 1 / L, L) - 1) for L in (100, 1000, 10_000)]
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.01


# -- 3.1 -------------------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("domain", ["disk", "sphere"])
def test_the_operator_norm_is_the_norm_of_the_kernel_at_rank_one_only(domain, rng):
    """The proof of Theorem 3.1 says `equals`; the norm of b in L2(Y x Y) is that of Hilbert and Schmidt, a bound."""
    for basis in (laplace(domain, "CG1", 4), polynomials(label_space(domain, "CG1"))):
        kernel = LowRankKernel(basis, basis)

        def operator_norm(beta):
            # B^T B has the eigenvalues of this small matrix.
            return np.linalg.eigvals(beta.T @ kernel.functional(beta)).real.max() ** 0.5

        one = np.outer(rng.normal(size=basis.rank), rng.normal(size=basis.rank))
        many = rng.normal(size=kernel.shape)
        for beta in (one, many):
            f = basis.values @ rng.normal(size=(basis.rank, 20))
            stretched = kernel.apply(beta, f)
            for s in range(20):
                assert norm(basis.Y, stretched[:, s]) <= operator_norm(beta) * norm(basis.Y, f[:, s]) * (1 + ROUND_OFF)
        assert_allclose(operator_norm(one), kernel.norm(one), rtol=1e-10)
        assert operator_norm(many) < 0.99 * kernel.norm(many)


@on_ranks
def test_two_solutions_part_as_fast_as_the_integral_of_the_norm_of_b_says():
    """(3.1): b is in L1(0, T) alone, and b ~ t^(-1/2) parts solutions by e^(2 sqrt t), which no e^(Lt) bounds."""
    Y = label_space("disk", "CG1")
    kernel = LowRankKernel(constants(Y), constants(Y))
    times = np.concatenate([[0], np.geomspace(1e-8, 1, 17)])
    net = ResidualNetwork(kernel.phi, layers=Layers(times, steps=4), activation="identity")
    for l in range(net.layers):
        mean = 2 * (times[l + 1] ** 0.5 - times[l] ** 0.5) / (times[l + 1] - times[l])
        net.kernel.set(l, np.array([[-mean / Y.measure]]))
        assert_allclose(kernel.norm(net.kernel.get(l)), mean)
    one, two = states(net, 0.0), states(net, 1.0)
    apart = np.array([norm(Y, g - f) for f, g in zip(one, two)]) / norm(Y, two[0])
    # What rk4 loses in steps with a growth of up to e^0.3.
    assert_allclose(apart, np.exp(2 * times**0.5), rtol=1e-3)
    for L in (1, 10, 100):
        assert np.any(apart > np.exp(L * times) * 1.0001)


@on_ranks
def test_the_drift_of_sigma_of_zero_is_in_the_norm_of_a_constant():
    """The proof of Theorem 3.1 prints C_0 = |sigma(0)| |Y|; where |Y| < 1 that is no bound."""
    small = fd.UnitDiskMesh(2)
    small.coordinates.dat.data_wo[...] = 0.4 * small.coordinates.dat.data_ro
    Y = LabelSpace(fd.FunctionSpace(small, "DG", 0))
    assert 0.49 < Y.measure < 0.51
    kernel = LowRankKernel(constants(Y), constants(Y))
    net = autonomous(kernel, np.zeros((1, 1)), 0.0, layers=2, final_time=3.0, activation="sigmoid")
    f = states(net, 0.0)
    assert_allclose(norm(Y, f[-1] - f[0]), 3.0 * 0.5 * Y.measure**0.5)
    assert norm(Y, f[-1] - f[0]) > 1.4 * 3.0 * 0.5 * Y.measure


# -- 3.2, 3.3 --------------------------------------------------------------------------------------------------------


@on_ranks
def test_the_energy_of_f_has_no_lower_bound_unless_a_is_in_the_range_of_the_root_of_B():
    """3.2 says bounded from below, and then assumes a in R(B^(1/2)): the assumption comes first."""
    phi = laplace("sphere", "CG1", 4)
    kernel, beta = LowRankKernel(phi, phi), np.diag([2.0, 1.0, 0.5, 0.0])

    def energies(coefficients):
        net = autonomous(kernel, beta, phi.values @ coefficients, layers=40, final_time=40.0)
        return [
            integral(phi.Y, f * apply(kernel, beta, f)) / 2 - integral(phi.Y, net.bias.get(0) * f) for f in states(net, 0.0)
        ]

    inside, outside = energies(np.array([0.3, 0.2, 0.1, 0.0])), energies(np.array([0.3, 0.2, 0.1, 0.2]))
    assert np.all(np.diff(inside) < ROUND_OFF) and np.all(np.diff(outside) < 0)
    assert abs(inside[-1] - inside[20]) < 1e-3
    # -(a, f) falls by int a sigma(a) a unit of time for ever.
    assert outside[-1] - outside[20] < 0.9 * (outside[20] - outside[0]) < -0.1


@on_ranks
def test_the_assumptions_on_sigma_of_3_2_leave_out_sigmoid_and_relu():
    """(A1) of 3.2 asks for sigma(0) = 0, s sigma(s) >= 0 and sigma'(0) > 0."""
    sigmoid, relu = ACTIVATIONS["sigmoid"], ACTIVATIONS["relu"]
    assert float(sigmoid(0.0)) == 0.5 and -1.0 * float(sigmoid(-1.0)) < 0
    assert float(relu(-1e-300)) / -1e-300 == 0 and float(relu(1e-300)) / 1e-300 == 1  # no sigma'(0)
    for name in ("tanh", "arctan", "leaky_relu", "elu"):
        sigma, s = ACTIVATIONS[name], np.linspace(-3, 3, 61)
        assert float(sigma(0.0)) == 0 and np.all(s * sigma(s) >= 0) and float(sigma.derivative(0.0)) > 0


@on_ranks
def test_singular_vectors_of_a_symmetric_operator_agree_only_without_negative_eigenvalues():
    """3.3: phi_l = psi_l and T = id for B >= 0; a negative eigenvalue changes a sign in T."""
    phi = laplace("disk", "CG1", 4)

    def singular_vectors(eigenvalues):
        rotation, _ = np.linalg.qr(np.cos(np.arange(16.0)).reshape(4, 4))
        beta = rotation @ np.diag(eigenvalues) @ rotation.T  # phi is orthonormal
        assert_allclose(beta, beta.T)
        left, mu, right = np.linalg.svd(beta)
        return np.diag(mu), phi.values @ left, phi.values @ right.T

    for eigenvalues, diagonal in [((4, 3, 2, 1), [1, 1, 1, 1]), ((4, -3, 2, -1), [1, -1, 1, -1])]:
        D, left, right = singular_vectors(np.array(eigenvalues, dtype=float))
        T = phi.Y.sum((left * phi.Y.weights[:, None]).T @ right)
        assert_allclose(T, np.diag(diagonal), atol=1e-10)
        assert (np.linalg.eigvalsh(D @ T).min() > 0) == (min(eigenvalues) > 0)


@on_ranks
def test_completed_singular_vectors_are_not_both_orthonormal_where_B_has_a_null_space():
    """3.3: with B = U |B| and N(U) = N(B), phi_l = U psi_l is 0 for each psi_l of N(B), so not a unit vector."""
    beta = np.diag([2.0, 1.0, 0.0])[:, [1, 0, 2]]
    _, mu, right = np.linalg.svd(beta)
    psi = right.T
    U = beta @ np.linalg.pinv(psi @ np.diag(mu) @ psi.T)
    lengths = np.linalg.norm(U @ psi, axis=0)
    assert_allclose(lengths, [1, 1, 0], atol=1e-10)


def three_point_four(T, mu):
    """Kernel with D = diag(mu), orthonormal phi and psi on the sphere, and (phi_k, psi_l) = T_kl."""
    four = laplace("sphere", "CG1", 4)
    phi = Basis(four.Y, four.values[:, :2], "given")
    psi = Basis(four.Y, four.values[:, :2] @ T + four.values[:, 2:] @ sqrtm(np.eye(2) - T.T @ T).real, "given")
    assert_allclose(psi.gram, np.eye(2), atol=1e-10)
    return LowRankKernel(phi, psi), np.diag(mu)


@on_ranks
def test_the_lyapunov_function_rises_though_D_T_is_positive_definite():
    """Theorem 3.4: u = 0 is stable, (3.5a) having the matrix D T^T; but int Sigma(u) may rise where D T > 0."""
    T, mu = np.array([[0.4, 0.0], [0.8, 0.4]]), np.array([1.0, 0.2])
    D = np.diag(mu)
    assert np.linalg.eigvalsh(D @ T + (D @ T).T).min() > 0  # what is asked for
    assert np.linalg.eigvalsh(D @ T.T + (D @ T.T).T).min() < 0  # what would make L fall
    assert_allclose(np.linalg.eigvals(D @ T.T), np.linalg.eigvals((D @ T).T), rtol=1e-10)
    kernel, beta = three_point_four(T, mu)
    u_I = kernel.phi.values @ np.array([0.0, 1e-2])
    net = autonomous(kernel, beta, u_I, layers=80, final_time=80.0)
    u = [preactivation(net, f) for f in states(net, 0.0)]
    L = np.array([integral(net.Y, net.activation.primitive(part)) for part in u])
    assert_allclose(L[0], 5.0e-5, rtol=1e-3)
    assert L.max() > 1.1e-4, f"L rises from {L[0]:.2g} to {L.max():.2g}"
    assert L[-1] < 1e-3 * L[0] and L[-1] < L[-2]
    # The coefficients of u follow (3.5a), which is linear here up to u^3.
    exact = expm(-80 / 80 * 3 * D @ T.T) @ [0.0, 1e-2]
    assert_allclose(kernel.phi.project(u[3][:, None])[:, 0], exact, rtol=1e-2)


@on_ranks
def test_the_lyapunov_function_falls_where_the_symmetric_part_of_B_is_positive():
    """3.2 and Theorem 3.4: what holds in place of D T > 0."""
    kernel, beta = three_point_four(np.array([[0.8, -0.3], [0.3, 0.8]]), np.array([1.0, 1.0]))
    net = autonomous(kernel, beta, kernel.phi.values @ np.array([0.3, 1.0]), layers=20, final_time=10.0)
    L = [integral(net.Y, net.activation.primitive(preactivation(net, f))) for f in states(net, 0.0)]
    assert np.all(np.diff(L) < 0)


@on_ranks
def test_the_exponential_rate_is_that_of_the_smallest_singular_value():
    """After Theorem 3.4: no rate is left as mu_l -> 0, so the result does not carry over to infinite rank."""
    phi = laplace("sphere", "CG1", 4)
    kernel, mu = LowRankKernel(phi, phi), 4.0 ** -np.arange(4)
    rates = []
    for l in range(4):
        net = autonomous(kernel, np.diag(mu), 1e-3 * phi.values[:, l], layers=10, final_time=10.0)
        size = [norm(net.Y, preactivation(net, f)) for f in states(net, 0.0)]
        rates.append(np.log(size[0] / size[-1]) / 10.0)
    assert_allclose(rates, mu, rtol=0.02)  # rk4 with mu tau = 1


# -- 3.4, 3.5 --------------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("domain", ["disk", "sphere"])
def test_the_gronwall_factor_of_relu_has_the_measure_of_Y(domain):
    """3.4 prints exp |b|_L1(0,t; Linf); the exponent is |Y| times that, and a kernel of rank one reaches it."""
    Y = label_space(domain, "CG1")
    kernel = LowRankKernel(constants(Y), constants(Y))
    net = autonomous(kernel, np.array([[-0.3]]), 0.0, layers=64, activation="relu")
    f = states(net, 1.0)
    grown = integral(Y, np.abs(f[-1])) / integral(Y, np.abs(f[0]))
    assert_allclose(grown, np.exp(Y.measure * 0.3), rtol=1e-6)  # rk4 in 64 steps
    assert grown > 1.5 * np.exp(0.3)


@on_ranks
def test_the_weighted_identity_has_the_time_derivative_of_u():
    """3.5 prints sigma''(u) u(t); it is sigma''(u) u_t, as below it."""
    Y = label_space("disk", "CG1")
    kernel, sigma = LowRankKernel(polynomials(Y), laplace("disk", "CG1", 4)), ACTIVATIONS["tanh"]
    beta = 0.4 * np.cos(np.arange(12.0)).reshape(3, 4)
    a, f, w = smooth(Y, 3).T

    def rate(x):
        f, w = x
        u = a - apply(kernel, beta, f)
        return np.array([sigma(u), -sigma.derivative(u) * apply(kernel, beta, w)])

    def energy(x):
        return integral(Y, x[1] ** 2 / sigma.derivative(a - apply(kernel, beta, x[0]))) / 2

    h = 1e-3  # central differences are good to h^2
    before, after = (energy(runge_kutta(rate, np.array([f, w]), step, 1)) for step in (-h, h))
    slope = (after - before) / (2 * h)
    u = a - apply(kernel, beta, f)
    u_t = -apply(kernel, beta, sigma(u))
    weight = sigma.second_derivative(u) / sigma.derivative(u) ** 2 * w**2

    def right_hand_side(factor):
        return -integral(Y, apply(kernel, beta, w) * w) - integral(Y, weight * factor) / 2

    assert abs(slope - right_hand_side(u_t)) < 1e-4 * abs(slope)
    assert abs(slope - right_hand_side(u)) > 0.1 * abs(slope)


@on_ranks
@pytest.mark.parametrize(
    "printed",
    [lambda sigma, u, w: sigma(u), lambda sigma, u, w: sigma.derivative(w)],
    ids=["sigma(u) b", "sigma'(w) B"],
)
def test_the_linearisation_frozen_in_time_has_the_slope_at_u(printed):
    """3.5: (3.6) frozen at t_0 is w_t = -sigma'(u(t_0)) B w, so good to O(h^2) after h; as printed, to O(h)."""
    Y = label_space("disk", "CG1")
    kernel, sigma = LowRankKernel(polynomials(Y), laplace("disk", "CG1", 4)), ACTIVATIONS["tanh"]
    beta = 0.4 * np.cos(np.arange(12.0)).reshape(3, 4)
    a, f, w = smooth(Y, 3).T
    u = a - apply(kernel, beta, f)
    slopes = {"holds": sigma.derivative(u), "printed": printed(sigma, u, w)}
    errors = {name: [] for name in slopes}
    for h in (0.1, 0.05, 0.025):
        net, e = autonomous(kernel, beta, a, layers=1, final_time=h), 1e-4
        change = (states(net, f + e * w)[-1] - states(net, f - e * w)[-1]) / (2 * e)  # good to e^2
        for name, slope in slopes.items():
            frozen = runge_kutta(lambda x: -slope * apply(kernel, beta, x), w, h, 4)
            errors[name].append(norm(Y, change - frozen))
    orders = {name: np.log2(np.array(found[:-1]) / found[1:]) for name, found in errors.items()}
    assert np.all(orders["holds"] > 1.8), orders
    assert np.all(orders["printed"] < 1.2), orders


@on_ranks
def test_the_network_with_a_transpose_in_front_contracts_for_a_non_decreasing_activation():
    """3.5 prints sigma' <= 0: d/dt |f_1 - f_2|^2 / 2 = -(sigma(u_1) - sigma(u_2), u_1 - u_2) has the opposite sign."""
    Y = label_space("sphere", "CG1")
    kernel = LowRankKernel(polynomials(Y), laplace("sphere", "CG1", 4))
    beta = 0.3 * np.cos(np.arange(12.0)).reshape(3, 4)
    a, one, two = smooth(Y, 3).T
    for sign in (1, -1):

        def rate(f):
            return transpose(kernel, beta, sign * np.tanh(a - apply(kernel, beta, f)))

        distances = [norm(Y, runge_kutta(rate, one, t, 20) - runge_kutta(rate, two, t, 20)) for t in (0.1, 0.3, 0.6)]
        change = np.diff([norm(Y, one - two), *distances])
        assert np.all(change < 0) if sign == 1 else np.all(change > 0)
