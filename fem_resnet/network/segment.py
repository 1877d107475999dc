"""Segments: consecutive layers as one operator on the tape (see `tape.operator.Operator`).

Forward, f at the end follows from f at the start and the stages of all layers in one pass (3.3).

Backward, the functional of f at an interface is kept in two parts, by_f + M Psi by_g: by_g is the functional of g = Psi^T M f,
the coefficients that the layers step. Layers with the same psi hand on by_g alone. So inside a segment nothing of size
nodes x samples is touched but what the stages read, and states and co-states at inner interfaces are rebuilt on request.

With a running cost the layers carry f and c (`running_cost`), in arrays with one more row, and by_f changes from layer to
layer. The segment then has a second output: the cost of its time, summed over the samples with their weights.

States at inner interfaces may be outputs too (`Segment.observe`): their functionals are added to by_f there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

from fem_resnet.label_domain.basis import Basis
from fem_resnet.layers.inputs import LayerCoefficients, LayerInputs
from fem_resnet.layers.stage import Stage
from fem_resnet.network.seen_input import SeenInput
from fem_resnet.parameters.space_basis import BatchValues, Replicated
from fem_resnet.time_stepping.scheme import Scheme
from fem_resnet.time_stepping.stepper import LayerSequence, LayerTrace, Stepper

__all__ = ["Functional", "Segment"]


class Functional(NamedTuple):
    """The functional of f at an interface, by_f + M Psi by_g, and with a tangent that of the tangent's f too.

    Attributes
    ----------
    by_f
        One array an order, shape (nodes, samples); empty where it is 0.
    psi
        The basis Psi.
    by_g
        One array an order, shape (rank of psi, samples).
    """

    by_f: Sequence[np.ndarray]
    psi: Basis
    by_g: Sequence[np.ndarray]


class Segment:
    """Consecutive layers: an operator from f at the start and coefficients to f at the end.

    Parameters
    ----------
    scheme
        The scheme that steps the layers.
    steppers
        ``steppers(orders)`` makes one stepper a layer, in order; at least one. With 2 orders they step a tangent too.
    stage
        The stage evaluations of the layers.
    coefficients
        The coefficients that the layers take.
    values
        How Functions hold the state.
    replay
        Whether adapted steps are kept from the first solve on.
    omega
        Weights of the samples, shape (samples,), where the steppers have a running cost; else None.
    """

    _steps_f = True

    def __init__(
        self,
        scheme: Scheme,
        steppers: Callable[[int], list[Stepper]],
        stage: Stage,
        coefficients: LayerCoefficients,
        values: BatchValues,
        replay: bool,
        omega: np.ndarray | None = None,
    ):
        self.scheme = scheme
        self.steppers = steppers(1)
        self._numbers = coefficients.layers
        self._make = steppers
        self._tangent_steppers: list[Stepper] | None = None
        self._sequences: dict[int, list[LayerSequence]] = {}  # of steppers without a tangent, and with one
        self._stage = stage
        self._Y = values.Y
        self._coefficients = coefficients
        self._replay = replay
        self._steps: list[list[float] | None] = [None] * len(self.steppers)
        self._nodes = values.Y.nodes
        #: How Functions hold f.
        self.values = values
        #: Weights of the samples in the running cost.
        self.omega = omega
        #: How Functions hold a state that is an output.
        self.output_of_state: BatchValues | Replicated = values
        #: After how many layers the state is an output too; these outputs follow f at the end, and the cost.
        self.observed: list[int] = []
        self.inputs = [values, *coefficients.slots]
        #: The Functions that hold the coefficients, but for learned factors, which `forward` gets last.
        self.functions = coefficients.functions
        #: What each layer took in the last forward solve.
        self._layers: list[tuple[LayerInputs, ...]] = []
        #: Of the last adjoint solve: the functionals of f at the start of each layer, and at the end.
        self._at_interfaces: list[Functional] = []
        self._seen = SeenInput(values.Y.comm)
        self._mark = object()  # on the steppers, says who used them last

    @property
    def output(self):
        """One slot an output: for f at the end, for the cost where there is one (None), for f where it is observed."""
        slots = self.output_of_state, *(() if self.omega is None else (None,)), *(self.output_of_state for _ in self.observed)
        return slots if len(slots) > 1 else self.output_of_state

    def observe(self, layers: int) -> None:
        """Make the state after so many layers the last output.

        The segment is then not `ready`: an adjoint solves forward again. The traces of the last solve stay good.
        """
        self.observed.append(layers)
        self._sequences, self._mark = {}, object()

    @property
    def ready(self) -> bool:
        """Whether every layer keeps the trajectory of the last forward solve, and no other segment took its stepper."""
        return all(stepper.has_trajectory and stepper.user is self._mark for stepper in self.steppers)

    def release(self) -> None:
        """Forget the last solves; states and co-states cannot be rebuilt any more."""
        self._layers, self._at_interfaces, self._tangent_steppers = [], [], None
        self._sequences.pop(2, None)
        for stepper in self.steppers:
            stepper.release()

    @PETSc.Log.EventDecorator("fem_resnet:forward")
    def forward(self, arrays: Sequence[np.ndarray], save: bool) -> np.ndarray | tuple[np.ndarray, float]:
        """f at the end, a new array of shape (nodes, samples); with a running cost the cost too. Collective.

        `advance` then gives f at any layer.

        Parameters
        ----------
        arrays
            f at the start, then the coefficients.
        save
            Whether an adjoint may follow.

        Raises
        ------
        ValueError
            If an adjoint may follow, and PETSc has none for this method.
        StepFailure
            If a layer cannot be stepped.
        """
        if save:
            self.refuse_without_adjoint()
        f, *coefficients = arrays
        for stepper, number in zip(self.steppers, self._numbers):
            stepper.layer, stepper.user = number, self._mark
        self._at_interfaces = []
        self._layers = [(inputs,) for inputs in self._coefficients.on_layers(coefficients)]
        total = f.copy() if self.omega is None and self._steps_f else None
        states = self._run(self.steppers, [f], self._layers, save, self._steps, total)
        if self._replay:
            self.replay(self.taken_steps())
        return self._values([state[0] for state in states])

    def _with_row(self, f: np.ndarray, c: np.ndarray | float = 0.0) -> np.ndarray:
        """f, with a row for c where there is a running cost."""
        return f if self.omega is None else np.vstack([f, np.broadcast_to(c, (1, f.shape[1]))])

    def _values(self, states: Sequence[np.ndarray]):
        """The outputs, from the state at the end and those that are observed."""
        if self.omega is None:
            return states if self.observed else states[0]
        end, *observed = states
        return end[: self._nodes], float(self.omega @ end[-1]), *(state[: self._nodes] for state in observed)

    def _of_states(self, functional) -> list[np.ndarray]:
        """Functionals of the states, with a row for c, from functionals of the outputs."""
        if self.omega is None:
            return list(functional) if self.observed else [functional]
        end, cost, *observed = functional
        return [self._with_row(end, self.omega * cost), *map(self._with_row, observed)]

    def replay(self, steps: Sequence[list[float] | None]) -> None:
        """Take these steps from now on: for each layer the steps of a trace, or None for equal steps."""
        self._steps = list(steps)

    def taken_steps(self) -> list[list[float] | None]:
        """The steps of each layer in the last forward solve, in parts of its length; None where equal steps were taken."""
        return [
            stepper.trace.steps if self.scheme.adaptive or given is not None else None
            for stepper, given in zip(self.steppers, self._steps)
        ]

    def refuse_without_adjoint(self) -> None:
        """Raise a ValueError if PETSc has no adjoint of the method."""
        instead = self.scheme.method.instead
        if instead is not None:
            raise ValueError(
                f"solver_parameters: PETSc has no adjoint of its method {self.scheme.ts_type!r}, so it cannot be "
                f"recorded; 'ts_type': {instead} has one. Without a gradient: run it while annotation is off"
            )

    def _run(
        self,
        steppers: Sequence[Stepper],
        f: list[np.ndarray],
        layers: Sequence[tuple[LayerInputs, ...]],
        save: bool,
        taken: Sequence[list[float] | None],
        total: np.ndarray | None = None,
    ) -> list[list[np.ndarray]]:
        """Step all layers; return the states at the end, and where they are observed.

        A state is a list of arrays: f, and its tangent where there is one, each with a row for c where there is a running
        cost. `total` starts as a copy of f; layers that can add their integral to it in passing do so.
        """
        fields, reached, states, psi, l = [self._with_row(part) for part in f], 0, {}, None, 0

        def reach(l: int) -> list[np.ndarray]:
            """The state after l layers: `total`, or else by quadrature from the latest state that is known."""
            nonlocal fields, reached
            traces = [stepper.trace for stepper in steppers[:l]]
            if total is not None and all(trace.added for trace in traces):
                return [total]
            fields, reached = self._advance(fields, traces[reached:]), l
            return fields

        for sequence in self._split(steppers, layers):
            first, end = layers[l], l + len(sequence.steppers)
            at_start = reach(l) if l else fields
            if l in self.observed:
                states[l] = [part.copy() for part in at_start]
            if first[0].factors.psi is not psi:
                psi, inside = first[0].factors.psi, [part[: self._nodes] for part in at_start]
                g = [psi.project(part) if l or order else self._seen.through(psi, f[0]) for order, part in enumerate(inside)]
                if len(first) == 2 and first[1].factor_directions is not None:
                    g[1] += self._Y.sum(first[1].factor_directions.weighted.T @ inside[0])
            g = sequence.forward(g, at_start, layers[l:end], save, taken[l:end], total)
            l = end
        self._check_ranks_agree(g)
        return [reach(l), *(states[l] for l in self.observed)]

    def _split(self, steppers: Sequence[Stepper], layers: Sequence[tuple[LayerInputs, ...]]) -> list[LayerSequence]:
        """The layers in sequences with one psi and no observed state inside; kept until another state is observed."""
        orders = len(layers[0])
        if orders not in self._sequences:
            psis = [inputs[0].factors.psi for inputs in layers]
            starts = [l for l, psi in enumerate(psis) if l == 0 or l in self.observed or psi is not psis[l - 1]]
            self._sequences[orders] = [
                self.scheme.new_sequence(steppers[start:end]) for start, end in pairwise([*starts, len(layers)])
            ]
        return self._sequences[orders]

    def _check_ranks_agree(self, g: Sequence[np.ndarray]) -> None:
        # Every rank steps its own copy of g. If they ever differ, all that follows is wrong without a word.
        total = sum(part.sum() for part in g)
        probe = np.array([total, -total])
        if self._Y.comm.size > 1:
            self._Y.comm.Allreduce(MPI.IN_PLACE, probe, op=MPI.MAX)
        if probe[0] != -probe[1]:
            raise RuntimeError(
                f"the ranks' copies of the coefficients differ after layer {self.steppers[-1].layer}, by "
                f"{probe[0] + probe[1]:.1e} in their sum: do all ranks run on the same kind of processor?"
            )

    def traces(self) -> list[LayerTrace]:
        """The traces of the layers in the last forward solve, from which f is rebuilt."""
        return [stepper.trace for stepper in self.steppers]

    def advance(self, f: np.ndarray, traces: Sequence[LayerTrace]) -> np.ndarray:
        """f after layers that left these traces, by the quadrature (3.3)."""
        return self._advance([f], traces)[0][: self._nodes]

    def _advance(self, f: list[np.ndarray], traces: Sequence[LayerTrace]) -> list[np.ndarray]:
        for l in reversed(range(len(traces))):
            if traces[l].end is not None:
                f, traces = traces[l].end, traces[l + 1 :]
                break
        return self._stage.advance(f, list(chain.from_iterable(trace.stages for trace in traces)))

    @PETSc.Log.EventDecorator("fem_resnet:adjoint")
    def adjoint(
        self, arrays: Sequence[np.ndarray], functional: np.ndarray | Sequence
    ) -> list[np.ndarray | Callable[[], np.ndarray]]:
        """A function that makes the functional of f at the start, then functionals of the coefficients. Collective.

        Parameters
        ----------
        arrays
            The arrays of the last forward solve.
        functional
            The functional of f at the end, shape (nodes, samples), kept for `costate`; one an output where there are several.
            For a `CoefficientSegment` the functional of g, shape (rank, samples).
        """
        states = [[part] for part in self._of_states(functional)]
        (start,), functionals, self._at_interfaces = self._adjoint(self.steppers, states, self._layers, arrays[:1])
        return [start, *functionals]

    def _adjoint(
        self,
        steppers: Sequence[Stepper],
        states: Sequence[list[np.ndarray]],
        layers: Sequence[tuple[LayerInputs, ...]],
        f: Sequence[np.ndarray],
    ) -> tuple[list[Callable[[], np.ndarray]], list[np.ndarray], list[Functional]]:
        """Functionals of the input, and of its tangent; functionals of the coefficients; functionals at the interfaces.

        `states` are functionals of what `_run` returned, `f` the input and its tangent.
        """
        l = len(layers)
        end, *others = states
        observed = dict(zip(self.observed, others))
        at = self._at_end(layers[-1][0].factors.psi, end)
        functionals, interfaces = [], [at]
        for sequence in reversed(self._split(steppers, layers)):
            psi = layers[l - 1][0].factors.psi
            if psi is not at.psi:
                at = self._without_g(psi, self._unfold(at))
            for by_g, by_f, functional in sequence.adjoint(list(at.by_g), at.by_f):
                functionals.append(functional)
                at = Functional(by_f, psi, by_g)
                interfaces.append(at)
            l -= len(sequence.steppers)
            if l in observed:
                at = interfaces[-1] = self._add_observed(at, observed[l])
        collected = self._coefficients.collect(functionals[::-1])
        turning = None
        if layers[0][0].learns_factors:  # the start is seen through Psi too
            fields = (part[: self._nodes] for part in f)
            collected[-1] += self._Y.weights[:, None] * sum(part @ x.T for part, x in zip(fields, at.by_g))
            turning = layers[0][1].factor_directions if len(at.by_f) == 2 else None

        def start(order: int) -> np.ndarray:
            value = self._at_start(at, order)
            if order == 0 and turning is not None:
                value += turning.weighted @ at.by_g[1]
            return value

        return [partial(start, order) for order in range(len(at.by_g))], collected, interfaces[::-1]

    def _without_g(self, psi: Basis, by_f: Sequence[np.ndarray]) -> Functional:
        """The functional by_f, for layers with this psi."""
        return Functional(by_f, psi, [np.zeros((psi.rank, self._stage.samples)) for _ in by_f])

    def _at_end(self, psi: Basis, state: Sequence[np.ndarray]) -> Functional:
        """The functional at the end, from that of the output and of its tangent."""
        return self._without_g(psi, [self._stage.arranged(part) for part in state])  # every stage reads them

    def _add_observed(self, at: Functional, state: Sequence[np.ndarray]) -> Functional:
        """The functional below an interface where the state is an output, with that output's functional."""
        return at._replace(by_f=[self._stage.arranged(part + other) for part, other in zip(at.by_f, state)])

    def _at_start(self, at: Functional, order: int) -> np.ndarray:
        """The functional of the input, or of its tangent, from the functional at the start."""
        one = at._replace(by_f=at.by_f[order : order + 1], by_g=at.by_g[order : order + 1])
        return self._unfold(one)[0][: self._nodes]

    def _unfold(self, at: Functional) -> list[np.ndarray]:
        """by_f + M Psi by_g in one array an order."""
        if self.omega is None:
            return [at.psi.functional(by_g) + by_f for by_g, by_f in zip(at.by_g, at.by_f)]
        return [self._with_row(at.psi.functional(by_g) + by_f[:-1], by_f[-1]) for by_g, by_f in zip(at.by_g, at.by_f)]

    def costate(self, layer: int) -> np.ndarray | None:
        """r after so many layers of the segment, shape (nodes, samples): M r is the functional of f.

        None if there was no adjoint since the last forward solve.
        """
        if not self._at_interfaces:
            return None
        at = self._at_interfaces[layer]
        r = at.psi.expand(at.by_g[0])
        if at.by_f:
            r += at.by_f[0][: self._nodes] / self._Y.weights[:, None]
        return r

    # -- second order -------------------------------------------------------------------------------------------------

    @PETSc.Log.EventDecorator("fem_resnet:tangent")
    def tangent(self, arrays: Sequence[np.ndarray], directions: Sequence[np.ndarray]):
        """The derivative of `forward` at these arrays in these directions, exact for the discrete network. Collective."""
        states, _ = self._run_with_tangent(arrays, directions, save=False)
        return self._values([state[1] for state in states])

    def _run_with_tangent(self, arrays, directions, save):
        if self._tangent_steppers is None:
            self._tangent_steppers = self._make(2)
        values = self._coefficients.on_layers(arrays[1:])
        layers = list(zip(values, self._coefficients.on_layers(directions[1:], directions=True)))
        f = [arrays[0], directions[0]]
        return self._run(self._tangent_steppers, f, layers, save, self.taken_steps()), layers

    @PETSc.Log.EventDecorator("fem_resnet:second_adjoint")
    def second_adjoint(
        self,
        arrays: Sequence[np.ndarray],
        directions: Sequence[np.ndarray],
        functional: np.ndarray | Sequence,
        functional_dot: np.ndarray | Sequence,
    ) -> list[np.ndarray | Callable[[], np.ndarray]]:
        """`F'(m)^T l_dot + d/de F'(m + e m_dot)^T l` at e = 0, by the adjoint of the tangent. Collective.

        Parameters
        ----------
        arrays, directions
            m and m_dot.
        functional, functional_dot
            l and l_dot: functionals of the outputs, and their derivatives.
        """
        start, functionals = self.adjoint_of_pair(arrays, directions, functional_dot, functional)
        return [start[0], *functionals]

    def adjoint_of_pair(
        self, arrays: Sequence[np.ndarray], directions: Sequence[np.ndarray], functional, functional_of_tangent
    ) -> tuple[list[Callable[[], np.ndarray]], list[np.ndarray]]:
        """The adjoint of (value, tangent). Collective.

        Returned are functions that make the functionals of f and of its tangent at the start, and the functionals of the
        coefficients.
        """
        _, layers = self._run_with_tangent(arrays, directions, save=True)
        states = [list(pair) for pair in zip(self._of_states(functional), self._of_states(functional_of_tangent))]
        start, functionals, _ = self._adjoint(self._tangent_steppers, states, layers, [arrays[0], directions[0]])
        return start, functionals
