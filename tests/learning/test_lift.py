"""Lifts: f_I = V u, its derivatives, symmetries, other meshes, files, training; the same on each number of ranks."""

import copy
from functools import cache

import firedrake as fd
import numpy as np
import pytest
import sympy
from firedrake import COMM_SELF, COMM_WORLD
from firedrake.adjoint import Control, ReducedFunctional
from helpers import TIMES, flat_network, half_square_distance, label_space, set_smooth, smooth
from kinds import GRADIENT, directions_of, options, smooth_values
from numpy.testing import assert_allclose, assert_array_equal
from problems import polynomials
from pyadjoint.enlisting import Enlist
from pyadjoint.tape import stop_annotating

import fem_resnet.learning.lift
from fem_resnet import (
    Batch,
    Bias,
    Channels,
    Derivatives,
    Head,
    Kernel,
    LearningProblem,
    Lift,
    Observations,
    Parity,
    ResidualNetwork,
    RunningCost,
    Symmetric,
    cross_entropy,
    huber,
    invariant_functions,
    laplace_basis,
    least_squares,
    load,
    load_lift,
    point_space,
    save,
    smooth_in_space,
    tikhonov,
    train,
    train_by_ranks,
    train_levenberg_marquardt,
    verify,
)  # fmt: skip
from fem_resnet.learning.gauss_newton_matrix import GaussNewtonMatrix, draw_rows

on_ranks = pytest.mark.parallel([1, 2, 3])


@cache
def ring(alone=False):
    forth = np.roll(np.eye(12), 1, axis=0)
    return point_space(np.full(12, 0.5), graph=forth + forth.T, comm=COMM_SELF if alone else COMM_WORLD)


DOMAINS = {
    "disk": lambda alone: label_space("disk", "CG1", alone=alone),
    "annulus of cells": lambda alone: label_space("annulus", "DG0", alone=alone),
    "sphere": lambda alone: label_space("sphere", "CG1", alone=alone),
    "block": lambda alone: label_space("block", "CG1", alone=alone),
    "ring": ring,
}


def basis(domain, alone=False, rank=3):
    return _basis(domain, alone, rank)


@cache
def _basis(domain, alone, rank):
    return laplace_basis(Channels(DOMAINS[domain](alone), 3), rank)


def problem(domain="disk", *, alone=False, fields=2, head=True, regulariser=tikhonov(0.05), batch=None, rank=3, **more):
    """Fields of which a lift makes three channels; V, kernels and head are no matrices of zeros."""
    phi = basis(domain, alone, rank)
    given = {name: more.pop(name) for name in ("running",) if name in more}
    net = flat_network(phi, **{"bias": phi, "times": TIMES, "activation": "tanh"} | more)
    set_smooth(net, np.random.default_rng(0))
    lift = Lift(net.Y, fields)
    lift.start("random", 3)
    output = net.Y
    if head:
        head, output = Head(phi, phi.one, "identity"), phi.Y.one
        head.start("random smooth", 1)
    u, C = lift.fields.batch(smooth(lift.fields)), output.batch(smooth(output, seed=9))
    data = Batch(u, C, [1.0, 2.0, 0.5], **({} if batch is None else batch(lift.fields, output)))
    return LearningProblem(net, head or None, least_squares, regulariser, data, lift=lift, **given)


def derivative_of(J):
    return [np.array(d.dat.data_ro) for d in Enlist(J.derivative())]


# -- values ------------------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("fields", [1, 2, 4])
def test_channels_are_combinations_of_fields(domain, fields):
    Y = basis(domain).Y
    lift = Lift(Y, fields)
    assert lift.fields.channels == fields and lift.fields.one is Y.one
    u = smooth(lift.fields)
    parts = np.split(u, fields)
    if fields < 4:
        joined = Y.join([Y.one.batch(part) for part in parts] + [None] * (3 - fields))
        assert_allclose(Y.values(lift(lift.fields.batch(u))), Y.values(joined), rtol=0)
    V = np.random.default_rng(1).normal(size=(3, fields))
    lift.V.set(0, V)
    expected = np.vstack([sum(V_cm * part for V_cm, part in zip(row, parts)) for row in V])
    assert_allclose(Y.values(lift(lift.fields.batch(u))), expected, atol=1e-14)
    assert_array_equal(lift.matrix(), V)
    other = copy.deepcopy(lift)
    other.start()
    assert_array_equal(lift.matrix(), V)
    assert_array_equal(other.matrix(), np.eye(3, fields) if fields < 4 else np.hstack([np.eye(3), np.eye(3, 1)]))


def test_random_lifts_keep_the_size_of_fields():
    lift = Lift(basis("disk").Y, 2)
    squares = []
    for seed in range(300):
        lift.start("random", seed, gain=3.0)
        squares.append(lift.matrix() ** 2)
    assert_allclose(np.mean(squares, axis=0), 9 / 2, rtol=0.3)


# -- derivatives -------------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
def test_taylor(domain, head, taylor):
    """With a head the layers step what psi sees of f_I, without one f_I itself."""
    p = problem(domain, head=head, layers_per_block=2)
    taylor(p.reduced_functional(), p.functions, directions_of(p), domain, f"a lift, head {head}", second_order=True)


@pytest.mark.parametrize("more", [
    *({"solver_parameters": options(name)} for name in GRADIENT), {"solver_parameters": {"ts_type": "discrete_gradient"}},
    {"bias": None}, {"gradient_flow": True}, {"learn_times": True}, {"learn_factors": True},
    {"kernel_in_time": "linear", "bias_in_time": "linear"}, {"times": [0.0]},
], ids=str)  # fmt: skip
def test_taylor_of_each_kind_of_layers(more, taylor):
    p = problem(**more)
    taylor(p.reduced_functional(), p.functions, directions_of(p), str(more)[:40], "a lift", second_order=True)


@on_ranks
def test_taylor_in_the_fields_too(taylor, annotation):
    """A user's own functional of V and u, in which the lift has curvature."""
    p = problem()
    u, Y = p.batch.inputs, p.net.Y
    with annotation():
        J = half_square_distance(p.net.run(p.lift(u)).final, Y.batch(smooth(Y, seed=7)), Y)
    functional = ReducedFunctional(J, [*p.lift.V.controls(), Control(u, riesz_map=p.lift.fields.riesz_map)])
    V = fd.Function(p.lift.V.space_basis.space)
    p.lift.V.space_basis.write(V, smooth_values(p.lift.V.space_basis, 1))
    h = [V, p.lift.fields.batch(smooth(p.lift.fields, seed=8))]
    taylor(functional, [p.lift.V.functions[0], u], h, "disk", "V and u", second_order=True)


def observed(fields, output):
    targets = [output.batch(smooth(output, seed=seed)) for seed in (21, 22)]
    return {"observations": Observations((0, 1), targets, (0.7, 0.5))}


def differentiated(fields, output):
    return {"derivatives": Derivatives(fields.batch(smooth(fields, seed=31)), output.batch(smooth(output, seed=32)), 0.5)}


@pytest.mark.parametrize("head", [True, False])
def test_taylor_with_observations_derivatives_and_a_running_cost(head, taylor):
    f, a = sympy.symbols("f a")
    cost = RunningCost(f**2 + a**2 / 20)
    for name, second, more in (
        ("observations", True, {"batch": observed}),
        ("derivatives", False, {"batch": differentiated}),
        ("running", True, {"running": cost}),
    ):
        p = problem(head=head, **more)
        taylor(p.reduced_functional(), p.functions, directions_of(p), name, f"a lift, head {head}", second_order=second)


@on_ranks
@pytest.mark.parametrize("head", [True, False])
def test_the_derivative_is_the_integral_of_the_co_state_with_the_fields(head):
    """dJ/dV_cm = sum_s int r_c u_m, with the regulariser left out."""
    p = problem("annulus of cells", head=head, regulariser=None)
    J, run = p.record()
    with stop_annotating():
        d = J.derivative()
    at = next(k for k, function in enumerate(p.functions) if function is p.lift.V.functions[0])
    r, u = (np.split(Y.values(f), parts) for Y, f, parts in (
        (p.net.Y, run.costate(0), 3), (p.lift.fields, p.batch.inputs, 2)
    ))  # fmt: skip
    w, one = p.net.Y.one.weights, p.net.Y.one
    expected = [[float(one.sum(np.sum(w @ (r_c * u_m)))) for u_m in u] for r_c in r]
    assert_allclose(p.lift.V.space_basis.read(d[at]), expected, rtol=1e-10)


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("domain", ["annulus of cells", "sphere", "ring"])
def test_any_number_of_ranks_gives_the_same(domain):
    found = []
    for alone in (False, True):
        p = problem(domain, alone=alone)
        J = p.reduced_functional()
        derivative = Enlist(J.derivative())
        at = next(k for k, function in enumerate(p.functions) if function is p.lift.V.functions[0])
        h = directions_of(p)
        found.append([float(J(p.functions)), p.lift.V.space_basis.read(derivative[at])])
        J.derivative()
        found[-1].append(p.lift.V.space_basis.read(Enlist(J.hessian(h))[at]))
    for ours, theirs in zip(*found, strict=True):
        assert_allclose(ours, theirs, rtol=1e-8)


def test_regularisers_take_V_with_a_weight_of_its_own():
    V = problem().lift.matrix()
    values = [
        float(problem(regulariser=regulariser).evaluate()[0])
        for regulariser in (tikhonov(0.0), tikhonov(0.0, V=0.5), smooth_in_space(0.0), huber(0.0, 1.0))
    ]
    assert_allclose(values[1] - values[0], 0.25 * np.sum(V**2), rtol=1e-12)
    assert_allclose(values[2:], values[0], rtol=1e-14)
    with pytest.raises(
        ValueError, match="expected a parameter with values on the label domain, got Parameter.V.* the weight 0"
    ):
        problem(regulariser=huber(0.1, 1.0, W=0.0)).evaluate()
    assert float(problem(regulariser=huber(0.1, 1.0, V=0.0, W=0.0)).evaluate()[0]) > values[0]


# -- symmetries --------------------------------------------------------------------------------------------------------


def mirrored(alone=False):
    """Four channels on a ring, two of each sign, that keep shifts and a mirror; fields of the signs -1 and 1."""
    mirror = Parity(-np.arange(12) % 12, (-1, 1, -1, 1), output=-1, inputs=(-1, 1))
    symmetries = ((np.arange(12) + 1) % 12, mirror)
    phi = laplace_basis(Channels(ring(alone), 4), 7)
    net = ResidualNetwork(
        Kernel(phi, among=Symmetric(phi, *symmetries)), bias=Bias(invariant_functions(phi, *symmetries)), layers=TIMES
    )
    net.start("local", 1)
    head = Head(phi, phi.one, "identity", symmetries=symmetries)
    head.start("random smooth", 2)
    return net, head, Lift(net.Y, 2, symmetries=symmetries)


@on_ranks
def test_a_lift_keeps_symmetries_by_zeros_in_V():
    net, head, lift = mirrored()
    assert lift.V.get(0).shape == (4,)
    assert_array_equal(lift.matrix(), [[1, 0], [0, 1], [0, 0], [0, 0]])
    lift.start("random", 5)
    assert_array_equal(lift.matrix() == 0, [[False, True], [True, False]] * 2)
    Y, one = lift.fields, net.Y.one
    u = np.random.default_rng(0).normal(size=(2, 12, 3))
    images = []
    for turned in (False, True):
        given = u * np.array([-1, 1])[:, None, None] if turned else u
        given = given[:, -np.arange(12) % 12] if turned else given
        output = one.values(head(net(lift(Y.batch(np.vstack([part[one.numbers] for part in given]))))))
        numbers = np.concatenate(one.comm.allgather(one.numbers))
        images.append(np.concatenate(one.comm.allgather(output.copy()))[np.argsort(numbers)])
    assert np.abs(images[0]).max() > 0.01
    assert_allclose(images[1], -images[0][-np.arange(12) % 12], atol=1e-12)


def test_a_lift_that_keeps_symmetries_is_trained_within_them(taylor):
    net, head, lift = mirrored()
    u = lift.fields.batch(smooth(lift.fields))
    batch = Batch(u, net.Y.one.batch(smooth(net.Y.one, seed=9)))
    p = LearningProblem(net, head, least_squares, tikhonov(1e-3), batch, lift=lift)
    taylor(p.reduced_functional(), p.functions, directions_of(p), "ring", "a lift that keeps a mirror", second_order=True)
    before = lift.matrix()
    result = train_levenberg_marquardt(p, iterations=3)
    assert result.values[-1] < 0.9 * result.values[0]
    assert_array_equal(lift.matrix() == 0, [[False, True], [True, False]] * 2)
    assert np.abs(lift.matrix() - before).max() > 1e-3


@pytest.mark.parametrize(
    ("parity", "message"),
    [
        (
            Parity(lambda x: -x, (1, 1, 1), inputs=(1, -1)),
            "expected a channel with the signs of each field, got none for field 1",
        ),
        (Parity(lambda x: -x, (1, -1)), r"symmetries\[0\].signs: expected 3, one a channel, got 2"),
        (Parity(lambda x: -x, (1, -1, 1), inputs=(1, 1, 1)), r"symmetries\[0\].inputs: expected 2, one a field, got 3"),
    ],
)
def test_signs_that_do_not_fit_are_refused(parity, message):
    with pytest.raises(ValueError, match=message):
        Lift(basis("disk").Y, 2, symmetries=[parity])


# -- what it goes with -------------------------------------------------------------------------------------------------


def test_what_a_lift_does_not_go_with_is_refused():
    p = problem()
    with pytest.raises(ValueError, match="lift: expected one into the network's label space"):
        p.replace(lift=Lift(Channels(p.net.Y.one, 3), 2))
    for changes, message in (
        ({"learn": "both"}, "learn: expected 'parameters' with a lift, got 'both'"),
        ({"learn": "initial"}, "learn: expected 'parameters' with a lift, got 'initial'"),
        ({"checkpoints": 1}, "checkpoints: expected None with a lift, got 1"),
        ({"lift": None}, "batch.inputs: "),
    ):
        with pytest.raises(ValueError, match=message):
            p.replace(**changes)
    with pytest.raises(ValueError, match="u: "):
        p.lift(p.net.Y.batch(smooth(p.net.Y)))
    with pytest.raises(ValueError, match="on: expected a label space with 3 channels"):
        p.lift.on(Channels(p.net.Y.one, 2))


@on_ranks
def test_on_a_finer_mesh_it_is_the_same_lift():
    p, values = problem("disk"), []
    for refinement in (1, 2, 4):
        Y = Channels(label_space("disk", "CG1", refinement), 3)
        lift, head = p.lift.on(Y), p.head.on(Y)
        assert_array_equal(lift.matrix(), p.lift.matrix())
        u, C = lift.fields.batch(smooth(lift.fields)), Y.one.batch(smooth(Y.one, seed=9))
        values.append(float(LearningProblem(p.net.on(Y), head, least_squares, None, Batch(u, C), lift=lift).evaluate()[0]))
    assert abs(values[1] - values[2]) < 0.5 * abs(values[0] - values[2]), values


@on_ranks
def test_files_keep_it(tmp_path):
    folder = COMM_WORLD.bcast(str(tmp_path))
    p = problem("sphere")
    p = p.replace(head=Head(basis("sphere"), 4), loss=cross_entropy, batch=Batch(p.batch.inputs, [0, 3, 1]))
    p.head.start("random smooth", 1)
    save(f"{folder}/lifted.h5", p.net, p.head, p.lift)
    net, head = load(f"{folder}/lifted.h5")
    lift = load_lift(f"{folder}/lifted.h5", net.Y)
    assert lift.Y is net.Y and head.psi.Y is net.Y
    assert_array_equal(lift.matrix(), p.lift.matrix())
    found = [one.net.Y.sum(np.abs(one.head.scores(one.net(one.lift(one.u)))).sum()) for one in (
        _Named(p.net, p.head, p.lift), _Named(net, head, lift)
    )]  # fmt: skip
    assert_allclose(found[0], found[1], rtol=1e-12)
    with pytest.raises(ValueError, match="Y: expected one with 3 channels"):
        load_lift(f"{folder}/lifted.h5", basis("sphere").one.Y)
    save(f"{folder}/plain.h5", p.net, p.head)
    assert load_lift(f"{folder}/plain.h5", p.net.Y) is None
    with pytest.raises(ValueError, match="lift: expected one into the network's label space"):
        save(f"{folder}/other.h5", p.net, None, lift)
    # One that keeps symmetries keeps them.
    mirror_net, _, mirror_lift = mirrored()
    mirror_lift.start("random", 1)
    save(f"{folder}/mirror.h5", mirror_net, None, mirror_lift)
    lift = load_lift(f"{folder}/mirror.h5", load(f"{folder}/mirror.h5")[0].Y)
    assert_array_equal(lift.V.get(0), mirror_lift.V.get(0))
    assert_array_equal(lift.kept.allowed, mirror_lift.kept.allowed)
    assert not lift.kept.allowed.all()


class _Named:
    def __init__(self, net, head, lift):
        self.net, self.head, self.lift = net, head, lift
        self.u = lift.fields.batch(smooth(lift.fields))


# -- training ----------------------------------------------------------------------------------------------------------


@on_ranks
def test_training_finds_the_best_V():
    """Without layers and head J is quadratic in V alone, and its minimum is a least squares fit over all nodes and samples."""
    p = problem("annulus of cells", head=False, times=[0.0], regulariser=tikhonov(0.0, V=0.02))
    assert p.parameters[-1] is p.lift.V
    result = train(p, {"tao_max_it": 200, "tao_gatol": 1e-13, "tao_grtol": 0.0})
    one, omega = p.net.Y.one, np.array(p.batch.weights) / np.sum(p.batch.weights)
    u, C = (np.array(np.split(Y.values(f), parts)) for Y, f, parts in (
        (p.lift.fields, p.batch.inputs, 2), (p.net.Y, p.batch.targets, 3)
    ))  # fmt: skip
    moments = [one.sum(np.einsum("cis,mis,i,s->cm", left, u, one.weights, omega)) for left in (u, C)]
    expected = np.linalg.solve(moments[0] + 0.02 * np.eye(2), moments[1].T).T
    assert_allclose(p.lift.matrix(), expected, atol=1e-7)
    assert result.value < result.values[0]


@on_ranks
def test_training_with_the_head_eliminated_learns_V():
    p = problem("disk", regulariser=tikhonov(1e-6))
    before = p.lift.matrix()
    result = train(p, {"tao_max_it": 10}, eliminate="head")
    assert np.abs(p.lift.matrix() - before).max() > 1e-3
    assert result.value < result.values[0]


@on_ranks
@pytest.mark.parametrize("kind", ["coefficients", "nodes", "no layers"])
def test_the_matrix_of_gauss_and_newton_has_rows_of_V(kind):
    """All rows give the action of pyadjoint's sweeps."""
    p = problem(**{"nodes": {"psi": polynomials(basis("disk").Y)}, "no layers": {"times": [0.0]}}.get(kind, {}))
    matrix = GaussNewtonMatrix(p)
    H, coordinates = matrix.of(draw_rows(p, 10**6, 10**3, np.random.default_rng(0))), matrix.coordinates
    J, zeros = p.reduced_functional(gauss_newton=True), [np.zeros_like(c) for c in coordinates.read()]
    with stop_annotating():
        J(p.functions)
        J.derivative()
        for x in np.random.default_rng(0).normal(size=(3, coordinates.size)):
            h = []
            for (parameter, k), c in zip(coordinates.sets, coordinates.moved(zeros, x)):
                h.append(fd.Function(parameter.space_bases[k].space))
                parameter.space_bases[k].write(h[-1], c)
            action = coordinates.functional(Enlist(J.hessian(h)))
            assert_allclose(H @ x, action, atol=1e-9 * np.abs(action).max())


@on_ranks
def test_with_the_head_eliminated_it_is_the_schur_complement():
    p, rng = problem(), np.random.default_rng(0)
    matrix, whole = GaussNewtonMatrix(p, eliminate=True), GaussNewtonMatrix(p)
    found, H = matrix.of(draw_rows(p, 10**6, 10**3, rng, shared=True)), whole.of(draw_rows(p, 10**6, 10**3, rng))
    t, w = slice(matrix.coordinates.size), slice(matrix.coordinates.size, None)
    expected = H[t, t] - H[t, w] @ np.linalg.solve(H[w, w], H[w, t])
    assert_allclose(found, expected, atol=1e-8 * np.abs(expected).max())


@on_ranks
def test_levenberg_and_marquardt_and_rank_continuation_take_it():
    p = problem("sphere", regulariser=tikhonov(1e-6), rank=4)
    start = float(p.evaluate()[0])
    first, last = train_by_ranks(p, (1, 4), lambda stage: train_levenberg_marquardt(stage, iterations=4, eliminate="head"))
    assert last.value < first.value < start
    assert_allclose(float(p.evaluate()[0]), last.value, rtol=1e-9)
    for found, parameter in zip(last.controls[-3:], [p.lift.V, p.head.W, p.head.mu], strict=True):
        assert_allclose(found, parameter.get(0), rtol=1e-12)


# -- verify ------------------------------------------------------------------------------------------------------------


@pytest.mark.parallel([1, 2])
def test_verify_takes_a_lift():
    report = verify(problem("annulus of cells", layers_per_block=2), quick=True)
    assert report.passed, str(report)
    assert "V_0" in str(report)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("_products", lambda right: lambda self, functional, u: right(self, functional, u) * 1.001),
        ("_combined", lambda right: staticmethod(lambda V, u: right(V[::-1], u))),
        ("tangent", lambda right: lambda self, arrays, directions: right(self, arrays, directions) * 1.001),
    ],
)
def test_verify_sees_a_mistake(monkeypatch, name, wrong):
    operator = fem_resnet.learning.lift._LiftOperator
    monkeypatch.setattr(operator, name, wrong(getattr(operator, name)))
    assert not verify(problem("disk"), quick=True, exit_first=True).passed


def test_smooth_values_exist_for_V():
    """What the tests above take for directions is no zero."""
    assert np.abs(smooth_values(problem().lift.V.space_basis, 1)).min() > 1e-3
