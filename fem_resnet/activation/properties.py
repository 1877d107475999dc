"""Properties of an activation, which statements of the paper suppose."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass
from numbers import Real

from fem_resnet.arguments import choice, flag, instance, number

__all__ = ["Properties"]

_IN_WORDS = {
    "lipschitz": "sup |sigma'|",
    "zero_at_zero": "sigma(0) = 0",
    "sign_preserving": "s sigma(s) >= 0",
    "positive_slope_at_zero": "sigma'(0) > 0",
    "non_decreasing": "sigma does not decrease",
    "strictly_increasing": "sigma increases strictly",
    "bounded": "sigma is bounded",
}


@dataclass(frozen=True)
class Properties:
    """What the statements of the paper suppose of sigma; (A1) of 3.2 is the first five together.

    Attributes
    ----------
    lipschitz : float
        sup |sigma'|, infinite if there is no bound.
    zero_at_zero : bool
        sigma(0) = 0.
    sign_preserving : bool
        s sigma(s) >= 0 for all s, (3.4).
    positive_slope_at_zero : bool
        sigma'(0) > 0, from the left.
    non_decreasing, strictly_increasing : bool
        sigma(s) <= sigma(t), or sigma(s) < sigma(t), for all s < t.
    bounded : bool
        sup |sigma| is finite.
    sampled : frozenset of str
        The names of those that are not proved: no value up to |s| = 1e4 is against them. `caveat` says so in words.

    Raises
    ------
    TypeError, ValueError
        If `lipschitz` is neither a number >= 0 nor infinity, another is neither True nor False, or `sampled` has other names.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from fem_resnet import get_activation
    >>> properties = get_activation("tanh").properties
    >>> properties.caveat("lipschitz", "bounded")
    ''
    >>> replace(properties, sampled=frozenset(["bounded"])).caveat("lipschitz", "bounded")
    'sampled, not proved: sigma is bounded'
    """

    lipschitz: float
    zero_at_zero: bool
    sign_preserving: bool
    positive_slope_at_zero: bool
    non_decreasing: bool
    strictly_increasing: bool
    bounded: bool
    sampled: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not (isinstance(self.lipschitz, Real) and self.lipschitz == math.inf):
            number("lipschitz", self.lipschitz, least=0)
        for name in _IN_WORDS:
            if name != "lipschitz":
                flag(name, getattr(self, name))
        for name in instance("sampled", self.sampled, (Set, list, tuple), "names of properties"):
            choice("sampled", name, _IN_WORDS)

    def caveat(self, *names: str) -> str:
        """The caveat of a statement that rests on these properties: which of them are sampled; "" if all are proved."""
        sampled = [_IN_WORDS[name] for name in names if name in self.sampled]
        return f"sampled, not proved: {', '.join(sampled)}" if sampled else ""
