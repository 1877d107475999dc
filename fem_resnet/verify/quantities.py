"""J, states, norms, Gram matrices and Riesz maps, compared with the same written out a second time (`reference`)."""

from __future__ import annotations

from typing import Any

import firedrake as fd
import numpy as np
from pyadjoint.tape import stop_annotating

from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.learning.batch import Batch
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.network.run import Run
from fem_resnet.parameters.kernel import KernelCoefficients, LowRankKernel
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import BasisCoefficients
from fem_resnet.verify.formulas import NotWrittenOut
from fem_resnet.verify.measure import Measure, raw, relative
from fem_resnet.verify.parameters import Parameters
from fem_resnet.verify.point import Point, close, names, part, random_like
from fem_resnet.verify.reference import Reference
from fem_resnet.verify.report import Check, Checks

__all__ = ["forward", "measures", "other_data", "riesz_maps", "kernel_set", "taken_steps"]

#: Bound of relative differences by round-off, in sums of some thousand numbers.
_ROUND_OFF = 1e-10


def taken_steps(problem: LearningProblem, run: Run) -> list[list[float]] | None:
    """The steps of each layer in parts of it, where they were adapted, else None."""
    if problem.net.solver_parameters.get("ts_adapt_type", "none") == "none":
        return None
    return [trace.steps for piece in run._pieces for trace in piece.segment.traces()]


# -- the network and J -----------------------------------------------------------------------------------------------


def forward(problem: LearningProblem, point: Point | None = None) -> Checks:
    """Check states at all layer times, output, prediction, regulariser and J.

    With `point` they are those of its tape, else those of a run without a tape.
    """
    net, comm = problem.net, problem.net.Y.comm
    where = "here" if point is None else "nearby, recorded"
    bound = max(_ROUND_OFF, close(problem))
    if point is None:
        J, run = problem.evaluate()
    else:
        J, run = point.value(), point.run
    taken = taken_steps(problem, run)
    with Reference(problem) as reference:
        try:
            states = reference.states(reference.initial, taken)
            f = states[-1]
            value = reference.of_state(f, taken)
        except NotWrittenOut as error:
            yield Check.left_out("J", where, str(error))
            return
        for layer, state in enumerate(states):
            difference = relative(net.Y.values(run.state(layer)), state[: net.Y.nodes], comm)
            yield Check.of("state", f"f(t_{layer}), {where}", difference, bound)
        if taken is not None:
            gap = max((abs(sum(steps) - 1) for steps in taken), default=0.0)
            yield Check.of("adapted steps", "add up to a layer", gap, 1e-10)
        size = abs(value) + abs(reference.loss(f)) + abs(reference.regulariser())
        noise = reference.round_off(reference.output(f))
        noise += 1e-8 * reference.mismatch(reference.initial, taken)  # which `reference` computes by differences
        yield Check.of("J", where, part(abs(float(J) - value), size), bound + part(noise, size))
        if problem.regulariser is not None:
            with stop_annotating():
                R = float(problem.regulariser(problem.penalised()))
            yield Check.of("regulariser", where, relative(R, reference.regulariser()), bound)
        if problem.head is not None:
            O, head = reference.output(f), problem.head
            with stop_annotating():
                yield Check.of("head", f"O, {where}", relative(head.Y.values(head(run.final)), O, comm), bound)
            p = head.Y.values(head.predict(run.final))
            yield Check.of("head", f"prediction, {where}", relative(p, reference.prediction(O), comm), bound)
            scores = head.onto.values @ head.scores(run.final).T
            yield Check.of("head", f"scores, {where}", relative(scores, O, comm), bound)


def other_data(problem: LearningProblem, point: Point) -> Checks:
    """Check J and its gradient after an exchange of the batch: samples in another order, with other weights; minibatches."""
    net, samples = problem.net, problem.batch.samples
    if problem.learn != "parameters" or problem.derivatives is not None:
        yield Check.left_out("exchange", "batch", "the inputs are learned, or derivatives belong to them")
        return
    rng, batch = np.random.default_rng(99), problem.batch
    order, omega = rng.permutation(samples), rng.uniform(0.5, 2.0, samples)
    shift = 1.0 + 0.3 * rng.normal(size=samples)
    Y = net.Y if problem.lift is None else problem.lift.fields
    inputs = Y.batch(raw(batch.inputs, Y, (Y.nodes, samples))[:, order] * shift)
    targets = batch.targets
    if isinstance(targets, fd.Function):
        Y = problem._output
        targets = Y.batch(raw(targets, Y, (Y.nodes, samples))[:, order])
    else:
        targets = np.asarray(targets)[order]
    if inputs.function_space() != batch.inputs.function_space():
        yield Check.left_out("exchange", "batch", "one Function is the batch")
        return
    other, bound = Batch(inputs, targets, omega.tolist()), max(_ROUND_OFF, close(problem))
    J, run = problem.record()
    problem.exchange(other)
    try:
        value = float(J(problem.functions))
        gradient = [np.array(d.dat.data_ro) for d in _listed(J.derivative())]
        with Reference(problem) as reference:
            try:
                expected = reference.value(taken_steps(problem, run))
                noise = 10 * point.round_off * omega.max() / omega.min()
                yield Check.of(
                    "exchange",
                    "J of other data",
                    part(abs(value - expected), abs(expected)),
                    bound + part(noise, abs(expected)),
                )
            except NotWrittenOut as error:
                yield Check.left_out("exchange", "J of other data", str(error))
        if taken_steps(problem, run) is None:
            fresh, _ = problem.record()
            again = [np.array(d.dat.data_ro) for d in _listed(fresh.derivative())]
            difference = max(relative(a, b, net.Y.comm) for a, b in zip(gradient, again))
            yield Check.of("exchange", "gradient of other data", difference, max(bound, point.coarseness))
        yield from _pieces(problem, bound, 10 * point.round_off * omega.max() / omega.min())
    finally:
        problem.exchange(batch)


def _pieces(problem: LearningProblem, bound: float, noise: float) -> Checks:
    """Check that the weighted mean of the losses of minibatches is the loss of the batch."""
    whole = problem.batch
    omega = np.asarray(whole.weights) / np.sum(whole.weights)
    # With this size the last piece is padded.
    pieces = problem.minibatches(whole.samples - 1 if whole.samples > 2 else whole.samples + 1, seed=1)
    total, weight = 0.0, 0.0
    try:
        with Reference(problem) as reference:
            expected = reference.loss(reference.states(reference.initial)[-1])
        for piece in pieces:
            with Reference(problem, piece) as reference:
                share = np.sum(piece.weights)
                total += share * reference.loss(reference.states(reference.initial)[-1])
                weight += share
    except NotWrittenOut as error:
        yield Check.left_out("minibatches", "loss", str(error))
        return
    if problem.net.solver_parameters.get("ts_adapt_type", "none") != "none":
        return
    defect = part(abs(total - expected), abs(expected)) + abs(weight / omega.sum() - 1)
    yield Check.of("minibatches", "loss", defect, bound + part(noise, abs(expected)))


def _listed(derivative) -> list:
    return list(derivative) if isinstance(derivative, (list, tuple)) else [derivative]


# -- measures and norms ----------------------------------------------------------------------------------------------


def measures(problem: LearningProblem) -> Checks:
    """Check weights, |Y| and inner products; Gram matrices, projections and stiffness; kernels and their norms."""
    net, head = problem.net, problem.head
    spaces = {"Y": net.Y} | ({} if head is None or head.Y is net.Y else {"output": head.Y})
    for name, Y in spaces.items():
        yield from _label_space(name, Y)
    bases: dict[Basis, str] = {}
    kernels: dict[LowRankKernel, str] = {}
    for parameter in problem.net.parameters + ([] if head is None else head.parameters):
        for space_basis in parameter.space_bases:
            if isinstance(space_basis, BasisCoefficients):
                bases.setdefault(space_basis.basis, f"basis of {parameter.name}")
            if isinstance(space_basis, KernelCoefficients):
                kernels.setdefault(space_basis.kernel, parameter.name)
                bases.setdefault(space_basis.kernel.phi, f"phi of {parameter.name}")
                bases.setdefault(space_basis.kernel.psi, f"psi of {parameter.name}")
    for basis, name in bases.items():
        yield from _basis(basis, name)
    for kernel, name in kernels.items():
        yield from _kernel(kernel, name)


def _label_space(name: str, Y: LabelSpace) -> Checks:
    measure, rng = Measure(Y), np.random.default_rng(5)
    with stop_annotating():
        volume = fd.assemble(fd.Constant(1.0) * fd.dx(domain=Y.V.mesh()))
    yield Check.of("weights", name, relative(Y.weights, measure.weights, Y.comm), 1e-12)
    yield Check.of("|Y|", name, abs(Y.measure / Y.channels - volume) / volume, 1e-10)
    like = fd.Function(Y.batch_space(2))
    f, g = (random_like(like, rng, Y) for _ in range(2))
    a, b = (raw(h, Y, (Y.nodes, 2)) for h in (f, g))
    size = measure.norm(a) * measure.norm(b)
    yield Check.of("inner product", name, abs(Y.inner(f, g) - measure.inner(a, b)) / size, _ROUND_OFF)
    yield Check.of("norm", name, abs(Y.norm(f) / measure.norm(a) - 1), _ROUND_OFF)
    functional = fd.Cofunction(like.function_space().dual())
    functional.dat.data_wo[...] = g.dat.data_ro
    found = measure.inner(raw(Y.riesz_map(functional), Y, a.shape), a)
    expected = float(measure.total(np.sum(a * b)))
    yield Check.of("Riesz map", f"functions on {name}", abs(found - expected) / max(abs(expected), size), _ROUND_OFF)
    yield Check.of("sum over ranks", name, abs(float(Y.sum(1.0)) - Y.comm.size), 0.0)


def _basis(basis: Basis, name: str) -> Checks:
    Y, measure = basis.Y, Measure(basis.Y)
    yield Check.of("Gram matrix", name, relative(basis.gram, measure.gram(basis), Y.comm), _ROUND_OFF)
    f = raw(random_like(fd.Function(Y.batch_space(2)), np.random.default_rng(6), Y), Y, (Y.nodes, 2))
    yield Check.of("projection", name, relative(basis.project(f), measure.integrals(basis.values, f), Y.comm), _ROUND_OFF)
    if Y.graph is None and Y.V.ufl_element() not in fd.H1:
        return
    # The stiffness of constants is 0, up to round-off of terms that cancel. So differences are relative to the stiffness of
    # functions that vary over the length of Y, at least.
    apart = Y.coordinates - measure.total(measure.weights @ Y.coordinates) / Y.measure
    unit = Y.measure / measure.total(measure.weights @ apart**2).sum() if Y.graph is None else Y.graph.max()
    expected = measure.basis_stiffness(basis)
    size = max(np.abs(expected).max(), np.abs(basis.gram).max() * unit)
    yield Check.of("stiffness", name, np.abs(basis.stiffness - expected).max() / size, _ROUND_OFF)


def _kernel(kernel: LowRankKernel, name: str) -> Checks:
    rng = np.random.default_rng(11)
    beta, gamma = rng.normal(size=(2, *kernel.shape))
    spaces = kernel.phi.Y, kernel.psi.Y
    on_y, on_z = (Measure(Y) for Y in spaces)
    r, f = (raw(random_like(fd.Function(Y.batch_space(2)), rng, Y), Y, (Y.nodes, 2)) for Y in spaces)
    Bf = kernel.phi.values @ (beta @ on_z.integrals(kernel.psi.values, f))
    yield Check.of("B f", name, relative(kernel.apply(beta, f), Bf, spaces[0].comm), _ROUND_OFF)
    size = max(on_y.norm(Bf) * on_y.norm(r), 1e-300)
    defect = on_y.inner(Bf, r) - on_z.inner(kernel.transpose(beta, r), f)
    yield Check.of("(B f, r) = (f, B^T r)", name, abs(defect) / size, _ROUND_OFF)
    # The norm of b in L2(Y x Z) is the norm of the coefficients in orthonormal functions.
    G, H = on_y.gram(kernel.phi), on_z.gram(kernel.psi)
    square = float(np.linalg.norm(np.linalg.cholesky(G).T @ beta @ np.linalg.cholesky(H))) ** 2
    yield Check.of("norm of a kernel", name, abs(kernel.norm(beta) ** 2 / square - 1), _ROUND_OFF)
    yield Check.of("functional of a kernel", name, relative(kernel.functional(beta), G @ beta @ H), _ROUND_OFF)
    yield Check.of("Riesz map", f"kernels, {name}", relative(kernel.riesz(G @ gamma @ H), gamma), 1e-6)


def kernel_set(problem: LearningProblem) -> Checks:
    """Check beta, which is made of other controls X, by the formula of its set (`kernel_sets`, `linear_kernels`)."""
    kernel, choice = problem.net.kernel, problem.net.settings.kernel.among
    if choice is None:
        return
    described: dict[str, Any] = choice.description
    for k, function in enumerate(kernel.learned.functions):
        basis = kernel.space_bases[k]
        X = raw(function, problem.net.Y, kernel.learned.space_bases[k].shape)
        if described["set"] == "PositiveSemidefinite":
            beta = X @ X.T
        elif described["set"] == "LaplaceFunctions":  # theta_k of an eigenspace of d functions is k(lambda) sqrt(d)
            label = np.asarray(choice.arrays["label"])
            beta = np.diag((X[:, 0] / np.sqrt(np.bincount(label)))[label])
        elif described["set"] == "Symmetric":
            beta = np.zeros(basis.shape)
            parts = choice.arrays["values"] * X[choice.arrays["controls"], 0]
            np.add.at(beta.reshape(-1), choice.arrays["places"], parts)
        elif described["set"] == "DampedAntisymmetric":
            beta = (X - X.T) / 2 + described["damping"] * np.eye(len(X))
        else:  # in orthonormal functions, singular values x of X become 2 c x / (1 + x^2)
            measure = Measure(problem.net.Y)
            U, x, V = np.linalg.svd(X, full_matrices=False)
            seen = (U * (2 * described["bound"] * x / (1 + x**2))) @ V
            factors = Parameters.kernel(kernel, k)
            roots = [np.linalg.cholesky(measure.gram(factor)) for factor in (factors.phi, factors.psi)]
            beta = np.linalg.solve(roots[0].T, np.linalg.solve(roots[1].T, seen.T).T)
        found = raw(kernel.functions[k], problem.net.Y, basis.shape)
        yield Check.of("kernel set", f"beta_{k} of its controls", relative(found, beta), _ROUND_OFF)
        yield Check.of("kernel set", f"beta_{k} as it is read", relative(kernel.get(k), beta), _ROUND_OFF)


# -- controls --------------------------------------------------------------------------------------------------------


def riesz_maps(point: Point) -> Checks:
    """Check for each control: (R^-1 d, c) = d(c) in the inner product of label domain and time; norms; lengths in time."""
    problem, rng = point.problem, np.random.default_rng(21)
    controls, labels, position = problem.controls(), names(problem), 0
    point.value()
    point.J.derivative()
    with_riesz = _listed(point.J.derivative(apply_riesz=True))
    with Reference(problem) as reference:
        for parameter in problem.parameters:
            tau = reference.parameters.lengths(parameter)
            yield Check.of("lengths in time", parameter.name, relative(parameter.time_basis.measures, tau), 1e-12)
            for k, function in enumerate(parameter.functions):
                control, label, shape = controls[position], labels[position], parameter.space_bases[k].shape
                c, d = (random_like(function, rng, point.Y) for _ in range(2))
                functional = fd.Cofunction(function.function_space().dual())
                functional.dat.data_wo[...] = d.dat.data_ro
                values = [raw(x, point.Y, shape) for x in (control.riesz_map(functional), c, d)]

                def inner(
                    x: np.ndarray, y: np.ndarray, k: int = k, parameter: Parameter = parameter, tau: np.ndarray = tau
                ) -> float:
                    return tau[k] * reference.parameters.product(parameter, k, x, y)

                expected = point.pair([np.array(d.dat.data_ro)], [c])
                size = (
                    abs(expected)
                    + (point.pair([np.array(d.dat.data_ro)], [d]) * point.pair([np.array(c.dat.data_ro)], [c])) ** 0.5
                )
                yield Check.of("Riesz map", label, abs(inner(values[0], values[1]) - expected) / size, 1e-8)
                own = parameter.inner(k, values[1], values[2])
                size = (inner(values[1], values[1]) * inner(values[2], values[2])) ** 0.5
                yield Check.of("inner product", label, abs(own - inner(values[1], values[2])) / size, _ROUND_OFF)
                read, written = parameter.get(k), fd.Function(function.function_space())
                parameter.space_bases[k].write(written, read)
                changed = relative(raw(written, point.Y, shape), raw(function, point.Y, shape), point.comm)
                yield Check.of(
                    "read and write", label, changed + relative(read, raw(function, point.Y, shape), point.comm), 0.0
                )
                slope = inner(raw(with_riesz[position], point.Y, shape), values[1])
                expected = point.pair([point.gradient[position]], [c])
                size = (
                    abs(expected) + point.lengths([point.gradient[position]])[0] * point.lengths([np.array(c.dat.data_ro)])[0]
                )
                yield Check.of("gradient", label, abs(slope - expected) / max(size, 1e-300), max(1e-8, close(problem)))
                position += 1
