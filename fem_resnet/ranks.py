"""What ranks decide together: errors that all raise, work that rank 0 does alone, arguments that all must give alike.

An error on one rank alone would leave the others waiting in their next collective call for ever. What can fail on one rank
(a file, a plot, a cache, a compiler, a user's function, an environment variable) runs in `together` or `on_first`; what
every rank must give alike is compared by `same`. After `same` a check of these arguments needs no communicator: all ranks
come to the same result.

A failure outside of the package (a user's own line, an import, Firedrake) can still end one rank alone. Scripts on several
ranks are therefore started with ``mpiexec -n 4 python -m mpi4py script.py``, which then ends them all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import scipy.sparse
import sympy

if TYPE_CHECKING:  # an activation, whose arguments are looked at too, needs no MPI
    from mpi4py import MPI

__all__ = ["may_fail_alone", "on_first", "same", "together"]

_T = TypeVar("_T")


def together(comm: MPI.Comm | None, run: Callable[[], _T]) -> _T:
    """What ``run()`` returns on this rank; what it raises on one rank is raised on all. Collective.

    Where several ranks raise, the error of the first of them is raised everywhere. `run` may communicate over `comm` only
    where no rank can fail before.

    Parameters
    ----------
    comm
        The communicator; None stands for this rank alone.
    run
        Called once on each rank. KeyboardInterrupt and SystemExit are passed on too.

    Raises
    ------
    RuntimeError
        In place of an error of a type that cannot be sent to other ranks.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> together(MPI.COMM_WORLD, lambda: 2 + 2)
    4
    """
    if comm is None or comm.size == 1:
        return run()
    result = error = None
    try:
        result = run()
    except BaseException as raised:
        error = raised
    _raise_first(comm, error)
    return result


def may_fail_alone(*functions: Callable) -> bool:
    """Whether one of these is not of this package: its own fail on all ranks or on none, and need no reduction for it."""
    return not all(str(getattr(function, "__module__", "")).startswith(f"{__package__}.") for function in functions)


def on_first(comm: MPI.Comm, run: Callable[[], _T]) -> _T:
    """What ``run()`` returns on rank 0, where alone it is called, on every rank; what it raises is raised on all. Collective.

    The result is pickled: keep it small.
    """
    result = together(comm, run if comm.rank == 0 else lambda: None)
    return comm.bcast(result) if comm.size > 1 else result


def _raise_first(comm: MPI.Comm, error: BaseException | None) -> None:
    """Raise the error of the first rank that has one, on all ranks."""
    sender = comm.allreduce(comm.rank if error is not None else comm.size, op=min)
    if sender == comm.size:
        return
    first = comm.bcast(_to_send(error, comm.rank) if comm.rank == sender else None, root=sender)
    if comm.rank == sender and type(first) is type(error):
        raise error
    raise first from error


def _to_send(error: BaseException, rank: int) -> BaseException:
    """The error, or where it does not survive pickling a RuntimeError of the same words."""
    try:
        sent = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class of errors does when it is pickled
        sent = RuntimeError(f"{type(error).__name__}: {error}")
    sent.add_note(f"(raised on rank {rank}; its traceback says where)")
    return sent


def same(comm: MPI.Comm | None, **arguments: Any) -> None:
    """Raise unless all ranks give the same arguments. Collective: one reduction of 16 bytes an argument.

    Numbers, strings, paths, arrays, sequences, mappings, dataclasses and None are compared by a hash of their values and
    types, SymPy's expressions by what they are made of; a function by its name; any other object by its type and, where it has one, its `description`.

    Parameters
    ----------
    comm
        The communicator; None stands for this rank alone.
    **arguments
        The arguments by the names that messages call them.

    Raises
    ------
    ValueError
        If an argument differs between ranks; on all ranks.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> same(MPI.COMM_WORLD, rank=3, weights=np.ones(3))
    """
    if comm is None or comm.size == 1:
        return
    mine = np.array([_digest(value) for value in arguments.values()], dtype=np.uint64)
    # All are equal where the largest of the complements is the complement of the largest.
    largest, smallest = np.split(comm.allreduce(np.concatenate([mine, ~mine]), op=np.maximum), 2)
    for name, differs in zip(arguments, largest != ~smallest):
        if differs:
            raise ValueError(f"{name}: all ranks must give the same; give what rank 0 has, as by comm.bcast")


_PLAIN = (bool, int, float, str, type(None))


def _digest(value: Any) -> int:
    state = hashlib.blake2b(digest_size=8)
    for part in _parts(value):
        state.update(part)
        state.update(b"\0")
    return int.from_bytes(state.digest(), "little")


def _parts(value: Any) -> Iterator[bytes]:
    """What a value is made of, as bytes: the same on every rank for equal values."""
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
