"""Messages of the package: the standard logger "fem_resnet", on rank 0 of a communicator only."""

from __future__ import annotations

import logging

from mpi4py import MPI

__all__ = ["log", "silent", "speaks"]

_logger = logging.getLogger("fem_resnet")


def log(comm: MPI.Comm, level: int, message: str, *arguments) -> None:
    """Log ``message % arguments`` on rank 0 of `comm`, at a level of `logging`."""
    if comm.rank == 0:
        _logger.log(level, message, *arguments)


def speaks(level: int) -> bool:
    """Whether a message of this level reaches a handler that the user has set up."""
    return _logger.isEnabledFor(level) and _logger.hasHandlers()


def silent(level: int) -> bool:
    """Whether the user has set this logger, by its name, to a level above this one."""
    return _logger.level > level
