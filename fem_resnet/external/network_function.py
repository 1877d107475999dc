"""A network and its head as one function of arrays, m = (f_I, coefficients) -> f(T) or O, with its derivatives.

Programs that know nothing of meshes and tapes call it wherever they like: it evaluates again where it is asked at another
point. With directions v, one array an input, and functionals l of the output it has

    value(m) = F(m),     tangent(m, v) = F'(m) v,     adjoint(m, l) = F'(m)^T l,     curvature(m, l, v) = (F''(m) v)^T l,

where transposes are those of plain sums over all numbers. The last is linear in v with a symmetric matrix, the Hessian of
<l, F>. All are exact for the discrete network.

On several ranks an array of values at nodes has those of the nodes that the rank owns. All other arrays are the same on every
rank: coefficients in bases, and scores of classes. A number on which such arrays act the same on every rank has its derivative
in them on every rank, and not a part of it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence

import firedrake as fd
import numpy as np
from mpi4py import MPI
from pyadjoint import ReducedFunctional, Tape, set_working_tape
from pyadjoint.tape import annotate_tape, continue_annotation, pause_annotation

from fem_resnet.arguments import instance, real_array
from fem_resnet.fixed import OnMesh
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.orthonormal import joint_span
from fem_resnet.learning.head import Head
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import BatchValues, Replicated, SpaceBasis, StateValues, read_all
from fem_resnet.parameters.time_basis import AtStart
from fem_resnet.ranks import same, together

__all__ = ["NetworkFunction", "check_head"]

#: For how many numbers of samples a function keeps what it has recorded.
_KEPT = 4


class NetworkFunction(OnMesh):
    """A network and its head as a function of arrays. Calls are collective over the communicator of the label domain.

    It has copies of both: it neither sees nor changes their coefficients, but for `take` and `give`.

    Parameters
    ----------
    net
        The network.
    head
        The head whose output O is the value; None for f(T).

    Attributes
    ----------
    net, head : ResidualNetwork, Head or None
        As given.
    names : tuple of str
        Names of the coefficients, such as "kernel_0", in the order of the arrays.
    slots : tuple of SpaceBasis
        How Functions hold them.
    replicated : tuple of bool
        For each of them, whether it is the same on every rank.
    shapes : tuple of tuple of int
        Their shapes on this rank.
    outputs : int
        How many numbers a sample has in the output on this rank: nodes, or classes.
    output_is_replicated : bool
        Whether the output is the same on every rank: scores of classes.
    """

    def __init__(self, net: ResidualNetwork, head: Head | None = None):
        self.head = check_head(head, net)
        self.net = net
        self._copies = copy.deepcopy(net), copy.deepcopy(head)
        self._recordings: OrderedDict[int, _Recording] = OrderedDict()
        parameters = _parameters(net, head)
        self.names = tuple(f"{p.name}_{k}" for p in parameters for k in range(len(p.functions)))
        self.slots: tuple[SpaceBasis, ...] = tuple(slot for p in parameters for slot in p.space_bases)
        self.replicated = tuple(isinstance(slot, Replicated) for slot in self.slots)
        self.shapes = tuple(slot.shape for slot in self.slots)
        self.output_is_replicated = head is not None and head.classes is not None
        self.outputs = net.Y.nodes if head is None else head.classes or head.Y.nodes

    @property
    def Y(self) -> LabelSpace:
        """The label domain of the network."""
        return self.net.Y

    def functions(self) -> list[fd.Function]:
        """The Functions in which network and head hold their coefficients."""
        return [function for parameter in _parameters(self.net, self.head) for function in parameter.functions]

    def take(self) -> list[np.ndarray]:
        """The coefficients that network and head have now, new arrays. Collective."""
        return self.read(self.functions())

    def give(self, coefficients: Sequence[np.ndarray]) -> None:
        """Assign coefficients to network and head. Collective.

        Parameters
        ----------
        coefficients
            As `take` gives them.

        Raises
        ------
        TypeError, ValueError
            If they are of another kind or shape, or not finite; on all ranks alike.
        """
        arrays = together(self.Y.comm, lambda: self._each("coefficients", coefficients, self.names, self.shapes))
        for number, (function, array) in enumerate(zip(self.functions(), arrays)):
            self.write(number, function, array)

    def read(self, functions: Sequence[fd.Function]) -> list[np.ndarray]:
        """The coefficients that Functions hold, new arrays. Collective."""
        return [np.array(array) for array in read_all(self.slots, functions)]

    def write(self, number: int, functional: fd.Function | fd.Cofunction, array: np.ndarray) -> None:
        """Make a Function or a Cofunction hold the array of the coefficients of that number."""
        self.slots[number].write(functional, array)

    def seen(self, coefficients: Sequence[np.ndarray]) -> Basis:
        """An orthonormal basis of all that layers and head see of f_I: F(m) changes with f_I by f_I itself and by these alone.

        Collective. The coefficients matter where psi is learned.
        """
        net, head = self._copies
        if net.factors:
            arrays = iter(coefficients)
            for parameter in _parameters(net, head):
                for k in range(len(parameter.functions)):
                    parameter.write(k, next(arrays))
        psis = [net.learned_factors().psi] if net.factors else net.bases["psi"]
        return joint_span(self.Y, [*psis, *([] if head is None else [head.psi])])

    def value(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """F(m), a new array of shape (outputs, samples). Collective.

        Parameters
        ----------
        arrays
            f_I, shape (nodes, samples), and the coefficients, of shapes `shapes`.

        Raises
        ------
        TypeError, ValueError
            If an array is of another kind or shape, a value is not finite, or ranks have different numbers of samples; on all
            ranks alike.
        StepFailure
            If a layer cannot be stepped.
        """
        return self._whole(self._at(self._checked("arrays", arrays)).value())

    def tangent(self, arrays: Sequence[np.ndarray], directions: Sequence[np.ndarray]) -> np.ndarray:
        """F'(m) v, a new array of shape (outputs, samples). Collective.

        Parameters
        ----------
        arrays, directions
            m and v, as for `value`.
        """
        m = self._checked("arrays", arrays)
        return self._whole(self._at(m).tangent(self._checked("directions", directions, m[0].shape[1])))

    def adjoint(self, arrays: Sequence[np.ndarray], functional: np.ndarray) -> list[np.ndarray]:
        """F'(m)^T l, new arrays of the shapes of m. Collective.

        Parameters
        ----------
        arrays, functional
            m, and l of shape (outputs, samples).
        """
        m = self._checked("arrays", arrays)
        return self._at(m).adjoint(self._functional(functional, m[0].shape[1]))

    def curvature(
        self, arrays: Sequence[np.ndarray], functional: np.ndarray, directions: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """(F''(m) v)^T l, new arrays of the shapes of m. Collective.

        Parameters
        ----------
        arrays, functional, directions
            m, l and v.
        """
        m = self._checked("arrays", arrays)
        samples = m[0].shape[1]
        l, v = self._functional(functional, samples), self._checked("directions", directions, samples)
        return self._at(m).curvature(l, v)

    def _at(self, arrays: Sequence[np.ndarray]) -> _Recording:
        samples = arrays[0].shape[1]
        if samples not in self._recordings:
            self._recordings[samples] = _Recording(*self._copies, samples)
        self._recordings.move_to_end(samples)
        if len(self._recordings) > _KEPT:
            self._recordings.popitem(last=False)
        self._recordings[samples].move_to(arrays)
        return self._recordings[samples]

    def _whole(self, values: np.ndarray) -> np.ndarray:
        """The output from its values on this rank: scores of classes are put together."""
        if not self.output_is_replicated:
            return np.array(values)
        scores = np.zeros((self.outputs, values.shape[1]))
        scores[self.head.Y.numbers] = values
        return self.head.Y.sum(scores)

    def _checked(self, name: str, arrays: Sequence[np.ndarray], samples: int | None = None) -> list[np.ndarray]:
        """Arrays from outside for f_I and all coefficients. That f_I is finite is asked where it is evaluated."""
        initial = (self.Y.nodes, "samples" if samples is None else samples)
        found = together(self.Y.comm, lambda: self._each(name, arrays, ("f_I", *self.names), (initial, *self.shapes)))
        same(self.Y.comm, **{name: found[0].shape[1]})
        return found

    def _each(self, name: str, arrays: Sequence[np.ndarray], names: Sequence[str], shapes: Sequence) -> list[np.ndarray]:
        if not isinstance(arrays, (list, tuple)) or len(arrays) != len(shapes):
            got = len(arrays) if isinstance(arrays, (list, tuple)) else type(arrays).__name__
            raise ValueError(f"{name}: expected a list of {len(shapes)} arrays, of {', '.join(names)}, got {got}")
        each = zip(names, arrays, shapes)
        return [real_array(f"{name}, {of}", array, shape, finite=of != "f_I") for of, array, shape in each]

    def _functional(self, functional: np.ndarray, samples: int) -> np.ndarray:
        """A functional of the output from outside: its part in the values on this rank."""
        l = real_array("functional", functional, (self.outputs, samples), comm=self.Y.comm)
        return l[self.head.Y.numbers] if self.output_is_replicated else l


class _Recording:
    """A network and its head on a tape of their own, for one number of samples."""

    def __init__(self, net: ResidualNetwork, head: Head | None, samples: int):
        self._comm = net.Y.comm
        state = Parameter("f", StateValues(net.Y, net.Y.batch_space(samples)), AtStart())
        learned = [state, *_parameters(net, head)]
        self._slots = [slot for parameter in learned for slot in parameter.space_bases]
        #: What the tape holds, after an evaluation.
        self._point: list[np.ndarray] | None = None
        #: From which functional the tape has adjoint values, and the functionals that these came to.
        self._functional: np.ndarray | None = None
        self._derivative: list[np.ndarray] = []
        for parameter in learned:
            for function in parameter.functions:
                function.clear_block_variable()  # that on the tape of another number of samples stays its own
        controls = [control for parameter in learned for control in parameter.controls()]
        was_annotating = annotate_tape()
        with set_working_tape(Tape()) as tape:
            continue_annotation()
            try:
                output = _record(net, head, state.functions[0])
            finally:
                if not was_annotating:
                    pause_annotation()
        self._output = BatchValues(net.Y if head is None else head.Y, output.function_space())
        self._reduced = ReducedFunctional(output, controls, tape=tape)

    def move_to(self, arrays: Sequence[np.ndarray]) -> None:
        """Evaluate at a point, unless the tape is there."""
        there = self._point is not None and all(map(np.array_equal, arrays, self._point))
        if self._comm.allreduce(there, op=MPI.LAND):
            return
        self._point = self._functional = None
        functions = self._functions(arrays)
        self._slots[0].Y.check_values(functions[0], "x")
        self._reduced(functions)
        self._point = [array.copy() for array in arrays]

    def _functions(self, arrays: Sequence[np.ndarray]) -> list[fd.Function]:
        functions = [fd.Function(slot.space) for slot in self._slots]
        for slot, function, array in zip(self._slots, functions, arrays):
            slot.write(function, array)
        return functions

    def _read(self, functionals: Sequence[fd.Cofunction]) -> list[np.ndarray]:
        return [np.array(array) for array in read_all(self._slots, functionals)]

    def value(self) -> np.ndarray:
        return self._output.read(self._reduced.functional.block_variable.saved_output)

    def tangent(self, directions: Sequence[np.ndarray]) -> np.ndarray:
        return self._output.read(self._reduced.tlm(self._functions(directions)))

    def adjoint(self, functional: np.ndarray) -> list[np.ndarray]:
        there = self._functional is not None and np.array_equal(functional, self._functional)
        if not self._comm.allreduce(there, op=MPI.LAND):
            cofunction = fd.Cofunction(self._output.space.dual())
            self._output.write(cofunction, functional)
            self._derivative = self._read(self._reduced.derivative(adj_input=cofunction))
            self._functional = functional.copy()
        return [array.copy() for array in self._derivative]

    def curvature(self, functional: np.ndarray, directions: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.adjoint(functional)  # a Hessian starts from the adjoint values on the tape
        return self._read(self._reduced.hessian(self._functions(directions)))


def _parameters(net: ResidualNetwork, head: Head | None) -> list[Parameter]:
    return [*net.parameters, *([] if head is None else head.parameters)]


def _record(net: ResidualNetwork, head: Head | None, initial: fd.Function) -> fd.Function:
    if head is not None and net.layers and net.steps_what_is_seen_by(head.psi):
        return head.of_coefficients(*net.solve(initial, seen_by=head.psi).held(net.layers))
    final = net.solve(initial).final
    return final if head is None else head.of_state(final)


def check_head(head: Head | None, net: ResidualNetwork) -> Head | None:
    """The head of a network from outside, or None.

    Raises
    ------
    TypeError
        If it is neither, or net is no network.
    ValueError
        If it reads states on another label domain.
    """
    instance("net", net, ResidualNetwork)
    if instance("head", head, (Head, type(None))) is not None and head.psi.Y is not net.Y:
        raise ValueError(f"head: expected a head that reads states on {net.Y!r}, got one of states on {head.psi.Y!r}")
    return head
