"""F and its gradient against hj-reachability, on one and two cells: `containers/run python tests/benchmarks/value_function.py`.

Both solve (4.11), (4.12) for the same box A, sigma = tanh and L = 0 on the same grids: this package by monotone differences of
first order, the peer by WENO differences of order 5, whose error is far below. So the table shows this package's order. States
are those of the start box; the peer's environment is made by the first run (README).
"""

import subprocess
import tempfile
from pathlib import Path

import environment
import numpy as np
from firedrake import COMM_SELF

from fem_resnet import Box, point_space, solve_value_function

A = Box((-0.3, 0.4), (-0.6, 0.5))
T = 0.5
#: Weights of the cells, targets out of reach, and the start box: where no component of v changes its sign, F is smooth.
CASES = {
    "one cell": ([1.6], [1.5], [[0.1, 0.6]]),
    "two cells": ([1.0, 0.6], [1.5, -1.4], [[0.1, 0.6], [-0.5, -0.1]]),
}
SPACINGS = (0.05, 0.025, 0.0125)


#: How much larger the peer's grid is on each side, which has values made up at its edge.
MARGIN = 0.3


def compare(weights, target, start, spacing: float) -> dict:
    """Largest differences of F and of dF/dv_i in the start box."""
    Y = point_space(weights, comm=COMM_SELF)
    F = solve_value_function(Y, A, "tanh", target, start, final_time=T, spacing=spacing)
    inner, more = F.axes(0), int(np.ceil(MARGIN / spacing))
    axes = [spacing * np.arange(first - more, last + more + 1) for first, last in F.boxes[-1].T]
    with tempfile.TemporaryDirectory() as folder:
        problem, found = Path(folder) / "problem.npz", Path(folder) / "found.npz"
        given = {f"axis{i}": axis for i, axis in enumerate(axes)}
        np.savez(problem, weights=Y.weights, target=target, T=T, bias=A.bias, kernel=A.kernel, **given)
        command = [environment.python(), Path(__file__).with_name("peers_hj.py"), problem, found]
        subprocess.run(command, env={"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        peer = dict(np.load(found))
    # F's grid at t = 0 has a point more than the start box on each side.
    box = np.ix_(*(np.searchsorted(axis, part[1:-1] - spacing / 2) for axis, part in zip(axes, inner)))
    states = np.stack([v.ravel() for v in np.meshgrid(*(part[1:-1] for part in inner), indexing="ij")])
    values, gradient = F(states, 0.0), F.gradient(states, 0.0) * Y.weights[:, None]
    return {
        "states": F.values[-1].size,
        "F": float(np.abs(values - peer["values"][box].ravel()).max()),
        "gradient": max(
            float(np.abs(g - peer["gradient"][..., i][box].ravel()).max()) for i, g in enumerate(gradient)
        ),
    }


def main() -> None:
    environment.install()
    print("| cells | spacing | states | difference of F (order) | of dF/dv_i (order) |\n|---|---|---|---|---|")
    for name, case in CASES.items():
        before = None
        for spacing in SPACINGS:
            found = compare(*map(np.array, case), spacing)
            parts = [name, f"{spacing:g}", str(found["states"])]
            for key in ("F", "gradient"):
                order = f" ({np.log2(before[key] / found[key]):.2f})" if before else ""
                parts.append(f"{found[key]:.2e}{order}")
            print("| " + " | ".join(parts) + " |", flush=True)
            before = found


if __name__ == "__main__":
    main()
