"""The value function at one state, on any mesh, by open-loop optimal controls: a Lagrangian method for section 4.3.

    F(v, 0) = inf over controls in A of  int_0^T int L(f) dy dt + terminal cost,     f(0) = v

The grid of `hjb.equation` has a dimension for each cell. Remark 4.4 shows another way: for L = 0 (and for L of f alone) the
characteristics of (4.11) are the coupled system of the maximum principle. So at one v the extended variant of Algorithm 2
solves for the characteristic that begins there, and D_v F(v, 0) = r(0) in the sign of section 4.1, where F is smooth. Work
grows as one network does. F(v, t) is that of a network of the length T - t, as A and L do not depend on time.

What is found costs what `value` says, so that F is no more than that, up to the time step. It need not be the least: several
trajectories may obey the maximum principle. So the method begins at several controls, and all their values are there to be
compared. r(0) is right to first order in the length of the layers where a component of f changes its sign, or controls switch,
inside of a layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import firedrake as fd
import numpy as np
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import instance, integer, number
from fem_resnet.control.controls import Controls
from fem_resnet.control.extremal_controls import extremal_controls
from fem_resnet.control.hamiltonian import Pair
from fem_resnet.control.maximum_principle import Residual, pmp_residual
from fem_resnet.control.sets.control_set import ControlSet
from fem_resnet.features import STEPPED, supports
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.log import log
from fem_resnet.training.msa import MSAProgress, MSAResult, msa, problem_of
from fem_resnet.training.signals import Signals

__all__ = ["OpenLoopValue", "open_loop_value"]

#: Where the penalty of "extended" would have to be larger, J falls by round-off alone.
_LARGEST_RHO = 1e4


@dataclass(frozen=True)
class OpenLoopValue:
    """The value function at one state, and the trajectory that attains it. Get one from `open_loop_value`.

    Attributes
    ----------
    value : float
        J of the best controls that were found, an upper bound of F(v, 0) up to the time step.
    gradient : Function
        r(0) of these controls, which is D_v F(v, 0) where F is smooth, in the space of the problem's inputs.
    problem : LearningProblem
        The problem with the network of these controls.
    controls : list of Controls
        The same, one for each layer. Those of the first layer are the feedback at v.
    values : numpy.ndarray
        J at the end of each start, shape (starts,). Where they differ, there are several local minima.
    residual : Residual
        How far the best controls are from the maximum principle.
    """

    value: float
    gradient: fd.Function
    problem: LearningProblem
    controls: list[Controls]
    values: np.ndarray
    residual: Residual

    def __str__(self) -> str:
        return f"F up to {self.value:.8g}, from {self.values.size} starts up to {self.values.max():.8g}; {self.residual}"


@supports("channels", "nodal_bias", "bases_by_layer", *STEPPED, "head", "running", "weights")
def open_loop_value(
    problem: LearningProblem,
    A: ControlSet,
    *,
    starts: int = 3,
    iterations: int = 50,
    tolerance: float = 1e-8,
    seed: int = 0,
) -> OpenLoopValue:
    """F(v, 0) and D_v F(v, 0) at the input v of a learning problem of one sample, for controls in A. Collective.

    Ctrl-C stops after the present iteration, with the best of the starts made so far.

    Parameters
    ----------
    problem
        Its network has the activation, the final time and the time steps, and its head and loss the terminal cost; W and mu
        are held. Bias and kernel have a value on each layer, a running cost is one of f alone, and there is no regulariser.
        The problem is not changed.
    A
        A convex set, in which (a, b) lies at all y and z.
    starts
        From how many controls `msa` begins: the present ones, brought into A, and controls that are extremal at v for random
        waves as co-states.
    iterations
        The largest number of its iterations from each of them.
    tolerance
        It ends before that with an iteration that lowers J by less than this part of its value at the present controls.
    seed
        Of the random waves: the same on any number of ranks.

    Returns
    -------
    OpenLoopValue

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind or differs between ranks, A is not convex, or sigma decreases somewhere.

    Examples
    --------
    >>> found = open_loop_value(problem, Box((-1, 1), (-1, 1)))  # doctest: +SKIP
    """
    instance("A", A, ControlSet)
    starts, iterations = integer("starts", starts), integer("iterations", iterations, least=0)
    tolerance, seed = number("tolerance", tolerance, least=0), integer("seed", seed, least=0, most=np.inf)
    net, Y = problem.net, problem.net.Y
    if not net.activation.properties.non_decreasing:
        raise ValueError(f"activation: expected one that does not decrease, got {net.activation.name}")
    v, rng = Y.values(problem.batch.inputs), np.random.default_rng(seed)
    with stop_annotating():
        least_fall = tolerance * abs(float(problem.evaluate()[0]))
    results: list[MSAResult] = []
    with Signals(Y.comm) as signals:
        for start in range(starts):
            begin = problem
            if start > 0:
                pair = Pair(v, _random_wave(Y, rng), "maximise")
                begin = problem_of(problem, [extremal_controls(Y, A, pair).controls] * net.layers)
            results.append(
                msa(
                    begin, A, iterations=iterations, project=start == 0, largest_rho=_LARGEST_RHO,
                    monitor=_falls_less(least_fall),
                )
            )  # fmt: skip
            log(
                Y.comm, logging.INFO, "open-loop value: start %d of %d, J = %.8e after %d iterations",
                start + 1, starts, results[-1].value, results[-1].iterations,
            )  # fmt: skip
            if signals.reason():
                break
    best = min(results, key=lambda result: result.value)
    J, run = best.problem.record()
    J.derivative()
    values = np.array([result.value for result in results])
    return OpenLoopValue(
        best.value, run.costate(0), best.problem, best.controls, values, pmp_residual(best.problem, A)
    )  # fmt: skip


def _random_wave(Y: LabelSpace, rng: np.random.Generator) -> np.ndarray:
    """A wave of the length of Y or so, shape (nodes, 1). Collective."""
    x = Y.coordinates
    low, high = (
        Y.comm.allreduce(end, op=np.maximum)
        for end in (-x.min(axis=0, initial=np.inf), x.max(axis=0, initial=-np.inf))
    )  # fmt: skip
    frequencies = rng.normal(scale=4.0, size=x.shape[1]) / ((low + high).max() or 1.0)
    phases = np.repeat(rng.uniform(0, 2 * np.pi, Y.channels), Y.nodes // Y.channels)
    return np.cos((x + low) @ frequencies + phases)[:, None]


def _falls_less(least: float) -> Callable[[MSAProgress], bool]:
    """A monitor that stops where an iteration lowers J by less than this."""
    before = np.inf

    def stops(progress: MSAProgress) -> bool:
        nonlocal before
        fall, before = before - progress.value, progress.value
        return fall < least

    return stops
