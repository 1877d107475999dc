"""Steps one layer by PETSc TS and its TSAdjoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import petsctools
from mpi4py import MPI
from petsc4py import PETSc

from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.layers.stage import Stage
from fem_resnet.options import reason_name
from fem_resnet.petsc import converged_reason
from fem_resnet.time_stepping.methods import Method
from fem_resnet.time_stepping.stepper import LayerTrace, StepFailure, Stepper
from fem_resnet.time_stepping.ts_layer import LayerTS

__all__ = ["TSStepper"]


class TSStepper(Stepper):
    """Steps one layer by PETSc TS, and its adjoint by TSAdjoint.

    Parameters
    ----------
    layer
        Number of the layer, for messages.
    stage, rank, steps, options, method, adaptive, carries_f, orders, cost
        As for `LayerTS`.

    Attributes
    ----------
    solver : LayerTS
        The TS; a new one after a failure.
    """

    def __init__(
        self,
        layer: int,
        stage: Stage,
        rank: int,
        steps: int,
        options: petsctools.OptionsManager,
        method: Method,
        *,
        cost: RunningCost | None = None,
        **more,
    ):
        super().__init__(layer)
        self._new = partial(LayerTS, stage, rank, steps, options, method, cost=cost, **more)
        self._has_cost = cost is not None
        self.solver = self._new()

    def forward(self, g, f, inputs, save, steps=None):
        self.take(inputs)
        with self._failing():
            self.solver.forward(g, f, inputs, save, steps)
        self._check_end(steps)
        end, _ = self.solver.state.read(self.solver.y)
        self.trace.end = self.solver.state.end(self.solver.y)
        self._check_finite(end, self.trace.end or [], 1.0)
        self.finish(save)
        return end

    def adjoint(self, by_g, by_f):
        self.use_trajectory()
        with self._failing():
            self.solver.adjoint(by_g, by_f)
        start, rest = self.solver.state.read(self.solver.adjoint_y)
        functionals = self.solver.functionals.array_r.copy()
        self._check_finite(start, [functionals], 0.0)
        return start, list(rest) if self._has_cost else by_f, functionals

    @property
    def trace(self) -> LayerTrace:
        return self.solver.trace

    def _forget(self) -> None:
        self.solver.release()

    def _forget_stages(self) -> None:
        self.solver.linear.forget_stages()

    def _renew(self) -> None:
        self.solver = self._new()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Run a solve of the TS. If it fails, raise what failed; the TS is then a new one."""
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # an overflow is reported afterwards
                yield
        except PETSc.Error as error:
            failure = self.failed(error, self.solver.ts.getTime())
            if error.__cause__ is not None:
                raise error.__cause__
            raise failure from error
        reason = converged_reason(self.solver.ts)
        if reason < 0:
            raise self.failed(reason, self.solver.ts.getTime())

    def _check_end(self, steps: Sequence[float] | None) -> None:
        """Raise if TS did not end a forward solve at the end of the layer, or made other steps than it was given."""
        solver = self.solver
        t, made = solver.ts.getTime(), len(self.trace.steps)
        free = solver.method.overruns or (solver.adaptive and steps is None)
        expected = made if free else solver.steps if steps is None else len(steps)
        if abs(t - 1.0) <= 1e-9 and made == expected:
            return
        reason = reason_name(PETSc.TS, converged_reason(solver.ts))
        where = f"it made {made} steps{'' if free else f' of {expected}'}, and the layer ends at t = {self.time(1.0):.6g}"
        if free:
            where += "; give a larger 'ts_max_steps', larger tolerances or smaller parameters"
        raise StepFailure(self.layer, self.time(t), reason, where)

    def _check_finite(self, g: Sequence[np.ndarray], others: Sequence[np.ndarray], s: float) -> None:
        """Raise if a result at the fraction s of the layer is not finite. Collective if the state has f."""
        finite = all(np.isfinite(array).all() for array in g)
        if self.solver.carries_f:
            finite &= all(np.isfinite(array).all() for array in others)
            finite = self.solver.stage.Y.comm.allreduce(finite, op=MPI.LAND)
        # Otherwise all ranks have the same g, a sum over the nodes, which shows if f is not finite at a node.
        if not finite:
            raise self.not_finite(s)
