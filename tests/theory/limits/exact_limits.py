"""Solutions of (2.8) and (4.2) on the label domain itself, and networks on meshes of it, for the tests of limits.

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
from helpers import flat_network, label_space

from fem_resnet import KernelSampling, LabelSpace, compress, state_array

T = 1.0
RK8 = {"ts_rk_type": "8vr"}
EULER = {"ts_rk_type": "1fe"}


def orders(sizes, errors):
    """Slopes of the errors over the sizes, from one to the next."""
    return np.diff(np.log(errors)) / np.diff(np.log(sizes))


def slope(sizes, errors):
    """The slope of the line through all of them, for errors that scatter."""
    return np.polyfit(np.log(sizes), np.log(errors), 1)[0]


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


# Smooth data, Gauss points and the irregular mesh are those of the demo. Data are functions of the coordinates of points in
# the plane or in space; x is the first coordinate, v the last one.

demo = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[3] / "demos" / "limits.py")))
bias, kernel, start, end = demo.bias, demo.kernel, demo.start, demo.end


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
