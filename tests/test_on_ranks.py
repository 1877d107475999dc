"""The tests that are marked for two and three ranks, one run of mpiexec for each number of ranks.

These are tests like others: ``-k`` and file names leave them out unless they are named. File arguments are handed on,
so that

    containers/run pytest tests/test_basis.py tests/test_on_ranks.py

runs the tests of one file on 1, 2 and 3 ranks, and ``containers/run pytest tests/test_on_ranks.py`` runs all tests on
2 and 3.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__)
#: Seconds for all tests on one number of ranks; a single test that hangs is stopped much earlier, by conftest.py.
TIME_LIMIT = 1200
KEPT = {"OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe"}


def _environment(logs: Path) -> dict[str, str]:
    """The environment of this process without what MPI left in it; with it, ranks that wait give their core to others."""
    leaked = re.compile("(OMPI|PMIX|OPAL|ORTE|PRTE|PMI)_")
    clean = {name: value for name, value in os.environ.items() if name in KEPT or not leaked.match(name)}
    return clean | {"FEM_RESNET_TEST_LOGS": str(logs), "OMPI_MCA_mpi_yield_when_idle": "1"}


def _selection(config) -> list[str]:
    """The file arguments of the session without this file; none if it is the only one, so that all tests run."""
    if config.args_source != config.ArgsSource.ARGS:
        return []
    files = [argument for argument in config.args if Path(argument.split("::")[0]).name != HERE.name]
    return [str(config.invocation_params.dir / argument) for argument in files]


def _launch(ranks: int, selection: list[str], logs: Path, **environment: str) -> int | None:
    """The exit code of the job, or None if it took too long; each rank writes a log of its own."""
    options = ["-v", "-rfE", "-p", "no:cacheprovider", "-m", f"parallel[{ranks}]"]
    command = [sys.executable, "-m", "pytest", *options]
    to_log = 'log=$FEM_RESNET_TEST_LOGS/$OMPI_COMM_WORLD_RANK; exec "$@" --basetemp "$log.tmp" >"$log" 2>&1'
    job = subprocess.Popen(
        ["mpiexec", "-n", str(ranks), "sh", "-c", to_log, "sh", *command, *selection],
        cwd=HERE.parent.parent, env=_environment(logs) | environment, stdin=subprocess.DEVNULL,
        stdout=(logs / "mpiexec").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        return job.wait(TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # mpiexec ends its ranks when it is asked to, not when it is killed.
        if job.poll() is None:
            job.send_signal(signal.SIGTERM)
            try:
                job.wait(20)
            except subprocess.TimeoutExpired:
                job.kill()


def _report(logs: Path) -> str:
    """The end of the output of each rank and of mpiexec, without tests that passed and without frames of pytest."""
    dull = re.compile(r".* PASSED +\[ *\d+%\]$|  File .*/site-packages/(_pytest|pluggy)/|  File .<frozen runpy>")
    ends = []
    for log in sorted(path for path in logs.iterdir() if path.is_file()):
        lines = [line for line in log.read_text().splitlines() if not dull.match(line)]
        ends += [f"---- {'' if log.name == 'mpiexec' else 'rank '}{log.name}", *lines[-60:]]
    return "\n".join(ends)


@pytest.mark.parametrize("ranks", [2, 3])
def test_same_tests_on_several_ranks(ranks, tmp_path, request, found, alone):
    code = _launch(ranks, _selection(request.config), tmp_path)
    what = "took too long and was stopped" if code is None else f"ended with code {code}"
    assert code == 0, f"the run on {ranks} ranks {what}\n{_report(tmp_path)}"
    closing = (tmp_path / "0").read_text().splitlines()[-1]
    passed = re.search(r"(\d+) passed", closing)
    assert passed, f"no test ran on {ranks} ranks: {closing}"
    found["lines"].append(f"{ranks} ranks: {closing.strip('= ')}")


HANGS = """
import pytest
from firedrake import COMM_WORLD

@pytest.mark.parallel(2)
def test_that_fails_on_one_rank():
    assert COMM_WORLD.rank == 0, "rank 1 goes another way"
    COMM_WORLD.recv(source=1)
"""


def test_a_rank_that_fails_while_another_waits_ends_the_job(tmp_path):
    """Every rank says why it failed or where it waits; see `conftest.OnRanks`."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "test_hangs.py").write_text(HANGS)
    selection = ["-p", "conftest", "--rootdir", str(tmp_path), str(tmp_path / "test_hangs.py")]
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    code = _launch(2, selection, tmp_path / "logs", PYTHONPATH=path, FEM_RESNET_TEST_TIME_LIMIT="2")
    assert code not in (0, None)
    report = _report(tmp_path / "logs")
    waits, fails = (tmp_path / "logs" / "0").read_text(), (tmp_path / "logs" / "1").read_text()
    assert "rank 1 goes another way" in fails and "rank 1: " in fails, report
    assert re.search(r"Timeout .*\n(.*\n)*.* in test_that_fails_on_one_rank", waits), report
