"""Reports of algorithms on their way, to a user's monitor or to the log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mpi4py import MPI

from fem_resnet.arguments import function
from fem_resnet.log import log
from fem_resnet.ranks import together

__all__ = ["Progress", "check_monitor", "tell"]

_P = TypeVar("_P")


@dataclass(frozen=True)
class Progress:
    """One iteration of an algorithm.

    Attributes
    ----------
    iteration, iterations : int
        Its number, from 0 at the start, and the largest number that is allowed.
    value : float
        J.
    gradient_norm : float
        The norm of J's gradient in the label measure.
    seconds : float
        Wall time since the start.
    """

    iteration: int
    iterations: int
    value: float
    gradient_norm: float
    seconds: float

    def __str__(self) -> str:
        left = self.seconds / max(self.iteration, 1) * (self.iterations - self.iteration)
        return (
            f"iteration {self.iteration:4d} of {self.iterations}   J = {self.value:.8e}   "
            f"|gradient| = {self.gradient_norm:.2e}   {left:4.0f} s left"
        )


def check_monitor(monitor: object) -> None:
    """Raise TypeError unless this is a function or None."""
    if monitor is not None:
        function("monitor", monitor, "a function of an iteration's progress, or None,")


def tell(comm: MPI.Comm, progress: _P, monitor: Callable[[_P], bool | None] | None) -> bool:
    """Whether the user's monitor stops the algorithm, on any rank; without a monitor the iteration is logged. Collective.

    An error that the monitor raises on one rank, also by Ctrl-C, is raised on all.
    """
    if monitor is not None:
        return comm.allreduce(together(comm, lambda: bool(monitor(progress))), op=MPI.LOR)
    log(comm, logging.INFO, "%s", progress)
    return False
