"""Checkpoints of a training: files from which it goes on with the same numbers, on the same ranks.

A training with checkpoints begins anew at each of them: its functional is recorded again, and a method that remembers earlier
steps without giving them away, such as L-BFGS, forgets them. It does so in a run that nothing interrupts too. So what follows
a checkpoint depends on the file alone, and is the same in the run that wrote the file and in one that reads it.

A file has one line of JSON, blanks up to a multiple of eight bytes, all arrays as float64, and a seal (`fem_resnet.files`).
Each rank writes and reads its own part of values at nodes. They are in the order of the ranks, so the line has a checksum of
the nodes' places on each rank. Whoever wrote a file, it runs no code, and takes no more memory than the problem says.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from fem_resnet.arguments import instance, integer
from fem_resnet.files import put_in_place, seal, sealed
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.log import log
from fem_resnet.parameters.space_basis import Replicated, SpaceBasis
from fem_resnet.ranks import in_step, on_first, same, together

__all__ = ["Numbers", "State", "TrainingCheckpoint", "checked_checkpoint", "read_state", "write_state"]

#: Numbers by name, each with a function of name and value that refuses wrong ones.
Numbers = Mapping[str, Callable[[str, Any], object]]

_FORMAT = 1
#: The longest line of JSON that is read.
_LONGEST = 1 << 22


@dataclass(frozen=True)
class TrainingCheckpoint:
    """Where a training writes checkpoints, and how often.

    Parameters
    ----------
    path
        The name of the file. Each checkpoint takes the place of the one before it, at the very end, so that there is a
        complete file at any time.
    every
        Iterations, or epochs, from one checkpoint to the next: an integer >= 1.

    Raises
    ------
    TypeError, ValueError
        If an argument is of another kind.

    Examples
    --------
    >>> TrainingCheckpoint("training.checkpoint", every=20)
    TrainingCheckpoint(path='training.checkpoint', every=20)
    """

    path: str | Path
    every: int = 10

    def __post_init__(self) -> None:
        instance("path", self.path, (str, os.PathLike), "give the name of a file")
        integer("every", self.every)


@dataclass(frozen=True)
class State:
    """What a training goes on from.

    Attributes
    ----------
    numbers : Mapping
        Numbers by name, the same on all ranks.
    series : Mapping
        Arrays of one axis by name, of any length, the same on all ranks.
    coefficients : Mapping
        Lists by name, each with one array for each Function of all parameters, of the shape of its space basis.
    """

    numbers: Mapping[str, Any]
    series: Mapping[str, np.ndarray]
    coefficients: Mapping[str, Sequence[np.ndarray]]


def checked_checkpoint(comm: MPI.Comm, checkpoint: object, resume: object) -> tuple[TrainingCheckpoint | None, Path | None]:
    """The arguments `checkpoint` and `resume` of a training. Collective.

    A training that goes on writes checkpoints as often as before, to the same file if no other is given.

    Raises
    ------
    TypeError, ValueError, OSError
        If they are of another kind, or differ between ranks; if there is no file to go on from, or no folder to write to; or
        if `every` is not that of the file.
    """
    same(comm, checkpoint=checkpoint, resume=resume)
    given = instance("checkpoint", checkpoint, (TrainingCheckpoint, type(None)), "TrainingCheckpoint(path, every=10)")
    path = None if resume is None else Path(instance("resume", resume, (str, os.PathLike), "give the name of a file"))
    if given is not None and not on_first(comm, Path(given.path).parent.is_dir):
        raise FileNotFoundError(f"checkpoint: the folder {Path(given.path).parent} does not exist")
    if path is None:
        return given, None
    if not on_first(comm, path.is_file):
        raise FileNotFoundError(f"resume: there is no file {path}")
    every = on_first(comm, lambda: _naming(path, lambda: integer("every", _line(path)[0].get("every"))))
    if given is not None and given.every != every:
        raise ValueError(
            f"checkpoint: expected every={every}, as of the training that {path} goes on with, got every={given.every}"
        )
    return given or TrainingCheckpoint(path, every), path


def write_state(problem: LearningProblem, tool: str, checkpoint: TrainingCheckpoint, state: State) -> None:
    """Write a checkpoint, in the place of the one before it. Collective.

    Parameters
    ----------
    problem
        The learning problem.
    tool
        The name of the algorithm, which a message gives where another one reads the file.
    checkpoint, state
        Where, and what.

    Raises
    ------
    OSError
        If the file cannot be written; on all ranks alike. The old one then stays as it was.
    """
    comm, path = problem.net.Y.comm, Path(checkpoint.path)
    everyone = comm if problem.ensemble is None else problem.ensemble.global_comm
    if problem.ensemble is None or problem.ensemble.ensemble_comm.rank == 0:  # all members hold the same
        in_step(everyone, lambda: _write(problem, comm, path, tool, checkpoint.every, state))
    else:
        in_step(everyone, lambda: None)


def _write(problem: LearningProblem, comm: MPI.Comm, path: Path, tool: str, every: int, state: State) -> None:
    lengths = {name: len(series) for name, series in state.series.items()}
    layout = _Layout(problem, lengths, list(state.coefficients))
    line = {
        "fem_resnet checkpoint": _FORMAT, "tool": tool, "every": every, "numbers": dict(state.numbers),
        "series": lengths,
        "coefficients": list(state.coefficients), "sizes": layout.sizes, "nodes": layout.nodes,
    }  # fmt: skip
    head = json.dumps(line).encode() + b"\n"
    head += b" " * (-len(head) % 8)
    arrays = [*state.series.values(), *(array for arrays in state.coefficients.values() for array in arrays)]
    part = path.with_name(path.name + ".part")
    try:
        on_first(comm, lambda: part.write_bytes(head))
        file = in_step(comm, lambda: MPI.File.Open(comm, str(part), MPI.MODE_WRONLY))  # type: ignore[arg-type]

        def write() -> None:
            for place, parted, array in zip(layout.places, layout.parted, arrays):
                if parted or comm.rank == 0:
                    file.Write_at(len(head) + 8 * place, np.ascontiguousarray(array, float))

        try:
            together(comm, write)
        finally:
            file.Close()
        seal(comm, part)
        put_in_place(comm, part, path)
    except BaseException as error:
        if comm.rank == 0:
            with suppress(OSError):
                part.unlink()
        if isinstance(error, (OSError, MPI.Exception)):
            raise OSError(f"checkpoint: {path} was not written, and stays as it was: {error}") from error
        raise


def read_state(
    problem: LearningProblem, tool: str, path: Path, numbers: Numbers, series: Sequence[str], groups: Sequence[str]
) -> State:
    """Read what `write_state` wrote. Collective.

    Parameters
    ----------
    problem
        A problem whose parameters are of the same kinds and sizes; with values at nodes, on the same ranks.
    tool
        The name of the algorithm.
    path
        An existing file.
    numbers
        The names of the numbers, each with a function of name and value that refuses wrong ones.
    series, groups
        The names of the series, and of the coefficients.

    Raises
    ------
    ValueError
        If it is no checkpoint of this algorithm, or was damaged, or is one of another problem; or if it has values at nodes of
        another partition.
    """
    comm = problem.net.Y.comm

    def read() -> State:
        length = sealed(comm, path)
        line, start = on_first(comm, lambda: _line(path))
        _check_line(line, tool, numbers, series, groups)
        layout = _Layout(problem, line["series"], groups)
        if line["sizes"] != layout.sizes:
            raise ValueError(f"it is of a problem with coefficients of other sizes, {line['sizes']} and not {layout.sizes}")
        if line["nodes"] != layout.nodes:
            if any(layout.parted):
                raise ValueError(
                    "values at nodes belong to the mesh and its partition that wrote it; take as many ranks, make meshes in "
                    'the same order, or this one with distribution_parameters={"partitioner_type": "simple"}'
                )
            log(
                comm, logging.WARNING, "%s: %s was written on another partition of the mesh, so that what follows is the same "
                "up to round-off alone", tool, path,
            )  # fmt: skip
        found = together(comm, lambda: layout.read(path, start, length))
        state = State(line["numbers"], dict(zip(series, found)), layout.by_group(found[len(series) :]))
        problem.net.Y.agree(
            all(np.isfinite(array).all() for arrays in state.coefficients.values() for array in arrays),
            "expected finite coefficients, got some that are not",
        )
        return state

    return _naming(path, read)


def _naming(path: Path, run):
    """The result of a function; what is wrong with a file as a ValueError with the name of the file."""
    try:
        return run()
    except (ValueError, TypeError) as error:
        raise ValueError(f"resume: {path} is no checkpoint to go on from: {error}") from error


def _line(path: Path) -> tuple[dict[str, Any], int]:
    """The line at the start of a file, and the place after it and its blanks; on one rank."""
    with open(path, "rb") as file:
        head, line = file.readline(_LONGEST), None
    if head.endswith(b"\n"):
        with suppress(json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            line = json.loads(head)
    if not isinstance(line, dict) or line.get("fem_resnet checkpoint") != _FORMAT:
        raise ValueError(f"it does not begin with the line of a checkpoint of format {_FORMAT}")
    return line, -(-len(head) // 8) * 8


def _check_line(line: Mapping[str, Any], tool: str, numbers: Numbers, series: Sequence[str], groups: Sequence[str]) -> None:
    if line.get("tool") != tool:
        raise ValueError(f"expected one that {tool} wrote, got one of {str(line.get('tool'))[:40]}")
    given = instance("numbers", line.get("numbers"), dict)
    if set(given) != set(numbers):
        raise ValueError(f"numbers: expected {', '.join(numbers)}, got others")
    for name, check in numbers.items():
        check(name, given[name])
    if line.get("coefficients") != list(groups):
        raise ValueError(f"coefficients: expected {', '.join(groups)}, got others")
    lengths = instance("series", line.get("series"), dict)
    if list(lengths) != list(series):
        raise ValueError(f"series: expected {', '.join(series)}, got others")
    for length in lengths.values():
        integer("series", length, least=0)


class _Layout:
    """Where the arrays of a file are, in numbers of eight bytes after its line. Collective.

    Attributes
    ----------
    parted : list of bool
        Whether each rank has a part of an array.
    sizes : list of int
        How many numbers each array of one group of coefficients has, on all ranks together.
    places : list of int
        Where this rank's part of each array begins.
    nodes : list of str
        A checksum of the places of the nodes on each rank.
    """

    def __init__(self, problem: LearningProblem, series: Mapping[str, int], groups: Sequence[str]):
        Y = problem.net.Y
        bases: list[SpaceBasis] = [basis for p in problem.parameters for basis in p.space_bases]
        self._count = len(bases)
        self._shapes: list[tuple[int, ...]] = [(length,) for length in series.values()]
        self._shapes += [basis.shape for basis in bases] * len(groups)
        self._groups = groups
        self.parted = [False] * len(series) + [not isinstance(basis, Replicated) for basis in bases] * len(groups)
        mine = np.array([np.prod(shape, dtype=int) for shape in self._shapes], dtype=np.int64)
        before, total = np.zeros_like(mine), np.zeros_like(mine)
        Y.comm.Exscan(mine, before)
        Y.comm.Allreduce(mine, total)
        if Y.comm.rank == 0:
            before[...] = 0
        total = np.where(self.parted, total, mine)
        starts = np.cumsum(total) - total
        self.sizes = [int(size) for size in total[len(series) : len(series) + self._count]]
        self._end = int(total.sum())
        self.places = [int(place) for place in starts + np.where(self.parted, before, 0)]
        places = np.ascontiguousarray(Y.coordinates, float).tobytes()
        self.nodes: list[str] = Y.comm.allgather(hashlib.blake2b(places, digest_size=16).hexdigest())

    def read(self, path: Path, start: int, end: int) -> list[np.ndarray]:
        """All arrays, of this rank, from a file that has them from `start` to `end`."""
        found = []
        if end - start != 8 * self._end:  # before anything is allocated
            raise ValueError(f"expected {8 * self._end} bytes of numbers, got {end - start}")
        with open(path, "rb") as file:
            for place, shape in zip(self.places, self._shapes):
                file.seek(start + 8 * place)
                found.append(np.fromfile(file, float, int(np.prod(shape, dtype=int))).reshape(shape))
        return found

    def by_group(self, arrays: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
        """The coefficients by the name of their group."""
        return {name: list(arrays[k * self._count : (k + 1) * self._count]) for k, name in enumerate(self._groups)}
