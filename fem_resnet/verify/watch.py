"""A time limit for each check: if one rank leaves out a sum over the ranks, the others wait in it for ever.

A rank that waits may hold Python's lock, or be inside of C code. So `faulthandler`, which needs no lock, writes the stacks. A
thread says which check it was and ends all ranks. If that thread cannot run on any rank, an alarm of the operating system
ends them.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import threading
import time

from mpi4py import MPI

__all__ = ["Watch"]

_STANDARD_ERROR = 2
#: Seconds after the limit at which the thread ends all ranks, and at which the alarm does.
_GRACE, _LAST = 2.0, 6.0


class Watch:
    """Ends all ranks with a message if one check takes longer than a limit. A context manager.

    Parameters
    ----------
    comm
        The ranks.
    limit
        Seconds; infinite for no watch.
    """

    def __init__(self, comm: MPI.Comm, limit: float):
        self._comm, self._limit = comm, limit
        self._what, self._since = "", 0.0
        self._over = threading.Event()
        #: The seconds that are left of an alarm that was set before, and when this was read.
        self._alarm = signal.getitimer(signal.ITIMER_REAL)[0], time.monotonic()

    def __enter__(self) -> Watch:
        if math.isfinite(self._limit):
            self.begin("making the problem")
            threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        if not math.isfinite(self._limit):
            return
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        before, since = self._alarm
        signal.setitimer(signal.ITIMER_REAL, max(before + since - time.monotonic(), 1.0) if before else 0.0)

    def begin(self, what: str) -> None:
        """Say which check begins; from now on it may take as long as the limit."""
        if math.isfinite(self._limit):
            self._what, self._since = what, time.monotonic()
            faulthandler.dump_traceback_later(self._limit, file=_STANDARD_ERROR)
            signal.setitimer(signal.ITIMER_REAL, self._limit + _LAST)

    def _look(self) -> None:
        while not self._over.wait(min(0.5, self._limit / 4)):
            if time.monotonic() - self._since > self._limit:
                text = (
                    f"fem_resnet.verify: rank {self._comm.rank} of {self._comm.size} has waited for {self._limit:g} s in: "
                    f"{self._what}. Perhaps one rank leaves out a collective call: the stacks show where each rank is\n"
                )
                os.write(_STANDARD_ERROR, text.encode())
                time.sleep(_GRACE)
                self._comm.Abort(3)
