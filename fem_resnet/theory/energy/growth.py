r"""How fast f may grow: section 3.4.

Bounded sigma, whatever B is: in L2(Y)

    |f(t)| <= |f_I| + sup |sigma| |Y|^(1/2) t.

B_s >= 0, a and b constant in t, sigma non-decreasing with s sigma(s) >= 0, and L = sup |sigma'|. As int Sigma(u) falls
and sigma^2 <= 2 L Sigma, |f_t|^2 <= 2 L int Sigma(u_I) dy, so that

    |f(t)| <= C_1 + C_2 t,        C_1 = |f_I|,        C_2 = (2 L int Sigma(u_I) dy)^(1/2).

For relu C_2 is |u_I^+|: Proposition 3.5. The same holds for leaky relu, elu and the identity.

Any Lipschitz sigma, by integration against sign(f) and Gronwall's inequality, in L1(Y) with C_0 = |sigma(0)|,

    int |f(y, t)| dy <= (int |f_I| dy + L |a|_L1((0,t); L1) + C_0 |Y| t) exp(L |Y| |b|_L1((0,t); Linf)).

The exponent has the factor |Y| (3.4 prints it without, which holds for |Y| = 1 only): the bound of the kernel is
integrated over y. It is sharp: for relu, a = 0, b = -c with a constant c > 0 and f_I = 1, f = exp(c |Y| t).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import scipy.optimize

from fem_resnet.activation.activation import Activation
from fem_resnet.activation.expression_properties import size
from fem_resnet.arguments import choice, instance, real_array
from fem_resnet.costate.trajectory import LayerTrajectory
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.fixed import Fixed
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.network.run import Run
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.ranks import same
from fem_resnet.theory.spectra.assumptions import AUTONOMOUS, NON_NEGATIVE, SIGN, energy_conditions
from fem_resnet.theory.spectra.autonomous import sampled
from fem_resnet.time_stepping.evolution import Step

__all__ = ["MARGIN", "GrowthBound", "GrowthFit", "GrowthMonitor", "fit_growth", "supremum"]

#: Up to here a bounded activation that is not monotone is looked at, and how closely.
_RANGE, _SPACING = 1e3, 1e-2
#: Of norms, relative to their size.
_ROUND_OFF = 1e-13
#: Times closer than this part of a layer are one, added up in other orders.
_SAME_TIME = 1e-9


@dataclass(frozen=True)
class GrowthBound:
    """A bound of section 3.4 for one solution, at the times when it was measured.

    Attributes
    ----------
    name : str
        "bounded", "Proposition 3.5" or "Gronwall".
    norm : str
        "L2" or "L1": the norm of f that it bounds.
    unmet : tuple of str
        Conditions that fail, with the reason; the bound applies where there is none.
    values : numpy.ndarray or None
        The bound, shape (times, samples); None where a condition fails without which there is no number.
    observed : numpy.ndarray
        The norm of f, shape (times, samples).
    sampled : str
        What of sigma the bound stands on that is sampled, not proved, in words; empty if nothing is.
    """

    name: str
    norm: str
    unmet: tuple[str, ...]
    values: np.ndarray | None
    observed: np.ndarray
    sampled: str = ""

    @property
    def applies(self) -> bool:
        """Whether all conditions hold."""
        return not self.unmet

    @property
    def ratio(self) -> float | None:
        """The largest part that f takes of the growth that the bound allows, over later times and samples.

        (norm(f) - norm(f_I)) / (bound - norm(f_I)): at most 1 if the bound applies, negative where f only falls; 0 where neither
        grows, up to round-off.
        """
        if self.values is None:
            return None
        grown, allowed = self.observed[1:] - self.observed[0], self.values[1:] - self.values[0]
        moved = np.maximum(np.abs(grown), allowed) > _ROUND_OFF * self.values[1:]
        with np.errstate(divide="ignore"):
            return float(np.divide(grown, allowed, out=np.zeros_like(grown), where=moved).max())

    def __str__(self) -> str:
        if self.unmet:
            return f"{self.name}, {self.norm}: does not apply: {'; '.join(self.unmet)}"
        return f"{self.name}, {self.norm}: f takes up to {self.ratio:.4g} of the growth allowed{self.sampled}"


class GrowthMonitor(Fixed):
    """The norms of f after each step of a solution, and the bounds of section 3.4.

    A monitor for `follow_trajectory`, which rides on the TS and measures at the ends of all steps; or of a run of any
    method, at the layer times (`watch`).

    Parameters
    ----------
    net
        The network, at its present coefficients. Collective.

    Attributes
    ----------
    times : list of float
        When it was measured.

    Examples
    --------
    The rank-one kernel for which the exponential bound is sharp; |Y| is 2.83 on this mesh:

    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, follow_trajectory, given_basis
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(1), "CG", 1))
    >>> net = ResidualNetwork(
    ...     given_basis(Y, [1.0]), layers=1, bias_in_time="shared", kernel_in_time="shared", activation="relu"
    ... )
    >>> net.kernel.set(0, [[-0.5]])
    >>> monitor = GrowthMonitor(net)
    >>> _ = follow_trajectory(net, Y.batch(1 + 0 * Y.weights), monitor, steps=16)
    >>> {bound.name: round(bound.ratio, 6) for bound in monitor.bounds() if bound.applies}
    {'Gronwall': 1.0}
    """

    @supports(*HELD, *STEPPED)
    def __init__(self, net: ResidualNetwork):
        self._net, self._Y, self._sigma = net, net.Y, net.activation
        self.times: list[float] = []
        self._norms: list[np.ndarray] = []
        self._initial: np.ndarray | None = None

    # -- measuring ----------------------------------------------------------------------------------------------------

    def __call__(self, layer: LayerTrajectory, step: Step) -> None:
        """Measure after a step. Collective."""
        instance("layer", layer, LayerTrajectory)
        instance("step", step, Step)
        start = layer.inputs.start
        if not self.times:
            self._begin(layer, step.first)
        self._keep(start + step.start + step.length, step.last)

    def watch(self, run: Run) -> GrowthMonitor:
        """Measure a run at its layer times, and return the monitor. Collective.

        Parameters
        ----------
        run
            A run of this network.

        Raises
        ------
        ValueError
            If it is another network's.
        """
        if instance("run", run, Run).net is not self._net:
            raise ValueError(f"run: expected one of {self._net!r}, got one of {run.net!r}")
        states = (self._Y.values(f) for f in run.states())
        first = next(states)
        for part, f in zip(self._net.layer_inputs(), states, strict=True):
            if not self.times:
                self._begin(LayerTrajectory(part, None, []), first)
            self._keep(part.start + part.length, f)
        return self

    def _begin(self, layer: LayerTrajectory, f: np.ndarray) -> None:
        self._initial = self._Y.sum(self._Y.weights @ self._sigma.primitive(layer.argument(layer.inputs.start, f)))
        self._keep(layer.inputs.start, f)

    def _keep(self, t: float, f: np.ndarray) -> None:
        self.times.append(t)
        self._norms.append(self._Y.sum(np.array([self._Y.weights @ np.abs(f), self._Y.weights @ f**2])))

    def norms(self, name: str = "L2") -> np.ndarray:
        """Norms of f in L1(Y) or L2(Y), shape (times, samples).

        Raises
        ------
        ValueError
            If nothing was measured, or the name is neither "L1" nor "L2".
        """
        same(self._Y.comm, name=name)
        choice("name", name, ("L1", "L2"))
        if not self.times:
            raise ValueError("norms: nothing was measured yet: let follow_trajectory call the monitor, or watch a run")
        measured = np.array(self._norms)
        return measured[:, 0] if name == "L1" else np.sqrt(measured[:, 1])

    # -- what 3.4 says ------------------------------------------------------------------------------------------------

    def bounds(self) -> list[GrowthBound]:
        """The bounds of section 3.4 at all times when it was measured: collective, and no array of nodes x nodes.

        sup |b| is that of ``kernel.norm(beta, "linf")``: above some number of nodes an upper bound, so that the
        exponential bound is larger than need be.

        Raises
        ------
        ValueError
            If nothing was measured.
        """
        return [self._bounded(), self._proposition(), self._gronwall()]

    def __str__(self) -> str:
        return "\n".join(map(str, self.bounds()))

    @property
    def _elapsed(self) -> np.ndarray:
        return np.array(self.times)[:, None]

    def _bounded(self) -> GrowthBound:
        norms, values, unmet = self.norms("L2"), None, (f"sup |sigma| is infinite for {self._sigma.name}",)
        if self._sigma.properties.bounded:
            values, unmet = norms[0] + supremum(self._sigma) * self._Y.measure**0.5 * self._elapsed, ()
        return GrowthBound(
            "bounded", "L2", unmet, values, norms, sampled(self._sigma, "bounded", "non_decreasing", "lipschitz")
        )

    def _proposition(self) -> GrowthBound:
        norms, properties = self.norms("L2"), self._sigma.properties
        conditions = energy_conditions(self._net)
        unmet = [
            f"{what} fails: {conditions[what].reason}"
            for what in (AUTONOMOUS, NON_NEGATIVE, SIGN)
            if not conditions[what].holds
        ]
        if not properties.non_decreasing:
            unmet.append(f"{self._sigma.name} is not non-decreasing")
        if not np.isfinite(properties.lipschitz):
            unmet.append(f"sup |sigma'| is infinite for {self._sigma.name}")
        values = None
        if conditions[SIGN].holds and np.isfinite(properties.lipschitz):
            values = norms[0] + np.sqrt(2 * properties.lipschitz * np.maximum(self._initial, 0.0)) * self._elapsed
        supposed = sampled(self._sigma, "lipschitz", "sign_preserving", "non_decreasing")
        return GrowthBound("Proposition 3.5", "L2", tuple(unmet), values, norms, supposed)

    def _gronwall(self) -> GrowthBound:
        norms, L = self.norms("L1"), self._sigma.properties.lipschitz
        if not np.isfinite(L):
            return GrowthBound("Gronwall", "L1", (f"sup |sigma'| is infinite for {self._sigma.name}",), None, norms)
        of_a, of_b = self._integrated_norms()
        drift = abs(float(self._sigma(0.0))) * self._Y.measure
        with np.errstate(over="ignore"):
            growth = np.exp(L * self._Y.measure * of_b)[:, None]
        values = (norms[0] + L * of_a[:, None] + drift * self._elapsed) * growth
        return GrowthBound("Gronwall", "L1", (), values, norms, sampled(self._sigma, "lipschitz"))

    def _integrated_norms(self) -> tuple[np.ndarray, np.ndarray]:
        """int_0^t |a|_L1 and int_0^t sup |b| at the measured times; where they vary within a layer, by trapezoids.

        Both norms are convex there, a and b being affine in t: what trapezoids give is an upper bound.
        """
        of_a, of_b = np.zeros(len(self.times)), np.zeros(len(self.times))
        known: dict[tuple[LowRankKernel, bytes], float] = {}
        for part in self._net.layer_inputs():
            start, end, same = part.start, part.start + part.length, _SAME_TIME * part.length
            cuts = [start, *(t for t in self.times if start + same < t < end - same), end]
            for left, right in itertools.pairwise(cuts):
                later = np.array(self.times) >= right - same
                a, b = self._norms_between(part, left, right, known)
                of_a[later] += a
                of_b[later] += b
        return of_a, of_b

    def _norms_between(self, part, left: float, right: float, known: dict) -> tuple[float, float]:
        constant = part.bias.is_constant and part.beta.is_constant
        times = [(left + right) / 2] if constant else [left, right]
        total = np.zeros(2)
        for t in times:
            s = (t - part.start) / part.length
            beta = part.beta.coefficients(s)
            key = part.factors, beta.tobytes()
            if key not in known:
                known[key] = part.factors.norm(beta, "linf")
            of_a = float(self._Y.sum(self._Y.weights @ np.abs(part.bias.coefficients(s))))
            total += (right - left) / len(times) * np.array([of_a, known[key]])
        return tuple(total)


def supremum(activation: Activation) -> float:
    """Sup |sigma| of a bounded activation: of an expression by interval arithmetic, else its limits or values, from above.

    Raises
    ------
    ValueError
        If the activation is not bounded.
    """
    properties = activation.properties
    if not properties.bounded:
        raise ValueError(f"activation: expected a bounded one, got {activation.name}")
    if activation.expression is not None:
        return size(activation.expression)[0]
    if properties.non_decreasing:
        return float(np.abs(activation(np.array([-1e16, 1e16]))).max())
    s = np.arange(-_RANGE, _RANGE, _SPACING)
    return float(np.abs(activation(s)).max() + properties.lipschitz * _SPACING / 2)


# -- fitted growth -----------------------------------------------------------------------------------------------------

#: By how much Akaike's criterion must be less for one kind of growth than for the other to decide: then the other has
#: essentially no support (Burnham, Anderson).
MARGIN = 10.0
#: Logarithms of norms are not known better than this.
_OF_LOGARITHMS = 1e-12
#: Powers of c + v t^p that are looked at.
_POWERS = np.linspace(0.25, 4.0, 61)


@dataclass(frozen=True)
class GrowthFit:
    """How norms grow, from the later half of the times: as a power of t, beside a constant or not, or exponentially.

    Three curves are fitted to the logarithms: norm ~ t^p, norm ~ c + v t^p for p from 1/4 to 4, and norm ~ exp(r t). Akaike's
    criterion (for few points) says whether the better one of the first two, or the third, is to be believed.

    Attributes
    ----------
    power : numpy.ndarray
        p of norm ~ t^p, shape (samples,); no unit.
    rate : numpy.ndarray
        r of norm ~ exp(r t), shape (samples,), in the unit of 1/t.
    power_residual, rate_residual : numpy.ndarray
        The largest |log(norm) - fit| of these two.
    in_favour : numpy.ndarray
        By how much the criterion is less for an exponential than for powers, shape (samples,); negative if it is more.
    """

    power: np.ndarray
    rate: np.ndarray
    power_residual: np.ndarray
    rate_residual: np.ndarray
    in_favour: np.ndarray

    @property
    def is_exponential(self) -> np.ndarray:
        """Whether the exponential fits better, by `MARGIN` at least, shape (samples,)."""
        return self.in_favour >= MARGIN

    @property
    def verdicts(self) -> list[str]:
        """ "exponential", "power" or "not decided", one a sample."""
        return [
            "exponential" if value >= MARGIN else "power" if value <= -MARGIN else "not decided" for value in self.in_favour
        ]


def fit_growth(times: np.ndarray, norms: np.ndarray) -> GrowthFit:
    """Fit powers and an exponential to norms, by least squares over the later half of the times, and choose between them.

    Parameters
    ----------
    times
        Rising, shape (n,); at least four, the later half positive. With less than six in the later half nothing is decided.
    norms
        Positive, shape (n, samples).

    Raises
    ------
    ValueError
        If there are too few times, or a norm is not positive and finite.

    Examples
    --------
    >>> t = np.linspace(0.0, 8.0, 17)
    >>> fit = fit_growth(t, np.column_stack([3 * t + 1e-9, np.exp(0.5 * t), 100 + t, 2 + 0 * t]))
    >>> [round(float(fit.power[0]), 6), round(float(fit.rate[1]), 6)], fit.verdicts
    ([1.0, 0.5], ['power', 'exponential', 'power', 'not decided'])
    """
    times = real_array("times", times, ("times",))
    if len(times) < 4 or not (np.diff(times) > 0).all():
        raise ValueError(f"times: expected at least 4, rising, got {times.tolist()}")
    norms = real_array("norms", norms, (len(times), "samples"), finite=False)
    late = times >= (times[0] + times[-1]) / 2
    if not (np.isfinite(norms[late]).all() and (norms[late] > 0).all() and times[late][0] > 0):
        raise ValueError("norms: expected positive and finite ones at positive times in the later half")
    t, logarithms = times[late], np.log(norms[late])
    (power, of_power), (rate, of_rate) = (_line(x, logarithms) for x in (np.log(t), t))
    beside = np.array([_beside_a_constant(t, column) for column in norms[late].T])
    powers = np.minimum(_criterion(_squares(of_power), len(t), 2), _criterion(beside, len(t), 3))
    in_favour = powers - _criterion(_squares(of_rate), len(t), 2) if len(t) >= 6 else np.zeros(len(power))
    return GrowthFit(power, rate, np.abs(of_power).max(axis=0), np.abs(of_rate).max(axis=0), in_favour)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes, and residuals, of lines through (x, y), one a column of y."""
    slope, height = np.polyfit(x, y, 1)
    return slope, y - slope * x[:, None] - height


def _squares(residuals: np.ndarray) -> np.ndarray:
    return np.sum(residuals**2, axis=0)


def _beside_a_constant(t: np.ndarray, norm: np.ndarray) -> float:
    """The least sum of squares of log(norm) - log(c + v t^p), linear in c and v but for second order of the residuals."""

    def left(p: float) -> float:
        # In parts of the norm: v of either sign, as long as the curve is positive.
        columns = np.column_stack([np.ones_like(t), (t / t[-1]) ** p]) / norm[:, None]
        curve = columns @ np.linalg.lstsq(columns, np.ones_like(t), rcond=None)[0]
        return float(np.sum(np.log(curve) ** 2)) if (curve > 0).all() else np.inf

    values = [left(p) for p in _POWERS]
    near = int(np.argmin(values))
    around = _POWERS[max(near - 1, 0)], _POWERS[min(near + 1, len(_POWERS) - 1)]
    return min(values[near], float(scipy.optimize.minimize_scalar(left, bounds=around, method="bounded").fun))


def _criterion(squares: np.ndarray, points: int, parameters: int) -> np.ndarray:
    """Akaike's, for few points; of a fit to round-off that of a residual of this size."""
    k = parameters + 1
    spread = np.maximum(squares / points, _OF_LOGARITHMS**2)
    return points * np.log(spread) + 2 * k + 2 * k * (k + 1) / (points - k - 1 if points > k + 1 else np.nan)
