"""What X of an estimator may be, and functions on a label domain of it.

Each kind of X is a small object that pickles: it keeps what was found out about X in `fit`, and makes node values of any other
X of its kind. Rows of node values are one field after the other, as in `Channels`.

=============  ==========================================================  =================================================
kind           X                                                           functions by
=============  ==========================================================  =================================================
`Table`        numbers, shape (samples, features)                          a cell of an interval for each feature
`AtPoints`     values at points, shape (samples, points[, fields])         `Sensors`; NaN is a gap
`OwnPoints`    a list of pairs (points, values), one a sample              `Sensors`; NaN is a gap
`Pictures`     pixels, shape (samples, rows, columns[, fields])            `LabelSpace.image`
`Functions`    a list of Functions, or a batch                             `LabelSpace.batch`
=============  ==========================================================  =================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import firedrake as fd
import numpy as np
from mpi4py import MPI

from fem_resnet.arguments import real_array
from fem_resnet.estimators.domain import MOST_MODES, DomainRecipe
from fem_resnet.label_domain.sensors import SensorFit, Sensors
from fem_resnet.parameters.equivariant import Parity
from fem_resnet.ranks import same

__all__ = [
    "AtPoints",
    "Functions",
    "InputKind",
    "OwnPoints",
    "Pictures",
    "Table",
    "are_functions",
    "are_pairs",
    "kind_of",
    "samples_of",
    "sizes_of",
    "values_at",
]

#: Weights of the squared gradient, times the smallest eigenvalue: `Sensors` gets the one that predicts left-out values best.
_SMOOTHING = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
#: So many samples are enough to choose it. A value that the others do not determine counts as missed by this, in parts of it.
_TRIED, _NOT_AT_ALL = 200, 1e3
#: A picture gets a node a pixel, but no more than so many in a row.
_MOST_NODES = 32


@dataclass(frozen=True)
class InputKind:
    """A kind of X.

    Attributes
    ----------
    fields : int
        How many fields a sample has.
    offset, size : numpy.ndarray
        Values become ``(x - offset) / size``, which have mean 0 and size one: one number a field, shape (fields,).
    """

    fields: int = 1
    offset: np.ndarray | float = 0.0
    size: np.ndarray | float = 1.0

    def recipe(self) -> DomainRecipe | None:
        """The label domain where none is given; None if one must be."""
        return None

    def prepared(self, recipe: DomainRecipe, X: Any, weights: np.ndarray, part: str = "inputs") -> InputKind:
        """The kind, with what the training samples tell of it. Collective.

        Parameters
        ----------
        recipe, X
            The label domain, and the training samples.
        weights
            Of the samples, shape (samples,); their sum is one.
        part
            "inputs", or "output": of which a `Parity` says the sign.
        """
        Y = recipe.label_space()
        kind = self._learned(recipe, X, weights)
        values = kind._raw(recipe, X).reshape(self.fields, Y.nodes, -1)
        means, squares = (Y.sum(np.einsum("n,fns,s->f", Y.weights, part, weights)) / Y.measure for part in (values, values**2))
        signs = [sign for each in recipe.kept_symmetries() if isinstance(each, Parity) for sign in getattr(each, part)]
        offset = means if all(sign == 1 for sign in signs) else np.zeros(self.fields)  # a sign does not keep a mean
        return replace(kind, offset=offset, size=sizes_of(squares - 2 * offset * means + offset**2, squares))

    def values(self, recipe: DomainRecipe, X: Any) -> np.ndarray:
        """Scaled node values, shape (fields * nodes, samples). Collective.

        Parameters
        ----------
        recipe, X
            The label domain, and samples.

        Raises
        ------
        TypeError, ValueError
            If X is not of the kind that it was in `fit`.
        """
        values = self._raw(recipe, X)
        scaled = values.reshape(self.fields, -1, values.shape[1]) - np.reshape(self.offset, (-1, 1, 1))
        return (scaled / np.reshape(self.size, (-1, 1, 1))).reshape(values.shape)

    def _learned(self, recipe: DomainRecipe, X: Any, weights: np.ndarray) -> InputKind:
        """The kind, with all but its scaling. Collective."""
        return self

    def _raw(self, recipe: DomainRecipe, X: Any) -> np.ndarray:
        """Node values. Collective."""
        raise NotImplementedError


def sizes_of(variances: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Roots of variances; one where there is nothing but round-off of the mean squares."""
    return np.where(variances > 1e-12 * squares, np.sqrt(np.maximum(variances, 0)), 1.0)


@dataclass(frozen=True)
class Table(InputKind):
    """A table of numbers: each feature is a cell of an interval, and is scaled by itself."""

    features: int = 1

    def recipe(self) -> DomainRecipe:
        return DomainRecipe(fd.UnitIntervalMesh, self.features, family="DG", degree=0)

    def prepared(self, recipe, X, weights, part="inputs"):
        X = real_array("X", X, ("samples", self.features))
        offset = weights @ X
        return replace(self, offset=offset, size=sizes_of(weights @ (X - offset) ** 2, weights @ X**2))

    def values(self, recipe, X):
        Y = recipe.label_space()
        same(Y.comm, X=X)
        scaled = (real_array("X", X, ("samples", self.features)) - self.offset) / self.size
        return scaled.T[np.minimum((Y.coordinates[:, 0] * self.features).astype(int), self.features - 1)]


@dataclass(frozen=True)
class _Measured(InputKind):
    """Values at points. `smoothing` is lambda of `Sensors.fit`, `modes` the number of functions that they are made of."""

    smoothing: float = 0.0
    modes: int = 1

    def _learned(self, recipe, X, weights):
        modes = recipe.basis(min(MOST_MODES, self._most_points(X))).rank
        kind = replace(self, modes=modes)
        eigenvalues = recipe.basis(modes).eigenvalues
        if modes == 1 or not eigenvalues[-1] > 0:
            return kind
        first = eigenvalues[eigenvalues > 1e-6 * eigenvalues[-1]][0]
        few = np.flatnonzero(weights)[:_TRIED]
        X = X[few] if isinstance(X, np.ndarray) else [X[k] for k in few]
        missed = []
        for fits in kind._fits(recipe, X, [part / first for part in _SMOOTHING]):
            missed.append(np.mean([np.minimum(fit.left_out, _NOT_AT_ALL) for fit in fits], axis=0) @ weights[few])
        return replace(kind, smoothing=_SMOOTHING[int(np.argmin(missed))] / first)

    def _raw(self, recipe, X):
        return np.vstack([recipe.label_space().values(fit.functions) for fit in self._fits(recipe, X, [self.smoothing])[0]])

    def _most_points(self, X) -> int:
        """How many points a sample has at most."""
        raise NotImplementedError

    def _fits(self, recipe, X, smoothings: Sequence[float]) -> list[list[SensorFit]]:
        """Functions of each field, for each weight of the squared gradient. Collective."""
        raise NotImplementedError


@dataclass(frozen=True)
class AtPoints(_Measured):
    """Values at the same points for all samples."""

    points: np.ndarray | None = None

    def recipe(self) -> DomainRecipe | None:
        return _interval([self.points])

    def _most_points(self, X):
        return len(self.points)

    def _fits(self, recipe, X, smoothings):
        values = _with_fields("X", X, ("samples", len(self.points)), self.fields)
        sensors = Sensors(recipe.basis(self.modes), self.points)
        parts = [np.ascontiguousarray(values[:, :, k].T) for k in range(self.fields)]
        return [[sensors.fit(part, lam, gaps=True) for part in parts] for lam in smoothings]


@dataclass(frozen=True)
class OwnPoints(_Measured):
    """Values at points of its own for each sample."""

    #: The ends of an interval that holds all points, where they are numbers.
    ends: tuple[float, float] | None = None

    def recipe(self) -> DomainRecipe | None:
        return None if self.ends is None else DomainRecipe(fd.IntervalMesh, 2 * MOST_MODES, *self.ends)

    def _most_points(self, X):
        return max(len(points) for points, _ in _pairs(X))

    def _fits(self, recipe, X, smoothings):
        pairs = _pairs(X)
        values = [_with_fields("X", v, (len(x),), self.fields) for x, v in pairs]
        sensors = Sensors(recipe.basis(self.modes), [x for x, _ in pairs])
        parts = [[np.ascontiguousarray(v[:, k]) for v in values] for k in range(self.fields)]
        return [[sensors.fit(part, lam, gaps=True) for part in parts] for lam in smoothings]


@dataclass(frozen=True)
class Pictures(InputKind):
    """Pictures, with row 0 on top."""

    shape: tuple[int, int] = (1, 1)
    extent: tuple[float, float, float, float] | None = None

    def recipe(self) -> DomainRecipe:
        """A rectangle of cells between the centres of pixels: a node a pixel, or of larger squares of a finer picture."""
        left, right, bottom, top = self.extent
        n, m = (max(2, min(pixels, _MOST_NODES)) for pixels in self.shape[::-1])
        dx, dy = (right - left) / n / 2, (top - bottom) / m / 2
        return DomainRecipe(
            fd.RectangleMesh, n - 1, m - 1, right - dx, top - dy,
            originX=left + dx, originY=bottom + dy, quadrilateral=True,
        )  # fmt: skip

    def _raw(self, recipe, X):
        Y = recipe.label_space()
        pixels = _with_fields("X", X, ("samples", *self.shape), self.fields)
        finer = np.prod(self.shape) > Y.size
        lies = {"extent": self.extent, "outside": 0.0} if self.extent is not None else {"extent": _bounding_box(Y)}
        batches = [
            Y.image(np.ascontiguousarray(pixels[..., k]), method="mean" if finer else "linear", **lies)
            for k in range(self.fields)
        ]
        return np.vstack([Y.values(batch) for batch in batches])


@dataclass(frozen=True)
class Functions(InputKind):
    """Functions of Firedrake, on the mesh of the label domain or another one of the same domain."""

    def _raw(self, recipe, X):
        Y = recipe.label_space()
        return np.array(Y.values(Y.batch(X if isinstance(X, fd.Function) else list(X), "X")))


def kind_of(X: Any, points: Any, extent: Any, recipe: DomainRecipe | None) -> InputKind:
    """The kind of an X from outside.

    Parameters
    ----------
    X
        The samples.
    points
        Points of all samples, shape (points, dimension) or (points,); None for none.
    extent
        Where the edges of pictures are; None for the bounding box of the label domain.
    recipe
        The label domain; None where none is given.

    Raises
    ------
    TypeError, ValueError
        If X is of no kind, or of one that needs a label domain, or points.
    """
    if points is not None:
        kind: InputKind = values_at("X", X, "points", points)
    elif are_functions(X):
        kind = Functions()
    elif are_pairs(X):
        pairs = _pairs(X)
        numbers = all(x.shape[1] == 1 for x, _ in pairs)
        ends = (min(x.min() for x, _ in pairs), max(x.max() for x, _ in pairs)) if numbers else None
        kind = OwnPoints(pairs[0][1].shape[1] if pairs[0][1].ndim == 2 else 1, ends=ends)
    else:
        X = real_array("X", X)
        if X.ndim == 2 and recipe is not None:
            raise ValueError(
                "points: expected where the values of X are on the label domain, got None; without a domain X is a table"
            )
        if X.ndim not in (2, 3, 4):
            raise ValueError(
                f"X: expected a table of shape (samples, features), or pictures of shape (samples, rows, columns[, fields]), "
                f"got shape {X.shape}. Reshape your data"
            )
        kind = Table(features=X.shape[1])
        if X.ndim > 2:
            (rows, columns), longest = X.shape[1:3], max(X.shape[1:3])
            edges = None if extent is None else tuple(real_array("extent", extent, (4,)).tolist())
            if edges is None and recipe is None:
                edges = 0.0, columns / longest, 0.0, rows / longest
            kind = Pictures(X.shape[3] if X.ndim == 4 else 1, shape=X.shape[1:3], extent=edges)
    if recipe is None and kind.recipe() is None:
        raise ValueError("domain: expected a DomainRecipe for such samples, got None; DomainRecipe(UnitDiskMesh, 3) is one")
    return kind


def values_at(name: str, X: Any, name_of_points: str, points: Any) -> AtPoints:
    """The kind of values at points, both from outside.

    Parameters
    ----------
    name, name_of_points
        What messages call them.
    X, points
        Shape (samples, points) or (samples, points, fields), and shape (points, dimension) or (points,).

    Raises
    ------
    TypeError, ValueError
        If they have other shapes, or do not fit each other.
    """
    at = real_array(name_of_points, points)
    at = at[:, None] if at.ndim == 1 else at
    if at.ndim != 2 or not at.size:
        raise ValueError(f"{name_of_points}: expected shape (points, dimension), got {np.shape(points)}")
    X = real_array(name, X, finite=False)
    if X.ndim not in (2, 3) or X.shape[1] != len(at):
        raise ValueError(
            f"{name}: expected shape (samples, {len(at)}), or (samples, {len(at)}, fields), as there are {len(at)} points, "
            f"got {X.shape}"
        )
    return AtPoints(X.shape[2] if X.ndim == 3 else 1, points=at)


def samples_of(X: Any) -> int:
    """How many samples an X has."""
    if isinstance(X, fd.Function):
        return X.function_space().value_size
    return len(X)


def are_functions(X: Any) -> bool:
    """Whether X is a Function, or a list of them."""
    return isinstance(X, fd.Function) or _is_list(X) and len(X) > 0 and all(isinstance(each, fd.Function) for each in X)


def are_pairs(X: Any) -> bool:
    """Whether X is a list of pairs, of points and values."""
    return _is_list(X) and len(X) > 0 and all(isinstance(each, tuple) and len(each) == 2 for each in X)


def _is_list(X: Any) -> bool:
    return isinstance(X, (list, tuple)) or isinstance(X, np.ndarray) and X.dtype == object and X.ndim == 1


def _pairs(X: Sequence) -> list[tuple[np.ndarray, np.ndarray]]:
    """Points, shape (points, dimension), and values of each sample."""
    if not are_pairs(X):
        raise ValueError("X: expected a list of pairs (points, values), one a sample, as in `fit`, got another kind")
    pairs = []
    for number, (points, values) in enumerate(X):
        x, v = real_array(f"X[{number}][0]", points), real_array(f"X[{number}][1]", values, finite=False)
        x = x[:, None] if x.ndim == 1 else x
        if x.ndim != 2 or not len(x) or v.ndim not in (1, 2) or len(v) != len(x):
            raise ValueError(
                f"X[{number}]: expected points of shape (points, dimension) and a value for each, got {x.shape} and {v.shape}"
            )
        pairs.append((x, v))
    return pairs


def _with_fields(name: str, X: Any, shape: tuple, fields: int) -> np.ndarray:
    """An array of this shape, with a last axis for the fields."""
    X = real_array(name, X, finite=False)
    if X.ndim == len(shape):
        X = X[..., None]
    return real_array(name, X, (*shape, fields), finite=False)


def _interval(points: Sequence[np.ndarray]) -> DomainRecipe | None:
    """An interval that just holds points that are numbers."""
    if any(x.shape[1] != 1 for x in points):
        return None
    low, high = min(x.min() for x in points), max(x.max() for x in points)
    return DomainRecipe(fd.IntervalMesh, 2 * MOST_MODES, low, high) if low < high else None


def _bounding_box(Y) -> tuple[float, float, float, float]:
    """(left, right, bottom, top) of a label domain in the plane. Collective."""
    x = Y.V.mesh().coordinates.dat.data_ro
    if x.ndim != 2 or x.shape[1] != 2:
        return 0.0, 1.0, 0.0, 1.0  # `LabelSpace.image` says that this is no plane
    low = Y.comm.allreduce(x.min(axis=0, initial=np.inf), op=MPI.MIN)
    high = Y.comm.allreduce(x.max(axis=0, initial=-np.inf), op=MPI.MAX)
    return low[0], high[0], low[1], high[1]
