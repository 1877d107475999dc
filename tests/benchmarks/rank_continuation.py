"""Rank continuation measured: what J costs with and without it, for maps from fields to fields.

    containers/run python tests/benchmarks/rank_continuation.py [--data burgers] [--kernels dense symmetric] [--samples 1000]

- burgers: u(., 0) to u(., 1), u_t + u u_x = 0.01 u_xx on a circle of length one; u(., 0) is a normal field of covariance
  625 (-Laplace + 25)^-2. 33 Laplace modes on 128 nodes, taken up in 9, 17 and 33.
- annulus: semilinear diffusion, as in `starting_values.py`. 39 modes on 480 nodes, taken up in 12, 20 and 39.

The network has one channel, T = 1, tanh, and starts at minus the identity; its kernel, bias and head live in these modes.
Kernels are dense, or commute with shifts of the circle (rotations of the annulus). W and mu are eliminated (`--keep-head`:
they are not). There are as many iterations of L-BFGS in all modes from the start, as in few and then in more.

Printed is, for each run, J, the relative error in L2 of new samples, evaluations of J and its gradient, flops and seconds; and
below what both had needed for the larger of the two J at the end. Flops are those of matrix products, 3 (4 n r + 2 r^2) for n
nodes, r modes, each sample and stage of a layer, counted in evaluations in all modes.
"""

import argparse
import time
from collections.abc import Sequence

import firedrake as fd
import numpy as np
import starting_values
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

TEST = 200
#: Points and time step of the data: halves of them change no digit that is printed.
FINE, STEP = 512, 2e-3


def solutions(samples: int, seed: int, viscosity: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
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


def burgers(samples: int, seed: int):
    """The basis, a symmetry, and samples of inputs and targets at its nodes."""
    Y = LabelSpace(fd.FunctionSpace(fd.PeriodicIntervalMesh(128, 1.0), "CG", 1))
    u, v = solutions(samples + TEST, seed)
    places = np.rint(Y.coordinates[:, 0] * FINE).astype(int) % FINE
    return laplace_basis(Y, 33), fd.as_vector([1.0]), u[places] / u.std(), v[places] / v.std()


def annulus(samples: int, seed: int):
    """The same."""
    mesh = fd.AnnulusMesh(1.0, 0.4, 9, 48)
    phi = laplace_basis(LabelSpace(fd.FunctionSpace(mesh, "CG", 1)), starting_values.MODES)
    x, y = fd.SpatialCoordinate(mesh)
    return phi, fd.as_vector([-y, x]), *starting_values.pairs(phi, samples + TEST, seed)


#: Data, ranks, layers and the weight of Tikhonov's term.
DATA = {"burgers": (burgers, (9, 17, 33), 4, 1e-6), "annulus": (annulus, (12, 20, 39), 2, 1e-4)}


class Meter:
    """A monitor that notes J, evaluations, flops and seconds at each iteration; it takes the ranks that are gone through."""

    def __init__(self, nodes: int, ranks: Sequence[int]):
        self._nodes, self._ranks, self._rank, self.rows = nodes, iter(ranks), 0, []
        self._whole = self._of(ranks[-1])
        self._event = PETSc.Log.Event("fem_resnet:adjoint")
        self._first, self._before, self._flops, self._start = 0, 0, 0.0, 0.0

    def __call__(self, progress) -> None:
        count, now = self._event.getPerfInfo()["count"], time.perf_counter()
        if not self.rows:
            self._first = self._before = count
            self._start = now
        if progress.iteration == 0:
            self._rank = next(self._ranks)
        self._flops += (count - self._before) * self._of(self._rank) / self._whole
        self._before = count
        self.rows.append((progress.value, count - self._first, self._flops, now - self._start))

    def _of(self, rank: int) -> float:
        return 4 * self._nodes * rank + 2 * rank**2


def problem(phi, symmetry, layers: int, weight: float, batch: Batch) -> LearningProblem:
    among = None if symmetry is None else Symmetric(phi, symmetry)
    net = ResidualNetwork(Kernel(phi, among=among), bias=phi, layers=layers, final_time=1.0)
    net.start("minus identity")
    head = Head(phi, phi, "identity")
    head.start("identity")
    return LearningProblem(net, head, least_squares, tikhonov(weight), batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=DATA, default="burgers")
    parser.add_argument("--kernels", nargs="+", choices=("dense", "symmetric"), default=("dense", "symmetric"))
    parser.add_argument("--iterations", type=int, nargs=3, default=(30, 30, 240), help="at each rank")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-head", action="store_true")
    given = parser.parse_args()
    PETSc.Log.begin()
    make, ranks, layers, weight = DATA[given.data]
    phi, symmetry, inputs, targets = make(given.samples, given.seed)
    Y, options = phi.Y, {} if given.keep_head else {"eliminate": "head"}
    batch = Batch(*(Y.batch(each[:, : given.samples]) for each in (inputs, targets)))
    u, v = (each[:, given.samples :] for each in (inputs, targets))
    names = [str(ranks[-1]), " -> ".join(map(str, ranks))]
    print("| kernels | modes | J | error | evaluations | flops | seconds |\n|---|---|---|---|---|---|---|")
    for kernels in given.kernels:

        def new():
            return problem(phi, symmetry if kernels == "symmetric" else None, layers, weight, batch)

        train(new(), {"tao_max_it": 1}, ranks=ranks, monitor=lambda _: None, **options)  # code is compiled before a clock runs
        meters = [Meter(Y.nodes, ranks[-1:]), Meter(Y.nodes, ranks)]
        of_ranks = [{"tao_max_it": number} for number in given.iterations]
        for name, meter, way in (
            (names[0], meters[0], {"solver_parameters": {"tao_max_it": sum(given.iterations)}}),
            (names[1], meters[1], {"solver_parameters": of_ranks, "ranks": ranks}),
        ):
            p = new()
            train(p, monitor=meter, **way, **options)
            J, evaluations, flops, seconds = meter.rows[-1]
            error = starting_values.error(Y, Y.values(p.head(p.net(Y.batch(u)))), v)
            print(f"| {kernels} | {name} | {J:.3e} | {error:.4f} | {evaluations} | {flops:.0f} | {seconds:.1f} |", flush=True)
        at = max(meter.rows[-1][0] for meter in meters)
        rows = [next(row for row in meter.rows if row[0] <= at) for meter in meters]
        for name, (J, evaluations, flops, seconds) in zip(names, rows):
            print(f"| {kernels}, to J = {at:.3e} | {name} | {J:.3e} | | {evaluations} | {flops:.0f} | {seconds:.1f} |")
        flops, seconds = (rows[0][k] / rows[1][k] for k in (2, 3))
        print(f"| | the first over the second | | | | {flops:.2f} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
