"""The time of J and its gradient as a function of nodes N, rank r, samples S, layers L and steps a layer n, on one rank.

    containers/run python tests/benchmarks/cost_model.py [--quick] [--json FILE]

First one factor is changed at a time, in a range where work and not latency should take the time. The slope of log t over
the log of that factor should be 1.00 +- 0.05. Nothing is subtracted from t. Then a model is fitted to all measured times,
also of a grid of sizes down to small ones, by least squares of the relative error with coefficients >= 0:

    t = c_0 + c_control 2 L + c_copy L N + c_field N S
        + stages (c_latency + c_read N r + c_sigma N S + c_flop N r S + c_state r S + c_small r^2 S),
    stages = 4 n L,

for classical Runge-Kutta. The first line has the tape, the controls, and the traffic of biases and of the state. The second
line has a stage, forward and backward together: its calls, its reads of Phi, its sigmas, its products over nodes, and its work
on coefficients, in proportion to their number and as products with beta. The coefficients of the model say at which sizes
one of these terms overtakes another.
"""

import argparse
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import evaluations
import numpy as np
import roofline
from scipy.optimize import nnls

FACTORS = ("N", "r", "S", "L", "n")
#: Factor -> the size that stays, and the factor's values. They are chosen so that work that is linear in the factor takes
#: nearly all of the time. For r, products take far longer than sigmas, and products with beta, r^2 S, far less. For S,
#: products take far longer than reads of Phi. For both there are so many layers that the passes over f at the ends do not
#: count. All fields are smaller than 32 MB: larger arrays get new pages from the system each time, and the model has no such
#: term.
SWEEPS = {
    "N": ((None, 16, 32, 4, 1), (4096, 8192, 16384, 32768, 65536)),
    # If N were a power of two, the rows of all functions would fall into a few sets of the caches.
    "r": ((40000, None, 32, 4, 1), (128, 192, 256, 384)),
    "S": ((4096, 16, None, 8, 1), (32, 64, 128, 256, 512)),
    "L": ((8192, 16, 32, None, 1), (32, 64, 128, 256)),
    "n": ((8192, 16, 32, 4, None), (8, 16, 32, 64)),
}
#: Down to sizes where latency, reads or work that ranks do not share takes most of the time.
GRID = [
    *((N, r, S, 8, 1) for N, r, S in product((256, 2048, 16384, 131072), (8, 32), (1, 4, 16))),
    *((512, 16, 1, L, n) for L, n in ((1, 1), (4, 1), (32, 1), (4, 8))),
    (512, 8, 512, 4, 1), (512, 32, 512, 4, 1), (512, 32, 1257, 8, 1), (2048, 128, 32, 2, 1),
]  # fmt: skip
QUICK_SWEEPS = {
    "N": ((None, 8, 32, 1, 1), (4096, 8192)),
    "L": ((4096, 8, 32, None, 1), (1, 2)),
}
QUICK_GRID = [(256, r, S, L, 1) for r, S, L in product((4, 16), (1, 16), (1, 4))]
#: Slopes should be 1 up to this.
BOUND_SLOPE = 0.05

#: Coefficient -> how often it counts at a size.
TERMS: dict[str, Callable[..., float]] = {
    "once": lambda N, r, S, L, n: 1,
    "control": lambda N, r, S, L, n: 2 * L,
    "copy": lambda N, r, S, L, n: L * N,
    "field": lambda N, r, S, L, n: N * S,
    "latency": lambda N, r, S, L, n: stages(L, n),
    "read": lambda N, r, S, L, n: stages(L, n) * N * r,
    "sigma": lambda N, r, S, L, n: stages(L, n) * N * S,
    "flop": lambda N, r, S, L, n: stages(L, n) * N * r * S,
    "state": lambda N, r, S, L, n: stages(L, n) * r * S,
    "small": lambda N, r, S, L, n: stages(L, n) * r * r * S,
}


def stages(L: int, n: int) -> int:
    return roofline.STAGES * n * L


def sizes_of(base: tuple, values: tuple) -> list[evaluations.Size]:
    return [tuple(value if x is None else x for x in base) for value in values]


def slope(values: tuple, seconds: list[float]) -> float:
    """Of log t over the log of the factor, by least squares."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def fit(seconds: dict[evaluations.Size, float]) -> tuple[dict[str, float], np.ndarray]:
    """Coefficients in seconds, and the relative residuals."""
    t = np.array(list(seconds.values()))
    matrix = np.array([[term(*size) for term in TERMS.values()] for size in seconds], dtype=float) / t[:, None]
    scale = np.linalg.norm(matrix, axis=0)
    found, _ = nnls(matrix / scale, np.ones(len(t)))
    coefficients = found / scale
    return dict(zip(TERMS, map(float, coefficients))), matrix @ coefficients - 1


def crossings(c: dict[str, float]) -> dict[str, float]:
    """Where one part of a stage overtakes another."""

    def ratio(over: float, under: float) -> float:
        return over / under if under > 0 else float("inf")

    found = {"r at which products take as long as sigmas": ratio(c["sigma"], c["flop"])}
    for r in (16, 32):
        found[f"S at which arithmetic takes as long as reading Phi, r = {r}"] = ratio(
            c["read"] * r, c["flop"] * r + c["sigma"]
        )
    for r, S in ((16, 1), (16, 32), (32, 4), (32, 1024)):
        work = c["read"] * r + c["sigma"] * S + c["flop"] * r * S
        rest = c["latency"] + c["state"] * r * S + c["small"] * r * r * S
        found[f"N at which a stage's nodes take as long as all else in it, r = {r}, S = {S}"] = ratio(rest, work)
    return found


def parts(c: dict[str, float], size: evaluations.Size) -> dict[str, float]:
    """Shares of the model's time at a size."""
    each = {name: c[name] * term(*size) for name, term in TERMS.items()}
    return {name: value / sum(each.values()) for name, value in each.items()}


def print_model(c: dict[str, float], residuals: np.ndarray, seconds: dict) -> None:
    print("\ncoefficients")
    for name, value in c.items():
        unit = (1e6, "us") if name in ("once", "control", "latency") else (1e9, "ns")
        print(f"  {name:10}{value * unit[0]:12.4g} {unit[1]}")
    rate = 10e-9 / c["flop"] if c["flop"] > 0 else float("inf")  # 5 products of 2 N r S flops a stage
    print(f"  10 flops of each N r S: {rate:.1f} GF/s; 2 sigmas of each N S: {1e9 * c['sigma'] / 2:.2f} ns each")
    root = float(np.sqrt(np.mean(residuals**2)))
    print(f"relative residuals: root mean square {root:.3f}, median {np.median(abs(residuals)):.3f}, the worst:")
    for k in np.argsort(-abs(residuals))[:5]:
        print(f"  {list(seconds)[k]}: measured {list(seconds.values())[k]:.5f} s, model {100 * residuals[k]:+.0f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and small sizes: says nothing about the machine")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    sweeps, grid = (QUICK_SWEEPS, QUICK_GRID) if given.quick else (SWEEPS, GRID)
    sizes = list(dict.fromkeys([*grid, *(size for sweep in sweeps.values() for size in sizes_of(*sweep))]))
    budget, rounds = (0.05, 1) if given.quick else (0.7, 2)
    # Twice with all others in between, so that a while in which the machine was busy is not taken for a size's cost.
    runs = [evaluations.best_seconds(sizes, budget=budget) for _ in range(rounds)]
    seconds = {size: min(times) for size, times in zip(sizes, zip(*runs))}
    slopes = {}
    print("N, r, S, L, n: nodes, rank, samples, layers, steps a layer; seconds; one rank")
    for factor, (base, values) in sweeps.items():
        times = [seconds[size] for size in sizes_of(base, values)]
        slopes[factor] = slope(values, times)
        at = ", ".join(f"{name} = {x}" for name, x in zip(FACTORS, base) if x is not None)
        marked = "" if abs(slopes[factor] - 1) <= BOUND_SLOPE else f"   (1.00 +- {BOUND_SLOPE} wanted)"
        print(f"  t ~ {factor}^{slopes[factor]:.3f}{marked} at {at}:")
        print("    " + ", ".join(f"{factor} = {value}: {time:.4g}" for value, time in zip(values, times)))
    coefficients, residuals = fit(seconds)
    print_model(coefficients, residuals, seconds)
    crossing = crossings(coefficients)
    print("where")
    for name, value in crossing.items():
        print(f"  {name}: {value:.3g}")
    print("shares of the model's time")
    for size in ((1024, 16, 1, 16, 1), (65536, 16, 1, 16, 1), (65536, 16, 32, 16, 1), (512, 32, 1257, 8, 1)):
        shares = sorted(parts(coefficients, size).items(), key=lambda part: -part[1])
        print(f"  {size}: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares if share >= 0.01))
    if given.json:
        found = {
            "slopes": slopes, "seconds": [[*size, t] for size, t in seconds.items()], "coefficients": coefficients,
            "relative_residuals": residuals.tolist(), "crossings": crossing,
        }  # fmt: skip
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
