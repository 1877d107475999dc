"""Time bases: their laws, networks that use them, and the paper's interpolants a^tau, B^tau of section 2.1."""

import json
from functools import cache

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import TIMES, flat_network, half_square_distance, laplace, smooth
from numpy.testing import assert_allclose, assert_array_equal
from problems import coefficients, directions, gathered, learning_problem, polynomials, taping
from pyadjoint import ReducedFunctional
from scipy.integrate import solve_ivp

from fem_resnet import Bias, Kernel, LabelSpace, ResidualNetwork, load, save, smooth_in_time, tikhonov, train
from fem_resnet.parameters.time_basis import Groups, Hats, LayerIndicators, Once, Shared, get_time_basis

on_ranks = pytest.mark.parallel([1, 2, 3])
on_two_ranks = pytest.mark.parallel([1, 2])

# Sums of some hundred numbers of size one.
ROUND_OFF = 1e-12

#: Time bases for the three layers of TIMES. In the last one a value comes back.
CHOICES = {"layers": "layers", "linear": "linear", "shared": "shared", "0 0 1": [0, 0, 1], "0 1 0": (0, 1, 0)}
COUNTS = {"layers": 3, "linear": 4, "shared": 1, "0 0 1": 2, "0 1 0": 2}


# -- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", CHOICES)
def test_measures_are_integrals_of_the_functions(choice):
    basis = get_time_basis(CHOICES[choice], TIMES)
    integrals = np.zeros(len(basis.measures))
    for layer, length in enumerate(np.diff(TIMES)):
        for k, left, right in zip(basis.active(layer), basis.weights(layer, 0.0), basis.weights(layer, 1.0)):
            integrals[k] += length * (left + right) / 2  # exact for what is linear
    assert len(integrals) == COUNTS[choice]
    assert_allclose(basis.measures, integrals, rtol=1e-14)
    assert (basis.measures > 0).all()


@pytest.mark.parametrize("choice", CHOICES)
def test_functions_add_up_to_one(choice):
    basis = get_time_basis(CHOICES[choice], TIMES)
    for layer in range(3):
        for s in (0.0, 0.4, 1.0):
            assert sum(basis.weights(layer, s)) == pytest.approx(1.0, rel=1e-15)


def test_hats_are_continuous_and_one_at_their_layer_time():
    basis = Hats(TIMES)
    for layer in range(3):
        assert basis.active(layer) == (layer, layer + 1)
        assert basis.weights(layer, 0.0) == (1.0, 0.0) and basis.weights(layer, 1.0) == (0.0, 1.0)
    assert basis.weights(1, 0.25) == (0.75, 0.25)


def test_neighbours_know_the_distances_of_what_follows_each_other():
    t = np.array(TIMES)
    centres = (t[1:] + t[:-1]) / 2
    expected = {
        "layers": [(0, 1, centres[1] - centres[0]), (1, 2, centres[2] - centres[1])],
        "linear": [(0, 1, t[1]), (1, 2, t[2] - t[1]), (2, 3, t[3] - t[2])],
        "shared": [],
        "0 0 1": [(0, 1, centres[2] - t[2] / 2)],
        "0 1 0": [(0, 1, centres[1] - centres[0]), (1, 0, centres[2] - centres[1])],
    }
    for choice, pairs in expected.items():
        found = get_time_basis(CHOICES[choice], TIMES).neighbours
        assert [pair[:2] for pair in found] == [pair[:2] for pair in pairs]
        assert_allclose([pair[2] for pair in found], [pair[2] for pair in pairs], rtol=1e-14)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_description_makes_the_same_basis(choice):
    basis = get_time_basis(CHOICES[choice], TIMES)
    again = get_time_basis(json.loads(json.dumps(basis.description)), TIMES)
    assert type(again) is type(basis)
    assert [again.active(layer) for layer in range(3)] == [basis.active(layer) for layer in range(3)]


def test_groups_of_one_layer_each_are_layer_indicators():
    groups, indicators = Groups(TIMES, np.arange(3)), LayerIndicators(TIMES)
    assert_array_equal(groups.measures, indicators.measures)
    assert groups.neighbours == indicators.neighbours
    assert [groups.active(layer) for layer in range(3)] == [indicators.active(layer) for layer in range(3)]


def test_once_has_one_function_of_measure_one():
    assert_array_equal(Once.measures, [1.0])


@pytest.mark.parametrize("kind", ["layers", "linear", "shared", []])
def test_without_layers_there_are_no_functions(kind):
    phi = laplace("disk", "CG1", 4)
    net = ResidualNetwork(Kernel(phi, in_time=kind), bias=Bias(in_time=kind), layers=0)
    assert net.bias.functions == net.kernel.functions == ()
    f = net.Y.batch(smooth(net.Y))
    assert_array_equal(net(f).dat.data_ro, f.dat.data_ro)


# -- networks --------------------------------------------------------------------------------------------------------


def network(bias_in_time, kernel_in_time, bias="nodes", seed=0, domain="disk", **options):
    """Parameters that no partition changes; the bias at the nodes, or in a basis whose Gram matrix matters."""
    phi = laplace(domain, "CG1" if domain != "annulus" else "DG0", 5 if domain == "annulus" else 4)
    psi = polynomials(phi.Y)
    net = flat_network(
        phi, psi, bias=psi if bias == "basis" else None, bias_in_time=bias_in_time, kernel_in_time=kernel_in_time,
        **{"times": TIMES} | options,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    for parameter in net.parameters:
        for k in range(len(parameter.functions)):
            nodal = parameter.space_bases[k].space == net.Y.V
            shape = parameter.space_bases[k].shape
            values = smooth(net.Y, 1, seed=k)[:, 0] if nodal else rng.normal(size=shape)
            parameter.set(k, 0.5 * values)
    return net


def functional(net):
    """J = 1/2 sum_s int (f(T) - ftilde)^2 dy as a function of all coefficients."""
    initial, target = (net.Y.batch(smooth(net.Y, seed=seed)) for seed in (3, 4))
    with taping():
        J = half_square_distance(net(initial), target, net.Y)
    return ReducedFunctional(J, [control for parameter in net.parameters for control in parameter.controls()])


@on_ranks
@pytest.mark.parametrize("kernel", CHOICES if COMM_WORLD.size == 1 else ["linear", "0 1 0"])
@pytest.mark.parametrize("bias", CHOICES if COMM_WORLD.size == 1 else ["linear", "shared"])
@pytest.mark.parametrize("domain, held", [("annulus", "basis"), ("disk", "nodes")][: None if COMM_WORLD.size < 3 else 1])
def test_gradient_in_controls_of_any_kind_in_time(domain, held, bias, kernel, taylor):
    net = network(CHOICES[bias], CHOICES[kernel], held, domain=domain, layers_per_block=2)
    J = functional(net)
    m = [function for parameter in net.parameters for function in parameter.functions]
    taylor(J, m, directions(J, net, net.parameters), f"{domain}, kernel {kernel}", f"bias {bias}")


@on_ranks
def test_gradients_are_the_same_however_layers_are_cut_into_blocks():
    """Hats and groups are shared by Blocks: their functionals are added up by the tape."""
    derivatives = []
    for layers_per_block in (1, 2, 3):
        net = network("linear", [0, 1, 0], layers_per_block=layers_per_block)
        owners = [parameter for parameter in net.parameters for _ in parameter.functions]
        derivatives.append([coefficients(p, d) for p, d in zip(owners, functional(net).derivative(apply_riesz=True))])
    for derivative in derivatives[1:]:
        for found, expected in zip(derivative, derivatives[0], strict=True):
            assert_allclose(found, expected, rtol=0, atol=ROUND_OFF * np.abs(expected).max())


@on_ranks
@pytest.mark.parametrize("method", ["1fe", "4", "5dp"])
def test_an_autonomous_network_is_one_layer_of_many_steps(method):
    """Both make the same steps of f_t = sigma(a - B f)."""
    options = {"solver_parameters": {"ts_rk_type": method}}
    many = network("shared", "shared", times=np.linspace(0, 1.5, 7), **options)
    one = network("layers", "layers", times=[0.0, 1.5], steps=6, **options)
    assert len(many.bias.functions) == len(many.kernel.functions) == 1
    f = many.Y.batch(smooth(many.Y))
    assert_allclose(many.Y.values(many(f)), one.Y.values(one(f)), rtol=0, atol=ROUND_OFF)


@on_ranks
def test_the_gradient_in_a_shared_value_is_the_sum_over_its_layers():
    """Functionals add up; gradients in label domain and time are means in time."""
    groups, layers = network("layers", [0, 1, 0]), network("layers", "layers")
    for layer, k in enumerate([0, 1, 0]):
        layers.kernel.set(layer, groups.kernel.get(k))
    for riesz in (False, True):
        gradients = [functional(net).derivative(apply_riesz=riesz) for net in (groups, layers)]
        found, each = ([g.dat.data_ro for g in gradient] for gradient in gradients)
        tau = np.diff(TIMES) if riesz else np.ones(3)
        mean = (tau[0] * each[3] + tau[2] * each[5]) / (tau[0] + tau[2] if riesz else 1)
        assert_allclose(found[3], mean, rtol=0, atol=10 * ROUND_OFF)
        assert_allclose(found[4], each[4], rtol=0, atol=10 * ROUND_OFF)


@on_ranks
def test_training_with_any_number_of_functions_in_time():
    net = network("linear", "shared")
    problem = learning_problem(net)
    assert len(problem.functions) == 4 + 1 + 2
    result = train(problem, {"tao_max_it": 15})
    J, _ = problem.evaluate()
    assert float(J) == pytest.approx(result.value, rel=1e-12)
    assert result.value < 0.8 * result.values[0]
    assert result.gradient_norms[-1] < 0.1 * result.gradient_norms[0]


# -- the paper's interpolants: networks whose coefficients are samples of smooth a(t), b(t) ----------------------------

FINAL = 1.5


def _bias(Y, t):
    return np.cos(2 * t + Y.coordinates[:, 0]) + 0.5 * t * Y.coordinates[:, 1]


def _beta(phi, t):
    matrix = np.random.default_rng(5).normal(size=(phi.rank, phi.rank))
    return matrix * np.cos(1.5 * t) + np.sin(2 * t) * matrix.T


@cache
def _exact():
    """f(T) of (2.8) with the continuous coefficients, by SciPy near round-off, with dense matrices."""
    phi = laplace("disk", "CG1", 4)
    f = smooth(phi.Y, 2)

    def rate(t, y):
        B = phi.values @ _beta(phi, t) @ phi.weighted.T
        return np.tanh(_bias(phi.Y, t)[:, None] - B @ y.reshape(f.shape)).ravel()

    return solve_ivp(rate, (0.0, FINAL), f.ravel(), method="DOP853", rtol=3e-14, atol=1e-14).y[:, -1].reshape(f.shape)


def _sampled(layers, in_time, ratio=1.0, **options):
    """The network whose coefficients are a(t_k), b(t_k); `ratio` is the ratio of neighbouring layers' lengths."""
    phi = laplace("disk", "CG1", 4)
    lengths = np.where(np.arange(layers) % 2, 1.0, ratio)
    times = np.append(0.0, np.cumsum(lengths)) * FINAL / lengths.sum()
    net = flat_network(phi, times=times, activation="tanh", bias_in_time=in_time, kernel_in_time=in_time, **options)
    for k in range(len(net.bias.functions)):
        net.bias.set(k, _bias(net.Y, times[k]))
        net.kernel.set(k, _beta(phi, times[k]))
    return net


def _values(net):
    return net.Y.values(net(net.Y.batch(smooth(net.Y, 2))))


@pytest.mark.parametrize("ratio", [1.0, 2.5])
@pytest.mark.parametrize("in_time, order", [("linear", 2), ("layers", 1)])
def test_order_of_the_interpolants_in_the_length_of_a_layer(in_time, order, ratio):
    """a^tau, B^tau of section 2.1 are off by O(tau^2), values of the left ends by O(tau); rk4's steps by O(tau^4)."""
    errors = [np.abs(_values(_sampled(layers, in_time, ratio)) - _exact()).max() for layers in (32, 64, 128)]
    observed = np.log2(np.divide(errors[:-1], errors[1:]))
    assert abs(observed[-1] - order) < 0.1, f"{in_time}: errors {errors} fall at orders {observed}, expected {order}"


@on_ranks
def test_forward_euler_with_interpolants_is_the_recursion_of_section_2():
    """z_(l+1) = z_l + tau sigma(a_l - B_l z_l): Euler's method asks for the left ends alone."""
    euler = {"solver_parameters": {"ts_rk_type": "1fe"}}
    linear = _sampled(6, "linear", **euler)
    assert_allclose(_values(linear), _values(_sampled(6, "layers", **euler)), rtol=1e-13)
    phi, tau = laplace("disk", "CG1", 4), FINAL / 6
    values, w, z = (gathered(phi.Y, x) for x in (phi.values, phi.Y.weights, smooth(phi.Y, 2)))
    for layer in range(6):
        a = gathered(phi.Y, _bias(phi.Y, tau * layer))
        z = z + tau * np.tanh(a[:, None] - values @ _beta(phi, tau * layer) @ (values.T * w) @ z)
    assert_allclose(gathered(phi.Y, _values(linear)), z, rtol=0, atol=ROUND_OFF)


# -- regularisers ----------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("make", [tikhonov, smooth_in_time])
def test_gradient_of_regularisers(make, choice, taylor):
    net = network(CHOICES[choice], CHOICES[choice])
    with taping():
        J = make(0.7)(net.parameters)
    if make is smooth_in_time and choice == "shared":
        assert float(J) == 0.0
        return
    functions = [function for parameter in net.parameters for function in parameter.functions]
    controls = [control for parameter in net.parameters for control in parameter.controls()]
    taylor(ReducedFunctional(J, controls), functions, [f._ad_mul(2.0) for f in functions], make.__name__, choice)


@on_ranks
@pytest.mark.parametrize("choice", CHOICES)
def test_the_gradient_of_tikhonov_is_lambda_times_the_control(choice):
    """(4.7), whatever the time basis."""
    net = network(CHOICES[choice], CHOICES[choice], "basis")
    with taping():
        J = tikhonov(0.7)(net.parameters)
    for parameter in net.parameters:
        gradient = ReducedFunctional(J, parameter.controls()).derivative(apply_riesz=True)
        for k, g in enumerate(gradient):
            assert_allclose(parameter.space_bases[k].read(g), 0.7 * parameter.get(k), rtol=0, atol=ROUND_OFF)


@on_ranks
def test_smoothness_of_a_linear_control_is_the_integral_of_its_squared_derivative():
    """For a(y, t) = x + t y at the layer times, int int |a_t|^2 dy dt = T int y^2 dy."""
    net = network("linear", "shared")
    x, y = net.Y.coordinates.T
    for k, t in enumerate(TIMES):
        net.bias.set(k, x + t * y)
    expected = TIMES[-1] * net.Y.sum(net.Y.weights @ y**2) / 2
    assert float(smooth_in_time(1.0)(net.parameters)) == pytest.approx(float(expected), rel=1e-13)


@on_ranks
def test_smoothness_of_groups_counts_the_jumps():
    net = network([0, 0, 1], "layers")
    jump = net.bias.get(1) - net.bias.get(0)
    distance = (TIMES[3] + TIMES[2]) / 2 - TIMES[2] / 2
    expected = net.Y.sum(net.Y.weights @ jump**2) / distance / 2
    assert float(smooth_in_time(1.0)([net.bias])) == pytest.approx(float(expected), rel=1e-13)


# -- bases of layers, other meshes, files ------------------------------------------------------------------------------


@on_ranks
def test_layers_that_share_a_value_share_a_basis():
    phi, psi = laplace("disk", "CG1", 6), laplace("disk", "CG1", 4)
    net = ResidualNetwork(
        Kernel([phi, psi, phi], psi, in_time=[0, 1, 0]), bias=Bias([None, psi, None], in_time=[1, 0, 1]), layers=TIMES
    )
    assert [basis.shape for basis in net.kernel.space_bases] == [(6, 4), (4, 4)]
    assert [net.kernel.on_layer(layer).shape for layer in range(3)] == [(6, 4), (4, 4), (6, 4)]
    assert [basis.space == net.Y.V for basis in net.bias.space_bases] == [False, True]
    one = ResidualNetwork(Kernel([phi] * 3, psi, in_time="linear"), layers=TIMES)
    assert [basis.shape for basis in one.kernel.space_bases] == [(6, 4)] * 4
    assert one.kernel.space_basis is one.kernel.space_bases[0]


@on_ranks
def test_gradient_with_bases_of_groups(taylor, rng):
    phi, psi = laplace("disk", "CG1", 6), laplace("disk", "CG1", 4)
    net = ResidualNetwork(Kernel([phi, psi, phi], psi, in_time=[0, 1, 0]), bias=Bias(psi, in_time="linear"), layers=TIMES)
    for parameter in net.parameters:
        for k, basis in enumerate(parameter.space_bases):
            parameter.set(k, rng.normal(size=basis.shape) / 2)
    J = functional(net)
    m = [function for parameter in net.parameters for function in parameter.functions]
    h = []
    for basis in (*net.bias.space_bases, *net.kernel.space_bases):
        h.append(fd.Function(basis.space))
        basis.write(h[-1], rng.normal(size=basis.shape))
    taylor(J, m, h, "bases of groups", "groups, linear")


@on_two_ranks
@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(kernel_in_time="linear"), "^kernel_in_time: layers 0 and 1 share .* kernel, but have different"),
        (dict(kernel_in_time="shared"), "^kernel_in_time: layers 0 and 1 share .* kernel, but have different"),
        (dict(kernel_in_time=[0, 1, 1]), "^kernel_in_time: layers 1 and 2 share .* give both one basis, or .* own"),
        (dict(bias=[None, None, "psi"], bias_in_time="linear"), "^bias_in_time: layers 1 and 2 share .* of bias"),
    ],
)  # fmt: skip
def test_layers_of_different_bases_cannot_share_a_value(arguments, message):
    phi, psi = laplace("disk", "CG1", 6), laplace("disk", "CG1", 4)
    arguments = {"bias": None} | arguments
    if arguments["bias"]:
        arguments["bias"] = [None, None, psi]
    with pytest.raises(ValueError, match=message):
        flat_network([phi, psi, phi], psi, times=TIMES, **arguments)


@on_two_ranks
@pytest.mark.parametrize("argument", ["bias_in_time", "kernel_in_time"])
@pytest.mark.parametrize(
    "given, error, message",
    [
        ("hats", ValueError, "expected 'layers', 'linear', 'shared' or a list of 3 group numbers, one a layer, got 'hats'$"),
        (None, TypeError, "expected 'layers', .*, got NoneType$"),
        (3, TypeError, "expected 'layers', .*, got int$"),
        ([0, 1], ValueError, "expected 3 group numbers, one a layer, got 2$"),
        ([0, 1, 2, 3], ValueError, "expected 3 group numbers, one a layer, got 4$"),
        ([0, 0.5, 1], TypeError, "expected integers as group numbers, got 0.5$"),
        ([False, True, True], TypeError, "expected integers as group numbers, got False$"),
        ([0, 2, 2], ValueError, r"expected group numbers from 0 that leave none out, got \[0, 2, 2\]$"),
        ([-1, 0, 1], ValueError, r"expected group numbers from 0 that leave none out, got \[-1, 0, 1\]$"),
        (np.zeros((3, 1), dtype=int), TypeError, "expected integers as group numbers, got .*$"),
    ],
    ids=str,
)
def test_refuses(argument, given, error, message):
    part = argument.replace("_in_time", ".in_time")
    with pytest.raises(error, match=f"^{part}: {message}"):
        flat_network(laplace("disk", "CG1", 4), times=TIMES, **{argument: given})


@on_ranks
@pytest.mark.parametrize("bias, kernel", [("linear", "0 1 0"), ("shared", "linear"), ("0 0 1", "layers")])
def test_files_keep_the_choice(bias, kernel, tmp_path):
    net = network(CHOICES[bias], CHOICES[kernel])
    save(tmp_path / "net.h5", net)
    loaded, _ = load(tmp_path / "net.h5")
    for found, expected in zip(loaded.parameters, net.parameters, strict=True):
        assert type(found.time_basis) is type(expected.time_basis)
        assert found.time_basis.description == expected.time_basis.description
        for f, g in zip(found.functions, expected.functions, strict=True):
            assert_array_equal(coefficients(found, f), coefficients(expected, g))
    final = [gathered(n.Y, n.Y.values(n(n.Y.batch(smooth(n.Y))))) for n in (net, loaded)]
    assert_allclose(*final, rtol=0, atol=ROUND_OFF)


@on_ranks
def test_a_network_on_another_mesh_keeps_the_choice():
    phi = laplace("disk", "CG1", 4)
    net = ResidualNetwork(Kernel(phi, in_time="shared"), bias=Bias(phi, in_time="linear"), layers=TIMES)
    rng = np.random.default_rng(0)
    for parameter in net.parameters:
        for k, basis in enumerate(parameter.space_bases):
            parameter.set(k, rng.normal(size=basis.shape))
    moved = net.on(LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(1), "CG", 1)))
    assert (type(moved.bias.time_basis), type(moved.kernel.time_basis)) == (Hats, Shared)
    final = [gathered(n.Y, n.Y.values(n(n.Y.batch(smooth(n.Y))))) for n in (net, moved)]
    assert_allclose(*final, rtol=0, atol=1e-9)  # the eigensolver's tolerance
