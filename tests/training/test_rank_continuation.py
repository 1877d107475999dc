"""Training in the first functions of all bases, then in more: J goes on where it was; right, or refused, for all kernels."""

import gc
import logging
import weakref
from functools import cache

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_SELF, COMM_WORLD
from helpers import TIMES, flat_network, label_space, laplace, smooth
from kinds import largest, rotation, smooth_values
from numpy.testing import assert_allclose, assert_array_equal
from problems import failing_at, gradients, polynomials
from pyadjoint.enlisting import Enlist

from fem_resnet import (
    Adam,
    Basis,
    Batch,
    DampedAntisymmetric,
    Head,
    LabelSpace,
    LaplaceFunctions,
    LearningProblem,
    NormBounded,
    PositiveSemidefinite,
    StepFailure,
    Symmetric,
    cell_indicators,
    huber,
    laplace_basis,
    least_squares,
    load,
    locality,
    point_space,
    save,
    smooth_in_space,
    smooth_in_time,
    tikhonov,
    train,
    train_by_ranks,
    train_stochastic,
)  # fmt: skip

on_ranks = pytest.mark.parallel([1, 2, 3])
ROUND_OFF = 1e-12
OMEGA = [1.0, 0.5, 2.0, 0.3]


def ring(comm):
    """Twelve points on a ring with chords, of unequal weights."""
    A = np.zeros((12, 12))
    for k in range(12):
        A[k, (k + 1) % 12] = 1.0 + 0.1 * k
        A[k, (5 * k + 2) % 12] += 0.3
    np.fill_diagonal(A, 0)
    angles = np.arange(12) * np.pi / 6
    points = np.column_stack([np.cos(angles), np.sin(angles)])
    return point_space(0.5 + 0.1 * np.arange(12), points, graph=A + A.T, comm=comm)


#: Numbers of functions that cut no eigenspace. No domain is a cube or of measure one.
RANKS = {"disk": (3, 5, 8), "sphere": (1, 4, 9), "block": (2, 5, 8), "ring": (2, 4, 7)}


def basis(domain, alone=False):
    return _basis(domain, alone)


@cache
def _basis(domain, alone):
    comm, rank = COMM_SELF if alone else COMM_WORLD, RANKS[domain][-1]
    if domain == "ring":
        return laplace_basis(ring(comm), rank)
    if domain == "disk":
        return laplace_basis(LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(2, comm=comm), "CG", 1)), rank)
    return laplace(domain, "CG1", rank, alone)


@cache
def skewed(domain):
    """The same functions mixed and stretched: the first ones of this basis are not orthonormal."""
    phi = basis(domain)
    mix = np.diag(np.linspace(1, 2, phi.rank)) + np.triu(0.3 * np.ones((phi.rank,) * 2), 1)
    return Basis(phi.Y, phi.values @ mix, "given")


#: What kernel and bias are made of.
KINDS = {
    "free": lambda phi: {},
    "not orthonormal": lambda phi: {"phi": skewed("disk"), "psi": polynomials(phi.Y), "bias": skewed("disk")},
    "bias at the nodes": lambda phi: {"bias": None},
    "linear in time": lambda phi: {"bias_in_time": "linear", "kernel_in_time": "linear"},
    "layers share": lambda phi: {"kernel_in_time": [0, 1, 0], "bias_in_time": "shared"},
    "bases of each layer": lambda phi: {"phi": [phi, phi.first(5), phi], "psi": [phi.first(3), phi, phi]},
    "learned times": lambda phi: {"learn_times": True},
    "gradient flow": lambda phi: {"gradient_flow": True},
    "Crank-Nicolson": lambda phi: {"solver_parameters": {"ts_type": "cn"}},
    "discrete gradient": lambda phi: {"solver_parameters": {"ts_type": "discrete_gradient"}},
    "adapted steps": lambda phi: {"solver_parameters": {"ts_adapt_type": "basic", "ts_rtol": 1e-3}, "steps": 4},
    "functions of the Laplacian": lambda phi: {"kernel_set": LaplaceFunctions(phi)},
    "symmetric": lambda phi: {"kernel_set": Symmetric(phi, rotation(phi))},
    "bounded": lambda phi: {"kernel_set": NormBounded(1.5)},
    "bounded, not orthonormal": lambda phi: {"kernel_set": NormBounded(9.0), "phi": skewed("disk")},
    "semidefinite": lambda phi: {"kernel_set": PositiveSemidefinite(3)},
    "antisymmetric": lambda phi: {"kernel_set": DampedAntisymmetric(0.0)},
}
PROBLEMS = [(domain, "free") for domain in RANKS] + [("disk", kind) for kind in KINDS if kind != "free"]
PROBLEMS += [("sphere", "functions of the Laplacian"), ("sphere", "symmetric")]
each_problem = pytest.mark.parametrize("domain, kind", PROBLEMS)


def problem(domain="disk", kind="free", *, alone=False, onto=None, size=0.5, regulariser=tikhonov(0.02), **more):
    """A field from a field, or classes."""
    phi = basis(domain, alone)
    net = flat_network(**{"phi": phi, "bias": phi, "times": TIMES} | KINDS[kind](phi))
    head = Head(net.bases["psi"][0], onto or phi, "identity")
    for parameter in (*net.parameters, *head.parameters):
        for k, held in enumerate(parameter.space_bases):
            if parameter is not net.layer_times:
                part = size * (0.2 if "bounded" in kind and parameter is net.kernel.learned else 1.0)
                parameter.set(k, part * held.amplitude * smooth_values(held, k) / held.shape[0] ** 0.25)
    targets = head.Y.batch(smooth(head.Y, 4, seed=9)) if onto is None else [0, 2, 1, 1]
    return LearningProblem(net, head, least_squares, regulariser, Batch(net.Y.batch(smooth(net.Y, 4)), targets, OMEGA), **more)


def smaller(p, rank):
    return p.replace(net=p.net.in_first(rank), head=p.head.in_first(rank))


def padded(p, rank):
    """The problem in the first functions, whose coefficients the problem itself has then."""
    small = smaller(p, rank)
    p.net.pad(small.net)
    p.head.pad(small.head)
    return small


def output(p):
    f = p.net(p.batch.inputs)
    return np.concatenate([p.net.Y.values(f).ravel(), p.head.Y.values(p.head(f)).ravel()])


def silent(progress):
    pass


def coefficients(p):
    return [parameter.get(k) for parameter in p.parameters for k in range(len(parameter.functions))]


# -- padding ----------------------------------------------------------------------------------------------------------


@on_ranks
@each_problem
def test_a_problem_padded_by_zeros_has_the_same_J_and_outputs(domain, kind):
    for rank in RANKS[domain][:2]:
        p = problem(domain, kind)
        whole = output(p)
        small = padded(p, rank)
        assert max(basis.rank for basis in (*small.net.bases["phi"], *small.net.bases["psi"])) <= rank
        assert largest(output(p) - whole) > 1e-3
        assert_allclose(output(small), output(p), rtol=0, atol=ROUND_OFF)
        assert_allclose(float(small.evaluate()[0]), float(p.evaluate()[0]), rtol=ROUND_OFF)
        for k, held in enumerate(small.net.kernel.space_bases):
            beta, leading = p.net.kernel.get(k), tuple(map(slice, held.shape))
            assert_allclose(beta[leading], small.net.kernel.get(k), rtol=0, atol=ROUND_OFF)
            beta[leading] = 0
            assert_allclose(beta, 0, atol=ROUND_OFF)
        again = smaller(p, rank)
        assert_allclose(output(again), output(small), rtol=0, atol=ROUND_OFF)


@pytest.mark.parametrize(
    "regulariser",
    [smooth_in_space(0.3) + smooth_in_time(0.2), huber(0.3, 0.1), tikhonov(0.1, W=0.5, kernel=0.2)],
    ids=["smooth", "huber", "weighted"],
)
def test_regularisers_do_not_see_the_padding(regulariser):
    p = problem("disk", regulariser=regulariser)
    small = padded(p, 5)
    assert_allclose(float(small.evaluate()[0]), float(p.evaluate()[0]), rtol=ROUND_OFF)


def test_locality_sees_how_multipliers_end():
    """It compares those of neighbouring modes, and in more functions those of the last mode with zero."""
    p = problem("disk", "functions of the Laplacian", regulariser=locality(0.4))
    small = padded(p, 5)
    ends = []
    for each in (small, p):
        term = each.regulariser.terms[0][1]
        multiplications = term.multiplications(each.net.bases["phi"][0])
        ends.append(
            sum(
                0.2 * tau * np.sum((X @ beta - beta @ X) ** 2)
                for tau, beta in zip(np.diff(TIMES), map(each.net.kernel.get, range(3)))
                for X in multiplications
            )
        )
    assert ends[1] > 1.01 * ends[0]
    assert_allclose(float(p.evaluate()[0]) - float(small.evaluate()[0]), ends[1] - ends[0], rtol=1e-9)


@on_ranks
@pytest.mark.parametrize("domain", RANKS)
def test_the_gradient_in_the_first_functions_is_a_part_of_the_whole_one_and_the_rest_is_not_zero(domain):
    p = problem(domain)
    small = padded(p, RANKS[domain][1])
    parts = []
    for each in (small, p):
        J = each.reduced_functional()
        parts.append(gradients(each, Enlist(J.derivative())))
    for part, whole in zip(*parts):
        leading = tuple(map(slice, part.shape))
        assert_allclose(part, whole[leading], rtol=0, atol=1e-11 * np.abs(whole).max())
        rest = whole.copy()
        rest[leading] = 0
        assert np.abs(rest).max() > 1e-6 * np.abs(whole).max()  # zeros are no stationary point


@on_ranks
@each_problem
def test_Taylor_at_a_padded_point(domain, kind, taylor):
    p = problem(domain, kind)
    padded(p, RANKS[domain][1])
    J = p.reduced_functional()
    m = [control.tape_value().copy(deepcopy=True) for control in J.controls]
    h = []
    for parameter in p.parameters:
        for k, held in enumerate(parameter.space_bases):
            h.append(fd.Function(held.space))
            held.write(h[-1], (0.1 if parameter is p.net.layer_times else held.amplitude) * smooth_values(held, 30 + k))
    taylor(J, m, h, "padded by zeros", f"{domain}, {kind}", second_order=kind in ("free", "symmetric", "bounded"))


def test_the_first_functions_of_a_basis_are_one_basis_that_moves_and_is_saved(tmp_path):
    phi = basis("disk")
    first = phi.first(5)
    assert phi.first(5) is first and phi.first(8).first(5) is first and first.first(5) is first and phi.first(99) is phi
    assert phi.begins_with(first) and not first.begins_with(phi) and not phi.begins_with(skewed("disk").first(5))
    assert_array_equal(first.values, phi.values[:, :5])
    assert_array_equal(first.eigenvalues, phi.eigenvalues[:5])
    assert_allclose(first.stiffness, phi.stiffness[:5, :5])
    fine = LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(3), "CG", 1))
    expected = fd.assemble(first.on(fine).function(np.eye(5)[3]) ** 4 * fd.dx)
    assert_allclose(expected, fd.assemble(phi.on(fine).function(np.eye(8)[3]) ** 4 * fd.dx), rtol=1e-2)
    for kind in ("free", "functions of the Laplacian", "symmetric"):
        net = problem("disk", kind).net.in_first(5)
        save(tmp_path / "first.h5", net)
        loaded = load(tmp_path / "first.h5")[0]
        assert_allclose(loaded.kernel.get(1), net.kernel.get(1), rtol=0, atol=ROUND_OFF)
        assert loaded.settings.kernel.among == net.settings.kernel.among


def test_functions_on_a_discontinuous_space_keep_the_gradients_of_the_continuous_ones():
    phi = laplace("annulus", "DG0", 5)
    assert_allclose(phi.first(3).stiffness, phi.stiffness[:3, :3])


def test_a_rank_that_cuts_an_eigenspace_is_a_warning(caplog):
    phi = laplace_basis(LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(2), "CG", 1)), 6)
    with caplog.at_level(logging.WARNING):
        phi.first(3)
        assert not caplog.records
        phi.first(2)
    assert caplog.messages[-1].endswith("ranks 1 and 3 keep it whole")


@pytest.mark.parametrize("domain", ["disk", "sphere"])
@pytest.mark.parametrize("kind", ["functions of the Laplacian", "symmetric"])
def test_a_set_in_the_first_functions_is_the_one_that_is_made_there(domain, kind):
    phi = basis(domain)
    among, first = KINDS[kind](phi)["kernel_set"], phi.first(RANKS[domain][1])
    small, made = among.first(first.rank), KINDS[kind](first)["kernel_set"]
    assert (small.rank, small.count) == (made.rank, made.count) and among.count > small.count
    beta = np.random.default_rng(0).normal(size=(first.rank,) * 2)
    # By what waves see of the eigenfunctions, errors of the mesh depend a little on how many there are.
    assert_allclose(small.projected(beta), made.projected(beta), atol=1e-4 if kind == "symmetric" else ROUND_OFF)
    assert repr(small) == repr(made) and small.description.keys() == made.description.keys()
    # Controls are some of those of the whole set.
    X = np.random.default_rng(1).normal(size=(small.count, 1))
    padded = np.zeros((phi.rank,) * 2)
    padded[: first.rank, : first.rank] = small.value(None, X)
    theta = among.adjoint(None, None, padded)
    assert_allclose(theta[np.abs(theta) > 1e-14], X[:, 0], atol=ROUND_OFF)
    if kind.startswith("functions"):
        assert_array_equal(small.eigenvalues, among.eigenvalues[: small.count])


# -- training ---------------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("domain", RANKS)
@pytest.mark.parametrize("eliminate", [None, "head"])
def test_J_goes_on_where_it_was_and_all_partitions_agree(domain, eliminate):
    results = []
    for alone in (False, True):
        p = problem(domain, alone=alone, size=0.2)
        results.append(train(p, {"tao_max_it": 4}, ranks=RANKS[domain], eliminate=eliminate, monitor=silent))
        value = float(p.evaluate()[0])
    last, alone = results
    assert [stage.iterations for stage in (*last.stages, last)] == [4, 4, 4]
    for before, after in zip([*last.stages], [*last.stages[1:], last]):
        if eliminate is None:
            assert_allclose(after.values[0], before.value, rtol=ROUND_OFF)
        else:  # the head takes the best W and mu in more functions
            assert after.values[0] < before.value
        assert after.value < before.value
    assert_allclose(value, alone.value, rtol=ROUND_OFF)
    for one, other in zip((*last.stages, last), (*alone.stages, alone)):
        assert_allclose(one.values, other.values, rtol=1e-8)
    for one, other in zip(alone.controls, coefficients(p)):
        assert_array_equal(one, other)
    assert sum(stage.seconds for stage in last.stages) < last.seconds


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "semidefinite"])
def test_every_kind_is_trained_and_ends_lower_than_the_last_rank_alone(kind):
    p = problem("disk", kind, size=0.2)
    result = train(p, {"tao_max_it": 5}, ranks=(3, 5, 8), monitor=silent)
    values = np.concatenate([stage.values for stage in (*result.stages, result)])
    assert (np.diff(values) <= ROUND_OFF * values[:-1]).all() and values[-1] < 0.9 * values[0]
    assert_allclose(result.value, float(p.evaluate()[0]), rtol=ROUND_OFF)
    for one, other in zip(result.controls, coefficients(p)):
        assert_array_equal(one, other)


def test_it_ends_where_training_in_all_functions_ends():
    """A strongly regularised problem has one minimum nearby."""
    found = []
    for ranks in (None, (3, 5, 8)):
        p = problem("disk", regulariser=tikhonov(0.5))
        found.append(train(p, {"tao_gttol": 1e-7, "tao_max_it": 500}, ranks=ranks, monitor=silent))
    assert found[0].converged and found[1].converged
    assert_allclose(found[1].value, found[0].value, rtol=1e-9)


def test_options_of_each_rank_and_what_a_monitor_sees():
    p, seen = problem("disk", onto=3), []

    def monitor(progress):
        if progress.iteration == 0:
            seen.append([])
        assert_allclose(float(p.evaluate()[0]), progress.value, rtol=1e-10)
        seen[-1].append(progress.iteration)
        return len(seen) == 2 and progress.iteration == 1

    of_ranks = [{"tao_max_it": 3}, {"tao_max_it": 9}, {"tao_type": "nls", "tao_max_it": 1}]
    result = train(p, of_ranks, ranks=(3, 5, 8), monitor=monitor)
    assert seen == [[0, 1, 2, 3], [0, 1], [0, 1]]
    assert [stage.reason for stage in result.stages] == ["ITERATIONS", "STOPPED"]
    assert p.head.W.get(0).shape == (3, 8) and p.head.in_first(5).W.get(0).shape == (3, 5)


def test_Gauss_Newton_bounds_and_an_initial_state_that_is_learned():
    p = problem("disk", size=0.1, learn="both")
    before = p.batch.inputs.dat.data_ro.copy()
    result = train(p, {"tao_type": "nls", "tao_max_it": 2}, ranks=(3, 8), gauss_newton=True, monitor=silent)
    assert result.value < result.stages[0].value < result.stages[0].values[0]
    assert np.abs(p.batch.inputs.dat.data_ro - before).max() > 1e-3
    p = problem("disk", size=0.1)
    bounds = {"kernel": (-0.2, 0.2), "W": (None, 0.1)}
    result = train(p, {"tao_max_it": 8}, ranks=(3, 8), bounds=bounds, monitor=silent)
    assert max(np.abs(p.net.kernel.get(k)).max() for k in range(3)) <= 0.2 and p.head.W.get(0).max() <= 0.1
    assert result.value < result.stages[0].value < result.stages[0].values[0]
    with pytest.raises(ValueError, match="^bounds: expected numbers or None with ranks"):
        train(p, ranks=(3, 8), bounds={"kernel": (np.full((8, 8), -1.0), None)})


@on_ranks
def test_another_trainer_takes_its_place():
    p, ranks, nets = problem("disk", size=0.2), [], []

    def adam(stage):
        gc.collect()
        assert not any(net() for net in nets[:-1])  # no more than one rank is kept
        nets.append(weakref.ref(stage.net))
        ranks.append(stage.net.bases["phi"][0].rank)
        return train_stochastic(stage, Adam(1e-3), batch_size=2, epochs=3, monitor=silent)

    results = train_by_ranks(p, RANKS["disk"], adam)
    assert ranks == [3, 5, 8]
    for before, after in zip(results, results[1:]):
        assert_allclose(after.values[0], before.value, rtol=ROUND_OFF)
    assert_allclose(results[-1].value, float(p.evaluate()[0]), rtol=ROUND_OFF)


@on_ranks
def test_after_an_error_the_problem_holds_what_was_reached():
    p, reached = problem("disk"), []

    def watch(progress):
        reached.append(progress.value)

    def in_second(stage):
        if len(reached):
            return train(failing_at(7, stage), {"tao_max_it": 20}, monitor=watch)
        return train(stage, {"tao_max_it": 2}, monitor=watch)

    with pytest.raises(StepFailure):
        train_by_ranks(p, (3, 5, 8), in_second)
    assert len(reached) > 4
    assert_allclose(float(p.evaluate()[0]), reached[-1], rtol=1e-10)
    assert not p.net.kernel.get(0)[5:].any()

    def on_one(stage):
        if COMM_WORLD.rank == COMM_WORLD.size - 1:
            raise RuntimeError("on the last rank")

    with pytest.raises(RuntimeError, match="on the last rank"):
        train_by_ranks(p, (3, 5, 8), on_one)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ranks, message",
    [
        ((3, 5), r"^ranks: expected increasing integers up to 8, .*, got \[3, 5\]"),
        ((5, 3, 8), "^ranks: expected increasing integers up to 8"),
        ((0, 8), "^ranks: expected a positive integer, got 0"),
        ((), "^ranks: expected increasing integers up to 8"),
        ((2.5, 8), "^ranks: expected a positive integer, got 2.5"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_before_anything_is_trained(ranks, message):
    with pytest.raises((TypeError, ValueError), match=message):
        train_by_ranks(problem("disk"), ranks, lambda p: pytest.fail("trained"))


def test_a_list_of_options_of_another_length_is_refused():
    with pytest.raises(ValueError, match="^solver_parameters: expected a dictionary, or 2, one a rank, got 3"):
        train(problem("disk"), [{}, {}, {}], ranks=(3, 8))
    with pytest.raises(TypeError, match="^solver_parameters: "):
        train(problem("disk"), [{}, 3], ranks=(3, 8))
    with pytest.raises(TypeError, match="^solver_parameters: "):
        train(problem("disk"), [{}, {}])


@pytest.mark.parametrize(
    "kernel_set, message",
    [
        (DampedAntisymmetric(0.1), "expected DampedAntisymmetric.damping=0. in the first 3 functions, got Damped"),
        (PositiveSemidefinite(), "expected PositiveSemidefinite.rank=... of 3 or less"),
        (PositiveSemidefinite(4), "expected PositiveSemidefinite.*would stay zero, which is a stationary point"),
    ],
    ids=str,
)
def test_sets_whose_kernels_cannot_be_padded_are_refused(kernel_set, message):
    net = flat_network(basis("disk"), bias=basis("disk"), times=TIMES, kernel_set=kernel_set)
    with pytest.raises(ValueError, match=f"^kernel.among: {message}"):
        net.in_first(3)
    assert net.in_first(8).kernel is net.kernel


def test_leading_coefficients_that_leave_the_set_are_refused():
    """Without orthonormal functions the first ones of a kernel may be larger than the kernel."""
    net = flat_network(skewed("disk"), layers=1, kernel_set=NormBounded(1.0))
    beta = np.zeros((8, 8))
    root = skewed("disk").root
    beta[:3, :3] = np.linalg.inv(root[:3, :3] @ root[:3, :3].T)
    beta[3:, :3] = -0.9 * np.linalg.lstsq(root[:, 3:], root[:, :3] @ beta[:3, :3])[0]
    beta *= 0.999 / np.linalg.norm(root @ beta @ root.T, 2)
    net.kernel.set(0, beta)
    with pytest.raises(ValueError, match="^coefficients: expected a kernel of operator norm 1 or less"):
        net.in_first(3)


@pytest.mark.parametrize("kind", ["functions of the Laplacian", "symmetric"])
def test_a_rank_that_cuts_an_eigenspace_of_a_set_is_refused_with_those_that_do_not(kind):
    with pytest.raises(ValueError, match="^kernel.among: expected a number of functions that cuts no .* got 3; take 1 or 4"):
        problem("sphere", kind).net.in_first(3)


def test_indicators_of_cells_have_no_first_functions():
    cells = cell_indicators(label_space("disk", "DG0"))
    with pytest.raises(ValueError, match="^rank: expected .* whose functions have no order, got 3"):
        cells.first(3)
    assert cells.first(cells.rank) is cells


def test_a_way_to_move_that_ignores_how_many_functions_there_are_is_refused():
    phi = basis("disk")
    mine = Basis(phi.Y, phi.values, "given", move=lambda _, Y: phi.on(Y))
    fine = LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(3), "CG", 1))
    assert mine.on(fine).rank == 8
    with pytest.raises(ValueError, match="^move: expected a function that moves the 3 functions of .*, got 8"):
        mine.first(3).on(fine)


def test_other_networks_and_heads_are_refused():
    p, other = problem("disk"), problem("sphere")
    nodal = problem("disk", "bias at the nodes").net
    for net in (other.net, other.net.in_first(4), p.net.in_first(5).replace(layers=2), nodal):
        with pytest.raises(ValueError, match="^net: expected a network that in_first"):
            p.net.pad(net)
    with pytest.raises(ValueError, match="^net: expected a network that in_first"):
        p.net.in_first(3).pad(p.net)
    for head in (other.head, problem("disk", onto=3).head, Head(basis("disk").first(5), skewed("disk"), "identity")):
        with pytest.raises(ValueError, match="^head: expected a head that in_first"):
            p.head.pad(head)
    p.net.in_first(5).pad(p.net.in_first(3))
    p.head.in_first(5).pad(p.head.in_first(3))
