"""Stage, commit: at any moment a path holds a whole checkpoint, the old one or the new one, or none if there was none.

What is saved is made beside its place, under a hidden name; it and its manifest are brought to the disk; and one rename
puts it in place. Where a folder takes the place of another, the two change places in one step (Linux), or are renamed
one after the other; :func:`recover` finishes what was interrupted between the two.
"""

import ctypes
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning.fabric.checkpoint.manifest import (
    DamagedCheckpointError,
    Manifest,
    NewerCheckpointError,
    attach,
    read_manifest,
)

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_STAGED, _FORMER = "staged", "former"
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


class Transaction:
    """One save to ``target``, a local path of a file or folder that may exist.

    Ranks that write together make one each, of the same ``name``; that which ``leads`` commits. While it is open, what
    is staged is locked, so that what a killed process has left can be told from what is in the making.
    """

    def __init__(self, target: Path, name: str | None = None, leads: bool = True) -> None:
        self.target = Path(os.path.realpath(target))  # a link stays a link
        self.staged = _beside(self.target, _STAGED, name or uuid.uuid4().hex[:8])
        self._leads = leads
        self._lock: int | None = None

    def begin(self, is_folder: bool) -> None:
        """Make room for what is written to :attr:`staged`; on that which leads, then on all others.

        Raises:
            FileNotFoundError: on a rank for which :attr:`target` is another place.

        """
        if not self._leads:
            if is_folder and not self.staged.is_dir():
                raise FileNotFoundError(
                    errno.ENOENT,
                    f"rank 0 has begun the folder {str(self.staged)!r}, but here there is none. All ranks write to one "
                    "folder: give them the same path, on a disk that they share",
                )
            return
        self.staged.parent.mkdir(parents=True, exist_ok=True)
        if is_folder:
            self.staged.mkdir()
        else:
            self.staged.touch()
        self._lock = _locked(self.staged)
        recover(self.target)
        for path in (*left_over(self.target), *self._formers()):
            if path != self.staged:
                remove_if_stale(path)

    def _formers(self) -> list[Path]:
        """What was set aside and is of no use, because there is something at ``target``."""
        return left_over(self.target, _FORMER) if os.path.lexists(self.target) else []

    def deliver(self, names: Sequence[str], durable: bool) -> None:
        """On every rank, when it has written: bring its files to the disk."""
        for name in names if durable else ():
            _sync_one(self.staged / name if name else self.staged)

    def commit(
        self,
        manifest: Manifest | None = None,
        durable: bool = True,
        foreign: Callable[[Path], list[Path]] = lambda folder: [],
    ) -> None:
        """Make what is at :attr:`staged`, with its ``manifest``, the checkpoint at ``target``.

        ``durable``: it is on the disk when this returns, and a power cut cannot undo it or leave half of it.
        ``foreign`` are entries of the folder that is replaced which are no part of a checkpoint: they stay.
        """
        if manifest is not None:
            attach(self.staged, manifest)
        if self.staged.is_dir() and self.target.is_dir():
            for entry in foreign(self.target):
                if not os.path.lexists(self.staged / entry.name):
                    _link(entry, self.staged / entry.name)
        if durable:
            sync(self.staged)
        former = _put_in_place(self.staged, self.target)
        if durable:
            _sync_one(self.target.parent)
        if former is not None:
            remove(former)
        self._unlock()

    def abort(self) -> None:
        """Remove what was staged; ``target`` is as it was."""
        if self._leads:
            remove(self.staged)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _beside(target: Path, role: str, name: str) -> Path:
    return target.with_name(f".{_short(target.name)}.{name}.{role}")


def _short(name: str) -> str:
    """So that it stays within the 255 bytes that a name can have, with what is added to it."""
    return os.fsencode(name)[:180].decode(errors="ignore")


def _locked(path: Path) -> int | None:
    """Lock what is at ``path`` and return the descriptor that holds it; None if another process does, or none can."""
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another process, or a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def remove_if_stale(path: Path) -> None:
    """Remove what a process has staged, or was about to delete, if it has ended since."""
    try:
        lock = _locked(path)
    except FileNotFoundError:
        return
    if lock is not None:
        remove(path)
        os.close(lock)


def _put_in_place(staged: Path, target: Path) -> Path | None:
    """Rename; return where the former content now is, if it is anywhere."""
    if not os.path.lexists(target) or not (staged.is_dir() or target.is_dir()):
        os.replace(staged, target)
        return None
    if _exchange(staged, target):
        return staged
    former = _beside(target, _FORMER, uuid.uuid4().hex[:8])
    os.rename(target, former)
    try:
        os.rename(staged, target)
    except BaseException:
        os.rename(former, target)
        raise
    return former


def _link(entry: Path, to: Path) -> None:
    """Have what is at ``entry`` at ``to`` as well: there is no moment at which it is in neither place."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.copytree(entry, to, symlinks=True, copy_function=_link_file)
    else:
        _link_file(entry, to)


def _link_file(source: Any, to: Any) -> None:
    try:
        os.link(source, to, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(source, to, follow_symlinks=False)


def recover(target: Path) -> None:
    """If a save was interrupted when ``target`` was out of place, put back what was there."""
    target = Path(os.path.realpath(target))
    if os.path.lexists(target) or not target.parent.is_dir():
        return
    for former in left_over(target, _FORMER):
        try:
            whole = read_manifest(former) is not None
        except NewerCheckpointError:
            whole = True
        except DamagedCheckpointError:
            whole = False
        if whole:
            os.rename(former, target)
            return


def left_over(target: Path, role: str = _STAGED) -> list[Path]:
    """Return what saves to ``target`` left behind when they were killed, the newest first."""
    found = list(target.parent.glob(f".{_escaped(_short(target.name))}.????????.{role}"))
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def remove(path: Path) -> None:
    """Delete a file or folder; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -- the disk


def sync(path: Path) -> None:
    """Return when the file, or all of the folder, is on the disk."""
    if not path.is_dir():
        _sync_one(path)
        return
    for folder, _, names in os.walk(path):
        for name in names:
            _sync_one(Path(folder, name))
        _sync_one(Path(folder))


def _sync_one(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # a folder cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system cannot."""
    rename = _renameat2()
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), os.fspath(first), None, os.fspath(second))


@cache
def _renameat2() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
