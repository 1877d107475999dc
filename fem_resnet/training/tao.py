"""TAO as the algorithms of this package use it: over pyadjoint's solver, in inner products of the label measure.

TAO's gradient norm and the first matrix of its L-BFGS are the Riesz maps of the controls. In Newton methods they
precondition the linear solves and measure the radius of trust regions. Under bounds, Newton methods solve for the free
coefficients, with their rows and columns of Hessian and Riesz map.

TAO sees a functional without units (`without_units`). The caller gets J and the norm of its gradient in the label measure.
TAO's tolerances are tested here, the same for all types: "tao_gatol" is compared with that norm. "tao_grtol" and
"tao_gttol" are relative, and are compared with the gradient without units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import firedrake as fd
import numpy as np
import petsctools
from mpi4py import MPI
from petsc4py import PETSc
from pyadjoint import MinimizationProblem, TAOSolver
from pyadjoint.optimization.tao_solver import PETScVecInterface
from pyadjoint.reduced_functional import AbstractReducedFunctional
from pyadjoint.tape import stop_annotating

from fem_resnet.options import checked_prefix, petsc_refusals, reason_name, refuse_unread, unread
from fem_resnet.parameters.space_basis import SpaceBasis
from fem_resnet.petsc import take_function_lower_bound
from fem_resnet.training.hessian import HessianAtItsPoint
from fem_resnet.training.tao_types import checked_limit, checked_type, defaults_of
from fem_resnet.training.without_units import WithoutUnits, scaled

__all__ = ["Minimiser", "Outcome", "Start"]

#: PETSc's code for an operation that a matrix does not have.
_UNSUPPORTED = 83
_Reason = PETSc.TAO.ConvergedReason
#: Reasons that all algorithms have, by the names that all of them use.
_NAMES = {_Reason.DIVERGED_MAXITS: "ITERATIONS"}


class Start(NamedTuple):
    """What tolerances and units are relative to: |J| at the start, the factor of Riesz maps, the first gradient's norm."""

    scale: float
    share: float
    first: float


class Outcome(NamedTuple):
    """The end of a minimisation: J and its gradient's norm at the Functions, whether a test was met, the reason's name.

    `start` is what another minimisation needs in order to go on with the same units and tolerances.
    """

    value: float
    gradient_norm: float
    converged: bool
    reason: str
    start: Start


@dataclass(frozen=True)
class _Solver:
    """A TAO that may be used again and again.

    Attributes
    ----------
    tao, x
        The TAO, and its solution.
    reached
        The solution of the last iteration.
    tolerances
        "tao_gatol", "tao_grtol" and "tao_gttol".
    least_value
        J at which the minimisation ends.
    pyadjoint
        pyadjoint's solver, which owns the objects to which the TAO points.
    """

    tao: PETSc.TAO
    x: PETSc.Vec
    reached: PETSc.Vec
    tolerances: tuple[float, float, float]
    least_value: float
    pyadjoint: TAOSolver


class Minimiser:
    """A TAO for one functional, which may be used again and again. Collective.

    Parameters
    ----------
    functional
        The functional that is minimised, a function of its controls.
    functions
        The Functions where a solve starts, and to which its result is assigned: one for each control.
    bases
        How they hold coefficients, one for each control.
    parameters, options_prefix
        TAO's options, with a "tao_type".
    comm
        The communicator of the TAO.
    bounds
        A pair of Functions for each control; None for no bounds.
    given
        The names of the options that the user gave.
    twice
        Whether the functional has second derivatives.

    Raises
    ------
    TypeError
        If the options are no dictionary.
    ValueError
        If the type of TAO is none of `tao_types.TYPES`, does not keep to bounds where there are bounds, asks for second
        derivatives where there are none, or does not ask for one of `given`; or if the limit of iterations is no integer
        >= 0.
    """

    def __init__(
        self,
        functional: AbstractReducedFunctional,
        functions: Sequence[fd.Function],
        bases: Sequence[SpaceBasis],
        parameters: Mapping,
        *,
        comm: MPI.Comm,
        options_prefix: str | None = None,
        bounds: Sequence[tuple[fd.Function, fd.Function]] | None = None,
        given: Iterable[str] = (),
        twice: bool = True,
    ):
        self._functional, self._functions, self._comm, self._bounds = functional, functions, comm, bounds
        self._amplitudes = [2.0 ** round(np.log2(basis.amplitude)) for basis in bases]
        units = [basis.unit for basis in bases]
        self._scaled = WithoutUnits(functional, self._amplitudes, units)
        self._parameters, self._prefix, self._given = dict(parameters), checked_prefix(options_prefix), tuple(given)
        self._type = checked_type(str(self._option("tao_type")), bounded=bounds is not None, twice=twice)
        #: TAO's limit of iterations.
        self.limit = checked_limit(self._option("tao_max_it"))
        self._interface = PETScVecInterface(functions, comm=comm)
        self._per_unit = self._interface.new_petsc()
        self._interface.to_petsc(self._per_unit, [1 / unit for unit in units])
        #: None after an error, which may leave the vectors of a TAO locked.
        self._solver: _Solver | None = self._new_solver()

    def _option(self, name: str) -> object:
        """The value of an option; the command line comes before the parameters."""
        if self._prefix is None:
            return self._parameters[name]
        prefix = self._prefix if not self._prefix or self._prefix.endswith("_") else self._prefix + "_"
        return PETSc.Options(prefix).getString(name, str(self._parameters[name]))

    def _new_solver(self) -> _Solver:
        limit = {"tao_max_it": max(self.limit, 1)}  # PETSc takes no 0
        bounds = self._bounds and [
            tuple(scaled(end, 1 / amplitude) for end in pair) for pair, amplitude in zip(self._bounds, self._amplitudes)
        ]
        parameters = defaults_of(self._type) | self._parameters | limit
        # PETSc 3.26 looks for the options of L-BFGS's matrix, such as `tao_lmvm_mat_lmvm_hist_size`, without the TAO's prefix.
        of_the_matrix = {name: parameters.pop(name) for name in list(parameters) if name.startswith(_OF_THE_MATRIX)}
        with _set_for_all(of_the_matrix | _IN_ORDER):
            with petsc_refusals(self._parameters):
                solver = TAOSolver(
                    MinimizationProblem(self._scaled, bounds=bounds), parameters, options_prefix=self._prefix, comm=self._comm
                )
            of_matrix = [name for name in self._given if name not in parameters and not PETSc.Options().used(name)]
            others = [name for name in self._given if name in parameters]
            refuse_unread(of_matrix + unread(petsctools.get_options(solver.tao), others), f"TAO's {self._type!r}")
        tao = solver.tao
        hessian, *_ = tao.getHessian()
        hessian.setPythonContext(HessianAtItsPoint(self._scaled, comm=self._comm))
        tolerances = tao.getTolerances()
        # TAO would compare them with norms and values of its own, so they are tested here instead (`_Course.test`).
        tao.setTolerances(gatol=0.0, grtol=0.0, gttol=0.0)
        return _Solver(tao, solver.x, solver.x.duplicate(), tolerances, take_function_lower_bound(tao), solver)

    def solve(
        self,
        watch: Callable[[int, float, float], None],
        stop: Callable[[float], bool] | None = None,
        *,
        limit: int | None = None,
        since: Start | None = None,
    ) -> Outcome:
        """Minimise from the values of the Functions, and assign the result of the last iteration to them, whatever happens.

        The tape is at the result too, unless an evaluation raised.

        Parameters
        ----------
        watch
            Called once in each iteration with its number, J, and the norm of the gradient in the label measure, while the
            Functions hold what was reached. Under bounds the norm leaves out the part that points out of them.
        stop
            Called once in each iteration with that norm, while the Functions hold what was reached. It returns whether this is
            good enough; TAO's own tests are made too.
        limit
            The largest number of iterations, no larger than `limit` of the minimiser, which holds if left out.
        since
            `Outcome.start` of an earlier minimisation that this one goes on with.

        Returns
        -------
        Outcome
            With J as evaluated at the end, not as reported by TAO.

        Raises
        ------
        ArithmeticError
            If J is not finite at the start.
        Exception
            An error of an evaluation or of a callback.
        """
        solver = self._solver = self._solver or self._new_solver()
        self._scaled.start(*(since or ())[:2])
        course = _Course(self, solver, watch, stop, self.limit if limit is None else limit, since)
        solver.tao.cancelMonitor()
        solver.tao.setMonitor(course.monitor)
        solver.tao.setConvergenceTest(course.test)  # type: ignore[arg-type]  # petsc4py declares reasons as a class, not int
        # pyadjoint's own solve() raises at the limit of iterations and drops the result.
        with stop_annotating(), petsctools.inserted_options(solver.tao), _set_for_all(_IN_ORDER):
            start = [scaled(function, 1 / a) for function, a in zip(self._functions, self._amplitudes)]
            self._interface.to_petsc(solver.x, start)
            try:
                reason = self._run(solver.tao, course)
            finally:
                if course.iteration >= 0:
                    self.assign(solver.reached)
            value = float(self._functional(self._functions))
        reached = Start(self._scaled.scale, self._scaled.share, course.first)
        return Outcome(value, course.norm, reason > 0, _NAMES.get(reason) or reason_name(PETSc.TAO, reason), reached)

    def _run(self, tao: PETSc.TAO, course: _Course) -> int:
        """The reason why the TAO ended, a number of `PETSc.TAO.ConvergedReason`."""
        try:
            tao.solve()
            return tao.getConvergedReason()  # type: ignore[return-value]  # as above
        except PETSc.Error as error:
            self._solver = None
            code = error.ierr  # type: ignore[attr-defined]  # petsc4py does not declare it
            if error.__cause__ is not None or code != _UNSUPPORTED or course.iteration < 0:
                raise error.__cause__ or error
        # Where the line search cannot go on, L-BFGS starts afresh, but pyadjoint's first matrix does not survive that.
        # PETSc then finds work vectors still in use when it destroys this TAO, and says so once.
        with suppress(PETSc.Error):
            tao.destroy()
        return _Reason.DIVERGED_LS_FAILURE

    def assign(self, x: PETSc.Vec) -> None:
        """Assign coefficients over amplitudes, as TAO has them, to the Functions."""
        self._interface.from_petsc(x, self._functions)
        for function, amplitude in zip(self._functions, self._amplitudes):
            if amplitude != 1.0:
                function.dat.data[...] *= amplitude

    def value(self, of_tao: float) -> float:
        """J, from its value that TAO sees."""
        return self._scaled.scale * of_tao

    def gradient_norms(self, tao: PETSc.TAO) -> tuple[float, float]:
        """The norm of J's gradient in the label measure, and the norm of the gradient without units."""
        functional, _ = tao.getGradient()
        gradient = functional.duplicate()
        tao.getGradientNorm().mult(functional, gradient)
        free = functional.dot(gradient)
        gradient.pointwiseMult(gradient, self._per_unit)
        squares = np.maximum(0.0, [functional.dot(gradient), free]) / self._scaled.share
        return float(self._scaled.scale * np.sqrt(squares[0])), float(np.sqrt(squares[1]))


class _Course:
    """One solve: the callbacks that TAO gets, and the numbers that they keep from one iteration to the next.

    Attributes
    ----------
    iteration
        The number of the latest iteration; -1 before the first.
    norm, free, first
        The norm of the gradient in the label measure, the norm without units, and the first norm without units.
    """

    def __init__(
        self,
        minimiser: Minimiser,
        solver: _Solver,
        watch: Callable[[int, float, float], None],
        stop: Callable[[float], bool] | None,
        limit: int,
        since: Start | None,
    ):
        self._minimiser, self._solver, self._watch, self._stop, self._limit = minimiser, solver, watch, stop, limit
        self.iteration, self.norm, self.free = -1, np.nan, np.nan
        self._goes_on, self.first = since is not None, np.nan if since is None else since.first

    def monitor(self, tao: PETSc.TAO) -> None:
        repeated = self.iteration == tao.getIterationNumber()
        self.iteration = tao.getIterationNumber()
        tao.getSolution().copy(self._solver.reached)
        self._minimiser.assign(self._solver.reached)
        self.norm, self.free = self._minimiser.gradient_norms(tao)
        if self.iteration == 0 and not self._goes_on:
            self.first = self.free
        if not repeated:  # some types report their start twice, and some go on from a better one
            self._watch(self.iteration, self._minimiser.value(tao.getSolutionStatus()[1]), self.norm)

    def test(self, tao: PETSc.TAO) -> int | None:
        value = tao.getSolutionStatus()[1]
        gatol, grtol, gttol = self._solver.tolerances
        if self._minimiser.value(value) <= self._solver.least_value:
            return _Reason.CONVERGED_MINF
        if self.norm <= gatol:
            return _Reason.CONVERGED_GATOL
        if self.free <= max(grtol, np.finfo(float).eps) * abs(value):  # below that no step changes J
            return _Reason.CONVERGED_GRTOL
        if self.free <= gttol * self.first:
            return _Reason.CONVERGED_GTTOL
        if self._stop is not None and self._stop(self.norm):
            return _Reason.CONVERGED_USER
        out_of_steps = tao.getConvergedReason() == 0 and self.iteration >= self._limit
        return _Reason.DIVERGED_MAXITS if out_of_steps else None


_OF_THE_MATRIX = ("tao_lmvm_mat", "tao_blmvm_mat")
#: Inner products of several vectors one after the other: BLAS's product with a matrix, which PETSc takes instead, rounds by
#: where the vectors lie in memory, so that a training would not be the same twice.
_IN_ORDER = {"vec_mdot_use_gemv": 0, "vec_maxpy_use_gemv": 0}


@contextmanager
def _set_for_all(given: Mapping[str, Any]) -> Iterator[None]:
    """Set options that PETSc looks for without a prefix, unless the command line has them."""
    options = PETSc.Options()
    added = {name: value for name, value in given.items() if not options.hasName(name)}
    for name, value in added.items():
        options[name] = value
    try:
        yield
    finally:
        for name in added:
            options.delValue(name)
