"""Residual blocks of two matrices, and a read-out, as a network (2.1) with more neurons.

A block of a network as PyTorch has them is

    z_(l+1) = z_l + tau ( C_l sigma(a_l - B_l z_l) + c_l ),

where sigma is not the last map, as it is in (2.1). Let sigma(0) = 0 and sigma(x) - sigma(-x) = kappa x, as it is for relu,
leaky relu and swish. A linear map is then a difference of two sigmas. So with z = (p - q) / kappa, and neurons v_l of its own
for each block, which are zero before it, two layers of (2.1) are the block, up to round-off:

    v_l <- v_l + sigma(a_l - B_l z),      then      p <- p + sigma(x),   q <- q + sigma(-x),      x = tau (C_l v_l + c_l).

No other neuron moves meanwhile, as sigma(0) = 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import firedrake as fd
import numpy as np
from mpi4py import MPI
from numpy.typing import ArrayLike

from fem_resnet.activation.activation import Activation, get_activation
from fem_resnet.arguments import instance, number, real_array
from fem_resnet.label_domain.points import point_space
from fem_resnet.learning.head import Head
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.ranks import same
from fem_resnet.theory.limits.residual_network import from_network

__all__ = ["from_blocks"]

#: Where sigma(x) - sigma(-x) is looked at.
_PLACES = np.array([1e-3, 0.1, 0.5, 1.0, 2.0, 7.0, 30.0])


def from_blocks(
    blocks: Sequence[Sequence[ArrayLike]],
    z_0: ArrayLike,
    readout: Sequence[ArrayLike] | None = None,
    *,
    tau: float = 1.0,
    activation: str | Activation = "relu",
    prediction: str = "identity",
    comm: MPI.Comm = MPI.COMM_WORLD,
) -> tuple[ResidualNetwork, fd.Function, Head]:
    """A network of residual blocks z + tau (C sigma(a - B z) + c) as one on a label domain; equal to round-off.

    A block of PyTorch that computes ``z + tau * second(sigma(first(z)))`` has ``a = first.bias``, ``B = -first.weight``,
    ``C = second.weight`` and ``c = second.bias``; a read-out ``last(z)`` has ``last.weight`` and ``last.bias``; all of them
    detached. Batches are transposed, ``z_0 = batch.T``. A block of one matrix, z + tau sigma(a - B z), is a layer of
    `from_network`. Layers that normalise, drop or convolve are none of these: fold a normalisation that is no longer
    trained into the matrix behind it.

    All ranks give the same arrays. Collective over `comm`.

    Parameters
    ----------
    blocks
        (a, B, C, c) of each of L blocks: shapes (m,), (m, n), (n, m), (n,). m may differ from block to block.
    z_0
        Initial states, shape (n,) or (n, samples).
    readout
        (W, mu) of the scores W z + mu, shapes (K, n) and (K,). If left out, the scores are z.
    tau
        The factor of each block, > 0.
    activation
        sigma, with sigma(0) = 0 and sigma(x) - sigma(-x) in proportion to x.
    prediction
        Of the head: "identity", "softmax" or "logistic".
    comm
        The communicator of the label domain.

    Returns
    -------
    net : ResidualNetwork
        On a label domain of 2 n + m_1 + .. + m_L points of measure one, with 2 L layers. All of its matrices are dense.
    initial : Function
        f_I, a batch.
    head : Head
        ``head.scores(net(initial))`` are the scores, shape (samples, K).

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described above; the message names it.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> a, B, C, c = (rng.normal(size=shape) for shape in ((4,), (4, 3), (3, 4), (3,)))
    >>> z = rng.normal(size=(3, 2))
    >>> net, initial, head = from_blocks([(a, B, C, c)], z)
    >>> block = z + C @ np.maximum(a[:, None] - B @ z, 0) + c[:, None]
    >>> bool(abs(head.scores(net(initial)) - block.T).max() < 1e-14)
    True
    """
    instance("comm", comm, MPI.Comm)
    same(comm, blocks=blocks, z_0=z_0, readout=readout, tau=tau, activation=activation, prediction=prediction)
    sigma, tau = get_activation(activation), number("tau", tau, above=0)
    kappa = _kappa(sigma)
    z = real_array("z_0", z_0)
    if z.ndim not in (1, 2) or not z.size:
        raise ValueError(f"z_0: expected shape (n,) or (n, samples), got {z.shape}")
    n = len(z)
    checked = [_block(l, block, n) for l, block in enumerate(instance("blocks", blocks, (list, tuple), "[(a, B, C, c), ..]"))]
    if not checked:
        raise ValueError("blocks: expected one or more, got none; a network without blocks is its read-out alone")
    N = 2 * n + sum(len(a) for a, *_ in checked)
    difference = np.hstack([np.eye(n), -np.eye(n), np.zeros((n, N - 2 * n))]) / kappa  # z = difference f
    biases, matrices = np.zeros((2 * len(checked), N)), np.zeros((2 * len(checked), N, N))
    end = 2 * n
    for l, (a, B, C, c) in enumerate(checked):
        own = slice(end, end := end + len(a))
        biases[2 * l, own], matrices[2 * l, own] = a, B @ difference
        for sign, moved in ((1.0, slice(0, n)), (-1.0, slice(n, 2 * n))):
            biases[2 * l + 1, moved], matrices[2 * l + 1, moved, own] = sign * tau * c, -sign * tau * C
    f_I = np.concatenate([kappa * z, np.zeros((N - n, *z.shape[1:]))])
    Y = point_space(np.ones(N), comm=comm)
    net, initial = from_network(biases, matrices, f_I, Y, activation=sigma)
    W, mu = (np.eye(n), np.zeros(n)) if readout is None else _readout(readout, n)
    head = Head(net.bases["psi"][0], len(W), prediction)
    head.W.set(0, W @ difference)
    head.parameters[1].set(0, mu)
    return net, initial, head


def _kappa(sigma: Activation) -> float:
    """The factor of x in sigma(x) - sigma(-x)."""
    values = [np.asarray(sigma(sign * _PLACES)) for sign in (1.0, -1.0)]
    factors = (values[0] - values[1]) / _PLACES
    if abs(np.asarray(sigma(np.zeros(1)))).max() > 0 or np.ptp(factors) > 1e-12 * abs(factors).max() or not factors.all():
        raise ValueError(
            f"activation: expected one with sigma(0) = 0 and sigma(x) - sigma(-x) in proportion to x, as relu, leaky_relu and "
            f"s / (1 + exp(-s)) have, got {sigma.name!r}; no layer of (2.1) is linear with another one; for blocks of one "
            "matrix from_network takes any"
        )
    return float(factors.mean())


def _block(l: int, block: Sequence[ArrayLike], n: int) -> list[np.ndarray]:
    """The arrays of a block, each of its shape."""
    if len(instance("blocks", block, (list, tuple), "each is (a, B, C, c)")) != 4:
        raise ValueError(f"blocks: expected (a, B, C, c) in each, got {len(block)} arrays in block {l}")
    arrays = [real_array("blocks", array) for array in block]
    m = len(arrays[0]) if arrays[0].ndim else 0
    for name, array, shape in zip("aBCc", arrays, ((m,), (m, n), (n, m), (n,))):
        if array.shape != shape or not m:
            raise ValueError(f"blocks: expected {name} of shape {shape} in block {l}, with z_0 of {n} rows, got {array.shape}")
    return arrays


def _readout(readout: Sequence[ArrayLike], n: int) -> tuple[np.ndarray, np.ndarray]:
    if len(instance("readout", readout, (list, tuple), "(W, mu)")) != 2:
        raise ValueError(f"readout: expected (W, mu), got {len(readout)} arrays")
    W, mu = (real_array("readout", array) for array in readout)
    if W.ndim != 2 or W.shape[1] != n or mu.shape != W.shape[:1] or not len(W):
        raise ValueError(f"readout: expected W of shape (K, {n}) and mu of shape (K,), got {W.shape} and {mu.shape}")
    return W, mu
