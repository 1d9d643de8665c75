"""The processes of one launch on this node: who runs, who failed first, and how all of them are ended."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Protocol

from lightning.fabric.strategies.launchers import report
from lightning.fabric.strategies.launchers.report import Failure, RankError

_POLL = 0.02  # seconds between two looks at the processes
_SLOW_POLL = 0.2
_SETTLE = 3.0  # seconds that an error about a lost peer waits for the failure behind it
FAREWELL = 15.0  # seconds that an interpreter may take to end after its script has raised
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
INTERRUPT_PATIENCE = 10.0  # seconds that ranks may take to end after an interrupt
_LINGER = 5.0  # seconds after which a rank that has raised is a failure although it still runs


class Process(Protocol):
    """What is needed of a started process: ``subprocess.Popen`` has it."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""


class Worker:
    """A ``multiprocessing`` process in the shape of `Process`."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid or 0

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self._process.exitcode


class RankProcesses:
    """Processes by global rank, with the folder in which they leave their errors. Safe to use from several threads."""

    def __init__(self, directory: str | os.PathLike[str], whole_groups: bool = False) -> None:
        """``whole_groups``: every process leads a process group, which is ended with it."""
        self.directory = Path(directory)
        self._processes: dict[int, Process] = {}
        self._exits: dict[int, tuple[int, float]] = {}
        self._ended_by_us: set[int] = set()
        self._whole_groups = whole_groups
        self._lock = threading.RLock()

    def add(self, rank: int, process: Process) -> None:
        """Take charge of a process that was just started."""
        self._processes[rank] = process

    def running(self) -> list[int]:
        """The ranks whose process has not ended."""
        with self._lock:
            for rank in self._processes.keys() - self._exits.keys():
                code = self._processes[rank].poll()
                if code is not None:
                    self._exits[rank] = (code, time.time())
            return sorted(self._processes.keys() - self._exits.keys())

    def failures(self) -> list[Failure]:
        """Errors that ranks left behind, and deaths that were not our doing."""
        with self._lock:
            self.running()
            raised = {failure.rank: failure for failure in report.read_errors(self.directory)}
            died = [
                Failure(rank, when, code)
                for rank, (code, when) in self._exits.items()
                if code != 0 and rank not in raised and rank not in self._ended_by_us
            ]
            return sorted([*raised.values(), *died], key=lambda failure: failure.rank)

    def has_failed(self) -> bool:
        """Whether a rank has ended badly, or has raised and does not get to its end."""
        running = self.running()
        if any(code != 0 for code, _ in self._exits.values()):
            return True
        return any(time.time() - error.when > _LINGER for error in self._errors_of(running))

    def _errors_of(self, ranks: Iterable[int]) -> list[Failure]:
        return [error for error in report.read_errors(self.directory) if error.rank in ranks]

    def wait(self, timeout: float | None = None) -> bool:
        """Block until every process has ended well (True), or one has failed or the seconds are over (False)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = _POLL
        while True:
            running = self.running()  # before the look at failures, which then sees how all others have ended
            if self.has_failed() or (deadline is not None and time.monotonic() > deadline and running):
                return False
            if not running:
                return True
            time.sleep(pause)
            pause = min(pause * 1.05, _SLOW_POLL)  # a long run is not worth many looks

    def wait_for_end(self, timeout: float, ranks: Iterable[int] | None = None) -> None:
        """Block until every process (of ``ranks``) has ended, well or not, or ``timeout`` seconds are over."""
        deadline = time.monotonic() + timeout
        ranks = self._processes.keys() if ranks is None else set(ranks)
        while ranks & set(self.running()) and time.monotonic() < deadline:
            time.sleep(_POLL)

    def first_cause(self) -> Failure | None:
        """The failure behind the others; an error about a lost peer gives the others some seconds to show theirs."""
        deadline = time.monotonic() + _SETTLE
        while True:
            cause = report.first_cause(self.failures())
            if cause is None or not cause.is_echo or not self.running() or time.monotonic() > deadline:
                return cause
            time.sleep(_POLL)

    def raise_first_cause(self) -> None:
        """Raise a `RankError` with the page about the failures, if there are any."""
        cause = self.first_cause()
        if cause is not None:
            raise RankError(f"\n{report.page(self.failures())}", cause)

    def send(self, number: int, ranks: Iterable[int] | None = None) -> None:
        """Send a signal to the processes that still run (of ``ranks``, if given)."""
        with self._lock:
            for rank in set(self.running()).intersection(self._processes if ranks is None else ranks):
                self._send_one(self._processes[rank].pid, number)

    def _send_one(self, pid: int, number: int) -> None:
        # A process leads its group from its own first line on; it may also have ended, reaped by somebody else.
        for send in (os.killpg, os.kill) if self._whole_groups else (os.kill,):
            with contextlib.suppress(ProcessLookupError):
                send(pid, number)
                return

    def interrupt(self) -> None:
        """Let the ranks see to their own end after an interrupt: pass it on, and wait some seconds."""
        if not terminal_tells_ranks():
            self.send(signal.SIGINT)
        self.wait_for_end(INTERRUPT_PATIENCE)

    def end(self, grace: float = 5.0) -> None:
        """End whatever still runs: SIGTERM, and SIGKILL for those that are there ``grace`` seconds later.

        Ranks that have raised are on their way out and are given longer. With no ``grace`` all are killed at once.
        """
        self._ended_by_us.update(self.running())
        if grace > 0:
            leaving = {error.rank for error in report.read_errors(self.directory)}
            others = self._processes.keys() - leaving
            for number in (signal.SIGTERM, _KILL):
                self.send(number, others)
                self.wait_for_end(grace, others)
            self.wait_for_end(FAREWELL, leaving)
        self.send(_KILL)
        self.wait_for_end(10.0)
        if self._whole_groups:  # what the ranks themselves have started
            for process in self._processes.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, _KILL)


def terminal_tells_ranks() -> bool:
    """Whether Ctrl-C reaches the ranks without our help, because they are in the terminal's foreground with us."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except (OSError, AttributeError):  # no terminal, no such thing on this platform
        return False


def end_with_parent(parent_is_alive: Callable[[], bool]) -> None:
    """Make this process end soon after ``parent_is_alive()`` has become false."""

    def watch() -> NoReturn:
        while parent_is_alive():
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        os.kill(os.getpid(), _KILL)
        raise SystemExit

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def follow_launcher(rank: int, folder: str | os.PathLike[str], parent: int) -> None:
    """Make this process a rank of the launcher with the pid ``parent``, which started it.

    It ends when the launcher does, and leaves an uncaught exception in ``folder`` for the launcher to print.
    """
    end_with_parent(lambda: os.getppid() == parent)
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        report.write_error(folder, rank, error.with_traceback(trace))
        if previous is not sys.__excepthook__:  # the user's
            previous(kind, error, trace)

    sys.excepthook = hook
