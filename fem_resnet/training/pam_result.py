"""Reports, results and checkpoints of proximal alternating minimisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import firedrake as fd
import numpy as np

from fem_resnet.arguments import integer, number
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.training.checkpoint import Numbers, State, TrainingCheckpoint, read_state, write_state
from fem_resnet.training.gradient import Result
from fem_resnet.training.progress import Progress
from fem_resnet.training.proximal import ProximalGroup

__all__ = ["Iteration", "PAMProgress", "PAMResult", "continued", "read_result", "result_of_no_iteration", "write_result"]

_TOOL = "train_pam"
#: Numbers of a result by name, and the names of its arrays: those with an entry for each iteration and the start, those with
#: one for each iteration, and those with one for each iteration and group.
_NUMBERS: Numbers = {
    "iterations": partial(integer, least=0), "tau": partial(number, above=0), "momentum": partial(number, least=1),
    "seconds": partial(number, least=0),
}  # fmt: skip
_WITH_START, _OF_ITERATIONS, _OF_GROUPS = ("values", "gradient_norms"), ("slacks", "taus"), ("step_norms", "inner_iterations")
_SERIES = (*_WITH_START, *_OF_ITERATIONS, *_OF_GROUPS)


@dataclass(frozen=True)
class PAMProgress(Progress):
    """One iteration over all groups.

    Attributes
    ----------
    iteration, iterations, value, gradient_norm, seconds
        As of `Progress`.
    tau : float
        The step size of this iteration.
    slack : float
        The slack of the inequality below (5.1): its right-hand side minus its left.
    inner_iterations : int
        TAO's iterations in all groups together.
    """

    tau: float
    slack: float
    inner_iterations: int

    @property
    def numbers(self) -> str:
        return f"{super().numbers}   tau = {self.tau:.1e}   slack = {self.slack:.1e}   {self.inner_iterations:3d} inner"


@dataclass(frozen=True, repr=False)
class PAMResult(Result):
    """How a proximal alternating minimisation ended, with everything that is needed to continue it.

    It has the attributes of `Result`. There `values` has J itself, and `gradient_norms` has its gradient in all groups. The
    reason is "GRADIENT_TOLERANCE", "ITERATIONS", "STOPPED" by the monitor, "INTERRUPTED" by Ctrl-C, "TERMINATED" by SIGTERM,
    or "NO_PROGRESS" if no group could be moved.

    Attributes
    ----------
    groups : tuple of str
        The names of the groups, in their order.
    slacks : numpy.ndarray
        The slack of the inequality below (5.1) in each iteration: >= 0 up to round-off, except for inertial steps.
    step_norms : numpy.ndarray
        |x_i^(k+1) - x_i^k|, shape (iterations, groups).
    inner_iterations : numpy.ndarray
        TAO's iterations, shape (iterations, groups).
    taus : numpy.ndarray
        tau in each iteration.
    controls : list of list of numpy.ndarray
        The coefficients that were reached: for each group, as `Parameter.get` gives them on this rank.
    previous : list of list of numpy.ndarray
        The coefficients one iteration before.
    tau, momentum : float
        tau of the next iteration, and its Nesterov number t_k, which is 1 after a restart.
    """

    groups: tuple[str, ...]
    slacks: np.ndarray
    step_norms: np.ndarray
    inner_iterations: np.ndarray
    taus: np.ndarray
    previous: list[list[np.ndarray]]
    tau: float
    momentum: float


class Iteration(NamedTuple):
    """One iteration: J after it, its slack, and for each group the result, the norm of its step and TAO's iterations.

    `solved` is whether all inner problems were solved and their results taken, `restart` whether an inertial step was not.
    """

    value: float
    slack: float
    reached: list[list[np.ndarray]]
    step_norms: list[float]
    inner_iterations: list[int]
    solved: bool
    restart: bool


def result_of_no_iteration(groups: Sequence[ProximalGroup], value: float, norm: float, tau: float) -> PAMResult:
    """The result before the first iteration, at the present coefficients, where J and its gradient's norm are these."""
    at = [group.get() for group in groups]
    none = np.zeros(0)
    return PAMResult(
        value=value, gradient_norm=norm, iterations=0, converged=False, reason="", values=np.array([value]),
        gradient_norms=np.array([norm]), seconds=0.0, groups=tuple(group.name for group in groups), slacks=none,
        step_norms=np.zeros((0, len(groups))), inner_iterations=np.zeros((0, len(groups)), dtype=int), taus=none,
        controls=at, previous=at, tau=float(tau), momentum=1.0,
    )  # fmt: skip


def continued(first: PAMResult, history: Sequence[tuple[Iteration, float, float]], **changed) -> PAMResult:
    """A result with more iterations: each with its tau, and with the norm of the gradient after it."""

    def joined(before: np.ndarray, new: list) -> np.ndarray:
        return np.concatenate([before, np.reshape(new, (len(new), *before.shape[1:])).astype(before.dtype)])

    steps = [step for step, _, _ in history]
    values = joined(first.values, [step.value for step in steps])
    norms = joined(first.gradient_norms, [norm for _, _, norm in history])
    return replace(
        first, value=float(values[-1]), gradient_norm=float(norms[-1]), iterations=len(values) - 1,
        converged=changed["reason"] == "GRADIENT_TOLERANCE", values=values, gradient_norms=norms,
        slacks=joined(first.slacks, [step.slack for step in steps]),
        step_norms=joined(first.step_norms, [step.step_norms for step in steps]),
        inner_iterations=joined(first.inner_iterations, [step.inner_iterations for step in steps]),
        taus=joined(first.taus, [tau for _, tau, _ in history]), **changed,
    )  # fmt: skip


def write_result(
    problem: LearningProblem, groups: Mapping[str, Sequence[fd.Function]], checkpoint: TrainingCheckpoint, result: PAMResult
) -> None:
    """Write a result as a checkpoint. Collective.

    Parameters
    ----------
    problem, checkpoint, result
        The learning problem, where, and what.
    groups
        The Functions of each group by its name, in the order of the groups.

    Raises
    ------
    OSError
        As of `write_state`.
    """
    numbers = {name: getattr(result, name) for name in _NUMBERS}
    numbers["seconds"] = problem.net.Y.comm.bcast(result.seconds)  # the others are the same on all ranks
    series = {name: np.ravel(getattr(result, name)) for name in _SERIES}
    coefficients = {}
    for name, of_groups in (("controls", result.controls), ("previous", result.previous)):
        found = {id(f): c for functions, arrays in zip(groups.values(), of_groups) for f, c in zip(functions, arrays)}
        coefficients[name] = [found[id(f)] for f in problem.functions]
    write_state(problem, _TOOL, checkpoint, State(numbers, series, coefficients))


def read_result(problem: LearningProblem, groups: Mapping[str, Sequence[fd.Function]], path: Path) -> PAMResult:
    """Read what `write_result` wrote. Collective.

    Parameters
    ----------
    problem, groups
        As for `write_result`.
    path
        An existing file.

    Raises
    ------
    ValueError
        As of `read_state`.
    """
    state = read_state(problem, _TOOL, path, _NUMBERS, _SERIES, ["controls", "previous"])
    count = state.numbers["iterations"]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_WITH_START, (count + 1,))
    shapes |= dict.fromkeys(_OF_ITERATIONS, (count,))
    shapes |= {name: (count, len(groups)) for name in _OF_GROUPS}
    if any(array.size != np.prod(shapes[name]) for name, array in state.series.items()):
        raise ValueError(f"resume: {path} is no checkpoint to go on from: expected the numbers of {count} iterations")
    arrays: dict[str, Any] = {name: array.reshape(shapes[name]) for name, array in state.series.items()}
    arrays["inner_iterations"] = arrays["inner_iterations"].astype(int)
    lists: dict[str, Any] = {}
    for name, coefficients in state.coefficients.items():
        found = {id(f): c for f, c in zip(problem.functions, coefficients, strict=True)}
        lists[name] = [[found[id(f)] for f in functions] for functions in groups.values()]
    return PAMResult(
        value=float(arrays["values"][-1]), gradient_norm=float(arrays["gradient_norms"][-1]), converged=False, reason="",
        groups=tuple(groups), **state.numbers, **arrays, **lists,
    )  # fmt: skip
