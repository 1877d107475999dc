"""A training that was interrupted and goes on from its checkpoint is, bit by bit, the one that nothing interrupted."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from firedrake import COMM_SELF, COMM_WORLD
from helpers import laplace, without_mpi
from kinds import adaptive, with_learned_factors
from numpy.testing import assert_allclose, assert_array_equal
from problems import learning_problem, network, squares

from fem_resnet import (
    SGD,
    Adam,
    Batch,
    Head,
    LearningProblem,
    ProximalStep,
    ResidualNetwork,
    TrainingCheckpoint,
    cross_entropy,
    tikhonov,
    train,
    train_levenberg_marquardt,
    train_pam,
    train_stochastic,
)
from fem_resnet.files import seal

on_ranks = pytest.mark.parallel([1, 2, 3])


class Interrupted(Exception):
    pass


def plain():
    """A bias with a value at every node, so that each rank has its own part."""
    return learning_problem(network("disk", "CG1"), samples=8)


def adapted():
    """Steps that are adapted when J is recorded, and kept until it is recorded again."""
    return learning_problem(adaptive("rk"))


def factors():
    """Kernel factors, and times: Functions of all kinds."""
    return learning_problem(with_learned_factors(), head=False)


def initial():
    """The input is learned too."""
    problem = plain()
    return problem.replace(learn="both")


def until(number):
    """A monitor that ends the run at this iteration or epoch, as a crash would."""

    def monitor(progress):
        if progress.counted[1] == number:
            raise Interrupted

    return monitor


#: From one checkpoint to the next; where a run is interrupted, after the second one; and all.
EVERY, CRASH, ALL = 2, 5, 6


def both(make, run, path):
    """A run that nothing interrupts; and what is left of one that ended at 5 of 6, continued from its checkpoint at 4."""
    whole = run(make(), checkpoint=TrainingCheckpoint(path.with_name("whole"), EVERY), quiet=True)
    with pytest.raises(Interrupted):
        run(make(), checkpoint=TrainingCheckpoint(path, EVERY), monitor=until(CRASH))
    other = make()
    for parameter in other.parameters:  # nothing of where it starts is used
        for k in range(len(parameter.functions)):
            parameter.write(k, 0.9 * parameter.read(k))
    return whole, run(other, resume=path, quiet=True), other


def assert_same(one, other):
    """All bits that a result has, but the time that it took."""
    for name in (field.name for field in dataclasses.fields(one)):
        if name in ("controls", "previous"):
            for c, d in zip(_flat(getattr(one, name)), _flat(getattr(other, name)), strict=True):
                assert_array_equal(c, d, err_msg=name)
        elif isinstance(getattr(one, name), np.ndarray):
            assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        elif name != "seconds":
            assert getattr(one, name) == getattr(other, name), name
    assert other.seconds > 0


def _flat(arrays):
    """Arrays in one list, also those that are in lists of groups."""
    return [c for each in arrays for c in (each if isinstance(each, list) else [each])]


TAO = {
    "L-BFGS": (plain, {}),
    "Newton": (plain, {"solver_parameters": {"tao_type": "nls"}}),
    "bounds": (plain, {"bounds": {"bias": (-0.2, 0.3)}}),
    "the head eliminated": (plain, {"eliminate": "head"}),
    "adapted steps": (adapted, {}),
    "learned factors": (factors, {}),
    "learned input": (initial, {}),
}
if COMM_WORLD.size > 1:  # what differs there is where values at nodes are
    TAO = {name: TAO[name] for name in ("L-BFGS", "the head eliminated", "learned input")}


@on_ranks
@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] if name == "Newton" else []) for name in TAO])
def test_train_goes_on_with_the_same_numbers(case, tmp_path):
    make, options = TAO[case]
    options = {"solver_parameters": {}} | options
    options["solver_parameters"] = {"tao_max_it": ALL} | options["solver_parameters"]
    whole, other, problem = both(make, lambda problem, **more: train(problem, **options, **more), tmp_path / "part")
    assert whole.iterations == ALL or whole.converged and whole.iterations > 2 * EVERY
    assert_same(whole, other)
    for c, d in zip(other.controls, [p.get(k) for p in problem.parameters for k in range(len(p.functions))], strict=True):
        assert_array_equal(c, d)


@on_ranks
@pytest.mark.parametrize(
    "make, step", [(plain, Adam(0.02, decay=0.1)), (adapted, SGD(0.5))], ids=["Adam", "adapted steps, SGD"]
)
def test_stochastic_gradients_go_on_with_the_same_numbers(make, step, tmp_path):
    def run(problem, **more):
        size = problem.batch.samples - 1  # the last mini-batch of an epoch is filled up
        held_back = problem.batch if make is plain else None
        return train_stochastic(problem, step, batch_size=size, epochs=ALL, validation=held_back, seed=4, **more)

    whole, other, _ = both(make, run, tmp_path / "part")
    assert whole.epochs == ALL
    assert_same(whole, other)


@on_ranks
@pytest.mark.parametrize("eliminate", [None, "head"])
def test_levenberg_and_marquardt_go_on_with_the_same_numbers(eliminate, tmp_path):
    """With the same damping, and the rows that the interrupted run would have drawn."""

    def run(problem, **more):
        return train_levenberg_marquardt(problem, iterations=ALL, eliminate=eliminate, rows=0.5, directions=2, **more)

    whole, other, _ = both(squares, run, tmp_path / "part")
    assert whole.iterations == ALL and whole.value < 0.9 * whole.values[0]
    assert_same(whole, other)


@on_ranks
@pytest.mark.parametrize("make", [adapted, initial][-1 if COMM_WORLD.size > 1 else 0 :])
def test_alternating_minimisation_goes_on_as_if_nothing_had_been(make, tmp_path):
    """With momentum and tau, which change from one iteration to the next."""

    def run(problem, **more):
        step = ProximalStep(0.3, adapt=True, inertial=True)
        return train_pam(problem, {"tao_max_it": 1}, step=step, iterations=ALL, gradient_tolerance=0.0, **more)

    whole, other, _ = both(make, run, tmp_path / "part")
    assert whole.iterations == ALL and len(set(whole.taus)) > 1
    assert_same(whole, other)


def test_alternating_minimisation_over_batches_goes_on_with_the_next_one(tmp_path):
    def run(problem, **more):
        return train_pam(problem, {"tao_max_it": 1}, iterations=ALL, batches=problem.minibatches(3), **more)

    whole, other, _ = both(plain, run, tmp_path / "part")
    assert_same(whole, other)


def test_what_alternating_minimisation_goes_on_from_fits(tmp_path):
    path = tmp_path / "file"
    result = train_pam(plain(), {"tao_max_it": 1}, iterations=2, checkpoint=TrainingCheckpoint(path, 2))
    with pytest.raises(ValueError, match="^start: expected None with resume="):
        train_pam(plain(), start=result, resume=path)
    data = path.read_bytes()
    path.write_bytes(changed(data[: data.index(b"\nfem_resnet BLAKE2b ")], numbers=lambda n: n | {"iterations": 1}))
    seal(COMM_SELF, path)
    with pytest.raises(ValueError, match="^resume: .*: expected the numbers of 1 iterations"):
        train_pam(plain(), resume=path)
    with pytest.raises(ValueError, match="expected one that train wrote, got one of train_pam"):
        train(plain(), resume=path)


def test_seconds_are_those_of_all_runs(tmp_path):
    """From which the time that is left is estimated."""
    path, reports = tmp_path / "file", []
    train(plain(), {"tao_max_it": 3}, checkpoint=TrainingCheckpoint(path, 2))
    data = path.read_bytes()
    path.write_bytes(changed(data[: data.index(b"\nfem_resnet BLAKE2b ")], numbers=lambda n: n | {"seconds": 1e4}))
    seal(COMM_SELF, path)
    result = train(plain(), {"tao_max_it": 3}, resume=path, monitor=reports.append)
    assert result.seconds > 1e4 and reports[-1].iteration == 3 and reports[-1].seconds > 1e4


TOOLS = {
    "train": (plain, lambda problem, **more: train(problem, {"tao_max_it": ALL}, **more)),
    "train_pam": (plain, lambda problem, **more: train_pam(problem, {"tao_max_it": 1}, iterations=ALL, **more)),
    "train_stochastic": (plain, lambda problem, **more: train_stochastic(problem, Adam(), batch_size=4, epochs=ALL, **more)),
    "train_levenberg_marquardt": (
        squares,
        lambda problem, **more: train_levenberg_marquardt(problem, iterations=ALL, rows=0.5, directions=2, **more),
    ),
}


@on_ranks
@pytest.mark.parametrize("tool", TOOLS)
def test_a_signal_writes_a_checkpoint_where_it_stops(tool, tmp_path):
    """The next job then has all iterations. L-BFGS, which forgets its pairs there, takes other ones from there on."""
    make, run = TOOLS[tool]

    def monitor(progress):
        if progress.counted[1] == 3 and COMM_WORLD.rank == COMM_WORLD.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    checkpoint = TrainingCheckpoint(tmp_path / "file", 100)
    ended = run(make(), checkpoint=checkpoint, monitor=monitor)
    assert ended.reason == "TERMINATED" and len(ended.values) in (3, 4)
    resumed = run(make(), resume=tmp_path / "file", quiet=True)
    whole = run(make(), checkpoint=TrainingCheckpoint(tmp_path / "whole", 3), quiet=True)
    assert_same(whole, resumed)


def test_l_bfgs_forgets_its_pairs_at_a_checkpoint(tmp_path):
    """As the docstring says: else bits could not be the same. The first three iterations know no checkpoint."""
    without = train(plain(), {"tao_max_it": 8})
    with_them = train(plain(), {"tao_max_it": 8}, checkpoint=TrainingCheckpoint(tmp_path / "file", 3))
    assert_array_equal(without.values[:4], with_them.values[:4])
    assert without.values[5] != with_them.values[5]


def test_tolerances_stay_relative_to_the_first_start(tmp_path):
    """Where "tao_gttol" is reached after a checkpoint, it is relative to the gradient at the very start."""
    norms = train(plain(), {"tao_max_it": 8}, checkpoint=TrainingCheckpoint(tmp_path / "file", 3)).gradient_norms
    part = 1.01 * norms[5] / norms[0]
    found = train(plain(), {"tao_gttol": part}, checkpoint=TrainingCheckpoint(tmp_path / "file", 3))
    # TAO's norm has no unit, and so is not quite proportional to that in the label measure.
    assert found.reason == "CONVERGED_GTTOL" and 3 < found.iterations <= 8


@on_ranks
def test_a_training_goes_on_further_than_it_was_to_go(tmp_path):
    whole = train(plain(), {"tao_max_it": 7}, checkpoint=TrainingCheckpoint(tmp_path / "whole", 3))
    train(plain(), {"tao_max_it": 6}, checkpoint=TrainingCheckpoint(tmp_path / "part", 2 + 1))
    assert_same(whole, train(plain(), {"tao_max_it": 7}, resume=tmp_path / "part"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The bytes of a checkpoint of `plain` before its seal, from one rank."""
    path = tmp_path_factory.mktemp("checkpoint") / "file"
    train(plain(), {"tao_max_it": 4}, checkpoint=TrainingCheckpoint(path, 3))
    data = path.read_bytes()
    return data[: data.index(b"\nfem_resnet BLAKE2b ")]


def changed(data, **changes):
    """The bytes with other entries in their line."""
    line, rest = data.split(b"\n", 1)
    fields = json.loads(line)
    head = json.dumps(fields | {name: change(fields[name]) for name, change in changes.items()}).encode() + b"\n"
    numbers = rest[-(-(len(line) + 1) // 8) * 8 - len(line) - 1 :]
    return head + b" " * (-len(head) % 8) + numbers


FAULTS = {
    "its line": (lambda data: b"no line" + data, "does not begin with the line of a checkpoint"),
    "no end of the line": (lambda data: data.replace(b"\n", b" ", 1), "does not begin with the line"),
    "format": (lambda data: changed(data, **{"fem_resnet checkpoint": lambda n: n + 1}), "checkpoint of format 1"),
    "a list": (lambda data: b"[" * 100_000 + b"\n", "does not begin with the line"),
    "tool": (lambda data: changed(data, tool=lambda _: "msa"), "expected one that train wrote, got one of msa"),
    "every": (lambda data: changed(data, every=lambda _: 0), "every: expected a positive integer"),
    "one gradient more": (
        lambda data: changed(data, series=lambda s: {"value": s["value"] - 1, "gradient_norm": s["gradient_norm"] + 1}),
        "expected as many gradients as values of J, one or more, got 5 and 3",
    ),
    "scale": (lambda data: changed(data, numbers=lambda n: n | {"scale": 0.0}), "scale: expected a positive number, got 0.0"),
    "numbers": (lambda data: changed(data, numbers=lambda n: n | {"more": 0}), "numbers: expected seconds, "),
    "groups": (lambda data: changed(data, coefficients=lambda _: []), "coefficients: expected controls"),
    "series": (lambda data: changed(data, series=lambda s: {"value": 4}), "series: expected value, gradient_norm"),
    "a long series": (lambda data: changed(data, series=lambda s: s | {"value": 2**31 - 1}), "bytes of numbers, got"),
    "sizes": (lambda data: changed(data, sizes=lambda s: s[1:]), "coefficients of other sizes"),
    "nodes": (lambda data: changed(data, nodes=lambda s: ["0" * 32]), "belong to the mesh and its partition"),
    "NaN": (lambda data: data[:-8] + np.array([np.nan]).tobytes(), "expected finite coefficients"),
    "cut off": (lambda data: data[:-8], "bytes of numbers, got"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_no_training_wrote_is_refused(fault, written, tmp_path):
    path = tmp_path / "file"
    change, message = FAULTS[fault]
    path.write_bytes(change(written))
    seal(COMM_SELF, path)
    problem = plain()
    before = [p.get(k) for p in problem.parameters for k in range(len(p.functions))]
    with pytest.raises(ValueError, match=f"^resume: {path} is no checkpoint to go on from: .*{message}"):
        train(problem, {"tao_max_it": 4}, resume=path)
    for c, d in zip(before, [p.get(k) for p in problem.parameters for k in range(len(p.functions))]):
        assert_array_equal(c, d)


def test_a_damaged_file_is_refused(written, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(written)
    with pytest.raises(ValueError, match="^resume: .* it does not end with a checksum"):
        train(plain(), resume=path)
    seal(COMM_SELF, path)
    data = bytearray(path.read_bytes())
    data[len(written) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="^resume: .* its checksum is not that of its bytes"):
        train(plain(), resume=path)


@on_ranks
def test_arguments_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match="^resume: there is no file "):
        train(plain(), resume=path)
    with pytest.raises(FileNotFoundError, match="^checkpoint: the folder .* does not exist"):
        train(plain(), checkpoint=TrainingCheckpoint(tmp_path / "no" / "file"))
    with pytest.raises(ValueError, match="^ranks: expected None with checkpoint"):
        train(plain(), ranks=(4,), checkpoint=TrainingCheckpoint(path))
    with pytest.raises(TypeError, match="^checkpoint: expected "):
        train(plain(), checkpoint=str(path))
    with pytest.raises(ValueError, match="^every: expected a positive integer, got 0"):
        TrainingCheckpoint(path, 0)
    train(plain(), {"tao_max_it": 3}, checkpoint=TrainingCheckpoint(path, 2))
    with pytest.raises(ValueError, match="^checkpoint: expected every=2, as of the training that .*, got every=3"):
        train(plain(), checkpoint=TrainingCheckpoint(path, 3), resume=path)
    with pytest.raises(ValueError, match="expected one that train_stochastic wrote, got one of train"):
        train_stochastic(plain(), batch_size=8, resume=path)


@on_ranks
def test_without_values_at_nodes_it_goes_on_on_other_ranks(tmp_path):
    """Then up to round-off: a file from rank 0 alone is read by all."""

    def make(alone):
        phi = laplace("disk", "CG1", 4, alone)
        net = ResidualNetwork(phi, bias=phi, layers=2)
        net.start(gain=0.3)
        head = Head(phi, 2)
        head.start(seed=1)
        x, y = phi.Y.coordinates.T
        batch = Batch(phi.Y.batch(np.column_stack([x, y, x * y, x - y])), [0, 1, 0, 1])
        return LearningProblem(net, head, cross_entropy, tikhonov(0.05), batch)

    path = tmp_path / "file"
    if COMM_WORLD.rank == 0:
        train(make(True), {"tao_max_it": 4}, checkpoint=TrainingCheckpoint(path, 3))
    COMM_WORLD.barrier()
    found, whole = train(make(False), {"tao_max_it": 6}, resume=path), make(True)
    expected = train(whole, {"tao_max_it": 6}, checkpoint=TrainingCheckpoint(f"{path}{COMM_WORLD.rank}", 3))
    # Sums over the nodes in another order, after three iterations.
    assert_allclose(found.values, expected.values, rtol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("tool", ["train", "train_stochastic", "train_pam", "train_levenberg_marquardt"])
def test_killed_at_any_moment_it_goes_on_with_the_same_numbers(tool, ranks, tmp_path):
    """SIGKILL to all ranks at random moments, and again after going on, until one run comes to its end."""
    command = ["mpiexec", "-n", str(ranks), sys.executable, str(Path(__file__).with_name("killed.py")), tool]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    subprocess.run([*command, str(tmp_path / "whole")], env=without_mpi(), check=True, timeout=300)
    moments, kills = random.Random(ranks), 0
    while not (tmp_path / "killed" / "result.npz").exists():
        resumed = [*command, str(tmp_path / "killed"), "resume"]
        with subprocess.Popen(resumed, env=without_mpi(), stdout=subprocess.PIPE, text=True) as process:
            if kills < 4:
                for _ in range(moments.randint(2, 7)):
                    process.stdout.readline()
                time.sleep(moments.random() * 0.05)
                for rank in range(ranks):
                    with suppress(ProcessLookupError):
                        os.kill(int((tmp_path / "killed" / f"process {rank}").read_text()), signal.SIGKILL)
                kills += 1
            process.communicate(timeout=300)
    assert kills == 4
    one, other = (np.load(tmp_path / name / "result.npz") for name in ("whole", "killed"))
    assert one.files == other.files and len(one["values"]) == 21
    for name in one.files:
        assert_array_equal(one[name], other[name], err_msg=name)
