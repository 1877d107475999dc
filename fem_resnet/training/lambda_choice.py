"""The choice of lambda in (2.11a): min J(C_pre, C) + lambda R(m), by one of three rules over the minima for many lambdas.

With m(lambda) the minimum, its misfit J(m(lambda)) without lambda R rises with lambda, and R(m(lambda)) falls.

- Cross-validation: the lambda with the least misfit of samples that were held out, on average over the folds.
- Discrepancy principle (Morozov): the lambda at which the misfit is that of the noise in the data.
- L-curve (Hansen): the lambda at which the curve (log misfit, log R) has its largest curvature, the corner of the L.

With x(s), y(s) the cubic spline through log misfit and log R as functions of s = log lambda, the curvature is

    kappa = ( x' y'' - x'' y' ) / ( x'^2 + y'^2 )^(3/2)

at the inner lambdas; it is positive where the curve turns from its steep to its flat branch. At the ends the second derivative
of a spline is a guess, so there is none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from pyadjoint.tape import stop_annotating
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq

from fem_resnet.arguments import choice, function, integer, number, real_array
from fem_resnet.features import HELD, REGULARISED, STEPPED, supports
from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.learning.batch import Batch
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.log import log
from fem_resnet.ranks import together, watched
from fem_resnet.training.gradient import train
from fem_resnet.training.signals import Signals

__all__ = ["LambdaChoice", "choose_lambda"]

_RULES = ("cross validation", "discrepancy", "l-curve")
#: So many lambdas an L-curve needs: three inner ones.
_OF_L_CURVE = 5
#: The discrepancy principle ends where the misfit is that close to the noise, relative to it.
_CLOSE = 0.01
#: How many folds cross-validation has if nothing is said.
_FOLDS = 5


@dataclass(frozen=True, repr=False)
class LambdaChoice:
    """A lambda of (2.11a), and what it was chosen by.

    Attributes
    ----------
    chosen : float
        The lambda.
    problem : LearningProblem
        The problem with the regulariser lambda R. Its network and head, the same objects as before, hold the minimum for it.
    rule : str
        The rule.
    weights : numpy.ndarray
        All lambdas that all samples were trained with, decreasing, shape (count,); with "discrepancy" those of its search too.
    misfits, penalties : numpy.ndarray
        J without lambda R, and R, at the end of each training, shape (count,).
    results : tuple
        What `train` has returned for each.
    errors : numpy.ndarray or None
        With "cross validation": the misfit of the samples held out, shape (count, folds). Else None.
    scores : numpy.ndarray
        What the rule goes by, shape (count,): the mean of `errors` over the folds, with the sums of the samples' weights for
        weights; the misfit over the noise; the curvature of the L-curve, NaN at its ends.
    """

    chosen: float
    problem: LearningProblem
    rule: str
    weights: np.ndarray
    misfits: np.ndarray
    penalties: np.ndarray
    results: tuple
    errors: np.ndarray | None
    scores: np.ndarray

    def __repr__(self) -> str:
        return f"LambdaChoice(lambda = {self.chosen:.4g} of {self.weights.size}, by {self.rule}, {self.problem!r})"


@supports(
    "channels", "no_layers", "gradient_flow", *HELD, *STEPPED, "head", *REGULARISED, "running", "running_of_controls",
    "ensemble", "derivatives", "observed_times", "checkpoints", "learned_initial", "learned_both", "lift", "many_samples",
    "weights",
)  # fmt: skip
def choose_lambda(
    problem: LearningProblem,
    weights: Sequence[float],
    train: Callable[[LearningProblem], Any] = train,
    *,
    rule: str = "cross validation",
    noise: float | None = None,
    folds: int | None = None,
    seed: int | None = None,
) -> LambdaChoice:
    """Choose lambda in (2.11a), and train with it. Collective.

    The problem is trained with lambda R in the place of its regulariser R, for one lambda after the other. Each training
    starts where the one before has ended, the first one at the present parameters. So the order matters where J has several
    minima: from large to small lambda is usual; from small to large keeps away from zero parameters, where these are
    stationary.

    Parameters
    ----------
    problem
        The learning problem. Its regulariser is R, such as ``tikhonov(1.0)``.
    weights
        The lambdas, positive numbers, increasing or decreasing, shape (count,): at least two, for "l-curve" at least five.
        ``np.geomspace(1, 1e-6, 13)`` is a start.
    train
        Trains a problem, and assigns the result to its parameters, such as ``lambda p: train(p, eliminate="head")``. For
        "discrepancy" and "l-curve" it should come close to the minimum.
    rule
        "cross validation": each fold of the samples is held out once, and the others are trained, from the present parameters
        on too. "discrepancy": lambda is searched for between the given ones, until the misfit is `noise` up to one percent.
        "l-curve": the largest curvature of log R over log misfit.
    noise
        For "discrepancy": the misfit that noise makes in J, which is that of the true output. For `least_squares` and noise of
        standard deviation delta at each y it is ``delta**2 / 2 * Y.measure``.
    folds
        For "cross validation": into how many parts the samples are divided, as by `LearningProblem.folds`; 5 if left out, or
        as many as samples if these are fewer.
    seed
        For "cross validation": shuffles the samples first; left in order without one.

    Returns
    -------
    LambdaChoice
        The parameters hold the result for the chosen lambda, trained with all samples.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit or differs between ranks, or belongs to another rule; if there is no regulariser; for
        "cross validation" if an initial state is learned, which samples held out do not have, or samples are spread over an
        ensemble. After the trainings: if `noise` is not between the misfits, or the L-curve has no corner at the inner
        lambdas.
    KeyboardInterrupt
        After Ctrl-C, when the present training has ended; the parameters hold what was reached.
    Exception
        Whatever `train` raises; the parameters hold what was reached.

    Examples
    --------
    >>> result = choose_lambda(problem, np.geomspace(1, 1e-6, 13))  # doctest: +SKIP
    >>> result = choose_lambda(problem, [1, 1e-2, 1e-4], rule="discrepancy", noise=0.5 * 0.1**2 * Y.measure)  # doctest: +SKIP
    >>> result.chosen, result.problem.evaluate()[0]  # doctest: +SKIP
    """
    lambdas = _checked_weights(weights)
    function("train", train, "a function of a problem")
    _check_rule(problem, lambdas, choice("rule", rule, _RULES), noise, folds, seed)
    if rule == "cross validation":
        samples = int(np.count_nonzero(sample_weights(problem.batch.weights, problem.batch.samples)))
        folds = integer("folds", min(_FOLDS, samples) if folds is None else folds, least=2, most=samples)
        seed = None if seed is None else integer("seed", seed, least=0, most=np.inf)
    start = _coefficients(problem)
    errors = None
    with Signals(problem.comm) as signals:
        path = _Path(problem, train, signals)
        minima = [path.minimum(weight) for weight in lambdas]
        if rule == "cross validation":
            errors, scores = _cross_validated(path, lambdas, start, folds, seed)
        elif rule == "discrepancy":
            minima = path.until(number("noise", noise, above=0), minima)
    if rule == "cross validation":
        best = int(np.nanargmin(scores))
        _warn_at_the_ends(problem, lambdas, best)
    elif rule == "discrepancy":
        scores = np.array([minimum.misfit for minimum in minima]) / noise
        best = int(np.argmin(np.abs(scores - 1)))
    else:
        scores = _curvatures(minima)
        best = int(np.nanargmax(scores))
        if not scores[best] > 0:
            raise ValueError(
                f"weights: expected some around the corner of the L-curve, got {lambdas[0]:.3g} to {lambdas[-1]:.3g}, where "
                f"it has none; give others, or take another rule"
            )
    _write(problem, minima[best].coefficients)
    order = np.argsort([-minimum.weight for minimum in minima])
    minima, chosen = [minima[k] for k in order], minima[best]
    log(problem.net.Y.comm, logging.INFO, "lambda = %.4g by %s", chosen.weight, rule)
    return LambdaChoice(
        chosen=chosen.weight,
        problem=problem.replace(regulariser=chosen.weight * problem.regulariser),
        rule=rule,
        weights=np.array([minimum.weight for minimum in minima]),
        misfits=np.array([minimum.misfit for minimum in minima]),
        penalties=np.array([minimum.penalty for minimum in minima]),
        results=tuple(minimum.result for minimum in minima),
        errors=None if errors is None else errors[order],
        scores=scores[order],
    )


def _checked_weights(weights: Sequence[float]) -> np.ndarray:
    lambdas = real_array("weights", weights, (None,))
    steps = np.diff(lambdas)
    if len(lambdas) < 2 or not (lambdas > 0).all() or not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError(f"weights: expected at least two positive numbers, increasing or decreasing, got {weights!r}")
    return lambdas


def _check_rule(problem, lambdas, rule, noise, folds, seed) -> None:
    """Refuse what does not go with the rule."""
    if problem.regulariser is None:
        raise ValueError("problem: expected one with a regulariser R, got none; make it with regulariser=tikhonov(1.0)")
    for name, value, owner in (("noise", noise, "discrepancy"), ("folds", folds, _RULES[0]), ("seed", seed, _RULES[0])):
        if value is not None and rule != owner:
            raise ValueError(f"{name}: expected None with rule={rule!r}, got {value!r}; it belongs to rule={owner!r}")
    if rule == "discrepancy":
        if noise is None:
            raise ValueError("noise: expected the misfit that the noise of the data makes, got None; or take another rule")
        number("noise", noise, above=0)
    if rule == "l-curve" and len(lambdas) < _OF_L_CURVE:
        raise ValueError(f"weights: expected at least {_OF_L_CURVE} for the curvature of an L-curve, got {len(lambdas)}")
    if rule == "cross validation":
        for what, there in (
            ("an initial state that is learned", problem.learn != "parameters"),
            ("an ensemble", problem.ensemble),
        ):
            if there:
                raise ValueError(
                    f'rule: expected "discrepancy" or "l-curve" with {what}, got {rule!r}; no samples can be held out'
                )


@dataclass(frozen=True)
class _Minimum:
    """The end of a training with one lambda; the coefficients are this rank's part of all Functions."""

    weight: float
    misfit: float
    penalty: float
    result: Any
    coefficients: list[np.ndarray]


class _Path:
    """Trainings of one problem with one lambda after the other, each from where its parameters are."""

    def __init__(self, problem: LearningProblem, train: Callable[[LearningProblem], Any], signals: Signals):
        self.problem, self._train, self._signals = problem, train, signals
        self._plain = problem.replace(regulariser=None)

    def on(self, batch: Batch) -> _Path:
        """The same with other samples."""
        return _Path(self.problem.replace(batch=batch), self._train, self._signals)

    def minimum(self, weight: float) -> _Minimum:
        """Train with this lambda."""
        problem, comm = self.problem, self.problem.net.Y.comm
        result = together(comm, partial(self._train, problem.replace(regulariser=float(weight) * problem.regulariser)))
        if self._signals.reason():
            raise KeyboardInterrupt  # nothing can be chosen among trainings of which one has no end
        misfit, penalty = _misfit(self._plain), self._penalty()
        log(comm, logging.INFO, "lambda = %.4g: misfit %.6g, R %.6g", weight, misfit, penalty)
        return _Minimum(float(weight), misfit, penalty, result, _coefficients(problem))

    def _penalty(self) -> float:
        """R; the mean over an ensemble, whose members may learn initial states of their own."""
        with stop_annotating():
            R = float(self.problem.regulariser(self.problem.penalised()))
        ensemble = self.problem.ensemble
        return R if ensemble is None else watched(ensemble.ensemble_comm).allreduce(R) / ensemble.ensemble_comm.size

    def until(self, noise: float, minima: list[_Minimum]) -> list[_Minimum]:
        """With more minima, among which is one whose misfit is the noise."""
        below = [minimum.misfit <= noise for minimum in minima]
        if all(below) or not any(below):
            least, most = (extreme(minimum.misfit for minimum in minima) for extreme in (min, max))
            remedy = "larger" if all(below) else "smaller"
            raise ValueError(
                f"noise: expected one between the misfits {least:.6g} and {most:.6g}, got {noise:.6g}; give {remedy} weights"
            )
        # Of several crossings that of the largest lambda.
        crossings = [k for k in range(len(minima) - 1) if below[k] != below[k + 1]]
        k = max(crossings, key=lambda k: minima[k].weight)
        ends, found = minima[k : k + 2], []

        def excess(s: float) -> float:
            minimum = next((end for end in ends if np.log(end.weight) == s), None)
            if minimum is None:
                _write(self.problem, ends[0].coefficients)
                minimum = self.minimum(np.exp(s))
                found.append(minimum)
            ratio = np.log(max(minimum.misfit / noise, np.finfo(float).tiny))
            return 0.0 if abs(ratio) <= _CLOSE else ratio  # a zero ends the search

        brentq(excess, *(np.log(end.weight) for end in ends), xtol=1e-4, disp=False)
        if all(abs(each.misfit / noise - 1) > 2 * _CLOSE for each in (*ends, *found)):
            log(
                self.problem.net.Y.comm, logging.WARNING, "choose_lambda: the misfit jumps over the noise %.6g near "
                "lambda = %.4g; train closer to the minimum, or in the other order", noise, found[-1].weight,
            )  # fmt: skip
        return minima + found


def _misfit(plain: LearningProblem) -> float:
    """J without lambda R, at the present parameters."""
    with stop_annotating():
        return float(plain.evaluate()[0])


def _coefficients(problem: LearningProblem) -> list[np.ndarray]:
    return [np.array(each.dat.data_ro) for each in problem.functions]


def _write(problem: LearningProblem, coefficients: Sequence[np.ndarray]) -> None:
    for each, values in zip(problem.functions, coefficients, strict=True):
        each.dat.data_wo[...] = values


def _cross_validated(whole: _Path, lambdas, start, folds, seed) -> tuple[np.ndarray, np.ndarray]:
    """The misfits of what was held out, shape (count, folds), and their means, shape (count,)."""
    problem = whole.problem
    parts = problem.folds(folds, seed)
    errors = np.empty((len(lambdas), len(parts)))
    for k, (rest, held_out) in enumerate(parts):
        _write(problem, start)
        path, other = whole.on(rest), problem.replace(batch=held_out, regulariser=None)
        for row, weight in zip(errors, lambdas):
            path.minimum(weight)
            row[k] = _misfit(other)
    sizes = [part.samples if part.weights is None else sum(part.weights) for _, part in parts]
    return errors, np.average(errors, axis=1, weights=sizes)


def _warn_at_the_ends(problem: LearningProblem, lambdas: np.ndarray, best: int) -> None:
    if lambdas[best] in (lambdas.min(), lambdas.max()):
        further = "smaller" if lambdas[best] == lambdas.min() else "larger"
        log(
            problem.net.Y.comm, logging.WARNING,
            "choose_lambda: the least error is at the end, lambda = %.4g; give %s weights too", lambdas[best], further,
        )  # fmt: skip


def _curvatures(minima: Sequence[_Minimum]) -> np.ndarray:
    """Those of the L-curve at each lambda, shape (count,); NaN at the ends."""
    values = np.array([(minimum.weight, minimum.misfit, minimum.penalty) for minimum in minima])
    if not (values > 0).all():
        raise ValueError(
            f"weights: expected positive misfits and R for an L-curve, got {values[:, 1:].tolist()}; take another rule"
        )
    rising = np.argsort(values[:, 0])
    s, *curve = np.log(values[rising]).T
    spline = CubicSpline(s, np.array(curve).T)
    (dx, dy), (ddx, ddy) = spline(s, 1).T, spline(s, 2).T
    found = np.full(len(s), np.nan)
    found[rising] = (dx * ddy - ddx * dy) / np.hypot(dx, dy) ** 3
    found[rising[[0, -1]]] = np.nan
    return found
