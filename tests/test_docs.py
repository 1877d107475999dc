"""The pages of docs/ are built without a warning, from plain docstrings and from the demos."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import without_mpi

import fem_resnet

#: They list what there is.
pytestmark = pytest.mark.whole

ROOT = Path(__file__).parents[1]


@pytest.fixture
def docs(monkeypatch):
    """The modules that make the pages can be imported."""
    monkeypatch.syspath_prepend(ROOT / "docs")


#: The pages that people write, and those whose code runs: each block is run, and what it prints is compared.
PAGES = sorted(
    path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md") if not {"generated", "_build"} & set(path.parts)
)
WITH_CODE = [ROOT / "README.md", *(ROOT / page for page in PAGES)]
WITH_CODE = [str(path.relative_to(ROOT)) for path in WITH_CODE if "```python\n" in path.read_text()]
WITH_CODE.remove("docs/howto/pytorch.md")  # tests/external/test_pages.py runs it where PyTorch and JAX are
RUN_PAGES = (sys.executable, "docs/run_pages.py", *WITH_CODE)
BUILT = ROOT / "docs" / "_build" / "tested"
SPHINX = (sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-E", "-a", "-b", "html", "docs", str(BUILT))


@pytest.mark.command(*SPHINX)
def test_docs_are_built_without_a_warning(printed):
    pages = BUILT / "generated"
    home = fem_resnet.ResidualNetwork.__module__
    network = (pages / "api" / f"{home}.html").read_text()
    assert (
        f"{home}.ResidualNetwork" in network
        and "https://numpy.org/doc/stable/reference/generated/numpy.ndarray.html" in network
    )
    assert "The label domain, the network and the head" in (pages / "demos" / "digits_on_a_disk.html").read_text()
    for demo, words in {
        "costate_twice": "gradient at dt/8",
        "mesh_independence": "longest/shortest  function space",
        "same_network_other_mesh": "smallest order by the last refinement: ",
        "digits_table": "| support vector machine, no copies |",
    }.items():
        text = (pages / "demos" / f"{demo}.html").read_text()
        assert words in text[text.index("What the full run prints") :], demo
    (notebook,) = (BUILT / "_downloads").rglob("costate_twice.ipynb")
    first, *_, last = ("".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"])
    assert "```text\nr_t = B_bT( sigma'(u) r )" in first and (ROOT / "demos" / "costate_twice.txt").read_text() in last
    (script,) = (BUILT / "_downloads").rglob("costate_twice.py")
    assert script.read_text() == (ROOT / "demos" / "costate_twice.py").read_text()
    assert f"api/{home}.html" in (pages / "equations.html").read_text()
    assert "<math" in (BUILT / "index.html").read_text()
    for page in [BUILT / "index.html", BUILT / "tutorial.html", *(pages / "demos").glob("*.html")]:
        asked = re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=["'](https?://[^"']+)""", page.read_text())
        assert not asked, f"{page.name} asks for {asked}: pages need no network"


@pytest.mark.slow
def test_the_gallery_runs_every_demo_in_its_short_form():
    """It takes some minutes. In the default run, test_demos.py runs the demos, each in a process of its own."""
    command = [*SPHINX[:-1], "-D", "plot_gallery=1", str(BUILT.with_name("gallery"))]
    result = subprocess.run(command, env=without_mpi(), cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    page = (BUILT.with_name("gallery") / "generated" / "demos" / "digits_on_a_disk.html").read_text()
    assert re.search(r"test accuracy: 0\.\d{4}", page)


def test_every_demo_has_a_picture_in_the_gallery(docs):
    import demo_pages

    names = {path.stem for path in (ROOT / "demos").glob("*.py")}
    assert names == {path.stem for path in (ROOT / "docs" / "figures").glob("*.png")}
    sources = demo_pages.sources()
    for name in names:
        assert f"'generated/thumbnails/{name}.png'" in sources[f"demo_sources/{name}.py"]


@pytest.mark.command(*RUN_PAGES)
def test_the_code_on_pages_runs_and_prints_what_they_say(printed):
    assert printed == WITH_CODE and "docs/tutorial.md" in printed and "README.md" in printed


def test_the_table_of_equations_finds_the_network(docs):
    import equations

    home = fem_resnet.ResidualNetwork.__module__
    assert (home, home, "") in equations.in_code()["(2.8)"]
    (row,) = [line for line in equations.pages()["equations.md"].splitlines() if line.startswith("| (2.8) ")]
    assert f"<{home}.ResidualNetwork>" in row and "`test_order_in_time`" in row


def test_the_table_of_tools_has_every_declaration(docs):
    import tools

    rows = {line.split("`")[1]: line for line in tools.pages()["tools.md"].splitlines() if line.startswith("| `")}
    assert {name: row.count(" x |") for name, row in rows.items()} == {name: len(names) for name, names in tools.TOOLS.items()}


def test_every_number_of_the_paper_is_named_by_a_public_name_and_shown_by_a_test(docs):
    import equations

    assert len(equations.names()) == 67 and equations.gaps() == []


def test_what_shows_a_number_is_one_test_that_names_it_and_asserts(docs):
    import equations

    written = [
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    ]
    for number, name in equations.SHOWN.items():
        assert written.count(name) == 1, f"{number}: {name} is there {written.count(name)} times"
        text = equations.tests()[name].text
        assert equations.shown_by(number) == name, f"{number}: {name} does not name it"
        assert re.search(r"\bassert|\braises\(|\bcheck", text), f"{number}: {name} asserts nothing"


def test_a_number_is_not_shown_by_a_test_that_is_not_there_or_does_not_name_it(docs, monkeypatch):
    import equations

    monkeypatch.setitem(equations.SHOWN, "(2.8)", "test_that_nobody_wrote")
    monkeypatch.setitem(equations.SHOWN, "Theorem 3.4", "test_order_in_time")
    assert equations.gaps() == ["(2.8)", "Theorem 3.4"]


def test_the_map_is_drawn_from_the_imports(docs, tmp_path):
    import import_map

    rooms = import_map.rooms()
    floor = import_map.floors(rooms)
    assert all(floor[used] < floor[room] for room in rooms for used in rooms[room])
    reached = {}
    for room in sorted(rooms, key=floor.get):
        direct = {used for importing, used in import_map.arrows(rooms) if importing == room}
        reached[room] = direct.union(*(reached[used] for used in direct))
        assert rooms[room] <= reached[room], f"{room}: an arrow is missing"
    import_map.draw(tmp_path / "map.svg")
    assert "</svg>" in (tmp_path / "map.svg").read_text()
    with pytest.raises(ValueError, match="imports go in a circle: a -> b -> a"):
        import_map.floors({"a": {"b"}, "b": {"a"}})


@pytest.mark.parametrize(
    "text, found",
    [
        ("solve (2.8) and f(3.3)", ["(2.8)"]),
        ("(3.5a), that is (4.2b)", ["(3.5)a", "(4.2)b"]),
        ("what (4.2) - (4.4) are made of", ["(4.2)", "(4.3)", "(4.4)"]),
        ("Tikhonov (2.11, 4.6) of size (1.5, 2.1)", ["(2.11)", "(4.6)"]),
        ("Theorem\n3.2, Theorems 2.1 and 2.2", ["Theorem 2.1", "Theorem 2.2", "Theorem 3.2"]),
        ("(A1) of 3.2, Algorithm 2; Theorem 9.9 and (0.5)", ["(A1) of 3.2", "Algorithm 2"]),
    ],
)
def test_numbers_are_found_in_a_text(docs, text, found):
    import equations

    assert sorted("".join(reference) for reference in equations.references(text)) == found


PLAIN = r"""f(t) of (3.3)

With |s|, **kwargs, a* b_ and \sigma, all of *this* and `Psi^T M <f, r>`s or ``x``:
    f_t = sigma(a - |B| f*)
where, for layers l,

    x = *y,

        z_

    z = 2

- one item of
  two lines

      formula_

- another

====  ======
name  value
====  ======
a_    |s|
b     - c*
====  ======

>>> 1 + 1
2

Parameters
----------
x_
    Of *this* |kind|:

        x_ = |y|
"""


def test_plain_text_becomes_restructuredtext_without_a_complaint(docs):
    import plain_text
    from docutils import nodes
    from docutils.core import publish_doctree

    lines = plain_text.to_rst(PLAIN.splitlines())
    lines = lines[: lines.index("Parameters")] + lines[lines.index("Parameters") + 3 :]  # which numpydoc reads
    tree = publish_doctree("\n".join(lines), settings_overrides={"report_level": 5})
    assert [message.astext() for message in tree.findall(nodes.system_message)] == []
    formulas = [node.astext() for node in tree.findall(nodes.literal_block)]
    assert formulas == ["f_t = sigma(a - |B| f*)", "x = *y,\n\n    z_\n\nz = 2", "formula_", "x_ = |y|"]
    assert [node.astext() for node in tree.findall(nodes.literal)] == ["Psi^T M <f, r>", "x"]
    assert [node.astext() for node in tree.findall(nodes.emphasis)] == ["this", "this"]
    text = tree.astext()
    for part in (r"With |s|, **kwargs, a* b_ and \sigma, all", "a_", "|s|", "- c*"):
        assert part in text


def test_what_the_docs_need_is_pinned_and_installed():
    lines = (ROOT / "containers" / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines}
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    assert wanted and set(wanted) <= pinned
    assert re.search(r"\^\(.*\bdocs\b.*\) = ", (ROOT / "containers" / "run").read_text())


@pytest.mark.parametrize("page", ["README.md", *map(str, PAGES)])
def test_links_lead_to_files(page):
    """Links into the repository; Sphinx itself warns of links to pages that docs/conf.py makes."""
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    links = [link for link in links if not re.match(r"(\.\./)?generated/", link)]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
    assert links or page != "README.md"


def test_every_slip_of_the_list_has_its_test_and_every_test_its_row():
    rows = [line for line in (ROOT / "docs" / "reference" / "slips.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| where |")]
    named = [re.search(r"`(test_\w+)` \|$", row) for row in rows]
    assert rows and all(named), [row for row, name in zip(rows, named) if not name]
    written = []
    for path in (ROOT / "tests").rglob("test_slips*.py"):
        written += re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    assert sorted(name[1] for name in named) == sorted(written)


def test_the_page_of_sections_2_to_5_lacks_none_of_their_numbers(docs):
    import equations

    page = (ROOT / "docs" / "explanation" / "theory.md").read_text()
    assert not [name for name in equations.names() if name not in page]
    files = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    for row in re.findall(r"^\| .* \|$", page, re.M):
        _, code, shown, _ = (cell.strip() for cell in row[1:-1].split("|"))
        named = re.findall(r"`(test_\w+(?:\.py)?)`", shown)
        assert named or shown == "test", row
        for name in named:
            assert name in files or name in equations.tests(), row
        for name, attribute in re.findall(r"`(\w+)(?:\.(\w+))?[`(]", code):
            assert hasattr(getattr(fem_resnet, name, None), attribute or "__doc__") or name == "gradient_flow", row
            assert hasattr(fem_resnet, name) or name == "gradient_flow", row
        for name in re.findall(r"demos/(\w+)\.rst|`(\w+)\.py`", row):
            assert (
                name[1] in {test.removesuffix(".py") for test in named} or (ROOT / "demos" / f"{''.join(name)}.py").exists()
            ), row


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
