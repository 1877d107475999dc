"""A network in a file is the same network, whether all ranks wrote it or one, and all ranks read it or each alone."""

import json
from functools import cache
from pathlib import Path

import firedrake as fd
import h5py
import numpy as np
import pytest
from firedrake import COMM_SELF, COMM_WORLD
from helpers import label_space, laplace, set_smooth, smooth
from numpy.testing import assert_allclose, assert_array_equal
from problems import TIMES, coefficients, gathered, gradients, learning_problem, polynomials, taping
from pyadjoint.tape import annotate_tape

from fem_resnet import Channels, Kernel, LabelSpace, Layers, files, laplace_basis, point_space
from fem_resnet.activation.activation import get_activation
from fem_resnet.io.reading import load
from fem_resnet.io.writing import save
from fem_resnet.label_domain.basis import Basis, cell_indicators
from fem_resnet.label_domain.repeated_basis import RepeatedBasis
from fem_resnet.learning.head import Head
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.parameters.space_basis import NodalValues

on_ranks = pytest.mark.parallel([1, 2, 3])

# Sums of some hundred numbers of size one, in another order on another partition.
ROUND_OFF = 1e-12


def _with_head(net, psi, onto=3, prediction="softmax"):
    rng = np.random.default_rng(11)
    head = Head(psi, onto, prediction)
    for parameter in head.parameters:
        parameter.set(0, rng.normal(size=parameter.space_basis.shape))
    return net, head


def _disk_dg0(alone=False):
    """A kernel with any matrix between cells, a bias with a value at every node, an activation with a parameter, no head."""
    cells = cell_indicators(label_space("disk", "DG0", alone=alone))
    return ResidualNetwork(cells, layers=TIMES, activation=get_activation("elu", alpha=0.3)), None


def _sphere_cg1(alone=False):
    """One basis for everything, with its eigenvalues; an immersed mesh."""
    phi = laplace("sphere", "CG1", 4, alone)
    return _with_head(ResidualNetwork(phi, bias=phi, layers=4, final_time=2.5, activation="softplus"), phi)


def _square_cg3(alone=False):
    """Four different bases on a spectral element; another Runge-Kutta method, steps, and cut into Blocks."""
    phi = laplace("square", "CG3", 4, alone)
    bias = Basis(phi.Y, phi.values[:, :2] + 1.0, "given")
    net = ResidualNetwork(
        Kernel(phi, polynomials(phi.Y)),
        bias=bias,
        layers=Layers(TIMES, steps=2, per_block=2),
        activation="arctan",
        solver_parameters={"ts_rk_type": "3bs"},
    )
    return _with_head(net, Basis(phi.Y, phi.values[:, 1:3], "given"), 2)


def _annulus_cg2(alone=False):
    """An extruded mesh that was bent."""
    phi = laplace("annulus", "CG2", 5, alone)
    return _with_head(ResidualNetwork(Kernel(phi, polynomials(phi.Y)), layers=2), phi, 1)


def _cube_cg1(alone=False):
    """A head whose output is a function on the label domain itself."""
    phi = laplace("cube", "CG1", 4, alone)
    return _with_head(ResidualNetwork(phi, layers=2), phi, polynomials(phi.Y), "logistic")


def _no_layers(alone=False):
    """L = 0: a linear classifier."""
    phi = laplace("disk", "DG0", 4, alone)
    return _with_head(ResidualNetwork(phi, layers=0), phi)


def _onto_another_space(alone=False):
    """A head from cells to continuous functions on the same mesh."""
    phi = laplace("disk", "DG0", 4, alone)
    onto = laplace_basis(LabelSpace(fd.FunctionSpace(phi.Y.V.mesh(), "CG", 1)), 3)
    return _with_head(ResidualNetwork(phi, layers=2), phi, onto, "identity")


def _onto_another_mesh(alone=False):
    """A head from a sphere onto two channels of an extruded mesh, one basis for both of them."""
    phi, comm = laplace("sphere", "CG1", 4, alone), COMM_SELF if alone else COMM_WORLD
    mesh = fd.AnnulusMesh(1, 0.4, 3, 12, comm=comm, name="outputs")
    one = LabelSpace(fd.FunctionSpace(mesh, "CG", 1))
    onto = RepeatedBasis(Channels(one, 2), laplace_basis(one, 3))
    return _with_head(ResidualNetwork(phi, layers=2), phi, onto, "identity")


def _onto_points(alone=False):
    """A head onto three numbered points with weights."""
    phi, comm = laplace("sphere", "CG1", 4, alone), COMM_SELF if alone else COMM_WORLD
    points = point_space(weights=[0.5, 1.0, 2.0], comm=comm)
    return _with_head(ResidualNetwork(phi, layers=2), phi, cell_indicators(points), "identity")


MAKERS = [_disk_dg0, _onto_another_mesh, _sphere_cg1, _square_cg3, _onto_points, _annulus_cg2, _cube_cg1, _no_layers]
MAKERS[1:1] = [_onto_another_space]
if COMM_WORLD.size > 1:
    MAKERS = MAKERS[:7]
each_network = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__.strip("_"))


def _made(make, alone=False, seed=0):
    net, head = make(alone)
    set_smooth(net, np.random.default_rng(seed), 0.7)
    return net, head


def _outputs(net, head):
    """f(T) and the head's scores for inputs that are functions of the coordinates."""
    f = net(net.Y.batch(smooth(net.Y)))
    return gathered(net.Y, net.Y.values(f)), None if head is None else head.scores(f)


def _assert_same(found, expected):
    """Two networks with their heads, perhaps on different partitions."""
    for one, other in zip(_outputs(*found), _outputs(*expected)):
        if other is None:
            assert one is None
        else:
            assert_allclose(one, other, rtol=0, atol=ROUND_OFF * max(1, np.abs(other).max()))


# -- round trips -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for files that several tests read; the same on every rank."""
    return Path(COMM_WORLD.bcast(str(tmp_path_factory.mktemp("networks"))))


@cache
def _written(make):
    """The network in `_file`."""
    return _made(make)


@cache
def _file(folder, make, writer="all ranks"):
    """A file, written by all ranks or by one."""
    path = folder / f"{make.__name__}, {writer}.h5"
    if writer == "all ranks":
        save(path, *_written(make))
    elif COMM_WORLD.rank == 0:
        save(path, *_made(make, alone=True))
    COMM_WORLD.barrier()
    return path


@cache
def _read(folder, make):
    """The network that all ranks read from a file that all ranks wrote."""
    return load(_file(folder, make))


@on_ranks
@pytest.mark.parametrize("reader", ["all ranks", "each rank alone"])
@pytest.mark.parametrize("writer", ["all ranks", "one rank"])
@each_network
def test_what_is_read_computes_what_was_written(make, writer, reader, folder):
    comm = COMM_WORLD if reader == "all ranks" else COMM_SELF
    read = load(_file(folder, make, writer), comm)
    assert read[0].Y.comm.size == comm.size
    _assert_same(read, _written(make))


@on_ranks
@each_network
def test_settings_and_coefficients_are_those_that_were_written(make, folder):
    (net, head), (found, found_head) = _written(make), _read(folder, make)
    assert_array_equal(found.times, net.times)
    assert found.activation == net.activation
    assert found.settings.layers == net.settings.layers
    assert found.solver_parameters == net.solver_parameters
    assert found.Y.V.ufl_element() == net.Y.V.ufl_element() and found.Y.size == net.Y.size
    assert abs(found.Y.measure / net.Y.measure - 1) < 1e-13
    assert (found_head is None) == (head is None)
    pairs = list(zip(found.parameters, net.parameters))
    if head is not None:
        assert (found_head.classes, found_head.prediction) == (head.classes, head.prediction)
        pairs += zip(found_head.parameters, head.parameters)
    for one, other in pairs:
        assert type(one.space_basis) is type(other.space_basis) and len(one.functions) == len(other.functions)
        for f, g in zip(one.functions, other.functions):
            assert_array_equal(coefficients(one, f), coefficients(other, g))


def _bases(net, head):
    kernel = net.kernel.space_basis.kernel
    bias = None if isinstance(net.bias.space_basis, NodalValues) else net.bias.space_basis.basis
    heads = [None, None] if head is None else [head.psi, None if head.classes else head.onto]
    return [kernel.phi, kernel.psi, bias, *heads]


@on_ranks
@each_network
def test_bases_are_those_that_were_written_and_one_basis_stays_one(make, folder):
    found, expected = _bases(*_read(folder, make)), _bases(*_written(make))

    def number(bases):
        return [next(k for k, other in enumerate(bases) if other is basis) for basis in bases]

    assert number(found) == number(expected), "bases that were one are two, or two are one"
    for one, other in zip(found, expected):
        if other is not None:
            assert (one.kind, one.rank) == (other.kind, other.rank)
            assert_array_equal(gathered(one.Y, one.values), gathered(other.Y, other.values))
            if other.eigenvalues is None:
                assert one.eigenvalues is None
            else:
                assert_array_equal(one.eigenvalues, other.eigenvalues)


@on_ranks
def test_written_again_the_file_holds_the_same_network(folder):
    """The network replaces the file from which it was read."""
    path = _file(folder, _sphere_cg1)
    save(path, *load(path))
    _assert_same(load(path), _written(_sphere_cg1))


@on_ranks
def test_a_network_that_was_read_goes_on_learning(folder):
    problems = [learning_problem(net, head=False) for net, _ in (_written(_square_cg3), _read(folder, _square_cg3))]
    before, after = (problem.reduced_functional() for problem in problems)
    assert abs(before(problems[0].functions) - after(problems[1].functions)) < ROUND_OFF
    derivatives = [gradients(p, J.derivative(apply_riesz=True)) for p, J in zip(problems, (before, after))]
    for one, other in zip(*derivatives):
        assert_allclose(one, other, rtol=0, atol=1e-10 * np.abs(other).max())


@pytest.mark.parametrize("name", ["network.h5", "network", "a.b.c"])
def test_the_file_has_the_name_that_was_given_and_is_alone(name, tmp_path):
    save(str(tmp_path / name), *_made(_cube_cg1))
    assert sorted(file.name for file in tmp_path.iterdir()) == [name]
    load(str(tmp_path / name))


def test_a_relative_path_is_one_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("network.h5", *_made(_cube_cg1))
    load(Path("network.h5"))
    assert (tmp_path / "network.h5").is_file()


@on_ranks
def test_files_leave_tape_and_annotation_alone(tmp_path, tape):
    written = _made(_sphere_cg1)
    with taping():
        save(tmp_path / "network.h5", *written)
        load(tmp_path / "network.h5")
        assert annotate_tape()
    assert not tape.get_blocks()


def test_several_networks_of_one_mesh_are_several_files(tmp_path):
    written = [_made(_sphere_cg1, seed=seed) for seed in (0, 1)]
    for number, parts in enumerate(written):
        save(tmp_path / f"{number}.h5", *parts)
    read = [load(tmp_path / f"{number}.h5") for number in (0, 1)]
    for found, expected in zip(read, written):
        _assert_same(found, expected)


# -- a file is complete or not there ---------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupt(monkeypatch):
    """``interrupt(call)``: the given call of CheckpointFile.save_function from now on raises, on all ranks."""
    calls, limit, save_function = [], [None], fd.CheckpointFile.save_function

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == limit[0]:
            raise Interrupted
        return save_function(self, *args, **kwargs)

    monkeypatch.setattr(fd.CheckpointFile, "save_function", counted)

    def interrupt(call):
        calls.clear()
        limit[0] = call

    return interrupt


@on_ranks
@pytest.mark.parametrize("call", [1, 4])
def test_a_save_that_is_interrupted_leaves_the_old_file_as_it_was(call, tmp_path, interrupt):
    path, old = tmp_path / "network.h5", _made(_square_cg3)
    save(path, *old)
    before = path.read_bytes()
    interrupt(call)
    with pytest.raises(Interrupted):
        save(path, *_made(_square_cg3, seed=1))
    assert path.read_bytes() == before


@on_ranks
def test_what_an_interrupted_save_has_left_does_not_disturb_the_next_one(tmp_path, interrupt):
    written = _made(_cube_cg1)
    interrupt(2)
    with pytest.raises(Interrupted):
        save(tmp_path / "network.h5", *written)
    interrupt(None)
    save(tmp_path / "network.h5", *written)
    _assert_same(load(tmp_path / "network.h5"), written)


@on_ranks
def test_a_first_save_that_is_interrupted_leaves_no_file(tmp_path, interrupt):
    interrupt(1)
    with pytest.raises(Interrupted):
        save(tmp_path / "network.h5", *_made(_square_cg3))
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "network.h5")


# -- what is refused -------------------------------------------------------------------------------------------------


@on_ranks
def test_refuses_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^path: the folder .*nowhere does not exist"):
        save(tmp_path / "nowhere" / "network.h5", *_made(_cube_cg1))
    assert not list(tmp_path.iterdir())


@on_ranks
def test_refuses_to_write_onto_a_folder(tmp_path):
    """The error is raised on all ranks, although one rank alone renames the file."""
    if COMM_WORLD.rank == 0:
        (tmp_path / "network.h5").mkdir()
    COMM_WORLD.barrier()
    with pytest.raises(IsADirectoryError, match="^path: expected the name of a file, got that of the folder .*network.h5"):
        save(tmp_path / "network.h5", *_made(_cube_cg1))


@on_ranks
@pytest.mark.parametrize("comm", [COMM_WORLD, COMM_SELF], ids=["all ranks", "each rank alone"])
def test_refuses_to_read_what_is_not_there(comm, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^path: there is no file .*network.h5$"):
        load(tmp_path / "network.h5", comm)
    with pytest.raises(FileNotFoundError, match=r"^path: there is no file"):
        load(tmp_path, comm)


@on_ranks
@pytest.mark.parametrize("comm", [COMM_WORLD, COMM_SELF], ids=["all ranks", "each rank alone"])
@pytest.mark.parametrize("kind", ["checkpoint", "hdf5", "text", "empty"])
def test_refuses_a_file_that_is_no_network(kind, comm, tmp_path):
    path = tmp_path / "other.h5"
    if kind == "checkpoint":
        with fd.CheckpointFile(str(path), "w", comm=COMM_WORLD) as file:
            file.save_mesh(label_space("disk", "DG0").V.mesh())
    elif COMM_WORLD.rank == 0:
        if kind == "hdf5":
            with h5py.File(path, "w", driver="mpio", comm=COMM_SELF) as file:
                file["x"] = np.arange(3)
        else:
            path.write_text("no network\n" if kind == "text" else "")
    COMM_WORLD.barrier()
    with pytest.raises(ValueError, match=r"^path: .*other.h5 holds no network"):
        load(path, comm)


@on_ranks
def test_refuses_another_format(tmp_path):
    path = tmp_path / "network.h5"
    save(path, *_made(_cube_cg1))
    if COMM_WORLD.rank == 0:
        with h5py.File(path, "r+", driver="mpio", comm=COMM_SELF) as file:
            attributes = file["fem_resnet"].attrs
            attributes["settings"] = json.dumps(json.loads(attributes["settings"]) | {"format": 99})
        files.seal(None, path)
    COMM_WORLD.barrier()
    with pytest.raises(
        ValueError, match=r"^path: .*network.h5 holds no network.*/settings.* has format 99, this version reads 7"
    ):
        load(path)


@on_ranks
def test_refuses_a_file_that_was_changed(tmp_path):
    """Any write by h5py loses the checksum."""
    path = tmp_path / "network.h5"
    save(path, *_made(_cube_cg1))
    if COMM_WORLD.rank == 0:
        with h5py.File(path, "r+", driver="mpio", comm=COMM_SELF) as file:
            file["fem_resnet/kernel_0"][...] = 1.0
    COMM_WORLD.barrier()
    with pytest.raises(ValueError, match=r"^path: .*network.h5 holds no network of format 7: "):
        load(path)


@on_ranks
def test_refuses_a_head_of_another_network(tmp_path):
    _, head = _made(_sphere_cg1)
    net, _ = _made(_disk_dg0)
    with pytest.raises(
        ValueError, match="^head: expected one that reads the network's label space .*, got one that reads .*$"
    ):
        save(tmp_path / "network.h5", net, head)
    assert not list(tmp_path.iterdir())


@on_ranks
def test_refuses_an_output_on_a_mesh_of_the_same_name(tmp_path):
    net, _ = _made(_sphere_cg1)
    _, head = _with_head(net, net.kernel.space_basis.kernel.phi, laplace("disk", "DG0", 4), "identity")
    with pytest.raises(ValueError, match="^head: expected an output on the network's mesh or on one of another name, got "):
        save(tmp_path / "network.h5", net, head)
    assert not list(tmp_path.iterdir())
