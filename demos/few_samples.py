r"""How few samples are enough?
===========================

Two maps between functions are learned from 25 to 1,000 samples: heat in a gear (heat_on_a_gear.py) and waves on a rotating
sphere (waves_on_the_sphere.py). Two things are known beside the samples, and each can be told to the network or not:

- **The symmetries of the law.** Kernels, bias and head commute with them, or are free.
- **A derivative of the map.** Who can solve the equation for an input can solve the linearised equation too. Here each sample
  has one direction v, and the derivative of the solution in v. `Derivatives` makes the network's own derivative match it.

All four networks have the same modes, channels, layers and iterations. Kernel ridge regression sees the same samples, and then
their turned and reflected copies too. Run

    containers/run python demos/few_samples.py            (about half an hour; --short for 20 s)

It writes a table and a figure to demos/output/. Errors are relative, in L2, means over 200 test samples.
"""

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

SHORT = "--short" in sys.argv
sys.argv = [argument for argument in sys.argv if argument != "--short"]  # PETSc would take it for an option of its own
sys.path.append(str(Path(__file__).parent / "atlas"))

import comparison
import firedrake as fd
import heat
import heat_rivals
import numpy as np
import vorticity
import waves_on_the_sphere
from matplotlib.figure import Figure

from fem_resnet import (
    Batch,
    Bias,
    Channels,
    Derivatives,
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
    read_mesh,
    tikhonov,
    train,
)  # fmt: skip

NAME = "few_samples"
SIZES, TESTS = (25, 50, 100, 300, 1000), 200
#: This one is learned from with five seeds, others with one.
AT = 100
LAYERS, FINAL_TIME, ITERATIONS = 2, 2.0, 60
#: Weights of Tikhonov's term by (symmetric, informed), chosen for 100 samples on 100 others that are not the tests.
TIKHONOV = {(True, False): 1e-5, (True, True): 1e-6, (False, False): 1e-4, (False, True): 1e-4}

# %% The two laws
# A law is known by samples at points, with one direction and derivative each, and by its symmetries: maps of Y that act on the
# channels with signs.


@dataclass
class Law:
    """Samples of a law, where the neurons are, and which symmetries kernels and head may keep."""

    name: str
    data: dict[str, np.ndarray]
    tests: dict[str, np.ndarray]
    Y: Channels
    rank: int
    symmetries: tuple
    #: Predictions and CPU seconds of kernel ridge regression that sees moved copies of the samples too.
    copied_ridge: Callable

    def __post_init__(self):
        self.phi = laplace_basis(self.Y, self.rank)
        self.points, self.weights = self.data["points"], self.data["weights"]
        self.sensors = Sensors(self.phi.one, self.points, weights=self.weights)
        self.scale = [np.sqrt((self.weights * self.data[name] ** 2).sum(axis=1).mean()) for name in ("inputs", "targets")]
        self.scale = [scale / np.sqrt(self.weights.sum()) for scale in self.scale]
        self.test_inputs = self.in_first(self.tests["inputs"])

    def fitted(self, values, scale):
        """Functions from values at the points, one sample a row."""
        return self.sensors.fit(values.T / scale).functions

    def in_first(self, values):
        """Inputs stand in the first channel."""
        return self.Y.join([self.fitted(values, self.scale[0]), *[None] * (self.Y.channels - 1)])

    def batch(self, count, informed):
        """The first samples, weighted so that J is the mean of squared relative errors."""
        u, v = (self.data[name][:count] for name in ("inputs", "targets"))
        sizes = (self.weights * v**2).sum(axis=1)
        derivatives = None
        if informed:
            along, slopes = (self.data[name][:count, 0] for name in ("directions", "derivatives"))
            derivatives = Derivatives(self.in_first(along), self.fitted(slopes, self.scale[1]))
        return Batch(self.in_first(u), self.fitted(v, self.scale[1]), (1 / sizes).tolist(), derivatives=derivatives)

    def error(self, found):
        """Mean over the test samples of relative errors in L2."""
        return float(comparison.relative_errors(found, self.tests["targets"], self.weights).mean())


def heat_in_a_gear(samples, tests):
    """The law of heat.py: eight turns and their reflections, all of which make copies."""
    mesh = read_mesh(heat.MESH, fd.COMM_WORLD)
    data, tested = comparison.made_once(heat.derivatives, samples, 2, 1), comparison.made_once(heat.samples, tests, 5)
    signs = (1, 1, -1)
    symmetries = Parity(heat_rivals.turn, (1, 1, 1)), Parity(heat_rivals.mirror, signs)
    copied = partial(heat_rivals.ridge_in_all_positions, moves=heat_rivals.positions(data["points"]))
    Y = Channels(LabelSpace(fd.FunctionSpace(mesh, "CG", 1)), len(signs))
    return Law("heat in a gear", data, tested, Y, 40, symmetries, copied)


def waves_on_a_sphere(samples, tests):
    """The law of vorticity.py: turns about the axis, of which 8 make copies, and the reflection at the equator."""
    data, tested = comparison.made_once(vorticity.samples, samples, 2, 1), comparison.made_once(vorticity.samples, tests, 5)
    V = fd.FunctionSpace(fd.UnitIcosahedralSphereMesh(2), "KMV", 2)
    x, y, z = fd.SpatialCoordinate(V.mesh())
    signs = (-1, -1, 1)
    symmetries = fd.as_vector([-y, x, 0 * z]), Parity(lambda places: places * [1, 1, -1], signs, output=-1)
    copied = partial(waves_on_the_sphere.turned_copies, grid=(vorticity.LATITUDES, 2 * vorticity.LATITUDES))
    Y = Channels(LabelSpace(V), len(signs))
    return Law("waves on a sphere", data, tested, Y, 49, symmetries, copied)


# %% The networks


def learn(law, count, symmetric, informed, seed, iterations=ITERATIONS):
    """The error of a trained network, its number of parameters and CPU seconds."""
    start, phi = time.process_time(), law.phi
    symmetries = law.symmetries if symmetric else ()
    net = ResidualNetwork(
        Kernel(phi, among=Symmetric(phi, *symmetries)) if symmetric else Kernel(phi),
        bias=Bias(invariant_functions(phi, *symmetries) if symmetric else phi),
        layers=LAYERS,
        final_time=FINAL_TIME,
        activation="tanh",
        solver_parameters={"ts_type": "rk", "ts_rk_type": "1fe"},
    )
    net.start("random smooth", seed, gain=3.0)
    head = Head(phi, phi.one, "identity", symmetries=symmetries)
    problem = LearningProblem(net, head, least_squares, tikhonov(TIKHONOV[symmetric, informed]), law.batch(count, informed))
    train(problem, {"tao_max_it": iterations}, eliminate="head")
    seconds = time.process_time() - start
    found = law.scale[1] * law.sensors.evaluate(head(net(law.test_inputs))).T
    return law.error(found), sum(parameter.dim for parameter in problem.parameters), seconds


#: Names of the four networks by (symmetric, informed).
NETWORKS = {
    (False, False): "free kernels",
    (False, True): "free kernels, derivatives",
    (True, False): "symmetric kernels",
    (True, True): "symmetric kernels, derivatives",
}

# %% Kernel ridge regression
# It sees the same samples; then copies of them in all positions too, in the ways of the two other demos. On the sphere the
# copies make one large system, so there are at most 300 samples.

MOST_COPIED = {"heat in a gear": 1000, "waves on a sphere": 300}


def ridges(law, count):
    """Errors and CPU seconds of kernel ridge regression, by name."""
    root = np.sqrt(law.weights)
    values = [root * law.data[name][:count] for name in ("inputs", "targets")] + [root * law.tests["inputs"]]
    found = {name: result for name, *result in comparison.ridges(*values) if name == "kernel ridge"}
    if count <= MOST_COPIED[law.name]:
        found["kernel ridge, copies"] = law.copied_ridge(*values)
    return {name: (law.error(predicted / root), seconds) for name, (predicted, seconds) in found.items()}


# %% All together


def curves(law, sizes, five_seeds, iterations):
    """Lists of errors and seconds, by the method and the number of samples; and parameters by the method."""
    found, counts = {}, {}
    for count in sizes:
        for (symmetric, informed), name in NETWORKS.items():
            seeds = comparison.SEEDS if count in five_seeds else 1
            runs = [learn(law, count, symmetric, informed, seed, iterations) for seed in range(seeds)]
            found[name, count] = [run[0] for run in runs], [run[2] for run in runs]
            counts[name] = runs[0][1]
        for name, (error, seconds) in ridges(law, count).items():
            found[name, count] = [error], [seconds]
    return found, counts


def table(law, found, sizes):
    """Markdown: mean errors in per cent, the least of each size marked."""
    methods = list(dict.fromkeys(name for name, _ in found))
    least = {count: min(np.mean(found[name, count][0]) for name in methods if (name, count) in found) for count in sizes}
    yield f"| {law.name}, error in % with so many samples | {' | '.join(f'{count:,}' for count in sizes)} |"
    yield "|---" * (1 + len(sizes)) + "|"
    for name in methods:
        cells = []
        for count in sizes:
            mean = np.mean(found[name, count][0]) if (name, count) in found else None
            cells.append("" if mean is None else f"**{100 * mean:.1f}**" if mean == least[count] else f"{100 * mean:.1f}")
        yield f"| {name} | {' | '.join(cells)} |"


def draw(path, laws):
    """Errors over numbers of samples, a panel a law: by law and method pairs of both, errors in per cent."""
    figure = Figure(figsize=(5 * len(laws), 4.6), layout="constrained")
    for ax, (name, errors) in zip(figure.subplots(1, len(laws), squeeze=False)[0], laws.items()):
        plot.lines(
            errors, log="xy", xlabel="training samples", ylabel="relative test error, %", legend=False, ax=ax
        ).set_title(name)  # fmt: skip
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    plot.save(path, figure)


def main(short=False):
    """Returns by which factor symmetries and derivatives together lower the error, for the least number of samples."""
    sizes, tests, iterations = ((25,), 10, 4) if short else (SIZES, TESTS, ITERATIONS)
    five_seeds = () if short else (AT,)
    results, lines, all_found = [], [], {}
    for make in (heat_in_a_gear,) if short else (heat_in_a_gear, waves_on_a_sphere):
        law = make(sizes[-1], tests)
        found, counts = curves(law, sizes, five_seeds, iterations)
        all_found[law.name] = found
        lines += ["", *table(law, found, sizes)]
        shown = AT if not short else sizes[0]
        results += [
            comparison.Result(name, *found[name, shown], counts.get(name), law.name) for name, count in found if count == shown
        ]
    experiment = comparison.Experiment(
        problem="Few samples: what symmetries and derivatives of the map are worth",
        domain="The gear and the sphere of the sections above.",
        law="Those of the sections above, with one random direction and derivative for each sample.",
        samples=f"25 to 1,000 for training, {TESTS} for tests. Five seeds with {AT} samples, one seed with other numbers.",
        results=results,
        lines=lines[1:],
        measure=f"relative error in L2 with {AT} samples",
    )
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    laws = {}
    for law, found in all_found.items():
        for (name, count), (errors, _) in found.items():
            laws.setdefault(law, {}).setdefault(name, []).append((count, 100 * np.mean(errors)))
    draw(output / f"{NAME}.png", laws)
    if fd.COMM_WORLD.rank == 0:
        text = "\n".join([experiment.table(), *lines])
        print(text)
        (output / f"{NAME}.txt").write_text(text + "\n")
        if not short:
            experiment.write(NAME)
    factors = [
        np.mean(found["free kernels", sizes[0]][0]) / np.mean(found["symmetric kernels, derivatives", sizes[0]][0])
        for found in all_found.values()
    ]
    # Both together: always better.
    assert min(factors) > (1 if short else 1.3)
    return min(factors)


if __name__ == "__main__":
    logging.getLogger("fem_resnet").setLevel(logging.ERROR)  # of iterations that end at their limit
    main(SHORT)
