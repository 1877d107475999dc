r"""The choice of lambda
====================

Noisy outputs of a network on an annulus, and other networks that learn from them with lambda R of (2.11) for many lambdas.
Without R they learn the noise; with too much of it, nothing. Three rules choose lambda from the noisy samples alone:
cross-validation, the discrepancy principle and the L-curve. Samples without noise, which no rule sees, tell how good the
choice is. Run

    containers/run python demos/choice_of_lambda.py           (about a minute; --short for 15 s)
    containers/run mpiexec -n 2 python -m mpi4py demos/choice_of_lambda.py
"""

import logging
import sys
from pathlib import Path

SHORT = "--short" in sys.argv
sys.argv = [argument for argument in sys.argv if argument != "--short"]  # PETSc would take it for an option of its own

import firedrake as fd
import numpy as np
from matplotlib.figure import Figure

from fem_resnet import (
    Batch,
    LabelSpace,
    LearningProblem,
    ResidualNetwork,
    choose_lambda,
    laplace_basis,
    least_squares,
    plot,
    tikhonov,
    train,
)  # fmt: skip

OUTPUT = Path(__file__).parent / "output"

# %% The data
# Inputs are random functions in the span of a few Laplace eigenfunctions, outputs what a random network makes of them. The
# noise has the same size in twice as many functions, so half of it is out of reach.

RANK = 7
LAYERS = 1
SAMPLES, TESTED = 16, 200
DEVIATION = 0.15


def teacher(phi):
    """A network with random coefficients."""
    net, random = ResidualNetwork(phi, bias=phi, layers=LAYERS, final_time=1.0), np.random.default_rng(7)
    for k in range(LAYERS):
        net.kernel.set(k, random.normal(size=(RANK, RANK)) / RANK**0.5)
        net.bias.set(k, random.normal(size=RANK) / RANK**0.5)
    return net


def data(phi, samples, seed, deviation=0.0):
    """Samples, and the misfit that their noise makes: half its mean square."""
    random = np.random.default_rng(seed)
    inputs = phi.Y.batch(phi.values @ random.normal(size=(RANK, samples)))
    many = laplace_basis(phi.Y, 2 * RANK + 1)
    noise = random.normal(scale=deviation, size=(many.rank, samples))
    outputs = phi.Y.values(teacher(phi)(inputs)) + many.values @ noise
    return Batch(inputs, phi.Y.batch(outputs)), 0.5 * np.mean((noise**2).sum(axis=0))


# %% The problem
# R is half the square of all norms. Each lambda goes on from where the one before has ended.


def problem(phi, batch):
    """From zero parameters; `choose_lambda` multiplies the regulariser."""
    net = ResidualNetwork(phi, bias=phi, layers=LAYERS, final_time=1.0)
    return LearningProblem(net, None, least_squares, tikhonov(1.0), batch)


def learn(regularised):
    """L-BFGS, close to the minimum."""
    return train(regularised, {"tao_max_it": 40 if SHORT else 200, "tao_gttol": 1e-4}, monitor=lambda progress: None)


def test_errors(phi, result):
    """The misfit on samples without noise, for each lambda."""
    net, errors = result.problem.net, []
    tested = LearningProblem(net, None, least_squares, None, data(phi, TESTED, seed=1)[0])
    for trained in result.results:
        for function, coefficients in zip([(p, k) for p in net.parameters for k in range(LAYERS)], trained.controls):
            function[0].set(function[1], coefficients)
        errors.append(float(tested.evaluate()[0]))
    return np.array(errors)


# %% The picture


def draw(results, errors, noise):
    """Misfits over lambda, and the L-curve, with the three choices."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    crossed, searched, curved = results.values()
    lambdas, deviations = crossed.weights, crossed.errors.std(axis=1) / crossed.errors.shape[1] ** 0.5
    misfits = {
        "held out, mean of folds": np.stack([lambdas, crossed.scores, deviations], axis=1),
        "samples without noise": np.stack([lambdas, errors], axis=1),
        "samples trained": np.stack([searched.weights, searched.misfits], axis=1),
    }
    noises = {"misfit of the noise": [(lambdas.min(), noise), (lambdas.max(), noise)]}
    plot.lines(misfits, reference=noises, log="xy", xlabel=r"$\lambda$", ylabel="misfit", ax=left)
    chosen = {
        rf"{rule}: $\lambda$ = {result.chosen:.2g}": [
            (misfit, penalty)
            for weight, misfit, penalty in zip(result.weights, result.misfits, result.penalties)
            if weight == result.chosen
        ]
        for rule, result in results.items()
    }
    curve = {"all lambdas": np.stack([curved.misfits, curved.penalties], axis=1)}
    plot.lines(curve, points=chosen, log="xy", xlabel="misfit of the samples trained", ylabel="R", ax=right)
    left.set_title("misfits; bars are errors of the mean")
    right.set_title("the L-curve, and what three rules choose")
    OUTPUT.mkdir(exist_ok=True)
    plot.save(OUTPUT / "choice_of_lambda.png", figure)


# %% All together


def main(short=False):
    """Prints what each rule chooses, and how good that is."""

    def say(text):
        if fd.COMM_WORLD.rank == 0:
            print(text, flush=True)

    phi = laplace_basis(LabelSpace(fd.FunctionSpace(fd.AnnulusMesh(1, 0.4, 3, 12), "CG", 1)), RANK)
    batch, noise = data(phi, SAMPLES, seed=0, deviation=DEVIATION)
    lambdas = np.geomspace(10, 1e-3, 5 if short else 13)
    results = {
        "cross validation": choose_lambda(problem(phi, batch), lambdas, learn, folds=3 if short else 4),
        "discrepancy": choose_lambda(problem(phi, batch), lambdas, learn, rule="discrepancy", noise=noise),
        "l-curve": choose_lambda(problem(phi, batch), lambdas, learn, rule="l-curve"),
    }
    errors = {rule: test_errors(phi, result) for rule, result in results.items()}
    of_all = errors["cross validation"]
    say(f"{phi.Y.size} nodes, {LAYERS} layers, rank {RANK}, {SAMPLES} samples; noise has the misfit {noise:.4f}\n")
    say(f"{'lambda':>9s}{'misfit':>10s}{'R':>10s}{'held out':>10s}{'without noise':>15s}{'iterations':>12s}")
    crossed = results["cross validation"]
    for k, weight in enumerate(crossed.weights):
        say(
            f"{weight:9.2e}{crossed.misfits[k]:10.4f}{crossed.penalties[k]:10.4f}{crossed.scores[k]:10.4f}{of_all[k]:15.4f}"
            f"{crossed.results[k].iterations:12d}"
        )
    say(f"\n{'rule':20s}{'lambda':>9s}{'misfit':>10s}{'without noise':>15s}")
    found = {}
    for rule, result in results.items():
        k = list(result.weights).index(result.chosen)
        found[rule] = result.misfits[k], errors[rule][k]
        say(f"{rule:20s}{result.chosen:9.2e}{found[rule][0]:10.4f}{found[rule][1]:15.4f}")
    draw(results, of_all, noise)

    # What this page claims: each choice is better than no regularisation and a strong one; the noise is found again.
    assert all(error < 0.8 * min(of_all[0], of_all[-1]) for _, error in found.values())
    assert abs(found["discrepancy"][0] / noise - 1) < 0.011
    assert found["cross validation"][1] < 1.3 * min(of_all)


if __name__ == "__main__":
    logging.getLogger("fem_resnet").setLevel(logging.WARNING)
    main(SHORT)
