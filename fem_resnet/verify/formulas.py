"""Activations by other formulas than the package's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.special
import sympy

from fem_resnet.activation.activation import Activation

__all__ = ["NotWrittenOut", "sigma"]


class NotWrittenOut(NotImplementedError):
    """Something for which `verify` has no second formula; the message says what."""


_SIGMA: dict[str, Callable[..., np.ndarray]] = {
    "tanh": lambda s: 1 - 2 / (1 + np.exp(2 * np.clip(s, -350, 350))),
    "arctan": lambda s: np.sign(s) * (np.pi / 2 - np.arctan2(1.0, np.abs(s))),
    "sigmoid": scipy.special.expit,
    "softplus": lambda s: np.logaddexp(0.0, s),
    "relu": lambda s: np.where(s > 0, s, 0.0),
    "leaky_relu": lambda s: np.where(s > 0, s, 0.1 * s),
    "elu": lambda s, alpha: np.where(s > 0, s, alpha * (np.exp(np.minimum(s, 0)) - 1)),
    "identity": lambda s: 1.0 * s,
}


def sigma(activation: Activation) -> Callable[[np.ndarray], np.ndarray]:
    """Sigma by a second formula.

    Raises
    ------
    NotWrittenOut
        If the activation has none.
    """
    if activation.expression is not None:
        symbols = sorted(activation.expression.free_symbols, key=str) or [sympy.Symbol("s")]
        formula = sympy.lambdify(symbols, activation.expression, modules=["scipy", "numpy"])
        return lambda s: np.broadcast_to(formula(s), np.shape(s)) + 0.0
    if activation.name not in _SIGMA:
        raise NotWrittenOut(f"the activation {activation.name!r} has no second formula")
    parameters = dict(activation.parameters)
    return lambda s: _SIGMA[activation.name](s, **parameters)
