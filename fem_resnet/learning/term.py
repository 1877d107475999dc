"""Terms of a regulariser: what each does with the coefficients of one parameter, and its weights.

A term is a quadratic form, given by its functional `A c` (`Form`), or a `Term`, which says for each parameter what it has
there: a `Penalty`, a functional of all sets of coefficients c = (c_k) with a value, a gradient and a second derivative.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fem_resnet.arguments import number
from fem_resnet.parameters.parameter import Parameter

__all__ = ["Coefficients", "Form", "Penalty", "Quadratic", "Term", "Weights", "checked_weights", "scaled_weight", "weight_on"]

#: Coefficients of a parameter, or functionals of them: one array a function in time.
Coefficients = Sequence[np.ndarray]
#: `A c` for one parameter: functionals of all its sets of coefficients from all of them.
Form = Callable[[Parameter, Coefficients], list[np.ndarray]]


class Penalty(ABC):
    """A twice differentiable functional of the coefficients of one parameter. Its methods are collective."""

    @abstractmethod
    def value(self, c: Coefficients) -> float:
        """The value at the coefficients c."""

    @abstractmethod
    def functionals(self, c: Coefficients) -> list[np.ndarray]:
        """The derivative at c: a functional of each c_k, in a new array."""

    @abstractmethod
    def actions(self, c: Coefficients, v: Coefficients) -> list[np.ndarray]:
        """The second derivative at c, applied to the directions v: a functional of each c_k, in a new array."""


class Quadratic(Penalty):
    """1/2 <c, A c>, with the weight tau_k at each function in time.

    Parameters
    ----------
    parameter
        The parameter.
    forms
        For each function in time, the map from c_k to its functional A_k c_k.
    """

    def __init__(self, parameter: Parameter, forms: Sequence[Callable[[np.ndarray], np.ndarray]]):
        self._tau, self._bases, self._forms = parameter.time_basis.measures, parameter.space_bases, forms

    def value(self, c):
        return 0.5 * sum(basis.pair(d, c_k) for basis, d, c_k in zip(self._bases, self.functionals(c), c))

    def functionals(self, c):
        return [tau * form(c_k) for tau, form, c_k in zip(self._tau, self._forms, c)]

    def actions(self, c, v):
        return self.functionals(v)


class Term(ABC):
    """A functional of parameters, the sum of one `Penalty` a parameter.

    Attributes
    ----------
    quadratic : bool
        Whether it is a quadratic form.
    convex : bool
        Whether it is convex in the coefficients.
    smooth : bool
        Whether its second derivative is continuous.
    """

    quadratic = False
    convex: bool = True
    smooth = True

    @abstractmethod
    def on(self, parameter: Parameter) -> Penalty | None:
        """What it is of one parameter, None for nothing. Collective.

        Raises
        ------
        ValueError
            If there is no formula for that parameter; on all ranks alike.
        """


@dataclass(frozen=True)
class Weights:
    """Weights of a term that differ between parameters.

    Attributes
    ----------
    others : float
        That of all parameters without one of their own.
    own : tuple of (str, float)
        Those of parameters by their names.
    """

    others: float
    own: tuple[tuple[str, float], ...]


def weight_on(weight: float | Weights, parameter: Parameter) -> float:
    """The weight of a term at one parameter."""
    return dict(weight.own).get(parameter.name, weight.others) if isinstance(weight, Weights) else weight


def scaled_weight(weight: float | Weights, factor: float) -> float | Weights:
    """The weight of a term, at all parameters times a number."""
    if isinstance(weight, Weights):
        return Weights(factor * weight.others, tuple((name, factor * own) for name, own in weight.own))
    return factor * weight


def checked_weights(weight: float, own: Mapping[str, float], names: Sequence[str]) -> float | Weights:
    """Weights from outside: one for all parameters, and others for some of them.

    Parameters
    ----------
    weight
        That of all parameters without one of their own.
    own
        Those of parameters by their names.
    names
        The parameters that the term takes.

    Raises
    ------
    TypeError, ValueError
        If the term does not take a parameter, or a weight is not >= 0.
    """
    weight = number("weight", weight, least=0)
    for name in own:
        if name not in names:
            raise TypeError(f"{name}: expected weights of {', '.join(names)} alone, got one of {name!r}; leave it out")
    each = tuple((name, number(name, own[name], least=0)) for name in sorted(own))
    return Weights(weight, each) if each else weight
