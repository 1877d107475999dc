"""What a network is made of: how its kernel and its bias are represented, and how its layers lie in time.

    f_t(y, t) = sigma( a(y, t) - int_Y b(y, z, t) f(z, t) dz )                                              (2.8)
    b(y, z, t) = sum_ij phi_i(y) beta_ij(t) psi_j(z)

`Kernel` describes b, `Bias` describes a, `Layers` the times t_0 .. t_L and the steps between them. They store what they are
given. `ResidualNetwork` checks them, on all ranks together, and keeps them in its `Settings`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from types import NoneType
from typing import Any, cast

import numpy as np

from fem_resnet.activation.activation import Activation, get_activation
from fem_resnet.arguments import choice, flag, instance, integer, number, real_array
from fem_resnet.fixed import read_only
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.orthonormal import orthonormal
from fem_resnet.parameters.kernel_sets import KernelSet
from fem_resnet.parameters.time_basis import get_time_basis
from fem_resnet.ranks import same, together

__all__ = ["Bias", "Kernel", "Layers", "Settings", "checked_times", "settings_of"]


def _frozen(given: object) -> object:
    """A copy of a list or an array that nobody can change."""
    if isinstance(given, np.ndarray):
        return read_only(given.copy())
    return tuple(given) if isinstance(given, list) else given


@dataclass(frozen=True)
class Kernel:
    """How the kernel b(y, z, t) = sum_ij phi_i(y) beta_ij(t) psi_j(z) is represented.

    The values are checked where a network is made of it.

    Parameters
    ----------
    phi
        Basis in y; or a list of bases, one a layer, whose ranks may differ.
    psi
        Basis in z, on the same label domain, or one a layer; `phi` if left out.
    in_time
        How beta depends on t. "layers": one value a layer; "linear": continuous, linear between the layer times, L + 1
        values; "shared": one value for all layers, the autonomous case; or a group number a layer, shape (L,), from 0:
        one value a group. Layers that share a value have the same bases.
    learn_factors
        Whether Phi and Psi are learned too. The parameters "phi" and "psi" then move them away from the given bases by a
        QR retraction (`retraction`), after these are made orthonormal, so that b is any kernel of that rank. All layers
        have one phi and one psi then.
    among
        A set that b stays in: `PositiveSemidefinite`, `DampedAntisymmetric` or `NormBounded` (`kernel_sets`);
        `LaplaceFunctions` (`linear_kernels`) or `Symmetric` (`symmetric_kernels`), which know the symmetry of Y. Free
        controls are learned in place of beta, and beta is made of them. Regularisers take b itself.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import Kernel, LabelSpace, PositiveSemidefinite, ResidualNetwork, laplace_basis
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> kernel = Kernel(laplace_basis(Y, 6), in_time="shared", among=PositiveSemidefinite())
    >>> ResidualNetwork(kernel, layers=2).kernel.get(0).shape
    (6, 6)
    """

    phi: Basis | Sequence[Basis]
    psi: Basis | Sequence[Basis] | None = None
    _: KW_ONLY
    in_time: str | Sequence[int] = "layers"
    learn_factors: bool = False
    among: KernelSet | None = None

    def __post_init__(self) -> None:
        for name in ("phi", "psi", "in_time"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))


@dataclass(frozen=True)
class Bias:
    """How the bias a(y, t) is represented.

    The values are checked where a network is made of it.

    Parameters
    ----------
    basis
        Basis of a in y, or a list with one a layer; None stands for a value at every node.
    in_time
        How a depends on t, as for `Kernel`.

    Examples
    --------
    >>> from fem_resnet import Bias
    >>> Bias(in_time="linear")
    Bias(basis=None, in_time='linear')
    """

    basis: Basis | Sequence[Basis | None] | None = None
    _: KW_ONLY
    in_time: str | Sequence[int] = "layers"

    def __post_init__(self) -> None:
        for name in ("basis", "in_time"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))


@dataclass(frozen=True)
class Layers:
    """How the layers lie in time, and how they are stepped and recorded.

    The values are checked where a network is made of it.

    Parameters
    ----------
    times
        A number L >= 0 of layers of equal length; or the layer times 0 = t_0 < .. < t_L, shape (L + 1,), no unit.
    final_time
        T > 0 where a number of layers is given; 1 if left out.
    steps
        Number of equal time steps a layer. Where steps are adapted, the first has this size.
    per_block
        How many layers make one Block on the tape; all of them if left out.
    learn_times
        Whether t_1 .. t_L, and so T, are learned: parameter "layer_times". Inner products, and what regularisers take
        for the lengths of layers, stay those of the given times.

    Examples
    --------
    >>> from fem_resnet import Layers
    >>> Layers([0.0, 0.5, 2.0], steps=2).steps
    2
    """

    times: int | Sequence[float] = 8
    final_time: float | None = None
    _: KW_ONLY
    steps: int = 1
    per_block: int | None = None
    learn_times: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", _frozen(self.times))


@dataclass(frozen=True)
class Settings:
    """What a network was made with, checked: the arguments of `ResidualNetwork`, each in one form.

    Attributes
    ----------
    kernel : Kernel
        `phi` and `psi` are tuples, of one basis or of one a layer, and orthonormal where they are learned.
    bias : Bias
        `basis` is such a tuple too.
    layers : Layers
        `times` are the layer times t_0 .. t_L, `per_block` is a number.
    solver_parameters : Mapping
        PETSc's options in force.
    activation, gradient_flow, options_prefix, replay_steps, precision
        As for `ResidualNetwork`.
    """

    kernel: Kernel
    bias: Bias
    layers: Layers
    activation: Activation
    gradient_flow: bool
    solver_parameters: Mapping
    options_prefix: str | None
    replay_steps: bool
    precision: str

    @property
    def Y(self) -> LabelSpace:
        """The label space that the network lives on."""
        return self.phi[0].Y

    # What `settings_of` has brought to one form; its classes take other forms too.

    @property
    def phi(self) -> tuple[Basis, ...]:
        """One basis of the kernel in y, or one a layer."""
        return cast(tuple[Basis, ...], self.kernel.phi)

    @property
    def psi(self) -> tuple[Basis, ...]:
        """One basis of the kernel in z, or one a layer."""
        return cast(tuple[Basis, ...], self.kernel.psi)

    @property
    def bias_bases(self) -> tuple[Basis | None, ...]:
        """One basis of the bias, or one a layer; None for a value at every node."""
        return cast(tuple[Basis | None, ...], self.bias.basis)

    @property
    def times(self) -> tuple[float, ...]:
        """The layer times t_0 .. t_L that the network was made with; no unit."""
        return cast(tuple[float, ...], self.layers.times)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `ResidualNetwork` that make the same network."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def has_parameters_of(self, other: Settings) -> bool:
        """Whether a network of these settings has parameters of the same kinds, in the same bases and at the same times."""
        ours, theirs = self.layers, other.layers
        return (
            self.kernel == other.kernel and self.bias == other.bias
            and (ours.times, ours.learn_times) == (theirs.times, theirs.learn_times)
        )  # fmt: skip


def settings_of(
    kernel: Kernel | Basis | Sequence[Basis],
    bias: Bias | Basis | Sequence[Basis | None] | None,
    layers: Layers | int | Sequence[float],
    final_time: float | None,
    **others: Any,
) -> Settings:
    """The settings of a network from the arguments of `ResidualNetwork`, checked. Collective.

    Parameters
    ----------
    kernel, bias, layers, final_time
        As for `ResidualNetwork`: what stands for a `Kernel`, a `Bias` or `Layers` is made one.
    **others
        Its other arguments.

    Raises
    ------
    TypeError, ValueError
        If one does not fit, or differs between ranks; the message names it.
    """
    kernel = kernel if isinstance(kernel, Kernel) else Kernel(kernel)
    bias = bias if isinstance(bias, Bias) else Bias(bias)
    if isinstance(layers, Layers) and final_time is not None:
        raise ValueError(
            f"layers.final_time: expected None where `layers` are Layers, which have their own, got {final_time!r}"
        )
    layers = layers if isinstance(layers, Layers) else Layers(layers, final_time)
    phi = _bases("kernel.phi", kernel.phi)
    comm = phi[0].Y.comm
    psi = together(comm, lambda: phi if kernel.psi is None else _bases("kernel.psi", kernel.psi))
    on = together(comm, lambda: _bases("bias.basis", bias.basis, or_nodes=True))
    same(comm, **_parts("kernel", kernel), **_parts("bias", bias), **_parts("layers", layers), **others)
    times = _checked_times(layers.times, layers.final_time)
    count = len(times) - 1
    for name, bases in (("kernel.phi", phi), ("kernel.psi", psi), ("bias.basis", on)):
        _check_bases(name, bases, count, phi[0].Y)
    learn_factors = flag("kernel.learn_factors", kernel.learn_factors)
    among: KernelSet | None = instance("kernel.among", kernel.among, (KernelSet, NoneType), "such as PositiveSemidefinite()")
    if learn_factors:
        if len(phi) > 1 or len(psi) > 1:
            raise ValueError("kernel.learn_factors: expected one phi and one psi for all layers, got lists")
        if among is not None and among.symmetric:
            raise ValueError(
                f"kernel.among: a {type(among).__name__} kernel has phi = psi, and learned factors part; "
                f"set learn_factors to False"
            )
        phi, psi = ((orthonormal(basis),) for basis in (phi[0], psi[0]))
    return Settings(
        kernel=replace(
            kernel, phi=phi, psi=psi, in_time=get_time_basis(kernel.in_time, times, "kernel.in_time").description,
            learn_factors=learn_factors,
        ),
        bias=Bias(on, in_time=get_time_basis(bias.in_time, times, "bias.in_time").description),
        layers=Layers(
            times,
            steps=integer("layers.steps", layers.steps),
            per_block=max(count, 1) if layers.per_block is None else integer("layers.per_block", layers.per_block),
            learn_times=flag("layers.learn_times", layers.learn_times),
        ),
        activation=get_activation(others["activation"]),
        gradient_flow=flag("gradient_flow", others["gradient_flow"]),
        solver_parameters=others["solver_parameters"],
        options_prefix=others["options_prefix"],
        replay_steps=flag("replay_steps", others["replay_steps"]),
        precision=choice("precision", others["precision"], ("double", "single")),
    )  # fmt: skip


def _bases(name: str, given: object, *, or_nodes: bool = False) -> tuple[Basis | None, ...]:
    """One basis, or several, from outside; None may stand for a value at every node."""
    bases = given if isinstance(given, tuple) else (given,)
    kind = "a Basis or None (a value at every node)" if or_nodes else "a Basis"
    if not bases:
        raise ValueError(f"{name}: expected {kind}, or one a layer, got an empty list")
    for basis in bases:
        if not (isinstance(basis, Basis) or or_nodes and basis is None):
            raise TypeError(f"{name}: expected {kind}, or a list with one a layer, got {type(basis).__name__}")
    return bases


def _check_bases(name: str, bases: Sequence[Basis | None], layers: int, Y: LabelSpace) -> None:
    """Refuse bases that are neither one nor one a layer, or live elsewhere."""
    if len(bases) not in (1, layers):
        raise ValueError(f"{name}: expected one Basis, or {layers}, one a layer, got {len(bases)}")
    for basis in bases:
        if basis is not None and basis.Y is not Y:
            raise ValueError(f"{name}: expected a basis on the label space of phi, {Y!r}, got one on {basis.Y!r}")


def _parts(name: str, given: Kernel | Bias | Layers) -> dict[str, Any]:
    """The parts by the names that messages call them."""
    return {f"{name}.{field.name}": getattr(given, field.name) for field in fields(given)}


def _checked_times(times: Any, final_time: float | None) -> tuple[float, ...]:
    """Layer times, from these or from the number of layers and T."""
    reads_as_array = isinstance(times, Sequence) or hasattr(times, "__array__")
    if not reads_as_array or isinstance(times, (str, bytes, np.generic)):
        count = integer("layers.times", times, least=0)
        end = 1.0 if final_time is None else number("layers.final_time", final_time, above=0)
        return tuple(np.linspace(0.0, end, count + 1).tolist()) if count else (0.0,)
    checked = tuple(checked_times(times).tolist())
    if final_time is not None:
        raise ValueError(
            f"layers.final_time: expected None where layer times are given, whose last one is T, got {final_time!r}"
        )
    return checked


def checked_times(times: Sequence[float] | np.ndarray, name: str = "layers.times") -> np.ndarray:
    """Layer times, a copy.

    Parameters
    ----------
    times
        From outside, shape (L + 1,).
    name
        What messages call them.

    Returns
    -------
    numpy.ndarray
        The times, shape (L + 1,), float64.

    Raises
    ------
    TypeError, ValueError
        If they do not start at 0, or do not increase.
    """
    checked = real_array(name, times, ("layers + 1",)).copy()
    if checked[0] != 0.0 or not (np.diff(checked) > 0).all():
        raise ValueError(f"{name}: expected increasing layer times 0 = t_0 < .. < t_L, got {checked.tolist()}")
    return checked
