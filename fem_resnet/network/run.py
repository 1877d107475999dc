"""One solution of (2.8): its states, its co-states, and its derivative in a direction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import firedrake as fd
import numpy as np
from mpi4py import MPI
from pyadjoint import AdjFloat
from pyadjoint.tape import annotate_tape, get_working_tape

from fem_resnet.arguments import integer
from fem_resnet.fixed import OnMesh
from fem_resnet.network.coefficient_segment import CoefficientSegment
from fem_resnet.network.segment import Segment
from fem_resnet.network.tangent_segment import TangentSegment
from fem_resnet.parameters.space_basis import Replicated
from fem_resnet.ranks import same
from fem_resnet.tape.operator_block import OperatorBlock
from fem_resnet.tape.recording import apply
from fem_resnet.time_stepping.stepper import LayerTrace

__all__ = ["Piece", "Run", "Solved"]


@dataclass
class Piece:
    """What a run keeps of one segment.

    On the tape the Block knows the latest evaluation; else the arrays and traces are kept here. Where the start is held by its
    coefficients, f there follows from the piece before.
    """

    segment: Segment
    first: int
    block: OperatorBlock | None
    start: np.ndarray | None = None
    coefficients: list[np.ndarray] | None = None
    traces: list[LayerTrace] | None = None
    before: Piece | None = None

    @property
    def end(self) -> int:
        """Number of the layer after the last one."""
        return self.first + len(self.segment.steppers)

    def state(self, layers: int) -> np.ndarray:
        """f after so many layers, shape (nodes, samples)."""
        return self.segment.advance(self.at_start(), self._traces()[:layers])

    def states(self, before: np.ndarray | None) -> Iterator[np.ndarray]:
        """f at the ends of all layers, each from that before; `before`, that at the start, where the start has not f."""
        f = self.at_start() if self.before is None else before
        for trace in self._traces():
            f = self.segment.advance(f, [trace])
            yield f

    def _traces(self) -> list[LayerTrace]:
        return self.traces if self.block is None else self.segment.traces()

    def at_start(self) -> np.ndarray:
        """f at the start, of the latest evaluation."""
        if self.block is not None:
            self.block.refuse_changed("run")
        if self.before is not None:
            return self.before.state(len(self.before.segment.steppers))
        if self.block is None:
            return self.start
        return self.segment.values.read(self.block.get_dependencies()[0].saved_output)

    def costate(self, layer: int) -> np.ndarray | None:
        """r at a layer time, shape (nodes, samples); None where no derivative has reached it. Collective."""
        # What waits for the garbage collector may keep an adjoint value alive on some ranks only.
        comm = self.segment.values.Y.comm
        current = comm.allreduce(self.block.adjoint_is_current, op=MPI.LAND)
        return self.segment.costate(layer - self.first) if current else None


class Solved(NamedTuple):
    """What solving (2.8) gives.

    Attributes
    ----------
    initial : Function or array
        f_I: the Function that was given where the run was recorded, else a copy of its values.
    space : FunctionSpace
        Of the state.
    pieces : list of Piece or None
        What is kept of each segment; None under a schedule of checkpoints.
    held : dict
        What holds the state, or its coefficients, at layer times: at T, and where it is an output.
    cost : AdjFloat or float
        The running cost.
    omega : array or None
        Weights of the samples in it.
    """

    initial: fd.Function | np.ndarray
    space: fd.functionspaceimpl.WithGeometry
    pieces: list[Piece] | None
    held: dict[int, fd.Function]
    cost: AdjFloat | float
    omega: np.ndarray | None


class Run(OnMesh):
    """One solution of (2.8).

    An unrecorded run belongs to the inputs and parameters that it was made with, also where these change later. On the tape,
    states and co-states are those of the tape's latest evaluation and derivative. Where an input has changed since, asking for
    them is an error.

    Parameters
    ----------
    net
        The network that was run.
    new_segments
        Makes new segments of its layers.
    solved
        What solving (2.8) has given.

    Attributes
    ----------
    net : ResidualNetwork
        The network that was run.
    initial : Function
        f_I. For a recorded run it is the Function that was given, for Controls and derivatives; `state(0)` is what was run.
    cost : AdjFloat
        The running cost, weighted over the samples, where the run was given one; else 0.
    """

    def __init__(self, net, new_segments: Callable[..., list[Segment]], solved: Solved):
        self.net = net
        self.cost = solved.cost
        self._new_segments = new_segments
        self._given, self._space, self._omega = solved.initial, solved.space, solved.omega
        self._pieces, self._held = solved.pieces, solved.held
        self._by_coefficients = bool(self._pieces) and isinstance(self._pieces[-1].segment, CoefficientSegment)
        self._handed_out: set[int] = set()

    def __repr__(self) -> str:
        samples = self.net.Y.samples(self._space)
        return f"Run({samples} samples, {'recorded, ' if self._is_recorded else ''}{self.net!r})"

    @cached_property
    def initial(self) -> fd.Function:
        return self._function(self._given) if isinstance(self._given, np.ndarray) else self._given

    @property
    def omega(self) -> np.ndarray | None:
        """Weights of the samples in the running cost of the next evaluation, shape (samples,); None without such a cost."""
        return None if self._omega is None else self._omega.copy()

    def exchange_weights(self, omega: np.ndarray) -> None:
        """Let the next evaluation on the tape take these weights, shape (samples,)."""
        self._omega[...] = omega

    @property
    def final(self) -> fd.Function:
        """f(T); differentiate functionals of it.

        Where the run was recorded for what psi sees alone (`seen_by`), it is `state(L)` of the latest evaluation, on no
        tape.
        """
        return self.state(self.net.layers) if self._by_coefficients else self._held[self.net.layers]

    def held(self, layer: int) -> tuple[fd.Function, Replicated | None]:
        """The Function that holds f(t_l); or, where the run was recorded for what psi sees alone, g(t_l) and its slot.

        For functionals of T and of the layer times that `ResidualNetwork.run` observes.
        """
        self._handed_out.add(layer)
        if not self._by_coefficients:
            return self._held[layer], None
        slot = self._pieces[-1].segment.output_of_state
        assert isinstance(slot, Replicated), "coefficients are the same on all ranks"
        return self._held[layer], slot

    def state(self, layer: int) -> fd.Function:
        """f(t_l), l = 0 .. L.

        While the tape of the run annotates, the state is an output of it: differentiate functionals of it, as of `final`.
        Else it is a new Function, rebuilt from the start of its segment by (3.3).

        Raises
        ------
        ValueError
            If there is no such layer, or ranks ask for different ones.
        RuntimeError
            If the run was recorded under a schedule of checkpoints, an input on the tape has changed since its latest
            evaluation, or the tape annotates and the run was recorded for what psi sees alone.
        """
        self._check(layer)
        self._refuse_schedule("state", "run the network with annotation off, and ask that Run")
        if self._is_on_tape:
            return self._output(layer)
        if not self._pieces:
            return self._held[0] if annotate_tape() else self._function(self.net.Y.values(self.initial))
        piece = self._piece(layer)
        return self._function(piece.state(layer - piece.first))

    def states(self) -> Iterator[fd.Function]:
        """f(t_0), .., f(t_L), one after the other, at the cost of one pass; `state` starts anew each time.

        Raises
        ------
        RuntimeError
            As of `state`.
        """
        self._refuse_schedule("states", "run the network with annotation off, and ask that Run")
        if self._is_on_tape:
            yield from map(self.state, range(self.net.layers + 1))
            return
        yield self.state(0)
        f = None
        for piece in self._pieces:
            for f in piece.states(f):
                yield self._function(f)

    @property
    def _is_recorded(self) -> bool:
        return bool(self._pieces) and self._pieces[0].block is not None

    @property
    def _is_on_tape(self) -> bool:
        """Whether the run was recorded on the working tape, and that annotates."""
        return annotate_tape() and self._is_recorded and self._pieces[0].block in get_working_tape().get_blocks()

    def _output(self, layer: int) -> fd.Function:
        """f(t_l) as an output of the Block of its layers, which gets that output at the first call."""
        if self._by_coefficients:
            raise RuntimeError(
                f"state: this run was recorded for what psi sees alone, so that f(t_{layer}) is on no tape; record "
                f"`LearningProblem.evaluate()` or `ResidualNetwork.run` yourself, or ask for a value while annotation is off"
            )
        if layer not in self._held:
            piece = self._piece(layer)
            self._held[layer] = self._function(piece.state(layer - piece.first))
            piece.segment.observe(layer - piece.first)
            piece.block.add_last_output(self._held[layer])
        self._handed_out.add(layer)
        return self._held[layer]

    def costate(self, layer: int) -> fd.Function:
        """r(t_l), l = 0 .. L: the adjoint value of f(t_l) on the tape, as its representative in the label measure.

        It belongs to the functional J that was differentiated last, in the sign of section 4.1, where J is minimised. For
        J = 1/2 int (f(T) - ftilde)^2 it is the discrete network's r of (4.2), with r(T) = f(T) - ftilde. Where J has a term in
        f(t_l) itself, r jumps there, and this is its value on the left.

        Raises
        ------
        ValueError
            If there is no such layer, or ranks ask for different ones.
        RuntimeError
            If the run was not recorded, or no derivative of its latest evaluation passed this layer; or if it was
            recorded under a schedule of checkpoints.
        """
        self._check(layer)
        self._refuse_schedule("costate", "record without checkpoints; r(0) is the gradient in f_I (learn='both')")
        if not self._is_recorded:
            raise RuntimeError("costate: this run has no layer on a tape; record it (annotation was off)")
        r = self._piece(layer, ending=layer in self._handed_out).costate(layer)
        if r is None:
            raise RuntimeError(
                f"costate: no derivative has reached t_{layer} since the latest evaluation; call derivative() of a "
                f"functional of this run, with controls in layer {layer} or below"
            )
        return self._function(r)

    def tangent(self, direction: fd.Function) -> fd.Function:
        """F'(f_I) v: the derivative of the final state in a direction v of the initial one; recorded while annotating.

        It is exact for the discrete network, and can be differentiated once: a loss may contain it (`Derivatives`). For a
        recorded run it is the derivative at the tape's values.

        Parameters
        ----------
        direction
            v, a Function of the space of `initial`.

        Raises
        ------
        TypeError, ValueError
            If `direction` does not fit.
        RuntimeError
            If a tape annotates on which the run is not, or as of `state`.
        """
        self._refuse_schedule("tangent", "record it without one")
        self.net.Y.check_batch(direction, "direction")
        if direction.function_space() != self._space:
            raise ValueError(f"direction: expected a Function of {self._space}, got {direction.function_space()}")
        if not self._pieces:
            return direction
        if annotate_tape() and not self._is_on_tape:
            raise RuntimeError(
                "tangent: this run is not on the tape that annotates; record the run there too, or ask while annotation is off"
            )
        segments = self._new_segments(self._space)
        if not self._is_recorded:
            v = self.net.Y.values(direction)
            for piece, segment in zip(self._pieces, segments):
                v = TangentSegment(segment).forward([piece.at_start(), v, *piece.coefficients], save=False)
            return self._function(v)
        fields = self._new_segments(self._space) if self._by_coefficients else []
        for k, (piece, segment) in enumerate(zip(self._pieces, segments)):
            piece.block.refuse_changed("tangent")
            start, *coefficients = piece.block.get_dependencies()
            if piece.before is None:
                f = start
            else:  # no Function holds f here
                f = apply(fields[k - 1], [f, *self._pieces[k - 1].block.get_dependencies()[1:]])[0]
            direction = apply(TangentSegment(segment), [f, direction, *coefficients])[0]
        return direction

    def _refuse_schedule(self, what: str, instead: str) -> None:
        if self._pieces is None:
            raise RuntimeError(
                f"{what}: this run was recorded under a schedule of checkpoints, which keeps no fields inside of the "
                f"network; {instead}"
            )

    def _piece(self, layer: int, ending: bool = False) -> Piece:
        """The piece of a layer time: at an interface the piece that starts there, or with `ending` the one that ends."""
        found = [piece for piece in self._pieces if piece.first <= layer <= piece.end]
        return found[0 if ending else -1]

    def _check(self, layer: int) -> None:
        same(self.net.Y.comm, layer=layer)
        integer("layer", layer, least=0, most=self.net.layers)

    def _function(self, values: np.ndarray) -> fd.Function:
        function = fd.Function(self._space)
        self.net.Y.write(function, values)
        return function
