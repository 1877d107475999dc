"""The Hamilton-Jacobi-Bellman equation of section 4.3, solved in full on label domains of few cells.

    F_t + H(v, D_v F) = 0,    H(v, r) = min over (a, b) of  int sigma(a - B_b v) r dy + int L(v, a, b) dy              (4.11)
    F(v, T) = 1/2 int (v - ftilde)^2 dy                                                                               (4.12)

These hold where F is smooth (Theorem 4.2). The minimum is taken cell by cell (`speeds`). With a head, or another terminal
cost, F(v, T) is another function (`terminal_cost`).

The scheme takes monotone differences on a tensor grid of v, backwards in time. A step of length h moves one cell after the
other, in this order and in the opposite order in turns. The part of cell i is a step of a controlled Markov chain,

    F(v, t) <- min over s, L of  F(v, t) + h ( max(s, 0) D+_i F + min(s, 0) D-_i F + w_i L ),

with one-sided differences D+_i, D-_i and h max abs(s) <= spacing. This is monotone, stable and consistent, so it converges
to the viscosity solution, which is the value function also where F is not differentiable. The error is of first order in
the spacing where F is smooth, and of order 1/2 in general. (Each part interpolates F linearly at v + h s e_i, so it is a
semi-Lagrangian step too.)

Work and memory grow as (width / spacing)^n, so four cells are the most. Each rank computes the whole grid.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence

import firedrake as fd
import numpy as np
from mpi4py import MPI

from fem_resnet.activation.activation import Activation, get_activation
from fem_resnet.arguments import function, instance, number
from fem_resnet.control.sets.control_set import ControlSet
from fem_resnet.hjb.cells import Cells
from fem_resnet.hjb.speeds import ExtremalSpeeds, SampledSpeeds, Speeds, SpeedsAtStates
from fem_resnet.hjb.state_grid import StateGrid, axes_of, boxes_in_time, first_box
from fem_resnet.hjb.terminal_cost import terminal_cost
from fem_resnet.hjb.value_function import ValueFunction
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.learning.head import Head
from fem_resnet.learning.loss import Loss
from fem_resnet.log import log
from fem_resnet.ranks import same, together

__all__ = ["solve_value_function"]

#: The largest number of cells.
_LARGEST = 4


def solve_value_function(
    Y: LabelSpace,
    A: ControlSet,
    activation: str | Activation,
    target: np.ndarray | fd.Function | int | Callable[[np.ndarray, np.ndarray], np.ndarray],
    grid: StateGrid,
    *,
    final_time: float,
    head: Head | None = None,
    loss: Loss | None = None,
    running: RunningCost | Callable | None = None,
    monitor: Callable[[float], bool | None] | None = None,
    resume: ValueFunction | None = None,
) -> ValueFunction:
    """F(v, t) for all states v that can be reached from a box, by (4.11), (4.12). Collective; each rank computes all of F.

    The solution is the value function of Theorem 4.2. Where that is not smooth it is a viscosity solution.

    Parameters
    ----------
    Y
        The label domain, with at most 4 nodes on all ranks together.
    A
        The set in which (a(y), b(y, z)) lies for all y and z; any `ControlSet` that does not depend on y.
    activation
        sigma, any. If it does not decrease and L is a function of f alone, the minimum in (4.11) is explicit.
    target
        ftilde at this rank's nodes, shape (nodes,). With a head C: a class, or values at this rank's nodes of `head.Y`. Or the
        terminal cost itself, a function of the states v on all cells, shape (n, states), in the order of `cell_indicators`,
        and of the weights of the cells, shape (n,). It returns an array of shape (states,).
    grid
        The states at t = 0, the spacing of the grid and the memory that it may take.
    final_time
        T > 0.
    head
        What is read from the final state, by (2.9) and with its W and mu as they are now; O = v if left out.
    loss
        The loss of the output, `least_squares` if left out; one in UFL is assembled for each state of the grid.
    running
        The running cost L: a `RunningCost`; or the density of L at y, a function L(f), or a function L(f, a, b, w). Here f
        is an array, a a number, b the values b(y, z) for all z, and w the weights of the cells, so that `b**2 @ w` is int
        b(y, z)^2 dz. If left out, L = 0.
    monitor
        Called with t after each step, backwards from T. If it returns True on any rank, the solution stops: F is then known
        from that t on.
    resume
        A solution with the same arguments that a monitor stopped. It is continued. All that F depends on is compared.

    Returns
    -------
    ValueFunction

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind, differs between ranks, or does not fit `resume`; or if the grids need more memory:
        the message says how much. On all ranks alike.
    Exception
        An error that `running` or the monitor raises on one rank; on all ranks.

    Examples
    --------
    >>> from fem_resnet import Box, StateGrid, class_space
    >>> Y = class_space(1)
    >>> grid = StateGrid([[0.0, 0.5]], spacing=0.01)
    >>> F = solve_value_function(Y, Box((-1, 1), (0, 0)), "identity", [2.0], grid, final_time=1.0)
    >>> F([0.0], 0.0).round(2)  # the speed is at most 1, so that 1 is left of the way to 2
    array([0.5])

    The cost of the wrong class, if O = (v, 0) are the scores of two classes:

    >>> from fem_resnet import Head, cell_indicators, cross_entropy
    >>> head = Head(cell_indicators(Y), 2)
    >>> head.W.set(0, [[1.0], [0.0]])
    >>> F = solve_value_function(
    ...     Y, Box((-1, 1), (0, 0)), "identity", 0, grid, final_time=1.0, head=head, loss=cross_entropy
    ... )
    >>> F([0.0], 0.0).round(2)  # log(1 + 1/e)
    array([0.31])
    """
    check_label_space(Y)
    replicated = (grid.spacing, grid.samples, grid.memory) if isinstance(grid, StateGrid) else grid
    same(
        Y.comm, A=A, activation=activation, grid=replicated, final_time=final_time, running=running, monitor=callable(monitor),
        resume=type(resume),
    )  # fmt: skip
    if instance("A", A, ControlSet).Y is not None:
        raise ValueError(f"A: expected one set for all y, got a {type(A).__name__}; give a Box or another set")
    activation = get_activation(activation)
    if Y.size > _LARGEST:
        raise ValueError(f"Y: expected at most {_LARGEST} nodes, got {Y.size}: the grid of states has as many dimensions")
    instance("grid", grid, StateGrid, "StateGrid(start, spacing) makes one")
    final_time = number("final_time", final_time, above=0)
    if monitor is not None:
        function("monitor", monitor, "a function of the time")
    instance("resume", resume, (ValueFunction, type(None)))
    cells = Cells(Y)
    terminal = terminal_cost(cells, target, head, loss)
    start = cells.gather_batch(grid.start, "start")
    speeds = together(Y.comm, lambda: _speeds(cells, A, activation, running, grid.samples))
    box = first_box(start, grid.spacing)
    boxes, times = together(Y.comm, lambda: boxes_in_time(Y.comm, speeds, box, grid, final_time))
    states = np.meshgrid(*axes_of(boxes[-1], grid.spacing), indexing="ij", sparse=True)
    here = together(Y.comm, lambda: speeds.at(states))
    # Each rank computes all of F: with another density on one of them it would have another F.
    same(Y.comm, A=here.ends, running=here.costs)
    at_end = terminal.on_grid(states)
    same(Y.comm, target=at_end)
    solution = ValueFunction(cells, speeds, terminal, grid.spacing, times, boxes, [])
    if resume is None:
        values = [at_end]
    else:
        _refuse_other(resume, solution, states, here, at_end)
        values = resume.values[::-1]
    _step_backwards(solution, here, values, monitor)
    first = len(times) - len(values)
    return ValueFunction(cells, speeds, terminal, grid.spacing, times[first:], boxes[first:], values[::-1])


def _refuse_other(
    solution: ValueFunction, expected: ValueFunction, states: Sequence[np.ndarray], here: SpeedsAtStates, at_end: np.ndarray
) -> None:
    """Raise ValueError unless a solution belongs to the same problem, from some time on. The message names the difference.

    `here` and `at_end` are the speeds and F(., T) of the expected one on the open grid `states`.
    """
    levels = len(solution.values)

    def equal(name: str) -> bool:
        return np.array_equal(getattr(solution, name), getattr(expected, name)[-levels:])

    def same_terminal_cost() -> bool:
        return np.array_equal(solution.terminal.on_grid(states), at_end)

    same_cells = np.array_equal(solution.cells.weights, expected.cells.weights)
    of_speeds = here.differs(solution.speeds.at(states))
    same_kind = type(solution.terminal) is type(expected.terminal)
    differences = {
        "Y": not same_cells,
        expected.terminal.arguments if same_kind else "target, head or loss": same_cells and not same_terminal_cost(),
        "spacing": solution.spacing != expected.spacing,
        "final_time": solution.times[-1] != expected.times[-1],
        of_speeds: of_speeds is not None,
        "start": not (equal("boxes") and equal("times")),
    }
    different = [name for name, differs in differences.items() if differs]
    if different:
        raise ValueError(
            f"resume: expected a solution with the same arguments that a monitor stopped, got one with another "
            f"{different[0]}; give the arguments that it was made with, or leave resume out"
        )


def _speeds(cells: Cells, A: ControlSet, activation: Activation, running: object, samples: int) -> Speeds:
    """The speeds that controls in A allow, with their costs: extremal ones if L and sigma allow it, else sampled ones."""
    density = _density(running)
    arguments = 1 if density is None else len(inspect.signature(density).parameters)
    if arguments not in (1, 4):
        raise ValueError(f"running: expected a function L(f) or L(f, a, b, w), got one of {arguments} arguments")
    if arguments == 1 and activation.properties.non_decreasing:
        if caveat := activation.properties.caveat("non_decreasing"):
            log(
                cells.Y.comm, logging.WARNING,
                "value function: the speeds of each cell are taken for the interval between the extremal ones: %s", caveat,
            )  # fmt: skip
        return ExtremalSpeeds(cells.weights, A, activation, density)
    of_state = np.zeros_like if density is None else density
    general = density if arguments == 4 else lambda f, a, b, w: of_state(f)
    return SampledSpeeds(cells.weights, A, activation, general, samples)


def _density(running: object) -> Callable[..., np.ndarray] | None:
    """The density of L over y, a function of f, or of f, a, b(y, .) and the weights; None for L = 0."""
    if running is None:
        return None
    if not isinstance(running, RunningCost):
        return function("running", running, "a RunningCost, or a function L(f) or L(f, a, b, w)")
    running.refuse_pairs("solve_value_function")
    l, kappa = running.density.value, running.kernel
    if running.of_state_alone:
        return lambda f: l(f, np.zeros(1))
    return lambda f, a, b, w: l(f, a) + kappa / 2 * (b**2 @ w)


def _step_backwards(
    solution: ValueFunction,
    here: SpeedsAtStates,
    values: list[np.ndarray],
    monitor: Callable[[float], bool | None] | None,
) -> None:
    """Append F at earlier and earlier times to `values`, which begins with F(., T), until t = 0 or the monitor stops.

    `solution` has the times and boxes, and `here` the speeds on the largest box.
    """
    comm, times, boxes, spacing = solution.cells.Y.comm, solution.times, solution.boxes, solution.spacing
    steps, there = len(times) - 1, list(range(boxes.shape[-1]))
    back = there[::-1]
    while (done := len(values)) <= steps:
        k = steps - done
        order = there if done % 2 else back
        values.append(_step(here, values[-1], boxes[[k, k + 1, -1]], times[k + 1] - times[k], spacing, order))
        stops = False
        if monitor is not None:
            stops = comm.allreduce(together(comm, lambda: bool(monitor(float(times[k])))), op=MPI.LOR)
        if done * 10 // steps > (done - 1) * 10 // steps:
            log(comm, logging.INFO, "value function: t = %.3g, step %d of %d", times[k], done, steps)
        if stops:
            return


def _step(here: SpeedsAtStates, F: np.ndarray, boxes: np.ndarray, h: float, spacing: float, order: list[int]) -> np.ndarray:
    """F a step of length h earlier, one cell after the other in this order.

    `boxes` has the box of the result, the larger box of F, and the largest box, to which `here` belongs.
    """
    to, box, (origin, _) = boxes[0], boxes[1].copy(), boxes[2]
    for i in order:
        cut = to[0, i] - box[0, i], to[1, i] - box[0, i] + 1
        # Where the edge is not cut, no speed leads across it, so the difference across it, here 0, is not used.
        slope = np.diff(F, axis=i, prepend=np.take(F, [0], axis=i), append=np.take(F, [-1], axis=i)) / spacing
        at, ahead = (tuple(slice(*part) if j == i else slice(None) for j in range(F.ndim)) for part in (cut, np.add(cut, 1)))
        box[:, i] = to[:, i]
        inner = here.within(tuple(slice(a, b + 1) for a, b in (box - origin).T))
        F = F[at] + h * inner.least(i, slope[ahead], slope[at])
    return F
