"""The command of this program: same interpreter options, same script or module, same arguments."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from lightning.fabric.strategies.launchers.command import _hydra_arguments, interpreter_flags

PRINT = (
    "import sys; from lightning.fabric.strategies.launchers.command import command_of_this_program; "
    "print(*command_of_this_program()[1:], sep='\\n')"
)


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("python train.py -u", []),
        ("python -u train.py", ["-u"]),
        ("python -W error -X dev train.py -W x", ["-W", "error", "-X", "dev"]),
        ("python -Werror -Xdev -Bs train.py", ["-Werror", "-Xdev", "-Bs"]),
        ("python -BW error train.py", ["-BW", "error"]),
        ("python -u -m package.module -x", ["-u"]),
        ("python -um package.module", ["-u"]),
        ("python -mpackage.module", []),
        ("python --check-hash-based-pycs never -E train.py", ["--check-hash-based-pycs", "never", "-E"]),
        ("python -u -", ["-u"]),
        ("python", []),
    ],
)
def test_interpreter_flags_are_those_before_the_program(line, flags):
    assert interpreter_flags(line.split()) == flags


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["-u", "train.py", "a b"], ["-u", "train.py", "a b"]),
        (["-m", "package.module", "x"], ["-m", "package.module", "x"]),
        (["-m", "package"], ["-m", "package"]),
        (["package"], ["{folder}/package"]),
    ],
)
def test_the_command_names_the_same_program(programs, arguments, command):
    for name in ("train.py", "package/module.py", "package/__main__.py"):
        programs.write(PRINT, name)
    result = programs.run(*arguments)
    assert result.stdout.splitlines() == [word.format(folder=programs.folder) for word in command], result.stderr


@pytest.mark.parametrize("arguments", [["train.py", "a", "b"], ["-m", "package.module", "a", "b"]])
def test_arguments_that_the_program_has_taken_out_are_given_again(programs, arguments):
    for name in ("train.py", "package/module.py"):
        programs.write("import sys; del sys.argv[1]; " + PRINT, name)
    assert programs.run(*arguments).stdout.splitlines() == arguments


def test_arguments_that_another_program_has_put_there_are_kept(programs):
    programs.write(PRINT, "train.py")
    programs.write(
        "import runpy, sys; sys.argv = ['train.py', 'x']; runpy.run_path('train.py', run_name='__main__')", "wrap.py"
    )
    assert programs.run("wrap.py", "y").stdout.splitlines() == ["train.py", "x"]


def test_the_code_of_a_c_option_is_kept(programs):
    assert programs.run("-B", "-c", PRINT, "x").stdout.splitlines() == ["-B", "-c", PRINT, "x"]


def test_a_program_from_standard_input_cannot_be_run_again(programs):
    result = programs.run("-", stdin=PRINT)
    assert "RuntimeError: Launching several processes runs the script again" in result.stderr


def _hydra(mode, folder="/out/a=1,b", task=("lr=1",)):
    return SimpleNamespace(
        mode=SimpleNamespace(name=mode),
        runtime=SimpleNamespace(output_dir=folder),
        overrides=SimpleNamespace(task=task, hydra=["hydra.job.chdir=true", f"hydra.mode={mode}"]),
    )


def test_a_hydra_job_keeps_its_folder():
    assert _hydra_arguments(["lr=1"], _hydra("RUN")) == [
        "lr=1",
        'hydra.run.dir="/out/a=1,b"',
        "hydra.output_subdir=null",
    ]


def test_a_hydra_sweep_is_not_swept_again():
    arguments = ["-m", "lr=1,2", "+x=range(3)", "hydra.job.chdir=true", "--config-name", "big"]
    assert _hydra_arguments(arguments, _hydra("MULTIRUN", task=["lr=1", "+x=2"])) == [
        "--config-name",
        "big",
        "lr=1",
        "+x=2",
        "hydra.job.chdir=true",
        "hydra.mode=RUN",
        'hydra.run.dir="/out/a=1,b"',
        "hydra.output_subdir=null",
    ]


def test_importing_the_launchers_does_not_import_torch():
    names = "report, processes, command, calls, ranks_of_a_script"
    code = f"import sys; from lightning.fabric.strategies.launchers import {names}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
