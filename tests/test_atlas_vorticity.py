"""The waves on the sphere that the atlas learns: against exact solutions, refined runs and the symmetries of their law."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def law(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "demos" / "atlas")
    return import_module("vorticity")


def of_degree(degree, l):
    """Random coefficients of that degree alone, for two samples."""
    c = np.zeros((degree + 1, degree + 1, 2), complex)
    c[: l + 1, l] = np.random.default_rng(l).standard_normal((l + 1, 2, 2)) @ [1, 1j]
    c[0] = c[0].real
    return c


def size(c):
    return np.sqrt((np.where(np.arange(len(c)) > 0, 2, 1)[:, None, None] * np.abs(c) ** 2).sum(axis=(0, 1)))


def turned(c, angle):
    """z(x - angle, y)."""
    return np.exp(-1j * angle * np.arange(len(c)))[:, None, None] * c


def reflected(c):
    """-z(x, -y): P_ml is even or odd as l + m is."""
    m, l = np.indices(c.shape[:2])
    return -((-1.0) ** (l + m))[..., None] * c


@pytest.mark.parametrize("l", [2, 5])
def test_waves_of_rossby_and_haurwitz_travel_and_decay(law, l):
    """z = 2 a(t) sin y + Z of degree l, with a(t) = a exp(-2 nu t): Z travels at the speed a - 2 (a + Omega) / (l (l + 1))."""
    n, nu, T, a = l * (l + 1), law.VISCOSITY, law.TIME, 0.7
    wave = of_degree(law.DEGREE, l)
    spin = np.zeros_like(wave)
    spin[0, 1] = 2 * a * np.sqrt(2 / 3)  # sin y = sqrt(2/3) P_01
    found = law.solve(wave + spin)[0]
    way = -2 * law.OMEGA / n * T + a * (1 - 2 / n) * (1 - np.exp(-2 * nu * T)) / (2 * nu)
    exact = np.exp(-nu * n * T) * turned(wave, way) + np.exp(-2 * nu * T) * spin
    assert abs(way) > 0.2
    print(f"against waves of degree {l}: {(size(found - exact) / size(exact)).max():.1e}")
    assert (size(found - exact) < 1e-6 * size(exact)).all()


def test_zonal_flows_stay(law):
    z = law.inputs(3, 0)
    z[1:] = 0
    l = np.arange(len(z))
    exact = np.exp(-law.VISCOSITY * law.TIME * l * (l + 1))[:, None] * z
    np.testing.assert_allclose(law.solve(z)[0], exact, atol=1e-13)


def test_without_friction_energy_and_enstrophy_stay(law, monkeypatch):
    monkeypatch.setattr(law, "VISCOSITY", 0.0)
    z = law.inputs(5, 0)
    l = np.arange(1, len(z))
    found = law.solve(z)[0]
    assert (size(found - z) > 0.3 * size(z)).all()
    for weight in (np.ones(len(l)), (l * (l + 1.0)) ** -0.5):
        before, after = (size(weight[:, None] * c[:, 1:]) for c in (z, found))
        np.testing.assert_allclose(after, before, rtol=1e-5)


def test_without_rotation_no_axis_is_special(law, monkeypatch):
    """A turn by a right angle about the first axis, which mixes all orders m."""
    monkeypatch.setattr(law, "OMEGA", 0.0)
    degree = 13
    space = law.Harmonics(degree, 40)
    x, s = np.meshgrid(space.longitudes, space.sines, indexing="ij")
    a, b, c = np.sqrt(1 - s**2) * np.cos(x), np.sqrt(1 - s**2) * np.sin(x), s
    at = np.random.default_rng(0).standard_normal((4, 3))

    def bumps(a, b, c):
        z = sum(np.exp(p * a + q * b + r * c) for p, q, r in at)
        return space.coefficients((z - z.mean())[..., None])

    z, other = bumps(a, b, c), bumps(a, -c, b)
    z[0, 0] = other[0, 0] = 0
    found, turned_first = (space.values(law.solve(start)[0])[..., 0] for start in (z, other))
    exact = at_places(law, space.coefficients(found[..., None])[..., 0], np.arctan2(-c, a), b)
    assert np.abs(exact - turned_first).max() < 1e-12 * np.abs(exact).max()
    assert np.abs(found - turned_first).max() > 0.3 * np.abs(exact).max()


def at_places(law, c, longitudes, sines):
    tables = law.assoc_legendre_p_all(len(c) - 1, len(c) - 1, sines, norm=True)[0, :, : len(c)]
    waves = np.exp(1j * np.arange(len(c))[:, None, None] * longitudes) * np.where(np.arange(len(c)) > 0, 2, 1)[:, None, None]
    return np.einsum("ml,lmij,mij->ij", c, tables, waves).real


def test_a_refined_run_says_the_same(law):
    z, more = law.inputs(10, 0), law.inputs(10, 0, degree=42)
    found, refined = law.solve(z)[0], law.solve(more, steps=2 * law.STEPS)[0]
    refined[: len(z), : len(z)] -= found
    errors = size(refined) / size(found)
    print(f"against a refined run: {errors.max():.1e}")
    assert errors.max() < 1e-6
    halves = [law.solve(z, steps=steps)[0] for steps in (10, 20, 40)]
    assert np.log2(size(halves[0] - halves[1]) / size(halves[1] - halves[2])).min() > 3.7


def test_the_law_commutes_with_turns_and_with_the_reflection(law):
    z = law.inputs(5, 0)
    found = law.solve(z)[0]
    for move in (lambda c: turned(c, 0.8), reflected):
        assert (size(law.solve(move(z))[0] - move(found)) < 1e-12 * size(found)).all()
    wrong = -reflected(z)
    assert (size(law.solve(wrong)[0] + reflected(found)) > 0.05 * size(found)).all()


def test_derivatives_are_those_of_the_scheme(law):
    """Taylor's remainders fall with the square of the step."""
    z, d = law.inputs(4, 0), np.stack([law.inputs(4, seed) for seed in (1, 2)])
    found = law.solve(z, d)
    np.testing.assert_array_equal(found[0], law.solve(z)[0])
    for way, slope in zip(d, found[1:]):
        rest = [size(law.solve(z + h * way)[0] - found[0] - h * slope) for h in (1e-2, 5e-3, 2.5e-3)]
        rates = np.log2(np.divide(rest[:-1], rest[1:]))
        assert np.abs(rates - 2).max() < 0.05, rates


def test_samples_are_values_at_points_of_the_sphere(law):
    some = law.samples(4, 7, directions=2)
    n = law.LATITUDES
    assert some["inputs"].shape == some["targets"].shape == (4, 2 * n * n)
    assert some["directions"].shape == some["derivatives"].shape == (4, 2, 2 * n * n)
    x, y, z = some["points"].T
    np.testing.assert_allclose(x**2 + y**2 + z**2, 1)
    w = some["weights"]
    for f, integral in ((1 + 0 * x, 4 * np.pi), (x * x, 4 * np.pi / 3), (x * y * z, 0), (x**2 * z**2, 4 * np.pi / 15)):
        assert abs(w @ f - integral) < 1e-12
    space, c = law.Harmonics(law.DEGREE, n), law.inputs(4, 7)
    values = np.stack([at_places(law, one, np.arctan2(y, x)[None], z[None])[0] for one in np.moveaxis(c, -1, 0)])
    np.testing.assert_allclose(some["inputs"], values, atol=1e-12)
    np.testing.assert_allclose(some["targets"], law.samples(4, 7)["targets"], atol=1e-12)
    h, low = 1e-3, law.Harmonics(law.INPUT_DEGREE, n)
    moved = (some["inputs"] + h * some["directions"][:, 1]).reshape(4, n, 2 * n)
    found = np.pad(low.coefficients(moved.transpose(2, 1, 0)), [(0, law.DEGREE - law.INPUT_DEGREE)] * 2 + [(0, 0)])
    after = space.values(law.solve(found)[0]).transpose(2, 1, 0).reshape(4, -1)
    np.testing.assert_allclose((after - some["targets"]) / h, some["derivatives"][:, 1], atol=3e-3)


def test_inputs_have_the_size_that_the_law_says(law):
    z = law.inputs(4000, 3)
    np.testing.assert_allclose(np.sqrt((size(z) ** 2 / 2).mean()), law.SIZE, rtol=0.02)
    parts = (np.where(np.arange(len(z)) > 0, 2, 1)[:, None, None] * np.abs(z) ** 2).sum(axis=0).mean(axis=1)
    l = np.arange(1, law.INPUT_DEGREE + 1)
    ratio = parts[l] / ((2 * l + 1) / (l * (l + 1) + 12.0) ** 2)
    np.testing.assert_allclose(ratio / ratio.mean(), 1, rtol=0.05)
    assert not parts[law.INPUT_DEGREE + 1 :].any() and not parts[0]
