"""The local feedback for many inputs at once, where the problem has one sample.

Two facts turn the second derivatives of `local_feedback` into a few columns, on a mesh of any size.

- There are few controls. With controls in bases, J_uu is a small dense matrix, the same on every rank, which is factored
  once by Cholesky. J_vu has one column for each control, which takes one Hessian action.
- Layers and head depend on f_I through psi alone: f(T) = v + D(Psi^T M v). So J_vv is l'', the second derivative of the
  loss in f(T), plus a part of rank at most 2 rank(Psi).

Together

    D^2 F = l'' + X Psi^T M + Psi (M X)^T - J_vu J_uu^-1 J_uv.

Here Psi is an orthonormal basis of the span of psi of all layers and of the head. X follows from one Hessian action for
each function in Psi. With a head, l'' belongs to the second part, and the first part is 0. Nothing is cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import firedrake as fd
import numpy as np
import scipy.linalg
from pyadjoint.tape import stop_annotating

from fem_resnet.features import REGULARISED, STEPPED, supports
from fem_resnet.fixed import OnMesh
from fem_resnet.hjb.local_feedback import NO_MINIMUM, LocalFeedback
from fem_resnet.label_domain.basis import Basis
from fem_resnet.learning.prediction import PREDICTIONS
from fem_resnet.parameters.space_basis import SpaceBasis

__all__ = ["LowRankFeedback"]


@dataclass(frozen=True)
class _Coefficients:
    """All controls as one vector: the coefficients in the order of ``problem.functions``, each array ravelled."""

    bases: list[SpaceBasis]

    def join(self, functions: Sequence[fd.Function | fd.Cofunction]) -> np.ndarray:
        return np.concatenate([basis.read(f).ravel() for basis, f in zip(self.bases, functions)])

    def split(self, vector: np.ndarray) -> list[np.ndarray]:
        """The parts of a vector, or of the first axis of an array, that belong to the bases."""
        sizes = [int(np.prod(basis.shape)) for basis in self.bases]
        return np.split(vector, np.cumsum(sizes)[:-1])

    def functions(self, vector: np.ndarray) -> list[fd.Function]:
        functions = [fd.Function(basis.space) for basis in self.bases]
        for basis, function, part in zip(self.bases, functions, self.split(vector)):
            basis.write(function, part.reshape(basis.shape))
        return functions


class LowRankFeedback(OnMesh):
    """The feedback of a problem with one sample, for many inputs at once, without a run of the network for each.

    To make it takes dim u + rank(Psi) Hessian actions. Everything is collective over the communicator of the network.

    Parameters
    ----------
    feedback
        The local feedback of a problem with one sample, without running cost, whose controls are all in bases.

    Attributes
    ----------
    control_hessian : numpy.ndarray
        J_uu in the coefficients, shape (dim u, dim u), in the order of ``problem.functions``, each array ravelled.
    rank_bound : int
        2 rank(Psi) + dim u.

    Raises
    ------
    TypeError, ValueError
        If this is no local feedback; if the problem has more than one sample, a running cost, or controls with a value at
        every node.
    RuntimeError
        If J_uu is not positive definite.

    Examples
    --------
    >>> many = LowRankFeedback(LocalFeedback(problem))  # doctest: +SKIP
    >>> coefficients = many(net.Y.batch(new_inputs))  # arrays of shape (inputs, ..)  # doctest: +SKIP
    """

    # A running cost depends on f(t) itself, so J_vv has another part, which is not of low rank.
    @supports(
        "channels",
        "no_layers", "gradient_flow", "learned_times", "kernel_set", "bases_by_layer", "linear_in_time", "shared_in_time",
        *STEPPED, "head", *REGULARISED, "weights", instead="use LocalFeedback for one input after the other",
    )  # fmt: skip
    def __init__(self, feedback: LocalFeedback):
        problem, Y = feedback.problem, feedback.Y
        self._feedback, self.Y = feedback, Y
        self._coefficients = _Coefficients([basis for parameter in problem.parameters for basis in parameter.space_bases])
        self._controls = self._coefficients.join(feedback.controls)
        self._v, self._r = Y.values(feedback.inputs).copy(), Y.values(feedback.gradient).copy()
        with stop_annotating():
            #: J_uu, and J_vu at the nodes: one column for each control.
            self.control_hessian, self._mixed = self._derivatives_in_controls()
            self._factor = _cholesky(self.control_hessian)
            #: Psi and M X at the nodes, one column for each function of Psi.
            self._psi = _orthonormal(_seen_bases(feedback))
            self._X = self._part_of_low_rank()

    def _derivatives_in_controls(self) -> tuple[np.ndarray, np.ndarray]:
        size = self._controls.size
        hessian, mixed = np.empty((size, size)), np.empty((self.Y.nodes, size))
        for i, unit in enumerate(np.eye(size)):
            *in_u, in_v = self._feedback.action(self._coefficients.functions(unit), None)
            hessian[i] = self._coefficients.join(in_u)
            mixed[:, i] = self.Y.values(in_v)[:, 0]
        return (hessian + hessian.T) / 2, mixed

    def _part_of_low_rank(self) -> np.ndarray:
        feedback, Y, psi = self._feedback, self.Y, self._psi
        S = -self._of_loss(psi)
        for k in range(psi.shape[1]):
            w = fd.Function(feedback.inputs.function_space())
            Y.write(w, psi[:, k])
            S[:, k] += Y.values(feedback.action(None, w)[-1])[:, 0]
        # For C = X Psi^T M + Psi (M X)^T and orthonormal Psi, S = M C Psi determines M X up to a part that cancels in C.
        symmetric = Y.sum(psi.T @ S)
        return S - 0.5 * Y.weights[:, None] * (psi @ symmetric)

    def _of_loss(self, W: np.ndarray) -> np.ndarray:
        """M l'' w for the columns w of W."""
        problem = self._feedback.problem
        if problem.head is not None:
            return np.zeros_like(W)
        O, C = (
            np.repeat(self.Y.values(batch), W.shape[1], axis=1)
            for batch in (self._feedback.final, self._feedback.batch.targets)
        )
        return problem.loss.hessian(self.Y, O, C, PREDICTIONS[problem.loss.prediction or "identity"], W)

    @property
    def rank_bound(self) -> int:
        """An upper bound of the rank of D^2 F - l''."""
        return 2 * self._psi.shape[1] + self._controls.size

    def __call__(self, inputs: fd.Function) -> list[np.ndarray]:
        """Controls for each input: one array for each of ``problem.functions``, shape (inputs, *coefficients).

        ``parameter.set(k, array[s])`` gives a parameter the coefficients for input s.

        Parameters
        ----------
        inputs
            A batch whose samples are the inputs.
        """
        changes = scipy.linalg.cho_solve(self._factor, self._mixed_in(self._differences(inputs)))
        columns = self._controls[:, None] - changes
        parts = self._coefficients.split(columns)
        return [part.T.reshape(-1, *basis.shape) for part, basis in zip(parts, self._coefficients.bases)]

    def predicted_values(self, inputs: fd.Function) -> np.ndarray:
        """F + (r, w) + 1/2 (w, D^2 F w) for each input v + w, shape (inputs,), in the unit of J."""
        W = self._differences(inputs)
        first = self.Y.weights[:, None] * self._r
        return self._feedback.value + self.Y.sum(np.sum((first + 0.5 * self._second(W)) * W, axis=0))

    def hessian(self, w: fd.Function) -> fd.Function:
        """D^2 F w in the label measure for each sample w of a batch: a new batch."""
        self.Y.check_batch(w, "w")
        return self.Y.batch(self._second(self.Y.values(w)) / self.Y.weights[:, None])

    def eigenvalues(self) -> np.ndarray:
        """The eigenvalues of D^2 F - l'' that may differ from 0, by falling absolute value, shape (rank_bound,)."""
        Y, root = self.Y, np.sqrt(self.Y.weights)[:, None]
        rank, size = self._psi.shape[1], self._controls.size
        _, own = np.linalg.qr(np.hstack([root * self._psi, self._X / root, self._mixed / root]))
        _, R = np.linalg.qr(np.vstack(Y.comm.allgather(own)))
        off, identity = np.zeros((rank, rank)), np.eye(rank)
        inner = scipy.linalg.block_diag(
            np.block([[off, identity], [identity, off]]), -scipy.linalg.cho_solve(self._factor, np.eye(size))
        )
        values = np.linalg.eigvalsh(R @ inner @ R.T)
        values = np.concatenate([values, np.zeros(self.rank_bound - len(values))])
        return values[np.argsort(-np.abs(values))]

    def _second(self, W: np.ndarray) -> np.ndarray:
        """M D^2 F w for the columns w of W."""
        Y = self.Y
        kernel = self._X @ Y.sum(self._psi.T @ (Y.weights[:, None] * W)) + Y.weights[:, None] * (
            self._psi @ Y.sum(self._X.T @ W)
        )
        return self._of_loss(W) + kernel - self._mixed @ scipy.linalg.cho_solve(self._factor, self._mixed_in(W))

    def _mixed_in(self, W: np.ndarray) -> np.ndarray:
        """J_uv w for the columns w of W."""
        return self.Y.sum(self._mixed.T @ W)

    def _differences(self, inputs: fd.Function) -> np.ndarray:
        self.Y.check_batch(inputs, "inputs")
        return self.Y.values(inputs) - self._v


def _cholesky(control_hessian: np.ndarray) -> tuple[np.ndarray, bool]:
    """The Cholesky factor of J_uu.

    Raises
    ------
    RuntimeError
        If J_uu is not positive definite, up to round-off.
    """
    smallest, *_, largest = np.linalg.eigvalsh(control_hessian)
    if not smallest > 1e-13 * largest:
        raise RuntimeError(
            f"LowRankFeedback: the smallest eigenvalue of J_uu in the coefficients is {smallest:.1e}, the largest "
            f"{largest:.1e}; {NO_MINIMUM}"
        )
    return scipy.linalg.cho_factor(control_hessian)


def _seen_bases(feedback: LocalFeedback) -> list[Basis]:
    """The bases psi through which layers and head depend on f_I, each once."""
    head = feedback.problem.head
    seen = [*feedback.problem.net.bases["psi"], *([] if head is None else [head.psi])]
    return list(dict.fromkeys(seen))


def _orthonormal(bases: Sequence[Basis]) -> np.ndarray:
    """Functions of the span of all bases that are orthonormal in the label measure: shape (nodes, functions)."""
    Y = bases[0].Y
    values = np.hstack([basis.values for basis in bases])
    gram = Y.sum(values.T @ (Y.weights[:, None] * values))
    size = np.sqrt(np.diag(gram))
    lengths, turn = np.linalg.eigh(gram / np.outer(size, size))
    kept = lengths > 1e-12 * lengths[-1]
    return (values / size) @ (turn[:, kept] / np.sqrt(lengths[kept]))
