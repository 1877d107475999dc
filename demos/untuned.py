r"""Estimators with nothing tuned
=============================

`LabelFieldClassifier` and `LabelFieldRegressor` are used as they come: only the label domain is said, where the points of the
samples are, and, where they are known, the symmetries of the domain. Rank, scaling, smoothing and Tikhonov's weight are chosen
by the estimators themselves. Beside them stand four estimators of scikit-learn on the same samples, whose widths and weights
are tuned by cross-validation. Five problems:

- **digits**: scikit-learn's pictures of 8 x 8 pixels, on a square. Ten classes.
- **outlines**: leaves of OSULeaf, a function on the circle with 427 values; the circle may be turned. Six classes.
- **day cycles**: a day's temperatures, measured at 6 to 30 times that differ from day to day. The number asked for is that of
  the degree-hours above a threshold.
- **sphere**: vorticity in a thin layer of fluid on a rotating sphere, from one time to a later one: a function. The sphere may
  be turned about its axis.
- **Burgers**: from u(., 0) to u(., 1) on a circle, which may be turned: a function.

The others need values at the same points: days are interpolated linearly to every half hour for them. Run

    containers/run python demos/untuned.py            (about a quarter of an hour of a core; --short for 20 s)

It writes a table and a figure to demos/output/. Errors are those of test samples: the part
of wrong classes, the root mean square error over the deviation of the numbers, the mean of relative errors in L2 of functions.
"""

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SHORT = "--short" in sys.argv
sys.argv = [argument for argument in sys.argv if argument != "--short"]  # PETSc would take it for an option of its own
sys.path.append(str(Path(__file__).parent / "atlas"))

import firedrake as fd
import numpy as np
import outlines
import vorticity
from burgers_on_the_circle import LENGTH, MODES, at, burgers, inputs
from matplotlib.figure import Figure
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.multioutput import MultiOutputRegressor
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import LabelBinarizer
from sklearn.svm import SVC, SVR

from fem_resnet import DomainRecipe, LabelFieldClassifier, LabelFieldRegressor, plot

SEEDS = 4

NOTE = """\
Mean and deviation of test errors over four seeds, and CPU seconds of fits and predictions on a loaded machine. Nothing of the
estimator is tuned; the others are tuned by cross-validation on the same samples. On outlines, sphere and Burgers the estimator
also knows which turns keep the label domain; the others do not. Outlines have one split: only starting values differ there.
On digits the estimator stays behind the best of the others by a factor of about two, and on day cycles a little; it mostly
takes more CPU seconds. No better default for digits has been looked for.
"""

# %% The problems
# A problem has samples for the estimator, and the same as rows of a table for the others.


@dataclass
class Problem:
    """Samples of one seed; `error` says how wrong predictions of the test samples are."""

    estimator: BaseEstimator
    train: tuple
    test: tuple
    #: What the others see of the samples.
    rows: tuple
    error: object


def circle_turns(mesh):
    return [fd.as_vector([fd.Constant(1.0)])]


def turns_about_the_axis(mesh):
    x, y, z = fd.SpatialCoordinate(mesh)
    return [fd.as_vector([-y, x, 0 * z])]


def wrong(y):
    return lambda found: np.mean(found != y)


def deviation(y):
    return lambda found: np.sqrt(np.mean((found - y) ** 2)) / y.std()


def in_l2(y, weights):
    size = np.sqrt((weights * y**2).sum(axis=1))
    return lambda found: np.mean(np.sqrt((weights * (found - y) ** 2).sum(axis=1)) / size)


def digits(seed, short):
    """Pictures as they are: 500 for training, 540 for tests."""
    data = load_digits()
    x, x_test, y, y_test = train_test_split(data.images, data.target, test_size=540, stratify=data.target, random_state=seed)
    x, y = (x[:100], y[:100]) if short else (x[:500], y[:500])
    rows = tuple(part.reshape(len(part), -1) for part in (x, x_test))
    return Problem(LabelFieldClassifier(), (x, y), (x_test, y_test), rows, wrong(y_test))


def leaves(seed, short):
    """200 outlines for training, 242 for tests."""
    try:
        data = outlines.leaves(str(Path(__file__).parent / "output" / "data"))
    except outlines.NotThere:
        data = outlines.made_up(200, 242)
    x, y, x_test, y_test = (data[name] for name in ("inputs", "labels", "test_inputs", "test_labels"))
    if short:
        x, y, x_test, y_test = x[::4], y[::4], x_test[::4], y_test[::4]
    circle = DomainRecipe(fd.PeriodicIntervalMesh, 96, 1.0, symmetries=circle_turns)
    points = np.arange(outlines.POINTS) / outlines.POINTS
    return Problem(LabelFieldClassifier(circle, points=points), (x, y), (x_test, y_test), (x, x_test), wrong(y_test))


THRESHOLD = 18.0


def days(number, random):
    """Times, temperatures, and degree-hours above the threshold, of so many days."""
    t = np.arange(0, 24, 0.05)

    def course(t, c):
        angle = 2 * np.pi * np.asarray(t)[..., None] / 24 * np.arange(1, 5)
        return c[0] + np.cos(angle) @ c[1:5] + np.sin(angle) @ c[5:]

    samples, degree_hours = [], []
    for _ in range(number):
        c = random.normal(size=9) * [4, 4, 1.5, 0.7, 0.4, 4, 1.5, 0.7, 0.4] + [15, -4, 0, 0, 0, -3, 0, 0, 0]
        times = np.sort(random.uniform(0, 24, random.integers(6, 31)))
        samples.append((times, course(times, c) + 0.3 * random.normal(size=times.size)))
        degree_hours.append(np.maximum(course(t, c) - THRESHOLD, 0).mean() * 24)
    return samples, np.array(degree_hours)


def day_cycles(seed, short):
    """300 days for training, 300 for tests."""
    random = np.random.default_rng(seed)
    (x, y), (x_test, y_test) = (days(60 if short else 300, random) for _ in range(2))
    clock = np.arange(0, 24, 0.5)
    rows = tuple(np.array([np.interp(clock, *day, period=24) for day in part]) for part in (x, x_test))
    day = DomainRecipe(fd.PeriodicIntervalMesh, 48, 24.0)
    return Problem(LabelFieldRegressor(day), (x, y), (x_test, y_test), rows, deviation(y_test))


def sphere(seed, short):
    """Vorticity at 512 points: 300 samples for training, 200 for tests."""
    data, test = vorticity.samples(30 if short else 300, 10 + seed), vorticity.samples(20 if short else 200, 5)
    ball = DomainRecipe(fd.UnitIcosahedralSphereMesh, 2, family="KMV", degree=2, symmetries=turns_about_the_axis)
    estimator = LabelFieldRegressor(ball, points=data["points"], target_points=data["points"])
    x, y, x_test, y_test = data["inputs"], data["targets"], test["inputs"], test["targets"]
    return Problem(estimator, (x, y), (x_test, y_test), (x, x_test), in_l2(y_test, data["weights"]))


def burgers_equation(seed, short):
    """Values at 64 points: 300 samples for training, 200 for tests."""
    points = LENGTH * np.arange(64) / 64
    c, c_test = inputs(30 if short else 300, 10 + seed), inputs(20 if short else 200, 1)
    x, x_test = (at(part, points, 32).T for part in (c, c_test))
    y, y_test = (at(burgers(part), points, MODES).T for part in (c, c_test))
    circle = DomainRecipe(fd.PeriodicIntervalMesh, 96, LENGTH, symmetries=circle_turns)
    estimator = LabelFieldRegressor(circle, points=points, target_points=points)
    return Problem(estimator, (x, y), (x_test, y_test), (x, x_test), in_l2(y_test, 1.0))


PROBLEMS = {
    "digits": digits,
    "outlines": leaves,
    "day cycles": day_cycles,
    "sphere": sphere,
    "Burgers": burgers_equation,
}

# %% The others
# Values are divided by one number, so that a width means the same everywhere. Functions y are given by their principal
# components, 20 of them for the support vector machines, which know one number at a time.


class KernelRidgeClassifier(ClassifierMixin, BaseEstimator):
    """The class of the largest value, by kernel ridge regression onto indicators of the classes."""

    def __init__(self, alpha=1.0, gamma=1.0):
        self.alpha, self.gamma = alpha, gamma

    def fit(self, X, y):
        self.classes_ = np.unique(y)
        self.ridge_ = KernelRidge(kernel="rbf", alpha=self.alpha, gamma=self.gamma)
        self.ridge_.fit(X, LabelBinarizer().fit(self.classes_).transform(y))
        return self

    def predict(self, X):
        return self.classes_[self.ridge_.predict(X).argmax(axis=1)]


#: gamma of Gaussian kernels, in parts of the mean square distance from the mean.
WIDTHS = np.logspace(-2, 0.5, 6)


def others(problem, seed):
    """Tuned estimators by name, for rows of size one."""
    classes = isinstance(problem.estimator, LabelFieldClassifier)
    alphas, layers = np.logspace(-8, 0, 5), [(100,), (100, 100)]
    if classes:
        return {
            "multilayer perceptron": (MLPClassifier(max_iter=300, random_state=seed), {"hidden_layer_sizes": layers}),
            "support vector machine": (SVC(), {"C": [1, 10, 100], "gamma": WIDTHS}),
            "kernel ridge": (KernelRidgeClassifier(), {"alpha": alphas, "gamma": WIDTHS}),
            "nearest neighbours": (KNeighborsClassifier(), {"n_neighbors": [1, 3, 5, 9]}),
        }
    # An SVR knows one number: functions are given to it by principal components.
    svr, of = SVR(epsilon=0.01), ""
    if np.ndim(problem.train[1]) == 2:
        svr = TransformedTargetRegressor(
            MultiOutputRegressor(svr),
            transformer=PCA(min(20, len(problem.train[1]) // 2), random_state=seed),
            check_inverse=False,
        )
        of = "regressor__estimator__"
    return {
        "multilayer perceptron": (MLPRegressor(max_iter=300, random_state=seed), {"hidden_layer_sizes": layers}),
        "support vector machine": (svr, {f"{of}C": [10, 1000], f"{of}gamma": WIDTHS[:4]}),
        "kernel ridge": (KernelRidge(kernel="rbf"), {"alpha": alphas, "gamma": WIDTHS}),
        "nearest neighbours": (KNeighborsRegressor(), {"n_neighbors": [1, 3, 5, 9]}),
    }


def errors(problem, seed):
    """Name, test error and CPU seconds of all."""
    x, y = problem.train
    start = time.process_time()
    estimator = clone(problem.estimator).set_params(random_state=seed).fit(x, y)
    yield "estimator", problem.error(estimator.predict(problem.test[0])), time.process_time() - start
    rows, tested = problem.rows
    middle, size = rows.mean(axis=0), np.sqrt(((rows - rows.mean(axis=0)) ** 2).sum(axis=1).mean())
    classes = isinstance(problem.estimator, LabelFieldClassifier)
    for name, (model, grid) in others(problem, seed).items():
        start = time.process_time()
        # The perceptron's rate is meant for features of size one.
        factor = np.sqrt(rows.shape[1]) if name == "multilayer perceptron" else 1.0
        train, test = (factor * (part - middle) / size for part in (rows, tested))
        if classes:
            found = GridSearchCV(model, grid, cv=3).fit(train, y).predict(test)
        else:
            offset, scale = y.mean(axis=0), y.std()
            search = GridSearchCV(model, grid, cv=3, scoring="neg_mean_squared_error")
            found = offset + scale * search.fit(train, (y - offset) / scale).predict(test)
        yield name, problem.error(found), time.process_time() - start


# %% All together


def table(found):
    """Markdown: mean errors in per cent, deviations, and CPU seconds; the best mean of each problem is marked."""
    methods = list(dict.fromkeys(name for _, name in found))
    yield "| test error, % | " + " | ".join(PROBLEMS) + " |"
    yield "|---" * (1 + len(PROBLEMS)) + "|"
    best = {problem: min(np.mean(found[problem, name], axis=0)[0] for name in methods) for problem in PROBLEMS}
    for name in methods:
        cells = []
        for problem in PROBLEMS:
            rows = np.array(found[problem, name])
            mean, seconds = rows.mean(axis=0)
            text = f"{100 * mean:.2f}"
            spread = f" ± {100 * rows[:, 0].std(ddof=1):.2f}" if len(rows) > 1 else ""
            cells.append(f"{f'**{text}**' if mean == best[problem] else text}{spread}, {seconds:.0f} s")
        yield f"| {name} | " + " | ".join(cells) + " |"


def draw(path, found):
    """Test errors of all methods in per cent, a panel a problem: a dot for each seed, and their mean."""
    figure = Figure(figsize=(14, 3), layout="constrained")
    for ax, problem in zip(figure.subplots(1, len(PROBLEMS), sharey=True), PROBLEMS):
        runs = {method: 100 * np.array(rows)[:, 0] for (name, method), rows in found.items() if name == problem}
        plot.comparison(runs, marked=["estimator"], log=True, xlabel="test error, %", ax=ax).set_title(problem)
    plot.save(path, figure)


def main(short=False):
    """Returns the mean errors of the estimator, by problem."""
    found, first = {}, fd.COMM_WORLD.rank == 0
    output = Path(__file__).parent / "output"
    for seed in range(1 if short else SEEDS):
        for name, make in PROBLEMS.items():
            for method, error, seconds in errors(make(seed, short), seed):
                found.setdefault((name, method), []).append((error, seconds))
                if first:
                    print(f"seed {seed}, {name}: {method} {error:.2%} in {seconds:.0f} s", flush=True)
        output.mkdir(exist_ok=True)
        draw(output / "untuned.png", found)
        if first and not short:  # after each seed: a run may be cut short
            (output / "untuned.txt").write_text("\n".join(table(found)) + "\n\n" + NOTE)
    if first:
        print("\n".join(table(found)))
    ours = {name: float(np.mean(found[name, "estimator"], axis=0)[0]) for name in PROBLEMS}
    # Far better than the most frequent class, and than the mean of numbers and functions.
    assert short or max(ours.values()) < 0.6
    return ours


if __name__ == "__main__":
    logging.getLogger("fem_resnet").setLevel(logging.ERROR)  # of iterations that end at their limit
    main(SHORT)
