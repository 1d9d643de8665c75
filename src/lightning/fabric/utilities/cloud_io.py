"""Files and folders on this machine and, through fsspec, elsewhere."""

import os
import stat
import tempfile
import uuid
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from lightning.fabric.utilities.remote_files import OBJECT_STORES, Remote, replace_file
from lightning.fabric.utilities.types import _MAP_LOCATION_TYPE, _PATH

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def get_filesystem(path: _PATH, **kwargs: Any) -> "AbstractFileSystem":
    """Return the file system that ``path``, a local path or a URL, lies on. ``kwargs`` go to the file system."""
    from fsspec.core import url_to_fs

    fs, _ = url_to_fs(str(path), **kwargs)
    return fs


def _is_local_file_protocol(path: _PATH) -> bool:
    """Return whether ``path`` is a path or a ``file://`` URL."""
    protocol, separator, _ = str(path).replace("::", "://").partition("://")
    return not separator or protocol in ("file", "local")


def _local_path(path: _PATH) -> Path:
    """The path of a local path or ``file://`` URL."""
    return Path(str(path).rpartition("://")[2])


def _is_dir(fs: "AbstractFileSystem", path: _PATH, strict: bool = False) -> bool:
    """Return whether ``path`` is a folder. On object stores, which have none, every path may serve as one.

    ``strict=True`` asks an object store whether anything lies under ``path``.
    """
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return bool((not strict and protocols & OBJECT_STORES) or fs.isdir(str(path)))


def _load(
    path_or_url: _PATH | IO[bytes],
    map_location: _MAP_LOCATION_TYPE = None,
    weights_only: bool | None = None,
    mmap: bool | None = None,
) -> Any:
    """``torch.load`` from a local path, a URL of any kind that fsspec knows, or an open file.

    Args:
        weights_only: ``None`` is torch's default.
        mmap: leave the tensors in the file until they are used. Only a local file in torch's zip format can; others
            are read in full.
    """
    options: dict[str, Any] = {"map_location": map_location, "weights_only": weights_only}
    if not isinstance(path_or_url, (str, os.PathLike)):
        return torch.load(path_or_url, **options)
    if not _is_local_file_protocol(path_or_url):
        fs = get_filesystem(path_or_url)
        with fs.open(str(path_or_url), "rb") as file:
            return torch.load(file, **options)
    path = _local_path(path_or_url)
    if path.is_dir():
        raise IsADirectoryError(f"Expected a checkpoint file, but {str(path)!r} is a folder.")
    return torch.load(path, mmap=bool(mmap) and zipfile.is_zipfile(path), **options)


def _atomic_save(obj: Any, path: _PATH) -> None:
    """``torch.save`` to a local path or URL: afterwards, the complete file is there, or what was there before.

    Tensors are written one after the other, without a second copy of ``obj`` in memory. Parent folders are created.
    What goes to a URL is written to a local file first, where ``TMPDIR`` says.
    """
    if _is_local_file_protocol(path):
        _save_local(obj, _local_path(path))
        return
    with tempfile.TemporaryDirectory(prefix="fabric-save-") as folder:
        local = Path(folder, "checkpoint")
        torch.save(obj, local)
        replace_file(local, Remote.of(str(path)), uuid.uuid4().hex[:8])


def _save_local(obj: Any, path: Path) -> None:
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.is_dir():
        raise IsADirectoryError(f"Cannot save a file as {str(path)!r}: there is a folder of that name.")
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):  # a device or pipe must not be replaced by a file
        torch.save(obj, path)
        return
    temporary = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(obj, temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"Cannot save {str(path)!r}: {error.strerror or error}") from error
        if type(error) is RuntimeError:  # how torch's writer reports a full disk or a missing permission
            raise RuntimeError(f"Cannot save {str(path)!r}: {error}") from error
        raise
