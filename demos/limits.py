r"""Infinite depth, infinite width
==============================

A residual network z_(l+1) = z_l + tau sigma(a_l - B_l z_l) (2.1) with ever more and shorter layers tends to an ODE, and
with ever more neurons, which are the cells of a partition of a domain Y, to

    f_t(y, t) = sigma( a(y, t) - int_Y b(y, z, t) f(z, t) dz ),                                                   (2.8)

if its coefficients converge almost everywhere: Theorems 2.1 and 2.2 of the paper. Here both limits are taken on
partitions of a disk, an annulus, a sphere and an irregular one, with the orders at which they are reached, in the state
and in the co-state; and so are limits that the theorems do not speak of, because the coefficients do not converge. Run

    containers/run python demos/limits.py                      (about a minute; --short for a quarter of one)
    containers/run mpiexec -n 2 python -m mpi4py demos/limits.py

It prints a table and draws all curves to demos/output/limits.png.
"""

import sys
import time
from pathlib import Path

SHORT = "--short" in sys.argv
sys.argv = [argument for argument in sys.argv if argument != "--short"]  # PETSc would take it for an option of its own

import firedrake as fd
import numpy as np
from firedrake.adjoint import Control, continue_annotation, pause_annotation
from matplotlib.figure import Figure
from pyadjoint import ReducedFunctional, Tape, set_working_tape

from fem_resnet import Basis, Bias, Kernel, LabelSpace, Layers, ResidualNetwork, compress, from_network, plot, state_array

T = 1.0
EULER, RK4, RK8 = ({"ts_rk_type": name} for name in ("1fe", "4", "8vr"))


def runge_kutta(rate, z, times, steps=400):
    """Classical Runge-Kutta: z at the last of these times, between which `rate(t, z)` is smooth."""
    for left, right in zip(times[:-1], times[1:]):
        n = max(1, int(np.ceil(steps * (right - left))))
        h, inside = (right - left) / n, 1e-6 * (right - left)
        for t in left + h * np.arange(n):
            k1 = rate(t + inside, z)
            k2 = rate(t + h / 2, z + h / 2 * k1)
            k3 = rate(t + h / 2, z + h / 2 * k2)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(t + h - inside, z + h * k3))
    return z


# %% Depth
# The neurons are 32 cells of a disk. The coefficients are a(t) = a_0 + c(t) a_1 and B(t) = (1 + c(t) / 2) B_0, and a
# network of L layers has their values at the starts of its layers. c is smooth; or jumps once, at 1/3; or infinitely
# often, of unbounded variation: it is continuous almost everywhere, as Theorem 2.1 wants, but about tau^(-2/3) of its
# jumps are so far apart that layers see them one by one, each an error tau of a random sign, and tau^(2/3) is the
# order, not tau.

THIRD = 1 / 3


def swarm(t):
    """It jumps wherever 2 / t^2 is an integer."""
    return np.sign(np.sin(2 * np.pi / t**2))


IN_TIME = {
    "smooth": (lambda t: np.cos(5 * t), np.array([0.0, T])),
    "one jump": (lambda t: np.where(t < THIRD, 1.0, -0.7), np.array([0.0, THIRD, T])),
    "unbounded variation": (swarm, np.append(0.0, np.sqrt(2 / np.arange(2, 5001))[::-1])),
}


def primes(least):
    """The first ones from `least` on."""
    return [n for n in range(least, least + 60) if all(n % d for d in range(2, int(n**0.5) + 1))]


class Neurons:
    """Cells of a disk with random a_0, a_1, B_0 and z_0."""

    def __init__(self):
        random = np.random.default_rng(1)
        self.Y = LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(1), "DG", 0))
        N = self.Y.size
        self.a_0, self.a_1, self.z_0 = 0.3 * random.normal(size=N), random.normal(size=N), random.normal(size=N)
        self.B_0 = 1.5 * random.normal(size=(N, N)) / N**0.5

    def network(self, times, values, **options):
        """z at the end of layers between these times with c = `values`, one a layer."""
        a = self.a_0 + values[:, None] * self.a_1
        B = (1 + values[:, None, None] / 2) * self.B_0
        net, initial = from_network(a, B, self.z_0, self.Y, tau=np.diff(times), **options)
        return state_array(self.Y, net(initial))[:, 0]

    def limit(self, c, times):
        """z(T) of (2.3); where c jumps too often to be followed, up to times[1], of the mean over c = 1 and c = -1."""

        def rate(t, z):
            values = [1.0, -1.0] if c is swarm and t < times[1] else [c(t)]
            return np.mean([np.tanh(self.a_0 + x * self.a_1 - (1 + x / 2) * self.B_0 @ z) for x in values], axis=0)

        return runge_kutta(rate, self.z_0, times)

    def distance(self, z, x):
        """In L2(Y)."""
        w = state_array(self.Y, self.Y.batch(self.Y.weights))[:, 0]
        return float(w @ (z - x) ** 2) ** 0.5


def depth(depths):
    """Errors by what is looked at, each for all depths."""
    neurons, errors = Neurons(), {}
    for name, (c, jumps) in IN_TIME.items():
        exact = neurons.limit(c, jumps)

        def error(times, **options):
            return neurons.distance(neurons.network(times, c(times[:-1] + 1e-13), **options), exact)

        # Where it jumps as often as there are layers the error is a matter of luck: the mean of squares over some
        # depths.
        near = {L: primes(L)[:4] if c is swarm else [L] for L in depths}
        errors[f"Euler, {name}"] = [np.mean([error(np.linspace(0, T, M + 1)) ** 2 for M in near[L]]) ** 0.5 for L in depths]
        # Runge-Kutta of order four, with layers that do not end at the jump, and with layers that do.
        if name == "one jump":
            errors["rk 4, one jump"] = [error(np.linspace(0, T, L + 1), solver_parameters=RK4) for L in depths]
            errors["rk 4, interface at the jump"] = [error(jumps, solver_parameters=RK4, steps=max(1, L // 8)) for L in depths]
    return errors | alternating(neurons, depths)


# %% Coefficients that do not converge
# With a_l = (-1)^l a the coefficients have a weak limit, 0, but no limit almost everywhere. The states converge all the
# same: not to z' = sigma(-B z), but to the mean z' = (sigma(a - B z) + sigma(-a - B z)) / 2. And if the sign is that of
# (-1)^L, the same in all layers of one network, then even and odd depths have limits of their own.


def alternating(neurons, depths):
    """Distances to the averaged equation and to that of the weak limit, and of even depths from odd ones."""
    a, B, ends = neurons.a_1, neurons.B_0, np.array([0.0, T])
    mean = runge_kutta(lambda t, z: (np.tanh(a - B @ z) + np.tanh(-a - B @ z)) / 2, neurons.z_0, ends)
    weak = runge_kutta(lambda t, z: np.tanh(-B @ z), neurons.z_0, ends)

    def final(L, signs):
        net, initial = from_network(signs[:, None] * a, B, neurons.z_0, neurons.Y, tau=T / L)
        return state_array(neurons.Y, net(initial))[:, 0]

    states = [final(L, (-1.0) ** np.arange(L)) for L in depths]
    parity = [neurons.distance(*(final(M, np.full(M, (-1.0) ** M)) for M in (L, L + 1))) for L in depths]
    return {
        "signs (-1)^l: to the mean": [neurons.distance(z, mean) for z in states],
        "signs (-1)^l: to the weak limit": [neurons.distance(z, weak) for z in states],
        "signs (-1)^L: even to odd": parity,
    }


# %% Width
# a, b and f_I are smooth functions of the coordinates, and a network has their values at the midpoints of its cells,
# the kernel as one of low rank (`compress`). The exact f is that of Gauss points on the domain itself, to which (2.8)
# is applied there and at any other points. A cell has one value, so that f_h is away from f by O(h) in L2(Y); from its
# means over the cells, by O(h^2). The same holds for the co-state r of (4.2), whose terminal value is given.


def bias(y):
    """a(y)."""
    return np.sin(y[..., 0] + 2 * y[..., -1])


def kernel(y, z):
    """b(y, z), which is not symmetric."""
    return np.exp(-((y - z) ** 2).sum(axis=-1)) * (1 + 0.5 * y[..., 0] - z[..., -1])


def start(y):
    """f_I(y)."""
    return np.cos(y[..., 0]) + y[..., -1] ** 2


def end(y):
    """r(y, T)."""
    return 1 + y[..., 0] * y[..., -1]


def gauss(n, low, high):
    """Points and weights."""
    x, w = np.polynomial.legendre.leggauss(n)
    return (low + high) / 2 + (high - low) / 2 * x, (high - low) / 2 * w


def round_points(radii=None, n=10):
    """Points and weights on an annulus between these radii; on the sphere if there are none."""
    phi = np.pi * np.arange(2 * n) / n
    x, w = gauss(n, *(radii or (-1, 1)))
    r = x if radii else np.sqrt(1 - x**2)
    parts = [np.outer(r, np.cos(phi)), np.outer(r, np.sin(phi))] + ([] if radii else [np.outer(x, np.ones(2 * n))])
    weights = np.outer(w * r if radii else w, np.full(2 * n, np.pi / n))
    return np.stack(parts, axis=-1).reshape(2 * n * n, -1), weights.ravel()


def square_points(n=10):
    """On the unit square."""
    x, w = gauss(n, 0, 1)
    return np.stack(np.meshgrid(x, x, indexing="ij"), axis=-1).reshape(-1, 2), np.outer(w, w).ravel()


def irregular_mesh(n):
    """A square of triangles whose inner vertices are moved by up to a third of their distance, no two alike."""
    mesh = fd.UnitSquareMesh(n, n)
    x = mesh.coordinates.dat.data_ro
    inner = ((x > 1e-9) & (x < 1 - 1e-9)).all(axis=1)
    moves = np.modf(np.sin(np.round(x, 9) @ [[12.9898, 39.346], [78.233, 11.135]]) * 437.5453)[0]
    moved = fd.Function(mesh.coordinates)
    moved.dat.data_wo[:] = x + 0.3 / n * moves * inner[:, None]
    return fd.Mesh(moved)


def annulus_mesh(n):
    """Quadrilaterals, 12 n around."""
    return fd.AnnulusMesh(1, 0.4, 3 * n, 12 * n)


DOMAINS = {
    "disk": (lambda n: fd.UnitDiskMesh(n), (2, 3, 4, 5), lambda: round_points((0, 1))),
    "annulus": (annulus_mesh, (1, 2, 4, 8), lambda: round_points((0.4, 1))),
    "sphere": (lambda n: fd.UnitIcosahedralSphereMesh(n), (1, 2, 3, 4), round_points),
    "irregular": (irregular_mesh, (6, 12, 24, 48), square_points),
}


class Limit:
    """f(T) and r(0) of (2.8) and (4.2) on the domain itself."""

    def __init__(self, points, weights, steps=20):
        self.points, self.weights = points, weights
        self.a, self.B = bias(points), kernel(points[:, None], points[None]) * weights
        # f at Gauss points at the ends and middles of the steps.
        self.f = [start(points)]
        for _ in range(2 * steps):
            half_step = np.array([0, T / (2 * steps)])
            self.f.append(runge_kutta(lambda t, f: np.tanh(self.a - self.B @ f), self.f[-1], half_step, steps=1))

    def _stepped(self, values, slopes):
        """Classical Runge-Kutta's quadrature (3.3), of slopes at ends and middles of steps: that of Simpson."""
        h = 2 * T / (len(slopes) - 1)
        return values + h / 6 * (slopes[0:-1:2] + 4 * slopes[1::2] + slopes[2::2]).sum(axis=0)

    def state(self, y):
        """At points y, shape (m, d)."""
        B = kernel(y[:, None], self.points[None]) * self.weights
        return self._stepped(start(y), np.array([np.tanh(bias(y) - B @ f) for f in self.f]))

    def costate(self, y):
        """r(0), from r at the Gauss points, backwards."""
        slope = [1 / np.cosh(self.a - self.B @ f) ** 2 for f in self.f]
        BT = kernel(self.points[None], self.points[:, None]) * self.weights
        r, h, kept = end(self.points), 2 * T / (len(self.f) - 1), []
        for k in range(len(self.f) - 1, 0, -2):
            k1 = BT @ (slope[k] * r)
            k2 = BT @ (slope[k - 1] * (r - h / 2 * k1))
            k3 = BT @ (slope[k - 1] * (r - h / 2 * k2))
            k4 = BT @ (slope[k - 2] * (r - h * k3))
            # To the middle of a step by Hermite's polynomial of its ends, which is of fourth order.
            below = r - h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            kept += [r, (r + below) / 2 + h / 8 * (BT @ (slope[k - 2] * below) - k1)]
            r = below
        kept.append(r)
        at_y = kernel(self.points[None], y[:, None]) * self.weights
        return self._stepped(end(y), np.array([-at_y @ (s * r) for s, r in zip(slope[::-1], kept)]))


def network(Y, layers=1, steps=3, solver_parameters=RK8):
    """A network with these coefficients, at all times."""
    found = compress(kernel, 1e-9, Y)
    net = ResidualNetwork(
        Kernel(found.kernel.phi, found.kernel.psi, in_time="shared"),
        bias=Bias(in_time="shared"),
        layers=Layers(layers, T, steps=steps),
        solver_parameters=solver_parameters,
    )
    net.kernel.set(0, found.beta)
    net.bias.set(0, bias(Y.coordinates))
    return net


def state_and_costate(net):
    """f_h(T), and r_h(0) for the functional int r(T) f_h(T) dy from the tape."""
    Y = net.Y
    set_working_tape(Tape())
    continue_annotation()
    initial = Y.batch(start(Y.coordinates))
    run = net.run(initial)
    J = fd.assemble(fd.inner(run.final, Y.batch(end(Y.coordinates))) * fd.dx)
    pause_annotation()
    ReducedFunctional(J, Control(initial)).derivative()
    return Y.values(run.final)[:, 0].copy(), Y.values(run.costate(0))[:, 0].copy()


def on_cells(Y, values, exact):
    """Distances in L2(Y) of cell values from a function, and from its means over the cells."""
    mesh = Y.V.mesh()
    fine = fd.FunctionSpace(mesh, "DG" if mesh.ufl_cell() == fd.triangle else "DQ", 2)
    x = fd.Function(fd.VectorFunctionSpace(mesh, fine.ufl_element(), dim=mesh.geometric_dimension))
    x.interpolate(fd.SpatialCoordinate(mesh))
    f, g, means = fd.Function(Y.V), fd.Function(fine), fd.Function(Y.V)
    f.dat.data_wo[:] = values
    g.dat.data_wo[:] = exact(x.dat.data_ro.reshape(-1, mesh.geometric_dimension))
    means.dat.data_wo[:] = fd.assemble(g * fd.TestFunction(Y.V) * fd.dx).dat.data_ro / Y.weights
    return fd.norm(f - g), fd.norm(f - means)


def mesh_size(Y):
    """The mean one."""
    return (Y.measure / Y.size) ** 0.5


def width(domain, count):
    """Mesh sizes, and errors by what is looked at."""
    mesh, refinements, points = DOMAINS[domain]
    limit, sizes, found = Limit(*points()), [], []
    for n in refinements[:count]:
        Y = LabelSpace(fd.FunctionSpace(mesh(n), "DG", 0))
        f, r = state_and_costate(network(Y))
        found.append([*on_cells(Y, f, limit.state), *on_cells(Y, r, limit.costate)])
        sizes.append(mesh_size(Y))
    names = ["state", "state, cell means", "co-state", "co-state, cell means"]
    return sizes, {f"{domain}: {name}": list(errors) for name, errors in zip(names, np.transpose(found))}


# %% The co-state in depth
# On one mesh, the discrete network's r(0) from the tape against that of many steps of high order: at the order of the
# scheme.


def costate_in_depth(depths):
    """Errors by scheme."""
    Y = LabelSpace(fd.FunctionSpace(annulus_mesh(1), "DG", 0))
    exact = state_and_costate(network(Y, steps=16))[1]

    def error(layers, scheme):
        r = state_and_costate(network(Y, layers=layers, steps=1, solver_parameters=scheme))[1]
        return float(Y.sum(Y.weights @ (r - exact) ** 2)) ** 0.5

    return {f"co-state, {name}": [error(L, scheme) for L in depths] for name, scheme in (("Euler", EULER), ("rk 4", RK4))}


# %% Kernels that do not converge
# b_h(y, z) = s b(y, z) with the sign of a checkerboard in y: it tends to 0 weakly. But f_h tends to the mean of two
# functions, f_+ with the kernel b and f_- with -b, and not to the solution of b = 0. In z a checkerboard does no harm,
# for what it is integrated against does not oscillate.
#
# A random graph, b_h = 0 or 1 with the probability b, does not converge almost everywhere either, nor in L2(Y x Y). But
# its operator does, at N^(-1/2), as its cut norm does, and that is enough for f_h. For networks on graphs that are not random,
# weighted by a smooth graphon or of a graphon with values 0 and 1, rates are proved in arXiv 2510.03923; for random ones the
# rate is the one seen here.


def checkerboard(counts):
    """Distances of integrals of f_h to those of the mean of f_+ and f_-, and of b = 0; and for signs in z to b = 0."""
    points, weights = round_points((0.4, 1))
    a, B, n = bias(points), kernel(points[:, None], points[None]) * weights, len(weights)
    sign = np.repeat([1.0, -1.0], n)

    def two(t, f):
        return np.tanh(np.tile(a, 2) - sign * np.tile(B @ (f[:n] + f[n:]), 2) / 2)

    def tests(y):
        return np.column_stack([np.ones(len(y)), y[:, 0], np.cos(y[:, 1])])

    f = runge_kutta(two, np.tile(start(points), 2), np.array([0, T]))
    to_mean, to_zero, in_z = [], [], []
    for m in counts:
        Y = LabelSpace(fd.FunctionSpace(annulus_mesh(m), "DG", 0))
        angle = np.arctan2(Y.coordinates[:, 1], Y.coordinates[:, 0]) % (2 * np.pi)
        s = (-1.0) ** np.floor(angle / (2 * np.pi) * 12 * m)
        net = network(Y)
        moments = []
        for signs in ((s, 1 + 0 * s), (1 + 0 * s, s)):
            given = [net.bases[name][0].values for name in ("phi", "psi")]
            bases = [Basis(Y, x[:, None] * values, "given") for x, values in zip(signs, given)]
            other = ResidualNetwork(Kernel(*bases), layers=Layers(1, T, steps=3), solver_parameters=RK8)
            other.kernel.set(0, net.kernel.get(0))
            other.bias.set(0, bias(Y.coordinates))
            f_h = Y.values(other(Y.batch(start(Y.coordinates))))
            moments.append(Y.sum(tests(Y.coordinates).T @ (Y.weights[:, None] * f_h))[:, 0])
        mean = tests(points).T @ (weights * (f[:n] + f[n:])) / 2
        zero = tests(points).T @ (weights * (start(points) + T * np.tanh(a)))
        to_mean.append(np.linalg.norm(moments[0] - mean))
        to_zero.append(np.linalg.norm(moments[0] - zero))
        in_z.append(np.linalg.norm(moments[1] - zero))
    return {
        "signs in y: to the mean of two": to_mean, "signs in y: to the weak limit": to_zero,
        "signs in z: to the weak limit": in_z,
    }  # fmt: skip


GAIN = 0.2


def random_graph(refinements, draws=6):
    """Numbers of cells of the sphere, and distances in f(T) and in L2(Y x Y) of drawn kernels from weighted ones."""
    sizes, states, kernels = [], [], []
    for n in refinements:
        Y = LabelSpace(fd.FunctionSpace(fd.UnitIcosahedralSphereMesh(n), "DG", 0))
        y, w = state_array(Y, Y.batch(Y.coordinates)), state_array(Y, Y.batch(Y.weights))[:, 0]
        b = 0.5 + 0.4 * y @ y.T
        net, initial = from_network(bias(y), GAIN * b * w, start(y), Y, steps=8, solver_parameters=RK4)
        weighted, squares = state_array(Y, net(initial))[:, 0], []
        for seed in range(draws):
            drawn = (np.random.default_rng([seed, Y.size]).random(b.shape) < b).astype(float)
            net.kernel.set(0, GAIN * drawn)
            squares.append(w @ (state_array(Y, net(initial))[:, 0] - weighted) ** 2)
        states.append(np.mean(squares) ** 0.5)
        kernels.append(GAIN * (w @ (drawn - b) ** 2 @ w) ** 0.5)
        sizes.append(mesh_size(Y))
    return sizes, {"random graph: state": states, "random graph: kernel in L2": kernels}


# %% The figure


def draw(path, panels):
    """Errors over numbers of layers or sizes of cells, a panel each. Names say the order between the last two errors."""
    figure = Figure(figsize=(14, 13.5), layout="constrained")
    for ax, (title, xlabel, curves) in zip(figure.subplots(3, 3).flat, panels):
        named = {f"{name} ({abs(order(*curve)):.1f})": np.transpose(curve) for name, curve in curves.items()}
        plot.lines(named, log="xy", xlabel=xlabel, ylabel="error in L2(Y)", ax=ax).set_title(f"{title} (order)")
        ax.grid(alpha=0.3)
    path.parent.mkdir(exist_ok=True)
    plot.save(path, figure)


# %% All together


def order(sizes, errors):
    """Slope between the last two."""
    return float(np.log(errors[-1] / errors[-2]) / np.log(sizes[-1] / sizes[-2]))


def main(short=False):
    """Returns the last observed orders by what is looked at."""
    begin = time.perf_counter()
    depths = np.array([8, 32, 128] if short else [8, 32, 128, 512])
    orders = {}

    def say(text):
        if fd.COMM_WORLD.rank == 0:
            print(text, flush=True)

    def table(sizes, curves):
        for name, errors in curves.items():
            orders[name] = order(sizes, errors)
            say(f"{name:34s}" + "".join(f"{error:10.1e}" for error in errors) + f"{orders[name]:8.2f}")
        return curves

    say(f"{'errors and last order in 1 / L':34s}" + "".join(f"{f'L = {L}':>10s}" for L in depths))
    in_depth = table(1 / depths, depth(depths))
    few = np.array([8, 16, 32])
    costates = table(1 / few, costate_in_depth(few))
    say("errors and last order in h, coarse to fine")
    by_domain, sizes = {}, {}
    for domain in ("disk", "irregular") if short else DOMAINS:
        h, curves = width(domain, 3 if short else 4)
        by_domain |= table(h, curves)
        sizes[domain] = h
    counts = (1, 2, 4) if short else (1, 2, 4, 8)
    signs = table(1 / np.array(counts), checkerboard(counts))
    h_graph, graph = random_graph((0, 1, 2) if short else (1, 2, 3))
    table(h_graph, graph)

    def of_width(what):
        """Of each domain, sizes of cells and errors."""
        found = {name.partition(": ")[0]: errors for name, errors in by_domain.items() if name.partition(": ")[2] == what}
        return {domain: (sizes[domain], errors) for domain, errors in found.items()}

    def over(x, curves, signs=None):
        return {name: (x, errors) for name, errors in curves.items() if signs is None or ("signs" in name) == signs}

    draw(Path(__file__).parent / "output" / "limits.png", [
        ("Depth, coefficients converge", "layers L", over(depths, in_depth, False)),
        ("Depth, coefficients oscillate", "layers L", over(depths, in_depth, True)),
        ("Depth, the co-state", "layers L", over(few, costates)),
        ("Width, the state", "h", of_width("state")),
        ("Width, the state's means on cells", "h", of_width("state, cell means")),
        ("Width, signs on a checkerboard", "h", over(1 / np.array(counts), signs)),
        ("Width, the co-state", "h", of_width("co-state")),
        ("Width, the co-state's means on cells", "h", of_width("co-state, cell means")),
        ("Width, random graphs", "h", over(h_graph, graph)),
    ])  # fmt: skip
    say(f"time: {time.perf_counter() - begin:.0f} s")

    expected = {"Euler, smooth": 1, "Euler, one jump": 1, "rk 4, one jump": 1, "rk 4, interface at the jump": 4}
    expected |= {"signs (-1)^l: to the mean": 1, "co-state, Euler": 1, "co-state, rk 4": 4}
    expected |= {name: 2 if "means" in name else 1 for name in by_domain}
    expected |= {"signs in y: to the mean of two": 2, "random graph: state": 1}  # N^(-1/2) is h
    no_limit = ["signs (-1)^l: to the weak limit", "signs (-1)^L: even to odd", "signs in y: to the weak limit"]
    off = {name: orders[name] for name, wanted in expected.items() if abs(orders[name] - wanted) > 0.3}
    # What this page claims.
    assert not off, f"not at the expected order: {off}"
    assert max(abs(orders[name]) for name in [*no_limit, "random graph: kernel in L2"]) < 0.15
    assert -0.85 < np.polyfit(np.log(depths), np.log(in_depth["Euler, unbounded variation"]), 1)[0] < 0
    return orders


if __name__ == "__main__":
    main(SHORT)
