"""Training by TAO: gradients of pyadjoint, inner products of the label measure.

TAO's gradient norm and the first matrix of its L-BFGS are the Riesz maps of the controls, so what is computed are
gradients in L2(Y x (0,T)) and L2(Y x Y x (0,T)), (4.3), (4.4), (4.7), whatever the mesh or the lengths of the layers.
The same holds of TAO's Newton methods, with Hessian actions of pyadjoint: the Riesz maps precondition their linear
solves and measure the radius of their trust regions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import petsctools
from petsc4py import PETSc
from pyadjoint import MinimizationProblem, TAOSolver
from pyadjoint.optimization.tao_solver import PETScVecInterface, ReducedFunctionalHessianMat, RieszMapPC
from pyadjoint.tape import stop_annotating

from fem_resnet.log import log
from fem_resnet.objective import LearningProblem

__all__ = ["SOLVER_PARAMETERS", "Progress", "Result", "train"]

#: Options of TAO where the user gives none: L-BFGS, to a gradient norm of 1e-8.
SOLVER_PARAMETERS = {"tao_type": "lmvm", "tao_max_it": 200, "tao_gatol": 1e-8, "tao_grtol": 0.0, "tao_gttol": 0.0}

#: The types of TAO that take Hessian actions, with the prefix of their linear solver.
_NEWTON_TYPES = {"nls": "nls", "ntr": "ntr", "ntl": "ntl", "bnls": "bnk", "bntr": "bnk", "bntl": "bnk"}

#: PETSc's code for an operation that a matrix does not have.
_UNSUPPORTED = 83


@dataclass(frozen=True)
class Progress:
    """One iteration: its number of at most `iterations`, J, the norm of its gradient, and seconds since the start."""

    iteration: int
    iterations: int
    value: float
    gradient_norm: float
    seconds: float

    def __str__(self) -> str:
        left = self.seconds / max(self.iteration, 1) * (self.iterations - self.iteration)
        return (
            f"iteration {self.iteration:4d} of {self.iterations}   J = {self.value:.8e}   "
            f"|gradient| = {self.gradient_norm:.2e}   {left:4.0f} s left"
        )


@dataclass(frozen=True)
class Result:
    """How a training ended.

    Attributes
    ----------
    value, gradient_norm : float
        J and the norm of its gradient (label measure) at the end.
    iterations : int
    converged : bool
        Whether a tolerance was met; False where the iterations ran out.
    reason : str
        TAO's reason of stopping, by name.
    values, gradient_norms : numpy.ndarray
        History, one entry an iteration, the start included.
    seconds : float
        Wall time.
    """

    value: float
    gradient_norm: float
    iterations: int
    converged: bool
    reason: str
    values: np.ndarray
    gradient_norms: np.ndarray
    seconds: float


@PETSc.Log.EventDecorator("fem_resnet:train")
def train(
    problem: LearningProblem,
    solver_parameters: dict | None = None,
    *,
    options_prefix: str | None = None,
    monitor: Callable[[Progress], None] | None = None,
    gauss_newton: bool = False,
) -> Result:
    """Minimise J by TAO from the present parameters, and assign what it found to them.

    Also where TAO stops at its limit of iterations, fails to go on, or an evaluation raises: the parameters are then
    those of its last iteration, and `reason` says why. Collective over the communicator of the network.

    Parameters
    ----------
    problem
        The learning problem.
    solver_parameters, options_prefix
        TAO's options over `SOLVER_PARAMETERS` (L-BFGS, which keeps 5 pairs unless `tao_lmvm_mat_lmvm_hist_size` says
        otherwise). Newton methods are "tao_type" "nls" (line search) and "ntr" (trust region); how far they solve for a
        step says for example "tao_nls_ksp_rtol".
    monitor
        Called at every iteration on every rank; if left out, a line an iteration is logged at level INFO on rank 0.
    gauss_newton
        Whether Newton methods get the actions of Gauss and Newton in place of the Hessian's (`blocks.gauss_newton`).

    Returns
    -------
    Result

    Raises
    ------
    StepFailure
        If the state overflows in a trial step.

    Examples
    --------
    >>> result = train(problem, {"tao_max_it": 100})  # doctest: +SKIP
    >>> result = train(problem, {"tao_type": "nls", "tao_gatol": 1e-10})  # doctest: +SKIP
    """
    comm = problem.net.Y.comm
    functional, _ = problem.record(gauss_newton=gauss_newton)
    given = SOLVER_PARAMETERS | (solver_parameters or {})
    with _options_of_the_matrix(_riesz_preconditioner(given["tao_type"]) | given) as parameters:
        solver = TAOSolver(MinimizationProblem(functional), parameters, options_prefix=options_prefix, comm=comm)
    hessian, *_ = solver.tao.getHessian()
    hessian.setPythonContext(_HessianAtItsPoint(functional, comm=comm))
    functions = problem.functions
    interface = PETScVecInterface(functions, comm=comm)
    limit = solver.tao.getMaximumIterations()
    history: list[Progress] = []
    reached = solver.x.duplicate()
    start = time.perf_counter()

    def watch(tao):
        if history and history[-1].iteration == tao.getIterationNumber():
            return  # some types report their start twice
        tao.getSolution().copy(reached)
        _, value, gradient_norm, *_ = tao.getSolutionStatus()
        history.append(Progress(tao.getIterationNumber(), limit, value, gradient_norm, time.perf_counter() - start))
        if monitor is None:
            log(comm, logging.INFO, "%s", history[-1])
        else:
            monitor(history[-1])

    solver.tao.setMonitor(watch)
    # pyadjoint's own solve() raises at the limit of iterations and drops what was found.
    with stop_annotating(), petsctools.inserted_options(solver.tao):
        interface.to_petsc(solver.x, functions)
        try:
            solver.tao.solve()
            reason = solver.tao.getConvergedReason()
        except PETSc.Error as error:
            if error.__cause__ is not None or error.ierr != _UNSUPPORTED or not history:
                raise error.__cause__ or error
            # Where the line search cannot go on, L-BFGS starts afresh, but pyadjoint's first matrix does not survive it.
            # PETSc then finds work vectors still in use when it destroys that TAO, and says so once.
            reason = PETSc.TAO.ConvergedReason.DIVERGED_LS_FAILURE
            with suppress(PETSc.Error):
                solver.tao.destroy()
        finally:
            if history:
                interface.from_petsc(reached, functions)
    return Result(
        value=history[-1].value,
        gradient_norm=history[-1].gradient_norm,
        iterations=history[-1].iteration,
        converged=reason > 0,
        reason=_reasons().get(reason, str(reason)),
        values=np.array([entry.value for entry in history]),
        gradient_norms=np.array([entry.gradient_norm for entry in history]),
        seconds=time.perf_counter() - start,
    )


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


def _riesz_preconditioner(tao_type: str) -> dict:
    if tao_type not in _NEWTON_TYPES:
        return {}
    prefix, kind = f"tao_{_NEWTON_TYPES[tao_type]}_pc_", f"{RieszMapPC.__module__}.{RieszMapPC.__name__}"
    return {f"{prefix}type": "python", f"{prefix}python_type": kind}


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
