"""The effect of each layer on perturbations and on gradients: the numbers of `report`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.theory.sensitivity.conditioning import LinearisedFlow
from fem_resnet.time_stepping.evolution import TYPES, FieldStepper
from fem_resnet.time_stepping.tableau import Tableau

__all__ = ["BY_DEPTH", "MORE_STEPS", "LayerStability", "layer_stability", "scheme_of"]

#: A layer amplifies if a network of such layers would multiply a perturbation by more than this; it damps likewise.
BY_DEPTH = 10.0
#: sigma is flat where |sigma'(u)| is at most this part of sup |sigma'|.
_FLAT = 1e-3
#: The error that the steps of a layer may have for a mode, relative to its factor in the flow, or to 1 if that is more.
_STEP_ERROR = 0.1
#: The search for the number of steps ends at this multiple of the present number.
MORE_STEPS = 64


@dataclass(frozen=True)
class LayerStability:
    """One layer: the worst of all samples, in the label measure. Numbers have no unit where none is given.

    Attributes
    ----------
    layer : int
        The number of the layer.
    start, end : float
        Its interval of time, in the unit of t.
    grows, keeps : float
        The largest and the smallest singular value of M(t_(l+1), t_l).
    bound : float
        `exp(int sup |sigma'| norm(b) dt)` over the layer, or with norm(b)^2 for a gradient flow. `grows` exceeds it by errors
        of the steps at most.
    grown, kept : float
        The largest and the smallest singular value of M(t_(l+1), 0).
    condition : float
        The condition number of M(t_(l+1), 0). Where it is beyond double precision it is infinite, and `kept` is a bound.
    exponents : tuple of float
        The largest and the smallest finite-time Lyapunov exponent, `log(grown) / t_(l+1)` and `log(kept) / t_(l+1)`, in 1/t.
    gradient_grows, gradient_keeps : float
        The largest and the smallest singular value of M(T, t_l).
    costate : float
        norm(r(t_l)) / norm(r(T)), of all samples together.
    bias_gradient : float
        norm(sigma'(u) r) / norm(r(T)) at t_l, (4.3); with B r in place of r for a gradient flow.
    slope : float
        The mean of |sigma'(u)| over Y at t_l, relative to sup |sigma'| if that is finite.
    flat : float
        The part of Y where |sigma'(u)| is at most a thousandth of sup |sigma'|.
    frozen : float
        The largest real part of the eigenvalues of -sigma'(u) B, or -B^T sigma'(u) B, at t_l, in 1/t.
    wanted_steps : int or None
        The least number of steps in the layer, from the present one on, with which the scheme is right to a tenth for each of
        these eigenvalues. None if 64 times as many are too few, if the steps are adapted, or if the scheme is no known
        Runge-Kutta method.
    verdict : str
        "amplifies", "damps", "both" or "neutral".
    """

    layer: int
    start: float
    end: float
    grows: float
    keeps: float
    bound: float
    grown: float
    kept: float
    condition: float
    exponents: tuple[float, float]
    gradient_grows: float
    gradient_keeps: float
    costate: float
    bias_gradient: float
    slope: float
    flat: float
    frozen: float
    wanted_steps: int | None
    verdict: str


def layer_stability(flow: LinearisedFlow, terminal: np.ndarray) -> list[LayerStability]:
    """The numbers of all layers. Collective.

    Parameters
    ----------
    flow
        The linearised flow.
    terminal
        r(T) at the owned nodes, shape (nodes, samples), not zero.
    """
    net, Y = flow.net, flow.net.Y
    samples = terminal.shape[1]
    forward, depth, condition = _forwards(flow, samples)
    backward, costate, gradient = _backwards(flow, terminal)
    size = np.sqrt(Y.sum(np.sum(Y.weights @ terminal**2)))
    scheme, lipschitz = scheme_of(net), net.activation.properties.lipschitz
    result = []
    for l in range(net.layers):
        start, end = (float(t) for t in net.times[l : l + 2])
        slope = np.abs(flow.slope(l)) / (lipschitz if np.isfinite(lipschitz) else 1.0)
        eigenvalues = np.concatenate([flow.frozen_eigenvalues(l, sample=s) for s in range(samples)])
        grown, kept = depth[l, :, 0].max(), depth[l, :, 1].min()
        grows, keeps = forward[l, :, 0].max(), forward[l, :, 1].min()
        with np.errstate(divide="ignore"):
            exponents = float(np.log(grown) / end), float(np.log(kept) / end)
        result.append(
            LayerStability(
                layer=l,
                start=start,
                end=end,
                grows=float(grows),
                keeps=float(keeps),
                bound=flow.bound(l, l + 1),
                grown=float(grown),
                kept=float(kept),
                condition=float(condition[l].max()),
                exponents=exponents,
                gradient_grows=float(backward[l, :, 0].max()),
                gradient_keeps=float(backward[l, :, 1].min()),
                costate=float(np.sqrt(costate[l].sum()) / size),
                bias_gradient=float(np.sqrt(gradient[l].sum()) / size),
                slope=_mean(Y, slope),
                flat=_mean(Y, slope <= _FLAT),
                frozen=float(eigenvalues.real.max()),
                wanted_steps=_wanted_steps(scheme, eigenvalues * (end - start), net.steps),
                verdict=_verdict(grows, keeps, net.layers),
            )
        )
    return result


# Two sweeps over the layers make the propagators twice, but keep one of them at a time.


def _forwards(flow: LinearisedFlow, samples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each layer and sample: norm and smallest singular value of M(t_(l+1), t_l) and M(t_(l+1), 0), and its condition.

    Shapes (layers, samples, 2), (layers, samples, 2) and (layers, samples).
    """
    layers = flow.net.layers
    forward, depth, condition = np.empty((layers, samples, 2)), np.empty((layers, samples, 2)), np.empty((layers, samples))
    for sample in range(samples):
        so_far = None
        for l in range(layers):
            M = flow.propagator(l, l + 1, sample=sample)
            so_far = M if so_far is None else M @ so_far
            forward[l, sample], depth[l, sample] = (M.norm, M.smallest), (so_far.norm, so_far.smallest)
            condition[l, sample] = so_far.condition
    return forward, depth, condition


def _backwards(flow: LinearisedFlow, terminal: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each layer and sample: norm and smallest singular value of M(T, t_l), |r|^2 and |sigma'(u) r|^2 at t_l.

    Shapes (layers, samples, 2), (layers, samples) and (layers, samples).
    """
    Y, layers, samples = flow.net.Y, flow.net.layers, terminal.shape[1]
    backward, costate, gradient = np.empty((layers, samples, 2)), np.empty((layers, samples)), np.empty((layers, samples))
    for sample in range(samples):
        so_far, r = None, Y.batch(terminal[:, sample])
        for l in reversed(range(layers)):
            M = flow.propagator(l, l + 1, sample=sample)
            so_far = M if so_far is None else so_far @ M
            backward[l, sample] = so_far.norm, so_far.smallest
            r = M.transpose(r)
            costate[l, sample] = Y.norm(r) ** 2
            gradient[l, sample] = Y.sum(Y.weights @ flow.by_bias(l, Y.values(r))[:, sample] ** 2)
    return backward, costate, gradient


def _mean(Y: LabelSpace, values: np.ndarray) -> float:
    return float(Y.sum(np.sum(Y.weights @ values)) / (Y.measure * values.shape[1]))


def _verdict(grows: float, keeps: float, layers: int) -> str:
    amplifies, damps = grows**layers > BY_DEPTH, keeps**layers < 1 / BY_DEPTH
    return {(True, True): "both", (True, False): "amplifies", (False, True): "damps"}.get((amplifies, damps), "neutral")


def scheme_of(net: ResidualNetwork) -> Tableau | None:
    """The Runge-Kutta method that steps the layers; None if its coefficients are unknown or its steps are adapted."""
    parameters = net.solver_parameters
    if parameters["ts_type"] not in TYPES or parameters["ts_adapt_type"] != "none":
        return None
    with FieldStepper(net.Y, 1, None, None, None, None, parameters) as stepper:
        return stepper.scheme


def _wanted_steps(scheme: Tableau | None, z: np.ndarray, steps: int) -> int | None:
    """The least number of steps, from the present one on, with which all modes grow by e^z up to a tenth."""
    if scheme is None:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        flow = np.exp(z)
        for n in range(steps, MORE_STEPS * steps + 1):
            if (np.abs(scheme.factor(z / n) ** n - flow) <= _STEP_ERROR * np.maximum(1.0, np.abs(flow))).all():
                return n
    return None
