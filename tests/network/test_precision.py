"""Stages in single precision: what is lost, and what is not."""

import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import laplace
from numpy.linalg import norm
from problems import directions, learning_problem, network
from pyadjoint import taylor_to_dict

from fem_resnet import ResidualNetwork, load, save
from fem_resnet.verify import verify

on_ranks = pytest.mark.parallel([1, 2, 3])

#: float32 rounds to 6e-8 of a number; a few hundred operations in a row, whose errors add up like their root.
SINGLE = 2e-6


def answer(net, **options):
    """J, its derivatives, f and r in the middle, all nodes' parts of them on this rank."""
    problem = learning_problem(net, **options)
    J, run = problem.record()
    derivative = J.derivative()
    return [np.array([float(J.functional)])] + [
        part.dat.data_ro.copy() for part in [*derivative, run.state(1), run.costate(1)]
    ]


def gap(comm, ours, theirs):
    """The largest relative difference, each array of all ranks by its own size."""
    parts = [(norm(a - b) ** 2, norm(b) ** 2) for a, b in zip(ours, theirs, strict=True)]
    sums = comm.allreduce(np.array(parts))
    return float(np.sqrt(sums[:, 0] / sums[:, 1]).max())


@on_ranks
@pytest.mark.parametrize("compiled", ["1", "0"], ids=["compiled", "numpy"])
@pytest.mark.parametrize("domain, element", [("annulus", "DG0"), ("sphere", "CG1")])
@pytest.mark.parametrize("options", [{}, {"gradient_flow": True}, {"solver_parameters": {"ts_rk_type": "3bs"}}], ids=str)
def test_single_precision_loses_what_float32_rounds_and_no_more(domain, element, options, compiled, monkeypatch):
    monkeypatch.setenv("FEM_RESNET_COMPILED", compiled)
    single, double = (network(domain, element, precision=precision, **options) for precision in ("single", "double"))
    difference = gap(single.Y.comm, answer(single), answer(double))
    assert 1e-9 < difference < SINGLE


@on_ranks
@pytest.mark.parametrize("samples", [1, 3, 15, 16, 17, 70])
def test_every_number_of_samples_fits_the_wider_tiles(samples):
    single, double = (network("disk", "CG1", precision=precision) for precision in ("single", "double"))
    found = [answer(net, head=False, samples=samples) for net in (single, double)]
    assert 1e-9 < gap(single.Y.comm, *found) < SINGLE


@on_ranks
def test_gradients_in_single_precision_are_gradients():
    """With steps so long that the noise of float32 in J, 1e-7 of it, is far below the second remainder."""
    net = network("annulus", "CG1", precision="single")
    problem = learning_problem(net)
    J = problem.reduced_functional()
    direction = directions(J, net, problem.parameters)
    rates = taylor_to_dict(J, problem.functions, direction)
    assert min(rates["R0"]["Rate"]) > 0.9 and min(rates["R1"]["Rate"][:2]) > 1.9


def test_verification_knows_what_single_precision_can_be_held_to():
    problem = learning_problem(network("disk", "CG1", precision="single"))
    report = verify(problem)
    assert report.passed, str(report)


@on_ranks
def test_precision_is_kept_in_files(tmp_path):
    path = f"{COMM_WORLD.bcast(str(tmp_path))}/network.h5"
    save(path, network("annulus", "CG1", precision="single"))
    assert load(path)[0].settings.precision == "single"


@on_ranks
def test_unknown_precisions_and_implicit_methods_are_refused():
    phi = laplace("disk", "CG1", 4)
    with pytest.raises(ValueError, match="precision: expected one of 'double', 'single', got 'half'"):
        ResidualNetwork(phi, precision="half")
    with pytest.raises(ValueError, match="precision: expected 'double' with 'cn'"):
        ResidualNetwork(phi, precision="single", solver_parameters={"ts_type": "cn"})
