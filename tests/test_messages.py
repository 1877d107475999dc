"""What a user reads: short texts of results, the nearest right name for a wrong one, and what was forgotten."""

import re

import numpy as np
import pytest
from problems import learning_problem, network

import fem_resnet
from fem_resnet import (
    Batch,
    LearningProblem,
    cross_entropy,
    get_activation,
    stability_report,
    tikhonov,
    train,
    train_pam,
    train_stochastic,
    verify,
)  # fmt: skip
from fem_resnet.verify import Report

on_ranks = pytest.mark.parallel([1, 2])
#: Two lines of a terminal of 140 columns.
LINE = 280


@on_ranks
def test_results_are_a_line(capsys):
    problem = learning_problem(network("disk", "CG1", bias="basis"))
    result = train(problem, {"tao_max_it": 2}, quiet=True)
    assert re.fullmatch(
        rf"Result\(J = {result.value:.6g}, \|gradient\| = \S+, 2 iterations, ITERATIONS, \d+\.\d s\)", repr(result)
    )
    J, run = problem.record()
    texts = {
        "Run": repr(run),
        "LearningProblem": repr(problem),
        "StabilityReport": repr(stability_report(problem.net, problem.batch.inputs)),
        "PAMResult": repr(train_pam(problem, iterations=1, quiet=True)),
        "StochasticResult": repr(train_stochastic(problem, batch_size=2, epochs=1, quiet=True)),
    }
    for name, text in texts.items():
        assert text.startswith(f"{name}(") and "\n" not in text and "array(" not in text and len(text) <= LINE, text
    assert "learns bias, kernel, W, mu" in texts["LearningProblem"] and "4 samples" in texts["Run"]


def test_reports_are_tables_in_a_notebook_with_the_numbers_of_their_text():
    problem = learning_problem(network("disk", "CG1", bias="basis"))
    report = stability_report(problem.net, problem.batch.inputs)
    html = report._repr_html_()
    assert html.count("<tr>") == 1 + len(report.layers)
    cells = re.findall(r"<td>(.*?)</td>", html)
    rows = [line.split() for line in str(report).splitlines()[2 : 2 + len(report.layers)]]
    assert "".join(cells).replace(" ", "") == "".join(map("".join, rows))
    checked = verify(problem, quick=True)
    assert isinstance(checked, Report)
    assert checked._repr_html_().count("<tr>") == 1 + len(checked.checks)
    assert re.fullmatch(r"Report\(.*; \d+ checks in \d+\.\d s: all passed\)", repr(checked))


def test_html_of_a_text_is_that_text():
    report = Report("a < b & c")
    assert "a &lt; b &amp; c" in report._repr_html_()


@pytest.mark.parametrize("wrong, right", [("laplce_basis", "laplace_basis"), ("Residualnetwork", "ResidualNetwork")])
def test_a_wrong_name_of_the_package_is_told_with_the_nearest(wrong, right):
    with pytest.raises(AttributeError, match=f"no attribute '{wrong}'; did you mean '{right}'\\?$"):
        getattr(fem_resnet, wrong)
    with pytest.raises(AttributeError, match="no attribute 'zzzz'$"):
        _ = fem_resnet.zzzz


def test_a_wrong_choice_is_told_with_the_nearest():
    with pytest.raises(ValueError, match="^activation: expected one of .*, got 'thanh'; did you mean 'tanh'\\?$"):
        get_activation("thanh")
    with pytest.raises(ValueError, match="got 'zzzz'$"):
        get_activation("zzzz")
    problem = learning_problem(network("disk", "CG1"))
    with pytest.raises(ValueError, match="'adam' is not taken; .*; Adam and SGD are steps of train_stochastic$"):
        train(problem, {"tao_type": "adam"})
    with pytest.raises(ValueError, match="'lmvn' is not taken; .*; did you mean 'lmvm'\\?$"):
        train(problem, {"tao_type": "lmvn"})


@on_ranks
def test_a_forgotten_head_is_told():
    problem = learning_problem(network("disk", "CG1"))
    batch = problem.batch
    with pytest.raises(TypeError, match="^head: expected a Head or None, got the loss cross_entropy; was the head forgotten"):
        LearningProblem(problem.net, cross_entropy, tikhonov(1e-3), batch)
    with pytest.raises(ValueError, match="^head: expected a Head onto classes, as the batch has class labels, got None"):
        LearningProblem(problem.net, None, cross_entropy, tikhonov(1e-3), batch)
    with pytest.raises(TypeError, match="^batch: expected a Batch, got NoneType"):
        LearningProblem(problem.net, problem.head, cross_entropy, tikhonov(1e-3))
    values = np.ones((len(problem.net.Y.weights), 4))
    fields = Batch(batch.inputs, problem.net.Y.batch(values))  # a softmax of f(T) itself needs no head
    assert LearningProblem(problem.net, None, cross_entropy, None, fields).head is None
