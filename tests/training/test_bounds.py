"""Box-constrained training by TAO: it is the maximum principle's first-order condition, averaged over each layer."""

from functools import cache

import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import label_space, laplace, smooth
from numpy.testing import assert_allclose, assert_array_equal
from petsc4py import PETSc
from problems import learning_problem, network

from fem_resnet import (
    Batch,
    Box,
    Controls,
    Hamiltonian,
    LearningProblem,
    LowRankKernel,
    NodalBox,
    Pair,
    ResidualNetwork,
    cell_indicators,
    extremal_controls,
    least_squares,
    pmp_residual,
    tikhonov,
    train,
)  # fmt: skip
from fem_resnet.parameters.space_basis import NodalValues
from fem_resnet.training.hessian import HessianAtItsPoint, RieszPreconditioner
from fem_resnet.training.tao_types import TYPES

on_ranks = pytest.mark.parallel([1, 2, 3])
BOX = Box((-1.0, 1.0), (-0.5, 1.0))
BOUNDS = {"bias": BOX.bias, "kernel": BOX.kernel}
RANKS = {"bias": 1, "kernel": 2}
BOUNDED_TYPES = [name for name, kind in TYPES.items() if kind.bounds]


def _silent(progress):
    pass


@cache
def _cells(space, alone=False):
    return cell_indicators(label_space(*space, alone=alone))


def problem(layers=3, space=("annulus", "DG0"), weight=None, alone=False):
    """One sample, whose target is nowhere in reach, so that no r vanishes; controls start at zero. tanh' > 0.

    Without Tikhonov's weight all controls end at bounds, or nearly all.
    """
    cells = _cells(space, alone)
    Y = cells.Y
    net = ResidualNetwork(cells, layers=layers, final_time=1.0)
    f = smooth(Y, 1)
    batch = Batch(Y.batch(f), Y.batch(f + 4 * np.sign(smooth(Y, 1, 50))))
    return LearningProblem(net, None, least_squares, None if weight is None else tikhonov(weight), batch)


def within(problem, bounds):
    return all(
        np.all((p.get(k) >= bounds[p.name][0]) & (p.get(k) <= bounds[p.name][1]))
        for p in problem.parameters
        for k in range(len(p.functions))
        if p.name in bounds
    )


def averaged_residual(problem, bounds):
    """The most that J falls over the box to first order, relative to the same of absolute values: with indicators

        int int max_a (D_a J (a* - a)) dy dt + int int int max_b (D_b J (b* - b)) dy dz dt,

    D J being the averages over the layers of (4.3), (4.4): zero where the box has no direction down.
    """
    derivative = iter(problem.reduced_functional().derivative())
    gap = size = 0.0
    for p in problem.parameters:
        low, high = bounds[p.name]
        for k, basis in enumerate(p.space_bases):
            d, c = basis.read(next(derivative)), p.get(k)
            parts = np.array([np.sum(np.maximum(d * (c - low), d * (c - high))), np.sum(np.abs(d)) * (high - low)])
            gap, size = (gap, size) + (basis.Y.sum(parts) if isinstance(basis, NodalValues) else parts)
    return gap / size


def pointwise_residual(problem, A):
    """int max H - H dt by the trapezoidal rule in each layer, f and r at its ends, relative to int int |f_t r|."""
    net = problem.net
    J, run = problem.record()
    J.derivative()
    H, gap, size = Hamiltonian(net.Y, net.activation, "maximise"), 0.0, 0.0
    values = net.Y.values
    for l, tau in enumerate(np.diff(net.times)):
        controls = Controls.of_layer(net, l)
        for e in (l, l + 1):
            pair = Pair(values(run.state(e)), values(run.costate(e)), "minimise").to("maximise")
            gap += tau / 2 * (H(pair, extremal_controls(net.Y, A, pair).controls) - H(pair, controls))
            size += tau / 2 * float(net.Y.sum(net.Y.weights @ np.abs(H.in_r(pair, controls) * pair.r))[0])
    return gap / size


def pointwise_first_order_residual(problem, A):
    """The same of H made linear: int int max_a H_a (a* - a) + int int int max_b H_b (b* - b)."""
    net = problem.net
    J, run = problem.record()
    J.derivative()
    Y, H, gap, size = net.Y, Hamiltonian(net.Y, net.activation, "maximise"), 0.0, 0.0
    for l, tau in enumerate(np.diff(net.times)):
        controls = Controls.of_layer(net, l)
        for e in (l, l + 1):
            pair = Pair(Y.values(run.state(e)), Y.values(run.costate(e)), "minimise").to("maximise")
            slope = H.slope_times_costate(pair, controls)
            best = extremal_controls(Y, A, Pair(pair.f, slope, "maximise")).controls
            gain = slope * (best.argument(Y, pair.f) - controls.argument(Y, pair.f))
            rate = np.abs(H.in_r(pair, controls) * pair.r)
            gap, size = gap + tau / 2 * float(Y.sum(Y.weights @ gain)[0]), size + tau / 2 * float(Y.sum(Y.weights @ rate)[0])
    return gap / size


def spread_of_the_maximum(problem, A):
    """How far max_A H is from constant along the pair, at ends of layers, relative."""
    net, maxima = problem.net, []
    J, run = problem.record()
    J.derivative()
    H = Hamiltonian(net.Y, net.activation, "maximise")
    for l in range(net.layers + 1):
        pair = Pair(net.Y.values(run.state(l)), net.Y.values(run.costate(l)), "minimise").to("maximise")
        maxima.append(H(pair, extremal_controls(net.Y, A, pair).controls))
    return np.ptp(maxima) / max(maxima)


# -- TAO under bounds ------------------------------------------------------------------------------------------------


@cache
def _reference():
    """J where no direction within the bounds goes down."""
    return train(problem(weight=0.1), {"tao_type": "bntr", "tao_gatol": 1e-7}, bounds=BOUNDS, monitor=_silent).value


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("tao_type", BOUNDED_TYPES if COMM_WORLD.size == 1 else ["bncg"])
def test_every_type_that_knows_bounds_comes_to_the_same_stationary_point_within(tao_type):
    P = problem(weight=0.1)
    result = train(P, {"tao_type": tao_type, "tao_gatol": 1e-4}, bounds=BOUNDS, monitor=_silent)
    residual = averaged_residual(P, BOUNDS)
    share = np.mean([np.isin(P.net.kernel.get(k), BOX.kernel) for k in range(3)])
    print(
        f"\n{tao_type}: J {result.value:.10f}, {result.iterations} iterations, residual {residual:.1e}, {share:.0%} at bounds"
    )
    # The gradient may be 1e-4 where D J is 0.1, but TAO's tests are of another norm for most types.
    assert result.converged and within(P, BOUNDS) and residual < 5e-3
    assert abs(P.evaluate()[0] - result.value) < 1e-12 * result.value
    assert 0.1 < share < 0.9
    # J exceeds its least value by |gradient|^2 over twice the smallest curvature, the weight 0.1, at most.
    assert abs(result.value - _reference()) <= 5 * result.gradient_norm**2 + 1e-12


@on_ranks
def test_bounds_are_numbers_arrays_or_none_and_blmvm_is_taken_without_a_type():
    P = learning_problem(network("sphere", "DG0"))
    shape = P.net.kernel.space_basis.shape
    high = np.linspace(0.05, 0.2, shape[0] * shape[1]).reshape(shape)
    bounds = {"bias": (-0.05, None), "kernel": (None, high), P.head.W.name: (-0.1, 0.1)}
    result = train(P, {"tao_max_it": 5}, bounds=bounds, monitor=_silent)
    assert min(P.net.Y.comm.allgather(P.net.bias.get(0).min(initial=np.inf))) == -0.05
    assert np.abs(P.head.W.get(0)).max() == 0.1 < np.abs(P.head.mu.get(0)).max(), "mu is without bounds"
    assert all((P.net.kernel.get(k) <= high).all() for k in range(3)) and (P.net.kernel.get(0) == high).any()
    assert result.value < result.values[0]


def in_time(layers, kernel, Y):
    """Bounds that vary in time, those of a bias at the nodes with y too, those of a kernel with the coefficient."""
    t = (np.arange(layers) + 0.5) / layers
    i = np.arange(np.prod(kernel)).reshape(kernel)
    x = Y.coordinates[:, 0]
    return {
        "bias": (-0.1 - 0.3 * t[:, None], 0.1 + 0.3 * np.multiply.outer(t, x**2)),
        "kernel": (None, 0.05 + 0.1 * t[:, None, None] * (1 + np.sin(i))),
    }


@on_ranks
@pytest.mark.parametrize("space", [("annulus", "CG1"), ("sphere", "DG0")])
@pytest.mark.parametrize("in_layers", ["layers", "linear"])
def test_bounds_may_vary_in_time(space, in_layers):
    """They are kept by each layer's coefficients, or those at each layer time, and reached; they count in time."""
    P = learning_problem(network(*space, times=[0, 0.4, 1.0], bias_in_time=in_layers, kernel_in_time=in_layers))
    count = len(P.net.kernel.functions)
    bounds = in_time(count, P.net.kernel.space_basis.shape, P.net.Y)
    result = train(P, {"tao_max_it": 12}, bounds=bounds, monitor=_silent)
    low, high = np.broadcast_to(bounds["bias"][0], (count, P.net.Y.nodes)), bounds["bias"][1]
    a, b = (np.array([p.get(k) for k in range(count)]) for p in (P.net.bias, P.net.kernel))
    assert (low <= a).all() and (a <= high).all() and (b <= bounds["kernel"][1]).all()
    pairs = ((a, low), (b, bounds["kernel"][1]))
    reached = [bool(np.any(values[k] == ends[k])) for values, ends in pairs for k in range(count)]
    assert np.any(P.net.Y.comm.allgather(reached), axis=0).all()
    assert (b[-1] > bounds["kernel"][1][0]).any(), "the last bounds are not the first"
    assert result.value < result.values[0]


@pytest.mark.parallel([2, 3])
def test_bounds_that_vary_in_time_give_the_same_on_any_number_of_ranks():
    """Against the whole mesh on each rank alone."""
    values = []
    for alone in (False, True):
        P = problem(weight=0.1, alone=alone)
        bounds = in_time(3, P.net.kernel.space_basis.shape, P.net.Y)
        values.append(train(P, {"tao_max_it": 4}, bounds=bounds, monitor=_silent).values)
    assert_allclose(*values, rtol=1e-9)


@on_ranks
def test_bounds_that_are_the_same_at_all_times_are_bounds_for_all_times():
    found = []
    for bounds in (BOUNDS, {name: tuple(np.full((3,) + (1,) * n, end) for end in BOUNDS[name]) for name, n in RANKS.items()}):
        P = problem(weight=0.1)
        found.append(train(P, {"tao_max_it": 5}, bounds=bounds, monitor=_silent).values)
    assert_array_equal(*found)


@on_ranks
def test_controls_trained_within_bounds_in_time_are_in_the_control_sets_of_the_layers():
    """Indicators: bounds of the coefficients are sets A(y, t). At the minimum the principle holds to the layers' length."""
    P = problem(layers=6)
    Y, t = P.net.Y, (np.arange(6) + 0.5) / 6
    low, high = -0.5 - 0.5 * t, 0.4 + 0.6 * t
    bounds = {"bias": (low[:, None], high[:, None]), "kernel": (-high[:, None, None], -low[:, None, None])}
    sets = [NodalBox(Y, (l, h), (-h, -l)) for l, h in zip(low, high)]
    before = pmp_residual(P, sets)
    result = train(P, {"tao_gatol": 1e-6, "tao_max_it": 300}, bounds=bounds, monitor=_silent)
    residual = pmp_residual(P, sets)
    print(f"\n{residual}, {result.iterations} iterations; absolute {before.absolute[1]:.2e}, then {residual.absolute[1]:.2e}")
    assert residual.upper < 1e-3 and residual.absolute[1] < 1e-3 * before.absolute[1]
    with pytest.raises(ValueError, match="^A: expected a set with the controls of all layers in it"):
        pmp_residual(P, sets[::-1])


@on_ranks
def test_it_starts_from_the_nearest_point_within():
    P = problem()
    for p in P.parameters:
        for k in range(len(p.functions)):
            p.set(k, 7.0 + 0 * p.get(k))
    nearest = problem()
    for p in nearest.parameters:
        for k in range(len(p.functions)):
            p.set(k, 1.0 + 0 * p.get(k))
    result = train(P, {"tao_max_it": 1}, bounds=BOUNDS, monitor=_silent)
    assert_allclose(result.values[0], nearest.evaluate()[0], rtol=1e-13)


@on_ranks
def test_the_gradient_norm_is_that_of_what_does_not_point_out_of_the_bounds():
    """At a corner of the box: by hand, in the label measure, whatever norm TAO's type tests."""
    for tao_type in ("blmvm", "bnls"):
        P = problem(space=("sphere", "DG0"))
        for p in P.parameters:
            for k in range(len(p.functions)):
                p.set(k, BOUNDS[p.name][1] + 0 * p.get(k))
        derivative, square = iter(P.reduced_functional().derivative()), 0.0
        for p in P.parameters:
            for k, basis in enumerate(p.space_bases):
                d = np.maximum(basis.read(next(derivative)), 0.0)
                square += basis.pair(d, basis.riesz(d)) / p.time_basis.measures[k]
        result = train(P, {"tao_type": tao_type, "tao_max_it": 1}, bounds=BOUNDS, monitor=_silent)
        assert_allclose(result.gradient_norms[0], np.sqrt(square), rtol=1e-12)


@on_ranks
def test_a_part_of_the_hessian_and_of_its_riesz_map_is_that_part():
    """Bias at the nodes and a kernel whose Gram matrices are not diagonal; every other coefficient is free."""
    P = learning_problem(network("annulus", "CG1"))
    J = P.reduced_functional()
    J.derivative()
    comm = P.net.Y.comm
    context = HessianAtItsPoint(J, comm=comm)
    interface = context.control_interface
    interface.to_petsc(x := interface.new_petsc(), P.functions)
    A = PETSc.Mat().createPython(((interface.n, interface.N),) * 2, context, comm=comm)
    A.setUp()
    HessianAtItsPoint.update(None, x, A, A)
    start, end = A.getOwnershipRange()
    rows = PETSc.IS().createGeneral(np.arange(start + start % 2, end, 2, dtype=PETSc.IntType), comm=comm)
    part = A.createSubMatrix(rows, rows)
    part.shift(0.25)
    small, result = part.createVecs()
    small.setArray(np.cos(1.0 + np.arange(*small.getOwnershipRange())))
    big, expected = A.createVecs()
    big.setValues(rows.getIndices(), small.getArray())
    big.assemble()
    for action, whole, shift in ((part.mult, A.mult, 0.25), (None, context.riesz, 0.0)):
        if action is None:
            pc = PETSc.PC().createPython(RieszPreconditioner(), comm=comm)
            pc.setOperators(part)
            action = pc.apply
        action(small, result)
        whole(big, expected)
        assert_allclose(
            result.getArray(), expected.getArray()[rows.getIndices() - start] + shift * small.getArray(), rtol=1e-12
        )


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("tao_type", ["blmvm", "bnls"])
def test_iterations_do_not_see_the_partition(tao_type):
    """Against the whole mesh on each rank alone; few iterations, in which round-off does not grow much."""
    options = {"tao_type": tao_type, "tao_max_it": 3}
    together, alone = (
        train(problem(weight=0.1, alone=a), options, bounds=BOUNDS, monitor=_silent).values for a in (False, True)
    )
    assert_allclose(together, alone, rtol=1e-9)


@pytest.mark.parametrize(
    "bounds, options, message",
    [
        ({"bais": (-1, 1)}, {}, "^bounds: expected names of learned parameters, bias, kernel; got 'bais'"),
        ({"bias": (1, -1)}, {}, "^bounds: expected .low, high. for bias with low <= high"),
        ({"bias": (np.nan, 1)}, {}, "^bounds: expected .low, high. for bias"),
        ({"kernel": (0, [1.0, 2.0])}, {}, r"^bounds: expected .low, high. for kernel .*arrays of shape \("),
        ({"kernel": (None, np.ones((2, 1, 1)))}, {}, r"^bounds: .* with one more axis in front of length 3, one entry a time"),
        ({"kernel": (None, np.ones((3, 2, 1)))}, {}, r"^bounds: .* with one more axis in front of length 3, one entry a time"),
        ({"bias": (np.ones((3, 1)), 0.0)}, {}, r"^bounds: expected .low, high. for bias with low <= high"),
        ({"bias": (-1, 1)}, {"tao_type": "lmvm"}, "^solver_parameters: TAO's 'lmvm' does not know bounds"),
        ({"bias": (-1, 1)}, {"tao_type": "nls"}, "^solver_parameters: TAO's 'nls' does not know bounds"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(bounds, options, message):
    with pytest.raises(ValueError, match=message):
        train(problem(), options, bounds=bounds)


# -- against the maximum principle -----------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize(
    "space, kernel, depths",
    [
        (("annulus", "DG0"), (-0.5, 1.0), (3, 6, 12, 24) if COMM_WORLD.size == 1 else (3, 6)),
        *([(("sphere", "DG0"), (-0.1, 0.15), (3, 6))] if COMM_WORLD.size == 1 else []),
        pytest.param(("annulus", "DG0"), (-0.5, 1.0), (3, 6, 12, 24), marks=pytest.mark.slow),
        pytest.param(("sphere", "DG0"), (-0.1, 0.15), (3, 6, 12, 24), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_averaged_first_order_residual_is_zero_and_the_pointwise_one_falls_with_the_layer_length(space, kernel, depths):
    """Indicators, one sample, sigma' > 0. Where controls switch within a layer, H misses its maximum by the order of the
    layer's length over that length: the integral falls by 4 where the layers are halved."""
    A, rows, coarse = Box((-1.0, 1.0), kernel), [], None
    bounds = {"bias": A.bias, "kernel": A.kernel}
    for layers in depths:
        P = problem(layers, space)
        if coarse is not None:  # each layer starts from the one that it is a half of
            for p, before in zip(P.parameters, coarse.parameters):
                for k in range(layers):
                    p.set(k, before.get(k // 2))
        coarse = P
        result = train(P, {"tao_gatol": 1e-7}, bounds=bounds, monitor=_silent)
        pointwise = pointwise_residual(P, A), pointwise_first_order_residual(P, A)
        rows.append((
            layers, averaged_residual(P, bounds), *pointwise, pmp_residual(P, A).upper, spread_of_the_maximum(P, A),
            result.value,
        ))  # fmt: skip
    print(f"\n{space}: layers, averaged first-order residual, max H - H at ends of layers, to first order, max H - H in their")
    print("middles, spread of max H, J")
    for row in rows:
        print("{:3d}  {:.1e}  {:.2e}  {:.2e}  {:.2e}  {:.2e}  {:.6f}".format(*row))
    _, averaged, pointwise, first_order, middles, spread, values = np.array(rows).T
    # TAO's tolerance of 1e-7 is for a J of size 10 and more.
    assert averaged.max() < 1e-7 and (np.diff(values) < 0).all()
    assert (pointwise[1:] < 0.35 * pointwise[:-1]).all() and (middles <= 0.1 * pointwise).all()
    assert (first_order[1:] < 0.35 * first_order[:-1]).all()
    # It is constant up to the layer length, and not monotone in it: where a switch happens to be in its layer counts too.
    assert spread[-1] < 0.3 * spread[0]
    assert pointwise[0] > 1e-4, "controls switch within layers"


# -- b itself --------------------------------------------------------------------------------------------------------


@on_ranks
def test_a_box_on_beta_is_one_on_b_for_indicators_and_for_no_laplace_basis():
    """b at all pairs of nodes of random beta in the box [-1/2, 1/2]; the bound is kept, and for indicators attained."""
    rng = np.random.default_rng(0)
    cells, modes = _cells(("annulus", "DG0")), laplace("annulus", "DG0", 5)
    largest = {}
    for name, basis in (("cells", cells), ("modes", modes)):
        kernel = LowRankKernel(basis, basis)
        P = np.concatenate(basis.Y.comm.allgather(basis.values))
        signs = np.sign(P[np.argmax(np.abs(P).sum(axis=1))])  # those at the node with the largest row: the worst beta
        betas = [rng.uniform(-0.5, 0.5, kernel.shape) for _ in range(20)] + [0.5 * np.outer(signs, signs)]
        found = [np.abs(P @ beta @ P.T).max() for beta in betas]
        bound = kernel.bound(0.5)
        print(f"\n{name}: |b| up to {max(found):.4f}, bound {bound:.4f}")
        assert max(found) <= bound * (1 + 1e-14)
        largest[name] = max(found), bound
    assert largest["cells"] == (0.5, 0.5)
    assert largest["modes"][0] > 0.5 and largest["modes"][1] < 1.0001 * largest["modes"][0]


@on_ranks
def test_the_bound_of_b_takes_a_bound_a_coefficient_and_different_bases():
    phi, psi = laplace("annulus", "CG1", 5), laplace("sphere", "DG0", 4)
    kernel, rng = LowRankKernel(phi, psi), np.random.default_rng(1)
    C = rng.uniform(0, 1, kernel.shape)
    P, Q = (np.abs(np.concatenate(basis.Y.comm.allgather(basis.values))) for basis in (phi, psi))
    assert_allclose(kernel.bound(C), (P @ (Q @ C.T).max(axis=0)).max(), rtol=1e-14)
    assert (P @ C @ Q.T).max() <= kernel.bound(C) <= kernel.bound(C.max())
    for wrong in (-1.0, np.inf, C.T, C[0]):
        with pytest.raises(ValueError, match="^coefficients: expected (finite )?numbers >= 0"):
            kernel.bound(wrong)
