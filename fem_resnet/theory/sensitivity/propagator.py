"""Linear maps of L2(Y) that differ from the identity on few functions: M(t, s) = I + A Z^T M.

The linearised flow of (3.6) is such a map (`conditioning`); M without arguments is the label measure. On the orthogonal
complement of the span of Z and A the map is the identity. In an orthonormal basis of that span that starts with Z it is

    I + (Z^T M A)        0
    R                    I          with R^T R the Gram matrix of the part of A that is orthogonal to Z,

and this matrix has all other singular values. R comes from a QR decomposition, so that small singular values keep the
digits that a Gram matrix would lose.
"""

from __future__ import annotations

from functools import cached_property

import firedrake as fd
import numpy as np

from fem_resnet.arguments import instance, integer, real_array
from fem_resnet.fixed import OnMesh
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.orthonormal import orthonormal_factors
from fem_resnet.ranks import same

__all__ = ["Propagator"]

#: The singular functions of values this close to 1 cannot be separated from the functions that M leaves unchanged.
_CLEAR_OF_ONE = 1e-8


class Propagator(OnMesh):
    """M(t, s) = I + A Z^T M, for one solution of (2.8). Get one from `LinearisedFlow.propagator`.

    Parameters
    ----------
    basis
        Z, orthonormal in the label measure.
    added
        A at the owned nodes, shape (nodes, rank).
    times
        s and t.

    Attributes
    ----------
    singular_values : numpy.ndarray
        The singular values on the span of Z and A, falling, at most twice as many as the rank, shape (n,); no unit. Values
        below 1e-16 of the largest one are round-off.
    ones : int
        The number of all other singular values, which are 1.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
    """

    def __init__(self, basis: Basis, added: np.ndarray, times: tuple[float, float]):
        self.basis = instance("basis", basis, Basis)
        same(basis.Y.comm, times=times)
        self.added = real_array("added", added, (basis.Y.nodes, basis.rank), comm=basis.Y.comm)
        self.times = tuple(real_array("times", times, (2,)).tolist())

    def __repr__(self) -> str:
        return f"Propagator(M({self.times[1]:g}, {self.times[0]:g}), rank {self.basis.rank}, {self.basis.Y!r})"

    def apply(self, direction: fd.Function) -> fd.Function:
        """`M(t, s) w`, for a Function or a batch. Collective."""
        return self._map(direction, "direction", lambda w: w + self.added @ self.basis.project(w))

    def transpose(self, costate: fd.Function) -> fd.Function:
        """`M(t, s)^T r`, the transpose in L2(Y), for a Function or a batch. Collective."""
        Y = self.basis.Y
        return self._map(costate, "costate", lambda r: r + self.basis.values @ Y.sum(self.added.T @ (Y.weights[:, None] * r)))

    def _map(self, function: fd.Function, name: str, on_values) -> fd.Function:
        self.basis.Y.check_batch(function, name)
        return self.basis.Y.like(function, on_values(self.basis.Y.values(function)))

    def __matmul__(self, earlier: Propagator) -> Propagator:
        """`M(t, s) M(s, q) = M(t, q)`, for two propagators with the same basis. Collective.

        Parameters
        ----------
        earlier
            M(s, q).

        Raises
        ------
        TypeError, ValueError
            If `earlier` is no Propagator, does not end where this one starts, or has another basis.
        """
        if instance("earlier", earlier, Propagator).basis is not self.basis or earlier.times[1] != self.times[0]:
            raise ValueError(f"earlier: expected a propagator to t = {self.times[0]:g} with the same basis, got {earlier!r}")
        added = self.added @ self.basis.project(earlier.added)
        added += self.added
        added += earlier.added
        return Propagator(self.basis, added, (earlier.times[0], self.times[1]))

    @cached_property
    def _restricted(self) -> np.ndarray:
        """M on the span of Z and A, in an orthonormal basis that starts with Z."""
        outside, inside = self._outside()
        _, R = orthonormal_factors(self.basis.Y, outside)
        _, size, turn = np.linalg.svd(R, full_matrices=False)
        rank = self.basis.rank
        more = min(len(size), self.basis.Y.size - rank)
        matrix = np.eye(rank + more)
        matrix[:rank, :rank] += inside
        matrix[rank:, :rank] = (size[:, None] * turn)[:more]
        return matrix

    def _outside(self) -> tuple[np.ndarray, np.ndarray]:
        """The part of A that is orthogonal to Z, and Z^T M A."""
        Z = self.basis
        inside = Z.project(self.added)
        outside = self.added - Z.values @ inside
        again = Z.project(outside)  # a second time, after which the part in Z is round-off relative to `outside`
        outside -= Z.values @ again
        return outside, inside + again

    @cached_property
    def singular_values(self) -> np.ndarray:
        return np.linalg.svd(self._restricted, compute_uv=False)

    @property
    def ones(self) -> int:
        return self.basis.Y.size - len(self.singular_values)

    @property
    def norm(self) -> float:
        """The largest singular value, the largest growth of a perturbation; no unit. Collective at the first access."""
        return float(max(self.singular_values[0], 1.0 if self.ones else 0.0))

    @property
    def smallest(self) -> float:
        """The smallest singular value, the strongest damping of a perturbation; no unit. Collective at the first access."""
        return float(min(self.singular_values[-1], 1.0 if self.ones else np.inf))

    @property
    def condition(self) -> float:
        """`norm / smallest`; infinite if the latter is round-off; no unit. Collective at the first access."""
        lost = len(self.singular_values) * np.finfo(float).eps * self.norm
        return self.norm / self.smallest if self.smallest > lost else np.inf

    @property
    def lyapunov_exponents(self) -> np.ndarray:
        """Finite-time Lyapunov exponents `log(singular values) / (t - s)`, falling, shape (n,), in 1/t; all others are 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.singular_values) / (self.times[1] - self.times[0])

    def singular_function(self, k: int = 0) -> fd.Function:
        """The perturbation of f(s) of norm 1 that M(t, s) multiplies by the k-th singular value, a new Function. Collective.

        It is the right singular function.

        Parameters
        ----------
        k
            The number of the singular value: 0 for the strongest growth, -1 for the strongest damping.

        Raises
        ------
        ValueError
            If there is no such singular value, or it is 1 up to round-off, so that it has no function of its own.
        """
        same(self.basis.Y.comm, k=k)
        count = len(self.singular_values)
        k = integer("k", k, least=-count, most=count - 1)
        value = self.singular_values[k]
        if abs(value - 1) < _CLEAR_OF_ONE:
            raise ValueError(
                f"k: expected the number of a singular value that is not 1 and so has a function of its own; number {k} is "
                f"{value!r}"
            )
        x = np.linalg.svd(self._restricted)[2][k, : self.basis.rank]
        x = x * np.sign(x[np.argmax(np.abs(x))])
        # The second row of M^T M v = value^2 v gives the part of v that is orthogonal to Z.
        v = self.basis.values @ x + self._outside()[0] @ (x / (value**2 - 1))
        function = fd.Function(self.basis.Y.V)
        self.basis.Y.write(function, v / np.sqrt(self.basis.Y.sum(self.basis.Y.weights @ v**2)))
        return function
