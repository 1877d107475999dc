"""A learning problem written out a second time, for comparison: plain formulas, stepped in f itself.

Nothing here asks the package for a number that it computes. Weights are assembled again, coefficients are read from the
Functions that hold them, integrals are sums over nodes added up by MPI, sigma, losses, predictions and regularisers stand
here a second time, and (2.8) is stepped by a PETSc TS of the same type as it is written,

    f_t = sigma(a - Phi beta int Psi f),      f of shape (nodes, samples), t in [t_l, t_(l+1)],

with a running cost in a row more: this rank's part of each sample's L; not in coefficients; implicit types are solved by products with the Jacobian alone. No matrix of size nodes x nodes occurs.
Taken as given are the nodes, the values of basis functions, and PETSc.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import firedrake as fd
import numpy as np
import petsctools
import scipy.special
import sympy
from mpi4py import MPI
from petsc4py import PETSc
from pyadjoint.tape import stop_annotating

from fem_resnet.activation.activation import Activation
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.learning.objective import Batch, LearningProblem
from fem_resnet.parameters.kernel import KernelCoefficients
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import BasisCoefficients, NodalValues, StateValues
from fem_resnet.parameters.stable_kernels import MatrixControls

__all__ = ["Measure", "NotWrittenOut", "Reference", "raw", "relative", "sigma"]


class NotWrittenOut(NotImplementedError):
    """Something that has no second form here; the message says what."""


_SIGMA = {
    "tanh": lambda s: 1 - 2 / (1 + np.exp(2 * np.clip(s, -350, 350))),
    "arctan": lambda s: np.sign(s) * (np.pi / 2 - np.arctan2(1.0, np.abs(s))),
    "sigmoid": scipy.special.expit,
    "softplus": lambda s: np.logaddexp(0.0, s),
    "relu": lambda s: np.where(s > 0, s, 0.0),
    "leaky_relu": lambda s: np.where(s > 0, s, 0.1 * s),
    "elu": lambda s, alpha: np.where(s > 0, s, alpha * (np.exp(np.minimum(s, 0)) - 1)),
    "identity": lambda s: 1.0 * s,
}


def sigma(activation: Activation) -> Callable[[np.ndarray], np.ndarray]:
    """Sigma by another formula than the package's."""
    if activation.expression is not None:
        symbols = sorted(activation.expression.free_symbols, key=str) or [sympy.Symbol("s")]
        formula = sympy.lambdify(symbols, activation.expression, modules=["scipy", "numpy"])
        return lambda s: np.broadcast_to(formula(s), np.shape(s)) + 0.0
    if activation.name not in _SIGMA:
        raise NotWrittenOut(f"the activation {activation.name!r} has no second formula")
    parameters = dict(activation.parameters)
    return lambda s: _SIGMA[activation.name](s, **parameters)


def raw(function: fd.Function | fd.Cofunction, Y: LabelSpace, shape: tuple[int, ...]) -> np.ndarray:
    """Coefficients as they lie in a Function: (nodes, ...) of Y on its ranks, anything else whole on every rank. Collective."""
    values = np.array(function.dat.data_ro)
    if function.function_space().mesh() is Y.V.mesh():
        return values.reshape((values.shape[0], *shape[1:]))
    return np.concatenate([part.ravel() for part in Y.comm.allgather(values)]).reshape(shape)


def relative(a, b, comm=None) -> float:
    """Largest difference of two arrays, in parts of the largest entry of the second; on all ranks of `comm`."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape:
        return np.inf
    pair = np.array([np.abs(a - b).max(initial=0.0), np.abs(b).max(initial=0.0)])
    if comm is not None:
        comm.Allreduce(MPI.IN_PLACE, pair, op=MPI.MAX)
    return float(pair[0] / pair[1]) if pair[1] > 0 else float(pair[0])


class Measure:
    """The measure of a label domain, assembled anew: w as row sums of the mass matrix."""

    def __init__(self, Y: LabelSpace):
        self.Y, self.comm = Y, Y.comm
        with stop_annotating():
            one = fd.Function(Y.V).assign(1.0)
            form = fd.inner(one, fd.TestFunction(Y.V)) * fd.dx
            self.weights = fd.assemble(form).dat.data_ro.copy()

    def total(self, values: np.ndarray | float) -> np.ndarray:
        """Sum over the ranks."""
        values = np.array(values, dtype=float)
        result = np.empty_like(values)
        self.comm.Allreduce(values, result, op=MPI.SUM)
        return result

    def integrals(self, test: np.ndarray, f: np.ndarray) -> np.ndarray:
        """Int test_i f_s dy, shape (columns of test, columns of f)."""
        return self.total(test.T @ (self.weights[:, None] * f))

    def gram(self, basis: Basis) -> np.ndarray:
        """Inner products of basis functions."""
        return self.integrals(basis.values, basis.values)

    def inner(self, f: np.ndarray, g: np.ndarray) -> float:
        """Inner product of node values, (nodes,) or (nodes, samples), the samples added up."""
        return float(self.total(np.sum(self.weights * (f * g).T)))

    def norm(self, f: np.ndarray) -> float:
        """Its norm."""
        return self.inner(f, f) ** 0.5

    def stiffness(self, values: np.ndarray) -> np.ndarray:
        """K x: functionals of int grad . grad, or of a graph's half sum of squared differences; x of shape (nodes, any)."""
        Y = self.Y
        if Y.graph is not None:
            A = Y.graph.toarray()
            whole = np.zeros((Y.size, values.shape[1]))
            whole[Y.numbers] = values
            whole = self.total(whole)
            return (A.sum(axis=1)[:, None] * whole - A @ whole)[Y.numbers]
        result = np.empty_like(values)
        x, y = self._gradients.createVecs()
        for k in range(values.shape[1]):
            x.array_w[:] = values[:, k]
            self._gradients.mult(x, y)
            result[:, k] = y.array_r
        return result

    @cached_property
    def _gradients(self) -> PETSc.Mat:
        u, v = fd.TrialFunction(self.Y.V), fd.TestFunction(self.Y.V)
        with stop_annotating():
            return fd.assemble(fd.inner(fd.grad(u), fd.grad(v)) * fd.dx).petscmat

    def basis_stiffness(self, basis: Basis) -> np.ndarray:
        """Inner products of gradients; of eigenfunctions on a discontinuous space those that they came with."""
        if self.Y.V.ufl_element() not in fd.H1 and self.Y.graph is None:
            return basis.stiffness
        return self.total(basis.values.T @ self.stiffness(basis.values))


class Reference:
    """J of a learning problem at the present values of all Functions, from formulas.

    Collective. Use as a context, or `close` it: PETSc's objects are destroyed on all ranks together.

    Parameters
    ----------
    problem
        The problem.
    batch
        Data in place of the problem's own.
    """

    def __init__(self, problem: LearningProblem, batch: Batch | None = None):
        self.problem, self.net, self.head = problem, problem.net, problem.head
        self.batch = problem.batch if batch is None else batch
        self.Y = self.net.Y
        self.measure = Measure(self.Y)
        self._sigma = sigma(self.net.activation)
        self._grams: dict[Basis, np.ndarray] = {}
        self._stiffness: dict[Basis, np.ndarray] = {}
        self._steppers: list[_FieldTS] = []

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Destroy PETSc's objects. Collective."""
        for stepper in self._steppers:
            stepper.ts.destroy()
        self._steppers = []

    # -- parameters ---------------------------------------------------------------------------------------------------

    def coefficients(self, parameter: Parameter, k: int) -> np.ndarray:
        """c_k."""
        return raw(parameter.functions[k], self.Y, parameter.space_bases[k].shape)

    @property
    def times(self) -> np.ndarray:
        """t_0 .. t_L."""
        if self.net.layer_times is not None:
            return np.append(0.0, self.coefficients(self.net.layer_times, 0))
        return np.array(self.net.times)

    def hats(self, parameter: Parameter, layer: int, s: float) -> list[tuple[int, float]]:
        """Numbers and values of what acts at the fraction s of a layer."""
        how = parameter.time_basis.description
        if how == "linear":
            return [(layer, 1.0 - s), (layer + 1, s)]
        return [({"layers": layer, "shared": 0}[how] if isinstance(how, str) else how[layer], 1.0)]

    def lengths(self, parameter: Parameter) -> np.ndarray:
        """tau_k of each function in time: what it has of [0, T], in the times that the network was given."""
        if parameter not in (self.net.bias, self.net.kernel, self.net.kernel.learned):
            return np.ones(len(parameter.functions))
        tau, times = np.zeros(len(parameter.functions)), self._given_times
        for layer in range(self.net.layers):
            # Simpson's rule is exact for what is linear.
            for s, weight in ((0.0, 1 / 6), (0.5, 4 / 6), (1.0, 1 / 6)):
                for k, theta in self.hats(parameter, layer, s):
                    tau[k] += weight * theta * (times[layer + 1] - times[layer])
        return tau

    @property
    def _given_times(self) -> np.ndarray:
        return np.array(self.net._given_times)

    def steps_in_time(self, parameter: Parameter) -> list[tuple[int, int, float]]:
        """Functions that follow each other in t, and the distance of their centres."""
        if parameter not in (self.net.bias, self.net.kernel) or not self.net.layers:
            return []
        times = self._given_times
        if parameter.time_basis.description == "linear":
            return [(l, l + 1, times[l + 1] - times[l]) for l in range(self.net.layers)]
        pieces: list[list] = []
        for layer in range(self.net.layers):
            ((k, _),) = self.hats(parameter, layer, 0.0)
            if pieces and pieces[-1][0] == k:
                pieces[-1][2] = times[layer + 1]
            else:
                pieces.append([k, times[layer], times[layer + 1]])
        return [(a[0], b[0], (b[1] + b[2] - a[1] - a[2]) / 2) for a, b in zip(pieces, pieces[1:])]

    def gram(self, basis: Basis) -> np.ndarray:
        """As of `Measure`, made once."""
        if basis not in self._grams:
            self._grams[basis] = self.measure_of(basis.Y).gram(basis)
        return self._grams[basis]

    def stiffness(self, basis: Basis) -> np.ndarray:
        """Inner products of gradients, as of `Measure`, made once."""
        if basis not in self._stiffness:
            self._stiffness[basis] = self.measure.basis_stiffness(basis)
        return self._stiffness[basis]

    def measure_of(self, Y: LabelSpace) -> Measure:
        """That of the network's label domain, or of the head's."""
        return self.measure if Y is self.Y else self._head_measure

    @cached_property
    def _head_measure(self) -> Measure:
        return Measure(self.head.Y)

    def product(self, parameter: Parameter, k: int, c: np.ndarray, d: np.ndarray) -> float:
        """Inner product of what c and d stand for, in L2 of the label domain, or of the pair of them, without tau_k."""
        basis = parameter.space_bases[k]
        if isinstance(basis, (NodalValues, StateValues)):
            return self.measure_of(basis.Y).inner(c, d)
        if isinstance(basis, BasisCoefficients):
            values = basis.basis.values
            return self.measure_of(basis.Y).inner(values @ c, values @ d)
        if isinstance(basis, KernelCoefficients):
            return float(np.trace(c.T @ self.gram(basis.kernel.phi) @ d @ self.gram(basis.kernel.psi)))
        if isinstance(basis, MatrixControls):
            return float(np.trace(c.T @ basis.grams[0] @ d @ basis.grams[1]))
        return float(np.sum(c * d))

    def _gradients(self, parameter: Parameter, k: int, c: np.ndarray) -> float:
        """Integral of squared gradients of what c stands for."""
        basis = parameter.space_bases[k]
        if isinstance(basis, (NodalValues, StateValues)):
            columns = c.reshape(c.shape[0], -1)
            return float(self.measure.total(np.sum(columns * self.measure.stiffness(columns))))
        if isinstance(basis, BasisCoefficients):
            return float(c @ self.stiffness(basis.basis) @ c)
        if isinstance(basis, KernelCoefficients):
            (G, H), (K, L) = (
                [what(factor) for factor in (basis.kernel.phi, basis.kernel.psi)] for what in (self.gram, self.stiffness)
            )
            return float(np.trace(c.T @ K @ c @ H) + np.trace(c.T @ G @ c @ L))
        return 0.0

    def _factor(self, basis: Basis, X: np.ndarray | None) -> np.ndarray:
        """Values of Phi or Psi: as given, or moved from there by X and made orthonormal, Gram and Schmidt."""
        if X is None:
            return basis.values
        w = self.measure.weights[:, None]
        moved = basis.values + X - basis.values @ self.measure.total(basis.values.T @ (w * X))
        R = np.linalg.cholesky(self.measure.total(moved.T @ (w * moved))).T
        return np.linalg.solve(R.T, moved.T).T

    # -- (2.8) --------------------------------------------------------------------------------------------------------

    def layer(self, layer: int) -> _LayerEquation:
        """The equation of a layer, at the present coefficients."""
        at = [k for k, _ in self.hats(self.net.kernel, layer, 0.5)]
        kernel = self.net.kernel.space_bases[at[0]].kernel
        moved = {p.name: self.coefficients(p, 0) for p in self.net.factors}
        phi, psi = (self._factor(basis, moved.get(name)) for name, basis in (("phi", kernel.phi), ("psi", kernel.psi)))
        return _LayerEquation(
            self._sigma, self.measure, phi, psi, self.times[layer : layer + 2],
            self._in_time(self.net.bias, layer), self._in_time(self.net.kernel, layer), self.net.gradient_flow,
            self.problem.running,
        )  # fmt: skip

    def _in_time(self, parameter: Parameter, layer: int) -> Callable[[float], np.ndarray]:
        expanded = {}
        for k, _ in self.hats(parameter, layer, 0.5):
            c, basis = self.coefficients(parameter, k), parameter.space_bases[k]
            expanded[k] = basis.basis.values @ c if isinstance(basis, BasisCoefficients) else c
        return lambda s: sum(theta * expanded[k] for k, theta in self.hats(parameter, layer, s))

    def step(self, f: np.ndarray, layer: int, taken: Sequence[float] | None = None) -> np.ndarray:
        """F at the end of a layer from f at its start; `taken` are steps, in parts of the layer, other than equal ones."""
        if self._steppers and self.net.solver_parameters["ts_type"] == "dirk":
            self.close()  # PETSc's would take its first slope at the time of the last stage before
        if not self._steppers:
            self._steppers.append(_FieldTS(self.net.solver_parameters, self.Y, f.shape))
        steps = [1 / self.net.steps] * self.net.steps if taken is None else taken
        return self._steppers[0].solve(self.layer(layer), f, steps)

    def states(self, f: np.ndarray, taken: Sequence | None = None, start: int = 0) -> list[np.ndarray]:
        """F at the layer times from t_start on, from f at t_start."""
        result = [f]
        for layer in range(start, self.net.layers):
            result.append(self.step(result[-1], layer, None if taken is None else taken[layer]))
        return result

    # -- J ------------------------------------------------------------------------------------------------------------

    @property
    def initial(self) -> np.ndarray:
        """f_I; with a running cost a row of zeros below it, as in all states here."""
        inputs = self.batch.inputs
        f = raw(inputs, self.Y, (self.Y.nodes, inputs.function_space().value_size))
        return f if self.problem.running is None else np.pad(f, ((0, 1), (0, 0)))

    @cached_property
    def omega(self) -> np.ndarray:
        """Weights of the samples."""
        omega = np.ones(self.batch.samples) if self.batch.weights is None else np.array(self.batch.weights, dtype=float)
        omega = omega / omega.max()  # the sum of large ones may overflow
        return omega / omega.sum()

    @cached_property
    def observed(self) -> np.ndarray:
        """C at the nodes of the output."""
        Y, targets = (self.Y if self.head is None else self.head.Y), self.batch.targets
        if isinstance(targets, fd.Function):
            return raw(targets, Y, (Y.nodes, targets.function_space().value_size))
        return (Y.numbers[:, None] == np.asarray(targets)[None, :]).astype(float)

    def output(self, f: np.ndarray) -> np.ndarray:
        """O: (2.9)."""
        f = f[: self.Y.nodes]
        if self.head is None:
            return f
        W, mu = (self.coefficients(parameter, 0) for parameter in (self.head.W, self.head.mu))
        return self.head.onto.values @ (W @ self.measure.integrals(self.head.psi.values, f) + mu[:, None])

    def prediction(self, O: np.ndarray) -> np.ndarray:
        """h(O)."""
        name = self.problem.loss.prediction or "identity" if self.head is None else self.head.prediction.name
        if name == "identity":
            return O
        if name == "logistic":
            return scipy.special.expit(O)
        if name == "softmax":
            measure = self.measure if self.head is None else self.measure_of(self.head.Y)
            return np.exp(O - self._log_integral(O, measure))
        raise NotWrittenOut(f"the prediction {name!r} has no second formula")

    def _log_integral(self, O: np.ndarray, measure: Measure) -> np.ndarray:
        """Log int e^O of each sample, whatever the size of O."""
        parts = np.logaddexp.reduce(np.log(measure.weights)[:, None] + O, axis=0, initial=-np.inf)
        return np.logaddexp.reduce(np.array(measure.comm.allgather(parts)), axis=0)

    def round_off(self, O: np.ndarray) -> float:
        """What the loss may be wrong by, absolutely: of entropies, which are small differences of numbers as large as O."""
        if self.problem.loss.name not in ("cross_entropy", "binary_cross_entropy"):
            return 0.0
        measure = self.measure if self.head is None else self.measure_of(self.head.Y)
        largest = measure.comm.allreduce(float(np.abs(O).max(initial=1.0)), op=MPI.MAX)
        return 16 * np.finfo(float).eps * largest * float(measure.total(measure.weights.sum()))

    def losses(self, O: np.ndarray) -> np.ndarray:
        """Loss of each sample."""
        loss, C = self.problem.loss, self.observed
        measure = self.measure if self.head is None else self.measure_of(self.head.Y)
        if loss.name == "least_squares":
            return measure.total(measure.weights @ (0.5 * np.abs(self.prediction(O) - C) ** 2))
        if loss.name == "cross_entropy":
            return -measure.total(measure.weights @ (C * (O - self._log_integral(O, measure))))
        if loss.name == "binary_cross_entropy":
            return measure.total(measure.weights @ (C * np.logaddexp(0.0, -O) + (1 - C) * np.logaddexp(0.0, O)))
        # The user's own: its value is what it says.
        return measure.total(loss.value(measure.Y, O, C, self.problem._prediction))

    def curvature(self, X: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Second derivative of each sample's loss along v: in C_pre = X for least squares, else in O = X."""
        measure = self.measure if self.head is None else self.measure_of(self.head.Y)
        w = measure.weights
        if self.problem.loss.name == "least_squares":
            return measure.total(w @ v**2)
        p = self.prediction(X)
        if self.problem.loss.name == "binary_cross_entropy":
            return measure.total(w @ (p * (1 - p) * v**2))
        return measure.total(w @ self.observed) * measure.total(w @ (p * (v - measure.total(w @ (p * v))) ** 2))

    def regulariser(self) -> float:
        """R."""
        regulariser = self.problem.regulariser
        if regulariser is None:
            return 0.0
        total, penalised = 0.0, [p for p in self.problem.parameters if p.penalised]
        penalised = [self.net.kernel if p is self.net.kernel.learned else p for p in penalised]
        of_head = [] if self.head is None else self.head.parameters
        for (weight, form), name in zip(regulariser.terms, [*regulariser.names, *[""] * len(regulariser.terms)]):
            for parameter in penalised:
                c = [self.coefficients(parameter, k) for k in range(len(parameter.functions))]
                tau = self.lengths(parameter)
                if name == "tikhonov":
                    squares = sum(tau[k] * self.product(parameter, k, c[k], c[k]) for k in range(len(c)))
                elif name == "smooth_in_space":
                    smooth = parameter not in of_head
                    squares = sum(tau[k] * self._gradients(parameter, k, c[k]) for k in range(len(c))) if smooth else 0.0
                elif name == "smooth_in_time":
                    squares = sum(
                        self.product(parameter, k, c[m] - c[k], c[m] - c[k]) / distance
                        for k, m, distance in self.steps_in_time(parameter)
                    )
                else:
                    squares = sum(basis.pair(d, v) for basis, d, v in zip(parameter.space_bases, form(parameter, c), c))
                total += weight * squares / 2
        return float(total)

    @cached_property
    def _directions(self) -> tuple[np.ndarray, np.ndarray]:
        """V and C'."""
        derivatives, Y = self.problem.derivatives, self.Y if self.head is None else self.head.Y
        functions = ((self.Y, derivatives.directions), (Y, derivatives.targets))
        return tuple(raw(f, domain, (domain.nodes, f.function_space().value_size)) for domain, f in functions)

    def mismatch(self, f: np.ndarray, taken: Sequence | None = None) -> float:
        """Weight sum omega 1/2 |O' v - C'|^2 for the initial state f; O' v by central differences of order 6."""
        if self.problem.derivatives is None:
            return 0.0
        v, C = self._directions
        measure = self.measure if self.head is None else self.measure_of(self.head.Y)
        e = 2e-3 / max(measure.comm.allreduce(float(np.abs(v).max(initial=0.0)), op=MPI.MAX), 1e-300)
        change = sum(
            weight * (self.output(self.states(f + k * e * v, taken)[-1]) - self.output(self.states(f - k * e * v, taken)[-1]))
            for k, weight in ((1, 45 / 60), (2, -9 / 60), (3, 1 / 60))
        ) / e  # fmt: skip
        squares = measure.total(measure.weights @ (0.5 * (change - C) ** 2))
        return float(self.problem.derivatives.weight * (self.omega @ squares))

    def loss(self, f: np.ndarray) -> float:
        """The part of J that depends on the states."""
        running = 0.0 if self.problem.running is None else self.measure.total(f[-1])
        return float(self.omega @ (self.losses(self.output(f)) + running))

    def of_state(self, f: np.ndarray, taken: Sequence | None = None) -> float:
        """J for f(T)."""
        return self.loss(f) + self.mismatch(self.initial, taken) + self.regulariser()

    def value(self, taken: Sequence | None = None) -> float:
        """J."""
        return self.of_state(self.states(self.initial, taken)[-1], taken)


class _LayerEquation:
    """f_t = sigma(a - B f), or B^T of that, on one layer, and the product with its Jacobian.

    With a running cost there is a row more, c_t = L.
    """

    def __init__(self, sigma, measure: Measure, phi, psi, times, bias, beta, gradient_flow, cost: RunningCost | None):
        self._sigma, self._measure, self._phi, self._psi = sigma, measure, phi, psi
        self.start, self.end = map(float, times)
        self._bias, self._beta, self._cost = bias, beta, cost
        self._gradient_flow = gradient_flow

    def _at(self, t):
        return (t - self.start) / (self.end - self.start)

    def _fields(self, f):
        return f if self._cost is None else f[:-1]

    def _operator(self, t, f):
        return self._phi @ (self._beta(self._at(t)) @ self._measure.integrals(self._psi, f))

    def _argument(self, t, f):
        return self._bias(self._at(t))[:, None] - self._operator(t, f)

    def _behind(self, t, v):
        if not self._gradient_flow:
            return v
        return self._psi @ (self._beta(self._at(t)).T @ self._measure.integrals(self._phi, v))

    def _density(self, t, f):
        return np.broadcast_to(self._cost.density.value(f, self._bias(self._at(t))[:, None]), f.shape)

    def rate(self, t, f):
        f = self._fields(f)
        s = self._behind(t, self._sigma(self._argument(t, f)))
        if self._cost is None:
            return s
        # b at this rank's y, and all z: its square by the sum over z of psi_i psi_j.
        rows, measure = self._phi @ self._beta(self._at(t)), self._measure
        squares = np.sum((rows @ measure.integrals(self._psi, self._psi)) * rows, axis=1)
        L = measure.weights @ (self._density(t, f) + self._cost.kernel / 2 * squares[:, None])
        return np.vstack([s, L[None]])

    def slope(self, t, f):
        """sigma'(u), by a difference: Newton's method does not ask for more; and l_f."""
        f = self._fields(f)
        u = self._argument(t, f)
        slope = (self._sigma(u + 1e-6) - self._sigma(u - 1e-6)) / 2e-6
        if self._cost is None:
            return slope, None
        return slope, (self._density(t, f + 1e-6) - self._density(t, f - 1e-6)) / 2e-6

    def product(self, t, slope, v):
        slope, l_f = slope
        v = self._fields(v)
        ds = self._behind(t, -slope * self._operator(t, v))
        return ds if l_f is None else np.vstack([ds, (self._measure.weights @ (l_f * v))[None]])


class _FieldTS:
    """f stepped by a TS of the network's type, on the mesh's communicator, with given steps."""

    def __init__(self, parameters: dict, Y: LabelSpace, shape: tuple[int, int]):
        self._shape = shape
        options = {name: value for name, value in parameters.items() if name.startswith("ts_") and "adapt" not in name}
        for name in ("ts_rtol", "ts_atol"):
            options.pop(name, None)
        options |= {
            "ts_adapt_type": "none", "snes_rtol": 1e-50, "snes_atol": 1e-15, "snes_stol": 1e-9, "ksp_type": "gmres",
            "ksp_gmres_restart": 100, "ksp_rtol": 1e-11, "ksp_atol": 1e-50, "pc_type": "none",
        }  # fmt: skip
        kind = options["ts_type"]
        if kind in ("irk", "glle", "discrete_gradient"):
            raise NotWrittenOut(f"the steps of {kind!r} are not made a second time")
        self.ts = ts = PETSc.TS().create(comm=Y.comm)
        self._y = PETSc.Vec().createMPI((int(np.prod(shape)), PETSc.DETERMINE), comm=Y.comm)
        size = (self._y.getSizes(),) * 2
        if kind in ("rk", "euler", "ssp"):
            ts.setRHSFunction(self._rate, self._y.duplicate())
        else:
            ts.setIFunction(self._residual, self._y.duplicate())
            jacobian = PETSc.Mat().createPython(size, self, comm=Y.comm)
            jacobian.setUp()
            ts.setIJacobian(self._set_jacobian, jacobian, jacobian)
            if kind == "arkimex":
                ts.setRHSFunction(lambda ts, t, y, F: F.set(0.0), self._y.duplicate())
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.MATCHSTEP)
        ts.setPreStep(self._set_step)
        manager = petsctools.OptionsManager(options, options_prefix=None, default_prefix="fem_resnet_verify_")
        ts.setOptionsPrefix(manager.options_prefix)
        with manager.inserted_options():
            ts.setFromOptions()
        self._manager = manager

    def solve(self, equation: _LayerEquation, f: np.ndarray, steps: Sequence[float]) -> np.ndarray:
        length = equation.end - equation.start
        self._equation, self._steps = equation, [length * step for step in steps]
        self._y.array_w[:] = f.ravel()
        ts = self.ts
        ts.setTime(0.0)  # of the layer: a new dirk takes its first slope at time 0, wherever it starts
        ts.setMaxTime(length)
        ts.setMaxSteps(len(steps))
        ts.setStepNumber(0)
        ts.setTimeStep(self._steps[0])
        ts.solve(self._y)
        return self._y.array_r.reshape(self._shape).copy()

    def _set_step(self, ts):
        ts.setTimeStep(self._steps[min(ts.getStepNumber(), len(self._steps) - 1)])

    def _field(self, vec):
        return vec.array_r.reshape(self._shape)

    def _rate(self, ts, t, y, F):
        F.array_w[:] = self._equation.rate(self._equation.start + t, self._field(y)).ravel()

    def _residual(self, ts, t, y, y_t, F):
        F.array_w[:] = y_t.array_r - self._equation.rate(self._equation.start + t, self._field(y)).ravel()

    def _set_jacobian(self, ts, t, y, y_t, shift, J, P):
        self._shift, self._t = shift, self._equation.start + t
        self._slope = self._equation.slope(self._t, self._field(y))
        self._scale = 1.0
        return True

    def mult(self, mat, x, y):
        """The Jacobian of the residual."""
        product = self._equation.product(self._t, self._slope, self._field(x))
        y.array_w[:] = self._scale * (self._shift * x.array_r - product.ravel())

    def scale(self, mat, factor):
        self._scale *= factor
