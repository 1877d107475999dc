"""`LabelFieldClassifier` and `LabelFieldRegressor` keep scikit-learn's protocol, whatever X and y are."""

import pickle

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_SELF, COMM_WORLD
from numpy.testing import assert_allclose, assert_array_equal

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from fem_resnet import DomainRecipe, LabelFieldClassifier, LabelFieldRegressor, LabelSpace, Parity, laplace_basis, read_mesh

on_ranks = pytest.mark.parallel([1, 2, 3])


def turns(mesh):
    return [fd.as_vector([fd.Constant(1.0)])]


def reflection(mesh):
    return [Parity(lambda x: -x, (-1, 1), output=-1, inputs=-1)]


CIRCLE = DomainRecipe(fd.PeriodicIntervalMesh, 48, 1.0)
T = np.arange(40) / 40


def waves(rng, samples=24, points=T):
    """Waves on a circle at points, shape (samples, points), their numbers, 1 or 2, and their sizes."""
    numbers, sizes, start = rng.integers(1, 3, samples), rng.uniform(0.5, 1.5, samples), rng.uniform(size=samples)
    values = sizes[:, None] * np.cos(2 * np.pi * (numbers[:, None] * (np.atleast_2d(points) + start[:, None])))
    return values, numbers, sizes


def classifier(**changes):
    return LabelFieldClassifier(**dict(domain=CIRCLE, points=T, layers=2, tikhonov=1e-3, max_iter=10, random_state=0) | changes)


def regressor(**changes):
    return LabelFieldRegressor(**dict(domain=CIRCLE, points=T, layers=2, tikhonov=1e-5, max_iter=15, random_state=0) | changes)


# -- scikit-learn's own checks -----------------------------------------------------------------------------------------

ROUND_OFF = "sums over other numbers of samples have other round-off, which L-BFGS and Levenberg-Marquardt steps amplify"


@pytest.mark.parametrize("estimator", [LabelFieldClassifier(random_state=0), LabelFieldRegressor(random_state=0)], ids=repr)
@pytest.mark.parallel([1])
def test_check_estimator_passes(estimator):
    expected = {}
    found = check_estimator(estimator, expected_failed_checks=expected, on_fail=None, on_skip=None)
    failed = {each["check_name"]: each["exception"] for each in found if each["status"] == "failed"}
    assert not failed
    assert len(found) > 40 and {each["check_name"] for each in found if each["status"] == "xfail"} == set(expected)
