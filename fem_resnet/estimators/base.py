"""What `LabelFieldClassifier` and `LabelFieldRegressor` share: a learning problem in scikit-learn's protocol.

`fit` makes a label domain and functions of X (`inputs`), a network (`model`), and trains it (`fitting`). A fitted estimator
holds arrays and the recipe of its label domain, and makes the network again where it was unpickled.
"""

from __future__ import annotations

import logging
from typing import Any, Self

import firedrake as fd
import numpy as np
from numpy.typing import ArrayLike
from pyadjoint.tape import stop_annotating
from sklearn.base import BaseEstimator
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from fem_resnet.activation.activation import ACTIVATIONS
from fem_resnet.arguments import choice, flag, instance, integer, number, real_array
from fem_resnet.estimators.domain import MOST_MODES, DomainRecipe
from fem_resnet.estimators.fitting import USUAL, Stop, fit, regulariser_of, search
from fem_resnet.estimators.inputs import Table, are_functions, are_pairs, kind_of, samples_of
from fem_resnet.estimators.model import Design, Model
from fem_resnet.estimators.targets import checked_weights
from fem_resnet.learning.batch import Batch
from fem_resnet.learning.loss import Loss
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.log import log
from fem_resnet.ranks import on_first, same
from fem_resnet.training.signals import Signals
from fem_resnet.training.stochastic import train_stochastic
from fem_resnet.training.stochastic_steps import Adam

__all__ = ["LabelFieldEstimator"]

#: What functions of `rank` modes may leave of the squares of the training samples, if no rank is given.
_LEFT = 1e-3
#: Samples of a step of `partial_fit`.
_MINI_BATCH = 32


class LabelFieldEstimator(BaseEstimator):
    """What classifier and regressor share."""

    def __init__(
        self,
        domain: DomainRecipe | None = None,
        *,
        points: ArrayLike | None = None,
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
        self.domain = domain
        self.points = points
        self.extent = extent
        self.rank = rank
        self.channels = channels
        self.layers = layers
        self.activation = activation
        self.tikhonov = tikhonov
        self.max_iter = max_iter
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.learning_rate = learning_rate
        self.random_state = random_state

    _prediction: str
    _loss: Loss

    # -- fitting -------------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> Self:
        """Train on samples from new starting values. Collective over the communicator of the label domain.

        Parameters
        ----------
        X
            Samples, of one of the kinds of `inputs`; the same on every rank, but for Functions.
        y
            Their targets, one a sample.
        sample_weight
            Weights >= 0 of the samples, shape (samples,), of which only the proportions count; equal ones if left out.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            If a parameter of the estimator, X, y or the weights do not fit; or they differ between ranks.
        KeyboardInterrupt
            After Ctrl-C or SIGTERM while Tikhonov's weight is searched for. Later they end the training with what was reached,
            and `reason_` says so.
        """
        values, targets, weights = self._begin(X, y, sample_weight)
        model = self._model
        train, held = self._parts(targets, weights)
        batch = self._batch(model, values, targets, weights, train)
        problem = LearningProblem(model.net, model.head, self._loss, None, batch, lift=model.lift)
        seed, stopping = self._seed, held.size > 0
        stop = Stop(self.max_iter, self.n_iter_no_change if stopping else None, seed)
        with Signals(model.net.Y.comm) as signals:  # one for all trainings of the search
            self.tikhonov_ = search(problem, model, stop) if self.tikhonov is None else float(self.tikhonov)
            if signals.reason() is not None:
                raise KeyboardInterrupt("while Tikhonov's weight was searched for: nothing is fitted")
        model.start(seed)
        validation = self._batch(model, values, targets, weights, held) if stopping else None
        found = fit(problem.replace(regulariser=regulariser_of(self.tikhonov_, model)), validation, stop)
        self.loss_curve_, self.validation_curve_ = found.values, found.validation
        self.n_iter_, self.reason_ = len(found.values) - 1, found.reason
        self._arrays = model.arrays()
        return self

    def _partial_fit(self, X: Any, y: Any, sample_weight: ArrayLike | None) -> Self:
        """One pass of stochastic gradients over samples, from the present coefficients. Collective."""
        if hasattr(self, "_arrays"):
            self._check_settings()
            X, y = self._read(X, y, reset=False)
            weights = checked_weights(sample_weight, samples_of(X))
            values, targets = self._kind.values(self.domain_, X), self._seen_targets(y, weights.size)
        else:
            values, targets, weights = self._begin(X, y, sample_weight)
            self._model.start(self._seed)
            self.tikhonov_, self.n_iter_ = USUAL if self.tikhonov is None else float(self.tikhonov), 0
        model = self._network()
        batch = self._batch(model, values, targets, weights, np.flatnonzero(weights))
        regulariser = regulariser_of(self.tikhonov_, model)
        problem = LearningProblem(model.net, model.head, self._loss, regulariser, batch, lift=model.lift)
        train_stochastic(
            problem, Adam(self.learning_rate), batch_size=min(_MINI_BATCH, batch.samples), epochs=1, schedule="constant",
            seed=self.n_iter_,
        )  # fmt: skip
        self.n_iter_ += 1
        self._arrays = model.arrays()
        return self

    def _begin(self, X: Any, y: Any, sample_weight: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find out what X and y are, and make the network; node values, targets and weights. Collective."""
        self.__dict__.pop("_arrays", None)  # an error from here on leaves an estimator that is not fitted
        self._check_settings()
        X, y = self._read(X, y, reset=True)
        weights = checked_weights(sample_weight, samples_of(X))
        kind = kind_of(X, self.points, self.extent, self.domain)
        recipe = kind.recipe() if self.domain is None else self.domain
        comm = recipe.label_space().comm
        same(
            comm,
            y=None if are_functions(y) else y,
            sample_weight=sample_weight,
            **{name: getattr(self, name) for name in self._replicated},
        )
        self._kind, self.domain_ = kind.prepared(recipe, X, weights), recipe
        values = self._kind.values(recipe, X)
        targets, outputs = self._prepared_targets(y, weights)
        fields = [values.reshape(kind.fields, -1, weights.size)] + ([] if outputs else [targets[None]])
        self.rank_ = self._rank(recipe, fields, weights)
        self._design = Design(self.rank_, self.channels, self.layers, self.activation, kind.fields, outputs, self._prediction)
        self._seed = on_first(comm, self._drawn_seed)
        self._model = Model(recipe, self._design)
        return values, targets, weights

    def _rank(self, recipe: DomainRecipe, fields: list[np.ndarray], weights: np.ndarray) -> int:
        """How many functions hold the samples, in whole eigenspaces. Collective."""
        if self.rank is not None:
            found = recipe.basis(self.rank).rank
            if found != self.rank:
                log(
                    recipe.label_space().comm, logging.WARNING,
                    "rank: a channel has %d functions, not %d: as many as leave no eigenspace cut, on this mesh",
                    found, self.rank,
                )  # fmt: skip
            return found
        phi, ends = recipe.basis(MOST_MODES), recipe.ranks()
        if isinstance(self._kind, Table):
            return phi.rank
        left = np.zeros(len(ends))
        for field in fields:
            whole = sum(float(phi.Y.sum(np.einsum("n,ns,s->", phi.Y.weights, part**2, weights))) for part in field)
            held = np.sum([np.cumsum((phi.project(part) ** 2) @ weights) for part in field], axis=0)
            left = np.maximum(left, 1 - held[np.array(ends) - 1] / (whole or 1.0))
        return next((end for end, part in zip(ends, left) if part <= max(_LEFT, 2 * left[-1])), ends[-1])

    def _parts(self, targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the samples to train with, and of those of the validation part."""
        every = np.flatnonzero(weights)
        if not self.early_stopping:
            return every, every[:0]
        train, held = train_test_split(
            every, test_size=self.validation_fraction, random_state=self._seed, stratify=self._strata(targets[..., every])
        )
        return np.sort(train), np.sort(held)

    def _batch(self, model: Model, values: np.ndarray, targets: np.ndarray, weights: np.ndarray, chosen: np.ndarray) -> Batch:
        inputs = model.lift.fields.batch(np.ascontiguousarray(values[:, chosen]))
        return Batch(inputs, self._as_target(model, targets[..., chosen]), weights[chosen].tolist())

    # -- the network ---------------------------------------------------------------------------------------------------

    def _network(self) -> Model:
        """The network, made again where it was unpickled. Collective."""
        if not hasattr(self, "_model"):
            self._model = Model(self.domain_, self._design)
            self._model.write(self._arrays)
        return self._model

    def __getstate__(self):
        return {name: value for name, value in super().__getstate__().items() if name != "_model"}

    def _outputs(self, X: Any) -> tuple[Model, fd.Function]:
        """The network, and its final states. Collective."""
        check_is_fitted(self, "_arrays")
        X, _ = self._read(X, None, reset=False)
        with stop_annotating():
            model = self._network()
            return model, model.final(model.lift.fields.batch(self._kind.values(self.domain_, X)))

    # -- what comes from outside ---------------------------------------------------------------------------------------

    def _check_settings(self) -> None:
        instance("domain", self.domain, (DomainRecipe, type(None)), "DomainRecipe(UnitDiskMesh, 3) is one")
        for name in ("channels", "layers", "n_iter_no_change"):
            integer(name, getattr(self, name))
        integer("max_iter", self.max_iter, least=0)
        if self.rank is not None:
            integer("rank", self.rank)
        choice("activation", self.activation, ACTIVATIONS)
        if self.tikhonov is not None:
            number("tikhonov", self.tikhonov, above=0)
        if self.extent is not None:
            real_array("extent", self.extent, (4,))
        flag("early_stopping", self.early_stopping)
        number("validation_fraction", self.validation_fraction, above=0, below=1)
        number("learning_rate", self.learning_rate, above=0)

    def _drawn_seed(self) -> int:
        """From `random_state`."""
        try:
            return int(check_random_state(self.random_state).randint(2**31 - 1))
        except ValueError as error:
            raise ValueError(
                f"random_state: expected an integer from 0 to 2^32 - 1, NumPy's generator or None: {error}"
            ) from None

    #: Parameters that all ranks give alike.
    _replicated: tuple[str, ...] = (
        "points", "extent", "rank", "channels", "layers", "activation", "tikhonov", "max_iter", "early_stopping",
        "validation_fraction", "n_iter_no_change", "learning_rate",
    )  # fmt: skip

    def _read(self, X: Any, y: Any, reset: bool) -> tuple[Any, Any]:
        """X and y after scikit-learn's own checks, where X is an array."""
        if not (are_functions(X) or are_pairs(X)):
            gaps = "allow-nan" if self.points is not None else True
            X = validate_data(self, X, reset=reset, allow_nd=True, ensure_all_finite=gaps)
        return X, y

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = self.points is not None
        tags.input_tags.three_d_array = True
        return tags
