"""`python -m fem_resnet report FILE.h5 [--json FILE] [--png FILE]`: a saved network, and its report on stability.

It shows what a file of `fem_resnet.save` holds, and `stability_report` along the solutions from a few smooth initial states.
Of a Python file whose function `problem()` or `problem(comm)` returns a LearningProblem it takes the network and the first
samples of the problem. The exit code is 0, or 2 if there was nothing to report on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc
from pyadjoint.tape import stop_annotating

from fem_resnet.learning.problem import LearningProblem
from fem_resnet.reporting import check_files, table, write
from fem_resnet.theory.sensitivity.report import stability_report
from fem_resnet.verify.subject import problem_at

__all__ = ["main"]

#: Each sample has a linearisation of its own; a few are enough.
_SAMPLES = 4


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
        prog="python -m fem_resnet report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="a saved network, or a Python file with problem()")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the page there")
    given = parser.parse_args(arguments)
    PETSc.Options().setValue("options_left", "no")  # PETSc would complain about the arguments, which it sees too
    comm = MPI.COMM_WORLD
    try:
        check_files(comm, json=given.json, png=given.png)
        problem = problem_at(given.file, comm)
        if problem.batch.samples > _SAMPLES:
            problem = problem.replace(batch=problem.minibatches(_SAMPLES)[0])
        described = _described(problem)
        with stop_annotating():
            report = stability_report(problem.net, problem.initial_state())
    except (OSError, ImportError, TypeError, ValueError, AttributeError) as error:
        if comm.rank == 0:
            sys.stderr.write(f"fem_resnet report: {error}\n")
        return 2
    if comm.rank == 0:
        sys.stdout.write(described)
    write(report, comm, json=given.json, png=given.png)
    return 0


def _described(problem: LearningProblem) -> str:
    """The parts of a problem, and the norms of its parameters. Collective."""
    parts = [problem.net, *(part for part in (problem.head, problem.lift) if part is not None)]
    rows = []
    for parameter in problem.parameters:
        norms = [np.sqrt(parameter.pair(k, c, c)) for k in range(len(parameter.functions)) for c in [parameter.get(k)]]
        rows.append((parameter.name, str(len(norms)), f"{min(norms):.3g}", f"{max(norms):.3g}"))
    lines = [*map(str, parts), "", *table(("parameter", "in time", "least norm", "largest norm"), rows), "", ""]
    return "\n".join(lines)
