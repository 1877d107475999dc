"""How the tests are run; `containers/run pytest` is the whole default run.

A run of all tests has a worker on each core (pytest-xdist); ``-n 0`` has none, and so has a run of files that are named.

Every test is written for any number of ranks. ``@pytest.mark.parallel([1, 2, 3])`` only says on which numbers of ranks
the default run repeats it; without the marker a test runs on one. A session runs what is marked for the number of ranks
that it has been started on: `test_on_ranks.py` starts one on two ranks and one on three, and by hand

    containers/run mpiexec -n 2 pytest -m "parallel[2]" tests/test_network.py

does the same. Of a test with many parameters the default run takes a few on one rank and one on more, on three ranks of every
second test. Tests that list what there is are marked `whole` and take all. Tests marked `slow` run where -m names them:
``pytest -m slow``.
All tests with all parameters are ``-m "slow or not slow"``, on several ranks ``-m "parallel[2] or slow"``.
"""

import faulthandler
import fcntl
import os
import signal
import subprocess
import sys
import zlib
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

# PETSc would take pytest's arguments for its own options, and complain about them at the end.
arguments, sys.argv = sys.argv, sys.argv[:1]
import firedrake  # noqa: E402, F401

sys.argv = arguments

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from firedrake import COMM_WORLD  # noqa: E402
from firedrake.adjoint import taylor_test, taylor_to_dict  # noqa: E402
from helpers import without_mpi  # noqa: E402
from pyadjoint import Tape, annotate_tape, continue_annotation, pause_annotation, set_working_tape  # noqa: E402
from pyadjoint.enlisting import Enlist  # noqa: E402

#: Seconds after which a test on several ranks counts as hanging: its stacks are printed, then the ranks are killed.
TIME_LIMIT = int(os.environ.get("FEM_RESNET_TEST_TIME_LIMIT", 180))

#: The same on one rank, where a test may start a session on several ranks.
TIME_LIMIT_ALONE = 1500

#: By the number of ranks: how many sets of parameters of a test run by default, and of every how many-th test.
SAMPLES = {1: (16, 1), 2: (1, 1), 3: (1, 2)}

#: What tests found out for the summary: the smallest Taylor rates by row and column, what `verify` caught, lines of text.
SUMMARY = pytest.StashKey[dict]()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """A run of all tests on one rank has workers: with an equal part each, and those that are done take from others."""
    everything, worker = config.args_source != config.ArgsSource.ARGS, hasattr(config, "workerinput")
    if COMM_WORLD.size == 1 and everything and not worker and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses, config.option.dist = "auto", "worksteal"


def pytest_configure(config):
    config.stash[SUMMARY] = {"rates": {}, "faults": [], "sound": [], "lines": []}
    config.addinivalue_line("markers", "command(*words): what the fixture `printed` runs")
    config.pluginmanager.register(OnRanks(os.dup(2)) if COMM_WORLD.size > 1 else OnOneRank(), "ranks")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Keep what is marked for this number of ranks, and of the slow tests what is asked for by name."""

    def selected(item):
        markers = {marker.name for marker in item.iter_markers()}
        return f"parallel[{COMM_WORLD.size}]" in markers and ("slow" not in markers or "slow" in config.option.markexpr)

    kept = [item for item in items if selected(item)]
    if COMM_WORLD.size in SAMPLES and "slow" not in config.option.markexpr:
        kept = sample(kept, *SAMPLES[COMM_WORLD.size])
    config.hook.pytest_deselected(items=list(set(items) - set(kept)))
    items[:] = kept


def sample(items, most, every):
    """At most `most` items of every so many-th test function, from the last to the first; all items marked `whole`."""
    alike = defaultdict(list)
    for item in items:
        alike[item.nodeid.split("[")[0]].append(item)
    chosen = {
        each[k]
        for each in list(alike.values())[::every]
        for k in np.linspace(len(each) - 1, 0, min(most, len(each))).round().astype(int)
    }
    return [item for item in items if item in chosen or item.get_closest_marker("whole")]


class OnRanks:
    """A session on several ranks: no hang lasts for ever, no failure goes unseen."""

    def __init__(self, stderr):
        self.stderr = stderr
        # Where ranks are more than cores, those that wait and yield then let others go on sooner: an eighth faster.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        self.watch()

    def watch(self):
        # The signal kills this rank even inside a blocking MPI call; mpiexec then ends the others.
        faulthandler.dump_traceback_later(TIME_LIMIT, file=self.stderr)
        signal.alarm(TIME_LIMIT + 3)

    def pytest_runtest_logstart(self):
        self.watch()

    def pytest_sessionfinish(self):
        self.watch()

    @pytest.hookimpl(trylast=True)
    def pytest_exception_interact(self):
        self.watch()  # pytest has just stopped the watch

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        # The other ranks may now wait for this one for ever: say why before that.
        report = yield
        if report.failed:
            text = f"\n== rank {COMM_WORLD.rank}: {item.nodeid} failed in its {call.when}\n{report.longreprtext}\n"
            os.write(self.stderr, text.encode())
        return report


class OnOneRank:
    """A session on one rank, or one of its workers. A test with the fixture `alone` waits until no other runs.

    Ranks that wait for each other with less than a core each take minutes for what else takes seconds: MUMPS 170 s for 0.4 s.
    """

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        def stop(*_):
            raise TimeoutError(f"{item.nodeid} takes longer than {TIME_LIMIT_ALONE} s")

        with open(__file__) as file:
            fcntl.flock(file, fcntl.LOCK_EX if "alone" in item.fixturenames else fcntl.LOCK_SH)
            before = signal.signal(signal.SIGALRM, stop)
            signal.alarm(TIME_LIMIT_ALONE)
            try:
                return (yield)
            finally:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, before)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        """Tests that run alone come last."""
        items.sort(key=lambda item: "alone" in item.fixturenames)

    def pytest_sessionfinish(self, session):
        """What a worker found goes to the session that prints it."""
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["summary"] = session.config.stash[SUMMARY]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        found, summary = getattr(node, "workeroutput", {}).get("summary", {}), node.config.stash[SUMMARY]
        for row, columns in found.pop("rates", {}).items():
            for column, rates in columns.items():
                note(summary["rates"], row, column, rates)
        for name, each in found.items():
            summary[name] += each


def note(rates, row, column, found):
    """Note Taylor rates in the table of the summary, if they are the smallest of their row and column."""
    known = rates.setdefault(row, {})
    known[column] = tuple(map(min, found, known.get(column, found)))


def pytest_terminal_summary(terminalreporter, config):
    """The faults that `verify` caught, and the smallest Taylor rates: rows with the same columns make a table."""
    summary = config.stash[SUMMARY]
    for line in summary["lines"]:
        terminalreporter.line(line)
    faults, sound = summary["faults"], summary["sound"]
    if faults or sound:
        terminalreporter.section("verify")
        terminalreporter.line(f"faults: {sum(faults)} caught of {len(faults)} planted")
        terminalreporter.line(f"false alarms: {len(sound) - sum(sound)} in {len(sound)} random sound networks")
    tables = defaultdict(dict)
    for name, row in summary["rates"].items():
        tables[tuple(row)][name] = row
    if tables:
        terminalreporter.section("Taylor rates R0 / R1 / R2, the last where Hessians are tested")
    for columns, rows in tables.items():
        wide = max(map(len, rows)) + 2
        width = max(21, *map(len, columns)) + 2
        terminalreporter.line(f"{'':{wide}}" + "".join(f"{column:>{width}}" for column in columns))
        for name, row in rows.items():
            cells = (" / ".join(f"{rate:.3f}" for rate in found) for found in row.values())
            terminalreporter.line(f"{name:{wide}}" + "".join(f"{cell:>{width}}" for cell in cells))


# -- fixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def tape():
    """A fresh tape, annotation off; a test that leaves it on fails."""
    pause_annotation()
    with set_working_tape(Tape()) as tape:
        yield tape
    left_on = annotate_tape()
    pause_annotation()
    assert not left_on, "the test left pyadjoint's annotation on; wrap what is to be taped in `with annotation():`"


@pytest.fixture
def found(request):
    """For the summary: ``found["faults"].append(caught)`` and ``["sound"].append(silent)`` of `verify`, "lines", "rates"."""
    return request.config.stash[SUMMARY]


@pytest.fixture
def printed(request):
    """The lines that the command of the marker `command` prints; it must end with code 0."""
    command, root = request.node.get_closest_marker("command").args, Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, env=without_mpi(), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout.splitlines()


@pytest.fixture
def alone():
    """No other test runs beside one that starts several ranks itself, or measures times; see `OnOneRank`."""


@pytest.fixture
def annotation():
    """``with annotation(): ...`` records on the tape, ``with annotation(False): ...`` does not."""

    @contextmanager
    def annotation(on=True):
        if on:
            continue_annotation()
        try:
            yield
        finally:
            pause_annotation()

    return annotation


@pytest.fixture
def rng(request):
    """Random numbers that depend on the test's name alone, and are the same on every rank and number of ranks."""
    function = getattr(request.node, "originalname", request.node.name)
    return np.random.default_rng(zlib.crc32(function.encode()))


@pytest.fixture
def tmp_path(tmp_path):
    """The temporary folder of rank 0, on every rank."""
    return Path(COMM_WORLD.bcast(str(tmp_path)))


@pytest.fixture
def taylor(request):
    """``taylor(J, m, h, row, column)``: Taylor test of a ReducedFunctional in the direction h, noted in the summary.

    The remainder without the derivative must fall at rate 1, the one with it at rate 2; with ``second_order=True`` that
    with the Hessian too at rate 3. Returns these rates. For m and h of size one the steps are 1e-4 h to 1.25e-5 h:
    short enough for a direction in which one derivative happens to be small beside the next one, and long enough for
    round-off to be 1e-5 of the remainders or less. For the third remainder they are ten times as long for that reason.
    """
    rates = request.config.stash[SUMMARY]["rates"]

    def taylor(J, m, h, row, column, second_order=False):
        h = [direction._ad_mul(0.1 if second_order else 0.01) for direction in Enlist(h)]
        if second_order:
            found = taylor_to_dict(J, m, h)
            first, second, third = (found[f"R{order}"]["Rate"] for order in range(3))
            # Up to the first remainder that round-off of J has a part in; the first rate always counts.
            round_off = 64 * np.finfo(float).eps * abs(float(J(m)))
            third = third[: max(1, np.count_nonzero(np.array(found["R2"]["Residual"][1:]) > round_off))]
            # Over the longer steps curvature shows in the first rates of R0: the last one counts.
            found = first[-1], min(second), min(third)
        else:
            found = taylor_test(J, m, h, dJdm=0), taylor_test(J, m, h)
        note(rates, row, column, tuple(map(float, found)))
        assert abs(found[0] - 1) < (0.05 if second_order else 0.02), (
            f"{row}, {column}: R0 falls at rate {found[0]:.3f}, expected 1.00"
        )
        for order, rate in enumerate(found[1:], start=1):
            wanted = (1.98, 2.95)[order - 1]
            assert rate > wanted, f"{row}, {column}: R{order} falls at rate {rate:.3f}, expected more than {wanted}"
        return found

    return taylor
