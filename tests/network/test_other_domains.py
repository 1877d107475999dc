"""Networks of functions of the Laplacian on other label domains, and what does not go there."""

from functools import cache

import firedrake as fd
import numpy as np
import pytest
import scipy.linalg
from firedrake import COMM_WORLD
from helpers import flat_network, label_space, laplace, mesh, smooth
from numpy.testing import assert_allclose

from fem_resnet import (
    Bias,
    Channels,
    Head,
    Kernel,
    LabelSpace,
    LaplaceFunctions,
    Layers,
    ResidualNetwork,
    Symmetric,
    given_basis,
    laplace_basis,
    load,
    point_space,
    save,
)
from fem_resnet.label_domain.other_domains import difference

on_ranks = pytest.mark.parallel([1, 2, 3])
on_two_ranks = pytest.mark.parallel([1, 2])

#: How many functions, up to a gap in the eigenvalues.
RANK = {"disk": 6, "sphere": 9, "cube": 4, "annulus": 5, "interval": 4}
SLOPE = 0.3


def space(domain, refinement=1, shift=0.0, element="CG1"):
    """The label domain, moved by that much in each direction: the same nodes on the same ranks."""
    Y = label_space(domain, element, refinement)
    if not shift:
        return Y
    moved = mesh(domain, refinement).coordinates.copy(deepcopy=True)
    moved.dat.data_wo[...] += shift
    return LabelSpace(fd.FunctionSpace(fd.Mesh(moved), element[:-1], int(element[-1])))


def multipliers(eigenvalues, channels=1):
    """Linear in sqrt(lambda), so that they are known everywhere; not symmetric in the channels."""
    k = 1.5 - SLOPE * np.sqrt(np.maximum(eigenvalues, 0))
    if channels == 1:
        return k
    return k[:, None, None] * np.array([[1.0, 0.4], [-0.2, 0.7]]) + np.array([[0, 0.1], [0.3, 0]])


def network(Y, rank, activation="tanh", bias="given", layers=2, **options):
    phi = laplace_basis(Y, rank)
    among = LaplaceFunctions(phi)
    basis = phi if bias == "laplace" else given_basis(Y, [2.0])
    net = ResidualNetwork(Kernel(phi, among=among), bias=Bias(basis), layers=Layers(layers, **options), activation=activation)
    for k in range(layers):
        net.kernel.set(k, (1 + k / 4) * among.kernel(multipliers(among.eigenvalues, Y.channels)))
        if bias == "given":
            net.bias.set(k, [0.1 + k])
        else:
            constant = (0.2 + 2 * k) * np.repeat(np.arange(1.0, 1 + Y.channels), Y.one.nodes)
            net.bias.set(k, phi.project(constant[:, None])[:, 0])
    return net


@on_ranks
@pytest.mark.parametrize("bias", ["given", "laplace"])
@pytest.mark.parametrize("domain", ["disk", "sphere", "cube"])
def test_on_a_domain_that_was_moved_the_network_is_the_same_map(domain, bias):
    """Another place is another domain; nodes, eigenvalues and ranks are the same, rotations of eigenfunctions are not."""
    Y, there = space(domain), space(domain, shift=3.0)
    assert "centre" in difference(Y, there)
    net = network(Y, RANK[domain], bias=bias)
    moved = net.on(there)
    assert moved.Y is there and moved.bases["phi"][0].rank == RANK[domain]
    f = smooth(Y)
    assert_allclose(there.values(moved(there.batch(f))), Y.values(net(Y.batch(f))), rtol=0, atol=1e-8)
    back = moved.on(Y)
    assert_allclose(Y.values(back(Y.batch(f))), Y.values(net(Y.batch(f))), rtol=0, atol=1e-8)


@on_ranks
def test_channels_go_with_their_couplings():
    Y, there = Channels(space("disk"), 2), Channels(space("disk", shift=3.0), 2)
    net = network(Y, 6, bias="laplace")
    moved = net.on(there)
    f = smooth(Y)
    assert_allclose(there.values(moved(there.batch(f))), Y.values(net(Y.batch(f))), rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="^on: expected a label space with 2 channels"):
        net.on(space("disk", shift=3.0))


@on_two_ranks
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("domain, other", [("disk", "sphere"), ("annulus", "disk"), ("sphere", "cube"), ("cube", "interval")])
def test_on_another_domain_eigenfunctions_decay_by_their_own_multipliers(domain, other, channels):
    """f_t = a - k(-Laplace) f has a solution for each eigenfunction; that of the domain it came from knows nothing of them."""
    Y, there = space(domain, 2), space(other, 2)
    Y, there = (Y, there) if channels == 1 else (Channels(Y, 2), Channels(there, 2))
    highest = laplace_basis(Y.one, RANK[domain]).eigenvalues[-1]
    net = network(Y, RANK[domain], activation="identity", layers=1, bias="laplace", final_time=0.5, steps=8).on(there)
    phi = net.bases["phi"][0]
    assert phi.one.eigenvalues[-1] <= 1.05 * highest
    assert laplace_basis(there.one, phi.one.rank + 1).eigenvalues[-1] > 1.05 * highest or phi.one.rank == there.one.size
    one = laplace_basis(there.one, phi.one.rank)
    c = np.random.default_rng(0).normal(size=(channels, one.rank))
    f = there.values(net(there.batch(np.concatenate([one.expand(part) for part in c]))))[:, 0]
    expected = np.empty_like(c)
    for j, k in enumerate(multipliers(np.minimum(one.eigenvalues, highest), channels)):  # beyond they are constant
        expected[:, j] = scipy.linalg.expm(-0.5 * np.atleast_2d(k)) @ c[:, j]
    # int_0^T e^(-K s) a ds for the constants, by one exponential of a larger matrix.
    K = np.atleast_2d(multipliers(np.zeros(1), channels)[0])
    larger = np.zeros((2 * channels,) * 2)
    larger[:channels, :channels], larger[:channels, channels:] = -K, np.eye(channels)
    added = scipy.linalg.expm(0.5 * larger)[:channels, channels:] @ (0.2 * np.arange(1.0, 1 + channels))
    expected = np.concatenate([one.expand(part) + constant for part, constant in zip(expected, added)])
    assert_allclose(f, expected, rtol=0, atol=1e-6)  # eight steps of order 4


@cache
def of_two_ways(refinement):
    """How far networks on a finer disk are from each other that have come there as on the same domain, and as on another."""
    net = network(space("disk", refinement), 6)
    finer, elsewhere = space("disk", refinement + 1), space("disk", refinement + 1, shift=3.0)
    f = smooth(finer)
    one = finer.values(net.on(finer)(finer.batch(f)))
    other = elsewhere.values(net.on(elsewhere)(elsewhere.batch(f)))
    return float(np.sqrt(finer.sum(finer.weights @ (one - other) ** 2).sum()))


def test_on_the_same_domain_both_ways_agree_up_to_the_order_of_the_mesh():
    errors = [of_two_ways(refinement) for refinement in (2, 3, 4)]
    assert np.log2(errors[1] / errors[2]) > 1.7 and errors[2] < 0.01, errors


@on_two_ranks
def test_a_loaded_network_goes_too(tmp_path):
    Y, there = space("disk"), space("sphere")
    net = network(Y, 6)
    save(tmp_path / "net.h5", net)
    loaded, *_ = load(tmp_path / "net.h5", COMM_WORLD)
    one, two = net.on(there), loaded.on(there)
    f = there.batch(smooth(there))
    assert_allclose(there.values(two(f)), there.values(one(f)), rtol=0, atol=1e-9)


@on_two_ranks
def test_learned_times_and_shared_coefficients_go_too():
    Y, there = space("disk"), space("disk", shift=3.0)
    phi = laplace_basis(Y, 6)
    among = LaplaceFunctions(phi)
    net = flat_network(
        phi, bias=given_basis(Y, [1.0]), kernel_set=among, times=(0.0, 0.3, 1.0), learn_times=True, kernel_in_time="linear",
        bias_in_time="shared",
    )  # fmt: skip
    for k in range(len(net.kernel.functions)):
        net.kernel.set(k, among.kernel((k + 1) * multipliers(among.eigenvalues)))
    net.bias.set(0, [0.3])
    net.layer_times.set(0, [0.4, 0.9])
    f = smooth(Y)
    moved = net.on(there)
    assert_allclose(moved.times, [0.0, 0.4, 0.9])
    assert_allclose(there.values(moved(there.batch(f))), Y.values(net(Y.batch(f))), rtol=0, atol=1e-8)


@on_two_ranks
def test_from_a_graph_to_another():
    def ring(n):
        A = np.roll(np.eye(n), 1, axis=0)
        return point_space(np.ones(n), graph=A + A.T)

    net = network(ring(12), 5, activation="identity", layers=1, final_time=0.5, steps=8)
    net.bias.set(0, [0.0])
    Y = ring(30)
    moved = net.on(Y)
    phi = laplace_basis(Y, moved.bases["phi"][0].rank)
    highest = net.bases["phi"][0].eigenvalues[-1]
    assert phi.eigenvalues[-1] < 1.05 * highest and phi.rank > 5
    c = np.arange(1.0, 1 + phi.rank)
    expected = np.exp(-0.5 * multipliers(np.minimum(phi.eigenvalues, highest))) * c
    found = phi.project(Y.values(moved(Y.batch(phi.expand(c)))))[:, 0]
    assert_allclose(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="^Y: expected a label space of the same Y, .* is a set of points"):
        network(space("disk"), 6).on(Y)
    with pytest.raises(ValueError, match="are tied to their mesh"):
        net.on(space("disk"))


@on_two_ranks
def test_what_has_no_meaning_on_another_domain_is_refused_by_name():
    disk, annulus, sphere = space("disk", 3), space("annulus", 3), space("sphere", 2)
    phi = laplace_basis(disk, 6)
    x, y = fd.SpatialCoordinate(disk.V.mesh())
    another = r"^Y: expected a label space of the same Y, .* is another domain: Euler's characteristic is 0, not 1. Kernels of"
    for net in (
        ResidualNetwork(phi, bias=phi, layers=1),
        ResidualNetwork(Kernel(phi, among=Symmetric(phi, fd.as_vector([-y, x]))), bias=phi, layers=1),
    ):
        with pytest.raises(ValueError, match=another):
            net.on(annulus)
    for what in (phi, Head(phi, 3), Head(given_basis(disk, [1.0]), phi)):
        with pytest.raises(ValueError, match=another):
            what.on(annulus)
    with pytest.raises(ValueError, match="is in a space of 3 dimensions, not 2. Kernels of LaplaceFunctions and"):
        phi.on(sphere)
    net = network(disk, 6, bias="laplace")
    net.bias.set(1, [1.0, 0.0, 1e-3, 0, 0, 0])
    with pytest.raises(
        ValueError, match=r"^on: expected a bias that is constant in each channel .* differs by .* is constant"
    ):
        net.on(annulus)
    nodal = ResidualNetwork(Kernel(phi, among=LaplaceFunctions(phi)), layers=1)
    with pytest.raises(ValueError, match="^ResidualNetwork.on: it does not take a bias with a value at every node"):
        nodal.on(annulus)


@on_two_ranks
def test_a_pooled_head_reads_integrals_on_another_domain():
    disk, sphere = space("disk"), space("sphere")
    head = Head(given_basis(disk, [2.0]), 3)
    head.W.set(0, [[1.0], [2.0], [-1.0]])
    head.mu.set(0, [0.1, 0.0, 0.5])
    f = smooth(sphere)
    integrals = sphere.sum(sphere.weights @ f)
    assert_allclose(head.on(sphere).scores(sphere.batch(f)), np.outer(integrals, [2, 4, -2]) + [0.1, 0, 0.5], atol=1e-12)


def test_near_domains_and_coarse_meshes():
    """What `difference` tells apart, and what it does not: domains that differ less than coarse meshes of one."""

    def of(given):
        return LabelSpace(fd.FunctionSpace(given, "CG", 1))

    def rectangle(nx, ny, x, y):
        return of(fd.RectangleMesh(nx, ny, x, y, originX=-x, originY=-y))

    disk, sphere = (of(each) for each in (fd.UnitDiskMesh(3), fd.UnitIcosahedralSphereMesh(2)))
    for Y, other, expected in (
        (disk, of(fd.UnitDiskMesh(1)), None),
        (disk, LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(3), "DG", 0)), None),
        (sphere, of(fd.UnitCubedSphereMesh(1)), None),
        (disk, of(fd.AnnulusMesh(1.0, 0.05, 4, 36)), "Euler's characteristic is 0, not 1"),
        (sphere, of(fd.TorusMesh(12, 8, 0.8, 0.4)), "Euler's characteristic is 0, not 2"),
        (disk, of(fd.UnitSquareMesh(8, 8)), "|Y| is 1, not 3.1"),
        (rectangle(8, 4, 1.0, 0.5), rectangle(4, 8, 0.5, 1.0), "of another shape"),
        (of(fd.UnitSquareMesh(4, 4)), of(fd.PeriodicUnitSquareMesh(4, 4)), "Euler's characteristic is 0, not 1"),
        (disk, of(fd.CircleManifoldMesh(12)), "of 1 dimensions, not 2"),
        (disk, sphere, "in a space of 3 dimensions, not 2"),
        (disk, point_space(np.ones(4)), "a set of points"),
    ):
        found = difference(Y, other)
        assert (found is None) if expected is None else (expected in found), (Y, other, found)
    laplace("disk", "CG1", 4).on(label_space("disk", "DG0", 2))
