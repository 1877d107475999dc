"""Label domains of few cells, costs, and direct optimisation, which tests of the value function share."""

from functools import cache

import firedrake as fd
import numpy as np
from firedrake import COMM_SELF, COMM_WORLD
from scipy.optimize import minimize

from fem_resnet import Basis, Box, Head, LabelSpace, cell_indicators


@cache
def sectors(number: int, inner: float, alone: bool = True) -> LabelSpace:
    """A disk or annulus of outer radius 1, cut into sectors; each is one cell with curved sides, and carries a constant."""
    comm = COMM_SELF if alone else COMM_WORLD
    flat = fd.RectangleMesh(1, number, 1.0, 1.0, quadrilateral=True, comm=comm)
    radius, angle = (x for x in fd.SpatialCoordinate(flat))
    radius, angle = inner + (1 - inner) * radius, 2 * fd.pi * angle
    x = fd.Function(fd.VectorFunctionSpace(flat, "DQ", 8))
    x.interpolate(fd.as_vector([radius * fd.cos(angle), radius * fd.sin(angle)]))
    return LabelSpace(fd.FunctionSpace(fd.Mesh(x, comm=comm), "DG", 0))


DISK, HALVES, ANNULUS = (1, 0.0), (2, 0.0), (3, 0.4)
#: The order that a scheme of first order shows at least on such grids, which are not quite in the asymptotic range.
FIRST_ORDER = 0.85


def order(errors) -> float:
    """The order observed over all rows of a table of errors, the least of its columns; each row has half the spacing."""
    return float(np.min(np.log2(np.divide(errors[0], errors[-1])) / (len(errors) - 1)))


def some_states(low, high, number=40, n=1, seed=0):
    return np.random.default_rng(seed).uniform(low, high, (n, number))


def control_cost(f, a, b, w):
    return f**2 / 2 + 0.1 * a**2 + 0.1 * np.tensordot(w, b**2, 1)


#: A box of controls on both sides of 0.
BOX = Box((-0.3, 0.4), (-0.6, 0.5))


#: W for three classes, in a basis of at most three functions, and mu. Class 1 has large first and small other cells.
W, MU = np.array([[-0.9, 0.7, 0.2], [1.2, -0.8, -0.4], [0.1, 0.3, 0.5]]), np.array([0.2, -0.1, 0.3])


def _functions(n):
    """The basis that the head reads, in the cells: neither orthonormal nor their indicators."""
    return 0.8 * np.eye(n) + 0.3 * np.tri(n, k=-1)


def reading(Y, prediction) -> Head:
    """A head onto three classes."""
    cells = cell_indicators(Y)
    head = Head(Basis(Y, cells.values @ _functions(cells.rank), "given"), 3, prediction)
    head.W.set(0, W[:, : cells.rank])
    head.mu.set(0, MU)
    return head


def scores(w, f):
    """What that head makes of columns of states on all cells, written out."""
    n = len(w)
    return W[:, :n] @ _functions(n).T @ (w[:, None] * f) + MU[:, None]


def distance(w, target):
    """(4.12), of columns of states."""
    return lambda f: w @ (f - target[:, None]) ** 2 / 2


def direct(w, box, sigma, terminal, v, T, running=None, layers=5, starts=8):
    """The least J over a and b in the box, constant on layers, by L-BFGS-B from many starts; gradients by complex steps."""
    n = len(w)
    size, h = layers * n * (n + 1), T / layers / 4

    def cost(x):  # for a column of parameters each
        rows = x.reshape(layers, n, n + 1, -1)
        f, J = np.repeat(v[:, None], x.shape[1], axis=1).astype(complex), 0.0
        for layer in rows:
            a, b = layer[:, 0], layer[:, 1:]

            def rate(f):
                speed = sigma(a - np.einsum("ijk,j,jk->ik", b, w, f))
                L = 0.0 if running is None else w @ np.array([running(f[i], a[i], b[i], w) for i in range(n)])
                return speed, L

            for _ in range(4):  # Runge-Kutta 4
                k1, l1 = rate(f)
                k2, l2 = rate(f + h / 2 * k1)
                k3, l3 = rate(f + h / 2 * k2)
                k4, l4 = rate(f + h * k3)
                f, J = f + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), J + h / 6 * (l1 + 2 * l2 + 2 * l3 + l4)
        return J + terminal(f)

    def with_gradient(x):
        J = cost(x[:, None] + 1e-30j * np.eye(size, size + 1, 1))
        return J[0].real, J[1:].imag / 1e-30

    bounds = np.array([[box.bias, *[box.kernel] * n]] * (n * layers)).reshape(size, 2)
    rng = np.random.default_rng(0)
    found = [
        minimize(with_gradient, rng.uniform(*bounds.T), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60})
        for _ in range(starts)
    ]
    return min(result.fun for result in found)
