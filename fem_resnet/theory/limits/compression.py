"""A kernel of low rank in place of a full one: what `compress` returns, and the truncation that all its ways end with.

The best approximation of b of rank r, in L2(Y x Z) and as an operator from L2(Z) to L2(Y), is the truncated singular value
decomposition in the label measures M and N (Eckart and Young, Mirsky),

    M^(1/2) b N^(1/2) = U S V^T,     b_r = Phi S_r Psi^T,     Phi = M^(-1/2) U_r,     Psi = N^(-1/2) V_r,

    norm(b - b_r)^2 = sum_(k > r) s_k^2  (Hilbert-Schmidt),          norm(B - B_r) = s_(r+1)  (operator).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.orthonormal import orthonormal_factors
from fem_resnet.parameters.kernel import LowRankKernel

__all__ = ["Compression", "KernelError", "compress_factors", "decompose", "least_rank", "low_rank_kernel", "norms_of_rest"]

#: Neighbours that differ by less than this part of their value count as one repeated singular value, whose vectors are
#: determined by chance alone.
CLUSTER_TOLERANCE = 1e-6


@dataclass(frozen=True)
class KernelError:
    """How far an approximation is from its kernel, in one norm.

    Attributes
    ----------
    value : float
        The error, in the unit of the norm of b. Where the error is sampled: an upper limit of it, which holds with the
        confidence of the `Compression`.
    optimal : float or None
        The least error of any kernel of that rank; None where it cannot be computed.
    """

    value: float
    optimal: float | None = None


@dataclass(frozen=True)
class Compression:
    """A kernel b_r of low rank for a full kernel b. Get one from `compress`.

    Attributes
    ----------
    kernel : LowRankKernel
        phi and psi, orthonormal in the label measures.
    singular_values : numpy.ndarray
        s_k, falling, shape (rank,).
    method : str
        "svd" of all values, "factors" or "cross".
    norm : float
        The norm of b in L2(Y x Z); for "cross" the norm of b_r.
    hilbert_schmidt, operator : KernelError
        The errors in L2(Y x Z) and of the operator from L2(Z) to L2(Y), not divided by the norm of b. For "cross" the
        first is also given as the bound of the second.
    confidence : float or None
        The probability with which the errors hold; None where they are not sampled.
    exceeded : tuple of float or None
        For sampled errors (size, part): abs(b - b_r) is above `size` on at most this part of the measure of Y x Z, with
        the same confidence and for any distribution of the residuals. (The errors suppose that means are normally
        distributed.)
    evaluations : int
        How often b was evaluated, on all ranks together.
    """

    kernel: LowRankKernel
    singular_values: np.ndarray
    method: str
    norm: float
    hilbert_schmidt: KernelError
    operator: KernelError
    confidence: float | None
    exceeded: tuple[float, float] | None
    evaluations: int

    @property
    def rank(self) -> int:
        """The rank r of b_r."""
        return self.singular_values.size

    @property
    def beta(self) -> np.ndarray:
        """The coefficients of b_r in `kernel`: diag(s), shape (rank, rank)."""
        return np.diag(self.singular_values)

    def __str__(self) -> str:
        lines = [f"rank {self.rank} by {self.method}, {self.evaluations} evaluations; norm {self.norm:.6g}"]
        for name, error in (("Hilbert-Schmidt", self.hilbert_schmidt), ("operator", self.operator)):
            known = f", least possible {error.optimal:.3e}" if error.optimal is not None else ""
            sure = f" at most, confidence {self.confidence:g}" if self.confidence is not None else ""
            lines.append(f"  error, {name + ' norm':20s} {error.value:.3e}{sure}{known}")
        return "\n".join(lines)


def low_rank_kernel(spaces: Sequence[LabelSpace], factors: Sequence[np.ndarray]) -> LowRankKernel:
    """The kernel with these values of phi and psi at the owned nodes, shape (nodes, rank) each. Collective."""
    phi, psi = (Basis(Y, values, "given") for Y, values in zip(spaces, factors, strict=True))
    return LowRankKernel(phi, psi)


def norms_of_rest(s: np.ndarray, beyond: float = 0.0) -> np.ndarray:
    """Hilbert-Schmidt norms of the rest after rank 0, 1, .., n, shape (n + 1,); `beyond` is the norm after rank n."""
    return np.sqrt(np.append(np.cumsum(s[::-1] ** 2)[::-1], 0.0) + beyond**2)


def least_rank(s: np.ndarray, rest: np.ndarray, tolerance: float, largest_rank: int, complete: bool = True) -> int | None:
    """The least rank at which the rest is within the tolerance and no repeated singular value is cut in two.

    Parameters
    ----------
    s
        Singular values, falling, shape (n,).
    rest
        The norms of the rest after rank 0 .. n, shape (n + 1,).
    tolerance
        Largest norm of the rest, divided by the norm of the kernel.
    largest_rank
        The largest rank that is allowed.
    complete
        Whether `s` has all singular values.

    Returns
    -------
    int or None
        None where `s` is not complete and has too few values to decide.

    Raises
    ------
    ValueError
        If the kernel is zero.
    RuntimeError
        If the rank would exceed the largest one.
    """
    if not rest[0] > 0:
        raise ValueError("kernel: it is zero; a kernel of positive rank is not")
    enough = np.flatnonzero(rest <= tolerance * rest[0])
    rank = int(enough[0]) if enough.size else s.size
    while rank < s.size and s[rank] > (1 - CLUSTER_TOLERANCE) * s[rank - 1]:
        rank += 1
    if rank > largest_rank:
        raise RuntimeError(
            f"compress: an error of {tolerance:.2g} of the norm needs rank {rank} or more, but 'largest_rank' is "
            f"{largest_rank}, which leaves {rest[largest_rank] / rest[0]:.2g} of the norm; take a larger tolerance, or a "
            f"larger 'largest_rank'"
        )
    return rank if complete or rank < s.size else None


def compress_factors(kernel: LowRankKernel, beta: np.ndarray, tolerance: float, largest_rank: int) -> Compression:
    """The best kernel of lower rank for one that has factors, by a decomposition in the factors. Collective."""
    spaces = kernel.phi.Y, kernel.psi.Y
    Q, s, rest = decompose(spaces, [kernel.phi.values, kernel.psi.values], beta)
    r = least_rank(s, rest, tolerance, largest_rank)
    left, next_value = float(rest[r]), float(s[r]) if r < s.size else 0.0
    return Compression(
        low_rank_kernel(spaces, [q[:, :r] for q in Q]),
        s[:r],
        "factors",
        float(rest[0]),
        KernelError(left, left),
        KernelError(next_value, next_value),
        None,
        None,
        0,
    )


def decompose(
    spaces: tuple[LabelSpace, LabelSpace], factors: Sequence[np.ndarray], beta: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The singular value decomposition of U beta V^T in the label measures. Collective.

    Returns
    -------
    functions : list of numpy.ndarray
        Left and right singular functions at the owned nodes, shape (nodes, n) each.
    singular_values : numpy.ndarray
        Falling, shape (n,).
    rest : numpy.ndarray
        The Hilbert-Schmidt norms of the rest after rank 0 .. n, shape (n + 1,).
    """
    Q, R = zip(*(orthonormal_factors(Y, values) for Y, values in zip(spaces, factors)))
    left, s, right = np.linalg.svd(R[0] @ beta @ R[1].T, full_matrices=False)
    return [Q[0] @ left, Q[1] @ right.T], s, norms_of_rest(s)
