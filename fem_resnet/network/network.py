"""The residual network: (2.8) on a label domain, layer by layer.

    f_t(y, t) = sigma( a(y, t) - int_Y b(y, z, t) f(z, t) dz ),    f(y, 0) = f_I(y),    0 <= t <= T

or, at the end of section 3.5, the gradient flow f_t = B^T sigma(a - B f), in which solutions never part if sigma' >= 0.
Layer l is the time interval (t_l, t_(l+1)). Bias a and kernel b have coefficients of their own on each layer, or values at
the layer times with a line between them (the interpolants a^tau, B^tau of section 2.1), or values that layers share.

`settings` says what a network is made of, `network_parameters` what it learns, `solver` how it is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType, NoneType

import firedrake as fd
import numpy as np
import sympy
from petsc4py import PETSc

from fem_resnet.activation.activation import Activation
from fem_resnet.arguments import choice, instance, integer, number
from fem_resnet.features import STEPPED, supports
from fem_resnet.fixed import OnMesh
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.layers.inputs import LayerCoefficients, LayerInputs
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.network.network_parameters import NetworkParameters
from fem_resnet.network.other_networks import copy_coefficients, in_first, moved, padded, truncated
from fem_resnet.network.run import Run
from fem_resnet.network.segment import Segment
from fem_resnet.network.settings import Bias, Kernel, Layers, settings_of
from fem_resnet.network.solver import Solver
from fem_resnet.network.starting_values import RULES, root_mean_square, start
from fem_resnet.parameters.kernel import LowRankKernel
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.ranks import same
from fem_resnet.time_stepping.scheme import get_scheme

__all__ = ["ResidualNetwork"]

#: What PETSc's option `-citations` prints of a program that has made a network, beside the citations of Firedrake and PETSc.
_PAPER = """@article{LiuMarkowich2020,
  author = {Liu, Hailiang and Markowich, Peter},
  title = {Selection dynamics for deep neural networks},
  journal = {Journal of Differential Equations},
  volume = {269},
  year = {2020}
}
"""


class ResidualNetwork(OnMesh):
    """A network on a label domain; its parameters start at zero.

    Everything here is collective over the communicator of the label domain. Coefficients may be changed at any time (`set`).
    All else stays what the network was made with, and `replace` makes another network.

    `copy.deepcopy` copies the coefficients and shares label domain and bases; for other processes there are `save` and `load`.

    Parameters
    ----------
    kernel
        A `Kernel`; or a basis for its phi and psi, or a list with one a layer.
    bias
        A `Bias`; or its basis, or a list with one a layer; None for a value at every node.
    layers
        `Layers`; or a number L >= 0 of layers of equal length; or the layer times 0 = t_0 < .. < t_L, shape (L + 1,), no unit.
    final_time
        T > 0 where a number of layers is given; 1 if left out.
    activation
        sigma, its name, or a SymPy expression in s (`Activation.from_sympy`).
    gradient_flow
        Whether the network is `f_t = B^T sigma(a - B f)` (end of 3.5) in place of (2.8): down the gradient of
        int Sigma(a - B f), which is convex if sigma' >= 0. Then no two solutions part in L2, nor those of the discrete
        network if its steps are short enough: see `theory.contraction`. (The paper prints sigma' <= 0.)
    solver_parameters, options_prefix
        PETSc options of the TS and its SNES and KSP: Runge-Kutta of order 4 with fixed steps if left out. Types with a
        gradient are rk, theta, beuler, cn, arkimex and dirk, and the package's own discrete_gradient, which is
        energy-stable at any step size; `time_stepping.methods` lists all types. For PETSc's implicit types
        "mat_type" may be "matfree". With the "ts_adapt_type" "basic" or "dsp", steps are judged by the error of f in the label
        measure.
        Options that would change start, end or steps without a word are refused (`time_stepping.options`).
    replay_steps
        Whether evaluations and derivatives of a recorded run take the steps that were adapted when it was recorded.
    precision
        "double", or "single": stages then hold their values at the nodes (bases, u, sigma, adjoint values) in float32. That
        halves the memory that they read and doubles the numbers in a vector of the processor. Sums over Y, coefficients,
        parameters and f stay float64. J and gradients are good to about 1e-6 of their size. For explicit methods.

    Attributes
    ----------
    Y : LabelSpace
        The label space that it lives on.
    settings : Settings
        What the network was made with, checked.
    bias, kernel : Parameter
        a and beta; ``kernel.set(l, beta)`` gives layer l its coefficients, or the layer time t_l, or group l.
    layer_times : Parameter or None
        t_1 .. t_L, where they are learned.
    factors : tuple of Parameter
        "phi" and "psi", where they are learned.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what is said above, or differs between ranks; the message names it, and of a `Kernel`, a `Bias`
        or `Layers` the part, as in "kernel.psi".

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, laplace_basis
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> net = ResidualNetwork(laplace_basis(Y, 6), layers=2, activation="identity")
    >>> _ = net.bias.functions[0].assign(1.0)
    >>> round(float(net(Y.batch(0 * Y.weights)).dat.data_ro.max()), 12)
    0.5
    """

    _instead = "replace(..) gives another network with other settings, parameters take values by `set`"
    _instead_of_pickling = "save(path, net) and load(path) write and read it on any number of ranks"

    def __init__(
        self,
        kernel: Kernel | Basis | Sequence[Basis],
        *,
        bias: Bias | Basis | Sequence[Basis | None] | None = None,
        layers: Layers | int | Sequence[float] = 8,
        final_time: float | None = None,
        activation: str | Activation | sympy.Expr = "tanh",
        gradient_flow: bool = False,
        solver_parameters: dict | None = None,
        options_prefix: str | None = None,
        replay_steps: bool = True,
        precision: str = "double",
    ):
        settings = settings_of(
            kernel, bias, layers, final_time, activation=activation, gradient_flow=gradient_flow,
            solver_parameters=solver_parameters, options_prefix=options_prefix, replay_steps=replay_steps, precision=precision,
        )  # fmt: skip
        PETSc.Sys.registerCitation(_PAPER)
        self.Y = settings.Y
        self._scheme = get_scheme(solver_parameters, options_prefix, settings.layers.steps)
        self.settings = replace(settings, solver_parameters=MappingProxyType(self._scheme.solver_parameters))
        self._scheme.refuse(precision=precision, gradient_flow=gradient_flow)
        self._parameters = NetworkParameters(self.settings)
        self._solver = Solver(self.settings, self._parameters, self._scheme)

    def __repr__(self) -> str:
        return f"ResidualNetwork({self.layers} layers, T = {self.times[-1]:g}, {self.activation.name}, {self.Y!r})"

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> int:
        """The number L of layers."""
        return len(self.settings.times) - 1

    @property
    def steps(self) -> int:
        """Number of equal time steps a layer; where steps are adapted, the first has this size."""
        return self.settings.layers.steps

    @property
    def activation(self) -> Activation:
        """The activation sigma."""
        return self.settings.activation

    @property
    def gradient_flow(self) -> bool:
        """Whether it is the gradient flow f_t = B^T sigma(a - B f)."""
        return self.settings.gradient_flow

    @property
    def bases(self) -> Mapping[str, tuple[Basis | None, ...]]:
        """The bases "phi", "psi" and "bias": each a tuple of one for all layers, or of one a layer."""
        settings = self.settings
        return MappingProxyType({"phi": settings.phi, "psi": settings.psi, "bias": settings.bias_bases})

    @property
    def solver_parameters(self) -> dict:
        """PETSc options in force, a copy."""
        return self._scheme.solver_parameters

    @property
    def options_prefix(self) -> str:
        """Their prefix."""
        return self._scheme.options_prefix

    @property
    def tableau(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Matrix a_ij, shape (stages, stages), and weights b_i, shape (stages,), of its Runge-Kutta method.

        None where PETSc does not give them away.
        """
        return self._scheme.tableau

    def explicit_tableau(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A_ij, b_i and c_i of an explicit method with fixed steps, shapes (stages, stages), (stages,), (stages,); no unit.

        Of every explicit "ts_type" of PETSc. Stages that nothing uses, which are there to estimate errors, are left out.

        Raises
        ------
        ValueError
            If the method is implicit, or adapts its steps.
        """
        return self._scheme.explicit_tableau()

    # -- what it has learned -------------------------------------------------------------------------------------------

    @property
    def bias(self) -> Parameter:
        """The bias a."""
        return self._parameters.bias

    @property
    def kernel(self) -> Parameter:
        """The coefficients beta of the kernel."""
        return self._parameters.kernel

    @property
    def layer_times(self) -> Parameter | None:
        """The layer times t_1 .. t_L, where they are learned."""
        return self._parameters.layer_times

    @property
    def factors(self) -> tuple[Parameter, ...]:
        """The parameters "phi" and "psi", where they are learned."""
        return self._parameters.factors

    @property
    def parameters(self) -> list[Parameter]:
        """Bias, and kernel or the controls that it is made of; layer times and factors, where they are learned."""
        return self._parameters.learned

    @property
    def times(self) -> np.ndarray:
        """Layer times t_0 .. t_L, shape (L + 1,), float64; no unit. Collective where they are learned."""
        return self._parameters.times

    def coefficients(self) -> LayerCoefficients:
        """Which coefficients of bias and kernel each layer takes."""
        return self._parameters.coefficients()

    def layer_inputs(self) -> list[LayerInputs]:
        """What each layer takes at the present parameters: times, factors, a and beta over time. Collective."""
        return self._parameters.layer_inputs()

    def learned_factors(self) -> LowRankKernel:
        """The factors at present: the given ones, or what training has made of them. Collective."""
        return self._parameters.learned_factors()

    def start(
        self,
        rule: str = "minus identity",
        seed: int = 0,
        *,
        gain: float = 1.0,
        width: float = 2.0,
        data: fd.Function | None = None,
    ) -> None:
        """Give the kernel starting values, and make the bias 0; layer times and learned factors stay. Collective.

        A network whose kernel is zero acts linearly, and its first steps stay near that: `stability_report` says so. Which
        rule is good for which data is measured in docs/explanation/decisions.md.

        Parameters
        ----------
        rule
            - "zero": all coefficients are 0.
            - "minus identity": B = -gain times the identity on the span of psi, projected onto that of phi. With channels it
              takes each of them to itself: data in one channel do not come into the others.
            - "local": B = -gain times a heat kernel, e^(t Laplace) on the span of psi, whose `eigenvalues` must be known.
              With C channels each pair of them has this kernel, times a random number of variance 1/C. A linear set of
              kernels, such as `Symmetric`, has the nearest one; or, between channels on which a map acts with different
              signs, the nearest one to a heat kernel times a smooth function of (y, z).
            - "random smooth": random coefficients in orthonormal functions, which fall like 1/k with the number k of the
              function. The norm of b in L2(Y x Y) is `gain` in the mean square. In a linear set of kernels
              the couplings of functions fall like 1/k with the number k of their eigenspace.
        seed
            Of random numbers: the same coefficients on any number of ranks.
        gain
            The factor of all values; those of B have the unit of 1/f. A negative one gives plus the identity.
        width
            Of the heat kernel: t = width^2 / (largest eigenvalue of psi). 2 makes it two or three nodes wide where the nodes
            are just as many as the basis needs.
        data
            Inputs, on Y. The gain is divided by their root mean square over Y and all samples. The kernels then make of them
            what they make of inputs of size one.

        Raises
        ------
        TypeError, ValueError
            If an argument does not fit or differs between ranks; if all data are 0; if the kernel stays in a set
            (`Kernel(among=..)`) that does not have such a kernel, or "local" does not know the eigenvalues. Nothing is changed
            then.

        Examples
        --------
        >>> from firedrake import FunctionSpace, UnitDiskMesh
        >>> from fem_resnet import LabelSpace, laplace_basis
        >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
        >>> net = ResidualNetwork(laplace_basis(Y, 3), layers=1)
        >>> net.start("minus identity")
        >>> (net.kernel.get(0).round(12) + 0.0).tolist()
        [[-1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, -1.0]]
        """
        same(self.Y.comm, rule=rule, seed=seed, gain=gain, width=width, data=data is None)
        choice("rule", rule, RULES)
        seed, gain, width = integer("seed", seed, least=0, most=np.inf), number("gain", gain), number("width", width, above=0)
        start(self, rule, seed, gain if data is None else gain / root_mean_square(self.Y, data), width)

    # -- what it does --------------------------------------------------------------------------------------------------

    def __call__(self, initial: fd.Function) -> fd.Function:
        """f(T) for the initial state `initial`: `run(initial).final`."""
        return self.run(initial).final

    def run(
        self,
        initial: fd.Function,
        running: RunningCost | None = None,
        weights: Sequence[float] | None = None,
        *,
        seen_by: Basis | None = None,
        observed: Sequence[int] = (),
    ) -> Run:
        """Solve (2.8); while pyadjoint annotates, record it.

        Parameters
        ----------
        initial
            f_I, a Function of `Y.V` or a batch (`Y.batch`, `Y.batch_space`); finite.
        running
            A running cost, to be integrated on the way: `cost` of the Run. The TS then steps f, not its coefficients
            alone.
        weights
            Weights of the samples in that cost, shape (samples,), numbers >= 0 of which only the proportions matter; equal
            ones if left out.
        seen_by
            A basis for which `steps_what_is_seen_by` is true. The run then records g(T) = Psi^T M f(T) in place of f(T), and
            computes nothing of size nodes x samples.
        observed
            Numbers l of layer times t_l, shape (times,), each once. While annotating, the states there become outputs of the
            tape at once. `Run.state` makes them outputs too, but the first derivative then solves the layers again.

        Returns
        -------
        Run
            With the final state, the states at all layer times and, after a derivative, the co-states.

        Raises
        ------
        TypeError, ValueError
            If `initial` does not fit (the message names the sample where a value is not finite), or another argument does not,
            or differs between ranks.
        StepFailure
            If a layer cannot be stepped, as where the state overflows.
        """
        same(self.Y.comm, running=running, weights=weights, seen_by=seen_by, observed=observed)
        self.Y.check_where(initial, "initial")
        instance("running", running, (RunningCost, NoneType))
        instance("seen_by", seen_by, (Basis, NoneType))
        given = instance("observed", observed, (list, tuple, range), "numbers of layer times")
        observed = tuple(integer("observed", layer, least=0, most=self.layers) for layer in given)
        if len(set(observed)) < len(observed):
            raise ValueError(f"observed: expected different integers from 0 to L = {self.layers}, got {observed!r}")
        return self.solve(initial, running, weights, seen_by=seen_by, observed=observed)

    @PETSc.Log.EventDecorator("fem_resnet:run")
    def solve(
        self,
        initial: fd.Function,
        running: RunningCost | None = None,
        weights: Sequence[float] | None = None,
        *,
        seen_by: Basis | None = None,
        observed: Sequence[int] = (),
    ) -> Run:
        """As `run`, for arguments that are checked already. Collective.

        Parameters
        ----------
        initial, running, weights, seen_by, observed
            As for `run`: weights of shape (samples,), observed layer times of shape (times,).
        """
        return Run(self, self._solver.new_segments, self._solver.solve(initial, running, weights, seen_by, observed))

    def steps_what_is_seen_by(self, psi: Basis) -> bool:
        """Whether layers step nothing but g = Psi^T M f.

        They do where psi is the same Basis object for all layers, is not learned, and the steps need f nowhere.

        Raises
        ------
        TypeError
            If psi is no Basis.
        """
        instance("psi", psi, Basis)
        return self._solver.steps_what_is_seen_by(psi)

    @property
    def blocks(self) -> int:
        """How many Blocks the layers make on a tape."""
        return self._solver.blocks

    def layer_segments(
        self,
        space: fd.functionspaceimpl.WithGeometry,
        running: RunningCost | None = None,
        omega: np.ndarray | None = None,
    ) -> list[Segment]:
        """Each layer as an operator between arrays, outside of any tape.

        The segments share steppers: a segment can be adjoined until another one is solved.

        Parameters
        ----------
        space
            Of the state: `Y.V`, or `Y.batch_space(samples)`.
        running, omega
            A running cost, and the weights of the samples in it, shape (samples,), which add up to 1.
        """
        return self._solver.layer_segments(space, running, omega)

    def sample_segment(self, space: fd.functionspaceimpl.WithGeometry, *, seen_by: Basis | None = None) -> Segment:
        """All layers as an operator whose adjoint gives functionals of each sample apart, outside of any tape. Collective.

        The bias has bases, times and factors are fixed, and PETSc's TS steps (2.8). The coefficients are all that is learned
        of bias and kernel, `Segment.functions`. Where the adjoint of other segments gives a functional of the shape of
        coefficients, it has shape (number of coefficients, samples) here.

        Parameters
        ----------
        space
            Of the state: `Y.V`, or `Y.batch_space(samples)`.
        seen_by
            The psi of all layers, where the segment is to take and give g = Psi^T M f: see `steps_what_is_seen_by`.

        Raises
        ------
        ValueError
            If the bias has values at nodes.
        """
        return self._solver.sample_segment(space, seen_by)

    # -- what other networks are made of it ----------------------------------------------------------------------------

    def replace(self, **changes) -> ResidualNetwork:
        """The network with some arguments of the constructor changed, and all others as they are. Collective.

        Where kernel, bias, layer times and what is learned stay, the parameters of the other network are the very same
        objects as those of this one: who trains one trains both. Else they are new, and zero.

        Parameters
        ----------
        **changes
            Arguments of the constructor. `dataclasses.replace` changes a part of a `Kernel`, a `Bias` or `Layers`.

        Raises
        ------
        TypeError, ValueError
            If there is no such argument, or as the constructor; or if other arguments are changed on other ranks.

        Examples
        --------
        >>> from dataclasses import replace  # doctest: +SKIP
        >>> finer = net.replace(layers=replace(net.settings.layers, steps=2 * net.steps))  # doctest: +SKIP
        >>> finer.kernel is net.kernel  # doctest: +SKIP
        True
        """
        given = self.settings.arguments
        same(self.Y.comm, replace=sorted(changes))
        unknown = sorted(set(changes) - set(given) - {"final_time"})
        if unknown:
            raise TypeError(f"replace: expected some of {', '.join(given)}, got {', '.join(unknown)}")
        other = ResidualNetwork(**given | changes)
        if other.settings.has_parameters_of(self.settings):
            other._parameters = self._parameters
            other._solver = Solver(other.settings, self._parameters, other._scheme)
        return other

    def __deepcopy__(self, memo: Mapping) -> ResidualNetwork:
        other = ResidualNetwork(**self.settings.arguments)
        copy_coefficients(self, other)
        return other

    @supports(
        "channels",
        "no_layers", "gradient_flow", "learned_times", "kernel_set", "bases_by_layer", "linear_in_time", "shared_in_time",
        *STEPPED,
    )  # fmt: skip
    def on(self, Y: LabelSpace) -> ResidualNetwork:
        """The same network on another label space of the same Y, finer, coarser, of other cells; or on another label domain.

        Its bases are moved there (`Basis.on`), its coefficients copied. To another domain only functions of the Laplacian go,
        kernels of `LaplaceFunctions`: phi are the eigenfunctions there, up to the largest eigenvalue here, and multipliers are
        linear in sqrt(lambda) between the eigenvalues here. A bias must be constant then. Two spaces are of different domains
        if they differ in dimension, holes, measure, centre or spread by more than a coarse mesh does; a graph differs from
        every other.

        Parameters
        ----------
        Y
            The other label space, of as many channels.

        Raises
        ------
        TypeError
            If `Y` is no LabelSpace.
        ValueError
            If the bias has a value at every node or factors are learned, so that the network is tied to its mesh; or a basis
            is, or cannot be had on that one; or Y is another domain and the kernels are no functions of the Laplacian, or a
            bias is not constant.

        Examples
        --------
        >>> from firedrake import FunctionSpace, UnitDiskMesh, UnitIcosahedralSphereMesh
        >>> from fem_resnet import Bias, Kernel, LabelSpace, LaplaceFunctions, given_basis, laplace_basis
        >>> disk, sphere = (
        ...     LabelSpace(FunctionSpace(mesh, "CG", 1)) for mesh in (UnitDiskMesh(3), UnitIcosahedralSphereMesh(2))
        ... )
        >>> phi = laplace_basis(disk, 6)
        >>> among = LaplaceFunctions(phi, split=0.05)
        >>> net = ResidualNetwork(Kernel(phi, among=among), bias=Bias(given_basis(disk, [1.0])), layers=1)
        >>> net.kernel.set(0, among.kernel([1.0, 2.0, 3.0, 4.0]))  # k at 0, 3.4, 9.3 and 14.4
        >>> net.on(sphere).kernel.get(0).diagonal()[[0, 1, 4, 9]].round(1).tolist()  # at 0, 2, 6 and 12
        [1.0, 1.8, 2.5, 3.4]
        """
        check_label_space(Y)
        return moved(self, Y)

    @supports(
        "channels", "no_layers", "gradient_flow", "learned_times", "kernel_set", "nodal_bias", "bases_by_layer",
        "linear_in_time", "shared_in_time", *STEPPED,
    )  # fmt: skip
    def in_first(self, rank: int) -> ResidualNetwork:
        """The network in the first functions of its bases, with their coefficients: of phi, psi and bias. Collective.

        Bases that have no more functions stay, and so does a bias with a value at every node. A kernel stays in its set. `pad`
        is the way back.

        Parameters
        ----------
        rank
            How many functions, at least 1.

        Raises
        ------
        ValueError
            If that is no positive integer or differs between ranks; if functions have no order (indicators of cells); if the
            kernel's set does not have the leading coefficients, or has no kernels on these functions alone: where they
            cut an eigenspace of `Symmetric` or `LaplaceFunctions`, for `DampedAntisymmetric` with damping, and for
            `PositiveSemidefinite` of a larger rank.

        Examples
        --------
        >>> from firedrake import FunctionSpace, UnitDiskMesh
        >>> from fem_resnet import LabelSpace, laplace_basis
        >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
        >>> net = ResidualNetwork(laplace_basis(Y, 6), layers=1)
        >>> small = net.in_first(1)
        >>> small.kernel.set(0, [[2.0]])
        >>> net.pad(small)
        >>> net.kernel.get(0)[:2, :2].tolist()
        [[2.0, 0.0], [0.0, 0.0]]
        """
        same(self.Y.comm, rank=rank)
        return in_first(self, integer("rank", rank, most=np.inf))

    def pad(self, net: ResidualNetwork) -> None:
        """Take the coefficients of a network in the first functions of the bases, padded by zeros. Collective.

        Both networks are then the same map.

        Parameters
        ----------
        net
            As `in_first` of this network has made it, or of one in more of these functions.

        Raises
        ------
        TypeError, ValueError
            If it is no such network.
        """
        padded(self, instance("net", net, ResidualNetwork))

    @supports(
        "channels", "gradient_flow", "learned_factors", "learned_times", "kernel_set", "nodal_bias", "linear_in_time",
        "shared_in_time", *STEPPED,
    )  # fmt: skip
    def truncated(self, tolerance: float) -> ResidualNetwork:
        """The network with kernels of lower rank: singular values below a part `tolerance` of the largest are cut.

        All layers keep one phi and one psi, the singular functions of all kernels together in the measure of label domain
        and time; what is cut is at most the root of the sum of squares of the singular values that are. Collective.

        Parameters
        ----------
        tolerance
            In [0, 1); no unit. The kernel of the new network is free, whatever it is made of here.

        Raises
        ------
        ValueError
            If the tolerance is not in that range, or layers have factors of their own; or ranks give others.
        """
        same(self.Y.comm, tolerance=tolerance)
        tolerance = number("tolerance", tolerance, least=0, below=1)
        return truncated(self, tolerance)
