"""`load`, `load_lift`: a network, its head and its lift are read from a file, after all of the file was checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import firedrake as fd
import h5py
import numpy as np
import scipy.sparse
from mpi4py import MPI
from petsc4py import PETSc
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import instance
from fem_resnet.files import Damaged, sealed
from fem_resnet.io.arrays import GRAPH, OUTPUT, check_arrays, of_laplace
from fem_resnet.io.firedrake_file import file_path, opened, words_of
from fem_resnet.io.group import Group, Wrong
from fem_resnet.io.meshes import check_meshes
from fem_resnet.io.settings import FORMAT, GROUP, checked_settings, network_arguments
from fem_resnet.label_domain.basis import Basis, cell_indicators
from fem_resnet.label_domain.channels import Channels
from fem_resnet.label_domain.graph import checked_graph
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.label_domain.laplace import move_laplace
from fem_resnet.label_domain.parts import mover_of
from fem_resnet.label_domain.repeated_basis import RepeatedBasis
from fem_resnet.learning.head import Head
from fem_resnet.learning.lift import FreeEntries, Lift
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.parameters.equivariant import HeadSymmetries
from fem_resnet.parameters.known_kernel_sets import ARRAYS
from fem_resnet.parameters.space_basis import NodalValues, StateValues
from fem_resnet.parameters.subspace import ELEMENTS, from_arrays
from fem_resnet.petsc import check_plex
from fem_resnet.ranks import in_step, on_first, same, together, watched

__all__ = ["load", "load_lift"]


def load(path: str | Path, comm: MPI.Comm = MPI.COMM_WORLD) -> tuple[ResidualNetwork, Head | None]:
    """Read what `save` wrote, on any number of ranks. Collective over `comm`.

    Whoever wrote a file, it runs no code: its options are on a list of harmless ones, and all its other fields are data.

    Parameters
    ----------
    path
        The name of the file.
    comm
        The communicator of the mesh.

    Returns
    -------
    net : ResidualNetwork
        The network, on a new label space.
    head : Head or None
        Its head, if it was saved with one. Its lift is read by `load_lift`.

    Raises
    ------
    TypeError
        If `path` is no path, or `comm` no communicator.
    OSError
        If there is no such file, or it cannot be read; on all ranks alike.
    ValueError
        If it holds no network, or one of another format, was damaged or changed, or has a field that `save` does not write.
    """
    path = _existing(path, instance("comm", comm, MPI.Comm))
    with _naming(path):
        sealed(comm, path)
        settings, topologies = on_first(comm, lambda: _check_file(path))
        with stop_annotating(), opened(path, "r", comm) as file:
            return in_step(comm, lambda: _read_all(file, settings, topologies))


def load_lift(path: str | Path, Y: LabelSpace) -> Lift | None:
    """Read the lift that `save` wrote with a network. Collective over the communicator of the label space.

    Parameters
    ----------
    path
        The name of the file.
    Y
        The label space of the network that `load` has read from it, or another one with as many channels.

    Returns
    -------
    Lift or None
        The one that was saved, into this label space; None if the network was saved without one.

    Raises
    ------
    TypeError, OSError
        As of `load`, or if `Y` is no label space.
    ValueError
        As of `load`; or if it lifts into another number of channels.
    """
    check_label_space(Y)
    comm = Y.comm
    path = _existing(path, comm)
    with _naming(path):
        sealed(comm, path)
        found = on_first(comm, lambda: _checked_lift(path))
    if found is None:
        return None
    V, allowed = found
    if len(V) != Y.channels:
        raise ValueError(f"Y: expected one with {len(V)} channels, into which {path} lifts, got {Y!r}")
    lift = Lift(Y, V.shape[1], symmetries=FreeEntries(allowed))
    lift.V.write(0, lift.V.space_basis.of_whole(V))
    return lift


def _existing(path: str | Path, comm: MPI.Comm) -> Path:
    """The path of a file that is there. Collective."""
    path = file_path(path)
    same(comm, path=path)
    if not on_first(comm, path.is_file):
        raise FileNotFoundError(f"path: there is no file {path}")
    return path


def _checked_lift(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """V in a file, of which all is checked first, and which of its entries are free; None if it has none."""
    settings, _ = _check_file(path)
    if settings["lift"] is None:
        return None
    with h5py.File(path, "r") as file:
        return file[GROUP]["V_0"][...], file[GROUP]["V_allowed"][...].astype(bool)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Raise whatever is wrong with a file as a ValueError with the name of the file."""
    try:
        yield
    except Damaged as error:
        raise ValueError(f"path: {path} holds no network of format {FORMAT}: {error}") from error
    except Exception as error:  # also of Firedrake and PETSc, where all fields fit together but are no mesh
        if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno is not None:  # h5py's has none
            raise
        raise ValueError(f"path: {path} holds no network as save writes it: {words_of(error)}") from error


def _check_file(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Check all of a file, on one rank; its settings, and the names of the topologies of its meshes."""
    try:
        with h5py.File(path, "r") as file, Group(file) as root, root.group(GROUP) as group:
            settings = checked_settings(group.text("settings"))
            output = settings["output"] or settings
            functions, topologies = check_meshes(root, dict.fromkeys([settings["mesh"], output["mesh"]]))
            check_arrays(group, settings, functions)
            return settings, topologies
    except OSError as error:  # of HDF5: the bytes of the file could be read
        raise Wrong(f"it is no whole HDF5 file: {error}") from error


def _read_all(
    file: fd.CheckpointFile, settings: Mapping[str, Any], topologies: Iterable[str]
) -> tuple[ResidualNetwork, Head | None]:
    for topology in topologies:
        _check_topology(file, topology)
    mesh = file.load_mesh(settings["mesh"])
    Y = _load_label_space(file, mesh, settings["channels"])
    kinds = zip(settings["kinds"], settings["repeated"])
    bases = [_load_basis(file, Y, f"basis_{index}", kind, repeated) for index, (kind, repeated) in enumerate(kinds)]
    # None stands for no basis: of a bias with a value at every node, or of a head that does not exist.
    role = {
        name: [None if index is None else bases[index] for index in indices] for name, indices in settings["roles"].items()
    }
    of_set = {name: _read(file, f"kernel_set_{name}") for name in ARRAYS.get(_set_name(settings), {})}
    net = ResidualNetwork(**network_arguments(settings["network"], role["phi"], role["psi"], role["bias"], of_set))
    head = None
    if settings["head"] is not None:
        onto, output = role["onto"][0], settings["output"]
        if output is not None:
            other = mesh if output["mesh"] == settings["mesh"] else file.load_mesh(output["mesh"])
            there = _load_label_space(file, other, output["channels"], OUTPUT)
            onto = _load_basis(file, there, f"{OUTPUT}basis", output["kind"], output["repeated"])
        head = _load_head(file, settings["head"], role["head"][0], onto)
    for parameter in net.parameters + ([] if head is None else head.parameters):
        for k, basis in enumerate(parameter.space_bases):
            if isinstance(basis, (NodalValues, StateValues)):
                parameter.set(k, _of_one(Y, file.load_function(mesh, f"{parameter.name}_{k}")).reshape(basis.shape))
            else:
                parameter.set(k, _read(file, f"{parameter.name}_{k}"))
    return net, head


def _load_head(file: fd.CheckpointFile, given: Mapping[str, Any], psi: Basis, onto: Basis | None) -> Head:
    """A head without the coefficients of W and mu."""
    if onto is None:
        return Head(psi, given["classes"], given["prediction"])
    if given["one_channel"]:
        onto = onto.one
    kept: HeadSymmetries | tuple[()] = ()
    if given["kept"] is not None:
        sizes, counts = {"W": onto.rank * psi.rank, "mu": onto.rank}, given["kept"]
        kept = HeadSymmetries(
            *(
                from_arrays(size, counts[name], {each: _read(file, f"{name}_{each}") for each in ELEMENTS})
                if counts[name] else scipy.sparse.csc_array((size, 0))
                for name, size in sizes.items()
            )
        )  # fmt: skip
    return Head(psi, onto, given["prediction"], symmetries=kept)


def _set_name(settings: Mapping[str, Any]) -> str:
    """The name of the set of kernels; empty where there is none."""
    return (settings["network"]["kernel_set"] or {}).get("set", "")


def _check_topology(file: fd.CheckpointFile, name: str) -> None:
    """Check that cones fit together, as each rank sees them. `check_meshes` has checked that indices are in range."""
    plex = PETSc.DMPlex().create(comm=file.comm)
    plex.setName(name)
    file.viewer.pushFormat(PETSc.Viewer.Format.HDF5_PETSC)
    numbering = plex.topologyLoad(file.viewer)
    file.viewer.popFormat()
    try:
        together(file.comm, lambda: check_plex(plex))
    except PETSc.Error:
        plex.incRef()  # a check that fails leaves a work array checked out, and then no DM can be destroyed
        raise
    numbering.destroy()
    plex.destroy()


def _load_label_space(file: fd.CheckpointFile, mesh: fd.MeshGeometry, channels: int | None, prefix: str = "") -> LabelSpace:
    one = _load_one(file, mesh, prefix)
    return one if channels is None else Channels(one, channels)


def _load_one(file: fd.CheckpointFile, mesh: fd.MeshGeometry, prefix: str) -> LabelSpace:
    """The label space of one channel."""
    function = file.load_function(mesh, f"{prefix}label_space")
    V = function.function_space()
    numbers = np.rint(function.dat.data_ro).astype(int)
    if watched(V.mesh().comm).allreduce(numbers.max(initial=-1), op=MPI.MAX) < 0:
        return LabelSpace(V)
    size = V.dof_dset.layout_vec.getSize()
    parts = tuple(_read(file, f"{prefix}graph_{name}") for name in GRAPH)
    graph = None if parts[0] is None else checked_graph(scipy.sparse.csr_array(parts, shape=(size, size)), size)
    return LabelSpace(V, numbers=numbers, graph=graph)


def _load_basis(file: fd.CheckpointFile, Y: LabelSpace, name: str, kind: str, repeated: bool) -> Basis:
    if isinstance(Y, Channels) and repeated:
        return RepeatedBasis(Y, _load_basis(file, Y.one, name, kind, False))
    eigenvalues, stiffness = of_laplace(name)
    if kind == "cells":
        return cell_indicators(Y)
    return Basis(
        Y,
        _of_one(Y, file.load_function(Y.V.mesh(), name)),
        kind,
        _read(file, eigenvalues),
        move_laplace if kind == "laplace" and Y.graph is None else mover_of(kind),
        _read(file, stiffness),
    )


def _of_one(Y: LabelSpace, function: fd.Function) -> np.ndarray:
    """Values at the nodes of all channels, from a batch on one that has them side by side."""
    return np.vstack(np.split(Y.one.values(function), Y.channels, axis=1))


def _read(file: fd.CheckpointFile, name: str) -> np.ndarray | None:
    # HDF5 closes a file only when nothing in it is open. So no object of h5py may outlive this call.
    group = file.h5pyfile[GROUP]
    return group[name][...] if name in group else None
