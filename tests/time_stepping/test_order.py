"""The network converges to (2.8): in t at the order of the Runge-Kutta method, in h at that of the label measure."""

from functools import cache

import numpy as np
import pytest
from helpers import BLOCK, POLYGON, UNIT_SQUARE, flat_network, label_space, laplace, set_smooth, smooth
from scipy.integrate import solve_ivp

from fem_resnet import Basis, Kernel, Layers, ResidualNetwork

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
    net = flat_network(laplace("disk", "CG1", 6), times=TIMES, activation="tanh", **options)
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
    """The network against a solution of (2.8) by SciPy's integrator."""
    errors = []
    for n in (steps, 2 * steps):
        net = _network(steps=n, solver_parameters={"ts_rk_type": method})
        errors.append(np.linalg.norm(net.Y.values(net(net.Y.batch(smooth(net.Y)))) - _exact()))
    observed = np.log2(errors[0] / errors[1])
    assert errors[1] > 3e-13, f"{method}: {errors} are round-off, which has no order"
    assert abs(observed - order) < 0.2, f"{method}: errors {errors} fall at order {observed:.2f}, expected {order}"


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


class _Exponential:
    """A polygon, or a cylinder over it of this height: psi = phi = e^(x + z/2), f_I = cos y, a = sin y."""

    def __init__(self, ground, height=None):
        # What an integral over z of e^z and of e^(z/2) contributes.
        whole, half = (1.0, 1.0) if height is None else (np.expm1(height), 2 * np.expm1(height / 2))
        self.psi_integral = half * ground.integral(lambda x, y: np.exp(x))
        self.kappa = whole * ground.integral(lambda x, y: np.exp(2 * x) / 2)
        self.psi_f = half * ground.integral(lambda x, y: np.exp(x) * np.cos(y))
        self.psi_a = half * ground.integral(lambda x, y: np.exp(x) * np.sin(y))

    def psi(self, X):
        return np.exp(X[:, 0] + (X[:, 2] / 2 if X.shape[1] == 3 else 0))

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


#: (domain, element, problem, refinements, order): every refinement halves the mesh size.
IN_SPACE = [
    ("disk", "CG1", _Round(np.pi, np.pi / 4), [2, 3, 4], 2),
    ("disk", "DG0", _Round(np.pi, np.pi / 4), [2, 3, 4], 2),
    ("sphere", "CG1", _Round(4 * np.pi, 4 * np.pi / 3), [1, 2, 3], 2),
    # Gauss-Lobatto of k + 1 points integrates to order 2k, KMV of degree 3 on triangles to order 6.
    ("square", "CG3", _Exponential(UNIT_SQUARE), [1, 2], 6),
    ("hexes", "CG2", _Exponential(UNIT_SQUARE, 1), [1, 2], 4),
    ("polygon", "KMV3", _Exponential(POLYGON), [1, 2], 6),
    ("polygon", "CG1", _Exponential(POLYGON), [1, 2, 3], 2),
    ("prisms on the polygon", "CG1", _Exponential(POLYGON, 1), [1, 2], 2),
    ("block", "CG1", _Exponential(BLOCK, 0.5), [1, 2, 3], 2),
    ("cube", "CG1", _Exponential(UNIT_SQUARE, 1), [1, 2, 4], 2),
]


@pytest.mark.parametrize("solution", [_linear, _nonlinear], ids=["linear", "tanh"])
@pytest.mark.parametrize(
    "domain, element, problem, refinements, order", IN_SPACE, ids=[f"{case[0]}-{case[1]}" for case in IN_SPACE]
)
def test_order_in_space_at_the_nodes(domain, element, problem, refinements, order, solution):
    errors = []
    for refinement in refinements:
        Y = label_space(domain, element, refinement)
        activation, phi, a, exact = solution(problem, Y)
        phi, psi = (Basis(Y, values[:, None], "given") for values in (phi, problem.psi(Y.coordinates)))
        net = ResidualNetwork(
            Kernel(phi, psi), layers=Layers([0.0, T], steps=32), activation=activation, solver_parameters={"ts_rk_type": "8vr"}
        )
        net.kernel.set(0, [[BETA]])
        net.bias.set(0, a)
        difference = Y.values(net(Y.batch(problem.f(Y.coordinates))))[:, 0] - exact
        errors.append(float(Y.sum(Y.weights @ difference**2)) ** 0.5)
    observed = np.log2(np.divide(errors[:-1], errors[1:]))
    assert observed[-1] > order - 0.15, f"errors {errors} fall at orders {observed}, expected {order}"
