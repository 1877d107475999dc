"""Would a stage be faster if the reduction of one half of the samples ran while the other half is computed?

    containers/run python tests/benchmarks/overlap.py [--ranks K] [--quick] [--json FILE]

The rate of a stage is g_t = Psi^T M sigma(a - Phi C). Its r x S numbers are summed over the ranks in four ways:

| | |
|---|---|
| whole | all samples, then one Allreduce, as in the package |
| halves | one half of the samples and its Allreduce, then the other half and its Allreduce |
| overlap | one half and its Iallreduce, which runs while the other half is computed, then the Allreduce of the other half |
| local | no sum at all: the largest possible gain |

Each rank has its share of the nodes as a label domain of its own, so that the script makes the sums. The four ways take
turns. Times are medians over many runs, by the slowest rank.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from sides import on_ranks, ranks_environment

#: (rank, samples): from 16 to 40,192 numbers a reduction.
REDUCTIONS = [(8, 2), (16, 16), (16, 64), (16, 256), (32, 314), (32, 1256)]
#: Numbers of nodes, of all ranks together.
NODES = [4096, 16384, 65536]
QUICK = [(8, 2), (16, 64)], [4096]


def ways(nodes: int, rank: int, samples: int, comm) -> dict:
    """A stage in each of the ways, with `nodes` on this rank; each returns g_t."""
    import numpy as np
    from mpi4py import MPI

    from fem_resnet import Basis, get_activation, point_space
    from fem_resnet.layers.compiled_stage import CompiledStage
    from fem_resnet.layers.stage import Argument
    from fem_resnet.parameters.kernel import LowRankKernel

    rng = np.random.default_rng(comm.rank)
    Y = point_space(np.full(nodes, 1 / (nodes * comm.size)), comm=MPI.COMM_SELF)
    phi = Basis(Y, rng.normal(size=(nodes, rank)), "given")
    a, C = rng.normal(size=nodes), np.random.default_rng(0).normal(scale=0.1, size=(rank, samples))

    def rate_of(part):
        stage = CompiledStage(Y, get_activation("tanh"), part.shape[1])
        at = Argument(LowRankKernel(phi, phi), (1.0,), (a,), (np.ascontiguousarray(part),))
        return lambda: stage.rate(at)[0]

    rate, first, second = map(rate_of, (C, C[:, : samples // 2], C[:, samples // 2 :]))

    def summed(Q):
        comm.Allreduce(MPI.IN_PLACE, Q)
        return Q

    def overlap():
        Q = first()
        request = comm.Iallreduce(MPI.IN_PLACE, Q)
        R = second()
        request.Wait()
        return np.hstack([Q, summed(R)])

    return {
        "whole": lambda: summed(rate()),
        "halves": lambda: np.hstack([summed(first()), summed(second())]),
        "overlap": overlap,
        "local": rate,
    }


def measure(all_nodes: list[int], reductions: list[tuple[int, int]], budget: float) -> None:
    """Print a line of JSON on rank 0."""
    import firedrake as fd
    import numpy as np

    comm = fd.COMM_WORLD
    rows = []
    for nodes in all_nodes:
        for rank, samples in reductions:
            of = ways(nodes // comm.size, rank, samples, comm)
            wanted = of["whole"]()
            for name in ("halves", "overlap"):
                # Blocks of samples are summed in another order, so results differ by round-off.
                assert np.allclose(of[name](), wanted, rtol=1e-12, atol=1e-12 * abs(wanted).max()), name
            times = {name: [] for name in of}
            start = time.perf_counter()
            while comm.bcast(len(times["whole"]) < 5 or time.perf_counter() - start < budget):
                for name, work in of.items():
                    comm.Barrier()
                    begin = time.perf_counter()
                    work()
                    times[name].append(time.perf_counter() - begin)
            slowest = {name: np.median(np.max(comm.allgather(each), axis=0)) for name, each in times.items()}
            rows.append({"nodes": nodes, "rank": rank, "samples": samples, "seconds": slowest})
    if comm.rank == 0:
        print(json.dumps(rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, metavar="K")
    parser.add_argument("--quick", action="store_true", help="two small sizes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--measure", metavar="JSON", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        sys.argv = sys.argv[:1]  # PETSc would take the others for options
        measure(*json.loads(given.measure))
        return
    reductions, nodes = QUICK if given.quick else (REDUCTIONS, NODES)
    command = [sys.executable, __file__, "--measure", json.dumps([nodes, reductions, 0.1 if given.quick else 2.0])]
    done = subprocess.run(
        on_ranks(given.ranks, command), env=ranks_environment(), stdout=subprocess.PIPE, text=True, check=True
    )
    rows = json.loads([line for line in done.stdout.splitlines() if line.startswith("[")][-1])
    print(f"{given.ranks} ranks; microseconds a stage; a ratio above 1: the overlap is faster than the whole")
    print(
        f"  {'nodes':>7}{'r':>5}{'S':>6}{'r S':>7}{'whole':>10}{'halves':>10}{'overlap':>10}{'local':>10}{'ratio':>8}"
        f"{'at most':>9}"
    )
    for row in rows:
        s = row["seconds"]
        row["ratio"], row["at_most"] = s["whole"] / s["overlap"], s["whole"] / s["local"]
        print(
            f"  {row['nodes']:7}{row['rank']:5}{row['samples']:6}{row['rank'] * row['samples']:7}"
            + "".join(f"{1e6 * s[name]:10.1f}" for name in ("whole", "halves", "overlap", "local"))
            + f"{row['ratio']:8.2f}{row['at_most']:9.2f}"
        )
    helped = [row for row in rows if row["ratio"] > 1.05]
    print(f"  the overlap is more than 5 % faster at {len(helped)} of {len(rows)} sizes", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
