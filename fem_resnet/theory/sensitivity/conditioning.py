"""Conditioning of the forward problem (section 3.5): the linearised flow M(t, s) of a network.

A perturbation w of f obeys

    w_t = - sigma'(u) B w,      u = a - B f                                                               (3.6)

and M(t, s) maps w(s) to w(t). For two layer times it is here the derivative of the discrete network. A layer sees f only
through its coefficients Psi^T M f, where M without arguments is the label measure. So what consecutive layers with the same
psi add to f depends on these coefficients alone. With orthonormal functions Z of the span of psi,

    M(t, s) = I + A Z^T M,      A = M(t, s) Z - Z,

which takes as many tangents as psi has functions. If psi changes between the layers, M(t, s) is the identity plus a sum of
such terms. Then Z spans the functions of all psi, and the rank is the sum of their ranks if they are independent. M(t, s)
maps the span of Z and A to itself and is the identity on its complement. So all its singular values in L2(Y) are ones and
the singular values of a matrix of at most twice the rank. The transpose maps co-states back, r(s) = M(t, s)^T r(t), as
(4.2a) does: the forward and the backward problem have the same singular values (section 5.1). `propagator` has M(t, s) in
that form.

The generator -sigma'(u) B is bounded on L2(Y) by sup |sigma'| norm(b, L2(Y x Y)), so that

    norm(M(t, s)) <= exp( int_s^t sup |sigma'| norm(b) dt ).

The gradient flow f_t = B^T sigma(a - B f) has w_t = -B^T sigma'(u) B w. M(t, s) has the same form, and A is in the span of psi
too. In its bound norm(b)^2 takes the place of norm(b); this bound holds for any sign of sigma'. Where sigma' >= 0, M(t, s)
does not enlarge any perturbation, nor does the discrete one in steps that are short enough (`contraction`).
"""

from __future__ import annotations

from functools import cached_property

import firedrake as fd
import numpy as np
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import flag, integer, real_array
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.fixed import OnMesh
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.orthonormal import joint_span
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.network.segment import Segment
from fem_resnet.ranks import same
from fem_resnet.tape.operator import made
from fem_resnet.theory.sensitivity.propagator import Propagator
from fem_resnet.theory.spectra.frozen_spectra import frozen_eigenvalues

__all__ = ["LinearisedFlow"]

#: The number of tangents that go through the layers together: enough to use the processor, and few fields.
_TOGETHER = 16


class LinearisedFlow(OnMesh):
    """The linearisation (3.6) of a network, or of a gradient flow, along its solutions, between any two layer times.

    It is the derivative of the discrete network, at the coefficients that the network has at construction. Collective over
    the ranks of the label domain.

    Parameters
    ----------
    net
        The network.
    initial
        f_I, as for ``net.run``. Each sample has its own solution, and so its own linearisation.

    Attributes
    ----------
    net : ResidualNetwork
        The network.
    states : list of numpy.ndarray
        f(t_0) .. f(t_L) at the owned nodes, shape (nodes, samples) each.
    basis : Basis
        Z: orthonormal functions of the span of the psi of all layers.

    Raises
    ------
    TypeError, ValueError
        If `initial` does not fit.
    StepFailure
        If a layer cannot be stepped.

    Examples
    --------
    >>> import numpy as np
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Kernel, LabelSpace, LinearisedFlow, ResidualNetwork, laplace_basis
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> net = ResidualNetwork(Kernel(laplace_basis(Y, 3), in_time="shared"), layers=4, activation="identity")
    >>> net.kernel.set(0, np.diag([1.0, -2.0, 0.0]))
    >>> M = LinearisedFlow(net, Y.batch(0 * Y.weights)).propagator()
    >>> M.lyapunov_exponents[[0, -1]].round(2).tolist(), len(M.singular_values), M.ones == Y.size - 6
    ([2.0, -1.0], 6, True)
    """

    @supports("channels", "no_layers", *HELD, *STEPPED, "gradient_flow")
    def __init__(self, net: ResidualNetwork, initial: fd.Function):
        net.Y.check_batch(initial, "initial")
        self.net = net
        self._layers = net.layer_inputs()
        self._space = initial.function_space()
        self._steps: list[list] = []
        self._segments: dict[int, list[Segment]] = {}
        self.states = [np.array(net.Y.values(initial))]
        with stop_annotating():
            segments = net.layer_segments(self._space)
            kernel = net.learned_factors() if net.factors else None
            factors = [] if kernel is None else [np.array(basis.values) for basis in (kernel.phi, kernel.psi)]
            self._coefficients = [
                [*(np.array(slot.read(p)) for slot, p in zip(s.inputs[1:], s.functions)), *factors] for s in segments
            ]
            for segment, coefficients in zip(segments, self._coefficients):
                self.states.append(segment.forward([self.states[-1], *coefficients], save=False))
                self._steps.append(segment.taken_steps())

    @cached_property
    def basis(self) -> Basis:
        psi = [inputs.factors.psi for inputs in self._layers]
        return joint_span(self.net.Y, psi or self.net.bases["psi"])

    def tangent(self, direction: fd.Function, start: int = 0, end: int | None = None) -> fd.Function:
        """`M(t_end, t_start) w`: solve (3.6) forwards, for one perturbation of each sample. Collective.

        Parameters
        ----------
        direction
            w at t_start, a Function of the space of `initial`.
        start, end
            The numbers of two layer times, 0 .. L; `end` is L if left out.

        Raises
        ------
        TypeError, ValueError
            If an argument does not fit.
        """
        start, end = self._interval(start, end)
        w = self._read(direction, "direction")
        for layer in range(start, end):
            w = self._step(layer, self.states[layer], w)
        return self.net.Y.like(direction, w)

    def adjoint(self, costate: fd.Function, start: int = 0, end: int | None = None) -> fd.Function:
        """`M(t_end, t_start)^T r`: the discrete co-state r(t_start) of (4.2a) from r(t_end), by PETSc's TSAdjoint. Collective.

        Parameters
        ----------
        costate
            r at t_end, a Function of the space of `initial`.
        start, end
            As for `tangent`.

        Raises
        ------
        TypeError, ValueError
            If an argument does not fit, or PETSc has no adjoint of the network's method.
        """
        start, end = self._interval(start, end)
        weights = self.net.Y.weights[:, None]
        functional = weights * self._read(costate, "costate")
        segments = self._of_samples(functional.shape[1])
        for layer in reversed(range(start, end)):
            arrays = [self.states[layer], *self._coefficients[layer]]
            segments[layer].forward(arrays, save=True)
            functional = made(segments[layer].adjoint(arrays, functional)[0])
        return self.net.Y.like(costate, functional / weights)

    def propagator(self, start: int = 0, end: int | None = None, *, sample: int = 0) -> Propagator:
        """M(t_end, t_start) along the solution of one sample, with its singular values. Collective.

        It takes as many tangents as `basis` has functions, and at its peak memory for about seven fields for each function.

        Parameters
        ----------
        start, end
            As for `tangent`.
        sample
            The number of the sample.

        Raises
        ------
        ValueError
            If an argument does not fit.
        """
        start, end = self._interval(start, end, sample=sample)
        sample = self._sample(sample)
        Z = self.basis.values
        runs = -(-Z.shape[1] // _TOGETHER)
        together = -(-Z.shape[1] // runs)
        added = np.empty_like(Z)
        for first in range(0, Z.shape[1], together):
            columns = slice(first, min(first + together, Z.shape[1]))
            # The last batch is filled up with zeros, because another number of samples would need steppers of its own.
            w = np.zeros((len(Z), together))
            w[:, : columns.stop - first] = Z[:, columns]
            for layer in range(start, end):
                w = self._step(layer, np.repeat(self.states[layer][:, [sample]], together, axis=1), w)
            added[:, columns] = w[:, : columns.stop - first] - Z[:, columns]
        return Propagator(self.basis, added, (self.net.times[start], self.net.times[end]))

    def bound(self, start: int = 0, end: int | None = None, *, operator_norm: bool = False) -> float:
        """`exp(exponent)`, a bound of the norm of M(t_end, t_start); no unit. Collective.

        It holds for the solution of (3.6). If b is constant in each layer, it also holds for the steps of Euler's and of the
        classical Runge-Kutta method, whose 1 + x + .. is below e^x.

        Parameters
        ----------
        start, end, operator_norm
            As for `exponent`.
        """
        with np.errstate(over="ignore"):
            return float(np.exp(self.exponent(start, end, operator_norm=operator_norm)))

    def exponent(self, start: int = 0, end: int | None = None, *, operator_norm: bool = False) -> float:
        """`int sup |sigma'| norm(b) dt` from t_start to t_end, or an upper bound if b is linear in t; no unit. Collective.

        For a gradient flow `int sup |sigma'| norm(b)^2 dt`.

        Parameters
        ----------
        start, end
            As for `tangent`.
        operator_norm
            Whether norm(b) is the norm of the operator B on L2(Y), which is smaller, instead of the norm in L2(Y x Y).

        Raises
        ------
        ValueError
            If an argument does not fit.
        """
        start, end = self._interval(start, end, operator_norm=operator_norm)
        operator_norm, total = flag("operator_norm", operator_norm), 0.0
        for inputs in self._layers[start:end]:
            # The norm is convex in t here, so that the trapezoidal rule gives an upper bound.
            parts = 1 if inputs.beta.is_constant else 16
            fractions = np.linspace(0, 1, parts + 1)
            kind = "operator" if operator_norm else "hs"
            norms = [inputs.factors.norm(inputs.beta.coefficients(s), kind) ** self.power for s in fractions]
            total += inputs.length * np.trapezoid(norms, dx=1 / parts)
        return float(total * self.net.activation.properties.lipschitz) if total > 0 else 0.0

    @property
    def power(self) -> int:
        """The power of norm(b) in bounds: 1, or 2 for a gradient flow."""
        return 2 if self.net.gradient_flow else 1

    def by_bias(self, layer: int, r: np.ndarray) -> np.ndarray:
        """sigma'(u) r of (4.3) at the start of a layer, or sigma'(u) B r for a gradient flow. Collective.

        Parameters
        ----------
        layer
            The number of the layer.
        r
            The co-state there at the owned nodes, shape (nodes, samples) or (nodes, 1).

        Returns
        -------
        numpy.ndarray
            Shape (nodes, samples).

        Raises
        ------
        TypeError, ValueError
            If an argument does not fit.
        """
        inputs, Y = self._layers[self._layer(layer)], self.net.Y
        r = real_array("r", r, (Y.nodes, "samples"), comm=Y.comm)
        if r.shape[1] not in (1, self.states[0].shape[1]):
            raise ValueError(f"r: expected 1 or {self.states[0].shape[1]} samples, the number of f, got {r.shape[1]}")
        if self.net.gradient_flow:
            r = inputs.factors.apply(inputs.beta.coefficients(0.0), r)
        return self.slope(layer) * r

    def slope(self, layer: int) -> np.ndarray:
        """sigma'(u) with u = a - B f at the start of a layer, at the owned nodes, shape (nodes, samples). Collective."""
        layer = self._layer(layer)
        inputs, f = self._layers[layer], self.states[layer]
        Bf = inputs.factors.apply(inputs.beta.coefficients(0.0), f)
        return self.net.activation.derivative(inputs.bias.coefficients(0.0)[:, None] - Bf)

    def frozen_eigenvalues(self, layer: int, *, sample: int = 0) -> np.ndarray:
        """The eigenvalues of -sigma'(u) B frozen at the start of a layer, without zeros. Collective.

        For a gradient flow the eigenvalues of -B^T sigma'(u) B. Frozen eigenvalues do not decide about (3.6), whose
        coefficients depend on t. They describe the equation that one step of the scheme solves. (Section 3.5 prints
        sigma'((y, t_0)), sigma(u) b in place of b, and the operator -sigma'(w) B. It is sigma'(u) in all three places.)

        Parameters
        ----------
        layer
            The number of the layer.
        sample
            The number of the sample.

        Returns
        -------
        numpy.ndarray
            Complex, real parts falling, shape (rank,), in the unit of 1/t; `rank` is the smaller rank of phi and psi, or the
            rank of psi for a gradient flow.

        Raises
        ------
        ValueError
            If an argument does not fit.
        """
        slope = self.slope(layer)
        same(self.net.Y.comm, sample=sample)
        return frozen_eigenvalues(self.net, self._layers[layer], 0.0, slope[:, self._sample(sample)])

    def _step(self, layer: int, f: np.ndarray, w: np.ndarray) -> np.ndarray:
        segment, coefficients = self._of_samples(w.shape[1])[layer], self._coefficients[layer]
        if segment.scheme.adaptive:
            segment.forward([f, *coefficients], save=False)  # the tangent repeats the steps of the latest solve
        return segment.tangent([f, *coefficients], [w, *map(np.zeros_like, coefficients)])

    def _of_samples(self, samples: int) -> list[Segment]:
        """The layers for this number of samples; they repeat the steps of the first solve."""
        if samples not in self._segments:
            segments = self.net.layer_segments(self.net.Y.batch_space(samples))
            for segment, steps in zip(segments, self._steps):
                segment.replay(steps)
            self._segments[samples] = segments
        return self._segments[samples]

    def _interval(self, start: int, end: int | None, **others: object) -> tuple[int, int]:
        """Numbers of layer times from outside; the ranks compare these and the other arguments of the call."""
        same(self.net.Y.comm, start=start, end=end, **others)
        last = self.net.layers
        start = integer("start", start, least=0, most=last)
        return start, last if end is None else integer("end", end, least=start, most=last)

    def _layer(self, layer: int) -> int:
        same(self.net.Y.comm, layer=layer)
        return integer("layer", layer, least=0, most=len(self._layers) - 1)

    def _sample(self, sample: int) -> int:
        return integer("sample", sample, least=0, most=self.states[0].shape[1] - 1)

    def _read(self, function: fd.Function, name: str) -> np.ndarray:
        self.net.Y.check_batch(function, name)
        if function.function_space() != self._space:
            raise ValueError(f"{name}: expected a Function of {self._space}, got {function.function_space()}")
        return np.array(self.net.Y.values(function))
