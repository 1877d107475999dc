"""Steps of stochastic gradient methods: SGD with momentum, Adam, AdamW.

With the Riesz gradient r of J of a mini-batch, rate h and step number n = 1, 2, ..

    SGD     v <- mu v + r,    c <- c - h v

in coefficients c, which is gradient descent in the label measure whatever the basis. Adam treats each coordinate by itself,
so that it depends on coordinates. It works in x = Q c of `SpaceBasis.coordinates`: orthonormal ones for coefficients in a
basis, where the Riesz map is the identity up to a factor, and values at points for what is given at the nodes. There the
identity would need sqrt(w_i) a(y_i), and a step of size h in these would move a(y_i) by h / sqrt(w_i), the more the finer the
mesh is. In values at points Adam acts on the function r(y) itself, point by point, on any mesh. The same holds for layers: a
coefficient of each layer is a value at a time. With g = unit Q r, which has the unit of J,

    Adam    m <- beta_1 m + (1 - beta_1) g,    v <- beta_2 v + (1 - beta_2) g^2,
            x <- x - h (m / (1 - beta_1^n)) / (sqrt(v / (1 - beta_2^n)) + epsilon)

AdamW is Adam with a decay c <- (1 - h decay) c before each step, which does not go through the moments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pyadjoint.enlisting import Enlist
from pyadjoint.reduced_functional import ReducedFunctional

from fem_resnet.arguments import number
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import SpaceBasis, read_all

__all__ = ["SGD", "Adam", "Descent", "StochasticStep"]


class StochasticStep(ABC):
    """How coefficients move by a gradient: `SGD` or `Adam`.

    Attributes
    ----------
    rate : float
        The learning rate h, which a schedule multiplies.
    decay : float
        The part of coefficients that is taken off in each step, over the rate.
    """

    rate: float
    decay: float

    @abstractmethod
    def memory(self, c: np.ndarray) -> tuple[np.ndarray, ...]:
        """What is remembered from one step to the next, at first: arrays of the shape of the coefficients."""

    @abstractmethod
    def move(
        self, basis: SpaceBasis, gradient: np.ndarray, memory: Sequence[np.ndarray], number: int, rate: float
    ) -> np.ndarray:
        """What is taken off the coefficients, of their shape; `memory` is changed.

        Parameters
        ----------
        basis
            How the coefficients are held.
        gradient
            The Riesz gradient, of the shape of the coefficients.
        memory
            Arrays of the same shape, as of `memory`.
        number
            The step's number, from 1.
        rate
            h.
        """


@dataclass(frozen=True)
class SGD(StochasticStep):
    """Stochastic gradient descent in the label measure, with momentum: v <- momentum v + gradient, c <- c - rate v.

    Parameters
    ----------
    rate
        Learning rate, positive. Its unit is that of a squared distance over J.
    momentum
        In [0, 1); no unit.
    decay
        Part of the coefficients, over the rate, that each step takes off what a regulariser would act on: >= 0.

    Raises
    ------
    ValueError
        If a number is out of its range.

    Examples
    --------
    >>> SGD(rate=0.5, momentum=0.9)
    SGD(rate=0.5, momentum=0.9, decay=0.0)
    """

    rate: float = 0.1
    momentum: float = 0.9
    decay: float = 0.0

    def __post_init__(self):
        number("rate", self.rate, above=0)
        number("momentum", self.momentum, least=0, below=1)
        number("decay", self.decay, least=0)

    def memory(self, c):
        return (np.zeros_like(c),)

    def move(self, basis, gradient, memory, number, rate):
        (velocity,) = memory
        velocity *= self.momentum
        velocity += gradient
        return rate * velocity


@dataclass(frozen=True)
class Adam(StochasticStep):
    """Adam, and with a decay AdamW: each coordinate moves by about the rate, whatever the size of the gradient.

    The coordinates are orthonormal ones for coefficients in a basis, and values at points for what is given at the nodes;
    both are of size one for a parameter of size one.

    Parameters
    ----------
    rate
        Learning rate, positive; no unit of length in Y.
    beta_1, beta_2
        Of the two moments, in [0, 1); no unit.
    epsilon
        Added to the root of the second moment, positive; in the unit of J.
    decay
        Part of the coefficients, over the rate, that each step takes off what a regulariser would act on, beside the moments:
        AdamW where it is positive.

    Raises
    ------
    ValueError
        If a number is out of its range.

    Examples
    --------
    >>> Adam(decay=0.01)
    Adam(rate=0.01, beta_1=0.9, beta_2=0.999, epsilon=1e-08, decay=0.01)
    """

    rate: float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    decay: float = 0.0

    def __post_init__(self):
        number("rate", self.rate, above=0)
        number("beta_1", self.beta_1, least=0, below=1)
        number("beta_2", self.beta_2, least=0, below=1)
        number("epsilon", self.epsilon, above=0)
        number("decay", self.decay, least=0)

    def memory(self, c):
        return np.zeros_like(c), np.zeros_like(c)

    def move(self, basis, gradient, memory, number, rate):
        first, second = memory
        g = basis.unit * basis.coordinates(gradient)
        first += (1 - self.beta_1) * (g - first)
        second += (1 - self.beta_2) * (g**2 - second)
        size = np.sqrt(second / (1 - self.beta_2**number))
        return basis.from_coordinates(rate * (first / (1 - self.beta_1**number)) / (size + self.epsilon))


class Descent:
    """Steps of one method in all that is learned, with what the method remembers. Collective.

    Parameters
    ----------
    parameters
        Those that are learned, in the order of the functional's controls.
    step
        The method.
    """

    def __init__(self, parameters: Sequence[Parameter], step: StochasticStep):
        self._step, self._number = step, 0
        self._sets = [(p, k) for p in parameters for k in range(len(p.functions))]
        self._bases = [p.space_bases[k] for p, k in self._sets]
        self._at = self.get()
        self._memory = [step.memory(c) for c in self._at]

    def get(self) -> list[np.ndarray]:
        """The coefficients of the parameters."""
        return [p.read(k) for p, k in self._sets]

    def set(self, coefficients: Sequence[np.ndarray]) -> None:
        """Give the parameters these coefficients, as from `get`."""
        for (p, k), c in zip(self._sets, coefficients):
            p.write(k, c)

    @property
    def state(self) -> dict[str, Sequence[np.ndarray]]:
        """All that the next step depends on: the coefficients, and each moment that the method remembers."""
        return {"controls": self._at} | {f"moment_{k}": moments for k, moments in enumerate(zip(*self._memory))}

    def go_on(self, state: Sequence[Sequence[np.ndarray]], number: int) -> None:
        """Take the arrays of `state` after so many steps, and give the parameters their coefficients."""
        at, *moments = state
        self._at, self._memory, self._number = list(at), list(zip(*moments)), number
        self.set(self._at)

    def step(self, J: ReducedFunctional, rate: float) -> None:
        """Move all parameters by the derivative of J at its last evaluation.

        Parameters
        ----------
        J
            The functional.
        rate
            h.
        """
        self._number += 1
        functionals = read_all(self._bases, Enlist(J.derivative()))
        for (p, k), basis, c, memory, d in zip(self._sets, self._bases, self._at, self._memory, functionals):
            gradient = basis.riesz(d) / p.time_basis.measures[k]
            if self._step.decay and p.penalised:
                c *= 1 - rate * self._step.decay
            c -= self._step.move(basis, gradient, memory, self._number, rate)
            p.write(k, c)
