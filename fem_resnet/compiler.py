"""C code as a library that all ranks load: compiled once on each machine, and kept on disk with a checksum.

The first rank of each machine takes the library from PyOP2's cache folder if it is complete there, and compiles it
otherwise. An error on one rank is raised on all, so that all of them can do without the library. PyOP2's own `load` is not
used for two reasons: if one rank finds no compiler, or only some ranks find a library, its ranks wait for each other for ever;
and it runs whatever file it finds.

What Python assumes about the C code is appended to it as C code: prototypes, and assertions about structs. So the compiler
checks the assumptions. ctypes checks the arguments of a call against the same prototypes.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc
from petsctools import get_petscvariables
from pyop2.compilation import sniff_compiler
from pyop2.configuration import configuration
from pyop2.exceptions import CompilationError

from fem_resnet.ranks import together

__all__ = ["declared", "layout", "library"]

_HANDLES = ("DM", "Mat", "TS", "TSAdapt", "TSTrajectory", "Tao", "Vec")
#: Types that C passes by value, by their names in C; any pointer is a c_void_p.
_TYPES = {
    "int": ctypes.c_int,
    "long": ctypes.c_long,
    "double": ctypes.c_double,
    "PetscErrorCode": ctypes.c_int,
    "PetscBool": ctypes.c_int,
    "PetscInt": np.ctypeslib.as_ctypes_type(PETSc.IntType),
    "PetscReal": np.ctypeslib.as_ctypes_type(PETSc.RealType),
    **dict.fromkeys(_HANDLES, ctypes.c_void_p),
}
#: Their numbers in __builtin_classify_type.
_KINDS, _INTEGER = {ctypes.c_void_p: 5, ctypes.c_double: 8}, 1
_DIGEST = 32


def library(
    comm: MPI.Comm,
    code: Callable[[], str],
    flags: Sequence[str],
    libraries: Sequence[str],
    prototypes: Iterable[str],
) -> SimpleNamespace:
    """The functions of C code by their names, with the types of their arguments. Collective over `comm`.

    Parameters
    ----------
    comm
        Either all its ranks get the functions, or all get the error.
    code
        Returns the code; called on one rank of each machine.
    flags
        Flags of the compiler, after those of PyOP2.
    libraries
        Flags of the linker.
    prototypes
        Prototypes as `declared` takes them; the compiler compares them with the code.

    Raises
    ------
    pyop2.exceptions.CompilationError
        If the compiler fails, or the prototypes are not those of the code.
    OSError
        If there is no compiler, the cache folder is read-only, or the library cannot be loaded.
    """
    prototypes = list(prototypes)

    def made() -> str:
        return str(
            _on_disk("\n".join([code(), *(f"{prototype};" for prototype in prototypes), ""]), tuple(flags), tuple(libraries))
        )

    machine = _machine(comm)
    try:
        path = machine.bcast(together(comm, made if machine.rank == 0 else lambda: None))
    finally:
        machine.Free()
    return together(comm, lambda: declared(ctypes.CDLL(path), prototypes))


def _machine(comm: MPI.Comm) -> MPI.Comm:
    return comm.Split_type(MPI.COMM_TYPE_SHARED)


def declared(code: ctypes.CDLL, prototypes: Iterable[str]) -> SimpleNamespace:
    """The functions of a library by their names, ready to be called by ctypes.

    Parameters
    ----------
    code
        The library.
    prototypes
        Declarations in C without names of arguments and without a semicolon: "int rate(const struct basis *, double)".
    """
    functions = {}
    for prototype in prototypes:
        result, name, arguments = re.fullmatch(r"(\w+) (\w+)\((.*)\)", prototype).groups()
        function = code[name]  # a new object: all users of the library share the attribute `code.name`
        function.restype = _TYPES[result]
        taken = [] if arguments == "void" else re.split(r", (?![^()]*\))", arguments)
        function.argtypes = [ctypes.c_void_p if "*" in kind else _TYPES[kind] for kind in taken]
        functions[name] = function
    return SimpleNamespace(**functions)


def layout(**structs: type[ctypes.Structure]) -> str:
    """Assertions in C that structs have the fields that ctypes takes them to have; to be appended to their definitions.

    The size and offset of each field is compared, and its kind: pointer, integer or floating point.

    Parameters
    ----------
    **structs
        The structs of ctypes, by their names in C.
    """
    lines = ["#include <stddef.h>"]
    for name, struct in structs.items():
        message = f"struct {name} has the size and the fields that Python takes it to have"
        claims = [f"sizeof(struct {name}) == {ctypes.sizeof(struct)}"]
        for field, kind, *_ in struct._fields_:
            here, member = getattr(struct, field), f"((struct {name} *)0)->{field}"
            number = _KINDS.get(kind, _INTEGER)
            claims.append(f"offsetof(struct {name}, {field}) == {here.offset} && sizeof({member}) == {here.size}")
            claims.append(f"__builtin_classify_type({member}) == {number}")
        lines += [f'_Static_assert({claim}, "{message}");' for claim in claims]
    return "\n".join(lines)


def _on_disk(code: str, flags: tuple[str, ...], libraries: tuple[str, ...]) -> Path:
    """The path of the library. Its file ends with a checksum, which the loader ignores."""
    compiler = get_petscvariables()["CC"], flags, libraries, *(configuration[name] for name in ("cflags", "ldflags", "debug"))
    name = blake2b(repr((compiler, code)).encode(), digest_size=16).hexdigest()
    path = Path(configuration["cache_dir"], "fem_resnet", f"{name}.so")
    if not _is_whole(path):
        made = _compiled(code, flags, libraries)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder, path.name)
            whole.write_bytes(made + blake2b(made, digest_size=_DIGEST).digest())
            os.replace(whole, path)  # processes that run now see the old file or the new one
    return path


def _is_whole(path: Path) -> bool:
    try:
        found = path.read_bytes()
    except OSError:  # writing the file will say what is wrong
        return False
    return blake2b(found[:-_DIGEST], digest_size=_DIGEST).digest() == found[-_DIGEST:]


def _compiled(code: str, flags: tuple[str, ...], libraries: tuple[str, ...]) -> bytes:
    compiler = sniff_compiler(get_petscvariables()["CC"], MPI.COMM_SELF)(flags, libraries, debug=configuration["debug"])
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "code.c"), Path(folder, "code.so")
        source.write_text(code)
        command = [compiler.cc, *compiler.cflags, "-o", str(made), str(source), *compiler.ldflags]
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if ended.returncode:
            said = re.findall(r".*error.*", ended.stderr) or ended.stderr.splitlines() or ["nothing was said"]
            raise CompilationError(f"{compiler.cc} ended with code {ended.returncode}: {said[0].replace(folder + os.sep, '')}")
        return made.read_bytes()
