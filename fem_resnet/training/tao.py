"""TAO as the algorithms of this package use it: over pyadjoint's solver, in inner products of the label measure.

TAO's gradient norm and the first matrix of its L-BFGS are the Riesz maps of the controls; they precondition the linear
solves of its Newton methods and measure the radius of their trust regions. Under bounds, Newton methods solve for the
coefficients that are free: with the rows and columns of Hessian and Riesz map that belong to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress

import firedrake as fd
import numpy as np
import petsctools
from mpi4py import MPI
from petsc4py import PETSc
from pyadjoint import MinimizationProblem, TAOSolver
from pyadjoint.optimization.tao_solver import PETScVecInterface, ReducedFunctionalHessianMat
from pyadjoint.reduced_functional import AbstractReducedFunctional
from pyadjoint.tape import stop_annotating

__all__ = ["BOUNDED_TYPES", "Minimiser"]

#: The types of TAO that take Hessian actions, with the prefix of their linear solver.
_NEWTON_TYPES = {"nls": "nls", "ntr": "ntr", "ntl": "ntl", "bnls": "bnk", "bntr": "bnk", "bntl": "bnk"}

#: The types of TAO that keep to bounds.
BOUNDED_TYPES = ("blmvm", "bncg", "bqnls", "bnls", "bntr", "bntl")

#: PETSc's code for an operation that a matrix does not have.
_UNSUPPORTED = 83


class Minimiser:
    """A TAO for one functional, which may be used again and again. Collective.

    Parameters
    ----------
    functional
        What is minimised, a function of its controls.
    functions
        Where a solve starts, and what takes what it found: one Function a control.
    parameters, options_prefix
        TAO's options; "tao_type" is among them.
    comm
        Communicator of the TAO.
    bounds
        A pair of Functions a control, or none at all.

    Raises
    ------
    ValueError
        If there are bounds, and the type of TAO does not keep to them.
    """

    def __init__(
        self,
        functional: AbstractReducedFunctional,
        functions: Sequence[fd.Function],
        parameters: dict,
        *,
        comm: MPI.Comm,
        options_prefix: str | None = None,
        bounds: Sequence[tuple[fd.Function, fd.Function]] | None = None,
    ):
        self._functional, self._functions, self._comm, self._bounds = functional, functions, comm, bounds
        self._parameters, self._prefix = parameters, options_prefix
        self._interface = PETScVecInterface(functions, comm=comm)
        self._create()
        #: TAO's limit of iterations.
        self.limit = self._solver.tao.getMaximumIterations()

    def _create(self) -> None:
        with _options_of_the_matrix(_riesz_preconditioner(self._parameters["tao_type"]) | self._parameters) as parameters:
            self._solver = TAOSolver(
                MinimizationProblem(self._functional, bounds=self._bounds), parameters, options_prefix=self._prefix,
                comm=self._comm,
            )  # fmt: skip
        tao_type = self._solver.tao.getType()
        if self._bounds is not None and tao_type not in BOUNDED_TYPES:
            raise ValueError(
                f"solver_parameters: TAO's {tao_type!r} does not know bounds; 'tao_type' one of "
                f"{', '.join(map(repr, BOUNDED_TYPES))} is wanted"
            )
        hessian, *_ = self._solver.tao.getHessian()
        hessian.setPythonContext(_HessianAtItsPoint(self._functional, comm=self._comm))
        self._reached = self._solver.x.duplicate()

    def solve(
        self,
        watch: Callable[[int, float, float], None],
        stop: Callable[[float], bool] | None = None,
    ) -> tuple[bool, str]:
        """Minimise from what the Functions hold, and assign to them what the last iteration reached, come what may.

        Parameters
        ----------
        watch
            Called once an iteration with its number, the value and the norm of the gradient: in the label measure, also
            for those types of TAO that test another one, and under bounds of what does not point out of them.
        stop
            Called once an iteration with the norm of the gradient, the Functions holding what was reached: whether that
            is good enough, besides TAO's own tests.

        Returns
        -------
        converged : bool
            Whether a test was met.
        reason : str
            TAO's reason of stopping, by name.

        Raises
        ------
        Exception
            What an evaluation or a callback raised.
        """
        if self._solver is None:
            self._create()
        tao, iteration = self._solver.tao, -1

        def monitor(tao):
            nonlocal iteration
            if iteration == tao.getIterationNumber():
                return  # some types report their start twice
            iteration = tao.getIterationNumber()
            tao.getSolution().copy(self._reached)
            watch(iteration, tao.getSolutionStatus()[1], _gradient_norm(tao))

        def test(tao):
            self._interface.from_petsc(tao.getSolution(), self._functions)
            return True if stop(_gradient_norm(tao)) else None

        tao.cancelMonitor()
        tao.setMonitor(monitor)
        tao.setConvergenceTest(test if stop is not None else None)
        # pyadjoint's own solve() raises at the limit of iterations and drops what was found.
        with stop_annotating(), petsctools.inserted_options(tao):
            self._interface.to_petsc(self._solver.x, self._functions)
            try:
                tao.solve()
                reason = tao.getConvergedReason()
            except PETSc.Error as error:
                if error.__cause__ is not None or error.ierr != _UNSUPPORTED or iteration < 0:
                    self._solver = None  # its vectors may be locked
                    raise error.__cause__ or error
                # Where the line search cannot go on, L-BFGS starts afresh, but pyadjoint's first matrix does not survive
                # it. PETSc then finds work vectors still in use when it destroys that TAO, and says so once.
                reason = PETSc.TAO.ConvergedReason.DIVERGED_LS_FAILURE
                with suppress(PETSc.Error):
                    tao.destroy()
                self._solver = None
            finally:
                if iteration >= 0:
                    self._interface.from_petsc(self._reached, self._functions)
        return reason > 0, _reasons().get(reason, str(reason))


class _HessianAtItsPoint(ReducedFunctionalHessianMat):
    """The Hessian at the point where TAO asked for it.

    Trust regions, also that in which a line search starts, evaluate J elsewhere between two actions; pyadjoint's own
    matrix then acts where the tape happens to stand.
    """

    def update_tape_values(self, *, update_adjoint: bool = True):
        super().update_tape_values(update_adjoint=update_adjoint)
        self._evaluation = self.rf.tape.recompute_count

    def mult_impl(self, A, x):
        if self.rf.tape.recompute_count != self._evaluation:
            self.update_tape_values()
        return super().mult_impl(A, x)

    def createSubMatrix(self, A, rows, columns, reused):
        return _on_subset(A, rows)

    def riesz(self, dual, primal):
        """`primal = R^-1 dual`, Vecs of all coefficients."""
        interface, controls = self.control_interface, self.rf.controls
        functionals = [control._ad_init_zero(dual=True) for control in controls]
        interface.from_petsc(dual, functionals)
        interface.to_petsc(primal, [control.riesz_map(f) for control, f in zip(controls, functionals)])


class _OnSubset:
    """Rows and columns of a Hessian and of its Riesz map."""

    def __init__(self, A: PETSc.Mat, rows: PETSc.IS):
        self._A, self._rows, self._shift = A, rows, 0.0
        self._in, self._out = A.createVecs()

    def _apply(self, action, x, y):
        self._in.set(0.0)
        self._in.isaxpy(self._rows, 1.0, x)
        action(self._in, self._out)
        part = self._out.getSubVector(self._rows)
        part.copy(y)
        self._out.restoreSubVector(self._rows, part)

    def mult(self, A, x, y):
        self._apply(self._A.mult, x, y)
        y.axpy(self._shift, x)

    def shift(self, A, alpha):
        self._shift += alpha

    def riesz(self, dual, primal):
        self._apply(self._A.getPythonContext().riesz, dual, primal)


def _on_subset(A: PETSc.Mat, rows: PETSc.IS) -> PETSc.Mat:
    sizes = rows.getLocalSize(), rows.getSize()
    part = PETSc.Mat().createPython((sizes, sizes), _OnSubset(A, rows), comm=A.comm)
    part.setOption(PETSc.Mat.Option.SYMMETRIC, True)
    part.setUp()
    part.assemble()
    return part


class RieszPreconditioner:
    """PETSc's PC of the Riesz map of a Hessian, or of a part of it; pyadjoint's own does not take parts."""

    def apply(self, pc, x, y):
        pc.getOperators()[1].getPythonContext().riesz(x, y)


def _riesz_preconditioner(tao_type: str) -> dict:
    if tao_type not in _NEWTON_TYPES:
        return {}
    prefix, kind = f"tao_{_NEWTON_TYPES[tao_type]}_pc_", f"{__name__}.{RieszPreconditioner.__name__}"
    return {f"{prefix}type": "python", f"{prefix}python_type": kind}


def _gradient_norm(tao: PETSc.TAO) -> float:
    gradient, _ = tao.getGradient()
    representative = gradient.duplicate()
    tao.getGradientNorm().mult(gradient, representative)
    return float(np.sqrt(max(0.0, gradient.dot(representative))))


@contextmanager
def _options_of_the_matrix(parameters: dict):
    """Set those of L-BFGS's matrix, such as `tao_lmvm_mat_lmvm_hist_size`, and give the others.

    Whatever the prefix of a TAO, PETSc 3.26 looks for its matrix's options without it. The command line goes first.
    """
    options = PETSc.Options()
    of_matrix = {name: value for name, value in parameters.items() if name.startswith(("tao_lmvm_mat", "tao_blmvm_mat"))}
    added = {name: value for name, value in of_matrix.items() if not options.hasName(name)}
    for name, value in added.items():
        options[name] = value
    try:
        yield {name: value for name, value in parameters.items() if name not in of_matrix}
    finally:
        for name in added:
            options.delValue(name)


def _reasons() -> dict[int, str]:
    names = PETSc.TAO.ConvergedReason
    return {getattr(names, name): name for name in dir(names) if name.isupper()}
