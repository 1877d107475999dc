"""The recipes of containers name no package: they copy the tree and call `containers/run`."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
each_recipe = pytest.mark.parametrize("name", ["Dockerfile", "fem_resnet.def"])


def recipe(name):
    """The lines without comments."""
    lines = (ROOT / "containers" / name).read_text().splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("#"))


def packages():
    """Names of all Debian and Python packages that containers/run installs."""
    run = (ROOT / "containers" / "run").read_text()
    lists = re.search(r"^declare -A packages=\((.*?)^\)", run, re.DOTALL | re.MULTILINE)[1]
    debian_and_built = re.findall(r'="(.*?)"', lists, re.DOTALL)
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "containers" / "constraints.txt").read_text(), re.MULTILINE)
    return {name.lower() for text in debian_and_built for name in text.split()} | {name.lower() for name in pinned}


@each_recipe
def test_recipes_call_the_script_and_name_no_package(name):
    text = recipe(name)
    assert re.search(r"\s/opt/fem_resnet/containers/run true$", text.replace(" \\", ""), re.MULTILINE)
    assert not re.search(r"\b(apt|apt-get|dpkg|pip3?|conda)\s", text)
    known = packages()
    assert {"build-essential", "petsc", "sphinx", "firedrake"} <= known
    assert not known & set(re.findall(r"[\w.+-]+", text.lower()))


def test_what_runs_in_a_container_runs_by_the_script():
    assert 'ENTRYPOINT ["/opt/fem_resnet/containers/run"]' in recipe("Dockerfile")
    assert '%runscript\n    exec /opt/fem_resnet/containers/run "$@"' in recipe("fem_resnet.def")


def test_docker_copies_what_it_installs_from_before_the_rest():
    """All files that the script reads are there when it is called, so its stamps are those of the whole tree."""
    before, after = recipe("Dockerfile").split("containers/run true")
    copied = re.findall(r"^COPY (.*) /opt/fem_resnet/(\S*)$", before, re.MULTILINE)
    assert copied == [
        ("containers/run containers/constraints.txt containers/hashes.txt", "containers/"),
        ("pyproject.toml", ""),
    ]
    read = set(re.findall(r"\$tree/([\w./-]+)", (ROOT / "containers" / "run").read_text()))
    assert read == {"containers/run", "containers/constraints.txt", "containers/hashes.txt", "pyproject.toml"}
    assert re.search(r"^COPY --chown=fem:fem \. /opt/fem_resnet$", after, re.MULTILINE)


@each_recipe
def test_recipes_and_script_mean_the_same_home(name):
    assert "FEM_RESNET_HOME=/opt/fem_resnet_home" in recipe(name)
