"""Compiled stages: the same numbers as NumPy's, for every activation, shape and basis, and NumPy where they cannot be."""

import logging

import firedrake as fd
import numpy as np
import pytest
import sympy
from helpers import label_space
from mpmath import mp
from numpy.testing import assert_allclose
from problems import learning_problem, network

from fem_resnet.activation.activation import ACTIVATIONS, Activation, get_activation
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.layers import compiled_stage
from fem_resnet.layers.compiled_stage import CompiledStage, new_stage
from fem_resnet.layers.stage import Argument, Stage, StageFunctional, StageValue
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.time_stepping.compiled_layer import CompiledStepper

on_ranks = pytest.mark.parallel([1, 2, 3])
S = sympy.Symbol("s")
EXPRESSIONS = {
    "swish": S / (1 + sympy.exp(-S)),
    "gelu": S * (1 + sympy.erf(S / sympy.sqrt(2))) / 2,
    "a quotient": sympy.Piecewise((sympy.sin(S) / 3, S < 0), (S**2 / (1 + S), True)),  # 2 s + s s in its derivative
    "pieces": sympy.Piecewise((sympy.sin(S), S < -1), (sympy.sin(-1) + (S + 1) ** 3, S < 1), (S + 7 + sympy.sin(-1), True)),
}
#: Sums of some hundred numbers of size one.
ROUND_OFF = dict(rtol=1e-13, atol=1e-13)


def _activation(name):
    return Activation.from_sympy(EXPRESSIONS[name]) if name in EXPRESSIONS else get_activation(name)


class Case:
    """A stage's arguments, and both ways to evaluate it."""

    def __init__(self, Y, activation, samples, ranks=(5, 7)):
        random = np.random.default_rng(samples)
        x = Y.coordinates
        functions = [np.cos(k * x[:, 0] + x[:, 1] ** 2) for k in range(1, 1 + max(ranks))]
        self.kernel = LowRankKernel(*(Basis(Y, np.column_stack(functions[:rank]), "given") for rank in ranks))
        self.f = np.outer(np.sin(x[:, 0]), np.ones(samples)) + x[:, 1:2] * np.arange(samples)
        self.at = [
            Argument(self.kernel, (0.3 + k,), (np.sin(3 * x[:, 0] + k),), (random.standard_normal((ranks[0], samples)),))
            for k in range(2)
        ]
        self.by_s = StageFunctional(
            (random.standard_normal((ranks[1], samples)),), random.standard_normal(samples), (self.f.copy(),)
        )
        self.compiled, self.numpy = CompiledStage(Y, activation, samples), Stage(Y, activation, samples)


@on_ranks
@pytest.mark.parametrize("name", [*ACTIVATIONS, *EXPRESSIONS])
def test_compiled_and_numpy_stages_are_equal(name):
    case = Case(label_space("disk", "CG1"), _activation(name), 5)
    at, by_s = case.at[0], case.by_s
    s = [[np.empty_like(case.f)] for _ in range(2)]
    assert_allclose(case.compiled.rate(at, s[0]), case.numpy.rate(at, s[1]), **ROUND_OFF)
    assert_allclose(s[0], s[1], **ROUND_OFF)
    for given in (by_s, StageFunctional(by_s.x, None, ())):
        ours, theirs = (stage.transpose(at, given, True) for stage in (case.compiled, case.numpy))
        assert_allclose(ours.D, theirs.D, **ROUND_OFF)
        assert_allclose(ours.bias, theirs.bias, **ROUND_OFF)
        assert_allclose(ours.length, theirs.length, **ROUND_OFF)


@on_ranks
@pytest.mark.parametrize("samples", [1, 2, 3, 7, 8, 17, 30, 70])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (4, 8)])
def test_every_number_of_samples_and_rank_fits_the_tiles(samples, ranks):
    case = Case(label_space("annulus", "DG0"), get_activation("tanh"), samples, ranks)
    at, stages = case.at[0], [StageValue(0.5 - k, at) for k, at in enumerate(case.at)]
    assert_allclose(case.compiled.rate(at), case.numpy.rate(at), **ROUND_OFF)
    ours, theirs = (stage.transpose(at, case.by_s) for stage in (case.compiled, case.numpy))
    assert_allclose(ours.D, theirs.D, **ROUND_OFF)
    assert_allclose(ours.bias, theirs.bias, **ROUND_OFF)
    given = case.f.copy()
    assert_allclose(case.compiled.advance([case.f], stages), case.numpy.advance([case.f], stages), **ROUND_OFF)
    assert_allclose(case.compiled.advance([case.f], []), [case.f], rtol=0)
    assert (case.f == given).all()


@on_ranks
@pytest.mark.parametrize("nodes", [1, 2, 63, 64, 65, 130])
def test_every_number_of_nodes_fits_the_blocks(nodes):
    mesh = fd.UnitIntervalMesh(3 * nodes)  # on each rank some, or none
    Y = LabelSpace(fd.FunctionSpace(mesh, "DG", 0))
    random = np.random.default_rng(0)
    kernel = LowRankKernel(*(Basis(Y, np.cos(Y.coordinates * (k + 1)), "given") for k in range(2)))
    at = Argument(kernel, (1.0,), (np.sin(Y.coordinates[:, 0]),), (random.standard_normal((1, 3)),))
    by_s = StageFunctional((random.standard_normal((1, 3)),), np.ones(3), (np.tile(Y.coordinates, 3),))
    compiled, numpy = CompiledStage(Y, get_activation("sigmoid"), 3), Stage(Y, get_activation("sigmoid"), 3)
    assert_allclose(compiled.rate(at), numpy.rate(at), **ROUND_OFF)
    ours, theirs = (stage.transpose(at, by_s) for stage in (compiled, numpy))
    assert_allclose(ours.D, theirs.D, **ROUND_OFF)
    assert_allclose(ours.bias, theirs.bias, **ROUND_OFF)
    assert_allclose(
        compiled.advance(by_s.by_f, [StageValue(2.0, at)]), numpy.advance(by_s.by_f, [StageValue(2.0, at)]), **ROUND_OFF
    )


def _pointwise(activation, s):
    """sigma and sigma' at points as compiled stages have them: of a stage with B = 0."""
    Y = LabelSpace(fd.FunctionSpace(fd.UnitIntervalMesh(s.size, comm=fd.COMM_SELF), "DG", 0))
    kernel = LowRankKernel(*[Basis(Y, np.ones((Y.nodes, 1)), "given")] * 2)
    at, one = Argument(kernel, (1.0,), (s,), (np.zeros((1, 1)),)), np.ones((s.size, 1))
    stage, value = CompiledStage(Y, activation, 1), np.empty((s.size, 1))
    stage.rate(at, [value])
    return value[:, 0], stage.transpose(at, StageFunctional((np.zeros((1, 1)),), np.ones(1), (one,))).bias


EXACT = {
    "tanh": (mp.tanh, lambda s: mp.sech(s) ** 2),
    "arctan": (mp.atan, lambda s: 1 / (1 + s * s)),
    "sigmoid": (lambda s: 1 / (1 + mp.exp(-s)), lambda s: mp.exp(-abs(s)) / (1 + mp.exp(-abs(s))) ** 2),
    "softplus": (lambda s: mp.log1p(mp.exp(s)), lambda s: 1 / (1 + mp.exp(-s))),
    "elu": (lambda s: s if s > 0 else mp.expm1(s), lambda s: mp.mpf(1) if s > 0 else mp.exp(s)),
}


@pytest.mark.parametrize("name", EXACT)
def test_compiled_activations_are_accurate_relative_to_their_size(name):
    """4 units in the last place is what the vectorised C library promises of one call; formulas have one or two."""
    s = np.concatenate([sign * np.geomspace(1e-9, 600.0, 250) for sign in (1, -1)] + [np.linspace(-4, 4, 300)])
    for values, exact in zip(_pointwise(get_activation(name), s), EXACT[name]):
        with mp.workdps(40):
            wanted = [exact(mp.mpf(x)) for x in s]
            error = max(float(abs(v - w) / abs(w)) for v, w in zip(values, wanted) if abs(w) > np.finfo(float).tiny)
        assert error < 4 * np.finfo(float).eps, f"{error / np.finfo(float).eps:.1f} ulp"


def test_what_is_not_finite_stays_so():
    s = np.array([np.nan, np.inf, -np.inf, 0.0])
    for name in ACTIVATIONS:
        value, slope = _pointwise(get_activation(name), s)
        assert np.isnan(value[0]) and np.isfinite(value[3]) and np.isfinite(slope[3]), name


@on_ranks
def test_numpy_takes_over_with_one_warning_where_c_cannot_be(monkeypatch, caplog):
    Y = label_space("disk", "CG1")
    unknown = Activation.from_sympy(sympy.tanh(S) + sympy.besselj(2, S) / 10)
    compiled_stage._warned.clear()
    with caplog.at_level(logging.WARNING, "fem_resnet"):
        assert [type(new_stage(Y, unknown, samples)) for samples in (1, 2)] == [Stage, Stage]
        assert len(caplog.records) == (Y.comm.rank == 0)
        monkeypatch.setattr(compiled_stage, "_FLAGS", ("--no-such-flag",))
        assert type(new_stage(Y, get_activation("tanh"), 1)) is Stage
        assert len(caplog.records) == 2 * (Y.comm.rank == 0)
        monkeypatch.setenv("FEM_RESNET_COMPILED", "0")
        assert type(new_stage(Y, get_activation("arctan"), 1)) is Stage
        assert len(caplog.records) == 2 * (Y.comm.rank == 0)


def test_bases_that_come_and_go_are_not_mixed_up():
    """Learned factors are new bases at every evaluation; all stages of the quadrature (3.3) may have bases of their own."""
    Y = label_space("disk", "DG0")
    stage = new_stage(Y, get_activation("tanh"), 2)
    assert isinstance(stage, CompiledStage)
    x, C = Y.coordinates[:, 0], np.ones((1, 2))
    for number in range(5):
        kernels = [
            LowRankKernel(*(Basis(Y, (1 + j + number) * np.cos(k * x)[:, None], "given") for k in (1, 2))) for j in range(100)
        ]
        arguments = [Argument(kernel, (1.0,), (x,), (C,)) for kernel in kernels]
        stages = [StageValue(1.0, at) for at in arguments]
        start = np.zeros((Y.nodes, 2))
        assert_allclose(stage.advance([start], stages), Stage.advance(stage, [start], stages), **ROUND_OFF)
        for at in arguments:
            assert_allclose(stage.rate(at), Stage.rate(stage, at), **ROUND_OFF)
    del kernels, arguments, stages, at
    assert len(stage._bases) == 0


# -- layers whose callbacks of TS are compiled ------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("domain, element", [("annulus", "DG0"), ("sphere", "CG1")])
@pytest.mark.parametrize("method", ["1fe", "3bs", "4", "5dp"])
@pytest.mark.parametrize(
    "options, samples",
    [
        ({}, 4),
        ({"kernel_in_time": "shared", "steps": 3}, 4),
        ({"layers_per_block": 1, "steps": 2}, 35),
        ({"bias": "basis"}, 4),
    ],
    ids=["layers", "shared", "blocks", "basis"],
)
def test_compiled_layers_are_numpys(domain, element, method, options, samples, monkeypatch):
    """J, all gradients, states and co-states, with the Python callbacks and NumPy, and with those in C."""
    found = []
    for switch in ("0", "1"):
        monkeypatch.setenv("FEM_RESNET_COMPILED", switch)
        net = network(domain, element, solver_parameters={"ts_rk_type": method}, **options)
        J, run = learning_problem(net, samples=samples).record()
        derivative = J.derivative()
        segment = run._pieces[0].segment
        assert isinstance(segment.steppers[0], CompiledStepper) == (switch == "1")
        found.append(
            [np.array(float(J.functional))]
            + [part.dat.data_ro.copy() for part in derivative]
            + [run.state(1).dat.data_ro.copy(), run.costate(1).dat.data_ro.copy()]
        )
    for ours, theirs in zip(*found, strict=True):
        assert_allclose(ours, theirs, rtol=1e-13, atol=1e-13)


@on_ranks
def test_a_compiled_layer_sums_over_the_ranks_once_a_stage_and_not_on_one_rank():
    net = network("disk", "CG1", solver_parameters={"ts_rk_type": "4"}, steps=3)
    J, run = learning_problem(net).record()
    J.derivative()
    stages = 4 * 3
    for stepper in run._pieces[0].segment.steppers:
        # As many in the adjoint as forward: one Allreduce of rank x samples numbers each.
        assert stepper.solver.struct.reductions == (2 * stages if net.Y.comm.size > 1 else 0)


@on_ranks
@pytest.mark.parametrize("head", [False, True], ids=["field", "classes"])
def test_large_states_are_adjoined_again_and_again_as_numpy_does(head, monkeypatch):
    """What TS works with in the adjoint is given back after each layer, and made again."""
    found = []
    for switch in ("1", "0"):
        monkeypatch.setenv("FEM_RESNET_COMPILED", switch)
        net = network("disk", "CG1")
        problem = learning_problem(net, head=head, samples=4096 // net.kernel.space_basis.shape[1] + 1)
        J, _ = problem.record()
        for factor in (1.0, 0.5, 1.0):
            value = J([function._ad_mul(factor) for function in problem.functions])
            gradient = [functional.dat.data_ro.copy() for functional in J.derivative()]
        found.append([value, *gradient])
    for one, other in zip(*found, strict=True):
        assert_allclose(one, other, rtol=1e-12, atol=1e-13)


@on_ranks
@pytest.mark.parametrize("precision, tolerance", [("double", 1e-13), ("single", 1e-6)])
def test_fields_one_chunk_of_samples_after_the_other_give_the_same_numbers(precision, tolerance, monkeypatch):
    """To the last bit on one rank; MPI adds up in the order in which ranks come."""
    found = []
    for least in (1, 100):
        monkeypatch.setattr(compiled_stage, "_PACKED_SAMPLES", least)
        net = network("annulus", "DG0", precision=precision, steps=2)
        J, run = learning_problem(net, samples=71).record()  # whole chunks and a part of one, on all processors
        field = np.zeros((net.Y.nodes, 71))
        assert (run._pieces[0].segment.steppers[0].solver.stage.pack(field) is field) == (least == 100)
        derivative = [functional.dat.data_ro.copy() for functional in J.derivative()]
        found.append([float(J.functional), run.final.dat.data_ro.copy(), run.costate(0).dat.data_ro.copy(), *derivative])
    for one, other in zip(*found, strict=True):
        assert_allclose(one, other, rtol=0.0, atol=tolerance if net.Y.comm.size > 1 else 0.0)
