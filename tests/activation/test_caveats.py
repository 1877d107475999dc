"""Statements of the theory that rest on sampled properties of sigma say so: "sampled, not proved"."""

from dataclasses import fields, replace

import numpy as np
import pytest
from helpers import laplace, smooth
from problems import autonomous_network, learning_problem

from fem_resnet import (
    Box,
    EnergyMonitor,
    GrowthMonitor,
    LowRankKernel,
    Properties,
    StateGrid,
    class_space,
    energy_step_limit,
    find_steady_states,
    get_activation,
    lipschitz_bound,
    pmp_residual,
    solve_value_function,
    stability_report,
    stability_verdict,
    well_posedness_constants,
)  # fmt: skip

PROPERTIES = {field.name for field in fields(Properties)} - {"sampled"}


def net_with(sampled, activation="tanh", **more):
    """A network with B = B^T >= 0, as every statement supposes. These properties of sigma are sampled, the others proved."""
    sigma = get_activation(activation)
    sigma = replace(sigma, declared=replace(sigma.properties, sampled=frozenset(sampled)))
    phi = laplace("disk", "CG1", 4)
    return autonomous_network(LowRankKernel(phi, phi), np.diag([1.0, 0.5, 0.5, 0.25]), activation=sigma, layers=2, **more)


def energies(net):
    return str(EnergyMonitor(net).watch(net.run(net.Y.batch(smooth(net.Y, 1)))))


def growth(net):
    return str(GrowthMonitor(net).watch(net.run(net.Y.batch(smooth(net.Y, 1)))))


#: Statements, as functions of a network, and options of that network.
SAID = {
    "stability_verdict, Theorem 3.4": (lambda net: str(stability_verdict(net)), {}),
    "stability_verdict, B_s >= 0": (lambda net: stability_verdict(net).reason, {"activation": "leaky_relu"}),
    "stability_verdict of a gradient flow": (lambda net: stability_verdict(net).reason, {"gradient_flow": True}),
    "find_steady_states of a gradient flow": (
        lambda net: find_steady_states(net).reason,
        {"gradient_flow": True, "activation": "sigmoid"},
    ),
    "lipschitz_bound": (lambda net: str(lipschitz_bound(net)), {}),
    "lipschitz_bound of a gradient flow": (lambda net: str(lipschitz_bound(net)), {"gradient_flow": True}),
    "energy_step_limit": (lambda net: energy_step_limit(net).why["primitive"], {}),
    "EnergyMonitor": (energies, {}),
    "GrowthMonitor": (growth, {}),
    "well_posedness_constants": (lambda net: well_posedness_constants(net).caveat, {}),
    "stability_report": (lambda net: str(stability_report(net, net.Y.batch(smooth(net.Y, 1)))), {}),
}


@pytest.mark.parametrize("name", SAID)
def test_what_rests_on_sampled_properties_says_so(name):
    says, options = SAID[name]
    assert "sampled, not proved: " in says(net_with(PROPERTIES, **options))
    assert "sampled" not in says(net_with((), **options))


def test_the_residual_of_the_maximum_principle_says_so():
    for sampled, said in ((PROPERTIES, "(sampled, not proved: sigma does not decrease)"), ((), "")):
        problem = learning_problem(net_with(sampled), head=True, weight=None, samples=2)
        found = str(pmp_residual(problem, Box((-9, 9), (-9, 9))))
        assert found.endswith(said) and ("sampled" in found) == bool(said)


def test_a_value_function_says_so(caplog):
    for sampled in (PROPERTIES, ()):
        sigma = net_with(sampled).activation
        with caplog.at_level("WARNING", logger="fem_resnet"):
            solve_value_function(
                class_space(1), Box((-1, 1), (0, 0)), sigma, [2.0], StateGrid([[0.0, 0.5]], 0.1), final_time=0.5
            )
        assert ("sampled, not proved: sigma does not decrease" in caplog.text) == bool(sampled)
        caplog.clear()
