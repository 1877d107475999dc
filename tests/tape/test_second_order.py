"""Tangents, Hessian actions and those of Gauss and Newton, of all that is no layer: networks without layers."""

import firedrake as fd
import numpy as np
import pytest
from created import created_functions
from firedrake import COMM_WORLD, dx, grad, inner
from helpers import SAMPLES, half_square_distance, label_space, laplace, smooth
from numpy.testing import assert_allclose, assert_array_equal
from problems import LOSSES, OUTPUTS, head_onto, learning_problem, network, observations, taping, towards
from pyadjoint import Control, ReducedFunctional
from pyadjoint.enlisting import Enlist
from pyadjoint.reduced_functional_numpy import ReducedFunctionalNumPy

from fem_resnet.learning.batch import Batch
from fem_resnet.learning.loss import Loss, functional_loss, least_squares
from fem_resnet.learning.prediction import PREDICTIONS
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.learning.regulariser import smooth_in_space, smooth_in_time, tikhonov
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.parameters.space_basis import BatchValues
from fem_resnet.tape.recording import apply, gauss_newton

on_ranks = pytest.mark.parallel([1, 2, 3])
#: The second sample counts twice, the last not at all.
WEIGHTS = [1.0, 2.0, 0.0]
#: Neither convex nor a polynomial.
quartic = functional_loss(lambda p, C: (fd.cos(2 * p) + (p - C) ** 4) * dx, "quartic")
EVERY_LOSS = LOSSES | {f"a functional in UFL of {h}": (quartic, h) for h in PREDICTIONS}
#: One rank sees them all. Several differ by the sums over them alone, of which these have every kind.
ALONE = COMM_WORLD.size == 1
each_loss = pytest.mark.parametrize(
    "name", EVERY_LOSS if ALONE else ["least squares of a softmax", "cross entropy", "a functional in UFL of logistic"]
)
KINDS = {
    "Tikhonov": tikhonov(0.7),
    "smooth in y": smooth_in_space(0.7),
    "smooth in t": smooth_in_time(0.7),
    "sum": tikhonov(0.3) + smooth_in_space(0.1) + smooth_in_time(2.0),
}


@pytest.fixture(params=OUTPUTS if ALONE else ["disk to 3 classes", "sphere to disk"])
def output(request):
    return OUTPUTS[request.param]


def without_layers(output, loss, prediction, samples=SAMPLES, regulariser=tikhonov(0.1)) -> LearningProblem:
    """Output, loss and regulariser alone: f(T) = f_I."""
    head = head_onto(*output, prediction)
    Y = head.psi.Y
    batch = Batch(Y.batch(smooth(Y, samples)), observations(head, prediction, samples), WEIGHTS[:samples])
    return LearningProblem(ResidualNetwork(head.psi, layers=0), head, loss, regulariser, batch)


def functional(problem: LearningProblem) -> ReducedFunctional:
    """J of W, mu and f_I."""
    J, run = problem.record()
    controls = [*J.controls, Control(run.initial, riesz_map=problem.net.Y.riesz_map)]
    return ReducedFunctional(J.functional, controls, tape=J.tape)


def point(J: ReducedFunctional) -> list[fd.Function]:
    return [control.tape_value()._ad_copy() for control in J.controls]


def random(problem: LearningProblem, seed: int = 0) -> list[fd.Function]:
    """A direction of size one for `functional` that no partition changes."""
    rng = np.random.default_rng(seed)
    directions = []
    for parameter in problem.head.parameters:
        directions.append(fd.Function(parameter.space_basis.space))
        parameter.space_basis.write(directions[-1], rng.normal(size=parameter.space_basis.shape))
    Y, samples = problem.net.Y, problem.batch.samples
    return [*directions, Y.batch(smooth(Y, samples, seed=100 + seed))]


def pair(functionals, directions) -> float:
    return float(sum(v._ad_dot(d) for d, v in zip(Enlist(functionals), Enlist(directions))))


def shifted(m, eps, v) -> list[fd.Function]:
    return [a._ad_add(b._ad_mul(eps)) for a, b in zip(m, v)]


def values(functions) -> np.ndarray:
    return np.concatenate([function.dat.data_ro.ravel() for function in functions])


# -- Hessians --------------------------------------------------------------------------------------------------------


@on_ranks
@each_loss
def test_hessian_through_output_prediction_loss_and_regulariser(output, name, taylor):
    problem = without_layers(output, *EVERY_LOSS[name])
    J = functional(problem)
    h = [towards(g, r) for g, r in zip(J.derivative(apply_riesz=True), random(problem))]
    taylor(J, point(J), h, "second order", name, second_order=True)


@on_ranks
def test_hessian_of_a_functional_with_gradients(taylor):
    loss = functional_loss(lambda p, C: (fd.exp(p) * inner(grad(p - C), grad(p - C))) * dx)
    problem = without_layers(OUTPUTS["disk to disk"], loss, "logistic")
    J = functional(problem)
    h = [towards(g, r) for g, r in zip(J.derivative(apply_riesz=True), random(problem))]
    taylor(J, point(J), h, "second order", "gradients in UFL", second_order=True)


@on_ranks
def test_hessian_of_products_and_sums_of_functionals(taylor):
    """Adjoint values of losses are then no ones, and change with the point."""
    problem = without_layers(OUTPUTS["disk to 3 classes"], *LOSSES["cross entropy"])
    with taping():
        loss, run = problem.evaluate()
        J = loss * tikhonov(1.0)(problem.parameters) + 2 * loss**2
    controls = [*problem.controls(), Control(run.initial, riesz_map=problem.net.Y.riesz_map)]
    J = ReducedFunctional(J, controls)
    h = [towards(g, r) for g, r in zip(J.derivative(apply_riesz=True), random(problem))]
    taylor(J, point(J), h, "second order", "products", second_order=True)


@on_ranks
@each_loss
def test_hessians_are_symmetric(output, name):
    problem = without_layers(output, *EVERY_LOSS[name])
    J = functional(problem)
    u, v = random(problem, 1), random(problem, 2)
    J.derivative()
    Hu, Hv = J.hessian(u), J.hessian(v)
    scale = max(abs(pair(Hu, v)), abs(pair(Hu, u)), abs(pair(Hv, v)))
    assert abs(pair(Hu, v) - pair(Hv, u)) < 1e-12 * scale


@each_loss
def test_hessian_agrees_with_differences_of_the_gradient(name):
    problem = without_layers((("interval", "DG0"), None), *EVERY_LOSS[name], samples=2)
    J = functional(problem)
    array = ReducedFunctionalNumPy(J)
    m = array.get_global(point(J))

    def gradient(x):
        array(x)
        return array.get_global(J.derivative())

    eps, columns = 1e-5, np.eye(m.size)
    differences = np.array([(gradient(m + eps * e) - gradient(m - eps * e)) / (2 * eps) for e in columns])
    gradient(m)
    hessian = np.array([array.get_global(J.hessian(array.set_local(point(J), e))) for e in columns])
    # a central difference of step 1e-5: eps^2 and round-off over eps
    assert_allclose(hessian, differences, rtol=0, atol=1e-8 * np.abs(hessian).max())


@on_ranks
def test_a_functional_that_is_linear_has_no_curvature():
    linear = functional_loss(lambda p, C: p * C * dx)
    problem = without_layers(OUTPUTS["disk to disk"], linear, "identity", regulariser=None)
    J, _ = problem.record()
    J.derivative()
    for part in J.hessian(random(problem)[:-1]):
        assert_array_equal(part.dat.data_ro, 0)


@on_ranks
@pytest.mark.parametrize("bias", ["nodes", "basis"])
@pytest.mark.parametrize("kind", KINDS if ALONE else ["sum"])
def test_hessian_of_a_regulariser_is_its_quadratic_form(bias, kind):
    """R(m) = 1/2 <m, A m>: at any m, the action on v is the derivative at v."""
    problem = learning_problem(network("annulus", "CG2", bias=bias))
    with taping():
        R = KINDS[kind](problem.parameters)
    R = ReducedFunctional(R, problem.controls())
    m, v = point(R), [function._ad_mul(-2.0) for function in R.derivative(apply_riesz=True)]
    value = float(R(v))
    expected = values(R.derivative())
    R(m)
    dual = R.derivative()
    action = R.hessian(v)
    assert_allclose(values(action), expected, atol=1e-13 * np.abs(expected).max(initial=0))
    assert pair(action, v) == pytest.approx(2 * value, rel=1e-12)
    assert R.tlm(v) == pytest.approx(pair(dual, v), rel=1e-12)


@on_ranks
def test_hessians_are_the_same_on_every_number_of_ranks():
    """<H u, u> against the whole mesh on each rank alone."""
    found = []
    for alone in (False, True):
        phi = laplace("disk", "CG1", 4, alone=alone)
        problem = learning_problem(ResidualNetwork(phi, layers=0))
        J, _ = problem.record()
        u = random(problem)[:-1]
        J.derivative()
        found.append(pair(J.hessian(u), u))
    assert found[0] == pytest.approx(found[1], rel=1e-12)


@on_ranks
def test_hessian_of_the_distance_in_the_label_measure_is_that_measure():
    """The functional with which the other tests look at networks."""
    Y = label_space("disk", "CG1")
    f, v = Y.batch(smooth(Y)), Y.batch(smooth(Y, seed=1))
    with taping():
        J = half_square_distance(f, Y.batch(smooth(Y, seed=2)), Y)
    J = ReducedFunctional(J, Control(f, riesz_map=Y.riesz_map))
    dual = J.derivative()
    assert_allclose(J.hessian(v, apply_riesz=True).dat.data_ro, v.dat.data_ro, rtol=1e-14)
    assert J.tlm(v) == pytest.approx(pair(dual, v), rel=1e-12)


# -- tangents --------------------------------------------------------------------------------------------------------


@on_ranks
@each_loss
def test_tangent_agrees_with_a_difference_quotient_and_with_the_adjoint(output, name):
    problem = without_layers(output, *EVERY_LOSS[name])
    J = functional(problem)
    m, v, eps = point(J), random(problem), 1e-5
    by_adjoint, tangent = pair(J.derivative(), v), float(J.tlm(v))
    assert tangent == pytest.approx(by_adjoint, rel=1e-11)  # terms of both signs cancel
    difference = (J(shifted(m, eps, v)) - J(shifted(m, -eps, v))) / (2 * eps)
    assert tangent == pytest.approx(float(difference), rel=1e-6)


@on_ranks
def test_tangent_of_an_output_agrees_with_a_difference_quotient_and_with_the_adjoint(output):
    problem = without_layers(output, *LOSSES["least squares of O"])
    f = problem.batch.inputs
    with taping():
        O = problem.head(f)
    F = ReducedFunctional(O, [*problem.controls(), Control(f, riesz_map=problem.net.Y.riesz_map)])
    m, v, eps = point(F), random(problem), 1e-5
    tangent = F.tlm(v)
    plus, minus = (F(shifted(m, step, v)).dat.data_ro.copy() for step in (eps, -eps))
    # O is of second degree in (f, W): a central difference is right up to round-off over eps
    assert_allclose(tangent.dat.data_ro, (plus - minus) / (2 * eps), atol=1e-9)
    F(m)
    dual = fd.Cofunction(O.function_space().dual())
    dual.dat.data_wo[...] = smooth(problem.head.Y, SAMPLES, seed=5).reshape(dual.dat.data_wo.shape)
    assert pair(F.derivative(adj_input=dual), v) == pytest.approx(float(tangent._ad_dot(dual)), rel=1e-11)


@on_ranks
def test_a_direction_in_one_control_leaves_the_others_still():
    problem = without_layers(OUTPUTS["disk to 3 classes"], *LOSSES["cross entropy"])
    J = functional(problem)
    f = ReducedFunctional(J.functional, J.controls[2], tape=J.tape)
    v = random(problem)
    still = [v[0]._ad_mul(0.0), v[1]._ad_mul(0.0), v[2]]
    J.derivative()
    expected, action = J.tlm(still), J.hessian(still)[2].dat.data_ro.copy()
    f.derivative()
    assert f.tlm(v[2]) == pytest.approx(float(expected), rel=1e-13)
    assert_allclose(f.hessian(v[2]).dat.data_ro, action, atol=1e-14 * np.abs(action).max(initial=0))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_derivatives_of_a_prediction(prediction):
    h = PREDICTIONS[prediction]
    Y = label_space("disk", "CG1")
    O, v, d = (smooth(Y, SAMPLES, seed=k) for k in range(3))
    eps = 1e-6

    def difference(g):
        return (g(O + eps * v) - g(O - eps * v)) / (2 * eps)

    # a central difference of step 1e-6 is right to 1e-10
    assert_allclose(h.derivative(Y, O, v), difference(lambda O: h.value(Y, O)), atol=1e-9)
    second = h.second_transpose(Y, O, v, d)
    assert_allclose(second, difference(lambda O: h.transpose(Y, O, d)), atol=1e-9)
    assert np.sum(d * h.derivative(Y, O, v)) == pytest.approx(np.sum(h.transpose(Y, O, d) * v), rel=1e-12)
    u = smooth(Y, SAMPLES, seed=3)
    assert np.sum(second * u) == pytest.approx(np.sum(h.second_transpose(Y, O, u, d) * v), rel=1e-12)


# -- Gauss-Newton ----------------------------------------------------------------------------------------------------


def dense(J: ReducedFunctional) -> np.ndarray:
    """The matrix of J.hessian, on one rank."""
    array = ReducedFunctionalNumPy(J)
    size = array.get_global(point(J)).size
    return np.array([array.get_global(J.hessian(array.set_local(point(J), e))) for e in np.eye(size)])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gauss_newton_of_least_squares_is_built_of_the_jacobian_of_the_predictions(prediction):
    problem = without_layers((("interval", "DG0"), None), least_squares, prediction, samples=2, regulariser=None)
    J = functional(problem)
    J.derivative()
    exact = dense(J)
    with gauss_newton(J.tape):
        found = dense(J)
    assert_array_equal(dense(J), exact)  # outside of the context
    with taping():
        O = problem.head(problem.batch.inputs)
    F = ReducedFunctional(O, [Control(control.control) for control in J.controls])
    array, h, Y = ReducedFunctionalNumPy(F), PREDICTIONS[prediction], problem.head.Y
    m, eps, columns = array.get_global(point(F)), 1e-5, []
    for e in np.eye(m.size):
        plus, minus = (h.value(Y, Y.values(F(array.set_local(point(F), m + s * e)))).copy() for s in (eps, -eps))
        columns.append((plus - minus) / (2 * eps))
    measure = Y.weights[:, None] * np.array([1 / 3, 2 / 3])
    expected = np.einsum("mis,is,nis->mn", columns, measure, columns)
    assert_allclose(found, expected, atol=1e-8 * np.abs(expected).max())
    assert np.linalg.eigvalsh(found).min() > -1e-14
    assert np.linalg.eigvalsh(exact).min() < -1e-3, "nothing has been left out: this test shows nothing"


@on_ranks
@pytest.mark.parametrize("name", ["cross entropy", "binary cross entropy"][: None if ALONE else 1])
def test_gauss_newton_is_exact_where_the_output_is_linear_in_the_controls(output, name):
    problem = without_layers(output, *LOSSES[name])
    v = random(problem)
    exact, approximate = problem.reduced_functional(), problem.reduced_functional(gauss_newton=True)
    exact.derivative(), approximate.derivative()
    expected = values(exact.hessian(v[:-1]))
    assert_allclose(values(approximate.hessian(v[:-1])), expected, atol=1e-13 * np.abs(expected).max(initial=0))
    J = functional(problem)  # of f_I too
    J.derivative()
    exact = pair(J.hessian(v), v)
    with gauss_newton(J.tape):
        approximate = pair(J.hessian(v), v)
    assert abs(approximate - exact) > 1e-3 * abs(exact)


# -- Blocks ----------------------------------------------------------------------------------------------------------


@on_ranks
def test_a_hessian_without_a_derivative_at_the_same_point_is_refused():
    """pyadjoint would take the adjoint values of another point."""
    problem = without_layers(OUTPUTS["disk to 3 classes"], *LOSSES["cross entropy"], regulariser=None)
    J = functional(problem)
    v, m = random(problem), point(J)
    with pytest.raises(RuntimeError, match="the Hessian needs the derivative at the same point first; call deriv"):
        J.hessian(v)
    J.derivative()
    expected = values(J.hessian(v))
    J(shifted(m, 0.1, v))
    with pytest.raises(RuntimeError, match="the Hessian needs the derivative at the same point first; call deriv"):
        J.hessian(v)
    J(m)
    J.derivative()
    assert_array_equal(values(J.hessian(v)), expected)


@on_ranks
def test_tangents_and_hessians_after_an_input_has_changed_are_refused():
    problem = without_layers(OUTPUTS["disk to 3 classes"], *LOSSES["cross entropy"])
    J = functional(problem)
    v = random(problem)
    J.derivative()
    J.controls[0].update(v[0])
    with pytest.raises(RuntimeError, match="an input has changed since the tape was evaluated; evaluate the"):
        J.tlm(v)
    with pytest.raises(RuntimeError, match="an input has changed since the tape was evaluated; evaluate the"):
        J.hessian(v)


class _Sine:
    """f -> sin f. As a layer does, an adjoint or second adjoint uses up what a forward solve has saved."""

    ready = False

    def __init__(self, Y, space):
        self.output, self.solves = BatchValues(Y, space), 0
        self.inputs = [self.output]

    def forward(self, arrays, save):
        self.ready, self.solves = save, self.solves + 1
        return np.sin(arrays[0])

    def adjoint(self, arrays, dual):
        assert self.ready, "an adjoint without a forward solve"
        self.ready = False
        return [np.cos(arrays[0]) * dual]

    def tangent(self, arrays, directions):
        return np.cos(arrays[0]) * directions[0]

    def second_adjoint(self, arrays, directions, dual, dual_dot):
        self.ready = False
        return [np.cos(arrays[0]) * dual_dot - np.sin(arrays[0]) * directions[0] * dual]


@on_ranks
def test_an_operator_whose_adjoint_uses_up_its_forward_solve_is_solved_again():
    Y = label_space("disk", "DG0")
    f, target, v = (Y.batch(smooth(Y, seed=k)) for k in range(3))
    operator = _Sine(Y, f.function_space())
    with taping():
        output, block = apply(operator, [f])
        J = half_square_distance(output, target, Y)
    J = ReducedFunctional(J, Control(f, riesz_map=Y.riesz_map))
    s, c, misfit = np.sin(Y.values(f)), np.cos(Y.values(f)), np.sin(Y.values(f)) - Y.values(target)
    approximate = Y.weights[:, None] * c**2 * Y.values(v)
    exact = approximate - Y.weights[:, None] * s * misfit * Y.values(v)
    for _ in range(2):
        derivative = J.derivative()
        assert_allclose(Y.values(derivative), Y.weights[:, None] * c * misfit, rtol=1e-13)
        for _ in range(2):
            assert_allclose(Y.values(J.hessian(v)), exact, rtol=1e-12, atol=1e-14)
        assert operator.solves == 1 and block.adjoint_is_current  # the first of recording, the other anew
        operator.solves = 0
    for solves in (1, 2):
        with gauss_newton(J.tape):
            assert_allclose(Y.values(J.hessian(v)), approximate, rtol=1e-13)
        assert operator.solves == solves
        assert not block.adjoint_is_current, "what the operator keeps is no longer the adjoint of J"
    assert_allclose(Y.values(J.hessian(v)), exact, rtol=1e-12, atol=1e-14)


class _FirstOrder:
    """The integral of f: no tangent, no second adjoint."""

    output, ready = None, True

    def __init__(self, Y, space):
        self.Y, self.inputs = Y, [BatchValues(Y, space)]

    def forward(self, arrays, save):
        return float(self.Y.sum(np.sum(self.Y.weights @ arrays[0])))

    def adjoint(self, arrays, dual):
        return [dual * self.Y.weights[:, None] + 0 * arrays[0]]


class _NoHessian(_FirstOrder):
    def tangent(self, arrays, directions):
        return self.forward(directions, save=False)


@on_ranks
@pytest.mark.parametrize("kind, missing", [(_FirstOrder, "tangents"), (_NoHessian, "Hessians")])
def test_an_operator_without_second_order_says_so(kind, missing):
    Y = label_space("disk", "DG0")
    f, v = Y.batch(smooth(Y)), Y.batch(smooth(Y, seed=1))
    with taping():
        J, _ = apply(kind(Y, f.function_space()), [f])
    J = ReducedFunctional(J, Control(f, riesz_map=Y.riesz_map))
    J.derivative()
    with pytest.raises(NotImplementedError, match=f"{kind.__name__}: {missing} are not implemented, only first adj"):
        J.hessian(v)


def test_a_loss_without_second_derivatives_names_itself():
    loss = Loss("no second derivatives", least_squares.value, least_squares.gradient)
    problem = without_layers(OUTPUTS["disk to 3 classes"], loss, "logistic")
    J = functional(problem)
    J.derivative()
    with pytest.raises(NotImplementedError, match="loss: no second derivatives has no `hessian`, which Hessian act"):
        J.hessian(random(problem))


@on_ranks
def test_hessian_actions_create_no_functions_and_do_not_alias(monkeypatch):
    problem = without_layers(OUTPUTS["disk to 3 classes"], *LOSSES["cross entropy"])
    J = functional(problem)
    u, v = random(problem, 1), random(problem, 2)
    gradient = J.derivative()
    before = values(gradient)
    first = J.hessian(u)
    kept = values(first)
    assert not np.array_equal(kept, values(J.hessian(v)))
    assert_array_equal(values(first), kept)
    assert_array_equal(values(gradient), before)
    assert_array_equal(values(J.derivative()), before)
    created = created_functions(monkeypatch)
    blocks = len(J.tape.get_blocks())
    for _ in range(3):
        J.hessian(u), J.tlm(u)
    assert created == []
    assert len(J.tape.get_blocks()) == blocks, "the tape grew"
    functional(problem).derivative()
    assert created, "a new tape makes the Blocks' Cofunctions; else this test counts nothing"
