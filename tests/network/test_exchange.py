"""Batches that are exchanged on the tape, and networks that move to other meshes."""

import logging
import re
from functools import cache

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import label_space, laplace, set_smooth, smooth
from problems import gathered, learning_problem, network

from fem_resnet.label_domain.basis import cell_indicators, given_basis
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.laplace import laplace_basis
from fem_resnet.label_domain.points import point_space
from fem_resnet.learning.batch import Batch
from fem_resnet.learning.head import Head
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.network.network import ResidualNetwork

on_ranks = pytest.mark.parallel([1, 2, 3])


def flat(problem, derivative):
    owners = [p for p in problem.parameters for _ in p.functions]
    return np.concatenate([p.space_basis.read(d).ravel() for p, d in zip(owners, derivative)])


@on_ranks
@pytest.mark.parametrize("layers_per_block, head", [(1, True), (2, False), (None, True)])
def test_an_exchanged_batch_gives_what_a_new_recording_gives(layers_per_block, head):
    net = network("disk", "CG1", layers_per_block=layers_per_block)
    problem = learning_problem(net, head=head, samples=4)
    J, _ = problem.record()
    J(problem.functions)
    blocks = J.tape.get_blocks().copy()
    targets = [2, 2, 0, 1] if head else net.Y.batch(smooth(net.Y, 4, seed=78))
    other = Batch(net.Y.batch(smooth(net.Y, 4, seed=77)), targets, [1, 0, 3, 1])
    problem.exchange(other)
    value = J(problem.functions)
    gradient = flat(problem, J.derivative())
    again, _ = LearningProblem(net, problem.head, problem.loss, problem.regulariser, other).record()
    # the same operations on the same numbers
    assert value == again(problem.functions)
    np.testing.assert_array_equal(gradient, flat(problem, again.derivative()))
    assert J.tape.get_blocks() == blocks, "nothing was recorded anew"


@pytest.mark.parallel([1, 2])
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


@pytest.mark.parallel([1, 2])
def test_batches_that_do_not_fit_are_refused():
    problem = learning_problem(network("disk", "CG1"), samples=4)
    with pytest.raises(ValueError, match="batch: expected 4 samples, as many as before, got 2"):
        problem.exchange(Batch(problem.net.Y.batch(smooth(problem.net.Y, 2)), [0, 1]))
    with pytest.raises(TypeError, match="batch: expected a Batch, got list"):
        problem.exchange([1, 2])
    for size in (0, 1.5):
        with pytest.raises(ValueError, match="size: expected a positive integer"):
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

RANK = {"disk": 6, "sphere": 9}  # whole eigenspaces on every mesh
TRIANGLES = {"disk": fd.UnitDiskMesh, "sphere": fd.UnitIcosahedralSphereMesh}
#: Label domain, mesh and element, and refinements, each of which halves the mesh size.
ELSEWHERE = [
    ("sphere", fd.UnitCubedSphereMesh, "CG", 2, (1, 2, 3)),
    ("disk", fd.UnitDiskMesh, "DG", 0, (2, 3, 4)),
    ("disk", fd.UnitDiskMesh, "KMV", 2, (1, 2, 3)),
    ("disk", fd.UnitDiskMesh, "CG", 1, (2, 3, 4)),
    ("sphere", fd.UnitIcosahedralSphereMesh, "CG", 1, (1, 2, 3)),
]


@cache
def network_on(domain):
    """A network on triangles of a middle size: there are coarser and finer meshes."""
    mesh = TRIANGLES[domain](3 if domain == "disk" else 2)
    phi = laplace_basis(LabelSpace(fd.FunctionSpace(mesh, "CG", 1)), RANK[domain])
    net = ResidualNetwork(phi, bias=phi, layers=2, activation="tanh")
    set_smooth(net, np.random.default_rng(0))
    return net


@cache
def moments(domain, mesh, element, degree, refinement):
    """Integrals of f(T) times smooth functions, for one smooth f_I: numbers that do not know the mesh."""
    Y = LabelSpace(fd.FunctionSpace(mesh(refinement), element, degree))
    f = network_on(domain).on(Y)(Y.batch(np.cos(2 * Y.coordinates[:, :1] + Y.coordinates[:, 1:2])))
    return Y.sum((smooth(Y, 8, seed=4) * Y.weights[:, None]).T @ Y.values(f))[:, 0]


@on_ranks
@pytest.mark.parametrize("domain, mesh, element, degree, refinements", ELSEWHERE[: None if COMM_WORLD.size < 3 else 1])
def test_a_network_moved_to_other_meshes_converges_to_one_function(domain, mesh, element, degree, refinements):
    """At the order of the quadrature, from meshes coarser and finer than its own, of other cells and elements."""
    # By Richardson, from triangles in CG1.
    finest = 5 if domain == "disk" else 4
    coarse, fine = (moments(domain, TRIANGLES[domain], "CG", 1, n) for n in (finest - 1, finest))
    limit = (4 * fine - coarse) / 3
    errors = [np.linalg.norm(moments(domain, mesh, element, degree, n) - limit) for n in refinements]
    order = np.log2(errors[-2] / errors[-1])
    assert order > 1.7, f"errors {errors} fall with order {order:.2f}, expected 2"


@pytest.mark.parallel([2, 3])
def test_a_basis_moved_to_another_mesh_is_the_same_on_any_number_of_ranks():
    """Inner products with fixed smooth functions: the whole meshes on this rank alone against the parts of all ranks."""
    for domain, element, rank in [("disk", "DG0", 6), ("sphere", "CG1", 9)][: 4 - COMM_WORLD.size]:
        parts, alone = (
            laplace(domain, "CG1", rank, alone=alone).on(label_space(domain, element, 2, alone)) for alone in (False, True)
        )
        # the eigensolver's tolerance, twice
        np.testing.assert_allclose(parts.project(smooth(parts.Y, 5)), alone.project(smooth(alone.Y, 5)), rtol=0, atol=1e-9)
        np.testing.assert_allclose(parts.eigenvalues, alone.eigenvalues, rtol=0, atol=1e-9 * alone.eigenvalues[-1])


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
    other = laplace("sphere", "CG1", 4)
    onto_itself = Head(phi, phi).on(Y)  # and a label domain of the output's own stays
    assert onto_itself.onto is onto_itself.psi and onto_itself.Y is Y and Head(phi, other).on(Y).onto is other
    for ours, theirs in zip([*net.parameters, *head.parameters], [*moved.parameters, *moved_head.parameters]):
        for k in range(len(ours.functions)):
            np.testing.assert_array_equal(ours.get(k), theirs.get(k))
    assert moved.kernel.space_basis.kernel.phi is moved.bias.space_basis.basis  # one basis stays one


@pytest.mark.parallel([1, 2])
def test_what_is_tied_to_its_mesh_does_not_move():
    Y, other = label_space("disk", "DG0"), label_space("disk", "DG0", 2)
    x = fd.SpatialCoordinate(Y.V.mesh())[0]
    for basis in (cell_indicators(Y), given_basis(Y, [1, x])):
        with pytest.raises(ValueError, match="are tied to their mesh; a Laplace basis is not"):
            basis.on(other)
    with pytest.raises(ValueError, match="^ResidualNetwork.on: it does not take a bias with a value at every node"):
        network("disk", "DG0").on(other)


@pytest.mark.parallel([1, 2])
def test_spaces_that_do_not_hold_a_basis_are_refused():
    phi = laplace("disk", "CG1", 12)
    net = ResidualNetwork(phi, bias=phi, layers=1)
    tiny = LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(0), "CG", 1))
    wrong = [
        (tiny, ValueError, "Y: expected at least 12 nodes, one a function; LabelSpace.* has 9$"),
        (
            label_space("sphere", "CG1"),
            ValueError,
            "Y: expected a label space of the same Y, .* in a space of 3 dimensions, not 2. Kernels of LaplaceFunctions",
        ),
        (
            point_space(np.ones(9), np.ones((9, 2))),
            ValueError,
            "Y: expected a label space of the same Y, .* is a set of points. Kernels of LaplaceFunctions",
        ),
        (tiny.V, TypeError, "Y: expected a LabelSpace, got .*"),
    ]
    for Y, error, message in wrong:
        for what in (phi, net, Head(phi, 3)):
            with pytest.raises(error, match=message):
                what.on(Y)


@on_ranks
def test_what_a_mesh_does_not_hold_of_a_basis_is_reported(caplog):
    """Once, by rank 0. On finer meshes the last of these functions stands behind others: a buffer of modes has it."""
    basis = laplace_basis(LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(3), "CG", 1)), 11)
    lost = {}
    for refinement in (1, 2, 3, 4):
        caplog.clear()
        with caplog.at_level(logging.INFO, "fem_resnet"):
            basis.on(LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(refinement), "CG", 1)))
        told = [record for record in caplog.records if "is lost" in record.message]
        assert len(told) == (COMM_WORLD.rank == 0)
        for record in told:
            part = re.search(r"11 functions moved from .* to LabelSpace\(.*\): a part of (\S+) is lost$", record.message)[1]
            lost[refinement] = float(part), record.levelname
    if COMM_WORLD.rank == 0:
        # 25 nodes hold few of them well; 289 are a copy, on which the eigensolver's tolerance is left.
        assert lost[1][0] > 0.1 > lost[2][0] > lost[4][0] > 1e-3 and lost[3][0] < 1e-9
        assert [level for _, level in lost.values()] == ["WARNING", "INFO", "INFO", "INFO"]
