"""The head eliminated: W and mu of least J in every evaluation, and the gradient of what is left."""

import logging
from dataclasses import replace
from functools import cache

import firedrake as fd
import numpy as np
import pytest
import scipy.linalg
from firedrake import COMM_SELF, COMM_WORLD
from helpers import flat_network, laplace, set_smooth, smooth
from numpy.testing import assert_allclose
from problems import TIMES, gathered, learning_problem, network, polynomials, towards
from pyadjoint.enlisting import Enlist

from fem_resnet import (
    Basis,
    Batch,
    Derivatives,
    Head,
    LabelSpace,
    LearningProblem,
    Observations,
    Regulariser,
    ResidualNetwork,
    laplace_basis,
    least_squares,
    point_space,
    smooth_in_space,
    smooth_in_time,
    tikhonov,
    train,
)  # fmt: skip

on_ranks = pytest.mark.parallel([1, 2, 3])
SAMPLES = 7
OMEGA = np.array([1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 0.2])


def ring(alone):
    """Twelve points on a ring with chords, of unequal weights."""
    A = np.zeros((12, 12))
    for k in range(12):
        A[k, (k + 1) % 12] = 1.0 + 0.1 * k
        A[k, (5 * k + 2) % 12] += 0.3
    np.fill_diagonal(A, 0)
    angles = np.arange(12) * np.pi / 6
    points = np.column_stack([np.cos(angles), np.sin(angles)])
    return point_space(0.5 + 0.1 * np.arange(12), points, graph=A + A.T, comm=COMM_SELF if alone else COMM_WORLD)


@cache
def bases(domain, alone):
    """phi; and a psi that is not orthonormal."""
    phi = laplace_basis(ring(alone), 4) if domain == "graph" else laplace(domain, "CG1", 4, alone)
    return phi, polynomials(phi.Y)


#: Where f lives, and where the output; none is a cube, none of measure one.
OUTPUTS = {
    "disk to disk": ("disk", "disk"),
    "disk to 3 classes": ("disk", 3),
    "sphere to disk": ("sphere", "disk"),
    "block to sphere": ("block", "sphere"),
    "graph to graph": ("graph", "graph"),
}
each_output = pytest.mark.parametrize("kind", OUTPUTS)


def problem(kind="disk to disk", regulariser=tikhonov(0.02), *, alone=False, learn="parameters"):
    source, target = OUTPUTS[kind]
    phi, psi = bases(source, alone)
    net = flat_network(phi, psi, bias=phi, times=TIMES, activation="tanh")
    set_smooth(net, np.random.default_rng(0))
    # The basis of the output is not orthonormal either.
    head = Head(psi, target if isinstance(target, int) else bases(target, alone)[1], "identity")
    targets = head.Y.batch(smooth(head.Y, SAMPLES, seed=9)) if head.classes is None else np.arange(SAMPLES) % head.classes
    batch = Batch(net.Y.batch(smooth(net.Y, SAMPLES)), targets, OMEGA)
    return LearningProblem(net, head, least_squares, regulariser, batch, learn=learn)


def eliminated(p):
    """J without W and mu, and the Functions that it depends on."""
    J, _ = p.record(eliminate="head")
    return J, [function for parameter in J.parameters for function in parameter.functions]


def point(J):
    return [control.tape_value().copy(deepcopy=True) for control in J.controls]


def by_dense_least_squares(p, weight):
    """W and mu from one dense system of rows (node, sample), all unknowns together."""
    net, head = p.net, p.head
    X = gathered(head.Y, head.onto.values)
    w = gathered(head.Y, head.Y.weights)
    C = gathered(head.Y, head.Y.values(p._samples.at_end))
    g = head.psi.project(net.Y.values(net(p.batch.inputs)))
    omega = OMEGA / OMEGA.sum()
    g_1 = np.vstack([g, np.ones(SAMPLES)])
    rows = np.einsum("is,ik,js->iskj", np.sqrt(np.outer(w, omega)), X, g_1).reshape(-1, X.shape[1] * len(g_1))
    right = (np.sqrt(np.outer(w, omega)) * C).ravel()
    gram = scipy.linalg.block_diag(head.psi.gram, 1.0)
    ridge = np.sqrt(weight) * scipy.linalg.cholesky(np.kron(head.onto.gram, gram))
    solved = np.linalg.lstsq(np.vstack([rows, ridge]), np.append(right, np.zeros(len(ridge))), rcond=None)[0]
    solved = solved.reshape(X.shape[1], -1)
    return solved[:, :-1], solved[:, -1]


@on_ranks
@each_output
@pytest.mark.parametrize("weight", [0.0, 0.02])
def test_W_and_mu_are_those_of_a_dense_least_squares_solve(kind, weight):
    p = problem(kind, tikhonov(weight) + smooth_in_time(0.3))
    J, functions = eliminated(p)
    value = float(J(functions))
    J.give_head()
    for parameter, expected in zip(p.head.parameters, by_dense_least_squares(p, weight)):
        assert_allclose(parameter.get(0), expected, rtol=1e-9, atol=1e-10)
    assert_allclose(value, float(p.evaluate()[0]), rtol=1e-13)
    assert J.undetermined == 0
    for parameter in p.head.parameters:
        found = parameter.get(0)
        parameter.set(0, 1.01 * found)
        assert float(p.evaluate()[0]) > value
        parameter.set(0, found)


@on_ranks
@each_output
def test_Taylor_of_J_without_W_and_mu(kind, taylor):
    J, functions = eliminated(problem(kind))
    J(functions)
    taylor(J, point(J), directions(J), "head eliminated", kind)


def directions(J):
    """Half the gradient, half random, the same on every partition."""
    rng, h = np.random.default_rng(4), []
    owners = [(parameter, k) for parameter in J.parameters for k in range(len(parameter.functions))]
    for (parameter, k), gradient in zip(owners, Enlist(J.derivative(apply_riesz=True))):
        basis = parameter.space_bases[k]
        random = fd.Function(basis.space)
        fields = parameter.name == "initial"
        basis.write(random, smooth(basis.Y, basis.shape[1], seed=3) if fields else rng.normal(size=basis.shape))
        h.append(towards(gradient, random))
    return h


@on_ranks
def test_Taylor_with_all_that_may_stand_beside_the_loss_at_T(taylor):
    """Observations at f_I and before T, derivatives of the output, a learned f_I."""
    p = problem("sphere to disk", learn="both")
    Y, Z = p.net.Y, p.head.Y
    more = {
        "observations": Observations((0, 2), [Z.batch(smooth(Z, SAMPLES, seed=k)) for k in (20, 21)], (0.5, 2.0)),
        "derivatives": Derivatives(Y.batch(smooth(Y, SAMPLES, seed=22)), Z.batch(smooth(Z, SAMPLES, seed=23)), 0.7),
    }
    p = p.replace(batch=Batch(p.batch.inputs, p.batch.targets, OMEGA, **more))
    J, functions = eliminated(p)
    value = float(J(functions))
    J.give_head()
    assert_allclose(value, float(p.evaluate()[0]), rtol=1e-12)
    whole = p.reduced_functional()
    whole(p.functions)
    by_parameter = gradients_by_name(p, whole.derivative())
    for name in ("W", "mu"):
        assert_allclose(by_parameter[name], 0, atol=1e-13)
    taylor(J, point(J), directions(J), "head eliminated", "observations and derivatives")


def gradients_by_name(p, derivative):
    owners = [parameter for parameter in p.parameters for _ in parameter.functions]
    return {owner.name: owner.space_bases[0].read(d) for owner, d in zip(owners, Enlist(derivative))}


@on_ranks
@each_output
def test_a_partition_changes_nothing(kind):
    found = []
    for alone in (False, True):
        p = problem(kind, alone=alone)
        J, functions = eliminated(p)
        value = float(J(functions))
        derivative = [parameter for parameter in J.parameters for _ in parameter.functions]
        arrays = [p.space_bases[0].read(d) for p, d in zip(derivative, Enlist(J.derivative()))]
        J.give_head()
        found.append((value, J.condition, *arrays, p.head.W.get(0), p.head.mu.get(0)))
    for ours, expected in zip(*found):
        assert_allclose(ours, expected, rtol=1e-8, atol=1e-10)


@on_ranks
@pytest.mark.parametrize("regulariser", [None, tikhonov(0.02)], ids=["alone", "tikhonov"])
def test_a_schedule_of_checkpoints_changes_nothing(regulariser):
    found = []
    for checkpoints in (None, 1):
        p = problem("sphere to disk", regulariser)
        net = p.net.replace(layers=replace(p.net.settings.layers, per_block=1))
        J, functions = eliminated(p.replace(net=net, checkpoints=checkpoints))
        for size in (1.0, 1.1):
            functions[-1].dat.data[...] *= size
            found.append([float(J(functions)), *(d.dat.data_ro.copy() for d in Enlist(J.derivative()))])
            J.give_head()
            found[-1] += [p.head.W.get(0), p.head.mu.get(0)]
    for plain, scheduled in zip(found[:2], found[2:]):
        for expected, ours in zip(plain, scheduled):
            assert_allclose(ours, expected, rtol=1e-10, atol=1e-13)


def test_training_ends_at_the_joint_optimum():
    values, coefficients = [], []
    for eliminate in ("head", None):
        p = problem("disk to 3 classes", tikhonov(0.1))
        result = train(p, {"tao_max_it": 2000, "tao_gatol": 1e-8}, eliminate=eliminate)
        assert result.converged
        values.append(result.value)
        coefficients.append(np.concatenate([c.ravel() for c in result.controls]))
        assert len(result.controls) == len(p.functions)
        assert (result.condition is None) == (eliminate is None)
    assert_allclose(*values, rtol=1e-12)
    assert_allclose(*coefficients, atol=1e-6)


def burgers(samples, nodes, modes):
    """u_t + u u_x = 0.1 u_xx on a circle of length one by the formula of Cole and Hopf: u at the times 0 and 1."""
    rng, n = np.random.default_rng(0), 960
    k = 2 * np.pi * np.arange(n // 2 + 1)
    size = 25 / (k**2 + 25) * (np.arange(k.size) > 0) * (np.arange(k.size) < 100) / np.sqrt(2)
    start = np.fft.irfft(n * size * (rng.normal(size=(samples, k.size)) + 1j * rng.normal(size=(samples, k.size))))
    integral = np.fft.irfft(np.fft.rfft(start) / (1j * np.maximum(k, 1.0)))  # the mean of u is zero
    theta = np.fft.rfft(np.exp(-integral / 0.2)) * np.exp(-0.1 * k**2)
    end = -0.2 * np.fft.irfft(1j * k * theta) / np.fft.irfft(theta)
    Y = LabelSpace(fd.FunctionSpace(fd.PeriodicUnitIntervalMesh(nodes), "CG", 1))
    at = np.rint(Y.coordinates[:, 0] * n).astype(int) % n
    phi = laplace_basis(Y, modes)
    net = ResidualNetwork(phi, bias=phi, layers=2, final_time=2.0)
    set_smooth(net, np.random.default_rng(1), 0.5)
    batch = Batch(Y.batch((start / start.std()).T[at]), Y.batch((end / end.std()).T[at]))
    return LearningProblem(net, Head(phi, phi, "identity"), least_squares, tikhonov(1e-8), batch)


def test_a_hundred_iterations_do_more_than_three_hundred_without():
    with_, without = (
        train(burgers(60, 48, 13), {"tao_max_it": iterations}, eliminate=eliminate)
        for iterations, eliminate in ((100, "head"), (300, None))
    )
    assert with_.iterations == 100 and without.iterations == 300
    assert with_.values[0] < 0.01 * without.values[0]
    assert with_.value < 0.5 * without.value


@on_ranks
def test_the_head_holds_what_belongs_to_each_iteration():
    p, seen = problem("sphere to disk"), []

    def watch(progress):
        seen.append(progress.iteration)
        assert_allclose(float(p.evaluate()[0]), progress.value, rtol=1e-11)
        return progress.iteration == 6

    result = train(p, {"tao_type": "lmvm"}, monitor=watch, eliminate="head")
    assert seen == list(range(7)) and result.reason == "STOPPED"
    assert_allclose(float(p.evaluate()[0]), result.value, rtol=1e-12)

    def fails(progress):
        seen.append(progress.value)
        if progress.iteration == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        train(p, monitor=fails, eliminate="head")
    assert_allclose(float(p.evaluate()[0]), seen[-1], rtol=1e-11)


@on_ranks
def test_bounds_on_the_others_hold():
    p = problem()
    result = train(p, {"tao_max_it": 15}, bounds={"kernel": (-0.4, 0.4)}, eliminate="head")
    beta = np.stack([p.net.kernel.get(k) for k in range(3)])
    assert np.abs(beta).max() == 0.4
    assert_allclose(float(p.evaluate()[0]), result.value, rtol=1e-12)
    for name in ("W", "mu"):
        with pytest.raises(ValueError, match=f"bounds: expected none on {name}, which eliminate='head' solves for"):
            train(p, bounds={name: (0, 1)}, eliminate="head")


@on_ranks
def test_another_batch_is_solved_for_with_its_own_weights():
    p = problem()
    J, functions = eliminated(p)
    Y, Z = p.net.Y, p.head.Y
    J(functions)
    p.exchange(Batch(Y.batch(smooth(Y, SAMPLES, seed=31)), Z.batch(smooth(Z, SAMPLES, seed=32)), OMEGA[::-1]))
    J.give_head()
    at_once = float(p.evaluate()[0])
    value, found = float(J(functions)), [d.dat.data_ro.copy() for d in Enlist(J.derivative())]
    J.give_head()
    assert_allclose(value, float(p.evaluate()[0]), rtol=1e-13)
    fresh, functions = eliminated(p)
    assert_allclose([float(fresh(functions)), at_once], value, rtol=1e-13)
    for ours, expected in zip(found, Enlist(fresh.derivative())):
        assert_allclose(ours, expected.dat.data_ro, rtol=1e-9, atol=1e-13)


@on_ranks
def test_what_the_samples_leave_open_takes_the_least_norm(taylor, caplog):
    """All states are even on eight points, and one function of psi is odd."""
    Y = point_space(np.ones(8))
    x = np.array([-4.0, -3, -2, -1, 1, 2, 3, 4])[Y.numbers] / 4
    phi = Basis(Y, np.column_stack([x**0, x**2, x**4]), "given")
    psi = Basis(Y, np.column_stack([x**0, x**2, x**3]), "given")
    net = flat_network(phi, bias=phi, times=TIMES, activation="tanh")
    set_smooth(net, np.random.default_rng(0))
    inputs = np.cos(x[:, None] * np.arange(1, SAMPLES + 1))
    p = LearningProblem(
        net, Head(psi, psi, "identity"), least_squares, None, Batch(Y.batch(inputs), Y.batch(np.sin(5 * inputs)))
    )
    J, functions = eliminated(p)
    J(functions)
    assert J.undetermined == 1 and J.unknowns == 4 and J.condition == np.inf
    taylor(J, point(J), directions(J), "head eliminated", "samples leave it open")
    norms = []
    for weight in (0.0, 1e-11):
        J, functions = eliminated(p.replace(regulariser=tikhonov(weight)))
        J(functions)
        J.give_head()
        norms.append([parameter.inner(0, parameter.get(0), parameter.get(0)) for parameter in p.head.parameters])
    assert_allclose(*norms, rtol=1e-6)
    with caplog.at_level(logging.WARNING, "fem_resnet"):
        result = train(p, {"tao_max_it": 1}, eliminate="head")
    assert result.condition == np.inf
    if COMM_WORLD.rank == 0:
        assert "leave 1 of 4 unknowns of the head open" in caplog.text


def test_the_condition_is_that_of_the_label_measure():
    """W and mu of another psi with the same span are the same functions: so is the condition."""
    p = problem("disk to disk", tikhonov(0.02))
    conditions = []
    for psi in (p.head.psi, Basis(p.net.Y, p.head.psi.values @ np.diag([1.0, 1e-3, 50.0]), "given")):
        J, functions = eliminated(p.replace(head=Head(psi, p.head.onto, "identity")))
        conditions.append((float(J(functions)), J.condition))
    assert_allclose(*conditions, rtol=1e-8)
    assert 1 < conditions[0][1] < 100


def test_large_fields_of_a_failed_step_give_no_number():
    p = problem("disk to disk")
    J, functions = eliminated(p)
    m = point(J)
    m[0].dat.data_wo[...] = np.nan
    with np.errstate(all="ignore"), pytest.raises(ArithmeticError):
        J(m)
    assert np.isfinite(float(J(functions)))


# -- what is refused ---------------------------------------------------------------------------------------------------


def _gradients_of_W(parameter, coefficients):
    if parameter.name != "W":
        return []
    return [parameter.space_basis.stiffness(c) for c in coefficients]


def _not_quadratic(parameter, coefficients):
    return [np.sqrt(c**2 + 1e-2) for c in coefficients] if parameter.name == "mu" else []


def _of_the_kernel(parameter, coefficients):
    return [basis.functional(c) for basis, c in zip(parameter.space_bases, coefficients)] if parameter.name == "kernel" else []


@on_ranks
@pytest.mark.parametrize(("form", "name"), [(_gradients_of_W, "W"), (_not_quadratic, "mu")])
def test_other_regularisers_of_the_head_are_refused(form, name):
    p = problem(regulariser=tikhonov(0.1) + Regulariser(((1.0, form),)))
    with pytest.raises(ValueError, match=f"eliminate: expected a regulariser that is a multiple of .* of {name}, or"):
        p.record(eliminate="head")


def test_a_form_that_leaves_the_head_alone_is_taken(taylor):
    p = problem(regulariser=tikhonov(0.1) + Regulariser(((1.0, _of_the_kernel),)) + smooth_in_space(0.01))
    J, functions = eliminated(p)
    J(functions)
    taylor(J, point(J), directions(J), "head eliminated", "a user's regulariser")


@on_ranks
def test_what_is_not_solved_for_is_refused_by_name():
    p = problem()
    for wrong in ("W", 1, True):
        with pytest.raises(ValueError, match="eliminate: expected one of 'head', got"):
            p.record(eliminate=wrong)
    with pytest.raises(ValueError, match="eliminate: expected a problem with a head"):
        learning_problem(network("disk", "CG1"), head=False).record(eliminate="head")
    logistic = Head(p.head.psi, p.head.onto, "logistic")
    with pytest.raises(ValueError, match="eliminate: .* got least_squares and 'logistic'; leave eliminate out"):
        train(p.replace(head=logistic), eliminate="head")
    with pytest.raises(ValueError, match="gauss_newton: J with eliminate='head' has first derivatives only"):
        train(p, gauss_newton=True, eliminate="head")
    for newton, bounds in (("nls", None), ("ntr", None), ("bntr", {"kernel": (-1, 1)})):
        with pytest.raises(ValueError, match=f"TAO's '{newton}' asks for second derivatives, which J does not have"):
            train(p, {"tao_type": newton}, bounds=bounds, eliminate="head")
    J, functions = eliminated(p)
    J(functions)
    J.derivative()
    for what in ("hessian", "tlm"):
        with pytest.raises(NotImplementedError, match=f"{what}: J with eliminate='head' has first derivatives only"):
            getattr(J, what)(functions)
