"""`verify` catches every planted mistake and reports none in sound networks; the command, its files and exit codes."""

import json
import subprocess
import sys
from functools import cache

import firedrake as fd
import numpy as np
import pytest
from faults import FAULTS
from firedrake import COMM_WORLD
from sound import sound_problem

import fem_resnet
import fem_resnet.head
import fem_resnet.loss
import fem_resnet.space_basis
from fem_resnet import (
    Basis,
    Batch,
    Head,
    LabelSpace,
    LearningProblem,
    ResidualNetwork,
    save,
    smooth_in_space,
    smooth_in_time,
    tikhonov,
    verify,
)
from fem_resnet.verify import Check, Line, Report, built_in, problem_of
from fem_resnet.verify.__main__ import main

on_two_ranks = pytest.mark.parallel([1, 2])

#: What the tests of a session found, for its summary.
RESULTS = pytest.StashKey[dict]()


@cache
def _mesh(name):
    return {"disk": lambda: fd.UnitDiskMesh(2), "annulus": lambda: fd.AnnulusMesh(1, 0.4, 2, 8), "line": lambda: fd.UnitIntervalMesh(9)}[name]()


def _waves(Y, samples, seed=0):
    rng = np.random.default_rng(seed)
    return np.cos(Y.coordinates @ rng.normal(scale=2.0, size=(Y.coordinates.shape[1], samples)) + rng.uniform(0, 6, samples))


def _bases(Y):
    """Two bases of rank 3 that are not orthonormal, made without an eigensolver."""
    x, y = Y.coordinates[:, 0], Y.coordinates[:, -1]
    return [
        Basis(Y, np.column_stack(columns), "given")
        for columns in ((1 + 0 * x, x + 0.3, y - 0.2 * x * y), (1 + 0.4 * x, np.cos(2 * y), 0.5 * x**2 - y))
    ]


def _network(mesh, element, **options):
    Y = LabelSpace(fd.FunctionSpace(_mesh(mesh), *element))
    phi, psi = _bases(Y)
    net = ResidualNetwork(phi, psi, times=[0.0, 0.3, 0.5, 1.1], **options)
    _fill(net.parameters, Y, 0)
    return net


def _fill(parameters, Y, seed):
    rng = np.random.default_rng([5, seed])
    for parameter in parameters:
        if parameter.name in ("bias", "kernel", "W", "mu"):
            for k, basis in enumerate(parameter.space_bases):
                nodal = basis.space == Y.V
                parameter.set(k, 0.7 * (_waves(Y, 1, seed + k)[:, 0] if nodal else rng.normal(size=basis.shape)))


def _batch(net, samples, targets=None):
    Y = net.Y
    return Batch(Y.batch(_waves(Y, samples, 3)), Y.batch(_waves(Y, samples, 4)) if targets is None else targets, [1.0, 2.0, 0.5, 1.5][:samples])


def classes():
    """The built-in problem, with the loss as it stands in its module."""
    problem = built_in()
    problem.loss = fem_resnet.loss.cross_entropy
    return problem


def field():
    """A field by a logistic head and least squares, bias in a basis, controls shared by layers."""
    Y = LabelSpace(fd.FunctionSpace(_mesh("annulus"), "CG", 1))
    phi, psi = _bases(Y)
    net = ResidualNetwork(
        phi, psi, bias=psi, times=[0.0, 0.3, 0.5, 1.1], bias_in_time=[0, 1, 1], kernel_in_time=[1, 0, 1]
    )
    head = Head(psi, phi, "logistic")
    _fill([*net.parameters, *head.parameters], Y, 1)
    targets = Y.batch(0.5 + 0.4 * _waves(Y, 3, 9))
    regulariser = tikhonov(0.05) + smooth_in_time(0.04) + smooth_in_space(0.01)
    return LearningProblem(net, head, fem_resnet.loss.least_squares, regulariser, _batch(net, 3, targets))


def _plain(element=("CG", 1), mesh="disk", learn="both", **options):
    net = _network(mesh, element, **options)
    return LearningProblem(net, None, fem_resnet.loss.least_squares, tikhonov(0.05), _batch(net, 2), learn=learn)


#: Small, and rich enough that what is planted acts.
PROBLEMS = {
    "classes": classes,
    "field": field,
    "implicit": lambda: _plain(solver_parameters={"ts_type": "cn"}, bias_in_time="linear", kernel_in_time="linear"),
    "carried": lambda: _plain(("DG", 0), solver_parameters={"ts_type": "dirk"}, kernel_in_time="linear", learn="parameters"),
    "adapted": lambda: _plain(solver_parameters={"ts_rk_type": "3bs", "ts_adapt_type": "basic", "ts_rtol": 1e-5, "ts_atol": 1e-5}),
    "learned": lambda: _plain(learn_factors=True, learn_times=True, learn="parameters"),
    "kinks": lambda: _plain(activation="relu"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_nothing_is_reported_in_the_problems_that_faults_are_planted_in(name):
    problem = PROBLEMS[name]()
    before = [np.array(function.dat.data_ro) for function in problem.functions]
    report = verify(problem)
    assert report.passed, "\n" + str(report)
    for function, values in zip(problem.functions, before, strict=True):
        assert np.array_equal(function.dat.data_ro, values), "parameters are put back"


def test_faults_have_names_of_their_own_and_are_many():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 25


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_caught(fault, monkeypatch, found):
    fault.plant(monkeypatch)
    report = verify(PROBLEMS[fault.problem], quick=True)
    found["faults"].append(not report.passed)
    assert not report.passed, f"not seen: {fault.name}"


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_reported_in_random_sound_networks(seed, found):
    _is_silent(seed, found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 200))
def test_nothing_is_reported_in_more_random_sound_networks(seed, found):
    _is_silent(seed, found)


def _is_silent(seed, found):
    report = verify(sound_problem(seed))
    found["sound"].append(report.passed)
    assert report.passed, "\n" + str(report)
