"""Which heads can be eliminated, and by which operator."""

from __future__ import annotations

from collections.abc import Sequence

from fem_resnet.learning.convex_head import ConvexHeadSolve
from fem_resnet.learning.elimination import HeadSolve, Reading, SolvedHead, check_least_squares, ridge_of_head
from fem_resnet.learning.head import Head
from fem_resnet.learning.loss import Loss, binary_cross_entropy, cross_entropy
from fem_resnet.learning.regulariser import Regulariser
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.time_basis import Once
from fem_resnet.tape.recording import apply

__all__ = ["check_eliminable", "solve_head"]

#: Losses that are convex in the output.
_CONVEX = (cross_entropy, binary_cross_entropy)


def check_eliminable(head: Head | None, loss: Loss) -> None:
    """Raise unless W and mu of least J can be computed.

    Raises
    ------
    ValueError
        If there is no head, or the loss is no half square of its outputs and no cross entropy.
    """
    if head is None or loss not in _CONVEX:
        check_least_squares("eliminate", head, loss, "leave eliminate out, or take a cross entropy")


def solve_head(
    head: Head,
    loss: Loss,
    readings: Sequence[Reading],
    weights: Sequence[float] | None,
    regulariser: Regulariser | None,
) -> SolvedHead:
    """Solve for W and mu, and read the outputs with them; recorded while annotating. Collective.

    Parameters
    ----------
    head
        The head, whose own W and mu are neither read nor changed.
    loss
        The loss of the outputs.
    readings
        What it reads, and its targets.
    weights
        omega, shape (samples,), of each reading; equal ones if None.
    regulariser
        It must be a multiple of Tikhonov's where it acts on W and mu.

    Raises
    ------
    ValueError
        If the regulariser is another function of W or mu; if it leaves W out under a cross entropy, which then may have no
        minimum.
    """
    ridges = None if regulariser is None else [ridge_of_head(regulariser, parameter) for parameter in head.parameters]
    if loss not in _CONVEX:
        operator = HeadSolve(head, readings, weights, ridges)
    elif ridges is None or not ridges[0] > 0:
        raise ValueError(
            f"eliminate: expected a regulariser of W under {loss.name}, which falls for ever where classes can be told "
            f"apart, got none; add tikhonov(..), or leave eliminate out"
        )
    else:
        operator = ConvexHeadSolve(head, readings, weights, ridges, loss)
    given = apply(operator, [reading.state for reading in readings])[0]
    assert isinstance(given, list), "there are several outputs"
    outputs, solved = given[: len(readings)], given[len(readings) :]
    parameters = {own: Parameter(own.name, own.space_basis, Once(), [each]) for own, each in zip(head.parameters, solved)}
    return SolvedHead(outputs, parameters, operator)
