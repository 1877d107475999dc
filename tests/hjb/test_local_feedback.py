"""The value function of section 4.3 near an optimal trajectory: its derivatives, and the feedback for nearby inputs."""

from functools import cache

import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import flat_network, laplace, set_smooth, smooth
from numpy.testing import assert_allclose, assert_array_equal
from problems import gathered
from scipy.spatial import cKDTree

from fem_resnet import (
    Basis,
    Batch,
    Head,
    LearningProblem,
    LocalFeedback,
    LowRankFeedback,
    ResidualNetwork,
    binary_cross_entropy,
    cross_entropy,
    least_squares,
    tikhonov,
    train,
)  # fmt: skip
from fem_resnet.parameters.space_basis import NodalValues

on_ranks = pytest.mark.parallel([1, 2, 3])
on_two_ranks = pytest.mark.parallel([1, 2])

SPACES = {"annulus": "DG0", "sphere": "CG1"}
RANK = {"annulus": 3, "sphere": 4}
NEWTON = {"tao_type": "nls", "tao_gatol": 1e-10, "tao_max_it": 40, "tao_nls_ksp_rtol": 1e-4}
#: Perturbations of the input of this size, and of half of it.
SIZES = (0.1, 0.05)


def problem(domain="annulus", *, bias="basis", onto=None, loss=None, weight=0.1, samples=1, alone=False, layers=2, **options):
    """One sample to a target, or to a class; layers with bases of their own, psi neither phi nor orthonormal."""
    basis = laplace(domain, SPACES[domain], RANK[domain], alone)
    psi = Basis(basis.Y, basis.values @ np.diag(1.0 + np.arange(basis.rank)) + basis.values[:, :1], "given")
    wider = laplace(domain, SPACES[domain], 5, alone) if domain == "annulus" else basis
    net = flat_network(
        [basis, basis][:layers], [psi, wider][:layers], bias=None if bias == "nodes" else basis,
        times=(0.0, 0.4, 1.0)[: layers + 1], **options,
    )  # fmt: skip
    set_smooth(net, np.random.default_rng(0), 0.5)
    Y = net.Y
    inputs, head = Y.batch(smooth(Y, samples)), None
    targets = Y.batch(0.5 + 0.4 * smooth(Y, samples, seed=9))
    if onto is not None:
        head, targets = Head(psi, onto), [1] * samples
        head.W.set(0, 0.3 * np.random.default_rng(1).normal(size=head.W.space_basis.shape))
    loss = loss or (least_squares if head is None else cross_entropy)
    return LearningProblem(net, head, loss, tikhonov(weight), Batch(inputs, targets))


def minimise(p):
    result = train(p, NEWTON, monitor=lambda progress: None)
    assert result.converged, result.reason  # curvatures are above 0.05: J is then good to 1e-18
    return result.value


@cache
def optimal(*arguments, alone=False, **options):
    """A problem at its minimum; shared, so left as it is. Each rank trains alone: that takes no messages."""
    if alone or COMM_WORLD.size == 1:
        p = problem(*arguments, alone=alone, **options)
        minimise(p)
        return p
    return trained(*arguments, **options)


def trained(*arguments, **options):
    """Another problem at the same minimum, to change."""
    p, source = problem(*arguments, **options), optimal(*arguments, alone=COMM_WORLD.size > 1, **options)
    nodes = cKDTree(source.net.Y.coordinates).query(p.net.Y.coordinates)[1]
    for ours, theirs in zip(p.parameters, source.parameters):
        for k, basis in enumerate(ours.space_bases):
            ours.set(k, theirs.get(k)[nodes] if isinstance(basis, NodalValues) else theirs.get(k))
    return p


def direction(Y, samples=1, seed=20):
    return Y.batch(smooth(Y, samples, seed=seed))


def moved(Y, inputs, w, size):
    return Y.batch(Y.values(inputs) + size * Y.values(w))


def assign(p, controls):
    for function, control in zip(p.functions, controls):
        function.assign(control)


def distance(p, u, v):
    """In the norm of the controls."""
    owners = [(q, k) for q in p.parameters for k in range(len(q.functions))]
    differences = [q.space_bases[k].read(a) - q.space_bases[k].read(b) for (q, k), a, b in zip(owners, u, v)]
    return sum(q.inner(k, d, d) for (q, k), d in zip(owners, differences)) ** 0.5


def order(errors):
    return np.log2(errors[0] / errors[1])


def check_orders(p):
    """F + (r, w) + 1/2 (w, D^2 F w) is right to O(|w|^3), the controls to O(|w|^2), so they cost O(|w|^4) too much."""
    feedback = LocalFeedback(p)
    w = direction(p.net.Y, p.batch.samples)
    prediction, controls, closed, open_loop = [], [], [], []
    for size in SIZES:
        new = moved(p.net.Y, feedback.inputs, w, size)
        p.exchange(Batch(new, p.batch.targets))
        u = feedback(new)
        costs = []
        for choice in (feedback.controls, u):
            assign(p, choice)
            costs.append(float(p.evaluate()[0]))
        F = minimise(p)
        open_loop.append(costs[0] - F)
        closed.append(costs[1] - F)
        prediction.append(feedback.predicted_value(new) - F)
        controls.append(distance(p, p.functions, u))
    assert open_loop[-1] > closed[-1] > 1e-11  # above round-off
    # The next term of each series is a part of about |w| of the one that is seen.
    assert order(open_loop) == pytest.approx(2, abs=0.2)
    assert order(controls) == pytest.approx(2, abs=0.3)
    assert order(prediction) == pytest.approx(3, abs=0.4)
    assert order(closed) == pytest.approx(4, abs=0.5)


@on_ranks
def test_orders_of_prediction_controls_and_costs():
    check_orders(trained("sphere"))


def test_orders_with_a_bias_at_every_node():
    check_orders(trained("annulus", bias="nodes"))


def test_orders_with_a_bias_that_is_linear_in_time():
    check_orders(trained("sphere", bias_in_time="linear"))


def test_orders_with_a_head_that_is_learned_too():
    check_orders(trained("annulus", onto=3))


def test_several_samples_share_the_controls():
    """v is then all inputs together, and one u for all of the new ones, to the same orders."""
    p = trained("sphere", samples=2)
    check_orders(p)
    with pytest.raises(
        ValueError, match="^LowRankFeedback: it does not take more than one sample; .* use LocalFeedback for one"
    ):
        LowRankFeedback(LocalFeedback(optimal("sphere", samples=2)))


@on_ranks
def test_the_gradient_is_the_costate_at_the_start():
    """D_v F = r of (4.2), r(T) = f(T) - ftilde."""
    p = optimal("sphere")
    feedback = LocalFeedback(p)
    J, run = p.record()
    J.derivative()
    r = p.net.Y.values(run.costate(0))
    assert p.net.Y.norm(run.costate(0)) > 0.1
    assert_allclose(p.net.Y.values(feedback.gradient), r, rtol=0, atol=1e-13)
    assert feedback.value == pytest.approx(float(p.evaluate()[0]), rel=1e-12)


@on_ranks
@pytest.mark.parametrize(
    "domain, onto, loss",
    [("annulus", None, least_squares), ("sphere", None, binary_cross_entropy), ("annulus", 3, cross_entropy)][
        : None if COMM_WORLD.size == 1 else 1
    ],
    ids=["least squares", "binary", "classes"][: None if COMM_WORLD.size == 1 else 1],
)
def test_low_rank_form_and_conjugate_gradients_are_the_same_operators(domain, onto, loss):
    """D^2 F = l'' + X Psi^T M + Psi (M X)^T - J_vu J_uu^-1 J_uv, with nothing left out, and symmetric."""
    p = optimal(domain, onto=onto, loss=loss)
    Y, feedback = p.net.Y, LocalFeedback(p)
    many = LowRankFeedback(feedback)
    W = direction(Y, 2)
    exact = np.column_stack([Y.values(feedback.hessian(one(Y, W, s))) for s in range(2)])
    # The solver's relative tolerance of 1e-10, for numbers of size one.
    assert_allclose(Y.values(many.hessian(W)), exact, rtol=0, atol=1e-8)
    products = Y.sum((Y.weights[:, None] * Y.values(W)).T @ exact)
    assert_allclose(products, products.T, rtol=0, atol=1e-8)
    new = moved(Y, feedback.inputs, W, 0.1)
    coefficients, predicted = many(new), many.predicted_values(new)
    for s in range(2):
        single = one(Y, new, s)
        assert feedback.predicted_value(single) == pytest.approx(predicted[s], rel=1e-10)
        owners = [basis for q in p.parameters for basis in q.space_bases]
        for basis, control, array in zip(owners, feedback(single), coefficients):
            assert_allclose(array[s], basis.read(control), rtol=0, atol=1e-8)


def one(Y, batch, s):
    return Y.batch(Y.values(batch)[:, s : s + 1])


@on_ranks
@pytest.mark.parametrize("onto", [None, 3], ids=["no head", "head"])
def test_eigenvalues_are_those_of_the_dense_operator_and_see_no_partition(onto):
    p = optimal("annulus", onto=onto, layers=1)
    Y = p.net.Y
    many = LowRankFeedback(LocalFeedback(p))
    root = np.sqrt(np.concatenate(Y.comm.allgather(Y.weights)))
    first = sum(Y.comm.allgather(Y.nodes)[: Y.comm.rank])
    units = Y.batch(np.eye(Y.size)[first : first + Y.nodes] / root)
    D2F = np.concatenate(Y.comm.allgather(Y.values(many.hessian(units)))) * root[:, None]
    exact = np.linalg.eigvalsh(D2F - (np.eye(Y.size) if onto is None else 0.0))
    exact = exact[np.argsort(-np.abs(exact))]
    values = many.eigenvalues()
    assert len(values) == many.rank_bound < Y.size
    assert_allclose(np.sort(values), np.sort(exact[: many.rank_bound]), rtol=0, atol=1e-11)
    assert np.abs(exact[many.rank_bound :]).max() < 1e-11  # the rank is no more than said
    alone = LowRankFeedback(LocalFeedback(optimal("annulus", onto=onto, layers=1, alone=True)))
    # The tolerance of Newton's method, over the smallest curvature.
    assert_allclose(np.sort(values), np.sort(alone.eigenvalues()), rtol=0, atol=1e-8)
    ours, theirs = direction(Y, 4), direction(alone.Y, 4)
    assert_allclose(many.predicted_values(ours), alone.predicted_values(theirs), rtol=0, atol=1e-8)
    for one_array, other in zip(many(ours), alone(theirs)):
        assert_allclose(one_array, other, rtol=0, atol=1e-8)


@on_ranks
def test_controls_for_nearby_inputs_see_no_partition():
    results = []
    for alone in (False, True):
        p = optimal("annulus", bias="nodes", layers=1, alone=alone)
        Y, feedback = p.net.Y, LocalFeedback(p)
        w = direction(Y)
        controls = feedback(moved(Y, feedback.inputs, w, 0.1))
        owners = [basis for q in p.parameters for basis in q.space_bases]
        read = [basis.read(control) for basis, control in zip(owners, controls)]
        results.append([gathered(Y, read[0]), read[1], gathered(Y, Y.values(feedback.hessian(w)))])
    for ours, theirs in zip(*results):
        assert_allclose(ours, theirs, rtol=0, atol=1e-8)  # Newton's and the solver's tolerances


@on_ranks
def test_a_value_function_in_closed_form():
    """f_t = a - B f, a and b constant in y, v its own target: u = 0, and with g^2 = |v|^2, mu = lambda / (1 + g^2),

    F(v + w) = 1/2 mu / (1 + mu) |w|^2 for constant w, u = - (1, -g) / (1 + g^2) |w| / (1 + mu), and F = 1/2 |w|^2 for w
    without mean, up to third order.
    """
    constants = laplace("annulus", "DG0", 1)
    Y = constants.Y
    net = ResidualNetwork(constants, bias=constants, layers=1, activation="identity")
    v = Y.batch(0.7 + 0 * Y.weights)
    p = LearningProblem(net, None, least_squares, tikhonov(0.3), Batch(v, v))
    many = LowRankFeedback(LocalFeedback(p))
    g = Y.norm(v)
    mu = 0.3 / (1 + g**2)
    W = np.column_stack([np.ones(Y.nodes), Y.coordinates[:, 0] - Y.sum(Y.weights @ Y.coordinates[:, 0]) / Y.measure])
    D2F = Y.values(many.hessian(Y.batch(W)))
    assert_allclose(D2F, W * [mu / (1 + mu), 1.0], rtol=0, atol=1e-13)
    assert_allclose(many.eigenvalues(), [-1 / (1 + mu), 0, 0, 0], rtol=0, atol=1e-13)
    bias, kernel = many(Y.batch(0.7 + 0.01 * W))
    # The basis function is +- 1 / sqrt |Y|: of either sign in the bias, squared in the kernel.
    expected = np.sqrt(Y.measure) * 0.01 / (1 + g**2) / (1 + mu)
    assert_allclose(np.abs(bias), [[expected], [0]], rtol=0, atol=1e-14)
    assert_allclose(kernel, [[[expected * g]], [[0]]], rtol=0, atol=1e-14)


@on_two_ranks
def test_it_keeps_the_optimum_that_it_was_made_at():
    p = trained("sphere")
    Y, feedback = p.net.Y, LocalFeedback(p)
    w = direction(Y)
    before = Y.values(feedback.hessian(w)).copy()
    for function in p.functions:
        function *= 3.0
    p.exchange(Batch(direction(Y, seed=3), p.batch.targets))
    p.evaluate()
    J, _ = p.record()
    J.derivative()
    assert_array_equal(Y.values(feedback.hessian(w)), before)


@on_two_ranks
def test_solver_parameters_reach_the_solver():
    p = optimal("sphere")
    w = direction(p.net.Y)
    with pytest.raises(RuntimeError, match="no solution with J_uu in 1 iterations, DIVERGED_MAX_IT; .* 'ksp_max_it'"):
        LocalFeedback(p, solver_parameters={"ksp_max_it": 1}).hessian(w)
    by = [p.net.Y.values(LocalFeedback(p, solver_parameters={"ksp_type": kind}).hessian(w)) for kind in ("cg", "minres")]
    assert_allclose(*by, rtol=0, atol=1e-8)


@on_two_ranks
def test_what_is_no_minimum_is_refused():
    p = problem("sphere")
    with pytest.raises(ValueError, match=r"^problem: expected optimal parameters, .* got \|gradient\| = .* train further"):
        LocalFeedback(p)
    # At u = 0 the network leaves the input as it is; where that is the target, J has its minimum, but not there alone.
    for function in p.functions:
        function.assign(0.0)
    still = LearningProblem(p.net, None, least_squares, None, Batch(p.batch.inputs, p.batch.inputs))
    feedback = LocalFeedback(still)
    assert feedback.value == 0
    with pytest.raises(RuntimeError, match="the smallest eigenvalue of J_uu .*is there a regulariser"):
        LowRankFeedback(feedback)


@on_two_ranks
def test_what_does_not_fit_is_refused():
    p = optimal("annulus", bias="nodes", layers=1)
    Y, feedback = p.net.Y, LocalFeedback(p)
    with pytest.raises(
        ValueError, match="^LowRankFeedback: it does not take a bias with a value at every node; give the bias a basis, or use"
    ):
        LowRankFeedback(feedback)
    with pytest.raises(
        ValueError,
        match="^inputs: expected a Function of .*.*; LowRankFeedback takes many inputs of a problem with one sample$",
    ):
        feedback(direction(Y, 2))
    with pytest.raises(ValueError, match="^w: sample 0 has values that are not finite"):
        bad = direction(Y)
        bad.dat.data_wo[...] = np.nan
        feedback.hessian(bad)
    with pytest.raises(TypeError, match="^problem: expected a LearningProblem, got ResidualNetwork$"):
        LocalFeedback(p.net)
    with pytest.raises(ValueError, match="^LocalFeedback: it does not take an initial state that is learned too"):
        LocalFeedback(p.replace(learn="both"))
