"""One solution of (2.8): its states, its co-states, and its derivative in a direction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import firedrake as fd
import numpy as np
from mpi4py import MPI
from pyadjoint import AdjFloat

from fem_resnet.blocks import OperatorBlock, apply
from fem_resnet.coefficient_segment import CoefficientSegment
from fem_resnet.layer import LayerTrace
from fem_resnet.segment import Segment, TangentSegment
from fem_resnet.space_basis import Replicated

__all__ = ["Piece", "Run"]


@dataclass
class Piece:
    """What a run keeps of one segment: on the tape the Block knows the latest evaluation, else the traces are ours.

    Where the start is held by its coefficients, f there follows from the piece before.
    """

    segment: Segment
    start: fd.Function
    coefficients: list[fd.Function]
    traces: list[LayerTrace]
    block: OperatorBlock | None
    before: Piece | None = None

    def state(self, layers: int) -> np.ndarray:
        return self.segment.advance(self._start(), self._traces()[:layers])

    def states(self, before: np.ndarray | None) -> Iterator[np.ndarray]:
        """f at the ends of all layers, each from that before; `before`, that at the start, where the start has not f."""
        f = self._start() if self.before is None else before
        for trace in self._traces():
            f = self.segment.advance(f, [trace])
            yield f

    def _traces(self) -> list[LayerTrace]:
        return self.traces if self.block is None else self.segment.traces()

    def _start(self) -> np.ndarray:
        if self.before is not None:
            return self.before.state(len(self.before.segment.steppers))
        start = self.start if self.block is None else self.block.get_dependencies()[0].saved_output
        return self.segment.values.read(start)

    def costate(self, layers: int) -> np.ndarray | None:
        # What waits for the garbage collector may keep an adjoint value alive on some ranks only.
        current = self.start.function_space().mesh().comm.allreduce(self.block.adjoint_is_current, op=MPI.LAND)
        return self.segment.costate(layers) if current else None


class Run:
    """One solution of (2.8).

    On the tape, states and co-states are those of the tape's latest evaluation and derivative.

    Attributes
    ----------
    net : ResidualNetwork
        The network that was run.
    initial : Function
        f_I.
    cost : AdjFloat
        The running cost, weighted over the samples, where the run was given one; else 0.
    omega : numpy.ndarray or None
        These weights; the next evaluation on the tape takes what they are then.
    """

    def __init__(
        self,
        net,
        initial: fd.Function,
        end: fd.Function,
        pieces: list[Piece] | None,
        cost: AdjFloat | float = 0.0,
        omega: np.ndarray | None = None,
    ):
        self.net = net
        self.initial = initial
        self.cost = cost
        self.omega = omega
        self._pieces = pieces
        self._by_coefficients = bool(pieces) and isinstance(pieces[-1].segment, CoefficientSegment)
        self._end = end

    @property
    def final(self) -> fd.Function:
        """f(T); differentiate functionals of it.

        Where the network was run for what psi sees alone, it is `state(L)`, of the latest evaluation, which no tape knows.
        """
        return self.state(self.net.layers) if self._by_coefficients else self._end

    @property
    def coefficients(self) -> tuple[fd.Function, Replicated] | None:
        """What holds g(T), and its slot, where the network was run for what psi sees alone; differentiate functionals of it."""
        return (self._end, self._pieces[-1].segment.output) if self._by_coefficients else None

    def state(self, layer: int) -> fd.Function:
        """f(t_l), l = 0 .. L, rebuilt from the nearest segment's start by (3.3): a new Function.

        Raises
        ------
        RuntimeError
            If the run was recorded under a schedule of checkpoints.
        """
        self._check(layer)
        self._refuse_schedule("state", "run the network with annotation off, and ask that Run")
        if not self._pieces:
            return self._function(self.initial.dat.data_ro)
        piece, inside = self._locate(layer)
        return self._function(piece.state(inside))

    def states(self) -> Iterator[fd.Function]:
        """f(t_0), .., f(t_L), one after the other: each layer is gone through once, where `state` starts anew each time.

        Raises
        ------
        RuntimeError
            If the run was recorded under a schedule of checkpoints.
        """
        self._refuse_schedule("states", "run the network with annotation off, and ask that Run")
        yield self.state(0)
        f = None
        for piece in self._pieces:
            for f in piece.states(f):
                yield self._function(f)

    def costate(self, layer: int) -> fd.Function:
        """r(t_l), l = 0 .. L: the adjoint value of f(t_l) on the tape, as its representative in the label measure.

        It is that of the functional last differentiated, in the sign of section 4.1 (J is minimised): for
        J = 1/2 int (f(T) - ftilde)^2 it is the discrete network's r of (4.2), r(T) = f(T) - ftilde.

        Raises
        ------
        RuntimeError
            If the run was not recorded, or no derivative of its latest evaluation passed this layer; or if it was
            recorded under a schedule of checkpoints.
        """
        self._check(layer)
        self._refuse_schedule("costate", "record without checkpoints; r(0) is the gradient in f_I (learn='both')")
        if not self._pieces or self._pieces[0].block is None:
            raise RuntimeError("costate: this run has no layer on a tape; record it (annotation was off)")
        piece, inside = self._locate(layer)
        r = piece.costate(inside)
        if r is None:
            raise RuntimeError(
                f"costate: no derivative has reached t_{layer} since the latest evaluation; call derivative() of a "
                f"functional of this run, with controls in layer {layer} or below"
            )
        return self._function(r)

    def tangent(self, direction: fd.Function) -> fd.Function:
        """F'(f_I) v: the derivative of the final state in a direction v of the initial one; recorded while annotating.

        Exact for the discrete network, and differentiable itself, once: a loss may have it (`objective.Derivatives`). Of a
        recorded run it is that at the tape's values.

        Parameters
        ----------
        direction
            v, a Function of the space of `initial`.

        Raises
        ------
        TypeError, ValueError
            If `direction` does not fit.
        """
        self._refuse_schedule("tangent", "record it without one")
        self.net.Y.check_batch(direction, "direction")
        space = self.initial.function_space()
        if direction.function_space() != space:
            raise ValueError(f"direction: a Function of {space} is wanted, {direction.function_space()} was given")
        fields = self.net._new_segments(space) if self._by_coefficients else []
        for k, (piece, segment) in enumerate(zip(self._pieces, self.net._new_segments(space))):
            if piece.before is None:
                f = piece.start
            else:  # no Function holds f here
                f = apply(fields[k - 1], [f, *piece.before.coefficients])[0]
            direction = apply(TangentSegment(segment), [f, direction, *piece.coefficients])[0]
        return direction

    def _refuse_schedule(self, what: str, instead: str) -> None:
        if self._pieces is None:
            raise RuntimeError(
                f"{what}: this run was recorded under a schedule of checkpoints, which keeps no fields inside of the "
                f"network; {instead}"
            )

    def _locate(self, layer: int) -> tuple[Piece, int]:
        # An interface belongs to the segment that it starts, where the state needs no rebuilding; T to the last one.
        index = min(layer // self.net.layers_per_block, len(self._pieces) - 1)
        return self._pieces[index], layer - index * self.net.layers_per_block

    def _check(self, layer: int) -> None:
        if not isinstance(layer, (int, np.integer)) or not 0 <= layer <= self.net.layers:
            raise ValueError(f"layer: an integer from 0 to L = {self.net.layers} is wanted, {layer!r} was given")

    def _function(self, values: np.ndarray) -> fd.Function:
        function = fd.Function(self.initial.function_space())
        function.dat.data_wo[...] = values.reshape(function.dat.data_wo.shape)
        return function
