"""Kernels made of free controls: they stay in their sets; derivatives; which flows contract, and which do not."""

import numpy as np
import pytest
from helpers import TIMES, flat_network, label_space, laplace, smooth
from helpers import name as space_name
from kinds import directions_of as directions
from kinds import distances, largest, pairs, states
from kinds import field_problem as problem
from numpy.testing import assert_allclose
from problems import directions as towards_the_gradient
from problems import learning_problem

from fem_resnet import (
    Basis,
    DampedAntisymmetric,
    Kernel,
    Layers,
    LearningProblem,
    NormBounded,
    PositiveSemidefinite,
    ResidualNetwork,
    costate_check,
    lipschitz_bound,
    load,
    save,
    smooth_in_space,
    smooth_in_time,
    tikhonov,
    train,
    verify,
)  # fmt: skip
from fem_resnet.parameters.known_kernel_sets import kernel_set_from

on_ranks = pytest.mark.parallel([1, 2, 3])
on_two_ranks = pytest.mark.parallel([1, 2])
ROUND_OFF = 1e-12
SPACES = [("disk", "CG1"), ("annulus", "DG0"), ("sphere", "CG1")]
SETS = [PositiveSemidefinite(), PositiveSemidefinite(rank=2), DampedAntisymmetric(0.3), NormBounded(0.8)]
each_set = pytest.mark.parametrize("choice", SETS, ids=str)
each_set_somewhere = pytest.mark.parametrize(
    "choice, space", [(choice, SPACES[k % 3]) for k, choice in enumerate(SETS)], ids=str
)


def skewed(space):
    """Three functions that are not orthonormal."""
    Y = label_space(*space)
    basis = laplace(*space, rank=4)
    return Basis(Y, basis.values[:, 1:4] @ np.array([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.0, 0.0, 0.7]]), "given")


def network(choice, space=("disk", "CG1"), *, basis=None, psi=None, size=1.0, **more):
    phi = laplace(*space, rank=4) if basis is None else basis
    net = flat_network(phi, psi, bias=laplace(*space, rank=3), **{"times": TIMES, "kernel_set": choice} | more)
    rng = np.random.default_rng(0)
    for parameter in net.parameters:
        for k, held in enumerate(parameter.space_bases):
            if parameter in net.factors:
                parameter.set(k, 0.3 * smooth(net.Y, held.shape[1], seed=20 + k))
            elif parameter is not net.layer_times:
                parameter.set(k, size * rng.normal(size=held.shape) / held.shape[0] ** 0.5)
    return net


def in_orthonormal_coordinates(net, beta):
    kernel = net.learned_factors()
    phi, psi = (np.linalg.cholesky(basis.gram).T for basis in (kernel.phi, kernel.psi))
    return phi @ beta @ psi.T


# -- the sets --------------------------------------------------------------------------------------------------------


@on_ranks
@each_set_somewhere
def test_kernels_are_in_their_sets_whatever_the_controls(choice, space):
    net = network(choice, space, basis=skewed(space), size=3.0)
    f, kernel, w = smooth(net.Y), net.kernel.space_basis.kernel, net.Y.weights
    for k in range(3):
        beta = net.kernel.get(k)
        Bf, Btf = kernel.apply(beta, f), kernel.transpose(beta, f)
        if isinstance(choice, PositiveSemidefinite):
            assert_allclose(Bf, Btf, rtol=0, atol=ROUND_OFF * largest(Bf))
            assert np.all(net.Y.sum(w @ (Bf * f)) >= -ROUND_OFF)
            assert np.linalg.matrix_rank(beta, tol=1e-8) == (choice.rank or 3)
        elif isinstance(choice, DampedAntisymmetric):
            inside = kernel.phi.values @ kernel.phi.project(f)
            assert_allclose(Bf + Btf, 0.6 * inside, rtol=0, atol=ROUND_OFF * largest(Bf))
        else:
            assert np.linalg.norm(in_orthonormal_coordinates(net, beta), 2) <= 0.8 * (1 + ROUND_OFF)
            assert np.all(net.Y.sum(w @ Bf**2) <= 0.64 * net.Y.sum(w @ f**2))
        assert largest(Bf) > 1e-3


@each_set
@pytest.mark.parametrize("skew", [False, True], ids=["orthonormal", "skewed"])
def test_every_kernel_of_a_set_is_reached(choice, skew):
    """Kernels of largest norm are reached too; coefficients are given and read as beta."""
    basis = skewed(("disk", "CG1")) if skew else laplace("disk", "CG1", 4)
    net, other = network(choice, basis=basis), network(choice, basis=basis, size=0.3)
    for k in range(3):
        beta = net.kernel.get(k)
        if isinstance(choice, NormBounded):
            beta = beta * 0.8 / np.linalg.norm(in_orthonormal_coordinates(net, beta), 2)
        other.kernel.set(k, beta)
        assert_allclose(other.kernel.get(k), beta, rtol=0, atol=1e-7)  # at the boundary the root of round-off
        assert_allclose(other.kernel.space_bases[k].read(other.kernel.functions[k]), other.kernel.get(k), rtol=0, atol=0)


@on_two_ranks
@pytest.mark.parametrize(
    "choice, beta, message",
    [
        (PositiveSemidefinite(), np.diag([1.0, -0.1, 0, 0]), "symmetric, positive semidefinite matrix of rank 4 or less"),
        (PositiveSemidefinite(rank=1), np.eye(4), "symmetric, positive semidefinite matrix of rank 1 or less"),
        (DampedAntisymmetric(0.3), np.eye(4), r"an antisymmetric matrix plus 0\.3"),
        (NormBounded(0.8), np.eye(4), r"a kernel of operator norm 0\.8 or less"),
    ],
    ids=["not positive", "of higher rank", "other damping", "too large"],
)
def test_kernels_outside_of_their_set_are_refused(choice, beta, message):
    with pytest.raises(ValueError, match=f"^coefficients: .*{message}"):
        network(choice).kernel.set(0, beta)


def test_what_a_set_cannot_be_made_of_is_refused():
    for make, message in (
        (lambda: PositiveSemidefinite(rank=0), "^rank: expected a positive integer, got 0"),
        (lambda: DampedAntisymmetric(-1.0), "^damping: expected a number >= 0"),
        (lambda: NormBounded(0.0), "^bound: expected a positive number"),
        (lambda: network(PositiveSemidefinite(rank=7)), "^rank: expected at most the rank of phi, 4, got 7"),
        (
            lambda: network(DampedAntisymmetric(), psi=laplace("disk", "CG1", 3)),
            "^kernel.among: expected one basis for phi and psi with DampedAntisymmetric",
        ),
        (lambda: network(PositiveSemidefinite(), learn_factors=True), "^kernel.among: .* learned factors part"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="^kernel.among: expected a KernelSet or None, got str; such as PositiveSemidefinite"):
        network("positive")


# -- derivatives -----------------------------------------------------------------------------------------------------


@on_ranks
@each_set_somewhere
def test_taylor_of_networks_of_kernel_sets(choice, space, taylor):
    p = problem(network(choice, space, basis=skewed(space)))
    h = [v._ad_mul(0.5) for v in directions(p, seed=2)]
    taylor(p.reduced_functional(), p.functions, h, f"{choice}", "skewed", second_order=True)


@each_set
@pytest.mark.parametrize("in_time", ["linear", "shared"])
@pytest.mark.parametrize("gradient_flow", [False, True], ids=["(2.8)", "gradient flow"])
def test_taylor_with_time_bases_and_smoothness(choice, in_time, gradient_flow, taylor):
    net = network(choice, kernel_in_time=in_time, layers_per_block=1, gradient_flow=gradient_flow)
    p = problem(net, tikhonov(0.05) + smooth_in_space(0.01) + smooth_in_time(0.02))
    J = p.reduced_functional()
    h = [v._ad_mul(0.5) for v in towards_the_gradient(J, net, p.parameters)]
    taylor(J, p.functions, h, f"{choice}, {in_time}", f"flow {gradient_flow}", second_order=True)


def test_taylor_of_bounded_kernels_with_learned_factors_and_times(taylor):
    p = problem(network(NormBounded(1.5), psi=laplace("disk", "CG1", 3), learn_factors=True, learn_times=True))
    taylor(p.reduced_functional(), p.functions, directions(p), "NormBounded", "factors and times", second_order=True)


@on_ranks
@each_set
def test_any_number_of_ranks_gives_the_same_gradient(choice):
    found = []
    for alone in (False, True):
        phi = laplace("disk", "CG1", 4, alone)
        net = ResidualNetwork(Kernel(phi, among=choice), bias=phi, layers=TIMES)
        rng = np.random.default_rng(0)
        for parameter in net.parameters:
            for k, held in enumerate(parameter.space_bases):
                parameter.set(k, rng.normal(size=held.shape) / held.shape[0] ** 0.5)
        p = problem(net)
        derivative = p.reduced_functional().derivative()
        owners = [parameter for parameter in p.parameters for _ in parameter.functions]
        found.append([owner.space_basis.read(d) for owner, d in zip(owners, derivative, strict=True)])
    for one, other in zip(*found):
        assert_allclose(one, other, rtol=0, atol=1e-10)


@on_two_ranks
def test_regularisers_take_the_kernel_and_not_its_controls():
    net = network(PositiveSemidefinite(), basis=skewed(("disk", "CG1")))
    free = network(None, basis=skewed(("disk", "CG1")))
    for p, q in zip((net.bias, net.kernel), (free.bias, free.kernel)):
        for k in range(3):
            q.set(k, p.get(k))
    values = [
        float(problem(n, tikhonov(0.05) + smooth_in_space(0.01) + smooth_in_time(0.02)).evaluate()[0]) for n in (net, free)
    ]
    assert_allclose(*values, rtol=1e-12)


# -- contraction ----------------------------------------------------------------------------------------------------


def growing(net, f):
    """The direction w in which (w, -sigma'(u) B w) is largest at f and t = 0, of norm one, and that number.

    It is in the span of psi and sigma'(u) phi.
    """
    kernel, beta, w = net.kernel.space_basis.kernel, net.kernel.get(0), net.Y.weights[:, None]
    a = net.bias.space_bases[0].expand(net.bias.get(0))[:, None]
    slope = net.activation.derivative(a - kernel.apply(beta, f))
    values = np.hstack([slope * kernel.phi.values, kernel.psi.values])
    sizes, vectors = np.linalg.eigh(net.Y.sum(values.T @ (w * values)))
    Q = values @ (vectors / np.sqrt(np.maximum(sizes, 1e-300)))[:, sizes > 1e-8 * sizes[-1]]
    S = -net.Y.sum(Q.T @ (w * slope * kernel.apply(beta, Q)))
    rates, turns = np.linalg.eigh((S + S.T) / 2)
    return Q @ turns[:, -1:], rates[-1]


def steep(choice, space, **more):
    """A network that does not change in time, whose bias makes sigma' differ over Y, small steps."""
    phi = laplace(*space, rank=4)
    net = flat_network(
        phi, bias=phi, layers=4, final_time=0.4, kernel_set=choice, kernel_in_time="shared", bias_in_time="shared", **more
    )
    net.bias.set(0, [0.0, 3.0, -2.0, 1.0])
    net.kernel.learned.set(0, np.random.default_rng(3).normal(size=net.kernel.learned.space_basis.shape))
    return net


def falls_through_the_kernel(net, one, two):
    """norm(B^(1/2) (f_1 - f_2)) at all layer times."""
    Y, kernel, beta = net.Y, net.kernel.space_basis.kernel, net.kernel.get(0)
    runs = [net.run(Y.batch(values)) for values in (one, two)]
    found = []
    for layer in range(net.layers + 1):
        difference = Y.values(runs[0].state(layer)) - Y.values(runs[1].state(layer))
        found.append(np.sqrt(np.maximum(Y.sum(Y.weights @ (difference * kernel.apply(beta, difference))), 0)))
    return np.array(found)


@pytest.mark.parametrize("space", SPACES, ids=space_name)
@each_set
def test_none_of_the_sets_contracts_in_L2(space, choice):
    """Two near states that part at once: their distance rises at the rate of the linearised flow."""
    net = steep(choice, space, steps=4)
    f = 0 * smooth(net.Y, 1)
    w, rate = growing(net, f)
    found, h = distances(net, f, f + 1e-6 * w)[:, 0], net.times[1]
    bound = lipschitz_bound(net)
    assert rate > 0.02 and found[1] > found[0]
    # The distance grows by 1 + rate h + O(h^2), the second order being at most (h norm(B))^2 of it.
    assert abs(found[1] / found[0] - 1 - rate * h) < (h * bound.norms[0]) ** 2
    assert bound.discrete > 1 and np.all(found <= found[0] * bound.discrete)


@on_two_ranks
@pytest.mark.parametrize("space", SPACES, ids=space_name)
def test_positive_kernels_contract_in_the_norm_of_their_root(space):
    """Up to the step 2 R / (sup sigma' norm(B)), for states that part in L2 too."""
    net = steep(PositiveSemidefinite(), space, solver_parameters={"ts_rk_type": "3bs"})
    bound = lipschitz_bound(net)
    net.kernel.set(0, net.kernel.get(0) * (bound.largest_steps / bound.step_sizes).min())
    bound = lipschitz_bound(net)
    assert bound.contracts_in == "B^(1/2)" and bound.discrete > 1
    assert_allclose(bound.step_sizes, bound.largest_steps)
    one, two = pairs(net.Y)
    w = growing(net, 0 * one[:, :1])[0]
    one, two = np.hstack([one, 0 * w]), np.hstack([two, w])
    found = falls_through_the_kernel(net, one, two)
    assert np.all(found[1:] <= found[:-1] * (1 + ROUND_OFF)), found
    net.kernel.set(0, 1.01 * net.kernel.get(0))
    assert lipschitz_bound(net).contracts_in is None


def test_the_root_norm_falls_for_constant_coefficients_only():
    """Where the kernel turns from layer to layer, the distance in the norm of the first layer rises; the report says so."""
    phi = laplace("disk", "CG1", 3)
    net = ResidualNetwork(Kernel(phi, among=PositiveSemidefinite(rank=1)), layers=2, final_time=1.0, activation="identity")
    for k, c in enumerate(([1.0, 0.3, 0.0], [-1.0, 2.0, 0.0])):
        net.kernel.set(k, np.outer(c, c))
    assert lipschitz_bound(net).contracts_in is None
    two = phi.values @ np.array([[0.0], [1.0], [0.0]])
    found = falls_through_the_kernel(net, 0 * two, two)
    assert found[1] < found[0] and found[2] > found[1], found


def test_damping_is_the_rate_at_which_linear_antisymmetric_networks_fall():
    """norm(f) falls by e^(-eps t) in the span of phi, which is orthonormal; without damping it stays."""
    phi = laplace("annulus", "DG0", 4)
    for damping in (0.0, 0.5):
        net = network(DampedAntisymmetric(damping), ("annulus", "DG0"), activation="identity", steps=20)
        f = phi.values[:, :2]
        found = distances(net, 0 * f, f)
        assert_allclose(found[-1] / found[0], np.exp(-damping * TIMES[-1]), rtol=1e-6)


# -- training, files, the other tools --------------------------------------------------------------------------------


@each_set
def test_training_stays_in_the_set(choice):
    net = network(choice, size=0.5)
    p = learning_problem(net, weight=1e-4)
    before = float(p.evaluate()[0])
    result = train(p, {"tao_max_it": 8}, monitor=lambda progress: None)
    assert result.value < 0.9 * before
    for k in range(3):  # `inverse` refuses what is not in the set
        net.kernel.set(k, net.kernel.get(k))
    assert_allclose(float(p.evaluate()[0]), result.value, rtol=1e-6)


def test_a_bound_that_is_active_is_reached():
    """Targets come from a kernel of norm 2: the best kernel of norm at most 1 has norm 1."""
    phi = laplace("disk", "CG1", 2)
    teacher = ResidualNetwork(phi, bias=phi, layers=Layers(1, steps=4), activation="identity")
    teacher.kernel.set(0, [[0.0, 2.0], [-2.0, 0.0]])
    net = ResidualNetwork(Kernel(phi, among=NormBounded(1.0)), bias=phi, layers=Layers(1, steps=4), activation="identity")
    net.kernel.set(0, [[0.0, 0.1], [-0.1, 0.0]])
    p = problem(net, None)
    p = LearningProblem(net, None, p.loss, None, type(p.batch)(p.batch.inputs, teacher(p.batch.inputs)))
    train(p, {"tao_max_it": 200, "tao_gatol": 1e-10}, monitor=lambda progress: None)
    assert abs(np.linalg.norm(net.kernel.get(0), 2) - 1) < 1e-6, net.kernel.get(0)


@each_set
def test_files_keep_the_set_and_the_kernel(choice, tmp_path):
    net = network(choice, ("annulus", "DG0"))
    save(tmp_path / "net.h5", net)
    loaded, _ = load(tmp_path / "net.h5")
    assert loaded.settings.kernel.among == choice == kernel_set_from(choice.description)
    for k in range(3):
        assert_allclose(loaded.kernel.get(k), net.kernel.get(k), rtol=0, atol=1e-14)
    moments = [n.Y.sum((smooth(n.Y, 4, seed=2) * n.Y.weights[:, None]).T @ states(n)) for n in (net, loaded)]
    assert_allclose(*moments, rtol=0, atol=ROUND_OFF)


@each_set
def test_the_network_moves_to_another_mesh_and_is_truncated(choice):
    net = network(choice)
    finer = net.on(label_space("disk", "CG1", 2))
    assert finer.settings.kernel.among == choice
    assert_allclose(finer.kernel.get(1), net.kernel.get(1), rtol=0, atol=1e-10)
    cut = net.truncated(0.0)
    assert cut.settings.kernel.among is None
    assert_allclose(states(cut), states(net), rtol=0, atol=ROUND_OFF)


@pytest.mark.parametrize("choice, weight", [(SETS[0], 0.05), (SETS[2], None), (SETS[3], 0.05)], ids=str)
def test_networks_of_kernel_sets_pass_the_verification(choice, weight):
    regulariser = None if weight is None else tikhonov(weight) + smooth_in_time(weight)
    report = verify(problem(network(choice, basis=skewed(("disk", "CG1"))), regulariser), quick=True)
    assert report.passed, report.failures


def test_what_goes_with_free_kernels_only_is_refused():
    p = problem(network(NormBounded()))
    with pytest.raises(ValueError, match="^costate_check: it does not take a kernel made of other controls"):
        costate_check(p)
    checkpointed = LearningProblem(p.net, None, p.loss, None, p.batch, checkpoints=2)
    with pytest.raises(ValueError, match="^checkpoints: kernels made of other controls and schedules"):
        checkpointed.record()
