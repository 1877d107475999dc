r"""Activations sigma of f_t = sigma(a - B f): what tangents, adjoints, Hessians and the theory ask of them.

Tangents and adjoints ask for sigma', Hessians for sigma'', the energies of section 3 for the primitive Sigma:

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

A user's own activation is one SymPy expression, `Activation.from_sympy`; `fem_resnet.sympy_activation` says how it is
evaluated.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from types import MappingProxyType
from typing import Self

import numpy as np
import sympy
from numpy.typing import ArrayLike, NDArray
from scipy.special import spence

from fem_resnet import sympy_activation

__all__ = ["ACTIVATIONS", "Activation", "Properties", "get_activation"]

Array = NDArray[np.float64]
Kernel = Callable[..., object]


@dataclass(frozen=True)
class Properties:
    """What the statements of the paper suppose of sigma; (A1) of 3.2 is the first five together.

    Attributes
    ----------
    lipschitz : float
        sup |sigma'|, infinite if there is no bound.
    zero_at_zero : bool
        sigma(0) = 0.
    sign_preserving : bool
        s sigma(s) >= 0 for all s, (3.4).
    positive_slope_at_zero : bool
        sigma'(0) > 0, from the left.
    non_decreasing, strictly_increasing : bool
        sigma(s) <= sigma(t), or sigma(s) < sigma(t), for all s < t.
    bounded : bool
        sup |sigma| is finite.

    Raises
    ------
    ValueError
        If `lipschitz` is negative or NaN.
    """

    lipschitz: float
    zero_at_zero: bool
    sign_preserving: bool
    positive_slope_at_zero: bool
    non_decreasing: bool
    strictly_increasing: bool
    bounded: bool

    def __post_init__(self) -> None:
        if not self.lipschitz >= 0:
            raise ValueError(f"lipschitz is {self.lipschitz!r}; give sup |sigma'|, a number >= 0 or infinity")


@dataclass(frozen=True)
class Activation:
    """An activation sigma, applied pointwise. Get one from `get_activation` or `from_sympy`.

    Two are equal if their names and parameters are, or their expressions; `description` tells one completely.

    Attributes
    ----------
    name : str
        Its key in `ACTIVATIONS`, or its expression.
    kernels : tuple of four callables
        sigma, sigma', sigma'' and at last the primitive Sigma, so that `kernels[k]` is the k-th derivative for k = -1,
        ..., 2. Each is called as ``kernel(s, out, **parameters)`` with float64 arrays of one shape. It fills `out`,
        which may be `s` itself: a kernel must not read `s` once it has written to `out`.
    declared : Properties, or callable
        What holds for it; if that depends on the parameters, a function ``declared(**parameters)``.
    parameters : tuple of (str, float)
        The parameters by name, all of them; ``dict(parameters)`` is what `get_activation` takes.
    joints : tuple of float
        The points where two formulas meet, so that sigma' or sigma'' may jump. Both are given from the left there.
    expression : sympy.Expr or None
        The SymPy expression that it was made from.

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
    kernels: tuple[Kernel, Kernel, Kernel, Kernel] = field(repr=False)
    declared: Properties | Callable[..., Properties] = field(repr=False, compare=False)
    parameters: tuple[tuple[str, float], ...] = ()
    joints: tuple[float, ...] = ()
    expression: sympy.Expr | None = field(default=None, repr=False)

    @classmethod
    def from_sympy(cls, expression: sympy.Expr, properties: Properties | None = None) -> Self:
        """The activation sigma(s) = expression.

        sigma' and sigma'' are its derivatives, from the left where formulas meet (`Piecewise`, `Max`, `Abs`). The
        primitive is SymPy's if that is good to all digits, else it is integrated to 1e-14, for |s| <= 1e4.

        Parameters
        ----------
        expression : sympy.Expr
            In the one symbol ``s = sympy.Symbol("s")``. Text is not parsed.
        properties : Properties, optional
            What holds for it, if you know it; else what values up to |s| = 1e4 tell.

        Returns
        -------
        Activation

        Raises
        ------
        TypeError
            If `expression` is no SymPy expression, or has other free symbols, or `properties` are none.
        ValueError
            If sigma jumps, or is complex, or sigma, sigma' or sigma'' is not finite for some |s| <= 1e4.

        Examples
        --------
        >>> s = sympy.Symbol("s")
        >>> swish = Activation.from_sympy(s / (1 + sympy.exp(-s)))
        >>> swish([-1e4, 0.0, 1e4]).tolist(), swish.derivative([-1e4, 0.0, 1e4]).tolist()
        ([-0.0, 0.0, 10000.0], [-0.0, 0.5, 1.0])
        >>> round(swish.properties.lipschitz, 6), swish.properties.non_decreasing
        (1.099839, False)
        """
        if not isinstance(properties, Properties | None):
            raise TypeError(f"properties is {type(properties).__name__}; give Properties, or leave them out")
        expression = sympy_activation.normal_form(expression)
        sympy_activation.check(expression)
        return cls(
            str(expression),
            tuple(sympy_activation.Kernel(expression, order) for order in (0, 1, 2, -1)),
            properties or Properties(**sympy_activation.properties(expression)),
            joints=sympy_activation.cuts(expression),
            expression=expression,
        )

    @classmethod
    def from_description(cls, description: Mapping[str, object]) -> Self:
        """The activation of that `description`, which may come from a file: no text is evaluated.

        Raises
        ------
        TypeError, ValueError
            If it is no description, or what it describes is refused by `get_activation` or `from_sympy`.
        """
        match description:
            case {"name": str(name), "parameters": Mapping() as parameters}:
                return get_activation(name, **parameters)
            case {"expression": tree, "properties": Mapping() as properties}:
                if properties.get("lipschitz") is None:
                    properties = {**properties, "lipschitz": math.inf}
                return cls.from_sympy(sympy_activation.from_tree(tree), Properties(**properties))
        raise ValueError(
            f"description is {description!r}; give what Activation.description gave: "
            "name and parameters, or expression and properties"
        )

    @property
    def description(self) -> dict[str, object]:
        """dict : lists, texts and numbers that JSON can store, from which `from_description` makes it again.

        Raises
        ------
        ValueError
            If the expression has functions that are not on the list of `fem_resnet.sympy_activation`.

        Examples
        --------
        >>> get_activation("elu").description
        {'name': 'elu', 'parameters': {'alpha': 1.0}}
        >>> Activation.from_sympy(sympy.sin(sympy.Symbol("s"))).description["expression"]
        ['sin', 's']
        """
        if self.expression is None:
            return {"name": self.name, "parameters": dict(self.parameters)}
        properties = asdict(self.properties)
        # JSON has no infinity.
        if math.isinf(self.properties.lipschitz):
            properties["lipschitz"] = None
        return {"expression": sympy_activation.to_tree(self.expression), "properties": properties}

    @property
    def properties(self) -> Properties:
        """Properties : what holds for it, as declared for the built-ins, as found by values for expressions."""
        return self.declared if isinstance(self.declared, Properties) else self.declared(**dict(self.parameters))

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

    def primitive(self, s: ArrayLike, out: Array | None = None) -> Array:
        """Sigma(s) = int_0^s sigma, pointwise; arguments, result and errors as for `__call__`.

        That of an expression may be NaN for |s| > 1e4, and raises ValueError if sigma varies too fast to be integrated.
        """
        return self._apply(-1, s, out)

    @property
    def kinks(self) -> tuple[float, ...]:
        """tuple of float : the points where sigma' jumps."""
        # Two formulas for one value differ by rounding.
        return tuple(
            point
            for point in self.joints
            if not np.isclose(
                self.derivative(point), self.derivative(sympy_activation.right_of(point)), rtol=1e-12, atol=1e-12
            )
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


def get_activation(spec: str | Activation | sympy.Expr, **parameters: float) -> Activation:
    """The activation of that name, or of that expression.

    Parameters
    ----------
    spec : str, Activation or sympy.Expr
        A key of `ACTIVATIONS`; an `Activation` is returned as it is; an expression is given to `Activation.from_sympy`.
    **parameters : float
        Parameters of the activation, finite and positive; those not given keep their defaults.

    Returns
    -------
    Activation

    Raises
    ------
    TypeError
        If `spec` is none of these, a parameter is not one of this activation, or is no real number.
    ValueError
        If the name is not known, a parameter is not finite and positive, or `Activation.from_sympy` refuses it.

    Examples
    --------
    >>> sigma = get_activation("elu", alpha=0.5)
    >>> sigma.name, sigma.parameters
    ('elu', (('alpha', 0.5),))
    >>> get_activation(sigma.name, **dict(sigma.parameters)) == sigma
    True
    """
    if isinstance(spec, sympy.Expr):
        spec = Activation.from_sympy(spec)
    if isinstance(spec, Activation):
        if parameters:
            raise TypeError(
                f"parameters {', '.join(parameters)} given along with an Activation, whose parameters are fixed; "
                f"give its name, {spec.name!r}, instead"
            )
        return spec
    if not isinstance(spec, str):
        raise TypeError(
            f"spec is {type(spec).__name__}; give the name of an activation, an Activation, or a SymPy expression in s"
        )
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


# Primitives are asked for now and then only: they may take temporaries. All of `s` is read before `out` is written.


def _log_cosh(s: Array, out: Array) -> None:
    size = np.abs(s)
    near = np.minimum(size, 20.0)
    out[...] = (size - near) + 0.5 * np.log1p(np.sinh(near) ** 2)


def _arctan_primitive(s: Array, out: Array) -> None:
    out[...] = s * np.arctan(s) - 0.5 * np.log1p(s * s)


def _sigmoid_primitive(s: Array, out: Array) -> None:
    out[...] = np.maximum(s, 0.0) + np.log1p(0.5 * np.expm1(-np.abs(s)))


def _softplus_primitive(s: Array, out: Array) -> None:
    size = np.abs(s)
    near = _integral_to(np.minimum(size, 1.0), lambda x: np.log1p(np.exp(-x)))
    tail = np.where(size < 1.0, near, np.pi**2 / 12 + spence(1.0 + np.exp(-size)))
    out[...] = np.where(s > 0.0, 0.5 * s * s + tail, -tail)


def _elu_primitive(s: Array, out: Array, alpha: float) -> None:
    left, right = np.minimum(s, 0.0), np.maximum(s, 0.0)
    near = _integral_to(np.maximum(left, -1.0), np.expm1)
    out[...] = alpha * np.where(left > -1.0, near, np.expm1(left) - left) + 0.5 * right * right


def _integral_to(s: Array, function: Callable[[Array], Array]) -> Array:
    """int_0^s function for |s| <= 1, to all digits if it has one sign, and no singularity within 3 of 0."""
    # The error of n points is about rho^(-2 n), with rho > 12 here.
    nodes, weights = np.polynomial.legendre.leggauss(8)
    return 0.5 * s * sum(weight * function(0.5 * (1.0 + node) * s) for node, weight in zip(nodes, weights, strict=True))


def _relu_primitive(s: Array, out: Array) -> None:
    out[...] = 0.5 * s * np.maximum(s, 0.0)


def _leaky_relu_primitive(s: Array, out: Array) -> None:
    out[...] = 0.5 * s * np.maximum(_LEAK * s, s)


def _identity_primitive(s: Array, out: Array) -> None:
    out[...] = 0.5 * s * s


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


_ALL_WITH_SLOPE_1 = Properties(
    lipschitz=1.0,
    zero_at_zero=True,
    sign_preserving=True,
    positive_slope_at_zero=True,
    non_decreasing=True,
    strictly_increasing=True,
    bounded=True,
)
_UNBOUNDED = replace(_ALL_WITH_SLOPE_1, bounded=False)


def _elu_properties(alpha: float) -> Properties:
    return replace(_UNBOUNDED, lipschitz=max(1.0, alpha))


# The built-in activations by name, with default parameters. A new one is an entry here, and its formulas in the test.
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            Activation("tanh", (np.tanh, _sech2, _tanh_2, _log_cosh), _ALL_WITH_SLOPE_1),
            Activation("arctan", (np.arctan, _arctan_1, _arctan_2, _arctan_primitive), _ALL_WITH_SLOPE_1),
            Activation(
                "sigmoid",
                (_sigmoid, _sigmoid_1, _sigmoid_2, _sigmoid_primitive),
                replace(_ALL_WITH_SLOPE_1, lipschitz=0.25, zero_at_zero=False, sign_preserving=False),
            ),
            Activation(
                "softplus",
                (_softplus, _sigmoid, _sigmoid_1, _softplus_primitive),
                replace(_UNBOUNDED, zero_at_zero=False, sign_preserving=False),
            ),
            Activation(
                "relu",
                (_relu, _relu_1, _zero, _relu_primitive),
                replace(_UNBOUNDED, positive_slope_at_zero=False, strictly_increasing=False),
                joints=(0.0,),
            ),
            Activation(
                "leaky_relu", (_leaky_relu, _leaky_relu_1, _zero, _leaky_relu_primitive), _UNBOUNDED, joints=(0.0,)
            ),
            Activation(
                "elu",
                (_elu, _elu_1, _elu_2, _elu_primitive),
                _elu_properties,
                parameters=(("alpha", 1.0),),
                joints=(0.0,),
            ),
            Activation("identity", (np.positive, _one, _zero, _identity_primitive), _UNBOUNDED),
        )
    }
)
