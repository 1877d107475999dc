"""One layer, driven by PETSc TS and its TSAdjoint.

A layer sees f only through g = Psi^T M f, so TS steps (3.5a) for a general low-rank kernel, and f follows by (3.3):

    g_t = Psi^T M sigma(a - Phi beta g),        f(t_1) = f(t_0) + int sigma(a - Phi beta g) dt,

with the quadrature of the method itself, f(t_1) = f(t_0) + sum_n h_n sum_i b_i sigma(u_ni), or, where that is not to be
had, with f in the state (`layer_state`). Runge-Kutta methods commute with the projection f -> g, so these are the numbers
that stepping f would give; and they commute with linearisation, so that stepping g and its tangent g_1 gives the
derivative of the discrete layer, and the adjoint of both its second derivative. Backwards

    lambda(t_0) = lambda(t_1) + M Psi gamma,      gamma the adjoint of g,

so that layers with the same psi hand on gamma alone. TS counts the time of a layer from 0 to 1; the layer's length is a
factor of its right-hand side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import petsctools
from mpi4py import MPI
from petsc4py import PETSc

from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.layers.stage import LayerTrace, Stage, StageValue
from fem_resnet.options import last_words
from fem_resnet.time_stepping.compiled_layer import CompiledLayer
from fem_resnet.time_stepping.jacobian import Elimination, LinearLayer, ShiftedJacobian, Transposed, Zero
from fem_resnet.time_stepping.methods import METHODS, configure, set_from_options
from fem_resnet.time_stepping.petsc import adapt_type, keep_trajectory_in_memory, never_adapt, on_pre_stage, shell, stage_values, weakly
from fem_resnet.time_stepping.state import CarriedState, CoefficientState

__all__ = ["LayerStepper", "StepFailure"]


class StepFailure(ArithmeticError):
    """A layer cannot be stepped, forward or in its adjoint: TS gave up, or the state is not finite.

    Network and tape are as usable as before.

    Parameters
    ----------
    layer, time, reason
        See the attributes.
    remedy
        What is wrong in particular, and what to do.

    Attributes
    ----------
    layer : int
        Number of the layer.
    time : float
        Where it happened.
    reason : str
        PETSc's name for what happened, or "NOT_FINITE", or "LENGTH_NOT_POSITIVE".
    """

    def __init__(
        self, layer: int, time: float, reason: str, remedy: str = "smaller parameters or more steps a layer may help"
    ):
        what = "the state is not finite" if reason == "NOT_FINITE" else f"the time stepping ended with {reason}"
        super().__init__(f"{what} in layer {layer}, t = {time:.6g}: {remedy}")
        self.layer = layer
        self.time = time
        self.reason = reason
        self._remedy = remedy

    def __reduce__(self):
        return type(self), (self.layer, self.time, self.reason, self._remedy)

    @classmethod
    def of_length(cls, layer: int, inputs: LayerInputs) -> StepFailure:
        """That of a layer whose end is not after its start."""
        end = inputs.start + inputs.length
        return cls(
            layer, inputs.start, "LENGTH_NOT_POSITIVE",
            f"layer times cross, t_{layer} = {inputs.start:.6g} and t_{layer + 1} = {end:.6g}, and are to increase; learn "
            f"from times further apart, or keep each in an interval of its own: train(.., bounds={{'layer_times': (least, largest)}})",
        )  # fmt: skip


class LayerStepper:
    """One layer on its own PETSc TS, with its TSAdjoint.

    Parameters
    ----------
    stage
        Stage evaluations.
    layer
        Number of the layer, for messages.
    rank
        Rank of psi on this layer.
    steps
        Number of equal steps; with adaptivity the first is of that size.
    options
        PETSc options of the TS, from `methods.solver_options`.
    orders
        1; or 2, to step the tangent too.
    carry
        Whether the state has f; if left out, where it must.
    cost
        A running cost, if c is to be stepped too; the state then has f.

    Raises
    ------
    ValueError
        If PETSc does not know an option, or a layer cannot be stepped so.
    """

    def __init__(
        self, stage: Stage, layer: int, rank: int, steps: int, options: petsctools.OptionsManager,
        orders: int = 1, carry: bool | None = None, cost: RunningCost | None = None,
    ):  # fmt: skip
        self.stage = stage
        self.layer = layer
        self.steps = steps
        self.orders = orders
        #: Marks whose solve the last one was, where several share a stepper.
        self.user: object = None
        self._trace = LayerTrace()
        self._rank = rank
        self._options = options
        self._carry = carry
        self._cost = cost
        self._create()

    # -- the TS -------------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        # A TS that only reads its options tells the type, on which the communicator of the true one depends.
        probe = PETSc.TS().create(comm=PETSc.COMM_SELF)
        set_from_options(probe, self._options)
        #: PETSc's name of the method, and what it gives a layer.
        self.ts_type = probe.getType()
        self.method = METHODS[self.ts_type]
        self.adaptive = adapt_type(probe) != "none"
        probe.destroy()
        with_cost = self._cost is not None
        must_carry = self.adaptive or self.method.quadrature is None or with_cost
        self.carries_f = must_carry if self._carry is None else self._carry
        if self.carries_f:
            self.state = CarriedState(self.stage, self._rank, self.orders, with_cost)
        else:
            self.state = CoefficientState(self.stage, self._rank, self.orders)
        self._linear = LinearLayer(self.stage, self.state, self._cost)
        self._y, self._adjoint_y, self._work = (self.state.vector() for _ in range(3))
        #: The state at the start of an adapted step.
        self._start = self.state.vector() if self.adaptive else None
        self._mu: PETSc.Vec | None = None
        #: Whether the last forward solve was saved and no adjoint has used it up.
        self.has_trajectory = False
        self._replayed: list[float] | None = None
        self._calls: list[list[np.ndarray]] = []
        self._ts = self._new_ts()
        self._compiled: CompiledLayer | None = None
        self._undecided = True

    def _new_ts(self) -> PETSc.TS:
        ts = PETSc.TS().create(comm=self.state.comm)
        ts.setOptionsPrefix(self._options.options_prefix)  # before its SNES is made
        if self.method.implicit:
            self._set_implicit(ts)
        else:
            ts.setRHSFunction(weakly(self._rate), self.state.vector())
            self._jacobian = shell(Transposed(weakly(self._state_transpose)), (self.state.size,) * 2, self.state.comm)
            ts.setRHSJacobian(weakly(self._set_point), self._jacobian, self._jacobian)
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.MATCHSTEP)
        ts.setErrorIfStepFails(False)
        ts.setPreStep(weakly(self._set_step))
        ts.setPostStep(weakly(self._keep_step))
        if self.adaptive or self.method.solves_for_first_slope:
            self._pre_stage = on_pre_stage(ts, weakly(self._enter_stage))
        configure(ts, self._options, ("mat_type",))
        self._max_steps = ts.getMaxSteps()
        if self.adaptive:
            rtol, atol = ts.getTolerances()
            pointwise = self._options.parameters.get("ts_adapt_wnormtype", "2").lower() == "infinity"
            ts.setTolerances(*self.state.tolerances(rtol, atol, pointwise))
        if self.method.quadrature is not None:
            with self._options.inserted_options():
                self._weights, self._nodes = self.method.quadrature(ts)
        return ts

    def _set_implicit(self, ts: PETSc.TS) -> None:
        state = self.state
        self._matrix_free = self.carries_f or self._options.parameters.get("mat_type") == "matfree"
        ts.setIFunction(weakly(self._residual), state.vector())
        if self._matrix_free:
            self._jacobian = shell(ShiftedJacobian(self._linear), (state.size,) * 2, state.comm)
        else:
            block, samples = state.block, self.stage.samples
            columns = np.arange(state.size, dtype=PETSc.IntType).reshape(samples, 1, block)
            columns = np.broadcast_to(columns, (samples, block, block)).ravel()
            rows = np.arange(0, samples * block**2 + 1, block, dtype=PETSc.IntType)
            self._pattern = rows, columns
            self._jacobian = PETSc.Mat().createAIJ(
                ((state.size,) * 2,) * 2, bsize=block, csr=(rows, columns, np.ones(len(columns))), comm=state.comm
            )
        ts.setIJacobian(weakly(self._set_jacobian), self._jacobian, self._jacobian)
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
            ksp.getPC().setPythonContext(Elimination(self._linear))
        elif self._matrix_free:
            ksp.getPC().setType("none")
        else:
            ksp.getPC().setType("pbjacobi")

    # -- forward and adjoint ------------------------------------------------------------------------------------------

    def forward(
        self,
        g: Sequence[np.ndarray],
        f: Sequence[np.ndarray] | None,
        inputs: Sequence[LayerInputs],
        save: bool,
        steps: Sequence[float] | None = None,
    ) -> list[np.ndarray]:
        """Solve the layer from g; returns g at its end and leaves a `trace`.

        Parameters
        ----------
        g
            Coefficients at the start, and their tangent if there is one, shape (rank, samples).
        f
            State and tangent at the start, shape (nodes, samples), with c as a row more where there is a running cost; may
            be None where the state does not carry them.
        inputs
            Times, factors and parameters of this layer, and the directions of all that.
        save
            Whether to keep the trajectory for `adjoint`.
        steps
            Steps to take, in parts of the layer, as a trace has them; if left out they are adapted, or equal.

        Raises
        ------
        StepFailure
            If TS gives up, or the result is not finite.
        """
        self.take(inputs)
        self._trace = LayerTrace()
        self._solve(lambda: self._step(g, f, inputs, save, steps))
        self._check_end(steps)
        end, _ = self.state.read(self._y)
        self._trace.end = self.state.end(self._y)
        self._check_finite(end, self._trace.end or [], 1.0)
        self.has_trajectory = save
        return end

    def take(self, inputs: Sequence[LayerInputs]) -> None:
        """Begin a forward solve with these inputs.

        Raises
        ------
        StepFailure
            If the layer's length is not positive.
        """
        self._inputs = inputs
        self.has_trajectory = False
        if not inputs[0].length > 0:
            raise StepFailure.of_length(self.layer, inputs[0])

    def _step(self, g, f, inputs, save, steps) -> None:
        self._linear.start(inputs)
        self._replayed = None if steps is None else list(steps)
        if steps is not None:
            never_adapt(self._ts)
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
            made, self._trace = self._trace.steps, LayerTrace()
            if self._ts.getConvergedReason() < 0 or not self._ts.getStepRejections():
                return size
            size = min(made[-1], size / 2)

    def _solve_from(self, g, f, first: float, most: int, save: bool) -> None:
        """Solve from the start of the layer, with a first step and at most so many."""
        self.state.write(self._y, g, self.state.start(f))
        ts = self._ts
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
        ts.solve(self._y)

    def adjoint(
        self, gamma: Sequence[np.ndarray], adjoint: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], Sequence[np.ndarray], np.ndarray]:
        """Adjoint of the last forward solve: gamma at the start, lambda there, functionals of the layer's coefficients.

        With a tangent, of the second order: the functionals and gamma of the value are those that depend on it, directly
        and through the tangent.

        Parameters
        ----------
        gamma
            Adjoints of g, and of its tangent, at the end of the layer, shape (rank, samples).
        adjoint
            Adjoint values of f, and of its tangent, at the end of the layer but for what gamma stands for: shape
            (nodes, samples), with that of c as a row more where there is a running cost; none where they are 0.

        Returns
        -------
        gamma : list of numpy.ndarray
            At the start of the layer.
        adjoint : list of numpy.ndarray
            The same at its start: changed by a running cost alone.
        functionals : numpy.ndarray
            Of the active coefficients of the bias, then of the kernel, of the length and of the factors' values where
            they are learned, one after the other.

        Raises
        ------
        RuntimeError
            If there was no forward solve that kept its trajectory since the last adjoint.
        StepFailure
            If a linear solve fails, or the result is not finite.
        """
        self.use_trajectory()
        self._solve(lambda: self._step_back(gamma, adjoint))
        start, rest = self.state.read(self._adjoint_y)
        functionals = self._mu.array_r.copy()
        self._check_finite(start, [functionals], 0.0)
        return start, adjoint if self._cost is None else list(rest), functionals

    def use_trajectory(self) -> None:
        """Begin an adjoint solve, which uses up the trajectory.

        Raises
        ------
        RuntimeError
            If the last forward solve has kept none, or an adjoint has used it up.
        """
        if not self.has_trajectory:
            raise RuntimeError(f"layer {self.layer}: the adjoint wants a forward solve that saves, just before it")
        self.has_trajectory = False

    def _step_back(self, gamma, adjoint) -> None:
        self._linear.costate = tuple(adjoint)
        self.state.write(self._adjoint_y, gamma, self.state.adjoint_start(self._linear.costate))
        if self._mu is None:
            self._attach_parameters()
        self._mu.set(0.0)
        self._ts.setCostGradients([self._adjoint_y], [self._mu])
        self._ts.adjointSolve()

    def release(self) -> None:
        """Forget what the last solve left, fields first of all; another may follow."""
        self.has_trajectory = False
        self._trace, self._inputs, self._calls = LayerTrace(), (), []
        self._linear.release()
        if self._compiled is not None:
            self._compiled.release()
        self._ts.removeTrajectory()

    @property
    def trace(self) -> LayerTrace:
        """What the last forward solve left."""
        return self._trace if self._compiled is None else self._compiled.trace

    def compiled(self, inputs: Sequence[LayerInputs]) -> CompiledLayer | None:
        """The layer as C steps it, if it does; what a layer takes is of one kind for good."""
        if self._undecided:
            self._undecided = False
            known = not (self.method.implicit or self.carries_f or self.adaptive) and self.method.quadrature is not None
            if known and CompiledLayer.fits(self.stage, inputs):
                self._compiled = CompiledLayer(self.stage, self._ts, self.steps, inputs[0])
        return self._compiled

    def _solve(self, solve: Callable[[], None]) -> None:
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is reported afterwards
                solve()
        except PETSc.Error as error:
            failure = self.failure(error)
            if error.__cause__ is not None:
                raise error.__cause__
            raise failure from error
        reason = self._ts.getConvergedReason()
        if reason < 0:
            raise self.failure(reason)

    def _check_end(self, steps: Sequence[float] | None) -> None:
        """Refuse a forward solve that TS ended elsewhere than at the end of the layer, or with other steps than it was given."""
        t, made = self._ts.getTime(), len(self._trace.steps)
        free = self.method.overruns or (self.adaptive and steps is None)
        wanted = made if free else self.steps if steps is None else len(steps)
        if abs(t - 1.0) <= 1e-9 and made == wanted:
            return
        reason = _REASONS[self._ts.getConvergedReason()]
        where = f"it made {made} steps{'' if free else f' of {wanted}'}, and the layer ends at t = {self._time(1.0):.6g}"
        if free:
            where += "; give a larger 'ts_max_steps', larger tolerances or smaller parameters"
        raise StepFailure(self.layer, self._time(t), reason, where)

    def failure(self, what: PETSc.Error | int) -> StepFailure:
        """What to raise if a solve ended so; the TS is a new one from now on."""
        time = self._time(self._ts.getTime())
        self._create()  # a failed callback leaves vectors locked
        if isinstance(what, PETSc.Error):
            return StepFailure(self.layer, time, f"PETSc's error {what.ierr}, {last_words(what)}")
        return StepFailure(self.layer, time, _REASONS.get(what, f"PETSc's reason {what}"))

    def not_finite(self, t: float) -> StepFailure:
        """What to raise if a solve ended, at t in parts of the layer, in what is not finite."""
        return StepFailure(self.layer, self._time(t), "NOT_FINITE")

    def _check_finite(self, g: Sequence[np.ndarray], others: Sequence[np.ndarray], t: float) -> None:
        finite = all([np.isfinite(array).all() for array in g])
        if self.carries_f:
            finite &= all(np.isfinite(array).all() for array in others)
            finite = self.stage.Y.comm.allreduce(finite, op=MPI.LAND)
        # Else all ranks have the same g, which sums over the nodes: what is not finite at one of them is seen there.
        if not finite:
            self.has_trajectory = False
            raise self.not_finite(t)

    def _time(self, t: float) -> float:
        return self._inputs[0].start + t * self._inputs[0].length

    # -- callbacks of TS ----------------------------------------------------------------------------------------------

    def _set_step(self, ts):
        if self._replayed is not None:
            ts.setTimeStep(self._replayed[ts.getStepNumber()])
        elif self.adaptive:
            self._y.copy(self._start)
            self._rejections = ts.getStepRejections()

    def _keep_step(self, ts):
        # Times are rounded: an adapted step is kept as TS took it, so that a replay makes the very same.
        h = self._tried if self.adaptive else ts.getTime() - ts.getPrevTime()
        self._trace.steps.append(h)
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
                self._trace.stages.append(StageValue(h * weight, self._linear.argument(ts.getPrevTime() + node * h, g)))

    def _rate(self, ts, t, y, F):
        self.state.write(F, *self._linear.rates(t, *self.state.read(y)))

    def _enter_stage(self):
        self._in_stages = True
        if not self.adaptive:
            return
        ts = self._ts
        self._tried = ts.getTimeStep()
        if self._replayed is None and ts.getStepRejections() != self._rejections:
            # PETSc's rk takes a rejected step back by subtraction, which leaves the round-off of what it overshot by.
            self._rejections = ts.getStepRejections()
            self._start.copy(self._y)

    def _residual(self, ts, t, y, y_t, F):
        self._rate(ts, t if self._in_stages else ts.getTime(), y, F)
        F.aypx(-1.0, y_t)
        if self.method.stages_by_call:
            self._calls = [*self._calls[-len(self._weights) :], self.state.read(y)[0]]

    def _set_point(self, ts, t, y, J, P):
        self._linear.set_point(t, *self.state.read(y))
        return True

    def _set_jacobian(self, ts, t, y, y_t, shift, J, P):
        self._set_point(ts, t if self._in_stages else ts.getTime(), y, J, P)
        self._linear.set_shift(shift)
        if not self._matrix_free:
            rows, columns = self._pattern
            P.setValuesCSR(rows, columns, self._linear.assembled().ravel())
            P.assemble()
        return True

    def _set_parameter_point(self, ts, t, y, *others):
        self._set_point(ts, t, y, None, None)
        return True

    # -- products with Jacobians --------------------------------------------------------------------------------------

    def _state_transpose(self, x, y):
        # PETSc asks an explicit method for J^T x and then, of the same stage and x, for Jp^T x: one pass serves both.
        by_g, by_rest, self._functionals = self._linear.transpose(self.state.cotangent(x, self._linear.costate))
        self.state.write(y, by_g, by_rest)

    def _parameter_transpose(self, x, y):
        values = y.array_w
        if not self.method.implicit:
            np.concatenate(self._functionals, out=values)
        else:  # of the residual y_t - rate
            np.concatenate(self._linear.transpose(self.state.cotangent(x, self._linear.costate))[2], out=values)
            np.negative(values, out=values)

    def _attach_parameters(self) -> None:
        # Functionals of nodal values stand on the ranks that own the nodes, those of replicated numbers on every rank.
        inputs = self._inputs[0]
        parameters = inputs.bias.size + inputs.beta.size + inputs.learns_length
        if inputs.learns_factors:
            parameters += inputs.factors.phi.values.size + inputs.factors.psi.values.size
        self._mu = PETSc.Vec().create(self.state.comm)
        self._mu.setSizes((parameters, PETSc.DETERMINE))
        self._mu.setUp()
        sizes = (self.state.size, parameters)
        matrix = shell(Transposed(weakly(self._parameter_transpose)), sizes, self.state.comm)
        if self.method.implicit:
            self._ts.setIJacobianP(weakly(self._set_parameter_point), matrix)
        else:
            self._ts.setRHSJacobianP(lambda ts, t, y, J: True, matrix)


#: PETSc's names; that of an adjoint is missing in petsc4py.
_REASONS = {-4: "ADJOINT_DIVERGED_LINEAR_SOLVE"} | {
    getattr(PETSc.TS.ConvergedReason, name): name for name in dir(PETSc.TS.ConvergedReason) if name.isupper()
}
