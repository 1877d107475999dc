"""Interval arithmetic for activations: enclosures hold all values, bounds are proved, zeros are found wherever they are."""

import math

import numpy as np
import pytest
import sympy
from numpy.testing import assert_allclose

from fem_resnet import Activation, get_activation, zero_set
from fem_resnet.activation.enclosure import Formula, Unproved
from fem_resnet.activation.expression_properties import properties_of, size
from fem_resnet.activation.extremes import Piece, supremum, zeros
from fem_resnet.activation.formulas import in_decaying_powers
from fem_resnet.activation.pieces import S
from fem_resnet.activation.properties import Properties

s = sympy.Symbol("s")
SMOOTH = [
    sympy.tanh(S), sympy.sin(S) * sympy.exp(-(S**2)), S / (1 + sympy.exp(-S)), sympy.log(1 + S**2), 1 / sympy.cosh(0.7 * S),
    S**3 * sympy.exp(-S / 3), S / sympy.sqrt(1 + S**2), (1 + sympy.erf(S)) / 2, sympy.asinh(S) - sympy.atan(S),
]  # fmt: skip
#: The expression, sup |sigma'| by hand, and whether it does not decrease.
PROVED = [
    (s - sympy.tanh(1000 * (s - 3.3335)) / 50, 19.0, False),
    (s - sympy.sin(s), 2.0, True),
    (sympy.tanh(s), 1.0, True),
    (s * (1 + sympy.erf(s / sympy.sqrt(2))) / 2, 1.1289041451, False),
    (s / (1 + sympy.Abs(s)), 1.0, True),
    (sympy.log(1 + sympy.exp(s)), 1.0, True),
    (sympy.Max(-1, sympy.Min(s, 1)), 1.0, True),
]
#: Expressions and their zeros.
ZEROS = [
    (sympy.Max(s - 20, 0), (-math.inf, 20.0)),
    ((s - 3) ** 2 * sympy.exp(-(s**2) / 100), (3.0, 3.0)),
    (sympy.Max(s - 3, 0) + sympy.Min(s + 5000, 0), (-5000.0, 3.0)),
    (sympy.tanh(s - 300), (300.0, 300.0)),
    (s * (1 + sympy.erf(s / sympy.sqrt(2))) / 2, (0.0, 0.0)),
    (sympy.exp(-(s**2)), None),
    (1 / (1 + sympy.exp(-s)), None),
    (1 + 0 * s, None),
]


def _formula(expression):
    return Formula(expression, S, in_decaying_powers)


@pytest.mark.parametrize("expression", SMOOTH, ids=str)
def test_enclosures_hold_all_values(expression, rng):
    formula, values = _formula(expression), sympy.lambdify(S, expression, ["scipy", "numpy"])
    slopes = sympy.lambdify(S, sympy.diff(expression, S), ["scipy", "numpy"])
    for left, width in zip(rng.uniform(-30, 30, 12), 10.0 ** rng.uniform(-6, 1.5, 12)):
        points = np.linspace(left, left + width, 101)
        X = Piece(left, left + width, formula)
        for f, part in ((values, formula), (slopes, formula.slope)):
            found = f(points)
            low, high = (sign * supremum([X._replace(formula=g)], cells=12)[1] for sign, g in ((-1, -part), (1, part)))
            rounding = 1e-12 * max(1.0, np.abs(found).max())
            assert low - rounding <= found.min() and found.max() <= high + rounding


@pytest.mark.parametrize("expression, lipschitz, rises", PROVED, ids=lambda value: str(value)[:40])
def test_bounds_and_signs_of_slopes_are_proved(expression, lipschitz, rises):
    found = Activation.from_sympy(expression).properties
    assert_allclose(found.lipschitz, lipschitz, rtol=1e-8)
    assert found.non_decreasing is rises
    assert found.caveat("lipschitz", "non_decreasing", "sign_preserving") == ""


def test_what_is_not_proved_says_so():
    """A bump far out that a grid up to 1e4 misses, and interval arithmetic cannot exclude on a half line."""
    bump = Activation.from_sympy(s + sympy.exp(-((20 * (s - 5001)) ** 2)) / 10)
    assert bump.derivative(5001 + 1 / (20 * math.sqrt(2))) < -0.7  # so what samples tell is wrong indeed
    assert bump.properties.non_decreasing and bump.properties.lipschitz == 1.0
    assert (
        bump.properties.caveat("lipschitz", "non_decreasing") == "sampled, not proved: sup |sigma'|, sigma does not decrease"
    )
    assert bump.properties.caveat("positive_slope_at_zero") == ""
    assert Activation.from_description(bump.description).properties == bump.properties


def test_a_wrong_claim_is_refuted_between_the_points_of_a_grid():
    claimed = Properties(1.0, False, False, True, True, True, False)
    with pytest.raises(ValueError, match=r"^properties: .* or a proof show lipschitz = 19.0, non_decreasing = False"):
        Activation.from_sympy(PROVED[0][0], claimed)


@pytest.mark.parametrize("names", [["bound"], ["lipschitz", "sigma"]])
def test_only_properties_are_sampled(names):
    with pytest.raises(ValueError, match=rf"^sampled: expected one of 'lipschitz', .*, got '{names[-1]}'"):
        Properties(1.0, True, True, True, True, True, True, frozenset(names))


def test_the_size_of_a_bounded_activation_is_proved():
    assert_allclose(size(sympy.atan(S) - 3), (3 + math.pi / 2, True), rtol=1e-8)
    assert_allclose(size(sympy.sin(S) * sympy.exp(-(S**2)))[0], 0.3966529735, rtol=1e-7)
    assert size(S**2 + 0) == (math.inf, True)


@pytest.mark.parametrize("expression, expected", ZEROS, ids=lambda value: str(value)[:40])
def test_zeros_are_found_wherever_they_are(expression, expected):
    """Far out, touching, next to cuts, on half lines. A function that only decays to 0 has none."""
    found = zero_set(Activation.from_sympy(expression))
    assert (found is None) == (expected is None)
    if found is not None:
        assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "expression", [sympy.sin(s), (s - 1) * (s - 30) * sympy.exp(-sympy.Abs(s) / 10), s**2 * (s - 2) ** 2], ids=str
)
def test_several_zeros_are_refused(expression):
    with pytest.raises(
        ValueError,
        match="^activation: expected an activation that vanishes on one interval, .* vanishes at several places, among them",
    ):
        zero_set(Activation.from_sympy(expression))


def test_zeros_that_cannot_be_told_are_refused():
    with pytest.raises(ValueError, match=r"^activation: it cannot be decided where .* vanishes: "):
        zero_set(
            Activation.from_sympy(
                sympy.sin(s)
                - sympy.sin(s - sympy.Rational(1, 10**9))
                + 2 * s
                - 2 * s
                + sympy.exp(-(s**2)) * sympy.besselj(0, s)
            )
        )
    anonymous = Activation("mine", get_activation("tanh").kernels, Properties(1.0, True, True, True, False, False, True))
    with pytest.raises(ValueError, match="^activation: it is not known where mine vanishes; give it as a SymPy expression"):
        zero_set(anonymous)


def test_unknown_functions_are_not_decided():
    with pytest.raises(Unproved, match="no enclosure of"):
        supremum([Piece(-1.0, 1.0, _formula(sympy.besselj(0, S)))])
    with pytest.raises(Unproved, match="no enclosure of"):
        zeros(Piece(-1.0, 1.0, _formula(sympy.besselj(0, S))))


def test_properties_are_looked_up_once():
    assert properties_of(sympy.tanh(S)) is properties_of(sympy.tanh(S))
