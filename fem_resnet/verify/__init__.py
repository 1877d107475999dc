"""Verification of a learning problem: `verify(problem)`, or `python -m fem_resnet.verify` for files and modules.

All numbers of a problem are compared with formulas that are written out a second time (`reference`), and all derivatives with
differences. Users import `verify`; `built_in` is a problem to try it on.
"""

import sys
from types import ModuleType

from fem_resnet.verify.problems import BUILT_IN, built_in
from fem_resnet.verify.report import Check, Line, Report
from fem_resnet.verify.suite import problem_of, verify

__all__ = ["BUILT_IN", "Check", "Line", "Report", "built_in", "problem_of", "verify"]


class _Callable(ModuleType):
    """`fem_resnet.verify` is this folder and the function, whichever is imported first."""

    def __call__(self, *arguments, **options):
        return verify(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
