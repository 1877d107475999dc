"""Training by TAO: gradients of pyadjoint, inner products of the label measure.

TAO's gradient norm and the first matrix of its L-BFGS are the Riesz maps of the controls, so what is computed are
gradients in L2(Y x (0,T)) and L2(Y x Y x (0,T)), (4.3), (4.4), (4.7), whatever the mesh or the lengths of the layers.
The same holds of TAO's Newton methods, with Hessian actions of pyadjoint: the Riesz maps precondition their linear
solves and measure the radius of their trust regions. The steps do not depend on the units of Y and J (`training.tao`).
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

from fem_resnet.arguments import flag, function, instance, real_array
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.learning.objective import LearningProblem
from fem_resnet.log import log
from fem_resnet.options import checked_options, checked_prefix
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import Replicated
from fem_resnet.ranks import same, together
from fem_resnet.training.tao import Minimiser

__all__ = ["SOLVER_PARAMETERS", "TOLERANCES", "Progress", "Result", "check_monitor", "options_over", "tell", "train"]

#: Options of TAO where the user gives none: L-BFGS.
SOLVER_PARAMETERS = {"tao_type": "lmvm", "tao_max_it": 200}
#: TAO's tolerances where the user gives none of them: the gradient without units at 1e-8 of J, or of the first gradient.
TOLERANCES = {"tao_gatol": 0.0, "tao_grtol": 1e-8, "tao_gttol": 1e-8}


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
        J and the norm of its gradient (label measure) at the end, of what `controls` has and the problem's parameters hold.
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


@supports(
    "no_layers", "gradient_flow", *HELD, *STEPPED, "head", "regulariser", "running", "running_of_controls", "ensemble",
    "derivatives", "observed_times", "checkpoints", "learned_initial", "learned_both", "many_samples", "weights",
    parted=("bounds",),
)  # fmt: skip
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
        otherwise). "tao_type" is one of `training.tao.TYPES`; Newton methods are "nls" (line search) and "ntr" (trust
        region); how far they solve for a step says for example "tao_nls_ksp_rtol". Tolerances are `TOLERANCES` where none
        is given, else those given alone: "tao_gatol" of the gradient's norm in the label measure, which has a unit;
        "tao_grtol" and "tao_gttol" of what does not depend on units, the gradient relative to J and to the first gradient.
        Radii of trust regions are in parts of functions of size one, too.
    monitor
        Called at every iteration on every rank, the problem's parameters being those of that iteration; returning True (on
        one rank at least) stops, and another call goes on from there. If left out, a line an iteration is logged at level
        INFO on rank 0.
    gauss_newton
        Whether Newton methods get the actions of Gauss and Newton in place of the Hessian's (`blocks.gauss_newton`).
    bounds
        Least and largest coefficients by the name of the learned parameter, such as ``{"bias": (-1.0, 1.0), "kernel":
        (None, 0.5)}``: numbers, arrays of the shape of `Parameter.get`, or None for no end; the same at all times. TAO's
        type is then "blmvm", L-BFGS with projections, if none is given; "bnls" and "bntr" are Newton's method with a line
        search and a trust region, which may need far fewer iterations. It starts from the nearest coefficients within, and
        `gradient_norm` leaves out what points out of the bounds. A box on the coefficients of a bias, at the nodes or of `cell_indicators`, is one on a(y, t) there; one on beta is one on b(y, z, t)
        *only where phi and psi are indicators*. Else `LowRankKernel.bound` says how large abs(b) may be.

    Returns
    -------
    Result

    Raises
    ------
    TypeError, ValueError
        If an argument is not what is said above, or differs between ranks; if TAO's type is not taken, does not know bounds, or
        does not ask for an option.
    ArithmeticError
        If J is not finite at the start.
    StepFailure
        If the state overflows in a trial step.

    Examples
    --------
    >>> result = train(problem, {"tao_max_it": 100})  # doctest: +SKIP
    >>> result = train(problem, {"tao_type": "nls", "tao_gatol": 1e-10})  # doctest: +SKIP
    >>> result = train(problem, bounds={"bias": (-1, 1), "kernel": (-1, 1)})  # doctest: +SKIP
    """
    comm = problem.net.Y.comm
    same(comm, bounds=_but_nodal(problem, bounds))
    checked_prefix(options_prefix)
    check_monitor(monitor)
    flag("gauss_newton", gauss_newton)
    pairs = None if bounds is None else _bounds_of_controls(problem, bounds)
    options = options_over({} if bounds is None else {"tao_type": "blmvm"}, solver_parameters)
    functional, _ = problem.record(gauss_newton=gauss_newton)
    minimiser = Minimiser(
        functional,
        problem.functions,
        [basis for parameter in problem.parameters for basis in parameter.space_bases],
        options,
        comm=comm,
        options_prefix=options_prefix,
        bounds=pairs,
        given=checked_options(solver_parameters),
    )
    history: list[Progress] = []
    start, stopped = time.perf_counter(), False

    def watch(iteration, value, gradient_norm):
        nonlocal stopped
        history.append(Progress(iteration, minimiser.limit, value, gradient_norm, time.perf_counter() - start))
        stopped = tell(comm, history[-1], monitor)

    end = minimiser.solve(watch, lambda gradient_norm: stopped)
    return Result(
        value=end.value,
        gradient_norm=end.gradient_norm,
        iterations=history[-1].iteration,
        converged=end.converged and not stopped,
        reason="STOPPED" if stopped else end.reason,
        values=np.array([entry.value for entry in history[:-1]] + [end.value]),
        gradient_norms=np.array([entry.gradient_norm for entry in history[:-1]] + [end.gradient_norm]),
        controls=[p.get(k) for p in problem.parameters for k in range(len(p.functions))],
        seconds=time.perf_counter() - start,
    )


def options_over(defaults: Mapping, given: Mapping | None) -> dict:
    """TAO's options: the given ones over the defaults, and over `TOLERANCES` where they have no tolerance.

    Raises
    ------
    TypeError, ValueError
        As `checked_options`.
    """
    given = checked_options(given)
    tolerances = dict.fromkeys(TOLERANCES, 0.0) if TOLERANCES.keys() & given else TOLERANCES
    return SOLVER_PARAMETERS | tolerances | dict(defaults) | given


def _bounds_of_controls(problem: LearningProblem, bounds: Mapping) -> list[tuple[fd.Function, fd.Function]]:
    """A pair a control."""
    names = [parameter.name for parameter in problem.parameters]
    for name, ends in instance("bounds", bounds, Mapping, 'such as {"bias": (-1.0, 1.0)}').items():
        if name not in names:
            raise ValueError(f"bounds: {name!r} is not learned; what is: {', '.join(names)}")
        if not (isinstance(ends, (list, tuple, np.ndarray)) and len(ends) == 2):
            raise ValueError(f"bounds: expected a pair (low, high) for {name}, got {ends!r}")
    return [
        pair for parameter in problem.parameters for pair in _bounds_of(parameter, *bounds.get(parameter.name, (None, None)))
    ]


def _but_nodal(problem: LearningProblem, bounds: object) -> object:
    """What of the bounds all ranks give alike: all but arrays of node values."""
    if not isinstance(bounds, Mapping):
        return bounds
    nodal = {p.name for p in problem.parameters if not all(isinstance(basis, Replicated) for basis in p.space_bases)}
    return {
        name: [None if np.ndim(end) else end for end in ends]
        if name in nodal and isinstance(ends, (list, tuple, np.ndarray)) else ends
        for name, ends in bounds.items()
    }  # fmt: skip


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
            f"got ({low!r}, {high!r})",
        )
        pair = fd.Function(basis.space), fd.Function(basis.space)
        for function, end in zip(pair, ends):
            basis.write(function, np.broadcast_to(end, basis.shape))
        pairs.append(pair)
    return pairs


def check_monitor(monitor: object) -> None:
    """Raise a TypeError unless it is a function or None."""
    if monitor is not None:
        function("monitor", monitor, "a function of an iteration's progress, or None,")


def tell(comm: MPI.Comm, progress: object, monitor: Callable[[object], bool | None] | None) -> bool:
    """Hand an iteration to the user's monitor, or log its line where there is none; whether a rank's monitor stops.

    What a monitor raises on one rank, be it by Ctrl-C, is raised on all.
    """
    if monitor is not None:
        return comm.allreduce(together(comm, lambda: bool(monitor(progress))), op=MPI.LOR)
    log(comm, logging.INFO, "%s", progress)
    return False
