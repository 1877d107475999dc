"""The generator of demos/atlas/darcy.py, held against finer meshes and higher degrees."""

from importlib import import_module
from pathlib import Path

import firedrake as fd
import numpy as np
import pytest

from fem_resnet import LabelSpace, laplace_basis

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def law():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "demos" / "atlas")
        yield import_module("darcy")


@pytest.fixture(scope="module")
def samples(law):
    return law.samples(6, 2)


def test_solutions_agree_with_those_of_degree_3_on_the_next_mesh(law, samples):
    """For the same K on both, of degree 1 with the values of the law at the vertices."""
    coarse, fine = law.plates(fd.COMM_SELF, 2)[1:]
    flow, better = law.Flow(fd.FunctionSpace(coarse, "CG", 2)), law.Flow(fd.FunctionSpace(fine, "CG", 3))
    K, again = (fd.Function(fd.FunctionSpace(mesh, "CG", 1)) for mesh in (coarse, fine))
    for of_sample in samples["test_K"]:
        K.dat.data_wo[:] = of_sample
        fd.prolong(K, again)
        flow.K.interpolate(K)
        better.K.interpolate(again)
        u, expected = flow.solve(), better.solve()
        there = fd.Function(fd.FunctionSpace(fine, "CG", 2))
        fd.prolong(u, there)
        missed = fd.norm(fd.Function(expected.function_space()).interpolate(there) - expected) / fd.norm(expected)
        assert 1e-5 < missed < 1e-3
    # A constant in K is a factor: u(K + c) = exp(-c) u(K).
    before = flow.u.dat.data_ro.copy()
    flow.K += 0.7
    np.testing.assert_allclose(flow.solve().dat.data_ro, np.exp(-0.7) * before, rtol=1e-9, atol=1e-12)


def test_fields_have_the_covariance_of_the_law(law, samples):
    """What fields say of the first modes, over the deviation by the law, are the random numbers that they were made of."""
    mesh = law.plates(fd.COMM_SELF, 1)[1]
    V = fd.FunctionSpace(mesh, "CG", 2)
    eigenvalues, functions = law.eigenfunctions(V, law.MODES)
    deviations = 1 / (9 + eigenvalues)
    deviations *= 0.5 * np.sqrt(samples["weights"].sum() / np.sum(deviations**2))
    mode, field = fd.Function(V), fd.Function(fd.FunctionSpace(mesh, "CG", 1))
    drawn = np.random.default_rng(0).standard_normal((6, law.MODES))
    for number in range(8):
        mode.dat.data_wo[:] = functions[:, number]
        assert fd.norm(mode) == pytest.approx(1)
        for sample, K in enumerate(samples["K"]):
            field.dat.data_wo[:] = K
            assert fd.assemble(field * mode * fd.dx) == pytest.approx(deviations[number] * drawn[sample, number], abs=2e-3)
    # Another space and another solver.
    there = laplace_basis(LabelSpace(field.function_space()), 10).eigenvalues
    np.testing.assert_allclose(eigenvalues[1:10], there[1:], rtol=0.01)


def test_samples_live_where_they_say(law, samples):
    """Points are the vertices of cells of the plate, u is 0 on its outer edge alone, and the two sets differ."""
    points, weights, cells = (samples[name] for name in ("points", "weights", "cells"))
    assert points.shape == (2319, 2) and samples["K"].shape == (6, 2319) and samples["test_u"].shape == (2, 2319)
    a, b, c = points[cells].transpose(1, 0, 2)
    areas = np.abs(np.linalg.det(np.stack([b - a, c - a], axis=1))) / 2
    np.testing.assert_allclose(np.bincount(cells.ravel(), np.repeat(areas / 3, 3)), weights, rtol=1e-10)
    edge = np.isclose(samples["u"], 0, atol=1e-14)
    assert (edge == edge[0]).all() and 100 < edge[0].sum() < 200 and (samples["u"][:, ~edge[0]] > 0).all()
    centre, radius = np.array([0.42, 0.68]), 0.15
    on_hole = np.abs(np.linalg.norm(points - centre, axis=1) - radius) < 0.01
    assert on_hole.sum() > 10 and not edge[0][on_hole].any()
    assert not np.array_equal(samples["K"][:2], samples["test_K"])
