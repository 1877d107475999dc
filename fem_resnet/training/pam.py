"""Proximal alternating minimisation: Algorithm 1 of section 5.1.

Let x_1, x_2, .. be the groups of parameters: the bias a, the kernel b, then the head and any others. One group after the
other takes

    x_i <- argmin_x  J(.., x, ..) + 1/(2 tau) |x - x_i|^2                                                  (5.1)

in the norms of label domain and time. J contains the regulariser, so with Tikhonov's it is J_mod of (4.6), with the
gradients (4.7). (Section 5.1 prints sigma for sigma' in the gradients of J. Those used here are (4.3), (4.4).)

TAO minimises over a group (`proximal`). Its result is taken only if the proximal functional, evaluated there, is no higher
than at TAO's start. So for any tau > 0, and for any accuracy of TAO,

    J(a^(k+1), b^(k+1)) <= J(a^k, b^k) - 1/(2 tau) ( |a^(k+1) - a^k|^2 + |b^(k+1) - b^k|^2 ).

This is the inequality below (5.1), with a square for each group. The result has its slack, the right-hand side minus the left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import NamedTuple

import numpy as np
from petsc4py import PETSc
from pyadjoint import ReducedFunctional
from pyadjoint.enlisting import Enlist

from fem_resnet.arguments import instance, integer, number, real_array
from fem_resnet.features import HELD, REGULARISED, STEPPED, supports
from fem_resnet.learning.batch import Batch
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.options import checked_options, checked_prefix
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.ranks import same
from fem_resnet.training.checkpoint import TrainingCheckpoint, checked_checkpoint
from fem_resnet.training.gradient import options_over
from fem_resnet.training.pam_result import (
    Iteration,
    PAMProgress,
    PAMResult,
    continued,
    read_result,
    result_of_no_iteration,
    write_result,
)
from fem_resnet.training.progress import Watch, check_monitor
from fem_resnet.training.proximal import ProximalGroup, ProximalStep
from fem_resnet.training.signals import SIGNALLED

__all__ = ["INNER_PARAMETERS", "train_pam"]

#: TAO's options for the inner problems, over `gradient.SOLVER_PARAMETERS`, that the user does not give.
INNER_PARAMETERS = {"tao_max_it": 30}

#: tau grows if every group takes at most so many inner iterations.
_FEW = 5
#: Round-off of J and of the squares in the inequality below (5.1), relative to J.
_ROUND_OFF = 32 * np.finfo(float).eps


@supports(
    "channels",
    "no_layers", "gradient_flow", *HELD, *STEPPED, "head", *REGULARISED, "running", "running_of_controls",
    "running_of_pairs", "derivatives",
    "observed_times", "checkpoints", "learned_initial", "learned_both", "lift", "many_samples", "weights",
)  # fmt: skip
@supports(
    "channels", "no_layers", "gradient_flow", *HELD, *STEPPED, "head", *REGULARISED, "running", "running_of_controls",
    "running_of_pairs",
    "checkpoints", "lift", "many_samples", "weights", tool="train_pam, batches",
    when=lambda *given, batches=None, **options: batches is not None, parted=("start",),
)  # fmt: skip
@PETSc.Log.EventDecorator("fem_resnet:train_pam")
def train_pam(
    problem: LearningProblem,
    solver_parameters: dict | None = None,
    *,
    step: ProximalStep | float = 1.0,
    iterations: int = 100,
    gradient_tolerance: float = 1e-6,
    batches: Sequence[Batch] | None = None,
    options_prefix: str | None = None,
    monitor: Callable[[PAMProgress], bool | None] | None = None,
    quiet: bool = False,
    start: PAMResult | None = None,
    checkpoint: TrainingCheckpoint | None = None,
    resume: str | Path | None = None,
) -> PAMResult:
    """Minimise J by Algorithm 1, proximal alternating minimisation (5.1), from the present parameters. Collective.

    The parameters then hold the result. If an evaluation or the monitor raises, they hold the result of the last complete
    iteration, and the error goes on. Ctrl-C stops after the present iteration, as in `train`.

    Parameters
    ----------
    problem
        The learning problem.
    solver_parameters, options_prefix
        TAO's options for the inner problems, over `gradient.SOLVER_PARAMETERS` and `INNER_PARAMETERS`: L-BFGS, or Newton's
        method with "tao_type" "nls". An inner problem ends by `ProximalStep.accuracy` or by TAO's own tests.
    step
        How a group moves. A positive number stands for ``ProximalStep(tau=number)``.
    iterations
        The largest number of iterations in this call; with `resume` since the start of the first one.
    gradient_tolerance
        The algorithm stops where the gradient of J is no larger than this times the gradient at the start (of the first
        call, with `start`), in the label measure; or no larger than this times J, in norms without units (`without_units`).
        Not used with `batches`.
    batches
        Batches that take the place of the problem's own, for example ``problem.minibatches(32, seed=1)``: iteration k uses the
        k-th of them, over and over. Value, gradient and slack then belong to J of that batch, for which the inequality
        holds within the iteration. For J of all samples *nothing* is guaranteed: it may rise, and with a fixed tau the
        parameters need not converge. Not for a problem that learns its inputs or has `derivatives`.
    monitor
        Called after every iteration on every rank. If it returns True on any rank, the algorithm stops. If left out, each
        iteration is shown on rank 0, as by `train`.
    quiet
        Whether nothing is shown.
    start
        The result of an earlier call on as many ranks, which is continued: parameters, momentum, tau and history come from it,
        and the result is the same as from one call. Other arguments should be as before.
    checkpoint
        Where the result so far is written, and every how many iterations; J is recorded anew there.
    resume
        The file of a checkpoint, from which the training goes on in place of the present parameters, as of `train`: with the
        same arguments, on as many ranks, up to round-off. Iterations after the last checkpoint are made again.

    Returns
    -------
    PAMResult

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit or differs between ranks, or TAO does not ask for an option; or if `resume` is no
        checkpoint of such a problem, with values at nodes on these ranks.
    OSError
        If a checkpoint cannot be written, or is not there.
    StepFailure
        If the state overflows in a trial step.
    ArithmeticError
        If the inequality is violated by more than round-off. This happens only if J gives different numbers for the same
        parameters.

    Examples
    --------
    >>> result = train_pam(problem, step=10.0, iterations=20)  # doctest: +SKIP
    >>> result = train_pam(problem, step=10.0, iterations=20, start=result)  # doctest: +SKIP
    >>> bool((result.slacks > -1e-14).all())  # doctest: +SKIP
    True
    >>> result = train_pam(problem, checkpoint=TrainingCheckpoint("training.checkpoint"))  # doctest: +SKIP
    >>> result = train_pam(problem, resume="training.checkpoint")  # doctest: +SKIP
    """
    comm, clock = problem.net.Y.comm, time.perf_counter()
    # Coefficients in `start` are parts of this rank, and seconds its own.
    same(comm, start=(start.groups, start.iterations, start.tau, start.momentum) if isinstance(start, PAMResult) else start)
    step = step if isinstance(step, ProximalStep) else ProximalStep(number("step", step, above=0))
    integer("iterations", iterations, least=0)
    number("gradient_tolerance", gradient_tolerance, least=0)
    _check_batches(batches)
    instance("start", start, (PAMResult, NoneType), "an earlier call returns one")
    checked_prefix(options_prefix)
    check_monitor(monitor, quiet)
    given = checked_options(solver_parameters)
    checkpoint, path = checked_checkpoint(comm, checkpoint, resume)
    if path is not None and start is not None:
        raise ValueError(f"start: expected None with resume={str(path)!r}, from which all comes; got {start!r}")
    if batches is not None:
        problem = problem.replace(batch=batches[0])
    members = _members(problem)
    functions = {name: [f for p in group for f in p.functions] for name, group in members.items()}
    most = iterations if start is None else start.iterations + iterations
    if path is not None:
        start = read_result(problem, functions, path)
    if start is not None:
        _check_start(start, members)
        for group, coefficients in zip(members.values(), start.controls):
            for (parameter, k), c in zip(((p, k) for p in group for k in range(len(p.functions))), coefficients):
                parameter.write(k, c)

    def begin(first: PAMResult | None) -> tuple[_Course, float]:
        """Record J, and go on from a result; also the norm of the gradient that is small enough."""
        J, _ = problem.record()
        norm, _ = _gradient_norms(problem, J)
        least = gradient_tolerance * (norm if first is None else first.gradient_norms[0])
        options = options_over(INNER_PARAMETERS | {"tao_gatol": 0.1 * least}, solver_parameters)
        groups = _groups(problem, members, J, options, options_prefix, given)
        first = first or result_of_no_iteration(groups, float(J.functional), norm, step.tau)
        return _Course(problem, J, groups, step, batches, first), least

    course, least = begin(start)
    clock -= 0.0 if start is None else start.seconds

    def report(done: Iteration | None, tau: float) -> str | None:
        """The reason to stop, if there is one."""
        seconds = time.perf_counter() - clock
        slack, inner = (0.0, 0) if done is None else (done.slack, int(sum(done.inner_iterations)))
        return watch.reason(PAMProgress(course.number, most, course.value, course.norm, seconds, tau, slack, inner))

    watch = Watch(comm, monitor, quiet)
    try:
        with watch:
            reason = report(None, course.tau) if start is None else None
            while reason is None:
                if batches is None and (course.norm <= least or course.free <= gradient_tolerance * abs(course.value)):
                    reason = "GRADIENT_TOLERANCE"
                elif course.number >= most:
                    reason = "ITERATIONS"
                else:
                    tau, done = course.tau, course.iterate()
                    reason = report(done, tau)
                    if reason is None and batches is None and not any(done.step_norms):
                        reason = "NO_PROGRESS"
                    due = reason in SIGNALLED or reason is None and checkpoint and course.number % checkpoint.every == 0
                    if checkpoint is not None and due:
                        reached = course.result("", time.perf_counter() - clock)
                        write_result(problem, functions, checkpoint, reached)
                        course.set_reached()
                        course, least = begin(reached)
    finally:
        course.set_reached()
    return course.result(reason, time.perf_counter() - clock)


def _check_batches(batches: Sequence[Batch] | None) -> None:
    if batches is None:
        return
    if not instance("batches", batches, (list, tuple), "minibatches() makes them"):
        raise ValueError("batches: expected at least one, got none; minibatches() makes them")
    for batch in batches:
        instance("batches", batch, Batch)


def _members(problem: LearningProblem) -> dict[str, list[Parameter]]:
    """The parameters of each group: bias, kernel and head, then one group for each other parameter; those that are learned."""
    head = [] if problem.head is None else problem.head.parameters
    groups: dict[str, list[Parameter]] = {"bias": [], "kernel": [], "head": []}
    for parameter in problem.parameters:
        groups.setdefault("head" if parameter in head else parameter.name, []).append(parameter)
    # Bias and kernel of a network without layers have no Functions.
    return {name: group for name, group in groups.items() if any(parameter.functions for parameter in group)}


def _groups(
    problem: LearningProblem, members: Mapping[str, Sequence[Parameter]], J: ReducedFunctional, options: dict,
    prefix: str | None, given: Iterable[str],
) -> list[ProximalGroup]:  # fmt: skip
    """The groups, with a functional of each."""
    controls = {id(function): control for function, control in zip(problem.functions, J.controls)}
    return [
        ProximalGroup(name, group, J, [controls[id(f)] for p in group for f in p.functions], options, prefix, given)
        for name, group in members.items()
    ]


def _check_start(start: PAMResult, members: Mapping[str, Sequence[Parameter]]) -> None:
    """Raise unless an earlier result fits the problem. Collective."""
    names = tuple(members)
    if start.groups != names:
        raise ValueError(f"start: expected the groups {names}, as the problem has them, got {start.groups}")
    for name, *lists in zip(names, start.controls, start.previous, strict=True):
        bases = [basis for parameter in members[name] for basis in parameter.space_bases]
        for coefficients in lists:
            instance("start", coefficients, (list, tuple))
            if len(coefficients) != len(bases):
                raise ValueError(f"start: expected {len(bases)} arrays for {name}, got {len(coefficients)}")
            for c, basis in zip(coefficients, bases):
                real_array("start", c, basis.shape, comm=basis.Y.comm)


def _gradient_norms(problem: LearningProblem, J: ReducedFunctional) -> tuple[float, float]:
    """The norm of J's gradient in all parameters, where the tape is: in the label measure, and without the controls' units."""
    gradient = iter(Enlist(J.derivative(apply_riesz=True)))
    parts = [(p, k, p.space_bases[k].read(next(gradient))) for p in problem.parameters for k in range(len(p.functions))]
    squares = [(p.pair(k, g, g), p.space_bases[k].unit) for p, k, g in parts]
    return float(np.sqrt(sum(square for square, _ in squares))), float(np.sqrt(sum(square * unit for square, unit in squares)))


class _Move(NamedTuple):
    """The result of moving one group: J, TAO's iterations, whether it was solved and taken, whether inertia failed."""

    value: float
    inner_iterations: int
    solved: bool
    restart: bool


class _Course:
    """Algorithm 1 on its way.

    Attributes
    ----------
    at, before : list of list of numpy.ndarray
        The coefficients of each group now, and an iteration before.
    tau, momentum : float
        Of the next iteration.
    value, norm, free : float
        J, and the norms of `_gradient_norms`.
    history : list
        The iterations of this call, each with its tau and the norm of the gradient after it.
    """

    def __init__(
        self,
        problem: LearningProblem,
        J: ReducedFunctional,
        groups: Sequence[ProximalGroup],
        step: ProximalStep,
        batches: Sequence[Batch] | None,
        first: PAMResult,
    ):
        self._problem, self._J, self._groups, self._step, self._batches = problem, J, groups, step, batches
        self._first = first
        self.at, self.before, self.tau, self.momentum = first.controls, first.previous, first.tau, first.momentum
        self.history: list[tuple[Iteration, float, float]] = []
        self.set_reached()
        self.value = float(J(problem.functions))
        self.norm, self.free = _gradient_norms(problem, J)

    @property
    def number(self) -> int:
        """The number of the latest iteration, counted from the start of the first call."""
        return self._first.iterations + len(self.history)

    def result(self, reason: str, seconds: float) -> PAMResult:
        """What was reached."""
        return continued(
            self._first, self.history, reason=reason, seconds=seconds, controls=self.at, previous=self.before, tau=self.tau,
            momentum=self.momentum,
        )  # fmt: skip

    def set_reached(self) -> None:
        """Give the parameters the coefficients that were reached."""
        for group, coefficients in zip(self._groups, self.at):
            group.set(coefficients)

    def iterate(self) -> Iteration:
        """Move each group once, then adapt tau if the step says so."""
        if self._batches is not None:
            self._problem.exchange(self._batches[self.number % len(self._batches)])
            self.value = float(self._J(self._problem.functions))
        following = (1 + np.sqrt(1 + 4 * self.momentum**2)) / 2
        weight = (self.momentum - 1) / following if self._step.inertial else 0.0
        done = self._move_groups(weight)
        if not self._step.inertial and done.slack < -_ROUND_OFF * max(abs(self.value), abs(done.value)):
            raise ArithmeticError(
                f"J: expected the inequality below (5.1), got a violation by {-done.slack:.1e} in iteration "
                f"{self.number + 1}; evaluate J twice: it must give the same number for the same parameters"
            )
        self.value, (self.norm, self.free) = done.value, _gradient_norms(self._problem, self._J)
        self.history.append((done, self.tau, self.norm))
        self.at, self.before, self.momentum = done.reached, self.at, 1.0 if done.restart else following
        if self._step.adapt and not done.solved:
            self.tau /= 2
        elif self._step.adapt and max(done.inner_iterations) <= _FEW:
            self.tau *= 2
        return done

    def _move_groups(self, weight: float) -> Iteration:
        """Move each group in turn: from x^k, or from x^k + weight (x^k - x^(k-1))."""
        value, solved, restart = self.value, True, False
        squares, inner, reached = [], [], []
        for group, x, x_before in zip(self._groups, self.at, self.before):
            moved = self._move(group, x, x_before, weight, value)
            value, restart = moved.value, restart or moved.restart
            solved = solved and moved.solved
            squares.append(group.square_from(x))
            inner.append(moved.inner_iterations)
            reached.append(group.get())
        slack = self.value - value - sum(squares) / (2 * self.tau)
        return Iteration(value, slack, reached, [float(np.sqrt(square)) for square in squares], inner, solved, restart)

    def _move(
        self, group: ProximalGroup, x: list[np.ndarray], x_before: list[np.ndarray], weight: float, value: float
    ) -> _Move:
        """Minimise over one group, where J is `value`, and take the result if it is good enough."""
        functional, tau, accuracy = group.functional, self.tau, self._step.accuracy
        count, converged, taken, restart = 0, False, False, False
        if weight > 0:
            count, converged = group.minimise(tau, [c + weight * (c - d) for c, d in zip(x, x_before)], accuracy)
            taken = functional.latest.value <= value
            restart = not taken
        if not taken:
            more, converged = group.minimise(tau, x, accuracy)
            count += more
            taken = functional.latest.value + functional.latest.square / (2 * tau) <= value
        if not taken:
            group.put_back(x)
        return _Move(functional.latest.value if taken else value, count, converged and taken, restart)
