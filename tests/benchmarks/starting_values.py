"""Starting values compared: a map from fields to fields on an annulus, by L-BFGS and by Adam.

    containers/run python tests/benchmarks/starting_values.py [--seeds 2] [--iterations 150] [--epochs 60] [--channels 1]

The map takes g to the u with -0.02 Laplace u + u + 4 u^3 = 3 g and du/dn = 0 on both circles. g is a random field in the first
39 Laplace modes with coefficients that fall like 1 / (1 + lambda / 20), of size one. The network has one channel, two layers
and T = 1; its head and kernel are dense in 39 modes, 4,700 coefficients or so. With `--channels C` g stands in the first of C
channels, and the head reads all. Printed is the relative error in L2 of new
samples, the mean over seeds of data and starting values with the smallest and the largest; beside it that of the affine map
between the coefficients found by ridge regression, whose weight is the best one *for the test samples*.
"""

import argparse
import time

import firedrake as fd
import numpy as np

from fem_resnet import (
    Adam,
    Batch,
    Channels,
    Head,
    LabelSpace,
    LearningProblem,
    ResidualNetwork,
    laplace_basis,
    least_squares,
    tikhonov,
    train,
    train_stochastic,
)  # fmt: skip

MODES, TEST = 39, 100
#: Each rule with its gain.
STARTS = {
    "zero": ("zero", 1.0),
    "minus identity": ("minus identity", 1.0),
    "local": ("local", 1.0),
    "random smooth": ("random smooth", 1.0),
    "plus identity": ("minus identity", -1.0),
}


def pairs(phi, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """g and u at the nodes, each of shape (nodes, samples)."""
    Y, rng = phi.Y, np.random.default_rng(seed)
    coefficients = rng.normal(size=(phi.rank, samples)) / (1 + phi.eigenvalues[:, None] / 20)
    inputs = phi.values @ (coefficients / np.sqrt(np.mean(np.sum(coefficients**2, axis=0)) / Y.measure))
    g, u, v = fd.Function(Y.V), fd.Function(Y.V), fd.TestFunction(Y.V)
    F = 0.02 * fd.inner(fd.grad(u), fd.grad(v)) * fd.dx + (u + 4 * u**3 - 3 * g) * v * fd.dx
    solver = fd.NonlinearVariationalSolver(fd.NonlinearVariationalProblem(F, u), solver_parameters={"pc_type": "lu"})
    targets = np.empty_like(inputs)
    for s in range(samples):
        g.dat.data_wo[...] = inputs[:, s]
        solver.solve()
        targets[:, s] = u.dat.data_ro
    return inputs, targets


def error(Y, found, u) -> float:
    """The mean over samples of the relative error in L2."""
    return float(np.mean(np.sqrt((Y.weights @ (found - u) ** 2) / (Y.weights @ u**2))))


def ridge(phi, train_pairs, test_pairs) -> float:
    x, y, z = (np.vstack([phi.project(part), np.ones(part.shape[1])]) for part in (*train_pairs, test_pairs[0]))
    return min(
        error(phi.Y, phi.values @ (y[:-1] @ x.T @ np.linalg.inv(x @ x.T + weight * np.eye(len(x))) @ z), test_pairs[1])
        for weight in 10.0 ** np.arange(-8, 3)
    )


def first_channel(Y, values) -> fd.Function:
    """A batch of values on Y, or in the first channel of Y."""
    return Y.batch(values) if Y.channels == 1 else Y.join([Y.one.batch(values), *[None] * (Y.channels - 1)])


def trained(phi, start, seed, train_pairs, test_pairs, how) -> float:
    Y, (rule, gain) = phi.Y, start
    net, head = ResidualNetwork(phi, bias=phi, layers=2, final_time=1.0), Head(phi, phi.one, "identity")
    net.start(rule, seed, gain=gain)
    batch = Batch(first_channel(Y, train_pairs[0]), Y.one.batch(train_pairs[1]))
    problem = LearningProblem(net, head, least_squares, tikhonov(1e-4), batch)
    how(problem)
    return error(Y.one, Y.one.values(head(net(first_channel(Y, test_pairs[0])))), test_pairs[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, number in (("seeds", 2), ("iterations", 150), ("epochs", 60), ("pairs", 100), ("channels", 1)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--only", nargs="+", choices=STARTS, default=list(STARTS))
    given = parser.parse_args()
    Y = LabelSpace(fd.FunctionSpace(fd.AnnulusMesh(1.0, 0.4, 9, 48), "CG", 1))
    phi = laplace_basis(Channels(Y, given.channels) if given.channels > 1 else Y, MODES)
    data = [(pairs(phi.one, given.pairs, 2 * seed), pairs(phi.one, TEST, 2 * seed + 1)) for seed in range(given.seeds)]
    linear = [ridge(phi.one, *each) for each in data]
    hows = {
        f"L-BFGS, {given.iterations} iterations": lambda p: train(p, {"tao_max_it": given.iterations}, monitor=lambda _: None),
        f"Adam, {given.epochs} epochs": lambda p: train_stochastic(
            p, Adam(0.01), batch_size=20, epochs=given.epochs, monitor=lambda _: None
        ),
    }  # fmt: skip
    print(f"ridge regression: {np.mean(linear):.3f} ({min(linear):.3f} to {max(linear):.3f})\n")
    print(f"| start | {' | '.join(hows)} |\n|---|{'---|' * len(hows)}")
    for name in given.only:
        cells = []
        for how in hows.values():
            clock = time.perf_counter()
            errors = [trained(phi, STARTS[name], seed, *each, how) for seed, each in enumerate(data)]
            seconds = (time.perf_counter() - clock) / len(data)
            cells.append(f"{np.mean(errors):.3f} ({min(errors):.3f} to {max(errors):.3f}), {seconds:.0f} s")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
