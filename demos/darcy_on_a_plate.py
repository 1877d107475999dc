r"""Darcy flow on a plate
=====================

From the permeability of an irregular plate with three holes to the pressure in it:

    -div(exp(K) grad u) = 1,      u = 0 on the outer edge,      no flow through the edges of the holes.

K is a Gaussian field; demos/atlas/darcy.py has its law. There are 1,000 samples to learn from, and 200 others to test with,
each known at 2,319 points. The domain has no symmetry and no coordinates of its own. The network does not ask for them: its
kernels and inputs are made of eigenfunctions of the Laplacian on the plate. So a network that was trained on one mesh runs on
a coarser and on a finer one. Run

    containers/run python demos/darcy_on_a_plate.py            (about a quarter of an hour; --short for 20 s)

A problem of this kind is in Chen et al. 2024, *Learning neural operators on Riemannian manifolds*: 2,290 nodes, 1,000 and 200
samples; their network has an error of 1.05 %. Their permeability has two values and their plate a slit, so errors can be
compared in kind alone.
"""

import logging
import sys
import time
from operator import itemgetter
from pathlib import Path

SHORT = "--short" in sys.argv
sys.argv = [argument for argument in sys.argv if argument != "--short"]  # PETSc would take it for an option of its own
sys.path.append(str(Path(__file__).parent / "atlas"))

import comparison
import darcy
import firedrake as fd
import numpy as np
from matplotlib.figure import Figure
from matplotlib.tri import Triangulation
from scipy.spatial import cKDTree

from fem_resnet import (
    Basis,
    Batch,
    Channels,
    Head,
    LabelSpace,
    LearningProblem,
    ResidualNetwork,
    Sensors,
    laplace_basis,
    least_squares,
    plot,
    smooth_in_space,
    tikhonov,
    train,
)  # fmt: skip

# %% The data
# A sample is given by values at points. On any mesh an input is fitted to them in eigenfunctions of the Laplacian
# (`Sensors`), and an output is evaluated at them. The network sees two fields, exp(-K) and K, each of unit size.

RANK, CHANNELS = 64, 2


class Data:
    """Samples at the points, and on any mesh of the plate."""

    def __init__(self, train, test):
        arrays = comparison.made_once(darcy.samples, train, test)
        self.points, self.weights, self.cells = (arrays[name] for name in ("points", "weights", "cells"))
        self.K = {"train": arrays["K"], "test": arrays["test_K"]}
        self.u = {"train": arrays["u"], "test": arrays["test_u"]}
        size = self.size(self.u["train"])
        self.scale = np.sqrt(np.mean(size**2) / self.weights.sum())
        #: Shape (fields, samples, points).
        self.fields = {name: np.stack([np.exp(-K) - 1, K]) for name, K in self.K.items()}
        deviations = self.fields["train"].std(axis=(1, 2), keepdims=True)
        self.fields = {name: fields / deviations for name, fields in self.fields.items()}

    def size(self, u):
        """Norms in L2 of functions, one a row."""
        return np.sqrt(u**2 @ self.weights)

    def inputs(self, phi, name, some=slice(None)):
        """A batch on the network's Y of some samples."""
        sensors = Sensors(phi.one, self.points, weights=self.weights)
        return phi.Y.join([sensors.fit(field[some].T).functions for field in self.fields[name]])

    def batch(self, phi, some=slice(None)):
        """Training samples on the mesh of the points, weighted so that J is half the mean of squared relative errors."""
        Y, u = phi.Y.one, self.u["train"][some]
        targets = Y.batch(u[:, nearest(self.points, Y.coordinates)].T / self.scale)
        return Batch(self.inputs(phi, "train", some), targets, (self.size(u) ** -2).tolist())

    def outputs(self, net, head, name="test", some=slice(None)):
        """What the network says at the points, shape (samples, points)."""
        found = head(net(self.inputs(net.bases["phi"][0], name, some)))
        return self.scale * Sensors(head.onto, self.points).evaluate(found).T

    def errors(self, net, head, name="test", some=slice(None)):
        """Relative errors in L2."""
        return comparison.relative_errors(self.outputs(net, head, name, some), self.u[name][some], self.weights)

    def at_best(self, onto, functions):
        """Errors of test samples where the coefficients are right: what the functions of the output leave.

        `onto` has them on a mesh, `functions` on that of the points, where they are orthonormal.
        """
        shown, there = (Sensors(each, self.points).evaluate(each.function(np.eye(each.rank))) for each in (functions, onto))
        u = self.u["test"]
        return comparison.relative_errors(u * self.weights @ shown @ there.T, u, self.weights)


def nearest(points, places):
    """Numbers of the points at these places."""
    apart, numbers = cKDTree(points).query(places)
    assert apart.max(initial=0.0) < 1e-10
    return numbers


# %% Outputs
# The head reads the pressure in 100 functions that training pressures are made of: the first ones of their proper orthogonal
# decomposition, piecewise linear on the mesh of the points. They leave 0.2 % of a test sample.

OUTPUTS = 100


def pressures(Y, data, some=slice(None)):
    """The basis of the outputs on the mesh of the points."""
    root = np.sqrt(data.weights)
    u = data.u["train"][some]
    _, _, rows = np.linalg.svd(root * u / data.size(u)[:, None], full_matrices=False)
    return Basis(Y, (rows[:OUTPUTS] / root).T[nearest(data.points, Y.coordinates)], "given", move=interpolated)


def interpolated(basis, Y):
    """These functions on another mesh, by their values at its nodes."""
    nodes = Y.comm.allgather(Y.coordinates)
    values = Sensors(basis, np.concatenate(nodes)).evaluate(basis.function(np.eye(basis.rank)))
    first = sum(len(part) for part in nodes[: Y.comm.rank])
    return Basis(Y, values[first : first + Y.nodes], basis.kind, move=interpolated)


# %% The network
# Two layers of two channels with all kernels in 64 eigenfunctions, near minus the identity at first. The head is solved for
# exactly in each evaluation. Rank, final time, iterations and the weights of the regulariser were chosen on 100 to 200 of the
# training samples. TAO's bqnls is L-BFGS here, as there are no bounds. From this start it is faster than lmvm, TAO's usual
# one: 150 iterations come to 0.94 % on held-out samples, those of lmvm to 1.25 %.

LAYERS, FINAL_TIME = 2, 6.0
ITERATIONS = 150


def network(Y, rank, seed):
    """The network, whose kernels are minus the identity and a smaller random part."""
    phi = laplace_basis(Y, rank)
    net = ResidualNetwork(
        phi, bias=phi, layers=LAYERS, final_time=FINAL_TIME, activation="tanh", precision="single",
        solver_parameters={"ts_type": "rk", "ts_rk_type": "1fe"},
    )  # fmt: skip
    net.start("random smooth", seed, gain=0.3)
    for layer in range(LAYERS):
        net.kernel.set(layer, net.kernel.get(layer) - np.eye(phi.rank))
    return net


def learn(data, Y, rank, iterations, seed, some=slice(None)):
    """The trained network and head, the number of their parameters, CPU seconds, and J in each iteration.

    Without iterations the kernels are 0, so that layers do nothing, and the head alone is learned.
    """
    start = time.process_time()
    net = network(Y, rank, seed)
    phi = net.bases["phi"][0]
    head = Head(phi, pressures(Y.one, data, some), "identity")
    if not iterations:
        net.start("zero")
    regulariser = tikhonov(0.0, W=2.8e-5, mu=2.8e-5) + smooth_in_space(7e-9)
    problem = LearningProblem(net, head, least_squares, regulariser, data.batch(phi, some))
    result = train(problem, {"tao_type": "bqnls", "tao_max_it": iterations}, eliminate="head")
    learned = problem.parameters if iterations else head.parameters
    return net, head, sum(parameter.dim for parameter in learned), time.process_time() - start, result.values


# %% Baselines
# Linear map and kernel ridge take the first 128 mode coefficients of both fields to coefficients of the outputs. FNO and
# DeepONet see exp(-K). FNO has a grid over the bounding box, is told the places and what belongs to the plate, and is judged
# there. The branch of DeepONet has the first 64 mode coefficients: with values at the points it learns the samples by heart
# (12 % on held-out samples in place of 6 %). It is trained and judged at each fourth point. No run takes more than twice the
# time of one of the network; FNO, whose training error is near that of new samples, would go on improving.

GRID, MODES, SEEN, EACH = (42, 30), 128, 64, 4


def run_of(model, epochs, rate, batch, **of_model):
    return {"model": model, "epochs": epochs, "rate": rate, "batch": batch, "of_model": of_model}


#: Settings of operators_torch.py, by name; chosen after a few short runs with 100 held-out training samples.
ON_GRID = {
    "FNO": run_of("FNO", 8, 5e-3, 20, width=22, modes=8, projection=32, coordinates=True),
    "small FNO": run_of("FNO", 15, 1e-2, 20, width=7, modes=8, projection=32, coordinates=True),
}
AT_POINTS = {
    "DeepONet": run_of("DeepONet", 100, 1e-3, 50, branch=(500, 500), trunk=(100, 100), terms=200),
    "small DeepONet": run_of("DeepONet", 150, 5e-3, 50, branch=(128, 128), trunk=(64, 64), terms=80),
}


def baselines(data, Y, short):
    """What each came to, for the test samples."""
    phi = laplace_basis(Y.one, 32 if short else MODES)
    sensors = Sensors(phi, data.points, weights=data.weights)
    onto = pressures(Y.one, data)
    shown = Sensors(onto, data.points).evaluate(onto.function(np.eye(onto.rank)))  # the outputs at the points
    x, x_test = (np.hstack([sensors.fit(field.T).coefficients.T for field in data.fields[name]]) for name in ("train", "test"))
    for name, found, seconds in comparison.ridges(x, data.u["train"] * data.weights @ shown, x_test):
        errors = comparison.relative_errors(found @ shown.T, data.u["test"], data.weights)
        yield comparison.Result(name, [float(errors.mean())], [seconds])
    (inside, at), some = on_grid(data), itemgetter(np.s_[:, ::EACH])
    seen, seen_test = (data.fields[name][0] for name in ("train", "test"))
    numbers = np.meshgrid(*(np.arange(n) / n for n in GRID), indexing="ij")
    places = np.stack([*numbers, inside], axis=-1)
    for settings, take, inputs, rest in (
        (ON_GRID, at, (at(seen), at(seen_test)), {"weights": inside, "places": places}),
        (AT_POINTS, some, (x[:, :SEEN], x_test[:, :SEEN]), {"weights": data.weights[::EACH], "nodes": data.points[::EACH]}),
    ):
        arrays = {"inputs": inputs[0], "targets": take(data.u["train"]), "test_inputs": inputs[1]} | rest
        targets, weights = take(data.u["test"]), rest["weights"]

        def error(found, targets=targets, weights=weights):
            return comparison.relative_errors(found, targets, weights).mean()

        yield from comparison.operators(arrays, settings, error, short)


def on_grid(data):
    """Which points of the grid are on the plate, shape GRID, and a function that takes values at the points to these."""
    places = [np.linspace(low, high, n) for low, high, n in zip(data.points.min(axis=0), data.points.max(axis=0), GRID)]
    x = np.stack(np.meshgrid(*places, indexing="ij"), axis=-1).reshape(-1, 2)
    cells = Triangulation(*data.points.T, data.cells).get_trifinder()(*x.T)
    inside = cells >= 0
    corners = data.cells[cells[inside]]
    matrices = np.stack([np.ones(corners.shape), *data.points[corners].transpose(2, 0, 1)], axis=1)
    barycentric = np.linalg.solve(matrices, np.insert(x[inside], 0, 1.0, axis=1)[..., None])[..., 0]

    def at(values):
        found = np.zeros((len(values), len(x)))
        found[:, inside] = np.einsum("spk,pk->sp", values[:, corners], barycentric)
        return found.reshape(-1, *GRID)

    return inside.reshape(GRID).astype(float), at


# %% All together


def draw(path, Y, data, found, history, meshes):
    """A test sample on the plate, J in each iteration, and the errors on all meshes; Y is of the mesh of the points."""
    K, u = data.K["test"][0], data.u["test"][0]
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    fields = [("K", K, None), ("u", u, (0, u.max())), ("network", found[0], (0, u.max())), ("network - u", found[0] - u, None)]
    at = nearest(data.points, Y.coordinates)
    for ax, (title, field, limits) in zip(axes.flat, fields):
        label = "log of the permeability" if title == "K" else "pressure"
        plot.function(Y, Y.batch(field[at]), ax=ax, limits=limits, label=label).set_title(title)
    plot.learning_curve(history, ax=axes[1, 1], xlabel="iteration of L-BFGS")
    errors = {f"{nodes:,} nodes": 100 * each for nodes, each in meshes.items()}
    trained = f"{len(data.points):,} nodes"
    plot.comparison(errors, marked=[trained], xlabel="relative error in L2, %", ax=axes[1, 2])
    axes[1, 2].set_title(f"test samples on three meshes,\ntrained on {trained}" if len(meshes) == 3 else "test samples")
    plot.save(path, figure)


def main(short=False):
    """Returns the mean error on the mesh of the points."""
    comm = fd.COMM_WORLD
    data = Data(*((80, 20) if short else (1000, 200)))
    plates = [LabelSpace(fd.FunctionSpace(mesh, "CG", 1)) for mesh in darcy.plates(comm, 1 if short else 2)]
    plates = [Channels(Y, CHANNELS) for Y in plates]
    Y, seeds, rank, iterations = (plates[1], 1, 16, 30) if short else (plates[1], comparison.SEEDS, RANK, ITERATIONS)
    net, head, count, seconds, _ = learn(data, Y, rank, 0, 0)
    results = [comparison.Result("no layers", [float(data.errors(net, head).mean())], [seconds], count)]
    found = [learn(data, Y, rank, iterations, seed) for seed in range(seeds)]
    errors = [float(data.errors(net, head).mean()) for net, head, *_ in found]
    results.append(comparison.Result("network", errors, [seconds for *_, seconds, _ in found], found[0][2]))
    results += baselines(data, Y, short)
    # The network of least J, which is of the training samples, on all meshes.
    net, head, _, _, history = min(found, key=lambda one: one[-1][-1])
    meshes, means, rows = {}, {}, []
    for there in plates:
        nodes, moved = there.one.size, head.on(there)
        meshes[nodes] = data.errors(net.on(there), moved)
        means[nodes], least = float(meshes[nodes].mean()), float(data.at_best(moved.onto, head.onto).mean())
        rows.append(f"| {nodes:,} | {100 * means[nodes]:.2f} | {100 * least:.2f} |")
    lines = [
        "The network of least J on other meshes. Between the nodes outputs are linear; the last column is what the functions",
        "of the output leave there, if their coefficients are right.",
        "",
        "| nodes of the mesh | relative error in L2, % | least one, % |",
        "|---|---|---|",
        *rows,
    ]
    experiment = comparison.Experiment(
        problem="Darcy flow on a plate",
        domain="A plane plate with a curved edge and three holes: no symmetry.",
        law="-div(exp(K) grad u) = 1, u = 0 on the outer edge, no flow into the holes. K is Gaussian with covariance "
        "s (9 - Laplace)^-2 and deviation 0.5. From K to u.",
        samples="1,000 to learn from, 200 to test with, known at 2,319 points.",
        results=results,
        lines=lines,
    )
    said, output = data.outputs(net, head), Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    draw(output / "darcy_on_a_plate.png", Y.one, data, said, history, meshes)
    if comm.rank == 0:
        text = f"{experiment.table()}\n\n" + "\n".join(lines) + "\n"
        print(text)
        (output / "darcy_on_a_plate.txt").write_text(text)
        if not short:
            experiment.write("darcy_on_a_plate")
        print(f"relative error: {results[1].mean:.4f}")
    # As good as was asked for, with as few parameters, and better than the head alone; the same on the finer mesh.
    error, alone, parameters = results[1].mean, results[0].mean, results[1].parameters
    assert error < (0.2 if short else 0.0105) and parameters <= 53_000 and (short or error < alone / 3)
    assert short or abs(means[9020] - means[2319]) < 0.02 * means[2319]
    return error


if __name__ == "__main__":
    logging.getLogger("fem_resnet").setLevel(logging.ERROR)
    main(SHORT)
