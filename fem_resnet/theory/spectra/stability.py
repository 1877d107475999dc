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

Signs of eigenvalues decide where round-off cannot change them (`half_planes`): for all matrices as near to that of B as
round-off leaves it, the rank of B being the number of singular values that it tells from zero.

The paper says that L falls where D T is positive definite. Stability stands, by the linearisation; but L may rise,
unless B_s >= 0. If T is invertible, u = 0 is the only equilibrium near 0; if not, the linearisation does not say: with
T = 0 and sigma = tanh it may be isolated, with sigma(s) = s it is not.

The gradient flow f_t = B^T sigma(a - B f) with a non-decreasing sigma goes down the convex int Sigma(u) dy, and two solutions
never part: all its steady states are stable. About one, with u = u_inf + v,

    v_t = -B B^T sigma'(u_inf) v,        in the coordinates (phi_l, v)  -D^2 S v,        S = ((phi_k, sigma'(u_inf) phi_l)),

so that v decays at the rate min eig(D S D) where S > 0: sigma'(0) mu_r^2 at u_inf = 0. Steady states need not have u = 0.

What is said of a finite rank does not carry over to infinite rank without change: the rate is at most sigma'(0) mu_r.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import firedrake as fd
import numpy as np
from mpi4py import MPI

from fem_resnet.arguments import number
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.ranks import same
from fem_resnet.theory.spectra.autonomous import AutonomousProblem, sampled
from fem_resnet.theory.spectra.half_planes import count_left, count_left_in_gap
from fem_resnet.theory.spectra.singular_values import SingularSystem
from fem_resnet.theory.spectra.steady_states import SteadyStates, find_steady_states

__all__ = ["Decay", "EigenExpansion", "Stability", "eigen_expansion", "observed_decay", "stability_verdict"]

#: Eigenvectors of a larger condition are no basis to compute with.
_WORST_BASIS = 1e8
#: A slope below this part of sup |sigma'| is none: the place where sigma vanishes is known to round-off.
_NO_SLOPE = 4 * np.finfo(float).eps


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
        Which statement decides, with its numbers, and what of sigma it stands on that is sampled.
    slope : float
        sigma' where sigma vanishes; NaN where there is no such slope. Of a gradient flow the least of S: the same at u = 0.
    rate : float
        u decays as exp(-rate t), or grows if it is negative: sigma'(0) min Re eig(D T), of a gradient flow min eig(D S D);
        NaN without a slope.
    """

    problem: AutonomousProblem
    steady: SteadyStates
    verdict: str
    reason: str
    slope: float
    rate: float

    @property
    def system(self) -> SingularSystem:
        """mu_l, T and the spectra, of the K in u_t = -K sigma(u): B, or B B^T of a gradient flow."""
        return self.problem.generator

    @property
    def rate_bound(self) -> float:
        """sigma'(0) times the smallest eigenvalue of the symmetric part of D T: at most `rate`."""
        return float(self.slope * self.system.product_minimum)

    @property
    def gram_is_invertible(self) -> bool:
        """(a) of Theorem 3.4: T is invertible; its smallest singular value is `system.gram_minimum`."""
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
        """Whether u = 0 is the only equilibrium near 0 in R(B): True if T is invertible, None if that is open."""
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


@supports(*HELD, *STEPPED, "gradient_flow")
def stability_verdict(net: ResidualNetwork, at: float | None = None) -> Stability:
    """Whether steady states of the network are stable: Theorem 3.4 and what 3.2 has beside it. Collective.

    Of perturbations with u in R(B), which is where u is whenever a is: f then goes to a point of f_inf + N(B), not
    necessarily the one it started from.

    Parameters
    ----------
    net
        The network, autonomous if `at` is left out.
    at
        A time: the problem frozen there; T for the limits of Remark 3.1.

    Raises
    ------
    ValueError
        If the network depends on t and no time is given, or sigma vanishes at several places, or decreases somewhere in a
        gradient flow.

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
    steady = find_steady_states(net, at)
    problem, system = steady.problem, steady.problem.generator
    slope, rate = _slope_and_rate(steady)

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
        cut = f"; rank {system.rank}, as {system.cut:.0e} counts as zero" if system.cut else ""
        return result(decided, f"{numbers}: exponentially, their product being positive{cut}")
    if decided == "unstable":
        return result(decided, f"{numbers}: perturbations grow, their product being negative")
    if not slope > 0 or not has_slope:
        why = "sigma has no positive slope there"
    else:
        why = f"min Re eig(D T) = {least:.1g} has no sign that round-off, {system.error:.1g}, could not change"
    if symmetric < -system.error or not _climbs(steady):
        return result("not decided", f"{why}, and inf (B v, v) = {symmetric:.3g}, so that int Sigma(u) may rise")
    on_range, signs = system.symmetric_eigenvalues[0], sampled(problem.activation, "sign_preserving")
    if on_range > system.error:
        return result("asymptotically stable", f"{why}, but (B v, v) >= {on_range:.3g} |v|^2 on R(B){signs}")
    return result("stable", f"{why}, but B_s >= 0 up to round-off, so that int Sigma(u) falls or stays{signs}")


def _finite(lipschitz: float) -> float:
    return lipschitz if np.isfinite(lipschitz) else 1.0


def _by_eigenvalues(system: SingularSystem, sign: float) -> str | None:
    """What the real parts of eig(D T), times a sign, say of u = 0 for all matrices within round-off; None if they do not."""
    A, error, zeros = sign * system.whole, system.error, len(system.whole) - system.rank
    parts = np.sort(np.linalg.eigvals(A).real)
    # As many eigenvalues as the rank must be on the right; those of what was cut as zero are zero.
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
    """Verdict and reason, where there is a steady state."""
    problem = steady.problem
    system, convex = problem.system, sampled(problem.activation, "non_decreasing")
    if not system.rank:
        return "stable", "B = 0, so that every f is a steady state"
    # S is an integral with sigma'(u) >= 0, that of orthonormal functions.
    if slope > system.rank * _NO_SLOPE * _finite(problem.activation.properties.lipschitz):
        return (
            "asymptotically stable",
            f"min eig(D S D) = {rate:.3g}, S >= {slope:.3g}: exponentially, S being positive{convex}",
        )
    why = "sigma' is not one number there" if np.isnan(slope) else f"S >= {slope:.1g}, zero up to round-off"
    return "stable", f"{why}, but int Sigma(u) is convex, so that no two solutions part{convex}"


def _slopes(steady: SteadyStates) -> float | np.ndarray:
    """sigma'(u) at the steady state: a number, or of a gradient flow where u is not constant shape (nodes,).

    NaN at a kink, or where sigma vanishes on an interval or nowhere.
    """
    problem, sigma = steady.problem, steady.problem.activation
    if steady.minimiser is None:
        if steady.zeros is None or steady.zeros[0] != steady.zeros[1]:
            return np.nan
        u = steady.zeros[0]
    elif steady.exist:
        u = steady.rest[:, 0]
    else:
        return np.nan
    if problem.Y.comm.allreduce(any((np.abs(u - kink) < 1e-12).any() for kink in sigma.kinks), op=MPI.LOR):
        return np.nan
    slopes = sigma.derivative(u)
    return slopes if np.ndim(u) else float(slopes)


def _linearised(steady: SteadyStates) -> np.ndarray:
    """A of u_t = -A u in the coordinates (phi_k, u): sigma'(0) D T^T, or D^2 S of a gradient flow; NaN without a slope."""
    system, slopes = steady.problem.generator, _slopes(steady)
    return system.values[:, None] * system.weighted(slopes) if np.ndim(slopes) else slopes * system.matrix


def _slope_and_rate(steady: SteadyStates) -> tuple[float, float]:
    problem, system, slopes = steady.problem, steady.problem.generator, _slopes(steady)
    if not np.ndim(slopes):
        slopes = float(slopes)
        return slopes, float(slopes * system.eigenvalues.real.min(initial=np.inf)) if system.rank else slopes * np.inf
    S, D = system.weighted(slopes), problem.system.values
    least = [np.linalg.eigvalsh((X + X.T) / 2).min(initial=np.inf) for X in (S, D[:, None] * S * D)]
    return float(least[0]), float(least[1])


def _climbs(steady: SteadyStates) -> bool:
    """Whether sigma has the sign of its argument, seen from its one zero: then int Sigma(u) is least there."""
    # Having no other zero, sigma has one sign on each side.
    return bool(np.all(np.array([-1, 1]) * steady.problem.activation(steady.zeros[0] + np.array([-1e-3, 1e-3])) > 0))


# -- the linearised flow ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EigenExpansion:
    """`w(t) = w_0 + sum_l c_l exp(-sigma'(0) omega_l t) v_l`, the solution of w_t = -sigma'(0) B w of 3.2.

    v_l are the eigenfunctions of B in R(B), B v_l = omega_l v_l, and w_0 is the part of w(0) in N(B), along R(B). For
    B = B^T they are orthonormal and c_l = (w(0), v_l). Of a gradient flow it is w_t = -B^T sigma'(u_inf) B w with 1 for
    sigma'(0), and v_l orthonormal in R(B^T). Get one from `eigen_expansion`.

    Attributes
    ----------
    problem : AutonomousProblem
    slope : float
        sigma'(0), or 1.
    eigenvalues : numpy.ndarray
        omega_l, complex, shape (r,).
    vectors : numpy.ndarray
        (phi_k, v_l), or (psi_k, v_l) of a gradient flow, complex, shape (r, r): coordinates of the eigenfunctions.
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
        """w(t), t >= 0, a new Function. Collective.

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
            raise ValueError(f"t: w(t) overflows, got {t!r}")
        moving = _values_of(self.problem)((self.vectors @ (factors * self.coefficients)).real)
        return Y.batch(Y.values(self.at_rest) + moving)


def _values_of(problem: AutonomousProblem) -> Callable[[np.ndarray], np.ndarray]:
    """From coordinates of eigenfunctions to values."""
    return problem.system.right_values if problem.gradient_flow else problem.system.left_values


@supports(*HELD, *STEPPED, "gradient_flow")
def eigen_expansion(net: ResidualNetwork, perturbation: fd.Function, at: float | None = None) -> EigenExpansion:
    """The linearised flow about a steady state, in eigenfunctions of B, or of B^T sigma'(u_inf) B. Collective.

    Parameters
    ----------
    net, at
        As for `stability_verdict`.
    perturbation
        w(0) = f_I - f_inf, a Function of `Y.V` or a batch.

    Raises
    ------
    TypeError, ValueError
        If `perturbation` does not fit; if sigma has no slope where it vanishes, a gradient flow no steady state, or B no
        basis of eigenfunctions: T is singular, or eigenvectors of D T are dependent (of a condition above 1e8).
    """
    steady = find_steady_states(net, at)
    problem, system = steady.problem, steady.problem.system
    slopes, values = _slopes(steady), problem.read(perturbation, "perturbation")
    if not np.isfinite(slopes).all():
        what = (
            f"there is no steady state: {steady.reason}"
            if problem.gradient_flow and not steady.exist
            else (f"{problem.activation.name} has no slope where it vanishes, so there is no linearisation")
        )
        raise ValueError(f"net: {what}")
    if problem.gradient_flow:
        S, D = problem.generator.weighted(slopes * np.ones(problem.Y.nodes)), system.values
        omega, vectors = np.linalg.eigh(D[:, None] * (S + S.T) / 2 * D)
        slope, onto = 1.0, vectors
    else:
        omega, vectors = np.linalg.eig(system.matrix)
        slope, onto = slopes, system.gram.T @ vectors
    if system.rank and not (np.linalg.cond(onto) < _WORST_BASIS and np.linalg.cond(vectors) < _WORST_BASIS):
        raise ValueError(
            f"net: B has no basis of eigenfunctions to compute with; smallest singular value of T {system.gram_minimum:.1e}"
        )
    # (psi, w) = T^T X c for the part of w in R(B), sum_l c_l v_l; the rest has (psi, w_0) = 0. Of a gradient flow it is X c.
    c = np.linalg.solve(onto, system.right_coefficients(values).astype(complex))
    at_rest = problem.Y.batch(values - _values_of(problem)((vectors @ c).real))
    return EigenExpansion(problem, slope, omega.astype(complex), vectors.astype(complex), c, at_rest)


# -- what a simulation shows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decay:
    """How u decays in a simulation. Get one from `observed_decay`.

    Attributes
    ----------
    times : numpy.ndarray
        t_0 .. t_L, shape (L + 1,).
    sizes : numpy.ndarray
        Norm of u, less that of the steady state, shape (L + 1, samples): that of its coordinates in eigenvectors of D T^T, or
        D^2 S of a gradient flow, equivalent to the norm of L2(Y), in which a pair of complex eigenvalues does not swing.
    used : numpy.ndarray
        Which times the fit has taken, shape (L + 1, samples), bool.
    predicted : float
        `Stability.rate`.
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


# With bases of each layer a network is not known to be autonomous.
@supports(
    "learned_factors", "learned_times", "stable_kernel", "nodal_bias", "linear_in_time", "shared_in_time", *STEPPED,
    "gradient_flow",
)  # fmt: skip
def observed_decay(net: ResidualNetwork, initial: fd.Function) -> Decay:
    """Run an autonomous network, and fit the exponential rate at which u decays in the end. Collective.

    The fit takes the second half of the time up to which u is above round-off. Its rate is that of Theorem 3.4 if by
    then u is small, so that sigma is linear there, and the fastest of what is left has gone; and if the steps are
    short: a method's own rate is that of its stability function. u is taken by its coordinates u_l of (3.5a), (3.5b), less
    those of the steady state.

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
    problem, system, steady = stability.problem, stability.problem.system, stability.steady
    A = _linearised(steady)
    vectors = np.linalg.eig(A)[1] if np.isfinite(A).all() else np.eye(system.rank)
    if not np.linalg.cond(vectors) < _WORST_BASIS:
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
    # Below this u = a - B f is what round-off leaves of a and B f.
    above = sizes > 1e-10 * (sizes.max(axis=0) + np.linalg.norm(bias))
    last = np.array([times[keep].max(initial=0.0) for keep in above.T])
    return Decay(times, sizes, above & (times[:, None] >= last / 2), stability.rate)
