"""Training by TAO, with pyadjoint's gradients in the inner product of the label measure.

TAO's gradient norm and the first matrix of its L-BFGS are the Riesz maps of the controls. So its gradients are those in
L2(Y x (0,T)) and L2(Y x Y x (0,T)), (4.3), (4.4), (4.7), for any mesh and any lengths of the layers. Newton methods use
Hessian actions of pyadjoint. There the Riesz maps precondition the linear solves and measure the radius of trust regions.
The steps do not depend on the units of Y and J (`without_units`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from petsc4py import PETSc

from fem_resnet.arguments import flag, instance
from fem_resnet.features import HELD, REGULARISED, STEPPED, supports
from fem_resnet.learning.elimination import ReducedToOthers
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.log import log
from fem_resnet.options import checked_options, checked_prefix
from fem_resnet.ranks import same
from fem_resnet.training.bounds import bounds_of_controls, replicated_bounds
from fem_resnet.training.checkpoint import TrainingCheckpoint, checked_checkpoint
from fem_resnet.training.course import Course
from fem_resnet.training.progress import Progress, Watch, check_monitor
from fem_resnet.training.rank_continuation import pad_problem, train_by_ranks
from fem_resnet.training.signals import SIGNALLED
from fem_resnet.training.tao import Minimiser, Outcome

__all__ = ["SOLVER_PARAMETERS", "TOLERANCES", "Result", "options_over", "train"]

#: Options of TAO that the user does not give: L-BFGS.
SOLVER_PARAMETERS = {"tao_type": "lmvm", "tao_max_it": 200}
#: TAO's tolerances if the user gives none of them: the gradient without units is 1e-8 of J, or of the first gradient.
TOLERANCES = {"tao_gatol": 0.0, "tao_grtol": 1e-8, "tao_gttol": 1e-8}


@dataclass(frozen=True, repr=False)
class Result:
    """How a training ended.

    Attributes
    ----------
    value, gradient_norm : float
        J, and the norm of its gradient in the label measure, at the end. The problem's parameters hold the same
        coefficients as `controls`.
    iterations : int
        The number of iterations.
    converged : bool
        Whether a tolerance was met. False if the iterations ran out.
    reason : str
        "ITERATIONS" if these ran out, "STOPPED" if the monitor stopped it, "INTERRUPTED" if Ctrl-C did, "TERMINATED" if
        SIGTERM did; else the name of TAO's reason, or of `train_levenberg_marquardt`.
    values, gradient_norms : numpy.ndarray
        J and the norm at the start and after each iteration, shape (iterations + 1,) each.
    controls : list
        The coefficients that were reached, as from `Parameter.get`: one array for each of `LearningProblem.functions`.
    seconds : float
        Wall time.
    condition : float or None
        With ``eliminate="head"``: the condition number of the least squares problem for W and mu at the end, Tikhonov's rows
        included, in the label measure; infinite where these do not determine W and mu. Else, and under a cross entropy, None.
    damping : float or None
        Of `train_levenberg_marquardt`: the damping at the end, with which another call goes on. Else None.
    stages : tuple of Result
        With ``ranks=..``: how the training ended in the first functions of the bases, one Result for each rank but the last,
        to which all else here belongs. Their `controls` are coefficients in these functions.
    """

    value: float
    gradient_norm: float
    iterations: int
    converged: bool
    reason: str
    values: np.ndarray
    gradient_norms: np.ndarray
    controls: list
    seconds: float
    condition: float | None = field(default=None, kw_only=True)
    damping: float | None = field(default=None, kw_only=True)
    stages: tuple[Result, ...] = field(default=(), kw_only=True)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(J = {self.value:.6g}, |gradient| = {self.gradient_norm:.1e}, "
            f"{self.iterations} iterations, {self.reason}, {self.seconds:.1f} s)"
        )


@supports(
    "channels",
    "no_layers", "gradient_flow", *HELD, *STEPPED, "head", *REGULARISED, "running", "running_of_controls",
    "running_of_pairs", "ensemble",
    "derivatives", "observed_times", "checkpoints", "learned_initial", "learned_both", "lift", "many_samples", "weights",
    parted=("bounds",),
)  # fmt: skip
@PETSc.Log.EventDecorator("fem_resnet:train")
def train(
    problem: LearningProblem,
    solver_parameters: dict | Sequence[dict | None] | None = None,
    *,
    options_prefix: str | None = None,
    monitor: Callable[[Progress], bool | None] | None = None,
    quiet: bool = False,
    gauss_newton: bool = False,
    bounds: Mapping[str, tuple[ArrayLike | None, ArrayLike | None]] | None = None,
    eliminate: str | None = None,
    ranks: Sequence[int] | None = None,
    checkpoint: TrainingCheckpoint | None = None,
    resume: str | Path | None = None,
) -> Result:
    """Minimise J by TAO from the present parameters, and assign the result to them. Collective.

    The parameters always hold the result of TAO's last iteration: also if TAO stops at its limit of iterations or cannot go
    on, which `Result.reason` says, and if an evaluation or the monitor raises, in which case the error goes on. Ctrl-C stops
    after the present iteration, on all ranks; a second one raises KeyboardInterrupt at once.

    Parameters
    ----------
    problem
        The learning problem.
    solver_parameters, options_prefix
        TAO's options, over `SOLVER_PARAMETERS`.

        - The method is "tao_type", one of `fem_resnet.training.tao_types.TYPES`: L-BFGS if left out, which keeps 5 pairs of
          vectors ("tao_lmvm_mat_lmvm_hist_size"). "nls" and "ntr" are Newton's method with a line search and with a trust
          region; "tao_nls_ksp_rtol" says how accurately "nls" solves for a step. Radii of trust regions are relative to
          functions of size one.
        - Tolerances: "tao_gatol" is the norm of the gradient in the label measure, which has a unit. "tao_grtol" and
          "tao_gttol" have no unit: the gradient relative to J, and relative to the first gradient. If none of these is given,
          `TOLERANCES` holds; else those that are not given are 0.
    monitor
        Called at every iteration on every rank, while the parameters hold the result of that iteration. If it returns True
        on any rank, the training stops; another call goes on from there. If left out, rank 0 shows each iteration: in the log
        if `logging` takes messages of level INFO, else on a terminal, else every ten seconds on standard error.
    quiet
        Whether nothing is shown.
    gauss_newton
        Whether Newton methods get Gauss-Newton actions in place of Hessian actions.
    bounds
        Least and largest coefficients by the name of a learned parameter, such as ``{"bias": (-1.0, 1.0), "kernel":
        (None, 0.5)}``: numbers, arrays of the shape of `Parameter.get`, or None for no end. These hold at all times. Bounds
        that vary in time have one more axis in front: entry k bounds ``Parameter.get(k)``, that is layer k where each layer
        has a value of its own. The other axes may have length one, as in ``{"bias": (None, 1 + t[:, None])}``.

        If no type is given, TAO's is "blmvm", L-BFGS with projections. "bnls" and "bntr", Newton's method with a line search
        and with a trust region, may need far fewer iterations. The start is the nearest set of coefficients within the bounds,
        and `Result.gradient_norm` leaves out the part of the gradient that points out of the bounds.

        Bounds on the bias bound a(y, t) itself if its coefficients are values at nodes or of `cell_indicators`. Bounds on beta
        bound b(y, z, t) itself *only if phi and psi are indicators*. Otherwise `LowRankKernel.bound` says how large abs(b) may
        be.
    eliminate
        "head": W and mu of the head take the values of least J in every evaluation, and TAO minimises over all others
        (variable projection, see `LearningProblem.record`). It takes the loss `least_squares` and a head with prediction
        "identity", or a cross entropy with Tikhonov's term in W, and types of TAO that use first derivatives alone. It often
        needs far fewer iterations. The head has its W and mu at every iteration, and at the end; their values at the start do
        not matter.
    ranks
        Increasing numbers of functions, shape (stages,), such as (9, 17, 33) where 33 is the largest rank of the problem's
        bases. J is first minimised in the first 9 functions of all bases, from their coefficients, then in 17, at last in all
        (`train_by_ranks`). Coefficients are padded by zeros from one rank to the next, so J goes on from where it was. This
        costs far fewer flops where most can be learned in few functions.

        All other arguments serve each rank; `solver_parameters` may be a list, with one dictionary a rank, and bounds are
        numbers. A monitor that returns True ends the present rank. The problem's parameters hold the result of each iteration,
        padded by zeros.
    checkpoint
        Where all that the training goes on from is written, and every how many iterations. At each checkpoint J is recorded
        anew, and TAO begins anew: L-BFGS forgets its pairs. It does so whether or not the run is interrupted.
    resume
        The file of a checkpoint, from which the training goes on in place of the present parameters. With the same arguments,
        on as many ranks, all that follows is as in the run that wrote it, but for a last digit. Iterations after the last
        checkpoint are made again. If `checkpoint` is left out, checkpoints go on to the same file. `Result` counts iterations
        and seconds from the first start.

    Returns
    -------
    Result

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit or differs between ranks; if TAO's type is not taken, does not know bounds, or does not ask
        for an option; if J has no W and mu that can be eliminated; or if `resume` is no checkpoint of such a problem, with
        values at nodes on these ranks.
    OSError
        If a checkpoint cannot be written, or is not there.
    ArithmeticError
        If J is not finite at the start.
    StepFailure
        If the state overflows in a trial step.

    Examples
    --------
    >>> result = train(problem, {"tao_max_it": 100})  # doctest: +SKIP
    >>> result = train(problem, {"tao_type": "nls", "tao_gatol": 1e-10})  # doctest: +SKIP
    >>> result = train(problem, bounds={"bias": (-1, 1), "kernel": (-1, 1)})  # doctest: +SKIP
    >>> result = train(fields, {"tao_max_it": 100}, eliminate="head")  # doctest: +SKIP
    >>> result = train(fields, [{"tao_max_it": 50}, {"tao_max_it": 20}], ranks=(9, 17))  # doctest: +SKIP
    >>> result = train(problem, checkpoint=TrainingCheckpoint("training.checkpoint", every=20))  # doctest: +SKIP
    >>> result = train(problem, resume="training.checkpoint")  # doctest: +SKIP
    """
    comm = problem.net.Y.comm
    same(comm, bounds=replicated_bounds(problem, bounds))
    checkpoint, path = checked_checkpoint(comm, checkpoint, resume)
    if ranks is not None:
        if checkpoint is not None:
            raise ValueError("ranks: expected None with checkpoint or resume, which serve one rank; train one rank a call")
        return _train_by_ranks(
            problem, ranks, solver_parameters, bounds, monitor, quiet,
            options_prefix=options_prefix, gauss_newton=gauss_newton, eliminate=eliminate,
        )  # fmt: skip
    checked_prefix(options_prefix)
    check_monitor(monitor, quiet)
    flag("gauss_newton", gauss_newton)
    given = checked_options(solver_parameters)  # type: ignore[arg-type]  # a list is refused there
    options = options_over({} if bounds is None else {"tao_type": "blmvm"}, given)
    course = Course(problem)

    def record() -> tuple[Minimiser, ReducedToOthers | None]:
        functional, _ = problem.record(gauss_newton=gauss_newton, eliminate=eliminate)
        projected = functional if isinstance(functional, ReducedToOthers) else None
        parameters = problem.parameters if projected is None else projected.parameters
        pairs = None if bounds is None else bounds_of_controls(parameters, bounds, eliminated=projected is not None)
        minimiser = Minimiser(
            functional,
            [function for parameter in parameters for function in parameter.functions],
            [basis for parameter in parameters for basis in parameter.space_bases],
            options,
            comm=comm,
            options_prefix=options_prefix,
            bounds=pairs,
            given=given,
            twice=projected is None,
        )
        return minimiser, projected

    since = None if path is None else course.go_on(path)
    with Watch(problem.comm, monitor, quiet) as watch:
        while True:
            minimiser, projected = record()
            left = max(minimiser.limit - course.iteration, 0)
            limit = left if checkpoint is None else min(checkpoint.every, left)
            tell = course.teller(minimiser, projected, watch)
            end = minimiser.solve(tell, lambda gradient_norm: course.reason is not None, limit=limit, since=since)
            since = end.start
            if checkpoint is None or end.converged or not course.moved(limit) or limit == left:
                break
            course.write(checkpoint, since)
    if projected is not None:
        projected.give_head()
    if checkpoint is not None and course.reason in SIGNALLED:
        course.write(checkpoint, since)
    if projected is not None and projected.undetermined:
        log(
            comm, logging.WARNING, "train: samples and regulariser leave %d of %d unknowns of the head open, which took "
            "the least norm; add tikhonov(..), or give more samples", projected.undetermined, projected.unknowns,
        )  # fmt: skip
    condition = None if projected is None else projected.condition
    return _result(problem, end, course.history, course.reason, course.seconds, condition)


def _result(
    problem: LearningProblem,
    end: Outcome,
    history: Sequence[Progress],
    reason: str | None,
    seconds: float,
    condition: float | None,
) -> Result:
    """What TAO's end, the reason why it was stopped, and the iterations before it come to. Collective."""
    return Result(
        value=end.value,
        gradient_norm=end.gradient_norm,
        iterations=history[-1].iteration,
        converged=end.converged and reason is None,
        reason=reason or end.reason,
        values=np.array([entry.value for entry in history[:-1]] + [end.value]),
        gradient_norms=np.array([entry.gradient_norm for entry in history[:-1]] + [end.gradient_norm]),
        controls=[p.get(k) for p in problem.parameters for k in range(len(p.functions))],
        seconds=seconds,
        condition=condition,
    )


def _train_by_ranks(problem, ranks, solver_parameters, bounds, monitor, quiet, **options) -> Result:
    """`train` with the first functions of all bases, then with more of them."""
    check_monitor(monitor, quiet)
    start = time.perf_counter()
    if isinstance(bounds, Mapping) and any(
        isinstance(ends, (list, tuple, np.ndarray)) and any(np.ndim(end) for end in ends) for ends in bounds.values()
    ):
        raise ValueError(f"bounds: expected numbers or None with ranks={ranks!r}, which serve all of them, got arrays")
    of_ranks: Iterable = repeat(solver_parameters)
    if isinstance(solver_parameters, (list, tuple)):
        count = len(instance("ranks", ranks, (list, tuple, range, np.ndarray)))
        if len(solver_parameters) != count:
            raise ValueError(
                f"solver_parameters: expected a dictionary, or {count}, one a rank, got {len(solver_parameters)} in a list"
            )
        for each in solver_parameters:
            checked_options(each)
        of_ranks = solver_parameters
    given = iter(of_ranks)

    def train_stage(stage: LearningProblem) -> Result:
        def watch(progress: Progress) -> bool | None:
            if stage is not problem:
                pad_problem(problem, stage)
            return monitor(progress)

        watched = None if monitor is None else watch
        return train(stage, next(given), bounds=bounds, monitor=watched, quiet=quiet, **options)

    *stages, last = train_by_ranks(problem, ranks, train_stage)
    return replace(last, stages=tuple(stages), seconds=time.perf_counter() - start)


def options_over(defaults: Mapping, given: Mapping | None) -> dict:
    """TAO's options: the given ones over the defaults and `SOLVER_PARAMETERS`, and over `TOLERANCES` if no tolerance is given.

    Raises
    ------
    TypeError, ValueError
        As for `checked_options`.
    """
    given = checked_options(given)
    tolerances = dict.fromkeys(TOLERANCES, 0.0) if TOLERANCES.keys() & given else TOLERANCES
    return SOLVER_PARAMETERS | tolerances | dict(defaults) | given
