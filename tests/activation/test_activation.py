"""The activations against 50-digit values, at their kinks, in place, and saved and rebuilt.

Every law is run over all built-in activations and over those from SymPy expressions.
"""

import copy
import json
import math
import pickle
from dataclasses import fields, replace
from functools import cache

import mpmath
import numpy as np
import pytest
import sympy
from numpy.testing import assert_allclose, assert_array_equal

from fem_resnet.activation import primitive
from fem_resnet.activation.activation import ACTIVATIONS, Activation, get_activation
from fem_resnet.activation.expression import normal_form
from fem_resnet.activation.expression_tree import from_tree, to_tree
from fem_resnet.activation.properties import Properties

#: They list what there is.
pytestmark = pytest.mark.whole

S = sympy.Symbol("s", real=True)


LOGISTIC = 1 / (1 + sympy.exp(-S))
SOFTPLUS = sympy.log(1 + sympy.exp(S))


def _softplus_primitive(s):
    """int_0^s log(1 + e^x) dx to 50 digits; by dilogarithms where they do not cancel."""
    with mpmath.workdps(50):
        if abs(s) <= 1:
            return s * mpmath.quad(lambda x: mpmath.log1p(mpmath.exp(s * x)), [0, 1])
        gap = mpmath.pi**2 / 12 + mpmath.polylog(2, -mpmath.exp(-abs(s)))
        return s**2 / 2 + gap if s > 0 else -gap


def _swish_primitive(s):
    """int_0^s x / (1 + e^-x) dx = s log(1 + e^s) - int_0^s log(1 + e^x) dx."""
    with mpmath.workdps(50):
        if abs(s) <= 1:
            return s**2 * mpmath.quad(lambda x: x / (1 + mpmath.exp(-s * x)), [0, 1])
        return s * (max(s, 0) + mpmath.log1p(mpmath.exp(-abs(s)))) - _softplus_primitive(s)


def _formulas(sigma):
    """(formula for s <= 0, formula for s > 0). SymPy differentiates them, so that nothing is shared with the code."""
    alpha = sympy.Rational(dict(sigma.parameters).get("alpha", 0.0))
    return {
        "tanh": (sympy.tanh(S), sympy.tanh(S)),
        "arctan": (sympy.atan(S), sympy.atan(S)),
        "sigmoid": (LOGISTIC, LOGISTIC),
        "softplus": (SOFTPLUS, SOFTPLUS),
        "relu": (sympy.Integer(0), S),
        "leaky_relu": (S / 10, S),
        "elu": (alpha * (sympy.exp(S) - 1), S),
        "identity": (S, S),
    }[sigma.name]


def _primitives(sigma):
    """The primitives of both formulas that vanish at 0."""
    alpha = sympy.Rational(dict(sigma.parameters).get("alpha", 0.0))
    log_cosh = sympy.log(sympy.cosh(S))
    arctan = S * sympy.atan(S) - sympy.log(1 + S**2) / 2
    sigmoid = sympy.log((1 + sympy.exp(S)) / 2)
    return {
        "tanh": (log_cosh, log_cosh),
        "arctan": (arctan, arctan),
        "sigmoid": (sigmoid, sigmoid),
        "softplus": (_softplus_primitive, _softplus_primitive),
        "relu": (sympy.Integer(0), S**2 / 2),
        "leaky_relu": (S**2 / 20, S**2 / 2),
        "elu": (alpha * (sympy.exp(S) - 1 - S), S**2 / 2),
        "identity": (S**2 / 2, S**2 / 2),
    }[sigma.name]


BUILT_IN = [*ACTIVATIONS.values(), get_activation("elu", alpha=0.3), get_activation("elu", alpha=1e20)]

s = sympy.Symbol("s")
EXPRESSIONS = {
    "tanh": sympy.tanh(s),
    "softplus": sympy.log(1 + sympy.exp(s)),
    "swish": s / (1 + sympy.exp(-s)),
    "sin": sympy.sin(s),
    "relu": sympy.Piecewise((0, s < 0), (s, True)),
    "max": sympy.Max(0, s),
    "hard_tanh": sympy.Max(-1, sympy.Min(s, 1)),
    "elu": sympy.Piecewise((sympy.exp(s) - 1, s < 0), (s, True)),
    "sech": sympy.E / sympy.cosh(0.7 * s),
    "gelu": s * (1 + sympy.erf(s / sympy.sqrt(2))) / 2,
    "softsign": s / (1 + sympy.Abs(s)),
    "cubic": s**3 / 3 + s,
    "constant": sympy.Rational(1, 3) + 0 * s,
}
FROM_SYMPY = {name: Activation.from_sympy(expression) for name, expression in EXPRESSIONS.items()}
NAMES = {sigma: f"sympy-{name}" for name, sigma in FROM_SYMPY.items()}
SIGMAS = [*BUILT_IN, *FROM_SYMPY.values()]


def _name(sigma):
    return NAMES.get(sigma) or "-".join([sigma.name, *(f"{key}={value:g}" for key, value in sigma.parameters)])


each_sigma = pytest.mark.parametrize("sigma", SIGMAS, ids=_name)
each_built_in = pytest.mark.parametrize("sigma", BUILT_IN, ids=_name)
each_order = pytest.mark.parametrize("order", [0, 1, 2, -1], ids=["value", "derivative", "second_derivative", "primitive"])


def _function(sigma, order):
    return (sigma, sigma.derivative, sigma.second_derivative, sigma.primitive)[order]


# A result is at most two SIMD functions of numpy (4 ulp each, the first one squared) and 4 roundings away from exact.
RTOL = 16 * np.finfo(float).eps


def _atol(sigma):
    # Below the smallest normal number doubles have fewer digits; for elu alpha multiplies such an e^s.
    return np.finfo(float).tiny * max([1.0, *dict(sigma.parameters).values()])


@cache
def _grid():
    """Both signs: dense near 0 and where exponentials saturate or underflow, out to 1e4, and the neighbours of 0."""
    positive = np.concatenate(
        [
            [np.nextafter(0.0, 1.0), 1e-300, 1e-20],
            np.geomspace(1e-12, 1e-2, 21),
            np.linspace(0.02, 3.0, 60),
            np.linspace(3.3, 45.0, 40),
            [100.0, 300.0, 353.0, 356.0, 373.0, 374.0, 399.0, 401.0, 700.0, 708.0, 710.0, 712.0, 745.0, 746.0, 801.0],
            [1e3, 1500.0, 3e3, 1e4],
        ]
    )
    return np.concatenate([-positive[::-1], [-0.0, 0.0], positive])


def _exact(formula, s):
    """The formula at s, to 50 digits or to 1e-400, with as many further digits as cancellation takes."""
    lost = min(abs(s), 800.0) + (2 * max(0.0, -math.log10(abs(s))) if s else 0.0)
    with mpmath.workdps(50 + math.ceil(lost)):
        return float(formula(mpmath.mpf(s)))


@each_order
@each_built_in
def test_agrees_with_50_digits_from_minus_1e4_to_1e4(sigma, order):
    formulas = _primitives(sigma) if order == -1 else (sympy.diff(formula, S, order) for formula in _formulas(sigma))
    assert_allclose(_function(sigma, order)(_grid()), _exact_values(*formulas), rtol=RTOL, atol=_atol(sigma))


@cache
def _exact_values(*formulas):
    """Values on the grid of the formulas for s <= 0 and for s > 0, given as SymPy expressions or functions of mpmath."""
    left, right = (
        sympy.lambdify(S, formula, "mpmath") if isinstance(formula, sympy.Expr) else formula for formula in formulas
    )
    return np.array([_exact(right if s > 0 else left, float(s)) for s in _grid()])


# NumPy evaluates an expression as SymPy writes it: 1 - tanh^2 loses digits that sech^2 does not. In these forms
# no term is much above max(1, |s|), and few are added.
@pytest.mark.parametrize("order", [0, 1, 2], ids=["value", "derivative", "second_derivative"])
@pytest.mark.parametrize("name", ["swish", "sin", "softplus", "tanh"])
def test_expression_agrees_with_50_digits(name, order):
    exact = sympy.diff(EXPRESSIONS[name].subs(s, S), S, order)
    error = np.abs(_function(FROM_SYMPY[name], order)(_grid()) - _exact_values(exact, exact))
    assert (error <= RTOL * np.maximum(1.0, np.abs(_grid()))).all()


@each_order
@pytest.mark.parametrize("name", ["tanh", "softplus", "relu", "max", "elu"])
def test_expression_agrees_with_the_built_in(name, order):
    exact = _function(get_activation({"max": "relu"}.get(name, name)), order)(_grid())
    error = np.abs(_function(FROM_SYMPY[name], order)(_grid()) - exact)
    assert (error <= 4 * RTOL * np.maximum(1.0, np.abs(exact))).all()


@pytest.mark.parametrize(
    "expression, left, right",
    [
        (EXPRESSIONS["tanh"], sympy.log(sympy.cosh(S)), sympy.log(sympy.cosh(S))),
        (EXPRESSIONS["softplus"], _softplus_primitive, _softplus_primitive),
        (EXPRESSIONS["swish"], _swish_primitive, _swish_primitive),
        (EXPRESSIONS["sin"], 1 - sympy.cos(S), 1 - sympy.cos(S)),
        (EXPRESSIONS["max"], sympy.Integer(0), S**2 / 2),
        (EXPRESSIONS["softsign"], -S - sympy.log(1 - S), S - sympy.log(1 + S)),
        (EXPRESSIONS["cubic"], S**4 / 12 + S**2 / 2, S**4 / 12 + S**2 / 2),
        (sympy.tanh(900 * s), sympy.log(sympy.cosh(900 * S)) / 900, sympy.log(sympy.cosh(900 * S)) / 900),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_primitive_of_an_expression_is_accurate_to_14_digits(expression, left, right):
    exact = _exact_values(left, right)
    size = np.abs(exact)
    if expression == sympy.sin(s):
        # Errors are measured by int |sigma|, which does not return to 0.
        size = np.maximum(size, np.minimum(np.abs(_grid()), _grid() ** 2) / 8)
    error = np.abs(Activation.from_sympy(expression).primitive(_grid()) - exact)
    assert (error <= 1e-14 * size + np.finfo(float).tiny).all()


def test_primitive_of_an_expression_is_that_of_sympy_where_there_is_one_and_ends_at_1e4_where_not():
    s = np.array([-1.1e4, 1.1e4])
    assert_allclose(FROM_SYMPY["sin"].primitive(s), 1 - np.cos(s), rtol=1e-13)
    assert np.isnan(FROM_SYMPY["swish"].primitive([*s, np.nan])).all()


def test_primitive_is_refused_where_sigma_varies_too_fast(monkeypatch):
    monkeypatch.setattr(primitive, "_MAX_CELLS", 2**12)
    with pytest.raises(ValueError, match=r"sin\(s\*\*2\) varies too fast to be integrated up to \|s\| = 10000"):
        Activation.from_sympy(sympy.sin(s**2)).primitive(0.5)


@each_sigma
def test_primitive_grows_by_the_integral_of_sigma_and_vanishes_at_0(sigma):
    assert sigma.primitive(0.0) == 0.0
    # No kink lies inside an interval.
    ends = np.array([-1e4, -3e3, -100.0, *np.linspace(-9.0, 9.0, 37), 100.0, 3e3, 1e4])
    nodes, weights = np.polynomial.legendre.leggauss(40)
    left, width = ends[:-1], np.minimum(np.diff(ends), 0.5)
    values = sigma(left[:, None] + width[:, None] * (1 + nodes) / 2)
    integral, size = (0.5 * width * (numbers @ weights) for numbers in (values, np.abs(values)))
    growth = sigma.primitive(left + width) - sigma.primitive(left)
    assert (np.abs(growth - integral) <= 1e-13 * size + 4 * RTOL * np.abs(sigma.primitive(left))).all()


@each_order
@each_sigma
def test_raises_no_floating_point_error_and_stays_finite(sigma, order):
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        assert np.isfinite(_function(sigma, order)(_grid())).all()


@pytest.mark.parametrize(
    "name, parameters, first, second",
    [
        ("relu", {}, 0.0, 0.0),
        ("leaky_relu", {}, 0.1, 0.0),
        ("elu", {}, 1.0, 1.0),
        ("elu", {"alpha": 0.5}, 0.5, 0.5),
    ],
)
def test_derivatives_at_a_joint_are_those_from_the_left(name, parameters, first, second):
    sigma = get_activation(name, **parameters)
    assert sigma.joints == (0.0,)
    assert (sigma.derivative(0.0), sigma.second_derivative(0.0)) == (first, second)
    # The smallest normal number: smaller ones are 0 to this process once PyOP2 has loaded a kernel.
    assert (sigma.derivative(2.3e-308), sigma.second_derivative(2.3e-308)) == (1.0, 0.0)


@pytest.mark.parametrize(
    "expression, values",
    [
        (sympy.Max(0, s), [(0.0, 0.0, 0.0)]),
        (sympy.Max(s, 2 * s), [(0.0, 1.0, 0.0)]),
        (sympy.Abs(s), [(0.0, -1.0, 0.0)]),
        (s * sympy.Heaviside(s), [(0.0, 0.0, 0.0)]),
        (s * sympy.sign(s), [(0.0, -1.0, 0.0)]),
        (sympy.sqrt(s**2), [(0.0, -1.0, 0.0)]),
        (sympy.Abs(s) ** 3 / 3, [(0.0, 0.0, 0.0)]),
        (sympy.Max(-1, sympy.Min(s, 1)), [(-1.0, 0.0, 0.0), (1.0, 1.0, 0.0)]),
        (sympy.Max(0, s, s**2 - 2), [(-math.sqrt(2.0), -math.sqrt(8.0), 2.0), (0.0, 0.0, 0.0), (2.0, 1.0, 0.0)]),
        (sympy.Abs(sympy.Abs(s) - 1), [(-1.0, -1.0, 0.0), (0.0, 1.0, 0.0), (1.0, -1.0, 0.0)]),
        (
            sympy.Piecewise((s**2, (s > 0.3) & (s < 1.5)), (0.09, s <= 0.3), (2.25, True)),
            [(0.3, 0.0, 0.0), (1.5, 3.0, 2.0)],
        ),
    ],
    ids=str,
)
def test_derivatives_of_an_expression_at_joints_are_those_from_the_left(expression, values):
    sigma = Activation.from_sympy(expression)
    joints, first, second = np.array(values).T
    assert_allclose(sigma.joints, joints, rtol=RTOL)
    assert_allclose(sigma.derivative(sigma.joints), first, rtol=RTOL)
    assert_allclose(sigma.second_derivative(sigma.joints), second, rtol=RTOL)


def test_kinks_are_where_the_derivative_jumps():
    assert {name for name, sigma in ACTIVATIONS.items() if sigma.kinks} == {"relu", "leaky_relu"}
    assert FROM_SYMPY["relu"].kinks == FROM_SYMPY["max"].kinks == (0.0,)
    assert FROM_SYMPY["hard_tanh"].kinks == (-1.0, 1.0)
    assert (FROM_SYMPY["elu"].kinks, FROM_SYMPY["elu"].joints) == ((), (0.0,))
    assert (FROM_SYMPY["softsign"].kinks, FROM_SYMPY["softsign"].joints) == ((), (0.0,))
    assert all(get_activation(name).kinks == (0.0,) for name in ("relu", "leaky_relu"))
    assert get_activation("elu", alpha=0.5).kinks == (0.0,)
    assert get_activation("elu", alpha=1).kinks == ()


@each_order
@each_sigma
def test_in_place_gives_the_same_numbers(sigma, order):
    s = _grid().copy()
    expected = _function(sigma, order)(s)
    assert_array_equal(s, _grid())
    out = np.full_like(s, np.nan)
    assert _function(sigma, order)(s, out=out) is out
    assert_array_equal(out, expected)
    assert _function(sigma, order)(s, out=s) is s
    assert_array_equal(s, expected)


@each_order
@each_sigma
def test_out_may_overlap_s(sigma, order):
    s = _grid().copy()
    expected = _function(sigma, order)(s)
    # Reversed strides take numpy's scalar loops, which round otherwise.
    assert_allclose(_function(sigma, order)(s, out=s[::-1]), expected, rtol=RTOL, atol=_atol(sigma))


@each_order
@each_sigma
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 1, 4)], ids=str)
def test_keeps_the_shape(sigma, order, shape):
    s = np.linspace(-1.0, 2.0, math.prod(shape)).reshape(shape)
    result = _function(sigma, order)(s)
    assert (type(result), result.shape, result.dtype) == (np.ndarray, shape, np.float64)
    assert _function(sigma, order)(s, out=s) is s


@each_order
@each_sigma
@pytest.mark.parametrize("number", [-2, -2.0, np.float32(-2.0), np.float64(-2.0)], ids=lambda number: str(type(number)))
def test_takes_numbers(sigma, order, number):
    result = _function(sigma, order)(number)
    assert (result.shape, result.dtype) == ((), np.float64)
    assert_allclose(result, _function(sigma, order)(np.array([-2.0]))[0], rtol=RTOL)


@each_order
@each_sigma
def test_works_on_strided_views(sigma, order):
    s = np.linspace(-2.0, 2.0, 24).reshape(4, 6)
    expected = _function(sigma, order)(s[:, ::2].copy())
    _function(sigma, order)(s[:, ::2], out=s[:, ::2])
    assert_allclose(s[:, ::2], expected, rtol=RTOL)
    assert_array_equal(s[:, 1::2], np.linspace(-2.0, 2.0, 24).reshape(4, 6)[:, 1::2])


@each_built_in
def test_is_rebuilt_from_name_and_parameters(sigma):
    assert get_activation(sigma.name, **dict(sigma.parameters)) == sigma


@each_sigma
def test_is_rebuilt_from_its_description(sigma):
    # In strict JSON: no NaN, no infinity.
    rebuilt = Activation.from_description(json.loads(json.dumps(sigma.description, allow_nan=False)))
    assert rebuilt == sigma
    assert hash(rebuilt) == hash(sigma)
    assert rebuilt.properties == sigma.properties
    assert rebuilt.description == sigma.description
    assert_array_equal(rebuilt(_grid()), sigma(_grid()))


@pytest.mark.parametrize(
    "expression",
    [
        *EXPRESSIONS.values(),
        sympy.sin(s) + sympy.cos(2 * s) * sympy.exp(-(s**2)),
        sympy.atan(s) * sympy.asinh(s) + sympy.sinh(sympy.tanh(s)) + sympy.cosh(1 / (1 + s**2)),
        sympy.log(2 + sympy.tan(sympy.tanh(s))) + sympy.sqrt(1 + s**2) + sympy.pi + 10**400 + 0.1 * s,
        sympy.Piecewise((1 - s, (s < -1) | (s >= 1)), (sympy.Min(s, 0.1), sympy.Ne(s, 3) & sympy.Eq(s, 4)), (0, True)),
    ],
    ids=str,
)
def test_an_expression_is_rebuilt_from_its_tree(expression):
    expression = normal_form(expression)
    tree = json.loads(json.dumps(to_tree(expression), allow_nan=False))
    assert from_tree(tree) == expression


@each_sigma
def test_survives_pickle_and_deepcopy(sigma):
    assert pickle.loads(pickle.dumps(sigma)) == sigma
    assert copy.deepcopy(sigma) == sigma
    assert_array_equal(pickle.loads(pickle.dumps(sigma)).derivative(_grid()), sigma.derivative(_grid()))


def test_expressions_tell_activations_apart():
    real = sympy.Symbol("s", real=True)
    assert Activation.from_sympy(sympy.tanh(s)) == get_activation(sympy.tanh(real)) == FROM_SYMPY["tanh"]
    assert FROM_SYMPY["tanh"] != get_activation("tanh")
    assert len({*FROM_SYMPY.values(), *map(Activation.from_sympy, EXPRESSIONS.values())}) == len(EXPRESSIONS)


@cache
def _observed(sigma):
    """Properties that values of sigma show: by differences, and by growth from |s| = 1e2 to 1e4."""
    near = np.linspace(-5.0, 5.0, 1001)
    far = np.concatenate([-np.geomspace(1e4, 5.0, 4001), near, np.geomspace(5.0, 1e4, 4001)])
    slopes = np.abs(sigma.derivative(np.concatenate([far, 1e-9 + near])))
    rounding = 1e-15 * max(1.0, np.abs(sigma(near)).max())

    def grows(function):
        sides = (far[far <= 0], far[far >= 0])
        return any(np.abs(function(s)).max() > 1.5 * np.abs(function(s[np.abs(s) <= 1e2])).max() for s in sides)

    return Properties(
        lipschitz=math.inf if grows(sigma.derivative) else slopes.max(),
        zero_at_zero=bool(sigma(0.0) == 0),
        sign_preserving=bool((far * sigma(far) >= 0).all()),
        positive_slope_at_zero=bool(sigma(0.0) - sigma(-1e-6) > 1e-8),
        non_decreasing=bool((np.diff(sigma(far)) >= -rounding * np.maximum(1.0, np.abs(far[1:]))).all()),
        # Further out a bounded sigma is constant to all digits.
        strictly_increasing=bool((np.diff(sigma(near)) > 0).all()),
        bounded=not grows(sigma),
    )


def _contradicted(sigma, declared):
    """The names of the properties that values of sigma refute."""
    observed = _observed(sigma)
    names = [field.name for field in fields(Properties) if field.name not in ("lipschitz", "sampled")]
    wrong = {name for name in names if getattr(declared, name) != getattr(observed, name)}
    # The grid comes close to the greatest slope, never above it.
    if not observed.lipschitz * (1 - 1e-14) <= declared.lipschitz <= observed.lipschitz * (1 + 1e-4):
        wrong.add("lipschitz")
    return wrong


@each_sigma
def test_properties_are_as_declared(sigma):
    assert _contradicted(sigma, sigma.properties) == set()


@each_sigma
def test_a_wrong_declaration_is_found(sigma):
    declared = sigma.properties
    wrong = [{name: not true} for name, true in vars(declared).items() if isinstance(true, bool)]
    bounds = [1e9] if math.isinf(declared.lipschitz) else [0.99 * declared.lipschitz, 1.01 * declared.lipschitz + 1e-9]
    wrong += [{"lipschitz": bound} for bound in bounds if bound > 0]
    for change in wrong:
        assert _contradicted(sigma, replace(declared, **change)) == set(change)


def test_properties_given_by_the_user_are_kept():
    given = replace(FROM_SYMPY["sin"].properties, lipschitz=7.0, sampled=frozenset({"bounded"}))
    sigma = Activation.from_sympy(sympy.sin(s), given)
    assert sigma.properties == given
    assert Activation.from_description(sigma.description).properties == given
    assert sigma == FROM_SYMPY["sin"]


@pytest.mark.parametrize("name", FROM_SYMPY)
def test_properties_that_values_disprove_are_refused(name):
    """A property that does not hold may not be claimed. One that holds need not be, and a bound need not be the least."""
    found = FROM_SYMPY[name].properties
    wrong = [{claim: True} for claim, holds in vars(found).items() if holds is False and claim != "bounded"]
    wrong += [{"lipschitz": 1e3 if math.isinf(found.lipschitz) else 0.9 * found.lipschitz}] * (found.lipschitz > 0)
    assert wrong or name == "cubic"
    for claim in wrong:
        with pytest.raises(ValueError, match=rf"^properties: expected those of .*, got others; .* show .*{[*claim][0]} = "):
            Activation.from_sympy(EXPRESSIONS[name], replace(found, **claim))
    weaker = {claim: False for claim, holds in vars(found).items() if holds is True}
    weaker = replace(found, lipschitz=2 * found.lipschitz, **weaker)
    assert Activation.from_sympy(EXPRESSIONS[name], weaker).properties == weaker


@pytest.mark.parametrize(
    "expression, lipschitz, bounded",
    [
        (s * sympy.atan(s), math.pi / 2, False),
        (sympy.Piecewise((0, s < 0), (s - sympy.log(1 + s), True)), 1.0, False),
        (s * sympy.log(1 + s**2), math.inf, False),
        (s * sympy.sin(s), math.inf, False),
        (sympy.sin(100 * s), 100.0, True),
        (sympy.log(1 + s**2), 1.0, False),
        (sympy.Piecewise((1e6 * (sympy.exp(s) - 1), s < 0), (s, True)), 1e6, False),
    ],
    ids=str,
)
def test_bounds_that_are_reached_far_out_or_not_at_all(expression, lipschitz, bounded):
    properties = Activation.from_sympy(expression).properties
    # The supremum beyond 1e4 is estimated from the last decades.
    assert_allclose(properties.lipschitz, lipschitz, rtol=1e-5)
    assert properties.bounded == bounded


def test_parameters_tell_activations_apart():
    assert get_activation("elu") == get_activation("elu", alpha=1) != get_activation("elu", alpha=0.5)


def test_an_activation_is_returned_unchanged():
    sigma = get_activation("elu", alpha=0.5)
    assert get_activation(sigma) is sigma


def test_each_entry_is_under_its_name():
    assert all(get_activation(name).name == name for name in ACTIVATIONS)


@pytest.mark.parametrize(
    "spec, parameters, error, message",
    [
        ("tahn", {}, ValueError, r"^activation: expected one of 'tanh', 'arctan', .*, got 'tahn'"),
        (None, {}, TypeError, r"^activation: expected its name, .*, got NoneType"),
        (np.tanh, {}, TypeError, r"^activation: expected its name, .*, got ufunc"),
        (sympy.tanh(s), {"alpha": 1.0}, TypeError, r"expected none with an Activation.*, got alpha; .*'tanh\(s\)'"),
        (get_activation("tanh"), {"alpha": 1.0}, TypeError, r"expected none with an Activation.*, got alpha; .*'tanh'"),
        ("tanh", {"alpha": 1.0}, TypeError, r"^parameters: expected none for tanh, got alpha"),
        ("elu", {"beta": 1.0, "alpha": 1.0}, TypeError, r"^parameters: expected alpha for elu, got beta"),
        ("elu", {"alpha": "1"}, ValueError, r"^alpha: expected a positive number, got '1'"),
        ("elu", {"alpha": 1j}, ValueError, r"^alpha: expected a positive number, got 1j"),
        ("elu", {"alpha": True}, ValueError, r"^alpha: expected a positive number, got True"),
        ("elu", {"alpha": 0.0}, ValueError, r"^alpha: expected a positive number, got 0.0"),
        ("elu", {"alpha": -1}, ValueError, r"^alpha: expected a positive number, got -1"),
        ("elu", {"alpha": math.inf}, ValueError, r"^alpha: expected a positive number, got inf"),
        ("elu", {"alpha": math.nan}, ValueError, r"^alpha: expected a positive number, got nan"),
    ],
)
def test_refuses_what_is_no_activation(spec, parameters, error, message):
    with pytest.raises(error, match=message):
        get_activation(spec, **parameters)


@pytest.mark.parametrize(
    "expression, error, message",
    [
        ("tanh(s)", TypeError, r"^expression: expected a SymPy expression in .*, got str 'tanh\(s\)'; text is not parsed"),
        (1.0, TypeError, r"^expression: expected a SymPy expression in .*, got float 1.0"),
        (np.tanh, TypeError, r"^expression: expected a SymPy expression in .*, got ufunc"),
        (s > 0, TypeError, r"^expression: expected a SymPy .*, got StrictGreaterThan s > 0"),
        (sympy.Symbol("b") * s + sympy.Symbol("a"), TypeError, r"as its only symbol, got Symbol\('a'\), Symbol\('b'\) too"),
        (sympy.Symbol("s", positive=True), TypeError, r"only symbol, got Symbol\('s', positive=True\) too"),
        (sympy.exp(s), ValueError, r"sigma of exp\(s\) is inf at s = 10000; give an expression that doubles"),
        (sympy.sqrt(s), ValueError, r"sigma of sqrt\(s\) is nan at s = -10000; give"),
        (sympy.exp(-sympy.exp(-s)), ValueError, r"sigma' of .* is nan at s = -10000; give .* exp\(-Abs\(s\)\)"),
        (sympy.sqrt(sympy.Abs(s)), ValueError, r"sigma' of sqrt\(Abs\(s\)\) is nan at s = 0; give"),
        (sympy.Piecewise(((1 - s) ** 1.5, s < 1), (0, True)), ValueError, r"sigma'' of .* is inf at s = 1; give"),
        (sympy.log(s), ValueError, r"sigma = log\(s\) is singular where s = 0; give"),
        (1 / (s - sympy.pi), ValueError, r"sigma = 1/\(s - pi\) is singular where s - pi = 0; give"),
        (sympy.tan(s), ValueError, r"sigma = tan\(s\) is singular where cos\(s\) = 0; give"),
        (sympy.I * s, ValueError, r"sigma = I\*s is complex; give"),
        (sympy.LambertW(s), ValueError, r"sigma of LambertW\(s\) is complex; give"),
        (sympy.Heaviside(s), ValueError, r"sigma = Heaviside\(s\) jumps at s = 0, from 0 to 1, .* delta there; give"),
        (sympy.Piecewise((0, s < 0), (5, sympy.Eq(s, 0)), (s, True)), ValueError, r"jumps at s = 0, from 0 to 5"),
        (sympy.DiracDelta(s), ValueError, r"sigma of DiracDelta\(s\) contains DiracDelta, which has no values; give"),
        (sympy.floor(s), ValueError, r"sigma' of floor\(s\) contains Derivative, which has no values; give"),
        (sympy.Function("f")(s), ValueError, r"sigma of f\(s\) contains AppliedUndef, which has no values; give"),
        (sympy.hyper([1], [2], s), ValueError, r"cannot be evaluated by numpy \(name 'hyper' is not defined\); give"),
        (sympy.Abs(sympy.sin(s)), ValueError, r"Abs\(sin\(s\)\) changes .* are not finitely many.*sympy.Piecewise"),
        (sympy.Piecewise((s, s > 0)), ValueError, r"has no case for s = -1; add one, the last with condition True"),
        (
            sympy.Piecewise((1, sympy.Contains(s, sympy.Interval(0, 1))), (s, True)),
            ValueError,
            r"Contains\(s, Interval\(0, 1\)\) is no condition on s; give comparisons",
        ),
    ],
    ids=str,
)
def test_refuses_expressions_that_are_no_activation(expression, error, message):
    with pytest.raises(error, match=message):
        Activation.from_sympy(expression)


@pytest.mark.parametrize("lipschitz", [-1.0, math.nan])
def test_refuses_a_lipschitz_constant_that_is_none(lipschitz):
    with pytest.raises(ValueError, match=r"^lipschitz: expected a number >= 0"):
        replace(get_activation("tanh").properties, lipschitz=lipschitz)


def test_refuses_properties_that_are_none():
    with pytest.raises(TypeError, match=r"^properties: expected a Properties or None, got dict; leave them out"):
        Activation.from_sympy(s, {"lipschitz": 1.0})


@pytest.mark.parametrize(
    "expression, message",
    [
        (s * sympy.Heaviside(s), r"expected .*Add, Mul, Pow.*, got .*Heaviside\(s\), which cannot be stored"),
        (s * sympy.Float("0.1", 30), r"expected numbers \(Float of 15 digits\).*, got 0.1000.*, which cannot be stored"),
    ],
    ids=str,
)
def test_refuses_to_describe_what_it_could_not_rebuild(expression, message):
    with pytest.raises(ValueError, match=message):
        Activation.from_sympy(expression).description


DECLARED = FROM_SYMPY["tanh"].description["properties"]


@pytest.mark.parametrize(
    "tree",
    [
        "t", "__import__('os')", None, {}, [], [["sin"]], math.nan, math.inf, ["__import__", "os"], ["Symbol", "t"],
        ["lambdify", "s"], ["sin"], ["sin", "s", "s"], ["sin", "exp(s)"], ["Pow", "s"], ["Rational", "s", 2],
        ["Add", True, "s"], ["Lt", "s", ["Lt", "s", 1]], ["Piecewise", "s"], ["case", ["Lt", "s", 0], True],
        ["Mul", "s", ["case", "s", True]],
    ],
    ids=str,
)  # fmt: skip
def test_rebuilds_nothing_but_what_is_on_the_list(tree):
    with pytest.raises(ValueError, match="is no part of an expression"):
        Activation.from_description({"expression": tree, "properties": DECLARED})


@pytest.mark.parametrize(
    "description, error, message",
    [
        ({}, ValueError, r"^description: expected what Activation.description gives, .*; got {}"),
        (["tanh", {}], ValueError, r"^description: expected .*; got \['tanh', {}\]"),
        ({"name": "tanh"}, ValueError, r"^description: expected what"),
        ({"expression": "s"}, ValueError, r"^description: expected what"),
        ({"name": "tahn", "parameters": {}}, ValueError, r"^activation: expected one of 'tanh', .*, got 'tahn'"),
        ({"name": "elu", "parameters": {"alpha": "1"}}, ValueError, r"^alpha: expected a positive number, got '1'"),
        (
            {"expression": ["Lt", "s", 0], "properties": DECLARED},
            TypeError,
            r"^expression: expected a SymPy expression in .*, got StrictLessThan s < 0",
        ),
        ({"expression": "s", "properties": {}}, TypeError, r"missing 6 required"),
    ],
)
def test_refuses_what_is_no_description(description, error, message):
    with pytest.raises(error, match=message):
        Activation.from_description(description)


@each_order
@pytest.mark.parametrize(
    "s, out, error, message",
    [
        (1j, None, TypeError, r"^s: expected real numbers, got complex ones"),
        ("1", None, TypeError, r"^s: expected numbers, got str"),
        ([None], None, TypeError, r"^s: expected numbers, got list with entries of type object"),
        ([1.0], [0.0], TypeError, r"^out: expected a float64 array, got list; leave it out"),
        ([1.0], np.zeros(1, np.float32), TypeError, r"^out: expected a float64 array, got an array of float32"),
        ([1.0], np.zeros(2), ValueError, r"^out: expected the shape of s, \(1,\), got \(2,\)"),
        ([1.0], np.zeros(()), ValueError, r"^out: expected the shape of s, \(1,\), got \(\)"),
    ],
)
def test_refuses_arguments_it_cannot_use(order, s, out, error, message):
    with pytest.raises(error, match=message):
        _function(get_activation("tanh"), order)(s, out=out)
