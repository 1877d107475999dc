"""One layer, stepped by PETSc TS and its TSAdjoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.layers.stage import LayerTrace, Stage
from fem_resnet.options import last_words, reason_name
from fem_resnet.time_stepping.methods import Method
from fem_resnet.time_stepping.stepper import StepFailure, Stepper
from fem_resnet.time_stepping.ts_layer import LayerTS

__all__ = ["TSStepper"]


class TSStepper(Stepper):
    """See above.

    Parameters
    ----------
    layer
        Number of the layer, for messages.
    stage, rank, steps, options, method, adaptive, carries_f, orders, cost
        As for `LayerTS`.
    """

    def __init__(
        self,
        layer: int,
        stage: Stage,
        rank: int,
        steps: int,
        options,
        method: Method,
        *,
        cost: RunningCost | None = None,
        **more,
    ):
        super().__init__(layer)
        self._new = partial(LayerTS, stage, rank, steps, options, method, cost=cost, **more)
        self._has_cost = cost is not None
        #: The TS; a new one after a failure.
        self.solver = self._new()

    def forward(self, g, f, inputs, save, steps=None):
        self.take(inputs)
        with self._failing():
            self.solver.forward(g, f, inputs, save, steps)
        self._check_end(steps)
        end, _ = self.solver.state.read(self.solver.y)
        self.trace.end = self.solver.state.end(self.solver.y)
        self._check_finite(end, self.trace.end or [], 1.0)
        self.has_trajectory = save
        return end

    def adjoint(self, gamma, adjoint):
        self.use_trajectory()
        with self._failing():
            self.solver.adjoint(gamma, adjoint)
        start, rest = self.solver.state.read(self.solver.adjoint_y)
        functionals = self.solver.functionals.array_r.copy()
        self._check_finite(start, [functionals], 0.0)
        return start, list(rest) if self._has_cost else adjoint, functionals

    @property
    def trace(self) -> LayerTrace:
        return self.solver.trace

    def release(self) -> None:
        self.has_trajectory, self.inputs = False, ()
        self.solver.release()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """A solve of the TS; where it fails, the TS is a new one from then on."""
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is reported afterwards
                yield
        except PETSc.Error as error:
            failure = self._renewed(f"PETSc's error {error.ierr}, {last_words(error)}")
            if error.__cause__ is not None:
                raise error.__cause__
            raise failure from error
        reason = self.solver.ts.getConvergedReason()
        if reason < 0:
            raise self._renewed(reason_name(PETSc.TS, reason))

    def _renewed(self, reason: str) -> StepFailure:
        failure = StepFailure(self.layer, self.time(self.solver.ts.getTime()), reason)
        self.solver = self._new()  # a failed callback leaves vectors locked
        return failure

    def _check_end(self, steps: Sequence[float] | None) -> None:
        """Refuse a forward solve that TS ended elsewhere than at the end of the layer, or with other steps than it was given."""
        solver = self.solver
        t, made = solver.ts.getTime(), len(self.trace.steps)
        free = solver.method.overruns or (solver.adaptive and steps is None)
        wanted = made if free else solver.steps if steps is None else len(steps)
        if abs(t - 1.0) <= 1e-9 and made == wanted:
            return
        reason = reason_name(PETSc.TS, solver.ts.getConvergedReason())
        where = f"it made {made} steps{'' if free else f' of {wanted}'}, and the layer ends at t = {self.time(1.0):.6g}"
        if free:
            where += "; give a larger 'ts_max_steps', larger tolerances or smaller parameters"
        raise StepFailure(self.layer, self.time(t), reason, where)

    def _check_finite(self, g: Sequence[np.ndarray], others: Sequence[np.ndarray], s: float) -> None:
        finite = all([np.isfinite(array).all() for array in g])
        if self.solver.carries_f:
            finite &= all(np.isfinite(array).all() for array in others)
            finite = self.solver.stage.Y.comm.allreduce(finite, op=MPI.LAND)
        # Else all ranks have the same g, which sums over the nodes: what is not finite at one of them is seen there.
        if not finite:
            self.has_trajectory = False
            raise self.not_finite(s)
