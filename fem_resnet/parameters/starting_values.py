"""Starting values of kernels and biases: formulas between coefficients.

    minus the identity      B f = -gain P_phi P_psi f,          P the orthogonal projections onto the spans of phi and psi
    local                   B f = -gain P_phi e^(t Laplace) P_psi f,      t = width^2 / (largest eigenvalue of psi)
    random and smooth       b = gain sum_ij xi_ij / (i j) phi_i psi_j / sqrt(sum_ij 1 / (i j)^2)

in orthonormal functions phi_i, psi_j of the spans, xi_ij independent and normal with variance 1; with channels i and j are
numbers within a channel. So the random b has the norm
gain in L2(Y x Y) in the mean square. A heat kernel e^(t Laplace) of width 2 takes off e^-4 of the last function of psi: its
standard deviation is 2.8 lengths 1 / sqrt(largest eigenvalue), which is two or three nodes where the nodes are just as many
as psi needs.
"""

from __future__ import annotations

import numpy as np

from fem_resnet.label_domain.basis import Basis
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.parameters.linear_kernels import LinearKernels
from fem_resnet.parameters.space_basis import BasisCoefficients

__all__ = ["diagonal_kernel", "heat_factors", "random_bias", "random_kernel", "random_kernel_of"]


def heat_factors(kernel: LowRankKernel, width: float) -> np.ndarray:
    """`e^(-t lambda_j)` of the functions of psi, shape (rank of psi,).

    Raises
    ------
    ValueError
        If psi has no eigenvalues.
    """
    eigenvalues = kernel.psi.eigenvalues
    if eigenvalues is None:
        raise ValueError(f"rule: 'local' expects a kernel whose psi has eigenvalues, as laplace_basis has, got {kernel.psi!r}")
    largest = eigenvalues.max()
    return np.exp(-(width**2) * np.maximum(eigenvalues, 0.0) / largest) if largest > 0 else np.ones_like(eigenvalues)


def diagonal_kernel(kernel: LowRankKernel, factors: np.ndarray | None = None) -> np.ndarray:
    """beta of `P_phi D P_psi`, shape (rank of phi, rank of psi). Collective.

    Parameters
    ----------
    kernel
        The factors; the domains of both are the same.
    factors
        D multiplies the functions of psi by these, shape (rank of psi,); the identity if left out.
    """
    values = kernel.psi.values if factors is None else kernel.psi.values * factors
    # It is to be Phi beta Psi^T M, and P_psi = Psi G_psi^-1 Psi^T M.
    return kernel.riesz(kernel.phi.project(values))


def random_kernel(kernel: LowRankKernel, random: np.random.Generator, smooth_in_y: bool = True) -> np.ndarray:
    """beta of a random, smooth kernel whose norm is 1 in the mean square, shape (rank of phi, rank of psi).

    Parameters
    ----------
    kernel
        The factors.
    random
        The random numbers.
    smooth_in_y
        Whether coefficients fall with the number of the function of phi too.
    """
    in_y, in_z = (1 / _numbers(basis) for basis in (kernel.phi, kernel.psi))
    decay = np.outer(in_y if smooth_in_y else np.ones_like(in_y), in_z)
    return kernel.from_orthonormal(decay / np.linalg.norm(decay) * random.normal(size=decay.shape))


def random_kernel_of(among: LinearKernels, eigenvalues: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """beta of a random, smooth kernel of a linear set whose norm is 1 in the mean square, shape (rank, rank).

    `beta = sum_k d_k <E_k, xi> E_k` with the orthonormal elements E_k of the set. So it does not depend on how the E_k were
    chosen, where d_k does not: d_k^2 is the mean of 1 / (m n), m and n the numbers from 0 of the eigenspaces that E_k
    couples, at least 1.

    Parameters
    ----------
    among
        The set.
    eigenvalues
        Those of the functions in one channel, ascending, shape (functions,).
    random
        The random numbers.
    """
    rises = np.diff(eigenvalues) > 1e-3 * np.abs(eigenvalues[1:])
    numbers = np.tile(np.maximum(np.cumsum(np.append(False, rises)), 1.0), among.rank // eigenvalues.size)
    decay = np.sqrt(among.mean_of(np.outer(1 / numbers, 1 / numbers)))
    controls = among.adjoint(None, None, random.normal(size=(among.rank,) * 2))
    return among.value(None, decay / np.linalg.norm(decay) * controls)


def random_bias(basis: BasisCoefficients, random: np.random.Generator) -> np.ndarray:
    """Coefficients of a random, smooth function whose mean square over Y is 1 in the mean, shape (rank,)."""
    decay = 1 / _numbers(basis.basis)
    return basis.from_coordinates(decay / np.linalg.norm(decay) * random.normal(size=decay.shape))


def _numbers(basis: Basis) -> np.ndarray:
    """The number of each function from 1, within its channel, shape (rank,)."""
    return np.tile(np.arange(1.0, basis.one.rank + 1), basis.rank // basis.one.rank)
