"""The settings of a network in a file, as JSON: written, and checked when they are read.

Which arrays and functions a file holds follows from its settings (`arrays`). Coefficients are not among them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from fem_resnet.activation.activation import Activation
from fem_resnet.arguments import choice, instance, integer
from fem_resnet.io.group import Wrong
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.channels import Channels
from fem_resnet.label_domain.parts import mover_of
from fem_resnet.label_domain.repeated_basis import RepeatedBasis
from fem_resnet.learning.head import Head
from fem_resnet.learning.lift import Lift
from fem_resnet.learning.prediction import PREDICTIONS
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.network.settings import Bias, Kernel, Layers, Settings, checked_times
from fem_resnet.parameters.known_kernel_sets import ARRAYS, kernel_set_from
from fem_resnet.parameters.time_basis import get_time_basis
from fem_resnet.time_stepping.file_options import refuse_in_file

__all__ = ["FORMAT", "GROUP", "checked_settings", "network_arguments", "written_settings"]

#: The group of a file that holds what Firedrake does not write.
GROUP = "fem_resnet"
FORMAT = 7
#: The largest number of steps a layer that is accepted: a network takes time and memory in proportion to it.
_MOST_STEPS = 1_000_000
#: The largest number of channels, and of fields of a lift, that is accepted.
_MOST_CHANNELS = 1 << 16


def written_settings(
    net: ResidualNetwork, head: Head | None, lift: Lift | None, bases: Sequence[Basis], roles: Mapping[str, list[int | None]],
    output: Basis | None,
) -> str:  # fmt: skip
    """The settings as JSON.

    Parameters
    ----------
    net, head, lift
        What is written.
    bases
        All bases, each once.
    roles
        For each part that a basis plays, the positions in `bases`, one or one a layer.
    output
        The basis of the head's output where that is on another label space.

    Raises
    ------
    TypeError
        If an option of the network is no JSON.
    ValueError
        If `checked_settings` refuses the result: nothing is written that cannot be read.
    """
    settings = json.dumps(
        {
            "format": FORMAT,
            "roles": roles,
            "channels": net.Y.channels if isinstance(net.Y, Channels) else None,
            "kinds": [basis.kind for basis in bases],
            "repeated": [isinstance(basis, RepeatedBasis) for basis in bases],
            "mesh": net.Y.V.mesh().name,
            "output": None if output is None else _of_output(output),
            # The times that the network was made with. Learned times are coefficients, like those of bias and kernel.
            "network": _of_network(net.settings),
            "head": None if head is None else _of_head(net, head),
            "lift": None if lift is None else {"fields": lift.matrix().shape[1]},
        },
        default=_as_number,
    )
    try:
        checked_settings(settings)
    except Wrong as error:
        raise ValueError(f"net: it cannot be written to a file: {error}") from error
    return settings


def _of_output(basis: Basis) -> dict[str, Any]:
    """A basis on another label space than the network's."""
    Y = basis.Y
    return {
        "mesh": Y.V.mesh().name,
        "channels": Y.channels if isinstance(Y, Channels) else None,
        "kind": basis.kind,
        "repeated": isinstance(basis, RepeatedBasis),
    }


def _of_head(net: ResidualNetwork, head: Head) -> dict[str, Any]:
    kept = None if head.kept is None else {"W": head.kept.of_W.shape[1], "mu": head.kept.of_mu.shape[1]}
    return {
        "classes": head.classes,
        "one_channel": head.classes is None and head.Y is net.Y.one and head.Y is not net.Y,
        "prediction": head.prediction.name,
        "kept": kept,
    }


def _of_network(settings: Settings) -> dict[str, Any]:
    """All that a network is made of but its bases, in one flat list of numbers and text; `network_arguments` reads it."""
    kernel, layers = settings.kernel, settings.layers
    return {
        "times": list(settings.times),
        "bias_in_time": settings.bias.in_time,
        "kernel_in_time": kernel.in_time,
        "activation": settings.activation.description,
        "steps": layers.steps,
        "layers_per_block": layers.per_block,
        "solver_parameters": dict(settings.solver_parameters),
        "options_prefix": None,
        "learn_factors": kernel.learn_factors,
        "learn_times": layers.learn_times,
        "replay_steps": settings.replay_steps,
        "gradient_flow": settings.gradient_flow,
        "kernel_set": None if kernel.among is None else kernel.among.description,
        "precision": settings.precision,
    }


def network_arguments(
    given: Mapping[str, Any],
    phi: Sequence[Basis],
    psi: Sequence[Basis],
    bias: Sequence[Basis | None],
    arrays: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """The arguments of `ResidualNetwork`, from its part of the settings and the bases.

    Parameters
    ----------
    given
        Checked by `checked_settings`.
    phi, psi, bias
        One basis, or one a layer.
    arrays
        Those of the set of kernels (`KernelSet.arrays`).
    """
    among = kernel_set_from(given["kernel_set"], arrays)
    return {
        "kernel": Kernel(phi, psi, in_time=given["kernel_in_time"], learn_factors=given["learn_factors"], among=among),
        "bias": Bias(bias, in_time=given["bias_in_time"]),
        "layers": Layers(
            given["times"], steps=given["steps"], per_block=given["layers_per_block"], learn_times=given["learn_times"]
        ),
        "activation": Activation.from_description(given["activation"]),
    } | {name: given[name] for name in ("gradient_flow", "solver_parameters", "replay_steps", "precision")}


def _as_number(value: Any) -> Any:
    """A number of NumPy, which an option may have, as a number of Python."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"net: expected settings of numbers and text, got {type(value).__name__}, which no file can hold")


def _flag(name: str, value: Any) -> None:
    instance(name, value, bool)


def _in_time(name: str, value: Any) -> None:
    if not isinstance(instance(name, value, (str, list)), str):
        for number in value:
            integer(name, number, least=0)


def _kernel_set(name: str, value: Any) -> None:
    """Check the description of a set of kernels; where arrays belong to it, `arrays` checks the whole."""
    description = instance(name, value, (dict, type(None)))
    if description is None or description.get("set") not in ARRAYS:
        kernel_set_from(description)


def _options(name: str, value: Any) -> None:
    refuse_in_file(instance(name, value, dict))


#: How each argument of a network is checked on its own. The constructor checks whether they fit together.
_OF_NETWORK: dict[str, Callable[[str, Any], object]] = {
    "times": lambda name, value: checked_times(instance(name, value, list), name),
    "bias_in_time": _in_time,
    "kernel_in_time": _in_time,
    "activation": lambda name, value: Activation.from_description(instance(name, value, dict)),
    "steps": lambda name, value: integer(name, value, most=_MOST_STEPS),
    "layers_per_block": integer,
    "solver_parameters": _options,
    "options_prefix": lambda name, value: instance(name, value, type(None)),
    "learn_factors": _flag,
    "learn_times": _flag,
    "replay_steps": _flag,
    "gradient_flow": _flag,
    "kernel_set": _kernel_set,
    "precision": lambda name, value: choice(name, value, ("double", "single")),
}


def checked_settings(text: str) -> dict[str, Any]:
    """The settings of a file, each checked.

    Raises
    ------
    Wrong
        The message begins with the setting that is wrong.
    """
    where = f"/{GROUP}/settings"
    try:
        settings = json.loads(text, parse_constant=_refuse_constant)
        given = instance("settings", settings, dict).get("format")
        if given != FORMAT:
            raise ValueError(f"it has format {str(given)[:20]}, this version reads {FORMAT}")
        _check_keys(
            "settings",
            settings,
            ("format", "roles", "channels", "kinds", "repeated", "mesh", "output", "network", "head", "lift"),
        )
        where += "/"
        instance("mesh", settings["mesh"], str)
        if settings["channels"] is not None:
            integer("channels", settings["channels"], most=_MOST_CHANNELS)
        for kind in instance("kinds", settings["kinds"], list):
            mover_of(instance("kinds", kind, str))
        _check_repeated(settings)
        _check_keys("network", settings["network"], _OF_NETWORK)
        for name, check in _OF_NETWORK.items():
            check(name, settings["network"][name])
        for name in ("bias_in_time", "kernel_in_time"):
            get_time_basis(settings["network"][name], settings["network"]["times"], name)
        head = instance("head", settings["head"], (dict, type(None)))
        if head is not None:
            _check_head(head)
        if instance("output", settings["output"], (dict, type(None))) is not None:
            _check_output(settings["output"], head)
        if instance("lift", settings["lift"], (dict, type(None))) is not None:
            _check_keys("lift", settings["lift"], ("fields",))
            integer("fields", settings["lift"]["fields"], most=_MOST_CHANNELS)
        _check_roles(settings)
    except (TypeError, ValueError, RecursionError, ArithmeticError, MemoryError) as error:
        raise Wrong(f"{where}{error}") from error
    return settings


def _check_head(head: Mapping[str, Any]) -> None:
    _check_keys("head", head, ("classes", "one_channel", "prediction", "kept"))
    choice("prediction", head["prediction"], PREDICTIONS)
    _flag("one_channel", head["one_channel"])
    kept = instance("kept", head["kept"], (dict, type(None)))
    if head["classes"] is not None:
        integer("classes", head["classes"])
        if head["one_channel"] or kept is not None:
            raise ValueError("head: expected classes, or an output on a channel or one that symmetries act on; got both")
    if kept is not None:
        _check_keys("kept", kept, ("W", "mu"))
        integer("W", kept["W"])
        integer("mu", kept["mu"], least=0)


def _check_output(output: Mapping[str, Any], head: Mapping[str, Any] | None) -> None:
    _check_keys("output", output, ("mesh", "channels", "kind", "repeated"))
    for name in ("mesh", "kind"):
        instance(name, output[name], str)
    if output["channels"] is not None:
        integer("channels", output["channels"], most=_MOST_CHANNELS)
    _flag("repeated", output["repeated"])
    if output["repeated"] and output["channels"] is None:
        raise ValueError("output: expected channels where the basis repeats that of one channel, got none")
    if head is None or head["classes"] is not None or head["one_channel"]:
        raise ValueError("output: expected a head onto it, got none")


def _check_repeated(settings: Mapping[str, Any]) -> None:
    """Check which bases repeat that of one channel."""
    repeated = instance("repeated", settings["repeated"], list)
    for each in repeated:
        instance("repeated", each, bool)
    if len(repeated) != len(settings["kinds"]) or any(repeated) and settings["channels"] is None:
        raise ValueError("repeated: expected whether each basis repeats that of one channel, and channels where one does")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"expected numbers, got {name}")


def _check_keys(name: str, value: Any, expected: Iterable[str]) -> None:
    different = sorted(set(instance(name, value, dict)) ^ set(expected))
    if different:
        state = "surplus" if different[0] in value else "missing"
        raise ValueError(f"{name}: expected {', '.join(expected)}; {different[0]!r} is {state}")


def _check_roles(settings: Mapping[str, Any]) -> None:
    """Check which bases play which part: positions of bases, or None where there is no basis."""
    layers, head = len(settings["network"]["times"]) - 1, settings["head"]
    _check_keys("roles", settings["roles"], ("phi", "psi", "bias", "head", "onto"))
    for name, positions in settings["roles"].items():
        lengths = (1,) if name in ("head", "onto") else (1, layers)
        if len(instance("roles", positions, list)) not in lengths:
            raise ValueError(f"roles: expected one basis, or one a layer, for {name!r}, got {len(positions)}")
        onto = head is not None and head["classes"] is None and settings["output"] is None
        has_one = {"head": head is not None, "onto": onto}.get(name, True)
        for position in positions:
            if position is None and (name == "bias" or not has_one):
                continue
            if not has_one:
                raise ValueError(f"roles: expected no basis for {name!r}, got {position!r}")
            integer(f"roles: {name!r}", position, least=0, most=len(settings["kinds"]) - 1)
    used = {position for positions in settings["roles"].values() for position in positions}
    if not used >= set(range(len(settings["kinds"]))):
        raise ValueError("kinds: expected bases that play a part, got one that plays none")
