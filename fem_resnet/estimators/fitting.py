"""How an estimator trains: Tikhonov's weight by a small search, and the best state on a validation part.

Least squares of a few thousand parameters are minimised by the method of Levenberg and Marquardt, all else by L-BFGS. The head
is eliminated (variable projection), so that W and mu are always the best ones for the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from pyadjoint.tape import stop_annotating

from fem_resnet.estimators.model import Model
from fem_resnet.learning.batch import Batch
from fem_resnet.learning.loss import least_squares
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.learning.regulariser import Regulariser, tikhonov
from fem_resnet.training.gradient import Result, train
from fem_resnet.training.levenberg_marquardt import train_levenberg_marquardt
from fem_resnet.training.progress import Progress

__all__ = ["USUAL", "Fitted", "Stop", "fit", "regulariser_of", "search"]

#: Tikhonov's weights that are tried.
WEIGHTS = (1.0, 3e-2, 1e-3, 3e-5, 1e-6)
#: Up to so many samples each is held out once, and among more a part of them.
_FEW, _FOLDS = 150, 3
#: With fewer samples nothing is searched for, and this is the weight.
_TOO_FEW, USUAL = 20, 1e-3
#: More parameters than these make the matrix of Gauss and Newton dear.
_MOST_PARAMETERS = 1000


@dataclass(frozen=True)
class Stop:
    """When a training ends.

    Attributes
    ----------
    iterations : int
        At the latest.
    patience : int or None
        After so many iterations without a smaller loss of the validation part; None for no such end.
    seed : int
        Of what is drawn.
    """

    iterations: int
    patience: int | None
    seed: int


@dataclass(frozen=True)
class Fitted:
    """What a training came to.

    Attributes
    ----------
    values : numpy.ndarray
        J at the start and after each iteration, shape (iterations + 1,).
    validation : numpy.ndarray
        The loss of the validation part likewise; shape (0,) without one.
    reason : str
        Why it ended: TAO's reason, one of `train_levenberg_marquardt`, or "PATIENCE".
    """

    values: np.ndarray
    validation: np.ndarray
    reason: str


class _Best:
    """A monitor that keeps the best state on other samples, and stops where it does not get better. Collective."""

    def __init__(self, problem: LearningProblem, batch: Batch, patience: int | None):
        self._problem = problem.replace(batch=batch, regulariser=None)
        self._patience = patience
        self.losses: list[float] = []
        self.state: list[np.ndarray] = []

    def __call__(self, progress: Progress) -> bool:
        with stop_annotating():
            loss = float(self._problem.evaluate()[0])
        if not self.losses or loss < min(self.losses):
            self.state = [p.read(k) for p in self._problem.parameters for k in range(len(p.functions))]
        self.losses.append(loss)
        return self._patience is not None and len(self.losses) - 1 - int(np.argmin(self.losses)) >= self._patience


def regulariser_of(weight: float, model: Model) -> Regulariser:
    """Tikhonov's, so that `weight` means the same for all sizes of the label domain.

    Functions have the mean square one. So a bias of size one has the squared norm of the measure of Y, and a head that makes
    one of such a function has one over it.
    """
    measure = model.net.Y.one.measure
    return tikhonov(weight, bias=weight / measure, W=weight * measure, mu=weight)


def minimise(problem: LearningProblem, stop: Stop, monitor: Callable[[Progress], bool | None] | None) -> Result:
    """Train a problem from its present parameters. Collective."""
    count = sum(parameter.dim for parameter in problem.parameters if parameter not in problem.head.parameters)
    if problem.loss is least_squares and count <= _MOST_PARAMETERS:
        return train_levenberg_marquardt(
            problem, iterations=stop.iterations, eliminate="head", seed=stop.seed, monitor=monitor
        )
    return train(problem, {"tao_max_it": stop.iterations}, eliminate="head", monitor=monitor)


def search(problem: LearningProblem, model: Model, stop: Stop) -> float:
    """Tikhonov's weight with the least loss of samples that were held out. Collective.

    All weights are tried, from the largest on, each from where the one before has ended: what only a nonlinear network can do
    is no better with the second than with the first.

    Parameters
    ----------
    problem
        The problem of all samples; its regulariser does not matter.
    model
        Its parts.
    stop
        When the training ends that follows; here each has a quarter of its iterations.
    """
    samples = problem.batch.samples if problem.batch.weights is None else int(np.count_nonzero(problem.batch.weights))
    if samples < _TOO_FEW:
        return USUAL
    folds = problem.folds(_FOLDS, stop.seed)[: _FOLDS if samples <= _FEW else 1]
    short = Stop(-(-stop.iterations // 4), None, stop.seed)
    model.start(stop.seed)
    states = [model.arrays()] * len(folds)
    errors: list[float] = []
    for weight in WEIGHTS:
        found = []
        for k, (others, held) in enumerate(folds):
            model.write(states[k])
            minimise(problem.replace(batch=others, regulariser=regulariser_of(weight, model)), short, None)
            states[k] = model.arrays()
            with stop_annotating():
                found.append(float(problem.replace(batch=held, regulariser=None).evaluate()[0]))
        errors.append(float(np.mean(found)))
    return WEIGHTS[int(np.argmin(errors))]


def fit(problem: LearningProblem, validation: Batch | None, stop: Stop) -> Fitted:
    """Train from the present parameters, which then hold the result, or the best state on the validation part. Collective.

    Parameters
    ----------
    problem
        The problem.
    validation
        Samples that are not among its own; None for none.
    stop
        When it ends.
    """
    best = None if validation is None else _Best(problem, validation, stop.patience)
    result = minimise(problem, stop, best)
    if best is None:
        return Fitted(result.values, np.empty(0), result.reason)
    places = [(parameter, k) for parameter in problem.parameters for k in range(len(parameter.functions))]
    for (parameter, k), coefficients in zip(places, best.state, strict=True):
        parameter.write(k, coefficients)
    return Fitted(result.values, np.array(best.losses), "PATIENCE" if result.reason == "STOPPED" else result.reason)
