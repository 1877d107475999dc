"""Firedrake's CheckpointFile, opened and closed by all ranks together."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import firedrake as fd
from mpi4py import MPI
from petsc4py import PETSc

from fem_resnet.arguments import instance
from fem_resnet.files import let_go
from fem_resnet.options import last_words
from fem_resnet.ranks import in_step

__all__ = ["file_path", "opened", "words_of"]


def file_path(path: str | Path) -> Path:
    """The name of a file, as users give it."""
    return Path(instance("path", path, (str, os.PathLike), "give the name of a file"))


@contextmanager
def opened(path: Path, mode: str, comm: MPI.Comm) -> Iterator[fd.CheckpointFile]:
    """Open a file, and close it at the end on all ranks, whatever happens. Collective over `comm`.

    Errors inside of the ``with`` block are raised on all ranks (`ranks.in_step`).
    """
    file = in_step(comm, lambda: fd.CheckpointFile(str(path), mode, comm=comm))
    try:
        yield file
        in_step(comm, file.close)
    except BaseException as error:
        # An HDF5 file does not close while an h5py object in it is alive, such as one in the frames of an error.
        traceback.clear_frames(error.__traceback__)
        if mode == "w":
            let_go(path)
        with suppress(Exception):
            in_step(comm, file.close)
        raise


def words_of(error: BaseException) -> str:
    """What an error says; of PETSc's errors only the line that says what is wrong."""
    return last_words(error) if isinstance(error, PETSc.Error) else str(error)
