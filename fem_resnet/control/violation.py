"""Where controls lie outside of a control set A, and how they are brought into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fem_resnet.control.controls import Controls
from fem_resnet.control.sets.control_set import ControlSet
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.ranks import together

__all__ = ["Violation", "controls_within", "refuse_controls_outside", "violation"]

#: Controls that are outside of A by no more than this part of its size count as inside: mixtures and factors of b leave
#: round-off.
_ROUND_OFF = 1e-10
#: How many pairs of nodes are looked at in one piece.
_PAIRS = 2**20


@dataclass(frozen=True)
class Violation:
    """The pair of nodes where controls are farthest outside of a set A.

    Attributes
    ----------
    excess : float
        The larger of two distances: of a from the range of a in A, and of b from the section at a. Each is divided by the size
        of A in that direction.
    a, b : float
        The controls there.
    y, z : tuple of float
        The coordinates of the nodes.
    """

    excess: float
    a: float
    b: float
    y: tuple[float, ...]
    z: tuple[float, ...]

    def __str__(self) -> str:
        y, z = ("(" + ", ".join(f"{x:.4g}" for x in node) + ")" for node in (self.y, self.z))
        return f"(a(y), b(y, z)) = ({self.a:.6g}, {self.b:.6g}) at y = {y}, z = {z}, by {self.excess:.1e} of its size"


def violation(Y: LabelSpace, A: ControlSet, controls: Controls, tolerance: float = _ROUND_OFF) -> Violation | None:
    """The pair of nodes where (a(y), b(y, z)) is farthest outside of A; None if it is in A at all pairs. Collective.

    All pairs of nodes are looked at, in pieces. The work is nodes^2 x rank, shared by the ranks.

    Parameters
    ----------
    Y
        The label domain.
    A
        The set.
    controls
        (a, b) at the nodes.
    tolerance
        How far outside of A counts as inside, as a part of A's size in a and in b.
    """
    # A may be made of a user's functions.
    sizes = together(Y.comm, lambda: [_size(*A.bias_range), _size(*A.kernel_range)])
    x = Y.coordinates  # all ranks make the coordinates when they are first asked for
    worst: tuple | None = None
    for owner in range(Y.comm.size):
        # The nodes z of one rank after the other are sent to all: no rank ever holds the nodes of two others.
        psi, z = Y.comm.bcast((controls.psi, x) if Y.comm.rank == owner else None, root=owner)
        pieces = np.array_split(np.arange(Y.nodes), max(1, Y.nodes * len(z) // _PAIRS))
        far = together(Y.comm, lambda: [
            _farthest(A, controls.a[rows], controls.phi[rows] @ psi.T, sizes, tolerance) for rows in pieces
        ])  # fmt: skip
        for rows, found in zip(pieces, far):
            if found is not None and (worst is None or found[0] > worst[0]):
                excess, i, j, b = found
                worst = excess, float(controls.a[rows[i]]), b, tuple(x[rows[i]]), tuple(z[j])
    offers = [offer for offer in Y.comm.allgather(worst) if offer is not None]
    return Violation(*max(offers)) if offers else None


def _size(low: float, high: float) -> float:
    return max(high - low, abs(low), abs(high), np.finfo(float).tiny)


def _farthest(
    A: ControlSet, a: np.ndarray, b: np.ndarray, sizes: Sequence[float], tolerance: float
) -> tuple[float, int, int, float] | None:
    """The largest excess of (a_i, b_ij), its indices i and j, and b_ij; None where all pairs are in A."""
    if not b.size:
        return None
    low, high = A.bias_range
    m, M = (end[:, None] for end in A.sections(np.clip(a, low, high)))
    empty = m > M  # a finite set has no point over most a
    in_a = np.maximum(np.maximum(low - a, a - high), 0.0)[:, None] / sizes[0]
    in_b = np.where(empty, 0.0, np.maximum(np.maximum(m - b, b - M), 0.0)) / sizes[1]
    excess = np.maximum(in_a, in_b)
    # A set may have holes, or sections that are no intervals, so A itself is asked. It has one tolerance for a and b.
    inside = A.contains(a[:, None], b, tolerance * max(sizes))
    excess = np.where((excess <= tolerance) & ~inside, np.maximum(excess, 2 * tolerance), excess)
    i, j = map(int, np.unravel_index(np.argmax(excess), excess.shape))
    return (float(excess[i, j]), i, j, float(b[i, j])) if excess[i, j] > tolerance else None


def controls_within(Y: LabelSpace, A: ControlSet, controls: Controls) -> Controls:
    """Mixtures of controls with a point of a convex set A, by the least share that brings them into A. Collective.

    These are not the nearest controls in A, whose rank may be the number of nodes. The rank of the mixtures grows by one.

    Parameters
    ----------
    Y
        The label domain.
    A
        The set.
    controls
        (a, b) at the nodes. Controls in A are returned as they are.

    Raises
    ------
    ValueError
        If the controls are not in A, and A is not convex.
    """
    if violation(Y, A, controls) is None:
        return controls
    if not A.convex:
        raise ValueError(
            "A: expected a convex set, as controls outside of it are mixed with one of its points; "
            "begin with controls in A, for example the same point of A at all y and z"
        )
    a, one = np.mean(A.bias_range), np.ones((Y.nodes, 1))
    b = np.mean(together(Y.comm, lambda: A.sections(a)))
    centre, outside, inside = Controls(np.full(Y.nodes, a), b * one, one), 0.0, 1.0
    while inside - outside > 1e-3 * inside:
        share = (outside + inside) / 2 if outside else inside / 2
        if violation(Y, A, controls.towards(centre, share)) is None:
            inside = share
        else:
            outside = share
    return controls.towards(centre, inside)


def refuse_controls_outside(Y: LabelSpace, A: ControlSet, controls: Sequence[Controls], remedy: str) -> None:
    """Raise ValueError if the controls of a layer are not in A. The message says where, then the remedy. Collective."""
    for l, c in enumerate(controls):
        outside = violation(Y, A, c)
        if outside is not None:
            raise ValueError(f"A: expected a set with the controls of all layers in it; layer {l} has {outside}; {remedy}")
