"""Errors and times of single precision: J and its whole gradient, compared with double precision in the same process.

    containers/run python tests/benchmarks/precision.py [--sizes N,r,S,L ...]

On one rank, for a random network on points, tanh, Runge-Kutta 4. Errors are relative, one for each kind of coefficients. Times
are the best of several turns.
"""

import argparse
import time

import numpy as np

from fem_resnet import Basis, Batch, LearningProblem, ResidualNetwork, least_squares, point_space

SIZES = ["1024,16,1,4", "1024,16,1,64", "65536,16,1,16", "4096,16,256,16", "65536,16,32,16", "512,32,1257,8"]


def functional(Y, phi, S, L, precision):
    random = np.random.default_rng(1)
    net = ResidualNetwork(phi, layers=L, precision=precision)
    for layer in range(L):
        net.bias.set(layer, random.standard_normal(Y.nodes))
        net.kernel.set(layer, random.standard_normal(net.kernel.space_basis.shape) / phi.rank)
    inputs, targets = (Y.batch(random.standard_normal((Y.nodes, S))) for _ in range(2))
    problem = LearningProblem(net, None, least_squares, None, Batch(inputs, targets))
    return problem, problem.reduced_functional()


def evaluated(problem, J):
    start = time.perf_counter()
    value = float(J(problem.functions))
    derivative = J.derivative()
    seconds = time.perf_counter() - start
    parts = [part.dat.data_ro.ravel() for part in derivative]
    L = problem.net.layers
    return seconds, [np.array([value]), np.concatenate(parts[:L]), np.concatenate(parts[L:])]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="N,r,S,L")
    print("| (N, r, S, L) | error of J | of dJ/da | of dJ/dbeta | double, s | single, s | times as fast |")
    print("|---|---|---|---|---|---|---|")
    for size in parser.parse_args().sizes:
        N, r, S, L = map(int, size.split(","))
        Y = point_space(np.full(N, 1.0 / N))
        phi = Basis(Y, np.random.default_rng(0).standard_normal((N, r)), "given")
        both = [functional(Y, phi, S, L, precision) for precision in ("double", "single")]
        turns = [[evaluated(*each) for each in both] for _ in range(4)]
        exact, rounded = (found for _, found in turns[-1])
        errors = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(exact, rounded)]
        double, single = (min(turn[k][0] for turn in turns) for k in range(2))
        print(
            f"| ({N}, {r}, {S}, {L}) | " + " | ".join(f"{error:.1e}" for error in errors)
            + f" | {double:.4f} | {single:.4f} | {double / single:.1f} |", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
