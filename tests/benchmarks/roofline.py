"""The measured rates of this machine, and the work of the algorithm.

`python roofline.py` prints the rates of one core as JSON. The benchmark runs it once alone, and twice at the same time.
"""

import json
import os
import subprocess
import sys
import time

#: Classical Runge-Kutta, a step a layer.
STAGES = 4


def _best(work, seconds: float) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def rates(seconds: float = 0.2) -> dict[str, float]:
    """Rates of one thread of NumPy: dgemm in flop/s, tanh in elements/s from the cache, copy in bytes/s read and written."""
    import numpy as np

    rng = np.random.default_rng(0)
    n = 1024
    A, B, C = rng.normal(size=(n, n)), rng.normal(size=(n, n)), np.empty((n, n))
    x, y = rng.normal(size=8192), np.empty(8192)
    source, copy = np.zeros(2**24), np.ones(2**24)
    return {
        "dgemm": 2 * n**3 / _best(lambda: np.dot(A, B, out=C), seconds),
        "tanh": x.size / _best(lambda: np.tanh(x, out=y), seconds),
        "copy": 2 * source.nbytes / _best(lambda: np.copyto(copy, source), seconds),
    }


def machine() -> dict[str, dict[str, float]]:
    """Rates of one core, and of two together. The best of three counts, since others may be using the machine."""

    def at_once(processes: int) -> dict[str, float]:
        env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        running = [subprocess.Popen([sys.executable, __file__], env=env, stdout=subprocess.PIPE) for _ in range(processes)]
        found = [json.loads(process.communicate()[0]) for process in running]
        return {name: sum(each[name] for each in found) for name in found[0]}

    def best(processes: int, rounds: int = 3) -> dict[str, float]:
        found = [at_once(processes) for _ in range(rounds)]
        return {name: max(each[name] for each in found) for name in found[0]}

    return {"1": best(1), "2": best(2)}


def work(nodes: int, rank: int, samples: int, layers: int) -> dict[str, float]:
    """Flops, sigmas and bytes of one J and its gradient.

    A stage takes two products nodes x rank x samples forward and three backward, and one sigma each way. Phi, which is
    also Psi here, is read once forward and once backward, and with it the bias and the weights. The functional of the bias is
    read and written. f is read and written forward, and its adjoint is read backward.
    """
    stages, field, factors, nodal = STAGES * layers, 8.0 * nodes * samples, 8.0 * nodes * rank, 8.0 * nodes
    return {
        "flops": 5 * 2.0 * nodes * rank * samples * stages,
        "sigmas": 2.0 * nodes * samples * stages,
        "bytes": stages * (2 * factors + 6 * nodal + 3 * field),
    }


def bound(asked: dict[str, float], rates: dict[str, float]) -> dict[str, float]:
    """Seconds below which these rates do not allow it: arithmetic and traffic overlap, products and sigmas do not."""
    arithmetic = asked["flops"] / rates["dgemm"] + asked["sigmas"] / rates["tanh"]
    traffic = asked["bytes"] / rates["copy"]
    return {"arithmetic": arithmetic, "traffic": traffic, "seconds": max(arithmetic, traffic)}


if __name__ == "__main__":
    print(json.dumps(rates()))
