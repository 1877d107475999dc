"""A network as an external operator: N(u, coefficients) in the residual of a PDE in Firedrake, nonlocal in u.

    F(u; v) = 0,     F(u; v) = int grad u . grad v + N(u) v - g v dy

UFL differentiates the residual; where it comes to N, Firedrake asks this operator for N'(u) w, its transpose and, where a
matrix is asked for, N'(u) itself, and pyadjoint for the derivatives in the coefficients. The layers see u through few
functions, the columns of Z, orthonormal functions of the span of all psi and that of the head. Hence the Jacobian in u is of
low rank up to the identity,

    N'(u) = s I + U Z^T M,      s = 1 for N(u) = f(T), 0 with a head,

and U follows from as many tangents as Z has columns. As a matrix it is full: for many nodes let PETSc do without
("mat_type": "matfree").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import firedrake as fd
import numpy as np
import ufl
from firedrake.assemble import BaseFormAssembler
from firedrake.external_operators import AbstractExternalOperator, assemble_method
from firedrake.matrix import Matrix
from petsc4py import PETSc
from pyadjoint.tape import stop_annotating

from fem_resnet.external.network_function import NetworkFunction
from fem_resnet.external.solves import check_operand, complete_firedrake
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.learning.head import Head
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.parameters.space_basis import BatchValues, Slot
from fem_resnet.tape.recording import apply

__all__ = ["NetworkOperator", "network_operator"]

#: The largest number of nodes for which the Jacobian is assembled, as a full matrix: 1.2 GB.
LARGEST_MATRIX = 10_000


@supports("channels", "no_layers", "gradient_flow", *HELD, *STEPPED)
def network_operator(net: ResidualNetwork, u: fd.Function | ufl.Interpolate, head: Head | None = None) -> NetworkOperator:
    """N(u), a network applied to a function, for forms of UFL. Collective over the communicator of the label domain.

    Forms with it are assembled, differentiated (`derivative`) and solved (`solve(F == 0, u)`) as others are, and annotated by
    pyadjoint: the derivatives in u and in all that network and head learn, through solves of second order too. N has the
    coefficients that these have at the call, on the tape as elsewhere: make the form again after they have changed.

    Parameters
    ----------
    net
        The network.
    u
        The initial state, a Function of `net.Y.V` or a batch; or `interpolate(w, net.Y.V)` for an expression w in others.
    head
        The head whose output O is N(u), on any label space of the mesh; if left out, N(u) is f(T). Its prediction h is left
        to the form.

    Returns
    -------
    NetworkOperator
        A function of `net.Y.V`, or of `head.Y.V`, in UFL; of a batch a batch.

    Raises
    ------
    TypeError
        If net is no network, u no Function and no interpolation, or head no head.
    ValueError
        If u is on another mesh or space, or the head reads states on another label domain or scores classes; on all ranks
        alike.

    Examples
    --------
    >>> from firedrake import Function, FunctionSpace, TestFunction, UnitDiskMesh, dx, grad, inner, norm, solve
    >>> from fem_resnet import LabelSpace, ResidualNetwork, laplace_basis
    >>> V = FunctionSpace(UnitDiskMesh(2), "CG", 1)
    >>> net = ResidualNetwork(laplace_basis(LabelSpace(V), 3), layers=2)
    >>> net.start()
    >>> u, v = Function(V), TestFunction(V)
    >>> N = network_operator(net, u)
    >>> _ = solve(inner(grad(u), grad(v)) * dx + (N - 2) * v * dx == 0, u)
    >>> bool(abs(norm(net(u)) - norm(Function(V).assign(2))) < 1e-6)  # u is constant, and the network takes it to 2
    True
    """
    function = NetworkFunction(net, head)
    Y = net.Y
    Y.check_where(u, "u", (fd.Function, ufl.Interpolate))  # type: ignore[arg-type]  # one of these
    if head is not None and head.classes is not None:
        raise ValueError(f"head: expected an output on the mesh, a Basis in `onto`, got {head.classes} classes")
    output = Y if head is None else head.Y
    if output.V.mesh() is not Y.V.mesh():
        raise ValueError(f"head: expected an output on the mesh {Y.V.mesh()} of u, got one on {output.V.mesh()}")
    packing = _Packing(function)
    replicated, at_nodes = packing.parted(function.functions())
    packed = apply(packing, replicated)[0]
    samples = Y.samples(u.function_space())  # type: ignore[union-attr]  # Firedrake gives Interpolate this method
    return NetworkOperator(
        u, packed, *at_nodes,
        function_space=output.V if samples == 1 else output.batch_space(samples),
        operator_data={"function": function, "packing": packing},
    )  # fmt: skip


class _Spread(Slot):
    """Numbers that are the same on every rank, in a Function on the mesh of Y: the first of its values, cell after cell.

    UFL takes no coefficients of other meshes into a form, such as those of `Replicated` are.
    """

    def __init__(self, Y: LabelSpace, count: int):
        cells = fd.FunctionSpace(Y.V.mesh(), "DG", 0)
        self.Y, self.shape = Y, (count,)
        self.space = fd.VectorFunctionSpace(Y.V.mesh(), "DG", 0, dim=max(1, -(-count // cells.dim())))
        first, end = self.space.dof_dset.layout_vec.getOwnershipRange()
        self._own = slice(min(first, count), min(end, count))

    def read(self, function):
        mine = function.dat.data_ro.ravel()[: self._own.stop - self._own.start]
        return np.concatenate(self.Y.comm.allgather(mine))

    def write(self, function, array):
        values = function.dat.data_wo
        values[...] = 0.0
        flat = values.reshape(-1)
        flat[: self._own.stop - self._own.start] = array[self._own]
        values[...] = flat.reshape(values.shape)


class _Packing:
    """Coefficients as an operator on the tape: all that are the same on every rank -> one array of their numbers."""

    ready = True

    def __init__(self, function: NetworkFunction):
        self._replicated, self._shapes = function.replicated, function.shapes
        self.inputs = [slot for slot, alike in zip(function.slots, function.replicated) if alike]
        self.output = _Spread(function.Y, sum(math.prod(slot.shape) for slot in self.inputs))

    def parted(self, parts: Sequence) -> tuple[list, list]:
        """Those of the coefficients that are packed, and those of values at nodes, which are not."""
        pairs = list(zip(parts, self._replicated))
        return [part for part, alike in pairs if alike], [part for part, alike in pairs if not alike]

    def joined(self, replicated: Sequence, at_nodes: Sequence) -> list:
        """One list of what `parted` has parted."""
        parts = {True: iter(replicated), False: iter(at_nodes)}
        return [next(parts[alike]) for alike in self._replicated]

    def unpacked(self, array: np.ndarray) -> list[np.ndarray]:
        """The arrays of the coefficients from that of all numbers."""
        ends = np.cumsum([math.prod(slot.shape) for slot in self.inputs])
        return [part.reshape(slot.shape) for part, slot in zip(np.split(array, ends[:-1]), self.inputs)] if self.inputs else []

    def forward(self, arrays, save):
        return np.concatenate([np.zeros(0), *(array.ravel() for array in arrays)])

    def adjoint(self, arrays, functional):
        return [part.copy() for part in self.unpacked(functional)]

    def tangent(self, arrays, directions):
        return self.forward(directions, False)

    def second_adjoint(self, arrays, directions, functional, functional_dot):
        return self.adjoint(arrays, functional_dot)


class NetworkOperator(AbstractExternalOperator):
    """N as Firedrake asks for it: its value, and its derivatives as they act. Get one from `network_operator`."""

    def __init__(self, *operands, function_space, derivatives=None, argument_slots=(), operator_data=None):
        if not isinstance(operator_data, dict) or set(operator_data) != {"function", "packing"}:
            raise TypeError(
                f"operator_data: expected what network_operator puts there, got {type(operator_data).__name__}; call "
                f"network_operator(net, u, head)"
            )
        super().__init__(
            *operands, function_space=function_space, derivatives=derivatives, argument_slots=argument_slots,
            operator_data=operator_data,
        )  # fmt: skip

    @property
    def _function(self) -> NetworkFunction:
        return self.operator_data["function"]

    @property
    def _output(self) -> LabelSpace:
        function = self._function
        return function.Y if function.head is None else function.head.Y

    def _slots(self) -> list[Slot]:
        """How the operands hold their arrays: u, the packed coefficients, those at nodes."""
        packing, u = self.operator_data["packing"], self.ufl_operands[0]
        _, at_nodes = packing.parted(self._function.slots)
        return [BatchValues(self._function.Y, u.function_space()), packing.output, *at_nodes]

    def _arrays(self, operands: Sequence[np.ndarray]) -> list[np.ndarray]:
        """f_I and all coefficients, from the arrays of the operands."""
        u, packed, *at_nodes = operands
        packing = self.operator_data["packing"]
        return [u, *packing.joined(packing.unpacked(packed), at_nodes)]

    def _point(self) -> list[np.ndarray]:
        return self._arrays([np.array(slot.read(function)) for slot, function in zip(self._slots(), self.ufl_operands)])

    @property
    def _operand(self) -> int:
        """The number of the operand in which this is a derivative."""
        return self.derivatives.index(1)

    @assemble_method(0, (0,))
    def assemble_value(self, *_, **__) -> fd.Function:
        """N(u). Collective."""
        with stop_annotating():
            return self._result(self._function.value(self._point()))

    @assemble_method(1, (0, None))
    def assemble_action(self, *_, **__) -> fd.Function:
        """The derivative in an operand in a direction. Collective."""
        return self.along({self.ufl_operands[self._operand]: self.argument_slots()[-1]})

    @assemble_method(1, (None, 0))
    def assemble_adjoint_action(self, *_, **__) -> fd.Cofunction:
        """The transpose of the derivative in an operand, on a functional of N(u). Collective."""
        with stop_annotating():
            functional = np.array(self._output.values(self.argument_slots()[0]))
            return self._functionals(self._function.adjoint(self._point(), functional))[self._operand]

    def along(self, directions: Mapping[Any, Any]) -> fd.Function:
        """The derivative along directions of some operands. Collective.

        Parameters
        ----------
        directions
            By operand.
        """
        with stop_annotating():
            return self._result(self._function.tangent(self._point(), self._arrays(self._along(directions))))

    def adjoint_along(
        self, l: fd.Cofunction | None, l_1: fd.Cofunction | None, directions: Mapping[Any, Any]
    ) -> list[fd.Cofunction]:
        """The derivative of N'^T l along l_1 and directions of some operands, one Cofunction an operand. Collective.

        Parameters
        ----------
        l, l_1
            Functionals of N(u); None for 0.
        directions
            By operand.
        """
        with stop_annotating():
            point, functions = self._point(), self._function
            parts = [np.zeros_like(part) for part in point]
            if l_1 is not None:
                parts = functions.adjoint(point, np.array(self._output.values(l_1)))
            if l is not None:
                v = self._arrays(self._along(directions))
                curved = functions.curvature(point, np.array(self._output.values(l)), v)
                parts = [a + b for a, b in zip(parts, curved)]
            return self._functionals(parts)

    def _along(self, directions: Mapping[Any, Any]) -> list[np.ndarray]:
        """One array an operand: that of its direction, or 0."""
        pairs = list(zip(self._slots(), self.ufl_operands))
        return [np.array(slot.read(directions[z])) if z in directions else np.zeros_like(slot.read(z)) for slot, z in pairs]

    def _functionals(self, parts: Sequence[np.ndarray]) -> list[fd.Cofunction]:
        """One Cofunction an operand, from arrays of f_I and all coefficients."""
        u, *coefficients = parts
        packing = self.operator_data["packing"]
        replicated, at_nodes = packing.parted(coefficients)
        results = [fd.Cofunction(z.function_space().dual()) for z in self.ufl_operands]
        for slot, result, array in zip(self._slots(), results, [u, packing.forward(replicated, False), *at_nodes]):
            slot.write(result, array)
        return results

    @assemble_method(1, (0, 1))
    def assemble_jacobian(self, *_, **__) -> Matrix:
        """N'(u), a full matrix. Collective."""
        with stop_annotating():
            return Matrix(self, self._jacobian())

    @assemble_method(1, (1, 0))
    def assemble_transposed_jacobian(self, *_, **__) -> Matrix:
        """N'(u)^T, a full matrix. Collective."""
        with stop_annotating():
            return Matrix(self, self._jacobian().transpose())

    def _result(self, values: np.ndarray) -> fd.Function:
        result = fd.Function(self.function_space())
        self._output.write(result, values)
        return result

    def _jacobian(self) -> PETSc.Mat:
        if self._operand:
            raise NotImplementedError("N: the derivative in coefficients has no matrix; take its action")
        Y, head = self._function.Y, self._function.head
        samples = Y.samples(self.ufl_operands[0].function_space())
        if samples > 1 or max(Y.size, self._output.size) > LARGEST_MATRIX:
            raise ValueError(
                f"u: expected one sample on at most {LARGEST_MATRIX} nodes for a Jacobian that is a full matrix, got "
                f'{samples} on {Y.size}; solve with {{"mat_type": "matfree", "ksp_type": "gmres"}}, and Jp the derivative of '
                f"a residual without the network"
            )
        U, weighted = self._low_rank()
        rows = _in_order(self._output, U)
        columns = np.concatenate(Y.comm.allgather(_in_order(Y, weighted)))
        values = rows @ columns.T
        first = Y.comm.exscan(len(rows)) or 0
        if head is None:
            own = np.arange(len(rows))
            values[own, first + own] += 1.0
        sizes = tuple(space.dof_dset.layout_vec.getSizes() for space in (self._output.V, Y.V))
        full = np.arange(len(values) + 1, dtype=PETSc.IntType) * values.shape[1]
        numbers = np.tile(np.arange(values.shape[1], dtype=PETSc.IntType), len(values))
        return PETSc.Mat().createAIJ(sizes, csr=(full, numbers, values.ravel()), comm=Y.comm)  # type: ignore[arg-type]  # arrays

    def _low_rank(self) -> tuple[np.ndarray, np.ndarray]:
        """U and M Z of N'(u) = s I + U Z^T M, shapes (nodes of the output, rank) and (nodes, rank)."""
        function, m = self._function, self._point()
        Z = function.seen(m[1:])
        many = [np.repeat(m[0], Z.rank, axis=1), *m[1:]]
        still = [np.zeros_like(part) for part in m[1:]]
        U = function.tangent(many, [np.array(Z.values), *still])
        return (U - Z.values if function.head is None else U), function.Y.weights[:, None] * Z.values


def _restructured(rule: Callable) -> Callable:
    """Firedrake's rule for a node of a form before it is assembled, with what it lacks for forms with networks.

    The adjoint of a solve asks for A^T w and (A N')^T w, where A is the derivative of a form in its functions or in N.
    Firedrake 2026.10 has no rule for these, and fails as it assembles A as a matrix. They are vectors: N'^T (A^T w).
    """

    @wraps(rule)
    def restructure(expr: Any, visited: dict | None = None) -> Any:
        if not (isinstance(expr, ufl.Action) and isinstance(expr.left(), ufl.Adjoint)):
            return rule(expr, visited)
        form, w = expr.left().form(), expr.right()
        if isinstance(form, ufl.Form):
            return ufl.action(ufl.adjoint(form), w)
        if isinstance(form, ufl.Action) and isinstance(form.right(), NetworkOperator):
            check_operand(form.right())
            moved = ufl.action(ufl.adjoint(form.left()), w)
            return rule(ufl.Action(rule(ufl.Adjoint(form.right()), visited), moved), visited)
        return rule(expr, visited)

    return restructure


BaseFormAssembler.restructure_base_form = staticmethod(_restructured(BaseFormAssembler.restructure_base_form))
complete_firedrake()


def _in_order(Y: LabelSpace, values: np.ndarray) -> np.ndarray:
    """Columns of values at nodes, shape (nodes, columns), with their rows in the order of PETSc's vectors."""
    return np.ascontiguousarray(Y.to_data(values)).reshape(len(values), -1)
