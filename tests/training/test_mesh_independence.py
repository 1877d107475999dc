"""L-BFGS in the inner products of label domain and time: its iterations do not know the mesh or the layers."""

from functools import cache

import numpy as np
import pytest
from helpers import label_space, smooth
from numpy.testing import assert_allclose
from pyadjoint import Control

from fem_resnet.label_domain.laplace import laplace_basis
from fem_resnet.learning.batch import Batch
from fem_resnet.learning.loss import least_squares
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.learning.regulariser import tikhonov
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.training.gradient import train

EQUAL = {layers: tuple(np.linspace(0, 1, layers + 1)) for layers in (4, 8, 16)}
_RANDOM = np.cumsum(np.random.default_rng(3).uniform(0.1, 1, 8))
_TWICE = 2.0 ** np.arange(9) - 1
UNEQUAL = [tuple(np.concatenate([[0], _RANDOM]) / _RANDOM[-1]), tuple(_TWICE / _TWICE[-1])]
#: Refinements of the mesh, and layer times.
CASES = {
    "finer meshes": [(n, EQUAL[4]) for n in (1, 2, 3)],
    "more layers": [(1, times) for times in EQUAL.values()],
    "layers of unequal lengths": [(1, times) for times in (EQUAL[8], *UNEQUAL)],
}


class PlainNumbers(LearningProblem):
    """With the inner product of R^n."""

    def controls(self):
        return [Control(function, riesz_map="l2") for function in self.functions]


@cache
def basis(refinement, alone=False):
    return laplace_basis(label_space("polygon", "CG1", refinement, alone), 8)


@cache
def iterations(refinement, times, kind=LearningProblem, fall=1e-6, alone=False):
    """From zero until the gradient has fallen so far: smooth functions carried to others, the bias at the nodes."""
    net = ResidualNetwork(basis(refinement, alone), layers=times)
    batch = Batch(net.Y.batch(smooth(net.Y, 5, seed=1)), net.Y.batch(smooth(net.Y, 5, seed=2)))
    problem = kind(net, None, least_squares, tikhonov(0.1), batch)
    assert not any(parameter.get(k).any() for parameter in problem.parameters for k in range(len(parameter.functions)))
    options = {"tao_gatol": 0.0, "tao_gttol": fall, "tao_max_it": 1000}
    result = train(problem, options, monitor=lambda progress: None)
    assert result.reason == "CONVERGED_GTTOL"
    assert result.gradient_norm < fall * result.gradient_norms[0]
    return result.iterations


@pytest.mark.parametrize("cases", [*CASES, "all of these"])
def test_iterations_stay_within_20_per_cent(cases):
    counts = [iterations(*case) for case in CASES.get(cases, sum(CASES.values(), []))]
    assert max(counts) <= 1.2 * min(counts), f"iterations {counts}"


@pytest.mark.parallel([2, 3])
def test_iterations_are_those_of_one_rank():
    """To a hundredth of the gradient, since more takes too long: the whole mesh on each rank, and its parts on all."""
    assert iterations(1, EQUAL[4], fall=1e-2) == iterations(1, EQUAL[4], fall=1e-2, alone=True)


def test_with_the_inner_product_of_plain_numbers_they_grow():
    """To a thousandth of the gradient, since more takes too long."""
    plain = [iterations(n, EQUAL[4], PlainNumbers, fall=1e-3) for n in (1, 2)]
    ours = [iterations(n, EQUAL[4], fall=1e-3) for n in (1, 2)]
    assert plain[1] > 1.5 * plain[0], f"iterations {plain}"
    assert max(ours) <= 1.2 * min(ours) and plain[0] > 3 * ours[0], f"iterations {ours}, plain {plain}"


def test_the_length_of_the_memory_can_be_set():
    """The gradient falls fast enough with any; the way there differs."""
    problem = LearningProblem(
        ResidualNetwork(basis(1), layers=2), None, least_squares, tikhonov(0.1),
        Batch(*(basis(1).Y.batch(smooth(basis(1).Y, 5, seed=seed)) for seed in (1, 2))),
    )  # fmt: skip
    ends = {}
    for pairs in (1, 5, 20, None):
        for function in problem.functions:
            function.assign(0.0)
        options = {} if pairs is None else {"tao_lmvm_mat_lmvm_hist_size": pairs}
        ends[pairs] = train(problem, options | {"tao_max_it": 15}, monitor=lambda progress: None).values
    # Sums may differ in their last bits with where arrays lie in memory; 15 iterations magnify that little.
    same = {"rtol": 1e-11}
    assert_allclose(ends[5], ends[None], **same, err_msg="PETSc keeps 5 pairs; what was set once is not set for good")
    assert_allclose(ends[1][2], ends[20][2], **same)
    assert_allclose(ends[5][6], ends[20][6], **same)
    assert abs(ends[1][3] / ends[20][3] - 1) > 1e-6 and abs(ends[5][-1] / ends[20][-1] - 1) > 1e-8
