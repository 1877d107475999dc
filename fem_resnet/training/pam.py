"""Proximal alternating minimisation: Algorithm 1 of section 5.1.

With x_1, x_2, .. the blocks of what is learned, the bias a, the kernel b, then the head and whatever else is learned,

    x_i <- argmin_x  J(.., x, ..) + 1/(2 tau) |x - x_i|^2                                                  (5.1)

one after the other, in the norms of label domain and time (`Parameter.inner`). J has the regulariser, so that with Tikhonov's
it is J_mod of (4.6), with the gradients (4.7). Each block's proximal functional is minimised by TAO from where the block is.
What TAO found is taken only if it is no higher there than the start, evaluated, not estimated; so for any tau > 0, however
inexact TAO was,

    J(a^(k+1), b^(k+1)) <= J(a^k, b^k) - 1/(2 tau) ( |a^(k+1) - a^k|^2 + |b^(k+1) - b^k|^2 ),      the inequality below (5.1).

Its slack, the right-hand side minus the left, is in the result. (5.1 prints sigma for sigma' in the gradients of J; those here
are (4.3), (4.4).)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import firedrake as fd
import numpy as np
from petsc4py import PETSc
from pyadjoint import AdjFloat, ReducedFunctional
from pyadjoint.enlisting import Enlist
from pyadjoint.reduced_functional import AbstractReducedFunctional

from fem_resnet.objective import Batch, LearningProblem
from fem_resnet.parameter import Parameter
from fem_resnet.training.gradient import SOLVER_PARAMETERS, Progress, Result, tell
from fem_resnet.training.tao import Minimiser

__all__ = ["INNER_PARAMETERS", "PamProgress", "PamResult", "ProximalFunctional", "train_pam"]

#: Options of TAO for the inner problems, over `SOLVER_PARAMETERS`, where the user gives none.
INNER_PARAMETERS = {"tao_max_it": 30}

#: An inner problem is solved until its gradient is this part of |x - x_i| / tau, which at its minimum is |D_i J|.
_ACCURACY = 0.1
#: tau grows where every block takes at most so many inner iterations.
_FEW = 5
#: Round-off of J and the squares in the inequality below (5.1), in parts of J.
_ROUND_OFF = 32 * np.finfo(float).eps


@dataclass(frozen=True)
class PamProgress(Progress):
    """One iteration: what `Progress` says, with tau, the slack of the inequality, and the inner iterations of all blocks."""

    tau: float
    slack: float
    inner_iterations: int

    def __str__(self) -> str:
        return f"{super().__str__()}   tau = {self.tau:.1e}   slack = {self.slack:.1e}   {self.inner_iterations:3d} inner"


@dataclass(frozen=True)
class PamResult(Result):
    """How a proximal alternating minimisation ended, and all that is needed to go on.

    What `Result` has; `values` and `gradient_norms` are of J itself, its gradient that in all blocks. The reason is
    "GRADIENT_TOLERANCE", "ITERATIONS", or "NO_PROGRESS", where no block could be moved.

    Attributes
    ----------
    blocks : tuple of str
        Names of the blocks, in their order.
    slacks : numpy.ndarray
        Of the inequality below (5.1), one an iteration: >= 0 up to round-off, but for inertial steps.
    step_norms : numpy.ndarray
        |x_i^(k+1) - x_i^k|, shape (iterations, blocks).
    inner_iterations : numpy.ndarray
        Those of TAO, shape (iterations, blocks).
    taus : numpy.ndarray
        tau, one an iteration.
    controls : list of numpy.ndarray
        What was reached: the coefficients of all that is learned, as `Parameter.get` gives them on this rank.
    previous : list of numpy.ndarray
        The same an iteration before.
    tau, momentum : float
        Of the next iteration; the momentum is Nesterov's t_k, 1 after a restart.
    """

    blocks: tuple[str, ...]
    slacks: np.ndarray
    step_norms: np.ndarray
    inner_iterations: np.ndarray
    taus: np.ndarray
    controls: list[np.ndarray]
    previous: list[np.ndarray]
    tau: float
    momentum: float


class ProximalFunctional(AbstractReducedFunctional):
    """J + 1/(2 tau) |x - centre|^2 as a function of the coefficients x of one block; the others are as the tape has them.

    Parameters
    ----------
    J
        The functional of all that is learned, recorded.
    controls
        Those of the block, among the controls of J.
    parameters
        The block.

    Attributes
    ----------
    tau : float
    centre : list of numpy.ndarray
    value, square : float
        J and |x - centre|^2 at the latest evaluation.
    """

    def __init__(self, J: ReducedFunctional, controls: Sequence, parameters: Sequence[Parameter]):
        self._J = ReducedFunctional(J.functional, list(controls), tape=J.tape)
        self._sets = [(parameter, k) for parameter in parameters for k in range(len(parameter.functions))]
        self.tau, self.centre = 1.0, [parameter.get(k) for parameter, k in self._sets]

    @property
    def controls(self):
        return self._J.controls

    @property
    def tape(self):
        """Where J is recorded."""
        return self._J.tape

    def read(self, functions: Sequence[fd.Function]) -> list[np.ndarray]:
        """Their coefficients. Collective."""
        return [p.space_bases[k].read(function) for (p, k), function in zip(self._sets, functions)]

    def square_of(self, coefficients: Sequence[np.ndarray]) -> float:
        """|x|^2 in the norm of label domain and time. Collective."""
        return sum(p.inner(k, c, c) for (p, k), c in zip(self._sets, coefficients))

    def __call__(self, values) -> AdjFloat:
        values = Enlist(values)
        self.value = float(self._J(values))
        self._offset = [c - d for c, d in zip(self.read(values), self.centre)]
        self.square = self.square_of(self._offset)
        return AdjFloat(self.value + self.square / (2 * self.tau))

    def derivative(self, adj_input=1.0, apply_riesz=False):
        derivatives = Enlist(self._J.derivative(adj_input))
        return self._finished(derivatives, self._offset, adj_input, apply_riesz)

    def hessian(self, m_dot, hessian_input=None, evaluate_tlm=True, apply_riesz=False):
        actions = Enlist(self._J.hessian(m_dot, hessian_input, evaluate_tlm))
        return self._finished(actions, self.read(Enlist(m_dot)), 1.0, apply_riesz)

    def _finished(self, duals, coefficients, scale, apply_riesz):
        """Functionals of J with those of the proximal term added, the latter's gradient being coefficients / tau."""
        for (p, k), dual, c in zip(self._sets, duals, coefficients):
            basis = p.space_bases[k]
            basis.write(dual, basis.read(dual) + float(scale) * p.time_basis.measures[k] / self.tau * basis.dual(c))
        if apply_riesz:
            duals = [control.riesz_map(dual) for control, dual in zip(self.controls, duals)]
        return self.controls.delist(duals)

    def tlm(self, m_dot):
        along = self.read(Enlist(m_dot))
        pairs = zip(self._sets, self._offset, along)
        return self._J.tlm(m_dot) + sum(p.inner(k, c, d) for (p, k), c, d in pairs) / self.tau


class _Block:
    """Parameters that are minimised over together, with the TAO that does it."""

    def __init__(self, name: str, parameters: Sequence[Parameter], J, controls, options: dict, prefix: str | None):
        self.name = name
        self.functions = [function for parameter in parameters for function in parameter.functions]
        self.functional = ProximalFunctional(J, controls, parameters)
        self._sets = [(parameter, k) for parameter in parameters for k in range(len(parameter.functions))]
        comm = parameters[0].space_bases[0].Y.comm
        self._minimiser = Minimiser(self.functional, self.functions, options, comm=comm, options_prefix=prefix)

    def get(self) -> list[np.ndarray]:
        return [parameter.get(k) for parameter, k in self._sets]

    def set(self, coefficients: Sequence[np.ndarray]) -> None:
        for (parameter, k), c in zip(self._sets, coefficients):
            parameter.set(k, c)

    def put_back(self, coefficients: Sequence[np.ndarray]) -> None:
        """Set Functions and tape."""
        self.set(coefficients)
        self.functional(self.functions)

    def square_from(self, coefficients: Sequence[np.ndarray]) -> float:
        """|x - coefficients|^2."""
        return self.functional.square_of([c - d for c, d in zip(self.get(), coefficients)])

    def minimise(self, tau: float, centre: Sequence[np.ndarray]) -> tuple[int, bool]:
        """Minimise from the centre; Functions and tape are then at what was found. Inner iterations, whether it converged."""
        functional, count = self.functional, 0
        functional.tau, functional.centre = tau, centre
        self.set(centre)

        def watch(iteration, value, gradient_norm):
            nonlocal count
            count = iteration

        converged, _ = self._minimiser.solve(
            watch, lambda norm: norm <= _ACCURACY * np.sqrt(self.square_from(centre)) / tau
        )
        functional(self.functions)
        return count, converged


def _blocks(problem: LearningProblem, J: ReducedFunctional, options: dict, prefix: str | None) -> list[_Block]:
    """Bias, kernel, head, then one for each other parameter: those that are learned."""
    head = [] if problem.head is None else problem.head.parameters
    groups: dict[str, list[Parameter]] = {}
    for parameter in problem.parameters:
        groups.setdefault("head" if parameter in head else parameter.name, []).append(parameter)
    controls = {id(function): control for function, control in zip(problem.functions, J.controls)}
    order = [name for name in ("bias", "kernel", "head") if name in groups]
    order += [name for name in groups if name not in order]
    return [
        _Block(name, groups[name], J, [controls[id(f)] for p in groups[name] for f in p.functions], options, prefix)
        for name in order
    ]


@PETSc.Log.EventDecorator("fem_resnet:train_pam")
def train_pam(
    problem: LearningProblem,
    solver_parameters: dict | None = None,
    *,
    tau: float = 1.0,
    iterations: int = 100,
    gradient_tolerance: float = 1e-6,
    adapt: bool = False,
    inertial: bool = False,
    batches: Sequence[Batch] | None = None,
    options_prefix: str | None = None,
    monitor: Callable[[PamProgress], None] | None = None,
    start: PamResult | None = None,
) -> PamResult:
    """Minimise J by Algorithm 1, proximal alternating minimisation (5.1), from the present parameters.

    What is learned holds what was reached; where an evaluation or the monitor raises, or the user interrupts, what the last
    complete iteration reached, and the error goes on. Collective over the communicator of the network.

    Parameters
    ----------
    problem
        The learning problem.
    solver_parameters, options_prefix
        TAO's options for the inner problems, over `SOLVER_PARAMETERS` and `INNER_PARAMETERS`: L-BFGS, or Newton-CG by
        "tao_type" "nls". Besides their own tolerances they stop where the gradient is a tenth of |x - x_i| / tau.
    tau
        The step size, positive: how far a block may go, 1/tau being the weight of half the squared distance.
    iterations
        At most so many, in this call.
    gradient_tolerance
        Stops where the norm of the gradient of J (label measure) is no larger. Not with `batches`.
    adapt
        Whether tau is doubled after an iteration whose inner problems all took 5 iterations of TAO at most, and halved after one
        in which an inner problem was not solved or its result not taken. The inequality holds with the tau of each iteration.
    inertial
        Whether blocks move from x^k + (t_k - 1)/t_(k+1) (x^k - x^(k-1)), t_k Nesterov's, which is also the centre of the
        proximal term then. A block for which J rose so is minimised again from x^k, and the next iteration starts afresh
        with t = 1: J never rises, but the inequality below (5.1) does *not* hold in this form, and its slack may be negative.
    batches
        `problem.minibatches(..)`: iteration k sees the k-th of them, over and over, and everything is said of J of that
        batch: the inequality holds for it within the iteration. For J of all samples *nothing* of that is guaranteed, neither
        that it falls nor that it converges while tau is fixed. The problem has its own batch again afterwards.
    monitor
        Called at every iteration on every rank; if left out, a line an iteration is logged at level INFO on rank 0.
    start
        The result of an earlier call, which is continued: controls, momentum and tau are taken from it, and the outcome
        is that of one call. Other options should be as before.

    Returns
    -------
    PamResult

    Raises
    ------
    ValueError
        If an argument does not fit.
    StepFailure
        If the state overflows in a trial step.
    ArithmeticError
        If the inequality below (5.1) is violated by more than round-off, which only an evaluation of J that gives different
        numbers for the same parameters can do.

    Examples
    --------
    >>> result = train_pam(problem, tau=10.0, iterations=20)  # doctest: +SKIP
    >>> result = train_pam(problem, tau=10.0, iterations=20, start=result)  # doctest: +SKIP
    >>> bool((result.slacks > -1e-14).all())  # doctest: +SKIP
    True
    """
    _check(tau, iterations, gradient_tolerance, batches)
    options = SOLVER_PARAMETERS | INNER_PARAMETERS | {"tao_gatol": 0.1 * gradient_tolerance} | (solver_parameters or {})
    own_batch = problem.batch
    J, _ = problem.record()
    blocks = _blocks(problem, J, options, options_prefix)
    if start is not None and start.blocks != tuple(block.name for block in blocks):
        raise ValueError(f"start: its blocks are {start.blocks}, the problem's {tuple(block.name for block in blocks)}")
    run = _Iterations(problem, J, blocks, tau, adapt, inertial, batches, monitor, iterations)
    try:
        return run(gradient_tolerance, start)
    finally:
        if batches is not None:
            problem.exchange(own_batch)


def _check(tau, iterations, gradient_tolerance, batches) -> None:
    if not (np.isfinite(tau) and tau > 0):
        raise ValueError(f"tau: a positive number is wanted, {tau!r} was given")
    if not isinstance(iterations, (int, np.integer)) or iterations < 0:
        raise ValueError(f"iterations: an integer >= 0 is wanted, {iterations!r} was given")
    if not (np.isfinite(gradient_tolerance) and gradient_tolerance >= 0):
        raise ValueError(f"gradient_tolerance: a number >= 0 is wanted, {gradient_tolerance!r} was given")
    if batches is not None and not len(batches):
        raise ValueError("batches: at least one is wanted, none was given; minibatches() makes them")


class _Iterations:
    """The outer iterations, with their history."""

    def __init__(self, problem, J, blocks, tau, adapt, inertial, batches, monitor, iterations):
        self._problem, self._J, self._blocks = problem, J, blocks
        self._tau, self._momentum = float(tau), 1.0
        self._adapt, self._inertial, self._batches = adapt, inertial, batches
        self._monitor, self._most = monitor, iterations

    def __call__(self, tolerance: float, start: PamResult | None) -> PamResult:
        self._clock, self._done = time.perf_counter(), 0
        self._values, self._norms, self._slacks, self._taus, self._steps, self._inner = [], [], [], [], [], []
        if start is None:
            self._at = self._before = [block.get() for block in self._blocks]
            self._exchange()
            self._note_point(self._evaluate())
            self._tell(0.0, 0)
        else:
            self._take_up(start)
            self._exchange()
            self._evaluate()
        self._most += self._done
        reason = "ITERATIONS"
        try:
            while self._done < self._most:
                if self._batches is None and self._norms[-1] <= tolerance:
                    reason = "GRADIENT_TOLERANCE"
                    break
                if not self._iterate() and self._batches is None:
                    reason = "NO_PROGRESS"
                    break
            else:
                if self._batches is None and self._norms[-1] <= tolerance:
                    reason = "GRADIENT_TOLERANCE"
        finally:
            for block, coefficients in zip(self._blocks, self._at):
                block.set(coefficients)
        return self._result(reason)

    def _take_up(self, start: PamResult) -> None:
        self._at, self._before = self._grouped(start.controls), self._grouped(start.previous)
        for block, coefficients in zip(self._blocks, self._at):
            block.set(coefficients)
        self._tau, self._momentum, self._done = start.tau, start.momentum, start.iterations
        self._clock -= start.seconds
        self._values, self._norms = list(start.values), list(start.gradient_norms)
        self._slacks, self._taus = list(start.slacks), list(start.taus)
        self._steps, self._inner = list(start.step_norms), list(start.inner_iterations)

    def _grouped(self, coefficients: list[np.ndarray]) -> list[list[np.ndarray]]:
        rest = iter(coefficients)
        return [[next(rest) for _ in block.functions] for block in self._blocks]

    def _exchange(self) -> None:
        if self._batches is not None:
            self._problem.exchange(self._batches[self._done % len(self._batches)])

    def _evaluate(self) -> float:
        return float(self._J(self._problem.functions))

    def _iterate(self) -> bool:
        """One iteration; whether a block was moved."""
        if self._batches is None:
            value = self._values[-1]
        else:
            self._exchange()
            value = self._evaluate()
        first, restart, solved = value, False, True
        next_momentum = (1 + np.sqrt(1 + 4 * self._momentum**2)) / 2
        weight = (self._momentum - 1) / next_momentum if self._inertial else 0.0
        inner, squares, reached = [], [], []
        for block, at, before in zip(self._blocks, self._at, self._before):
            count, taken = 0, False
            if weight > 0:
                count, converged = block.minimise(self._tau, [c + weight * (c - d) for c, d in zip(at, before)])
                taken = block.functional.value <= value
                restart = restart or not taken
            if not taken:
                more, converged = block.minimise(self._tau, at)
                count += more
                taken = block.functional.value + block.functional.square / (2 * self._tau) <= value
            if taken:
                value = block.functional.value
            else:
                block.put_back(at)
            solved = solved and converged and taken
            inner.append(count)
            squares.append(block.square_from(at))
            reached.append(block.get())
        slack = first - value - sum(squares) / (2 * self._tau)
        if not self._inertial and slack < -_ROUND_OFF * max(abs(first), abs(value)):
            raise ArithmeticError(f"the inequality below (5.1) is violated by {-slack:.1e} in iteration {self._done + 1}")
        self._before, self._at = self._at, reached
        self._momentum = 1.0 if restart else next_momentum
        self._done += 1
        self._slacks.append(slack)
        self._taus.append(self._tau)
        self._steps.append(np.sqrt(squares))
        self._inner.append(np.array(inner))
        if self._adapt and not solved:
            self._tau /= 2
        elif self._adapt and max(inner) <= _FEW:
            self._tau *= 2
        self._note_point(value)
        self._tell(slack, sum(inner))
        return any(square > 0 for square in squares)

    def _note_point(self, value: float) -> None:
        """J and the norm of its gradient where the tape is."""
        square, duals = 0.0, iter(Enlist(self._J.derivative()))
        for parameter in self._problem.parameters:
            for basis, measure in zip(parameter.space_bases, parameter.time_basis.measures):
                dual = basis.read(next(duals))
                square += basis.pair(dual, basis.primal(dual)) / measure
        self._values.append(value)
        self._norms.append(float(np.sqrt(square)))

    def _tell(self, slack: float, inner: int) -> None:
        progress = PamProgress(
            self._done, max(self._most, self._done), self._values[-1], self._norms[-1], time.perf_counter() - self._clock,
            self._taus[-1] if self._taus else self._tau, slack, inner,
        )  # fmt: skip
        tell(self._problem.net.Y.comm, progress, self._monitor)

    def _result(self, reason: str) -> PamResult:
        blocks = len(self._blocks)
        return PamResult(
            value=self._values[-1],
            gradient_norm=self._norms[-1],
            iterations=self._done,
            converged=reason == "GRADIENT_TOLERANCE",
            reason=reason,
            values=np.array(self._values),
            gradient_norms=np.array(self._norms),
            seconds=time.perf_counter() - self._clock,
            blocks=tuple(block.name for block in self._blocks),
            slacks=np.array(self._slacks),
            step_norms=np.array(self._steps).reshape(-1, blocks),
            inner_iterations=np.array(self._inner, dtype=int).reshape(-1, blocks),
            taus=np.array(self._taus),
            controls=[c for group in self._at for c in group],
            previous=[c for group in self._before for c in group],
            tau=self._tau,
            momentum=self._momentum,
        )
