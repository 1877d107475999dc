"""The derivative of a layer's right-hand side at a stage, and the matrices that PETSc is given for it.

A state of TS is (g, q) or (g, f), see `state`. With s the rates of f (see `layers.stage`) the right-hand side is

    R(g, .) = (Psi^T M s(beta g), <lambda, s>)    or    (Psi^T M s(beta g), s).

All of it depends on g, and the rate of g depends on nothing but g, with one dense matrix a sample. With a running cost the
state has c too, whose rate depends on f (`layers.running_cost`). Implicit methods solve with `scale (shift I - R')`. Where the
state is (g, q), this matrix is assembled or known by its products. Where the state is (g, f), it is known by its products, and
elimination gives its exact inverse as a preconditioner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from petsc4py import PETSc

from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.layers.running_cost import CostRate, RunningCost
from fem_resnet.layers.sample_functionals import SampleFunctionals
from fem_resnet.layers.stage import Argument, Functionals, Stage, StageFunctional
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.petsc import shell
from fem_resnet.time_stepping.state import LayerState

__all__ = [
    "Elimination", "LinearLayer", "SampleMatrices", "ShiftedJacobian", "Transposed", "Zero", "acting", "by_coefficients",
    "pulled",
]  # fmt: skip


@dataclass
class _Known:
    """A stage: its time, None where the layer does not depend on it, g, the argument, the rates of g once they are known."""

    time: float | None
    g: Sequence[np.ndarray]
    argument: Argument
    rates: list[np.ndarray] | None = None


class LinearLayer:
    """The derivative of a layer's right-hand side at a point, and its transpose, in the state and in all that the layer takes.

    Collective over the communicator of the label domain.

    Parameters
    ----------
    stage
        Stage evaluations.
    state
        What TS steps.
    cost
        The running cost, if there is one.

    Attributes
    ----------
    by_f : tuple of numpy.ndarray or None
        In an adjoint solve lambda, the functionals in f and in its tangent, shape (nodes, samples), empty for 0. In a forward
        solve None.
    shift, scale : float
        The numbers in the matrix `scale (shift I - R')`.
    """

    def __init__(self, stage: Stage, state: LayerState, cost: RunningCost | None = None):
        self.stage = stage
        self.state = state
        self._cost = cost
        self.orders = state.orders
        self.by_f: tuple[np.ndarray, ...] | None = None
        self._inputs: Sequence[LayerInputs] = ()
        self._recent: deque[_Known] = deque(maxlen=1)
        self._point: tuple | None = None
        self.shift, self.scale = 0.0, 1.0
        self._matrices: np.ndarray | None = None

    def remember(self, stages: int) -> None:
        """Keep what is known of so many of the latest stages.

        TS asks for a stage for its rate, for the quadrature by which f follows, and in the adjoint. Each argument costs a
        product with beta. Rows of a Jacobian ask for the same solve many times.
        """
        self._recent = deque(maxlen=stages)

    def start(self, inputs: Sequence[LayerInputs]) -> None:
        """Begin a forward solve with these inputs, and their direction if there is a tangent.

        What is known of the latest stages stays where the inputs are those of the last solve.
        """
        if not _the_same(inputs, self._inputs):
            self._recent.clear()
        self._inputs = inputs
        self.by_f = None

    def release(self) -> None:
        """Forget the point and all fields. The latest stages stay, for a solve with the same inputs."""
        self._point, self.by_f = None, None
        self.set_shift(0.0)

    def forget_stages(self) -> None:
        """Forget the inputs and the latest stages too."""
        self._inputs = ()
        self._recent.clear()

    def _beta(self, t: float) -> list[np.ndarray]:
        return [inputs.beta.coefficients(t) for inputs in self._inputs]

    def argument(self, t: float, g: Sequence[np.ndarray]) -> Argument:
        """The point at which the stage at t is evaluated, for g of shape (rank of psi, samples), one an order."""
        return self._known(t, g).argument

    def _known(self, t: float, g: Sequence[np.ndarray]) -> _Known:
        constant = all(part.is_constant for inputs in self._inputs for part in (inputs.bias, inputs.beta))
        when = None if constant else t
        for known in self._recent:
            if known.time == when and all(map(np.array_equal, known.g, g)):
                return known
        beta = self._beta(t)
        at = Argument(
            self._inputs[0].factors,
            tuple(inputs.length for inputs in self._inputs),
            tuple(inputs.bias.coefficients(t) for inputs in self._inputs),
            acting(self._inputs[0].factors, beta, g),
            self._inputs[1].factor_directions if self.orders == 2 else None,
            tuple(beta),
        )
        self._recent.append(_Known(when, g, at))
        return self._recent[-1]

    def cost_rate(self, t: float, at: Argument, rest: np.ndarray) -> CostRate | None:
        """The rate of c at a stage, if there is a running cost. `rest` is the state's, see `state`."""
        if self._cost is None:
            return None
        f, _ = self.state.split(rest)
        kernel = None if self._inputs[0].learns_factors else at.factors
        return CostRate(self._cost, self.stage.Y, kernel, at.length, f, at.a, self._beta(t))

    def rates(self, t: float, g: Sequence[np.ndarray], rest: np.ndarray) -> tuple[list[np.ndarray], ArrayLike]:
        """The right-hand side: the rates of g, shape (rank of psi, samples), and of the rest of the state. Collective."""
        known, s = self._known(t, g), self.state.new_rest()
        if s is None:
            if known.rates is None:
                known.rates = self.stage.rate(known.argument)
            return known.rates, self.state.rates(s)
        at = known.argument
        Q = self.stage.rate(at, self._fields(s))
        cost = self.cost_rate(t, at, rest)
        if cost is not None:
            for part, c in zip(s, cost.value()):
                part[-1] = c
        return Q, self.state.rates(s)

    def _fields(self, rest: list[np.ndarray] | None) -> list[np.ndarray] | None:
        """The rows of the nodes, without the row of c."""
        return None if rest is None else [part[: self.stage.Y.nodes] for part in rest]

    def set_point(self, t: float, g: Sequence[np.ndarray], rest: np.ndarray) -> None:
        """Take derivatives at this stage from now on. Arguments as for `rates`."""
        at = self.argument(t, g)
        self._point = t, g, at, self.cost_rate(t, at, rest)

    def set_shift(self, shift: float) -> None:
        """Set the shift of the matrix at the present point, and its scale to 1."""
        self.shift, self.scale, self._matrices = shift, 1.0, None

    def derivative(self, g: Sequence[np.ndarray], out: list[np.ndarray] | None) -> list[np.ndarray]:
        """Derivative of the rate of g in a direction of g. Collective.

        Parameters
        ----------
        g
            The direction, shape (rank of psi, samples), one an order.
        out
            Arrays whose first rows, one a node, take the derivatives of the s_k.

        Returns
        -------
        list of numpy.ndarray
            Shape (rank of psi, samples), one an order.
        """
        t, _, at, _ = self._point
        return self.stage.derivative(at, acting(self._inputs[0].factors, self._beta(t), g), self._fields(out))

    def add_cost(self, f: np.ndarray, factor: float, out: np.ndarray) -> None:
        """Add `factor` times the derivative of the rate of c in a direction of f to the row of c in `out`."""
        *_, cost = self._point
        if cost is not None:
            for part, c in zip(out, cost.derivative(self._fields(list(f)))):
                part[-1] += factor * c

    def cost_transpose(self, c: np.ndarray) -> np.ndarray | float:
        """Transpose of the derivative of the rate of c in f: the rest of a state; 0 without a running cost."""
        *_, cost = self._point
        return 0.0 if cost is None else self._with_row(cost.transpose(c)[0])

    def _with_row(self, fields: Sequence[np.ndarray]) -> np.ndarray:
        """Functionals in f, with a row of zeros for c."""
        return np.pad(fields, ((0, 0), (0, 1), (0, 0)))

    def transpose(self, by_s: StageFunctional) -> tuple[list[np.ndarray], np.ndarray | float, list[np.ndarray]]:
        """Transpose of the derivative of the stage in g, in the rest of the state, and in what the layer takes. Collective.

        Parameters
        ----------
        by_s
            The functional in the s_k, and in c.

        Returns
        -------
        by_g : list of numpy.ndarray
            Shape (rank of psi, samples), one an order.
        by_rest : numpy.ndarray or float
            Shape (orders, nodes + 1, samples) with a running cost, else 0.
        by_coefficients : list of numpy.ndarray
            The functionals in the coefficients of bias and kernel, in the length and the factors where they are learned, each
            of one dimension.
        """
        t, g, at, cost = self._point
        inputs = self._inputs[0]
        if inputs.apart is not None:
            return self._transpose_apart(inputs.apart, by_s)
        result = self.stage.transpose(at, by_s, inputs.learns_length, inputs.learns_factors)
        beta, D = self._beta(t), result.D
        by_g = pulled(at.factors, beta, D)
        by_beta = -at.factors.outer(D[0], g[0])
        if self.orders == 2:
            by_beta -= at.factors.outer(D[1], g[1])
        if result.beta is not None:
            by_beta = by_beta + result.beta
        by_rest: np.ndarray | float = 0.0
        if cost is not None:
            in_f, in_a, in_beta = cost.transpose(by_s.by_c)
            by_rest, by_beta = self._with_row(in_f), by_beta + in_beta
            result.bias += in_a
            if inputs.learns_length:
                result.length += cost.by_length(by_s.by_c)
        return by_g, by_rest, by_coefficients(inputs, t, result, by_beta)

    def _transpose_apart(self, apart: SampleFunctionals, by_s: StageFunctional):
        """The same with functionals of each sample in the coefficients, where there is neither a tangent nor a cost."""
        t, g, at, _ = self._point
        rank, C = apart.kernel.phi.rank, at.C[0]
        if apart.factors is not at.factors:
            more = np.zeros((apart.factors.phi.rank - rank, C.shape[1]))
            at = replace(at, factors=apart.factors, C=(np.vstack([C, more]),))
        (D,) = self.stage.transpose(at, by_s).D
        return pulled(apart.kernel, self._beta(t), [D[:rank]]), 0.0, apart.pull_back(t, D, g[0])

    def matrices(self) -> np.ndarray:
        """`scale (shift I - dQ/dg)`, one matrix a sample, shape (samples, orders x rank, orders x rank). Collective."""
        if self._matrices is None:
            t, _, at, _ = self._point
            K, beta, r = self.stage.jacobian(at), self._beta(t), self.state.rank
            A = np.zeros((self.stage.samples, self.orders * r, self.orders * r))
            for k in range(self.orders):
                A[:, k * r : (k + 1) * r, k * r : (k + 1) * r] = K[0] @ beta[0]
            if self.orders == 2:
                A[:, r:, :r] = K[1] @ beta[0] + K[0] @ beta[1]
            A[:, np.arange(self.orders * r), np.arange(self.orders * r)] += self.shift
            self._matrices = self.scale * A
        return self._matrices

    def assembled(self) -> np.ndarray:
        """The same for a state (g, q), shape (samples, orders x rank + 1, orders x rank + 1). Collective."""
        samples, size = self.stage.samples, self.orders * self.state.rank
        A = np.zeros((samples, size + 1, size + 1))
        A[:, :size, :size] = self.matrices()
        A[:, size, size] = self.shift
        if self.by_f:
            nothing = (np.zeros((self.state.rank, samples)),) * self.orders
            by_g, *_ = self.transpose(StageFunctional(nothing, np.ones(samples), self.by_f))
            A[:, size, :size] = -np.concatenate(by_g).T
        return A


def _the_same(inputs: Sequence[LayerInputs], others: Sequence[LayerInputs]) -> bool:
    """Whether two solves take the same numbers; never where ranks hold parts of them. All ranks say the same."""
    if len(inputs) != 1 or len(others) != 1 or inputs[0].bias.is_nodal:
        return False
    one, other = inputs[0], others[0]
    return (
        one.factors is other.factors
        and one.length == other.length
        and one.bias.equals(other.bias)
        and one.beta.equals(other.beta)
    )


def acting(kernel: LowRankKernel, beta: Sequence[np.ndarray], g: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """C_k: beta g, and its tangent beta_1 g + beta g_1, shape (rank of phi, samples)."""
    C = kernel.times(beta[0], g[0])
    return (C,) if len(g) == 1 else (C, kernel.times(beta[1], g[0]) + kernel.times(beta[0], g[1]))


def pulled(kernel: LowRankKernel, beta: Sequence[np.ndarray], D: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The transpose of `acting`: functionals in g_k, shape (rank of psi, samples), from minus the functionals in C_k."""
    by_g = -kernel.transposed_times(beta[0], D[0])
    return [by_g] if len(D) == 1 else [by_g - kernel.transposed_times(beta[1], D[1]), -kernel.transposed_times(beta[0], D[1])]


def by_coefficients(inputs: LayerInputs, t: float, by_stage: Functionals, by_beta: np.ndarray) -> list[np.ndarray]:
    """The functionals in what a layer takes, from the functionals in a stage's arguments at the fraction t. Collective."""
    functionals = [inputs.bias.pull_back(t, by_stage.bias), inputs.beta.pull_back(t, by_beta)]
    if inputs.learns_length:
        functionals.append(np.array([by_stage.length]))
    if inputs.learns_factors:
        functionals += [by_stage.phi.ravel(), by_stage.psi.ravel()]
    return functionals


class SampleMatrices:
    """A PETSc matrix with one dense matrix a sample on its diagonal.

    Parameters
    ----------
    width
        Number of rows of each dense matrix.
    samples
        Number of samples.
    comm
        The communicator.

    Attributes
    ----------
    mat : petsc4py.PETSc.Mat
    """

    def __init__(self, width: int, samples: int, comm: PETSc.Comm):
        size = width * samples
        columns = np.arange(size, dtype=PETSc.IntType).reshape(samples, 1, width)
        #: Rows and columns, in PETSc's CSR.
        self._pattern = (
            np.arange(0, size * width + 1, width, dtype=PETSc.IntType),
            np.broadcast_to(columns, (samples, width, width)).ravel(),
        )
        csr: tuple = (*self._pattern, np.ones(size * width))
        self.mat = PETSc.Mat().createAIJ(((size, size), (size, size)), bsize=width, csr=csr, comm=comm)

    def fill(self, matrices: np.ndarray) -> None:
        """Set the dense matrices, shape (samples, width, width)."""
        rows, columns = self._pattern
        self.mat.setValuesCSR(rows, columns, matrices.ravel())  # type: ignore[arg-type]  # arrays, against the stubs
        self.mat.assemble()


class Transposed:
    """A matrix of which the transposed product alone is known: ``multiply(x, y)`` writes it into y."""

    def __init__(self, multiply: Callable[[PETSc.Vec, PETSc.Vec], None]):
        self._multiply = multiply

    def multTranspose(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """The transposed product with x, into y."""
        self._multiply(x, y)


class Zero:
    """The matrix 0."""

    def zeroEntries(self, mat: PETSc.Mat) -> None:
        """Nothing is left to do: all entries are 0."""

    def multTranspose(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Set y to 0."""
        y.set(0.0)


class ShiftedJacobian:
    """`scale (shift I - R')` by its products, at the present point of a layer."""

    def __init__(self, layer: LinearLayer):
        self._layer = layer

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """The product with x, into y."""
        layer, state = self._layer, self._layer.state
        g, rest = state.read(x)
        ds = state.new_rest()
        carries_f = ds is not None
        if not carries_f and layer.by_f:
            ds = [np.empty_like(by_f) for by_f in layer.by_f]
        dQ = layer.derivative(g, ds)
        f, rest = rest, layer.shift * rest
        if carries_f:
            rest[:, : state.stage.Y.nodes] -= [part[: state.stage.Y.nodes] for part in ds]
            layer.add_cost(f, -1.0, rest)
        elif layer.by_f:  # q_t = <lambda, s>
            rest -= state.stage.Y.sum(sum(np.einsum("is,is->s", by_f, d) for by_f, d in zip(layer.by_f, ds)))
        state.write(y, [layer.shift * part - d for part, d in zip(g, dQ)], rest)
        y.scale(layer.scale)

    def multTranspose(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """The transposed product with x, into y."""
        layer, state = self._layer, self._layer.state
        g, rest = state.read(x)
        by_g, by_rest, _ = layer.transpose(state.stage_functional(x, layer.by_f))
        state.write(y, [layer.shift * part - d for part, d in zip(g, by_g)], layer.shift * rest - by_rest)
        y.scale(layer.scale)

    def scale(self, mat: PETSc.Mat, factor: float) -> None:
        """Multiply the matrix by a factor."""
        self._layer.scale *= factor

    def duplicate(self, mat: PETSc.Mat, option: object) -> PETSc.Mat:
        """PETSc takes the duplicate for the Jacobian of the explicit part, which is zero here: the matrix 0."""
        state = self._layer.state
        return shell(Zero(), (state.size,) * 2, state.comm)


class Elimination:
    """The exact inverse of `ShiftedJacobian` for a state with f, as a preconditioner: it solves for g, then f, then c."""

    def __init__(self, layer: LinearLayer):
        self._layer = layer

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """The solution for the right-hand side x, into y."""
        layer, state = self._layer, self._layer.state
        g, rest = state.read(x)
        g = self._solve(layer.matrices(), g)
        ds = state.new_rest()
        layer.derivative(g, ds)
        rest /= layer.scale
        nodes = state.stage.Y.nodes
        rest[:, :nodes] = (rest[:, :nodes] + [part[:nodes] for part in ds]) / layer.shift
        layer.add_cost(rest, 1.0, rest)
        rest[:, nodes:] /= layer.shift
        state.write(y, g, rest)

    def applyTranspose(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """The solution of the transposed system for the right-hand side x, into y."""
        layer, state = self._layer, self._layer.state
        g, rest = state.read(x)
        rest /= layer.scale * layer.shift
        parts = state.split(rest)
        c = None
        if parts is not None:
            c = parts[1].copy()
            rest += layer.cost_transpose(c) / layer.shift
        nothing = tuple(np.zeros_like(part) for part in g)
        by_s = StageFunctional(nothing, np.ones(state.stage.samples), tuple(rest[:, : state.stage.Y.nodes]), c)
        by_g, *_ = layer.transpose(by_s)
        g = [part + layer.scale * d for part, d in zip(g, by_g)]
        state.write(y, self._solve(np.swapaxes(layer.matrices(), 1, 2), g), rest)

    def _solve(self, matrices, g):
        solution = np.linalg.solve(matrices, np.concatenate(g).T[:, :, None])[:, :, 0]
        return np.split(solution.T, len(g))
