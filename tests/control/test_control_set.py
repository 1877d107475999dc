"""Control sets: sections, supports and extremes of T_f against brute force over points and corner choices."""

from itertools import product

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import label_space, smooth
from numpy.testing import assert_allclose, assert_array_equal

from fem_resnet import (
    Box,
    Ellipse,
    LabelSpace,
    NodalBox,
    NodalSets,
    Points,
    Polygon,
    Sections,
    StateGrid,
    solve_value_function,
)
from fem_resnet.control.sets.nodal_set import at_nodes

ARROW = [(-1, -1), (1, 0.2), (-0.5, 1.5), (0.1, 0.1)]  # not convex
SETS = {
    "box": Box((-1, 2), (-0.5, 1.5)),
    "box of no width": Box((0, 0), (-1, 1)),
    "triangle": Polygon([(0, 0), (1, -1), (2, 3)]),
    "arrow": Polygon(ARROW),
    "disk": Ellipse((0.3, -0.2), 0.7),
    "ellipse": Ellipse((0.1, 0.2), [[1.0, 0.3], [-0.5, 0.4]]),
    "points": Points([(0, 1), (0, -1), (1, 0.5), (-1, 2), (1, 0.4)]),
    "lens": Sections((-1, 1), lambda a: a**2 - 1, lambda a: 1 - a**2, convex=True),
    "two humps": Sections((-1, 1), lambda a: 0 * a - 2, lambda a: np.cos(7 * a) - 0.2 * a),
}
each_set = pytest.mark.parametrize("A", SETS.values(), ids=SETS.keys())

#: Weights and values of f on five cells.
W = np.array([0.3, 0.1, 0.5, 0.2, 0.4])
F = np.array([1.0, -2.0, 0.5, -0.3, 0.0])


def cloud(A, n=201):
    a, b = A.sample(n)
    assert A.contains(a, b).all()
    return a, b


@each_set
def test_sections_are_the_ends_of_what_is_in_the_set(A):
    a, b = cloud(A)
    for value in np.unique(a)[::20]:
        m, M = A.sections(value)
        inside = b[a == value]
        assert m <= inside.min() + 1e-12 and inside.max() <= M + 1e-12
        assert A.contains(value, m) and A.contains(value, M)
        assert not A.contains(value, m - 1e-6) and not A.contains(value, M + 1e-6)
    low, high = A.bias_range
    assert not A.contains(low - 1e-6, A.sections(low)[0]) and A.sections(high + 1.0)[0] == np.inf


@each_set
def test_the_support_is_the_maximum_over_the_set_and_is_attained_in_it(A):
    alpha, beta = np.cos(np.arange(20)), np.sin(np.arange(20))
    a, b = cloud(A)
    values = np.multiply.outer(alpha, a) + np.multiply.outer(beta, b)
    assert A.contains(*A.maximise(alpha, beta), 1e-10).all()
    support = A.support(alpha, beta)
    # The cloud's spacing in a is 1/100; where the boundary is upright its sections grow as a square root.
    assert (support >= values.max(axis=1) - 1e-12).all() and (support <= values.max(axis=1) + 0.05).all()


@each_set
def test_extremes_of_T_are_those_over_all_controls(A):
    """(4.9): brute force over a on a grid and all choices of an end of the section on each cell."""
    positive, negative = W @ np.maximum(F, 0), W @ np.maximum(-F, 0)
    a, _ = cloud(A, 801)
    a = np.unique(a)
    m, M = A.sections(a)
    best = [-np.inf, np.inf]
    for choice in product([0, 1], repeat=5):
        b = np.where(np.array(choice)[:, None], M, m)
        T = a - (W * F) @ b
        best = [max(best[0], T.max()), min(best[1], T.min())]
    for extreme, sign, brute in ((A.largest, 1, best[0]), (A.smallest, -1, best[1])):
        found = extreme(positive, negative)
        b = np.where(F > 0, found.where_positive, found.where_negative)
        assert A.contains(found.a, b, 1e-10).all()
        assert_allclose(found.a - (W * F) @ b, found.value, atol=1e-12)
        assert -1e-12 <= sign * (found.value - brute) < 2e-2  # the grid's spacing, where m has an upright end


@each_set
def test_extremes_of_many_times_are_found_at_once(A):
    positive, negative = np.abs(np.cos(np.arange(6.0))).reshape(2, 3), np.abs(np.sin(np.arange(3.0)))
    for extreme in (A.largest, A.smallest):
        together = extreme(positive, negative)
        assert together.value.shape == (2, 3)
        for i, j in np.ndindex(2, 3):
            alone = extreme(positive[i, j], negative[j])
            assert_allclose(alone.value, together.value[i, j], rtol=0, atol=1e-13)


def test_the_box_formula_of_the_paper():
    found = SETS["box"].largest(2.0, 1.0), SETS["box"].smallest(2.0, 1.0)
    assert [(e.a, e.where_positive, e.where_negative) for e in found] == [(2, -0.5, 1.5), (-1, 1.5, -0.5)]


def test_disk_in_closed_form_and_by_search():
    """T^+ of the unit disk is sqrt(1 + (F+ + F-)^2)."""
    searched = Sections((-1, 1), lambda a: -np.sqrt(1 - a**2), lambda a: np.sqrt(1 - a**2), convex=True)
    for A in (Ellipse(), searched):
        assert_allclose(A.largest(1.3, 0.9).value, np.hypot(1, 2.2), rtol=1e-12)
        assert_allclose(A.smallest(1.3, 0.9).value, -np.hypot(1, 2.2), rtol=1e-12)


def test_what_is_convex():
    assert {name for name, A in SETS.items() if not A.convex} == {"arrow", "points", "two humps"}
    assert SETS["box"].kernel_range == (-0.5, 1.5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Box((1, 0), (0, 1)), r"^bias: expected \(low, high\) with low <= high, got \(1.0, 0.0\)$"),
        (lambda: Box((0, np.inf), (0, 1)), "^bias: expected finite numbers of shape"),
        (lambda: Polygon([(0, 0), (1, 1), (2, 2)]), "^corners: expected a polygon with an area"),
        (lambda: Points([]), "^points: expected numbers of shape"),
        (lambda: Ellipse((0, 0), 0.0), "^axes: expected a disk or ellipse with an area"),
        (lambda: Sections((0, 1), lambda a: 1 + 0 * a, lambda a: 0 * a), "^lower, upper"),
        (lambda: Sections((0, 1), lambda a: -(a**2), lambda a: 0 * a, convex=True), "^convex: m is not convex"),
        (lambda: Ellipse().largest(-1.0, 0.0), "^positive: expected numbers >= 0, got -1 among them"),
    ],
)
def test_what_is_no_control_set_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- outlines as users have them, and sets far from the origin ---------------------------------------------------------


def star(rng, corners: int) -> np.ndarray:
    """A polygon around a point, of radii between 0.3 and 1.5, which is seldom convex."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners)) + np.arange(corners) * 1e-3
    around = np.linspace(0, 2 * np.pi, corners, endpoint=False) * 0.7 + 0.3 * angles
    return rng.uniform(0.3, 1.5, (corners, 1)) * np.stack([np.cos(around), np.sin(around)], axis=1)


def boundary(corners: np.ndarray, count: int) -> np.ndarray:
    s = np.linspace(0, 1, count)[:, None, None]
    return ((1 - s) * corners + s * np.roll(corners, -1, axis=0)).reshape(-1, 2)


@pytest.mark.parametrize("far", [(0.0, 0.0), (9.0, -3.0), (1e4, 1e4)])
@pytest.mark.parametrize("closed", [False, True])
def test_polygons_hold_against_dense_sampling_closed_or_not(far, closed, rng):
    for corners in rng.integers(4, 12, 20):
        outline = star(rng, corners) + far
        A = Polygon(np.vstack([outline, outline[:1]]) if closed else outline)
        tolerance = 1e-12 + 4e-16 * np.abs(outline).max() * 1e4  # edges are steep at times
        edge = boundary(outline, 41)
        inside = far + (edge - far) * rng.uniform(0, 1, (len(edge), 1))
        outside = far + (edge - far) * 1.001
        assert A.contains(*edge.T, tolerance).all() and A.contains(*inside.T, tolerance).all()
        assert not A.contains(*outside.T).any()
        m, M = A.sections(np.clip(inside[:, 0], *A.bias_range))
        assert (m <= inside[:, 1] + tolerance).all() and (inside[:, 1] <= M + tolerance).all()
        turns = np.diff(np.unwrap(np.arctan2(*np.diff(np.vstack([outline, outline[:2]]), axis=0).T[::-1])))
        assert A.convex == bool((turns >= 0).all() or (turns <= 0).all())
        # Over each a, all pairs of points of the boundary: b where f > 0, and b where f < 0.
        positive, negative = rng.uniform(0, 2, 2)
        best, worst = A.largest(positive, negative), A.smallest(positive, negative)
        values = []
        for a in np.linspace(*A.bias_range, 101):
            (a0, b0), (a1, b1) = outline.T, np.roll(outline, -1, axis=0).T
            passes = (np.minimum(a0, a1) <= a) & (a <= np.maximum(a0, a1))
            b = b0[passes] + (a - a0[passes]) / (a1 - a0)[passes] * (b1 - b0)[passes]
            values.append(a - positive * b[:, None] + negative * b[None, :])
        assert max(v.max() for v in values) <= best.value + 100 * tolerance
        assert min(v.min() for v in values) >= worst.value - 100 * tolerance
        for found in (best, worst):
            assert A.contains(found.a, np.array([found.where_positive, found.where_negative]), tolerance).all()
            T = found.a - positive * found.where_positive + negative * found.where_negative
            assert abs(T - found.value) <= 100 * tolerance


@pytest.mark.parametrize("centre", [(0.0, 0.0), (9.0, 0.0), (-7.3, 1e3), (1e6, -3e5)])
@pytest.mark.parametrize("axes", [0.3, (0.1, 2.0), [[1.0, 0.3], [-0.5, 0.4]], [[1.0, 1.0], [1.0, 1.0 + 1e-6]]], ids=str)
def test_ellipses_reach_the_ends_of_their_own_range_and_attain_what_they_say(centre, axes):
    A = Ellipse(centre, axes)
    m, M = A.sections(A.bias_range)
    assert np.isfinite(m).all() and np.isfinite(M).all() and (m <= M).all() and A.contains(A.bias_range, m).all()
    assert np.isinf(A.sections(np.array(A.bias_range) + [-1e-3, 1e-3])[0]).all()
    angle = np.linspace(0, 2 * np.pi, 2001)
    E = np.diag(np.broadcast_to(axes, 2)) if np.ndim(axes) < 2 else np.array(axes)
    x = np.array(centre)[:, None] + E @ np.stack([np.cos(angle), np.sin(angle)])
    round_off = 1e-15 * (1 + np.abs(centre).max())
    alpha, beta = np.array([1.0, 1e-8, 0.0, -1.0, 0.6]), np.array([1e-8, 1.0, -1.0, 0.0, -0.8])
    assert A.contains(*A.maximise(alpha, beta)).all()
    dense = (np.multiply.outer(alpha, x[0]) + np.multiply.outer(beta, x[1])).max(axis=1)
    assert (A.support(alpha, beta) >= dense - 10 * round_off).all() and (A.support(alpha, beta) <= dense + 1e-5).all()
    for found in (A.largest(0.7, 1.9), A.smallest(0.7, 1.9)):
        assert A.contains(found.a, np.array([found.where_positive, found.where_negative])).all()
    # Half the longest section of the thinnest, whose square is 1e-12 of that of the set: |det E| / half the range of a.
    assert np.subtract(*A.sections(centre[0])[::-1]) / 2 == pytest.approx(
        abs(np.linalg.det(E)) / np.hypot(*E[0]), rel=1e-9, abs=4 * round_off
    )


def test_a_boundary_that_meets_itself_is_refused():
    pentagram = [(np.cos(angle), np.sin(angle)) for angle in 4 * np.pi / 5 * np.arange(5)]
    for corners in (
        pentagram,
        [(0, 0), (2, 0), (0.5, 1.5), (2, 1)],  # two edges cross
        [(0, 0), (2, 0), (2, 2), (2, 1), (0, 1)],  # an edge goes back over another
        [(0, 0), (2, 0), (2, 2), (1, 0), (0, 2)],  # a corner lies on an edge
        [(0, 0), (1, 1), (2, 0), (2, 2), (1, 1), (0, 2)],  # two corners are one point
    ):
        for far in (0.0, 1e5):
            with pytest.raises(ValueError, match=r"^corners: expected a boundary that meets itself nowhere; the edges"):
                Polygon(np.array(corners) + far)


def test_corners_that_are_no_corners_are_no_harm():
    straight = Polygon([(0, 0), (1, 0), (1, 0), (2, 0), (2, 2), (0, 2), (0, 0), (0, 0)])
    assert straight.convex and straight.contains(1.0, 2.0) and straight.contains([0, 2, 1], [0, 2, 0]).all()
    assert Polygon([(1e9, 0), (1e9 + 1, 0), (1e9 + 1, 1), (1e9, 1)]).convex
    assert not Polygon(np.array(ARROW) + [1e9, 0]).convex


# -- sets that depend on y ---------------------------------------------------------------------------------------------------


def nodal_box(Y, shift=0.0):
    """Ends that vary with y, and a box and its parts at each node; no width where x > 1/2."""
    low, high = smooth(Y, 1, 31)[:, 0] - 1, smooth(Y, 1, 31)[:, 0] + np.maximum(0.5 - Y.coordinates[:, 0], 0) - 1
    ends = ((low + shift, high + shift), (-0.7, 0.2 + smooth(Y, 1, 33)[:, 0] ** 2))
    each = [Box(*(tuple(float(np.broadcast_to(end, Y.nodes)[i]) for end in pair) for pair in ends)) for i in range(Y.nodes)]
    return NodalBox(Y, *ends), each


def nodal_sets(Y):
    """Sets of all kinds, one of which is nowhere."""
    kinds = [SETS[name] for name in ("box", "arrow", "lens", "disk", "points", "two humps")]
    number = np.minimum(np.floor(2.5 * (1 + smooth(Y, 1, 35)[:, 0])).astype(int), 4)
    return NodalSets(Y, kinds, number), [kinds[k] for k in number]


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("make", [nodal_box, nodal_sets])
@pytest.mark.parametrize("space", [("annulus", "CG1"), ("sphere", "DG0")])
def test_a_set_that_depends_on_y_is_at_each_node_the_set_there(make, space):
    """All that it is asked, against constant sets node by node: for all nodes alike, and for each."""
    Y = label_space(*space)
    A, each = make(Y)
    assert A.convex == all(Y.comm.allgather(all(B.convex for B in each)))
    seen = np.abs(smooth(Y, 3, 36))
    rows = np.arange(Y.nodes)[Y.coordinates[:, 0] > 0]
    for part, sets, nodes in ((A, each, np.arange(Y.nodes)), (at_nodes(A, rows), [each[i] for i in rows], rows)):
        for one in (seen[nodes], np.array([[0.3, 1.2, 0.1]])):
            two = one[..., ::-1]
            for i, B in list(enumerate(sets))[::4]:
                p, q = (array[i if len(array) > 1 else 0] for array in (one, two))
                for mine, its in ((part.largest(one, two), B.largest(p, q)), (part.smallest(one, two), B.smallest(p, q))):
                    for name in ("value", "a", "where_positive", "where_negative"):
                        assert_array_equal(getattr(mine, name)[i], getattr(its, name))
                assert_array_equal([end[i] for end in part.maximise(one, -two)], B.maximise(p, -q))
                assert_array_equal([end[i] for end in part.sections(one - 1)], B.sections(p - 1))
                assert_array_equal(part.support(one - 0.5, two)[i], B.support(p - 0.5, q))
                assert_array_equal(part.contains(one - 1, two, 0.1)[i], B.contains(p - 1, q, 0.1))
                assert_allclose([end[i] for end in part.bias_range + part.kernel_range], B.bias_range + B.kernel_range)
    a, b = A.maximise(1.0, -1.0)
    assert a.shape == b.shape == (Y.nodes,) and A.contains(a, b).all() and not A.contains(a + 9, b).any()


@pytest.mark.parallel([1, 2])
def test_sets_that_depend_on_y_are_refused_on_all_ranks_where_they_do_not_fit():
    Y = label_space("annulus", "CG1")
    last = COMM_WORLD.rank == COMM_WORLD.size - 1
    high = np.where(np.arange(Y.nodes) == 3, -1.0 if last else 1.0, 1.0)
    with pytest.raises(ValueError, match="^bias: expected .low, high. with low <= high at all nodes"):
        NodalBox(Y, (0.0, high), (0, 1))
    with pytest.raises(ValueError, match=r"^kernel: expected numbers, or values at the nodes of shape \("):
        NodalBox(Y, (0.0, 1.0), (0, np.ones(Y.nodes + last)))
    with pytest.raises(ValueError, match="^number: expected the numbers of 2 sets, from 0"):
        NodalSets(Y, [SETS["box"], SETS["disk"]], np.full(Y.nodes, 2 * last))
    A = NodalBox(Y, (-1, 1), (-1, 1))
    with pytest.raises(ValueError, match="^sets: expected sets that do not depend on y"):
        NodalSets(Y, [A], np.zeros(Y.nodes, int))
    with pytest.raises(ValueError, match="^sample: expected one set for all y, got a NodalBox"):
        A.sample(3)
    with pytest.raises(ValueError, match="^a, b: expected arrays whose first axis is the .* nodes, or one, got shape"):
        A.contains(np.zeros(Y.nodes + 1), 0.0)
    cells = LabelSpace(fd.FunctionSpace(fd.UnitIntervalMesh(2, comm=fd.COMM_SELF), "DG", 0))
    with pytest.raises(ValueError, match="^A: expected one set for all y, got a NodalBox; give a Box"):
        grid = StateGrid([[0.0, 0.5]], 0.25)
        solve_value_function(cells, NodalBox(cells, (-1, 1), (0, 0)), "identity", [2.0], grid, final_time=1.0)
