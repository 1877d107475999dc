"""Search for f such that u = a - B f has its values in an interval [low, high], or comes as near to it as possible.

u depends on the r numbers c_l = (psi_l, f) alone, u = a - A c with A c = sum_l mu_l c_l phi_l. `closest_to_interval`
minimises the distance of u from the interval. `nearest_in_interval` finds the f in the set that is nearest to a given f.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
from mpi4py import MPI

from fem_resnet.theory.spectra.autonomous import AutonomousProblem

__all__ = ["argument", "closest_to_interval", "excess", "nearest_in_interval", "scale"]

_NEWTON_STEPS = 100


def scale(problem: AutonomousProblem, zeros: tuple[float, float]) -> float:
    """The size that residuals are divided by: max(|a|, |Y|^(1/2) |finite end of the interval|), or 1 if that is 0."""
    ends = max(abs(end) for end in zeros if np.isfinite(end)) if np.isfinite(zeros).any() else 0.0
    return max(float(problem.norms(problem.bias[:, None])[0]), problem.Y.measure**0.5 * ends) or 1.0


def excess(u: np.ndarray, zeros: tuple[float, float]) -> np.ndarray:
    """The difference between u and the nearest number in [low, high], of the shape of u."""
    return u - np.clip(u, *zeros)


def argument(problem: AutonomousProblem, c: np.ndarray) -> np.ndarray:
    """U = a - B f, shape (nodes, 1), for an f with (psi_l, f) = c_l."""
    system = problem.system
    return problem.bias[:, None] - system.left_values((system.values * c)[:, None])


def closest_to_interval(problem: AutonomousProblem, zeros: tuple[float, float]) -> np.ndarray:
    """The numbers (psi_l, f) of an f for which u = a - B f is nearest to the interval, shape (r,). Collective.

    For an interval of one point that is a projection. Otherwise Newton's method minimises the square of |excess of u|,
    which is convex and piecewise quadratic in the coordinates x = D c of B f. Small singular values do not spoil these.
    """
    system = problem.system
    x = system.left_coefficients(problem.bias[:, None] - min(zeros, key=abs))[:, 0]
    if zeros[0] == zeros[1]:
        return x / system.values

    def parts(x: np.ndarray) -> tuple[float, np.ndarray]:
        outside = excess(problem.bias[:, None] - system.left_values(x[:, None]), zeros)
        return problem.norms(outside)[0] ** 2 / 2, outside

    x = min(x, np.zeros_like(x), key=lambda x: parts(x)[0])
    value, outside = parts(x)
    for _ in range(_NEWTON_STEPS):
        slope = -system.left_coefficients(outside)[:, 0]
        H = system.squared.weighted((outside[:, 0] != 0).astype(float))
        step = -np.linalg.lstsq(H, slope, rcond=1e-14)[0]
        length = 1.0
        while length > 1e-8:
            new, new_outside = parts(x + length * step)
            if new <= value + 1e-4 * length * (slope @ step):
                break
            length /= 2
        else:
            break
        x, outside, fallen, value = x + length * step, new_outside, value - new, new
        if fallen <= 1e-15 * value:
            break
    return x / system.values


def nearest_in_interval(problem: AutonomousProblem, zeros: tuple[float, float], c: np.ndarray, tolerance: float) -> np.ndarray:
    """The numbers (psi_l, f) of the nearest f for which u = a - B f has all its values in the interval. Collective.

    Parameters
    ----------
    problem
        The autonomous problem.
    zeros
        The interval [low, high].
    c
        The numbers (psi_l, f) of the given f, shape (r,).
    tolerance
        The residual up to which values outside of the interval are accepted; no unit.

    Raises
    ------
    RuntimeError
        If the search does not converge.
    """
    inside = problem.norms(excess(argument(problem, c), zeros))[0] == 0
    if inside or zeros[0] == zeros[1] or not c.size:
        return c if inside else closest_to_interval(problem, zeros)
    # If the set has no interior, for example if u is at an end of the interval at every node, there may be no multipliers.
    # Then the interval is widened within the tolerance.
    room = tolerance * scale(problem, zeros) / problem.Y.measure**0.5
    for widened in (0.0, 0.1 * room, 0.9 * room):
        solver = _NearestOfInterval(problem, (zeros[0] - widened, zeros[1] + widened), c)
        if solver.solve():
            return solver.c
    outside = problem.norms(excess(argument(problem, solver.c), zeros))[0] / scale(problem, zeros)
    raise RuntimeError(
        f"nearest: the steady state nearest to f was not found in {_NEWTON_STEPS} steps; a part {outside:.1e} of a - B f is "
        f"still outside of [{zeros[0]:g}, {zeros[1]:g}]; give find_steady_states a larger `tolerance`"
    )


def _product(problem: AutonomousProblem, weights: np.ndarray) -> np.ndarray:
    """A^T M diag(weights) A, shape (r, r), for A c = sum_l mu_l c_l phi_l, so that u = a - A c."""
    system = problem.system
    return system.values[:, None] * system.squared.weighted(weights) * system.values


class _NearestOfInterval:
    """Minimise |c - start|^2 / 2 under low <= a - A c <= high at all nodes, by Mehrotra's interior-point method.

    Slacks s and multipliers z have a row for each finite end of the interval and a column for each node. Linear systems
    have the size r.

    Parameters
    ----------
    problem
        The autonomous problem.
    zeros
        The interval [low, high].
    start
        Coefficients, shape (r,).

    Attributes
    ----------
    c : numpy.ndarray
        The iterate, shape (r,).
    """

    def __init__(self, problem: AutonomousProblem, zeros: tuple[float, float], start: np.ndarray):
        self._problem, self._start = problem, start
        # The constraints are sign * (end - u) >= 0.
        ends = [(sign, end) for sign, end in ((-1.0, zeros[0]), (1.0, zeros[1])) if np.isfinite(end)]
        self._signs, self._ends = np.array(ends).T[:, :, None]
        self._scale = scale(problem, zeros)
        self._size = max(np.linalg.norm(start), self._scale / problem.system.values[0])
        self.c = start
        g = self._slack(start)
        self._s = np.maximum(np.abs(g), 0.1 * self._scale / problem.Y.measure**0.5)
        self._z = np.full_like(g, self._size / (problem.system.values[0] * problem.Y.measure**0.5))

    def _slack(self, c: np.ndarray) -> np.ndarray:
        return self._signs * (self._ends - argument(self._problem, c)[:, 0])

    def _transposed(self, x: np.ndarray) -> np.ndarray:
        """The sum of sign A^T M x over the rows, shape (r,)."""
        system = self._problem.system
        return system.values * system.left_coefficients((self._signs * x).sum(axis=0)[:, None])[:, 0]

    def _sum(self, x: np.ndarray) -> float:
        return float(self._problem.Y.sum((x @ self._problem.Y.weights).sum()))

    def _longest(self, *pairs: tuple[np.ndarray, np.ndarray]) -> list[float]:
        """The longest steps for which no value becomes negative, from pairs of values and directions."""
        with np.errstate(divide="ignore", invalid="ignore"):
            own = np.array([np.where(x < 0, -value / x, np.inf).min(initial=np.inf) for value, x in pairs])
        self._problem.Y.comm.Allreduce(MPI.IN_PLACE, own, op=MPI.MIN)
        return own.tolist()

    @np.errstate(over="ignore", invalid="ignore")
    def solve(self) -> bool:
        """Iterate, and return whether c has converged, to about 1e-7 of its size. Collective."""
        for _ in range(_NEWTON_STEPS):
            gap = self._sum(self._s * self._z)
            primal = self._slack(self.c) - self._s
            stationarity = self.c - self._start - self._transposed(self._z)
            outside = np.sqrt(self._sum(primal**2))
            feasible = outside <= 1e-12 * self._scale and np.linalg.norm(stationarity) <= 1e-9 * self._size
            if feasible and gap <= 1e-15 * self._size**2:
                return True
            if not self._step(gap, primal, stationarity):
                break
        return gap <= 1e-9 * self._size**2 and outside <= 1e-9 * self._scale

    @np.errstate(over="ignore", invalid="ignore")
    def _step(self, gap: float, primal: np.ndarray, stationarity: np.ndarray) -> bool:
        """One predictor-corrector step; whether it moved."""
        s, z = self._s, self._z
        matrix = np.eye(self.c.size) + _product(self._problem, (z / s).sum(axis=0))
        # Near the end some z / s are huge. Scaled to a unit diagonal, the matrix can be factorised for some more steps.
        size = np.sqrt(np.diag(matrix))
        try:
            factor = scipy.linalg.cho_factor(matrix / np.outer(size, size))
        except (scipy.linalg.LinAlgError, ValueError):
            return False

        def direction(complementarity: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            right = self._transposed((-complementarity - z * primal) / s) - stationarity
            dc = scipy.linalg.cho_solve(factor, right / size) / size
            system = self._problem.system
            ds = self._signs * system.left_values((system.values * dc)[:, None])[:, 0] + primal
            return dc, ds, (-complementarity - z * ds) / s

        _, ds, dz = direction(s * z)
        forth, back = np.minimum(self._longest((s, ds), (z, dz)), 1.0)
        measure = self._problem.Y.measure * len(self._signs)
        centre = (self._sum((s + forth * ds) * (z + back * dz)) / gap) ** 3 * gap / measure
        dc, ds, dz = direction(s * z + ds * dz - centre)
        forth, back = (min(1.0, 0.995 * length) for length in self._longest((s, ds), (z, dz)))
        self.c, self._s, self._z = self.c + forth * dc, s + forth * ds, z + back * dz
        return max(forth, back) > 1e-10
