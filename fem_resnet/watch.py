"""Collective calls watched: before each of them the ranks tell each other what they are about to call, and from which line.

`fem_resnet.ranks.watched` says how this mode for debugging is switched on, and what it does.
"""

from __future__ import annotations

import faulthandler
import hashlib
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from mpi4py import MPI

__all__ = ["Watched"]

#: What `MPI.Intracomm` has of collective calls, with lower-case relatives.
COLLECTIVE = (
    "Allgather", "Allgatherv", "Allreduce", "Alltoall", "Alltoallv", "Barrier", "Bcast", "Dup", "Exscan", "Gather", "Gatherv",
    "Ibarrier", "Reduce", "Scan", "Scatter", "Scatterv", "Split", "Split_type",
    "allgather", "allreduce", "alltoall", "barrier", "bcast", "exscan", "gather", "reduce", "scan", "scatter",
)  # fmt: skip

#: Modules whose calls count as those of the line that has called them.
_BETWEEN = {__file__, str(Path(__file__).with_name("ranks.py"))}
_TWIN = MPI.Comm.Create_keyval(delete_fn=lambda comm, key, twin: twin.Free())


class Watched(MPI.Intracomm):
    """A communicator, whose ranks tell each other what they call before they call it. Made by all ranks alike.

    Attributes
    ----------
    patience : float
        Seconds that a rank waits for the others.
    """

    __module__ = MPI.__name__  # petsc4py takes no communicators of other modules
    patience: float

    def __new__(cls, comm: MPI.Intracomm, patience: float) -> Watched:
        self = super().__new__(cls, comm)
        self.patience = patience
        if comm.Get_attr(_TWIN) is None:
            comm.Set_attr(_TWIN, MPI.Intracomm(comm).Dup())
            # MPI ends the ranks that did not come by this signal: then their stacks show where they are.
            faulthandler.register(signal.SIGTERM, chain=True)
        return self


def _telling(name: str) -> Any:
    call = getattr(MPI.Intracomm, name)

    def method(self: Watched, *arguments: Any, **named: Any) -> Any:
        _check(self, name)
        return call(self, *arguments, **named)

    return method


for _name in COLLECTIVE:
    setattr(Watched, _name, _telling(_name))


def _check(comm: Watched, name: str) -> None:
    """Raise unless all ranks are about to make the same call from the same line. Collective."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename in _BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    assert frame is not None
    mine = f"{name} in {frame.f_code.co_filename}, line {frame.f_lineno}"
    twin: Any = comm.Get_attr(_TWIN)
    digest = np.frombuffer(hashlib.blake2b(mine.encode(), digest_size=8).digest(), np.uint64)
    digests = np.empty(comm.size, np.uint64)
    told, since = twin.Iallgather(digest, digests), time.monotonic()
    while not told.Test():
        if time.monotonic() - since > comm.patience:
            stack = "".join(traceback.format_stack(sys._getframe(1)))
            sys.stderr.write(f"rank {comm.rank} has waited {comm.patience:g} s for others to call {mine}\n{stack}")
            sys.stderr.flush()
            time.sleep(1.0)  # the others that wait write theirs
            twin.Abort(1)
        time.sleep(2e-5)
    if (digests != digest).any():
        lines = "\n".join(f"rank {rank}: {line}" for rank, line in enumerate(twin.allgather(mine)))
        raise RuntimeError(f"ranks: expected the same collective call from the same line, got\n{lines}")
