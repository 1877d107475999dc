r"""A step of a layer by the discrete gradient of int Sigma(u): energy-stable at any step size, with its adjoint.

With D(u0, u1) = (Sigma(u1) - Sigma(u0)) / (u1 - u0) (`secant`), a step of length h is

    f_1 = f_0 + h D(u_0, u_1),      u_k = a - B f_k,      a and B those of the middle of the step,

of order 2 and symmetric. Since int D (u_1 - u_0) dy is the difference of int Sigma(u), which by u_1 - u_0 = -h B D is

    int Sigma(u_1) dy = int Sigma(u_0) dy - h (B_s D, D),

(i) and (ii) of Theorem 3.2 hold for any h > 0 where B_s >= 0 and a, B do not depend on t. With low rank the unknowns
are g_1 = Psi^T M f_1, rank x samples numbers:

    g_1 = g_0 + Psi^T M s,      s = h D(a - Phi beta g_0, a - Phi beta g_1),      f_1 = f_0 + s,

solved by PETSc's SNES, Newton's method with one rank x rank block a sample. Its matrix I + h Psi^T M diag(D_1) Phi beta
is invertible where B_s >= 0 and sigma' >= 0. The adjoint, with lambda the adjoint value of f at the end of the segment
and gamma that of g, is one transposed solve a step:

    (I + h Psi^T M diag(D_1) Phi beta)^T x = gamma_1 - beta^T Phi^T h D_1 lambda,
    w = M Psi x + lambda,      gamma_0 = x - beta^T Phi^T h D_0 w,      d/da = h (D_0 + D_1) w,  and so on.

As everywhere, value and tangent go through as tuples of one or two entries (`layer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import petsctools
from petsc4py import PETSc

from fem_resnet.activation.activation import Activation
from fem_resnet.activation.secant import Secant
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.layers.stage import Argument, Cotangent, Functionals, LayerTrace, Stage, StageValue
from fem_resnet.options import last_words, reason_name
from fem_resnet.time_stepping.jacobian import acting
from fem_resnet.time_stepping.methods import set_from_options
from fem_resnet.time_stepping.petsc import weakly
from fem_resnet.time_stepping.stepper import StepFailure, Stepper

__all__ = ["DiscreteGradientStage", "DiscreteGradientStepper", "Ends"]


@dataclass(frozen=True)
class Ends(Argument):
    """What a step is evaluated at: an `Argument` for its end, and one for its start.

    Attributes
    ----------
    start : Argument
        The same but for C.
    """

    start: Argument | None = None

    def with_end(self, C: tuple[np.ndarray, ...]) -> Ends:
        """The step from the same start to another end."""
        return replace(self, C=C)


@dataclass
class EndFunctionals(Functionals):
    """Functionals of a step: `D` is of C at the end, `start_D` of C at the start."""

    start_D: list[np.ndarray] = field(default_factory=list)


class DiscreteGradientStage(Stage):
    """tau D(u_0, u_1) in the place of tau sigma(u), for `Ends`; NumPy alone. Arguments as for `Stage`."""

    def __init__(self, Y: LabelSpace, activation: Activation, samples: int, precision: str = "double"):
        super().__init__(Y, activation, samples, precision)
        self._secant = Secant(activation)

    def _arguments(self, block: slice, at: Ends, order: int) -> list[np.ndarray]:
        """u_0 and u_1 (order 0), or their tangents, in arrays of their own."""
        shape = (block.stop - block.start, self.samples)
        return [self._affine(block, end, order, np.empty(shape)) for end in (at.start, at)]

    def _values(self, block: slice, at: Ends) -> Iterator[np.ndarray]:
        u = self._arguments(block, at, 0)
        D, *slopes = self._secant(*u, order=len(at.a) - 1)
        yield at.length[0] * D
        if len(at.a) == 2:
            moved = self._arguments(block, at, 1)
            yield at.length[0] * (slopes[0] * moved[0] + slopes[1] * moved[1]) + at.length[1] * D

    def blocks(self, at: Ends) -> list[np.ndarray]:
        """`Psi^T M diag(tau D_1) Phi` of each sample, shape (samples, rank of psi, rank of phi), on every rank."""
        phi, psi = at.factors.phi, at.factors.psi
        K = np.zeros((self.samples, psi.rank, phi.rank))
        for block in self._blocks():
            slope = at.length[0] * self._secant(*self._arguments(block, at, 0), order=1)[2]
            for total, c in zip(K, slope.T):
                total += (psi.weighted[block] * c[:, None]).T @ phi.values[block]
        return [self.Y.sum(K)]

    def transpose(self, at: Ends, dual: Cotangent, with_length: bool = False, with_factors: bool = False) -> EndFunctionals:
        """As in `Stage`, with functionals of C at both ends."""
        orders, phi, psi = len(at.a), at.factors.phi, at.factors.psi
        both = np.zeros((2, orders, phi.rank, self.samples))
        result = EndFunctionals([], np.empty(self.Y.nodes))
        if with_factors:
            result.phi, result.psi = np.empty_like(phi.values), np.empty_like(psi.values)
        for block in self._blocks():
            w = [self._cotangent(block, at, dual, k).copy() for k in range(orders)]
            s = list(self._values(block, at)) if with_length or with_factors else []
            if with_length:
                result.length += self._pair_with_length(at, w, s)
            if with_factors:
                result.psi[block] = sum(part @ x.T for part, x in zip(s, dual.x)) * self.Y.weights[block, None]
                result.phi[block] = 0.0
            v = self._transposed(block, at, w)
            result.bias[block] = sum(np.sum(part[0], axis=1) for part in v)
            for total, part, end in zip(both, v, (at.start, at)):
                for k in range(orders):
                    total[k] += phi.values[block].T @ part[k]
                if at.turning is not None:
                    total[0] += at.turning.phi[block].T @ part[1]
                if with_factors:
                    result.phi[block] -= sum(p @ C.T for p, C in zip(part, end.C))
        if with_length:
            result.length = float(self.Y.sum(result.length))
        start, end = self.Y.sum(both)
        result.start_D, result.D = list(start), list(end)
        return result

    def _pair_with_length(self, at: Ends, w: list[np.ndarray], s: list[np.ndarray]) -> float:
        """The functional of tau on a block of nodes, from s_0 = tau D and s_1 = tau D' + tau_1 D."""
        paired = np.sum(w[0] * s[0])
        if len(w) == 2:
            paired += np.sum(w[1] * (s[1] - at.length[1] / at.length[0] * s[0]))
        return float(paired / at.length[0])

    def _transposed(self, block: slice, at: Ends, w: list[np.ndarray]) -> list[list[np.ndarray]]:
        """Functionals of u_0, then of u_1, each with one entry an order."""
        u, tau = self._arguments(block, at, 0), at.length
        if len(w) == 1:
            _, *slopes = self._secant(*u, order=1)
            return [[tau[0] * slope * w[0]] for slope in slopes]
        _, D_0, D_1, D_00, D_01, D_11 = self._secant(*u, order=2)
        moved = self._arguments(block, at, 1)
        result = []
        for slope, bends in ((D_0, (D_00, D_01)), (D_1, (D_01, D_11))):
            bend = bends[0] * moved[0] + bends[1] * moved[1]
            result.append([slope * (tau[0] * w[0] + tau[1] * w[1]) + tau[0] * bend * w[1], tau[0] * slope * w[1]])
        return result


@dataclass(frozen=True)
class _Step:
    """A step that was made: the time of its middle, its length, both in parts of the layer, its ends and g at both."""

    middle: float
    length: float
    ends: Ends
    g: tuple[list[np.ndarray], list[np.ndarray]]


class DiscreteGradientStepper(Stepper):
    """One layer stepped by the discrete gradient.

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
        PETSc options, from `methods.solver_options`: those of a SNES and its KSP. What they say of the line search
        holds for all samples together.
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
        #: The step that is solved for: its length, beta, g at its start, and it where its end is its start.
        self._now: tuple[float, np.ndarray, np.ndarray, Ends] | None = None
        self._x, self._residual_vector = (PETSc.Vec().createSeq(rank * stage.samples) for _ in range(2))
        self._snes = self._new_snes()

    @property
    def trace(self) -> LayerTrace:
        return self._trace

    def release(self) -> None:
        self.has_trajectory, self.inputs = False, ()
        self._trace, self._taken, self._now = LayerTrace(), [], None

    @cached_property
    def _pattern(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of a matrix with one dense block a sample, in PETSc's CSR."""
        block, samples = self._rank, self.stage.samples
        columns = np.arange(block * samples, dtype=PETSc.IntType).reshape(samples, 1, block)
        columns = np.broadcast_to(columns, (samples, block, block)).ravel()
        return np.arange(0, samples * block**2 + 1, block, dtype=PETSc.IntType), columns

    def _new_snes(self) -> PETSc.SNES:
        size, (rows, columns) = self._rank * self.stage.samples, self._pattern
        jacobian = PETSc.Mat().createAIJ(
            ((size, size), (size, size)), bsize=self._rank, csr=(rows, columns, np.ones(len(columns))), comm=PETSc.COMM_SELF
        )
        snes = PETSc.SNES().create(comm=PETSc.COMM_SELF)
        snes.setFunction(weakly(self._residual), self._residual_vector)
        snes.setJacobian(weakly(self._set_jacobian), jacobian)
        snes.getKSP().setType("preonly")
        snes.getKSP().getPC().setType("pbjacobi")
        unused = set_from_options(snes, self._options, ("ts_type", "ts_adapt_type"))
        if unused or self._options.parameters.get("ts_adapt_type", "none") != "none":
            raise ValueError(
                f"solver_parameters: {', '.join(unused) or 'ts_adapt_type'}: 'ts_type' 'discrete_gradient' takes "
                "options of a SNES and its KSP, and fixed steps; drop it"
            )
        return snes

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(self, g, f, inputs, save, steps=None):
        self.take(inputs)
        lengths = [1.0 / self.steps] * self.steps if steps is None else list(steps)
        g, start = list(g), 0.0
        for length in lengths:
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is reported afterwards
                step = self._step(start, length, g)
            g = step.g[1]
            start += length
            if not all(np.isfinite(part).all() for part in g):
                raise self.not_finite(start)
            self.trace.stages.append(StageValue(length, step.ends))
            if save:
                self._taken.append(step)
        self.trace.steps = lengths
        self.has_trajectory = save
        return g

    def _beta(self, s: float) -> list[np.ndarray]:
        return [inputs.beta.coefficients(s) for inputs in self.inputs]

    def _step(self, start: float, length: float, g: list[np.ndarray]) -> _Step:
        middle = start + length / 2
        beta = self._beta(middle)
        C = acting(beta, g)
        lengths = tuple(inputs.length for inputs in self.inputs)
        a = tuple(inputs.bias.coefficients(middle) for inputs in self.inputs)
        factors = self.inputs[0].factors
        turning = self.inputs[1].factors if self.orders == 2 else None
        self._now = length, beta[0], g[0], _standing(factors, lengths[:1], a[:1], C[:1])
        self._x.array_w[:] = g[0].T.ravel()
        self._solve(start)
        end = [self._x.array_r.reshape(self.stage.samples, self._rank).T.copy()]
        ends = _standing(factors, lengths, a, C, turning)
        if self.orders == 2:
            # The equation of the tangent is linear: from the start's, one step of Newton's method.
            ends = ends.with_end(acting(beta, [end[0], g[1]]))
            excess = length * self.stage.rate(ends)[1]
            end.append(g[1] + self._solved(self._matrix(length, beta[0], ends), excess))
        ends = ends.with_end(acting(beta, end))
        return _Step(middle, length, ends, (g, end))

    def _solve(self, start: float) -> None:
        try:
            self._snes.solve(None, self._x)
        except PETSc.Error as error:
            self._x, self._residual_vector = (
                self._x.duplicate(),
                self._x.duplicate(),
            )  # a failed callback leaves vectors locked
            self._snes = self._new_snes()
            if error.__cause__ is not None:
                raise error.__cause__
            reason = f"PETSc's error {error.ierr}, {last_words(error)}"
            raise StepFailure(self.layer, self.time(start), reason) from error
        reason = self._snes.getConvergedReason()
        if reason < 0:
            raise StepFailure(self.layer, self.time(start), f"SNES's {reason_name(PETSc.SNES, reason)}")

    def _end(self, x: PETSc.Vec) -> tuple[np.ndarray, Ends]:
        g = x.array_r.reshape(self.stage.samples, self._rank).T
        _, beta, _, ends = self._now
        return g, ends.with_end((beta @ g,))

    def _residual(self, snes, x, F):
        length, _, g_start, _ = self._now
        g, ends = self._end(x)
        F.array_w[:] = (g - g_start - length * self.stage.rate(ends)[0]).T.ravel()

    def _set_jacobian(self, snes, x, J, P):
        length, beta, _, _ = self._now
        _, ends = self._end(x)
        P.setValuesCSR(*self._pattern, self._matrix(length, beta, ends).ravel())
        P.assemble()
        return True

    def _matrix(self, length: float, beta: np.ndarray, ends: Ends) -> np.ndarray:
        """I + h Psi^T M diag(D_1) Phi beta, shape (samples, rank, rank)."""
        return np.eye(self._rank) + length * self.stage.blocks(ends)[0] @ beta

    @staticmethod
    def _solved(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Its solution for one right-hand side a sample, shape (rank, samples)."""
        return np.linalg.solve(matrix, right.T[:, :, None])[:, :, 0].T

    # -- adjoint ------------------------------------------------------------------------------------------------------

    def adjoint(self, gamma, adjoint):
        self.use_trajectory()
        gamma, functionals = list(gamma), 0.0
        for step in reversed(self._taken):
            gamma, of_step = self._step_back(step, gamma, tuple(adjoint))
            functionals = functionals + of_step
        if not (np.isfinite(functionals).all() and all(np.isfinite(part).all() for part in gamma)):
            raise self.not_finite(0.0)
        return gamma, adjoint, functionals

    def _step_back(self, step: _Step, gamma: list[np.ndarray], adjoint) -> tuple[list[np.ndarray], np.ndarray]:
        inputs, beta, h = self.inputs[0], self._beta(step.middle), step.length
        weight = np.full(self.stage.samples, h) if adjoint else None
        matrix = np.swapaxes(self._matrix(h, beta[0], step.ends), 1, 2)
        x = [np.zeros_like(part) for part in gamma]

        def dual():
            return Cotangent(tuple(h * part for part in x), weight, adjoint)

        # The tangent's first: what solves for g at the end sees the multiplier of the tangent, not its own.
        for k in reversed(range(self.orders)):
            at_end = _pulled(beta, self.stage.transpose(step.ends, dual()).D)
            x[k] = self._solved(matrix, gamma[k] + at_end[k])
        result = self.stage.transpose(step.ends, dual(), inputs.learns_length, inputs.learns_factors)
        by_beta = -sum(D @ g.T for Ds, gs in zip((result.start_D, result.D), step.g) for D, g in zip(Ds, gs, strict=True))
        functionals = [inputs.bias.pull_back(step.middle, result.bias), inputs.beta.pull_back(step.middle, by_beta)]
        if inputs.learns_length:
            functionals.append(np.array([result.length]))
        if inputs.learns_factors:
            functionals += [result.phi.ravel(), result.psi.ravel()]
        start = [part + pulled for part, pulled in zip(x, _pulled(beta, result.start_D))]
        return start, np.concatenate(functionals)


def _standing(*argument) -> Ends:
    """The step whose end is its start, from what an `Argument` takes."""
    return Ends(*argument, start=Argument(*argument))


def _pulled(beta: Sequence[np.ndarray], D: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Functionals of g_k from minus those of C_k, the transpose of `acting`."""
    if len(D) == 1:
        return [-(beta[0].T @ D[0])]
    return [-(beta[0].T @ D[0] + beta[1].T @ D[1]), -(beta[0].T @ D[1])]
