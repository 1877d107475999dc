r"""Waves on a rotating sphere
==========================

A map between functions on the sphere is learned from 200 samples: from the vorticity z(., 0) of a flow to z(., 1), by

    z_t + J(p, z + 6 sin(latitude)) = 0.01 Laplace z,        Laplace p = z,

whose Rossby waves travel westwards while the flow folds them. The law knows no longitude, and takes -z(x, -y) at longitude x
and latitude y to minus its solution there. The network keeps both, as in burgers_on_the_circle.py. Its neurons fill two
copies of an icosahedral sphere. Kernels, bias and head commute with turns about the axis, and with the reflection at the
equator, which acts on each copy with a sign. A kernel then couples harmonics of one order m, of all degrees. Run

    containers/run python demos/waves_on_the_sphere.py            (about fifteen minutes; --short for 20 s)

It writes a table and a figure to demos/output/. The last line is the mean error. Samples are known at 512 points of a grid of
latitudes and longitudes. `Sensors` lay inputs onto a mesh by least squares, and evaluate outputs at these points. So the
trained network is taken to a coarser and to a finer icosahedron as it is.

The network has an error of 6.9 % with 3,132 numbers. Two methods come near it: kernel ridge regression that sees 16 turned
and reflected copies of each sample, in a fifth of the time, and a Fourier neural operator with eleven times as many numbers,
in half of the time: 7.6 % each. Neither the network nor the operators are trained to their end: all settings were chosen on
40 of the training samples, by few runs. On 160 samples the operator came to 6.0 % there in 64 s, the network to 5.9 % in 94
s. DeepONet does not fit turned samples in its ten seconds.
"""

import logging
import sys
import time
from pathlib import Path

SHORT = "--short" in sys.argv
sys.argv = [argument for argument in sys.argv if argument != "--short"]  # PETSc would take it for an option of its own
sys.path.append(str(Path(__file__).parent / "atlas"))

import comparison
import firedrake as fd
import numpy as np
import vorticity
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
    Sensors,
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

NAME = "waves_on_the_sphere"

# %% The network
# Channels with the sign -1 under the reflection at the equator can carry the vorticity; others have the sign 1. Elements of
# degree 2 with positive weights, KMV, hold spherical harmonics better than linear ones do.

SIGNS, LAYERS, FINAL_TIME = (-1, 1), 4, 4.0
#: How often the icosahedron is refined: where training begins and where it ends, and the meshes that the network is taken to.
FIRST, TRAINED_ON, MESHES = 2, 3, (2, 3, 4)
#: All harmonics of the degrees below 5, 7 and 8.
RANKS = (25, 49, 64)
#: For each rank: iterations of L-BFGS, steps of Levenberg and Marquardt. At last iterations of L-BFGS on the finer mesh.
STEPS, LAST = {25: (20, 15), 49: (20, 10), 64: (0, 3)}, 8
ROWS, WEIGHT = 3, 1e-8


def sphere(refinements):
    """Copies of an icosahedral sphere."""
    V = fd.FunctionSpace(fd.UnitIcosahedralSphereMesh(refinements), "KMV", 2)
    return Channels(LabelSpace(V), len(SIGNS))


def network(rank, layers, seed):
    """The network and its head, with random kernels and no bias."""
    phi = laplace_basis(sphere(FIRST), rank)
    x, y, z = fd.SpatialCoordinate(phi.Y.one.V.mesh())
    symmetries = fd.as_vector([-y, x, 0 * z]), Parity(lambda places: places * [1, 1, -1], SIGNS, output=-1)
    net = ResidualNetwork(
        Kernel(phi, among=Symmetric(phi, *symmetries)),
        bias=Bias(invariant_functions(phi, *symmetries)),
        layers=layers,
        final_time=FINAL_TIME,
        activation="tanh",
        solver_parameters={"ts_type": "rk", "ts_rk_type": "1fe"},
    )
    net.start("random smooth", seed, gain=3.0)
    return net, Head(phi, phi.one, "identity", symmetries=symmetries)


class Data:
    """Samples at points of the sphere, and as batches on any mesh of it."""

    def __init__(self, train, test):
        made = [comparison.made_once(vorticity.samples, number, seed) for seed, number in enumerate((train, test))]
        self.points, self.weights = made[0]["points"], made[0]["weights"]
        self.u, self.v = ({name: one[which] for name, one in zip(("train", "test"), made)} for which in ("inputs", "targets"))
        self.scale = [np.sqrt((self.weights * one["train"] ** 2).sum(axis=1).mean()) for one in (self.u, self.v)]
        self.scale = [scale / np.sqrt(self.weights.sum()) for scale in self.scale]
        self.grid = (vorticity.LATITUDES, 2 * vorticity.LATITUDES)

    def sensors(self, net):
        return Sensors(net.bases["phi"][0].one, self.points, weights=self.weights)

    def batch(self, net, name):
        """Inputs stand in the first channel; weighted so that J is the mean of squared relative errors."""
        sensors = self.sensors(net)
        u, v = (sensors.fit(one[name].T / scale).functions for one, scale in zip((self.u, self.v), self.scale))
        sizes = (self.weights * self.v[name] ** 2).sum(axis=1)
        return Batch(net.Y.join([u, *[None] * (net.Y.channels - 1)]), v, (1 / sizes).tolist())

    def output(self, net, head):
        """At the points, for the test samples."""
        return self.scale[1] * self.sensors(net).evaluate(head(net(self.batch(net, "test").inputs))).T

    def errors(self, found):
        """Relative errors of all test samples in L2."""
        return comparison.relative_errors(found, self.v["test"], self.weights)


# %% Training
# The head is solved for exactly in each evaluation. Few harmonics come first, on a coarse mesh: there evaluations cost least.


def learning_problem(data, net, head):
    return LearningProblem(net, head, least_squares, tikhonov(WEIGHT), data.batch(net, "train"))


def learn(data, seed, ranks=RANKS, layers=LAYERS, steps=STEPS, last=LAST):
    """The trained network and head, how many numbers they have, CPU seconds and J."""
    start = time.process_time()
    net, head = network(ranks[-1], layers, seed)

    def by_rank(smaller):
        if not layers:  # J is quadratic in the head alone
            return train_levenberg_marquardt(smaller, iterations=3, damping=1e-10)
        first, then = steps[smaller.net.bases["phi"][0].one.rank]
        result = train(smaller, {"tao_max_it": first}, eliminate="head")
        if then:
            result = train_levenberg_marquardt(smaller, iterations=then, eliminate="head", rows=ROWS, seed=seed)
        return result

    J = train_by_ranks(learning_problem(data, net, head), ranks, by_rank)[-1].values[-1]
    finer = sphere(TRAINED_ON)
    net, head = net.on(finer), head.on(finer)
    problem = learning_problem(data, net, head)
    if layers:
        J = train(problem, {"tao_max_it": last}, eliminate="head").values[-1]
    return net, head, sum(parameter.dim for parameter in problem.parameters), time.process_time() - start, J


# %% Baselines
# They see the same values at the same points. A turn by a multiple of 1/32 and the reflection take the points to each other: a
# sample moved by them is a sample too.


def moves(grid, turns):
    """Where values at the points come from, shape (moves, points), and signs, for equally many turns and the reflection."""
    numbers = np.arange(np.prod(grid)).reshape(grid)
    turned = [np.roll(numbers, k, axis=1) for k in range(0, grid[1], grid[1] // turns)]
    both = np.array([[one, one[::-1]] for one in turned]).reshape(2 * turns, -1)
    return both, np.tile([1.0, -1.0], turns)


def turned_copies(x, y, x_test, grid, turns=8):
    """Predictions and CPU seconds of kernel ridge regression that sees turned and reflected copies of the samples too.

    Samples are rows of values times roots of weights. Width and damping are chosen on a fifth of the training samples, of
    which no copies are seen then.
    """
    start = time.process_time()
    to, signs = moves(grid, turns)
    x, y = (signs[:, None, None] * one[:, to].swapaxes(0, 1) for one in (x, y))
    number = np.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2])
    held = x.shape[1] // 5
    x, y = x.reshape(number.size, -1), y.reshape(number.size, -1)
    size = np.sqrt((x**2).sum(axis=1).mean())
    settings = {"gamma": np.logspace(-2, 0, 5), "alpha": [1e-8, 1e-6, 1e-4, 1e-2]}
    split = [(number[:, held:].ravel(), number[0, :held])]
    model = GridSearchCV(KernelRidge(kernel="rbf"), settings, cv=split, scoring="neg_mean_squared_error").fit(
        x / size, y / y.std()
    )
    return model.predict(x_test / size) * y.std(), time.process_time() - start


# The Fourier neural operator needs a torus, and the sphere gives one: beyond a pole the latitudes go on at the opposite
# longitude, and come back over the other pole (the double Fourier sphere). The operator is told sine and cosine of the
# latitude there, and not the longitude. So it commutes with turns; the reflection is drawn for each batch.


def fno(epochs, **of_model):
    of_model |= {"layers": 4, "coordinates": True}
    return {"model": "FNO", "rate": 1e-2, "epochs": epochs, "moved": True, "of_model": of_model}


def deeponet(epochs, **of_model):
    return {"model": "DeepONet", "rate": 5e-3, "batch": 50, "epochs": epochs, "moved": True, "of_model": of_model}


#: Settings of operators_torch.py, by name.
FNOS = {"FNO": fno(90, width=8, modes=6), "small FNO": fno(60, width=4, modes=4, projection=16)}
DEEPONETS = {
    "DeepONet": deeponet(600, branch=(120,), trunk=(60, 60), terms=120, every=4),
    "small DeepONet": deeponet(600, branch=(24,), trunk=(24,), terms=24, every=8),
}


def on_the_torus(data):
    """What the Fourier neural operators see."""
    n, m = data.grid
    numbers = np.arange(n * m).reshape(n, m)
    both = np.concatenate([numbers, np.roll(numbers, m // 2, axis=1)[::-1]])
    sines = data.points[both, 2]
    beyond = np.arange(2 * n)[:, None] < n
    places = np.stack([sines, np.where(beyond, 1, -1) * np.sqrt(1 - sines**2)], axis=-1)
    back = (n - 1 - np.arange(2 * n)) % (2 * n)
    reflected = np.arange(2 * n * m).reshape(2 * n, m)[back].ravel()
    return {
        "inputs": data.u["train"][:, both], "targets": data.v["train"][:, both], "test_inputs": data.u["test"][:, both],
        "weights": data.weights[both], "places": places,
        "moves": np.stack([np.arange(2 * n * m), reflected]), "signs": np.array([1.0, -1.0]),
    }  # fmt: skip


def at_points(data):
    """What DeepONets see."""
    to, signs = moves(data.grid, data.grid[1])
    return {
        "inputs": data.u["train"], "targets": data.v["train"], "test_inputs": data.u["test"],
        "weights": data.weights, "nodes": data.points, "moves": to, "signs": signs,
    }  # fmt: skip


def baselines(data, short):
    """Results of all methods but ours."""
    root = np.sqrt(data.weights)
    values = [root * one for one in (data.u["train"], data.v["train"], data.u["test"])]
    copied = "kernel ridge, turned copies", *turned_copies(*values, data.grid, 2 if short else 8)
    for name, found, seconds in (*comparison.ridges(*values), copied):
        yield comparison.Result(name, [float(data.errors(found / root).mean())], [seconds])
    n, m = data.grid
    for arrays, settings, points in (
        (on_the_torus(data), FNOS, lambda found: found[:, :n].reshape(-1, n * m)),
        (at_points(data), DEEPONETS, lambda found: found),
    ):
        yield from comparison.operators(arrays, settings, lambda found: data.errors(points(found)).mean(), short)


# %% All together


def draw(path, net, data, found, rows, results):
    """One test sample, in the network's harmonics; errors in per cent over nodes of meshes, and of all methods by name."""
    Y, sensors = net.Y.one, data.sensors(net)
    u, v = data.u["test"][0], data.v["test"][0]
    bound, later = np.abs(v).max(), f"z(., {vorticity.TIME:g})"
    parts = {
        "z(., 0)": (u, None),
        later: (v, (-bound, bound)),
        "network": (found[0], (-bound, bound)),
        f"network - {later}": (found[0] - v, None),
    }
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[9, 6])
    for ax, (title, (values, limits)) in zip(left.subplots(2, 2, subplot_kw={"projection": "3d"}).flat, parts.items()):
        f = sensors.fit(values[:, None]).functions
        plot.function(Y, f, ax=ax, limits=limits, label="vorticity").set_title(title)
        ax.set(xticks=[], yticks=[], zticks=[], xlabel="", ylabel="", zlabel="")
        ax.view_init(25, -30)
    meshes, methods = right.subplots(2, 1, height_ratios=[1, 1.4])
    plot.lines({"network": rows}, log="x", xlabel="nodes of the icosahedral mesh", legend=False, ax=meshes)
    highest = 1.1 * np.max(rows, axis=0)[1]
    meshes.set(ylabel="relative error, %", ylim=(0, highest), title=f"on other meshes, trained on {Y.size:,} nodes")
    ours = [name for name in results if "network" in name]
    plot.comparison(results, marked=ours, log=True, xlabel="relative error in L2, %", ax=methods)
    methods.set_title("all methods; a dot is a seed")
    plot.save(path, figure)


def main(short=False):
    """Returns the mean error on the mesh of training."""
    comm = fd.COMM_WORLD
    data = Data(*((40, 10) if short else (200, 100)))
    ranks, steps, seeds = ((9, 25), {9: (5, 0), 25: (10, 2)}, 1) if short else (RANKS, STEPS, comparison.SEEDS)
    meshes, last = (MESHES[:2], 1) if short else (MESHES, LAST)
    net, head, count, seconds, _ = learn(data, 0, ranks[-1:], layers=0)
    without = float(data.errors(data.output(net, head)).mean())
    results = [comparison.Result("linear network, L = 0", [without], [seconds], count)]
    found = []
    for seed in range(seeds):
        found.append(learn(data, seed, ranks, LAYERS, steps, last))
        if comm.rank == 0:
            print(f"seed {seed}: J = {found[-1][-1]:.2e} in {found[-1][-2]:.0f} s", flush=True)
    best = min(range(seeds), key=lambda seed: found[seed][-1])  # by J, which is of the training samples
    rows, on_best, lines = [], None, []
    for n in meshes:
        Y = sphere(n)
        there = [(net.on(Y), head.on(Y)) for net, head, *_ in found] if n != TRAINED_ON else [pair[:2] for pair in found]
        outputs = [data.output(*pair) for pair in there]
        errors = [float(data.errors(one).mean()) for one in outputs]
        rows.append((Y.one.V.dim(), np.mean(errors)))
        where = ", trained" if n == TRAINED_ON else ""
        lines.append(
            f"- icosahedron refined {n} times, {Y.one.V.dim():,} nodes{where}: {np.mean(errors):.2%} "
            f"(deviation {np.std(errors, ddof=1 if seeds > 1 else 0):.2%})"
        )
        if n == TRAINED_ON:
            on_best, ours = outputs[best], errors
    name = f"network, {LAYERS} layers, {len(SIGNS)} channels"
    results.append(comparison.Result(name, ours, [seconds for *_, seconds, _ in found], found[0][2]))
    for result in baselines(data, short):
        results.append(result)
        if comm.rank == 0:
            print(result, flush=True)
    experiment = comparison.Experiment(
        problem="Vorticity on a rotating sphere, from one time to a later one: Rossby waves and nonlinear advection",
        domain="the sphere; icosahedral mesh, KMV elements of degree 2",
        law=f"z_t + J(p, z + {2 * vorticity.OMEGA:g} sin y) = {vorticity.VISCOSITY:g} Laplace z, Laplace p = z; Gaussian z",
        samples=f"{len(data.u['train'])} for training, {len(data.u['test'])} for tests",
        results=results,
        lines=lines,
    )
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    of_methods = {one.method: 100 * np.array(one.errors) for one in results}
    draw(output / f"{NAME}.png", found[best][0], data, on_best, 100 * np.array(rows) / [100, 1], comm.bcast(of_methods))
    if comm.rank == 0:
        text = "\n".join([experiment.table(), "", *lines])
        print(text)
        (output / f"{NAME}.txt").write_text(text + "\n")
        if not short:
            experiment.write(NAME)
        print(f"relative error: {np.mean(ours):.4f}")
    # The network is better than a linear map, and as good on the finer mesh.
    linear = next(result.mean for result in results if result.method == "linear map")
    assert short or rows[-1][1] < 1.1 * np.mean(ours)
    assert np.mean(ours) < (0.9 if short else 0.3) * linear
    return np.mean(ours)


if __name__ == "__main__":
    logging.getLogger("fem_resnet").setLevel(logging.ERROR)  # a coarse mesh does not hold all modes, and a warning says so
    main(SHORT)
