"""Outputs (2.9) onto any label domain, predictions, losses and weights of samples."""

import firedrake as fd
import numpy as np
import pytest
import scipy.special
from firedrake import dx, grad, inner
from helpers import label_space, smooth
from mpi4py import MPI
from problems import LOSSES, OUTPUTS, gathered, head_onto, network, observations, taping
from pyadjoint import Control, ReducedFunctional

from fem_resnet.label_domain.points import class_space
from fem_resnet.learning.batch import Batch
from fem_resnet.learning.head import Head
from fem_resnet.learning.loss import binary_cross_entropy, cross_entropy, functional_loss, least_squares
from fem_resnet.learning.prediction import PREDICTIONS
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.learning.regulariser import tikhonov

on_ranks = pytest.mark.parallel([1, 2, 3])
SAMPLES = 4


@pytest.fixture(params=OUTPUTS)
def output(request):
    return OUTPUTS[request.param]


@on_ranks
def test_output_is_the_integral_operator_applied_to_the_final_state(output):
    head = head_onto(*output)
    Z = head.psi.Y
    f = Z.batch(smooth(Z, SAMPLES))
    # W(y, z) and f at the nodes z of all ranks.
    X, psi, w, f_z = head.onto.values, *(gathered(Z, part) for part in (head.psi.values, Z.weights, Z.values(f)))
    expected = X @ head.W.get(0) @ psi.T @ (w[:, None] * f_z) + X @ head.mu.get(0)[:, None]
    np.testing.assert_allclose(head.Y.values(head(f)), expected, atol=1e-13)  # sums of four terms of size one
    np.testing.assert_allclose(head.onto.values @ head.scores(f).T, expected, atol=1e-13)


@pytest.mark.parallel([2, 3])
def test_output_onto_another_label_domain_does_not_see_the_partition():
    """Seen through smooth functions: the meshes on this rank alone against the parts of all ranks."""
    found = []
    for alone in (False, True):
        head = head_onto(("disk", "CG1"), ("sphere", "DG0"), "logistic", alone)
        Y, Z = head.Y, head.psi.Y
        f, C = Z.batch(smooth(Z, SAMPLES)), observations(head, "logistic", SAMPLES)
        with taping():
            J = binary_cross_entropy(Y, head(f), C)
        controls = [Control(f, riesz_map=Z.riesz_map), *head.W.controls()]
        gradient = ReducedFunctional(J, controls).derivative(apply_riesz=True)
        onto_z, onto_y = (space.weights[:, None] * smooth(space, 5, seed=3) for space in (Z, Y))
        found.append(
            [Y.sum(onto_y.T @ Y.values(head.predict(f))), np.array(float(J)), Z.sum(onto_z.T @ Z.values(gradient[0])),
             head.W.space_basis.read(gradient[1])]
        )  # fmt: skip
    for parts, whole in zip(*found):
        np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-10)


@on_ranks
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_through_output_prediction_and_loss(output, name, taylor):
    loss, prediction = LOSSES[name]
    head = head_onto(*output, prediction)
    f = head.psi.Y.batch(smooth(head.psi.Y, SAMPLES))
    with taping():
        J = loss(head.Y, head(f), observations(head, prediction, SAMPLES), [1.0, 2.0, 0.0, 0.5], head.prediction)
    controls = [Control(f, riesz_map=head.psi.Y.riesz_map), *head.W.controls(), *head.mu.controls()]
    rf = ReducedFunctional(J, controls)
    h = rf.derivative(apply_riesz=True)
    largest = max(head.psi.Y.comm.allreduce(np.abs(d.dat.data_ro).max(initial=0), op=MPI.MAX) for d in h)
    taylor(rf, [c.control for c in controls], [d._ad_mul(float(1 / largest)) for d in h], "output and loss", name)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_transpose_of_a_prediction_is_that_of_its_derivative(prediction):
    h = PREDICTIONS[prediction]
    Y = label_space("disk", "CG1")
    O, v, d = (smooth(Y, SAMPLES, seed=k) for k in range(3))
    eps = 1e-6
    difference = (h.value(Y, O + eps * v) - h.value(Y, O - eps * v)) / (2 * eps)
    # a central difference of step 1e-6 is right to 1e-10, and terms of both signs cancel
    assert np.sum(d * difference) == pytest.approx(np.sum(h.transpose(Y, O, d) * v), rel=1e-6)


@on_ranks
def test_softmax_is_a_density_over_any_label_domain():
    for Y in (label_space("annulus", "DG0"), class_space(5)):
        p = PREDICTIONS["softmax"].value(Y, 1e4 * smooth(Y, SAMPLES))
        np.testing.assert_allclose(Y.sum(Y.weights @ p), 1, rtol=1e-12)
        assert (p >= 0).all()


@pytest.mark.parametrize("loss", [least_squares, cross_entropy, binary_cross_entropy], ids=lambda loss: loss.name)
def test_losses_are_convex(loss):
    """Section 2.4: in C_pre for least squares; the entropies in O, whose C_pre is h(O). And strictly, but for constants."""
    Y, h = label_space("disk", "CG1"), PREDICTIONS[loss.prediction or "identity"]
    p, q = 3 * smooth(Y, 20), 3 * smooth(Y, 20, seed=1)
    C = PREDICTIONS["softmax"].value(Y, smooth(Y, 20, seed=2))
    between = [Y.sum(loss.value(Y, (1 - s) * p + s * q, C, h)) for s in np.linspace(0, 1, 9)]
    assert (np.diff(between, 2, axis=0) > 1e-6).all()


def test_binary_cross_entropy_is_stable_and_right():
    Y = class_space(3)
    O = np.array([[1e4, -1e4, 0.3], [2.0, -1.0, 0.0], [-30.0, 40.0, 5.0]])
    C = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 1.0], [0.25, 0.5, 0.0]])
    value = binary_cross_entropy(Y, Y.batch(O), Y.batch(C))
    p = scipy.special.expit(O)
    terms = -(scipy.special.xlogy(C, p) + scipy.special.xlog1py(1 - C, -p))
    terms[2, 1] = 20 + 0.5 * 2 * np.log1p(np.exp(-40.0))  # 1 - p = 4e-18 is lost in the formula above
    assert float(value) == pytest.approx(terms.sum() / 3, rel=1e-12)


def test_a_sample_of_weight_zero_does_not_count_and_proportions_do():
    Y = label_space("disk", "DG0")
    O, C = Y.batch(smooth(Y, SAMPLES)), Y.batch(smooth(Y, SAMPLES, seed=1))
    each = [float(least_squares(Y, Y.batch(Y.values(O)[:, s]), Y.batch(Y.values(C)[:, s]))) for s in range(SAMPLES)]
    assert float(least_squares(Y, O, C, [2, 0, 6, 0])) == pytest.approx((each[0] + 3 * each[2]) / 4, rel=1e-13)
    assert float(least_squares(Y, O, C)) == pytest.approx(np.mean(each), rel=1e-13)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("weights", [[1, 2], [1, -1, 1, 1], [0, 0, 0, 0], [1, np.nan, 1, 1]])
def test_weights_that_are_none_are_refused(weights):
    Y = label_space("disk", "DG0")
    with pytest.raises(ValueError, match=r"^weights: expected (finite )?numbers >= 0( of shape \(4,\)|, not all 0,)"):
        least_squares(Y, Y.batch(smooth(Y, 4)), Y.batch(smooth(Y, 4)), weights)


@on_ranks
@pytest.mark.parametrize("onto", [None, ("sphere", "CG1")], ids=["of f(T)", "of O"])
def test_a_functional_in_ufl_is_a_loss_of_each_sample(onto, taylor):
    net = network("disk", "CG1", layers_per_block=1)
    head = onto and head_onto(("disk", "CG1"), onto, "identity")
    Y = head.Y if onto else net.Y
    loss = functional_loss(lambda p, C: (inner(grad(p - C), grad(p - C)) + fd.cos(p)) * dx)
    inputs, targets = net.Y.batch(smooth(net.Y, SAMPLES)), Y.batch(smooth(Y, SAMPLES, seed=1))
    problem = LearningProblem(net, head, loss, tikhonov(0.1), Batch(inputs, targets, [1, 0, 2, 1]))
    J, run = problem.record()
    final = Y.values(head(run.final) if onto else run.final)
    expected = 0.0
    for s, weight in enumerate([0.25, 0.0, 0.5, 0.25]):
        p, C = fd.Function(Y.V), fd.Function(Y.V)
        p.dat.data_wo[...], C.dat.data_wo[...] = final[:, s], Y.values(targets)[:, s]
        expected += weight * fd.assemble((inner(grad(p - C), grad(p - C)) + fd.cos(p)) * dx)
    expected += float(tikhonov(0.1)(problem.parameters))
    assert J(problem.functions) == pytest.approx(expected, rel=1e-12)
    h = [d._ad_mul(0.1) for d in J.derivative(apply_riesz=True)]
    taylor(J, problem.functions, h, f"disk CG1, {'O on a sphere' if onto else 'f(T)'}", "a functional in UFL")


@pytest.mark.parallel([1, 2])
def test_a_head_that_does_not_fit_its_loss_is_refused():
    net = network("disk", "CG1")
    psi = net.kernel.space_basis.kernel.phi
    batch = Batch(net.Y.batch(smooth(net.Y, 2)), [0, 1])
    with pytest.raises(ValueError, match="loss: binary_cross_entropy expects a head with prediction 'logistic'"):
        LearningProblem(net, Head(psi, 2), binary_cross_entropy, None, batch)
    with pytest.raises(ValueError, match="prediction: expected one of 'identity', 'logistic', 'softmax', got 'soft'"):
        Head(psi, 2, "soft")
    with pytest.raises(ValueError, match="batch.targets: expected a batch on .*, as there are no classes"):
        LearningProblem(net, Head(psi, psi, "identity"), least_squares, None, batch)


@pytest.mark.parallel([1, 2])
def test_losses_refuse_what_does_not_fit():
    Y, other = label_space("disk", "DG0"), label_space("sphere", "DG0")
    O, C = Y.batch(smooth(Y, 4)), Y.batch(smooth(Y, 4, seed=1))
    one, elsewhere = Y.batch(smooth(Y, 1)), other.batch(smooth(other, 4))
    arguments = [
        (least_squares, (O, one), ValueError, "^observation: expected 4 samples, as many as of the output, got 1"),
        (least_squares, (O, Y.values(C)), TypeError, "^observation: expected a Function, got ndarray"),
        (least_squares, (O, elsewhere), ValueError, "^observation: expected a Function on the mesh"),
        (least_squares, (elsewhere, C), ValueError, "^output: expected a Function on the mesh"),
        (binary_cross_entropy, (O, C, None, PREDICTIONS["softmax"]), ValueError, "^loss: .* prediction 'logistic'"),
        (functional_loss(lambda p, C: p * C), (O, C), TypeError, "^functional: it returned Product; expected a form without"),
        (functional_loss(lambda p, C: fd.TestFunction(Y.V) * dx), (O, C), TypeError, "^functional: .* a form with 1; exp"),
    ]
    for loss, given, error, message in arguments:
        with pytest.raises(error, match=message):
            loss(Y, *given)
    with pytest.raises(TypeError, match="^functional: expected a function of prediction and observation, got 1.0"):
        functional_loss(1.0)


def test_predict_gives_the_probabilities_of_the_classes():
    head = head_onto(("disk", "CG1"), None)
    f = head.psi.Y.batch(smooth(head.psi.Y, SAMPLES))
    expected = scipy.special.softmax(head.scores(f), axis=1).T
    np.testing.assert_allclose(head.Y.values(head.predict(f)), expected, rtol=1e-13)


def test_an_operator_refuses_a_derivative_after_an_input_has_changed():
    Y = label_space("disk", "DG0")
    f = Y.batch(smooth(Y, SAMPLES))
    with taping():
        J = least_squares(Y, f, Y.batch(smooth(Y, SAMPLES, seed=1)))
    rf = ReducedFunctional(J, Control(f, riesz_map=Y.riesz_map))
    rf.controls[0].update(Y.batch(smooth(Y, SAMPLES, seed=2)))
    with pytest.raises(RuntimeError, match="an input has changed since the tape was evaluated; evaluate the functional"):
        rf.derivative()
