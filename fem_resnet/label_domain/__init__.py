"""The label domain Y: nodes, weights, inner product and batches on a mesh; bases of functions on it; `label_domain(source)`.

Integrals over Y in (2.8) are sums over nodes, int f dy = sum_i w_i f(y_i). `LabelSpace` holds the weights. `label_domain`
makes one of a file, a mask, points or a graph; `read_mesh` reads a mesh; `class_space` and `point_space` make domains without
one. `Part` is a part of a domain. `laplace_basis`, `cell_indicators` and `given_basis` make bases, and `orthonormal` makes
them orthonormal. Modules here know Firedrake, MPI, PETSc and SLEPc, and nothing of networks.
"""

import sys
from importlib import import_module
from types import ModuleType


class _Callable(ModuleType):
    """`fem_resnet.label_domain` is this folder and the function, whichever is imported first."""

    def __call__(self, *arguments, **options):
        return import_module(f"{__name__}.sources").label_domain(*arguments, **options)

    def __reduce__(self):  # as of a function: a `DomainRecipe` pickles it
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Callable
