"""What is drawn of a mesh is the whole of it, with the values that the function has there, whatever the partition."""

import firedrake as fd
import numpy as np
import pytest
from drawn_spaces import CLOSED, space_of
from helpers import SPACES, name
from numpy.testing import assert_allclose

from fem_resnet import class_space, point_space
from fem_resnet.plot.shown import Shown

DRAWN = [*SPACES, *((domain, element) for domain in CLOSED for element in ("DG0", "CG1"))]
by_space = pytest.mark.parametrize("space", DRAWN, ids=name)


def linear(x):
    """A linear function of the coordinates."""
    return 1.0 + x @ [0.7, -0.4, 0.3][: x.shape[-1]]


def sizes(corners):
    """Length or area of each piece."""
    sides = corners[:, 1:] - corners[:, :1]
    gram = sides @ sides.transpose(0, 2, 1)
    return np.sqrt(np.linalg.det(gram)) / (1 if sides.shape[1] == 1 else 2)


@pytest.mark.parallel([1, 2, 3])
@by_space
def test_pieces_cover_the_mesh_and_have_the_values_of_the_function(space):
    Y = space_of(*space)
    shown = Shown(Y)
    # Where a mesh is periodic a coordinate jumps; a constant does not.
    periodic = space[0].startswith("periodic")
    field = np.ones(Y.nodes) if periodic else linear(Y.coordinates)
    values = shown.values(np.column_stack([field, 2 * field]))
    measure = _boundary(Y.V.mesh()) if shown.is_body else Y.measure
    if Y.comm.rank:
        assert shown.corners is None and values is None
        return
    pieces = sizes(shown.corners)
    curved = space[0] in ("curved disk", "prisms on the polygon")
    assert_allclose(pieces.sum(), measure, rtol=0.02 if curved else 1e-12)
    assert_allclose(values[1], 2 * values[0])
    if Y.V.ufl_element().embedded_superdegree > 0 and not curved:
        assert_allclose(values[0], np.ones_like(values[0]) if periodic else linear(shown.corners), atol=1e-10)
    else:  # the value at the midpoint of a cell is the mean of a linear function over it
        assert values.shape == (2, *shown.corners.shape[:2])
        if not shown.is_body and not curved:
            assert_allclose(pieces @ values[0].mean(axis=1), Y.measure if periodic else _integral(shown, pieces), rtol=1e-10)


def _boundary(mesh):
    """The area of the boundary of a body."""
    parts = (fd.ds_v, fd.ds_t, fd.ds_b) if mesh.extruded else (fd.ds,)
    return sum(fd.assemble(fd.Constant(1.0) * part(domain=mesh)) for part in parts)


def _integral(shown, pieces):
    return pieces @ linear(shown.corners.mean(axis=1))


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("space", [("disk", "DG0"), ("annulus", "CG2"), ("block", "CG1"), ("torus", "DG0")], ids=name)
def test_any_partition_gives_the_same_pieces_in_the_same_order(space):
    Y, alone = space_of(*space), space_of(*space, alone=True)
    shown, expected = Shown(Y), Shown(alone)
    values, of_one = (part.values(np.sin(3 * linear(part.Y.coordinates))[:, None]) for part in (shown, expected))
    if Y.comm.rank == 0:
        assert_allclose(shown.corners, expected.corners, atol=1e-12)
        assert_allclose(values, of_one, atol=1e-12)


@pytest.mark.parallel([1, 2, 3])
def test_sets_of_points_are_shown_in_the_order_of_their_numbers():
    places = np.random.default_rng(0).normal(size=(7, 2))
    for Y, expected in ((class_space(7), (np.arange(7) + 0.5)[:, None]), (point_space(np.ones(7), places), places)):
        shown = Shown(Y)
        values = shown.values(1.0 * Y.numbers[:, None])
        if Y.comm.rank == 0:
            assert shown.dimension == 0
            assert_allclose(shown.corners[:, 0], expected, atol=1e-9)
            assert_allclose(values[0, :, 0], np.arange(7))
