"""Starting values of kernels: formulas between coefficients.

    minus the identity      B f = -gain P_phi P_psi f,          P the orthogonal projections onto the spans of phi and psi
    local                   B f = -gain P_phi e^(t Laplace) P_psi f,      t = width^2 / (largest eigenvalue of psi)
    random and smooth       b = gain sum_ij xi_ij / (i j) phi_i psi_j / sqrt(sum_ij 1 / (i j)^2)

in orthonormal functions phi_i, psi_j of the spans, xi_ij independent and normal with variance 1; with channels i and j are
numbers within a channel. So the random b has the norm
gain in L2(Y x Y) in the mean square. A heat kernel e^(t Laplace) of width 2 takes off e^-4 of the last function of psi: its
standard deviation is 2.8 lengths 1 / sqrt(largest eigenvalue), which is two or three nodes where the nodes are just as many
as psi needs.

With C > 1 channels the local kernel couples all of them, as data may come in one: with xi_cd independent and normal,

    (B f)_c = -gain sum_d xi_cd / sqrt(C) P_phi e^(t Laplace) P_psi f_d,

which keeps the mean square of what is smooth. A linear set of kernels takes its nearest one. Between channels on which a map
acts with different signs that is 0, since a heat kernel does not change under the map, and data in a channel would never
come into the other. So there b is the nearest kernel of the set to q(y, z) h(y, z), h the heat kernel and q smooth, made as
large as h. On a circle q = sin(y - z), and B is a derivative of what the heat kernel makes of f.
"""

from __future__ import annotations

import numpy as np

from fem_resnet.label_domain.basis import Basis
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.parameters.linear_kernels import LinearKernels

__all__ = ["local_couplings", "mixed", "projected_kernel", "random_kernel", "random_kernel_of"]

#: Couplings below this part of a heat kernel are round-off.
_ROUND_OFF = 1e-6


def projected_kernel(kernel: LowRankKernel, D: np.ndarray | None = None) -> np.ndarray:
    """beta of `P_phi D P_psi`, shape (rank of phi, rank of psi). Collective.

    Parameters
    ----------
    kernel
        The factors; the domains of both are the same.
    D
        A map of the functions of psi, as a matrix of shape (rank of psi,) * 2; the identity if left out.
    """
    D = np.eye(kernel.psi.rank) if D is None else D
    # It is to be Phi beta Psi^T M, and P_psi = Psi G_psi^-1 Psi^T M.
    return kernel.riesz(kernel.phi.project(kernel.psi.expand(D)))


def local_couplings(psi: Basis, width: float, among: LinearKernels | None) -> np.ndarray:
    """The local map from each channel to each other one, on the functions of psi, shape (rank of psi,) * 2. Collective.

    Parameters
    ----------
    psi
        The functions.
    width
        That of the heat kernel.
    among
        The linear set of kernels that they are to be of; None for all kernels.

    Raises
    ------
    ValueError
        If psi has no eigenvalues.
    """
    if psi.eigenvalues is None:
        raise ValueError(f"rule: 'local' expects a kernel whose psi has eigenvalues, as laplace_basis has, got {psi!r}")
    one, channels = psi.one, psi.rank // psi.one.rank
    eigenvalues = np.maximum(one.eigenvalues, 0.0)
    heat = np.diag(np.exp(-(width**2) * eigenvalues / (eigenvalues.max() or 1.0)))
    found = np.kron(np.ones((channels, channels)), heat)
    if among is None:
        return found
    found, size = among.projected(found), np.linalg.norm(heat)
    missing = _sizes(found, channels) < _ROUND_OFF * size
    if missing.any():
        others = among.projected(np.kron(missing, _modulated(one, heat)))
        sizes = _sizes(others, channels)
        factors = np.divide(size, sizes, out=np.zeros_like(sizes), where=sizes > _ROUND_OFF * size)
        found += others * np.kron(factors, np.ones(heat.shape))
    return found


def _modulated(one: Basis, heat: np.ndarray) -> np.ndarray:
    """The map of the kernel `h(y, z) sum_ij xi_ij p_i(y) p_j(z)`, shape (rank,) * 2, xi_ij fixed, of size one.

    The p_i are the functions of the first two eigenspaces. Collective.
    """
    smooth = np.flatnonzero(_eigenspace_numbers(one.eigenvalues) <= 1)
    products = [one.project(one.values * one.values[:, [i]]) for i in smooth]
    xi = np.random.default_rng(0).normal(size=(smooth.size,) * 2)
    return sum(x * (P @ heat @ Q) for row, P in zip(xi, products) for x, Q in zip(row, products))


def _sizes(matrix: np.ndarray, channels: int) -> np.ndarray:
    """The norm of the block of each pair of channels, shape (channels, channels)."""
    rank = len(matrix) // channels
    return np.linalg.norm(matrix.reshape(channels, rank, channels, rank), axis=(1, 3))


def mixed(couplings: np.ndarray, channels: int, random: np.random.Generator) -> np.ndarray:
    """Couplings between channels, each times a random number xi_cd / sqrt(C); with one channel as they are.

    Parameters
    ----------
    couplings
        From `local_couplings`.
    channels
        C.
    random
        The random numbers.
    """
    if channels == 1:
        return couplings
    xi = random.normal(size=(channels, channels)) / np.sqrt(channels)
    return couplings * np.kron(xi, np.ones((len(couplings) // channels,) * 2))


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
    numbers = np.tile(np.maximum(_eigenspace_numbers(eigenvalues), 1.0), among.rank // eigenvalues.size)
    decay = np.sqrt(among.mean_of(np.outer(1 / numbers, 1 / numbers)))
    controls = among.adjoint(None, None, random.normal(size=(among.rank,) * 2))
    return among.value(None, decay / np.linalg.norm(decay) * controls)


def _eigenspace_numbers(eigenvalues: np.ndarray) -> np.ndarray:
    """The number from 0 of the eigenspace of each function, from ascending eigenvalues, shape (functions,)."""
    return np.append(0, np.cumsum(np.diff(eigenvalues) > 1e-3 * np.abs(eigenvalues[1:])))


def _numbers(basis: Basis) -> np.ndarray:
    """The number of each function from 1, within its channel, shape (rank,)."""
    return np.tile(np.arange(1.0, basis.one.rank + 1), basis.rank // basis.one.rank)
