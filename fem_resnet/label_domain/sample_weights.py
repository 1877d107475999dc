"""Weights omega of the samples of a batch: with them J is a mean over samples, `J = sum_s omega_s J_s`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fem_resnet.arguments import real_array

__all__ = ["sample_weights"]


def sample_weights(weights: Sequence[float] | None, samples: int) -> np.ndarray:
    """Weights of the samples, divided by their sum, shape (samples,).

    Parameters
    ----------
    weights
        Shape (samples,), real numbers >= 0; equal ones if None.
    samples
        Number of samples.

    Raises
    ------
    TypeError, ValueError
        If the weights are no real numbers, one a sample, one is negative or not finite, or all are 0.
    """
    if weights is None:
        return np.full(samples, 1 / samples)
    omega = real_array("weights", weights, (samples,), least=0)
    largest = omega.max()
    if largest == 0:
        raise ValueError("weights: expected numbers >= 0, not all 0, got zeros alone; give at least one that is positive")
    omega = omega / largest  # the sum of large ones may overflow
    return omega / omega.sum()
