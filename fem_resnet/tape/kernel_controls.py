"""A kernel that is made of free controls (`stable_kernels`), as a parameter of a network.

What is learned are the controls X_k, one set a function in time; what layers and regularisers see are beta_k = P(X_k), which
`KernelControls.acting` records on the tape. Whoever reads coefficients sees beta.
"""

from __future__ import annotations

from collections.abc import Sequence

import firedrake as fd
import numpy as np
from mpi4py import MPI
from pyadjoint import Control

from fem_resnet.parameters.kernel import KernelCoefficients
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import SpaceBasis
from fem_resnet.parameters.stable_kernels import KernelMap, MatrixControls, StableKernel
from fem_resnet.parameters.time_basis import TimeBasis
from fem_resnet.tape.blocks import apply

__all__ = ["KernelControls", "StableKernelParameter"]


class KernelControls(Parameter):
    """The free controls X of a kernel: what is learned. Regularisers take the kernel that they make, see `acting`."""

    def __init__(self, kernel: StableKernelParameter, space_basis, time_basis: TimeBasis):
        super().__init__("kernel_controls", space_basis, time_basis)
        self._kernel = kernel

    def acting(self) -> Parameter:
        """The kernel, in Functions of its own that are recorded while annotating."""
        kernel = self._kernel
        functions = [apply(kernel.map(k), [function])[0] for k, function in enumerate(self.functions)]
        return Parameter(kernel.name, kernel._space_basis, self.time_basis, functions)


class StableKernelParameter(Parameter):
    """The kernel of a network whose coefficients beta are made of free controls.

    `get` and `set` speak of beta, and `functions` hold it; they follow the controls, and are no controls themselves.

    Parameters
    ----------
    choice
        The set of kernels.
    space_basis, time_basis
        As for `Parameter`, those of beta.

    Attributes
    ----------
    learned : KernelControls
        The free controls.
    """

    def __init__(
        self, choice: StableKernel, space_basis: KernelCoefficients | Sequence[KernelCoefficients], time_basis: TimeBasis
    ):
        self._choice = choice
        self._versions: list[int] | None = None
        super().__init__("kernel", space_basis, time_basis)
        made: dict[SpaceBasis, MatrixControls] = {}
        for basis in self.space_bases:
            if choice.symmetric and basis.kernel.phi is not basis.kernel.psi:
                raise ValueError(
                    f"stable_kernel: {type(choice).__name__} wants one basis for phi and psi, got two; leave psi out"
                )
            if basis not in made:
                made[basis] = choice.controls(basis.kernel)
        if isinstance(space_basis, SpaceBasis):
            controls = made[space_basis] if made else choice.controls(space_basis.kernel)
        else:
            controls = [made[basis] for basis in space_basis]
        self._learned = KernelControls(self, controls, time_basis)
        for k, basis in enumerate(self.space_bases):
            self._learned.set(k, choice.start(basis.kernel))

    @property
    def learned(self) -> KernelControls:
        return self._learned

    def map(self, k: int) -> KernelMap:
        """The operator from X_k to beta_k, a new one."""
        return KernelMap(self._choice, self._learned.space_bases[k], self.space_bases[k])

    @property
    def functions(self) -> tuple[fd.Function, ...]:
        """What holds beta_k at the present controls. Collective."""
        if getattr(self, "_learned", None) is not None:
            versions = [function.dat.dat_version for function in self._learned.functions]
            # One rank alone may have looked at the data.
            if self._comm.allreduce(versions != self._versions, op=MPI.LOR):
                for k, function in enumerate(self._functions):
                    self.space_bases[k].write(function, self.read(k))
                self._versions = versions
        return self._functions

    def read(self, k: int) -> np.ndarray:
        """beta_k. Collective."""
        return self.map(k).forward([self._learned.read(k)], False)

    def write(self, k: int, coefficients: np.ndarray) -> None:
        """Give the controls values that make this beta_k; a ValueError if it is not in the set."""
        self._learned.write(k, self._choice.inverse(self.space_bases[k].kernel, coefficients))

    def controls(self) -> list[Control]:
        """Those of the free controls."""
        return self._learned.controls()
