"""An exported network computes what the network does: in NumPy, in PyTorch with its gradients, and as a graph of ONNX."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import sympy
import torch_beside
from firedrake import COMM_WORLD
from helpers import TIMES, label_space, laplace, network, set_smooth, smooth, with_channels, without_mpi
from kinds import rotation, with_kernel_set, with_layer_bases, with_learned_factors
from numpy.testing import assert_allclose
from problems import head_onto, polynomials
from problems import network as classifier
from pyadjoint.enlisting import Enlist

import fem_resnet
from fem_resnet import (
    ACTIVATIONS,
    Activation,
    Batch,
    Channels,
    Head,
    Kernel,
    LearningProblem,
    Lift,
    Parity,
    RepeatedBasis,
    ResidualNetwork,
    Symmetric,
    cross_entropy,
    export,
    laplace_basis,
    least_squares,
    state_array,
)
from fem_resnet.activation.pointwise import KERNELS
from fem_resnet.label_domain.basis import node_numbers
from fem_resnet.parameters.space_basis import NodalValues

on_ranks = pytest.mark.parallel([1, 2, 3])

#: Round-off of sums over some hundred nodes, of values of size one, through a dozen stages.
CLOSE = 1e-13
S = sympy.Symbol("s")


def with_head(net, **options):
    basis = net.bases["phi"][0]
    head = Head(basis, **{"onto": 3, "prediction": "softmax"} | options)
    head.start(seed=3, gain=2.0)
    if head.mu is not None:
        head.mu.set(0, 0.2 * np.random.default_rng(4).normal(size=head.mu.space_basis.shape))
    return net, head, None


def explicit(kind, method=None):
    options = {"ts_type": kind} | ({} if method is None else {f"ts_{kind}_type": method})
    net = network(space=("annulus", "CG1"), steps=2, bias_in_time="linear", kernel_in_time="linear", solver_parameters=options)
    return net, None, None


def activated(activation):
    net, *others = with_head(classifier("disk", "CG1", activation=activation, size=2.0))
    return net, *others


def channels(repeated=True, gradient_flow=False):
    """Two channels, of which a lift makes three fields, and a head that reads all."""
    Y = Channels(label_space("disk", "CG1"), 2)
    phi = laplace_basis(Y, 4)
    net = ResidualNetwork(phi, bias=phi if repeated else None, layers=list(TIMES), gradient_flow=gradient_flow)
    net.start("random smooth", gain=1.5)
    for k in range(3):
        net.bias.set(k, net.bias.get(k) + 0.1 * (k + 1))
    lift = Lift(Y, 3)
    lift.start("random", seed=2)
    onto = RepeatedBasis(Y, laplace("disk", "CG1", 3)) if repeated else laplace("disk", "CG1", 3)
    return *with_head(net, onto=onto, prediction="identity" if repeated else "logistic")[:2], lift


def symmetric():
    net = with_kernel_set(lambda phi: Symmetric(phi, rotation(phi)))
    return with_head(net, onto=net.bases["phi"][0], prediction="softmax", symmetries=[rotation(net.bases["phi"][0])])


def one_field():
    """A lift of one field into two channels, of which signs forbid it one."""
    Y = Channels(label_space("disk", "CG1"), 2)
    phi = laplace_basis(Y, 4)
    net = ResidualNetwork(phi, layers=2)
    net.start("random smooth")
    lift = Lift(Y, 1, symmetries=[Parity(lambda x: -x, signs=(1, -1))])
    return *with_head(net)[:2], lift


NETWORKS = {
    **{f"rk {name}": partial(explicit, "rk", name) for name in ("1fe", "2a", "3", "3bs", "4", "5f", "5dp", "8vr")},
    "euler": partial(explicit, "euler"),
    **{f"ssp {name}": partial(explicit, "ssp", name) for name in ("rks2", "rks3", "rk104")},
    **{name: partial(activated, name) for name in ACTIVATIONS},
    "SymPy": lambda: activated(Activation.from_sympy(sympy.Piecewise((sympy.sin(S) / 3, S < 0), (S**2 / (1 + S), True)))),
    "SymPy, overflowing": lambda: activated(Activation.from_sympy(S / (1 + sympy.exp(-2 * S)) + sympy.asinh(S) / 5)),
    "SymPy, erf": lambda: activated(Activation.from_sympy(S * (1 + sympy.erf(S)) / 2)),
    "bases of layers": lambda: (with_layer_bases(), None, None),
    "learned factors, times": lambda: (with_learned_factors(), None, None),
    "shared in time": lambda: with_head(classifier("sphere", "CG1", bias_in_time="shared", kernel_in_time=[0, 1, 0])),
    "gradient flow": lambda: with_head(classifier("disk", "CG1", gradient_flow=True)),
    "channels": channels,
    "channels, values at nodes, gradient flow": lambda: channels(False, True),
    "symmetric kernel and head": symmetric,
    "one field": one_field,
    "a nodal bias, two blocks": lambda: (with_channels_network(), None, None),
    "output elsewhere": lambda: (classifier("disk", "CG1"), head_onto(("disk", "CG1"), ("sphere", "CG1")), None),
    "no layers": lambda: with_head(ResidualNetwork(laplace("disk", "DG0", 4), layers=0), prediction="logistic"),
}  # fmt: skip


def with_channels_network():
    phi = with_channels("annulus", "CG1", 5)
    net = ResidualNetwork(Kernel(phi, polynomials(phi.Y) if phi.Y.channels == 1 else phi), layers=2)
    set_smooth(net, np.random.default_rng(0), 0.5)
    return net


@cache
def made(name):
    return NETWORKS[name]()


def batch(net, lift, samples=3):
    Y = net.Y if lift is None else lift.fields
    return Y.batch(smooth(Y, samples))


def row_a_sample(Y, function):
    return state_array(Y, function).T


def computed(net, head, lift):
    """Inputs, O or f(T), and h(O) of the network itself, one row a sample, the same on every rank."""
    given = batch(net, lift)
    inputs = row_a_sample(net.Y if lift is None else lift.fields, given)
    f = net(given if lift is None else lift(given))
    if head is None:
        return inputs, row_a_sample(net.Y, f), row_a_sample(net.Y, f)
    return inputs, row_a_sample(head.Y, head(f)), row_a_sample(head.Y, head.predict(f))


def written_predictor(folder):
    """The predictor that lies beside the arrays, as a program elsewhere imports it."""
    spec = importlib.util.spec_from_file_location("predictor_of_a_test", folder / "predict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@on_ranks
@pytest.mark.parametrize("name", NETWORKS)
def test_arrays_and_the_predictor_compute_what_the_network_does(name, tmp_path):
    net, head, lift = made(name)
    path = tmp_path / "network.npz"
    export(net, head, path, lift)
    inputs, O, prediction = computed(net, head, lift)
    predictor = written_predictor(tmp_path)
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    assert_allclose(predictor.output(arrays, inputs), O, rtol=0, atol=CLOSE * max(1, abs(O).max()))
    assert_allclose(predictor.predict(arrays, inputs), prediction, rtol=0, atol=CLOSE * max(1, abs(O).max()))
    assert_allclose(predictor.output(arrays, inputs[1:2]), O[1:2], rtol=0, atol=CLOSE * max(1, abs(O).max()))
    assert abs(O).max() > 1e-3 and np.ptp(O) > 1e-3
    COMM_WORLD.barrier()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["network.npz", "predict.py"]


def test_an_exported_network_predicts_where_nothing_but_numpy_is(tmp_path):
    """There the package can be imported too, and says what else its names need."""
    net, head, lift = made("channels")
    export(net, head, tmp_path / "network.npz", lift)
    inputs, O, _ = computed(net, head, lift)
    np.save(tmp_path / "inputs.npy", inputs)
    script = """
import sys
for name in ("firedrake", "petsc4py", "slepc4py", "mpi4py", "pyadjoint", "scipy", "sympy", "sklearn", "matplotlib", "h5py"):
    sys.modules[name] = None
import numpy as np, fem_resnet, predict
np.save("output.npy", predict.output(dict(np.load("network.npz")), np.load("inputs.npy")))
try:
    fem_resnet.LabelSpace
except ModuleNotFoundError as error:
    print(error)
"""
    environment = without_mpi() | {"PYTHONPATH": str(Path(fem_resnet.__file__).parents[1])}
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert_allclose(np.load(tmp_path / "output.npy"), O, rtol=0, atol=CLOSE * max(1, abs(O).max()))
    assert told.startswith("LabelSpace needs the package firedrake, which is not installed; "), told


def test_every_built_in_activation_is_exported():
    assert set(ACTIVATIONS) == set(KERNELS) <= set(NETWORKS)


def test_coordinates_say_which_node_is_which(tmp_path):
    """Values that a user computes from the coordinates in the file are those of the batch."""
    net, head, lift = made("channels")
    export(net, head, tmp_path / "network.npz", lift)
    arrays = np.load(tmp_path / "network.npz")
    x = arrays["coordinates"]
    given = np.concatenate([[x[:, 0] ** 2], [x[:, 1]], [x[:, 0] * x[:, 1]]]).reshape(1, -1)
    places = lift.fields.one.coordinates
    fields = np.concatenate([places[:, 0] ** 2, places[:, 1], places[:, 0] * places[:, 1]])[:, None]
    O = row_a_sample(head.Y, head(net(lift(lift.fields.batch(fields)))))
    assert_allclose(written_predictor(tmp_path).output(dict(arrays), given), O, rtol=0, atol=CLOSE)


REFUSED = {
    "implicit": ({"ts_type": "cn"}, "^net: expected an explicit Runge-Kutta method with fixed steps, got 'cn'. Implicit"),
    "adapted": (
        {"ts_type": "rk", "ts_rk_type": "3bs", "ts_adapt_type": "basic"}, "^export: it does not take adapted time steps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_methods_without_a_finite_number_of_sigma_are_refused(case, tmp_path):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        export(network(solver_parameters=options), None, tmp_path / "network.npz")
    assert not list(tmp_path.iterdir())


@on_ranks
def test_what_cannot_be_exported_is_refused_by_name(tmp_path):
    net, head, lift = made("channels")
    other = made("gradient flow")[0]
    with pytest.raises(ValueError, match="^path: expected .*'.npz'"):
        export(net, head, tmp_path / "network.h5", lift)
    with pytest.raises(ValueError, match="^head: expected one on the network's label space"):
        export(other, head, tmp_path / "network.npz")
    with pytest.raises(ValueError, match="^lift: expected one on the network's label space"):
        export(other, None, tmp_path / "network.npz", lift)
    with pytest.raises(FileNotFoundError, match="^path: the folder .* does not exist"):
        export(net, head, tmp_path / "no" / "network.npz", lift)
    own = dataclasses.replace(ACTIVATIONS["tanh"], kernels=(np.tanh,) * 4)
    with pytest.raises(ValueError, match="^net: expected an activation with formulas, tanh has kernels of its own"):
        export(other.replace(activation=own), None, tmp_path / "network.npz")
    if importlib.util.find_spec("onnx") is None:
        with pytest.raises(ModuleNotFoundError, match=r"^path: the package onnx is missing.*fem_resnet\[onnx\]"):
            export(net, head, tmp_path / "network.onnx", lift)
    assert not list(tmp_path.iterdir())


def test_the_last_file_stays_where_a_new_one_cannot_be_written(tmp_path):
    net, head, _ = made("no layers")
    export(net, head, tmp_path / "network.npz")
    before = (tmp_path / "network.npz").read_bytes()
    with pytest.raises(ValueError, match="^net: "):
        export(net.replace(layers=1, solver_parameters={"ts_type": "cn"}), None, tmp_path / "network.npz")
    assert (tmp_path / "network.npz").read_bytes() == before


# -- PyTorch and ONNX, in an environment without Firedrake -------------------------------------------------------------

#: Those whose gradients are compared: all kinds of parameters.
WITH_GRADIENTS = (
    "rk 5dp", "bases of layers", "learned factors, times", "shared in time", "gradient flow", "channels",
    "channels, values at nodes, gradient flow", "symmetric kernel and head", "softplus", "elu", "SymPy", "no layers",
)  # fmt: skip


@cache
def differentiated(name):
    """J of a problem, its loss and targets; and its functionals in all that it learns, by parameter and number."""
    net, head, lift = made(name)
    given = batch(net, lift)
    if head is not None and head.classes and head.prediction.name == "softmax":
        loss, targets = cross_entropy, [0, 2, 1]
    else:
        if head is not None:  # the half square of O, not of h(O)
            identity = Head(head.psi, head.onto, "identity", symmetries=head.kept or ())
            for ours, theirs in zip(head.parameters, identity.parameters):
                theirs.set(0, ours.get(0))
            head = identity
        Y = net.Y if head is None else head.Y
        loss, targets = least_squares, Y.batch(smooth(Y, 3, seed=9))
    problem = LearningProblem(
        net, head, loss, None, Batch(given, targets), lift=lift, learn="both" if lift is None else "parameters"
    )
    J = problem.reduced_functional()
    value = float(J(problem.functions))
    slots = [(parameter, k) for parameter in problem.parameters for k in range(len(parameter.functions))]
    by = {(p.name, k): (p.space_bases[k], p.space_bases[k].read(d)) for (p, k), d in zip(slots, Enlist(J.derivative()))}
    there = targets if loss is cross_entropy else row_a_sample(Y, targets)
    return {"value": value, "loss": loss.name, "targets": there}, by


SCRIPT = Path(__file__).with_name("read_exports.py")


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """All networks, exported here and read there by one process: what each gave, by the names of the networks."""
    torch_beside.python()
    folder = tmp_path_factory.mktemp("exports")
    for number, name in enumerate(NETWORKS):
        net, head, lift = made(name)
        export(net, head, folder / f"{number}.npz", lift)
        inputs, O, prediction = computed(net, head, lift)
        reference = {"inputs": inputs, "output": O, "prediction": prediction}
        if name in WITH_GRADIENTS:
            reference |= differentiated(name)[0]
        np.savez(folder / f"{number} reference.npz", **reference)
    told = json.loads(torch_beside.run(SCRIPT, folder).splitlines()[-1])
    return {name: (told[str(number)], folder / f"{number} gradients.npz") for number, name in enumerate(NETWORKS)}


@pytest.mark.parametrize("name", NETWORKS)
def test_torch_and_onnx_give_the_same_outputs(name, read):
    errors, _ = read[name]
    assert errors["torch"] < 1e-12
    if name == "SymPy, erf":
        assert errors["onnx double"].startswith("net: expected an activation without erf in double precision")
    else:
        assert errors["onnx double"] < 1e-12
    assert errors["onnx single"] < 2e-6 and errors["torch single"] < 2e-6


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_torch_gives_the_same_gradients(name, read):
    """Of what the file holds whole: bases that are learned are buffers there."""
    expected, by = differentiated(name)
    theirs, numbers = np.load(read[name][1]), node_numbers(made(name)[0].Y)
    assert abs(theirs["value"] - expected["value"]) < 1e-12 * max(1, abs(expected["value"]))
    compared = set()
    for (kind, k), (basis, ours) in by.items():
        if kind in ("phi", "psi"):
            continue
        if kind == "initial":
            there = theirs["inputs"].T[numbers]
        elif kind == "layer_times":
            there = theirs["times"][1:]
        elif kind in ("W", "mu", "V"):
            there = basis.of_whole(theirs[kind])
        elif kind == "bias":
            there = theirs[f"a_{k}"][numbers] if isinstance(basis, NodalValues) else theirs[f"a_{k}"]
        else:
            there = theirs[f"beta_{k}"]
            if kind == "kernel_controls":  # beta is linear in the numbers that it is made of
                there = (made(name)[0].settings.kernel.among.elements.T @ there.ravel()).reshape(ours.shape)
        assert_allclose(there, ours, rtol=0, atol=1e-12 * max(1, abs(ours).max()), err_msg=f"{kind} {k}")
        compared.add(kind)
    assert {"bias", "initial"} <= compared or "V" in compared or name == "no layers"
