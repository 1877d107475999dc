"""The extremal controls (4.9), (4.10) of section 4.2, for one sample.

Let sigma increase, and let the running cost L(f) not depend on (a, b). Then H (`hamiltonian`) is largest where T_f is T^+ at y
with r*(y) > 0, and T^- at y with r*(y) < 0 (`sets`). These are two controls, b^+ and b^-, the same for all y, so

    b*(y, z) = chi_{r* > 0}(y) b^+(z) + chi_{r* < 0}(y) b^-(z)                                            (4.10)

has rank 2 at most. If A depends on y, so do T^+ and T^-, and b* has rank 2 all the same (`nodal_set`). ((4.10) prints the
indicator of r* >= 0 on its left. It holds where r* is not 0.)

Ties: where r* = 0 the controls for r* > 0 are taken, and where f = 0 those for f > 0. Any others are optimal too, and the
result has the measures of both sets. Extremal controls leave any fixed span: a layer of them has its own two-term basis
(`Controls.in_bases`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fem_resnet.arguments import instance, number
from fem_resnet.control.controls import Controls
from fem_resnet.control.hamiltonian import Pair
from fem_resnet.control.sets.control_set import ControlSet
from fem_resnet.control.sets_of_layers import check_set
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.ranks import same, together

__all__ = ["Extremal", "extremal_controls", "integrals_of_parts"]


@dataclass(frozen=True)
class Extremal:
    """Controls of (4.10), and the measures of the sets where they are not unique.

    Attributes
    ----------
    controls : Controls
        Of rank 2 at most.
    no_costate, no_state : float
        Measures of { r = 0 }, where any control is optimal, and of { f = 0 }, where any b(., z) of the section is optimal.
    """

    controls: Controls
    no_costate: float
    no_state: float


def integrals_of_parts(Y: LabelSpace, f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F+ and F-, the integrals of the positive and of the negative part of f. Collective.

    f has shape (nodes,) or (nodes, samples); each integral has shape () or (samples,).
    """
    sums = Y.sum(np.stack([Y.weights @ np.maximum(f, 0), Y.weights @ np.maximum(-f, 0)]))
    return sums[0], sums[1]


def extremal_controls(Y: LabelSpace, A: ControlSet, pair: Pair, *, tie: float = 0.0) -> Extremal:
    """The controls of (4.10), which maximise H for one sample. Collective over Y's communicator.

    Parameters
    ----------
    Y
        The label domain.
    A
        The set in which (a, b) lies, or sets that depend on y.
    pair
        f and r of one sample, in either convention.
    tie
        Values of abs(r) and abs(f) up to this count as 0, in the units of r and f.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind or differs between ranks, A is on another label space, or the pair has more than one
        sample: for many samples (4.10) does not maximise H, but `raise_controls` enlarges it.
    """
    check_label_space(Y)
    same(Y.comm, A=A, pair=getattr(pair, "convention", pair), tie=tie)
    check_set(A, Y, ControlSet)
    instance("pair", pair, Pair)
    tie = number("tie", tie, least=0)
    if pair.f.shape[1] != 1:
        raise ValueError(f"pair: expected one sample, as (4.10) holds for one, got {pair.f.shape[1]}; try raise_controls")
    f, r = pair.f[:, 0], pair.to("maximise").r[:, 0]
    parts = [part[None] for part in integrals_of_parts(Y, f)]  # for all y alike
    high, low = together(Y.comm, lambda: (A.largest(*parts), A.smallest(*parts)))
    up, plus = r >= -tie, f >= -tie
    controls = Controls(
        np.where(up, high.a, low.a),
        np.column_stack([
            np.where(up, high.where_positive, low.where_positive), np.where(up, high.where_negative, low.where_negative)
        ]),
        np.column_stack([plus, ~plus]).astype(float),
    )  # fmt: skip
    ties = Y.sum(np.array([Y.weights @ (np.abs(x) <= tie) for x in (r, f)]))
    return Extremal(controls, float(ties[0]), float(ties[1]))
