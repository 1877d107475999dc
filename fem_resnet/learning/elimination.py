"""The head eliminated: W and mu solved exactly in every evaluation, so that J depends on the other parameters alone.

Where the loss is the half square of the output itself, J is quadratic in W and mu. Its minimum over them solves a linear least
squares problem in what the head reads of the states, g = Psi^T M f(T):

    j(theta) = min_(W, mu) J(theta, W, mu),        j'(theta) = dJ/dtheta (theta, W, mu) at the minimum.

This is variable projection. The derivative has no term from the change of W and mu, since dJ/dW = dJ/dmu = 0 there. With P C
the projection of the targets onto the basis X of the output, and G the Gram matrices, the minimum is that of

    sum_s omega_s |W g_s + mu - (P C)_s|^2 + lambda_W tr(W G_psi W^T) + lambda_mu |mu|^2,

in each coefficient of X alone, so that all of them share one matrix with (rank of psi + 1) columns. In a head that keeps
symmetries only some of the coefficients share unknowns, and each such group has a small problem of its own. Rows for outputs
at layer times before T, and for derivatives of the output, in which mu has no part, stand below those for T.

The matrix is taken apart by QR, and its triangle together with Tikhonov's rows by its singular values, in the label measure.
Normal equations would square its condition. What samples and Tikhonov do not determine gets the least norm. On several ranks
each solves the whole problem, as each has all of g.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import firedrake as fd
import numpy as np
import scipy.linalg
from mpi4py import MPI
from pyadjoint import AdjFloat, ReducedFunctional, Tape
from pyadjoint.tape import stop_annotating

from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.learning.head import Head
from fem_resnet.learning.loss import Loss, least_squares
from fem_resnet.learning.output_groups import output_groups
from fem_resnet.learning.regulariser import Regulariser
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import BatchValues, Replicated, SeenBatch

__all__ = [
    "ROUND_OFF", "HeadSolve", "Reading", "ReducedToOthers", "SolvedHead", "check_least_squares", "ridge", "ridge_of_head",
]  # fmt: skip

#: Sizes of W and mu at which a regulariser is asked what it is: one that is not quadratic shows it there.
_SIZES = (1e-3, 1.0, 1e3)
#: Singular values below this part of the largest are taken for round-off in g, on which no W should live: coefficients of W
#: would be 1e10 times as large as others, and round-off in O too.
ROUND_OFF = 1e-10
_FIRST = "{what}: J with eliminate='head' has first derivatives only; record it without eliminate"


@dataclass(frozen=True)
class Reading:
    """What the head reads at one layer time, and what its output there should be.

    Attributes
    ----------
    state : Function
        Holds f, or g = Psi^T M f.
    slot : Replicated or None
        How it holds g; None where it holds f.
    targets : Function
        A batch on the label domain of the output.
    weight : float
        What its half square counts.
    shifted : bool
        Whether mu is a part of the output; else it is ``X W g``, a derivative.
    """

    state: fd.Function
    slot: Replicated | None
    targets: fd.Function
    weight: float
    shifted: bool


@dataclass(frozen=True)
class SolvedHead:
    """A head that has been solved on the tape.

    Attributes
    ----------
    outputs : list of Function
        The output of each reading.
    parameters : dict of Parameter to Parameter
        W and mu of the head, and the same in the Functions of the tape that hold what was solved; empty where no regulariser
        asks for them.
    operator : HeadSolve
        What solves it, in each evaluation.
    """

    outputs: list[fd.Function]
    parameters: dict[Parameter, Parameter]
    operator: HeadSolve


def check_least_squares(name: str, head: Head | None, loss: Loss, remedy: str) -> Head:
    """The head of a problem, if its outputs themselves are fitted by least squares: J is quadratic in W and mu.

    Parameters
    ----------
    name
        What messages name.
    head, loss
        Those of the problem.
    remedy
        What to do with another loss or prediction.

    Raises
    ------
    ValueError
        If there is no head, or J is another function of its outputs.
    """
    if head is None:
        raise ValueError(f"{name}: expected a problem with a head, got head=None; give it a Head")
    if loss != least_squares or head.prediction.name != "identity":
        raise ValueError(
            f"{name}: expected the loss least_squares of a head with prediction 'identity', so that J is a sum of squares of "
            f"what is linear in W and mu, got {loss.name} and {head.prediction.name!r}; {remedy}"
        )
    return head


def ridge(regulariser: Regulariser, parameter: Parameter) -> float | None:
    """lambda such that the regulariser is lambda/2 |c|^2 of this parameter; None if it is none. Collective.

    Parameters
    ----------
    regulariser
        The regulariser.
    parameter
        The parameter, with coefficients that are the same on every rank.
    """
    rng, probe, ratios = np.random.default_rng(0), copy.deepcopy(parameter), []
    with stop_annotating():
        for size in _SIZES:
            squares = 0.0
            for k, basis in enumerate(probe.space_bases):
                c = size * basis.amplitude * rng.normal(size=basis.shape)
                probe.write(k, c)
                squares += probe.pair(k, c, c)
            ratios.append(float(regulariser([probe])) / (0.5 * squares))
    multiple = np.allclose(ratios, ratios[0], rtol=1e-9, atol=0) and 0 <= ratios[0] < np.inf
    return ratios[0] if multiple else None


def ridge_of_head(regulariser: Regulariser, parameter: Parameter) -> float:
    """lambda of W or mu, as `ridge`.

    Raises
    ------
    ValueError
        If the regulariser is another function of it.
    """
    found = ridge(regulariser, parameter)
    if found is None:
        raise ValueError(
            f"eliminate: expected a regulariser that is a multiple of the squared norm of {parameter.name}, or leaves it out, "
            f"so that W and mu solve a small linear problem; got another; take tikhonov, or leave eliminate out"
        )
    return found


class HeadSolve:
    """From what a head reads to its outputs with the best W and mu, and these: an operator on the tape (`tape.operator`).

    Its adjoint is that at fixed W and mu, and takes no functional of them: the tape adds up all of J, whose derivative in W
    and mu is zero. It has first derivatives alone.

    Parameters
    ----------
    head
        The head.
    readings
        What it reads, and its targets.
    weights
        omega, shape (samples,), of each reading; equal ones if None.
    ridges
        lambda_W and lambda_mu; None for no regulariser. Else W and mu are outputs too, for the regulariser.

    Attributes
    ----------
    solution : tuple of numpy.ndarray
        The coefficients of W and mu of the latest evaluation, of the shapes of the head's parameters.
    condition : float or None
        The condition number of the least squares problem that they solve, Tikhonov's rows included, in the label measure;
        infinite if `determined` is less than all. The one of the normal equations would be its square. None where
        the problem is not linear.
    unknowns, determined : int
        How many unknowns it has, and how many of these samples and Tikhonov determine. Without symmetries these are the
        (rank of psi + 1) of each coefficient of the output.
    current : bool
        Whether these belong to the targets and weights that were observed last.
    """

    ready = True  # the Block adjoins at the inputs of the latest evaluation, or not at all

    def __init__(
        self, head: Head, readings: Sequence[Reading], weights: Sequence[float] | None, ridges: Sequence[float] | None
    ):
        self._head, self._onto, self._Y = head, head.onto, head.psi.Y
        self.inputs = [
            SeenBatch(head.psi, reading.state.function_space()) if reading.slot is None else reading.slot
            for reading in readings
        ]
        outputs = [BatchValues(head.Y, reading.targets.function_space()) for reading in readings]
        self.output = (*outputs, *([] if ridges is None else [parameter.space_basis for parameter in head.parameters]))
        self._weights = [reading.weight for reading in readings]
        self._shifted = [float(reading.shifted) for reading in readings]
        self._root = scipy.linalg.cholesky(head.psi.gram)  # G_psi = root^T root
        self._ridges = [*(ridges or (0.0, 0.0)), 0.0][:2]
        self._groups = list(output_groups(head)) if head.kept is not None else None
        self.unknowns = head.psi.rank + 1 if self._groups is None else sum(group.unknowns.size for group in self._groups)
        self.solution = tuple(np.empty(parameter.space_basis.shape) for parameter in head.parameters)  # until `forward`
        self.condition: float | None = np.nan
        self.determined, self.current = 0, False
        self._roots, self._targets = self._right_hand_side([reading.targets for reading in readings], weights)

    def observe(self, targets: Sequence[fd.Function], weights: Sequence[float] | None) -> None:
        """Take other targets, one batch a reading, and other weights of shape (samples,), for the next evaluation.

        Collective.
        """
        self._roots, self._targets = self._right_hand_side(targets, weights)
        self.current = False

    def _right_hand_side(
        self, targets: Sequence[fd.Function], weights: Sequence[float] | None
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """The roots of the weights of each reading, and with these the coefficients of all targets. Collective."""
        omega, projected = sample_weights(weights, self.inputs[0].shape[1]), []
        roots = [np.sqrt(weight * omega) for weight in self._weights]
        for batch, root in zip(targets, roots):
            coefficients = scipy.linalg.solve(self._onto.gram, self._onto.project(self._onto.Y.values(batch)), assume_a="pos")
            projected.append(root * coefficients)
        return roots, np.hstack(projected)

    def forward(self, arrays, save):
        """The outputs, and W and mu if they are outputs, from g of each reading, shape (rank of psi, samples). Collective."""
        self.solution = self._solve(arrays)
        for part in self.solution:
            # The same bits on all ranks, also where they run on processors of two kinds.
            self._Y.comm.Bcast(part, root=0)
        self.current = True
        W, mu = self._head.whole(*self.solution)
        outputs = [self._onto.expand(W @ g + shifted * mu[:, None]) for g, shifted in zip(arrays, self._shifted, strict=True)]
        return [*outputs, *self.solution][: len(self.output)]

    def adjoint(self, arrays, functionals):
        """The functionals of g at fixed W and mu. Collective."""
        W, _ = self._head.whole(*self.solution)
        return [W.T @ self._onto.pull_back(functional) for functional in functionals[: len(arrays)]]

    def _solve(self, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """The coefficients of W and mu of least J, and of least norm among those."""
        rank, samples = arrays[0].shape
        rows = np.empty((samples * len(arrays), rank + 1), order="F")
        for k, (g, root, shifted) in enumerate(zip(arrays, self._roots, self._shifted)):
            part = rows[k * samples : (k + 1) * samples]
            np.multiply(g.T, root[:, None], out=part[:, :-1])
            part[:, -1] = shifted * root
        if not np.isfinite(rows).all():  # a trial step went too far: J is not finite either
            self.condition, self.determined = np.nan, 0
            return tuple(np.full(part.shape, np.nan) for part in self.solution)
        right, triangle = scipy.linalg.qr_multiply(rows, self._targets, mode="right", overwrite_a=True)
        if self._groups is not None:
            return self._solve_groups(right, triangle)
        # From here on W stands for W root^T, the size of which is the norm of the kernel.
        triangle[:, :-1] = scipy.linalg.solve_triangular(self._root, triangle[:, :-1].T, trans="T").T
        solved, sizes, self.determined = _least(triangle, right.T, np.repeat(self._ridges, (rank, 1)))
        self.condition = float(sizes[0] / sizes[-1]) if self.determined == sizes.size else np.inf
        W = scipy.linalg.solve_triangular(self._root, solved[:-1])
        return np.ascontiguousarray(W.T), solved[-1].copy()

    def _solve_groups(self, right: np.ndarray, triangle: np.ndarray) -> tuple[np.ndarray, ...]:
        """The coefficients of a head that keeps symmetries, whose bases are orthonormal."""
        solution = np.zeros(sum(part.size for part in self.solution))
        largest, smallest, self.determined = 0.0, np.inf, 0
        of_W = self.solution[0].size
        for group in self._groups:
            rows = np.vstack([triangle @ part for part in group.parts])
            ridges = np.where(group.unknowns < of_W, *self._ridges)
            solved, sizes, determined = _least(rows, right[group.outputs].reshape(-1, 1), ridges)
            solution[group.unknowns] = solved[:, 0]
            self.determined += determined
            largest, smallest = max(largest, sizes[0]), min(smallest, sizes[-1])
        self.condition = float(largest / smallest) if self.determined == self.unknowns else np.inf
        return tuple(part.copy() for part in np.split(solution, [of_W])[: len(self.solution)])


def _least(rows: np.ndarray, right: np.ndarray, ridges: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """x of least |rows x - right|^2 + |root(ridges) x|^2, and of least norm among these, one column a right-hand side.

    Also the singular values, and how many of them are no round-off.
    """
    left, sizes, directions = scipy.linalg.svd(np.vstack([rows, np.diag(np.sqrt(ridges))]), full_matrices=False)
    known = sizes > ROUND_OFF * sizes[0]
    return directions[known].T @ ((left[: len(rows), known].T @ right) / sizes[known, None]), sizes, int(known.sum())


class ReducedToOthers(ReducedFunctional):
    """J as a function of all that is learned but W and mu, at the W and mu of least J. First derivatives only.

    Parameters
    ----------
    J
        J on the tape.
    parameters
        Those that are its controls.
    head
        The head whose W and mu are solved for.
    operator
        What solves for them on the tape.
    tape
        The tape.

    Attributes
    ----------
    parameters : list of Parameter
        As above.
    """

    def __init__(self, J: AdjFloat, parameters: Sequence[Parameter], head: Head, operator: HeadSolve, tape: Tape):
        self.parameters = list(parameters)
        self._head, self._operator = head, operator
        super().__init__(J, [control for parameter in self.parameters for control in parameter.controls()], tape=tape)

    @property
    def condition(self) -> float | None:
        """The condition number of the linear problem for W and mu in the latest evaluation; None under a cross entropy."""
        return self._operator.condition

    @property
    def unknowns(self) -> int:
        """How many unknowns the problem has; without symmetries (rank of psi + 1) for each coefficient of the output."""
        return self._operator.unknowns

    @property
    def undetermined(self) -> int:
        """How many of these had to take the least norm in the latest evaluation."""
        return self.unknowns - self._operator.determined

    @property
    def functions(self) -> list[fd.Function]:
        """The Functions of the parameters, one a control. Collective."""
        return [function for parameter in self.parameters for function in parameter.functions]

    def give_head(self) -> None:
        """Assign the W and mu that belong to the present values of the parameters to the head. Collective.

        J is evaluated if its latest evaluation was elsewhere, or another batch has come since.
        """
        functions = self.functions
        here = self._operator.current and all(
            np.array_equal(control.tape_value().dat.data_ro, function.dat.data_ro)
            for control, function in zip(self.controls, functions)
        )
        if not self._head.psi.Y.comm.allreduce(here, op=MPI.LAND):
            with stop_annotating():
                self(functions)
        for parameter, coefficients in zip(self._head.parameters, self._operator.solution):
            parameter.write(0, coefficients)

    def hessian(self, m_dot, **options):
        raise NotImplementedError(_FIRST.format(what="hessian"))

    def tlm(self, m_dot):
        raise NotImplementedError(_FIRST.format(what="tlm"))
