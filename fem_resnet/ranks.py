"""Decisions of all ranks: errors that all raise, work that rank 0 does alone, arguments that must be the same on all.

If one rank alone raised an error, the others would wait for it in their next collective call for ever. So whatever can fail
on one rank (a file, a plot, a cache, a compiler, a user's function, an environment variable) runs in `together` or
`on_first`. Arguments that must be the same on all ranks are compared by `same`. After that, a check of these
arguments needs no communicator: all ranks come to the same result. Code that communicates all the time and may still fail on
one rank, such as parallel HDF5, runs `in_step`.

A failure outside of the package (a user's own line, an import, Firedrake) can still end one rank alone. Therefore start a
script on several ranks with ``mpiexec -n 4 python -m mpi4py script.py``, which then ends them all.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import scipy.sparse
import sympy

if TYPE_CHECKING:  # an activation, whose arguments are checked too, needs no MPI
    from mpi4py import MPI

__all__ = ["draw_on_first", "in_step", "leave_together", "may_fail_alone", "on_first", "same", "together", "watched"]

_T = TypeVar("_T")
_Comm = TypeVar("_Comm", bound="MPI.Comm")

#: Seconds that a rank with an error waits for the others. Then it assumes that they wait in a call that it has left.
_PATIENCE = 30.0
#: Seconds that a rank waits for the others before a collective call that is watched; 0 where none is.
_WATCH = float(os.environ.get("FEM_RESNET_WATCH") or 0)

if _WATCH:  # it needs MPI, as numbers alone do not
    from fem_resnet.watch import Watched


def watched(comm: _Comm) -> _Comm:
    """The communicator, whose collective calls are watched where ``FEM_RESNET_WATCH`` is set. Collective then.

    ``FEM_RESNET_WATCH=30 mpiexec -n 4 python script.py`` looks for what hangs. Before each collective call of the package the
    ranks tell each other what they are about to call, and from which line. Where these differ, all raise a RuntimeError that
    lists them. Where a rank does not come within 30 seconds, those that wait write their stacks to standard error and end the
    job; the ranks that did not come write theirs when MPI ends them.

    Parameters
    ----------
    comm
        A communicator.

    Returns
    -------
    mpi4py.MPI.Comm
        The same communicator of MPI; without the variable, or with one rank, the same object too.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> watched(MPI.COMM_SELF).allreduce(3)
    3
    """
    if not _WATCH or comm.size == 1 or isinstance(comm, Watched):
        return comm
    return Watched(comm, _WATCH)  # type: ignore[arg-type, return-value]  # to MPI it is the same


def together(comm: MPI.Comm | None, run: Callable[[], _T]) -> _T:
    """Call a function on each rank and return its result; an error on one rank is raised on all. Collective.

    If several ranks raise, the error of the first of them is raised everywhere. `run` may communicate over `comm` only as
    long as no rank can have failed before.

    Parameters
    ----------
    comm
        The communicator; None stands for this rank alone.
    run
        The function. KeyboardInterrupt and SystemExit are passed on too.

    Raises
    ------
    RuntimeError
        In place of an error whose type cannot be sent to other ranks.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> together(MPI.COMM_WORLD, lambda: 2 + 2)
    4
    """
    if comm is None or comm.size == 1:
        return run()
    comm = watched(comm)
    result, error = _caught(run)
    _raise_first(comm, error)
    return result


def may_fail_alone(*functions: Callable) -> bool:
    """Whether one of the functions is a user's. Functions of this package fail on all ranks or on none."""
    return not all(str(getattr(function, "__module__", "")).startswith(f"{__package__}.") for function in functions)


def on_first(comm: MPI.Comm, run: Callable[[], _T]) -> _T:
    """Call a function on rank 0 alone, and return its result, or raise its error, on all ranks. Collective.

    The result is pickled: keep it small.
    """
    result = together(comm, run if comm.rank == 0 else lambda: None)
    return watched(comm).bcast(result) if comm.size > 1 else result


def draw_on_first(comm: MPI.Comm, draw: Callable[[], None]) -> None:
    """Call a function that draws on rank 0 alone; an error there is raised on all ranks. Collective.

    Drawing makes so many objects that the garbage collector would start on rank 0 alone, and free meshes there, which is
    collective. So all ranks collect garbage before and after, and none does meanwhile.

    Parameters
    ----------
    comm
        The communicator.
    draw
        The function.
    """
    if comm.size == 1:
        draw()
        return
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        together(comm, draw if comm.rank == 0 else lambda: None)
    finally:
        gc.collect()
        if enabled:
            gc.enable()


def in_step(comm: MPI.Comm, run: Callable[[], _T]) -> _T:
    """Call a function that communicates, with errors as in `together`. Collective.

    A rank that leaves a collective call of another library by an error cannot wake the ranks that wait in this call. If they
    do not come, it writes the error to standard error and ends all ranks with exit code 1.
    """
    if comm.size == 1:
        return run()
    comm = watched(comm)
    result, error = _caught(run)
    if error is None:
        leave_together(comm)
    else:
        words = (str(error).splitlines() or [""])[-1]  # the last line of PETSc's traceback says what is wrong
        leave_together(comm, f"{type(error).__name__} on rank {comm.rank}, while the others wait for it: {words}", _PATIENCE)
    _raise_first(comm, error)
    return result


def leave_together(comm: MPI.Comm, words: str = "", patience: float = float("inf")) -> None:
    """Wait until all ranks are here. Collective.

    Parameters
    ----------
    comm
        The communicator.
    words
        What a rank that has lost patience writes to standard error, before it ends all ranks with exit code 1.
    patience
        Seconds that this rank waits, for others that may wait for it in a call that it has left.
    """
    everyone, since = comm.Ibarrier(), time.monotonic()
    while not everyone.Test():
        if time.monotonic() - since > patience:
            sys.stderr.write(f"{words}\n")
            sys.stderr.flush()
            comm.Abort(1)
        time.sleep(1e-3)


def _caught(run: Callable[[], _T]) -> tuple[_T | None, BaseException | None]:
    """The result of a function, or its error."""
    try:
        return run(), None
    except BaseException as error:
        return None, error


def _raise_first(comm: MPI.Comm, error: BaseException | None) -> None:
    """Raise the error of the first rank that has one, on all ranks."""
    sender = comm.allreduce(comm.rank if error is not None else comm.size, op=min)
    if sender == comm.size:
        return
    first = comm.bcast(_to_send(error) if comm.rank == sender else None, root=sender)
    if comm.rank == sender and type(first) is type(error):
        raise error
    raise first from error or RuntimeError(f"raised on rank {sender}, whose traceback says where")


def _to_send(error: BaseException) -> BaseException:
    """The error, or where it does not survive pickling a RuntimeError of the same words."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class of errors does when it is pickled
        return RuntimeError(f"{type(error).__name__}: {error}")


def same(comm: MPI.Comm | None, **arguments: Any) -> None:
    """Raise unless all ranks give the same arguments. Collective: one reduction of 16 bytes an argument.

    Numbers, strings, paths, arrays, sequences, mappings, dataclasses and None are compared by a hash of their values and
    types, expressions of SymPy by a hash of their tree, functions by their names. Any other object is compared by its type
    and, if it has one, its `description`.

    Parameters
    ----------
    comm
        The communicator; None stands for this rank alone.
    **arguments
        The arguments, by their names in messages.

    Raises
    ------
    ValueError
        If an argument differs between ranks; on all ranks.
    Exception
        Whatever the `description` of an argument raises on one rank; on all ranks.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> same(MPI.COMM_WORLD, rank=3, weights=np.ones(3))
    """
    if comm is None or comm.size == 1:
        return
    comm = watched(comm)
    errors: list[BaseException] = []
    mine = np.array([_digest_or_failed(value, errors) for value in arguments.values()], dtype=np.uint64)
    # All are equal where the largest of the complements is the complement of the largest.
    largest, smallest = np.split(comm.allreduce(np.concatenate([mine, ~mine]), op=np.maximum), 2)
    if (largest == _FAILED).any():
        _raise_first(comm, errors[0] if errors else None)
    for name, differs in zip(arguments, largest != ~smallest):
        if differs:
            raise ValueError(f"{name}: all ranks must give the same; comm.bcast sends what rank 0 has to the others")


_PLAIN = (bool, int, float, str, type(None))

#: In place of the hash of an argument whose `description` raises an error.
_FAILED = 2**64 - 1


def _digest_or_failed(value: Any, errors: list[BaseException]) -> int:
    try:
        return _digest(value)
    except BaseException as error:
        errors.append(error)
        return _FAILED


def _digest(value: Any) -> int:
    state = hashlib.blake2b(digest_size=8)
    for part in _parts(value):
        state.update(part)
        state.update(b"\0")
    return int.from_bytes(state.digest(), "little")


def _parts(value: Any) -> Iterator[bytes]:
    """The parts of a value as bytes; for equal values they are the same on every rank."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        yield f"{type(value).__name__} {value!r}".encode()
    elif isinstance(value, np.ndarray):
        yield f"array {value.dtype} {value.shape}".encode()
        if value.dtype.hasobject:
            yield from _parts(value.tolist())
        else:
            yield np.ascontiguousarray(value).tobytes()
            if isinstance(value, np.ma.MaskedArray):
                yield np.ma.getmaskarray(value).tobytes()
    elif isinstance(value, sympy.Basic):
        yield sympy.srepr(value).encode()
    elif scipy.sparse.issparse(value):
        entries = value.tocoo()
        yield f"sparse {value.shape}".encode()
        for array in (*entries.coords, entries.data):
            yield from _parts(array)
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for key in sorted(value, key=_digest):  # options mean the same in any order
            yield from _parts(key)
            yield from _parts(value[key])
    elif isinstance(value, Set):
        yield f"set {sorted(map(_digest, value))}".encode()
    elif isinstance(value, Sequence):
        yield f"sequence {len(value)}".encode()
        if all(type(entry) in _PLAIN for entry in value):
            yield repr(tuple(value)).encode()  # a tenth of the time, for labels and weights
        else:
            for entry in value:
                yield from _parts(entry)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value).__qualname__.encode()
        for field in dataclasses.fields(value):
            yield from _parts(getattr(value, field.name))
    else:
        kind = value if callable(value) and hasattr(value, "__qualname__") else type(value)
        yield f"{kind.__module__}.{kind.__qualname__}".encode()
        description = getattr(value, "description", None)
        if description is not None and description is not value and not callable(description):
            yield from _parts(description)
