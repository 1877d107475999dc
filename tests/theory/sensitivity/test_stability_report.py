"""`stability_report`: networks whose stability is known, its page, and the same numbers on any partition."""

import json
from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import flat_network, laplace, network, smooth
from numpy.testing import assert_allclose

from fem_resnet import Basis, LayerStability, LinearisedFlow, ResidualNetwork, stability_report
from fem_resnet.theory.sensitivity.layer_stability import MORE_STEPS
from fem_resnet.time_stepping.evolution import FieldStepper

on_ranks = pytest.mark.parallel([1, 2, 3])
SPACES = [("disk", "CG1"), ("annulus", "DG0"), ("sphere", "CG1")]
on_spaces = pytest.mark.parametrize("space", SPACES, ids="-".join)
EULER = {"ts_rk_type": "1fe"}


def linear(space, mu, layers=8, final_time=2.0, activation="identity", **options):
    """f_t = - B f with B = sum mu_k phi_k phi_k^T: modes are e^(-mu t). One set of mu for all layers, or a row for each."""
    mu = np.array([mu] * layers if np.ndim(mu) == 1 else mu, dtype=float)
    P = laplace(*space, 5 if space[0] == "annulus" else 4)
    P = Basis(P.Y, P.values[:, : mu.shape[1]], "given")
    net = flat_network(P, layers=layers, final_time=final_time, activation=activation, **options)
    for layer in range(layers):
        net.kernel.set(layer, np.diag(mu[layer]))
    return net


def initial(net, samples=1, size=1.0):
    return net.Y.batch(size * smooth(net.Y, samples))


@cache
def report_of(space=("disk", "CG1"), alone=False):
    net = network(space, alone=alone)
    return stability_report(net, initial(net, 2))


def kinds(report):
    return [suggestion.kind for suggestion in report.suggestions]


# -- numbers ---------------------------------------------------------------------------------------------------------


@on_spaces
def test_numbers_are_those_of_the_flow_and_the_worst_of_all_samples(space):
    report = report_of(space)
    net = network(space)
    flow = LinearisedFlow(net, initial(net, 2))
    for l in report.layers:
        M, so_far, ahead = (
            [flow.propagator(*interval, sample=s) for s in range(2)]
            for interval in ((l.layer, l.layer + 1), (0, l.layer + 1), (l.layer, 3))
        )
        found = (l.grows, l.keeps), (l.grown, l.kept), (l.gradient_grows, l.gradient_keeps)
        for Ms, (grows, keeps) in zip((M, so_far, ahead), found):
            assert_allclose([grows, keeps], [max(p.norm for p in Ms), min(p.smallest for p in Ms)], rtol=1e-10)
        assert_allclose(l.condition, max(p.condition for p in so_far), rtol=1e-10)
        assert_allclose(l.exponents, [np.log(l.grown) / l.end, np.log(l.kept) / l.end], rtol=1e-12)
        assert_allclose(l.bound, flow.bound(l.layer, l.layer + 1), rtol=1e-12)
        r = flow.adjoint(net.Y.batch(flow.states[-1]), l.layer)
        assert_allclose(l.costate, net.Y.norm(r) / net.Y.norm(net.Y.batch(flow.states[-1])), rtol=1e-10)
        gradient = net.Y.batch(flow.slope(l.layer) * net.Y.values(r))
        assert_allclose(l.bias_gradient / l.costate, net.Y.norm(gradient) / net.Y.norm(r), rtol=1e-10)
        frozen = np.append(*(flow.frozen_eigenvalues(l.layer, sample=s) for s in range(2)))
        assert_allclose(l.frozen, frozen.real.max(), rtol=1e-10)


@pytest.mark.parallel([2, 3])
def test_a_report_sees_no_partition():
    report, alone = report_of(("sphere", "CG1")), report_of(("sphere", "CG1"), True)
    for ours, theirs in zip(report.layers, alone.layers):
        for field in fields(LayerStability):
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            if isinstance(a, (float, tuple)):
                assert_allclose(a, b, rtol=1e-9, err_msg=field.name)
            else:
                assert a == b, field.name
    assert report.suggestions == alone.suggestions and report.gradients == alone.gradients
    assert COMM_WORLD.bcast(replace(report, seconds=0.0)) == replace(report, seconds=0.0)


@on_spaces
def test_the_gradient_of_a_loss_is_followed(space):
    """r(t_l) for a given r(T): a mode that grows by e^(mu T) forwards also grows so backwards."""
    net = linear(space, [-1.0, 0.5])
    phi = net.bases["phi"][0]
    for k, rate in ((0, 1.0), (1, -0.5)):
        terminal = net.Y.batch(phi.values[:, k])
        report = stability_report(net, initial(net), terminal=terminal)
        for l in report.layers:
            assert_allclose(l.costate, np.exp(rate * (2.0 - l.start)), rtol=1e-3)  # rk4 with h mu = 1/4
            assert_allclose(l.bias_gradient, l.costate, rtol=1e-12)


# -- what it says ----------------------------------------------------------------------------------------------------


@on_spaces
def test_layers_that_amplify_and_that_damp_are_told_apart(space):
    """B has norm 2 on layers of length 1/4: e^(1/2) and e^(-1/2) a layer, to the power of 8 layers e^4 and e^(-4)."""
    rows = [[-2.0, 0.0]] * 3 + [[2.0, 0.0]] * 2 + [[-2.0, 2.0]] + [[0.1, -0.1]] * 2
    report = stability_report(net := linear(space, rows), initial(net))
    assert [l.verdict for l in report.layers] == ["amplifies"] * 3 + ["damps"] * 2 + ["both"] + ["neutral"] * 2
    assert "layers that amplify: 0-2, 5; that damp: 3-5" in str(report)
    # One mode is amplified by four layers and damped by two, and a little by the last: 0.95 where 2.05 would line up.
    assert_allclose(report.layers[-1].grown, np.exp(0.95), rtol=1e-2)
    (line,) = [line for line in report.findings if "lined up" in line]
    assert_allclose(float(line.split()[-1]), np.exp(2.05), rtol=1e-2)
    assert_allclose([report.layers[n].grows for n in (0, 3, 5)], [np.exp(0.5), 1.0, np.exp(0.5)], rtol=1e-3)


@on_ranks
def test_exploding_gradients_are_found_and_a_bound_on_the_kernel_is_suggested():
    net = linear(("sphere", "CG1"), [-3.0, 0.0], layers=16)
    report = stability_report(net, initial(net))
    assert report.gradients == "exploding"
    assert_allclose(report.layers[0].gradient_grows, np.exp(6.0), rtol=2e-3)
    assert report.layers[0].exponents[0] > 2.9
    constraint = next(s.text for s in report.suggestions if s.kind == "constraint")
    # the norm of b in L2(Y x Y) is that of the eigenvalues; log 10 / T
    assert f"norm(b) <= {np.log(10) / 2:.3g} in L2(Y x Y), now 3 on average" in constraint
    # With such a kernel the flow stays below 10, as the report says.
    for layer in range(net.layers):
        net.kernel.set(layer, net.kernel.get(layer) * np.log(10) / 2 / 3.0)
    tamed = stability_report(net, initial(net))
    assert tamed.layers[-1].grown <= 10 and tamed.gradients == "even" and "constraint" not in kinds(tamed)


@on_ranks
def test_gradients_that_vanish_by_saturation_are_found():
    """sigma'(u) for |u| = 6 and more is 2e-5: layers 0 to 3 have such a bias, the others none."""
    net = linear(("disk", "CG1"), [0.3, 0.2], activation="tanh")
    for layer in range(4):
        net.bias.set(layer, np.full(net.Y.nodes, -6.0))
    report = stability_report(net, initial(net, size=0.1))
    assert report.gradients == "vanishing"
    assert max(l.bias_gradient for l in report.layers[:4]) < 1e-3 and all(abs(l.flat - 1.0) < 1e-12 for l in report.layers[:4])
    # Gradients in f do not vanish: M is the identity except on few functions.
    assert min(l.costate for l in report.layers) > 0.5
    activation = next(s.text for s in report.suggestions if s.kind == "activation")
    assert "tanh is saturated in layers" in activation and "leaky_relu" in activation


def test_neurons_that_do_not_learn_are_found():
    net = linear(("annulus", "DG0"), [0.3, 0.2], activation="relu", layers=4)
    for layer in range(4):
        net.bias.set(layer, np.where(net.Y.coordinates[:, 0] > 0.3, 1.0, -1.0))
    report = stability_report(net, initial(net, size=0.1))
    assert all(0.5 < l.flat < 0.9 for l in report.layers)
    assert "on more than half of Y in layers 0-3" in next(s.text for s in report.suggestions if s.kind == "activation")


@on_spaces
@pytest.mark.parametrize("mu, stable", [(6.0, True), (12.0, False)])
def test_steps_at_which_euler_is_unstable_are_found(space, mu, stable):
    """|1 - mu h| < 1 for mu h < 2: with h = 1/4, mu = 6 is stable, though wrong; 12 grows where the flow damps."""
    net = linear(space, [mu, 0.0], solver_parameters=EULER)
    report = stability_report(net, initial(net))
    assert (report.layers[-1].grown <= 1.0 + 1e-12) == stable
    text = next(s.text for s in report.suggestions if s.kind == "step")
    wanted = report.layers[0].wanted_steps
    assert text.endswith(f"take steps={wanted}")
    # The suggested number of steps is enough, and one step less is not.
    for steps, enough in ((wanted, True), (wanted - 1, False)):
        again = stability_report(m := linear(space, [mu, 0.0], steps=steps, solver_parameters=EULER), initial(m))
        assert ("step" not in kinds(again)) == enough, steps
        assert (abs(again.layers[0].keeps - np.exp(-mu / 4)) <= 0.1) == enough


def test_where_no_number_of_steps_helps_that_is_said():
    net = linear(("disk", "CG1"), [-1.0, 0.0], layers=1, final_time=40.0, solver_parameters=EULER)
    report = stability_report(net, initial(net))
    assert report.layers[0].wanted_steps is None
    assert f"also with {MORE_STEPS} times as many steps" in next(s.text for s in report.suggestions if s.kind == "step")


@pytest.mark.parametrize(
    "parameters", [{"ts_type": "bdf"}, {"ts_type": "dirk"}, {"ts_adapt_type": "basic", "ts_rtol": 1e-3}], ids=str
)
def test_methods_without_a_known_stability_function_get_no_advice_on_steps(parameters):
    net = linear(("disk", "CG1"), [12.0, 0.0], layers=2, steps=4, solver_parameters=parameters)
    report = stability_report(net, initial(net))
    assert "step" not in kinds(report) and all(l.wanted_steps is None for l in report.layers)


def test_inputs_that_become_alike_are_found():
    net = linear(("sphere", "CG1"), [3.0, 0.0])
    report = stability_report(net, initial(net))
    assert_allclose(report.layers[-1].kept, np.exp(-6.0), rtol=0.1)
    assert any("come" in s.text and "times closer" in s.text for s in report.suggestions if s.kind == "constraint")


def test_a_condition_beyond_double_precision_is_infinite():
    """The condition is e^20 over e^(-20), beyond double precision; up to T / 2 it is e^20."""
    net = linear(("sphere", "CG1"), [10.0, -10.0], steps=8)
    layers = stability_report(net, initial(net)).layers
    assert layers[-1].condition == np.inf and layers[-1].kept < 1e-6
    assert_allclose(layers[3].condition, np.exp(20.0), rtol=1e-2)  # rk4 with h mu = 0.3


def test_a_sound_network_gets_no_suggestion():
    net = linear(("sphere", "CG1"), [0.3, 0.2], activation="tanh")
    report = stability_report(net, initial(net, size=0.3))
    assert report.suggestions == [] and report.gradients == "even"
    assert {l.verdict for l in report.layers} == {"neutral"}


@pytest.mark.parametrize(
    "parameters",
    [
        *({"ts_rk_type": name} for name in ("1fe", "3bs", "4")),
        *({"ts_type": name} for name in ("cn", "beuler")),
        {"ts_type": "theta", "ts_theta_theta": 0.5},
    ],
    ids=str,
)
def test_the_stability_function_is_what_a_step_does(parameters):
    Y = network().Y
    z = np.array([-3.0, -0.5, 1.2])
    with FieldStepper(Y, 3, lambda moment, y: z * y, lambda moment, y, x: z * x, parameters, None) as stepper:
        found = stepper.solve(np.ones((Y.nodes, 3)), 1.0, 1)[-1]
        assert_allclose(stepper.scheme.factor(z), found[0], rtol=1e-10)
        assert stepper.scheme.factor(2j).shape == ()


# -- the page --------------------------------------------------------------------------------------------------------


@on_ranks
def test_one_call_writes_one_page(tmp_path):
    folder = COMM_WORLD.bcast(tmp_path)
    net = linear(("disk", "CG1"), [12.0, -1.0], activation="tanh", solver_parameters=EULER)
    report = stability_report(net, initial(net), json=folder / "page.json", png=folder / "page.png")
    if COMM_WORLD.rank == 0:
        read = json.loads((folder / "page.json").read_text())
        assert read["gradients"] == report.gradients and len(read["layers"]) == 8
        assert read["layers"][3]["grows"] == report.layers[3].grows
        assert [s["kind"] for s in read["suggestions"]] == kinds(report) != []
        assert (folder / "page.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert len((folder / "page.png").read_bytes()) > 20000
    lines = str(report).splitlines()
    assert lines[0] == report.title and lines[1].split()[:3] == ["layer", "t", "grows"]
    assert [line.split()[0] for line in lines[2:10]] == list("01234567")
    assert all(suggestion.text in str(report) for suggestion in report.suggestions)
    with pytest.raises(FileNotFoundError):  # on every rank
        stability_report(net, initial(net), json=folder / "nowhere" / "page.json")


def test_what_is_infinite_is_null_in_json():
    report = report_of()
    infinite = replace(report, layers=[replace(report.layers[0], condition=np.inf, exponents=(0.0, -np.inf))])
    layer = json.loads(infinite.to_json())["layers"][0]
    assert layer["condition"] is None and layer["exponents"] == [0.0, None]


@on_ranks
def test_arguments_that_do_not_fit_are_refused():
    net = network()
    f = initial(net)
    with pytest.raises(ValueError, match="^stability_report: it does not take a network without layers"):
        stability_report(ResidualNetwork(laplace("disk", "CG1", 4), layers=0), f)
    with pytest.raises(ValueError, match="^terminal: expected a Function of"):
        stability_report(net, f, terminal=initial(net, 2))
    with pytest.raises(ValueError, match="^terminal: expected a co-state that is not zero"):
        stability_report(net, f, terminal=net.Y.batch(0 * net.Y.weights))
