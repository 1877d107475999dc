"""Control sets A(y) that depend on y: at each node of a label space a set of its own.

The controls at y are then a row (a(y), b(y, .)) with (a(y), b(y, z)) in A(y) for all z. So (4.9) is one problem for each y,

    T^+(y) = max_a  a - m_y(a) F+ + M_y(a) F-

with the same F+ and F- for all y, and (4.10) still gives a kernel of rank 2: b(y, z) is one number where f(z) > 0, and another
one where f(z) < 0, and only these two depend on y.

A set that depends on t too is a list of sets, one for each layer (`sets_of_layers`): a layer has one control.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import numpy as np
from numpy.typing import ArrayLike

from fem_resnet.arguments import instance, integer_array, real_array
from fem_resnet.control.sets.control_set import Array, ControlSet, Extreme, pair_of_arrays, parts_of_state, places
from fem_resnet.fixed import read_only
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.ranks import same, together

__all__ = ["NodalBox", "NodalSet", "NodalSets", "at_nodes", "intervals"]


class NodalSet(ControlSet):
    """A set A(y) for each node y of a label space.

    The arrays that methods take have this rank's nodes as their first axis, or length one there, for all nodes alike; a number
    is for all nodes. What they return has the nodes as its first axis.

    Attributes
    ----------
    Y : LabelSpace
        The label space.
    """

    Y: LabelSpace
    #: The private attribute that says what the set is at each node: an array with the nodes as its first axis.
    _of_node: str

    @property
    def _nodes(self) -> int:
        return len(vars(self)[self._of_node])

    @property
    def kernel_range(self):
        return -self.support(0.0, -1.0), self.support(0.0, 1.0)

    def _fitting(self, names: str, *arrays: Array) -> tuple[Array, ...]:
        """The arrays, which have one shape, if it goes with the nodes."""
        nodes, shape = self._nodes, arrays[0].shape
        if shape and shape[0] not in (1, nodes):
            raise ValueError(f"{names}: expected arrays whose first axis is the {nodes} nodes, or one, got shape {shape}")
        return arrays


class NodalBox(NodalSet):
    """The boxes [a-(y), a+(y)] x [b-(y), b+(y)]. Collective.

    Parameters
    ----------
    Y
        The label domain.
    bias, kernel
        (a-, a+) and (b-, b+): each end is a number, or has a value at each of this rank's nodes, shape (nodes,); no unit. The
        two ends may be equal.

    Attributes
    ----------
    bias, kernel : tuple of numpy.ndarray
        The ends, shape (nodes,) each, read-only.

    Raises
    ------
    TypeError, ValueError
        If the ends are not finite real numbers of such a shape, or the first is above the second; on all ranks alike.

    Examples
    --------
    >>> radius = np.linalg.norm(Y.coordinates, axis=1)  # doctest: +SKIP
    >>> A = NodalBox(Y, (-1, 1), (-radius, radius))  # doctest: +SKIP
    """

    convex = True
    _of_node = "_ends"

    def __init__(self, Y: LabelSpace, bias: Sequence[ArrayLike], kernel: Sequence[ArrayLike]):
        check_label_space(Y)
        self.Y = Y
        pairs = together(Y.comm, lambda: (intervals(Y, "bias", bias), intervals(Y, "kernel", kernel)))
        self._ends = np.column_stack([np.broadcast_to(end, Y.nodes) for pair in pairs for end in pair])
        read_only(self._ends)
        #: Ranks compare this, as they have other nodes each.
        self._description = Y.sum(np.concatenate([Y.weights @ self._ends, Y.weights @ self._ends**2])).tolist()

    @property
    def description(self):
        return self._description

    @property
    def bias(self) -> tuple[Array, Array]:
        return self._ends[:, 0], self._ends[:, 1]

    @property
    def kernel(self) -> tuple[Array, Array]:
        return self._ends[:, 2], self._ends[:, 3]

    @property
    def bias_range(self):
        return self.bias

    def _along(self, array: Array) -> tuple[Array, ...]:
        """The ends a-, a+, b-, b+, with axes of length one behind the nodes, to go with an array."""
        return tuple(end.reshape(-1, *[1] * (array.ndim - 1)) for end in self._ends.T)

    def sections(self, a):
        (a,) = self._fitting("a", real_array("a", a))
        a0, a1, b0, b1 = self._along(a)
        inside = (a0 <= a) & (a <= a1)
        return np.where(inside, b0, np.inf), np.where(inside, b1, -np.inf)

    def maximise(self, alpha, beta):
        alpha, beta = self._fitting("alpha, beta", *pair_of_arrays(alpha=alpha, beta=beta))
        a0, a1, b0, b1 = self._along(alpha)
        return np.where(alpha >= 0, a1, a0), np.where(beta >= 0, b1, b0)

    def largest(self, positive, negative):
        positive, negative = self._fitting("positive, negative", *parts_of_state(positive, negative))
        _, a1, b0, b1 = self._along(positive)
        return _extreme(a1, b0, b1, positive, negative)

    def smallest(self, positive, negative):
        positive, negative = self._fitting("positive, negative", *parts_of_state(positive, negative))
        a0, _, b0, b1 = self._along(positive)
        return _extreme(a0, b1, b0, positive, negative)

    def contains(self, a, b, tolerance=1e-12):
        a, b, tolerance = places(a, b, tolerance)
        self._fitting("a, b", a, b)
        a0, a1, b0, b1 = self._along(a)
        return (
            (a0 - tolerance <= a) & (a <= a1 + tolerance) & (b0 - tolerance <= b) & (b <= b1 + tolerance)
        )  # fmt: skip


class NodalSets(NodalSet):
    """One of finitely many sets at each node: a set for each subdomain, of any kind. Collective.

    Parameters
    ----------
    Y
        The label domain.
    sets
        The sets, each the same for all y of its subdomain: `Box`, `Polygon`, `Points`, `Ellipse` or `Sections`.
    number
        The number of the set at each of this rank's nodes, from 0, shape (nodes,).

    Raises
    ------
    TypeError, ValueError
        If `sets` is no sequence of such sets, or differs between ranks; if a number is no integer or has no set; on all ranks
        alike.

    Examples
    --------
    >>> left = Y.coordinates[:, 0] < 0  # doctest: +SKIP
    >>> A = NodalSets(Y, [Box((-1, 1), (-1, 1)), Ellipse((0, 0), 0.5)], left.astype(int))  # doctest: +SKIP
    """

    _of_node = "_number"

    def __init__(self, Y: LabelSpace, sets: Sequence[ControlSet], number: ArrayLike):
        check_label_space(Y)
        same(Y.comm, sets=sets)
        self.Y, self._sets = Y, tuple(instance("sets", sets, (list, tuple)))
        if not self._sets:
            raise ValueError("sets: expected at least one set, got none")
        for A in self._sets:
            if instance("sets", A, ControlSet).Y is not None:
                raise ValueError(f"sets: expected sets that do not depend on y, got a {type(A).__name__}; give its parts")
        self.convex = all(A.convex for A in self._sets)
        self._number = integer_array("number", number, (Y.nodes,), comm=Y.comm)
        Y.agree(
            bool(((self._number >= 0) & (self._number < len(self._sets))).all()),
            f"number: expected the numbers of {len(self._sets)} sets, from 0, got others among them",
        )
        measures = [Y.weights @ (self._number == k) for k in range(len(self._sets))]
        self._description = [*Y.sum(np.array(measures)).tolist(), *(A.description for A in self._sets)]

    @property
    def description(self):
        return self._description

    def _each(self, ask: Callable[..., Sequence[Array]], *arrays: Array) -> list[Array]:
        """What each set says at its own nodes, put together. What is the same for all nodes each set is asked once."""
        arrays = tuple(np.atleast_1d(array) for array in arrays)
        together: list[Array] = []
        for k, A in enumerate(self._sets):
            own = self._number == k
            if not own.any():
                continue
            answers = ask(A, *(array if len(array) == 1 else array[own] for array in arrays))
            if not together:
                together = [np.empty((len(own), *np.shape(answer)[1:]), np.asarray(answer).dtype) for answer in answers]
            for whole, answer in zip(together, answers):
                whole[own] = answer
        if not together:  # a rank without nodes
            return [np.empty((0, *np.shape(answer)[1:])) for answer in ask(self._sets[0], *arrays)]
        return together

    @property
    def bias_range(self):
        low, high = self._each(lambda A: tuple(np.array([end]) for end in A.bias_range))
        return low, high

    def sections(self, a):
        m, M = self._each(lambda A, a: A.sections(a), *self._fitting("a", real_array("a", a)))
        return m, M

    def maximise(self, alpha, beta):
        given = self._fitting("alpha, beta", *pair_of_arrays(alpha=alpha, beta=beta))
        a, b = self._each(lambda A, *given: A.maximise(*given), *given)
        return a, b

    def largest(self, positive, negative):
        parts = self._fitting("positive, negative", *parts_of_state(positive, negative))
        return Extreme(*self._each(lambda A, *F: _arrays(A.largest(*F)), *parts))

    def smallest(self, positive, negative):
        parts = self._fitting("positive, negative", *parts_of_state(positive, negative))
        return Extreme(*self._each(lambda A, *F: _arrays(A.smallest(*F)), *parts))

    def contains(self, a, b, tolerance=1e-12):
        a, b, tolerance = places(a, b, tolerance)
        self._fitting("a, b", a, b)
        (inside,) = self._each(lambda A, a, b: (A.contains(a, b, tolerance),), a, b)
        return inside.astype(bool)


def at_nodes(A: ControlSet, nodes: slice | Array) -> ControlSet:
    """The sets at some of this rank's nodes y; one set for all y is that everywhere."""
    if not isinstance(A, NodalSet):
        return A
    part = copy(A)
    vars(part)[A._of_node] = vars(A)[A._of_node][nodes]
    return part


def intervals(Y: LabelSpace, name: str, ends: Sequence[ArrayLike]) -> tuple[Array, Array]:
    """The ends of intervals from outside, a pair of numbers or of values at the nodes: each of shape () or (nodes,)."""
    apart = isinstance(ends, (list, tuple)) and len(ends) == 2 and any(np.ndim(end) for end in ends)
    low, high = (real_array(name, end) for end in ends) if apart else real_array(name, ends, (2,))
    for end in (low, high):
        if end.shape not in ((), (Y.nodes,)):
            raise ValueError(f"{name}: expected numbers, or values at the nodes of shape {(Y.nodes,)}, got shape {end.shape}")
    if np.any(low > high):
        raise ValueError(f"{name}: expected (low, high) with low <= high at all nodes, got low > high at some")
    return low, high


def _extreme(a: Array, over_positive: Array, over_negative: Array, positive: Array, negative: Array) -> Extreme:
    value = a - over_positive * positive + over_negative * negative
    return Extreme(value, *(np.broadcast_to(array, value.shape) for array in (a, over_positive, over_negative)))


def _arrays(extreme: Extreme) -> tuple[Array, ...]:
    return extreme.value, extreme.a, extreme.where_positive, extreme.where_negative
