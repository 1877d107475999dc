"""How the settings of the dense network were chosen
=================================================

Cross-validation for the dense network of digits_table.py, one channel without symmetries, trained by L-BFGS: which rank,
depth, Tikhonov weight, scale and number of copies. The network of digits_on_a_disk.py was not chosen here.

Three folds of the training part (1,257 pictures; the 540 test pictures are not touched). One setting is varied at a
time around a start, the best one kept, and so on; each further search starts from what the ones before suggest. Run

    containers/run python demos/digits_cross_validation.py     (an hour and a half on one core; --short for some seconds)

``--search=3`` runs the third search alone. Its lines and a figure go to demos/output/; those of the full run are on this page.
"""

import logging
import sys
from pathlib import Path

SHORT = "--short" in sys.argv
CHOSEN = [argument for argument in sys.argv if argument.startswith("--search=")]
# PETSc would take them for options of its own.
sys.argv = [argument for argument in sys.argv if argument not in ("--short", *CHOSEN)]

import firedrake as fd
import numpy as np
from digits_on_a_disk import PERCEPTRON, accuracy, digits, lay, on_pixels, with_copies
from matplotlib.figure import Figure
from sklearn.model_selection import StratifiedKFold
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC

from fem_resnet import (
    Batch,
    Head,
    LabelSpace,
    LearningProblem,
    ResidualNetwork,
    cross_entropy,
    laplace_basis,
    plot,
    tikhonov,
    train,
)  # fmt: skip

# %% The dense network
# Each function of phi is coupled with each. f_t is at most 1 in size under tanh, so FINAL_TIME says how far the layers can
# move a picture, whose grey values reach SCALE: after T = 1 the head still sees little but the picture, T = 4 reads better.

RANK = 78
LAYERS = 4
FINAL_TIME = 4.0
TIKHONOV = 3e-4
SCALE = 8.0
ITERATIONS = 120


def label_space(refinement=3):
    """Continuous, piecewise linear functions on a mesh of the unit disk."""
    return LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(refinement), "CG", 1))


def learn_dense(basis, inputs, labels, *, layers, final_time, weight, iterations):
    """Train a network and its head on a batch by L-BFGS; returns both and the result of TAO."""
    net = ResidualNetwork(basis, bias=basis, layers=layers, final_time=final_time, activation="tanh")
    head = Head(basis, onto=10)
    problem = LearningProblem(net, head, cross_entropy, tikhonov(weight), Batch(inputs, labels))
    return net, head, train(problem, {"tao_max_it": iterations})


# %% The searches
# Where each starts, and what it varies, in order.

FIRST = {"rank": 55, "layers": 4, "final_time": 1.0, "weight": 1e-3, "scale": 4.0, "copies": 0, "iterations": 120}
#: With copies there is more to learn from: more eigenfunctions, less regularisation.
SECOND = FIRST | {"rank": 78, "weight": 3e-4, "scale": 8.0, "copies": 3}
#: f_t is at most 1 in size: a longer time lets the layers do more to pictures of this scale. This start was picked
#: after some 15 trials on the same folds, in single precision outside this package, of final times 1 to 16, weights,
#: scales, depths, more modes for the kernel in y and for the head, and relu; T = 4 was the best of them.
THIRD = SECOND | {"final_time": 4.0}
SEARCHES = [
    (
        FIRST,
        [
            ("rank", [36, 78]),
            ("scale", [2.0, 8.0]),
            ("weight", [3e-4, 3e-3]),
            ("layers", [0, 1, 8]),
            ("final_time", [0.5, 2.0]),
            ("copies", [3]),
            ("weight", [3e-4, 3e-3]),
        ],
    ),
    (SECOND, [("weight", [1e-3]), ("copies", [0]), ("rank", [36]), ("layers", [0, 1])]),
    (THIRD, [("layers", [1, 2]), ("final_time", [8.0]), ("weight", [1e-3])]),
]
#: For comparison at the end of the table, on the same folds, with the copies of the third search's start.
OTHERS = {"MLP": lambda: MLPClassifier(**PERCEPTRON), "support vector machine": SVC}


# %% Accuracy on what is left out


def folds(pictures, labels):
    """Pictures and labels to learn from, then pictures and labels left out, three times."""
    for kept, left_out in StratifiedKFold(3, shuffle=True, random_state=1).split(pictures, labels):
        yield pictures[kept], labels[kept], pictures[left_out], labels[left_out]


def validate(Y, pictures, labels, *, rank, scale, copies, **settings):
    """Mean accuracy on the folds left out."""
    basis = laplace_basis(Y, rank)
    scores = []
    for x, y, held_x, held_y in folds(pictures, labels):
        x, y, angles, shifts = with_copies(x, y, copies)
        net, head, _ = learn_dense(basis, lay(Y, scale * x, angles, shifts), y, **settings)
        scores.append(accuracy(net, head, lay(Y, scale * held_x), held_y)[0])
    return float(np.mean(scores))


# %% One search


def search(Y, pictures, labels, start, steps, say):
    """The best settings found from a start."""

    def score(settings):
        value = validate(Y, pictures, labels, **settings)
        say("  ".join(f"{name} {entry:g}" for name, entry in settings.items()) + f"  accuracy {value:.4f}")
        return value

    best, best_score = start, score(start)
    for name, values in steps:
        for settings in [best | {name: value} for value in values]:
            value = score(settings)
            if value > best_score:
                best, best_score = settings, value
    say("chosen: " + "  ".join(f"{name} {entry:g}" for name, entry in best.items()))
    return best


# %% The figure


def draw(path, accuracies):
    """Accuracies of all settings in the order of the searches, and the best so far."""
    numbers = np.arange(1, len(accuracies) + 1)
    best = np.maximum.accumulate(accuracies)
    steps = np.repeat(np.stack([numbers, best], axis=1), 2, axis=0)[1:]
    steps[1::2, 1] = steps[:-1:2, 1]  # it stays until the next setting
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    plot.lines(
        {}, points={"a setting": np.stack([numbers, accuracies], axis=1)}, reference={"best so far": steps},
        xlabel="setting, in the order of the searches", ylabel="accuracy in cross-validation", ax=figure.subplots(),
    )  # fmt: skip
    plot.save(path, figure)


# %% All together


def shortened(start, steps):
    """The start of a search and its first step, on few functions and iterations."""
    small = {"rank": 10, "iterations": 10}
    return start | small, [(name, [value for value in values if name not in small]) for name, values in steps[1:2]]


def main(chosen=None, short=False):
    """Returns the settings that were chosen, by all searches or by one, whose number counts from 1."""
    logging.getLogger("fem_resnet").setLevel(logging.ERROR)
    pictures, labels, _, _ = digits()
    Y = label_space(2 if short else 3)
    if short:
        pictures, labels = pictures[:300], labels[:300]
    output, lines = Path(__file__).parent / "output", []
    output.mkdir(exist_ok=True)

    def say(line):
        lines.append(line)
        if fd.COMM_WORLD.rank == 0:
            print(line, flush=True)
            (output / "digits_cross_validation.txt").write_text("\n".join(lines) + "\n")

    searches = SEARCHES[chosen - 1 : chosen] if chosen else SEARCHES
    for start, steps in [shortened(*searches[0])] if short else searches:
        best = search(Y, pictures, labels, start, steps, say)
    tried = [float(line.split()[-1]) for line in lines if "accuracy" in line]
    draw(output / "digits_cross_validation.png", tried)
    if chosen in (None, len(SEARCHES)) and fd.COMM_WORLD.rank == 0 and not short:
        for name, classifier in OTHERS.items():
            scores = [
                on_pixels(classifier(), *with_copies(x, y, THIRD["copies"]), held_x, held_y)
                for x, y, held_x, held_y in folds(pictures, labels)
            ]
            say(f"{name}  copies {THIRD['copies']}  accuracy {np.mean(scores):.4f}")
    return best


if __name__ == "__main__":
    main(int(CHOSEN[0].partition("=")[2]) if CHOSEN else None, SHORT)
