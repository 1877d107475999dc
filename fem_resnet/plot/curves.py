"""Numbers as curves: norms over t, learning curves, spectra; and what a classifier takes for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import choice, instance, integer, integer_array, number, real_array
from fem_resnet.label_domain.basis import Basis
from fem_resnet.learning.curvature import Spectrum
from fem_resnet.network.run import Run
from fem_resnet.plot.canvas import DASHES, LINES, given_or_new
from fem_resnet.ranks import same
from fem_resnet.theory.spectra.eigen_expansion import EigenExpansion
from fem_resnet.theory.spectra.frozen_spectra import FrozenSpectra
from fem_resnet.theory.spectra.singular_values import SingularSystem
from fem_resnet.training.gradient import Result
from fem_resnet.training.msa import MSAResult
from fem_resnet.training.stochastic import StochasticResult

__all__ = ["confusion", "learning_curve", "norms", "spectrum"]


def norms(run: Run, of: str = "state", *, ax: Axes | None = None) -> Axes:
    """Draw the norm in L2(Y) of state or co-state over t, a line for each sample. Collective.

    A co-state that grows backwards in time is an exploding gradient, one that falls a vanishing one.

    Parameters
    ----------
    run
        A run of a network; for co-states a recorded one, after a derivative.
    of
        "state" or "costate".
    ax
        Where to draw, on all ranks; new axes if left out.

    Returns
    -------
    matplotlib.axes.Axes
        The axes, drawn on all ranks.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit or differs between ranks.
    RuntimeError
        As of `Run.state` or `Run.costate`.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, ResidualNetwork, laplace_basis, plot
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> net = ResidualNetwork(laplace_basis(Y, 3), layers=2, final_time=1.0)
    >>> plot.norms(net.run(Y.batch(Y.coordinates[:, 0]))).get_xlabel()
    't'
    """
    instance("run", run, Run, "net.run(inputs) gives one")
    Y = run.net.Y
    same(Y.comm, of=of)
    choice("of", of, ("state", "costate"))
    ax = given_or_new(ax)
    with stop_annotating():
        layers = range(run.net.layers + 1)
        functions = run.states() if of == "state" else map(run.costate, layers)
        sizes = np.sqrt([Y.sum(Y.weights @ Y.values(f) ** 2) for f in functions])
    few = sizes.shape[1] <= len(LINES)
    for sample, size in enumerate(sizes.T):
        style = {"color": LINES[sample], "label": f"sample {sample}"} if few else {"color": "0.7", "linewidth": 0.6}
        ax.plot(run.net.times, size, **style)
    if not few:
        ax.plot(
            run.net.times, np.median(sizes, axis=1), color=LINES[0], linewidth=2, label=f"median of {sizes.shape[1]} samples"
        )
    ax.set(xlabel="t", ylabel="norm of f(t) in L2(Y)" if of == "state" else "norm of r(t) in L2(Y)", ylim=(0, None))
    ax.legend(fontsize="small")
    return ax


def learning_curve(results: Any, *, ax: Axes | None = None, xlabel: str = "iteration", ylabel: str = "J") -> Axes:
    """Draw J over the iterations of trainings, on a logarithmic axis where it is positive. Not collective.

    Where the ranks of the bases grew, a dotted line stands at each change. A validation batch is a dashed line.

    Parameters
    ----------
    results
        What a training returned; or values, shape (iterations,), or with the places on the horizontal axis in the first
        column, shape (iterations, 2); or a dict of these by names, which the legend says.
    ax
        Where to draw; new axes if left out.
    xlabel, ylabel
        What the axes say.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> from fem_resnet import plot
    >>> ax = plot.learning_curve({"one": [1.0, 0.3, 0.1], "two": [1.0, 0.5]})
    >>> ax.get_yscale(), [line.get_label() for line in ax.lines]
    ('log', ['one', 'two'])
    """
    ax = given_or_new(ax)
    xlabel, ylabel = instance("xlabel", xlabel, str), instance("ylabel", ylabel, str)
    named = results if isinstance(results, Mapping) else {None: results}
    if not named:
        raise ValueError("results: expected at least one training, got an empty dict")
    curves = {name: _curve(result) for name, result in named.items()}
    for k, (name, (x, values, changes, validation)) in enumerate(curves.items()):
        colour = LINES[k % len(LINES)]
        ax.plot(x, values, label=name, color=colour, linestyle=DASHES[k // len(LINES) % len(DASHES)])
        for change in changes:
            ax.axvline(change, color="0.6", linestyle=":", linewidth=0.9)
        if validation.size:
            ax.plot(x, validation, color=colour, linestyle="--", label=f"{name or ylabel}, validation")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if all((line > 0).all() for _, *lines in curves.values() for line in (lines[0], lines[2])):
        ax.set_yscale("log")
    if None not in named or len(ax.get_legend_handles_labels()[1]):
        ax.legend(fontsize="small")
    return ax


def _curve(result: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Places, values, places where the ranks grew, and values of a validation batch."""
    nothing = np.empty(0)
    if isinstance(result, (Result, MSAResult, StochasticResult)):
        parts = [*(stage.values for stage in getattr(result, "stages", ())), result.values]
        values, ends = np.concatenate(parts), np.cumsum([len(part) for part in parts])
        return np.arange(len(values)), values, ends[:-1] - 0.5, getattr(result, "validation", nothing)
    array = real_array("results", result)
    if array.ndim == 2 and array.shape[1] == 2 and len(array):
        return array[:, 0], array[:, 1], nothing, nothing
    if array.ndim != 1 or not array.size:
        raise ValueError(
            f"results: expected the result of a training, or values of shape (iterations,) or (iterations, 2), got shape "
            f"{array.shape}"
        )
    return np.arange(array.size), array, nothing, nothing


def spectrum(found: Any, *, weight: float | None = None, sample: int = 0, ax: Axes | None = None) -> Axes:
    """Draw eigenvalues or singular values. Not collective.

    Real ones that fall are drawn over their number, on a logarithmic axis where they are positive; complex ones in the plane;
    those of a linearisation frozen at layer times over t.

    Parameters
    ----------
    found
        What `hessian_spectrum`, `singular_system`, `eigen_expansion` or `frozen_spectra` returned; or a basis that has
        eigenvalues; or numbers, real or complex, shape (values,).
    weight
        lambda of Tikhonov's functional: eigenvalues of a Hessian above this line are of directions that the data determine.
    sample
        Of frozen spectra, the number of the trajectory.
    ax
        Where to draw; new axes if left out.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> from fem_resnet import plot
    >>> plot.spectrum([1.0, 0.1, 0.001]).get_yscale(), plot.spectrum([1j, -1j]).get_xlabel()
    ('log', 'real part')
    """
    ax = given_or_new(ax)
    weight = None if weight is None else number("weight", weight, above=0)
    sample = integer("sample", sample, least=0)
    if isinstance(found, FrozenSpectra):
        found.plot(ax, sample)
        return ax
    values, what = _values(found)
    if np.iscomplexobj(values):
        ax.plot(values.real, values.imag, "o", color=LINES[0], markersize=4)
        ax.axvline(0.0, color="0.6", linewidth=0.8)
        ax.axhline(0.0, color="0.6", linewidth=0.8)
        ax.set(xlabel="real part", ylabel="imaginary part", aspect="equal", title=what)
        ax.set_adjustable("datalim")
        return ax
    ax.plot(np.arange(1, len(values) + 1), values, "o-", color=LINES[0], markersize=4, linewidth=0.8)
    ax.set(xlabel="number", ylabel=what, yscale="log" if (values > 0).all() else "linear")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if weight is not None:
        above = int(np.count_nonzero(values > weight))
        ax.axhline(
            weight, color=LINES[1], linestyle="--", label=rf"$\lambda$ = {weight:g}; above it: {above} of {len(values)}"
        )
        ax.legend(fontsize="small", loc="lower left")
    return ax


def _values(found: Any) -> tuple[np.ndarray, str]:
    """Numbers, and what they are."""
    if isinstance(found, Spectrum):
        return found.values, r"eigenvalue $\mu$ of the Hessian"
    if isinstance(found, SingularSystem):
        return found.values, r"singular value $\mu$ of B"
    if isinstance(found, EigenExpansion):
        return found.eigenvalues, r"eigenvalues $\omega$ of B"
    if isinstance(found, Basis):
        if found.one.eigenvalues is None:
            raise ValueError(f"found: expected a basis of eigenfunctions, got {found!r}, which has no eigenvalues")
        values = found.one.eigenvalues
        return np.where(np.abs(values) > 1e-9 * np.abs(values).max(), values, 0.0), r"eigenvalue $\lambda$ of $-\Delta$"
    try:
        is_complex = np.iscomplexobj(np.asarray(found))
    except Exception as error:  # whatever an object says that is no array
        raise ValueError(f"found: expected a spectrum, or numbers, got {type(found).__name__}") from error
    if not is_complex:
        return real_array("found", found, ("values",)), "value"
    values = np.asarray(found)
    if isinstance(found, np.ma.MaskedArray) or values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"found: expected finite numbers of shape (values,), got shape {values.shape}")
    return values, ""


def confusion(
    truth: Sequence[int] | Sequence[str] | np.ndarray,
    predicted: Sequence[int] | Sequence[str] | np.ndarray,
    names: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draw how many samples of each class a classifier takes for each. Not collective.

    Parameters
    ----------
    truth, predicted
        Classes from 0, shape (samples,): ``head.scores(net(inputs)).argmax(1)`` predicts them. Or their names, as of a
        classifier whose labels are strings.
    names
        What the classes are called, shape (classes,); their numbers if left out. Not where they are given by their names.
    ax
        Where to draw; new axes if left out.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> from fem_resnet import plot
    >>> ax = plot.confusion([0, 0, 1, 1, 1], [0, 1, 1, 1, 1], names=("cat", "dog"))
    >>> [text.get_text() for text in ax.texts], ax.get_title()
    (['1', '1', '', '3'], '4 of 5 right')
    >>> plot.confusion(["cat", "dog"], ["dog", "dog"]).get_title()
    '1 of 2 right'
    """
    ax = given_or_new(ax)
    if names is None and all(np.asarray(each).dtype.kind == "U" and np.ndim(each) == 1 for each in (truth, predicted)):
        called, numbers = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
        truth, predicted, names = numbers[: len(truth)], numbers[len(truth) :], called.tolist()
    truth = integer_array("truth", truth, ("samples",))
    predicted = integer_array("predicted", predicted, truth.shape)
    for name, given in (("truth", truth), ("predicted", predicted)):
        if given.min() < 0:
            raise ValueError(f"{name}: expected classes from 0, got {given.min()}")
    classes = int(max(truth.max(), predicted.max())) + 1
    if names is not None:
        names = [instance("names", name, str) for name in instance("names", names, (list, tuple), "one a class")]
        if len(names) < classes:
            raise ValueError(f"names: expected {classes}, one a class, got {len(names)}")
        classes = len(names)
    if classes > _MANY_CLASSES:
        raise ValueError(f"truth: expected classes below {_MANY_CLASSES}, as many as a picture can show, got {classes - 1}")
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (truth, predicted), 1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    picture = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, place), count in np.ndenumerate(counts):
        colour = "white" if share[row, place] > 0.5 else "black"
        ax.text(place, row, str(count or ""), ha="center", va="center", color=colour, fontsize="small")
    labels = names or [str(k) for k in range(classes)]
    ax.set_xticks(range(classes), labels, rotation=90 if names and max(map(len, labels)) > 3 else 0)
    ax.set_yticks(range(classes), labels)
    right = int(np.trace(counts))
    ax.set(xlabel="predicted", ylabel="true", title=f"{right} of {truth.size} right")
    ax.figure.colorbar(picture, ax=ax, label="share of the true class", shrink=0.9)
    return ax


#: More than a picture can show.
_MANY_CLASSES = 200
