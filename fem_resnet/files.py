"""Files that are complete or not there, and that show themselves whether they are complete.

A file is written under another name, synced, and renamed to its own name. Whatever fails, the old file stays as it was. A
sealed file ends with a checksum of all bytes before it, which is compared before anything else reads the file. HDF5 and zip
files may have bytes after their end, so h5py and NumPy read sealed files as they are.

The ranks compute the checksum together: it is the checksum of the checksums of pieces of fixed length. So it does not
depend on the number of ranks.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fem_resnet.ranks import on_first, together

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Damaged", "aside", "let_go", "put_in_place", "reserve", "seal", "sealed", "unsealed"]

_MARK = b"\nfem_resnet BLAKE2b "
_SEAL_LENGTH = len(_MARK) + 64 + 1
#: Bytes of a piece; one rank reads it.
_PIECE = 4 << 20


class Damaged(ValueError):
    """A file is not what was written: it has no seal, or its bytes are not the bytes that were sealed."""


def _checksum(comm: MPI.Comm | None, path: Path, length: int) -> bytes:
    """The checksum of the first `length` bytes of a file, in hexadecimal digits. Collective."""
    rank, size = (0, 1) if comm is None else (comm.rank, comm.size)

    def mine() -> list[bytes]:
        found = []
        with open(path, "rb") as file:
            for start in range(rank * _PIECE, length, size * _PIECE):
                file.seek(start)
                found.append(hashlib.blake2b(file.read(min(_PIECE, length - start)), digest_size=32).digest())
        return found

    pieces = together(comm, mine)
    every = [pieces] if comm is None else comm.allgather(pieces)
    in_order = [every[k % size][k // size] for k in range(sum(map(len, every)))]
    return hashlib.blake2b(b"".join([str(length).encode(), *in_order]), digest_size=32).hexdigest().encode()


def seal(comm: MPI.Comm | None, path: Path) -> None:
    """Append its checksum to a closed file. Collective over `comm`; None stands for this rank alone."""
    length = _first(comm, lambda: path.stat().st_size)
    mark = _MARK + _checksum(comm, path, length) + b"\n"

    def append() -> None:
        with open(path, "ab") as file:
            file.write(mark)

    _first(comm, append)


def sealed(comm: MPI.Comm | None, path: Path) -> int:
    """Compare a file with its seal. Collective over `comm`; None stands for this rank alone.

    Returns
    -------
    int
        The length of the file before its seal, in bytes.

    Raises
    ------
    Damaged
        If it has no seal, or is not what was sealed; on all ranks alike.
    OSError
        If it cannot be read.
    """

    def end() -> tuple[int, bytes]:
        length = path.stat().st_size - _SEAL_LENGTH
        with open(path, "rb") as file:
            file.seek(max(length, 0))
            return length, file.read(_SEAL_LENGTH + 1)

    length, mark = _first(comm, end)
    if length < 0 or not mark.startswith(_MARK):
        raise Damaged("it does not end with a checksum, so it is not complete")
    if mark != _MARK + _checksum(comm, path, length) + b"\n":
        raise Damaged("its checksum is not that of its bytes: it was damaged or changed after it was written")
    return length


def unsealed(path: Path) -> bytes:
    """All bytes of a sealed file before its seal, on this rank alone.

    Raises
    ------
    Damaged, OSError
        As in `sealed`.
    """
    sealed(None, path)
    return path.read_bytes()[:-_SEAL_LENGTH]


def reserve(path: Path, size: int) -> None:
    """Reserve room on the disk for a file that will grow to `size` bytes; on one rank.

    The length of the file stays. Where the file system cannot reserve room, its free room is compared with `size`.

    Raises
    ------
    OSError
        If there is not enough room.
    """
    keep_size = 1
    with open(path, "r+b") as file:
        try:
            allocate = ctypes.CDLL(None, use_errno=True).fallocate
            allocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        except AttributeError:  # not Linux
            code = errno.ENOSYS
        else:
            code = ctypes.get_errno() if allocate(file.fileno(), keep_size, 0, size) else 0
    if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
        room = os.statvfs(path)
        code = errno.ENOSPC if room.f_bavail * room.f_frsize < size else 0
    if code:
        raise OSError(code, f"{os.strerror(code)}: {size / 1e6:.3g} MB are needed", str(path))


def let_go(path: Path) -> None:
    """Redirect a file that this process has open to memory, so that later writes go there.

    HDF5 keeps a file that it could not write. It tries again when the process ends, and crashes if MPI has ended before.
    """
    if not (hasattr(os, "memfd_create") and path.exists()):
        return
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.path.samestat(os.fstat(int(name)), path.stat()):
                memory = os.memfd_create("let go")
                os.dup2(memory, int(name))
                os.close(memory)
        except OSError:  # the descriptor of the list itself
            continue


def put_in_place(comm: MPI.Comm | None, part: Path, path: Path) -> None:
    """Sync a file that was written, and give it its name. Collective over `comm`; None stands for this rank alone.

    Parameters
    ----------
    comm
        The ranks that wrote it.
    part
        The name under which it was written.
    path
        Its own name; an old file is replaced.
    """
    together(comm, lambda: _sync(part))  # each rank syncs what it has written

    def rename() -> None:
        os.replace(part, path)
        _sync(path.parent)

    _first(comm, rename)


@contextmanager
def aside(path: str | Path, suffix: str = ".part") -> Iterator[Path]:
    """Another name for a file while it is written; on one rank. At the end it gets its own name; on an error it is removed.

    A path that is no regular file, such as /dev/stdout, is written to directly.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    part = path.with_name(path.name + suffix)
    try:
        yield part
        put_in_place(None, part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems do not sync folders
            raise
    finally:
        os.close(file)


def _first(comm: MPI.Comm | None, run: Callable):
    return run() if comm is None else on_first(comm, run)
