"""The right-hand side of a layer made linear at a stage, and the matrices that PETSc is given for it.

Of the state (g, q) or (g, f), with s the rates of f (see `layer`),

    R(g, .) = (Psi^T M s(beta g), <lambda, s>)    or    (Psi^T M s(beta g), s),

so that g acts on all and nothing acts on g but g itself, one dense block a sample. With a running cost the state has c too,
on which f acts (`running_cost`). Implicit methods solve with
`scale (shift I - R')`, either assembled, where the state is (g, q), or by products, with the exact inverse by elimination
as a preconditioner where it is (g, f).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from petsc4py import PETSc

from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.layers.running_cost import CostRate, RunningCost
from fem_resnet.layers.stage import Argument, Cotangent, Stage
from fem_resnet.time_stepping.petsc import shell
from fem_resnet.time_stepping.state import LayerState

__all__ = ["Elimination", "LinearLayer", "ShiftedJacobian", "Transposed", "Zero", "acting"]


class LinearLayer:
    """Derivative of a layer's right-hand side at a point, with its transpose in all that the layer takes.

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
    costate : tuple of numpy.ndarray or None
        lambda, and that of the tangent, in an adjoint solve, or none where it is 0; None in a forward one.
    shift, scale : float
        Those of the matrix `scale (shift I - R')`.
    """

    def __init__(self, stage: Stage, state: LayerState, cost: RunningCost | None = None):
        self.stage = stage
        self.state = state
        self._cost = cost
        self.orders = state.orders
        self.costate: tuple[np.ndarray, ...] | None = None
        self.set_shift(0.0)

    def start(self, inputs: Sequence[LayerInputs]) -> None:
        """Begin a forward solve with these inputs, and their directions if there is a tangent."""
        self._inputs = inputs
        self.costate = None

    def release(self) -> None:
        """Forget inputs and point, and the fields that hang on them."""
        self.start(())
        self._point = None
        self.set_shift(0.0)

    def _beta(self, t: float) -> list[np.ndarray]:
        return [inputs.beta.coefficients(t) for inputs in self._inputs]

    def argument(self, t: float, g: Sequence[np.ndarray]) -> Argument:
        """What the stage at t is evaluated at, for coefficients g of shape (rank, samples) an order."""
        beta = self._beta(t)
        return Argument(
            self._inputs[0].factors,
            tuple(inputs.length for inputs in self._inputs),
            tuple(inputs.bias.coefficients(t) for inputs in self._inputs),
            tuple(acting(beta, g)),
            self._inputs[1].factors if self.orders == 2 else None,
            tuple(beta),
        )

    def cost_rate(self, t: float, at: Argument, rest: object) -> CostRate | None:
        """The rate of c at a stage, if there is a running cost."""
        if self._cost is None:
            return None
        f, _ = self.state.split(rest)
        kernel = None if self._inputs[0].learns_factors else at.factors
        return CostRate(self._cost, self.stage.Y, kernel, at.length, f, at.a, self._beta(t))

    def rates(self, t: float, g: Sequence[np.ndarray], rest: object) -> tuple[list[np.ndarray], object]:
        """The right-hand side: rates of g, and of the rest."""
        at, s = self.argument(t, g), self.state.new_rest()
        Q = self.stage.rate(at, self._fields(s))
        cost = self.cost_rate(t, at, rest)
        if cost is not None:
            for part, c in zip(s, cost.value()):
                part[-1] = c
        return Q, self.state.rates(s)

    def _fields(self, rest: list[np.ndarray] | None) -> list[np.ndarray] | None:
        """The rows of the nodes."""
        return None if rest is None else [part[: self.stage.Y.nodes] for part in rest]

    def set_point(self, t: float, g: Sequence[np.ndarray], rest: object) -> None:
        """Where derivatives are taken from now on."""
        at = self.argument(t, g)
        self._point = t, g, at, self.cost_rate(t, at, rest)

    def set_shift(self, shift: float) -> None:
        """The shift of the matrix at the present point, its scale being one again."""
        self.shift, self.scale, self._blocks = shift, 1.0, None

    def derivative(self, g: Sequence[np.ndarray], out: list[np.ndarray] | None) -> list[np.ndarray]:
        """Derivative of the rate of g in a direction of g; `out` takes that of the s_k, in the rows of the nodes."""
        t, _, at, _ = self._point
        return self.stage.derivative(at, acting(self._beta(t), g), self._fields(out))

    def add_cost(self, f: Sequence[np.ndarray], factor: float, out: Sequence[np.ndarray]) -> None:
        """Add `factor` times the derivative of the rate of c, in a direction of f, to the row of c."""
        *_, cost = self._point
        if cost is not None:
            for part, c in zip(out, cost.derivative(self._fields(list(f)))):
                part[-1] += factor * c

    def cost_transpose(self, c: np.ndarray) -> np.ndarray | float:
        """Transpose of the derivative of the rate of c, in f: the rest of a vector; 0 without a running cost."""
        *_, cost = self._point
        return 0.0 if cost is None else self._in_f(cost.transpose(c)[0])

    def _in_f(self, fields: Sequence[np.ndarray]) -> np.ndarray:
        return np.pad(fields, ((0, 0), (0, 1), (0, 0)))

    def transpose(self, dual: Cotangent) -> tuple[list[np.ndarray], np.ndarray | float, list[np.ndarray]]:
        """Its transpose, in g, in the rest, and in what the layer takes: bias, kernel, length, factors."""
        t, g, at, cost = self._point
        inputs = self._inputs[0]
        result = self.stage.transpose(at, dual, inputs.learns_length, inputs.learns_factors)
        beta, D = self._beta(t), result.D
        if self.orders == 1:
            by_g, by_beta = [-(beta[0].T @ D[0])], -(D[0] @ g[0].T)
        else:
            by_g = [-(beta[0].T @ D[0] + beta[1].T @ D[1]), -(beta[0].T @ D[1])]
            by_beta = -(D[0] @ g[0].T + D[1] @ g[1].T)
        if result.beta is not None:
            by_beta = by_beta + result.beta
        by_rest = 0.0
        if cost is not None:
            in_f, in_a, in_beta = cost.transpose(dual.cost)
            by_rest, by_beta = self._in_f(in_f), by_beta + in_beta
            result.bias += in_a
            if inputs.learns_length:
                result.length += cost.by_length(dual.cost)
        functionals = [inputs.bias.pull_back(t, result.bias), inputs.beta.pull_back(t, by_beta)]
        if inputs.learns_length:
            functionals.append(np.array([result.length]))
        if inputs.learns_factors:
            functionals += [result.phi.ravel(), result.psi.ravel()]
        return by_g, by_rest, functionals

    def blocks(self) -> np.ndarray:
        """`scale (shift I - dQ/dg)`, one block a sample: shape (samples, orders x rank, orders x rank)."""
        if self._blocks is None:
            t, _, at, _ = self._point
            K, beta, r = self.stage.blocks(at), self._beta(t), self.state.rank
            A = np.zeros((self.stage.samples, self.orders * r, self.orders * r))
            for k in range(self.orders):
                A[:, k * r : (k + 1) * r, k * r : (k + 1) * r] = K[0] @ beta[0]
            if self.orders == 2:
                A[:, r:, :r] = K[1] @ beta[0] + K[0] @ beta[1]
            A[:, np.arange(self.orders * r), np.arange(self.orders * r)] += self.shift
            self._blocks = self.scale * A
        return self._blocks

    def assembled(self) -> np.ndarray:
        """Those of (g, q), shape (samples, orders x rank + 1, orders x rank + 1)."""
        samples, size = self.stage.samples, self.orders * self.state.rank
        A = np.zeros((samples, size + 1, size + 1))
        A[:, :size, :size] = self.blocks()
        A[:, size, size] = self.shift
        if self.costate:
            nothing = (np.zeros((self.state.rank, samples)),) * self.orders
            by_g, *_ = self.transpose(Cotangent(nothing, np.ones(samples), self.costate))
            A[:, size, :size] = -np.concatenate(by_g).T
        return A


def acting(beta: Sequence[np.ndarray], g: Sequence[np.ndarray]) -> list[np.ndarray]:
    """C_k: beta g, and its tangent beta_1 g + beta g_1."""
    return [beta[0] @ g[0]] if len(g) == 1 else [beta[0] @ g[0], beta[1] @ g[0] + beta[0] @ g[1]]


class Transposed:
    """Of a matrix, the transposed product: `multiply(x, y)` sets y."""

    def __init__(self, multiply: Callable[[PETSc.Vec, PETSc.Vec], None]):
        self._multiply = multiply

    def multTranspose(self, mat, x, y):
        self._multiply(x, y)


class Zero:
    """The matrix 0."""

    def zeroEntries(self, mat):
        pass

    def multTranspose(self, mat, x, y):
        y.set(0.0)


class ShiftedJacobian:
    """`scale (shift I - R')` by products, at the present point of a layer."""

    def __init__(self, layer: LinearLayer):
        self._layer = layer

    def mult(self, mat, x, y):
        layer, state = self._layer, self._layer.state
        g, rest = state.read(x)
        ds = state.new_rest()
        carries_f = ds is not None
        if not carries_f and layer.costate:
            ds = [np.empty_like(dual) for dual in layer.costate]
        dQ = layer.derivative(g, ds)
        f, rest = rest, layer.shift * rest
        if carries_f:
            rest[:, : state.stage.Y.nodes] -= [part[: state.stage.Y.nodes] for part in ds]
            layer.add_cost(f, -1.0, rest)
        elif layer.costate:  # q_t = <lambda, s>
            rest -= state.stage.Y.sum(sum(np.einsum("is,is->s", dual, d) for dual, d in zip(layer.costate, ds)))
        state.write(y, [layer.shift * part - d for part, d in zip(g, dQ)], rest)
        y.scale(layer.scale)

    def multTranspose(self, mat, x, y):
        layer, state = self._layer, self._layer.state
        g, rest = state.read(x)
        by_g, by_rest, _ = layer.transpose(state.cotangent(x, layer.costate))
        state.write(y, [layer.shift * part - d for part, d in zip(g, by_g)], layer.shift * rest - by_rest)
        y.scale(layer.scale)

    def scale(self, mat, factor):
        self._layer.scale *= factor

    def duplicate(self, mat, option):
        """What PETSc takes for the Jacobian of an explicit part, where there is none: 0."""
        state = self._layer.state
        return shell(Zero(), (state.size,) * 2, state.comm)


class Elimination:
    """The exact inverse of `ShiftedJacobian` where f is carried, as a preconditioner: first g is solved for, then f, then c."""

    def __init__(self, layer: LinearLayer):
        self._layer = layer

    def apply(self, pc, x, y):
        layer, state = self._layer, self._layer.state
        g, rest = state.read(x)
        g = self._solve(layer.blocks(), g)
        ds = state.new_rest()
        layer.derivative(g, ds)
        rest /= layer.scale
        nodes = state.stage.Y.nodes
        rest[:, :nodes] = (rest[:, :nodes] + [part[:nodes] for part in ds]) / layer.shift
        layer.add_cost(rest, 1.0, rest)
        rest[:, nodes:] /= layer.shift
        state.write(y, g, rest)

    def applyTranspose(self, pc, x, y):
        layer, state = self._layer, self._layer.state
        g, rest = state.read(x)
        rest /= layer.scale * layer.shift
        parts = state.split(rest)
        c = None
        if parts is not None:
            c = parts[1].copy()
            rest += layer.cost_transpose(c) / layer.shift
        nothing = tuple(np.zeros_like(part) for part in g)
        dual = Cotangent(nothing, np.ones(state.stage.samples), tuple(rest[:, : state.stage.Y.nodes]), c)
        by_g, *_ = layer.transpose(dual)
        g = [part + layer.scale * d for part, d in zip(g, by_g)]
        state.write(y, self._solve(np.swapaxes(layer.blocks(), 1, 2), g), rest)

    def _solve(self, blocks, g):
        solution = np.linalg.solve(blocks, np.concatenate(g).T[:, :, None])[:, :, 0]
        return np.split(solution.T, len(g))
