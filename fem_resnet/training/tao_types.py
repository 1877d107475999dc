"""The types of TAO that the algorithms of this package use, and PETSc's options that go with them."""

from __future__ import annotations

from dataclasses import dataclass

from fem_resnet.arguments import LARGEST, did_you_mean
from fem_resnet.training.hessian import RieszPreconditioner

__all__ = ["TYPES", "TAOType", "checked_limit", "checked_type", "defaults_of"]

#: The round-off of J that Newton methods assume, where J is one at the start.
_ROUND_OFF = 1e-12


@dataclass(frozen=True)
class TAOType:
    """A type of TAO that minimises a function by its gradient and reports what it reached.

    Attributes
    ----------
    what
        The method.
    bounds
        Whether it keeps to bounds.
    newton
        The prefix of its options if it uses Hessian actions; else None.
    label_measure
        Whether its directions come from gradients in the label measure; else from derivatives in the coefficients.
    """

    what: str
    bounds: bool = False
    newton: str | None = None
    label_measure: bool = True


#: The types that are taken. The others of PETSc minimise something else than J (owlqn adds |m|_1, bmrm a regulariser; gpcg
#: and bqpip are for quadratics, brgn and pounders for residuals, the ssils family for complementarity, ipm, pdipm, almm,
#: admm and lcl for constraints), use no gradient (nm), compare changes of J with 1e-6 (tron), or are no methods (shell,
#: snes, python).
TYPES = {
    "lmvm": TAOType("L-BFGS"),
    "blmvm": TAOType("L-BFGS with projections", bounds=True),
    "nls": TAOType("Newton's method with a line search", newton="nls"),
    "ntr": TAOType("Newton's method with a trust region", newton="ntr"),
    "ntl": TAOType("Newton's method with a trust region, then a line search", newton="ntl"),
    "bnls": TAOType("nls with active sets", bounds=True, newton="bnk"),
    "bntr": TAOType("ntr with active sets", bounds=True, newton="bnk"),
    "bntl": TAOType("ntl with active sets", bounds=True, newton="bnk"),
    "cg": TAOType("nonlinear conjugate gradients", label_measure=False),
    "bncg": TAOType("nonlinear conjugate gradients with active sets", bounds=True, label_measure=False),
    "bqnls": TAOType("L-BFGS with active sets", bounds=True, label_measure=False),
}


def checked_type(given: str, *, bounded: bool, twice: bool = True) -> str:
    """A type of TAO from the options, if it is taken, and knows bounds where there are bounds.

    `twice` says whether the functional has the second derivatives that Newton methods ask for.
    """
    allowed = {name: kind for name, kind in TYPES.items() if (kind.bounds or not bounded) and (twice or kind.newton is None)}
    if given in allowed:
        return given
    fault = "does not know bounds" if given in TYPES else "is not taken"
    if given in TYPES and not twice and TYPES[given].newton is not None:
        fault = "asks for second derivatives, which J does not have with eliminate='head'"
    stochastic = "; Adam and SGD are steps of train_stochastic" if given.lower() in ("adam", "adamw", "sgd") else ""
    raise ValueError(
        f"solver_parameters: TAO's {given!r} {fault}; expected a 'tao_type' of "
        + ", ".join(f"{name!r} ({kind.what})" for name, kind in allowed.items())
        + (stochastic or did_you_mean(given, allowed))
    )


def checked_limit(given: object) -> int:
    """The limit of iterations from the options: an integer >= 0."""
    if str(given).isdecimal() and int(str(given)) <= LARGEST:
        return int(str(given))
    raise ValueError(f"solver_parameters: expected an integer >= 0 for 'tao_max_it', got {given!r}")


def defaults_of(tao_type: str) -> dict[str, object]:
    """Options that come before the user's: Riesz maps precondition, and J is one at the start."""
    prefix = TYPES[tao_type].newton
    if prefix is None:
        return {}
    return {
        f"tao_{prefix}_pc_type": "python",
        f"tao_{prefix}_pc_python_type": f"{RieszPreconditioner.__module__}.{RieszPreconditioner.__name__}",
        # PETSc would take the first radius from a step along the derivative in the coefficients, and so it would the
        # tolerance of a linear solve.
        f"tao_{prefix}_init_type": "constant",
        "tao_trust0": 1.0,
        f"tao_{prefix}_ksp_norm_type": "natural",
        f"tao_{prefix}_epsilon": _ROUND_OFF,
    }
