"""Functions on Y, and their values at points that a user chooses.

From functions to values: the functions of the finite element space are evaluated at the points, and so are their gradients.
From values d_i to functions: coefficients c in a basis p_1 .. p_rank minimise

    |Y| sum_i w_i ((P c)(x_i) - d_i)^2 + lambda c^T R c,        sum_i w_i = 1,

where R is the Gram matrix of the gradients or of the functions. So the first term is about an integral over Y, whatever the
number of points, and lambda means the same for all of them. There is no interpolation: values between the nodes of a mesh do
not determine those at the nodes, and noise, and what the basis does not hold, would go into the function as it is.

In the orthonormal functions `P root^-1` the problem is `|A z - b|^2 + lambda |S z|^2`. It is solved by the singular values of
A stacked on sqrt(lambda) S. Their quotient is the condition; that of the normal equations would be its square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import firedrake as fd
import numpy as np
import scipy.linalg

from fem_resnet.arguments import choice, flag, instance, number, real_array
from fem_resnet.fixed import OnMesh, read_only
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.located_points import located_points
from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.ranks import on_first, same

__all__ = ["SensorFit", "Sensors"]

#: From this condition on, values at points do not determine the coefficients.
_DETERMINED = 1e12

#: Samples that have points of their own are evaluated so many at once, at the points of all of them.
_AT_ONCE = 64


@dataclass(frozen=True, repr=False)
class SensorFit:
    """Functions from values at sensors, and how far to trust them.

    Attributes
    ----------
    functions : Function
        A batch on Y, `P c`, of which no tape knows.
    coefficients : numpy.ndarray
        c, shape (rank, samples), the same on every rank.
    residuals : numpy.ndarray
        The misfit at the points over the size of the values, in the norm of the weights, shape (samples,): noise and what
        the basis does not hold. It is 0 where there are as many functions as points; then `left_out` says more.
    left_out : numpy.ndarray
        The same with each value predicted from the others alone, shape (samples,); infinite where the others do not
        determine the function. It is the size of what the function misses between the points, aliasing among it.
    conditions : numpy.ndarray
        The condition of the least squares problem, shape (samples,). Errors of the values may grow by as much.
    """

    functions: fd.Function
    coefficients: np.ndarray
    residuals: np.ndarray
    left_out: np.ndarray
    conditions: np.ndarray

    def __repr__(self) -> str:
        rank, samples = self.coefficients.shape
        worst = [float(each.max(initial=0.0)) for each in (self.residuals, self.left_out)]
        return f"SensorFit({samples} samples in {rank} functions, misfit up to {worst[0]:.2g}, left out {worst[1]:.2g})"


class Sensors(OnMesh):
    """Points on Y where functions are measured, the same for all samples or others for each.

    Collective over the communicator of the mesh. Points and values are the same on every rank, and in the user's order.

    A point is taken that is outside of all cells, but near one: Y is often round, and its mesh a polygon. The functions of the
    nearest cell go on to the point; on a surface, to the nearest point of its plane. A gradient at a point between two cells,
    or a discontinuous function there, is that of one: of which may depend on how ranks share the mesh, unless it is a surface.

    Parameters
    ----------
    basis
        The functions that `fit` makes of values; its Y is that of all functions. With channels, each has the same points.
    points
        Where they are, shape (points, geometric dimension). Or a list of such arrays, one a sample, each of its own length.
    weights
        Weights >= 0 of the points in `fit`, of which only the proportions count: shape (points,), or a list of such arrays,
        one a sample. Equal if left out.
    tolerance
        How far a point may be from the nearest cell, as a part of the cell's size.

    Attributes
    ----------
    samples : int or None
        How many samples have points of their own; None if the points are those of all samples.

    Raises
    ------
    TypeError
        If `basis` is no Basis, or points or weights are no real numbers.
    ValueError
        If a point is not on Y, with the points' numbers; if Y is a set of points, which has no others; if a shape does not
        fit, a weight is negative, or an argument differs between ranks.

    Examples
    --------
    >>> import numpy as np
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 4)
    >>> sensors = Sensors(phi, np.random.default_rng(0).uniform(-0.7, 0.7, (30, 2)))
    >>> values = sensors.evaluate(phi.function([[1.0], [2.0], [3.0], [4.0]]))
    >>> sensors.fit(values).coefficients.round(6).ravel()
    array([1., 2., 3., 4.])
    """

    def __init__(
        self,
        basis: Basis,
        points: np.ndarray | Sequence[np.ndarray],
        *,
        weights: np.ndarray | Sequence[np.ndarray] | None = None,
        tolerance: float = 0.25,
    ):
        self.basis = instance("basis", basis, Basis, "laplace_basis(Y, rank) makes one")
        self.Y = Y = basis.Y
        same(Y.comm, points=points, weights=weights, tolerance=tolerance)
        if Y.numbers is not None:
            raise ValueError(
                f"basis: expected functions on a mesh, got some on {Y!r}, a set of points without others between them; "
                f"Y.batch(values[Y.numbers]) takes values at its points"
            )
        tolerance = number("tolerance", tolerance, above=0, most=1)
        dimension = Y.V.mesh().geometric_dimension
        own = isinstance(points, (list, tuple)) and len(points) > 0
        own = own and all(isinstance(part, np.ndarray) and part.ndim == 2 for part in points)
        parts = [real_array("points", p, ("points", dimension)) for p in (points if own else [points])]
        self.samples = len(parts) if own else None
        self._sizes = [len(part) for part in parts]
        given = [None] * len(parts) if weights is None else self._listed("weights", weights)
        #: Of each sample, or of all.
        self._weights = [read_only(sample_weights(w, size)) for w, size in zip(given, self._sizes)]
        self._ends = np.cumsum(self._sizes)[:-1]
        self._located = located_points(Y.one.V, np.concatenate(parts), tolerance)
        self._refuse_missing(np.concatenate(parts), tolerance)
        rows = self._located.apply(self._located.interpolation, basis.one.values)
        #: The functions at the points, of each sample or of all, shape (points, rank of one channel).
        self._functions = [read_only(part) for part in np.split(rows, self._ends)]

    def __repr__(self) -> str:
        whose = "" if self.samples is None else f" of {self.samples} samples"
        return f"Sensors({self.basis!r}, {sum(self._sizes)} points{whose})"

    def _refuse_missing(self, points: np.ndarray, tolerance: float) -> None:
        missing = self._located.missing
        if not missing.size:
            return
        sample = np.searchsorted(self._ends, missing, side="right")
        first = np.concatenate([[0], self._ends])[sample]
        words = [
            f"{k - start}" if self.samples is None else f"{k - start} of sample {s}"
            for k, start, s in zip(missing[:5], first, sample)
        ]
        raise ValueError(
            f"points: expected points on Y, or no farther from a cell than {tolerance:g} of its size, got {missing.size} of "
            f"{len(points)} that are: number{'s' * (missing.size > 1)} {', '.join(words)}{', ..' * (missing.size > 5)}, the "
            f"first at {points[missing[0]].tolist()}; leave them out, or raise the tolerance"
        )

    def _listed(self, name: str, given: Any) -> list:
        """An argument of each sample, or the one of all."""
        if self.samples is None:
            return [given]
        given = instance(name, given, (list, tuple), f"one array for each of the {self.samples} samples")
        if len(given) != self.samples:
            raise ValueError(f"{name}: expected {self.samples} arrays, one for each sample, got {len(given)}")
        return list(given)

    def evaluate(self, batch: fd.Function) -> np.ndarray | list[np.ndarray]:
        """Values at the points, the same on every rank. Collective.

        Parameters
        ----------
        batch
            A Function of `Y.V`, or a batch; of as many samples as have points of their own.

        Returns
        -------
        numpy.ndarray or list
            Values, shape (points, samples); with C channels (points, C, samples). Where each sample has its own points, a list
            of arrays, without the last axis.

        Raises
        ------
        TypeError, ValueError
            If the batch is none on Y, or has another number of samples.
        """
        return self._apply([self._located.interpolation], self._checked(batch), ())

    def gradients(self, batch: fd.Function) -> np.ndarray | list[np.ndarray]:
        """Gradients in y at the points, the same on every rank; on a surface the tangential ones. Collective.

        In a space of degree k they are those of polynomials of degree k, of which a cell has its own.

        Parameters
        ----------
        batch
            As for `evaluate`.

        Returns
        -------
        numpy.ndarray or list
            As of `evaluate`, with the d partial derivatives after the first axis: shape (points, d, samples), with C
            channels (points, d, C, samples).

        Raises
        ------
        TypeError, ValueError
            If the batch is none on Y, or has another number of samples; if the functions are discontinuous.
        """
        values = self._checked(batch)
        matrices = self._located.gradient
        return self._apply(matrices, values, (len(matrices),))

    def _checked(self, batch: fd.Function) -> np.ndarray:
        """Values at the owned nodes, shape (nodes of one channel, C, samples)."""
        self.Y.check_batch(batch, "batch")
        values = self.Y.values(batch)
        if self.samples not in (None, values.shape[1]):
            raise ValueError(f"batch: expected {self.samples} samples, as many as have points, got {values.shape[1]}")
        return np.moveaxis(values.reshape(self.Y.channels, -1, values.shape[1]), 0, 1)

    def _apply(self, matrices: list, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | list[np.ndarray]:
        located, samples = self._located, values.shape[2]
        channels = (self.Y.channels,) if self.Y.one is not self.Y else ()

        def at_points(part: np.ndarray) -> np.ndarray:  # (points, d, C, samples)
            columns = np.ascontiguousarray(part).reshape(len(part), part.shape[1] * part.shape[2])  # there may be no node here
            rows = np.stack([located.apply(matrix, columns) for matrix in matrices], axis=1)
            return rows.reshape(len(rows), *shape, *channels, part.shape[2])

        if self.samples is None:
            return at_points(values)
        parts = []
        for first in range(0, samples, _AT_ONCE):
            several = np.split(at_points(values[:, :, first : first + _AT_ONCE]), self._ends)
            parts += [own[..., k].copy() for k, own in enumerate(several[first : first + _AT_ONCE])]
        return parts

    def fit(
        self, values: np.ndarray | Sequence[np.ndarray], lam: float = 0.0, *, penalty: str = "gradient", gaps: bool = False
    ) -> SensorFit:
        """Functions in the basis from values at the points, by regularised least squares. Collective.

        Parameters
        ----------
        values
            As `evaluate` returns them, shape (points, samples) or a list.
        lam
            lambda >= 0. With the penalty "gradient" its unit is that of an area: the square of a length below which the
            values are smoothed.
        penalty
            "gradient" for the Gram matrix of the gradients, `Basis.stiffness`; "identity" for that of the functions.
        gaps
            Whether a value may be NaN: there is none. The weights of a sample's other points then add up to one.

        Raises
        ------
        TypeError
            If the values are no real numbers, or `gaps` is neither True nor False.
        ValueError
            If a value is not finite, NaN without ``gaps=True`` among them; if a sample has no value; if lam or the penalty is
            none; if the values do not determine the coefficients; or an argument differs between ranks.
        """
        basis = self.basis
        same(self.Y.comm, values=values, lam=lam, penalty=penalty, gaps=gaps)
        lam = number("lam", lam, least=0)
        gaps = flag("gaps", gaps)
        gradient = choice("penalty", penalty, ("gradient", "identity")) == "gradient"
        channels = (self.Y.channels,) if self.Y.one is not self.Y else ()
        parts, last = [], () if self.samples is not None else ("samples",)
        for size, given in zip(self._sizes, self._listed("values", values)):
            data = real_array("values", given, (size, *channels, *last), finite=False)
            parts.append(data.reshape(size, self.Y.channels, -1))
            _check_finite(data, gaps)
        stiffness = basis.one.stiffness if lam and gradient else basis.one.gram  # may be collective, and may refuse

        def solve() -> list[np.ndarray]:
            root = basis.one.root
            S = np.linalg.solve(root.T, np.linalg.solve(root.T, stiffness).T)
            sizes, turn = np.linalg.eigh((S + S.T) / 2)
            smooth = np.sqrt(lam * np.maximum(sizes, 0))[:, None] * turn.T if lam else np.zeros((0, len(root)))
            solved = [
                _Columns(P @ np.linalg.inv(root), w * self.Y.one.measure, smooth).solve(d)
                for P, w, d in zip(self._functions, self._weights, parts)
            ]
            z, misfit, left_out, size, condition = (np.concatenate(each, axis=-1) for each in zip(*solved))
            c = scipy.linalg.solve_triangular(root, z.reshape(len(root), -1)).reshape(z.shape)
            # One channel's coefficients after the other; norms are over all channels.
            total = size.sum(axis=0)
            relative = [np.sqrt(each.sum(axis=0) / np.where(total > 0, total, 1)) for each in (misfit, left_out)]
            return [c.transpose(1, 0, 2).reshape(basis.rank, -1), *relative, condition.max(axis=0)]

        coefficients, residuals, left_out, conditions = map(read_only, on_first(self.Y.comm, solve))
        return SensorFit(self.Y.batch(basis.expand(coefficients)), coefficients, residuals, left_out, conditions)


def _check_finite(data: np.ndarray, gaps: bool) -> None:
    bad = np.isinf(data) if gaps else ~np.isfinite(data)
    if bad.any():
        remedy = "" if gaps or not np.isnan(data).any() else "; gaps=True takes NaN for a gap"
        raise ValueError(f"values: expected finite numbers, got {bad.sum()} of {data.size} that are not finite{remedy}")


class _Columns:
    """Least squares in orthonormal functions z, at points that samples share: |W^1/2 (A z - d)|^2 + |B z|^2."""

    def __init__(self, A: np.ndarray, weights: np.ndarray, B: np.ndarray):
        self.A, self.weights, self.B = A, weights, B

    def solve(self, d: np.ndarray) -> list[np.ndarray]:
        """z, shape (rank, C, samples), and of shape (C, samples) squared misfit, that of values left out, size, condition.

        Parameters
        ----------
        d
            Values, shape (points, C, samples), NaN for gaps.
        """
        columns = d.reshape(len(d), -1)
        z = np.empty((self.A.shape[1], columns.shape[1]))
        rest = np.empty((4, columns.shape[1]))
        patterns, which = np.unique(~np.isnan(columns), axis=1, return_inverse=True)
        for k, pattern in enumerate(patterns.T):
            mine = which.ravel() == k
            z[:, mine], rest[:, mine] = self._with_values_at(pattern, columns[pattern][:, mine])
        return [part.reshape(-1, *d.shape[1:]) if part is z else part.reshape(d.shape[1:]) for part in (z, *rest)]

    def _with_values_at(self, there: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, list]:
        weights = self.weights[there]
        if not weights.sum() > 0:
            raise ValueError("values: expected at least one value of positive weight a sample, got a sample without; drop it")
        root = np.sqrt(weights * (self.weights.sum() / weights.sum()))[:, None]
        U, s, V = np.linalg.svd(np.vstack([root * self.A[there], self.B]), full_matrices=False)
        condition = s[0] / s[-1] if len(s) == self.A.shape[1] and s[-1] > 0 else np.inf
        if condition > _DETERMINED:
            raise ValueError(
                f"lam: expected a number > 0, or a larger one, as values at {len(weights)} points do not determine the "
                f"{self.A.shape[1]} functions (condition {condition:.1e}); or take more points, or basis.first(rank)"
            )
        U = U[: len(weights)]
        z = V.T @ ((U.T @ (root * d)) / s[:, None])
        misfit = root * (d - self.A[there] @ z)
        # Without value i, the misfit there is r_i / (1 - H_ii) with H = U U^T, exactly.
        free = 1 - np.einsum("ik,ik->i", U, U)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            left_out = np.where(free > 1e-10, misfit / free, np.where(root > 0, np.inf, 0.0))
        squares = [np.sum(each**2, axis=0) for each in (misfit, left_out, root * d)]
        return z, [*squares, np.full(d.shape[1], condition)]
