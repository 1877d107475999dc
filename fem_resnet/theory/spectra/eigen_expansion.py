"""The linearised flow about a steady state in eigenfunctions: section 3.2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import firedrake as fd
import numpy as np

from fem_resnet.arguments import number
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.ranks import same
from fem_resnet.theory.spectra.autonomous import AutonomousProblem
from fem_resnet.theory.spectra.linearisation import WORST_BASIS, slopes_at_rest
from fem_resnet.theory.spectra.steady_states import find_steady_states

__all__ = ["EigenExpansion", "eigen_expansion"]


@dataclass(frozen=True)
class EigenExpansion:
    """`w(t) = w_0 + sum_l c_l exp(-sigma'(0) omega_l t) v_l`, the solution of w_t = -sigma'(0) B w of section 3.2.

    v_l are the eigenfunctions of B in R(B), B v_l = omega_l v_l, and w_0 is the part of w(0) in N(B), along R(B). For
    B = B^T the v_l are orthonormal and c_l = (w(0), v_l). For a gradient flow the equation is w_t = -B^T sigma'(u_inf) B w,
    1 takes the place of sigma'(0), and the v_l are orthonormal in R(B^T). Get one from `eigen_expansion`.

    Attributes
    ----------
    problem : AutonomousProblem
        The problem that is linearised.
    slope : float
        sigma'(0); 1 for a gradient flow.
    eigenvalues : numpy.ndarray
        omega_l, complex, shape (r,).
    vectors : numpy.ndarray
        Coordinates of the eigenfunctions: (phi_k, v_l), or (psi_k, v_l) for a gradient flow, complex, shape (r, r).
    coefficients : numpy.ndarray
        c_l, complex, shape (r, samples).
    at_rest : Function
        w_0, a batch.
    """

    problem: AutonomousProblem
    slope: float
    eigenvalues: np.ndarray
    vectors: np.ndarray
    coefficients: np.ndarray
    at_rest: fd.Function

    def __call__(self, t: float) -> fd.Function:
        """w(t), a new Function. Collective.

        Parameters
        ----------
        t
            The time, at least 0.

        Raises
        ------
        ValueError
            If t is no such number, or so large that w(t) overflows.
        """
        Y = self.problem.Y
        same(Y.comm, t=t)
        t = number("t", t, least=0)
        with np.errstate(over="ignore", invalid="ignore"):
            factors = np.exp(-self.slope * self.eigenvalues * t)[:, None]
        if not np.isfinite(factors).all():
            raise ValueError(f"t: expected a time at which w(t) does not overflow, got {t!r}")
        moving = _values_of(self.problem)((self.vectors @ (factors * self.coefficients)).real)
        return Y.batch(Y.values(self.at_rest) + moving)


def _values_of(problem: AutonomousProblem) -> Callable[[np.ndarray], np.ndarray]:
    """The map from coordinates of eigenfunctions to values at the owned nodes."""
    return problem.system.right_values if problem.gradient_flow else problem.system.left_values


@supports("channels", *HELD, *STEPPED, "gradient_flow")
def eigen_expansion(net: ResidualNetwork, perturbation: fd.Function, at: float | None = None) -> EigenExpansion:
    """Expand the linearised flow about a steady state in eigenfunctions of B, or of B^T sigma'(u_inf) B.

    Collective over the ranks of the label domain.

    Parameters
    ----------
    net, at
        As for `find_steady_states`.
    perturbation
        w(0) = f_I - f_inf, a Function of `Y.V` or a batch.

    Raises
    ------
    TypeError, ValueError
        If `perturbation` does not fit; if sigma has no slope where it vanishes, or a gradient flow has no steady state; or
        if B has no basis of eigenfunctions: T is singular, or the matrix of eigenvectors of D T has a condition above 1e8.
    """
    steady = find_steady_states(net, at)
    problem, system = steady.problem, steady.problem.system
    slopes, values = slopes_at_rest(steady), problem.read(perturbation, "perturbation")
    if not np.isfinite(slopes).all():
        if problem.gradient_flow and not steady.exist:
            raise ValueError(f"net: there is no steady state: {steady.reason}")
        raise ValueError(f"net: there is no linearisation, as {problem.activation.name} has no slope where it vanishes")
    if problem.gradient_flow:
        S, D = problem.generator.weighted(slopes * np.ones(problem.Y.nodes)), system.values
        omega, vectors = np.linalg.eigh(D[:, None] * (S + S.T) / 2 * D)
        slope, onto = 1.0, vectors
    else:
        omega, vectors = np.linalg.eig(system.matrix)
        slope, onto = float(slopes), system.gram.T @ vectors
    if system.rank and not (np.linalg.cond(onto) < WORST_BASIS and np.linalg.cond(vectors) < WORST_BASIS):
        raise ValueError(
            f"net: B has no basis of eigenfunctions that is well conditioned; the smallest singular value of T is "
            f"{system.gram_minimum:.1e}"
        )
    # The part of w in R(B) is sum_l c_l v_l and has (psi, w) = T^T X c; the rest has (psi, w_0) = 0. For a gradient flow
    # (psi, w) = X c.
    c = np.linalg.solve(onto, system.right_coefficients(values).astype(complex))
    at_rest = problem.Y.batch(values - _values_of(problem)((vectors @ c).real))
    return EigenExpansion(problem, slope, omega.astype(complex), vectors.astype(complex), c, at_rest)
