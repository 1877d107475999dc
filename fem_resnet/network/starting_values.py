"""Starting values of a network's bias and kernel, by rules: see `ResidualNetwork.start`, which checks the arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import firedrake as fd
import numpy as np

from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.parameters.kernel import LowRankKernel, kernel_coefficients
from fem_resnet.parameters.kernel_sets import KernelSet
from fem_resnet.parameters.linear_kernels import LinearKernels
from fem_resnet.parameters.starting_values import (
    local_couplings,
    mixed,
    projected_kernel,
    random_kernel,
    random_kernel_of,
)

__all__ = ["RULES", "root_mean_square", "start"]

#: The names of the rules.
RULES = ("zero", "minus identity", "random smooth", "local")


def start(net, rule: str, seed: int, gain: float, width: float) -> None:
    """Give bias and kernel of a network the starting values of a rule: see `ResidualNetwork.start`. Collective."""
    random = np.random.default_rng(seed)
    learned = net.learned_factors() if net.factors else None
    kernels = [learned or kernel_coefficients(basis).kernel for basis in net.kernel.space_bases]
    make = _maker(rule, random, width, net.settings.kernel.among)
    betas = [gain * make(kernel) for kernel in kernels]
    _assign_kernel(net, betas, rule)
    for k, basis in enumerate(net.bias.space_bases):
        net.bias.write(k, np.zeros(basis.shape))


def root_mean_square(Y: LabelSpace, data: fd.Function) -> float:
    """The root mean square of a batch over Y and all samples. Collective.

    Raises
    ------
    TypeError, ValueError
        If `data` is no batch on Y with finite values, or 0.
    """
    Y.check_batch(data, "data")
    size = float(np.sqrt(Y.sum(Y.weights @ Y.values(data) ** 2).mean() / Y.measure))
    if not size > 0:
        raise ValueError("data: expected inputs that are not all 0, got such; leave data out")
    return size


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
    if rule == "minus identity":
        return cache(lambda kernel: -projected_kernel(kernel))  # layers share factors, and making one communicates
    linear = among if isinstance(among, LinearKernels) else None
    couplings = cache(lambda psi: local_couplings(psi, width, linear))

    def local(kernel: LowRankKernel) -> np.ndarray:
        D = mixed(couplings(kernel.psi), kernel.psi.rank // kernel.psi.one.rank, random)
        return -(projected_kernel(kernel, D) if linear is None else D)

    return local


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
