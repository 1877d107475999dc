"""The local feedback at every layer interface: controls that follow the state, section 4.3, Step 2.

By the dynamic programming principle the rest of an optimal trajectory is optimal for the rest of the problem,

    F(v, t_l) = min over the controls of layers l, l + 1, ..  of their cost, starting at f(t_l) = v.

So `local_feedback` holds at each t_l for the remaining layers, around f(t_l) of the one trajectory that was trained, and
D_v F(., t_l) = r(t_l).

In a closed loop each layer takes the controls that the feedback gives for the state at the beginning of this layer. (Step 2
(ii) of the paper prints the state at which the whole trajectory began.) For a perturbed input alone both are optimal to the
same order. For a disturbance on the way only the closed loop answers, by the controls of the remaining layers.
"""

from __future__ import annotations

from dataclasses import replace

import firedrake as fd
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import integer
from fem_resnet.features import REGULARISED, STEPPED, supports
from fem_resnet.fixed import OnMesh
from fem_resnet.hjb.local_feedback import LocalFeedback
from fem_resnet.learning.batch import Batch
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.learning.regulariser import Regulariser
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.ranks import same

__all__ = ["LocalClosedLoop"]

#: The names of regularisers that are sums over the layers.
_OF_LAYERS = {
    "tikhonov", "smooth_in_space", "smoothed_l1", "huber", "total_variation", "ufl_functional", "locality",
}  # fmt: skip


class LocalClosedLoop(OnMesh):
    """The local feedback at t_0, .., t_(L-1) along one optimal trajectory. Collective over the network's communicator.

    Parameters
    ----------
    problem
        As for `LocalFeedback`. Each layer has controls of its own (in_time="layers" of Bias and Kernel), and the
        regulariser is a sum over the layers, as all but `smooth_in_time` are. A learned head is chosen anew at each interface.
    **options
        The options of `LocalFeedback`.

    Attributes
    ----------
    feedbacks : list of LocalFeedback
        One for each interface l: F(., t_l), r(t_l) and the controls of all layers from l on, with the head's at the end.

    Raises
    ------
    TypeError, ValueError
        If layers share parameters or the regulariser couples them, and as for `LocalFeedback`.

    Examples
    --------
    >>> loop = LocalClosedLoop(problem)  # doctest: +SKIP
    >>> state = new_input  # doctest: +SKIP
    >>> for layer in range(problem.net.layers):  # doctest: +SKIP
    ...     controls, state = loop.step(layer, state)  # and a disturbance of the state, if there is one
    """

    @supports(
        "channels", "gradient_flow", "kernel_set", "nodal_bias", "bases_by_layer", *STEPPED, "head", *REGULARISED, "running",
        "running_of_controls", "many_samples", "weights", instead="take LocalFeedback, at t = 0",
    )  # fmt: skip
    def __init__(self, problem: LearningProblem, **options):
        _refuse_other_regularisers(problem.regulariser)
        net, batch = problem.net, problem.batch
        with stop_annotating():
            run = net.run(batch.inputs)
        self._layers = [_part(net, range(layer, layer + 1)) for layer in range(net.layers)]
        self.feedbacks = []
        for layer in range(net.layers):
            state = batch.inputs if layer == 0 else run.state(layer)
            rest = problem.replace(net=_part(net, range(layer, net.layers)), batch=Batch(state, batch.targets, batch.weights))
            self.feedbacks.append(LocalFeedback(rest, **options))

    def step(self, layer: int, state: fd.Function) -> tuple[list[fd.Function], fd.Function]:
        """Run one layer with the controls that the feedback gives for the state at its beginning.

        Parameters
        ----------
        layer
            l, from 0 to L - 1.
        state
            f(t_l), in the space of the problem's inputs.

        Returns
        -------
        controls
            Bias and kernel of this layer; for the last layer also W and mu of the head, if there is a head.
        state
            f(t_(l+1)).

        Raises
        ------
        TypeError, ValueError
            If there is no such layer, the state is in another space, or the layer differs between ranks.
        RuntimeError
            As for `LocalFeedback.change_of_controls`.
        """
        feedback = self.feedbacks[0]
        same(feedback.Y.comm, layer=layer)
        layer = integer("layer", layer, least=0, most=len(self._layers) - 1)
        feedback.check(state, "state")
        controls = self.feedbacks[layer](state)
        left = len(self._layers) - layer
        chosen = [controls[0], controls[left]]
        net = self._layers[layer]
        with stop_annotating():
            for parameter, control in zip(net.parameters, chosen):
                parameter.functions[0].assign(control)
            return chosen + (controls[2:] if left == 1 else []), net(state)

    def __call__(self, inputs: fd.Function) -> list[fd.Function]:
        """All controls that the closed loop takes from these inputs on, in the order of ``problem.functions``.

        Parameters
        ----------
        inputs
            v + w, in the space of the problem's inputs.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As for `step`.
        """
        self.feedbacks[0].check(inputs, "inputs")
        steps, state = [], inputs
        for layer in range(len(self._layers)):
            controls, state = self.step(layer, state)
            steps.append(controls)
        return [controls[0] for controls in steps] + [controls[1] for controls in steps] + steps[-1][2:]


def _part(net: ResidualNetwork, layers: range) -> ResidualNetwork:
    """The network of these layers alone, with their coefficients."""
    times = net.times[layers.start : layers.stop + 1]
    settings = net.settings

    def of(bases: tuple) -> tuple:
        return bases if len(bases) == 1 else bases[layers.start : layers.stop]

    part = net.replace(
        kernel=replace(settings.kernel, phi=of(settings.phi), psi=of(settings.psi)),
        bias=replace(settings.bias, basis=of(settings.bias_bases)),
        layers=replace(settings.layers, times=times - times[0]),
    )
    for ours, theirs in zip(part.parameters, net.parameters):
        for k, layer in enumerate(layers):
            ours.set(k, theirs.get(layer))
    return part


def _refuse_other_regularisers(regulariser: Regulariser | None) -> None:
    """Raise ValueError unless the regulariser is a sum over the layers, as far as its name tells."""
    if regulariser is None:
        return
    unnamed = len(regulariser.terms) - len(regulariser.names)
    for name in (*regulariser.names, *["one without a name"] * unnamed):
        if name not in _OF_LAYERS:
            raise ValueError(
                f"problem: expected regularisers that are sums over the layers, {', '.join(sorted(_OF_LAYERS))}; got {name}; "
                f"LocalFeedback takes any, at t = 0"
            )
