"""The local feedback of a problem with one sample for many inputs at once: D^2 F and J_uv as a few columns.

`local_feedback` has the formulas. Two facts make its second derivatives a few numbers, whatever the mesh. J_uv has at
most as many independent rows as there are controls: with controls in bases J_uu is a small dense matrix, the same on
every rank, factored once (Cholesky), and J_vu its columns, one Hessian action each. And layers and head see f_I
through psi alone, f(T) = v + D(Psi^T M v), so that J_vv is l'', the loss's own second derivative in f(T), and a part
of rank at most 2 rank(Psi):

    D^2 F = l'' + X Psi^T M + Psi (M X)^T - J_vu J_uu^-1 J_uv,

where X follows from one Hessian action a function of Psi (an orthonormal basis of what psi of all layers and the head
span). With a head l'' is in the second part, and 0 here. Nothing is cut off.
"""

from __future__ import annotations

from collections.abc import Sequence

import firedrake as fd
import numpy as np
import scipy.linalg
from pyadjoint.tape import stop_annotating

from fem_resnet.features import STEPPED, supports
from fem_resnet.fixed import OnMesh
from fem_resnet.hjb.local_feedback import NO_MINIMUM, LocalFeedback
from fem_resnet.label_domain.basis import Basis
from fem_resnet.learning.head import PREDICTIONS

__all__ = ["LowRankFeedback"]


class LowRankFeedback(OnMesh):
    """The feedback of a problem with one sample, for many inputs at once: no network is run for them.

    Made by dim u + rank(Psi) Hessian actions; collective, as all that it does.

    Parameters
    ----------
    feedback
        The local feedback, of a problem with one sample, without a running cost, whose controls are all in bases.

    Attributes
    ----------
    control_hessian : numpy.ndarray
        J_uu in the coefficients, shape (dim u, dim u), in the order of ``problem.functions``, each one ravelled.
    rank_bound : int
        2 rank(Psi) + dim u.

    Raises
    ------
    ValueError
        If the problem has more than one sample, a running cost, or controls with a value at every node.
    RuntimeError
        If J_uu is not positive definite.

    Examples
    --------
    >>> many = LowRankFeedback(LocalFeedback(problem))  # doctest: +SKIP
    >>> coefficients = many(net.Y.batch(new_inputs))  # one array (inputs, ..) a set of coefficients  # doctest: +SKIP
    """

    # A running cost sees f itself on its way, so that J_vv has a part of no low rank beside l''.
    @supports(
        "no_layers", "gradient_flow", "learned_times", "stable_kernel", "bases_by_layer", "linear_in_time", "shared_in_time",
        *STEPPED, "head", "regulariser", "weights", instead="use LocalFeedback for one input after the other",
    )  # fmt: skip
    def __init__(self, feedback: LocalFeedback):
        problem, Y = feedback.problem, feedback.Y
        self._feedback, self.Y = feedback, Y
        self._bases = [basis for parameter in problem.parameters for basis in parameter.space_bases]
        self._controls = np.concatenate([b.read(c).ravel() for b, c in zip(self._bases, feedback.controls)])
        self._v, self._r = Y.values(feedback.inputs).copy(), Y.values(feedback.gradient).copy()
        with stop_annotating():
            self._differentiate_in_controls()
            self._differentiate_in_state()

    def _differentiate_in_controls(self) -> None:
        size = self._controls.size
        self.control_hessian, self._mixed = np.empty((size, size)), np.empty((self.Y.nodes, size))
        for i, unit in enumerate(np.eye(size)):
            *of_u, of_v = self._feedback.action(self._functions(unit), None)
            self.control_hessian[i] = np.concatenate([b.read(c).ravel() for b, c in zip(self._bases, of_u)])
            self._mixed[:, i] = self.Y.values(of_v)[:, 0]
        self.control_hessian = (self.control_hessian + self.control_hessian.T) / 2
        smallest, *_, largest = np.linalg.eigvalsh(self.control_hessian)
        if not smallest > 1e-13 * largest:
            raise RuntimeError(
                f"LowRankFeedback: the smallest eigenvalue of J_uu in the coefficients is {smallest:.1e}, the largest "
                f"{largest:.1e}; {NO_MINIMUM}"
            )
        self._factor = scipy.linalg.cho_factor(self.control_hessian)

    def _differentiate_in_state(self) -> None:
        feedback, Y = self._feedback, self.Y
        head = feedback.problem.head
        seen = [*feedback.problem.net.bases["psi"], *([] if head is None else [head.psi])]
        self._psi = _orthonormal(list(dict.fromkeys(seen)))
        S = -self._of_loss(self._psi)
        for k in range(self._psi.shape[1]):
            w = fd.Function(feedback.inputs.function_space())
            w.dat.data_wo[...] = self._psi[:, k].reshape(w.dat.data_wo.shape)
            S[:, k] += Y.values(feedback.action(None, w)[-1])[:, 0]
        # For C = X Psi^T M + Psi (M X)^T, with functions of Psi orthonormal, S = M C Psi gives M X up to what drops
        # out of C.
        symmetric = Y.sum(self._psi.T @ S)
        self._X = S - 0.5 * Y.weights[:, None] * (self._psi @ symmetric)

    def _of_loss(self, W: np.ndarray) -> np.ndarray:
        """M l'' w for columns w."""
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
        """What the rank of D^2 F - l'' is at most."""
        return 2 * self._psi.shape[1] + self._controls.size

    def __call__(self, inputs: fd.Function) -> list[np.ndarray]:
        """Controls for each input: one array a Function of ``problem.functions``, shape (inputs, of its coefficients).

        ``parameter.set(k, array[s])`` gives a parameter its coefficients for the input s.

        Parameters
        ----------
        inputs
            A batch with one sample an input.
        """
        changes = scipy.linalg.cho_solve(self._factor, self._mixed_in(self._differences(inputs)))
        columns = self._controls[:, None] - changes
        return [part.T.reshape(-1, *basis.shape) for part, basis in zip(self._split(columns), self._bases)]

    def predicted_values(self, inputs: fd.Function) -> np.ndarray:
        """F + (r, w) + 1/2 (w, D^2 F w) for each input, shape (inputs,)."""
        W = self._differences(inputs)
        first = self.Y.weights[:, None] * self._r
        return self._feedback.value + self.Y.sum(np.sum((first + 0.5 * self._second(W)) * W, axis=0))

    def hessian(self, w: fd.Function) -> fd.Function:
        """D^2 F w for each sample of a batch of directions, in the label measure: a new batch."""
        self.Y.check_batch(w, "w")
        return self.Y.batch(self._second(self.Y.values(w)) / self.Y.weights[:, None])

    def eigenvalues(self) -> np.ndarray:
        """Those of D^2 F - l'' that may not be 0, the largest in absolute value first, shape (rank_bound,)."""
        Y, root = self.Y, np.sqrt(self.Y.weights)[:, None]
        rank, size = self._psi.shape[1], self._controls.size
        R = np.linalg.qr(np.hstack([root * self._psi, self._X / root, self._mixed / root]), mode="r")
        R = np.linalg.qr(np.vstack(Y.comm.allgather(R)), mode="r")
        off, identity = np.zeros((rank, rank)), np.eye(rank)
        inner = scipy.linalg.block_diag(
            np.block([[off, identity], [identity, off]]), -scipy.linalg.cho_solve(self._factor, np.eye(size))
        )
        values = np.linalg.eigvalsh(R @ inner @ R.T)
        values = np.concatenate([values, np.zeros(self.rank_bound - len(values))])
        return values[np.argsort(-np.abs(values))]

    def _second(self, W: np.ndarray) -> np.ndarray:
        """M D^2 F w for columns w."""
        Y = self.Y
        kernel = self._X @ Y.sum(self._psi.T @ (Y.weights[:, None] * W)) + Y.weights[:, None] * (
            self._psi @ Y.sum(self._X.T @ W)
        )
        return self._of_loss(W) + kernel - self._mixed @ scipy.linalg.cho_solve(self._factor, self._mixed_in(W))

    def _mixed_in(self, W: np.ndarray) -> np.ndarray:
        return self.Y.sum(self._mixed.T @ W)

    def _differences(self, inputs: fd.Function) -> np.ndarray:
        self.Y.check_batch(inputs, "inputs")
        return self.Y.values(inputs) - self._v

    def _split(self, coefficients: np.ndarray) -> list[np.ndarray]:
        sizes = [int(np.prod(basis.shape)) for basis in self._bases]
        return np.split(coefficients, np.cumsum(sizes)[:-1])

    def _functions(self, coefficients: np.ndarray) -> list[fd.Function]:
        functions = [fd.Function(basis.space) for basis in self._bases]
        for basis, function, part in zip(self._bases, functions, self._split(coefficients)):
            basis.write(function, part.reshape(basis.shape))
        return functions


def _orthonormal(bases: Sequence[Basis]) -> np.ndarray:
    """Orthonormal functions in the label measure with the span of all these bases, shape (nodes, their number)."""
    Y = bases[0].Y
    values = np.hstack([basis.values for basis in bases])
    gram = Y.sum(values.T @ (Y.weights[:, None] * values))
    size = np.sqrt(np.diag(gram))
    lengths, turn = np.linalg.eigh(gram / np.outer(size, size))
    kept = lengths > 1e-12 * lengths[-1]
    return (values / size) @ (turn[:, kept] / np.sqrt(lengths[kept]))
