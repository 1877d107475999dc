"""`python -m fem_resnet.verify [FILE.h5 | MODULE] [--json FILE] [--png FILE] [--quick] [--exitfirst] [--time-limit SECONDS]`.

Verifies a saved network (`fem_resnet.save`), with smooth inputs and targets; or the problem of a Python module, given by
name or path, whose function `problem()` or `problem(comm)` returns a LearningProblem; or the built-in problems. Rank 0
prints the table to standard output. The exit code is 0 if all checks passed, 1 if one failed, 2 if there was nothing to
verify. If one check takes longer than the limit, each rank says on standard error which check it is and where it waits, and
all ranks are ended.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mpi4py import MPI
from petsc4py import PETSc

from fem_resnet.reporting import check_files, write
from fem_resnet.verify.subject import subject
from fem_resnet.verify.suite import verify

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments
        Its arguments; those of the process if left out.

    Returns
    -------
    int
        The exit code, the same on all ranks.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fem_resnet.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", help="a saved network or a module with problem(); built-in problems if left out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the convergence lines there")
    parser.add_argument("--quick", action="store_true", help="fewer directions, no convergence of co-states")
    parser.add_argument("--exitfirst", action="store_true", help="stop at the first check that fails")
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="time limit of each check; if left out, 600 on several ranks and none on one",
    )
    given = parser.parse_args(arguments)
    PETSc.Options().setValue("options_left", "no")  # PETSc would complain about the arguments, which it sees too
    comm = MPI.COMM_WORLD
    try:
        what = None if given.what is None else subject(given.what, comm)
        check_files(comm, json=given.json, png=given.png)
    except (OSError, ImportError, ValueError, AttributeError) as error:
        if comm.rank == 0:
            sys.stderr.write(f"fem_resnet.verify: {error}\n")
        return 2
    try:
        report = verify(what, quick=given.quick, exit_first=given.exitfirst, time_limit=given.time_limit)
    except (TypeError, ValueError) as error:
        if comm.rank == 0:
            sys.stderr.write(f"fem_resnet.verify: {error}\n")
        return 2
    write(report, comm, json=given.json, png=given.png)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
