"""The network converges to (2.8): in t at the order of the Runge-Kutta method, in h at that of the label measure."""

from functools import cache

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from fem_resnet import Basis, ResidualNetwork
from helpers import label_space, laplace, set_smooth, smooth

# -- order in t ------------------------------------------------------------------------------------------------------

#: (method, its order, steps a layer): where the leading term of the error rules, well above round-off (1e-13).
METHODS = [
    ("1fe", 1, 64),
    ("2a", 2, 64),
    ("2b", 2, 64),
    ("3", 3, 64),
    ("3bs", 3, 64),
    ("4", 4, 32),
    ("5f", 5, 64),
    ("5dp", 5, 64),
    ("5bs", 5, 32),
    ("6vr", 6, 16),
    ("7vr", 7, 16),
    ("8vr", 8, 8),
]
TIMES = [0.0, 2.4, 6.0]


def _network(**options):
    net = ResidualNetwork(laplace("disk", "CG1", 6), times=TIMES, activation="tanh", **options)
    set_smooth(net, np.random.default_rng(0))
    return net


@cache
def _exact():
    """f(T) of the network in space, whole f, by SciPy near round-off."""
    net = _network()
    phi, f = net.kernel.space_basis.kernel.phi, smooth(net.Y)
    for layer in range(net.layers):
        a, B = net.bias.get(layer)[:, None], phi.values @ net.kernel.get(layer) @ phi.weighted.T
        solution = solve_ivp(
            lambda t, y: np.tanh(a - B @ y.reshape(f.shape)).ravel(), TIMES[layer : layer + 2], f.ravel(),
            method="DOP853", rtol=3e-14, atol=1e-15,
        )  # fmt: skip
        f = solution.y[:, -1].reshape(f.shape)
    return f


@pytest.mark.parametrize("method, order, steps", METHODS, ids=[method for method, _, _ in METHODS])
def test_order_in_time(method, order, steps):
    errors = []
    for n in (steps, 2 * steps):
        net = _network(steps=n, solver_parameters={"ts_rk_type": method})
        errors.append(np.linalg.norm(net.Y.values(net(net.Y.batch(smooth(net.Y)))) - _exact()))
    observed = np.log2(errors[0] / errors[1])
    assert errors[1] > 3e-13, f"{method}: {errors} are round-off, which has no order"
    assert abs(observed - order) < 0.2, f"{method}: errors {errors} fall at order {observed:.2f}, {order} is wanted"


# -- order in h ------------------------------------------------------------------------------------------------------
# Kernels b = beta phi(y) psi(z) of rank one, for which (2.8) has a solution in closed form.

BETA, T = 0.7, 1.0


class _Round:
    """Disk (of dimension 2) and sphere: psi = phi = 1 + x, f_I = a = x + y^2, from the moments of the unit ball."""

    def __init__(self, measure, second_moment):
        self.psi_integral = measure  # int psi
        self.kappa = measure + second_moment  # int psi phi
        self.psi_a = self.psi_f = 2 * second_moment  # int psi a, int psi f_I

    def psi(self, X):
        return 1 + X[:, 0]

    def f(self, X):
        return X[:, 0] + X[:, 1] ** 2

    phi, a = psi, f


class _Square:
    """Unit square: psi = phi = e^x, f_I = cos y, a = sin y."""

    psi_integral = np.e - 1
    kappa = (np.e**2 - 1) / 2
    psi_f = (np.e - 1) * np.sin(1)
    psi_a = (np.e - 1) * (1 - np.cos(1))

    def psi(self, X):
        return np.exp(X[:, 0])

    phi = psi

    def f(self, X):
        return np.cos(X[:, 1])

    def a(self, X):
        return np.sin(X[:, 1])


def _linear(problem, Y):
    """sigma = identity: g = int psi f obeys g_t = A - beta kappa g, and f = f_I + a t - beta phi int g dt."""
    X, rate = Y.coordinates, BETA * problem.kappa
    limit = problem.psi_a / rate
    integral = limit * T + (problem.psi_f - limit) * (1 - np.exp(-rate * T)) / rate
    exact = problem.f(X) + problem.a(X) * T - BETA * problem.phi(X) * integral
    return "identity", problem.phi(X), problem.a(X), exact


def _nonlinear(problem, Y):
    """sigma = tanh, phi = 1, a = 0: g_t = -m tanh(beta g), m = int psi, so that sinh(beta g) decays at rate m beta."""
    X, m = Y.coordinates, problem.psi_integral
    g = np.arcsinh(np.sinh(BETA * problem.psi_f) * np.exp(-m * BETA * T)) / BETA
    return "tanh", np.ones(Y.nodes), np.zeros(Y.nodes), problem.f(X) + (g - problem.psi_f) / m


@pytest.mark.parametrize("solution", [_linear, _nonlinear], ids=["linear", "tanh"])
@pytest.mark.parametrize(
    "domain, element, problem, refinements, order",
    [
        ("disk", "CG1", _Round(np.pi, np.pi / 4), [2, 3, 4], 2),
        ("disk", "DG0", _Round(np.pi, np.pi / 4), [2, 3, 4], 2),
        ("sphere", "CG1", _Round(4 * np.pi, 4 * np.pi / 3), [1, 2, 3], 2),
        # Gauss-Lobatto of k + 1 points integrates to order 2k.
        ("square", "CG3", _Square(), [1, 2], 6),
    ],
    ids=["disk-CG1", "disk-DG0", "sphere-CG1", "square-CG3"],
)
def test_order_in_space_at_the_nodes(domain, element, problem, refinements, order, solution):
    errors = []
    for refinement in refinements:
        Y = label_space(domain, element, refinement)
        activation, phi, a, exact = solution(problem, Y)
        phi, psi = (Basis(Y, values[:, None], "given") for values in (phi, problem.psi(Y.coordinates)))
        net = ResidualNetwork(
            phi, psi, times=[0.0, T], activation=activation, steps=8, solver_parameters={"ts_rk_type": "8vr"}
        )
        net.kernel.set(0, [[BETA]])
        net.bias.set(0, a)
        difference = Y.values(net(Y.batch(problem.f(Y.coordinates))))[:, 0] - exact
        errors.append(float(Y.sum(Y.weights @ difference**2)) ** 0.5)
    # Every refinement halves the mesh size.
    observed = np.log2(np.divide(errors[:-1], errors[1:]))
    assert observed[-1] > order - 0.15, f"errors {errors} fall at orders {observed}, {order} is wanted"
