"""`save`: a network and its head are written to a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import firedrake as fd
import numpy as np
from firedrake.embedding import get_embedding_element_for_checkpointing
from mpi4py import MPI
from petsc4py import PETSc
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import instance
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.files import put_in_place, reserve, seal
from fem_resnet.io.arrays import GRAPH, OUTPUT, of_laplace
from fem_resnet.io.firedrake_file import file_path, opened, words_of
from fem_resnet.io.settings import GROUP, written_settings
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.channels import Channels
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.repeated_basis import RepeatedBasis
from fem_resnet.learning.head import Head
from fem_resnet.learning.lift import Lift
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.parameters.space_basis import NodalValues, StateValues
from fem_resnet.parameters.subspace import as_arrays
from fem_resnet.ranks import in_step, on_first, same, together

__all__ = ["save"]

#: Labels of a DMPlex that Firedrake makes anew, and that depend on the partition.
_LABELS_MADE_ANEW = ("celltype", "exterior_facets", "interior_facets", "pyop2_core", "pyop2_owned", "pyop2_ghost")


@supports("channels", "no_layers", "gradient_flow", *HELD, *STEPPED)
def save(path: str | Path, net: ResidualNetwork, head: Head | None = None, lift: Lift | None = None) -> None:
    """Write a network, and its head and lift if there are any. Collective over the communicator of the network.

    Parameters
    ----------
    path
        The name of the file. An old file is replaced at the very end, so that there is a complete file at any time.
    net
        The network.
    head
        Its head. What symmetries leave free of W and mu is written, the symmetries are not.
    lift
        Its lift, which `load_lift` reads. The same holds for its symmetries.

    Raises
    ------
    OSError
        If the folder does not exist or is read-only, `path` is a folder, or there is no room; on all ranks alike. The old
        file then stays as it was.
    TypeError
        If an argument is of another kind.
    ValueError
        If head or lift belong to another label space; if the head's output is on another mesh of the same name, or on one
        made from the network's; if no file can hold the activation or an option of the network.
    """
    instance("net", net, ResidualNetwork, "the network is the second argument: save(path, net, head)")
    instance("head", head, (Head, type(None)))
    instance("lift", lift, (Lift, type(None)))
    path, comm = file_path(path), net.Y.comm
    same(comm, path=path)
    on_first(comm, lambda: _check_place(path))
    if head is not None and head.psi.Y is not net.Y:
        raise ValueError(
            f"head: expected one that reads the network's label space {net.Y!r}, got one that reads {head.psi.Y!r}"
        )
    output = None if head is None or head.classes or head.Y in (net.Y, net.Y.one) else head.onto
    if output is not None:
        _check_output(net.Y.V.mesh(), output.Y.V.mesh())
    if lift is not None and lift.Y is not net.Y:
        raise ValueError(f"lift: expected one into the network's label space {net.Y!r}, got one into {lift.Y!r}")
    bases, roles = _bases(net, head, output)
    settings = written_settings(net, head, lift, bases, roles, output)
    more = {} if lift is None else {"V_0": lift.matrix(), "V_allowed": lift.kept.allowed.astype(int)}
    part = path.with_name(path.name + ".part")
    try:
        on_first(comm, lambda: part.write_bytes(b""))
        together(comm, lambda: open(part, "r+b").close())  # all ranks see it
        with stop_annotating(), opened(part, "w", comm) as file:
            _write_all(file, part, net, head, bases, output, settings, more)
        seal(comm, part)
        put_in_place(comm, part, path)
    except BaseException as error:
        if comm.rank == 0:
            with suppress(OSError):
                part.unlink()
        if isinstance(error, (OSError, RuntimeError)):  # of the system, HDF5 and PETSc
            kind = type(error) if isinstance(error, OSError) else OSError
            raise kind(f"path: {path} was not written, and stays as it was: {words_of(error)}") from error
        raise


def _check_place(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {path.parent} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"path: expected the name of a file, got that of the folder {path}")


def _check_output(mesh: fd.MeshGeometry, other: fd.MeshGeometry) -> None:
    """Check that a file can hold the mesh of an output beside that of a network."""
    if other is mesh:
        return
    if MPI.Comm.Compare(mesh.comm, other.comm) not in (MPI.IDENT, MPI.CONGRUENT):
        raise ValueError("head: expected an output on the ranks of the network, got one on a mesh with another communicator")
    if other.name == mesh.name or {mesh.topology.name, _plex(mesh)} & {other.topology.name, _plex(other)}:
        raise ValueError(
            f"head: expected an output on the network's mesh or on one of another name, got two meshes {mesh.name!r}, which a "
            'file cannot tell apart; give the second one a name when you make it: UnitDiskMesh(3, name="outputs")'
        )


def _plex(mesh: fd.MeshGeometry) -> str:
    """The name of the DMPlex, which an extruded mesh has from its base mesh."""
    return getattr(mesh.topology, "_base_mesh", mesh.topology).name


def _bases(net: ResidualNetwork, head: Head | None, output: Basis | None) -> tuple[list[Basis], dict[str, list[int | None]]]:
    """The bases, each once, and which of them play which part."""
    parts = {
        **net.bases,
        "head": [None if head is None else head.psi],
        "onto": [None if head is None or head.classes or output else _in_all_channels(net, head.onto)],
    }
    bases = list(dict.fromkeys(basis for part in parts.values() for basis in part if basis is not None))
    position = {basis: index for index, basis in enumerate(bases)}
    return bases, {name: [position.get(basis) for basis in part] for name, part in parts.items()}


def _in_all_channels(net: ResidualNetwork, onto: Basis) -> Basis:
    """The basis of the output of a head; of one on a channel the basis that repeats it, the network's if it has such a one."""
    if onto.Y is net.Y or not isinstance(net.Y, Channels):
        return onto
    used = (basis for part in net.bases.values() for basis in part if isinstance(basis, RepeatedBasis))
    return next((basis for basis in used if basis.one is onto), None) or RepeatedBasis(net.Y, onto)


def _write_all(
    file: fd.CheckpointFile, part: Path, net: ResidualNetwork, head: Head | None, bases: list[Basis], output: Basis | None,
    settings: str, more: Mapping[str, np.ndarray],
) -> None:  # fmt: skip
    Y, comm = net.Y, net.Y.comm
    functions, arrays = _of_label_space(Y, {f"basis_{index}": basis for index, basis in enumerate(bases)})
    arrays |= more
    on_output, of_output = ({}, {}) if output is None else _of_label_space(output.Y, {f"{OUTPUT}basis": output}, OUTPUT)
    arrays |= of_output
    if net.settings.kernel.among is not None:
        arrays |= {f"kernel_set_{name}": array for name, array in net.settings.kernel.among.arrays.items()}
    if head is not None and head.kept is not None:
        for name, elements in (("W", head.kept.of_W), ("mu", head.kept.of_mu)):
            if elements.shape[1]:
                arrays |= {f"{name}_{each}": array for each, array in as_arrays(elements).items()}
    for parameter in net.parameters + ([] if head is None else head.parameters):
        for k, held in enumerate(parameter.space_bases):
            name = f"{parameter.name}_{k}"
            if isinstance(held, (NodalValues, StateValues)):
                values = parameter.get(k).reshape(Y.nodes, -1)
                functions[name] = values.shape[1] * Y.channels, partial(_on_one, Y, values, Y.channels)
            else:
                arrays[name] = parameter.get(k)
    size = _largest_size(Y, [numbers for numbers, _ in functions.values()], [array.size for array in arrays.values()])
    if output is not None:
        size += _largest_size(output.Y, [numbers for numbers, _ in on_output.values()], [])
    # Errors of a collective write come on some ranks alone. So room for the whole file is reserved before the first write.
    on_first(comm, lambda: reserve(part, size))

    def write() -> None:
        file.require_group(GROUP)
        for mesh in dict.fromkeys([Y.V.mesh(), (Y if output is None else output.Y).V.mesh()]):
            file.save_mesh(mesh)
        for name, (_, make) in (functions | on_output).items():
            file.save_function(make(), name=name)
        file.set_attr(GROUP, "settings", settings)
        for name, array in arrays.items():
            file.h5pyfile[GROUP].create_dataset(name, data=array)
        for topology in file.h5pyfile["topologies"].values():
            for group, names in ((topology, ["distributions"]), (topology.get("labels", {}), _LABELS_MADE_ANEW)):
                for name in names:
                    if name in group:
                        del group[name]

    in_step(comm, write)


def _of_label_space(
    Y: LabelSpace, bases: Mapping[str, Basis], prefix: str = ""
) -> tuple[dict[str, tuple[int, Callable[[], fd.Function]]], dict[str, np.ndarray]]:
    """The functions and arrays of a label space and of its bases by their names.

    A function is given by how many numbers a node has, and by what makes it: all of them at once would take much memory.
    """
    functions: dict[str, tuple[int, Callable[[], fd.Function]]] = {f"{prefix}label_space": (1, partial(_label_space, Y))}
    arrays: dict[str, np.ndarray] = {}
    for name, basis in bases.items():
        if basis.kind != "cells":
            channels = Y.channels if basis.one is basis else 1
            functions[name] = basis.one.rank * channels, partial(_on_one, Y, basis.one.values, channels)
        if basis.one.eigenvalues is not None:
            arrays |= zip(of_laplace(name), (basis.one.eigenvalues, basis.one.stiffness))
    if Y.one.graph is not None:
        arrays |= {f"{prefix}graph_{name}": getattr(Y.one.graph, name) for name in GRAPH}
    return functions, arrays


def _on_one(Y: LabelSpace, values: np.ndarray, channels: int) -> fd.Function:
    """A batch on the label domain of one channel, with the values of so many channels side by side."""
    return Y.one.batch(np.hstack(np.split(values, channels)))


def _largest_size(Y: LabelSpace, functions: Sequence[int], arrays: Sequence[int]) -> int:
    """A bound of the size of a file in bytes. Collective.

    Parameters
    ----------
    Y
        The label domain.
    functions
        How many numbers each function has at a node.
    arrays
        How many numbers each array has.
    """
    mesh, element = Y.V.mesh(), Y.one.V.ufl_element()
    held = get_embedding_element_for_checkpointing(element, ())
    nodes = Y.one.size if held == element else fd.FunctionSpace(mesh, held).dim()
    start, end = mesh.topology_dm.getChart()
    points = Y.comm.allreduce(end - start)
    # Integers of each point: three a function space, one a label, cones with orientations, and those of a distribution.
    integers = 3 * (3 + 2 * len(set(functions))) + mesh.topology_dm.getNumLabels() + 3 + 2 * 6 + 8
    numbers = 2 * mesh.coordinates.function_space().dim() + nodes * sum(functions) + sum(arrays)
    overhead = (1 << 20) + (len(functions) + len(arrays)) * (1 << 14)
    return 8 * numbers + points * integers * np.dtype(PETSc.IntType).itemsize + overhead


def _label_space(Y: LabelSpace) -> fd.Function:
    """A Function on the space of the label domain: the numbers of the points, or -1 where nodes are not numbered."""
    function = fd.Function(Y.one.V, name="label_space")
    function.dat.data_wo[...] = -1.0 if Y.one.numbers is None else Y.one.numbers
    return function
