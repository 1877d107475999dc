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
from fem_resnet.label_domain.symmetries import symmetry_matrices
from fem_resnet.parameters.equivariant import Parity

__all__ = ["MOST_MODES", "DomainRecipe"]

#: So many eigenfunctions are looked for, if no more are asked for.
MOST_MODES = 64
#: What is no symmetry may seem to be one on the first two eigenspaces, as the turns of a square do; a mesh shows more of a
#: symmetry than so many functions.
_SEEMING = 4


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
        make: Callable[..., fd.MeshGeometry | LabelSpace],
        *arguments: Any,
        family: str = "CG",
        degree: int = 1,
        symmetries: Callable[[fd.MeshGeometry], list] | None = None,
        **options: Any,
    ):
        self.make, self.arguments, self.options = (
            function("make", make, "a function that returns a mesh or a label space"),
            arguments,
            options,
        )
        self.family, self.degree = text("family", family), integer("degree", degree, least=0)
        if symmetries is not None:
            function("symmetries", symmetries, "a function of the mesh that returns a list of symmetries, or None,")
        self.symmetries = symmetries
        self._Y: LabelSpace | None = None
        self._found: list | None = None
        self._bases: dict[int, tuple[Basis, list[int]]] = {}

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
            If `make` returns no mesh and no label space.
        Exception
            What `make` raises, or `LabelSpace`.
        """
        if self._Y is None:
            with stop_annotating():
                made = self.make(*self.arguments, **self.options)
                instance("make", made, (fd.MeshGeometry, LabelSpace), "a function that returns one")
                self._Y = (
                    made if isinstance(made, LabelSpace) else LabelSpace(fd.FunctionSpace(made, self.family, self.degree))
                )
        return self._Y

    def basis(self, most: int) -> Basis:
        """Laplace eigenfunctions of whole eigenspaces, at least one and otherwise at most `most`. Collective.

        Eigenspaces are those of the domain where symmetries are given, also if the mesh splits them: symmetries take the span
        of the functions into itself. They are the first of a larger number, which the same `most` always gives: on a
        discontinuous space these depend on it.

        Parameters
        ----------
        most
            How many there may be.

        Raises
        ------
        TypeError, ValueError
            If that is no positive integer; or `symmetries` returns some that are none of the label domain.
        """
        phi, ranks = self._whole(max(integer("most", most), MOST_MODES))
        return phi.first(max(rank for rank in ranks if rank <= max(most, ranks[0])))

    def ranks(self) -> list[int]:
        """How many functions `basis` may have, up to 64: ascending. Collective.

        Raises
        ------
        TypeError, ValueError
            As of `basis`.
        """
        return self._whole(MOST_MODES)[1]

    def _whole(self, count: int) -> tuple[Basis, list[int]]:
        """At most `count` eigenfunctions, and how many of them are whole eigenspaces. Collective."""
        if count not in self._bases:
            phi = laplace_at_most(self.label_space(), count)
            ranks = eigenspace_ends(phi.eigenvalues / (phi.eigenvalues.max() or 1.0))
            self._bases[count] = phi, self._kept_ranks(phi, ranks)
        return self._bases[count]

    def _kept_ranks(self, phi: Basis, ranks: list[int]) -> list[int]:
        """Those of ascending ranks whose functions the symmetries take into their own span. Collective.

        A mesh may split an eigenspace, and resolves a symmetry on so many functions only.
        """
        maps = [each.map if isinstance(each, Parity) else each for each in self.kept_symmetries()]
        if not maps:
            return ranks
        seen = [rank for rank in ranks if rank > _SEEMING] or ranks[-1:]
        for most in reversed(seen):
            try:
                blocks = symmetry_matrices(phi.first(most), maps).blocks
                break
            except ValueError:
                if most == seen[0]:
                    raise
        cut = {rank for block in blocks for rank in range(block.min() + 1, block.max() + 1)}
        return [rank for rank in ranks if rank <= most and rank not in cut]

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
