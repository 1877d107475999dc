"""How a network is run: segments of layers, made once and kept, one after the other from f_I to f(T).

While pyadjoint annotates, each segment becomes a Block, or each is a time step of the tape where that follows a schedule of
checkpoints. Unrecorded runs share their segments, and keep what each layer left, from which states are rebuilt.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import firedrake as fd
import numpy as np
from pyadjoint import AdjFloat
from pyadjoint.tape import annotate_tape, get_working_tape, stop_annotating

from fem_resnet.fixed import read_only
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.layers.sample_coefficients import SampleCoefficients
from fem_resnet.layers.stage import Stage
from fem_resnet.log import log
from fem_resnet.network.coefficient_segment import CoefficientSegment
from fem_resnet.network.network_parameters import NetworkParameters
from fem_resnet.network.run import Piece, Solved
from fem_resnet.network.segment import Segment
from fem_resnet.network.settings import Settings
from fem_resnet.parameters.space_basis import BatchValues, read_all
from fem_resnet.tape.checkpoints import Manager, manager_of
from fem_resnet.tape.recording import apply
from fem_resnet.time_stepping.scheme import Scheme
from fem_resnet.time_stepping.stepper import Stepper

__all__ = ["Solver"]

#: How many sorts of unrecorded runs, and numbers of samples, a network keeps what it has made for.
_KEPT = 4


class Solver:
    """What runs a network.

    Parameters
    ----------
    settings
        What the network is made of.
    parameters
        Its parameters.
    scheme
        How its layers are stepped.
    """

    def __init__(self, settings: Settings, parameters: NetworkParameters, scheme: Scheme):
        self._settings, self._parameters, self._scheme = settings, parameters, scheme
        self._Y, self._layers = settings.Y, len(settings.times) - 1
        self._stages, self._scratch = _Latest(), _Latest()
        if self._layers:
            self._stepper(self._stage(1), 0)  # now, so that options are refused here rather than at the first run

    def solve(
        self,
        initial: fd.Function,
        running: RunningCost | None,
        weights: Sequence[float] | None,
        seen_by: Basis | None,
        observed: Sequence[int],
    ) -> Solved:
        """Solve (2.8); while pyadjoint annotates, record it. The arguments are those of `ResidualNetwork.run`. Collective."""
        self._Y.check_values(initial, "initial")
        space, observed = initial.function_space(), tuple(observed)
        manager = manager_of(get_working_tape()) if annotate_tape() else None
        if running is not None:
            self._scheme.refuse_running()
        omega = sample_weights(weights, self._Y.samples(space))
        omega = None if running is None else omega
        self._refuse(running, seen_by, observed, manager)
        if manager is not None:
            end, recorded_cost = self._record_steps(initial, manager, running, omega)
            return Solved(initial, space, None, {self._layers: end}, recorded_cost, omega)
        # What the caller has may change later: an unrecorded run has a copy.
        state = given = initial if annotate_tape() else read_only(np.array(self._Y.values(initial)))
        functions_of = self._functions()
        segments = self._segments(space, running, omega, seen_by, observed)
        pieces: list[Piece] = []
        held: dict[int, Any] = {} if self._layers else {0: state}
        cost: AdjFloat | float = 0.0
        for segment in segments:
            before = pieces[-1] if pieces and seen_by is not None else None
            first, seen = pieces[-1].end if pieces else 0, state
            if seen_by is not None and not pieces and not annotate_tape():
                seen = segment.inputs[0].read(initial)
            outputs, piece = _solved(segment, first, state, seen, functions_of(segment), before)
            pieces.append(piece)
            state, *others = outputs if isinstance(segment.output, tuple) else [outputs]
            if running is not None:
                cost = cost + others.pop(0)
            held |= {piece.end: state} | {piece.first + layers: part for layers, part in zip(segment.observed, others)}
        if not annotate_tape():
            cost = cost if running is None else AdjFloat(cost)
            slot = segments[-1].output_of_state if segments else BatchValues(self._Y, space)
            held = {layer: _function(slot, held[layer]) for layer in {*observed, self._layers}}
        return Solved(given, space, pieces, held, cost, omega)

    def _refuse(
        self, running: RunningCost | None, seen_by: Basis | None, observed: tuple[int, ...], manager: Manager | None
    ) -> None:
        """Refuse what does not go together, and warn where adapted steps are not replayed."""
        if seen_by is not None and (running is not None or manager is not None or not self.steps_what_is_seen_by(seen_by)):
            raise ValueError(
                f"seen_by: {seen_by!r} is not the psi of all layers with fixed factors (see steps_what_is_seen_by), or there "
                f"is a running cost or a schedule of checkpoints; leave it out"
            )
        if manager is not None and (self._parameters.factors or self._settings.kernel.among is not None):
            what = "learned factors" if self._parameters.factors else "kernels made of other controls"
            raise ValueError(f"checkpoints: {what} and schedules of checkpoints do not go together; leave one out")
        if observed and manager is not None:
            raise ValueError("observed: a schedule of checkpoints keeps no states inside of the network; record without one")
        if annotate_tape() and not self._settings.replay_steps and self._scheme.adaptive:
            log(
                self._Y.comm, logging.WARNING,
                "adapted steps are not replayed: the gradient will be that of the network with the steps of the latest "
                "evaluation, and J jumps where their number changes",
            )  # fmt: skip

    def _functions(self) -> Callable[[Segment], list[fd.Function]]:
        """What gives a segment the Functions of its coefficients; recorded where they are made of other controls."""
        parameters = self._parameters
        # An operator on the tape belongs to its Block alone.
        factors = [apply(operator, p.functions)[0] for operator, p in zip(parameters.retractions(), parameters.factors)]
        acting = dict(zip(map(id, parameters.kernel.functions), parameters.kernel.learned.acting().functions))
        return lambda segment: [*(acting.get(id(function), function) for function in segment.functions), *factors]

    def _record_steps(
        self, initial: fd.Function, manager: Manager, running: RunningCost | None, omega: np.ndarray | None
    ) -> tuple[fd.Function, AdjFloat | float]:
        """f(T) and the cost, recorded as one time step a segment; the last stays open for what follows.

        One Function is the state at all interfaces, and segments of a kind share steppers: the tape keeps no field but
        those of its schedule.
        """
        tape = get_working_tape()
        if tape.get_blocks() or manager.steps not in (None, max(self.blocks, 1)):
            raise ValueError(
                f"checkpoints: expected an empty tape and a schedule for {max(self.blocks, 1)} steps, got a tape with "
                f"{len(tape.get_blocks())} Blocks and a schedule for {manager.steps} steps"
            )
        f, cost = initial, 0.0
        for k, segment in enumerate(self.new_segments(initial.function_space(), running, omega, share=True)):
            if k > 0:
                tape.end_timestep()
            output, _ = apply(segment, [f, *segment.functions], into=None if k == 0 else f)
            f, cost = (output, cost) if running is None else (output[0], cost + output[1])
        return f, cost

    def steps_what_is_seen_by(self, psi: Basis) -> bool:
        """Whether layers step nothing but g = Psi^T M f: see `ResidualNetwork.steps_what_is_seen_by`."""
        bases = {self._parameters.factors_on(layer).psi for layer in range(self._layers)}
        return bases == {psi} and not self._parameters.factors and not self._scheme.carries_f

    @property
    def blocks(self) -> int:
        """How many Blocks the layers make on a tape."""
        return -(-self._layers // self._settings.layers.per_block)

    def layer_segments(self, space, running: RunningCost | None, omega: np.ndarray | None) -> list[Segment]:
        """Each layer as a segment of its own, on no tape: see `ResidualNetwork.layer_segments`."""
        with stop_annotating():
            return self.new_segments(space, running, omega, share=True, per_block=1)

    def sample_segment(self, space, seen_by: Basis | None) -> Segment:
        """All layers as a segment with functionals of each sample apart: see `ResidualNetwork.sample_segment`."""
        values, layers = BatchValues(self._Y, space), range(self._layers)
        stage, parameters = self._stage(values.samples), self._parameters
        coefficients = SampleCoefficients(parameters.bias, parameters.kernel, parameters.times, layers, values.samples)

        def steppers(orders: int) -> list[Stepper]:
            return [self._scheme.new_stepper(layer, stage, parameters.factors_on(layer), orders) for layer in layers]

        make = Segment if seen_by is None else partial(CoefficientSegment, seen_by, True)
        return make(self._scheme, steppers, stage, coefficients, values, False)

    def _segments(
        self, space, running: RunningCost | None, omega: np.ndarray | None, seen_by: Basis | None, observed: tuple[int, ...]
    ) -> list[Segment]:
        """New ones where the tape will keep them, else those of earlier unrecorded runs."""
        make = partial(self.new_segments, space, running, omega, seen_by=seen_by, observed=observed)
        if annotate_tape():
            return make()
        segments = self._scratch.get_or_make((space.value_shape, running, seen_by, observed), make)
        for segment in segments:
            segment.omega = omega
        return segments

    def new_segments(
        self,
        space: fd.functionspaceimpl.WithGeometry,
        running: RunningCost | None = None,
        omega: np.ndarray | None = None,
        *,
        share: bool = False,
        per_block: int | None = None,
        seen_by: Basis | None = None,
        observed: Sequence[int] = (),
    ) -> list[Segment]:
        """New segments of all layers.

        Parameters
        ----------
        space
            Of the state.
        running, omega
            A running cost, and the weights of the samples in it.
        share
            Whether segments of a kind share steppers: what one has kept of its solve is lost when the next one solves.
        per_block
            How many layers make a segment; that of the network if left out.
        seen_by
            The psi of all layers, where segments step g = Psi^T M f alone.
        observed
            Numbers of the layer times at which the state is an output.
        """
        values, stage = BatchValues(self._Y, space), self._stage(BatchValues(self._Y, space).samples)
        each = per_block or self._settings.layers.per_block
        made: dict[tuple, list[Stepper]] = {}

        def steppers(layers: range, orders: int) -> list[Stepper]:
            kind = (tuple(map(self._parameters.kind, layers)), orders)
            if not share or kind not in made:
                new = [self._stepper(stage, layer, orders, running) for layer in layers]
                if not share:
                    return new
                made[kind] = new
            return made[kind]

        segments = []
        for start in range(0, self._layers, each):
            layers = range(start, min(start + each, self._layers))
            make = Segment if seen_by is None else partial(CoefficientSegment, seen_by, start == 0)
            coefficients = self._parameters.learned_on(layers)
            replays = annotate_tape() and self._settings.replay_steps
            segments.append(make(self._scheme, partial(steppers, layers), stage, coefficients, values, replays, omega))
            for layer in observed:  # between segments it is an output already
                if layer in layers and (layer > start or layer == 0):
                    segments[-1].observe(layer - start)
        return segments

    def _stage(self, samples: int) -> Stage:
        settings = self._settings
        return self._stages.get_or_make(
            samples,
            partial(self._scheme.new_stage, self._Y, settings.activation, samples, settings.precision, settings.gradient_flow),
        )

    def _stepper(self, stage: Stage, layer: int, orders: int = 1, running: RunningCost | None = None) -> Stepper:
        kernel, constant = self._parameters.factors_on(layer), self._parameters.is_constant(layer)
        return self._scheme.new_stepper(layer, stage, kernel, orders, running, sees_constants=constant)


def _solved(segment: Segment, first: int, state, seen, functions: list[fd.Function], before: Piece | None):
    """What a segment gives at its end, and what is kept of it: on the tape while annotating, else in arrays.

    `state` is the Function or the array that holds f at the start, `seen` what the segment takes of it.
    """
    if annotate_tape():
        outputs, block = apply(segment, [seen, *functions])
        return outputs, Piece(segment, first, block, before=before)
    coefficients = read_all(segment.inputs[1:], functions)
    outputs = segment.forward([seen, *coefficients], save=False)
    return outputs, Piece(segment, first, None, state, coefficients, segment.traces(), before)


class _Latest(OrderedDict):
    """What was made for the latest few keys: users' objects are not kept alive for ever."""

    def get_or_make(self, key: Hashable, make: Callable):
        if key not in self:
            self[key] = make()
        self.move_to_end(key)
        while len(self) > _KEPT:
            self.popitem(last=False)
        return self[key]


def _function(slot, array: np.ndarray) -> fd.Function:
    function = fd.Function(slot.space)
    slot.write(function, array)
    return function
