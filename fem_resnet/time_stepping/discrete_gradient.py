r"""A step of a layer by the discrete gradient of int Sigma(u): energy-stable at any step size, with its adjoint.

With D(u0, u1) = (Sigma(u1) - Sigma(u0)) / (u1 - u0), where Sigma' = sigma, a step of length h is

    f_1 = f_0 + h D(u_0, u_1),      u_k = a - B f_k,      a and B in the middle of the step.

It is of order 2 and symmetric. Since int D (u_1 - u_0) dy is the difference of int Sigma(u), and u_1 - u_0 = -h B D,

    int Sigma(u_1) dy = int Sigma(u_0) dy - h (B_s D, D).

So (i) and (ii) of Theorem 3.2 hold for any h > 0 where B_s >= 0 and a, B do not depend on t. With low rank the unknowns are
g_1 = Psi^T M f_1, rank x samples numbers:

    g_1 = g_0 + Psi^T M s,      s = h D(a - Phi beta g_0, a - Phi beta g_1),      f_1 = f_0 + s.

PETSc's SNES solves this by Newton's method, with one rank x rank matrix a sample. This matrix, I + h Psi^T M diag(D_1) Phi
beta, is invertible where B_s >= 0 and sigma' >= 0. Let lambda be the functional in f at the end of the segment, and gamma the
functional in g. The adjoint is one transposed solve a step:

    (I + h Psi^T M diag(D_1) Phi beta)^T x = gamma_1 - beta^T Phi^T h D_1 lambda,
    w = M Psi x + lambda,      gamma_0 = x - beta^T Phi^T h D_0 w,      d/da = h (D_0 + D_1) w,  and so on.

As in `layers.stage`, value and tangent are tuples of one or two entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import petsctools
from petsc4py import PETSc

from fem_resnet.layers.discrete_gradient_stage import DiscreteGradientStage, Ends
from fem_resnet.layers.stage import Argument, StageFunctional, StageValue
from fem_resnet.options import reason_name
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.petsc import converged_reason, weakly
from fem_resnet.time_stepping.jacobian import SampleMatrices, acting, by_coefficients, pulled
from fem_resnet.time_stepping.options import set_from_options
from fem_resnet.time_stepping.stepper import LayerTrace, StepFailure, Stepper

__all__ = ["DiscreteGradientStepper"]


@dataclass(frozen=True)
class _Step:
    """A step that was made. Its middle and its length are fractions of the layer; g is given at both ends."""

    middle: float
    length: float
    ends: Ends
    g: tuple[list[np.ndarray], list[np.ndarray]]


@dataclass(frozen=True)
class _Equation:
    """The equation for g at the end of a step: its length, the kernel, beta, g at the start, the step that stands still."""

    length: float
    kernel: LowRankKernel
    beta: np.ndarray
    g: np.ndarray
    standing: Ends

    def ends(self, g: np.ndarray) -> Ends:
        """The step that ends at g."""
        return self.standing.with_end((self.kernel.times(self.beta, g),))


class DiscreteGradientStepper(Stepper):
    """Steps one layer by the discrete gradient.

    Parameters
    ----------
    layer
        Number of the layer, for messages.
    stage
        Evaluations of the steps.
    rank
        Rank of psi on this layer.
    steps
        Number of equal steps.
    options
        PETSc options of a SNES and its KSP, from `options.solver_options`. Options of the line search act on all samples
        together.
    orders
        1; or 2, to step the tangent too.

    Raises
    ------
    ValueError
        If an option is none of a SNES, or steps are to be adapted.
    """

    def __init__(
        self,
        layer: int,
        stage: DiscreteGradientStage,
        rank: int,
        steps: int,
        options: petsctools.OptionsManager,
        orders: int = 1,
    ):
        super().__init__(layer)
        self.stage = stage
        self.steps = steps
        self.orders = orders
        self._rank = rank
        self._options = options
        self._trace = LayerTrace()
        self._taken: list[_Step] = []
        self._equation: _Equation | None = None
        self._jacobian = SampleMatrices(rank, stage.samples, PETSc.COMM_SELF)
        self._x, self._residual_vector = self._new_vectors()
        self._snes = self._new_snes()

    @property
    def trace(self) -> LayerTrace:
        return self._trace

    def _forget(self) -> None:
        self._trace, self._taken, self._equation = LayerTrace(), [], None

    def _renew(self) -> None:
        self._jacobian = SampleMatrices(self._rank, self.stage.samples, PETSc.COMM_SELF)
        self._x, self._residual_vector = self._new_vectors()
        self._snes = self._new_snes()

    def _new_vectors(self) -> tuple[PETSc.Vec, PETSc.Vec]:
        size = self._rank * self.stage.samples
        return PETSc.Vec().createSeq(size), PETSc.Vec().createSeq(size)

    def _new_snes(self) -> PETSc.SNES:
        snes = PETSc.SNES().create(comm=PETSc.COMM_SELF)
        snes.setFunction(weakly(self._residual), self._residual_vector)
        snes.setJacobian(weakly(self._set_jacobian), self._jacobian.mat)
        snes.getKSP().setType("preonly")
        snes.getKSP().getPC().setType("pbjacobi")
        unused = set_from_options(snes, self._options, ("ts_type", "ts_adapt_type"))
        if unused or self._options.parameters.get("ts_adapt_type", "none") != "none":
            raise ValueError(
                f"solver_parameters: expected options of a SNES and its KSP, and fixed steps, for 'ts_type' "
                f"'discrete_gradient', got {', '.join(map(repr, unused)) or repr('ts_adapt_type')}; drop it"
            )
        return snes

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(self, g, f, inputs, save, steps=None):
        self.take(inputs)
        lengths = [1.0 / self.steps] * self.steps if steps is None else list(steps)
        g, start = list(g), 0.0
        for length in lengths:
            with np.errstate(over="ignore", invalid="ignore"):  # an overflow is reported below
                step = self._step(start, length, g)
            g = step.g[1]
            start += length
            if not all(np.isfinite(part).all() for part in g):
                raise self.not_finite(start)
            self.trace.stages.append(StageValue(length, step.ends))
            if save:
                self._taken.append(step)
        self.trace.steps = lengths
        self.finish(save)
        return g

    def _beta(self, s: float) -> list[np.ndarray]:
        return [inputs.beta.coefficients(s) for inputs in self.inputs]

    def _step(self, start: float, length: float, g: list[np.ndarray]) -> _Step:
        middle = start + length / 2
        beta = self._beta(middle)
        lengths = tuple(inputs.length for inputs in self.inputs)
        a = tuple(inputs.bias.coefficients(middle) for inputs in self.inputs)
        factors = self.inputs[0].factors
        C = acting(factors, beta, g)
        directions = self.inputs[1].factor_directions if self.orders == 2 else None
        self._equation = _Equation(length, factors, beta[0], g[0], Ends.standing(Argument(factors, lengths[:1], a[:1], C[:1])))
        end = [self._solve(start, g[0])]
        ends = Ends.standing(Argument(factors, lengths, a, C, directions))
        if self.orders == 2:
            # The equation of the tangent is linear: one step of Newton's method from the tangent at the start solves it.
            ends = ends.with_end(acting(factors, beta, [end[0], g[1]]))
            excess = length * self.stage.rate(ends)[1]
            end.append(g[1] + self._solved(self._matrix(length, beta[0], ends), excess))
        ends = ends.with_end(acting(factors, beta, end))
        return _Step(middle, length, ends, (g, end))

    def _solve(self, start: float, g: np.ndarray) -> np.ndarray:
        """The solution of the present equation by SNES, from g; `start` is the fraction of the layer for messages."""
        self._x.array_w[:] = g.T.ravel()
        try:
            self._snes.solve(None, self._x)
        except PETSc.Error as error:
            failure = self.failed(error, start)
            if error.__cause__ is not None:
                raise error.__cause__
            raise failure from error
        reason = converged_reason(self._snes)
        if reason < 0:
            raise StepFailure(self.layer, self.time(start), f"SNES's {reason_name(PETSc.SNES, reason)}")
        return self._read(self._x).copy()

    def _read(self, x: PETSc.Vec) -> np.ndarray:
        """g, shape (rank, samples)."""
        return x.array_r.reshape(self.stage.samples, self._rank).T

    def _residual(self, snes, x, F):
        equation, g = self._equation, self._read(x)
        F.array_w[:] = (g - equation.g - equation.length * self.stage.rate(equation.ends(g))[0]).T.ravel()

    def _set_jacobian(self, snes, x, J, P):
        equation = self._equation
        self._jacobian.fill(self._matrix(equation.length, equation.beta, equation.ends(self._read(x))))
        return True

    def _matrix(self, length: float, beta: np.ndarray, ends: Ends) -> np.ndarray:
        """I + h Psi^T M diag(D_1) Phi beta, shape (samples, rank, rank)."""
        return np.eye(self._rank) + length * self.stage.jacobian(ends)[0] @ beta

    @staticmethod
    def _solved(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
        """The solution for one right-hand side a sample, shape (rank, samples)."""
        return np.linalg.solve(matrix, right.T[:, :, None])[:, :, 0].T

    # -- adjoint ------------------------------------------------------------------------------------------------------

    def adjoint(self, by_g, by_f):
        self.use_trajectory()
        by_g, functionals = list(by_g), 0.0
        for step in reversed(self._taken):
            by_g, of_step = self._step_back(step, by_g, tuple(by_f))
            functionals = functionals + of_step
        if not (np.isfinite(functionals).all() and all(np.isfinite(part).all() for part in by_g)):
            raise self.not_finite(0.0)
        return by_g, by_f, functionals

    def _step_back(self, step: _Step, by_g: list[np.ndarray], by_f) -> tuple[list[np.ndarray], np.ndarray]:
        """Gamma at the start of a step, and the functionals in what the layer takes, from gamma at its end."""
        inputs, beta, h = self.inputs[0], self._beta(step.middle), step.length
        kernel = inputs.factors
        weight = np.full(self.stage.samples, h) if by_f else None
        matrix = np.swapaxes(self._matrix(h, beta[0], step.ends), 1, 2)
        x = [np.zeros_like(part) for part in by_g]

        def by_s():
            return StageFunctional(tuple(h * part for part in x), weight, by_f)

        # The tangent comes first: the equation for the value at the end contains the multiplier x_1 of the tangent.
        for k in reversed(range(self.orders)):
            at_end = pulled(kernel, beta, self.stage.transpose(step.ends, by_s()).D)
            x[k] = self._solved(matrix, by_g[k] + at_end[k])
        result = self.stage.transpose(step.ends, by_s(), inputs.learns_length, inputs.learns_factors)
        ends = zip((result.start_D, result.D), step.g)
        by_beta = -np.sum([kernel.outer(D, g) for Ds, gs in ends for D, g in zip(Ds, gs, strict=True)], axis=0)
        start = [part + other for part, other in zip(x, pulled(kernel, beta, result.start_D))]
        return start, np.concatenate(by_coefficients(inputs, step.middle, result, by_beta))
