r"""The co-state, twice
===================

The gradient of a network's loss is made of the co-state r, which solves backwards in time

    r_t = B_bT( sigma'(u) r ),        u = a - B_b f,        r(T) = the gradient of the loss in f(T),              (4.2)

and then D_a J = sigma'(u) r (4.3), D_b J = - f(z) sigma'(u) r(y) (4.4), and lambda a, lambda b in addition with
Tikhonov's regularisation (4.7). The package never solves (4.2): it differentiates the discrete network, by pyadjoint
over the segments of layers and by PETSc's TSAdjoint over the stages of its time steps. Here (4.2) is solved as the
paper prints it, and the two are compared. Run

    containers/run python demos/costate_twice.py               (about a minute; --short for a few seconds)
    containers/run mpiexec -n 2 python -m mpi4py demos/costate_twice.py

It writes a figure and its table to demos/output/; the table of the full run is demos/costate_twice.txt, at the end of this
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

from fem_resnet import (
    Batch,
    Head,
    LabelSpace,
    Layers,
    LearningProblem,
    ResidualNetwork,
    costate_check,
    cross_entropy,
    laplace_basis,
    plot,
    tikhonov,
)  # fmt: skip

# %% Label domains and schemes
# Neurons that fill a disk, an annulus, a sphere, a square and a cube; one value a cell (DG0), continuous and linear
# (CG1), or spectral elements (CG3 on quadrilaterals). The rank never cuts through a repeated eigenvalue.

DOMAINS = {
    "disk, DG0": (lambda: fd.FunctionSpace(fd.UnitDiskMesh(2), "DG", 0), 6),
    "disk, CG1": (lambda: fd.FunctionSpace(fd.UnitDiskMesh(2), "CG", 1), 6),
    "annulus, DG0": (lambda: fd.FunctionSpace(fd.AnnulusMesh(1, 0.4, 4, 24), "DG", 0), 5),
    "sphere, CG1": (lambda: fd.FunctionSpace(fd.UnitIcosahedralSphereMesh(2), "CG", 1), 9),
    "square, spectral": (lambda: fd.FunctionSpace(fd.UnitSquareMesh(3, 3, quadrilateral=True), "CG", 3), 4),
    "cube, CG1": (lambda: fd.FunctionSpace(fd.UnitCubeMesh(3, 3, 3), "CG", 1), 4),
}

# Explicit Runge-Kutta schemes by PETSc's names with their orders: Euler, Heun, the midpoint rule, Kutta's and Bogacki
# and Shampine's of third order, the classical one of fourth; and two implicit ones, the midpoint rule and
# Crank-Nicolson. A scheme has a partner for (4.2) if no weight b_i is 0, but for stages that nothing uses: the
# explicit midpoint rule has none. The implicit one is its own partner. That of Crank-Nicolson is another scheme, which
# no TS makes.

SCHEMES = {
    "1fe": (1, {"ts_rk_type": "1fe"}),
    "2a": (2, {"ts_rk_type": "2a"}),
    "2b": (2, {"ts_rk_type": "2b"}),
    "3": (3, {"ts_rk_type": "3"}),
    "3bs": (3, {"ts_rk_type": "3bs"}),
    "4": (4, {"ts_rk_type": "4"}),
    "midpoint": (2, {"ts_type": "theta", "ts_theta_theta": 0.5}),
    "cn": (2, {"ts_type": "cn"}),
}
WITHOUT_PARTNER = {"2b", "cn"}

# %% A network to compare on
# Three layers of unequal length, kernel and bias of size one, a head onto three classes: nothing in it is special.


def learning_problem(Y, rank, scheme, samples=4):
    """A network with smooth inputs, classes, cross entropy and Tikhonov's regularisation."""
    random = np.random.default_rng(0)
    phi = laplace_basis(Y, rank)
    net = ResidualNetwork(phi, bias=phi, layers=Layers([0.0, 0.2, 0.9, 1.3], steps=4), solver_parameters=SCHEMES[scheme][1])
    for layer in range(net.layers):
        net.kernel.set(layer, random.normal(size=(rank, rank)) / rank**0.5)
        net.bias.set(layer, random.normal(size=rank) / rank**0.5)
    head = Head(phi, onto=3)
    head.W.set(0, random.normal(size=(3, rank)))
    waves = random.normal(scale=2.0, size=(Y.coordinates.shape[1], samples))
    batch = Batch(Y.batch(np.cos(Y.coordinates @ waves)), np.arange(samples) % 3)
    return LearningProblem(net, head, cross_entropy, tikhonov(0.1), batch)


# %% The comparison
# `costate_check` steps (2.8) and (4.2) in the values at the nodes, by a scheme of sixth order with an interpolation of
# sixth order between them, and sets the network's co-state at the layer interfaces and its gradient against them, with
# steps dt, dt/2, dt/4, dt/8. Both must approach (4.2) - (4.4), (4.7) at the order of the network's scheme.
#
# It then steps (4.2) by the scheme's own partner: the same b_i, on the stages of the forward steps, with
# A^_ij = b_j - b_j A_ji / b_i. That is the discrete adjoint written as a scheme for (4.2), so what TSAdjoint and
# pyadjoint found must be met to round-off, at every step size.


def compare(domains, schemes, say):
    """Checks by domain and scheme, each printed as a row of the table."""
    checks = {}
    columns = f"{'co-state at dt/8':>16}{'order':>7} | {'gradient at dt/8':>16}{'order':>7}"
    say(f"{'':18}{'scheme':>9} | {columns} | by the partner")
    for domain, (space, rank) in domains.items():
        Y = LabelSpace(space())
        for scheme in schemes:
            check = checks[domain, scheme] = costate_check(learning_problem(Y, rank, scheme))
            partner = max(check.partner_costate + check.partner_gradient, default=None)
            equal = "it has none" if partner is None else "round-off" if partner < 1e-13 else f"{partner:.1e}"
            say(
                f"{domain:18}{scheme:>9} | {check.costate[-1]:>16.1e}{check.costate_orders[-1]:>7.2f} | "
                f"{check.gradient[-1]:>16.1e}{check.gradient_orders[-1]:>7.2f} | {equal}"
            )
    return checks


# %% The figure


def draw(path, at_last, where, steps, costate, gradient):
    """Differences over the step, with the scheme of order 4; and by scheme those at the last step, a dot a label domain."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, costate = np.array(steps), np.array(costate)
    plot.lines(
        {"co-state": np.stack([steps, costate], axis=1), "gradient": np.stack([steps, gradient], axis=1)},
        reference={"order 4": np.stack([steps, costate[0] / 2 * (steps / steps[0]) ** 4], axis=1)},
        log="xy", xlabel="step dt", ylabel="relative difference", ax=left,
    ).set_title(f"{where}, Runge and Kutta's scheme of order 4")  # fmt: skip
    named = {f"{scheme}, order {SCHEMES[scheme][0]}": differences for scheme, differences in at_last.items()}
    plot.comparison(named, log=True, xlabel="relative difference at dt/8", ax=right)
    right.set_title("co-state, all schemes; a dot is a label domain")
    plot.save(path, figure)


# %% All together


def main(short=False):
    """Returns the checks by domain and scheme."""
    comm, lines, start = fd.COMM_WORLD, [], time.perf_counter()

    def say(text):
        if comm.rank == 0:
            print(text, flush=True)
            lines.append(text)

    domains = {name: DOMAINS[name] for name in (["annulus, DG0", "sphere, CG1"] if short else DOMAINS)}
    schemes = ["2a", "4"] if short else list(SCHEMES)
    checks = compare(domains, schemes, say)
    first = next(iter(domains))
    say(f"\n{first}, scheme 4, all step sizes; differences relative to co-state and gradient:")
    say(str(checks[first, "4"]))
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    at_last = {scheme: [checks[domain, scheme].costate[-1] for domain in domains] for scheme in schemes}
    shown = checks[first, "4"]
    draw(output / "costate_twice.png", at_last, first, shown.step_sizes, shown.costate, shown.gradient)
    if comm.rank == 0:
        (output / "costate_twice.txt").write_text("\n".join(lines) + "\n")
        print(f"time: {time.perf_counter() - start:.0f} s")
    orders = {
        key: max(abs(order - SCHEMES[key[1]][0]) for order in (check.costate_orders[-1], check.gradient_orders[-1]))
        for key, check in checks.items()
    }
    without = {scheme for (_, scheme), check in checks.items() if not check.partner_costate}
    by_partner = [x for check in checks.values() for x in check.partner_costate + check.partner_gradient]
    # What this page claims.
    assert max(orders.values()) < 0.25, f"not at the order of the scheme: {orders}"
    assert without == WITHOUT_PARTNER & set(schemes) and max(by_partner) < 1e-13, f"by the partner: {max(by_partner)}"
    return checks


if __name__ == "__main__":
    main(SHORT)
