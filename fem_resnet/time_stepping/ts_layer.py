"""One layer as a PETSc TS: its callbacks, its vectors and the matrices that it is given.

A layer sees f only through g = Psi^T M f. So TS steps (3.5a), for a general low-rank kernel, and f follows by (3.3):

    g_t = Psi^T M sigma(a - Phi beta g),        f(t_1) = f(t_0) + int sigma(a - Phi beta g) dt.

The quadrature is the method's own, f(t_1) = f(t_0) + sum_n h_n sum_i b_i sigma(u_ni). Where PETSc does not give its
weights away, TS steps f too (`state`). Runge-Kutta methods commute with the projection f -> g, so these are the numbers that
stepping f would give. They also commute with linearisation: stepping g and its tangent g_1 gives the derivative of the
discrete layer, and the adjoint of both gives its second derivative. Backwards

    lambda(t_0) = lambda(t_1) + M Psi gamma,      gamma the functional in g,

so that layers with the same psi hand on gamma alone. The time of TS runs from 0 to 1 on each layer, and the layer's length is
a factor of its right-hand side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import petsctools
from petsc4py import PETSc

from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.layers.stage import Stage, StageValue
from fem_resnet.petsc import (
    converged_reason,
    keep_trajectory_in_memory,
    never_adapt,
    new_ts,
    on_pre_stage,
    shell,
    stage_values,
    weakly,
)
from fem_resnet.time_stepping.jacobian import Elimination, LinearLayer, SampleMatrices, ShiftedJacobian, Transposed, Zero
from fem_resnet.time_stepping.methods import Method
from fem_resnet.time_stepping.options import configure
from fem_resnet.time_stepping.state import CarriedState, CoefficientState, LayerState
from fem_resnet.time_stepping.stepper import LayerTrace

__all__ = ["LayerTS"]


class LayerTS:
    """A TS for layers of one shape. The inputs of a solve determine which layer it steps.

    After an error in a callback, vectors stay locked: make a new `LayerTS` then.

    Parameters
    ----------
    stage
        Stage evaluations.
    rank
        Rank of psi.
    steps
        Number of equal steps; if steps are adapted, the first one has that size.
    options
        PETSc options of the TS, from `options.solver_options`.
    method
        The method that the options name.
    adaptive
        Whether the options ask for adapted steps.
    carries_f
        Whether the state has f, and not g alone.
    orders
        1; or 2, to step the tangent too.
    cost
        A running cost, whose c is then stepped too; the state must have f.

    Attributes
    ----------
    ts : petsc4py.PETSc.TS
    state : LayerState
        What its vectors hold.
    y, adjoint_y : petsc4py.PETSc.Vec
        Start and end of a solve, forward and back.
    jacobian : petsc4py.PETSc.Mat
        The matrix that TS is given: the derivative of the right-hand side for explicit methods, of the residual for implicit
        ones.
    linear : LinearLayer
        The derivative behind that matrix.
    trace : LayerTrace
        Steps and stages of the last forward solve.

    Raises
    ------
    ValueError
        If PETSc does not know an option, or a layer cannot be stepped so.
    """

    def __init__(
        self, stage: Stage, rank: int, steps: int, options: petsctools.OptionsManager, method: Method, *,
        adaptive: bool, carries_f: bool, orders: int = 1, cost: RunningCost | None = None,
    ):  # fmt: skip
        self.stage, self.steps, self.method, self.adaptive, self.carries_f = stage, steps, method, adaptive, carries_f
        self._options = options
        self.state: LayerState = (
            CarriedState(stage, rank, orders, cost is not None) if carries_f else CoefficientState(stage, rank, orders)
        )
        self.linear = LinearLayer(stage, self.state, cost)
        self.y, self.adjoint_y, self._work = (self.state.vector() for _ in range(3))
        #: The state at the start of an adapted step.
        self._start = self.state.vector() if adaptive else None
        self.trace = LayerTrace()
        self._inputs: Sequence[LayerInputs] = ()
        self._replayed: list[float] | None = None
        #: The last arguments of the implicit function, for methods whose stages are known from these alone.
        self._calls: list[list[np.ndarray]] = []
        #: Whether TS has come to the stages of its step. Some methods first solve for the slope at the start.
        self._in_stages = True
        #: The size of the step that is tried, and how many steps were rejected before.
        self._tried, self._rejections = 0.0, 0
        self._functionals: Sequence[np.ndarray] = ()
        self._matrix_free = carries_f or options.parameters.get("mat_type") == "matfree"
        #: The Jacobian of an implicit method, where it is assembled.
        self._assembled = (
            SampleMatrices(self.state.size // stage.samples, stage.samples, self.state.comm)
            if method.implicit and not self._matrix_free
            else None
        )
        self.jacobian = self._new_jacobian()
        self.ts = new_ts(self.state.comm, options.options_prefix)
        if method.implicit:
            self._set_implicit()
        else:
            self.ts.setRHSFunction(weakly(self._rate), self.state.vector())
            self.ts.setRHSJacobian(weakly(self._set_point), self.jacobian, self.jacobian)
        self._configure()
        self._max_steps = self.ts.getMaxSteps()
        #: Weights and nodes of the quadrature by which f follows.
        self._weights, self._nodes = np.empty(0), np.empty(0)
        if method.quadrature is not None:
            with options.inserted_options():
                self._weights, self._nodes = method.quadrature(self.ts)
            self.linear.remember(len(self._weights))

    def _configure(self) -> None:
        ts = self.ts
        ts.setErrorIfStepFails(False)
        ts.setPreStep(weakly(self._set_step))
        ts.setPostStep(weakly(self._keep_step))
        if self.adaptive or self.method.solves_for_first_slope:
            on_pre_stage(ts, weakly(self._enter_stage))
        configure(ts, self._options, ("mat_type",))
        if self.adaptive:
            assert isinstance(self.state, CarriedState), "adapted steps are judged by the error of f"
            rtol, atol = ts.getTolerances()
            pointwise = self._options.parameters.get("ts_adapt_wnormtype", "2").lower() == "infinity"
            relative, absolute = self.state.tolerances(rtol, atol, pointwise)
            ts.setTolerances(relative, absolute)  # type: ignore[arg-type]  # vectors, against petsc4py's stubs

    def _new_jacobian(self) -> PETSc.Mat:
        sizes = (self.state.size,) * 2
        if not self.method.implicit:
            return shell(Transposed(weakly(self._state_transpose)), sizes, self.state.comm)
        if self._assembled is None:
            return shell(ShiftedJacobian(self.linear), sizes, self.state.comm)
        return self._assembled.mat

    def _set_implicit(self) -> None:
        ts, state = self.ts, self.state
        ts.setIFunction(weakly(self._residual), state.vector())
        ts.setIJacobian(weakly(self._set_jacobian), self.jacobian, self.jacobian)
        if self.method.partitioned:
            # With an explicit part, which is zero, PETSc takes its partitioned path, which does not solve for a first slope.
            ts.setRHSFunction(lambda ts, t, y, F: F.set(0.0), state.vector())
            zero = shell(Zero(), (state.size,) * 2, state.comm)
            ts.setRHSJacobian(lambda ts, t, y, J, P: None, zero, zero)
        ksp = ts.getSNES().getKSP()
        # pbjacobi inverts the matrices of one stage: where stages are coupled, it is only a preconditioner.
        exact = self.carries_f or not (self._matrix_free or self.method.stages_by_call)
        ksp.setType("preonly" if exact else "gmres")
        ksp.setTolerances(rtol=1e-10)
        if self.carries_f:
            ksp.getPC().setType("python")
            ksp.getPC().setPythonContext(Elimination(self.linear))
        elif self._matrix_free:
            ksp.getPC().setType("none")
        else:
            ksp.getPC().setType("pbjacobi")

    # -- solves -------------------------------------------------------------------------------------------------------

    def forward(self, g, f, inputs: Sequence[LayerInputs], save: bool, steps: Sequence[float] | None) -> None:
        """Solve from the start of the layer into `y`, and leave a trace. Arguments as for `Stepper.forward`."""
        self._inputs = inputs
        self.linear.start(inputs)
        self._replayed = None if steps is None else list(steps)
        if steps is not None:
            never_adapt(self.ts)
        judged = self.method.judges_first_step or not self.adaptive or steps is not None
        first = 1.0 / self.steps if judged else self._judged_first_step(g, f)
        self._solve_from(g, f, first, self._max_steps if steps is None else len(steps), save)

    def _judged_first_step(self, g, f) -> float:
        """A first step for a method that estimates no error before the second step: a size that TS accepts for the second.

        TS makes two steps of one size, at most half of the layer. If TS rejects the second step, the size was too large for
        the first as well, and both are made again with a smaller one. If TS fails here, the solve that follows fails too.
        """
        size = min(1.0 / self.steps, 0.5)
        while True:
            self._solve_from(g, f, size, 2, False)
            if converged_reason(self.ts) < 0 or not self.ts.getStepRejections():
                return size
            size = min(self.trace.steps[-1], size / 2)

    def _solve_from(self, g, f, first: float, most: int, save: bool) -> None:
        """Solve from the start of the layer: `first` is the size of the first step, `most` the largest number of steps."""
        self.trace = LayerTrace()
        self.state.write(self.y, g, self.state.start(f))
        ts = self.ts
        ts.removeTrajectory()
        if save:
            ts.setSaveTrajectory()
            keep_trajectory_in_memory(ts)
        ts.setTime(0.0)
        ts.setMaxTime(1.0)
        ts.setMaxSteps(most)
        ts.setStepNumber(0)
        ts.setTimeStep(first)
        self._in_stages = not self.method.solves_for_first_slope
        ts.restartStep()  # DIRK would use the slopes of an earlier solve
        ts.solve(self.y)

    def adjoint(self, by_g, by_f) -> None:
        """Solve back into `adjoint_y` and `functionals`. Arguments as for `Stepper.adjoint`."""
        self.linear.by_f = tuple(by_f)
        self.state.write(self.adjoint_y, by_g, self.state.adjoint_start(self.linear.by_f))
        self.functionals.set(0.0)
        self.ts.setCostGradients([self.adjoint_y], [self.functionals])
        self.ts.adjointSolve()

    @cached_property
    def functionals(self) -> PETSc.Vec:
        """The functionals in the layer's coefficients, after an adjoint solve.

        A functional in values at nodes stands on the ranks that own the nodes, one in numbers that all ranks have on every
        rank.
        """
        inputs = self._inputs[0]
        parameters = inputs.bias.size + inputs.beta.size + inputs.learns_length
        if inputs.learns_factors:
            parameters += inputs.factors.phi.values.size + inputs.factors.psi.values.size
        if inputs.apart is not None:
            parameters = inputs.apart.size * self.stage.samples
        vector = PETSc.Vec().create(self.state.comm)
        vector.setSizes((parameters, PETSc.DETERMINE))
        vector.setUp()
        matrix = shell(Transposed(weakly(self._parameter_transpose)), (self.state.size, parameters), self.state.comm)
        if self.method.implicit:
            self.ts.setIJacobianP(weakly(self._set_parameter_point), matrix)
        else:
            self.ts.setRHSJacobianP(lambda ts, t, y, J: None, matrix)
        return vector

    def release(self) -> None:
        """Forget the fields of the last solve."""
        self.trace, self._inputs, self._calls, self._functionals = LayerTrace(), (), [], ()
        self.linear.release()
        self.ts.removeTrajectory()

    # -- callbacks of TS ----------------------------------------------------------------------------------------------

    def _set_step(self, ts):
        if self._replayed is not None:
            ts.setTimeStep(self._replayed[ts.getStepNumber()])
        elif self.adaptive:
            self.y.copy(self._start)
            self._rejections = ts.getStepRejections()

    def _keep_step(self, ts):
        # Times are rounded, so an adapted step is kept as TS took it: a replay then makes the very same step.
        h = self._tried if self.adaptive else ts.getTime() - ts.getPrevTime()
        self.trace.steps.append(h)
        if self.method.overruns and ts.getTime() > 1.0 - 1e-12:
            ts.setMaxTime(0.0)
        if self.carries_f:
            return
        if self.method.stages_by_call:
            stages = self._calls[-len(self._weights) :]
        else:
            stages = []
            for values in stage_values(ts, self.state.size):
                self._work.array_w[:] = values
                stages.append(self.state.read(self._work)[0])
        for weight, node, g in zip(self._weights, self._nodes, stages, strict=True):
            if weight != 0.0:
                self.trace.stages.append(StageValue(h * weight, self.linear.argument(ts.getPrevTime() + node * h, g)))

    def _rate(self, ts, t, y, F):
        self.state.write(F, *self.linear.rates(t, *self.state.read(y)))

    def _enter_stage(self):
        self._in_stages = True
        if not self.adaptive:
            return
        self._tried = self.ts.getTimeStep()
        if self._replayed is None and self.ts.getStepRejections() != self._rejections:
            # PETSc's rk undoes a rejected step by a subtraction, which leaves the round-off of the large step.
            self._rejections = self.ts.getStepRejections()
            self._start.copy(self.y)

    def _residual(self, ts, t, y, y_t, F):
        self._rate(ts, t if self._in_stages else ts.getTime(), y, F)
        F.aypx(-1.0, y_t)
        if self.method.stages_by_call:
            self._calls = [*self._calls[-len(self._weights) :], self.state.read(y)[0]]

    def _set_point(self, ts, t, y, *matrices) -> None:
        self.linear.set_point(t, *self.state.read(y))

    def _set_jacobian(self, ts, t, y, y_t, shift, J, P):
        self._set_point(ts, t if self._in_stages else ts.getTime(), y)
        self.linear.set_shift(shift)
        if self._assembled is not None:
            self._assembled.fill(self.linear.assembled())

    def _set_parameter_point(self, ts, t, y, *others):
        self._set_point(ts, t, y)

    # -- products with Jacobians --------------------------------------------------------------------------------------

    def _state_transpose(self, x, y):
        # For an explicit method PETSc asks for J^T x and then, at the same stage and x, for Jp^T x: one pass serves both.
        by_g, by_rest, self._functionals = self.linear.transpose(self.state.stage_functional(x, self.linear.by_f))
        self.state.write(y, by_g, by_rest)

    def _parameter_transpose(self, x, y):
        values = y.array_w
        if not self.method.implicit:
            np.concatenate(self._functionals, out=values)
        else:  # the derivative of the residual y_t - rate
            np.concatenate(self.linear.transpose(self.state.stage_functional(x, self.linear.by_f))[2], out=values)
            np.negative(values, out=values)
