"""Evolution equations for whole fields: y_t = rate(t, y), y of shape (nodes, samples), on a PETSc TS.

Layers step g, the coefficients through which they see f (`ts_layer`). Independently of layers, state and co-state of (2.8) and
(4.2) are stepped here as they are written, on the communicator of the mesh, where each rank has the nodes that it owns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import petsctools
from petsc4py import PETSc
from scipy.interpolate import KroghInterpolator

from fem_resnet.arguments import integer
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.options import checked_options, checked_prefix, petsc_refusals, refuse_unread, unread
from fem_resnet.petsc import adapt_type, converged_reason, new_ts, shell, stage_values, weakly
from fem_resnet.time_stepping.options import in_force, refuse_time_options
from fem_resnet.time_stepping.tableau import tableau_of

__all__ = ["SOLVER_PARAMETERS", "TYPES", "FieldStepper", "Moment", "Path", "Step"]

#: A method of order 6, the order of `Path`.
SOLVER_PARAMETERS = {"ts_type": "rk", "ts_rk_type": "6vr"}
_THETA_TYPES = ("theta", "beuler", "cn")
#: The types of TS that step fields.
TYPES = ("rk", *_THETA_TYPES)

#: Options with which the systems of implicit types are solved to round-off, by products with the Jacobian alone.
_IMPLICIT = {
    "snes_rtol": 1e-13,
    "snes_atol": 1e-15,
    "snes_stol": 1e-15,
    "snes_linesearch_type": "basic",
    "ksp_type": "gmres",
    "ksp_rtol": 1e-14,
    "ksp_atol": 1e-50,
    "pc_type": "none",
}


class Moment(NamedTuple):
    """The point at which a rate is asked for: the time, the number of the step and, for `rk`, the number of the stage."""

    t: float
    step: int
    stage: int


@dataclass(frozen=True)
class Step:
    """A step that was made.

    Attributes
    ----------
    start, length : float
        Its start and its length, in the unit of t.
    times, weights : numpy.ndarray
        The times of the stages and their weights b_i, shape (stages,).
    values : list of numpy.ndarray
        The stages, each of shape (nodes, samples).
    first, last : numpy.ndarray
        y at both ends, shape (nodes, samples).
    """

    start: float
    length: float
    times: np.ndarray
    weights: np.ndarray
    values: list[np.ndarray]
    first: np.ndarray
    last: np.ndarray


AfterStep = Callable[[Step], None]


def _nothing(step: Step) -> None:
    """Do nothing after a step."""


@dataclass
class _Progress:
    """How far a solve has come: y at the start of the present step, the steps that were made, and the number of the stage."""

    last: np.ndarray
    after_step: AfterStep
    made: int = 0
    stage: int = 0


class FieldStepper:
    """Steps `y_t = rate(moment, y)` with equal steps by a PETSc TS on the communicator of a label domain. Collective.

    Use it in a ``with`` statement: at its end PETSc's objects are destroyed, on all ranks together.

    Parameters
    ----------
    Y
        The label domain.
    samples
        Number of samples.
    rate
        ``rate(moment, y)`` returns y_t; both arrays have the shape (nodes, samples).
    derivative
        ``derivative(moment, y, x)`` returns the derivative of the rate at y in the direction x, for implicit types.
    parameters, options_prefix
        The user's options of the TS: `rk` with any tableau, `theta`, `beuler` or `cn`, with fixed steps.
    defaults
        Options that hold where the user gives none.

    Attributes
    ----------
    scheme : Tableau
        The method.

    Raises
    ------
    TypeError, ValueError
        If these are not options, PETSc refuses one or does not ask for it, or one names another type, adapts the steps, or
        changes start or end.
    """

    def __init__(
        self,
        Y: LabelSpace,
        samples: int,
        rate: Callable[[Moment, np.ndarray], np.ndarray],
        derivative: Callable[[Moment, np.ndarray, np.ndarray], np.ndarray],
        parameters: dict | None,
        options_prefix: str | None,
        defaults: dict = SOLVER_PARAMETERS,
    ):
        self.rate, self.derivative = rate, derivative
        self._shape = (Y.nodes, samples)
        given, prefix = checked_options(parameters), checked_prefix(options_prefix)
        known = {"ts_adapt_type": "none"} | defaults | given
        if known.get("ts_type") in _THETA_TYPES:
            known = _IMPLICIT | known
        options = petsctools.OptionsManager(known, options_prefix=prefix, default_prefix="fem_resnet_field_")
        with options.inserted_options():
            refuse_time_options(in_force(options.options_prefix))
        local = Y.nodes * samples
        self._ts = ts = new_ts(Y.comm, options.options_prefix)
        self._y = PETSc.Vec().createMPI((local, PETSc.DETERMINE), comm=Y.comm)
        self._work = self._y.duplicate()
        self._jacobian: PETSc.Mat | None = None
        self._progress = _Progress(np.zeros(self._shape), _nothing)
        ts.setPreStep(weakly(self._begin))
        ts.setPostStep(weakly(self._end))
        with options.inserted_options():
            with petsc_refusals(options.parameters):
                ts.setFromOptions()
            refuse_unread(unread(options, given), f"a TS of type {ts.getType()!r} with fixed steps")
        if ts.getType() not in TYPES or adapt_type(ts) != "none":
            raise ValueError(
                f"solver_parameters: expected one of {', '.join(map(repr, TYPES))} as 'ts_type' and 'none' as 'ts_adapt_type' "
                f"for fields, got {ts.getType()!r} and {adapt_type(ts)!r}"
            )
        self.scheme = tableau_of(ts)
        if self.scheme.kind == "rk":
            ts.setRHSFunction(weakly(self._rhs), self._work)
        else:
            self._jacobian = shell(_Shifted(derivative), (local, local), Y.comm)
            ts.setIFunction(weakly(self._residual), self._work)
            ts.setIJacobian(weakly(self._set_shift), self._jacobian, self._jacobian)

    def __enter__(self) -> FieldStepper:
        return self

    def __exit__(self, *error) -> None:
        for thing in (self._ts, self._y, self._work, self._jacobian):
            if thing is not None:
                thing.destroy()

    def solve(self, y: np.ndarray, length: float, steps: int, after_step: AfterStep = _nothing) -> np.ndarray:
        """Step from y at the time 0 to `length`.

        Parameters
        ----------
        y
            Initial value, shape (nodes, samples).
        length
            The time at which to end, positive.
        steps
            Number of equal steps.
        after_step
            A function that is called with each `Step` when it has been made.

        Returns
        -------
        numpy.ndarray
            y at the ends of all steps, shape (steps + 1, nodes, samples); the first is the initial value.
        """
        values = [np.array(y)]

        def keep(step: Step) -> None:
            values.append(step.last)
            after_step(step)

        self.run(y, length, steps, keep)
        return np.array(values)

    def run(self, y: np.ndarray, length: float, steps: int, after_step: AfterStep) -> np.ndarray:
        """Step from y at the time 0 to `length`, and keep no more than one step.

        Parameters
        ----------
        y, length, steps, after_step
            As for `solve`.

        Returns
        -------
        numpy.ndarray
            y at the end, shape (nodes, samples).

        Raises
        ------
        RuntimeError
            If TS ends before the end.
        """
        steps = integer("steps", steps)
        self._progress = progress = _Progress(np.array(y), after_step)
        self._y.array_w[:] = np.ravel(y)
        ts = self._ts
        ts.setTime(0.0)
        ts.setMaxTime(length)
        ts.setStepNumber(0)
        ts.setTimeStep(length / steps)
        ts.setMaxSteps(2 * steps)
        ts.restartStep()  # FSAL tableaus would reuse the last slope, which is wrong where the controls jump
        try:
            ts.solve(self._y)
        except PETSc.Error as error:
            raise error.__cause__ or error
        if progress.made != steps:
            raise RuntimeError(
                f"solver_parameters: expected {steps} steps to t = {length:g}, got {progress.made} to t = {ts.getTime():g}, "
                f"where the TS ended with reason {converged_reason(ts)}; take more steps or another 'ts_type'"
            )
        return progress.last

    # -- callbacks ----------------------------------------------------------------------------------------------------

    def _array(self, vec: PETSc.Vec) -> np.ndarray:
        return vec.array_r.reshape(self._shape)

    def _moment(self, t: float) -> Moment:
        return Moment(t, self._progress.made, self._progress.stage)

    def _begin(self, ts):
        self._progress.stage = 0

    def _rhs(self, ts, t, y, F):
        F.array_w[:] = self.rate(self._moment(t), self._array(y)).ravel()
        self._progress.stage += 1

    def _residual(self, ts, t, y, y_t, F):
        F.array_w[:] = y_t.array_r - self.rate(self._moment(t), self._array(y)).ravel()

    def _set_shift(self, ts, t, y, y_t, shift, J, P):
        J.getPythonContext().move(shift, self._moment(t), self._array(y).copy())
        J.assemble()
        return True

    def _end(self, ts):
        start, h, progress = ts.getPrevTime(), ts.getTime() - ts.getPrevTime(), self._progress
        stages = [values.reshape(self._shape) for values in stage_values(ts, self._y.getLocalSize())]
        first, progress.last = progress.last, self._array(self._y).copy()
        progress.made += 1
        progress.after_step(Step(start, h, start + self.scheme.c * h, self.scheme.b, stages, first, progress.last))


class _Shifted:
    """The Jacobian of an implicit stage, `shift x - d rate/dy x`, by its products."""

    def __init__(self, derivative: Callable[[Moment, np.ndarray, np.ndarray], np.ndarray]):
        self._derivative = derivative
        self._shift = 0.0
        self._at: tuple[Moment, np.ndarray] | None = None

    def move(self, shift: float, moment: Moment, y: np.ndarray) -> None:
        """Set the shift, and the point of the derivative."""
        self._shift, self._at = shift, (moment, y)

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        moment, at = self._at
        y.array_w[:] = self._shift * x.array_r - self._derivative(moment, at, x.array_r.reshape(at.shape)).ravel()


class Path:
    """A field on an interval of time between equidistant values with slopes: piecewise Hermite.

    Two steps make one polynomial of degree 5, with an error of O(h^6). If the number of steps is odd, each step makes one of
    degree 3, with an error of O(h^4).

    Parameters
    ----------
    start, end
        Start and end of the interval, in the unit of t.
    values, slopes
        The field and its derivative in t, shape (steps + 1, nodes, samples).
    """

    def __init__(self, start: float, end: float, values: np.ndarray, slopes: np.ndarray):
        self._start, self._values, self._slopes = start, values, slopes
        steps = len(values) - 1
        self._h = (end - start) / steps
        self._width = 2 if steps % 2 == 0 else 1
        self._pieces = steps // self._width
        knots = np.repeat(np.arange(self._width + 1.0), 2)
        self._basis = KroghInterpolator(knots, np.eye(len(knots)))

    def __call__(self, t: float) -> np.ndarray:
        """The field at the time t, shape (nodes, samples)."""
        position = (t - self._start) / self._h
        piece = min(max(int(position // self._width), 0), self._pieces - 1) * self._width
        weights = self._basis(position - piece)
        around = slice(piece, piece + self._width + 1)
        value = np.tensordot(weights[0::2], self._values[around], 1)
        return value + self._h * np.tensordot(weights[1::2], self._slopes[around], 1)
