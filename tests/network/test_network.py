"""The forward problem: a plain residual network in the limit case, the whole f stepped by PETSc in general."""

import re

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import SWISH, TIMES, flat_network, half_square_distance, label_space, laplace, name, network, smooth
from numpy.testing import assert_allclose
from petsc4py import PETSc

from fem_resnet import ACTIVATIONS, Kernel, ResidualNetwork, StepFailure, cell_indicators

on_ranks = pytest.mark.parallel([1, 2, 3])

RK_TYPES = ["1fe", "2a", "2b", "3", "3bs", "4", "5f", "5dp", "5bs", "6vr", "7vr", "8vr"]


def _run(net, values=None):
    """Values of f(T), for smooth initial values if none are given."""
    return net.Y.values(net(net.Y.batch(smooth(net.Y) if values is None else values)))


# -- against plain networks ------------------------------------------------------------------------------------------

PLAIN_ACTIVATIONS = {
    "tanh": np.tanh,
    "arctan": np.arctan,
    "sigmoid": lambda s: 1 / (1 + np.exp(-s)),
    "relu": lambda s: np.where(s > 0, s, 0.0),
    "leaky_relu": lambda s: np.where(s > 0, s, 0.1 * s),
    "elu": lambda s: np.where(s > 0, s, np.exp(s) - 1),
    "softplus": lambda s: np.log(1 + np.exp(s)),
    "identity": lambda s: s,
    SWISH: lambda s: s / (1 + np.exp(-s)),
}


@on_ranks
@pytest.mark.parametrize("domain", ["disk", "sphere"])
@pytest.mark.parametrize("sigma", PLAIN_ACTIVATIONS, ids=str)
def test_one_euler_step_a_layer_with_cell_indicators_is_the_residualnetwork(domain, sigma, rng):
    """(2.1): z_{l+1} = z_l + tau_l sigma(a_l - B_l z_l), with B = beta diag(w) by the cells' areas w."""
    Y = label_space(domain, "DG0")
    cells = cell_indicators(Y)
    net = ResidualNetwork(cells, layers=TIMES, activation=sigma, solver_parameters={"ts_rk_type": "1fe"})
    z, w = (Y.sum(cells.values.T @ values) for values in (smooth(Y), Y.weights))
    for layer, tau in enumerate(np.diff(TIMES)):
        a, beta = rng.normal(size=Y.size), rng.normal(size=(Y.size, Y.size)) * Y.size**0.5 / Y.measure
        net.bias.set(layer, cells.values @ a)
        net.kernel.set(layer, beta)
        z = z + tau * PLAIN_ACTIVATIONS[sigma](a[:, None] - beta @ (w[:, None] * z))
    assert_allclose(_run(net), cells.values @ z, rtol=0, atol=1e-12 * np.abs(z).max())


def _step_whole_f(net, f, rk_type, steps):
    """f itself, nodes x samples, in a TS of its own; on one rank."""
    factors, shape = net.kernel.space_basis.kernel, f.shape
    sigma = PLAIN_ACTIVATIONS[net.activation.name]
    for layer in range(net.layers):
        length = net.times[layer + 1] - net.times[layer]
        a = net.bias.space_basis.expand(net.bias.get(layer))[:, None]
        B = factors.phi.values @ net.kernel.get(layer) @ factors.psi.weighted.T

        def rate(ts, t, y, F):
            F.array_w[:] = sigma(a - B @ y.array_r.reshape(shape)).ravel()

        ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
        ts.setType("rk")
        ts.setRKType(rk_type)
        ts.setRHSFunction(rate, PETSc.Vec().createSeq(f.size))
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.MATCHSTEP)
        ts.setMaxTime(length)
        ts.setTimeStep(length / steps)
        y = PETSc.Vec().createWithArray(f.ravel().copy(), comm=PETSc.COMM_SELF)
        options = PETSc.Options()
        options["ts_adapt_type"] = "none"
        ts.setFromOptions()
        del options["ts_adapt_type"]
        ts.solve(y)
        f = y.array_r.reshape(shape).copy()
    return f


@pytest.mark.parametrize("rk_type", RK_TYPES)
@pytest.mark.parametrize("bias", ["nodes", "basis"])
def test_stepping_the_coefficients_is_stepping_the_whole_f(rk_type, bias):
    net = network(steps=3, size=2.0, basis_for_bias=bias == "basis", solver_parameters={"ts_rk_type": rk_type})
    whole = _step_whole_f(net, smooth(net.Y), rk_type, steps=3)
    # The sums are made in another order; the network is contracting or mildly expanding.
    assert_allclose(_run(net), whole, rtol=0, atol=1e-13 * np.abs(whole).max())


@pytest.mark.parametrize("space", [("sphere", "DG0"), ("square", "CG3"), ("cube", "CG1")], ids=name)
@pytest.mark.parametrize("sigma", ["sigmoid", "elu"])
def test_stepping_the_coefficients_is_stepping_the_whole_f_on_any_domain(space, sigma):
    net = network(space, activation=sigma, steps=2)
    whole = _step_whole_f(net, smooth(net.Y), "4", steps=2)
    assert_allclose(_run(net), whole, rtol=0, atol=1e-13 * np.abs(whole).max())


# -- laws ------------------------------------------------------------------------------------------------------------


@on_ranks
def test_a_batch_is_its_single_samples():
    net = network(steps=2)
    values = smooth(net.Y, samples=5)
    batch = _run(net, values)
    for s in range(5):
        single = fd.Function(net.Y.V)
        single.dat.data_wo[:] = values[:, s]
        final = net(single)
        assert final.function_space() == net.Y.V
        # The same sums, but by other kernels of BLAS.
        assert_allclose(final.dat.data_ro, batch[:, s], rtol=0, atol=1e-13)
        assert_allclose(_run(net, values[:, s])[:, 0], batch[:, s], rtol=0, atol=1e-13)


@on_ranks
@pytest.mark.parametrize("taped", [False, True], ids=["unrecorded", "recorded"])
def test_the_number_of_layers_in_a_block_does_not_matter(taped, annotation):
    expected = _run(network(steps=2))
    for layers_per_block in (1, 2, 3, 7):
        net = network(steps=2, layers_per_block=layers_per_block)
        with annotation(taped):
            final = _run(net)
        assert_allclose(final, expected, rtol=0, atol=1e-13, err_msg=f"{layers_per_block} layers a block")


@on_ranks
@pytest.mark.parametrize("taped", [False, True], ids=["unrecorded", "recorded"])
@pytest.mark.parametrize("layers_per_block", [1, 2, None])
def test_state_is_what_a_network_of_the_first_layers_gives(taped, layers_per_block, annotation):
    net = network(layers_per_block=layers_per_block)
    with annotation(taped):
        run = net.run(net.Y.batch(smooth(net.Y)))
    for layers in range(4):
        part = network(times=TIMES[: layers + 1], layers_per_block=layers_per_block)
        state = run.state(layers)
        assert state.function_space() == run.final.function_space()
        assert_allclose(net.Y.values(state), _run(part), rtol=0, atol=1e-13, err_msg=f"t_{layers}")
    assert (net.Y.values(run.state(0)) == smooth(net.Y)).all()
    # One after the other they are summed in another order.
    for layer, state in enumerate(run.states()):
        assert_allclose(net.Y.values(state), net.Y.values(run.state(layer)), rtol=0, atol=1e-14)
    assert layer == 3


@on_ranks
def test_states_stay_those_of_their_run():
    """A later run, or other parameters, do not change what an unrecorded run gives."""
    net = network(layers_per_block=2)
    run = net.run(net.Y.batch(smooth(net.Y)))
    before = [net.Y.values(run.state(layer)).copy() for layer in range(4)]
    final = net.Y.values(run.final).copy()
    net.kernel.set(0, 2 * net.kernel.get(0))
    net.run(net.Y.batch(smooth(net.Y, seed=1)))
    assert all((net.Y.values(run.state(layer)) == before[layer]).all() for layer in range(4))
    assert (net.Y.values(run.final) == final).all()


@on_ranks
def test_a_network_without_layers_is_the_identity(annotation):
    net = ResidualNetwork(laplace("disk", "CG1", 4), layers=0)
    assert (net.layers, net.times.tolist(), net.bias.functions, net.kernel.functions) == (0, [0.0], (), ())
    for taped in (False, True):
        with annotation(taped):
            run = net.run(net.Y.batch(smooth(net.Y)))
        assert (net.Y.values(run.final) == smooth(net.Y)).all()
        assert (net.Y.values(run.state(0)) == smooth(net.Y)).all()
        with pytest.raises(RuntimeError, match="costate: this run has no layer on a tape"):
            run.costate(0)


@on_ranks
def test_a_network_of_zeros_moves_by_sigma_of_zero():
    net = ResidualNetwork(laplace("disk", "CG1", 4), layers=4, final_time=2.0, activation="sigmoid")
    assert_allclose(net.times, [0, 0.5, 1, 1.5, 2], rtol=1e-15)
    assert_allclose(_run(net), smooth(net.Y) + 2.0 * 0.5, rtol=0, atol=1e-14)


def test_activations_know_their_kinks_beside_compiled_kernels():
    """PyOP2 links its kernels with -ffast-math: once one is loaded, this process takes numbers below 2e-308 for 0."""
    assert label_space("disk", "CG1").measure > 0
    assert [name for name, sigma in ACTIVATIONS.items() if sigma.kinks] == ["relu", "leaky_relu"]


@on_ranks
def test_an_unrecorded_run_leaves_the_tape_alone(tape):
    _run(network())
    assert len(tape.get_blocks()) == 0


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize(
    "space",
    [("disk", "CG1"), ("disk", "DG0"), ("sphere", "CG1"), ("square", "CG3"), ("annulus", "CG2"), ("cube", "DG0")],
    ids=name,
)
def test_any_number_of_ranks_gives_the_same_states(space):
    """Inner products of all states with smooth functions, and J: the mesh on this rank alone against its parts."""
    projections, values = [], []
    for alone in (False, True):
        net = network(space, alone=alone, steps=2)
        probe, target = laplace(*space, rank=6, alone=alone), net.Y.batch(smooth(net.Y, seed=7))
        run = net.run(net.Y.batch(smooth(net.Y)))
        projections.append([probe.project(net.Y.values(run.state(layer))) for layer in range(4)])
        values.append(float(half_square_distance(run.final, target, net.Y)))
    assert_allclose(*projections, rtol=0, atol=1e-10)
    assert_allclose(*values, rtol=1e-10)


# -- what is refused -------------------------------------------------------------------------------------------------


def _refused_options():
    yield {"ts_adapt_type": "history"}, "'ts_adapt_type' 'history' needs a history"
    yield {"ts_rk_multirate": None}, "'ts_rk_multirate' needs slow and fast unknowns"
    for option in ({"ts_dt": 0.01}, {"ts_time_step": 0.01}, {"ts_max_time": 0.1}, {"ts_max_steps": 1}):
        yield option, "follow from the layers; give the network layer times and a number of steps a layer instead"


@pytest.mark.parametrize("options, message", list(_refused_options()), ids=str)
def test_options_that_would_change_the_steps_are_refused(options, message):
    with pytest.raises(ValueError, match=f"solver_parameters: .*{message}"):
        network(steps=2, solver_parameters=options)


@on_ranks
@pytest.mark.parametrize("option, name", [("ts_rk_type", "4th"), ("ts_type", "rk4"), ("ts_adapt_type", "nome")])
def test_unknown_names_are_refused(option, name):
    with pytest.raises(ValueError, match=rf"(?s)solver_parameters: .*{name}"):
        network(solver_parameters={option: name})


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"activation": "tahn"}, ValueError, r"^activation: expected one of 'tanh', .*, got 'tahn'"),
        ({"times": [0.0, 0.5, 0.5]}, ValueError, r"^layers.times: expected increasing layer times .*, got \[0.0, 0.5, 0.5\]"),
        ({"times": [0.0, 0.5, 0.3]}, ValueError, r"^layers.times: expected increasing layer times"),
        (
            {"times": [0.0, np.nan]},
            ValueError,
            r"^layers.times: expected finite numbers of shape \(layers \+ 1,\), got 1 of 2 that are not finite",
        ),
        (
            {"times": [0.1, 0.5]},
            ValueError,
            r"^layers.times: expected increasing layer times 0 = t_0 < .. < t_L, got \[0.1, 0.5\]",
        ),
        ({"times": []}, ValueError, r"^layers.times: expected numbers of shape \(layers \+ 1,\), got shape \(0,\)"),
        (
            {"times": [[0.0, 1.0]]},
            ValueError,
            r"^layers.times: expected numbers of shape \(layers \+ 1,\), got shape \(1, 2\)",
        ),
        ({"times": None, "layers": -1}, ValueError, r"^layers.times: expected an integer >= 0, got -1"),
        ({"times": None, "layers": 2.0}, ValueError, r"^layers.times: expected an integer >= 0, got 2.0"),
        ({"times": None, "final_time": 0.0}, ValueError, r"final_time: expected a positive number, got 0.0"),
        ({"times": None, "final_time": np.inf}, ValueError, r"final_time: expected a positive number, got inf"),
        ({"steps": 0}, ValueError, r"^layers.steps: expected a positive integer, got 0"),
        ({"steps": True}, ValueError, r"^layers.steps: expected a positive integer, got True"),
        ({"layers_per_block": 0}, ValueError, r"^layers.per_block: expected a positive integer, got 0"),
        ({"bias": "nodes"}, TypeError, r"^bias.basis: expected a Basis or None .*, got str"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        network(**options)


@on_ranks
def test_bases_of_another_label_space_are_refused():
    phi, other = laplace("disk", "CG1", 6), laplace("sphere", "CG1", 9)
    for which in ("psi", "basis"):
        with pytest.raises(
            ValueError, match=rf"^(kernel|bias).{which}: expected a basis on the label space of phi, .*, got one on .*"
        ):
            flat_network(phi, **{"bias" if which == "basis" else which: other})
    with pytest.raises(TypeError, match="^kernel.phi: expected a Basis, or a list with one a layer, got LabelSpace"):
        ResidualNetwork(phi.Y)
    with pytest.raises(TypeError, match="^kernel.psi: expected a Basis, or a list with one a layer, got ndarray"):
        ResidualNetwork(Kernel(phi, phi.values))


@on_ranks
def test_an_initial_state_that_does_not_fit_is_refused():
    net = network()
    other = label_space("sphere", "CG1")
    with pytest.raises(ValueError, match="initial: expected a Function on the mesh .*, got one on .*"):
        net.run(other.batch(smooth(other)))
    with pytest.raises(ValueError, match="^initial: expected a Function of .*CG1.*, got one of .*DG0"):
        net.run(fd.Function(label_space("disk", "DG0").V))
    with pytest.raises(TypeError, match="initial: expected a Function, got ndarray"):
        net.run(smooth(net.Y))
    bad = net.Y.batch(smooth(net.Y))
    values = bad.dat.data_wo  # asking for it is collective
    if COMM_WORLD.rank == COMM_WORLD.size - 1:
        values[0, 1] = np.nan
    with pytest.raises(ValueError, match=r"initial: sample 1 has values that are not finite \(1 samples have\)"):
        net.run(bad)


@on_ranks
@pytest.mark.parametrize("layer", [-1, 4, 1.0, "2", True])
def test_states_exist_at_layer_times_only(layer):
    net = network()
    run = net.run(net.Y.batch(smooth(net.Y)))
    for what in (run.state, run.costate):
        with pytest.raises(ValueError, match=re.escape(f"layer: expected an integer from 0 to 3, got {layer!r}")):
            what(layer)


@on_ranks
def test_coefficients_that_do_not_fit_are_refused():
    net = network()
    with pytest.raises(ValueError, match=r"coefficients of kernel_\d: expected numbers of shape \(6, 4\), got shape \(4, 6\)"):
        net.kernel.set(0, np.zeros((4, 6)))
    with pytest.raises(ValueError, match="coefficients of kernel_1: expected finite numbers of shape .*, .* are not finite"):
        net.kernel.set(1, np.full((6, 4), np.nan))


@on_ranks
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("taped", [False, True], ids=["unrecorded", "recorded"])
def test_an_overflow_names_layer_and_time_and_leaves_the_network_usable(taped, annotation):
    net = network(activation="identity", layers_per_block=2)
    good, initial = _run(net), net.Y.batch(smooth(net.Y))
    kernel = net.kernel.get(1)
    net.kernel.set(1, 1e200 * kernel)
    with annotation(taped), pytest.raises(StepFailure, match="the state is not finite in layer 1, t = 0.9") as caught:
        net.run(initial)
    assert (caught.value.layer, caught.value.reason) == (1, "NOT_FINITE") and caught.value.time == pytest.approx(0.9)
    net.kernel.set(1, kernel)
    with annotation(taped):
        final = net(initial)
    assert (net.Y.values(final) == good).all()
