"""The rate at which u decays in a simulation, beside the rate that the theory predicts: Theorem 3.4."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import firedrake as fd
import numpy as np

from fem_resnet.features import STEPPED, supports
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.theory.spectra.linearisation import WORST_BASIS, linearised
from fem_resnet.theory.spectra.stability import stability_verdict

__all__ = ["Decay", "observed_decay"]


@dataclass(frozen=True)
class Decay:
    """How u decays in a simulation. Get one from `observed_decay`.

    Attributes
    ----------
    times : numpy.ndarray
        t_0 .. t_L, shape (L + 1,).
    sizes : numpy.ndarray
        Norms of u minus its value in the steady state, shape (L + 1, samples). The norm is taken of the coordinates in
        eigenvectors of D T^T, or of D^2 S for a gradient flow. It is equivalent to the norm of L2(Y), and a pair of complex
        eigenvalues does not make it oscillate.
    used : numpy.ndarray
        Which times the fit uses, shape (L + 1, samples), bool.
    predicted : float
        `Stability.rate`, in the unit of 1/t.
    """

    times: np.ndarray
    sizes: np.ndarray
    used: np.ndarray
    predicted: float

    @cached_property
    def rates(self) -> np.ndarray:
        """Minus the slope of log |u| over t, by least squares, shape (samples,), in 1/t; NaN for fewer than three times."""
        return np.array(
            [
                -np.polyfit(self.times[keep], np.log(size[keep]), 1)[0] if keep.sum() > 2 else np.nan
                for size, keep in zip(self.sizes.T, self.used.T)
            ]
        )


# Bases that differ between layers are left out: with them a network is not known to be autonomous.
@supports(
    "channels", "learned_factors", "learned_times", "kernel_set", "nodal_bias", "linear_in_time", "shared_in_time", *STEPPED,
    "gradient_flow",
)  # fmt: skip
def observed_decay(net: ResidualNetwork, initial: fd.Function) -> Decay:
    """Run an autonomous network, and fit the exponential rate at which u decays in the end.

    The fit uses the second half of the time up to which u is above round-off. It is the rate of Theorem 3.4 under two
    conditions. By then u must be so small that sigma is linear there, and only the slowest mode may be left. And the steps
    must be short, since a method decays at the rate of its own stability function. u is measured by its coordinates u_l of
    (3.5a) and (3.5b), minus the coordinates of the steady state. Collective over the ranks of the label domain.

    Parameters
    ----------
    net
        The network; the fit uses its layer times.
    initial
        f_I, a Function of `Y.V` or a batch. The run is recorded only if annotation is on.

    Raises
    ------
    ValueError
        If the network depends on t.
    """
    stability = stability_verdict(net)
    problem, system, steady = stability.problem, stability.problem.system, stability.steady
    A = linearised(steady)
    vectors = np.linalg.eig(A)[1] if np.isfinite(A).all() else np.eye(system.rank)
    if not np.linalg.cond(vectors) < WORST_BASIS:
        vectors = np.eye(system.rank)
    bias = system.left_coefficients(problem.bias[:, None])
    if not steady.exist or steady.zeros is None and steady.minimiser is None:
        rest = 0 * bias
    elif steady.minimiser is None:
        rest = system.left_coefficients(np.full((problem.Y.nodes, 1), min(steady.zeros, key=abs)))
    else:
        rest = bias - (system.values * steady.minimiser)[:, None]
    states = net.run(initial).states()
    coordinates = (bias - rest - system.values[:, None] * system.right_coefficients(net.Y.values(f)) for f in states)
    sizes = np.array([np.linalg.norm(np.linalg.solve(vectors, u), axis=0) for u in coordinates])
    times = net.times
    # Smaller sizes are round-off in the difference of a and B f.
    above = sizes > 1e-10 * (sizes.max(axis=0) + np.linalg.norm(bias))
    last = np.array([times[keep].max(initial=0.0) for keep in above.T])
    return Decay(times, sizes, above & (times[:, None] >= last / 2), stability.rate)
