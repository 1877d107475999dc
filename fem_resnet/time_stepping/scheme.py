"""How the layers of a network are stepped: PETSc's options, what their method gives a layer, and what steps it.

`get_scheme` reads the options once. A scheme makes the stage of a layer and its stepper; which class of stepper that is, nobody
else asks.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import petsctools
from petsc4py import PETSc

from fem_resnet.activation.activation import Activation
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.layers.compiled_stage import CompiledStage, new_stage
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.layers.stage import Stage
from fem_resnet.layers.transposed_stage import TransposedStage
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.time_stepping.compiled_layer import CompiledStepper
from fem_resnet.time_stepping.discrete_gradient import DiscreteGradientStage, DiscreteGradientStepper
from fem_resnet.time_stepping.methods import METHODS, set_from_options, solver_options, tableau
from fem_resnet.time_stepping.petsc import adapt_type
from fem_resnet.time_stepping.stepper import Stepper
from fem_resnet.time_stepping.ts_stepper import TSStepper

__all__ = ["Scheme", "get_scheme"]


class Scheme:
    """A method of PETSc's TS, with its options.

    Parameters
    ----------
    options
        From `methods.solver_options`.
    steps
        Number of equal steps a layer; with adaptivity the first is of that size.

    Attributes
    ----------
    ts_type : str
        Its name.
    method : Method
        What it gives a layer.
    steps : int
        As above.
    adaptive : bool
        Whether steps are adapted.
    carries_f : bool
        Whether TS steps f, and not its coefficients alone, even without a running cost.

    Raises
    ------
    ValueError
        If PETSc does not know an option, or a layer cannot be stepped so.
    """

    def __init__(self, options: petsctools.OptionsManager, steps: int):
        self._options = options
        self.steps = steps
        self.ts_type = options.parameters["ts_type"]
        self.method = METHODS[self.ts_type]
        self.adaptive, self.carries_f = self._look()

    def _look(self) -> tuple[bool, bool]:
        """Whether steps are adapted, and whether f is stepped: a TS that only reads its options tells."""
        probe = PETSc.TS().create(comm=PETSc.COMM_SELF)
        set_from_options(probe, self._options)
        adaptive = adapt_type(probe) != "none"
        probe.destroy()
        return adaptive, adaptive or self.method.quadrature is None

    @property
    def solver_parameters(self) -> dict:
        """PETSc options in force, a copy."""
        return dict(self._options.parameters)

    @property
    def options_prefix(self) -> str:
        """Their prefix."""
        return self._options.options_prefix

    @property
    def tableau(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Matrix a_ij and weights b_i of the Runge-Kutta method; None where PETSc does not give them away."""
        return tableau(self._options)

    def refuse(self, *, precision: str, gradient_flow: bool) -> None:
        """Raise ValueError where a network of this precision, or the gradient flow, cannot be stepped so."""
        if precision == "single" and self.method.implicit:
            raise ValueError(
                f"precision: stages of {self.ts_type!r} are solved to round-off, for which 'single' is too coarse; take "
                f"'double', or an explicit method"
            )

    def refuse_running(self) -> None:
        """Raise ValueError where no running cost can be integrated."""

    def new_stage(self, Y: LabelSpace, activation: Activation, samples: int, precision: str, gradient_flow: bool) -> Stage:
        """Stage evaluations of a batch. Collective: C may be compiled."""
        stage = new_stage(Y, activation, samples, precision)
        return TransposedStage(stage) if gradient_flow else stage

    def new_stepper(
        self, layer: int, stage: Stage, kernel: LowRankKernel, orders: int = 1, cost: RunningCost | None = None,
        sees_constants: bool = False,
    ) -> Stepper:  # fmt: skip
        """What steps a layer.

        Parameters
        ----------
        layer
            Its number.
        stage
            From `new_stage`.
        kernel
            Its kernel, of which the ranks count.
        orders
            1; or 2, to step the tangent too.
        cost
            A running cost, if that is to be integrated too.
        sees_constants
            Whether the layer takes nothing that varies in its time, and no times or factors that are learned.
        """
        carries_f = self.carries_f or cost is not None
        if isinstance(stage, CompiledStage) and sees_constants and orders == 1 and not (self.method.implicit or carries_f):
            return CompiledStepper(layer, stage, kernel, self.steps, self._options)
        return TSStepper(
            layer, stage, kernel.psi.rank, self.steps, self._options, self.method, adaptive=self.adaptive, carries_f=carries_f,
            orders=orders, cost=cost,
        )  # fmt: skip


class DiscreteGradientScheme(Scheme):
    """The package's own: "discrete_gradient", a step by PETSc's SNES under which the energy falls at any step size."""

    def _look(self) -> tuple[bool, bool]:
        return False, False

    def refuse(self, *, precision: str, gradient_flow: bool) -> None:
        super().refuse(precision=precision, gradient_flow=gradient_flow)
        if gradient_flow:
            raise ValueError("gradient_flow: the discrete gradient is one of int Sigma(u) along (2.8); take another ts_type")

    def refuse_running(self) -> None:
        raise ValueError("running: the discrete gradient steps coefficients alone and integrates no running cost; give None")

    def new_stage(self, Y, activation, samples, precision, gradient_flow):
        return DiscreteGradientStage(Y, activation, samples, precision)

    def new_stepper(self, layer, stage, kernel, orders=1, cost=None, sees_constants=False):
        return DiscreteGradientStepper(layer, stage, kernel.psi.rank, self.steps, self._options, orders)


def get_scheme(solver_parameters: Mapping | None, options_prefix: str | None, steps: int) -> Scheme:
    """The scheme that PETSc options name.

    Parameters
    ----------
    solver_parameters, options_prefix
        As for `ResidualNetwork`.
    steps
        Number of equal steps a layer.

    Raises
    ------
    ValueError
        If the type is none of `METHODS`, PETSc does not know an option, or a layer cannot be stepped so.
    """
    options = solver_options(solver_parameters, options_prefix)
    make = DiscreteGradientScheme if options.parameters["ts_type"] == "discrete_gradient" else Scheme
    return make(options, steps)
