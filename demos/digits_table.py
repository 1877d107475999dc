"""Digits over five splits
=======================

The README's table of digits: five splits, networks with and without symmetries, and two other classifiers at equal data.

A split sets 540 of the 1,797 pictures aside for testing. On the others and their turned and shifted copies the network
of digits_on_a_disk.py is trained, with four channels, with two, and without layers; the dense network, one channel without
symmetries, by L-BFGS (digits_cross_validation.py); scikit-learn's multilayer perceptron and support vector machine (radial
basis functions, its own settings) see the same pictures and copies; then they see no copies. The networks' settings were
chosen on the training part of split 0, so only split 0's test pictures took no part in any choice. Run

    containers/run python demos/digits_table.py            (about twenty minutes; --short for two splits in some seconds)

It writes a figure and the table to demos/output/; that of the full run is demos/digits_table.txt, at the end of this page.
"""

import logging
import time
from pathlib import Path

import digits_cross_validation as dense
import numpy as np
from digits_on_a_disk import (
    CHANNELS,
    COPIES,
    EPOCHS,
    LAYERS,
    PERCEPTRON,
    RANK,
    accuracy,
    batch,
    digits,
    label_domain,
    lay,
    learn,
    on_pixels,
    with_copies,
)  # fmt: skip
from firedrake import COMM_WORLD
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC

from fem_resnet import laplace_basis, plot

# %% What is compared
# Networks and classifiers have the settings of the two other demos, whose functions are used here.

NETWORKS = {
    f"network, {CHANNELS} channels": dict(channels=CHANNELS, layers=LAYERS),
    "network, 2 channels": dict(channels=2, layers=LAYERS),
    "network, no layers": dict(channels=1, layers=0),
}
CLASSIFIERS = {"MLP": lambda: MLPClassifier(**PERCEPTRON), "support vector machine": SVC}


def networks(augmented, test_x, test_y, short):
    """Name and test accuracy of each network whose kernels commute with rotations; collective."""
    pictures, labels, *moves = augmented
    for name, settings in NETWORKS.items():
        Y = label_domain(settings["channels"], degree=6 if short else 10)
        inputs, test_inputs = batch(Y, pictures, *moves), batch(Y, test_x)
        rank, epochs = (21, 10) if short else (RANK, EPOCHS)
        net, head, parameters, _ = learn(Y, inputs, labels, rank=rank, layers=settings["layers"], epochs=epochs)
        yield f"{name} ({parameters:,} parameters)", accuracy(net, head, test_inputs, test_y)[0]


def dense_network(augmented, test_x, test_y, short):
    """The same for the dense network; collective."""
    pictures, labels, *moves = augmented
    Y = dense.label_space(refinement=2 if short else 3)

    def laid_out(pictures, *moves):
        return lay(Y, dense.SCALE * pictures, *moves)

    settings = dict(layers=dense.LAYERS, final_time=dense.FINAL_TIME, weight=dense.TIKHONOV)
    net, head, _ = dense.learn_dense(
        laplace_basis(Y, 21 if short else dense.RANK), laid_out(pictures, *moves), labels,
        iterations=15 if short else dense.ITERATIONS, **settings,
    )  # fmt: skip
    parameters = sum(parameter.dim for parameter in [*net.parameters, *head.parameters])
    yield f"dense network, 1 channel ({parameters:,} parameters)", accuracy(net, head, laid_out(test_x), test_y)[0]


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


# %% The figure


def draw(path, accuracies):
    """Test accuracies in per cent by name: a dot a split, a line their mean."""
    ax = plot.comparison(accuracies, marked=[name for name in accuracies if "network" in name], xlabel="test accuracy, %")
    ax.set_title("five splits; networks are ours" if len(next(iter(accuracies.values()))) == 5 else "", fontsize="medium")
    ax.figure.set_size_inches(7, 3.6)
    plot.save(path, ax)


# %% All together


def on_split(split, short=False):
    """Name, test accuracy and CPU seconds of all that is compared, on one split; collective."""
    train_x, train_y, test_x, test_y = digits(split)
    augmented, plain = (with_copies(train_x, train_y, number) for number in (0 if short else COPIES, 0))
    start = time.process_time()
    for source in (
        networks(augmented, test_x, test_y, short),
        dense_network(augmented, test_x, test_y, short),
        classifiers(COMM_WORLD, augmented, plain, test_x, test_y),
    ):
        for name, score in source:
            seconds, start = time.process_time() - start, time.process_time()
            if COMM_WORLD.rank == 0:
                print(f"split {split}  {name}  {score:.4f}  {seconds:.0f} s", flush=True)
            yield name, score, seconds


def main(short=False):
    """Returns the accuracies and times by name."""
    comm = COMM_WORLD
    results = {}
    for split in range(2 if short else 5):
        for name, score, seconds in on_split(split, short):
            results.setdefault(name, []).append((score, seconds))
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    draw(output / "digits_table.png", {name: [100 * score for score, _ in rows] for name, rows in results.items()})
    if comm.rank == 0:
        lines = table(results)
        print("\n".join(lines))
        (output / "digits_table.txt").write_text("\n".join(lines) + "\n")
    return results


if __name__ == "__main__":
    logging.getLogger("fem_resnet").setLevel(logging.ERROR)
    main(dense.SHORT)
