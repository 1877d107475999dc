"""Reports of algorithms on their way, to a user's monitor, or to the terminal or the log."""

from __future__ import annotations

import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpi4py import MPI
from petsc4py import PETSc
from tqdm import tqdm

from fem_resnet.arguments import flag, function
from fem_resnet.log import log, silent, speaks
from fem_resnet.ranks import together
from fem_resnet.training.signals import Signals

__all__ = ["Progress", "Report", "Watch", "check_monitor"]

#: Seconds between two lines on a standard error that is no terminal.
_PAUSE = 10.0


class Report(ABC):
    """What an algorithm says of itself after each iteration."""

    seconds: float

    @property
    @abstractmethod
    def counted(self) -> tuple[str, int, int]:
        """What is counted, such as "iteration"; its number, from 0 at the start; and the largest number that is allowed."""

    @property
    @abstractmethod
    def numbers(self) -> str:
        """The numbers that were reached."""

    def __str__(self) -> str:
        what, number, most = self.counted
        left = self.seconds / max(number, 1) * (most - number)
        return f"{what} {number:4d} of {most}   {self.numbers}   {left:4.0f} s left"


@dataclass(frozen=True)
class Progress(Report):
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

    @property
    def counted(self) -> tuple[str, int, int]:
        return "iteration", self.iteration, self.iterations

    @property
    def numbers(self) -> str:
        return f"J = {self.value:.8e}   |gradient| = {self.gradient_norm:.2e}"


def check_monitor(monitor: object, quiet: object) -> None:
    """Raise TypeError unless these are a function or None, and True or False."""
    if monitor is not None:
        function("monitor", monitor, "a function of an iteration's progress, or None,")
    flag("quiet", quiet)


class Watch:
    """What watches an algorithm on its way, and may end it: the user's monitor and Ctrl-C; a context manager. Collective.

    While it goes on PETSc logs into a stage of its own, which `-log_view` shows. Without a monitor rank 0 shows each
    iteration: to the logger if it takes messages of level INFO, else as a bar on a terminal, else now and then as a line on
    standard error.

    Parameters
    ----------
    comm
        The communicator of all ranks that take part.
    monitor
        The user's function, or None.
    quiet
        Whether nothing is shown.
    """

    def __init__(self, comm: MPI.Comm, monitor: Callable[[Any], bool | None] | None, quiet: bool):
        self._comm, self._monitor, self._signals = comm, monitor, Signals(comm)
        self._stage = PETSc.Log.Stage("fem_resnet training")
        self._shown = None if monitor is not None or quiet or comm.rank else _Shown(comm)

    def __enter__(self) -> Watch:
        self._signals.__enter__()
        self._stage.push()
        return self

    def __exit__(self, *error) -> None:
        self._stage.pop()
        if self._shown is not None:
            self._shown.end()
        self._signals.__exit__(*error)

    def reason(self, report: Report) -> str | None:
        """The reason to stop, if there is one. Collective.

        "STOPPED" where the monitor says so on any rank, "INTERRUPTED" after Ctrl-C, "TERMINATED" after SIGTERM.
        An error that the monitor raises on one rank is raised on all.
        """
        monitor = self._monitor
        if monitor is not None:
            if self._comm.allreduce(together(self._comm, lambda: bool(monitor(report))), op=MPI.LOR):
                return "STOPPED"
        elif self._shown is not None:
            self._shown(report)
        return self._signals.reason()


class _Shown:
    """Iterations on rank 0, where a user sees them without any set-up."""

    def __init__(self, comm: MPI.Comm):
        self._comm = comm
        self._bar: tqdm | None = None
        self._latest: Report | None = None
        self._said = -_PAUSE

    def __call__(self, report: Report) -> None:
        if speaks(logging.INFO):
            log(self._comm, logging.INFO, "%s", report)
        elif silent(logging.INFO):
            pass
        elif self._bar is not None or _is_terminal():
            self._advance(report)
        else:
            self._latest = report
            if time.monotonic() - self._said >= _PAUSE:
                self._say()

    def _advance(self, report: Report) -> None:
        what, number, most = report.counted
        if self._bar is None:
            self._bar = tqdm(total=most, initial=number, unit=f" {what}s", file=sys.stderr, dynamic_ncols=True)
        self._bar.set_postfix_str(" ".join(report.numbers.split()), refresh=False)
        self._bar.update(number - self._bar.n)

    def _say(self) -> None:
        """Write the latest iteration, once."""
        if self._latest is not None:
            sys.stderr.write(f"{self._latest}\n")
            sys.stderr.flush()
            self._latest, self._said = None, time.monotonic()

    def end(self) -> None:
        """Leave the last iteration where it can be read."""
        self._say()
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()


def _is_terminal() -> bool:
    """Whether a line that is written again and again looks right: on a terminal, and in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in type(sys.stderr).__module__
