"""The activations against 50-digit values, at their kinks, in place, and saved and rebuilt."""

import copy
import math
import pickle
from functools import cache

import mpmath
import numpy as np
import pytest
import sympy
from numpy.testing import assert_allclose, assert_array_equal

from fem_resnet.activation import ACTIVATIONS, get_activation

S = sympy.Symbol("s", real=True)


def _formulas(sigma):
    """(formula for s <= 0, formula for s > 0), whose derivatives sympy takes: nothing here is shared with the code."""
    alpha = sympy.Rational(dict(sigma.parameters).get("alpha", 0.0))
    logistic = 1 / (1 + sympy.exp(-S))
    softplus = sympy.log(1 + sympy.exp(S))
    return {
        "tanh": (sympy.tanh(S), sympy.tanh(S)),
        "arctan": (sympy.atan(S), sympy.atan(S)),
        "sigmoid": (logistic, logistic),
        "softplus": (softplus, softplus),
        "relu": (sympy.Integer(0), S),
        "leaky_relu": (S / 10, S),
        "elu": (alpha * (sympy.exp(S) - 1), S),
        "identity": (S, S),
    }[sigma.name]


SIGMAS = [*ACTIVATIONS.values(), get_activation("elu", alpha=0.3), get_activation("elu", alpha=1e20)]
each_sigma = pytest.mark.parametrize(
    "sigma", SIGMAS, ids=lambda sigma: "-".join([sigma.name, *(f"{key}={value:g}" for key, value in sigma.parameters)])
)
each_order = pytest.mark.parametrize("order", [0, 1, 2], ids=["value", "derivative", "second_derivative"])


def _function(sigma, order):
    return (sigma, sigma.derivative, sigma.second_derivative)[order]


# A result is at most two SIMD functions of numpy (4 ulp each, the first one squared) and 4 roundings away from exact.
RTOL = 16 * np.finfo(float).eps


def _atol(sigma):
    # Below the smallest normal number a double has fewer digits to be right in; alpha multiplies such an e^s.
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
    """The formula at s, to 50 digits or to 1e-400: the digits that it loses by cancellation are carried on top."""
    lost = min(abs(s), 800.0) + (max(0.0, -math.log10(abs(s))) if s else 0.0)
    with mpmath.workdps(50 + math.ceil(lost)):
        return float(formula(mpmath.mpf(s)))


@each_order
@each_sigma
def test_agrees_with_50_digits_from_minus_1e4_to_1e4(sigma, order):
    left, right = (sympy.lambdify(S, sympy.diff(formula, S, order), "mpmath") for formula in _formulas(sigma))
    exact = [_exact(right if s > 0 else left, float(s)) for s in _grid()]
    assert_allclose(_function(sigma, order)(_grid()), exact, rtol=RTOL, atol=_atol(sigma))


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
    assert (sigma.derivative(5e-324), sigma.second_derivative(5e-324)) == (1.0, 0.0)


def test_kinks_are_where_the_derivative_jumps():
    assert {name for name, sigma in ACTIVATIONS.items() if sigma.kinks} == {"relu", "leaky_relu"}
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


@each_sigma
def test_is_rebuilt_from_name_and_parameters(sigma):
    rebuilt = get_activation(sigma.name, **dict(sigma.parameters))
    assert rebuilt == sigma
    assert hash(rebuilt) == hash(sigma)
    assert_array_equal(rebuilt(_grid()), sigma(_grid()))


@each_sigma
def test_survives_pickle_and_deepcopy(sigma):
    assert pickle.loads(pickle.dumps(sigma)) == sigma
    assert copy.deepcopy(sigma) == sigma


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
        ("tahn", {}, ValueError, r"'tahn'.*give one of tanh, arctan, .*identity"),
        (None, {}, TypeError, r"spec is NoneType; give the name"),
        (np.tanh, {}, TypeError, r"spec is ufunc; give the name"),
        (get_activation("tanh"), {"alpha": 1.0}, TypeError, r"alpha given along with an Activation.*'tanh'"),
        ("tanh", {"alpha": 1.0}, TypeError, r"alpha given to tanh, which accepts none"),
        ("elu", {"beta": 1.0, "alpha": 1.0}, TypeError, r"beta given to elu, which accepts alpha"),
        ("elu", {"alpha": "1"}, TypeError, r"alpha is '1'; give a real number"),
        ("elu", {"alpha": 1j}, TypeError, r"alpha is 1j; give a real number"),
        ("elu", {"alpha": True}, TypeError, r"alpha is True; give a real number"),
        ("elu", {"alpha": 0.0}, ValueError, r"alpha is 0.0; give a finite number > 0"),
        ("elu", {"alpha": -1}, ValueError, r"alpha is -1; give a finite number > 0"),
        ("elu", {"alpha": math.inf}, ValueError, r"alpha is inf; give a finite number > 0"),
        ("elu", {"alpha": math.nan}, ValueError, r"alpha is nan; give a finite number > 0"),
    ],
)
def test_refuses_what_is_no_activation(spec, parameters, error, message):
    with pytest.raises(error, match=message):
        get_activation(spec, **parameters)


@each_order
@pytest.mark.parametrize(
    "s, out, error, message",
    [
        (1j, None, TypeError, r"s has dtype complex128; tanh wants real numbers"),
        ("1", None, TypeError, r"s has dtype <U1; tanh wants real numbers"),
        ([None], None, TypeError, r"s has dtype object; tanh wants real numbers"),
        ([1.0], [0.0], TypeError, r"out is list; give a float64 ndarray"),
        ([1.0], np.zeros(1, np.float32), TypeError, r"out is an array of float32; give a float64 ndarray"),
        ([1.0], np.zeros(2), ValueError, r"out has shape \(2,\); give the shape of s, \(1,\)"),
        ([1.0], np.zeros(()), ValueError, r"out has shape \(\); give the shape of s, \(1,\)"),
    ],
)
def test_refuses_arguments_it_cannot_use(order, s, out, error, message):
    with pytest.raises(error, match=message):
        _function(get_activation("tanh"), order)(s, out=out)
