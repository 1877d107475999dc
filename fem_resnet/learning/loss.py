"""Losses: how far an output is from an observation.

For one sample with output O, prediction C_pre = h(O) and observation C, the losses are

    least squares           1/2 int |C_pre - C|^2 dy                                                  (section 2.4)
    cross entropy           - int C log p dy,                            p = e^O / int e^O   (softmax)
    binary cross entropy    - int C log p + (1 - C) log(1 - p) dy,       p = 1/(1 + e^-O)    (logistic)
    a functional in UFL     F(C_pre, C)

For a batch the loss is the weighted mean over the samples, sum_s omega_s loss_s / sum_s omega_s. K classes are cells of
length one, so that the integrals are sums over the classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType
from weakref import WeakKeyDictionary

import firedrake as fd
import numpy as np
import ufl
from pyadjoint import AdjFloat
from pyadjoint.tape import stop_annotating
from ufl.algorithms import estimate_total_polynomial_degree
from ufl.algorithms.apply_algebra_lowering import apply_algebra_lowering
from ufl.algorithms.apply_derivatives import apply_derivatives

from fem_resnet.activation.activation import get_activation
from fem_resnet.arguments import choice, function, instance, real_array, text
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.learning.prediction import PREDICTIONS, Prediction, log_density
from fem_resnet.parameters.space_basis import BatchValues
from fem_resnet.ranks import may_fail_alone, same, together
from fem_resnet.tape.operator_block import OperatorBlock
from fem_resnet.tape.recording import apply

__all__ = ["Loss", "LossOperator", "binary_cross_entropy", "cross_entropy", "functional_loss", "least_squares"]


@dataclass(frozen=True)
class Loss:
    """A loss of one output against one observation, on node values of shape (nodes, samples).

    Attributes
    ----------
    name : str
    value : callable
        ``value(Y, O, C, prediction)``: this rank's part of each sample's loss, shape (samples,).
    gradient : callable
        ``gradient(Y, O, C, prediction)``: its derivative in O as a functional of the node values, shape (nodes, samples).
    prediction : str or None
        The only prediction that the loss goes with, one of `prediction.PREDICTIONS`; None for any.
    hessian : callable or None
        ``hessian(Y, O, C, prediction, v)``: the derivative of `gradient` in the direction v of O. Hessian actions need it.
    gauss_newton : callable or None
        The same without the curvature of the prediction, for the actions of Gauss and Newton (`tape.recording.gauss_newton`):
        h'^T l'' h' in place of h'^T l'' h' + l' h''. The Hessian itself if left out.

    Notes
    -----
    The functions are called on all ranks together. What a function raises on one rank is raised on all. A function that
    communicates itself, as by ``Y.sum``, must not fail on one rank before that: the others would wait.

    Raises
    ------
    TypeError, ValueError
        If a function is not callable, or the prediction is unknown.
    """

    name: str
    value: Callable[[LabelSpace, np.ndarray, np.ndarray, Prediction], np.ndarray]
    gradient: Callable[[LabelSpace, np.ndarray, np.ndarray, Prediction], np.ndarray]
    prediction: str | None = None
    hessian: Callable[[LabelSpace, np.ndarray, np.ndarray, Prediction, np.ndarray], np.ndarray] | None = None
    gauss_newton: Callable[[LabelSpace, np.ndarray, np.ndarray, Prediction, np.ndarray], np.ndarray] | None = None

    def __post_init__(self):
        text("name", self.name)
        for name in ("value", "gradient", "hessian", "gauss_newton"):
            given = getattr(self, name)
            if given is not None or name in ("value", "gradient"):
                function(name, given, "a function of Y, output, observation and prediction")
        if self.prediction is not None:
            choice("prediction", self.prediction, PREDICTIONS)

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
            omega, shape (samples,), numbers >= 0, the same on every rank; ones if left out.
        prediction
            h; if left out, the prediction that the loss goes with, or the identity.

        Raises
        ------
        TypeError, ValueError
            If output or observation is not such a batch, the weights do not fit or differ between ranks, or the loss goes with
            another prediction.
        """
        check_label_space(Y)
        same(Y.comm, weights=weights, prediction=prediction)
        instance("prediction", prediction, (Prediction, NoneType), "such as prediction.PREDICTIONS['softmax']")
        Y.check_where(output, "output")
        Y.check_where(observation, "observation")
        return self.record(Y, output, observation, weights, prediction)[0]

    def record(
        self,
        Y: LabelSpace,
        output: fd.Function,
        observation: fd.Function,
        weights: Sequence[float] | None = None,
        prediction: Prediction | None = None,
    ) -> tuple[AdjFloat, OperatorBlock | None]:
        """As `__call__`, for arguments that are checked already; with the Block, None while nothing annotates. Collective.

        `observe` of the Block's operator exchanges observation and weights.

        Parameters
        ----------
        Y, output, observation, weights, prediction
            As for `__call__`; weights of shape (samples,).
        """
        if prediction is None:
            prediction = PREDICTIONS[self.prediction or "identity"]
        self.check_prediction(prediction)
        Y.check_values(output, "output")
        operator = LossOperator(self, Y, output.function_space(), prediction)
        operator.observe(observation, weights)
        return apply(operator, [output])

    def check_prediction(self, prediction: Prediction) -> None:
        """Refuse a prediction that the loss does not go with.

        Raises
        ------
        ValueError
            If the loss goes with another one.
        """
        if self.prediction not in (None, prediction.name):
            raise ValueError(
                f"loss: {self.name} expects a head with prediction {self.prediction!r}, got one with {prediction.name!r}"
            )


class LossOperator:
    """A loss of outputs against an observation, as an operator on the tape (`tape.operator`)."""

    ready = True
    output = None

    def __init__(self, loss: Loss, Y: LabelSpace, space, prediction: Prediction):
        self._loss, self._Y, self._prediction = loss, Y, prediction
        self._values = BatchValues(Y, space)
        self.inputs = [self._values]
        self._observation = self._weights = np.empty(0)  # until `observe`

    def observe(self, observation: fd.Function, weights: Sequence[float] | None) -> None:
        """Take another observation and other weights, for the next evaluation."""
        self._Y.check_values(observation, "observation")
        values = self._Y.values(observation)
        if values.shape[1] != self._values.samples:
            raise ValueError(
                f"observation: expected {self._values.samples} samples, as many as of the output, got {values.shape[1]}"
            )
        self._observation = values.copy()
        self._weights = sample_weights(weights, self._values.samples)

    def forward(self, arrays, save):
        """The weighted mean over the samples. Collective."""
        values = self._asked("value", arrays[0], shape=(self._values.samples,))
        return float(self._weights @ self._Y.sum(values))

    def adjoint(self, arrays, functional):
        """The functional of the output. Collective."""
        return [(functional * self._weights) * self._asked("gradient", arrays[0])]

    def _asked(
        self, what: str, output: np.ndarray, *direction: np.ndarray, shape: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """What a function of the loss returns. It may be the user's: what it raises on one rank is raised on all."""
        asked = getattr(self._loss, what)

        def ask() -> np.ndarray:
            given = asked(self._Y, output, self._observation, self._prediction, *direction)
            return real_array(f"{what} of the loss {self._loss.name}", given, shape or output.shape, finite=False)

        return together(self._Y.comm if may_fail_alone(asked) else None, ask)

    def tangent(self, arrays, directions):
        """The derivative in a direction of the output. Collective."""
        return float(self._Y.sum(np.sum(self.adjoint(arrays, 1.0)[0] * directions[0])))

    def second_adjoint(self, arrays, directions, functional, functional_dot):
        """The derivative of `adjoint` in directions of the output and of the functional. Collective."""
        return self._second_adjoint("hessian", arrays, directions, functional, functional_dot)

    def gauss_newton(self, arrays, directions, functional, functional_dot):
        """The same without the curvature of the prediction. Collective."""
        what = "hessian" if self._loss.gauss_newton is None else "gauss_newton"
        return self._second_adjoint(what, arrays, directions, functional, functional_dot)

    def _second_adjoint(self, what, arrays, directions, functional, functional_dot):
        if getattr(self._loss, what) is None:
            raise NotImplementedError(f"loss: {self._loss.name} has no `hessian`, which Hessian actions need; give it one")
        change = self._asked(what, arrays[0], directions[0])
        return [self.adjoint(arrays, functional_dot)[0] + (functional * self._weights) * change]


def _of_prediction(name: str, value: Callable, functional: Callable, curvature: Callable) -> Loss:
    """The loss l(h(O), C) from l(p, C), its derivative in p as a functional, and the derivative of that in a direction v."""

    def of_output(Y, O, C, h):
        return value(Y, h.value(Y, O), C)

    def gradient(Y, O, C, h):
        return h.transpose(Y, O, functional(Y, h.value(Y, O), C))

    def gauss_newton(Y, O, C, h, v):
        return h.transpose(Y, O, curvature(Y, h.value(Y, O), C, h.derivative(Y, O, v)))

    def hessian(Y, O, C, h, v):
        return gauss_newton(Y, O, C, h, v) + h.second_transpose(Y, O, v, functional(Y, h.value(Y, O), C))

    return Loss(name, of_output, gradient, hessian=hessian, gauss_newton=gauss_newton)


def _half_square(Y, p, C):
    squares = p - C
    squares *= squares  # in place here and below: with large fields new pages take longer than arithmetic
    return 0.5 * (Y.weights @ squares)


def _half_square_functional(Y, p, C):
    functional = p - C
    functional *= Y.weights[:, None]
    return functional


def _half_square_curvature(Y, p, C, v):
    return Y.weights[:, None] * v


def _cross_entropy(Y, O, C, prediction):
    return -(Y.weights @ (C * log_density(Y, O)))


def _cross_entropy_gradient(Y, O, C, prediction):
    return Y.weights[:, None] * (np.exp(log_density(Y, O)) * Y.sum(Y.weights @ C) - C)


def _cross_entropy_hessian(Y, O, C, prediction, v):
    return Y.weights[:, None] * PREDICTIONS["softmax"].derivative(Y, O, v) * Y.sum(Y.weights @ C)


_softplus, _sigmoid = get_activation("softplus"), get_activation("sigmoid")


def _binary_cross_entropy(Y, O, C, prediction):
    return Y.weights @ (_softplus(O) - C * O)


def _binary_cross_entropy_gradient(Y, O, C, prediction):
    return Y.weights[:, None] * (_sigmoid(O) - C)


def _binary_cross_entropy_hessian(Y, O, C, prediction, v):
    return Y.weights[:, None] * _sigmoid.derivative(O) * v


#: 1/2 int |h(O) - C|^2 dy, the choice of section 2.4.
least_squares = _of_prediction("least_squares", _half_square, _half_square_functional, _half_square_curvature)
#: - int C log p dy, p the softmax of O; stable for large O. Convex in O.
cross_entropy = Loss("cross_entropy", _cross_entropy, _cross_entropy_gradient, "softmax", _cross_entropy_hessian)
#: - int C log p + (1 - C) log(1 - p) dy, p = 1/(1 + e^-O); stable for large O. Convex in O.
binary_cross_entropy = Loss(
    "binary_cross_entropy",
    _binary_cross_entropy,
    _binary_cross_entropy_gradient,
    "logistic",
    _binary_cross_entropy_hessian,
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

    Raises
    ------
    TypeError
        If `functional` is no function, or, where the loss is first evaluated, returns no such form.

    Examples
    --------
    >>> from firedrake import dx, grad, inner
    >>> loss = functional_loss(lambda p, C: inner(grad(p - C), grad(p - C)) * dx)
    >>> loss.name
    'functional'
    """
    function("functional", functional, "a function of prediction and observation")
    text("name", name)
    forms: WeakKeyDictionary[LabelSpace, _SampleForms] = WeakKeyDictionary()

    def on(Y):
        if Y not in forms:
            forms[Y] = _SampleForms(Y, functional)
        return forms[Y]

    def value(Y, p, C):
        # A sum over the ranks follows, assemble has made one already.
        return np.array(on(Y).assemble(Y, "value", p, C), dtype=float) / Y.comm.size

    def derivative(Y, p, C):
        return on(Y).columns(Y, "derivative", p, C)

    def curvature(Y, p, C, v):
        return on(Y).columns(Y, "second", p, C, v)

    return _of_prediction(name, value, derivative, curvature)


class _SampleForms:
    """A functional F(p, C) in UFL of one sample, its first derivative in p, and its second in a direction v of p."""

    def __init__(self, Y: LabelSpace, functional: Callable[[fd.Function, fd.Function], object]):
        self._slots = [fd.Function(Y.V) for _ in range(3)]
        p, C, v = self._slots
        form = together(Y.comm, lambda: checked_form("functional", functional(p, C), "(p - C)**2 * dx"))
        derivative = fd.derivative(form, p)
        self._forms = {"value": form, "derivative": derivative, "second": fd.derivative(derivative, p, v)}
        # UFL would take another quadrature for the derivative of a form that is not polynomial, such as cos(p).
        degree = estimate_total_polynomial_degree(_expanded(form))
        self._rule = {"quadrature_degree": degree}
        # Where a derivative is zero, there is nothing to assemble.
        self._vanishing = [which for which, form in self._forms.items() if _expanded(form).empty()]

    def assemble(self, Y: LabelSpace, which: str, *batches: np.ndarray) -> list:
        """The form for each sample of these batches of node values: of p, C and v."""
        assembled = []
        with stop_annotating():
            for s in range(batches[0].shape[1]):
                for slot, values in zip(self._slots, batches):
                    Y.write(slot, values[:, s])
                assembled.append(fd.assemble(self._forms[which], form_compiler_parameters=self._rule))
        return assembled

    def columns(self, Y: LabelSpace, which: str, *batches: np.ndarray) -> np.ndarray:
        """The same of a form with a test function: functionals of the node values, shape (nodes, samples)."""
        if which in self._vanishing:
            return np.zeros_like(batches[0])
        return np.hstack([Y.values(functional) for functional in self.assemble(Y, which, *batches)])


def checked_form(name: str, form: object, example: str) -> ufl.Form:
    """What a user's function returned, if it is a form of UFL without arguments; a TypeError if not."""
    if not isinstance(form, ufl.Form) or form.arguments():
        what = f"a form with {len(form.arguments())}" if isinstance(form, ufl.Form) else type(form).__name__
        raise TypeError(f"{name}: it returned {what}; expected a form without arguments, such as {example}")
    return form


def _expanded(form):
    return apply_derivatives(apply_algebra_lowering(form))
