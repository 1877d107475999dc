"""A file does no harm to whoever reads it, and a failure does no harm to a file.

Damaged and malicious files, full disks and read-only folders end in one sentence on all ranks. The files of four networks
together have all kinds of groups, datasets and attributes; the tests put wrong values into each of them.
"""

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import firedrake as fd
import h5py
import numpy as np
import pytest
import sympy
from checkpoint_schedules import SingleDiskStorageSchedule
from firedrake import COMM_SELF, COMM_WORLD
from helpers import label_space, laplace, with_channels, without_mpi
from numpy.testing import assert_allclose
from problems import learning_problem

import fem_resnet.io.writing
import fem_resnet.label_domain.laplace
from fem_resnet import (
    Activation,
    Basis,
    Channels,
    Head,
    Kernel,
    LabelSpace,
    LaplaceFunctions,
    Layers,
    Lift,
    NormBounded,
    Parity,
    ResidualNetwork,
    Symmetric,
    cell_indicators,
    files,
    laplace_basis,
    load,
    point_space,
    save,
    stability_report,
)  # fmt: skip
from fem_resnet.label_domain.repeated_basis import RepeatedBasis
from fem_resnet.time_stepping.file_options import refuse_in_file

on_ranks = pytest.mark.parallel([1, 2, 3])
LAST = COMM_WORLD.size - 1


def _learned(alone=False):
    """Learned factors and times, a bias in a basis, a head onto classes."""
    phi = laplace("disk", "CG1", 3, alone)
    net = ResidualNetwork(
        Kernel(phi, learn_factors=True),
        bias=Basis(phi.Y, phi.values[:, :2], "given"),
        layers=Layers(2, learn_times=True),
        solver_parameters={"ts_rk_type": "3bs"},
    )
    return net, Head(net.bases["psi"][0], 3)


def _graph(alone=False):
    """Points of a graph, all matrices between them, values of the bias at each, an expression."""
    ring = np.roll(np.eye(6), 1, axis=0)
    Y = point_space(np.ones(6), graph=ring + ring.T, comm=COMM_SELF if alone else COMM_WORLD)
    s = sympy.Symbol("s")
    cells = cell_indicators(Y)
    net = ResidualNetwork(Kernel(cells, among=NormBounded(2.0)), layers=[0.0, 0.5, 2.0], activation=s / (1 + sympy.exp(-s)))
    return net, Head(cells, laplace_basis(Y, 2), "identity")


def _extruded(alone=False):
    phi = laplace("annulus", "CG2", 3, alone)
    return ResidualNetwork(Kernel(phi, in_time="linear"), bias=phi, layers=1), None


def _channels(alone=False):
    """Two channels, a basis that repeats one of them and one that does not, a nodal bias, a kernel of a set, a lift."""
    phi = with_channels("annulus", "CG1", 3, alone)
    Y = phi.Y
    first = Basis(Y, phi.values[:, :2], "given")
    net = ResidualNetwork(Kernel(phi, among=LaplaceFunctions(phi)), layers=[0.0, 0.5, 2.0])
    return net, Head(phi, first, "identity"), Lift(Y, 2)


def _symmetric(alone=False):
    """Kernels, a head onto one channel, and a lift that keep a reflection with signs."""
    phi = with_channels("annulus", "CG1", 3, alone)
    mirror = Parity(lambda x: x * [1.0, -1.0], (1, -1), output=-1)
    net = ResidualNetwork(Kernel(phi, among=Symmetric(phi, mirror)), bias=None, layers=[0.0, 0.5, 2.0])
    head = Head(phi, phi.one, "identity", symmetries=[mirror])
    head.start("random smooth", seed=1)
    return net, head, Lift(phi.Y, symmetries=[mirror])


def _elsewhere(alone=False):
    """A head onto two channels of an extruded mesh of its own, with Laplace eigenfunctions of each."""
    phi, comm = laplace("disk", "CG1", 3, alone), COMM_SELF if alone else COMM_WORLD
    one = LabelSpace(fd.FunctionSpace(fd.AnnulusMesh(1, 0.4, 3, 12, comm=comm, name="outputs"), "CG", 1))
    onto = RepeatedBasis(Channels(one, 2), laplace_basis(one, 3))
    return ResidualNetwork(phi, layers=1), Head(phi, onto, "identity")


def _onto_a_graph(alone=False):
    """A head onto the points of a graph."""
    phi, comm = laplace("disk", "CG1", 3, alone), COMM_SELF if alone else COMM_WORLD
    ring = np.roll(np.eye(6), 1, axis=0)
    points = point_space(np.ones(6), graph=ring + ring.T, comm=comm)
    return ResidualNetwork(phi, layers=1), Head(phi, laplace_basis(points, 2), "identity")


MAKERS = [_learned, _graph, _extruded, _channels, _symmetric, _elsewhere, _onto_a_graph]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(COMM_WORLD.bcast(str(tmp_path_factory.mktemp("files"))))


@cache
def _file(folder, make):
    """Written by rank 0 alone, so that all ranks craft the same cases of it."""
    path = folder / f"{make.__name__}.h5"
    if COMM_WORLD.rank == 0:
        save(path, *make(alone=True))
    COMM_WORLD.barrier()
    return path


def _craft(folder, make, edit):
    """A copy of a file, edited and sealed again: its checksum is right."""
    path = folder / "crafted.h5"
    if COMM_WORLD.rank == 0:
        shutil.copy(_file(folder, make), path)
        with h5py.File(path, "r+") as file:
            edit(file)
        files.seal(None, path)
    else:
        _file(folder, make)
    COMM_WORLD.barrier()
    return path


def _refused(folder, make, edit) -> str:
    """What `load` says of a crafted file."""
    path = _craft(folder, make, edit)
    with pytest.raises(ValueError) as raised:
        load(path)
    message = str(raised.value)
    assert message.startswith(f"path: {path} holds no network"), message
    assert len(set(COMM_WORLD.allgather(message))) == 1
    return message


# -- each field ------------------------------------------------------------------------------------------------------

#: Texts that may be any.
ANY_TEXT = {"petsc_version_git", "fieldName", "componentName", "firedrake_immersed_cell_orientations"}


def _of_dataset(path):
    """What a dataset is replaced by."""

    def replaced(make):
        def edit(file):
            data = file[path][...]
            attributes = dict(file[path].attrs)
            del file[path]
            make(file, data)
            if file.get(path, getlink=True).__class__ is h5py.HardLink:
                file[path].attrs.update(attributes)

        return edit

    def put(change, **options):
        return replaced(lambda file, data: file.create_dataset(path, data=change(data), **options))

    cases = {
        "missing": replaced(lambda file, data: None),
        "a group": replaced(lambda file, data: file.create_group(path)),
        "complex": put(lambda data: data.astype(complex)),
        "of float32 or int16": put(lambda data: data.astype("f4" if data.dtype.kind == "f" else "i2")),
        "of text": put(lambda data: np.full(data.shape or 1, b"text")),
        "of another rank": put(lambda data: data[..., None]),
        "longer": put(lambda data: np.concatenate([data, data[-1:]]) if len(data) else np.zeros((1, 1), "i4")),
        "declared huge": replaced(
            lambda file, data: file.create_dataset(path, (10**6,) * data.ndim, data.dtype, chunks=(100,) * data.ndim)
        ),
        "compressed": put(lambda data: data if data.size else np.zeros((1, 1), "i4"), compression="gzip"),
        "elsewhere": replaced(lambda file, data: file.__setitem__(path, h5py.ExternalLink("/etc/passwd", "x"))),
    }

    def wrong(data):
        data = data.copy() if data.size else np.zeros((1, 1), "i4")
        data.ravel()[-1:] = np.nan if data.dtype.kind == "f" else -77
        return data

    cases["with NaN or out of range"] = put(wrong)
    if "/labels/" in path:  # which may have any points, also twice
        del cases["longer"]
    return cases


def _of_attribute(path, name):
    def edit(value):
        return lambda file: file[path].attrs.__setitem__(name, value)

    cases = {
        "missing": lambda file: file[path].attrs.__delitem__(name),
        "a list": edit(np.arange(3)),
        "a fraction": edit(0.5),
        "a huge number": edit(10**12),
        "a pickle": edit(np.void(pickle.dumps(print))),
    }
    if name not in ANY_TEXT:
        cases["a text"] = edit("no such thing")
    return cases


def _of_group(path):
    return {
        "missing": lambda file: file.__delitem__(path),
        "a dataset": lambda file: (file.__delitem__(path), file.create_dataset(path, data=np.zeros(2))),
    }


def _fields(path):
    """All fields of a file, as (kind, path, name of an attribute)."""
    found = []
    with h5py.File(path) as file:

        def visit(name, item):
            found.append(("dataset" if isinstance(item, h5py.Dataset) else "group", name, None))
            found.extend(("attribute", name, attribute) for attribute in item.attrs)

        found.extend(("attribute", "/", name) for name in file.attrs)
        file.visititems(visit)
    # Labels, which are the user's, may be missing.
    return [field for field in found if not re.search(r"/labels/[^/]+(/[^/]+)?$", field[1])]


def _walk(folder):
    """(network, field, what it is replaced by, how): a field that several networks have comes once."""
    seen = set()
    for make in MAKERS:
        for kind, path, name in _fields(_file(folder, make)):
            plain = re.sub(r"DM_0x\w+|Vec_0x\w+|[0-9]+", "", f"{path}@{name}")
            if plain in seen:
                continue
            seen.add(plain)
            of = {"dataset": _of_dataset, "group": _of_group}.get(kind)
            for case, edit in (of(path) if of else _of_attribute(path, name)).items():
                yield make, name or path, case, edit


def _all_refused(folder, cases, every, expected):
    """Cases and their messages, of every so many-th case; all must be refused by a message with the expected words."""
    messages, wrong = [], []
    for case, make, edit in list(cases)[::every]:
        try:
            messages.append((case, _refused(folder, make, edit)))
        except BaseException as error:
            wrong.append(f"{case}: {type(error).__name__} {str(error)[:300]}")
    wrong += [f"{case}: {message}" for case, message in messages if not re.search(expected, message)]
    assert not wrong, f"{len(wrong)} wrong, {len(messages)} refused\n" + "\n".join(wrong)
    return messages


#: The walks have some two thousand cases: the default run takes a part of them, of every field and of every kind.
every = pytest.mark.parametrize("every", [11 if COMM_WORLD.size == 1 else 97, pytest.param(1, marks=pytest.mark.slow)])


@on_ranks
@every
def test_whatever_is_wrong_with_a_field_is_one_error_that_names_it(every, folder):
    fields = r"/(fem_resnet|topologies|dmplex_storage_version|petsc_version_git)\b"
    cases = (((make, field, case), make, edit) for make, field, case, edit in _walk(folder))
    messages = _all_refused(folder, cases, every, fields)
    # Where two fields do not fit together, either is named.
    named = sum(field.rsplit("/", 1)[-1] in message for (_, field, _), message in messages)
    assert len(messages) > 700 / every and named > 0.9 * len(messages)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_what_does_not_belong_there_is_named(make, every, folder):
    with h5py.File(_file(folder, make)) as file:
        groups = ["/"]
        file.visititems(lambda name, item: groups.append(name) if isinstance(item, h5py.Group) else None)
    for group in groups[::every]:
        if not re.search("/labels", group):
            assert "surplus" in _refused(folder, make, lambda file: file[group].create_dataset("surplus", data=np.zeros(2)))
        assert "surplus" in _refused(folder, make, lambda file: file[group].attrs.__setitem__("surplus", 1))


#: What leaves of the settings are replaced by.
VALUES = [None, True, "no such thing", "", -1, 0, 1.5, 10**9, 10**30, [], [1], ["a"], {}, {"a": 1}, float("nan"), float("inf")]
#: Of a setting, those that it may be.
RIGHT = {
    "steps": [1], "layers_per_block": [10**9, 10**30], "learn_factors": [], "learn_times": [], "replay_steps": [True],
    "gradient_flow": [True],
    "bound": [1.5, 10**9, 10**30], "options_prefix": [None], "kernel_set": [], "mesh": [], "solver_parameters": [{}],
    "kinds": ["no such thing", ""], "times": [0, True, 1.5], "lipschitz": [None, 1.5, 10**9, 10**30], "sampled": ["", {}],
    "bounded": [True],
}  # fmt: skip


def _leaves(value, path=()):
    yield path
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, (*path, key))
    elif isinstance(value, list) and path[-1:] != ("expression",):
        for number, part in enumerate(value[:2]):
            yield from _leaves(part, (*path, number))


def _set_settings(change):
    def edit(file):
        settings = json.loads(file["fem_resnet"].attrs["settings"])
        file["fem_resnet"].attrs["settings"] = json.dumps(change(settings))

    return edit


def _at(path, value):
    def change(settings):
        if not path:
            return value
        holder = settings
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value
        return settings

    return _set_settings(change)


def _cases_of_settings(folder):
    for make in MAKERS[:2]:
        with h5py.File(_file(folder, make)) as file:
            settings = json.loads(file["fem_resnet"].attrs["settings"])
        for path in _leaves(settings):
            part = settings
            for key in path:
                part = part[key]
            named = next((str(key) for key in reversed(path) if isinstance(key, str)), "settings")
            for value in VALUES:
                if repr(value) != repr(part) and repr(value) not in map(repr, RIGHT.get(named, [])):
                    yield make, path, value, _at(path, value)
            if isinstance(part, dict):
                yield make, path, "surplus", _at((*path, "surplus"), 1)


@on_ranks
@every
def test_whatever_is_wrong_with_a_setting_is_one_error(every, folder):
    cases = (((make, path, value), make, edit) for make, path, value, edit in _cases_of_settings(folder))
    assert len(_all_refused(folder, cases, every, "/fem_resnet|/topologies|solver_parameters")) > 400 / every


# -- what files did --------------------------------------------------------------------------------------------------


@pytest.fixture
def stolen(tmp_path):
    """A file that exists if code of a file has run, or is empty if it has been written to."""
    path = tmp_path / "valuable"
    if COMM_WORLD.rank == 0:
        path.write_text("old")
    COMM_WORLD.barrier()
    yield path
    assert path.read_text() == "old"


class Runs:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


MAP = "firedrake_mesh_name_topology_name_map"


@on_ranks
def test_no_pickle_of_a_file_runs_code(folder, stolen):
    """That is how Firedrake stores dictionaries."""
    bad = np.void(pickle.dumps(Runs(f"truncate -s 0 {stolen}")))
    assert "posix.system" in _refused(folder, _learned, lambda file: file["topologies"].attrs.__setitem__(MAP, bad))


@on_ranks
def test_no_element_of_a_file_runs_code(folder, stolen):
    """Firedrake evaluates its name."""

    def edit(file):
        for topology in file["topologies"].values():
            for mesh in topology["firedrake_meshes"].values():
                mesh.attrs["firedrake_coordinate_element_repr"] = (
                    f"FiniteElement(open({str(stolen)!r}, 'w').name, triangle, 1)"
                )

    assert "firedrake_coordinate_element_repr: expected a finite element" in _refused(folder, _learned, edit)


OPTIONS = {
    "a module": {"pc_type": "python", "pc_python_type": "os.system"},
    "a type of Python": {"pc_type": "python"},
    "a monitor's file": {"ts_monitor": "ascii:{stolen}"},
    "a view's file": {"ts_view": "ascii:{stolen}:ascii_info"},
    "a monitor's file behind a step": {"ts_adapt_monitor": "ascii:{stolen}"},
    "a file of options": {"options_file": "{stolen}"},
    "a log": {"log_view": ":{stolen}"},
    "a trajectory": {"ts_trajectory_dirname": "{stolen}"},
    "a library": {"dll_append": "{stolen}"},
    "a malloc": {"ksp_gmres_restart": 10**9},
    "an endless method": {"ts_type": "irk", "ts_irk_nstages": "100000000"},
    "a dictionary": {"ts": {"monitor": "ascii:{stolen}"}},
}


@on_ranks
@pytest.mark.parametrize("kind", OPTIONS)
def test_options_of_a_file_are_on_a_list_of_harmless_ones(kind, folder, stolen):
    options = json.loads(json.dumps(OPTIONS[kind]).replace("{stolen}", str(stolen)))
    message = _refused(folder, _learned, _at(("network", "solver_parameters"), options))
    assert "solver_parameters" in message and next(iter(options)) in message or kind == "an endless method"


def test_options_that_networks_have_are_harmless():
    for options in (
        {
            "ts_type": "cn",
            "snes_type": "ksponly",
            "ksp_type": "gmres",
            "pc_type": "none",
            "snes_rtol": 1e-9,
            "ts_monitor": None,
        },
        {"ts_type": "rk", "ts_adapt_type": "basic", "ts_rtol": "1e-5", "ts_atol": 1e-8, "ts_max_steps": 1000, "ts_view": None},
    ):
        refuse_in_file(options)


@on_ranks
def test_a_network_that_could_not_be_loaded_is_not_saved(folder):
    net, _ = _learned()
    other = net.replace(solver_parameters={"ts_monitor": "ascii:/dev/null"})
    with pytest.raises(ValueError, match="^net: it cannot be written to a file: .*'ts_monitor' 'ascii:/dev/null' has a value"):
        save(folder / "other.h5", other)
    assert not (folder / "other.h5").exists()


@cache
def _nested(levels):
    return "s" if levels == 0 else ["tanh", _nested(levels - 1)]


TREES = {
    "a tower": ["Pow", 10, ["Pow", 10, 8]],
    "a tower in steps": ["Pow", ["Pow", ["Pow", 10, 99], 99], 99],
    "a high power": ["Pow", ["Add", 1, "s"], 10**6],
    "a power of a power": ["Pow", ["Pow", ["Add", 2, "s"], 99], 99],
    "a root of a power": ["Pow", ["Pow", ["Add", 2, "s"], ["Rational", 10**6, 3]], 3],
    "a long number": int("9" * 4000),
    "a deep one": _nested(500),
    "a wide one": ["Add", *(["Mul", k, ["tanh", ["Add", k, "s"]]] for k in range(1, 500))],
    "many cases": ["Add", *(["Abs", ["Add", k, "s"]] for k in range(1, 40))],
    "many maxima": ["Max", *(["Mul", k, "s"] for k in range(1, 40))],
    "no number": ["Pow", 0, -1],
}


@pytest.mark.parametrize("kind", TREES)
def test_an_expression_of_a_file_is_of_bounded_size(kind, folder):
    properties = Activation.from_sympy(sympy.tanh(sympy.Symbol("s"))).description["properties"]
    description = {"expression": TREES[kind], "properties": properties}
    assert "/settings" in _refused(folder, _learned, _at(("network", "activation"), description))


def test_an_expression_that_could_not_be_read_is_not_described():
    s = sympy.Symbol("s")
    with pytest.raises(ValueError, match="expected exponents up to 100"):
        Activation.from_sympy(sympy.tanh(s) ** 101).description  # noqa: B018


def _replace(name, data):
    def edit(file):
        del file[f"fem_resnet/{name}"]
        file[f"fem_resnet/{name}"] = data

    return edit


def _declare(name, shape):
    def edit(file):
        del file[f"fem_resnet/{name}"]
        file.create_dataset(f"fem_resnet/{name}", shape, "f8", chunks=(100, 100))

    return edit


def _both(*edits):
    return lambda file: [edit(file) for edit in edits]


FOUND = {
    "18,000 x 18,000 declared": (_learned, _declare("kernel_0", (18_000, 18_000)), "kernel_0"),
    "classes": (_learned, _at(("head", "classes"), 10**7), "W_0"),
    "fields of a lift": (_channels, _at(("lift", "fields"), 3), "V_0"),
    "a lift that is a number": (_channels, _at(("lift",), 3), "lift"),
    "a lift with other entries": (_symmetric, _replace("V_allowed", np.full((2, 1), 7)), "V_allowed"),
    "a field that no channel takes": (_symmetric, _replace("V_allowed", np.zeros((2, 1), int)), "V_allowed"),
    "a head of no orthonormal W": (_symmetric, _replace("W_values", np.ones(9)), "W_"),
    "a head of W elsewhere": (_symmetric, _replace("W_places", np.full(9, 10**6)), "W_"),
    "more W than entries": (_symmetric, _at(("head", "kept", "W"), 10**9), "W_"),
    "fewer mu": (_symmetric, _at(("head", "kept", "mu"), 0), "mu_"),
    "classes that symmetries act on": (_symmetric, _at(("head", "classes"), 3), "head"),
    "an output on a channel where there are none": (_learned, _at(("head", "one_channel"), True), "head"),
    "steps": (_learned, _at(("network", "steps"), 10**9), "steps"),
    "complex": (_learned, _replace("kernel_0", np.ones((3, 3), complex)), "kernel_0"),
    "NaN": (_learned, _replace("kernel_0", np.full((3, 3), np.nan)), "kernel_0"),
    "indptr that falls": (_graph, _replace("graph_indptr", np.array([0, 12, 2, 4, 6, 8, 12], "i4")), "graph_indptr"),
    "indptr too far": (_graph, _replace("graph_indptr", np.array([0, 2, 4, 6, 8, 10, 10**6], "i4")), "graph_indptr"),
    "indices too far": (_graph, _replace("graph_indices", np.full(12, 10**6, "i4")), "graph_indices"),
    "a graph that is not symmetric": (_graph, _replace("graph_data", np.arange(12.0)), "graph"),
    "layers without end": (
        _learned,
        _both(_at(("network", "times"), list(range(10**5))), _at(("network", "kernel_in_time"), "layers")),
        "bias_",
    ),
}


@on_ranks
@pytest.mark.parametrize("case", FOUND)
def test_what_crashed_hung_or_was_taken_is_refused(case, folder):
    make, edit, field = FOUND[case]
    assert field in _refused(folder, make, edit)


def _cones(change):
    def edit(file):
        for topology in file["topologies"].values():
            cells = sorted(topology["topology/strata"])[-1]
            cones = topology[f"topology/strata/{cells}/cones"]
            cones[...] = change(cones[...])

    return edit


@on_ranks
@pytest.mark.parametrize(
    "change", [np.flipud, lambda cones: np.roll(cones, 1, axis=0), np.zeros_like], ids=["flipped", "moved", "zero"]
)
def test_cells_whose_faces_do_not_fit_together_are_no_mesh(change, folder):
    _refused(folder, _learned, _cones(change))


@on_ranks
@pytest.mark.parametrize("name", ["order", "section/atlasOff"])
def test_numbers_that_occur_twice_in_a_section_are_refused(name, folder):
    """Each is in range: Firedrake would read one vector's entry twice and another never."""

    def edit(file):
        for topology in file["topologies"].values():
            for section in topology["dms"].values():
                numbers = section[name][...]
                counted = np.flatnonzero(section["section/atlasDof"][:, 0])
                numbers[counted[0]] = numbers[counted[1]]
                section[name][...] = numbers

    assert name in _refused(folder, _graph, edit)


# -- damage ----------------------------------------------------------------------------------------------------------


@on_ranks
def test_a_flipped_bit_or_a_lost_end_is_seen_before_HDF5_opens_the_file(folder, rng):
    whole = _file(folder, _learned).read_bytes()
    path = folder / "damaged.h5"
    for case in range(60 if COMM_WORLD.size == 1 else 12):
        place, bit, length = int(rng.integers(len(whole))), int(rng.integers(8)), int(rng.integers(len(whole)))
        if COMM_WORLD.rank == 0:
            data = bytearray(whole)
            data[place] ^= 1 << bit
            path.write_bytes(data[:length] if case % 3 == 0 else data)
        COMM_WORLD.barrier()
        with pytest.raises(
            ValueError, match=r"^path: .*damaged.h5 holds no network of format 7: it(s checksum| does not end)"
        ):
            load(path)
        COMM_WORLD.barrier()


FLIPS = """
import faulthandler, sys
from pathlib import Path
from fem_resnet import files, load
faulthandler.enable()  # after PETSc, whose handler would end in MPI_Abort
path, source = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes()
for place in map(int, sys.argv[3:]):
    data = bytearray(source[: -files._SEAL_LENGTH])
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    files.seal(None, path)
    print(place, flush=True)
    try:
        load(path)
    except ValueError:
        pass
"""


@pytest.mark.slow
def test_flipped_bits_with_a_right_checksum_crash_nothing_but_HDF5(folder, rng, tmp_path):
    """HDF5 1.10 follows some addresses in its own tables unchecked. The fields of the file are checked, and crash nothing."""
    source = _file(folder, _learned)
    (tmp_path / "flips.py").write_text(FLIPS)
    places, crashes = [str(place) for place in rng.integers(8 * (source.stat().st_size - 200), size=200)], 0
    while places:
        command = [sys.executable, tmp_path / "flips.py", tmp_path / "flipped.h5", source, *places]
        result = subprocess.run(command, env=without_mpi(), capture_output=True, text=True, timeout=170)
        places = places[len(result.stdout.split()) :]
        if result.returncode:
            crashes += 1
            assert re.search(r'most recent call first\):\n  File ".*/h5py/', result.stderr), result.stderr[-3000:]
    assert crashes <= 4


@on_ranks
def test_the_checksum_does_not_depend_on_the_ranks(folder, monkeypatch):
    path = folder / "any"
    if COMM_WORLD.rank == 0:
        path.write_bytes(np.arange(100_003, dtype="u1").tobytes())
    COMM_WORLD.barrier()
    monkeypatch.setattr(files, "_PIECE", 1000)
    files.seal(COMM_WORLD, path)
    files.sealed(COMM_SELF, path)
    files.sealed(COMM_WORLD, path)
    assert files.unsealed(path) == np.arange(100_003, dtype="u1").tobytes()
    COMM_WORLD.barrier()


@on_ranks
def test_a_file_is_an_HDF5_file_that_h5py_opens_and_says_nothing_of_ranks(folder):
    path = folder / "any.h5"
    save(path, *_learned())
    with h5py.File(path) as file:
        assert file["fem_resnet/kernel_0"].shape == (3, 3)
        names = []
        file.visit(names.append)
    assert not [name for name in names if re.search("distributions|pyop2|celltype|_facets", name)]
    COMM_WORLD.barrier()


# -- what cannot be written ------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("make", MAKERS if COMM_WORLD.size == 1 else MAKERS[:1])
def test_room_is_kept_for_all_of_a_file(make, tmp_path, monkeypatch):
    sizes, reserve = [], files.reserve
    monkeypatch.setattr(fem_resnet.io.writing, "reserve", lambda path, size: sizes.append(size) or reserve(path, size))
    save(tmp_path / "network.h5", *make())
    if COMM_WORLD.rank == 0:
        assert (tmp_path / "network.h5").stat().st_size < sizes[0]


def test_where_no_room_can_be_kept_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *arguments, **options: object())
    path = tmp_path / "file"
    path.write_bytes(b"")
    files.reserve(path, 1000)
    assert path.stat().st_blocks == 0
    with pytest.raises(OSError, match="No space left on device: 1.15e[+]12 MB are needed"):
        files.reserve(path, 1 << 60)


def test_room_that_is_kept_does_not_make_a_file_longer(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"")
    files.reserve(path, 1 << 20)
    assert path.stat().st_size == 0


def _fails(error):
    def fail(*arguments, **options):
        raise error

    return fail


#: What fails, and on which rank; on all ranks where it is collective.
FAILURES = [
    (fem_resnet.io.writing, "reserve", 0), (files.os, "fsync", LAST), (files.os, "replace", 0),
    (fd.CheckpointFile, "save_function", None), (fd.CheckpointFile, "close", None),
]  # fmt: skip


@on_ranks
def test_a_save_that_fails_is_one_error_and_leaves_the_old_file(tmp_path, monkeypatch):
    path, net = tmp_path / "network.h5", _graph()[0]
    if COMM_WORLD.rank == 0:
        path.write_text("old")
    for module, name, rank in FAILURES:
        with monkeypatch.context() as patch:
            if rank in (None, COMM_WORLD.rank):
                patch.setattr(module, name, _fails(OSError(errno.ENOSPC, "No space left on device")))
            with pytest.raises(OSError, match=r"^path: .*network.h5 was not written, and stays as it was: .*No space left on"):
                save(path, net)
            COMM_WORLD.barrier()
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["network.h5"], name
        COMM_WORLD.barrier()
    save(path, net)
    load(path)


@on_ranks
def test_a_save_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda file: done.append(os.readlink(f"/proc/self/fd/{file}")) or fsync(file))
    monkeypatch.setattr(files.os, "replace", lambda one, other: done.append("rename") or replace(one, other))
    save(tmp_path / "network.h5", *_graph())
    part = f"{tmp_path}/network.h5.part"
    assert done == ([part, "rename", str(tmp_path)] if COMM_WORLD.rank == 0 else [part])


ENDS = """
import os, subprocess, sys
from firedrake import COMM_WORLD as comm, FunctionSpace, UnitIntervalMesh
from fem_resnet import LabelSpace, ResidualNetwork, laplace_basis, load, save, stability_report
import fem_resnet.io.writing, fem_resnet.ranks
fem_resnet.ranks._PATIENCE = 1.0
place = os.environ["PLACE"]
path, filler = place + "/n.h5", place + "/filler"
Y = LabelSpace(FunctionSpace(UnitIntervalMesh(2000), "CG", 1))
net = ResidualNetwork(laplace_basis(Y, 3), layers=1)

def on_first(run):
    if comm.rank == 0:
        run()
    comm.barrier()

def fill():
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(bytes(1024)):
                pass
        except OSError:
            pass

def ends(case, run):
    comm.barrier()
    try:
        run()
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
    else:
        words = "nothing"
    whole = open(path).read() == "old" and set(os.listdir(place)) <= {"n.h5", "filler"}
    for line in comm.gather(f"{case} | {comm.rank} | {whole} | {words}") or []:
        print(line, flush=True)
    comm.barrier()

def report(**names):
    return lambda: stability_report(net, Y.batch(Y.weights), **names)

on_first(lambda: open(path, "w").write("old"))
ends("damaged", lambda: load(path))
ends("picture", report(png=place + "/page.xyz"))
on_first(fill)
ends("full save", lambda: save(path, net))
ends("full report", report(json=path))
on_first(lambda: os.remove(filler))
on_first(lambda: subprocess.run(["mount", "-o", "remount,ro", place], check=True))
ends("read-only save", lambda: save(path, net))
ends("read-only report", report(json=path, png=place + "/page.png"))
on_first(lambda: subprocess.run(["mount", "-o", "remount,rw", place], check=True))
on_first(fill)
if "unreserved" in sys.argv:
    fem_resnet.io.writing.reserve = lambda path, size: None
save(path, net)
"""

#: What each case says, on all ranks.
SENTENCES = {
    "damaged": "ValueError: path: .*n.h5 holds no network of format 7: it does not end with a checksum",
    "picture": "ValueError: png: expected the name of a file that ends with .png",
    "full save": "OSError: path: .*n.h5 was not written, and stays as it was: .*No space left on device",
    "full report": "OSError: .*No space left on device",
    "read-only save": "OSError: path: .*n.h5 was not written, and stays as it was: .*Read-only file system",
    "read-only report": "OSError: .*Read-only file system",
}


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="unshare, of util-linux, may not make a mount namespace here",
)
@pytest.mark.parametrize(
    "ranks, how", [(1, "unreserved"), (2, "reserved"), pytest.param(2, "unreserved", marks=pytest.mark.slow)]
)
def test_damage_and_disks_that_take_nothing_are_one_sentence_on_all_ranks_and_exit_code_1(ranks, how, tmp_path, alone):
    """On a small file system; in the end a disk is full, also where no room could be kept, and one rank alone sees it."""
    (tmp_path / "small").mkdir()
    (tmp_path / "script.py").write_text(ENDS)
    command = [sys.executable, "-m", "mpi4py", str(tmp_path / "script.py"), how]
    if ranks > 1:
        command = ["mpiexec", "-n", str(ranks), *command]
    mount = (
        'mount -t tmpfs -o size=100k tmpfs "$PLACE" && "$@"; code=$?; test "$(cat "$PLACE/n.h5")" = old || exit 99; exit $code'
    )
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "sh", *command], capture_output=True, text=True, timeout=150, cwd=tmp_path,
        env=without_mpi() | {"OMPI_MCA_mpi_yield_when_idle": "1", "PLACE": str(tmp_path / "small")},
    )  # fmt: skip
    told = [line.split(" | ", 3) for line in result.stdout.splitlines() if " | " in line]
    assert [line[:2] for line in told] == [[case, str(rank)] for case in SENTENCES for rank in range(ranks)], result.stderr[
        -3000:
    ]
    for case, _, whole, words in told:
        assert whole == "True" and re.match(SENTENCES[case], words), (case, words)
    sentence = r"^\w*Error.*(was not written|while the others wait)"
    assert result.returncode == 1 and re.search(sentence, result.stderr, re.MULTILINE), result.stderr


# -- reports ---------------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("where", ["page.xyz", "nowhere/page.png", "."])
def test_a_picture_that_cannot_be_written_is_refused_on_all_ranks_before_the_work(where, tmp_path, monkeypatch):
    monkeypatch.setattr("fem_resnet.theory.sensitivity.report.LinearisedFlow", _fails(AssertionError("worked")))
    net, _ = _extruded()
    with pytest.raises((ValueError, OSError), match="^png: "):
        stability_report(net, net.Y.batch(net.Y.weights), png=tmp_path / where)


@on_ranks
@pytest.mark.parametrize("error", [OSError("full"), ValueError("no such font"), KeyboardInterrupt()])
def test_what_drawing_raises_on_rank_0_all_raise_and_the_old_picture_stays(error, tmp_path, monkeypatch):
    net, _ = _extruded()
    path = tmp_path / "page.png"
    if COMM_WORLD.rank == 0:
        path.write_text("old")
    COMM_WORLD.barrier()

    def half(self, name, **options):
        Path(name).write_text("half")
        raise error

    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.print_figure", half)
    with pytest.raises(type(error)):
        stability_report(net, net.Y.batch(net.Y.weights), png=path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["page.png"]


def test_what_is_no_regular_file_is_written_to_as_it_is(tmp_path):
    with files.aside("/dev/null") as part:
        assert part == Path("/dev/null")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with files.aside(tmp_path / "link") as part:
        part.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


# -- the cache of eigenfunctions -------------------------------------------------------------------------------------


def _cached(tmp_path, monkeypatch, damage):
    """A cache that is damaged on the last rank; then whether all ranks have solved again, and what they got."""
    Y = label_space("disk", "CG1")
    first = laplace_basis(Y, 3, cache=tmp_path)
    if COMM_WORLD.rank == LAST:
        (file,) = tmp_path.glob(f"*-{LAST}.npz")
        damage(file)
    COMM_WORLD.barrier()
    solved, solve = [], fem_resnet.label_domain.laplace.eigenfunctions
    with monkeypatch.context() as patch:
        patch.setattr(
            fem_resnet.label_domain.laplace, "eigenfunctions", lambda *arguments: solved.append(1) or solve(*arguments)
        )
        again = laplace_basis(Y, 3, cache=tmp_path)
        assert solved == [1]
        assert_allclose(again.values, first.values, rtol=0, atol=1e-9)  # solvers sum in any order
        laplace_basis(Y, 3, cache=tmp_path)
        assert solved == [1], "what was made anew is kept"


def _other_values(file):
    with np.load(file) as arrays:
        held = dict(arrays)
    held["values"] = 2 * held["values"]
    np.savez(file, **held)


def _other_name(file):
    with np.load(file) as arrays:
        held = dict(arrays)
    np.savez(file, **held | {"name": "another"})
    files.seal(None, file)


def _no_zip(file):
    file.write_bytes(b"no zip")
    files.seal(None, file)


DAMAGES = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-200]),
    "other values": _other_values,
    "empty": lambda file: file.write_bytes(b""),
    "another's": _other_name,
    "no zip": _no_zip,
    "missing": lambda file: file.unlink(),
}


@on_ranks
@pytest.mark.parametrize("kind", list(DAMAGES)[: 9 if COMM_WORLD.size == 1 else 2])
def test_a_cache_that_is_damaged_on_one_rank_is_made_anew_on_all(kind, tmp_path, monkeypatch):
    _cached(tmp_path, monkeypatch, DAMAGES[kind])


@on_ranks
@pytest.mark.parametrize("kind", ["full", "no folder"])
def test_a_cache_that_cannot_be_written_costs_a_warning_and_no_eigenfunctions(kind, tmp_path, monkeypatch, caplog):
    place = tmp_path / "cache"
    if kind == "full":
        monkeypatch.setattr(np, "savez", _fails(OSError(errno.ENOSPC, "No space left on device")))
    elif COMM_WORLD.rank == 0:
        place.write_text("a file")
    COMM_WORLD.barrier()
    found = laplace_basis(label_space("disk", "CG1"), 3, cache=place)
    assert_allclose(found.values, laplace("disk", "CG1", 3).values, rtol=0, atol=1e-9)
    if COMM_WORLD.rank == 0:
        assert "cache: eigenfunctions are not kept" in caplog.text
    assert kind == "no folder" or list(place.iterdir()) == []


# -- checkpoints on disk ---------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("name", ["pwrite", "preadv", "TemporaryFile"])
def test_a_checkpoint_that_one_rank_cannot_store_or_read_is_an_error_on_all(name, monkeypatch):
    net = ResidualNetwork(laplace("disk", "CG1", 3), layers=Layers(3, per_block=1))
    problem = learning_problem(net, head=False).replace(checkpoints=SingleDiskStorageSchedule())
    if COMM_WORLD.rank == LAST:
        module = tempfile if name == "TemporaryFile" else os
        monkeypatch.setattr(module, name, _fails(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left on device"):
        problem.reduced_functional().derivative()
