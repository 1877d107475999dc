"""How norms grow over time: as a power of t or exponentially, by a fit that may also leave the question open."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.optimize

from fem_resnet.arguments import real_array

__all__ = ["MARGIN", "GrowthFit", "fit_growth"]

#: Akaike's criterion decides for one kind of growth if it is smaller by at least this. Then the other kind has
#: essentially no support (Burnham and Anderson).
MARGIN = 10.0
#: The accuracy to which logarithms of norms are known.
_OF_LOGARITHMS = 1e-12
#: The powers p of c + v t^p that are tried.
_POWERS = np.linspace(0.25, 4.0, 61)


@dataclass(frozen=True)
class GrowthFit:
    """How norms grow over the later half of the times: as a power of t, with or without a constant, or exponentially.

    Three curves are fitted to the logarithms of the norms: t^p, c + v t^p with p from 1/4 to 4, and exp(r t), the first
    and the last up to a factor. Akaike's criterion, corrected for few points, compares the better one of the first two
    with the third. Get a fit from `fit_growth`.

    Attributes
    ----------
    power : numpy.ndarray
        p of norm ~ t^p, shape (samples,); no unit.
    rate : numpy.ndarray
        r of norm ~ exp(r t), shape (samples,); in the unit of 1/t.
    power_residual, rate_residual : numpy.ndarray
        The largest |log(norm) - fit| of these two curves, shape (samples,); no unit.
    in_favour : numpy.ndarray
        The criterion of the powers minus the criterion of the exponential, shape (samples,); no unit. Positive values
        favour the exponential.
    """

    power: np.ndarray
    rate: np.ndarray
    power_residual: np.ndarray
    rate_residual: np.ndarray
    in_favour: np.ndarray

    @property
    def is_exponential(self) -> np.ndarray:
        """Whether the exponential is better by at least `MARGIN`, shape (samples,), bool."""
        return self.in_favour >= MARGIN

    @property
    def verdicts(self) -> list[str]:
        """One of "exponential", "power" and "not decided" for each sample."""
        return [
            "exponential" if value >= MARGIN else "power" if value <= -MARGIN else "not decided" for value in self.in_favour
        ]


def fit_growth(times: np.ndarray, norms: np.ndarray) -> GrowthFit:
    """Fit powers and an exponential to norms over the later half of the times, by least squares, and compare the fits.

    Parameters
    ----------
    times
        At least four rising times, shape (n,); positive in the later half. With fewer than six times in the later half
        every verdict is "not decided".
    norms
        Norms, shape (n, samples); positive in the later half.

    Returns
    -------
    GrowthFit

    Raises
    ------
    ValueError
        If there are too few times, or in the later half a time is not positive, or a norm is not positive and finite.

    Examples
    --------
    >>> t = np.linspace(0.0, 8.0, 17)
    >>> fit = fit_growth(t, np.column_stack([3 * t + 1e-9, np.exp(0.5 * t), 100 + t, 2 + 0 * t]))
    >>> [round(float(fit.power[0]), 6), round(float(fit.rate[1]), 6)], fit.verdicts
    ([1.0, 0.5], ['power', 'exponential', 'power', 'not decided'])
    """
    times = real_array("times", times, ("times",))
    if len(times) < 4 or not (np.diff(times) > 0).all():
        raise ValueError(f"times: expected at least 4 rising times, got {times.tolist()}")
    norms = real_array("norms", norms, (len(times), "samples"), finite=False)
    late = times >= (times[0] + times[-1]) / 2
    if not (np.isfinite(norms[late]).all() and (norms[late] > 0).all() and times[late][0] > 0):
        raise ValueError("norms: expected positive and finite norms at positive times in the later half of `times`")
    t, logarithms = times[late], np.log(norms[late])
    (power, of_power), (rate, of_rate) = (_line(x, logarithms) for x in (np.log(t), t))
    beside = np.array([_beside_a_constant(t, column) for column in norms[late].T])
    powers = np.minimum(_criterion(_squares(of_power), len(t), 2), _criterion(beside, len(t), 3))
    in_favour = powers - _criterion(_squares(of_rate), len(t), 2) if len(t) >= 6 else np.zeros(len(power))
    return GrowthFit(power, rate, np.abs(of_power).max(axis=0), np.abs(of_rate).max(axis=0), in_favour)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope and residuals of the line through (x, y), for each column of y."""
    slope, height = np.polyfit(x, y, 1)
    return slope, y - slope * x[:, None] - height


def _squares(residuals: np.ndarray) -> np.ndarray:
    return np.sum(residuals**2, axis=0)


def _beside_a_constant(t: np.ndarray, norm: np.ndarray) -> float:
    """The least sum of squares of log(norm) - log(c + v t^p) over c, v and p.

    For each p it takes c and v from a linear problem, which agrees with the nonlinear one to first order in the residuals.
    """

    def left(p: float) -> float:
        # Residuals relative to the norm. v may have either sign as long as the curve is positive.
        columns = np.column_stack([np.ones_like(t), (t / t[-1]) ** p]) / norm[:, None]
        curve = columns @ np.linalg.lstsq(columns, np.ones_like(t), rcond=None)[0]
        return float(np.sum(np.log(curve) ** 2)) if (curve > 0).all() else np.inf

    values = [left(p) for p in _POWERS]
    near = int(np.argmin(values))
    around = _POWERS[max(near - 1, 0)], _POWERS[min(near + 1, len(_POWERS) - 1)]
    return min(values[near], float(scipy.optimize.minimize_scalar(left, bounds=around, method="bounded").fun))


def _criterion(squares: np.ndarray, points: int, parameters: int) -> np.ndarray:
    """Akaike's criterion, corrected for few points. Residuals count as at least `_OF_LOGARITHMS`."""
    k = parameters + 1
    spread = np.maximum(squares / points, _OF_LOGARITHMS**2)
    return points * np.log(spread) + 2 * k + 2 * k * (k + 1) / (points - k - 1 if points > k + 1 else np.nan)
