"""What went wrong in a launch: an error file from every rank that raised, and one page that shows the first cause."""

import contextlib
import json
import os
import re
import signal
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

_LONGEST_LINE = 200  # characters of an exception's message in a one-line summary

# What a rank says when it lost the rank (or the store) at the other end: the consequence of a failure elsewhere.
_ECHO = re.compile(
    r"(closed|reset) by peer|broken pipe|timed out waiting \d+ ?ms|connection refused|socket (closed|timeout|error)"
    r"|nccl.*(remote ?(error|process)|abort|system ?error)|failed to (recv|send)|(recv|send)(value|bytes) failed"
    r"|connect ?fullmesh failed|wait timeout after|collective operation timeout",
    re.IGNORECASE,
)


class RankError(RuntimeError):
    """A rank of a launch failed; the message holds its traceback. ``failure`` has the parts."""

    def __init__(self, message: str, failure: "Failure") -> None:
        super().__init__(message)
        self.failure = failure

    @property
    def rank(self) -> int:
        """The global rank that failed first."""
        return self.failure.rank

    def __reduce__(self) -> tuple[type, tuple[str, "Failure"]]:
        return type(self), (str(self), self.failure)


@dataclass(frozen=True)
class Failure:
    """How one rank failed: by an exception, or by an exit or a signal that left no exception behind."""

    rank: int
    when: float  # seconds since the epoch
    exit_code: int = 1  # negative: the number of the signal that killed the rank
    exception: str = ""  # name of the exception's type; empty if the rank left none
    message: str = ""
    traceback: str = ""

    @property
    def is_echo(self) -> bool:
        """Whether this is an exception that only says that another rank has gone."""
        return bool(_ECHO.search(self.traceback))

    @property
    def shell_code(self) -> int:
        """The exit code as a shell shows it: 128 + the signal's number for a rank killed by a signal."""
        return 128 - self.exit_code if self.exit_code < 0 else self.exit_code

    def __str__(self) -> str:
        if self.exception:
            first_line = next(iter(self.message.strip().splitlines()), "")[:_LONGEST_LINE]
            what = f"raised {self.exception}: {first_line}" if first_line else f"raised {self.exception}"
        elif self.exit_code < 0:
            what = f"was killed by {_signal_name(-self.exit_code)}"
            what += ", perhaps out of memory" if self.exit_code == -9 else ""
        else:
            what = "ended without an exception"
        return f"rank {self.rank} {what} (exit code {self.shell_code})"


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(number).name}"
    return f"signal {number}"


def write_error(directory: str | os.PathLike[str], rank: int, error: BaseException) -> None:
    """Leave ``error`` with its traceback for the launcher to find.

    The first error of a rank stays; what it raises afterwards is a consequence.
    """
    path = Path(directory, f"error-{rank}.json")
    if path.exists():
        return
    text = "".join(traceback.format_exception(type(error), error, users_part(error.__traceback__)))
    failure = Failure(rank, time.time(), exit_code_of(error), _type_name(type(error)), str(error), text)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(failure)), encoding="utf-8")
    partial.replace(path)


def exit_code_of(error: BaseException) -> int:
    """The exit code of an interpreter that ``error`` ends."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def users_part(trace: TracebackType | None) -> TracebackType | None:
    """A traceback without the launchers' own frames at its start."""
    own = os.path.dirname(__file__) + os.sep
    inner = trace
    while inner is not None and inner.tb_frame.f_code.co_filename.startswith(own):
        inner = inner.tb_next
    return inner or trace


def _type_name(kind: type) -> str:
    return (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )


def read_errors(directory: str | os.PathLike[str]) -> list[Failure]:
    """Every rank's error so far, by rank."""
    found = [Failure(**json.loads(p.read_text(encoding="utf-8"))) for p in Path(directory).glob("error-*.json")]
    return sorted(found, key=lambda failure: failure.rank)


def first_cause(failures: Iterable[Failure]) -> Failure | None:
    """The earliest failure that is not the echo of another one; the earliest echo if there is nothing else."""
    return min(failures, key=lambda failure: (failure.is_echo, failure.when), default=None)


def page(failures: Iterable[Failure]) -> str:
    """One page on the failures of a launch: the cause's traceback, the consequences, and the cause as the last line."""
    failures = list(failures)
    cause = first_cause(failures)
    if cause is None:
        return ""
    lines = [f"---- rank {cause.rank} failed ----"]
    if cause.traceback:
        lines.append(cause.traceback.rstrip())
    echoes = [str(failure) for failure in sorted(failures, key=lambda f: f.when) if failure is not cause]
    if echoes:
        lines += ["As a consequence:", *(f"  {echo}" for echo in echoes)]
    return "\n".join([*lines, f"First cause: {cause}", ""])
