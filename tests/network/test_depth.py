"""Any depth: gradients under schedules of checkpoints, in memory that they bound."""

import gc
import json
import os
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from checkpoint_schedules import (
    DiskRevolve,
    HRevolve,
    MixedCheckpointSchedule,
    MultistageCheckpointSchedule,
    Revolve,
    SingleDiskStorageSchedule,
    SingleMemoryStorageSchedule,
    StorageType,
    TwoLevelCheckpointSchedule,
)
from firedrake.adjoint import taylor_test
from helpers import half_square_distance, smooth
from problems import gradients, learning_problem, network
from pyadjoint import Control, ReducedFunctional
from pyadjoint.checkpointing import CheckpointError
from pyadjoint.enlisting import Enlist

from fem_resnet import Batch, LearningProblem, StepFailure, enable_checkpointing, train

on_ranks = pytest.mark.parallel([1, 2, 3])
#: mixed.py of checkpoint_schedules says that it is slower without Numba.
pytestmark = pytest.mark.filterwarnings("ignore:Numba not available")

LAYERS = 7
SCHEDULES = {
    "a number": 3,
    "one state": 1,
    "all in memory": lambda n: SingleMemoryStorageSchedule(),
    "revolve": lambda n: Revolve(n, 2),
    "multistage": lambda n: MultistageCheckpointSchedule(n, 1, 2),
    "mixed, in memory": lambda n: MixedCheckpointSchedule(n, 2, storage=StorageType.RAM),
    "mixed, on disk": lambda n: MixedCheckpointSchedule(n, 2, storage=StorageType.DISK),
    "two levels": lambda n: TwoLevelCheckpointSchedule(2, binomial_snapshots=1),
    "memory and disk": lambda n: HRevolve(n, 1, 2, wd=0.1, rd=0.1),
    "disk": lambda n: SingleDiskStorageSchedule(),
    "disk, moved": lambda n: SingleDiskStorageSchedule(move_data=True),
}
ON_DISK = [name for name in SCHEDULES if "disk" in name] + ["multistage", "two levels"]
NETWORKS = {
    "shared": {"bias_in_time": "shared", "kernel_in_time": "shared"},
    "grouped": {"bias_in_time": [0, 0, 1, 1, 1, 2, 2], "kernel_in_time": [0, 1, 1, 1, 2, 2, 2]},
    "own, two layers a Block": {"bias": "basis", "layers_per_block": 2},
    "linear": {"kernel_in_time": "linear"},
    "adapted steps": {"solver_parameters": {"ts_type": "rk", "ts_rk_type": "3bs", "ts_adapt_type": "basic"}},
    "implicit": {"solver_parameters": {"ts_type": "cn"}},
}


def deep(checkpoints=None, head=True, **options) -> LearningProblem:
    net = network("disk", "CG1", **{"times": np.linspace(0, 1.3, LAYERS + 1), "layers_per_block": 1} | options)
    problem = learning_problem(net, head=head)
    return LearningProblem(net, problem.head, problem.loss, problem.regulariser, problem.batch, checkpoints=checkpoints)


def elsewhere(functions, factor=1.1) -> list:
    return [function._ad_mul(factor) for function in functions]


def values_and_gradients(problem) -> list:
    """J and its gradient where it was recorded, and twice elsewhere."""
    J = problem.reduced_functional()
    found = [[float(J.functional)], *gradients(problem, Enlist(J.derivative()))]
    for factor in (1.1, 0.8):
        found += [[float(J(elsewhere(problem.functions, factor)))], *gradients(problem, Enlist(J.derivative()))]
    return found


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13 * max(np.abs(other).max(), 1e-300))


# -- the gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["shared", "own, two layers a Block"])
def test_values_and_gradients_do_not_depend_on_the_schedule(schedule, kind):
    assert_same(
        values_and_gradients(deep(SCHEDULES[schedule], **NETWORKS[kind])), values_and_gradients(deep(**NETWORKS[kind]))
    )


@on_ranks
@pytest.mark.parametrize("schedule", ["a number", "mixed, on disk"])
def test_values_and_gradients_do_not_depend_on_the_schedule_on_ranks(schedule):
    assert_same(values_and_gradients(deep(SCHEDULES[schedule])), values_and_gradients(deep()))


@pytest.mark.parametrize("schedule", ["a number", "all in memory", "disk"])
@pytest.mark.parametrize("kind", ["grouped", "linear", "adapted steps", "implicit"])
def test_nor_do_those_of_other_networks(schedule, kind):
    assert_same(
        values_and_gradients(deep(SCHEDULES[schedule], **NETWORKS[kind])), values_and_gradients(deep(**NETWORKS[kind]))
    )


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("schedule", ["a number", "disk"])
def test_networks_without_an_interface_take_schedules_too(layers, schedule):
    def problem(checkpoints):
        net = network("disk", "CG1", times=np.linspace(0, 1.3, layers + 1))
        made = learning_problem(net)
        return LearningProblem(net, made.head, made.loss, None, made.batch, checkpoints=checkpoints)

    def head_of(found):
        return [part for part in found if np.size(part)]

    scheduled, plain = (values_and_gradients(problem(checkpoints)) for checkpoints in (SCHEDULES[schedule], None))
    assert_same(head_of(scheduled), head_of(plain))


def test_the_gradient_in_the_initial_state_is_there():
    def gradient(checkpoints):
        problem = deep(head=False, **NETWORKS["shared"])
        problem = LearningProblem(problem.net, None, problem.loss, None, problem.batch, learn="both", checkpoints=checkpoints)
        return [part.dat.data_ro.copy() for part in problem.reduced_functional().derivative()]

    assert_same(gradient(2), gradient(None))


@on_ranks
def test_taylor_under_a_schedule(taylor, rng):
    problem = deep(2)
    J = problem.reduced_functional()
    h = [function.copy(deepcopy=True) for function in Enlist(J.derivative(apply_riesz=True))]
    taylor(J, problem.functions, elsewhere(h, 1 / J.functional), "under a schedule", "7 layers, 2 states")
    assert taylor_test(J, problem.functions, elsewhere(h, 0.01)) > 1.98


@on_ranks
def test_training_goes_the_same_way():
    def result(checkpoints):
        return train(deep(checkpoints, **NETWORKS["shared"]), {"tao_max_it": 5}, monitor=lambda progress: None)

    np.testing.assert_allclose(result(2).values, result(None).values, rtol=1e-13)


@on_ranks
@pytest.mark.parametrize("schedule", ["a number", "disk"])
def test_another_batch_is_seen_on_the_way_back_too(schedule):
    problem = deep(SCHEDULES[schedule])
    J = problem.reduced_functional()
    J.derivative()
    other = Batch(problem.net.Y.batch(smooth(problem.net.Y, 4, seed=9)), [2, 1, 0, 2])
    problem.exchange(other)
    fresh = LearningProblem(problem.net, problem.head, problem.loss, problem.regulariser, other)
    J_fresh = fresh.reduced_functional()
    assert abs(J(problem.functions) - J_fresh.functional) < 1e-13
    assert_same(gradients(problem, J.derivative()), gradients(fresh, J_fresh.derivative()))


def test_a_tape_of_ones_own_takes_a_schedule(tape, annotation):
    net = deep(**NETWORKS["shared"]).net
    target = net.Y.batch(smooth(net.Y, 4, seed=3))

    def gradient(tape):
        with annotation():
            J = half_square_distance(net(net.Y.batch(smooth(net.Y, 4))), target, net.Y)
        return ReducedFunctional(J, Control(net.kernel.functions[0]), tape=tape).derivative().dat.data_ro.copy()

    wanted = gradient(tape)
    tape.clear_tape()
    enable_checkpointing(tape, 2, net.blocks)
    assert_same([gradient(tape)], [wanted])


def test_a_failed_step_leaves_the_tape_usable():
    problem = deep(2, activation="identity")
    J = problem.reduced_functional()
    wanted = [part.dat.data_ro.copy() for part in J.derivative()]
    with pytest.raises(StepFailure):
        J(elsewhere(problem.functions, 1e200))
    J(problem.functions)
    assert_same([part.dat.data_ro for part in J.derivative()], wanted)


# -- what it costs ---------------------------------------------------------------------------------------------------


def test_no_step_of_the_tape_stores_leaves():
    # pyadjoint alone stores each layer's own controls in all steps before it: 2 x 7 x 8 / 2 of them here.
    J = deep(3).reduced_functional()
    J.derivative()
    assert [len(step.checkpointable_state) for step in J.tape.timesteps] == [0] + [1] * (LAYERS - 1)


def in_a_process(**options) -> dict:
    script = Path(__file__).with_name("deep_network.py")
    done = subprocess.run([sys.executable, script, json.dumps(options)], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "options",
    [{"checkpoints": 15, "layers_per_block": 2}, {"groups": 20, "layers_per_block": 25, "checkpoints": 6}],
    ids=["shared", "grouped"],
)
def test_a_thousand_layers_take_a_twentieth_of_a_field_at_every_interface(options):
    # 2,025 nodes and 64 samples; "grown" is the peak, with everything that the network, tape and gradient are.
    found = in_a_process(layers=1000, **options)
    assert found["fields"] > 900 and 20 * found["grown"] < found["fields"], found


@pytest.mark.slow
def test_ten_thousand_layers_do_too():
    found = in_a_process(layers=10_000, checkpoints=30)
    assert 20 * found["grown"] < found["fields"], found


def test_200_gradients_do_not_grow_the_process():
    # In memory and on disk; one field more an evaluation would be 6 %.
    resident = in_a_process(layers=6, cells=13, evaluations=200, schedule=["MultistageCheckpointSchedule", 6, 1, 3])[
        "resident"
    ]
    assert abs(resident[199] / resident[19] - 1) < 0.02, (resident[19], resident[199])


# -- disk ------------------------------------------------------------------------------------------------------------


def open_files() -> list[int]:
    """Sizes of files without a name that this process has open."""
    sizes = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            status = entry.stat()
            if status.st_nlink == 0 and stat.S_ISREG(status.st_mode):
                sizes.append(status.st_size)
    return sorted(sizes)


@pytest.mark.parametrize("schedule", ON_DISK)
def test_disk_files_go_with_their_tape_and_do_not_grow(schedule, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gc.collect()
    before = open_files()
    problem = deep(SCHEDULES[schedule], **NETWORKS["shared"])
    J = problem.reduced_functional()
    sizes = []
    for _ in range(3):
        J.derivative()
        J(problem.functions)
        sizes.append(sum(open_files()) - sum(before))
    field = problem.batch.inputs.dat.data_ro.nbytes
    assert sizes[0] >= field and sizes[1] == sizes[2], f"on disk: {sizes} bytes, a field has {field}"
    assert list(tmp_path.iterdir()) == []
    del J, problem
    gc.collect()
    assert open_files() == before


def links(pid: int):
    """What the open files of a process point to; some close meanwhile."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            yield os.readlink(entry)


def test_a_killed_process_leaves_no_file(tmp_path):
    script = Path(__file__).with_name("deep_network.py")
    options = {"layers": 20, "cells": 8, "schedule": ["SingleDiskStorageSchedule"], "wait": True}
    process = subprocess.Popen(
        [sys.executable, script, json.dumps(options)], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    try:
        assert any("recorded" in line for line in process.stdout), "it ended before it had recorded"
        files = list(links(process.pid))
        assert any(file.startswith(f"{tmp_path}/") and file.endswith("(deleted)") for file in files), files
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = []
    for folder, folders, files in os.walk(tmp_path):
        folders[:] = [name for name in folders if not name.startswith("ompi")]  # MPI's own, which others are clearing
        left += [Path(folder) / name for name in files]
    assert left == []


# -- what is refused -------------------------------------------------------------------------------------------------


def test_tangents_and_hessians_say_what_to_do():
    problem = deep(2)
    J = problem.reduced_functional()
    J.derivative()
    with pytest.raises(NotImplementedError, match="tangents .* record without checkpoints"):
        J.tlm(problem.functions)
    J(problem.functions)
    J.derivative()
    with pytest.raises(NotImplementedError, match="(tangents|Hessians) .* record without checkpoints"):
        J.hessian(problem.functions)


def test_states_and_costates_say_what_to_do():
    _, run = deep(2).record()
    with pytest.raises(RuntimeError, match="state: .* annotation off"):
        run.state(3)
    with pytest.raises(RuntimeError, match="costate: .* record without checkpoints"):
        run.costate(3)
    assert run.final.dat.data_ro.any()


def test_a_derivative_wants_an_evaluation_at_its_point():
    problem = deep(2)
    J = problem.reduced_functional()
    J.derivative()
    with pytest.raises(CheckpointError, match="Evaluate Functional"):
        J.derivative()
    for control in J.controls:
        J(problem.functions)
        control.update(control.control._ad_mul(2.0))
        with pytest.raises(RuntimeError, match="an input has changed"):
            J.derivative()


def test_checkpoints_that_do_not_fit_are_refused():
    used = Revolve(LAYERS, 2)
    next(used)
    for checkpoints, kind, match in (
        (0, ValueError, "at least 1"),
        (True, TypeError, "got bool"),
        ("revolve", TypeError, "got str"),
        (lambda n: 3, TypeError, "a function from a number of steps"),
        (Revolve(LAYERS + 1, 2), ValueError, "a schedule for 7 steps, got a Revolve for 8"),
        (used, ValueError, "in use"),
        (DiskRevolve(LAYERS, 2), ValueError, "HRevolve"),
    ):
        with pytest.raises(kind, match=f"checkpoints: .*{match}"):
            deep(checkpoints)


def test_a_schedule_given_as_an_object_serves_many_recordings():
    problem = deep(Revolve(LAYERS, 2))
    assert_same(values_and_gradients(problem), values_and_gradients(problem))


def test_tapes_that_do_not_fit_are_refused(tape, annotation):
    problem = deep()
    net, f = problem.net, problem.batch.inputs
    enable_checkpointing(tape, 2, LAYERS + 1)
    with annotation(), pytest.raises(ValueError, match="schedule for 7 steps"):
        net(f)
    tape.clear_tape()
    tape.enable_checkpointing(Revolve(LAYERS, 2))
    with annotation(), pytest.raises(RuntimeError, match="fem_resnet.enable_checkpointing"):
        net(f)
    tape.clear_tape()
    with annotation():
        net(f)
    with pytest.raises(ValueError, match="^tape: expected a tape without Blocks"):
        enable_checkpointing(tape, 2, LAYERS)
