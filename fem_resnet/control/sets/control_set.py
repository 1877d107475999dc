"""A control set A as control theory uses it: its sections, its support function and the extremes of T_f.

A is a compact set in the plane of (a, b). Its sections are the intervals from m(a) to M(a),

    m(a) = min { b : (a, b) in A },        M(a) = max { b : (a, b) in A }.

(4.9) asks for the extremes of T_f(a, b) = a - int b(z) f(z) dz over K_A = { (a, b) : (a, b(z)) in A for all z }. For a
fixed a, T_f is extreme where each b(z) is at an end of the section. Let F+ and F- be the integrals of the positive and of
the negative part of f, both >= 0. Then

    T^+ = max_a  a - m(a) F+ + M(a) F-        b(z) = m(a) where f > 0, M(a) where f < 0
    T^- = min_a  a - M(a) F+ + m(a) F-        b(z) = M(a) where f > 0, m(a) where f < 0

These are two searches over one number a. The first is concave and the second convex if A is convex.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from fem_resnet.arguments import integer, number, real_array
from fem_resnet.fixed import Fixed
from fem_resnet.label_domain.label_space import LabelSpace

__all__ = ["ControlSet", "Extreme", "interval", "pair_of_arrays", "parts_of_state", "places"]

Array = np.ndarray


@dataclass(frozen=True)
class Extreme:
    """An extreme of T_f over K_A, (4.9). All arrays have the shape of F+ and F-.

    Attributes
    ----------
    value : numpy.ndarray
        T_f there.
    a : numpy.ndarray
        The bias, one number for all z.
    where_positive, where_negative : numpy.ndarray
        b(z) where f(z) > 0, and b(z) where f(z) < 0. Where f(z) = 0, b(z) may be any value of the section at a.
    """

    value: Array
    a: Array
    where_positive: Array
    where_negative: Array


class ControlSet(Fixed, ABC):
    """A compact set A of pairs (a, b), numbers without unit. All methods take arrays of any shape.

    Attributes
    ----------
    convex : bool
        Whether A is convex. If it is not, mixtures of controls may leave it.
    Y : LabelSpace or None
        The label space on whose nodes A depends (`NodalSet`); None for one set for all y.
    """

    convex: bool
    Y: LabelSpace | None = None

    @cached_property
    def description(self) -> tuple:
        """Numbers that differ between sets of one class, so that ranks can compare their sets (`ranks.same`)."""
        return self.bias_range, self.convex, *self.sections(np.linspace(*self.bias_range, 65))

    @property
    @abstractmethod
    def bias_range(self) -> tuple[float | Array, float | Array]:
        """The smallest and the largest a of A: numbers, or of a set that depends on y arrays of shape (nodes,)."""

    @property
    def kernel_range(self) -> tuple[float | Array, float | Array]:
        """The smallest and the largest b of A, as `bias_range`."""
        return float(-self.support(0.0, -1.0)), float(self.support(0.0, 1.0))

    @abstractmethod
    def sections(self, a: ArrayLike) -> tuple[Array, Array]:
        """m(a) and M(a), each of the shape of a; inf and -inf where A has no point (a, b).

        Raises
        ------
        TypeError, ValueError
            If a is not an array of finite real numbers.
        """

    @abstractmethod
    def maximise(self, alpha: ArrayLike, beta: ArrayLike) -> tuple[Array, Array]:
        """A point (a, b) of A where alpha a + beta b is largest.

        Parameters
        ----------
        alpha, beta
            Arrays that broadcast to one shape, which a and b have too.

        Raises
        ------
        TypeError, ValueError
            If they are not finite real numbers, or do not broadcast.
        """

    @abstractmethod
    def largest(self, positive: ArrayLike, negative: ArrayLike) -> Extreme:
        """T^+ of (4.9): the largest T_f over K_A.

        Parameters
        ----------
        positive, negative
            F+ and F-, the integrals of the positive and of the negative part of f, both >= 0: arrays that broadcast to one
            shape, which the result has too.

        Raises
        ------
        TypeError, ValueError
            If they are not finite real numbers >= 0, or do not broadcast.
        """

    @abstractmethod
    def smallest(self, positive: ArrayLike, negative: ArrayLike) -> Extreme:
        """T^- of (4.9): the smallest T_f over K_A.

        Parameters
        ----------
        positive, negative
            F+ and F-, arrays of one shape, as for `largest`.

        Raises
        ------
        TypeError, ValueError
            As for `largest`.
        """

    def contains(self, a: ArrayLike, b: ArrayLike, tolerance: float = 1e-12) -> Array:
        """Whether (a, b) is in A: booleans, of the shape that a and b broadcast to.

        Parameters
        ----------
        a, b
            Arrays that broadcast to one shape.
        tolerance
            How far outside of its section b may be, and how far a outside of the range of a.

        Raises
        ------
        TypeError, ValueError
            If a and b are not finite real numbers or do not broadcast, or the tolerance is negative.
        """
        low, high = self.bias_range
        a, b, tolerance = places(a, b, tolerance)
        near = (a >= low - tolerance) & (a <= high + tolerance)
        m, M = self.sections(np.clip(a, low, high))
        return near & (b >= m - tolerance) & (b <= M + tolerance)

    def support(self, alpha: ArrayLike, beta: ArrayLike) -> Array:
        """The support function of A: the maximum of alpha a + beta b over A.

        Parameters
        ----------
        alpha, beta
            Arrays that broadcast to one shape, which the result has too.

        Raises
        ------
        TypeError, ValueError
            If they are not finite real numbers, or do not broadcast.
        """
        alpha, beta = pair_of_arrays(alpha=alpha, beta=beta)
        a, b = self.maximise(alpha, beta)
        return alpha * a + beta * b

    def sample(self, count: int) -> tuple[Array, Array]:
        """Points (a, b) of A, for searches over A where a running cost depends on (a, b).

        Parameters
        ----------
        count
            How many values of a in its range are taken, and how many values of b in each section. A finite set gives all its
            points instead.

        Returns
        -------
        a, b
            Arrays of one shape, (points,).

        Raises
        ------
        ValueError
            If `count` is not a positive integer, or A depends on y.
        """
        count = integer("count", count)
        if self.Y is not None:
            raise ValueError(f"sample: expected one set for all y, got a {type(self).__name__}; ask the set of one region")
        a = np.linspace(*self.bias_range, count)
        m, M = self.sections(a)
        a, b = np.repeat(a, count), np.linspace(m, M, count, axis=1).ravel()
        inside = self.contains(a, b)
        return a[inside], b[inside]


def pair_of_arrays(least: float = -np.inf, **given: ArrayLike) -> tuple[Array, Array]:
    """Two arrays of real numbers from outside, by their names, broadcast to one shape."""
    arrays = [real_array(name, value, least=least) for name, value in given.items()]
    try:
        first, second = np.broadcast_arrays(*arrays)
    except ValueError as error:
        shapes = " and ".join(str(array.shape) for array in arrays)
        raise ValueError(f"{', '.join(given)}: expected arrays that broadcast to one shape, got shapes {shapes}") from error
    return first, second


def parts_of_state(positive: ArrayLike, negative: ArrayLike) -> tuple[Array, Array]:
    """F+ and F- from outside, broadcast to one shape."""
    return pair_of_arrays(least=0, positive=positive, negative=negative)


def places(a: ArrayLike, b: ArrayLike, tolerance: float) -> tuple[Array, Array, float]:
    """Points (a, b) from outside, broadcast to one shape, and how far outside of a set they may be."""
    a, b = pair_of_arrays(a=a, b=b)
    return a, b, number("tolerance", tolerance, least=0)


def interval(name: str, ends: Sequence[float]) -> tuple[float, float]:
    """The ends (low, high) of an interval from outside, low <= high."""
    low, high = real_array(name, ends, (2,)).tolist()
    if low > high:
        raise ValueError(f"{name}: expected (low, high) with low <= high, got {(low, high)}")
    return low, high
