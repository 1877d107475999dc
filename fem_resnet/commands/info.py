"""`python -m fem_resnet info`: versions, ranks and caches, as a report of a fault should have them."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import firedrake as fd
import h5py
import numpy as np
from mpi4py import MPI
from petsc4py import PETSc
from slepc4py import SLEPc

from fem_resnet.activation.activation import get_activation
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.layers.compiled_stage import CompiledStage, new_stage
from fem_resnet.ranks import on_first
from fem_resnet.reporting import table

__all__ = ["facts", "main"]

#: Packages on which results depend.
_PACKAGES = ("firedrake", "pyadjoint-ad", "fenics-ufl", "petsc4py", "slepc4py", "mpi4py", "numpy", "scipy", "sympy", "h5py")
#: Where kernels are kept.
_CACHES = ("PYOP2_CACHE_DIR", "FIREDRAKE_TSFC_KERNEL_CACHE_DIR")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments
        Its arguments; those of the process if left out.

    Returns
    -------
    int
        The exit code.
    """
    argparse.ArgumentParser(prog="python -m fem_resnet info", description=__doc__).parse_args(arguments)
    comm = MPI.COMM_WORLD
    found = facts(comm)
    if comm.rank == 0:
        sys.stdout.write("\n".join(table(("what", "is"), found)) + "\n")
    return 0


def facts(comm: MPI.Comm) -> list[tuple[str, str]]:
    """What this installation is: pairs of a name and a text. Collective.

    Parameters
    ----------
    comm
        The communicator, on one rank of which a C compiler is tried.
    """
    petsc, slepc = (".".join(map(str, each.Sys.getVersion())) for each in (PETSc, SLEPc))
    return [
        ("fem_resnet", f"{import_module('fem_resnet').__version__}, {Path(__file__).parents[1]}"),
        ("Python", f"{platform.python_version()}, {sys.executable}"),
        ("machine", f"{platform.machine()}, {platform.system()} {platform.release()}, {os.cpu_count()} cores"),
        ("PETSc, SLEPc", f"{petsc}, {slepc}, {np.dtype(PETSc.ScalarType)}, {np.dtype(PETSc.IntType)}"),
        ("MPI", f"{MPI.Get_library_version().splitlines()[0].split(',')[0]}, {comm.size} ranks"),
        ("HDF5", f"{h5py.version.hdf5_version}, {'with' if h5py.get_config().mpi else 'without'} MPI"),
        ("layers", on_first(comm, _layers)),
        ("caches", ", ".join(os.environ.get(name, f"no {name}") for name in _CACHES)),
        *((name, _version(name)) for name in _PACKAGES),
    ]  # fmt: skip


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _layers() -> str:
    """Whether layers are compiled here."""
    Y = LabelSpace(fd.FunctionSpace(fd.UnitIntervalMesh(2, comm=MPI.COMM_SELF), "DG", 0))
    compiled = isinstance(new_stage(Y, get_activation("tanh"), 1), CompiledStage)
    return "compiled" if compiled else "not compiled; NumPy runs them, which is slower"
