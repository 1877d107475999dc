"""Mistakes that can be planted in the package, one by one, and the problem on which each shows.

A fault is a name, the problem, and ``plant(patch)`` with pytest's monkeypatch; it is planted before the problem is made. Most
are one line of the package with one thing wrong: `Line` changes the text of a function's source and compiles it again, so
that a fault reads as the slip would.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files

import numpy as np

import fem_resnet.activation.activation
import fem_resnet.label_domain.basis
import fem_resnet.label_domain.label_space
import fem_resnet.layers.compiled_stage
import fem_resnet.layers.discrete_gradient_stage
import fem_resnet.layers.inputs
import fem_resnet.layers.running_cost
import fem_resnet.layers.stage
import fem_resnet.layers.transposed_stage
import fem_resnet.learning.field_terms
import fem_resnet.learning.head
import fem_resnet.learning.locality
import fem_resnet.learning.loss
import fem_resnet.learning.pointwise_terms
import fem_resnet.learning.prediction
import fem_resnet.learning.problem
import fem_resnet.learning.regulariser
import fem_resnet.learning.samples
import fem_resnet.network.coefficient_segment
import fem_resnet.network.network
import fem_resnet.network.network_parameters
import fem_resnet.network.other_networks
import fem_resnet.network.run
import fem_resnet.network.seen_input
import fem_resnet.network.segment
import fem_resnet.network.settings
import fem_resnet.network.solver
import fem_resnet.parameters.kernel
import fem_resnet.parameters.kernel_sets
import fem_resnet.parameters.parameter
import fem_resnet.parameters.retraction
import fem_resnet.parameters.space_basis
import fem_resnet.parameters.subspace
import fem_resnet.parameters.time_basis
import fem_resnet.tape.operator_block
import fem_resnet.tape.scheduled_block
import fem_resnet.time_stepping.compiled_layer
import fem_resnet.time_stepping.jacobian
import fem_resnet.time_stepping.scheme
import fem_resnet.time_stepping.state
import fem_resnet.time_stepping.ts_layer
import fem_resnet.time_stepping.ts_stepper


@dataclass(frozen=True)
class Fault:
    """A mistake: its name, the name of a problem in `test_verify.PROBLEMS`, and what plants it.

    What is not `compiled` is planted in Python, and the problem runs by it alone.
    """

    name: str
    problem: str
    plant: Callable
    compiled: bool = False


def compiled(right: str, wrong: str) -> Callable:
    """Plants `wrong` in the place of `right`, which must occur, in the code of compiled stages."""

    def plant(patch):
        source = fem_resnet.layers.compiled_stage._source()
        assert right in source, f"stage.c has no longer the line {right!r}"
        patch.setattr(fem_resnet.layers.compiled_stage, "_source", lambda: source.replace(right, wrong))

    return plant


def formula(right: str, wrong: str) -> Callable:
    """Plants `wrong` in the formulas of activations in C."""

    def plant(patch):
        made = fem_resnet.layers.compiled_stage.activation_code
        source = (files("fem_resnet.activation") / "pointwise.h").read_text()
        assert right in source, f"pointwise.h has no longer the line {right!r}"
        patch.setattr(
            fem_resnet.layers.compiled_stage, "activation_code", lambda *arguments: made(*arguments).replace(right, wrong)
        )

    return plant


def line(owner, function: str, right: str, wrong: str) -> Callable:
    """Plants `wrong` in the place of `right`, which must occur, in the source of a function or method of `owner`."""

    def plant(patch):
        original = inspect.unwrap(inspect.getattr_static(owner, function))
        original = getattr(original, "fget", getattr(original, "func", original))
        source = textwrap.dedent(inspect.getsource(original))
        assert right in source, f"{function} has no longer the line {right!r}"
        changed = ast.parse(source.replace(right, wrong))
        changed.body[0].decorator_list.clear()
        source = ast.unparse(changed)
        module = inspect.getmodule(original)
        names = {}
        exec(compile("from __future__ import annotations\n" + source, f"<fault in {function}>", "exec"), vars(module), names)
        patched = names[function]
        if isinstance(inspect.getattr_static(owner, function), (property, cached_property)):
            patched = property(patched)
        patch.setattr(owner, function, patched)

    return plant


Stage = fem_resnet.layers.stage.Stage
LayerTS = fem_resnet.time_stepping.ts_layer.LayerTS
Linear = fem_resnet.time_stepping.jacobian.LinearLayer
Segment, CoefficientSegment = fem_resnet.network.segment.Segment, fem_resnet.network.coefficient_segment.CoefficientSegment
CostRate = fem_resnet.layers.running_cost.CostRate
space, time_basis, inputs = fem_resnet.parameters.space_basis, fem_resnet.parameters.time_basis, fem_resnet.layers.inputs
Loss = fem_resnet.learning.loss.LossOperator
HeadOperator = fem_resnet.learning.head._HeadOperator
Kernel, Basis, LabelSpace = (
    fem_resnet.parameters.kernel.LowRankKernel,
    fem_resnet.label_domain.basis.Basis,
    fem_resnet.label_domain.label_space.LabelSpace,
)
regulariser = fem_resnet.learning.regulariser
localities = fem_resnet.learning.locality
Pairs, Modulus = fem_resnet.learning.pointwise_terms._Pairs, fem_resnet.learning.pointwise_terms.SmoothedModulus
Field, Variation = fem_resnet.learning.field_terms._OfField, fem_resnet.learning.field_terms.TotalVariation
CLASSES, FIELD, CARRIED, ADAPTED, IMPLICIT, LEARNED, TIMES, LAYERS, KINKS, COSTS, MANY, MANY_TIMES = (
    "classes", "field", "carried", "adapted", "implicit", "learned", "times", "layers", "kinks", "costs", "many samples",
    "many samples, times",
)  # fmt: skip
MIRRORED = "mirrored"
Channels, RepeatedBasis, ChannelStage, LinearKernels, Head = (
    fem_resnet.label_domain.channels.Channels,
    fem_resnet.label_domain.repeated_basis.RepeatedBasis,
    fem_resnet.layers.channel_stage.ChannelStage,
    fem_resnet.parameters.linear_kernels.LinearKernels,
    fem_resnet.learning.head.Head,
)


# -- faults that are no single line ----------------------------------------------------------------------------------


def _after_weights(change):
    def plant(patch):
        made = LabelSpace.__init__

        def init(self, *arguments, **options):
            made(self, *arguments, **options)
            weights = change(np.array(self.weights))
            weights.flags.writeable = False
            self.weights = weights

        patch.setattr(LabelSpace, "__init__", init)

    return plant


def _missing(weights):
    if weights.size > 3:
        weights[3] = 1e-9
    return weights


def _swapped(weights):
    weights[[0, -1]] = weights[[-1, 0]] + np.array([1e-3, -1e-3])
    return weights


def _basis_gram(change):
    def plant(patch):
        made = Basis.__init__

        def init(self, *arguments, **options):
            made(self, *arguments, **options)
            self.gram = change(self)

        patch.setattr(Basis, "__init__", init)

    return plant


def _permuted_weights(patch):
    made = LayerTS.__init__

    def init(self, *arguments, **options):
        made(self, *arguments, **options)
        self._weights = np.roll(self._weights, 1)

    patch.setattr(LayerTS, "__init__", init)


def _ignored_nodes(patch):
    made = LayerTS.__init__

    def init(self, *arguments, **options):
        made(self, *arguments, **options)
        self._nodes = 0 * self._nodes

    patch.setattr(LayerTS, "__init__", init)


def _stale_stage(patch):
    """The argument of the stage before, now and then."""
    argument = Linear.argument

    def stale(self, t, g):
        now = argument(self, t, g)
        before, self._before = getattr(self, "_before", now), now
        return replace(now, C=before.C) if before.C[0].shape == now.C[0].shape and len(before.C) == len(now.C) else now

    patch.setattr(Linear, "argument", stale)


def _unreset_step(patch):
    """The first step of a solve is what the last solve ended with."""
    forward = LayerTS.forward

    def stale(self, g, f, given, save, steps):
        self._solves = getattr(self, "_solves", 0) + 1
        first, self.steps = self.steps, self.steps + self._solves % 2
        try:
            return forward(self, g, f, given, save, steps)
        finally:
            self.steps = first

    patch.setattr(LayerTS, "forward", stale)


def _counted_up(owner, function, factor=1.000001):
    """A result that drifts with the number of calls."""

    def plant(patch):
        original = getattr(owner, function)
        calls = [0]

        def drifting(self, *arguments, **options):
            calls[0] += 1
            return original(self, *arguments, **options) * factor ** calls[0]

        patch.setattr(owner, function, drifting)

    return plant


def _loss(name, **changes):
    """A loss with a wrong part; problems take it from the module."""

    def plant(patch):
        loss = getattr(fem_resnet.learning.loss, name)
        patch.setattr(
            fem_resnet.learning.loss,
            name,
            replace(loss, **{key: change(getattr(loss, key)) for key, change in changes.items()}),
        )

    return plant


def _prediction(name, **changes):
    def plant(patch):
        table = fem_resnet.learning.prediction.PREDICTIONS
        old = table[name]
        patch.setitem(table, name, replace(old, **{key: change(getattr(old, key)) for key, change in changes.items()}))

    return plant


def _mixed_columns(patch):
    read = fem_resnet.parameters.space_basis.BatchValues.write
    patch.setattr(
        fem_resnet.parameters.space_basis.BatchValues,
        "write",
        lambda self, function, array: read(self, function, array[:, ::-1]),
    )


# -- the catalogue ---------------------------------------------------------------------------------------------------

FAULTS = [
    # the stage of a layer
    Fault(
        "sigma' is dropped in the transpose",
        CLASSES,
        line(Stage, "_by_u", "self.activation.derivative(u, out=u)\n        u *= at.length[0]", "u[...] = at.length[0]"),
    ),
    Fault(
        "the transpose forgets the layer's length",
        CLASSES,
        line(Stage, "_by_u", "u *= at.length[0]\n        w[0]", "w[0]"),
    ),
    Fault(
        "sign of b",
        CLASSES,
        line(
            Stage, "_affine", "np.subtract(at.a[order][nodes, None], u, out=u)", "np.add(at.a[order][nodes, None], u, out=u)"
        ),
    ),
    Fault(
        "the bias's functional is of the first sample",
        CLASSES,
        line(Stage, "transpose", "np.sum(v[0], axis=1, out=result.bias[nodes])", "result.bias[nodes] = v[0][:, 0]"),
    ),
    Fault(
        "mean of the samples in place of their sum",
        CLASSES,
        line(Stage, "transpose", "np.sum(v[0], axis=1,", "np.mean(v[0], axis=1,"),
    ),
    Fault("the rate has no weights", CLASSES, line(Stage, "rate", "psi.weighted[nodes].T @ s", "psi.values[nodes].T @ s")),
    Fault("phi projects where psi should", FIELD, line(Stage, "rate", "psi = at.factors.psi", "psi = at.factors.phi")),
    Fault(
        "the adjoint of q is dropped",
        CLASSES,
        line(Stage, "_functional_at_nodes", "w += by_s.by_f[order][nodes] * by_s.x_q", "pass"),
    ),
    Fault(
        "the cotangent has no weights",
        CLASSES,
        line(Stage, "_functional_at_nodes", "psi.weighted[nodes], by_s.x[order]", "psi.values[nodes], by_s.x[order]"),
    ),
    Fault(
        "the last block of nodes is left out of the rate",
        CLASSES,
        line(Stage, "rate", "Q[k] += psi.weighted[nodes].T @ s", "Q[k] += psi.weighted[nodes][:-1].T @ s[:-1]"),
    ),
    Fault(
        "f is advanced without the weights of stages",
        CLASSES,
        line(Stage, "advance", "s *= stage.weight", "s *= stages[0].weight"),
    ),
    Fault("sigma'' is dropped in the second adjoint", CLASSES, line(Stage, "_by_u", "+ at.length[0] * bend * w[1]", "")),
    Fault(
        "the tangent's bias is dropped",
        CLASSES,
        line(
            Stage,
            "_values",
            "slope *= self._affine(nodes, at, 1)",
            "slope *= self._affine(nodes, at, 1) - at.a[1][nodes, None]",
        ),
    ),
    Fault(
        "the Jacobian of implicit steps has no sigma'",
        IMPLICIT,
        line(Stage, "jacobian", "K[0] += both @ (at.length[0] * slope)", "K[0] += both @ (at.length[0] + 0 * slope)"),
    ),
    Fault(
        "sigma'' with the wrong sign in K_1",
        IMPLICIT,
        line(Stage, "jacobian", "at.length[0] * bend + at.length[1]", "-at.length[0] * bend + at.length[1]"),
    ),
    Fault("the tangent forgets that a length moves", LEARNED, line(Stage, "_values", "slope += at.length[1] * sigma", "pass")),
    Fault(
        "the functional of a length forgets the second order",
        LEARNED,
        line(Stage, "_by_length", "if len(w) == 2:", "if False:"),
    ),
    Fault(
        "functionals of phi forget the second order",
        LEARNED,
        line(Stage, "transpose", "-sum(part @ C.T for part, C in zip(v, at.C))", "-(v[0] @ at.C[0].T)"),
    ),
    Fault("functionals of psi have no weights", LEARNED, line(Stage, "transpose", " * self.Y.weights[nodes, None]", "")),
    # the same stage, compiled
    Fault(
        "compiled: sigma' is dropped in the transpose",
        LAYERS,
        compiled("tau_ * SLOPE(row[n]) * back[n]", "tau_ * back[n]"),
        True,
    ),
    Fault("compiled: sign of b", LAYERS, compiled("sum[s][v] -= c * p[v]", "sum[s][v] += c * p[v]"), True),
    Fault("compiled: the rate has no weights", LAYERS, compiled("row[n] *= b.weights[n]", "row[n] *= 1.0"), True),
    Fault("compiled: the bias's functional is of the last sample", LAYERS, compiled("sum[n] += v", "sum[n] = v"), True),
    Fault(
        "compiled: a block that is not full is left out",
        LAYERS,
        compiled(
            "start < Y->nodes; start += NODES) {\n        struct node_block b",
            "start + NODES <= Y->nodes; start += NODES) {\n        struct node_block b",
        ),
        True,
    ),
    Fault(
        "compiled: lambda of the first sample for all",
        LAYERS,
        compiled("lambda + s * Y->nodes + start", "lambda + start"),
        True,
    ),
    Fault("compiled: one lane is not added up", LAYERS, compiled("lane = 0; lane < LANES", "lane = 1; lane < LANES"), True),
    Fault(
        "compiled: the last sample is not advanced",
        LAYERS,
        compiled("n++) f[(start + n) * samples + s] +=", "n++) if (s + 1 < samples) f[(start + n) * samples + s] +="),
        True,
    ),
    Fault("compiled: lengths pair with sigma'", TIMES, compiled("back[n] * VALUE(row[n])", "back[n] * SLOPE(row[n])"), True),
    Fault(
        "compiled: many samples, sigma' is dropped", MANY, compiled("tau_ * SLOPE(row[s]) * back[s]", "tau_ * back[s]"), True
    ),
    Fault(
        "compiled: many samples, sign of b",
        MANY,
        compiled("ldc, -1.0, OF(c, phi->rank));\n        memset", "ldc, 1.0, OF(c, phi->rank));\n        memset"),
        True,
    ),
    Fault("compiled: many samples, the rate has no weights", MANY, compiled("row[s] *= w;", "row[s] *= 1.0;"), True),
    Fault("compiled: many samples, the bias's functional is of the last one", MANY, compiled("sum += v;", "sum = v;"), True),
    Fault(
        "compiled: many samples, lambda of the first chunk for all",
        MANY,
        compiled("lambda + place(Y, start + n, first, samples)", "lambda + place(Y, start + n, 0, samples)"),
        True,
    ),
    Fault(
        "compiled: many samples, sums begin where memory was left",
        MANY,
        compiled("memset(OF(total, phi->rank), 0,", "if (!first) memset(OF(total, phi->rank), 0,"),
        True,
    ),
    Fault(
        "compiled: many samples, f takes the stage without its weight",
        MANY,
        compiled("f[at + s] += weight * row[s]", "f[at + s] += row[s]"),
        True,
    ),
    Fault(
        "compiled: many samples, lengths pair with sigma'",
        MANY_TIMES,
        compiled("back[s] * VALUE(row[s])", "back[s] * SLOPE(row[s])"),
        True,
    ),
    Fault(
        "compiled: functionals of beta with the other sign",
        LAYERS,
        compiled("phi, samples, -1.0, g,", "phi, samples, 1.0, g,"),
        True,
    ),
    Fault(
        "compiled: gamma has the other sign",
        LAYERS,
        compiled("psi, samples, phi, -1.0, layer->beta", "psi, samples, phi, 1.0, layer->beta"),
        True,
    ),
    Fault("compiled: lambda is not seen", LAYERS, compiled("layer->lambda_, layer->D", "NULL, layer->D"), True),
    Fault(
        "compiled: beta without its last function of psi",
        LAYERS,
        compiled("layer->Y->samples, RANK(layer), 1.0,", "layer->Y->samples, RANK(layer) - 1, 1.0,"),
        True,
    ),
    Fault(
        "compiled: the bias's functional is weighted as the forward stage",
        LAYERS,
        compiled(
            "h = layer->lengths[layer->steps - 1 - layer->asked / stages];\n    const double b = layer->weights[stages - 1 - layer->asked % stages];",  # noqa: E501
            "h = layer->lengths[layer->steps - 1 - layer->asked / stages];\n    const double b = layer->weights[(layer->asked + 1) % stages];",  # noqa: E501
        ),
        True,
    ),
    Fault(
        "compiled: f is added up with the weights of the stage before",
        LAYERS,
        compiled(
            "return h * layer->weights[stage];",
            "return h * layer->weights[(stage + layer->method_stages - 1) % layer->method_stages];",
        ),
        True,
    ),
    Fault(
        "compiled: the first stage stands for all in the quadrature",
        LAYERS,
        compiled("act(layer, stages[i],", "act(layer, stages[0],"),
        True,
    ),
    Fault(
        "compiled: derivatives are taken at a stale stage",
        LAYERS,
        compiled("layer->point = y;", "if (layer->point) return PETSC_SUCCESS;\n    layer->point = y;"),
        True,
    ),
    Fault(
        "compiled: functionals of beta are added to the last ones",
        LAYERS,
        compiled("PetscCall(VecSet(layer->parameters, 0.0));", ""),
        True,
    ),
    Fault(
        "compiled: gamma at the end stands for that of all layers",
        LAYERS,
        compiled("write_state(layer, layer->adjoint, start + ", "write_state(layer, layer->adjoint, gamma + count * "),
        True,
    ),
    # steps
    Fault(
        "b in place of b^T",
        CLASSES,
        line(
            fem_resnet.time_stepping.jacobian,
            "pulled",
            "by_g = -kernel.transposed_times(beta[0], D[0])",
            "by_g = -kernel.transposed_times(beta[0][::-1, ::-1], D[0])",
        ),
    ),
    Fault(
        "beta's functional has the other sign",
        CLASSES,
        line(Linear, "transpose", "= -at.factors.outer(", "= at.factors.outer("),
    ),
    Fault(
        "the kernel is symmetrised",
        FIELD,
        line(
            inputs.OnLayer,
            "__init__",
            "self._basis.expand(c) for c in coefficients",
            "(lambda m: (m + m.T) / 2 if m.ndim == 2 and m.shape[0] == m.shape[1] else m)(self._basis.expand(c)) for c in coefficients",  # noqa: E501
        ),
    ),
    Fault(
        "t at the start of the step for all stages",
        CLASSES,
        line(LayerTS, "_keep_step", "ts.getPrevTime() + node * h", "ts.getPrevTime()"),
    ),
    Fault(
        "t of the end of the step in the right-hand side",
        CLASSES,
        line(LayerTS, "_rate", "rates(t, ", "rates(ts.getTime() + ts.getTimeStep(), "),
    ),
    Fault("quadrature weights permuted", CLASSES, _permuted_weights),
    Fault("stage nodes ignored", CLASSES, _ignored_nodes),
    Fault("a stale stage", CLASSES, _stale_stage),
    Fault("a stale step size", CLASSES, _unreset_step),
    Fault(
        "the layer's length is forgotten",
        CLASSES,
        line(
            Linear,
            "_known",
            "tuple(inputs.length for inputs in self._inputs)",
            "tuple(inputs.length ** 0 for inputs in self._inputs)",
        ),
    ),
    Fault(
        "stages of weight below 0.2 are left out", CLASSES, line(LayerTS, "_keep_step", "if weight != 0.0", "if weight > 0.2")
    ),
    Fault(
        "the Hessian forgets beta_1 g",
        CLASSES,
        line(fem_resnet.time_stepping.jacobian, "acting", "kernel.times(beta[1], g[0]) + kernel.times", "kernel.times"),
    ),
    Fault(
        "stages of an earlier beta are taken",
        MIRRORED,
        line(fem_resnet.time_stepping.jacobian, "_the_same", "one.beta.equals(other.beta)", "True"),
    ),
    Fault(
        "stages of an earlier bias are taken",
        MIRRORED,
        line(fem_resnet.time_stepping.jacobian, "_the_same", "one.bias.equals(other.bias)", "True"),
    ),
    Fault(
        "the second adjoint forgets beta_1",
        CLASSES,
        line(fem_resnet.time_stepping.jacobian, "pulled", "[by_g - kernel.transposed_times(beta[1], D[1]), ", "[by_g, "),
    ),
    Fault(
        "the second adjoint forgets g_1", CLASSES, line(Linear, "transpose", "by_beta -= at.factors.outer(D[1], g[1])", "pass")
    ),
    Fault("mu is not set to zero", CLASSES, line(LayerTS, "adjoint", "self.functionals.set(0.0)", "pass")),
    Fault(
        "implicit: the parameter transpose has the other sign",
        IMPLICIT,
        line(LayerTS, "_parameter_transpose", "np.negative(values, out=values)", "pass"),
    ),
    Fault(
        "implicit: the row of q is dropped",
        IMPLICIT,
        line(Linear, "assembled", "-np.concatenate(by_g).T", "0 * np.concatenate(by_g).T"),
    ),
    Fault(
        "implicit: Newton stops at one iteration",
        IMPLICIT,
        line(
            LayerTS,
            "_configure",
            'configure(ts, self._options, ("mat_type",))',
            'configure(ts, self._options, ("mat_type",))\n    if self.method.implicit:\n        ts.getSNES().setTolerances(rtol=1e-1, max_it=50)',  # noqa: E501
        ),
    ),
    Fault(
        "carried: the Jacobian forgets the shift in its transpose",
        CARRIED,
        line(fem_resnet.time_stepping.jacobian.ShiftedJacobian, "multTranspose", "layer.shift * rest", "rest"),
    ),
    Fault(
        "carried: a product with a Jacobian without sigma'",
        CARRIED,
        line(Stage, "derivative", "ds = [slope * du]", "ds = [at.length[0] * du]"),
    ),
    Fault(
        "carried: the exact preconditioner is that of the transpose",
        CARRIED,
        line(
            fem_resnet.time_stepping.jacobian.Elimination,
            "apply",
            "self._solve(layer.matrices(), g)",
            "self._solve(np.swapaxes(layer.matrices(), 1, 2), g)",
        ),
    ),
    Fault(
        "carried: f is not stepped",
        CARRIED,
        line(fem_resnet.time_stepping.state.CarriedState, "rates", "return s", "return [0.5 * part for part in s]"),
    ),
    Fault(
        "adapted: the replayed steps are equal ones",
        ADAPTED,
        line(LayerTS, "_set_step", "self._replayed[ts.getStepNumber()]", "1.0 / len(self._replayed)"),
    ),
    Fault(
        "adapted: derivatives are not those of the replayed steps",
        ADAPTED,
        line(Segment, "taken_steps", "stepper.trace.steps if self.scheme.adaptive or given is not None else None", "None"),
    ),
    # segments
    Fault(
        "gamma is not handed on between layers",
        CLASSES,
        line(
            Segment,
            "_adjoint",
            "interfaces.append(at)",
            "interfaces.append(at)\n        at = at._replace(by_g=[0 * part for part in at.by_g])",
        ),
    ),
    Fault(
        "lambda at a segment's start without gamma",
        CLASSES,
        line(
            Segment,
            "_at_start",
            "self._unfold(one)[0][: self._nodes]",
            "at.by_f[order][: self._nodes].copy()",
        ),
    ),
    Fault(
        "gamma comes without the measure",
        CLASSES,
        line(Segment, "_unfold", "return [at.psi.functional(by_g) + by_f for", "return [at.psi.values @ by_g + by_f for"),
    ),
    Fault(
        "co-states without gamma",
        CLASSES,
        line(Segment, "costate", "r = at.psi.expand(at.by_g[0])", "r = 0 * (at.psi.values @ at.by_g[0])"),
    ),
    Fault("sign of r", CLASSES, line(Segment, "costate", "return r", "return -r")),
    Fault(
        "the co-state is the functional itself",
        CLASSES,
        line(
            Segment, "costate", "r += at.by_f[0][: self._nodes] / self._Y.weights[:, None]", "r += at.by_f[0][: self._nodes]"
        ),
    ),
    Fault(
        "states of a layer too early",
        CLASSES,
        line(fem_resnet.network.run.Piece, "state", "self._traces()[:layers]", "self._traces()[: max(layers - 1, 0)]"),
    ),
    Fault(
        "the second adjoint mixes its two functionals",
        CLASSES,
        line(Segment, "second_adjoint", "directions, functional_dot, functional)", "directions, functional, functional_dot)"),
    ),
    # what the head sees of f(T) alone
    Fault(
        "an input that has changed is taken for the one before",
        LAYERS,
        line(fem_resnet.tape.operator_block.OperatorBlock, "solve", "if version == old and not", "if not"),
    ),
    Fault(
        "coefficients of any input are taken for those of this one",
        LAYERS,
        line(fem_resnet.network.seen_input.SeenInput, "through", "self._array() is f and", "self._g is not None and"),
    ),
    Fault(
        "kept coefficients outlive their input", FIELD, line(space.SeenBatch, "read", "kept == version", "kept is not None")
    ),
    Fault(
        "a functional of what is seen comes back without the measure",
        CLASSES,
        line(space.SeenBatch, "write", "self._basis.functional(gamma)", "self._basis.values @ gamma"),
    ),
    Fault(
        "segments of coefficients give what they took",
        FIELD,
        line(CoefficientSegment, "_run", "return [g, *", "return [start, *"),
    ),
    Fault(
        "segments of coefficients start their adjoint at zero",
        FIELD,
        line(CoefficientSegment, "_at_end", "Functional([], psi, state)", "Functional([], psi, [0 * part for part in state])"),
    ),
    Fault(
        "states do not go on from the piece before",
        FIELD,
        line(
            fem_resnet.network.run.Piece,
            "at_start",
            "self.before.state(len(self.before.segment.steppers))",
            "self.before.at_start()",
        ),
    ),
    # coefficients in time and space
    Fault("hats at the wrong fraction", CLASSES, line(time_basis.Hats, "weights", "(1.0 - s, s)", "(s, 1.0 - s)")),
    Fault(
        "hats' transposed weights",
        CLASSES,
        line(inputs.OnLayer, "pull_back", "for weight in weights]", "for weight in weights[::-1]]"),
    ),
    Fault(
        "hats' lengths forget the last layer",
        CLASSES,
        line(
            time_basis.Hats,
            "__init__",
            "(np.append(lengths, 0.0) + np.append(0.0, lengths)) / 2",
            "np.append(lengths, lengths[-1]) / 2",
        ),
    ),
    Fault(
        "distances in time of the ends of layers",
        FIELD,
        line(time_basis.Groups, "__init__", "(times[a] + times[b]) / 2 for", "times[b] for"),
    ),
    Fault(
        "lengths of groups count layers",
        FIELD,
        line(time_basis.Groups, "__init__", "weights=np.diff(times)", "weights=np.ones(len(times) - 1)"),
    ),
    Fault(
        "functionals of shared coefficients are not added up",
        FIELD,
        line(inputs.LayerCoefficients, "collect", "total[at] += part", "total[at] = part"),
    ),
    Fault(
        "a layer takes the coefficients of the next",
        CLASSES,
        line(inputs.LayerCoefficients, "on_layers", "arrays[at] for at in positions", "arrays[at] for at in positions[::-1]"),
    ),
    Fault(
        "a layer starts at the end",
        LEARNED,
        line(inputs.LayerCoefficients, "collect", "times[layer - 1] -= functional[start]", "pass"),
    ),
    Fault(
        "read transposes",
        FIELD,
        line(
            fem_resnet.parameters.kernel.KernelCoefficients,
            "expand",
            "return coefficients",
            "return coefficients.T.copy() if coefficients.shape[0] == coefficients.shape[1] else coefficients",
        ),
    ),
    Fault(
        "the bias's basis is pulled back with weights",
        FIELD,
        line(space.BasisCoefficients, "pull_back", "self.basis.pull_back(functional)", "self.basis.project(functional)"),
    ),
    Fault(
        "the Riesz map without tau", CLASSES, line(fem_resnet.parameters.parameter.Parameter, "_riesz_map", " / measure", "")
    ),
    Fault(
        "the Riesz map of nodal values without weights",
        CLASSES,
        line(space.NodalValues, "riesz", "functional / self.Y.weights", "functional"),
    ),
    Fault(
        "the Riesz map of a kernel without Gram matrices",
        FIELD,
        line(Kernel, "riesz", "scipy.linalg.cho_solve(psi, scipy.linalg.cho_solve(phi, functional).T).T", "functional.copy()"),
    ),
    Fault(
        "the Riesz map of a kernel with one Gram matrix only",
        FIELD,
        line(
            Kernel,
            "riesz",
            "scipy.linalg.cho_solve(psi, scipy.linalg.cho_solve(phi, functional).T).T",
            "scipy.linalg.cho_solve(phi, functional)",
        ),
    ),
    Fault(
        "a wrong Gram matrix", FIELD, _basis_gram(lambda basis: basis.values.T @ basis.values * basis.Y.measure / basis.Y.size)
    ),
    Fault("the Gram matrix is taken for the identity", FIELD, _basis_gram(lambda basis: np.eye(basis.rank))),
    Fault(
        "the norm of a kernel is that of its matrix",
        FIELD,
        line(Kernel, "norm", "self.functional(beta) * beta", "beta * beta"),
    ),
    Fault("B^T with beta for beta^T", FIELD, line(Kernel, "transpose", "beta.T @", "beta @")),
    # measures
    Fault("a missing weight", CLASSES, _after_weights(_missing)),
    Fault("equal weights", CLASSES, _after_weights(lambda w: np.full_like(w, w.mean()))),
    Fault("weights of two nodes swapped", CLASSES, _after_weights(_swapped)),
    Fault("weights of the unit domain", CLASSES, _after_weights(lambda w: w / w.sum())),
    Fault(
        "inner products without weights",
        CLASSES,
        line(LabelSpace, "inner", '"i,is,is->", self.weights', '"i,is,is->", 0 * self.weights + 1'),
    ),
    Fault(
        "the norm is squared", CLASSES, line(LabelSpace, "norm", "float(np.sqrt(self.inner(f, f)))", "float(self.inner(f, f))")
    ),
    Fault("projections without weights", CLASSES, line(Basis, "project", "self.Y.weights[:, None] * values", "values")),
    Fault("columns of a batch mixed", CLASSES, _mixed_columns),
    # channels, symmetries
    Fault(
        "channels of a bias in the order of Firedrake", MIRRORED, line(Channels, "to_data", "np.moveaxis(", "np.array("), True
    ),
    Fault(
        "channels of all fields in another order",
        MIRRORED,
        line(Channels, "from_data", "parts.transpose(1, 0, 2)", "parts.transpose(1, 0, 2)[::-1]"),
    ),
    Fault("weights of one channel alone", MIRRORED, line(RepeatedBasis, "pull_back", "in parts", "in parts[:1] * len(parts)")),
    Fault(
        "a stage forgets the last channel's functional",
        MIRRORED,
        line(ChannelStage, "transpose", "[one.bias for one in found]", "[one.bias for one in found[:1] * len(found)]"),
        True,
    ),
    Fault(
        "each channel's stage has the bias of the first",
        MIRRORED,
        line(ChannelStage, "_parts", "self._split(at.a)", "list(self._split(at.a))[:1] * self._channels"),
        True,
    ),
    Fault(
        "the linear image of a head is not transposed",
        MIRRORED,
        line(fem_resnet.parameters.subspace.Within, "of_whole", "np.ravel(functional)", "np.ravel(functional)[::-1]"),
    ),
    Fault(
        "kernels of a linear set are twice as large on the way back",
        MIRRORED,
        line(LinearKernels, "adjoint", "self._transposed @", "2 * self._transposed @"),
    ),
    Fault("a head that keeps symmetries has no mu", MIRRORED, line(Head, "whole", "self.mu is None or mu is None", "True")),
    # head, loss, regulariser, problem
    Fault("the head has W transposed", FIELD, line(HeadOperator, "forward", "W @ g", "W.T @ g")),
    Fault("the head's adjoint has W for W^T", FIELD, line(HeadOperator, "adjoint", "W.T @ moments", "W @ moments")),
    Fault(
        "the head's mu is left out of its gradient",
        CLASSES,
        line(HeadOperator, "adjoint", "moments.sum(axis=1)", "0 * moments.sum(axis=1)"),
    ),
    Fault("the head's Hessian forgets W_1", CLASSES, line(HeadOperator, "second_adjoint", "g += W_dot.T @ moments", "pass")),
    Fault(
        "predictions without mu",
        CLASSES,
        line(fem_resnet.learning.head.Head, "_coefficients", " + mu[:, None]", ""),
    ),
    Fault(
        "softmax normalised over samples",
        CLASSES,
        lambda patch: (
            patch.setattr(fem_resnet.learning.prediction, "log_density", _over_samples),
            patch.setattr(fem_resnet.learning.loss, "log_density", _over_samples),
        ),
    ),
    Fault("h' is left out", FIELD, _prediction("logistic", transpose=lambda old: lambda Y, O, d: d)),
    Fault("h'' is left out", FIELD, _prediction("logistic", second_transpose=lambda old: lambda Y, O, v, d: 0 * d)),
    Fault(
        "h is not applied",
        FIELD,
        _prediction(
            "logistic",
            value=lambda old: lambda Y, O: O,
            transpose=lambda old: lambda Y, O, d: d,
            derivative=lambda old: lambda Y, O, v: v,
            second_transpose=lambda old: lambda Y, O, v, d: 0 * d,
        ),
    ),
    Fault(
        "least squares without the 1/2",
        FIELD,
        _loss(
            "least_squares",
            value=lambda old: lambda *a: 2 * old(*a),
            gradient=lambda old: lambda *a: 2 * old(*a),
            hessian=lambda old: lambda *a: 2 * old(*a),
            gauss_newton=lambda old: lambda *a: 2 * old(*a),
        ),
    ),
    Fault("the loss's gradient without its half", FIELD, _loss("least_squares", gradient=lambda old: lambda *a: 2 * old(*a))),
    Fault(
        "the cross entropy's Hessian is diagonal",
        CLASSES,
        _loss(
            "cross_entropy",
            hessian=lambda old: (
                lambda Y, O, C, h, v: Y.weights[:, None] * np.exp(fem_resnet.learning.prediction.log_density(Y, O)) * v
            ),
        ),
    ),
    Fault("Gauss and Newton keep the prediction's curvature", FIELD, _loss("least_squares", gauss_newton=lambda old: None)),
    Fault(
        "weights of samples ignored in J",
        CLASSES,
        line(Loss, "forward", "self._weights @ ", "np.full(len(self._weights), 1 / len(self._weights)) @ "),
    ),
    Fault(
        "weights of samples ignored in J and its gradient",
        CLASSES,
        lambda patch: patch.setattr(
            fem_resnet.learning.loss, "sample_weights", lambda weights, samples: np.full(samples, 1 / samples)
        ),
    ),
    Fault(
        "weights of samples not normalised",
        CLASSES,
        lambda patch: patch.setattr(
            fem_resnet.learning.loss,
            "sample_weights",
            lambda weights, samples: np.ones(samples) if weights is None else np.asarray(weights, dtype=float),
        ),
    ),
    Fault(
        "stale observations after an exchange",
        CLASSES,
        line(
            fem_resnet.learning.problem.LearningProblem,
            "exchange",
            "block.operator.observe(samples.at_end, batch.weights)",
            "pass",
        ),
    ),
    Fault(
        "stale inputs after an exchange",
        CLASSES,
        line(
            fem_resnet.learning.problem.LearningProblem,
            "exchange",
            "recorded[...] = batch.inputs.dat.data_ro.reshape(recorded.shape)",
            "pass",
        ),
    ),
    Fault(
        "padded samples of minibatches count",
        CLASSES,
        line(
            fem_resnet.learning.samples.Samples,
            "minibatches",
            "np.where(np.arange(size) < len(part), weights[chosen[-1]], 0.0)",
            "weights[chosen[-1]]",
        ),
    ),
    Fault(
        "a factor 2 in the regulariser",
        CLASSES,
        line(fem_resnet.learning.regulariser._RegulariserOperator, "forward", "0.5 * sum", "1.0 * sum"),
    ),
    Fault(
        "a factor 2 in the regulariser and its gradient",
        CLASSES,
        line(
            fem_resnet.learning.regulariser._RegulariserOperator,
            "_functionals",
            "dual * weight * functional",
            "2 * dual * weight * functional",
        ),
    ),
    Fault(
        "Tikhonov without tau", CLASSES, line(regulariser, "_mass", "tau * basis.functional(c) for", "basis.functional(c) for")
    ),
    Fault("Tikhonov without Gram matrices", FIELD, line(regulariser, "_mass", "tau * basis.functional(c) for", "tau * c for")),
    Fault("smoothness without a gradient in z", CLASSES, line(Kernel, "stiffness", " + phi.gram @ beta @ psi.stiffness", "")),
    Fault("smoothness in time without distances", CLASSES, line(regulariser, "_variation", " / distance", "")),
    Fault(
        "regularisers forget the head",
        CLASSES,
        line(
            fem_resnet.learning.problem.LearningProblem,
            "_penalised",
            "for parameter in self.parameters if",
            "for parameter in self.net.parameters if",
        ),
    ),
    # what is learned besides
    Fault(
        "the retraction's adjoint without its projection",
        LEARNED,
        line(fem_resnet.parameters.retraction.Retraction, "adjoint", "self._project_transposed(", "(lambda d: d)("),
    ),
    # running costs
    Fault(
        "a running cost without weights of the nodes",
        COSTS,
        line(CostRate, "_rates", "self._Y.weights @ part", "part.sum(axis=0)"),
    ),
    Fault("a running cost without tau", COSTS, line(CostRate, "value", "self._length[0] * L[0]", "L[0]")),
    Fault(
        "a running cost's l_f is left out of the adjoint",
        COSTS,
        line(Linear, "transpose", "by_rest, by_beta = self._with_row(in_f)", "by_rest, by_beta = 0 * self._with_row(in_f)"),
    ),
    Fault("a running cost's l_a is left out", COSTS, line(Linear, "transpose", "result.bias += in_a", "pass")),
    Fault("a running cost's kappa b without Gram matrices", COSTS, line(CostRate, "_by_beta", "self._kernel is None", "True")),
    Fault(
        "a running cost's adjoint stops at a layer",
        COSTS,
        line(fem_resnet.time_stepping.ts_stepper.TSStepper, "adjoint", "list(rest) if self._has_cost else by_f", "by_f"),
    ),
    Fault("a running cost's Hessian without l_fa", COSTS, line(CostRate, "_moved_slopes", "fa * f_1 + aa", "aa")),
    Fault(
        "a running cost ignores the weights of samples",
        COSTS,
        line(Segment, "_of_states", "self.omega * cost", "np.full(len(self.omega), cost / len(self.omega))"),
    ),
    # reproducibility
    Fault("J drifts with each evaluation", CLASSES, _counted_up(Loss, "forward")),
    Fault(
        "an evaluation changes the coefficients",
        CLASSES,
        line(space.NodalValues, "expand", "return coefficients", "coefficients *= 1.0000001\n    return coefficients"),
    ),
    Fault(
        "an unrecorded run spoils a trajectory",
        CLASSES,
        line(
            fem_resnet.network.solver.Solver,
            "_segments",
            "if annotate_tape():",
            "if not self._scratch and annotate_tape():\n        self._scratch[space.value_shape, running, seen_by, observed] = make()\n    if False:",  # noqa: E501
        ),
    ),
    Fault(
        "kinks: sigma' from a smooth neighbour",
        KINKS,
        line(Stage, "_by_u", "self.activation.derivative(u, out=u)", "np.clip(0.5 + u, 0, 1, out=u)"),
    ),
    Fault(
        "kinks: sign of b",
        KINKS,
        line(
            Stage, "_affine", "np.subtract(at.a[order][nodes, None], u, out=u)", "np.add(at.a[order][nodes, None], u, out=u)"
        ),
    ),
    # terms of regularisers
    *(
        Fault(name, "terms", line(owner, function, right, wrong))
        for name, owner, function, right, wrong in (
            ("all parameters have one weight", regulariser, "weight_on", "weight.own", "()"),
            ("an integral of pairs without the weights of z", Pairs, "functional", " * self._in_z[z, None]", ""),
            ("total variation without tau", Field, "functionals", "tau * _pull_back", "_pull_back"),
            ("L1 without the weights of y in its value", Pairs, "integral", "self._in_y[y] @", "np.ones(len(rows[y])) @"),
            ("total variation without epsilon outside", Variation, "_form", "+ self.epsilon)", ")"),
            ("a commutator that is a product", localities, "_form", " - beta @ S.T", ""),
            ("L1's curvature is that of another power", Modulus, "curvature", ") ** 2 / size", ") / size"),
            ("a half of the commutator's functional", localities, "_form", " - D @ S", ""),
        )
    ),
]


def _over_samples(Y, O):
    largest = O.max(axis=1, initial=-np.inf)[:, None]
    shifted = O - largest
    return shifted - np.log(np.exp(shifted).sum(axis=1))[:, None]


# -- further ones, which the built-in problems are to show -----------------------------------------------------------

#: For `Fault.problem`: nothing is known of where the fault shows.
BUILT_IN = "built-in"
Network, Problem = fem_resnet.network.network.ResidualNetwork, fem_resnet.learning.problem.LearningProblem
CompiledStage = fem_resnet.layers.compiled_stage.CompiledStage
EnergyStage = fem_resnet.layers.discrete_gradient_stage.DiscreteGradientStage
Flow, Retraction = fem_resnet.layers.transposed_stage.TransposedStage, fem_resnet.parameters.retraction.Retraction
stable = fem_resnet.parameters.kernel_sets


def _of_rank(patch):
    """Bases are told apart by their ranks."""
    original = CompiledStage.basis

    def basis(self, basis):
        first = self.__dict__.setdefault("_by_rank", {}).setdefault(basis.rank, basis)
        return original(self, first)

    patch.setattr(CompiledStage, "basis", basis)


def _by_name(patch):
    """Code is kept by the number of its parameters, and not by what it computes."""
    made, kept = fem_resnet.layers.compiled_stage.activation_code, {}

    def code(activation, *rest):
        key = len(activation.parameters), activation.expression, *rest
        return kept.setdefault(key, made(activation, *rest))

    patch.setattr(fem_resnet.layers.compiled_stage, "activation_code", code)


def _tail(name, order, change):
    """An activation that is wrong for some arguments, in NumPy."""

    def plant(patch):
        table = dict(fem_resnet.activation.activation.ACTIVATIONS)
        kernels = list(table[name].kernels)
        right = kernels[order]

        def wrong(s, out, **parameters):
            given = s.copy()
            right(s, out, **parameters)
            out[...] = change(given, out)

        kernels[order] = wrong
        table[name] = replace(table[name], kernels=tuple(kernels))
        patch.setattr(fem_resnet.activation.activation, "ACTIVATIONS", table)

    return plant


def _overwrites(patch):
    original = CompiledStage.advance

    def advance(self, f, stages):
        result = original(self, f, stages)
        if len(f) == 1 and f[0].flags.writeable:
            f[0][...] = result[0]
        return result

    patch.setattr(CompiledStage, "advance", advance)


def _in_loss(name, part, wrong):
    """A wrong part of a loss, wherever it is used."""
    return lambda patch: patch.setitem(vars(getattr(fem_resnet.learning.loss, name)), part, wrong)


def _without_running_cost(patch):
    """A problem that is put together again loses a part: its running cost, where it is recorded a second time."""
    record = Problem.record

    def again(self, **options):
        if self.__dict__.get("_records", 0):
            self.running = None
        self._records = self.__dict__.get("_records", 0) + 1
        return record(self, **options)

    patch.setattr(Problem, "record", again)


FURTHER = [
    # stage.c
    Fault(
        "C: of three samples more, two are multiplied",
        BUILT_IN,
        compiled("case 3: AFFINE(3, 4); break;", "case 3: AFFINE(2, 4); break;"),
        True,
    ),
    Fault(
        "C: functions behind the last whole tile are not projected on",
        BUILT_IN,
        compiled(
            "        for (; k < rank; k++) PROJECT(1, samples);                                                                         \\\n",  # noqa: E501
            "        (void)k;\\\n",
        ),
        True,
    ),
    Fault(
        "C: three nodes that are left are taken for two",
        BUILT_IN,
        compiled("case 3: tile(3, vectors); break;", "case 3: tile(2, vectors); break;"),
        True,
    ),
    Fault(
        "C: a slab of functions forgets the one before", BUILT_IN, compiled("slab, k ? NULL : a + i,", "slab, a + i,"), True
    ),
    Fault(
        "C: a packed chunk has its nodes in the other order",
        BUILT_IN,
        compiled("first * Y->nodes + node * samples", "first * Y->nodes + (Y->nodes - 1 - node) * samples"),
        True,
    ),
    Fault(
        "C: the last block has the weights of the first",
        BUILT_IN,
        compiled(
            "fill_up(scratch->weights, Y->weights + start, 1, 0, nodes);",
            "fill_up(scratch->weights, Y->weights, 1, 0, nodes);",
        ),
        True,
    ),
    Fault(
        "C: a chunk of one vector is left out",
        BUILT_IN,
        compiled("case 1: TILES(tile, count, 1); break;", "case 1: break;"),
        True,
    ),
    Fault(
        "C: x of the first chunk for all",
        BUILT_IN,
        compiled(
            "turn(samples, psi->rank, x + first * ldx, ldx, 1.0, OF(y, psi->rank));",
            "turn(samples, psi->rank, x, ldx, 1.0, OF(y, psi->rank));",
        ),
        True,
    ),
    Fault(
        "C: lambda's factor is that of the first samples",
        BUILT_IN,
        compiled("x[(first + s) * ldx + psi->rank]", "x[s * ldx + psi->rank]"),
        True,
    ),
    Fault(
        "C: psi is phi where ranks are equal",
        BUILT_IN,
        compiled(
            "psi->values + start, psi->stride, psi->rank, nodes, zero,",
            "(psi->rank <= phi->rank ? phi : psi)->values + start, psi->stride, psi->rank, nodes, zero,",
        ),
        True,
    ),
    # activations in C and NumPy
    Fault(
        "C: no slope of tanh for s < -20",
        BUILT_IN,
        formula("return 4.0 * tail / (all * all);", "return s < -20.0 ? 0.0 : 4.0 * tail / (all * all);"),
        True,
    ),
    Fault(
        "C: softplus is cut off at 30",
        BUILT_IN,
        formula("(s < 0.0 ? 0.0 : s) + log1p", "(s < 0.0 ? 0.0 : s > 30.0 ? 30.0 : s) + log1p"),
        True,
    ),
    Fault(
        "C: the slope of leaky_relu at 0 is from the right",
        BUILT_IN,
        formula("return s > 0.0 ? 1.0 : 0.1;", "return s >= 0.0 ? 1.0 : 0.1;"),
        True,
    ),
    Fault("C: code is kept by something else than what it computes", BUILT_IN, _by_name, True),
    Fault(
        "the slope of arctan is wrong for s < -20",
        BUILT_IN,
        _tail("arctan", 1, lambda s, v: np.where(s < -20, 0.5 * v, v)),
        True,
    ),
    Fault(
        "the second derivative of the sigmoid has the other sign for s > 12",
        BUILT_IN,
        _tail("sigmoid", 2, lambda s, v: np.where(s > 12, -v, v)),
        True,
    ),
    Fault(
        "the primitive of tanh loses log 2 in its tail",
        BUILT_IN,
        _tail("tanh", 3, lambda s, v: np.where(np.abs(s) > 20, np.abs(s), v)),
        True,
    ),
    # layer.c, compiled_stage, compiled_layer
    Fault(
        "C: a slope that serves two steps counts once",
        BUILT_IN,
        compiled("step + 1 < layer->steps ? layer->lengths[step + 1] * layer->weights[0] : 0.0", "0.0"),
        True,
    ),
    Fault(
        "C: a stage of weight 0 has no functional", BUILT_IN, compiled("return b != 0.0 ? h * b : h;", "return h * b;"), True
    ),
    Fault(
        "C: given steps are not taken", BUILT_IN, compiled("if (layer->replays && layer->step < layer->steps)", "if (0)"), True
    ),
    Fault(
        "C: a state that is not finite is handed on",
        BUILT_IN,
        compiled("outcome->finite &= !PetscIsInfOrNanReal(g[i]);", "(void)g[i];"),
        True,
    ),
    Fault(
        "C: states of many numbers keep what TS worked with for others",
        BUILT_IN,
        compiled(
            "PetscCall(TSSetCostGradients(layer->ts, 1, &layer->adjoint, &layer->parameters));",
            "if (!layer->asked && LD(layer) * layer->Y->samples > KEPT_STATE) PetscCall(VecScale(layer->adjoint, 1.0 + 1e-6));\n    PetscCall(TSSetCostGradients(layer->ts, 1, &layer->adjoint, &layer->parameters));",  # noqa: E501
        ),
        True,
    ),
    Fault("compiled bases are told apart by their ranks", BUILT_IN, _of_rank, True),
    Fault(
        "the last chunk of a packed field is not unpacked",
        BUILT_IN,
        line(CompiledStage, "unpack", "in self._chunks(packed):", "in list(self._chunks(packed))[:-1]:"),
        True,
    ),
    Fault("the quadrature writes into the state at the start", BUILT_IN, _overwrites, True),
    Fault(
        "kept stages are of a layer of length one",
        BUILT_IN,
        line(fem_resnet.time_stepping.compiled_layer.KeptStages, "__iter__", "(self.inputs.length,)", "(1.0,)"),
        True,
    ),
    Fault(
        "kept stages have weights of steps of length one",
        BUILT_IN,
        line(fem_resnet.time_stepping.compiled_layer.KeptStages, "__iter__", "StageValue(h * weight,", "StageValue(weight,"),
        True,
    ),
    # segments
    Fault(
        "layers with another psi are stepped like those before",
        BUILT_IN,
        line(
            Segment, "_split", "if l == 0 or l in self.observed or psi is not psis[l - 1]", "if l == 0 or l in self.observed"
        ),
        True,
    ),
    Fault(
        "gamma is lost where psi changes",
        BUILT_IN,
        line(Segment, "_adjoint", "self._without_g(psi, self._unfold(at))", "self._without_g(psi, list(at.by_f))"),
        True,
    ),
    Fault(
        "a co-state is that of the next layer",
        BUILT_IN,
        line(
            Segment,
            "costate",
            "self._at_interfaces[layer]",
            "self._at_interfaces[min(layer + 1, len(self._at_interfaces) - 1)]",
        ),
        True,
    ),
    Fault(
        "tangents are taken at the controls of the first one",
        BUILT_IN,
        line(
            Segment,
            "_run_with_tangent",
            "values = self._coefficients.on_layers(arrays[1:])",
            'values = self.__dict__.setdefault("_first", self._coefficients.on_layers(arrays[1:]))',
        ),
        True,
    ),
    Fault(
        "tangents take equal steps",
        BUILT_IN,
        line(Segment, "_run_with_tangent", "save, self.taken_steps())", "save, [None] * len(self.steppers))"),
        True,
    ),
    # what a network says and copies
    Fault(
        "a control is on no tape",
        BUILT_IN,
        line(
            inputs.LayerCoefficients,
            "__init__",
            "[parameters[name].functions[k] for name, k in keys]",
            "[type(f)(f.function_space(), val=f.dat.data_ro.copy()) for f in (parameters[name].functions[k] for name, k in keys)]",  # noqa: E501
        ),
        True,
    ),
    Fault(
        "learned times are no controls",
        BUILT_IN,
        line(
            fem_resnet.network.network_parameters.NetworkParameters,
            "learned",
            "[] if self.layer_times is None else [self.layer_times]",
            "[]",
        ),
        True,
    ),
    Fault(
        "on another space coefficients come in the other order",
        BUILT_IN,
        line(fem_resnet.network.other_networks, "copy_coefficients", "ours.get(k)", "ours.get(len(ours.functions) - 1 - k)"),
        True,
    ),
    Fault(
        "settings forget the number of steps",
        BUILT_IN,
        line(
            fem_resnet.network.settings.Settings,
            "arguments",
            "for field in fields(self)}",
            'for field in fields(self)} | {"layers": replace(self.layers, steps=1)}',
        ),
        True,
    ),
    Fault(
        "on another space a head loses mu",
        BUILT_IN,
        line(
            fem_resnet.learning.head.Head,
            "on",
            "theirs.set(0, ours.get(0))",
            'theirs.set(0, ours.get(0) * (ours.name == "W"))',
        ),
        True,
    ),
    Fault(
        "a gradient flow is taken for (2.8)",
        BUILT_IN,
        line(
            fem_resnet.time_stepping.scheme.Scheme, "new_stage", "TransposedStage(stage) if gradient_flow else stage", "stage"
        ),
        True,
    ),
    Fault("a problem that is recorded again loses its running cost", BUILT_IN, _without_running_cost, True),
    # time, coefficients, factors
    Fault("hats are swapped", BUILT_IN, line(time_basis.Hats, "weights", "(1.0 - s, s)", "(s, 1.0 - s)"), True),
    Fault(
        "measures of hats are not lumped at the ends",
        BUILT_IN,
        line(
            time_basis.Hats,
            "__init__",
            "(np.append(lengths, 0.0) + np.append(0.0, lengths)) / 2",
            "np.append(lengths, lengths[-1])",
        ),
        True,
    ),
    Fault(
        "linear controls take half of a functional each",
        BUILT_IN,
        line(inputs.OnLayer, "pull_back", "weight * pulled for weight in weights", "0.5 * pulled for weight in weights"),
        True,
    ),
    Fault(
        "directions of factors have no weights",
        BUILT_IN,
        line(inputs.LayerCoefficients, "_learned_factors", "Y.weights[:, None] * psi", "1.0 * psi"),
        True,
    ),
    Fault("the retraction forgets its curvature", BUILT_IN, line(Retraction, "second_adjoint", " - reduced @ U.T", ""), True),
    Fault(
        "learned factors are orthonormal without weights",
        BUILT_IN,
        line(Retraction, "_at", "self._Y.weights[:, None] * Y", "Y"),
        True,
    ),
    # stable kernels, gradient flows, discrete gradients
    Fault(
        "a semidefinite kernel has no curvature",
        BUILT_IN,
        line(stable.PositiveSemidefinite, "curvature", "(functional + functional.T) @ X_1", "0 * X"),
        True,
    ),
    Fault(
        "an antisymmetric kernel is not damped",
        BUILT_IN,
        line(stable.DampedAntisymmetric, "value", "+ self.damping * np.eye(kernel.phi.rank)", ""),
        True,
    ),
    Fault(
        "the derivative of a bounded kernel has the other sign",
        BUILT_IN,
        line(stable.NormBounded, "_derivative", "L @ V @ K - P @ V.T @ P", "L @ V @ K + P @ V.T @ P"),
        True,
    ),
    Fault(
        "the second adjoint of a flow forgets beta_1",
        BUILT_IN,
        line(Flow, "transpose", "y[0] += beta[1] @ z[1]", "pass"),
        True,
    ),
    Fault(
        "a discrete gradient's second derivatives are swapped",
        BUILT_IN,
        line(EnergyStage, "_by_both_u", "(D_0, (D_00, D_01))", "(D_0, (D_01, D_00))"),
        True,
    ),
    # heads, losses, regularisers
    Fault(
        "cross entropy takes observations for densities",
        BUILT_IN,
        _in_loss(
            "cross_entropy",
            "gradient",
            lambda Y, O, C, h: Y.weights[:, None] * (np.exp(fem_resnet.learning.prediction.log_density(Y, O)) - C),
        ),
        True,
    ),
    Fault(
        "the curvature of binary cross entropy is p",
        BUILT_IN,
        _in_loss("binary_cross_entropy", "hessian", lambda Y, O, C, h, v: Y.weights[:, None] / (1 + np.exp(-O)) * v),
        True,
    ),
    Fault(
        "the derivative of an output has mu",
        BUILT_IN,
        line(
            fem_resnet.learning.head.Head,
            "linear",
            "shifted=False",
            "shifted=True",
        ),
        True,
    ),
    Fault(
        "inner products of controls without tau",
        BUILT_IN,
        line(fem_resnet.parameters.parameter.Parameter, "pair", "self.time_basis.measures[k] * ", ""),
        True,
    ),
    Fault(
        "smoothness in time pulls one way", BUILT_IN, line(regulariser, "_variation", "functionals[k] -= step", "pass"), True
    ),
    # running costs, Blocks, checkpoints
    Fault(
        "a running cost's second adjoint forgets that a length moves",
        BUILT_IN,
        line(CostRate, "transpose", "moved_a + tau[1] * l_a", "moved_a"),
        True,
    ),
    Fault(
        "a running cost has no functional of the length",
        BUILT_IN,
        line(Linear, "transpose", "result.length += cost.by_length(by_s.by_c)", "pass"),
        True,
    ),
    Fault(
        "implicit steps do not see a running cost",
        BUILT_IN,
        line(Linear, "add_cost", "part[-1] += factor * c", "part[-1] += 0.5 * factor * c"),
        True,
    ),
    Fault(
        "of a control that Blocks share one part counts",
        BUILT_IN,
        line(
            fem_resnet.tape.operator_block,
            "_unless_added",
            "total.dat.data[...] += part.dat.data_ro",
            "total.dat.data[...] = part.dat.data_ro",
        ),
        True,
    ),
    Fault(
        "under checkpoints a recording keeps what is overwritten",
        BUILT_IN,
        line(
            fem_resnet.tape.scheduled_block.ScheduledBlock,
            "_forward",
            "[array.copy() for array in arrays] if self._manager.recording else arrays",
            "arrays",
        ),
        True,
    ),
]
