"""FNO and DeepONet of the benchmarks: what they commute with, how many numbers they have, that they learn what they can."""

import subprocess
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def trained(monkeypatch):
    """`trained` of tests/benchmarks/operators.py, where the peers are there."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    module = import_module("operators")
    if not module.environment.is_installed():
        pytest.skip("the peers' environment is not there; demos/burgers_table.py makes it")
    return lambda data, *runs: module.trained(data, list(runs))


def heat(samples, shape, seed):
    """Random fields of few modes on a torus, and each after a while of the heat equation: its cube, cooled."""
    random = np.random.default_rng(seed)
    k = np.meshgrid(*(np.fft.fftfreq(n, 1 / n) for n in shape), indexing="ij")
    squares = sum(one**2 for one in k)
    axes = tuple(range(1, 1 + len(shape)))

    def filtered(f, factors):
        return np.fft.ifftn(np.fft.fftn(f, axes=axes) * factors, axes=axes).real

    f = filtered(random.standard_normal((samples, *shape)), np.exp(-squares / 4))
    f /= f.std()
    return f, filtered(f + f**3 / 3, np.exp(-squares / 20))


def fno(epochs=1, seed=0, **of_model):
    of_model = {"width": 5, "modes": 4, "layers": 3, "projection": 7} | of_model
    return {"model": "FNO", "epochs": epochs, "seed": seed, "rate": 1e-2, "of_model": of_model}


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("shape, shift", [((30,), (7,)), ((16, 14), (3, 5))], ids=["1D", "2D"])
def test_fno_commutes_with_translations_where_it_is_not_told_the_place(trained, shape, shift):
    inputs, targets = heat(60, shape, 0)
    axes = tuple(range(1, 1 + len(shape)))
    data = {"inputs": inputs, "targets": targets, "test_inputs": np.concatenate([inputs, np.roll(inputs, shift, axes)])}
    runs = fno(60), fno(coordinates=True), fno(), fno(), fno(seed=1)
    alone, told, same, again, other = trained(data, *runs)
    for found, commutes in ((alone, True), (told, False)):
        here, there = np.split(found["outputs"], 2)
        # Single precision: 7 digits, of which sums over some hundred products lose one.
        assert (relative(np.roll(here, shift, axes), there) < 1e-5) == commutes
    # A complex matrix a mode and layer, an affine map a layer, lift, and two affine maps of the head.
    modes = 4 if len(shape) == 1 else 7 * 4
    fixed = 3 * (2 * modes * 25 + 25 + 5) + (5 * 7 + 7) + (7 + 1)
    assert alone["parameters"] == fixed + 5 + 5 and told["parameters"] == fixed + 5 * len(shape) + 5 + 5
    # It learns what it says, and the seed is that of all that is random.
    missed = [relative(*pair) for pair in zip(alone["outputs"], targets)]
    assert alone["training"] == pytest.approx(np.mean(missed), rel=1e-4) and alone["training"] < 0.1
    assert np.array_equal(again["outputs"], same["outputs"]) and relative(other["outputs"], same["outputs"]) > 0.01


def test_fno_commutes_with_the_translations_that_places_do_not_change(trained):
    """As on a grid of latitudes and longitudes, where it is told the latitude alone."""
    inputs, targets = heat(20, (12, 10), 0)
    places = np.tile(np.sin(np.arange(12.0))[:, None, None], (1, 10, 1))
    for axis in (1, 2):
        data = {"inputs": inputs, "targets": targets, "places": places, "test_inputs": np.roll(inputs, 3, axis)}
        (moved,) = trained(data, fno(coordinates=True))
        (here,) = trained(data | {"test_inputs": inputs}, fno(coordinates=True))
        assert here["parameters"] == 3 * (2 * 28 * 25 + 25 + 5) + (5 * 7 + 7) + (7 + 1) + 5 * 2 + 5
        assert (relative(np.roll(here["outputs"], 3, axis), moved["outputs"]) < 1e-5) == (axis == 2)


def test_deeponet_learns_on_nodes_anywhere_and_minimises_the_norm_of_their_weights(trained):
    """From values at some nodes in the plane to values of a map of them, where nodes without weight are not looked at."""
    random = np.random.default_rng(0)
    nodes = random.uniform(0.3, 2.0, (40, 2))
    a, b = random.standard_normal((2, 200, 1))
    inputs, targets = a * nodes[:, 0] + b * nodes[:, 1], np.tanh(a) * nodes[:, 1] + b * nodes[:, 0] ** 2
    weights = np.where(np.arange(40) < 30, random.uniform(0.5, 2, 40), 0)
    data = {"inputs": inputs, "targets": targets, "test_inputs": inputs, "nodes": nodes, "weights": weights}
    run = {
        "model": "DeepONet",
        "epochs": 30,
        "rate": 1e-2,
        "of_model": {"branch": (12,), "trunk": (10,), "terms": 8, "every": 3},
    }
    (found,) = trained(data, run)
    missed = np.sqrt((weights * (found["outputs"] - targets) ** 2).sum(axis=1) / (weights * targets**2).sum(axis=1))
    assert found["training"] == pytest.approx(missed.mean(), rel=1e-4) and found["training"] < 0.1
    assert found["parameters"] == (14 * 12 + 12 + 12 * 8 + 8) + (2 * 10 + 10 + 10 * 8 + 8) + 1
    unseen = data | {"targets": np.where(weights > 0, targets, random.standard_normal(targets.shape))}
    there = trained(unseen, run, run | {"model": "none"})
    assert next(there)["training"] == pytest.approx(found["training"], rel=1e-6)
    with pytest.raises(subprocess.CalledProcessError):
        next(there)


def test_convolutions_and_fno_read_classes_on_a_circle_whatever_the_beginning(trained):
    """Waves of 2, 3 or 4 lobes that begin anywhere; a convolution with 3 and 5 points tells them apart by their slopes."""
    random, s = np.random.default_rng(0), np.arange(24) / 24
    labels = random.integers(0, 3, 120)
    inputs = np.cos(2 * np.pi * ((labels[:, None] + 2) * s + random.uniform(size=(120, 1))))
    data = {"inputs": inputs, "targets": labels, "test_inputs": np.concatenate([inputs, np.roll(inputs, 5, axis=1)])}
    convolutions = {"model": "convolutions", "epochs": 10, "rate": 1e-2, "of_model": {"widths": (6, 4), "sizes": (5, 3)}}
    counts = (
        (5 * 6 + 6 + 3 * 6 * 4 + 4) + 2 * (6 + 4) + (4 * 3 + 3),
        3 * (2 * 4 * 25 + 25 + 5) + 5 + 5 + (5 * 7 + 7) + (7 * 3 + 3),
    )
    for found, count in zip(trained(data, convolutions, fno(30)), counts):
        here, there = np.split(found["outputs"], 2)
        assert found["parameters"] == count and here.shape == (120, 3) and relative(here, there) < 1e-5
        assert np.mean(here.argmax(axis=1) == labels) > 0.95
        scores = here - here.max(axis=1, keepdims=True)
        cross_entropy = np.log(np.exp(scores).sum(axis=1)) - scores[range(120), labels]
        assert found["training"] == pytest.approx(cross_entropy.mean(), rel=1e-3)


def test_the_errors_of_operators_are_those_of_the_demo_and_their_moves_are_symmetries_of_burgers(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "demos")
    table, demo = (import_module(name) for name in ("burgers_table", "burgers_on_the_circle"))
    data = demo.Data(6, 5)
    arrays, points = table.arrays(data), table.POINTS
    # Exact in all modes that the points hold but for a wave of a known size: what is left out counts too.
    x = arrays["nodes"][:, 0]
    w, half = data.w["test"], points // 2
    outputs = demo.at(w, x, half).T + 0.01 * np.cos(5 * x)
    left = 2 * np.sum(np.abs(w[:, half:]) ** 2, axis=1)
    np.testing.assert_allclose(table.errors(data, outputs), np.sqrt(0.01**2 / 2 + left) / demo.size(w), rtol=1e-10)
    # u(. + s) and -u(-. + s) are inputs with outputs of the same form.
    c, k = data.c["train"] * (np.arange(demo.FINE // 2 + 1) < half), np.arange(demo.FINE // 2 + 1)
    for move in (0, 5, points, points + 17):
        moved = c * np.exp(1j * k * x[move % points])
        moved = moved if move < points else -np.conj(moved)
        for name, coefficients in (("inputs", moved), ("targets", demo.burgers(moved))):
            given = {"inputs": arrays["inputs"], "targets": demo.at(demo.burgers(c), x, demo.MODES).T}[name]
            expected = demo.at(coefficients, x, demo.MODES).T
            np.testing.assert_allclose(arrays["signs"][move] * given[:, arrays["moves"][move]], expected, atol=1e-10)
