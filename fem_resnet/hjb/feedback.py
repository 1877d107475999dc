"""The feedback map of a value function, and what it steers: Step 2 of section 4.3.

At the running state f~(s) the controls are those that attain the minimum of (4.11),

    (a~, b~) = argmin over (a, b) of  int D_v F(f~(s), s) sigma(a - B_b f~(s)) dy + int L(f~(s), a, b) dy
    f~_s = sigma( a~(f~(s)) - B_{b~(f~(s))} f~(s) ),    f~(t) = v.

They are optimal, J is F(v, t): Theorem 4.3. (Step 2 (ii) prints the controls of the first state v, and (iii) leaves b
without its tilde: as printed the cost is not F. The paper's f~ is the target elsewhere; here that is `target`.) Slopes of
F are one-sided, as in the scheme of `value_function`, so that at a kink the controls are those of one of its sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fem_resnet.arguments import instance, integer, number
from fem_resnet.control.hamiltonian import Controls
from fem_resnet.hjb.speeds import Choice
from fem_resnet.hjb.value_function import ValueFunction
from fem_resnet.ranks import same, together

__all__ = ["ClosedLoop", "closed_loop", "feedback_controls", "feedback_speeds"]


def _choose(F: ValueFunction, states: np.ndarray, t: float) -> Choice:
    """The best rows; L and A may be a user's functions, so call it on all ranks together."""
    # A step of the scheme goes to F at its end, which is known a cell further on each side.
    slopes = F.slopes(states, F.times[F.level(t) + 1])
    return F.speeds.choose(list(states), *slopes)


def feedback_speeds(F: ValueFunction, v: np.ndarray, t: float) -> np.ndarray:
    """f~_s = sigma(a~(v) - B_{b~(v)} v) at the time t, shape (nodes, samples). Collective.

    Parameters
    ----------
    F
        The value function.
    v
        States at the owned nodes, shape (nodes,) or (nodes, samples), in the grid.
    t
        In [0, T].

    Raises
    ------
    ValueError
        If v is not in the grid, or t not in [0, T].
    """
    states = _known(F).states(v, t)
    return together(F.cells.Y.comm, lambda: _choose(F, states, t)).speeds[F.cells.own]


def feedback_controls(F: ValueFunction, v: np.ndarray, t: float) -> Controls:
    """(a~, b~) at one state and time. Collective.

    b~ has rank 2 at most where L does not depend on (a, b), as in (4.10), else one row a cell. Parameters and errors are those
    of `feedback_speeds`; v has the shape (nodes,).
    """
    states = _known(F).states(v, t)
    if states.shape[1] != 1:
        raise ValueError(f"v: expected one state, got {states.shape[1]}")
    choice = together(F.cells.Y.comm, lambda: _choose(F, states, t))
    own = F.cells.own
    return Controls(*(part[..., 0][own] for part in (choice.a, choice.phi, choice.psi)))


@dataclass(frozen=True)
class ClosedLoop:
    """Trajectories under feedback, of explicit Euler steps. Get them from `closed_loop`.

    Attributes
    ----------
    F : ValueFunction
    times : numpy.ndarray
        Shape (steps + 1,).
    states : numpy.ndarray
        f~ at the owned nodes, shape (steps + 1, nodes, samples).
    cost : numpy.ndarray
        J of section 4.3, running cost and distance at the end, shape (samples,): F(v, t) up to the order of the scheme.
    """

    F: ValueFunction
    times: np.ndarray
    states: np.ndarray
    cost: np.ndarray

    def controls(self, step: int, sample: int = 0) -> Controls:
        """Those of a step, constant on it. Collective.

        Parameters
        ----------
        step
            From 0 to steps - 1.
        sample
            From 0 to samples - 1.
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
        States at the owned nodes, shape (nodes,) or (nodes, samples).
    t
        In [0, T).
    steps
        How many, of equal length; those of the value function if left out.

    Raises
    ------
    ValueError
        If v is not in the grid, or t not in [0, T), or `steps` is no positive number.

    Examples
    --------
    >>> from fem_resnet import Box, class_space, solve_value_function
    >>> Y = class_space(1)
    >>> F = solve_value_function(Y, Box((-1, 1), (0, 0)), "identity", [2.0], [[0.0, 0.5]], final_time=1.0, spacing=0.01)
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
    states, cost = together(comm, lambda: _followed(F, start, times))
    return ClosedLoop(F, times, states[:, F.cells.own], cost)


def _followed(F: ValueFunction, start: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """States at the times, shape (steps + 1, n, samples), and what they cost, shape (samples,)."""
    states, cost = [start], 0.0
    for now, length in zip(times, np.diff(times)):
        choice = _choose(F, states[-1], now)
        cost = cost + length * choice.cost
        states.append(states[-1] + length * choice.speeds)
    return np.array(states), cost + F.cells.weights @ (states[-1] - F.target[:, None]) ** 2 / 2


def _known(F: ValueFunction) -> ValueFunction:
    return instance("F", F, ValueFunction, "solve_value_function makes one")
