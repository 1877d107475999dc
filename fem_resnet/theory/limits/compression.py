"""Kernels of low rank in the label measure, from full ones.

The best approximation of b in L2(Y x Z) of rank r, and of its operator from L2(Z) to L2(Y), is the truncated singular
value decomposition in the label measures M, N (Eckart, Young; Mirsky),

    M^(1/2) b N^(1/2) = U S V^T,     b_r = Phi S_r Psi^T,     Phi = M^(-1/2) U_r,     Psi = N^(-1/2) V_r,

    norm(b - b_r)^2 = sum_(k > r) s_k^2  (Hilbert-Schmidt),          norm(B - B_r) = s_(r+1)  (operator).

While the N_y N_z values are affordable it is computed by SLEPc, with random vectors as start; a kernel that has factors
is decomposed in these; and above that adaptive cross approximation finds factors (`cross_approximation`), whose
singular values are then truncated. There the error is seen at pairs (y, z) drawn at random, and in whole rows drawn at
random, which see what a kernel has near y = z alone. The larger of both limits is stated, times a factor: no sample bounds
the mean of squares that are large on a small set.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import petsctools
from numpy.typing import ArrayLike
from petsc4py import PETSc
from slepc4py import SLEPc

from fem_resnet.arguments import integer, number, real_array
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.options import checked_options, checked_prefix, petsc_refusals, refuse_unread, unread
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.ranks import same
from fem_resnet.theory.limits.cross_approximation import CrossApproximation, upper_limit
from fem_resnet.theory.limits.kernel_values import KernelValues, draw_pairs

__all__ = ["SVD_PARAMETERS", "Compression", "KernelError", "compress"]

#: The randomised method of Halko, Martinsson and Tropp, to 1e-10 of the largest singular value.
SVD_PARAMETERS = {"svd_type": "randomized", "svd_conv_norm": None, "svd_tol": 1e-10, "svd_max_it": 1000}
#: Neighbours closer than this part of their value are one repeated singular value, whose vectors chance alone fixes.
CLUSTER_TOLERANCE = 1e-6
#: Pairs that watch over a cross approximation, and those, others, by which its error is judged, with whole rows.
_WATCHING, _JUDGING, _ROWS = 4096, 16384, 32
#: Limits of Student's distribution are a little short for squares, which are skew: what is stated is this many times as large.
FACTOR = 1.2
#: Parts of the tolerance that the cross approximation is given, and truncation, one after the other.
_PARTS = ((0.3, 0.65), (0.2, 0.6), (0.1, 0.5), (0.05, 0.3))


@dataclass(frozen=True)
class KernelError:
    """How far an approximation is from its kernel, in one norm.

    Attributes
    ----------
    value : float
        The error; of a sample the limit that it stays below with the confidence of the `Compression`.
    optimal : float or None
        The least error of any kernel of that rank, where it can be computed.
    """

    value: float
    optimal: float | None = None


@dataclass(frozen=True)
class Compression:
    """A kernel of low rank for a full one. Get one from `compress`.

    Attributes
    ----------
    kernel : LowRankKernel
        phi and psi, orthonormal in the label measures.
    singular_values : numpy.ndarray
        s_k, shape (rank,), falling.
    method : str
        "svd" of all values, "factors", or "cross".
    norm : float
        Norm of b in L2(Y x Z); for "cross" that of b_r.
    hilbert_schmidt, operator : KernelError
        Errors in L2(Y x Z) and of the operator from L2(Z) to L2(Y), not divided by the norm. For "cross" the second is
        bounded by the first.
    confidence : float or None
        With which the errors hold, where they come from a sample.
    exceeded : tuple of float or None
        Of a sample (size, part): with the same confidence abs(b - b_r) is above `size` on at most that part of the
        measure of Y x Z, whatever the distribution; the errors take that of means for a normal one.
    evaluations : int
        How often b was evaluated, over all ranks.
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
        """Rank r of b_r."""
        return self.singular_values.size

    @property
    def beta(self) -> np.ndarray:
        """diag(s), the coefficients of b_r in `kernel`."""
        return np.diag(self.singular_values)

    def __str__(self) -> str:
        lines = [f"rank {self.rank} by {self.method}, {self.evaluations} evaluations; norm {self.norm:.6g}"]
        for name, error in (("Hilbert-Schmidt", self.hilbert_schmidt), ("operator", self.operator)):
            known = f", least possible {error.optimal:.3e}" if error.optimal is not None else ""
            sure = f" at most, confidence {self.confidence:g}" if self.confidence is not None else ""
            lines.append(f"  error, {name + ' norm':20s} {error.value:.3e}{sure}{known}")
        return "\n".join(lines)


@PETSc.Log.EventDecorator("fem_resnet:compress")
def compress(
    kernel: LowRankKernel | Callable | tuple | ArrayLike,
    tolerance: float,
    Y: LabelSpace | None = None,
    Z: LabelSpace | None = None,
    *,
    beta: np.ndarray | None = None,
    affordable: int = 4096**2,
    largest_rank: int = 512,
    confidence: float = 0.99,
    seed: int = 0,
    solver_parameters: dict | None = None,
    options_prefix: str | None = None,
) -> Compression:
    """A kernel of low rank with `norm(b - b_r) <= tolerance norm(b)` in L2(Y x Z), the Hilbert-Schmidt norm.

    The operator norm of the error is at most that. The rank is the least one that cuts no repeated singular value in
    two. Collective; the result is the same on any number of ranks, up to the tolerance of the singular value
    decomposition. No rank holds N_y x N_z values but its own rows while they are affordable, or a matrix that was
    given.

    Parameters
    ----------
    kernel
        b as one of

        - a callback ``b(y, z)`` of coordinates, NumPy arrays of shape (.., d), which broadcasts over the axes before
          the last: ``lambda y, z: np.exp(-((y - z) ** 2).sum(axis=-1))``;
        - a UFL expression with the symbols that are its arguments, ``(exp(-dot(y - z, y - z)), y, z)``, where y is the
          mesh's SpatialCoordinate and z a Constant of the shape of coordinates, or the other mesh's;
        - a matrix of the values b(y_i, z_j), shape (N_y, N_z), the same on every rank, in the order of `node_numbers`;
          a matrix B between neurons has b = B / w_j (2.4b);
        - a `LowRankKernel`, with `beta`: a layer of a trained network, of a dense one too (``net.learned_factors()``,
          ``net.kernel.get(l)``).
    tolerance
        From 0 to 1, exclusive; no unit.
    Y, Z
        Label domains of y and z, Z = Y if left out; not for a LowRankKernel, which has its own.
    beta
        Coefficients of a LowRankKernel, shape ``kernel.shape``.
    affordable
        How many values of b are: if N_y N_z are more, cross approximation sees some rows and columns, rank (N_y + N_z).
    largest_rank
        Where to give up.
    confidence
        Of errors that are sampled, between 0 and 1.
    seed
        Of what is drawn at random.
    solver_parameters, options_prefix
        Options of SLEPc's SVD, over `SVD_PARAMETERS`.

    Returns
    -------
    Compression

    Raises
    ------
    TypeError, ValueError
        If an argument is not what is said above, or b is zero or not finite; on all ranks alike.
    Exception
        What a callback raises on one rank, on all of them.
    RuntimeError
        If the rank would exceed the largest one, or SLEPc does not converge.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(3), "DG", 0))
    >>> found = compress(lambda y, z: np.exp(-((y - z) ** 2).sum(axis=-1)), 1e-3, Y)
    >>> found.rank, found.hilbert_schmidt.value < 1e-3 * found.norm
    (15, True)
    """
    of_factors = isinstance(kernel, LowRankKernel)
    for name, X in (("Y", Y), ("Z", Z)):
        if of_factors and X is not None:
            raise TypeError(f"{name}: a LowRankKernel has label domains of its own; leave it out")
        if not of_factors and (X is not None or name == "Y"):
            check_label_space(X, name)
    same(
        (kernel.phi.Y if of_factors else Y).comm, kernel=kernel, tolerance=tolerance, beta=beta, affordable=affordable,
        largest_rank=largest_rank, confidence=confidence, seed=seed, solver_parameters=solver_parameters,
        options_prefix=options_prefix,
    )  # fmt: skip
    tolerance, confidence = (
        number("tolerance", tolerance, above=0, below=1),
        number("confidence", confidence, above=0, below=1),
    )
    largest_rank, seed = integer("largest_rank", largest_rank), integer("seed", seed, least=0)
    affordable = integer("affordable", affordable, least=0)
    options = checked_options(solver_parameters), checked_prefix(options_prefix)
    if of_factors:
        return _of_factors(kernel, beta, tolerance, largest_rank)
    if beta is not None:
        raise ValueError(f"beta: it belongs to a LowRankKernel, got {type(kernel).__name__}")
    Z = Y if Z is None else Z
    b = KernelValues(kernel, Y, Z)
    if Y.size * Z.size <= affordable:
        return _of_all_values(b, tolerance, largest_rank, *options)
    return _of_crosses(b, tolerance, largest_rank, confidence, seed)


# -- kernels with factors ----------------------------------------------------------------------------------------------


def _of_factors(kernel: LowRankKernel, beta, tolerance: float, largest_rank: int) -> Compression:
    beta = real_array("beta", beta, kernel.shape)
    spaces = kernel.phi.Y, kernel.psi.Y
    Q, s, tail = _decomposed(spaces, [kernel.phi.values, kernel.psi.values], beta)
    r = _rank(s, tail, tolerance, largest_rank)
    rest = KernelError(tail[r], tail[r])
    operator = s[r] if r < s.size else 0.0
    return _compression("factors", spaces, [q[:, :r] for q in Q], s[:r], tail[0], rest, KernelError(operator, operator), 0)


def _decomposed(
    spaces: tuple[LabelSpace, LabelSpace], factors: list[np.ndarray], beta: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Singular functions and values of U beta V^T in the label measures, and the norms of what is left at each rank."""
    Q, R = zip(*(_orthonormal(Y, values) for Y, values in zip(spaces, factors)))
    left, s, right = np.linalg.svd(R[0] @ beta @ R[1].T, full_matrices=False)
    tail = np.sqrt(np.append(np.cumsum(s[::-1] ** 2)[::-1], 0.0))
    return [Q[0] @ left, Q[1] @ right.T], s, tail


def _orthonormal(Y: LabelSpace, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q and R with Q R = values, Q orthonormal in the label measure: QR on each rank, then of their R. Collective.

    Unlike a Cholesky factor of the Gram matrix it loses nothing where the functions are nearly dependent.
    """
    root = np.sqrt(Y.weights)[:, None]
    mine, R = np.linalg.qr(root * values)
    found = Y.comm.allgather(R)
    start = sum(len(part) for part in found[: Y.comm.rank])
    Q, R = np.linalg.qr(np.concatenate(found))
    return mine @ Q[start : start + mine.shape[1]] / root, R


def _rank(s: np.ndarray, tail: np.ndarray, tolerance: float, largest_rank: int, complete: bool = True) -> int | None:
    """The least rank at which what is left is within the tolerance and no repeated singular value is cut.

    None where s is not `complete` and more of it has to be known.
    """
    if not tail[0] > 0:
        raise ValueError("kernel: it is zero, which no kernel of a positive rank is")
    enough = np.flatnonzero(tail <= tolerance * tail[0])
    rank = int(enough[0]) if enough.size else s.size
    while rank < s.size and s[rank] > (1 - CLUSTER_TOLERANCE) * s[rank - 1]:
        rank += 1
    if rank > largest_rank:
        raise RuntimeError(
            f"compress: rank {rank} or more is needed for a part {tolerance:.2g} of the norm, {largest_rank} is the "
            f"largest; at it {tail[largest_rank] / tail[0]:.2g} is left. Take a larger tolerance, or a larger "
            f"'largest_rank'"
        )
    return rank if complete or rank < s.size else None


def _compression(
    method,
    spaces,
    factors,
    singular_values,
    norm,
    hilbert_schmidt,
    operator,
    evaluations,
    confidence=None,
    exceeded=None,
) -> Compression:
    kernel = LowRankKernel(*(Basis(Y, values, "given") for Y, values in zip(spaces, factors)))
    return Compression(
        kernel, singular_values, method, float(norm), hilbert_schmidt, operator, confidence, exceeded, int(evaluations)
    )


# -- all values --------------------------------------------------------------------------------------------------------


def _of_all_values(b: KernelValues, tolerance, largest_rank, parameters: dict, prefix: str | None) -> Compression:
    Y, Z = b.y.Y, b.z.Y
    roots = [np.sqrt(X.weights) for X in (Y, Z)]
    everywhere = [np.concatenate(Z.comm.allgather(part)) for part in (b.z.places, roots[1])]
    A = PETSc.Mat().createDense(((Y.nodes, Y.size), (Z.nodes, Z.size)), comm=Y.comm)
    local = A.getDenseArray()
    local[...] = b.block(b.y.places, everywhere[0])
    local *= roots[0][:, None] * everywhere[1]
    A.assemble()
    norm = A.norm()
    if not norm > 0:
        raise ValueError("kernel: it is zero, which no kernel of a positive rank is")
    # The first that is left out is known too: it is the operator norm of what is left.
    wanted, all_of_them, r = 16, min(Y.size, Z.size), None
    while r is None:
        wanted = min(wanted, all_of_them)
        s, *vectors = _singular_triplets(A, wanted, parameters, prefix)
        rest = A.duplicate(copy=True)
        _subtract(rest, s, *vectors)
        # Round-off where all of them were found.
        beyond = 0.0 if wanted == all_of_them else rest.norm()
        rest.destroy()
        tail = np.sqrt(np.append(np.cumsum(s[::-1] ** 2)[::-1], 0.0) + beyond**2)
        r = _rank(s, tail, tolerance, largest_rank, complete=wanted == all_of_them)
        wanted *= 2
    left, right = (part[:, :r] for part in vectors)
    rest = A.duplicate(copy=True)
    _subtract(rest, s[:r], left, right)
    hilbert_schmidt = KernelError(rest.norm(), float(tail[r]))
    operator = KernelError(
        float(_singular_triplets(rest, 1, {"svd_type": "trlanczos"}, None)[0][0]) if rest.norm() > 0 else 0.0,
        float(s[r]) if r < s.size else 0.0,
    )
    for matrix in (A, rest):
        matrix.destroy()
    factors = [left / roots[0][:, None], right / roots[1][:, None]]
    return _compression("svd", (Y, Z), factors, s[:r], norm, hilbert_schmidt, operator, Y.comm.allreduce(b.evaluations))


def _subtract(A: PETSc.Mat, s: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """A - U S V^T in place, for the rows of U and V that this rank owns."""
    local = A.getDenseArray()
    local -= (left * s) @ np.concatenate(A.comm.tompi4py().allgather(right)).T
    A.assemble()


def _singular_triplets(
    A: PETSc.Mat, count: int, parameters: dict, prefix: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest singular values, and the owned rows of the singular vectors, shape (rows, count)."""
    svd = SLEPc.SVD().create(comm=A.comm)
    svd.setOperator(A)
    svd.setDimensions(nsv=count)
    with petsc_refusals(parameters):
        petsctools.set_from_options(
            svd, parameters=SVD_PARAMETERS | parameters, options_prefix=prefix, default_prefix="fem_resnet_svd"
        )
    with petsctools.inserted_options(svd):
        svd.solve()
    refuse_unread(unread(petsctools.get_options(svd), parameters), f"an SVD of type {svd.getType()!r}")
    found = svd.getConverged()
    if found < count:
        raise RuntimeError(
            f"compress: SLEPc found {found} of {count} singular values in {svd.getIterationNumber()} iterations "
            f"(reason {svd.getConvergedReason()}); try 'svd_type': 'trlanczos' or a larger 'svd_max_it' in "
            f"solver_parameters"
        )
    v, u = A.createVecs()
    s, left, right = np.empty(count), np.empty((u.getLocalSize(), count)), np.empty((v.getLocalSize(), count))
    for k in range(count):
        s[k] = svd.getSingularTriplet(k, u, v)
        left[:, k], right[:, k] = u.array_r, v.array_r
    for thing in (svd, u, v):
        thing.destroy()
    return s, left, right


# -- some rows and columns ---------------------------------------------------------------------------------------------


def _of_crosses(b: KernelValues, tolerance, largest_rank, confidence, seed) -> Compression:
    spaces = b.y.Y, b.z.Y
    cross = CrossApproximation(b, pairs=_WATCHING, confidence=confidence, largest_rank=largest_rank)
    seeds = itertools.count(16 * seed)
    judge = _Judge(b, seeds)
    # The judge is asked so many times, and has two samples: with the confidence that all of it holds.
    each = 1 - (1 - confidence) / (2 * len(_PARTS))
    for of_cross, of_truncation in _PARTS:
        cross.extend(of_cross * tolerance, next(seeds))
        Q, s, tail = _decomposed(spaces, cross.factors, np.eye(cross.rank))
        r = _rank(s, tail, of_truncation * tolerance, largest_rank)
        factors = [q[:, :r] for q in Q]
        error, residual = judge.limit(factors, s[:r], each)
        norm = tail[0] if r == s.size else (tail[0] ** 2 - tail[r] ** 2) ** 0.5
        if error <= tolerance * norm:
            break
    else:
        raise RuntimeError(
            f"compress: at rank {r} the error is only known to be below {error / norm:.2g} of the norm, with confidence "
            f"{confidence:g}; expected {tolerance:.2g}. Take a larger tolerance, or a larger 'affordable', with which all values "
            f"are seen"
        )
    exceeded = float(np.abs(residual).max()), float(-np.log1p(-each) / residual.size)
    stated = KernelError(error)
    return _compression(
        "cross",
        spaces,
        factors,
        s[:r],
        norm,
        stated,
        stated,
        spaces[0].comm.allreduce(b.evaluations),
        confidence,
        exceeded,
    )


class _Judge:
    """Pairs and whole rows of b, none of which the approximation was made with. Collective."""

    def __init__(self, b: KernelValues, seeds: Iterator[int]):
        self._b, self._measure = b, b.y.Y.measure * b.z.Y.measure
        self._pairs = draw_pairs(b.y, b.z, _JUDGING, next(seeds))
        self._at_pairs = b.pairs(*(sample.rows(nodes.places) for sample, nodes in zip(self._pairs, (b.y, b.z))))
        self._rows, _ = draw_pairs(b.y, b.y, _ROWS, next(seeds))
        self._in_rows = b.block(self._rows.rows(b.y.places), b.z.places)

    def limit(self, factors: list[np.ndarray], s: np.ndarray, confidence: float) -> tuple[float, np.ndarray]:
        """What the norm of b - b_r is at most, and the residuals at the pairs."""
        phi, psi = factors
        of_pairs = self._at_pairs - np.einsum("ik,k,ik->i", self._pairs[0].rows(phi), s, self._pairs[1].rows(psi))
        of_rows = self._in_rows - (self._rows.rows(phi) * s) @ psi.T
        Z = self._b.z.Y
        # Means over Y x Z, of one entry each and of one row each.
        samples = of_pairs**2, Z.sum(of_rows**2 @ Z.weights) / Z.measure
        return FACTOR * (self._measure * max(upper_limit(sample, confidence) for sample in samples)) ** 0.5, of_pairs
