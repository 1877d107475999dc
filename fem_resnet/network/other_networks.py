"""Networks that are made of a network: on another mesh, in the first functions of its bases, with kernels of lower rank.

`ResidualNetwork` has them as methods, which check the arguments.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np

from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.parameters.padding import begin_with, copy_leading, pad
from fem_resnet.parameters.parameter import Parameter

__all__ = ["copy_coefficients", "in_first", "moved", "padded", "truncated"]


def copy_coefficients(net, to) -> None:
    """Copy all coefficients to a network whose parameters are of the same kinds. Collective."""
    for ours, theirs in zip(net.parameters, to.parameters, strict=True):
        for k in range(len(ours.functions)):
            theirs.set(k, ours.get(k))


def moved(net, Y: LabelSpace):
    """The network with its bases on another label space, and the same coefficients: see `ResidualNetwork.on`."""
    settings = net.settings
    on_Y = {basis: basis.on(Y) for basis in dict.fromkeys(chain(settings.phi, settings.psi, settings.bias_bases))}
    phi, psi, bias = ([on_Y[basis] for basis in bases] for bases in (settings.phi, settings.psi, settings.bias_bases))
    other = net.replace(kernel=replace(settings.kernel, phi=phi, psi=psi), bias=replace(settings.bias, basis=bias))
    copy_coefficients(net, other)
    return other


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
