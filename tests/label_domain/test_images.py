"""Pictures on label domains in the plane: no order of pixels is wrong, on any mesh and any number of ranks; and back."""

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_SELF
from helpers import label_space
from numpy.testing import assert_allclose

from fem_resnet import Channels, LabelSpace, point_space

on_ranks = pytest.mark.parallel([1, 2, 3])
EXTENT = (-1.5, 1.0, -1.2, 2.0)
ROUND_OFF = 1e-13


def picture(shape, extent=EXTENT, of=lambda x, y: 3 * x - 2 * y + 1):
    """A function at the centres of pixels, by loops."""
    left, right, bottom, top = extent
    m, n = shape
    return np.array([
        [of(left + (j + 0.5) * (right - left) / n, top - (i + 0.5) * (top - bottom) / m) for j in range(n)] for i in range(m)
    ])  # fmt: skip


def at_nodes(Y, of=lambda x, y: 3 * x - 2 * y + 1):
    return of(*Y.coordinates.T)


@on_ranks
@pytest.mark.parametrize("space", [("disk", "CG1"), ("disk", "DG0"), ("disk", "CG3"), ("annulus", "CG1"), ("polygon", "CG1")])
def test_a_linear_picture_is_that_function(space):
    """It has no symmetry: turned, reflected or transposed it would be another."""
    Y = label_space(*space)
    extent = (-1.5, 2.5, -1.2, 2.0)  # the outermost centres are beyond Y
    both = np.stack([picture((13, 31), extent), picture((13, 31), extent, lambda x, y: x + y)])
    batch = Y.image(both, extent=extent)
    expected = np.column_stack([at_nodes(Y), at_nodes(Y, lambda x, y: x + y)])
    assert_allclose(Y.values(batch), expected, rtol=0, atol=ROUND_OFF)
    one = Y.image(both[0], extent=extent)
    assert one.ufl_shape == ()
    assert_allclose(Y.values(one), expected[:, :1], rtol=0, atol=ROUND_OFF)
    mean = Y.image(both, extent=extent, method="mean")  # of pixels that are constant: half a pixel off at most
    assert np.abs(Y.values(mean) - expected).max(initial=0) < 3 * 4 / 31 + 2 * 3.2 / 13


@on_ranks
def test_pixels_are_the_cells_of_a_mesh_of_quadrilaterals_and_row_0_is_on_top():
    m, n = 5, 7
    mesh = fd.RectangleMesh(n, m, EXTENT[1], EXTENT[3], originX=EXTENT[0], originY=EXTENT[2], quadrilateral=True)
    Y = LabelSpace(fd.FunctionSpace(mesh, "DG", 0))
    pixels = np.random.default_rng(0).normal(size=(3, m, n))
    for method in ("linear", "mean"):
        batch = Y.image(pixels, extent=EXTENT, method=method)
        if method == "linear":
            assert_allclose(Y.pixels(batch, (m, n), extent=EXTENT), pixels, rtol=0, atol=ROUND_OFF)
    x, y = Y.coordinates.T
    column = np.floor((x - EXTENT[0]) / 2.5 * n).astype(int)
    row = m - 1 - np.floor((y - EXTENT[2]) / 3.2 * m).astype(int)
    assert_allclose(Y.values(Y.image(pixels, extent=EXTENT))[:, 2], pixels[2, row, column], rtol=0, atol=ROUND_OFF)


def test_a_picture_is_seen_as_matplotlib_shows_it():
    """Colours of imshow at places of its axes, read from what it draws."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pixels = np.random.default_rng(1).uniform(size=(4, 6))
    figure, axes = pyplot.subplots(figsize=(6, 6))
    axes.imshow(pixels, extent=EXTENT, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    figure.canvas.draw()
    drawn = np.asarray(figure.canvas.buffer_rgba())[..., 0] / 255
    left, right, bottom, top = EXTENT
    places = np.array([
        (left + (j + 0.5) * (right - left) / 6, top - (i + 0.5) * (top - bottom) / 4) for i in range(4) for j in range(6)
    ])  # fmt: skip
    column, up = np.round(axes.transData.transform(places)).astype(int).T
    seen = drawn[len(drawn) - 1 - up, column].reshape(4, 6)
    pyplot.close(figure)
    mesh = fd.RectangleMesh(6, 4, right, top, originX=left, originY=bottom, quadrilateral=True, comm=COMM_SELF)
    Y = LabelSpace(fd.FunctionSpace(mesh, "DG", 0))
    found = Y.pixels(Y.image(pixels, extent=EXTENT), (4, 6), extent=EXTENT)[0]
    assert_allclose(found, seen, rtol=0, atol=1 / 255)


@pytest.mark.parallel([1, 2])
def test_means_are_those_over_squares():
    """Of the picture x at its own pixels, where the integral is known; and a picture finer than the mesh keeps its mean."""
    Y = label_space("disk", "CG1", 2)
    fine = picture((640, 640), (-1, 1, -1, 1), lambda x, y: (x > 0.1) & (y < 0.2)).astype(float)
    values = Y.values(Y.image(fine, extent=(-1, 1, -1, 1), method="mean"))[:, 0]
    half = np.sqrt(Y.weights) / 2
    x, y = Y.coordinates.T
    low, high = np.maximum([x - half, y - half], -1), np.minimum([x + half, y + half], 1)
    wide = (high[0] - np.clip(0.1, low[0], high[0])) / (high[0] - low[0])
    tall = (np.clip(0.2, low[1], high[1]) - low[1]) / (high[1] - low[1])
    assert_allclose(values, wide * tall, rtol=0, atol=1e-11)
    checked = np.indices((640, 640)).sum(axis=0) % 2  # interpolation sees 0 or 1, or anything between
    flat = Y.values(Y.image(checked, extent=(-1, 1, -1, 1), method="mean"))
    assert np.abs(flat - 0.5).max(initial=0) < 0.01
    surrounded = Y.values(Y.image(np.ones((3, 3)), extent=(-0.2, 0.4, -0.3, 0.3), method="mean", outside=5.0))[:, 0]
    low, high = np.maximum([x - half, y - half], [[-0.2], [-0.3]]), np.minimum([x + half, y + half], [[0.4], [0.3]])
    inside = np.prod(np.maximum(high - low, 0), axis=0) / (4 * half**2)
    assert_allclose(surrounded, inside + 5 * (1 - inside), rtol=0, atol=1e-12)


@pytest.mark.parallel([1, 2])
def test_around_a_picture_is_nothing_or_one_value():
    Y = label_space("disk", "CG1", 2)
    extent = (-0.5, 0.5, -0.5, 0.5)
    inside = (np.abs(Y.coordinates) < 0.5).all(axis=1)
    with pytest.raises(ValueError, match=r"extent: expected a picture that covers all nodes, got \d+ of \d+ .*outside=0.0"):
        Y.image(np.ones((3, 4)), extent=extent)
    values = Y.values(Y.image(np.full((3, 4), 2.0), extent=extent, outside=7.0))[:, 0]
    # From the outermost centres on it goes to the pixels around, whose centres are as far.
    far = (np.abs(Y.coordinates) > [0.5 + 0.125, 0.5 + 1 / 6]).any(axis=1)
    deep = (np.abs(Y.coordinates) < [0.5 - 0.125, 0.5 - 1 / 6]).all(axis=1)
    assert np.allclose(values[far], 7) and np.allclose(values[deep], 2)
    assert ((values[inside] > 2 - 1e-12) & (values[inside] < 7)).all()


@pytest.mark.parallel([1, 2])
def test_turned_pictures_are_seen_from_other_places():
    Y = label_space("disk", "CG1", 2)
    angles, pixels = np.array([0.3, 2.0]), picture((9, 9), (-2, 2, -2, 2))
    turns = [np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in angles]
    places = np.stack([Y.coordinates @ turn for turn in turns])
    found = Y.values(Y.image(np.stack([pixels, pixels]), extent=(-2, 2, -2, 2), places=places))
    expected = np.column_stack([3 * x - 2 * y + 1 for x, y in (place.T for place in places)])
    assert_allclose(found, expected, rtol=0, atol=ROUND_OFF)


@on_ranks
def test_colours_are_channels():
    Y = label_space("disk", "CG1")
    product = Channels(Y, 3)
    pixels = np.random.default_rng(0).normal(size=(2, 5, 6, 3))
    batch = product.image(pixels, extent=(-1, 1, -1, 1))
    for c, part in enumerate(product.part(batch)):
        assert_allclose(Y.values(part), Y.values(Y.image(pixels[..., c], extent=(-1, 1, -1, 1))), rtol=0, atol=0)
    found = product.pixels(batch, (4, 3), extent=(-1, 1, -1, 1))
    assert found.shape == (2, 4, 3, 3)
    expected = Y.pixels(product.part(batch)[1], (4, 3), extent=(-1, 1, -1, 1))
    assert_allclose(found[..., 1], expected, rtol=0, atol=ROUND_OFF)
    one = product.image(pixels[0], extent=(-1, 1, -1, 1))
    assert_allclose(product.values(one)[:, 0], product.values(batch)[:, 0], rtol=0, atol=0)


@on_ranks
def test_pixels_of_a_function_are_those_of_one_rank_and_missing_where_there_is_no_cell():
    Y, alone = label_space("annulus", "CG1"), label_space("annulus", "CG1", alone=True)
    found, expected = (
        each.pixels(each.batch(np.cos(each.coordinates @ [[1.0, 0], [0.3, 2]])), (20, 30), extent=(-1, 1, -1, 1))
        for each in (Y, alone)
    )
    assert found.shape == (2, 20, 30)
    assert_allclose(found, expected, rtol=0, atol=ROUND_OFF)
    y, x = np.meshgrid(1 - (np.arange(20) + 0.5) / 10, -1 + (np.arange(30) + 0.5) / 15, indexing="ij")
    r = np.hypot(x, y)
    assert np.isnan(found[0][(r > 1) | (r < 0.4 * np.cos(np.pi / 12))]).all()
    assert np.isfinite(found[0][(r < np.cos(np.pi / 12)) & (r > 0.4)]).all()


@pytest.mark.parallel([1, 2])
def test_pictures_are_laid_onto_the_plane_alone():
    for Y, what in (
        (label_space("sphere", "CG1"), "in space of 3 dimensions"),
        (label_space("cube", "CG1"), "in space of 3 dimensions"),
        (label_space("interval", "CG3"), "in space of 1 dimensions"),
        (point_space(np.ones(5)), "a set of points"),
        (Channels(label_space("sphere", "CG1"), 2), "in space of 3 dimensions"),
    ):
        with pytest.raises(ValueError, match=f"Y: expected a label domain in the plane, .* got .*, {what}; evaluate"):
            Y.image(np.ones((2, 2)), extent=(0, 1, 0, 1))
        with pytest.raises(ValueError, match=f"Y: expected a label domain in the plane, .* got .*, {what}; evaluate"):
            Y.pixels(Y.batch(np.ones((Y.nodes, 1))), (2, 2), extent=(0, 1, 0, 1))


@pytest.mark.parallel([1, 2])
def test_wrong_pictures_are_refused_by_name():
    Y, C = label_space("disk", "CG1"), Channels(label_space("disk", "CG1"), 2)
    good, at = np.ones((3, 4)), (-1, 1, -1, 1)
    for call, message in (
        (lambda: Y.image(np.ones(3), extent=at), r"pixels: expected shape \(samples, rows, columns\), or .* got \(3,\)"),
        (lambda: Y.image(np.ones((2, 3, 4, 3)), extent=at), r"pixels: .* got \(2, 3, 4, 3\)"),
        (lambda: C.image(np.ones((2, 3, 4)), extent=at), r"pixels: expected shape \(samples, rows, columns, 2\), or"),
        (lambda: Y.image(np.full((3, 4), np.nan), extent=at), "pixels: expected finite numbers"),
        (lambda: Y.image(np.ones((0, 3, 4)), extent=at), "pixels: "),
        (lambda: Y.image(good, extent=(1, -1, -1, 1)), r"extent: expected \(left, right, bottom, top\), left < right"),
        (lambda: Y.image(good, extent=(-1, 1)), r"extent: expected numbers of shape \(4,\)"),
        (lambda: Y.image(good, extent=at, method="cubic"), "method: expected"),
        (lambda: Y.image(good, extent=at, places=np.zeros((2, Y.nodes, 2))), "places: expected"),
        (lambda: Y.pixels(Y.batch(np.ones((Y.nodes, 1))), 3, extent=at), r"shape: expected \(rows, columns\), got 3"),
        (lambda: Y.pixels(Y.batch(np.ones((Y.nodes, 1))), (0, 2), extent=at), "shape: expected a positive integer, got 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
