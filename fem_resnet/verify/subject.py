"""What a command is told to look at: a saved network, or the problem of a Python module."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from mpi4py import MPI

from fem_resnet.arguments import instance
from fem_resnet.io.reading import load, load_lift
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.ranks import in_step, on_first
from fem_resnet.verify.suite import problem_of, takes_communicator

__all__ = ["problem_at", "subject"]


def subject(name: str, comm: MPI.Comm) -> LearningProblem | Callable[..., LearningProblem]:
    """The problem of a saved network, with smooth inputs and targets, or the function `problem` of a module. Collective.

    Parameters
    ----------
    name
        The name of a file of `save`, or the name or path of a module.
    comm
        The communicator.

    Raises
    ------
    OSError, ImportError, ValueError
        If there is no such file or module, or `load` refuses the file.
    AttributeError
        If the module has no function `problem`.
    """
    path = Path(name)
    is_file = on_first(comm, path.is_file)
    if path.suffix in (".h5", ".hdf5") or is_file and path.suffix != ".py":
        net, head = load(path, comm)
        return problem_of(net, head, load_lift(path, net.Y))
    module = in_step(comm, lambda: _module(name, path))  # it may make meshes
    if not callable(getattr(module, "problem", None)):
        raise AttributeError(f"the module {name}: expected a function problem() that returns a LearningProblem, found none")
    return module.problem


def problem_at(name: str, comm: MPI.Comm) -> LearningProblem:
    """The problem of a saved network or of a module, as for `subject`. Collective.

    Raises
    ------
    TypeError
        If the function `problem` of the module returns something else.
    Exception
        As of `subject`, or whatever that function raises.
    """
    found = subject(name, comm)
    if isinstance(found, LearningProblem):
        return found
    arguments = (comm,) if takes_communicator(found) else ()
    return instance("problem()", in_step(comm, lambda: found(*arguments)), LearningProblem)


def _module(name: str, path: Path) -> ModuleType:
    if path.suffix != ".py":
        sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(name)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
