"""Parameters: a space basis times a time basis.

The bias a(y, t) and the kernel b(y, z, t) are both of the form

    p(t) = sum_k theta_k(t) E c_k,

with the functions theta_k of a time basis (`time_basis`) and coefficients c_k in space, each held in a Firedrake Function that
is a control. E gives what a layer takes (`space_basis`): the values at the nodes for a bias, the matrix beta for a kernel.
Each c_k may have a space basis of its own, E = E_k, so that layers differ in their bases. In the measure of label domain and
time, lumped in t, the inner product of coefficients is

    (c_k, d_k) = tau_k <R_k c_k, d_k>,      tau_k = int_0^T theta_k dt,

with R_k of the space basis (M; a Gram matrix; a pair of these). Every Control carries the Riesz map R_k^-1 / tau_k.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import firedrake as fd
import numpy as np
from mpi4py import MPI
from pyadjoint import Control
from pyadjoint.block_variable import BlockVariable
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import flag, instance, integer, real_array, text
from fem_resnet.fixed import OnMesh
from fem_resnet.parameters.space_basis import Replicated, SpaceBasis, new_cofunction
from fem_resnet.parameters.time_basis import PointInTime, TimeBasis
from fem_resnet.ranks import same, watched

__all__ = ["Parameter"]


class Parameter(OnMesh):
    """A function that can be learned, such as the bias or the kernel: coefficients c_k in space for each function in time.

    Collective over the communicator of the label domain.

    Parameters
    ----------
    name
        How messages, files and Functions call it.
    space_basis
        The basis in space: one for all layers, or a list with one a layer.
    time_basis
        The basis in time. Layers on which one of its functions is active have the same basis in space.
    functions
        The Functions that hold the coefficients; new ones if left out.
    penalised
        Whether regularisers act on it: (2.11) and (4.6) have a, b, W and mu.

    Attributes
    ----------
    space_bases : tuple of SpaceBasis
        The basis in space of each c_k.
    functions : tuple of Function
        The coefficients c_k, zero at first. Assign to them, or use `set`.

    Raises
    ------
    TypeError
        If an argument is of another kind.
    ValueError
        If layers of different bases in space share coefficients, if there are not as many bases and Functions as functions in
        time, or if an argument differs between ranks.
    """

    _instead = "`set` gives it other coefficients"

    def __init__(
        self,
        name: str,
        space_basis: SpaceBasis | Sequence[SpaceBasis],
        time_basis: TimeBasis | PointInTime,
        functions: Sequence[fd.Function] | None = None,
        penalised: bool = True,
    ):
        one = isinstance(space_basis, SpaceBasis)
        bases: Sequence[SpaceBasis] = [space_basis] if isinstance(space_basis, SpaceBasis) else space_basis
        instance("space_basis", bases, (list, tuple), "give a list, or one basis for all layers")
        for basis in bases:
            instance("space_basis", basis, SpaceBasis)
        instance("time_basis", time_basis, (TimeBasis, PointInTime))
        self._comm = bases[0].Y.comm if bases else None
        same(self._comm, name=name, functions=functions, penalised=penalised)
        self.name = text("name", name)
        self.penalised = flag("penalised", penalised)
        self.time_basis = time_basis
        self._space_basis = space_basis
        self.space_bases: tuple[SpaceBasis, ...] = (
            (bases[0],) * len(time_basis.measures) if one else tuple(_of_time_functions(name, bases, time_basis))
        )
        if functions is not None:
            _check_functions(functions, self.space_bases)
        self._functions = tuple(
            [fd.Function(basis.space, name=f"{name}_{k}") for k, basis in enumerate(self.space_bases)]
            if functions is None
            else functions
        )

    def __repr__(self) -> str:
        kinds = ", ".join(sorted({type(basis).__name__ for basis in self.space_bases}))
        return f"Parameter({self.name}, {kinds}, {len(self.functions)} in time)"

    def __deepcopy__(self, memo: Mapping) -> Parameter:
        if type(self) is not Parameter:
            raise TypeError(f"deepcopy: expected a Parameter of its own, {self!r} is a part of its network; copy the network")
        with stop_annotating():
            functions = [function.copy(deepcopy=True) for function in self.functions]
        return Parameter(self.name, self._space_basis, self.time_basis, functions, self.penalised)

    @property
    def functions(self) -> tuple[fd.Function, ...]:
        return self._functions

    @property
    def space_basis(self) -> SpaceBasis:
        """The basis in space, where it is one for all times.

        Raises
        ------
        ValueError
            If layers have bases of their own; `space_bases` has them.
        """
        if isinstance(self._space_basis, SpaceBasis):
            return self._space_basis
        if any(basis is not self.space_bases[0] for basis in self.space_bases):
            raise ValueError(f"space_basis: expected one for all layers, {self.name} has one in each; space_bases lists them")
        return self.space_bases[0]

    @property
    def learned(self) -> Parameter:
        """The parameter that is learned: itself, unless it is made of other controls (`kernel_sets`)."""
        return self

    def acting(self) -> Parameter:
        """The parameter that layers and regularisers see: itself, or the kernel that is made of it. Collective."""
        return self

    @property
    def dim(self) -> int:
        """Number of coefficients in all, over all ranks."""
        return sum(function.function_space().dim() for function in self.functions)

    def get(self, k: int) -> np.ndarray:
        """A copy of the coefficients c_k, of the space basis's `shape`. Collective.

        Nodal values are those of the owned nodes, shape (nodes,); others are the same on every rank.

        Parameters
        ----------
        k
            Number of the function in time, from 0.

        Raises
        ------
        ValueError
            If there are no coefficients of that number, or k differs between ranks.
        """
        return self.read(self._number(k))

    def set(self, k: int, coefficients: np.ndarray) -> None:
        """Assign coefficients c_k. Collective.

        Parameters
        ----------
        k
            Number of the function in time, from 0.
        coefficients
            Of the shape that `get` gives; unless they are nodal values, the same on every rank.

        Raises
        ------
        TypeError, ValueError
            If there are no coefficients of that number, or the given ones are no finite real numbers, have another shape, or
            differ between ranks; on all ranks alike.
        """
        replicated = (
            isinstance(k, (int, np.integer)) and 0 <= k < len(self.space_bases) and isinstance(self.space_bases[k], Replicated)
        )
        k = self._number(k, **({"coefficients": coefficients} if replicated else {}))
        basis = self.space_bases[k]
        self.write(k, real_array(f"coefficients of {self.name}_{k}", coefficients, basis.shape, comm=self._comm))

    def _number(self, k: int, **others: Any) -> int:
        """The number of a function in time, from outside, compared on all ranks with other arguments."""
        same(self._comm, k=k, **others)
        if not self.space_bases:
            raise ValueError(f"k: expected none, as {self.name} has no coefficients, got {k!r}")
        return integer("k", k, least=0, most=len(self.space_bases) - 1)

    def read(self, k: int) -> np.ndarray:
        """As `get`, of the same shape, without checks: for the package's own arguments. Collective."""
        return self.space_bases[k].read(self.functions[k])

    def write(self, k: int, coefficients: np.ndarray) -> None:
        """As `set`, without checks: for the package's own arguments.

        Parameters
        ----------
        k
            Number of the function in time.
        coefficients
            Of the shape that `read` gives.
        """
        self.space_bases[k].write(self.functions[k], coefficients)

    def controls(self) -> list[Control]:
        """One Control of pyadjoint's for each function in time, with the Riesz map of label domain and time."""
        return [_Control(function, riesz_map=self._riesz_map(k)) for k, function in enumerate(self.functions)]

    def riesz_map(self, k: int) -> Callable[[fd.Cofunction], fd.Function]:
        """The map from functionals of c_k (Cofunctions) to gradients, `d -> R^-1 d / tau_k`. Collective.

        Raises
        ------
        ValueError
            If there are no coefficients of that number, or k differs between ranks.
        """
        return self._riesz_map(self._number(k))

    def _riesz_map(self, k: int) -> Callable[[fd.Cofunction], fd.Function]:
        basis, measure = self.space_bases[k], self.time_basis.measures[k]

        def riesz_map(functional: fd.Cofunction) -> fd.Function:
            gradient = fd.Function(basis.space)
            basis.write(gradient, basis.riesz(basis.read(functional)) / measure)
            return gradient

        return riesz_map

    def inner(self, k: int, c: np.ndarray, d: np.ndarray) -> float:
        """`tau_k <R c, d>`, the inner product of two sets of coefficients of the function k in time. Collective.

        Parameters
        ----------
        k
            Number of the function in time, from 0.
        c, d
            Coefficients, of the shape that `get` gives.

        Raises
        ------
        TypeError, ValueError
            If `set` would refuse k, c or d.
        """
        k = self._number(k)
        basis = self.space_bases[k]
        if isinstance(basis, Replicated):
            same(self._comm, c=c, d=d)
        c, d = (real_array(name, value, basis.shape, comm=self._comm) for name, value in (("c", c), ("d", d)))
        return self.pair(k, c, d)

    def pair(self, k: int, c: np.ndarray, d: np.ndarray) -> float:
        """As `inner`, without checks: for the package's own arguments. Collective.

        Parameters
        ----------
        k
            Number of the function in time.
        c, d
            Coefficients, of the shape that `read` gives.
        """
        basis = self.space_bases[k]
        return self.time_basis.measures[k] * basis.pair(basis.functional(c), d)

    def on_layer(self, layer: int) -> SpaceBasis:
        """The basis in space of the coefficients that are active on a layer, numbered from 0; of a parameter over layers."""
        return self.space_bases[cast("TimeBasis", self.time_basis).active(layer)[0]]


def _check_functions(functions: Sequence[fd.Function], bases: Sequence[SpaceBasis]) -> None:
    instance("functions", functions, (list, tuple))
    if len(functions) != len(bases):
        raise ValueError(f"functions: expected {len(bases)} Functions, one a function in time, got {len(functions)}")
    for function, basis in zip(functions, bases):
        if instance("functions", function, fd.Function).function_space() != basis.space:
            raise ValueError(f"functions: expected a Function of {basis.space}, got one of {function.function_space()}")


def _with_checkpoint(checkpoint: object) -> BlockVariable:
    variable = BlockVariable(None)
    variable.checkpoint = checkpoint
    return variable


def _references(variable: BlockVariable) -> int:
    return sys.getrefcount(variable.checkpoint)


#: The number of references to a checkpoint that the tape alone holds; it differs between versions of Python.
_OWN_REFERENCES = _references(_with_checkpoint(object()))


class _Control(Control):
    """pyadjoint's Control, with one new Function an evaluation in place of five: with few nodes, making them costs most."""

    def update(self, value):
        if self._may_overwrite(value):
            self.block_variable.checkpoint.dat.data_wo[...] = value.dat.data_ro
        else:
            super().update(value)

    def _may_overwrite(self, value: object) -> bool:
        """Whether the tape has a Function for such values that no Block made and that nobody else holds. Collective."""
        variable = self.block_variable
        if not (
            variable.creation_timestep == -1
            and isinstance(variable.checkpoint, fd.Function)
            and isinstance(value, fd.Function)
            and value.function_space() is variable.checkpoint.function_space()
        ):
            return False
        # All ranks make a new Function, or none does: objects that wait for the garbage collector may hold it on some ranks.
        alone = _references(variable) == _OWN_REFERENCES
        return watched(value.function_space().mesh().comm).allreduce(alone, op=MPI.LAND)

    def get_derivative(self, apply_riesz=False):
        functional = self.block_variable.adj_value
        if apply_riesz or not isinstance(functional, fd.Cofunction):
            return super().get_derivative(apply_riesz)
        unshared = getattr(self.block_variable, "unshared", None)
        if unshared is not None and unshared() is functional:  # a Block made it for this, and nothing else reads it
            self.block_variable.unshared = None
            return functional
        values, owned = np.zeros(functional.dat.shape), functional.dat.data_ro
        values[: len(owned)] = owned
        return new_cofunction(functional.function_space(), values)


def _of_time_functions(name: str, bases: Sequence[SpaceBasis], time_basis: TimeBasis | PointInTime) -> list[SpaceBasis]:
    """The basis in space of each function in time, from the bases of the layers where it is active."""
    if not isinstance(time_basis, TimeBasis):
        raise TypeError(
            f"time_basis: expected a TimeBasis, as layers have bases in space of their own, got {type(time_basis).__name__}"
        )
    first: dict[int, int] = {}
    for layer, basis in enumerate(bases):
        for k in time_basis.active(layer):
            other = first.setdefault(k, layer)
            if bases[other] is not basis:
                raise ValueError(
                    f"{name}_in_time: layers {other} and {layer} share coefficients of {name}, but have different "
                    f'bases in space; give both one basis, or coefficients of their own ("layers")'
                )
    if sorted(first) != list(range(len(time_basis.measures))):
        raise ValueError(f"space_basis: expected one basis, or one a layer, got {len(bases)}")
    return [bases[first[k]] for k in range(len(time_basis.measures))]
