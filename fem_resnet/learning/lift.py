"""Lifts: the initial state of a network with channels as a learned combination of given fields.

    f_I,c(y) = sum_m V_cm u_m(y),         m = 1 .. number of fields

V is a matrix of numbers and knows no place on Y, so it commutes with every map of Y. Where a map R acts with signs, on
channel c by s_c and on field m by s_m, a lift keeps the symmetry if V_cm = 0 for s_c != s_m; then only the other entries are
learned. With the co-state r,

    dJ/dV_cm = sum_s int r_c(y, 0) u_m(y) dy.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import firedrake as fd
import numpy as np
import scipy.sparse
import ufl

from fem_resnet.arguments import choice, instance, integer, integer_array, number
from fem_resnet.fixed import OnMesh, read_only
from fem_resnet.label_domain.channels import Channels
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.parameters.equivariant import Parity
from fem_resnet.parameters.kernel_sets import MatrixControls
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import BatchValues, SpaceBasis
from fem_resnet.parameters.subspace import Within
from fem_resnet.parameters.time_basis import Once
from fem_resnet.ranks import same
from fem_resnet.tape.recording import apply

__all__ = ["FreeEntries", "Lift"]


@dataclass(frozen=True)
class FreeEntries:
    """What symmetries leave free of a lift.

    Attributes
    ----------
    allowed : numpy.ndarray
        Which entries of V need not be 0, shape (C, number of fields), bool.
    """

    allowed: np.ndarray


class Lift(OnMesh):
    """The initial state `f_I,c = sum_m V_cm u_m` in the channels of a network, from given fields u_m on Y.

    Everything is collective over the communicator of the label domain. A `LearningProblem` that has a lift takes the fields
    as inputs of its batch, and learns V.

    Parameters
    ----------
    Y
        The label domain of the network, with C channels or one.
    fields
        How many fields there are. The inputs are batches on `fields` below.
    symmetries
        Symmetries of Y that the lift keeps, as for `Symmetric`. Each `Parity` forbids entries between a channel of one sign
        and a field of another: its `inputs` are the signs of the fields. What has no signs forbids nothing.

    Attributes
    ----------
    fields : LabelSpace
        The label domain of the inputs: that of one channel for one field, else one with a channel a field.
    V : Parameter
        V, shape (C, number of fields); with symmetries that forbid some entries the others, shape (count,). `matrix` is V
        itself. At first each field stands in a channel of its own, the first whose sign fits, as `Channels.join` puts it.
    kept : FreeEntries
        The entries of V that the symmetries allow.

    Raises
    ------
    TypeError, ValueError
        If an argument is of another kind, or differs between ranks; if there is not one sign a channel, or a field; or if
        there is a field that no channel may take.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Channels, LabelSpace
    >>> Y = Channels(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 3)
    >>> lift = Lift(Y, 2)
    >>> lift.matrix().tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    >>> u = lift.fields.batch([[1.0, 2.0]] * lift.fields.nodes)  # two samples
    >>> lift(u).function_space() == Y.batch_space(2)
    True
    """

    def __init__(self, Y: LabelSpace, fields: int = 1, *, symmetries: Sequence[Any] | FreeEntries = ()):
        check_label_space(Y)
        self.Y, count = Y, integer("fields", fields)
        if not isinstance(symmetries, FreeEntries):
            kinds = ["a field" if isinstance(each, ufl.core.expr.Expr) else each for each in _listed(symmetries)]
            same(Y.comm, fields=fields, symmetries=kinds)
            symmetries = FreeEntries(read_only(self._entries(Y, count, symmetries)))
        self.kept, allowed = symmetries, symmetries.allowed
        self.fields = Y.one if count == 1 else Channels(Y.one, count)
        whole: SpaceBasis = MatrixControls(Y, allowed.shape)
        if not allowed.all():
            places = np.flatnonzero(allowed)
            ones = (np.ones(places.size), (places, np.arange(places.size)))
            whole = Within(whole, scipy.sparse.csc_array(ones, shape=(allowed.size, places.size)))
        self.V = Parameter("V", whole, Once())
        self.start()

    @staticmethod
    def _entries(Y: LabelSpace, count: int, symmetries: Sequence[Any]) -> np.ndarray:
        """Which entries of V symmetries allow, shape (channels, fields)."""
        allowed = np.ones((Y.channels, count), bool)
        for n, parity in enumerate(symmetries):
            if not isinstance(parity, Parity):
                continue
            signs = np.broadcast_to(parity.inputs, count) if np.size(parity.inputs) == 1 else np.asarray(parity.inputs)
            for name, given, expected in (("signs", parity.signs, Y.channels), ("inputs", signs, count)):
                if len(given) != expected:
                    what = "a channel" if name == "signs" else "a field"
                    raise ValueError(f"symmetries[{n}].{name}: expected {expected}, one {what}, got {len(given)}")
            allowed &= np.equal.outer(parity.signs, signs)
        if not allowed.any(axis=0).all():
            lost = int(np.flatnonzero(~allowed.any(axis=0))[0])
            raise ValueError(
                f"symmetries: expected a channel with the signs of each field, got none for field {lost}; give a channel them"
            )
        return allowed

    def __repr__(self) -> str:
        return f"Lift({self.kept.allowed.shape[1]} fields into {self.Y!r})"

    def __deepcopy__(self, memo: dict) -> Lift:  # type: ignore[override]  # `copy` hands over a dict
        other = self.__copy__()
        vars(other).update(V=copy.deepcopy(self.V, memo))
        return other

    @property
    def parameters(self) -> list[Parameter]:
        """V alone."""
        return [self.V]

    def matrix(self) -> np.ndarray:
        """V, shape (C, number of fields). Collective."""
        return self.V.space_basis.whole(self.V.read(0))

    def start(self, rule: str = "apart", seed: int = 0, *, gain: float = 1.0) -> None:
        """Give V starting values. Collective.

        Parameters
        ----------
        rule
            - "apart": `gain` times 1 for each field in a channel of its own, the first one that it may stand in; 0 elsewhere.
              Where there are not as many channels, several fields share one.
            - "random": random numbers, each with the mean square gain^2 / (number of fields), so that channels are as large
              as fields.
        seed
            Of random numbers: the same on any number of ranks.
        gain
            The factor of V; no unit, as fields and state have the same.

        Raises
        ------
        TypeError, ValueError
            If an argument does not fit, or differs between ranks.
        """
        same(self.Y.comm, rule=rule, seed=seed, gain=gain)
        choice("rule", rule, ("apart", "random"))
        random = np.random.default_rng(integer("seed", seed, least=0, most=np.inf))
        V = np.zeros(self.kept.allowed.shape)
        if rule == "random":
            _, count = self.kept.allowed.shape
            V = random.normal(size=self.kept.allowed.shape) / np.sqrt(count)
        else:
            taken: list[int] = []
            for m, allowed in enumerate(self.kept.allowed.T):
                channels = np.flatnonzero(allowed)
                taken.append(next((int(c) for c in channels if c not in taken), int(channels[0])))
                V[taken[-1], m] = 1.0
        basis = self.V.space_basis
        self.V.write(0, basis.of_whole(number("gain", gain) * V))

    def __call__(self, u: fd.Function) -> fd.Function:
        """f_I, a batch on the network's label domain, for a batch of fields; recorded while annotating. Collective.

        Parameters
        ----------
        u
            A Function or batch on `fields`.

        Raises
        ------
        TypeError, ValueError
            If it is none.
        """
        self.fields.check_where(u, "u")
        return self.of_fields(u)

    def of_fields(self, u: fd.Function) -> fd.Function:
        """As `__call__`, for fields that are known to live there. Collective."""
        self.fields.check_values(u, "u")
        return apply(_LiftOperator(self, u.function_space()), [u, self.V.functions[0]])[0]

    def on(self, Y: LabelSpace) -> Lift:
        """The same lift for the network on another label space of the same Y (`ResidualNetwork.on`). Collective.

        Raises
        ------
        TypeError, ValueError
            If `Y` is no label space, or has another number of channels.
        """
        check_label_space(Y)
        if Y.channels != self.Y.channels:
            raise ValueError(f"on: expected a label space with {self.Y.channels} channels, got {Y!r}")
        lift = Lift(Y, self.kept.allowed.shape[1], symmetries=self.kept)
        lift.V.write(0, self.V.read(0))
        return lift


def _listed(symmetries: Sequence[Any]) -> Sequence[Any]:
    """Symmetries from outside."""
    for n, each in enumerate(instance("symmetries", symmetries, (list, tuple), "a list of them")):
        if not (isinstance(each, (Parity, ufl.core.expr.Expr)) or callable(each)):
            integer_array(f"symmetries[{n}]", each, ("points",))  # a permutation
    return symmetries


class _LiftOperator:
    """From the values of fields, and V, to those of f_I: bilinear."""

    ready = True

    def __init__(self, lift: Lift, space: fd.functionspaceimpl.WithGeometry):
        self._basis, self._sum = lift.V.space_basis, lift.Y.sum
        fields = BatchValues(lift.fields, space)
        self.inputs = [fields, self._basis]
        self.output = BatchValues(lift.Y, lift.Y.batch_space(fields.samples))

    @staticmethod
    def _combined(V: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The combinations V of the channels of values at the nodes."""
        rows, channels = V.shape
        return (V @ values.reshape(channels, -1)).reshape(rows * (len(values) // channels), values.shape[1])

    def _products(self, functional: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The functional of what V is made of: integrals of each channel of a functional with each field. Collective."""
        channels, fields = (slot.Y.channels for slot in (self.output, self.inputs[0]))
        return self._basis.of_whole(self._sum(functional.reshape(channels, -1) @ values.reshape(fields, -1).T))

    def forward(self, arrays, save):
        u, V = arrays
        return self._combined(self._basis.whole(V), u)

    def adjoint(self, arrays, functional):
        u, V = arrays
        return [lambda: self._combined(self._basis.whole(V).T, functional), self._products(functional, u)]

    def tangent(self, arrays, directions):
        (u, V), (u_dot, V_dot) = arrays, directions
        return self.forward([u_dot, V], False) + self.forward([u, V_dot], False)

    def second_adjoint(self, arrays, directions, functional, functional_dot):
        (u, V), (u_dot, V_dot) = arrays, directions

        def of_fields():
            transposed, turned = (self._basis.whole(each).T for each in (V, V_dot))
            return self._combined(transposed, functional_dot) + self._combined(turned, functional)

        return [of_fields, self._products(functional_dot, u) + self._products(functional, u_dot)]
