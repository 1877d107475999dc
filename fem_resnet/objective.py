"""The learning problem (2.10), (2.11): output, prediction, loss and regulariser of a network.

    O(y) = int W(y, z) f(z, T) dz + mu(y)                                            (2.9)
    min  J = 1/S sum_s loss(O_s, C_s) + lambda R(m),        m = (a, b, W, mu)        (2.11)

with the losses, for one sample with observation C,

    least squares    1/2 int |O(y) - C(y)|^2 dy                                      (2.4)
    cross entropy    - int C(y) log p(y) dy,     p = e^O / int e^O

(over K classes, cells of length one, these integrals are sums over the classes and p is the softmax), and Tikhonov's

    R = 1/2 ( int |a|^2 dy dt + int |b|^2 dy dz dt + int |W|^2 dy dz + int |mu|^2 dy ),

with the factor 1/2, so that (4.7) holds to the letter: the gradient of lambda R in a is lambda a.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import firedrake as fd
import numpy as np
from mpi4py import MPI
from pyadjoint import AdjFloat, Control, ReducedFunctional, Tape, set_working_tape
from pyadjoint.tape import annotate_tape, continue_annotation, pause_annotation

from fem_resnet.basis import Basis, cell_indicators
from fem_resnet.blocks import apply
from fem_resnet.kernel import LowRankKernel
from fem_resnet.label_space import BatchValues, LabelSpace, class_space
from fem_resnet.network import ResidualNetwork, Run
from fem_resnet.parameter import BasisCoefficients, KernelCoefficients, Once, Parameter

__all__ = ["Batch", "Head", "LearningProblem", "Loss", "Tikhonov", "cross_entropy", "least_squares", "tikhonov"]


class Head:
    """The output (2.9): `O = X (W g + mu)`, g = Psi^T M f(T), X a basis of the output's label domain.

    Parameters
    ----------
    psi
        Basis in which the final state is seen.
    classes
        K: the output has one number a class.

    Attributes
    ----------
    Y : LabelSpace
        Label domain of the output: K cells of length one.
    W, mu : Parameter
        Coefficients of shape (K, rank of psi) and (K,), zero at first.

    Raises
    ------
    TypeError, ValueError
        If `psi` is no Basis or `classes` no positive integer.
    """

    def __init__(self, psi: Basis, classes: int):
        if not isinstance(psi, Basis):
            raise TypeError(f"psi: a Basis is wanted, {type(psi).__name__} was given")
        self.psi = psi
        self.Y = class_space(classes, psi.Y.comm)
        self.classes = int(classes)
        self._onto = cell_indicators(self.Y)
        self.W = Parameter("W", KernelCoefficients(LowRankKernel(self._onto, psi)), Once())
        self.mu = Parameter("mu", BasisCoefficients(self._onto), Once())

    def __repr__(self) -> str:
        return f"Head({self.classes} classes, from {self.psi!r})"

    @property
    def parameters(self) -> list[Parameter]:
        """W and mu."""
        return [self.W, self.mu]

    def __call__(self, f: fd.Function) -> fd.Function:
        """O, a batch on the head's own label domain, for a final state or batch of them; recorded while annotating.

        Collective.
        """
        self.psi.Y.check_batch(f, "f")
        return apply(_HeadOperator(self, f.function_space()), [f, self.W.functions[0], self.mu.functions[0]])[0]

    def scores(self, f: fd.Function) -> np.ndarray:
        """O by class, shape (samples, K), on every rank. Collective; nothing is recorded."""
        self.psi.Y.check_batch(f, "f")
        g = self.psi.project(self.psi.Y.values(f))
        return (self.W.get(0) @ g + self.mu.get(0)[:, None]).T

    def observations(self, labels: Sequence[int]) -> fd.Function:
        """C for class labels: the batch of indicators of the classes.

        Parameters
        ----------
        labels
            Integers from 0 to K - 1, one a sample, the same on every rank.

        Raises
        ------
        ValueError
            If there is none, or one is no class.
        """
        labels = np.asarray(labels)
        if labels.ndim != 1 or labels.size == 0 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"labels: a non-empty list of integers is wanted, {labels.dtype} of shape {labels.shape} was given"
            )
        if labels.min() < 0 or labels.max() >= self.classes:
            bad = int(np.flatnonzero((labels < 0) | (labels >= self.classes))[0])
            raise ValueError(f"labels: classes 0 to {self.classes - 1} are wanted, sample {bad} has {labels[bad]}")
        return self.Y.batch(self._onto.values[:, labels], "observations")


class _HeadOperator:
    ready = True

    def __init__(self, head: Head, space):
        self._kernel = head.W.space_basis.kernel
        values = BatchValues(head.psi.Y, space)
        self.inputs = [values, head.W.space_basis, head.mu.space_basis]
        self.output = BatchValues(head.Y, head.Y.batch_space(values.samples))

    def forward(self, arrays, save):
        f, W, mu = arrays
        return self._kernel.apply(W, f) + (self._kernel.phi.values @ mu)[:, None]

    def adjoint(self, arrays, dual):
        f, W, _ = arrays
        by_class = self._kernel.phi.Y.sum(self._kernel.phi.values.T @ dual)
        return [
            self._kernel.psi.weighted @ (W.T @ by_class),
            by_class @ self._kernel.psi.project(f).T,
            by_class.sum(axis=1),
        ]


@dataclass(frozen=True)
class Loss:
    """A loss of one output against one observation.

    Attributes
    ----------
    name : str
    value : callable
        ``value(Y, O, C)``: this rank's part of the sum over nodes and samples; O and C of shape (nodes, samples).
    gradient : callable
        ``gradient(Y, O, C)``: its derivative in O, dual to the node values. Both collective.
    """

    name: str
    value: Callable[[LabelSpace, np.ndarray, np.ndarray], float]
    gradient: Callable[[LabelSpace, np.ndarray, np.ndarray], np.ndarray]

    def __call__(self, Y: LabelSpace, output: fd.Function, observation: fd.Function) -> AdjFloat:
        """Mean over the samples, recorded while annotating. Collective.

        Parameters
        ----------
        Y
            Label domain of both.
        output, observation
            Batches of equal numbers of samples.
        """
        return apply(_LossOperator(self, Y, output.function_space(), observation), [output])[0]


class _LossOperator:
    ready = True
    output = None

    def __init__(self, loss: Loss, Y: LabelSpace, space, observation: fd.Function):
        values = BatchValues(Y, space)
        self._loss, self._Y, self._samples = loss, Y, values.samples
        self._observation = Y.values(observation).copy()
        self.inputs = [values]

    def forward(self, arrays, save):
        return float(self._Y.sum(self._loss.value(self._Y, arrays[0], self._observation))) / self._samples

    def adjoint(self, arrays, dual):
        return [(dual / self._samples) * self._loss.gradient(self._Y, arrays[0], self._observation)]


def _half_square(Y, O, C):
    return 0.5 * np.einsum("i,is,is->", Y.weights, O - C, O - C)


def _half_square_gradient(Y, O, C):
    return Y.weights[:, None] * (O - C)


def _log_density(Y, O):
    """log p, p = e^O / int e^O, free of overflow."""
    largest = O.max(axis=0, initial=-np.inf)
    Y.comm.Allreduce(MPI.IN_PLACE, largest, op=MPI.MAX)
    shifted = O - largest
    return shifted - np.log(Y.sum(Y.weights @ np.exp(shifted)))


def _cross_entropy(Y, O, C):
    return -np.einsum("i,is,is->", Y.weights, C, _log_density(Y, O))


def _cross_entropy_gradient(Y, O, C):
    return Y.weights[:, None] * (np.exp(_log_density(Y, O)) * Y.sum(Y.weights @ C) - C)


#: 1/2 int |O - C|^2 dy, the formula of 2.4.
least_squares = Loss("least_squares", _half_square, _half_square_gradient)
#: - int C log p dy, p the softmax of O; stable for large O.
cross_entropy = Loss("cross_entropy", _cross_entropy, _cross_entropy_gradient)


@dataclass(frozen=True)
class Tikhonov:
    """lambda R, see the module. Get one from `tikhonov`."""

    weight: float

    def __call__(self, parameters: Sequence[Parameter]) -> AdjFloat:
        """`lambda R` of these parameters, recorded while annotating. Collective."""
        functions = [function for parameter in parameters for function in parameter.functions]
        return apply(_TikhonovOperator(self.weight, parameters), functions)[0]


class _TikhonovOperator:
    ready = True
    output = None

    def __init__(self, weight: float, parameters: Sequence[Parameter]):
        self._weight = weight
        self._terms = [(parameter, k) for parameter in parameters for k in range(len(parameter.functions))]
        self.inputs = [parameter.space_basis for parameter, _ in self._terms]

    def forward(self, arrays, save):
        return 0.5 * self._weight * sum(p.inner(k, c, c) for (p, k), c in zip(self._terms, arrays))

    def adjoint(self, arrays, dual):
        return [
            dual * self._weight * p.time_basis.measures[k] * p.space_basis.dual(c)
            for (p, k), c in zip(self._terms, arrays)
        ]


def tikhonov(weight: float) -> Tikhonov:
    """Tikhonov regularisation (2.11), (4.6) of all parameters, in the label measure, with the factor 1/2.

    Parameters
    ----------
    weight
        lambda >= 0.
    """
    if not (isinstance(weight, Real) and np.isfinite(weight) and weight >= 0):
        raise ValueError(f"weight: a number >= 0 is wanted, {weight!r} was given")
    return Tikhonov(float(weight))


@dataclass(frozen=True)
class Batch:
    """Samples to learn from.

    Parameters
    ----------
    inputs
        f_I, a batch on the network's label domain.
    targets
        Class labels, one integer a sample, for a network with a head; else a batch C on the output's label domain.
    """

    inputs: fd.Function
    targets: Sequence[int] | fd.Function

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.inputs.function_space().value_size


class LearningProblem:
    """Network, output, loss, regulariser and data: what every training algorithm takes.

    Everything is collective over the communicator of the network's label domain.

    Parameters
    ----------
    net
        The network.
    head
        Its output; None for O = f(T).
    loss
        `least_squares` or `cross_entropy`.
    regulariser
        For example ``tikhonov(1e-4)``; None for none.
    batch
        The data.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit another; the message names it.
    """

    def __init__(
        self, net: ResidualNetwork, head: Head | None, loss: Loss, regulariser: Tikhonov | None, batch: Batch
    ):
        for name, value, kind, optional in (
            ("net", net, ResidualNetwork, False),
            ("head", head, Head, True),
            ("loss", loss, Loss, False),
            ("regulariser", regulariser, Tikhonov, True),
            ("batch", batch, Batch, False),
        ):
            if not (isinstance(value, kind) or optional and value is None):
                wanted = f"a {kind.__name__} or None" if optional else f"a {kind.__name__}"
                raise TypeError(f"{name}: {wanted} is wanted, {type(value).__name__} was given")
        if head is not None and head.psi.Y is not net.Y:
            raise ValueError(f"head: it reads {head.psi.Y!r}, the network's label space {net.Y!r} is wanted")
        self.net, self.head, self.loss, self.regulariser, self.batch = net, head, loss, regulariser, batch
        net.Y.check_batch(batch.inputs, "batch.inputs")
        targets = batch.targets
        if head is not None and not isinstance(targets, fd.Function):
            targets = head.observations(targets)
        output = net.Y if head is None else head.Y
        output.check_batch(targets, "batch.targets")
        if targets.function_space().value_size != batch.samples:
            raise ValueError(
                f"batch.targets: {batch.samples} samples are wanted, as many as inputs, "
                f"{targets.function_space().value_size} were given"
            )
        self._output, self._observation = output, targets

    @property
    def parameters(self) -> list[Parameter]:
        """Those of the network, then those of the head."""
        return self.net.parameters + ([] if self.head is None else self.head.parameters)

    @property
    def functions(self) -> list[fd.Function]:
        """Their coefficients, in the order of the controls."""
        return [function for parameter in self.parameters for function in parameter.functions]

    def evaluate(self) -> tuple[AdjFloat, Run]:
        """J at the current parameters, and the run behind it; recorded while annotating."""
        run = self.net.run(self.batch.inputs)
        output = run.final if self.head is None else self.head(run.final)
        J = self.loss(self._output, output, self._observation)
        if self.regulariser is not None:
            J = J + self.regulariser(self.parameters)
        return J, run

    def controls(self) -> list[Control]:
        """One Control a set of coefficients, each with its Riesz map."""
        return [control for parameter in self.parameters for control in parameter.controls()]

    def record(self) -> tuple[ReducedFunctional, Run]:
        """J as a function of all parameters, on a tape of its own, and the run recorded there.

        The working tape and whether annotation is on are left as they were.
        """
        was_annotating = annotate_tape()
        with set_working_tape(Tape()) as tape:
            continue_annotation()
            try:
                J, run = self.evaluate()
            finally:
                if not was_annotating:
                    pause_annotation()
            return ReducedFunctional(J, self.controls(), tape=tape), run

    def reduced_functional(self) -> ReducedFunctional:
        """J as a function of all parameters: for `taylor_test`, TAO, SciPy. See `record`."""
        return self.record()[0]
