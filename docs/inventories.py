"""Names of other packages for intersphinx, without a network: see inventories/README.md."""

import zlib
from pathlib import Path

#: Where the pages stand that an inventory from Debian lists.
_SITES = {
    "python": "https://docs.python.org/3/",
    "scipy": "https://docs.scipy.org/doc/scipy/",
    "sklearn": "https://scikit-learn.org/stable/",
    "sympy": "https://docs.sympy.org/latest/",
    "mpi4py": "https://mpi4py.readthedocs.io/en/stable/",
}


def mapping(folder: Path, made: Path) -> dict[str, tuple[str, str]]:
    """`intersphinx_mapping`: the inventories of a folder, those of its text files written to the folder `made`."""
    found = {path.stem: (_SITES[path.stem], str(path)) for path in sorted(folder.glob("*.inv"))}
    made.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("*.txt")):
        site, *lines = path.read_text().splitlines()
        (made / f"{path.stem}.inv").write_bytes(_inventory(path.stem, map(str.split, lines)))
        found[path.stem] = (site, str(made / f"{path.stem}.inv"))
    return found


def _inventory(project, names):
    """Version 2 of Sphinx' format."""
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
    head += "# The remainder of this file is compressed using zlib.\n"
    rows = "".join(f"{name} py:class 1 {page} -\n" for name, page in names)
    return head.encode() + zlib.compress(rows.encode())
