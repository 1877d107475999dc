"""Stability of u = 0, and so of the steady states of f: section 3.2 and Theorem 3.4.

`linearisation` has the linearised equation (3.5a), u_t = -sigma'(0) D T^T u, and `singular_values` has D and T. D T^T has
the spectrum of D T, so that u decays at the exponential rate

    sigma'(0) min Re eig(D T).

sigma'(0) times the smallest eigenvalue of the symmetric part of D T is a lower bound of it. The criteria, in the order in
which they are tried:

    min Re eig(D T) > 0      u -> 0 exponentially and f -> a point of f_inf + N(B): asymptotically stable. The hypotheses of
                             Theorem 3.4, T invertible and D T positive definite, imply it, but are not necessary.
    min Re eig(D T) < 0      unstable.
    B_s >= 0                 L(u) = int Sigma(u) dy falls, as dL/dt = -(B_s sigma(u), sigma(u)): stable. If B_s > 0 on R(B),
                             asymptotically stable, also where sigma has no slope at 0, or no positive one.
    else                     not decided.

The sign of an eigenvalue decides where round-off cannot change it (`half_planes`), that is, for all matrices that are as
near to that of B as round-off. The rank of B is the number of singular values that differ from zero by more than round-off.

The paper says that L falls where D T is positive definite. Stability follows from the linearisation, but L may rise unless
B_s >= 0. If T is invertible, u = 0 is the only equilibrium near 0. If T is singular, the linearisation does not tell: for
T = 0, u = 0 may be isolated with sigma = tanh, and is not with sigma(s) = s.

The gradient flow f_t = B^T sigma(a - B f) with a non-decreasing sigma descends the convex int Sigma(u) dy, and two solutions
never move apart: all its steady states are stable. About one of them u decays at the rate min eig(D S D) where S > 0, with S
of `linearisation`. At u_inf = 0 that is sigma'(0) mu_r^2.

These statements about a finite rank do not carry over to an infinite rank without change: the rate is at most
sigma'(0) mu_r.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.theory.spectra.autonomous import AutonomousProblem, sampled
from fem_resnet.theory.spectra.half_planes import count_left, count_left_in_gap
from fem_resnet.theory.spectra.linearisation import slope_and_rate
from fem_resnet.theory.spectra.singular_values import SingularSystem
from fem_resnet.theory.spectra.steady_states import SteadyStates, find_steady_states

__all__ = ["Stability", "stability_verdict"]

#: A slope below this part of sup |sigma'| counts as zero, because the zero of sigma is known up to round-off.
_NO_SLOPE = 4 * np.finfo(float).eps


@dataclass(frozen=True)
class Stability:
    """The verdict of the theory about u = 0. Get one from `stability_verdict`; ``print`` shows a page.

    Attributes
    ----------
    problem : AutonomousProblem
        The problem that the verdict is about.
    steady : SteadyStates
        Its steady states.
    verdict : str
        "asymptotically stable", "stable", "unstable" or "not decided": the steady states of f, for perturbations with u in
        R(B).
    reason : str
        The statement that decides, with its numbers, and the properties of sigma that it uses and that are sampled.
    slope : float
        sigma' where sigma vanishes; NaN where there is no such slope. For a gradient flow the smallest eigenvalue of S,
        which is the same at u = 0. No unit.
    rate : float
        u decays as exp(-rate t), or grows if the rate is negative: sigma'(0) min Re eig(D T), for a gradient flow
        min eig(D S D); NaN without a slope. In the unit of 1/t.
    """

    problem: AutonomousProblem
    steady: SteadyStates
    verdict: str
    reason: str
    slope: float
    rate: float

    @property
    def system(self) -> SingularSystem:
        """The singular system of the operator K in u_t = -K sigma(u): K = B, or B B^T for a gradient flow."""
        return self.problem.generator

    @property
    def rate_bound(self) -> float:
        """sigma'(0) times the smallest eigenvalue of the symmetric part of D T; at most `rate`, in the unit of 1/t."""
        return float(self.slope * self.system.product_minimum)

    @property
    def gram_is_invertible(self) -> bool:
        """Hypothesis (a) of Theorem 3.4: T is invertible; its smallest singular value is `system.gram_minimum`."""
        return self.system.gram_minimum > self.system.error / self.system.values.min(initial=np.inf)

    @property
    def theorem_holds(self) -> bool:
        """Whether (A1) of 3.2 and both hypotheses of Theorem 3.4 hold."""
        return not self.problem.unmet and self.gram_is_invertible and self.system.product_minimum > self.system.error

    @property
    def lyapunov_falls(self) -> bool:
        """Whether B_s >= 0, up to round-off, so that int Sigma(u) dy falls along every solution."""
        return self.system.symmetric_minimum >= -self.system.error

    @property
    def isolated(self) -> bool | None:
        """Whether u = 0 is the only equilibrium near 0 in R(B): True if T is invertible, None if it is not decided."""
        return True if self.gram_is_invertible and self.slope > 0 else None

    def __str__(self) -> str:
        system = self.system
        supposed = self.problem.sampled
        rows = {
            "rank of B": system.rank,
            "largest, smallest mu": f"{system.values.max(initial=0):.6g}, {system.values.min(initial=np.inf):.6g}",
            "smallest singular value of T": f"{system.gram_minimum:.6g}",
            "smallest eigenvalue of sym(D T)": f"{system.product_minimum:.6g}",
            "smallest real part of eig(D T)": f"{system.eigenvalues.real.min(initial=np.inf):.6g}",
            "inf (B v, v), |v| = 1": f"{system.symmetric_minimum:.6g}",
            "round-off in these": f"{system.error:.1g}",
            "sigma'(0)": f"{self.slope:.6g}",
            "exponential rate, its lower bound": f"{self.rate:.6g}, {self.rate_bound:.6g}",
            "Theorem 3.4 applies": f"yes{supposed}" if self.theorem_holds else "no",
            "int Sigma(u) falls": "yes" if self.lyapunov_falls else "not always",
            "u = 0 is isolated": "yes" if self.isolated else "not decided",
        }
        if self.problem.gradient_flow:
            rows = {name.replace("B", "B B^T") if "inf" in name else name: value for name, value in rows.items()}
        wide = max(map(len, rows)) + 2
        lines = (f"  {name:{wide}}{value}" for name, value in rows.items())
        return "\n".join([f"{self.verdict}: {self.reason}", *lines])


@supports("channels", *HELD, *STEPPED, "gradient_flow")
def stability_verdict(net: ResidualNetwork, at: float | None = None) -> Stability:
    """Decide whether the steady states of a network are stable, by Theorem 3.4 and the other criteria of section 3.2.

    The verdict is about perturbations with u in R(B); u is there whenever a is. In that case f tends to a point of
    f_inf + N(B), not necessarily to the one that it started from. Collective over the ranks of the label domain.

    Parameters
    ----------
    net, at
        As for `find_steady_states`.

    Raises
    ------
    ValueError
        As `find_steady_states` does.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Bias, Kernel, LabelSpace, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 2)
    >>> net = ResidualNetwork(Kernel(phi, in_time="shared"), bias=Bias(in_time="shared"))
    >>> net.kernel.set(0, np.array([[1.0, 2.0], [-2.0, 1.0]]))
    >>> stability = stability_verdict(net)
    >>> stability.verdict, round(stability.rate, 12), stability.theorem_holds, stability.lyapunov_falls
    ('asymptotically stable', 1.0, True, True)
    """
    steady = find_steady_states(net, at)
    problem, system = steady.problem, steady.problem.generator
    slope, rate = slope_and_rate(steady)

    def result(verdict: str, reason: str) -> Stability:
        return Stability(problem, steady, verdict, reason, slope, rate)

    if not steady.exist:
        return result("not decided", f"there is no steady state: {steady.reason}")
    if problem.gradient_flow:
        return result(*_of_gradient_flow(steady, slope, rate))
    if steady.zeros[0] != steady.zeros[1]:
        name = problem.activation.name
        return result("not decided", f"{name} vanishes on an interval, so that u = 0 is not isolated")
    if not system.rank:
        return result("stable", "B = 0, so that every f is a steady state")
    least, symmetric = system.eigenvalues.real.min(), system.symmetric_minimum
    numbers = f"min Re eig(D T) = {least:.3g}, sigma' = {slope:.3g}"
    has_slope = abs(slope) > _NO_SLOPE * _finite(problem.activation.properties.lipschitz)
    decided = _by_eigenvalues(system, np.sign(slope)) if has_slope else None
    if decided == "asymptotically stable":
        cut = f"; the rank is {system.rank}, as the singular value {system.cut:.0e} counts as zero" if system.cut else ""
        return result(decided, f"{numbers}: u decays exponentially, as their product is positive{cut}")
    if decided == "unstable":
        return result(decided, f"{numbers}: perturbations grow, as their product is negative")
    if not slope > 0 or not has_slope:
        why = "sigma has no positive slope there"
    else:
        why = f"round-off, {system.error:.1g}, could change the sign of min Re eig(D T) = {least:.1g}"
    if symmetric < -system.error or not _climbs(steady):
        return result("not decided", f"{why}, and inf (B v, v) = {symmetric:.3g}, so that int Sigma(u) may rise")
    on_range, signs = system.symmetric_eigenvalues[0], sampled(problem.activation, "sign_preserving")
    if on_range > system.error:
        return result("asymptotically stable", f"{why}, but (B v, v) >= {on_range:.3g} |v|^2 on R(B){signs}")
    return result("stable", f"{why}, but B_s >= 0 up to round-off, so that int Sigma(u) falls or stays{signs}")


def _finite(lipschitz: float) -> float:
    return lipschitz if np.isfinite(lipschitz) else 1.0


def _by_eigenvalues(system: SingularSystem, sign: float) -> str | None:
    """The verdict by the real parts of eig(D T), times a sign, for all matrices within round-off; None if there is none."""
    A, error, zeros = sign * system.whole, system.error, len(system.whole) - system.rank
    parts = np.sort(np.linalg.eigvals(A).real)
    # As many eigenvalues as the rank must lie on the right. The others belong to the part that was cut as zero.
    if zeros:
        decays = count_left_in_gap(A, max(parts[zeros - 1], 0.0), parts[zeros], error) == zeros
    else:
        decays = count_left(A, 0.0, error) == 0
    if decays:
        return "asymptotically stable"
    for low, high in zip(parts, np.append(parts[1:], np.inf)):
        if low < 0 and (count_left_in_gap(A, low, min(high, 0.0), error) or 0) > 0:
            return "unstable"
    return None


def _of_gradient_flow(steady: SteadyStates, slope: float, rate: float) -> tuple[str, str]:
    """Verdict and reason for a gradient flow that has a steady state."""
    problem = steady.problem
    system, convex = problem.system, sampled(problem.activation, "non_decreasing")
    if not system.rank:
        return "stable", "B = 0, so that every f is a steady state"
    # Entries of S are integrals of sigma'(u) >= 0 times products of orthonormal functions.
    if slope > system.rank * _NO_SLOPE * _finite(problem.activation.properties.lipschitz):
        return (
            "asymptotically stable",
            f"min eig(D S D) = {rate:.3g}, S >= {slope:.3g}: u decays exponentially, as S is positive{convex}",
        )
    why = "sigma has no single slope there" if np.isnan(slope) else f"S >= {slope:.1g}, which is zero up to round-off"
    return "stable", f"{why}, but int Sigma(u) is convex, so that two solutions never move apart{convex}"


def _climbs(steady: SteadyStates) -> bool:
    """Whether sigma rises through its one zero, so that int Sigma(u) is least there."""
    # As sigma has no other zero, it has one sign on each side.
    return bool(np.all(np.array([-1, 1]) * steady.problem.activation(steady.zeros[0] + np.array([-1e-3, 1e-3])) > 0))
