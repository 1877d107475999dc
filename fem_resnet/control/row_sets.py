"""Sets of rows (a(y), b(y, .)) for many samples, in finitely many coefficients.

With a fixed basis psi and b(y, z) = sum_k X_k(y) psi_k(z), a row is (a(y), X(y)) and is free at each y: `RowBox`,
`RowBall`. With both bases fixed, b = sum_ij phi_i beta_ij psi_j, and all y share the coefficients beta: `SpanBox`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fem_resnet.arguments import instance, number, real_array
from fem_resnet.control.controls import Controls
from fem_resnet.control.sets.control_set import interval
from fem_resnet.control.sets.nodal_set import NodalBox, intervals
from fem_resnet.fixed import Fixed
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.orthonormal import orthonormal, orthonormal_factors
from fem_resnet.ranks import same, together

__all__ = [
    "RowBall",
    "RowBox",
    "SpanBox",
    "coefficients_of_controls",
    "controls_of_rows",
    "controls_of_span",
    "distance",
    "nearest_controls",
    "rows_of_controls",
]


class RowBox(Fixed):
    """The rows with a-(y) <= a(y) <= a+(y) and b-(y) <= X_k(y) <= b+(y).

    This is a box in the coefficients. It is one in b itself where psi are indicators of cells. For a box that depends on t,
    give `msa` a list with one for each layer.

    Parameters
    ----------
    psi
        The basis in z.
    bias, kernel
        (a-, a+) and (b-, b+): each end is a number, or has a value at each of this rank's nodes, shape (nodes,); no unit.

    Attributes
    ----------
    bias, kernel : tuple of numpy.ndarray
        The ends, each of shape () or (nodes,).

    Raises
    ------
    TypeError, ValueError
        If psi is no basis, the ends are not finite or have another shape, the first is above the second at some y, or numbers
        differ between ranks; on all ranks alike.
    """

    def __init__(self, psi: Basis, bias: Sequence[ArrayLike], kernel: Sequence[ArrayLike]):
        Y = instance("psi", psi, Basis).Y
        same(Y.comm, bias=_of_all_nodes(bias), kernel=_of_all_nodes(kernel))
        self.psi = psi
        self.bias, self.kernel = together(Y.comm, lambda: (intervals(Y, "bias", bias), intervals(Y, "kernel", kernel)))
        self._description = NodalBox(Y, self.bias, self.kernel).description

    @property
    def description(self) -> list[float]:
        """Numbers that differ between boxes on one basis, so that ranks can compare them (`ranks.same`)."""
        return self._description

    def project(self, rows: np.ndarray) -> np.ndarray:
        """The nearest rows of the box, shape (any, 1 + rank).

        Parameters
        ----------
        rows
            (a, X), shape (any, 1 + rank); if the box depends on y, shape (nodes, 1 + rank).

        Raises
        ------
        TypeError, ValueError
            If the rows have another shape or are not real numbers; on the rank with the fault only.
        """
        rows = _checked_rows(self, rows)
        ends = [np.atleast_1d(end)[:, None] for end in (*self.bias, *self.kernel)]
        if not all(len(end) in (1, len(rows)) for end in ends):
            raise ValueError(f"rows: expected a row for each of the {self.psi.Y.nodes} nodes, got shape {rows.shape}")
        return np.hstack([np.clip(rows[:, :1], *ends[:2]), np.clip(rows[:, 1:], *ends[2:])])


class RowBall(Fixed):
    """The rows with a(y)^2 + int b(y, z)^2 dz <= R^2 at each y, b(y, .) in the span of psi.

    Parameters
    ----------
    psi
        A basis in z. An orthonormal basis of its span is kept.
    radius
        R > 0, without unit.

    Raises
    ------
    TypeError, ValueError
        If psi is no basis, or the radius is not positive or differs between ranks.
    """

    def __init__(self, psi: Basis, radius: float):
        same(instance("psi", psi, Basis).Y.comm, radius=radius)
        self.radius = number("radius", radius, above=0)
        self.psi = orthonormal(psi)

    @property
    def description(self) -> float:
        """A number that differs between balls on one basis, so that ranks can compare them (`ranks.same`)."""
        return self.radius

    def project(self, rows: np.ndarray) -> np.ndarray:
        """The nearest rows (a, X) of the ball, of the shape of `rows`, (any, 1 + rank); it raises as `RowBox.project` does."""
        rows = _checked_rows(self, rows)
        return rows / np.maximum(1.0, np.linalg.norm(rows, axis=1) / self.radius)[:, None]


@dataclass(frozen=True)
class SpanBox:
    """The controls with a- <= a(y) <= a+ and beta- <= beta_ij <= beta+, where b = sum_ij phi_i beta_ij psi_j.

    This is a box in the coefficients. It is one in b itself only where both bases are indicators of cells.

    Parameters
    ----------
    phi, psi
        The bases in y and in z, on one label space.
    bias, kernel
        (a-, a+) and (beta-, beta+), shape (2,) each; no unit.

    Raises
    ------
    TypeError, ValueError
        If phi and psi are not bases on one label space, the ends are not finite, the first is above the second, or they
        differ between ranks.
    """

    phi: Basis
    psi: Basis
    bias: Sequence[float]
    kernel: Sequence[float]

    def __post_init__(self):
        instance("phi", self.phi, Basis)
        instance("psi", self.psi, Basis)
        _check_ends(self)
        if self.phi.Y is not self.psi.Y:
            raise ValueError(f"phi, psi: expected bases on one label space, got {self.phi.Y!r} and {self.psi.Y!r}")

    def project(self, a: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest bias and coefficients of the box, of the shapes of a and beta.

        Parameters
        ----------
        a
            The bias at this rank's nodes, shape (nodes,).
        beta
            The coefficients, shape (rank of phi, rank of psi).

        Raises
        ------
        TypeError, ValueError
            If they have other shapes or are not real numbers; on the rank with the fault only.
        """
        a = real_array("a", a, (self.phi.Y.nodes,), finite=False)
        beta = real_array("beta", beta, (self.phi.rank, self.psi.rank), finite=False)
        return _clipped(a, self.bias), _clipped(beta, self.kernel)


def nearest_controls(A: RowBox | RowBall | SpanBox, controls: Controls) -> Controls:
    """The nearest controls in A, after projection onto the span of its bases. Collective."""
    if isinstance(A, SpanBox):
        return controls_of_span(A, *coefficients_of_controls(A, controls))
    return controls_of_rows(A, A.project(rows_of_controls(A, controls)))


def rows_of_controls(A: RowBox | RowBall, controls: Controls) -> np.ndarray:
    """The rows (a, X) of controls, after projection onto the span of psi: shape (nodes, 1 + rank). Collective."""
    return np.column_stack([controls.a, controls.phi @ _projected(A.psi, controls.psi).T])


def controls_of_rows(A: RowBox | RowBall, rows: np.ndarray) -> Controls:
    """Controls of these rows (a, X), shape (nodes, 1 + rank)."""
    return Controls(rows[:, 0], rows[:, 1:], A.psi.values)


def coefficients_of_controls(A: SpanBox, controls: Controls) -> tuple[np.ndarray, np.ndarray]:
    """The nearest bias and coefficients in A, after projection onto the span of both bases. Collective.

    The shapes are (nodes,) and (rank of phi, rank of psi).
    """
    return A.project(controls.a, _projected(A.phi, controls.phi) @ _projected(A.psi, controls.psi).T)


def controls_of_span(A: SpanBox, a: np.ndarray, beta: np.ndarray) -> Controls:
    """Controls of this bias and these coefficients, of shapes (nodes,) and (rank of phi, rank of psi)."""
    return Controls(a, A.phi.values @ beta, A.psi.values)


def distance(Y: LabelSpace, controls: Controls, other: Controls) -> tuple[float, tuple[float, ...]]:
    """The largest distance of the rows (a(y), b(y, .)) of two controls over all nodes y, and that node. Collective.

    The distance in a is divided by the largest abs(a) of both, and that in b by the largest norm of b(y, .) in L2(Y) of
    both. The larger of the two counts.
    """
    _, R = orthonormal_factors(Y, np.hstack([controls.psi, other.psi]))
    mine, theirs = controls.phi @ R[:, : controls.psi.shape[1]].T, other.phi @ R[:, controls.psi.shape[1] :].T

    def largest(*parts):
        return max(*Y.comm.allgather(max(float(np.abs(part).max(initial=0.0)) for part in parts)), np.finfo(float).tiny)

    rows = [np.linalg.norm(part, axis=1) for part in (mine, theirs, mine - theirs)]
    apart = np.maximum(np.abs(controls.a - other.a) / largest(controls.a, other.a), rows[2] / largest(rows[0], rows[1]))
    x = Y.coordinates  # all ranks make the coordinates when they are first asked for
    i = int(np.argmax(apart)) if apart.size else None
    mine_worst = (0.0, ()) if i is None else (float(apart[i]), tuple(map(float, x[i])))
    return max(Y.comm.allgather(mine_worst))


def _projected(basis: Basis, functions: np.ndarray) -> np.ndarray:
    """Coefficients of the projections of functions onto the span of a basis: shape (rank, functions)."""
    return np.linalg.solve(basis.gram, basis.Y.sum(basis.weighted.T @ functions))


def _clipped(values: np.ndarray, ends: Sequence[float]) -> np.ndarray:
    low, high = ends
    return np.clip(values, low, high)


def _checked_rows(A: RowBox | RowBall, rows: np.ndarray) -> np.ndarray:
    rows = real_array("rows", rows, finite=False)
    if rows.ndim != 2 or rows.shape[1] != 1 + A.psi.rank:
        raise ValueError(f"rows: expected shape (any, {1 + A.psi.rank}), got {rows.shape}")
    return rows


def _of_all_nodes(ends: Any) -> Any:
    """What all ranks must give alike of a pair of ends: everything but arrays of node values."""
    if isinstance(ends, (list, tuple)) and any(np.ndim(end) for end in ends):
        return [None if np.ndim(end) else end for end in ends]
    return ends


def _check_ends(A: SpanBox) -> None:
    same(A.psi.Y.comm, bias=A.bias, kernel=A.kernel)
    for name, ends in (("bias", A.bias), ("kernel", A.kernel)):
        interval(name, ends)
