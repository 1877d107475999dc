"""`LabelFieldClassifier` and `LabelFieldRegressor` keep scikit-learn's protocol, whatever X and y are."""

import os
import pickle
import signal

import firedrake as fd
import numpy as np
import pytest
from firedrake import COMM_SELF, COMM_WORLD
from helpers import MESHES
from numpy.testing import assert_allclose, assert_array_equal

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from fem_resnet import (
    DomainRecipe,
    LabelFieldClassifier,
    LabelFieldRegressor,
    LabelSpace,
    Parity,
    label_domain,
    laplace_basis,
    read_mesh,
)
from fem_resnet.estimators import fitting
from fem_resnet.label_domain.symmetries import symmetry_matrices

on_ranks = pytest.mark.parallel([1, 2, 3])


def turns(mesh):
    return [fd.as_vector([fd.Constant(1.0)])]


def reflection(mesh):
    return [Parity(lambda x: -x, (-1, 1), output=-1, inputs=-1)]


CIRCLE = DomainRecipe(fd.PeriodicIntervalMesh, 48, 1.0)
T = np.arange(40) / 40
FEW = dict(domain=CIRCLE, points=T, layers=2, random_state=0)


def waves(rng, samples=24, points=T):
    """Waves on a circle at points, shape (samples, points), their numbers, 1 or 2, and the levels that they go about."""
    numbers, levels, start = rng.integers(1, 3, samples), rng.uniform(-1, 1, samples), rng.uniform(size=samples)
    values = levels[:, None] + np.cos(2 * np.pi * (numbers[:, None] * (np.atleast_2d(points) + start[:, None])))
    return values, numbers, levels


def classifier(**changes):
    return LabelFieldClassifier(
        **dict(domain=CIRCLE, points=T, layers=2, tikhonov=1e-3, max_iter=10, random_state=0) | changes
    )


def regressor(**changes):
    return LabelFieldRegressor(**FEW | dict(tikhonov=1e-5, max_iter=15) | changes)


# -- scikit-learn's own checks -----------------------------------------------------------------------------------------

QUICK = dict(channels=1, layers=1, max_iter=3, tikhonov=1e-3, random_state=0)


KINDS = {"classes": LabelFieldClassifier, "numbers": LabelFieldRegressor}


@pytest.mark.parametrize(
    "estimator",
    [pytest.param(make(**QUICK), id=name) for name, make in KINDS.items()]
    # With all that is searched for: six minutes each.
    + [pytest.param(make(), id=f"{name}, untuned", marks=pytest.mark.slow) for name, make in KINDS.items()],
)
@pytest.mark.whole
def test_check_estimator_passes(estimator):
    """No check is expected to fail: `expected_failed_checks` would be empty."""
    found = check_estimator(estimator, on_skip=None)
    passed = {each["check_name"] for each in found if each["status"] == "passed"}
    assert len(passed) > 40 and {"check_estimators_pickle", "check_sample_weight_equivalence_on_dense_data"} <= passed


# -- the protocol ------------------------------------------------------------------------------------------------------


def test_a_fitted_estimator_pickles_and_a_clone_learns_the_same(rng):
    X, y, _ = waves(rng)
    fitted = classifier().fit(X, y)
    again = pickle.loads(pickle.dumps(fitted))
    assert again.domain_ is not fitted.domain_  # it makes a mesh of its own
    assert_allclose(again.predict_proba(X), fitted.predict_proba(X), atol=1e-8)  # two runs of the eigensolver
    other = clone(fitted)
    assert not hasattr(other, "domain_") and other.get_params()["domain"] is CIRCLE
    assert_allclose(other.fit(X, y).predict_proba(X), fitted.predict_proba(X), atol=1e-10)  # round-off, after ten iterations


def test_it_stands_in_pipelines_and_searches_in_two_processes(rng):
    X, _, levels = waves(rng)
    grid = {"labelfieldregressor__tikhonov": [1e-4, 1e2]}
    pipeline = make_pipeline(StandardScaler(), regressor(max_iter=5))
    search = GridSearchCV(pipeline, grid, n_jobs=2, cv=2).fit(X, levels)
    assert search.best_params_ == {"labelfieldregressor__tikhonov": 1e-4}
    alone = GridSearchCV(pipeline, grid, cv=2).fit(X, levels)
    assert_allclose(search.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"], rtol=1e-5)


@on_ranks
def test_all_ranks_predict_what_one_does(rng):
    X, y, levels = waves(rng)
    alone = DomainRecipe(fd.PeriodicIntervalMesh, 48, 1.0, comm=COMM_SELF)
    for make, target, method in ((classifier, y, "predict_proba"), (regressor, levels, "predict")):
        found = [getattr(make(domain=domain, max_iter=3).fit(X, target), method)(X) for domain in (CIRCLE, alone)]
        # The eigensolver's tolerance, and three iterations on it.
        assert_allclose(*found, atol=1e-6)


@pytest.mark.parallel([2])
def test_what_differs_between_ranks_is_refused(rng):
    X, y, _ = waves(rng)
    with pytest.raises(ValueError, match="^tikhonov: all ranks must give the same"):
        classifier(tikhonov=1e-3 * (1 + COMM_WORLD.rank)).fit(X, y)
    with pytest.raises(ValueError, match="^y: all ranks must give the same"):
        classifier().fit(X, y if COMM_WORLD.rank else 3 - y)


@pytest.mark.parametrize("labels", [["b", "a"], [-1.0, 7.0], [True, False], np.array([3, 1], np.uint8)], ids=str)
def test_class_labels_are_of_any_type(rng, labels):
    X, numbers, _ = waves(rng)
    y = np.array(labels)[numbers - 1]
    found = classifier().fit(X, y)
    assert found.predict(X).dtype == y.dtype and found.score(X, y) > 0.9
    assert_array_equal(found.classes_, np.unique(y))
    assert_allclose(found.predict_proba(X).sum(axis=1), 1.0)


@on_ranks
def test_a_signal_while_the_weight_is_searched_for_ends_the_fit(rng, monkeypatch):
    """The trainings of the search share it: no weight is chosen from those that were cut short."""
    X, _, levels = waves(rng)
    calls, minimise = [], fitting.minimise

    def interrupted(*arguments):
        if not calls:
            os.kill(os.getpid(), signal.SIGINT)
        calls.append(minimise(*arguments))
        return calls[-1]

    monkeypatch.setattr(fitting, "minimise", interrupted)
    estimator = regressor(tikhonov=None)
    with pytest.raises(KeyboardInterrupt, match="^while Tikhonov's weight was searched for: nothing is fitted"):
        estimator.fit(X, levels)
    assert {result.iterations for result in calls} == {0} and not hasattr(estimator, "_arrays")


def test_a_recipe_of_label_domain_pickles_and_is_made_again(tmp_path):
    disk = DomainRecipe(label_domain, str(MESHES / "disk.msh"))
    again = pickle.loads(pickle.dumps(disk))
    assert again.label_space() is not disk.label_space() and again.label_space().size == disk.label_space().size


# -- kinds of X --------------------------------------------------------------------------------------------------------


def test_functions_a_batch_and_values_at_points_are_the_same_samples(rng):
    X, y, _ = waves(rng)
    at_nodes = CIRCLE.label_space().coordinates[:, 0]
    values, *_ = waves(np.random.default_rng(1), points=at_nodes)
    y = waves(np.random.default_rng(1), points=at_nodes)[1]
    Y = CIRCLE.label_space()
    batch = Y.batch(values.T)
    functions = [Y.function(batch, k) for k in range(len(values))]
    found = [classifier(points=None).fit(given, y).predict_proba(given) for given in (batch, functions)]
    assert_allclose(*found, atol=1e-12)
    at_points = classifier(points=at_nodes).fit(values, y).predict_proba(values)
    assert np.abs(at_points - found[0]).max() < 0.05  # up to what the smoothing of values at points takes off


def test_functions_may_live_on_another_mesh_and_are_predicted(rng):
    fine = LabelSpace(fd.FunctionSpace(fd.PeriodicIntervalMesh(96, 1.0, comm=COMM_SELF), "CG", 1))
    shifts = rng.uniform(size=12)
    batch = fine.batch(np.cos(2 * np.pi * (fine.coordinates + shifts)))
    X = [fine.function(batch, k) for k in range(12)]
    y = [fine.function(fine.batch(-0.5 * fine.values(batch)), k) for k in range(12)]
    found = regressor(points=None).fit(X, y)
    assert found.score(X, y) > 0.999 and found.score(X, y, np.arange(12.0)) > 0.999
    Y = CIRCLE.label_space()
    predicted = found.predict(X)
    assert len(predicted) == 12 and all(one.function_space() == Y.V for one in predicted)
    wrong = Y.norm(Y.batch(predicted)) ** 2 - 12 * 0.125
    assert abs(wrong) < 0.02
    assert len(cross_val_predict(regressor(points=None, max_iter=2), X, shifts, cv=2)) == 12  # a list is divided


def test_each_sample_may_have_points_of_its_own_and_gaps(rng):
    def measured(samples):
        pairs, numbers, levels = [], rng.integers(1, 3, samples), rng.uniform(-1, 1, samples)
        for number, level in zip(numbers, levels):
            t = rng.uniform(0, 1, rng.integers(12, 20))
            values = level + np.cos(2 * np.pi * (number * t + rng.uniform()))
            values[rng.integers(t.size)] = np.nan
            pairs.append((t, values))
        return pairs, numbers, levels

    (X, y, levels), (X_test, y_test, levels_test) = measured(40), measured(20)
    assert classifier(points=None).fit(X, y).score(X_test, y_test) > 0.8
    assert regressor(points=None).fit(X, levels).score(X_test, levels_test) > 0.5
    # Without a domain, it is the interval that holds the times.
    found = classifier(domain=None, points=None).fit(X, y)
    assert found.domain_.make is fd.IntervalMesh and found.score(X_test[:1], y_test[:1]) == 1


def test_several_fields_are_read(rng):
    X, y, _ = waves(rng)
    noise = rng.normal(size=X.shape)
    both = np.stack([noise, X], axis=2)
    assert classifier(tikhonov=1e-2).fit(both, y).score(both, y) > 0.9
    with pytest.raises(ValueError, match=r"^X: expected numbers of shape \(samples, 40, 2\), got shape"):
        classifier().fit(both, y).predict(X)


def test_pictures_on_a_rectangle_and_on_a_disk(rng):
    labels = np.arange(24) % 2
    pictures = rng.normal(size=(24, 6, 8)) * 0.1
    pictures[:, :, :4] += labels[:, None, None]
    few = dict(layers=1, tikhonov=1e-2, max_iter=5, random_state=0)
    found = LabelFieldClassifier(**few).fit(pictures, labels)
    Y = found.domain_.label_space()
    assert Y.size == 48 and found.score(pictures, labels) == 1
    assert_allclose(Y.values(Y.image(pictures[0], extent=(0, 1, 0, 0.75)))[:, 0].sum(), pictures[0].sum())  # a node a pixel
    disk = DomainRecipe(fd.UnitDiskMesh, 2)
    inside = LabelFieldClassifier(disk, extent=(-0.7, 0.7, -0.7, 0.7), **few).fit(pictures, labels)
    assert inside.score(pictures, labels) == 1
    colours = np.stack([pictures, 0 * pictures], axis=3)
    assert LabelFieldClassifier(**few).fit(colours, labels).score(colours, labels) == 1


def test_what_keeps_a_symmetry_does_not_see_where_an_input_is_turned_to(rng):
    X, y, _ = waves(rng)
    turning = DomainRecipe(fd.PeriodicIntervalMesh, 40, 1.0, symmetries=turns)
    found = classifier(domain=turning, rank=9).fit(X, y)
    assert_allclose(found.predict_proba(np.roll(X, 7, axis=1)), found.predict_proba(X), atol=1e-6)
    moved = regressor(domain=turning, rank=9, target_points=T).fit(X, X**2)
    assert_allclose(moved.predict(np.roll(X, 7, axis=1)), np.roll(moved.predict(X), 7, axis=1), atol=1e-6)
    assert moved.score(X, X**2) > 0.9
    odd = DomainRecipe(fd.PeriodicIntervalMesh, 40, 1.0, symmetries=reflection)
    mirrored = regressor(domain=odd, rank=9, target_points=T).fit(X, X**3)
    there = -np.roll(X[:, ::-1], 1, axis=1)
    assert_allclose(mirrored.predict(there), -np.roll(mirrored.predict(X)[:, ::-1], 1, axis=1), atol=1e-6)


# -- kinds of y --------------------------------------------------------------------------------------------------------


def test_numbers_and_functions_are_learned_in_the_form_of_y(rng):
    X, _, levels = waves(rng, 40)
    for y in (levels, levels[:, None], np.column_stack([levels, 5 - 100 * levels])):
        found = regressor().fit(X, y)
        assert found.predict(X).shape == y.shape and found.score(X, y) > 0.9
    places = np.linspace(0, 1, 15, endpoint=False)
    shifted = np.array([np.interp((places + 0.1) % 1, T, row, period=1) for row in X])
    found = regressor(target_points=places).fit(X, 2 + 3 * shifted)
    assert found.predict(X).shape == (40, 15) and found.score(X, 2 + 3 * shifted) > 0.95


# -- weights, early stopping, partial fit ------------------------------------------------------------------------------


def test_a_weight_of_zero_leaves_a_sample_out_and_of_two_takes_it_twice(rng):
    X, y, levels = waves(rng, 20)
    weights = rng.integers(0, 3, 20)
    repeated = np.repeat(np.arange(20), weights)
    for make, target, method in ((classifier, y, "predict_proba"), (regressor, levels, "predict")):
        # Twice as many points chose another smoothing, so it is left to the kind of a Function. Round-off grows in five steps.
        weighted = make(max_iter=5).fit(X, target, weights)
        others = make(max_iter=5).fit(X[repeated], target[repeated])
        assert_allclose(getattr(weighted, method)(X), getattr(others, method)(X), atol=1e-5)


@pytest.mark.parametrize("make", [classifier, regressor])
def test_early_stopping_keeps_the_best_state(rng, make):
    X, numbers, levels = waves(rng, 40)
    noisy = X + rng.normal(size=X.shape)
    y = numbers if make is classifier else levels
    found = make(early_stopping=True, validation_fraction=0.3, n_iter_no_change=4, max_iter=40, tikhonov=1e-6).fit(noisy, y)
    losses = found.validation_curve_
    assert found.reason_ == "PATIENCE" and found.n_iter_ == losses.argmin() + 4 == len(losses) - 1
    longer = make(early_stopping=True, validation_fraction=0.3, max_iter=int(losses.argmin()), tikhonov=1e-6).fit(noisy, y)
    assert_allclose(found.predict(noisy), longer.predict(noisy), rtol=1e-8)


def test_partial_fit_goes_on_and_knows_its_classes(rng):
    X, numbers, levels = waves(rng, 64)
    y = np.array(["one", "two", "three"])[numbers - 1]
    found = classifier(learning_rate=0.03)
    with pytest.raises(ValueError, match="^classes: expected all classes in the first call of partial_fit, got None"):
        found.partial_fit(X, y)
    for _ in range(15):
        found.partial_fit(X, y, classes=["one", "two", "three"])
    assert found.n_iter_ == 15 and len(found.classes_) == 3 and found.score(X, y) > 0.9
    with pytest.raises(ValueError, match=r"^classes: expected those of the first call, \['one', 'three', 'two'\], got"):
        found.partial_fit(X, y, classes=["one"])
    with pytest.raises(ValueError, match=r"^y: expected the classes \['one', 'three', 'two'\], got .*four"):
        found.partial_fit(X[:1], ["four"])
    number = regressor(learning_rate=0.03)
    errors = [1 - number.partial_fit(X, levels).score(X, levels) for _ in range(15)]
    assert errors[-1] < 0.8 * errors[0]
    again = pickle.loads(pickle.dumps(number)).partial_fit(X, levels)
    assert_allclose(again.predict(X), number.partial_fit(X, levels).predict(X), atol=1e-6)


# -- defaults ----------------------------------------------------------------------------------------------------------


def test_rank_and_tikhonov_are_chosen_by_the_samples(rng):
    X, numbers, levels = waves(rng, 40)
    assert classifier(max_iter=0).fit(X, numbers).rank_ == 5  # constants, and two waves of the numbers 1 and 2 each
    clean = regressor(tikhonov=None, max_iter=8).fit(X, levels)
    noisy = regressor(tikhonov=None, max_iter=8).fit(X, rng.normal(size=40))
    assert noisy.tikhonov_ > clean.tikhonov_


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"domain": 3}, "domain: expected a DomainRecipe or None, got int"),
        ({"points": T[:5]}, r"X: expected shape \(samples, 5\), or"),
        ({"points": None}, "points: expected where the values of X are on the label domain, got None"),
        ({"points": np.zeros((2, 2, 2))}, r"points: expected shape \(points, dimension\), got"),
        ({"tikhonov": 0}, "tikhonov: expected a positive number, got 0"),
        ({"channels": 0}, "channels: expected a positive integer, got 0"),
        ({"activation": "no"}, "activation: expected one of"),
        ({"early_stopping": 1}, "early_stopping: expected True or False, got 1"),
        ({"validation_fraction": 1.0}, "validation_fraction: expected a number > 0 and < 1"),
    ],
)
def test_wrong_parameters_are_refused_by_fit(rng, changes, message):
    X, y, _ = waves(rng)
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        classifier(**changes).fit(X, y)


def test_wrong_samples_are_refused(rng):
    X, y, levels = waves(rng)
    with pytest.raises(ValueError, match="^y: expected 24 targets, one a sample, got 23"):
        classifier().fit(X, y[:-1])
    with pytest.raises(ValueError, match="^y: expected at least two classes, got one class"):
        classifier().fit(X, 0 * y)
    with pytest.raises(ValueError, match="^sample_weight: expected a number > 0 among them, got zeros alone"):
        regressor().fit(X, levels, 0 * levels)
    with pytest.raises(ValueError, match=r"^sample_weight: expected numbers >= 0 of shape \(24,\)"):
        regressor().fit(X, levels, -levels)
    with pytest.raises(ValueError, match="^domain: expected a DomainRecipe for such samples, got None"):
        classifier(domain=None, points=rng.normal(size=(40, 2))).fit(X, y)


def test_a_recipe_pickles_with_what_it_says():
    recipe = DomainRecipe(read_mesh, "meshes/gear.msh", degree=2, symmetries=turns)
    assert repr(recipe) == "DomainRecipe(read_mesh, 'meshes/gear.msh', degree=2, symmetries=turns)"
    assert repr(pickle.loads(pickle.dumps(recipe))) == repr(recipe)
    with pytest.raises(AttributeError, match="degree: a DomainRecipe stays what it was made with"):
        recipe.degree = 3
    with pytest.raises(TypeError, match="^make: expected a MeshGeometry or LabelSpace, got int"):
        DomainRecipe(len, "two").label_space()
    with pytest.raises(TypeError, match="^make: expected a function that returns a mesh or a label space, got 3"):
        DomainRecipe(3)


@on_ranks
def test_a_basis_of_a_recipe_keeps_eigenspaces_whole():
    ranks = [CIRCLE.basis(most).rank for most in range(1, 8)]
    assert ranks == [1, 1, 3, 3, 5, 5, 7]  # the constants, then two waves of each number
    phi = laplace_basis(LabelSpace(CIRCLE.label_space().V), 5)
    assert_allclose(CIRCLE.basis(6).values, phi.values, atol=1e-7)


def turns_about_the_axis(mesh):
    x = fd.SpatialCoordinate(mesh)
    return [fd.as_vector([-x[1], x[0], *[0 * x[0]] * (len(x) - 2)])]


SPHERE = DomainRecipe(fd.UnitIcosahedralSphereMesh, 1, family="KMV", degree=2, symmetries=turns_about_the_axis)


@on_ranks
def test_a_basis_keeps_eigenspaces_whole_that_the_mesh_splits_where_symmetries_are_given():
    """An icosahedral mesh splits spherical harmonics of a degree l from 3 on; (l + 1)^2 functions are whole eigenspaces."""
    assert SPHERE.ranks() == [1, 4, 9, 16, 25, 36, 49]
    split = DomainRecipe(fd.UnitIcosahedralSphereMesh, 1, family="KMV", degree=2)
    assert not set(split.ranks()) <= set(SPHERE.ranks())
    assert [SPHERE.basis(most).rank for most in (3, 12, 40, 48)] == [1, 9, 36, 36]
    disk = DomainRecipe(fd.UnitDiskMesh, 2, symmetries=turns_about_the_axis)  # on fewer functions than it tells apart
    ranks = disk.ranks()
    assert ranks[:5] == [1, 3, 5, 6, 8] and ranks[-1] < disk.label_space().size
    for recipe in (SPHERE, disk):
        for rank in recipe.ranks():
            assert len(symmetry_matrices(recipe.basis(rank), recipe.kept_symmetries()).blocks) > 0  # none is refused


@on_ranks
def test_estimators_take_ranks_that_cut_no_eigenspace(rng, caplog):
    """Also where the user asks for another one, and then with a message."""
    Y = SPHERE.label_space()
    x, y, z = Y.coordinates.T[..., None]
    a, b = rng.normal(size=(2, 12))
    X = Y.batch(a * (5 * z**3 - 3 * z) + b * x * y * z)  # of degree 3, which the mesh splits
    few = dict(domain=SPHERE, channels=1, layers=1, max_iter=2, tikhonov=1e-3, random_state=0)
    split = DomainRecipe(fd.UnitIcosahedralSphereMesh, 1, family="KMV", degree=2)
    assert (
        LabelFieldRegressor(**few | dict(domain=split)).fit(X, a).rank_ not in SPHERE.ranks()
    )  # the samples ask for a cut one
    assert LabelFieldRegressor(**few).fit(X, a).rank_ == 16
    assert not caplog.records
    found = LabelFieldRegressor(**few, rank=12).fit(X, a)
    assert found.rank_ == 9
    said = (
        []
        if COMM_WORLD.rank
        else ["rank: a channel has 9 functions, not 12: as many as leave no eigenspace cut, on this mesh"]
    )
    assert [record.getMessage() for record in caplog.records] == said


def test_what_is_no_symmetry_is_refused_and_not_met_by_fewer_functions():
    square = DomainRecipe(fd.RectangleMesh, 4, 4, 1.0, 1.0, -1.0, -1.0, symmetries=turns_about_the_axis)
    with pytest.raises(ValueError, match="^symmetries.*: expected"):
        square.basis(9)
