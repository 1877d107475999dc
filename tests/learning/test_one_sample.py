"""Batches of one sample are Functions of `Y.V`, numbers on Y, whoever makes them; vectors of one component are taken too."""

import firedrake as fd
import numpy as np
import pytest
from helpers import laplace, set_smooth, smooth
from numpy.testing import assert_allclose

from fem_resnet import (
    Batch,
    Channels,
    Head,
    LearningProblem,
    Lift,
    ResidualNetwork,
    Sensors,
    class_space,
    cross_entropy,
    least_squares,
    solve_costate,
    solve_trajectory,
    terminal_costate,
    tikhonov,
)

on_ranks = pytest.mark.parallel([1, 2, 3])
RANK = {"disk": 6, "sphere": 4, "cube": 4}
each_domain = pytest.mark.parametrize("domain", RANK)


def network(domain):
    phi = laplace(domain, "CG1", RANK[domain])
    net = ResidualNetwork(phi, bias=phi, layers=2, activation="tanh")
    set_smooth(net, np.random.default_rng(0))
    return net


def vector(Y, values):
    """A batch as a user may make it, with vectors of one component."""
    function = fd.Function(fd.VectorFunctionSpace(Y.V.mesh(), Y.V.ufl_element(), dim=1))
    Y.write(function, values)
    return function


@on_ranks
@each_domain
def test_whatever_makes_a_batch_of_one_sample_makes_numbers(domain):
    net = network(domain)
    Y, phi = net.Y, net.bases["phi"][0]
    values = smooth(Y, 1)
    f, two = Y.batch(values), Y.batch(smooth(Y, 2))
    head = Head(phi, phi, "identity")
    head.W.set(0, np.eye(phi.rank))
    product = Channels(Y, 2)
    run = net.run(f)
    problem = LearningProblem(net, None, least_squares, tikhonov(0.1), Batch(f, Y.batch(smooth(Y, 1, seed=2))), learn="both")
    J, recorded = problem.record()
    gradient = J.derivative(apply_riesz=True)[-1]
    action = J.hessian([function.copy(deepcopy=True) for function in problem.functions])[-1]
    path = solve_trajectory(net, f, steps=2)
    back = solve_costate(path, terminal_costate(problem, path.final))
    place = [[0.5, 0.5, 0.7071] if domain == "sphere" else [0.3] * Y.coordinates.shape[1]]
    made = {
        "batch of (nodes,)": Y.batch(values[:, 0]),
        "batch of (nodes, 1)": f,
        "batch of one Function": Y.batch([Y.function(two, 1)]),
        "batch space": fd.Function(Y.batch_space(1)),
        "basis": phi.function(np.ones((phi.rank, 1))),
        "sensors": Sensors(phi.first(1), place).fit([[1.0]]).functions,
        "network": net(f),
        "state": run.state(1),
        "states": list(run.states())[1],
        "tangent": run.tangent(f),
        "recorded state": recorded.state(1),
        "co-state": recorded.costate(1),
        "gradient": gradient,
        "Hessian": action,
        "riesz map": Y.riesz_map(J.derivative()[-1]),
        "trajectory": path(0.3),
        "co-state on its own": back(0.3),
        "head": head(net(f)),
        "prediction": head.predict(net(f)),
        "channel": product.part(product.batch(np.vstack([values, values])))[0],
        "part of a batch": problem.replace(batch=Batch(two, two), learn="parameters").minibatches(1)[0].inputs,
    }
    assert {name: function.ufl_shape for name, function in made.items() if function.ufl_shape != ()} == {}
    assert {name for name, function in made.items() if function.function_space().mesh() is not Y.V.mesh()} == set()
    assert Head(phi, 3).observations([1]).ufl_shape == ()
    assert Y.batch_space(1) == Y.V and Y.samples(Y.V) == 1
    assert fd.assemble(net(f) * fd.dx) == pytest.approx(float(Y.sum(Y.weights @ Y.values(net(f))[:, 0])), rel=1e-9)


@on_ranks
@each_domain
def test_a_vector_of_one_component_is_taken_and_gives_the_same_numbers(domain):
    net = network(domain)
    Y, phi = net.Y, net.bases["phi"][0]
    values, wanted = smooth(Y, 1), smooth(Y, 1, seed=2)
    head = Head(phi, phi, "identity")
    head.W.set(0, np.eye(phi.rank))
    found = []
    for inputs in (Y.batch, lambda v: vector(Y, v)):
        for targets in (Y.batch, lambda v: vector(Y, v)):
            batch = Batch(inputs(values), targets(wanted))
            assert batch.samples == 1
            of_head = LearningProblem(net, head, least_squares, None, batch)
            problem = LearningProblem(net, None, least_squares, None, batch, learn="initial")
            J, run = problem.record()
            (gradient,) = J.derivative(apply_riesz=True)
            assert gradient.function_space() == batch.inputs.function_space() == run.final.function_space()
            numbers = [Y.values(g)[:, 0] for g in (gradient, run.costate(0), run.state(1), net(batch.inputs))]
            found.append([float(of_head.evaluate()[0]), float(J.functional), *numbers])
    for other in found[1:]:
        for one, two in zip(found[0], other):
            assert_allclose(two, one, rtol=0, atol=1e-13)


@on_ranks
def test_one_kind_is_exchanged_for_the_other():
    net = network("disk")
    Y = net.Y
    batches = [
        Batch(make(smooth(Y, 1, seed=k)), make(smooth(Y, 1, seed=k + 5)))
        for k, make in enumerate((Y.batch, lambda v: vector(Y, v), Y.batch))
    ]
    expected = [float(LearningProblem(net, None, least_squares, None, batch).evaluate()[0]) for batch in batches]
    problem = LearningProblem(net, None, least_squares, None, batches[0])
    J = problem.reduced_functional()
    for batch, value in zip(batches, expected):
        problem.exchange(batch)
        assert float(J(problem.functions)) == pytest.approx(value, rel=1e-13)
    with pytest.raises(ValueError, match="batch: expected 1 samples, as many as before, got 2"):
        problem.exchange(Batch(Y.batch(smooth(Y, 2)), Y.batch(smooth(Y, 2))))


@on_ranks
def test_with_channels_one_sample_keeps_its_axis():
    """Shape (C,) is that of C samples of one channel: a Batch could not tell them."""
    Y = laplace("disk", "CG1", 6).Y
    product = Channels(Y, 3)
    one = product.batch(smooth(product, 1))
    assert one.ufl_shape == (3, 1) and Batch(one, [0]).samples == 1
    lift = Lift(product, 1)
    u = lift.fields.batch(smooth(Y, 1))
    assert u.ufl_shape == () and lift(u).ufl_shape == (3, 1)
    assert product.function(one).ufl_shape == (3,)
    assert product.samples(product.V) == 1 and Y.samples(product.V) == 3


@on_ranks
def test_one_sample_of_classes():
    """On the label domain of classes too."""
    phi = laplace("disk", "CG1", 6)
    net, head = ResidualNetwork(phi, bias=phi, layers=1), Head(phi, 3)
    problem = LearningProblem(net, head, cross_entropy, None, Batch(phi.Y.batch(smooth(phi.Y, 1)), [2]))
    assert float(problem.evaluate()[0]) == pytest.approx(np.log(3))
    assert head.predict(net(phi.Y.batch(smooth(phi.Y, 1)))).ufl_shape == ()
    assert class_space(3).batch(np.ones((class_space(3).nodes, 1))).ufl_shape == ()
