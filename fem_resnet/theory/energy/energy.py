r"""The energies of section 3.2 along a solution, and what Theorem 3.2 says of them.

Let u = a - B f, so that u_t = -B sigma(u). Let Sigma be the primitive of sigma with Sigma(0) = 0, and B_s the symmetric
part of B. Two energies fall along solutions:

    d/dt int Sigma(u) dy                        = -(B_s sigma(u), sigma(u)) <= 0      if B_s >= 0,
    d/dt ( 1/2 |B^(1/2) f|^2 - (a, f) )         = -(sigma(u), u)            <= 0      if B = B^T, s sigma(s) >= 0.

From the first energy Theorem 3.2 concludes, where B_s >= 0,

    (i)    int Sigma(u(t)) dy <= int Sigma(u_I) dy,
    (ii)   int_0^t |B_s^(1/2) sigma(u)|^2 ds <= int Sigma(u_I) dy           if s sigma(s) >= 0, (3.4), so Sigma >= 0.

The second energy needs B = B^T >= 0, s sigma(s) >= 0 and a in R(B^(1/2)). Let alpha = |B^(-1/2) a|, and let F_I be the
energy at f_I, which is at least -alpha^2 / 2. Then

    (iii)  |B^(1/2) f(t)| + |(a, f(t))| <= (1 + alpha) (alpha + (alpha^2 + 2 F_I)^(1/2)),
    (iv)   int_0^t (sigma(u), u) ds <= F_I + alpha^2 / 2.

Before the theorem the paper bounds B f, also where B_s >= 0 and (3.4) holds. If |sigma| grows linearly, so that
Sigma(s) >= C_3 s^2 for |s| >= C_4, then

    int |B f|^2 dy <= 2 int a^2 dy + 2 (C_4^2 |Y| + int Sigma(u_I) dy / C_3).

If only |sigma(s)| >= C_1 for |s| >= C_2, then

    int |B f| dy <= int |a| dy + C_2 |Y| + int Sigma(u_I) dy / C_1.

The code takes the constants that make the bound least. All statements are about the autonomous problem (3.2a), (3.2b).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fem_resnet.activation.activation import Activation
from fem_resnet.arguments import choice
from fem_resnet.costate.trajectory import LayerTrajectory
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.ranks import same
from fem_resnet.theory.energy.step_monitor import StepMonitor
from fem_resnet.theory.spectra.assumptions import (
    AUTONOMOUS,
    BELOW,
    IN_RANGE,
    LINEAR,
    NON_NEGATIVE,
    SIGN,
    SYMMETRIC,
    energy_conditions,
    problem_at_start,
)  # fmt: skip
from fem_resnet.time_stepping.evolution import Step

__all__ = ["EnergyMonitor", "EnergyStatement"]

#: Round-off in sums over nodes, relative to their size.
_ROUND_OFF = 1e-12
#: The values of |s| at which an activation is sampled; neighbours differ by less than 1 %.
_SIZES = np.geomspace(1e-6, 1e4, 4001)


@dataclass(frozen=True)
class EnergyStatement:
    """A statement of section 3.2, compared with one solution.

    Attributes
    ----------
    name, says : str
        The name of the statement in Theorem 3.2, or the quantity that it is about; and what it says.
    unmet : tuple of str
        Conditions that fail, each with the reason. The statement applies if the tuple is empty.
    observed : numpy.ndarray
        The largest value of the left-hand side, shape (samples,).
    bound : numpy.ndarray or None
        The right-hand side, shape (samples,); None where a condition fails without which there is no number.
    holds : bool or None
        Whether `observed` is at most `bound`, for all samples; None without a bound. Round-off is allowed for. For a time
        integral the defect of its energy identity is allowed for too: that is the error of the time steps.
    caveats : tuple of str
        Which properties of sigma the conditions use that are sampled and not proved.
    """

    name: str
    says: str
    unmet: tuple[str, ...]
    observed: np.ndarray
    bound: np.ndarray | None
    holds: bool | None
    caveats: tuple[str, ...] = ()

    @property
    def applies(self) -> bool:
        """Whether all conditions hold."""
        return not self.unmet

    def __str__(self) -> str:
        verdict = {True: "holds", False: "fails", None: "no bound"}[self.holds]
        bound = "" if self.bound is None else f", bound {self.bound.max():.4g}"
        lines = [f"{self.name}: {self.says}", f"    {verdict}: observed {self.observed.max():.4g}{bound}"]
        if self.unmet:
            lines.append(f"    the statement does not apply: {'; '.join(self.unmet)}")
        elif self.holds is False:
            lines.append("    the statement applies, but the time steps break it: take shorter steps")
        lines += [f"    {caveat}" for caveat in self.caveats]
        return "\n".join(lines)


class EnergyMonitor(StepMonitor):
    """The energies of section 3.2 after each step of a solution of (3.2a), (3.2b).

    As a monitor for `follow_trajectory` it measures after each step of the TS, and integrates in time with the stages of
    the method. It can also measure a run of any method at the layer times (`watch`). There the time integrals over a
    layer are (B_s d, d) / tau and ((u_0 + u_1) / 2, d) with d = f_1 - f_0: with these the energy identities are exact for
    the discrete gradient, and for the implicit midpoint rule with one step a layer. The monitor keeps numbers and no fields.

    Parameters
    ----------
    net
        The network, at its present coefficients. Collective over the ranks of the label domain.

    Attributes
    ----------
    conditions : dict of str to EnergyCondition
        What `energy_conditions` returns.
    times : list of float
        The times of the measurements so far, in the unit of t.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Bias, Kernel, LabelSpace, follow_trajectory, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 3)
    >>> net = ResidualNetwork(Kernel(phi, in_time="shared"), bias=Bias(in_time="shared"))
    >>> net.kernel.set(0, np.diag([1.0, 0.5, 0.5]))
    >>> monitor = EnergyMonitor(net)
    >>> _ = follow_trajectory(net, net.Y.batch(phi.values[:, 1]), monitor)
    >>> [statement.name for statement in monitor.statements() if statement.applies and statement.holds][:3]
    ['int Sigma(u) falls', '(i)', '(ii)']
    """

    @supports("channels", *HELD, *STEPPED)
    def __init__(self, net: ResidualNetwork):
        super().__init__(net)
        self._problem, _ = problem_at_start(net)
        self.conditions = energy_conditions(net)
        self._rows: list[dict[str, np.ndarray]] = []

    # -- measuring ----------------------------------------------------------------------------------------------------

    def _measure_start(self, layer: LayerTrajectory, t: float, f: np.ndarray) -> None:
        self._keep(t, self._measured(layer, t, f), 0.0, 0.0)

    def _measure_step(self, layer: LayerTrajectory, end: float, step: Step) -> None:
        integrals = [0.0, 0.0]
        for time, weight, f in zip(step.times, step.weights, step.values, strict=True):
            if weight != 0.0:
                stage = self._measured(layer, layer.inputs.start + time, f)
                integrals[0] += step.length * weight * stage["dissipation"]
                integrals[1] += step.length * weight * stage["power"]
        self._keep(end, self._measured(layer, end, step.last), *integrals)

    def _measure_layer(self, layer: LayerTrajectory, before: np.ndarray, f: np.ndarray) -> None:
        tau = layer.inputs.length
        d, middle = f - before, layer.inputs.start + tau / 2
        Bd = layer.inputs.factors.apply(layer.beta(middle), d)
        u = layer.argument(middle, (before + f) / 2)
        dissipated, spent = self._Y.sum(np.array([self._Y.weights @ (Bd * d) / tau, self._Y.weights @ (u * d)]))
        self._keep(layer.end, self._measured(layer, layer.end, f), dissipated, spent)

    def _keep(
        self, t: float, measured: dict[str, np.ndarray], dissipated: float | np.ndarray, spent: float | np.ndarray
    ) -> None:
        """Keep a row; `dissipated` and `spent` are integrals since the last one."""
        last = self._rows[-1] if self._rows else {"dissipated": 0.0, "spent": 0.0}
        zero = np.zeros_like(measured["primitive"])
        measured |= {"dissipated": last["dissipated"] + dissipated + zero, "spent": last["spent"] + spent + zero}
        self.times.append(t)
        self._rows.append(measured)

    def _measured(self, layer: LayerTrajectory, t: float, f: np.ndarray) -> dict[str, np.ndarray]:
        kernel, beta = layer.inputs.factors, layer.beta(t)
        a = layer.inputs.bias.coefficients(layer.fraction(t))[:, None]
        Bf = kernel.apply(beta, f)
        u = a - Bf
        s = self._sigma(u)
        Sigma = self._sigma.primitive(u)
        size = np.abs(Sigma) + np.abs(s) * (np.abs(a) + np.abs(Bf))
        fields = (Sigma, size, u * s, Bf * f, a * f, np.abs(Bf), Bf**2)
        integrals = self._Y.sum(np.array([self._Y.weights @ values for values in fields]))
        primitive, size, power, square, coupling, first, second = integrals
        return {
            "size": size,
            "primitive": primitive,
            "dissipation": np.sum(kernel.phi.project(s) * (beta @ kernel.psi.project(s)), axis=0),
            "potential": square / 2 - coupling,
            "power": power,
            "root": np.sqrt(np.maximum(square, 0.0)),
            "coupling": coupling,
            "Bf_1": first,
            "Bf_2": second,
        }

    def values(self, name: str) -> np.ndarray:
        """One of the measured quantities, shape (times, samples).

        Parameters
        ----------
        name
            "primitive": int Sigma(u). "dissipation": (B_s sigma(u), sigma(u)). "dissipated": its time integral, as in (ii).
            "potential": (B f, f) / 2 - (a, f), which is 1/2 |B^(1/2) f|^2 - (a, f) where B has a root. "power":
            (sigma(u), u). "spent": its time integral, as in (iv). "root": |B^(1/2) f|. "coupling": (a, f). "Bf_1" and
            "Bf_2": int |B f| and int |B f|^2. "size": int |Sigma(u)| + |sigma(u)| (|a| + |B f|); round-off in int Sigma(u)
            is relative to it.

        Raises
        ------
        ValueError
            If nothing was measured, or `name` is another name.
        """
        same(self._Y.comm, name=name)
        self._refuse_nothing()
        choice("name", name, self._rows[0])
        return np.array([row[name] for row in self._rows])

    # -- the statements of 3.2 ----------------------------------------------------------------------------------------

    def statements(self) -> list[EnergyStatement]:
        """Compare the statements of section 3.2 with the solution up to the last time that was measured.

        Returns
        -------
        list of EnergyStatement
            That both energies fall, (i) to (iv) of Theorem 3.2, and the bounds of B f before it.

        Raises
        ------
        ValueError
            If nothing was measured.
        """
        self._refuse_nothing()
        return [*self._of_primitive(), *self._of_potential(), *self._of_Bf()]

    def __str__(self) -> str:
        return "\n".join(map(str, self.statements()))

    def _statement(
        self,
        name: str,
        says: str,
        conditions: Sequence[str],
        observed: np.ndarray,
        bound: np.ndarray | None,
        slack: np.ndarray,
    ) -> EnergyStatement:
        failing = [what for what in conditions if not self.conditions[what].holds]
        unmet = tuple(f"{what} fails: {self.conditions[what].reason}" for what in failing)
        holds = None if bound is None else bool((observed <= bound + slack).all())
        caveats = tuple(dict.fromkeys(c for what in conditions if (c := self.conditions[what].caveat)))
        return EnergyStatement(name, says, unmet, observed, bound, holds, caveats)

    def _of_primitive(self) -> Iterator[EnergyStatement]:
        E, dissipated = self.values("primitive"), self.values("dissipated")
        slack = _ROUND_OFF * self.values("size").max(axis=0)
        falls = [AUTONOMOUS, NON_NEGATIVE]
        yield self._statement(
            "int Sigma(u) falls", "its largest rise over a step is 0", falls,
            _largest_rise(E), np.zeros_like(E[0]), slack,
        )  # fmt: skip
        yield self._statement("(i)", "int Sigma(u(t)) <= int Sigma(u_I)", falls, E.max(axis=0), E[0], slack)
        defect = np.abs(E + dissipated - E[0]).max(axis=0)
        yield self._statement(
            "(ii)", "int_0^t |B_s^(1/2) sigma(u)|^2 ds <= int Sigma(u_I)", [*falls, SIGN],
            dissipated.max(axis=0), E[0], slack + defect,
        )  # fmt: skip

    def _of_potential(self) -> Iterator[EnergyStatement]:
        F, root, coupling, spent = (self.values(name) for name in ("potential", "root", "coupling", "spent"))
        slack = _ROUND_OFF * (root**2 + np.abs(coupling)).max(axis=0)
        falls = [AUTONOMOUS, SYMMETRIC, SIGN]
        yield self._statement(
            "1/2 |B^(1/2) f|^2 - (a, f) falls", "its largest rise over a step is 0", falls,
            _largest_rise(F), np.zeros_like(F[0]), slack,
        )  # fmt: skip
        conditions = [AUTONOMOUS, SYMMETRIC, NON_NEGATIVE, SIGN, IN_RANGE]
        K = limit = None
        if self.conditions[IN_RANGE].holds:
            squared = self._squared_root_inverse()
            # F_I >= -alpha^2 / 2 up to round-off.
            K = (1 + squared**0.5) * (squared**0.5 + np.sqrt(np.maximum(squared + 2 * F[0], 0.0)))
            limit = F[0] + squared / 2
        yield self._statement(
            "(iii)", "|B^(1/2) f(t)| + |(a, f(t))| <= K", conditions, (root + np.abs(coupling)).max(axis=0), K, slack
        )
        defect = np.abs(F + spent - F[0]).max(axis=0)
        yield self._statement(
            "(iv)", "int_0^t (sigma(u), u) ds <= F_I + |B^(-1/2) a|^2 / 2", conditions, spent.max(axis=0), limit,
            slack + defect,
        )  # fmt: skip

    def _squared_root_inverse(self) -> float:
        """alpha^2 = |B^(-1/2) a|^2 for a in R(B), from the matrix of B on R(B)."""
        B = self._problem.system
        c = B.left_coefficients(self._problem.bias[:, None])[:, 0]
        return float(c @ np.linalg.solve(B.matrix, c)) if B.rank else 0.0

    def _of_Bf(self) -> Iterator[EnergyStatement]:
        E, measure, conditions = self.values("primitive")[0], self._Y.measure, [AUTONOMOUS, NON_NEGATIVE, SIGN]
        a = self._problem.bias
        first, second = self._Y.sum(np.array([self._Y.weights @ np.abs(a), self._Y.weights @ a**2]))
        least = None
        if self.conditions[LINEAR].holds:
            C_4, C_3 = _SIZES, _smallest_beyond(self._sigma)
            least = 2 * second + 2 * np.min(C_4**2 * measure + E[:, None] / C_3, axis=1)
        observed = self.values("Bf_2").max(axis=0)
        yield self._statement(
            "int |B f|^2", "<= 2 int a^2 + 2 (C_4^2 |Y| + int Sigma(u_I) / C_3)", [*conditions, LINEAR],
            observed, least, _ROUND_OFF * observed,
        )  # fmt: skip
        least = None
        if self.conditions[BELOW].holds:
            C_1 = np.minimum(np.abs(self._sigma(_SIZES)), np.abs(self._sigma(-_SIZES)))
            C_2, C_1 = _SIZES[C_1 > 0], C_1[C_1 > 0]
            least = first + np.min(C_2 * measure + E[:, None] / C_1, axis=1)
        observed = self.values("Bf_1").max(axis=0)
        yield self._statement(
            "int |B f|", "<= int |a| + C_2 |Y| + int Sigma(u_I) / C_1", [*conditions, BELOW],
            observed, least, _ROUND_OFF * observed,
        )  # fmt: skip


def _largest_rise(values: np.ndarray) -> np.ndarray:
    return np.maximum(np.diff(values, axis=0).max(axis=0, initial=0.0), 0.0)


def _smallest_beyond(sigma: Activation) -> np.ndarray:
    """For each C_4 in `_SIZES` the constant C_3: the least Sigma(s) / s^2 for |s| from C_4 to 1e4, also between the sizes."""
    quotients = np.minimum(sigma.primitive(_SIZES), sigma.primitive(-_SIZES)) / _SIZES**2
    # Sigma rises with |s|. Between two sizes the quotient is at least Sigma(smaller) / larger^2.
    quotients *= (_SIZES[0] / _SIZES[1]) ** 2
    return np.minimum.accumulate(quotients[::-1])[::-1]
