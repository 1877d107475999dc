"""`verify` catches every planted mistake and reports none in sound networks; the command, its files and exit codes."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import firedrake as fd
import numpy as np
import pytest
import sympy
from coverage_of_layers import missed_in_c
from faults import BUILT_IN, FAULTS, FURTHER
from firedrake import COMM_WORLD
from helpers import flat_network, without_mpi
from sound import LAPLACE_MESHES, LAPLACE_RANKS, laplace_problem, sound_problem

import fem_resnet
import fem_resnet.learning.head
import fem_resnet.learning.loss
import fem_resnet.parameters.space_basis
import fem_resnet.verify.problems
from fem_resnet import (
    Basis,
    Batch,
    Bias,
    Head,
    Kernel,
    LabelSpace,
    Layers,
    LearningProblem,
    Lift,
    ResidualNetwork,
    RunningCost,
    laplace_basis,
    locality,
    save,
    smooth_in_space,
    smooth_in_time,
    smoothed_l1,
    tikhonov,
    total_variation,
    verify,
)
from fem_resnet.verify import Check, Line, Report, built_in, problem_of
from fem_resnet.verify.__main__ import main

on_ranks = pytest.mark.parallel([1, 2, 3])


@cache
def _mesh(name):
    return {
        "disk": lambda: fd.UnitDiskMesh(2),
        "annulus": lambda: fd.AnnulusMesh(1, 0.4, 2, 8),
        "line": lambda: fd.UnitIntervalMesh(9),
    }[name]()


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
    net = flat_network(phi, psi, times=[0.0, 0.3, 0.5, 1.1], **options)
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
    return Batch(
        Y.batch(_waves(Y, samples, 3)),
        Y.batch(_waves(Y, samples, 4)) if targets is None else targets,
        np.tile([1.0, 2.0, 0.5, 1.5], samples)[:samples],
    )


def classes():
    """The built-in problem, with the loss as it stands in its module."""
    return built_in().replace(loss=fem_resnet.learning.loss.cross_entropy)


def field():
    """A field by a logistic head and least squares, bias in a basis, controls shared by layers."""
    Y = LabelSpace(fd.FunctionSpace(_mesh("annulus"), "CG", 1))
    phi, psi = _bases(Y)
    net = ResidualNetwork(
        Kernel(phi, psi, in_time=[1, 0, 1]),
        bias=Bias(psi, in_time=[0, 1, 1]),
        layers=Layers([0.0, 0.3, 0.5, 1.1], per_block=2),
    )
    head = Head(psi, phi, "logistic")
    _fill([*net.parameters, *head.parameters], Y, 1)
    targets = Y.batch(0.5 + 0.4 * _waves(Y, 3, 9))
    regulariser = tikhonov(0.05) + smooth_in_time(0.04) + smooth_in_space(0.01)
    return LearningProblem(net, head, fem_resnet.learning.loss.least_squares, regulariser, _batch(net, 3, targets))


def _plain(element=("CG", 1), mesh="disk", learn="both", running=None, samples=2, **options):
    net = _network(mesh, element, **options)
    loss, batch = fem_resnet.learning.loss.least_squares, _batch(net, samples)
    return LearningProblem(net, None, loss, tikhonov(0.05), batch, learn=learn, running=running)


def _costs():
    f, a = sympy.symbols("f a")
    return _plain(running=RunningCost(sympy.cos(f) * a + f**2 / 2, kernel=0.4))


def _terms():
    """Every term of a regulariser that is no form, with weights of single parameters."""
    Y = LabelSpace(fd.FunctionSpace(_mesh("annulus"), "CG", 1))
    phi, psi = _bases(Y)
    net, head = flat_network(psi, times=[0.0, 0.3, 1.1]), Head(psi, 3)
    _fill([*net.parameters, *head.parameters], Y, 2)
    regulariser = (
        tikhonov(0.01, W=0.2) + smoothed_l1(0.3, 0.5, kernel=0.1) + locality(0.3) + total_variation(0.1, 0.8, bias=0.2)
    )  # fmt: skip
    batch = _batch(net, 2, [0, 2])
    return LearningProblem(net, head, fem_resnet.learning.loss.cross_entropy, regulariser, batch)


#: Small, and rich enough that what is planted acts.
PROBLEMS = {
    "classes": classes,
    "field": field,
    "implicit": lambda: _plain(solver_parameters={"ts_type": "cn"}, bias_in_time="linear", kernel_in_time="linear"),
    "carried": lambda: _plain(("DG", 0), solver_parameters={"ts_type": "dirk"}, kernel_in_time="linear", learn="parameters"),
    "adapted": lambda: _plain(
        solver_parameters={"ts_rk_type": "3bs", "ts_adapt_type": "basic", "ts_rtol": 1e-5, "ts_atol": 1e-5}
    ),
    "learned": lambda: _plain(learn_factors=True, learn_times=True, learn="parameters"),
    "layers": _plain,
    "times": lambda: _plain(learn_times=True, learn="parameters"),
    "many samples": lambda: _plain(samples=35, learn="parameters"),
    "many samples, times": lambda: _plain(samples=35, learn_times=True, learn="parameters"),
    "kinks": lambda: _plain(activation="relu"),
    "costs": _costs,
    "terms": _terms,
    "mirrored": lambda: fem_resnet.verify.problems.BUILT_IN["mirrored"](COMM_WORLD),
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
    assert len({fault.name for fault in FAULTS + FURTHER}) == len(FAULTS) + len(FURTHER) and len(FAULTS) >= 150
    assert len(FURTHER) == 60 and {fault.problem for fault in FURTHER} == {BUILT_IN}


@pytest.mark.whole
@pytest.mark.parametrize(
    "fault", [pytest.param(fault, id=fault.name, marks=[pytest.mark.slow] * (k % 2)) for k, fault in enumerate(FAULTS)]
)
def test_caught(fault, monkeypatch, found):
    """By default every second fault, since all take minutes."""
    monkeypatch.setenv("FEM_RESNET_COMPILED", str(int(fault.compiled)))
    fault.plant(monkeypatch)
    report = verify(PROBLEMS[fault.problem], quick=True, exit_first=True)
    found["faults"].append(not report.passed)
    assert not report.passed, f"not seen: {fault.name}"


#: Faults that the built-in problems do not show: no adjoint of their layers reads what these faults leave behind.
NOT_SEEN = ("under checkpoints a recording keeps what is overwritten", "settings forget the number of steps")


def _is_caught_by_the_built_in_problems(fault, patch, found):
    patch.setenv("FEM_RESNET_COMPILED", str(int(fault.compiled)))
    fault.plant(patch)
    report = verify(quick=True, exit_first=True)
    found["faults"].append(not report.passed)
    assert report.passed == (fault.name in NOT_SEEN), fault.name


@pytest.mark.parametrize("fault", FURTHER[3::12], ids=lambda fault: fault.name)
def test_caught_by_the_built_in_problems(fault, monkeypatch, found):
    _is_caught_by_the_built_in_problems(fault, monkeypatch, found)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FURTHER, ids=lambda fault: fault.name)
def test_all_further_faults_are_caught_by_the_built_in_problems(fault, monkeypatch, found):
    """At least 58 of 60; the others are named above."""
    assert len(NOT_SEEN) <= 2
    _is_caught_by_the_built_in_problems(fault, monkeypatch, found)


@on_ranks
def test_it_ends_with_the_first_check_that_fails_where_that_is_asked_for(monkeypatch):
    monkeypatch.setenv("FEM_RESNET_COMPILED", str(int(FAULTS[0].compiled)))
    FAULTS[0].plant(monkeypatch)
    whole, first = (verify(PROBLEMS[FAULTS[0].problem], quick=True, exit_first=only) for only in (False, True))
    assert len(first.checks) < len(whole.checks)
    for one, other in zip(first.checks, whole.checks):
        assert (one.group, one.name, one.passed) == (other.group, other.name, other.passed)
    assert first.failures == first.checks[-1:]


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_reported_in_random_sound_networks(seed, found):
    _is_silent(sound_problem(seed), found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 120))
def test_nothing_is_reported_in_more_random_sound_networks(seed, found):
    _is_silent(sound_problem(seed), found)


def test_nothing_is_reported_with_a_laplace_basis(found):
    _is_silent(laplace_problem("disk", 4), found)


@pytest.mark.slow
@pytest.mark.parametrize("rank", LAPLACE_RANKS)
@pytest.mark.parametrize("mesh", LAPLACE_MESHES)
def test_nothing_is_reported_with_laplace_bases_of_any_rank(mesh, rank, found):
    _is_silent(laplace_problem(mesh, rank), found)


def _is_silent(problem, found):
    report = verify(problem)
    found["sound"].append(report.passed)
    assert report.passed, "\n" + str(report)


#: Lines of C with a branch that may stay untaken: without memory; on several ranks; where TS fails; asked for ahead or not,
#: which a copy of the code knows when it is compiled; a second slab together with each remainder of tiles. All cases of tiles
#: are taken.
NOT_REACHED_IN_C = (
    "kept_size = kept ? size : 0;", "if (!memory) return 0;", "if (!get_scratch(", "if (size > 1) {", "PetscMPIIntCast(",
    "MPI_Allreduce(MPI_IN_PLACE", "layer->reductions++;", "if (!WENT_WELL(outcome)) break;", "layer->step < layer->steps)",
    "__builtin_prefetch(", "for (int i = 0; i < ranks; i++)", "(a ? a[i] + (vec){0} : get(place))", "ALL_TILES(",
)  # fmt: skip
#: And statements of Python: without a compiler; on several ranks; before a solve; after a failure; for one compiled layer
#: between others, which the built-in problems have not.
NOT_REACHED_IN_PYTHON = (
    "compiled_stage.py: return Stage(Y, activation, samples, precision)",
    "segment.py: self._Y.comm.Allreduce(MPI.IN_PLACE, probe, op=MPI.MAX)",
    "compiled_layer.py: return LayerTrace()", "segment.py: return None",
    "compiled_layer.py: stepper = self.steppers[layer]",
    "compiled_layer.py: return stepper.failed(what, stepper.solver.ts.getTime())",
    "compiled_layer.py: self.solver = self._new()",
    "compiled_layer.py: return CompiledLayers([self]).forward(g, f, [inputs], save, [steps])",
    "compiled_layer.py: (result,) = CompiledLayers([self]).adjoint(by_g, by_f)", "compiled_layer.py: return result",
)  # fmt: skip


@pytest.mark.slow
def test_the_built_in_problems_reach_every_compiled_path(tmp_path):
    """All branches of stage.c and layer.c, and all lines that call them, except those that end in an error."""
    script = Path(__file__).with_name("coverage_of_layers.py")
    subprocess.run([sys.executable, script, tmp_path], check=True, env=_environment(), timeout=3000)
    found = json.loads((tmp_path / "missed.json").read_text())
    assert not found["failures"]
    assert not [text for text in missed_in_c(tmp_path) if not any(part in text for part in NOT_REACHED_IN_C)]
    assert not set(found["python"]) - set(NOT_REACHED_IN_PYTHON)


# -- what a verification returns ------------------------------------------------------------------------------------


def test_every_number_is_in_the_table_and_in_json():
    report = Report(
        "a title",
        [
            Check.of("kind", "good", 1e-12, 1e-10),
            Check.of("kind", "bad", 2e-3, 1e-6, "a note"),
            Check.left_out("kind", "other", "a reason"),
        ],
        [Line("R1", 2, (0.1, 0.05, 0.025), (1e-2, 2.5e-3, 6.25e-4))],
    )
    assert not report.passed and [check.name for check in report.failures] == ["bad"]
    text = str(report)
    assert "a title" in text and "2.0e-03" in text and "FAIL" in text and "left out: a reason" in text
    assert "3 checks" in text and "1 FAILED" in text
    read = json.loads(report.to_json())
    assert read["passed"] is False and read["checks"][1]["value"] == 2e-3 and read["checks"][2]["value"] is None
    assert abs(read["lines"][0]["rate"] - 2) < 1e-12


def test_a_number_that_is_none_does_not_pass_and_json_has_no_nan():
    report = Report("t", [Check.of("kind", "lost", float("nan"), 1e-6)], [Line("R1", 2, (0.1, 0.05), (0.0, 0.0))])
    assert not report.passed
    assert json.loads(report.to_json())["checks"][0]["value"] is None and "NaN" not in report.to_json()
    assert report.lines[0].rate is None


def test_rates_of_taylor_tests_are_seen():
    report = verify(built_in)
    rates = {
        order: [line.rate for line in report.lines if line.order == order and line.name.startswith("R")] for order in (1, 2, 3)
    }
    for order, found in rates.items():
        # One step in front of the asymptotic range may be among them.
        assert len(found) > 4 and abs(np.median(found) - order) < 0.05, (order, found)
    assert any(line.name.startswith("co-state") and abs(line.rate - 4) < 0.5 for line in report.lines)


def test_methods_without_an_adjoint_are_verified_as_far_as_they_go():
    report = verify(_plain(solver_parameters={"ts_type": "bdf"}))
    assert report.passed and any("no adjoint" in check.note for check in report.checks)
    assert any(check.group == "J" and check.value is not None for check in report.checks)


def test_networks_at_zero_with_a_trained_minimum_can_be_verified():
    """All parameters are zero and so are most gradients: derivatives are taken nearby."""
    Y = LabelSpace(fd.FunctionSpace(_mesh("disk"), "CG", 1))
    net = ResidualNetwork(Kernel(*_bases(Y)), layers=2)
    problem = LearningProblem(
        net, None, fem_resnet.learning.loss.least_squares, None, _batch(net, 2, Y.batch(_waves(Y, 2, 3)))
    )
    report = verify(problem)
    assert report.passed, "\n" + str(report)
    assert max(np.abs(function.dat.data_ro).max() for function in problem.functions) == 0.0


def test_nothing_is_reported_in_a_quick_verification_of_a_network_that_bends_fast():
    """Where J changes much over short steps, differences are extrapolated, and their own error is known."""
    Y = LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(2), "CG", 1))
    phi, x = laplace_basis(Y, 20), Y.coordinates
    centres = np.random.default_rng(0).uniform(-0.8, 0.8, (60, 2))
    inputs = Y.batch(np.exp(-8 * ((x[:, None] - centres) ** 2).sum(axis=-1)))
    net, head = ResidualNetwork(phi, bias=phi, layers=3, final_time=3.0), Head(phi, 2)
    net.start("random smooth", 0, data=inputs)
    head.start(seed=0)
    batch = Batch(inputs, (centres[:, 0] > 0).astype(int))
    report = verify(LearningProblem(net, head, fem_resnet.learning.loss.cross_entropy, tikhonov(1e-3), batch), quick=True)
    assert report.passed, "\n" + "\n".join(map(str, report.failures))


@pytest.mark.parametrize("apart", [17.0, 800.0])
@pytest.mark.parametrize("loss, prediction", [("cross_entropy", "softmax"), ("binary_cross_entropy", "logistic")])
def test_confident_classifiers_are_sound(apart, loss, prediction):
    """J is 1e-7 or 0; differences of scores that cancel are not reported."""
    Y = LabelSpace(fd.FunctionSpace(_mesh("disk"), "CG", 1))
    net = ResidualNetwork(_bases(Y)[0], layers=[0.0, 0.3, 0.7])
    _fill(net.parameters, Y, 3)
    head, labels = Head(_bases(Y)[0], 3, prediction), [1, 1]
    head.mu.set(0, apart * np.array([-0.5, 0.5, -0.5]))
    problem = LearningProblem(
        net, head, getattr(fem_resnet.learning.loss, loss), None, Batch(Y.batch(_waves(Y, 2, 3)), labels)
    )
    assert float(problem.evaluate()[0]) < 1e-3
    report = verify(problem)
    assert report.passed, "\n" + "\n".join(map(str, report.failures))


def test_what_is_no_problem_is_refused():
    with pytest.raises(TypeError, match="^problem: expected a LearningProblem, or a function that makes one, got 3"):
        verify(3)
    with pytest.raises(TypeError, match="^problem: expected a LearningProblem, got int; this is what the function returned"):
        verify(lambda: 3)
    with pytest.raises(ValueError, match="^time_limit: expected a number > 0 and < 2.14748e.09, got 0"):
        verify(built_in, time_limit=0)


def test_folder_and_function_have_one_name():
    assert callable(fem_resnet.verify) and callable(sys.modules["fem_resnet.verify"])
    assert fem_resnet.verify(built_in, quick=True).passed


# -- on ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.parallel([2, 3])
def test_on_ranks_the_problem_is_held_against_one_rank_alone():
    report = verify(built_in, quick=True)
    assert report.passed, "\n" + str(report)
    assert any(check.group == "ranks" and check.name.endswith("curvature") for check in report.checks)
    assert len(set(COMM_WORLD.allgather(str([check.verdict for check in report.checks])))) == 1


def _rank_0_only(patch, owner, name):
    """A sum over the ranks that is left out: each rank goes on with its own part."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda self, x: original(self, np.asarray(x, dtype=float) * (self.comm.rank == 0)))


def _others_bias(patch):
    made = fem_resnet.parameters.space_basis.BasisCoefficients.pull_back
    patch.setattr(
        fem_resnet.parameters.space_basis.BasisCoefficients,
        "pull_back",
        lambda self, dual: made(self, dual * (self.Y.comm.rank == 0)),
    )


def _loss_of_rank_0(patch):
    forward = fem_resnet.learning.loss.LossOperator.forward
    patch.setattr(
        fem_resnet.learning.loss.LossOperator,
        "forward",
        lambda self, arrays, save: forward(self, arrays, save) * (1.0 + 1e-9 * self._Y.comm.rank),
    )


def _seen_by_the_partition(patch):
    """A Laplace basis whose last function depends on how the mesh is divided."""
    made = fem_resnet.verify.problems.laplace_basis

    def basis(Y, rank):
        found = made(Y, rank)
        return Basis(
            Y, found.values * np.where(np.arange(rank) == rank - 1, (-1.0) ** Y.comm.size, 1.0), "laplace", found.eigenvalues
        )

    patch.setattr(fem_resnet.verify.problems, "laplace_basis", basis)


RANK_FAULTS = {
    "sums of rank 0 only": ("classes", lambda patch: _rank_0_only(patch, LabelSpace, "sum")),
    "a functional of rank 0 only": ("field", _others_bias),
    "J differs between ranks": ("classes", _loss_of_rank_0),
    "a basis that sees the partition": ("classes", _seen_by_the_partition),
}


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("name", list(RANK_FAULTS)[: None if COMM_WORLD.size == 2 else 1])
def test_caught_on_ranks(name, monkeypatch, found):
    problem, plant = RANK_FAULTS[name]
    if plant is _seen_by_the_partition:  # where the problem is made, and on one rank alone
        plant(monkeypatch)
        made = built_in
    else:
        made = PROBLEMS[problem]()
        plant(monkeypatch)
    report = verify(made, quick=True)
    found["faults"].append(not report.passed)
    assert not report.passed, f"not seen: {name}"


# -- the command -----------------------------------------------------------------------------------------------------

MODULE = """
from fem_resnet.verify import built_in


def problem(comm):
    return built_in(comm)
"""

FAULTY = (
    MODULE
    + """

import fem_resnet.learning.regulariser

_forward = fem_resnet.learning.regulariser._RegulariserOperator.forward
fem_resnet.learning.regulariser._RegulariserOperator.forward = lambda self, arrays, save: 2 * _forward(self, arrays, save)
"""
)


@pytest.mark.parallel([1, 2])
def test_command_on_a_saved_network(tmp_path, capsys):
    Y = LabelSpace(fd.FunctionSpace(_mesh("disk"), "CG", 1))
    net = ResidualNetwork(Kernel(*_bases(Y)), layers=2)
    head = Head(net.bases["psi"][0], 3)
    _fill([*net.parameters, *head.parameters], Y, 3)
    for name, parts in (("net", (net,)), ("both", (net, head)), ("lifted", (net, None, Lift(Y, 2)))):
        save(tmp_path / f"{name}.h5", *parts)
        arguments = [
            str(tmp_path / f"{name}.h5"),
            "--quick",
            "--json",
            str(tmp_path / f"{name}.json"),
            "--png",
            str(tmp_path / f"{name}.png"),
        ]
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert ("all passed" in out) == (COMM_WORLD.rank == 0)
        if COMM_WORLD.rank == 0:
            assert json.loads((tmp_path / f"{name}.json").read_text())["passed"] is True
            assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("what, code", [("good", 0), ("faulty", 1), ("absent", 2), ("empty", 2), ("no_problem", 2)])
def test_exit_codes_of_modules(tmp_path, what, code):
    (tmp_path / "good.py").write_text(MODULE)
    (tmp_path / "faulty.py").write_text(FAULTY)
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "no_problem.py").write_text("def problem():\n    return 3\n")
    name = what if what in ("good", "absent") else f"{what}.py"  # by name, or by path
    run = subprocess.run(
        [sys.executable, "-m", "fem_resnet.verify", name, "--quick"], cwd=tmp_path, capture_output=True, text=True,
        env=_environment(),
    )  # fmt: skip
    assert run.returncode == code, run.stdout[-2000:] + run.stderr[-2000:]
    assert ("checks in" in run.stdout) == (code < 2)
    assert code < 2 or "fem_resnet.verify: " in run.stderr


HANGS = """
from fem_resnet import LabelSpace
from fem_resnet.verify import built_in

_sum, calls = LabelSpace.sum, [0]


def forgets(self, x):
    calls[0] += 1
    return x if self.comm.size > 1 and self.comm.rank == 1 and calls[0] == 200 else _sum(self, x)


def problem(comm):
    LabelSpace.sum = forgets
    return built_in(comm)
"""


def test_a_rank_that_leaves_out_a_sum_ends_in_a_message(tmp_path, alone):
    (tmp_path / "hangs.py").write_text(HANGS)
    run = subprocess.run(
        ["mpiexec", "-n", "2", sys.executable, "-m", "fem_resnet.verify", "hangs.py", "--quick", "--time-limit", "8"],
        cwd=tmp_path, capture_output=True, text=True, env=_environment(), timeout=170,
    )  # fmt: skip
    # The ranks part, and one of them waits; or what they sum up differs in size, which MPI itself refuses.
    assert run.returncode not in (0, 2), run.stdout[-2000:]
    assert "has waited for 8 s in: " in run.stderr and "leaves out" in run.stderr, run.stderr[-4000:]
    assert "most recent call first" in run.stderr and "label_space.py" in run.stderr


def _environment():
    return without_mpi() | {"PYTHONPATH": str(fem_resnet.__path__[0]).removesuffix("fem_resnet")}


def test_problem_of_a_network_suits_its_head():
    Y = LabelSpace(fd.FunctionSpace(_mesh("disk"), "CG", 1))
    phi, psi = _bases(Y)
    for onto, prediction in (
        (3, "softmax"),
        (3, "identity"),
        (3, "logistic"),
        (psi, "softmax"),
        (psi, "logistic"),
        (psi, "identity"),
    ):
        net, head = ResidualNetwork(phi, layers=1), Head(psi, onto, prediction)
        problem = problem_of(net, head)
        assert np.isfinite(float(problem.evaluate()[0])), (onto, prediction)
