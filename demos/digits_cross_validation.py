"""Cross-validation for digits_on_a_disk.py: which rank, depth, Tikhonov weight, scale and number of copies.

Three folds of the training part (1,257 pictures; the 540 test pictures are not touched). One setting is varied at a
time around a start, the best one kept, and so on; a second search starts from what the first one suggests. The table
goes to digits_cross_validation.txt, beside this file. Run (about an hour on one core)

    containers/run python demos/digits_cross_validation.py
"""

import logging
from pathlib import Path

import numpy as np
from digits_on_a_disk import accuracy, digits, label_space, learn, look, with_copies
from firedrake import COMM_WORLD
from sklearn.model_selection import StratifiedKFold

from fem_resnet import laplace_basis

FIRST = {"rank": 55, "layers": 4, "final_time": 1.0, "weight": 1e-3, "scale": 4.0, "copies": 0, "iterations": 120}
#: With copies there is more to learn from: more eigenfunctions, less regularisation.
SECOND = FIRST | {"rank": 78, "weight": 3e-4, "scale": 8.0, "copies": 3}
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
]


def validate(Y, pictures, labels, *, rank, scale, copies, **settings):
    """Mean accuracy on the folds left out."""
    basis = laplace_basis(Y, rank)
    scores = []
    for kept, left_out in StratifiedKFold(3, shuffle=True, random_state=1).split(pictures, labels):
        x, y, angles, shifts = with_copies(pictures[kept], labels[kept], copies)
        net, head, _ = learn(basis, Y.batch(scale * look(x, Y.coordinates, angles, shifts)), y, **settings)
        held = Y.batch(scale * look(pictures[left_out], Y.coordinates))
        scores.append(accuracy(net, head, held, labels[left_out])[0])
    return float(np.mean(scores))


def main():
    """Returns the settings that were chosen."""
    logging.getLogger("fem_resnet").setLevel(logging.ERROR)
    pictures, labels, _, _ = digits()
    Y = label_space()
    lines = []

    def say(line):
        lines.append(line)
        if COMM_WORLD.rank == 0:
            print(line, flush=True)
            Path(__file__).with_suffix(".txt").write_text("\n".join(lines) + "\n")

    def score(settings):
        value = validate(Y, pictures, labels, **settings)
        say("  ".join(f"{name} {entry:g}" for name, entry in settings.items()) + f"  accuracy {value:.4f}")
        return value

    for start, search in SEARCHES:
        best, best_score = start, score(start)
        for name, values in search:
            for settings in [best | {name: value} for value in values]:
                value = score(settings)
                if value > best_score:
                    best, best_score = settings, value
        say("chosen: " + "  ".join(f"{name} {entry:g}" for name, entry in best.items()))
    return best


if __name__ == "__main__":
    main()
