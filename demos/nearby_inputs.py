r"""Nearby inputs
=============

The value function F(v, t) of section 4.3 is what an input v costs from t on with the best controls for it. It solves
the Hamilton-Jacobi-Bellman equation (4.11) in the space of all inputs, and whoever has it has controls for every
input. The paper asks at the end of that section for a local, Lagrangian way, for inputs near one that was trained.
With u the controls that are optimal for v,

    D_v F = r(0),      D^2 F = J_vv - J_vu J_uu^-1 J_uv,      u(v + w) = u - J_uu^-1 J_uv w + O(|w|^2),

and all of it comes from Hessian actions along one trajectory. Here 1,000 perturbed inputs get their controls so, and
what they cost is set against training anew for each, and against keeping u. Run

    containers/run python demos/nearby_inputs.py               (five minutes; --short for a few seconds)
    containers/run mpiexec -n 2 python -m mpi4py demos/nearby_inputs.py

It writes a figure and its tables to demos/output/; the tables of the full run are demos/nearby_inputs.txt, at the end of this
page.
"""

import sys
import time
from pathlib import Path

SHORT = "--short" in sys.argv
sys.argv = [argument for argument in sys.argv if argument != "--short"]  # PETSc would take it for an option of its own

import firedrake as fd
import numpy as np
from matplotlib.figure import Figure
from pyadjoint.reduced_functional_numpy import ReducedFunctionalNumPy
from scipy.optimize import minimize

from fem_resnet import (
    Batch,
    LabelSpace,
    LearningProblem,
    LocalClosedLoop,
    LocalFeedback,
    LowRankFeedback,
    ResidualNetwork,
    laplace_basis,
    least_squares,
    plot,
    tikhonov,
    train,
)  # fmt: skip

LAMBDA = 0.2

# %% One input, trained
# On an annulus, a network of three layers carries a bump to the same bump turned by a right angle, at the least cost
# J_mod (4.6). This one input is trained to a minimum, by Newton's method.


def trained(refinement):
    Y = LabelSpace(fd.FunctionSpace(fd.AnnulusMesh(1, 0.4, 4 * refinement, 24 * refinement), "DG", 0))
    basis = laplace_basis(Y, 5)
    net = ResidualNetwork(basis, bias=basis, layers=3, final_time=1.5)
    x, y = Y.coordinates.T
    bump, target = (2 * np.exp(-4 * ((x - cx) ** 2 + (y - cy) ** 2)) for cx, cy in ((0.7, 0), (0, 0.7)))
    learning = LearningProblem(net, None, least_squares, tikhonov(LAMBDA), Batch(Y.batch(bump), Y.batch(target)))
    newton = {"tao_type": "nls", "tao_gatol": 1e-10, "tao_max_it": 100, "tao_nls_ksp_rtol": 1e-4}
    # With a kernel of zero the layers do not see their input.
    random = np.random.default_rng(0)
    for parameter in net.parameters:
        for k in range(net.layers):
            parameter.set(k, 0.1 * random.normal(size=parameter.space_basis.shape))
    result = train(learning, newton, monitor=lambda progress: None)
    assert result.converged, result.reason
    return learning


# %% Perturbed inputs
# Smooth functions of random frequency and phase, all of one size relative to the input.


def perturbations(Y, inputs, count):
    random = np.random.default_rng(1)
    waves = random.normal(scale=2.0, size=(2, count))
    W = np.cos(Y.coordinates @ waves + random.uniform(0, 2 * np.pi, count))
    return W * Y.norm(inputs) / np.sqrt(Y.sum(Y.weights @ W**2))


# %% What controls cost, and what the best ones do
# Training anew starts from the feedback's controls, by BFGS with J_uu^-1 at the trained input for its first matrix:
# that takes some ten gradients an input.


def costs(feedback, many, W, size):
    """For each perturbation: cost with the controls kept, with those of the feedback, and the least, F(v + w)."""
    Y, batch = feedback.Y, feedback.batch
    learning = LearningProblem(
        feedback.problem.net, None, least_squares, tikhonov(LAMBDA), Batch(feedback.inputs.copy(deepcopy=True), batch.targets)
    )
    J = ReducedFunctionalNumPy(learning.reduced_functional())
    inputs = Y.values(feedback.inputs) + size * W
    kept = J.get_global(feedback.controls)
    chosen = np.hstack([part.reshape(len(part), -1) for part in many(Y.batch(inputs))])
    inverse = np.linalg.inv(many.control_hessian)
    table, gradients, count = [], 0, len(chosen)

    controls = [control.copy(deepcopy=True) for control in feedback.controls]

    def value(u):
        return float(J.rf(J.set_local(controls, u)))

    def value_and_gradient(u):
        return value(u), J.get_global(J.rf.derivative())

    for s, start in enumerate(chosen):
        learning.exchange(Batch(Y.batch(inputs[:, s]), batch.targets))
        options = {"hess_inv0": (inverse + inverse.T) / 2, "gtol": 1e-7}
        best = minimize(value_and_gradient, start, jac=True, method="BFGS", options=options)
        # Round-off in J may end a line search before the tolerance. J is off by about the square of this.
        assert np.abs(best.jac).max() < 1e-5, best.message
        table.append([value(kept), value(start), best.fun])
        gradients += best.njev
    return *np.transpose(table), many.predicted_values(Y.batch(inputs)), gradients / count


def compare(feedback, sizes, count, say):
    """The table over the size of the perturbation; mean excess of both choices over F, for each size."""
    many = LowRankFeedback(feedback)
    W = perturbations(feedback.Y, feedback.inputs, count)
    say(f"{'':8}|{'':9}|{'controls kept, above F':^27}|{'feedback, above F':^27}|{'F predicted':^16}| gradients")
    columns = f"{'mean':>9}{'worst':>9}{'order':>8} |"
    say(f"|w|/|v| |{'mean F':>8} |{columns}{columns}{'error':>9}{'order':>6} | an input")
    means = []
    for size in sizes:
        kept, chosen, best, predicted, gradients = costs(feedback, many, W, size)
        errors = kept - best, chosen - best, np.abs(predicted - best)
        means.append([error.mean() for error in errors])
        orders = [f"{np.log2(a / b):.2f}" for a, b in zip(*means[-2:])] if len(means) > 1 else [""] * 3
        parts = [f"{error.mean():>9.1e}{error.max():>9.1e}{order:>8} |" for error, order in zip(errors, orders[:2])]
        say(f"{size:<8g}|{best.mean():>8.4f} |{''.join(parts)}{means[-1][2]:>9.1e}{orders[2]:>6} |{gradients:>6.1f}")
    return np.array(means)


# %% The figure


def draw(path, sizes, tables):
    """What both choices cost above F, and the error of the predicted F; a panel a table, orders are the last ones."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for ax, (title, means) in zip(figure.subplots(1, 2, sharey=True), tables.items()):
        orders = np.log2(means[-2] / means[-1]) / np.log2(sizes[-2] / sizes[-1])
        names = "controls kept, above F", "feedback, above F", "F predicted, its error"
        curves = {
            f"{name} (order {order:.0f})": np.stack([sizes, mean], axis=1) for name, order, mean in zip(names, orders, means.T)
        }
        plot.lines(curves, log="xy", xlabel="|w| / |v|", ylabel="mean difference of costs", ax=ax).set_title(title)
        ax.label_outer()
    plot.save(path, figure)


# %% All together
# D^2 F is the identity and a part of low rank: its eigenvalues are the same on a finer mesh. The tables then are for
# perturbed inputs, and for perturbations of the state after the first layer, which controls chosen at t = 0 cannot
# know of: the layers that are left answer them by the feedback at that interface.


def main(short=False):
    """Returns the mean excess costs of both tables, and the eigenvalues on both meshes."""
    comm, lines, start = fd.COMM_WORLD, [], time.perf_counter()

    def say(text):
        if comm.rank == 0:
            print(text, flush=True)
            lines.append(text)

    sizes, count = ((0.2, 0.1), 5) if short else ((0.8, 0.4, 0.2, 0.1), 1000)
    spectra = []
    for refinement in (1,) if short else (1, 2):
        learning = trained(refinement)
        feedback = LocalFeedback(learning)
        many = LowRankFeedback(feedback)
        spectra.append(many.eigenvalues())
        say(f"{feedback.Y.size} neurons: F = {feedback.value:.6f}, {len(many.control_hessian)} controls")
        say("   eigenvalues of D^2 F - 1: " + ", ".join(f"{value:.3f}" for value in spectra[-1][:8]))
        say(f"   {np.count_nonzero(np.abs(spectra[-1]) > 0.01)} of {len(spectra[-1])} are above 0.01")
    say(f"\n{count} perturbed inputs, at t = 0:")
    at_start = compare(feedback, sizes, count, say)
    later = LocalClosedLoop(learning).feedbacks[1]
    say(f"\n{count // 5} perturbed states, after the first layer:")
    on_the_way = compare(later, sizes, count // 5, say)
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    draw(output / "nearby_inputs.png", sizes, {"perturbed inputs": at_start, "perturbed after the first layer": on_the_way})
    if comm.rank == 0:
        (output / "nearby_inputs.txt").write_text("\n".join(lines) + "\n")
        print(f"time: {time.perf_counter() - start:.0f} s")
    # What this page claims: orders 2, 4 and 3 by the last halving, and one spectrum whatever the mesh.
    last = [np.log2(means[-2] / means[-1]) for means in (at_start, on_the_way)]
    assert all(np.abs(orders - [2, 4, 3]).max() < 0.5 for orders in last), f"orders: {last}"
    assert short or np.abs(spectra[0][:6] - spectra[1][:6]).max() < 0.05, spectra
    return at_start, on_the_way, spectra


if __name__ == "__main__":
    main(SHORT)
