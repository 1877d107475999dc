"""The co-states r(t_l) of (4.2), compared with differences of J in the state f(t_l)."""

from __future__ import annotations

import numpy as np

from fem_resnet.verify.differences import BETWEEN_JOINTS, SHORT, STEPS, extrapolated
from fem_resnet.verify.measure import raw
from fem_resnet.verify.point import Point, close, part, random_like
from fem_resnet.verify.reference import Reference
from fem_resnet.verify.report import Check, Checks

__all__ = ["costates"]


def costates(point: Point, taken: list[list[float]] | None) -> Checks:
    """Compare r(t_l) with differences of J in f(t_l), for which the rest of the network is written out a second time.

    Parameters
    ----------
    point
        The problem at its point.
    taken
        The steps of each layer in parts of it, where they were adapted.
    """
    problem = point.problem
    net, joints = problem.net, problem.net.activation.joints
    if not net.layers:
        return
    if problem.derivatives is not None:
        yield Check.left_out("co-state", "r(t_l)", "derivatives of the output depend on f(t_l) too")
        return
    point.value()
    point.J.derivative()
    bound = max(BETWEEN_JOINTS if joints else 1e-6, 10 * close(problem))
    rng = np.random.default_rng(12)
    with Reference(problem) as reference:
        states = reference.states(reference.initial, taken)
        for layer in range(net.layers + 1):
            try:
                r = net.Y.values(point.run.costate(layer))
            except RuntimeError as error:
                yield Check.left_out("co-state", f"r(t_{layer})", str(error))
                continue
            v = random_like(point.run.final, rng, net.Y)
            v = raw(v, net.Y, r.shape)
            v += r / max(reference.measure.norm(r), 1e-300) * reference.measure.norm(v)

            def central(step: float, layer: int = layer, v: np.ndarray = v) -> float:
                moved = [states[layer].copy() for _ in range(2)]
                for f, e in zip(moved, (step, -step)):
                    f[: net.Y.nodes] += e * v
                tails = [reference.states(f, taken, layer)[-1] for f in moved]
                return (reference.loss(tails[0]) - reference.loss(tails[1])) / (2 * step)

            found = reference.measure.inner(r, v)
            size = abs(found) + 1e-9 * max(
                abs(reference.loss(states[-1])), reference.measure.norm(r) * reference.measure.norm(v)
            )
            if joints:
                defect = min(abs(central(step) - found) for step in SHORT)
            else:
                defect = abs(float(extrapolated(central, STEPS, size)[0]) - found)
            noise = 1e-11 * abs(reference.loss(states[-1])) + point.round_off / STEPS[3]
            yield Check.of("co-state", f"r(t_{layer})", part(defect, size), bound + part(noise, size))
