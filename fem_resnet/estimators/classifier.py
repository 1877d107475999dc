"""`LabelFieldClassifier`: classes of functions on a label domain."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import ClassifierMixin

from fem_resnet.estimators.base import LabelFieldEstimator
from fem_resnet.estimators.targets import checked_classes
from fem_resnet.learning.loss import cross_entropy

__all__ = ["LabelFieldClassifier"]


class LabelFieldClassifier(ClassifierMixin, LabelFieldEstimator):
    """Classes of functions on a label domain, by a residual network on it; scikit-learn's protocol.

    The network and its head minimise the cross entropy with Tikhonov's term; the head is eliminated (variable projection).
    Class labels are of any type. Collective over the communicator of the label domain.

    Parameters
    ----------
    domain
        How the label domain is made. If left out, a table of numbers gets an interval with a cell for each feature, values at
        numbers `points` an interval that holds them, and pictures a rectangle.
    points
        Where values of X are on the label domain, shape (points, dimension) or (points,); None where X says it itself.
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
    classes_ : numpy.ndarray
        The classes, sorted, shape (classes,).
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
    >>> from fem_resnet import LabelFieldClassifier
    >>> t, random = np.linspace(0, 1, 30), np.random.default_rng(0)
    >>> labels = random.choice(["slow", "fast"], 40)
    >>> speed = np.where(labels == "slow", 1, 2)[:, None]
    >>> curves = np.sin(2 * np.pi * (speed * t + random.uniform(size=(40, 1))))
    >>> estimator = LabelFieldClassifier(points=t, max_iter=10, tikhonov=1e-3, random_state=0).fit(curves, labels)
    >>> estimator.score(curves, labels)
    1.0
    """

    _prediction, _loss = "softmax", cross_entropy

    def partial_fit(
        self, X: Any, y: ArrayLike, classes: ArrayLike | None = None, sample_weight: ArrayLike | None = None
    ) -> Self:
        """One pass of stochastic gradients over samples, from where the last call has ended. Collective.

        The first call fixes label domain, scaling and rank by its samples, and the classes.

        Parameters
        ----------
        X
            As for `fit`.
        y
            Classes, shape (samples,).
        sample_weight
            Weights >= 0 of the samples, shape (samples,); equal ones if left out.
        classes
            All classes that there will be, shape (classes,): in the first call, if `fit` was not called before.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            As `fit`; if the first call has no classes, a later one has others, or y has one that is not among them.
        """
        if not hasattr(self, "_arrays"):
            if classes is None:
                raise ValueError("classes: expected all classes in the first call of partial_fit, got None")
            self._given_classes = np.unique(classes)
        elif classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise ValueError(f"classes: expected those of the first call, {self.classes_.tolist()}, got {classes!r}")
        try:
            return self._partial_fit(X, y, sample_weight)
        finally:
            self.__dict__.pop("_given_classes", None)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes, shape (samples, classes), in the order of `classes_`. Collective.

        Parameters
        ----------
        X
            Samples, of the kind that `fit` has seen.

        Raises
        ------
        TypeError, ValueError
            If X is of another kind.
        """
        model, final = self._outputs(X)
        scores = model.head.scores(final)
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each sample, shape (samples,); arguments and errors as of `predict_proba`. Collective."""
        likeliest = self.predict_proba(X).argmax(axis=1)
        return self.classes_[likeliest]

    def _prepared_targets(self, y, weights):
        y = checked_classes(y, weights.size)
        self.classes_ = getattr(self, "_given_classes", None)
        if self.classes_ is None:
            self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise ValueError(f"y: expected at least two classes, got one class, {self.classes_[0]!r}")
        return self._seen_targets(y, weights.size), len(self.classes_)

    def _seen_targets(self, y, samples):
        y = checked_classes(y, samples)
        numbers = np.minimum(np.searchsorted(self.classes_, y), len(self.classes_) - 1)
        if (self.classes_[numbers] != y).any():
            bad = y[self.classes_[numbers] != y][0]
            raise ValueError(f"y: expected the classes {self.classes_.tolist()}, got {bad!r}")
        return numbers

    def _as_target(self, model, targets):
        return targets.tolist()

    def _strata(self, targets):
        return targets if np.bincount(targets)[np.unique(targets)].min() > 1 else None
