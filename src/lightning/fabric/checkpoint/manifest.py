"""What a committed checkpoint contains: its files with sizes and checksums, and where it comes from.

Of a folder it is the file ``manifest.json`` in there; of a single file that ``torch.save`` wrote, which is a zip
archive, it is the archive's comment, so that file and manifest come and go together.
"""

import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lightning.fabric.checkpoint.checksum import again, checksum, is_known

MANIFEST = "manifest.json"
REMOTE_CONTENT = re.compile(r"save-[0-9a-f]{8,32}")  # a folder that its manifest names, beside it
_FORMAT = 1
_MAGIC = b'{"fabric_checkpoint":'
_END_OF_MANIFEST = b',"self":"'  # and eight digits, and two letters more
_COMMENT_LIMIT = 0xFFFF
_BEGIN_OF_ARCHIVE = b"PK\x03\x04"
_END_OF_ARCHIVE = b"PK\x05\x06"  # https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.16
_END_SIZE = 22
_COMMENT_SIZE = 2  # the bytes that say how long the comment is, the last ones of an archive without


class DamagedCheckpointError(RuntimeError):
    """A file of a checkpoint is missing, or not what was saved; ``file`` names it."""

    _says = "is damaged"

    def __init__(self, path: str | os.PathLike[str], file: str, what: str) -> None:
        self.path, self.file, self.what = os.fspath(path), file, what
        where = f"its file {file!r}" if file else "the file"
        super().__init__(f"The checkpoint {self.path!r} {self._says}: {where} {what}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.file, self.what)


class NewerCheckpointError(DamagedCheckpointError):
    """Nothing is wrong with the checkpoint, but only a later version of the library can read it."""

    _says = "is of a later version"


class _LaterFormatError(ValueError):
    pass


@dataclass(frozen=True)
class FileRecord:
    """A file as it was when it was committed; ``checksum`` None: not computed."""

    size: int
    checksum: str | None = None


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of. ``files`` by their paths inside of it; ``""`` is a checkpoint in one file."""

    files: Mapping[str, FileRecord]
    step: int | None = None
    world_size: int = 1
    strategy: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    time: str = ""  # ISO 8601, UTC

    @property
    def size(self) -> int:
        """In bytes, of all files."""
        return sum(record.size for record in self.files.values())

    def to_bytes(self) -> bytes:
        """As JSON, with a checksum of itself."""
        body = {"fabric_checkpoint": _FORMAT, **asdict(self)}
        text = json.dumps(body, separators=(",", ":"), sort_keys=False)
        return f'{text[:-1]},"self":"{zlib.crc32(text.encode()):08x}"}}'.encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Raises ``ValueError`` if it is none, is not what :meth:`to_bytes` gave, or names files outside."""
        body, separator, own = data.rpartition(_END_OF_MANIFEST)
        if not data.startswith(_MAGIC) or not separator or own != f'{zlib.crc32(body + b"}"):08x}"}}'.encode():
            raise ValueError("is no manifest, or is not as it was written")
        values = json.loads(body + b"}")
        if (number := values.pop("fabric_checkpoint")) != _FORMAT:
            raise _LaterFormatError(f"has format {number}, and this version reads {_FORMAT}: update lightning-fabric")
        files = {_inside(name): FileRecord(**record) for name, record in values.pop("files").items()}
        return cls(files=files, **values)


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise ValueError(f"names the file {name!r}, which is not inside of the checkpoint")
    return name


# -- making


def manifest_of(path: Path, checksums: bool = True, **facts: Any) -> Manifest:
    """Return the manifest of the file or folder as it is now; ``facts`` are the other fields of :class:`Manifest`."""
    return Manifest({name: record_of(path, name, checksums) for name in files_of(path)}, **facts)


def files_of(path: Path) -> list[str]:
    """Return the files of a checkpoint, by their paths inside of it; ``[""]`` for a checkpoint in one file."""
    if not path.is_dir():
        return [""]
    found = (Path(folder, name).relative_to(path).as_posix() for folder, _, names in os.walk(path) for name in names)
    return sorted(name for name in found if name != MANIFEST)


def record_of(path: Path, name: str, checksums: bool = True, trusts_archive: bool = False) -> FileRecord:
    """Return what the file is now, but for the two bytes that will say how long its manifest is, if it takes one.

    ``trusts_archive``: see :func:`~lightning.fabric.checkpoint.checksum.checksum`.
    """
    file = path / name if name else path
    size = file.stat().st_size
    covered = size - _COMMENT_SIZE if not name and _takes_comment(file, size) else size
    return FileRecord(covered, checksum(file, covered, trusts_archive) if checksums else None)


def _takes_comment(file: Path, size: int) -> bool:
    """Whether the file is an archive that has no comment."""
    with file.open("rb") as opened:
        opened.seek(max(0, size - _END_SIZE))
        end = opened.read()
    return end.startswith(_END_OF_ARCHIVE) and end[-_COMMENT_SIZE:] == b"\0\0"


def takes_manifest(path: Path) -> bool:
    """Whether :func:`attach` can put one there."""
    return path.is_dir() or _takes_comment(path, path.stat().st_size)


def attach(path: Path, manifest: Manifest) -> bool:
    """Put the ``manifest`` that :func:`manifest_of` made with the checkpoint; False if such a file can have none."""
    if path.is_dir():
        (path / MANIFEST).write_bytes(manifest.to_bytes())
        return True
    size = path.stat().st_size
    if manifest.files[""].size != size - _COMMENT_SIZE or not _takes_comment(path, size):
        return False
    comment = manifest.to_bytes()
    if len(comment) > _COMMENT_LIMIT:
        raise ValueError(f"The manifest has {len(comment)} bytes, but at most {_COMMENT_LIMIT} fit into a file.")
    with path.open("r+b") as file:
        file.seek(-_COMMENT_SIZE, os.SEEK_END)
        file.write(struct.pack("<H", len(comment)) + comment)
    return True


# -- reading


def read_manifest(path: Path) -> Manifest | None:
    """Return the manifest of a checkpoint; None if it has none, as those of other programs.

    Raises:
        FileNotFoundError: if there is nothing.
        DamagedCheckpointError: if the manifest itself is damaged.
        NewerCheckpointError: if a later version has saved it.

    """
    return _read_file(path) if path.is_dir() else _read_comment(path)


def _read_file(folder: Path) -> Manifest | None:
    try:
        return Manifest.from_bytes((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise no_manifest(folder, MANIFEST, str(error), error) from error


def no_manifest(path: str | os.PathLike[str], file: str, what: str, error: Exception) -> DamagedCheckpointError:
    """Return what :meth:`Manifest.from_bytes` found wrong."""
    kind = NewerCheckpointError if isinstance(error, _LaterFormatError) else DamagedCheckpointError
    return kind(path, file, what)


def _read_comment(path: Path) -> Manifest | None:
    with path.open("rb") as file:
        beginning = file.read(len(_BEGIN_OF_ARCHIVE))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END_SIZE - _COMMENT_LIMIT))
        tail = file.read()
    start = tail.rfind(_MAGIC)
    if start < 0:
        if tail[-len(_END_OF_MANIFEST) - 10 : -10] == _END_OF_MANIFEST:
            raise DamagedCheckpointError(path, "", "has a manifest that does not begin as one")
        if not size:
            raise DamagedCheckpointError(path, "", "is empty")
        if _BEGIN_OF_ARCHIVE.startswith(beginning) and _END_OF_ARCHIVE not in tail:
            raise DamagedCheckpointError(path, "", "is an archive without its end: something is cut off")
        if not any(beginning):  # as a file system may leave a file behind when the power fails
            raise DamagedCheckpointError(path, "", "begins with zeros")
        return None
    comment = tail[start:]
    if tail[start - _END_SIZE : start - _END_SIZE + 4] != _END_OF_ARCHIVE or tail[start - 2 : start] != struct.pack(
        "<H", len(comment)
    ):
        raise DamagedCheckpointError(path, "", "does not end as it was written")
    try:
        manifest = Manifest.from_bytes(comment)
    except (ValueError, KeyError, TypeError) as error:
        raise no_manifest(path, "", f"has a manifest that {error}", error) from error
    if manifest.files[""].size != size - len(comment) - 2:
        raise DamagedCheckpointError(
            path, "", f"has {size - len(comment) - 2} bytes, and had {manifest.files[''].size} when it was saved"
        )
    return manifest


def verify(
    path: Path, manifest: Manifest, checksums: bool = True, is_mine: Callable[[int], bool] = lambda number: True
) -> None:
    """Raise :class:`DamagedCheckpointError` unless every file is there and as it was.

    Sizes are compared of all files; checksums, which takes reading them, of those for which ``is_mine(number)``, so
    that ranks can share the work.
    """
    for name, record in manifest.files.items():
        if name:
            _compare_size(path, name, record)
    for number, (name, record) in enumerate(manifest.files.items()):
        if checksums and is_mine(number) and record.checksum is not None and is_known(record.checksum):
            with _naming(path / name if name else path):
                _compare_checksum(path, name, record)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """An error of the disk names the file, as one that comes from reading does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(file)
        raise


def _compare_size(path: Path, name: str, record: FileRecord) -> None:
    file = path / name
    if not file.is_file():
        raise DamagedCheckpointError(path, name, "is missing")
    if (size := file.stat().st_size) != record.size:
        raise DamagedCheckpointError(path, name, f"has {size} bytes, and had {record.size} when it was saved")


def _compare_checksum(path: Path, name: str, record: FileRecord) -> None:
    try:
        found = again(str(record.checksum), path / name if name else path, record.size)
    except EOFError as error:
        raise DamagedCheckpointError(path, name, "is shorter than it was") from error
    if found != record.checksum:
        raise DamagedCheckpointError(path, name, f"has other content than was saved ({found}, not {record.checksum})")


def checkpoints_in(folder: Path) -> Iterator[tuple[Path, Manifest | DamagedCheckpointError]]:
    """Yield what lies in ``folder`` and has a manifest, each with it or with what is wrong with it."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        try:
            manifest = read_manifest(path)
        except DamagedCheckpointError as error:
            yield path, error
            continue
        if manifest is not None:
            yield path, manifest
