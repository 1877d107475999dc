"""One layer as a PETSc TS: its callbacks, its vectors and the matrices that it gets.

A layer sees f only through g = Psi^T M f, so TS steps (3.5a) for a general low-rank kernel, and f follows by (3.3):

    g_t = Psi^T M sigma(a - Phi beta g),        f(t_1) = f(t_0) + int sigma(a - Phi beta g) dt,

with the quadrature of the method itself, f(t_1) = f(t_0) + sum_n h_n sum_i b_i sigma(u_ni), or, where that is not to be
had, with f in the state (`state`). Runge-Kutta methods commute with the projection f -> g, so these are the numbers
that stepping f would give; and they commute with linearisation, so that stepping g and its tangent g_1 gives the
derivative of the discrete layer, and the adjoint of both its second derivative. Backwards

    lambda(t_0) = lambda(t_1) + M Psi gamma,      gamma the adjoint of g,

so that layers with the same psi hand on gamma alone. TS counts the time of a layer from 0 to 1; the layer's length is a
factor of its right-hand side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import petsctools
from petsc4py import PETSc

from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.layers.stage import LayerTrace, Stage, StageValue
from fem_resnet.time_stepping.jacobian import Elimination, LinearLayer, ShiftedJacobian, Transposed, Zero
from fem_resnet.time_stepping.methods import Method, configure
from fem_resnet.time_stepping.petsc import keep_trajectory_in_memory, never_adapt, on_pre_stage, shell, stage_values, weakly
from fem_resnet.time_stepping.state import CarriedState, CoefficientState

__all__ = ["LayerTS"]


class LayerTS:
    """A TS for layers of one shape: which layer it steps say the inputs.

    After an error in a callback it is of no use any more, as vectors stay locked: make a new one.

    Parameters
    ----------
    stage
        Stage evaluations.
    rank
        Rank of psi.
    steps
        Number of equal steps; with adaptivity the first is of that size.
    options
        PETSc options of the TS, from `methods.solver_options`.
    method
        What its type gives a layer.
    adaptive
        Whether the options ask for adapted steps.
    carries_f
        Whether the state has f, and not its coefficients alone.
    orders
        1; or 2, to step the tangent too.
    cost
        A running cost, if c is to be stepped too; the state then has f.

    Attributes
    ----------
    ts : petsc4py.PETSc.TS
    state : CoefficientState or CarriedState
        What its vectors hold.
    y, adjoint_y : petsc4py.PETSc.Vec
        Where a solve starts and ends, forward and back.
    jacobian : petsc4py.PETSc.Mat
        What TS is given: the derivative of the right-hand side for explicit methods, that of the residual for implicit ones.
    linear : LinearLayer
        The derivative behind it.
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
        self.state = (
            CarriedState(stage, rank, orders, cost is not None) if carries_f else CoefficientState(stage, rank, orders)
        )
        self.linear = LinearLayer(stage, self.state, cost)
        self.y, self.adjoint_y, self._work = (self.state.vector() for _ in range(3))
        #: The state at the start of an adapted step.
        self._start = self.state.vector() if adaptive else None
        self.trace = LayerTrace()
        self._inputs: Sequence[LayerInputs] = ()
        self._replayed: list[float] | None = None
        #: The last arguments of the implicit function, for methods whose stages are known by them alone.
        self._calls: list[list[np.ndarray]] = []
        #: Whether TS has come to the stages of its step; before, it solves for the slope at the start.
        self._in_stages = True
        #: The size of the step that is tried, and how many were rejected before.
        self._tried, self._rejections = 0.0, 0
        self._functionals: Sequence[np.ndarray] = ()
        self._matrix_free = carries_f or options.parameters.get("mat_type") == "matfree"
        self.jacobian = self._new_jacobian()
        self.ts = PETSc.TS().create(comm=self.state.comm)
        self.ts.setOptionsPrefix(options.options_prefix)  # before its SNES is made
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

    def _configure(self) -> None:
        ts = self.ts
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.MATCHSTEP)
        ts.setErrorIfStepFails(False)
        ts.setPreStep(weakly(self._set_step))
        ts.setPostStep(weakly(self._keep_step))
        if self.adaptive or self.method.solves_for_first_slope:
            self._pre_stage = on_pre_stage(ts, weakly(self._enter_stage))
        configure(ts, self._options, ("mat_type",))
        if self.adaptive:
            rtol, atol = ts.getTolerances()
            pointwise = self._options.parameters.get("ts_adapt_wnormtype", "2").lower() == "infinity"
            ts.setTolerances(*self.state.tolerances(rtol, atol, pointwise))

    def _new_jacobian(self) -> PETSc.Mat:
        sizes = (self.state.size,) * 2
        if not self.method.implicit:
            return shell(Transposed(weakly(self._state_transpose)), sizes, self.state.comm)
        if self._matrix_free:
            return shell(ShiftedJacobian(self.linear), sizes, self.state.comm)
        rows, columns = self._pattern
        return PETSc.Mat().createAIJ(
            (sizes, sizes), bsize=self.state.block, csr=(rows, columns, np.ones(len(columns))), comm=self.state.comm
        )

    @cached_property
    def _pattern(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of a matrix with one dense block a sample, in PETSc's CSR."""
        block, samples = self.state.block, self.stage.samples
        columns = np.arange(self.state.size, dtype=PETSc.IntType).reshape(samples, 1, block)
        columns = np.broadcast_to(columns, (samples, block, block)).ravel()
        return np.arange(0, samples * block**2 + 1, block, dtype=PETSc.IntType), columns

    def _set_implicit(self) -> None:
        ts, state = self.ts, self.state
        ts.setIFunction(weakly(self._residual), state.vector())
        ts.setIJacobian(weakly(self._set_jacobian), self.jacobian, self.jacobian)
        if self.method.partitioned:
            # With an explicit part, zero, PETSc takes its partitioned path, which wants no solve for a first slope.
            ts.setRHSFunction(lambda ts, t, y, F: F.set(0.0), state.vector())
            zero = shell(Zero(), (state.size,) * 2, state.comm)
            ts.setRHSJacobian(lambda ts, t, y, J, P: True, zero, zero)
        ksp = ts.getSNES().getKSP()
        # pbjacobi inverts the blocks of one stage: for stages that are coupled it is a preconditioner only.
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
        """Solve from the start of the layer into `y`, and leave a trace; arguments as for `Stepper.forward`."""
        self._inputs = inputs
        self.linear.start(inputs)
        self._replayed = None if steps is None else list(steps)
        if steps is not None:
            never_adapt(self.ts)
        judged = self.method.judges_first_step or not self.adaptive or steps is not None
        first = 1.0 / self.steps if judged else self._judged_first_step(g, f)
        self._solve_from(g, f, first, self._max_steps if steps is None else len(steps), save)

    def _judged_first_step(self, g, f) -> float:
        """A first step for a method that estimates no error before the second: one that is right for the second too.

        TS makes two steps of a size, which is at most half of the layer. If it rejects the second, that was too large for the
        first too, and both are made anew. Where TS fails, so will the solve that follows.
        """
        size = min(1.0 / self.steps, 0.5)
        while True:
            self._solve_from(g, f, size, 2, False)
            if self.ts.getConvergedReason() < 0 or not self.ts.getStepRejections():
                return size
            size = min(self.trace.steps[-1], size / 2)

    def _solve_from(self, g, f, first: float, most: int, save: bool) -> None:
        """Solve from the start of the layer, with a first step and at most so many."""
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
        ts.restartStep()  # slopes of an earlier solve are not those of this one: DIRK would take them
        ts.solve(self.y)

    def adjoint(self, gamma, adjoint) -> None:
        """Solve back into `adjoint_y` and `functionals`; arguments as for `Stepper.adjoint`."""
        self.linear.costate = tuple(adjoint)
        self.state.write(self.adjoint_y, gamma, self.state.adjoint_start(self.linear.costate))
        self.functionals.set(0.0)
        self.ts.setCostGradients([self.adjoint_y], [self.functionals])
        self.ts.adjointSolve()

    @cached_property
    def functionals(self) -> PETSc.Vec:
        """Of the layer's coefficients, after an adjoint solve.

        Those of nodal values stand on the ranks that own the nodes, those of replicated numbers on every rank.
        """
        inputs = self._inputs[0]
        parameters = inputs.bias.size + inputs.beta.size + inputs.learns_length
        if inputs.learns_factors:
            parameters += inputs.factors.phi.values.size + inputs.factors.psi.values.size
        vector = PETSc.Vec().create(self.state.comm)
        vector.setSizes((parameters, PETSc.DETERMINE))
        vector.setUp()
        matrix = shell(Transposed(weakly(self._parameter_transpose)), (self.state.size, parameters), self.state.comm)
        if self.method.implicit:
            self.ts.setIJacobianP(weakly(self._set_parameter_point), matrix)
        else:
            self.ts.setRHSJacobianP(lambda ts, t, y, J: True, matrix)
        return vector

    def release(self) -> None:
        """Forget fields that the last solve left."""
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
        # Times are rounded: an adapted step is kept as TS took it, so that a replay makes the very same.
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
            # PETSc's rk takes a rejected step back by subtraction, which leaves the round-off of what it overshot by.
            self._rejections = self.ts.getStepRejections()
            self._start.copy(self.y)

    def _residual(self, ts, t, y, y_t, F):
        self._rate(ts, t if self._in_stages else ts.getTime(), y, F)
        F.aypx(-1.0, y_t)
        if self.method.stages_by_call:
            self._calls = [*self._calls[-len(self._weights) :], self.state.read(y)[0]]

    def _set_point(self, ts, t, y, J, P):
        self.linear.set_point(t, *self.state.read(y))
        return True

    def _set_jacobian(self, ts, t, y, y_t, shift, J, P):
        self._set_point(ts, t if self._in_stages else ts.getTime(), y, J, P)
        self.linear.set_shift(shift)
        if not self._matrix_free:
            P.setValuesCSR(*self._pattern, self.linear.assembled().ravel())
            P.assemble()
        return True

    def _set_parameter_point(self, ts, t, y, *others):
        self._set_point(ts, t, y, None, None)
        return True

    # -- products with Jacobians --------------------------------------------------------------------------------------

    def _state_transpose(self, x, y):
        # PETSc asks an explicit method for J^T x and then, of the same stage and x, for Jp^T x: one pass serves both.
        by_g, by_rest, self._functionals = self.linear.transpose(self.state.cotangent(x, self.linear.costate))
        self.state.write(y, by_g, by_rest)

    def _parameter_transpose(self, x, y):
        values = y.array_w
        if not self.method.implicit:
            np.concatenate(self._functionals, out=values)
        else:  # of the residual y_t - rate
            np.concatenate(self.linear.transpose(self.state.cotangent(x, self.linear.costate))[2], out=values)
            np.negative(values, out=values)
