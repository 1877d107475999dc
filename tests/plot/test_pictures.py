"""Pictures show the right numbers, say what they show, and are the same on any number of ranks."""

import numpy as np
import pytest
from drawn_spaces import space_of
from firedrake import COMM_WORLD
from helpers import label_space, laplace, network, smooth, with_channels
from matplotlib.collections import LineCollection, TriMesh
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from numpy.testing import assert_allclose
from PIL import Image
from problems import learning_problem, taping

from fem_resnet import (
    Batch,
    Bias,
    Kernel,
    LearningProblem,
    ResidualNetwork,
    class_space,
    frozen_spectra,
    hessian_spectrum,
    laplace_basis,
    least_squares,
    plot,
    point_space,
    singular_system,
    train,
)  # fmt: skip
from fem_resnet.plot import canvas

on_ranks = pytest.mark.parallel([1, 2, 3])
on_two_ranks = pytest.mark.parallel([1, 2])


def gathered(Y, values):
    """Node values of all ranks, sorted."""
    return np.sort(np.concatenate(Y.comm.allgather(np.asarray(values).ravel())))


def only(collections, kind):
    (one,) = [each for each in collections if isinstance(each, kind)]
    return one


@pytest.fixture
def without_pyvista(monkeypatch):
    for module in ("fields", "drawing"):
        monkeypatch.setattr(f"fem_resnet.plot.{module}.has_pyvista", lambda: False)


@on_ranks
@pytest.mark.parametrize("space", [("disk", "CG1"), ("disk", "DG0"), ("annulus", "CG2"), ("square", "CG3")])
def test_a_function_in_the_plane_is_a_coloured_picture(space):
    Y = space_of(*space)
    f = Y.batch(smooth(Y, 2) - 0.6)
    ax = plot.function(Y, f, 1, label="height")
    least, largest = gathered(Y, Y.values(f)[:, 1])[[0, -1]]
    if COMM_WORLD.rank:
        assert not ax.collections
        return
    picture = only(ax.collections, TriMesh)
    assert ax.get_aspect() == 1 and (ax.get_xlabel(), ax.get_ylabel()) == ("$y_1$", "$y_2$")
    # Corners of pieces are nodes of these spaces, or lie between them.
    tolerance = 0.0 if space[1] in ("CG1", "DG0") else 0.1
    assert_allclose([picture.get_array().min(), picture.get_array().max()], [least, largest], atol=tolerance + 1e-12)
    assert picture.norm.vmax == -picture.norm.vmin and picture.cmap.name == "RdBu_r"  # of both signs
    (bar,) = [other for other in ax.figure.axes if other is not ax]
    assert bar.get_ylabel() == "height"


@on_two_ranks
def test_functions_on_lines_circles_and_points():
    interval, circle, points = space_of("interval", "DG0"), space_of("circle", "CG1"), class_space(4, COMM_WORLD)
    line, ring, bars = (
        plot.function(Y, Y.batch(values), label="g")
        for Y, values in (
            (interval, interval.coordinates[:, 0] ** 2), (circle, circle.coordinates[:, 1]), (points, 1.0 + points.numbers)
        )
    )  # fmt: skip
    if COMM_WORLD.rank:
        return
    x, g = line.lines[0].get_data()
    steps = np.isfinite(x)
    assert_allclose(g[steps][::2], g[steps][1::2])  # constant on each cell
    assert_allclose(((x[steps][::2] + x[steps][1::2]) / 2) ** 2, g[steps][::2])
    assert len(line.figure.axes) == 1 and line.get_ylabel() == "g"
    curve = only(ring.collections, LineCollection)
    assert_allclose(curve.get_array(), [piece[:, 1].mean() for piece in curve.get_segments()], atol=1e-12)
    assert ring.get_aspect() == 1
    assert [bar.get_height() for bar in bars.patches] == [1, 2, 3, 4] and bars.get_xlabel() == "point"


@on_two_ranks
@pytest.mark.parametrize("space", [("sphere", "CG1"), ("torus", "DG0"), ("cube", "CG1"), ("prisms", "CG1")])
def test_surfaces_and_bodies_by_matplotlib(space, without_pyvista):
    Y = space_of(*space)
    ax = plot.function(Y, Y.batch(Y.coordinates[:, 2]))
    if COMM_WORLD.rank == 0:
        surface = only(ax.collections, Poly3DCollection)
        assert ax.name == "3d" and ax.get_zlabel() == "$y_3$"
        assert len(surface.get_array()) > 30 and ax.get_aspect() == "equal"
    with pytest.raises(ValueError, match=r"ax: expected a picture of a surface .*pip install 'fem_resnet\[vtk\]'"):
        plot.function(Y, Y.batch(Y.coordinates[:, 2]), ax=Figure().subplots())


@pytest.mark.skipif(not canvas.has_pyvista(), reason="PyVista is not installed")
@on_two_ranks
def test_surfaces_from_two_sides_by_pyvista():
    Y = space_of("sphere", "DG0")
    ax = plot.function(Y, Y.batch(np.where(Y.coordinates[:, 0] > 0, 1.0, -1.0)), limits=(-1, 1))
    if COMM_WORLD.rank:
        return
    (picture,) = ax.images
    front, behind = np.split(picture.get_array().astype(int), 2, axis=1)

    def red(view):
        return np.sum(view[..., 0] > view[..., 2] + 60)

    def blue(view):
        return np.sum(view[..., 2] > view[..., 0] + 60)

    assert red(front) > 1.5 * blue(front) and blue(behind) > 1.5 * red(behind)
    assert (front[:5] == 255).all()  # a white background


@on_ranks
def test_states_biases_and_costates_over_time_have_one_scale():
    net = network()
    f, targets = (net.Y.batch(smooth(net.Y, 2, seed)) for seed in (0, 1))
    problem = LearningProblem(net, None, least_squares, None, Batch(f, targets))
    with taping():
        J, run = problem.record()
        J.derivative()
    for draw, function, times in (
        (plot.state, run.state, [0, 1, 2, 3]), (plot.costate, run.costate, [0, 1, 2, 3]), (plot.bias, None, [0, 1, 2]),
    ):  # fmt: skip
        axes = draw(net) if function is None else draw(run, 1)
        assert len(axes) == len(times)
        values = [gathered(net.Y, net.bias.get(l) if function is None else net.Y.values(function(l))[:, 1]) for l in times]
        if COMM_WORLD.rank:
            continue
        pictures = [only(ax.collections, TriMesh) for ax in axes]
        for ax, picture, expected, l in zip(axes, pictures, values, times):
            found = picture.get_array()
            assert_allclose([found.min(), found.max()], expected[[0, -1]], atol=1e-12)
            assert ax.get_title() == f"t = {net.times[l]:.3g}"
        assert len({(picture.norm.vmin, picture.norm.vmax) for picture in pictures}) == 1
        assert len(axes[0].figure.axes) == len(axes) + 1


@on_ranks
def test_a_row_of_the_kernel_is_that_of_the_node_that_is_marked():
    net = network(("disk", "DG0"), basis_for_bias=True)
    beta, kernel = net.kernel.get(1), net.kernel.space_basis.kernel
    ax = plot.kernel_row(net, (0.4, 0.3), layer=1)
    phi, psi, x = (np.concatenate(COMM_WORLD.allgather(a)) for a in (kernel.phi.values, kernel.psi.values, net.Y.coordinates))
    if COMM_WORLD.rank:
        return
    nearest = np.linalg.norm(x - [0.4, 0.3], axis=1).argmin()
    expected = phi[nearest] @ beta @ psi.T
    found = only(ax.collections, TriMesh).get_array().reshape(-1, 3)
    assert_allclose(np.sort(found[:, 0]), np.sort(expected), atol=1e-12)
    assert_allclose(found, found[:, :1] * np.ones(3), atol=1e-12)
    assert_allclose(np.ravel(ax.lines[0].get_data()), x[nearest], atol=1e-8)
    assert f"t = {net.times[1]:.3g}" in ax.get_title()


@on_two_ranks
def test_a_row_between_channels_and_of_points():
    phi = with_channels("disk", "CG1", 3)
    net = ResidualNetwork(Kernel(phi), bias=Bias(phi, in_time="shared"), layers=2)
    beta = np.zeros((6, 6))
    beta[0, 3] = 1.0  # from the constant of the second channel to that of the first
    net.kernel.set(0, beta)
    rows = [plot.kernel_row(net, (0, 0), channels=channels) for channels in ((0, 1), (1, 0))]
    ring = np.roll(np.eye(5), 1, axis=0)
    points = point_space(np.ones(5), graph=ring + ring.T)
    other = ResidualNetwork(laplace_basis(points, 3), layers=1)
    other.kernel.set(0, np.eye(3))
    bars = plot.kernel_row(other, 3)
    if COMM_WORLD.rank == 0:
        full, empty = (only(ax.collections, TriMesh).get_array() for ax in rows)
        assert_allclose(full, 1 / net.Y.one.measure, rtol=1e-6)
        assert not empty.any()
        assert bars.get_title().startswith("$y_0$ = point 3") and len(bars.patches) == 5
    assert len(plot.bias(net)) == 1  # shared by all layers


@on_two_ranks
def test_a_basis_with_its_eigenvalues():
    phi = laplace("disk", "CG1", 4)
    axes = plot.basis(phi, 3)
    assert len(axes) == 3 and len(plot.basis(laplace("interval", "CG3", 4), 9)) == 4
    if COMM_WORLD.rank == 0:
        assert axes[0].get_title() == r"$\phi_{1}$, $\lambda$ = 0"
        assert axes[1].get_title() == rf"$\phi_{{2}}$, $\lambda$ = {phi.eigenvalues[1]:.3g}"


@on_two_ranks
def test_norms_over_time():
    net = network()
    f = net.Y.batch(smooth(net.Y, 2))
    run = net.run(f)
    ax = plot.norms(run)
    expected = [[net.Y.norm(net.Y.function(state, s)) for state in run.states()] for s in range(2)]
    assert_allclose([line.get_ydata() for line in ax.lines], expected)
    assert ax.get_legend() is not None and "norm of f(t)" in ax.get_ylabel()
    many = plot.norms(net.run(net.Y.batch(smooth(net.Y, 9))))
    assert len(many.lines) == 10 and many.lines[-1].get_label() == "median of 9 samples"


def test_learning_curves_of_each_kind_of_training():
    def problem():
        return learning_problem(network())

    by_ranks = train(problem(), {"tao_max_it": 2}, monitor=lambda progress: None)
    ax = plot.learning_curve({"TAO": by_ranks, "pairs": np.array([[0.0, 3.0], [10.0, 1.0]])})
    assert_allclose(ax.lines[0].get_ydata(), by_ranks.values)
    assert list(ax.lines[1].get_xdata()) == [0, 10] and ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["TAO", "pairs"]
    assert plot.learning_curve([1.0, -1.0]).get_yscale() == "linear"


def test_spectra_of_each_kind():
    problem = learning_problem(network())
    net, inputs = problem.net, problem.batch.inputs
    hessian = hessian_spectrum(problem, 3, gauss_newton=True)
    ax = plot.spectrum(hessian, weight=float(hessian.values[1] * 1.01))
    assert_allclose(ax.lines[0].get_ydata(), hessian.values)
    assert "above it: 1 of 3" in ax.get_legend().get_texts()[0].get_text()
    system = singular_system(net.layer_inputs()[0].factors, net.kernel.get(0))
    assert_allclose(plot.spectrum(system).lines[0].get_ydata(), system.values)
    assert plot.spectrum(frozen_spectra(net, inputs)).get_xlabel() == "t"
    assert plot.spectrum(laplace("disk", "CG1", 4)).get_yscale() == "linear"  # the first is 0
    plane = plot.spectrum([1 + 1j, 1 - 1j])
    assert plane.get_aspect() == 1 and plane.get_ylabel() == "imaginary part"


def test_what_is_taken_for_what():
    ax = plot.confusion(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2]))
    assert_allclose(ax.images[0].get_array(), [[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]])
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("3 of 4 right", "predicted", "true")
    with pytest.raises(ValueError, match="names: expected 3, one a class, got 2"):
        plot.confusion([0, 1, 2], [0, 1, 2], ["a", "b"])


def test_lines_have_all_numbers_names_and_bars():
    n = np.array([25, 100, 1000])
    errors = {"ours": np.stack([n, 1 / n, 0.1 / n], axis=1), "theirs": np.stack([n, 2 / n], axis=1)}
    ax = plot.lines(
        errors, points={"once": [(50, 0.01)]}, reference={"order 1": [(25, 0.1), (1000, 0.0025)]}, log="xy", xlabel="samples"
    )
    drawn = {line.get_label(): line for line in ax.lines} | {bars.get_label(): bars[0] for bars in ax.containers}
    for name, array in errors.items():
        assert_allclose(np.transpose(drawn[name].get_data()), np.asarray(array)[:, :2])
    assert drawn["once"].get_linestyle() == "None" and drawn["order 1"].get_color() == "0.5"
    (bars,) = [each for container in ax.containers if container.has_yerr for each in container[2]]
    assert_allclose([np.ptp(bar[:, 1]) for bar in bars.get_segments()], 0.2 / n)
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_xlabel()) == ("log", "log", "samples")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["25", "50", "100", "1,000"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["order 1", "ours", "theirs", "once"]


def test_names_of_lines_cover_no_curve_and_too_close_places_are_no_ticks():
    ax = plot.lines({"a": [(1000, 1), (1010, 2), (20_000, 3)]}, log="x")
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().y1 < ax.get_window_extent().y0
    assert "1,010" not in [label.get_text() for label in ax.get_xticklabels()]
    assert plot.lines({"a": [(1, 1), (2, 2)]}, legend=False).get_legend() is None
    with pytest.raises(ValueError, match="^points: expected arrays of shape .* got \\(2,\\) of 'b'"):
        plot.lines({}, points={"b": [1.0, 2.0]})
    with pytest.raises(ValueError, match="^curves: expected at least one"):
        plot.lines({})


def test_methods_beside_each_other_have_a_dot_a_run_and_their_mean():
    ax = plot.comparison({"network": [1.0, 2.0, 6.0], "linear map": [30.0]}, marked=["network"], log=True, xlabel="error")
    dots, mean, *_ = ax.lines
    assert_allclose(dots.get_data(), [[1, 2, 6], [0, 0, 0]])
    assert_allclose(mean.get_xdata(), 3.0)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["network", "linear map"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first stands on top
    near = plot.comparison({"a": [7.1, 9.4]}, log=True).get_xticklabels()
    assert [label.get_text() for label in near][:2] == ["7.2", "8"]
    assert dots.get_color() != ax.lines[2].get_color() and ax.get_xscale() == "log"
    with pytest.raises(ValueError, match="^marked: expected one of 'a', got 'b'"):
        plot.comparison({"a": [1.0]}, marked=["b"])


@on_two_ranks
def test_the_flow_of_a_sample_is_an_animation_with_a_frame_for_each_layer_time(tmp_path):
    path = COMM_WORLD.bcast(tmp_path / "flow.gif")
    net = network()
    plot.flow(path, net.run(net.Y.batch(smooth(net.Y, 2))), sample=1, seconds=2.0)
    if COMM_WORLD.rank == 0:
        with Image.open(path) as film:
            frames = []
            for k in range(film.n_frames):
                film.seek(k)
                frames.append((film.info["duration"], np.asarray(film.convert("L")).astype(int)))
        assert [path.name] == [other.name for other in path.parent.iterdir()]
        lasting = [duration for duration, _ in frames]
        assert_allclose(lasting, [*np.round(np.diff(net.times) / net.times[-1] * 2000, -1), 1500], atol=10)
        moved = [(np.abs(a - b) > 50).mean() for (_, a), (_, b) in zip(frames[:-1], frames[1:])]
        assert len(frames) == net.layers + 1 and all(0.0 < share < 0.5 for share in moved)


@on_two_ranks
def test_a_picture_is_saved_by_rank_0(tmp_path):
    path = COMM_WORLD.bcast(tmp_path / "picture.png")
    Y = label_space("disk", "CG1")
    plot.save(path, plot.function(Y, Y.batch(Y.coordinates[:, 0])))
    COMM_WORLD.barrier()
    if COMM_WORLD.rank == 0:
        with Image.open(path) as picture:
            assert len(np.unique(np.asarray(picture).reshape(-1, 4), axis=0)) > 50
    with pytest.raises(ValueError, match="path: expected the name of a file that ends with .png"):
        plot.save(path.with_suffix(".nothing"), Figure())


@on_two_ranks
def test_new_pictures_and_given_axes():
    Y = label_space("disk", "CG1")
    given = Figure().subplots(1, 2)
    net = network()
    run = net.run(net.Y.batch(smooth(net.Y)))
    assert list(plot.state(run, axes=given, layers=[0, 3], limits=(0, 2))) == list(given)
    if COMM_WORLD.rank == 0:
        assert {only(ax.collections, TriMesh).norm.vmax for ax in given} == {2}
    with pytest.raises(ValueError, match="axes: expected 4 axes, one for each picture, got 2"):
        plot.state(run, axes=given)
    with pytest.raises(ValueError, match="sample: expected an integer from 0 to 0, got 1"):
        plot.function(Y, Y.batch(Y.weights), sample=1)


@pytest.mark.skipif(canvas.has_vtk(), reason="VTK is installed")
def test_paraview_says_what_is_missing(tmp_path):
    net = network()
    with pytest.raises(RuntimeError, match=r"paraview: VTK is not installed, .* pip install 'fem_resnet\[vtk\]'"):
        plot.paraview(tmp_path / "run.pvd", net.run(net.Y.batch(smooth(net.Y))))


@pytest.mark.skipif(not canvas.has_vtk(), reason="VTK is not installed")
@on_two_ranks
def test_paraview_gets_a_series_with_names_and_times(tmp_path):
    from importlib import import_module

    path = COMM_WORLD.bcast(tmp_path / "run.pvd")
    net = network()
    f = net.Y.batch(smooth(net.Y, 2))
    with taping():
        J, run = LearningProblem(net, None, least_squares, None, Batch(f, net.Y.batch(0 * net.Y.values(f)))).record()
        J.derivative()
    plot.paraview(path, run, 1, costate=True)
    states = [gathered(net.Y, net.Y.values(run.state(l))[:, 1])[[0, -1]] for l in range(net.layers + 1)]
    costates = [gathered(net.Y, net.Y.values(run.costate(l))[:, 1])[[0, -1]] for l in range(net.layers + 1)]
    if COMM_WORLD.rank == 0:
        series = import_module("pyvista").get_reader(str(path))
        assert_allclose(series.time_values, net.times)
        for l in range(net.layers + 1):
            series.set_active_time_point(l)
            mesh = series.read().combine()
            for name, ends in (("state", states[l]), ("costate", costates[l])):
                found = np.asarray(mesh.point_data[name])
                assert_allclose([found.min(), found.max()], ends, rtol=1e-12)
