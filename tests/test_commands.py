"""`python -m fem_resnet`: each command does what its help says, and says what is wrong in a sentence."""

import json
import re

import pytest
from firedrake import COMM_WORLD
from problems import learning_problem, network

from fem_resnet import __version__, save
from fem_resnet.__main__ import COMMANDS, main

on_ranks = pytest.mark.parallel([1, 2])


def ended(*arguments):
    """The exit code of a command, also where it ends by itself."""
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


def test_the_help_names_all_commands_and_each_has_a_help_of_its_own(capsys):
    assert ended("--help") == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in COMMANDS)
    for name in COMMANDS:
        assert ended(name, "--help") == 0
        assert f"python -m fem_resnet {name}".replace(" verify", ".verify") in capsys.readouterr().out


def test_a_wrong_command_is_told_with_the_nearest(capsys):
    assert ended("verfy") == 2
    assert "expected one of verify, info, report, demo, got 'verfy'; did you mean 'verify'?" in capsys.readouterr().err


@on_ranks
def test_info_has_the_versions(capsys):
    assert ended("info") == 0
    out = capsys.readouterr().out
    if COMM_WORLD.rank:
        assert not out
        return
    rows = dict(line.split(None, 1) for line in out.splitlines())
    assert rows["fem_resnet"].startswith(f"{__version__}, ")
    assert rows["layers"] == "compiled" and rows["MPI"].endswith(f"{COMM_WORLD.size} ranks")
    assert re.fullmatch(r"\d{4}\.\d+.*", rows["firedrake"])


@on_ranks
def test_report_tells_of_a_saved_network_what_its_layers_do(tmp_path, capsys):
    folder = COMM_WORLD.bcast(tmp_path)
    problem = learning_problem(network("disk", "CG1", bias="basis"))
    save(folder / "net.h5", problem.net, problem.head)
    capsys.readouterr()
    assert ended("report", str(folder / "net.h5"), "--json", str(folder / "net.json")) == 0
    out = capsys.readouterr().out
    if COMM_WORLD.rank == 0:
        assert "ResidualNetwork(3 layers" in out and "Head(softmax" in out
        assert re.search(r"^kernel +3 +\d", out, re.MULTILINE)
        assert re.search(r"^layer +t +grows", out.replace("  layer", "layer"), re.MULTILINE)
        assert len(json.loads((folder / "net.json").read_text())["layers"]) == 3
    assert ended("report", str(folder / "nothing.h5")) == 2
    if COMM_WORLD.rank == 0:
        assert re.match("fem_resnet report: .*nothing.h5", capsys.readouterr().err)


def test_report_takes_a_module_with_a_problem(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("from fem_resnet.verify import BUILT_IN\nproblem = next(iter(BUILT_IN.values()))\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "wrong.py").write_text("def problem():\n    return 3\n")
    assert ended("report", str(tmp_path / "mine.py")) == 0
    assert "grows" in capsys.readouterr().out
    for name, message in (("empty", "expected a function problem"), ("wrong", "expected a LearningProblem, got int")):
        assert ended("report", str(tmp_path / f"{name}.py")) == 2
        assert message in capsys.readouterr().err


def test_demo_lists_the_demos_and_runs_the_one_that_is_named(capsys, monkeypatch):
    assert ended("demo") == 0
    assert re.search(r"^digits_on_a_disk  +\w", capsys.readouterr().out, re.MULTILINE)
    assert ended("demo", "digits_on_the_disk") == 2
    assert "did you mean 'digits_on_a_disk'?" in capsys.readouterr().err
    ran = []
    monkeypatch.setattr("fem_resnet.commands.demo.runpy.run_path", lambda path, run_name: ran.append((path, run_name)))
    monkeypatch.setattr("sys.argv", ["before"])
    monkeypatch.setattr("sys.path", [])
    assert ended("demo", "limits", "--short") == 0
    ((path, name),) = ran
    assert path.endswith("/demos/limits.py") and name == "__main__"
