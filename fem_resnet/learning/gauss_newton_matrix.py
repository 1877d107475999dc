"""The matrix of Gauss and Newton, assembled from rows of the Jacobian, for outputs that are fitted by least squares.

With O_s the output of a head of prediction "identity", coordinates of all that is learned (`parameters.coordinates`), and R
quadratic,

    J = sum_s omega_s 1/2 |O_s - C_s|^2 + R,        H = sum_s omega_s O_s'^T M O_s' + R''.

Take functions e_j = X R_X^-1 q_j that are orthonormal in the label measure of the output, with orthonormal columns q_j. The
rows `sqrt(omega_s) (e_j, O_s')` for all s and a complete set of j give H - R'' as a sum of squares. A subset of n of N
samples, and m of r directions for each of them, drawn at random without repetition, give it in the mean, if rows are
multiplied by sqrt(N / n) sqrt(r / m).

Where W and mu of the head are eliminated (`elimination`), what is left of H for the others is

    H_tt - H_tw H_ww^-1 H_wt = sum_j A_j^T (1 - G (G^T G + ridge)^-1 G^T) A_j,

with A_j the rows of all samples in the direction e_j, and G what the head reads of them, (g_s, 1). So W and mu take no room in
H. Samples share directions here. Of a subset of samples the head fits too much, by about its unknowns over their number. A
head that keeps symmetries has few unknowns, which several directions share: they are first assembled with the others, and then
H_ww is taken out of H.

All rows are adjoints: pairs of a sample and a direction are the samples of one batch, and a segment gives the functionals of
each apart (`layers.sample_functionals`). What is at the nodes is neither kept nor multiplied by the number of parameters, so
the rows cost as much as gradients of as many samples, and H the product of their matrix with its transpose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import firedrake as fd
import numpy as np
import scipy.linalg
import scipy.sparse
from petsc4py import PETSc
from pyadjoint.tape import stop_annotating

from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.layers.sample_functionals import outer_products
from fem_resnet.learning.elimination import ROUND_OFF, check_least_squares, ridge
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.learning.row_starts import RowStarts
from fem_resnet.network.segment import Segment
from fem_resnet.parameters.coordinates import Coordinates
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import read_all
from fem_resnet.parameters.subspace import Within
from fem_resnet.tape.kernel_controls import KernelControls
from fem_resnet.tape.operator import made

__all__ = ["LARGEST", "GaussNewtonMatrix", "Rows", "draw_rows"]

#: The largest number of parameters for which the matrix is assembled: it has this number squared of entries.
LARGEST = 5000
#: Samples that share directions, over the number of unknowns that the head has for each direction: at least.
_SAMPLES_AN_UNKNOWN = 4
#: The largest number of rows that make one batch.
_BATCH = 512
#: The largest number of values at the nodes of such a batch, on a rank.
_VALUES = 2**24


@dataclass(frozen=True)
class Rows:
    """Rows of the Jacobian: pairs of a sample and a direction of the output.

    Attributes
    ----------
    samples : numpy.ndarray
        The numbers of the samples, shape (samples,).
    weights : numpy.ndarray
        Those of their squares, shape (samples,).
    functionals : numpy.ndarray
        Of each row the functional in the coefficients of the output, shape (rank of X, directions, samples).
    """

    samples: np.ndarray
    weights: np.ndarray
    functionals: np.ndarray


def draw_rows(problem: LearningProblem, rows: int, directions: int, rng: np.random.Generator, shared: bool = False) -> Rows:
    """Draw pairs of samples and directions, scaled so that their squares give the matrix in the mean. Collective.

    Parameters
    ----------
    problem
        The problem.
    rows
        How many are wanted at least; where there are not so many, all are taken.
    directions
        How many directions a sample has; more where else samples would not be enough.
    rng
        Random numbers, the same on every rank.
    shared
        Whether all samples have the same directions. There are then more samples than unknowns of the head.
    """
    head, batch = problem.head, problem.batch
    omega, rank = sample_weights(batch.weights, batch.samples), head.onto.rank
    all_samples = np.flatnonzero(omega)
    count, least = all_samples.size, _SAMPLES_AN_UNKNOWN * (head.psi.rank + 1) if shared else 1
    each = min(directions, rank)
    chosen = min(count, max(least, -(-rows // each)))
    each = min(rank, max(each, -(-rows // chosen)))
    samples = np.sort(rng.choice(all_samples, chosen, replace=False)) if chosen < count else all_samples
    groups = 1 if shared else chosen
    if each < rank:
        q = np.linalg.qr(rng.normal(size=(groups, rank, each)))[0]
    else:
        q = np.broadcast_to(np.eye(rank), (groups, rank, rank))
    weights = omega[samples] * (count / chosen) * (rank / each)
    functionals = np.ascontiguousarray(np.sqrt(weights) * np.moveaxis(head.onto.root.T @ q, 0, 2))
    problem.net.Y.comm.Bcast(functionals, root=0)  # the same bits on all ranks, also on processors of two kinds
    return Rows(samples, weights, functionals)


class GaussNewtonMatrix:
    """The matrix of Gauss and Newton of a problem, at its present parameters, in coordinates. Collective.

    Parameters
    ----------
    problem
        The problem. It has no features but those that `train_levenberg_marquardt` takes.
    eliminate
        Whether W and mu of the head are eliminated, and the matrix is that of all others.

    Attributes
    ----------
    coordinates : Coordinates
        Of all that is learned, in the order of `LearningProblem.functions`; without W and mu where they are eliminated.

    Raises
    ------
    ValueError
        If J is no sum of squares of outputs of a head, or has too many parameters.
    """

    def __init__(self, problem: LearningProblem, eliminate: bool = False):
        self._problem = problem
        self._head = check_least_squares("problem", problem.head, problem.loss, "train it by `train`")
        self._takes_out = eliminate and self._head.kept is not None
        self._eliminates = eliminate and not self._takes_out
        others = [parameter for parameter in problem.parameters if parameter not in self._head.parameters]
        self._parameters = others if self._eliminates else [*others, *self._head.parameters]
        count = sum(parameter.dim for parameter in self._parameters)
        if count > LARGEST:
            raise ValueError(
                f"problem: expected at most {LARGEST} parameters{' beside W and mu' if eliminate else ''}, whose matrix is "
                f"assembled, got {count}; train(problem, {{'tao_type': 'nls'}}, gauss_newton=True) needs its products alone"
            )
        self._assembled = Coordinates(self._parameters)
        self.coordinates = Coordinates(others) if self._takes_out else self._assembled
        net, psi = problem.net, self._head.psi
        self._seen_by = psi if net.layers and net.steps_what_is_seen_by(psi) else None
        self._starts = RowStarts(problem, psi if self._seen_by or not net.layers else None)
        self._of_W = outer_products((self._head.onto.rank, psi.rank), _elements(self._head.W))
        self._segment: Segment | None = None
        self._batch = 0
        self._constant: np.ndarray | None = None
        self._ridges = np.zeros(2)
        if self._eliminates and problem.regulariser is not None:
            self._ridges = np.array(
                [ridge(problem.regulariser, parameter) for parameter in self._head.parameters], dtype=float
            )

    def draw(self, rows: int, directions: int, rng: np.random.Generator) -> Rows:
        """Rows for `of`: see `draw_rows`.

        Parameters
        ----------
        rows, directions, rng
            As there.
        """
        return draw_rows(self._problem, rows, directions, rng, shared=self._eliminates)

    @PETSc.Log.EventDecorator("fem_resnet:gauss_newton_matrix")
    def of(self, rows: Rows) -> np.ndarray:
        """H from these rows of the Jacobian, and the regulariser's own second derivative, shape (size, size). Collective.

        Parameters
        ----------
        rows
            From `draw`.
        """
        size, comm = self._assembled.size, self._problem.net.Y.comm
        H, fitted, factor = np.zeros((size, size), order="F"), None, 1.0

        def add(sign: float, part: np.ndarray) -> None:
            # Every rank has all rows, and adds up its share of them.
            own = np.array_split(part, comm.size, axis=1)[comm.rank]
            scipy.linalg.blas.dsyrk(sign, own.T, beta=1.0, c=H, trans=1, lower=1, overwrite_c=1)

        with stop_annotating():
            for part, g in self.batches(rows):
                add(1.0, part)
                if self._eliminates:
                    if fitted is None:
                        fitted, factor = self._fitted_by_head(rows, g[:, : rows.samples.size])
                    add(-1.0, (part.reshape(size, -1, rows.samples.size) @ fitted).reshape(size, -1))
        H = self._problem.net.Y.sum(H.T)
        H += np.triu(H, 1).T
        S = self._assembled.matrix
        H = factor * (S.T @ (S.T @ H).T) + self._of_regulariser()
        return self._without_head(H) if self._takes_out else H

    def _without_head(self, H: np.ndarray) -> np.ndarray:
        """`H_tt - H_tw H_ww^-1 H_wt` for the head's own w, which come last."""
        t, w = slice(self.coordinates.size), slice(self.coordinates.size, None)
        sizes, directions = np.linalg.eigh(H[w, w])
        known = sizes > ROUND_OFF * sizes[-1]
        part = (directions[:, known] / np.sqrt(sizes[known])).T @ H[w, t]
        return H[t, t] - part.T @ part

    def _fitted_by_head(self, rows: Rows, g: np.ndarray) -> tuple[np.ndarray, float]:
        """What W and mu fit of the samples' rows in one direction, and a factor for what they leave.

        They take the projection onto orthonormal functions of the samples, shape (samples, number of them), or less of it
        where Tikhonov's rows hold them. A head fits a few samples better than all, hence the factor.
        """
        unknowns, samples = len(g) + 1, rows.samples.size
        root = np.sqrt(np.repeat(self._ridges, (len(g), 1)))[:, None] * scipy.linalg.block_diag(self._head.psi.root, 1.0)
        seen = np.sqrt(rows.weights)[:, None] * np.vstack([g, np.ones(samples)]).T
        left, sizes, _ = scipy.linalg.svd(np.vstack([seen, root]), full_matrices=False)
        all_samples = np.count_nonzero(sample_weights(self._problem.batch.weights, self._problem.batch.samples))
        factor = (1 - unknowns / all_samples) / (1 - unknowns / samples) if unknowns < samples else 1.0
        return left[:samples, sizes > ROUND_OFF * sizes[0]], factor

    def batches(self, rows: Rows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The rows in coefficients, shape (size, rows there), and g(T), shape (rank of psi, rows there), by and by.

        All samples in the first direction come first. Where the head is eliminated a batch has whole directions. Collective.

        Parameters
        ----------
        rows
            As for `of`.
        """
        samples = np.tile(rows.samples, rows.functionals.shape[1])
        functionals = rows.functionals.reshape(len(rows.functionals), -1)
        count, unit = samples.size, rows.samples.size if self._eliminates else 1
        most = max(1, min(_BATCH, _VALUES // self._problem.net.Y.nodes) // unit)
        batch = unit * -(-count // unit // -(-count // unit // most))
        for start in range(0, count, batch):
            chosen = np.arange(start, start + batch)
            inside = np.count_nonzero(chosen < count)
            chosen[inside:] = start  # the last batch is filled up
            part, g = self._rows(samples[chosen], functionals[:, chosen])
            yield part[:, :inside], g[:, :inside]

    def _rows(self, samples: np.ndarray, functionals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows in coefficients, shape (size, rows), and g(T)."""
        head, psi = self._head, self._head.psi
        start, lift = self._starts.at(samples), self._problem.lift
        found: dict[fd.Function, np.ndarray] = {}
        W, _ = head.matrices()
        if self._problem.net.layers:
            segment = self._segment_for(samples.size)
            arrays = [start, *read_all(segment.inputs[1:], segment.functions)]
            end = segment.forward(arrays, True)
            g, by_g = end, W.T @ functionals
            if self._seen_by is None:
                g, by_g = psi.project(end), psi.functional(by_g)
            by_start, *parts = segment.adjoint(arrays, by_g)
            found |= zip(segment.functions, parts)
        else:
            g, by_start = start, W.T @ functionals
        if lift is not None:
            found[lift.V.functions[0]] = self._starts.rows_of_lift(samples, made(by_start))
        if not self._eliminates:
            of_W, *of_mu = head.parameters
            found[of_W.functions[0]] = self._of_W(functionals, g)
            for parameter in of_mu:
                elements = _elements(parameter)
                found[parameter.functions[0]] = functionals if elements is None else elements.T @ functionals
        rows = [found[p.functions[k]] for p, k in self._assembled.sets]
        return np.concatenate([np.empty((0, samples.size)), *rows]), g

    def _segment_for(self, samples: int) -> Segment:
        if self._segment is None or self._batch != samples:
            net = self._problem.net
            self._segment = net.sample_segment(net.Y.batch_space(samples), seen_by=self._seen_by)
            self._batch = samples
        return self._segment

    def _of_regulariser(self) -> np.ndarray | float:
        """The regulariser's second derivative in coordinates, without the curvature of a kernel's map from its controls."""
        regulariser, parameters = self._problem.regulariser, self._parameters
        if regulariser is None:
            return 0.0
        if self._constant is not None:
            return self._constant
        H, changes, place = np.zeros((self._assembled.size,) * 2), False, 0
        with stop_annotating():
            for parameter in parameters:
                count = len(parameter.functions)
                places = self._assembled.places[place : place + count]
                place += count
                if not parameter.penalised or not places:
                    continue
                part = slice(places[0].start, places[-1].stop)
                controls = parameter if isinstance(parameter, KernelControls) else None
                linear = controls is None or controls.linear
                changes |= not linear
                acting = parameter.acting()
                weight = ridge(regulariser, acting) if linear else None
                if weight is not None:
                    H[part, part] = np.diag(weight * self._assembled.units[part])
                else:
                    S = self._assembled.matrix[part, part]
                    to_acting = S if controls is None else scipy.sparse.csr_array(controls.derivative() @ S)
                    H[part, part] = _quadratic(regulariser, acting, to_acting)
        if not changes:
            self._constant = H
        return H


def _elements(parameter: Parameter) -> scipy.sparse.csr_array | None:
    """The elements of the subspace that a parameter of the head is in; None for the whole space."""
    basis = parameter.space_basis
    return basis.elements if isinstance(basis, Within) else None


def _quadratic(regulariser, parameter: Parameter, columns: scipy.sparse.csr_array) -> np.ndarray:
    """`E^T A E` for the form A of a regulariser in the coefficients of one parameter, and E of these columns."""
    shapes = [basis.shape for basis in parameter.space_bases]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    images = []
    for column in columns.toarray().T:
        coefficients = [part.reshape(shape) for part, shape in zip(np.split(column, ends), shapes)]
        images.append(np.concatenate([np.ravel(d) for d in regulariser.functionals(parameter, coefficients)]))
    return columns.T @ np.column_stack(images)
