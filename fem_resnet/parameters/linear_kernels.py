"""Linear sets of kernels, beta = sum_k theta_k E_k, and that of functions of the Laplacian.

The E_k are orthonormal matrices, and so are the functions of the basis. So the inner product of kernels is that of theta,
P is its own derivative, its transpose takes a functional d to d(E_k), and the curvature is 0.

    functions of the Laplacian     b = k(-Laplace)            beta = k(lambda_j) on the diagonal, one number an eigenspace

They exist on each Y, and commute with all isometries. With channels, each pair has a function of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike

from fem_resnet.arguments import instance, integer, integer_array, number, real_array
from fem_resnet.fixed import Fixed, read_only
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.symmetries import eigenspaces
from fem_resnet.parameters.couplings import Couplings
from fem_resnet.parameters.kernel_sets import KernelSet, MatrixControls, refuse_outside
from fem_resnet.parameters.subspace import in_first
from fem_resnet.ranks import same

__all__ = ["MOST_RANK", "LaplaceFunctions", "LinearKernels"]

#: The largest rank of a set in a file.
MOST_RANK = 1 << 20


class LinearKernels(Fixed, KernelSet):
    """A linear set of kernels, beta = sum_k theta_k E_k with orthonormal E_k.

    Parameters
    ----------
    rank
        The rank of phi = psi.
    elements
        The E_k, each as one column, shape (rank^2, count).
    channels
        C, where phi repeats a basis in each of C channels.
    **known
        What else the set knows, by name.
    """

    symmetric = True
    linear = True

    def __init__(self, rank: int, elements: scipy.sparse.csc_array, channels: int = 1, **known: Any):
        self._rank, self._channels = rank, channels
        self._known = known
        self._elements = elements
        self._transposed = elements.T.tocsr()

    @property
    def rank(self) -> int:
        """The rank of phi = psi."""
        return self._rank

    @property
    def count(self) -> int:
        """How many free controls theta_k there are."""
        return self._elements.shape[1]

    @property
    def elements(self) -> scipy.sparse.csc_array:
        """The E_k, each as one column, shape (rank^2, count)."""
        return self._elements

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        ours, theirs = self.arrays, other.arrays
        return self.description == other.description and all(np.array_equal(ours[name], theirs[name]) for name in ours)

    def __hash__(self) -> int:
        return hash((type(self), self.rank, self.count))

    def shape(self, phi, psi):
        if (phi, psi) != (self.rank, self.rank):
            raise ValueError(
                f"kernel.among: expected a basis of rank {self.rank}, of which {type(self).__name__} was made, "
                f"got ranks {phi} and {psi}"
            )
        return self.count, 1

    def controls(self, kernel):
        shape = self.shape(*kernel.shape)
        phi = kernel.phi
        if phi.eigenvalues is None or np.abs(phi.gram - np.eye(phi.rank)).max() > 1e-8:
            raise ValueError(
                f"kernel.among: expected orthonormal eigenfunctions with {type(self).__name__}, as laplace_basis makes them, "
                f"got {phi!r}"
            )
        return MatrixControls(phi.Y, shape)

    def couplings(self):
        entries = np.divmod(np.unique(self._elements.indices), self.rank)
        pattern = scipy.sparse.coo_array((np.ones(entries[0].size), entries), shape=(self.rank, self.rank))
        return Couplings.of_pattern(pattern)

    def first(self, rank):
        """The kernels that live on the first functions: some of the E_k, so that controls are some of the theta_k.

        Parameters
        ----------
        rank
            How many functions, with channels in each.

        Raises
        ------
        ValueError
            If an E_k lives on some of these functions and on others too.
        """
        elements = in_first("kernel.among", repr(self), self._elements, [(self.rank, self._channels)] * 2, rank)
        rank = min(rank, self.rank // self._channels) * self._channels
        return self._restricted(rank, elements)

    def _restricted(self, rank: int, elements: scipy.sparse.csc_array) -> LinearKernels:
        """The set of some of the E_k, on the first functions."""
        made = type(self).__new__(type(self))
        LinearKernels.__init__(made, rank, elements, self._channels, **self._known)
        return made

    def start(self, kernel):
        return np.zeros((self.count, 1))

    def inverse(self, kernel, beta):
        X = self.adjoint(kernel, None, beta)
        refuse_outside(np.abs(beta - self.value(kernel, X)).max(), np.abs(beta).max(), f"a kernel of {self!r}")
        return X

    def value(self, kernel, X):
        return (self._elements @ X).reshape(self.rank, self.rank)

    def tangent(self, kernel, X, X_1):
        return self.value(kernel, X_1)

    def adjoint(self, kernel, X, functional):
        return self._transposed @ np.ascontiguousarray(functional).reshape(-1, 1)

    def curvature(self, kernel, X, X_1, functional):
        return np.zeros((self.count, 1))

    def derivative(self, kernel, X):
        return self._elements

    def mean_of(self, values: np.ndarray) -> np.ndarray:
        """The mean of some values over the entries of each E_k, weighted by their squares, shape (count, 1).

        Parameters
        ----------
        values
            One an entry, shape (rank, rank).
        """
        return self._transposed.power(2) @ values.reshape(-1, 1)

    def projected(self, beta: ArrayLike) -> np.ndarray:
        """The nearest kernel of the set, shape (rank, rank).

        Parameters
        ----------
        beta
            Coefficients of any kernel, shape (rank, rank).

        Raises
        ------
        TypeError, ValueError
            If beta is no such array.
        """
        beta = real_array("beta", beta, (self.rank, self.rank))
        return (self._elements @ (self._transposed @ beta.reshape(-1, 1))).reshape(beta.shape)


class LaplaceFunctions(LinearKernels):
    """Kernels b = k(-Laplace): beta = k(lambda) on each eigenspace. They commute with every isometry of Y.

    With C channels, b_cd = k_cd(-Laplace) for each pair of them.

    Collective over the communicator of a basis.

    Parameters
    ----------
    phi
        A Laplace basis. A network takes the same basis, or what `Basis.on` makes of it.
    split
        Neighbouring eigenvalues that differ by less than this part of their value count as one. Where a mesh splits an
        eigenspace further, its functions have numbers of their own and the kernels lose the symmetry: give more then.

    Raises
    ------
    TypeError
        If an argument is of another kind.
    ValueError
        If phi is no basis of orthonormal eigenfunctions, or `split` no number from 0 to 1.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Kernel, LabelSpace, ResidualNetwork, laplace_basis
    >>> phi = laplace_basis(LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1)), 6)
    >>> among = LaplaceFunctions(phi, split=0.05)
    >>> among
    LaplaceFunctions(rank 6, 4 free controls)
    >>> net = ResidualNetwork(Kernel(phi, among=among), layers=1)
    >>> net.kernel.set(0, among.kernel([4.0, 3.0, 2.0, 1.0]))
    >>> net.kernel.get(0).diagonal().round(12).tolist()
    [4.0, 3.0, 3.0, 2.0, 2.0, 1.0]
    """

    def __init__(self, phi: Basis, *, split: float = 1e-3):
        instance("phi", phi, Basis, "laplace_basis(Y, rank) makes one")
        same(phi.Y.comm, split=split)
        one = phi.one
        spaces = eigenspaces(one, number("split", split, least=0, most=1))
        label = np.empty(one.rank, dtype=int)
        for k, space in enumerate(spaces):
            label[space] = k
        self._make(label, np.array([one.eigenvalues[space].mean() for space in spaces]), phi.Y.channels)

    def _make(self, label: np.ndarray, eigenvalues: np.ndarray, channels: int) -> None:
        one, rank = label.size, channels * label.size
        # Control (k, c, d) couples the functions of eigenspace k in channel d with themselves in channel c.
        c, d, i = np.meshgrid(np.arange(channels), np.arange(channels), np.arange(one), indexing="ij")
        places = (c * one + i) * rank + d * one + i
        controls = (label[i] * channels + c) * channels + d
        values = 1 / np.sqrt(np.bincount(label)[label[i]])
        shape = (rank**2, eigenvalues.size * channels**2)
        elements = scipy.sparse.csc_array((values.ravel(), (places.ravel(), controls.ravel())), shape=shape, dtype=float)
        super().__init__(rank, elements, channels, label=label, eigenvalues=read_only(eigenvalues))

    def _restricted(self, rank, elements):
        spaces, label = np.unique(self._known["label"][: rank // self._channels], return_inverse=True)
        made = type(self).__new__(type(self))
        made._make(label, self.eigenvalues[spaces], self._channels)
        return made

    def __repr__(self) -> str:
        return f"LaplaceFunctions(rank {self.rank}, {self.count} free controls)"

    @property
    def eigenvalues(self) -> np.ndarray:
        """The mean eigenvalue of each eigenspace, ascending, shape (eigenspaces,)."""
        return self._known["eigenvalues"]

    @property
    def description(self):
        return {"set": "LaplaceFunctions", "channels": self._channels}

    @property
    def arrays(self):
        return dict(self._known)

    @classmethod
    def of_arrays(cls, description, arrays):
        """The set from what `description` and `arrays` give.

        Parameters
        ----------
        description, arrays
            As for `KernelSet.of_arrays`.

        Raises
        ------
        TypeError, ValueError
            If they describe no such set.
        """
        eigenvalues = real_array("eigenvalues", arrays["eigenvalues"], ("eigenspaces",))
        label = integer_array("label", arrays["label"], ("rank",)).astype(int)
        if not np.array_equal(np.unique(label), np.arange(eigenvalues.size)):
            raise ValueError(f"label: expected each of {eigenvalues.size} eigenspaces, got others")
        made = cls.__new__(cls)
        made._make(label, eigenvalues.copy(), integer("channels", description["channels"], most=MOST_RANK // label.size))
        return made

    def kernel(self, multipliers: ArrayLike) -> np.ndarray:
        """The coefficients beta of k(-Laplace), shape (rank, rank).

        Parameters
        ----------
        multipliers
            k at each of `eigenvalues`, shape (eigenspaces,); with channels k_cd, shape (eigenspaces, C, C).

        Raises
        ------
        TypeError, ValueError
            If these are no such numbers.
        """
        C, spaces = self._channels, self.eigenvalues.size
        k = real_array("multipliers", multipliers, (spaces,) if C == 1 else (spaces, C, C)).reshape(spaces, C, C)
        return np.einsum("icd,ij->cidj", k[self._known["label"]], np.eye(self.rank // C)).reshape(self.rank, self.rank)

    def multipliers(self, beta: ArrayLike, eigenvalues: ArrayLike | None = None) -> np.ndarray:
        """k at each of `eigenvalues`, or at other ones: between those of this Y linear in sqrt(lambda), beyond constant.

        So a kernel moves to another label domain: ``other.kernel(among.multipliers(beta, other.eigenvalues))``.

        Parameters
        ----------
        beta
            Coefficients of a kernel of this set, shape (rank, rank).
        eigenvalues
            Where k is to be known, in 1 / (unit of length)^2, shape (any,).

        Returns
        -------
        numpy.ndarray
            k, shape (any,); with channels k_cd, shape (any, C, C).

        Raises
        ------
        TypeError, ValueError
            If an argument is no such array, or beta is not in the set.
        """
        beta = real_array("beta", beta, (self.rank, self.rank))
        refuse_outside(np.abs(beta - self.projected(beta)).max(), np.abs(beta).max(), f"a kernel of {self!r}")
        label, C = self._known["label"], self._channels
        k = (self.adjoint(None, None, beta).ravel() / np.sqrt(np.repeat(np.bincount(label), C**2))).reshape(-1, C, C)
        if eigenvalues is not None:
            at = real_array("eigenvalues", eigenvalues, ("any",))
            own, at = (np.sqrt(np.maximum(each, 0.0)) for each in (self.eigenvalues, at))
            k = np.column_stack([np.interp(at, own, one) for one in k.reshape(own.size, -1).T]).reshape(-1, C, C)
        return k[:, 0, 0] if C == 1 else k
