"""A network in the residual of a PDE: what Firedrake asks for, quadratic convergence, and derivatives through the solve."""

import numpy as np
import pytest
import ufl
from firedrake import (
    COMM_WORLD,
    Cofunction,
    DirichletBC,
    Function,
    NonlinearVariationalProblem,
    NonlinearVariationalSolver,
    TestFunction,
    action,
    adjoint,
    assemble,
    derivative,
    dx,
    grad,
    inner,
    interpolate,
    solve,
)
from firedrake.adjoint import Control, ReducedFunctional
from firedrake.assemble import BaseFormAssembler
from helpers import label_space, laplace, network, smooth
from kinds import KINDS
from pyadjoint import Tape, set_working_tape

from fem_resnet import Channels, Head, ResidualNetwork, laplace_basis, network_operator
from fem_resnet.external.network_operator import NetworkOperator

on_ranks = pytest.mark.parallel([1, 2, 3])
DIRECT = {"ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "mumps"}
NEWTON = {"snes_rtol": 1e-13, "snes_atol": 1e-13}


def with_head(net, name, onto=("disk", "CG1")):
    if name == "f(T)":
        return None
    head = Head(net.bases["psi"][0], laplace(*onto, 5), "identity")
    head.W.set(0, np.random.default_rng(7).normal(size=head.W.space_basis.shape) / 3)
    head.mu.set(0, np.full(5, 0.3))
    return head


def nonlocal_equation(net, head, u):
    """- div grad u + 2 u + N(u) = g, and its residual without N, whose derivative preconditions."""
    v = TestFunction(net.Y.V)
    g = net.Y.function(net.Y.batch(smooth(net.Y, 1, seed=3)))
    local = inner(grad(u), grad(v)) * dx + 2 * u * v * dx - g * v * dx
    return local + network_operator(net, u, head) * v * dx, local


@on_ranks
@pytest.mark.parametrize("kind", ["Runge-Kutta", "learned factors", "kernel set", "bases of each layer", "gradient flow"])
@pytest.mark.parametrize("head", ["f(T)", "O"])
def test_what_firedrake_asks_for_is_consistent(kind, head):
    """Value, actions and matrices in u: N is the network, matrices act as actions do, and transposes are transposes."""
    net, _ = KINDS[kind]()
    Y = net.Y
    domain = ("annulus" if "set" in kind else "disk", "CG1")
    head = with_head(net, head, domain)
    u, w, z = (Y.function(Y.batch(smooth(Y, 1, seed=seed))) for seed in (1, 2, 4))
    N = network_operator(net, u, head)
    f = net(u)
    np.testing.assert_allclose(assemble(N).dat.data_ro, (f if head is None else head(f)).dat.data_ro, rtol=1e-12, atol=1e-13)
    l = Cofunction(Y.V.dual())
    Y.write(l, Y.weights[:, None] * Y.values(z))
    J = derivative(N, u)
    along, back = assemble(action(J, w)), assemble(action(adjoint(J), l))
    with along.dat.vec_ro as a, l.dat.vec_ro as b, back.dat.vec_ro as c, w.dat.vec_ro as d:
        assert a.dot(b) == pytest.approx(c.dot(d), rel=1e-11)
        matrix, transposed = assemble(J).petscmat, assemble(adjoint(J)).petscmat
        assert (matrix * d - a).norm() < 1e-12 * a.norm() and (transposed * b - c).norm() < 1e-12 * c.norm()
    # The derivative is that of the value: remainders fall with the square.
    remainders = []
    for h in (0.02, 0.01):
        moved = assemble(network_operator(net, Function(Y.V).assign(u + h * w), head))
        with assemble(moved - assemble(N) - h * along).dat.vec_ro as remainder:
            remainders.append(remainder.norm())
    assert np.log2(remainders[0] / remainders[1]) > 1.9


@on_ranks
@pytest.mark.parametrize("head", ["f(T)", "O"])
@pytest.mark.parametrize("how", ["matrix", "matrix-free"])
def test_newton_converges_quadratically_with_a_nonlocal_term(head, how):
    net = network(size=1.0, basis_for_bias=True)
    head, u = with_head(net, head), Function(net.Y.V)
    F, local = nonlocal_equation(net, head, u)
    residuals = []
    free = {"mat_type": "matfree", "pmat_type": "aij", "ksp_type": "gmres", "ksp_rtol": 1e-12, "pc_type": "lu"}
    free["pc_factor_mat_solver_type"] = "mumps"
    for steps in range(5):
        u.assign(0)
        options = NEWTON | (DIRECT if how == "matrix" else free) | {"snes_max_it": steps, "snes_linesearch_type": "basic"}
        if steps:
            solve(F == 0, u, Jp=None if how == "matrix" else derivative(local, u), solver_parameters=options | ONE_MORE)
        with assemble(F).dat.vec_ro as residual:
            residuals.append(residual.norm())
    assert residuals[-1] < 1e-13
    # From one step to the next the residual is squared, as long as it is above round-off.
    steps = [(a, b) for a, b in zip(residuals, residuals[1:]) if b > 1e-13]
    assert all(b < 10 * a**2 for a, b in steps[1:]) and len(steps) >= 2


#: Stop after the steps that were asked for, without an error.
ONE_MORE = {"snes_force_iteration": True, "snes_convergence_test": "skip"}


def solution(net, head, u, **options):
    F, _ = nonlocal_equation(net, head, u)
    solve(F == 0, u, solver_parameters=NEWTON | DIRECT, **options)
    return assemble(inner(u, u) * (1 + u) * dx)


@on_ranks
@pytest.mark.parametrize("head", ["f(T)", "O"])
def test_taylor_through_the_solve_in_all_that_is_learned(head, annotation, taylor, tape):
    net = network(size=1.0, basis_for_bias=head == "O")  # else the bias has values at the nodes
    head = with_head(net, head)
    parameters = [*net.parameters, *([] if head is None else head.parameters)]
    with annotation():
        J = solution(net, head, Function(net.Y.V))
    reduced = ReducedFunctional(J, [control for parameter in parameters for control in parameter.controls()])
    point, directions = [], []
    for seed, (basis, function) in enumerate((b, f) for p in parameters for b, f in zip(p.space_bases, p.functions)):
        point.append(function.copy(deepcopy=True))
        directions.append(Function(basis.space))
        nodal = basis.space == net.Y.V
        rng = np.random.default_rng(seed)
        basis.write(directions[-1], smooth(net.Y, 1, seed=seed)[:, 0] if nodal else rng.normal(size=basis.shape))
    given = [function.dat.data_ro.copy() for parameter in parameters for function in parameter.functions]
    taylor(reduced, point, directions, f"PDE with {'f(T)' if head is None else 'O'}", "parameters", second_order=True)
    now = [function.dat.data_ro for parameter in parameters for function in parameter.functions]
    assert all(map(np.array_equal, given, now)), "the tape evaluates elsewhere and leaves the network alone"


@on_ranks
def test_a_term_at_several_states_on_one_tape(annotation, taylor):
    """Two time steps with one network, which sees another state in each, and a control in the initial state."""
    net = network(size=1.0, basis_for_bias=True)
    Y, V = net.Y, net.Y.V
    start = Y.function(Y.batch(smooth(Y, 1, seed=5)))
    with annotation():
        old = start
        for _ in range(2):
            u, v = Function(V), TestFunction(V)
            N = network_operator(net, u) + old * network_operator(net, old)
            solve((u - old) * v * dx + 0.1 * (inner(grad(u), grad(v)) + N * v) * dx == 0, u, solver_parameters=NEWTON | DIRECT)
            old = u
        J = assemble(inner(old, old) * dx)
    controls = [*net.kernel.controls(), Control(start, riesz_map=Y.riesz_map)]
    directions = [Function(c.control.function_space()) for c in controls]
    for k, direction in enumerate(directions[:-1]):
        rng = np.random.default_rng(k)
        net.kernel.space_bases[k].write(direction, rng.normal(size=net.kernel.space_bases[k].shape))
    Y.write(directions[-1], smooth(Y, 1, seed=6))
    point = [c.control.copy(deepcopy=True) for c in controls]
    second = COMM_WORLD.size == 1  # on few cores it takes minutes on more
    taylor(ReducedFunctional(J, controls), point, directions, "two time steps", "kernel and start", second_order=second)


@on_ranks
@pytest.mark.parametrize("solver", ["solve", "kept"])
def test_boundary_values_hold_and_solutions_are_differentiated_in_them(solver, annotation, taylor, tape):
    """By `solve`, and by a `NonlinearVariationalSolver`, for which Firedrake has no derivative in boundary values."""
    net = network(size=1.0, basis_for_bias=True)
    Y, V = net.Y, net.Y.V
    g, edge = (Y.function(Y.batch(smooth(Y, 1, seed=seed))) for seed in (3, 4))
    u, v, on_edge = Function(V), TestFunction(V), DirichletBC(V, edge, "on_boundary")
    options = NEWTON | DIRECT | {"snes_max_it": 5}
    with annotation():
        F = (inner(grad(u), grad(v)) + (network_operator(net, u) * u + u**3 - g) * v) * dx
        if solver == "solve":
            solve(F == 0, u, on_edge, solver_parameters=options)
        else:
            NonlinearVariationalSolver(NonlinearVariationalProblem(F, u, on_edge), solver_parameters=options).solve()
        J = assemble(inner(u, u) * (1 + u) * dx)
    off = Function(V).assign(u - edge).dat.data_ro[on_edge.nodes[on_edge.nodes < Y.nodes]]
    assert np.abs(off).max(initial=0.0) == 0.0
    places = (g, edge) if solver == "solve" else (g,)
    controls = [*net.kernel.controls(), *(Control(f, riesz_map=Y.riesz_map) for f in places)]
    directions = [Function(c.control.function_space()) for c in controls]
    for k, (basis, direction) in enumerate(zip(net.kernel.space_bases, directions)):
        basis.write(direction, np.random.default_rng(k).normal(size=basis.shape))
    for seed, direction in enumerate(directions[len(net.kernel.space_bases) :]):
        Y.write(direction, smooth(Y, 1, seed=6 + seed))
    point = [c.control.copy(deepcopy=True) for c in controls]
    second = COMM_WORLD.size < 3  # on few cores it takes minutes on more
    taylor(ReducedFunctional(J, controls), point, directions, solver, "kernel, source, edge", second_order=second)


@pytest.mark.parallel([1, 2])
def test_second_derivatives_that_are_not_there_are_refused_and_the_way_around_holds(annotation, taylor, tape):
    net = network(size=1.0, basis_for_bias=True)
    Y, V = net.Y, net.Y.V
    w, v = Y.function(Y.batch(smooth(Y, 1, seed=3))), TestFunction(V)
    controls = net.bias.controls()
    point = [c.control.copy(deepcopy=True) for c in controls]

    def reduced(record):
        with set_working_tape(Tape()), annotation():
            return ReducedFunctional(record(), controls)

    def solved(N):
        q = Function(V)
        solve(inner(q - N, v) * dx == 0, q, solver_parameters=NEWTON | DIRECT)
        return assemble(q**3 * dx)

    J = reduced(lambda: assemble(network_operator(net, w) ** 3 * dx))
    J(point)
    J.derivative()
    with pytest.raises(NotImplementedError, match=r"^assemble: expected a form without networks for second derivatives"):
        J.hessian(point)
    J = reduced(lambda: solved(network_operator(net, interpolate(2 * w, V))))
    with pytest.raises(NotImplementedError, match=r"^u: expected a Function in network_operator\(net, u\) for derivatives"):
        J.derivative()
    taylor(reduced(lambda: solved(network_operator(net, w))), point, point, "N(u) as a Function", "bias", second_order=True)


@pytest.mark.parallel([1, 2])
def test_batches_channels_and_other_spaces():
    net = network(size=1.0, basis_for_bias=True)
    Y = net.Y
    # A batch is as many solutions as samples.
    many = Y.batch(0 * smooth(Y, 2))
    v, g = TestFunction(many.function_space()), Y.batch(smooth(Y, 2, seed=3))
    local = inner(grad(many), grad(v)) * dx + 2 * inner(many, v) * dx - inner(g, v) * dx
    options = NEWTON | {"mat_type": "matfree", "pmat_type": "aij", "ksp_type": "gmres", "ksp_rtol": 1e-10, "pc_type": "lu"}
    options["pc_factor_mat_solver_type"] = "mumps"
    F = local + inner(network_operator(net, many), v) * dx
    solve(F == 0, many, Jp=derivative(local, many), solver_parameters=options)
    one = Function(Y.V)
    solve(nonlocal_equation_of(net, one, Y.function(g, 1)) == 0, one, solver_parameters=NEWTON | DIRECT)
    np.testing.assert_allclose(Y.values(many)[:, 1:], Y.values(one), atol=1e-11)
    with pytest.raises(ValueError, match=r"^u: expected one sample on at most 10000 nodes for a Jacobian"):
        assemble(derivative(network_operator(net, many), many))
    # An expression in another space, by interpolation.
    w = Function(label_space("disk", "DG1").V).interpolate(1.0)
    N = network_operator(net, interpolate(2 * w, Y.V))
    constant = Function(Y.V).assign(2.0)
    np.testing.assert_allclose(assemble(N).dat.data_ro, net(constant).dat.data_ro, atol=1e-12)
    # Channels are components of u.
    C = Channels(label_space("disk", "CG1"), 2)
    phi = laplace_basis(C, 3)
    pair = ResidualNetwork(phi, bias=phi, layers=2)
    pair.start("random smooth")
    u = Function(C.V)
    C.write(u, smooth(C, 1))
    N = network_operator(pair, u)
    with u.dat.vec_ro as x, assemble(action(derivative(N, u), u)).dat.vec_ro as y:
        assert (assemble(derivative(N, u)).petscmat * x - y).norm() < 1e-12 * y.norm()


def nonlocal_equation_of(net, u, g):
    v = TestFunction(net.Y.V)
    return (inner(grad(u), grad(v)) + 2 * u * v - g * v + network_operator(net, u) * v) * dx


@pytest.mark.parallel([1, 2])
def test_coefficients_are_those_at_the_call_and_nothing_stays_on_the_tape():
    net = network(size=1.0)
    u = net.Y.function(net.Y.batch(smooth(net.Y, 1)))
    with set_working_tape(Tape()) as tape:
        N = network_operator(net, u)
        before = assemble(N).dat.data_ro.copy()
        net.kernel.set(0, 2 * net.kernel.get(0))
        assert np.array_equal(assemble(N).dat.data_ro, before)
        np.testing.assert_allclose(assemble(network_operator(net, u)).dat.data_ro, net(u).dat.data_ro, atol=1e-13)
        assert not tape.get_blocks()


@pytest.mark.parallel([1, 2])
def test_what_does_not_fit_is_refused_on_all_ranks():
    net = network()
    last = COMM_WORLD.rank == COMM_WORLD.size - 1
    u, cells = Function(net.Y.V), Function(label_space("disk", "DG0").V)
    with pytest.raises(ValueError, match=r"^u: expected a Function of .* or a batch of it"):
        network_operator(net, cells if last else u)
    with pytest.raises(ValueError, match=r"^u: expected a Function on the mesh"):
        network_operator(net, Function(label_space("sphere", "CG1").V))
    with pytest.raises(TypeError, match=r"^u: expected a Function or Interpolate, got"):
        network_operator(net, 2 * u)
    with pytest.raises(ValueError, match=r"^head: expected an output on the mesh, a Basis in `onto`, got 3 classes"):
        network_operator(net, u, Head(net.bases["psi"][0], 3))
    with pytest.raises(ValueError, match=r"^head: expected an output on the mesh .* of u, got one on"):
        network_operator(net, u, Head(net.bases["psi"][0], laplace("sphere", "CG1", 3), "identity"))
    with pytest.raises(TypeError, match=r"^operator_data: expected what network_operator puts there, got NoneType"):
        NetworkOperator(u, function_space=net.Y.V)
    with pytest.raises(NotImplementedError, match=r"^N: the derivative in coefficients has no matrix"):
        N = network_operator(net, u)
        assemble(derivative(N, N.ufl_operands[1]))


def test_firedrake_still_lacks_the_rule_that_forms_with_networks_bring():
    """When this fails, `_restructured` in network_operator.py may go."""
    rule = BaseFormAssembler.restructure_base_form.__wrapped__
    net = network()
    u, v = Function(net.Y.V), TestFunction(net.Y.V)
    N = network_operator(net, u)
    asked = action(adjoint(derivative(N * v * dx, N.ufl_operands[1])), Function(net.Y.V))
    assert isinstance(asked.left(), ufl.Adjoint) and rule(asked) is asked
    assert isinstance(BaseFormAssembler.restructure_base_form(asked), NetworkOperator)
