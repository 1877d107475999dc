"""The terminal cost of section 4.3: what F(v, T) is.

    F(v, T) = 1/2 int (v - ftilde)^2 dy                                                                  (4.12)
    F(v, T) = loss(h(O), C),     O(y) = int W(y, z) v(z) dz + mu(y)                                      (2.9), Remark 4.3
    F(v, T) = any function of the values of v on the cells

The equation (4.11) is the same for all of them. By Remark 4.3 the head changes the terminal value of the co-state alone, and
D_v F(v, T) is that: for least squares int (C_pre - C)(y) h'(O(y)) W(y, .) dy, in the sign of section 4.1. W and mu are given,
not chosen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import reduce
from numbers import Integral
from types import NoneType
from typing import Any

import firedrake as fd
import numpy as np

from fem_resnet.arguments import function, instance, real_array
from fem_resnet.hjb.cells import Cells
from fem_resnet.learning.head import Head
from fem_resnet.learning.loss import Loss, least_squares
from fem_resnet.learning.prediction import PREDICTIONS
from fem_resnet.ranks import may_fail_alone, same, together

__all__ = ["TerminalCost", "terminal_cost"]

#: About how many numbers an output has, for as many states as are looked at in one go.
_AT_ONCE = 2**20


class TerminalCost(ABC):
    """F(., T).

    Attributes
    ----------
    arguments : str
        The arguments that it was made of, for messages.
    target : numpy.ndarray or None
        ftilde on all cells, shape (n,); with a head C at all nodes of the output, in an order that does not depend on the
        partition; None where F(., T) is a function of its own.
    """

    arguments = "target, head or loss"
    target: np.ndarray | None = None
    _numbers_a_state = 1

    @abstractmethod
    def at(self, states: np.ndarray) -> np.ndarray:
        """F(v, T), shape (m,), at states on all cells, shape (n, m); the same on all ranks. Collective."""

    def on_grid(self, axes: Sequence[np.ndarray]) -> np.ndarray:
        """F(., T) on an open grid of states, with a dimension for each cell. Collective."""
        shape, flat = np.broadcast_shapes(*(v.shape for v in axes)), [v.ravel() for v in axes]
        size, step = int(np.prod(shape)), max(1, _AT_ONCE // self._numbers_a_state)
        values = np.empty(size)
        for first in range(0, size, step):
            places = np.unravel_index(np.arange(first, min(first + step, size)), shape)
            values[first : first + step] = self.at(np.array([v[k] for v, k in zip(flat, places)]))
        return values.reshape(shape)


def terminal_cost(cells: Cells, target: Any, head: Head | None = None, loss: Loss | None = None) -> TerminalCost:
    """F(., T) from arguments from outside. Collective.

    Parameters
    ----------
    cells
        The cells of the label domain.
    target
        ftilde or C, by the values at this rank's nodes; a class, for a head onto classes; or a function of states and weights.
    head
        The head; None for O = v.
    loss
        The loss; None stands for `least_squares`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind, does not fit another, or differs between ranks; on all ranks alike.
    """
    Y = cells.Y
    of_states = callable(target) and not isinstance(target, fd.Function)
    labelled = isinstance(target, Integral)
    same(Y.comm, target=(of_states, labelled, target if labelled else None), head=head, loss=loss)
    instance("head", head, (Head, NoneType))
    instance("loss", loss, (Loss, NoneType))
    if of_states:
        if head is not None or loss is not None:
            raise ValueError(f"target: expected values or a class beside a head or a loss, got the function {target!r}")
        return _CostOfStates(cells, function("target", target, "values, a class, or a function of states and weights"))
    if head is None and loss in (None, least_squares):
        return _DistanceFromTarget(cells, target)
    return _CostOfOutput(cells, target, head, least_squares if loss is None else loss)


def _one_sample(name: str, values: np.ndarray) -> np.ndarray:
    if values.shape[1] != 1:
        raise ValueError(f"{name}: expected shape (nodes,), got {values.shape[1]} samples")
    return values


class _DistanceFromTarget(TerminalCost):
    """(4.12), cell by cell."""

    arguments = "target"

    def __init__(self, cells: Cells, target: Any):
        self._weights = cells.weights
        self.target = _one_sample("target", cells.gather_batch(target, "target"))[:, 0]

    def at(self, states):
        return self._weights @ (states - self.target[:, None]) ** 2 / 2

    def on_grid(self, axes):
        return reduce(np.add, [w * (v - f) ** 2 for w, v, f in zip(self._weights, axes, self.target)]) / 2


class _CostOfOutput(TerminalCost):
    """A loss of what a head makes of the state, or of the state itself. Each rank has the cells and outputs that it owns."""

    def __init__(self, cells: Cells, target: Any, head: Head | None, loss: Loss):
        if head is not None and head.psi.Y is not cells.Y:
            raise ValueError(f"head: expected one that reads the label space {cells.Y!r}, got one that reads {head.psi.Y!r}")
        self._own, self._loss = cells.own, loss
        self._Y = cells.Y if head is None else head.Y
        self._prediction = PREDICTIONS[loss.prediction or "identity"] if head is None else head.prediction
        loss.check_prediction(self._prediction)
        #: What the head is now: it may be trained later on.
        self._head = None if head is None else (head.psi, head.onto, *(array.copy() for array in head.matrices()))
        if head is not None and isinstance(target, Integral):
            given = head.labelled([int(target)], "target")
        else:
            given = self._Y.batch(target, "target")
        self._C = _one_sample("target", self._Y.values(given)).copy()
        self.target = Cells(self._Y).gather(self._C[:, 0])
        self._numbers_a_state = self._Y.size

    def at(self, states):
        O = states[self._own]
        if self._head is not None:
            psi, onto, W, mu = self._head
            O = onto.expand(W @ psi.project(O) + mu[:, None])
        C, loss = np.broadcast_to(self._C, O.shape), self._loss

        def evaluate() -> np.ndarray:
            values = loss.value(self._Y, O, C, self._prediction)
            return real_array("loss", values, (states.shape[1],), finite=False)

        values = self._Y.sum(together(self._Y.comm if may_fail_alone(loss.value) else None, evaluate))
        return real_array("loss", values)


class _CostOfStates(TerminalCost):
    """A user's function of the states on all cells, which each rank computes."""

    arguments = "target"

    def __init__(self, cells: Cells, of_states: Callable[[np.ndarray, np.ndarray], np.ndarray]):
        self._cells, self._of_states = cells, of_states

    def at(self, states):
        def evaluate() -> np.ndarray:
            values = real_array("target", self._of_states(states, self._cells.weights))
            if values.shape not in ((), states.shape[1:]):
                raise ValueError(f"target: expected a function with values of shape {states.shape[1:]}, got {values.shape}")
            return np.broadcast_to(values, states.shape[1:])

        return together(self._cells.Y.comm, evaluate)
