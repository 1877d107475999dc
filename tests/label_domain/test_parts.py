"""Parts of a label domain: extension by 0 and restriction are transposes, and networks read and write on parts."""

from functools import cache

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_SELF, COMM_WORLD
from helpers import MESHES, smooth
from numpy.testing import assert_allclose

from fem_resnet import (
    Basis,
    Batch,
    Channels,
    Head,
    Kernel,
    LabelSpace,
    Layers,
    LearningProblem,
    Part,
    ResidualNetwork,
    given_basis,
    laplace_basis,
    least_squares,
    load,
    point_space,
    read_mesh,
    save,
    tikhonov,
)

on_ranks = pytest.mark.parallel([1, 2, 3])


@cache
def label_space(name, family="CG", degree=1, alone=False) -> LabelSpace:
    return LabelSpace(fd.FunctionSpace(read_mesh(MESHES / name, COMM_SELF if alone else COMM_WORLD), family, degree))


@cache
def part(name, which, alone=False) -> Part:
    return Part(label_space(name, alone=alone), which)


#: File, element, part, and its measure where it is known. On some ranks the arm and the tail have no cell.
PARTS = {
    "triangles": ("l_shape.msh", ("CG", 1), "lower arm", 1.0),
    "one node a cell": ("l_shape.msh", ("DG", 0), "corner", 1.0),
    "quadrilaterals": ("annulus.msh", ("CG", 2), "left", None),
    "a number": ("l_shape.msh", ("CG", 1), 3, 1.0),
    "tetrahedra": ("body.msh", ("CG", 1), "left end", 0.3),
    "a boundary": ("l_shape.msh", ("CG", 1), "bottom", None),
    "an edge in space": ("graph.msh", ("CG", 1), "tail", 1.01**0.5),
    "edges that branch": ("graph.msh", ("DG", 0), "cube", 12.0),
}


@on_ranks
@pytest.mark.parametrize("kind", PARTS)
def test_extension_is_the_transpose_of_restriction(kind):
    name, element, which, measure = PARTS[kind]
    Y = label_space(name, *element)
    D = Part(Y, which)
    f, g = Y.batch(smooth(Y)), D.space.batch(smooth(D.space, seed=1))
    extended = D.extend(g)
    assert Y.inner(extended, f) == pytest.approx(D.space.inner(g, D.restrict(f)), rel=1e-12)
    assert Y.sum(Y.weights @ D.indicator) == pytest.approx(D.space.measure, rel=1e-12)
    assert measure is None or D.space.measure == pytest.approx(measure, rel=1e-12)
    # Restricted values are those at the same places, and extended ones are 0 elsewhere.
    at = D.restrict(Y.batch(Y.coordinates))
    assert_allclose(D.space.values(at), D.space.coordinates, rtol=0, atol=1e-12)
    assert not Y.values(extended)[D.indicator == 0].any()
    assert_allclose(Y.values(D.extend(D.restrict(f))), D.indicator[:, None] * Y.values(f), rtol=0, atol=1e-12)


@on_ranks
def test_indicators_of_parts_that_cover_the_domain_add_up_to_one():
    Y = label_space("l_shape.msh")
    total = sum(Part(Y, which).indicator for which in ("lower arm", "corner", "right arm"))
    assert_allclose(total, 1.0, rtol=0, atol=1e-12)


@on_ranks
def test_chosen_nodes_are_a_part_and_keep_the_edges_of_a_graph():
    ring = np.roll(np.eye(12), 1, axis=0)
    Y = point_space(np.arange(1.0, 13.0), graph=ring + ring.T)
    D = Part(Y, (Y.numbers >= 2) & (Y.numbers < 6))
    assert D.space.measure == 3 + 4 + 5 + 6
    # A path of four points, of the weights 3 .. 6, has the Laplacian below.
    K = np.array([[1.0, -1, 0, 0], [-1, 2, -1, 0], [0, -1, 2, -1], [0, 0, -1, 1]])
    root = np.arange(3.0, 7.0) ** -0.5
    expected = np.linalg.eigvalsh(root[:, None] * K * root)
    assert_allclose(laplace_basis(D.space, 4).eigenvalues, expected, rtol=0, atol=1e-12)


@on_ranks
def test_a_part_sees_where_the_mesh_was_moved_to():
    """Its cells are those of the label domain, also where PETSc has other coordinates."""
    mesh = read_mesh(MESHES / "l_shape.msh", COMM_WORLD)
    x = fd.SpatialCoordinate(mesh)
    curved = fd.Function(fd.VectorFunctionSpace(mesh, "CG", 2)).interpolate(fd.as_vector([x[0] * (2 + x[1]), 3 * x[1]]))
    Y = LabelSpace(fd.FunctionSpace(fd.Mesh(curved), "CG", 1))
    # The integral of 3 (2 + x_1) over the square (-1, 0) x (0, 1).
    assert Part(Y, "corner").space.measure == pytest.approx(7.5, rel=1e-12)


@on_ranks
def test_a_basis_of_a_part_moves_to_a_finer_mesh_that_has_the_part():
    Y = label_space("l_shape.msh")
    D = Part(Y, "corner")
    phi = D.extend(laplace_basis(D.space, 4))
    finer = LabelSpace(fd.FunctionSpace(fd.MeshHierarchy(Y.V.mesh(), 1)[-1], "CG", 1))
    moved = phi.on(finer)
    there = Part(finer, "corner")
    # Eigenvalues of the unit square, on a mesh of six cells a side and on one of twelve.
    assert_allclose(phi.eigenvalues[1:] / np.pi**2, [1, 1, 2], rtol=0.05)
    assert_allclose(moved.eigenvalues[1:] / np.pi**2, [1, 1, 2], rtol=0.02)
    assert not moved.values[there.indicator == 0].any()
    integrals = [b.project(smooth(b.Y)) for b in (phi, moved)]
    assert_allclose(integrals[1], integrals[0], rtol=0, atol=0.02)
    assert phi.first(2).on(finer).rank == 2


@on_ranks
def test_a_basis_of_a_part_moves_also_after_it_was_written_and_read(tmp_path):
    folder, Y = COMM_WORLD.bcast(tmp_path), label_space("l_shape.msh")
    named = [Part(Y, which) for which in ("corner", "right arm", 1)]
    phi, psi, bias = (D.extend(laplace_basis(D.space, rank)) for D, rank in zip(named, (3, 4, 2)))
    net = ResidualNetwork(Kernel(phi, psi), bias=bias, layers=1)
    save(folder / "net.h5", net)
    read, _ = load(folder / "net.h5")
    meshes = [each.V.mesh() for each in (Y, read.Y)]
    finer, there = (LabelSpace(fd.FunctionSpace(fd.MeshHierarchy(mesh, 1)[-1], "CG", 1)) for mesh in meshes)
    for role in ("phi", "psi", "bias"):
        expected, found = net.bases[role][0].on(finer), read.bases[role][0].on(there)
        assert found.kind == expected.kind == net.bases[role][0].kind
        assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-8, atol=1e-10)
        integrals = [each.values.T @ (each.Y.weights[:, None] * moments(each.Y)) for each in (expected, found)]
        assert_allclose(*map(Y.sum, integrals), rtol=0, atol=1e-8)


def moments(Y):
    """Values that tell functions apart, shape (nodes, 4)."""
    x, y = Y.coordinates.T
    return np.stack([x, y, x * y, np.cos(3 * x + y)], axis=1)


def extruded(family, degree):
    disk = fd.UnitDiskMesh(1, comm=COMM_WORLD)
    return LabelSpace(fd.FunctionSpace(fd.ExtrudedMesh(disk, 2, layer_height=0.5), family, degree))


@on_ranks
@pytest.mark.parametrize("which, height", [("bottom", 0.0), ("top", 1.0)])
def test_the_ends_of_an_extruded_mesh_are_parts(which, height):
    """A kernel that writes there leaves the rest as it is."""
    Y = extruded("CG", 1)
    D = Part(Y, which)
    assert D.space.size == 25 and D.space.numbers is not None  # vertices of the disk
    assert_allclose(D.space.coordinates[:, 2], height, rtol=0, atol=1e-14)
    assert_allclose(D.indicator, Y.coordinates[:, 2] == height, rtol=0, atol=1e-14)
    phi = D.extend(given_basis(D.space, [1.0]))
    net = ResidualNetwork(Kernel(phi, laplace_basis(Y, 3)), bias=phi, layers=1, final_time=1.0)
    net.kernel.set(0, np.ones((1, 3)))
    inputs = Y.batch(smooth(Y))
    change = Y.values(net(inputs)) - Y.values(inputs)
    assert not change[D.indicator == 0].any() and abs(change[D.indicator > 0]).min(initial=1.0) > 1e-3


@on_ranks
def test_other_parts_of_an_extruded_mesh_are_refused():
    with pytest.raises(ValueError, match=r"^which: expected 'bottom' or 'top', the parts of an extruded mesh, .* got 'side'"):
        Part(extruded("CG", 1), "side")
    with pytest.raises(ValueError, match=r"^which: expected a part with nodes, got one without a node of .*DG0"):
        Part(extruded("DG", 0), "top")


@on_ranks
def test_groups_of_gmsh_with_two_dimensions_less_are_refused(tmp_path):
    path = COMM_WORLD.bcast(tmp_path) / "corner.msh"
    if COMM_WORLD.rank == 0:
        path.write_text(WITH_A_POINT)
    COMM_WORLD.barrier()
    Y = LabelSpace(fd.FunctionSpace(read_mesh(path, COMM_WORLD), "CG", 1))
    assert Part(Y, "all").space.measure == pytest.approx(1.0, rel=1e-14)
    with pytest.raises(ValueError, match=r"^which: .* got 'tip'; groups of Gmsh with two dimensions less than the cells"):
        Part(Y, "tip")


#: The unit square as two triangles, in format 2.2.
WITH_A_POINT = """\
$MeshFormat
2.2 0 8
$EndMeshFormat
$PhysicalNames
2
0 7 "tip"
2 1 "all"
$EndPhysicalNames
$Nodes
4
1 0 0 0
2 1 0 0
3 1 1 0
4 0 1 0
$EndNodes
$Elements
3
1 15 2 7 1 1
2 2 2 1 1 1 2 3
3 2 2 1 1 1 3 4
$EndElements
"""


def in_parts(alone=False) -> LearningProblem:
    """A network that reads in the right arm and in what it has written, and whose output lives in the lower arm."""
    corner, lower, right = (part("l_shape.msh", which, alone) for which in ("corner", "lower arm", "right arm"))
    Y = corner.Y
    out = lower.extend(laplace_basis(lower.space, 4))
    both = Basis(Y, np.hstack([out.values, right.extend(laplace_basis(right.space, 3)).values]), "given")
    net = ResidualNetwork(Kernel(out, both), bias=out, layers=Layers([0.0, 0.4, 1.0], steps=2), activation="tanh")
    head = Head(out, onto=laplace_basis(lower.space, 3), prediction="identity")
    random = np.random.default_rng(0)
    for layer in range(net.layers):
        net.kernel.set(layer, random.normal(size=(4, 7)))
        net.bias.set(layer, random.normal(size=4))
    head.W.set(0, random.normal(size=(3, 4)))
    inputs = right.extend(right.space.batch(smooth(right.space)))
    targets = lower.space.batch(smooth(lower.space, seed=1))
    return LearningProblem(net, head, least_squares, tikhonov(0.1), Batch(inputs, targets))


@on_ranks
def test_a_network_in_parts_does_not_see_the_partition_and_leaves_the_rest_as_it_was():
    problem, alone = in_parts(), in_parts(alone=True)
    J, there = (float(each.record()[0](each.functions)) for each in (problem, alone))
    assert J == pytest.approx(there, rel=1e-9)  # the eigensolver's tolerance
    net, Y = problem.net, problem.net.Y
    change = Y.values(net(problem.batch.inputs)) - Y.values(problem.batch.inputs)
    written = part("l_shape.msh", "lower arm").indicator > 0
    assert not change[~written].any()
    assert Y.comm.allreduce(np.abs(change[written]).max(initial=0.0)) > 0.1


@on_ranks
def test_taylor_of_a_network_and_a_head_in_parts(taylor):
    problem = in_parts()
    random = np.random.default_rng(1)
    directions = []
    for parameter in problem.parameters:
        for k, function in enumerate(parameter.functions):
            direction = fd.Function(function.function_space())
            basis = parameter.space_bases[k]
            basis.write(direction, random.normal(size=basis.shape))
            directions.append(direction)
    taylor(problem.reduced_functional(), problem.functions, directions, "in parts", "kernel, bias, head", second_order=True)


#: Two squares in format 4.1; the left one is in two groups.
OVERLAPPING = """\
$MeshFormat
4.1 0 8
$EndMeshFormat
$PhysicalNames
3
1 3 "edge"
2 1 "all"
2 2 "left"
$EndPhysicalNames
$Entities
6 7 2 0
1 0 0 0 0
2 1 0 0 0
3 2 0 0 0
4 2 1 0 0
5 1 1 0 0
6 0 1 0 0
1 0 0 0 1 0 0 0 2 1 -2
2 1 0 0 2 0 0 0 2 2 -3
3 2 0 0 2 1 0 0 2 3 -4
4 1 1 0 2 1 0 0 2 4 -5
5 0 1 0 1 1 0 0 2 5 -6
6 0 0 0 0 1 0 1 3 2 6 -1
7 1 0 0 1 1 0 0 2 2 -5
1 0 0 0 1 1 0 2 1 2 4 1 7 5 6
2 1 0 0 2 1 0 1 1 4 2 3 4 -7
$EndEntities
$Nodes
9 6 1 6
0 1 0 1
1
0 0 0
0 2 0 1
2
1 0 0
0 3 0 1
3
2 0 0
0 4 0 1
4
2 1 0
0 5 0 1
5
1 1 0
0 6 0 1
6
0 1 0
1 6 0 0
2 1 0 0
2 2 0 0
$EndNodes
$Elements
3 5 1 5
1 6 1 1
1 6 1
2 1 2 2
2 1 2 6
3 6 2 5
2 2 2 2
4 2 3 5
5 5 3 4
$EndElements
"""


@on_ranks
def test_groups_may_overlap_in_format_4(tmp_path):
    if COMM_WORLD.rank == 0:
        (tmp_path / "two.msh").write_text(OVERLAPPING)
    COMM_WORLD.barrier()
    Y = LabelSpace(fd.FunctionSpace(read_mesh(tmp_path / "two.msh", COMM_WORLD), "CG", 1))
    measures = [Part(Y, which).space.measure for which in ("all", "left", 1, 2)]
    assert measures == pytest.approx([2.0, 1.0, 2.0, 1.0], rel=1e-14)


WRONG = {
    "no such name": (
        "l_shape.msh",
        "upper arm",
        "expected a part of .*, by name 'bottom', 'corner', .*, or by number 1, 2, 3",
    ),
    "no such number": ("l_shape.msh", 17, "expected a part of .*, got 17"),
    "a label of PETSc's": ("l_shape.msh", "depth", "expected a part of"),
    "an empty name": ("l_shape.msh", "", "expected a text"),
}


@on_ranks
@pytest.mark.parametrize("kind", WRONG)
def test_a_part_that_is_not_there_is_refused_on_all_ranks(kind):
    name, which, message = WRONG[kind]
    with pytest.raises(ValueError, match=f"^which: {message}"):
        Part(label_space(name), which)


@on_ranks
def test_what_is_no_part_is_refused():
    Y = label_space("l_shape.msh")
    with pytest.raises(ValueError, match=r"^which: expected a part with nodes, got one without a node of .*DG0"):
        Part(label_space("l_shape.msh", "DG", 0), "bottom")
    with pytest.raises(ValueError, match=r"^which: expected a part with nodes"):
        Part(Y, np.zeros(Y.nodes, dtype=bool))
    with pytest.raises(ValueError, match=r"^which: expected bools of shape \(nodes,\)"):
        Part(Y, np.zeros(Y.nodes + 1, dtype=bool))
    with pytest.raises(TypeError, match=r"^which: expected a ndarray, got NoneType"):
        Part(Y, None)
    with pytest.raises(ValueError, match=r"^which: .* as a set of points has no named parts, got 'left'"):
        Part(point_space(np.ones(4)), "left")
    with pytest.raises(ValueError, match=r"^Y: expected the label domain of one channel"):
        Part(Channels(Y, 2), "corner")
    D = part("l_shape.msh", "corner")
    with pytest.raises(ValueError, match=r"^function: expected a basis on .*, the part's own space"):
        D.extend(given_basis(Y, [1.0]))
    with pytest.raises(ValueError, match=r"^function: expected a basis on"):
        D.restrict(given_basis(D.space, [1.0]))


@pytest.mark.parallel([2, 3])
def test_another_part_on_one_rank_is_refused_on_all():
    with pytest.raises(ValueError, match=r"^which: all ranks must give the same"):
        Part(label_space("l_shape.msh"), "corner" if COMM_WORLD.rank else "lower arm")
