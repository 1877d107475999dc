"""A learning problem at a point where nothing vanishes by accident: its values, derivatives and directions there."""

from __future__ import annotations

from collections.abc import Sequence

import firedrake as fd
import numpy as np
from mpi4py import MPI
from pyadjoint.enlisting import Enlist

from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.parameters.space_basis import LayerTimes
from fem_resnet.time_stepping.methods import METHODS
from fem_resnet.verify.formulas import NotWrittenOut
from fem_resnet.verify.measure import raw
from fem_resnet.verify.reference import Reference

__all__ = ["Point", "close", "has_joints", "names", "own", "part"]

#: Parameters are moved by this part of their size.
_MOVE = 0.1


def own(problem: LearningProblem) -> LearningProblem:
    """The same problem, on the same Functions, with recordings of its own; adapted steps are replayed."""
    return problem.replace(net=problem.net.replace(replay_steps=True))


def names(problem: LearningProblem) -> list[str]:
    """The names of the controls."""
    return [f"{parameter.name}_{k}" for parameter in problem.parameters for k in range(len(parameter.functions))]


def close(problem: LearningProblem) -> float:
    """The relative accuracy of a network's numbers: round-off, or the tolerance of the solves of an implicit type."""
    if problem.net.settings.precision == "single":
        return 1e-6
    parameters = problem.net.solver_parameters
    if not METHODS[parameters["ts_type"]].implicit:
        return 1e-11
    theirs = [float(parameters.get(name, 0.0)) for name in ("snes_rtol", "ksp_rtol")]
    return max(1e-8, 1e2 * max(theirs), 1e2 * float(parameters.get("snes_stol", 0.0)) ** 2)


def has_joints(problem: LearningProblem) -> bool:
    """Whether second derivatives of J jump: those of sigma, or of a term of the regulariser."""
    terms = () if problem.regulariser is None else problem.regulariser.terms
    return bool(problem.net.activation.joints) or not all(getattr(term, "smooth", True) for _, term in terms)


def part(defect: float, size: float) -> float:
    """A defect relative to a size; either may be 0."""
    return float(defect / size) if size > 0 else float(defect > 0)


class Point:
    """J, its derivatives and directions at the problem's parameters, moved by a tenth of their size.

    The parameters are moved, since gradients vanish where all parameters are zero, or at a minimum. `restore` puts them back.
    All methods are collective.

    Parameters
    ----------
    problem
        The problem, from `own`.
    seed
        The seed of the move, the same on every rank.

    Attributes
    ----------
    base : list of ndarray
        The values of the controls at the point, on this rank.
    gradient : list of ndarray
        J' there: functionals as they lie in their Cofunctions, on this rank.
    sizes : list of float
        The size of each control.
    round_off : float
        A bound of the absolute error of J by cancellation (`Reference.round_off`).
    coarseness : float
        A bound of the relative error of gradients by cancellation; large where the loss is next to nothing.
    """

    def __init__(self, problem: LearningProblem, seed: int = 0):
        self.problem, self.Y, self.comm = problem, problem.net.Y, problem.net.Y.comm
        self._rng = np.random.default_rng([2026, seed])
        self.functions = problem.functions
        self._given = [np.array(function.dat.data_ro) for function in self.functions]
        self.sizes = [
            _size_of_times(parameter.get(k)) if isinstance(basis, LayerTimes) else max(self._rms(function), 0.3)
            for parameter in problem.parameters
            for k, (basis, function) in enumerate(zip(parameter.space_bases, parameter.functions))
        ]
        self._move()
        self.J, self.run = problem.record()
        self.base = [np.array(function.dat.data_ro) for function in self.functions]
        self.gradient = self.derivative()
        with Reference(problem) as reference:
            try:
                self.round_off = reference.round_off(reference.output(self._final()))
            except NotWrittenOut:
                self.round_off = 0.0
        loss = abs(float(self.J.functional))
        self.coarseness = min(self.round_off / loss, 1.0) if loss > 0 else float(self.round_off > 0)

    def _final(self) -> np.ndarray:
        return raw(self.run.final, self.Y, (self.Y.nodes, self.problem.batch.samples))

    def _move(self) -> None:
        for function, size in zip(self.functions, self.sizes):
            function.dat.data_wo[...] += _MOVE * size * self.random(function).dat.data_ro

    def restore(self) -> None:
        """Give the problem's Functions the values that they had."""
        for function, values in zip(self.functions, self._given):
            function.dat.data_wo[...] = values

    def stand(self, h: Sequence[fd.Function] | None = None, step: float = 0.0) -> None:
        """Give the problem's Functions the values m + step h."""
        for function, values in zip(self.functions, self.at(h, step)):
            function.dat.data_wo[...] = values.dat.data_ro

    # -- directions ---------------------------------------------------------------------------------------------------

    def sum(self, value: float) -> float:
        """The sum of a number over the ranks. Collective."""
        return float(self.comm.allreduce(float(value)))

    def _rms(self, function: fd.Function) -> float:
        values = function.dat.data_ro
        return (self.sum(np.sum(values**2)) / max(self.sum(values.size), 1)) ** 0.5

    def random(self, like: fd.Function) -> fd.Function:
        """A Function of size one that no partition changes: smooth on the label domain, random numbers elsewhere."""
        return random_like(like, self._rng, self.Y)

    def direction(self, k: int) -> fd.Function:
        """A direction for control k, of its size, along which J rises: half random, half the gradient."""
        random = self.random(self.functions[k])
        g = self.gradient[k]
        length = self.sum(np.sum(g**2)) ** 0.5
        values = random.dat.data_ro.copy()
        if length > 0:
            sign = 1.0 if self.sum(np.sum(g * values)) >= 0 else -1.0
            values = sign * values + g / length * self.sum(values.size) ** 0.5
        random.dat.data_wo[...] = self.sizes[k] * values
        return random

    def alone(self, k: int, direction: fd.Function) -> list[fd.Function]:
        """The direction in control k, zero in all others."""
        return [direction if i == k else fd.Function(f.function_space()) for i, f in enumerate(self.functions)]

    # -- values -------------------------------------------------------------------------------------------------------

    def at(self, h: Sequence[fd.Function] | None = None, step: float = 0.0) -> list[fd.Function]:
        """The controls m + step h, in new Functions."""
        result = []
        for k, values in enumerate(self.base):
            function = fd.Function(self.functions[k].function_space())
            function.dat.data_wo[...] = values if h is None else values + step * h[k].dat.data_ro
            result.append(function)
        return result

    def value(self, h: Sequence[fd.Function] | None = None, step: float = 0.0) -> float:
        """J(m + step h); afterwards the tape holds the values there."""
        return float(self.J(self.at(h, step)))

    def derivative(self) -> list[np.ndarray]:
        """J' at the values that the tape holds: functionals as they lie in their Cofunctions, on this rank."""
        return [np.array(d.dat.data_ro) for d in Enlist(self.J.derivative())]

    def hessian(self, h: Sequence[fd.Function], step: float = 0.0) -> list[np.ndarray]:
        """J''(m + step h) h."""
        self.value(h, step)
        self.J.derivative()
        return [np.array(d.dat.data_ro) for d in Enlist(self.J.hessian(h))]

    def pair(self, functionals: Sequence[np.ndarray], h: Sequence[fd.Function]) -> float:
        """<d, h>: plain sums over what all ranks own."""
        return self.sum(sum(np.sum(d * v.dat.data_ro) for d, v in zip(functionals, h, strict=True)))

    def lengths(self, functionals: Sequence[np.ndarray]) -> np.ndarray:
        """The root of the sum of squares of each functional, shape (controls,)."""
        return np.array([self.sum(np.sum(d**2)) ** 0.5 for d in functionals])


def _size_of_times(times: np.ndarray) -> float:
    """The size of a direction of t_1 .. t_L along which they stay in order."""
    return 0.05 * float(np.diff(times, prepend=0.0).min(initial=1.0))


def random_like(like: fd.Function, rng: np.random.Generator, Y: LabelSpace) -> fd.Function:
    """A Function of size one that no partition changes, as in `Point.random`.

    Parameters
    ----------
    like
        A Function of the same space.
    rng
        The source of random numbers, the same on all ranks.
    Y
        The label domain.
    """
    function = fd.Function(like.function_space())
    space, values = function.function_space(), function.dat.data_wo
    if space.mesh() is Y.V.mesh():
        x = Y.coordinates[: len(values)]  # of one channel
        ends = [
            Y.comm.allreduce(float(sign * (sign * x).max(initial=-np.inf)), op=op)
            for sign, op in ((1, MPI.MAX), (-1, MPI.MIN))
        ]
        extent = (ends[0] - ends[1]) / 2 or 1.0
        columns = space.value_size
        # Three waves a column, so that no column is in the span of a few others.
        waves = sum(
            np.cos(x @ rng.normal(scale=3 / extent, size=(x.shape[1], columns)) + rng.uniform(0, 6, columns)) for _ in range(3)
        )
        values[...] = (waves + rng.normal(size=columns)).reshape(values.shape) / 1.6
        return function
    numbers = rng.normal(size=(space.dim(),))
    if values.size:
        values[...] = numbers.reshape(values.shape)
    return function
