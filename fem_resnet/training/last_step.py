"""The head as the control of the last step: W and mu of a smaller J, at a given final state."""

from __future__ import annotations

import copy

import firedrake as fd
from pyadjoint.tape import stop_annotating

from fem_resnet.learning.batch import Batch
from fem_resnet.learning.head import Head
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.training.gradient import train

__all__ = ["better_head"]


def better_head(problem: LearningProblem, final: fd.Function, iterations: int = 20) -> Head:
    """A copy of the head, with W and mu of a smaller loss of f(T) with the regulariser. Collective.

    What J has of the other parameters does not change with the head. So this is the problem of a network without layers that
    begins in f(T), for any loss and prediction. L-BFGS starts from the present W and mu.

    Parameters
    ----------
    problem
        A problem with a head.
    final
        f(T) of its batch.
    iterations
        Of L-BFGS.
    """
    assert problem.head is not None
    head = copy.deepcopy(problem.head)
    nothing = ResidualNetwork(head.psi, layers=[0.0], activation=problem.net.activation)
    with stop_annotating():
        start = final.copy(deepcopy=True)  # recording takes a Function from the tape that it was on
    batch = Batch(start, problem.batch.targets, problem.batch.weights)
    last = LearningProblem(nothing, head, problem.loss, problem.regulariser, batch)
    train(last, {"tao_max_it": iterations}, quiet=True)
    return head
