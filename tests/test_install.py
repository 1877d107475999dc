"""`containers/run`: steps, stamps, lock and trees. The real steps are replaced by stubs that take no time."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUBS = """
steps=(first second third)
declare -A packages=([debian]="some-library" [first]="a" [second]="b" [third]="c")
pins() { cat "$tree/containers/pins/$1"; }
install_first() { echo first >>"$home/ran"; mkdir -p "$env/bin"; }
install_second() { echo second >>"$home/ran"; . "$tree/containers/second"; }
install_third() { echo third >>"$home/ran"; }
check_machine() { :; }
title() { echo "step $1"; }
"""


@pytest.fixture
def clone(tmp_path):
    """A clone whose script has stubs for steps, with a home of its own."""
    script = (ROOT / "containers" / "run").read_text()
    call = script.index('\nmain "$@"')
    pins = tmp_path / "containers" / "pins"
    pins.mkdir(parents=True)
    for name in ("first", "second", "third"):
        (pins / name).write_text(f"{name}==1\n")
    (tmp_path / "containers" / "second").write_text("true\n")
    (tmp_path / "containers" / "run").write_text(script[:call] + STUBS + script[call:])
    return tmp_path


def start(clone, *command, **variables):
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_CONSTRAINT")}
    environment = inherited | {"FEM_RESNET_HOME": str(clone / "home")} | variables
    return subprocess.Popen(
        ["bash", str(clone / "containers" / "run"), *command],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(clone, *command, **variables):
    process = start(clone, *command, **variables)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] == "Z"
    except OSError:
        return True


def steps_run(clone):
    return (clone / "home" / "ran").read_text().split()


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for 30 s"
        time.sleep(0.02)


def test_steps_run_once_in_order_and_say_how_long_they_took(clone):
    # the lock is free while the command runs, which may take days
    code, out, err = run(clone, "flock", "--nonblock", str(clone / "home" / "lock"), "echo", "hello")
    assert (code, out) == (0, "hello\n"), err
    assert re.fullmatch(r"(\[\d/3\] step \w+ \.\.\. \d+ s\n){3}", err)
    code, out, err = run(clone, "echo", "again")
    assert (code, out, err) == (0, "again\n", "")
    assert steps_run(clone) == ["first", "second", "third"]


@pytest.mark.parametrize(
    "file, old, new",
    [("pins/second", "second==1", "second==2"), ("run", "echo second >>", "echo second | cat >>")],
    ids=["pin", "recipe"],
)
def test_a_changed_step_and_those_after_it_are_built_again(clone, file, old, new):
    run(clone, "true")
    changed = clone / "containers" / file
    changed.write_text(changed.read_text().replace(old, new))
    run(clone, "true")
    assert steps_run(clone) == ["first", "second", "third", "second", "third"]


def test_going_back_to_old_pins_after_a_half_finished_build_builds_again(clone):
    run(clone, "true")
    pins, second = clone / "containers" / "pins" / "first", clone / "containers" / "second"
    pins.write_text("first==2\n")
    second.write_text("exit 1\n")
    assert run(clone, "true")[0] == 1
    pins.write_text("first==1\n")
    second.write_text("true\n")
    assert run(clone, "true")[0] == 0
    assert steps_run(clone)[-3:] == ["first", "second", "third"]


def test_a_failed_step_shows_its_log_and_what_to_try(clone):
    (clone / "containers" / "second").write_text("echo the disk said: No space left on device; exit 3\n")
    code, _, err = run(clone, "echo", "never")
    assert code == 1
    for part in ("the disk said", "2-second.log", "Make room on the disk"):
        assert part in err
    (clone / "containers" / "second").write_text("true\n")
    assert run(clone, "true")[0] == 0
    assert steps_run(clone) == ["first", "second", "second", "third"]


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_call_leaves_nothing_running_that_the_next_one_meets(clone, by):
    file = clone / "home" / "pid"
    (clone / "containers" / "second").write_text('sleep 60 & echo $! >"$home/pid"; wait\n')
    process = start(clone, "true")
    wait_for(lambda: file.exists() and file.read_text().endswith("\n"))
    pid = int(file.read_text())
    process.send_signal(by)
    process.communicate(timeout=30)
    if by == signal.SIGTERM:  # the script handles it: nothing goes on until the next call
        wait_for(lambda: ended(pid))
    (clone / "containers" / "second").write_text("true\n")
    assert run(clone, "true")[0] == 0
    wait_for(lambda: ended(pid))
    assert steps_run(clone) == ["first", "second", "second", "third"]


def test_a_process_that_got_the_number_of_a_killed_step_is_left_alone(clone):
    (clone / "home").mkdir()
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        (clone / "home" / "building").write_text(f"{other.pid} 1\n")  # the step had started just after boot
        assert run(clone, "true")[0] == 0
        assert other.poll() is None
        other.kill()


def test_of_two_calls_at_once_the_second_waits_and_says_so(clone):
    (clone / "containers" / "second").write_text('touch "$home/there"; sleep 1\n')
    first = start(clone, "echo", "one")
    wait_for((clone / "home" / "there").exists)
    code, out, err = run(clone, "echo", "two")
    assert (code, out) == (0, "two\n")
    assert "waiting" in err
    assert first.communicate(timeout=30)[0] == "one\n"
    assert steps_run(clone) == ["first", "second", "third"]


def test_what_one_clone_built_another_one_uses_for_its_own_code(clone, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(clone / "containers", other / "containers")
    assert run(clone, "printenv", "PYTHONPATH")[1] == f"{clone}\n"
    environment = os.environ | {"FEM_RESNET_HOME": "home", "PYTHONPATH": str(clone)}  # as seen from clone
    command = ["bash", other / "containers" / "run", "printenv", "PYTHONPATH", "VIRTUAL_ENV"]
    second = subprocess.run(command, env=environment, cwd=clone, capture_output=True, text=True, timeout=60)
    assert (second.stdout.split(), second.stderr) == ([str(other), str(clone / "home" / "env")], "")
    assert steps_run(clone) == ["first", "second", "third"]


def test_no_command_is_refused_with_the_usage(clone):
    code, _, err = run(clone)
    assert code == 1
    assert "usage: containers/run CMD ARGS" in err


def test_two_clones_share_what_was_built_and_never_see_each_others_code(tmp_path):
    home = Path(sys.prefix).parent
    if not (home / "stamps").is_dir():
        pytest.skip("this Python was not installed by containers/run")
    program = "import fem_resnet, sys; print(fem_resnet.__file__); print(sys.prefix)"
    for name in ("one", "two"):
        shutil.copytree(ROOT / "containers", tmp_path / name / "containers")
        shutil.copy(ROOT / "pyproject.toml", tmp_path / name)
        (tmp_path / name / "fem_resnet").mkdir()
        (tmp_path / name / "fem_resnet" / "__init__.py").touch()
        started = time.monotonic()
        result = subprocess.run(
            [tmp_path / name / "containers" / "run", "python", "-c", program],
            env=os.environ | {"FEM_RESNET_HOME": str(home)}, cwd="/", capture_output=True, text=True, check=True,
        )  # fmt: skip
        # the script alone takes half a second; the rest is for the start of Python and a busy machine
        assert time.monotonic() - started < 5
        assert result.stdout.split() == [str(tmp_path / name / "fem_resnet" / "__init__.py"), sys.prefix]


def test_the_user_s_own_modules_come_after_the_tree(clone):
    code, out, err = run(clone, "bash", "-c", "echo $PYTHONPATH $PIP_CONSTRAINT", PYTHONPATH="/mine:/other")
    assert (code, out.split()) == (0, [f"{clone}:/mine:/other", str(clone / "containers" / "constraints.txt")]), err
    code, out, _ = run(clone, "bash", "-c", "echo $PYTHONPATH", PYTHONPATH="")
    assert out == f"{clone}\n"


def test_help_is_the_head_of_the_script_and_unknown_options_are_refused(clone):
    code, out, _ = run(clone, "--help")
    assert code == 0 and "--doctor" in out and "--clean" in out and "#" not in out
    code, _, err = run(clone, "--docter")
    assert code == 1 and "expected a command, --doctor, --clean or --help, got --docter" in err
    assert not (clone / "home").exists()


def test_clean_removes_kernels_and_logs_and_with_all_the_environment(clone):
    code, _, err = run(clone, "--clean")
    assert code == 1 and "nothing is installed" in err
    run(clone, "true")
    home = clone / "home"
    (home / "cache").mkdir()
    (home / "mine").touch()
    code, _, err = run(clone, "--clean", "all", "of", "it")
    assert code == 1 and "expected --clean or --clean all" in err
    assert run(clone, "--clean")[0] == 0
    assert not (home / "cache").exists() and not (home / "log").exists() and (home / "env").exists()
    assert run(clone, "true")[0] == 0 and steps_run(clone) == ["first", "second", "third"]
    assert run(clone, "--clean", "all")[0] == 0
    assert sorted(path.name for path in home.iterdir()) == ["mine", "ran"]  # what is not ours stays


def test_clean_waits_for_nobody_who_installs(clone):
    (clone / "containers" / "second").write_text("sleep 60\n")
    process = start(clone, "true")
    wait_for(lambda: (clone / "home" / "ran").exists() and len(steps_run(clone)) == 2)
    code, _, err = run(clone, "--clean", "all")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert code == 1 and "another call is installing" in err and (clone / "home" / "env").exists()


def test_doctor_examines_and_says_what_to_try(clone):
    """With commands that stand for Python and mpiexec, of which one fails."""
    commands = clone / "home" / "env" / "bin"
    run(clone, "true")
    commands.mkdir(parents=True, exist_ok=True)
    (commands / "python").write_text('#!/bin/sh\ncase "$*" in *taylor_test*) echo the rate is 1; exit 1;; esac\necho "$*"\n')
    (commands / "mpiexec").write_text('#!/bin/sh\nshift 2\n"$@"\n')
    for name in ("python", "mpiexec"):
        (commands / name).chmod(0o755)
    code, out, err = run(clone, "--doctor")
    assert code == 1, err
    assert re.search(r"^ok +MPI starts two ranks \(\d+ s\)$", out, re.MULTILINE)
    assert re.search(r"^ok +a kernel is compiled", out, re.MULTILINE)
    assert re.search(r"^FAILED +an adjoint is right: run .*\n +the rate is 1$", out, re.MULTILINE)
    assert out.endswith("-m fem_resnet info\n")
    (commands / "python").write_text("#!/bin/sh\n")
    assert run(clone, "--doctor")[0] == 0


@pytest.fixture
def own(clone):
    """A PETSc as a user may have one, with the compiler wrapper of its MPI, and steps of the usual names."""
    petsc, wrapper = clone / "petsc", clone / "mpi" / "bin" / "mpicc"
    (petsc / "include").mkdir(parents=True)
    (petsc / "opt" / "lib" / "petsc" / "conf").mkdir(parents=True)
    (petsc / "opt" / "include").mkdir()
    version = re.search(r"^petsc==(\d+)\.(\d+)", (ROOT / "containers" / "constraints.txt").read_text(), re.MULTILINE)
    (petsc / "include" / "petscversion.h").write_text(
        f"#define PETSC_VERSION_MAJOR      {version[1]}\n#define PETSC_VERSION_MINOR {version[2]}\n"
    )
    (petsc / "opt" / "include" / "hdf5.h").touch()
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text("#!/bin/sh\n")
    wrapper.chmod(0o755)
    (petsc / "opt" / "lib" / "petsc" / "conf" / "petscvariables").write_text(f"PCC = {wrapper}\nPETSC_SCALAR = real\n")
    shutil.copy(ROOT / "containers" / "constraints.txt", clone / "containers")
    script = clone / "containers" / "run"
    text = (
        script.read_text()
        .replace("check_machine() { :; }\n", "")
        .replace(
            "steps=(first second third)",
            "steps=(debian petsc third)\ninstall_debian() { exit 9; }\ninstall_petsc() { exit 9; }",
        )
        .replace('declare -A packages=([debian]="some-library"', 'declare -A packages=([debian]="no-such-package"')
    )
    script.write_text(text.replace('pins() { cat "$tree/containers/pins/$1"; }', 'pins() { echo "$1"; }'))
    return {"PETSC_DIR": str(petsc), "PETSC_ARCH": "opt"}


def test_a_petsc_of_the_user_s_own_is_used_without_debian_packages_and_kept(clone, own):
    show = "echo $PETSC_DIR $PETSC_ARCH; command -v mpicc"
    expected = [own["PETSC_DIR"], "opt", str(clone / "mpi" / "bin" / "mpicc")]
    code, out, err = run(clone, "bash", "-c", show, **own)
    assert (code, out.split()) == (0, expected), err
    assert "[1/1] step third" in err and steps_run(clone) == ["third"]
    for later in ({}, {"PETSC_DIR": "/another", "PETSC_ARCH": ""}):  # what was chosen stays
        code, out, err = run(clone, "bash", "-c", show, **later)
        assert (code, out.split(), err) == (0, expected, "")


def test_a_petsc_in_the_shell_does_not_change_what_is_installed_already(clone, own):
    (clone / "containers" / "run").write_text((clone / "containers" / "run").read_text().replace("exit 9", "true"))
    (clone / "home" / "stamps").mkdir(parents=True)
    code, out, _ = run(clone, "bash", "-c", "echo ${PETSC_DIR:-none}", **own)
    assert not (clone / "home" / "own").exists() and (code == 1 or out == "none\n")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"PETSC_DIR": "/nowhere"},
            "PETSC_DIR: expected a PETSc with include/petscversion.h and opt/lib/petsc/conf",
        ),
        ({"PETSC_ARCH": "debug"}, "PETSC_DIR: expected a PETSc with .*debug/lib/petsc/conf"),
        ({"version": "3.1"}, r"PETSC_DIR: expected PETSc [\d.]+, with which Firedrake [\d.]+ goes, found 3.1"),
        ({"MPICC": "/nowhere/mpicc"}, "MPICC: expected the compiler wrapper of the MPI"),
        ({"HDF5_DIR": "/nowhere"}, "HDF5_DIR: expected a parallel HDF5 with include/hdf5.h, found none in /nowhere"),
        ({"scalar": "complex"}, "PETSC_DIR: expected a PETSc of real numbers"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_petsc_that_does_not_fit_is_refused_before_anything_is_installed(clone, own, change, message):
    petsc = Path(own["PETSC_DIR"])
    if "version" in change:
        (petsc / "include" / "petscversion.h").write_text("#define PETSC_VERSION_MAJOR 3\n#define PETSC_VERSION_MINOR 1\n")
    if "scalar" in change:
        conf = petsc / "opt" / "lib" / "petsc" / "conf" / "petscvariables"
        conf.write_text(conf.read_text().replace("real", "complex"))
    code, _, err = run(clone, "true", **own | {name: value for name, value in change.items() if name.isupper()})
    assert code == 1 and re.search(message, err), err
    assert not (clone / "home").exists()


def test_every_pinned_version_has_the_hashes_of_its_files():
    """Made by `uv pip compile --universal --no-deps --generate-hashes`; another version asks for others (CONTRIBUTING.md)."""
    pins = {
        _name(line.replace("==", " ")): line.split("==")[1]
        for line in (ROOT / "containers" / "constraints.txt").read_text().split("\n")
        if re.match(r"\w", line)
    }
    blocks = (ROOT / "containers" / "hashes.txt").read_text().replace("\\\n", " ").splitlines()
    hashed = {_name(line.replace("==", " ")): line.split() for line in blocks if re.match(r"\w", line)}
    assert pins == {name: parts[0].split("==")[1] for name, parts in hashed.items()}
    for name, parts in hashed.items():
        assert parts[1:] and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", part) for part in parts[1:]), name
    calls = re.findall(r"-m pip install (\S+)", (ROOT / "containers" / "run").read_text())
    assert len(calls) == 2 and set(calls) == {"--require-hashes"}


def _name(requirement):
    return re.split(r"[\[<>= ]", requirement)[0].lower().replace("_", "-")


def _project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _extras(*but):
    """What the extras ask for. That of onnx is pinned, and installed, with the peers."""
    return {extra: names for extra, names in _project()["optional-dependencies"].items() if extra not in but}


def test_every_pinned_package_is_pinned_once_and_every_dependency_is_pinned():
    lines = (ROOT / "containers" / "constraints.txt").read_text().splitlines()
    names = [line.split("==")[0].lower().replace("_", "-") for line in lines if line and not line.startswith("#")]
    assert len(names) == len(set(names))
    wanted = _project()["dependencies"] + [name for names in _extras("onnx").values() for name in names]
    assert not set(map(_name, wanted)) - set(names)


def test_the_script_installs_all_dependencies_and_all_extras_but_those_of_600_megabytes_and_of_the_peers():
    script = (ROOT / "containers" / "run").read_text()
    command = re.search(r"^requirements\(\) \{\n(.*?)^\}", script, re.DOTALL | re.MULTILINE)[1]
    listed = subprocess.run(
        ["bash", "-c", command], env=os.environ | {"tree": str(ROOT)}, capture_output=True, text=True, check=True
    ).stdout
    project = _project()
    assert listed.split() == project["dependencies"] + [name for names in _extras("vtk", "onnx").values() for name in names]


def _imported(*folders):
    """The distributions that files in the folders import, also inside of functions."""
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*.py") if not {"generated", "_build"} & set(path.parts)
    ]
    line = re.compile(r"^ *(?:from ([\w.]+) import .*|import ([\w.]+)(?: as \w+)?(?:  # .*)?)$", re.MULTILINE)
    found = {"".join(names).split(".")[0] for path in files for names in line.findall(path.read_text())}
    ours = {path.stem for folder in ("tests", "demos", "docs") for path in (ROOT / folder).rglob("*.py")} | {"fem_resnet"}
    distributions = _distributions()
    return {_name(distributions.get(module, [module])[0]) for module in found - ours - set(sys.stdlib_module_names)}


_distributions = cache(packages_distributions)


def test_dependencies_are_what_the_package_imports_and_extras_what_the_rest_does():
    project = _project()
    of = {extra: set(map(_name, names)) for extra, names in project["optional-dependencies"].items()}
    needed = set(map(_name, project["dependencies"]))
    optional = of["estimators"] | of["meshes"] | of["vtk"] | of["onnx"] | PEERS
    assert needed <= _imported("fem_resnet") <= needed | optional
    assert _imported("demos") - needed == of["demos"]
    by_tests = _imported("tests") - needed - PEERS
    brought = {"docutils", "jinja2", "pillow"}  # by Sphinx and matplotlib
    assert not by_tests - of["demos"] - of["test"] - of["docs"] - brought
    assert not _imported("docs") - needed - of["docs"] - brought


#: Packages that the benchmarks compare with; they are installed by hand (tests/benchmarks/README.md).
PEERS = {"torch", "jax", "torchdiffeq", "diffrax", "hj-reachability", "onnx", "onnxruntime"}


@pytest.fixture
def machine(clone):
    """The clone, which checks a machine with some made-up commands: `machine(df="...")`."""
    script = clone / "containers" / "run"
    script.write_text(script.read_text().replace("check_machine() { :; }\n", ""))
    commands = clone / "commands"
    commands.mkdir()

    def run_on(**programs):
        for name, body in ({"dpkg-query": "echo installed"} | programs).items():
            (commands / name.replace("_", "-")).write_text(f"#!/bin/sh\n{body}\n")
            (commands / name.replace("_", "-")).chmod(0o755)
        environment = {"PATH": f"{commands}:/usr/bin:/bin", "FEM_RESNET_HOME": str(clone / "home")}
        return subprocess.run(["bash", script, "true"], env=environment, capture_output=True, text=True, timeout=60)

    return run_on


PYTHON = {"python3": "exit 0"}


def test_a_machine_that_has_what_it_takes_is_installed_on(machine):
    assert machine(**PYTHON).returncode == 0


@pytest.mark.parametrize(
    "programs, message",
    [
        ({"df": "echo head; echo /dev/x 9 9 1048576 9% /"}, "expected 4 GiB free in .*, found 1: make room or set FEM_RES"),
        (
            dict.fromkeys(("python3", "python3.11", "python3.12", "python3.13"), "test $# = 1 && echo Python 3.9.2; exit 1"),
            "expected Python 3.11, 3.12 or 3.13, found Python 3.9.2: put",
        ),
    ],
    ids=["too little disk", "wrong Python"],
)  # fmt: skip
def test_what_a_machine_lacks_is_said_before_any_step(machine, programs, message):
    result = machine(**(PYTHON | programs))
    assert result.returncode == 1
    assert re.search(message, result.stderr), result.stderr
    assert "[1/3]" not in result.stderr


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can become somebody else")
def test_missing_packages_are_named_to_a_user_who_may_not_install_them(machine, clone):
    for folder in (clone, *clone.parents):
        if folder.owner() == "root" and folder.is_relative_to("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o055)
    commands, nobody = clone / "commands", clone / "nobody"
    nobody.mkdir()
    os.chown(nobody, 65534, 65534)
    machine(**PYTHON, sudo="exit 1")
    (commands / "dpkg-query").write_text("#!/bin/sh\nexit 1\n")
    result = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", "bash", clone / "containers" / "run", "true"],
        env={"PATH": f"{commands}:/usr/bin:/bin", "FEM_RESNET_HOME": str(nobody / "home")},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 1
    assert "apt-get install --no-install-recommends some-library" in result.stderr
    assert not list(nobody.iterdir())
