"""Where controls lie outside of a control set A, and how they are brought into it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fem_resnet.control.controls import Controls
from fem_resnet.control.sets.control_set import ControlSet
from fem_resnet.control.sets.nodal_set import at_nodes
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
    excess, b, z = _farthest_at_nodes(Y, A, controls, tolerance)
    x = Y.coordinates
    i = int(np.argmax(excess)) if excess.size else 0
    mine = (float(excess[i]), float(controls.a[i]), float(b[i]), tuple(x[i]), tuple(z[i])) if excess.any() else None
    offers = [offer for offer in Y.comm.allgather(mine) if offer is not None]
    return Violation(*max(offers)) if offers else None


def _farthest_at_nodes(
    Y: LabelSpace, A: ControlSet, controls: Controls, tolerance: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At each node y of this rank, the largest excess over all z, or 0 if it is in A at all; b(y, z) there, and z. Collective.

    The shapes are (nodes,), (nodes,) and (nodes, dimension).
    """
    # A may be made of a user's functions.
    sizes = together(Y.comm, lambda: [_size(*A.bias_range), _size(*A.kernel_range)])
    sizes = np.max(Y.comm.allgather(sizes), axis=0)  # a set that depends on y has others at other nodes
    x = Y.coordinates  # all ranks make the coordinates when they are first asked for
    worst, b, z = np.zeros(Y.nodes), np.zeros(Y.nodes), np.zeros_like(x)
    for owner in range(Y.comm.size):
        # The nodes z of one rank after the other are sent to all: no rank ever holds the nodes of two others.
        psi, others = Y.comm.bcast((controls.psi, x) if Y.comm.rank == owner else None, root=owner)
        if not len(others):
            continue
        pieces = np.array_split(np.arange(Y.nodes), max(1, Y.nodes * len(others) // _PAIRS))
        for rows, (far, j, there) in zip(pieces, together(Y.comm, lambda: [
            _farthest(at_nodes(A, rows), controls.a[rows], controls.phi[rows] @ psi.T, sizes, tolerance) for rows in pieces
        ])):  # fmt: skip
            farther = far > worst[rows]
            chosen = rows[farther]
            worst[chosen], b[chosen], z[chosen] = far[farther], there[farther], others[j[farther]]
    return worst, b, z


def _size(low: float | np.ndarray, high: float | np.ndarray) -> float:
    return max(*(float(np.max(part, initial=0.0)) for part in (high - low, np.abs(low), np.abs(high))), np.finfo(float).tiny)


def _farthest(
    A: ControlSet, a: np.ndarray, b: np.ndarray, sizes: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each i, the largest excess of (a_i, b_ij) over all j, or 0 where all are in A; that j; and b_ij."""
    low, high = A.bias_range
    m, M = (end[:, None] for end in A.sections(np.clip(a, low, high)))
    empty = m > M  # a finite set has no point over most a
    in_a = np.maximum(np.maximum(low - a, a - high), 0.0)[:, None] / sizes[0]
    in_b = np.where(empty, 0.0, np.maximum(np.maximum(m - b, b - M), 0.0)) / sizes[1]
    excess = np.maximum(in_a, in_b)
    # A set may have holes, or sections that are no intervals, so A itself is asked. It has one tolerance for a and b.
    inside = A.contains(a[:, None], b, tolerance * max(sizes))
    excess = np.where((excess <= tolerance) & ~inside, np.maximum(excess, 2 * tolerance), excess)
    j, each = np.argmax(excess, axis=1), np.arange(len(a))
    largest = excess[each, j]
    return np.where(largest > tolerance, largest, 0.0), j, b[each, j]


def controls_within(Y: LabelSpace, A: ControlSet, controls: Controls) -> Controls:
    """Mixtures of controls with points of a convex set A, at each y by the least share that brings them into A. Collective.

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
    out = _farthest_at_nodes(Y, A, controls, _ROUND_OFF)[0] > 0
    if not _anywhere(Y, out):
        return controls
    if not A.convex:
        raise ValueError(
            "A: expected a convex set, as controls outside of it are mixed with one of its points; "
            "begin with controls in A, for example the same point of A at all y and z"
        )
    a, one = np.broadcast_to(sum(A.bias_range) / 2, Y.nodes), np.ones((Y.nodes, 1))
    b = np.mean(together(Y.comm, lambda: A.sections(a)), axis=0)
    centre, outside = Controls(a, b[:, None], one), np.zeros(Y.nodes)
    inside = out.astype(float)
    while _anywhere(Y, inside - outside > 1e-3 * inside):
        share = np.where(outside > 0, (outside + inside) / 2, inside / 2)
        out = _farthest_at_nodes(Y, A, controls.towards(centre, share), _ROUND_OFF)[0] > 0
        outside, inside = np.where(out, share, outside), np.where(out, inside, share)
    return controls.towards(centre, inside)


def _anywhere(Y: LabelSpace, nodes: np.ndarray) -> bool:
    return any(Y.comm.allgather(bool(nodes.any())))


def refuse_controls_outside(Y: LabelSpace, layer: int, A: ControlSet, controls: Controls, remedy: str) -> None:
    """Raise ValueError if the controls of a layer are not in its set. It says where, then the remedy. Collective."""
    outside = violation(Y, A, controls)
    if outside is not None:
        raise ValueError(f"A: expected a set with the controls of all layers in it; layer {layer} has {outside}; {remedy}")
