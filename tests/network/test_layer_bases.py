"""Layers with bases of their own: the same numbers as dense matrices, derivatives, files, other meshes."""

import firedrake as fd
import numpy as np
import pytest
from helpers import flat_network, laplace, smooth
from kinds import with_layer_bases as network
from numpy.testing import assert_allclose
from problems import gathered

from fem_resnet import Batch, LabelSpace, LearningProblem, least_squares, load, save, smooth_in_time, tikhonov

on_ranks = pytest.mark.parallel([1, 2, 3])

TIMES = (0.0, 0.2, 0.9, 1.3)
# Sums of some hundred numbers of size one.
ROUND_OFF = 1e-13


def problem(net, regulariser=None):
    batch = Batch(net.Y.batch(smooth(net.Y)), net.Y.batch(smooth(net.Y, seed=9)))
    return LearningProblem(net, None, least_squares, regulariser or tikhonov(0.05), batch)


@on_ranks
def test_layers_take_their_own_bases():
    """(2.8) by dense matrices, in steps of Heun's method."""
    net = network(solver_parameters={"ts_rk_type": "2a"})
    f = gathered(net.Y, smooth(net.Y))
    w = gathered(net.Y, net.Y.weights)
    for layer in range(3):
        kernel = net.kernel.space_bases[layer].kernel
        phi, psi = (gathered(net.Y, basis.values) for basis in (kernel.phi, kernel.psi))
        a = gathered(net.Y, net.bias.space_bases[layer].expand(net.bias.get(layer)))[:, None]
        B, h = phi @ net.kernel.get(layer) @ psi.T * w, TIMES[layer + 1] - TIMES[layer]
        first = np.tanh(a - B @ f)
        f = f + h / 2 * (first + np.tanh(a - B @ (f + h * first)))
    assert_allclose(gathered(net.Y, net.Y.values(net(net.Y.batch(smooth(net.Y))))), f, rtol=0, atol=10 * ROUND_OFF)
    with pytest.raises(ValueError, match="^space_basis: expected one for all layers, kernel has one in each"):
        net.kernel.space_basis  # noqa: B018


@on_ranks
@pytest.mark.parametrize("layers_per_block", [1, 2, None])
def test_taylor_with_bases_of_each_layer(layers_per_block, rng, taylor):
    net = network(layers_per_block=layers_per_block)
    J = problem(net).reduced_functional()
    directions = []
    for parameter in net.parameters:
        for k, basis in enumerate(parameter.space_bases):
            direction = fd.Function(basis.space)
            nodal = basis.space == net.Y.V
            basis.write(direction, smooth(net.Y, 1, seed=50)[:, 0] if nodal else rng.normal(size=basis.shape))
            directions.append(direction)
    taylor(J, [*net.bias.functions, *net.kernel.functions], directions, "bases of layers", f"{layers_per_block} a Block")


@on_ranks
def test_costate_between_layers_of_different_psi_does_not_see_the_blocks():
    costates = []
    for layers_per_block in (1, 3):
        net = network(layers_per_block=layers_per_block)
        J, run = problem(net).record()
        J.derivative()
        costates.append([net.Y.values(run.costate(layer)) for layer in range(4)])
    for one, other in zip(*costates):
        assert_allclose(one, other, rtol=0, atol=ROUND_OFF)


@on_ranks
def test_files_keep_bases_of_each_layer(tmp_path):
    net = network()
    save(tmp_path / "net.h5", net)
    loaded, _ = load(tmp_path / "net.h5")
    assert [basis.kernel.shape for basis in loaded.kernel.space_bases] == [(6, 4), (4, 3), (6, 3)]
    assert len({id(basis) for bases in loaded.bases.values() for basis in bases if basis is not None}) == 3
    final = [gathered(n.Y, n.Y.values(n(n.Y.batch(smooth(n.Y))))) for n in (net, loaded)]
    assert_allclose(*final, rtol=0, atol=ROUND_OFF)


@on_ranks
def test_bases_of_each_layer_move_to_another_mesh():
    net = network(bias="bases")
    copy = LabelSpace(fd.FunctionSpace(fd.UnitDiskMesh(1), "CG", 1))
    moved = net.on(copy)
    assert moved.bases["phi"][0] is moved.bases["phi"][2]
    final = [gathered(n.Y, n.Y.values(n(n.Y.batch(smooth(n.Y))))) for n in (net, moved)]
    # the eigensolver's tolerance
    assert_allclose(*final, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="on: it does not take a bias with a value at every node"):
        network().on(copy)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda b: dict(phi=[b, b]), ValueError, "^kernel.phi: expected one Basis, or 3, one a layer, got 2$"),
        (lambda b: dict(phi=[]), ValueError, "^kernel.phi: expected a Basis, or one a layer, got an empty list$"),
        (lambda b: dict(phi=b, psi=[b] * 4), ValueError, "^kernel.psi: expected one Basis, or 3, .* got 4$"),
        (lambda b: dict(phi=b, bias=[None, b]), ValueError, "^bias.basis: expected one Basis, or 3, .* got 2$"),
        (lambda b: dict(phi=[b, None, b]), TypeError, "^kernel.phi: expected a Basis, .*, got NoneType$"),
        (lambda b: dict(phi=b, bias=[b, 1, b]), TypeError, "^bias.basis: expected a Basis or None .*, got int"),
        (
            lambda b: dict(phi=[b, b, laplace("annulus", "DG0", 5)]), ValueError,
            "^kernel.phi: expected a basis on the label space of phi, .*, got one on .*$",
        ),
        (
            lambda b: dict(phi=[b, laplace("disk", "CG1", 3), b], psi=b, kernel_in_time="shared"), ValueError,
            "^kernel.in_time: layers 0 and 1 share coefficients of kernel, but have different bases in space; give both",
        ),
    ],
)  # fmt: skip
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        flat_network(**change(laplace("disk", "CG1", 4)), times=TIMES)


def test_smoothness_in_time_wants_one_basis():
    with pytest.raises(ValueError, match="^smooth_in_time: bias_0 and bias_1, .* have different bases"):
        problem(network(), smooth_in_time(0.1)).evaluate()
