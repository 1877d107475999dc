"""Stability of u = 0, and so of steady states of f: 3.2, Theorem 3.4, and what simulations are held against.

About a steady state w = f - f_inf obeys w_t = -sigma'(0) B w, to first order, and u = -B w in R(B) obeys (3.5a), in
the coordinates u_l = (phi_l, u) of (3.5b)

    d/dt u_l = -mu_l (sigma(u), psi_l),        to first order  u_t = -sigma'(0) D T^T u.

(`singular_values` has D and T.) D T^T has the spectrum of D T, so u decays at the exponential rate

    sigma'(0) min Re eig(D T),

for which the smallest eigenvalue of the symmetric part of D T, times sigma'(0), is no more than a lower bound. In the
order in which things decide:

    min Re eig(D T) > 0      u -> 0 exponentially, f -> a point of f_inf + N(B): asymptotically stable. So it is under
                             the hypotheses of Theorem 3.4, T invertible and D T positive definite, and not only there.
    min Re eig(D T) < 0      unstable.
    B_s >= 0                 L(u) = int Sigma(u) dy falls, as dL/dt = -(B_s sigma(u), sigma(u)): stable; if B_s > 0 on
                             R(B) asymptotically so, also where sigma has no slope at 0, or none that is positive.
    else                     not decided.

The paper says that L falls where D T is positive definite. Stability stands, by the linearisation; but L may rise,
unless B_s >= 0. If T is invertible, u = 0 is the only equilibrium near 0; if not, the linearisation does not say: with
T = 0 and sigma = tanh it may be isolated, with sigma(s) = s it is not.

What is said of a finite rank does not carry over to infinite rank without change: the rate is at most sigma'(0) mu_r.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import firedrake as fd
import numpy as np

from fem_resnet.arguments import number
from fem_resnet.network import ResidualNetwork
from fem_resnet.theory.autonomous import AutonomousProblem, autonomous_problem
from fem_resnet.theory.singular_values import SingularSystem
from fem_resnet.theory.steady_states import SteadyStates, find_steady_states

__all__ = ["Decay", "EigenExpansion", "Stability", "eigen_expansion", "observed_decay", "stability_verdict"]

#: Eigenvectors of a larger condition are no basis to compute with.
_WORST_BASIS = 1e8


@dataclass(frozen=True)
class Stability:
    """What the theory says of u = 0. Get one from `stability_verdict`; ``print`` it for a page.

    Attributes
    ----------
    problem : AutonomousProblem
    steady : SteadyStates
    verdict : str
        "asymptotically stable", "stable", "unstable" or "not decided"; of the steady states of f, for u in R(B).
    reason : str
        Which statement decides, with its numbers.
    slope : float
        sigma' where sigma vanishes; NaN where there is no such slope.
    tolerance : float
        What counts as zero, in parts of mu_1.
    """

    problem: AutonomousProblem
    steady: SteadyStates
    verdict: str
    reason: str
    slope: float
    tolerance: float

    @property
    def system(self) -> SingularSystem:
        """mu_l, T and the spectra."""
        return self.problem.system

    @property
    def rate(self) -> float:
        """sigma'(0) min Re eig(D T): u decays as exp(-rate t), or grows if it is negative; NaN without a slope."""
        return float(self.slope * self.system.eigenvalues.real.min(initial=np.inf))

    @property
    def rate_bound(self) -> float:
        """sigma'(0) times the smallest eigenvalue of the symmetric part of D T: at most `rate`."""
        return float(self.slope * self.system.product_minimum)

    @property
    def _zero(self) -> float:
        return self.tolerance * float(self.system.values.max(initial=0.0))

    @property
    def gram_is_invertible(self) -> bool:
        """(a) of Theorem 3.4: T is invertible; its smallest singular value is `system.gram_minimum`."""
        return self.system.gram_minimum > self.tolerance

    @property
    def theorem_holds(self) -> bool:
        """Whether (A1) of 3.2 and both hypotheses of Theorem 3.4 hold."""
        return not self.problem.unmet and self.gram_is_invertible and self.system.product_minimum > self._zero

    @property
    def lyapunov_falls(self) -> bool:
        """Whether B_s >= 0, so that int Sigma(u) dy falls along every solution."""
        return self.system.symmetric_minimum >= -self._zero

    @property
    def isolated(self) -> bool | None:
        """Whether u = 0 is the only equilibrium near 0 in R(B): True if T is invertible, None if that is open."""
        return True if self.gram_is_invertible and self.slope > 0 else None

    def __str__(self) -> str:
        system = self.system
        rows = {
            "rank of B": system.rank,
            "largest, smallest mu": f"{system.values.max(initial=0):.6g}, {system.values.min(initial=np.inf):.6g}",
            "smallest singular value of T": f"{system.gram_minimum:.6g}",
            "smallest eigenvalue of sym(D T)": f"{system.product_minimum:.6g}",
            "smallest real part of eig(D T)": f"{system.eigenvalues.real.min(initial=np.inf):.6g}",
            "inf (B v, v), |v| = 1": f"{system.symmetric_minimum:.6g}",
            "sigma'(0)": f"{self.slope:.6g}",
            "exponential rate, its lower bound": f"{self.rate:.6g}, {self.rate_bound:.6g}",
            "Theorem 3.4 applies": "yes" if self.theorem_holds else "no",
            "int Sigma(u) falls": "yes" if self.lyapunov_falls else "not always",
            "u = 0 is isolated": "yes" if self.isolated else "not decided",
        }
        wide = max(map(len, rows)) + 2
        lines = (f"  {name:{wide}}{value}" for name, value in rows.items())
        return "\n".join([f"{self.verdict}: {self.reason}", *lines])


def stability_verdict(net: ResidualNetwork, at: float | None = None, tolerance: float = 1e-10) -> Stability:
    """Whether steady states of the network are stable: Theorem 3.4 and what 3.2 has beside it. Collective.

    Of perturbations with u in R(B), which is where u is whenever a is: f then goes to a point of f_inf + N(B), not
    necessarily the one it started from.

    Parameters
    ----------
    net
        The network, autonomous if `at` is left out.
    at
        A time: the problem frozen there; T for the limits of Remark 3.1.
    tolerance
        What counts as zero, in parts of the largest singular value; no unit.

    Raises
    ------
    ValueError
        If the network depends on t and no time is given, or sigma vanishes at several places.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 2)
    >>> net = ResidualNetwork(phi, bias_in_time="shared", kernel_in_time="shared")
    >>> net.kernel.set(0, np.array([[1.0, 2.0], [-2.0, 1.0]]))
    >>> stability = stability_verdict(net)
    >>> stability.verdict, round(stability.rate, 12), stability.theorem_holds, stability.lyapunov_falls
    ('asymptotically stable', 1.0, True, True)
    """
    tolerance = number("tolerance", tolerance, least=0)
    steady = find_steady_states(net, at)
    problem, system = steady.problem, steady.problem.system
    slope = _slope(steady)

    def result(verdict: str, reason: str) -> Stability:
        return Stability(problem, steady, verdict, reason, slope, tolerance)

    if not steady.exist:
        return result("not decided", f"there is no steady state: {steady.reason}")
    if steady.zeros[0] != steady.zeros[1]:
        name = problem.activation.name
        return result("not decided", f"{name} vanishes on an interval, so that u = 0 is not isolated")
    if not system.rank:
        return result("stable", "B = 0, so that every f is a steady state")
    zero = tolerance * system.values[0]
    least, symmetric = system.eigenvalues.real.min(), system.symmetric_minimum
    numbers = f"min Re eig(D T) = {least:.3g}, sigma' = {slope:.3g}"
    if slope * least > zero:
        return result("asymptotically stable", f"{numbers}: exponentially, their product being positive")
    if slope * least < -zero:
        return result("unstable", f"{numbers}: perturbations grow, their product being negative")
    why = "sigma has no positive slope there" if not slope > 0 else f"min Re eig(D T) = {least:.1g} is zero"
    if symmetric < -zero or not _climbs(steady):
        return result("not decided", f"{why}, and inf (B v, v) = {symmetric:.3g}, so that int Sigma(u) may rise")
    on_range = system.symmetric_eigenvalues[0]
    if on_range > zero:
        return result("asymptotically stable", f"{why}, but (B v, v) >= {on_range:.3g} |v|^2 on R(B)")
    return result("stable", f"{why}, but B_s >= 0, so that int Sigma(u) falls or stays")


def _slope(steady: SteadyStates) -> float:
    """sigma' where it vanishes; NaN at a kink, or where it vanishes on an interval or nowhere."""
    if steady.zeros is None or steady.zeros[0] != steady.zeros[1]:
        return np.nan
    sigma, zero = steady.problem.activation, steady.zeros[0]
    if any(abs(kink - zero) < 1e-12 for kink in sigma.kinks):
        return np.nan
    return float(sigma.derivative(zero))


def _climbs(steady: SteadyStates) -> bool:
    """Whether sigma has the sign of its argument, seen from its one zero: then int Sigma(u) is least there."""
    # Having no other zero, sigma has one sign on each side.
    return bool(np.all(np.array([-1, 1]) * steady.problem.activation(steady.zeros[0] + np.array([-1e-3, 1e-3])) > 0))


# -- the linearised flow ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EigenExpansion:
    """`w(t) = w_0 + sum_l c_l exp(-sigma'(0) omega_l t) v_l`, the solution of w_t = -sigma'(0) B w of 3.2.

    v_l are the eigenfunctions of B in R(B), B v_l = omega_l v_l, and w_0 is the part of w(0) in N(B), along R(B). For
    B = B^T they are orthonormal and c_l = (w(0), v_l). Get one from `eigen_expansion`.

    Attributes
    ----------
    problem : AutonomousProblem
    slope : float
        sigma'(0).
    eigenvalues : numpy.ndarray
        omega_l, complex, shape (r,).
    vectors : numpy.ndarray
        (phi_k, v_l), complex, shape (r, r): coordinates of the eigenfunctions.
    coefficients : numpy.ndarray
        c_l, complex, shape (r, samples).
    at_rest : Function
        w_0.
    """

    problem: AutonomousProblem
    slope: float
    eigenvalues: np.ndarray
    vectors: np.ndarray
    coefficients: np.ndarray
    at_rest: fd.Function

    def __call__(self, t: float) -> fd.Function:
        """w(t), a new Function. Collective."""
        factors = np.exp(-self.slope * self.eigenvalues * t)[:, None]
        Y = self.problem.Y
        moving = self.problem.system.left_values((self.vectors @ (factors * self.coefficients)).real)
        return Y.batch(Y.values(self.at_rest) + moving)


def eigen_expansion(net: ResidualNetwork, perturbation: fd.Function, at: float | None = None) -> EigenExpansion:
    """The linearised flow about a steady state, in eigenfunctions of B. Collective.

    Parameters
    ----------
    net, at
        As for `stability_verdict`.
    perturbation
        w(0) = f_I - f_inf, a Function of `Y.V` or a batch.

    Raises
    ------
    TypeError, ValueError
        If `perturbation` does not fit; if sigma has no slope where it vanishes, or B has no basis of eigenfunctions: T
        is singular, or eigenvectors of D T are dependent (of a condition above 1e8).
    """
    problem = autonomous_problem(net, at)
    system = problem.system
    slope = _slope(find_steady_states(net, at))
    if not np.isfinite(slope):
        raise ValueError(f"net: {problem.activation.name} has no slope where it vanishes, so there is no linearisation")
    omega, vectors = np.linalg.eig(system.matrix)
    onto = system.gram.T @ vectors
    if system.rank and not (np.linalg.cond(onto) < _WORST_BASIS and np.linalg.cond(vectors) < _WORST_BASIS):
        raise ValueError(
            f"net: B has no basis of eigenfunctions to compute with; smallest singular value of T "
            f"{system.gram_minimum:.1e}"
        )
    values = problem.read(perturbation, "perturbation")
    # (psi, w) = T^T X c for the part of w in R(B), sum_l c_l v_l; the rest has (psi, w_0) = 0.
    c = np.linalg.solve(onto, system.right_coefficients(values).astype(complex))
    at_rest = problem.Y.batch(values - system.left_values((vectors @ c).real))
    return EigenExpansion(problem, slope, omega, vectors, c, at_rest)


# -- what a simulation shows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decay:
    """How u decays in a simulation. Get one from `observed_decay`.

    Attributes
    ----------
    times : numpy.ndarray
        t_0 .. t_L, shape (L + 1,).
    sizes : numpy.ndarray
        Norm of u, shape (L + 1, samples): that of its coordinates in eigenvectors of D T^T, equivalent to the norm of
        L2(Y), in which a pair of complex eigenvalues does not swing.
    used : numpy.ndarray
        Which times the fit has taken, shape (L + 1, samples), bool.
    predicted : float
        sigma'(0) min Re eig(D T).
    """

    times: np.ndarray
    sizes: np.ndarray
    used: np.ndarray
    predicted: float

    @cached_property
    def rates(self) -> np.ndarray:
        """Minus the slope of log |u| over t, by least squares, shape (samples,); NaN from less than three times."""
        return np.array(
            [
                -np.polyfit(self.times[keep], np.log(size[keep]), 1)[0] if keep.sum() > 2 else np.nan
                for size, keep in zip(self.sizes.T, self.used.T)
            ]
        )


def observed_decay(net: ResidualNetwork, initial: fd.Function) -> Decay:
    """Run an autonomous network, and fit the exponential rate at which u decays in the end. Collective.

    The fit takes the second half of the time up to which u is above round-off. Its rate is that of Theorem 3.4 if by
    then u is small, so that sigma is linear there, and the fastest of what is left has gone; and if the steps are
    short: a method's own rate is that of its stability function. u is taken by its coordinates u_l of (3.5a), (3.5b).

    Parameters
    ----------
    net
        The network; its layer times are those of the fit.
    initial
        f_I, a Function of `Y.V` or a batch. It is run without being recorded unless annotation is on.

    Raises
    ------
    ValueError
        If the network depends on t.
    """
    stability = stability_verdict(net)
    problem, system = stability.problem, stability.system
    vectors = np.linalg.eig(system.matrix)[1]
    if not np.linalg.cond(vectors) < _WORST_BASIS:
        vectors = np.eye(system.rank)
    bias = system.left_coefficients(problem.bias[:, None])
    states = net.run(initial).states()
    coordinates = (bias - system.values[:, None] * system.right_coefficients(net.Y.values(f)) for f in states)
    sizes = np.array([np.linalg.norm(np.linalg.solve(vectors, u), axis=0) for u in coordinates])
    times = net.times
    # Below this u = a - B f is what round-off leaves of a and B f.
    above = sizes > 1e-10 * (sizes.max(axis=0) + np.linalg.norm(bias))
    last = np.array([times[keep].max(initial=0.0) for keep in above.T])
    return Decay(times, sizes, above & (times[:, None] >= last / 2), stability.rate)
