"""Best times of J and its gradient at many sizes, on ranks of one thread each, for the scripts on cost and scaling.

A size is (N nodes, rank, samples, layers, steps a layer); `ours` evaluates it, through the tape.
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

Size = tuple[int, int, int, int, int]


def best_seconds(sizes: list[Size], ranks: int = 1, budget: float = 1.0) -> list[float]:
    """The best time of one evaluation at each size, by the slowest rank, in a process for each size.

    Parameters
    ----------
    sizes
        The sizes.
    ranks
        The number of ranks.
    budget
        Seconds of evaluations at each size; there are at least 3 and at most 50.
    """
    from sides import on_ranks, ranks_environment

    command = [sys.executable, __file__, json.dumps(sizes), str(budget)]
    if ranks > 1:
        command = on_ranks(ranks, command)
    done = subprocess.run(command, env=ranks_environment(), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("[")][-1])


def _best(size: Size, folder: Path, budget: float, comm) -> float:
    import data
    import ours

    *shape, steps = size
    if comm.rank == 0:
        data.write(folder, *shape)
    comm.Barrier()
    side = ours.FemResnet(data.Data(folder), steps=steps)
    side.prepare()
    side.evaluate()
    times: list[float] = []
    while len(times) < 3 or len(times) < 50 and comm.bcast(sum(times)) < budget:
        side.scale(0.5 if len(times) % 2 == 0 else 2.0)
        comm.Barrier()
        start = time.perf_counter()
        side.evaluate()
        times.append(comm.allreduce(time.perf_counter() - start, op=max))
    return min(times)


def main(sizes: str, budget: str) -> None:
    """Print the seconds as JSON on rank 0."""
    import firedrake as fd

    comm = fd.COMM_WORLD
    best = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(comm.bcast(folder))
        for size in json.loads(sizes):
            best.append(_best(size, folder, float(budget), comm))
            gc.collect()
        comm.Barrier()  # before rank 0 clears its directory
    if comm.rank == 0:
        print(json.dumps(best), flush=True)


if __name__ == "__main__":
    arguments, sys.argv = sys.argv[1:], sys.argv[:1]  # PETSc would take them for options
    main(*arguments)
