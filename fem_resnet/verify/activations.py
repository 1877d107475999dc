"""Sigma, its derivatives and its primitive over the whole range; stages of every shape, in C and in NumPy.

Exact values come from SymPy with as many digits as they take. Stages are made without a mesh: of a label space, a stage uses
the nodes, their weights and sums over ranks. Each path of `stage.c` is taken for some shape: few samples or many, whole
tiles and parts of tiles, node blocks that are full or not, bases with more functions than a slab has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import sympy
from mpi4py import MPI
from numpy.typing import ArrayLike
from scipy.integrate import quad

from fem_resnet.activation.activation import Activation
from fem_resnet.layers.compiled_stage import CompiledStage, new_stage
from fem_resnet.layers.stage import Argument, Stage, StageFunctional, StageValue
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.verify.differences import extrapolated
from fem_resnet.verify.formulas import NotWrittenOut, sigma
from fem_resnet.verify.measure import relative
from fem_resnet.verify.report import Check, Checks

__all__ = ["activation", "compiled_stages"]

_S = sympy.Symbol("s", real=True)
_LEAK = sympy.Rational(1, 10)
#: Value and slope, left of 0, and right of it if the formulas differ there. No digits cancel in the formulas of slopes.
_EXACT = {
    "tanh": [(sympy.tanh(_S), 1 / sympy.cosh(_S) ** 2)],
    "arctan": [(sympy.atan(_S), 1 / (1 + _S**2))],
    "sigmoid": [(1 / (1 + sympy.exp(-_S)), 1 / (4 * sympy.cosh(_S / 2) ** 2))],
    "softplus": [  # log(1 + x) = 2 artanh(x / (2 + x)) keeps its digits
        (start + 2 * sympy.atanh(sympy.exp(sign * _S) / (2 + sympy.exp(sign * _S))), 1 / (1 + sympy.exp(-_S)))
        for start, sign in ((0, 1), (_S, -1))
    ],
    "relu": [(0 * _S, 0 * _S), (_S, sympy.Integer(1))],
    "leaky_relu": [(_LEAK * _S, _LEAK), (_S, sympy.Integer(1))],
    "identity": [(_S, sympy.Integer(1))],
}
#: Distances from 0: in both tails, next to 0, and between, where compiled code changes from one formula to another.
_SIZES = (
    0.0,
    1e-300,
    1e-9,
    1e-4,
    0.03,
    0.3,
    0.9,
    1.1,
    2.7,
    4.3,
    7.7,
    12.5,
    18.6,
    19.5,
    21.0,
    33.0,
    47.0,
    110.0,
    340.0,
    360.0,
    650.0,
    720.0,
    1e3,
    9e3,
)
PROBES = tuple(sorted({sign * size for size in _SIZES for sign in (-1.0, 1.0)}))


@lru_cache(maxsize=64)
def _exact(name: str, parameters: tuple, expression: sympy.Expr | None) -> np.ndarray | None:
    """Values of sigma, sigma' and sigma'' at `PROBES`, shape (3, probes), at 0 from the left; None without a formula."""
    if expression is not None:
        formula = expression.subs(dict.fromkeys(sorted(expression.free_symbols, key=str), _S))
        pieces = [(formula, sympy.diff(formula, _S))]
    elif name == "elu":
        alpha = sympy.Rational(dict(parameters)["alpha"])
        pieces = [(alpha * (sympy.exp(_S) - 1), alpha * sympy.exp(_S)), (_S, sympy.Integer(1))]
    elif name in _EXACT:
        pieces = _EXACT[name]
    else:
        return None
    values = np.empty((3, len(PROBES)))
    for n, s in enumerate(PROBES):
        value, slope = pieces[-1 if s > 0 else 0]
        for order, formula in enumerate((value, slope, sympy.diff(slope, _S))):
            found = formula.subs(_S, sympy.Rational(s)).evalf(20, maxn=4000)
            values[order, n] = float(found) if found.is_real else np.nan
    return values


def activation(problem: LearningProblem) -> Checks:
    """Compare sigma with another formula, its derivatives with differences, its primitive with quadrature; both tails too."""
    given = problem.net.activation
    s = np.linspace(-60.3, 60.5, 4001)
    s = s[np.all([np.abs(s - joint) > 0.05 for joint in given.joints] or [s == s], axis=0)]
    try:
        formula = sigma(given)
        yield Check.of("activation", "sigma", relative(given(s), formula(s)), 1e-12)
    except NotWrittenOut as error:
        yield Check.left_out("activation", "sigma", str(error))
    yield Check.of("activation", "sigma in place", relative(given(s.copy(), out=s.copy()), given(s)), 0.0)
    steps = 0.04 * 0.5 ** np.arange(6)
    for name, function, derivative in (
        ("sigma'", given, given.derivative),
        ("sigma''", given.derivative, given.second_derivative),
    ):

        def central(e: float, F: Callable[[np.ndarray], np.ndarray] = function) -> np.ndarray:
            return (F(s + e) - F(s - e)) / (2 * e)

        limit, gap = extrapolated(central, steps, 1.0)
        size = max(np.abs(limit).max(), 1.0)
        yield Check.of("activation", name, np.abs(limit - derivative(s)).max() / size, 1e-8 + min(10 * gap / size, 1e-3))
    points = np.array([-40.0, -23.0, *np.linspace(-3.7, 3.9, 7), 17.0, 45.0])
    integrals = [
        quad(
            lambda x: float(given(np.array(x))),
            0.0,
            end,
            points=[j for j in given.joints if 0 < j < end or end < j < 0] or None,
            limit=200,
        )[0]
        for end in points
    ]
    yield Check.of(
        "activation",
        "primitive",
        np.max(np.abs(given.primitive(points) - integrals) / np.maximum(np.abs(integrals), 1.0)),
        1e-9,
    )
    yield from _digits(given)


def _digits(given: Activation) -> Checks:
    """Compare sigma, sigma' and sigma'' with exact values, also in both tails."""
    exact = _exact(given.name, given.parameters, given.expression)
    if exact is None:
        yield Check.left_out("activation", "digits", f"{given.name!r} has no formula")
        return
    orders: tuple[Callable[[np.ndarray], np.ndarray], ...] = given, given.derivative, given.second_derivative
    for name, function, right in zip(("sigma", "sigma'", "sigma''"), orders, exact):
        yield Check.of("activation", f"{name} at both tails", _to_digits(given, function(np.array(PROBES)), right), 1e-12)


def _to_digits(given: Activation, values: np.ndarray, exact: np.ndarray) -> float:
    """The largest error at `PROBES`, relative to the value; for built-in activations also of the smallest values."""
    probes, tiny = np.array(PROBES), np.finfo(float).tiny
    known = np.isfinite(exact)
    for joint in given.joints:
        if given.expression is not None:  # a probe next to its joint may be on either side
            known &= np.abs(probes - joint) > 1e-6
    least = tiny * max([1.0, *(value for _, value in given.parameters)]) if given.expression is None else 1.0
    error = np.abs(values - exact) / np.maximum(np.abs(exact), least)
    return float(np.where(known, error, 0.0).max())


# -- compiled stages -------------------------------------------------------------------------------------------------


class _Points:
    """Nodes on this rank alone, in the place of a label space."""

    comm = MPI.COMM_SELF

    def __init__(self, nodes: int):
        self.nodes = nodes
        self.weights = 0.5 + np.random.default_rng(nodes).random(nodes)

    def sum(self, x: ArrayLike) -> np.ndarray:
        return np.asarray(x, dtype=float)


class _Functions:
    """Random functions, in the place of a basis."""

    def __init__(self, Y: _Points, rank: int, seed: int):
        self.values = np.asfortranarray(np.random.default_rng([seed, rank]).normal(size=(Y.nodes, rank)) / rank**0.5)
        self.weighted, self.rank = self.values * Y.weights[:, None], rank


class _Factors:
    """Two bases, in the place of a kernel."""

    def __init__(self, phi: _Functions, psi: _Functions):
        self.phi, self.psi = phi, psi


def _points(nodes: int) -> Any:
    """Typed Any: a stage expects a LabelSpace, and uses nothing of it that `_Points` lacks."""
    return _Points(nodes)


def _factors(phi: _Functions, psi: _Functions) -> Any:
    """Typed Any: a stage expects a LowRankKernel, and uses nothing of it that `_Factors` lacks."""
    return _Factors(phi, psi)


#: Samples, nodes, rank of phi, rank of psi (0 for phi itself). Whether vectors have 2, 4, 8 or 16 numbers, there are few
#: samples and many among these, and chunks that end with every number of vectors. After whole node blocks of 64 and tiles of
#: 4, 0 to 3 nodes are left; after tiles of 4 and 8 functions and a slab of 64, 0 to 3 functions are left.
_SHAPES = (
    (1, 61, 5, 9), (1, 128, 9, 5), (2, 64, 6, 11), (2, 67, 11, 6), (3, 66, 5, 7), (3, 130, 7, 0),
    (7, 65, 6, 5), (7, 129, 4, 9),
    *((samples, nodes, phi, psi) for samples in (13, 20, 35) for nodes, phi, psi in ((65, 5, 6), (66, 6, 7), (67, 7, 5))),
    (5, 63, 6, 6), (17, 63, 5, 5), (4, 61, 66, 70), (33, 131, 70, 66), (35, 64, 68, 0), (71, 66, 4, 0),
)  # fmt: skip


def compiled_stages(problem: LearningProblem) -> Checks:
    """Check values, transpose and quadrature of compiled stages, for every shape and in both tails."""
    net = problem.net
    given, precision = net.activation, net.settings.precision
    if net.solver_parameters["ts_type"] == "discrete_gradient" or not isinstance(
        new_stage(_points(1), given, 1, precision), CompiledStage
    ):
        yield Check.left_out("compiled stage", "all", "stages are not compiled")
        return
    accuracy = 1e-12 if precision == "double" else 1e-5
    for what, make, shapes in (("", new_stage, _SHAPES), (" in NumPy", Stage, _SHAPES[:8])):
        worst: dict[str, float] = {}
        for samples, nodes, *ranks in shapes:
            Y = _points(nodes)
            for name, error in _stage_errors(given, make(Y, given, samples, precision), *ranks):
                worst[name] = max(worst.get(name, 0.0), error)
        for name, error in worst.items():
            yield Check.of("compiled stage", name + what, error, accuracy)
    yield from _stage_at_probes(given, precision)


def _stage_errors(given: Activation, stage: Stage, phi: int, psi: int) -> Iterator[tuple[str, float]]:
    Y: Any = stage.Y
    samples = stage.samples
    nodes, rng = Y.nodes, np.random.default_rng([samples, Y.nodes])
    left = _Functions(Y, phi, 1)
    factors = _factors(left, _Functions(Y, psi, 2) if psi else left)
    P, Q, w = factors.phi.values, factors.psi.values, Y.weights[:, None]
    length = 0.7
    at = Argument(factors, (length,), (rng.normal(size=nodes),), (rng.normal(size=(phi, samples)),))
    u = at.a[0][:, None] - P @ at.C[0]
    s = length * given(u)
    out = np.full((nodes, samples), np.nan)
    yield "rate, its field", relative(stage.rate(at, [out])[0], Q.T @ (w * s)) + relative(out, s)
    yield "rate", relative(stage.rate(at)[0], Q.T @ (w * s))
    x, x_q, adjoint = rng.normal(size=(factors.psi.rank, samples)), rng.normal(size=samples), rng.normal(size=(nodes, samples))
    for name, functional, v in (
        ("transpose", StageFunctional((x,), x_q, (adjoint,)), w * (Q @ x) + x_q * adjoint),
        ("transpose without lambda", StageFunctional((x,), None, ()), w * (Q @ x)),
    ):
        for with_length in (False, True):
            found, slope = stage.transpose(at, functional, with_length), length * given.derivative(u) * v
            error = relative(found.D[0], P.T @ slope) + relative(found.bias, slope.sum(axis=1))
            if with_length:
                error += abs(found.length - np.sum(v * given(u))) / np.sum(np.abs(v * given(u)))
            yield name, error
    other = Argument(factors, (0.3,), (rng.normal(size=nodes),), (rng.normal(size=(phi, samples)),))
    start = adjoint.copy()
    moved = stage.advance([start], [StageValue(0.4, at), StageValue(-1.3, other)])[0]
    expected = adjoint + 0.4 * s - 1.3 * 0.3 * given(other.a[0][:, None] - P @ other.C[0])
    yield "quadrature", relative(moved, expected) + float(not np.array_equal(start, adjoint))


def _stage_at_probes(given: Activation, precision: str) -> Checks:
    """Check sigma and sigma' in C in both tails, next to joints, and for NaN. Here u = a, since C = 0."""
    real, exact = np.dtype(precision), _exact(given.name, given.parameters, given.expression)
    joints = [joint + e for joint in given.joints for e in (-1e-3, 0.0, 1e-3)]
    dense = np.array([*np.linspace(-60.0, 60.0, 1999), *joints])
    least, bound = (np.finfo(real).tiny, 1e-13) if precision == "double" else (1e-30, 2e-6)
    for samples in (1, 13):  # vectors go along nodes, and along samples
        values, slopes = _in_c(given, precision, samples, dense.astype(real).astype(float))
        for name, found, function in (("sigma", values, given), ("sigma'", slopes, given.derivative)):
            right = function(dense.astype(real).astype(float))
            error = np.abs(found - right[:, None]) / np.maximum(np.abs(right[:, None]), max(1e-12, least))
            yield Check.of(
                "compiled stage",
                f"{name}, {samples} samples",
                float(error.max()) if np.isfinite(found).all() else np.inf,
                100 * bound,
            )
        lost = _in_c(given, precision, samples, np.array([0.1, np.nan, 0.2]))[0]
        yield Check.of(
            "compiled stage",
            f"a NaN stays one, {samples} samples",
            float((np.isnan(lost) != [[False], [True], [False]]).any()),
            0.0,
        )
    if exact is None or precision == "single":
        return
    values, slopes = _in_c(given, precision, 1, np.array(PROBES))
    for name, found, right in (("sigma", values, exact[0]), ("sigma'", slopes, exact[1])):
        yield Check.of("compiled stage", f"{name} at both tails", _to_digits(given, found[:, 0], right), 1e-12)


def _in_c(given: Activation, precision: str, samples: int, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and slopes of sigma at points, in C, both of shape (points, samples)."""
    Y = _points(points.size)
    one = _Functions(Y, 1, 0)
    stage, out = new_stage(Y, given, samples, precision), np.empty((points.size, samples))
    at = Argument(_factors(one, one), (1.0,), (points,), (np.zeros((1, samples)),))
    stage.rate(at, [out])
    slopes = []
    for s in range(samples):
        chosen = (np.arange(samples) == s).astype(float)
        slopes.append(
            stage.transpose(at, StageFunctional((np.zeros((1, samples)),), chosen, (np.ones((points.size, samples)),))).bias
        )
    return out, np.array(slopes).T
