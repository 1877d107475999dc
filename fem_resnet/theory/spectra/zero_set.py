"""Where an activation vanishes: the values that u = a - B f has in a steady state."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fem_resnet.activation.activation import Activation
from fem_resnet.activation.enclosure import Unproved
from fem_resnet.activation.expression_properties import zero_intervals
from fem_resnet.activation.pieces import REACH
from fem_resnet.arguments import instance

__all__ = ["zero_set"]


def zero_set(activation: Activation) -> tuple[float, float] | None:
    """The interval [low, high] on which sigma vanishes; None if it vanishes nowhere.

    The zeros of a SymPy expression are isolated by interval arithmetic. A point where the expression comes within round-off
    of 0 without a change of sign counts as a zero. For any other activation its `properties` decide.

    Parameters
    ----------
    activation
        sigma.

    Raises
    ------
    TypeError, ValueError
        If it is no Activation, if sigma vanishes at several places that do not form an interval, or if it cannot be decided
        where sigma vanishes.

    Examples
    --------
    >>> from fem_resnet import get_activation
    >>> [zero_set(get_activation(name)) for name in ("tanh", "relu", "sigmoid")]
    [(0.0, 0.0), (-inf, 0.0), None]
    """
    instance("activation", activation, Activation, "get_activation(name) makes one")
    if activation.expression is None:
        return _zeros_of_monotone(activation)
    try:
        found = zero_intervals(activation.expression, at_most=1)
    except Unproved as reason:
        raise ValueError(f"activation: it cannot be decided where {activation.name} vanishes: {reason}") from reason
    if len(found) > 1:
        raise ValueError(
            f"activation: expected an activation that vanishes on one interval, as non-decreasing ones do; {activation.name} "
            f"vanishes at several places, among them about {found[0][0]:.6g} and {found[1][0]:.6g}"
        )
    if not found:
        return None
    low, high = found[0]
    if np.isfinite(low) and high - low <= 1e-9 * max(1.0, abs(low)):
        low = high = low + (high - low) / 2
    return low, high


def _zeros_of_monotone(activation: Activation) -> tuple[float, float] | None:
    """As `zero_set`, from the properties of a non-decreasing activation."""
    properties = activation.properties
    if not properties.non_decreasing:
        raise ValueError(
            f"activation: it is not known where {activation.name} vanishes; give it as a SymPy expression "
            f"(Activation.from_sympy)"
        )
    if properties.strictly_increasing and properties.zero_at_zero:
        return 0.0, 0.0
    first, last = (float(activation(end)) for end in (-REACH, REACH))
    # If sigma increases strictly, a value of 0 at a far end has underflowed.
    if first > 0 or last < 0 or properties.strictly_increasing and (first == 0 or last == 0):
        return None
    low = -np.inf if first == 0 else _edge(lambda s: bool(activation(s) >= 0), REACH, -REACH)
    high = np.inf if last == 0 else _edge(lambda s: bool(activation(s) <= 0), -REACH, REACH)
    return low, max(low, high)


def _edge(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """Where a condition that holds at `inside` ends on the way to `outside`, by bisection."""
    while abs(outside - inside) > 1e-15 * max(1.0, abs(inside)):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside
