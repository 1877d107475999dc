"""The same network on another label space with the same nodes, which `on` makes."""

from __future__ import annotations

from dataclasses import replace

import firedrake as fd
import numpy as np
from pyadjoint.enlisting import Enlist

from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.channels import Channels
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.learning.batch import Batch
from fem_resnet.learning.head import Head
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.verify.measure import relative
from fem_resnet.verify.point import Point, close, part
from fem_resnet.verify.report import Check, Checks

__all__ = ["moved"]


def moved(point: Point) -> Checks:
    """Check J, the gradient and the bases of the network that `on` makes for another label space with the same nodes."""
    problem, net, head = point.problem, point.problem.net, point.problem.head
    if net.Y.graph is not None or net.Y.numbers is not None or problem.derivatives is not None:
        return
    Y = LabelSpace(net.Y.one.V)
    Y = Y if net.Y.one is net.Y else Channels(Y, net.Y.channels)
    try:
        there, output = net.on(Y), None if head is None else head.on(Y)
    except ValueError as error:
        yield Check.left_out("on other nodes", "all", str(error))
        return
    # Eigenfunctions are computed again and turned onto the given ones; exactly, unless the basis cuts a repeated eigenvalue.
    apart = 0.0
    for before, after in zip(_bases(problem.net, head), _bases(there, output), strict=True):
        if before.Y is net.Y:
            apart = max(apart, relative(after.values, before.values, point.comm))
    yield Check.of("on other nodes", "bases", apart, 0.05)
    lift = None if problem.lift is None else problem.lift.on(Y)
    given, fields = (net.Y, Y) if lift is None else (problem.lift.fields, lift.fields)
    inputs = fields.batch(given.values(problem.batch.inputs).copy())
    if head is None:
        targets = Y.batch(net.Y.values(problem.batch.targets).copy())
    else:
        targets = problem.batch.targets
        if output.Y is not head.Y and isinstance(targets, fd.Function):
            targets = output.Y.batch(head.Y.values(targets).copy())
    other = LearningProblem(
        there, output, problem.loss, problem.regulariser, Batch(inputs, targets, problem.batch.weights), learn=problem.learn,
        running=problem.running, lift=lift,
    )  # fmt: skip
    for here, elsewhere in zip(problem.parameters, other.parameters, strict=True):
        lengths = relative(elsewhere.time_basis.measures, here.time_basis.measures)
        yield Check.of("on other nodes", f"lengths in time, {here.name}", lengths, 1e-12)
    ours, theirs = net.settings, there.settings
    moved_kernel = replace(ours.kernel, phi=theirs.kernel.phi, psi=theirs.kernel.psi)
    kept = ours.arguments | {"kernel": moved_kernel, "bias": replace(ours.bias, basis=theirs.bias.basis)}
    lost = [name for name, setting in theirs.arguments.items() if setting != kept[name]]
    yield Check("on other nodes", "settings", float(len(lost)), 0.0, not lost, ", ".join(lost))
    adapts = net.solver_parameters.get("ts_adapt_type", "none") != "none"
    J, _ = other.record()
    gradient = [np.array(d.dat.data_ro) for d in Enlist(J.derivative())]
    value, expected = float(J.functional), point.value()
    bound = max(1e-3 if adapts else 1e-10, 10 * close(problem), 10 * apart)
    yield Check.of(
        "on other nodes", "J", part(abs(value - expected), abs(expected)), bound + part(point.round_off, abs(expected))
    )
    if not adapts:
        gaps = point.lengths([a - b for a, b in zip(gradient, point.derivative(), strict=True)])
        size = float(np.linalg.norm(point.lengths(point.gradient)))
        yield Check.of(
            "on other nodes",
            "gradient",
            part(float(gaps.max()), size),
            max(1e-7, 10 * close(problem), 10 * apart, point.coarseness),
        )


def _bases(net: ResidualNetwork, head: Head | None) -> list[Basis]:
    """The bases of a network, one a layer, and of a head."""
    return [basis for bases in net.bases.values() for basis in bases if basis is not None] + (
        [] if head is None else [head.psi, head.onto]
    )
