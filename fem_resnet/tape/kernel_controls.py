"""A kernel that is made of free controls (`kernel_sets`), as a parameter of a network.

The controls X_k are learned, one set for each function in time. Layers and regularisers see beta_k = P(X_k), which
`KernelControls.acting` records on the tape. The methods for coefficients speak of beta.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import firedrake as fd
import numpy as np
import scipy.sparse
from mpi4py import MPI
from pyadjoint import Control
from pyadjoint.tape import stop_annotating

from fem_resnet.parameters.kernel import KernelCoefficients, kernel_coefficients
from fem_resnet.parameters.kernel_sets import KernelMap, KernelSet, MatrixControls
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.time_basis import TimeBasis
from fem_resnet.tape.recording import apply

__all__ = ["KernelControls", "KernelSetParameter", "MadeKernel"]


class MadeKernel(Parameter):
    """A kernel that knows the set `among` that it is of."""

    def __init__(self, among: KernelSet, *arguments):
        self.among = among
        super().__init__(*arguments)

    def __deepcopy__(self, memo: Mapping) -> MadeKernel:
        with stop_annotating():
            functions = [function.copy(deepcopy=True) for function in self.functions]
        return MadeKernel(self.among, self.name, self._space_basis, self.time_basis, functions)


class KernelControls(Parameter):
    """The free controls X of a kernel, which are learned. A regulariser takes the kernel that they make, see `acting`.

    Parameters
    ----------
    kernel
        The kernel.
    space_basis, time_basis
        As for `Parameter`, for X.
    """

    def __init__(self, kernel: KernelSetParameter, space_basis, time_basis: TimeBasis):
        super().__init__("kernel_controls", space_basis, time_basis)
        self._kernel = kernel

    @property
    def linear(self) -> bool:
        """Whether the kernel is a linear function of them."""
        return all(self._kernel.map(k).linear for k in range(len(self.functions)))

    def derivative(self) -> scipy.sparse.sparray:
        """The derivative of all beta_k in all X_k, each in the order of its rows, one block for each k. Collective."""
        blocks = [self._kernel.map(k).derivative(self.read(k)) for k in range(len(self.functions))]
        return scipy.sparse.block_diag(blocks, format="csr")

    def acting(self) -> Parameter:
        """The kernel in new Functions, whose making is recorded while annotating. Collective."""
        kernel = self._kernel
        functions = [apply(kernel.map(k), [function])[0] for k, function in enumerate(self.functions)]
        return MadeKernel(kernel.among, kernel.name, kernel._space_basis, self.time_basis, functions)


class KernelSetParameter(Parameter):
    """The kernel of a network whose coefficients beta are made of free controls.

    `get` and `set` speak of beta. The Functions of `functions` hold beta; they follow the controls and are no controls
    themselves.

    Parameters
    ----------
    choice
        The set of kernels.
    space_basis, time_basis
        As for `Parameter`, for beta.

    Attributes
    ----------
    learned : KernelControls
        The free controls.

    Raises
    ------
    ValueError
        If the kernels of the set are symmetric, and phi and psi are different bases.
    """

    def __init__(
        self, choice: KernelSet, space_basis: KernelCoefficients | Sequence[KernelCoefficients], time_basis: TimeBasis
    ):
        self._choice = choice
        self._versions: list[int] | None = None
        super().__init__("kernel", space_basis, time_basis)
        self._of_beta = [kernel_coefficients(basis) for basis in self.space_bases]
        made: dict[KernelCoefficients, MatrixControls] = {}
        for basis in self._of_beta:
            if choice.symmetric and basis.kernel.phi is not basis.kernel.psi:
                raise ValueError(
                    f"kernel.among: expected one basis for phi and psi with {type(choice).__name__}, got two; leave psi out"
                )
            if basis not in made:
                made[basis] = choice.controls(basis.kernel)
        self._of_controls = [made[basis] for basis in self._of_beta]
        if isinstance(space_basis, KernelCoefficients):
            one = made[space_basis] if made else choice.controls(space_basis.kernel)
            self._learned = KernelControls(self, one, time_basis)
        else:
            self._learned = KernelControls(self, [made[basis] for basis in space_basis], time_basis)
        for k, basis in enumerate(self._of_beta):
            self._learned.set(k, choice.start(basis.kernel))

    @property
    def learned(self) -> KernelControls:
        return self._learned

    @property
    def among(self) -> KernelSet:
        """The set of kernels."""
        return self._choice

    def map(self, k: int) -> KernelMap:
        """A new operator from X_k to beta_k."""
        return KernelMap(self._choice, self._of_controls[k], self._of_beta[k])

    @property
    def functions(self) -> tuple[fd.Function, ...]:
        """The Functions that hold beta_k for the present controls. Collective."""
        versions = [function.dat.dat_version for function in self._learned.functions]
        # One rank alone may have touched the data.
        if self._comm.allreduce(versions != self._versions, op=MPI.LOR):
            for k, function in enumerate(self._functions):
                self._of_beta[k].write(function, self.read(k))
            self._versions = versions
        return self._functions

    def read(self, k: int) -> np.ndarray:
        """beta_k, shape (rank of phi, rank of psi). Collective."""
        return self.map(k).forward([self._learned.read(k)], False)

    def write(self, k: int, coefficients: np.ndarray) -> None:
        """Give the controls values that make this beta_k.

        Parameters
        ----------
        k
            Number of the function in time.
        coefficients
            beta_k, shape (rank of phi, rank of psi).

        Raises
        ------
        ValueError
            If beta_k is not in the set.
        """
        self._learned.write(k, self._choice.inverse(self._of_beta[k].kernel, coefficients))

    def controls(self) -> list[Control]:
        """The pyadjoint Controls of the free controls."""
        return self._learned.controls()
