"""Parameters p(t) = sum_k theta_k(t) E c_k: the laws of space bases, and time bases of a user's own in a network."""

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import half_square_distance, label_space, laplace, smooth, smooth_direction
from numpy.testing import assert_allclose, assert_array_equal
from problems import coefficients, directions, network, polynomials, taping
from pyadjoint import Control, ReducedFunctional

from fem_resnet.label_domain.basis import cell_indicators
from fem_resnet.label_domain.points import class_space
from fem_resnet.layers.inputs import LayerCoefficients, LayerUse, OnLayer
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.parameters.kernel import KernelCoefficients, LowRankKernel
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import BasisCoefficients, NodalValues, StateValues, read_all
from fem_resnet.parameters.time_basis import Groups, Hats, LayerIndicators, Once, Shared, TimeBasis

on_ranks = pytest.mark.parallel([1, 2, 3])
#: For tests of messages, and of code that sees no partition: once on several ranks is enough.
on_two_ranks = pytest.mark.parallel([1, 2])

# Sums of some hundred numbers of size one; Gram matrices of condition below 100 a factor.
ROUND_OFF = 1e-12

TIMES = np.array([0.0, 0.1, 0.5, 1.4, 2.0])


def _kernel():
    """Factors of different rank, one of them not orthonormal."""
    phi = laplace("disk", "CG1", 4)
    return LowRankKernel(phi, polynomials(phi.Y))


def _states(Y):
    return StateValues(Y, Y.batch_space(3))


#: Every way to hold coefficients in space.
SPACE_BASES = {
    "nodes": lambda: NodalValues(label_space("sphere", "CG1")),
    "states": lambda: _states(label_space("disk", "CG1")),
    "state of nodes": lambda: StateValues(label_space("annulus", "DG0"), label_space("annulus", "DG0").V),
    "cells' nodes": lambda: NodalValues(label_space("disk", "DG0")),
    "laplace": lambda: BasisCoefficients(laplace("disk", "DG0", 4)),
    "polynomials": lambda: BasisCoefficients(polynomials(label_space("square", "CG3"))),
    "kernel": lambda: KernelCoefficients(_kernel()),
    "kernel onto classes": lambda: KernelCoefficients(
        LowRankKernel(cell_indicators(class_space(5)), polynomials(label_space("disk", "CG1")))
    ),
    "kernel of rank one": lambda: KernelCoefficients(LowRankKernel(laplace("disk", "CG1", 1), laplace("disk", "CG1", 1))),
}


#: A value at every node, for one function or a batch.
NODAL = (NodalValues, StateValues)


@pytest.fixture(params=SPACE_BASES)
def basis(request):
    return SPACE_BASES[request.param]()


def _label_space(basis):
    """The label domain of the node values that a layer takes; None for the matrix of a kernel."""
    if isinstance(basis, KernelCoefficients):
        return None
    return basis.Y if isinstance(basis, NODAL) else basis.basis.Y


def _coefficients(basis, seed):
    """The same on every partition."""
    if isinstance(basis, NODAL):
        return smooth(basis.Y, basis.space.value_size, seed=seed).reshape(basis.shape)
    return np.random.default_rng(seed).normal(size=basis.shape)


def _taken(basis, seed):
    """A random array of the form that a layer takes: node values, or the matrix of a kernel."""
    Y = _label_space(basis)
    return _coefficients(basis, seed) if Y is None or isinstance(basis, NODAL) else smooth(Y, 1, seed=seed)[:, 0]


def _sum(basis, d, p):
    """`<d, p>` over what all ranks own, for what a layer takes."""
    Y = _label_space(basis)
    return float(np.sum(d * p)) if Y is None else float(Y.sum(np.vdot(d, p)))


# -- laws of space bases ---------------------------------------------------------------------------------------------


@on_two_ranks
@pytest.mark.parametrize("kind", ["Function", "Cofunction"])
def test_reads_what_was_written(basis, kind):
    function = fd.Function(basis.space) if kind == "Function" else fd.Cofunction(basis.space.dual())
    c = _coefficients(basis, 0)
    basis.write(function, c)
    assert_array_equal(basis.read(function), c)
    assert c.shape == basis.shape


@on_two_ranks
def test_reading_gives_a_copy(basis):
    function = fd.Function(basis.space)
    basis.read(function)[...] = 7.0
    assert not basis.read(function).any()


@on_ranks
def test_pull_back_is_the_transpose_of_expand(basis):
    c, d = _coefficients(basis, 1), _taken(basis, 2)
    left, right = _sum(basis, d, basis.expand(c)), basis.pair(basis.pull_back(d), c)
    assert abs(left - right) <= ROUND_OFF * abs(left), f"<d, E c> = {left}, <E^T d, c> = {right}"
    assert left, "the test says nothing where both sides vanish"


@on_two_ranks
def test_expand_is_linear(basis):
    c, d = _coefficients(basis, 1), _coefficients(basis, 2)
    assert_allclose(basis.expand(c - 3 * d), basis.expand(c) - 3 * basis.expand(d), rtol=0, atol=ROUND_OFF * 10)


@on_two_ranks
def test_primal_inverts_dual(basis):
    c = _coefficients(basis, 3)
    assert_allclose(basis.riesz(basis.functional(c)), c, rtol=0, atol=10 * ROUND_OFF)
    assert_allclose(basis.functional(basis.riesz(c)), c, rtol=0, atol=10 * ROUND_OFF)


@on_two_ranks
def test_coordinates_are_values_at_points_or_orthonormal(basis):
    """|x|^2 unit = <R c, c> in orthonormal ones, |Y|^-1 sum_i w_i |x_i|^2 unit in values at the nodes."""
    c = _coefficients(basis, 3)
    x = basis.coordinates(c)
    assert_allclose(basis.from_coordinates(x), c, rtol=0, atol=10 * ROUND_OFF)
    Y = basis.Y
    square = Y.sum(Y.weights @ x**2) / Y.measure if isinstance(basis, NODAL) else np.sum(x**2)
    assert_allclose(np.sum(square) * basis.unit, basis.pair(basis.functional(c), c), rtol=1e-12)


@on_ranks
def test_pair_with_dual_is_the_inner_product_in_the_label_measure(basis):
    """int p q dy for node values and bases, int b c dy dz for kernels."""
    c, d = _coefficients(basis, 4), _coefficients(basis, 5)
    if isinstance(basis, KernelCoefficients):
        phi, psi = basis.kernel.phi, basis.kernel.psi
        y, z = (np.concatenate(p.Y.comm.allgather(p.values)) for p in (phi, psi))
        w_y, w_z = (np.concatenate(p.Y.comm.allgather(p.Y.weights)) for p in (phi, psi))
        exact = np.einsum("y,yz,yz,z->", w_y, y @ c @ z.T, y @ d @ z.T, w_z)
    else:
        Y = _label_space(basis)
        exact = float(Y.sum(np.sum(Y.weights @ (basis.expand(c) * basis.expand(d)))))
    size = np.sqrt(basis.pair(basis.functional(c), c) * basis.pair(basis.functional(d), d))
    assert abs(basis.pair(basis.functional(c), d) - exact) < ROUND_OFF * size
    assert abs(basis.pair(basis.functional(d), c) - exact) < ROUND_OFF * size


@on_ranks
@pytest.mark.parametrize("basis", [n for n in SPACE_BASES if "nodes" not in n and n != "states"], indirect=True)
def test_coefficients_in_a_basis_are_the_same_bits_on_every_rank(basis):
    function = fd.Function(basis.space)
    # Only the owner's numbers count: numbers on other ranks must not matter.
    basis.write(function, _coefficients(basis, 6) + COMM_WORLD.rank)
    all_ranks = COMM_WORLD.allgather(basis.read(function))
    for other in all_ranks:
        assert_array_equal(other, all_ranks[0])


# -- time bases ------------------------------------------------------------------------------------------------------


class Pairs(TimeBasis):
    """One coefficient for layers 0 and 1, one for layers 2 and 3, and so on, times 1 + t: varying, not just constant."""

    def __init__(self, times):
        self.times = times = np.asarray(times)
        integrals = np.diff(times + times**2 / 2)
        self.measures = np.add.reduceat(integrals, np.arange(0, len(integrals), 2))

    def active(self, layer):
        return (layer // 2,)

    def weights(self, layer, s):
        return (1.0 + (1 - s) * self.times[layer] + s * self.times[layer + 1],)


TIME_BASES = {
    "indicators": LayerIndicators,
    "hats": Hats,
    "shared": Shared,
    "groups": lambda times: Groups(times, [0, 1, 1, 0]),
    "pairs of layers": Pairs,
}


def _on_layer(basis, time_basis, layer):
    parameter = Parameter("p", basis, time_basis)
    cs = [_coefficients(basis, 10 + k) for k in time_basis.active(layer)]
    return OnLayer(LayerUse(parameter, layer), cs), cs


@on_ranks
@pytest.mark.parametrize("time_basis", TIME_BASES if COMM_WORLD.size == 1 else ["hats", "groups"])
def test_on_a_layer_pull_back_is_the_transpose_of_coefficients(basis, time_basis):
    on_layer, cs = _on_layer(basis, TIME_BASES[time_basis](TIMES), 2)
    assert on_layer.size == sum(c.size for c in cs)
    for fraction in (0.0, 0.3, 1.0):
        d = _taken(basis, 20)
        functional, parts, start = on_layer.pull_back(fraction, d), [], 0
        assert functional.shape == (on_layer.size,)
        for c in cs:
            parts.append(functional[start : start + c.size].reshape(c.shape))
            start += c.size
        left = _sum(basis, d, on_layer.coefficients(fraction))
        right = sum(basis.pair(part, c) for part, c in zip(parts, cs))
        assert abs(left - right) < ROUND_OFF * max(abs(left), 1), f"<d, p({fraction})> = {left}, transposed {right}"


@on_ranks
def test_on_a_layer_coefficients_follow_the_weights_in_time(basis):
    on_layer, (left, right) = _on_layer(basis, Hats(TIMES), 2)
    for fraction in (0.0, 0.25, 1.0):
        expected = basis.expand((1 - fraction) * left + fraction * right)
        assert_allclose(on_layer.coefficients(fraction), expected, rtol=0, atol=10 * ROUND_OFF)


@on_two_ranks
@pytest.mark.parametrize("layers", [range(4), range(1, 4), range(2, 3)], ids=str)
@pytest.mark.parametrize("kernel_in_time", TIME_BASES if COMM_WORLD.size == 1 else ["groups", "pairs of layers"])
@pytest.mark.parametrize("bias_in_time", TIME_BASES if COMM_WORLD.size == 1 else ["hats", "indicators"])
def test_collect_is_the_transpose_of_on_layers(bias_in_time, kernel_in_time, layers):
    """sum_l <d_l, (bias, kernel) on layer l> = sum over slots, each set of coefficients once, of <collected, c>."""
    kernel = _kernel()
    bias = Parameter("bias", NodalValues(kernel.phi.Y), TIME_BASES[bias_in_time](TIMES))
    kernel = Parameter("kernel", KernelCoefficients(kernel), TIME_BASES[kernel_in_time](TIMES))
    used = LayerCoefficients(bias, kernel, TIMES, layers)
    assert len(used.functions) == len(set(used.functions)), "a set of coefficients occurs twice"
    arrays = [_coefficients(slot, 30 + k) for k, slot in enumerate(used.slots)]
    left, functionals = 0.0, []
    for number, (layer, inputs) in enumerate(zip(layers, used.on_layers(arrays))):
        assert (inputs.start, inputs.start + inputs.length) == pytest.approx(TIMES[layer : layer + 2], rel=1e-15)
        pulled = []
        for parameter, on_layer in ((bias, inputs.bias), (kernel, inputs.beta)):
            d = _taken(parameter.space_basis, 40 + number)
            left += _sum(parameter.space_basis, d, on_layer.coefficients(0.3))
            pulled.append(on_layer.pull_back(0.3, d))
        functionals.append(np.concatenate(pulled))
    collected = used.collect(functionals)
    right = sum(slot.pair(functional, c) for slot, functional, c in zip(used.slots, collected, arrays))
    assert abs(left - right) < 10 * ROUND_OFF * max(abs(left), 1), f"{left} by layers, {right} by slots"


def test_shared_coefficients_are_one_slot():
    kernel = _kernel()
    bias = Parameter("bias", NodalValues(kernel.phi.Y), Hats(TIMES))
    kernel = Parameter("kernel", KernelCoefficients(kernel), Pairs(TIMES))
    used = LayerCoefficients(bias, kernel, TIMES, range(1, 4))
    expected = [bias.functions[1], bias.functions[2], kernel.functions[0], bias.functions[3], kernel.functions[1],
                bias.functions[4]]  # fmt: skip
    assert len(used.functions) == len(expected) and set(used.functions) == set(expected)
    assert [slot.space for slot in used.slots] == [function.function_space() for function in used.functions]


# -- networks with time bases of a user's own ------------------------------------------------------------------------


def _network_in_time(bias_in_time, kernel_in_time, bias="nodes", alone=False, **options):
    net = network("disk", "CG1", bias=bias, times=TIMES, alone=alone, **options)
    vars(net).update(  # no user's way: a network stays what it was made with
        bias=Parameter("bias", net.bias.space_basis, TIME_BASES[bias_in_time](TIMES)),
        kernel=Parameter("kernel", net.kernel.space_basis, TIME_BASES[kernel_in_time](TIMES)),
    )
    rng = np.random.default_rng(7)
    for parameter in net.parameters:
        for k in range(len(parameter.functions)):
            values = smooth_direction(net, rng, k, parameter)
            parameter.set(k, 0.5 * parameter.space_basis.read(values))
    return net


def _recorded(net):
    """J = 1/2 sum_s int (f(T) - ftilde)^2 dy as a function of all coefficients."""
    initial, target = (net.Y.batch(smooth(net.Y, seed=seed)) for seed in (3, 4))
    with taping():
        J = half_square_distance(net(initial), target, net.Y)
    controls = [control for parameter in net.parameters for control in parameter.controls()]
    return ReducedFunctional(J, controls)


@on_ranks
@pytest.mark.parametrize("bias", ["nodes", "basis"])
@pytest.mark.parametrize("kernel_in_time", TIME_BASES if COMM_WORLD.size == 1 else ["pairs of layers"])
@pytest.mark.parametrize("bias_in_time", ["hats", "pairs of layers"] if COMM_WORLD.size == 1 else ["hats"])
def test_gradient_with_shared_and_time_dependent_coefficients(bias_in_time, kernel_in_time, bias, taylor):
    net = _network_in_time(bias_in_time, kernel_in_time, bias)
    m = [function for parameter in net.parameters for function in parameter.functions]
    column = ", ".join(name.split()[0] for name in (bias_in_time, kernel_in_time))
    J = _recorded(net)
    taylor(J, m, directions(J, net, net.parameters), f"bias, kernel in t; bias: {bias}", column)


@on_ranks
def test_shared_coefficients_do_not_mind_how_layers_are_cut_into_blocks():
    """Within a Block the functionals of shared coefficients are added by `collect`, between Blocks by the tape."""
    values, derivatives = [], []
    for layers_per_block in (4, 3, 1):
        net = _network_in_time("hats", "pairs of layers", layers_per_block=layers_per_block)
        J = _recorded(net)
        values.append(J([f for p in net.parameters for f in p.functions]))
        owners = [parameter for parameter in net.parameters for _ in parameter.functions]
        derivatives.append([coefficients(p, g) for p, g in zip(owners, J.derivative(apply_riesz=True))])
    for value, derivative in zip(values[1:], derivatives[1:]):
        assert abs(value / values[0] - 1) < ROUND_OFF
        for found, expected in zip(derivative, derivatives[0]):
            assert_allclose(found, expected, rtol=0, atol=100 * ROUND_OFF * np.abs(expected).max())


@on_ranks
def test_gradient_with_shared_coefficients_does_not_see_the_partition():
    derivatives = []
    for alone in (False, True):
        net = _network_in_time("hats", "pairs of layers", alone=alone)
        owners = [parameter for parameter in net.parameters for _ in parameter.functions]
        gradient = _recorded(net).derivative(apply_riesz=True)
        derivatives.append([coefficients(p, g) for p, g in zip(owners, gradient)])
    for found, expected in zip(*derivatives):
        assert_allclose(found, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@on_ranks
def test_stages_see_the_bias_at_their_own_times():
    """f_t = a(t), linear in t on each layer: f(T) - f_I = sum_k tau_k c_k, exact for a method of second order."""
    net = _network_in_time("hats", "indicators", activation="identity", solver_parameters={"ts_rk_type": "4"})
    for k in range(net.layers):
        net.kernel.set(k, np.zeros(net.kernel.space_basis.shape))
    f = smooth(net.Y, 1, seed=5)[:, 0]
    expected = f + sum(tau * net.bias.get(k) for k, tau in enumerate(net.bias.time_basis.measures))
    assert_allclose(net.Y.values(net(net.Y.batch(f)))[:, 0], expected, rtol=0, atol=ROUND_OFF)


@on_ranks
def test_constant_hats_are_constant_indicators():
    hats = _network_in_time("hats", "hats")
    indicators = _network_in_time("indicators", "indicators")
    for net in (hats, indicators):
        for parameter in net.parameters:
            for k in range(len(parameter.functions)):
                parameter.set(k, 0.5 * _coefficients(parameter.space_basis, 50))
    f = hats.Y.batch(smooth(hats.Y))
    assert_allclose(hats.Y.values(hats(f)), hats.Y.values(indicators(f)), rtol=0, atol=ROUND_OFF)


# -- inner products of label domain and time -------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("time_basis", TIME_BASES if COMM_WORLD.size == 1 else ["hats", "groups"])
def test_riesz_map_represents_functionals_in_label_domain_and_time(basis, time_basis):
    """(riesz(d), c) = <d, c> in the inner product tau_k <R ., .>, for layers of unequal lengths."""
    parameter = Parameter("p", basis, TIME_BASES[time_basis](TIMES))
    for k, tau in enumerate(parameter.time_basis.measures):
        d, c = _coefficients(basis, 60 + k), _coefficients(basis, 70 + k)
        dual = fd.Cofunction(basis.space.dual())
        basis.write(dual, d)
        primal = parameter.riesz_map(k)(dual)
        assert isinstance(primal, fd.Function) and primal.function_space() == basis.space
        exact = basis.pair(d, c)
        found = parameter.inner(k, basis.read(primal), c)
        assert abs(found - exact) < 10 * ROUND_OFF * max(abs(exact), 1), f"coefficients {k}"
        assert abs(parameter.inner(k, c, c) - tau * basis.pair(basis.functional(c), c)) <= ROUND_OFF * abs(exact)


@on_ranks
def test_controls_carry_the_functions_and_their_riesz_maps(basis):
    parameter = Parameter("p", basis, LayerIndicators(TIMES))
    controls = parameter.controls()
    assert all(isinstance(control, Control) for control in controls)
    assert [control.control for control in controls] == list(parameter.functions)
    dual = fd.Cofunction(basis.space.dual())
    basis.write(dual, _coefficients(basis, 80))
    lengths = np.diff(TIMES)
    first, last = (basis.read(controls[k].riesz_map(dual)) for k in (0, 3))
    assert_allclose(first * lengths[0], last * lengths[3], rtol=1e-13)


def _recorded_with_another_point():
    """J as a function of bias and kernel, and another point."""
    net = network("disk", "CG1")
    with taping():
        final = net(net.Y.batch(smooth(net.Y)))
        J = half_square_distance(final, net.Y.batch(smooth(net.Y, seed=7)), net.Y)
    functional = ReducedFunctional(J, [control for parameter in net.parameters for control in parameter.controls()])
    functions = [function for parameter in net.parameters for function in parameter.functions]
    other = [function.copy(deepcopy=True) for function in functions]
    for function in other:
        function.dat.data_wo[...] *= 0.5
    return functional, functions, other


@on_ranks
def test_an_evaluation_writes_into_the_functions_of_the_tape():
    J, functions, other = _recorded_with_another_point()
    of_tape = [id(control.tape_value()) for control in J.controls]
    for values in (other, functions, other):
        J(values)
        for control, value, here in zip(J.controls, values, of_tape, strict=True):
            assert id(control.tape_value()) == here
            assert_array_equal(control.tape_value().dat.data_ro, value.dat.data_ro)
            assert control.tape_value() is not value


@on_ranks
def test_what_a_user_holds_of_the_tape_is_not_written_into():
    J, functions, other = _recorded_with_another_point()
    J(functions)
    held = [control.tape_value() for control in J.controls]
    derivative = J.derivative()
    before = [function.dat.data_ro.copy() for function in derivative]
    J(other)
    J.derivative()
    for control, function, held_one, other_one in zip(J.controls, functions, held, other, strict=True):
        assert_array_equal(held_one.dat.data_ro, function.dat.data_ro)
        assert_array_equal(control.tape_value().dat.data_ro, other_one.dat.data_ro)
    for function, values in zip(derivative, before, strict=True):
        assert_array_equal(function.dat.data_ro, values)


@on_ranks
def test_the_values_of_the_tape_may_be_handed_to_it():
    J, functions, other = _recorded_with_another_point()
    at_other = J(other)
    assert J([control.tape_value() for control in J.controls]) == at_other
    J.derivative()  # is not refused


def test_a_derivative_without_evaluation_at_changed_values_is_refused():
    """Also where only the values of a Function on the tape have changed, as `Control.update` changes them."""
    J, functions, other = _recorded_with_another_point()
    J(functions)
    J.controls[0].update(other[0])
    with pytest.raises(RuntimeError, match="has changed since the tape was evaluated"):
        J.derivative()


@on_two_ranks
def test_a_function_that_a_block_made_is_not_written_into():
    """A checkpoint may be another Function's too, as after an assignment."""
    net = network("disk", "CG1")
    source, bias = fd.Function(net.Y.V), net.bias
    source.assign(0.5)
    with taping():
        bias.functions[0].assign(source)
        J = half_square_distance(net(net.Y.batch(smooth(net.Y))), net.Y.batch(smooth(net.Y, seed=7)), net.Y)
    functional = ReducedFunctional(J, bias.controls()[0])
    functional(fd.Function(net.Y.V).assign(2.0))
    functional(fd.Function(net.Y.V).assign(3.0))
    assert (source.dat.data_ro == 0.5).all()
    assert (source.block_variable.saved_output.dat.data_ro == 0.5).all()


@on_ranks
def test_a_derivative_has_the_halo_that_its_owners_give_it():
    J, functions, other = _recorded_with_another_point()
    J(other)
    derivative = J.derivative()[0]
    own = derivative.dat.data_ro.copy()
    same = derivative.copy(deepcopy=True)
    assert_array_equal(same.dat.data_ro, own)
    with derivative.dat.vec_ro as vec:
        assert_array_equal(vec.array_r, own)
    halo = derivative.dat.data_ro_with_halos[len(own) :]
    assert not len(halo) or halo.any()


class _Counting:
    """A communicator that counts broadcasts."""

    def __init__(self, comm):
        self._comm, self.broadcasts = comm, 0

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def Bcast(self, *arguments, **options):
        self.broadcasts += 1
        return self._comm.Bcast(*arguments, **options)


@on_ranks
def test_all_that_is_the_same_on_every_rank_is_broadcast_at_once(monkeypatch):
    bases = [SPACE_BASES[name]() for name in ("kernel", "nodes", "kernel of rank one", "kernel", "laplace")]
    functions, expected = [fd.Function(basis.space) for basis in bases], []
    for k, (basis, function) in enumerate(zip(bases, functions)):
        expected.append(_coefficients(basis, 60 + k))
        basis.write(function, expected[-1])
    domains = {basis.Y for basis in bases if not isinstance(basis, NODAL)}
    for Y in domains:
        monkeypatch.setitem(vars(Y), "comm", _Counting(Y.comm))
    for array, values in zip(read_all(bases, functions), expected, strict=True):
        assert_array_equal(array, values)
    assert [Y.comm.broadcasts for Y in domains] == [int(COMM_WORLD.size > 1)] * len(domains)


@on_ranks
@pytest.mark.parametrize("domain, element", [("disk", "DG0"), ("sphere", "CG1")])
def test_gradient_in_the_bias_is_the_costate_whatever_the_length_of_a_layer(domain, element):
    """f_t = a: every D_a J(., t) is r = f(T) - ftilde (4.3), a function, on layers of any length and cells of any size."""
    phi = laplace(domain, element, 4)
    net = ResidualNetwork(phi, layers=TIMES, activation="identity")
    for k in range(net.layers):
        net.bias.set(k, smooth(net.Y, 1, seed=k)[:, 0])
    initial, target = (net.Y.batch(smooth(net.Y, 1, seed=seed)) for seed in (8, 9))
    with taping():
        f = net(initial)
        J = half_square_distance(f, target, net.Y)
    r = (net.Y.values(f) - net.Y.values(target))[:, 0]
    for g in ReducedFunctional(J, net.bias.controls()).derivative(apply_riesz=True):
        assert_allclose(g.dat.data_ro, r, rtol=0, atol=ROUND_OFF * 10)


# -- get and set -----------------------------------------------------------------------------------------------------


@on_two_ranks
def test_parameters_start_at_zero_and_keep_what_is_set(basis):
    parameter = Parameter("p", basis, LayerIndicators(TIMES))
    assert len(parameter.functions) == 4 and [f.name() for f in parameter.functions] == ["p_0", "p_1", "p_2", "p_3"]
    assert not any(parameter.get(k).any() for k in range(4))
    c = _coefficients(basis, 90)
    parameter.set(2, c)
    assert_array_equal(parameter.get(2), c)
    assert not parameter.get(1).any() and not parameter.get(3).any()
    parameter.get(2)[...] = 0.0
    assert_array_equal(parameter.get(2), c)


@on_two_ranks
@pytest.mark.parametrize("time_basis", TIME_BASES if COMM_WORLD.size == 1 else ["hats", "groups"])
def test_dim_counts_coefficients_on_all_ranks(basis, time_basis):
    parameter = Parameter("p", basis, TIME_BASES[time_basis](TIMES))
    one = basis.Y.size * basis.space.value_size if isinstance(basis, NODAL) else np.prod(basis.shape)
    functions = {"indicators": 4, "hats": 5, "shared": 1, "groups": 2, "pairs of layers": 2}[time_basis]
    assert parameter.dim == one * functions


@on_ranks
def test_set_takes_integers_and_lists():
    parameter = Parameter("kernel", KernelCoefficients(_kernel()), Once())
    parameter.set(0, np.arange(12).reshape(4, 3).tolist())
    assert_array_equal(parameter.get(0), np.arange(12.0).reshape(4, 3))


@on_two_ranks
def test_set_refuses_a_wrong_shape(basis):
    parameter = Parameter("gauss", basis, LayerIndicators(TIMES))
    wrong = np.zeros((*basis.shape, 2))
    with pytest.raises(ValueError, match=r"coefficients of gauss_\d: expected numbers of shape .*, got .*"):
        parameter.set(0, wrong)
    if len(basis.shape) == 2 and basis.shape[0] != basis.shape[1]:
        with pytest.raises(ValueError, match="coefficients of gauss_"):
            parameter.set(0, np.zeros(basis.shape).T)
    assert not parameter.get(0).any()


@on_two_ranks
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_set_refuses_numbers_that_are_not_finite(basis, number):
    parameter = Parameter("gauss", basis, LayerIndicators(TIMES))
    c = np.full(basis.shape, number)
    with pytest.raises(ValueError, match=r"coefficients of gauss_1: expected finite numbers of shape .*, .* are not finite"):
        parameter.set(1, c)
    assert not parameter.get(1).any()


@on_ranks
@pytest.mark.parametrize("what", ["shape", "finite"])
def test_set_refuses_node_values_on_all_ranks_where_one_rank_brings_wrong_ones(what):
    parameter = Parameter("bias", NodalValues(label_space("disk", "DG0")), LayerIndicators(TIMES))
    c = np.zeros(parameter.space_basis.shape)
    if COMM_WORLD.rank == COMM_WORLD.size - 1:
        c = np.zeros(c.size + 1) if what == "shape" else np.full(c.size, np.nan)
    with pytest.raises(ValueError, match=what):
        parameter.set(0, c)
