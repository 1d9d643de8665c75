"""Run a script as several ranks on this machine, and see them through to their end. Torch is imported once for all."""

import atexit
import builtins
import importlib
import importlib.machinery
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.strategies.launchers import calls, report
from lightning.fabric.strategies.launchers.command import interpreter_flags
from lightning.fabric.strategies.launchers.processes import (
    INTERRUPT_PATIENCE,
    RankProcesses,
    follow_launcher,
    terminal_tells_ranks,
)

_FROM_LAUNCHER = "LT_SCRIPT_RANK"  # JSON with the parent's pid and the folder for errors


def run_script(
    script: str, arguments: Sequence[str], envs: Sequence[Mapping[str, str]], preload: Sequence[str] = ()
) -> int:
    """Run ``script`` once for each of ``envs``, which hold the variables (``RANK``, ...) of one rank each.

    SIGINT and SIGTERM are passed on to the ranks. The first rank that fails ends the others, and a page about it is
    printed to standard error. Where ranks can be forked, the modules named in ``preload`` are imported once for all.

    Returns:
        The exit code: 0, or that of the rank that failed first, as a shell shows it (128 + the signal's number).
    """
    ranks = RankProcesses(tempfile.mkdtemp(prefix="ranks-"))
    # a forked rank does not come back from here, so nothing is open around it
    _start(ranks, script, arguments, envs, preload)
    try:
        with _passing_signals_on(ranks) as signals:
            if ranks.wait():
                return 0
            if signals:
                ranks.wait_for_end(INTERRUPT_PATIENCE)
            cause, failures = ranks.first_cause(), ranks.failures()
    finally:
        ranks.end()
        shutil.rmtree(ranks.directory, ignore_errors=True)
    sys.stdout.flush()
    print(report.page(failures), file=sys.stderr, end="", flush=True)
    return cause.shell_code if cause is not None else 1


def _start(
    ranks: RankProcesses,
    script: str,
    arguments: Sequence[str],
    envs: Sequence[Mapping[str, str]],
    preload: Sequence[str],
) -> None:
    start = _fork if _can_fork(preload) else _spawn
    for env in envs:
        ranks.add(int(env["RANK"]), start(ranks.directory, script, arguments, env))


@contextmanager
def _passing_signals_on(ranks: RankProcesses) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to the ranks; the list holds those that came."""
    came: list[int] = []

    def pass_on(number: int, frame: types.FrameType | None) -> None:
        came.append(number)
        if not (number == signal.SIGINT and terminal_tells_ranks()):  # a terminal has told the ranks itself
            ranks.send(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# -- two ways to start a rank


def _can_fork(preload: Sequence[str]) -> bool:
    """Import what every rank needs, and tell whether the process may still be forked after that."""
    if sys.platform != "linux" or os.environ.get("PL_DISABLE_FORK", "0") == "1":
        return False
    import torch

    for module in preload:
        importlib.import_module(module)
    return not torch.cuda.is_initialized()


class _Fork:
    """A forked process in the shape that `RankProcesses` needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None


def _fork(folder: Path, script: str, arguments: Sequence[str], env: Mapping[str, str]) -> _Fork:
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with warnings.catch_warnings():  # newer Pythons warn if some library has started a thread
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.environ.update(env)
        if "numpy" in sys.modules:  # a fresh interpreter would not start with another rank's numbers
            sys.modules["numpy"].random.seed()
        _run_as_rank(script, arguments, folder, parent)
    return _Fork(pid)


def _spawn(folder: Path, script: str, arguments: Sequence[str], env: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    from_launcher = json.dumps({"parent": os.getpid(), "errors": str(folder)})
    flags = interpreter_flags(sys.orig_argv)
    return subprocess.Popen(
        [sys.executable, *flags, "-m", __name__, script, *arguments],
        env={**os.environ, **env, _FROM_LAUNCHER: from_launcher},
    )


def _main() -> NoReturn:
    launch = json.loads(os.environ.pop(_FROM_LAUNCHER))
    _run_as_rank(sys.argv[1], sys.argv[2:], Path(launch["errors"]), launch["parent"])


# -- in the rank


def _take_standard_input_away() -> None:
    if os.environ["LOCAL_RANK"] != "0":
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)


def _run_as_rank(script: str, arguments: Sequence[str], folder: Path, parent: int) -> NoReturn:
    rank = int(os.environ["RANK"])
    follow_launcher(rank, folder, parent)
    _take_standard_input_away()
    atexit.register(calls.destroy_process_group)
    try:
        run_as_main(script, arguments)
    except SystemExit:
        raise
    except BaseException as error:
        report.write_error(folder, rank, error)
        sys.excepthook(type(error), error, report.users_part(error.__traceback__))
        raise SystemExit(report.exit_code_of(error)) from None
    raise SystemExit


def run_as_main(script: str, arguments: Sequence[str]) -> None:
    """Run a script in this process as ``python script *arguments`` does."""
    path = os.path.abspath(script)
    sys.argv[:] = [script, *arguments]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    main: Any = types.ModuleType("__main__")
    main.__file__, main.__builtins__, main.__cached__ = path, builtins, None
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    sys.modules["__main__"] = main
    with io.open_code(path) as file:
        source = file.read()
    try:
        code = compile(source, path, "exec", dont_inherit=True)
    except SyntaxError as error:
        raise error.with_traceback(None) from None
    exec(code, vars(main))


if __name__ == "__main__":
    _main()
