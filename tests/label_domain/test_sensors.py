"""Values at points of a user: exact where the space holds a function, in the user's order, the same on any ranks; and back."""

from functools import cache

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_SELF, COMM_WORLD
from helpers import label_space, laplace
from numpy.testing import assert_allclose

from fem_resnet import Channels, LabelSpace, Sensors, given_basis, laplace_basis, point_space

on_ranks = pytest.mark.parallel([1, 2, 3])
ROUND_OFF = 1e-11


def on_disk(rng, count):
    """Some of them on the circle, outside of the polygon that the mesh is."""
    r, angle = rng.uniform(0, 1, count) ** 0.5, rng.uniform(0, 2 * np.pi, count)
    r[::5] = 1.0
    return np.column_stack([r * np.cos(angle), r * np.sin(angle)])


def on_sphere(rng, count):
    x = rng.normal(size=(count, 3))
    return x / np.linalg.norm(x, axis=1)[:, None]


def on_torus(rng, count):
    """Half of them where the surface bends most, at the inner equator."""
    u, v = rng.uniform(0, 2 * np.pi, (2, count))
    v[::2] = np.pi + rng.uniform(-0.3, 0.3, v[::2].size)
    return np.column_stack([(3 + np.cos(v)) * np.cos(u), (3 + np.cos(v)) * np.sin(u), np.sin(v)])


def on_annulus(rng, count):
    """Its mesh is extruded and periodic: the last layer of cells has nodes of the first."""
    r, angle = rng.uniform(0.45, 0.95, count), rng.uniform(0, 2 * np.pi, count)
    return np.column_stack([r * np.cos(angle), r * np.sin(angle)])


def in_box(rng, count):
    return rng.uniform(0.02, 0.98, (count, 3)) * [0.5, 0.5, 0.5]


@cache
def torus(alone):
    mesh = fd.TorusMesh(24, 12, 3.0, 1.0, comm=COMM_SELF if alone else COMM_WORLD)
    return laplace_basis(LabelSpace(fd.FunctionSpace(mesh, "CG", 1)), 5)


#: A basis, on all ranks or on each alone, and points on its Y.
BASES = {
    "disk": (lambda alone: laplace("disk", "CG3", 6, alone=alone), on_disk),
    "cells of the disk": (lambda alone: laplace("disk", "DG0", 6, alone=alone), on_disk),
    "sphere": (lambda alone: laplace("sphere", "CG1", 9, alone=alone), on_sphere),
    "torus": (torus, on_torus),
    "annulus": (lambda alone: laplace("annulus", "CG1", 5, alone=alone), on_annulus),
    "cells of the annulus": (lambda alone: laplace("annulus", "DG0", 5, alone=alone), on_annulus),
    "cube": (lambda alone: laplace("cube", "CG1", 5, alone=alone), in_box),
    "hexes": (lambda alone: laplace("hexes", "CG2", 5, alone=alone), in_box),
    "prisms": (lambda alone: laplace("prisms", "CG1", 4, alone=alone), in_box),
}
each_basis = pytest.mark.parametrize("domain", BASES)


def made(domain, count=40, alone=False, seed=0, **more) -> Sensors:
    basis, points = BASES[domain]
    return Sensors(basis(alone), points(np.random.default_rng(seed), count), **more)


def coefficients(sensors, samples=3, seed=1):
    return np.random.default_rng(seed).normal(size=(sensors.basis.rank, samples))


# -- from functions to values ------------------------------------------------------------------------------------------


@on_ranks
@each_basis
def test_values_and_gradients_are_those_of_one_rank_in_the_order_of_the_user(domain):
    sensors, alone = made(domain), made(domain, alone=True)
    c = coefficients(sensors)
    given, expected = (s.evaluate(s.basis.function(c)) for s in (sensors, alone))
    assert given.shape == (40, 3)
    assert_allclose(given, expected, rtol=0, atol=1e-9)
    order = np.random.default_rng(5).permutation(40)
    points = BASES[domain][1](np.random.default_rng(0), 40)
    turned = Sensors(sensors.basis, points[order]).evaluate(sensors.basis.function(c))
    assert_allclose(turned, given[order], rtol=0, atol=ROUND_OFF)
    if "cells" not in domain:
        slopes = [s.gradients(s.basis.function(c)) for s in (sensors, alone)]
        assert_allclose(*slopes, rtol=0, atol=1e-8)


def polynomial(x, degree):
    """A polynomial in all coordinates, and its gradient."""
    a = np.arange(1.0, 1.0 + x.shape[1])
    s = x @ a + 0.3
    return s**degree, degree * s[:, None] ** (degree - 1) * a


@on_ranks
@pytest.mark.parametrize(("domain", "degree"), [("disk", 3), ("annulus", 1), ("cube", 1), ("hexes", 2), ("prisms", 1)])
def test_polynomials_of_the_space_and_their_gradients_are_exact_also_beyond_the_polygon(domain, degree):
    sensors = made(domain)
    Y = sensors.Y
    x = BASES[domain][1](np.random.default_rng(0), 40)
    batch = Y.batch(polynomial(Y.coordinates, degree)[0])
    value, slope = polynomial(x, degree)
    assert_allclose(sensors.evaluate(batch)[:, 0], value, rtol=0, atol=ROUND_OFF)
    assert_allclose(sensors.gradients(batch)[..., 0], slope, rtol=0, atol=1e-10)


def test_on_the_sphere_values_and_tangential_gradients_converge():
    points = on_sphere(np.random.default_rng(2), 200)
    errors = []
    for refinement in (2, 3, 4):
        Y = label_space("sphere", "CG1", refinement)
        x = Y.coordinates
        sensors, batch = Sensors(given_basis(Y, [1.0]), points), Y.batch(x[:, 0] * x[:, 1] + x[:, 2])
        value = points[:, 0] * points[:, 1] + points[:, 2]
        slope = np.column_stack([points[:, 1], points[:, 0], np.ones(200)])
        slope -= np.sum(slope * points, axis=1)[:, None] * points
        off = [sensors.evaluate(batch)[:, 0] - value, sensors.gradients(batch)[..., 0] - slope]
        errors.append([np.sqrt(np.mean(each**2)) for each in off])
    orders = np.log2(np.array(errors)[:-1] / np.array(errors)[1:])
    assert (orders[:, 0] > 1.8).all() and (orders[:, 1] > 0.8).all(), orders


@on_ranks
@pytest.mark.parametrize(
    "mesh",
    [
        lambda: fd.TorusMesh(10, 6, 3.0, 1.0),  # across its hole lie cells that have points above them
        lambda: fd.UnitIcosahedralSphereMesh(0),
        lambda: fd.UnitCubedSphereMesh(1),
        lambda: fd.CircleManifoldMesh(5),
        lambda: fd.UnitSquareMesh(3, 3, quadrilateral=True),
        lambda: fd.UnitIntervalMesh(7),
    ],
)  # fmt: skip
def test_nodes_of_the_mesh_have_their_own_values(mesh):
    Y = LabelSpace(fd.FunctionSpace(mesh(), "CG", 1))
    points = np.concatenate(Y.comm.allgather(Y.coordinates))
    values = np.cos(points.sum(axis=1) + points[:, 0])
    batch = Y.batch(np.cos(Y.coordinates.sum(axis=1) + Y.coordinates[:, 0]))
    assert_allclose(Sensors(given_basis(Y, [1.0]), points).evaluate(batch)[:, 0], values, rtol=0, atol=ROUND_OFF)


@on_ranks
def test_points_between_cells_of_a_coarser_sphere_do_not_see_the_partition():
    """Nodes of the next finer mesh lie in front of edges: two cells are as near."""
    points = np.concatenate(COMM_WORLD.allgather(label_space("sphere", "CG1", 2).coordinates))
    values = [
        Sensors(basis, points).evaluate(basis.function(np.ones((9, 1))))
        for basis in (laplace("sphere", "CG1", 9), laplace("sphere", "CG1", 9, alone=True))
    ]
    assert_allclose(*values, rtol=0, atol=1e-9)


@on_ranks
def test_points_that_are_not_on_Y_are_refused_with_their_numbers():
    basis = laplace("disk", "CG1", 4)
    points = [[0.1, 0.2], [2.0, 0.0], [0.3, 0.3], [0.0, -1.5]]
    message = r"points: expected points on Y, .* than 0.25 of its size, got 2 of 4 that are: numbers 1, 3, the first at \[2.0"
    with pytest.raises(ValueError, match=message):
        Sensors(basis, points)
    with pytest.raises(ValueError, match=r"points: .* got 2 of 6 that are: numbers 1 of sample 1, 3 of sample 1"):
        Sensors(basis, [np.zeros((2, 2)), np.array(points)])
    sphere = laplace("sphere", "CG1", 4)
    mesh = sphere.Y.V.mesh()
    before = mesh.tolerance
    with pytest.raises(ValueError, match=r"points: .* got 1 of 2 that are: number 1, the first at \[0.0, 0.0, 1.4\]"):
        Sensors(sphere, [[0, 0, 1.0], [0, 0, 1.4]])
    with pytest.raises(ValueError, match=r"points: .* than 0.001 of its size"):
        Sensors(sphere, on_sphere(np.random.default_rng(0), 3), tolerance=1e-3)
    assert mesh.tolerance == before


@on_ranks
def test_a_set_of_points_has_no_others():
    basis = given_basis(point_space(np.ones(7)), [1.0])
    with pytest.raises(ValueError, match=r"basis: expected functions on a mesh, got some on LabelSpace\(7 .*Y\.numbers"):
        Sensors(basis, [[1.0]])


@on_ranks
def test_discontinuous_functions_have_no_gradient():
    sensors = made("cells of the disk")
    with pytest.raises(ValueError, match="Y: expected continuous functions, which have gradients, got .*use CG"):
        sensors.gradients(sensors.basis.function(np.ones(6)))


@on_ranks
@pytest.mark.parametrize("scale", [1e-6, 6371220.0])
@pytest.mark.parametrize("domain", ["disk", "sphere"])
def test_neither_points_nor_fits_see_the_unit_of_length(domain, scale):
    """The coefficients of functions that are orthonormal on a surface go as a length."""
    mesh = fd.UnitDiskMesh(1) if domain == "disk" else fd.UnitIcosahedralSphereMesh(1)
    mesh.coordinates.assign(scale * mesh.coordinates)
    points = BASES[domain][1](np.random.default_rng(0), 40)
    d = np.random.default_rng(1).normal(size=(40, 2))
    basis, one = laplace_basis(LabelSpace(fd.FunctionSpace(mesh, "CG", 1)), 4), laplace(domain, "CG1", 4)
    sensors, unit = Sensors(basis, scale * points), Sensors(one, points)
    fit, expected = sensors.fit(d, 0.1 * scale**2), unit.fit(d, 0.1)
    assert_allclose(fit.coefficients / scale, expected.coefficients, rtol=0, atol=1e-8)
    assert_allclose(fit.conditions, expected.conditions, rtol=1e-8)
    assert_allclose(sensors.evaluate(fit.functions), unit.evaluate(expected.functions), rtol=0, atol=1e-8)
    slopes = scale * sensors.gradients(fit.functions), unit.gradients(expected.functions)
    assert_allclose(*slopes, rtol=0, atol=1e-7)


# -- from values to functions ------------------------------------------------------------------------------------------


@on_ranks
@each_basis
def test_a_function_of_the_basis_comes_back_to_round_off(domain):
    weights = np.random.default_rng(3).uniform(0.5, 2, 40)
    sensors = made(domain, weights=weights)
    c = coefficients(sensors)
    fit = sensors.fit(sensors.evaluate(sensors.basis.function(c)))
    assert_allclose(fit.coefficients, c, rtol=0, atol=ROUND_OFF * fit.conditions.max())
    assert_allclose(sensors.Y.values(fit.functions), sensors.basis.expand(c), rtol=0, atol=1e-10)
    assert fit.conditions.max() < 100
    assert fit.residuals.max() < ROUND_OFF and fit.left_out.max() < ROUND_OFF


def normal_equations(sensors, d, weights, lam, penalty):
    """The formula of the module's head, on its own."""
    basis = sensors.basis
    E = sensors.evaluate(basis.function(np.eye(basis.rank)))
    W = np.diag(weights / weights.sum()) * basis.Y.measure
    R = basis.stiffness if penalty == "gradient" else basis.gram
    return np.linalg.solve(E.T @ W @ E + lam * R, E.T @ W @ d)


@on_ranks
@pytest.mark.parametrize("penalty", ["gradient", "identity"])
def test_coefficients_minimise_what_is_said(penalty):
    """In a basis that is not orthonormal, on a sphere of measure 11; also with gaps."""
    Y = label_space("sphere", "CG1")
    x = fd.SpatialCoordinate(Y.V.mesh())
    weights = np.random.default_rng(3).uniform(0.5, 2, 40)
    points = on_sphere(np.random.default_rng(0), 40)
    sensors = Sensors(given_basis(Y, [1, x[0], x[1] + 0.3, x[2] * x[0]]), points, weights=weights)
    d = np.random.default_rng(4).normal(size=(40, 3))
    fit = sensors.fit(d, 0.2, penalty=penalty)
    assert_allclose(fit.coefficients, normal_equations(sensors, d, weights, 0.2, penalty), rtol=1e-10)
    d[7, 1] = d[3:9, 2] = np.nan
    with pytest.raises(ValueError, match="values: expected finite numbers, got 7 of 120 .*gaps=True takes NaN for a gap"):
        sensors.fit(d, 0.2)
    fit = sensors.fit(d, 0.2, penalty=penalty, gaps=True)
    for k in range(3):
        there = np.isfinite(d[:, k])
        few = Sensors(sensors.basis, points[there], weights=weights[there])
        expected = normal_equations(few, d[there, k], weights[there], 0.2, penalty)
        assert_allclose(fit.coefficients[:, k], expected, rtol=1e-10)
        off = few.evaluate(few.basis.function(expected[:, None]))[:, 0] - d[there, k]
        relative = np.sqrt(weights[there] @ off**2 / (weights[there] @ d[there, k] ** 2))
        assert fit.residuals[k] == pytest.approx(relative, rel=1e-10)


def test_left_out_values_are_predicted_from_the_others():
    sensors = made("disk", 20)
    d = np.random.default_rng(4).normal(size=(20, 1))
    off = []
    for i in range(20):
        gap = d.copy()
        gap[i] = np.nan
        fit = sensors.fit(gap, gaps=True)
        off.append(sensors.evaluate(fit.functions)[i, 0] - d[i, 0])
    assert sensors.fit(d).left_out[0] == pytest.approx(np.linalg.norm(off) / np.linalg.norm(d), rel=1e-9)
    few = made("disk", 6)
    fit = few.fit(d[:6])
    assert fit.residuals[0] < 1e-10 and fit.left_out[0] == np.inf


@on_ranks
def test_with_noise_the_regularised_function_is_nearer_than_the_interpolated_one():
    """20 noisy values of a smooth function, 20 functions: interpolation takes all the noise."""
    basis = laplace("disk", "CG3", 20)
    Y, rng = basis.Y, np.random.default_rng(6)
    points = on_disk(rng, 20) * 0.98
    sensors = Sensors(basis, points)
    c = np.zeros((20, 5))
    c[:6] = rng.normal(size=(6, 5))
    exact = basis.function(c)
    values = sensors.evaluate(exact)
    values += 0.05 * np.abs(values).mean() * rng.normal(size=values.shape)

    def error(lam):
        fit = sensors.fit(values, lam)
        return Y.norm(Y.batch(Y.values(fit.functions) - Y.values(exact))) / Y.norm(exact), fit

    (interpolated, plain), (regularised, smooth) = error(0.0), error(1e-3)
    assert plain.residuals.max() < 1e-8 and interpolated > 0.2
    assert regularised < 0.5 * interpolated
    assert smooth.conditions.max() < 0.1 * plain.conditions.max()
    assert (smooth.residuals > 1e-3).all()


@on_ranks
def test_each_sample_has_its_own_points():
    basis, rng = laplace("disk", "CG1", 6), np.random.default_rng(7)
    points = [on_disk(rng, count) for count in (15, 9, 30)]
    weights = [rng.uniform(1, 2, len(each)) for each in points]
    sensors = Sensors(basis, points, weights=weights)
    c = rng.normal(size=(6, 3))
    batch = basis.function(c)
    values, slopes = sensors.evaluate(batch), sensors.gradients(batch)
    noisy = [each + 0.1 * rng.normal(size=each.shape) for each in values]
    noisy[1][2] = np.nan
    fit = sensors.fit(noisy, 0.01, gaps=True)
    for k, own in enumerate(points):
        one = Sensors(basis, own, weights=weights[k])
        assert_allclose(values[k], one.evaluate(batch)[:, k], rtol=0, atol=ROUND_OFF)
        assert_allclose(slopes[k], one.gradients(batch)[..., k], rtol=0, atol=ROUND_OFF)
        alone = one.fit(noisy[k][:, None], 0.01, gaps=True)
        assert_allclose(fit.coefficients[:, k], alone.coefficients[:, 0], rtol=0, atol=ROUND_OFF)
        for name in ("residuals", "left_out", "conditions"):
            assert getattr(fit, name)[k] == pytest.approx(getattr(alone, name)[0], rel=1e-9)
    with pytest.raises(ValueError, match="batch: expected 3 samples, as many as have points, got 2"):
        sensors.evaluate(basis.function(c[:, :2]))
    with pytest.raises(ValueError, match="values: expected 3 arrays, one for each sample, got 2"):
        sensors.fit(noisy[:2])


def test_more_samples_than_are_evaluated_at_once_keep_their_points():
    basis, rng = laplace("disk", "CG1", 6), np.random.default_rng(7)
    points = [on_disk(rng, 8) for _ in range(150)]
    sensors = Sensors(basis, points)
    c = rng.normal(size=(6, 150))
    values = sensors.evaluate(basis.function(c))
    assert len(values) == 150
    assert_allclose(sensors.fit(values).coefficients, c, rtol=0, atol=1e-8)
    assert_allclose(values[149], Sensors(basis, points[149]).evaluate(basis.function(c))[:, 149], rtol=0, atol=ROUND_OFF)


@on_ranks
def test_channels_are_measured_at_the_same_points():
    one = laplace("sphere", "CG1", 4)
    Y = Channels(one.Y, 3)
    basis, points, rng = laplace_basis(Y, 4), on_sphere(np.random.default_rng(0), 25), np.random.default_rng(1)
    sensors, plain = Sensors(basis, points), Sensors(one, points)
    c = rng.normal(size=(12, 2))
    batch = basis.function(c)
    values, slopes = sensors.evaluate(batch), sensors.gradients(batch)
    assert values.shape == (25, 3, 2) and slopes.shape == (25, 3, 3, 2)
    for k, part in enumerate(Y.part(batch)):
        assert_allclose(values[:, k], plain.evaluate(part), rtol=0, atol=ROUND_OFF)
        assert_allclose(slopes[:, :, k], plain.gradients(part), rtol=0, atol=ROUND_OFF)
    values[4, 1, 0] = np.nan  # a gap of one channel alone
    fit = sensors.fit(values, gaps=True)
    assert_allclose(fit.coefficients, c, rtol=0, atol=1e-10)
    assert fit.residuals.shape == fit.conditions.shape == (2,)
    own = Sensors(basis, [points[:20], points[5:]])
    values = own.evaluate(batch)
    assert values[0].shape == (20, 3)
    assert_allclose(own.fit(values).coefficients, c, rtol=0, atol=1e-10)


@on_ranks
def test_values_that_determine_nothing_are_refused():
    sensors = made("disk", 4)
    with pytest.raises(ValueError, match=r"lam: expected .* values at 4 points do not determine the 6 functions"):
        sensors.fit(np.ones((4, 2)))
    assert sensors.fit(np.ones((4, 2)), 0.1).residuals.max() < 1e-10  # a constant costs nothing
    with pytest.raises(ValueError, match="values: expected at least one value of positive weight a sample"):
        sensors.fit(np.full((4, 2), np.nan), 0.1, gaps=True)
    assert sensors.fit(np.zeros((4, 1)), 0.1).residuals[0] == 0
