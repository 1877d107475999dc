"""Batches that are exchanged on the tape, and networks that move to other meshes."""

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import label_space, laplace, set_smooth, smooth
from problems import gathered, learning_problem, network

from fem_resnet.basis import cell_indicators, given_basis
from fem_resnet.head import Head
from fem_resnet.label_space import LabelSpace
from fem_resnet.laplace import laplace_basis
from fem_resnet.network import ResidualNetwork
from fem_resnet.objective import Batch, LearningProblem

on_ranks = pytest.mark.parallel([1, 2, 3])


def flat(problem, derivative):
    owners = [p for p in problem.parameters for _ in p.functions]
    return np.concatenate([p.space_basis.read(d).ravel() for p, d in zip(owners, derivative)])


@on_ranks
@pytest.mark.parametrize("layers_per_block", [1, 2, None])
def test_an_exchanged_batch_gives_what_a_new_recording_gives(layers_per_block):
    net = network("disk", "CG1", layers_per_block=layers_per_block)
    problem = learning_problem(net, samples=4)
    J, _ = problem.record()
    J(problem.functions)
    other = Batch(net.Y.batch(smooth(net.Y, 4, seed=77)), [2, 2, 0, 1], [1, 0, 3, 1])
    problem.exchange(other)
    value = J(problem.functions)
    gradient = flat(problem, J.derivative())
    again, _ = LearningProblem(net, problem.head, problem.loss, problem.regulariser, other).record()
    # the same operations on the same numbers
    assert value == again(problem.functions)
    np.testing.assert_array_equal(gradient, flat(problem, again.derivative()))


def test_a_derivative_between_exchange_and_evaluation_is_refused():
    problem = learning_problem(network("disk", "CG1"), samples=4)
    J, _ = problem.record()
    problem.exchange(Batch(problem.net.Y.batch(smooth(problem.net.Y, 4, seed=5)), [0, 0, 0, 0]))
    with pytest.raises(RuntimeError, match="an input has changed since the tape was evaluated"):
        J.derivative()


@on_ranks
@pytest.mark.parametrize("seed", [None, 3])
def test_minibatches_add_up_to_the_whole(seed):
    """The last one is padded with samples that do not count."""
    whole = learning_problem(network("disk", "CG1"), samples=7, weight=None)
    J, _ = whole.evaluate()
    batches = whole.minibatches(3, seed)
    assert [batch.samples for batch in batches] == [3, 3, 3]
    assert [int(np.count_nonzero(batch.weights)) for batch in batches] == [3, 3, 1]
    problem = LearningProblem(whole.net, whole.head, whole.loss, None, batches[0])
    mini, _ = problem.record()
    parts = []
    for batch in batches:
        problem.exchange(batch)
        parts.append(mini(problem.functions) * sum(batch.weights))
    assert sum(parts) == pytest.approx(float(J), rel=1e-13)  # the weights of all batches together have sum one


def test_batches_that_do_not_fit_are_refused():
    problem = learning_problem(network("disk", "CG1"), samples=4)
    with pytest.raises(ValueError, match="batch: 4 samples are wanted, as many as before, 2 were given"):
        problem.exchange(Batch(problem.net.Y.batch(smooth(problem.net.Y, 2)), [0, 1]))
    with pytest.raises(TypeError, match="batch: a Batch is wanted, list was given"):
        problem.exchange([1, 2])
    for size in (0, 1.5):
        with pytest.raises(ValueError, match="size: a positive integer is wanted"):
            problem.minibatches(size)


def test_two_recordings_of_one_problem_do_not_disturb_each_other():
    problem = learning_problem(network("disk", "CG1", layers_per_block=1), samples=4)
    one, _ = problem.record()
    two, _ = problem.record()
    one(problem.functions)
    expected = flat(problem, one.derivative())
    one(problem.functions)
    two([f._ad_mul(2.0) for f in problem.functions])
    np.testing.assert_array_equal(flat(problem, one.derivative()), expected)


# -- the same network on another mesh ---------------------------------------------------------------------------------

MESHES = {"disk": fd.UnitDiskMesh, "sphere": fd.UnitIcosahedralSphereMesh}
RANK = {"disk": 6, "sphere": 9}  # whole eigenspaces on every mesh


def moments(net, Y):
    """Integrals of f(T) times smooth functions, for one smooth f_I: numbers that do not know the mesh."""
    f = net.on(Y)(Y.batch(np.cos(2 * Y.coordinates[:, :1] + Y.coordinates[:, 1:2])))
    return Y.sum((smooth(Y, 8, seed=4) * Y.weights[:, None]).T @ Y.values(f))[:, 0]


@on_ranks
@pytest.mark.parametrize(
    "domain, element, degree", [("sphere", "CG", 1), ("disk", "DG", 0), ("disk", "CG", 1)][: None if COMM_WORLD.size < 3 else 1]
)
def test_a_network_moved_to_finer_meshes_converges_with_the_order_of_the_quadrature(domain, element, degree):
    Y = LabelSpace(fd.FunctionSpace(MESHES[domain](2), "CG", 1))
    phi = laplace_basis(Y, RANK[domain])
    net = ResidualNetwork(phi, bias=phi, layers=2, activation="tanh")
    set_smooth(net, np.random.default_rng(0))
    values = [moments(net, LabelSpace(fd.FunctionSpace(MESHES[domain](n), element, degree))) for n in (2, 3, 4, 5)]
    steps = [np.linalg.norm(b - a) for a, b in zip(values, values[1:])]
    order = np.log2(steps[1] / steps[2])
    assert order > 1.7, f"differences {steps} between meshes fall with order {order:.2f}, 2 is wanted"


@on_ranks
def test_a_basis_moved_to_a_copy_of_its_mesh_is_the_same_basis():
    original = laplace("disk", "CG1", 6)
    copy = LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(1), "CG", 1))
    moved = original.on(copy)
    # the same nodes, on whichever rank; the eigensolver's tolerance
    np.testing.assert_allclose(gathered(copy, moved.values), gathered(original.Y, original.values), atol=1e-9)
    assert original.on(original.Y) is original


@on_ranks
def test_there_and_back_again_gives_the_same_functions():
    coarse = laplace_basis(LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(2), "CG", 1)), 6)
    fine = coarse.on(LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(3), "CG", 1)))
    back = fine.on(coarse.Y)
    np.testing.assert_allclose(fine.gram, np.eye(6), atol=1e-12)
    # functions outside the span of the first modes of the other mesh are lost, a part of order h^2
    assert np.abs(back.values - coarse.values).max() < 0.05 * np.abs(coarse.values).max()


@on_ranks
def test_a_moved_network_and_head_keep_their_coefficients():
    phi = laplace("disk", "CG1", 6)
    net, head = ResidualNetwork(phi, bias=phi, layers=2), Head(phi, 3)
    set_smooth(net, np.random.default_rng(0))
    head.W.set(0, np.arange(18.0).reshape(3, 6))
    Y = LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(2), "DG", 0))
    moved, moved_head = net.on(Y), head.on(Y)
    for ours, theirs in zip([*net.parameters, *head.parameters], [*moved.parameters, *moved_head.parameters]):
        for k in range(len(ours.functions)):
            np.testing.assert_array_equal(ours.get(k), theirs.get(k))
    assert moved.kernel.space_basis.kernel.phi is moved.bias.space_basis.basis  # one basis stays one


def test_what_is_tied_to_its_mesh_does_not_move():
    Y, other = label_space("disk", "DG0"), label_space("disk", "DG0", 2)
    x = fd.SpatialCoordinate(Y.V.mesh())[0]
    for basis in (cell_indicators(Y), given_basis(Y, [1, x])):
        with pytest.raises(ValueError, match="are tied to their mesh; a Laplace basis is not"):
            basis.on(other)
    with pytest.raises(ValueError, match="the bias has a value at every node, so the network is tied to its mesh"):
        network("disk", "DG0").on(other)
    tiny = LabelSpace(fd.FunctionSpace(fd.UnitIntervalMesh(2), "DG", 0))
    with pytest.raises(ValueError, match="Y: at least 6 nodes are wanted"):
        laplace("disk", "CG1", 6).on(tiny)
