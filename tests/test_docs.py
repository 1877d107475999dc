"""The pages of docs/ are built without a warning, from plain docstrings and from the demos."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

import fem_resnet

ROOT = Path(__file__).parents[1]


@pytest.fixture
def docs(monkeypatch):
    """The modules that make the pages can be imported."""
    monkeypatch.syspath_prepend(ROOT / "docs")


BUILT = ROOT / "docs" / "_build" / "tested"
SPHINX = (sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-a", "-b", "html", "docs", str(BUILT))


@pytest.mark.beside(*SPHINX)
def test_docs_are_built_without_a_warning(printed):
    pages = BUILT / "generated"
    assert "fem_resnet.network.network.ResidualNetwork" in (pages / "api" / "fem_resnet.network.network.html").read_text()
    assert "The label domain, the network and the head" in (pages / "demos" / "digits_on_a_disk.html").read_text()
    for demo, words in {
        "costate_twice": "gradient at dt/8",
        "mesh_independence": "longest/shortest  function space",
        "same_network_other_mesh": "smallest order by the last refinement: ",
        "digits_table": "| support vector machine, no copies |",
    }.items():
        text = (pages / "demos" / f"{demo}.html").read_text()
        assert words in text[text.index("What it prints") :], demo
    assert "api/fem_resnet.network.network.html" in (pages / "equations.html").read_text()


def test_the_table_of_equations_finds_the_network(docs):
    import equations

    assert ("fem_resnet.network.network", "fem_resnet.network.network", "") in equations.in_code()["(2.8)"]
    assert "test_order.py" in equations.in_tests()["(2.8)"]
    (row,) = [line for line in equations.pages()["equations.md"].splitlines() if line.startswith("| (2.8) ")]
    assert "<fem_resnet.network.network>" in row and "`test_order.py`" in row


def test_the_table_of_tools_has_every_declaration(docs):
    import tools

    from fem_resnet.features import TOOLS

    rows = {line.split("`")[1]: line for line in tools.pages()["tools.md"].splitlines() if line.startswith("| `")}
    assert {name: row.count(" x |") for name, row in rows.items()} == {name: len(names) for name, names in TOOLS.items()}


def test_every_number_of_the_paper_is_named_by_a_public_name_and_by_a_test(docs):
    import equations

    assert not equations.gaps()


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


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_to_files(page):
    """Those of the repository; what docs/conf.py makes is Sphinx's affair, which warns."""
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    links = [link for link in links if not link.startswith("generated/")]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
    assert links or page != "README.md"


def test_every_slip_of_the_list_has_its_test_and_every_test_its_row():
    rows = [line for line in (ROOT / "docs" / "slips.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| where |")]
    named = [re.search(r"`(test_\w+)` \|$", row) for row in rows]
    assert rows and all(named), [row for row, name in zip(rows, named) if not name]
    written = []
    for path in ("test_slips.py", "test_slips_in_learning.py"):
        written += re.findall(r"^def (test_\w+)", (ROOT / "tests" / path).read_text(), re.M)
    assert sorted(name[1] for name in named) == sorted(written)


def test_the_page_of_sections_2_and_3_lacks_none_of_their_numbers(docs):
    import equations

    page = (ROOT / "docs" / "theory.md").read_text()
    wanted = [f"({name.rstrip('ab')}{part})" for section in ("2.1", "2.2", "2.3", "2.4", "3.1", "3.2", "3.3", "3.5")
              for name in equations.EQUATIONS[section].split()
              for part in (name[len(name.rstrip("ab")) :] or [""])]  # fmt: skip
    wanted += [name for section in ("2.1", "3.1", "3.2", "3.3", "3.4") for name in equations.STATEMENTS[section]]
    assert not [name for name in wanted if name not in page]
    for row in re.findall(r"^\| .* \|$", page, re.M):
        _, code, tests, _ = (cell.strip() for cell in row[1:-1].split("|"))
        assert all((ROOT / "tests" / test).exists() for test in re.findall(r"`(test_\w+\.py)`", tests)), row
        for name in re.findall(r"`(\w+)[`.(]", code):
            assert hasattr(fem_resnet, name) or name == "gradient_flow", row
