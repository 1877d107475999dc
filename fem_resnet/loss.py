"""Losses: how far an output is from what was observed.

For one sample with output O, prediction C_pre = h(O) and observation C,

    least squares           1/2 int |C_pre - C|^2 dy                                                  (section 2.4)
    cross entropy           - int C log p dy,                            p = e^O / int e^O   (softmax)
    binary cross entropy    - int C log p + (1 - C) log(1 - p) dy,       p = 1/(1 + e^-O)    (logistic)
    a functional in UFL     F(C_pre, C)

and for a batch the mean of these with weights of the samples, sum_s omega_s loss_s / sum_s omega_s. Over K classes, cells
of length one, the integrals are sums over the classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import firedrake as fd
import numpy as np
from pyadjoint import AdjFloat
from pyadjoint.tape import stop_annotating
from ufl.algorithms import estimate_total_polynomial_degree
from ufl.algorithms.apply_algebra_lowering import apply_algebra_lowering
from ufl.algorithms.apply_derivatives import apply_derivatives

from fem_resnet.activation import get_activation
from fem_resnet.blocks import OperatorBlock, apply
from fem_resnet.head import PREDICTIONS, Prediction, log_density
from fem_resnet.label_space import BatchValues, LabelSpace

__all__ = ["Loss", "binary_cross_entropy", "cross_entropy", "functional_loss", "least_squares"]


@dataclass(frozen=True)
class Loss:
    """A loss of one output against one observation, on node values of shape (nodes, samples).

    Attributes
    ----------
    name : str
    value : callable
        ``value(Y, O, C, prediction)``: this rank's part of each sample's loss, shape (samples,).
    gradient : callable
        ``gradient(Y, O, C, prediction)``: its derivative in O, dual to the node values. Both collective.
    prediction : str or None
        The only prediction that it goes with, or None for any.
    """

    name: str
    value: Callable[[LabelSpace, np.ndarray, np.ndarray, Prediction], np.ndarray]
    gradient: Callable[[LabelSpace, np.ndarray, np.ndarray, Prediction], np.ndarray]
    prediction: str | None = None

    def __call__(
        self,
        Y: LabelSpace,
        output: fd.Function,
        observation: fd.Function,
        weights: Sequence[float] | None = None,
        prediction: Prediction | None = None,
    ) -> AdjFloat:
        """Weighted mean over the samples, recorded while annotating. Collective.

        Parameters
        ----------
        Y
            Label domain of output and observation.
        output, observation
            Batches of equal numbers of samples.
        weights
            omega, one a sample, not negative, the same on every rank; ones if left out.
        prediction
            h; what the loss goes with, or the identity, if left out.
        """
        return self.record(Y, output, observation, weights, prediction)[0]

    def record(
        self, Y, output, observation, weights=None, prediction=None
    ) -> tuple[AdjFloat, OperatorBlock | None]:
        """As `__call__`, with the Block; its operator's `observe` exchanges observation and weights."""
        if prediction is None:
            prediction = PREDICTIONS[self.prediction or "identity"]
        operator = _LossOperator(self, Y, output.function_space(), prediction)
        operator.observe(observation, weights)
        return apply(operator, [output])


class _LossOperator:
    ready = True
    output = None

    def __init__(self, loss: Loss, Y: LabelSpace, space, prediction: Prediction):
        self._loss, self._Y, self._prediction = loss, Y, prediction
        self._values = BatchValues(Y, space)
        self.inputs = [self._values]

    def observe(self, observation: fd.Function, weights: Sequence[float] | None) -> None:
        self._observation = self._Y.values(observation).copy()
        self._weights = sample_weights(weights, self._values.samples)

    def forward(self, arrays, save):
        return float(self._weights @ self._Y.sum(self._loss.value(self._Y, arrays[0], self._observation, self._prediction)))

    def adjoint(self, arrays, dual):
        return [(dual * self._weights) * self._loss.gradient(self._Y, arrays[0], self._observation, self._prediction)]


def sample_weights(weights: Sequence[float] | None, samples: int) -> np.ndarray:
    """Weights of the samples, divided by their sum.

    Raises
    ------
    ValueError
        If their number is not that of the samples, one is negative or not finite, or all are 0.
    """
    weights = np.ones(samples) if weights is None else np.asarray(weights, dtype=float)
    if weights.shape != (samples,) or not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() == 0:
        raise ValueError(
            f"weights: {samples} finite numbers >= 0, not all 0, are wanted; shape {weights.shape}, smallest "
            f"{weights.min(initial=np.inf):.3g}, sum {weights.sum():.3g} was given"
        )
    return weights / weights.sum()


def _half_square(Y, O, C, prediction):
    return 0.5 * (Y.weights @ (prediction.value(Y, O) - C) ** 2)


def _half_square_gradient(Y, O, C, prediction):
    return prediction.transpose(Y, O, Y.weights[:, None] * (prediction.value(Y, O) - C))


def _cross_entropy(Y, O, C, prediction):
    return -(Y.weights @ (C * log_density(Y, O)))


def _cross_entropy_gradient(Y, O, C, prediction):
    return Y.weights[:, None] * (np.exp(log_density(Y, O)) * Y.sum(Y.weights @ C) - C)


_softplus, _sigmoid = get_activation("softplus"), get_activation("sigmoid")


def _binary_cross_entropy(Y, O, C, prediction):
    return Y.weights @ (_softplus(O) - C * O)


def _binary_cross_entropy_gradient(Y, O, C, prediction):
    return Y.weights[:, None] * (_sigmoid(O) - C)


#: 1/2 int |h(O) - C|^2 dy, the choice of section 2.4.
least_squares = Loss("least_squares", _half_square, _half_square_gradient)
#: - int C log p dy, p the softmax of O; stable for large O.
cross_entropy = Loss("cross_entropy", _cross_entropy, _cross_entropy_gradient, "softmax")
#: - int C log p + (1 - C) log(1 - p) dy, p = 1/(1 + e^-O); stable for large O.
binary_cross_entropy = Loss(
    "binary_cross_entropy", _binary_cross_entropy, _binary_cross_entropy_gradient, "logistic"
)


def functional_loss(functional: Callable[[fd.Function, fd.Function], object], name: str = "functional") -> Loss:
    """Loss of a sample by a functional written in UFL.

    Parameters
    ----------
    functional
        ``functional(p, C)`` returns a form without arguments in two Functions of the output's space `Y.V`: the
        prediction and the observation of one sample.
    name
        What messages call it.

    Examples
    --------
    >>> from firedrake import dx, grad, inner
    >>> loss = functional_loss(lambda p, C: inner(grad(p - C), grad(p - C)) * dx)
    >>> loss.name
    'functional'
    """
    forms: dict[int, tuple] = {}

    def prepared(Y):
        if id(Y) not in forms:
            p, C = fd.Function(Y.V), fd.Function(Y.V)
            form = functional(p, C)
            # By itself UFL takes another quadrature for the derivative of what is no polynomial, such as cos(p).
            degree = estimate_total_polynomial_degree(apply_derivatives(apply_algebra_lowering(form)))
            rule = {"quadrature_degree": degree}
            forms[id(Y)] = (Y, p, C, form, fd.derivative(form, p), rule)
        return forms[id(Y)][1:]

    def each(Y, O, C, prediction, differentiate):
        p, c, form, derivative, rule = prepared(Y)
        predicted = prediction.value(Y, O)
        with stop_annotating():
            for s in range(O.shape[1]):
                p.dat.data_wo[...] = predicted[:, s]
                c.dat.data_wo[...] = C[:, s]
                yield fd.assemble(derivative if differentiate else form, form_compiler_parameters=rule)

    def value(Y, O, C, prediction):
        # A sum over the ranks follows, assemble has made one already.
        return np.fromiter(each(Y, O, C, prediction, False), float) / Y.comm.size

    def gradient(Y, O, C, prediction):
        duals = [dual.dat.data_ro.copy() for dual in each(Y, O, C, prediction, True)]
        return prediction.transpose(Y, O, np.column_stack(duals))

    return Loss(name, value, gradient)
