"""Picard's iteration, the proof of Theorem 3.1, as an algorithm that measures its own rate.

Under Assumption 1 the iteration f^0 = f_I, f^(n+1) = f_I + int sigma(a - B f^n) ds satisfies in Q = C([0, T]; L2(Y))

    |f^(n+1) - f^n| <= C_2(T)^n / n! |f^1 - f^0|,

and so converges for every C_2(T). The paper has the bound C_2(T)^n, and therefore cuts (0, T) into pieces with C_2(T) < 1. On
such a piece |f^n| <= (|f_I| + C_0 T + C_1) / (1 - C_2). `well_posedness` has these constants, also for the gradient
flow, whose iteration is f^(n+1) = f_I + int B^T sigma(a - B f^n) ds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod

import firedrake as fd
import numpy as np
from numpy.polynomial import Legendre, Polynomial
from scipy.special import factorial

from fem_resnet.arguments import flag, integer, number
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.layers.inputs import LayerInputs
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.theory.sensitivity.well_posedness import LayerNorms, Rates, drift_constant, lipschitz_constant

__all__ = ["Picard", "PicardPiece", "picard"]

#: On each substep of the iteration C_2 is at most about this; on each Gauss's rule has this number of points.
_SUBSTEP = 0.0625
_POINTS = 4


@dataclass(frozen=True)
class PicardPiece:
    """Picard's iteration on one piece of (0, T). All norms are in the unit of f.

    Attributes
    ----------
    start, end : float
        The ends of the piece, in the unit of t.
    C_0, C_1, C_2 : float
        The constants of the piece. C_0 contains the length of the piece: it is |sigma(0)| |Y|^(1/2) times the length, or for
        a gradient flow times int |b| dt.
    increments : numpy.ndarray
        |f^(n+1) - f^n| in Q for n = 0, 1, .., shape (iterations, samples).
    initial, largest : numpy.ndarray
        |f| at the start of the piece, and the largest |f^n| in Q over all n, shape (samples,) each.
    """

    start: float
    end: float
    C_0: float
    C_1: float
    C_2: float
    increments: np.ndarray
    initial: np.ndarray
    largest: np.ndarray

    @cached_property
    def bounds(self) -> np.ndarray:
        """The bounds C_2^n / n! |f^1 - f^0| of the increments, shape (iterations, samples)."""
        n = np.arange(len(self.increments))
        return (self.C_2**n / factorial(n))[:, None] * self.increments[0]

    @property
    def rates(self) -> np.ndarray:
        """|f^(n+1) - f^n| / |f^n - f^(n-1)| for n = 1, 2, .., shape (iterations - 1, samples); roughly C_2 / n."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.increments[1:] / self.increments[:-1]

    @property
    def uniform_bound(self) -> np.ndarray:
        """The bound (|f_I| + C_0 T + C_1) / (1 - C_2) of the proof, shape (samples,); infinite if C_2 >= 1."""
        if self.C_2 >= 1:
            return np.full(self.initial.shape, np.inf)
        return (self.initial + self.C_0 + self.C_1) / (1 - self.C_2)


@dataclass(frozen=True)
class Picard:
    """The solution by Picard's iteration. Get one from `picard`.

    Attributes
    ----------
    final : Function
        f(T).
    pieces : list of PicardPiece
        The iteration on each piece of (0, T).
    converged : bool
        Whether the iteration met its tolerance on all pieces.
    """

    final: fd.Function
    pieces: list[PicardPiece]
    converged: bool


@dataclass(frozen=True)
class _Substep:
    """A part of a layer from one fraction of its time to another, with its C_0, C_1 and C_2."""

    layer: LayerInputs
    start: float
    end: float
    C_0: float
    C_1: float
    C_2: float

    @property
    def length(self) -> float:
        return (self.end - self.start) * self.layer.length

    def time(self, fraction: float) -> float:
        return self.layer.start + fraction * self.layer.length


@supports("channels", "no_layers", *HELD, *STEPPED, "gradient_flow")
def picard(
    net: ResidualNetwork,
    initial: fd.Function,
    *,
    split: bool = True,
    tolerance: float = 1e-12,
    max_iterations: int = 100,
) -> Picard:
    """Solve (2.8), or a gradient flow, by the iteration in the proof of Theorem 3.1, and measure its rate of convergence.

    Integrals in t are computed by Gauss's rule with 4 points on substeps with C_2 of about 1/16; up to the points in between
    the interpolant is integrated. So the limit is Gauss's method of order 8. Of an iterate the coefficients (psi, f^n) at
    these times are kept. About thirty fields of shape (nodes, samples) exist at a time, for a piece of any length. The steps
    of the network do not matter. Collective over the ranks of the label domain.

    Parameters
    ----------
    net
        The network, at its present coefficients.
    initial
        f_I, a Function of `Y.V` or a batch.
    split
        Whether (0, T) is cut into pieces with C_2 < 1, as in the proof; otherwise the iteration runs on all of (0, T).
    tolerance
        The iteration ends when |f^(n+1) - f^n| is at most this part of max(|f_I|, |f^1 - f^0|); no unit.
    max_iterations
        The largest number of iterations on a piece.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or sigma is not Lipschitz.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 1)
    >>> net = ResidualNetwork(phi, layers=1, activation="identity")
    >>> net.kernel.set(0, np.array([[-2.0]]))
    >>> solution = picard(net, phi.function([1.0]), split=False)
    >>> round(net.Y.norm(solution.final), 9), solution.pieces[0].increments[:4, 0].round(6).tolist()
    (7.389056099, [2.0, 2.0, 1.333333, 0.666667])
    """
    tolerance, max_iterations = number("tolerance", tolerance, least=0), integer("max_iterations", max_iterations)
    split = flag("split", split)
    Y = net.Y
    Y.check_batch(initial, "initial")
    substeps = _substeps(net)
    pieces, f, converged = [], np.array(Y.values(initial)), True
    for part in _pieces(substeps, split):
        f, piece, done = _iterate(net, part, f, tolerance, max_iterations)
        pieces.append(piece)
        converged &= done
    return Picard(Y.like(initial, f), pieces, converged)


def _substeps(net: ResidualNetwork) -> list[_Substep]:
    lipschitz, rates, found = lipschitz_constant(net), Rates.of(net), []
    of = [(drift_constant(net), rates.drift), (lipschitz, rates.C_1), (lipschitz, rates.C_2)]
    for layer in net.layer_inputs():
        norms = LayerNorms(net.Y, layer)
        count = max(1, int(np.ceil(lipschitz * norms.integral(rates.C_2) / _SUBSTEP)))
        for part in pairwise(np.linspace(0.0, 1.0, count + 1)):
            found.append(_Substep(layer, *part, *(factor * norms.integral(rate, *part) for factor, rate in of)))
    return found


def _pieces(substeps: list[_Substep], split: bool) -> list[list[_Substep]]:
    """Pieces of consecutive substeps, each as long as C_2 < 1 permits; one piece if they are not to be split."""
    pieces: list[list[_Substep]] = []
    total = np.inf
    for substep in substeps:
        total += substep.C_2
        if not pieces or (split and total >= 1):
            pieces.append([])
            total = substep.C_2
        pieces[-1].append(substep)
    return pieces


def _gauss() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gauss's points c in [0, 1], A_ij = int_0^c_i of Lagrange's polynomial j, and b_j = int_0^1."""
    c = (np.sort(np.real(Legendre.basis(_POINTS).roots())) + 1) / 2
    primitives = []
    for j in range(_POINTS):
        lagrange = Polynomial.fromroots(np.delete(c, j))
        primitives.append((lagrange / lagrange(c[j])).integ())
    return c, np.array([[p(x) for p in primitives] for x in c]), np.array([p(1.0) for p in primitives])


_C, _A, _B = _gauss()


def _rates(net: ResidualNetwork, substep: _Substep, iterates: list[np.ndarray]) -> list[np.ndarray]:
    """The right-hand side at Gauss's points for some iterates (psi, f), shape (nodes, points, samples) each.

    One product with Phi serves all of them, so that Phi is read once. A gradient flow needs another product and a sum over
    the ranks.
    """
    layer, fractions = substep.layer, substep.start + (substep.end - substep.start) * _C
    C = np.hstack([layer.beta.coefficients(s) @ part for g in iterates for s, part in zip(fractions, g)])
    Bf = (layer.factors.phi.values @ C).reshape(net.Y.nodes, len(iterates), _POINTS, -1)
    a = np.column_stack([layer.bias.coefficients(s) for s in fractions])
    found = [net.activation(a[:, :, None] - Bf[:, k]) for k in range(len(iterates))]
    if net.gradient_flow:
        phi, psi = layer.factors.phi, layer.factors.psi
        seen = phi.project(np.stack(found, axis=1).reshape(net.Y.nodes, -1)).reshape(phi.rank, len(found), _POINTS, -1)
        turned = np.stack(
            [np.einsum("ij,iks->jks", layer.beta.coefficients(s), seen[:, :, p]) for p, s in enumerate(fractions)], 2
        )
        moved = (psi.values @ turned.reshape(psi.rank, -1)).reshape(net.Y.nodes, len(found), _POINTS, -1)
        found = [moved[:, k] for k in range(len(found))]
    return found


def _apply(
    net: ResidualNetwork,
    substeps: list[_Substep],
    start: np.ndarray,
    g: list[np.ndarray],
    before: list[np.ndarray] | None,
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """One iteration: (psi, f^(n+1)) at all points, f^(n+1) at the end, |f^(n+1) - f^n| and |f^(n+1)| in Q.

    `g` holds (psi, f^n) and `before` holds (psi, f^(n-1)); it is None in the first iteration, where f^0 = f_I. There is one
    Allreduce, and for a gradient flow another one in each substep.
    """
    Y, samples = net.Y, start.shape[1]
    f, change = start, np.zeros_like(start)
    shapes: list[tuple[int, ...]] = []
    local: list[np.ndarray] = []
    for k, substep in enumerate(substeps):
        h, psi = substep.length, substep.layer.factors.psi
        now, *earlier = _rates(net, substep, [g[k]] if before is None else [g[k], before[k]])
        difference = now - earlier[0] if earlier else now
        inside = f[:, None] + h * _weighted(_A, now)
        moved = change[:, None] + h * _weighted(np.vstack([_A, _B]), difference)
        f, change = f + h * _weighted(_B[None], now)[:, 0], moved[:, -1]
        projected = psi.values.T @ (Y.weights[:, None] * inside.reshape(Y.nodes, _POINTS * samples))
        squares = np.einsum("n,nps->ps", Y.weights, np.concatenate([moved, inside, f[:, None]], axis=1) ** 2)
        projected = np.moveaxis(projected.reshape(psi.rank, _POINTS, samples), 1, 0)
        shapes.append(projected.shape)
        local += [projected.ravel(), squares.ravel()]
    summed, position, new, sizes = Y.sum(np.concatenate(local)), 0, [], []
    for shape in shapes:
        new.append(summed[position : position + prod(shape)].reshape(shape))
        position += prod(shape)
        sizes.append(summed[position : position + (2 * _POINTS + 2) * samples].reshape(-1, samples))
        position += sizes[-1].size
    largest = np.sqrt(np.array(sizes)).max(axis=0)
    return new, f, largest[: _POINTS + 1].max(axis=0), largest[_POINTS + 1 :].max(axis=0)


def _weighted(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Weighted sums over the points, shape (nodes, sums, samples), with weights of shape (sums, points)."""
    return np.einsum("ij,njs->nis", weights, values)


def _iterate(
    net: ResidualNetwork, substeps: list[_Substep], start: np.ndarray, tolerance: float, max_iterations: int
) -> tuple[np.ndarray, PicardPiece, bool]:
    """Picard's iteration on a piece: f at its end, the record of the iteration, and whether it converged."""
    Y = net.Y
    initial = np.sqrt(Y.sum(Y.weights @ start**2))
    seen = {psi: psi.project(start) for psi in dict.fromkeys(substep.layer.factors.psi for substep in substeps)}
    g = [np.array([seen[substep.layer.factors.psi]] * _POINTS) for substep in substeps]
    before, end, largest, done = None, start, initial, False
    increments: list[np.ndarray] = []
    while not done and len(increments) < max_iterations:
        new, end, increment, size = _apply(net, substeps, start, g, before)
        before, g = g, new
        increments.append(increment)
        largest = np.maximum(largest, size)
        done = bool(np.all(increment <= tolerance * np.maximum(initial, increments[0])))
    piece = PicardPiece(
        substeps[0].time(substeps[0].start),
        substeps[-1].time(substeps[-1].end),
        sum(substep.C_0 for substep in substeps),
        sum(substep.C_1 for substep in substeps),
        sum(substep.C_2 for substep in substeps),
        np.array(increments),
        initial,
        largest,
    )
    return end, piece, done
