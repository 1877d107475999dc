"""Residual networks given as arrays, as networks on a label domain, and back.

A residual network with N neurons and L layers has in each layer a bias a_l and a matrix B_l,

    z_(l+1) = z_l + tau_l sigma(a_l - B_l z_l),      l = 0 .. L - 1.                                              (2.1)

Its neurons become the cells Y_1 .. Y_N of a partition of Y, and its states piecewise constant functions,

    a(y) = a^i,      b(y, z) = B^ij / |Y_j|,      f(y) = z^i      for y in Y_i, z in Y_j.                         (2.4)

Then `int_Y b(y, z) f(z) dz = sum_j B^ij z^j`, so that (2.1) is (2.5) with one Euler step in each layer. With any other
scheme (2.5) discretises the ODE (2.3) of the network. On M^d cubes of width h, a matrix `h^d B_h` scaled as in (2.6) has
the kernel (2.7), with values b_h = B_h whose size does not change as h -> 0. On other partitions |Y_j| takes the place of
h^d.

The way back gives (2.1) for Euler's method alone. Another explicit Runge-Kutta method, with Butcher's coefficients A_ij and
weights b_i, is a network of another form: each step has several evaluations of sigma, and later ones skip back to all earlier
ones,

    Z_i = z_l + tau_l sum_(j < i) A_ij k_j,      k_i = sigma(a_li - B_li Z_i),      z_(l+1) = z_l + tau_l sum_i b_i k_i,

where a_li, B_li are the coefficients at the times of the stages. Implicit schemes solve an equation in each step: they are
no finite number of evaluations of sigma.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import firedrake as fd
import numpy as np
from numpy.typing import ArrayLike

from fem_resnet.arguments import integer, real_array
from fem_resnet.features import HELD, supports
from fem_resnet.label_domain.basis import cell_indicators, node_numbers
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.network.settings import Bias, Kernel, Layers
from fem_resnet.ranks import same

__all__ = ["NetworkArrays", "StageArrays", "from_network", "refuse_other_schemes", "state_array", "to_network"]

EULER = {"ts_type": "rk", "ts_rk_type": "1fe"}


class NetworkArrays(NamedTuple):
    """The arrays of a residual network (2.1): ``z = z + tau[l] * sigma(a[l] - B[l] @ z)`` for l = 0 .. L - 1.

    Attributes
    ----------
    a : numpy.ndarray
        Biases, shape (L, N), float64.
    B : numpy.ndarray
        Matrices, shape (L, N, N), float64.
    tau : numpy.ndarray
        Step sizes, shape (L,), float64; in the unit of t.
    """

    a: np.ndarray
    B: np.ndarray
    tau: np.ndarray


class StageArrays(NamedTuple):
    """The arrays of a network whose layers are the steps of an explicit Runge-Kutta method; not of the form (2.1).

    ``k[i] = sigma(a[l, i] - B[l, i] @ (z + tau[l] * sum(skips[i, j] * k[j] for j in range(i))))`` for all stages i, and then
    ``z = z + tau[l] * sum(weights[i] * k[i])``, for l = 0 .. L - 1.

    Attributes
    ----------
    a : numpy.ndarray
        Biases, shape (L, stages, N), float64.
    B : numpy.ndarray
        Matrices, shape (L, stages, N, N), float64. Stages at the same time have the same matrix.
    tau : numpy.ndarray
        Step sizes, shape (L,), float64; in the unit of t.
    skips : numpy.ndarray
        Butcher's A_ij, shape (stages, stages), strictly lower triangular: by how much stage j skips to stage i. No unit.
    weights : numpy.ndarray
        Butcher's b_i, shape (stages,): by how much stage i goes into the next state. No unit.
    """

    a: np.ndarray
    B: np.ndarray
    tau: np.ndarray
    skips: np.ndarray
    weights: np.ndarray


def from_network(
    a: ArrayLike,
    B: ArrayLike,
    z_0: ArrayLike,
    partition: LabelSpace,
    *,
    tau: float | Sequence[float] = 1.0,
    steps: int = 1,
    **options: Any,
) -> tuple[ResidualNetwork, fd.Function]:
    """A residual network (2.1) as a network on a partition of a label domain, by (2.4); equal to round-off.

    The equation that the network discretises is (2.5), which for (2.6) on cubes is (2.7).

    Neuron k is cell k of the partition, in the order of `node_numbers`. A module of PyTorch that computes
    ``z + tau * sigma(linear(z))`` has a = ``linear.bias.detach()`` and B = ``-linear.weight.detach()``; its batches are
    transposed, ``z_0 = batch.T``.

    All ranks give the same arrays. Collective over the communicator of the partition.

    Parameters
    ----------
    a
        Biases, shape (L, N); or (N,), shared by all layers.
    B
        Matrices, shape (L, N, N), which the layers subtract; or (N, N), shared by all layers. With (2.6) these are `h^d B_h`.
    z_0
        Initial states, shape (N,) or (N, samples).
    partition
        DG of degree 0 on a mesh of N cells; `point_space` makes one from the measures |Y_k| alone.
    tau
        A step size tau > 0 for all layers, or one for each layer, shape (L,); in the unit of t.
    steps
        Number of time steps a layer. With more than one the network solves the ODE (2.3) instead of (2.1).
    options
        Other arguments of `ResidualNetwork`, such as `activation`. If "solver_parameters" name another scheme than Euler's,
        the network solves (2.3) too.

    Returns
    -------
    net : ResidualNetwork
        With values of a and b for each layer, or shared ones.
    initial : Function
        f_I, a batch; ``state_array(partition, net(initial))`` is z_L.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described above; the message names it.

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
    same(partition.comm, a=a, B=B, z_0=z_0, tau=tau, steps=steps)
    cells = cell_indicators(partition)
    N = cells.rank
    a, B, z_0 = (real_array(name, array) for name, array in (("a", a), ("B", B), ("z_0", z_0)))
    if z_0.shape[:1] != (N,) or z_0.ndim not in (1, 2):
        raise ValueError(f"z_0: expected shape ({N},) or ({N}, samples), with a row for each cell; got shape {z_0.shape}")
    lengths, steps = real_array("tau", tau, above=0), integer("steps", steps)
    layers = _layers(partition, {"a": (a, (N,)), "B": (B, (N, N)), "tau": (lengths, ())})
    times = np.append(0.0, np.cumsum(np.broadcast_to(lengths, layers))).tolist()
    options = {"solver_parameters": EULER} | options
    if options.get("gradient_flow"):
        raise ValueError(
            "gradient_flow: expected False, as the layers of (2.1) are z + tau sigma(a - B z); use ResidualNetwork for a flow"
        )
    net = ResidualNetwork(
        Kernel(cells, in_time="layers" if B.ndim == 3 else "shared"),
        bias=Bias(in_time="layers" if a.ndim == 2 else "shared"),
        layers=Layers(times, steps=steps),
        **options,
    )
    numbers, measures = node_numbers(partition), cells.project(np.ones((partition.nodes, 1)))[:, 0]
    for l, bias in enumerate(a.reshape(-1, N)):
        net.bias.set(l, bias[numbers])
    for l, matrix in enumerate(B.reshape(-1, N, N)):
        net.kernel.set(l, matrix / measures)
    return net, partition.batch(z_0[numbers], "z_0")


def _layers(Y: LabelSpace, given: dict[str, tuple[np.ndarray, tuple[int, ...]]]) -> int:
    """The number L of layers of all arrays that have an axis for the layers; 1 if no array has one."""
    found = {}
    for name, (array, shape) in given.items():
        if array.shape == (*array.shape[:1], *shape) and array.ndim == len(shape) + 1 and len(array):
            found[name] = len(array)
        elif array.shape != shape:
            raise ValueError(
                f"{name}: expected shape {shape}, or (L, {', '.join(map(str, shape))}) for L >= 1 layers, on "
                f"{Y.size} cells; got shape {array.shape}"
            )
    if len(set(found.values())) > 1:
        raise ValueError(f"{', '.join(found)}: expected the same number of layers, got {list(found.values())}")
    return max(found.values(), default=1)


def state_array(Y: LabelSpace, function: fd.Function) -> np.ndarray:
    """A state or a batch as an array with the values at node k in row k, the same on every rank. Collective.

    Parameters
    ----------
    Y
        The label domain, whose nodes `node_numbers` can number.
    function
        A Function of `Y.V` or a batch.

    Returns
    -------
    numpy.ndarray
        z, shape (N, samples), float64.

    Raises
    ------
    TypeError, ValueError
        If an argument is of another class, or `function` is none of these.
    """
    check_label_space(Y)
    Y.check_batch(function, "function")
    return _on_all_ranks(Y, Y.values(function))


def _on_all_ranks(Y: LabelSpace, values: np.ndarray) -> np.ndarray:
    """Values at all nodes in the order of `node_numbers`, shape (N, any), from those at the owned nodes. Collective."""
    everywhere = np.zeros((Y.size, values.shape[1]))
    everywhere[node_numbers(Y)] = values
    return Y.sum(everywhere)


@supports("channels", "no_layers", *HELD, "single_precision")
def to_network(net: ResidualNetwork) -> NetworkArrays | StageArrays:
    """The arrays of the network that a network with an explicit method is, for any program that multiplies matrices.

    Euler's method is the residual network (2.1): this is the inverse of `from_network`. Any other explicit method has several
    stages in each step, with weights of their own between them: another form than (2.1), `StageArrays`. Stages that nothing
    uses, which are there to estimate errors, are left out.

    The label space may be any one; the weights of its nodes enter the matrices, `B^ij = b(y_i, z_j) w_j`. Several steps in a
    layer become as many layers. A parameter that varies in t has there its value at the start of the step, or at the time of
    the stage. The arrays have L N^2 numbers, times the stages, and are the same on every rank; `state_array` gives the states.
    Collective over the ranks of the label domain.

    Parameters
    ----------
    net
        A network with an explicit "ts_type" of PETSc and fixed steps.

    Returns
    -------
    NetworkArrays or StageArrays
        The first for Euler's method, and for no other.

    Raises
    ------
    ValueError
        If the network is a gradient flow, which has B^T in front of sigma, has another scheme, or adapts its steps.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, Layers, laplace_basis
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> net = ResidualNetwork(laplace_basis(Y, 6), layers=Layers(2, steps=2), solver_parameters={"ts_rk_type": "1fe"})
    >>> a, B, tau = to_network(net)
    >>> B.shape == (4, Y.size, Y.size), tau.tolist()
    (True, [0.25, 0.25, 0.25, 0.25])
    >>> heun = to_network(net.replace(solver_parameters={"ts_rk_type": "2a"}))
    >>> heun.B.shape == (4, 2, Y.size, Y.size), heun.skips.tolist(), heun.weights.tolist()
    (True, [[0.0, 0.0], [1.0, 0.0]], [0.5, 0.5])
    """
    skips, weights, nodes = net.explicit_tableau()
    a, B, tau = [], [], []
    for layer in net.layer_inputs():
        factors = layer.factors
        phi, psi = (_on_all_ranks(net.Y, values) for values in (factors.phi.values, factors.psi.weighted))
        for step in range(net.steps):
            for s in (step + nodes) / net.steps:
                a.append(_on_all_ranks(net.Y, layer.bias.coefficients(s)[:, None])[:, 0])
                B.append(phi @ layer.beta.coefficients(s) @ psi.T)
            tau.append(layer.length / net.steps)
    N, stages = net.Y.size, len(weights)
    if stages == 1:
        return NetworkArrays(np.reshape(a, (-1, N)), np.reshape(B, (-1, N, N)), np.array(tau))
    return StageArrays(np.reshape(a, (-1, stages, N)), np.reshape(B, (-1, stages, N, N)), np.array(tau), skips, weights)


def refuse_other_schemes(parameters: dict) -> None:
    """Raise ValueError unless these PETSc options are those of Euler's method, so that a network is one of (2.1)."""
    kind, method = parameters["ts_type"], parameters.get("ts_rk_type")
    if kind not in ("rk", "euler") or (kind == "rk" and method != "1fe"):
        name = f"'rk' with 'ts_rk_type' {method!r}" if kind == "rk" else repr(kind)
        raise ValueError(
            f"net: expected Euler's method, got {name}. In z + tau sigma(a - B z) one sigma is taken of the state at the "
            f"start of the layer; other explicit schemes nest several sigma, and implicit ones solve an equation. Make the "
            f"network with {{'ts_rk_type': '1fe'}}, and with more 'steps' for the same accuracy"
        )
