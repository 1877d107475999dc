"""Residual networks in arrays as networks on a label domain, and back.

A residual network of N neurons and L layers has a bias a_l and a matrix B_l a layer,

    z_(l+1) = z_l + tau_l sigma(a_l - B_l z_l),      l = 0 .. L - 1.                                              (2.1)

Its neurons become the cells of a partition Y_1 .. Y_N of Y, its states piecewise constant functions,

    a(y) = a^i,      b(y, z) = B^ij / |Y_j|,      f(y) = z^i      for y in Y_i, z in Y_j,                         (2.4)

so that `int_Y b(y, z) f(z) dz = sum_j B^ij z^j`: (2.1) is one Euler step a layer of (2.5), and the network's own ODE
(2.3), stepped by any other scheme, is (2.5) too. On M^d cubes of width h a matrix that is scaled as in (2.6), `h^d
B_h`, has the kernel (2.7), with values b_h = B_h that stay of one size as h -> 0; on other partitions |Y_j| takes the
place of h^d.

The way back asks for the Euler scheme: no other one is a residual network (2.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import firedrake as fd
import numpy as np
from numpy.typing import ArrayLike

from fem_resnet.arguments import real_array
from fem_resnet.features import HELD, supports
from fem_resnet.label_domain.basis import cell_indicators, node_numbers
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.ranks import same

__all__ = ["NetworkArrays", "from_network", "state_array", "to_network"]

EULER = {"ts_type": "rk", "ts_rk_type": "1fe"}


class NetworkArrays(NamedTuple):
    """A residual network (2.1): ``z = z + tau[l] * sigma(a[l] - B[l] @ z)`` for l = 0 .. L - 1.

    Attributes
    ----------
    a : numpy.ndarray
        Shape (L, N), float64.
    B : numpy.ndarray
        Shape (L, N, N), float64.
    tau : numpy.ndarray
        Shape (L,), float64; no unit.
    """

    a: np.ndarray
    B: np.ndarray
    tau: np.ndarray


def from_network(
    a: ArrayLike, B: ArrayLike, z_0: ArrayLike, partition: LabelSpace, *, tau: float | Sequence[float] = 1.0, **options
) -> tuple[ResidualNetwork, fd.Function]:
    """The residual network (2.1) as a network on a partition of a label domain, by (2.4); equal to round-off.

    What the network steps is (2.5), which for (2.6) on cubes is (2.7).

    Neuron number k is cell number k of the partition, in the order of `node_numbers`. A module of PyTorch that computes
    ``z + tau * sigma(linear(z))`` has a = ``linear.bias.detach()`` and B = ``-linear.weight.detach()``; its batches are
    turned, ``z_0 = batch.T``.

    The arrays are the same on every rank. Collective over the communicator of the partition.

    Parameters
    ----------
    a
        Biases, shape (L, N); or (N,), shared by all layers.
    B
        Matrices, shape (L, N, N), which a layer subtracts; or (N, N), shared by all layers. With (2.6) it is `h^d B_h`.
    z_0
        Initial states, shape (N,) or (N, samples).
    partition
        DG of degree 0 on a mesh of N cells; `point_space` makes one from the measures |Y_k| alone.
    tau
        tau > 0, or one a layer, shape (L,); no unit.
    options
        What `ResidualNetwork` takes else, as `activation`. With "solver_parameters" of another scheme, and "steps", it
        is the ODE (2.3) that is solved, in place of (2.1).

    Returns
    -------
    net : ResidualNetwork
        With a value of a and b on each layer, or shared ones.
    initial : Function
        f_I, a batch; ``state_array(partition, net(initial))`` is z_L.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what is said above; the message names it.

    Examples
    --------
    >>> from fem_resnet import point_space
    >>> rng = np.random.default_rng(0)
    >>> a, B, z = rng.normal(size=(4, 3)), rng.normal(size=(4, 3, 3)), rng.normal(size=3)
    >>> Y = point_space([0.2, 0.5, 0.3])
    >>> net, initial = from_network(a, B, z, Y, tau=0.1, activation="tanh")
    >>> for l in range(4):
    ...     z = z + 0.1 * np.tanh(a[l] - B[l] @ z)
    >>> bool(abs(state_array(Y, net(initial))[:, 0] - z).max() < 1e-15)
    True
    """
    check_label_space(partition, "partition")
    same(partition.comm, a=a, B=B, z_0=z_0, tau=tau)
    cells = cell_indicators(partition)
    N = cells.rank
    a, B, z_0 = (real_array(name, array) for name, array in (("a", a), ("B", B), ("z_0", z_0)))
    if z_0.shape[:1] != (N,) or z_0.ndim not in (1, 2):
        raise ValueError(f"z_0: expected shape ({N},) or ({N}, samples), one row a cell; got {z_0.shape}")
    tau = real_array("tau", tau, above=0)
    layers = _layers(partition, {"a": (a, (N,)), "B": (B, (N, N)), "tau": (tau, ())})
    times = np.append(0.0, np.cumsum(np.broadcast_to(tau, layers)))
    options = {"solver_parameters": EULER} | options
    if options.get("gradient_flow"):
        raise ValueError("gradient_flow: expected layers (2.1), z + tau sigma(a - B z); make a ResidualNetwork of such a flow")
    net = ResidualNetwork(
        cells,
        times=times,
        bias_in_time="layers" if a.ndim == 2 else "shared",
        kernel_in_time="layers" if B.ndim == 3 else "shared",
        **options,
    )
    numbers, measures = node_numbers(partition), cells.project(np.ones((partition.nodes, 1)))[:, 0]
    for l, bias in enumerate(a.reshape(-1, N)):
        net.bias.set(l, bias[numbers])
    for l, matrix in enumerate(B.reshape(-1, N, N)):
        net.kernel.set(l, matrix / measures)
    return net, partition.batch(z_0[numbers], "z_0")


def _layers(Y: LabelSpace, given: dict[str, tuple[np.ndarray, tuple[int, ...]]]) -> int:
    """L, on which all arrays that have a first axis for the layers agree; 1 where none has."""
    found = {}
    for name, (array, shape) in given.items():
        if array.shape == (*array.shape[:1], *shape) and array.ndim == len(shape) + 1 and len(array):
            found[name] = len(array)
        elif array.shape != shape:
            raise ValueError(
                f"{name}: expected shape {shape}, or (L, {', '.join(map(str, shape))}) for L >= 1 layers with "
                f"{Y.size} cells; got {array.shape}"
            )
    if len(set(found.values())) > 1:
        raise ValueError(f"{', '.join(found)}: expected one number of layers, got {list(found.values())}")
    return max(found.values(), default=1)


def state_array(Y: LabelSpace, function: fd.Function) -> np.ndarray:
    """A state or batch as an array that is the same on every rank, row k the node number k. Collective.

    Parameters
    ----------
    Y
        Label domain, with nodes that `node_numbers` can number.
    function
        A Function of `Y.V` or a batch.

    Returns
    -------
    numpy.ndarray
        z, shape (N, samples), float64.
    """
    check_label_space(Y)
    Y.check_batch(function, "function")
    return _on_all_ranks(Y, Y.values(function))


def _on_all_ranks(Y: LabelSpace, values: np.ndarray) -> np.ndarray:
    everywhere = np.zeros((Y.size, values.shape[1]))
    everywhere[node_numbers(Y)] = values
    return Y.sum(everywhere)


@supports("no_layers", *HELD, "single_precision")
def to_network(net: ResidualNetwork) -> NetworkArrays:
    """The residual network (2.1) that a network stepped by Euler's method is: the inverse of `from_network`.

    On any label space, with the weights of its nodes: `B^ij = b(y_i, z_j) w_j`. Several steps a layer are as many
    layers, in which a parameter that varies in t has its value at the step's start. Collective; the arrays, of L N^2
    numbers, are the same on every rank. States go along by `state_array`.

    Parameters
    ----------
    net
        A network with "ts_rk_type": "1fe" and fixed steps.

    Returns
    -------
    NetworkArrays

    Raises
    ------
    ValueError
        If the network is a gradient flow, which has B^T in front of sigma, is stepped by another scheme, or adapts its steps;
        the message says why.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, laplace_basis
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> net = ResidualNetwork(laplace_basis(Y, 6), layers=2, steps=2, solver_parameters={"ts_rk_type": "1fe"})
    >>> a, B, tau = to_network(net)
    >>> B.shape == (4, Y.size, Y.size), tau.tolist()
    (True, [0.25, 0.25, 0.25, 0.25])
    """
    _check_scheme(net.solver_parameters)
    a, B, tau = [], [], []
    for layer in net.layer_inputs():
        factors = layer.factors
        phi, psi = (_on_all_ranks(net.Y, values) for values in (factors.phi.values, factors.psi.weighted))
        for step in range(net.steps):
            s = step / net.steps
            a.append(_on_all_ranks(net.Y, layer.bias.coefficients(s)[:, None])[:, 0])
            B.append(phi @ layer.beta.coefficients(s) @ psi.T)
            tau.append(layer.length / net.steps)
    N = net.Y.size
    return NetworkArrays(np.reshape(a, (-1, N)), np.reshape(B, (-1, N, N)), np.array(tau))


def _check_scheme(parameters: dict) -> None:
    kind, method = parameters["ts_type"], parameters.get("ts_rk_type")
    if kind not in ("rk", "euler") or (kind == "rk" and method != "1fe"):
        name = f"'rk' with 'ts_rk_type' {method!r}" if kind == "rk" else repr(kind)
        raise ValueError(
            f"net: it is stepped by {name}; z + tau sigma(a - B z) has one sigma, of the state at the layer's start, "
            f"which is Euler's method alone: other explicit schemes nest several sigma in a layer, implicit ones solve "
            f"an equation. Give the network {{'ts_rk_type': '1fe'}}, with 'steps' enough that it is as exact"
        )
