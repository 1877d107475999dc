"""Features of networks and learning problems, and the one place that refuses those that an algorithm does not take.

A feature is what makes a network or a problem more than (2.8) with the loss (2.10): a running cost, an ensemble, learned
times, the gradient flow in place of (2.8). An algorithm declares the features that it takes,

    @supports("head", "regulariser", "many_samples")
    def train_so(problem, ...):

and before it does anything, all other features are refused by name. A new feature is refused everywhere until an algorithm
declares it. `TOOLS` is the table of all declarations. A test runs every row against every feature.

The decorator also checks the arguments of these algorithms. It first checks the argument that has the features, and with
them the communicator; then it compares all other arguments between the ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from fem_resnet.arguments import instance
from fem_resnet.ranks import same

__all__ = ["FEATURES", "HELD", "REGULARISED", "STEPPED", "TOOLS", "Feature", "features_of", "refuse_unsupported", "supports"]


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
        Which object has it: "net" or "problem".
    present
        A function that says whether such an object has it.
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
    "channels": Feature(
        "channels of the label domain", "take a label domain without channels", "net", lambda net: net.Y.channels > 1
    ),
    "gradient_flow": Feature(
        "the gradient flow f_t = B^T sigma(a - B f)",
        "make the network without gradient_flow, as (2.8)",
        "net",
        lambda net: net.gradient_flow,
    ),
    "learned_factors": Feature(
        "learned factors of the kernel",
        "make the network of a Kernel without learn_factors",
        "net",
        lambda net: bool(net.factors),
    ),
    "learned_times": Feature(
        "learned layer times", "make the network of Layers without learn_times", "net", lambda net: net.layer_times is not None
    ),
    "kernel_set": Feature(
        "a kernel made of other controls",
        "make the network of a Kernel without `among`",
        "net",
        lambda net: net.settings.kernel.among is not None,
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
        'take in_time="layers" for its Bias and Kernel',
        "net",
        lambda net: "linear" in (net.bias.time_basis.description, net.kernel.time_basis.description),
    ),
    "shared_in_time": Feature(
        "parameters that layers share",
        'take in_time="layers" for its Bias and Kernel',
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
        "single precision", 'make the network with precision="double"', "net", lambda net: net.settings.precision == "single"
    ),
    "lift": Feature("a lift", "make the problem with lift=None", "problem", lambda problem: problem.lift is not None),
    "head": Feature("a head", "make the problem with head=None", "problem", lambda problem: problem.head is not None),
    "regulariser": Feature(
        "a regulariser", "make the problem with regulariser=None", "problem", lambda problem: problem.regulariser is not None
    ),
    "regulariser_not_quadratic": Feature(
        "a regulariser that is not quadratic",
        "take tikhonov, smooth_in_space, smooth_in_time, locality",
        "problem",
        lambda problem: problem.regulariser is not None and not problem.regulariser.quadratic,
    ),
    "regulariser_not_convex": Feature(
        "a regulariser that need not be convex",
        "say convex=True of a ufl_functional that is",
        "problem",
        lambda problem: problem.regulariser is not None and not problem.regulariser.convex,
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
    "running_of_pairs": Feature(
        "a running cost of b at pairs of nodes",
        "make the RunningCost without pairs",
        "problem",
        lambda problem: problem.running is not None and problem.running.pairs is not None,
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

#: How parameters are held in space and in time. What asks layers for their coefficients (`layer_inputs`) takes all of these.
HELD = (
    "learned_factors", "learned_times", "kernel_set", "nodal_bias", "bases_by_layer", "linear_in_time", "shared_in_time",
)  # fmt: skip

#: Regularisers of all kinds. What evaluates J, or leaves the regulariser out, takes all of these.
REGULARISED = ("regulariser", "regulariser_not_quadratic", "regulariser_not_convex")

#: How a network is stepped. What steps by the network's own layers, or does not step at all, takes all of these.
STEPPED = ("adapted_steps", "discrete_gradient", "single_precision")

#: The features that each algorithm declares, by the name of the algorithm.
TOOLS: dict[str, frozenset[str]] = {}


def _problem_of(subject):
    """The LearningProblem that an object is, or has as `problem`; None if there is none."""
    candidates = (subject, getattr(subject, "problem", None))
    return next((each for each in candidates if hasattr(each, "batch") and hasattr(each, "net")), None)


def _net_of(subject):
    """The network that an object is, or has as `net`, itself or by its problem."""
    problem = _problem_of(subject)
    return getattr(subject if problem is None else problem, "net", subject)


def features_of(subject) -> list[str]:
    """The names of the features of an object.

    A LearningProblem, and any object that has one as `problem`, has the features of the problem and its network. A
    ResidualNetwork, and any object that has one as `net` (a run, a trajectory), has those of the network. Other objects have
    no features.
    """
    net = _net_of(subject)
    objects = {"net": net if hasattr(net, "layer_inputs") else None, "problem": _problem_of(subject)}
    return [name for name, f in FEATURES.items() if objects[f.of] is not None and f.present(objects[f.of])]


def refuse_unsupported(tool: str, subject, instead: str | None = None) -> None:
    """Raise ValueError if an object has a feature that an algorithm does not declare.

    Parameters
    ----------
    tool
        The name of the algorithm, a key of `TOOLS`.
    subject
        The object.
    instead
        What the user can do instead, as an end of the message beside the feature's remedy.
    """
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
    """Declare which features of its arguments a function or method takes; a decorator.

    All arguments that are problems, networks or runs are checked for other features; for a method, the object itself too.

    The first argument of a function, a constructor or a class method must be of the class that its annotation names. Then all
    other arguments are compared between the ranks of its communicator (`ranks.same`). Nothing is compared for other methods,
    and where the annotation names no class, as in ``save(path, net)``.

    Parameters
    ----------
    *names
        The features that the function takes, keys of `FEATURES`.
    tool
        Its name in messages and in `TOOLS`. If left out, the name of the function, of a method with the name of its class; for
        ``__init__`` the name of the class alone.
    when
        A function of the arguments of a call: whether the declaration holds for this call. A function that takes less
        with some arguments has a second declaration, of another name.
    instead
        What the user can do instead, as an end of the message.
    parted
        Names of arguments of which each rank has its own part: they are not compared.

    Raises
    ------
    KeyError
        If a name is not a key of `FEATURES`.
    """
    unknown = set(names) - set(FEATURES)
    if unknown:
        raise KeyError(f"supports: expected names among {sorted(FEATURES)}, got {sorted(unknown)}")

    def decorate(function):
        name = tool or function.__qualname__.removesuffix(".__init__")
        TOOLS[name] = frozenset(names)
        door = getattr(function, "_door", None) or _Door(function, parted)

        @wraps(function)
        def checked(*args, **kwargs):
            # Of several declarations, the outermost checks the arguments, before any of them asks for features.
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
    """The check of the arguments of a decorated function."""

    def __init__(self, function: Callable, parted: tuple[str, ...]):
        self._signature = inspect.signature(function)
        parameters = self._signature.parameters
        # Each rank has its own part of a Function, and of node values given in its place, which the function itself refuses.
        self._parted = {*parted, *(name for name, one in parameters.items() if one.annotation == "fd.Function")}
        self._first = self._named_class(function, list(parameters))

    def _named_class(self, function: Callable, names: list[str]) -> tuple[str, type] | None:
        """The first argument and the class that its annotation names; None if nothing is to be checked."""
        if names[0] == "self" and function.__name__ != "__init__":
            return None
        first = names[names[0] in ("self", "cls")]
        kind = inspect.unwrap(function).__globals__.get(self._signature.parameters[first].annotation)
        return (first, kind) if isinstance(kind, type) else None

    def check(self, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._first is None:
            return
        name, kind = self._first
        given = self._signature.bind(*args, **kwargs)
        given.apply_defaults()
        first: Any = instance(name, given.arguments.pop(name), kind)
        compared = {name: value for name, value in given.arguments.items() if name not in ("self", "cls", *self._parted)}
        if "monitor" in compared:  # a monitor that prints on rank 0 may be another function there
            compared["monitor"] = callable(compared["monitor"])
        same(_net_of(first).Y.comm, **compared)
