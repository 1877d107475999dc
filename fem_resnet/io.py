"""Networks in files: one HDF5 file, written by Firedrake's CheckpointFile, read on any number of ranks.

The file holds the mesh, the bases by their node values (cell indicators by name), all coefficients, and the settings of
the network. It says nothing of the ranks that wrote it, and nothing that follows from the rest. It is complete or not there, and
ends with a checksum (`files`). What comes from a file runs no code and takes no more room than the file has: all of it is looked
at (`checkpoint_file`, `_Settings`) before Firedrake and PETSc get it.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import firedrake as fd
import h5py
import numpy as np
import scipy.sparse
from firedrake.embedding import get_embedding_element_for_checkpointing
from mpi4py import MPI
from petsc4py import PETSc
from pyadjoint.tape import stop_annotating

from fem_resnet.activation.activation import Activation
from fem_resnet.arguments import choice, instance, integer
from fem_resnet.checkpoint_file import Group, Wrong, are_all, check_meshes, slices
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.files import Damaged, let_go, put_in_place, reserve, seal, sealed
from fem_resnet.label_domain.basis import Basis, cell_indicators
from fem_resnet.label_domain.graph import checked_graph
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.laplace import move_laplace
from fem_resnet.learning.head import PREDICTIONS, Head
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.network.settings import checked_times, settings_from
from fem_resnet.options import last_words
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import NodalValues, StateValues
from fem_resnet.parameters.stable_kernels import stable_kernel_from
from fem_resnet.parameters.time_basis import get_time_basis
from fem_resnet.petsc import check_plex
from fem_resnet.ranks import in_step, on_first, same, together
from fem_resnet.time_stepping.file_options import refuse_in_file

__all__ = ["load", "save"]

_GROUP = "fem_resnet"
_FORMAT = 3
#: Labels of a DMPlex that Firedrake makes anew, and that depend on the partition.
_LABELS_MADE_ANEW = ("celltype", "exterior_facets", "interior_facets", "pyop2_core", "pyop2_owned", "pyop2_ghost")


# -- writing ---------------------------------------------------------------------------------------------------------


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
    OSError
        If the folder does not exist or is read-only, `path` is a folder, or there is no room; on all ranks alike. An old
        file is then as it was.
    TypeError
        If an argument is of another kind.
    ValueError
        If the head reads another label space, or its output is a function on another one; if options of the network, or its
        activation, are none that a file may have.
    """
    instance("net", net, ResidualNetwork, "save(path, net, head) wants it second")
    instance("head", head, (Head, type(None)))
    path, comm = _path(path), net.Y.comm
    same(comm, path=path)
    on_first(comm, lambda: _check_place(path))
    if head is not None and head.psi.Y is not net.Y:
        raise ValueError(
            f"head: expected one that reads the network's label space {net.Y!r}, got one that reads {head.psi.Y!r}"
        )
    if head is not None and head.classes is None and head.Y is not net.Y:
        raise ValueError(f"head: its output is a function on {head.Y!r}; only classes and {net.Y!r} can be saved")
    bases, roles = _bases(net, head)
    settings = json.dumps(
        {
            "format": _FORMAT,
            "roles": roles,
            "kinds": [basis.kind for basis in bases],
            "mesh": net.Y.V.mesh().name,
            # The given times: learned ones are coefficients, as those of bias and kernel.
            "network": net.settings.description,
            "head": None if head is None else {"classes": head.classes, "prediction": head.prediction.name},
        },
        default=_as_number,
    )
    try:
        _settings(settings)
    except Wrong as error:  # what `load` would refuse is not written
        raise ValueError(f"net: it cannot be written to a file: {error}") from error
    part = path.with_name(path.name + ".part")
    try:
        on_first(comm, lambda: part.write_bytes(b""))
        together(comm, lambda: open(part, "r+b").close())  # all ranks see it
        with stop_annotating(), _opened(part, "w", comm) as file:
            _write_all(file, part, net, head, bases, settings)
        seal(comm, part)
        put_in_place(comm, part, path)
    except BaseException as error:
        if comm.rank == 0:
            with suppress(OSError):
                part.unlink()
        if isinstance(error, (OSError, RuntimeError)):  # of the system, HDF5 and PETSc
            kind = type(error) if isinstance(error, OSError) else OSError
            raise kind(f"path: {path} was not written, and stays as it was: {_words(error)}") from error
        raise


def _as_number(value: Any) -> Any:
    """What JSON takes for a number of NumPy's, as in options."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"net: {type(value).__name__} cannot be written to a file")


def _path(path: str | Path) -> Path:
    return Path(instance("path", path, (str, os.PathLike), "the name of a file"))


def _check_place(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {path.parent} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"path: expected the name of a file, and {path} is a folder")


def _words(error: BaseException) -> str:
    """What an error says, of PETSc's the line that says what is wrong."""
    return last_words(error) if isinstance(error, PETSc.Error) else str(error)


@contextmanager
def _opened(path: Path, mode: str, comm: MPI.Comm) -> Iterator[fd.CheckpointFile]:
    """A file, closed in the end on all ranks, whatever happens; errors within are to be raised on all of them."""
    file = in_step(comm, lambda: fd.CheckpointFile(str(path), mode, comm=comm))
    try:
        yield file
        in_step(comm, file.close)
    except BaseException as error:
        # An HDF5 file does not close while an h5py object in it is alive, as in the frames of an error.
        traceback.clear_frames(error.__traceback__)
        if mode == "w":
            let_go(path)
        with suppress(Exception):
            in_step(comm, file.close)
        raise


def _write_all(
    file: fd.CheckpointFile, part: Path, net: ResidualNetwork, head: Head | None, bases: list[Basis], settings: str
) -> None:
    Y, comm = net.Y, net.Y.comm
    # By name: numbers a node, and what makes the Function, as all of them at once would take much room.
    functions: dict[str, tuple[int, Callable[[], fd.Function]]] = {"label_space": (1, lambda: _label_space(Y))}
    arrays: dict[str, np.ndarray] = {}
    for index, basis in enumerate(bases):
        if basis.kind != "cells":
            functions[f"basis_{index}"] = basis.rank, partial(Y.batch, basis.values)
        if basis.eigenvalues is not None:
            arrays |= {f"eigenvalues_{index}": basis.eigenvalues, f"stiffness_{index}": basis.stiffness}
    if Y.graph is not None:
        arrays |= {f"graph_{name}": getattr(Y.graph, name) for name in _GRAPH}
    for parameter in _parameters(net, head):
        for k, function in enumerate(parameter.functions):
            name = f"{parameter.name}_{k}"
            if isinstance(parameter.space_bases[k], (NodalValues, StateValues)):
                functions[name] = function.function_space().value_size, partial(_itself, function)
            else:
                arrays[name] = parameter.get(k)
    size = _room(Y, [numbers for numbers, _ in functions.values()], [array.size for array in arrays.values()])
    # Errors of a collective write come on some ranks alone: there is to be room for all of it before the first one.
    on_first(comm, lambda: reserve(part, size))

    def write() -> None:
        file.require_group(_GROUP)
        file.save_mesh(Y.V.mesh())
        for name, (_, make) in functions.items():
            file.save_function(make(), name=name)
        file.set_attr(_GROUP, "settings", settings)
        for name, array in arrays.items():
            file.h5pyfile[_GROUP].create_dataset(name, data=array)
        for topology in file.h5pyfile["topologies"].values():
            for group, names in ((topology, ["distributions"]), (topology.get("labels", {}), _LABELS_MADE_ANEW)):
                for name in names:
                    if name in group:
                        del group[name]

    in_step(comm, write)


def _itself(function: fd.Function) -> fd.Function:
    return function


def _room(Y: LabelSpace, functions: Sequence[int], arrays: Sequence[int]) -> int:
    """Bytes that a file has at most, for functions of so many numbers a node, and arrays of so many numbers. Collective."""
    mesh, element = Y.V.mesh(), Y.V.ufl_element()
    held = get_embedding_element_for_checkpointing(element, ())
    nodes = Y.size if held == element else fd.FunctionSpace(mesh, held).dim()
    start, end = mesh.topology_dm.getChart()
    points = Y.comm.allreduce(end - start)
    # Integers a point: three a function space, one a label, cones with orientations, and what a distribution takes.
    integers = 3 * (3 + 2 * len(set(functions))) + mesh.topology_dm.getNumLabels() + 3 + 2 * 6 + 8
    numbers = 2 * mesh.coordinates.function_space().dim() + nodes * sum(functions) + sum(arrays)
    overhead = (1 << 20) + (len(functions) + len(arrays)) * (1 << 14)
    return 8 * numbers + points * integers * np.dtype(PETSc.IntType).itemsize + overhead


def _label_space(Y: LabelSpace) -> fd.Function:
    """Its space, as that of a Function, which holds the numbers of the points where there are any."""
    function = fd.Function(Y.V, name="label_space")
    function.dat.data_wo[...] = -1.0 if Y.numbers is None else Y.numbers
    return function


def _bases(net: ResidualNetwork, head: Head | None) -> tuple[list[Basis], dict[str, list[int | None]]]:
    """The bases, each once, and which of them play which part."""
    parts = net.bases | {
        "head": [None if head is None else head.psi],
        "onto": [None if head is None or head.classes else head.onto],
    }
    bases = list(dict.fromkeys(basis for part in parts.values() for basis in part if basis is not None))
    position = {basis: index for index, basis in enumerate(bases)}
    return bases, {name: [position.get(basis) for basis in part] for name, part in parts.items()}


def _parameters(net: ResidualNetwork, head: Head | None) -> list[Parameter]:
    return net.parameters + ([] if head is None else head.parameters)


# -- reading ---------------------------------------------------------------------------------------------------------


def load(path: str | Path, comm: MPI.Comm = MPI.COMM_WORLD) -> tuple[ResidualNetwork, Head | None]:
    """Read what `save` wrote, on any number of ranks. Collective over `comm`.

    A file runs no code, whoever has written it: its options are on a list of harmless ones, and so is all else.

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
        If `path` is no path, or `comm` no communicator.
    OSError
        If there is no such file, or it cannot be read; on all ranks alike.
    ValueError
        If it holds no network, or one of another format, was damaged or changed, or has a field that `save` does not write.
    """
    path = _path(path)
    instance("comm", comm, MPI.Comm)
    same(comm, path=path)
    if not on_first(comm, path.is_file):
        raise FileNotFoundError(f"path: there is no file {path}")
    with _naming(path):
        sealed(comm, path)
        settings, topology = on_first(comm, lambda: _look(path))
        with stop_annotating(), _opened(path, "r", comm) as file:
            return in_step(comm, lambda: _read_all(file, settings, topology))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file is a ValueError with its name."""
    try:
        yield
    except Damaged as error:
        raise ValueError(f"path: {path} holds no network of format {_FORMAT}: {error}") from error
    except Exception as error:  # of Firedrake and PETSc too, for what they make of a file that fits together but is no mesh
        if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno is not None:  # h5py's has none
            raise
        raise ValueError(f"path: {path} holds no network as save writes it: {_words(error)}") from error


def _look(path: Path) -> tuple[dict, str]:
    """Look at all of a file, on one rank: its settings, and the name of its mesh's topology."""
    try:
        with h5py.File(path, "r") as file, Group(file) as root, root.group(_GROUP) as group:
            settings = _settings(group.text("settings"))
            functions, topology = check_meshes(root, settings["mesh"])
            _look_at_arrays(group, settings, functions)
            return settings, topology
    except OSError as error:  # of HDF5: the file could be read
        raise Wrong(f"it is no whole HDF5 file: {error}") from error


#: What a graph is made of.
_GRAPH = ("data", "indices", "indptr")
#: Steps a layer, beyond which a file is not taken at its word: making the network takes time and room with their number.
_MOST_STEPS = 1_000_000
#: Numbers in a dense basis of cell indicators that no kernel of the file accounts for.
_MOST_INDICATORS = 1 << 27


def _flag(name: str, value: Any) -> None:
    instance(name, value, bool)


def _in_time(name: str, value: Any) -> None:
    if not isinstance(instance(name, value, (str, list)), str):
        for number in value:
            integer(name, number, least=0)


def _options(name: str, value: Any) -> None:
    refuse_in_file(instance(name, value, dict))


#: How each argument of a network is looked at; what hangs together the constructor looks at.
_OF_NETWORK: dict[str, Callable[[str, Any], object]] = {
    "times": lambda name, value: checked_times(instance(name, value, list)),
    "bias_in_time": _in_time,
    "kernel_in_time": _in_time,
    "activation": lambda name, value: Activation.from_description(instance(name, value, dict)),
    "steps": lambda name, value: integer(name, value, most=_MOST_STEPS),
    "layers_per_block": integer,
    "solver_parameters": _options,
    "options_prefix": lambda name, value: instance(name, value, type(None)),
    "learn_factors": _flag,
    "learn_times": _flag,
    "replay_steps": _flag,
    "gradient_flow": _flag,
    "stable_kernel": lambda name, value: stable_kernel_from(instance(name, value, (dict, type(None)))),
    "precision": lambda name, value: choice(name, value, ("double", "single")),
}


def _settings(text: str) -> dict[str, Any]:
    """The settings in a file, each looked at; which arrays and functions there are follows from them."""
    where = f"/{_GROUP}/settings"
    try:
        settings = json.loads(text, parse_constant=lambda name: _refuse(f"{name} is no number"))
        given = instance("settings", settings, dict).get("format")
        if given != _FORMAT:
            raise ValueError(f"it has format {str(given)[:20]}, this version reads {_FORMAT}")
        _keys("settings", settings, ("format", "roles", "kinds", "mesh", "network", "head"))
        where += "/"
        instance("mesh", settings["mesh"], str)
        for kind in instance("kinds", settings["kinds"], list):
            instance("kinds", kind, str)
        _keys("network", settings["network"], _OF_NETWORK)
        for name, check in _OF_NETWORK.items():
            check(name, settings["network"][name])
        for name in ("bias_in_time", "kernel_in_time"):
            get_time_basis(settings["network"][name], settings["network"]["times"], name)
        head = instance("head", settings["head"], (dict, type(None)))
        if head is not None:
            _keys("head", head, ("classes", "prediction"))
            choice("prediction", head["prediction"], PREDICTIONS)
            if head["classes"] is not None:
                integer("classes", head["classes"])
        _roles(settings)
    except (TypeError, ValueError, RecursionError, ArithmeticError, MemoryError) as error:
        raise Wrong(f"{where}{error}") from error
    return settings


def _refuse(message: str) -> None:
    raise ValueError(message)


def _keys(name: str, value: Any, wanted: Iterable[str]) -> None:
    different = sorted(set(instance(name, value, dict)) ^ set(wanted))
    if different:
        raise ValueError(f"{name}: {different[0]!r} is missing, or is nothing that belongs there")


def _roles(settings: Mapping[str, Any]) -> None:
    """Which bases play which part: numbers of bases, or None where there is none."""
    layers, head = len(settings["network"]["times"]) - 1, settings["head"]
    _keys("roles", settings["roles"], ("phi", "psi", "bias", "head", "onto"))
    for name, indices in settings["roles"].items():
        lengths = (1,) if name in ("head", "onto") else (1, layers)
        if len(instance("roles", indices, list)) not in lengths:
            raise ValueError(f"roles: {name!r} has one basis, or one a layer, and has {len(indices)}")
        has_one = {"head": head is not None, "onto": head is not None and head["classes"] is None}.get(name, True)
        for index in indices:
            if index is None and (name == "bias" or not has_one):
                continue
            if not has_one:
                raise ValueError(f"roles: {name!r} has no basis here")
            integer(f"roles: {name!r}", index, least=0, most=len(settings["kinds"]) - 1)
    used = {index for indices in settings["roles"].values() for index in indices}
    if not used >= set(range(len(settings["kinds"]))):
        raise ValueError("kinds: there is a basis that plays no part")


def _look_at_arrays(group: Group, settings: Mapping[str, Any], functions: Mapping[str, tuple[int, h5py.Dataset]]) -> None:
    """That arrays and functions are those of these settings, with the shapes that follow from their bases."""
    network, roles, head = settings["network"], settings["roles"], settings["head"]
    left = dict(functions)

    def function(name: str, numbers: int | None = None) -> h5py.Dataset:
        block, data = left.pop(name, (0, None))
        if data is None:
            raise Wrong(f"/{_GROUP}: expected the function {name!r}, and is missing")
        if numbers not in (None, block) or numbers is not None and data.size != numbers * nodes:
            raise Wrong(f"{data.name}: expected {numbers} numbers at each of {nodes} nodes, and it has {data.size}")
        return data

    places = function("label_space")
    nodes = places.size
    of_points = _look_at_numbers(places)
    if any(f"graph_{name}" in group for name in _GRAPH):
        if not of_points:
            raise Wrong(f"{group.name}/graph_{_GRAPH[0]}: expected a set of points with a graph")
        _look_at_graph(group, nodes)
    ranks = []
    for index, kind in enumerate(settings["kinds"]):
        ranks.append(nodes if kind == "cells" else function(f"basis_{index}").size // nodes)
        if kind != "cells" and functions[f"basis_{index}"][0] != ranks[-1]:
            raise Wrong(f"{functions[f'basis_{index}'][1].name}: its block size is not its numbers at a node")
        if f"eigenvalues_{index}" in group or f"stiffness_{index}" in group:
            group.array(f"eigenvalues_{index}", "f8", (ranks[-1],))
            group.array(f"stiffness_{index}", "f8", (ranks[-1], ranks[-1]))
    if "cells" in settings["kinds"] and nodes**2 > _MOST_INDICATORS:
        cells = settings["kinds"].index("cells")
        if cells not in roles["phi"] or cells not in roles["psi"]:
            raise Wrong(f"/{_GROUP}/settings/kinds: expected indicators of {nodes} cells for kernels alone")
    stable = stable_kernel_from(network["stable_kernel"])
    for name in ("bias", "kernel"):
        times = get_time_basis(network[f"{name}_in_time"], network["times"])
        of_function: dict[int, int] = {}
        for layer in range(len(network["times"]) - 1):
            for k in times.active(layer):
                of_function.setdefault(k, layer)
        for k in range(len(times.measures)):
            part = {role: of[of_function.get(k, 0) if len(of) > 1 else 0] for role, of in roles.items()}
            if name == "bias" and part["bias"] is None:
                function(f"bias_{k}", 1)
            elif name == "bias":
                group.array(f"bias_{k}", "f8", (ranks[part["bias"]],))
            else:
                shape = ranks[part["phi"]], ranks[part["psi"]]
                if stable is None:
                    group.array(f"kernel_{k}", "f8", shape)
                else:
                    group.array(f"kernel_controls_{k}", "f8", stable.shape(*shape))
    if network["learn_times"]:
        group.array("layer_times_0", "f8", (len(network["times"]) - 1,))
    if network["learn_factors"]:
        for name in ("phi", "psi"):
            function(f"{name}_0", ranks[roles[name][0]])
    if head is not None:
        outputs = head["classes"] or ranks[roles["onto"][0]]
        group.array("W_0", "f8", (outputs, ranks[roles["head"][0]]))
        group.array("mu_0", "f8", (outputs,))
    if left:
        raise Wrong(f"{min(left)}: it is a function that plays no part")


def _look_at_numbers(places: h5py.Dataset) -> bool:
    """Whether these are the numbers of points, each once; else all are -1."""
    if all((part < -0.5).all() for part in slices(places)):  # -1, or what a projection makes of it
        return False
    whole = all((part == np.rint(part)).all() and part.min() >= 0 for part in slices(places))
    if not (whole and are_all(slices(places), places.size)):
        raise Wrong(f"{places.name}: expected the numbers of all points, each once, or -1")
    return True


def _look_at_graph(group: Group, nodes: int) -> None:
    entries = group.array(f"graph_{_GRAPH[0]}", "f8", (None,), 0.0).size
    group.array(f"graph_{_GRAPH[1]}", "i", (entries,), 0, nodes)
    starts = group.array(f"graph_{_GRAPH[2]}", "i", (nodes + 1,), 0, entries + 1)
    last = 0
    for part in slices(starts):
        if part[0] < last or (np.diff(part) < 0).any():
            raise Wrong(f"{starts.name}: expected numbers that do not fall")
        last = part[-1]
    if starts[0] != 0 or last != entries:
        raise Wrong(f"{starts.name}: expected numbers from 0 to {entries}")


def _read_all(file: fd.CheckpointFile, settings: Mapping[str, Any], topology: str) -> tuple[ResidualNetwork, Head | None]:
    _check_topology(file, topology)
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
            _read(file, f"stiffness_{index}"),
        )
        for index, kind in enumerate(settings["kinds"])
    ]
    # None stands for no basis: of a bias with a value at every node, of a head that is not there.
    role = {
        name: [None if index is None else bases[index] for index in indices] for name, indices in settings["roles"].items()
    }
    net = ResidualNetwork(**settings_from(settings["network"], role["phi"], role["psi"], role["bias"]))
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


def _check_topology(file: fd.CheckpointFile, name: str) -> None:
    """That cones fit together, as each rank sees them; that indices are in range was looked at before."""
    plex = PETSc.DMPlex().create(comm=file.comm)
    plex.setName(name)
    file.viewer.pushFormat(PETSc.Viewer.Format.HDF5_PETSC)
    numbering = plex.topologyLoad(file.viewer)
    file.viewer.popFormat()
    try:
        together(file.comm, lambda: check_plex(plex))
    except PETSc.Error:
        plex.incRef()  # a check that fails leaves a work array checked out, with which no DM can be destroyed
        raise
    numbering.destroy()
    plex.destroy()


def _load_label_space(file: fd.CheckpointFile, mesh: fd.MeshGeometry) -> LabelSpace:
    function = file.load_function(mesh, "label_space")
    V = function.function_space()
    numbers = np.rint(function.dat.data_ro).astype(int)
    if V.mesh().comm.allreduce(numbers.max(initial=-1), op=MPI.MAX) < 0:
        return LabelSpace(V)
    size = V.dof_dset.layout_vec.getSize()
    parts = tuple(_read(file, f"graph_{name}") for name in _GRAPH)
    graph = None if parts[0] is None else checked_graph(scipy.sparse.csr_array(parts, shape=(size, size)), size)
    return LabelSpace(V, numbers=numbers, graph=graph)


def _read(file: fd.CheckpointFile, name: str) -> np.ndarray | None:
    # HDF5 closes a file only when nothing in it is open: h5py's objects must not outlive this call.
    group = file.h5pyfile[_GROUP]
    return group[name][...] if name in group else None
