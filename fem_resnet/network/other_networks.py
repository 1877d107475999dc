"""Networks made of a network: on another mesh or domain, in the first functions of its bases, with kernels of lower rank.

`ResidualNetwork` has them as methods, which check the arguments.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np
from mpi4py import MPI

from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.laplace import laplace_up_to
from fem_resnet.label_domain.other_domains import difference
from fem_resnet.parameters.linear_kernels import LaplaceFunctions
from fem_resnet.parameters.padding import begin_with, copy_leading, pad
from fem_resnet.parameters.parameter import Parameter

__all__ = ["copy_coefficients", "in_first", "moved", "padded", "truncated"]

#: A bias that differs from a constant by less than this part is constant but for the eigensolver's tolerance.
_CONSTANT = 1e-6


def copy_coefficients(net, to) -> None:
    """Copy all coefficients to a network whose parameters are of the same kinds. Collective."""
    for ours, theirs in zip(net.parameters, to.parameters, strict=True):
        for k in range(len(ours.functions)):
            theirs.set(k, ours.get(k))


def moved(net, Y: LabelSpace):
    """The network with its bases on another label space, and the same coefficients: see `ResidualNetwork.on`.

    On another label domain k(-Laplace) becomes the same function of that domain's Laplacian.
    """
    settings = net.settings
    if isinstance(settings.kernel.among, LaplaceFunctions) and _is_other_domain(net.Y, Y):
        return _on_other_domain(net, Y)
    on_Y = {basis: basis.on(Y) for basis in dict.fromkeys(chain(settings.phi, settings.psi, settings.bias_bases))}
    phi, psi, bias = ([on_Y[basis] for basis in bases] for bases in (settings.phi, settings.psi, settings.bias_bases))
    other = net.replace(kernel=replace(settings.kernel, phi=phi, psi=psi), bias=replace(settings.bias, basis=bias))
    copy_coefficients(net, other)
    return other


def _is_other_domain(Y: LabelSpace, other: LabelSpace) -> bool:
    if (Y.graph is None) != (other.graph is None) or Y.channels != other.channels:
        return False  # the bases say what is wrong
    return Y is not other if Y.graph is not None else difference(Y, other) is not None


def _on_other_domain(net, Y: LabelSpace):
    """The network of the same functions of the Laplacian, up to the largest eigenvalue that they know."""
    kernel, bias = net.settings.kernel, net.settings.bias
    phi = laplace_up_to(Y, float(kernel.among.eigenvalues[-1]), max(basis.one.rank for basis in kernel.phi))
    among = LaplaceFunctions(phi)
    bases = {basis: phi if basis.kind == "laplace" else basis.on(Y) for basis in dict.fromkeys(bias.basis)}
    on_Y = [phi] * len(kernel.phi)
    other = net.replace(
        kernel=replace(kernel, phi=on_Y, psi=on_Y, among=among),
        bias=replace(bias, basis=[bases[basis] for basis in bias.basis]),
    )
    for k in range(len(net.kernel.functions)):
        other.kernel.set(k, among.kernel(kernel.among.multipliers(net.kernel.get(k), among.eigenvalues)))
    for k, (ours, theirs) in enumerate(zip(net.bias.space_bases, other.bias.space_bases)):
        a = net.bias.get(k)
        other.bias.set(k, _same_constants(ours.basis, a, phi) if theirs.basis is phi else a)
    if net.layer_times is not None:
        other.layer_times.set(0, net.layer_times.get(0))
    return other


def _same_constants(basis: Basis, a: np.ndarray, phi: Basis) -> np.ndarray:
    """The coefficients of a bias on another label domain where it has the same constant in each channel. Collective."""
    Y, channels = basis.Y, basis.Y.channels
    values = basis.expand(a).reshape(channels, -1)
    constants = Y.sum(values @ Y.one.weights) / Y.one.measure
    off, size = (Y.comm.allreduce(float(np.abs(x).max(initial=0.0)), op=MPI.MAX) for x in (values.T - constants, values))
    if off > _CONSTANT * size:
        raise ValueError(
            f"on: expected a bias that is constant in each channel to go to another domain, got one that differs by {off:.2g} "
            f"from its mean; Bias(given_basis(Y, [1.0])) is constant"
        )
    return phi.project(np.repeat(constants, phi.Y.one.nodes)[:, None])[:, 0]


def in_first(net, rank: int):
    """The network in the first functions of its bases: see `ResidualNetwork.in_first`."""
    settings = net.settings
    phi, psi, bias = (
        [None if basis is None else basis.first(rank) for basis in bases]
        for bases in (settings.phi, settings.psi, settings.bias_bases)
    )
    kernel = replace(settings.kernel, phi=phi, psi=psi)
    if kernel.among is not None and kernel != settings.kernel:
        kernel = replace(kernel, among=kernel.among.first(min(basis.one.rank for basis in phi)))
    other = net.replace(kernel=kernel, bias=replace(settings.bias, basis=bias))
    copy_leading(_in_bases(net), _in_bases(other))
    return other


def padded(net, other) -> None:
    """Give a network the coefficients of one in the first functions of its bases: see `ResidualNetwork.pad`."""
    bases, fewer = (chain(*each.bases.values()) for each in (net, other))
    if net.factors or _kinds(net) != _kinds(other) or not begin_with(bases, fewer):
        raise ValueError(f"net: expected a network that in_first(..) of {net!r} has made, got {other!r}")
    pad(_in_bases(net), _in_bases(other))


def _kinds(net) -> tuple:
    """What networks have in common whose parameters differ in the ranks of their bases alone."""
    kernel, bias, layers = net.settings.kernel, net.settings.bias, net.settings.layers
    numbers = [len(bases) for bases in net.bases.values()]
    return numbers, kernel.in_time, kernel.learn_factors, bias.in_time, layers.times, layers.learn_times


def _in_bases(net) -> list[Parameter]:
    """What is learned, but beta in place of the controls of which it is made."""
    return [net.bias, net.kernel, *([] if net.layer_times is None else [net.layer_times])]


def truncated(net, tolerance: float):
    """The network with the singular functions of all its kernels together: see `ResidualNetwork.truncated`.

    With R^T R the Gram matrix of a basis and tau the measures in time, the left singular functions of all kernels are the left
    singular vectors of the matrices sqrt(tau_k) R_phi beta_k R_psi^T side by side, and the right ones those of the matrices
    below each other.
    """
    factors, kernel = net.learned_factors(), net.kernel
    measures, R = kernel.time_basis.measures, (factors.phi.root, factors.psi.root)
    betas = [R[0] @ kernel.get(k) @ R[1].T for k in range(len(measures))]
    weighted = [np.sqrt(tau) * beta for tau, beta in zip(measures, betas)]
    bases, turns = [], []
    for basis, root, stacked in zip((factors.phi, factors.psi), R, (np.hstack(weighted), np.vstack(weighted).T)):
        U, sizes, _ = np.linalg.svd(stacked, full_matrices=False)
        turns.append(U[:, : max(1, np.count_nonzero(sizes > tolerance * sizes[0]))])
        bases.append(Basis(net.Y, basis.values @ np.linalg.solve(root, turns[-1]), "given"))
    other = net.replace(kernel=replace(net.settings.kernel, phi=bases[0], psi=bases[1], among=None))
    for ours, theirs in zip(net.parameters, other.parameters):
        for k in range(len(ours.functions)):
            if ours is kernel.learned:
                theirs.set(k, turns[0].T @ betas[k] @ turns[1])
            elif ours not in net.factors:
                theirs.set(k, ours.get(k))
    return other
