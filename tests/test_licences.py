"""Whoever installs the package installs nothing under a licence that asks more of them than the LGPL does."""

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

#: All that is pinned, and so installed.
PINNED = re.findall(r"^([\w.-]+)==", (Path(__file__).parents[1] / "containers" / "constraints.txt").read_text(), flags=re.M)
#: Names of licences, as packages write them.
FREE = r"MIT|BSD|Apache|Python Software Foundation|PSF|Mozilla|MPL|ISC|LGPL|Lesser General Public|Public Domain|0BSD|CC0|Zlib"
#: Packages whose metadata names none, and what their source says.
UNNAMED = {"firedrake-fiat": "LGPL-3.0-or-later"}


def licence(name: str) -> str:
    """What the metadata of an installed package say."""
    try:
        about = distribution(name).metadata
    except PackageNotFoundError:
        pytest.skip("not installed: it belongs to an extra")
    found = [about.get("License-Expression"), *(c for c in about.get_all("Classifier", []) if c.startswith("License ::"))]
    return "; ".join(filter(None, found)) or (about.get("License") or "").split("\n")[0] or UNNAMED.get(name, "")


@pytest.mark.whole
@pytest.mark.parametrize("name", PINNED)
def test_the_licence_of_a_dependency_is_a_free_one(name):
    assert re.search(FREE, licence(name)), f"{name}: {licence(name)!r}"
