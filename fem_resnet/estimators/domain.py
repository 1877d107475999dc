"""How a label domain is made: what pickles, travels to other processes and is made again there.

A mesh may be shared by several processes, so it does not pickle. A recipe does: it is the function that makes the mesh, its
arguments, and the element. What it makes is kept, and made once in each process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import firedrake as fd
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import function, instance, integer, text
from fem_resnet.fixed import Fixed
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.eigensolver import eigenspace_ends
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.label_domain.laplace import laplace_at_most

__all__ = ["MOST_MODES", "DomainRecipe", "whole_ranks"]

#: So many eigenfunctions are looked for, if no more are asked for.
MOST_MODES = 64


class DomainRecipe(Fixed):
    """A label domain by the function that makes its mesh: it pickles, and a copy is the recipe itself.

    Parameters
    ----------
    make
        A function that returns a mesh, such as ``firedrake.UnitDiskMesh`` or `read_mesh`, or one of your own. Pickle keeps
        its name, so it stands at the top of a module.
    *arguments
        The arguments of `make`.
    family, degree
        The element of the functions, as for ``firedrake.FunctionSpace``.
    symmetries
        A function of the mesh that returns a list of its symmetries, as for `Symmetric`; it pickles by its name too.
        Estimators then learn only maps that keep these: classes and numbers do not change where an input is turned, functions
        are turned with it. None for no symmetries.
    **options
        The keywords of `make`; ``comm`` among them says which ranks have the mesh.

    Raises
    ------
    TypeError, ValueError
        If `make` or `symmetries` cannot be called, the family is no text, or the degree no integer >= 0. What `make` raises,
        it raises where the label domain is first asked for.

    Examples
    --------
    >>> from firedrake import UnitDiskMesh
    >>> disk = DomainRecipe(UnitDiskMesh, 2)
    >>> disk
    DomainRecipe(UnitDiskMesh, 2)
    >>> disk.label_space() is disk.label_space()
    True
    >>> import pickle
    >>> pickle.loads(pickle.dumps(disk)).label_space().size == disk.label_space().size
    True
    """

    def __init__(
        self,
        make: Callable[..., fd.MeshGeometry],
        *arguments: Any,
        family: str = "CG",
        degree: int = 1,
        symmetries: Callable[[fd.MeshGeometry], list] | None = None,
        **options: Any,
    ):
        self.make, self.arguments, self.options = function("make", make, "a function that returns a mesh"), arguments, options
        self.family, self.degree = text("family", family), integer("degree", degree, least=0)
        if symmetries is not None:
            function("symmetries", symmetries, "a function of the mesh that returns a list of symmetries, or None,")
        self.symmetries = symmetries
        self._Y: LabelSpace | None = None
        self._found: list | None = None
        self._bases: dict[int, Basis] = {}

    def __repr__(self) -> str:
        named = [f"{name}={value!r}" for name, value in self.options.items()]
        named += [f"{name}={value!r}" for name, value in self._element.items() if value != {"family": "CG", "degree": 1}[name]]
        named += [] if self.symmetries is None else [f"symmetries={self.symmetries.__name__}"]
        name = getattr(self.make, "__name__", repr(self.make))
        return f"DomainRecipe({', '.join([name, *map(repr, self.arguments), *named])})"

    @property
    def _element(self) -> dict[str, Any]:
        return {"family": self.family, "degree": self.degree}

    def __reduce__(self):
        made = partial(type(self), symmetries=self.symmetries, **self._element, **self.options)
        return made, (self.make, *self.arguments)

    def __copy__(self) -> DomainRecipe:
        return self

    def __deepcopy__(self, memo: dict) -> DomainRecipe:
        return self

    def label_space(self) -> LabelSpace:
        """The label domain: the same object each time. Collective over the communicator of the mesh.

        Raises
        ------
        TypeError
            If `make` returns no mesh.
        Exception
            What `make` raises, or `LabelSpace`.
        """
        if self._Y is None:
            with stop_annotating():
                mesh = instance("make", self.make(*self.arguments, **self.options), fd.MeshGeometry, "a function of a mesh")
                self._Y = LabelSpace(fd.FunctionSpace(mesh, self.family, self.degree))
        return self._Y

    def basis(self, most: int) -> Basis:
        """Laplace eigenfunctions of whole eigenspaces, at least one and otherwise at most `most`. Collective.

        They are the first of a larger number, which the same `most` always gives: on a discontinuous space these depend on it.

        Parameters
        ----------
        most
            How many there may be.

        Raises
        ------
        ValueError
            If that is no positive integer.
        """
        count = max(integer("most", most), MOST_MODES)
        if count not in self._bases:
            self._bases[count] = laplace_at_most(self.label_space(), count)
        phi = self._bases[count]
        return phi.first(max(end for end in whole_ranks(phi) if end <= max(most, whole_ranks(phi)[0])))

    def kept_symmetries(self) -> list:
        """What `symmetries` returns for the mesh; nothing where there are none. Collective.

        Raises
        ------
        TypeError
            If it returns no list.
        """
        if self.symmetries is None:
            return []
        if self._found is None:
            found = self.symmetries(self.label_space().V.mesh())
            self._found = list(instance("symmetries", found, (list, tuple), "a list of symmetries"))
        return self._found


def whole_ranks(phi: Basis) -> list[int]:
    """How many functions the first eigenspace has, the first two, and so on, ascending.

    Parameters
    ----------
    phi
        A Laplace basis of whole eigenspaces.
    """
    return eigenspace_ends(phi.eigenvalues / (phi.eigenvalues.max() or 1.0))
