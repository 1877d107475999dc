"""The terminal values r(T) of the co-state, (4.2b) and Remark 4.3, in the sign of section 4.1."""

from __future__ import annotations

import firedrake as fd
import numpy as np
from pyadjoint.tape import stop_annotating

from fem_resnet.features import HELD, REGULARISED, STEPPED, supports
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.learning.loss import Loss, binary_cross_entropy, cross_entropy, least_squares
from fem_resnet.learning.prediction import PREDICTIONS, Prediction
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.parameters.kernel import LowRankKernel

__all__ = ["terminal_costate"]


@supports(
    "channels",
    "no_layers", "gradient_flow", *HELD, *STEPPED, "head", *REGULARISED, "running", "running_of_controls",
    "running_of_pairs", "checkpoints",
    "learned_initial", "learned_both", "lift", "many_samples", "weights",
)  # fmt: skip
def terminal_costate(problem: LearningProblem, final: fd.Function) -> fd.Function:
    """r(T) of a learning problem by (4.2b) or Remark 4.3, in the sign of section 4.1. Collective.

    For the losses of `fem_resnet.learning.loss` the derivative is written out here. A loss in UFL gives its own derivative.
    The weights of the samples, divided by their sum, are factors in r(T).

    Parameters
    ----------
    problem
        The learning problem: its head, loss and batch are used.
    final
        f(T), a batch with the samples of the problem's batch.

    Returns
    -------
    Function
        r(T), a batch like `final`.

    Raises
    ------
    TypeError, ValueError
        If `final` is no batch on the label domain or has another number of samples.
    """
    net, head, batch = problem.net, problem.head, problem.batch
    net.Y.check_batch(final, "final")
    samples = net.Y.samples(final.function_space())
    if samples != batch.samples:
        raise ValueError(f"final: expected {batch.samples} samples, as in the problem's batch, got {samples}")
    Y = net.Y if head is None else head.Y
    prediction = PREDICTIONS[problem.loss.prediction or "identity"] if head is None else head.prediction
    targets = batch.targets if isinstance(batch.targets, fd.Function) else head.observations(batch.targets)
    with stop_annotating():
        O = Y.values(final if head is None else head(final))
    omega = sample_weights(batch.weights, batch.samples)
    r = omega * _output_costate(Y, problem.loss, prediction, O, Y.values(targets))
    if head is not None:
        # int .. W(y, z) dy: the first argument of W is the point of the output, as in (2.9).
        r = LowRankKernel(head.onto, head.psi).transpose(head.matrices()[0], r)
    return net.Y.like(final, r)


def _output_costate(Y: LabelSpace, loss: Loss, h: Prediction, O: np.ndarray, C: np.ndarray) -> np.ndarray:
    """The gradient in L2 of the loss of each sample in its output O: shape (nodes, samples), as O and C."""
    if loss == least_squares:
        p = h.value(Y, O)
        return _prediction_derivative(Y, h, p, p - C)
    if loss == cross_entropy:
        p = PREDICTIONS["softmax"].value(Y, O)
        return p * Y.sum(Y.weights @ C) - C
    if loss == binary_cross_entropy:
        return PREDICTIONS["logistic"].value(Y, O) - C
    return loss.gradient(Y, O, C, h) / Y.weights[:, None]


def _prediction_derivative(Y: LabelSpace, h: Prediction, p: np.ndarray, d: np.ndarray) -> np.ndarray:
    """h'(O) d from p = h(O); h'(O) is symmetric for all predictions."""
    if h.name == "identity":
        return d
    if h.name == "logistic":
        return p * (1 - p) * d
    if h.name == "softmax":
        return p * (d - Y.sum(Y.weights @ (p * d)))
    raise ValueError(
        f"head: expected the prediction identity, logistic or softmax, got {h.name!r}; its derivative is not known"
    )
