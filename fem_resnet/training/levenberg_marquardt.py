"""Training by the method of Levenberg and Marquardt, where J is a sum of squares.

In coordinates x of all that is learned (`parameters.coordinates`) a step p solves

    (H + mu) p = -g,        g = J'(x) of all samples,        H from rows of the Jacobian that are drawn anew for each step.

With the predicted fall `1/2 p (mu p - g)` the gain rho is the fall of J over it, and mu follows Nielsen's rule:

    rho > 0:  x <- x + p,  mu <- mu max(1/3, 1 - (2 rho - 1)^3),  nu <- 2;        else  mu <- nu mu,  nu <- 2 nu.

mu has no floor. Where W and mu of the head are eliminated they are solved after every trial step, J and g are those of what is
left, and H is the matrix of Gauss and Newton without them (Kaufman's, of variable projection).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import scipy.linalg
from petsc4py import PETSc
from pyadjoint.enlisting import Enlist
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import integer, number
from fem_resnet.features import supports
from fem_resnet.learning.elimination import ReducedToOthers
from fem_resnet.learning.gauss_newton_matrix import GaussNewtonMatrix
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.log import log
from fem_resnet.ranks import on_first
from fem_resnet.time_stepping.stepper import StepFailure
from fem_resnet.training.checkpoint import Numbers, TrainingCheckpoint, checked_checkpoint
from fem_resnet.training.course import read_progress, write_progress
from fem_resnet.training.gradient import Result
from fem_resnet.training.progress import Progress, Watch, check_monitor
from fem_resnet.training.signals import SIGNALLED

__all__ = ["train_levenberg_marquardt"]

#: A damping above this multiple of the largest entry of H makes steps that round-off hides.
_LARGEST_DAMPING = 1e16


@supports(
    "channels", "no_layers", "kernel_set", "bases_by_layer", "linear_in_time", "shared_in_time", "single_precision",
    "head", "regulariser", "lift", "many_samples", "weights", instead="train it by `train`",
)  # fmt: skip
@PETSc.Log.EventDecorator("fem_resnet:train_levenberg_marquardt")
def train_levenberg_marquardt(
    problem: LearningProblem,
    *,
    iterations: int = 50,
    eliminate: str | None = None,
    damping: float = 1e-3,
    tolerance: float = 1e-8,
    rows: float = 5.0,
    directions: int = 10,
    seed: int = 0,
    monitor: Callable[[Progress], bool | None] | None = None,
    quiet: bool = False,
    checkpoint: TrainingCheckpoint | None = None,
    resume: str | Path | None = None,
) -> Result:
    """Minimise J by the method of Levenberg and Marquardt from the present parameters, and assign the result to them.

    For the loss `least_squares` of a head with prediction "identity", on any label domain, with quadratic regularisers, and a
    bias in a basis. The matrix of Gauss and Newton is assembled, so parameters are some thousands at most. Where J can become
    small it needs far fewer evaluations than L-BFGS; where a large part of J stays, its steps are no better. Collective. Where
    an evaluation or the monitor raises, the parameters hold the result of the last iteration, and the error goes on. Ctrl-C
    stops after the present iteration, as in `train`.

    Parameters
    ----------
    problem
        The learning problem.
    iterations
        The largest number of steps.
    eliminate
        "head": W and mu of the head take the values of least J after every trial step, as in `train`; their values at the
        start do not matter.
    damping
        The first mu, in parts of the largest entry on the diagonal of H. `Result.damping` of an earlier call goes on.
    tolerance
        The training ends where the gradient without units is this part of J, or of the first gradient.
    rows
        Rows of the Jacobian that are drawn for each step, over the number of parameters; all where there are not so many.
        With few of them steps are bad, with many they are dear.
    directions
        Directions of the output that a drawn sample has at least, if its output has so many.
    seed
        Of what is drawn: the same on any number of ranks.
    monitor
        Called at the start and after each step on every rank, while the parameters hold its result. If it returns True on any
        rank, the training stops. If left out, each iteration is shown on rank 0, as by `train`.
    quiet
        Whether nothing is shown.
    checkpoint
        Where all that the training goes on from is written, and every how many steps.
    resume
        The file of a checkpoint, from which the training goes on in place of the present parameters, as of `train`: with the
        same arguments, on as many ranks, up to round-off. Steps after the last checkpoint are made again. `iterations` counts
        from the first start.

    Returns
    -------
    Result
        Its reasons are "GRADIENT", where the tolerance is met, "ITERATIONS", "STOPPED" by the monitor, "INTERRUPTED" by
        Ctrl-C, "TERMINATED" by SIGTERM, and "NO_DESCENT", where no step makes J smaller.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit or differs between ranks; if J is no sum of squares of outputs of a head, or has too many
        parameters; or if `resume` is no checkpoint of such a problem.
    OSError
        If a checkpoint cannot be written, or is not there.
    ArithmeticError
        If J is not finite at the start.
    StepFailure
        If the state overflows at the start.

    Examples
    --------
    >>> result = train_levenberg_marquardt(problem, iterations=30)  # doctest: +SKIP
    >>> result = train_levenberg_marquardt(problem, eliminate="head", damping=result.damping)  # doctest: +SKIP
    """
    iterations = integer("iterations", iterations, least=0)
    damping, tolerance = number("damping", damping, above=0), number("tolerance", tolerance, least=0)
    rows, directions = number("rows", rows, above=0), integer("directions", directions)
    random = np.random.default_rng(integer("seed", seed, least=0, most=np.inf))
    check_monitor(monitor, quiet)
    clock, comm = time.perf_counter(), problem.net.Y.comm
    checkpoint, path = checked_checkpoint(comm, checkpoint, resume)
    begun = None if path is None else read_progress(problem, _TOOL, path, _NUMBERS)
    matrix = GaussNewtonMatrix(problem, eliminate is not None)
    count = -int(-rows * matrix.coordinates.size // 1)
    course = _Course(problem, matrix, eliminate, damping)
    history: list[Progress] = []
    if begun is not None:
        numbers, history = begun
        course.go_on(numbers)
        clock -= numbers["seconds"]
        for _ in history[1:]:  # what the steps that were made have drawn
            matrix.draw(count, directions, random)

    def tell() -> str | None:
        """The reason to stop, if there is one."""
        seconds = time.perf_counter() - clock
        history.append(Progress(len(history), iterations, course.value, course.norm, seconds))
        return watch.reason(history[-1])

    try:
        with stop_annotating(), Watch(comm, monitor, quiet) as watch:
            reason = None if history else tell()
            while reason is None:
                if course.steepness <= tolerance * max(abs(course.value), course.first_steepness):
                    reason = "GRADIENT"
                elif len(history) > iterations:
                    reason = "ITERATIONS"
                elif not course.step(matrix.draw(count, directions, random)):
                    reason = "NO_DESCENT"
                else:
                    reason = tell()
                    if checkpoint and (reason in SIGNALLED or history[-1].iteration % checkpoint.every == 0):
                        write_progress(problem, _TOOL, checkpoint, course.numbers, history)
    finally:
        course.restore()
    course.warn()
    return Result(
        value=course.value, gradient_norm=course.norm, iterations=len(history) - 1, converged=reason == "GRADIENT",
        reason=reason, values=np.array([each.value for each in history]),
        gradient_norms=np.array([each.gradient_norm for each in history]), controls=course.reached,
        seconds=time.perf_counter() - clock, condition=course.condition, damping=course.damping,
    )  # fmt: skip


_TOOL = "train_levenberg_marquardt"
#: What its checkpoints have of their own: mu, the largest entry on the diagonal of H, the first gradient without units.
_NUMBERS: Numbers = {
    "mu": partial(number, above=0), "largest": partial(number, above=0), "first": partial(number, least=0)
}  # fmt: skip


class _Course:
    """A training on its way. Collective.

    Attributes
    ----------
    value, norm, steepness, first_steepness : float
        J, the norm of its gradient in the label measure, the same without units, and at the start.
    reached : list of numpy.ndarray
        The coefficients there, as from `Parameter.get`.
    condition : float or None
        As of `Result`.
    """

    def __init__(self, problem: LearningProblem, matrix: GaussNewtonMatrix, eliminate: str | None, damping: float):
        self._comm, self._matrix, self._coordinates = problem.net.Y.comm, matrix, matrix.coordinates
        self._J, _ = problem.record(eliminate=eliminate)
        self._projected = self._J if isinstance(self._J, ReducedToOthers) else None
        self._functions = problem.functions if self._projected is None else self._projected.functions
        #: The first damping; mu, once there is an H; the largest entry on the diagonal of the latest H.
        self._start, self._largest = damping, 0.0
        self._mu: float | None = None
        self.condition: float | None = None
        #: W and mu, where they are solved for.
        self._solved = [] if self._projected is None else problem.head.parameters
        self.reached = self._read()
        with stop_annotating():
            self.value = self._evaluate()
            if not np.isfinite(self.value):
                raise ArithmeticError(f"J is {self.value} at the start; begin with other parameters, or scale the data")
            self._arrive()
        self.first_steepness = self.steepness

    @property
    def numbers(self) -> dict[str, float]:
        """What a checkpoint has of it, once a step was made."""
        assert self._mu is not None
        return {"mu": self._mu, "largest": self._largest, "first": self.first_steepness}

    def go_on(self, numbers: Mapping[str, float]) -> None:
        """Take `numbers` from a checkpoint."""
        self._mu, self._largest, self.first_steepness = (numbers[name] for name in ("mu", "largest", "first"))

    def _read(self) -> list[np.ndarray]:
        return [*self._coordinates.read(), *(p.read(0) for p in self._solved)]

    def _evaluate(self) -> float:
        """J at the present parameters, as rank 0 has it."""
        return self._comm.bcast(float(self._J(self._functions)))

    def _arrive(self) -> None:
        """Take the present parameters, where J was evaluated last, for what is reached."""
        if self._projected is not None:
            self._projected.give_head()
            self.condition = self._projected.condition
        self.reached = self._read()
        self._functional = self._coordinates.functional(Enlist(self._J.derivative()))
        self.norm, self.steepness = self._coordinates.norm(self._functional), float(np.linalg.norm(self._functional))

    def step(self, rows) -> bool:
        """One step by the matrix of these rows; False if no damping gives one that makes J smaller."""
        H = self._matrix.of(rows)
        self._largest = self._comm.bcast(float(H.diagonal().max(initial=0.0)))
        mu = self._mu = self._start * self._largest if self._mu is None else self._mu
        growth = 2.0
        while 0 < mu <= _LARGEST_DAMPING * self._largest:
            p, fall = on_first(self._comm, partial(_solve, H, mu, self._functional))
            value = np.inf if p is None else self._try(p)
            if value < self.value:
                gain = (self.value - value) / fall
                self._mu = mu * max(1 / 3, 1 - (2 * gain - 1) ** 3)
                self.value = value
                self._arrive()
                return True
            mu *= growth
            growth *= 2
        return False

    @property
    def damping(self) -> float:
        """mu, over the largest entry on the diagonal of the latest H."""
        return self._start if self._mu is None else self._mu / self._largest if self._largest else 0.0

    def _try(self, p: np.ndarray) -> float:
        """J after a step; infinite where layers cannot be stepped."""
        self._coordinates.write(self._coordinates.moved(self.reached, p))
        try:
            return self._evaluate()
        except StepFailure:
            return np.inf

    def restore(self) -> None:
        """Give the parameters what was reached."""
        self._coordinates.write(self.reached)
        for p, c in zip(self._solved, self.reached[len(self._coordinates.sets) :]):
            p.write(0, c)

    def warn(self) -> None:
        """Say where the head is not determined."""
        if self._projected is not None and self._projected.undetermined:
            log(
                self._comm, logging.WARNING, "train_levenberg_marquardt: samples and regulariser leave %d of %d unknowns of "
                "the head open, which took the least norm; add tikhonov(..), or give more samples",
                self._projected.undetermined, self._projected.unknowns,
            )  # fmt: skip


def _solve(H: np.ndarray, mu: float, functional: np.ndarray) -> tuple[np.ndarray | None, float]:
    """The step and the predicted fall of J; None where the matrix is not positive definite up to round-off."""
    damped = H.copy()
    damped[np.diag_indices_from(damped)] += mu
    try:
        p = scipy.linalg.cho_solve(scipy.linalg.cho_factor(damped, overwrite_a=True), -functional)
    except scipy.linalg.LinAlgError:
        return None, 0.0
    return p, 0.5 * float(p @ (mu * p - functional))
