"""The learning problem (2.10), (2.11): network, output, loss, regulariser and data in one object.

    min  J = sum_s omega_s loss(h(O_s), C_s) + R(m),        m = (a, b, W, mu),   sum_s omega_s = 1            (2.11)

With a running cost L of section 4.3, J has the term sum_s omega_s int_0^T L(f_s, a, b) dt too.

With `Derivatives` of the target map, J has the term weight sum_s omega_s 1/2 |O'(f_I,s) v_s - C'_s|^2 too, O' v the derivative of
the output, before its prediction, in a direction v of the initial state.

What each part is says its module: `network`, `head`, `loss`, `regulariser`. What is minimised over may also be the
initial state f_I, alone (data assimilation: f_I from what is known of f(T)) or with m; its gradient is the co-state
r(0) of (4.2), and R takes it as one more parameter, with the sum over samples of int |f_I|^2 dy for its squared norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import firedrake as fd
import numpy as np
from firedrake.adjoint import EnsembleReducedFunctional
from mpi4py import MPI
from pyadjoint import AdjFloat, Control, ReducedFunctional, Tape, set_working_tape
from pyadjoint.block_variable import BlockVariable
from pyadjoint.tape import annotate_tape, continue_annotation, pause_annotation

from fem_resnet.arguments import choice, integer, number
from fem_resnet.basis import Basis
from fem_resnet.blocks import DERIVATIVE_FIRST, OperatorBlock, gauss_newton
from fem_resnet.checkpoints import Checkpoints, enable_checkpointing, manager_of, schedule_of
from fem_resnet.head import PREDICTIONS, Head
from fem_resnet.label_space import sample_weights
from fem_resnet.loss import Loss, least_squares
from fem_resnet.network import ResidualNetwork
from fem_resnet.run import Run
from fem_resnet.parameter import Parameter
from fem_resnet.regulariser import Regulariser
from fem_resnet.running_cost import RunningCost
from fem_resnet.space_basis import StateValues
from fem_resnet.time_basis import AtStart

__all__ = ["Batch", "Derivatives", "LearningProblem"]

_LEARN = ("parameters", "initial", "both")


@dataclass(frozen=True)
class Batch:
    """Samples to learn from.

    Parameters
    ----------
    inputs
        f_I, a batch on the network's label domain.
    targets
        Class labels, one integer a sample, for a head onto classes; else a batch C on the output's label domain.
    weights
        omega, one number >= 0 a sample, of which only the proportions matter; equal ones if left out.
    """

    inputs: fd.Function
    targets: Sequence[int] | fd.Function
    weights: Sequence[float] | None = None

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.inputs.function_space().value_size


@dataclass(frozen=True)
class Derivatives:
    """Directional derivatives of the target map, for derivative-informed training.

    Parameters
    ----------
    directions
        v, a batch on the network's label domain, as many samples as the batch has.
    targets
        C' = derivative of the target in v, a batch on the output's label domain.
    weight
        What the half squared difference counts, >= 0; no unit.
    """

    directions: fd.Function
    targets: fd.Function
    weight: float = 1.0


class LearningProblem:
    """The problem (2.10), (2.11): network, output, loss, regulariser, data; what every training algorithm takes.

    Everything is collective over the communicator of the network's label domain.

    Parameters
    ----------
    net
        The network.
    head
        Its output; None for O = f(T).
    loss
        For example `cross_entropy`, for a head with prediction "softmax".
    regulariser
        For example ``tikhonov(1e-4)``; None for none.
    batch
        The data; `exchange` puts another in its place.
    learn
        What is learned: "parameters", those of network and head; "initial", the initial state f_I, from the inputs of
        the batch on, which training overwrites; or "both". The regulariser takes what is learned.
    derivatives
        Directional derivatives that the output is to match too; J then has first derivatives only.
    running
        A running cost, integrated by the network's own TS.
    ensemble
        Of several members, each with the whole label domain on its own communicator and a batch of its own samples: J is
        that of all samples together, its gradient the same on every member. Then no Hessian actions.
    checkpoints
        How derivatives find the states at interfaces between Blocks of layers (``layers_per_block`` of the network):
        all are kept if left out. A number k: k of them are, the others are computed again. Or a schedule of the package
        `checkpoint_schedules`, or a function that makes one for a number of Blocks; on disk too. With it there are
        first derivatives only, and no states or co-states of the run. See `checkpoints.schedule_of`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit another; the message names it.

    Examples
    --------
    Which state becomes f(T) = 2, if f_t = 1 for 0 < t < 1?

    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, laplace_basis, least_squares, train
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(1), "CG", 1))
    >>> net = ResidualNetwork(laplace_basis(Y, 1), layers=1, activation="identity")
    >>> _ = net.bias.functions[0].assign(1.0)
    >>> batch = Batch(Y.batch(0 * Y.weights), Y.batch(2 + 0 * Y.weights))
    >>> _ = train(LearningProblem(net, None, least_squares, None, batch, learn="initial"))
    >>> round(float(batch.inputs.dat.data_ro.max()), 6)
    1.0
    """

    def __init__(
        self,
        net: ResidualNetwork,
        head: Head | None,
        loss: Loss,
        regulariser: Regulariser | None,
        batch: Batch,
        *,
        learn: str = "parameters",
        derivatives: Derivatives | None = None,
        running: RunningCost | None = None,
        ensemble: fd.Ensemble | None = None,
        checkpoints: Checkpoints | None = None,
    ):
        for name, value, kind, optional in (
            ("net", net, ResidualNetwork, False),
            ("head", head, Head, True),
            ("loss", loss, Loss, False),
            ("regulariser", regulariser, Regulariser, True),
            ("running", running, RunningCost, True),
            ("ensemble", ensemble, fd.Ensemble, True),
        ):
            if not (isinstance(value, kind) or optional and value is None):
                wanted = f"a {kind.__name__} or None" if optional else f"a {kind.__name__}"
                raise TypeError(f"{name}: {wanted} is wanted, {type(value).__name__} was given")
        if head is not None and head.psi.Y is not net.Y:
            raise ValueError(f"head: it reads {head.psi.Y!r}, the network's label space {net.Y!r} is wanted")
        self.net, self.head, self.loss, self.regulariser = net, head, loss, regulariser
        self._output = net.Y if head is None else head.Y
        self._prediction = PREDICTIONS[loss.prediction or "identity"] if head is None else head.prediction
        loss.check_prediction(self._prediction)
        self.learn = choice("learn", learn, _LEARN)
        self.checkpoints = checkpoints
        if checkpoints is not None:
            schedule_of(checkpoints, max(net.blocks, 1))  # refuse it now rather than at the first recording
        self.running, self.ensemble = running, ensemble
        self._recorded: tuple[BlockVariable, OperatorBlock, Run] | None = None
        self.batch, self._observation = batch, self._observed(batch)
        self.derivatives = derivatives
        self._check_derivatives()
        self._initial: list[Parameter] = []
        if learn != "parameters":
            states = StateValues(net.Y, batch.inputs.function_space())
            self._initial = [Parameter("initial", states, AtStart(), [batch.inputs])]

    def _observed(self, batch: Batch) -> fd.Function:
        """The observations of a batch, which is checked."""
        if not isinstance(batch, Batch):
            raise TypeError(f"batch: a Batch is wanted, {type(batch).__name__} was given")
        self.net.Y.check_batch(batch.inputs, "batch.inputs")
        targets = batch.targets
        if self.head is not None and not isinstance(targets, fd.Function):
            targets = self.head.observations(targets)
        self._output.check_batch(targets, "batch.targets")
        if targets.function_space().value_size != batch.samples:
            raise ValueError(
                f"batch.targets: {batch.samples} samples are wanted, as many as inputs, "
                f"{targets.function_space().value_size} were given"
            )
        sample_weights(batch.weights, batch.samples)
        return targets

    @property
    def parameters(self) -> list[Parameter]:
        """Those that are learned: of the network, of the head, then the initial state, called "initial"."""
        if self.learn == "initial":
            return self._initial
        return self.net.parameters + ([] if self.head is None else self.head.parameters) + self._initial

    @property
    def functions(self) -> list[fd.Function]:
        """Their coefficients, in the order of the controls."""
        return [function for parameter in self.parameters for function in parameter.functions]

    def evaluate(self) -> tuple[AdjFloat, Run]:
        """J at the current parameters, and the run behind it; recorded while annotating, but for the sum over an ensemble."""
        J, run, _ = self._evaluate(None if annotate_tape() else self._seen_by)  # a user's tape may go on from f(T)
        return J if self.ensemble is None else AdjFloat(self.ensemble.ensemble_comm.allreduce(float(J))), run

    @property
    def _seen_by(self) -> Basis | None:
        """The head's psi, where nothing but what it sees of f(T) is asked of the network, and that is what layers step."""
        if self.head is None or not (self.running is self.derivatives is self.checkpoints is None):
            return None
        return self.head.psi if self.net.steps_what_is_seen_by(self.head.psi) else None

    def _evaluate(self, seen_by: Basis | None) -> tuple[AdjFloat, Run, OperatorBlock | None]:
        run = self.net.run(self.batch.inputs, self.running, self.batch.weights, seen_by=seen_by)
        if run.coefficients is not None:
            output = self.head.of_coefficients(*run.coefficients)
        else:
            output = run.final if self.head is None else self.head(run.final)
        J, block = self.loss.record(self._output, output, self._observation, self.batch.weights, self._prediction)
        if self.running is not None:
            J = J + run.cost
        if self.derivatives is not None:
            J = J + self.derivatives.weight * self._mismatch_of_derivatives(run)
        if self.ensemble is not None:
            J = J * self._share
        if self.regulariser is not None:
            R = self.regulariser(self.penalised())
            J = J + (R if self.ensemble is None else R / self.ensemble.ensemble_comm.size)
        return J, run, block

    @property
    def _share(self) -> float:
        """The part of all weights that this member's samples have."""
        comm, weights = self.ensemble.ensemble_comm, self.batch.weights
        weights = np.ones(self.batch.samples) if weights is None else np.asarray(weights, dtype=float)
        own = float(np.sum(weights / comm.allreduce(weights.max(), op=MPI.MAX)))  # the sum of large ones may overflow
        return own / comm.allreduce(own)

    def penalised(self) -> list[Parameter]:
        """What the regulariser takes; recorded while annotating where a kernel is made of other controls."""
        return [parameter.acting() for parameter in self.parameters if parameter.penalised]

    def _check_derivatives(self) -> None:
        if self.derivatives is None:
            return
        if not isinstance(self.derivatives, Derivatives):
            raise TypeError(f"derivatives: Derivatives or None are wanted, {type(self.derivatives).__name__} was given")
        number("derivatives.weight", self.derivatives.weight, least=0)
        for name, Y, function in (
            ("directions", self.net.Y, self.derivatives.directions),
            ("targets", self._output, self.derivatives.targets),
        ):
            Y.check_batch(function, f"derivatives.{name}")
            if function.function_space().value_size != self.batch.samples:
                raise ValueError(
                    f"derivatives.{name}: {self.batch.samples} samples are wanted, as many as inputs, "
                    f"{function.function_space().value_size} were given"
                )

    def _mismatch_of_derivatives(self, run: Run) -> AdjFloat:
        derivative = run.tangent(self.derivatives.directions)
        if self.head is not None:
            derivative = self.head.linear(derivative)
        return least_squares(self._output, derivative, self.derivatives.targets, self.batch.weights)

    def controls(self) -> list[Control]:
        """One Control a set of coefficients, each with its Riesz map."""
        return [control for parameter in self.parameters for control in parameter.controls()]

    def record(
        self, *, gauss_newton: bool = False
    ) -> tuple[ReducedFunctional | EnsembleReducedFunctional, Run]:
        """J as a function of all that is learned, on a tape of its own, and the run recorded there.

        The working tape and whether annotation is on are left as they were.

        Parameters
        ----------
        gauss_newton
            Whether `hessian` of the functional is to be the action of Gauss and Newton, which is positive semidefinite
            for convex losses: see `blocks.gauss_newton`.

        Raises
        ------
        ValueError
            If Gauss-Newton is asked for with a running cost or an ensemble.
        """
        if gauss_newton and self.ensemble is not None:
            raise ValueError("gauss_newton: an ensemble has no Hessian actions; put all samples on one communicator")
        if gauss_newton and self.running is not None:
            raise ValueError("gauss_newton: a running cost has no residual whose curvature could be left out; take the Hessian")
        # Variables of its own too: what another recording does to the same Functions must not be seen here.
        for function in (self.batch.inputs, *self.functions):
            function.clear_block_variable()
        was_annotating = annotate_tape()
        with set_working_tape(Tape()) as tape:
            if self.checkpoints is not None:
                enable_checkpointing(tape, self.checkpoints, max(self.net.blocks, 1))
            continue_annotation()
            try:
                J, run, block = self._evaluate(self._seen_by)
            finally:
                if not was_annotating:
                    pause_annotation()
            self._recorded = self.batch.inputs.block_variable, block, run
            if self.ensemble is not None:
                return EnsembleReducedFunctional(J, self.controls(), self.ensemble, tape=tape), run
            functional = _GaussNewtonFunctional if gauss_newton else _Functional
            return functional(J, self.controls(), tape=tape), run

    def exchange(self, batch: Batch) -> None:
        """Put another batch of as many samples in the place of the present one, without recording again.

        The functional recorded last sees it at its next evaluation.

        Parameters
        ----------
        batch
            The batch, as in the constructor.

        Raises
        ------
        TypeError, ValueError
            If it does not fit, has another number of samples, or the inputs are learned.
        """
        if self._initial:
            raise ValueError(
                f"batch: with learn={self.learn!r} the inputs are learned, so no others can take their place; make a "
                f"LearningProblem for each batch"
            )
        if self.ensemble is not None:
            raise ValueError("batch: an ensemble's members would not know of it; make a LearningProblem for another")
        if self.derivatives is not None:
            raise ValueError("batch: the derivatives belong to the present batch; make a LearningProblem for another")
        observation = self._observed(batch)
        if batch.inputs.function_space() != self.batch.inputs.function_space():
            raise ValueError(
                f"batch: {self.batch.samples} samples are wanted, as many as before, {batch.samples} were given; "
                f"minibatches() pads the last"
            )
        self.batch, self._observation = batch, observation
        if self._recorded is not None:
            variable, block, run = self._recorded
            variable.checkpoint.dat.data_wo[...] = batch.inputs.dat.data_ro
            block.operator.observe(observation, batch.weights)
            if run.omega is not None:
                run.omega[...] = sample_weights(batch.weights, batch.samples)

    def minibatches(self, size: int, seed: int | None = None) -> list[Batch]:
        """The present batch in pieces of `size` samples, the last padded with samples of weight 0.

        Samples of weight 0 are in none of them, so that each has a J. With omega the weights of the batch, J of the batch is
        the mean of theirs with the sums of omega over their samples for weights.

        Parameters
        ----------
        size
            Number of samples in each, at least 1.
        seed
            Shuffles the samples first, the same way on every rank; left in order without one.

        Raises
        ------
        ValueError
            If `size` is no positive integer, or `seed` no integer >= 0.
        """
        size = integer("size", size)
        weights = sample_weights(self.batch.weights, self.batch.samples)
        order = np.arange(weights.size)
        if seed is not None:
            order = np.random.default_rng(integer("seed", seed, least=0)).permutation(weights.size)
        order = order[weights[order] > 0]
        inputs, observations = self.net.Y.values(self.batch.inputs), self._output.values(self._observation)
        batches = []
        for start in range(0, order.size, size):
            chosen = order[start : start + size]
            padded = np.concatenate([chosen, np.repeat(order[:1], size - len(chosen))])
            omega = np.where(np.arange(size) < len(chosen), weights[padded], 0.0)
            batches.append(
                Batch(self.net.Y.batch(inputs[:, padded]), self._output.batch(observations[:, padded]), omega)
            )
        return batches

    def reduced_functional(self, *, gauss_newton: bool = False) -> ReducedFunctional:
        """J as a function of all that is learned: for `taylor_test`, TAO, SciPy. See `record`."""
        return self.record(gauss_newton=gauss_newton)[0]


class _Functional(ReducedFunctional):
    def hessian(self, m_dot, **options):
        # Blocks say so too, but the last on the tape, which adds up J, is pyadjoint's.
        if manager_of(self.tape) is None and self.functional.block_variable.adj_value is None:
            raise RuntimeError(f"hessian: {DERIVATIVE_FIRST}")
        return super().hessian(m_dot, **options)


class _GaussNewtonFunctional(_Functional):
    def hessian(self, m_dot, **options):
        with gauss_newton(self.tape):
            return super().hessian(m_dot, **options)
