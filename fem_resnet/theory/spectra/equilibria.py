"""Equilibria of u_t = -B sigma(u), 3.3: where u = a - B f stands still, while f may drift.

The equation for u alone, u_t = -B sigma(u), stands still at every u with sigma(u) in N(B): r equations (psi_l,
sigma(u)) = 0, thus a set of all dimensions but r. Where u = a - B f is such an equilibrium and sigma(u) is not 0,

    f(t) = f_I + t sigma(u)

grows for ever, in N(B), unseen by the time-uniform estimates of Theorem 3.2. Only u in a + R(B) belong to an f. Lemma
3.3: for B = B^T and s sigma(s) >= 0, (3.4), an equilibrium in R(B) has u sigma(u) = 0; if B is not symmetric there may
be others.

The gradient flow f_t = B^T sigma(a - B f) has u_t = -K sigma(u), K = B B^T: the same with K in place of B, so that (phi_l,
sigma(u)) = 0; f does not drift there, as B^T sigma(u) = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import firedrake as fd
import numpy as np
import scipy.optimize
from mpi4py import MPI

from fem_resnet.arguments import number
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.theory.spectra.autonomous import AutonomousProblem, autonomous_problem
from fem_resnet.theory.spectra.singular_values import SingularSystem, weighted_gram
from fem_resnet.theory.spectra.zero_set import zero_set

__all__ = ["Equilibria", "Equilibrium", "find_equilibria"]

_NEWTON_STEPS = 100
#: Arguments of sigma are looked for up to here, to all digits.
_FAR, _BISECTIONS = 100.0, 70


@dataclass(frozen=True)
class Equilibrium:
    """A u with sigma(u) in N(B), or N(B^T) of a gradient flow.

    Attributes
    ----------
    u : Function
    speed : float
        |f_t| in L2(Y): |sigma(u)|, how fast f drifts, 0 if f is steady; 0 of a gradient flow.
    pairing : float
        int u sigma(u) dy: 0 by Lemma 3.3 for u in R(B), B symmetric and s sigma(s) >= 0.
    outside : float
        |u - its part in R(B)|.
    eigenvalues : numpy.ndarray
        Of -K sigma'(u) on R(B), complex: u_t = -K sigma(u) linearised at this equilibrium, K = B or B B^T.
    """

    u: fd.Function
    speed: float
    pairing: float
    outside: float
    eigenvalues: np.ndarray


@dataclass(frozen=True)
class Equilibria:
    """The set of u with sigma(u) in N(K), where u_t = -K sigma(u) stands still; K = B, or B B^T. Get one from `find_equilibria`.

    Attributes
    ----------
    problem : AutonomousProblem
    tolerance : float
        Up to which residual u is an equilibrium.
    """

    problem: AutonomousProblem
    tolerance: float

    @property
    def codimension(self) -> int:
        """r: how many equations (psi_l, sigma(u)) = 0 there are."""
        return self._generator.rank

    @property
    def _generator(self) -> SingularSystem:
        return self.problem.generator

    @property
    def lemma_applies(self) -> bool:
        """Whether Lemma 3.3 does: K = K^T, and s sigma(s) >= 0 as in (3.4). Then `pairing` is 0 where `outside` is."""
        return self._generator.is_symmetric and self.problem.activation.properties.sign_preserving

    def residuals(self, u: fd.Function) -> np.ndarray:
        """|part of sigma(u) in R(K^T)| / |sigma(u)|, shape (samples,); 0 where sigma(u) = 0. Collective."""
        return self._residuals(self.problem.read(u, "u"))

    def _residuals(self, u: np.ndarray) -> np.ndarray:
        sigma = self.problem.activation(u)
        part = np.linalg.norm(self._generator.right_coefficients(sigma), axis=0)
        whole = self.problem.norms(sigma)
        return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)

    def contain(self, u: fd.Function) -> np.ndarray:
        """Whether these u are equilibria, up to the tolerance: shape (samples,), bool. Collective."""
        return self.residuals(u) <= self.tolerance

    def nearest(self, u: fd.Function) -> fd.Function:
        """Equilibria near these u, a new Function; where sigma is smooth those of least distance, at least locally.

        Newton's method for: least |v - u|^2 / 2 under (psi_l, sigma(v)) = 0, of which every step is a system of size r.
        Where it does not converge, as at kinks of sigma or far from the set, the nearer one is taken of two equilibria
        that need no search: v with sigma(v) = c (sigma(u) - its part in R(B^T)), the largest c <= 1 that sigma attains,
        for an increasing sigma with sigma(0) = 0; and u cut to where sigma vanishes. Collective.

        Raises
        ------
        RuntimeError
            If there is none of these.
        """
        values = self.problem.read(u, "u")
        return self.problem.Y.batch(np.column_stack([self._nearest(v) for v in values.T]))

    def distance(self, u: fd.Function) -> np.ndarray:
        """Distance of these u from `nearest(u)` in L2(Y), shape (samples,): at least that from the set. Collective."""
        Y = self.problem.Y
        return self.problem.norms(Y.values(self.nearest(u)) - Y.values(u))

    def velocity(self, f: fd.Function) -> fd.Function:
        """f_t: where u = a - B f is an equilibrium, f(t) = f + t f_t for all t, of a gradient flow f(t) = f. Collective."""
        return self.problem.Y.batch(self.problem.rate(self.problem.argument(self.problem.read(f, "f"))))

    def describe(self, u: fd.Function) -> list[Equilibrium]:
        """What is to be said of these equilibria, one a sample. Collective."""
        problem = self.problem
        Y, system, values = problem.Y, self._generator, problem.read(u, "u")
        sigma = problem.activation(values)
        outside = problem.norms(values - system.left_values(system.left_coefficients(values)))
        pairing = Y.sum(Y.weights @ (values * sigma))
        return [
            Equilibrium(Y.batch(v), float(speed), float(inner), float(apart), self._spectrum(v))
            for v, speed, inner, apart in zip(values.T, problem.norms(problem.rate(values)), pairing, outside)
        ]

    def found_from(self, f: fd.Function) -> list[Equilibrium]:
        """Equilibria in a + R(B), which trajectories of f can reach, found from u = a - B f by Powell's hybrid method.

        Each is named once, in the order of the samples of f that led to it first; samples that lead nowhere are left
        out. Collective.
        """
        problem, system = self.problem, self._generator
        bias = problem.bias[:, None]
        apart = bias - system.left_values(system.left_coefficients(bias))

        def u_of(c):
            return apart + system.left_values(c[:, None])

        def equations(c):
            u = u_of(c)
            return system.right_coefficients(problem.activation(u))[:, 0], self._jacobian(u[:, 0])

        found: list[np.ndarray] = []
        for start in system.left_coefficients(problem.argument(problem.read(f, "f"))).T:
            if not start.size:
                break
            result = scipy.optimize.root(equations, start, jac=True, options={"xtol": 1e-13})
            c = result.x
            # How far Newton's method would still go: a small (psi, sigma(u)) says nothing where sigma decays.
            left = np.linalg.norm(np.linalg.lstsq(equations(c)[1], result.fun, rcond=1e-12)[0])
            known = any(np.linalg.norm(c - other) <= 1e-6 * (1 + np.linalg.norm(c)) for other in found)
            if left <= self.tolerance * (1 + np.linalg.norm(c)) and not known:
                found.append(c)
        return self.describe(problem.Y.batch(np.column_stack([u_of(c) for c in found]))) if found else []

    def _jacobian(self, u: np.ndarray) -> np.ndarray:
        """((psi_l, sigma'(u) phi_k)), shape (r, r)."""
        return self._generator.weighted(self.problem.activation.derivative(u))

    def _spectrum(self, u: np.ndarray) -> np.ndarray:
        found = np.linalg.eigvals(-self._generator.values[:, None] * self._jacobian(u)).astype(complex)
        return found[np.lexsort((found.imag, -found.real))]

    def _nearest(self, u: np.ndarray) -> np.ndarray:
        v = self._newton(u)
        others = [v] if v is not None else self._without_search(u)
        if not others:
            raise RuntimeError(
                f"nearest: no equilibrium near u was found in {_NEWTON_STEPS} steps, and "
                f"{self.problem.activation.name} offers none; start nearer to one, `found_from` may have some"
            )
        distances = [self.problem.norms((v - u)[:, None])[0] for v in others]
        return others[int(np.argmin(distances))]

    @np.errstate(over="ignore", invalid="ignore")
    def _newton(self, u: np.ndarray) -> np.ndarray | None:
        problem, system, psi = self.problem, self._generator, self._generator.kernel.psi
        sigma = problem.activation
        v, multipliers, penalty = u.copy(), np.zeros(system.rank), 0.0

        def in_range(x):
            return system.right_coefficients(x[:, None])[:, 0]

        def merit(v):
            return problem.norms((v - u)[:, None])[0] ** 2 / 2 + penalty * np.linalg.norm(in_range(sigma(v)))

        for _ in range(_NEWTON_STEPS):
            slope, F = sigma.derivative(v), in_range(sigma(v))
            pulled = system.right_values(multipliers[:, None])[:, 0]
            # Curvature of the Lagrangian, diagonal; kept positive, so that steps go down.
            H = np.maximum(1 + sigma.second_derivative(v) * pulled, 0.2)
            A = system.right.T @ weighted_gram(psi, slope**2 / H, psi) @ system.right
            multipliers = np.linalg.lstsq(A, F - in_range(slope * (v - u) / H), rcond=1e-14)[0]
            step = -(v - u + slope * system.right_values(multipliers[:, None])[:, 0]) / H
            size = problem.norms(np.column_stack([step, v]))
            if not np.isfinite(size).all():
                return None
            if size[0] <= 1e-11 * (1 + size[1]):
                v = v + step
                # At a singular A the step may be short though v is no equilibrium.
                return v if self._residuals(v[:, None])[0] <= self.tolerance else None
            penalty = max(penalty, 2 * np.linalg.norm(multipliers))
            length, before = 1.0, merit(v)
            while length > 1e-4 and not merit(v + length * step) <= before:
                length /= 2
            v = v + length * step
        return None

    def _without_search(self, u: np.ndarray) -> list[np.ndarray]:
        problem, system, sigma = self.problem, self._generator, self.problem.activation
        found = []
        if sigma.properties.strictly_increasing and sigma.properties.zero_at_zero:
            values = sigma(u)[:, None]
            found.append(_inverse(problem, (values - system.right_values(system.right_coefficients(values)))[:, 0]))
        try:
            zeros = zero_set(sigma)
        except ValueError:
            zeros = None
        if zeros is not None:
            found.append(np.clip(u, *zeros))
        return found


def _inverse(problem: AutonomousProblem, values: np.ndarray) -> np.ndarray:
    """V with sigma(v) = c values, the largest c <= 1 for which |v| <= 100; sigma increases, sigma(0) = 0."""
    sigma, comm = problem.activation, problem.Y.comm
    far = np.where(values < 0, -_FAR, _FAR)
    with np.errstate(divide="ignore", invalid="ignore"):
        within = np.where(values == 0, np.inf, sigma(far) / values).min(initial=np.inf)
    values = min(1.0, (1 - 1e-12) * comm.allreduce(within, op=MPI.MIN)) * values
    near = np.zeros_like(values)
    for _ in range(_BISECTIONS):
        middle = (near + far) / 2
        below = np.abs(sigma(middle)) < np.abs(values)
        near, far = np.where(below, middle, near), np.where(below, far, middle)
    return (near + far) / 2


@supports(*HELD, *STEPPED, "gradient_flow")
def find_equilibria(net: ResidualNetwork, at: float | None = None, tolerance: float = 1e-8) -> Equilibria:
    """The equilibria of u_t = -B sigma(u) of 3.3, or of u_t = -B B^T sigma(u). Collective.

    Parameters
    ----------
    net, at
        As for `find_steady_states`.
    tolerance
        Up to which part of sigma(u) in R(B^T), or R(B) of a gradient flow, u is an equilibrium; no unit.

    Raises
    ------
    ValueError
        If the network depends on t and no time is given.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 4)
    >>> net = ResidualNetwork(phi, bias_in_time="shared", kernel_in_time="shared")
    >>> net.kernel.set(0, np.diag([0.0, 1.0, 0.0, 0.0]))
    >>> find_equilibria(net).contain(phi.function(np.eye(4)[:, :2])).tolist()
    [True, False]
    """
    return Equilibria(autonomous_problem(net, at), number("tolerance", tolerance, least=0))
