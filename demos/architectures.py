r"""Different discretisations, different architectures
===================================================

The controls a, b of the evolution equation f_t = sigma(a - B f) belong to no architecture. Whoever steps the equation
makes one of them: Euler's method is the residual network (2.1), other explicit methods have several evaluations of sigma
in a step and weights that skip between them, implicit ones are layers that solve an equation. Here controls are trained
once, on an annulus, and then stepped in five ways. Each is written down as a network of arrays, in NumPy, and gives the
same numbers as the package. They differ in how accurate they are with how many layers, and in how long a step may be
before the network is unstable. Run

    containers/run python demos/architectures.py               (half a minute; --short for some seconds)
    containers/run mpiexec -n 2 python -m mpi4py demos/architectures.py

It writes one figure and its table to demos/output/; the table of the full run is demos/architectures.txt, at the end of
this page.
"""

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
    Bias,
    EnergyMonitor,
    Kernel,
    LabelSpace,
    Layers,
    LearningProblem,
    NetworkArrays,
    PositiveSemidefinite,
    ResidualNetwork,
    laplace_basis,
    least_squares,
    plot,
    singular_system,
    state_array,
    tikhonov,
    to_network,
    train,
)  # fmt: skip

# %% Controls, trained once
# Functions on an annulus are to be carried to what is left of them after they have cooled: heat spreads, and some of it is
# lost. The kernel is of the form B = C C^T, so that the network is damped and the energies of Theorem 3.2 fall along
# solutions. All layers share a and b, so that the equation is autonomous, and any number of steps is a network.

FINAL_TIME = 2.0
SPREAD, LOSS = 0.15, 0.5


def data(phi, samples, seed):
    """Inputs of root mean square 1/4, and what they cool to."""
    Y, random = phi.Y, np.random.default_rng(seed)
    f = phi.values @ random.normal(size=(phi.rank, samples))
    f = f / 4 / np.sqrt(Y.sum(Y.weights @ f**2) / Y.measure)
    cooled = phi.values @ (np.exp(-SPREAD * phi.eigenvalues - LOSS)[:, None] * phi.project(f))
    return Y.batch(f), Y.batch(cooled)


def network(phi, layers):
    """With these layers and new controls."""
    return ResidualNetwork(
        Kernel(phi, among=PositiveSemidefinite(), in_time="shared"), bias=Bias(phi, in_time="shared"), layers=layers
    )


def trained(phi, samples, iterations):
    """A network stepped finely enough to be the equation: 32 steps of Runge-Kutta 4."""
    net = network(phi, Layers(1, FINAL_TIME, steps=32))
    problem = LearningProblem(net, None, least_squares, tikhonov(1e-6), Batch(*data(phi, samples, seed=1)))
    train(problem, {"tao_max_it": iterations, "tao_gatol": 1e-6}, monitor=lambda progress: None)
    return net


# %% Five ways to step them

SCHEMES = {
    "Euler": {"ts_rk_type": "1fe"},
    "Heun": {"ts_rk_type": "2a"},
    "Runge-Kutta 4": {"ts_rk_type": "4"},
    "implicit midpoint": {"ts_type": "theta", "ts_theta_theta": 0.5},
    "discrete gradient": {"ts_type": "discrete_gradient"},
}
ORDERS = dict(zip(SCHEMES, (1, 2, 4, 2, 2)))
IMPLICIT = ("implicit midpoint", "discrete gradient")


def stepped(net, scheme, layers):
    """The controls of a network, stepped otherwise over other layers."""
    other = network(net.bases["phi"][0], layers).replace(solver_parameters=SCHEMES[scheme])
    other.kernel.set(0, net.kernel.get(0))
    other.bias.set(0, net.bias.get(0))
    return other


# %% What each is as an architecture
# An explicit method is a network of stages: stage i sees the state at the start of the step and, by Butcher's A_ij, the
# stages before it; Butcher's b_i say what of them goes on. `to_network` gives these arrays. With one stage it is (2.1).


def by_stages(arrays, z):
    """A network of arrays that `to_network` gives, in NumPy."""
    if isinstance(arrays, NetworkArrays):  # (2.1)
        for a, B, tau in zip(*arrays):
            z = z + tau * np.tanh(a[:, None] - B @ z)
        return z
    for a, B, tau in zip(*arrays[:3]):
        k = []
        for i, row in enumerate(arrays.skips):
            k.append(np.tanh(a[i][:, None] - B[i] @ (z + tau * sum(row[j] * k[j] for j in range(i)))))
        z = z + tau * sum(weight * stage for weight, stage in zip(arrays.weights, k))
    return z


# An implicit method has equilibrium layers. That of the midpoint rule has the fixed point z_1 = z + tau sigma(a - B (z +
# z_1) / 2). That of the discrete gradient has the mean of sigma between u = a - B z and u_1 = a - B z_1 in the place of
# sigma: z_1 = z + tau (Sigma(u_1) - Sigma(u)) / (u_1 - u), where Sigma' = sigma. Both have the parameters of (2.1). With
# layers as short as here, going round and round finds the fixed point; the package takes Newton's method, which finds it for
# layers of any length.


def middle(u, u_1):
    """Sigma of the middle."""
    return np.tanh((u + u_1) / 2)


def mean(u, u_1, rule=np.polynomial.legendre.leggauss(16)):
    """The mean of sigma from u to u_1, by Gauss's rule."""
    return sum(w / 2 * np.tanh(u + (1 + x) / 2 * (u_1 - u)) for x, w in zip(*rule))


def by_equilibria(arrays, z, increment):
    """Equilibrium layers with the parameters of (2.1), in NumPy."""
    for a, B, tau in zip(*arrays):
        u, z_1 = a[:, None] - B @ z, z
        for _ in range(200):
            z_1 = z + tau * increment(u, a[:, None] - B @ z_1)
        z = z_1
    return z


def by_arrays(net, scheme, initial, steps):
    """By how much the package's network and its arrays differ, relative to the largest value."""
    layers = Layers(1, FINAL_TIME, steps=steps)
    ours, z = stepped(net, scheme, layers), state_array(net.Y, initial)
    if scheme in IMPLICIT:
        arrays = to_network(stepped(net, "Euler", layers))
        z = by_equilibria(arrays, z, middle if scheme == "implicit midpoint" else mean)
    else:
        z = by_stages(to_network(ours), z)
    return np.abs(state_array(net.Y, ours(initial)) - z).max() / np.abs(z).max()


# %% How accurate
# The error at T against the equation itself, with a method of order 8 and 512 steps.


def errors(net, initial, counts):
    """Relative errors in L2(Y) by scheme, one for each number of steps."""
    one_layer = [Layers(1, FINAL_TIME, steps=n) for n in counts]
    fine = net.replace(layers=Layers(1, FINAL_TIME, steps=512), solver_parameters={"ts_rk_type": "8vr"})
    exact = fine(initial)

    def error(scheme, layers):
        f = stepped(net, scheme, layers)(initial)
        return net.Y.norm(fd.Function(f).assign(f - exact)) / net.Y.norm(exact)

    return {scheme: [error(scheme, layers) for layers in one_layer] for scheme in SCHEMES}


# %% How stable
# The same controls on a longer time: with a long step the network overshoots, and what it overshoots by grows until sigma
# saturates. A step is stable if the energy int Sigma(u) dy goes to 0 as that of the equation does. Since sigma' <= 1, the
# longest such step should be that of the linear equation y_t = -|B| y, up to which the stability function R of the method,
# the factor of y in a step, stays between -1 and 1.


def energies(net, scheme, h, layers, steps=1):
    """int Sigma(u) dy, of all samples, at the ends of layers of so many steps of length h."""
    other = stepped(net, scheme, Layers(layers, layers * steps * h, steps=steps))
    return EnergyMonitor(other).watch(other.run(data(net.bases["phi"][0], 4, seed=2)[0])).values("primitive").sum(axis=1)


def longest_step(net, scheme, norm, most, steps):
    """The longest stable step by bisection, times the norm of B; `most` if five steps from 3 up to that are stable."""

    def is_stable(x):
        first, last = energies(net, scheme, x / norm, 1, steps)
        return last < 0.01 * first

    if all(is_stable(x) for x in np.geomspace(3, most, 5)):
        return most
    low, high = 1.0, most
    while high - low > 0.01:
        x = (low + high) / 2
        low, high = (x, high) if is_stable(x) else (low, x)
    return low


def predicted_step(net, scheme, most):
    """Up to where |R(-x)| <= 1, with the stability function of the tableau; `most` if everywhere, or without a tableau."""
    tableau = stepped(net, scheme, 1).tableau
    if tableau is None:
        return most
    A, b = tableau
    x = np.linspace(0, most, 50001)[1:]
    R = [1 - s * b @ np.linalg.solve(np.eye(len(b)) + s * A, np.ones(len(b))) for s in x]
    outside = np.abs(R) > 1 + 1e-12
    return float(x[np.argmax(outside) - 1]) if outside.any() else most


# %% The figure


def draw(path, counts, found, falls, equation, limits, long_step, norm):
    """Errors over steps, energies over time, and longest stable steps; limits have the one found and the predicted one."""
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    t = long_step / norm * np.arange(len(equation))
    plot.lines(
        {scheme: np.stack([counts, errors], axis=1) for scheme, errors in found.items()}, log="xy", ax=left, legend=False,
        xlabel=f"steps from 0 to T = {FINAL_TIME:g}", ylabel="relative error of f(T)",
    ).set_title("accuracy")  # fmt: skip
    plot.lines(
        {scheme: np.stack([t, energies], axis=1) for scheme, energies in falls.items()}, log="y", ax=middle, legend=False,
        reference={"the equation": np.stack([t, equation], axis=1)}, xlabel="t", ylabel=r"energy $\int_Y\, \Sigma(u)\, dy$",
    ).set_title(f"energy in steps of {long_step:g} / |B|")  # fmt: skip
    plot.comparison(
        {scheme: both for scheme, (*both, _) in limits.items()}, marked=IMPLICIT, log=True, xlabel="step times |B|", ax=right
    ).set_title(f"longest stable step of those up to {limits['Euler'][-1]:g},\nfound and by |R| = 1")
    figure.legend(*middle.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    plot.save(path, figure)


# %% All together


def main(short=False):
    """Returns errors, energies and longest steps by scheme."""
    comm, lines, start = fd.COMM_WORLD, [], time.perf_counter()

    def say(text):
        if comm.rank == 0:
            print(text, flush=True)
            lines.append(text)

    Y = LabelSpace(fd.FunctionSpace(fd.AnnulusMesh(1, 0.4, 4, 24), "CG", 1))
    phi = laplace_basis(Y, 5 if short else 12)
    net = trained(phi, 16 if short else 64, 30 if short else 200)
    norm = float(singular_system(net.layer_inputs()[0].factors, net.layer_inputs()[0].beta.coefficients(0.0)).values[0])
    initial, cooled = data(phi, 8, seed=2)
    fine = net(initial)
    off = Y.norm(fd.Function(fine).assign(fine - cooled)) / Y.norm(cooled)
    say(f"{Y.size} nodes, |Y| = {Y.measure:.2f}, rank {phi.rank}; |B| = {norm:.2f}, T = {FINAL_TIME:g}")
    say(f"inputs that it was not trained with: {100 * off:.1f}% off")
    counts = [2**k for k in range(0 if not short else 2, 9 if not short else 6)]
    found = errors(net, initial, counts)
    most, long_step = (6.0, 4.0) if short else (50.0, 4.0)
    last = 10 if short else 20
    falls = {scheme: energies(net, scheme, long_step / norm, last) for scheme in SCHEMES}
    equation = energies(net, "Runge-Kutta 4", long_step / norm / 32, last, 32)
    limits = {
        scheme: (longest_step(net, scheme, norm, most, 100 if short else 300), predicted_step(net, scheme, most), most)
        for scheme in SCHEMES
    }
    apart = {scheme: by_arrays(net, scheme, initial, 8 if short else 16) for scheme in SCHEMES}

    columns = [counts[k] for k in (0, len(counts) // 2, -1)]
    say(f"\n{'':18}| error of f(T) with so many steps |       | longest step |B| | energy after {last} steps")
    say(f"{'':18}|" + "".join(f"{n:>11}" for n in columns) + f" | order | {'found':>7}  {'by R':>7} | of 4/|B|, of the first")
    measured = {}
    for scheme in SCHEMES:
        errors_at = [found[scheme][counts.index(n)] for n in columns]
        measured[scheme] = float(np.log2(found[scheme][-2] / found[scheme][-1]))
        step, predicted, _ = limits[scheme]
        steps = [f"{x:.2f}" if x < most else f"> {most:g}" for x in (step, predicted)]
        say(
            f"{scheme:18}|" + "".join(f"{e:11.1e}" for e in errors_at) + f" | {measured[scheme]:5.2f} | "
            f"{steps[0]:>7}  {steps[1]:>7} | {falls[scheme][-1] / falls[scheme][0]:>22.1e}"
        )
    exact = "round-off" if max(apart.values()) < 1e-12 else f"{max(apart.values()):.1e}"
    say(f"\nas networks of arrays in NumPy, all five differ from the package by {exact}")
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    draw(output / "architectures.png", counts, found, falls, equation, limits, long_step, norm)
    if comm.rank == 0:
        (output / "architectures.txt").write_text("\n".join(lines) + "\n")
        print(f"time: {time.perf_counter() - start:.0f} s")

    # What this page claims.
    assert max(apart.values()) < 1e-12, f"by arrays: {apart}"
    assert all(abs(measured[scheme] - ORDERS[scheme]) < 0.2 for scheme in SCHEMES), f"orders {measured}"
    assert all(abs(step - predicted) < 0.1 * predicted for step, predicted, _ in limits.values()), f"steps {limits}"
    assert np.diff(falls["discrete gradient"]).max() <= 0, "the energy rises by the discrete gradient"
    assert min(falls[scheme][-1] / falls[scheme][0] for scheme in SCHEMES if scheme not in IMPLICIT) > 0.1, "overshoots"
    assert max(falls[scheme][-1] / falls[scheme][0] for scheme in IMPLICIT) < 0.01, "the energy falls"
    return found, falls, limits


if __name__ == "__main__":
    main(SHORT)
