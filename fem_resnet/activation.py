r"""Activations sigma of f_t = sigma(a - B f), with the two derivatives that tangents, adjoints and Hessians ask for.

=============  ==========================  ===========================  ==================================
name           sigma(s)                    sigma'(s)                    sigma''(s)
=============  ==========================  ===========================  ==================================
tanh           tanh s                      sech^2 s                     -2 tanh s sech^2 s
arctan         arctan s                    1 / (1 + s^2)                -2 s / (1 + s^2)^2
sigmoid        1 / (1 + e^-s)              sech^2(s/2) / 4              -tanh(s/2) sech^2(s/2) / 4
softplus       log(1 + e^s)                1 / (1 + e^-s)               sech^2(s/2) / 4
relu           max(s, 0)                   0 | 1                        0
leaky_relu     max(0.1 s, s)               0.1 | 1                      0
elu            alpha (e^s - 1) | s         alpha e^s | 1                alpha e^s | 0
identity       s                           1                            0
=============  ==========================  ===========================  ==================================

Here `x | y` stands for x where s <= 0 and y where s > 0; elu has one parameter, alpha > 0 (1 unless given).

At a joint, where two formulas meet, both derivatives are those *from the left*: relu'(0) = 0, leaky_relu'(0) = 0.1,
elu'(0) = elu''(0) = alpha. A joint is a *kink* if sigma' jumps there. With alpha = 1 elu is continuously
differentiable and has no kink, although elu'' still jumps from 1 to 0.

Each formula is evaluated in a form free of cancellation and of overflow for every |s| <= 1e4: results are accurate to
16 machine epsilons *relative* to their size, also in the far tails, down to the smallest normal number, 2.2e-308 (times
alpha, if that is above 1). Results below it are right to that number absolutely.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["ACTIVATIONS", "Activation", "get_activation"]

Array = NDArray[np.float64]
Kernel = Callable[..., object]


@dataclass(frozen=True)
class Activation:
    """An activation sigma, applied pointwise. Get one from `get_activation`; `(name, parameters)` tells it completely.

    Attributes
    ----------
    name : str
        Its key in `ACTIVATIONS`.
    kernels : tuple of three callables
        sigma, sigma' and sigma'', each called as ``kernel(s, out, **parameters)`` with float64 arrays of one shape. It
        fills `out`, which may be `s` itself: a kernel must not read `s` once it has written to `out`.
    parameters : tuple of (str, float)
        The parameters by name, all of them; ``dict(parameters)`` is what `get_activation` takes.
    joints : tuple of float
        The points where two formulas meet, so that sigma' or sigma'' may jump. Both are given from the left there.

    Examples
    --------
    >>> sigma = get_activation("elu", alpha=0.5)
    >>> sigma([-1.0, 0.0, 2.0]).round(3).tolist()
    [-0.316, 0.0, 2.0]
    >>> sigma.derivative([0.0, 2.0]).tolist()
    [0.5, 1.0]
    >>> sigma.kinks
    (0.0,)
    """

    name: str
    kernels: tuple[Kernel, Kernel, Kernel] = field(repr=False)
    parameters: tuple[tuple[str, float], ...] = ()
    joints: tuple[float, ...] = ()

    def __call__(self, s: ArrayLike, out: Array | None = None) -> Array:
        """sigma(s), pointwise.

        Parameters
        ----------
        s : array_like of float64, any shape
            The arguments. What casts safely to float64 (integers, float32) is converted.
        out : ndarray of float64, the shape of `s`, optional
            Where the result goes. It may be `s` itself.

        Returns
        -------
        ndarray of float64, the shape of `s`
            `out` if it was given, else a new array; 0-dimensional if `s` is a number.

        Raises
        ------
        TypeError
            If `s` does not cast safely to float64, or `out` is no float64 array.
        ValueError
            If `out` has another shape than `s`.
        """
        return self._apply(0, s, out)

    def derivative(self, s: ArrayLike, out: Array | None = None) -> Array:
        """sigma'(s), pointwise, from the left at kinks; arguments, result and errors as for `__call__`."""
        return self._apply(1, s, out)

    def second_derivative(self, s: ArrayLike, out: Array | None = None) -> Array:
        """sigma''(s), pointwise, from the left at joints; arguments, result and errors as for `__call__`."""
        return self._apply(2, s, out)

    @property
    def kinks(self) -> tuple[float, ...]:
        """tuple of float : the points where sigma' jumps."""
        return tuple(
            point for point in self.joints if self.derivative(point) != self.derivative(math.nextafter(point, math.inf))
        )

    def _apply(self, order: int, s: ArrayLike, out: Array | None) -> Array:
        s = np.asarray(s)
        if s.dtype != np.float64:
            if not np.can_cast(s.dtype, np.float64):
                raise TypeError(f"s has dtype {s.dtype}; {self.name} wants real numbers that cast safely to float64")
            s = s.astype(np.float64)
        if out is None:
            out = np.empty_like(s)
        elif not isinstance(out, np.ndarray) or out.dtype != np.float64:
            given = f"an array of {out.dtype}" if isinstance(out, np.ndarray) else type(out).__name__
            raise TypeError(f"out is {given}; give a float64 ndarray, or leave it out")
        elif out.shape != s.shape:
            raise ValueError(f"out has shape {out.shape}; give the shape of s, {s.shape}")
        self.kernels[order](s, out, **dict(self.parameters))
        return out


def get_activation(spec: str | Activation, **parameters: float) -> Activation:
    """The activation of that name.

    Parameters
    ----------
    spec : str or Activation
        A key of `ACTIVATIONS`; an `Activation` is returned as it is.
    **parameters : float
        Parameters of the activation, finite and positive; those not given keep their defaults.

    Returns
    -------
    Activation

    Raises
    ------
    TypeError
        If `spec` is neither, a parameter is not one of this activation, or is no real number.
    ValueError
        If the name is not known, or a parameter is not finite and positive.

    Examples
    --------
    >>> sigma = get_activation("elu", alpha=0.5)
    >>> sigma.name, sigma.parameters
    ('elu', (('alpha', 0.5),))
    >>> get_activation(sigma.name, **dict(sigma.parameters)) == sigma
    True
    """
    if isinstance(spec, Activation):
        if parameters:
            raise TypeError(
                f"parameters {', '.join(parameters)} given along with an Activation, whose parameters are fixed; "
                f"give its name, {spec.name!r}, instead"
            )
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"spec is {type(spec).__name__}; give the name of an activation, or an Activation")
    if spec not in ACTIVATIONS:
        raise ValueError(f"spec is {spec!r}, no known activation; give one of {', '.join(ACTIVATIONS)}")
    default = ACTIVATIONS[spec]
    accepted = dict(default.parameters)
    unexpected = [key for key in parameters if key not in accepted]
    if unexpected:
        raise TypeError(
            f"parameters {', '.join(unexpected)} given to {spec}, which accepts {', '.join(accepted) or 'none'}"
        )
    given = {key: _positive(key, value) for key, value in parameters.items()}
    return replace(default, parameters=tuple((accepted | given).items()))


def _positive(key: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{key} is {value!r}; give a real number")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{key} is {value!r}; give a finite number > 0")
    return float(value)


_LEAK = 0.1
# e^709 is finite and e^-709 is below the smallest normal number.
_EXP_END = 709.0
# sech^2(400) rounds to 0, while cosh(400) and its reciprocal are ordinary numbers.
_SECH_END = 400.0

# The kernels work in `out` and at most one temporary: with a second one of 512 KiB, malloc returned the memory to the
# operating system after each call, and the page faults took 240 us, longer than the arithmetic. They select by
# arithmetic, as np.where and `where=` take 10 times as long as np.maximum on random signs.


def _one(s: Array, out: Array) -> None:
    out.fill(1.0)


def _zero(s: Array, out: Array) -> None:
    out.fill(0.0)


def _sech2(s: Array, out: Array) -> None:
    # On 64 x 1024 normal samples (one core, numpy 2.4, with / without AVX-512) this took 143 / 557 us, against
    # 129 / 726 us for 1 - tanh^2, which loses all digits from |s| = 19 on, and 160 / 420 us for
    # 4 e^-2|s| / (1 + e^-2|s|)^2, which takes a temporary.
    np.clip(s, -_SECH_END, _SECH_END, out=out)
    np.cosh(out, out=out)
    np.divide(1.0, out, out=out)
    np.multiply(out, out, out=out)


def _tanh_2(s: Array, out: Array) -> None:
    # 272 / 1290 us, against 171 / 793 us for -2 tanh (1 - tanh^2): worth it, as only Hessians ask for sigma''.
    sech2 = np.empty_like(s)
    _sech2(s, sech2)
    np.tanh(s, out=out)
    np.multiply(out, sech2, out=out)
    np.multiply(out, -2.0, out=out)


def _arctan_1(s: Array, out: Array) -> None:
    np.multiply(s, s, out=out)
    np.add(out, 1.0, out=out)
    np.divide(1.0, out, out=out)


def _arctan_2(s: Array, out: Array) -> None:
    first = np.empty_like(s)
    _arctan_1(s, first)
    np.multiply(s, first, out=out)
    np.multiply(out, first, out=out)
    np.multiply(out, -2.0, out=out)


def _sigmoid(s: Array, out: Array) -> None:
    np.negative(s, out=out)
    np.minimum(out, _EXP_END, out=out)
    np.exp(out, out=out)
    np.add(out, 1.0, out=out)
    np.divide(1.0, out, out=out)


def _sigmoid_1(s: Array, out: Array) -> None:
    np.multiply(s, 0.5, out=out)
    _sech2(out, out)
    np.multiply(out, 0.25, out=out)


def _sigmoid_2(s: Array, out: Array) -> None:
    first = np.empty_like(s)
    _sigmoid_1(s, first)
    np.multiply(s, -0.5, out=out)
    np.tanh(out, out=out)
    np.multiply(out, first, out=out)


def _softplus(s: Array, out: Array) -> None:
    tail = np.abs(s, out=np.empty_like(s))
    np.negative(tail, out=tail)
    np.exp(tail, out=tail)
    np.log1p(tail, out=tail)
    np.maximum(s, 0.0, out=out)
    np.add(out, tail, out=out)


def _relu(s: Array, out: Array) -> None:
    np.maximum(s, 0.0, out=out)


def _relu_1(s: Array, out: Array) -> None:
    np.greater(s, 0.0, out=out)


def _leaky_relu(s: Array, out: Array) -> None:
    leak = np.multiply(s, _LEAK, out=np.empty_like(s))
    np.maximum(leak, s, out=out)


def _leaky_relu_1(s: Array, out: Array) -> None:
    np.greater(s, 0.0, out=out)
    np.maximum(out, _LEAK, out=out)


def _elu(s: Array, out: Array, alpha: float) -> None:
    left = np.minimum(s, 0.0, out=np.empty_like(s))
    np.expm1(left, out=left)
    np.multiply(left, alpha, out=left)
    np.maximum(s, 0.0, out=out)
    np.add(out, left, out=out)


def _elu_1(s: Array, out: Array, alpha: float) -> None:
    right = np.greater(s, 0.0, out=np.empty_like(s))
    np.minimum(s, 0.0, out=out)
    np.exp(out, out=out)
    # Exactly 1 - 1 on the right, so that alpha leaves no trace there.
    np.subtract(out, right, out=out)
    np.multiply(out, alpha, out=out)
    np.add(out, right, out=out)


def _elu_2(s: Array, out: Array, alpha: float) -> None:
    left = np.less_equal(s, 0.0, out=np.empty_like(s))
    np.minimum(s, 0.0, out=out)
    np.exp(out, out=out)
    np.multiply(out, left, out=out)
    np.multiply(out, alpha, out=out)


# The built-in activations by name, with default parameters. A new one is an entry here, and its formulas in the test.
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            Activation("tanh", (np.tanh, _sech2, _tanh_2)),
            Activation("arctan", (np.arctan, _arctan_1, _arctan_2)),
            Activation("sigmoid", (_sigmoid, _sigmoid_1, _sigmoid_2)),
            Activation("softplus", (_softplus, _sigmoid, _sigmoid_1)),
            Activation("relu", (_relu, _relu_1, _zero), joints=(0.0,)),
            Activation("leaky_relu", (_leaky_relu, _leaky_relu_1, _zero), joints=(0.0,)),
            Activation("elu", (_elu, _elu_1, _elu_2), parameters=(("alpha", 1.0),), joints=(0.0,)),
            Activation("identity", (np.positive, _one, _zero)),
        )
    }
)
