"""The prediction functions h of (2.9), C_pre = h(O), on values at the nodes: the identity, the logistic function, the softmax.

The softmax is a density on the label domain of the output, e^O / int e^O.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from fem_resnet.activation.activation import get_activation
from fem_resnet.label_domain.label_space import LabelSpace

__all__ = ["PREDICTIONS", "Prediction", "log_density"]


@dataclass(frozen=True)
class Prediction:
    """A prediction function h of (2.9), on node values of shape (nodes, samples).

    Attributes
    ----------
    name : str
    value : callable
        ``value(Y, O)`` is h(O).
    transpose : callable
        ``transpose(Y, O, d)`` is h'(O)^T d for functionals d of h(O).
    derivative : callable
        ``derivative(Y, O, v)`` is h'(O) v for directions v of O.
    second_transpose : callable
        ``second_transpose(Y, O, v, d)`` is (h''(O) v)^T d, the derivative of ``transpose(Y, O, d)`` in the direction v of
        O. All collective.
    """

    name: str
    value: Callable[[LabelSpace, np.ndarray], np.ndarray]
    transpose: Callable[[LabelSpace, np.ndarray, np.ndarray], np.ndarray]
    derivative: Callable[[LabelSpace, np.ndarray, np.ndarray], np.ndarray]
    second_transpose: Callable[[LabelSpace, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def log_density(Y: LabelSpace, O: np.ndarray) -> np.ndarray:
    """log p, p = e^O / int e^O, free of overflow; over classes p is the softmax. Collective."""
    largest = O.max(axis=0, initial=-np.inf)
    Y.comm.Allreduce(MPI.IN_PLACE, largest, op=MPI.MAX)
    shifted = O - largest
    return shifted - np.log(Y.sum(Y.weights @ np.exp(shifted)))


def _softmax(Y, O):
    return np.exp(log_density(Y, O))


def _centred(Y, p, d):
    """d minus its mean in the density p, for functionals d: what softmax' sees of them."""
    return d - Y.weights[:, None] * Y.sum((d * p).sum(axis=0))


def _softmax_transpose(Y, O, d):
    p = _softmax(Y, O)
    return p * _centred(Y, p, d)


def _softmax_derivative(Y, O, v):
    p = _softmax(Y, O)
    return p * (v - Y.sum(Y.weights @ (p * v)))


def _softmax_second_transpose(Y, O, v, d):
    p, p_dot = _softmax(Y, O), _softmax_derivative(Y, O, v)
    return p_dot * _centred(Y, p, d) - p * Y.weights[:, None] * Y.sum((d * p_dot).sum(axis=0))


_sigmoid = get_activation("sigmoid")

#: The prediction functions by name.
PREDICTIONS = {
    prediction.name: prediction
    for prediction in (
        Prediction("identity", lambda Y, O: O, lambda Y, O, d: d, lambda Y, O, v: v, lambda Y, O, v, d: np.zeros_like(O)),
        Prediction(
            "logistic",
            lambda Y, O: _sigmoid(O),
            lambda Y, O, d: _sigmoid.derivative(O) * d,
            lambda Y, O, v: _sigmoid.derivative(O) * v,
            lambda Y, O, v, d: _sigmoid.second_derivative(O) * v * d,
        ),
        Prediction("softmax", _softmax, _softmax_transpose, _softmax_derivative, _softmax_second_transpose),
    )
}
