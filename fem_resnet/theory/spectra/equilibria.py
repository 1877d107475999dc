"""Equilibria of u_t = -B sigma(u), section 3.3: u = a - B f stands still there, while f may drift.

u stands still if sigma(u) is in N(B). These are the r equations (psi_l, sigma(u)) = 0, so that the set of equilibria has the
codimension r. If u = a - B f is an equilibrium and sigma(u) is not 0, then

    f(t) = f_I + t sigma(u)

grows for ever in N(B). The time-uniform estimates of Theorem 3.2 do not exclude that. Only u in a + R(B) belong to an f.
Lemma 3.3: for B = B^T and s sigma(s) >= 0, (3.4), an equilibrium in R(B) has u sigma(u) = 0. If B is not symmetric, there may
be other equilibria.

The gradient flow f_t = B^T sigma(a - B f) has u_t = -K sigma(u) with K = B B^T. So K takes the place of B, and the equations
are (phi_l, sigma(u)) = 0. f does not drift there, as B^T sigma(u) = 0.
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
#: Values u with a given sigma(u) are searched up to this size, with so many bisections.
_FAR, _BISECTIONS = 100.0, 70


@dataclass(frozen=True)
class Equilibrium:
    """A u with sigma(u) in N(B), or in N(B^T) for a gradient flow. Get it from `Equilibria`.

    Attributes
    ----------
    u : Function
        The equilibrium, of one sample.
    speed : float
        How fast f drifts: |f_t| = |sigma(u)| in L2(Y), which is 0 if f is steady; 0 for a gradient flow.
    pairing : float
        int u sigma(u) dy. By Lemma 3.3 it is 0 if u is in R(B), B is symmetric and s sigma(s) >= 0.
    outside : float
        The norm in L2(Y) of the part of u outside of R(B).
    eigenvalues : numpy.ndarray
        The eigenvalues of -K sigma'(u) on R(B), with K = B or B B^T: u_t = -K sigma(u) linearised at u. Complex,
        real parts falling, shape (r,), in the unit of 1/t.
    """

    u: fd.Function
    speed: float
    pairing: float
    outside: float
    eigenvalues: np.ndarray


@dataclass(frozen=True)
class Equilibria:
    """The set of u with sigma(u) in N(K), where u_t = -K sigma(u) stands still; K = B, or B B^T for a gradient flow.

    Get it from `find_equilibria`.

    Attributes
    ----------
    problem : AutonomousProblem
        The problem that u and f belong to.
    tolerance : float
        u is an equilibrium up to this residual; no unit.
    """

    problem: AutonomousProblem
    tolerance: float

    @property
    def codimension(self) -> int:
        """The codimension r of the set: the number of equations (psi_l, sigma(u)) = 0."""
        return self._generator.rank

    @property
    def _generator(self) -> SingularSystem:
        return self.problem.generator

    @property
    def lemma_applies(self) -> bool:
        """Whether Lemma 3.3 applies: K = K^T and s sigma(s) >= 0, (3.4). Then `pairing` is 0 where `outside` is 0."""
        return self._generator.is_symmetric and self.problem.activation.properties.sign_preserving

    def residuals(self, u: fd.Function) -> np.ndarray:
        """The part of |sigma(u)| in R(K^T), relative to |sigma(u)|, shape (samples,); 0 where sigma(u) = 0. Collective."""
        return self._residuals(self.problem.read(u, "u"))

    def _residuals(self, u: np.ndarray) -> np.ndarray:
        sigma = self.problem.activation(u)
        part = np.linalg.norm(self._generator.right_coefficients(sigma), axis=0)
        whole = self.problem.norms(sigma)
        return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)

    def contain(self, u: fd.Function) -> np.ndarray:
        """Whether each given u is an equilibrium, up to the tolerance, shape (samples,), bool. Collective."""
        return self.residuals(u) <= self.tolerance

    def nearest(self, u: fd.Function) -> fd.Function:
        """Equilibria near the given u, a new Function; if sigma is smooth, at a locally least distance. Collective.

        Newton's method minimises |v - u|^2 / 2 under (psi_l, sigma(v)) = 0, with a linear system of size r in each step. It
        may fail at kinks of sigma or far from the set. Then the nearer one of two equilibria is returned that need no search.
        The first exists for an increasing sigma with sigma(0) = 0: sigma(v) = c w, where w is sigma(u) without its part in
        R(B^T), and c <= 1 is as large as the range of sigma allows. The second is u, clipped to the interval where sigma
        vanishes.

        Parameters
        ----------
        u
            A Function of `Y.V` or a batch.

        Raises
        ------
        RuntimeError
            If Newton's method fails and neither of the two exists.
        """
        values = self.problem.read(u, "u")
        return self.problem.Y.batch(np.column_stack([self._nearest(v) for v in values.T]))

    def distance(self, u: fd.Function) -> np.ndarray:
        """The distance in L2(Y) of each u from `nearest(u)`, at least that from the set, shape (samples,). Collective."""
        Y = self.problem.Y
        return self.problem.norms(Y.values(self.nearest(u)) - Y.values(u))

    def velocity(self, f: fd.Function) -> fd.Function:
        """f_t, a new Function. If u = a - B f is an equilibrium, f(t) = f + t f_t; for a gradient flow f_t = 0. Collective."""
        return self.problem.Y.batch(self.problem.rate(self.problem.argument(self.problem.read(f, "f"))))

    def describe(self, u: fd.Function) -> list[Equilibrium]:
        """Speed, pairing and spectrum of the given equilibria, one entry for each sample. Collective."""
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
        """Equilibria in a + R(B), which trajectories of f can reach, by Powell's hybrid method from u = a - B f. Collective.

        Parameters
        ----------
        f
            A Function of `Y.V` or a batch.

        Returns
        -------
        list of Equilibrium
            Each equilibrium once, in the order of the samples from which it was first found. Samples from which none was
            found have no entry.
        """
        problem, system = self.problem, self._generator
        bias = problem.bias[:, None]
        apart = bias - system.left_values(system.left_coefficients(bias))

        def u_of(c: np.ndarray) -> np.ndarray:
            return apart + system.left_values(c[:, None])

        def equations(c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            u = u_of(c)
            return system.right_coefficients(problem.activation(u))[:, 0], self._jacobian(u[:, 0])

        found: list[np.ndarray] = []
        for start in system.left_coefficients(problem.argument(problem.read(f, "f"))).T:
            if not start.size:
                break
            result = scipy.optimize.root(equations, start, jac=True, options={"xtol": 1e-13})
            c = result.x
            # The length of the next Newton step decides, because (psi, sigma(u)) is also small where sigma decays.
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
                f"nearest: no equilibrium near u was found in {_NEWTON_STEPS} steps, and none is known without a search for "
                f"{self.problem.activation.name}; start nearer to one, such as one of `found_from`"
            )
        distances = [self.problem.norms((v - u)[:, None])[0] for v in others]
        return others[int(np.argmin(distances))]

    @np.errstate(over="ignore", invalid="ignore")
    def _newton(self, u: np.ndarray) -> np.ndarray | None:
        """The nearest equilibrium by Newton's method with a line search; None if it does not converge."""
        problem, system, psi = self.problem, self._generator, self._generator.kernel.psi
        sigma = problem.activation
        v, multipliers, penalty = u.copy(), np.zeros(system.rank), 0.0

        def in_range(x: np.ndarray) -> np.ndarray:
            return system.right_coefficients(x[:, None])[:, 0]

        def merit(v: np.ndarray) -> float:
            return problem.norms((v - u)[:, None])[0] ** 2 / 2 + penalty * np.linalg.norm(in_range(sigma(v)))

        for _ in range(_NEWTON_STEPS):
            slope, F = sigma.derivative(v), in_range(sigma(v))
            pulled = system.right_values(multipliers[:, None])[:, 0]
            # The diagonal curvature of the Lagrangian, bounded below so that steps are descents.
            H = np.maximum(1 + sigma.second_derivative(v) * pulled, 0.2)
            A = system.right.T @ weighted_gram(psi, slope**2 / H, psi) @ system.right
            multipliers = np.linalg.lstsq(A, F - in_range(slope * (v - u) / H), rcond=1e-14)[0]
            step = -(v - u + slope * system.right_values(multipliers[:, None])[:, 0]) / H
            size = problem.norms(np.column_stack([step, v]))
            if not np.isfinite(size).all():
                return None
            if size[0] <= 1e-11 * (1 + size[1]):
                v = v + step
                # Where A is singular the step may be short although v is no equilibrium.
                return v if self._residuals(v[:, None])[0] <= self.tolerance else None
            penalty = max(penalty, float(2 * np.linalg.norm(multipliers)))
            length, before = 1.0, merit(v)
            while length > 1e-4 and not merit(v + length * step) <= before:
                length /= 2
            v = v + length * step
        return None

    def _without_search(self, u: np.ndarray) -> list[np.ndarray]:
        """The equilibria that need no search, as far as they exist."""
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
    """V with sigma(v) = c values, for the largest c <= 1 with |v| <= 100; for an increasing sigma with sigma(0) = 0."""
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


@supports("channels", *HELD, *STEPPED, "gradient_flow")
def find_equilibria(net: ResidualNetwork, at: float | None = None, tolerance: float = 1e-8) -> Equilibria:
    """The equilibria of u_t = -B sigma(u) of section 3.3, or of u_t = -B B^T sigma(u) for a gradient flow.

    Collective over the ranks of the label domain.

    Parameters
    ----------
    net, at
        As for `find_steady_states`.
    tolerance
        u is an equilibrium if the part of sigma(u) in R(B^T), or in R(B) for a gradient flow, is at most this part of
        |sigma(u)|; no unit.

    Raises
    ------
    ValueError
        If an argument does not fit, or the network depends on t and no time is given.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Bias, Kernel, LabelSpace, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 4)
    >>> net = ResidualNetwork(Kernel(phi, in_time="shared"), bias=Bias(in_time="shared"))
    >>> net.kernel.set(0, np.diag([0.0, 1.0, 0.0, 0.0]))
    >>> find_equilibria(net).contain(phi.function(np.eye(4)[:, :2])).tolist()
    [True, False]
    """
    return Equilibria(autonomous_problem(net, at), number("tolerance", tolerance, least=0))
