"""Limits of residual networks (2.1): in depth, Theorem 2.1, in width, Theorem 2.2, and where the theorems do not apply.

The exact solutions are those of Nystroem's method on the curved domain itself: Gauss quadrature in the polar
coordinates, in which smooth data have spectral accuracy, and Runge-Kutta steps between the jumps. Nothing of the
package is in them.
"""

import runpy
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import firedrake as fd
import numpy as np
import pytest
from firedrake.adjoint import Control
from helpers import flat_network, label_space, set_smooth, smooth
from helpers import network as own_network
from problems import taping
from pyadjoint import ReducedFunctional
from scipy.integrate import solve_ivp
from scipy.sparse.linalg import svds

from fem_resnet import (
    Basis,
    Bias,
    Kernel,
    KernelSampling,
    LabelSpace,
    Layers,
    ResidualNetwork,
    compress,
    depth_limit,
    from_network,
    laplace_basis,
    point_space,
    state_array,
    to_network,
    width_limit,
)

#: On two ranks, which own different nodes.
on_ranks = pytest.mark.parallel([1, 2])

RK8 = {"ts_rk_type": "8vr"}
EULER = {"ts_rk_type": "1fe"}


def orders(sizes, errors):
    """Slopes of the errors over the sizes, from one to the next."""
    return np.diff(np.log(errors)) / np.diff(np.log(sizes))


def slope(sizes, errors):
    """The slope of the line through all of them, for errors that scatter."""
    return np.polyfit(np.log(sizes), np.log(errors), 1)[0]


# -- Theorem 2.1: depth ----------------------------------------------------------------------------------------------

T = 1.0
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


def distance(Y, z, x):
    """The distance in L2(Y) of two arrays in the order of `node_numbers`."""
    return float(state_array(Y, Y.batch(Y.weights))[:, 0] @ (z - x) ** 2) ** 0.5


def runge_kutta(rate, z, times, jumps=(), steps=200):
    """z at these times by classical Runge-Kutta; a step ends at each jump of the rate and takes the value on its own side."""
    values = [z]
    for start, end in zip(times[:-1], times[1:]):
        knots = np.unique([start, *[t for t in jumps if start < t < end], end])
        for left, right in zip(knots[:-1], knots[1:]):
            n = max(1, int(np.ceil(steps * (right - left) / (times[-1] - times[0]))))
            h, inside = (right - left) / n, 1e-6 * (right - left)  # far enough for round-off in a jump
            for k in range(n):
                t = left + k * h
                k1 = rate(t + inside, z)
                k2 = rate(t + h / 2, z + h / 2 * k1)
                k3 = rate(t + h / 2, z + h / 2 * k2)
                z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(t + h - inside, z + h * k3))
        values.append(z)
    return np.array(values)


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


def test_piecewise_linear_interpolants_of_the_coefficients_have_the_same_limit():
    """a^tau and B^tau of section 2.1 are piecewise linear in t: (2.2a), also from starts between the layer times."""
    c, jumps = IN_TIME["smooth"]
    problem, errors = InDepth(c), []
    for L in DEPTHS:
        nodes, worst = np.linspace(0, T, L + 1), 0.0
        for theta in (0.0, 0.5):
            # z^tau(t + tau) from z^tau(t), t = (l + theta) tau: z_0 on [0, tau) as corrected in (2.2b).
            shifted = nodes[:-1] + theta / L
            interpolant = np.interp(shifted, nodes, c(nodes))
            net, initial = problem.network(np.linspace(0, T, L + 1), c=lambda t: interpolant)
            z = state_array(problem.Y, net(initial))[:, 0]
            exact = problem.exact(np.array([0, T + theta / L]), jumps)[-1]
            worst = max(worst, distance(problem.Y, z, exact))
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


def alternating(L, sign=lambda l, L: (-1.0) ** l, a_0=0.0):
    """z_L for a_l = sign(l, L) a, and the problem."""
    problem = InDepth(lambda t: 0 * t)
    problem.a_0 = a_0 * np.ones(problem.Y.size)
    times = np.linspace(0, T, L + 1)
    l = np.arange(L)
    net, initial = from_network(
        problem.a_0 + sign(l, L)[:, None] * problem.a_1, problem.B_0, problem.z_0, problem.Y, tau=np.diff(times)
    )
    return state_array(problem.Y, net(initial))[:, 0], problem


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


# -- Theorem 2.2: width ----------------------------------------------------------------------------------------------
# Smooth data, Gauss points and the irregular mesh are those of the demo. Data are functions of the coordinates of points in
# the plane or in space; x is the first coordinate, v the last one.

demo = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[3] / "demos" / "limits.py")))
bias, kernel, start, end = demo.bias, demo.kernel, demo.start, demo.end


def split_square(cut, n=10):
    """Gauss points and weights on the unit square, on both sides of x = cut."""
    x, w = np.hstack([demo.gauss(n, 0, cut), demo.gauss(n, cut, 1)])
    y, v = demo.gauss(n, 0, 1)
    return np.stack(np.meshgrid(x, y, indexing="ij"), axis=-1).reshape(-1, 2), np.outer(w, v).ravel()


QUADRATURE = {
    "disk": lambda: demo.round_points((0, 1)),
    "annulus": lambda: demo.round_points((0.4, 1)),
    "sphere": demo.round_points,
    "irregular": demo.square_points,
}


class Continuum:
    """(2.8) and (4.2) on the domain itself, at its quadrature points and any others."""

    def __init__(self, quadrature, b=kernel, a=bias, f_I=start, sigma=np.tanh, slope=lambda u: 1 / np.cosh(u) ** 2):
        self.points, self.weights = quadrature
        self.b, self.a, self.f_I, self.sigma, self.slope = b, a, f_I, sigma, slope

    def _matrix(self, y, transposed=False):
        b = self.b(self.points[None], y[:, None]) if transposed else self.b(y[:, None], self.points[None])
        return b * self.weights

    def state(self, y):
        """f(T) at points y, shape (m, d)."""
        n, everywhere = len(self.weights), np.concatenate([self.points, y])
        a, B = self.a(everywhere), self._matrix(everywhere)
        f = runge_kutta(lambda t, f: self.sigma(a - B @ f[:n]), self.f_I(everywhere), np.array([0, T]), steps=20)
        return f[-1][n:]

    def costate(self, y):
        """r(0) at points y, for r(T) = `end`: steps backwards from each state of twice as many steps forwards."""
        n, everywhere, steps = len(self.weights), np.concatenate([self.points, y]), 20
        a, B, transposed = self.a(self.points), self._matrix(self.points), self._matrix(everywhere, transposed=True)
        halves = np.linspace(0, T, 2 * steps + 1)
        f = runge_kutta(lambda t, f: self.sigma(a - B @ f), self.f_I(self.points), halves, steps=4 * steps)

        def rate(k, r):
            return -transposed @ (self.slope(a - B @ f[k]) * r[:n])

        r, h = end(everywhere), T / steps
        for k in range(2 * steps, 0, -2):
            k1 = rate(k, r)
            k2 = rate(k - 1, r + h / 2 * k1)
            k3 = rate(k - 1, r + h / 2 * k2)
            r = r + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(k - 2, r + h * k3))
        return r[n:]


@cache
def irregular(n):
    return LabelSpace(fd.FunctionSpace(demo.irregular_mesh(n), "DG", 0))


#: (label spaces, each of half the mesh size of the one before)
MESHES = {
    "disk": [("disk", 2), ("disk", 3), ("disk", 4)],
    "annulus": [("annulus", 1), ("annulus", 2), ("annulus", 4)],
    "sphere": [("sphere", 1), ("sphere", 2), ("sphere", 3)],
    "irregular": [6, 12, 24],
}


def partition(mesh):
    return irregular(mesh) if isinstance(mesh, int) else label_space(mesh[0], "DG0", mesh[1])


def network(Y, b=kernel, a=bias, steps=3, **options):
    """The network (2.6) with the values of these functions at the midpoints, constant in time."""
    found = compress(b, 1e-9, Y, sampling=KernelSampling(affordable=0))
    net = flat_network(
        found.kernel.phi, found.kernel.psi, layers=1, final_time=T, steps=steps, solver_parameters=RK8, **options
    )
    net.kernel.set(0, found.beta)
    net.bias.set(0, a(Y.coordinates))
    return net


def errors_on_cells(f, exact):
    """Distances in L2(Y) of a piecewise constant function from a function of points, and from its means over the cells."""
    V = f.function_space()
    mesh = V.mesh()
    fine = fd.FunctionSpace(mesh, "DG" if mesh.ufl_cell() == fd.triangle else "DQ", 2)
    x = fd.Function(fd.VectorFunctionSpace(mesh, fine.ufl_element(), dim=mesh.geometric_dimension))
    x.interpolate(fd.SpatialCoordinate(mesh))
    g = fd.Function(fine)
    g.dat.data_wo[:] = exact(x.dat.data_ro.reshape(-1, mesh.geometric_dimension))
    means = fd.Function(V)
    means.dat.data_wo[:] = fd.assemble(g * fd.TestFunction(V) * fd.dx).dat.data_ro
    means.dat.data_wo[:] /= fd.assemble(fd.TestFunction(V) * fd.dx).dat.data_ro
    return fd.norm(f - g), fd.norm(f - means)


def scalar(Y, function):
    """A batch of one sample as a Function of Y.V."""
    f = fd.Function(Y.V)
    f.dat.data_wo[:] = Y.values(function)[:, 0]
    return f


def mesh_size(Y):
    return (Y.measure / Y.size) ** (1 / Y.V.mesh().topological_dimension)


@pytest.mark.parametrize("domain", MESHES)
def test_width_converges_strongly_at_order_one_and_two_against_cell_means(domain):
    """Theorem 2.2 for Lipschitz sigma and data in C2: strongly, in L2(Y), at O(h); against cell means at O(h^2)."""
    exact = Continuum(QUADRATURE[domain]())
    found, sizes = [], []
    for mesh in MESHES[domain]:
        Y = partition(mesh)
        f = scalar(Y, network(Y)(Y.batch(start(Y.coordinates))))
        found.append(errors_on_cells(f, exact.state))
        sizes.append(mesh_size(Y))
    strong, means = np.transpose(found)
    assert abs(orders(sizes, strong)[-1] - 1) < 0.1, f"errors {strong}"
    assert abs(orders(sizes, means)[-1] - 2) < 0.2, f"errors {means}"


@pytest.mark.parametrize("domain", MESHES)
def test_the_costate_converges_in_width_at_the_same_orders(domain):
    """r(0) of the discrete network, from the tape, against (4.2) on the domain itself."""
    exact = Continuum(QUADRATURE[domain]())
    found, sizes = [], []
    for mesh in MESHES[domain]:
        Y = partition(mesh)
        found.append(errors_on_cells(scalar(Y, costate(network(Y), Y)), exact.costate))
        sizes.append(mesh_size(Y))
    strong, means = np.transpose(found)
    assert abs(orders(sizes, strong)[-1] - 1) < 0.1, f"errors {strong}"
    assert abs(orders(sizes, means)[-1] - 2) < 0.2, f"errors {means}"


def costate(net, Y, r=end):
    """r(0) for the functional int r(T) f(T) dy."""
    initial = Y.batch(start(Y.coordinates))
    with taping():
        run = net.run(initial)
        weight = Y.batch(r(Y.coordinates))
        J = fd.assemble(fd.inner(run.final, weight) * fd.dx)
    ReducedFunctional(J, Control(initial)).derivative()
    return run.costate(0)


@pytest.mark.parametrize("method, order", [("1fe", 1), ("2a", 2), ("4", 4)])
def test_the_costate_converges_in_depth_at_the_order_of_the_scheme(method, order):
    """On one mesh, against many steps: of order one for the residual network (2.1)."""
    Y = label_space("annulus", "DG0")

    def at(layers, method):
        found = compress(kernel, 1e-9, Y)
        net = ResidualNetwork(
            Kernel(found.kernel.phi, found.kernel.psi, in_time="shared"),
            bias=Bias(in_time="shared"),
            layers=layers,
            solver_parameters={"ts_rk_type": method},
        )
        net.kernel.set(0, found.beta)
        net.bias.set(0, bias(Y.coordinates))
        return Y.values(costate(net, Y))[:, 0]

    exact, depths = at(16, "8vr"), np.array([8, 16, 32])
    errors = [float(Y.sum(Y.weights @ (at(L, method) - exact) ** 2)) ** 0.5 for L in depths]
    assert abs(orders(1 / depths, errors)[-1] - order) < 0.12, f"errors {errors}"


@pytest.mark.parametrize("seed", [0, 1])
def test_partitions_of_random_lengths_converge_with_the_largest_of_them(seed):
    """Cells of an interval of lengths that differ by a factor of ten and more: the order is that in the largest."""
    exact = Continuum(_interval())
    found, sizes = [], []
    for N in (30, 90, 270):
        # Uniform random lengths, in any order.
        lengths = np.random.default_rng(seed).uniform(0.05, 1, N)
        ends = np.append(0, np.cumsum(lengths)) / lengths.sum()
        y, w = (ends[1:] + ends[:-1])[:, None] / 2, np.diff(ends)
        a, b, f_I = (function(*x) for function, x in ((bias, [y]), (kernel, [y[:, None], y[None]]), (start, [y])))
        net, initial = from_network(a, b * w, f_I, point_space(w), steps=4, solver_parameters=RK8)
        f = state_array(net.Y, net(initial))[:, 0]
        sides = np.stack([exact.state(x[:, None]) for x in (ends[:-1], y[:, 0], ends[1:])])
        means = np.array([1, 4, 1]) @ sides / 6
        spread = np.array([1, 4, 1]) @ (sides - f) ** 2 / 6
        found.append([(w @ spread) ** 0.5, (w @ (f - means) ** 2) ** 0.5])
        sizes.append(w.max())
    strong, means = np.transpose(found)
    assert abs(orders(sizes, strong)[-1] - 1) < 0.15, f"errors {strong}"
    assert abs(orders(sizes, means)[-1] - 2) < 0.3, f"errors {means}"


def _interval(n=10):
    x, w = demo.gauss(n, 0, 1)
    return x[:, None], w


CUT = 2**0.5 - 1


def test_a_kernel_that_jumps_in_y_converges_at_order_one_half():
    """f jumps where b does: on a strip of cells of width h the error is of size one, also in the means."""

    def jumping(y, z):
        return kernel(y, z) * (1 + 2 * (y[..., 0] > CUT))

    exact = Continuum(split_square(CUT), jumping)
    found, sizes = [], []
    for n in (6, 12, 24, 48):
        Y = irregular(n)
        f = scalar(Y, network(Y, jumping)(Y.batch(start(Y.coordinates))))
        # Means over cells that the jump crosses are computed from a polynomial, which suffices for an error of size one.
        found.append(errors_on_cells(f, exact.state))
        sizes.append(mesh_size(Y))
    strong, means = np.transpose(found)
    assert 0.3 < slope(sizes, strong) < 0.85, f"errors {strong}"
    assert 0.3 < slope(sizes, means) < 0.75, f"errors {means}"


def test_a_kernel_that_jumps_along_the_diagonal_loses_order_in_its_means():
    """b = 1 for z_1 < y_1: its integral is smooth in y, but a cell that z_1 = y_1 crosses counts as a whole or not at all."""

    def volterra(y, z):
        return 2.0 * (z[..., 0] < y[..., 0]) * (1 + z[..., 1])

    points, weights = demo.square_points()
    exact = Continuum((points, np.ones(len(weights))), lambda y, z: _volterra_weights(y, weights, points))
    found, sizes = [], []
    for n in (4, 8, 16):
        Y = irregular(n)
        y, w = state_array(Y, Y.batch(Y.coordinates)), state_array(Y, Y.batch(Y.weights))[:, 0]
        b = volterra(y[:, None], y[None]) * w
        net, initial = from_network(bias(y), b, start(y), Y, steps=3, solver_parameters=RK8)
        found.append(errors_on_cells(scalar(Y, net(initial)), exact.state))
        sizes.append(mesh_size(Y))
    strong, means = np.transpose(found)
    assert slope(sizes, strong) > 0.85, f"errors {strong}"
    assert 0.9 < slope(sizes, means) < 1.75, f"errors {means}"


def _volterra_weights(y, weights, points, n=10):
    """2 int_0^(y_1) int_0^1 l(z) (1 + z_2) dz for the polynomials l that are one at one quadrature point."""
    y = np.broadcast_to(y, (y.shape[0], 1, 2))[:, 0]
    x, w = demo.gauss(n, 0, 1)
    # Legendre polynomials through the points, and their integrals from 0.
    series = np.linalg.inv(np.polynomial.legendre.legvander(2 * x - 1, n - 1))
    antiderivatives = np.polynomial.legendre.legint(series, lbnd=-1) / 2
    integrals = np.polynomial.legendre.legval(2 * y[:, 0] - 1, antiderivatives).T
    return 2 * (integrals[:, :, None] * (w * (1 + x))[None, None, :]).reshape(len(y), -1)


def checkerboard(Y, n):
    """+1 and -1 on cells of an annulus that are neighbours along the circle, shape (nodes,)."""
    angle = np.arctan2(Y.coordinates[:, 1], Y.coordinates[:, 0]) % (2 * np.pi)
    return (-1.0) ** np.floor(angle / (2 * np.pi) * 12 * n)


def oscillating(n, in_y):
    """f_h and its label space, for b_h(y, z) = s_h b with the sign of the cell of y, or of z."""
    Y = label_space("annulus", "DG0", n)
    s = checkerboard(Y, n)
    assert abs(Y.sum(Y.weights @ s)) < 1e-12 * Y.measure
    net = network(Y)
    phi, psi = net.kernel.space_basis.kernel.phi, net.kernel.space_basis.kernel.psi
    factors = [
        Basis(Y, (s[:, None] if signed else 1) * basis.values, "given") for basis, signed in ((phi, in_y), (psi, not in_y))
    ]
    other = ResidualNetwork(Kernel(*factors), layers=Layers(1, T, steps=3), solver_parameters=RK8)
    other.kernel.set(0, net.kernel.get(0))
    other.bias.set(0, net.bias.get(0))
    return Y, Y.values(other(Y.batch(start(Y.coordinates))))[:, 0]


def moments(Y, f):
    """Against three functions: f in the sense of distributions."""
    x, v = Y.coordinates[:, 0], Y.coordinates[:, -1]
    return Y.sum((Y.weights * f) @ np.column_stack([np.ones_like(x), x, np.cos(v)]))


def test_a_kernel_that_oscillates_in_y_has_another_limit_than_its_weak_one():
    """b_h tends to 0 weakly, not pointwise as Theorem 2.2 asks for: f_h does not tend to the solution of b = 0.

    It is bounded, as (A3) of 2.1 asks for.

    It has no strong limit at all; its weak one is the mean of two, f_+ with the kernel b and f_- with -b, whose mean
    both see.
    """
    points, weights = QUADRATURE["annulus"]()
    a, B, n = bias(points), kernel(points[:, None], points[None]) * weights, len(weights)
    sign = np.repeat([1.0, -1.0], n)

    def two(t, f):
        return np.tanh(np.tile(a, 2) - sign * np.tile(B @ ((f[:n] + f[n:]) / 2), 2))

    f = runge_kutta(two, np.tile(start(points), 2), np.array([0, T]), steps=40)[-1]
    tested = np.column_stack([np.ones(n), points[:, 0], np.cos(points[:, 1])])
    averaged = (weights * (f[:n] + f[n:]) / 2) @ tested
    of_weak_limit = (weights * runge_kutta(lambda t, f: np.tanh(a), start(points), np.array([0, T]))[-1]) @ tested
    to_mean, to_weak, strong = [], [], []
    for refinement in (1, 2, 4):
        Y, f_h = oscillating(refinement, in_y=True)
        to_mean.append(np.linalg.norm(moments(Y, f_h) - averaged))
        to_weak.append(np.linalg.norm(moments(Y, f_h) - of_weak_limit))
        no_kernel = start(Y.coordinates) + T * np.tanh(bias(Y.coordinates))
        strong.append(float(Y.sum(Y.weights @ (f_h - no_kernel) ** 2)) ** 0.5)
    assert abs(orders([1, 1 / 2, 1 / 4], to_mean)[-1] - 2) < 0.3, f"errors {to_mean}"
    assert min(to_weak) > 0.1 and to_weak[-1] > 10 * to_mean[-1]
    assert min(strong) > 0.5 and abs(strong[-1] / strong[-2] - 1) < 0.05


def test_a_kernel_that_oscillates_in_z_does_no_harm():
    """Theorem 2.2 does not apply either, but the kernel is integrated against an f that does not oscillate: B_h f -> 0."""
    errors = []
    for refinement in (1, 2, 4):
        Y, f_h = oscillating(refinement, in_y=False)
        no_kernel = start(Y.coordinates) + T * np.tanh(bias(Y.coordinates))
        errors.append(float(Y.sum(Y.weights @ (f_h - no_kernel) ** 2)) ** 0.5)
    assert orders([1, 1 / 2, 1 / 4], errors)[-1] > 0.85, f"errors {errors}"


def test_kernels_without_a_bound_have_another_limit_than_their_pointwise_one():
    """(A3) of 2.1: b_h(y, z) = 1 / |Y_k| for z in the cell Y_k tends to 0 almost everywhere, B_h f is f at a point."""
    errors, to_zero, sizes = [], [], []
    for n in (1, 2, 4):
        Y = label_space("annulus", "DG0", n)
        y = state_array(Y, Y.batch(Y.coordinates))
        k = int(np.argmin(np.linalg.norm(y - [0.7, 0], axis=1)))
        B = np.zeros((Y.size, Y.size))
        B[:, k] = 1.0
        net, initial = from_network(bias(y), B, start(y), Y, steps=4, solver_parameters=RK8)
        f = state_array(Y, net(initial))[:, 0]
        # B_h f is the value of f at the point.
        point = np.array([[0.7, 0.0], *y])
        exact = runge_kutta(lambda t, f: np.tanh(bias(point) - f[0]), start(point), np.array([0, T]), steps=40)[-1]
        errors.append(distance(Y, f, exact[1:]))
        to_zero.append(distance(Y, f, start(y) + T * np.tanh(bias(y))))
        sizes.append(mesh_size(Y))
    assert errors[-1] < 0.5 * errors[0] and min(to_zero) > 5 * errors[-1] and min(to_zero) > 0.5, f"{errors}, {to_zero}"


def graphon(y, z):
    """The probability of an edge between two points of a sphere, in (0, 1)."""
    return 0.5 + 0.4 * (y * z).sum(axis=-1)


#: With this factor sigma is not flat on a sphere, |Y| = 12.6.
GAIN = 0.2


def test_a_graph_drawn_from_a_graphon_converges_in_the_operator_norm_alone():
    """b_h in {0, 1} with the probabilities b: outside of the hypotheses of Theorem 2.2, yet f_h tends to f.

    norm(b_h - b) in L1 and L2 stays, so there is no pointwise limit, of no subsequence; the operator, like the cut
    norm, goes with N^(-1/2), and takes f_h along. For networks on graphs, rates are proved in arXiv 2510.03923 (Yan,
    Kulick, Tang) where graphs are not random: weighted by a smooth graphon, or of a {0, 1}-valued one. For random ones the
    rate is (alpha N)^(-1/2), alpha the density of edges ("Zero-shot size transfer for neural ODEs on sparse random graphs").
    """
    exact = Continuum(QUADRATURE["sphere"](), lambda y, z: GAIN * graphon(y, z))
    sizes, states, apart = [], [], []
    for refinement in (0, 1, 2):
        Y, y, w = cells_of_the_sphere(refinement)
        b, rk4 = graphon(y[:, None], y[None]), {"ts_rk_type": "4"}
        net, initial = from_network(bias(y), GAIN * b * w, start(y), Y, steps=8, solver_parameters=rk4)
        weighted, limit = state_array(Y, net(initial))[:, 0], exact.state(y)
        squares = []
        for seed in range(8):
            net.kernel.set(0, GAIN * drawn(y, seed))
            f = state_array(Y, net(initial))[:, 0]
            squares.append([distance(Y, f, weighted) ** 2, distance(Y, f, limit) ** 2])
        for errors, square in zip((apart, states), np.mean(squares, axis=0)):
            errors.append(square**0.5)
        sizes.append(1 / Y.size)
    assert abs(orders(sizes, apart)[-1] - 0.5) < 0.1, f"errors {apart}"
    assert states[2] < states[1] / 1.5 < states[0] / 3, f"errors {states}"

    sizes, kernels, operators = [], [], []
    for refinement in (1, 2, 3):
        Y, y, w = cells_of_the_sphere(refinement)
        left = np.sqrt(w)[:, None] * (drawn(y, 0) - graphon(y[:, None], y[None])) * np.sqrt(w)
        kernels.append(np.linalg.norm(left))
        operators.append(float(svds(left, k=1, return_singular_vectors=False, rng=np.random.default_rng(0))[0]))
        sizes.append(1 / Y.size)
    assert abs(slope(sizes, operators) - 0.5) < 0.06, f"errors {operators}"
    # The L2 norm of the difference has a limit that is not 0: the root of int int b (1 - b).
    points, weights = QUADRATURE["sphere"]()
    W = graphon(points[:, None], points[None])
    np.testing.assert_allclose(kernels[1:], (weights @ (W * (1 - W)) @ weights) ** 0.5, rtol=0.03)


def cells_of_the_sphere(refinement):
    """Label space, midpoints and measures in the order of `node_numbers`."""
    Y = label_space("sphere", "DG0", refinement)
    return Y, state_array(Y, Y.batch(Y.coordinates)), state_array(Y, Y.batch(Y.weights))[:, 0]


def drawn(y, seed):
    """A graph: an edge from i to j with the probability b(y_i, y_j)."""
    return (np.random.default_rng([seed, len(y)]).random((len(y), len(y))) < graphon(y[:, None], y[None])).astype(float)


# -- the limits of a given network -----------------------------------------------------------------------------------

LAPLACE_RANK = {"disk": 6, "annulus": 5, "sphere": 9}


@pytest.mark.parametrize("method, order", [("1fe", 1), ("2a", 2), ("4", 4)])
@pytest.mark.parametrize("in_time", ["layers", "linear"])
def test_the_depth_limit_of_a_network_is_reached_at_the_order_of_its_scheme(method, order, in_time):
    """(2.3) with coefficients of layers, which jump at interfaces, and with the interpolants a^tau, B^tau of 2.1."""
    net = own_network(
        bias_in_time=in_time, kernel_in_time=in_time, basis_for_bias=True, size=0.5, steps=4,
        solver_parameters={"ts_rk_type": method},
    )  # fmt: skip
    found = depth_limit(net, net.Y.batch(smooth(net.Y)), halvings=2)
    np.testing.assert_allclose(found.sizes, [0.7 / n for n in (4, 8, 16)])
    assert abs(found.orders[-1] - order) < 0.2, str(found)


@on_ranks
def test_the_first_error_in_depth_is_that_of_the_network_itself():
    """Against SciPy's solution at T; learned factors and times keep their present values."""
    net = own_network(learn_factors=True, learn_times=True, steps=2, solver_parameters=EULER)
    for factor in net.factors:
        factor.set(0, 0.3 * smooth(net.Y, factor.space_basis.shape[1], seed=8))
    net.layer_times.set(0, [0.3, 0.6, 1.1])
    initial = net.Y.batch(smooth(net.Y))
    found = depth_limit(net, initial, halvings=0)
    arrays, z = to_network(net), state_array(net.Y, initial)
    ends, f = [0.0, 0.3, 0.6, 1.1], z
    w, worst = state_array(net.Y, net.Y.batch(net.Y.weights)), 0.0
    run = net.run(initial)
    for l in range(3):
        solution = solve_ivp(
            lambda t, y: np.tanh(arrays.a[2 * l][:, None] - arrays.B[2 * l] @ y.reshape(f.shape)).ravel(),
            ends[l : l + 2], f.ravel(), rtol=1e-10, atol=1e-12,
        )  # fmt: skip
        f = solution.y[:, -1].reshape(f.shape)
        worst = max(worst, np.sum(w * (state_array(net.Y, run.state(l + 1)) - f) ** 2) ** 0.5)
    np.testing.assert_allclose(found.errors, [worst], rtol=1e-6)


@pytest.mark.parametrize("terminal", [None, end], ids=["state", "co-state"])
@pytest.mark.parametrize("domain", LAPLACE_RANK)
def test_the_width_limit_of_a_network_is_reached_at_order_two(domain, terminal):
    """As distributions, on DG0. The finest space takes the place of the limit and is left out of the orders."""
    refinements = {"disk": (2, 3, 4), "annulus": (2, 3, 5), "sphere": (1, 2, 3)}
    spaces = [label_space(domain, "DG0", n) for n in refinements[domain]]
    rank = LAPLACE_RANK[domain]
    phi = laplace_basis(spaces[-1], rank)
    net = ResidualNetwork(phi, bias=phi, layers=2)
    set_smooth(net, np.random.default_rng(0))
    found = width_limit(net, start, spaces, terminal=terminal)
    *h, finest = (mesh_size(Y) ** 2 for Y in spaces)
    expected = (h[0] - finest) / (h[1] - finest)
    assert 0.75 < found.errors[0] / found.errors[1] / expected < 1.33, f"{found}, ratio {expected:.2f}"


@pytest.mark.parallel([2])
def test_limits_are_the_same_on_ranks():
    for alone in (False, True):
        spaces = [label_space("disk", "DG0", n, alone=alone) for n in (1, 2, 3)]
        phi = laplace_basis(spaces[-1], 6)
        net = ResidualNetwork(phi, bias=phi, layers=2, solver_parameters=EULER)
        set_smooth(net, np.random.default_rng(0))
        depth = depth_limit(net, net.Y.batch(start(net.Y.coordinates)), halvings=1)
        both = [*depth.errors, *(x for r in (None, end) for x in width_limit(net, start, spaces, terminal=r).errors)]
        if not alone:
            on_all = both
    # Eigenfunctions are accurate to about 1e-13.
    np.testing.assert_allclose(on_all, both, rtol=1e-8)


def test_what_has_no_limit_here_is_refused():
    net = own_network(solver_parameters={"ts_type": "rk", "ts_adapt_type": "basic"})
    with pytest.raises(ValueError, match="^depth_limit: it does not take adapted time steps"):
        depth_limit(net, net.Y.batch(smooth(net.Y)))
    with pytest.raises(ValueError, match="halvings: expected an integer >= 0"):
        depth_limit(own_network(), net.Y.batch(smooth(net.Y)), halvings=-1)
    spaces = [label_space("disk", "CG1", n) for n in (1, 2)]
    in_basis = own_network(bias=net.bases["phi"][0])
    with pytest.raises(ValueError, match="spaces: expected at least two LabelSpaces"):
        width_limit(in_basis, start, spaces[:1])
    with pytest.raises(ValueError, match="spaces: expected falling mesh sizes"):
        width_limit(in_basis, start, spaces[::-1])
    with pytest.raises(ValueError, match="^width_limit: it does not take a bias with a value at every node"):
        width_limit(own_network(), start, spaces)
