r"""The formulas of the built-in activations, their first two derivatives and primitives, as loops over arrays.

Each is called as ``kernel(s, out)``, elu as ``kernel(s, out, alpha)``, with float64 arrays of one shape. It fills `out`, which
may be `s` itself.

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

=============  ================================  ======================================================
name           Sigma(s) = int_0^s sigma          evaluated as
=============  ================================  ======================================================
tanh           log cosh s                        log(1 + sinh^2 s) / 2 up to |s| = 20, then |s| - log 2
arctan         s arctan s - log(1 + s^2) / 2     this
sigmoid        log((1 + e^s) / 2)                max(s, 0) + log(1 + (e^-|s| - 1) / 2)
softplus       -Li2(-e^s) - pi^2 / 12            -G(-s) | s^2 / 2 + G(s),  G(t) = pi^2 / 12 + Li2(-e^-t)
relu           0 | s^2 / 2                       s relu(s) / 2
leaky_relu     0.05 s^2 | s^2 / 2                s leaky_relu(s) / 2
elu            alpha (e^s - 1 - s) | s^2 / 2     this
identity       s^2 / 2                           this
=============  ================================  ======================================================

Li2 is the dilogarithm. For |s| <= 1, where G and e^s - 1 - s would lose digits, they are integrated by Gauss's rule.

Here `x | y` stands for x where s <= 0 and y where s > 0; elu has one parameter, alpha > 0 (1 unless given).

At a joint, where two formulas meet, both derivatives are those *from the left*: relu'(0) = 0, leaky_relu'(0) = 0.1,
elu'(0) = elu''(0) = alpha. A joint is a *kink* if sigma' jumps there. With alpha = 1 elu is continuously
differentiable and has no kink, although elu'' still jumps from 1 to 0.

Each formula is evaluated in a form free of cancellation and of overflow for every |s| <= 1e4: results are accurate to
16 machine epsilons *relative* to their size, also in the far tails, down to the smallest normal number, 2.2e-308 (times
alpha, if that is above 1). Results below it are right to that number absolutely.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import spence

__all__ = ["KERNELS", "integral_to"]

Array = NDArray[np.float64]
Kernel = Callable[..., object]

_LEAK = 0.1
# e^709 is finite and e^-709 is below the smallest normal number.
_EXP_END = 709.0
# sech^2(400) rounds to 0, while cosh(400) and its reciprocal are ordinary numbers.
_SECH_END = 400.0

# The kernels work in `out` and at most one temporary: with a second one of 512 KiB, malloc returned the memory to the
# operating system after each call, and the page faults took 240 us, longer than the arithmetic. They select by
# arithmetic, as np.where and `where=` take 10 times as long as np.maximum on random signs.


def one(s: Array, out: Array) -> None:
    out.fill(1.0)


def zero(s: Array, out: Array) -> None:
    out.fill(0.0)


def sech2(s: Array, out: Array) -> None:
    # On 64 x 1024 normal samples (one core, numpy 2.4, with / without AVX-512) this took 143 / 557 us, against
    # 129 / 726 us for 1 - tanh^2, which loses all digits from |s| = 19 on, and 160 / 420 us for
    # 4 e^-2|s| / (1 + e^-2|s|)^2, which takes a temporary.
    np.clip(s, -_SECH_END, _SECH_END, out=out)
    np.cosh(out, out=out)
    np.divide(1.0, out, out=out)
    np.multiply(out, out, out=out)


def tanh_2(s: Array, out: Array) -> None:
    # 272 / 1290 us, against 171 / 793 us for -2 tanh (1 - tanh^2): worth it, as only Hessians ask for sigma''.
    square = np.empty_like(s)
    sech2(s, square)
    np.tanh(s, out=out)
    np.multiply(out, square, out=out)
    np.multiply(out, -2.0, out=out)


def arctan_1(s: Array, out: Array) -> None:
    np.multiply(s, s, out=out)
    np.add(out, 1.0, out=out)
    np.divide(1.0, out, out=out)


def arctan_2(s: Array, out: Array) -> None:
    first = np.empty_like(s)
    arctan_1(s, first)
    np.multiply(s, first, out=out)
    np.multiply(out, first, out=out)
    np.multiply(out, -2.0, out=out)


def sigmoid(s: Array, out: Array) -> None:
    np.negative(s, out=out)
    np.minimum(out, _EXP_END, out=out)
    np.exp(out, out=out)
    np.add(out, 1.0, out=out)
    np.divide(1.0, out, out=out)


def sigmoid_1(s: Array, out: Array) -> None:
    np.multiply(s, 0.5, out=out)
    sech2(out, out)
    np.multiply(out, 0.25, out=out)


def sigmoid_2(s: Array, out: Array) -> None:
    first = np.empty_like(s)
    sigmoid_1(s, first)
    np.multiply(s, -0.5, out=out)
    np.tanh(out, out=out)
    np.multiply(out, first, out=out)


def softplus(s: Array, out: Array) -> None:
    tail = np.abs(s, out=np.empty_like(s))
    np.negative(tail, out=tail)
    np.exp(tail, out=tail)
    np.log1p(tail, out=tail)
    np.maximum(s, 0.0, out=out)
    np.add(out, tail, out=out)


# Primitives are asked for now and then only: they may take temporaries. All of `s` is read before `out` is written.


def log_cosh(s: Array, out: Array) -> None:
    size = np.abs(s)
    near = np.minimum(size, 20.0)
    out[...] = (size - near) + 0.5 * np.log1p(np.sinh(near) ** 2)


def arctan_primitive(s: Array, out: Array) -> None:
    out[...] = s * np.arctan(s) - 0.5 * np.log1p(s * s)


def sigmoid_primitive(s: Array, out: Array) -> None:
    out[...] = np.maximum(s, 0.0) + np.log1p(0.5 * np.expm1(-np.abs(s)))


def softplus_primitive(s: Array, out: Array) -> None:
    size = np.abs(s)
    near = integral_to(np.minimum(size, 1.0), lambda x: np.log1p(np.exp(-x)))
    tail = np.where(size < 1.0, near, np.pi**2 / 12 + spence(1.0 + np.exp(-size)))
    out[...] = np.where(s > 0.0, 0.5 * s * s + tail, -tail)


def elu_primitive(s: Array, out: Array, alpha: float) -> None:
    left, right = np.minimum(s, 0.0), np.maximum(s, 0.0)
    near = integral_to(np.maximum(left, -1.0), np.expm1)
    out[...] = alpha * np.where(left > -1.0, near, np.expm1(left) - left) + 0.5 * right * right


def integral_to(s: Array, function: Callable[[Array], Array]) -> Array:
    """int_0^s function for |s| <= 1, to all digits if it has one sign, and no singularity within 3 of 0."""
    # The error of n points is about rho^(-2 n), with rho > 12 here.
    nodes, weights = np.polynomial.legendre.leggauss(8)
    return 0.5 * s * sum(weight * function(0.5 * (1.0 + node) * s) for node, weight in zip(nodes, weights, strict=True))


def relu_primitive(s: Array, out: Array) -> None:
    out[...] = 0.5 * s * np.maximum(s, 0.0)


def leaky_relu_primitive(s: Array, out: Array) -> None:
    out[...] = 0.5 * s * np.maximum(_LEAK * s, s)


def identity_primitive(s: Array, out: Array) -> None:
    out[...] = 0.5 * s * s


def relu(s: Array, out: Array) -> None:
    np.maximum(s, 0.0, out=out)


def relu_1(s: Array, out: Array) -> None:
    np.greater(s, 0.0, out=out)


def leaky_relu(s: Array, out: Array) -> None:
    leak = np.multiply(s, _LEAK, out=np.empty_like(s))
    np.maximum(leak, s, out=out)


def leaky_relu_1(s: Array, out: Array) -> None:
    np.greater(s, 0.0, out=out)
    np.maximum(out, _LEAK, out=out)


def elu(s: Array, out: Array, alpha: float) -> None:
    left = np.minimum(s, 0.0, out=np.empty_like(s))
    np.expm1(left, out=left)
    np.multiply(left, alpha, out=left)
    np.maximum(s, 0.0, out=out)
    np.add(out, left, out=out)


def elu_1(s: Array, out: Array, alpha: float) -> None:
    right = np.greater(s, 0.0, out=np.empty_like(s))
    np.minimum(s, 0.0, out=out)
    np.exp(out, out=out)
    # Exactly 1 - 1 on the right, so that alpha leaves no trace there.
    np.subtract(out, right, out=out)
    np.multiply(out, alpha, out=out)
    np.add(out, right, out=out)


def elu_2(s: Array, out: Array, alpha: float) -> None:
    left = np.less_equal(s, 0.0, out=np.empty_like(s))
    np.minimum(s, 0.0, out=out)
    np.exp(out, out=out)
    np.multiply(out, left, out=out)
    np.multiply(out, alpha, out=out)


#: sigma, sigma', sigma'' and the primitive of each built-in activation.
KERNELS: dict[str, tuple[Kernel, Kernel, Kernel, Kernel]] = {
    "tanh": (np.tanh, sech2, tanh_2, log_cosh),
    "arctan": (np.arctan, arctan_1, arctan_2, arctan_primitive),
    "sigmoid": (sigmoid, sigmoid_1, sigmoid_2, sigmoid_primitive),
    "softplus": (softplus, sigmoid, sigmoid_1, softplus_primitive),
    "relu": (relu, relu_1, zero, relu_primitive),
    "leaky_relu": (leaky_relu, leaky_relu_1, zero, leaky_relu_primitive),
    "elu": (elu, elu_1, elu_2, elu_primitive),
    "identity": (np.positive, one, zero, identity_primitive),
}
