"""Programs in interpreters of their own: started by a command, seen through to their end."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lightning.fabric

SOURCE = str(Path(lightning.fabric.__file__).parents[2])
FABRIC_RUN = ("-m", "lightning.fabric.cli", "run")


class Programs:
    """Starts ``python *arguments`` in ``folder``; whatever still runs at the end of the test is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    def write(self, script: str, name: str = "train.py") -> str:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(script))
        return name

    def start(self, *arguments: str, **env: str) -> "subprocess.Popen[str]":
        inherited = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "PYTEST_CURRENT_TEST")}
        program = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={**inherited, "PYTHONPATH": SOURCE, "TMPDIR": str(self.folder), **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(program)
        return program

    def run(self, *arguments: str, stdin: str = "", **env: str) -> "subprocess.CompletedProcess[str]":
        program = self.start(*arguments, **env)
        out, err = program.communicate(stdin, timeout=90)
        return subprocess.CompletedProcess(arguments, program.returncode, out, err)


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    made = Programs(tmp_path)
    yield made
    for program in made.started:
        program.kill()
        program.communicate()


@pytest.fixture
def launched_by(programs: Programs) -> Callable[..., Any]:
    """Run a script on two CPU ranks, started by ``"fabric run"`` or by the script itself (``"python"``)."""

    def run(launcher: str, script: str) -> "subprocess.CompletedProcess[str]":
        return programs.run(*((*FABRIC_RUN, "--devices=2") if launcher == "fabric run" else ()), programs.write(script))

    return run
