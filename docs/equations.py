"""The mathematics next to the code: a table of numbered equations and statements, the code that names them, its tests.

A docstring that names a number, as in "solve (2.8)", "(4.2a)", "(4.2) - (4.4)", "Theorem 3.2", "(A1) of 3.2", stands
for what it belongs to. A test shows a number if its docstring or a comment in it names it, or the docstring or a
comment of its file.

    containers/run python docs/equations.py            prints the page
"""

import ast
import io
import re
import tokenize
from collections import defaultdict
from functools import cache
from typing import NamedTuple

from package import ROOT, docstrings, documented, role

#: Every number of the paper by section; the letters of an equation's parts behind it.
EQUATIONS = {
    "2.1": "2.1 2.2ab 2.3ab 2.4ab 2.5ab 2.6ab 2.7ab",
    "2.2": "2.8 2.9",
    "2.3": "2.10ab",
    "2.4": "2.11a",
    "3.1": "3.1",
    "3.2": "3.2ab 3.3 3.4",
    "3.3": "3.5ab",
    "3.5": "3.6",
    "4.1": "4.1ab 4.2ab 4.3 4.4 4.5 4.6 4.7ab",
    "4.2": "4.8 4.9 4.10ab",
    "4.3": "4.11 4.12",
    "5.1": "5.1ab",
}
STATEMENTS = {
    "2.1": ["(A1) of 2.1", "(A2) of 2.1", "Theorem 2.1", "(A3) of 2.1", "Theorem 2.2"],
    "3.1": ["Assumption 1", "Theorem 3.1"],
    "3.2": ["(A1) of 3.2", "(A2) of 3.2", "Remark 3.1", "Theorem 3.2"],
    "3.3": ["Lemma 3.3", "Theorem 3.4"],
    "3.4": ["Proposition 3.5"],
    "4.1": ["Proposition 4.1", "Remark 4.1", "Remark 4.2"],
    "4.2": ["Remark 4.3"],
    "4.3": ["Theorem 4.2", "Remark 4.4", "Theorem 4.3"],
    "5.1": ["Algorithm 1"],
    "5.2": ["Algorithm 2"],
}
# Equation (4.2) with its parts: {"(4.2)": "ab"}, in the paper's order.
PARTS = {
    f"({name.rstrip('ab')})": name.lstrip("0123456789.") for row in EQUATIONS.values() for name in row.split()
}
_ORDER = list(PARTS)

_ONE = r"\((\d\.\d+)([a-d]?)\)"
_EQUATIONS = re.compile(rf"(?<![\w.)\]]){_ONE}(?:\s*(?:-|–|to)\s*{_ONE})?")
_LIST = re.compile(r"(?<![\w.)\]])\((\d\.\d+[a-d]?(?:,\s+\d\.\d+[a-d]?)+)\)")
_STATEMENT = re.compile(
    r"\b(Theorem|Proposition|Lemma|Remark|Algorithm|Assumption)s?\s+(\d(?:\.\d+)?)(?:\s*(?:,|and|to)\s+(\d\.\d+))?"
)
_ASSUMPTION = re.compile(r"\(A_?([123])\)\s+(?:of|in)\s+(?:section\s+)?(2\.1|3\.2)")


class Reference(NamedTuple):
    """A numbered equation or statement, and the part of it that is named: ("(4.2)", "b")."""

    number: str
    part: str = ""


def references(text: str) -> set[Reference]:
    """The numbers of the paper that a text names."""
    found = set()
    for first, part, last, last_part in _EQUATIONS.findall(text):
        found |= {Reference(f"({first})", part), Reference(f"({last or first})", last_part if last else part)}
        ends = [_ORDER.index(f"({number})") for number in (first, last) if f"({number})" in PARTS]
        found |= {Reference(number) for number in _ORDER[min(ends, default=0) + 1 : max(ends, default=0)]}
    for numbers in _LIST.findall(text):
        listed = {
            Reference(f"({name.rstrip('abcd')})", name.lstrip("0123456789.")) for name in re.split(r",\s+", numbers)
        }
        found |= listed if all(reference.number in PARTS for reference in listed) else set()
    for kind, *numbers in _STATEMENT.findall(text):
        found |= {Reference(f"{kind} {number}") for number in numbers if number}
    found |= {Reference(f"(A{number}) of {section}") for number, section in _ASSUMPTION.findall(text)}
    known = PARTS.keys() | {name for names in STATEMENTS.values() for name in names}
    return {reference for reference in found if reference.number in known}


@cache
def in_code() -> dict[str, list[tuple[str, str, str]]]:
    """Who names a number: module, qualified name and part of the equation."""
    found = defaultdict(list)
    for module, name, text in docstrings():
        for reference in sorted(references(text)):
            found[reference.number].append((module, name, reference.part))
    return found


@cache
def in_tests() -> dict[str, set[str]]:
    """Tests and files of tests that name a number."""
    found = defaultdict(set)
    for path in (ROOT / "tests").glob("test_*.py"):
        for number, name in _named_in(path.name, path.read_text()):
            found[number].add(name)
    return found


def _named_in(file, source):
    tree = ast.parse(source)
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test")]
    found = set()

    def note(text, line):
        test = next((test.name for test in tests if _first_line(test) <= line <= test.end_lineno), None)
        found.update((number, f"{file}::{test}" if test else file) for number, _ in references(text))

    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            note(ast.get_docstring(node), node.body[0].lineno)
    for line, text in _comments(source):
        note(text, line)
    return found


def _first_line(test):
    return min(node.lineno for node in [test, *test.decorator_list])


def _comments(source):
    """First line and text of the comments; lines below each other are one."""
    last = -1
    comments = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("#: ")
            if token.start[0] == last + 1:
                comments[-1] = (comments[-1][0], f"{comments[-1][1]}\n{text}")
            else:
                comments.append((token.start[0], text))
            last = token.start[0]
    return comments


def gaps() -> list[str]:
    """What is not named by a public class or function and by a test: the numbers, of equations with their parts."""
    return [
        name for number in _ORDER + [name for names in STATEMENTS.values() for name in names] for name in _printed(number)
        if not (_is_named(number, name) and number in in_tests())
    ]  # fmt: skip


def pages() -> dict[str, str]:
    """Page texts by file name."""
    equations = [(section, f"({name.rstrip('ab')})") for section, row in EQUATIONS.items() for name in row.split()]
    statements = [(section, name) for section, names in STATEMENTS.items() for name in names]
    total = sum(len(_printed(number)) for _, number in equations + statements)
    text = f"""# The mathematics next to the code

The numbers are those of H. Liu and P. Markowich, *Selection dynamics for deep neural networks*. What stands under
"code" names the number in its docstring, what stands under "tests" in its docstring or in a comment; a file of tests
stands for what is said at its top. The page is made from the sources; {total - len(gaps())} of {total} numbers have both.

## Equations

{_table(equations)}

## Statements, assumptions and algorithms

{_table(statements)}
"""
    return {"equations.md": text}


def _printed(number):
    """The names of a number's parts: (4.2a) and (4.2b) of (4.2)."""
    return [f"{number[:-1]}{part})" for part in PARTS.get(number, "")] or [number]


def _is_named(number, name):
    parts = {part for module, code, part in in_code().get(number, ()) if code != module and code in documented()}
    return "" in parts or bool(PARTS.get(number)) and name[-2] in parts


def _table(rows):
    lines = ["| number | section | code | tests |", "|---|---|---|---|"]
    for section, number in rows:
        code = [
            role(name, module) + (f" ({', '.join(sorted(filter(None, parts)))})" if any(parts) else "")
            for (module, name), parts in _by_name(in_code().get(number, [])).items()
        ]
        tests = [f"`{name}`" for name in sorted(in_tests().get(number, ()))]
        lines.append(f"| {', '.join(_printed(number))} | {section} | {'<br>'.join(code)} | {'<br>'.join(tests)} |")
    return "\n".join(lines)


def _by_name(found):
    by_name = defaultdict(set)
    for module, name, part in found:
        by_name[module, name].add(part)
    return by_name


if __name__ == "__main__":
    print(pages()["equations.md"])
