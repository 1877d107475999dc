"""Training in the first functions of all bases, then in more of them, and at last in all.

Where bases are ordered from smooth to rough functions, most of J can be learned in the first of them, where an evaluation
costs less. From one rank to the next coefficients are padded by zeros. They stand for the same functions of y then, so that J
stays what it is, up to round-off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import TypeVar

import numpy as np

from fem_resnet.arguments import function, instance, integer
from fem_resnet.features import REGULARISED, STEPPED, supports
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.log import log
from fem_resnet.ranks import together
from fem_resnet.training.signals import Signals

__all__ = ["pad_problem", "train_by_ranks"]

_R = TypeVar("_R")


@supports(
    "channels", "no_layers", "gradient_flow", "learned_times", "kernel_set", "nodal_bias", "bases_by_layer", "linear_in_time",
    "shared_in_time", *STEPPED, "head", *REGULARISED, "running", "running_of_controls",
    "running_of_pairs", "ensemble", "derivatives",
    "observed_times", "checkpoints", "learned_both", "lift", "many_samples", "weights",
)  # fmt: skip
def train_by_ranks(problem: LearningProblem, ranks: Sequence[int], train: Callable[[LearningProblem], _R]) -> list[_R]:
    """Train a problem in the first functions of its bases, then in more of them, and at last in all. Collective.

    The problem in the first functions is another one, with its own network and head (`ResidualNetwork.in_first`,
    `Head.in_first`) and the same data. It begins with the leading coefficients, those after it with what was reached
    before them, padded by zeros. The last one is `problem` itself. Where the training raises, its parameters hold what was
    reached, padded by zeros.

    Parameters
    ----------
    problem
        The learning problem.
    ranks
        How many functions (with channels, in each), increasing integers, shape (stages,). The last one is the largest rank of
        the problem's bases. Bases with fewer functions, classes, and a bias with a value at every node take part as they are.
    train
        Trains a problem, and assigns the result to its parameters: ``lambda p: train_stochastic(p, epochs=20)``.

    Returns
    -------
    list
        What `train` has returned for each rank.

    Raises
    ------
    TypeError, ValueError
        If the ranks are no such numbers or differ between MPI ranks, or as `ResidualNetwork.in_first` for one of them; before
        anything is trained.
    Exception
        Whatever `train` raises.

    Examples
    --------
    >>> result = train_by_ranks(problem, (9, 17, 33), train_stochastic)[-1]  # doctest: +SKIP
    """
    function("train", train, "a function of a problem")
    given = instance("ranks", ranks, (list, tuple, range, np.ndarray), "increasing numbers of functions")
    ranks, largest = [integer("ranks", rank) for rank in given], _largest_rank(problem)
    if not ranks or ranks[-1] != largest or not all(one < other for one, other in pairwise(ranks)):
        raise ValueError(
            f"ranks: expected increasing integers up to {largest}, the largest rank of the problem's bases, got {ranks}"
        )
    comm, results = problem.net.Y.comm, []
    stages = [*(_in_first(problem, rank) for rank in ranks[:-1]), problem]
    with Signals(problem.comm):  # of all ranks, so that those after an interrupted one end where they begin
        for rank in ranks[:-1]:
            stage = stages.pop(0)  # so that its tape and its steppers go when it has been trained
            log(comm, logging.INFO, "the first %d functions of all bases", rank)
            try:
                results.append(together(comm, partial(train, stage)))
            finally:
                pad_problem(problem, stage)
            pad_problem(stages[0], stage)
        log(comm, logging.INFO, "all %d functions", largest)
        return [*results, train(problem)]


def pad_problem(problem: LearningProblem, stage: LearningProblem) -> None:
    """Give a problem the coefficients of one in the first functions of its bases, padded by zeros. Collective."""
    problem.net.pad(stage.net)
    if problem.head is not None and stage.head is not None:
        problem.head.pad(stage.head)


def _in_first(problem: LearningProblem, rank: int) -> LearningProblem:
    head = None if problem.head is None else problem.head.in_first(rank)
    return problem.replace(net=problem.net.in_first(rank), head=head)


def _largest_rank(problem: LearningProblem) -> int:
    head = problem.head
    of_head = [] if head is None else [head.psi] if head.classes else [head.psi, head.onto]
    return max(basis.one.rank for basis in chain(*problem.net.bases.values(), of_head) if basis is not None)
