r"""Burgers' equation on a circle
=============================

A map between functions is learned: from u(., 0) to u(., 1) of

    u_t + u u_x = 0.1 u_xx,        0 < x < 2 pi, periodic,

the benchmark that DeepONet and the Fourier neural operator were published with. The neurons fill four copies of the circle,
Y = circle x {1 .. 4}. Burgers' equation knows no place on the circle, and takes -u(-x) to minus its solution at -x. The
network keeps both: its kernels commute with translations, and a reflection acts on two of the channels with the sign -1. What
is left to learn is a real 4 x 4 matrix a mode and layer. Run

    containers/run python demos/burgers_on_the_circle.py            (about eight minutes; --short for 20 s)

It writes a table and a figure to demos/output/. The last line is the largest error over all meshes. Published for this
benchmark, on the authors' own samples: DeepONet 2.15 %, Fourier neural operator 1.4 to 1.9 %. Well-trained ones, on the
samples of this page, are in burgers_table.py: Fourier neural operators come to 0.37 % with as many numbers, to 0.17 % with ten
times as many.
"""

import logging
import sys
import time
from pathlib import Path

SHORT = "--short" in sys.argv
sys.argv = [argument for argument in sys.argv if argument != "--short"]  # PETSc would take it for an option of its own

import firedrake as fd
import numpy as np
from matplotlib.figure import Figure
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV

from fem_resnet import (
    Batch,
    Bias,
    Channels,
    Head,
    Kernel,
    LabelSpace,
    LearningProblem,
    Parity,
    ResidualNetwork,
    Symmetric,
    invariant_functions,
    laplace_basis,
    least_squares,
    plot,
    tikhonov,
    train,
    train_by_ranks,
    train_levenberg_marquardt,
)  # fmt: skip

# %% The data
# The law of the inputs is that of the benchmark, N(0, 625 (-Laplace + 25)^-2) on the circle of length one, without a mean. The
# Cole-Hopf formula u = -2 nu theta_x / theta, where theta solves the heat equation, gives u(., 1) to round-off. Functions are
# held by their Fourier coefficients c_k, u = sum_k c_k exp(i k x), so that they can be laid onto any mesh.

LENGTH, VISCOSITY = 2 * np.pi, 0.1
MODES, FINE = 256, 2048


def inputs(samples, seed):
    """Coefficients c_0 .. c_(FINE/2) of random inputs: shape (samples, FINE / 2 + 1)."""
    random, k = np.random.default_rng(seed), np.arange(1, MODES + 1)
    size = 25 * np.sqrt(2) / ((2 * np.pi * k) ** 2 + 25)
    a, b = size * random.standard_normal((2, samples, MODES))
    c = np.zeros((samples, FINE // 2 + 1), complex)
    c[:, 1 : MODES + 1] = (a - 1j * b) / 2
    return c


def burgers(c):
    """Coefficients of u(., 1)."""
    k = np.arange(FINE // 2 + 1)
    potential = c.copy()
    potential[:, 1:] /= 1j * k[1:]
    theta = np.fft.rfft(np.exp(-np.fft.irfft(potential * FINE) / (2 * VISCOSITY))) * np.exp(-VISCOSITY * k**2)
    slope = 1j * k * theta
    slope[:, -1] = 0
    return np.fft.rfft(-2 * VISCOSITY * np.fft.irfft(slope) / np.fft.irfft(theta)) / FINE


def at(c, x, modes):
    """Values of the first modes at places: shape (places, samples)."""
    waves = np.exp(1j * np.outer(np.arange(modes), x))
    waves[1:] *= 2
    return (c[:, :modes] @ waves).real.T


def size(c):
    """The norm in L2, over the root of the length."""
    return np.sqrt(np.abs(c[:, 0]) ** 2 + 2 * np.sum(np.abs(c[:, 1:]) ** 2, axis=1))


# %% The network
# Channels 1 and 2 carry the sign -1 under the reflection, as u does, and 3 and 4 the sign 1. Their functions are neither odd
# nor even. The kernel, the bias (constants, of the even channels alone) and the head keep the symmetries.

SIGNS, LAYERS, FINAL_TIME = (-1, -1, 1, 1), 4, 4.0
NODES, RANKS = 128, (17, 25, 41)
#: For each rank: iterations of L-BFGS, steps of Levenberg and Marquardt, rows of the Jacobian a parameter in each.
STEPS = {17: (20, 20, 3), 25: (0, 20, 3), 41: (0, 40, 5)}
#: Steps of Levenberg and Marquardt for twice as many layers.
DEEPER_STEPS = 54
SYMMETRIES = (fd.as_vector([fd.Constant(1.0)]), Parity(lambda x: -x, SIGNS, output=-1))


def circle(nodes):
    """Four copies of a mesh of the circle."""
    mesh = fd.PeriodicIntervalMesh(nodes, LENGTH)
    return Channels(LabelSpace(fd.FunctionSpace(mesh, "CG", 1)), len(SIGNS))


def network(rank, layers, seed):
    """The network and its head, with random kernels and no bias."""
    phi = laplace_basis(circle(NODES), rank)
    net = ResidualNetwork(
        Kernel(phi, among=Symmetric(phi, *SYMMETRIES)),
        bias=Bias(invariant_functions(phi, *SYMMETRIES)),
        layers=layers,
        final_time=FINAL_TIME,
        activation="tanh",
        solver_parameters={"ts_type": "rk", "ts_rk_type": "1fe"},
    )
    head = Head(phi, phi.one, "identity", symmetries=SYMMETRIES)
    net.start("random smooth", seed, gain=3.0)
    return net, head


class Data:
    """Inputs and targets of unit size, on any mesh."""

    def __init__(self, train, test):
        self.c = {"train": inputs(train, 0), "test": inputs(test, 1)}
        self.w = {name: burgers(c) for name, c in self.c.items()}
        self.scale = size(self.c["train"]).mean(), size(self.w["train"]).mean()

    def batch(self, Y, name, modes=NODES // 2):
        """A batch whose inputs stand in the first channel, weighted so that J is the mean of squared relative errors."""
        x = Y.one.coordinates[:, 0]
        u, v = (at(c[name], x, modes) / s for c, s in zip((self.c, self.w), self.scale))
        empty = [None] * (Y.channels - 1)
        return Batch(Y.join([Y.one.batch(u), *empty]), Y.one.batch(v), (size(self.w[name]) ** -2).tolist())

    def output(self, net, head, nodal=False):
        """The modes of the output for the test samples, shape (samples, modes).

        With `nodal`, the input is given by its values at the nodes, with all of its modes: aliases and all.
        """
        nodes = net.Y.one.size
        batch = self.batch(net.Y, "test", MODES if nodal else min(NODES, nodes) // 2)
        # The head says the output in its basis, whose functions have the modes (p, exp(i k x)) / length.
        x, k = head.Y.coordinates, np.arange(head.onto.rank // 2 + 1)
        modes = (head.onto.project(np.cos(x * k)) - 1j * head.onto.project(np.sin(x * k))) / LENGTH
        return self.scale[1] * head.scores(net(batch.inputs)) @ modes

    def errors(self, net, head, nodal=False):
        """Relative errors of all test samples in L2; modes that the output does not have count too."""
        missed, found = self.w["test"].copy(), self.output(net, head, nodal)
        missed[:, : found.shape[1]] -= found
        return size(missed) / size(self.w["test"])


# %% Training
# The head is solved for exactly in each evaluation. A few iterations of L-BFGS find a good start for Levenberg and Marquardt,
# whose matrix of Gauss and Newton is assembled from random rows. Few modes come first: there an evaluation costs least.


def learn(data, seed, ranks=RANKS, layers=LAYERS, steps=STEPS):
    """The trained network and head, how many numbers they have, and CPU seconds."""
    start = time.process_time()
    net, head = network(ranks[-1], layers, seed)
    problem = LearningProblem(net, head, least_squares, tikhonov(1e-9), data.batch(net.Y, "train"))

    def by_rank(smaller):
        if not layers:  # J is quadratic in the head alone
            return train_levenberg_marquardt(smaller, iterations=3, damping=1e-10)
        first, then, rows = steps[smaller.net.bases["phi"][0].one.rank]
        if first:
            train(smaller, {"tao_max_it": first}, eliminate="head")
        return train_levenberg_marquardt(smaller, iterations=then, eliminate="head", rows=rows, seed=seed)

    results = train_by_ranks(problem, ranks, by_rank)
    count = sum(parameter.dim for parameter in problem.parameters)
    return net, head, count, time.process_time() - start, np.concatenate([result.values for result in results])


# A network with each layer cut in two halves is close to the trained one, and has twice as many numbers to improve it by.


def learn_deeper(data, seed, net, steps):
    """The trained network of twice as many layers, its head, how many numbers they have, and CPU seconds."""
    start = time.process_time()
    deeper, head = network(net.bases["phi"][0].one.rank, 2 * net.layers, seed)
    for layer in range(deeper.layers):
        deeper.bias.set(layer, net.bias.get(layer // 2))
        deeper.kernel.set(layer, net.kernel.get(layer // 2))
    problem = LearningProblem(deeper, head, least_squares, tikhonov(1e-9), data.batch(deeper.Y, "train"))
    train_levenberg_marquardt(problem, iterations=steps, eliminate="head", rows=4, damping=1e-6, seed=seed)
    return deeper, head, sum(parameter.dim for parameter in problem.parameters), time.process_time() - start


# %% Baselines on the same Fourier coefficients, without symmetries


def features(c, modes):
    return np.hstack([c[:, :modes].real, c[:, 1:modes].imag])


def baselines(data, modes=NODES // 2):
    """Test errors and CPU seconds of a linear map and of kernel ridge regression, widths chosen by cross-validation."""
    x, y = (features(c["train"], modes) / s for c, s in zip((data.c, data.w), data.scale))
    grids = {
        "linear map": ("linear", {"alpha": np.logspace(-6, 0, 7)}),
        "kernel ridge": ("rbf", {"gamma": np.logspace(-1.5, 1, 11), "alpha": np.logspace(-10, -4, 3)}),
    }
    for name, (kernel, grid) in grids.items():
        start = time.process_time()
        model = GridSearchCV(KernelRidge(kernel=kernel), grid, cv=4, scoring="neg_mean_squared_error").fit(x, y)
        found = data.scale[1] * model.predict(features(data.c["test"], modes) / data.scale[0])
        missed = data.w["test"].copy()
        missed[:, :modes] -= found[:, :modes]
        missed[:, 1:modes] -= 1j * found[:, modes:]
        yield name, size(missed) / size(data.w["test"]), time.process_time() - start


# %% All together


def draw(path, data, found, history, rows):
    """Three test samples, the history of J, and errors on all meshes: rows of points, and three errors in per cent."""
    x, few = np.linspace(0, LENGTH, 400), np.linspace(0, LENGTH, 25)
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplot_mosaic("AABBCC;DDDEEE")
    for sample, place in enumerate("ABC"):
        start, end = (np.stack([x, at(c["test"], x, MODES)[:, sample]], axis=1) for c in (data.c, data.w))
        said = np.stack([few, at(found, few, found.shape[1])[:, sample]], axis=1)
        plot.lines(
            {"u(x, 1)": end}, points={"network": said}, reference={"u(x, 0)": start}, xlabel="x", ylabel="u", ax=axes[place],
            legend=place == "B",
        ).set(title=f"test sample {sample + 1}", ylim=(-1.3, 1.3))  # fmt: skip
    plot.learning_curve(history, ax=axes["D"], xlabel="step").set_title(f"training of {LAYERS} layers, by ranks")
    nodes, *errors = np.transpose(rows)
    names = (f"{LAYERS} layers, inputs as modes", f"{LAYERS} layers, inputs at the nodes", f"{2 * LAYERS} layers")
    curves = {name: np.stack([nodes, error], axis=1) for name, error in zip(names, errors)}
    plot.lines(
        curves, log="x", xlabel="points of the mesh", ylabel="relative test error, %", ax=axes["E"]
    ).set(title=f"on other meshes, trained on {NODES} points", ylim=(0, 1.1 * np.max(errors)))  # fmt: skip
    plot.save(path, figure)


def main(short=False):
    """Returns the largest mean error over the meshes."""
    comm = fd.COMM_WORLD
    data = Data(*((200, 50) if short else (1000, 200)))
    ranks, steps, deeper_steps = ((9, 17), {9: (10, 5, 3), 17: (0, 10, 5)}, 3) if short else (RANKS, STEPS, DEEPER_STEPS)
    seeds, meshes = (1, (64, 98)) if short else (5, (64, 98, 256, 1024, 8192))
    lines = []

    def say(text):
        lines.append(text)
        if comm.rank == 0:
            print(text, flush=True)

    def row(name, count, error, seconds):
        say(f"{name:<24}{count:>12}{error:>16}{seconds:>14}")

    row("", "parameters", "test error", "CPU seconds")
    for name, errors, seconds in baselines(data):
        row(name, "", f"{errors.mean():.2%}", f"{seconds:.0f}")
    net, head, count, seconds, _ = learn(data, 0, ranks[-1:], layers=0)
    row("no layers", count, f"{data.errors(net, head).mean():.2%}", f"{seconds:.0f}")
    found = [learn(data, seed, ranks, LAYERS, steps) for seed in range(seeds)]
    means = np.array([data.errors(net, head).mean() for net, head, *_ in found])
    for seed, (mean, (_, _, count, seconds, _)) in enumerate(zip(means, found)):
        row(f"{LAYERS} layers, seed {seed}", count, f"{mean:.2%}", f"{seconds:.0f}")
    row(f"{LAYERS} layers, mean", count, f"{means.mean():.2%}", f"{np.mean([seconds for *_, seconds, _ in found]):.0f}")
    best = min(range(seeds), key=lambda seed: found[seed][-1][-1])  # by J, which is of the training samples
    net, head, *_, history = found[best]
    deeper, head_of_deeper, count, seconds = learn_deeper(data, best, net, deeper_steps)
    error = data.errors(deeper, head_of_deeper).mean()
    row(f"{deeper.layers} layers, from seed {best}", count, f"{error:.2%}", f"{seconds:.0f} more")
    say("")
    say(f"{'points of the mesh':<24}{'inputs as modes':>16}{'at the nodes':>16}{f'{deeper.layers} layers':>16}")
    outputs, rows = data.output(net, head), []
    for nodes in meshes:
        Y = circle(nodes)
        there = [(one.on(Y), read.on(Y)) for one, read in ((net, head), (deeper, head_of_deeper))]
        by_modes, at_nodes = (data.errors(*there[0], nodal).mean() for nodal in (False, True))
        of_deeper = data.errors(*there[1]).mean()
        say(f"{nodes:<24}{by_modes:>16.4%}{at_nodes:>16.4%}{of_deeper:>16.4%}")
        rows.append((nodes, 100 * by_modes, 100 * at_nodes, 100 * of_deeper))
    worst = np.array(rows)[:, 1] / 100
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    draw(output / "burgers_on_the_circle.png", data, outputs, history, rows)
    if comm.rank == 0:
        (output / "burgers_on_the_circle.txt").write_text("\n".join(lines) + "\n")
        print(f"relative error: {max(worst):.4f}")
    # The error is small, and the same on all meshes but the coarsest, which hardly holds the modes of the layers.
    assert max(worst) < (0.025 if short else 0.003)
    assert short or max(worst[1:]) - min(worst[1:]) < 0.01 * max(worst[1:])
    return max(worst)


if __name__ == "__main__":
    logging.getLogger("fem_resnet").setLevel(logging.ERROR)  # the coarsest mesh does not hold all modes, and a warning says so
    main(SHORT)
