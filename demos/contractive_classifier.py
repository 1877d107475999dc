r"""A classifier that cannot be pushed apart
========================================

Two networks read hand-written digits on the unit disk Y. One is the plain one, the other the gradient flow of the end of
section 3.5,

    f_t = sigma(a - B f)              against              f_t = B^T sigma(a - B f),

in which for sigma' >= 0 no two solutions part: d/dt norm(f_1 - f_2)^2 / 2 = -(sigma(u_1) - sigma(u_2), u_1 - u_2) <= 0. So
whoever changes a picture by epsilon, in the norm of L2(Y), changes the final state by epsilon at most, and what the head reads
by no more than its weights say. How well do both read pictures with noise, and pictures that somebody who knows the
network has changed for the worse? Run

    containers/run python demos/contractive_classifier.py          (about three minutes; --short for some seconds)
    containers/run mpiexec -n 2 python -m mpi4py demos/contractive_classifier.py

It writes one figure to demos/output/.
"""

import logging
import sys
import time
from pathlib import Path

SHORT = "--short" in sys.argv
sys.argv = [argument for argument in sys.argv if argument != "--short"]  # PETSc would take it for an option of its own

import firedrake as fd
import numpy as np
from digits_cross_validation import SCALE, TIKHONOV, label_space
from digits_on_a_disk import accuracy, digits, lay
from matplotlib.figure import Figure

from fem_resnet import (
    Batch,
    Head,
    Kernel,
    LearningProblem,
    NormBounded,
    ResidualNetwork,
    circle_radius,
    cross_entropy,
    laplace_basis,
    lipschitz_bound,
    plot,
    tikhonov,
    train,
)  # fmt: skip

# %% Contractive by construction
# The discrete network contracts as well, if its steps are short: h <= 2 R / norm(B)^2 for sup sigma' = 1, R = 1 being the
# radius of Runge-Kutta 4. Here the kernel is made of free controls such that its norm never exceeds the bound that the
# step leaves it, norm(B) <= (2 R / h)^(1/2): whatever the training does, the network contracts.

LAYERS = 4
FINAL_TIME = 4.0
RANK = 45


def networks(basis):
    """Both networks by name."""
    common = dict(bias=basis, layers=LAYERS, final_time=FINAL_TIME, activation="tanh")
    plain = ResidualNetwork(basis, **common)
    bound = (2 * circle_radius(*plain.tableau) / (FINAL_TIME / LAYERS)) ** 0.5
    contractive = ResidualNetwork(Kernel(basis, among=NormBounded(bound)), gradient_flow=True, **common)
    random = np.random.default_rng(0)
    for k in range(LAYERS):  # at B = 0 the gradient flow stands still
        contractive.kernel.set(k, 0.1 * bound * random.normal(size=(basis.rank, basis.rank)) / basis.rank**0.5)
    return {"plain": plain, "contractive": contractive}


def learn(net, basis, inputs, labels, iterations):
    """The head, trained together with the network."""
    head = Head(basis, onto=10)
    train(LearningProblem(net, head, cross_entropy, tikhonov(TIKHONOV), Batch(inputs, labels)), {"tao_max_it": iterations})
    return head


# %% Who attacks
# Changes of pictures have norm epsilon in L2(Y), given in parts of the mean norm of a picture. Noise is Gaussian, in the span
# of the basis, so that the networks see all of it. The attack knows the network and follows the gradient of the loss in the
# initial state, which is the co-state r(0), for each picture by itself: steps of fixed length, back to the ball after each.


def norms(Y, values):
    """Norm of each sample in L2(Y), shape (samples,)."""
    return np.sqrt(Y.sum(Y.weights @ values**2))


def noise(basis, samples):
    """Samples of norm one."""
    values = basis.values @ np.random.default_rng(1).normal(size=(basis.rank, samples))
    return values / norms(basis.Y, values)


def attacked(net, head, clean, labels, size, steps):
    """Node values of pictures at a distance `size` or less from the clean ones, of as large a loss as was found."""
    Y = net.Y
    states = Y.batch(clean)
    J = LearningProblem(net, head, cross_entropy, None, Batch(states, labels), learn="initial").reduced_functional()
    moved = np.zeros_like(clean)
    for _ in range(steps):
        J([states])
        (gradient,) = J.derivative(apply_riesz=True)
        gradient = Y.values(gradient)
        length = norms(Y, gradient)
        moved = moved + 2.5 * size / steps * gradient / np.where(length > 0, length, 1.0)
        moved = moved * np.minimum(1.0, size / np.maximum(norms(Y, moved), 1e-300))
        states = Y.batch(clean + moved)
    return clean + moved


# %% What no attack can do
# With a bound of the Lipschitz constant from f_I to f(T), a picture is safe up to the distance at which the score of
# another digit could reach that of its own: margin / (bound x norm of the difference of their weights).


def safe_distances(net, head, inputs, labels):
    """Distance in L2(Y) up to which each picture is read right for sure, 0 where it is not; shape (samples,)."""
    scores, W = head.scores(net(inputs)), head.W.get(0)
    own = np.arange(len(labels))
    difference = W[labels][:, None] - W[None]  # (samples, classes, rank); O = W psi^T M f
    weight = np.sqrt(np.einsum("sci,ij,scj->sc", difference, head.psi.gram, difference))
    margin = scores[own, labels][:, None] - scores
    weight[own, labels], margin[own, labels] = 1.0, np.inf
    return np.maximum(0.0, (margin / weight).min(axis=1)) / lipschitz_bound(net).discrete


# %% The figure


def draw(path, sizes, found):
    """What is read right over the size of the change, a line a network and a panel a kind of change."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    titles = {"noise": "noise", "attack": "attack along the gradient", "certified": "right whatever the change"}
    for ax, (kind, title) in zip(figure.subplots(1, 3, sharey=True), titles.items()):
        curves = {name: np.stack([sizes, 100 * np.array(rows[kind])], axis=1) for name, rows in found.items()}
        plot.lines(
            curves, xlabel="size of the change / norm of a picture", ylabel="test pictures read right, %", legend=False, ax=ax
        ).set(title=title, ylim=(-3, 103))  # fmt: skip
        ax.label_outer()
        ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    plot.save(path, figure)


# %% All together


def main(short=False):
    """Returns what is read right, by network and kind of change."""
    comm, start = fd.COMM_WORLD, time.perf_counter()

    def say(text):
        if comm.rank == 0:
            print(text, flush=True)

    train_x, train_y, test_x, test_y = digits()
    sizes = [0.0, 0.05, 0.1] if short else [0.0, 0.02, 0.04, 0.06, 0.08, 0.12, 0.16]
    if short:
        test_x, test_y = test_x[:100], test_y[:100]
    Y = label_space(refinement=2 if short else 3)
    basis = laplace_basis(Y, 21 if short else RANK)
    inputs, clean = lay(Y, SCALE * train_x), Y.values(lay(Y, SCALE * test_x))
    unit = norms(Y, clean).mean()
    disturbance = noise(basis, clean.shape[1])
    found = {}
    for name, net in networks(basis).items():
        head = learn(net, basis, inputs, train_y, 30 if short else 100)
        bound, distances = lipschitz_bound(net), safe_distances(net, head, Y.batch(clean), test_y)
        say(f"{name}: {bound}")

        def read(values, net=net, head=head):
            return accuracy(net, head, Y.batch(values), test_y)[0]

        found[name] = {
            "noise": [read(clean + size * unit * disturbance) for size in sizes],
            "attack": [read(attacked(net, head, clean, test_y, size * unit, 5 if short else 15)) for size in sizes],
            "certified": [float(np.mean(distances > size * unit)) for size in sizes],
        }
        for kind, values in found[name].items():
            say(f"    {kind:>10}: " + "  ".join(f"{size:g}: {value:.3f}" for size, value in zip(sizes, values)))
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    draw(output / "contractive_classifier.png", sizes, found)
    say(f"time: {time.perf_counter() - start:.0f} s")
    # What this page claims: as good on clean pictures, better on attacked ones; no attack finds a picture that is safe.
    plain, contractive = found["plain"], found["contractive"]
    assert all(np.all(np.array(rows["certified"]) <= rows["attack"]) for rows in found.values())
    assert contractive["attack"][0] > plain["attack"][0] - (0.05 if short else 0.015)
    assert short or contractive["attack"][4] > plain["attack"][4] + 0.05
    assert contractive["certified"][1] > (0.5 if short else 0.9) and plain["certified"][1] < 0.1
    return found


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(SHORT)
