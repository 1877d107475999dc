"""The feedback map of a value function, and the trajectories that follow it: Step 2 of section 4.3.

The controls at the running state f~(s) attain the minimum of (4.11),

    (a~, b~) = argmin over (a, b) of  int D_v F(f~(s), s) sigma(a - B_b f~(s)) dy + int L(f~(s), a, b) dy
    f~_s = sigma( a~(f~(s)) - B_{b~(f~(s))} f~(s) ),    f~(t) = v.

They are optimal: J is F(v, t), by Theorem 4.3. (Step 2 (ii) prints the controls of the first state v, and (iii) leaves b
without its tilde. As printed the cost is not F.) The paper's f~ is the target elsewhere; here the target is `target`.
Slopes of F are one-sided, as in the scheme of `equation`, so at a kink the controls belong to one of its sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fem_resnet.arguments import instance, integer, number
from fem_resnet.control.controls import Controls
from fem_resnet.hjb.speeds import Choice
from fem_resnet.hjb.value_function import ValueFunction
from fem_resnet.ranks import same, together

__all__ = ["ClosedLoop", "closed_loop", "feedback_controls", "feedback_speeds"]


def _choose(F: ValueFunction, states: np.ndarray, t: float) -> Choice:
    """The best rows at states on all cells, shape (n, m). L and A may be a user's functions: call this in `together`."""
    # A step of the scheme uses F at the end of the step, whose grid has a cell more on each side.
    forward, backward = F.slopes(states, F.times[F.level(t) + 1])
    return F.speeds.choose(list(states), forward, backward)


def feedback_speeds(F: ValueFunction, v: np.ndarray, t: float) -> np.ndarray:
    """f~_s = sigma(a~(v) - B_{b~(v)} v) at the time t, shape (nodes, samples). Collective.

    Parameters
    ----------
    F
        The value function.
    v
        States at this rank's nodes, shape (nodes,) or (nodes, samples), inside of the grid.
    t
        In [0, T].

    Raises
    ------
    TypeError, ValueError
        If F is no value function, v is not in the grid, or t not in [0, T]; on all ranks alike.
    """
    states = _known(F).states(v, t)
    return together(F.cells.Y.comm, lambda: _choose(F, states, t)).speeds[F.cells.own]


def feedback_controls(F: ValueFunction, v: np.ndarray, t: float) -> Controls:
    """(a~, b~) at one state and time. Collective.

    If L does not depend on (a, b), b~ has rank 2 at most, as in (4.10). Otherwise it has one row for each cell.

    Parameters
    ----------
    F
        The value function.
    v
        One state at this rank's nodes, shape (nodes,), inside of the grid.
    t
        In [0, T].

    Raises
    ------
    TypeError, ValueError
        As for `feedback_speeds`, and if v has more than one sample.
    """
    states = _known(F).states(v, t)
    if states.shape[1] != 1:
        raise ValueError(f"v: expected one state, got {states.shape[1]}")
    choice = together(F.cells.Y.comm, lambda: _choose(F, states, t))
    own = F.cells.own
    return Controls(*(part[..., 0][own] for part in (choice.a, choice.phi, choice.psi)))


@dataclass(frozen=True)
class ClosedLoop:
    """Trajectories that follow the feedback, by explicit Euler steps. Get them from `closed_loop`.

    Attributes
    ----------
    F : ValueFunction
    times : numpy.ndarray
        Shape (steps + 1,).
    states : numpy.ndarray
        f~ at this rank's nodes, shape (steps + 1, nodes, samples).
    cost : numpy.ndarray
        J of section 4.3, the running cost plus the terminal cost, shape (samples,). It is F(v, t) up to the order of the
        scheme.
    """

    F: ValueFunction
    times: np.ndarray
    states: np.ndarray
    cost: np.ndarray

    def controls(self, step: int, sample: int = 0) -> Controls:
        """The controls of one step, which are constant on it. Collective.

        Parameters
        ----------
        step
            From 0 to steps - 1.
        sample
            From 0 to samples - 1.

        Raises
        ------
        ValueError
            If there is no such step or sample, or they differ between ranks.
        """
        same(self.F.cells.Y.comm, step=step, sample=sample)
        step = integer("step", step, least=0, most=len(self.times) - 2)
        sample = integer("sample", sample, least=0, most=self.cost.size - 1)
        return feedback_controls(self.F, self.states[step][:, sample], self.times[step])


def closed_loop(F: ValueFunction, v: np.ndarray, t: float = 0.0, *, steps: int | None = None) -> ClosedLoop:
    """Follow the feedback from v at the time t until T, which costs F(v, t) (Theorem 4.3). Collective.

    Parameters
    ----------
    F
        The value function.
    v
        States at this rank's nodes, shape (nodes,) or (nodes, samples).
    t
        In [0, T).
    steps
        The number of steps, of equal length. If left out, the steps of the value function are taken.

    Raises
    ------
    TypeError, ValueError
        If F is no value function, v is not in the grid, t not in [0, T), or `steps` is no positive integer; on all ranks
        alike.

    Examples
    --------
    >>> from fem_resnet import Box, StateGrid, class_space, solve_value_function
    >>> Y = class_space(1)
    >>> grid = StateGrid([[0.0, 0.5]], spacing=0.01)
    >>> F = solve_value_function(Y, Box((-1, 1), (0, 0)), "identity", [2.0], grid, final_time=1.0)
    >>> loop = closed_loop(F, [0.0])
    >>> loop.states[-1].round(2), loop.cost.round(2)
    (array([[1.]]), array([0.5]))
    """
    comm = _known(F).cells.Y.comm
    same(comm, t=t, steps=steps)
    final, t = F.times[-1], number("t", t)
    if not 0 <= t < final:
        raise ValueError(f"t: expected a time in [0, {final:g}), got {t!r}")
    if steps is not None:
        steps = integer("steps", steps)
    times = np.append(t, F.times[F.times > t]) if steps is None else np.linspace(t, final, steps + 1)
    start = F.states(v, t)
    states, running = together(comm, lambda: _followed(F, start, times))
    return ClosedLoop(F, times, states[:, F.cells.own], running + F.terminal.at(states[-1]))


def _followed(F: ValueFunction, start: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """States at the times, shape (steps + 1, n, samples), and their running cost, shape (samples,)."""
    states, cost = [start], np.zeros(start.shape[1])
    for now, length in zip(times, np.diff(times)):
        choice = _choose(F, states[-1], now)
        cost = cost + length * choice.cost
        states.append(states[-1] + length * choice.speeds)
    return np.array(states), cost


def _known(F: ValueFunction) -> ValueFunction:
    return instance("F", F, ValueFunction, "solve_value_function makes one")
