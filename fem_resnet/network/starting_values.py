"""Starting values of a network's bias and kernel, by rules: see `ResidualNetwork.start`, which checks the arguments."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fem_resnet.parameters.kernel import LowRankKernel, kernel_coefficients
from fem_resnet.parameters.kernel_sets import KernelSet
from fem_resnet.parameters.linear_kernels import LinearKernels
from fem_resnet.parameters.space_basis import BasisCoefficients, SpaceBasis
from fem_resnet.parameters.starting_values import (
    diagonal_kernel,
    heat_factors,
    random_bias,
    random_kernel,
    random_kernel_of,
)

__all__ = ["RULES", "start"]

#: The names of the rules.
RULES = ("zero", "minus identity", "random smooth", "local")


def start(net, rule: str, seed: int, gain: float, width: float) -> None:
    """Give bias and kernel of a network the starting values of a rule: see `ResidualNetwork.start`. Collective."""
    random = np.random.default_rng(seed)
    learned = net.learned_factors() if net.factors else None
    kernels = [learned or kernel_coefficients(basis).kernel for basis in net.kernel.space_bases]
    make = _maker(rule, random, width, net.settings.kernel.among)
    betas = [gain * make(kernel) for kernel in kernels]
    phi = net.bases["phi"][0] if learned is None else learned.phi
    if rule == "random smooth":
        biases = [gain * _bias(basis, BasisCoefficients(phi), random) for basis in net.bias.space_bases]
    else:
        biases = [np.zeros(basis.shape) for basis in net.bias.space_bases]
    _assign_kernel(net, betas, rule)
    for k, a in enumerate(biases):
        net.bias.write(k, a)


def _maker(
    rule: str, random: np.random.Generator, width: float, among: KernelSet | None
) -> Callable[[LowRankKernel], np.ndarray]:
    """The function from the factors of a kernel to beta over the gain."""
    if rule == "zero":
        return lambda kernel: np.zeros(kernel.shape)
    if rule == "random smooth":
        if isinstance(among, LinearKernels):
            return lambda kernel: random_kernel_of(among, kernel.phi.one.eigenvalues, random)
        return lambda kernel: random_kernel(kernel, random)
    made: dict[LowRankKernel, np.ndarray] = {}  # layers share factors, and making one communicates

    def make(kernel: LowRankKernel) -> np.ndarray:
        if kernel not in made:
            made[kernel] = -diagonal_kernel(kernel, heat_factors(kernel, width) if rule == "local" else None)
        return made[kernel]

    return make


def _bias(basis: SpaceBasis, of_phi: BasisCoefficients, random: np.random.Generator) -> np.ndarray:
    if isinstance(basis, BasisCoefficients):
        return random_bias(basis, random)
    return of_phi.expand(random_bias(of_phi, random))


def _assign_kernel(net, betas: list[np.ndarray], rule: str) -> None:
    """All of them, or none where a set of kernels does not have one."""
    before = [net.kernel.learned.read(k) for k in range(len(betas))]
    try:
        for k, beta in enumerate(betas):
            net.kernel.write(k, beta)
    except ValueError as error:
        for k, coefficients in enumerate(before):
            net.kernel.learned.write(k, coefficients)
        among = type(net.settings.kernel.among).__name__
        raise ValueError(
            f"rule: expected one whose kernels are in the set {among}, got {rule!r} ({error}); take another rule or gain"
        ) from error
