"""Heads: what is read from the final state of a network.

    O(y) = int W(y, z) f(z, T) dz + mu(y),     C_pre(y) = h(O(y))                                            (2.9)

with low-rank W = sum X_i(y) W_ij psi_j(z) and mu in the same basis X of the output's label domain: K classes (cells of
length one), the network's own label domain, or another one. The order of arguments in W is the same wherever it occurs,
so that the terminal co-state of section 4.1 (Remark 4.3) is r(z, T) = int (C_pre - C)(y) h'(O(y)) W(y, z) dy.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import firedrake as fd
import numpy as np

from fem_resnet.arguments import choice, instance, integer, integer_array, number
from fem_resnet.fixed import OnMesh
from fem_resnet.label_domain.basis import Basis, cell_indicators
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.points import class_space
from fem_resnet.learning.prediction import PREDICTIONS
from fem_resnet.parameters.equivariant import HeadSymmetries, head_symmetries
from fem_resnet.parameters.kernel import KernelCoefficients, LowRankKernel
from fem_resnet.parameters.padding import begin_with, copy_leading, pad
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import BasisCoefficients, BatchValues, Replicated, SeenBatch, SpaceBasis
from fem_resnet.parameters.starting_values import projected_kernel, random_kernel
from fem_resnet.parameters.subspace import Within
from fem_resnet.parameters.time_basis import Once
from fem_resnet.ranks import same
from fem_resnet.tape.recording import apply

__all__ = ["Head"]


class Head(OnMesh):
    """The output (2.9): `O = X (W g + mu)`, g = Psi^T M f(T), X a basis of the output's label domain.

    Parameters
    ----------
    psi
        Basis in which the final state is seen.
    onto
        X: a Basis, on any label space over the same communicator; or K, for one number a class.
    prediction
        h, one of `PREDICTIONS`.
    symmetries
        Symmetries of Y that the output keeps, as for `Symmetric`, for Laplace bases `psi` and `onto`: a state that is turned
        gives the output turned, if h is a function of single values. W then is a linear image of fewer numbers, and mu of
        those of the functions that keep the symmetries.

    Attributes
    ----------
    Y : LabelSpace
        Label domain of the output; of K cells of length one for K classes.
    classes : int or None
        K, if the output has classes.
    W, mu : Parameter
        Coefficients of shape (rank of X, rank of psi) and (rank of X,), zero at first. With symmetries these are of shape
        (count,), and `matrices` has W and mu in the bases; mu is None where only 0 keeps them.
    kept : HeadSymmetries or None
        The W and mu that keep the symmetries; None if all W and mu serve.

    Raises
    ------
    TypeError, ValueError
        If `psi` is no Basis, `onto` neither a Basis nor a positive integer, or `prediction` unknown; if `Symmetric` would
        refuse the symmetries; or they differ between ranks.
    """

    def __init__(
        self, psi: Basis, onto: Basis | int, prediction: str = "softmax", *, symmetries: Sequence[Any] | HeadSymmetries = ()
    ):
        self.psi = instance("psi", psi, Basis, "laplace_basis(Y, rank) makes one")
        same(psi.Y.comm, onto=onto, prediction=prediction)
        self.classes = None if isinstance(onto, Basis) else integer("onto", onto)
        self.onto = onto if isinstance(onto, Basis) else cell_indicators(class_space(self.classes, psi.Y.comm))
        self.prediction = PREDICTIONS[choice("prediction", prediction, PREDICTIONS)]
        self.Y = self.onto.Y
        self.kept = kept = symmetries if isinstance(symmetries, HeadSymmetries) else self._kept_by(symmetries)
        of_W: SpaceBasis = KernelCoefficients(LowRankKernel(self.onto, psi))
        of_mu: SpaceBasis | None = BasisCoefficients(self.onto)
        if kept is not None:
            of_W = Within(of_W, kept.of_W)
            of_mu = Within(of_mu, kept.of_mu) if kept.of_mu.shape[1] else None
        self.W = Parameter("W", of_W, Once())
        self.mu = None if of_mu is None else Parameter("mu", of_mu, Once())

    def _kept_by(self, symmetries: Sequence[Any]) -> HeadSymmetries | None:
        """What a head that keeps these may be; None if there are none."""
        if not instance("symmetries", symmetries, (list, tuple), "a list of them"):
            return None
        if self.classes is not None:
            raise ValueError(
                f"symmetries: expected an output that they act on, a Basis in `onto`, got {self.classes} classes; a head onto "
                f"classes keeps them if its psi does: invariant_functions(psi, *symmetries)"
            )
        return head_symmetries(self.psi, self.onto, symmetries)

    def __repr__(self) -> str:
        return f"Head({self.prediction.name}, from {self.psi!r} onto {self.onto!r})"

    def __deepcopy__(self, memo: dict) -> Head:  # type: ignore[override]  # `copy` hands over a dict
        other = self.__copy__()
        vars(other).update(W=copy.deepcopy(self.W, memo), mu=copy.deepcopy(self.mu, memo))  # None is its own copy
        return other

    @property
    def parameters(self) -> list[Parameter]:
        """W, and mu if there is one."""
        return [self.W] if self.mu is None else [self.W, self.mu]

    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """W, shape (rank of X, rank of psi), and mu, shape (rank of X,), in the bases. Collective."""
        return self.whole(*(parameter.read(0) for parameter in self.parameters))

    def whole(self, W: np.ndarray, mu: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `matrices`, for other coefficients.

        Parameters
        ----------
        W, mu
            Of the shapes of the parameters; mu is left out where there is none.

        Returns
        -------
        W, mu : numpy.ndarray
            Shapes (rank of X, rank of psi) and (rank of X,).
        """
        if self.mu is None or mu is None:
            return self.W.space_basis.whole(W), np.zeros(self.onto.rank)
        return self.W.space_basis.whole(W), self.mu.space_basis.whole(mu)

    def start(self, rule: str = "random smooth", seed: int = 0, *, gain: float = 1.0) -> None:
        """Give W and mu starting values; mu is 0. Collective.

        While W is 0 a loss of the output has no gradient in the network.

        Parameters
        ----------
        rule
            - "zero": W is 0.
            - "identity": W is gain times the identity on the span of psi, projected onto that of `onto`, which lives on the
              same label domain.
            - "random smooth": random coefficients in orthonormal functions, which fall like 1/k with the number k of the
              function, for classes in that of psi alone. The norm of W in L2 is `gain` in the mean square.
        seed
            Of random numbers: the same coefficients on any number of ranks.
        gain
            The factor of W, in its unit.

        Raises
        ------
        ValueError
            If an argument does not fit or differs between ranks, or the output lives on another label domain than the state,
            so that there is no identity.
        """
        same(self.psi.Y.comm, rule=rule, seed=seed, gain=gain)
        choice("rule", rule, ("zero", "identity", "random smooth"))
        seed, gain = integer("seed", seed, least=0, most=np.inf), number("gain", gain)
        kernel = LowRankKernel(self.onto, self.psi)
        if rule == "zero":
            W = np.zeros(kernel.shape)
        elif rule == "random smooth":
            W = gain * random_kernel(kernel, np.random.default_rng(seed), smooth_in_y=self.classes is None)
        elif self.Y is self.psi.Y:
            W = gain * projected_kernel(kernel)
        else:
            raise ValueError(
                f"rule: expected 'zero' or 'random smooth' for an output on {self.Y!r}, another label domain than that of "
                f"the state, got {rule!r}"
            )
        self.W.write(0, self.W.space_basis.of_whole(W))  # the nearest one that keeps the symmetries
        if self.mu is not None:
            self.mu.write(0, np.zeros(self.mu.space_basis.shape))

    def __call__(self, f: fd.Function) -> fd.Function:
        """O, a batch on the head's own label domain, for a final state or batch of them; recorded while annotating.

        Collective.
        """
        self.psi.Y.check_where(f, "f")
        return self.of_state(f)

    def of_state(self, f: fd.Function) -> fd.Function:
        """As `__call__`, for a state that is known to live there. Collective."""
        return self._output(self._seen(f), f)

    def of_coefficients(self, g: fd.Function, slot: Replicated) -> fd.Function:
        """O, a batch on the head's own label domain, from g = Psi^T M f(T); recorded while annotating. Collective.

        Parameters
        ----------
        g
            Holds g.
        slot
            How it holds g, shape (rank of psi, samples).
        """
        return self._output(slot, g)

    def linear(self, f: fd.Function) -> fd.Function:
        """`X W Psi^T M f`: O without mu, which is the derivative of O in a direction f. Collective.

        Recorded while annotating.
        """
        self.psi.Y.check_where(f, "f")
        return self._output(self._seen(f), f, shifted=False)

    def _seen(self, f: fd.Function) -> SeenBatch:
        self.psi.Y.check_values(f, "f")
        return SeenBatch(self.psi, f.function_space())

    def _output(self, slot: SeenBatch | Replicated, state: fd.Function, shifted: bool = True) -> fd.Function:
        read = self.parameters if shifted else [self.W]
        return apply(_HeadOperator(self, slot, read), [state, *(parameter.functions[0] for parameter in read)])[0]

    def predict(self, f: fd.Function) -> fd.Function:
        """C_pre = h(O), a batch on the head's own label domain. Collective; nothing is recorded."""
        values = self.onto.expand(self._coefficients(f))
        return self.Y.batch(self.prediction.value(self.Y, values))

    def scores(self, f: fd.Function) -> np.ndarray:
        """O in the basis of the output, for K classes the score of each: shape (samples, K), on every rank. Collective."""
        return self._coefficients(f).T

    def _coefficients(self, f: fd.Function) -> np.ndarray:
        self.psi.Y.check_batch(f, "f")
        W, mu = self.matrices()
        return W @ self.psi.project(self.psi.Y.values(f)) + mu[:, None]

    def on(self, Y: LabelSpace) -> Head:
        """The same head for the network on another label space of the same Y (`ResidualNetwork.on`).

        An output on the network's own label space moves with it, also one on a channel of that. One on another label domain
        stays where it is.

        Raises
        ------
        TypeError, ValueError
            As of `Basis.on`.
        """
        moved = {self.psi: self.psi.on(Y)}
        moved[self.psi.one] = moved[self.psi].one
        for state, there in ((self.psi.Y, Y), (self.psi.Y.one, Y.one)):
            if self.onto.Y is state and self.onto not in moved:
                moved[self.onto] = self.onto.on(there)
        if self.kept is not None and self.onto not in moved:
            raise ValueError(
                f"on: expected a head whose output moves with the network, as it keeps symmetries, got one onto {self.onto!r}"
            )
        onto = moved.get(self.onto, self.onto)
        head = Head(moved[self.psi], self.classes or onto, self.prediction.name, symmetries=self.kept or ())
        for ours, theirs in zip(self.parameters, head.parameters):
            theirs.set(0, ours.get(0))
        return head

    def in_first(self, rank: int) -> Head:
        """The head in the first functions of its bases, with their coefficients: psi and, but for classes, onto. Collective.

        Parameters
        ----------
        rank
            How many functions, at least 1; bases that have no more stay.

        Raises
        ------
        ValueError
            If that is no positive integer or differs between ranks, or functions have no order: indicators of cells.
        """
        same(self.psi.Y.comm, rank=rank)
        rank = integer("rank", rank, most=np.inf)
        kept = () if self.kept is None else self.kept.in_first(self.psi, self.onto, rank)
        head = Head(self.psi.first(rank), self.classes or self.onto.first(rank), self.prediction.name, symmetries=kept)
        copy_leading(self.parameters, head.parameters)
        return head

    def pad(self, head: Head) -> None:
        """Take the coefficients of a head in the first functions of the bases, padded by zeros. Collective.

        Parameters
        ----------
        head
            As `in_first` of this head has made it, or of one in more of these functions.

        Raises
        ------
        TypeError, ValueError
            If it is no such head.
        """
        instance("head", head, Head)
        bases, fewer = ([each.psi] if each.classes else [each.onto, each.psi] for each in (self, head))
        if self.classes != head.classes or not begin_with(bases, fewer):
            raise ValueError(f"head: expected a head that in_first(..) of {self!r} has made, got {head!r}")
        pad(self.parameters, head.parameters)

    def observations(self, labels: Sequence[int]) -> fd.Function:
        """C for class labels: the batch of indicators of the classes.

        Parameters
        ----------
        labels
            Integers from 0 to K - 1, shape (samples,), the same on every rank.

        Raises
        ------
        TypeError, ValueError
            If they are no list of integers, one is no class, or the output has no classes; or they differ between ranks.
        """
        same(self.Y.comm, labels=labels)
        return self.labelled(labels)

    def labelled(self, labels: Sequence[int], name: str = "labels") -> fd.Function:
        """As `observations`, for labels that are known to be the same on every rank.

        Parameters
        ----------
        labels
            Integers from 0 to K - 1, shape (samples,).
        name
            What messages call them.

        Raises
        ------
        TypeError, ValueError
            As of `observations`.
        """
        if self.classes is None:
            raise ValueError(f"{name}: the output is a function in {self.onto!r}; expected observations as a batch on it")
        numbers = integer_array(name, labels, ("samples",))
        if numbers.min() < 0 or numbers.max() >= self.classes:
            bad = int(np.flatnonzero((numbers < 0) | (numbers >= self.classes))[0])
            raise ValueError(f"{name}: expected classes 0 to {self.classes - 1}, got {numbers[bad]} for sample {bad}")
        return self.Y.batch(self.onto.values[:, numbers], "observations")


class _HeadOperator:
    ready = True

    def __init__(self, head: Head, seen: SeenBatch | Replicated, read: Sequence[Parameter]):
        self._phi = head.onto
        self._bases = [parameter.space_basis for parameter in read]
        self.inputs = [seen, *self._bases]
        self.output = BatchValues(head.Y, head.Y.batch_space(seen.shape[1]))

    def _whole(self, coefficients):
        """W and mu in the bases; mu is 0 where it is not read."""
        W, *mu = (basis.whole(c) for basis, c in zip(self._bases, coefficients))
        return W, mu[0][:, None] if mu else 0.0

    def _of_whole(self, *functionals):
        return [basis.of_whole(d) for basis, d in zip(self._bases, functionals)]

    def forward(self, arrays, save):
        g, *coefficients = arrays
        W, mu = self._whole(coefficients)
        return self._phi.expand(W @ g + mu)

    def adjoint(self, arrays, dual):
        g, *coefficients = arrays
        W, _ = self._whole(coefficients)
        moments = self._phi.pull_back(dual)
        return [W.T @ moments, *self._of_whole(moments @ g.T, moments.sum(axis=1))]

    def tangent(self, arrays, directions):
        (g, *coefficients), (g_dot, *coefficients_dot) = arrays, directions
        (W, _), (W_dot, mu_dot) = self._whole(coefficients), self._whole(coefficients_dot)
        return self._phi.expand(W_dot @ g + W @ g_dot + mu_dot)

    def second_adjoint(self, arrays, directions, dual, dual_dot):
        g, W, *mu = self.adjoint(arrays, dual_dot)
        g_dot, *coefficients_dot = directions
        W_dot, _ = self._whole(coefficients_dot)
        moments = self._phi.pull_back(dual)  # what follows is all the curvature of a map bilinear in g and W
        g += W_dot.T @ moments
        W += self._bases[0].of_whole(moments @ g_dot.T)
        return [g, W, *mu]
