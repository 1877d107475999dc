"""Ctrl-C ends a training after the iteration, on all ranks, with what was reached; a second Ctrl-C ends it at once.

So does SIGTERM, by which a cluster announces the end of a job, unless the user's program handles it. Either way a training
with checkpoints writes one.

A signal reaches one rank, or all of them. So a handler only notes it, and the ranks agree in each iteration whether any of
them has had one.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from mpi4py import MPI

from fem_resnet.ranks import leave_together

__all__ = ["SIGNALLED", "Signals"]

#: The signals that end a training in good order, and the reason that its result then names.
_REASONS = {signal.SIGINT: "INTERRUPTED", signal.SIGTERM: "TERMINATED"}
SIGNALLED = frozenset(_REASONS.values())
#: Seconds that an interrupted rank waits for the others, before it ends them.
_PATIENCE = 5.0


class Signals:
    """The handlers of these signals, for the time of a training; a context manager. Collective.

    A training inside of another one shares the handlers and what they have noted: where one is interrupted, both are. In a
    thread that is not the main one Python gives no signals, and nothing is handled.

    Parameters
    ----------
    comm
        The communicator of the ranks that agree.

    Examples
    --------
    >>> import os
    >>> from mpi4py import MPI
    >>> with Signals(MPI.COMM_SELF) as signals:
    ...     os.kill(os.getpid(), signal.SIGINT)
    ...     signals.reason()
    'INTERRUPTED'
    """

    def __init__(self, comm: MPI.Comm):
        self._comm = comm
        #: The number of the signal that this rank has had, and of the one that all know of; 0 for none.
        self._noted, self._agreed = 0, 0
        self._before: dict[signal.Signals, object] = {}
        #: The context around this one, which has the handlers.
        self._outer: Signals | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in _REASONS:
            handler = signal.getsignal(number)
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, Signals):
                self._outer = outer
            elif (
                handler == signal.SIG_DFL or number == signal.SIGINT and handler is not None
            ):  # None: in C, and cannot be put back
                self._before[number] = handler
                signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what getsignal has returned
        self._before = {}
        if kind is KeyboardInterrupt:
            leave_together(self._comm, "interrupted", _PATIENCE)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted:
            raise KeyboardInterrupt
        self._noted = number
        # A handler may run in the midst of a write to sys.stderr, which must not be entered twice.
        os.write(2, b"\nfem_resnet: stops after this iteration; once more, and it stops at once\n")

    def reason(self) -> str | None:
        """The reason to stop, if any rank has had a signal. Collective."""
        holder = self._outer or self
        if self._comm.size == holder._comm.size:  # else these are some of the ranks, such as a member, and decide nothing
            holder._agreed = self._comm.allreduce(holder._noted, op=MPI.MAX) if self._comm.size > 1 else holder._noted
        return _REASONS[signal.Signals(holder._agreed)] if holder._agreed else None
