"""Files behind a URL, through fsspec: whole or not there, looked at after they are written, tried again if need be.

What fails is tried a few times, because networks do that; what goes on failing raises an error that names the URL.
No function here lists names with wildcards: ``[`` and ``*`` in a path are letters.
"""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "r2"}

_ATTEMPTS = 4
_LOOKS = 5  # at what was written, which some stores do not show at once
_PAUSE = 0.25  # seconds, before the second attempt; then twice as much each time
_THREADS = 4
_END = 4096  # bytes, by which two files of one size are told apart
# what another attempt would not change
_LASTING: tuple[type[Exception], ...] = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
)


@dataclass(frozen=True)
class Remote:
    """A place behind a URL, where there may be a file, a folder, or nothing.

    ``root`` is a URL of the same file system, ``path`` what that calls the place, ``url`` what the user does.
    """

    root: str
    path: str
    url: str

    @classmethod
    def of(cls, url: str) -> "Remote":
        from fsspec.core import url_to_fs

        return cls(url, url_to_fs(url)[1].rstrip("/"), url.rstrip("/"))

    @property
    def fs(self) -> "AbstractFileSystem":
        """The file system. Those that may not be used by two threads are others in another thread."""
        from fsspec.core import url_to_fs
        from fsspec.implementations.cached import CachingFileSystem

        fs = url_to_fs(self.root)[0]
        return fs.fs if isinstance(fs, CachingFileSystem) else fs  # it would show what was there before

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def __truediv__(self, name: str) -> "Remote":
        return replace(self, path=f"{self.path}/{name}", url=f"{self.url}/{name}")

    def beside(self, name: str) -> "Remote":
        """The place of that name in the same folder."""
        return self.parent / name

    @property
    def parent(self) -> "Remote":
        """The folder that it is in."""
        return replace(self, path=self.path.rpartition("/")[0], url=self.url.rpartition("/")[0])


def retried(act: Callable[[], T], doing: str, lasting: tuple[type[Exception], ...] = _LASTING) -> T:
    """Return what ``act`` returns, after as many attempts as it takes, up to four.

    Raises:
        OSError: if the last one fails; it says what was attempted, and why that failed. Those of ``lasting`` keep
            their class, and are raised by the first attempt.

    """
    for number in range(_ATTEMPTS):
        try:
            return act()
        except lasting as error:
            kind = next(kind for kind in lasting if isinstance(error, kind))
            raise kind(f"Cannot {doing}: {error}") from error
        except Exception as error:
            if number == _ATTEMPTS - 1:
                raise OSError(f"Cannot {doing}: {type(error).__name__}: {error}") from error
        pause(number)
    raise AssertionError("unreachable")


def pause(number: int) -> None:
    """Wait after attempt ``number``, from 0: longer each time."""
    time.sleep(_PAUSE * 2**number)


def for_each(act: Callable[[T], object], items: Iterable[T]) -> None:
    """Call ``act`` with each item, in a few threads; the first error ends it, when those under way are done."""
    items = list(items)
    if len(items) < 2:
        for item in items:
            act(item)
        return
    with ThreadPoolExecutor(min(_THREADS, len(items))) as threads:
        calls = [threads.submit(act, item) for item in items]
        try:
            for call in calls:
                call.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


# -- looking


def kind_of(place: Remote) -> str | None:
    """Return ``"file"``, ``"directory"``, or None if there is nothing."""
    info = _info(place)
    return None if info is None else str(info["type"])


def size_of(place: Remote) -> int | None:
    """Return the size of the file in bytes; None if there is none."""
    info = _info(place)
    return int(info["size"]) if info is not None and info["type"] == "file" else None


def _info(place: Remote) -> dict[str, Any] | None:
    def look() -> dict[str, Any] | None:
        fs = place.fs
        fs.invalidate_cache(place.path)
        fs.invalidate_cache(fs._parent(place.path))
        try:
            return dict(fs.info(place.path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    return retried(look, f"look at {place.url!r}")


def read_bytes(place: Remote, start: int = 0) -> bytes | None:
    """Return the content from ``start`` on; None if there is no file."""

    def read() -> bytes | None:
        try:
            return bytes(place.fs.cat_file(place.path, start=start or None))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    return retried(read, f"read {place.url!r}")


def files_in(place: Remote) -> dict[str, int]:
    """Return the sizes of all files in the folder, and in those inside, by their names relative to it."""
    found = _find(place)
    sizes = {path[len(place.path) :].lstrip("/"): int(info["size"] or 0) for path, info in found.items()}
    return {name: size for name, size in sizes.items() if name and not name.endswith("/")}


def _find(place: Remote, **options: bool) -> dict[str, dict[str, Any]]:
    def find() -> dict[str, dict[str, Any]]:
        fs = place.fs
        fs.invalidate_cache(place.path)
        return dict(fs.find(place.path, detail=True, **options))

    return retried(find, f"list {place.url!r}")


def names_in(place: Remote) -> list[str]:
    """Return what is in the folder, by name, files and folders; none if there is no folder."""

    def list_names() -> list[str]:
        fs = place.fs
        fs.invalidate_cache(place.path)
        try:
            found = fs.ls(place.path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (str(path).rstrip("/") for path in found)
        return sorted(path.rpartition("/")[2] for path in names if path != place.path)

    return retried(list_names, f"list {place.url!r}")


# -- reading


def download(place: Remote, local: Path) -> None:
    """Copy a file to this machine, once; ``local`` and folders on the way to it are made."""
    local.parent.mkdir(parents=True, exist_ok=True)
    place.fs.get_file(place.path, str(local))


# -- writing


def upload(local: Path, place: Remote, final: Remote | None = None) -> None:
    """Copy a file of this machine to a place where there is none, or none that matters: it is not whole at once.

    Errors name ``final`` instead, if the file is on its way to there.
    """
    size = local.stat().st_size

    def put() -> None:
        _put(local, place)
        _look_until(lambda: size_of(place), size, "bytes are there")

    retried(put, f"write {(final or place).url!r}")


def _put(local: Path, place: Remote) -> None:
    fs = place.fs
    if not puts_at_once(place) and place.parent.path:
        fs.makedirs(place.parent.path, exist_ok=True)
    fs.put_file(str(local), place.path)


def replace_file(local: Path, place: Remote, name: str) -> None:
    """Copy a file of this machine to ``place``, where there is, at any time, all of it or all of what was there.

    An object store shows an object when all of it has arrived. Elsewhere it arrives under a hidden name with ``name``
    in it, and is then renamed.
    """
    content = _Content.of(local)
    if puts_at_once(place):

        def put() -> None:
            _put(local, place)
            content.look_for(place)

        retried(put, f"write {place.url!r}")
        return
    temporary = place.beside(temporary_name(place.name, name))
    try:
        upload(local, temporary, final=place)
        retried(
            lambda: _move(temporary, place, content),
            f"write {place.url!r}",
            lasting=(PermissionError, NotImplementedError),
        )
    except BaseException:
        with suppress(Exception):  # the network may be gone, and the first error is the one to know
            temporary.fs.rm_file(temporary.path)
        raise


def temporary_name(target: str, name: str) -> str:
    """What a file is called on its way to ``target``."""
    return f".{target[:180]}.{name}.staged"


def puts_at_once(place: Remote) -> bool:
    """Whether a file that is being written there is not seen before it is whole."""
    protocol = place.fs.protocol
    return bool(OBJECT_STORES & ({protocol} if isinstance(protocol, str) else set(protocol)))


@dataclass(frozen=True)
class _Content:
    """By what a file is known again: its size, and its end, which in a checkpoint has its checksum or its index."""

    size: int
    end: bytes

    @classmethod
    def of(cls, local: Path) -> "_Content":
        size = local.stat().st_size
        with local.open("rb") as file:
            file.seek(max(0, size - _END))
            return cls(size, file.read())

    def look_for(self, place: Remote) -> None:
        _look_until(lambda: size_of(place), self.size, "bytes are there")
        start = self.size - len(self.end)
        _look_until(lambda: read_bytes(place, start) == self.end, True, "what was written is there")


def _look_until(look: Callable[[], object], expected: object, what: str) -> None:
    found: object = None
    for number in range(_LOOKS):
        if (found := look()) == expected:
            return
        if number < _LOOKS - 1:
            pause(number)
    raise OSError(f"afterwards, {what}: {found!r}, not {expected!r}")


def _move(source: Remote, target: Remote, content: _Content) -> None:
    fs = source.fs
    try:
        _rename(fs, source.path, target.path)
    except FileNotFoundError:
        if size_of(source) is not None:
            raise
        # an earlier attempt may have done it, and not have heard of it
    except FileExistsError as error:
        raise NotImplementedError(
            "this file system does not let a file take the place of another in one step. Save to a path where there "
            "is none, or into a folder of checkpoints"
        ) from error
    content.look_for(target)


def _rename(fs: "AbstractFileSystem", source: str, target: str) -> None:
    from fsspec import AbstractFileSystem

    if getattr(fs.mv, "__func__", None) is not AbstractFileSystem.mv:
        fs.mv(source, target)
        return
    fs.cp_file(source, target)  # what the inherited `mv` does, without its wildcards
    fs.rm_file(source)


# -- deleting


def delete(place: Remote) -> None:
    """Delete the file; nothing there is fine."""

    def remove() -> None:
        with suppress(FileNotFoundError):
            place.fs.rm_file(place.path)

    retried(remove, f"delete {place.url!r}")


def delete_folder(place: Remote) -> None:
    """Delete the folder with all that is in it; nothing there is fine."""
    for_each(lambda name: delete(place / name), files_in(place))
    if not puts_at_once(place):  # object stores have no folders; some would take the bucket for one
        folders = {path for path, info in _find(place, withdirs=True).items() if info["type"] == "directory"}
        for path in sorted({*folders, place.path}, key=len, reverse=True):
            delete_if_empty(replace(place, path=path))


def delete_if_empty(place: Remote) -> None:
    """Delete the folder unless something is in it; where folders do not exist of themselves, do nothing."""
    if not puts_at_once(place):
        with suppress(OSError, NotImplementedError):  # something is in it, or it is gone with the last of its files
            place.fs.rmdir(place.path)


def is_inside(name: str) -> bool:
    """Whether a name relative to a folder leads to a place inside of it, also on this machine."""
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or "\\" in name or os.path.splitdrive(name)[0])
