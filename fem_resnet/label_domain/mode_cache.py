"""Eigenfunctions kept in files, one of each rank, by a key made of all that they depend on.

A file is sealed by a checksum. One that is damaged, or holds something else, is made anew; where none can be written, the
eigenfunctions are used all the same and a warning says so.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mpi4py import MPI

from fem_resnet.files import aside, seal, unsealed
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.modes import Modes
from fem_resnet.log import log
from fem_resnet.ranks import together

__all__ = ["cache_key", "cached"]

#: Raised when files hold other things, or rotations are fixed by another rule.
_VERSION = 3


def cache_key(Y: LabelSpace, rank: int, parameters: dict | None) -> str:
    """A hash of all that the eigenfunctions, and how the ranks hold them, depend on. Collective.

    Parameters
    ----------
    Y
        The label domain: its mesh's nodes and cells on all ranks, and the space.
    rank
        How many eigenfunctions.
    parameters
        Options of the eigensolver as a user gives them, or None.
    """
    mine = hashlib.sha256(repr((_VERSION, Y.V.ufl_element(), rank, sorted((parameters or {}).items()))).encode())
    graph = Y.graph
    hangs = [Y.V.cell_node_map().values_with_halo] if graph is None else [graph.data, graph.indices, graph.indptr, Y.numbers]
    for array in (Y.coordinates, Y.weights, *hangs):
        mine.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return hashlib.sha256("".join(Y.comm.allgather(mine.hexdigest())).encode()).hexdigest()


def cached(directory: Path, key: str, Y: LabelSpace, find: Callable[[], Modes]) -> Modes:
    """Eigenfunctions from the files of an earlier call; else those that `find` finds, kept for later calls. Collective.

    Parameters
    ----------
    directory
        Where the files are; it is made if need be.
    key
        What `cache_key` gives.
    Y
        The label domain.
    find
        Called on all ranks where a file is missing or damaged on one of them.
    """
    name = f"{key}-{Y.comm.rank}"
    file = directory / f"{name}.npz"

    def read() -> Modes | None:
        try:
            return _read(file, name, Y)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            logging.getLogger("fem_resnet").warning("cache: %s is made anew: %s", file, error)
            return None

    modes = together(Y.comm, read)
    if Y.comm.allreduce(modes is not None, op=MPI.LAND):
        return modes
    modes = find()

    def write() -> str | None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with aside(file, f"-{os.urandom(4).hex()}.part") as part:  # other processes may write it too
                with open(part, "wb") as opened:
                    np.savez(opened, name=name, **modes._asdict())
                seal(None, part)
        except OSError as error:
            return str(error)
        return None

    failures = [failure for failure in Y.comm.allgather(together(Y.comm, write)) if failure]
    if failures:  # the eigenfunctions are good all the same
        log(Y.comm, logging.WARNING, "cache: eigenfunctions are not kept: %s", failures[0])
    return modes


def _read(file: Path, name: str, Y: LabelSpace) -> Modes:
    """The eigenfunctions in a file of the cache; an error if the file holds something else."""
    with np.load(io.BytesIO(unsealed(file))) as arrays:
        if set(arrays.files) != {"name", *Modes._fields} or arrays["name"] != name:
            raise ValueError("it holds something else")
        modes = Modes(**{field: arrays[field] for field in Modes._fields})
    count = len(modes.eigenvalues)
    if modes.values.shape != (Y.nodes, count) or modes.stiffness.shape != (count, count):
        raise ValueError("it holds arrays of other shapes")
    return modes
