"""Samples over one communicator, the label domain over the other: J, its gradient and training are as on one."""

import firedrake as fd
import numpy as np
import pytest
from helpers import set_smooth, smooth
from numpy.testing import assert_allclose
from problems import gathered

from fem_resnet import Batch, LabelSpace, LearningProblem, ResidualNetwork, cross_entropy, laplace_basis, tikhonov, train
from fem_resnet.learning.head import Head

SAMPLES = 6
OPTIONS = {"tao_max_it": 8, "tao_gatol": 0.0, "tao_grtol": 0.0}


def problem(comm, chosen, ensemble=None, **more):
    """Six samples with weights, of which some are chosen; the same network on any communicator."""
    Y = LabelSpace(fd.FunctionSpace(fd.AnnulusMesh(1, 0.4, 2, 10, comm=comm), "CG", 1))
    net = ResidualNetwork(laplace_basis(Y, 5), layers=2)
    set_smooth(net, np.random.default_rng(1))
    head = Head(laplace_basis(Y, 3), 3)
    head.W.set(0, 0.4 * np.cos(np.arange(9.0)).reshape(3, 3))
    batch = Batch(Y.batch(smooth(Y, SAMPLES)[:, chosen]), np.arange(SAMPLES)[chosen] % 3, 1.0 + np.arange(SAMPLES)[chosen])
    return LearningProblem(net, head, cross_entropy, tikhonov(0.1), batch, ensemble=ensemble, **more)


def answer(of):
    J = of.reduced_functional()
    value = float(J(of.functions))
    parts = [gathered(of.net.Y, g.dat.data_ro) for g in J.derivative()[:2]]  # the bias, at the nodes
    return value, parts, float(of.evaluate()[0])


def members(size):
    """An ensemble whose members have that many ranks, and this member's samples, of unequal numbers."""
    ensemble = fd.Ensemble(fd.COMM_WORLD, size)
    pieces = np.array_split(np.arange(SAMPLES), [2] if ensemble.ensemble_comm.size == 2 else [1, 4])
    return ensemble, pieces[ensemble.ensemble_comm.rank]


@pytest.mark.parallel([2, 3])
def test_members_of_one_rank_give_the_same_as_one_communicator():
    ensemble, chosen = members(1)
    expected = answer(problem(fd.COMM_SELF, np.arange(SAMPLES)))
    found = answer(problem(ensemble.comm, chosen, ensemble))
    assert_allclose(found[0], expected[0], rtol=1e-12)
    assert_allclose(found[2], expected[0], rtol=1e-12)
    for mine, theirs in zip(found[1], expected[1]):
        assert_allclose(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.slow  # four ranks on two cores
@pytest.mark.parallel([4])
def test_members_of_two_ranks_give_the_same_as_one_communicator():
    ensemble, chosen = members(2)
    expected = answer(problem(fd.COMM_WORLD, np.arange(SAMPLES)))
    found = answer(problem(ensemble.comm, chosen, ensemble))
    assert_allclose(found[0], expected[0], rtol=1e-12)
    for mine, theirs in zip(found[1], expected[1]):
        assert_allclose(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parallel([2])
def test_an_ensemble_trains_as_one_communicator_does():
    """L-BFGS takes the same steps on every member, up to round-off that it magnifies."""
    ensemble, chosen = members(1)
    alone, together = problem(fd.COMM_SELF, np.arange(SAMPLES)), problem(ensemble.comm, chosen, ensemble)
    values = [train(of, OPTIONS).values for of in (alone, together)]
    assert_allclose(*values, rtol=1e-8)
    assert ensemble.ensemble_comm.allreduce(float(values[1][-1])) == 2 * float(values[1][-1]), "members agree to the bit"


@pytest.mark.parallel([2])
def test_what_an_ensemble_does_not_do():
    ensemble, chosen = members(1)
    of = problem(ensemble.comm, chosen, ensemble)
    with pytest.raises(ValueError, match="^Gauss-Newton: it does not take an ensemble"):
        of.record(gauss_newton=True)
    with pytest.raises(ValueError, match="^LearningProblem.exchange: it does not take an ensemble"):
        of.exchange(of.batch)
    with pytest.raises(TypeError, match="^ensemble: expected an Ensemble or None"):
        problem(fd.COMM_SELF, chosen, "two")
