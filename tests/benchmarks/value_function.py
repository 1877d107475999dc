"""F and its gradient compared with hj-reachability, on one cell and on two cells.

    containers/run python tests/benchmarks/value_function.py

Both solve (4.11), (4.12) for the same box A, sigma = tanh and L = 0 on the same grids: this package by monotone differences of
first order, the peer by WENO differences of order 5, whose error is far smaller. So the table shows the order of this
package. The states are those of the start box. The first run makes the environment of the peer (README).
"""

import subprocess
import tempfile
from pathlib import Path

import environment
import numpy as np
from firedrake import COMM_SELF

from fem_resnet import Box, StateGrid, point_space, solve_value_function

A = Box((-0.3, 0.4), (-0.6, 0.5))
T = 0.5
#: Weights of the cells, targets out of reach, and the start box. No component of v changes its sign, so F is smooth.
CASES = {
    "one cell": ([1.6], [1.5], [[0.1, 0.6]]),
    "two cells": ([1.0, 0.6], [1.5, -1.4], [[0.1, 0.6], [-0.5, -0.1]]),
}
SPACINGS = (0.05, 0.025, 0.0125, 0.00625)
#: By how much the peer's grid is larger on each side: it makes up values at its edge.
MARGIN = 0.3


def ours(case: str, spacing: float):
    """This package's F, and the axes of the peer's grid."""
    weights, target, start = CASES[case]
    F = solve_value_function(point_space(weights, comm=COMM_SELF), A, "tanh", target, StateGrid(start, spacing), final_time=T)
    more = int(np.ceil(MARGIN / spacing))
    return F, [spacing * np.arange(first - more, last + more + 1) for first, last in F.boxes[-1].T]


def peers(solved: list) -> list[dict]:
    """What the peer finds on those grids, in one process: F(., 0) and dF/dv_i."""
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder) / f"problem{k}.npz", Path(folder) / f"found{k}.npz") for k in range(len(solved))]
        for (F, axes), (problem, _) in zip(solved, files):
            given = {f"axis{i}": axis for i, axis in enumerate(axes)}
            np.savez(problem, weights=F.cells.weights, target=F.target, T=T, bias=A.bias, kernel=A.kernel, **given)
        command = [environment.python(), Path(__file__).with_name("peers_hj.py"), *(file for pair in files for file in pair)]
        subprocess.run(command, env={"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        return [dict(np.load(found)) for _, found in files]


def differences(F, axes, peer: dict) -> tuple[float, float]:
    """Largest ones of F(., 0) and of dF/dv_i in the start box."""
    # F's grid at t = 0 has a point more than the start box on each side.
    inner = [axis[1:-1] for axis in F.axes(0)]
    box = np.ix_(*(np.searchsorted(axis, part - F.spacing / 2) for axis, part in zip(axes, inner)))
    states = np.stack([v.ravel() for v in np.meshgrid(*inner, indexing="ij")])
    gradient = F.gradient(states, 0.0) * F.cells.weights[:, None]
    theirs = np.moveaxis(peer["gradient"], -1, 0)
    return (
        float(np.abs(F(states, 0.0) - peer["values"][box].ravel()).max()),
        max(float(np.abs(g - other[box].ravel()).max()) for g, other in zip(gradient, theirs)),
    )


def compare(cases, spacings) -> list[tuple[str, float, int, tuple[float, float]]]:
    """Case, spacing, number of states and differences, one row each."""
    rows = [(case, spacing) for case in cases for spacing in spacings]
    solved = [ours(*row) for row in rows]
    return [(*row, s[0].values[-1].size, differences(*s, peer)) for row, s, peer in zip(rows, solved, peers(solved))]


def main() -> None:
    environment.install()
    print("| cells | spacing | states | difference of F (order) | of dF/dv_i (order) |\n|---|---|---|---|---|")
    before = {}
    for case, spacing, states, found in compare(CASES, SPACINGS):
        orders = [f" ({np.log2(b / f):.2f})" for b, f in zip(before[case], found)] if case in before else ["", ""]
        parts = [case, f"{spacing:g}", str(states), *(f"{f:.2e}{order}" for f, order in zip(found, orders))]
        print("| " + " | ".join(parts) + " |", flush=True)
        before[case] = found


if __name__ == "__main__":
    main()
