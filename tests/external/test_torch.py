"""Networks in PyTorch: derivatives by PyTorch's own checks, training beside other modules, the law of ranks."""

import numpy as np
import pytest
from doors import WRONG, Door, fault
from firedrake import COMM_WORLD
from helpers import laplace, network, smooth

from fem_resnet import Head

torch = pytest.importorskip("torch")
from fem_resnet.external import torch as inside  # noqa: E402

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
    return torch.from_numpy(smooth(net.Y, samples).T.copy())


def of_replicated(module, x, net):
    """F as a function of replicated tensors alone, to a replicated one: what `gradcheck` can perturb on all ranks alike."""
    comm, names = net.Y.comm, [name for name, _ in module.named_parameters()]
    modes = torch.from_numpy(laplace("disk", "CG1", 3).values.copy())
    looks = torch.from_numpy(smooth(net.Y, 2, seed=8) * net.Y.weights[:, None])

    def F(z, *coefficients):
        moved = x + inside.to_nodes(z, comm) @ modes.T
        out = torch.func.functional_call(module, dict(zip(names, coefficients)), (moved,))
        return out if out.shape[1] == 3 else inside.sum_over_ranks(out @ looks, comm)

    z = torch.zeros(len(x), 3, dtype=torch.float64, requires_grad=True)
    return F, (z, *(p.detach().clone().requires_grad_() for p in module.parameters()))


@on_ranks
@pytest.mark.parametrize("head", ["f(T)", "scores", "a function"])
def test_pytorch_checks_first_and_second_derivatives(head):
    net, head = net_and_head(head)
    F, at = of_replicated(inside.Module(net, head), inputs(net), net)
    options = {"fast_mode": True, "check_undefined_grad": COMM_WORLD.size == 1}
    assert torch.autograd.gradcheck(F, at, check_forward_ad=True, **options)
    # Forward over reverse and reverse over reverse.
    assert torch.autograd.gradgradcheck(F, at, check_fwd_over_rev=True, check_rev_over_rev=True, **options)


def test_every_entry_of_first_and_second_derivatives_on_one_rank():
    """Without `fast_mode`, also in f_I, by nodes."""
    net, head = net_and_head()
    module = inside.Module(net, head)
    x = inputs(net).requires_grad_()
    assert torch.autograd.gradcheck(module, (x,))
    names = ["kernel_0", "W_0"]

    def F(x, *some):
        return torch.func.functional_call(module, dict(zip(names, some)), (x,)).sum(0)

    some = [getattr(module, name).detach().clone().requires_grad_() for name in names]
    x = x.detach()[:1].requires_grad_()
    assert torch.autograd.gradgradcheck(F, (x, *some))


@on_ranks
def test_transforms_of_functions_agree_with_each_other():
    net, head = net_and_head()
    F, (z, *coefficients) = of_replicated(inside.Module(net, head), inputs(net, 1), net)
    z, coefficients = z.detach(), [c.detach() for c in coefficients]

    def J(z):
        return torch.nn.functional.cross_entropy(F(z, *coefficients), torch.tensor([1]))

    v = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64)
    value, slope = torch.func.jvp(J, (z,), (v,))
    assert float(slope) == pytest.approx(float((torch.func.grad(J)(z) * v).sum()), rel=1e-10)
    hessian = torch.func.hessian(J)(z).reshape(3, 3)  # forward over reverse, with vmap
    torch.testing.assert_close(hessian, torch.func.jacrev(torch.func.grad(J))(z).reshape(3, 3), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-9, atol=1e-12)
    by_forward = torch.func.grad(lambda z: torch.func.jvp(J, (z,), (v,))[1])(z)  # reverse over forward
    torch.testing.assert_close(by_forward.ravel(), hessian @ v.ravel(), rtol=1e-9, atol=1e-12)
    with pytest.raises(NotImplementedError, match="derivatives up to the second"):
        torch.func.grad(lambda z: torch.func.grad(lambda z: (torch.func.grad(J)(z) * v).sum())(z).sum())(z)


@on_ranks
def test_any_number_of_samples_and_a_point_left_in_between():
    """A graph keeps its point: `backward` gives the gradient there, whatever was evaluated since."""
    net, head = net_and_head()
    module = inside.Module(net, head)
    first, second = inputs(net, 3).requires_grad_(), inputs(net, 3).mul(-2).requires_grad_()
    expected = torch.autograd.grad(module(first).square().sum(), first)[0]
    one, _, _ = module(first), module(second), module(inputs(net, 7))
    assert module(inputs(net, 1)).shape == (1, 3)
    torch.testing.assert_close(torch.autograd.grad(one.square().sum(), first)[0], expected, rtol=0, atol=0)


@on_ranks
def test_it_is_the_network_and_gives_back_what_it_has_learned():
    net, head = net_and_head()
    module = inside.Module(net, head)
    f = net(net.Y.batch(smooth(net.Y)))
    np.testing.assert_allclose(module(inputs(net, 3)).detach().numpy(), head.scores(f), rtol=1e-12, atol=1e-13)
    before = net.kernel.get(0)
    with torch.no_grad():
        module.kernel_0.mul_(2)
    assert np.array_equal(net.kernel.get(0), before)
    module.give()
    assert np.array_equal(net.kernel.get(0), 2 * before)


def trained(alone):
    """J in 5 steps of Adam, and what is learned: a replicated layer on each node, the network, another layer behind it."""
    torch.manual_seed(0)
    net, head = net_and_head("a function", alone)
    Y, comm, module = net.Y, net.Y.comm, inside.Module(net, head)
    lift, last = torch.nn.Linear(2, 1, dtype=torch.float64), torch.nn.Linear(2, 3, dtype=torch.float64)
    raw = torch.from_numpy(np.stack([smooth(Y, 6).T, smooth(Y, 6, seed=1).T ** 2], axis=-1))
    looks = torch.from_numpy(smooth(Y, 2, seed=8) * Y.weights[:, None])
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    everything = [*lift.parameters(), *module.parameters(), *last.parameters()]
    optimiser, values = torch.optim.Adam(everything, lr=0.03), []
    for _ in range(5):
        optimiser.zero_grad()
        weight, bias = (inside.to_nodes(p, comm) for p in lift.parameters())
        x = torch.nn.functional.linear(raw, weight, bias)[..., 0]
        J = torch.nn.functional.cross_entropy(last(inside.sum_over_ranks(module(x) @ looks, comm)), labels)
        J.backward()
        optimiser.step()
        values.append(J.item())
    return values, [p.detach().numpy() for p in everything]


@on_ranks
def test_training_by_torch_beside_other_modules_is_that_on_one_rank():
    values, learned = trained(alone=False)
    assert values[-1] < 0.9 * values[0]
    expected, learned_alone = trained(alone=True)
    # Five steps of Adam amplify round-off little.
    np.testing.assert_allclose(values, expected, rtol=1e-8)
    for one, other in zip(learned, learned_alone):
        np.testing.assert_allclose(one, other, atol=1e-6)
    everywhere = COMM_WORLD.allgather(learned)
    assert all(np.array_equal(one, other) for ranks in everywhere for one, other in zip(ranks, everywhere[0]))


@on_ranks
def test_what_does_not_fit_is_refused_on_all_ranks():
    net, head = net_and_head()
    module, x = inside.Module(net, head), inputs(net)
    last = COMM_WORLD.rank == COMM_WORLD.size - 1
    with pytest.raises(TypeError, match=r"^x: expected a tensor of float64 on the CPU, got torch.float32"):
        module(x.float() if last else x)
    with pytest.raises(TypeError, match=r"^x: expected a Tensor, got ndarray"):
        module(x.numpy() if last else x)
    with pytest.raises(ValueError, match=r"^x: expected shape \(samples, nodes\) = \(at least 1, \d+\), got"):
        module(x[:, :-1] if last else x)
    with pytest.raises(TypeError, match=r"^net: expected a ResidualNetwork"):
        inside.Module(head)
    with pytest.raises(TypeError, match=r"^head: expected a Head or None"):
        inside.Module(net, net)
    with pytest.raises(ValueError, match=r"^head: expected a head that reads states on"):
        inside.Module(net, Head(laplace("interval", "CG1", 3), 2))
    with pytest.raises(TypeError, match=r"^comm: expected a Comm"):
        inside.sum_over_ranks(x, None)
    if COMM_WORLD.size > 1:
        with pytest.raises(ValueError, match=r"^samples: all ranks must give the same"):
            module(x[:1] if last else x)


@on_ranks
def test_a_wrong_argument_is_refused_by_its_name():
    net, head = net_and_head()
    module, comm, x = inside.Module(net, head), net.Y.comm, inputs(net)
    doors = [
        Door(inside.Module, lambda: {"net": net, "head": head}, takes={"head": {"None"}}),
        Door(inside.Module.forward, lambda: {"self": module, "x": x}),
        *(Door(call, lambda: {"x": x, "comm": comm}) for call in (inside.sum_over_ranks, inside.to_nodes)),
    ]
    each = ((door, name, kind) for door in doors for name in door.arguments() for kind in WRONG)
    amiss = [(door.call.__name__, name, kind, found) for door, name, kind in each if (found := fault(door, {name: kind}))]
    assert amiss == []
