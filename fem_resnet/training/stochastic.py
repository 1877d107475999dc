"""Training by stochastic gradients: mini-batches, a schedule of the learning rate, early stopping by a validation batch.

All is done with the tape of one mini-batch, in which the others take their places (`LearningProblem.exchange`). Numbers that
decide anything (the order of samples, the factors of a schedule, the value that early stopping compares) are those of rank 0.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType

import numpy as np
from petsc4py import PETSc
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import choice, function, instance, integer, number
from fem_resnet.features import HELD, REGULARISED, STEPPED, supports
from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.learning.batch import Batch
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.ranks import on_first
from fem_resnet.training.checkpoint import (
    Numbers,
    State,
    TrainingCheckpoint,
    checked_checkpoint,
    read_state,
    write_state,
)
from fem_resnet.training.progress import Report, Watch, check_monitor
from fem_resnet.training.signals import SIGNALLED
from fem_resnet.training.stochastic_steps import Adam, Descent, StochasticStep

__all__ = ["SCHEDULES", "StochasticProgress", "StochasticResult", "train_stochastic"]

#: Schedules by name: the factor of the learning rate after the part s in [0, 1) of all steps.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda s: 1.0,
    "cosine": lambda s: (1 + math.cos(math.pi * s)) / 2,
}


@dataclass(frozen=True)
class StochasticProgress(Report):
    """One epoch: a pass over all samples.

    Attributes
    ----------
    epoch, epochs : int
        Its number, 0 at the start, and the largest number that is allowed.
    value : float
        The mean of J over the mini-batches of the epoch, each before its step; at the start J of all samples.
    validation : float or None
        The loss of the validation batch after the epoch; None without one.
    best : int
        The number of the epoch with the least such loss; without a validation batch the present one.
    rate : float
        The learning rate of the last step; at the start that of the first.
    seconds : float
        Wall time since the start.
    """

    epoch: int
    epochs: int
    value: float
    validation: float | None
    best: int
    rate: float
    seconds: float

    @property
    def counted(self) -> tuple[str, int, int]:
        return "epoch", self.epoch, self.epochs

    @property
    def numbers(self) -> str:
        validation = "" if self.validation is None else f"validation {self.validation:.4e} (best: {self.best})   "
        return f"J = {self.value:.6e}   {validation}rate {self.rate:.1e}"


@dataclass(frozen=True, repr=False)
class StochasticResult:
    """How a training by stochastic gradients ended.

    Attributes
    ----------
    value : float
        J of all samples at the coefficients that were kept, which the problem's parameters hold.
    epochs, steps : int
        How many complete epochs and steps were made.
    best : int
        The epoch after which these coefficients were reached, 0 for the start: that of the least validation loss, or the last
        complete one without a validation batch.
    reason : str
        "EPOCHS"; "PATIENCE", where the validation loss did not fall for so many epochs; "STOPPED" by the monitor;
        "INTERRUPTED" by Ctrl-C; "TERMINATED" by SIGTERM; or "NOT_FINITE", where J of a mini-batch was not.
    values : numpy.ndarray
        J of all samples at the start, and after it the mean of J over the mini-batches of each epoch, each before its step;
        shape (epochs + 1,).
    validation : numpy.ndarray
        The loss of the validation batch at the start and after each epoch, shape (epochs + 1,); shape (0,) without one.
    rates : numpy.ndarray
        The learning rate of each step, shape (steps,).
    controls : list
        The coefficients that were kept, as from `Parameter.get`: one array for each of `LearningProblem.functions`.
    seconds : float
        Wall time.
    """

    value: float
    epochs: int
    steps: int
    best: int
    reason: str
    values: np.ndarray
    validation: np.ndarray
    rates: np.ndarray
    controls: list
    seconds: float

    def __repr__(self) -> str:
        return (
            f"StochasticResult(J = {self.value:.6g}, {self.epochs} epochs, {self.steps} steps, best after {self.best}, "
            f"{self.reason}, {self.seconds:.1f} s)"
        )


@supports(
    "channels",
    "no_layers", "gradient_flow", *HELD, *STEPPED, "head", *REGULARISED, "running", "running_of_controls",
    "running_of_pairs", "checkpoints",
    "lift", "many_samples", "weights", instead="train it by `train`",
)  # fmt: skip
@PETSc.Log.EventDecorator("fem_resnet:train_stochastic")
def train_stochastic(
    problem: LearningProblem,
    step: StochasticStep | None = None,
    *,
    batch_size: int = 32,
    epochs: int = 50,
    schedule: str | Callable[[float], float] = "cosine",
    validation: Batch | None = None,
    patience: int | None = None,
    seed: int = 0,
    monitor: Callable[[StochasticProgress], bool | None] | None = None,
    quiet: bool = False,
    checkpoint: TrainingCheckpoint | None = None,
    resume: str | Path | None = None,
) -> StochasticResult:
    """Minimise J by stochastic gradients of mini-batches from the present parameters, and assign the result to them.

    Collective. Where an evaluation or the monitor raises, the parameters hold what was kept last, and the error goes on.
    Ctrl-C stops after the present epoch, as in `train`.

    Parameters
    ----------
    problem
        The learning problem. Its batch holds all samples; it is left as it is.
    step
        `Adam` or `SGD`, with their numbers; ``Adam()`` if left out. Moments start at zero in each call.
    batch_size
        Samples in a mini-batch, at most those of the problem whose weight is positive. The last one of an epoch may have
        fewer: it is filled up with samples of weight 0, and its step is as long as the others.
    epochs
        The largest number of passes over all samples, each in another order.
    schedule
        The factor of the learning rate: "constant", "cosine" (from 1 to 0 along a half wave), or a function of the part s
        in [0, 1) of all steps that are done. It is called on rank 0 alone, once a step, before the first one.
    validation
        Samples beside those of the problem. After each epoch their loss is computed, with a running cost, without the
        regulariser. The parameters then get the state of least validation loss, the start among them.
    patience
        Epochs without a smaller validation loss after which the training stops; None for no such stop.
    seed
        Of the order of the samples: the same on any number of ranks.
    monitor
        Called at the start and after each epoch on every rank, while the parameters hold the result of that epoch. If it
        returns True on any rank, the training stops. If left out, each epoch is shown on rank 0, as by `train`.
    quiet
        Whether nothing is shown.
    checkpoint
        Where all that the training goes on from is written, and every how many epochs; J is recorded anew there.
    resume
        The file of a checkpoint, from which the training goes on in place of the present parameters, as of `train`: with the
        same arguments, on as many ranks, as in one run. Epochs after the last checkpoint are made again.

    Returns
    -------
    StochasticResult

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit or differs between ranks; if there is patience and no validation batch; or if `resume` is
        no checkpoint of such a problem, with values at nodes on these ranks.
    OSError
        If a checkpoint cannot be written, or is not there.
    ArithmeticError
        If J is not finite at the start.
    StepFailure
        If the state overflows in a step; a smaller rate may help.

    Examples
    --------
    >>> result = train_stochastic(problem, Adam(rate=0.01), batch_size=80, epochs=30)  # doctest: +SKIP
    >>> result = train_stochastic(problem, validation=held_back, patience=5)  # doctest: +SKIP
    """
    step = Adam() if step is None else instance("step", step, StochasticStep, "such as Adam(rate=0.01)")
    weighted = int(np.count_nonzero(sample_weights(problem.batch.weights, problem.batch.samples)))
    batch_size = integer("batch_size", batch_size, most=weighted)
    epochs = integer("epochs", epochs, least=0)
    instance("validation", validation, (Batch, NoneType))
    patience = None if patience is None else integer("patience", patience)
    if patience is not None and validation is None:
        raise ValueError(f"patience: expected None without a validation batch, got {patience}; give validation=..")
    random = np.random.default_rng(integer("seed", seed, least=0, most=np.inf))
    check_monitor(monitor, quiet)
    checkpoint, path = checked_checkpoint(problem.net.Y.comm, checkpoint, resume)
    rates = step.rate * _factors(problem, schedule, epochs * -(-weighted // batch_size))
    course = _Course(problem, step, batch_size, rates, validation, path)
    for _ in range(course.epoch):
        random.integers(2**31)  # those of the epochs before
    reason, begun = None, course.epoch
    try:
        with stop_annotating(), Watch(problem.net.Y.comm, monitor, quiet) as watch:
            while reason is None:
                if checkpoint is not None and course.epoch > begun and course.epoch % checkpoint.every == 0:
                    course.write(checkpoint)
                seen = course.epoch == begun > 0  # by the monitor, before the training went on
                reason = None if seen else watch.reason(course.progress(epochs))
                if reason is not None:
                    if checkpoint is not None and reason in SIGNALLED:
                        course.write(checkpoint)
                    break
                if patience is not None and course.epoch - course.best >= patience:
                    reason = "PATIENCE"
                elif course.epoch == epochs:
                    reason = "EPOCHS"
                elif not course.pass_over(problem.minibatches(batch_size, int(random.integers(2**31)))):
                    reason = "NOT_FINITE"
    finally:
        course.descent.set(course.kept)
    return StochasticResult(
        value=course.whole(), epochs=course.epoch, steps=course.steps, best=course.best, reason=reason,
        values=np.array(course.values), validation=np.array(course.validation), rates=rates[: course.steps],
        controls=course.kept, seconds=course.seconds,
    )  # fmt: skip


def _factors(problem: LearningProblem, schedule: str | Callable[[float], float], steps: int) -> np.ndarray:
    """The factor of the learning rate in each step, shape (steps,), as rank 0 finds it. Collective."""
    factor: Callable[[float], float]
    if isinstance(schedule, str):
        factor = SCHEDULES[choice("schedule", schedule, SCHEDULES)]
    else:
        factor = function(
            "schedule", schedule, f"one of {', '.join(map(repr, SCHEDULES))} or a function of a number in [0, 1)"
        )
    return np.array(
        on_first(problem.net.Y.comm, lambda: [number("schedule", factor(k / steps), least=0) for k in range(steps)])
    )


class _Course:
    """A training on its way. Collective.

    Attributes
    ----------
    descent : Descent
        The steps that are made.
    kept : list of numpy.ndarray
        The best coefficients so far, or those after the last epoch without a validation batch.
    epoch, best, steps, values, validation
        As of `StochasticResult`, where epoch is the number of complete ones.
    """

    def __init__(
        self, problem: LearningProblem, step: StochasticStep, batch_size: int, rates: np.ndarray, validation: Batch | None,
        path: Path | None,
    ):  # fmt: skip
        self._problem, self._size, self._rates, self._clock = problem, batch_size, rates, time.perf_counter()
        # Before anything is recorded: a batch that does not fit is refused.
        self._validated = None if validation is None else _with_batch(problem, validation)
        self.descent = Descent(problem.parameters, step)
        self.epoch, self.best, self.steps = 0, 0, 0
        self.values: list[float] = []
        self.validation: list[float] = []
        if path is None:
            self.kept = self.descent.get()
            self._record()
            self.values.append(self.whole())
            if not np.isfinite(self.values[0]):
                raise ArithmeticError(f"J is {self.values[0]} at the start; begin with other parameters, or scale the data")
            self._validate()
        else:
            self._go_on(path)
            self._record()

    @property
    def seconds(self) -> float:
        """Wall time since the first start, without the time between runs."""
        return time.perf_counter() - self._clock

    def _record(self) -> None:
        """Record J of a mini-batch, in which the others take their places."""
        self._mini = self._problem.replace(batch=self._problem.minibatches(self._size)[0])
        self._J = self._mini.reduced_functional()

    def write(self, checkpoint: TrainingCheckpoint) -> None:
        """Write a checkpoint, and begin anew as one who reads it."""
        seconds = self._problem.net.Y.comm.bcast(self.seconds)
        numbers = {"epoch": self.epoch, "best": self.best, "steps": self.steps, "seconds": seconds}
        series = {"values": np.array(self.values), "validation": np.array(self.validation)}
        state = State(numbers, series, self.descent.state | {"kept": self.kept})
        write_state(self._problem, "train_stochastic", checkpoint, state)
        self._record()

    def _go_on(self, path: Path) -> None:
        """Take everything from a checkpoint."""
        counts = dict.fromkeys(("epoch", "best", "steps"), partial(integer, least=0))
        known: Numbers = counts | {"seconds": partial(number, least=0)}
        groups = [*self.descent.state, "kept"]
        state = read_state(self._problem, "train_stochastic", path, known, ("values", "validation"), groups)
        self.epoch, self.best, self.steps = (state.numbers[name] for name in counts)
        self._clock -= state.numbers["seconds"]
        self.values, self.validation = (series.tolist() for series in state.series.values())
        expected = self.epoch + 1, 0 if self._validated is None else self.epoch + 1
        if (len(self.values), len(self.validation)) != expected or self.steps > len(self._rates):
            raise ValueError(
                f"resume: expected a checkpoint of as many epochs and steps, with a validation batch or without one as here, "
                f"got epoch {self.epoch} with {self.steps} steps of {len(self._rates)} in {path}"
            )
        *moments, kept = state.coefficients.values()
        self.descent.go_on(moments, self.steps)
        self.kept = list(kept)

    def whole(self) -> float:
        """J of all samples at the present parameters, a mini-batch after the other."""
        batches = self._problem.minibatches(self._size)
        return float(np.average([self._value(batch) for batch in batches], weights=[sum(batch.weights) for batch in batches]))

    def _value(self, batch: Batch) -> float:
        """J of a mini-batch."""
        self._mini.exchange(batch)
        with stop_annotating():
            return self._decided(float(self._J(self._problem.functions)))

    def _decided(self, value: float) -> float:
        """A number of rank 0, on which decisions rest."""
        return self._problem.net.Y.comm.bcast(value)

    def _validate(self) -> None:
        """Keep the present state if it is the best."""
        if self._validated is not None:
            with stop_annotating():
                self.validation.append(self._decided(float(self._validated.evaluate()[0])))
            if self.epoch and not self.validation[-1] < np.nanmin([*self.validation[:-1], np.inf]):
                return
        self.kept, self.best = self.descent.get(), self.epoch

    def pass_over(self, batches: Sequence[Batch]) -> bool:
        """One epoch; False if it was left because J of a mini-batch is not finite."""
        values = []
        for batch in batches:
            values.append(self._value(batch))
            if not np.isfinite(values[-1]):
                return False
            self.descent.step(self._J, self._rates[self.steps])
            self.steps += 1
        self.epoch += 1
        self.values.append(float(np.average(values, weights=[sum(batch.weights) for batch in batches])))
        self._validate()
        return True

    def progress(self, epochs: int) -> StochasticProgress:
        """Where it is."""
        return StochasticProgress(
            epoch=self.epoch, epochs=epochs, value=self.values[-1],
            validation=self.validation[-1] if self.validation else None, best=self.best,
            rate=float(self._rates[max(self.steps - 1, 0)]) if self._rates.size else 0.0, seconds=self.seconds,
        )  # fmt: skip


def _with_batch(problem: LearningProblem, validation: Batch) -> LearningProblem:
    """The loss of other samples, without the regulariser."""
    if validation.observations is not None or validation.derivatives is not None:
        raise ValueError("validation: expected a batch without observations and derivatives, got one with them")
    try:
        return problem.replace(batch=validation, regulariser=None, checkpoints=None)
    except ValueError as error:
        raise ValueError(str(error).replace("batch.", "validation.", 1)) from error
