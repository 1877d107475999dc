r"""Four ways to train
==================

One learning problem, the same on an annulus and on a sphere, and four ways to solve it: L-BFGS in function space on
J_mod (4.6), proximal alternating minimisation (Algorithm 1), L-BFGS with projections in a box of controls, and the method
of successive approximations (Algorithm 2) in the same box, as printed and with an augmented Hamiltonian. Beside them stand
what deep learning would take: gradient descent and Adam, on the same exact derivatives. Run

    containers/run python demos/four_ways_to_train.py           (about two minutes; --short for 20 s)
    containers/run mpiexec -n 2 python -m mpi4py demos/four_ways_to_train.py
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

from fem_resnet import (
    Batch,
    Box,
    LabelSpace,
    LearningProblem,
    ResidualNetwork,
    RowBox,
    cell_indicators,
    least_squares,
    msa,
    plot,
    pmp_residual,
    tikhonov,
    train,
    train_pam,
)  # fmt: skip

OUTPUT = Path(__file__).parent / "output"

# %% The problem
# Functions on the label domain are to be carried to what a nonlinear integral operator makes of them. The kernel is
# expanded in the indicators of the cells and the bias has a value in each, so that a box of coefficients is a box of
# controls (a, b), where the maximum principle can be asked about. Half the samples are for training.

LAYERS, FINAL_TIME = 4, 2.0
BIAS, KERNEL = (-0.2, 0.2), (-0.3, 0.3)
TIKHONOV = 1e-3
SAMPLES = 8
DOMAINS = {
    "annulus": lambda: fd.AnnulusMesh(1, 0.5, 2, 12),
    "sphere": lambda: fd.UnitIcosahedralSphereMesh(0),
}


def data(Y):
    """Inputs and targets of all samples, the same on any number of ranks: shape (cells, samples)."""
    random = np.random.default_rng(0)
    x, dimension = Y.coordinates, Y.coordinates.shape[1]
    f = np.cos(x @ random.normal(scale=1.5, size=(dimension, 2 * SAMPLES)) + random.uniform(0, 6, 2 * SAMPLES))
    moments = np.column_stack([np.ones(Y.nodes), x])
    return f, np.tanh(moments @ Y.sum((Y.weights[:, None] * moments).T @ f)) + 0.5 * f


def learning_problem(Y, regularised, kind=LearningProblem, test=False):
    """From zero controls; with Tikhonov's term or without."""
    net = ResidualNetwork(cell_indicators(Y), layers=LAYERS, final_time=FINAL_TIME)
    f, C = (part[:, SAMPLES:] if test else part[:, :SAMPLES] for part in data(Y))
    return kind(net, None, least_squares, tikhonov(TIKHONOV) if regularised else None, Batch(Y.batch(f), Y.batch(C)))


# %% Counting
# Every evaluation of J is counted, those of line searches too, with the least value so far and the time.


class Counted(LearningProblem):
    """Notes (evaluations, seconds, least J so far) whenever J is evaluated."""

    def record(self, **options):
        """As the package's, but that the functional notes its values."""
        J, run = super().record(**options)
        self._tape = J.tape
        if not hasattr(self, "_seen"):  # some algorithms record more than once
            self._start, self._seen = time.perf_counter(), [(1, 0.0, float(J.functional))]
        J.eval_cb_post = lambda value, controls: self.note(float(value))
        return J, run

    def note(self, value):
        """One more evaluation."""
        count, _, least = self._seen[-1]
        self._seen.append((count + 1, time.perf_counter() - self._start, min(value, least)))

    @property
    def seen(self):
        """What was noted."""
        return self._seen

    @property
    def tape(self):
        """That of the last recording."""
        return self._tape


# %% What deep learning takes
# Plain partial derivatives, as numbers: gradient descent and Adam, each with the best of three step lengths, of which only
# that one is counted.


def descend(problem, iterations, length, adam):
    """Gradient descent or Adam with a fixed step length."""
    J = problem.reduced_functional()
    first, second = ([np.zeros(f.dat.data_ro.shape) for f in problem.functions] for _ in range(2))
    for k in range(1, iterations + 1):
        derivative = [np.array(d.dat.data_ro) for d in J.derivative()]
        for function, d, m, v in zip(problem.functions, derivative, first, second):
            if adam:
                m[...] = 0.9 * m + 0.1 * d
                v[...] = 0.999 * v + 0.001 * d**2
                d = m / (1 - 0.9**k) / (np.sqrt(v / (1 - 0.999**k)) + 1e-8)
            function.dat.data_wo[...] -= length * d
        J(problem.functions)
    return problem


def best_of(Y, iterations, lengths, adam):
    """The run with the least J at its end."""
    runs = [descend(learning_problem(Y, False, Counted), iterations, length, adam) for length in lengths]
    return min(runs, key=lambda run: run.seen[-1][2])


# %% The four ways


def solve(Y, iterations):
    """Name, solved problem and history of each way."""
    quiet = {"monitor": lambda progress: None}
    stop = {"tao_max_it": iterations, "tao_gatol": 1e-8, "tao_grtol": 0.0, "tao_gttol": 0.0}
    rows = RowBox(cell_indicators(Y), BIAS, KERNEL)
    ways = []

    problem = learning_problem(Y, True, Counted)
    train(problem, stop, **quiet)
    ways.append(("L-BFGS on J_mod", problem, problem.seen))

    problem, history = learning_problem(Y, True, Counted), []

    def note(progress):
        history.append((1 + problem.tape.recompute_count, progress.seconds, progress.value))

    result = train_pam(problem, step=10.0, iterations=iterations // 4, monitor=note)
    assert (result.slacks >= -1e-12 * abs(result.values[0])).all(), "the inequality below (5.1)"
    ways.append(("PAM on J_mod", problem, history))

    problem = learning_problem(Y, False, Counted)
    train(problem, stop, bounds={"bias": BIAS, "kernel": KERNEL}, **quiet)
    ways.append(("L-BFGS in the box", problem, problem.seen))

    for variant in ("basic", "extended"):
        history = []

        def note(progress, history=history):
            history.append((progress.evaluations, progress.seconds, progress.value))

        result = msa(learning_problem(Y, False), rows, variant=variant, iterations=iterations // 4, monitor=note)
        if variant == "extended":
            assert (result.changes < 0).all(), "extended MSA falls at every iteration"
        ways.append((f"MSA, {variant}", result.problem, [(1, 0.0, result.values[0]), *history]))

    for name, lengths, adam in (("gradient descent", (1.0, 4.0, 16.0), False), ("Adam", (0.003, 0.01, 0.03), True)):
        problem = best_of(Y, iterations, lengths, adam)
        ways.append((name, problem, problem.seen))
    return ways


# %% What each has found
# J without Tikhonov's term, how far the controls are from the maximum principle (where they lie in the box), the norm of
# the gradient of J in function space, and the error on samples that were not trained on.


def judged(Y, problem):
    """J, the PMP residual or None where controls lie outside of the box, norm of the gradient, test error."""
    net = problem.net
    plain = LearningProblem(net, None, least_squares, None, problem.batch)
    J = plain.reduced_functional()
    gradient = J.derivative(apply_riesz=True)
    owners = [(p, k) for p in plain.parameters for k in range(len(p.functions))]
    values = [p.space_bases[k].read(g) for (p, k), g in zip(owners, gradient)]
    norm = np.sqrt(sum(p.inner(k, v, v) for (p, k), v in zip(owners, values)))
    found = pmp_residual(plain, Box(BIAS, KERNEL)) if _inside(problem) else None
    test = learning_problem(Y, False, test=True)
    error = float(LearningProblem(net, None, least_squares, None, test.batch).evaluate()[0])
    size = float(Y.sum(Y.weights @ Y.values(test.batch.targets) ** 2).sum()) / (2 * SAMPLES)
    return float(J.functional), found, norm, np.sqrt(error / size)


def _inside(problem):
    net, inside = problem.net, True
    for l in range(net.layers):
        kernel = net.kernel.on_layer(l).kernel
        b = kernel.phi.values @ net.kernel.get(l) @ kernel.psi.values.T  # of this rank's cells: a small problem
        for part, (low, high) in ((net.bias.get(l), BIAS), (b, KERNEL)):
            inside &= bool((part >= low - 1e-10).all() and (part <= high + 1e-10).all())
    return all(net.Y.comm.allgather(inside))


def draw(histories):
    """J over evaluations and over time, one row of pictures a domain."""
    figure = Figure(figsize=(11, 4 * len(histories) + 0.8), layout="constrained")
    for (domain, ways), row in zip(histories.items(), figure.subplots(len(histories), 2, squeeze=False)):
        seen = {name: np.maximum(history, [1, 1e-3, 0]) for name, _, history in ways}
        for ax, column, xlabel in zip(row, (0, 1), ("evaluations of J", "seconds")):
            plot.lines(
                {name: each[:, [column, 2]] for name, each in seen.items()}, log="xy", xlabel=xlabel, ylabel="J", legend=False,
                ax=ax,
            ).set_title(domain)  # fmt: skip
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    OUTPUT.mkdir(exist_ok=True)
    plot.save(OUTPUT / "four_ways_to_train.png", figure)


# %% All together


def main(short=False):
    """Prints the table of each domain, and returns J of all ways by domain."""

    def say(text):
        if fd.COMM_WORLD.rank == 0:
            print(text, flush=True)

    histories, J = {}, {}
    for domain in list(DOMAINS)[: 1 if short else None]:
        Y = LabelSpace(fd.FunctionSpace(DOMAINS[domain](), "DG", 0))
        histories[domain] = solve(Y, 12 if short else 120)
        say(f"\n{domain}, {Y.size} cells, {LAYERS} layers, {SAMPLES} samples")
        say(
            f"{'':20s}{'J':>11s}{'in box':>8s}{'PMP residual':>22s}{'|DJ|':>10s}{'test error':>12s}"
            f"{'evaluations':>13s}{'s':>7s}"
        )
        J[domain] = {}
        for name, problem, history in histories[domain]:
            value, found, norm, error = judged(Y, problem)
            inside = found is not None
            bracket = f"{found.lower:.2e} .. {found.upper:.2e}" if inside else "-"
            say(
                f"{name:20s}{value:11.3e}{'yes' if inside else 'no':>8s}{bracket:>22s}{norm:10.1e}{error:12.3f}"
                f"{history[-1][0]:13d}{history[-1][1]:7.1f}"
            )
            J[domain][name] = value
    draw(histories)

    # What this page claims: function space is ahead of plain numbers, and the augmented Hamiltonian of the printed one.
    assert all(values["L-BFGS in the box"] < values["gradient descent"] for values in J.values())
    assert all(values["MSA, extended"] < values["MSA, basic"] for values in J.values())
    return J


if __name__ == "__main__":
    logging.getLogger("fem_resnet").setLevel(logging.WARNING)
    main(SHORT)
