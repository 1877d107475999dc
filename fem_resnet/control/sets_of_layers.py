"""Sets of controls that depend on t: one set for each layer, since a layer has one control."""

from __future__ import annotations

from typing import Any, TypeVar

from fem_resnet.arguments import instance
from fem_resnet.control.row_sets import RowBall, RowBox, SpanBox
from fem_resnet.control.sets.control_set import ControlSet
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.network.network import ResidualNetwork

__all__ = ["AnySet", "check_set", "is_pointwise", "sets_of_layers"]

#: A set in which the controls of one layer lie.
AnySet = ControlSet | RowBox | RowBall | SpanBox
_A = TypeVar("_A", bound=AnySet)


def check_set(A: Any, Y: LabelSpace, *kinds: type[_A]) -> _A:
    """The set, if it is of one of these kinds and for controls on this label space.

    Raises
    ------
    TypeError, ValueError
        If it is not.
    """
    found = instance("A", A, kinds)
    where, what = (found.Y, "sets") if isinstance(found, ControlSet) else (found.psi.Y, "rows")
    if where not in (None, Y):
        raise ValueError(f"A: expected {what} on the label space {Y!r}, got {what} on {where!r}")
    return found


def sets_of_layers(A: Any, net: ResidualNetwork, *kinds: type[_A]) -> list[_A]:
    """The set of each layer of a network, from one set for all layers, or a list with one for each.

    Raises
    ------
    TypeError, ValueError
        If they are not of these kinds, are on another label space than the network, or are neither one nor as many as layers.
    """
    if not isinstance(A, (list, tuple)):
        return [check_set(A, net.Y, *kinds)] * net.layers
    if len(A) != net.layers:
        raise ValueError(f"A: expected one set, or one for each of the {net.layers} layers, got a list of {len(A)}")
    return [check_set(one, net.Y, *kinds) for one in A]


def is_pointwise(A: Any) -> bool:
    """Whether (a, b) itself is chosen from a set, on some layer, and not coefficients."""
    return any(isinstance(one, ControlSet) for one in (A if isinstance(A, (list, tuple)) else [A]))
