"""Segments: consecutive layers as one operator on the tape (see `blocks.Operator`).

Forward, f at the end follows from f at the start and the stages of all layers in one pass (3.3). Backward, layers with the
same psi hand on gamma, the adjoint of g, alone, so that inside a segment nothing of size nodes x samples is touched but
what the stages read; states and co-states at inner interfaces are rebuilt when asked for.

With a running cost the layers carry f and c (`running_cost`), in arrays with a row more, and lambda changes from layer to
layer; the segment then has a second output, the cost of its time, summed over the samples with their weights.

States at inner interfaces may be outputs too (`Segment.observe`): their adjoint values are added to lambda there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, pairwise

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

from fem_resnet.label_domain.basis import Basis
from fem_resnet.layers.inputs import LayerCoefficients, LayerInputs
from fem_resnet.layers.stage import LayerTrace, Stage
from fem_resnet.parameters.space_basis import BatchValues
from fem_resnet.time_stepping.scheme import Scheme
from fem_resnet.time_stepping.sequence import LayerSequence
from fem_resnet.time_stepping.stepper import Stepper

__all__ = ["Segment", "TangentSegment"]


def _nothing() -> None:
    """As a weak reference whose array is gone."""


class Segment:
    """Consecutive layers: an operator from f at the start and coefficients to f at the end.

    Parameters
    ----------
    scheme
        How they are stepped.
    steppers
        ``steppers(orders)`` makes the layers' steppers, in order, at least one; with a tangent for 2 orders.
    stage
        Their stage evaluations.
    coefficients
        What these layers see of bias and kernel.
    values
        How Functions hold the state.
    replay
        Whether adapted steps are kept from the first solve on.
    omega
        Weights of the samples, where the steppers have a running cost; else None.
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
        self.output_of_state = values
        #: After how many layers the state is an output too; these outputs follow f at the end, and the cost.
        self.observed: list[int] = []
        self.inputs = [values, *coefficients.slots]
        #: The Functions that hold the coefficients, but for learned factors, which `forward` gets last.
        self.functions = coefficients.functions
        # At the start of each layer, and at the end: lambda, unless it is 0, and psi and gamma for M Psi gamma.
        self._costates: list[tuple[Sequence[np.ndarray], Basis, Sequence[np.ndarray]]] = []
        # The array that held the input last, psi, and its coefficients.
        self._input: tuple[Callable[[], np.ndarray | None], Basis | None, np.ndarray | None] = _nothing, None, None
        self._mark = object()  # on the steppers, says who used them last

    @property
    def output(self):
        """One slot an output: f at the end, the cost where there is one (None), f where it is observed."""
        slots = self.output_of_state, *(() if self.omega is None else (None,)), *(self.output_of_state for _ in self.observed)
        return slots if len(slots) > 1 else self.output_of_state

    def observe(self, layers: int) -> None:
        """Make the state after so many layers an output, the last one.

        What the last solve has kept for its adjoint is then of no use (`ready`); its traces are.
        """
        self.observed.append(layers)
        self._sequences, self._mark = {}, object()

    @property
    def ready(self) -> bool:
        """Whether every layer keeps the trajectory of the last forward solve, and no other segment took its stepper."""
        return all(stepper.has_trajectory and stepper.user is self._mark for stepper in self.steppers)

    def release(self) -> None:
        """Forget what the last solves left: steppers may be shared, states and co-states are of no use then."""
        self._layers, self._costates, self._tangent_steppers = [], [], None
        self._sequences.pop(2, None)
        for stepper in self.steppers:
            stepper.release()

    @PETSc.Log.EventDecorator("fem_resnet:forward")
    def forward(self, arrays: Sequence[np.ndarray], save: bool) -> np.ndarray | tuple[np.ndarray, float]:
        """F at the end, a new array of shape (nodes, samples); `advance` then gives f at any layer. Collective.

        With a running cost, that and the cost.

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
        self._costates = []
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

    def _functionals(self, dual) -> list[np.ndarray]:
        """Adjoint values of the states, with those of c in the same arrays, from those of the outputs."""
        if self.omega is None:
            return list(dual) if self.observed else [dual]
        end, cost, *observed = dual
        return [self._with_row(end, self.omega * cost), *map(self._with_row, observed)]

    def replay(self, steps: Sequence[list[float] | None]) -> None:
        """Take these steps from now on: for each layer those of a trace, or None for equal ones."""
        self._steps = list(steps)

    def taken_steps(self) -> list[list[float] | None]:
        """The steps of the last forward solve, in parts of each layer, where they were adapted or given; else None."""
        return [
            stepper.trace.steps if self.scheme.adaptive or given is not None else None
            for stepper, given in zip(self.steppers, self._steps)
        ]

    def refuse_without_adjoint(self) -> None:
        """Raise ValueError if PETSc cannot adjoin the method."""
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
        """Step all layers from f, with its tangent if there is one: states at the end and where they are observed.

        States are lists with one entry an order, and have rows for c. `total`, f too, has added what layers add on the way.
        """
        fields, reached, states, psi, l = [self._with_row(part) for part in f], 0, {}, None, 0

        def reach(l: int) -> list[np.ndarray]:
            """The state after l layers: what has been added up, or from the latest one that is known."""
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
                g = [psi.project(part) if l or order else self._seen(psi, f[0]) for order, part in enumerate(inside)]
                if len(first) == 2 and first[1].factors is not None:
                    g[1] += self._Y.sum(first[1].factors.weighted.T @ inside[0])
            g = sequence.forward(g, at_start, layers[l:end], save, taken[l:end], total)
            l = end
        self._check_ranks_agree(g)
        return [reach(l), *(states[l] for l in self.observed)]

    def _split(self, steppers: Sequence[Stepper], layers: Sequence[tuple[LayerInputs, ...]]) -> list[LayerSequence]:
        """The layers in sequences with one psi, without an observed state inside; which these are is so until one is added."""
        orders = len(layers[0])
        if orders not in self._sequences:
            psis = [inputs[0].factors.psi for inputs in layers]
            starts = [l for l, psi in enumerate(psis) if l == 0 or l in self.observed or psi is not psis[l - 1]]
            self._sequences[orders] = [LayerSequence(steppers[start:end]) for start, end in pairwise([*starts, len(layers)])]
        return self._sequences[orders]

    def _seen(self, psi: Basis, f: np.ndarray) -> np.ndarray:
        """Psi^T M f, kept for as long as f is the same array and nobody may write into it. Collective."""
        known = self._input[0]() is f and self._input[1] is psi
        if not self._Y.comm.allreduce(known, op=MPI.LAND):  # one rank alone may have looked at the data
            g = psi.project(f)
            g.flags.writeable = False
            self._input = (_nothing if f.flags.writeable else weakref.ref(f)), psi, g
        return self._input[2]

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
        """What each layer left in the last forward solve: what f is rebuilt from."""
        return [stepper.trace for stepper in self.steppers]

    def advance(self, f: np.ndarray, traces: Sequence[LayerTrace]) -> np.ndarray:
        """F after layers that left these traces, by the quadrature (3.3)."""
        return self._advance([f], traces)[0][: self._nodes]

    def _advance(self, f: list[np.ndarray], traces: Sequence[LayerTrace]) -> list[np.ndarray]:
        for l in reversed(range(len(traces))):
            if traces[l].end is not None:
                f, traces = traces[l].end, traces[l + 1 :]
                break
        return self._stage.advance(f, list(chain.from_iterable(trace.stages for trace in traces)))

    @PETSc.Log.EventDecorator("fem_resnet:adjoint")
    def adjoint(
        self, arrays: Sequence[np.ndarray], dual: np.ndarray | Sequence
    ) -> list[np.ndarray | Callable[[], np.ndarray]]:
        """What makes lambda at the start, then functionals of the coefficients, all new arrays. Collective.

        Parameters
        ----------
        arrays
            Those of the last forward solve.
        dual
            lambda at the end, dual to the node values, shape (nodes, samples); kept for `costate`. Where there are several
            outputs, their dual values. Of a `CoefficientSegment` gamma, shape (rank, samples).
        """
        states = [[part] for part in self._functionals(dual)]
        (start,), functionals, self._costates = self._adjoint(self.steppers, states, self._layers, arrays[:1])
        return [start, *functionals]

    def _adjoint(self, steppers, states: Sequence[list[np.ndarray]], layers, f: Sequence[np.ndarray]):
        """Adjoint values of the input and of its tangent, functionals, and what co-states are made of.

        `states` are adjoint values of what `_run` gave.
        """
        psi, l = layers[-1][0].factors.psi, len(layers)
        end, *others = states
        observed = dict(zip(self.observed, others))
        gamma, duals = self._adjoint_end(psi, end)
        functionals, costates = [], [(duals, psi, gamma)]
        for sequence in reversed(self._split(steppers, layers)):
            if layers[l - 1][0].factors.psi is not psi:
                duals = self._unfold(psi, gamma, duals)
                psi = layers[l - 1][0].factors.psi
                gamma = self._nothing(psi, duals)
            for gamma, duals, functional in sequence.adjoint(gamma, duals):
                functionals.append(functional)
                costates.append((duals, psi, gamma))
            l -= len(sequence.steppers)
            if l in observed:
                gamma, duals = self._add_observed(gamma, duals, observed[l])
                costates[-1] = duals, psi, gamma
        collected = self._coefficients.collect(functionals[::-1])
        turning = None
        if layers[0][0].learns_factors:  # the start is seen through Psi too
            fields = (part[: self._nodes] for part in f)
            collected[-1] += self._Y.weights[:, None] * sum(part @ x.T for part, x in zip(fields, gamma))
            turning = layers[0][1].factors if len(duals) == 2 else None

        def start(order: int) -> np.ndarray:
            value = self._adjoint_start(psi, gamma, duals, order)
            if order == 0 and turning is not None:
                value += turning.weighted @ gamma[1]
            return value

        return [partial(start, order) for order in range(len(gamma))], collected, costates[::-1]

    def _nothing(self, psi: Basis, duals: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.zeros((psi.rank, self._stage.samples)) for _ in duals]

    def _adjoint_end(self, psi: Basis, duals: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Gamma and lambda at the end, from adjoint values of the output and its tangent."""
        return self._nothing(psi, duals), [self._stage.arranged(dual) for dual in duals]  # every stage reads them

    def _add_observed(
        self, gamma: list[np.ndarray], duals: Sequence[np.ndarray], state: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], Sequence[np.ndarray]]:
        """Gamma and lambda below an interface where the state is an output, from adjoint values of that."""
        return gamma, [self._stage.arranged(dual + part) for dual, part in zip(duals, state)]

    def _adjoint_start(self, psi: Basis, gamma: list[np.ndarray], duals: Sequence[np.ndarray], order: int) -> np.ndarray:
        """Adjoint values of the input, or of its tangent."""
        return self._unfold(psi, gamma[order : order + 1], duals[order : order + 1])[0][: self._nodes]

    def _unfold(self, psi: Basis, gamma: Sequence[np.ndarray], duals: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Lambda + M Psi gamma: the adjoint values of f when g is no state of its own any more."""
        if self.omega is None:
            return [psi.functional(part) + dual for part, dual in zip(gamma, duals)]
        return [self._with_row(psi.functional(part) + dual[:-1], dual[-1]) for part, dual in zip(gamma, duals)]

    def costate(self, layer: int) -> np.ndarray | None:
        """R = M^-1 lambda after so many layers of the segment, shape (nodes, samples).

        None if there was no adjoint since the last forward solve.
        """
        if not self._costates:
            return None
        duals, psi, gamma = self._costates[layer]
        r = psi.values @ gamma[0]
        if duals:
            r += duals[0][: self._nodes] / self._Y.weights[:, None]
        return r

    # -- second order -------------------------------------------------------------------------------------------------

    @PETSc.Log.EventDecorator("fem_resnet:tangent")
    def tangent(self, arrays: Sequence[np.ndarray], directions: Sequence[np.ndarray]):
        """Derivative of `forward` at these arrays, in these directions: that of the discrete network. Collective."""
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
        dual: np.ndarray | Sequence,
        dual_dot: np.ndarray | Sequence,
    ) -> list[np.ndarray]:
        """`F'(m)^T dual_dot + d/de F'(m + e m_dot)^T dual` at e = 0, by the adjoint of the tangent. Collective.

        Parameters
        ----------
        arrays, directions
            m and m_dot.
        dual, dual_dot
            Adjoint values of the outputs, and their own derivatives.
        """
        start, functionals = self.adjoint_of_pair(arrays, directions, dual_dot, dual)
        return [start[0], *functionals]

    def adjoint_of_pair(
        self, arrays: Sequence[np.ndarray], directions: Sequence[np.ndarray], dual, dual_of_tangent
    ) -> tuple[list[Callable[[], np.ndarray]], list[np.ndarray]]:
        """Adjoint of (value, tangent): what makes functionals of f and of its tangent at the start, and of the coefficients."""
        _, layers = self._run_with_tangent(arrays, directions, save=True)
        states = [list(pair) for pair in zip(self._functionals(dual), self._functionals(dual_of_tangent))]
        start, functionals, _ = self._adjoint(self._tangent_steppers, states, layers, [arrays[0], directions[0]])
        return start, functionals


class TangentSegment:
    """The tangent of a segment in f as an operator of its own: (f, f_1, coefficients) -> f_1 at the end.

    Its adjoint is that of the pair (f, f_1); coefficients have no directions here.

    Parameters
    ----------
    segment
        The layers; this operator's alone.
    """

    #: The adjoint solves by itself.
    ready = True

    def __init__(self, segment: Segment):
        self._segment = segment
        self.inputs = [segment.inputs[0], *segment.inputs]
        self.output = segment.inputs[0]

    def _split(self, arrays):
        f, f_1, *coefficients = arrays
        return [f, *coefficients], [f_1, *(np.zeros_like(part) for part in coefficients)]

    def forward(self, arrays: Sequence[np.ndarray], save: bool) -> np.ndarray:
        """f_1 at the end. Collective."""
        if save:
            self._segment.refuse_without_adjoint()
        values, directions = self._split(arrays)
        self._segment.forward(values, False)  # where steps are adapted, it is the value that adapts them
        return self._segment.tangent(values, directions)

    def adjoint(self, arrays: Sequence[np.ndarray], dual: np.ndarray) -> list[np.ndarray]:
        """Functionals of f, f_1 and the coefficients. Collective."""
        values, directions = self._split(arrays)
        (f, f_1), functionals = self._segment.adjoint_of_pair(values, directions, np.zeros_like(dual), dual)
        return [f, f_1, *functionals]
