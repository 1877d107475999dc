"""What the tape records: a differentiable map between arrays, with methods for its value and its derivatives.

Segments of layers, heads, losses and regularisers are such operators. `operator_block` puts them on pyadjoint's tape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from fem_resnet.parameters.space_basis import Slot

__all__ = ["Operator", "SecondOrderOperator", "made", "parts"]


class Operator(Protocol):
    """A differentiable map F from arrays to an array or to a number.

    Let m be the arrays, v directions (one array an input, zeros for an input without a direction), l a functional of the
    output, and <., .> the sum over the inputs. The methods obey the laws

        tangent(m, v) = d/de F(m + e v),                                        e = 0
        <adjoint(m, l), v> = <l, tangent(m, v)>
        second_adjoint(m, v, l, l_1) = d/de adjoint(m + e v, l + e l_1),        e = 0

    so that the last one is F'(m)^T l_1 + (F''(m) v)^T l. A read-only array that is the very object of the latest `forward` has
    not changed since.

    `SecondOrderOperator` has `tangent` and `second_adjoint`. An operator without them has first derivatives alone,
    and its Block says so if more is asked for. An operator may have a method `release`, which lets go of what `forward` has
    kept.
    """

    @property
    def inputs(self) -> Sequence[Slot]:
        """One slot an input."""

    @property
    def output(self) -> Slot | None | tuple[Slot | None, ...]:
        """The slot of the output, or None for a number.

        Where there are several outputs, a tuple of these; values, tangents and functionals are then sequences of as many.
        """

    @property
    def ready(self) -> bool:
        """Whether `adjoint` may be called without a `forward(save=True)` at the same arrays just before it."""

    def forward(self, arrays: Sequence[np.ndarray], /, save: bool) -> Any:
        """The value; `save` says that an adjoint may follow."""

    def adjoint(self, arrays: Sequence[np.ndarray], functional: Any, /) -> Sequence[np.ndarray | Callable[[], np.ndarray]]:
        """The functionals in the inputs, one an input, in new arrays, from the functional in the output.

        In the place of an array there may be a function without arguments that makes it, as the tape may not need it. The
        Block calls this function before the next adjoint, or not at all. The same holds for `second_adjoint`.
        """


class SecondOrderOperator(Operator, Protocol):
    """An operator that has a tangent and second derivatives.

    It may have a method `gauss_newton` too, with the arguments of `second_adjoint`. In this method an operator whose output is
    a convex function of an inner map leaves out the curvature of the inner map.
    """

    def tangent(self, arrays: Sequence[np.ndarray], directions: Sequence[np.ndarray], /) -> Any:
        """Derivative of `forward` in these directions, in a new array.

        The arrays are the arguments of the latest `forward`. What `forward` has kept for an adjoint must survive, or `ready`
        become False. What `adjoint` has kept must survive.
        """

    def second_adjoint(
        self, arrays: Sequence[np.ndarray], directions: Sequence[np.ndarray], functional: Any, functional_dot: Any, /
    ) -> Sequence[np.ndarray | Callable[[], np.ndarray]]:
        """Derivative of `adjoint` along the directions and along `functional_dot`, one functional an input, in new arrays.

        A `tangent` in these directions came before, but others may have come in between. An operator that uses what a tangent
        has kept must check that it belongs to these directions, and compute it again if not. What `forward` and `adjoint` have
        kept must survive as in `tangent`.
        """


def made(functional: np.ndarray | Callable[[], np.ndarray]) -> np.ndarray:
    """A functional that `Operator.adjoint` returned, as an array."""
    return functional() if callable(functional) else functional


def parts(operator: Operator, value: Any) -> Sequence:
    """The values of an operator's outputs, one by one."""
    return value if isinstance(operator.output, tuple) else (value,)
