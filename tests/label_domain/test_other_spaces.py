"""Batches from Functions of other spaces and meshes, on disk, sphere and in 3D, on any ranks."""

from functools import cache

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_SELF, COMM_WORLD
from helpers import label_space
from numpy.testing import assert_allclose

from fem_resnet import Channels

on_ranks = pytest.mark.parallel([1, 2, 3])
ROUND_OFF = 1e-11


@cache
def meshes(domain, alone=False):
    comm = COMM_SELF if alone else COMM_WORLD
    return {
        "disk": lambda: fd.UnitDiskMesh(2, comm=comm),
        "sphere": lambda: fd.UnitIcosahedralSphereMesh(2, comm=comm),
        "cube": lambda: fd.UnitCubeMesh(3, 3, 3, comm=comm),
        "cube of hexes": lambda: fd.UnitCubeMesh(2, 3, 2, hexahedral=True, comm=comm),
    }[domain]()


def quadratic(x):
    return x[0] * x[1] + 2 * x[1] ** 2 - x[0] + 1


@on_ranks
@pytest.mark.parametrize("alone", [False, True], ids=["all ranks", "each rank alone"])
@pytest.mark.parametrize(
    "domain, on, element",
    [("disk", "disk", "CG2"), ("disk", "disk", "CG3"), ("cube", "cube", "CG2"), ("cube", "cube of hexes", "CG2")],
)  # fmt: skip
def test_what_the_other_space_holds_is_exact_at_the_nodes(domain, on, element, alone):
    """CG2 on triangles and tetrahedra is no label space of its own."""
    mesh = meshes(on, alone)
    x = fd.SpatialCoordinate(mesh)
    f = fd.Function(fd.FunctionSpace(mesh, element[:2], int(element[2]))).interpolate(quadratic(x))
    g = fd.Function(fd.VectorFunctionSpace(mesh, "CG", 1, dim=2)).interpolate(fd.as_vector([x[0], 3 - x[1]]))
    Y = label_space(domain, "CG1")
    found = Y.values(Y.batch([f, g, Y.batch(Y.coordinates)]))
    places = Y.coordinates.T
    expected = np.column_stack([quadratic(places), places[0], 3 - places[1], Y.coordinates])
    assert_allclose(found, expected, rtol=0, atol=ROUND_OFF)
    assert Y.batch(f).function_space() == Y.V


@on_ranks
def test_on_the_sphere_functions_of_finer_meshes_converge():
    Y = label_space("sphere", "CG1", 2)
    errors = []
    for refinement in (2, 4):
        mesh = fd.UnitCubedSphereMesh(refinement)
        x = fd.SpatialCoordinate(mesh)
        f = fd.Function(fd.FunctionSpace(mesh, "CG", 1)).interpolate(quadratic(x / fd.sqrt(fd.dot(x, x))))
        off = Y.values(Y.batch(f))[:, 0] - quadratic(Y.coordinates.T)
        errors.append(Y.comm.allreduce(float(np.abs(off).max(initial=0)), op=max))
    assert errors[1] < errors[0] / 8 and 1e-6 < errors[1] < 0.02, errors


@on_ranks
def test_on_its_own_mesh_another_space_is_interpolated():
    Y, cells = label_space("disk", "CG1"), label_space("disk", "DG0")
    mesh = Y.V.mesh()
    x = fd.SpatialCoordinate(mesh)
    f = fd.Function(fd.FunctionSpace(mesh, "CG", 2)).interpolate(quadratic(x))
    assert_allclose(Y.values(Y.batch(f))[:, 0], quadratic(Y.coordinates.T), rtol=0, atol=ROUND_OFF)
    linear = fd.Function(fd.FunctionSpace(mesh, "DG", 1)).interpolate(x[0] - 2 * x[1])
    assert_allclose(cells.values(cells.batch([linear]))[:, 0], cells.coordinates @ [1, -2], rtol=0, atol=ROUND_OFF)
    product = Channels(Y, 2)
    velocity = fd.Function(fd.VectorFunctionSpace(mesh, "CG", 2)).interpolate(fd.as_vector([quadratic(x), x[1] ** 2]))
    parts = product.part(product.batch([velocity, velocity]))
    for part, expected in zip(parts, (quadratic(Y.coordinates.T), Y.coordinates[:, 1] ** 2)):
        assert_allclose(Y.values(part), np.column_stack([expected] * 2), rtol=0, atol=ROUND_OFF)


@on_ranks
def test_functions_without_one_value_at_the_nodes_are_refused_by_name():
    Y = label_space("disk", "CG1")
    other = meshes("disk")
    half = fd.RectangleMesh(4, 4, 0.0, 1.0, originX=-1.0, originY=-1.0)

    def of(mesh, family, degree):
        return fd.Function(fd.FunctionSpace(mesh, family, degree))

    for given, message in (
        (of(other, "DG", 0), r"expected continuous Functions, as the nodes of .* between cells, got one of .*DG0.*project it"),
        (of(Y.V.mesh(), "DG", 0), "expected continuous Functions"),
        (of(other, "RT", 1), "expected Functions of numbers, or of vectors of numbers, got one of .*RT1"),
        (of(half, "CG", 1), r"expected Functions on a mesh that covers Y, .* got one without \d+ of 25 nodes, the first at"),
        (fd.Function(fd.TensorFunctionSpace(other, "CG", 1)), r"expected Functions whose values fit .*, got shape \(2, 2\)"),
        (fd.Function(label_space("sphere", "CG1").V), "expected Functions on a mesh in space of 2 dimensions, got one of 3"),
    ):
        with pytest.raises(ValueError, match=f"^fields: {message}"):
            Y.batch([Y.batch(Y.coordinates), given], "fields")
    with pytest.raises(TypeError, match="fields: expected a Function, got float"):
        Y.batch([of(other, "CG", 1), 2.0], "fields")
