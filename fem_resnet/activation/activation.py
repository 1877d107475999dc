r"""Activations sigma of f_t = sigma(a - B f): sigma, its first two derivatives and its primitive, pointwise on arrays.

Tangents and adjoints use sigma', Hessians sigma'', the energies of section 3 the primitive Sigma(s) = int_0^s sigma.
`pointwise` has the formulas of the built-in activations, `ACTIVATIONS`. A user's own activation is one SymPy expression,
`Activation.from_sympy`; `expression` says how it is evaluated.

Where two formulas meet, at a *joint*, both derivatives are those *from the left*. A joint is a *kink* if sigma' jumps there.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from types import MappingProxyType, NoneType
from typing import Any, Self, cast

import numpy as np
import sympy
from numpy.typing import ArrayLike, NDArray

from fem_resnet.activation.expression import Kernel, check, normal_form
from fem_resnet.activation.expression_properties import contradicted, properties_of
from fem_resnet.activation.expression_tree import from_tree, to_tree
from fem_resnet.activation.pieces import REACH, cuts, right_of
from fem_resnet.activation.pointwise import KERNELS
from fem_resnet.activation.properties import Properties
from fem_resnet.arguments import choice, function, instance, number, real_array, text

__all__ = ["ACTIVATIONS", "Activation", "get_activation"]

Array = NDArray[np.float64]
#: ``fill(s, out, **parameters)`` fills `out`.
Fill = Callable[..., object]


@dataclass(frozen=True)
class Activation:
    """An activation sigma, applied pointwise. Get one from `get_activation` or `from_sympy`.

    Two activations are equal if their names, kernels, parameters, joints and expressions are. `description` holds all of an
    activation in a form for files.

    Attributes
    ----------
    name : str
        Its key in `ACTIVATIONS`, or its expression.
    kernels : tuple of four callables
        sigma, sigma', sigma'' and at last the primitive Sigma, so that `kernels[k]` is the k-th derivative for k = -1,
        ..., 2. Each is called as ``kernel(s, out, **parameters)`` with float64 arrays of one shape. It fills `out`,
        which may be `s` itself: a kernel must not read `s` once it has written to `out`.
    declared : Properties, or callable
        What holds for sigma; if that depends on the parameters, a function ``declared(**parameters)``.
    parameters : tuple of (str, float)
        All parameters by name; `get_activation` takes ``**dict(parameters)``.
    joints : tuple of float
        The points where two formulas meet, so that sigma' or sigma'' may jump. Both are given from the left there.
    expression : sympy.Expr or None
        The SymPy expression of which the activation was made.

    Raises
    ------
    TypeError, ValueError
        If one of these is of another kind, or there are not four kernels.

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
    kernels: tuple[Fill, Fill, Fill, Fill] = field(repr=False)
    declared: Properties | Callable[..., Properties] = field(repr=False, compare=False)
    parameters: tuple[tuple[str, float], ...] = ()
    joints: tuple[float, ...] = ()
    expression: sympy.Expr | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        text("name", self.name)
        if len(instance("kernels", self.kernels, (tuple, list))) != 4:
            raise ValueError(f"kernels: expected sigma, sigma', sigma'' and the primitive, got {len(self.kernels)} functions")
        for kernel in self.kernels:
            function("kernels", kernel, "a function of s, out and the parameters")
        if not isinstance(self.declared, Properties):
            function("declared", self.declared, "Properties, or a function of the parameters,")
        instance("parameters", self.parameters, (tuple, list))
        for pair in self.parameters:
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
                raise TypeError(f"parameters: expected pairs of a name and a number, got {pair!r}")
            number("parameters", pair[1])
        instance("joints", self.joints, (tuple, list))
        for joint in self.joints:
            number("joints", joint)
        instance("expression", self.expression, (sympy.Expr, NoneType))

    @classmethod
    def from_sympy(cls, expression: sympy.Expr, properties: Properties | None = None) -> Self:
        """The activation sigma(s) = expression.

        sigma' and sigma'' are its derivatives, from the left where formulas meet (`Piecewise`, `Max`, `Abs`). The
        primitive is SymPy's antiderivative if that is accurate to all digits; else it is integrated numerically, to a relative
        error of 1e-14 for |s| <= 1e4.

        Parameters
        ----------
        expression : sympy.Expr
            In the one symbol ``s = sympy.Symbol("s")``. Text is not parsed.
        properties : Properties, optional
            What holds for sigma, if you know it; neither a proof nor values up to |s| = 1e4 may refute it. If left out, the
            properties are those that interval arithmetic proves, and where it cannot, those that values show; the latter are
            `sampled`.

        Raises
        ------
        TypeError
            If `expression` is no SymPy expression, or has other free symbols, or `properties` is no Properties.
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
        expression = normal_form(expression)
        check(expression)
        if properties is not None and (wrong := contradicted(expression, asdict(properties))):
            found = properties_of(expression)
            raise ValueError(
                f"properties: expected those of {expression}, got others; values up to |s| = {REACH:g} or a proof show "
                + ", ".join(f"{name} = {getattr(found, name)!r}" for name in wrong)
            )
        return cls(
            str(expression),
            (Kernel(expression, 0), Kernel(expression, 1), Kernel(expression, 2), Kernel(expression, -1)),
            properties or partial(properties_of, expression),
            joints=cuts(expression),
            expression=expression,
        )

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "Activation":
        """The activation of a `description`, which may come from a file: no text is evaluated.

        Raises
        ------
        TypeError, ValueError
            If it is no description, or `get_activation` or `from_sympy` refuses the activation.
        """
        match description:
            case {"name": str(name), "parameters": Mapping() as parameters, **rest} if not rest:
                return get_activation(name, **parameters)
            case {"expression": tree, "properties": Mapping() as properties, **rest} if not rest:
                given = {**properties, "sampled": frozenset(properties.get("sampled", ()))}
                if given.get("lipschitz") is None:
                    given["lipschitz"] = math.inf
                for key in set(given) - {"sampled", "lipschitz"}:
                    instance(key, given[key], bool)
                instance("lipschitz", given["lipschitz"], (int, float))
                return cls.from_sympy(cast(sympy.Expr, from_tree(tree)), Properties(**given))
        raise ValueError(
            f"description: expected what Activation.description gives, name and parameters or expression and properties; "
            f"got {description!r}"
        )

    @property
    def is_described(self) -> bool:
        """Whether its kernels are those of its name in `ACTIVATIONS`, or of its expression: then `description` holds all."""
        if self.expression is None:
            known = ACTIVATIONS.get(self.name)
            return known is not None and self.kernels == known.kernels
        return all(
            isinstance(kernel, Kernel) and (kernel.expression, kernel.order) == (self.expression, order)
            for kernel, order in zip(self.kernels, (0, 1, 2, -1), strict=True)
        )

    @property
    def description(self) -> dict[str, object]:
        """The activation as lists, texts and numbers that JSON can store; `from_description` makes it again.

        Raises
        ------
        ValueError
            If it has kernels of its own (`is_described`), or the expression has functions that are not on the list of
            `fem_resnet.activation.expression_tree`, or is larger than `from_description` takes.

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
        tree = to_tree(self.expression)
        from_tree(tree)  # an expression that is too large to be read again is not written
        return {"expression": tree, "properties": properties}

    @property
    def properties(self) -> Properties:
        """What holds for sigma: declared for the built-ins, proved or found by values for expressions."""
        return self.declared if isinstance(self.declared, Properties) else self.declared(**dict(self.parameters))

    def __call__(self, s: ArrayLike, out: Array | None = None) -> Array:
        """sigma(s), pointwise.

        Parameters
        ----------
        s : array_like
            The arguments, of any shape. Numbers that cast safely to float64 (integers, float32) are converted.
        out : numpy.ndarray, optional
            A float64 array of the shape of `s` where the result goes. It may be `s` itself.

        Returns
        -------
        numpy.ndarray
            float64, of the shape of `s`: `out` if it was given, else a new array; 0-dimensional if `s` is a number.

        Raises
        ------
        TypeError
            If `s` does not cast safely to float64, or `out` is no float64 array.
        ValueError
            If `out` has another shape than `s`.
        """
        return self._apply(0, s, out)

    def derivative(self, s: ArrayLike, out: Array | None = None) -> Array:
        """sigma'(s), pointwise, from the left at kinks. Result and errors are as of `__call__`.

        Parameters
        ----------
        s, out
            As of `__call__`: the arguments, of any shape, and an array of this shape for the result.
        """
        return self._apply(1, s, out)

    def second_derivative(self, s: ArrayLike, out: Array | None = None) -> Array:
        """sigma''(s), pointwise, from the left at joints. Result and errors are as of `__call__`.

        Parameters
        ----------
        s, out
            As of `__call__`: the arguments, of any shape, and an array of this shape for the result.
        """
        return self._apply(2, s, out)

    def primitive(self, s: ArrayLike, out: Array | None = None) -> Array:
        """Sigma(s) = int_0^s sigma, pointwise. Result and errors are as of `__call__`.

        For an expression the result may be NaN where |s| > 1e4; a ValueError says if sigma varies too fast to be integrated.

        Parameters
        ----------
        s, out
            As of `__call__`: the arguments, of any shape, and an array of this shape for the result.
        """
        return self._apply(-1, s, out)

    @property
    def kinks(self) -> tuple[float, ...]:
        """The points where sigma' jumps."""
        # Two formulas for one value differ by rounding.
        return tuple(
            point
            for point in self.joints
            if not np.isclose(self.derivative(point), self.derivative(right_of(point)), rtol=1e-12, atol=1e-12)
        )

    def _apply(self, order: int, s: ArrayLike, out: Array | None) -> Array:
        if type(s) is not np.ndarray or s.dtype != np.float64:
            s = _converted(s)
        if out is None:
            out = np.empty_like(s)
        elif not isinstance(out, np.ndarray) or out.dtype != np.float64:
            given = f"an array of {out.dtype}" if isinstance(out, np.ndarray) else type(out).__name__
            raise TypeError(f"out: expected a float64 array, got {given}; leave it out for a new array")
        elif out.shape != s.shape:
            raise ValueError(f"out: expected the shape of s, {s.shape}, got {out.shape}")
        self.kernels[order](s, out, **dict(self.parameters))
        return out


def _converted(s: ArrayLike) -> Array:
    if isinstance(s, np.ndarray) and s.dtype.kind in "biuf" and not np.can_cast(s.dtype, np.float64):
        raise TypeError(f"s: expected numbers that cast safely to float64, got {s.dtype}")
    return real_array("s", s, finite=False)


def get_activation(spec: str | Activation | sympy.Expr, **parameters: float) -> Activation:
    """The activation of that name, or of that expression.

    Parameters
    ----------
    spec : str, Activation or sympy.Expr
        A key of `ACTIVATIONS`; an `Activation` is returned as it is; an expression is given to `Activation.from_sympy`.
    **parameters : float
        Parameters of the activation, finite and positive; the others keep their defaults.

    Raises
    ------
    TypeError
        If `spec` is none of these, or the activation has no such parameter.
    ValueError
        If the name is not known, a parameter is no finite positive number, or `Activation.from_sympy` refuses the expression.

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
                f"parameters: expected none with an Activation, whose parameters are fixed, got {', '.join(parameters)}; "
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
        raise TypeError(f"parameters: expected {', '.join(accepted) or 'none'} for {spec}, got {', '.join(unexpected)}")
    given = {key: number(key, value, above=0) for key, value in parameters.items()}
    return replace(default, parameters=tuple((accepted | given).items()))


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


#: The built-in activations by name, with default parameters. A new one is an entry here and in `pointwise.KERNELS`, and its
#: formulas in the test.
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        name: Activation(name, KERNELS[name], declared, parameters, joints)
        for name, declared, parameters, joints in (
            ("tanh", _ALL_WITH_SLOPE_1, (), ()),
            ("arctan", _ALL_WITH_SLOPE_1, (), ()),
            ("sigmoid", replace(_ALL_WITH_SLOPE_1, lipschitz=0.25, zero_at_zero=False, sign_preserving=False), (), ()),
            ("softplus", replace(_UNBOUNDED, zero_at_zero=False, sign_preserving=False), (), ()),
            ("relu", replace(_UNBOUNDED, positive_slope_at_zero=False, strictly_increasing=False), (), (0.0,)),
            ("leaky_relu", _UNBOUNDED, (), (0.0,)),
            ("elu", _elu_properties, (("alpha", 1.0),), (0.0,)),
            ("identity", _UNBOUNDED, (), ()),
        )
    }
)
