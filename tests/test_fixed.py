"""An object stays as it was made: no attribute can be set of which some code would see the change and other code not."""

import copy
import dataclasses
import gc
import inspect
import pickle
import weakref
from dataclasses import replace
from typing import Protocol

import firedrake as fd
import numpy as np
import pytest
import sympy
from helpers import TIMES, label_space, laplace, set_smooth, smooth
from kinds import KINDS
from numpy.testing import assert_allclose
from problems import learning_problem, network

import fem_resnet
from fem_resnet import (
    Activation,
    Batch,
    Box,
    DampedAntisymmetric,
    Derivatives,
    Ellipse,
    Head,
    Layers,
    Observations,
    Points,
    Polygon,
    RunningCost,
    class_space,
    cross_entropy,
    functional_loss,
    get_activation,
    least_squares,
    load,
    save,
    tikhonov,
)  # fmt: skip
from fem_resnet.fixed import Fixed
from fem_resnet.time_stepping.stepper import Stepper

on_ranks = pytest.mark.parallel([1, 2, 3])

#: Estimators follow scikit-learn's protocol, in which parameters are set.
CLASSES = {
    name: getattr(fem_resnet, name)
    for name in fem_resnet.__all__
    if inspect.isclass(getattr(fem_resnet, name)) and not hasattr(getattr(fem_resnet, name), "set_params")
}


@pytest.mark.whole
@pytest.mark.parametrize("name", CLASSES)
def test_attributes_of_every_public_class_cannot_be_set(name):
    cls = CLASSES[name]
    frozen = dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    assert frozen or issubclass(cls, (Fixed, tuple, Exception)) or Protocol in cls.__bases__


def _objects():
    """One object of each kind that a user makes, or gets at the start."""
    net = network("disk", "CG1")
    problem = learning_problem(net)
    yield from (net, net.Y, net.bias, net.kernel, net.bases["phi"][0], net.kernel.space_basis.kernel, net.activation)
    yield from (problem, problem.head, problem.head.W, problem.loss, problem.regulariser, problem.batch)
    yield net.run(problem.batch.inputs)
    yield problem.record()[1]
    for kind in ("learned factors", "learned times", "kernel set"):
        other, _ = KINDS[kind]()
        yield from (other, *other.parameters)
    yield class_space(3)
    yield RunningCost(sympy.Symbol("f") ** 2)
    yield from (Box((-1, 1), (-1, 1)), Ellipse((0, 0), 1.0), Points([(0, 1), (1, 0)]), Polygon([(0, 0), (1, 0), (0, 1)]))
    yield DampedAntisymmetric(0.1)
    yield Observations([1], [np.zeros(4, int)], [1.0])
    yield Derivatives(problem.batch.inputs, problem.batch.inputs)


def _public(thing):
    """Names and values of public attributes and properties, without methods."""
    for name in dir(thing):
        if not name.startswith("_") and not callable(getattr(type(thing), name, None)):
            try:
                yield name, getattr(thing, name)
            except (ValueError, TypeError, RuntimeError):  # one that the object has not
                yield name, None


def test_no_public_attribute_of_any_object_can_be_set_and_what_it_holds_cannot_be_changed():
    gone_through = 0
    for thing in _objects():
        what = type(thing).__name__
        for name, value in [*_public(thing), ("a_name_that_it_has_not", None)]:
            with pytest.raises(AttributeError):
                setattr(thing, name, value)
            with pytest.raises(AttributeError):
                delattr(thing, name)
            if isinstance(value, np.ndarray):
                assert not value.flags.writeable or getattr(thing, name) is not value, f"{what}.{name} can be written to"
            if isinstance(value, (list, dict, set)):
                assert getattr(thing, name) is not value, f"{what}.{name} can be changed"
            gone_through += 1
    assert gone_through > 150


def test_a_message_says_what_to_do():
    net = network("disk", "CG1")
    with pytest.raises(AttributeError, match=r"steps: a ResidualNetwork stays .*; replace\(..\) gives another network"):
        net.steps = 8
    with pytest.raises(AttributeError, match="functions: a Parameter stays .*; `set` gives it other coefficients"):
        net.bias.functions = []
    with pytest.raises(AttributeError, match=r"loss: a LearningProblem stays .*; replace\(..\) gives another problem"):
        learning_problem(net).loss = least_squares
    with pytest.raises(AttributeError, match="Y: a Basis stays what it was made with, .*; make a new one"):
        del net.bases["phi"][0].Y


def test_another_number_of_steps_is_that_of_recorded_and_unrecorded_runs():
    net = network("disk", "CG1", size=2.0)
    problem = learning_problem(net, head=False)
    before = float(problem.evaluate()[0])
    finer = problem.replace(net=net.replace(layers=replace(net.settings.layers, steps=8)))
    J, _ = finer.record()
    assert_allclose(float(J(finer.functions)), float(finer.evaluate()[0]), rtol=1e-12)
    assert float(problem.evaluate()[0]) == before and abs(float(finer.evaluate()[0]) - before) > 1e-6


def test_lists_and_arrays_of_the_users_may_change_afterwards():
    net = network("disk", "CG1", layers_per_block=None)
    labels, weights, layers, times = [0, 1, 2, 0], np.array([1.0, 2.0, 3.0, 4.0]), [1, 2], list(TIMES)
    head = Head(net.bases["phi"][0], 3)
    head.W.set(0, np.random.default_rng(0).normal(size=head.W.space_basis.shape))
    seen = Observations(layers, [labels, labels], [1.0, 2.0])
    batch = Batch(net.Y.batch(smooth(net.Y, 4)), labels, weights, observations=seen)
    problem = fem_resnet.LearningProblem(net, head, cross_entropy, None, batch)
    J, _ = problem.record()
    value = float(problem.evaluate()[0])
    labels[0], weights[0], layers[0], times[1] = 2, 100.0, 0, 0.5
    assert float(problem.evaluate()[0]) == value
    assert_allclose([float(J(problem.functions)), float(problem.record()[0](problem.functions))], value, rtol=1e-13)


# -- times that are learned ------------------------------------------------------------------------------------------


def _with_learned_times(bias="basis"):
    net = network("disk", "CG1", bias=bias, learn_times=True, times=[0.0, 0.25, 0.5])
    net.layer_times.set(0, [0.6, 1.5])
    return net


def test_inner_products_stay_those_of_the_given_times_whatever_a_network_goes_through(tmp_path):
    """Saved and read, on another label space, truncated, copied: R, a gradient's length, and f(T) are the same."""
    net = _with_learned_times()
    assert net.settings.layers.times == (0.0, 0.25, 0.5) and net.times.tolist() == [0.0, 0.6, 1.5]
    save(tmp_path / "net.h5", net)
    ways = {
        "load": load(tmp_path / "net.h5")[0], "truncated": net.truncated(0.0), "deepcopy": copy.deepcopy(net),
        "replace": net.replace(layers=replace(net.settings.layers, steps=1)),
    }  # fmt: skip
    laplace_net = fem_resnet.ResidualNetwork(
        laplace("disk", "CG1", 4), bias=laplace("disk", "CG1", 4), layers=Layers([0.0, 0.25, 0.5], learn_times=True)
    )
    set_smooth(laplace_net, np.random.default_rng(0))
    laplace_net.layer_times.set(0, [0.6, 1.5])
    ways["on"] = laplace_net.on(label_space("disk", "CG1", 2))
    for name, other in ways.items():
        ours = laplace_net if name == "on" else net
        assert other.times.tolist() == [0.0, 0.6, 1.5], name
        assert other.settings.layers.times == (0.0, 0.25, 0.5), name
        R = [float(tikhonov(1.0)([p for p in n.parameters if p.penalised])) for n in (ours, other)]
        # Another mesh has another measure.
        assert_allclose(*R, rtol=1e-2 if name == "on" else 1e-10, err_msg=name)
        assert list(ours.bias.time_basis.measures) == list(other.bias.time_basis.measures) == [0.25, 0.25], name


# -- copies ----------------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("kind", KINDS if fd.COMM_WORLD.size == 1 else ["Runge-Kutta", "learned factors"])
def test_a_deep_copy_of_a_network_has_coefficients_of_its_own(kind):
    net, _ = KINDS[kind]()
    initial = net.Y.batch(smooth(net.Y, 3))
    before = np.array(net(initial).dat.data_ro)
    other = copy.deepcopy(net)
    assert_allclose(other(initial).dat.data_ro, before, rtol=0, atol=1e-13)
    for parameter in net.parameters:
        for function in parameter.functions:
            function.assign(0.5 * function)
    assert_allclose(other(initial).dat.data_ro, before, rtol=0, atol=1e-13)
    assert np.abs(net(initial).dat.data_ro - before).max(initial=0.0) > 1e-3


def test_copies_of_a_head_and_of_what_never_changes():
    head = learning_problem(network("disk", "CG1")).head
    other, W = copy.deepcopy(head), head.W.get(0)
    head.W.set(0, 0 * W)
    assert (other.W.get(0) == W).all() and other.Y is head.Y and other.psi is head.psi
    assert copy.deepcopy(head.Y) is head.Y and copy.deepcopy(head.psi) is head.psi
    assert copy.copy(head).W is head.W


def test_what_does_not_copy_or_pickle_says_how():
    net = KINDS["kernel set"]()[0]
    problem = learning_problem(network("disk", "CG1"))
    with pytest.raises(TypeError, match=r"pickle: a ResidualNetwork lives on a mesh, .*; save\(path, net\) and load\(path\)"):
        pickle.dumps(net)
    for thing in (net.Y, net.bias, problem, problem.head, net.bases["phi"][0]):
        with pytest.raises(TypeError, match=f"pickle: a {type(thing).__name__} lives on a mesh"):
            pickle.dumps(thing)
    with pytest.raises(TypeError, match="deepcopy: .* is a part of its network; copy the network"):
        copy.deepcopy(net.kernel)
    with pytest.raises(TypeError, match=r"deepcopy: replace\(net=.., head=..\) with deep copies of these"):
        copy.deepcopy(problem)
    assert pickle.loads(pickle.dumps(Box((-1, 1), (-1, 1)))) is not None  # no mesh


# -- compiled code is that of what is computed -----------------------------------------------------------------------


def _own(order):
    """sigma(s) = s / 2 + s^3, written by hand."""
    formulas = (lambda s: s / 2 + s**3, lambda s: 0.5 + 3 * s**2, lambda s: 6 * s, lambda s: s**2 / 4 + s**4 / 4)

    def kernel(s, out, **parameters):
        np.copyto(out, formulas[order](np.array(s)))

    return kernel


MINE = tuple(map(_own, range(4)))
S = sympy.Symbol("s")
#: What `dataclasses.replace` makes of activations, and what they then compute.
REPLACED = {
    "kernels of a built-in": (dataclasses.replace(get_activation("tanh"), kernels=MINE), MINE),
    "kernels of an expression": (dataclasses.replace(Activation.from_sympy(sympy.sin(S)), kernels=MINE), MINE),
    "name": (dataclasses.replace(get_activation("tanh"), name="arctan"), get_activation("tanh").kernels),
    "expression": (dataclasses.replace(get_activation("tanh"), expression=sympy.sin(S)), get_activation("tanh").kernels),
    "another expression": (
        dataclasses.replace(Activation.from_sympy(sympy.sin(S)), expression=sympy.atan(S)),
        Activation.from_sympy(sympy.sin(S)).kernels,
    ),
    "one kernel": (
        dataclasses.replace(get_activation("tanh"), kernels=(*get_activation("tanh").kernels[:1], *MINE[1:])),
        (*get_activation("tanh").kernels[:1], *MINE[1:]),
    ),
    "parameters": (
        dataclasses.replace(get_activation("elu"), parameters=(("alpha", 2.0),)), get_activation("elu", alpha=2.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("changed", REPLACED)
def test_layers_compute_the_activation_that_they_are_given(changed):
    """One Euler step of f_t = sigma(a): sigma(a) and the derivative sigma'(a) by its kernels, not by its name."""
    given, kernels = REPLACED[changed]
    phi = laplace("disk", "CG1", 4)
    net = fem_resnet.ResidualNetwork(phi, layers=1, activation=given, solver_parameters={"ts_rk_type": "1fe"})
    a = smooth(net.Y, 1)[:, 0]
    net.bias.set(0, a)
    if isinstance(kernels, Activation):
        value, slope = kernels(a), kernels.derivative(a)
    else:
        value, slope = np.empty_like(a), np.empty_like(a)
        kernels[0](a, value)
        kernels[1](a, slope)
    zero = net.Y.batch(0 * a)
    assert_allclose(net.Y.values(net(zero))[:, 0], value, rtol=1e-13, atol=1e-15)
    target = net.Y.batch(value - 1.0)  # so that r(T) = 1
    J, _ = fem_resnet.LearningProblem(net, None, least_squares, None, Batch(zero, target)).record()
    J.derivative()
    found = J.controls[0].get_derivative().dat.data_ro
    assert_allclose(found, net.Y.weights * slope, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("changed", [name for name in REPLACED if name != "parameters"])
def test_files_do_not_hold_kernels_of_a_users_own(changed, tmp_path):
    net = fem_resnet.ResidualNetwork(laplace("disk", "CG1", 4), layers=1, activation=REPLACED[changed][0])
    with pytest.raises(ValueError, match="activation: .* has kernels of its own, which no file holds; give a SymPy"):
        save(tmp_path / "net.h5", net)


# -- what is kept ----------------------------------------------------------------------------------------------------


def _alive(kind):
    gc.collect()
    return sum(isinstance(thing, kind) for thing in gc.get_objects())


def test_running_costs_and_numbers_of_samples_keep_no_steppers_for_ever():
    """Only a few of the latest are kept, however many a user makes."""
    net = network("disk", "CG1", layers_per_block=None)
    initial = net.Y.batch(smooth(net.Y, 2))
    net.run(initial, RunningCost(sympy.Symbol("f") ** 2))
    one, costs = _alive(Stepper), []
    for turn in range(8):
        cost = RunningCost(sympy.Symbol("f") ** 2, kernel=0.1 * turn)
        net.run(initial, cost)
        costs.append(weakref.ref(cost))
        del cost
    most = _alive(Stepper)
    assert most <= one + 3 * net.layers
    assert sum(reference() is not None for reference in costs) <= 4
    for samples in range(1, 7):
        net(net.Y.batch(smooth(net.Y, samples)))
    assert len(net._solver._stages) <= 4 and _alive(Stepper) <= most


def test_a_loss_in_ufl_keeps_no_label_space_alive():
    loss = functional_loss(lambda p, C: (p - C) ** 4 * fd.dx)
    mesh, spaces = fd.UnitIntervalMesh(3), []
    for _ in range(3):
        Y = fem_resnet.LabelSpace(fd.FunctionSpace(mesh, "CG", 1))
        loss(Y, Y.batch(np.ones(Y.nodes)), Y.batch(np.zeros(Y.nodes)))
        spaces.append(weakref.ref(Y))
        del Y
    gc.collect()
    assert [reference() for reference in spaces] == [None] * 3
