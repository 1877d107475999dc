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
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

from fem_resnet.log import log
from fem_resnet.objective import LearningProblem
from fem_resnet.training.tao import Minimiser

__all__ = ["SOLVER_PARAMETERS", "Progress", "Result", "tell", "train"]

#: Options of TAO where the user gives none: L-BFGS, to a gradient norm of 1e-8.
SOLVER_PARAMETERS = {"tao_type": "lmvm", "tao_max_it": 200, "tao_gatol": 1e-8, "tao_grtol": 0.0, "tao_gttol": 0.0}


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
    minimiser = Minimiser(
        functional,
        problem.functions,
        SOLVER_PARAMETERS | (solver_parameters or {}),
        comm=comm,
        options_prefix=options_prefix,
    )
    history: list[Progress] = []
    start = time.perf_counter()

    def watch(iteration, value, gradient_norm):
        history.append(Progress(iteration, minimiser.limit, value, gradient_norm, time.perf_counter() - start))
        tell(comm, history[-1], monitor)

    converged, reason = minimiser.solve(watch)
    return Result(
        value=history[-1].value,
        gradient_norm=history[-1].gradient_norm,
        iterations=history[-1].iteration,
        converged=converged,
        reason=reason,
        values=np.array([entry.value for entry in history]),
        gradient_norms=np.array([entry.gradient_norm for entry in history]),
        seconds=time.perf_counter() - start,
    )


def tell(comm: MPI.Comm, progress: Progress, monitor: Callable[[Progress], bool | None] | None) -> bool | None:
    """Hand an iteration to the user's monitor, or log its line where there is none; what the monitor returned."""
    if monitor is not None:
        return monitor(progress)
    log(comm, logging.INFO, "%s", progress)
    return None
