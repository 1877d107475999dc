"""Kernels that know the symmetry of Y: what commutes, what a mesh breaks, derivatives, files, other meshes and domains."""

from functools import cache, partial

import firedrake as fd
import numpy as np
import pytest
import scipy.sparse
import scipy.spatial
import scipy.special
from firedrake import COMM_SELF, COMM_WORLD
from helpers import TIMES, flat_network, smooth
from kinds import directions_of as directions
from kinds import field_problem as problem
from kinds import largest, rotation, states
from numpy.testing import assert_allclose, assert_array_equal
from test_kernel_sets import SETS as STABLE
from test_kernel_sets import network as with_stable_kernels

from fem_resnet import (
    Kernel,
    LabelSpace,
    LaplaceFunctions,
    ResidualNetwork,
    Symmetric,
    laplace_basis,
    load,
    point_space,
    save,
    smooth_in_space,
    smooth_in_time,
    tikhonov,
    train,
    verify,
)  # fmt: skip
from fem_resnet.parameters.couplings import Couplings
from fem_resnet.parameters.kernel_sets import MatrixControls
from fem_resnet.parameters.known_kernel_sets import kernel_set_from

on_ranks = pytest.mark.parallel([1, 2, 3])
ROUND_OFF = 1e-12

MESHES = {
    "circle": lambda comm: fd.CircleManifoldMesh(32, radius=1.5, comm=comm),
    "annulus": lambda comm: fd.AnnulusMesh(1, 0.4, 3, 20, comm=comm),
    "disk": lambda comm: fd.UnitDiskMesh(2, comm=comm),
    "finer disk": lambda comm: fd.UnitDiskMesh(3, comm=comm),
    "finest disk": lambda comm: fd.UnitDiskMesh(4, comm=comm),
    "sphere": lambda comm: fd.UnitIcosahedralSphereMesh(2, comm=comm),
    "torus": lambda comm: fd.PeriodicRectangleMesh(10, 12, 1.0, 1.2, comm=comm),
    "line": lambda comm: fd.PeriodicIntervalMesh(24, 3.0, comm=comm),
    "strip": lambda comm: fd.PeriodicRectangleMesh(24, 8, 2.0, 1.0, direction="x", comm=comm),
}


def ring(size):
    forth = np.roll(np.eye(size), 1, axis=0)
    return forth + forth.T


@cache
def basis(domain, element, rank, alone=False):
    """A Laplace basis; of "ring" that of twelve points in a ring."""
    comm = COMM_SELF if alone else COMM_WORLD
    if domain == "ring":
        return laplace_basis(point_space(np.full(12, 0.5), graph=ring(12), comm=comm), rank)
    V = fd.FunctionSpace(MESHES[domain](comm), element[:-1], int(element[-1]))
    return laplace_basis(LabelSpace(V), rank)


def turn(angle):
    """The rotation of the first two coordinates."""
    c, s = np.cos(angle), np.sin(angle)

    def map_(x):
        return np.column_stack([c * x[:, 0] - s * x[:, 1], s * x[:, 0] + c * x[:, 1], *x.T[2:]])

    return map_


def reflected(x):
    return x * [1.0, -1.0]


def tilted(phi):
    """The Killing field that turns the last two coordinates."""
    x = fd.SpatialCoordinate(phi.Y.V.mesh())
    return fd.as_vector([0, -x[2], x[1]])


def shift(phi, *speed):
    return fd.as_vector([fd.Constant(v) for v in speed])


#: A Laplace basis, the set of kernels on it, and how many free controls that has.
SETS = {
    "circle": lambda alone: of("circle", "CG1", 27, alone, rotation),
    "circle of cells": lambda alone: of("circle", "DG0", 27, alone, rotation),
    "disk": lambda alone: of("finer disk", "CG1", 12, alone, rotation),
    "sphere": lambda alone: of("sphere", "CG1", 9, alone, rotation, tilted),
    "annulus by 72 degrees": lambda alone: of("annulus", "DG0", 10, alone, lambda phi: turn(2 * np.pi / 5)),
    "ring": lambda alone: of("ring", "DG0", 7, alone, lambda phi: (np.arange(12) + 1) % 12),
    "functions on the sphere": lambda alone: functions("sphere", "DG0", 9, alone),
    "functions on the disk": lambda alone: functions("disk", "CG1", 8, alone),
}
each_set = pytest.mark.parametrize("name", SETS)


def of(domain, element, rank, alone, *symmetries):
    phi = basis(domain, element, rank, alone)
    return phi, Symmetric(phi, *(given(phi) for given in symmetries))


def functions(domain, element, rank, alone):
    phi = basis(domain, element, rank, alone)
    return phi, LaplaceFunctions(phi)


@cache
def made(name, alone=False):
    return SETS[name](alone)


def network(name, *, alone=False, size=1.0, **more):
    phi, among = made(name, alone)
    net = flat_network(phi, **{"bias": phi, "times": TIMES, "activation": "tanh", "kernel_set": among} | more)
    rng = np.random.default_rng(0)
    for parameter in net.parameters:
        for k, held in enumerate(parameter.space_bases):
            if parameter is not net.bias or net.bases["bias"] != (None,):
                parameter.set(k, size * rng.normal(size=held.shape) / held.shape[0] ** 0.25)
    return net


def elements(among):
    """The E_k, shape (count, rank, rank)."""
    unit = np.eye(among.count)
    return np.array([among.value(None, unit[:, [k]]) for k in range(among.count)])


# -- what commutes -----------------------------------------------------------------------------------------------------


@pytest.mark.parallel([2, 3])
@each_set
def test_the_matrices_are_the_same_on_each_number_of_ranks(name):
    """Not their span alone: Adam and draws of starting values go by the E_k."""
    assert_allclose(elements(made(name)[1]), elements(made(name, alone=True)[1]), atol=1e-9)


@on_ranks
@pytest.mark.parametrize("element", ["CG1", "DG0"])
def test_the_circle_has_complex_multipliers(element):
    """Frequencies 1 to 13 on 32 nodes, so that each k from 3 to 13 has its alias 16 - k beside it."""
    phi = basis("circle", element, 27)
    E = elements(Symmetric(phi, rotation(phi)))
    assert len(E) == 1 + 2 * 13
    assert_allclose(np.einsum("kij,lij->kl", E, E), np.eye(27), atol=ROUND_OFF)
    for X in E:
        row, column = np.argwhere(np.abs(X) > 1e-10)[0]
        assert (row + 1) // 2 == (column + 1) // 2
        own = slice(0, 1) if row == 0 else slice(2 * ((row + 1) // 2) - 1, 2 * ((row + 1) // 2) + 1)
        block, X = X[own, own].copy(), X.copy()
        X[own, own] = 0
        assert np.abs(X).max() < 1e-10
        if row:
            assert abs(block[0, 0] - block[1, 1]) < 1e-10 and abs(block[0, 1] + block[1, 0]) < 1e-10
    both = Symmetric(phi, rotation(phi), reflected)
    assert both.count == 14  # real multipliers
    assert all(np.count_nonzero(np.abs(X) > 1e-10) in (1, 2) for X in elements(both))


@on_ranks
@pytest.mark.parametrize("element, rank", [("CG1", 16), ("DG0", 36)])
def test_the_sphere_has_one_number_a_degree(element, rank):
    """Schur's lemma, with two generators; one alone leaves more."""
    phi = basis("sphere", element, rank)
    E = elements(Symmetric(phi, rotation(phi), tilted(phi)))
    degrees = int(rank**0.5)
    assert len(E) == degrees
    for X in E:
        assert_allclose(X, np.diag(np.diag(X)), atol=1e-10)
    expected = np.array([np.repeat(np.eye(degrees)[l], 2 * np.arange(degrees) + 1) for l in range(degrees)])
    seen = np.abs([np.diag(X) for X in E])
    assert_allclose((seen > 1e-10).sum(axis=0), 1)
    assert_allclose(sorted(map(tuple, (seen > 1e-10).astype(float))), sorted(map(tuple, expected)))
    # By m: (degrees - m)^2 pairs of degrees, complex but for m = 0.
    assert Symmetric(phi, rotation(phi)).count == degrees**2 + 2 * sum((degrees - m) ** 2 for m in range(1, degrees))


@on_ranks
@pytest.mark.parametrize("element, rank", [("CG1", 36), ("DG0", 36), ("CG3", 36)])
def test_the_disk_couples_all_modes_of_one_angular_number(element, rank):
    """Angular numbers by the zeros of J_k', which the mesh knows nothing of."""
    phi = basis("finer disk", element, rank)
    zeros = [(0.0, 0)] + [(zero, k) for k in range(12) for zero in scipy.special.jnp_zeros(k, 6)]
    angular = [k for zero, k in sorted(zeros) for _ in range(2 if k else 1)][:rank]
    radial = [angular.count(k) // (2 if k else 1) for k in range(12)]
    among = Symmetric(phi, rotation(phi))
    assert among.count == radial[0] ** 2 + 2 * sum(n**2 for n in radial[1:])
    found = np.abs(elements(among)).max(axis=0) > 0.1
    if element == "CG3":  # coarser spaces mix near eigenvalues, or change their order
        assert_allclose(found, np.array(angular)[:, None] == np.array(angular))
    assert radial[0] > 1 and radial[1] > 1 and 0 < among.kept < 0.03 and 0 < among.broken < 0.3


@on_ranks
@pytest.mark.parametrize(
    "domain, rank, speeds, count",
    [
        ("line", 17, [(1.0,)], 17),
        ("torus", 5, [(1.0, 0.0), (0.0, 1.0)], 5),
        ("torus", 5, [(1.0, 2.0)], 5),
        ("torus", 5, [(1.0, 1.2)], 9),  # one period: both pairs turn alike
        ("strip", 13, [(1.0, 0.0)], 3**2 + 2 * (3**2 + 2**2)),
    ],
)
def test_periodic_meshes(domain, rank, speeds, count):
    """Waves have the mesh's periods, so that a seam is no place."""
    phi = basis(domain, "CG1", rank)
    among = Symmetric(phi, *(shift(phi, *speed) for speed in speeds))
    assert among.count == count and among.broken < 1e-9


@on_ranks
def test_the_group_of_a_graph():
    phi = basis("ring", "DG0", 7)
    Y, forth = phi.Y, (np.arange(12) + 1) % 12
    among = Symmetric(phi, forth)
    assert among.count == 7 and among.broken < 1e-13
    dihedral = Symmetric(phi, forth, -np.arange(12) % 12)
    assert dihedral.count == 4
    P = np.concatenate(Y.comm.allgather(np.array(phi.values)))[np.argsort(np.concatenate(Y.comm.allgather(Y.numbers)))]
    for X in elements(among):
        B = P @ X @ P.T
        assert_allclose(B[np.ix_(forth, forth)], B, atol=ROUND_OFF)


@on_ranks
def test_functions_of_the_laplacian_commute_with_all_symmetries():
    phi, among = made("functions on the sphere")
    assert among.count == 3
    both = Symmetric(phi, rotation(phi), tilted(phi))
    for X in elements(among):
        assert_allclose(both.projected(X), X, atol=1e-10)
    beta = among.kernel([3.0, 2.0, 1.0])
    assert_allclose(beta, np.diag([3.0] + [2.0] * 3 + [1.0] * 5))
    assert_allclose(among.multipliers(beta), [3.0, 2.0, 1.0], rtol=1e-14)


def test_eigenspaces_that_a_mesh_has_split_count_as_one():
    """The disk's mesh has the symmetry of a square, which splits angular number 2."""
    phi = basis("disk", "CG1", 8)
    counts = [LaplaceFunctions(phi, split=split).count for split in (1e-3, 0.05)]
    assert counts == [6, 5]
    wide = LaplaceFunctions(phi, split=0.05)
    field = Symmetric(phi, rotation(phi))
    assert all(np.allclose(field.projected(X), X, atol=1e-10) for X in elements(wide))
    assert not all(np.allclose(field.projected(X), X, atol=1e-3) for X in elements(LaplaceFunctions(phi)))


def test_functions_of_the_laplacian_move_to_another_label_domain():
    """From the sphere to the disk: linear in sqrt(lambda) between the first one's eigenvalues 0, 2, 6, beyond constant."""
    _, among = made("functions on the sphere")
    phi, other = made("functions on the disk")
    own, at = np.sqrt(np.maximum(among.eigenvalues, 0)), np.sqrt(np.maximum(other.eigenvalues, 0))
    linear = among.kernel(2.0 - 0.5 * own)
    moved = other.kernel(among.multipliers(linear, other.eigenvalues))
    inside = at <= own[-1]
    assert 1 < inside.sum() < len(at)
    expected = np.where(inside, 2.0 - 0.5 * at, 2.0 - 0.5 * own[-1])
    assert_allclose(other.multipliers(moved), expected, atol=1e-13)
    assert_allclose(among.multipliers(linear, [2.0]), 2.0 - 0.5 * 2.0**0.5, atol=1e-12)


# -- turn the input, the output turns ------------------------------------------------------------------------------------


def places(Y):
    return Y.coordinates if Y.graph is None else Y.numbers[:, None].astype(float)


def bumps(x):
    """Three smooth functions of the coordinates, with no symmetry."""
    rng = np.random.default_rng(4)
    return np.cos(x @ rng.normal(scale=2.0, size=(x.shape[1], 3)) + rng.uniform(0, 6, 3))


def turned(net, map_):
    """The output of the turned input, and the turned output, where the map takes nodes to nodes."""
    Y, x = net.Y, places(net.Y)
    outputs = [Y.values(net(Y.batch(bumps(at)))).copy() for at in (map_(x), x)]
    every = np.concatenate(Y.comm.allgather(np.array(x)))
    distance, number = scipy.spatial.cKDTree(every).query(map_(x))
    assert largest(distance) < 1e-10
    return outputs[0], np.concatenate(Y.comm.allgather(outputs[1]))[number]


EXACT = {
    "circle": ("circle", turn(2 * np.pi * 5 / 32)),
    "circle of cells": ("circle of cells", turn(2 * np.pi * 3 / 32)),
    "annulus": ("annulus by 72 degrees", turn(2 * np.pi / 5)),
    "annulus, twice": ("annulus by 72 degrees", turn(4 * np.pi / 5)),
    "sphere, inverted": ("sphere", lambda x: -x),
    "sphere, a third": ("sphere", lambda x: x[:, [1, 2, 0]]),
    "ring": ("ring", lambda x: (x + 1) % 12),
    "functions on the sphere": ("functions on the sphere", lambda x: x[:, [1, 2, 0]]),
}


@on_ranks
@pytest.mark.parametrize("case", EXACT)
def test_the_output_turns_with_the_input_on_meshes_with_the_symmetry(case):
    name, map_ = EXACT[case]
    net = network(name, size=2.0, bias=None)  # a constant bias at the nodes
    for k in range(3):
        net.bias.set(k, np.full(net.Y.nodes, 0.3 * k - 0.2))
    with_symmetry, expected = turned(net, map_)
    assert_allclose(with_symmetry, expected, rtol=0, atol=ROUND_OFF * max(largest(expected), 1.0))
    before = bumps(places(net.Y))
    assert largest(with_symmetry - before) > 0.1
    free = net.replace(kernel=Kernel(net.bases["phi"][0]))
    for k in range(3):
        free.kernel.set(k, net.kernel.get(k) + 0.3 * np.random.default_rng(k).normal(size=net.kernel.get(k).shape))
        free.bias.set(k, net.bias.get(k))
    assert largest(np.subtract(*turned(free, map_))) > 1e-2


@on_ranks
def test_elsewhere_it_turns_with_the_order_of_the_mesh():
    """By any angle on disks: integrals of the output with waves against those of the turned waves."""
    errors = []
    rng, move = np.random.default_rng(3), turn(1.0)
    k, phase = rng.normal(scale=2.0, size=(2, 5)), rng.uniform(0, 6, 5)
    phi = basis("finest disk", "CG1", 12)
    among = Symmetric(phi, rotation(phi))
    fine = ResidualNetwork(Kernel(phi, among=among), bias=phi, layers=TIMES, activation="tanh")
    for l, theta in enumerate(np.random.default_rng(1).normal(size=(3, 12, 12))):
        fine.kernel.set(l, among.projected(theta))
    for domain in ("disk", "finer disk", "finest disk"):
        net = fine.on(basis(domain, "CG1", 12).Y)
        Y = net.Y
        x, w = Y.coordinates, Y.weights[:, None]
        one, two = (Y.values(net(Y.batch(bumps(at)))) for at in (move(x), x))
        seen = Y.sum((w * one).T @ np.cos(x @ k + phase))
        expected = Y.sum((w * two).T @ np.cos(turn(-1.0)(x) @ k + phase))
        errors.append(np.abs(seen - expected).max())
        assert np.abs(expected).max() > 0.1
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert orders[-1] > 1.7 and errors[-1] < 5e-3, (errors, orders)


@on_ranks
def test_what_the_mesh_breaks_falls_with_its_size():
    broken = [
        made_.broken
        for made_ in (
            Symmetric(phi, rotation(phi))
            for phi in (basis(domain, "CG1", 12) for domain in ("disk", "finer disk", "finest disk"))
        )
    ]
    assert broken[0] < 0.2 and broken[1] < broken[0] / 3 and broken[2] < broken[1] / 3
    phi = basis("annulus", "DG0", 10)
    assert Symmetric(phi, turn(2 * np.pi / 5)).broken < ROUND_OFF


# -- what is refused -----------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: of("finer disk", "CG1", 10, False, rotation), "keeps eigenspaces whole"),
        (lambda: of("finest disk", "CG3", 15, False, lambda phi: turn(2 * np.pi / 5)), "keeps eigenspaces whole"),
        (lambda: of("annulus", "DG0", 10, False, lambda phi: shift(phi, 1.0, 0.0)), "expected .*symmetr.* of Y"),
        (lambda: of("annulus", "DG0", 10, False, lambda phi: lambda x: 0.8 * x), "expected .*symmetr.* of Y"),
        (lambda: of("annulus", "DG0", 10, False, lambda phi: lambda x: x[:, :1]), "expected .*shape"),
        (lambda: of("annulus", "DG0", 10, False, lambda phi: lambda x: 1 / 0), "expected a map of arrays of shape"),
        (lambda: of("annulus", "DG0", 10, False, lambda phi: shift(phi, 1.0)), r"expected a vector field of shape \(2,\)"),
        (lambda: of("ring", "DG0", 7, False, lambda phi: [1, 0, *range(2, 12)]), "keeps edges and weights"),
        (lambda: of("ring", "DG0", 7, False, lambda phi: [0] * 12), "each number from 0 to 11 once"),
        (lambda: of("ring", "DG0", 7, False, lambda phi: range(3)), "expected integers of shape"),
        (lambda: of("ring", "DG0", 7, False, lambda phi: turn(1.0)), "expected a permutation"),
        (lambda: of("annulus", "DG0", 10, False, lambda phi: "turn"), "expected a Killing field in UFL, or a function"),
        (lambda: of("annulus", "DG0", 10, False), "expected at least one"),
    ],
)  # fmt: skip
def test_what_is_no_symmetry_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=f"^symmetries.*{message}"):
        make()


@on_ranks
def test_couplings_that_are_neither_here_nor_there_are_an_error():
    phi = basis("finer disk", "CG1", 12)
    kept = Symmetric(phi, rotation(phi)).kept
    with pytest.raises(ValueError, match="^symmetries: .* neither below .* the mesh breaks a part of 0.0"):
        Symmetric(phi, rotation(phi), tolerance=kept / 2)


def test_bases_and_kernels_that_do_not_fit_are_refused():
    phi, among = made("sphere")
    for basis_, message in (
        (basis("sphere", "CG1", 16), "^kernel.among: expected a basis of rank 9, of which Symmetric was made, got ranks 16"),
        (type(phi)(phi.Y, phi.values, "given"), "^kernel.among: expected orthonormal eigenfunctions with Symmetric"),
    ):
        with pytest.raises(ValueError, match=message):
            ResidualNetwork(Kernel(basis_, among=among), layers=1)
    with pytest.raises(ValueError, match="^phi: expected orthonormal eigenfunctions"):
        LaplaceFunctions(type(phi)(phi.Y, phi.values, "given"))
    net = network("sphere")
    with pytest.raises(ValueError, match=r"^coefficients: expected a kernel of Symmetric\(rank 9, 3 free controls\)"):
        net.kernel.set(0, np.diag(np.arange(9.0)))
    with pytest.raises(ValueError, match="^kernel.among: a Symmetric kernel has phi = psi, and learned factors part"):
        flat_network(phi, kernel_set=among, learn_factors=True)


# -- derivatives -----------------------------------------------------------------------------------------------------


@on_ranks
@each_set
def test_taylor_of_networks_of_symmetric_kernels(name, taylor):
    p = problem(network(name, size=0.7))
    h = [v._ad_mul(0.2) for v in directions(p, seed=5)]
    taylor(p.reduced_functional(), p.functions, h, f"{name}", "symmetric", second_order=True)


@pytest.mark.parametrize("more", [
    {"kernel_in_time": "linear", "layers_per_block": 1}, {"kernel_in_time": "shared", "gradient_flow": True},
    {"solver_parameters": {"ts_type": "cn"}}, {"solver_parameters": {"ts_type": "discrete_gradient"}}, {"learn_times": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["disk", "functions on the sphere"])
def test_taylor_with_other_steps_and_time_bases(name, more, taylor):
    phi, among = made(name)
    net = flat_network(phi, bias=phi, **{"times": TIMES, "activation": "tanh", "kernel_set": among} | more)
    rng = np.random.default_rng(0)
    for parameter in (net.bias, net.kernel.learned):
        for k, held in enumerate(parameter.space_bases):
            parameter.set(k, 0.5 * rng.normal(size=held.shape))
    p = problem(net, tikhonov(0.05) + smooth_in_space(0.01) + smooth_in_time(0.02))
    h = [v._ad_mul(0.4) for v in directions(p)]
    taylor(p.reduced_functional(), p.functions, h, f"{name}", f"{more}", second_order=True)


#: Networks with a kernel of each set of either kind.
NETWORKS = {str(choice): partial(with_stable_kernels, choice) for choice in STABLE}
NETWORKS |= {name: partial(network, name) for name in SETS}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_hessians_are_symmetric(make):
    p = problem(make())
    J = p.reduced_functional()
    J(p.functions)
    J.derivative()
    u, v = directions(p, 1), directions(p, 2)
    left, right = (
        sum(float(b._ad_dot(d)) for d, b in zip(J.hessian(one), other, strict=True)) for one, other in ((u, v), (v, u))
    )
    assert abs(left - right) < 1e-10 * abs(left)


@on_ranks
@each_set
def test_any_number_of_ranks_gives_the_same_kernels_and_gradient(name):
    """The controls may be those of another basis of the same set: kernels are compared."""
    found = []
    for alone in (False, True):
        phi, among = made(name, alone)
        net = flat_network(phi, bias=phi, times=TIMES, activation="tanh", kernel_set=among)
        for k in range(3):
            net.kernel.set(k, among.projected(np.cos(np.arange(phi.rank**2.0) * (k + 1)).reshape(phi.rank, phi.rank)))
            net.bias.set(k, np.sin(np.arange(phi.rank) + k))
        p = problem(net)
        derivative = p.reduced_functional().derivative()
        of_bias, of_kernel = (
            [basis_.read(d) for basis_, d in zip(parameter.space_bases, part)]
            for parameter, part in ((net.bias, derivative[:3]), (net.kernel.learned, derivative[3:]))
        )
        found.append([net.kernel.get(k) for k in range(3)] + of_bias + [among.value(None, d) for d in of_kernel])
    for one, other in zip(*found, strict=True):
        assert_allclose(one, other, rtol=0, atol=1e-9)


@on_ranks
def test_the_inner_product_of_controls_is_that_of_kernels():
    net = network("disk")
    free = flat_network(net.bases["phi"][0], bias=net.bases["phi"][0], times=TIMES, activation="tanh")
    for p, q in zip((net.bias, net.kernel), (free.bias, free.kernel)):
        for k in range(3):
            q.set(k, p.get(k))
    theta = net.kernel.learned.get(1)
    assert_allclose(np.linalg.norm(theta), net.kernel.space_bases[1].kernel.norm(net.kernel.get(1)), rtol=1e-10)
    values = [
        float(problem(n, tikhonov(0.05) + smooth_in_space(0.01) + smooth_in_time(0.02)).evaluate()[0]) for n in (net, free)
    ]
    assert_allclose(*values, rtol=1e-12)


# -- training, files, other meshes -----------------------------------------------------------------------------------


def test_training_finds_the_symmetric_kernel_that_made_the_data():
    phi, among = made("annulus by 72 degrees")
    teacher, net = (network("annulus by 72 degrees", size=s) for s in (0.6, 0.1))
    inputs = phi.Y.batch(smooth(phi.Y, 6))
    p = problem(net, None).replace(batch=type(problem(net).batch)(inputs, teacher(inputs)))
    before = float(p.evaluate()[0])
    result = train(p, {"tao_max_it": 60}, monitor=lambda progress: None)
    assert result.value < 1e-2 * before
    for k in range(3):
        assert_allclose(among.projected(net.kernel.get(k)), net.kernel.get(k), atol=1e-12)


@on_ranks
@pytest.mark.parametrize("name", ["disk", "annulus by 72 degrees", "ring", "functions on the sphere"])
def test_files_keep_the_set_and_the_kernel(name, tmp_path):
    net = network(name)
    path = COMM_WORLD.bcast(tmp_path) / "net.h5"
    save(path, net)
    loaded, _ = load(path)
    among = net.settings.kernel.among
    assert loaded.settings.kernel.among == among == kernel_set_from(among.description, among.arrays)
    assert hash(loaded.settings.kernel.among) == hash(among)
    for k in range(3):
        assert_allclose(loaded.kernel.get(k), net.kernel.get(k), rtol=0, atol=1e-14)
    f = [bumps(places(n.Y)) for n in (net, loaded)]
    moments = [n.Y.sum((each * n.Y.weights[:, None]).T @ n.Y.values(n(n.Y.batch(each)))) for n, each in zip((net, loaded), f)]
    assert_allclose(*moments, rtol=0, atol=1e-11)


def test_sets_that_no_set_describes_are_refused():
    for name in ("sphere", "functions on the sphere"):
        among = made(name)[1]
        good, arrays = dict(among.description), {key: np.array(array) for key, array in among.arrays.items()}
        for key, array in arrays.items():
            bad = array.copy()
            bad[-1] = 10**6 if bad.dtype.kind == "i" else np.nan
            with pytest.raises(ValueError, match=f"^{key}: "):
                kernel_set_from(good, arrays | {key: bad})
    among = made("sphere")[1]
    good, arrays = dict(among.description), dict(among.arrays)
    for key, value in (("rank", 0), ("rank", 10**9), ("count", 10**12), ("broken", -1.0)):
        with pytest.raises(ValueError, match=f"^{key}: "):
            kernel_set_from(good | {key: value}, arrays)
    with pytest.raises(ValueError, match="^values: expected orthonormal matrices"):
        kernel_set_from(good, arrays | {"values": 2 * arrays["values"]})


@on_ranks
@pytest.mark.parametrize("name", ["disk", "functions on the disk", "sphere"])
def test_the_network_moves_to_another_mesh_and_is_truncated(name):
    net = network(name)
    domain = name.split()[-1]
    finer = net.on(basis({"disk": "finest disk", "sphere": "sphere"}[domain], "DG0", 9).Y)
    assert finer.settings.kernel.among == net.settings.kernel.among
    assert_allclose(finer.kernel.get(1), net.kernel.get(1), rtol=0, atol=1e-13)
    w = [n.Y.sum((bumps(n.Y.coordinates) * n.Y.weights[:, None]).T @ n.Y.values(n(n.Y.batch(bumps(n.Y.coordinates)))))
         for n in (net, finer)]  # fmt: skip
    assert_allclose(*w, rtol=0, atol=0.05 * np.abs(w[0]).max())
    cut = net.truncated(0.0)
    assert cut.settings.kernel.among is None
    assert_allclose(states(cut), states(net), rtol=0, atol=1e-11)


@on_ranks
@pytest.mark.parametrize("name", ["sphere", "functions on the disk", "ring"])
def test_networks_of_symmetric_kernels_pass_the_verification(name):
    report = verify(problem(network(name, size=0.5), tikhonov(0.05) + smooth_in_time(0.05)), quick=True)
    assert report.passed, report.failures
    assert not any("not quadratic" in str(check) for check in report.checks)


def test_the_elements_of_a_set_are_sparse():
    """A few numbers for each of them, and not rank^2 = 1,296."""
    phi = basis("finest disk", "CG1", 36)
    among = Symmetric(phi, rotation(phi))
    assert len(among.arrays["values"]) <= 8 * among.count


@pytest.mark.parametrize("size", [2, 9, 40], ids=["small blocks", "large blocks", "one block"])
@pytest.mark.parametrize("more", [0, 3], ids=["square", "with columns alone"])
def test_products_by_blocks_are_those_of_the_whole_matrix(size, more, rank=40):
    rng = np.random.default_rng(size)
    of_rows, of_columns = rng.permutation(rank) // size, np.append(rng.permutation(rank) // size, [-1] * more)
    pattern = of_rows[:, None] == of_columns
    couplings = Couplings.of_pattern(scipy.sparse.csr_array(pattern.astype(float)))
    assert (couplings is None) == (size == 40), "one block is the whole matrix"
    if couplings is not None:
        beta, g, D = pattern * rng.normal(size=pattern.shape), *(rng.normal(size=(n, 5)) for n in reversed(pattern.shape))
        assert_allclose(couplings.times(beta, g), beta @ g, atol=1e-14)
        assert_allclose(couplings.transposed_times(beta, D), beta.T @ D, atol=1e-14)
        assert_allclose(couplings.outer(D, g), pattern * (D @ g.T), atol=1e-14)


def test_a_set_that_couples_few_functions_multiplies_by_blocks():
    phi = basis("finer disk", "CG1", 21)
    assert LaplaceFunctions(phi).couplings() is not None
    assert Symmetric(phi, rotation(phi)).couplings() is not None


def test_a_set_of_many_controls_makes_no_square_matrix_of_them():
    """The inner product of the E_k is that of numbers: 100,000 of them would have a Gram matrix of 75 GB."""
    controls = MatrixControls(basis("disk", "CG1", 3).Y, (100_000, 1))
    X = np.random.default_rng(0).normal(size=controls.shape)
    for same in (controls.functional, controls.riesz, controls.coordinates, controls.from_coordinates):
        assert_array_equal(same(X), X)
        assert same(X) is not X
