"""Networks in JAX: derivatives by JAX's own checks, under `jit` and `vmap`, beside other functions, the law of ranks."""

import numpy as np
import pytest
from doors import WRONG, Door, fault
from firedrake import COMM_WORLD
from helpers import laplace, network, smooth

from fem_resnet import Head

jax = pytest.importorskip("jax")
jax.config.update("jax_enable_x64", True)
from jax import numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

from fem_resnet.external import jax as inside  # noqa: E402

on_ranks = pytest.mark.parallel([1, 2])


def net_and_head(head="scores", alone=False):
    in_time = {"kernel_in_time": "shared", "bias_in_time": "shared"}  # few parameters: checks take them one by one
    net = network(size=0.5, basis_for_bias=True, alone=alone, **in_time)
    psi = laplace("disk", "CG1", 6, alone)
    head = {"f(T)": None, "scores": Head(psi, 3), "a function": Head(psi, psi, "identity")}[head]
    if head is not None:
        head.start(gain=2.0)
    return net, head


def inputs(net, samples=2):
    return jnp.asarray(smooth(net.Y, samples).T)


def of_replicated(model, x, net):
    """F as a function of replicated arrays alone, to a replicated one: what `check_grads` can perturb on all ranks alike."""
    comm, modes = net.Y.comm, laplace("disk", "CG1", 3).values
    looks = smooth(net.Y, 2, seed=8) * net.Y.weights[:, None]

    def F(z, coefficients):
        out = model(coefficients, x + inside.to_nodes(z, comm) @ modes.T)
        return out if out.shape[1] == 3 else inside.sum_over_ranks(out @ looks, comm)

    return F, (jnp.zeros((len(x), 3)), model.coefficients())


@on_ranks
@pytest.mark.parametrize("head", ["f(T)", "scores", "a function"])
def test_jax_checks_first_and_second_derivatives(head):
    net, head = net_and_head(head)
    F, at = of_replicated(inside.Model(net, head), inputs(net), net)
    np.random.seed(0)  # noqa: NPY002 - check_grads takes its directions from here
    check_grads(F, at, order=1, modes=["fwd", "rev"], rtol=1e-6, atol=1e-6)
    check_grads(F, at, order=2, modes=["rev"], rtol=1e-5, atol=1e-5)


@on_ranks
def test_derivatives_of_second_order_agree_with_each_other_and_under_jit():
    net, head = net_and_head()
    F, (z, coefficients) = of_replicated(inside.Model(net, head), inputs(net, 1), net)
    z = z + 0.1

    def J(z):
        return -jax.nn.log_softmax(F(z, coefficients))[0, 1]

    v = jnp.asarray([[0.3, -0.2, 0.5]])
    value, slope = jax.jvp(J, (z,), (v,))
    assert slope == pytest.approx(float(jnp.sum(jax.grad(J)(z) * v)), rel=1e-10)
    np.testing.assert_allclose(jax.jit(jax.grad(J))(z), jax.grad(J)(z), rtol=1e-12)
    hessian = jax.hessian(J)(z).reshape(3, 3)  # forward over reverse, with vmap
    np.testing.assert_allclose(hessian, jax.jacrev(jax.grad(J))(z).reshape(3, 3), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-9, atol=1e-12)
    by_forward = jax.grad(lambda z: jax.jvp(J, (z,), (v,))[1])(z)  # reverse over forward
    np.testing.assert_allclose(by_forward.ravel(), hessian @ v.ravel(), rtol=1e-9, atol=1e-12)
    with pytest.raises(Exception, match="no third derivative in JAX"):
        jax.grad(lambda z: jnp.sum(jax.grad(lambda z: jnp.sum(jax.grad(J)(z) * v))(z)))(z)


def test_forward_over_forward_is_refused():
    net, _ = net_and_head()
    model = inside.Model(net)
    x, coefficients = inputs(net), model.coefficients()

    def along(x):
        return jax.jvp(lambda x: model(coefficients, x), (x,), (x,))[1]

    with pytest.raises(Exception, match="no derivative forward over forward in JAX"):
        jax.jvp(along, (x,), (x,))


@on_ranks
def test_it_is_the_network_for_any_number_of_samples_and_gives_back_what_it_has_learned():
    net, head = net_and_head()
    model = inside.Model(net, head)
    coefficients = model.coefficients()
    for samples in (3, 1, 5):
        scores = head.scores(net(net.Y.batch(smooth(net.Y, samples))))
        np.testing.assert_allclose(model(coefficients, inputs(net, samples)), scores, rtol=1e-12, atol=1e-13)
    one_by_one = jax.vmap(lambda x: model(coefficients, x[None])[0])(inputs(net, 5))
    np.testing.assert_allclose(one_by_one, scores, rtol=1e-12, atol=1e-13)
    before = net.kernel.get(0)
    model.give(coefficients | {"kernel_0": 2 * coefficients["kernel_0"]})
    assert np.array_equal(net.kernel.get(0), 2 * before)


def trained(alone):
    """J in 5 steps down the gradient, under jit, and what is learned: a replicated layer on each node, and the network."""
    net, head = net_and_head("a function", alone)
    Y, comm, model = net.Y, net.Y.comm, inside.Model(net, head)
    raw = jnp.asarray(np.stack([smooth(Y, 6).T, smooth(Y, 6, seed=1).T ** 2], axis=-1))
    looks = jnp.asarray(smooth(Y, 3, seed=8) * Y.weights[:, None])
    labels = jnp.asarray([0, 1, 2, 0, 1, 2])
    weights = {"lift": jnp.asarray([0.8, -0.4]), "net": model.coefficients()}

    @jax.jit
    @jax.value_and_grad
    def J(weights):
        x = raw @ inside.to_nodes(weights["lift"], comm)
        scores = 5 * inside.sum_over_ranks(model(weights["net"], x) @ looks, comm)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(scores), labels[:, None], axis=1))

    values = []
    for _ in range(5):
        value, gradient = J(weights)
        weights = jax.tree.map(lambda w, d: w - 0.1 * d, weights, gradient)
        values.append(float(value))
    return values, [np.asarray(w) for w in jax.tree.leaves(weights)]


@on_ranks
def test_training_beside_other_functions_is_that_on_one_rank():
    values, learned = trained(alone=False)
    assert values[-1] < 0.95 * values[0]
    expected, learned_alone = trained(alone=True)
    np.testing.assert_allclose(values, expected, rtol=1e-9)
    for one, other in zip(learned, learned_alone):
        np.testing.assert_allclose(one, other, atol=1e-8)
    everywhere = COMM_WORLD.allgather(learned)
    assert all(np.array_equal(one, other) for ranks in everywhere for one, other in zip(ranks, everywhere[0]))


@on_ranks
def test_what_does_not_fit_is_refused_on_all_ranks():
    net, head = net_and_head()
    model, x = inside.Model(net, head), inputs(net)
    coefficients = model.coefficients()
    last = COMM_WORLD.rank == COMM_WORLD.size - 1
    with pytest.raises(TypeError, match=r"^x: expected float64, got float32"):
        model(coefficients, x.astype("float32") if last else x)
    with pytest.raises(ValueError, match=r"^x: expected shape \(samples, \d+\), got"):
        model(coefficients, x[:, :-1] if last else x)
    with pytest.raises(ValueError, match=r"^kernel_0: expected shape \(6, 4\), got \(3,\)"):
        model(coefficients | {"kernel_0": jnp.ones(3)} if last else coefficients, x)
    with pytest.raises(ValueError, match=r"^coefficients: expected the names bias_0, .*, got kernel_0"):
        model({"kernel_0": coefficients["kernel_0"]} if last else coefficients, x)
    with pytest.raises(TypeError, match=r"^coefficients: expected a Mapping, got list"):
        model.give([])
    with pytest.raises(TypeError, match=r"^net: expected a ResidualNetwork"):
        inside.Model(head)
    with pytest.raises(TypeError, match=r"^comm: expected a Comm"):
        inside.sum_over_ranks(x, None)
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"^jax: expected 64 bits a number, got 32; call"):
        inside.Model(net)
    if COMM_WORLD.size > 1:
        with pytest.raises(ValueError, match=r"^samples: all ranks must give the same"):
            model(coefficients, x[:1] if last else x)


def test_a_wrong_argument_is_refused_by_its_name():
    net, head = net_and_head()
    model, comm, x = inside.Model(net, head), net.Y.comm, inputs(net)
    numbers = {"NaN", "infinity", "a fraction", "an array of NaN", "an array of another shape", "an empty list"}
    doors = [
        Door(inside.Model, lambda: {"net": net, "head": head}, takes={"head": {"None"}}),
        Door(inside.Model.__call__, lambda: {"self": model, "coefficients": model.coefficients(), "x": x}),
        Door(inside.Model.give, lambda: {"self": model, "coefficients": model.coefficients()}),
        *(
            Door(call, lambda: {"x": x, "comm": comm}, takes={"x": numbers}, through=("x",))
            for call in (inside.sum_over_ranks, inside.to_nodes)
        ),
    ]
    each = ((door, name, kind) for door in doors for name in door.arguments() for kind in WRONG)
    amiss = [(door.call.__name__, name, kind, found) for door, name, kind in each if (found := fault(door, {name: kind}))]
    assert amiss == []
