"""The stability of a network, layer by layer, on one page: section 3.5.

Forward, M(t_(l+1), t_l) is the effect of layer l on a perturbation of f, and M(t_(l+1), 0) the effect of all layers up to it.
Backward, r(t_l) = M(T, t_l)^T r(T) is the gradient in f, for any loss. Its norm lies between the smallest and the largest
singular value of M(T, t_l), times the norm of r(T). On the orthogonal complement of few functions M is the identity, so that
gradients in f do not vanish altogether. Gradients in the bias, sigma'(u) r of (4.3), vanish where sigma is saturated.

A network acts linearly where sigma' is the same for u = a, which is that of f = 0, and for u = a - B f of all samples, node by
node: as with a kernel that is zero, or so small that sigma is linear to round-off. f(T) is then affine in f_I.
"""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import firedrake as fd
import numpy as np
from matplotlib.ticker import MaxNLocator
from mpi4py import MPI

from fem_resnet.arguments import instance
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.reporting import as_html, as_json, check_files, picture, table, write
from fem_resnet.theory.sensitivity.conditioning import LinearisedFlow
from fem_resnet.theory.sensitivity.layer_stability import BY_DEPTH, MORE_STEPS, LayerStability, layer_stability, scheme_of
from fem_resnet.theory.spectra.autonomous import sampled

__all__ = ["StabilityReport", "Suggestion", "stability_report"]

#: Gradients explode or vanish if they differ from r(T) by more than this factor.
_GRADIENTS = 100.0
#: sigma is saturated if its mean slope is below this part of the largest slope.
_SATURATED = 0.1
#: sigma is linear between two numbers if sigma' changes by no more than this part of its size, at so many points there.
_ROUND_OFF, _POINTS = 1e-12, 9


@dataclass(frozen=True)
class Suggestion:
    """A change that may help.

    Attributes
    ----------
    kind : str
        "step", "activation", "constraint" or "start".
    text : str
        The change, and the finding that is the reason for it.
    """

    kind: str
    text: str


@dataclass(frozen=True, repr=False)
class StabilityReport:
    """One page on the stability of a network. Get one from `stability_report`; ``print`` shows it as a table.

    Attributes
    ----------
    title : str
        The network, its scheme and the number of samples.
    layers : list of LayerStability
        The numbers of each layer.
    gradients : str
        "exploding", "vanishing", "both" or "even".
    findings : list of str
        The main findings, a sentence each.
    suggestions : list of Suggestion
        Changes that may help.
    seconds : float
        The wall time, in seconds.
    """

    title: str
    layers: list[LayerStability]
    gradients: str
    findings: list[str]
    suggestions: list[Suggestion]
    seconds: float

    def __repr__(self) -> str:
        return f"StabilityReport({self.title}; gradients: {self.gradients}; {len(self.suggestions)} suggestions)"

    def __str__(self) -> str:
        header, rows = self._table()
        return "\n".join([self.title, *table(header, rows, right=True), *self._notes])

    def _repr_html_(self) -> str:
        return as_html(self.title, *self._table(), self._notes)

    @property
    def _notes(self) -> list[str]:
        return [*self.findings, *(f"{suggestion.kind}: {suggestion.text}" for suggestion in self.suggestions)]

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The header and the rows, one a layer."""
        header = (
            "layer", "t", "grows", "keeps", "bound", "grown", "kept", "condition", "exponents", "M(T,t)", "", "|r|",
            "|D_a J|", "slope", "flat", "",
        )  # fmt: skip
        rows = [
            (
                str(l.layer), f"{l.start:.3g}", *map(_short, (l.grows, l.keeps, l.bound, l.grown, l.kept, l.condition)),
                f"{l.exponents[0]:.2f} {l.exponents[1]:.2f}",
                *map(_short, (l.gradient_grows, l.gradient_keeps, l.costate, l.bias_gradient, l.slope, l.flat)),
                l.verdict,
            )
            for l in self.layers
        ]  # fmt: skip
        return header, rows

    def to_json(self) -> str:
        """All attributes as JSON, including the attributes of each layer and each suggestion."""
        return as_json(asdict(self))

    def draw(self, path: str | Path) -> None:
        """Draw the page as a PNG. Not collective: call it on one rank.

        Parameters
        ----------
        path
            The file to write.

        Raises
        ------
        TypeError
            If `path` is no name of a file.
        OSError
            If the file cannot be written.
        """
        instance("path", path, (str, os.PathLike), "give the name of a file")
        number = [l.layer for l in self.layers]

        def of(name: str) -> list[float]:
            return [getattr(l, name) for l in self.layers]

        with picture(path, 10.5, 10.5) as figure:
            panels = figure.subplots(4, 1, height_ratios=[1, 1, 1, 0.8])
            panels[0].fill_between(
                number, of("keeps"), of("grows"), alpha=0.3, step="mid", label="singular values of\nM($t_{l+1}$, $t_l$)"
            )
            bound = np.minimum(of("bound"), 1e3 * max(of("grows")))
            panels[0].step(number, bound, "k:", where="mid", label="bound of 3.5")
            panels[0].set_title(textwrap.fill(self.title, 100), fontsize="small")
            panels[0].set_ylabel("factor of a perturbation\nin one layer")
            panels[1].set_ylabel("factor of a perturbation\nsince t = 0")
            panels[2].set_ylabel("factor of a gradient\nsince T, backwards")
            panels[1].fill_between(number, of("kept"), of("grown"), alpha=0.3, label="singular values of\nM($t_{l+1}$, 0)")
            panels[1].plot(number, of("condition"), ".-", color="#D55E00", label="condition number")
            panels[2].fill_between(
                number, of("gradient_keeps"), of("gradient_grows"), alpha=0.3, label="singular values of\nM(T, $t_l$)"
            )
            panels[2].plot(number, of("costate"), ".-", color="#D55E00", label="|r|, the co-state")
            panels[2].plot(
                number, of("bias_gradient"), ".-", color="#009E73", label="|$\\sigma'(u)$ r|, the gradient\nof the bias"
            )
            for axes in panels[:3]:
                axes.set_yscale("log")
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                axes.axhline(1.0, color="grey", lw=0.5)
                axes.set_xlabel("layer l")
                axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
            panels[3].axis("off")
            panels[3].text(0, 1, "\n".join(textwrap.fill(note, 120) for note in self._notes), va="top", fontsize="x-small")


@supports("channels", *HELD, *STEPPED, "gradient_flow")
def stability_report(
    net: ResidualNetwork,
    initial: fd.Function,
    *,
    terminal: fd.Function | None = None,
    json: str | Path | None = None,
    png: str | Path | None = None,
) -> StabilityReport:
    """The effect of the layers on perturbations and gradients along the solutions from f_I, and changes that may help.

    Collective over the ranks of the label domain.

    Parameters
    ----------
    net
        The network, at its present coefficients.
    initial
        f_I, as for ``net.run``. Each sample has its own linearisation and costs in each layer twice as many tangents as psi
        has functions; a few samples are enough.
    terminal
        r(T), a Function of the space of `initial`: the gradient of a loss in f(T), as from `terminal_costate`. If left out
        f(T), the gradient of 1/2 norm(f(T))^2.
    json, png
        The files to which rank 0 writes the numbers and the page; None for no file.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or the network has no layer.
    StepFailure
        If a solution or a perturbation of it overflows; the message names the layer.
    OSError
        If a file cannot be written; on all ranks.

    Examples
    --------
    >>> import numpy as np
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Kernel, LabelSpace, Layers, ResidualNetwork, laplace_basis, stability_report
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> kernel = Kernel(laplace_basis(Y, 3), in_time="shared")
    >>> net = ResidualNetwork(kernel, layers=Layers(2, 2.0, steps=4), activation="identity")
    >>> net.kernel.set(0, np.diag([2.0, -1.5, 0.0]))  # modes do e^(-2 t) and e^(1.5 t)
    >>> report = stability_report(net, Y.batch(0.1 * Y.coordinates[:, 0]))
    >>> [layer.verdict for layer in report.layers], [suggestion.kind for suggestion in report.suggestions]
    (['both', 'both'], ['constraint'])
    """
    check_files(net.Y.comm, json=json, png=png)
    began = time.perf_counter()
    flow = LinearisedFlow(net, initial)
    terminal = _terminal(flow, initial, terminal)
    layers = layer_stability(flow, terminal)
    gradients = _gradients(layers)
    findings = _findings(layers, gradients)
    linear = _acts_linearly(flow)
    if linear:
        findings.append(
            "this network acts linearly on these inputs: between f = 0 and the states sigma' does not change at any node"
        )
    if caveat := net.activation.properties.caveat("lipschitz"):
        findings.append(f"the bounds use sup |sigma'|; {caveat}")
    seconds = net.Y.comm.allreduce(time.perf_counter() - began, op=MPI.MAX)
    title = f"{net!r}, {net.solver_parameters['ts_type']}, steps a layer: {net.steps}, samples: {terminal.shape[1]}"
    report = StabilityReport(title, layers, gradients, findings, _suggestions(net, flow, layers, linear), seconds)
    if json is not None or png is not None:
        write(report, net.Y.comm, as_text=False, json=json, png=png)
    return report


def _terminal(flow: LinearisedFlow, initial: fd.Function, terminal: fd.Function | None) -> np.ndarray:
    Y = flow.net.Y
    if terminal is None:
        r = flow.states[-1]
        return r if Y.sum(np.abs(r).sum()) > 0 else np.ones_like(r)
    Y.check_batch(terminal, "terminal")
    if terminal.function_space() != initial.function_space():
        raise ValueError(f"terminal: expected a Function of {initial.function_space()}, got {terminal.function_space()}")
    r = np.array(Y.values(terminal))
    if not Y.sum(np.abs(r).sum()) > 0:
        raise ValueError("terminal: expected a co-state that is not zero")
    return r


def _acts_linearly(flow: LinearisedFlow) -> bool:
    """Whether sigma' is the same for all f between 0 and the states, at all nodes and layer times. Collective."""
    net, linear = flow.net, True
    for layer, inputs in enumerate(net.layer_inputs()):
        for s in (0.0, 1.0):
            a = inputs.bias.coefficients(s)[:, None]
            u = np.hstack([a, a - inputs.factors.apply(inputs.beta.coefficients(s), flow.states[layer + int(s)])])
            low, high = u.min(axis=1), u.max(axis=1)
            slopes = np.array([net.activation.derivative(low + part * (high - low)) for part in np.linspace(0, 1, _POINTS)])
            change = np.ptp(slopes, axis=0) - _ROUND_OFF * np.abs(slopes).max(axis=0)
            linear = linear and bool((change <= 0).all())
    return net.Y.comm.allreduce(linear, op=MPI.LAND)


# -- words -----------------------------------------------------------------------------------------------------------


def _gradients(layers: Sequence[LayerStability]) -> str:
    exploding = max(max(l.costate, l.bias_gradient) for l in layers) > _GRADIENTS
    vanishing = min(l.bias_gradient for l in layers) < 1 / _GRADIENTS
    if exploding and vanishing:
        return "both"
    return "exploding" if exploding else "vanishing" if vanishing else "even"


def _findings(layers: Sequence[LayerStability], gradients: str) -> list[str]:
    def of(*verdicts):
        return _ranges([l.layer for l in layers if l.verdict in verdicts])

    last, first = layers[-1], layers[0]
    with np.errstate(over="ignore", under="ignore"):
        apart = np.prod([l.keeps for l in layers]), np.prod([l.grows for l in layers])
    sizes = [l.bias_gradient for l in layers]
    return [
        f"layers that amplify: {of('amplifies', 'both')}; that damp: {of('damps', 'both')}",
        f"perturbations of f_I are multiplied by {_short(last.kept)} to {_short(last.grown)} over T = {last.end:g}, "
        f"condition {_short(last.condition)}, Lyapunov exponents {last.exponents[1]:.3g} to {last.exponents[0]:.3g}; "
        f"if the layers' directions lined up, by {_short(apart[0])} to {_short(apart[1])}",
        f"gradients: {gradients}; norm(r(0)) is {_short(first.costate)} times norm(r(T)), for any loss "
        f"{_short(first.gradient_keeps)} to {_short(first.gradient_grows)} times; the gradient of the bias goes "
        f"from {_short(min(sizes))} in layer {np.argmin(sizes)} to {_short(max(sizes))} in layer {np.argmax(sizes)}",
    ]


def _suggestions(
    net: ResidualNetwork, flow: LinearisedFlow, layers: Sequence[LayerStability], linear: bool
) -> list[Suggestion]:
    return [
        Suggestion(kind, text)
        for kind, texts in (
            ("step", _on_steps(net, layers)),
            ("activation", _on_activation(net, layers)),
            ("constraint", _on_constraints(net, flow, layers)),
            ("start", _on_start(net, linear)),
        )
        for text in texts
    ]


def _on_steps(net: ResidualNetwork, layers: Sequence[LayerStability]) -> list[str]:
    coarse = [l for l in layers if l.wanted_steps != net.steps]
    if scheme_of(net) is None or not coarse:
        return []
    where = (
        f"in layers {_ranges([l.layer for l in coarse])} the factor of a mode of the linearisation over {net.steps} steps "
        f"differs from its factor in the flow by more than a tenth"
    )
    wanted = [l.wanted_steps for l in coarse]
    if None in wanted:
        instead = "make the kernel smaller, or take a method of higher order or an implicit method"
        return [f"{where}, also with {MORE_STEPS} times as many steps: {instead}"]
    return [f"{where}: take steps={max(wanted)}"]


def _on_activation(net: ResidualNetwork, layers: Sequence[LayerStability]) -> list[str]:
    properties, name = net.activation.properties, net.activation.name
    texts = []
    saturated = [l for l in layers if l.slope < _SATURATED]
    flat = [l for l in layers if l.flat > 0.5 and l.slope >= _SATURATED]
    if saturated:
        cure = "penalise bias and kernel, so that u stays smaller" if properties.bounded else "move the bias"
        other = "" if name in ("leaky_relu", "identity") else ", or take 'leaky_relu', whose slope is never 0"
        texts.append(
            f"{name} is saturated in layers {_ranges([l.layer for l in saturated])}: its mean slope is below a tenth of the "
            f"largest one, and gradients (4.3) are small in proportion; {cure}{other}"
        )
    if flat:
        texts.append(
            f"sigma'(u) is below a thousandth of its largest value on more than half of Y in layers "
            f"{_ranges([l.layer for l in flat])}, which learn nothing there; take 'leaky_relu', or move the bias"
        )
    if not net.gradient_flow and not properties.bounded and layers[-1].grown > _GRADIENTS:
        texts.append(
            f"{name} is not bounded, so that f may grow exponentially; with 'tanh' or 'arctan' f grows at most linearly "
            f"(section 3.4)"
        )
    return texts


def _on_constraints(net: ResidualNetwork, flow: LinearisedFlow, layers: Sequence[LayerStability]) -> list[str]:
    T, lipschitz = layers[-1].end, net.activation.properties.lipschitz
    texts = []
    if max(layers[-1].grown, layers[0].gradient_grows) > BY_DEPTH and 0 < lipschitz < np.inf:
        largest, mean = (
            value ** (1 / flow.power) for value in (np.log(BY_DEPTH) / (lipschitz * T), flow.exponent() / (lipschitz * T))
        )
        texts.append(
            f"norm(b) <= {largest:.3g} in L2(Y x Y), now {mean:.3g} on average over t, keeps M(T, 0) below {BY_DEPTH:g} for "
            f"any f_I (section 3.5){sampled(net.activation, 'lipschitz')}; Tikhonov's regulariser makes norm(b) smaller"
        )
    if layers[-1].kept < 1 / _GRADIENTS:
        texts.append(
            f"inputs that differ by one function come {_short(1 / layers[-1].kept)} times closer; a smaller T or norm(b) "
            f"keeps them apart"
        )
    return texts


def _on_start(net: ResidualNetwork, linear: bool) -> list[str]:
    if not linear or net.activation.name == "identity":
        return []
    return [
        "training that begins where the network acts linearly may stay near that: net.start() gives the kernel other values"
    ]


def _short(value: float | np.floating) -> str:
    return f"{value:.3g}"


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as ranges: "0-3, 5" for 0, 1, 2, 3, 5; "none" for no number."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) or "none"
