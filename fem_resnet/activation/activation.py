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

A user's own activation is one SymPy expression, `Activation.from_sympy`; `fem_resnet.activation.sympy_activation` says how it is
evaluated.
"""

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from numbers import Real
from types import MappingProxyType, NoneType
from typing import Self

import numpy as np
import sympy
from numpy.typing import ArrayLike, NDArray

import fem_resnet.activation.pointwise as pointwise
import fem_resnet.activation.properties as activation_properties
import fem_resnet.activation.sympy_activation as sympy_activation
from fem_resnet.arguments import choice, flag, function, instance, number, real_array

__all__ = ["ACTIVATIONS", "Activation", "Properties", "get_activation"]

Array = NDArray[np.float64]
Kernel = Callable[..., object]


_IN_WORDS = {
    "lipschitz": "sup |sigma'|",
    "zero_at_zero": "sigma(0) = 0",
    "sign_preserving": "s sigma(s) >= 0",
    "positive_slope_at_zero": "sigma'(0) > 0",
    "non_decreasing": "sigma does not decrease",
    "strictly_increasing": "sigma increases strictly",
    "bounded": "sigma is bounded",
}


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
    sampled : frozenset of str
        Which of these nothing proves: nothing was seen against them up to |s| = 1e4. `caveat` says so in words.

    Raises
    ------
    TypeError, ValueError
        If `lipschitz` is no number >= 0 or infinity, another is neither True nor False, or `sampled` has other names.

    Examples
    --------
    >>> properties = get_activation("tanh").properties
    >>> properties.caveat("lipschitz", "bounded")
    ''
    >>> replace(properties, sampled=frozenset(["bounded"])).caveat("lipschitz", "bounded")
    'sampled, not proved: sigma is bounded'
    """

    lipschitz: float
    zero_at_zero: bool
    sign_preserving: bool
    positive_slope_at_zero: bool
    non_decreasing: bool
    strictly_increasing: bool
    bounded: bool
    sampled: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not (isinstance(self.lipschitz, Real) and self.lipschitz == math.inf):
            number("lipschitz", self.lipschitz, least=0)
        for name in _IN_WORDS:
            if name != "lipschitz":
                flag(name, getattr(self, name))
        for name in instance("sampled", self.sampled, (Set, list, tuple), "names of properties"):
            choice("sampled", name, _IN_WORDS)

    def caveat(self, *names: str) -> str:
        """What a statement that rests on these properties has to say: which of them are sampled, "" if none is."""
        sampled = [_IN_WORDS[name] for name in names if name in self.sampled]
        return f"sampled, not proved: {', '.join(sampled)}" if sampled else ""


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

    Raises
    ------
    TypeError, ValueError
        If one of these is something else.

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

    def __post_init__(self) -> None:
        instance("name", self.name, str)
        if len(instance("kernels", self.kernels, (tuple, list))) != 4:
            raise ValueError(f"kernels: expected sigma, sigma', sigma'' and the primitive, got {len(self.kernels)}")
        for kernel in self.kernels:
            function("kernels", kernel, "a function of s, out and the parameters")
        if not isinstance(self.declared, Properties):
            function("declared", self.declared, "Properties, or a function of the parameters,")
        for pair in instance("parameters", self.parameters, (tuple, list)):
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
                raise TypeError(f"parameters: expected pairs of a name and a number, got {pair!r}")
            number("parameters", pair[1])
        for joint in instance("joints", self.joints, (tuple, list)):
            number("joints", joint)
        instance("expression", self.expression, (sympy.Expr, NoneType))

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
            What holds for it, if you know it, as far as neither a proof nor values up to |s| = 1e4 say otherwise. Left out,
            what interval arithmetic proves, and what values tell where it cannot: these are `sampled`.

        Returns
        -------
        Activation

        Raises
        ------
        TypeError
            If `expression` is no SymPy expression, or has other free symbols, or `properties` are none.
        ValueError
            If sigma jumps, or is complex, or sigma, sigma' or sigma'' is not finite for some |s| <= 1e4, or if one of the
            `properties` does not hold.

        Examples
        --------
        >>> s = sympy.Symbol("s")
        >>> swish = Activation.from_sympy(s / (1 + sympy.exp(-s)))
        >>> swish([-1e4, 0.0, 1e4]).tolist(), swish.derivative([-1e4, 0.0, 1e4]).tolist()
        ([-0.0, 0.0, 10000.0], [-0.0, 0.5, 1.0])
        >>> round(swish.properties.lipschitz, 6), swish.properties.non_decreasing
        (1.099839, False)
        """
        instance("properties", properties, (Properties, NoneType), "leave them out where you do not know")
        expression = sympy_activation.normal_form(expression)
        sympy_activation.check(expression)
        if properties is not None and (wrong := activation_properties.contradicted(expression, asdict(properties))):
            found = activation_properties.properties(expression)
            raise ValueError(
                f"properties: of {expression}, values up to |s| = {sympy_activation.REACH:g} or a proof tell otherwise than declared: "
                + ", ".join(f"{name} = {found[name]!r}" for name in wrong)
            )
        return cls(
            str(expression),
            tuple(sympy_activation.Kernel(expression, order) for order in (0, 1, 2, -1)),
            properties or partial(_found, expression),
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
            case {"name": str(name), "parameters": Mapping() as parameters, **rest} if not rest:
                return get_activation(name, **parameters)
            case {"expression": tree, "properties": Mapping() as properties, **rest} if not rest:
                if properties.get("lipschitz") is None:
                    properties = {**properties, "lipschitz": math.inf}
                for key in set(properties) - {"sampled", "lipschitz"}:
                    instance(key, properties[key], bool)
                instance("lipschitz", properties["lipschitz"], (int, float))
                given = Properties(**properties | {"sampled": frozenset(properties.get("sampled", ()))})
                return cls.from_sympy(sympy_activation.from_tree(tree), given)
        raise ValueError(
            f"description is {description!r}; give what Activation.description gave: "
            "name and parameters, or expression and properties"
        )

    @property
    def is_described(self) -> bool:
        """Bool : whether its kernels are those that its name, or its expression, stands for."""
        if self.expression is None:
            known = ACTIVATIONS.get(self.name)
            return known is not None and self.kernels == known.kernels
        return all(
            isinstance(kernel, sympy_activation.Kernel) and (kernel.expression, kernel.order) == (self.expression, order)
            for kernel, order in zip(self.kernels, (0, 1, 2, -1), strict=True)
        )

    @property
    def description(self) -> dict[str, object]:
        """Dict : lists, texts and numbers that JSON can store, from which `from_description` makes it again.

        Raises
        ------
        ValueError
            If it has kernels of its own (`is_described`), or the expression has functions that are not on the list of
            `fem_resnet.activation.sympy_activation`, or is larger than `from_description` takes.

        Examples
        --------
        >>> get_activation("elu").description
        {'name': 'elu', 'parameters': {'alpha': 1.0}}
        >>> Activation.from_sympy(sympy.sin(sympy.Symbol("s"))).description["expression"]
        ['sin', 's']
        """
        if not self.is_described:
            raise ValueError(f"activation: {self.name} has kernels of its own, which no file holds; give a SymPy expression")
        if self.expression is None:
            return {"name": self.name, "parameters": dict(self.parameters)}
        properties = asdict(self.properties) | {"sampled": sorted(self.properties.sampled)}
        # JSON has no infinity.
        if math.isinf(self.properties.lipschitz):
            properties["lipschitz"] = None
        tree = sympy_activation.to_tree(self.expression)
        sympy_activation.from_tree(tree)  # what is too large to be read again is not written
        return {"expression": tree, "properties": properties}

    @property
    def properties(self) -> Properties:
        """Properties : what holds for it, as declared for the built-ins, as proved or found by values for expressions."""
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

    def _argument(self, s: ArrayLike) -> Array:
        if isinstance(s, np.ndarray) and s.dtype.kind in "biuf" and not np.can_cast(s.dtype, np.float64):
            raise TypeError(f"s: expected numbers that cast safely to float64, got {s.dtype}")
        return real_array("s", s, finite=False)

    @property
    def kinks(self) -> tuple[float, ...]:
        """The points where sigma' jumps."""
        # Two formulas for one value differ by rounding.
        return tuple(
            point
            for point in self.joints
            if not np.isclose(
                self.derivative(point), self.derivative(sympy_activation.right_of(point)), rtol=1e-12, atol=1e-12
            )
        )

    def _apply(self, order: int, s: ArrayLike, out: Array | None) -> Array:
        if type(s) is not np.ndarray or s.dtype != np.float64:
            s = self._argument(s)
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
        raise TypeError(f"activation: expected its name, an Activation, or a SymPy expression in s, got {type(spec).__name__}")
    choice("activation", spec, ACTIVATIONS)
    default = ACTIVATIONS[spec]
    accepted = dict(default.parameters)
    unexpected = [key for key in parameters if key not in accepted]
    if unexpected:
        raise TypeError(f"parameters {', '.join(unexpected)} given to {spec}, which accepts {', '.join(accepted) or 'none'}")
    given = {key: _positive(key, value) for key, value in parameters.items()}
    return replace(default, parameters=tuple((accepted | given).items()))


def _found(expression: sympy.Expr) -> Properties:
    return Properties(**activation_properties.properties(expression))


def _positive(key: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{key} is {value!r}; give a real number")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{key} is {value!r}; give a finite number > 0")
    return float(value)


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


#: The built-in activations by name, with default parameters. A new one is an entry here, and its formulas in the test.
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            Activation("tanh", (np.tanh, pointwise.sech2, pointwise.tanh_2, pointwise.log_cosh), _ALL_WITH_SLOPE_1),
            Activation(
                "arctan", (np.arctan, pointwise.arctan_1, pointwise.arctan_2, pointwise.arctan_primitive), _ALL_WITH_SLOPE_1
            ),
            Activation(
                "sigmoid",
                (pointwise.sigmoid, pointwise.sigmoid_1, pointwise.sigmoid_2, pointwise.sigmoid_primitive),
                replace(_ALL_WITH_SLOPE_1, lipschitz=0.25, zero_at_zero=False, sign_preserving=False),
            ),
            Activation(
                "softplus",
                (pointwise.softplus, pointwise.sigmoid, pointwise.sigmoid_1, pointwise.softplus_primitive),
                replace(_UNBOUNDED, zero_at_zero=False, sign_preserving=False),
            ),
            Activation(
                "relu",
                (pointwise.relu, pointwise.relu_1, pointwise.zero, pointwise.relu_primitive),
                replace(_UNBOUNDED, positive_slope_at_zero=False, strictly_increasing=False),
                joints=(0.0,),
            ),
            Activation(
                "leaky_relu",
                (pointwise.leaky_relu, pointwise.leaky_relu_1, pointwise.zero, pointwise.leaky_relu_primitive),
                _UNBOUNDED,
                joints=(0.0,),
            ),
            Activation(
                "elu",
                (pointwise.elu, pointwise.elu_1, pointwise.elu_2, pointwise.elu_primitive),
                _elu_properties,
                parameters=(("alpha", 1.0),),
                joints=(0.0,),
            ),
            Activation("identity", (np.positive, pointwise.one, pointwise.zero, pointwise.identity_primitive), _UNBOUNDED),
        )
    }
)
