"""Label domains of few cells, a box of controls and a running cost, which tests of the value function share."""

from functools import cache

import firedrake as fd
import numpy as np
from firedrake import COMM_SELF, COMM_WORLD

from fem_resnet import Box, LabelSpace


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
