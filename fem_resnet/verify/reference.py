"""J of a learning problem, written out a second time for comparison: plain formulas, stepped in f itself.

The package computes no number in this comparison. Weights are assembled again (`measure`), coefficients are read from the
Functions that hold them (`parameters`), integrals are sums over nodes that MPI adds up. Sigma (`formulas`), losses,
predictions and regularisers stand here a second time. A PETSc TS of the network's type steps (2.8) as it is written
(`layer_equation`). Only the nodes, the values of basis functions, and PETSc are taken as given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import firedrake as fd
import numpy as np
import scipy.special
from firedrake.assemble import get_assembler
from mpi4py import MPI
from pyadjoint.tape import stop_annotating

from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.learning.batch import Batch
from fem_resnet.learning.field_terms import FieldTerm, TotalVariation
from fem_resnet.learning.locality import Locality
from fem_resnet.learning.pointwise_terms import Huber, SmoothedModulus
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.learning.term import Term, Weights
from fem_resnet.parameters.kernel import KernelCoefficients
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import BasisCoefficients, SpaceBasis
from fem_resnet.verify.formulas import NotWrittenOut, sigma
from fem_resnet.verify.layer_equation import FieldTS, LayerEquation
from fem_resnet.verify.measure import Measure, by_nodes, raw
from fem_resnet.verify.parameters import Parameters

__all__ = ["Reference"]


class Reference:
    """J of a learning problem at the present values of all Functions, from formulas. All methods are collective.

    Use it as a context, or `close` it: PETSc's objects are destroyed on all ranks together. States f have the shape
    (nodes, samples); with a running cost they have one more row, the cost of each sample so far.

    Parameters
    ----------
    problem
        The problem.
    batch
        Data in place of the problem's own.

    Attributes
    ----------
    parameters : Parameters
        The parameters of the problem.
    """

    def __init__(self, problem: LearningProblem, batch: Batch | None = None):
        self.problem, self.net, self.head = problem, problem.net, problem.head
        self.batch = problem.batch if batch is None else batch
        self.Y = self.net.Y
        self.parameters = Parameters(problem)
        self.measure = self.parameters.measure
        self._sigma = sigma(self.net.activation)
        self._steppers: list[FieldTS] = []
        #: A Function and the assembler of its total variation, by label domain and epsilon.
        self._variations: dict[tuple[LabelSpace, float], tuple[fd.Function, Any]] = {}

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Destroy PETSc's objects."""
        for stepper in self._steppers:
            stepper.ts.destroy()
        self._steppers = []

    # -- (2.8) --------------------------------------------------------------------------------------------------------

    def layer(self, layer: int) -> LayerEquation:
        """The equation of a layer, at the present coefficients."""
        parameters, net = self.parameters, self.net
        (first, _), *_ = parameters.hats(net.kernel, layer, 0.5)
        kernel = parameters.kernel(net.kernel, first)
        moved = {p.name: parameters.coefficients(p, 0) for p in net.factors}
        phi, psi = (parameters.factor(basis, moved.get(name)) for name, basis in (("phi", kernel.phi), ("psi", kernel.psi)))
        start, end = map(float, parameters.times[layer : layer + 2])
        return LayerEquation(
            self._sigma, self.measure, phi, psi, start, end, self._in_time(net.bias, layer),
            self._in_time(net.kernel, layer), net.gradient_flow, self.problem.running,
        )  # fmt: skip

    def _in_time(self, parameter: Parameter, layer: int) -> Callable[[float], np.ndarray]:
        """The bias at the nodes, or beta, as a function of the fraction in [0, 1] of a layer."""
        expanded = {}
        for k, _ in self.parameters.hats(parameter, layer, 0.5):
            c, basis = self.parameters.coefficients(parameter, k), parameter.space_bases[k]
            expanded[k] = basis.basis.values @ c if isinstance(basis, BasisCoefficients) else c

        def value(s: float) -> np.ndarray:
            return sum((theta * expanded[k] for k, theta in self.parameters.hats(parameter, layer, s)), start=np.zeros(()))

        return value

    def step(self, f: np.ndarray, layer: int, taken: Sequence[float] | None = None) -> np.ndarray:
        """The state at the end of a layer, from f at its start; `taken` are steps in parts of the layer, if not equal ones."""
        if self._steppers and self.net.solver_parameters["ts_type"] == "dirk":
            self.close()  # a used one would take its first slope at the time of its last stage
        if not self._steppers:
            self._steppers.append(FieldTS(self.net.solver_parameters, self.Y, f.shape))
        steps = [1 / self.net.steps] * self.net.steps if taken is None else taken
        return self._steppers[0].solve(self.layer(layer), f, steps)

    def states(self, f: np.ndarray, taken: Sequence | None = None, start: int = 0) -> list[np.ndarray]:
        """The states at the layer times from t_start on, from f at t_start; `taken` has the steps of each layer."""
        result = [f]
        for layer in range(start, self.net.layers):
            result.append(self.step(result[-1], layer, None if taken is None else taken[layer]))
        return result

    # -- J ------------------------------------------------------------------------------------------------------------

    @cached_property
    def _output_measure(self) -> Measure:
        """The measure of the label domain of O."""
        return self.measure if self.head is None else self.parameters.measure_of(self.head.Y)

    @property
    def initial(self) -> np.ndarray:
        """f_I, with a row of zeros below it where there is a running cost."""
        f = self._lifted(self.batch.inputs)
        return f if self.problem.running is None else np.pad(f, ((0, 1), (0, 0)))

    def _lifted(self, inputs: fd.Function) -> np.ndarray:
        """f_I at the nodes for inputs, sum_m V_cm u_m where there is a lift, shape (nodes, samples)."""
        lift, samples = self.problem.lift, self.batch.samples
        if lift is None:
            return raw(inputs, self.Y, (self.Y.nodes, samples))
        V = lift.V.space_basis.whole(self.parameters.coefficients(lift.V, 0))
        u = np.split(raw(inputs, lift.fields, (lift.fields.nodes, samples)), V.shape[1])
        return np.vstack([sum((V_cm * u_m for V_cm, u_m in zip(row, u)), start=np.zeros(())) for row in V])

    @cached_property
    def omega(self) -> np.ndarray:
        """Weights of the samples, shape (samples,), which add up to one."""
        omega = np.ones(self.batch.samples) if self.batch.weights is None else np.array(self.batch.weights, dtype=float)
        omega = omega / omega.max()  # the sum of large ones may overflow
        return omega / omega.sum()

    @cached_property
    def observed(self) -> np.ndarray:
        """The observations C at the nodes of the output, shape (output nodes, samples)."""
        Y, targets = (self.Y if self.head is None else self.head.Y), self.batch.targets
        if isinstance(targets, fd.Function):
            return raw(targets, Y, (Y.nodes, self.batch.samples))
        return (Y.numbers[:, None] == np.asarray(targets)[None, :]).astype(float)

    def output(self, f: np.ndarray) -> np.ndarray:
        """O of (2.9), shape (output nodes, samples)."""
        f = f[: self.Y.nodes]
        if self.head is None:
            return f
        W, mu = self.head.whole(*(self.parameters.coefficients(parameter, 0) for parameter in self.head.parameters))
        return self.head.onto.values @ (W @ self.measure.integrals(self.head.psi.values, f) + mu[:, None])

    def prediction(self, O: np.ndarray) -> np.ndarray:
        """The prediction h(O), of the shape of O."""
        name = self.problem.loss.prediction or "identity" if self.head is None else self.head.prediction.name
        if name == "identity":
            return O
        if name == "logistic":
            return scipy.special.expit(O)
        if name == "softmax":
            measure = self._output_measure
            return np.exp(O - self._log_integral(O, measure))
        raise NotWrittenOut(f"the prediction {name!r} has no second formula")

    def _log_integral(self, O: np.ndarray, measure: Measure) -> np.ndarray:
        """The logarithm of int e^O for each sample, shape (samples,), without overflow."""
        parts = np.logaddexp.reduce(np.log(measure.weights)[:, None] + O, axis=0, initial=-np.inf)
        return np.logaddexp.reduce(np.array(measure.comm.allgather(parts)), axis=0)

    def round_off(self, O: np.ndarray) -> float:
        """A bound of the absolute error of the loss: entropies are small differences of numbers as large as O."""
        if self.problem.loss.name not in ("cross_entropy", "binary_cross_entropy"):
            return 0.0
        measure = self._output_measure
        largest = measure.comm.allreduce(float(np.abs(O).max(initial=1.0)), op=MPI.MAX)
        return 16 * np.finfo(float).eps * largest * float(measure.total(measure.weights.sum()))

    def losses(self, O: np.ndarray) -> np.ndarray:
        """The loss of each sample, shape (samples,)."""
        loss, C = self.problem.loss, self.observed
        measure = self._output_measure
        if loss.name == "least_squares":
            return measure.total(measure.weights @ (0.5 * np.abs(self.prediction(O) - C) ** 2))
        if loss.name == "cross_entropy":
            return -measure.total(measure.weights @ (C * (O - self._log_integral(O, measure))))
        if loss.name == "binary_cross_entropy":
            return measure.total(measure.weights @ (C * np.logaddexp(0.0, -O) + (1 - C) * np.logaddexp(0.0, O)))
        # A user's own loss: there is no second formula.
        return measure.total(loss.value(measure.Y, O, C, self.problem._prediction))

    def curvature(self, X: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The second derivative of each sample's loss along v, shape (samples,).

        The loss is taken as a function of C_pre = X for least squares, and of O = X for the entropies. X and v have the shape
        of O.
        """
        measure = self._output_measure
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
        penalised = [p for p in self.problem.parameters if p.penalised]
        penalised = [self.net.kernel if p is self.net.kernel.learned else p for p in penalised]
        total = 0.0
        for (weight, term), name in zip(regulariser.terms, [*regulariser.names, *[""] * len(regulariser.terms)]):
            for parameter in penalised:
                own = dict(weight.own).get(parameter.name, weight.others) if isinstance(weight, Weights) else weight
                if own == 0:
                    continue
                if isinstance(term, Term):
                    total += own * self._functional(parameter, term)
                else:
                    total += own * self._penalty(parameter, name, term) / 2
        return float(total)

    def _functional(self, parameter: Parameter, term: Term) -> float:
        """What a term that is no form has of one parameter; by the term itself where it is a user's own."""
        if isinstance(term, FieldTerm):
            penalty = term.on(parameter)
            c = [self.parameters.coefficients(parameter, k) for k in range(len(parameter.functions))]
            return 0.0 if penalty is None else penalty.value(c)
        tau = self.parameters.lengths(parameter)
        return sum(tau[k] * self._of_function(parameter, term, k) for k in range(len(tau)))

    def _of_function(self, parameter: Parameter, term: Term, k: int) -> float:
        """What a term has of the function k in time of one parameter, without tau_k."""
        c, basis = self.parameters.coefficients(parameter, k), parameter.space_bases[k]
        if isinstance(term, TotalVariation):
            return self._total_variation(basis, c, term.epsilon) if parameter.name in ("bias", "initial") else 0.0
        if isinstance(term, Locality):
            return self._locality(self.parameters.kernel(parameter, k).phi, c, term) if parameter.name == "kernel" else 0.0
        if not isinstance(basis, KernelCoefficients):
            measure = self.parameters.measure_of(basis.Y)
            values = basis.basis.values @ c if isinstance(basis, BasisCoefficients) else c
            return float(measure.total(np.sum(measure.weights * _convex(term, values).T)))
        phi, psi = basis.kernel.phi, basis.kernel.psi
        in_y, in_z = (self.parameters.measure_of(of.Y) for of in (phi, psi))
        b = phi.values @ c @ np.concatenate(in_z.comm.allgather(psi.values)).T
        return float(in_y.total(in_y.weights @ _convex(term, b) @ np.concatenate(in_z.comm.allgather(in_z.weights))))

    def _total_variation(self, basis: SpaceBasis, c: np.ndarray, epsilon: float) -> float:
        """int (|grad a|^2 + epsilon^2)^(1/2) - epsilon, with as many points as integrate the squared gradient exactly."""
        columns = basis.basis.values @ c if isinstance(basis, BasisCoefficients) else c
        if (basis.Y, epsilon) not in self._variations:
            a = fd.Function(basis.Y.V)
            degree = max(2 * a.function_space().ufl_element().embedded_superdegree - 2, 1)
            root = fd.sqrt(fd.inner(fd.grad(a), fd.grad(a)) + epsilon**2)
            self._variations[basis.Y, epsilon] = a, get_assembler((root - epsilon) * fd.dx(degree=degree))
        (a, assembler), total = self._variations[basis.Y, epsilon], 0.0
        for column in columns.reshape(basis.Y.nodes, -1).T:
            a.dat.data_wo[...] = by_nodes(column, basis.Y)
            with stop_annotating():
                total += float(assembler.assemble())
        return total

    def _locality(self, phi: Basis, beta: np.ndarray, term: Locality) -> float:
        """1/2 the squared norms of (x_d(y) - x_d(z)) b(y, z), projected onto phi: at all pairs of nodes."""
        x = phi.Y.coordinates if term.embedding is None else term.embedding(phi.Y.coordinates.copy())
        gather = self.measure.comm.allgather
        values, w, x = (np.concatenate(gather(part)) for part in (phi.values, self.measure.weights, x))
        b, seen = values @ beta @ values.T, np.linalg.solve(self.parameters.gram(phi), (values * w[:, None]).T)
        G, total = self.parameters.gram(phi), 0.0
        for x_d in x.T:
            kappa = seen @ ((x_d[:, None] - x_d) * b) @ seen.T
            total += float(np.trace(kappa.T @ G @ kappa @ G)) / 2
        return total

    def _penalty(self, parameter: Parameter, name: str, form: Callable) -> float:
        """The square that a term of the regulariser has of one parameter; by `form` where the term is a user's own."""
        own = self.parameters
        c, tau = [own.coefficients(parameter, k) for k in range(len(parameter.functions))], own.lengths(parameter)
        if name == "tikhonov":
            return sum(tau[k] * own.product(parameter, k, c[k], c[k]) for k in range(len(c)))
        if name == "smooth_in_space":
            if self.head is not None and parameter in self.head.parameters:
                return 0.0
            return sum(tau[k] * own.square_of_gradients(parameter, k, c[k]) for k in range(len(c)))
        if name == "smooth_in_time":
            return sum(
                own.product(parameter, k, c[m] - c[k], c[m] - c[k]) / distance
                for k, m, distance in own.steps_in_time(parameter)
            )
        return sum(basis.pair(d, v) for basis, d, v in zip(parameter.space_bases, form(parameter, c), c))

    @property
    def _directions(self) -> tuple[np.ndarray, np.ndarray]:
        """The directions v, shape (nodes, samples), and the derivatives C' of the target there, of the shape of O."""
        derivatives, Y = self.problem.derivatives, self.Y if self.head is None else self.head.Y
        v, C = derivatives.directions, derivatives.targets
        return self._lifted(v), raw(C, Y, (Y.nodes, self.batch.samples))

    def mismatch(self, f: np.ndarray, taken: Sequence | None = None) -> float:
        """The part of J that compares O' v with C', for the initial state f; O' v by central differences of order 6."""
        if self.problem.derivatives is None:
            return 0.0
        v, C = self._directions
        measure = self._output_measure
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


def _convex(term: Term, x: np.ndarray) -> np.ndarray:
    """The function of the values whose integral a term is."""
    if isinstance(term, SmoothedModulus):
        return np.sqrt(x**2 + term.epsilon**2) - term.epsilon
    if isinstance(term, Huber):
        return np.where(np.abs(x) <= term.delta, x**2 / 2, term.delta * (np.abs(x) - term.delta / 2))
    raise NotWrittenOut(f"the term {term!r} has no second formula")
