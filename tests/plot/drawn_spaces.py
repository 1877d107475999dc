"""Label domains of every kind that can be drawn."""

from functools import cache

import firedrake as fd
from firedrake import COMM_SELF, COMM_WORLD
from helpers import label_space

from fem_resnet import LabelSpace


def _curved(comm):
    """A disk of triangles with curved sides."""
    disk = fd.UnitDiskMesh(1, comm=comm)
    x = fd.Function(fd.VectorFunctionSpace(disk, "CG", 3))
    y = fd.SpatialCoordinate(disk)
    x.interpolate((1 + 0.2 * fd.dot(y, y)) * y)
    return fd.Mesh(x)


#: Closed curves and surfaces, and meshes whose coordinates jump.
CLOSED = {
    "circle": lambda comm: fd.CircleManifoldMesh(12, comm=comm),
    "periodic interval": lambda comm: fd.PeriodicUnitIntervalMesh(9, comm=comm),
    "periodic square": lambda comm: fd.PeriodicUnitSquareMesh(4, 3, comm=comm),
    "torus": lambda comm: fd.TorusMesh(8, 6, 2.0, 0.7, comm=comm),
    "curved disk": _curved,
}


@cache
def space_of(domain: str, element: str, alone: bool = False) -> LabelSpace:
    """On all ranks, or the whole of it on each rank alone."""
    if domain not in CLOSED:
        return label_space(domain, element, alone=alone)
    mesh = CLOSED[domain](COMM_SELF if alone else COMM_WORLD)
    return LabelSpace(fd.FunctionSpace(mesh, element[:-1], int(element[-1])))
