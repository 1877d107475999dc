"""Functions on the label domain as pictures: any function, states, co-states, biases, rows of a kernel, a basis."""

from __future__ import annotations

from collections.abc import Sequence

import firedrake as fd
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import instance, integer, integer_array, real_array, text
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.network.run import Run
from fem_resnet.plot.canvas import Colours, checked_axes, colour_bar, has_pyvista, limits_of, panels
from fem_resnet.plot.drawing import draw, is_graph, needs_space
from fem_resnet.plot.shown import Shown
from fem_resnet.ranks import draw_on_first, same

__all__ = ["basis", "bias", "chosen_times", "column", "costate", "function", "kernel_row", "new_panels", "state"]

#: How many layers are shown if nothing is said.
_FEW = 6


def function(
    Y: LabelSpace,
    f: fd.Function,
    sample: int = 0,
    channel: int = 0,
    *,
    ax: Axes | None = None,
    limits: Sequence[float] | None = None,
    label: str = "f",
) -> Axes:
    """Draw one function on the label domain. Collective over its communicator.

    On an interval it is a line, on a circle a coloured curve, in the plane and on a surface a coloured picture; of a body in
    space the boundary is seen; on a set of points in a line it has a bar for each.

    Parameters
    ----------
    Y
        The label domain.
    f
        A Function of `Y.V`, or a batch.
    sample, channel
        Which sample of a batch, and which channel, from 0.
    ax
        Where to draw, on all ranks; new axes if left out. A surface is drawn on plane axes by PyVista (extra `vtk`), else by
        `mplot3d` on axes of three coordinates.
    limits
        The ends of the scale, (low, high), shape (2,); those of the values if left out.
    label
        What the colour bar, or the axis of values, says.

    Returns
    -------
    matplotlib.axes.Axes
        The axes; empty ones on ranks other than 0.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit or differs between ranks, or the axes cannot show it.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, plot
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> ax = plot.function(Y, Y.batch(Y.coordinates[:, 0]), label="$y_1$")
    >>> ax.get_aspect()
    1.0
    """
    check_label_space(Y)
    same(Y.comm, label=label)
    text("label", label)
    values = column(Y, f, "f", sample, channel)
    return _pictures(Y, values[:, None], [""], label, "ax", ax, limits)[0]


def state(
    run: Run,
    sample: int = 0,
    channel: int = 0,
    *,
    layers: Sequence[int] | None = None,
    axes: Sequence[Axes] | None = None,
    limits: Sequence[float] | None = None,
) -> np.ndarray:
    """Draw the state f(., t) of one sample at layer times, side by side in the same colours. Collective.

    Parameters
    ----------
    run
        A run of a network.
    sample, channel
        Which sample, and which channel, from 0.
    layers
        The numbers l of the times t_l, from 0 to L, shape (times,); six or fewer of them, if left out.
    axes
        Where to draw, one for each time; new axes if left out.
    limits
        The ends of the scale, (low, high), shape (2,); those of the values if left out.

    Returns
    -------
    numpy.ndarray
        The axes, shape (times,).

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit or differs between ranks.
    RuntimeError
        As of `Run.state`.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, ResidualNetwork, laplace_basis, plot
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> net = ResidualNetwork(laplace_basis(Y, 3), layers=2, final_time=1.0)
    >>> axes = plot.state(net.run(Y.batch(Y.coordinates[:, 0])))
    >>> [ax.get_title() for ax in axes]
    ['t = 0', 't = 0.5', 't = 1']
    """
    return _over_time(run, "f", sample, channel, layers, axes, limits)


def costate(
    run: Run,
    sample: int = 0,
    channel: int = 0,
    *,
    layers: Sequence[int] | None = None,
    axes: Sequence[Axes] | None = None,
    limits: Sequence[float] | None = None,
) -> np.ndarray:
    """Draw the co-state r(., t) of one sample at layer times; `norms` draws its norm over t. Collective.

    Parameters
    ----------
    run
        A recorded run, after a derivative: `LearningProblem.record` makes both.
    sample, channel, layers, axes, limits
        As for `state`; `layers` and `limits` of shape (times,) and (2,).

    Returns
    -------
    numpy.ndarray
        The axes, shape (times,).

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit or differs between ranks.
    RuntimeError
        As of `Run.costate`.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Batch, LabelSpace, LearningProblem, ResidualNetwork, laplace_basis, least_squares, plot
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> net = ResidualNetwork(laplace_basis(Y, 3), layers=2, final_time=1.0)
    >>> f = Y.batch(Y.coordinates[:, 0])
    >>> J, run = LearningProblem(net, None, least_squares, None, Batch(f, Y.batch(0 * Y.weights))).record()
    >>> gradient = J.derivative()
    >>> len(plot.costate(run, layers=[0, 2]))
    2
    """
    return _over_time(run, "r", sample, channel, layers, axes, limits)


def bias(
    net: ResidualNetwork,
    channel: int = 0,
    *,
    layers: Sequence[int] | None = None,
    axes: Sequence[Axes] | None = None,
    limits: Sequence[float] | None = None,
) -> np.ndarray:
    """Draw the bias a(., t) at the starts of layers, side by side. Collective.

    Parameters
    ----------
    net
        The network, at its present coefficients.
    channel
        Which channel, from 0.
    layers
        The numbers of the layers, from 0, shape (layers,); six or fewer if left out, one if all share one bias.
    axes
        Where to draw, one for each layer; new axes if left out.
    limits
        The ends of the scale, (low, high), shape (2,); those of the values if left out.

    Returns
    -------
    numpy.ndarray
        The axes, shape (layers,).

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit or differs between ranks, or the network has no layers.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Bias, LabelSpace, ResidualNetwork, laplace_basis, plot
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> net = ResidualNetwork(laplace_basis(Y, 3), bias=Bias(in_time="shared"), layers=4)
    >>> len(plot.bias(net))
    1
    """
    instance("net", net, ResidualNetwork)
    one = len(net.bias.functions) == 1
    chosen = [0] if one and layers is None else chosen_times(net, layers, _last_layer(net))
    inputs = net.layer_inputs()
    values = np.column_stack([_of_channel(net.Y, inputs[l].bias.coefficients(0.0), channel) for l in chosen])
    titles = ["all t" if one else f"t = {net.times[l]:.3g}" for l in chosen]
    return _pictures(net.Y, values, titles, "bias a", "axes", axes, limits)


def kernel_row(
    net: ResidualNetwork,
    y0: ArrayLike,
    layer: int = 0,
    channels: tuple[int, int] = (0, 0),
    *,
    ax: Axes | None = None,
    limits: Sequence[float] | None = None,
) -> Axes:
    """Draw a row of the kernel, z -> b(y0, z, t): what the neuron at y0 takes from the others. Collective.

    Parameters
    ----------
    net
        The network, at its present coefficients.
    y0
        A point of Y, shape (coordinates,): the node that is nearest to it is taken, and marked. On a set of points the
        number of one.
    layer
        The number of the layer, from 0, at whose start it is.
    channels
        The channel of y0, and that of z, shape (2,).
    ax
        Where to draw, on all ranks; new axes if left out.
    limits
        The ends of the scale, (low, high), shape (2,); those of the values if left out.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit or differs between ranks, or the network has no layers.

    Examples
    --------
    >>> import numpy as np
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, ResidualNetwork, laplace_basis, plot
    >>> net = ResidualNetwork(laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 3), layers=1)
    >>> net.start("local", seed=0)
    >>> ax = plot.kernel_row(net, (0.5, 0.0))
    """
    instance("net", net, ResidualNetwork)
    Y = net.Y
    same(Y.comm, y0=y0, layer=layer, channels=channels)
    layer = integer("layer", layer, least=0, most=_last_layer(net))
    if not isinstance(channels, (tuple, list, np.ndarray)) or len(channels) != 2:
        raise ValueError(f"channels: expected two numbers, that of y0 and that of z, got {channels!r}")
    here, there = (integer("channels", c, least=0, most=Y.channels - 1) for c in channels)
    place, at = _nodes_at(Y.one, y0)
    inputs = net.layer_inputs()[layer]
    factors, beta = inputs.factors, inputs.beta.coefficients(0.0)
    rows = np.split(factors.phi.values, Y.channels)[here][at]
    totals = Y.sum(np.append(rows.sum(axis=0), len(rows)))  # of nodes of several cells at one place the mean
    row = (totals[:-1] / totals[-1]) @ beta @ np.split(factors.psi.values, Y.channels)[there].T
    named = f"point {y0!r}" if Y.numbers is not None else "(" + ", ".join(f"{x:.2g}" for x in place + 0.0) + ")"
    title = f"$y_0$ = {named}, t = {net.times[layer]:.3g}"
    return _pictures(Y, row[:, None], [title], "kernel b($y_0$, z)", "ax", ax, limits, place)[0]


def basis(
    phi: Basis, first: int = 6, *, axes: Sequence[Axes] | None = None, limits: Sequence[float] | None = None
) -> np.ndarray:
    """Draw the first functions of a basis side by side, with their eigenvalues where they have some. Collective.

    Parameters
    ----------
    phi
        The basis; of one with channels, the functions of one channel.
    first
        How many, at least 1.
    axes
        Where to draw, one for each function; new axes if left out.
    limits
        The ends of the scale, (low, high), shape (2,); those of the values if left out.

    Returns
    -------
    numpy.ndarray
        The axes, shape (functions,).

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit or differs between ranks.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, laplace_basis, plot
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(3), "CG", 1)), 6)
    >>> len(plot.basis(phi, first=3))
    3
    """
    instance("phi", phi, Basis, "laplace_basis(Y, rank) makes one")
    one = phi.one
    same(one.Y.comm, first=first)
    count = min(integer("first", first, most=np.inf), one.rank)
    titles = [rf"$\phi_{{{k + 1}}}$" for k in range(count)]
    if one.eigenvalues is not None:
        titles = [
            rf"{title}, $\lambda$ = {value if abs(value) > 1e-9 * one.eigenvalues.max() else 0:.3g}"
            for title, value in zip(titles, one.eigenvalues)
        ]
    return _pictures(one.Y, one.values[:, :count], titles, "basis function", "axes", axes, limits)


# -- what they share ---------------------------------------------------------------------------------------------------


def column(Y: LabelSpace, f: fd.Function, name: str, sample: int, channel: int) -> np.ndarray:
    """One sample of one channel at the owned nodes, shape (nodes of one channel,). Collective.

    Parameters
    ----------
    Y
        The label domain.
    f
        A Function of it, or a batch.
    name
        How messages call it.
    sample, channel
        Their numbers.

    Raises
    ------
    TypeError, ValueError
        If one of these does not fit or differs between ranks.
    """
    same(Y.comm, sample=sample)
    Y.check_batch(f, name)
    values = Y.values(f)
    return _of_channel(Y, values[:, integer("sample", sample, least=0, most=values.shape[1] - 1)], channel)


def _of_channel(Y: LabelSpace, values: np.ndarray, channel: int) -> np.ndarray:
    same(Y.comm, channel=channel)
    return np.split(values, Y.channels)[integer("channel", channel, least=0, most=Y.channels - 1)]


def chosen_times(net: ResidualNetwork, layers: Sequence[int] | None, last: int) -> list[int]:
    """Numbers of layers from outside, or six or fewer between 0 and the last one; the same on all ranks. Collective.

    Parameters
    ----------
    net
        The network.
    layers
        What was given, shape (numbers,); None for a choice.
    last
        The largest number.

    Raises
    ------
    TypeError, ValueError
        If they are no such numbers, or differ between ranks.
    """
    same(net.Y.comm, layers=layers)
    if layers is None:
        return np.unique(np.linspace(0, last, _FEW).round().astype(int)).tolist()
    chosen = integer_array("layers", layers, ("numbers",)).tolist()
    return [integer("layers", l, least=0, most=last) for l in chosen]


def _last_layer(net: ResidualNetwork) -> int:
    if net.layers == 0:
        raise ValueError("net: expected a network with layers, which have a bias and a kernel, got one without")
    return net.layers - 1


def _over_time(run, of, sample, channel, layers, axes, limits) -> np.ndarray:
    """State or co-state at layer times."""
    instance("run", run, Run, "net.run(inputs) gives one")
    Y, times = run.net.Y, run.net.times
    chosen = chosen_times(run.net, layers, run.net.layers)
    get, what = (run.state, "state f") if of == "f" else (run.costate, "co-state r")
    with stop_annotating():
        values = np.column_stack([column(Y, get(l), of, sample, channel) for l in chosen])
    return _pictures(Y, values, [f"t = {times[l]:.3g}" for l in chosen], what, "axes", axes, limits)


def _nodes_at(Y: LabelSpace, y0: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Where the node nearest to a point is, shape (coordinates,), and this rank's nodes there. Collective."""
    if Y.numbers is not None:
        at = np.flatnonzero(Y.numbers == integer("y0", y0, least=0, most=Y.size - 1))
        return Y.sum(Y.coordinates[at].sum(axis=0)), at
    x = Y.coordinates
    y = real_array("y0", y0, (x.shape[1],))
    extent = max(Y.comm.allreduce(float(np.abs(x - y).max(initial=0.0)), op=max), 1e-300)
    keys = np.round(np.column_stack([np.linalg.norm(x - y, axis=1), x]) / extent, 9)
    # Of nodes that are equally near the first one by its coordinates, whatever the partition.
    nearest = min(key for key in Y.comm.allgather(min(map(tuple, keys), default=(np.inf,))))
    at = np.flatnonzero((keys == nearest).all(axis=1)) if len(nearest) == keys.shape[1] else np.empty(0, int)
    return np.array(nearest[1:]) * extent, at


def new_panels(shown: Shown, count: int) -> np.ndarray:
    """New axes for so many pictures of a label domain, shape (count,)."""
    if needs_space(shown):
        return panels(count, wide=1.9) if has_pyvista() else panels(count, in_space=True)
    return panels(count, wide=1.25 if is_graph(shown) else 1.0)


def _pictures(
    Y: LabelSpace,
    values: np.ndarray,
    titles: Sequence[str],
    label: str,
    name: str,
    axes: Sequence[Axes] | Axes | None,
    limits: Sequence[float] | None,
    mark: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """Functions of one channel side by side, from values at the owned nodes, shape (nodes, functions). Collective."""
    given = checked_axes(Y.comm, name, axes, len(titles))
    ends = limits_of(Y.comm, limits)
    shown = Shown(Y.one)
    values = shown.values(values)
    panel = new_panels(shown, len(titles)) if given is None else given

    def draw_all() -> None:
        colours = Colours.of(values, ends)
        for number, (ax, one, title) in enumerate(zip(panel, values, titles)):
            draw(ax, shown, one, colours, mark)
            ax.set_title(title, fontsize="medium")
            if number and given is None and ax.get_subplotspec().colspan.start:
                ax.set_ylabel("")
                if not needs_space(shown):
                    ax.tick_params(labelleft=False)
            elif is_graph(shown):
                ax.set_ylabel(label)
        if not is_graph(shown):
            colour_bar(panel, colours, label)

    draw_on_first(Y.comm, draw_all)
    return panel
