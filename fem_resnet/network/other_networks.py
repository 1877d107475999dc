"""Networks that are made of a network: on another mesh, and with kernels of lower rank.

`ResidualNetwork` has them as methods, which check the arguments.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np

from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace

__all__ = ["copy_coefficients", "moved", "truncated"]


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
