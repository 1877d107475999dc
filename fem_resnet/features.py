"""What each algorithm takes of a network and of a learning problem, and the one place that refuses the rest.

A feature is what makes a network or a problem more than (2.8) with the loss (2.10): a running cost, an ensemble, learned
times, the gradient flow in place of (2.8). An algorithm declares the features that it takes,

    @supports("head", "regulariser", "many_samples")
    def train_so(problem, ...):

and is refused all others by name, before it does anything. A feature that is new is refused everywhere until an algorithm
declares it. `TOOLS` is the table of all declarations; a test runs every row against every feature.

The same decorator is the door of these algorithms: it looks at the argument that carries the features, and so the
communicator, first, and then compares all others between the ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from fem_resnet.arguments import instance
from fem_resnet.ranks import same

__all__ = ["FEATURES", "HELD", "STEPPED", "TOOLS", "Feature", "features_of", "refuse_unsupported", "supports"]


@dataclass(frozen=True)
class Feature:
    """Something that a network or a problem may have.

    Attributes
    ----------
    what
        Its name in messages.
    remedy
        How to make the same object without it.
    of
        "net" or "problem": what `present` looks at.
    present
        Whether an object has it.
    """

    what: str
    remedy: str
    of: str
    present: Callable[[Any], bool]


def _learns(*kinds: str) -> Callable[[Any], bool]:
    return lambda problem: problem.learn in kinds


#: All features, by the names that `supports` takes.
FEATURES: dict[str, Feature] = {
    "no_layers": Feature("a network without layers", "give it a layer", "net", lambda net: net.layers == 0),
    "gradient_flow": Feature(
        "the gradient flow f_t = B^T sigma(a - B f)",
        "make the network without gradient_flow, as (2.8)",
        "net",
        lambda net: net.gradient_flow,
    ),
    "learned_factors": Feature(
        "learned factors of the kernel", "make the network without learn_factors", "net", lambda net: bool(net.factors)
    ),
    "learned_times": Feature(
        "learned layer times", "make the network without learn_times", "net", lambda net: net.layer_times is not None
    ),
    "stable_kernel": Feature(
        "a kernel made of other controls",
        "make the network without stable_kernel",
        "net",
        lambda net: net.stable_kernel is not None,
    ),
    "nodal_bias": Feature(
        "a bias with a value at every node", "give the bias a basis", "net", lambda net: None in net.bases["bias"]
    ),
    "bases_by_layer": Feature(
        "bases of each layer",
        "give one basis for all layers",
        "net",
        lambda net: any(len(bases) > 1 for bases in net.bases.values()),
    ),
    "linear_in_time": Feature(
        "parameters linear in time on a layer",
        'take "layers" for bias_in_time and kernel_in_time',
        "net",
        lambda net: "linear" in (net.bias.time_basis.description, net.kernel.time_basis.description),
    ),
    "shared_in_time": Feature(
        "parameters that layers share",
        'take "layers" for bias_in_time and kernel_in_time',
        "net",
        lambda net: any(p.time_basis.description not in ("layers", "linear") for p in (net.bias, net.kernel)),
    ),
    "adapted_steps": Feature(
        "adapted time steps",
        'leave "ts_adapt_type" out of solver_parameters',
        "net",
        lambda net: net.solver_parameters.get("ts_adapt_type", "none") != "none",
    ),
    "discrete_gradient": Feature(
        "steps by the discrete gradient",
        'take another "ts_type"',
        "net",
        lambda net: net.solver_parameters["ts_type"] == "discrete_gradient",
    ),
    "single_precision": Feature(
        "single precision", 'make the network with precision="double"', "net", lambda net: net.precision == "single"
    ),
    "head": Feature("a head", "make the problem with head=None", "problem", lambda problem: problem.head is not None),
    "regulariser": Feature(
        "a regulariser", "make the problem with regulariser=None", "problem", lambda problem: problem.regulariser is not None
    ),
    "running": Feature(
        "a running cost", "make the problem without running", "problem", lambda problem: problem.running is not None
    ),
    "running_of_controls": Feature(
        "a running cost of the controls",
        "give one of the state alone",
        "problem",
        lambda problem: problem.running is not None and not problem.running.of_state_alone,
    ),
    "ensemble": Feature(
        "an ensemble", "put all samples on one communicator", "problem", lambda problem: problem.ensemble is not None
    ),
    "derivatives": Feature(
        "derivatives of the target",
        "make the problem without derivatives",
        "problem",
        lambda problem: problem.derivatives is not None,
    ),
    "observed_times": Feature(
        "observations before T",
        "make the problem without observations",
        "problem",
        lambda problem: problem.observations is not None,
    ),
    "checkpoints": Feature(
        "a schedule of checkpoints",
        "make the problem without checkpoints",
        "problem",
        lambda problem: problem.checkpoints is not None,
    ),
    "learned_initial": Feature(
        "an initial state that is learned alone", 'make the problem with learn="parameters"', "problem", _learns("initial")
    ),
    "learned_both": Feature(
        "an initial state that is learned too", 'make the problem with learn="parameters"', "problem", _learns("both")
    ),
    "many_samples": Feature(
        "more than one sample", "give a batch of one sample", "problem", lambda problem: problem.batch.samples > 1
    ),
    "weights": Feature(
        "weights of the samples",
        "make the batch without weights",
        "problem",
        lambda problem: problem.batch.weights is not None,
    ),
}

#: How parameters are held in space and in time: what asks layers for their coefficients (`layer_inputs`) takes them all.
HELD = (
    "learned_factors", "learned_times", "stable_kernel", "nodal_bias", "bases_by_layer", "linear_in_time", "shared_in_time",
)  # fmt: skip

#: How a network is stepped: what steps by its own layers, or not at all, takes them all.
STEPPED = ("adapted_steps", "discrete_gradient", "single_precision")

#: What each algorithm takes: its name, and the features that it declares.
TOOLS: dict[str, frozenset[str]] = {}


def _problem_of(subject):
    """The LearningProblem that an object is, or was made of; None if there is none."""
    candidates = (subject, getattr(subject, "problem", None))
    return next((each for each in candidates if hasattr(each, "batch") and hasattr(each, "net")), None)


def _net_of(subject):
    """The network that an object is, or was made of or for."""
    problem = _problem_of(subject)
    return getattr(subject if problem is None else problem, "net", subject)


def features_of(subject) -> list[str]:
    """Which features an object has, by name.

    Of a LearningProblem, and of what was made of one and has it as `problem`, all; of a ResidualNetwork, and of a run, a
    trajectory and whatever else has a `net`, those of the network; of anything else none.
    """
    net = _net_of(subject)
    objects = {"net": net if hasattr(net, "layer_inputs") else None, "problem": _problem_of(subject)}
    return [name for name, f in FEATURES.items() if objects[f.of] is not None and f.present(objects[f.of])]


def refuse_unsupported(tool: str, subject, instead: str | None = None) -> None:
    """Raise ValueError where `subject` has a feature that the tool does not declare; the message names both."""
    for name in features_of(subject):
        if name not in TOOLS[tool]:
            feature = FEATURES[name]
            otherwise = f", or {instead}" if instead else ""
            raise ValueError(f"{tool}: it does not take {feature.what}; {feature.remedy}{otherwise}")


def supports(
    *names: str,
    tool: str | None = None,
    when: Callable[..., bool] | None = None,
    instead: str | None = None,
    parted: tuple[str, ...] = (),
):
    """Decorate a function or method with what it takes of the problems, networks and runs among its arguments.

    Of a function, a constructor and a class method the first argument must be of the class that its annotation says, and on its
    communicator all others are compared (`ranks.same`). For another method the object that it belongs to has the features too,
    and nothing is compared; nor is anything where the first argument is no object with features, as in ``save(path, net)``.

    Parameters
    ----------
    names
        Features, keys of `FEATURES`.
    tool
        What messages and `TOOLS` call it: the function's name if left out, with that of its class for a method, and that of
        the class alone for ``__init__``.
    when
        Whether the declaration holds for a call's arguments: a tool that takes less with some of them has a declaration
        for these too, of another name.
    instead
        What else a message is to say may be done.
    parted
        Arguments of which each rank has its own part: they are not compared.

    Raises
    ------
    KeyError
        If a name is none of `FEATURES`.
    """
    unknown = set(names) - set(FEATURES)
    if unknown:
        raise KeyError(f"supports: features {sorted(unknown)} are unknown; those known are {sorted(FEATURES)}")

    def decorate(function):
        name = tool or function.__qualname__.removesuffix(".__init__")
        TOOLS[name] = frozenset(names)
        door = getattr(function, "_door", None) or _Door(function, parted)

        @wraps(function)
        def checked(*args, **kwargs):
            # Of several declarations the outermost looks at the arguments, before any of them asks for features.
            if checked._door is not None:
                checked._door.check(args, kwargs)
            if when is None or when(*args, **kwargs):
                for subject in (*args, *kwargs.values()):
                    refuse_unsupported(name, subject, instead)
            return function(*args, **kwargs)

        function._door, checked._door = None, door
        return checked

    return decorate


class _Door:
    """What a decorated function asks of its arguments."""

    def __init__(self, function: Callable, parted: tuple[str, ...]):
        self._signature, self._first = inspect.signature(function), None
        parameters = self._signature.parameters
        # Of a Function each rank has its part, and so it has of node values given in its place, which the tool refuses.
        self._parted = {*parted, *(name for name, one in parameters.items() if one.annotation == "fd.Function")}
        names = list(parameters)
        if names[0] == "self" and function.__name__ != "__init__":
            return
        first = names[names[0] in ("self", "cls")]
        kind = inspect.unwrap(function).__globals__.get(parameters[first].annotation)
        if isinstance(kind, type):
            self._first, self._kind = first, kind

    def check(self, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._first is None:
            return
        given = self._signature.bind(*args, **kwargs)
        given.apply_defaults()
        first = instance(self._first, given.arguments.pop(self._first), self._kind)
        compared = {name: value for name, value in given.arguments.items() if name not in ("self", "cls", *self._parted)}
        if "monitor" in compared:  # one that prints on rank 0 may be another function there
            compared["monitor"] = callable(compared["monitor"])
        same(_net_of(first).Y.comm, **compared)
