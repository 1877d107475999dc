"""What Firedrake lacks for solves with networks in the residual: boundary conditions, and derivatives of second order.

A residual with networks is a form of UFL in which they are Functions,

    F(x) = L(x, q),     q = N(z),     z some of x = (u, m),

and a network has its own derivatives of second order, where UFL fails. With G(x; w) = F'(x)^T w, of the adjoint solution w, a
Hessian needs the tangent u_1 of the solution, and along x_1 = (u_1, m_1)

    F_u u_1 = -F_m m_1,     F_u^T w_1 = l_1 - (G(x; w)_x x_1)_u,     and is     -(G(x; w)_x x_1 + G(x; w_1))_m,

where l_1 is the second derivative of what comes after the solve, in u. Here

    G(x; w) = L_x^T w + N_x^T l,     l = L_q^T w,
    G_x x_1 = (L_xx x_1 + L_xq q_1)^T w + N_x^T l_1 + (N_xx x_1)^T l,     q_1 = N_x x_1.

The Jacobian is L_u + L_q N_u. Firedrake puts the rows and columns of a boundary condition into L_u and into L_q, and
multiplies: these rows of the product are not 0, and solutions leave their boundary values. Here they are put into the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Protocol, runtime_checkable

import firedrake as fd
import numpy as np
import ufl
from firedrake.adjoint_utils.blocks import AssembleBlock, GenericSolveBlock, NonlinearVariationalSolveBlock
from firedrake.assemble import BaseFormAssembler
from petsc4py import PETSc
from pyadjoint.tape import stop_annotating

__all__ = ["TwiceDifferentiable", "check_operand", "complete_firedrake"]

#: Functions and their directions.
Directions = Mapping[Any, Any]


@runtime_checkable
class TwiceDifferentiable(Protocol):
    """An external operator that has its own derivatives of second order."""

    ufl_operands: tuple[Any, ...]

    def along(self, directions: Directions) -> fd.Function:
        """The derivative along directions of some operands. Collective."""

    def adjoint_along(self, l: fd.Cofunction | None, l_1: fd.Cofunction | None, directions: Directions) -> list[fd.Cofunction]:
        """The derivative of N'^T l along l_1 and directions of some operands, one Cofunction an operand. Collective."""


def _networks(form: Any) -> list[Any]:
    return [N for N in form.base_form_operators() if isinstance(N, TwiceDifferentiable)]


def check_operand(N: Any) -> None:
    """Refuse derivatives through a solve where N(u) is of an interpolation: Firedrake and UFL fail on the way."""
    if not isinstance(N.ufl_operands[0], fd.Function):
        raise NotImplementedError(
            "u: expected a Function in network_operator(net, u) for derivatives through a solve, got an interpolation; let "
            "solve(inner(q - w, v) * dx == 0, q) give a Function q of net.Y.V"
        )


class _Residual:
    """F at a point, with a Function in the place of each network. All calls are collective."""

    def __init__(self, block: GenericSolveBlock):
        form = block._create_F_form()
        self.networks = _networks(form)
        for N in self.networks:
            check_operand(N)
        self.q = [fd.assemble(N) for N in self.networks]
        self.L = ufl.replace(form, dict(zip(self.networks, self.q)))

    def tangents(self, directions: Directions) -> list[fd.Function]:
        """q_1 of each network."""
        return [N.along(directions) for N in self.networks]

    def along(self, form: Any, directions: Directions, q_1: list[fd.Function]) -> fd.Cofunction | None:
        """The derivative of a form in x and q; None if it is 0."""
        there = form.coefficients()
        pairs = [(x, x_1) for x, x_1 in [*directions.items(), *zip(self.q, q_1)] if x in there]
        return _assembled(sum((fd.derivative(form, x, x_1) for x, x_1 in pairs), start=0)) if pairs else None

    def functional(self, w: fd.Function) -> ufl.Form:
        """<F, w>."""
        return fd.action(self.L, w)

    def by_networks(self, w: fd.Function) -> list[fd.Cofunction | None]:
        """L_q^T w for each network."""
        return [self.by(w, q) for q in self.q]

    def by(self, w: fd.Function, x: Any) -> fd.Cofunction | None:
        """L_x^T w; None if it is 0."""
        return _assembled(self.slope(w, x)) if x in self.L.coefficients() else None

    def slope(self, w: fd.Function, x: Any) -> Any:
        """L_x^T w as a form."""
        return fd.derivative(self.functional(w), x, fd.TestFunction(x.function_space()))


def _assembled(form: Any) -> fd.Cofunction | None:
    form = ufl.algorithms.expand_derivatives(form)
    return None if form.empty() else fd.assemble(form)


def _rows(V: Any, bcs: Sequence[fd.DirichletBC]) -> np.ndarray:
    """The rows of this rank, of matrices on V, that have boundary conditions."""
    free = fd.Function(V)
    with free.dat.vec_wo as inside:
        inside.set(1.0)
    for bc in bcs:
        bc.zero(free)
    with free.dat.vec_ro as inside:
        first, _ = inside.getOwnershipRange()
        return (first + np.flatnonzero(inside.array_r == 0.0)).astype(PETSc.IntType)


def _has_networks(form: Any) -> bool:
    """Whether there are networks in a form, or in the products and sums that a Jacobian is made of."""
    if isinstance(form, TwiceDifferentiable):
        return True
    if isinstance(form, ufl.Form):
        return bool(_networks(form))
    if isinstance(form, ufl.Action):
        return _has_networks(form.left()) or _has_networks(form.right())
    if isinstance(form, ufl.Adjoint):
        return _has_networks(form.form())
    return isinstance(form, ufl.FormSum) and any(map(_has_networks, form.components()))


def _with_conditions(rule: Callable) -> Callable:
    """Firedrake's assembly of sums and products, with boundary conditions in the sum where there is a network."""

    @wraps(rule)
    def assemble(self, tensor=None, current_state=None):
        bcs = self._bcs
        apart = len(self._form.arguments()) != 2 or self._diagonal or self._mat_type == "matfree"
        if not bcs or apart or not _has_networks(self._form):
            return rule(self, tensor, current_state)
        self._bcs = ()
        try:
            result = rule(self, tensor, current_state)
        finally:
            self._bcs = bcs
        result.petscmat.zeroRowsColumns(_rows(self._form.arguments()[0].function_space(), bcs))
        return result

    return assemble


def _solved(block: GenericSolveBlock, form: Any, b: fd.Cofunction, bcs: list) -> tuple[fd.Function, fd.Cofunction]:
    """x with A x = b off the boundary conditions, which x satisfies, and b - A x.

    Firedrake has no solver for the matrix of a form with networks that has boundary conditions in it.
    """
    if bcs and block.assemble_kwargs.get("mat_type") == "matfree":
        raise NotImplementedError(
            "mat_type: expected 'aij' for derivatives through a solve with networks and boundary conditions, got 'matfree'"
        )
    V, rest = block.function_space, b.copy(deepcopy=True)
    x, step = fd.Function(V), fd.Function(V)
    A = fd.assemble(form, **block.assemble_kwargs)
    if not bcs:
        fd.solve(A, x, b, *block.adj_args, **block.adj_kwargs)
        return x, fd.Cofunction(V.dual())
    for bc in bcs:
        bc.apply(x)
    matrix, rows = A.petscmat.copy(), _rows(V, bcs)
    with x.dat.vec_ro as at, rest.dat.vec as r:
        r.axpy(-1.0, A.petscmat * at)
        first, _ = r.getOwnershipRange()
        r.array[rows - first] = 0.0
    matrix.zeroRowsColumns(rows)
    fd.solve(fd.AssembledMatrix(A.arguments(), matrix), step, rest, *block.adj_args, **block.adj_kwargs)
    x += step
    rest.assign(b)
    with x.dat.vec_ro as at, rest.dat.vec as r:
        r.axpy(-1.0, A.petscmat * at)
    return x, rest


class _Prepared:
    """The Hessian of a block, ready for its components."""

    def __init__(self, block: GenericSolveBlock, hessian_input: fd.Cofunction, bdy: bool):
        self.residual = residual = _Residual(block)
        out = block.get_outputs()[0]
        self.u, self.w = out.saved_output, block.adj_sol
        self.directions = _directions(block) | {self.u: out.tlm_value}
        self.q_1 = residual.tangents(self.directions)
        #: By network: what of G_x x_1 comes through it, one Cofunction an operand; and the same of G(x; w_1).
        self.through: list[list[fd.Cofunction]] = []
        for N, q, l in zip(residual.networks, residual.q, residual.by_networks(self.w)):
            l_1 = residual.along(residual.slope(self.w, q), self.directions, self.q_1)
            self.through.append(N.adjoint_along(l, l_1, self.directions))
        b = hessian_input.copy(deepcopy=True)
        for part in self.varied(self.u):
            b -= part
        dFdu = fd.adjoint(fd.derivative(block._create_F_form(), self.u, fd.TrialFunction(block.function_space)))
        self.w_1, self.bdy = block._assemble_and_solve_adj_eq(dFdu, b, bdy)
        self.after = [N.adjoint_along(None, l, {}) for N, l in zip(residual.networks, residual.by_networks(self.w_1))]

    def varied(self, x: Any) -> list[fd.Cofunction]:
        """The terms of (G(x; w)_x x_1)_x."""
        direct = None
        if x in self.residual.L.coefficients():
            direct = self.residual.along(self.residual.slope(self.w, x), self.directions, self.q_1)
        return [*([] if direct is None else [direct]), *self._of(self.through, x)]

    def component(self, x: Any) -> fd.Cofunction | None:
        """That of the Hessian in x."""
        direct = self.residual.by(self.w_1, x)
        terms = [*self.varied(x), *([] if direct is None else [direct]), *self._of(self.after, x)]
        if not terms:
            return None
        total = fd.Cofunction(x.function_space().dual())
        for term in terms:
            total -= term
        return total

    def _of(self, parts: list[list[fd.Cofunction]], x: Any) -> list[fd.Cofunction]:
        pairs = [(z, part) for N, each in zip(self.residual.networks, parts) for z, part in zip(N.ufl_operands, each)]
        return [part for z, part in pairs if z == x]


def _directions(block: GenericSolveBlock) -> dict[Any, Any]:
    """Functions that the residual depends on and their directions, but for u."""
    found = {}
    for one in block.get_dependencies():
        if one.tlm_value is None or isinstance(one.output, fd.DirichletBC) or one.output == block.func:
            continue
        if isinstance(one.output, fd.MeshGeometry):
            raise NotImplementedError("mesh: expected no derivative in the mesh of a residual with networks, got one")
        found[one.saved_output] = one.tlm_value
    return found


def _tangent(rule: Callable) -> Callable:
    """Firedrake's tangent of a solve, which fails where there is a network."""

    @wraps(rule)
    def evaluate_tlm_component(self, inputs, tlm_inputs, block_variable, idx, prepared=None):
        if not _networks(prepared["form"]):
            return rule(self, inputs, tlm_inputs, block_variable, idx, prepared)
        with stop_annotating():
            residual, directions = _Residual(self), _directions(self)
            right = fd.Cofunction(self.function_space.dual())
            moved = residual.along(residual.L, directions, residual.tangents(directions))
            if moved is not None:
                right -= moved
            bcs = [one for one in self.get_dependencies() if isinstance(one.output, fd.DirichletBC)]
            bcs = [one.output.reconstruct(g=0) if one.tlm_value is None else one.tlm_value for one in bcs]
            return _solved(self, prepared["dFdu"], right, bcs)[0]

    return evaluate_tlm_component


def _adjoint(rule: Callable) -> Callable:
    """Firedrake's adjoint solve, which fails where there are networks and boundary conditions."""

    @wraps(rule)
    def _assemble_and_solve_adj_eq(self, dFdu_adj_form, dJdu, compute_bdy):
        if not _networks(self.lhs):
            return rule(self, dFdu_adj_form, dJdu, compute_bdy)
        with stop_annotating():
            w, rest = _solved(self, dFdu_adj_form, dJdu, self._homogenize_bcs())
            return w, rest.riesz_representation("l2") if compute_bdy else None

    return _assemble_and_solve_adj_eq


def _prepare(rule: Callable) -> Callable:
    """Firedrake's second adjoint solve, the same."""

    @wraps(rule)
    def prepare_evaluate_hessian(self, inputs, hessian_inputs, adj_inputs, relevant_dependencies):
        if not _networks(self._create_F_form()):
            return rule(self, inputs, hessian_inputs, adj_inputs, relevant_dependencies)
        if hessian_inputs[0] is None or self.get_outputs()[0].tlm_value is None:
            return None
        with stop_annotating():
            return _Prepared(self, hessian_inputs[0], self._should_compute_boundary_adjoint(relevant_dependencies))

    return prepare_evaluate_hessian


def _component(rule: Callable) -> Callable:
    """Firedrake's component of a Hessian, the same."""

    @wraps(rule)
    def evaluate_hessian_component(
        self, inputs, hessian_inputs, adj_inputs, block_variable, idx, relevant_dependencies, prepared=None
    ):
        if not isinstance(prepared, _Prepared):
            return rule(self, inputs, hessian_inputs, adj_inputs, block_variable, idx, relevant_dependencies, prepared)
        if isinstance(block_variable.output, fd.DirichletBC):
            return rule(
                self, inputs, hessian_inputs, adj_inputs, block_variable, idx, relevant_dependencies,
                {"adj_sol2": prepared.w_1, "adj_sol2_bdy": prepared.bdy, "form": None, "adj_sol": prepared.w},
            )  # fmt: skip
        if block_variable.output == self.func and not self.linear:
            return None
        with stop_annotating():
            return prepared.component(block_variable.saved_output)

    return evaluate_hessian_component


def _without_cache(name: str) -> Callable:
    """The adjoint of a `NonlinearVariationalSolver`: where there is a network, that of `solve`.

    Firedrake's own keeps forms, and looks for the right-hand side at a place where a form with networks has another part.
    """
    rule, plain = getattr(NonlinearVariationalSolveBlock, name), getattr(GenericSolveBlock, name)

    @wraps(rule)
    def evaluate(self, *arguments, **named):
        return (plain if _networks(self.lhs) else rule)(self, *arguments, **named)

    return evaluate


def _refused(rule: Callable) -> Callable:
    """Firedrake's second derivative of an assembled form, which fails where there is a network."""

    @wraps(rule)
    def prepare_evaluate_hessian(self, inputs, hessian_inputs, adj_inputs, relevant_dependencies):
        if _networks(self.form):
            raise NotImplementedError(
                "assemble: expected a form without networks for second derivatives, got N(u); let "
                "solve(inner(q - N, v) * dx == 0, q) give a Function q, and assemble the form with q"
            )
        return rule(self, inputs, hessian_inputs, adj_inputs, relevant_dependencies)

    return prepare_evaluate_hessian


def complete_firedrake() -> None:
    """Give Firedrake's classes these rules, which forms without networks do not see."""
    BaseFormAssembler.assemble = _with_conditions(BaseFormAssembler.assemble)
    AssembleBlock.prepare_evaluate_hessian = _refused(AssembleBlock.prepare_evaluate_hessian)
    for name, rule in (
        ("_assemble_and_solve_adj_eq", _adjoint), ("evaluate_tlm_component", _tangent),
        ("prepare_evaluate_hessian", _prepare), ("evaluate_hessian_component", _component),
    ):  # fmt: skip
        setattr(GenericSolveBlock, name, rule(getattr(GenericSolveBlock, name)))
    for name in ("prepare_evaluate_adj", "evaluate_adj_component"):
        setattr(NonlinearVariationalSolveBlock, name, _without_cache(name))
