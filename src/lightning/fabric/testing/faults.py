"""Faults on purpose, each at a place that can be chosen again: a killed process, a failing write, a full disk, damage.

    def _save(folder):
        fabric = Fabric(accelerator="cpu", devices=1)
        fabric.save(folder / "checkpoint", {"step": 2})

    def _save_and_die(number, folder):
        with fault_at(number, folder):  # killed before the write with this number
            _save(folder)

    def _survives_a_kill_anywhere(folder):
        with write_points(folder) as points:
            _save(folder)
        for number in range(len(points)):
            assert Forked(_save_and_die, number, folder).wait().code == -signal.SIGKILL, points[number]
            assert fabric.load(folder / "checkpoint")["step"] in (1, 2)

    def test_survives_a_kill_anywhere(tmp_path):
        on_ranks(1, _survives_a_kill_anywhere, tmp_path)

A write point is where something is about to change in a folder: a file is opened for writing, renamed, deleted, cut
short or brought to the disk, a folder is made or deleted, by any thread of this process. What happens between two of
them, in the middle of a file, is for :func:`file_size_limit`. For POSIX systems; files that are deleted relative to an
open folder, as ``shutil.rmtree`` does, are seen on Linux.
"""

import contextlib
import errno
import os
import pickle
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from lightning.fabric.checkpoint import transaction

# ---- write points ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WritePoint:
    """Something that is about to change a folder; ``path`` is relative to it."""

    event: str
    """``"open"``, ``"mkdir"``, ``"rename"``, ``"exchange"``, ``"remove"``, ``"rmdir"``, ``"truncate"``, ``"link"``,
    ``"fsync"``"""
    path: str
    to: str = ""
    """Where a rename or an exchange leads."""

    def __str__(self) -> str:
        return f"{self.event} {self.path}" + (f" -> {self.to}" if self.to else "")


Act: TypeAlias = Callable[[WritePoint], None]


def kill(point: WritePoint) -> None:
    """End this process at once, as running out of memory or ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail(error: int | Exception = errno.ENOSPC) -> Act:
    """Have the write fail: with the error, or with the ``OSError`` of the number (by default, of a full disk)."""

    def act(point: WritePoint) -> NoReturn:
        raise OSError(error, os.strerror(error), point.path) if isinstance(error, int) else error

    return act


def stall(seconds: float) -> Act:
    """Have the write begin so many seconds late, as on a disk that hangs."""
    return lambda point: time.sleep(seconds)


@contextlib.contextmanager
def write_points(folder: str | os.PathLike[str]) -> Iterator[list[WritePoint]]:
    """Record what is written in ``folder``, and below it, while the block runs. The list grows as it happens."""
    points: list[WritePoint] = []
    with _watching(folder, lambda number, point: points.append(point)):
        yield points


@contextlib.contextmanager
def fault_at(number: int, folder: str | os.PathLike[str], act: Act = kill, lasting: bool = False) -> Iterator[None]:
    """Let something happen right before the write with that number (from 0) in ``folder``, or below it.

    Without so many writes nothing happens.

    Args:
        act: :func:`kill`, what :func:`fail` and :func:`stall` return, or a function of yours.
        lasting: also before every later write.

    """

    def at(found: int, point: WritePoint) -> None:
        if found == number or (lasting and found > number):
            act(point)

    with _watching(folder, at):
        yield


class _Watch:
    def __init__(self, folder: str | os.PathLike[str], tell: Callable[[int, WritePoint], None]) -> None:
        self.folder = os.path.realpath(folder)
        self._tell = tell
        self._count = 0
        self._lock = threading.Lock()

    def meet(self, event: str, path: str, to: str) -> None:
        inside, inside_to = self._inside(path), self._inside(to)
        if inside is None and inside_to is None:
            return
        with self._lock:
            number = self._count
            self._count += 1
        self._tell(number, WritePoint(event, path if inside is None else inside, inside_to or ""))

    def _inside(self, path: str) -> str | None:
        if path == self.folder:
            return "."
        return path[len(self.folder) + 1 :] if path.startswith(self.folder + os.sep) else None


_watches: list[_Watch] = []
_is_hooked = False
_here = threading.local()  # `.busy`: this thread's own looking and acting is nothing to watch


@contextlib.contextmanager
def _watching(folder: str | os.PathLike[str], tell: Callable[[int, WritePoint], None]) -> Iterator[None]:
    global _is_hooked
    if not _is_hooked:
        sys.addaudithook(_on_audit)  # for the rest of the process: there is no way to take one off
        _is_hooked = True
    watch = _Watch(folder, tell)
    with contextlib.ExitStack() as undo:
        if not _watches:
            for owner, name, event in _UNHEARD:
                undo.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, _heard(getattr(owner, name), event))
        _watches.append(watch)
        undo.callback(_watches.remove, watch)
        yield


def _heard(function: Callable[..., Any], event: str) -> Callable[..., Any]:
    """Return the function with an event in front of it, for those that the interpreter gives none."""

    def call(*args: Any) -> Any:
        _on_audit(event, args)
        return function(*args)

    return call


_UNHEARD: list[tuple[Any, str, str]] = [
    (os, "fsync", "os.fsync"),
    (os, "fdatasync", "os.fsync"),
    (transaction, "_exchange", "os.exchange"),
]
_UNHEARD = [row for row in _UNHEARD if hasattr(row[0], row[1])]

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _on_audit(event: str, args: tuple[Any, ...]) -> None:
    read = _PATHS.get(event) if _watches else None
    if read is None or getattr(_here, "busy", False):
        return
    _here.busy = True
    try:
        paths = read(*args)
        if paths is not None:
            for watch in tuple(_watches):
                watch.meet(event.removeprefix("os."), *paths)
    finally:
        _here.busy = False


_Place: TypeAlias = Any  # a path as text, bytes or an object; or the number of an open file


def _opened(path: _Place, mode: Any, flags: int) -> tuple[str, str] | None:
    return (_real(path), "") if flags & _WRITES and not isinstance(path, int) else None


def _one(path: _Place, *rest: Any) -> tuple[str, str]:
    return _real(path, rest[-1] if rest else -1), ""


def _two(path: _Place, to: _Place, of_path: int = -1, of_to: int = -1) -> tuple[str, str]:
    return _real(path, of_path), _real(to, of_to)


def _target_only(path: _Place, to: _Place, *folders: int) -> tuple[str, str]:
    return _real(to, folders[-1] if folders else -1), ""


_PATHS: dict[str, Callable[..., tuple[str, str] | None]] = {
    "open": _opened,
    "os.mkdir": _one,
    "os.rename": _two,
    "os.exchange": _two,
    "os.remove": _one,
    "os.rmdir": _one,
    "os.truncate": lambda path, length: _one(path),
    "os.link": _target_only,
    "os.symlink": _target_only,
    "os.fsync": _one,
}


def _real(path: _Place, folder: int = -1) -> str:
    """Without links on the way to it; of what ``folder``, an open one, has in it if that is given."""
    if isinstance(path, int):
        return _real_of_open(path)
    text = os.fsdecode(path)
    parent, name = os.path.split(os.path.abspath(text) if folder < 0 else os.path.join(_real_of_open(folder), text))
    return os.path.join(os.path.realpath(parent), name)


def _real_of_open(number: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:  # another system: it is not known where that is
        return ""


# ---- within a file, and a full disk ------------------------------------------------------------------------------


@contextlib.contextmanager
def file_size_limit(size: int, act: str = "fail") -> Iterator[None]:
    """No file of this process grows beyond ``size`` bytes while the block runs.

    The write that would do it, by any thread and in whatever language, stops there, and then fails with ``EFBIG``: to
    a program that is what a full disk looks like. With ``act="kill"`` it ends the process (by ``SIGXFSZ``), which
    leaves the first ``size`` bytes of the file behind: a process that was killed in the middle of writing it. Only the
    main thread may enter the block.

    """
    import resource

    if act not in ("fail", "kill"):
        raise ValueError(f"`act` is 'fail' or 'kill', but got {act!r}.")
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.ExitStack() as undo:
        for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, size)):  # SIGXFSZ would dump a core
            former, most = resource.getrlimit(limit)
            undo.callback(resource.setrlimit, limit, (former, most))
            resource.setrlimit(limit, (value, most))
        handler = signal.SIG_DFL if act == "kill" else signal.SIG_IGN
        undo.callback(signal.signal, signal.SIGXFSZ, signal.signal(signal.SIGXFSZ, handler))
        yield


# ---- damage ------------------------------------------------------------------------------------------------------


def flip(path: str | os.PathLike[str], offset: int) -> None:
    """Invert the byte at ``offset`` (from the end, if negative), as a bad disk or a bad copy does."""
    with Path(path).open("r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        byte = file.read(1)
        if not byte:
            raise IndexError(f"{os.fspath(path)!r} has no byte at {offset}.")
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0xFF]))


# ---- a process to kill -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a :class:`Forked` call ended: ``code`` 0 with its ``value``, 1 with its ``error``, or ``-signal``."""

    code: int
    value: Any = None
    error: BaseException | None = None


class Forked:
    """A call that is made in a fork of this process, which has all that this one has: models, optimizers, modules.

    For processes that run one thread of their own, such as those of `on_ranks`: after a fork, other threads are
    missing, and what they held is held for ever. Nothing that is registered for the end of a process is run.
    """

    def __init__(self, fn: Callable[..., Any], *args: Any) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._end, begin = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._end)
            _call_and_leave(begin, fn, args)
        os.close(begin)

    def wait(self, timeout: float = 60.0) -> Outcome:
        """Return how it ended.

        Raises:
            TimeoutError: if it does not within ``timeout`` seconds; it is killed then.

        """
        data = self._read(time.monotonic() + timeout)
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if data is None:
            raise TimeoutError(f"The forked process {self.pid} had not ended after {timeout:g} s.")
        value, error = pickle.loads(data) if data else (None, None)
        return Outcome(code, value, error)

    def _read(self, deadline: float) -> bytes | None:
        """Return what the process says at its end; None, with the process killed, if that does not come in time."""
        data = b""
        with open(self._end, "rb", buffering=0) as end:
            while True:
                if not select.select([end], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    os.kill(self.pid, signal.SIGKILL)
                    return None
                piece = end.read(1 << 16)
                if not piece:
                    return data
                data += piece


def _call_and_leave(pipe: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> NoReturn:
    code = 1
    try:
        try:
            said = pickle.dumps((fn(*args), None))
            code = 0
        except BaseException as error:
            said = _pickled(error)
        with open(pipe, "wb") as file:
            file.write(said)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _pickled(error: BaseException) -> bytes:
    try:
        data = pickle.dumps((None, error))
        pickle.loads(data)  # some can only be written
    except Exception:
        return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
    return data
