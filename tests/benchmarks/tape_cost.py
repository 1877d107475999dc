"""The time that the tape itself takes, per Block and per control: J and gradient with the tape and without it.

    containers/run python tests/benchmarks/tape_cost.py [--size N,r,S,L] [--quick] [--json FILE]

The same network is recorded with more or fewer layers a Block, and with more or fewer controls, which layers share. The
layers and the loss are also called directly. The difference of the times is fitted by

    seconds = c_0 + c_block Blocks + c_control controls,    all c >= 0.

One rank, one thread. A Block also keeps the state at its end, and c_block has the time of this: sizes should be small.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import data
import numpy as np
from scipy.optimize import nnls

SIZE = (1024, 16, 1, 16)


def groups(layers: int, number: int) -> list[int]:
    """The group of each layer, where layers are cut into `number` groups of consecutive ones."""
    return [layer * number // layers for layer in range(layers)]


def settings(layers: int) -> list[dict]:
    """Blocks of 1, 2, .. layers, each with 1, 2, .. controls a parameter."""
    powers = [2**k for k in range(layers.bit_length()) if layers % 2**k == 0]
    few = sorted({powers[0], powers[len(powers) // 2], powers[-1]})
    return [{"per_block": each, "in_time": groups(layers, number)} for each in powers for number in few]


def seconds(side) -> float:
    start = time.perf_counter()
    side.evaluate()
    return time.perf_counter() - start


def measure(numbers: data.Data, setting: dict, turns: int) -> dict:
    """The best times with and without the tape, which take turns."""
    import ours

    sides = {"through": ours.FemResnet(numbers, **setting), "layers": ours.FemResnetLayers(numbers, **setting)}
    for side in sides.values():
        side.prepare()
        side.evaluate()
    J = {name: side.evaluate() for name, side in sides.items()}
    assert abs(J["through"] - J["layers"]) <= 1e-12 * abs(J["through"]), J
    times = {name: [] for name in sides}
    for _ in range(turns):
        for name, side in sides.items():
            side.scale(0.5 if len(times[name]) % 2 == 0 else 2.0)
            times[name].append(seconds(side))
    return {
        "blocks": len(sides["layers"]._segments) + 1,  # and the loss
        "controls": len(sides["through"]._problem.functions),
        **{name: min(each) for name, each in times.items()},
    }


def fit(rows: list[dict]) -> dict[str, float]:
    matrix = np.array([[1.0, row["blocks"], row["controls"]] for row in rows])
    tape = np.array([max(row["through"] - row["layers"], 0.0) for row in rows])
    coefficients, _ = nnls(matrix, tape)
    left = matrix @ coefficients - tape
    return dict(zip(("once", "block", "control"), coefficients)) | {"residual": float(np.sqrt(np.mean(left**2)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default=",".join(map(str, SIZE)), metavar="N,r,S,L")
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    sys.argv = sys.argv[:1]  # PETSc would take them for options
    size = tuple(map(int, given.size.split(",")))
    rows = []
    print(f"N, rank, samples, layers = {size}; ms\n  {'Blocks':>8}{'controls':>10}{'through':>10}{'layers':>10}{'tape':>10}")
    with tempfile.TemporaryDirectory() as folder:
        data.write(Path(folder), *size)
        numbers = data.Data(folder)
        for setting in settings(size[-1]):
            rows.append(row := measure(numbers, setting, 5 if given.quick else 60))
            tape = row["through"] - row["layers"]
            print(
                f"  {row['blocks']:8}{row['controls']:10}{1e3 * row['through']:10.3f}{1e3 * row['layers']:10.3f}"
                f"{1e3 * tape:10.3f}", flush=True,
            )  # fmt: skip
    found = fit(rows)
    print(
        f"  the tape: {1e3 * found['once']:.3f} ms, {1e3 * found['block']:.3f} ms a Block (0.25 wanted), "
        f"{1e3 * found['control']:.3f} ms a control (0.1 wanted); root mean square of what is left "
        f"{1e3 * found['residual']:.3f} ms"
    )
    if given.json:
        given.json.write_text(json.dumps({"size": size, "rows": rows, "fit": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
