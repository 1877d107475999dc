r"""The coupled forward-backward system of the maximum principle, solved as one system of equations by PETSc's SNES.

Section 4.2 couples the state and the co-state by the controls: f_t = sigma(a - B f) goes forwards from f_I, r*_t =
B^T(sigma'(u) r*) goes backwards from r*(T), and at all times (a, b) is given by f and r*, (4.10). MSA (`msa`) goes forwards
and backwards in turn. Here all times are unknown together. Both equations are stepped by the network's explicit Runge-Kutta
method and its discrete adjoint, so that a solution is stationary for the J that the network itself computes.

The controls are the smoothed ones of `smoothed_controls`, with a width epsilon that falls in stages. Over sets of rows a
solution is then exactly a stationary point of

    J_epsilon = J - epsilon int int sum_k c_k sqrt(1 - xi_k^2) dy dt                   (for a ball: with |xi|^2 in the root)

where xi is the row, from the middle of A and over its half width. The term keeps controls inside of A, as barriers of interior
point methods do. As epsilon -> 0 this is the first-order condition for the least J in A. J_epsilon - J is at most
epsilon T abs(Y) (1 + sum_k c_k).

The unknowns x = (f, v) are the states at all stages of all steps of all layers, and v = sigma'(u) r* there: 2 x layers x steps
x stages fields. The equations are x = S(x), where S takes the controls of x, goes forwards with them, and then backwards. A
zero of F(x) = x - S(x) solves the whole system. Newton's method has the exact derivative of F by its products, from the
tangent of S, and solves with GMRES. "nrichardson" is the method of successive approximations with smoothed controls, damped by
the line search; "anderson" accelerates it, and costs least while epsilon is large. Types of SNES that want a transpose fail.

A stage starts where the polynomial in log epsilon through the last three solutions leads. If it fails, a width between it and
the last one is inserted. A branch of solutions may end at some epsilon > 0, in a fold: for many samples J_epsilon is not
convex.

PETSc's vectors hold the nodes of each rank, over the communicator of Y. An entry is f or v over a size, times the root of its
part of all weights: so norms of F are root mean squares without a unit, and do not depend on the mesh.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Number

import numpy as np
import petsctools
from petsc4py import PETSc
from pyadjoint.tape import stop_annotating
from scipy.interpolate import krogh_interpolate

from fem_resnet.arguments import instance, number, real_array
from fem_resnet.control.controls import Controls
from fem_resnet.control.row_sets import RowBall, RowBox
from fem_resnet.control.sets.box import Box
from fem_resnet.control.smoothed_controls import SmoothedBox, SmoothedControls, SmoothedRows, StagePairs
from fem_resnet.features import supports
from fem_resnet.learning.batch import Batch
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.log import log
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.network.settings import Layers
from fem_resnet.options import checked_options, checked_prefix, petsc_refusals, reason_name, refuse_unread, unread
from fem_resnet.petsc import converged_reason, shell, weakly
from fem_resnet.theory.sensitivity.layer_stability import scheme_of
from fem_resnet.training.msa import problem_of

__all__ = ["SMOOTHING", "SOLVER_PARAMETERS", "CoupledSolution", "CoupledStage", "solve_maximum_principle"]

#: The widths of the stages if none are given.
SMOOTHING = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)

#: How many widths are inserted, in all, where a stage fails.
_INSERTED = 4

#: PETSc's options if the user gives no others: inexact Newton steps (Eisenstat and Walker), GMRES without a preconditioner.
SOLVER_PARAMETERS = {
    "snes_type": "newtonls", "snes_linesearch_type": "bt", "snes_ksp_ew": True, "snes_rtol": 0.0, "snes_stol": 0.0,
    "snes_atol": 1e-9, "snes_max_it": 15, "ksp_type": "gmres", "ksp_gmres_restart": 200, "ksp_max_it": 1000, "pc_type": "none",
}  # fmt: skip


@dataclass(frozen=True)
class CoupledStage:
    """The solve with one width.

    Attributes
    ----------
    smoothing : float
        The width, without a unit.
    value : float
        J of the smoothed controls.
    residual : float
        The norm of F: a root mean square, without a unit.
    iterations, linear_iterations : int
        SNES's iterations, and those of its KSP.
    reason : str
        SNES's reason, such as "CONVERGED_FNORM_ABS".
    """

    smoothing: float
    value: float
    residual: float
    iterations: int
    linear_iterations: int
    reason: str

    def __str__(self) -> str:
        return (
            f"smoothing {self.smoothing:.1e}   J = {self.value:.8e}   residual {self.residual:.1e}   "
            f"{self.iterations} iterations, {self.linear_iterations} linear   {self.reason}"
        )


@dataclass(frozen=True)
class CoupledSolution:
    """A solution of the coupled system, for the smallest width that was solved for.

    Attributes
    ----------
    problem : LearningProblem
        The problem with the network of the controls found: those of the last stage that converged; if none did, of the first
        stage's last iterate.
    controls : list of Controls
        These controls, one for each layer. They lie in A.
    value : float
        Their J.
    smoothing : float
        The width to which they belong.
    epsilon : float
        epsilon itself, in the unit of a density of H.
    stages : tuple of CoupledStage
        What was tried, one after the other. After a failure comes a width that was inserted, or the end.
    converged : bool
        Whether all widths that were asked for were solved for.
    reason : str
        SNES's reason in the last stage.
    sweeps : int
        How often S was evaluated, with or without a tangent. One costs about as much as J and its gradient.
    seconds : float
        Wall time.
    """

    problem: LearningProblem = field(repr=False)
    controls: list[Controls] = field(repr=False)
    value: float
    smoothing: float
    epsilon: float
    stages: tuple[CoupledStage, ...]
    converged: bool
    reason: str
    sweeps: int
    seconds: float

    def __str__(self) -> str:
        return "\n".join(map(str, self.stages))


# (4.10) holds where J depends on (a, b) through f alone. What is smoothed has to have derivatives.
@supports("channels", "nodal_bias", "bases_by_layer", "head", "many_samples", "weights")
@supports(
    "channels", "nodal_bias", "bases_by_layer", "head", "weights", tool="solve_maximum_principle, A pointwise",
    when=lambda problem, A, **options: isinstance(A, Box), instead="give A as a RowBox or RowBall",
)  # fmt: skip
@PETSc.Log.EventDecorator("fem_resnet:solve_maximum_principle")
def solve_maximum_principle(
    problem: LearningProblem,
    A: Box | RowBox | RowBall,
    *,
    smoothing: float | Sequence[float] = SMOOTHING,
    solver_parameters: dict | None = None,
    options_prefix: str | None = None,
) -> CoupledSolution:
    """Solve (4.1), (4.2) and (4.10) as one system, from the state and co-state of the present controls. Collective.

    Parameters
    ----------
    problem
        Bias and kernel have a value on each layer, the layers are stepped by an explicit Runge-Kutta method with fixed steps,
        and there is no regulariser. Any head and loss are taken, and stay as they are. The problem is not changed: the result
        has a problem of its own. The present controls need not lie in A.
    A
        The set in which (a, b) lies at all y and z, a `Box`, for one sample; or a `RowBox` or `RowBall`, for any number.
    smoothing
        Widths, one for each stage, shape (stages,), or one number. To continue a result, begin with its own width: the first
        stage starts from the state and co-state of the present controls, which solve the system with that width only.
        epsilon is the width times J_0 / (T abs(Y)), where J_0 is the loss of the output 0 (the present J if this is 0).
        For a `Box`, epsilon_v is epsilon over the largest abs(T_f) of A at the size of f_I, and epsilon_f is the width times
        this size, its root mean square (1 if f_I is 0).
    solver_parameters, options_prefix
        PETSc options of the SNES and its KSP, over `SOLVER_PARAMETERS`.

    Returns
    -------
    CoupledSolution

    Raises
    ------
    TypeError, ValueError
        If an argument or option does not fit or differs between ranks; if sigma has a kink, or for a `Box` does not increase
        strictly; if the layers are not stepped by an explicit Runge-Kutta method.

    Examples
    --------
    >>> result = solve_maximum_principle(problem, Box((-1, 1), (-1, 1)))  # doctest: +SKIP
    >>> widths = [result.smoothing, 3e-3, 1e-3]  # doctest: +SKIP
    >>> finer = solve_maximum_principle(result.problem, Box((-1, 1), (-1, 1)), smoothing=widths)  # doctest: +SKIP
    """
    start = time.perf_counter()
    single = isinstance(smoothing, (Number, np.bool_))
    widths = np.array([number("smoothing", smoothing, above=0)]) if single else real_array("smoothing", smoothing, ("stages",))
    if not (len(widths) and (widths > 0).all()):
        raise ValueError(f"smoothing: expected widths > 0, got {smoothing!r}; give one, or one for each stage")
    _check(problem, A)
    given, prefix = checked_options(solver_parameters), checked_prefix(options_prefix)
    options = petsctools.OptionsManager(SOLVER_PARAMETERS | given, prefix, "fem_resnet_coupled_")
    stages: list[CoupledStage] = []
    with stop_annotating():
        system = _System(problem, A)
        solver = _Solver(system, options, tuple(given))
        try:
            found, width = system.start(), float(widths[0])
            path = _Path()
            ahead, inserted = widths.tolist(), 0
            while ahead:
                system.set_width(ahead[0])
                x, stage = solver.solve(path.predicted(ahead[0], found), ahead[0])
                log(problem.net.Y.comm, logging.INFO, "%s", stage)
                stages.append(stage)
                converged = stage.reason.startswith("CONVERGED")
                if converged or len(stages) == 1:
                    found, width = x, ahead[0]
                if converged:
                    path.add(ahead.pop(0), x)
                elif inserted < _INSERTED and path.points:
                    ahead.insert(0, float(np.sqrt(ahead[0] * width)))
                    inserted += 1
                else:
                    break
        finally:
            solver.destroy()
        system.set_width(width)
        controls = system.controls(found)
    changed = problem_of(problem, controls)
    return CoupledSolution(
        problem=changed, controls=controls, value=float(changed.evaluate()[0]), smoothing=width, epsilon=system.epsilon,
        stages=tuple(stages), converged=converged, reason=stages[-1].reason, sweeps=system.sweeps,
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def _check(problem: LearningProblem, A: Box | RowBox | RowBall) -> None:
    net, sigma = problem.net, problem.net.activation
    instance("A", A, (Box, RowBox, RowBall), "train by msa, which takes all sets")
    if not isinstance(A, Box) and A.psi.Y is not net.Y:
        raise ValueError(f"A: expected rows on the network's label space {net.Y!r}, got rows on {A.psi.Y!r}")
    if sigma.kinks:
        raise ValueError(f"activation: expected one without kinks, got {sigma.name}; take a smooth one, or train by msa")
    if isinstance(A, Box) and not sigma.properties.strictly_increasing:
        raise ValueError(f"activation: expected one that increases strictly, got {sigma.name}; give A as a RowBox")
    scheme = scheme_of(net)
    if scheme is None or scheme.kind != "rk":
        raise ValueError(
            f"net: expected layers that are stepped by an explicit Runge-Kutta method, got 'ts_type' "
            f"{net.solver_parameters['ts_type']!r}; take 'rk', or train by msa"
        )


class _Sweep:
    """What S computes at one x: controls, states, preactivations and co-states, layer by layer. Its tangent needs them.

    Attributes
    ----------
    pairs : list of StagePairs
        S(x), one for each layer.
    final : numpy.ndarray
        f(T), shape (nodes, samples).
    """

    def __init__(self, system: _System, x: list[StagePairs]):
        self._system, self._x = system, x
        self.controls = [system.smoothed.value(at) for at in x]
        with np.errstate(over="ignore", invalid="ignore"):
            self.pairs, self.final = self._run()

    def _run(self) -> tuple[list[StagePairs], np.ndarray]:
        system = self._system
        sigma, (A, b) = system.sigma, (system.scheme.A, system.scheme.b)
        f = system.initial
        states: list[list[np.ndarray]] = []
        self._u: list[list[np.ndarray]] = []
        for controls, h in zip(self.controls, system.step_lengths):
            states.append([])
            self._u.append([])
            for _ in range(system.steps):
                slopes: list[np.ndarray] = []
                for row in A:
                    at = f + h * _combined(row, slopes)
                    u = system.argument(controls, at)
                    states[-1].append(at)
                    self._u[-1].append(u)
                    slopes.append(sigma(u))
                f = f + h * _combined(b, slopes)
        r = -system.terminal.gradient(f)
        self._kappa = [[np.empty(0)] * len(layer) for layer in states]
        costates = [[np.empty(0)] * len(layer) for layer in states]
        for l, controls, h in system.backwards(self.controls):
            for first in system.steps_backwards:
                pulled: list = [None] * len(b)
                for i in reversed(range(len(b))):
                    kappa = h * (b[i] * r + _combined(A[i + 1 :, i], pulled[i + 1 :]))
                    v = sigma.derivative(self._u[l][first + i]) * kappa
                    pulled[i] = -system.transpose(controls, v)
                    self._kappa[l][first + i], costates[l][first + i] = kappa, v / system.lengths[l]
                r = r + sum(pulled)
        return [StagePairs(np.array(f), np.array(v)) for f, v in zip(states, costates)], f

    def tangent(self, direction: list[StagePairs]) -> list[StagePairs]:
        """The derivative of S in a direction of x."""
        system, sigma = self._system, self._system.sigma
        A, b = system.scheme.A, system.scheme.b
        moved = [system.smoothed.tangent(at, along) for at, along in zip(self._x, direction)]
        f_1 = np.zeros_like(system.initial)
        states: list[list[np.ndarray]] = []
        u_1: list[list[np.ndarray]] = []
        for l, (controls, change, h) in enumerate(zip(self.controls, moved, system.step_lengths)):
            states.append([])
            u_1.append([])
            for first in range(0, system.steps * len(b), len(b)):
                slopes: list[np.ndarray] = []
                for i, row in enumerate(A):
                    at_1 = f_1 + h * _combined(row, slopes)
                    u = system.argument(change, self.pairs[l].f[first + i]) - system.product(controls, at_1)
                    states[-1].append(at_1)
                    u_1[-1].append(u)
                    slopes.append(sigma.derivative(self._u[l][first + i]) * u)
                f_1 = f_1 + h * _combined(b, slopes)
        r_1 = -system.terminal.curvature(f_1)
        costates = [[np.empty(0)] * len(layer) for layer in states]
        for l, controls, h in system.backwards(self.controls):
            for first in system.steps_backwards:
                pulled: list = [None] * len(b)
                for i in reversed(range(len(b))):
                    j, u = first + i, self._u[l][first + i]
                    kappa_1 = h * (b[i] * r_1 + _combined(A[i + 1 :, i], pulled[i + 1 :]))
                    v_1 = sigma.derivative(u) * kappa_1 + sigma.second_derivative(u) * u_1[l][j] * self._kappa[l][j]
                    v = system.lengths[l] * self.pairs[l].v[j]
                    pulled[i] = -system.transpose(controls, v_1) - system.transpose(moved[l], v)
                    costates[l][j] = v_1 / system.lengths[l]
                r_1 = r_1 + sum(pulled)
        return [StagePairs(np.array(f), np.array(v)) for f, v in zip(states, costates)]


class _System:
    """F(x) = x - S(x) as a map between PETSc's vectors. Collective over the communicator of Y.

    Attributes
    ----------
    smoothed : SmoothedControls
        The controls as functions of x, with the present width.
    epsilon : float
        The present width, in the unit of a density of H.
    sweeps : int
        How often S or its tangent was evaluated.
    """

    smoothed: SmoothedControls
    epsilon: float

    def __init__(self, problem: LearningProblem, A: Box | RowBox | RowBall):
        net = problem.net
        self.Y, self.sigma, self.scheme, self.steps = net.Y, net.activation, scheme_of(net), net.steps
        self._net, self._A, self.sweeps = net, A, 0
        self.lengths = np.diff(net.times)
        self.step_lengths = self.lengths / self.steps
        self.steps_backwards = range((self.steps - 1) * len(self.scheme.b), -1, -len(self.scheme.b))
        self.initial = np.array(self.Y.values(problem.initial_state()))
        self.terminal = _Terminal(problem)
        Y, samples = self.Y, self.initial.shape[1]
        volume = float(net.times[-1]) * Y.measure
        zero = problem.loss_of_zero()
        self._unit = (abs(zero) or abs(float(problem.evaluate()[0])) or 1.0) / volume
        self._size = float(np.sqrt(Y.sum(np.sum(Y.weights @ self.initial**2)) / (Y.measure * samples))) or 1.0
        self._stages = self.steps * len(self.scheme.b)
        self._shape = (net.layers, 2, self._stages, Y.nodes, samples)
        part = np.sqrt(np.multiply.outer(self.lengths / volume / self._stages / samples / 2, Y.weights))
        # v is weighted over the stages: with the weight of one in its size, it compares with f.
        self._scale = np.stack([part / self._size, part * self._stages / self._unit], axis=1)[:, :, None, :, None]
        self.local = int(np.prod(self._shape))

    def set_width(self, width: float) -> None:
        """Smooth with this width from now on."""
        self.epsilon = width * self._unit
        if isinstance(self._A, Box):
            (a0, a1), (b0, b1) = self._A.bias, self._A.kernel
            largest = max(abs(a0), abs(a1)) + max(abs(b0), abs(b1)) * self.Y.measure * self._size
            weights = np.tile(self.scheme.b, self.steps) / self.steps
            self.smoothed = SmoothedBox(self.Y, self._A, self.epsilon / (largest or 1.0), width * self._size, weights)
        else:
            self.smoothed = SmoothedRows(self._A, self.epsilon)

    def start(self) -> np.ndarray:
        """x of the present controls of the network, of shape (size on this rank,)."""
        controls = [Controls.of_layer(self._net, l) for l in range(self._net.layers)]
        self.smoothed = _Given(controls)
        nothing = np.zeros(self._shape[2:])
        x = _Sweep(self, [StagePairs(nothing, nothing)] * self._net.layers).pairs
        return self._packed(x)

    def controls(self, x: np.ndarray) -> list[Controls]:
        """The smoothed controls of x, one for each layer."""
        return [self.smoothed.value(at) for at in self._unpacked(x)]

    def sweep(self, x: np.ndarray) -> _Sweep:
        """S at x."""
        self.sweeps += 1
        return _Sweep(self, self._unpacked(x))

    def residual(self, x: np.ndarray) -> np.ndarray:
        """F(x); NaN on all ranks if x, or what S computes, is not finite on one of them."""
        if not self._finite(x):
            return np.full_like(x, np.nan)
        return x - self._packed(self.sweep(x).pairs)

    def product(self, controls: Controls, f: np.ndarray) -> np.ndarray:
        """B f, shape (nodes, samples)."""
        return controls.phi @ self.Y.sum((self.Y.weights[:, None] * controls.psi).T @ f)

    def argument(self, controls: Controls, f: np.ndarray) -> np.ndarray:
        """The preactivation a - B f, shape (nodes, samples)."""
        return controls.a[:, None] - self.product(controls, f)

    def transpose(self, controls: Controls, v: np.ndarray) -> np.ndarray:
        """B^T v, shape (nodes, samples)."""
        return controls.psi @ self.Y.sum((self.Y.weights[:, None] * controls.phi).T @ v)

    def backwards(self, controls: list[Controls]):
        """Number, controls and step length of each layer, from the last one."""
        return reversed(list(zip(range(len(controls)), controls, self.step_lengths)))

    def _finite(self, x: np.ndarray) -> bool:
        return not self.Y.sum(float(not np.isfinite(x).all()))

    def _packed(self, pairs: list[StagePairs]) -> np.ndarray:
        return np.ravel(np.array([[p.f, p.v] for p in pairs]) * self._scale)

    def _unpacked(self, x: np.ndarray) -> list[StagePairs]:
        return [StagePairs(f, v) for f, v in x.reshape(self._shape) / self._scale]

    def tangent(self, sweep: _Sweep, direction: np.ndarray) -> np.ndarray:
        """The product of F's Jacobian with a direction."""
        self.sweeps += 1
        return direction - self._packed(sweep.tangent(self._unpacked(direction)))


class _Path:
    """Solutions for the last widths, and what they predict for the next one."""

    def __init__(self):
        self.points: list[tuple[float, np.ndarray]] = []

    def add(self, width: float, x: np.ndarray) -> None:
        """Keep a solution, and no more than three."""
        self.points = [*self.points, (np.log(width), x)][-3:]

    def predicted(self, width: float, x: np.ndarray) -> np.ndarray:
        """The polynomial in log epsilon through the solutions; x if there are fewer than two."""
        if len(self.points) < 2:
            return x
        at, values = zip(*self.points)
        return krogh_interpolate(at, values, np.log(width))


class _Given(SmoothedControls):
    """Controls that do not depend on x, in their order."""

    def __init__(self, controls: list[Controls]):
        self._controls = iter(controls)

    def value(self, at: StagePairs) -> Controls:
        return next(self._controls)

    def tangent(self, at: StagePairs, along: StagePairs) -> Controls:
        raise NotImplementedError("controls that are given have no derivative here")


class _Terminal:
    """J as a function of f(T): its gradient r(T) = (4.2b), or that of Remark 4.3, and its second derivative, in L2(Y).

    These are pyadjoint's, of the problem of a network without layers that learns its initial state: so any head and loss will
    do.

    Attributes
    ----------
    value : float
        J at the point of the last gradient.
    """

    value: float

    def __init__(self, problem: LearningProblem):
        given = problem.batch
        self._Y, self._final = problem.net.Y, problem.net.Y.like(given.inputs, problem.net.Y.values(given.inputs))
        self._J, _ = problem.replace(
            net=ResidualNetwork(problem.net.bases["psi"][0], layers=Layers([0.0])), learn="initial",
            batch=Batch(self._final, given.targets, given.weights),
        ).record()  # fmt: skip

    def gradient(self, f: np.ndarray) -> np.ndarray:
        """The gradient at f(T), shape (nodes, samples)."""
        self.value = float(self._J([self._Y.like(self._final, f)]))
        return np.array(self._Y.values(self._J.derivative(apply_riesz=True)[0]))

    def curvature(self, f_1: np.ndarray) -> np.ndarray:
        """The second derivative at the point of the last gradient, in a direction: shape (nodes, samples)."""
        return np.array(self._Y.values(self._J.hessian([self._Y.like(self._final, f_1)], apply_riesz=True)[0]))


class _Solver:
    """A SNES for F = 0."""

    def __init__(self, system: _System, options: petsctools.OptionsManager, given: Sequence[str]):
        self._system, self._options, self._given = system, options, given
        comm = system.Y.comm
        self._x = PETSc.Vec().createMPI((system.local, PETSc.DETERMINE), comm=comm)
        self._F = self._x.duplicate()
        self._product = _Product(system)
        self._jacobian = shell(self._product, (system.local, system.local), comm)
        self._snes = snes = PETSc.SNES().create(comm=comm)
        snes.setFunction(weakly(self._residual), self._F)
        snes.setJacobian(weakly(self._linearise), self._jacobian)
        snes.setOptionsPrefix(options.options_prefix)
        with options.inserted_options(), petsc_refusals(options.parameters):
            snes.setFromOptions()

    def solve(self, x: np.ndarray, width: float) -> tuple[np.ndarray, CoupledStage]:
        """A solution from x, or the last iterate, and what was done."""
        system, snes = self._system, self._snes
        self._x.array_w[:] = x
        with self._options.inserted_options():
            try:
                with petsc_refusals(self._options.parameters):
                    snes.solve(None, self._x)
            except PETSc.Error as error:
                raise error.__cause__ or error
            refuse_unread(unread(self._options, self._given), f"a SNES of type {snes.getType()!r}")
        found = self._x.array_r.copy()
        residual = self._F.duplicate()
        residual.array_w[:] = system.residual(found)
        norm = float(np.sqrt(residual.dot(residual)))
        stage = CoupledStage(
            width, system.terminal.value, norm, snes.getIterationNumber(), snes.getLinearSolveIterations(),
            reason_name(PETSc.SNES, converged_reason(snes)),
        )  # fmt: skip
        residual.destroy()
        return found, stage

    def _residual(self, snes: PETSc.SNES, x: PETSc.Vec, F: PETSc.Vec) -> None:
        F.array_w[:] = self._system.residual(x.array_r.copy())

    def _linearise(self, snes: PETSc.SNES, x: PETSc.Vec, J: PETSc.Mat, P: PETSc.Mat) -> bool:
        self._product.at = self._system.sweep(x.array_r.copy())
        J.assemble()
        return True

    def destroy(self) -> None:
        """Destroy PETSc's objects, on all ranks together."""
        for thing in (self._snes, self._jacobian, self._x, self._F):
            thing.destroy()


class _Product:
    """F's Jacobian, by its products."""

    def __init__(self, system: _System):
        self._system = system
        self.at: _Sweep | None = None

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        y.array_w[:] = self._system.tangent(self.at, x.array_r.copy())


def _combined(weights: np.ndarray, fields: Sequence[np.ndarray]) -> np.ndarray | float:
    """sum_j weights_j fields_j over the fields that are there."""
    return sum((weight * each for weight, each in zip(weights, fields) if weight), 0.0)
