"""Training by TAO: gradients of pyadjoint, inner products of the label measure.

TAO's gradient norm and the first matrix of its L-BFGS are the Riesz maps of the controls, so what is computed are
gradients in L2(Y x (0,T)) and L2(Y x Y x (0,T)), (4.3), (4.4), (4.7), whatever the mesh or the lengths of the layers.
The same holds of TAO's Newton methods, with Hessian actions of pyadjoint: the Riesz maps precondition their linear
solves and measure the radius of their trust regions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import firedrake as fd
import numpy as np
from mpi4py import MPI
from numpy.typing import ArrayLike
from petsc4py import PETSc

from fem_resnet.arguments import real_array
from fem_resnet.log import log
from fem_resnet.objective import LearningProblem
from fem_resnet.parameter import Parameter
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
        TAO's reason of stopping, by name, or "STOPPED" by the monitor.
    values, gradient_norms : numpy.ndarray
        History, one entry an iteration, the start included.
    controls : list of numpy.ndarray
        Coefficients of what was learned, one array a Function of `LearningProblem.functions`, as of `Parameter.get`.
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
    controls: list[np.ndarray]
    seconds: float


@PETSc.Log.EventDecorator("fem_resnet:train")
def train(
    problem: LearningProblem,
    solver_parameters: dict | None = None,
    *,
    options_prefix: str | None = None,
    monitor: Callable[[Progress], bool | None] | None = None,
    gauss_newton: bool = False,
    bounds: Mapping[str, tuple[ArrayLike | None, ArrayLike | None]] | None = None,
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
        Called at every iteration on every rank; returning True (on one rank at least) stops, and another call goes on from
        there. If left out, a line an iteration is logged at level INFO on rank 0.
    gauss_newton
        Whether Newton methods get the actions of Gauss and Newton in place of the Hessian's (`blocks.gauss_newton`).
    bounds
        Least and largest coefficients by the name of the learned parameter, such as ``{"bias": (-1.0, 1.0), "kernel":
        (None, 0.5)}``: numbers, arrays of the shape of `Parameter.get`, or None for no end; the same at all times. TAO's
        type is then "blmvm", L-BFGS with projections, if none is given; "bnls" and "bntr" are Newton's method with a line
        search and a trust region, which may need far fewer iterations. It starts from the nearest coefficients within, and
        `gradient_norm` leaves out what points out of the bounds. (Bounded types other than "blmvm" hold "tao_gatol"
        against an l2 norm of PETSc's, so that `gradient_norm` may end above it.) A box on the coefficients of a bias, at
        the nodes or of `cell_indicators`, is one on a(y, t) there; one on beta is one on b(y, z, t)
        *only where phi and psi are indicators*. Else `LowRankKernel.bound` says how large abs(b) may be.

    Returns
    -------
    Result

    Raises
    ------
    ValueError
        If bounds do not fit, or TAO's type does not know any.
    StepFailure
        If the state overflows in a trial step.

    Examples
    --------
    >>> result = train(problem, {"tao_max_it": 100})  # doctest: +SKIP
    >>> result = train(problem, {"tao_type": "nls", "tao_gatol": 1e-10})  # doctest: +SKIP
    >>> result = train(problem, bounds={"bias": (-1, 1), "kernel": (-1, 1)})  # doctest: +SKIP
    """
    comm = problem.net.Y.comm
    pairs = None if bounds is None else _bounds_of_controls(problem, bounds)
    functional, _ = problem.record(gauss_newton=gauss_newton)
    minimiser = Minimiser(
        functional,
        problem.functions,
        SOLVER_PARAMETERS | ({} if bounds is None else {"tao_type": "blmvm"}) | (solver_parameters or {}),
        comm=comm,
        options_prefix=options_prefix,
        bounds=pairs,
    )
    history: list[Progress] = []
    start, stopped = time.perf_counter(), False

    def watch(iteration, value, gradient_norm):
        nonlocal stopped
        history.append(Progress(iteration, minimiser.limit, value, gradient_norm, time.perf_counter() - start))
        stopped = tell(comm, history[-1], monitor)

    converged, reason = minimiser.solve(watch, None if monitor is None else lambda gradient_norm: stopped)
    if stopped:
        converged, reason = False, "STOPPED"
    return Result(
        value=history[-1].value,
        gradient_norm=history[-1].gradient_norm,
        iterations=history[-1].iteration,
        converged=converged,
        reason=reason,
        values=np.array([entry.value for entry in history]),
        gradient_norms=np.array([entry.gradient_norm for entry in history]),
        controls=[p.get(k) for p in problem.parameters for k in range(len(p.functions))],
        seconds=time.perf_counter() - start,
    )


def _bounds_of_controls(problem: LearningProblem, bounds: Mapping) -> list[tuple[fd.Function, fd.Function]]:
    """A pair a control."""
    names = [parameter.name for parameter in problem.parameters]
    for name in bounds:
        if name not in names:
            raise ValueError(f"bounds: {name!r} is not learned; what is: {', '.join(names)}")
    return [
        pair
        for parameter in problem.parameters
        for pair in _bounds_of(parameter, *bounds.get(parameter.name, (None, None)))
    ]


def _bounds_of(parameter: Parameter, low: ArrayLike | None, high: ArrayLike | None) -> list[tuple[fd.Function, fd.Function]]:
    pairs = []
    for basis in parameter.space_bases:
        # What PETSc takes for no bound.
        ends = [
            real_array("bounds", sign * np.finfo(float).max if end is None else end, comm=basis.Y.comm, finite=False)
            for end, sign in ((low, -1), (high, 1))
        ]
        shapes = [end.shape in ((), basis.shape) for end in ends]
        basis.Y.agree(
            all(shapes) and bool(np.all(ends[0] <= ends[1])),
            f"bounds: {parameter.name} wants (low, high) with low <= high, numbers, None or arrays of shape {basis.shape}; "
            f"({low!r}, {high!r}) was given",
        )
        pair = fd.Function(basis.space), fd.Function(basis.space)
        for function, end in zip(pair, ends):
            basis.write(function, np.broadcast_to(end, basis.shape))
        pairs.append(pair)
    return pairs


def tell(comm: MPI.Comm, progress: object, monitor: Callable[[object], bool | None] | None) -> bool:
    """Hand an iteration to the user's monitor, or log its line where there is none; whether a rank's monitor stops."""
    if monitor is not None:
        return comm.allreduce(bool(monitor(progress)), op=MPI.LOR)
    log(comm, logging.INFO, "%s", progress)
    return False
