"""Networks in files: one HDF5 file, written by Firedrake's CheckpointFile, read on any number of ranks.

The file holds the mesh, the bases by their node values (cell indicators by name), all coefficients, and the settings of
the network. A file is complete or not there: it is written under another name and then renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import firedrake as fd
import h5py
import numpy as np
import scipy.sparse
from mpi4py import MPI
from pyadjoint.tape import stop_annotating
from ufl import H1

from fem_resnet.activation.activation import Activation
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.label_domain.basis import Basis, cell_indicators
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.laplace import move_laplace
from fem_resnet.learning.head import Head
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import NodalValues, StateValues
from fem_resnet.parameters.stable_kernels import stable_kernel_from

__all__ = ["load", "save"]

_GROUP = "fem_resnet"
_FORMAT = 2


@supports("no_layers", "gradient_flow", *HELD, *STEPPED)
def save(path: str | Path, net: ResidualNetwork, head: Head | None = None) -> None:
    """Write a network, and its head if there is one. Collective.

    Parameters
    ----------
    path
        The file; an old one is replaced at the very end, so that a complete file is there at any time.
    net, head
        What to write.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        If the folder does not exist, or `path` is one; on all ranks alike.
    TypeError
        If an argument is of another kind.
    ValueError
        If the head reads another label space, or its output is a function on another one.
    """
    for name, value, kind in (("net", net, ResidualNetwork), ("head", head, Head | None)):
        if not isinstance(value, kind):
            wanted = "a ResidualNetwork is" if name == "net" else "a Head or None is"
            raise TypeError(f"{name}: {wanted} wanted, as in save(path, net, head); {type(value).__name__} was given")
    path = _path(path)
    comm = net.Y.comm
    if not _on_rank_0(comm, path.parent.is_dir):
        raise FileNotFoundError(f"path: the folder {path.parent} does not exist")
    if _on_rank_0(comm, path.is_dir):
        raise IsADirectoryError(f"path: {path} is a folder, the name of a file is wanted")
    if head is not None and head.psi.Y is not net.Y:
        raise ValueError(f"head: it reads {head.psi.Y!r}, the network's label space {net.Y!r} is wanted")
    if head is not None and head.classes is None and head.Y is not net.Y:
        raise ValueError(f"head: its output is a function on {head.Y!r}; only classes and {net.Y!r} can be saved")
    bases, roles = _bases(net, head)
    settings = {
        "format": _FORMAT,
        "roles": roles,
        "kinds": [basis.kind for basis in bases],
        "mesh": net.Y.V.mesh().name,
        # The given times: learned ones are coefficients, as those of bias and kernel.
        "network": net.settings
        | {"times": net.settings["times"].tolist(), "options_prefix": None, "activation": net.activation.description}
        | {"stable_kernel": None if net.stable_kernel is None else net.stable_kernel.description},
        "head": None if head is None else {"classes": head.classes, "prediction": head.prediction.name},
    }
    part = path.with_name(path.name + ".part")
    with stop_annotating(), fd.CheckpointFile(str(part), "w", comm=comm) as file:
        file.require_group(_GROUP)
        file.save_mesh(net.Y.V.mesh())
        _save_label_space(file, net.Y)
        for index, basis in enumerate(bases):
            if basis.kind != "cells":
                file.save_function(net.Y.batch(basis.values), name=f"basis_{index}")
        file.set_attr(_GROUP, "settings", json.dumps(settings))
        for index, basis in enumerate(bases):
            if basis.eigenvalues is not None:
                _write(file, f"eigenvalues_{index}", basis.eigenvalues)
                _write(file, f"stiffness_{index}", basis.stiffness)
        for parameter in _parameters(net, head):
            for k, function in enumerate(parameter.functions):
                if isinstance(parameter.space_bases[k], (NodalValues, StateValues)):
                    file.save_function(function, name=f"{parameter.name}_{k}")
                else:
                    _write(file, f"{parameter.name}_{k}", parameter.get(k))
    if comm.rank == 0:
        os.replace(part, path)
    comm.barrier()


def load(path: str | Path, comm: MPI.Comm = MPI.COMM_WORLD) -> tuple[ResidualNetwork, Head | None]:
    """Read what `save` wrote, on any number of ranks. Collective over `comm`.

    Parameters
    ----------
    path
        The file.
    comm
        Communicator of the mesh.

    Returns
    -------
    net, head
        The network on a label space of its own, and its head or None.

    Raises
    ------
    TypeError
        If `path` is no path.
    FileNotFoundError
        If there is no such file; on all ranks alike.
    ValueError
        If it holds no network, or one of another format.
    """
    path = _path(path)
    if not _on_rank_0(comm, path.is_file):
        raise FileNotFoundError(f"path: there is no file {path}")
    if not _on_rank_0(comm, lambda: _holds_a_network(path)):
        raise ValueError(f"path: {path} holds no network; files of fem_resnet.save are wanted")
    with stop_annotating(), fd.CheckpointFile(str(path), "r", comm=comm) as file:
        settings = json.loads(file.get_attr(_GROUP, "settings"))
        if settings["format"] != _FORMAT:
            raise ValueError(f"path: {path} has format {settings['format']}, this version reads {_FORMAT}")
        mesh = file.load_mesh(settings["mesh"])
        Y = _load_label_space(file, mesh)
        bases = [
            cell_indicators(Y)
            if kind == "cells"
            else Basis(
                Y,
                Y.values(file.load_function(mesh, f"basis_{index}")),
                kind,
                _read(file, f"eigenvalues_{index}"),
                move_laplace if kind == "laplace" and Y.graph is None else None,
                _stiffness(file, index, Y),
            )
            for index, kind in enumerate(settings["kinds"])
        ]
        # None stands for no basis: of a bias with a value at every node, of a head that is not there.
        role = {
            name: [None if index is None else bases[index] for index in indices]
            for name, indices in settings["roles"].items()
        }
        net = ResidualNetwork(
            role["phi"],
            role["psi"],
            bias=role["bias"],
            **settings["network"]
            | {"activation": Activation.from_description(settings["network"]["activation"])}
            | {"stable_kernel": stable_kernel_from(settings["network"].get("stable_kernel"))},
        )
        head = None
        if settings["head"] is not None:
            head = Head(role["head"][0], settings["head"]["classes"] or role["onto"][0], settings["head"]["prediction"])
        for parameter in _parameters(net, head):
            for k in range(len(parameter.functions)):
                if isinstance(parameter.space_bases[k], (NodalValues, StateValues)):
                    parameter.set(k, file.load_function(mesh, f"{parameter.name}_{k}").dat.data_ro)
                else:
                    parameter.set(k, _read(file, f"{parameter.name}_{k}"))
    return net, head


def _path(path: str | Path) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: the name of a file is wanted, {type(path).__name__} was given")
    return Path(path)


def _save_label_space(file: fd.CheckpointFile, Y: LabelSpace) -> None:
    """Its space, as that of a Function, which holds the numbers of the points where there are any; and the graph."""
    function = fd.Function(Y.V, name="label_space")
    function.dat.data_wo[...] = -1.0 if Y.numbers is None else Y.numbers
    file.save_function(function)
    if Y.graph is not None:
        for name in ("data", "indices", "indptr"):
            _write(file, f"graph_{name}", getattr(Y.graph, name))


def _load_label_space(file: fd.CheckpointFile, mesh: fd.MeshGeometry) -> LabelSpace:
    function = file.load_function(mesh, "label_space")
    V = function.function_space()
    numbers = np.rint(function.dat.data_ro).astype(int)
    if V.mesh().comm.allreduce(numbers.max(initial=-1), op=MPI.MAX) < 0:
        return LabelSpace(V)
    size = V.dof_dset.layout_vec.getSize()
    parts = tuple(_read(file, f"graph_{name}") for name in ("data", "indices", "indptr"))
    graph = None if parts[0] is None else scipy.sparse.csr_array(parts, shape=(size, size))
    return LabelSpace(V, numbers=numbers, graph=graph)


# HDF5 closes a file only when nothing in it is open: h5py's objects must not outlive these calls.


def _write(file: fd.CheckpointFile, name: str, array: np.ndarray) -> None:
    file.h5pyfile[_GROUP].create_dataset(name, data=array)


def _read(file: fd.CheckpointFile, name: str) -> np.ndarray | None:
    group = file.h5pyfile[_GROUP]
    return group[name][...] if name in group else None


def _stiffness(file: fd.CheckpointFile, index: int, Y: LabelSpace) -> np.ndarray | None:
    """What `save` wrote of eigenfunctions; files of before have their eigenvalues alone."""
    stiffness, eigenvalues = (_read(file, f"{name}_{index}") for name in ("stiffness", "eigenvalues"))
    has_gradients = Y.graph is not None or Y.V.ufl_element() in H1
    return stiffness if stiffness is not None or eigenvalues is None or has_gradients else np.diag(eigenvalues)


def _bases(net: ResidualNetwork, head: Head | None) -> tuple[list[Basis], dict[str, list[int | None]]]:
    """The bases, each once, and which of them play which part."""
    parts = net.bases | {
        "head": [None if head is None else head.psi],
        "onto": [None if head is None or head.classes else head.onto],
    }
    bases = list(dict.fromkeys(basis for part in parts.values() for basis in part if basis is not None))
    position = {basis: index for index, basis in enumerate(bases)}
    return bases, {name: [position.get(basis) for basis in part] for name, part in parts.items()}


def _on_rank_0(comm: MPI.Comm, question: Callable[[], bool]) -> bool:
    """The answer of rank 0, on all ranks: a file system may show others something else."""
    return comm.bcast(question() if comm.rank == 0 else None)


def _holds_a_network(path: Path) -> bool:
    if not h5py.is_hdf5(path):
        return False
    with h5py.File(path, "r") as file:
        return _GROUP in file


def _parameters(net: ResidualNetwork, head: Head | None) -> list[Parameter]:
    return net.parameters + ([] if head is None else head.parameters)
