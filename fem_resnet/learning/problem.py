"""The learning problem (2.10), (2.11): network, output, loss, regulariser and data in one object.

    min  J = sum_s omega_s loss(h(O_s), C_s) + R(m),        m = (a, b, W, mu),   sum_s omega_s = 1            (2.11)

Three things add a term to J:

- a running cost L of section 4.3:                 sum_s omega_s int_0^T L(f_s, a, b) dt,
- `Observations` at layer times before T:          sum_l weight_l sum_s omega_s loss(h(O_s(t_l)), C_sl),
- `Derivatives` of the target map in directions v: weight sum_s omega_s 1/2 |O'(f_I,s) v_s - C'_s|^2.

O(t_l) is the output that the head reads from f(t_l). O' v is the derivative of the output, before its prediction, in a
direction v of the initial state.

J may also be minimised over the initial state f_I, alone (data assimilation: f_I from what is known of f(T)) or with m. Its
gradient is the co-state r(0) of (4.2). R takes f_I as one more parameter, whose squared norm is the sum over the samples of
int |f_I|^2 dy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import signature
from types import NoneType

import firedrake as fd
import numpy as np
from firedrake.adjoint import EnsembleReducedFunctional
from mpi4py import MPI
from pyadjoint import AdjFloat, Control, ReducedFunctional, Tape, set_working_tape
from pyadjoint.block_variable import BlockVariable
from pyadjoint.tape import annotate_tape, continue_annotation, pause_annotation, stop_annotating

from fem_resnet.arguments import choice, flag, instance, integer
from fem_resnet.features import HELD, REGULARISED, STEPPED, supports
from fem_resnet.fixed import OnMesh
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.learning.batch import Batch, Derivatives, Observations
from fem_resnet.learning.elimination import HeadSolve, Reading, ReducedToOthers, SolvedHead
from fem_resnet.learning.head import Head
from fem_resnet.learning.lift import Lift
from fem_resnet.learning.loss import Loss, LossOperator, least_squares
from fem_resnet.learning.prediction import PREDICTIONS
from fem_resnet.learning.regulariser import Regulariser
from fem_resnet.learning.samples import Samples
from fem_resnet.learning.solved_head import check_eliminable, solve_head
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.network.run import Run
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import StateValues
from fem_resnet.parameters.time_basis import AtStart
from fem_resnet.ranks import same, together, watched
from fem_resnet.tape.checkpoints import Checkpoints, enable_checkpointing, manager_of, schedule_of
from fem_resnet.tape.operator_block import DERIVATIVE_FIRST, OperatorBlock
from fem_resnet.tape.recording import gauss_newton

__all__ = ["LearningProblem"]

_LEARN = ("parameters", "initial", "both")


class LearningProblem(OnMesh):
    """The problem (2.10), (2.11): network, output, loss, regulariser, data; what every training algorithm takes.

    Everything is collective over the communicator of the network's label domain. A problem stays what it was made with;
    `replace` makes another.

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
    running
        A running cost, integrated by the network's own TS.
    ensemble
        Of several members, each with the whole label domain on its own communicator and a batch of its own samples: J is
        that of all samples together, its gradient the same on every member. Then no Hessian actions.
    lift
        What makes the initial state of the inputs of the batch, which then are fields on `Lift.fields`; it is learned. None
        where the inputs are the initial state. It does not go together with `learn` or `checkpoints`.
    checkpoints
        How derivatives find the states at interfaces between Blocks of layers (``per_block`` of the network's `Layers`):
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

    _instead = "replace(..) gives another problem; `exchange` puts another batch in the place of the present one"

    def __init__(
        self,
        net: ResidualNetwork,
        head: Head | None,
        loss: Loss,
        regulariser: Regulariser | None,
        batch: Batch = None,  # no batch is an error below, so that a forgotten head, which moves the others up, has one too
        *,
        learn: str = "parameters",
        running: RunningCost | None = None,
        ensemble: fd.Ensemble | None = None,
        checkpoints: Checkpoints | None = None,
        lift: Lift | None = None,
    ):
        comm = instance("net", net, ResidualNetwork).Y.comm
        same(
            comm, head=head, loss=loss, regulariser=regulariser, batch=batch, learn=learn, running=running, ensemble=ensemble,
            checkpoints=checkpoints, lift=lift,
        )  # fmt: skip
        given: object = head
        if isinstance(given, Loss):  # LearningProblem(net, loss, ..)
            raise TypeError(
                f"head: expected a Head or None, got the loss {given.name}; was the head forgotten? "
                "LearningProblem(net, head, loss, regulariser, batch), with head=None where f(T) itself is the output"
            )
        for name, value, kind in (
            ("head", head, (Head, NoneType)),
            ("loss", loss, Loss),
            ("regulariser", regulariser, (Regulariser, NoneType)),
            ("batch", batch, Batch),
            ("running", running, (RunningCost, NoneType)),
            ("ensemble", ensemble, (fd.Ensemble, NoneType)),
            ("lift", lift, (Lift, NoneType)),
        ):
            instance(name, value, kind)
        if head is not None and head.psi.Y is not net.Y:
            raise ValueError(
                f"head: expected one that reads the network's label space {net.Y!r}, got one that reads {head.psi.Y!r}"
            )
        self.net, self.head, self.loss, self.regulariser, self.lift = net, head, loss, regulariser, lift
        self._output = net.Y if head is None else head.Y
        self._prediction = PREDICTIONS[loss.prediction or "identity"] if head is None else head.prediction
        if head is None and not isinstance(batch.targets, fd.Function):
            raise ValueError(
                "head: expected a Head onto classes, as the batch has class labels, got None; give Head(psi, onto=..)"
            )
        loss.check_prediction(self._prediction)
        self.learn = choice("learn", learn, _LEARN)
        self.checkpoints = checkpoints
        if lift is not None:
            self._check_lift(lift)
        if checkpoints is not None:
            # Refuse it now rather than at the first recording.
            together(comm, lambda: schedule_of(checkpoints, max(net.blocks, 1)))
        self.running, self.ensemble = running, ensemble
        self._recorded: tuple[BlockVariable, OperatorBlock, Run, HeadSolve | None] | None = None
        if checkpoints is not None and batch.observations is not None:
            raise ValueError(
                "observations: a schedule of checkpoints keeps no states inside of the network; make the problem without one"
            )
        self._samples = Samples(batch, net, head, lift)
        self._initial: list[Parameter] = []
        if learn != "parameters":
            states = StateValues(net.Y, batch.inputs.function_space())
            self._initial = [Parameter("initial", states, AtStart(), [batch.inputs])]

    def _check_lift(self, lift: Lift) -> None:
        if lift.Y is not self.net.Y:
            raise ValueError(f"lift: expected one into the network's label space {self.net.Y!r}, got one into {lift.Y!r}")
        for name, other, without in (("learn", self.learn, "parameters"), ("checkpoints", self.checkpoints, None)):
            if other != without:
                raise ValueError(f"{name}: expected {without!r} with a lift, got {other!r}; make the problem without a lift")

    @property
    def comm(self) -> MPI.Comm:
        """The communicator of all ranks that take part: those of all members of an ensemble."""
        return self.net.Y.comm if self.ensemble is None else watched(self.ensemble.global_comm)

    @property
    def batch(self) -> Batch:
        """The data; `exchange` puts others in their place."""
        return self._samples.batch

    @property
    def observations(self) -> Observations | None:
        """What is observed before T."""
        return self.batch.observations

    @property
    def derivatives(self) -> Derivatives | None:
        """Directional derivatives that the output is to match."""
        return self.batch.derivatives

    def replace(self, **changes) -> LearningProblem:
        """The problem with some arguments of the constructor changed, and all others the very same objects.

        Parameters
        ----------
        **changes
            Arguments of the constructor.

        Raises
        ------
        TypeError, ValueError
            As the constructor.

        Examples
        --------
        >>> test_error = float(problem.replace(batch=test, regulariser=None).evaluate()[0])  # doctest: +SKIP
        """
        given = {name: getattr(self, name) for name in signature(type(self)).parameters}
        same(self.net.Y.comm, replace=sorted(changes))
        unknown = sorted(set(changes) - set(given))
        if unknown:
            raise TypeError(f"replace: expected some of {', '.join(given)}, got {', '.join(unknown)}")
        return type(self)(**given | changes)

    def __repr__(self) -> str:
        loss = self.loss.name if self.regulariser is None else f"{self.loss.name} with a regulariser"
        learned = ", ".join(parameter.name for parameter in self.parameters)
        head = "" if self.head is None else f"{self.head.prediction.name} of {self.head.onto!r}, "
        return f"LearningProblem({loss}, {self.batch.samples} samples, {self.net!r}, {head}learns {learned})"

    def __deepcopy__(self, memo: Mapping):
        raise TypeError("deepcopy: replace(net=.., head=..) with deep copies of these makes another problem of the same data")

    @property
    def parameters(self) -> list[Parameter]:
        """Those that are learned: of the network, the lift and the head, then the initial state, called "initial"."""
        if self.learn == "initial":
            return self._initial
        parts = [self.net, *(part for part in (self.lift, self.head) if part is not None)]
        return [parameter for part in parts for parameter in part.parameters] + self._initial

    @property
    def functions(self) -> list[fd.Function]:
        """Their coefficients, in the order of the controls."""
        return [function for parameter in self.parameters for function in parameter.functions]

    def evaluate(self) -> tuple[AdjFloat, Run]:
        """J at the current parameters, and the run behind it; recorded while annotating, but for the sum over an ensemble."""
        J, run, *_ = self._evaluate(None if annotate_tape() else self._seen_by)  # a user's tape may go on from f(T)
        return J if self.ensemble is None else AdjFloat(watched(self.ensemble.ensemble_comm).allreduce(float(J))), run

    def initial_state(self, inputs: fd.Function | None = None) -> fd.Function:
        """f_I: the inputs of the batch, or what the lift makes of them; recorded while annotating. Collective.

        Parameters
        ----------
        inputs
            Other inputs in their place, on the same label domain.
        """
        inputs = self.batch.inputs if inputs is None else inputs
        return inputs if self.lift is None else self.lift.of_fields(inputs)

    @property
    def _seen_by(self) -> Basis | None:
        """The head's psi, where nothing but what it sees of f(T) is asked of the network, and that is what layers step."""
        if self.head is None or not (self.running is self.derivatives is self.checkpoints is None):
            return None
        return self.head.psi if self.net.steps_what_is_seen_by(self.head.psi) else None

    def _evaluate(
        self, seen_by: Basis | None, eliminate: str | None = None
    ) -> tuple[AdjFloat, Run, OperatorBlock | None, SolvedHead | None]:
        weights = self.batch.weights
        layers = [layer for layer, *_ in self._samples.before]
        run = self.net.solve(self.initial_state(), self.running, weights, seen_by=seen_by, observed=layers)
        solved = (
            None if eliminate is None else solve_head(self.head, self.loss, self._readings(run), weights, self.regulariser)
        )
        outputs = iter(self._outputs(run) if solved is None else solved.outputs)
        J, block = self.loss.record(self._output, next(outputs), self._samples.at_end, weights, self._prediction)
        for _, targets, weight in self._samples.before:
            J = J + weight * self.loss.record(self._output, next(outputs), targets, weights, self._prediction)[0]
        if self.running is not None:
            J = J + run.cost
        if self.derivatives is not None:
            J = J + self.derivatives.weight * self._mismatch_of_derivatives(next(outputs))
        if self.ensemble is not None:
            J = J * self._share
        if self.regulariser is not None:
            R = self.regulariser(self._penalised({} if solved is None else solved.parameters))
            J = J + (R if self.ensemble is None else R / self.ensemble.ensemble_comm.size)
        return J, run, block, solved

    def _outputs(self, run: Run) -> Iterator[fd.Function]:
        """The outputs at T and where else they are observed, and their derivatives; each recorded when it is asked for."""
        for layer in (self.net.layers, *(layer for layer, *_ in self._samples.before)):
            yield self._output_at(run, layer)
        if self.derivatives is not None:
            derivative = run.tangent(self.initial_state(self.derivatives.directions))
            yield derivative if self.head is None else self.head.linear(derivative)

    def _readings(self, run: Run) -> list[Reading]:
        """What the head reads for the same outputs, in the same order."""
        observed = [(self.net.layers, self._samples.at_end, 1.0), *self._samples.before]
        readings = [Reading(*run.held(layer), targets, weight, True) for layer, targets, weight in observed]
        if self.derivatives is not None:
            state, targets = run.tangent(self.initial_state(self.derivatives.directions)), self.derivatives.targets
            readings.append(Reading(state, None, targets, self.derivatives.weight, False))
        return readings

    def _output_at(self, run: Run, layer: int) -> fd.Function:
        state, slot = run.held(layer)
        if slot is not None:
            return self.head.of_coefficients(state, slot)
        return state if self.head is None else self.head.of_state(state)

    def loss_of_zero(self) -> float:
        """The loss of the output 0, beside which others are small or not. Collective."""
        zero = self._output.batch(np.zeros((self._output.nodes, self.batch.samples)))
        with stop_annotating():
            return float(self.loss(self._output, zero, self._samples.at_end, self.batch.weights, self._prediction))

    @property
    def _share(self) -> float:
        """The part of all weights that this member's samples have."""
        comm, given = watched(self.ensemble.ensemble_comm), self.batch.weights
        weights = np.ones(self.batch.samples) if given is None else np.asarray(given, dtype=float)
        own = float(np.sum(weights / comm.allreduce(weights.max(), op=MPI.MAX)))  # the sum of large ones may overflow
        return own / comm.allreduce(own)

    def penalised(self) -> list[Parameter]:
        """What the regulariser takes; recorded while annotating where a kernel is made of other controls."""
        return self._penalised({})

    def _penalised(self, solved: Mapping[Parameter, Parameter]) -> list[Parameter]:
        """The same, with what was solved for in the place of W and mu."""
        return [solved.get(parameter, parameter).acting() for parameter in self.parameters if parameter.penalised]

    def _mismatch_of_derivatives(self, derivative: fd.Function) -> AdjFloat:
        return least_squares.record(self._output, derivative, self.derivatives.targets, self.batch.weights)[0]

    def controls(self) -> list[Control]:
        """One Control a set of coefficients, each with its Riesz map."""
        return [control for parameter in self.parameters for control in parameter.controls()]

    @supports(
        "channels",
        "no_layers", "gradient_flow", *HELD, *STEPPED, "head", "regulariser", "regulariser_not_quadratic", "observed_times",
        "learned_initial", "learned_both", "lift", "many_samples", "weights", tool="Gauss-Newton",
        when=lambda self, *, gauss_newton=False, **_: isinstance(gauss_newton, (bool, np.bool_)) and bool(gauss_newton),
    )  # fmt: skip
    @supports(
        "channels", "gradient_flow", *HELD, *STEPPED, "head", "regulariser", "running", "running_of_controls",
        "running_of_pairs", "derivatives",
        "observed_times", "checkpoints", "learned_both", "lift", "many_samples", "weights", tool="eliminate",
        when=lambda self, *, eliminate=None, **_: eliminate is not None,
    )  # fmt: skip
    def record(
        self, *, gauss_newton: bool = False, eliminate: str | None = None
    ) -> tuple[ReducedFunctional | EnsembleReducedFunctional, Run]:
        """J as a function of all that is learned, on a tape of its own, and the run recorded there.

        The working tape and whether annotation is on are left as they were.

        Parameters
        ----------
        gauss_newton
            Whether `hessian` of the functional is to be the action of Gauss and Newton, which is positive semidefinite
            for convex losses: see `recording.gauss_newton`.
        eliminate
            "head": J is a function of all that is learned but W and mu, which take the values of least J in every
            evaluation (`elimination`). For the loss `least_squares` and a head with prediction "identity", and for cross
            entropies with Tikhonov's term in W (`convex_head`). J then has first derivatives only. The head itself keeps its
            W and mu until `give_head` of the functional.

        Raises
        ------
        ValueError
            If Gauss-Newton is asked for with a running cost, which has no residual whose curvature could be left out, or
            where J has first derivatives only: with an ensemble, `Derivatives` or checkpoints; or if ranks ask for different
            things. If `eliminate` is not "head", is asked for with `gauss_newton`, with another loss or prediction, or with a
            regulariser that is not Tikhonov's on W and mu.
        """
        same(self.net.Y.comm, gauss_newton=gauss_newton, eliminate=eliminate)
        flag("gauss_newton", gauss_newton)
        if eliminate is not None:
            choice("eliminate", eliminate, ["head"])
            check_eliminable(self.head, self.loss)
            if gauss_newton:
                raise ValueError(
                    "gauss_newton: J with eliminate='head' has first derivatives only; leave gauss_newton or eliminate out"
                )
        # Variables of its own too: what another recording does to the same Functions must not be seen here.
        for function in (self.batch.inputs, *self.functions):
            function.clear_block_variable()
        was_annotating = annotate_tape()
        with set_working_tape(Tape()) as tape:
            if self.checkpoints is not None:
                steps = max(self.net.blocks, 1)
                together(self.net.Y.comm, lambda: enable_checkpointing(tape, self.checkpoints, steps))
            continue_annotation()
            try:
                J, run, block, solved = self._evaluate(self._seen_by, eliminate)
            finally:
                if not was_annotating:
                    pause_annotation()
            self._recorded = self.batch.inputs.block_variable, block, run, None if solved is None else solved.operator
            if solved is not None:
                others = [parameter for parameter in self.parameters if parameter not in self.head.parameters]
                return ReducedToOthers(J, others, self.head, solved.operator, tape), run
            if self.ensemble is not None:
                return EnsembleReducedFunctional(J, self.controls(), self.ensemble, tape=tape), run
            functional = _GaussNewtonFunctional if gauss_newton else _Functional
            return functional(J, self.controls(), tape=tape), run

    @supports(
        "channels", "no_layers", "gradient_flow", *HELD, *STEPPED, "head", *REGULARISED, "running", "running_of_controls",
        "running_of_pairs",
        "checkpoints", "lift", "many_samples", "weights", instead="make another problem: replace(batch=..)",
    )  # fmt: skip
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
            If it does not fit, has another number of samples, or observations or derivatives; or if the inputs are learned, or
            the problem has observations, derivatives, or an ensemble, whose other members would not know.
        """
        same(self.net.Y.comm, batch=batch)
        instance("batch", batch, Batch)
        samples = Samples(batch, self.net, self.head, self.lift)
        if batch.observations is not None or batch.derivatives is not None:
            raise ValueError(
                "batch: expected one without observations and derivatives, which are recorded; make another problem: "
                "replace(batch=..)"
            )
        if batch.samples != self.batch.samples:
            raise ValueError(
                f"batch: expected {self.batch.samples} samples, as many as before, got {batch.samples}; "
                f"minibatches() pads the last"
            )
        self._samples = samples
        if self._recorded is not None:
            variable, block, run, solver = self._recorded
            recorded = variable.checkpoint.dat.data_wo
            recorded[...] = batch.inputs.dat.data_ro.reshape(recorded.shape)  # one sample may be a number or a vector of one
            assert isinstance(block.operator, LossOperator)
            block.operator.observe(samples.at_end, batch.weights)
            if solver is not None:
                solver.observe([samples.at_end], batch.weights)
            if run.omega is not None:
                run.exchange_weights(sample_weights(batch.weights, batch.samples))

    def minibatches(self, size: int, seed: int | None = None) -> list[Batch]:
        """The present batch in pieces of `size` samples, the last padded with samples of weight 0.

        Samples of weight 0 are in none of them, so that each has a J. With omega the weights of the batch, J of the batch is
        the mean of theirs with the sums of omega over their samples for weights. Observations and derivatives go with their
        samples.

        Parameters
        ----------
        size
            Number of samples in each, at least 1.
        seed
            Shuffles the samples first, the same way on every rank; left in order without one.

        Raises
        ------
        ValueError
            If `size` is no positive integer, or `seed` no integer >= 0; or they differ between ranks.
        """
        same(self.net.Y.comm, size=size, seed=seed)
        seed = None if seed is None else integer("seed", seed, least=0, most=np.inf)
        return self._samples.minibatches(integer("size", size), seed)

    def folds(self, count: int, seed: int | None = None) -> list[tuple[Batch, Batch]]:
        """The present batch without one of its parts, and that part, for each of `count` parts: for cross-validation.

        Parts are as large as each other up to one sample. Samples of weight 0 are in none of them. Observations and
        derivatives go with their samples. ``replace(batch=..)`` makes the problem of a batch.

        Parameters
        ----------
        count
            Number of parts, from 2 to the number of samples.
        seed
            Shuffles the samples first, the same way on every rank; left in order without one.

        Returns
        -------
        list of (Batch, Batch)
            Shape (count,): all other samples, and those of the part.

        Raises
        ------
        ValueError
            If `count` is no such integer, or `seed` no integer >= 0; or they differ between ranks.
        """
        same(self.net.Y.comm, count=count, seed=seed)
        seed = None if seed is None else integer("seed", seed, least=0, most=np.inf)
        return self._samples.folds(integer("count", count, least=2), seed)

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
