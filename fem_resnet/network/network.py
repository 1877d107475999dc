"""The residual network: (2.8) on a label domain, layer by layer.

    f_t(y, t) = sigma( a(y, t) - int_Y b(y, z, t) f(z, t) dz ),    f(y, 0) = f_I(y),    0 <= t <= T

or, at the end of section 3.5, the gradient flow f_t = B^T sigma(a - B f), in which solutions never part if sigma' >= 0.
Layer l is the time interval (t_l, t_(l+1)). Bias a and kernel b have coefficients of their own on each, or values at
the layer times with a line between them (the interpolants a^tau, B^tau of section 2.1), or values that layers share.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from itertools import chain
from types import MappingProxyType, NoneType

import firedrake as fd
import numpy as np
import sympy
from petsc4py import PETSc
from pyadjoint import AdjFloat
from pyadjoint.tape import annotate_tape, get_working_tape, stop_annotating

from fem_resnet.activation.activation import Activation, get_activation
from fem_resnet.arguments import choice, flag, instance, integer, number, real_array
from fem_resnet.features import STEPPED, supports
from fem_resnet.fixed import OnMesh, read_only
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace, check_label_space
from fem_resnet.label_domain.orthonormal import orthonormal
from fem_resnet.label_domain.sample_weights import sample_weights
from fem_resnet.layers.inputs import LayerCoefficients, LayerInputs, LayerUse
from fem_resnet.layers.running_cost import RunningCost
from fem_resnet.layers.stage import Stage
from fem_resnet.log import log
from fem_resnet.network.coefficient_segment import CoefficientSegment
from fem_resnet.network.run import Piece, Run
from fem_resnet.network.segment import Segment
from fem_resnet.parameters.kernel import KernelCoefficients, LowRankKernel
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.retraction import Retraction
from fem_resnet.parameters.space_basis import BasisCoefficients, BatchValues, LayerTimes, NodalValues, SpaceBasis, read_all
from fem_resnet.parameters.stable_kernels import StableKernel
from fem_resnet.parameters.time_basis import Once, get_time_basis
from fem_resnet.ranks import same
from fem_resnet.tape.blocks import apply
from fem_resnet.tape.checkpoints import Manager, manager_of
from fem_resnet.tape.kernel_controls import StableKernelParameter
from fem_resnet.time_stepping.scheme import get_scheme
from fem_resnet.time_stepping.stepper import Stepper

__all__ = ["ResidualNetwork", "checked_times"]

#: Arguments of the constructor that parameters do not depend on.
_OF_NO_PARAMETER = {
    "activation", "steps", "layers_per_block", "solver_parameters", "options_prefix", "replay_steps", "gradient_flow",
    "precision",
}  # fmt: skip

#: How many sorts of unrecorded runs, and numbers of samples, a network keeps what it has made for.
_KEPT = 4


class ResidualNetwork(OnMesh):
    """A network on a label domain; its parameters start at zero.

    Everything here is collective over the communicator of the label domain. Coefficients may be assigned to at any time; all
    else stays what the network was made with, and `replace` makes another network.

    `copy.deepcopy` copies the coefficients and shares label domain and bases; for other processes there are `save` and `load`.

    Parameters
    ----------
    phi
        Basis of the kernel in y; or a list of bases, one a layer, whose ranks may differ.
    psi
        Basis of the kernel in z, on the same label domain, or one a layer; `phi` if left out.
    bias
        Basis of the bias, or one a layer; None for a bias with a value at every node.
    layers, final_time
        Number L >= 0 of layers of equal length, and T > 0.
    times
        Layer times 0 = t_0 < .. < t_L instead, shape (L + 1,); no unit.
    bias_in_time, kernel_in_time
        How a and b depend on t. "layers": a value on each layer; "linear": continuous, linear between the layer times,
        L + 1 values; "shared": one value for all layers, the autonomous case; or a group number a layer, shape (L,),
        from 0: one value a group. With bases of each layer, layers that share a value have the same basis.
    activation
        sigma, its name, or a SymPy expression in s (`Activation.from_sympy`).
    steps
        Number of equal time steps a layer.
    layers_per_block
        How many layers make one Block on the tape; all of them if left out.
    solver_parameters, options_prefix
        PETSc options of the TS and its SNES and KSP: Runge-Kutta of order 4 with fixed steps if left out. Types with a
        gradient are rk, theta, beuler, cn, arkimex and dirk, and the package's own discrete_gradient, which is
        energy-stable at any step size; `fem_resnet.time_stepping.methods` has all. For PETSc's implicit ones "mat_type" may be
        "matfree". With the "ts_adapt_type" "basic" or "dsp", steps are judged by the error of f in the label measure, and
        `steps` says how large the first is. What would change start, end or steps in silence is refused (`time_options`).
    learn_factors
        Whether Phi and Psi are learned too: parameters "phi" and "psi" move them away from the given ones, which are made
        orthonormal first, by a QR retraction (`retraction`), so that b is any kernel of that rank. For all layers one
        phi and one psi.
    learn_times
        Whether the layer times t_1 .. t_L, and so T, are learned: parameter "layer_times". Inner products, and what
        regularisers take for the lengths of layers, stay those of the given times.
    replay_steps
        Whether evaluations and derivatives of a recorded run take the steps that were adapted when it was recorded.
    gradient_flow
        Whether the network is `f_t = B^T sigma(a - B f)` (end of 3.5) in place of (2.8): down the gradient of
        int Sigma(a - B f), which is convex if sigma' >= 0. Then no two solutions part in L2, nor those of the discrete
        network if its steps are short enough: see `theory.contraction`. (The paper prints sigma' <= 0.)
    stable_kernel
        A set in which the kernel is to stay, `PositiveSemidefinite`, `DampedAntisymmetric` or `NormBounded`: its
        coefficients beta are made of free controls, and these are learned in their place (`stable_kernels`). Regularisers
        take the kernel itself.
    precision
        "double", or "single": then what stages have at the nodes (bases, u, sigma, adjoint values) is float32, which halves
        the memory that they read and doubles the numbers a vector holds; sums over Y, coefficients, parameters and f stay
        float64. J and gradients are good to about 1e-6 of their size. For explicit methods.

    Attributes
    ----------
    Y : LabelSpace
    bias, kernel : Parameter
        a and beta; ``kernel.set(l, beta)`` gives layer l its coefficients, or the layer time t_l, or group l.
    bases : mapping of str to tuple
        What was given as "phi", "psi" and "bias": one for all layers, or one a layer.
    layer_times : Parameter or None
        t_1 .. t_L, where they are learned.
    factors : tuple of Parameter
        "phi" and "psi", where they are learned.
    activation : Activation

    Raises
    ------
    TypeError, ValueError
        If an argument is not what is said above, or differs between ranks; the message names it.

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
        phi: Basis | Sequence[Basis],
        psi: Basis | Sequence[Basis] | None = None,
        *,
        bias: Basis | Sequence[Basis | None] | None = None,
        layers: int = 8,
        final_time: float = 1.0,
        times: Sequence[float] | None = None,
        bias_in_time: str | Sequence[int] = "layers",
        kernel_in_time: str | Sequence[int] = "layers",
        activation: str | Activation | sympy.Expr = "tanh",
        steps: int = 1,
        layers_per_block: int | None = None,
        solver_parameters: dict | None = None,
        options_prefix: str | None = None,
        learn_factors: bool = False,
        learn_times: bool = False,
        replay_steps: bool = True,
        gradient_flow: bool = False,
        stable_kernel: StableKernel | None = None,
        precision: str = "double",
    ):
        given = {"phi": _bases("phi", phi), "psi": _bases("psi", psi, None), "bias": _bases("bias", bias, None)}
        comm = given["phi"][0].Y.comm
        same(
            comm, **given, layers=layers, final_time=final_time, times=times, bias_in_time=bias_in_time,
            kernel_in_time=kernel_in_time, activation=activation, steps=steps, layers_per_block=layers_per_block,
            solver_parameters=solver_parameters, options_prefix=options_prefix, learn_factors=learn_factors,
            learn_times=learn_times, replay_steps=replay_steps, gradient_flow=gradient_flow, stable_kernel=stable_kernel,
            precision=precision,
        )  # fmt: skip
        instance("stable_kernel", stable_kernel, (StableKernel, NoneType), "such as PositiveSemidefinite()")
        learn_factors, learn_times = flag("learn_factors", learn_factors), flag("learn_times", learn_times)
        replay_steps, gradient_flow = flag("replay_steps", replay_steps), flag("gradient_flow", gradient_flow)
        self._given_times = read_only(_layer_times(layers, final_time) if times is None else checked_times(times))
        self.layers = len(self._given_times) - 1
        self.activation = get_activation(activation)
        self.steps = integer("steps", steps)
        self.layers_per_block = (
            max(self.layers, 1) if layers_per_block is None else integer("layers_per_block", layers_per_block)
        )
        if psi is None:
            given["psi"] = given["phi"]
        every = {name: _one_or_one_a_layer(name, bases, self.layers) for name, bases in given.items()}
        self.Y = every["phi"][0].Y
        for name, bases in every.items():
            for basis in bases:
                if basis is not None and basis.Y is not self.Y:
                    raise ValueError(f"{name}: expected the label space of phi, {self.Y!r}, got a basis on {basis.Y!r}")
        if learn_factors:
            if len(every["phi"]) > 1 or len(every["psi"]) > 1:
                raise ValueError("learn_factors: expected one phi and one psi for all layers, got lists")
            every |= {name: (orthonormal(every[name][0]),) for name in ("phi", "psi")}
        self.bases = MappingProxyType(every)
        self.factors = tuple(
            Parameter(name, Retraction(self.bases[name][0]).inputs[0], Once(), penalised=False)
            for name in (("phi", "psi") if learn_factors else ())
        )
        self.layer_times = None
        if learn_times:
            self.layer_times = Parameter("layer_times", LayerTimes(self.Y, self.layers), Once(), penalised=False)
            self.layer_times.set(0, self._given_times[1:])
        self.bias = Parameter(
            "bias",
            _shared(self._bias_basis, self.bases["bias"]),
            get_time_basis(bias_in_time, self._given_times, "bias_in_time"),
        )
        if learn_factors and stable_kernel is not None and stable_kernel.symmetric:
            raise ValueError(
                f"stable_kernel: {type(stable_kernel).__name__} wants phi = psi, and learned factors part; fix them"
            )
        self.stable_kernel = stable_kernel
        of_kernel = (
            _shared(partial(_kernel_basis, learn_factors), self.bases["phi"], self.bases["psi"]),
            get_time_basis(kernel_in_time, self._given_times, "kernel_in_time"),
        )
        self.kernel = (
            Parameter("kernel", *of_kernel) if stable_kernel is None else StableKernelParameter(stable_kernel, *of_kernel)
        )
        self.replay_steps = replay_steps
        self.gradient_flow = gradient_flow
        self._options_prefix = options_prefix
        self._scheme = get_scheme(solver_parameters, options_prefix, self.steps)
        self.precision = choice("precision", precision, ("double", "single"))
        self._scheme.refuse(precision=precision, gradient_flow=gradient_flow)
        self._stages, self._scratch = _Latest(), _Latest()
        if self.layers:
            self._stepper(self._stage(1), 0)  # now, so that options are refused here rather than at the first run

    def _bias_basis(self, basis: Basis | None) -> SpaceBasis:
        return NodalValues(self.Y) if basis is None else BasisCoefficients(basis)

    @property
    def times(self) -> np.ndarray:
        """Layer times t_0 .. t_L, shape (L + 1,), float64; no unit. Collective where they are learned."""
        return self._given_times if self.layer_times is None else read_only(np.append(0.0, self.layer_times.get(0)))

    def __repr__(self) -> str:
        return f"ResidualNetwork({self.layers} layers, T = {self.times[-1]:g}, {self.activation.name}, {self.Y!r})"

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
        """Matrix a_ij and weights b_i of the Runge-Kutta method that steps it; None where PETSc does not give them away."""
        return self._scheme.tableau

    @property
    def settings(self) -> dict:
        """What the network was made with, but for its bases: keyword arguments of the constructor.

        Its times are the given ones, also where others have been learned: inner products are theirs.
        """
        return {
            "times": self._given_times,
            "bias_in_time": self.bias.time_basis.description,
            "kernel_in_time": self.kernel.time_basis.description,
            "activation": self.activation,
            "steps": self.steps,
            "layers_per_block": self.layers_per_block,
            "solver_parameters": self.solver_parameters,
            "options_prefix": self._options_prefix,
            "learn_factors": bool(self.factors),
            "learn_times": self.layer_times is not None,
            "replay_steps": self.replay_steps,
            "gradient_flow": self.gradient_flow,
            "stable_kernel": self.stable_kernel,
            "precision": self.precision,
        }

    def replace(self, **changes) -> ResidualNetwork:
        """The network with some arguments of the constructor changed, and all others as they are. Collective.

        Where the change is one of how layers are stepped, or of what they compute, its parameters are the very same as
        those of this one: who trains one trains both. Where it is another, they are new and zero, as bases and times may be.

        Parameters
        ----------
        **changes
            Arguments of the constructor; `times` stands for `layers` and `final_time` too.

        Raises
        ------
        TypeError, ValueError
            If there is no such argument, or as the constructor; or if other arguments are changed on other ranks.

        Examples
        --------
        >>> finer = net.replace(steps=2 * net.steps)  # doctest: +SKIP
        >>> finer.kernel is net.kernel  # doctest: +SKIP
        True
        """
        given = {name: list(bases) for name, bases in self.bases.items()} | self.settings
        same(self.Y.comm, replace=sorted(changes))
        unknown = sorted(set(changes) - set(given))
        if unknown:
            raise TypeError(f"replace: expected some of {', '.join(given)}, got {', '.join(unknown)}")
        other = ResidualNetwork(**given | changes)
        if _OF_NO_PARAMETER.issuperset(changes):
            ours = ("_given_times", "bases", "factors", "layer_times", "bias", "kernel")
            vars(other).update({name: vars(self)[name] for name in ours})
        return other

    def __deepcopy__(self, memo: Mapping) -> ResidualNetwork:
        other = self.replace(times=self._given_times)  # with parameters of its own
        other._take(self)
        return other

    def _take(self, other: ResidualNetwork) -> None:
        """Take the coefficients of a network whose parameters are of the same kinds."""
        for ours, theirs in zip(self.parameters, other.parameters, strict=True):
            for k in range(len(ours.functions)):
                ours.set(k, theirs.get(k))

    @property
    def parameters(self) -> list[Parameter]:
        """Bias and kernel, or what it is made of; layer times and factors, where they are learned."""
        return [self.bias, self.kernel.learned, *([] if self.layer_times is None else [self.layer_times]), *self.factors]

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
            Weights of the samples in that cost, one number >= 0 a sample, of which only the proportions matter; equal
            ones if left out.
        seen_by
            A basis for which `steps_what_is_seen_by` is true: what is recorded is then g(T), `coefficients` of the Run, and
            not f(T), and nothing of size nodes x samples is computed.
        observed
            Numbers l of layer times t_l at which the state is asked for while annotating, each once: then layers are solved
            once, where `Run.state` alone makes the first derivative solve them again.

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
        """As `run`, for arguments that are known to be of their kinds, and the same on all ranks."""
        self.Y.check_values(initial, "initial")
        observed = tuple(observed)
        if running is not None:
            self._scheme.refuse_running()
        omega = sample_weights(weights, initial.function_space().value_size)
        omega = None if running is None else omega
        manager = manager_of(get_working_tape()) if annotate_tape() else None
        if seen_by is not None and (running is not None or manager is not None or not self.steps_what_is_seen_by(seen_by)):
            raise ValueError(
                f"seen_by: {seen_by!r} is not what this network steps (see steps_what_is_seen_by), or there is a running cost "
                f"or a schedule of checkpoints; leave it out"
            )
        if manager is not None and (self.factors or self.stable_kernel is not None):
            what = "learned factors" if self.factors else "kernels made of other controls"
            raise ValueError(f"checkpoints: {what} and schedules of checkpoints do not go together; leave one out")
        if observed and manager is not None:
            raise ValueError("observed: a schedule of checkpoints keeps no states inside of the network; record without one")
        # An operator on the tape belongs to its Block alone.
        factors = [apply(Retraction(self.bases[p.name][0]), p.functions)[0] for p in self.factors]
        if annotate_tape() and not self.replay_steps and self._scheme.adaptive:
            log(
                self.Y.comm, logging.WARNING,
                "adapted steps are not replayed: the gradient will be that of the network with the steps of the latest "
                "evaluation, and J jumps where their number changes",
            )  # fmt: skip
        space = initial.function_space()
        if manager is not None:
            end, cost = self._record_steps(initial, manager, running, omega)
            return Run(self, initial, space, None, {self.layers: end}, cost, omega)
        acting = dict(zip(map(id, self.kernel.functions), self.kernel.learned.acting().functions))
        recording = annotate_tape()
        # What the caller has may change later: an unrecorded run has a copy.
        state = given = initial if recording else read_only(np.array(self.Y.values(initial)))
        slot, pieces, cost, held = BatchValues(self.Y, space), [], 0.0, {} if self.layers else {0: state}
        for segment in self._segments(space, running, omega, seen_by, observed):
            first, slot = pieces[-1].end if pieces else 0, segment.output_of_state
            before = pieces[-1] if pieces and seen_by is not None else None
            functions = [*(acting.get(id(function), function) for function in segment.functions), *factors]
            if recording:
                outputs, block = apply(segment, [state, *functions])
                pieces.append(Piece(segment, first, block, before=before))
            else:
                seen = state if seen_by is None or pieces else segment.inputs[0].read(initial)
                coefficients = read_all(segment.inputs[1:], functions)
                outputs = segment.forward([seen, *coefficients], save=False)
                pieces.append(Piece(segment, first, None, state, coefficients, segment.traces(), before))
            state, *others = outputs if isinstance(segment.output, tuple) else [outputs]
            if running is not None:
                cost = cost + others.pop(0)
            held |= {pieces[-1].end: state} | {first + layers: part for layers, part in zip(segment.observed, others)}
        if not recording:
            cost = cost if running is None else AdjFloat(cost)
            held = {layer: _function(slot, held[layer]) for layer in {*observed, self.layers}}
        return Run(self, given, space, pieces, held, cost, omega)

    def steps_what_is_seen_by(self, psi: Basis) -> bool:
        """Whether layers step nothing but g = Psi^T M f: psi is the very Basis of them all, fixed, and steps have f nowhere.

        Raises
        ------
        TypeError
            If psi is no Basis.
        """
        instance("psi", psi, Basis)
        bases = {self.kernel.on_layer(layer).kernel.psi for layer in range(self.layers)}
        return bases == {psi} and not self.factors and not self._scheme.carries_f

    @property
    def blocks(self) -> int:
        """How many Blocks the layers make on a tape."""
        return -(-self.layers // self.layers_per_block)

    def _record_steps(
        self, initial: fd.Function, manager: Manager, running: RunningCost | None, omega: np.ndarray | None
    ) -> tuple[fd.Function, AdjFloat | float]:
        """f(T) and the cost, recorded as one time step a segment; the last stays open for what follows.

        One Function is the state at all interfaces, and segments of a kind share steppers: the tape keeps no field but
        those of its schedule.
        """
        tape = get_working_tape()
        if tape.get_blocks() or manager.steps not in (None, max(self.blocks, 1)):
            raise ValueError(
                f"checkpoints: expected a tape with nothing on it and a schedule for {max(self.blocks, 1)} steps, "
                f"got one with {len(tape.get_blocks())} Blocks and for {manager.steps} steps"
            )
        f, cost = initial, 0.0
        for k, segment in enumerate(self._new_segments(initial.function_space(), running, omega, share=True)):
            if k > 0:
                tape.end_timestep()
            output, _ = apply(segment, [f, *segment.functions], into=None if k == 0 else f)
            f, cost = (output, cost) if running is None else (output[0], cost + output[1])
        return f, cost

    @supports(
        "no_layers", "gradient_flow", "learned_times", "stable_kernel", "bases_by_layer", "linear_in_time", "shared_in_time",
        *STEPPED,
    )  # fmt: skip
    def on(self, Y: LabelSpace) -> ResidualNetwork:
        """The same network on another label space of the same Y: finer, coarser, of other cells or another space.

        Its bases are moved there (`Basis.on`), its coefficients copied.

        Parameters
        ----------
        Y
            The other label space.

        Raises
        ------
        TypeError
            If `Y` is no LabelSpace.
        ValueError
            If the bias has a value at every node or factors are learned, so that the network is tied to its mesh; or a basis
            is, or cannot be had on that one.
        """
        check_label_space(Y)
        moved = {basis: basis.on(Y) for basis in dict.fromkeys(chain.from_iterable(self.bases.values()))}
        net = self.replace(**{name: [moved[basis] for basis in bases] for name, bases in self.bases.items()})
        net._take(self)
        return net

    def layer_segments(
        self,
        space: fd.functionspaceimpl.WithGeometry,
        running: RunningCost | None = None,
        omega: np.ndarray | None = None,
    ) -> list[Segment]:
        """Each layer as an operator of its own between arrays, that of no tape.

        They share steppers: what one has kept of its last solve is good until the next one is used.

        Parameters
        ----------
        space
            Of the state: `Y.V`, or `Y.batch_space(samples)`.
        running, omega
            A running cost, and the weights of the samples in it, which add up to 1.
        """
        with stop_annotating():
            return self._new_segments(space, running, omega, share=True, layers_per_block=1)

    def coefficients(self) -> LayerCoefficients:
        """Which coefficients of bias and kernel each layer takes."""
        return LayerCoefficients(self.bias, self.kernel, self.times, range(self.layers))

    def layer_inputs(self) -> list[LayerInputs]:
        """What each layer takes at the present parameters: times, factors, a and beta over time. Collective."""
        coefficients = self.coefficients()
        inputs = coefficients.on_layers([slot.read(p) for slot, p in zip(coefficients.slots, coefficients.functions)])
        if not self.factors:
            return inputs
        learned = self.learned_factors()
        return [part._replace(factors=learned) for part in inputs]

    def learned_factors(self) -> LowRankKernel:
        """The factors as they are: the given ones, or where learned training has moved them. Collective."""
        if not self.factors:
            return self.kernel.space_basis.kernel
        return LowRankKernel(
            *(Basis(self.Y, Retraction(self.bases[p.name][0]).forward([p.get(0)], False), "given") for p in self.factors)
        )

    @supports(
        "gradient_flow", "learned_factors", "learned_times", "stable_kernel", "nodal_bias", "linear_in_time", "shared_in_time",
        *STEPPED,
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
        factors = self.learned_factors()
        measures = self.kernel.time_basis.measures
        R = [np.linalg.cholesky(basis.gram).T for basis in (factors.phi, factors.psi)]
        betas = [R[0] @ self.kernel.get(k) @ R[1].T for k in range(len(measures))]
        weighted = [np.sqrt(tau) * beta for tau, beta in zip(measures, betas)]
        bases, turns = [], []
        for basis, root, stacked in zip((factors.phi, factors.psi), R, (np.hstack(weighted), np.vstack(weighted).T)):
            U, S, _ = np.linalg.svd(stacked, full_matrices=False)
            turns.append(U[:, : max(1, np.count_nonzero(tolerance * S[0] < S))])
            bases.append(Basis(self.Y, basis.values @ np.linalg.solve(root, turns[-1]), "given"))
        net = self.replace(phi=bases[0], psi=bases[1], stable_kernel=None)
        for parameter, other in zip(self.parameters, net.parameters):
            for k in range(len(parameter.functions)):
                if parameter is self.kernel.learned:
                    other.set(k, turns[0].T @ betas[k] @ turns[1])
                elif parameter not in self.factors:
                    other.set(k, parameter.get(k))
        return net

    def _segments(
        self, space, running: RunningCost | None, omega: np.ndarray | None, seen_by: Basis | None, observed: tuple[int, ...]
    ) -> list[Segment]:
        """New ones where the tape will keep them, else those of earlier unrecorded runs."""
        make = partial(self._new_segments, space, running, omega, seen_by=seen_by, observed=observed)
        if annotate_tape():
            return make()
        segments = self._scratch.get_or_make((space.value_shape, running, seen_by, observed), make)
        for segment in segments:
            segment.omega = omega
        return segments

    def _new_segments(
        self,
        space,
        running: RunningCost | None = None,
        omega: np.ndarray | None = None,
        share: bool = False,
        layers_per_block: int | None = None,
        seen_by: Basis | None = None,
        observed: Sequence[int] = (),
    ) -> list[Segment]:
        values, each = BatchValues(self.Y, space), layers_per_block or self.layers_per_block
        stage = self._stage(values.samples)
        made: dict[tuple, list[Stepper]] = {}

        def steppers(layers: range, orders: int) -> list[Stepper]:
            kind = (tuple(map(self._kind, layers)), orders)
            if not share or kind not in made:
                new = [self._stepper(stage, layer, orders, running) for layer in layers]
                if not share:
                    return new
                made[kind] = new
            return made[kind]

        def make(layers: range) -> Callable[..., Segment]:
            return Segment if seen_by is None else partial(CoefficientSegment, seen_by, layers.start == 0)

        times = self._given_times if self.layer_times is None else self.layer_times
        factors = [parameter.space_basis for parameter in self.factors]
        segments = []
        for start in range(0, self.layers, each):
            layers = range(start, min(start + each, self.layers))
            coefficients = LayerCoefficients(self.bias, self.kernel, times, layers, factors)
            replays = annotate_tape() and self.replay_steps
            segments.append(make(layers)(self._scheme, partial(steppers, layers), stage, coefficients, values, replays, omega))
            for layer in observed:  # between segments it is an output already
                if layer in layers and (layer > start or layer == 0):
                    segments[-1].observe(layer - start)
        return segments

    def _stage(self, samples: int) -> Stage:
        return self._stages.get_or_make(samples, partial(self._new_stage, samples))

    def _new_stage(self, samples: int) -> Stage:
        return self._scheme.new_stage(self.Y, self.activation, samples, self.precision, self.gradient_flow)

    def _kind(self, layer: int) -> tuple[int, ...]:
        """What of a layer its stepper depends on: the rank of psi, and the numbers of coefficients."""
        rank = self.kernel.on_layer(layer).kernel.psi.rank
        return rank, *(
            sum(int(np.prod(p.space_bases[k].shape)) for k in p.time_basis.active(layer)) for p in (self.bias, self.kernel)
        )

    def _stepper(self, stage: Stage, layer: int, orders: int = 1, running: RunningCost | None = None) -> Stepper:
        fixed = not self.factors and self.layer_times is None
        constant = fixed and all(LayerUse(p, layer).is_constant for p in (self.bias, self.kernel))
        kernel = self.kernel.on_layer(layer).kernel
        return self._scheme.new_stepper(layer, stage, kernel, orders, running, sees_constants=constant)


class _Latest(OrderedDict):
    """What was made for the latest few keys: users' objects are not kept alive for ever."""

    def get_or_make(self, key: Hashable, make: Callable):
        if key not in self:
            self[key] = make()
        self.move_to_end(key)
        while len(self) > _KEPT:
            self.popitem(last=False)
        return self[key]


def _function(slot, array: np.ndarray) -> fd.Function:
    function = fd.Function(slot.space)
    slot.write(function, array)
    return function


def _bases(name: str, bases: Basis | Sequence[Basis] | None, *also: None) -> tuple[Basis | None, ...]:
    """One or several, from outside; None may stand for one where it is among `also`."""
    given = tuple(bases) if isinstance(bases, (list, tuple)) else (bases,)
    if not given:
        raise ValueError(f"{name}: expected one Basis, or one a layer; got none")
    for basis in given:
        if not (isinstance(basis, Basis) or any(basis is one for one in also)):
            kind = "a Basis or None (a value at every node)" if name == "bias" else "a Basis"
            raise TypeError(f"{name}: expected {kind}, or one a layer, got {type(basis).__name__}")
    return given


def _one_or_one_a_layer(name: str, given: tuple[Basis | None, ...], layers: int) -> tuple[Basis | None, ...]:
    if len(given) not in (1, layers):
        raise ValueError(f"{name}: expected one Basis, or {layers}, one a layer; got {len(given)}")
    return given


def _shared(make: Callable[..., SpaceBasis], *bases: Sequence[Basis | None]) -> SpaceBasis | list[SpaceBasis]:
    """Space bases from bases that are one for all layers, or one a layer; the same object from the same bases."""
    layers = max(map(len, bases))
    columns = [given * layers if len(given) == 1 else given for given in bases]
    made = {key: make(*key) for key in dict.fromkeys(zip(*columns))}
    return [made[key] for key in zip(*columns)] if layers > 1 else next(iter(made.values()))


def _kernel_basis(learned: bool, phi: Basis, psi: Basis) -> SpaceBasis:
    return KernelCoefficients(LowRankKernel(phi, psi), learned)


def _layer_times(layers: int, final_time: float) -> np.ndarray:
    layers, final_time = integer("layers", layers, least=0), number("final_time", final_time, above=0)
    return np.linspace(0.0, final_time, layers + 1) if layers else np.zeros(1)


def checked_times(times: Sequence[float]) -> np.ndarray:
    """Layer times, a copy.

    Raises
    ------
    TypeError, ValueError
        If they are none.
    """
    times = real_array("times", times, ("layers + 1",)).copy()
    if times[0] != 0.0 or not (np.diff(times) > 0).all():
        raise ValueError(f"times: expected layer times 0 = t_0 < .. < t_L, which increase, got {times.tolist()}")
    return times
