"""Digits over five splits
=======================

The README's table of digits: five splits, three depths and two other classifiers at equal data.

A split sets 540 of the 1,797 pictures aside for testing. On the others and their turned and shifted copies the network
of digits_on_a_disk.py is trained with 0, 1 and 4 layers, and scikit-learn's multilayer perceptron and support vector
machine (radial basis functions, its own settings) see the same pictures and copies; then they see no copies. The
network's settings were chosen on the training part of split 0 (digits_cross_validation.py), so only split 0's test
pictures took no part in any choice. The table goes to digits_table.txt, beside this file. Run (about twenty minutes)

    containers/run python demos/digits_table.py            (--short: two splits in seconds, nothing written)
"""

import logging
import time
from pathlib import Path

import numpy as np
from digits_on_a_disk import (
    COPIES,
    FINAL_TIME,
    ITERATIONS,
    PERCEPTRON,
    RANK,
    SCALE,
    SHORT,
    TIKHONOV,
    accuracy,
    digits,
    label_space,
    learn,
    look,
    on_pixels,
    with_copies,
)  # fmt: skip
from firedrake import COMM_WORLD
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC

from fem_resnet import laplace_basis

# %% What is compared
# Network and classifiers have the settings of digits_on_a_disk.py, whose functions are used here.

DEPTHS = [0, 1, 4]
CLASSIFIERS = {"MLP": lambda: MLPClassifier(**PERCEPTRON), "support vector machine": SVC}


def networks(basis, batch, augmented, test_x, test_y, iterations):
    """Name and test accuracy of the network of each depth; collective."""
    pictures, labels, angles, shifts = augmented
    inputs, test_inputs = batch(pictures, angles, shifts), batch(test_x)
    for layers in DEPTHS:
        settings = dict(layers=layers, final_time=FINAL_TIME, weight=TIKHONOV, iterations=iterations)
        net, head, _ = learn(basis, inputs, labels, **settings)
        parameters = sum(parameter.dim for parameter in [*net.parameters, *head.parameters])
        yield f"network, L = {layers} ({parameters:,} parameters)", accuracy(net, head, test_inputs, test_y)[0]


def classifiers(comm, augmented, plain, test_x, test_y):
    """Name and test accuracy of each classifier of scikit-learn, with copies and without; collective."""
    for data, suffix in ((augmented, ""), (plain, ", no copies")):
        for name, classifier in CLASSIFIERS.items():
            score = on_pixels(classifier(), *data, test_x, test_y) if comm.rank == 0 else None
            yield name + suffix, comm.bcast(score)


# %% The table


def table(results):
    """Markdown; `results` has a list of (test accuracy, seconds), one a split, by name. Deviations are of a sample."""
    splits = range(len(next(iter(results.values()))))
    lines = [
        "| test accuracy, % | " + " | ".join(f"split {k}" for k in splits) + " | mean | deviation | CPU seconds |",
        "|---|" + "---|" * (len(splits) + 3),
    ]
    for name, rows in results.items():
        scores, seconds = 100 * np.array(rows).T
        entries = [f"{score:.2f}" for score in scores] + [f"**{scores.mean():.2f}**", f"{scores.std(ddof=1):.2f}"]
        lines.append(f"| {name} | " + " | ".join(entries) + f" | {seconds.mean() / 100:.0f} |")
    return lines


# %% All together


def main(short=False):
    """Returns the accuracies and times by name."""
    comm = COMM_WORLD
    iterations, copies, splits = (15, 0, 2) if short else (ITERATIONS, COPIES, 5)
    Y = label_space(refinement=2 if short else 3)
    basis = laplace_basis(Y, 21 if short else RANK)
    results = {}

    def batch(pictures, *moves):
        return Y.batch(SCALE * look(pictures, Y.coordinates, *moves))

    for split in range(splits):
        train_x, train_y, test_x, test_y = digits(split)
        augmented, plain = (with_copies(train_x, train_y, number) for number in (copies, 0))
        start = time.process_time()
        for source in (
            networks(basis, batch, augmented, test_x, test_y, iterations),
            classifiers(comm, augmented, plain, test_x, test_y),
        ):
            for name, score in source:
                seconds, start = time.process_time() - start, time.process_time()
                results.setdefault(name, []).append((score, seconds))
                if comm.rank == 0:
                    print(f"split {split}  {name}  {score:.4f}  {seconds:.0f} s", flush=True)
    if comm.rank == 0:
        lines = table(results)
        print("\n".join(lines))
        if not short:
            Path(__file__).with_suffix(".txt").write_text("\n".join(lines) + "\n")
    return results


if __name__ == "__main__":
    logging.getLogger("fem_resnet").setLevel(logging.ERROR)
    main(SHORT)
