"""Time bases: which layers share coefficients of a parameter p(t) = sum_k theta_k(t) c_k, and with which weights.

=================  ==============================================  =========================================
time basis         functions theta_k                               where
=================  ==============================================  =========================================
`LayerIndicators`  a value of its own on each layer                residual networks (2.1)
`Hats`             linear between the layer times t_0 < .. < t_L   a^tau and B^tau of section 2.1
`Shared`           one value for all layers                        autonomous networks, f_t = sigma(a - B f)
`Groups`           one value for each group of layers
`Once`             one value, not of a time                        heads, kernel factors, layer times
`AtStart`          one value, at t = 0                             initial states
=================  ==============================================  =========================================

A layer sees its time as the fraction s = (t - t_l) / (t_(l+1) - t_l).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["AtStart", "Groups", "Hats", "LayerIndicators", "Once", "PointInTime", "Shared", "TimeBasis", "get_time_basis"]


class TimeBasis(ABC):
    """Functions theta_k of t, on layers.

    Law: ``measures[k]`` is the sum of `(t_(l+1) - t_l) int_0^1 weight ds` over the layers where theta_k is active.

    Attributes
    ----------
    measures : numpy.ndarray
        tau_k = int theta_k dt > 0, one a function, in the unit of the layer times: the lumped inner product in t.
    neighbours : list of (int, int, float)
        Functions k, m that follow each other in t, and the distance d of their centres, so that the integral of the squared
        derivative of the interpolant is `sum |c_m - c_k|^2 / d`.
    description : str or list of int
        The argument with which `get_time_basis` makes the same basis.
    """

    measures: np.ndarray
    neighbours: list[tuple[int, int, float]]
    description: str | list[int]

    @abstractmethod
    def active(self, layer: int) -> tuple[int, ...]:
        """Which functions do not vanish on a layer."""

    @abstractmethod
    def weights(self, layer: int, s: float) -> tuple[float, ...]:
        """The values of the active functions on a layer, at the fraction s in [0, 1] of its time; no unit."""


class Groups(TimeBasis):
    """One value shared by all layers of a group.

    Neighbouring layers of one group count as one longer layer in `neighbours`.

    Parameters
    ----------
    times
        Layer times t_0 < .. < t_L, shape (L + 1,).
    groups
        The number of each layer's group, shape (L,): integers from 0, none left out.
    argument
        How messages call `groups`.

    Raises
    ------
    TypeError, ValueError
        If `groups` are no such numbers.

    Examples
    --------
    >>> basis = Groups([0.0, 0.5, 1.0, 2.0], [0, 0, 1])
    >>> basis.measures.tolist(), basis.neighbours
    ([1.0, 1.0], [(0, 1, 1.0)])
    """

    def __init__(self, times: Sequence[float], groups: Sequence[int], argument: str = "groups"):
        self._groups = _checked_groups(groups, len(times) - 1, argument)
        self.description = list(self._groups)
        self.measures = np.bincount(np.array(self._groups, dtype=int), weights=np.diff(times))
        starts = [l for l, group in enumerate(self._groups) if l == 0 or group != self._groups[l - 1]]
        centres = [(times[a] + times[b]) / 2 for a, b in zip(starts, [*starts[1:], -1])]
        self.neighbours = [
            (self._groups[a], self._groups[b], float(y - x)) for a, b, x, y in zip(starts, starts[1:], centres, centres[1:])
        ]

    def active(self, layer):
        return (self._groups[layer],)

    def weights(self, layer, s):
        return (1.0,)


class LayerIndicators(Groups):
    """Indicators of the layers: a value of its own on each layer.

    Parameters
    ----------
    times
        Layer times t_0 < .. < t_L, shape (L + 1,).
    """

    def __init__(self, times: Sequence[float]):
        super().__init__(times, range(len(times) - 1))
        self.description = "layers"


class Shared(Groups):
    """One value for all layers: the autonomous case.

    Parameters
    ----------
    times
        Layer times t_0 < .. < t_L, shape (L + 1,).
    """

    def __init__(self, times: Sequence[float]):
        super().__init__(times, [0] * (len(times) - 1))
        self.description = "shared"


class Hats(TimeBasis):
    """Continuous and piecewise linear: c_k is the value at the layer time t_k, k = 0 .. L.

    The inner product is lumped, so that each control has a Riesz map of its own: tau_k is half of the two layers beside
    t_k. Without a layer there is no function.

    Parameters
    ----------
    times
        Layer times t_0 < .. < t_L, shape (L + 1,).

    Examples
    --------
    >>> Hats([0.0, 1.0, 3.0]).measures.tolist()
    [0.5, 1.5, 1.0]
    """

    description = "linear"

    def __init__(self, times: Sequence[float]):
        lengths = np.diff(times)
        self.measures = (np.append(lengths, 0.0) + np.append(0.0, lengths)) / 2 if lengths.size else lengths
        self.neighbours = [(k, k + 1, float(length)) for k, length in enumerate(lengths)]

    def active(self, layer):
        return (layer, layer + 1)

    def weights(self, layer, s):
        return (1.0 - s, s)


class PointInTime:
    """A time basis that no layer sees: one function, of measure one. `Once` or `AtStart`."""

    measures = np.ones(1)
    neighbours: list[tuple[int, int, float]] = []


class Once(PointInTime):
    """Time basis of a parameter that acts once, at t = T, and not over a time."""


class AtStart(PointInTime):
    """Time basis of the initial state, which acts at t = 0."""


_NAMED: dict[str, Callable[[Sequence[float]], TimeBasis]] = {"layers": LayerIndicators, "linear": Hats, "shared": Shared}


def get_time_basis(choice: str | Sequence[int], times: Sequence[float], argument: str = "choice") -> TimeBasis:
    """A time basis by its name, or groups of layers.

    Parameters
    ----------
    choice
        "layers", "linear", "shared", or a group number a layer (see `Groups`).
    times
        Layer times, shape (L + 1,).
    argument
        How messages call `choice`.

    Raises
    ------
    TypeError, ValueError
        If the choice is none of these.

    Examples
    --------
    >>> get_time_basis("shared", [0.0, 1.0, 3.0]).measures.tolist()
    [3.0]
    """
    if not isinstance(choice, str):
        return Groups(times, choice, argument)
    if choice not in _NAMED:
        raise ValueError(f"{argument}: expected {_choices(len(times) - 1)}, got {choice!r}")
    return _NAMED[choice](times)


def _checked_groups(groups: Sequence[int], layers: int, argument: str) -> tuple[int, ...]:
    if not isinstance(groups, (Sequence, np.ndarray)) or isinstance(groups, (str, bytes)):
        raise TypeError(f"{argument}: expected {_choices(layers)}, got {type(groups).__name__}")
    numbers = list(groups)
    for number in numbers:
        if not isinstance(number, (int, np.integer)) or isinstance(number, bool):
            raise TypeError(f"{argument}: expected integers as group numbers, got {number!r}")
    if len(numbers) != layers:
        raise ValueError(f"{argument}: expected {layers} group numbers, one a layer, got {len(numbers)}")
    if set(numbers) != set(range(len(set(numbers)))):
        raise ValueError(
            f"{argument}: expected group numbers from 0 that leave none out, got {[int(number) for number in numbers]}"
        )
    return tuple(int(number) for number in numbers)


def _choices(layers: int) -> str:
    return f"{', '.join(map(repr, _NAMED))} or a list of {layers} group numbers, one a layer"
