"""Which coefficients of the output of a head that keeps symmetries share unknowns, so that they are solved for together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import scipy.sparse
from scipy.sparse.csgraph import connected_components

from fem_resnet.learning.head import Head
from fem_resnet.parameters.subspace import Within

__all__ = ["OutputGroup", "output_groups"]


@dataclass(frozen=True)
class OutputGroup:
    """Coefficients of the output that share unknowns.

    Attributes
    ----------
    outputs, unknowns : numpy.ndarray
        Their numbers.
    parts : list of numpy.ndarray
        For each coefficient of the output how the unknowns make its row of (W, mu), shape (rank of psi + 1, unknowns).
    """

    outputs: np.ndarray
    unknowns: np.ndarray
    parts: list[np.ndarray]


def output_groups(head: Head) -> Iterator[OutputGroup]:
    """The groups of a head that keeps symmetries. Outputs that no unknown reaches belong to none."""
    rank = head.psi.rank
    blocks = [cast("Within", parameter.space_basis).elements for parameter in head.parameters]
    W = blocks[0].tocoo()
    made = scipy.sparse.lil_array((head.onto.rank * (rank + 1), sum(block.shape[1] for block in blocks)))
    made[W.coords[0] // rank * (rank + 1) + W.coords[0] % rank, W.coords[1]] = W.data
    for mu in (block.tocoo() for block in blocks[1:]):
        made[mu.coords[0] * (rank + 1) + rank, blocks[0].shape[1] + mu.coords[1]] = mu.data
    made = made.tocsr()
    entries = made.tocoo()
    pattern = scipy.sparse.coo_array(
        (np.ones(entries.nnz), (entries.coords[0] // (rank + 1), entries.coords[1])), shape=(head.onto.rank, made.shape[1])
    )
    _, labels = connected_components(scipy.sparse.block_array([[None, pattern], [pattern.T, None]]), directed=False)
    for label in np.unique(labels[head.onto.rank :]):
        outputs, unknowns = (np.flatnonzero(part == label) for part in np.split(labels, [head.onto.rank]))
        parts = [made[o * (rank + 1) : (o + 1) * (rank + 1)][:, unknowns].toarray() for o in outputs]
        yield OutputGroup(outputs, unknowns, parts)
