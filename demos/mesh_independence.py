r"""Mesh-independent training
=========================

How many iterations does training take, when its mesh is refined and its layers are split? What is learned are functions,
the bias a(y, t) on Y x (0, T) and the kernel b(y, z, t) on Y x Y x (0, T), and L-BFGS is given their inner products,

    (a, a') = int a a' dy dt,        (b, b') = int b b' dy dz dt,

so that its iterates are approximations of one sequence of functions, and their number stays what it is. The same
method with the inner product of plain numbers, as deep learning has it, knows neither the size of a cell nor the length
of a layer: the same problem gets harder with each refinement. Run

    containers/run python demos/mesh_independence.py           (about four minutes; --short for 10 s)
    containers/run mpiexec -n 2 python -m mpi4py demos/mesh_independence.py

It writes a figure and its table to demos/output/; the table of the full run is demos/mesh_independence.txt, at the end of this
page.
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
from pyadjoint import Control

from fem_resnet import (
    Batch,
    LabelSpace,
    LearningProblem,
    ResidualNetwork,
    laplace_basis,
    least_squares,
    plot,
    read_mesh,
    tikhonov,
    train,
)

# %% The label domain
# A polygon with a re-entrant corner and a hole, meshed by Gmsh; every refinement splits each triangle into four.


def label_space(refinement):
    """Continuous, piecewise linear functions on the polygon's mesh, refined so many times."""
    path = Path(__file__).parents[1] / "meshes" / "polygon.msh"
    return LabelSpace(fd.FunctionSpace(fd.MeshHierarchy(read_mesh(path), refinement)[-1], "CG", 1))


# %% The learning problem
# Five smooth functions are to be carried to five others, by least squares with Tikhonov's regularisation (2.11). The
# kernel is expanded in Laplace eigenfunctions, the bias has a value at every node. All parameters start at zero.

SAMPLES = 5
RANK = 8
FINAL_TIME = 1.0
TIKHONOV = 0.1


def waves(Y, seed):
    """Smooth functions on the domain, the same ones whatever the mesh: (nodes, samples)."""
    random = np.random.default_rng(seed)
    frequencies, phases = random.normal(scale=2, size=(2, SAMPLES)), random.uniform(0, 2 * np.pi, SAMPLES)
    return Y.batch(np.cos(Y.coordinates @ frequencies + phases))


def learning_problem(Y, times, kind=LearningProblem):
    """Network and data, as a problem of this kind."""
    net = ResidualNetwork(laplace_basis(Y, RANK), layers=times, activation="tanh")
    return kind(net, None, least_squares, tikhonov(TIKHONOV), Batch(waves(Y, 1), waves(Y, 2)))


# %% The same problem in plain numbers
# J is the same, and so is the optimiser; only the Riesz maps of the controls, which turn derivatives into gradients, are
# now the identity of R^n.


class PlainNumbers(LearningProblem):
    """A learning problem whose gradients are lists of partial derivatives."""

    def controls(self):
        """One Control a set of coefficients, with the inner product of R^n."""
        return [Control(function, riesz_map="l2") for function in self.functions]


# %% Counting iterations
# TAO's L-BFGS, from zero until the norm of the gradient - in the problem's own inner product - has fallen by 1e-6. In
# plain numbers we do not wait for more than 1,000.

FALL = 1e-6
LIMIT = 1000


def iterations(problem, fall):
    """How many iterations it takes; more than `LIMIT` where they did not suffice."""
    options = {"tao_gatol": 0.0, "tao_gttol": fall, "tao_max_it": LIMIT}
    result = train(problem, options, monitor=lambda progress: None)
    assert result.reason in ("CONVERGED_GTTOL", "ITERATIONS"), result.reason
    return result.iterations if result.converged else LIMIT + 1


# %% Layers of any lengths


def equal(layers):
    """Layer times of layers of equal length."""
    return np.linspace(0, FINAL_TIME, layers + 1)


def unequal(layers, ratio):
    """Layer times of layers each of which is `ratio` times as long as the one before."""
    lengths = ratio ** np.arange(layers)
    return np.concatenate([[0], np.cumsum(lengths)]) / lengths.sum() * FINAL_TIME


# %% The figure


def draw(path, rows):
    """Iterations over nodes, and over layers; rows have nodes, layers, the longest over the shortest, and both numbers."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    by_nodes, by_layers = figure.subplots(1, 2, sharey=True)
    rows = np.minimum(rows, [np.inf, np.inf, np.inf, LIMIT, LIMIT])  # of those that were stopped there
    equal_layers = rows[rows[:, 2] == 1]
    few, one_mesh = equal_layers[equal_layers[:, 1] == 4], equal_layers[equal_layers[:, 0] == rows[1, 0]]
    unequal = rows[rows[:, 2] > 1]

    def both(rows, column, which=""):
        return {f"{name}{which}": rows[:, [column, k]] for k, name in ((3, "function space"), (4, "plain numbers"))}

    for ax, shown, column, xlabel in ((by_nodes, few, 0, "nodes"), (by_layers, one_mesh, 1, "layers")):
        ends = [(shown[:, column].min(), LIMIT), (shown[:, column].max(), LIMIT)]
        points = both(unequal, column, ", unequal layers") if column else None
        plot.lines(
            both(shown, column), points=points, reference={f"stopped at {LIMIT:,}": ends}, log="xy", legend=False, ax=ax,
            xlabel=xlabel, ylabel="" if column else "iterations",
        )  # fmt: skip
    by_nodes.set_title("a finer mesh, four layers")
    by_layers.set_title(f"more layers, {rows[1, 0]:.0f} nodes")
    figure.legend(*by_layers.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    plot.save(path, figure)


# %% All together


def main(short=False):
    """Returns the iterations of all cases, in function space and in plain numbers."""
    comm, lines, start = fd.COMM_WORLD, [], time.perf_counter()
    # Refinements of the mesh, layers, and how much longer each is than the one before.
    cases = [(0, 4, 1.0), (1, 4, 1.0), (1, 4, 2.0)]
    if not short:
        cases[2:] = [(2, 4, 1.0), (3, 4, 1.0), (1, 8, 1.0), (1, 16, 1.0), (1, 4, 2.0), (1, 8, 2.0), (1, 16, 1.3)]
    fall = 1e-3 if short else FALL

    def say(text):
        if comm.rank == 0:
            print(text, flush=True)
            lines.append(text)

    say(f"{'':32s}iterations in")
    say(f"{'nodes':>7s}{'layers':>8s}{'longest/shortest':>18s}{'function space':>16s}{'plain numbers':>15s}")
    rows = []
    for refinement, layers, ratio in cases:
        Y = label_space(refinement)
        times = equal(layers) if ratio == 1 else unequal(layers, ratio)
        counts = [iterations(learning_problem(Y, times, kind), fall) for kind in (LearningProblem, PlainNumbers)]
        rows.append([Y.size, layers, ratio ** (layers - 1), *counts])
        in_function_space, plain = (f"> {LIMIT}" if count > LIMIT else str(count) for count in counts)
        say(f"{Y.size:7d}{layers:8d}{ratio ** (layers - 1):18.0f}{in_function_space:>16s}{plain:>15s}")
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    draw(output / "mesh_independence.png", rows)
    if comm.rank == 0:
        (output / "mesh_independence.txt").write_text("\n".join(lines) + "\n")
        print(f"time: {time.perf_counter() - start:.0f} s")

    # What this page claims: within 20 per cent, and more than twice as many.
    in_function_space, plain = np.array(rows).T[3:]
    assert in_function_space.max() <= min(1.2 * in_function_space.min(), LIMIT)
    assert plain.max() > 2 * plain.min()
    return in_function_space, plain


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    main(SHORT)
