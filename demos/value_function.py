r"""The value function on two halves of a disk
============================================

On a label domain Y of two cells the Hamilton-Jacobi-Bellman equation of section 4.3 can be solved as it stands: F(v, t) is a
function of two numbers and time. Here Y is a disk in two halves, (a, b) lies in a box, and the target is within reach of some
inputs and not of others. F is solved backwards on a grid of v, and its feedback map steers inputs towards the target: at each
time the controls are those that attain the minimum of (4.11) at the running state. Run

    containers/run python demos/value_function.py     (about half a minute; --short for 10 s)
    containers/run mpiexec -n 2 python -m mpi4py demos/value_function.py

It prints what the closed loop costs against F, on finer and finer grids, and draws a figure and an animation of F with
trajectories, switching lines and the feedback field to demos/output/.
"""

import sys
import time
from pathlib import Path

SHORT = "--short" in sys.argv
sys.argv = [argument for argument in sys.argv if argument != "--short"]  # PETSc would take it for an option of its own

import firedrake as fd
import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fem_resnet import Box, LabelSpace, StateGrid, closed_loop, feedback_controls, feedback_speeds, plot, solve_value_function

# %% Two halves of a disk
# A rectangle of two cells is mapped onto the disk by polar coordinates, here polynomials of degree 8: each half is one cell
# with a curved side.


def halves_of_a_disk():
    """A label domain of two cells with piecewise constant functions."""
    flat = fd.RectangleMesh(1, 2, 1.0, 1.0, quadrilateral=True)
    radius, angle = fd.SpatialCoordinate(flat)
    x = fd.Function(fd.VectorFunctionSpace(flat, "DQ", 8))
    x.interpolate(fd.as_vector([radius * fd.cos(2 * fd.pi * angle), radius * fd.sin(2 * fd.pi * angle)]))
    return LabelSpace(fd.FunctionSpace(fd.Mesh(x), "DG", 0))


# %% The problem
# Controls a(y) in [-0.4, 0.5] and b(y, z) in [-0.5, 0.3] for all y and z, sigma = tanh, no running cost. At a state v each
# half has the same interval of speeds, from (4.9). The cells are numbered from below: v_1 is the value on the lower half.

CONTROLS = Box((-0.4, 0.5), (-0.5, 0.3))
TARGET = np.array([0.7, -0.4])
START = np.array([[-1.0, 1.0], [-1.0, 1.0]])  # corners of the box of inputs
T = 1.0
SPACINGS = (0.08, 0.04, 0.02, 0.01)
#: Where trajectories begin.
INPUTS = np.array([[-0.9, -0.6, -0.9, 0.2, 0.9, 0.9, 0.1, -0.2], [-0.9, -0.1, 0.7, 0.9, 0.8, -0.9, -0.8, 0.4]])


def value_function(Y, spacing):
    """F, for values on both halves in the order of the cells."""
    own = halves_here(Y)
    return solve_value_function(Y, CONTROLS, "tanh", TARGET[own], StateGrid(START[own], spacing), final_time=T)


def halves_here(Y):
    """Which halves this rank has, numbered from below."""
    return np.where(Y.coordinates[:, 1] < 0, 0, 1)


# %% The cost of the closed loop
# F is the least cost that any controls can have. The feedback at the running state attains it up to the order of the scheme.
# The controls that the feedback map gives at the input, kept for all times, do not: they run past the target.


def frozen_cost(F, v):
    """J of the controls of the first state, for each input."""
    Y, own, costs = F.cells.Y, F.cells.own, []
    for sample in v.T:
        controls, f = feedback_controls(F, sample[own], 0.0), sample[own][:, None]
        for h in np.diff(F.times):
            f = f + h * np.tanh(controls.argument(Y, f))
        costs.append(float(Y.sum(Y.weights @ (f[:, 0] - TARGET[own]) ** 2)) / 2)
    return np.array(costs)


def table(Y, spacings, say):
    """One row a spacing; returns the finest F, the order over all rows, and by how much frozen controls cost more."""
    v = np.hstack([INPUTS, np.random.default_rng(0).uniform(-1, 1, (2, 40))])
    say(
        f"{'spacing':>8s}{'states':>14s}{'steps':>7s}{'largest F':>12s}{'closed loop - F':>18s}"
        f"{'order':>8s}{'frozen - F':>13s}"
    )
    apart = []
    for spacing in spacings:
        F = value_function(Y, spacing)
        own = F.cells.own
        least = F(v[own], 0.0)
        apart.append(np.abs(closed_loop(F, v[own]).cost - least).max())
        frozen = (frozen_cost(F, v[:, :8]) - least[:8]).max()
        order = f"{np.log2(apart[-2] / apart[-1]):8.2f}" if len(apart) > 1 else 8 * " "
        states = " x ".join(map(str, F.values[-1].shape))
        say(f"{spacing:8g}{states:>14s}{len(F.times) - 1:7d}{least.max():12.4f}{apart[-1]:18.2e}{order}{frozen:13.2e}")
    return F, np.log2(apart[0] / apart[-1]) / (len(apart) - 1), frozen


# %% What is drawn
# Where D_v F changes its sign in a half, a and b(y, .) of that half switch from one end of the box to the other (4.10): the
# first two kinds of lines. Where v changes its sign in a half z, b(., z) switches for all y: the axes. Arrows are the feedback
# field v_t = sigma(a~ - B v); where the target is in reach F is zero, and staying is as good as going. The states are
# gathered from the ranks: two numbers a state.


class Picture:
    """F at a time, on the box of inputs, with the feedback field and the gradient's signs."""

    def __init__(self, F, t, points=81, arrows=15):
        own, gather = F.cells.own, F.cells.gather
        self.v = np.linspace(-1, 1, points)
        grid = np.stack([part.ravel() for part in np.meshgrid(self.v, self.v)])
        self.values = F(grid[own], t).reshape(points, points)
        self.gradient = gather(F.gradient(grid[own], t)).reshape(2, points, points)
        self.at = np.stack([part.ravel() for part in np.meshgrid(*2 * [np.linspace(-0.95, 0.95, arrows)])])
        self.field = gather(feedback_speeds(F, self.at[own], t))
        self.t = t

    def draw(self, panel, paths, done):
        """Everything at this time, and trajectories up to the step `done`."""
        levels = np.array([0.001, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.1, 1.6, 2.4, 3.5])
        drawn = panel.contourf(self.v, self.v, self.values, np.append(0.0, levels), cmap="Blues", extend="max", norm="asinh")
        panel.contour(self.v, self.v, self.values, levels, colors="k", linewidths=0.3)
        # Where F is flat, the sign of its gradient is round-off.
        for part, colour in zip(self.gradient, SWITCHES):
            steep = np.where(np.abs(self.gradient).max(axis=0) > 1e-3, part, np.nan)
            panel.contour(self.v, self.v, steep, [0.0], colors=colour, linewidths=2.5)
        panel.axhline(0, color="0.4", linestyle=":", linewidth=1.2)
        panel.axvline(0, color="0.4", linestyle=":", linewidth=1.2)
        panel.quiver(*self.at, *self.field, color="0.45", scale=14, width=0.003)
        panel.plot(*np.moveaxis(paths[: done + 1], 1, 0), color=PATH, linewidth=1.8)
        panel.plot(*paths[done], "o", color=PATH, markersize=5)
        panel.plot(*TARGET, "*", color="gold", markeredgecolor="k", markersize=14)
        panel.set(xlabel="$v_1$, on the lower half", ylabel="$v_2$, on the upper half", title=f"t = {self.t:.2f}")
        panel.set(aspect="equal", xlim=(-1, 1), ylim=(-1, 1))
        return drawn


#: Vermilion, orange and green of Okabe and Ito, which people who are colour-blind tell apart.
SWITCHES, PATH = ("#D55E00", "#E69F00"), "#009E73"
#: What the lines and marks are.
SIGNS = {
    "trajectory under the feedback": Line2D([], [], color=PATH, marker="o"),
    "target": Line2D([], [], color="gold", marker="*", markeredgecolor="k", markersize=12, linestyle=""),
    "feedback field $v_t$": Line2D([], [], color="0.45", marker=r"$\rightarrow$", markersize=12, linestyle=""),
    "a, b of the lower half switch": Line2D([], [], color=SWITCHES[0], linewidth=2.5),
    "a, b of the upper half switch": Line2D([], [], color=SWITCHES[1], linewidth=2.5),
    "b(., z) switches": Line2D([], [], color="0.4", linestyle=":"),
}


def draw(folder, F, frames):
    """A figure of three times and an animation of all, by rank 0."""
    loop = closed_loop(F, INPUTS[F.cells.own])
    paths = np.array([F.cells.gather(state) for state in loop.states])
    steps = np.unique(np.linspace(0, len(loop.times) - 1, frames).round().astype(int))
    pictures = [Picture(F, loop.times[step]) for step in steps]
    figure = Figure(figsize=(14, 5.4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for panel, k in zip(axes, (0, len(steps) // 2, -1)):
        drawn = pictures[k].draw(panel, paths, steps[k])
        panel.label_outer()
    figure.colorbar(drawn, ax=axes, label="F(v, t), the least cost from v on")
    figure.legend(SIGNS.values(), SIGNS.keys(), loc="outside lower center", ncols=6)
    folder.mkdir(exist_ok=True)
    plot.save(folder / "value_function.png", figure)
    if fd.COMM_WORLD.rank == 0:
        animate(folder / "value_function.gif", pictures, paths, steps)
    fd.COMM_WORLD.barrier()


def animate(path, pictures, paths, steps):
    """All pictures, one after the other."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    panel = figure.subplots()

    def frame(k):
        panel.clear()
        pictures[k].draw(panel, paths, steps[k])

    FigureCanvasAgg(figure)
    FuncAnimation(figure, frame, frames=len(steps)).save(path, PillowWriter(fps=8), dpi=80)


# %% All together


def main(short=False):
    """Returns the observed order of the closed loop's cost."""
    start = time.perf_counter()

    def say(text):
        if fd.COMM_WORLD.rank == 0:
            print(text, flush=True)

    Y = halves_of_a_disk()
    F, order, frozen = table(Y, SPACINGS[: 3 if short else None], say)
    draw(Path(__file__).parent / "output", F, 4 if short else 25)
    say(f"\norder of the closed loop's cost: {order:.2f}   time: {time.perf_counter() - start:.0f} s")
    # What this page claims.
    assert order > 0.8 and frozen > 0.1
    return order


if __name__ == "__main__":
    main(SHORT)
