"""`LabelFieldRegressor`: numbers or functions from functions on a label domain."""

from __future__ import annotations

from typing import Any, Self

import firedrake as fd
import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import RegressorMixin
from sklearn.metrics import r2_score

from fem_resnet.estimators.base import LabelFieldEstimator
from fem_resnet.estimators.domain import DomainRecipe
from fem_resnet.estimators.inputs import AtPoints, Functions, are_functions, samples_of, values_at
from fem_resnet.estimators.targets import Numbers, checked_numbers, checked_weights
from fem_resnet.label_domain.sensors import Sensors
from fem_resnet.learning.loss import least_squares

__all__ = ["LabelFieldRegressor"]


class LabelFieldRegressor(RegressorMixin, LabelFieldEstimator):
    """Numbers or functions from functions on a label domain, by a residual network on it; scikit-learn's protocol.

    The network and its head minimise the least squares with Tikhonov's term; the head is eliminated (variable projection).
    y is a number or several a sample, values at `target_points`, or Functions. Collective over the communicator of the label
    domain.

    Parameters
    ----------
    domain
        How the label domain is made. If left out, a table of numbers gets an interval with a cell for each feature, values at
        numbers `points` an interval that holds them, and pictures a rectangle.
    points
        Where values of X are on the label domain, shape (points, dimension) or (points,); None where X says it itself.
    target_points
        Where values of y are on the label domain, shape (points, dimension) or (points,): y then is a function. None where y
        are numbers, or Functions.
    extent
        (left, right, bottom, top), shape (4,): where the edges of pictures are, as for `LabelSpace.image`, with zeros around
        them. If left out, they are laid onto the bounding box of the label domain.
    rank
        How many Laplace eigenfunctions a channel has, at most: as many as leave no eigenspace cut. If left out, as many as
        hold all but a thousandth of the squares of inputs and functions y, or all but twice what 64 leave; of a table 64.
    channels, layers
        Channels of the label domain, and layers, of length one each.
    activation
        The name of sigma, one of `ACTIVATIONS`.
    tikhonov
        lambda > 0 of Tikhonov's term for functions of size one. If left out, it is the one of 1, 3e-2, 1e-3, 3e-5 and 1e-6
        with the least loss of samples that are held out, each once of up to 150 samples, or a third of more; of fewer than 20
        it is 1e-3.
    max_iter
        The largest number of iterations of each training.
    early_stopping
        Whether a part of the samples is not trained with. The estimator then keeps the state of least loss on it.
    validation_fraction
        That part, between 0 and 1; of classes the same part of each.
    n_iter_no_change
        With early stopping: iterations without a smaller loss on it, after which the training ends.
    learning_rate
        Of `partial_fit`, > 0.
    random_state
        Seed of starting values and parts, or NumPy's generator; on several ranks that of rank 0 counts.

    Attributes
    ----------
    domain_ : DomainRecipe
        The label domain.
    rank_, n_iter_ : int
        Functions of a channel; iterations, or calls of `partial_fit`.
    tikhonov_ : float
        lambda.
    loss_curve_ : numpy.ndarray
        J at the start and after each iteration, shape (n_iter_ + 1,).
    validation_curve_ : numpy.ndarray
        The loss of the validation part likewise; shape (0,) without one.
    reason_ : str
        Why the training ended: a reason of TAO or of `train_levenberg_marquardt`, or "PATIENCE".

    Notes
    -----
    Parameters are checked by `fit`. A fitted estimator pickles: coefficients, and how the label domain is made. Functions are
    on the mesh of a process and do not pickle: give arrays where scikit-learn uses several processes.

    A table of numbers is a function on an interval because its columns have an order. Where these are samples of a curve that
    helps; where they are age, weight and income the estimator is a residual network like others.

    Examples
    --------
    >>> import numpy as np
    >>> from fem_resnet import LabelFieldRegressor
    >>> t, random = np.linspace(0, 1, 30), np.random.default_rng(0)
    >>> size = random.uniform(1, 2, (40, 1))
    >>> curves = size * np.sin(2 * np.pi * (t + random.uniform(size=(40, 1))))
    >>> estimator = LabelFieldRegressor(points=t, tikhonov=1e-4, random_state=0).fit(curves, size[:, 0] ** 2)
    >>> estimator.score(curves, size[:, 0] ** 2) > 0.99
    True
    """

    _prediction, _loss = "identity", least_squares

    def __init__(
        self,
        domain: DomainRecipe | None = None,
        *,
        points: ArrayLike | None = None,
        target_points: ArrayLike | None = None,
        extent: tuple[float, float, float, float] | None = None,
        rank: int | None = None,
        channels: int = 2,
        layers: int = 4,
        activation: str = "tanh",
        tikhonov: float | None = None,
        max_iter: int = 40,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        learning_rate: float = 0.01,
        random_state: int | np.random.RandomState | None = None,
    ):
        super().__init__(
            domain, points=points, extent=extent, rank=rank, channels=channels, layers=layers, activation=activation,
            tikhonov=tikhonov, max_iter=max_iter, early_stopping=early_stopping, validation_fraction=validation_fraction,
            n_iter_no_change=n_iter_no_change, learning_rate=learning_rate, random_state=random_state,
        )  # fmt: skip
        self.target_points = target_points

    _replicated = (*LabelFieldEstimator._replicated, "target_points")

    def partial_fit(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> Self:
        """One pass of stochastic gradients over samples, from where the last call has ended. Collective.

        The first call fixes label domain, scaling and rank by its samples.

        Parameters
        ----------
        X, y
            As for `fit`.
        sample_weight
            Weights >= 0 of the samples, shape (samples,); equal ones if left out.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            As `fit`.
        """
        return self._partial_fit(X, y, sample_weight)

    def predict(self, X: Any) -> np.ndarray | list[fd.Function]:
        """What the network says of each sample, in the form of y. Collective.

        Parameters
        ----------
        X
            Samples, of the kind that `fit` has seen.

        Returns
        -------
        numpy.ndarray or list of Function
            Numbers, shape (samples,) or (samples, outputs); with `target_points` values there, shape (samples, points); where
            y were Functions, these, on ``domain_.label_space()``.

        Raises
        ------
        TypeError, ValueError
            If X is of another kind.
        """
        model, final = self._outputs(X)
        target, Y = self._target, self.domain_.label_space()
        if isinstance(target, Numbers):
            return target.original(model.head.scores(final))
        batch = Y.batch(target.offset + target.size * np.sqrt(Y.measure) * Y.values(model.head(final)))
        if isinstance(target, AtPoints):
            return np.transpose(Sensors(self.domain_.basis(1), target.points).evaluate(batch))
        return [Y.function(batch, k) for k in range(samples_of(batch))]

    def score(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> float:
        """The coefficient of determination R^2. Collective.

        For functions it is ``1 - sum_s omega_s int (y_s - p_s)^2 / sum_s omega_s int (y_s - m)^2``, m their mean; for numbers
        that of scikit-learn, the mean over the outputs.

        Parameters
        ----------
        X, y
            As for `fit`.
        sample_weight
            Weights >= 0 of the samples, shape (samples,); equal ones if left out.

        Raises
        ------
        TypeError, ValueError
            If X or y is of another kind than in `fit`.
        """
        found = self.predict(X)
        if not isinstance(self._target, Functions):
            return r2_score(y, found, sample_weight=sample_weight)
        Y = self.domain_.label_space()
        weights = checked_weights(sample_weight, samples_of(y))
        values, predicted = self._target.values(self.domain_, y), self._target.values(self.domain_, found)
        mean = (values @ weights)[:, None]
        missed, all_ = (Y.sum(Y.weights @ (values - other) ** 2) @ weights for other in (predicted, mean))
        return float(1 - missed / all_)

    def _prepared_targets(self, y, weights):
        if are_functions(y) or self.target_points is not None:
            kind = Functions() if are_functions(y) else values_at("y", y, "target_points", self.target_points)
            if samples_of(y) != weights.size:
                raise ValueError(f"y: expected {weights.size} targets, one a sample, got {samples_of(y)}")
            self._target = kind.prepared(self.domain_, y, weights, "output")
            return self._seen_targets(y, weights.size), 0
        self._target = Numbers.of(checked_numbers(y, weights.size), weights)
        return self._seen_targets(y, weights.size), len(self._target.offset)

    def _seen_targets(self, y, samples):
        if isinstance(self._target, Numbers):
            return self._target.scaled(checked_numbers(y, samples))
        return self._target.values(self.domain_, y) / np.sqrt(self.domain_.label_space().measure)  # of size one in L2

    def _as_target(self, model, targets):
        head = model.head
        if isinstance(self._target, Numbers):
            return head.Y.batch(np.ascontiguousarray(targets[head.Y.numbers]))
        return head.Y.batch(np.ascontiguousarray(targets))

    def _strata(self, targets):
        return None

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
