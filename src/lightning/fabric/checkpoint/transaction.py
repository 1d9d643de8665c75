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
from functools import cache
from pathlib import Path
from typing import Any

from lightning.fabric.checkpoint.manifest import DamagedCheckpointError, Manifest, attach, read_manifest

_STAGED, _FORMER = "staged", "former"
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


class Transaction:
    """One save to ``target``, a local path of a file or folder that may exist.

    Write to :attr:`staged`, then :meth:`commit` or :meth:`abort`. One process of those that write calls these.
    """

    def __init__(self, target: Path, staged: Path | None = None) -> None:
        self.target = Path(os.path.realpath(target))  # a link stays a link
        self.staged = _beside(self.target, _STAGED) if staged is None else staged

    def commit(self, manifest: Manifest | None = None, durable: bool = True) -> None:
        """Make what is at :attr:`staged`, with its ``manifest``, the checkpoint at ``target``.

        ``durable``: it is on the disk when this returns, and a power cut cannot undo it or leave half of it.
        """
        if manifest is not None:
            attach(self.staged, manifest)
        if durable:
            sync(self.staged)
        former = _put_in_place(self.staged, self.target)
        if durable:
            _sync_one(self.target.parent)
        if former is not None:
            remove(former)

    def abort(self) -> None:
        """Remove what was staged; ``target`` is as it was."""
        remove(self.staged)


def _beside(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name[:180]}.{uuid.uuid4().hex[:8]}.{role}")


def _put_in_place(staged: Path, target: Path) -> Path | None:
    """Rename; return where the former content now is, if it is anywhere."""
    if not os.path.lexists(target) or not (staged.is_dir() or target.is_dir()):
        os.replace(staged, target)
        return None
    if _exchange(staged, target):
        return staged
    former = _beside(target, _FORMER)
    os.rename(target, former)
    try:
        os.rename(staged, target)
    except BaseException:
        os.rename(former, target)
        raise
    return former


def recover(target: Path) -> None:
    """If a save was interrupted when ``target`` was out of place, put back what was there."""
    target = Path(os.path.realpath(target))
    if os.path.lexists(target) or not target.parent.is_dir():
        return
    for former in left_over(target, _FORMER):
        try:
            whole = read_manifest(former) is not None
        except DamagedCheckpointError:
            whole = False
        if whole:
            os.rename(former, target)
            return


def left_over(target: Path, role: str = _STAGED) -> list[Path]:
    """Return what saves to ``target`` left behind when they were killed, the newest first."""
    found = list(target.parent.glob(f".{_escaped(target.name[:180])}.????????.{role}"))
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
