"""sigma and sigma' as C: the built-ins from `pointwise.h`, expressions as SymPy prints them.

Functions of the C library are called through its vector variants where it has them (glibc's libmvec, 4 ulp).
"""

from __future__ import annotations

from importlib.resources import files

import sympy
from sympy.codegen.rewriting import create_expand_pow_optimization

from fem_resnet.activation.activation import Activation
from fem_resnet.activation.formulas import parts

__all__ = ["activation_code"]

_VECTORISED = ("atan", "cos", "cosh", "erf", "exp", "expm1", "log", "log1p", "sin", "sinh", "tanh")


def activation_code(activation: Activation, real: str = "double") -> str:
    """C code that defines REAL, and ``VALUE(s)`` and ``SLOPE(s)``, sigma and sigma' of a REAL.

    Parameters
    ----------
    activation
        The activation.
    real
        "double" or "float". Constants are doubles; the compiler must be told to take them as REAL.

    Raises
    ------
    ValueError
        If the activation has kernels of its own in NumPy, or its expression has functions that C lacks.

    Examples
    --------
    >>> from fem_resnet.activation.activation import get_activation
    >>> activation_code(get_activation("relu")).splitlines()[-1]
    '#define SLOPE(s) slope_relu(s)'
    """
    if not activation.is_described:
        raise ValueError(
            f"activation: expected one with C code, {activation.name} has kernels of its own in NumPy; give a SymPy expression"
        )
    lines = ["#include <tgmath.h>", f"#define REAL {real}"]
    suffix = "f" if real == "float" else ""
    simd = '__attribute__((simd("notinbranch"))) REAL'
    lines.append("#if defined __x86_64__ && defined __GLIBC__ && __GLIBC_PREREQ(2, 35) /* has them all, by -lm */")
    lines += [f"{simd} ({name}{suffix})(REAL);" for name in _VECTORISED]
    lines += [f"{simd} (pow{suffix})(REAL, REAL);", "#endif"]
    if activation.expression is None:
        names = [f"{kind}_{activation.name}" for kind in ("value", "slope")]
        lines += [f"#define {name.upper()} {value!r}" for name, value in activation.parameters]
        lines.append((files("fem_resnet.activation") / "pointwise.h").read_text())
    else:
        names = ["value", "slope"]
        lines += [_function(name, activation.expression, order) for order, name in enumerate(names)]
    return "\n".join([*lines, *(f"#define {name}(s) {call}(s)" for name, call in zip(("VALUE", "SLOPE"), names))])


def _function(name: str, expression: sympy.Expr, order: int) -> str:
    found = parts(expression, order)
    expand = create_expand_pow_optimization(16)
    shared, formulas = sympy.cse([part.formula for part in found], symbols=sympy.numbered_symbols("x"))
    # All formulas are evaluated, outside of their intervals too: compilers vectorise loops without branches.
    values = [*shared, *((f"part_{k}", formula) for k, formula in enumerate(formulas))]
    # Powers are expanded last: in 2 s + s s with a product that is not evaluated, cse takes 2 s for s s.
    body = [f"    const REAL {symbol} = {_print(expand(value))};" for symbol, value in values]
    # In this order a NaN takes the last formula, and is one there too.
    choice = "".join(f"s <= {part.right!r} ? part_{k} : " for k, part in enumerate(found[:-1]))
    return "\n".join([f"static inline REAL {name}(REAL s) {{", *body, f"    return {choice}part_{len(found) - 1};", "}"])


def _print(formula: sympy.Basic) -> str:
    try:
        return sympy.ccode(formula, standard="C99", strict=True)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"expression: expected functions that C has, got {formula} ({error})") from error
