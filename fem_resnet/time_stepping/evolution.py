"""Evolution equations for whole fields: y_t = rate(t, y), y of shape (nodes, samples), on a PETSc TS.

Layers step the coefficients that they see (`time_stepping`). What is to be had independently of them, state and
co-state of (2.8) and (4.2), is stepped here as it is written, on the communicator of the mesh, each rank with the
nodes it owns.

A scheme with weights b_i and coefficients A_ij in t has one *partner* for the adjoint equation, with which the discrete
adjoint of the scheme is the scheme of the adjoint: with the same b_i, on the forward stages,

    A^_ij = b_j - b_j A_ji / b_i,        b_i not 0;

in the time s = T - t that runs backwards this is b_j A_ji / b_i, and explicit in the reversed order of the stages if A
is.
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
from fem_resnet.time_stepping.options import in_force, refuse_time_options
from fem_resnet.time_stepping.petsc import adapt_type, register_rk, rk_tableau, stage_values, weakly

__all__ = ["SOLVER_PARAMETERS", "TYPES", "FieldStepper", "Moment", "Path", "Scheme", "Step"]

#: A scheme of order 6, the order of `Path`.
SOLVER_PARAMETERS = {"ts_type": "rk", "ts_rk_type": "6vr"}
_THETA_TYPES = ("theta", "beuler", "cn")
#: The types of TS that step fields.
TYPES = ("rk", *_THETA_TYPES)

#: What the linear systems of implicit types are solved with: to round-off, by their products alone.
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
    """Where a rate is asked for: the time, the number of the step and, for `rk`, of the stage in it."""

    t: float
    step: int
    stage: int


@dataclass(frozen=True)
class Step:
    """A step that was made: its start, its length, the stages (time, value) with their weights b_i, and both ends."""

    start: float
    length: float
    times: np.ndarray
    weights: np.ndarray
    values: list[np.ndarray]
    first: np.ndarray
    last: np.ndarray


@dataclass(frozen=True)
class Scheme:
    """A Runge-Kutta method as TS makes it: A_ij, b_i, c_i, and which kind of TS.

    Attributes
    ----------
    kind : str
        "rk", "theta" (one stage) or "endpoint".
    name : str
        Of the TS's type and method.
    A, b, c : numpy.ndarray
    """

    kind: str
    name: str
    A: np.ndarray
    b: np.ndarray
    c: np.ndarray

    @property
    def used(self) -> np.ndarray:
        """Numbers of the stages with b_i not 0."""
        return np.flatnonzero(self.b)

    def factor(self, z: np.ndarray) -> np.ndarray:
        """The stability function `R(z) = 1 + z b^T (I - z A)^-1 1`: what one step of y_t = c y makes of y, for z = h c."""
        z = np.asarray(z, dtype=complex)[..., None, None]
        stages = np.linalg.solve(np.eye(len(self.b)) - z * self.A, np.ones((*z.shape[:-2], len(self.b), 1)))
        return 1 + (z * (self.b @ stages)[..., None])[..., 0, 0]

    def partner(self) -> dict | None:
        """PETSc options of the TS that steps the adjoint equation backwards as the discrete adjoint does.

        None where there is none: some stage with b_i = 0 is used by another, or the partner is no type of TS (that of
        Crank-Nicolson is not Crank-Nicolson). It wants the forward stages in reversed order, those with b_i = 0 left
        out.
        """
        if self.kind == "theta":
            return {"ts_type": "theta", "ts_theta_theta": float(self.c[-1])}
        used, unused = self.used, np.flatnonzero(self.b == 0)
        if self.kind != "rk" or self.A[np.ix_(used, unused)].any():
            return None
        A, b = self.A[np.ix_(used, used)], self.b[used]
        backwards = (b[None, :] * A.T / b[:, None])[::-1, ::-1]
        name = register_rk(
            f"fem_resnet_partner_of_{self.name}",
            tuple(map(tuple, backwards.tolist())),
            tuple(b[::-1].tolist()),
            tuple(backwards.sum(axis=1).tolist()),
        )
        return {"ts_type": "rk", "ts_rk_type": name}


class FieldStepper:
    """`y_t = rate(moment, y)` with equal steps on a PETSc TS, on the communicator of a label domain.

    Collective. Use as a context: PETSc's objects are destroyed at its end, on all ranks together.

    Parameters
    ----------
    Y
        The label domain.
    samples
        Number of samples.
    rate
        ``rate(moment, y)``, arrays (nodes, samples) to the same.
    derivative
        ``derivative(moment, y, x)``: the derivative of the rate at y in the direction x, for implicit types.
    parameters, options_prefix
        PETSc options of the TS: `rk` of any tableau, `theta`, `beuler` or `cn`, with fixed steps.

    Raises
    ------
    ValueError
        If PETSc refuses the options, or they name another type, adapt the steps, or change start or end.
    """

    def __init__(
        self,
        Y: LabelSpace,
        samples: int,
        rate: Callable[[Moment, np.ndarray], np.ndarray],
        derivative: Callable[[Moment, np.ndarray, np.ndarray], np.ndarray],
        parameters: dict,
        options_prefix: str | None,
    ):
        self.rate, self.derivative = rate, derivative
        self._shape = (Y.nodes, samples)
        if parameters.get("ts_type") in _THETA_TYPES:
            parameters = _IMPLICIT | parameters
        options = petsctools.OptionsManager(
            {"ts_adapt_type": "none"} | parameters, options_prefix=options_prefix, default_prefix="fem_resnet_field_"
        )
        with options.inserted_options():
            refuse_time_options(in_force(options.options_prefix))
        local = Y.nodes * samples
        ts = self._ts = PETSc.TS().create(comm=Y.comm)
        self._y = PETSc.Vec().createMPI((local, PETSc.DETERMINE), comm=Y.comm)
        self._work = [self._y.duplicate()]
        ts.setOptionsPrefix(options.options_prefix)
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.MATCHSTEP)
        ts.setPreStep(weakly(self._begin))
        ts.setPostStep(weakly(self._end))
        with options.inserted_options():
            try:
                ts.setFromOptions()
            except PETSc.Error as error:
                raise ValueError(f"solver_parameters: PETSc refuses {options.parameters}") from error
        if ts.getType() not in TYPES or adapt_type(ts) != "none":
            raise ValueError(
                f"solver_parameters: 'ts_type' is {ts.getType()!r} and 'ts_adapt_type' {adapt_type(ts)!r}; fields are "
                f"stepped by {', '.join(map(repr, TYPES))} with fixed steps ('none')"
            )
        self.scheme = _scheme(ts)
        if self.scheme.kind == "rk":
            ts.setRHSFunction(weakly(self._rhs), self._work[0])
        else:
            self._jacobian = PETSc.Mat().createPython([(local, PETSc.DETERMINE)] * 2, _Shifted(self), comm=Y.comm)
            self._jacobian.setUp()
            ts.setIFunction(weakly(self._residual), self._work[0])
            ts.setIJacobian(weakly(self._set_shift), self._jacobian, self._jacobian)

    def __enter__(self) -> FieldStepper:
        return self

    def __exit__(self, *error) -> None:
        for thing in [self._ts, self._y, *self._work, *([] if self.scheme.kind == "rk" else [self._jacobian])]:
            thing.destroy()

    def solve(
        self, y: np.ndarray, length: float, steps: int, after_step: Callable[[Step], None] = lambda step: None
    ) -> np.ndarray:
        """Step from y at the time 0 to `length`.

        Parameters
        ----------
        y
            Initial value, shape (nodes, samples).
        length
            Where to end, positive.
        steps
            Number of equal steps.
        after_step
            Called with each `Step` when it has been made.

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

    def run(self, y: np.ndarray, length: float, steps: int, after_step: Callable[[Step], None]) -> np.ndarray:
        """As `solve`, but keeps no more than a step: y at the end."""
        steps = integer("steps", steps)
        self._after_step, self._last, self._made, self._stage = after_step, np.array(y), 0, 0
        self._y.array_w[:] = np.ravel(y)
        ts = self._ts
        ts.setTime(0.0)
        ts.setMaxTime(length)
        ts.setStepNumber(0)
        ts.setTimeStep(length / steps)
        ts.setMaxSteps(2 * steps)
        ts.restartStep()  # FSAL tableaus would take the last slope, which is another one where the controls jump
        try:
            ts.solve(self._y)
        except PETSc.Error as error:
            raise error.__cause__ or error
        if self._made != steps:
            raise RuntimeError(
                f"the TS ended with reason {ts.getConvergedReason()} at t = {ts.getTime():g} after {self._made} steps, "
                f"{steps} to t = {length:g} were wanted"
            )
        return self._last

    # -- callbacks ----------------------------------------------------------------------------------------------------

    def _array(self, vec: PETSc.Vec) -> np.ndarray:
        return vec.array_r.reshape(self._shape)

    def _moment(self, t: float) -> Moment:
        return Moment(t, self._made, self._stage)

    def _begin(self, ts):
        self._stage = 0

    def _rhs(self, ts, t, y, F):
        F.array_w[:] = self.rate(self._moment(t), self._array(y)).ravel()
        self._stage += 1

    def _residual(self, ts, t, y, y_t, F):
        F.array_w[:] = y_t.array_r - self.rate(self._moment(t), self._array(y)).ravel()

    def _set_shift(self, ts, t, y, y_t, shift, J, P):
        J.getPythonContext().at = (shift, self._moment(t), self._array(y).copy())
        J.assemble()
        return True

    def _end(self, ts):
        start, h = ts.getPrevTime(), ts.getTime() - ts.getPrevTime()
        stages = [values.reshape(self._shape) for values in stage_values(ts, self._y.getLocalSize())]
        first, self._last = self._last, self._array(self._y).copy()
        self._made += 1
        self._after_step(Step(start, h, start + self.scheme.c * h, self.scheme.b, stages, first, self._last))


class _Shifted:
    """The Jacobian of an implicit stage, `shift x - d rate/dy x`, by its products."""

    def __init__(self, stepper: FieldStepper):
        self._derivative, self._shape = stepper.derivative, stepper._shape

    def mult(self, mat, x, y):
        shift, moment, at = self.at
        y.array_w[:] = shift * x.array_r - self._derivative(moment, at, x.array_r.reshape(self._shape)).ravel()


def _scheme(ts: PETSc.TS) -> Scheme:
    """The method, with the stages that TSGetStages gives."""
    if ts.getType() == "rk":
        return Scheme("rk", ts.getRKType(), *rk_tableau(ts))
    theta, endpoint = ts.getTheta(), ts.getThetaEndpoint()
    name = f"theta {theta:g}"
    if endpoint and theta < 1:
        A = np.array([[0.0, 0.0], [1 - theta, theta]])
        return Scheme("endpoint", f"{name}, endpoint", A, np.array([1 - theta, theta]), np.array([0.0, 1.0]))
    if theta == 1:
        return Scheme("theta", name, np.diag([0.0, 1.0]), np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    return Scheme("theta", name, np.array([[theta]]), np.ones(1), np.array([theta]))


class Path:
    """A field on an interval of time between equidistant values with slopes: piecewise Hermite.

    Two steps make one polynomial of degree 5, so that the error is O(h^6); if the number of steps is odd, each step
    makes one of degree 3, O(h^4).

    Parameters
    ----------
    start, end
        The interval.
    values, slopes
        Shape (steps + 1, nodes, samples).
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
