"""Rank continuation measured: what J costs with and without it, on Burgers' equation on a circle of length one.

    containers/run python tests/benchmarks/rank_continuation.py [--kernels dense symmetric] [--layers 4] [--samples 200] ...

The map takes u(., 0) to u(., 1) with u_t + u u_x = 0.01 u_xx. u(., 0) is a normal field of covariance 625 (-Laplace + 25)^-2.
The network has one channel, T = 1, tanh; kernel, bias and head live in 33 Laplace modes on 128 nodes. Kernels are dense, or
commute with all shifts; W and mu are eliminated (`--keep-head`: they are not). There are as many iterations of L-BFGS in all
33 modes from the start, as in 9, 17 and 33 modes one after the other.

Printed is, for each run, J, the relative error in L2 of new samples, evaluations of J and its gradient, flops and seconds; and
below what the run in all modes had needed for the same J. Flops are those of matrix products, 3 (4 n r + 2 r^2) for n nodes, r
modes, each sample and stage of a layer, counted in evaluations in all 33 modes.
"""

import argparse
import time

import firedrake as fd
import numpy as np
from petsc4py import PETSc

from fem_resnet import (
    Batch,
    Head,
    Kernel,
    LabelSpace,
    LearningProblem,
    ResidualNetwork,
    Symmetric,
    laplace_basis,
    least_squares,
    tikhonov,
    train,
)  # fmt: skip

NODES, RANKS, TEST = 128, (9, 17, 33), 200
#: Points and time step of the data: halves of them change no digit that is printed.
FINE, STEP = 512, 2e-3


def pairs(samples: int, seed: int, viscosity: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """u(., 0) and u(., 1) on the fine points, each of shape (FINE, samples): Runge-Kutta 4 with an integrating factor."""
    rng, modes = np.random.default_rng(seed), np.arange(1, 65)
    size = np.sqrt(2) * 25 / ((2 * np.pi * modes) ** 2 + 25)
    x = 2 * np.pi * np.outer(np.arange(FINE) / FINE, modes)
    u = sum(f(x) @ (size[:, None] * rng.normal(size=(modes.size, samples))) for f in (np.cos, np.sin))
    K = 2j * np.pi * np.fft.rfftfreq(FINE, 1 / FINE)[:, None]
    kept, half = np.abs(K) < 2 / 3 * np.abs(K).max(), np.exp(STEP / 2 * viscosity * K**2)

    def rate(v):
        return -0.5 * K * kept * np.fft.rfft(np.fft.irfft(v * kept, FINE, axis=0) ** 2, axis=0)

    v = np.fft.rfft(u, axis=0)
    for _ in range(round(1 / STEP)):
        a = rate(v)
        b = rate(half * (v + STEP / 2 * a))
        c = rate(half * v + STEP / 2 * b)
        d = rate(half * (half * v + STEP * c))
        v = half * (half * (v + STEP / 6 * a) + STEP / 3 * (b + c)) + STEP / 6 * d
    return u, np.fft.irfft(v, FINE, axis=0)


class Meter:
    """A monitor that notes J, evaluations, flops and seconds at each iteration."""

    def __init__(self, nodes: int):
        self._nodes, self.rows, self.rank = nodes, [], None
        self._event, self._before, self._flops, self._start = PETSc.Log.Event("fem_resnet:adjoint"), None, 0.0, None

    def __call__(self, progress) -> None:
        count, now = self._event.getPerfInfo()["count"], time.perf_counter()
        if self._before is None:
            self._before, self._start, self._first = count, now, count
        if progress.iteration == 0:
            self.rank = next(self.ranks)
        self._flops += (count - self._before) * self._of(self.rank)
        self._before = count
        self.rows.append((progress.value, count - self._first, self._flops / self._of(RANKS[-1]), now - self._start))

    def _of(self, rank: int) -> float:
        return 4 * self._nodes * rank + 2 * rank**2

    def run(self, problem, iterations, ranks, **options):
        self.ranks = iter(ranks)
        of_rank = [{"tao_max_it": number, "tao_grtol": 0.0, "tao_gatol": 0.0} for number in iterations]
        if len(ranks) == 1:
            return train(problem, of_rank[0], monitor=self, **options)
        return train(problem, of_rank, ranks=ranks, monitor=self, **options)


def problem(phi, kernels: str, layers: int, batch: Batch) -> LearningProblem:
    among = Symmetric(phi, fd.as_vector([1.0])) if kernels == "symmetric" else None
    net = ResidualNetwork(Kernel(phi, among=among), bias=phi, layers=layers, final_time=1.0)
    net.start("minus identity")
    head = Head(phi, phi, "identity")
    head.start("identity")
    return LearningProblem(net, head, least_squares, tikhonov(1e-6), batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", choices=("dense", "symmetric"), default=("dense", "symmetric"))
    parser.add_argument("--iterations", type=int, nargs=3, default=(120, 60, 60), help="in 9, 17 and 33 modes")
    for name, number in (("layers", 4), ("samples", 200), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--keep-head", action="store_true")
    given = parser.parse_args()
    PETSc.Log.begin()
    Y = LabelSpace(fd.FunctionSpace(fd.PeriodicIntervalMesh(NODES, 1.0), "CG", 1))
    phi = laplace_basis(Y, RANKS[-1])
    u, v = pairs(given.samples + TEST, given.seed)
    places = np.rint(Y.coordinates[:, 0] * FINE).astype(int) % FINE
    u, v = u[places] / u.std(), v[places] / v.std()
    batch = Batch(*(Y.batch(each[:, : given.samples]) for each in (u, v)))
    u, v = u[:, given.samples :], v[:, given.samples :]
    options = {} if given.keep_head else {"eliminate": "head"}
    print("| kernels | modes | J | error | evaluations | flops | seconds |\n|---|---|---|---|---|---|---|")
    for kernels in given.kernels:
        runs = {}
        for ranks, iterations in ((RANKS[-1:], [sum(given.iterations)]), (RANKS, given.iterations)):
            p = problem(phi, kernels, given.layers, batch)
            if not runs:  # code is compiled before a clock runs
                for rank in RANKS:
                    train(p.replace(net=p.net.in_first(rank), head=p.head.in_first(rank)), {"tao_max_it": 1}, **options)
                p = problem(phi, kernels, given.layers, batch)
            meter = runs[ranks] = Meter(NODES)
            meter.run(p, iterations, ranks, **options)
            J, evaluations, flops, seconds = meter.rows[-1]
            found = Y.values(p.head(p.net(Y.batch(u))))
            error = np.mean(np.sqrt((Y.weights @ (found - v) ** 2) / (Y.weights @ v**2)))
            name = " -> ".join(map(str, ranks))
            print(f"| {kernels} | {name} | {J:.3e} | {error:.4f} | {evaluations} | {flops:.0f} | {seconds:.1f} |", flush=True)
        whole, staged = (np.array(runs[ranks].rows) for ranks in (RANKS[-1:], RANKS))
        at = max(whole[-1, 0], staged[-1, 0])
        rows = [rows[np.argmax(rows[:, 0] <= at)] for rows in (whole, staged)]
        for name, (J, evaluations, flops, seconds) in zip(("33", "9 -> 17 -> 33"), rows):
            print(f"| {kernels}, to J = {at:.3e} | {name} | {J:.3e} | | {evaluations:.0f} | {flops:.0f} | {seconds:.1f} |")
        flops, seconds = (rows[0][k] / rows[1][k] for k in (2, 3))
        print(f"| | the first over the second | | | | {flops:.2f} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
