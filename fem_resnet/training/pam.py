"""Proximal alternating minimisation: Algorithm 1 of section 5.1.

With x_1, x_2, .. the blocks of what is learned, the bias a, the kernel b, then the head and whatever else is learned,

    x_i <- argmin_x  J(.., x, ..) + 1/(2 tau) |x - x_i|^2                                                  (5.1)

one after the other, in the norms of label domain and time. J has the regulariser, so that with Tikhonov's it is J_mod of
(4.6), with the gradients (4.7). (Section 5.1 prints sigma for sigma' in the gradients of J; those here are (4.3), (4.4).)

What TAO finds for a block (`proximal`) is taken only if the proximal functional is no higher there than where TAO started,
evaluated, not estimated. So for any tau > 0, and however inexact TAO was,

    J(a^(k+1), b^(k+1)) <= J(a^k, b^k) - 1/(2 tau) ( |a^(k+1) - a^k|^2 + |b^(k+1) - b^k|^2 ),

the inequality below (5.1), with a square for each block. Its slack, the right-hand side minus the left, is in the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import NamedTuple

import numpy as np
from petsc4py import PETSc
from pyadjoint import ReducedFunctional
from pyadjoint.enlisting import Enlist

from fem_resnet.arguments import flag, instance, integer, number
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.learning.objective import Batch, LearningProblem
from fem_resnet.options import checked_options, checked_prefix
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.ranks import same
from fem_resnet.training.gradient import Progress, Result, check_monitor, options_over, tell
from fem_resnet.training.proximal import ProximalBlock

__all__ = ["INNER_PARAMETERS", "PAMProgress", "PAMResult", "train_pam"]

#: TAO's options for the inner problems, over `gradient.SOLVER_PARAMETERS`, where the user gives none.
INNER_PARAMETERS = {"tao_max_it": 30}

#: tau grows where every block takes at most so many inner iterations.
_FEW = 5
#: Round-off of J and the squares in the inequality below (5.1), in parts of J.
_ROUND_OFF = 32 * np.finfo(float).eps

_Coefficients = list[np.ndarray]


@dataclass(frozen=True)
class PAMProgress(Progress):
    """One iteration: what `Progress` says, tau, the slack of the inequality, and TAO's iterations in all blocks together."""

    tau: float
    slack: float
    inner_iterations: int

    def __str__(self) -> str:
        return f"{super().__str__()}   tau = {self.tau:.1e}   slack = {self.slack:.1e}   {self.inner_iterations:3d} inner"


@dataclass(frozen=True)
class PAMResult(Result):
    """How a proximal alternating minimisation ended, and all that is needed to go on.

    What `Result` has; `values` and `gradient_norms` are of J itself, its gradient that in all blocks. The reason is
    "GRADIENT_TOLERANCE", "ITERATIONS", "STOPPED" by the monitor, or "NO_PROGRESS", where no block could be moved.

    Attributes
    ----------
    blocks : tuple of str
        Names of the blocks, in their order.
    slacks : numpy.ndarray
        Of the inequality below (5.1), one an iteration: >= 0 up to round-off, but for inertial steps.
    step_norms : numpy.ndarray
        |x_i^(k+1) - x_i^k|, shape (iterations, blocks).
    inner_iterations : numpy.ndarray
        Those of TAO, shape (iterations, blocks).
    taus : numpy.ndarray
        tau, one an iteration.
    controls : list of list of numpy.ndarray
        What was reached: for each block its coefficients, as `Parameter.get` gives them on this rank.
    previous : list of list of numpy.ndarray
        The same an iteration before.
    tau, momentum : float
        Of the next iteration; the momentum is Nesterov's t_k, 1 after a restart.
    """

    blocks: tuple[str, ...]
    slacks: np.ndarray
    step_norms: np.ndarray
    inner_iterations: np.ndarray
    taus: np.ndarray
    controls: list[_Coefficients]
    previous: list[_Coefficients]
    tau: float
    momentum: float


@supports(
    "no_layers", "gradient_flow", *HELD, *STEPPED, "head", "regulariser", "running", "running_of_controls", "derivatives",
    "observed_times", "checkpoints", "learned_initial", "learned_both", "many_samples", "weights",
)  # fmt: skip
@supports(
    "no_layers", "gradient_flow", *HELD, *STEPPED, "head", "regulariser", "running", "running_of_controls", "checkpoints",
    "many_samples", "weights", tool="train_pam, batches", when=lambda *given, batches=None, **options: batches is not None,
    parted=("start",),
)  # fmt: skip
@PETSc.Log.EventDecorator("fem_resnet:train_pam")
def train_pam(
    problem: LearningProblem,
    solver_parameters: dict | None = None,
    *,
    tau: float = 1.0,
    iterations: int = 100,
    gradient_tolerance: float = 1e-6,
    accuracy: float = 0.1,
    adapt: bool = False,
    inertial: bool = False,
    batches: Sequence[Batch] | None = None,
    options_prefix: str | None = None,
    monitor: Callable[[PAMProgress], bool | None] | None = None,
    start: PAMResult | None = None,
) -> PAMResult:
    """Minimise J by Algorithm 1, proximal alternating minimisation (5.1), from the present parameters.

    The parameters then hold what was reached; where an evaluation or the monitor raises, or the user interrupts, what the
    last complete iteration reached, and the error goes on. Collective over the communicator of the network.

    Parameters
    ----------
    problem
        The learning problem.
    solver_parameters, options_prefix
        TAO's options for the inner problems, over `SOLVER_PARAMETERS` and `INNER_PARAMETERS`: L-BFGS, or Newton-CG by
        "tao_type" "nls". How far they are solved says `accuracy`, besides TAO's own tests.
    tau
        The step size, positive: 1/tau is the weight of half the squared distance that a block moves.
    iterations
        At most so many, in this call.
    gradient_tolerance
        Stops where the gradient of J is no larger than this times that at the start (of the first call, with `start`), in
        the label measure, or times J, in norms without units (`training.tao`). Not with `batches`.
    accuracy
        An inner problem is solved until its gradient is no larger than this times |x - x_i| / tau, which at its minimum is
        |D_i J|; no unit, 0 for as far as TAO's own tests ask for.
    adapt
        Whether tau is doubled after an iteration in which each inner problem took TAO 5 iterations at most, and halved after
        one in which an inner problem was not solved or its result not taken. The inequality holds with each iteration's tau.
    inertial
        Whether blocks move from x^k + (t_k - 1)/t_(k+1) (x^k - x^(k-1)), t_k Nesterov's, which is also the centre of the
        proximal term then. A block for which J rose so is minimised again from x^k, and the next iteration starts afresh
        with t = 1. So J never rises, but the inequality below (5.1) does *not* hold in this form; its slack may be negative.
    batches
        For example ``problem.minibatches(32, seed=1)``: iteration k sees the k-th of them in place of the problem's own,
        over and over, and value, gradient and slack are those of J of that batch, for which the inequality holds within
        the iteration. For J of all samples *nothing* is guaranteed then: it may rise, and with a fixed tau the parameters
        need not converge. Not for a problem that learns its inputs or has `derivatives`.
    monitor
        Called at every iteration on every rank; returning True (on one rank at least) stops. If left out, a line an
        iteration is logged at level INFO on rank 0.
    start
        The result of an earlier call on as many ranks, which is continued: parameters, momentum, tau and history are taken
        from it, and what comes out is that of one call. Other arguments should be as before.

    Returns
    -------
    PAMResult

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or differs between ranks; or if TAO does not ask for an option.
    StepFailure
        If the state overflows in a trial step.
    ArithmeticError
        If the inequality is violated by more than round-off, which only a J that gives different numbers for the same
        parameters can do.

    Examples
    --------
    >>> result = train_pam(problem, tau=10.0, iterations=20)  # doctest: +SKIP
    >>> result = train_pam(problem, tau=10.0, iterations=20, start=result)  # doctest: +SKIP
    >>> bool((result.slacks > -1e-14).all())  # doctest: +SKIP
    True
    """
    comm, clock = problem.net.Y.comm, time.perf_counter()
    # Coefficients in it are parts of this rank, and seconds its own.
    same(comm, start=(start.blocks, start.iterations, start.tau, start.momentum) if isinstance(start, PAMResult) else start)
    _check(tau, iterations, gradient_tolerance, accuracy, batches)
    adapt, inertial = flag("adapt", adapt), flag("inertial", inertial)
    instance("start", start, (PAMResult, NoneType), "what an earlier call has returned")
    checked_prefix(options_prefix)
    check_monitor(monitor)
    given = checked_options(solver_parameters)
    if batches is not None:
        problem = problem.replace(batch=batches[0])
    J, _ = problem.record()
    norms = _gradient_norms(problem, J)
    least = gradient_tolerance * (norms[0] if start is None else start.gradient_norms[0])
    options = options_over(INNER_PARAMETERS | {"tao_gatol": 0.1 * least}, solver_parameters)
    blocks = _blocks(problem, J, options, options_prefix, given)
    first = _initial(J, blocks, norms[0], tau) if start is None else start
    if first.blocks != tuple(block.name for block in blocks):
        raise ValueError(f"start: its blocks are {first.blocks}, the problem's {tuple(block.name for block in blocks)}")
    at, before, tau, momentum = first.controls, first.previous, first.tau, first.momentum
    if start is not None:
        for block, reached, earlier in zip(blocks, at, before, strict=True):
            block.checked(reached, "start")
            block.checked(earlier, "start")
    for block, coefficients in zip(blocks, at):
        block.set(coefficients)
    value, history = J(problem.functions), []
    norm, free = _gradient_norms(problem, J)
    most = first.iterations + iterations

    def report(number: int, step: _Step | None) -> bool:
        """Whether the monitor stops."""
        seconds = first.seconds + time.perf_counter() - clock
        slack, inner = (0.0, 0) if step is None else (step.slack, int(sum(step.inner_iterations)))
        progress = PAMProgress(number, most, float(value), norm, seconds, tau, slack, inner)
        return tell(comm, progress, monitor)

    reason = "STOPPED" if start is None and report(0, None) else None
    try:
        while reason is None:
            if batches is None and (norm <= least or free <= gradient_tolerance * abs(value)):
                reason = "GRADIENT_TOLERANCE"
                break
            if len(history) == iterations:
                reason = "ITERATIONS"
                break
            number = first.iterations + len(history) + 1
            if batches is not None:
                problem.exchange(batches[(number - 1) % len(batches)])
                value = J(problem.functions)
            following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
            weight = (momentum - 1) / following if inertial else 0.0
            step = _iterate(blocks, at, before, tau, weight, accuracy, float(value))
            if not inertial and step.slack < -_ROUND_OFF * max(abs(value), abs(step.value)):
                raise ArithmeticError(f"the inequality below (5.1) is violated by {-step.slack:.1e} in iteration {number}")
            value, (norm, free) = step.value, _gradient_norms(problem, J)
            history.append((step, tau, norm))
            at, before, momentum = step.reached, at, 1.0 if step.restart else following
            stops = report(number, step)
            if adapt and not step.solved:
                tau /= 2
            elif adapt and max(step.inner_iterations) <= _FEW:
                tau *= 2
            if stops:
                reason = "STOPPED"
            elif batches is None and not any(step.step_norms):
                reason = "NO_PROGRESS"
    finally:
        for block, coefficients in zip(blocks, at):
            block.set(coefficients)
    return _continued(
        first, history, reason=reason, seconds=first.seconds + time.perf_counter() - clock, controls=at, previous=before,
        tau=tau, momentum=momentum,
    )  # fmt: skip


def _check(tau, iterations, gradient_tolerance, accuracy, batches) -> None:
    number("tau", tau, above=0)
    integer("iterations", iterations, least=0)
    for name, value in (("gradient_tolerance", gradient_tolerance), ("accuracy", accuracy)):
        number(name, value, least=0)
    if batches is None:
        return
    if not instance("batches", batches, (list, tuple), "minibatches() makes them"):
        raise ValueError("batches: expected at least one, got none; minibatches() makes them")
    for batch in batches:
        instance("batches", batch, Batch)


def _blocks(
    problem: LearningProblem, J: ReducedFunctional, options: dict, prefix: str | None, given: Iterable[str]
) -> list[ProximalBlock]:
    """Bias, kernel, head, then one for each other parameter: those that are learned."""
    head = [] if problem.head is None else problem.head.parameters
    groups: dict[str, list[Parameter]] = {"bias": [], "kernel": [], "head": []}
    for parameter in problem.parameters:
        groups.setdefault("head" if parameter in head else parameter.name, []).append(parameter)
    controls = {id(function): control for function, control in zip(problem.functions, J.controls)}
    return [
        ProximalBlock(name, group, J, [controls[id(f)] for p in group for f in p.functions], options, prefix, given)
        for name, group in groups.items()
        if any(parameter.functions for parameter in group)  # a network without layers has none of bias and kernel
    ]


class _Step(NamedTuple):
    """One iteration over all blocks."""

    value: float
    slack: float
    reached: list[_Coefficients]
    step_norms: list[float]
    inner_iterations: list[int]
    solved: bool
    restart: bool


def _iterate(
    blocks: Sequence[ProximalBlock],
    at: Sequence[_Coefficients],
    before: Sequence[_Coefficients],
    tau: float,
    weight: float,
    accuracy: float,
    first: float,
) -> _Step:
    """Each block in turn, where J is `first`: from x^k, or from x^k + weight (x^k - x^(k-1))."""
    value, solved, restart = first, True, False
    squares, inner, reached = [], [], []
    for block, x, x_before in zip(blocks, at, before):
        functional, count, taken = block.functional, 0, False
        if weight > 0:
            count, converged = block.minimise(tau, [c + weight * (c - d) for c, d in zip(x, x_before)], accuracy)
            taken = functional.value <= value
            restart |= not taken
        if not taken:
            more, converged = block.minimise(tau, x, accuracy)
            count += more
            taken = functional.value + functional.square / (2 * tau) <= value
        if taken:
            value = functional.value
        else:
            block.put_back(x)
        solved &= converged and taken
        squares.append(block.square_from(x))
        inner.append(count)
        reached.append(block.get())
    slack = first - value - sum(squares) / (2 * tau)
    return _Step(value, slack, reached, [float(np.sqrt(square)) for square in squares], inner, solved, restart)


def _gradient_norms(problem: LearningProblem, J: ReducedFunctional) -> tuple[float, float]:
    """Of J in all that is learned, where the tape is: in the label measure, and without the controls' units."""
    gradient = iter(Enlist(J.derivative(apply_riesz=True)))
    parts = [(p, k, p.space_bases[k].read(next(gradient))) for p in problem.parameters for k in range(len(p.functions))]
    squares = [(p.pair(k, g, g), p.space_bases[k].unit) for p, k, g in parts]
    return float(np.sqrt(sum(square for square, _ in squares))), float(np.sqrt(sum(square * unit for square, unit in squares)))


def _initial(J: ReducedFunctional, blocks: Sequence[ProximalBlock], norm: float, tau: float) -> PAMResult:
    """The result of no iteration."""
    at = [block.get() for block in blocks]
    value = float(J.functional)
    none = np.zeros(0)
    return PAMResult(
        value=value, gradient_norm=norm, iterations=0, converged=False, reason="", values=np.array([value]),
        gradient_norms=np.array([norm]), seconds=0.0, blocks=tuple(block.name for block in blocks), slacks=none,
        step_norms=np.zeros((0, len(blocks))), inner_iterations=np.zeros((0, len(blocks)), dtype=int), taus=none,
        controls=at, previous=at, tau=float(tau), momentum=1.0,
    )  # fmt: skip


def _continued(first: PAMResult, history: Sequence[tuple[_Step, float, float]], **changed) -> PAMResult:
    """`first` with iterations added: each with its tau, and the norm of the gradient after it."""

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
