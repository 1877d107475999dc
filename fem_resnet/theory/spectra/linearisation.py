"""The linearisation about a steady state: slopes of sigma there, the matrix A of u_t = -A u, and its rate of decay.

About a steady state w = f - f_inf obeys w_t = -sigma'(0) B w to first order. Then u = -B w in R(B) obeys (3.5a). In the
coordinates u_l = (phi_l, u) of (3.5b) that is

    d/dt u_l = -mu_l (sigma(u), psi_l),        to first order  u_t = -sigma'(0) D T^T u,

with D and T of `singular_values`. About a steady state u = u_inf + v of a gradient flow, where u_inf need not be 0,

    v_t = -B B^T sigma'(u_inf) v,        in the coordinates (phi_l, v)  -D^2 S v,        S = ((phi_k, sigma'(u_inf) phi_l)).
"""

from __future__ import annotations

import numpy as np
from mpi4py import MPI

from fem_resnet.theory.spectra.steady_states import SteadyStates

__all__ = ["WORST_BASIS", "linearised", "slope_and_rate", "slopes_at_rest"]

#: Eigenvectors with a larger condition number are not used as a basis.
WORST_BASIS = 1e8


def slopes_at_rest(steady: SteadyStates) -> float | np.ndarray:
    """sigma'(u) in a steady state. Collective.

    Returns
    -------
    float or numpy.ndarray
        A number where u is constant; shape (nodes,) for a gradient flow where it is not. NaN at a kink of sigma, and where
        sigma vanishes on an interval or nowhere.
    """
    problem, sigma = steady.problem, steady.problem.activation
    if steady.minimiser is None:
        if steady.zeros is None or steady.zeros[0] != steady.zeros[1]:
            return np.nan
        u = np.array(steady.zeros[0])
    elif steady.exist:
        u = steady.rest[:, 0]
    else:
        return np.nan
    if problem.Y.comm.allreduce(any((np.abs(u - kink) < 1e-12).any() for kink in sigma.kinks), op=MPI.LOR):
        return np.nan
    slopes = sigma.derivative(u)
    return slopes if u.ndim else float(slopes)


def linearised(steady: SteadyStates) -> np.ndarray:
    """The matrix A of u_t = -A u about a steady state, in the coordinates (phi_k, u), shape (r, r). Collective.

    It is sigma'(0) D T^T, or D^2 S for a gradient flow; NaN where sigma has no slope.
    """
    system, slopes = steady.problem.generator, slopes_at_rest(steady)
    return system.values[:, None] * system.weighted(slopes) if isinstance(slopes, np.ndarray) else slopes * system.matrix


def slope_and_rate(steady: SteadyStates) -> tuple[float, float]:
    """`Stability.slope` and `Stability.rate`. Collective."""
    problem, system, slopes = steady.problem, steady.problem.generator, slopes_at_rest(steady)
    if not isinstance(slopes, np.ndarray):
        return slopes, float(slopes * system.eigenvalues.real.min(initial=np.inf)) if system.rank else slopes * np.inf
    S, D = system.weighted(slopes), problem.system.values
    least = [np.linalg.eigvalsh((X + X.T) / 2).min(initial=np.inf) for X in (S, D[:, None] * S * D)]
    return float(least[0]), float(least[1])
