"""Networks of which the head sees f(T) through the layers' psi: coefficients on the tape, not f, and the same numbers."""

import tracemalloc

import firedrake as fd
import numpy as np
import pytest
from helpers import set_smooth, smooth
from problems import ROUND_DOMAINS, coefficients, directions, network, polynomials
from pyadjoint import taylor_to_dict

from fem_resnet import (
    Basis,
    Batch,
    Head,
    LabelSpace,
    Layers,
    LearningProblem,
    ResidualNetwork,
    cross_entropy,
    least_squares,
    tikhonov,
)
from fem_resnet.network.coefficient_segment import CoefficientSegment
from fem_resnet.network.segment import Segment

on_ranks = pytest.mark.parallel([1, 2, 3])
#: The way through f, taken for a head whose psi is an equal basis but another one, rounds differently.
ROUND_OFF = 1e-13
CLASSES = 3


def _problem(net, psi, *, learn="parameters", samples=4, seed=0, loss=cross_entropy, **options):
    head = Head(psi, CLASSES, "logistic" if loss is least_squares else "softmax")
    rng = np.random.default_rng(11)
    head.W.set(0, 0.5 * rng.normal(size=head.W.space_basis.shape))
    head.mu.set(0, 0.5 * rng.normal(size=CLASSES))
    batch = Batch(net.Y.batch(smooth(net.Y, samples, seed=seed)), np.arange(samples) % CLASSES, np.arange(1.0, samples + 1))
    return LearningProblem(net, head, loss, tikhonov(0.05), batch, learn=learn, **options)


def _both(net, **options):
    """The short way, and that through f."""
    psi = net.bases["psi"][0]
    return _problem(net, psi, **options), _problem(net, Basis(net.Y, psi.values, "given"), **options)


def _numbers(problem, derivative):
    owners = [parameter for parameter in problem.parameters for _ in parameter.functions]
    return [problem.net.Y.values(d) if p.name == "initial" else coefficients(p, d) for p, d in zip(owners, derivative)]


def _assert_close(found, expected, tolerance=ROUND_OFF):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(initial=0.0), 1e-3))


def _is_short(run):
    return all(isinstance(piece.segment, CoefficientSegment) for piece in run._pieces)


KINDS = {
    "Runge-Kutta": {},
    "a Block a layer": {"layers_per_block": 1},
    "one Block": {"layers_per_block": None},
    "hats in t, two steps": {"bias_in_time": "linear", "kernel_in_time": "linear", "steps": 2},
    "learned times": {"learn_times": True, "layers_per_block": None},
    "gradient flow": {"gradient_flow": True},
    "Crank-Nicolson": {"solver_parameters": {"ts_type": "cn"}},
    "matrix-free": {"solver_parameters": {"ts_type": "cn", "mat_type": "matfree"}},
    "discrete gradient": {"solver_parameters": {"ts_type": "discrete_gradient"}},
}


@on_ranks
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("domain", ROUND_DOMAINS[:1])
def test_values_and_derivatives_are_those_of_the_way_through_f(domain, kind):
    # Solves of stages stop at 1e-8, and not at the same point: lambda is in one of the systems.
    _compare(network(domain, "CG1", **KINDS[kind]), "parameters", 1e-8 if "ts_type" in str(KINDS[kind]) else ROUND_OFF)


@on_ranks
@pytest.mark.parametrize("domain", ROUND_DOMAINS)
def test_the_same_on_every_domain(domain):
    _compare(network(domain, "CG1", bias="basis"), "both", ROUND_OFF)


def _compare(net, learn, tolerance):
    numbers = []
    for problem, short in zip(_both(net, learn=learn), (True, False)):
        J, run = problem.record()
        assert _is_short(run) is short
        values = [float(J(problem.functions))]
        gradient = J.derivative()
        h = [fd.Function(f.function_space()) for f in problem.functions]
        rng = np.random.default_rng(5)
        for function in h:
            space, values_of = function.function_space(), function.dat.data_wo
            nodal = space.mesh() is net.Y.V.mesh()
            direction = smooth(net.Y, space.value_size, seed=9) if nodal else 0.02 * rng.normal(size=space.value_size)
            if values_of.size:
                values_of[...] = direction.reshape(values_of.shape)
        costates = [np.array(net.Y.values(run.costate(l))) for l in range(net.layers + 1)]
        states = [np.array(net.Y.values(f)) for f in run.states()]
        states += [np.array(net.Y.values(run.state(l))) for l in range(net.layers + 1)]
        final = np.array(net.Y.values(run.final))
        hessian = _numbers(problem, J.hessian(h))
        G, _ = problem.record(gauss_newton=True)
        G.derivative()
        action = _numbers(problem, G.hessian(h))
        numbers.append(
            [np.array(values), *_numbers(problem, gradient), *hessian, *action, *costates, *states, final,
             np.array(float(problem.evaluate()[0]))]
        )  # fmt: skip
    _assert_close(*numbers, tolerance)


@on_ranks
@pytest.mark.parametrize("options", [{}, {"layers_per_block": 1, "loss": least_squares}])
def test_taylor(options):
    loss = options.pop("loss", cross_entropy)
    net = network("disk", "CG1", **options)
    problem = _problem(net, net.bases["psi"][0], learn="both", loss=loss)
    J, run = problem.record()
    assert _is_short(run)
    owners = [p for p in problem.parameters if p.name != "initial"]
    h = directions(J, net, owners)
    h.append(net.Y.batch(smooth(net.Y, 4, seed=8)))
    J(problem.functions)
    rates = taylor_to_dict(J, problem.functions, h)
    assert min(rates["R1"]["Rate"]) > 1.95
    assert min(rates["R2"]["Rate"]) > 2.95


@on_ranks
def test_exchanged_and_changed_inputs_are_seen():
    """Coefficients of the input are kept: a batch that is written over it, or a change in place, must drop them."""
    net = network("disk", "CG1")
    found = []
    for problem in _both(net):
        J, run = problem.record()
        steps = [float(J(problem.functions))]
        for seed in (5, 6):
            problem.exchange(Batch(net.Y.batch(smooth(net.Y, 4, seed=seed)), [0, 0, 1, 2]))
            steps += [float(J(problem.functions)), float(J(problem.functions)), *_numbers(problem, J.derivative())]
            steps.append(np.array(net.Y.values(run.state(net.layers))))
        found.append([np.asarray(part) for part in steps])
    assert abs(found[0][1] - found[0][0]) > 1e-3
    _assert_close(*found)


@on_ranks
def test_learned_inputs_are_seen():
    net = network("disk", "CG1")
    found = []
    for problem in _both(net, learn="both"):
        J, _ = problem.record()
        moved = [function.copy(deepcopy=True) for function in problem.functions]
        moved[-1].dat.data_wo[...] *= 0.5
        values = [float(J(moved))]
        moved[-1].dat.data_wo[...] += 0.25
        values.append(float(J(moved)))
        found.append(values)
    assert abs(found[0][0] - found[0][1]) > 1e-3
    np.testing.assert_allclose(*found, rtol=ROUND_OFF)


@on_ranks
@pytest.mark.parametrize("options", [{"layers_per_block": 1}, {"layers_per_block": None}, {"ts_type": "cn"}])
@pytest.mark.parametrize("through_f", [False, True])
def test_an_input_is_projected_once(through_f, options, monkeypatch):
    """On all ranks or on none, though one alone has looked at the data and so may have written."""
    if "ts_type" in options:
        options = {"solver_parameters": options}
    net = network("disk", "CG1", **options)
    problem = _both(net)[through_f]
    J, run = problem.record()
    assert _is_short(run) is not through_f
    seen, project = [], Basis.project

    def counted(basis, f):
        # Later Blocks see f of their own.
        seen.append(basis is net.bases["psi"][0] and np.shares_memory(f, net.Y.values(start.checkpoint)))
        return project(basis, f)

    start = problem.batch.inputs.block_variable
    monkeypatch.setattr(Basis, "project", counted)
    J(problem.functions)
    J.derivative()
    assert not any(seen)
    if net.Y.comm.rank == 0:
        _ = start.checkpoint.dat.data
    J(problem.functions)
    J(problem.functions)
    assert sum(seen) == 1


def test_a_users_own_run_has_f_on_the_tape():
    net = network("disk", "CG1")
    problem = _problem(net, net.bases["psi"][0])
    assert not _is_short(net.run(problem.batch.inputs))
    assert _is_short(problem.evaluate()[1])
    with pytest.raises(ValueError, match="^seen_by: .* is not the psi of all layers"):
        net.run(problem.batch.inputs, seen_by=net.bases["phi"][0])


@pytest.mark.parametrize(
    "options",
    [{"learn_factors": True}, {"solver_parameters": {"ts_type": "rosw"}}, {"solver_parameters": {"ts_adapt_type": "basic"}}],
)
def test_where_f_is_stepped_or_psi_learned_the_way_is_through_f(options):
    net = network("disk", "CG1", **options)
    assert not net.steps_what_is_seen_by(net.bases["psi"][0])
    problem = _problem(net, net.bases["psi"][0])
    with np.errstate(all="ignore"):
        run = problem.evaluate()[1]
    assert not _is_short(run)


@on_ranks
def test_tangents_of_a_run_are_those_of_the_way_through_f():
    net = network("disk", "CG1", layers_per_block=1)
    direction = net.Y.batch(smooth(net.Y, 4, seed=21))
    short, through_f = (net.Y.values(problem.record()[1].tangent(direction)) for problem in _both(net))
    _assert_close([short], [through_f])


@pytest.mark.parametrize("compiled", ["1", "0"])
@pytest.mark.parametrize("layers_per_block", [1, None])
def test_no_field_is_made_in_an_evaluation_and_its_derivative(compiled, layers_per_block, monkeypatch):
    """Neither is one kept on the tape but the input."""
    monkeypatch.setenv("FEM_RESNET_COMPILED", compiled)
    Y = LabelSpace(fd.FunctionSpace(fd.UnitSquareMesh(60, 60), "CG", 1))
    samples, field = 400, Y.nodes * 400 * 8
    psi = polynomials(Y)
    net = ResidualNetwork(psi, layers=Layers(3, per_block=layers_per_block))
    set_smooth(net, np.random.default_rng(0))
    problem = _problem(net, psi, samples=samples)
    J, _ = problem.record()
    J(problem.functions)
    J.derivative()
    tracemalloc.start()
    J(problem.functions)
    J.derivative()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.2 * field, f"{peak / field:.2f} of a field"


def test_the_adjoint_at_the_start_is_made_where_it_is_wanted_alone(monkeypatch):
    """Through f as well: where f_I is learned, and at an interface between two Blocks."""
    calls, start = [], Segment._at_start
    monkeypatch.setattr(Segment, "_at_start", lambda *arguments: (calls.append(1), start(*arguments))[1])
    for layers_per_block, learn, expected in ((None, "parameters", 0), (2, "parameters", 1), (2, "both", 2)):
        problem = _both(network("disk", "CG1", layers_per_block=layers_per_block), learn=learn)[1]
        J, _ = problem.record()
        calls.clear()
        J.derivative()
        assert len(calls) == expected
