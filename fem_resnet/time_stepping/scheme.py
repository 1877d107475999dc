"""How the layers of a network are stepped: a method of PETSc's TS with its options, or the discrete gradient.

`get_scheme` reads the options once. The scheme then makes the stages, steppers and sequences of layers; no other code asks of
which class these are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import petsctools
from petsc4py import PETSc

from fem_resnet.activation.activation import Activation
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.layers.compiled_stage import CompiledStage, new_stage
from fem_resnet.layers.discrete_gradient_stage import DiscreteGradientStage
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.layers.stage import Stage
from fem_resnet.layers.transposed_stage import TransposedStage
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.petsc import adapt_type
from fem_resnet.time_stepping.compiled_layer import CompiledLayers, CompiledStepper
from fem_resnet.time_stepping.discrete_gradient import DiscreteGradientStepper
from fem_resnet.time_stepping.methods import METHODS
from fem_resnet.time_stepping.options import set_from_options, solver_options
from fem_resnet.time_stepping.stepper import LayerSequence, Stepper
from fem_resnet.time_stepping.tableau import probed_tableau
from fem_resnet.time_stepping.ts_stepper import TSStepper

__all__ = ["Scheme", "get_scheme"]


class Scheme:
    """A method of PETSc's TS, with its options.

    Parameters
    ----------
    options
        The options, from `options.solver_options`.
    steps
        Number of equal steps a layer; if steps are adapted, the first one has that size.

    Attributes
    ----------
    ts_type : str
        Name of the method.
    method : Method
        The method.
    steps : int
        As above.
    adaptive : bool
        Whether steps are adapted.
    carries_f : bool
        Whether TS steps f, and not g alone, even without a running cost.

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
        """Whether steps are adapted, and whether f is stepped, as a TS says that has read the options."""
        probe = PETSc.TS().create(comm=PETSc.COMM_SELF)
        set_from_options(probe, self._options)
        adaptive = adapt_type(probe) != "none"
        probe.destroy()
        return adaptive, adaptive or self.method.quadrature is None

    @property
    def solver_parameters(self) -> dict:
        """The PETSc options in force, a copy."""
        return dict(self._options.parameters)

    @property
    def options_prefix(self) -> str:
        """The prefix of these options."""
        return self._options.options_prefix

    @property
    def tableau(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Matrix a_ij and weights b_i of the Runge-Kutta method, shapes (stages, stages) and (stages,).

        None if the method is no Runge-Kutta method, or if PETSc does not give its coefficients away.
        """
        if self.method.matrix is None:
            return None
        ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
        set_from_options(ts, self._options)
        with self._options.inserted_options():
            found = self.method.matrix(ts), self.method.quadrature(ts)[0]
        ts.destroy()
        return found

    def explicit_tableau(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A_ij, b_i and c_i of an explicit method with fixed steps, shapes (stages, stages), (stages,), (stages,).

        Stages that nothing uses, which are there to estimate errors, are left out.

        Raises
        ------
        ValueError
            If the method is implicit, or adapts its steps.
        """
        if self.method.implicit or self.adaptive:
            raise ValueError(
                f"net: expected an explicit Runge-Kutta method with fixed steps, got {self.ts_type!r}"
                f"{' with steps that are adapted' if self.adaptive else ''}. Implicit schemes solve an equation in each step, "
                f"which is no finite number of sigma, and adapted steps depend on the inputs. Make the network with "
                f"{{'ts_type': 'rk'}} and any 'ts_rk_type'"
            )

        def new_ts() -> PETSc.TS:
            ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
            set_from_options(ts, self._options)
            return ts

        A, b, c = probed_tableau(new_ts)
        used = b.astype(bool) | A.any(axis=0)
        return A[np.ix_(used, used)], b[used], c[used]

    def refuse(self, *, precision: str, gradient_flow: bool) -> None:
        """Refuse a network of this precision, or a gradient flow, if the method cannot step it.

        Raises
        ------
        ValueError
            If it cannot.
        """
        if precision == "single" and self.method.implicit:
            raise ValueError(
                f"precision: expected 'double' with {self.ts_type!r}, whose stages are solved to round-off, got 'single'; "
                f"take 'double', or an explicit method"
            )

    def refuse_running(self) -> None:
        """Refuse a running cost if the method cannot integrate it.

        Raises
        ------
        ValueError
            If it cannot.
        """

    def new_stage(self, Y: LabelSpace, activation: Activation, samples: int, precision: str, gradient_flow: bool) -> Stage:
        """Stage evaluations for a batch of so many samples. Collective: C may be compiled.

        Parameters
        ----------
        Y, activation, samples, precision
            As for `Stage`.
        gradient_flow
            Whether the layers step f_t = B^T sigma(a - B f).
        """
        stage = new_stage(Y, activation, samples, precision)
        return TransposedStage(stage) if gradient_flow else stage

    def new_stepper(
        self, layer: int, stage: Stage, kernel: LowRankKernel, orders: int = 1, cost: RunningCost | None = None,
        sees_constants: bool = False,
    ) -> Stepper:  # fmt: skip
        """A stepper for a layer.

        Parameters
        ----------
        layer
            Number of the layer.
        stage
            From `new_stage`.
        kernel
            A kernel with the ranks of the layer's.
        orders
            1; or 2, to step the tangent too.
        cost
            A running cost, to integrate it too.
        sees_constants
            Whether bias and kernel do not vary in the time of the layer, and times and factors are fixed.
        """
        carries_f = self.carries_f or cost is not None
        if isinstance(stage, CompiledStage) and sees_constants and orders == 1 and not (self.method.implicit or carries_f):
            return CompiledStepper(layer, stage, kernel, self.steps, self._options)
        return TSStepper(
            layer, stage, kernel.psi.rank, self.steps, self._options, self.method, adaptive=self.adaptive, carries_f=carries_f,
            orders=orders, cost=cost,
        )  # fmt: skip

    def new_sequence(self, steppers: Sequence[Stepper]) -> LayerSequence:
        """Consecutive layers with one psi, from their steppers in order: those in C are stepped by one call."""
        compiled = [stepper for stepper in steppers if isinstance(stepper, CompiledStepper)]
        return CompiledLayers(compiled) if len(compiled) == len(steppers) else LayerSequence(steppers)


class DiscreteGradientScheme(Scheme):
    """The package's own method "discrete_gradient": a step by PETSc's SNES under which the energy falls at any step size."""

    def _look(self) -> tuple[bool, bool]:
        return False, False

    def refuse(self, *, precision: str, gradient_flow: bool) -> None:
        super().refuse(precision=precision, gradient_flow=gradient_flow)
        if gradient_flow:
            raise ValueError(
                "gradient_flow: expected False with 'ts_type' 'discrete_gradient', whose energy belongs to (2.8), got True; "
                "take another 'ts_type'"
            )

    def refuse_running(self) -> None:
        raise ValueError(
            "running: expected None with 'ts_type' 'discrete_gradient', which cannot integrate a running cost, got one; leave "
            "it out, or take another 'ts_type'"
        )

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
    TypeError, ValueError
        If the options are no dictionary of PETSc options, the type is none of `METHODS`, PETSc does not know an option, or a
        layer cannot have one.
    """
    options = solver_options(solver_parameters, options_prefix)
    make = DiscreteGradientScheme if options.parameters["ts_type"] == "discrete_gradient" else Scheme
    return make(options, steps)
