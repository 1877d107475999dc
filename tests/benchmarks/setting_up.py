"""The time of setting up a large problem, before the first step of training, phase by phase.

    containers/run python tests/benchmarks/setting_up.py [--nodes N] [--rank R] [--ranks K] [--json FILE]

The problem has a disk of at least N nodes, CG1, R Laplace eigenfunctions, 8 layers of classical Runge-Kutta, 4 samples and
least squares. Phases are timed on K ranks; the slowest rank counts. The eigenfunctions are also read from their cache. A small
problem of the same kind goes through all phases first, so that compilation, once on a machine, is a phase of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sides import on_ranks, ranks_environment
from worker import largest_memory

LAYERS, SAMPLES = 8, 4
#: Seconds that all of it may take with 10^6 nodes, rank 32, on 2 ranks.
TARGET = 120
#: Parts of the eigenfunctions' time, by the names of PETSc's and SLEPc's events.
EVENTS = {
    "factorise, symbolic": "MatCholFctrSym",
    "factorise, numeric": "MatCholFctrNum",
    "solve with factors": "MatSolve",
    "eigensolver, all of it": "EPSSolve",
}


class Phases:
    """Seconds of each phase, and PETSc's events within them."""

    def __init__(self, comm):
        self._comm = comm
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work):
        self._comm.Barrier()
        start = time.perf_counter()
        result = work()
        self._comm.Barrier()
        self.seconds[name] = time.perf_counter() - start
        return result


def set_up(refinements: int, rank: int, cache: Path, phase) -> int:
    """All phases; the number of nodes."""
    import firedrake as fd
    import numpy as np
    from pyadjoint.enlisting import Enlist

    from fem_resnet import Batch, LabelSpace, LearningProblem, ResidualNetwork, laplace_basis, least_squares

    mesh = phase("mesh", lambda: fd.UnitDiskMesh(refinements))
    Y = phase("label space", lambda: LabelSpace(fd.FunctionSpace(mesh, "CG", 1)))
    basis = phase("eigenfunctions", lambda: laplace_basis(Y, rank, cache=cache))
    again = phase("eigenfunctions, from their cache", lambda: laplace_basis(Y, rank, cache=cache))
    assert (again.values == basis.values).all(), "the cache has other eigenfunctions"
    del again
    rng = np.random.default_rng(0)

    def problem() -> LearningProblem:
        net = ResidualNetwork(basis, layers=LAYERS)
        x = Y.coordinates
        for layer in range(LAYERS):
            net.kernel.set(layer, rng.normal(scale=0.5 / np.sqrt(rank), size=(rank, rank)))
            net.bias.set(layer, np.cos(3 * x[:, 0] + layer))
        waves = np.sin(x @ rng.normal(scale=3.0, size=(2, SAMPLES)))
        return LearningProblem(net, None, least_squares, None, Batch(Y.batch(waves), Y.batch(1 - waves**2)))

    problem = phase("network and data", problem)
    J = phase("recording", problem.reduced_functional)
    phase("first J and gradient", lambda: (J(problem.functions), Enlist(J.derivative())))
    return Y.size


def measure(refinements: int, rank: int) -> None:
    """Print a line of JSON on rank 0."""
    began = time.perf_counter()
    import firedrake as fd
    from petsc4py import PETSc

    comm = fd.COMM_WORLD
    phases, compiling = Phases(comm), Phases(comm)
    phases.seconds["imports"] = comm.allreduce(time.perf_counter() - began, op=max)
    with tempfile.TemporaryDirectory() as folder:
        # The directory is rank 0's on all ranks, which share a machine.
        folder = Path(comm.bcast(folder))
        phases("a small problem first", lambda: set_up(min(refinements, 2), min(rank, 8), folder / "small", compiling))
        bare = largest_memory()
        PETSc.Log.begin()
        before = {name: PETSc.Log.Event(event).getPerfInfo()["time"] for name, event in EVENTS.items()}
        nodes = set_up(refinements, rank, folder / "large", phases)
        parts = {
            name: comm.allreduce(PETSc.Log.Event(event).getPerfInfo()["time"] - before[name], op=max)
            for name, event in EVENTS.items()
        }
        memory = comm.allreduce(largest_memory() - bare)
        comm.Barrier()  # before rank 0 clears its directory
    if comm.rank == 0:
        once = ("imports", "a small problem first", "eigenfunctions, from their cache")
        total = sum(seconds for name, seconds in phases.seconds.items() if name not in once)
        found = {"nodes": nodes, "rank": rank, "ranks": comm.size, "seconds": phases.seconds, "total_seconds": total}
        print(json.dumps(found | {"parts": parts, "bytes": memory}), flush=True)


def refinements_for(nodes: int) -> int:
    """How often the disk's mesh is refined to have so many nodes: 4^(k+1) + 4 2^k + 1 after k times."""
    return next(k for k in range(16) if 4 ** (k + 1) + 4 * 2**k + 1 >= nodes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--rank", type=int, default=32, metavar="R")
    parser.add_argument("--ranks", type=int, default=2, metavar="K")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--measure", nargs=2, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        sys.argv = sys.argv[:1]  # PETSc would take the others for options
        measure(*given.measure)
        return
    command = [sys.executable, __file__, "--measure", str(refinements_for(given.nodes)), str(given.rank)]
    done = subprocess.run(
        on_ranks(given.ranks, command), env=ranks_environment(), stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    print(f"{found['nodes']} nodes, rank {found['rank']}, {found['ranks']} ranks; seconds")
    for name, seconds in found["seconds"].items():
        print(f"  {name:34}{seconds:8.2f}")
        if name == "eigenfunctions":
            for part, of in found["parts"].items():
                print(f"    of these: {part:22}{of:8.2f}")
    print(f"  {'all but imports, small, cache':34}{found['total_seconds']:8.2f}   ({TARGET} at most at 10^6 nodes, rank 32)")
    print(f"  {found['bytes'] / 1e9:.2f} GB above the bare process, both bases and all ranks together", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
