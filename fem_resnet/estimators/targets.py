"""What y of an estimator may be beside functions, for which the kinds of `inputs` serve too; and weights of samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d

from fem_resnet.arguments import real_array
from fem_resnet.estimators.inputs import sizes_of

__all__ = ["Numbers", "checked_classes", "checked_numbers", "checked_weights"]


@dataclass(frozen=True)
class Numbers:
    """Numbers, scaled each by itself: ``(y - offset) / size``.

    Attributes
    ----------
    offset, size : numpy.ndarray
        Shape (outputs,).
    columns : bool
        Whether y has a column for each, also where it is one.
    """

    offset: np.ndarray
    size: np.ndarray
    columns: bool

    @classmethod
    def of(cls, y: np.ndarray, weights: np.ndarray) -> Numbers:
        """From the targets, shape (samples,) or (samples, outputs), and the weights of the samples, whose sum is one."""
        columns = y.reshape(len(y), -1)
        offset = weights @ columns
        return cls(offset, sizes_of(weights @ (columns - offset) ** 2, weights @ columns**2), y.ndim > 1)

    def scaled(self, y: np.ndarray) -> np.ndarray:
        """Shape (outputs, samples)."""
        return ((y.reshape(len(y), -1) - self.offset) / self.size).T

    def original(self, scaled: np.ndarray) -> np.ndarray:
        """From shape (samples, outputs), in the shape of y."""
        found = self.offset + self.size * scaled
        return found if self.columns else found[:, 0]


def checked_classes(y: Any, samples: int) -> np.ndarray:
    """Class labels of any type, shape (samples,).

    Raises
    ------
    ValueError
        If y is None, or holds no class labels, or not so many.
    """
    _refuse_none(y)
    check_classification_targets(y)
    return _as_many(column_or_1d(y, warn=True), samples)


def checked_numbers(y: Any, samples: int) -> np.ndarray:
    """Numbers, shape (samples,) or (samples, outputs).

    Raises
    ------
    TypeError, ValueError
        If y is None, or holds no finite numbers, or not so many.
    """
    _refuse_none(y)
    y = np.asarray(y)
    y = real_array("y", y.astype(float) if y.dtype == object else y)
    if y.ndim not in (1, 2) or not y.size:
        raise ValueError(f"y: expected shape (samples,) or (samples, outputs), got {y.shape}")
    return _as_many(y, samples)


def checked_weights(sample_weight: Any, samples: int) -> np.ndarray:
    """Weights of samples, shape (samples,), whose sum is one; equal ones for None.

    Raises
    ------
    TypeError, ValueError
        If they are no numbers >= 0, one a sample, or all are 0.
    """
    if sample_weight is None:
        return np.full(samples, 1 / samples)
    weights = real_array("sample_weight", sample_weight, (samples,), least=0)
    if not weights.any():
        raise ValueError("sample_weight: expected a number > 0 among them, got zeros alone")
    weights = weights / weights.max()  # the sum of large ones may overflow
    return weights / weights.sum()


def _refuse_none(y: Any) -> None:
    if y is None:
        raise ValueError("y: expected one target a sample, got None: it requires y to be passed, but the target y is None")


def _as_many(y: np.ndarray, samples: int) -> np.ndarray:
    if len(y) != samples:
        raise ValueError(f"y: expected {samples} targets, one a sample, got {len(y)}: inconsistent numbers of samples")
    return y
