"""The label measure: weights, |Y|, inner products and Riesz maps on every kind of mesh, and what is refused."""

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import BLOCK, POLYGON, SAMPLES, SPACES, label_space, mesh, name, smooth
from numpy.testing import assert_allclose

from fem_resnet import Channels, LabelSpace, class_space, laplace_basis

each_space = pytest.mark.parametrize("space", SPACES, ids=name)
on_ranks = pytest.mark.parallel([1, 2, 3])
on_two_ranks = pytest.mark.parallel([1, 2])

# Sums of some hundred numbers of size one.
ROUND_OFF = 1e-13


def _disk_area(refinement):
    """UnitDiskMesh is a square whose boundary, 2^n edges a half side, was moved to the circle along its rays."""
    angles = np.arctan(np.linspace(0, 1, 2**refinement + 1))
    return 8 * np.sin(np.diff(angles)).sum() / 2


AREAS = {
    "interval": 1.0,
    "disk": _disk_area(1),
    "annulus": 12 / 2 * np.sin(2 * np.pi / 12) * (1 - 0.4**2),
    "square": 1.0,
    "cube": 1.0,
    "hexes": 1.0,
    "prisms": 1.0,
    "polygon": POLYGON.integral(lambda x, y: x),
    "block": BLOCK.integral(lambda x, y: x) / 2,
}


# -- weights and the integral ----------------------------------------------------------------------------------------


@on_ranks
@each_space
def test_weights_are_positive_and_sum_to_the_measure(space):
    Y = label_space(*space)
    assert Y.weights.shape == (Y.nodes,) and (Y.weights > 0).all()
    assert int(Y.sum(Y.nodes)) == Y.size
    assert abs(Y.measure - Y.sum(Y.weights.sum())) <= ROUND_OFF * Y.measure
    if space[0] in AREAS:
        assert_allclose(Y.measure, AREAS[space[0]], rtol=ROUND_OFF)


@on_ranks
def test_measure_of_an_immersed_icosahedron_is_its_area():
    Y = label_space("sphere", "DG0", 0)
    edge = 4 / np.sqrt(10 + 2 * np.sqrt(5))
    assert (Y.size, Y.coordinates.shape[1]) == (20, 3)
    assert_allclose(Y.measure, 5 * np.sqrt(3) * edge**2, rtol=ROUND_OFF)


@on_ranks
@pytest.mark.parametrize(
    "space", [("disk", "CG3"), ("annulus", "CG2"), ("sphere", "CG1"), ("cube", "DG0"), ("prisms", "CG1")], ids=name
)
def test_sums_of_node_values_integrate_the_members_of_the_space(space):
    Y = label_space(*space)
    f = fd.Function(Y.V)
    f.dat.data_wo[:] = smooth(Y, 1)[:, 0]
    assert_allclose(Y.sum(Y.weights @ f.dat.data_ro), fd.assemble(f * fd.dx), rtol=0, atol=ROUND_OFF * Y.measure)


@on_ranks
@pytest.mark.parametrize("space, degree", [("interval CG3", 5), ("square CG3", 5), ("hexes CG2", 3), ("cube CG1", 1)])
def test_spectral_spaces_integrate_polynomials_of_twice_their_degree(space, degree):
    """int x^p dx = 1 / (p + 1) for p < 2k, the degree of Gauss-Lobatto, on cells of the unit cube."""
    Y = label_space(*space.split())
    found = [float(Y.sum(Y.weights @ Y.coordinates[:, 0] ** p)) for p in range(degree + 1)]
    assert_allclose(found, [1 / (p + 1) for p in range(degree + 1)], rtol=ROUND_OFF)


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5])
def test_kmv_on_triangles(degree):
    Y = LabelSpace(fd.FunctionSpace(mesh("disk"), "KMV", degree))
    assert_allclose(Y.measure, label_space("disk", "DG0").measure, rtol=ROUND_OFF)


@on_two_ranks
@pytest.mark.parametrize("family, degree", [("KMV", 2), ("KMV", 3), ("CG", 3)])
def test_triangles_with_curved_sides_on_a_sphere(family, degree):
    """The measure is that of the curved cells; the mean of y_k^2 is 1/3, and eigenvalues of the sphere are l (l + 1)."""
    sphere = fd.UnitIcosahedralSphereMesh(1, degree=2, comm=COMM_WORLD)
    Y = LabelSpace(fd.FunctionSpace(sphere, family, degree))
    assert_allclose(Y.measure, fd.assemble(fd.Constant(1.0) * fd.dx(domain=sphere)), rtol=1e-4)
    assert_allclose(Y.measure, 4 * np.pi, rtol=2e-3)
    assert_allclose(Y.sum(Y.weights @ Y.coordinates**2) / Y.measure, 1 / 3, rtol=2e-3)
    assert_allclose(laplace_basis(Y, 9).eigenvalues, [0, 2, 2, 2, 6, 6, 6, 6, 6], rtol=5e-3, atol=1e-8)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_kmv_on_tetrahedra(degree):
    # On one rank only: KMV of degree 3 on tetrahedra is another space on another partition in Firedrake 2026.10.
    Y = LabelSpace(fd.FunctionSpace(mesh("cube"), "KMV", degree))
    assert_allclose(Y.measure, 1.0, rtol=ROUND_OFF)


@on_ranks
@pytest.mark.parametrize("domain", ["interval", "disk", "sphere", "cube"])
def test_coordinates_of_nodes_are_those_of_vertices_and_midpoints(domain):
    Y, x = label_space(domain, "DG0"), mesh(domain).coordinates
    vertices = x.dat.data_ro_with_halos.reshape(-1, mesh(domain).geometric_dimension)
    midpoints = np.full((Y.nodes, vertices.shape[1]), np.nan)
    midpoints[Y.V.cell_node_map().values[: Y.nodes, 0]] = vertices[x.cell_node_map().values[: Y.nodes]].mean(axis=1)
    assert_allclose(Y.coordinates, midpoints, rtol=0, atol=ROUND_OFF)
    if domain != "interval":
        assert_allclose(label_space(domain, "CG1").coordinates, x.dat.data_ro, rtol=0, atol=ROUND_OFF)


# -- inner product and Riesz map -------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("domain", ["disk", "sphere", "cube"])
def test_inner_product_is_that_of_ufl_where_products_stay_in_the_space(domain):
    Y = label_space(domain, "DG0")
    f, g = Y.batch(smooth(Y, seed=1)), Y.batch(smooth(Y, seed=2))
    assert_allclose(Y.inner(f, g), fd.assemble(fd.inner(f, g) * fd.dx), rtol=ROUND_OFF)
    assert_allclose(Y.norm(f), fd.norm(f), rtol=ROUND_OFF)


@on_ranks
@each_space
def test_inner_product_is_the_weighted_sum_over_nodes_and_samples(space):
    Y = label_space(*space)
    F, G = smooth(Y, seed=1), smooth(Y, seed=2)
    f, g = Y.batch(F), Y.batch(G)
    by_sample = [float(Y.sum(np.sum(Y.weights * F[:, s] * G[:, s]))) for s in range(SAMPLES)]
    assert_allclose(Y.inner(f, g), sum(by_sample), rtol=ROUND_OFF)
    assert_allclose(Y.norm(f), np.sqrt(Y.inner(f, f)), rtol=ROUND_OFF)
    assert_allclose(Y.inner(Y.batch(F[:, 0]), Y.batch(G[:, 0])), by_sample[0], rtol=ROUND_OFF)


@on_ranks
@pytest.mark.parametrize("space", [("disk", "CG1"), ("square", "CG3"), ("sphere", "DG0")], ids=name)
def test_riesz_map_represents_a_functional_in_the_label_measure(space):
    """(riesz(d), g) = <d, g> for all g."""
    Y = label_space(*space)
    g = Y.batch(smooth(Y, seed=1))
    functional = fd.Cofunction(g.function_space().dual())
    functional.dat.data_wo[...] = smooth(Y, seed=2)
    pairing = float(Y.sum(np.sum(smooth(Y, seed=2) * smooth(Y, seed=1))))
    representative = Y.riesz_map(functional)
    assert_allclose(Y.inner(representative, g), pairing, rtol=ROUND_OFF * 10)
    assert_allclose(Y.values(representative) * Y.weights[:, None], Y.values(functional), rtol=4e-16)


# -- class_space -----------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("classes", [1, 2, 10])
def test_an_integral_over_classes_is_a_sum(classes):
    Y = class_space(classes)
    assert_allclose(Y.weights, 1.0, rtol=ROUND_OFF)
    assert (Y.size, int(Y.sum(Y.nodes))) == (classes, classes)
    assert_allclose(Y.measure, classes, rtol=ROUND_OFF)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("classes", [0, -1, 2.0, "3", None])
def test_classes_are_a_positive_integer(classes):
    with pytest.raises(ValueError, match=r"classes: expected a positive integer, got .*"):
        class_space(classes)


# -- batches ---------------------------------------------------------------------------------------------------------


@on_ranks
def test_a_batch_holds_its_values():
    Y = label_space("disk", "CG1")
    values = smooth(Y)
    f = Y.batch(values, name="pictures")
    assert f.name() == "pictures" and f.function_space() == Y.batch_space(SAMPLES)
    assert (Y.values(f) == values).all()
    assert (f.sub(1).dat.data_ro == values[:, 1]).all()
    assert Y.values(Y.batch(values[:, 0])).shape == (Y.nodes, 1)
    assert (Y.values(Y.batch(values.astype(np.float32))) == values.astype(np.float32)).all()
    Y.check_batch(f, "f")


@pytest.mark.parametrize("samples", [0, -2, 1.5, "3"])
def test_samples_are_a_positive_integer(samples):
    with pytest.raises(ValueError, match=r"samples: expected a positive integer, got .*"):
        label_space("disk", "CG1").batch_space(samples)


@on_ranks
@pytest.mark.parametrize("rank", ["first", "last", "all"])
@pytest.mark.parametrize("extra, samples", [((1,), ()), ((0,), (0,)), ((0,), (2, 2)), ((-1,), (3,))], ids=str)
def test_a_wrong_shape_is_refused_on_all_ranks(rank, extra, samples):
    Y = label_space("disk", "CG1")
    good = np.zeros((Y.nodes, *(samples if 0 not in samples else (3,)))[:2])
    bad = np.zeros((Y.nodes + extra[0], *samples))
    chosen = {"first": 0, "last": COMM_WORLD.size - 1}.get(rank, COMM_WORLD.rank) == COMM_WORLD.rank
    with pytest.raises(ValueError, match=r"pictures: expected shape \(nodes, samples\) = \(\d+, at least 1\), got \("):
        Y.batch(bad if chosen else good, name="pictures")


@pytest.mark.parallel([2, 3])
def test_ranks_must_give_the_same_number_of_samples():
    Y = label_space("disk", "CG1")
    with pytest.raises(ValueError, match="pictures: .*samples"):
        Y.batch(np.zeros((Y.nodes, 2 + COMM_WORLD.rank)), name="pictures")


@on_ranks
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("how", ["batch", "check_batch"])
def test_a_value_that_is_not_finite_is_refused_with_its_sample_on_all_ranks(value, how):
    Y = label_space("disk", "CG1")
    values = np.zeros((Y.nodes, 5))
    if COMM_WORLD.rank == COMM_WORLD.size - 1:
        values[-1, 2] = value
        values[0, 4] = value
    message = r"pictures: sample 2 has values that are not finite \(2 samples have\)"
    if how == "batch":
        with pytest.raises(ValueError, match=message):
            Y.batch(values, name="pictures")
    else:
        f = Y.batch(np.zeros((Y.nodes, 5)))
        f.dat.data_wo[...] = values
        with pytest.raises(ValueError, match=message):
            Y.check_batch(f, "pictures")


@on_ranks
def test_a_batch_of_another_mesh_or_element_is_refused():
    Y = label_space("disk", "CG1")
    for wrong, error, message in [
        (Y.values(Y.batch(smooth(Y))), TypeError, r"f: expected a Function, got ndarray"),
        (fd.Cofunction(Y.V.dual()), TypeError, r"f: expected a Function, got Cofunction"),
        (fd.Function(label_space("sphere", "CG1").V), ValueError, r"f: expected a Function on the mesh .*, got one on"),
        (fd.Function(label_space("disk", "DG0").V), ValueError, r"f: expected a Function of .*CG1.*, got one of .*DG0"),
        (
            label_space("disk", "DG0").batch(smooth(label_space("disk", "DG0"))),
            ValueError,
            r"f: expected a Function of .*, got one of .*DG0.*",
        ),
        (
            fd.Function(fd.TensorFunctionSpace(Y.V.mesh(), "CG", 1)),
            ValueError,
            r"f: expected a Function of .*CG1.* or a batch of it .*, got one of",
        ),
    ]:
        with pytest.raises(error, match=message):
            Y.check_batch(wrong, "f")


# -- spaces that are refused -----------------------------------------------------------------------------------------

WHAT_WORKS = "Spaces that work: DG of degree 0 or 1; CG of degree 1; CG of degree 3 on triangles"


@pytest.mark.parametrize(
    "domain, family, degree, reason",
    [
        ("disk", "CG", 2, "weight"),
        ("disk", "CG", 4, "weight"),
        ("cube", "CG", 2, "weight"),
        ("disk", "Bernstein", 2, "expected point values"),
        ("disk", "CR", 1, "expected point values"),
        ("disk", "Hermite", 3, "expected point values"),
        ("interval", "Hermite", 3, "expected point values"),
        ("square", "S", 2, "expected point values"),
        ("disk", "Bubble", 3, "the weights of .* add up to"),
        ("disk", "R", 0, "expected nodes in the cells"),
        ("disk", "HDiv Trace", 0, "expected nodes in the cells"),
    ],
)
def test_a_space_without_a_quadrature_of_its_own_is_refused(domain, family, degree, reason):
    with pytest.raises(ValueError, match=rf"V: .*{reason}.*{WHAT_WORKS}"):
        LabelSpace(fd.FunctionSpace(mesh(domain), family, degree))


def test_a_weight_that_is_negative_on_this_mesh_is_refused():
    """Towards the top of a frustum of base 1 and top s, the cell's volume falls off as (1 - z)^2 when s is small."""
    straight = fd.UnitCubeMesh(1, 1, 1, hexahedral=True)
    x = fd.Function(straight.coordinates)
    x.dat.data[:, :2] *= 1 - 0.99 * x.dat.data_ro[:, 2:]
    with pytest.raises(ValueError, match=rf"V: a node of .* has the weight -.* on this mesh.*{WHAT_WORKS}"):
        LabelSpace(fd.FunctionSpace(fd.Mesh(x), "CG", 2))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m: fd.VectorFunctionSpace(m, "CG", 1), r"V: expected a scalar space, .* with values of shape \(2,\)"),
        (lambda m: fd.FunctionSpace(m, "RT", 1), r"V: expected a scalar space, .*RT1.* with values of shape \(2,\)"),
        (lambda m: fd.FunctionSpace(m, "CG", 1) * fd.FunctionSpace(m, "DG", 0), r"V: expected a scalar space"),
        (lambda m: fd.FunctionSpace(m, "CG", 1).dual(), r"V: expected a FunctionSpace"),
        (lambda m: m, r"V: expected a FunctionSpace, got MeshGeometry"),
    ],
    ids=["vector", "RT", "mixed", "dual", "mesh"],
)
def test_what_is_no_scalar_space_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        LabelSpace(make(mesh("disk")))


@on_ranks
@pytest.mark.parametrize("space", [("disk", "DG0"), ("sphere", "CG1"), ("block", "CG1")], ids=name)
def test_a_sample_is_a_function_of_its_own(space):
    Y = label_space(*space)
    values = smooth(Y) - 1
    batch = Y.batch(values)
    f = Y.function(batch, 2)
    assert f.function_space() == Y.V and f.ufl_shape == ()
    assert_allclose(Y.values(f)[:, 0], values[:, 2], rtol=0, atol=0)
    assert fd.assemble(f * fd.dx) == pytest.approx(float(Y.sum(Y.weights @ values[:, 2])), rel=1e-12)
    f.assign(7.0)
    assert_allclose(Y.values(batch), values, rtol=0, atol=0)
    assert Y.function(Y.batch(values[:, 0])).ufl_shape == ()
    with pytest.raises(ValueError, match=rf"sample: expected an integer from 0 to {SAMPLES - 1}, got {SAMPLES}"):
        Y.function(batch, SAMPLES)
    product = Channels(Y, 2)
    both = product.function(product.batch(np.vstack([values, 2 * values])), 1)
    assert both.ufl_shape == (2,)
    assert_allclose(both.dat.data_ro, np.column_stack([values[:, 1], 2 * values[:, 1]]), rtol=0, atol=0)
