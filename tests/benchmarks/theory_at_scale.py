"""Time and memory of the tools of `fem_resnet.theory` on large label domains, over the number of cells.

    containers/run python tests/benchmarks/theory_at_scale.py [--ranks K] [--cells N ...] [--only NAME ..] [--json FILE]

The label domain is an annulus of N quadrilaterals, DG0. The network has a kernel of rank 32, 4 layers of classical
Runge-Kutta, tanh and one sample. Each tool is measured at each size on k ranks in processes of its own. Measured are the wall
time; the processor time of all ranks, with the time that ranks wait for each other; and the largest resident memory of
all ranks, without that of mesh, bases and network. An exponent of N, from the last two sizes, says how time and memory grow;
1 is linear.

A tool is a function of (net, initial) in TOOLS. Its result is printed with the measurements.
"""

import argparse
import ctypes
import gc
import json
import math
import subprocess
import sys
import time
from pathlib import Path

from sides import on_ranks, ranks_environment

RANK, LAYERS, SAMPLES = 32, 4, 1
CELLS = (62_500, 250_000, 1_000_000)


# -- tools -----------------------------------------------------------------------------------------------------------


def propagator(net, initial) -> dict:
    """The propagator M(T, 0) with all its singular values."""
    from fem_resnet import LinearisedFlow

    M = LinearisedFlow(net, initial).propagator()
    return {"norm": M.norm, "smallest": M.smallest, "singular values": len(M.singular_values)}


def stability_report(net, initial) -> dict:
    """The whole report of stability."""
    from fem_resnet import stability_report

    report = stability_report(net, initial)
    return {"grown": report.layers[-1].grown, "costate": report.layers[0].costate}


def duhamel(net, initial) -> dict:
    """Duhamel's integrals of 4.1 along a trajectory of two steps a layer, in one direction of all parameters."""
    from fem_resnet import duhamel, solve_trajectory

    directions = [*net.bias.functions, *net.kernel.functions]
    return {"norm": net.Y.norm(duhamel(solve_trajectory(net, initial, steps=2), directions))}


def weighted_identity(net, initial) -> dict:
    """Both sides of the identity of 3.5 along such a trajectory."""
    from fem_resnet import solve_trajectory, weighted_identity

    identity = weighted_identity(solve_trajectory(net, initial, steps=2), initial)
    return {"change": identity.change.sum(), "defect": abs(identity.defect).max()}


def spectra(net, initial) -> dict:
    """The constants of 3.1, all norms of b except the exact supremum, and the verdict of Theorem 3.4 at the end."""
    from fem_resnet import stability_verdict, well_posedness_constants

    constants = well_posedness_constants(net)
    verdict = stability_verdict(net, at=net.times[-1])
    kernel, beta = net.kernel.space_basis.kernel, net.kernel.get(0)
    norms = {f"norm {kind}": kernel.norm(beta, kind) for kind in ("hs", "operator", "linf")}
    return {"C_2": constants.C_2[-1], "rate": verdict.rate} | norms


def picard(net, initial) -> dict:
    """Picard's iteration of Theorem 3.1."""
    from fem_resnet import picard

    return {"pieces": len(picard(net, initial).pieces)}


def steady_states(net, initial) -> dict:
    """The steady states of the problem at the end, if there are any."""
    from fem_resnet import find_steady_states

    return {"exist": find_steady_states(net, at=net.times[-1]).exist}


def monitors(net, initial) -> dict:
    """Energies and growth after each step."""
    from fem_resnet import EnergyMonitor, GrowthMonitor, follow_trajectory

    energy, growth = EnergyMonitor(net), GrowthMonitor(net)

    def both(layer, step):
        energy(layer, step)
        growth(layer, step)

    follow_trajectory(net, initial, both)
    return {"statements": len(energy.statements()), "bounds": len(growth.bounds())}


TOOLS = [propagator, stability_report, duhamel, weighted_identity, spectra, picard, steady_states, monitors]


# -- one measurement, on all ranks -----------------------------------------------------------------------------------


def network(cells: int):
    """The network and an initial state, with values that do not depend on the partition."""
    import firedrake as fd
    import numpy as np

    from fem_resnet import Basis, LabelSpace, ResidualNetwork

    around = round((4 * cells) ** 0.5)
    Y = LabelSpace(fd.FunctionSpace(fd.AnnulusMesh(1, 0.4, cells // around, around), "DG", 0))
    rng = np.random.default_rng(0)
    x = Y.coordinates
    waves = np.cos(x @ rng.normal(scale=4.0, size=(2, RANK)) + rng.uniform(0, 6, RANK))
    net = ResidualNetwork(Basis(Y, waves, "given"), layers=LAYERS)
    for layer in range(LAYERS):
        net.kernel.set(layer, rng.normal(size=(RANK, RANK)) / RANK)
        net.bias.set(layer, np.cos(3 * x[:, 0] + layer))
    return net, Y.batch(np.sin(2 * x[:, :1] - x[:, 1:]))


def resident(what: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what))


def measure(tool, cells: int) -> None:
    """Print a line of JSON on rank 0."""
    net, initial = network(cells)
    small = network(2_000)
    tool(*small)  # what is compiled and loaded at first is no tool's time
    comm = net.Y.comm
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what setting up has freed, glibc would hand out again, and no memory be seen
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # from here on VmHWM is the largest memory since now
    before = resident("VmRSS")
    comm.Barrier()
    start, start_cpu = time.perf_counter(), time.process_time()
    found = tool(net, initial)
    comm.Barrier()
    seconds, cpu = time.perf_counter() - start, comm.allreduce(time.process_time() - start_cpu)
    memory, setup = comm.allreduce(resident("VmHWM") - before), comm.allreduce(before)
    if comm.rank == 0:
        figures = {
            "tool": tool.__name__, "cells": net.Y.size, "seconds": seconds, "cpu_seconds": cpu, "bytes": memory,
            "setup_bytes": setup,
        }  # fmt: skip
        print(json.dumps(figures | {"found": {name: float(value) for name, value in found.items()}}), flush=True)


# -- the table -------------------------------------------------------------------------------------------------------


def exponent(name: str, rows: list[dict]) -> float:
    """The exponent of N, from the last two sizes."""
    (a, b) = rows[-2:]
    return math.log(b[name] / a[name]) / math.log(b["cells"] / a["cells"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, metavar="K")
    parser.add_argument("--cells", type=int, nargs="+", default=CELLS, metavar="N")
    parser.add_argument("--only", nargs="+", choices=[tool.__name__ for tool in TOOLS], metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "N"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        name, cells = given.measure
        sys.argv = sys.argv[:1]  # PETSc would take them for options
        measure(next(tool for tool in TOOLS if tool.__name__ == name), int(cells))
        return 0
    results = []
    columns = f"{'tool':20} {'cells':>9} {'seconds':>8} {'CPU s':>8} {'MB':>7} {'MB before':>9}"
    print(f"{columns}   found, on {given.ranks} ranks")
    for tool in TOOLS:
        if given.only and tool.__name__ not in given.only:
            continue
        rows = []
        for cells in given.cells:
            command = [sys.executable, __file__, "--measure", tool.__name__, str(cells)]
            done = subprocess.run(
                on_ranks(given.ranks, command), env=ranks_environment(), stdout=subprocess.PIPE, text=True, check=True
            )
            row = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
            rows.append(row)
            found = ", ".join(f"{name} {value:.4g}" for name, value in row["found"].items())
            print(
                f"{row['tool']:20} {row['cells']:9} {row['seconds']:8.2f} {row['cpu_seconds']:8.2f} "
                f"{row['bytes'] / 1e6:7.0f} {row['setup_bytes'] / 1e6:9.0f}   {found}", flush=True,
            )  # fmt: skip
        if len(rows) > 1:
            in_time, in_memory = (exponent(name, rows) for name in ("cpu_seconds", "bytes"))
            print(f"{'':20} grows like N^{in_time:.2f} in CPU time, N^{in_memory:.2f} in memory", flush=True)
        results += rows
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
