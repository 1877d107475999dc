"""What users of Firedrake are used to works on networks, runs and problems unchanged."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from firedrake import (
    COMM_WORLD,
    CheckpointFile,
    Ensemble,
    Function,
    FunctionSpace,
    PETSc,
    UnitDiskMesh,
    VertexOnlyMesh,
    VTKFile,
    assemble,
    dx,
    grad,
    inner,
    interpolate,
)  # fmt: skip
from firedrake.adjoint import Control, ReducedFunctional, taylor_test
from helpers import without_mpi
from problems import taping
from pyadjoint import Tape, set_working_tape
from pyadjoint.tape import stop_annotating

from fem_resnet import (
    Batch,
    Head,
    LabelSpace,
    LearningProblem,
    ResidualNetwork,
    cross_entropy,
    laplace_basis,
    tikhonov,
    train,
)  # fmt: skip

on_ranks = pytest.mark.parallel([1, 2, 3])


def made(comm=COMM_WORLD, ensemble=None, shift=0):
    """A small problem of three samples, by the public interface alone."""
    Y = LabelSpace(FunctionSpace(UnitDiskMesh(2, comm=comm), "CG", 1))
    phi = laplace_basis(Y, rank=3)
    net = ResidualNetwork(phi, bias=phi, layers=3, final_time=1.0)
    x, y = Y.coordinates.T[:, :, None]
    inputs = Y.batch(np.sin((shift + np.arange(1, 4)) * (x + 0.3 * y)))
    head = Head(phi, onto=2)
    return LearningProblem(net, head, cross_entropy, tikhonov(1e-2), Batch(inputs, [0, 1, 1]), ensemble=ensemble)


@cache
def trained():
    problem = made()
    train(problem, {"tao_max_it": 3}, quiet=True)
    return problem


@cache
def final():
    """f(T) of one sample, a Function on the user's own space."""
    net = trained().net
    with stop_annotating():
        return net.Y.function(net(trained().batch.inputs), 0)


@on_ranks
def test_assemble_on_a_state():
    net, f = trained().net, final()
    assert abs(assemble(f * dx) - net.Y.sum(net.Y.weights @ net.Y.values(f)[:, 0])) < 1e-12
    assert assemble(inner(grad(f), grad(f)) * dx) > 0


@on_ranks
def test_a_point_evaluation_of_a_state_by_a_vertex_only_mesh():
    Y = trained().net.Y
    nodes = slice(0, 30, 7)  # of the first rank: there the values are known
    points, expected = COMM_WORLD.bcast((Y.coordinates[nodes], Y.values(final())[nodes, 0]))
    cloud = VertexOnlyMesh(final().function_space().mesh(), points)
    at_points = assemble(interpolate(final(), FunctionSpace(cloud, "DG", 0)))
    in_order = Function(FunctionSpace(cloud.input_ordering, "DG", 0))
    in_order.interpolate(at_points)
    found = COMM_WORLD.bcast(np.array(in_order.dat.data_ro))
    assert np.abs(found - expected).max() < 1e-12


@on_ranks
def test_a_checkpoint_file_of_a_state(tmp_path):
    name = str(COMM_WORLD.bcast(tmp_path) / "state.h5")
    with CheckpointFile(name, "w") as file:
        file.save_mesh(final().function_space().mesh())
        file.save_function(final(), name="f")
    with CheckpointFile(name, "r") as file:
        mesh = file.load_mesh()
        read = file.load_function(mesh, "f")
    assert abs(assemble(read * read * dx) - assemble(final() * final() * dx)) < 1e-12


@on_ranks
def test_options_of_tao_by_a_prefix_as_on_the_command_line():
    options = PETSc.Options()
    options["mine_tao_max_it"] = 2
    try:
        assert train(made(), options_prefix="mine", quiet=True).iterations == 2
    finally:
        options.delValue("mine_tao_max_it")


@pytest.mark.parallel([2, 3])
def test_an_ensemble_of_problems():
    ensemble = Ensemble(COMM_WORLD, 1)
    problem = made(ensemble.comm, ensemble, shift=ensemble.ensemble_comm.rank)
    result = train(problem, {"tao_max_it": 3}, quiet=True)
    values = ensemble.ensemble_comm.allgather(result.value)
    assert result.values[-1] < result.values[0] and max(values) - min(values) < 1e-13


@on_ranks
def test_a_taylor_test_by_firedrake():
    problem = trained()
    J, _ = problem.record()
    directions = [f.copy(deepcopy=True) for f in problem.functions]
    assert taylor_test(J, problem.functions, directions) > 1.9


@on_ranks
def test_a_functional_in_ufl_of_a_state():
    """Recorded by Firedrake's own blocks after those of the network, and differentiated through both."""
    net = trained().net
    inputs = net.Y.batch(np.cos(net.Y.coordinates[:, :1]))
    with set_working_tape(Tape()), taping():
        f = net(inputs)
        J = assemble(inner(f, f) * dx)
        reduced = ReducedFunctional(J, [Control(each) for each in net.bias.functions])
    directions = [each.copy(deepcopy=True) for each in net.bias.functions]
    assert taylor_test(reduced, net.bias.functions, directions) > 1.9


@on_ranks
def test_a_file_for_paraview(tmp_path):
    folder = COMM_WORLD.bcast(tmp_path)
    try:
        file = VTKFile(str(folder / "state.pvd"))
    except ImportError as error:  # it takes VTK, half a gigabyte, which Firedrake leaves to its users
        pytest.skip(str(error))
    file.write(final())
    assert (folder / "state.pvd").stat().st_size > 0


PROGRAM = """
from firedrake import *
from fem_resnet import *
import numpy as np

Y = LabelSpace(FunctionSpace(UnitDiskMesh(1), "CG", 1))
phi = laplace_basis(Y, rank=3)
net, head = ResidualNetwork(phi, bias=phi, layers=2, final_time=1.0), Head(phi, onto=2)
inputs = Y.batch(np.sin(np.arange(1, 4) * Y.coordinates[:, :1]))
problem = LearningProblem(net, head, cross_entropy, tikhonov(1e-2), Batch(inputs, [0, 1, 1]))
assert logging.__name__ == "firedrake.logging"
train(problem, {"tao_max_it": 1}, quiet=True)
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
train(problem, {"tao_max_it": 1})
"""


@cache
def shown():
    """What a user's script shows, which begins with two stars and is started with options of PETSc."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, "-log_view", "-citations"],
        env=without_mpi() | {"PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


def test_log_view_with_our_stage_and_events():
    for name in ("fem_resnet training", "fem_resnet:train", "fem_resnet:forward", "fem_resnet:adjoint"):
        assert name in shown()


def test_citations_with_the_paper():
    assert "FiredrakeUserManual" in shown() and "LiuMarkowich2020" in shown()


def test_the_star_of_firedrake_brings_a_module_called_logging_which_does_not_matter():
    """The example of the README begins with it, and the page on trainings goes on with `import logging`."""
    assert "iteration    1 of 1   J = " in shown()
