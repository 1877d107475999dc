"""What a user sees of a training on its way, and how Ctrl-C ends it: the same for all algorithms, on any number of ranks."""

import contextlib
import fcntl
import logging
import os
import pty
import signal
import struct
import sys
import termios
import threading

import numpy as np
import pytest
from firedrake import COMM_WORLD, Ensemble
from helpers import laplace, smooth
from numpy.testing import assert_array_equal
from problems import learning_problem, network
from test_levenberg_marquardt import taught

from fem_resnet import (
    Batch,
    RowBox,
    choose_lambda,
    msa,
    train,
    train_by_ranks,
    train_levenberg_marquardt,
    train_pam,
    train_stochastic,
)  # fmt: skip
from fem_resnet.training.progress import Progress
from fem_resnet.training.signals import Signals

on_ranks = pytest.mark.parallel([1, 2, 3])
LAST = COMM_WORLD.rank == COMM_WORLD.size - 1
#: J is of size one.
ROUND_OFF = 1e-12


def classes():
    return learning_problem(network("disk", "CG1", bias="basis"))


def held(**options):
    """Training with a validation batch, which is what the monitor's number belongs to."""
    problem = classes()
    validation = Batch(problem.net.Y.batch(smooth(problem.net.Y, 4, seed=7)), problem.batch.targets)
    return problem, lambda **watched: train_stochastic(problem, batch_size=2, epochs=8, validation=validation, **watched)


def by_tao(parameters, make=classes, **options):
    def start():
        problem = make()
        return problem, lambda **watched: train(problem, {"tao_max_it": 8} | parameters, **options, **watched)

    return start


def alternating():
    problem = classes()
    return problem, lambda **watched: train_pam(problem, {"tao_max_it": 2}, iterations=8, **watched)


def squares(**options):
    def start():
        problem = taught(weight=1e-3)
        return problem, lambda **watched: train_levenberg_marquardt(problem, iterations=8, **options, **watched)

    return start


def approximations():
    problem = classes().replace(regulariser=None)
    A = RowBox(laplace("disk", "CG1", 4), (-9, 9), (-9, 9))
    return problem, lambda **watched: msa(problem, A, variant="basic", iterations=8, project=True, **watched)


#: Each algorithm: its problem, and a function that trains it with a monitor.
ALGORITHMS = {
    "L-BFGS": by_tao({}),
    "Levenberg and Marquardt": squares(),
    "stochastic": held,
    "PAM": alternating,
    "MSA": approximations,
    "L-BFGS, head eliminated": by_tao({}, lambda: taught(weight=1e-3), eliminate="head"),
    "L-BFGS by ranks": by_tao({}, ranks=(1, 3, 4)),
    "nls": by_tao({"tao_type": "nls"}),
    "ntr": by_tao({"tao_type": "ntr"}),
    "cg": by_tao({"tao_type": "cg"}),
    "bncg": by_tao({"tao_type": "bncg"}, bounds={"bias": (-0.1, 0.1)}),
    "blmvm": by_tao({}, bounds={"bias": (-0.1, 0.1)}),
    "bnls": by_tao({"tao_type": "bnls"}, bounds={"bias": (-0.1, 0.1)}),
    "bqnls": by_tao({"tao_type": "bqnls"}, bounds={"bias": (-0.1, 0.1)}),
    "Levenberg and Marquardt, head eliminated": squares(eliminate="head"),
}  # fmt: skip
each_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
#: One of each function that trains.
each_function = pytest.mark.parametrize("name", list(ALGORITHMS)[:5])


# -- the monitor -----------------------------------------------------------------------------------------------------


@on_ranks
@each_algorithm
def test_a_monitor_sees_the_parameters_that_its_numbers_belong_to(name):
    problem, training = ALGORITHMS[name]()
    told, found = [], []

    def monitor(progress):
        seen = getattr(progress, "problem", problem)
        if name == "stochastic":  # its J is a mean over the epoch, its validation loss is of the state after it
            told.append(progress.validation)
            validation = Batch(seen.net.Y.batch(smooth(seen.net.Y, 4, seed=7)), seen.batch.targets)
            seen = seen.replace(batch=validation, regulariser=None)
        else:
            told.append(progress.value)
        found.append(float(seen.evaluate()[0]))

    training(monitor=monitor)
    assert len(told) >= 6 and np.ptp(told) > 1e-6, "nothing moved"
    assert np.abs(np.subtract(told, found)).max() <= ROUND_OFF, (told, found)


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def interrupted_at(iteration, times=1, everywhere=False):
    """A monitor during which Ctrl-C is pressed, so many times; on the last rank, or on all."""
    seen = []

    def monitor(progress):
        seen.append(progress)
        if progress.counted[1] == iteration and (LAST or everywhere):
            for _ in range(times):
                interrupt()

    return monitor, seen


@on_ranks
@pytest.mark.parametrize("name", list(ALGORITHMS)[:8])
def test_ctrl_c_on_one_rank_stops_all_after_the_iteration_and_keeps_the_best(name, capfd):
    problem, training = ALGORITHMS[name]()
    handler = signal.getsignal(signal.SIGINT)
    monitor, seen = interrupted_at(2)
    result = training(monitor=monitor)
    assert signal.getsignal(signal.SIGINT) is handler
    assert result.reason == "INTERRUPTED"
    if "by ranks" in name:  # the stages after the interrupted one end at once
        assert [stage.iterations for stage in (*result.stages, result)] == [2, 0, 0]
        assert [stage.reason for stage in (*result.stages, result)] == ["INTERRUPTED"] * 3
    else:
        assert len(result.values) == 3 and seen[-1].counted[1] == 2
    if name in ("stochastic", "MSA"):
        assert result.value <= np.min(result.values) + 1  # a number; what is kept is tested with each of them
    else:
        assert abs(float(problem.evaluate()[0]) - result.value) <= ROUND_OFF
        assert result.value <= min(p.value for p in seen) + ROUND_OFF
    assert ("stops after this iteration" in capfd.readouterr().err) == LAST


@on_ranks
def test_a_scheduler_s_signal_stops_all_too_unless_the_program_handles_it():
    problem, training = ALGORITHMS["L-BFGS"]()

    def monitor(progress):
        if progress.iteration == 2 and LAST:
            os.kill(os.getpid(), signal.SIGTERM)

    assert training(monitor=monitor).reason == "TERMINATED"
    noted = []
    before = signal.signal(signal.SIGTERM, lambda *_: noted.append(True))
    try:
        assert training(monitor=monitor).reason != "TERMINATED"
    finally:
        assert signal.signal(signal.SIGTERM, before) is not before
    assert noted == [True] * LAST


@on_ranks
@pytest.mark.parametrize("name", ["L-BFGS", "PAM", "stochastic"])
def test_a_second_ctrl_c_ends_it_at_once(name):
    problem, training = ALGORITHMS[name]()
    handler = signal.getsignal(signal.SIGINT)
    monitor, seen = interrupted_at(2, times=2, everywhere=True)
    with pytest.raises(KeyboardInterrupt):
        training(monitor=monitor)
    assert signal.getsignal(signal.SIGINT) is handler and seen[-1].counted[1] == 2
    assert np.isfinite(float(problem.evaluate()[0]))


@on_ranks
def test_after_ctrl_c_another_call_goes_on():
    problem, training = ALGORITHMS["L-BFGS"]()
    first = training(monitor=interrupted_at(3)[0])
    second = training(quiet=True)
    assert abs(second.values[0] - first.value) <= ROUND_OFF
    assert (second.reason, second.iterations) == ("ITERATIONS", 8)


@on_ranks
def test_trainings_inside_of_another_end_with_it():
    problem = classes()
    trained = []

    def stochastic(stage):
        trained.append(train_stochastic(stage, batch_size=2, epochs=3, monitor=interrupted_at(1)[0] if not trained else None))
        return trained[-1]

    assert [each.epochs for each in train_by_ranks(problem, (1, 3, 4), stochastic)] == [1, 0, 0]
    starts = []

    def once(changed):
        starts.append(changed)
        return train(changed, {"tao_max_it": 3}, monitor=interrupted_at(1)[0])

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        choose_lambda(problem, [0.5, 0.1], once, folds=2)
    assert len(starts) == 1 and signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parallel([2, 3])
def test_ctrl_c_on_one_member_of_an_ensemble_stops_all():
    ensemble = Ensemble(COMM_WORLD, 1)
    problem = learning_problem(network("disk", "CG1", alone=True)).replace(ensemble=ensemble)
    result = train(problem, {"tao_max_it": 5}, monitor=interrupted_at(2)[0])
    assert (result.reason, result.iterations) == ("INTERRUPTED", 2)
    stopped = train(problem, {"tao_max_it": 5}, monitor=lambda progress: LAST and progress.iteration == 1)
    assert (stopped.reason, stopped.iterations) == ("STOPPED", 1)


@on_ranks
def test_some_of_the_ranks_decide_nothing():
    """A training of one member inside of one of all members does not end alone."""
    with Signals(COMM_WORLD) as all_ranks:
        if LAST:
            interrupt()
        with Signals(COMM_WORLD.Split(COMM_WORLD.rank)) as member:
            before = member.reason()
            assert all_ranks.reason() == "INTERRUPTED"
            assert member.reason() == "INTERRUPTED"
    assert before == ("INTERRUPTED" if COMM_WORLD.size == 1 else None)


def test_in_another_thread_python_has_no_signals():
    problem, training = ALGORITHMS["L-BFGS"]()
    results, handler = [], signal.getsignal(signal.SIGINT)

    def run():
        with Signals(COMM_WORLD) as signals:
            results.append((signals.reason(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results == [(None, handler)]


# -- what is shown ---------------------------------------------------------------------------------------------------


@on_ranks
def test_in_a_file_of_output_the_first_and_the_last_iteration_are_lines(capfd):
    _, training = ALGORITHMS["L-BFGS"]()
    capfd.readouterr()
    result = training()
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("iteration")]
    if COMM_WORLD.rank == 0:
        assert [line.split()[1] for line in lines] == ["0", "8"]
        assert f"J = {result.values[-1]:.8e}" in lines[-1]
    else:
        assert not lines


@each_function
def test_quiet_is_quiet(name, capfd):
    _, training = ALGORITHMS[name]()
    capfd.readouterr()
    training(quiet=True)
    out, err = capfd.readouterr()
    assert "iteration" not in out + err and "epoch" not in out + err


def test_a_logger_that_was_set_up_gets_what_it_asks_for_and_nothing_else_is_shown(caplog, capfd):
    _, training = ALGORITHMS["stochastic"]()
    capfd.readouterr()
    with caplog.at_level(logging.INFO, logger="fem_resnet"):
        training()
    assert [text.split()[:2] for text in caplog.messages] == [["epoch", str(k)] for k in range(9)]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="fem_resnet"):
        training()
    assert not caplog.messages
    assert "epoch" not in capfd.readouterr().err


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    _, training = ALGORITHMS["L-BFGS"]()
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))
    parts = []

    def read():
        with contextlib.suppress(OSError):  # the end of a terminal that nobody writes to any more
            while part := os.read(ours, 4096):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        result = training()
    reader.join()
    os.close(ours)
    lines = b"".join(parts).decode().replace("\n", "\r").split("\r")
    bars = [line for line in lines if "iterations" in line]
    assert "8/8" in bars[-1] and f"J = {result.values[-1]:.8e}" in bars[-1], bars[-1]
    assert not any(line.startswith("iteration ") for line in lines)


def test_a_report_says_how_much_time_is_left():
    text = str(Progress(iteration=5, iterations=20, value=0.25, gradient_norm=1e-3, seconds=10.0))
    assert text == "iteration    5 of 20   J = 2.50000000e-01   |gradient| = 1.00e-03     30 s left"
    assert_array_equal(Progress(0, 0, 1.0, 1.0, 0.0).counted, ("iteration", 0, 0))
